"""Optimizers, learning-rate schedules and parameter groups."""

from .groups import parameter_groups
from .optimizer import AdamW, Lion
from .schedule import rate_factor, scheduler

__all__ = ["AdamW", "Lion", "parameter_groups", "rate_factor", "scheduler"]
