"""What all experiments share: parts that are kept, results, pages, charts."""
