"""The generation loop: batches, padding, sampling, recording of activations, interventions."""
