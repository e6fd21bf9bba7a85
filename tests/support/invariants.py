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

from fused_siglip import Below, Easiest, Hardest, Random
from fused_siglip.testing.rounding import smallest
from support.calls import (
    Call,
    changed_inputs,
    difference_in_bits,
    distance,
    has_aligned,
    some_rows,
)
from support.inputs import Inputs
from support.strategies import DEVICE, Case, inputs_of, upstream_of
from support.weight_laws import all_ones, left_out, scaled, summed, unique


def repeated(case: Case, call: Call) -> float:
    """The same call gives the same bits."""
    return difference_in_bits(Call(case, inputs_of(case)), call)


def permuted(case: Case, call: Call) -> float:
    """Permuting pairs together changes nothing; with ids, neither does permuting one tower."""
    generator = torch.Generator().manual_seed(case.values)
    orders = [torch.randperm(rows, generator=generator).to(DEVICE) for rows in (case.m, case.n)]
    if (case.ids is None and not case.negative_only) or has_aligned(case):
        orders[1] = orders[0]
    vector = upstream_of(case)
    vector = None if vector is None else vector[orders[0]]
    other = Call(case, some_rows(call.inputs, *orders), upstream=vector)
    expected, errors = list(call.values), call.errors()
    if vector is not None:
        expected[0], errors[0] = expected[0][orders[0]], errors[0][orders[0]]
    for k, order in enumerate(orders, start=1):
        expected[k] = None if expected[k] is None else expected[k][order]
        errors[k] = errors[k][order]
    return distance(other.values, expected, other.errors(), errors)


def panels(case: Case, call: Call) -> float:
    """Any cut into panels changes nothing beyond rounding."""
    others = [Call(case, inputs_of(case), tiles=tiles) for tiles in (1, 2, None)]
    errors = call.errors()
    return max(distance(o.values, call.values, o.errors(), errors) for o in others)


def swapped(case: Case, call: Call) -> float:
    """Swapping the towers swaps their gradients, and what belongs to images and to texts."""
    case = replace(case, reduction="sum", label_smoothing=0.0)  # which is shared by texts
    x, y, t, b = (tensor.detach() for tensor in call.inputs.tensors())
    flags = [tensor.requires_grad for tensor in call.inputs.tensors()]
    leaves = [
        tensor.clone().requires_grad_(flag)
        for tensor, flag in zip((y, x, t, b), (flags[1], flags[0], *flags[2:]), strict=True)
    ]
    ids = dict(zip(call.inputs.ids, reversed(call.inputs.ids.values()), strict=True))
    other_tower = {"image_weights": "text_weights", "text_weights": "image_weights"}
    weights = {other_tower[name]: w for name, w in call.inputs.weights.items()}
    positives = case.positives
    if positives is not None:
        per_image, per_text = positives.per_text, positives.per_image
        positives = replace(positives, per_image=per_image, per_text=per_text)
    other = Call(case, Inputs(*leaves, ids, weights), positives=positives)
    call = Call(case, call.inputs)
    loss, dy, dx, *scalars = other.values
    errors = other.errors()
    errors[1:3] = errors[2:0:-1]
    return distance([loss, dx, dy, *scalars], call.values, errors, call.errors())


def padded(case: Case, call: Call) -> float:
    """Padding changes nothing, whatever it holds and wherever it stands."""
    inputs = call.inputs
    ids = list(inputs.ids.values())
    if not ids:  # the diagonal in the words of ids
        ids = [torch.arange(rows, device=DEVICE) for rows in (case.m, case.n)]
    draw = random.Random(case.values)
    before, after = ([draw.choice((0, 1, 63, 64, 100)) for _ in ids] for _ in range(2))
    if has_aligned(case):
        before[1], after[1] = before[0], after[0]

    def pad(values: Tensor, k: int, fill: float) -> Tensor:
        size = (before[k] + len(values) + after[k], *values.shape[1:])
        out = values.new_full(size, fill)
        out[before[k] : before[k] + len(values)] = values
        return out

    vector = upstream_of(case)
    other = Call(
        case,
        changed_inputs(
            inputs,
            image_features=pad(inputs.image_features.detach(), 0, torch.nan),
            text_features=pad(inputs.text_features.detach(), 1, torch.inf),
            ids=dict(zip(("image_ids", "text_ids"), (pad(i, k, -1 - k) for k, i in enumerate(ids)),
                         strict=True)),
            weights={name: pad(w, ("image_weights", "text_weights").index(name), torch.nan)
                     for name, w in inputs.weights.items()},
        ),
        upstream=None if vector is None else pad(vector, 0, torch.nan),
    )  # fmt: skip
    values, errors = other.values, other.errors()
    if vector is not None:
        losses, real = values[0], slice(before[0], before[0] + case.m)
        if torch.count_nonzero(losses) != torch.count_nonzero(losses[real]):
            return torch.inf
        values[0], errors[0] = losses[real], errors[0][real]
    for k, rows in enumerate((case.m, case.n)):
        real = slice(before[k], before[k] + rows)
        errors[k + 1] = errors[k + 1][real]
        if values[k + 1] is not None:
            grad, values[k + 1] = values[k + 1], values[k + 1][real]
            if torch.count_nonzero(grad) != torch.count_nonzero(values[k + 1]):
                return torch.inf  # something in padding is not 0
    return distance(values, call.values, errors, call.errors())


def upstream(case: Case, call: Call) -> float:
    """Scaling the upstream gradient scales all gradients: by a power of two, to the bit."""
    other = Call(case, inputs_of(case), factor=-0.5)
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
    inputs = changed_inputs(call.inputs)
    for tensor in inputs.tensors():
        tensor.requires_grad_()
    other = Call(case, inputs)
    values = [None if v is None else w for v, w in zip(call.values, other.values, strict=True)]
    return distance(values, call.values, other.errors(), call.errors())


def blocks(case: Case, call: Call) -> float:
    """The sum over column blocks, those without positives with negative_only, is the whole.

    Without ids the rows are cut where the columns are, as between two devices. Without what
    depends on the other blocks: how many positives a row has, and how many texts there are.
    """
    positives = case.positives
    if positives is not None and (positives.per_image or positives.per_text or has_aligned(case)):
        positives = None
    case = replace(case, reduction="sum", label_smoothing=0.0, positives=positives)
    draw = random.Random(case.values)
    cut = draw.randint(0, case.n)
    columns = (slice(0, cut), slice(cut, case.n))
    diagonal = case.ids is None and not case.negative_only
    rows = columns if diagonal else (slice(0, case.m),)
    whole = Call(case, changed_inputs(call.inputs))
    total = [None if v is None else torch.zeros_like(v, dtype=torch.float64) for v in whole.values]
    errors = [torch.zeros_like(e) for e in whole.errors()]
    for i in rows:
        for j in columns:
            options = {"negative_only": case.negative_only or (diagonal and i != j)}
            part = Call(case, some_rows(call.inputs, i, j), **options)
            for k, where in enumerate((..., i, j, ..., ...)):
                errors[k][where] += part.errors()[k]
                if total[k] is not None:
                    total[k][where] += part.values[k]
    for a, sums in zip(whole.values, total, strict=True):
        if a is not None:  # where a block overflows fp16, the blocks' sum says nothing
            sums[...] = torch.where(sums.isfinite(), sums, a)
    return distance(whole.values, total, whole.errors(), errors)


INVARIANTS: dict[str, Callable[[Case, Call], float]] = {
    law.__name__: law
    for law in (
        *(repeated, permuted, panels, swapped, padded, upstream, asked, blocks),
        *(all_ones, left_out, summed, scaled, unique),
    )
}


# Negatives are chosen among those of an image, and at random by their indices: these laws change
# that. They are held with all negatives.
MOVED = {
    Random: (permuted, swapped, padded, blocks),
    Hardest: (swapped, blocks, left_out),
    Easiest: (swapped, blocks, left_out),
    Below: (swapped, blocks, left_out),
}


def check(case: Case, law: str) -> dict[str, float]:
    """The share of the loss and of each gradient against float64, and that of the law."""
    if INVARIANTS[law] in MOVED.get(type(case.negatives), ()):
        case = replace(case, negatives=None)
    call = Call(case, inputs_of(case))
    return call.error_ratios() | {law: INVARIANTS[law](case, call)}
