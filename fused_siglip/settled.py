"""A call with its dtypes settled, and its backend: where every operator begins."""

from __future__ import annotations

import contextlib
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


def settle(inputs: Inputs, spec: LossSpec) -> Settled:
    x, y, scale, bias = inputs
    dtype = spec.dtype or x.dtype
    acc = accumulate_dtype(dtype)
    run = Execution(spec.backend or default_backend(x.device, dtype), spec.workspace_bytes)
    # where the batch is small each torch call saved counts
    x = x if x.dtype == dtype else x.to(dtype)
    y = y if y.dtype == dtype else y.to(dtype)
    return Settled(x, y, Affine(_scalar(scale, acc), _scalar(bias, acc)), run)


def _scalar(value: Tensor, dtype: torch.dtype) -> Tensor:  # ()
    if value.dim() == 0 and value.dtype == dtype:
        return value
    return value.to(dtype).reshape(())
