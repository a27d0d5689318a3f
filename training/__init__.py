"""Training: datasets, loss, schedules, EMA and the loop."""
