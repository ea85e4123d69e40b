"""Modules made of the kernels: 4-bit layers, layers with named adapters; attaching, switching and keeping adapters."""
