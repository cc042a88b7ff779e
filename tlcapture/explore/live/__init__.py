"""Captures made in Python: `capture(...)`, its prompts, and its interventions."""
