"""Prompt sets, chat templates and token ids."""
