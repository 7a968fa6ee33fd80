"""What happened: recording a run, keeping it, and executing it again bit for bit."""
