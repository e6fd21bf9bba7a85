"""Short trainings with the losses of sentence-transformers, and what they end in."""

import functools
import tempfile
from importlib.metadata import version

import pytest
import torch
from packaging.version import Version
from sentence_models import (
    EagerSigLipLoss,
    tiny_model,
    trainer,
)
from torch import nn

from fused_siglip.integrations.sentence_transformers import (
    CachedSigLipLoss,
    SigLipLoss,
)

torch.set_num_threads(1)


KINDS = {"plain": SigLipLoss, "cached": lambda m, **o: CachedSigLipLoss(m, mini_batch_size=5, **o)}


both = pytest.mark.parametrize("kind", list(KINDS))


# of float64; before 6.2 the library multiplies cached gradients in float32
ROUNDING = 1e-12 if Version(version("sentence-transformers")) >= Version("6.2") else 1e-5


def weights(model) -> torch.Tensor:
    """The encoder's weights, one vector."""
    named = (p for name, p in model.named_parameters() if name != "logit_scale_and_bias")
    return nn.utils.parameters_to_vector(named).detach().clone()


def scale_and_bias(loss) -> torch.Tensor:
    if isinstance(loss, EagerSigLipLoss):
        return torch.stack([loss.logit_scale, loss.logit_bias]).detach()
    model = getattr(loss.model, "module", loss.model)  # out of DDP
    return model.logit_scale_and_bias.detach().clone()


def gradients(loss, columns, scaling: float = 1.0) -> list[torch.Tensor]:
    """The loss, and the gradients of the encoder and of [t', b], of one step."""
    loss.zero_grad()
    value = loss(columns, None)
    (value * scaling).backward()
    named = dict(loss.named_parameters())
    if isinstance(loss, EagerSigLipLoss):
        own = torch.stack([named.pop("logit_scale").grad, named.pop("logit_bias").grad])
    else:
        own = named.pop("model.logit_scale_and_bias").grad.clone()
    encoder = torch.cat([p.grad.flatten() for p in named.values() if p.grad is not None])
    return [value.detach(), encoder, own]


def train(make_loss, dtype=torch.float32, **options):
    """Logged losses, and of the encoder and of [t', b]: (start, end)."""
    model = tiny_model().to(dtype)
    loss = make_loss(model).to(dtype)
    start = weights(model), scale_and_bias(loss)
    with tempfile.TemporaryDirectory() as folder:
        run = trainer(folder, model, loss, **options)
        run.train()
    logged = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    ends = zip(start, (weights(model), scale_and_bias(loss)), strict=True)
    return torch.tensor(logged, dtype=torch.float64), *ends


@functools.cache
def train_eager(dtype, *options):
    return train(EagerSigLipLoss, dtype, **dict(options))
