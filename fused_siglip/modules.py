"""open_clip's loss class over the fused loss."""

from __future__ import annotations

from torch import Tensor, nn

from .functional import siglip_loss

DIST_IMPLS = ("bidir", "shift", "reduce", "gather")


class SigLipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.SigLipLoss``: the same constructor, call and values.

    Values and gradients equal open_clip's within rounding, with two differences that are the point
    of this package: memory does not grow with the square of the batch, and the loss is float32
    whatever the features' dtype. See :func:`fused_siglip.siglip_loss` for dtypes and errors.

    Args:
        cache_labels: accepted, without effect (open_clip's class does not use it either).
        rank: this process among ``world_size``.
        world_size: number of processes that share the batch. Only 1 in this release.
        dist_impl: one of open_clip's names, "bidir", "shift", "reduce", "gather", or None.
        chunk_size: accepted, without effect: panels are always bounded (``workspace_bytes`` of
            :func:`siglip_loss` sets the bound).

    Raises:
        ValueError: an unknown dist_impl, or a rank outside the world.
        NotImplementedError: world_size above 1.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
    ):
        super().__init__()
        if dist_impl is not None and dist_impl not in DIST_IMPLS:
            raise ValueError(f"dist_impl is {dist_impl!r}: expected None or one of {DIST_IMPLS}")
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}: expected 0 to {world_size - 1} (world_size - 1)")
        if world_size > 1:
            raise NotImplementedError(
                f"world_size is {world_size}: this release computes the loss of one process's batch"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size

    def forward(
        self,
        image_features: Tensor,  # (B, D)
        text_features: Tensor,  # (B, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` the dict ``{"contrastive_loss": loss}``."""
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias)
        return {"contrastive_loss": loss} if output_dict else loss
