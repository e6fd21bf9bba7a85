"""Panels of the Triton backend, their float64 formula, and which negatives they select."""

from __future__ import annotations

import numpy as np
import torch

from fused_siglip.kernels import (
    GRAD_SCALE,
    Affine,
    Ids,
    Pairs,
    PanelSpec,
    RandomMask,
    ScoreNormalizer,
    ScoreThreshold,
)
from fused_siglip.kernels.triton_panel import TritonPanel
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.devices import INTERPRETED

DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
T, B = 10.0, -10.0
# Roundings in softplus and sigmoid; on a device exp2 (to 2^-22) and rsqrt^2 (to 2^-21.4) besides.
FUNCTIONS = 8 if INTERPRETED else 24


def features(m, n, d, dtype, seed=0):
    """Normalised rows, x_i close to y_i."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(max(m, n), d, generator=generator)
    x, y = (
        torch.nn.functional.normalize(shared[:k] + torch.randn(k, d, generator=generator))
        for k in (m, n)
    )
    return x.to(DEVICE, dtype), y.to(DEVICE, dtype)


def run(x, y, t=T, b=B, positives=Pairs(), store_dlogits=True, scalar_grads=True, selection=None):  # noqa: B008
    """The sums and dlogits (unscaled, float64) of one panel."""
    m, n = x.shape[0], y.shape[0]
    spec = PanelSpec(m, n, x.dtype, store_dlogits, scalar_grads, selection is not None)
    panel = TritonPanel(spec, x.device)
    sums = torch.full((3,), 7.0, device=DEVICE)
    dlogits = panel(x, y, affine(t, b), positives, sums, selection)
    if dlogits is not None:
        assert dlogits.shape == (m, n) and dlogits.dtype == x.dtype
        dlogits = dlogits.double() / GRAD_SCALE.get(x.dtype, 1.0)
    return sums, dlogits


def affine(t=T, b=B):
    return Affine(*(torch.tensor(v, dtype=torch.float32, device=DEVICE) for v in (t, b)))


def pair_masks(x, y, positives, selection=None):
    """(m, n) bool: which pairs are positive, and which take part."""
    i = torch.arange(x.shape[0], device=x.device)[:, None]
    j = torch.arange(y.shape[0], device=x.device)
    positive = torch.zeros(len(x), len(y), dtype=torch.bool, device=x.device)
    valid = ~positive
    if positives.ids is not None:
        image_ids, text_ids = positives.ids
        positive = image_ids[:, None] == text_ids
        valid = (image_ids >= 0)[:, None] & (text_ids >= 0)
    elif positives.diagonal is not None:
        positive = j == i + positives.diagonal
    if isinstance(selection, ScoreThreshold):
        value = normalized_scores(x, y, *(v.double() for v in selection.normalizer))
        valid = valid & (positive | ~(value < selection.threshold[:, None]))
    elif selection is not None:
        valid = valid & (positive | (hashes(selection) < selection.hash_cutoff))
    return positive, valid


def hashes(selection):
    """(m, n) int64: the hash of every pair, in 64 bits, where no product overflows."""
    images, texts = (k.cpu().numpy().view(np.uint32).astype(np.uint64) for k in selection[:2])
    h = images[:, None] ^ texts
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        h = ((h ^ (h >> np.uint64(shift))) * np.uint64(factor)) % np.uint64(2**32)
    return torch.from_numpy(h.astype(np.int64) - (h >= 2**31) * 2**32).to(DEVICE)


def formula(x, y, t, b, positives, dtype, selection=None):
    """Element by element in plain torch: softplus(u), dlogits * s, dlogits; the caller adds up."""
    s = x.to(dtype) @ y.to(dtype).T
    positive, valid = pair_masks(x, y, positives, selection)
    sign = torch.where(positive, -1.0, 1.0).to(dtype)  # -l
    u = sign * (s * t + b)
    dlogits = torch.where(valid, sign * torch.sigmoid(u), 0)
    softplus = u.clamp(min=0) + torch.log1p(torch.exp(-u.abs()))
    return torch.where(valid, softplus, 0), torch.where(valid, dlogits * s, 0), dlogits


def check(x, y, t=T, b=B, positives=Pairs(), selection=None):  # noqa: B008
    """Against float64. The logits are the source of error: eager fp32 has them rounded as we do.

    dlogits and each term of the sums may deviate by 4 times what eager fp32 deviates at most, plus
    the roundings of fp32 in the functions and, for dlogits, what storing them costs. A sum may
    deviate by that for every term, all in one direction, plus the roundings of adding up.
    """
    sums, dlogits = run(x, y, t, b, positives, selection=selection)
    exact = formula(x, y, t, b, positives, torch.float64, selection)
    eager = formula(x, y, t, b, positives, torch.float32, selection)
    eps = UNIT_ROUNDOFF[torch.float32]
    for actual, e, f in zip(sums.double(), exact, eager, strict=True):
        deviation = (f.double() - e).abs().sum()
        slack = 4 * deviation + (FUNCTIONS + 24) * eps * e.abs().sum()
        assert (actual - e.sum()).abs() <= slack, (actual, e.sum(), slack)
    # relative to each element: a small gradient is held to its own size. The smallest numbers a
    # format has bound that from below.
    deviation = ((eager[2].double() - exact[2]).abs() / exact[2].abs().clamp(min=1e-300)).max()
    tiny = torch.finfo(x.dtype).tiny
    slack = (4 * deviation + FUNCTIONS * eps + UNIT_ROUNDOFF[x.dtype]) * exact[2].abs()
    slack += tiny / GRAD_SCALE.get(x.dtype, 1)
    assert ((dlogits - exact[2]).abs() <= slack).all()
    return dlogits


def agree(a, b, unit=UNIT_ROUNDOFF[torch.float32]):
    """To the bit in the interpreter; a device's compiler may fuse other operations in each form."""
    if INTERPRETED:
        return torch.equal(a, b)
    return torch.allclose(a, b, rtol=16 * unit, atol=0)


def one_feature(logits, n):
    """Features whose similarities are these numbers: pair (i, j) has logits[i]."""
    x, y = (torch.zeros(k, 16, device=DEVICE) for k in (len(logits), n))
    x[:, 0], y[:, 0] = logits, 1
    return x, y


def by_hash(m, n, keep=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    keys = [torch.randint(-(2**31), 2**31, (k,), generator=generator).int() for k in (m, n)]
    for k in keys:
        k[:1] = -(2**31)
    return RandomMask(*(k.to(DEVICE) for k in keys), round(keep * 2**32) - 2**31)


def by_logit(x, y, keep=0.3):
    """Thresholds in the widest gap near ``keep``: rounding decides about no pair."""
    mean = y.double().mean(0)
    reach = (y.double() - mean).norm(dim=1).max() + mean.norm() / 16
    center = (x.double() @ mean).float()
    inv_radius = (1 / 1.01 / x.double().norm(dim=1) / reach).float()
    value = (
        normalized_scores(x, y, center.double(), inv_radius.double())
        .sort(1, descending=True)
        .values
    )
    value = torch.nn.functional.pad(value, (0, 1), value=-1.0)
    near = slice(max(int(keep * len(y)) - 4, 0), int(keep * len(y)) + 4)
    gaps = value[:, :-1] - value[:, 1:]
    widest, at = gaps[:, near].max(1, keepdim=True)
    assert widest.min() > 2**-17
    between = value.gather(1, at + near.start) - widest / 2
    return ScoreThreshold(ScoreNormalizer(center, inv_radius), between[:, 0].float())


def normalized_scores(x, y, center, inv_radius):  # (m, D), (n, D), (m,), (m,) -> (m, n)
    s = x.to(center.dtype) @ y.to(center.dtype).T
    return (s - center[:, None]) * inv_radius[:, None]


def labels(m, n, low=-2):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(low, 20, (k,), generator=generator).to(DEVICE) for k in (m, n)]
    return Pairs(None, Ids(*ids))


POSITIVES = {
    "none": lambda m, n: Pairs(),
    "diagonal": lambda m, n: Pairs(diagonal=-20),
    "ids": labels,
}


# Whole rows of tiles in which only positives can be kept, and the others' negatives by their logit.
TILED = 300, 420  # 3 x 4 tiles


def tiled_choice(x, y):
    selection = by_logit(x, y)
    selection.threshold[128:256] = 2.0**20
    return selection


def panel_of(x, y, positives, selection, rows=None, cols=None):
    """A panel after its call, and dlogits; its workspace held other numbers before."""
    spec = PanelSpec(rows or len(x), cols or len(y), x.dtype, True, True, True)
    panel = TritonPanel(spec, x.device)
    panel.dlogits.fill_(torch.nan)
    panel.flags.fill_(-1)
    panel.lists.fill_(-1)
    return panel, panel(x, y, affine(), positives, torch.empty(3, device=DEVICE), selection)


def tiles_kept(x, y, positives, selection):  # (tile rows, tile columns) bool
    _, valid = pair_masks(x, y, positives, selection)
    m, n = valid.shape
    whole = torch.zeros(-(-m // 128) * 128, -(-n // 128) * 128, dtype=torch.bool, device=x.device)
    whole[:m, :n] = valid
    return whole.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).any(3).any(1)
