"""Recording activations and attention patterns of a batch while the model runs."""
