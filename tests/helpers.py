"""What the tests share: inputs, the float64 oracle, errors and the tolerance they are held to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fused_siglip.kernels import GRAD_SCALE, panel_class
from fused_siglip.reference import eager_siglip_loss

NAMES = ("image_features", "text_features", "logit_scale", "logit_bias")
UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
}


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


@torch.no_grad()
def rounding_errors(
    inputs: Inputs,
    *,
    negative_only: bool = False,
    reduction: str = "mean",
    g_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """What rounding may do to each element of [loss, dX, dY, dt, db], before it is returned.

    The worst case, to first order in the unit roundoff u of the accumulation (float32's; float64's
    for float64 features): an n-term sum errs by n u of its absolute terms, and comes near that
    where all terms are equal. Similarities sum D products; logits are rounded three times (the
    exponential rounds its argument once more); log-sigmoid and sigmoid err by 8 u (Triton's
    reciprocal square root by 4 u); the two products sum N and M terms, sums over all pairs are made
    in blocks. ``g_dtype`` is the dtype in which dL/dz enters the products, by default the features'
    own. Float64 in the oracle errs too, and is counted.
    """
    x, y, t, b = (tensor.detach().double() for tensor in inputs.tensors())
    t, b = t.reshape(()), b.reshape(())
    dtype = inputs.image_features.dtype
    accumulate = torch.promote_types(dtype, torch.float32)
    u = UNIT_ROUNDOFF[accumulate] + UNIT_ROUNDOFF[torch.float64]
    if g_dtype is None:
        g_dtype = dtype
    (m, d), n = x.shape, y.shape[0]

    positive = torch.zeros(m, n, dtype=torch.bool, device=x.device)
    valid, images = ~positive, m
    if inputs.ids:
        image_ids, text_ids = inputs.ids["image_ids"], inputs.ids["text_ids"]
        valid = (image_ids >= 0)[:, None] & (text_ids >= 0)
        images = int((image_ids >= 0).sum())
        x = torch.where(image_ids[:, None] < 0, 0, x)  # padding may hold anything
        y = torch.where(text_ids[:, None] < 0, 0, y)
        positive = image_ids[:, None] == text_ids
    elif not negative_only:
        positive.fill_diagonal_(True)
    if negative_only:
        positive = torch.zeros_like(positive)
    divisor = max(images, 1) if reduction == "mean" else 1

    s = x @ y.T
    z = t * s + b
    v = torch.where(positive, -z, z)
    ds = d * u * (x.abs() @ y.T.abs())
    dz = t.abs() * ds + u * (t.abs() * s.abs() + 3 * z.abs())
    p, q = v.sigmoid(), (-v).sigmoid()
    softplus = v.clamp(min=0) + torch.log1p(torch.exp(-v.abs()))
    grown = torch.expm1(dz.clamp(max=700))  # sigmoid'(v) is p q, and changes by exp(dz) at most
    tiny = torch.finfo(accumulate).tiny  # exponentials may be flushed to 0 below
    d_term = torch.minimum(p * grown, dz) + 8 * u * softplus + tiny
    d_g = (p * q * grown).clamp(max=1) + 8 * u * p + tiny
    p, softplus, d_term, d_g = (torch.where(valid, w, 0) for w in (p, softplus, d_term, d_g))
    stored = d_g  # in the dtype of the products
    if g_dtype != accumulate:
        stored = d_g + UNIT_ROUNDOFF[g_dtype] * (p + d_g)
        stored += valid * smallest(g_dtype) / GRAD_SCALE.get(g_dtype, 1.0)

    pairs = min(m * n, 128)
    errors = [
        d_term.sum() + pairs * u * softplus.sum(),
        t.abs() * (stored @ y.abs() + (n + 3) * u * (p @ y.abs())),
        t.abs() * (stored.T @ x.abs() + (m + 3) * u * (p.T @ x.abs())),
        (s.abs() * d_g + p * ds).sum() + (pairs + 2) * u * (p * s.abs()).sum(),
        d_g.sum() + pairs * u * p.sum(),
    ]
    return [e / divisor for e in errors]


def smallest(dtype: torch.dtype) -> float:
    """The smallest subnormal number."""
    info = torch.finfo(dtype)
    return info.tiny * info.eps


def rounded(value: Tensor, dtype: torch.dtype) -> Tensor:
    """What rounding ``value`` to ``dtype`` may do to it."""
    return UNIT_ROUNDOFF[dtype] * value.abs().double() + smallest(dtype)


def excess(actual: Tensor, exact: Tensor, errors: Tensor) -> float:
    """The largest deviation over what is allowed: ``errors``, and rounding the result to its dtype.

    NaN counts as infinite. A result beyond the largest finite number may be that or infinity.
    """
    if exact.numel() == 0:
        return 0.0
    largest = torch.finfo(actual.dtype).max
    a, x = (v.double().clamp(-largest, largest).reshape(errors.shape) for v in (actual, exact))
    allowed = errors + rounded(x.abs() + errors, actual.dtype)
    return ((a - x).abs() / allowed).nan_to_num(torch.inf).max().item()


def shares(
    actual: list[Tensor | None],
    inputs: Inputs,
    *,
    g_dtype: torch.dtype | None = None,
    **options,
) -> dict[str, float]:
    """By output, how much of the error that rounding may cause there is against float64."""
    exact = oracle(inputs, **options)
    errors = rounding_errors(inputs, g_dtype=g_dtype, **options)
    found = {}
    for name, a, x, e in zip(("loss", *NAMES), actual, exact, errors, strict=True):
        if x is None:
            assert a is None, f"{name}: a gradient nobody asked for"
            continue
        assert a.shape == x.shape, name
        found[name] = excess(a, x, e)
    return found


def assert_as_exact_as_eager(actual: list[Tensor | None], inputs: Inputs, **options) -> None:
    """Hold loss and gradients to float64, each element within what rounding may do to eager's
    formulas when their logits and sums are in float32 (float64 for float64 features)."""
    for name, share in shares(actual, inputs, **options).items():
        assert share <= 1, f"{name}: {share:.2f} times the error that rounding may cause"


def one_tile(backend: str, dtype: torch.dtype) -> int:
    """workspace_bytes of a single tile: the smallest panels a sweep can run with."""
    panel = panel_class(backend)
    operand = dtype if backend == "triton" else torch.promote_types(dtype, torch.float32)
    return panel.workspace_bytes(*panel.tile, operand, True, True)
