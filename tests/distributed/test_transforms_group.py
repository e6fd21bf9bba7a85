"""torch's transforms in a process group: no exchange is lost, and DTensors are named."""

import pytest
import torch
import torch.distributed as dist

from fused_siglip import siglip_loss
from support.inputs import make_inputs
from support.processes import launch, returned
from support.tolerances import error, oracle
from support.transforms import same

ROWS = 6  # of each of two ranks


def local_leaves(rank: int) -> list[torch.Tensor]:
    x, y, t, b = (v.detach() for v in make_inputs(2 * ROWS, 2 * ROWS, 8, torch.float64).tensors())
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    return [v.clone().requires_grad_() for v in (x[rows], y[rows], t, b)]


def monitored(rank: int, world_size: int, backend: str | None, how: str) -> list:
    """Gradients of a step whose loss of the global batch is used on rank 0 only."""
    leaves = local_leaves(rank)
    options = {"group": dist.group.WORLD, "dist_impl": "gather" if how == "gather" else "ring"}

    def step(*tensors):
        own = sum(t.square().sum() for t in tensors) * 0
        watched = siglip_loss(*tensors, **options)
        if how == "no_grad":
            with torch.no_grad():
                siglip_loss(*tensors, **options)
        if how == "checkpoint":
            x = torch.utils.checkpoint.checkpoint(torch.sin, tensors[0], use_reentrant=False)
            own = own + 0 * x.sum()
        return own + watched if rank == 0 else own

    step = step if backend is None else torch.compile(step, backend=backend)
    for _ in range(2):
        for leaf in leaves:
            leaf.grad = None
        step(*leaves).backward()
    return [leaf.grad for leaf in leaves]


def all_monitored(rank: int, world_size: int, cases: list[tuple[str | None, str]]) -> list[list]:
    """One group for all cases: what takes its time is loading the compiler."""
    found = []
    for case in cases:
        torch._dynamo.reset()
        found.append(monitored(rank, world_size, *case))
    return found


@pytest.fixture(scope="module")
def gradients(request) -> dict[tuple[str | None, str], list]:
    """Of the cases that are tested, by backend and how: the gradients of every rank."""
    cases = [(None, "ring")]
    for item in request.session.items:
        if getattr(item, "originalname", "") == "test_a_loss_that_one_rank_does_not_use":
            cases.append((item.callspec.params["backend"], item.callspec.params["how"]))
    ranks = returned(launch(all_monitored, 2, cases))
    return {case: [rank[k] for rank in ranks] for k, case in enumerate(cases)}


@pytest.mark.parametrize(
    "backend,how",
    [
        pytest.param("eager", "ring", marks=pytest.mark.exhaustive),
        ("aot_eager", "ring"),
        ("aot_eager", "gather"),
        ("aot_eager", "no_grad"),
        ("aot_eager", "checkpoint"),
        pytest.param("inductor", "ring", marks=pytest.mark.exhaustive),
    ],
)
def test_a_loss_that_one_rank_does_not_use(gradients, backend, how):
    eagerly = gradients[None, "ring"]
    assert eagerly[0][0].any()
    assert not eagerly[1][0].any()
    for ours, eager in zip(gradients[backend, how], eagerly, strict=True):
        for a, e in zip(ours, eager, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-13, atol=1e-16)


def first_derivatives(rank: int, world_size: int, backend: str | None) -> list[float]:
    leaves = [leaf.detach() for leaf in local_leaves(rank)]
    exact = oracle(make_inputs(2 * ROWS, 2 * ROWS, 8, torch.float64))[1:]
    rows = slice(rank * ROWS, (rank + 1) * ROWS)
    wrap = same if backend is None else lambda f: torch.compile(f, backend=backend)
    gradient = wrap(
        torch.func.grad(lambda *v: siglip_loss(*v, group=dist.group.WORLD), argnums=(0, 1, 2, 3))
    )(*leaves)
    towers = [error(gradient[k] / world_size, exact[k][rows]) for k in (0, 1)]
    for k in (2, 3):
        dist.all_reduce(gradient[k])
    return towers + [error(gradient[k] / world_size, exact[k]) for k in (2, 3)]


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_torch_func_grad_in_a_group(backend):
    for errors in returned(launch(first_derivatives, 2, backend)):
        assert max(errors) <= 1e-13


def batched(rank: int, world_size: int, backend: str | None) -> None:
    x, y, t, b = (leaf.detach() for leaf in local_leaves(rank))
    wrap = same if backend is None else lambda f: torch.compile(f, backend=backend)
    function = torch.func.vmap(lambda x: siglip_loss(x, y, t, b, group=dist.group.WORLD))
    wrap(function)(torch.stack([x, x]))


@pytest.mark.parametrize("backend", [None, "eager"])
def test_vmap_in_a_group_is_refused(backend):
    for kind, message in launch(batched, 2, backend):
        assert kind == "raised"
        assert "siglip_loss does not support torch.vmap in a process group" in message


def distributed_tensors(rank: int, world_size: int) -> dict[str, str]:
    """The messages for DTensors, eager and compiled; and the two ways that are exact."""
    from torch.distributed.tensor import Partial, Shard, distribute_tensor, init_device_mesh

    mesh = init_device_mesh("cpu", (world_size,))
    whole = make_inputs(2 * ROWS, 2 * ROWS, 8, torch.float64)
    exact = oracle(whole)
    x, y, t, _ = (leaf.detach() for leaf in local_leaves(rank))
    scale = torch.nn.Parameter(distribute_tensor(t.reshape(1), mesh, [Shard(0)]))
    features = distribute_tensor(whole.image_features.detach(), mesh, [Shard(0)]).requires_grad_()
    ids = distribute_tensor(torch.arange(2 * ROWS), mesh, [Shard(0)])
    good = {"image_features": x, "text_features": y, "logit_scale": t, "logit_bias": t - 20}
    messages = {}
    for name, value in (
        ("image_features", features),
        ("text_features", features),
        ("logit_scale", scale),
        ("logit_bias", scale),
        ("image_ids", ids),
        ("text_ids", ids),
    ):
        others = {"image_ids": ids.to_local(), "text_ids": ids.to_local()} if "ids" in name else {}
        for function in (siglip_loss, torch.compile(siglip_loss, backend="eager")):
            with pytest.raises(TypeError) as caught:
                function(**(good | others | {name: value}))
            assert str(caught.value).startswith(f"{name} is a DTensor: expected ")
        messages[name] = str(caught.value)

    loss = siglip_loss(
        features.to_local(),
        y,
        scale.full_tensor(grad_placements=[Partial("avg")]),
        -10.0,
        group=dist.group.WORLD,
    )
    loss.backward()
    assert error(features.grad.full_tensor() / world_size, exact[1]) <= 1e-13
    assert error(scale.grad.full_tensor().reshape(()), exact[3]) <= 1e-13
    return messages


def test_dtensors_are_named():
    for messages in returned(launch(distributed_tensors, 2)):
        for name, message in messages.items():
            assert ("full_tensor" if "logit" in name else "to_local()") in message


def flops(rank: int, world_size: int) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        siglip_loss(*local_leaves(rank), group=dist.group.WORLD).backward()
    return counter.get_total_flops()


def test_flop_counter_in_a_group():
    assert returned(launch(flops, 2)) == [6 * ROWS * (2 * ROWS) * 8] * 2
