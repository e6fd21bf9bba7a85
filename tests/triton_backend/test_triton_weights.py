"""Panels whose pairs have weights and targets, and the losses of images, against float64."""

from __future__ import annotations

from support.devices import require_triton_kernels

require_triton_kernels()

import pytest
import torch

from fused_siglip import PositiveTarget, PositiveWeight, siglip_loss
from fused_siglip.kernels import GRAD_SCALE, Ids, Pairs, PanelSpec, triton_panel
from fused_siglip.kernels.pair_weights import PairWeights, PositiveShares
from fused_siglip.kernels.triton_panel import TritonPanel
from fused_siglip.testing import eager_siglip_loss
from fused_siglip.testing.rounding import UNIT_ROUNDOFF
from support.triton_panels import (
    DEVICE,
    DTYPES,
    FUNCTIONS,
    POSITIVES,
    TILED,
    affine,
    agree,
    by_hash,
    by_logit,
    features,
    pair_masks,
    tiled_choice,
)

# NumPy, under the interpreter, warns of the NaN and Inf some tests feed in.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

T = 10.0
SELECTIONS = {
    "all": lambda x, y: None,
    "hash": lambda x, y: by_hash(len(x), len(y)),
    "logit": by_logit,
}


def vectors(m, n):
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(k, generator=generator).to(DEVICE) for k in (m, n)]


def rows(m, n):
    return PairWeights(*(v + 0.1 for v in vectors(m, n)))


def shares(m, n):
    return PairWeights(shares=PositiveShares(*(v / 2 for v in vectors(m, n))))


def with_targets(weights, *targets):
    return weights._replace(targets=torch.tensor(targets, device=DEVICE))


# Targets of 1 - e for weights and of 0.9 p for targets, with a linear term elsewhere or without.
KINDS = {
    "rows": rows,
    "images": lambda m, n: PairWeights(images=vectors(m, n)[0]),
    "texts": lambda m, n: PairWeights(texts=vectors(m, n)[1]),
    "shares": shares,
    "aligned": lambda m, n: PairWeights(
        shares=shares(m, n).shares._replace(text=None, aligned=(-20, 0.7))
    ),
    "targets": lambda m, n: with_targets(PairWeights(), 0, 1, -1e-3, 0.9 + 1e-3, 0),
    "all": lambda m, n: with_targets(
        rows(m, n)._replace(shares=shares(m, n).shares._replace(aligned=(5, 1.0))),
        *(1, 0, 2e-3, 0.9, 2e-3),
    ),
    "signed": lambda m, n: with_targets(
        PairWeights(*(2 * v - 1 for v in vectors(m, n)), shares(m, n).shares), 0, 1, 0, 0.4, 0.2
    ),
}


def call(x, y, pairs, b=-10.0, selection=None, image_losses=None, store_dlogits=True):
    """The sums of one panel and its dlogits (unscaled, float64)."""
    wants = image_losses is not None
    spec = PanelSpec(
        len(x), len(y), x.dtype, store_dlogits and not wants, not wants, selection is not None,
        weighted=True, image_losses=wants,
    )  # fmt: skip
    panel = TritonPanel(spec, x.device)
    if panel.row_losses is not None:
        panel.row_losses.fill_(torch.nan)
    sums = torch.full((3,), 7.0, device=DEVICE)
    dlogits = panel(x, y, affine(T, b), pairs, sums, selection, image_losses)
    if dlogits is not None:
        dlogits = dlogits.double() / GRAD_SCALE.get(x.dtype, 1.0)
    return sums, dlogits


def formula(x, y, pairs, dtype, b=-10.0, selection=None):
    """By pair: the loss, dlogits * s, dlogits, and what the loss and dlogits are made of."""
    s = x.to(dtype) @ y.to(dtype).T
    positive, valid = pair_masks(x, y, pairs, selection)
    weights, one = pairs.weights, torch.ones((), dtype=dtype, device=x.device)
    p = one.expand(s.shape)
    if weights.shares is not None:
        p = weights.shares.image.to(dtype)[:, None].expand(s.shape)
        p = p if weights.shares.text is None else p + weights.shares.text.to(dtype)
        if weights.shares.aligned is not None:
            p = p.clone()
            p.diagonal(weights.shares.aligned[0]).fill_(weights.shares.aligned[1])
    alpha = torch.where(positive, p, one)
    beta = torch.where(positive, p, 0 * one)
    if weights.targets is not None:
        a0, a1, b0, b1, of_negatives = weights.targets.to(dtype)
        alpha = torch.where(positive, a0 + a1 * p, one)
        beta = torch.where(positive, b0 + b1 * p, of_negatives)
    w = one.expand(s.shape)
    w = w if weights.images is None else w * weights.images.to(dtype)[:, None]
    w = w if weights.texts is None else w * weights.texts.to(dtype)
    z = s * T + b
    sign = torch.where(beta > alpha / 2, -1.0, 1.0).to(dtype)
    u, rest = sign * z, torch.where(sign < 0, alpha - beta, beta)
    softplus = u.clamp(min=0) + torch.log1p(torch.exp(-u.abs()))
    parts = [w * alpha * softplus, w * rest * u, w * alpha * torch.sigmoid(u), w * rest]
    parts = [torch.where(valid, part, 0) for part in parts]
    loss, dlogits = parts[0] - parts[1], sign * (parts[2] - parts[3])
    sizes = parts[0].abs() + parts[1].abs(), parts[2].abs() + parts[3].abs()
    return loss, torch.where(valid, dlogits * s, 0), dlogits, *sizes


def check(x, y, pairs, b=-10.0, selection=None):
    """As in support/triton_panels.py; where parts of a term cancel, they count with their size."""
    sums, dlogits = call(x, y, pairs, b, selection)
    exact = formula(x, y, pairs, torch.float64, b, selection)
    eager = formula(x, y, pairs, torch.float32, b, selection)
    eps = UNIT_ROUNDOFF[torch.float32]
    s = (x.double() @ y.double().T).abs()
    sizes = exact[3], torch.where(exact[4] > 0, exact[4] * s, 0), exact[4]
    for actual, e, f, size in zip(sums.double(), exact, eager, sizes, strict=False):
        slack = 4 * (f.double() - e).abs().sum() + (FUNCTIONS + 24) * eps * size.sum()
        assert (actual - e.sum()).abs() <= slack, (actual, e.sum(), slack)
    deviation = ((eager[2].double() - exact[2]).abs() / exact[4].clamp(min=1e-300)).max()
    slack = (4 * deviation + FUNCTIONS * eps) * exact[4] + UNIT_ROUNDOFF[x.dtype] * exact[2].abs()
    slack += torch.finfo(x.dtype).tiny / GRAD_SCALE.get(x.dtype, 1)
    assert ((dlogits - exact[2]).abs() <= slack).all()
    assert not dlogits[exact[4] == 0].any()


def check_image_losses(x, y, pairs, b=-10.0, selection=None):
    losses = torch.full((len(x),), 3.0, device=DEVICE)
    sums, _ = call(x, y, pairs, b, selection, losses)
    exact = formula(x, y, pairs, torch.float64, b, selection)
    eager = formula(x, y, pairs, torch.float32, b, selection)
    eps = UNIT_ROUNDOFF[torch.float32]
    slack = 4 * (eager[0].double() - exact[0]).abs().sum(1)
    slack += (FUNCTIONS + 24) * eps * (exact[3].sum(1) + 3)
    assert ((losses.double() - 3 - exact[0].sum(1)).abs() <= slack).all()
    assert (sums[0].double() - exact[0].sum()).abs() <= slack.sum()


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("b", [-15.0, 0.0], ids=["saturated", "plain"])
def test_weights(b, kind, selection, positives, dtype):
    x, y = features(150, 300, 48, dtype)
    pairs = POSITIVES[positives](150, 300)._replace(weights=KINDS[kind](150, 300))
    selection = SELECTIONS[selection](x, y)
    check(x, y, pairs, b, selection)
    check_image_losses(x, y, pairs, b, selection)


@pytest.mark.parametrize(
    "m, n, d", [(1, 1, 1), (127, 129, 48), (129, 1, 16), (128, 256, 16), (130, 1, 65)]
)
def test_sizes(m, n, d):
    x, y = features(m, n, d, torch.float32)
    pairs = Pairs(diagonal=0, weights=KINDS["all"](m, n)._replace(shares=shares(m, n).shares))
    check(x, y, pairs)
    check_image_losses(x, y, pairs)


@pytest.mark.covering(1)
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("positives", POSITIVES)
@pytest.mark.parametrize("b", [-15.0, 0.0])
def test_weights_of_one_give_the_bits_of_none(b, positives, selection):
    m, n = 150, 300
    x, y = features(m, n, 48, torch.float32)
    pairs, selection = POSITIVES[positives](m, n), SELECTIONS[selection](x, y)
    halves = (torch.full((k,), 0.5, device=DEVICE) for k in (m, n))
    ones = PairWeights(
        *(torch.ones(k, device=DEVICE) for k in (m, n)), PositiveShares(*halves, (3, 1.0))
    )
    plain, weighted = (call(x, y, p, b, selection) for p in (pairs, pairs._replace(weights=ones)))
    assert all(agree(a, e) for a, e in zip(weighted, plain, strict=True))
    losses = torch.zeros(m, device=DEVICE)
    sums, _ = call(x, y, pairs._replace(weights=PairWeights()), b, selection, losses)
    torch.testing.assert_close(losses.sum(), plain[0][0], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums[0], plain[0][0], rtol=1e-6, atol=0)


@pytest.mark.covering(1)
@pytest.mark.parametrize("kind", ["rows", "all"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_padding_and_what_is_past_the_edge_reach_nothing(dtype, selection, kind):
    m, n = 140, 200
    x, y = features(m, n, 48, dtype)
    pairs = POSITIVES["ids"](m, n)._replace(weights=KINDS[kind](m, n))
    selection = SELECTIONS[selection](x, y)
    clean, losses = call(x, y, pairs, selection=selection), torch.zeros(m, device=DEVICE)
    call(x, y, pairs, selection=selection, image_losses=losses)
    ids, weights = pairs.ids, pairs.weights
    x[ids.images < 0], y[ids.texts < 0] = torch.nan, torch.inf
    longer = []
    for of_rows, padded in ((weights.images, ids.images < 0), (weights.texts, ids.texts < 0)):
        longer.append(torch.full((len(of_rows) + 200,), torch.nan, device=DEVICE))
        longer[-1][: len(of_rows)] = torch.where(padded, torch.nan, of_rows)
    moved = pairs._replace(weights=weights._replace(images=longer[0][:m], texts=longer[1][:n]))
    sums, dlogits = call(x, y, moved, selection=selection)
    assert torch.equal(sums, clean[0]) and torch.equal(dlogits, clean[1])
    again = torch.zeros(m, device=DEVICE)
    call(x, y, moved, selection=selection, image_losses=again)
    assert torch.equal(again, losses) and not again[ids.images < 0].any()


def test_infinite_logits_of_positives_make_no_nan():
    x = torch.zeros(4, 16, device=DEVICE)
    x[:, 0] = 3e38
    y = torch.zeros(4, 16, device=DEVICE)
    y[:, 0] = 1
    weights = PairWeights(torch.full((4,), 0.5, device=DEVICE), shares=shares(4, 4).shares)
    same = Ids(*torch.zeros(2, 4, dtype=torch.int64, device=DEVICE))
    sums, dlogits = call(x, y, Pairs(ids=same, weights=weights))  # 10 * 3e38
    assert sums[0] == 0 and not dlogits.any()


@pytest.mark.parametrize("targets", [None, (0, 1, 0, 0.5, 0.25)])
def test_flags_say_where_dlogits_are(targets):
    """Also where losses of both signs add up to 0; and not where all weights are 0."""
    m, n = TILED
    x, y = features(m, n, 48, torch.float32)
    y[1::2] = y[::2]  # pairs whose losses are the same
    images, texts = torch.ones(m, device=DEVICE), torch.ones(n, device=DEVICE)
    texts[1::2] = -1
    texts[384:] = 0
    weights = PairWeights(images, texts)
    if targets is not None:
        weights = with_targets(weights, *targets)
    spec = PanelSpec(m, n, x.dtype, True, True, True, weighted=True)
    panel = TritonPanel(spec, x.device)
    panel.flags.fill_(-1)
    selection = by_hash(m, n, keep=1e-9)._replace(hash_cutoff=2**31 - 1)  # all that there are
    selection = selection if targets is None else tiled_choice(x, y)
    dlogits = panel(
        x, y, affine(), Pairs(weights=weights), torch.empty(3, device=DEVICE), selection
    )
    whole = torch.zeros(384, 512, device=DEVICE)
    whole[:m, :n] = dlogits
    there = whole.unflatten(1, (-1, 128)).unflatten(0, (-1, 128)).ne(0).any(3).any(1)
    assert torch.equal(panel.flags[: there.numel()].view_as(there).bool(), there)
    assert there.any() and not there[:, 3].any()


def test_the_hopper_kernel_is_not_asked(monkeypatch):
    monkeypatch.setattr(TritonPanel, "_on_hopper", lambda *_: pytest.fail("it has no weights"))
    x, y = features(10, 10, 16, torch.bfloat16)
    call(x, y, Pairs(diagonal=0, weights=rows(10, 10)))
    call(x, y, Pairs(weights=PairWeights()), image_losses=torch.zeros(10, device=DEVICE))


@pytest.mark.parametrize("filters_negatives", [False, True])
def test_workspace_bytes(filters_negatives):
    for m, n in [(128, 256), (100, 300), (1, 1)]:
        spec = PanelSpec(
            m, n, torch.float32, False, False, filters_negatives, weighted=True, image_losses=True
        )
        panel = TritonPanel(spec, torch.device(DEVICE))
        allocated = sum(t.nbytes for t in vars(panel).values() if isinstance(t, torch.Tensor))
        assert allocated == TritonPanel.workspace_bytes(spec)


@pytest.mark.parametrize(
    "positives", [PositiveWeight(50.0, 3.0), PositiveTarget(0.1, 0.5, 0.4), None], ids=repr
)
@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_large_weights_in_float16(positives, smoothing):
    """dlogits times GRAD_SCALE would overflow: weights are divided by a power of two."""
    m = n = 140
    features_ = features(m, n, 32, torch.float16)
    ids = [torch.arange(k, device=DEVICE) % 60 for k in (m, n)]
    options = {
        "image_weights": 10 * vectors(m, n)[0], "text_weights": 3 * vectors(m, n)[1],
        "positives": positives, "label_smoothing": smoothing, "image_ids": ids[0],
        "text_ids": ids[1],
    }  # fmt: skip

    def gradients(function, dtype, **more):
        leaves = [f.detach().to(dtype).requires_grad_() for f in features_]
        loss = function(*leaves, *affine(10.0, 0.0), **more)
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    actual = gradients(siglip_loss, torch.float16, backend="triton", **options)
    exact = gradients(eager_siglip_loss, torch.float64, **options)
    for a, e in zip(actual, exact, strict=True):
        assert (a.double() - e).abs().max() <= 4e-3 * e.abs().max()


def test_weights_at_odd_addresses_are_moved(monkeypatch):
    """The sweep launches the kernel that Triton compiles for aligned pointers."""
    m, n = 150, 260
    x, y = features(m, n, 48, torch.float32)
    seen = []
    launch = triton_panel.weight_args

    def spy(weights):
        seen.append(weights)
        return launch(weights)

    monkeypatch.setattr(triton_panel, "weight_args", spy)
    odd = [torch.rand(k + 1, device=DEVICE)[1:] for k in (m, n)]
    ids = [torch.arange(k, device=DEVICE) % 50 for k in (m, n)]
    siglip_loss(
        x.requires_grad_(), y, *affine(), image_ids=ids[0], text_ids=ids[1], image_weights=odd[0],
        text_weights=odd[1], positives=PositiveWeight(0, 0.5, 0.5), backend="triton",
        workspace_bytes=TritonPanel.workspace_bytes(PanelSpec(128, 128, x.dtype, True, True)),
    )  # fmt: skip
    assert len(seen) >= 4
    for weights in seen:
        tensors = weights.images, weights.texts, weights.shares.image, weights.shares.text
        assert all(t.data_ptr() % 16 == 0 and t.is_contiguous() for t in tensors)
