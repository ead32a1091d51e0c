"""Evaluation: tasks, splits, metrics and the baselines every score stands beside."""
