"""What pairs count, their targets, smoothing and images' losses, by formulas and in float64."""

import math

import pytest
import torch

from fused_siglip import Below, Hardest, PositiveTarget, PositiveWeight, Random, siglip_loss
from support.devices import INTERPRETED
from support.inputs import (
    Inputs,
    loss_and_grads,
    make_inputs,
    one_tile,
    operand_dtype,
    random_weights,
)
from support.tolerances import error_ratios

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
NAN, INF = math.nan, math.inf


def square(backend: str) -> int:
    """Rows of several panels; in Triton's interpreter a fraction of a tile."""
    return 40 if backend == "triton" and INTERPRETED else 140


def panels(backend: str) -> tuple[int | None, ...]:
    """How many tiles the workspace holds, None: the default."""
    return (1,) if backend == "triton" and INTERPRETED else (None, 1)


def assert_exact(inputs: Inputs, backend: str = "torch", tiles: int | None = None, **options):
    dtype, device = inputs.image_features.dtype, inputs.image_features.device.type
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    workspace = tiles and tiles * one_tile(backend, dtype, device, True, True)
    upstream = None
    if options.get("reduction") == "none":
        upstream = torch.linspace(-2, 3, len(inputs.image_features), device=device)
    actual = loss_and_grads(
        siglip_loss, inputs, upstream, backend=backend, workspace_bytes=workspace, **options
    )
    found = error_ratios(
        actual, inputs, g_dtype=operand_dtype(backend, dtype, device), upstream=upstream, **options
    )
    assert max(found.values()) <= 1, found
    return actual


# --- losses that others have published, by loops over pairs ---


def by_loops(inputs: Inputs, term) -> torch.Tensor:
    """1/R sum_ij term(i, j, z_ij, whether the pair is positive, k_i, k'_j), padding aside."""
    x, y, t, b = (v.detach().double() for v in inputs.tensors())
    image_ids = inputs.ids.get("image_ids", torch.arange(len(x))).tolist()
    text_ids = inputs.ids.get("text_ids", torch.arange(len(y))).tolist()
    total = 0.0
    for i, image in enumerate(image_ids):
        for j, text in enumerate(text_ids):
            if image < 0 or text < 0:
                continue
            z = (t * (x[i] @ y[j]) + b).item()
            total += term(i, j, z, image == text, text_ids.count(image), image_ids.count(text))
    return total / max(sum(image >= 0 for image in image_ids), 1)


def softplus(z: float) -> float:
    return max(z, 0.0) + math.log1p(math.exp(-abs(z)))


def small(rows=(9, 9), **options) -> Inputs:
    inputs = make_inputs(*rows, 5, torch.float64, t=8.0, b=-2.0, **options)
    if options.get("ids"):
        inputs.ids = {
            "image_ids": torch.tensor([0, 1, 1, -1, 2, 0, 3, -4, 1, 5, 6])[: rows[0]],
            "text_ids": torch.tensor([0, 1, 2, 1, -1, 0, -7, 3, 1, 1, 8])[: rows[1]],
        }
    return inputs


def per_pair(w):  # TAO: a pair's own text counts 1, its other positives w
    return lambda i, j, z, positive, k, k2: (
        (1.0 if i == j else w) * softplus(-z) if positive else softplus(z)
    )


def per_query(w):  # the other positives of a text share w among them
    def term(i, j, z, positive, k, k2, diagonal_is_positive):
        if not positive:
            return softplus(z)
        others = k2 - diagonal_is_positive(j)
        return (1.0 if i == j else w / others) * softplus(-z)

    return term


def shared(per_image, per_text):  # SigLIP+: by the number of positives of both sides, or of images
    return lambda i, j, z, positive, k, k2: (
        (per_image / k + per_text / k2) * softplus(-z) if positive else softplus(z)
    )


def soft_labels(i, j, z, positive, k, k2):
    return softplus(z) - (z / k if positive else 0.0)


def smoothed(texts):
    return lambda i, j, z, positive, k, k2: softplus(z) - (0.9 * positive + 0.1 / texts) * z


def diagonal_of(inputs):
    """Whether text j and image j, at one place of the batch, are a positive pair."""
    image_ids, text_ids = (ids.tolist() for ids in inputs.ids.values())
    return lambda j: int(image_ids[j] == text_ids[j] >= 0)


NAMED = {
    "TAO per_pair": (PositiveWeight(0.3, aligned=1.0), per_pair(0.3)),
    "TAO per_query": (PositiveWeight(0.0, 0.0, 0.3, aligned=1.0), per_query(0.3)),
    "SigLIP+ symmetric": (PositiveWeight(0.0, 0.5, 0.5), shared(0.5, 0.5)),
    "SigLIP+ asymmetric": (PositiveWeight(0.0, 1.0, 0.0), shared(1.0, 0.0)),
    "soft labels": (PositiveTarget(0.0, per_image=1.0), soft_labels),
}


@pytest.mark.parametrize("positives,term", NAMED.values(), ids=NAMED)
def test_published_losses(positives, term):
    inputs = small(ids=True)
    if term.__closure__ and "diagonal_is_positive" in term.__code__.co_varnames:
        formula, diagonal = term, diagonal_of(inputs)

        def term(*arguments):
            return formula(*arguments, diagonal)

    expected = by_loops(inputs, term)
    loss = siglip_loss(*inputs.tensors(), **inputs.ids, positives=positives)
    assert loss.item() == pytest.approx(expected, rel=1e-13)
    assert_exact(inputs, positives=positives)


def test_label_smoothing():
    for inputs, texts in ((small(), 9), (small(ids=True), 7), (small((9, 11), ids=True), 9)):
        loss = siglip_loss(*inputs.tensors(), **inputs.ids, label_smoothing=0.1)
        assert loss.item() == pytest.approx(by_loops(inputs, smoothed(texts)), rel=1e-13)


def test_weights_of_images_and_texts():
    for inputs in (small(), small((9, 11), ids=True)):
        inputs.weights = random_weights(inputs, torch.float64)
        a, c = (w.tolist() for w in inputs.weights.values())

        def term(i, j, z, positive, *_, a=a, c=c):
            return a[i] * c[j] * softplus(-z if positive else z)

        expected = by_loops(inputs, term)
        loss = siglip_loss(*inputs.tensors(), **inputs.ids, **inputs.weights)
        assert loss.item() == pytest.approx(expected, rel=1e-13)


def test_losses_of_images():
    inputs = small((9, 11), ids=True)
    losses = siglip_loss(*inputs.tensors(), **inputs.ids, reduction="none")
    images = 7
    for k in range(9):
        expected = images * by_loops(
            inputs, lambda i, j, z, positive, *_, k=k: (i == k) * softplus(-z if positive else z)
        )
        assert losses[k].item() == pytest.approx(expected, rel=1e-13)


def test_negatives_below_the_best_positive_and_a_margin():
    inputs = small((9, 11), ids=True)
    x, y = (f.detach() for f in inputs.tensors()[:2])
    ids = [v.tolist() for v in inputs.ids.values()]
    for margin in (0.2, 0.0, -0.3):
        best = [
            max((float(x[i] @ y[j]) for j in range(11) if ids[1][j] == ids[0][i]), default=INF)
            for i in range(9)
        ]

        def term(i, j, z, positive, *_, margin=margin, best=best):
            takes_part = positive or float(x[i] @ y[j]) <= best[i] + margin
            return takes_part * softplus(-z if positive else z)

        loss = siglip_loss(*inputs.tensors(), **inputs.ids, negatives=Below(margin))
        assert loss.item() == pytest.approx(by_loops(inputs, term), rel=1e-13)
        assert_exact(inputs, negatives=Below(margin))


def test_an_image_without_positives_keeps_its_negatives():
    inputs = small()
    ids = {"image_ids": torch.arange(9), "text_ids": torch.arange(9) + 100}
    losses = [siglip_loss(*inputs.tensors(), **ids, negatives=n) for n in (Below(-5.0), None)]
    assert torch.equal(*losses)


# --- on every backend, against float64 ---

MIXED = {
    "weights": {},
    "shares": {"positives": PositiveWeight(0.2, 0.5, 0.3)},
    "aligned shares": {"positives": PositiveWeight(0.0, 0.0, 0.7, aligned=1.0)},
    "targets": {"positives": PositiveTarget(0.1, 0.4, 0.5)},
    "aligned targets": {"positives": PositiveTarget(0.0, 0.5, 0.5, aligned=0.9)},
    "smoothing": {"label_smoothing": 0.1},
    "all of it": {"positives": PositiveWeight(1.0, 0.5, 2.0, aligned=3.0), "label_smoothing": 0.3},
    "smoothed targets": {"positives": PositiveTarget(0.1, 0.4, 0.5), "label_smoothing": 1.0},
    "smoothing of selected": {"label_smoothing": 0.2, "negatives": Random(0.4, seed=3)},
    "hardest": {"positives": PositiveTarget(0.0, 1.0), "negatives": Hardest(0.2)},
}


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize("options", MIXED.values(), ids=MIXED)
def test_loss_and_gradients(backend, device, dtype, reduction, ids, options):
    n = square(backend)
    inputs = make_inputs(n, n, 24, dtype, t=10.0, b=-5.0, ids=ids, device=device)
    inputs.weights = random_weights(inputs)
    for tiles in panels(backend):
        assert_exact(inputs, backend, tiles, reduction=reduction, **options)


@pytest.mark.parametrize(
    "ids", [{}, {"image_ids": torch.tensor([3]), "text_ids": torch.tensor([3])}]
)
def test_a_target_of_exactly_1_loses_nothing(backend, device, ids):
    """softplus(30) - 30 is less than what rounding 30 does."""
    one = torch.ones(1, 1, device=device)
    ids = {name: value.to(device) for name, value in ids.items()}
    targets = PositiveTarget(0.5, aligned=1.0)
    loss = siglip_loss(one, one, 30.0, 0.0, **ids, positives=targets, backend=backend)
    assert loss.item() == pytest.approx(math.exp(-30), rel=1e-5, abs=0.0)


@pytest.mark.parametrize("kind", [PositiveWeight, PositiveTarget])
def test_aligned_pairs_in_strips_and_wide_panels(kind):
    """Where rows and columns of a block start at different pairs."""
    inputs = make_inputs(700, 700, 4, ids=True)
    for tiles in (None, 5, 13):
        assert_exact(inputs, "torch", tiles, positives=kind(0.2, 0.5, 0.1, aligned=1.0))


@pytest.mark.covering(1)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 70, 5), (65, 1, 8), (129, 257, 17)], ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_sizes(backend, device, size, smoothing, reduction):
    """Also one text with a smoothing of 1, where the linear term is most of the loss."""
    inputs = make_inputs(*size, ids=True, device=device)
    inputs.weights = random_weights(inputs)
    positives = PositiveWeight(0.0, 1.0)
    for tiles in panels(backend):
        assert_exact(
            inputs, backend, tiles, positives=positives, label_smoothing=smoothing,
            reduction=reduction,
        )  # fmt: skip


@pytest.mark.covering(1)
@pytest.mark.parametrize("t,b", [(100.0, -10.0), (100.0, 50.0), (0.0, 0.0), (-50.0, 3.0)])
@pytest.mark.parametrize("options", MIXED.values(), ids=MIXED)
def test_scales_and_biases(backend, device, t, b, options):
    inputs = make_inputs(40, 40, 16, t=t, b=b, device=device)
    inputs.weights = random_weights(inputs)
    assert_exact(inputs, backend, **options)
    assert_exact(inputs, backend, reduction="none", **options)


@pytest.mark.covering(2)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_some_inputs_require_grad(backend, device, image, text, scale, bias, reduction):
    inputs = make_inputs(40, 40, 16, requires_grad=(image, text, scale, bias), device=device)
    inputs.weights = random_weights(inputs)
    options = {"label_smoothing": 0.1, "positives": PositiveWeight(0.5, 1.0)}
    assert_exact(inputs, backend, 1, reduction=reduction, **options)


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("of_weights", DTYPES, ids=str)
def test_weights_of_another_dtype(backend, device, dtype, of_weights):
    inputs = make_inputs(40, 40, 16, dtype, device=device)
    inputs.weights = random_weights(inputs, of_weights)
    assert_exact(inputs, backend)


@pytest.mark.parametrize("names", [("image_weights",), ("text_weights",)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weights_of_one_tower(backend, device, names, dtype):
    inputs = make_inputs(40, 40, 16, dtype, device=device)
    inputs.weights = {k: v for k, v in random_weights(inputs).items() if k in names}
    assert_exact(inputs, backend)
    assert_exact(inputs, backend, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_small_and_large_weights(backend, device, dtype, size):
    """float16 holds what it stores of them whatever their size."""
    inputs = make_inputs(40, 40, 16, dtype, t=1.0, b=0.0, device=device)
    weights = {k: v * size for k, v in random_weights(inputs).items()}
    inputs.weights = weights | {"text_weights": weights["text_weights"] / size}
    assert_exact(inputs, backend, positives=PositiveWeight(7.0))
    assert_exact(inputs, backend, reduction="none", label_smoothing=1.0)


def test_strided_weights(backend, device):
    inputs = make_inputs(40, 40, 16, device=device)
    weights = random_weights(inputs)
    dense = [v.detach() for v in loss_and_grads(
        siglip_loss, Inputs(*inputs.tensors(), {}, weights), backend=backend)]  # fmt: skip
    strided = {k: torch.stack([v, v * 7], 1)[:, 0] for k, v in weights.items()}
    strided["text_weights"] = weights["text_weights"].flip(0).contiguous().flip(0)
    inputs.weights = strided
    values = loss_and_grads(siglip_loss, inputs, backend=backend)
    assert all(torch.equal(a, b) for a, b in zip(values, dense, strict=True))
    one = torch.full((1,), 0.5, device=device).expand(40)
    inputs.weights = {"image_weights": one}
    assert_exact(inputs, backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_padding_may_hold_anything(backend, device, reduction):
    inputs = make_inputs(40, 50, 16, ids=True, device=device)
    padded = [ids < 0 for ids in inputs.ids.values()]
    options = {"label_smoothing": 0.1, "positives": PositiveTarget(0.0, 0.5, 0.5)}
    with torch.no_grad():
        inputs.weights = random_weights(inputs)
        for where, features, weights in zip(
            padded, inputs.tensors(), inputs.weights.values(), strict=False
        ):
            features[where], weights[where] = NAN, NAN
            weights[where.nonzero()[:1, 0]] = -1.0
    values = assert_exact(inputs, backend, reduction=reduction, **options)
    for where, grad in zip(padded, values[1:], strict=False):
        assert grad.isfinite().all()
        assert not grad[where].any()
    if reduction == "none":
        assert not values[0][padded[0]].any()


EMPTY = {
    "no rows": ((0, 0, 5), None),
    "no images": ((0, 6, 5), 0),
    "no texts": ((6, 0, 5), 0),
    "no features": ((6, 6, 0), 0),
    "only padding": ((6, 5, 4), -1),
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("size,first", EMPTY.values(), ids=EMPTY)
def test_empty_batches(backend, device, size, first, reduction):
    inputs = make_inputs(*size, device=device)
    if first is not None:
        names = ("image_ids", "text_ids")
        sides = zip(names, size, strict=False)
        inputs.ids = {k: first * torch.arange(1, n + 1, device=device) for k, n in sides}
    inputs.weights = random_weights(inputs)
    options = {"label_smoothing": 0.1, "positives": PositiveWeight(0.0, 1.0)}
    values = assert_exact(inputs, backend, reduction=reduction, **options)
    if 0 in size[:2] or first == -1:
        assert not any(v.any() for v in values)
    assert values[0].shape == ((size[0],) if reduction == "none" else ())


def test_all_weights_0(backend, device):
    inputs = make_inputs(20, 20, 8, torch.float16, device=device)
    inputs.weights = {"image_weights": torch.zeros(20, device=device)}
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 1.0}):
        values = loss_and_grads(siglip_loss, inputs, backend=backend, **options)
        assert not any(v.any() for v in values)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_same_inputs_same_bits(backend, device, reduction):
    n = square(backend)
    inputs = make_inputs(n, n - 10, 16, ids=True, device=device)
    inputs.weights = random_weights(inputs)
    options = {"label_smoothing": 0.1, "positives": PositiveWeight(0.0, 0.5, 0.5)}
    options |= {"reduction": reduction, "backend": backend}
    options["workspace_bytes"] = one_tile(backend, torch.float32, device, weighted=True)
    first, again = (loss_and_grads(siglip_loss, inputs, **options) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_weights_have_no_gradient():
    inputs = small()
    weights = [torch.rand(9, requires_grad=True) for _ in range(2)]
    for reduction in ("mean", "none"):
        loss = siglip_loss(
            *inputs.tensors(), image_weights=weights[0], text_weights=weights[1],
            reduction=reduction,
        )  # fmt: skip
        loss.sum().backward()
    assert weights[0].grad is None
    assert weights[1].grad is None


def test_losses_of_images_without_gradients():
    inputs = make_inputs(30, 30, 8)
    losses = siglip_loss(*inputs.tensors(), reduction="none")
    with torch.no_grad():
        without = siglip_loss(*inputs.tensors(), reduction="none")
    assert not without.requires_grad
    assert torch.equal(losses, without)
    with pytest.raises(RuntimeError, match="scalar outputs"):
        losses.backward()


def test_losses_of_images_that_get_no_gradient():
    """What comes after them passes none on."""

    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, losses):
            return losses.sum()

        @staticmethod
        def backward(ctx, upstream):
            return None

    inputs = make_inputs(30, 30, 8)
    Stop.apply(siglip_loss(*inputs.tensors(), reduction="none")).backward()
    assert all(tensor.grad is None for tensor in inputs.tensors())


def test_what_changes_in_place_before_backward_is_noticed():
    inputs = make_inputs(8, 8, 4)
    weights = torch.rand(8)
    for changed in (inputs.image_features, weights):
        losses = siglip_loss(*inputs.tensors(), image_weights=weights, reduction="none")
        with torch.no_grad():
            changed.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            losses.sum().backward()
