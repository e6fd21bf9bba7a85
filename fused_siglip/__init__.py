"""Sigmoid contrastive loss (SigLIP) with exact gradients and without the matrix of logits."""

from .loss import siglip_loss
from .modules import LearnableSigLipLoss, SigLipLoss
from .negatives import Below, Easiest, Hardest, Random
from .positives import PositiveTarget, PositiveWeight

__version__ = "0.1.0"
__all__ = [
    "Below",
    "Easiest",
    "Hardest",
    "LearnableSigLipLoss",
    "PositiveTarget",
    "PositiveWeight",
    "Random",
    "SigLipLoss",
    "siglip_loss",
]
