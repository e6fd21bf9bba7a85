"""What the tests share: inputs, the float64 oracle, errors and the tolerance they are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kept import without_choice
from torch import Tensor

from fused_siglip.kernels import panel_class
from fused_siglip.planner import plan_panels
from fused_siglip.testing import eager_siglip_loss
from fused_siglip.testing.rounding import UNIT_ROUNDOFF, excess, rounding_errors

NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")


@dataclass
class Inputs:
    """The four differentiable inputs of a loss, and its ids."""

    image_features: Tensor  # (M, D)
    text_features: Tensor  # (N, D)
    logit_scale: Tensor  # () or (1,)
    logit_bias: Tensor  # () or (1,)
    ids: dict[str, Tensor]  # image_ids (M,) and text_ids (N,), or empty

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
        return Inputs(*leaves, self.ids)


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


def loss_and_grads(loss_function, inputs: Inputs, **options) -> list[Tensor | None]:
    """[loss, dX, dY, dt, db], None for an input that requires no gradient."""
    tensors = inputs.tensors()
    for tensor in tensors:
        tensor.grad = None
    loss = loss_function(*tensors, **inputs.ids, **options)
    if loss.requires_grad:
        loss.backward()
    return [loss.detach()] + [tensor.grad for tensor in tensors]


def oracle(inputs: Inputs, **options) -> list[Tensor | None]:
    return loss_and_grads(eager_siglip_loss, inputs.to(torch.float64), **options)


def error(actual: Tensor, exact: Tensor) -> float:
    """Largest deviation, relative to the largest exact element (so that 1/B cancels)."""
    if exact.numel() == 0:
        return 0.0
    difference = (actual.double() - exact).abs().max()
    return (difference / exact.abs().max().clamp(min=torch.finfo(torch.float64).tiny)).item()


def shares(
    actual: list[Tensor | None],
    inputs: Inputs,
    *,
    g_dtype: torch.dtype | None = None,
    **options,
) -> dict[str, float]:
    """By output, how much of the error that rounding may cause there is against float64."""
    options, with_rounding = without_choice(inputs, options)
    exact = oracle(inputs, **options)
    errors = rounding_errors(*inputs.tensors(), **inputs.ids, g_dtype=g_dtype, **with_rounding)
    found = {}
    for name, a, x, e in zip(("loss", *NAMES), actual, exact, errors, strict=True):
        if x is None:
            assert a is None, f"{name}: a gradient nobody asked for"
            continue
        assert a.shape == x.shape, name
        found[name] = excess(a, x, e)
    return found


def conditions(inputs: Inputs, exact: list[Tensor | None], **options) -> list[float]:
    """How much relative errors of the terms of [loss, dX, dY, dt, db] grow in their sums: the sum
    of absolute terms over the largest absolute sum."""
    x, y, t, b = (tensor.detach().double() for tensor in inputs.tensors())
    z = (t * x @ y.T + b).requires_grad_()
    identity = torch.eye(y.shape[0], dtype=torch.float64, device=y.device)
    (g,) = torch.autograd.grad(eager_siglip_loss(z, identity, 1.0, **inputs.ids, **options), z)
    g = g.abs()
    absolute = [
        t.abs() * g @ y.abs(),
        t.abs() * g.T @ x.abs(),
        (g * (x @ y.T).abs()).sum(),
        g.sum(),
    ]
    grown = [1.0]
    for terms, total in zip(absolute, exact[1:], strict=True):
        largest = 0.0 if total is None or total.numel() == 0 else total.abs().max().item()
        grown.append(terms.max().item() / largest if largest else 1.0)
    return grown


def assert_as_exact_as_eager(actual: list[Tensor | None], inputs: Inputs, **options) -> None:
    """Hold loss and gradients to float64, within the error of the eager loss in the same dtype.

    Twice that error, since both are a draw of rounding errors; and never less than two roundings of
    the result plus what rounding z once does to exp(z) and to the sums of it, since a single number
    can be exact by luck. On a GPU exp2 and rsqrt are approximations besides (8 roundings at most),
    which do not cancel where all pairs are alike. In float64 the oracle is eager, so what is
    allowed is eager's error in float32, scaled.
    """
    exact = oracle(inputs, **options)
    dtype = inputs.image_features.dtype
    measured_in = torch.float32 if dtype == torch.float64 else dtype
    largest_z = (inputs.logit_scale.abs() + inputs.logit_bias.abs()).item()
    approximations = 8 if inputs.image_features.is_cuda else 0
    unit = UNIT_ROUNDOFF[torch.promote_types(dtype, torch.float32)]
    rounding_terms = (largest_z + approximations) * unit
    shrink = UNIT_ROUNDOFF[dtype] / UNIT_ROUNDOFF[measured_in]
    eager = loss_and_grads(eager_siglip_loss, inputs.to(measured_in), **options)
    exact_there = oracle(inputs.to(measured_in), **options)
    grown = conditions(inputs, exact, **options)
    for name, a, e, there, x, growth in zip(
        ("loss", *NAMES), actual, eager, exact_there, exact, grown, strict=True
    ):
        if x is None:
            assert a is None, f"{name}: a gradient nobody asked for"
            continue
        assert a.shape == x.shape, name
        floor = 2 * UNIT_ROUNDOFF[a.dtype] + rounding_terms * growth
        allowed = max(2 * shrink * error(e, there), floor)
        assert error(a, x) <= allowed, f"{name}: {error(a, x):.2e}, allowed {allowed:.2e}"


def operand_dtype(backend: str, dtype: torch.dtype, device: str) -> torch.dtype:
    """The dtype in which features and dL/dz enter the products there."""
    return plan_panels(1, 1, 1, dtype, device, backend).operand_dtype


def one_tile(
    backend: str, dtype: torch.dtype, device: str = "cpu", filters_negatives: bool = False
) -> int:
    """workspace_bytes of a single tile: the smallest panels a sweep can run with."""
    panel = panel_class(backend)
    operand = operand_dtype(backend, dtype, device)
    return panel.workspace_bytes(*panel.tile, operand, True, True, filters_negatives)
