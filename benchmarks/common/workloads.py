"""What is measured: one loss, on inputs of one size and dtype, with the gradients asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fused_siglip import PositiveTarget, PositiveWeight
from fused_siglip.negatives import KINDS

from .baselines import LOSSES, Loss, masked_loss


class Inputs(NamedTuple):
    x: Tensor  # (B, D) image features, normalised
    y: Tensor  # (B, D) text features, normalised
    t: Tensor  # () float32
    b: Tensor  # () float32


# Which of x, y, t, b require a gradient, and how many B x B x D products that takes.
MODES = {
    "full": ((True, True, True, True), 3),
    "frozen": ((False, True, True, True), 2),  # locked-image tuning: no dX
    "no_grad": ((False, False, False, False), 1),
}


def _row_weights(size: int, device: str) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    images, texts = (0.5 + torch.rand(2, size, generator=generator, device=device)).unbind()
    return {"image_weights": images, "text_weights": texts}


def _ids(size: int, device: str) -> dict[str, Tensor]:
    """Every id twice: each image has two positives."""
    ids = torch.arange(size, device=device) // 2
    return {"image_ids": ids, "text_ids": ids}


# What pairs are worth: the arguments of a batch of this size on this device.
WEIGHTS: dict[str, Callable[[int, str], dict[str, Any]]] = {
    "rows": _row_weights,
    "ids": _ids,
    "ids, PositiveWeight": lambda *at: {**_ids(*at), "positives": PositiveWeight(0, per_image=1)},
    "ids, PositiveTarget": lambda *at: {**_ids(*at), "positives": PositiveTarget(0, 0.5, 0.5)},
    "label_smoothing": lambda *_: {"label_smoothing": 0.1},
    "none": lambda *_: {"reduction": "none"},
}


@dataclass(frozen=True)
class Case:
    """One step to measure. Names only, so that it can be sent to a fresh process."""

    loss: str  # of losses.LOSSES
    batch_size: int
    dim: int
    dtype: str = "float32"
    device: str = "cpu"
    mode: str = "full"  # of MODES
    logit_scale: float = 10.0  # t: 10 at the start of training, 100 late
    negatives: str | None = None  # which are kept, such as "hardest 0.1"; None: all
    weights: str | None = None  # of WEIGHTS; None: all pairs count the same

    @property
    def products(self) -> int:
        return MODES[self.mode][1]

    def inputs(self) -> Inputs:
        return make_inputs(self.batch_size, self.dim, self.dtype, self.device, self.logit_scale)

    def step(self, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
        """A function that computes the loss and the gradients: (loss, *gradients)."""
        loss = LOSSES[self.loss].loss
        if self.negatives is not None:
            kind, keep = self.negatives.split()
            choice = KINDS[kind](float(keep))
            if self.loss == "eager":
                loss = functools.partial(masked_loss, negatives=choice)
            else:
                loss = functools.partial(loss, negatives=choice)
        if self.weights is not None:
            options = WEIGHTS[self.weights](len(inputs.x), str(inputs.x.device))
            loss = functools.partial(loss, **options)
        return step(loss, inputs, self.mode)


def step(loss: Loss, inputs: Inputs, mode: str = "full") -> Callable[[], tuple[Tensor, ...]]:
    """A function that computes ``loss`` and the gradients of its mode: (loss, *gradients)."""
    flags = MODES[mode][0]
    leaves = [v.detach().requires_grad_(f) for v, f in zip(inputs, flags, strict=True)]
    wanted = [leaf for leaf in leaves if leaf.requires_grad]

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (loss(*leaves),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        value = loss(*leaves)
        value = value if value.dim() == 0 else value.mean()  # of the losses of images
        return (value.detach(), *torch.autograd.grad(value, wanted))

    return forward_and_backward if wanted else forward


def make_inputs(
    batch_size: int, dim: int, dtype: str, device: str, t: float = 10.0, b: float = -10.0
) -> Inputs:
    """Features whose matched pairs are alike, as in training; the same on every call."""
    # drawn on the device: a large batch takes a CPU longer to draw than a GPU to step through
    generator = torch.Generator(device).manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(batch_size, dim, generator=generator, device=device)

    shared = normal()
    x, y = (F.normalize(shared + normal()).to(getattr(torch, dtype)) for _ in range(2))
    return Inputs(x, y, torch.tensor(t, device=device), torch.tensor(b, device=device))
