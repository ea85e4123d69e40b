"""Functional ops on tensors and plain numbers: quantisation, 4-bit linear, LoRA update; each with its reference beside it."""
