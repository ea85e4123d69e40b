"""Functional ops on tensors and plain numbers: quantisation, 4-bit linear, LoRA update; references included."""

from . import lora as lora
from . import nf4 as nf4
