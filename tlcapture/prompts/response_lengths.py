"""How long a response may be by default, in tokens. Imports nothing."""

NEW_TOKENS = 50
THINKING_TOKENS = 1024  # of a model that thinks: it answers a short question within about a thousand
