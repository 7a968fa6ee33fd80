"""Several processes that train, or walk, one run together."""
