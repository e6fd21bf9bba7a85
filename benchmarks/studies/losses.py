"""The two losses that the studies compare, called alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fused_siglip import LearnableSigLipLoss


class SoftmaxLoss(nn.Module):
    """CLIP's symmetric InfoNCE with a learned temperature, eager.

    Start of the temperature and bound of the factor are CLIP's (arXiv 2103.00020, section 2.5):
    1 / 0.07, at most 100.
    """

    def __init__(self, init_logit_scale: float = math.log(1 / 0.07), max_logit_scale: float = 100):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.max_logit_scale = max_logit_scale

    def forward(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """(B, D), (B, D) L2-normalised -> (): mean of image to text and text to image."""
        logits = self.factor() * image_features @ text_features.T  # (B, B)
        labels = torch.arange(len(logits), device=logits.device)
        return (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2

    def factor(self) -> Tensor:  # ()
        return self.logit_scale.exp().clamp(max=self.max_logit_scale)


LOSSES = {"sigmoid": LearnableSigLipLoss, "softmax": SoftmaxLoss}
