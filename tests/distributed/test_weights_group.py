"""What pairs count in the global batch: weights, shares, targets and losses of images."""

import functools
import itertools
import math

import pytest
import torch
import torch.distributed as dist

from fused_siglip import Below, Hardest, PositiveTarget, PositiveWeight, Random, siglip_loss
from support.global_batch import assert_global, shard
from support.inputs import loss_and_grads, make_inputs, random_weights
from support.processes import launch, launch_each, returned

# rows on each rank: equal, uneven, with empty ranks
SPLITS = {
    1: [[9]],
    2: [[8, 8], [13, 0]],
    3: [[5, 5, 5], [1, 0, 14]],
    4: [[6, 6, 6, 6], [9, 0, 2, 5]],
}
CHOICES = {
    "weights": {},
    "shares": {"positives": PositiveWeight(0.2, 0.5, 0.3)},
    "aligned": {"positives": PositiveWeight(0.0, 0.3, 0.7, aligned=1.0)},
    "targets": {"positives": PositiveTarget(0.1, 0.5, 0.4), "label_smoothing": 0.2},
    "aligned targets": {"positives": PositiveTarget(0.0, 0.0, 0.5, aligned=0.9)},
    "smoothing": {"label_smoothing": 1.0},
    "smoothing of random": {"label_smoothing": 0.1, "negatives": Random(0.5, seed=3)},
    "shares of hardest": {"positives": PositiveWeight(0.0, 1.0), "negatives": Hardest(0.3)},
    "below": {"negatives": Below(0.1), "positives": PositiveWeight(0.5, 0.5)},
    "below alone": {"negatives": Below(-0.1)},
}


def whole_batch(n: int, dtype: torch.dtype, ids: bool, weighted: bool = True):
    """Few ids, so that every image has positives on several ranks; and padding."""
    inputs = make_inputs(n, n, 12, dtype, t=5.0, b=-2.0)
    if ids:
        generator = torch.Generator().manual_seed(n)
        inputs.ids = {
            name: torch.randint(-1, 4, (n,), generator=generator)
            for name in ("image_ids", "text_ids")
        }
    if weighted:
        inputs.weights = random_weights(inputs)
    return inputs


# of which `make test` takes one for each choice, and another one for the next
FORMS = list(itertools.product(("mean", "sum", "none"), ("ring", "gather")))


def every_split(rank: int, world_size: int, turn: int) -> int:
    cases = itertools.product(SPLITS[world_size], (False, True), CHOICES.items())
    k = 0
    for k, (rows, ids, (name, options)) in enumerate(cases, start=1):
        reduction, impl = FORMS[(k + k // len(FORMS) + turn) % len(FORMS)]
        texts = rows[::-1] if ids and "aligned" not in name else rows
        n = sum(rows)
        assert_global(
            whole_batch(n, torch.float64, ids, "alone" not in name), rows, texts, 1e-12,
            torch.linspace(-2, 3, n) if reduction == "none" else None,
            dist_impl=impl, reduction=reduction, **options,
        )  # fmt: skip
    return k


@pytest.mark.parametrize("world_size", SPLITS)
@pytest.mark.parametrize(
    "turn", [0, *(pytest.param(k, marks=pytest.mark.exhaustive) for k in range(1, len(FORMS)))]
)
def test_every_split_of_the_global_batch(world_size, turn):
    cases = returned(launch(every_split, world_size, turn))
    assert cases == [2 * len(CHOICES) * len(SPLITS[world_size])] * world_size


def lower_precision(rank: int, world_size: int) -> None:
    rows = [9, 0, 7]
    for dtype, tolerance in (
        (torch.float32, 2e-5), (torch.bfloat16, 2.0**-7), (torch.float16, 2.0**-10)
    ):  # fmt: skip
        for ids in (False, True):
            inputs = whole_batch(16, dtype, ids)
            # of other sizes on every rank: float16 divides by what all ranks agree on
            inputs.weights["image_weights"] *= torch.logspace(-1, 2, 16)
            inputs.weights["text_weights"] *= torch.logspace(1, -1, 16)
            of_images = {"image_weights": inputs.weights["image_weights"]}
            for weights, impl in ((inputs.weights, "ring"), (of_images, "gather"), ({}, "ring")):
                inputs.weights = weights
                options = {"positives": PositiveWeight(0.5, 3.0), "label_smoothing": 0.1}
                options |= {"dist_impl": impl, "tolerance": tolerance}
                assert_global(inputs, rows, **options)
                upstream = torch.linspace(-300, 20, 16)
                assert_global(inputs, rows, reduction="none", upstream=upstream, **options)


def test_lower_precision():
    returned(launch(lower_precision, 3))


def in_small_panels(rank: int, world_size: int) -> None:
    inputs = make_inputs(300, 300, 16, torch.float64, ids=True)
    inputs.weights = random_weights(inputs)
    for impl in ("ring", "gather"):
        for options in (CHOICES["targets"], CHOICES["shares"]):
            for reduction in ("mean", "none"):
                assert_global(
                    inputs, [180, 120], [90, 210], 1e-12, dist_impl=impl, reduction=reduction,
                    upstream=torch.linspace(-1, 1, 300) if reduction == "none" else None,
                    workspace_bytes=1 << 18, **options,
                )  # fmt: skip


def test_panels_inside_chunks():
    returned(launch(in_small_panels, 2))


def all_ones(rank: int, world_size: int) -> None:
    rows = [20, 3, 11]
    for ids in (False, True):
        plain = whole_batch(34, torch.float32, ids, False)
        for impl in ("ring", "gather"):
            for reduction in ("mean", "none"):
                values = []
                for of_rank in (
                    {},
                    {"image_weights": 34, "text_weights": 34},
                    {"image_weights": 34},
                ):
                    plain.weights = {k: torch.ones(m) for k, m in of_rank.items()}
                    local = shard(plain, rank, rows, rows)
                    values.append(
                        loss_and_grads(siglip_loss, local, dist_impl=impl, reduction=reduction)
                    )
                for other in values[1:]:
                    assert all(torch.equal(a, b) for a, b in zip(values[0], other, strict=True))


def test_weights_of_1_change_no_bit():
    returned(launch(all_ones, 3))


def ones_on_some_ranks(rank: int, world_size: int) -> None:
    """No rank may take the short way where another's weights are not 1."""
    inputs = whole_batch(15, torch.float64, True)
    for weights in inputs.weights.values():
        weights[5:] = 1.0
    for impl in ("ring", "gather"):
        for reduction in ("mean", "none"):
            upstream = torch.linspace(-2, 3, 15) if reduction == "none" else None
            assert_global(
                inputs, [5] * 3, tolerance=1e-12, dist_impl=impl, reduction=reduction,
                upstream=upstream,
            )  # fmt: skip


def test_weights_of_1_on_some_ranks():
    returned(launch(ones_on_some_ranks, 3))


def frozen(rank: int, world_size: int) -> None:
    """A rank that needs no gradient of its texts still adds to those of the others."""
    whole = whole_batch(15, torch.float64, True)
    full = loss_and_grads(siglip_loss, whole, torch.linspace(-2, 3, 15), reduction="none")
    for impl in ("ring", "gather"):
        local = shard(whole, rank, [5] * 3, [5] * 3)
        local.text_features.requires_grad_(rank == 1)
        values = loss_and_grads(
            siglip_loss, local, torch.linspace(-2, 3, 15).split(5)[rank], reduction="none",
            dist_impl=impl,
        )  # fmt: skip
        torch.testing.assert_close(values[0], full[0].split(5)[rank])
        torch.testing.assert_close(values[1], full[1].split(5)[rank])
        if rank == 1:
            torch.testing.assert_close(values[2], full[2].split(5)[rank])


def test_part_of_the_ranks_frozen():
    returned(launch(frozen, 3))


# --- failures ---


def bad_call(rank: int, world_size: int, what: str, reduction: str) -> None:
    inputs = make_inputs(4, 4, 8)
    options = {"image_weights": torch.ones(4), "text_weights": torch.ones(4)}
    if rank == 1:
        if what.endswith("missing"):
            del options[what.split()[0]]
        options |= {
            "negative": {"image_weights": torch.tensor([1.0, 1.0, -1.0, 1.0])},
            "NaN": {"text_weights": torch.tensor([1.0, math.nan, 1.0, 1.0])},
            "shape": {"text_weights": torch.ones(3)},
            "smoothing": {"label_smoothing": 0.1},
            "positives": {"positives": PositiveWeight(0.5)},
            "kind": {"positives": PositiveTarget(0.5)},
            "per_image": {"positives": PositiveWeight(0.5, 0.25)},
            "per_text": {"positives": PositiveWeight(0.5, 0.0, 0.25)},
            "aligned": {"positives": PositiveWeight(0.5, 0.0, aligned=0.25)},
            "reduction": {"reduction": "sum"},
        }.get(what, {})
    elif what in ("kind", "per_image", "per_text", "aligned"):
        options["positives"] = PositiveWeight(0.5)
    siglip_loss(*inputs.tensors(), dist_impl="ring", **({"reduction": reduction} | options))


DISAGREEMENTS = {
    "image_weights missing": "image_weights: given on rank 0 and missing on rank 1",
    "text_weights missing": "text_weights: given on rank 0 and missing on rank 1",
    "smoothing": "label_smoothing: 0.0 on rank 0 and 0.1 on rank 1",
    "positives": "positives: None on rank 0 and PositiveWeight on rank 1",
    "kind": "positives: PositiveWeight on rank 0 and PositiveTarget on rank 1",
    "per_image": "per_image of positives: 0.0 on rank 0 and 0.25 on rank 1",
    "per_text": "per_text of positives: 0.0 on rank 0 and 0.25 on rank 1",
    "aligned": "aligned of positives: None on rank 0 and 0.25 on rank 1",
    "reduction": "reduction: {reduction} on rank 0 and sum on rank 1",
}
BAD = {
    "negative": "image_weights has -1.0 in row 2",
    "NaN": "text_weights has nan in row 1",
    "shape": "text_weights has shape (3,)",
}
both = pytest.mark.parametrize("reduction", ["mean", "none"])


@functools.cache
def refused() -> dict[tuple, list[tuple]]:
    cases = [(what, r) for what in (*DISAGREEMENTS, *BAD) for r in ("mean", "none")]
    return launch_each(bad_call, 3, cases)


@both
@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_disagreement_is_an_error_on_every_rank(what, reduction):
    expected = DISAGREEMENTS[what].format(reduction=reduction)
    for kind, message in refused()[(what, reduction)]:
        assert kind == "raised"
        assert message.startswith(f"ValueError: ranks disagree on {expected} of the group")


@both
@pytest.mark.parametrize("what", BAD)
def test_bad_weights_on_one_rank_are_an_error_on_every_rank(what, reduction):
    results = refused()[(what, reduction)]
    assert [kind for kind, _ in results] == ["raised"] * 3
    messages = [message for _, message in results]
    assert BAD[what] in messages[1]
    for message in (messages[0], messages[2]):
        assert "bad arguments on rank 1 of the group" in message


def second_derivatives(rank: int, world_size: int) -> None:
    inputs = make_inputs(4, 4, 8)
    losses = siglip_loss(*inputs.tensors(), reduction="none", dist_impl="ring")
    (grad,) = torch.autograd.grad(losses.sum(), inputs.image_features, create_graph=True)
    dist.barrier()
    grad.square().sum().backward()


def test_second_derivatives_are_refused():
    for kind, message in launch(second_derivatives, 2):
        assert kind == "raised"
        assert "does not support double backward" in message
