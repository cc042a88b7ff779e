"""A pretended GPU for tests: tensors on `cuda` that compute in main memory, and what would be luck on a GPU is a fault.

    python -m pytest -p tests.pretend_cuda.plugin tests/fast

It needs no GPU and the torch for CPUs.
"""
