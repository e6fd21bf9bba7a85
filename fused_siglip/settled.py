"""A call with its dtypes settled, and its backend: where every operator begins."""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .kernels import Affine, accumulate_dtype, default_backend
from .spec import Execution, LossSpec


class Inputs(NamedTuple):
    """Features, scale and bias, whose dtypes are not settled yet."""

    x: Tensor  # (M, D)
    y: Tensor  # (N, D)
    logit_scale: Tensor  # () or (1,), of any floating dtype
    logit_bias: Tensor  # likewise


class Settled(NamedTuple):
    """A call with its dtypes settled."""

    x: Tensor  # (M, D) in the dtype of the products' operands
    y: Tensor  # (N, D) likewise
    affine: Affine
    run: Execution


_NOTHING = contextlib.nullcontext()


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[Any]:
    """The dtypes are settled: autocast must not round the products inside once more."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return _NOTHING


def _default_backend(x: Tensor, dtype: torch.dtype) -> str:
    return _default_on_gpu(x.device, dtype) if x.is_cuda else default_backend(x.device, dtype)


# Asked at every call, and torch takes microseconds to answer. Features' devices have an index.
_default_on_gpu = functools.cache(default_backend)


def settle(inputs: Inputs, spec: LossSpec) -> Settled:
    x, y, scale, bias = inputs
    dtype = spec.dtype or x.dtype
    acc = accumulate_dtype(dtype)
    run = Execution(spec.backend or _default_backend(x, dtype), spec.workspace_bytes)
    # where the batch is small each torch call saved counts
    x = x if x.dtype == dtype else x.to(dtype)
    y = y if y.dtype == dtype else y.to(dtype)
    return Settled(x, y, Affine(_scalar(scale, acc), _scalar(bias, acc)), run)


def known_factor(call: Settled, divisor: float | Tensor) -> float:
    """t / R, to go into the products where the host need not wait for it: then a backward from the
    loss itself has nothing to multiply. 1 elsewhere, and where products may over- or underflow."""
    if not (call.x.is_cpu and call.run.backend == "torch"):
        return 1.0
    factor = call.affine.scale.item() / float(divisor)
    return factor if 1e-9 < abs(factor) < 1e9 else 1.0


def _scalar(value: Tensor, dtype: torch.dtype) -> Tensor:  # ()
    if value.dim() == 0 and value.dtype == dtype:
        return value
    return value.to(dtype).reshape(())
