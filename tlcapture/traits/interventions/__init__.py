"""Interventions along trait vectors: as asked for, as recorded, and with their vectors."""
