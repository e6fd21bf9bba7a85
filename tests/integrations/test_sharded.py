"""Sharded training on CPUs: accelerate's FSDP2 plugin and Lightning's ModelParallelStrategy."""

import os

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torchvision_on_cpu import define_schemas

from support.processes import launch, returned

define_schemas()
import lightning as L
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DistributedType
from lightning.pytorch.strategies import ModelParallelStrategy

from fused_siglip import LearnableSigLipLoss

STEPS = 4
LEARNING_RATE = 0.05


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(12, 8), nn.Linear(10, 8)
        self.loss = LearnableSigLipLoss(group="world")

    def forward(self, images, texts):
        x, y = (nn.functional.normalize(f) for f in (self.image(images), self.text(texts)))
        return self.loss(x, y)


def make() -> Model:
    torch.manual_seed(0)
    return Model()


def batch(step: int, rows: slice) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(12, d, generator=generator)[rows] for d in (12, 10)]


def rows_of(rank: int) -> slice:
    return slice(0, 7) if rank == 0 else slice(7, 12)


def parameters(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
        for name, p in model.named_parameters()
    }


def with_accelerate(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap")
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    # accelerate takes the plugin for GPUs only, and DDP on CPUs; the plugin itself runs on both
    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = plugin
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    model, optimizer = accelerator.prepare(model, optimizer)
    assert hasattr(model.loss.logit_scale, "full_tensor"), "sharded"
    for step in range(STEPS):
        optimizer.zero_grad()
        accelerator.backward(model(*batch(step, rows_of(rank))))
        optimizer.step()
    return parameters(model)


class Lit(L.LightningModule):
    def configure_model(self):
        if not hasattr(self, "model"):
            self.model = make()
            fully_shard(self.model, mesh=self.device_mesh["data_parallel"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    def training_step(self, step, _):
        return self.model(*batch(int(step), rows_of(self.global_rank)))


def with_lightning(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    os.environ["LOCAL_RANK"] = str(rank)  # as torchrun does: Lightning starts no processes then
    trainer = L.Trainer(
        accelerator="cpu",
        devices=world_size,
        strategy=ModelParallelStrategy(
            data_parallel_size=world_size, tensor_parallel_size=1, process_group_backend="gloo"
        ),
        max_epochs=1,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
    )
    model = Lit()
    trainer.fit(model, torch.utils.data.DataLoader(range(STEPS), batch_size=None))
    return {k.removeprefix("model."): v for k, v in parameters(model).items()}


@pytest.mark.parametrize("run", [with_accelerate, with_lightning])
def test_two_ranks_are_one_process_with_the_whole_batch(run, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    alone = make()
    optimizer = torch.optim.SGD(alone.parameters(), lr=LEARNING_RATE)
    for step in range(STEPS):
        optimizer.zero_grad()
        alone(*batch(step, slice(None))).backward()
        optimizer.step()
    expected = parameters(alone)
    for actual in returned(launch(run, 2)):
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6)
