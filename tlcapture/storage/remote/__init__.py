"""Roots in an object store: listing, locks, and the working copy on this machine."""
