"""Projecting activations onto vectors, and the content of projection files."""
