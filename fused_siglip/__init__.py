"""Sigmoid contrastive loss (SigLIP) with exact gradients and without the matrix of logits."""

from .functional import siglip_loss
from .modules import LearnableSigLipLoss, SigLipLoss

__version__ = "0.1.0"
__all__ = ["LearnableSigLipLoss", "SigLipLoss", "siglip_loss"]
