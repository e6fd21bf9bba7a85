"""The two products of the gradients, as the libraries make them."""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import multiplies_half_into_fp32


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float, accumulate: bool) -> None:
    """out = alpha * a @ b, plus what is there if ``accumulate``; summed in out's dtype.

    ``a`` may be sparse: then only what it holds is multiplied.
    """
    if a.is_sparse and not accumulate:
        out.zero_()  # which torch leaves undone where the matrix holds nothing
        accumulate = True
    beta = 1 if accumulate else 0
    if a.dtype != out.dtype and multiplies_half_into_fp32(out.device.type):
        torch.addmm(out, a, b, out_dtype=out.dtype, beta=beta, alpha=alpha, out=out)
    elif a.dtype == b.dtype == out.dtype:
        torch.addmm(out, a, b, beta=beta, alpha=alpha, out=out)
    else:
        torch.addmm(out, a.to(out.dtype), b.to(out.dtype), beta=beta, alpha=alpha, out=out)
