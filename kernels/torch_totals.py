"""The sums over all pairs, as the loss and the factors of its gradients."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """A tensor of them on the CPU: in a quarter of the time that torch.tensor takes."""
    return torch.frombuffer(_rounded(values, dtype), dtype=dtype)


def _rounded(values: Sequence[float], dtype: torch.dtype) -> array.array[float]:
    return array.array("d" if dtype == torch.float64 else "f", values)


class TorchTotals:
    """The part of a panel that adds its sums up, in torch."""

    @staticmethod
    def finish(
        sums: Tensor | list[float],
        logit_scale: Tensor,
        divisor: float | Tensor,
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # (), (3,)
        """See :meth:`fused_siglip.kernels.Panel.finish`."""
        if isinstance(sums, Tensor) and sums.is_cpu:  # additions in float64
            sums = [sum(parts) for parts in sums.tolist()]
        if isinstance(sums, list):  # fewer torch calls
            total, dscale, dbias = sums if len(sums) == 3 else (*sums, 0.0, 0.0)
            dtype, divisor = logit_scale.dtype, float(divisor)
            scale = logit_scale.item() / factor
            factors = numbers([dscale / divisor, dbias / divisor, scale / divisor], dtype)
            # rounded first, maybe to infinity: torch takes no number that the dtype cannot hold
            (rounded,) = _rounded([total / divisor], dtype)
            return torch.scalar_tensor(rounded, dtype=dtype, device="cpu"), factors
        loss, *scalars = sums.sum(1).unbind()
        if not scalars:
            scalars = [torch.zeros_like(loss)] * 2
        return loss / divisor, torch.stack((*scalars, logit_scale / factor)).div_(divisor)
