"""Decoders, one file a family; reading checkpoints (HF folder, GGUF); generation."""
