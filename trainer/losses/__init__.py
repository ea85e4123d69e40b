"""Losses as pure functions of log-probabilities or hidden states, each with its paper; `objective` is their table."""
