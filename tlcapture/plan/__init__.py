"""What a capture will cost, before it runs."""
