"""Honest measurements: the timer, paired statistics, the environment, and verdicts in words."""
