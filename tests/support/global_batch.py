"""A rank's rows of the global batch, and what all ranks found, against the float64 oracle."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fused_siglip import siglip_loss

from .expected_negatives import masks_for_negatives
from .inputs import NAMES, Inputs, loss_and_grads
from .tolerances import error, oracle

IMPLS = ("ring", "gather", None)


def shard(whole: Inputs, rank: int, image_rows: list[int], text_rows: list[int]) -> Inputs:
    """Rank's rows of the global batch, as leaves of their own."""
    rows = [slice(sum(r[:rank]), sum(r[: rank + 1])) for r in (image_rows, text_rows)]
    local = [whole.image_features[rows[0]], whole.text_features[rows[1]]]
    leaves = [
        t.detach().clone().requires_grad_(like.requires_grad)
        for t, like in zip(
            [*local, whole.logit_scale, whole.logit_bias], whole.tensors(), strict=True
        )
    ]
    ids = {k: v[r] for (k, v), r in zip(whole.ids.items(), rows, strict=bool(whole.ids))}
    weights = {
        k: v[rows[("image_weights", "text_weights").index(k)]] for k, v in whole.weights.items()
    }
    return Inputs(*leaves, ids, weights)


def global_values(local: list, image_rows: list[int], text_rows: list[int]) -> list:
    """Loss and gradients of the mean over the ranks, from every rank's own, on every rank."""
    world_size = dist.get_world_size()
    everyone = [None] * world_size
    dist.all_gather_object(everyone, local)
    loss = sum(e[0].sum() for e in everyone) / world_size
    towers = [torch.cat([e[k] for e in everyone]) / world_size if everyone[0][k] is not None
              else None for k in (1, 2)]  # fmt: skip
    scalars = [sum(e[k] for e in everyone) / world_size if everyone[0][k] is not None else None
               for k in (3, 4)]  # fmt: skip
    return [loss, *towers, *scalars]


# What the oracle of the whole batch takes of a call on a rank.
_OF_THE_ORACLE = ("negative_only", "reduction", "positives", "label_smoothing", "negatives")


def assert_global(
    inputs: Inputs, rows, text_rows=None, tolerance=2e-5, upstream=None, **options
) -> None:
    """``upstream``: of all images, with the reduction "none"."""
    rank = dist.get_rank()
    text_rows = rows if text_rows is None else text_rows
    mine = None if upstream is None else upstream.split(rows)[rank]
    local = loss_and_grads(
        siglip_loss, shard(inputs, rank, rows, text_rows), mine, group=dist.group.WORLD, **options
    )
    actual = global_values(local, rows, text_rows)
    if options.get("reduction") == "none":
        actual = [None if v is None else v * dist.get_world_size() for v in actual]
        losses = [None] * dist.get_world_size()
        dist.all_gather_object(losses, local[0])
        actual[0] = torch.cat(losses)
    for_oracle, _ = masks_for_negatives(
        inputs, {k: v for k, v in options.items() if k in _OF_THE_ORACLE}
    )
    exact = oracle(inputs, upstream=upstream, **for_oracle)
    for name, a, x in zip(("loss", *NAMES), actual, exact, strict=True):
        assert (a is None) == (x is None), name
        if x is not None:
            assert error(a, x) <= tolerance, f"{options} {rows} {name}: {error(a, x):.1e}"
