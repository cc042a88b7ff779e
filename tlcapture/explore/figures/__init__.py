"""Figures and displays of captures and prompt sets in notebooks."""
