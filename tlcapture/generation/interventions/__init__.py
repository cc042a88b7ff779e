"""Changing activations while the model runs: what is added or removed, and at which tokens."""
