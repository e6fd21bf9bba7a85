"""Which negatives a choice keeps, computed from all pairs in float64: no code of the package."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from fused_siglip import Below, Hardest, Random
from fused_siglip.testing.rounding import UNIT_ROUNDOFF

WORD = 2**32


def _mix(h: np.ndarray, last: bool = True) -> np.ndarray:
    h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x7FEB352D)) % np.uint64(WORD)
    h = ((h ^ (h >> np.uint64(15))) * np.uint64(0x846CA68B)) % np.uint64(WORD)
    return h ^ (h >> np.uint64(16)) if last else h


def _seed_words(seed: int) -> list[int]:
    """SplitMix64's first two outputs, low halves first."""
    words = []
    for _ in range(2):
        seed = (seed + 0x9E3779B97F4A7C15) % 2**64
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        z ^= z >> 31
        words += [z % WORD, z // WORD]
    return words


def random_pairs(negatives: Random, m: int, n: int) -> Tensor:  # (m, n) bool
    """Of images 0 to m-1 and texts 0 to n-1 of the global batch."""
    a, b, c, d = (np.uint64(w) for w in _seed_words(negatives.seed))
    images = _mix((_mix(np.arange(m, dtype=np.uint64) ^ a) + b) % np.uint64(WORD))
    texts = _mix((_mix(np.arange(n, dtype=np.uint64) ^ c) + d) % np.uint64(WORD))
    h = _mix(images[:, None] ^ texts, last=False).astype(np.uint32).view(np.int32)
    return torch.from_numpy(h < round(negatives.keep * WORD) - WORD // 2)


def positives(inputs, negative_only: bool = False) -> tuple[Tensor, Tensor]:  # (M, N) bool each
    """Pairs that are positive, and pairs that are negatives (neither positive nor padding)."""
    m, n = len(inputs.image_features), len(inputs.text_features)
    positive = torch.zeros(m, n, dtype=torch.bool)
    valid = ~positive
    if inputs.ids:
        image_ids, text_ids = (inputs.ids[k].cpu() for k in ("image_ids", "text_ids"))
        valid = (image_ids >= 0)[:, None] & (text_ids >= 0)
        positive = (image_ids[:, None] == text_ids) & valid
    elif not negative_only:
        positive.fill_diagonal_(True)
    if negative_only:
        positive = torch.zeros_like(positive)
    return positive, valid & ~positive


def expected_selection(
    inputs, negatives, negative_only: bool = False
) -> tuple[Tensor, Tensor]:  # (M, N) bool each
    """Which pairs are kept, and about which rounding (or the threshold's step) may decide."""
    x, y = (f.detach().cpu().double() for f in (inputs.image_features, inputs.text_features))
    (m, d), n = x.shape, len(y)
    nothing = torch.zeros(m, n, dtype=torch.bool)
    if negatives is None or m == 0 or n == 0:
        return ~nothing, nothing
    if isinstance(negatives, Below):
        return _below(inputs, negatives)
    if negatives.keep == 1:
        return ~nothing, nothing
    if isinstance(negatives, Random):
        return random_pairs(negatives, m, n), nothing
    _, negative = positives(inputs, negative_only)
    if inputs.ids:
        y = torch.where(inputs.ids["text_ids"].cpu()[:, None] < 0, 0, y)
        x = torch.where(inputs.ids["image_ids"].cpu()[:, None] < 0, 0, x)
    sign = inputs.logit_scale.detach().cpu().double().sign().reshape(())
    sign = sign if isinstance(negatives, Hardest) else -sign
    value = sign * (x @ y.T)
    wanted = (negatives.keep * negative.sum(1) - 1e-6).ceil().long().clamp(min=1)
    ranked = value.masked_fill(~negative, -torch.inf).sort(1, descending=True).values
    threshold = ranked.gather(1, (wanted - 1)[:, None])
    real = y[inputs.ids["text_ids"].cpu() >= 0] if inputs.ids else y
    centre = real.mean(0) if len(real) else y[0]
    largest = x.norm(dim=1) * ((y - centre).norm(dim=1).max() + centre.norm() / 16)
    accumulate = torch.promote_types(inputs.image_features.dtype, torch.float32)
    rounding = (d + 8) * UNIT_ROUNDOFF[accumulate] * (x.abs() @ y.abs().T)
    # of the distance from the image's value with the mean text; below 2^-30 of the largest none
    step = 1.001 * 2.0**-14 * (threshold - sign * (x @ centre)[:, None]).abs()
    step += 2.0**-29 * largest[:, None]
    unsure = negative & ((value - threshold).abs() <= step + 2 * rounding)
    return negative & (value >= threshold), unsure


def _below(inputs, negatives: Below) -> tuple[Tensor, Tensor]:  # (M, N) bool each
    """Negatives that are no more similar than the image's best positive and the margin."""
    positive, negative = positives(inputs)
    x, y = (f.detach().cpu().double() for f in (inputs.image_features, inputs.text_features))
    if inputs.ids:
        y = torch.where(inputs.ids["text_ids"].cpu()[:, None] < 0, 0, y)
        x = torch.where(inputs.ids["image_ids"].cpu()[:, None] < 0, 0, x)
    s = x @ y.T
    accumulate = torch.promote_types(inputs.image_features.dtype, torch.float32)
    unit = UNIT_ROUNDOFF[accumulate]
    rounding = (x.shape[1] + 8) * unit * (x.abs() @ y.abs().T)
    best = s.masked_fill(~positive, -torch.inf).amax(1, keepdim=True)
    limit = torch.where(best == -torch.inf, torch.inf, best + negatives.margin)
    # another positive may be the best one of all within its own rounding
    of_best = torch.where(positive, rounding, 0).amax(1, keepdim=True)
    sums = 4 * unit * (best.abs() + abs(negatives.margin)).nan_to_num(posinf=0)
    # similarities of equal pairs may differ by this, and are taken for equal
    ties = 64 * unit * best.abs().nan_to_num(posinf=0)
    unsure = negative & ((s - limit).abs() <= rounding + of_best + sums + ties)
    return negative & (s <= limit), unsure


def masks_for_negatives(inputs, options: dict) -> tuple[dict, dict]:
    """Options of the eager loss and of its rounding errors: masks in place of ``negatives``."""
    options = dict(options)
    negatives = options.pop("negatives", None)
    if negatives is None:
        return options, options
    kept, unsure = expected_selection(inputs, negatives, options.get("negative_only", False))
    device = inputs.image_features.device
    kept, unsure = kept.to(device), unsure.to(device)
    return options | {"kept": kept}, options | {"kept": kept, "unsure": unsure}
