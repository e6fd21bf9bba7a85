"""Calls of the loss that laws compare: their inputs, results, and what rounding may do to these."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_siglip import siglip_loss
from fused_siglip.testing.rounding import excess, rounded, rounding_errors
from support.expected_negatives import masks_for_negatives
from support.inputs import NAMES, Inputs, loss_and_grads, one_tile, operand_dtype
from support.strategies import DEVICE, Case, upstream_of
from support.tolerances import error_ratios

OUTPUTS = ("loss", *NAMES)


class Call:
    """A call of the loss: its inputs, and [loss, dX, dY, dt, db] (None: not asked for)."""

    def __init__(self, case: Case, inputs: Inputs, factor: float = 1.0, **changed):
        options = {
            "negative_only": case.negative_only,
            "reduction": case.reduction,
            "negatives": case.negatives,
            "tiles": case.tiles,
            "positives": case.positives,
            "label_smoothing": case.label_smoothing,
            "upstream": upstream_of(case),
        } | changed
        if options["reduction"] != "none":
            options["upstream"] = None
        dtype = getattr(torch, case.dtype)
        tiles, weighted = options.pop("tiles"), options.pop("weighted", None)
        if weighted is None:
            weighted = _is_weighted(inputs, options)
        self.inputs, self.options = inputs, options
        self.values = loss_and_grads(
            lambda *tensors, **all_options: siglip_loss(*tensors, **all_options) * factor,
            inputs,
            backend=case.backend,
            workspace_bytes=tiles
            and tiles
            * one_tile(case.backend, dtype, DEVICE, filters_negatives=True, weighted=weighted),
            **options,
        )
        self.g_dtype = operand_dtype(case.backend, dtype, DEVICE)

    def errors(self) -> list[Tensor]:
        """What rounding may do to each element of ``values``."""
        _, options = masks_for_negatives(self.inputs, self.options)
        found = rounding_errors(
            *self.inputs.tensors(),
            **self.inputs.ids,
            **self.inputs.weights,
            g_dtype=self.g_dtype,
            **options,
        )
        return [
            e if v is None else e + rounded(v, v.dtype).reshape(e.shape)
            for e, v in zip(found, self.values, strict=True)
        ]

    def error_ratios(self) -> dict[str, float]:
        """Against float64, by output."""
        return error_ratios(self.values, self.inputs, g_dtype=self.g_dtype, **self.options)


def _is_weighted(inputs: Inputs, options: dict) -> bool:
    plain = options["positives"] is None and not options["label_smoothing"]
    return bool(inputs.weights) or not plain or options["reduction"] == "none"


def distance(first: list, second: list, first_errors: list, second_errors: list) -> float:
    """Of two lists of results: the share of the worst output."""
    worst = 0.0
    for a, b, e, f in zip(first, second, first_errors, second_errors, strict=True):
        assert (a is None) == (b is None), "gradients of other inputs were returned"
        if a is not None:
            worst = max(worst, excess(a, b.double(), e + f))
    return worst


def changed_inputs(inputs: Inputs, **tensors: Tensor) -> Inputs:
    """Fresh leaves with some tensors (or ids) replaced; what required a gradient still does."""
    leaves = [
        tensors.get(name, t).detach().clone().requires_grad_(t.requires_grad)
        for name, t in zip(NAMES, inputs.tensors(), strict=True)
    ]
    ids, weights = tensors.get("ids", inputs.ids), tensors.get("weights", inputs.weights)
    return Inputs(*leaves, ids, weights)


def some_rows(inputs: Inputs, image_rows: Tensor | slice, text_rows: Tensor | slice) -> Inputs:
    """Some rows of the batch, in some order."""
    parts = {"image": image_rows, "text": text_rows}
    return changed_inputs(
        inputs,
        image_features=inputs.image_features[image_rows],
        text_features=inputs.text_features[text_rows],
        **{
            kind: {name: v[parts[name.split("_")[0]]] for name, v in getattr(inputs, kind).items()}
            for kind in ("ids", "weights")
        },
    )


def difference_in_bits(first: Call, second: Call) -> float:
    pairs = [p for p in zip(first.values, second.values, strict=True) if p[0] is not None]
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in pairs)
    return 0.0 if same else torch.inf


def has_aligned(case: Case) -> bool:
    """Whether the pairs (i, i) of the batch are told apart from others."""
    return case.positives is not None and case.positives.aligned is not None
