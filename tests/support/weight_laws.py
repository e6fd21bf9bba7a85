"""Laws of what pairs count: see invariants.py."""

from __future__ import annotations

from dataclasses import replace

import torch

from fused_siglip import PositiveWeight
from support.calls import Call, changed_inputs, difference_in_bits, distance
from support.strategies import DEVICE, Case


def all_ones(case: Case, call: Call) -> float:
    """Weights that are all 1 change no bit."""
    generator = torch.Generator().manual_seed(case.values)
    ones = {}
    for name, rows in (("image_weights", case.m), ("text_weights", case.n)):
        if torch.randint(4, (), generator=generator) > 0:
            dtype = (torch.float32, torch.bfloat16)[torch.randint(2, (), generator=generator)]
            ones[name] = torch.ones(rows, dtype=dtype, device=DEVICE)
    calls = [
        Call(case, changed_inputs(call.inputs, weights=weights), weighted=True)
        for weights in ({}, ones)
    ]
    return difference_in_bits(*calls)


def left_out(case: Case, call: Call) -> float:
    """A weight of 0 is as if the row were padding, but for the divisor and for counts of rows."""
    positives, smoothing = case.positives, case.label_smoothing
    generator = torch.Generator().manual_seed(case.values)
    zero = [torch.rand(rows, generator=generator).to(DEVICE) < 0.3 for rows in (case.m, case.n)]
    ids = list(call.inputs.ids.values())
    if not ids:
        ids = [torch.arange(rows, device=DEVICE) for rows in (case.m, case.n)]
    if torch.randint(2, (), generator=generator):
        smoothing = 0.0  # which texts share
    else:
        zero[1][...] = False
    if positives is not None:
        positives = replace(positives, per_image=0.0, per_text=0.0)
    reduction = "sum" if case.reduction == "mean" else case.reduction
    case = replace(case, positives=positives, label_smoothing=smoothing, reduction=reduction)
    names = ("image_ids", "text_ids")
    weights, padding = dict(call.inputs.weights), {}
    for name, i, where in zip(names, ids, zero, strict=True):
        kind = name.replace("ids", "weights")
        given = weights.get(kind, torch.ones(len(i), device=DEVICE))
        weights[kind] = torch.where(where, 0.0, given)
        padding[name] = torch.where(where, -3, i)
    calls = [
        Call(
            case,
            changed_inputs(call.inputs, ids=dict(zip(names, ids, strict=True)), weights=weights),
        ),
        Call(case, changed_inputs(call.inputs, ids=padding)),
    ]
    for grad, where in zip(calls[0].values[1:3], zero, strict=True):
        if grad is not None and grad[where].count_nonzero():
            return torch.inf
    return distance(calls[0].values, calls[1].values, *(c.errors() for c in calls))


def summed(case: Case, call: Call) -> float:
    """The images' losses add up to the sum, and an upstream vector is a weight of the images."""
    generator = torch.Generator().manual_seed(case.values)
    vector = torch.rand(case.m, generator=generator, dtype=torch.float64).to(DEVICE)
    each = Call(case, changed_inputs(call.inputs), reduction="none", upstream=vector)
    given = call.inputs.weights.get("image_weights", torch.ones_like(vector))
    weights = call.inputs.weights | {"image_weights": given.double() * vector}
    total = Call(case, changed_inputs(call.inputs, weights=weights), reduction="sum")
    values, errors = list(each.values), each.errors()
    values[0], errors[0] = values[0].double() @ vector, errors[0] @ vector
    return distance(total.values, values, total.errors(), errors)


def scaled(case: Case, call: Call) -> float:
    """Weights times c give the loss and its gradients times c."""
    given = call.inputs.weights
    name = ("image_weights", "text_weights")[case.values % 2]
    rows = case.m if name == "image_weights" else case.n
    weights = given.get(name, torch.ones(rows, device=DEVICE)).double()
    factor = (3.0, 0.3, 1e-3, 1e3)[case.values % 4]
    base = Call(case, changed_inputs(call.inputs, weights=given | {name: weights}))
    other = Call(case, changed_inputs(call.inputs, weights=given | {name: factor * weights}))
    values = [None if v is None else v.double() * factor for v in base.values]
    values = [  # float16's gradients may overflow
        v if v is None else torch.where(v.isfinite() & o.isfinite(), v, o)
        for v, o in zip(values, other.values, strict=True)
    ]
    return distance(other.values, values, other.errors(), [e * factor for e in base.errors()])


def unique(case: Case, call: Call) -> float:
    """Where every positive is the only one of its rows, shares that add up to 1 change nothing."""
    kind = type(case.positives or PositiveWeight())
    shares = ((0.25, 0.25, 0.5), (0.0, 1.0, 0.0), (0.0, 0.3, 0.7))[case.values % 3]
    generator = torch.Generator().manual_seed(case.values)
    order = torch.randperm(max(case.m, case.n), generator=generator).to(DEVICE)
    inputs = call.inputs
    if inputs.ids:
        order = torch.where(order % 5 == 0, -1, order)
        inputs = changed_inputs(
            inputs, ids={"image_ids": order[: case.m], "text_ids": order[-case.n :]}
        )
        if case.n == 0:
            inputs.ids["text_ids"] = order[:0]
    aligned = (None, 1.0)[case.values % 2 if case.m == case.n else 0]
    calls = [
        Call(case, changed_inputs(inputs), positives=positives)
        for positives in (kind(*shares, aligned), None)
    ]
    return distance(calls[0].values, calls[1].values, *(c.errors() for c in calls))
