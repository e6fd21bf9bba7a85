"""The loss of the global batch in real processes, against the float64 oracle of the whole batch."""

import functools
import os
import random

import pytest
import torch
import torch.distributed as dist

from fused_siglip import SigLipLoss, siglip_loss
from fused_siglip.testing import eager_siglip_loss
from support.global_batch import IMPLS, assert_global, global_values, shard
from support.inputs import loss_and_grads, make_inputs
from support.processes import launch, launch_each, returned
from support.tolerances import error, oracle

# rows on each rank: equal, uneven, with empty ranks
SPLITS = {
    1: [[7]],
    2: [[8, 8], [13, 3], [0, 5]],
    3: [[5, 5, 5], [1, 0, 9]],
    4: [[6, 6, 6, 6], [9, 0, 2, 5]],
    8: [[4] * 8, [3, 0, 7, 1, 0, 0, 2, 5]],
}
ALL = (True,) * 4


def every_split(rank: int, world_size: int) -> int:
    cases = 0
    for rows in SPLITS[world_size]:
        for impl in IMPLS:
            options = {"dist_impl": impl}
            n = sum(rows)
            assert_global(make_inputs(n, n, 12), rows, **options)
            double = make_inputs(n, n, 12, torch.float64)
            assert_global(double, rows, tolerance=1e-13, **options)
            low = make_inputs(n, n, 12, torch.bfloat16)
            assert_global(low, rows, tolerance=2.0**-8, **options)
            assert_global(make_inputs(n, n, 12), rows, negative_only=True, **options)
            assert_global(make_inputs(n, n, 12), rows, reduction="sum", **options)
            # ids repeat across ranks, pad, and the towers' rows are split differently
            texts = rows[::-1]
            assert_global(make_inputs(n, n, 12, ids=True), rows, texts, **options)
            for requires_grad in (
                (False, True, True, True),
                (True, False, True, True),
                (False, False, True, False),
                (False, False, False, False),
            ):
                inputs = make_inputs(n, n, 12, requires_grad=requires_grad)
                assert_global(inputs, rows, **options)
            cases += 10
    return cases


@pytest.mark.parametrize("world_size", SPLITS)
def test_every_split_of_the_global_batch(world_size):
    cases = returned(launch(every_split, world_size))
    assert cases == [10 * len(IMPLS) * len(SPLITS[world_size])] * world_size


def many_panels(rank: int, world_size: int) -> None:
    for impl in IMPLS:
        assert_global(
            make_inputs(500, 500, 24), [300, 200], dist_impl=impl, workspace_bytes=1 << 17
        )


def test_panels_inside_chunks():
    returned(launch(many_panels, 2))


def part_of_the_ranks_frozen(rank: int, world_size: int) -> None:
    """A rank without gradients still contributes to those of the others."""
    rows = [4, 6, 5]
    inputs = make_inputs(15, 15, 12)
    exact = oracle(inputs)
    for impl in IMPLS:
        options = {"group": dist.group.WORLD, "dist_impl": impl}
        local = shard(inputs, rank, rows, rows)
        local.text_features.requires_grad_(rank == 1)
        values = loss_and_grads(siglip_loss, local, **options)
        if rank == 1:
            assert error(values[2] / 3, exact[2][4:10]) <= 4e-5
        else:
            assert values[2] is None
        with torch.no_grad() if rank == 2 else torch.enable_grad():
            loss = siglip_loss(*shard(inputs, rank, rows, rows).tensors(), **options)
        assert loss.requires_grad == (rank != 2)


def test_part_of_the_ranks_frozen():
    returned(launch(part_of_the_ranks_frozen, 3))


def sub_groups(rank: int, world_size: int) -> None:
    members = [[0, 2], [1, 3]]
    groups = [dist.new_group(m) for m in members]
    mine = rank % 2
    inputs = make_inputs(10, 10, 8, seed=mine)
    exact = oracle(inputs)
    for impl in IMPLS:
        local = shard(inputs, members[mine].index(rank), [6, 4], [6, 4])
        # several losses in one step, one of them local
        loss = siglip_loss(*local.tensors(), group=groups[mine], dist_impl=impl)
        again = siglip_loss(*local.tensors(), group=groups[mine], dist_impl=impl)
        alone = siglip_loss(*local.tensors())
        (loss + again + 0 * alone).backward()
        rows = slice(0, 6) if rank < 2 else slice(6, 10)
        assert error(local.text_features.grad / 4, exact[2][rows]) <= 4e-5


def test_sub_groups_and_several_losses_in_one_step():
    returned(launch(sub_groups, 4))


def open_clip_names(rank: int, world_size: int) -> None:
    inputs = make_inputs(12, 12, 8)
    local = shard(inputs, rank, [4, 4, 4], [4, 4, 4])
    expected = loss_and_grads(siglip_loss, local, dist_impl="ring")
    for impl in ("bidir", "shift", "reduce", "gather", "ring", None):
        module = SigLipLoss(rank=rank, world_size=world_size, dist_impl=impl)
        values = loss_and_grads(
            lambda *a, m=module: m(*a, output_dict=True)["contrastive_loss"], local
        )
        for v, e in zip(values, expected, strict=True):
            torch.testing.assert_close(v, e)
    with pytest.raises(ValueError, match="as in the process group"):
        SigLipLoss(rank=rank, world_size=2 if rank < 2 else 4)(*local.tensors())


def test_open_clips_names_and_class():
    returned(launch(open_clip_names, 3))


def same_bits(rank: int, world_size: int) -> None:
    inputs = shard(make_inputs(90, 90, 16), rank, [30] * 3, [30] * 3)
    for impl in ("ring", "gather"):
        first = loss_and_grads(siglip_loss, inputs, dist_impl=impl)
        again = loss_and_grads(siglip_loss, inputs, dist_impl=impl)
        assert all(torch.equal(f, a) for f, a in zip(first, again, strict=True))


def test_same_inputs_same_bits():
    returned(launch(same_bits, 3))


# --- failures ---


def disagreeing(rank: int, world_size: int, what: str) -> None:
    d = 5 if (what, rank) == ("D", 1) else 8
    dtype = torch.bfloat16 if (what, rank) == ("dtype", 1) else torch.float32
    inputs = make_inputs(4, 4, d, dtype)
    options = {"dist_impl": "gather" if (what, rank) == ("dist_impl", 1) else "ring"}
    if (what.split()[0], rank) == ("negative_only", 1):
        options["negative_only"] = True
    if (what, rank) == ("reduction", 1):
        options["reduction"] = "sum"
    if (what, rank) == ("ids", 1) or what.endswith("with ids"):
        options |= {"image_ids": torch.arange(4), "text_ids": torch.arange(4)}
    if (what, rank) == ("workspace", 1):
        options["workspace_bytes"] = 1000
    if (what, rank) == ("bad arguments", 1):
        inputs.text_features = inputs.text_features[:, :3]
    siglip_loss(*inputs.tensors(), **options)


DISAGREEMENTS = {
    "D": ("8", "5"),
    "dtype": ("torch.float32", "torch.bfloat16"),
    "dist_impl": ("ring", "gather"),
    "negative_only": ("False", "True"),
    "negative_only with ids": ("False", "True"),
    "reduction": ("mean", "sum"),
    "ids": ("missing", "given"),
}


@functools.cache
def refused() -> dict[tuple, list[tuple]]:
    return launch_each(disagreeing, 3, [(what,) for what in (*DISAGREEMENTS, "bad arguments")])


@pytest.mark.parametrize("what", DISAGREEMENTS)
def test_disagreement_is_an_error_on_every_rank(what):
    mine, other = DISAGREEMENTS[what]
    name = what.split()[0]
    for kind, message in refused()[(what,)]:
        assert kind == "raised"
        assert message.startswith(
            f"ValueError: ranks disagree on {name}: {mine} on rank 0 and {other} on rank 1 of the"
        )


def test_bad_arguments_on_one_rank_are_an_error_on_every_rank():
    results = refused()[("bad arguments",)]
    assert [kind for kind, _ in results] == ["raised"] * 3
    messages = [message for _, message in results]
    assert "text_features has D = 3 and image_features D = 8" in messages[1]
    for message in (messages[0], messages[2]):
        assert "bad arguments on rank 1 of the group" in message


def test_a_workspace_too_small_on_one_rank_is_an_error_on_every_rank():
    messages = [message for kind, message in launch(disagreeing, 3, "workspace")]
    assert "workspace_bytes=1000 cannot hold one 64 x 64 tile" in messages[1]
    for message in (messages[0], messages[2]):
        assert "bad arguments on rank 1 of the group" in message


def one_dies(rank: int, world_size: int, impl: str, moment: int) -> None:
    from fused_siglip import compute

    calls = iter(range(100))

    def sweep_or_die(*args, **kwargs):
        if rank == 1 and next(calls) == moment:
            os._exit(7)
        return right(*args, **kwargs)

    right, compute.sweep = compute.sweep, sweep_or_die
    inputs = shard(make_inputs(16, 16, 8), rank, [4] * 4, [4] * 4)
    for _ in range(4):
        siglip_loss(*inputs.tensors(), dist_impl=impl).backward()


@pytest.mark.parametrize(
    "trials", [slice(0, 2), pytest.param(slice(2, 10), marks=pytest.mark.exhaustive)], ids=str
)
@pytest.mark.parametrize("impl", ["ring", "gather"])
def test_a_rank_that_dies_in_mid_step_is_an_error_on_every_other(impl, trials):
    """20 trials in all, at moments drawn from all steps of the exchange."""
    draw = random.Random(0)
    # never in the last of the four losses: those who have all of it may well return
    moments = [draw.randrange(3 if impl == "gather" else 12) for _ in range(10)]
    for moment in moments[trials]:
        results = launch(one_dies, 4, impl, moment)
        assert results[1] == ("died", 7)
        for rank in (0, 2, 3):
            kind, message = results[rank]
            assert kind == "raised", results
            assert "lost contact in the" in message
            assert "another rank failed" in message


def eager_would_differ(rank: int, world_size: int) -> None:
    """The test itself can fail: the local loss is not the loss of the global batch."""
    inputs = make_inputs(8, 8, 8)
    local = loss_and_grads(eager_siglip_loss, shard(inputs, rank, [4, 4], [4, 4]))
    actual = global_values(local, [4, 4], [4, 4])
    assert error(actual[2], oracle(inputs)[2]) > 1e-3


def test_the_local_loss_is_another():
    returned(launch(eager_would_differ, 2))
