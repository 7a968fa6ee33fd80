"""Independent judges: nothing in here is shared with the library (only its façade is called)."""
