"""Sigmoid contrastive loss (SigLIP) with exact gradients and without the matrix of logits."""

from .loss import siglip_loss
from .modules import LearnableSigLipLoss, SigLipLoss
from .negatives import Easiest, Hardest, Random

__version__ = "0.2.0"
__all__ = ["Easiest", "Hardest", "LearnableSigLipLoss", "Random", "SigLipLoss", "siglip_loss"]
