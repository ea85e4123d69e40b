"""Functional ops on tensors and plain numbers: quantisation, 4-bit linear, LoRA update; references included."""
