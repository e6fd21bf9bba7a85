"""Laws of the loss, held by every case within what rounding may do.

A law compares a call with others on changed inputs; none but "float64" needs an oracle. Its measure
is a share: the largest deviation over the largest that rounding can cause. Above 1 is a miss.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fused_siglip import Easiest, Hardest, Random, siglip_loss
from fused_siglip.testing.rounding import excess, rounded, rounding_errors, smallest
from support.expected_negatives import masks_for_negatives
from support.inputs import NAMES, Inputs, loss_and_grads, one_tile, operand_dtype
from support.strategies import DEVICE, Case, inputs_of
from support.tolerances import error_ratios

OUTPUTS = ("loss", *NAMES)


class Call:
    """A call of the loss: its inputs, and [loss, dX, dY, dt, db] (None: not asked for)."""

    def __init__(self, case: Case, inputs: Inputs, upstream: float = 1.0, **changed):
        options = {
            "negative_only": case.negative_only,
            "reduction": case.reduction,
            "negatives": case.negatives,
            "tiles": case.tiles,
        } | changed
        dtype = getattr(torch, case.dtype)
        tiles = options.pop("tiles")
        self.inputs, self.options = inputs, options
        self.values = loss_and_grads(
            lambda *tensors, **all_options: siglip_loss(*tensors, **all_options) * upstream,
            inputs,
            backend=case.backend,
            workspace_bytes=tiles
            and tiles * one_tile(case.backend, dtype, DEVICE, filters_negatives=True),
            **options,
        )
        self.g_dtype = operand_dtype(case.backend, dtype, DEVICE)

    def errors(self) -> list[Tensor]:
        """What rounding may do to each element of ``values``."""
        _, options = masks_for_negatives(self.inputs, self.options)
        found = rounding_errors(
            *self.inputs.tensors(), **self.inputs.ids, g_dtype=self.g_dtype, **options
        )
        return [
            e if v is None else e + rounded(v, v.dtype).reshape(e.shape)
            for e, v in zip(found, self.values, strict=True)
        ]

    def error_ratios(self) -> dict[str, float]:
        """Against float64, by output."""
        return error_ratios(self.values, self.inputs, g_dtype=self.g_dtype, **self.options)


def _distance(first: list, second: list, first_errors: list, second_errors: list) -> float:
    """Of two lists of results: the share of the worst output."""
    worst = 0.0
    for a, b, e, f in zip(first, second, first_errors, second_errors, strict=True):
        assert (a is None) == (b is None), "gradients of other inputs were returned"
        if a is not None:
            worst = max(worst, excess(a, b.double(), e + f))
    return worst


def _changed(inputs: Inputs, **tensors: Tensor) -> Inputs:
    """Fresh leaves with some tensors (or ids) replaced; what required a gradient still does."""
    leaves = [
        tensors.get(name, t).detach().clone().requires_grad_(t.requires_grad)
        for name, t in zip(NAMES, inputs.tensors(), strict=True)
    ]
    return Inputs(*leaves, tensors.get("ids", inputs.ids))


def _rows(inputs: Inputs, image_rows: Tensor | slice, text_rows: Tensor | slice) -> Inputs:
    """Some rows of the batch, in some order."""
    parts = (image_rows, text_rows)
    return _changed(
        inputs,
        image_features=inputs.image_features[image_rows],
        text_features=inputs.text_features[text_rows],
        ids={name: v[rows] for (name, v), rows in zip(inputs.ids.items(), parts, strict=False)},
    )


def repeated(case: Case, call: Call) -> float:
    """The same call gives the same bits."""
    again = Call(case, inputs_of(case))
    pairs = [p for p in zip(again.values, call.values, strict=True) if p[0] is not None]
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    return 0.0 if same else torch.inf


def permuted(case: Case, call: Call) -> float:
    """Permuting pairs together changes nothing; with ids, neither does permuting one tower."""
    generator = torch.Generator().manual_seed(case.values)
    orders = [torch.randperm(rows, generator=generator).to(DEVICE) for rows in (case.m, case.n)]
    if case.ids is None and not case.negative_only:
        orders[1] = orders[0]
    other = Call(case, _rows(call.inputs, *orders))
    expected, errors = list(call.values), call.errors()
    for k, order in enumerate(orders, start=1):
        expected[k] = None if expected[k] is None else expected[k][order]
        errors[k] = errors[k][order]
    return _distance(other.values, expected, other.errors(), errors)


def panels(case: Case, call: Call) -> float:
    """Any cut into panels changes nothing beyond rounding."""
    others = [Call(case, inputs_of(case), tiles=tiles) for tiles in (1, 2, None)]
    errors = call.errors()
    return max(_distance(o.values, call.values, o.errors(), errors) for o in others)


def swapped(case: Case, call: Call) -> float:
    """Swapping the towers swaps their gradients."""
    x, y, t, b = (tensor.detach() for tensor in call.inputs.tensors())
    flags = [tensor.requires_grad for tensor in call.inputs.tensors()]
    leaves = [
        tensor.clone().requires_grad_(flag)
        for tensor, flag in zip((y, x, t, b), (flags[1], flags[0], *flags[2:]), strict=True)
    ]
    ids = dict(zip(call.inputs.ids, reversed(call.inputs.ids.values()), strict=True))
    other = Call(case, Inputs(*leaves, ids), reduction="sum")
    call = Call(case, call.inputs, reduction="sum")
    loss, dy, dx, *scalars = other.values
    errors = other.errors()
    errors[1:3] = errors[2:0:-1]
    return _distance([loss, dx, dy, *scalars], call.values, errors, call.errors())


def padded(case: Case, call: Call) -> float:
    """Padding changes nothing, whatever it holds and wherever it stands."""
    inputs = call.inputs
    ids = list(inputs.ids.values())
    if not ids:  # the diagonal in the words of ids
        ids = [torch.arange(rows, device=DEVICE) for rows in (case.m, case.n)]
    draw = random.Random(case.values)
    before, after = ([draw.choice((0, 1, 63, 64, 100)) for _ in ids] for _ in range(2))

    def pad(values: Tensor, k: int, fill: float) -> Tensor:
        size = (before[k] + len(values) + after[k], *values.shape[1:])
        out = values.new_full(size, fill)
        out[before[k] : before[k] + len(values)] = values
        return out

    other = Call(
        case,
        _changed(
            inputs,
            image_features=pad(inputs.image_features.detach(), 0, torch.nan),
            text_features=pad(inputs.text_features.detach(), 1, torch.inf),
            ids=dict(zip(("image_ids", "text_ids"), (pad(i, k, -1 - k) for k, i in enumerate(ids)),
                         strict=True)),
        ),
    )  # fmt: skip
    values, errors = other.values, other.errors()
    for k, rows in enumerate((case.m, case.n)):
        real = slice(before[k], before[k] + rows)
        errors[k + 1] = errors[k + 1][real]
        if values[k + 1] is not None:
            grad, values[k + 1] = values[k + 1], values[k + 1][real]
            if torch.count_nonzero(grad) != torch.count_nonzero(values[k + 1]):
                return torch.inf  # something in padding is not 0
    return _distance(values, call.values, errors, call.errors())


def upstream(case: Case, call: Call) -> float:
    """Scaling the upstream gradient scales all gradients: by a power of two, to the bit."""
    other = Call(case, inputs_of(case), upstream=-0.5)
    for a, b in zip(other.values[1:], call.values[1:], strict=True):
        if a is None:
            continue
        info = torch.finfo(a.dtype)
        expected = b.double() * -0.5
        # a subnormal half loses its last bit, and what overflowed may not any more
        free = (expected.abs() < info.tiny) & ((a.double() - expected).abs() <= smallest(a.dtype))
        if not (free | ~b.isfinite() | (a.double() == expected)).all():
            return torch.inf
    return 0.0


def asked(case: Case, call: Call) -> float:
    """What is returned does not depend on which gradients are asked for."""
    inputs = _changed(call.inputs)
    for tensor in inputs.tensors():
        tensor.requires_grad_()
    other = Call(case, inputs)
    values = [None if v is None else w for v, w in zip(call.values, other.values, strict=True)]
    return _distance(values, call.values, other.errors(), call.errors())


def blocks(case: Case, call: Call) -> float:
    """The sum over column blocks, those without positives with negative_only, is the whole.

    Without ids the rows are cut where the columns are, as between two devices.
    """
    draw = random.Random(case.values)
    cut = draw.randint(0, case.n)
    columns = (slice(0, cut), slice(cut, case.n))
    diagonal = case.ids is None and not case.negative_only
    rows = columns if diagonal else (slice(0, case.m),)
    whole = Call(case, _changed(call.inputs), reduction="sum")
    total = [None if v is None else torch.zeros_like(v, dtype=torch.float64) for v in whole.values]
    errors = [torch.zeros_like(e) for e in whole.errors()]
    for i in rows:
        for j in columns:
            options = {"negative_only": case.negative_only or (diagonal and i != j)}
            part = Call(case, _rows(call.inputs, i, j), reduction="sum", **options)
            for k, where in enumerate((..., i, j, ..., ...)):
                errors[k][where] += part.errors()[k]
                if total[k] is not None:
                    total[k][where] += part.values[k]
    for a, sums in zip(whole.values, total, strict=True):
        if a is not None:  # where a block overflows fp16, the blocks' sum says nothing
            sums[...] = torch.where(sums.isfinite(), sums, a)
    return _distance(whole.values, total, whole.errors(), errors)


INVARIANTS: dict[str, Callable[[Case, Call], float]] = {
    law.__name__: law
    for law in (repeated, permuted, panels, swapped, padded, upstream, asked, blocks)
}


# Negatives are chosen among those of an image, and at random by their indices: these laws change
# that. They are held with all negatives.
MOVED = {
    Random: (permuted, swapped, padded, blocks),
    Hardest: (swapped, blocks),
    Easiest: (swapped, blocks),
}


def check(case: Case, law: str) -> dict[str, float]:
    """The share of the loss and of each gradient against float64, and that of the law."""
    if INVARIANTS[law] in MOVED.get(type(case.negatives), ()):
        case = replace(case, negatives=None)
    call = Call(case, inputs_of(case))
    return call.error_ratios() | {law: INVARIANTS[law](case, call)}
