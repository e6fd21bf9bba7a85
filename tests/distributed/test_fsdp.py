"""LearnableSigLipLoss inside a sharded model: FSDP1, fully_shard, meta device, checkpoints."""

import warnings

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    set_model_state_dict,
)
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)

from fused_siglip import LearnableSigLipLoss
from support.processes import launch, outcome, returned


class Model(nn.Module):
    """Towers and their loss: what DDP and FSDP wrap."""

    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(12, 8), nn.Linear(10, 8)
        self.loss = LearnableSigLipLoss(group="world", max_logit_scale=100)

    def forward(self, images, texts):
        x, y = (nn.functional.normalize(f) for f in (self.image(images), self.text(texts)))
        return self.loss(x, y)


def batch(step: int, rows: slice) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(12, d, generator=generator)[rows] for d in (12, 10)]


def train(model, rows: slice, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(*batch(step, rows)).backward()
        optimizer.step()


def first_weights() -> dict:
    torch.manual_seed(0)
    return Model().state_dict()


def make(how: str) -> nn.Module:
    with torch.device("meta" if "meta" in how else "cpu"):
        model = Model()
    if "meta" not in how:
        model.load_state_dict(first_weights())
    if "FSDP1" in how:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a newer one is there
            options = {"use_orig_params": "original" in how, "device_id": torch.device("cpu")}
            return FullyShardedDataParallel(model, **options)
    if "loss apart" in how:
        fully_shard(model.loss)
    fully_shard(model)
    if "meta" in how:
        model.to_empty(device="cpu")
    return model


def full(model: nn.Module) -> dict[str, torch.Tensor]:
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model):
            return {
                name.replace("_fsdp_wrapped_module.", ""): p.detach().clone()
                for name, p in model.named_parameters()
            }
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))


def sharded(rank: int, world_size: int, how: str, expected: dict) -> None:
    torch.manual_seed(0)
    model = make(how)
    if "meta" in how:
        values = full(model)
        for name, value in (("logit_scale", 2.302585), ("logit_bias", -10.0)):
            assert values[f"loss.{name}"].item() == pytest.approx(value)
        if "FSDP1" not in how:
            options = StateDictOptions(full_state_dict=True)
            set_model_state_dict(model, first_weights(), options=options)
    if "FSDP1" not in how or "meta" not in how:
        train(model, slice(0, 7) if rank == 0 else slice(7, 12))
        for name, value in full(model).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)


def all_sharded(rank: int, world_size: int, hows: list[str], expected: dict) -> list[tuple]:
    """One group for all of them."""
    return [outcome(sharded, rank, world_size, how, expected) for how in hows]


HOW = [
    "fully_shard",
    "fully_shard, loss apart",
    "fully_shard, meta",
    "FSDP1",
    "FSDP1, original",
    "FSDP1, meta, original",
]


@pytest.fixture(scope="module")
def trained() -> dict[tuple, list[tuple]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE", raising=False)
        alone = Model()
        alone.load_state_dict(first_weights())
        train(alone, slice(None))
    expected = {name: p.detach() for name, p in alone.named_parameters()}
    ranks = returned(launch(all_sharded, 2, HOW, expected))
    return {how: [rank[k] for rank in ranks] for k, how in enumerate(HOW)}


@pytest.mark.parametrize("how", HOW)
def test_sharded_training_is_that_of_one_process(trained, how):
    returned(trained[how])


def half_precision(rank: int, world_size: int) -> None:
    """The page's advice: shard the loss by itself, since a unit has one dtype."""
    model = Model().bfloat16()
    fully_shard(model.loss)
    fully_shard(model)
    assert model.loss.logit_scale.dtype == torch.float32
    x = [t.bfloat16() for t in batch(0, slice(0, 6))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*x).backward()
    assert model.loss.logit_scale.grad.dtype == torch.float32


def test_a_half_precision_model_around_it():
    returned(launch(half_precision, 2))


def mixed_precision(rank: int, world_size: int) -> None:
    """FSDP hands out parameters in bfloat16: that is said, and shard the loss apart to avoid it."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    x = batch(0, slice(0, 6))
    model = Model()
    fully_shard(model, mp_policy=policy)
    with pytest.warns(UserWarning, match=r"is torch.bfloat16 here.*fully_shard\(loss\)"):
        model(*x).backward()
    model = Model()
    fully_shard(model.loss)
    fully_shard(model, mp_policy=policy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(*x).backward()


def test_mixed_precision():
    returned(launch(mixed_precision, 2))
