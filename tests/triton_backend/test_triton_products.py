"""The gradients' products, and which tiles they skip."""

from __future__ import annotations

from support.devices import require_triton_kernels

require_triton_kernels()

import pytest
import torch

from fused_siglip.kernels import Pairs, PanelSpec
from fused_siglip.kernels.triton_panel import TritonPanel
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.triton_panels import (
    DEVICE,
    DTYPES,
    POSITIVES,
    TILED,
    affine,
    by_hash,
    features,
    labels,
    panel_of,
    tiled_choice,
    tiles_kept,
)

# NumPy, under the interpreter, warns of the NaN and Inf some tests feed in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize("positives", POSITIVES)
def test_flags_tell_which_tiles_hold_what_is_kept(positives):
    x, y = features(*TILED, 16, torch.float32)
    positives = POSITIVES[positives](*TILED)
    if positives.ids is not None:
        image_ids, text_ids = positives.ids
        image_ids[128:256] += 20 * (text_ids[128:].max() >= 0)
        text_ids[256:384] = -1
    selection = tiled_choice(x, y)
    panel, _ = panel_of(x, y, positives, selection)
    expected = tiles_kept(x, y, positives, selection)
    assert expected.any() and not expected.all()
    assert torch.equal(panel.flags.view(3, 4), expected.int())
    x[140] = torch.nan
    panel, _ = panel_of(x, y, positives, selection)
    expected[1] = True
    if positives.ids is not None:
        expected[:, 2] = False
    assert torch.equal(panel.flags.view(3, 4), expected.int())


def check_product(panel, dlogits, other, transposed, alpha=0.5):
    """Against float64; added to what is in out, or overwriting it."""
    a = (dlogits.T if transposed else dlogits).double()
    out = torch.randn(len(a), other.shape[1], device=DEVICE)
    exact = alpha * a @ other.double()
    # a rounding for every term, none of the products of half operands; and for the last sum
    slack = alpha * (a.shape[1] + 4) * (a.abs() @ other.double().abs())
    added = out.clone()
    panel.add_product(added, dlogits, other, alpha, True, transposed)
    eps = UNIT_ROUNDOFF[torch.float32]
    assert ((added - (out.double() + exact)).abs() <= eps * (slack + 2 * out.abs())).all()
    fresh = torch.full_like(out, torch.nan)
    panel.add_product(fresh, dlogits, other, alpha, False, transposed)
    assert ((fresh - exact).abs() <= eps * slack).all()
    again = torch.full_like(out, torch.nan)
    panel.add_product(again, dlogits, other, alpha, False, transposed)
    assert torch.equal(again, fresh)
    return fresh


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("transposed", [False, True])
def test_products(transposed, positives, dtype):
    x, y = features(*TILED, 48, dtype)
    panel, dlogits = panel_of(x, y, POSITIVES[positives](*TILED), tiled_choice(x, y))
    assert panel.skips
    other = x if transposed else y
    wide = torch.cat([other, torch.full_like(other[:, :8], torch.nan)], 1)
    check_product(panel, dlogits, wide[:, :48], transposed)  # rows further apart than they are long
    check_product(panel, dlogits, other.T.contiguous().T, transposed)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("positives", ["diagonal", "ids"])
@pytest.mark.parametrize("transposed", [False, True])
def test_products_where_the_library_has_none(transposed, positives, dtype):
    """Of half operands into fp32, as on ROCm: all tiles, whatever lies beyond the last pair."""
    m, n = 130, 200
    x, y = features(m, n, 48, dtype)
    panel = TritonPanel(PanelSpec(256, 384, dtype, True, True), x.device)
    panel.library = False
    panel.dlogits.fill_(torch.nan)
    dlogits = panel(x, y, affine(), POSITIVES[positives](m, n), torch.empty(3, device=DEVICE))
    check_product(panel, dlogits, x if transposed else y, transposed)


@pytest.mark.covering(1)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("m, n, d", [(1, 1, 1), (130, 257, 200), (257, 1, 16), (128, 128, 128)])
def test_products_of_smaller_panels_in_the_same_workspace(m, n, d, transposed):
    x, y = features(m, n, d, torch.float32)
    panel, dlogits = panel_of(x, y, labels(m, n), by_hash(m, n, 5e-4), rows=384, cols=512)
    assert panel.skips
    check_product(panel, dlogits, x if transposed else y, transposed)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_a_tile_in_which_nothing_is_kept_is_not_read(transposed, dtype):
    x, y = features(*TILED, 48, dtype)
    selection = tiled_choice(x, y)
    panel, dlogits = panel_of(x, y, Pairs(diagonal=0), selection)
    flags = tiles_kept(x, y, Pairs(diagonal=0), selection)
    assert flags.tolist() == [[True] * 4, [False, True, False, False], [True] * 4]
    other = x if transposed else y
    clean = check_product(panel, dlogits, other, transposed)
    whole = panel.dlogits.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # a view
    whole[1, :, 0] = whole[1, :, 2:] = torch.nan
    planted = torch.full_like(clean, torch.nan)
    panel.add_product(planted, dlogits, other, 0.5, False, transposed)
    assert torch.equal(planted, clean)
    if transposed:  # images of the second row of tiles meet texts of the second column alone
        other = other.clone()
        other[128:256] = torch.nan
        panel.add_product(planted, dlogits, other, 0.5, False, transposed)
        assert torch.equal(
            planted.isnan().all(1).nonzero()[:, 0], torch.arange(128, 256).to(DEVICE)
        )
        assert torch.equal(planted[:128], clean[:128]) and torch.equal(planted[256:], clean[256:])


@pytest.mark.parametrize("transposed", [False, True])
def test_no_tile_is_looked_for_among_many_random_pairs(transposed):
    """The product is then the library's, which does not take lists."""
    x, y = features(*TILED, 48, torch.float32)
    panel, dlogits = panel_of(x, y, Pairs(diagonal=0), by_hash(*TILED, 2e-3), rows=384, cols=512)
    assert not panel.skips and panel.flags.view(-1)[:12].all()
    check_product(panel, dlogits, x if transposed else y, transposed)
    assert (panel.lists == -1).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_of_nothing(transposed):
    x, y = features(*TILED, 48, torch.float32)
    panel, dlogits = panel_of(x, y, Pairs(), by_hash(*TILED)._replace(hash_cutoff=-(2**31)))
    assert not panel.flags.any() and not dlogits.any()
    out = torch.full((TILED[transposed], 48), 3.0, device=DEVICE)
    other = torch.full((TILED[not transposed], 48), torch.nan, device=DEVICE)
    panel.add_product(out, dlogits, other, 1.0, accumulate=True, transposed=transposed)
    assert (out == 3).all()
    panel.add_product(out, dlogits, other, 1.0, accumulate=False, transposed=transposed)
    assert (out == 0).all()
