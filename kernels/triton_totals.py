"""The sums over all pairs in Triton: added up, divided and put in place by one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # sums added at one time


@triton.jit(do_not_specialize=["count", "stride_sum", "stride_part"])
def finish_kernel(  # noqa: PLR0913, a kernel's pointers, sizes and strides
    partials_ptr,  # (SUMS, count) fp32: of softplus(u); if SUMS is 3, of dlogits * s, dlogits
    logit_scale_ptr,  # () fp32
    divisor_ptr,  # () integer or floating, or None: see the next
    divisor,  # a number, or None
    loss_ptr,  # () fp32
    factors_ptr,  # (3,) fp32
    count,
    stride_sum,
    stride_part,
    SUMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the sums in a fixed order, each divided once."""
    if divisor_ptr is not None:
        divisor = tl.load(divisor_ptr).to(tl.float32)
    for row in tl.static_range(3):
        total = 0.0
        if row < SUMS:
            parts = tl.zeros((BLOCK,), tl.float32)
            start = 0
            while start < count:  # the interpreter takes no range of a number that it was given
                part = start + tl.arange(0, BLOCK)
                offsets = row * stride_sum + part * stride_part
                parts += tl.load(partials_ptr + offsets, mask=part < count, other=0.0)
                start += BLOCK
            total = tl.sum(parts)
        out_ptr = loss_ptr if row == 0 else factors_ptr + row - 1
        tl.store(out_ptr, tl.div_rn(total, divisor))
    tl.store(factors_ptr + 2, tl.div_rn(tl.load(logit_scale_ptr), divisor))


class TritonTotals:
    """The part of a panel that adds its sums up, in Triton."""

    @staticmethod
    def finish(
        sums: Tensor | list[float],
        logit_scale: Tensor,
        divisor: float | Tensor,
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # (), (3,)
        """See :meth:`fused_siglip.kernels.Panel.finish`."""
        assert isinstance(sums, Tensor)  # a panel of this backend knows no totals
        loss, factors = sums.new_empty(()), sums.new_empty(3)
        if factor != 1:
            logit_scale = logit_scale / factor
        known = not isinstance(divisor, Tensor)
        with torch.cuda.device_of(sums):  # Triton launches on the current device
            finish_kernel[(1,)](
                sums,
                logit_scale,
                None if known else divisor,
                float(divisor) if known else None,
                loss,
                factors,
                sums.shape[1],
                *sums.stride(),
                SUMS=sums.shape[0],
                BLOCK=BLOCK,
            )
        return loss, factors
