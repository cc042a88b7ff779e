"""What `evaluate` finds of one trait and of all traits, before it becomes the evaluation file."""
