"""Vectors that were not extracted here: packaged, exported, and made by other tools."""
