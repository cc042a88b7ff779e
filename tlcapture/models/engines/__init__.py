"""What runs a model: the one place that knows what differs between engines, and between versions of TransformerLens."""
