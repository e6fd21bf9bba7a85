"""Sigmoid contrastive loss (SigLIP) with exact gradients and without the matrix of logits."""

from .loss import siglip_loss
from .modules import LearnableSigLipLoss, SigLipLoss
from .negatives import Below, Easiest, Hardest, Random
from .positives import PositiveTarget, PositiveWeight
from .scores import LogitStatistics, logit_statistics, retrieval_ranks

__version__ = "0.2.0"
__all__ = [
    "Below",
    "Easiest",
    "Hardest",
    "LearnableSigLipLoss",
    "LogitStatistics",
    "PositiveTarget",
    "PositiveWeight",
    "Random",
    "SigLipLoss",
    "logit_statistics",
    "retrieval_ranks",
    "siglip_loss",
]
