"""Checks of a model against Hugging Face."""
