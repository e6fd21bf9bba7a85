"""The loss as a module: open_clip's class, and one that owns its scale and bias."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import _checks
from .distributed import DIST_IMPLS
from .functional import siglip_loss
from .negatives import Negatives


class SigLipLoss(nn.Module):
    """Drop-in for ``open_clip.loss.SigLipLoss``: the same constructor, call and values.

    Values and gradients equal open_clip's within rounding, with two differences that are the point
    of this package: memory grows neither with the square of the batch nor, by the ring, with the
    number of ranks, and the loss is float32 (float64) whatever the features' dtype. Dtypes,
    errors and what the distributed loss asks for are those of :func:`fused_siglip.siglip_loss`.

    Args:
        cache_labels: accepted, without effect (open_clip's class does not use it either).
        rank: this process's rank in the group.
        world_size: number of ranks that share the global batch; 1 for the local batch alone.
        dist_impl: "ring", "gather", or one of open_clip's "bidir", "shift", "reduce"; None chooses.
        chunk_size: accepted, without effect: panels are always bounded (``workspace_bytes`` of
            :func:`siglip_loss` sets the bound).
        group: the process group; None for the default group.

    Raises:
        TypeError: a rank, world_size or group of the wrong type.
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
        _checks.check_world(group, rank, world_size, dist_impl, DIST_IMPLS)
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


class _AtMost(torch.autograd.Function):
    """min(value, bound), whose gradient beyond the bound is kept where descent lowers the value.

    With that of clamp, 0, what is beyond the bound once would stay there.
    """

    @staticmethod
    def forward(ctx, value: Tensor, bound: float) -> Tensor:  # ()
        ctx.save_for_backward(value > bound)
        return value.clamp(max=bound)

    @staticmethod
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None]:  # ()
        (beyond,) = ctx.saved_tensors
        return torch.where(beyond, upstream.clamp(min=0), upstream), None


class LearnableSigLipLoss(nn.Module):
    """The loss with its own learnable scale and bias, for a loop that has neither.

    The parameters are those of the paper (arXiv 2303.15343, section 3.1): ``logit_scale`` holds the
    logarithm t' of the factor t = exp(t'), starting at log 10, and ``logit_bias`` b, starting at
    -10. Train them with the towers. open_clip and big_vision decay neither:
    :meth:`no_weight_decay` names them for the optimizer's groups. Under DDP put this module inside
    the wrapped model, so that the ranks keep them equal.

    Args:
        init_logit_scale: t' to start from.
        init_logit_bias: b to start from.
        max_logit_scale: upper bound of the factor t (not of t'), such as the 100 of CLIP; beyond
            it the loss uses the bound, and only a gradient that leads back reaches t'. None: no
            bound, as in the paper.
        group, dist_impl, workspace_bytes, backend: as in :func:`fused_siglip.siglip_loss`.

    Raises:
        ValueError: a start that is not finite, a bound that is not above 0.
    """

    def __init__(
        self,
        init_logit_scale: float = math.log(10),
        init_logit_bias: float = -10.0,
        *,
        max_logit_scale: float | None = None,
        group: dist.ProcessGroup | None = None,
        dist_impl: str | None = None,
        workspace_bytes: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        _checks.check_start(init_logit_scale, init_logit_bias, max_logit_scale)
        self.logit_scale = nn.Parameter(torch.tensor(float(init_logit_scale)))
        self.logit_bias = nn.Parameter(torch.tensor(float(init_logit_bias)))
        self.max_logit_scale = max_logit_scale
        self.options = {
            "group": group,
            "dist_impl": dist_impl,
            "workspace_bytes": workspace_bytes,
            "backend": backend,
        }

    def forward(
        self,
        image_features: Tensor,  # (M, D)
        text_features: Tensor,  # (N, D)
        *,
        image_ids: Tensor | None = None,  # (M,)
        text_ids: Tensor | None = None,  # (N,)
        negatives: Negatives | None = None,
    ) -> Tensor:  # ()
        """The loss of L2-normalised features; ids and negatives as in :func:`siglip_loss`."""
        return siglip_loss(
            image_features,
            text_features,
            self.factor(),
            self.logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            negatives=negatives,
            **self.options,
        )

    def factor(self) -> Tensor:  # ()
        """t = exp(t'), at most ``max_logit_scale``: what multiplies the similarities."""
        factor = self.logit_scale.exp()
        if self.max_logit_scale is None:
            return factor
        return _AtMost.apply(factor, float(self.max_logit_scale))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone (timm's convention)."""
        return {"logit_scale", "logit_bias"}
