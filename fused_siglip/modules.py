"""open_clip's loss class over the fused loss."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor, nn

from . import _checks
from .distributed import DIST_IMPLS
from .functional import siglip_loss


class SigLipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.SigLipLoss``: the same constructor, call and values.

    Values and gradients equal open_clip's within rounding, with two differences that are the point
    of this package: memory grows neither with the square of the batch nor with the number of ranks,
    and the loss is float32 whatever the features' dtype. Dtypes, errors and what the distributed
    loss asks for are those of :func:`fused_siglip.siglip_loss`.

    Args:
        cache_labels: accepted, without effect (open_clip's class does not use it either).
        rank: this process's rank in the group.
        world_size: number of ranks that share the global batch; 1 for the local batch alone.
        dist_impl: "ring", "gather", or one of open_clip's "bidir", "shift", "reduce"; None chooses.
        chunk_size: accepted, without effect: panels are always bounded (``workspace_bytes`` of
            :func:`siglip_loss` sets the bound).
        group: the process group; None for the default group.

    Raises:
        ValueError: an unknown dist_impl, a rank outside the world; in ``forward``, a rank or
            world_size that the process group does not confirm.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        group: dist.ProcessGroup | None = None,
    ):
        super().__init__()
        _checks.check_world(rank, world_size, dist_impl, DIST_IMPLS)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size
        self.group = group

    def forward(
        self,
        image_features: Tensor,  # (B, D)
        text_features: Tensor,  # (B, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` the dict ``{"contrastive_loss": loss}``."""
        options = {}
        if self.world_size > 1:
            group = _checks.check_membership(self.group, self.rank, self.world_size)
            options = {"group": group, "dist_impl": self.dist_impl}
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, **options)
        return {"contrastive_loss": loss} if output_dict else loss
