"""Optimizers, learning-rate schedules and parameter groups."""

from .groups import parameter_groups as parameter_groups
from .optimizer import AdamW as AdamW
from .optimizer import Lion as Lion
from .schedule import rate_factor as rate_factor
from .schedule import scheduler as scheduler
