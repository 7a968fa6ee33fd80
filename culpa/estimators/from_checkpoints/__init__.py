"""Runs known by the checkpoints at their stages' ends only, without a recording."""
