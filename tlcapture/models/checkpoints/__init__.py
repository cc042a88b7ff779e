"""Where a model's files are, what is wrong with them, and their weights as a Hugging Face model."""
