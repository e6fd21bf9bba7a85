"""Inputs of a loss, its results, and the smallest workspace a sweep can run with."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fused_siglip.kernels import PanelSpec, panel_class
from fused_siglip.planner import PlanRequest, plan_panels

NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")


@dataclass
class Inputs:
    """The four differentiable inputs of a loss, its ids and its weights."""

    image_features: Tensor  # (M, D)
    text_features: Tensor  # (N, D)
    logit_scale: Tensor  # () or (1,)
    logit_bias: Tensor  # () or (1,)
    ids: dict[str, Tensor]  # image_ids (M,) and text_ids (N,), or empty
    # image_weights (M,) and text_weights (N,), or one of them, or empty
    weights: dict[str, Tensor] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [getattr(self, name) for name in NAMES]

    def to(self, dtype: torch.dtype) -> Inputs:
        """The same values (rounded to dtype) as fresh leaves; t and b keep their own dtype."""
        scalar = torch.promote_types(dtype, self.logit_scale.dtype)
        dtypes = (dtype, dtype, scalar, scalar)
        leaves = [
            t.detach().to(d, copy=True).requires_grad_(t.requires_grad)
            for t, d in zip(self.tensors(), dtypes, strict=True)
        ]
        return Inputs(*leaves, self.ids, self.weights)


def make_inputs(
    m: int,
    n: int,
    d: int,
    dtype: torch.dtype = torch.float32,
    *,
    t: float = 10.0,
    b: float = -10.0,
    ids: bool = False,
    requires_grad: tuple[bool, bool, bool, bool] = (True,) * 4,
    device: str = "cpu",
    seed: int = 0,
) -> Inputs:
    """Normalised features whose matched pairs are alike, as in training; ids repeat and pad."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(max(m, n), d, generator=generator)
    features = [
        torch.nn.functional.normalize(shared[:rows] + torch.randn(rows, d, generator=generator))
        for rows in (m, n)
    ]
    labels = {}
    if ids:
        labels = {
            name: torch.randint(-1, max(rows // 2, 1), (rows,), generator=generator).to(device)
            for name, rows in (("image_ids", m), ("text_ids", n))
        }
    scalar_dtype = torch.promote_types(dtype, torch.float32)
    tensors = [f.to(device, dtype) for f in features]
    tensors += [torch.tensor(v, dtype=scalar_dtype, device=device) for v in (t, b)]
    for tensor, flag in zip(tensors, requires_grad, strict=True):
        tensor.requires_grad_(flag)
    return Inputs(*tensors, labels)


def random_weights(inputs: Inputs, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Of images and texts, in [0, 1)."""
    generator = torch.Generator().manual_seed(9)
    sides = (("image_weights", inputs.image_features), ("text_weights", inputs.text_features))
    return {name: torch.rand(len(f), generator=generator).to(f.device, dtype) for name, f in sides}


def loss_and_grads(
    loss_function,
    inputs: Inputs,
    upstream: Tensor | None = None,  # (M,) with the reduction "none"; None: 1
    **options,
) -> list[Tensor | None]:
    """[loss, dX, dY, dt, db], None for an input that requires no gradient."""
    tensors = inputs.tensors()
    for tensor in tensors:
        tensor.grad = None
    loss = loss_function(*tensors, **inputs.ids, **inputs.weights, **options)
    if loss.requires_grad:
        if upstream is None:
            upstream = torch.ones_like(loss)
        loss.backward(upstream.to(loss.dtype))
    return [loss.detach()] + [tensor.grad for tensor in tensors]


def operand_dtype(backend: str, dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which features and dL/dz enter the products there."""
    return plan_panels(PlanRequest(1, 1, 1, dtype, device, backend)).operand_dtype


def one_tile(
    backend: str,
    dtype: torch.dtype,
    device: str = "cpu",
    filters_negatives: bool = False,
    weighted: bool = False,
) -> int:
    """workspace_bytes of a single tile: the smallest panels a sweep can run with."""
    panel = panel_class(backend)
    operand = operand_dtype(backend, dtype, device)
    spec = PanelSpec(
        *panel.tile, operand, True, True, filters_negatives=filters_negatives, weighted=weighted
    )
    return panel.workspace_bytes(spec)
