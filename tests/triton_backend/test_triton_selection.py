"""Panels of selected negatives, and the counts that thresholds are found by."""

from __future__ import annotations

from support.devices import require_triton_kernels

require_triton_kernels()

import numpy as np
import pytest
import torch

from fused_siglip.kernels import Pairs, PanelSpec, ScoreNormalizer, ScoreThreshold
from fused_siglip.kernels.float_keys import HALF, KEY_BITS, key_to_float
from fused_siglip.kernels.triton_panel import TritonPanel
from support.triton_panels import (
    DEVICE,
    DTYPES,
    POSITIVES,
    agree,
    by_hash,
    by_logit,
    check,
    features,
    hashes,
    normalized_scores,
    one_feature,
    pair_masks,
    run,
)

# NumPy, under the interpreter, warns of the NaN and Inf some tests feed in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("choice", ["hash", "logit"])
@pytest.mark.parametrize("b", [-15.0, 0.0], ids=["saturated", "plain"])
def test_chosen_negatives(b, choice, positives, dtype):
    x, y = features(150, 300, 48, dtype)
    positives = POSITIVES[positives](150, 300)
    selection = by_hash(150, 300) if choice == "hash" else by_logit(x, y)
    dlogits = check(x, y, b=b, positives=positives, selection=selection)
    _, valid = pair_masks(x, y, positives, selection)
    assert torch.equal(dlogits != 0, valid) and 0.2 < valid.double().mean() < 0.4


@pytest.mark.covering(1)
@pytest.mark.parametrize("m, n, d", [(1, 1, 1), (127, 129, 48), (129, 1, 16), (128, 256, 16)])
@pytest.mark.parametrize("keep", [0.01, 0.99])
def test_sizes_of_chosen_negatives(m, n, d, keep):
    x, y = features(m, n, d, torch.float32)
    for selection in (by_hash(m, n, keep), by_logit(x, y, keep)):
        check(x, y, positives=Pairs(diagonal=0), selection=selection)


@pytest.mark.parametrize("cutoff", [1 - 2**31, 2**31 - 1])
def test_the_least_and_the_most_that_a_hash_keeps(cutoff):
    x, y = features(130, 130, 16, torch.float32)
    selection = by_hash(130, 130)._replace(hash_cutoff=cutoff)
    dlogits = check(x, y, positives=Pairs(diagonal=0), selection=selection)
    assert (dlogits != 0).sum() == (130 if cutoff < 0 else 130**2)


@pytest.mark.covering(1)
@pytest.mark.parametrize("choice", ["hash", "logit"])
@pytest.mark.parametrize("positives", ["diagonal", "ids"])
def test_variants_of_a_choice_agree_and_repeat_to_the_bit(positives, choice):
    x, y = features(150, 260, 48, torch.bfloat16)
    positives = POSITIVES[positives](150, 260)
    selection = by_hash(150, 260) if choice == "hash" else by_logit(x, y)
    sums, dlogits = run(x, y, positives=positives, selection=selection)
    again = run(x, y, positives=positives, selection=selection)
    assert torch.equal(sums, again[0]) and torch.equal(dlogits, again[1])
    scalars, none = run(x, y, positives=positives, store_dlogits=False, selection=selection)
    assert none is None and agree(scalars, sums)
    forward, _ = run(
        x, y, positives=positives, store_dlogits=False, scalar_grads=False, selection=selection
    )
    assert agree(forward[:1], sums[:1]) and forward[1:].tolist() == [7.0, 7.0]


def test_nan_is_dropped_by_a_hash_and_kept_by_a_logit():
    x, y = features(130, 140, 16, torch.float32)
    selection = by_hash(130, 140), by_logit(x, y)
    x[3] = torch.nan
    (sums, dlogits), (_, by_value) = (run(x, y, selection=k) for k in selection)
    assert (
        torch.equal(dlogits[3].isnan(), hashes(selection[0])[3] < selection[0].hash_cutoff)
        and sums[0].isnan()
    )
    assert by_value[3].isnan().all()
    assert not dlogits[4:].isnan().any() and not by_value[4:].isnan().any()
    none_of_it = selection[0]._replace(hash_cutoff=-(2**31))  # keeps nothing
    sums, dlogits = run(x, y, selection=none_of_it)
    assert sums.tolist() == [0, 0, 0] and not dlogits.any()


def counting_panel(m, n, dtype):
    spec = PanelSpec(m, n, dtype, store_dlogits=False, scalar_grads=False, filters_negatives=True)
    return TritonPanel(spec, torch.device(DEVICE))


def whole_numbers(m, n, d, dtype):
    """Features whose similarities are whole numbers, exact in every dtype."""
    generator = torch.Generator().manual_seed(2)
    return (torch.randint(-3, 4, (k, d), generator=generator).to(DEVICE, dtype) for k in (m, n))


def float_keys(x, y, center, inv_radius):
    """(m, n): the key of every pair's normalized score in [0, 2^20), by its definition."""
    value = normalized_scores(x, y, center, inv_radius).cpu().numpy()
    mantissa, exponent = np.frexp(np.abs(value).astype(np.float64))  # in [1/2, 1): exponents +1
    magnitude = (exponent + 30) * 2**14 + np.floor((2 * mantissa - 1) * 2**14)
    magnitude = np.where(value == 0, 0, np.clip(magnitude, 0, HALF - 1)).astype(np.int64)
    return HALF + np.where(value < 0, -1 - magnitude, magnitude)


def histogram(bins, counted, size):
    return np.stack(
        [np.bincount(row[mask], minlength=size) for row, mask in zip(bins, counted, strict=True)]
    )


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("factor", [4e-3, -2e-3, 2.0], ids=["up", "down", "past the range"])
def test_counts(factor, positives, dtype):
    m, n = 150, 300
    x, y = whole_numbers(m, n, 48, dtype)
    positives = POSITIVES[positives](m, n)
    units = torch.linspace(-9, 9, m), torch.linspace(factor, 0.9 * factor, m)
    units = ScoreNormalizer(*(of_images.to(DEVICE) for of_images in units))
    panel = counting_panel(m, n, dtype)
    q = float_keys(x, y, *units)
    positive, valid = (mask.cpu().numpy() for mask in pair_masks(x, y, positives))
    left = KEY_BITS
    for step, bits in enumerate(TritonPanel.count_bits):
        known, inside = None, valid & ~positive
        if step > 0:
            known = (q >> left)[:, 7]
            known[10:20] = -1  # no bits
            inside = inside & (q >> left == known[:, None])
            known = torch.from_numpy(known).int().to(DEVICE)
        left -= bits
        counts = torch.full((m, 2**bits), 5, dtype=torch.int32, device=DEVICE)
        panel.count(x, y, positives, units, known, step, counts)
        expected = histogram(q >> left & 2**bits - 1, inside, 2**bits)
        assert inside.any() and np.array_equal(counts.cpu().numpy(), 5 + expected)
    assert left == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_threshold_keeps_what_was_counted(dtype):
    """Similarities that are not exact: the panel kernel rounds them as the counting one did."""
    x, y = features(140, 200, 48, dtype)
    units, threshold = by_logit(x, y)
    panel = counting_panel(140, 200, dtype)
    counts = torch.zeros(140, 32, dtype=torch.int32, device=DEVICE)
    panel.count(x, y, Pairs(diagonal=0), units, None, 0, counts)
    assert (counts.sum(1) == 199).all()
    for first in (0, 15, 16, 30):
        key = torch.full_like(threshold, first * 2**KEY_BITS // 32, dtype=torch.int64)
        selection = ScoreThreshold(units, key_to_float(key, torch.float32))
        _, dlogits = run(x, y, t=1.0, b=0.0, positives=Pairs(diagonal=0), selection=selection)
        assert torch.equal((dlogits != 0).sum(1), 1 + counts[:, first:].sum(1))


def test_nan_counts_as_the_largest():
    x, y = features(10, 20, 16, torch.float32)
    units, _ = by_logit(x, y)
    x[3] = torch.nan
    panel = counting_panel(10, 20, x.dtype)
    counts = torch.zeros(10, 32, dtype=torch.int32, device=DEVICE)
    panel.count(x, y, Pairs(), units, None, 0, counts)
    assert counts[3, -1] == 20 and (counts.sum(1) == 20).all()


def test_a_bin_may_hold_all_texts_of_a_tile():
    """128 of them in a byte of the tally, also in the one with the sign of its word."""
    x, y = one_feature(torch.linspace(-1, 1, 40), 256)
    units = ScoreNormalizer(torch.zeros(40, device=DEVICE), torch.ones(40, device=DEVICE))
    panel = counting_panel(40, 256, x.dtype)
    counts = torch.zeros(40, 32, dtype=torch.int32, device=DEVICE)
    panel.count(x, y, Pairs(), units, None, 0, counts)
    assert counts.max(1).values.eq(256).all() and counts.count_nonzero(0)[[3, 31]].eq(0).sum() < 2
