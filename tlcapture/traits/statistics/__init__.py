"""Statistics of a projection along a response, each beside its chance level."""
