"""Loaders of the data sets in their public layouts, one data set a file."""
