"""Ranks of retrieval and statistics of logits, against all pairs in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fused_siglip import LogitStatistics, logit_statistics, moments, retrieval_ranks, siglip_loss
from fused_siglip.kernels import panel_class
from support.expected_scores import (
    both_ranks,
    recall,
    recall_by_sorting,
    rounding_of_similarities,
    statistics,
    without_padding,
)
from support.inputs import Inputs, make_inputs
from support.memory import peak_allocated
from support.strategies import inputs_of, random_case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SHARE = {"torch": 1, "triton": 13}  # of the examples of hypothesis' profile
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


def tiles_of(backend, dtype, tiles):
    """workspace_bytes of some tiles with room for what else a panel needs; None: the default."""
    tile_m, tile_n = panel_class(backend).tile
    return tiles and tiles * tile_m * tile_n * 24 + 1


def ranks_of(inputs: Inputs, **options):
    return retrieval_ranks(inputs.image_features, inputs.text_features, **inputs.ids, **options)


def equal(actual, expected) -> bool:
    return all(torch.equal(a.cpu(), e) for a, e in zip(actual, expected, strict=True))


def cases(backend):
    """A decorator: the function gets cases without negative_only, as many as the profile says."""

    def drawn(function):
        random_cases = st.randoms(use_true_random=False).map(lambda r: random_case(r, (backend,)))
        wanted = random_cases.filter(lambda c: c.ids is not None or c.m == c.n)
        return settings(max_examples=max(2 * settings().max_examples // SHARE[backend], 1))(
            given(wanted)(function)
        )

    return drawn


def test_ranks_of_whole_numbers_are_exact(backend):
    """Similarities without rounding, and so with many ties; every layout, dtype and panel."""

    @cases(backend)
    def holds(case):
        inputs = inputs_of(case)
        for name in ("image_features", "text_features"):
            rounded = (getattr(inputs, name).detach() * 3).round_().clamp_(-3, 3)
            setattr(inputs, name, rounded)
        workspace = tiles_of(backend, case.dtype, case.tiles)
        actual = ranks_of(inputs, backend=backend, workspace_bytes=workspace)
        assert all(rank.dtype == torch.int64 for rank in actual)
        assert equal(actual, both_ranks(inputs))

    holds()


def test_ranks_are_those_of_float64_up_to_rounding(backend):
    @cases(backend)
    def holds(case):
        inputs = inputs_of(case)
        workspace = tiles_of(backend, case.dtype, case.tiles)
        actual = ranks_of(inputs, backend=backend, workspace_bytes=workspace)
        slack = 2 * rounding_of_similarities(inputs)
        # a larger best positive, or smaller negatives, for a lower rank
        lowest, highest = (both_ranks(inputs, slack=sign * slack) for sign in (1, -1))
        for a, low, high in zip(actual, lowest, highest, strict=True):
            assert (low <= a.cpu()).all() and (a.cpu() <= high).all()

    holds()


@pytest.mark.covering(1)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 2, 65, 200, 257])
@pytest.mark.parametrize("d", [1, 17, 100, 768])
@pytest.mark.parametrize("tiles", [None, 1, 4])
@pytest.mark.parametrize("ids", [False, True])
def test_features_that_are_all_alike_have_the_worst_rank(backend, device, dtype, m, d, tiles, ids):
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    generator = torch.Generator().manual_seed(d)
    x, y = (torch.randn(1, d, generator=generator).to(device, dtype).repeat(k, 1) for k in (m, m))
    named = {}
    if ids:
        named = dict.fromkeys(("image_ids", "text_ids"), torch.arange(m, device=device))
    workspace = tiles_of(backend, dtype, tiles)
    for features in ((x, y), (x.T.contiguous().T, y[:, :1].expand(m, d))):
        found = retrieval_ranks(*features, **named, backend=backend, workspace_bytes=workspace)
        for rank in found:
            assert (rank == m).all(), rank.unique(return_counts=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("m", [65, 129])
def test_features_that_are_all_alike_in_a_last_panel_of_one_row(dtype, m):
    """On a CPU torch's products have other bits there, unless they are filled up to a panel."""
    row = torch.randn(1, 100, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x, y = row.repeat(m, 1), row.flip(1).repeat(m, 1)
    for rank in retrieval_ranks(x, y, workspace_bytes=64 * 64 * 24, backend="torch"):
        assert (rank == m).all()


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m, d", [(70, 31), (150, 8), (300, 64)])
@pytest.mark.parametrize("tiles", [None, 1])
@pytest.mark.parametrize("ids", [False, True])
def test_a_duplicate_of_the_positive_is_a_tie(backend, device, dtype, m, d, tiles, ids):
    """Rows are copies of a few, whose similarities are not whole numbers: all copies are equal."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("triton has no float64")
    generator = torch.Generator().manual_seed(m)
    few = [torch.randn(9, d, generator=generator).to(dtype) for _ in range(2)]
    copies = [torch.randint(9, (m,), generator=generator) for _ in range(2)]
    inputs = Inputs(*(f[c].to(device) for f, c in zip(few, copies, strict=True)), None, None, {})
    if ids:
        inputs.ids = {
            name: torch.randint(-1, 30, (m,), generator=generator).to(device)
            for name in ("image_ids", "text_ids")
        }
    s = (few[0].double() @ few[1].double().T)[copies[0]][:, copies[1]]
    distinct = s.unique()
    assert distinct.diff().min() > 2e-5, "rounding decides"
    actual = ranks_of(inputs, backend=backend, workspace_bytes=tiles_of(backend, dtype, tiles))
    assert equal(actual, both_ranks(inputs, s))
    assert max(a.float().mean() for a in actual) > 9


def test_a_row_without_a_rank_has_rank_0(backend, device):
    x, y = torch.eye(4, 8, device=device), torch.eye(5, 8, device=device)
    y[3], x[2], y[4] = torch.nan, torch.nan, -1.0
    images = torch.tensor([0, 1, -1, 7], device=device)
    texts = torch.tensor([1, 0, 0, -5, 3], device=device)
    image_ranks, text_ranks = retrieval_ranks(
        x, y, image_ids=images, text_ids=texts, backend=backend
    )
    # image 0 has 0 with its texts, 1 with text 0 and -1 with text 4; image 1 has 0 with its text,
    # 1 and 0 with texts 1 and 2
    assert image_ranks.tolist() == [2, 3, 0, 0]
    # image 3 is no text's, and a negative of all that take part
    assert text_ranks.tolist() == [3, 3, 3, 0, 0]


def test_nan_counts_against_a_rank(backend, device):
    x, y = torch.eye(6, 8, device=device), torch.eye(6, 8, device=device)
    x[2], y[4] = torch.nan, torch.nan
    image_ranks, text_ranks = retrieval_ranks(x, y, backend=backend)
    assert image_ranks.tolist() == [2, 2, 6, 2, 6, 2]
    assert text_ranks.tolist() == [2, 2, 6, 2, 6, 2]


def test_minus_infinity_ties_with_minus_infinity():
    x = torch.tensor([[-torch.inf], [1.0], [1.0]], dtype=torch.float64)
    image_ranks, text_ranks = retrieval_ranks(x, torch.ones_like(x))
    assert image_ranks.tolist() == [3, 3, 3] and text_ranks.tolist() == [3, 2, 2]


@pytest.mark.parametrize("m, n", [(0, 0), (0, 3), (3, 0)])
def test_empty_batches(backend, device, m, n):
    x, y = torch.ones(m, 4, device=device), torch.ones(n, 4, device=device)
    ids = {}
    if m != n:
        ids = {"image_ids": torch.arange(m, device=device), "text_ids": torch.arange(n)}
        ids["text_ids"] = ids["text_ids"].to(device)
    image_ranks, text_ranks = retrieval_ranks(x, y, **ids, backend=backend)
    assert image_ranks.tolist() == [0] * m and text_ranks.tolist() == [0] * n
    assert all(value.isnan() for value in logit_statistics(x, y, 10.0, **ids))


def test_features_of_dimension_0():
    x = torch.ones(3, 0)
    assert retrieval_ranks(x, x)[0].tolist() == [3, 3, 3]
    assert [v.item() for v in logit_statistics(x, x, 10.0, -3.0)] == [-3, 0, -3, 0]


@pytest.mark.parametrize("ids, products", [(False, 1), (True, 2)])
def test_the_number_of_products(monkeypatch, ids, products):
    """Of every panel one on the diagonal, where best positives and counts share it."""
    made = []
    torch_panel = panel_class("torch")
    product = torch_panel._similarities

    def spy(self, x, y):
        made.append((len(x), len(y)))
        return product(self, x, y)

    monkeypatch.setattr(torch_panel, "_similarities", spy)
    x = torch.randn(1000, 8)
    named = dict.fromkeys(("image_ids", "text_ids"), torch.arange(1000)) if ids else {}
    workspace = 256 * 256 * 6
    retrieval_ranks(x, x, **named, workspace_bytes=workspace, backend="torch")
    (shape,) = set(made)
    panels = math.ceil(1000 / shape[0]) * math.ceil(1000 / shape[1])
    assert panels > 4 and len(made) == products * panels
    assert shape[0] % 64 == 0 and shape[1] % 64 == 0


@pytest.mark.parametrize("ids", [False, True])
def test_memory_beside_the_features_does_not_grow_with_pairs(ids):
    x = torch.nn.functional.normalize(torch.randn(6000, 32))
    named = dict.fromkeys(("image_ids", "text_ids"), torch.arange(6000)) if ids else {}
    options = {"backend": "torch", "workspace_bytes": 4 << 20}
    peak = peak_allocated(lambda: retrieval_ranks(x, x, **named, **options))
    assert peak < 9 << 20 and 15 * peak < 6000 * 6000 * 4
    if not ids:
        assert peak_allocated(lambda: logit_statistics(x, x, 10.0)) < 3 << 20


def test_recall_median_and_mrr_of_4096_pairs():
    """As docs/retrieval.md says, against sorted rows of all similarities."""
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(4096, 24, generator=generator)
    x, y = (
        torch.nn.functional.normalize(shared + torch.randn(4096, 24, generator=generator))
        for _ in range(2)
    )
    image_ranks, text_ranks = retrieval_ranks(x, y, backend="torch")
    s = x.double() @ y.double().T
    for k in (1, 5, 10):
        assert recall(image_ranks, k) == recall_by_sorting(s, k)
        assert recall(text_ranks, k) == recall_by_sorting(s.T, k)
    by_sorting = (s.argsort(1, descending=True) == torch.arange(4096)[:, None]).nonzero()[:, 1] + 1
    assert image_ranks.median() == by_sorting.median()
    assert (1 / image_ranks).mean() == (1 / by_sorting).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_as_for_the_loss(dtype):
    inputs = make_inputs(50, 50, 8)
    features = [f.detach().to(dtype) for f in (inputs.image_features, inputs.text_features)]
    rounded = [f.bfloat16() for f in features]
    with torch.autocast("cpu", torch.bfloat16):
        cast = retrieval_ranks(*features), logit_statistics(*features, 10.0)
    assert equal(cast[0], retrieval_ranks(*rounded))
    assert cast[1] == logit_statistics(*rounded, 10.0)
    assert cast[1].mean.dtype == torch.float32


def test_no_gradient():
    inputs = make_inputs(20, 20, 8)
    x, y, t, b = inputs.tensors()
    assert not any(rank.requires_grad for rank in retrieval_ranks(x, y))
    assert not any(value.requires_grad for value in logit_statistics(x, y, t, b))
    (siglip_loss(x, y, t, b) + logit_statistics(x, y, t, b).mean).backward()
    beside_statistics = [v.grad.clone() for v in inputs.tensors()]
    for value in inputs.tensors():
        value.grad = None
    siglip_loss(x, y, t, b).backward()
    alone = [v.grad for v in inputs.tensors()]
    assert all(torch.equal(a, b) for a, b in zip(beside_statistics, alone, strict=True))


@pytest.mark.parametrize("ids", [False, True])
def test_in_a_compiled_step(ids):
    """One graph, which holds each call as one node, also with another batch size."""

    def step(x, y, t, b, ids):
        loss = siglip_loss(x, y, t, b, **ids)
        return loss, retrieval_ranks(x, y, **ids), logit_statistics(x, y, t, b, **ids)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for m in (20, 33, 47):
        inputs = make_inputs(m, m, 8, ids=ids)
        (loss, ranks, found), (_, *expected) = (
            f(*inputs.tensors(), inputs.ids) for f in (compiled, step)
        )
        loss.backward()
        assert equal(ranks, expected[0])
        assert isinstance(found, LogitStatistics) and found == expected[1]
        assert inputs.image_features.grad is not None


@pytest.mark.parametrize("name", ["RETRIEVAL_RANKS", "LOGIT_STATISTICS"])
def test_operators(name):
    from fused_siglip import score_operators

    x = torch.randn(7, 4)
    scalars = (torch.tensor(2.0), torch.tensor([1.0])) if name == "LOGIT_STATISTICS" else ()
    options = (None, torch.float32) if scalars else (None, torch.float32, None, None, None)
    ids = (torch.arange(7), torch.arange(7))
    torch.library.opcheck(getattr(score_operators, name), (x, x, *scalars, *ids, *options))


# --- statistics ---


def closeness(actual, inputs: Inputs) -> float:
    """The largest deviation in units of what rounding of the features' products may cause."""
    expected = statistics(inputs)
    x, y = without_padding(inputs)
    t, b = (v.detach().double().abs().item() for v in (inputs.logit_scale, inputs.logit_bias))
    largest = (x.norm(dim=1).max() * y.norm(dim=1).max()).item() if min(len(x), len(y)) else 0.0
    accumulate = torch.promote_types(inputs.image_features.dtype, torch.float32)
    unit = torch.finfo(accumulate).eps * (t * largest + b) * 8 + 1e-300
    actual = torch.stack(list(actual)).double().cpu()
    assert torch.equal(actual.isnan(), expected.isnan())
    return ((actual - expected).abs() / unit).nan_to_num(0).max().item()


def test_statistics_are_those_of_all_pairs():
    @cases("torch")
    def holds(case):
        inputs = inputs_of(case)
        actual = logit_statistics(*inputs.tensors(), **inputs.ids)
        acc = torch.promote_types(inputs.image_features.dtype, torch.float32)
        assert all(v.shape == () and v.dtype == acc for v in actual)
        if min(case.m, case.n) > 0:
            assert closeness(actual, inputs) <= 1 + case.d**0.5

    holds()


def test_statistics_in_more_parts_than_a_table_holds(monkeypatch):
    inputs = make_inputs(1300, 1300, 8, ids=True)
    expected = logit_statistics(*inputs.tensors(), **inputs.ids)
    monkeypatch.setattr(moments, "_PARTS", 2)  # of nine
    for actual, value in zip(
        logit_statistics(*inputs.tensors(), **inputs.ids), expected, strict=True
    ):
        torch.testing.assert_close(actual, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("m", [40, 3000])
@pytest.mark.parametrize("ids", [False, True])
def test_a_small_spread_around_a_large_mean(dtype, m, ids):
    """Of an untrained tower: similarities are nearly equal, and sums of their squares cancel."""
    generator = torch.Generator().manual_seed(0)
    x, y = (1 + 1e-3 * torch.randn(m, 16, generator=generator, dtype=dtype) for _ in range(2))
    inputs = make_inputs(m, m, 16, dtype, ids=ids)
    inputs.image_features, inputs.text_features = x, y
    actual = torch.stack(list(logit_statistics(*inputs.tensors(), **inputs.ids))).double()
    expected = statistics(inputs)
    relative = ((actual - expected) / expected).abs()
    eps = torch.finfo(dtype).eps
    # features' deviations, 1e-3 of themselves, are rounded to eps / 2 of the features
    assert relative[[0, 2]].max() < 8 * eps and relative[[1, 3]].max() < 3e3 * eps
    assert expected[3] < 1e-3 * expected[2].abs()


@pytest.mark.parametrize("many", ["groups", "one id", "one image", "one text", "two sizes"])
@pytest.mark.parametrize("d", [2, 40])
def test_ids_with_many_rows(monkeypatch, many, d):
    """By covariances where an id has many pairs, in blocks elsewhere; never all pairs at once."""
    monkeypatch.setattr(moments, "_ROWS_OF_POSITIVES", 16)
    monkeypatch.setattr(moments, "_ROWS_AT_ONCE", 32)
    m, n = 120, 150
    inputs = make_inputs(m, n, d, torch.float64)
    ids = {
        "groups": (torch.arange(m) // 7, torch.arange(n) // 7),
        "one id": (torch.zeros(m), torch.zeros(n)),
        "one image": (torch.arange(m), torch.arange(n) % 2),
        "one text": (torch.arange(m) % 3, torch.arange(n)),
        "two sizes": (torch.arange(m).clamp(max=40), torch.arange(n).clamp(max=40)),
    }[many]
    order = torch.Generator().manual_seed(0)
    image_ids, text_ids = ((i.long() - 1)[torch.randperm(len(i), generator=order)] for i in ids)
    inputs.ids = {"image_ids": image_ids, "text_ids": text_ids}
    products = []
    matmul = torch.Tensor.matmul

    def spy(a, b):
        products.append((*a.shape, *b.shape))
        return matmul(a, b)

    monkeypatch.setattr(torch.Tensor, "__matmul__", spy)
    actual = logit_statistics(*inputs.tensors(), **inputs.ids)
    monkeypatch.undo()
    assert closeness(actual, inputs) <= 1 + d**0.5
    if many != "one id" or d == 40:
        assert all(len(p) < 4 or max(p[0], p[-1]) <= 32 for p in products)


def test_scale_and_bias():
    inputs = make_inputs(30, 30, 8)
    x, y = inputs.image_features, inputs.text_features
    plain = logit_statistics(x, y, 1.0)
    turned = logit_statistics(x, y, torch.tensor([-4.0]), 3)
    for a, b in ((turned.positive_mean, plain.positive_mean), (turned.mean, plain.mean)):
        torch.testing.assert_close(a, 3 - 4 * b)
    for a, b in ((turned.positive_std, plain.positive_std), (turned.std, plain.std)):
        torch.testing.assert_close(a, 4 * b)
    assert turned.mean.shape == ()


def test_no_positives_are_nan():
    inputs = make_inputs(5, 7, 4)
    found = logit_statistics(
        *inputs.tensors(), image_ids=torch.arange(5), text_ids=torch.arange(7) + 5
    )
    assert found.positive_mean.isnan() and found.positive_std.isnan()
    assert found.mean.isfinite() and found.std.isfinite()


def test_nan_passes_through_but_not_from_padding():
    inputs = make_inputs(12, 12, 4)
    x, y, *scalars = (v.detach().clone() for v in inputs.tensors())
    ids = torch.arange(12)
    ids[3] = -1
    expected = logit_statistics(x, y, *scalars, image_ids=ids, text_ids=ids)
    x[3], y[3] = torch.nan, torch.inf
    assert logit_statistics(x, y, *scalars, image_ids=ids, text_ids=ids) == expected
    assert all(v.isnan() for v in logit_statistics(x, y, *scalars))


# --- bad arguments ---

X = torch.ones(4, 3)
BAD = [
    (dict(image_features=[1]), TypeError, r"image_features is a list: expected a tensor"),
    (dict(image_features=torch.ones(4)), ValueError, r"image_features has shape \(4,\)"),
    (dict(text_features=torch.ones(4, 5)), ValueError, "text_features has D = 5"),
    (dict(text_features=X.double()), TypeError, "text_features has dtype torch.float64"),
    (dict(text_features=torch.ones(4, 3, device="meta")), ValueError, "on the meta device"),
    (dict(text_features=torch.ones(5, 3)), ValueError,
     "text_features has 5 rows and image_features 4: expected the same number, or image_ids and "
     "text_ids$"),
    (dict(image_ids=torch.arange(4)), ValueError, "image_ids was given without text_ids"),
    (dict(image_ids=torch.arange(3), text_ids=torch.arange(4)), ValueError,
     r"image_ids has shape \(3,\): expected \(4,\)"),
    (dict(image_ids=torch.ones(4), text_ids=torch.arange(4)), TypeError,
     "image_ids has dtype torch.float32"),
    (dict(group="all"), TypeError, "group is 'all'"),
]  # fmt: skip
OF_RANKS = [
    (dict(backend="cuda"), ValueError, "backend is 'cuda': expected None, 'torch' or 'triton'"),
    (dict(workspace_bytes=0), ValueError, "workspace_bytes is 0: expected more than 0"),
    (dict(workspace_bytes=100), ValueError, "workspace_bytes=100 cannot hold one 64 x 64 tile"),
    (dict(dist_impl="tree"), ValueError, "dist_impl is 'tree'"),
]
OF_STATISTICS = [
    (dict(logit_scale="10"), TypeError, "logit_scale is a str: expected a number"),
    (dict(logit_bias=torch.ones(2)), ValueError, r"logit_bias has shape \(2,\)"),
]


@pytest.mark.parametrize("named, error, message", BAD + OF_RANKS, ids=lambda v: "")
def test_bad_arguments_of_ranks(named, error, message):
    named = {"image_features": X, "text_features": X, **named}
    if named.get("workspace_bytes") == 100:
        named["backend"] = "torch"
    with pytest.raises(error, match=message):
        retrieval_ranks(**named)


@pytest.mark.parametrize("named, error, message", BAD + OF_STATISTICS, ids=lambda v: "")
def test_bad_arguments_of_statistics(named, error, message):
    named = {"image_features": X, "text_features": X, "logit_scale": 10.0, **named}
    with pytest.raises(error, match=message):
        logit_statistics(**named)
