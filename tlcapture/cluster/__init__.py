"""Running the work of a command on a Ray cluster."""
