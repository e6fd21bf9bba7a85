"""Learnable scale and bias: kept in float32, bounded, and started where memory holds nothing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .kernels import accumulate_dtype


def as_tensor(value: float | Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    if isinstance(value, Tensor):
        return value
    return torch.full((), float(value), dtype=accumulate_dtype(dtype), device=device)


def exp(log_scale: Tensor) -> Tensor:
    """t = exp(t') in float32, or float64 if t' is. In bfloat16 t would be off by up to 0.4%."""
    return log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).exp()


def bounded_exp(log_scale: Tensor, bound: float) -> Tensor:
    """min(exp(t'), bound) likewise, finite however large t' is.

    Beyond the bound the gradient is kept where descent lowers t'. With that of clamp, 0, what is
    beyond the bound once would stay there.
    """
    wide = log_scale.to(torch.promote_types(log_scale.dtype, torch.float32))
    return _BoundedExp.apply(wide, bound)


class _BoundedExp(torch.autograd.Function):
    generate_vmap_rule = True  # for torch.func

    @staticmethod
    def forward(log_scale: Tensor, bound: float) -> Tensor:
        # t' is bounded, not exp(t'), which overflows
        factor = log_scale.clamp(max=math.log(bound)).exp()
        return torch.where(log_scale > math.log(bound), bound, factor.clamp(max=bound))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        log_scale, bound = inputs
        ctx.save_for_backward(output, log_scale > math.log(bound))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        factor, beyond = ctx.saved_tensors
        grad = upstream * factor
        return torch.where(beyond, grad.clamp(min=0), grad), None


def keeping_scalars(
    module: nn.Module, fn: Callable[[Tensor], Tensor], starts: Mapping[str, Sequence[float]]
) -> Callable[[Tensor], Tensor]:
    """``fn``, which ``module._apply`` is to call, with care for the module's own scalars.

    starts: by name of a parameter, the values to start from. What ``fn`` would make half precision
    stays float32, where steps of an optimizer do not round to nothing; what it moves off the meta
    device, where there were no values, starts.
    """
    own: dict[int, Sequence[float] | None] = {}
    keep_alive = []
    for name, values in starts.items():
        parameter = module._parameters.get(name)
        if parameter is not None:
            own[id(parameter)] = values
            if parameter.grad is not None:
                keep_alive.append(parameter.grad)
                own[id(keep_alive[-1])] = None

    def apply(tensor: Tensor) -> Tensor:
        out = fn(tensor)
        if id(tensor) not in own:
            return out
        if out.is_floating_point() and out.dtype.itemsize < 4:
            out = tensor.to(out.device, torch.float32)
        values = own[id(tensor)]
        if values is not None and tensor.is_meta and not out.is_meta:
            fill(out, values)
        return out

    return apply


@torch.no_grad()
def fill(parameter: Tensor, values: Sequence[float]) -> None:
    """Write ``values`` into a parameter of as many elements; also a sharded one (FSDP2)."""
    if len(values) == 1:
        parameter.fill_(values[0])
        return
    new = torch.tensor(values, dtype=parameter.dtype, device=parameter.device)
    if hasattr(parameter, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        # every rank has the same values: nothing is sent
        new = distribute_tensor(
            new, parameter.device_mesh, parameter.placements, src_data_rank=None
        )
    parameter.copy_(new)
