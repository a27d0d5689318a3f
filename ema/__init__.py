"""Averages of weights, and post-hoc reconstruction of those that were not tracked."""
