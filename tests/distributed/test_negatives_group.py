"""Negatives chosen of the global batch: the same pairs as in one process."""

import pytest
import torch
import torch.distributed as dist

from fused_siglip import Easiest, Hardest, Random, siglip_loss
from support.expected_negatives import expected_selection
from support.global_batch import global_values, shard
from support.inputs import NAMES, loss_and_grads, make_inputs, one_tile
from support.processes import launch, returned
from support.tolerances import error, oracle

CHOICES = (Random(0.4, seed=3), Hardest(0.1), Easiest(0.3))

SPLITS = {2: [[20, 20], [13, 0]], 3: [[9, 9, 9], [1, 0, 24]], 4: [[6, 6, 6, 6]]}


def every_split(rank: int, world_size: int) -> None:
    for rows in SPLITS[world_size]:
        for ids in (False, True):
            texts = rows[::-1] if ids else rows
            n = sum(rows)
            inputs = make_inputs(n, n, 12, torch.float64, ids=ids)
            with torch.no_grad():  # the longest texts are on one rank
                inputs.text_features[-1] *= 3
            for choice in (*CHOICES, Random(0.5, 2**40)):
                kept, unsure = expected_selection(inputs, choice)
                assert unsure.sum() <= len(unsure)  # the last one kept, of each image
                exact = oracle(inputs, kept=kept)
                for impl in ("ring", "gather"):
                    local = loss_and_grads(
                        siglip_loss, shard(inputs, rank, rows, texts), negatives=choice,
                        group=dist.group.WORLD, dist_impl=impl,
                    )  # fmt: skip
                    actual = global_values(local, rows, texts)
                    for name, a, x in zip(("loss", *NAMES), actual, exact, strict=True):
                        assert error(a, x) <= 1e-13, f"{choice} {impl} {rows} {name}"


@pytest.mark.parametrize("world_size", SPLITS)
def test_every_split_of_the_global_batch(world_size):
    returned(launch(every_split, world_size))


def disagreeing(rank: int, world_size: int, mine, other) -> None:
    inputs = make_inputs(4, 4, 8)
    siglip_loss(*inputs.tensors(), dist_impl="ring", negatives=other if rank else mine)


@pytest.mark.parametrize("mine,other,said", [
    (None, Hardest(0.5), "negatives: None on rank 0 and Hardest on rank 1"),
    (Hardest(0.5), Easiest(0.5), "negatives: Hardest on rank 0 and Easiest on rank 1"),
    (Random(0.5), Random(0.25), "keep of negatives: 0.5 on rank 0 and 0.25 on rank 1"),
    (Random(0.5, 1), Random(0.5, 2), "seed of negatives: 1 on rank 0 and 2 on rank 1"),
], ids=str)  # fmt: skip
def test_ranks_that_choose_differently_are_an_error_on_every_rank(mine, other, said):
    for kind, message in launch(disagreeing, 2, mine, other):
        assert kind == "raised"
        assert message.startswith(f"ValueError: ranks disagree on {said} of the group")


def small_workspace(rank: int, world_size: int) -> None:
    inputs = make_inputs(100, 100, 8)
    workspace = one_tile("torch", torch.float32)  # holds a tile only where all negatives take part
    siglip_loss(*inputs.tensors(), dist_impl="ring", workspace_bytes=workspace)
    if rank == 1:
        siglip_loss(*inputs.tensors(), dist_impl="ring", workspace_bytes=workspace,
                    negatives=Hardest(0.5))  # fmt: skip
    else:
        siglip_loss(*inputs.tensors(), dist_impl="ring", negatives=Hardest(0.5))


def test_a_workspace_that_cannot_choose_is_an_error_on_every_rank():
    messages = [message for kind, message in launch(small_workspace, 2)]
    assert "cannot hold one 64 x 64 tile" in messages[1]
    assert "bad arguments on rank 1 of the group" in messages[0]
