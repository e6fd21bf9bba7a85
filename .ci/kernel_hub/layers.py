"""Layers for `kernelize`: they replace the forward of a class of the same name."""

from __future__ import annotations

from torch import Tensor, nn

from .loss import siglip_loss


class SigLipLoss(nn.Module):
    """The forward of open_clip's SigLipLoss. The class that it replaces has the group's size."""

    can_torch_compile = True

    world_size: int
    dist_impl: str | None

    def forward(
        self,
        image_features: Tensor,  # (B, D), L2-normalized
        text_features: Tensor,  # (B, D), L2-normalized
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` the dict ``{"contrastive_loss": loss}``."""
        many = self.world_size > 1
        loss = siglip_loss(
            image_features,
            text_features,
            logit_scale,
            logit_bias,
            group="world" if many else None,
            dist_impl=self.dist_impl if many else None,
        )
        return {"contrastive_loss": loss} if output_dict else loss
