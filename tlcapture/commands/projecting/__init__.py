"""Projections of captures and the summary of a projected prompt set."""
