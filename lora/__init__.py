"""Modules made of the kernels: NF4Linear, LoRALinear, attaching and switching off adapters, adapter files."""
