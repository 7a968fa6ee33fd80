"""Folders that somebody damaged or forged, and what the reader says to them."""
