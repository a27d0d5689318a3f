"""Noise levels and schedules: pure functions of the papers' symbols, one copy each."""
