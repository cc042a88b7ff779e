"""Safetensors files: of attention and logit lens, and shards of projections."""
