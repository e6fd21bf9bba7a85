"""The eager loss, the rounding that a dtype explains, and the check of an installation."""

from .reference import eager_siglip_loss

__all__ = ["eager_siglip_loss"]
