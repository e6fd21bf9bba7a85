"""Ranks and statistics of the global batch: those that one process gets for it."""

import pytest
import torch

from fused_siglip import logit_statistics, retrieval_ranks, siglip_loss
from support.expected_scores import both_ranks, statistics
from support.global_batch import IMPLS, shard
from support.inputs import Inputs, make_inputs
from support.processes import launch, launch_each, returned

SPLITS = {
    1: [[7]],
    2: [[20, 20], [70, 0], [0, 0], [9, 66]],
    3: [[9, 9, 9], [1, 0, 80], [65, 3, 64]],
}
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-12}  # of logits of up to 100


def global_batch(m: int, n: int, dtype, ids: bool, d: int = 7) -> Inputs:
    """Copies of a few rows, so that there are ties, in an order that scatters equal ids."""
    generator = torch.Generator().manual_seed(m)
    few = [torch.randn(9, d, generator=generator).to(dtype) for _ in range(2)]
    rows = [torch.randint(9, (k,), generator=generator) for k in (m, n)]
    inputs = Inputs(few[0][rows[0]], few[1][rows[1]], torch.tensor(10.0), torch.tensor(-5.0), {})
    if ids:
        inputs.ids = {
            name: torch.randint(-1, 12, (k,), generator=generator) * 2**33
            for name, k in (("image_ids", m), ("text_ids", n))
        }
    inputs.similarities = (few[0].double() @ few[1].double().T)[rows[0]][:, rows[1]]
    gaps = inputs.similarities.unique().diff()
    assert (gaps > 2e-5).all(), "rounding decides"
    return inputs


def every_split(rank: int, world_size: int) -> None:
    for rows in SPLITS[world_size]:
        for ids in (False, True):
            texts = rows[::-1] if ids else rows
            mine = slice(sum(rows[:rank]), sum(rows[: rank + 1]))
            my_texts = slice(sum(texts[:rank]), sum(texts[: rank + 1]))
            for dtype in (torch.float32, torch.float64, torch.bfloat16):
                whole = global_batch(sum(rows), sum(texts), dtype, ids)
                local = shard(whole, rank, rows, texts)
                expected = both_ranks(whole, whole.similarities)
                for impl in IMPLS:
                    for workspace in (None, 100_000):
                        found = retrieval_ranks(
                            local.image_features, local.text_features, **local.ids, group="world",
                            dist_impl=impl, workspace_bytes=workspace,
                        )  # fmt: skip
                        assert torch.equal(found[0], expected[0][mine]), (rows, ids, impl)
                        assert torch.equal(found[1], expected[1][my_texts]), (rows, ids, impl)
                check_statistics(whole, local)


def check_statistics(whole: Inputs, local: Inputs) -> None:
    actual = torch.stack(list(logit_statistics(*local.tensors(), **local.ids, group="world")))
    expected = statistics(whole)
    dtype = torch.promote_types(whole.image_features.dtype, torch.float32)
    assert actual.dtype == dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    error = (actual.double() - expected).abs().nan_to_num(0).max()
    assert error <= TOLERANCE[dtype], error


@pytest.mark.parametrize("world_size", SPLITS)
def test_every_split_of_the_global_batch(world_size):
    returned(launch(every_split, world_size))


def alike(rank: int, world_size: int, dtype: torch.dtype, dim: int, workspaces: tuple) -> tuple:
    """Every rank's panels have the same shape: equal pairs have equal bits on all of them."""
    rows = [3, 200, 65][rank]
    row = torch.randn(1, dim, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x, y = row.repeat(rows, 1), row.flip(1).repeat(rows, 1)
    ids = torch.arange(rows) + 1000 * rank
    workspace = workspaces[rank]
    found = retrieval_ranks(x, y, group="world", workspace_bytes=workspace)
    by_id = retrieval_ranks(
        x, y, image_ids=ids, text_ids=ids, group="world", dist_impl="ring",
        workspace_bytes=workspace,
    )  # fmt: skip
    return tuple(rank.unique().tolist() for rank in (*found, *by_id))


def test_features_that_are_all_alike_have_the_worst_rank():
    """On a CPU torch's products have other bits in panels of 192 x 192 than in those of a tile."""
    shapes = (torch.float32, 1000), (torch.float64, 500)
    for workspaces in ((None,) * 3, (None, 10**7, 200_000)):
        cases = [(*shape, workspaces) for shape in shapes]
        for found in launch_each(alike, 3, cases).values():
            assert returned(found) == [([268],) * 4] * 3


def nan_on_one_rank(rank: int, world_size: int, impl: str) -> tuple:
    x, y = torch.eye(4, 8), torch.eye(4, 8)
    if rank == 1:
        x[2] = torch.nan
    # text 0 of rank 0 has two images: one on each rank, the other's features are NaN
    ids = torch.arange(4) + 10 * rank
    image_ids = torch.where(torch.arange(4) == 2, 0, ids) if rank == 1 else ids
    found = retrieval_ranks(x, y, image_ids=image_ids, text_ids=ids, group="world", dist_impl=impl)
    return tuple(rank.tolist() for rank in found)


@pytest.mark.parametrize("impl", ["ring", "gather"])
def test_a_nan_on_another_rank_counts_against(impl):
    (images_0, texts_0), (images_1, texts_1) = returned(launch(nan_on_one_rank, 2, impl))
    # the NaN is text 0's best positive, among 6 other images; and a negative of all other texts.
    # Every other row of the identity has its twin on the other rank.
    assert texts_0 == [7, 3, 2, 3] and images_0 == [2, 2, 2, 2]
    assert texts_1[2] == 0 and images_1[2] == 8


DISAGREEING = {
    "function": "ranks disagree on the function: retrieval_ranks on rank 0 and siglip_loss on",
    "dtype": "ranks disagree on dtype: torch.float32 on rank 0 and torch.float64 on rank 1",
    "ids": "ranks disagree on ids: missing on rank 0 and given on rank 1",
    "dim": "ranks disagree on D: 8 on rank 0 and 7 on rank 1",
}


def disagreeing(rank: int, world_size: int, about: str) -> None:
    x, ids = torch.ones(4, 8), {}
    if rank == 1:
        if about == "function":
            siglip_loss(x, x, 10.0, group="world")
            return
        x = x.double() if about == "dtype" else x[:, 1:] if about == "dim" else x
        if about == "ids":
            ids = dict.fromkeys(("image_ids", "text_ids"), torch.arange(4))
    retrieval_ranks(x, x, **ids, group="world")


def test_ranks_that_disagree_are_an_error_on_every_rank():
    for (about,), ranks in launch_each(disagreeing, 2, [(about,) for about in DISAGREEING]).items():
        for kind, message in ranks:
            assert kind == "raised" and message.startswith(f"ValueError: {DISAGREEING[about]} ")


def refused(rank: int, world_size: int, function: str) -> None:
    x = torch.ones(4, 8)
    bad = x[:3] if rank == 1 else x
    if function == "logit_statistics":
        logit_statistics(x, bad, 10.0, group="world")
    elif function == "workspace":
        workspace = 100 if rank == 1 else None
        retrieval_ranks(x, x, group="world", workspace_bytes=workspace, backend="torch")
    else:
        retrieval_ranks(x, bad, group="world")


def test_bad_arguments_of_one_rank_are_an_error_on_every_rank():
    functions = ["retrieval_ranks", "logit_statistics", "workspace"]
    for (name,), ranks in launch_each(refused, 2, [(name,) for name in functions]).items():
        (_, first), (_, second) = ranks
        expected = "workspace_bytes=100" if name == "workspace" else "text_features has 3 rows"
        assert expected in second
        called = "retrieval_ranks" if name == "workspace" else name
        assert f"{called} was called with bad arguments on rank 1 of the group" in first


def compiled(rank: int, world_size: int) -> None:
    inputs = make_inputs(12, 12, 8)
    step = torch.compile(retrieval_ranks, backend="eager", fullgraph=True)
    x, y = inputs.image_features, inputs.text_features
    found, expected = step(x, y, group="world"), retrieval_ranks(x, y, group="world")
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_compiled():
    returned(launch(compiled, 2))
