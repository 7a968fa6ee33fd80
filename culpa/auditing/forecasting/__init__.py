"""What a job will take of time, disk and memory, before it runs."""
