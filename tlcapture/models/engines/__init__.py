"""The engines that run a model. They handle all differences between engines and between TransformerLens versions."""
