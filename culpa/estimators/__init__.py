"""Estimators of stage effects, one a file."""
