"""Real runs that show what the library does: the demo."""
