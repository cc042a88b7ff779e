"""The shapes of tensors that modules exchange, as jaxtyping aliases.

Axes:

| axis | meaning |
| --- | --- |
| `batch` | prompts that are run together, left-padded |
| `pos` | token positions of a step: the padded prompts at prefill, one when decoding |
| `so_far` | token positions of a batch up to the end of a step: those its keys and values have |
| `n_tokens` | token positions of one part (prompt or response), or of both as one sequence |
| `n_points` | residual points of a model: `2 * n_layers + 1`, in the order they are computed |
| `d_model` | width of the residual stream |
| `d_vocab` | size of the vocabulary |
| `n_numbers` | random numbers that choose a token |
| `n_vectors` | trait vectors that are projected together |
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Int[Tensor, "batch pos"]
Mask = Int[Tensor, "batch pos"]
MaskSoFar = Int[Tensor, "batch so_far"]
LastLogits = Float[Tensor, "batch d_vocab"]
Logits = Float[Tensor, "*lead d_vocab"]
Residual = Float[Tensor, "*lead d_model"]
ResidualPoints = Float[Tensor, "n_points n_tokens d_model"]
LayerOutputs = Float[Tensor, "n_layers n_tokens d_model"]
Patterns = Float[Tensor, "n_layers n_heads n_queries n_tokens"]
Vector = Float[Tensor, " d_model"]
Vectors = Float[Tensor, "n_vectors d_model"]
RowVectors = Float[Tensor, "batch d_model"]
Trajectory = Float[Tensor, " n_tokens"]
Rows = Bool[Tensor, " batch"]
NextTokens = Int[Tensor, " batch"]
Noise = Float[Tensor, "batch n_numbers"]
