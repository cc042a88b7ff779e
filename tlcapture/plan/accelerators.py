"""Peak memory bandwidth and speed of common accelerators, from their data sheets: upper bounds, for estimates.

| name | memory GB/s | dense 16-bit TFLOP/s | source |
| --- | --- | --- | --- |
| `t4` | 320 (data sheet: 320+) | 65 | NVIDIA T4 data sheet |
| `a10` | 600 | 125 | NVIDIA A10 data sheet |
| `l4` | 300 | 121 | NVIDIA L4 data sheet (242 with sparsity) |
| `l40s` | 864 | 362 | NVIDIA L40S data sheet |
| `rtx4090` | 1008 | 165 | NVIDIA Ada architecture paper (FP32 accumulation) |
| `v100` | 900 | 125 | NVIDIA V100 data sheet (SXM2) |
| `a100-40` | 1555 | 312 | NVIDIA A100 data sheet (40 GB) |
| `a100-80` | 2039 | 312 | NVIDIA A100 data sheet (80 GB SXM) |
| `h100` | 3350 | 989 | NVIDIA H100 data sheet (SXM, 1979 with sparsity) |
| `h200` | 4800 | 989 | NVIDIA H200 data sheet (SXM, 1979 with sparsity) |
| `mi300x` | 5300 | 1307 | AMD Instinct MI300X data sheet |

Loads no torch.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Accelerator:
    """Memory bandwidth in bytes per second, and dense 16-bit floating-point operations per second."""

    bandwidth: float
    flops: float


ACCELERATORS = {
    name: Accelerator(gigabytes * 1e9, teraflops * 1e12)
    for name, gigabytes, teraflops in (
        ("t4", 320, 65),
        ("a10", 600, 125),
        ("l4", 300, 121),
        ("l40s", 864, 362),
        ("rtx4090", 1008, 165),
        ("v100", 900, 125),
        ("a100-40", 1555, 312),
        ("a100-80", 2039, 312),
        ("h100", 3350, 989),
        ("h200", 4800, 989),
        ("mi300x", 5300, 1307),
    )
}
