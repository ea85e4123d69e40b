"""fourbit: fine-tune language models with LoRA and QLoRA on PyTorch alone.

This page is the public API; everything else is internal.
"""

from .errors import DiskError as DiskError
from .errors import EnvironmentProblem as EnvironmentProblem
from .errors import FourbitError as FourbitError
from .errors import InputError as InputError
from .errors import NumericError as NumericError

__version__ = "0.1.0"
