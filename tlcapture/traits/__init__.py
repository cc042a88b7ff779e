"""Trait vectors: reading them, choosing one, projecting captures onto them, reading the trajectory."""
