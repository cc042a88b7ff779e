"""Shared by all commands: a run with its report, record, display and lock, the executors, the model loader."""
