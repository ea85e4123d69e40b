"""The training loop: SFT, evaluation, training checkpoints, metrics and the loss curve."""
