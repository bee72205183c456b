"""Optimizers and schedules: torch only."""
