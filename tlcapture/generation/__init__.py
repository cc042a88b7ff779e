"""The generation loop: sampling, padding, recording of activations."""
