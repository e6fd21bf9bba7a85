"""Panel kernels: one backend a file, each a class with the interface of :class:`Panel`.

Installed as ``fused_siglip.kernels``. Importing this package imports neither triton nor a device.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# fp16 holds dL/dz of an easy negative (4.5e-5 at b = -10) only as a subnormal. Panels in fp16 are
# written times this power of two, and the two products divide by it: exact, and g <= 1 cannot overflow.
GRAD_SCALE = {torch.float16: 2.0**15}


class Positives(NamedTuple):
    """Which pairs of one panel are positive. Without ids and diagonal: none."""

    diagonal: int | None = None  # local pair (i, i + diagonal) is positive
    image_ids: Tensor | None = None  # (m,) int64; pair (i, j) is positive where the ids are equal,
    text_ids: Tensor | None = None  # (n,) int64; and takes no part where either is negative


class Panel(Protocol):
    """What a backend does with one panel: product, scale and bias, log-sigmoid, dL/dz."""

    tile: tuple[int, int]  # smallest panel the backend works on: panel sides are multiples of it

    @staticmethod
    def workspace_bytes(rows: int, cols: int, dtype: torch.dtype, write_g: bool) -> int:
        """Bytes the constructor allocates for panels up to (rows, cols) with operands of ``dtype``."""

    def __init__(
        self, rows: int, cols: int, dtype: torch.dtype, device: torch.device, write_g: bool
    ): ...

    def __call__(
        self,
        x: Tensor,  # (m, D) image features, m <= rows, any strides
        y: Tensor,  # (n, D) text features, n <= cols, any strides, dtype and device of x
        logit_scale: Tensor,  # () in the accumulation dtype
        logit_bias: Tensor,  # () likewise
        positives: Positives,
        sums: Tensor,  # (3,) accumulation dtype, overwritten: sums of softplus(u), g*s, g
        scalar_grads: bool,  # False: sums[1:] may be left as they are
    ) -> Tensor | None:  # (m, n) g in x's dtype times GRAD_SCALE (a view of the workspace), or None
        ...
