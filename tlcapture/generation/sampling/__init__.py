"""Choosing the next token: rules on logits, random numbers, and a checkpoint's own settings."""
