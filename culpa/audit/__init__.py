"""Judging a run: screening by scores, proof by replay."""
