"""Ranks and statistics computed from all pairs in float64: no code of the package."""

from __future__ import annotations

import torch
from torch import Tensor

from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.expected_negatives import positives
from support.inputs import Inputs


def without_padding(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """Features in float64 on the CPU, 0 where a row is padding."""
    features = [f.detach().cpu().double() for f in (inputs.image_features, inputs.text_features)]
    if inputs.ids:
        sides = zip(features, (inputs.ids["image_ids"], inputs.ids["text_ids"]), strict=True)
        features = [torch.where(ids.cpu()[:, None] < 0, 0, f) for f, ids in sides]
    return features[0], features[1]


def ranks(
    s: Tensor,  # (M, N) similarities
    positive: Tensor,  # (M, N) bool
    negative: Tensor,  # (M, N) bool
    slack: Tensor | float = 0.0,  # (M, N): how far a similarity may be off
) -> tuple[Tensor, Tensor]:
    """The ranks of the rows. With ``slack`` the lowest ranks that rounding allows; the highest with
    a negative one."""
    slack = torch.as_tensor(slack, dtype=s.dtype).expand_as(s)
    best = torch.where(positive, s + slack, -torch.inf)
    best = best.amax(1) if s.shape[1] else s.new_full((len(s),), -torch.inf)
    counted = negative & ~(s - slack < best[:, None])
    return torch.where(positive.any(1), 1 + counted.sum(1), 0)


def both_ranks(inputs: Inputs, s: Tensor | None = None, slack: Tensor | float = 0.0):
    """The ranks of images and texts; ``s`` where their similarities are known better."""
    if s is None:
        x, y = without_padding(inputs)
        s = x @ y.T
    slack = torch.as_tensor(slack, dtype=s.dtype).expand_as(s)
    masks = positives(inputs)
    return ranks(s, *masks, slack), ranks(s.T, *(mask.T for mask in masks), slack.T)


def rounding_of_similarities(inputs: Inputs) -> Tensor:  # (M, N)
    """How far float32 (float64) sums of products may be off."""
    x, y = without_padding(inputs)
    accumulate = torch.promote_types(inputs.image_features.dtype, torch.float32)
    return (x.shape[1] + 8) * UNIT_ROUNDOFF[accumulate] * (x.abs() @ y.abs().T)


def recall(rank: Tensor, k: int) -> float:
    return (rank <= k).double().mean().item()


def recall_by_sorting(s: Tensor, k: int) -> float:  # (M, M) without ties
    """The share of rows whose own column is among the k largest."""
    top = s.topk(k, dim=1).indices
    return (top == torch.arange(len(s))[:, None]).any(1).double().mean().item()


def statistics(inputs: Inputs) -> Tensor:  # (4,) float64
    """What logit_statistics returns."""
    x, y = without_padding(inputs)
    t, b = (v.detach().cpu().double().reshape(()) for v in (inputs.logit_scale, inputs.logit_bias))
    z = t * (x @ y.T) + b
    positive, negative = positives(inputs)
    found = []
    for mask in (positive, positive | negative):
        chosen = z[mask]
        mean = chosen.mean()
        found += [mean, (chosen - mean).square().mean().sqrt()]
    return torch.stack(found)
