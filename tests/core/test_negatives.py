"""Negatives chosen at random or by their logit: which they are, and the loss of what is kept."""

import numpy as np
import pytest
import torch

from fused_siglip import Easiest, Hardest, LearnableSigLipLoss, Random, compute, siglip_loss
from fused_siglip.kernels import panel_class
from fused_siglip.kernels.torch_products import add_product
from fused_siglip.selection.thresholds import ROWS_AT_ONCE, text_center_radius
from fused_siglip.sweep import sweep
from support.expected_negatives import expected_selection, positives
from support.inputs import Inputs, loss_and_grads, make_inputs, one_tile, operand_dtype
from support.tolerances import error_ratios

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CHOICES = (Random(0.4, seed=3), Hardest(0.1), Easiest(0.3))
ids_of_choices = [type(choice).__name__ for choice in CHOICES]
# everything, at 64 x 64 (torch) or 128 x 128 pairs, and in between
TILES = (None, 1, 3)


def pairs_kept(choice, m: int, n: int, backend: str, device: str, tiles=None, **options):
    """(m, n) bool: every pair in turn is seen by its own entry of dX, where texts are unit vectors.

    t is small and b = 0: no dlogits are near 0 that are not 0.
    """
    x = torch.randn(m, n, generator=torch.Generator().manual_seed(5)).to(device).requires_grad_()
    workspace = tiles and tiles * one_tile(backend, torch.float32, device, filters_negatives=True)
    siglip_loss(
        x, torch.eye(n, device=device), 0.1, 0.0, negatives=choice, negative_only=True,
        backend=backend, workspace_bytes=workspace, **options,
    ).backward()  # fmt: skip
    return (x.grad != 0).cpu(), x.detach().cpu()


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("choice", CHOICES, ids=ids_of_choices)
@pytest.mark.parametrize("ids", [False, True])
def test_loss_and_gradients_of_what_is_kept(backend, device, dtype, choice, ids):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    inputs = make_inputs(
        150, 130 if ids else 150, 48, dtype, t=10.0, b=-5.0, ids=ids, device=device
    )
    operand = operand_dtype(backend, dtype, device)
    for tiles in TILES:
        workspace = tiles and tiles * one_tile(backend, dtype, device, filters_negatives=True)
        actual = loss_and_grads(
            siglip_loss, inputs, negatives=choice, backend=backend, workspace_bytes=workspace
        )
        found = error_ratios(actual, inputs, g_dtype=operand, negatives=choice)
        assert max(found.values()) <= 1, found


@pytest.mark.covering(1)
@pytest.mark.parametrize(
    "requires_grad",
    [
        (False, True, True, True),
        (True, False, False, False),
        (False, False, True, True),
        (False,) * 4,
    ],
    ids=str,
)
@pytest.mark.parametrize("choice", CHOICES, ids=ids_of_choices)
def test_only_some_inputs_require_grad(backend, device, choice, requires_grad):
    inputs = make_inputs(140, 140, 16, requires_grad=requires_grad, device=device)
    actual = loss_and_grads(siglip_loss, inputs, negatives=choice, backend=backend)
    assert max(error_ratios(actual, inputs, negatives=choice).values()) <= 1


@pytest.mark.covering(1)
@pytest.mark.parametrize("seed", [0, 1, 2**32 + 5, 2**63 - 1])
@pytest.mark.parametrize("keep", [0.5, 0.01])
def test_random_pairs_are_those_of_the_definition(backend, device, keep, seed):
    expected = None
    for tiles in TILES:
        kept, x = pairs_kept(Random(keep, seed), 200, 160, backend, device, tiles)
        if expected is None:
            inputs = Inputs(x, torch.eye(160), torch.tensor(0.1), torch.tensor(0.0), {})
            expected, _ = expected_selection(inputs, Random(keep, seed), negative_only=True)
        assert torch.equal(kept, expected)


def test_random_pairs_look_independent():
    """Shares of all, rows, columns, neighbours and of two seeds lie where chance puts them."""
    n, keep = 1024, 0.3
    masks = [pairs_kept(Random(keep, seed), n, n, "torch", "cpu")[0].double() for seed in (0, 1)]
    first, second = ((mask - keep) / (keep * (1 - keep)) ** 0.5 for mask in masks)
    for standardized in (first, second):
        assert abs(standardized.mean() * n) < 4  # a standard normal
        for side in (0, 1):  # chi-square of n rows or columns
            assert abs((standardized.mean(side) ** 2).sum() * n - n) < 5 * (2 * n) ** 0.5
    for other in (second, first.T, first.roll(1, 0), first.roll(1, 1), first.flip(0)):
        assert abs((first * other).mean() * n) < 5
    # all four corners of a rectangle: their keys are not independent, their hashes must be
    corners = first * first.roll(1, 0) * first.roll(1, 1) * first.roll((1, 1), (0, 1))
    assert abs(corners.mean() * n) < 5


def thresholds_of(inputs, negatives):
    """What the sweep of one process selects by."""
    found = []

    def keep_selection(*arguments):
        found.append(arguments[-1])
        return sweep(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compute, "sweep", keep_selection)
        siglip_loss(*inputs.tensors(), negatives=negatives, negative_only=True, backend="torch")
    return found[0]


@pytest.mark.covering(2)
@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1, 0.01])
@pytest.mark.parametrize("choice", [Hardest, Easiest])
@pytest.mark.parametrize("spread", [1.0, 0.1, 0.02], ids=["around 0", "alike", "nearly equal"])
@pytest.mark.parametrize("far", [False, True], ids=["", "one text far from all others"])
def test_share_of_every_image_is_within_a_hundredth_of_what_was_asked(choice, keep, spread, far):
    generator = torch.Generator().manual_seed(0)
    m, n, d = 40, 6000, 32
    x, y = (torch.randn(rows, d, generator=generator) * spread + (spread < 1) for rows in (m, n))
    x, y = (torch.nn.functional.normalize(f, dim=1) for f in (x, y))
    if far:
        y[0] = -y[1]
    inputs = Inputs(x, y, torch.tensor(10.0), torch.tensor(-10.0), {})
    (center, inv_radius), threshold = thresholds_of(inputs, choice(keep))
    value = (x @ y.T - center[:, None]) * inv_radius[:, None]
    kept = value >= threshold[:, None]
    last = value.masked_fill(~kept, torch.inf).min(1, keepdim=True).values
    ties = (value == last).sum(1)  # float32 itself tells no more apart
    kept, wanted = kept.sum(1), keep * n
    assert (kept >= wanted).all() and (kept - wanted <= 0.01 * wanted + ties).all(), kept


def test_the_range_of_texts_leaves_out_padding_in_every_block():
    y = torch.randn(2 * ROWS_AT_ONCE + 100, 8, dtype=torch.float64) + 3
    ids = torch.arange(len(y)) % 3 - 1
    real = y[ids >= 0]
    y[ids < 0] = torch.nan
    center, radius = text_center_radius(y, ids, y.dtype, lambda tensor, op: None)
    torch.testing.assert_close(center, real.mean(0))
    torch.testing.assert_close(radius, (real - real.mean(0)).norm(dim=1).max())


@pytest.mark.parametrize("t", [10.0, -10.0])
def test_hardest_means_the_largest_logits(backend, device, t):
    x = torch.tensor([[1.0, 0.0]], device=device)
    angles = torch.linspace(0, 3, 30, device=device)
    y = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    for choice, hard in ((Hardest(0.1), True), (Easiest(0.1), False)):
        y.grad = None
        siglip_loss(x, y, t, 0.0, negative_only=True, negatives=choice, backend=backend).backward()
        kept = (y.grad != 0).any(1).nonzero()[:, 0].tolist()
        assert kept == ([0, 1, 2] if hard == (t > 0) else [27, 28, 29])


def test_ties_are_kept_together_and_one_negative_at_least(backend, device):
    equal = torch.ones(6, 4, device=device)
    y = equal.clone().requires_grad_()
    siglip_loss(equal, y, 1.0, 0.0, negatives=Hardest(0.5), backend=backend).backward()
    everything = equal.clone().requires_grad_()
    siglip_loss(equal, everything, 1.0, 0.0, backend=backend).backward()
    torch.testing.assert_close(y.grad, everything.grad)  # another kernel makes that product
    kept, _ = pairs_kept(Hardest(1e-6), 30, 20, backend, device)
    assert (kept.sum(1) == 1).all()


def test_the_share_is_one_of_real_negatives():
    """Neither positives nor padding count: of 6 negatives, half are 3."""
    inputs = make_inputs(1, 10, 8)
    inputs.ids = {
        "image_ids": torch.tensor([5]),
        "text_ids": torch.tensor([5, 1, 2, -1, 3, 5, 4, 6, 7, -3]),
    }
    loss_and_grads(siglip_loss, inputs, negatives=Hardest(0.5))
    kept = (inputs.text_features.grad != 0).any(1)
    positive, negative = positives(inputs)
    assert kept[positive[0]].all()
    assert kept[negative[0]].sum() == 3
    assert not kept[(inputs.ids["text_ids"] < 0)].any()


@pytest.mark.parametrize("choice", [Random(1), Hardest(1.0), Easiest(1)], ids=str)
def test_all_of_them_is_the_loss_itself(choice):
    inputs = make_inputs(50, 50, 8)
    all_kept = loss_and_grads(siglip_loss, inputs, negatives=choice)
    plain = loss_and_grads(siglip_loss, inputs)
    assert all(torch.equal(a, p) for a, p in zip(all_kept, plain, strict=True))


class Mine(Random):
    pass


@pytest.mark.parametrize("negatives", [Mine(0.3, 7), Random(0.3, np.int64(7)), Random(0.3, 7)])
def test_a_subclass_is_what_it_derives_from(negatives):
    inputs = make_inputs(50, 50, 8)
    actual = siglip_loss(*inputs.tensors(), negatives=negatives)
    assert actual == siglip_loss(*inputs.tensors(), negatives=Random(0.3, seed=7))
    assert actual < siglip_loss(*inputs.tensors())


def test_empty_batches_and_dropped_nan(backend, device):
    for choice in CHOICES:
        empty = make_inputs(0, 0, 8, device=device)
        loss, dx, *_ = loss_and_grads(siglip_loss, empty, negatives=choice, backend=backend)
        assert loss == 0 and dx.shape == (0, 8)
        inputs = make_inputs(40, 40, 8, device=device)
        with torch.no_grad():
            inputs.text_features[7] = torch.nan
        assert siglip_loss(*inputs.tensors(), negatives=choice, backend=backend).isnan()


def test_nothing_kept_costs_no_product(monkeypatch):
    """On a CPU: a panel where few pairs are kept goes to the sparse products, with those alone."""
    held = []
    torch_panel = panel_class("torch")
    add = torch_panel.add_product

    def spy(self, out, dlogits, *rest):
        held.append(dlogits._nnz() if dlogits.is_sparse else None)
        add(self, out, dlogits, *rest)

    monkeypatch.setattr(torch_panel, "add_product", spy)
    inputs = make_inputs(256, 256, 8)
    loss_and_grads(
        siglip_loss, inputs, negatives=Random(1e-9), backend="torch",
        workspace_bytes=one_tile("torch", torch.float32, filters_negatives=True),
    )  # fmt: skip
    assert len(held) == 2 * 16  # dX and dY of 4 x 4 panels
    assert sorted(held) == [0] * 2 * 12 + [64] * 2 * 4  # the diagonal's panels hold positives
    held.clear()
    loss_and_grads(siglip_loss, inputs, negatives=Random(0.5), backend="torch")
    assert held == [None, None]


@pytest.mark.parametrize("nothing", [False, True])
def test_a_sparse_product_does_not_read_what_memory_held(nothing):
    dlogits = torch.zeros(5, 7)
    if not nothing:
        dlogits[2, 3] = 2.0
    y = torch.randn(7, 4)
    out = torch.full((5, 4), torch.nan)
    add_product(out, dlogits.to_sparse(), y, 0.5, accumulate=False)
    assert torch.equal(out, 0.5 * dlogits @ y)
    add_product(out, dlogits.to_sparse(), y, 0.5, accumulate=True)
    assert torch.equal(out, dlogits @ y)


def test_module(backend, device):
    inputs = make_inputs(60, 60, 8, device=device)
    module = LearnableSigLipLoss(backend=backend).to(device)
    features = [f.detach() for f in (inputs.image_features, inputs.text_features)]
    expected = siglip_loss(*features, 10.0, -10.0, negatives=Random(0.3, 4), backend=backend)
    torch.testing.assert_close(module(*features, negatives=Random(0.3, 4)), expected)


def test_compiled_with_another_seed_every_step():
    inputs = make_inputs(60, 60, 8)
    graphs = []

    def count(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *tensors, seed: siglip_loss(*tensors, negatives=Random(0.3, seed)),
        backend=count, fullgraph=True,
    )  # fmt: skip
    for seed in range(6):
        actual = compiled(*inputs.tensors(), seed=seed)
        torch.testing.assert_close(
            actual, siglip_loss(*inputs.tensors(), negatives=Random(0.3, seed))
        )
    assert len(graphs) <= 3  # 0, 1 and any other seed


# --- bad arguments ---


@pytest.mark.parametrize("choice", [Random, Hardest, Easiest])
@pytest.mark.parametrize("keep", [0, -0.1, 1.1, float("nan")])
def test_a_share_out_of_range(choice, keep):
    with pytest.raises(ValueError, match=f"keep is {keep}: expected a share above 0 and at most 1"):
        choice(keep)


@pytest.mark.parametrize("choice", [Random, Hardest, Easiest])
@pytest.mark.parametrize("keep", ["half", None, True])
def test_a_share_of_the_wrong_type(choice, keep):
    with pytest.raises(TypeError, match=r"keep is a \w+: expected a number"):
        choice(keep)


def test_seeds():
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match=rf"seed is {seed}: expected 0 up to 2\*\*63"):
            Random(0.5, seed)
    for seed in (1.0, True, torch.tensor(1)):
        with pytest.raises(TypeError, match=r"seed is a \w+: expected an int"):
            Random(0.5, seed)


def test_negatives_of_the_wrong_type():
    inputs = make_inputs(4, 4, 4)
    for wrong in ("hardest", 0.5, Hardest):
        with pytest.raises(TypeError, match=r"negatives is a \S+: expected None, Random\(keep"):
            siglip_loss(*inputs.tensors(), negatives=wrong)
