"""Views: pure functions from the cache of one prompt's run to one kind of output each.

A cache maps TransformerLens's hook names to activations over prompt and response as one sequence, without a
batch axis: `[n_tokens, ...]`, patterns `[n_heads, n_tokens, n_tokens]`. Each view has a function `..._hooks`
that names the activations it reads.
"""
