"""Planning and carrying out a capture: its options, tasks, size, memory, and the worker that runs the model."""
