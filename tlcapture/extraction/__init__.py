"""From contrastive examples to trait vectors."""
