"""LearnableSigLipLoss inside a transformers model, which is made on the meta device and loaded."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torchvision_on_cpu import define_schemas

define_schemas()

from transformers import PreTrainedConfig, PreTrainedModel

from fused_siglip import LearnableSigLipLoss


class Config(PreTrainedConfig):
    model_type = "two_towers"


class Towers(PreTrainedModel):
    """Of transformers' own initialiser, which knows torch's modules only."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.image, self.text = nn.Linear(12, 8), nn.Linear(10, 8)
        self.loss = LearnableSigLipLoss(1.25, -4.5)
        self.post_init()


class Initialises(Towers):
    """Of an initialiser of its own, as transformers' documentation has it."""

    def _init_weights(self, module):
        if isinstance(module, LearnableSigLipLoss):
            module.reset_parameters()
        else:
            super()._init_weights(module)


class Nested(PreTrainedModel):
    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.towers = Towers(config)
        self.post_init()

    @property
    def loss(self):
        return self.towers.loss


both = pytest.mark.parametrize("model_class", [Towers, Initialises, Nested])


def values(model) -> list[float]:
    return [model.loss.logit_scale.item(), model.loss.logit_bias.item()]


def saved(model_class, folder, missing: tuple[str, ...] = ()) -> None:
    """A checkpoint with trained scale and bias, or without them."""
    model = model_class(Config())
    assert values(model) == [1.25, -4.5]
    with torch.no_grad():
        model.loss.logit_scale.fill_(2.3025851), model.loss.logit_bias.fill_(-9.7)
    model.save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = {k: v for k, v in load_file(file).items() if not k.endswith(missing or ("-",))}
    save_file(tensors, file, metadata={"format": "pt"})


@both
@pytest.mark.parametrize(
    ("missing", "expected"),
    [
        ((), [2.3025851, -9.7]),
        (("logit_scale", "logit_bias"), [1.25, -4.5]),
        (("logit_scale",), [1.25, -9.7]),
        (("logit_bias",), [2.3025851, -4.5]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_checkpoint_lacks_starts(model_class, missing, expected, dtype, tmp_path):
    saved(model_class, tmp_path, missing)
    for _ in range(3):  # whatever memory holds
        model = model_class.from_pretrained(tmp_path, dtype=dtype)
        assert values(model) == pytest.approx(expected, rel=1e-7)
        assert model.loss.logit_scale.dtype == model.loss.logit_bias.dtype == torch.float32
    assert next(model.parameters()).dtype == dtype
    with torch.no_grad():
        model.loss.logit_scale.fill_(3.0)
    model.init_weights()  # asked for again, trained values stay unless the class resets them
    assert model_class is Initialises or values(model)[0] == 3.0


def test_made_without_a_checkpoint():
    model = Towers(Config())
    with torch.no_grad():
        model.loss.logit_scale.fill_(3.0)
    model.post_init()
    assert values(model) == [3.0, -4.5]
