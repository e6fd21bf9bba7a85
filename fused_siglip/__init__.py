"""Sigmoid contrastive loss (SigLIP) with exact gradients and without the matrix of logits."""

from .functional import siglip_loss
from .modules import SigLipLoss

__version__ = "0.1.0"
__all__ = ["SigLipLoss", "siglip_loss"]
