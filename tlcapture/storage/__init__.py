"""Files: their paths, writing them atomically, reading and validating them."""
