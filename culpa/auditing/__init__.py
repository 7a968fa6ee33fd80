"""Judging a run: scores screen every update and stage, replays prove the few that matter."""
