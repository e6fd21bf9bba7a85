"""Calls of the loss drawn at random.

One generator serves the property tests (hypothesis drives it, and shrinks what it draws) and the
fuzz command, where an integer seed drives it: the same seed is the same case.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fused_siglip import Below, Easiest, Hardest, PositiveTarget, PositiveWeight, Random
from support.devices import HAS_GPU, INTERPRETED
from support.inputs import NAMES, Inputs, make_inputs

DEVICE = "cuda" if HAS_GPU and not INTERPRETED else "cpu"
DTYPES = ("float32", "bfloat16", "float16", "float64")
LARGEST = 300  # rows, columns and features
# Tiles are 64 x 64 (torch) and 128 x 128 (triton); products step through D by 16, 32 or 64.
EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 191, 192, 255, 256, 257, 300)
LAYOUTS = (
    "contiguous",
    "transposed",
    "every second row",
    "every second column",
    "columns of a wider matrix",
    "off by one element",  # so that no row starts on a multiple of 16 bytes
    "one row, expanded",
)


@dataclass(frozen=True)
class Case:
    """One call of the loss. Its repr is what a miss is reported with."""

    backend: str
    dtype: str
    m: int
    n: int
    d: int
    t: float
    b: float
    features: str  # "matched" pairs, "independent" and not normalised, or all "equal"
    layouts: tuple[str, str]
    ids: str | None  # "unique", "repeated", "padded", "only padding", or None: the diagonal
    negative_only: bool
    negatives: Random | Hardest | Easiest | Below | None
    reduction: str
    tiles: int | None  # that the workspace holds; None: the default
    requires_grad: tuple[bool, bool, bool, bool]
    scalar_shape: tuple[int, ...]
    values: int  # seed of the features, ids and weights
    weights: tuple[str | None, str | None] = (None, None)  # of images and texts: see WEIGHTS
    positives: PositiveWeight | PositiveTarget | None = None
    label_smoothing: float = 0.0


def _size(draw: random.Random) -> int:
    kind = draw.randint(0, 2)
    if kind == 0:
        return draw.randint(0, 8)
    return draw.choice(EDGES) if kind == 1 else draw.randint(0, LARGEST)


def _scalar(draw: random.Random, usual: tuple[float, ...]) -> float:
    """One of the usual values, or any size between 1e-3 and 1e4, of either sign."""
    if draw.randint(0, 1) == 0:
        return draw.choice(usual)
    return draw.choice((1, -1)) * round(10.0 ** draw.randint(-3, 3) * draw.randint(1, 10), 4)


def _negatives(draw: random.Random) -> Random | Hardest | Easiest | None:
    kind = draw.choice((None, None, None, Random, Hardest, Easiest))
    if kind is None:
        return None
    keep = draw.choice((0.5, 0.1, 0.03, 0.003, 0.9, 1))
    return Random(keep, draw.randint(0, 2**63 - 1)) if kind is Random else kind(keep)


# What weights may be: a name, and their values of random numbers in [0, 1).
WEIGHTS = {
    "ones": torch.ones_like,
    "some zeros": lambda u: torch.where(u < 0.3, 0.0, u),
    "zeros": torch.zeros_like,
    "any size": lambda u: 10.0 ** (8 * u - 5),
    "bfloat16": lambda u: u.bfloat16(),
    "float16": lambda u: (100 * u).half(),
    "float64": lambda u: u.double() / 3,
    "every second": lambda u: u.repeat_interleave(2)[::2],
}
SHARES = (
    (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.5, 0.5), (0.25, 0.25, 0.5),
    (0.0, 0.0, 0.0), (0.3, 0.1, 0.0), (2.0, 1.0, 0.5),
)  # fmt: skip


def _positives(draw: random.Random, square: bool) -> PositiveWeight | PositiveTarget | None:
    kind = draw.choice((None, PositiveWeight, PositiveTarget))
    shares = draw.choice(SHARES if kind is PositiveWeight else SHARES[:-1])
    aligned = draw.choice((None, 1.0, 0.0, 0.5)) if square else None
    return None if kind is None else kind(*shares, aligned)


def _with_weights(draw: random.Random, case: Case) -> Case:
    """A case of half of which pairs count differently, or each image has its own loss."""
    reduction = draw.choice(("mean", "sum", "none"))
    weights = tuple(draw.choice((None, *WEIGHTS)) for _ in range(2))
    positives = _positives(draw, case.m == case.n)
    label_smoothing = draw.choice((0.0, 0.0, 0.1, 1.0))
    margin = draw.choice((None, None, 0.1, 0.0, -0.2, 1.0))
    if draw.randint(0, 1):
        return case
    if margin is not None and not case.negative_only:
        case = replace(case, negatives=Below(margin))
    return replace(
        case, reduction=reduction, weights=weights, positives=positives,
        label_smoothing=label_smoothing,
    )  # fmt: skip


# In the interpreter a case takes a hundred times as long as in torch.
BACKENDS = ("torch",) * 39 + ("triton",)


def random_case(draw: random.Random, backends: tuple[str, ...] = BACKENDS) -> Case:
    """Sizes 0..300 with the edges of tiles often, t and b from tame to 1e4, everything else."""
    backend = draw.choice(backends)
    m, n, d = _size(draw), _size(draw), _size(draw)
    ids = draw.choice((None, None, "repeated", "padded", "unique", "only padding"))
    negative_only = draw.randint(0, 3) == 3
    case = Case(
        backend,
        draw.choice(DTYPES[:3] if backend == "triton" else DTYPES),
        m,
        m if ids is None and not negative_only else n,
        d,
        _scalar(draw, (10.0, 1.0, 100.0, 1e4, 0.0)),
        _scalar(draw, (-10.0, 0.0, 10.0, -1e4, 1e4)),
        draw.choice(("matched", "independent", "equal")),
        (draw.choice(LAYOUTS), draw.choice(LAYOUTS)),
        ids,
        negative_only,
        _negatives(draw),
        draw.choice(("mean", "sum")),
        draw.choice((None, 1, 2, 3, 7)),
        tuple(draw.randint(0, 3) < 3 for _ in NAMES),
        draw.choice(((), (1,))),
        draw.randint(0, 2**32 - 1),
    )
    return _with_weights(draw, case)


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values (of the first row, where it is expanded) with other strides."""
    if layout == "transposed":
        return values.T.contiguous().T
    if layout == "every second row":
        return values.repeat_interleave(2, 0)[::2]
    if layout == "every second column":
        return values.repeat_interleave(2, 1)[:, ::2]
    if layout == "columns of a wider matrix":
        return torch.cat([values, values], 1)[:, : values.shape[1]]
    if layout == "off by one element":
        flat = torch.cat([values.new_zeros(1), values.reshape(-1)])
        return flat[1:].view(values.shape)
    if layout == "one row, expanded" and len(values):
        return values[:1].expand(values.shape)
    return values


def inputs_of(case: Case) -> Inputs:
    """The tensors of a case: the same on every machine."""
    generator = torch.Generator().manual_seed(case.values)
    made = make_inputs(case.m, case.n, case.d, t=case.t, b=case.b, seed=case.values)
    features = [made.image_features, made.text_features]
    if case.features == "independent":
        features = [torch.randn(f.shape, generator=generator) for f in features]
    elif case.features == "equal":
        row = torch.nn.functional.normalize(torch.randn(1, case.d, generator=generator))
        features = [row.repeat(len(f), 1) for f in features]
    dtype = getattr(torch, case.dtype)
    features = [
        _laid_out(f.detach().to(DEVICE, dtype), layout)
        for f, layout in zip(features, case.layouts, strict=True)
    ]
    scalar_dtype = torch.promote_types(dtype, torch.float32)
    scalars = [torch.full(case.scalar_shape, v, dtype=scalar_dtype, device=DEVICE)
               for v in (case.t, case.b)]  # fmt: skip
    leaves = [
        v.detach().requires_grad_(flag)
        for v, flag in zip((*features, *scalars), case.requires_grad, strict=True)
    ]
    ids = _ids_of(case, generator)
    return Inputs(*leaves, ids, _weights_of(case, generator))


def _weights_of(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        name: WEIGHTS[kind](torch.rand(rows, generator=generator)).to(DEVICE)
        for name, rows, kind in zip(
            ("image_weights", "text_weights"), (case.m, case.n), case.weights, strict=True
        )
        if kind is not None
    }


def upstream_of(case: Case) -> Tensor | None:  # (M,)
    """What the images' losses are multiplied by, some of it negative; None: they are added up."""
    if case.reduction != "none":
        return None
    generator = torch.Generator().manual_seed(case.values + 1)
    return torch.randn(case.m, generator=generator).to(DEVICE)


def _ids_of(case: Case, generator: torch.Generator) -> dict[str, Tensor]:
    if case.ids is None:
        return {}
    high = max(min(case.m, case.n) // 2, 1)
    sides = (("image_ids", case.m), ("text_ids", case.n))
    if case.ids == "unique":
        ids = {name: torch.randperm(rows, generator=generator) for name, rows in sides}
    else:
        low = {"repeated": 0, "padded": -max(high // 3, 1), "only padding": -3}[case.ids]
        high = 0 if case.ids == "only padding" else high
        ids = {name: torch.randint(low, high, (rows,), generator=generator) for name, rows in sides}
    # some beyond 32 bits
    return {
        name: torch.where(i % 2 == 1, i + 2**40, i).where(i >= 0, i).to(DEVICE)
        for name, i in ids.items()
    }
