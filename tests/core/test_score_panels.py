"""Panels that compare similarities: the best positives, and the negatives that are not below."""

import pytest
import torch

from fused_siglip.kernels import Ids, Pairs, PanelSpec, RowValues, panel_class
from fused_siglip.kernels.float_keys import exact_keys, exact_values

# NumPy, under the interpreter, warns of the NaN and Inf some tests feed in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LOWEST = torch.finfo(torch.float32).min


def whole_numbers(m, n, d, dtype, device, seed=0):
    """Features whose similarities are whole numbers, exact in every dtype, with many ties."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(-2, 3, (k, d), generator=generator).to(device, dtype) for k in (m, n)]


def ids_of(m, n, device):
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(-2, 15, (k,), generator=generator) + 2**40 for k in (m, n)]
    return Ids(*(i.where(i >= 2**40, i - 2**40).to(device) for i in ids))


def panel_for(backend, x, y, device):
    dtype = x.dtype if backend == "triton" else torch.promote_types(x.dtype, torch.float32)
    tiles = panel_class(backend).tile
    sides = [-(-len(f) // tile) * tile for f, tile in zip((x, y), tiles, strict=True)]
    panel = panel_class(backend)(PanelSpec(*sides, dtype, False, False), torch.device(device))
    return panel, x.to(dtype), y.to(dtype)


def masks(pairs, m, n):
    if pairs.ids is not None:
        images, texts = (ids.cpu() for ids in pairs.ids)
        valid = (images >= 0)[:, None] & (texts >= 0)
        return (images[:, None] == texts) & valid, valid
    positive = torch.zeros(m, n, dtype=torch.bool)
    if pairs.diagonal is not None:
        positive = torch.arange(m)[:, None] + pairs.diagonal == torch.arange(n)
    return positive, torch.ones(m, n, dtype=torch.bool)


def expected_best(s, positive, before):
    return torch.maximum(before, s.masked_fill(~positive, -torch.inf).amax(1).float())


def expected_counts(s, positive, valid, best):
    return (valid & ~positive & ~(s < best[:, None])).sum(1)


SIZES = [(1, 1, 1), (64, 64, 16), (127, 129, 17), (129, 1, 16), (150, 300, 48), (300, 140, 32)]


@pytest.mark.covering(2)
@pytest.mark.parametrize("m, n, d", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("diagonal", ["ids", None, 0, -20, 131, 5000])
def test_panels_against_all_pairs(backend, device, m, n, d, dtype, diagonal):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    x, y = whole_numbers(m, n, d, dtype, device)
    pairs = Pairs(None, ids_of(m, n, device)) if diagonal == "ids" else Pairs(diagonal)
    panel, *features = panel_for(backend, x, y, device)
    s, (positive, valid) = x.cpu().double() @ y.cpu().double().T, masks(pairs, m, n)
    acc = torch.promote_types(dtype, torch.float32)
    before = [torch.randint(-9, 2, (k,)).to(device, acc) for k in (m, n)]
    before = [b.masked_fill(b < -4, -torch.inf) for b in before]
    for sides in ((0, 1), (0,), (1,)):
        best = RowValues(*(before[k].clone() if k in sides else None for k in (0, 1)))
        panel.best_positives(*features, pairs, best)
        counts = [torch.full_like(b, 5, dtype=torch.int32) for b in before]
        panel.count_not_below(
            *features, pairs, best, RowValues(*(counts[k] if k in sides else None for k in (0, 1)))
        )
        for k in sides:
            of_side = [mask.T if k else mask for mask in (s, positive, valid)]
            wanted = expected_best(*of_side[:2], before[k].cpu().float())
            assert torch.equal(best[k].cpu().float(), wanted)
            assert torch.equal(
                counts[k].cpu().long(), 5 + expected_counts(*of_side, wanted.double())
            )


@pytest.mark.parametrize("by_id", [False, True])
def test_nan_is_best_and_counts(backend, device, by_id):
    m = 70
    x, y = whole_numbers(m, m, 16, torch.float32, device)
    x[3], y[8] = torch.nan, torch.nan
    ids = torch.arange(m, device=device)
    pairs = Pairs(None, Ids(ids, ids.clone())) if by_id else Pairs(0)
    panel, *features = panel_for(backend, x, y, device)
    best = RowValues(*(torch.full((m,), -torch.inf, device=device) for _ in range(2)))
    panel.best_positives(*features, pairs, best)
    for values in best:
        assert values.isnan().nonzero()[:, 0].tolist() == [3, 8]
    again = RowValues(*(values.clone() for values in best))
    panel.best_positives(*features, pairs, again)
    assert all(torch.equal(a.nan_to_num(99), b.nan_to_num(99)) for a, b in zip(again, best))  # noqa: B905
    counts = RowValues(*(torch.zeros(m, dtype=torch.int32, device=device) for _ in range(2)))
    panel.count_not_below(*features, pairs, best, counts)
    s = x.cpu().double() @ y.cpu().double().T
    positive, valid = masks(pairs, m, m)
    for transposed, (values, found) in enumerate(zip(best, counts, strict=True)):
        args = [a.T if transposed else a for a in (s, positive, valid)]
        assert torch.equal(found.cpu().long(), expected_counts(*args, values.cpu().double()))
        assert (found[[3, 8]] == m - 1).all()


@pytest.mark.parametrize("by_id", [False, True])
def test_minus_infinity_of_a_positive_is_not_that_of_no_positive(backend, device, by_id):
    x = torch.tensor([-torch.inf, 1, 2], device=device)[:, None].repeat(1, 16)
    y = torch.full((3, 16), 0.0625, device=device)
    y[2] = torch.inf
    pairs = Pairs(0)
    if by_id:
        pairs = Pairs(None, Ids(*(torch.tensor(i, device=device) for i in ([0, 1, 5], [0, 1, 2]))))
    panel, *features = panel_for(backend, x, y, device)
    best = RowValues(*(torch.full((3,), -torch.inf, device=device) for _ in range(2)))
    panel.best_positives(*features, pairs, best)
    last = -torch.inf if by_id else torch.inf
    assert best.images.tolist() == [LOWEST, 1, last]
    assert best.texts.tolist() == [LOWEST, 1, last]


def test_the_product_of_the_panel_is_kept(monkeypatch):
    """On the torch backend: one product serves the best positives and the counts."""
    x, y = whole_numbers(100, 100, 8, torch.float32, "cpu")
    panel, *features = panel_for("torch", x, y, "cpu")
    best = RowValues(*(torch.full((100,), -torch.inf) for _ in range(2)))
    found = []
    for same in (False, True):
        panel.best_positives(*features, Pairs(0), best)
        if same:
            monkeypatch.setattr(torch, "mm", None)
        counts = RowValues(*(torch.zeros(100, dtype=torch.int32) for _ in range(2)))
        panel.count_not_below(*features, Pairs(0), best, counts, same_panel=same)
        found.append(counts)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_keys_sort_as_values_do(dtype):
    info = torch.finfo(dtype)
    smallest = info.smallest_normal * info.eps
    ordered = [-torch.inf, info.min, -1.0, -smallest, 0.0, smallest, 1.0, 1 + info.eps, info.max]
    values = torch.tensor([*ordered, torch.inf, torch.nan], dtype=dtype)
    keys = exact_keys(values)
    assert (keys.diff() > 0).all() and keys.itemsize == values.itemsize
    assert torch.equal(exact_values(keys, dtype)[:-1], values[:-1])
    assert exact_values(keys, dtype)[-1].isnan()
    assert exact_keys(-values[-1:]) == keys[-1]  # also a NaN with a sign
