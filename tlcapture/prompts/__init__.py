"""Prompt sets, chat templates, token ids and their texts."""
