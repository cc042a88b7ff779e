"""Estimates what a capture will cost before it runs."""
