"""Optimizers, learning-rate schedules and parameter groups."""

from .adamw import AdamW as AdamW
from .adamw import AdamW8bit as AdamW8bit
from .adamw import PagedAdamW as PagedAdamW
from .adamw import PagedAdamW8bit as PagedAdamW8bit
from .groups import parameter_groups as parameter_groups
from .lion import Lion as Lion
from .lion import Lion8bit as Lion8bit
from .lion import PagedLion as PagedLion
from .lion import PagedLion8bit as PagedLion8bit
from .schedule import rate_factor as rate_factor
from .schedule import scheduler as scheduler
