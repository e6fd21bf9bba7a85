"""The loss of the global batch inside DDP, FSDP2 and torch.compile."""

import functools
import itertools

import pytest
import torch
import torch.distributed as dist

from fused_siglip import siglip_loss
from support.global_batch import shard
from support.inputs import loss_and_grads, make_inputs
from support.processes import launch, launch_each, returned


class TwoTowers(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = torch.nn.Linear(12, 8), torch.nn.Linear(12, 8)
        self.scale = torch.nn.Parameter(torch.tensor([10.0]).log())
        self.bias = torch.nn.Parameter(torch.tensor([-10.0]))

    def forward(self, images, texts):
        normalize = torch.nn.functional.normalize
        return (
            normalize(self.image(images)),
            normalize(self.text(texts)),
            self.scale.exp(),
            self.bias,
        )


def train(model, rows: slice, steps: int = 5, **options) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        images, texts = (torch.randn(24, 12, generator=generator).double() for _ in range(2))
        optimizer.zero_grad()
        siglip_loss(*model(images[rows], texts[rows]), **options).backward()
        optimizer.step()


def wrap(model: torch.nn.Module, how: str) -> torch.nn.Module:
    if how == "fully_shard":
        return torch.distributed.fsdp.fully_shard(model)
    if how == "compiled":
        model = torch.compile(model, backend="aot_eager")
    return torch.nn.parallel.DistributedDataParallel(model)


def trains_as_one_rank(rank: int, world_size: int, how: str, impl: str) -> None:
    alone = TwoTowers().double()
    train(alone, slice(None))
    model = wrap(TwoTowers().double(), how)
    rows = slice(0, 12) if rank == 0 else slice(12, 24)
    train(model, rows, group=dist.group.WORLD, dist_impl=impl)
    for expected, parameter in zip(alone.parameters(), model.parameters(), strict=True):
        value = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)


HOW_AND_IMPL = list(itertools.product(["ddp", "fully_shard", "compiled"], ["ring", "gather"]))


@functools.cache
def trained() -> dict[tuple, list[tuple]]:
    return launch_each(trains_as_one_rank, 2, HOW_AND_IMPL)


@pytest.mark.parametrize("how,impl", HOW_AND_IMPL)
def test_two_ranks_train_as_one_on_the_same_data(how, impl):
    returned(trained()[how, impl])


def compiled_loss(rank: int, world_size: int) -> None:
    inputs = shard(make_inputs(12, 12, 8), rank, [6, 6], [6, 6])
    expected = loss_and_grads(siglip_loss, inputs, dist_impl="ring")

    def loss(*tensors):
        return siglip_loss(*tensors, dist_impl="ring")

    actual = loss_and_grads(torch.compile(loss, backend="aot_eager"), inputs)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_compiled_loss_of_the_global_batch():
    returned(launch(compiled_loss, 2))
