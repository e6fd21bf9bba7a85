"""The sums over all pairs, as the loss and the factors of its gradients."""

from __future__ import annotations

import array
from collections.abc import Sequence

import torch
from torch import Tensor


def numbers(values: Sequence[float], dtype: torch.dtype) -> Tensor:
    """A tensor of them on the CPU: in a quarter of the time that torch.tensor takes."""
    code = "d" if dtype == torch.float64 else "f"
    return torch.frombuffer(array.array(code, values), dtype=dtype)


class TorchTotals:
    """The part of a panel that adds its sums up, in torch."""

    @staticmethod
    def finish(
        partials: Tensor,
        logit_scale: Tensor,
        divisor: float | Tensor,
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # (), (3,)
        """See :meth:`fused_siglip.kernels.Panel.finish`."""
        if partials.is_cpu:  # fewer torch calls, and additions in float64
            total, *scalars = (sum(parts) for parts in partials.tolist())
            scalars = [*(scalars or (0.0, 0.0)), logit_scale.item() / factor]
            divisor = float(divisor)
            factors = numbers([value / divisor for value in scalars], partials.dtype)
            return torch.scalar_tensor(total / divisor, dtype=partials.dtype, device="cpu"), factors
        loss, *sums = partials.sum(1).unbind()
        if not sums:
            sums = [torch.zeros_like(loss)] * 2
        return loss / divisor, torch.stack((*sums, logit_scale / factor)).div_(divisor)
