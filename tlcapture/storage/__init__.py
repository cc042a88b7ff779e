"""Files: where they lie, how they are written whole, read and validated."""
