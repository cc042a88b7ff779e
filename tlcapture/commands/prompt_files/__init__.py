"""The files made from one prompt: which of them exist, what they hold, and how they are written."""
