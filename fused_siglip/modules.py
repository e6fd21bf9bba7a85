"""The loss as a module: open_clip's class, and one that owns its scale and bias."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from . import scalars, validation
from .distributed.agreement import DIST_IMPLS
from .distributed.groups import OMITTED, GroupRef
from .loss import siglip_loss
from .negatives import Negatives
from .positives import Positives


class _WithGroup(nn.Module):
    """A module that holds a process group, or the name of one."""

    _group: GroupRef

    @property
    def group(self) -> dist.ProcessGroup | str | None:
        """The group as it was given; assign another to change it."""
        return self._group.group

    @group.setter
    def group(self, group: dist.ProcessGroup | str | None) -> None:
        self._group = GroupRef(group)


class SigLipLoss(_WithGroup):
    """Drop-in for ``open_clip.loss.SigLipLoss``: the same constructor, call and values.

    Values and gradients equal open_clip's within rounding, with two differences that are the point
    of this package: memory grows neither with the square of the batch nor, by the ring, with the
    number of ranks, and the loss is float32 (float64) whatever the features' dtype. Dtypes,
    errors and what the distributed loss asks for are those of :func:`fused_siglip.siglip_loss`.
    What open_clip's class does not have (ids, negatives, weights, targets) is there alone.

    ``get_logits``, ``get_ground_truth`` and ``_loss`` are there for subclasses that call them. A
    subclass that overrides one of them gets open_clip's dense loss of them, on one rank.

    Args:
        cache_labels: accepted, without effect (open_clip's class does not use it either).
        rank: this process's rank in the group.
        world_size: number of ranks that share the global batch; 1 for the local batch alone.
        dist_impl: "ring", "gather", or one of open_clip's "bidir", "shift", "reduce"; None chooses.
        chunk_size: accepted, without effect: panels are always bounded (``workspace_bytes`` of
            :func:`siglip_loss` sets the bound).
        group: the process group, or "world" for the default group, looked up when called. With a
            group, rank and world_size need not be given. None: the default group where world_size
            is more than 1.

    Raises:
        TypeError: a rank, world_size or group of the wrong type; in ``forward``, a subclass that
            overrides a method which the loss of several ranks does not call.
        ValueError: an unknown dist_impl, a rank outside the world; in ``forward``, a rank or
            world_size that the process group does not confirm, or a group that was None because it
            was looked up before ``init_process_group``.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        chunk_size: int = 0,
        *,
        group: dist.ProcessGroup | str | None = OMITTED,
    ):
        super().__init__()
        validation.check_world(rank, world_size, dist_impl, DIST_IMPLS)
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl
        self.chunk_size = chunk_size
        self.group = group
        # open_clip's cache, which its class does not use either
        self.prev_num_logits = 0
        self.labels: dict[Any, Any] = {}

    def forward(
        self,
        image_features: Tensor,  # (B, D)
        text_features: Tensor,  # (B, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss, or with ``output_dict`` the dict ``{"contrastive_loss": loss}``."""
        group = self._group.get(none_is_world=self.world_size > 1)
        if self.world_size > 1 or group is not None:
            group = validation.check_membership(group, self.rank, self.world_size)
        inputs = (image_features, text_features, logit_scale, logit_bias)
        overridden = self._overridden()
        if overridden and group is not None and dist.get_world_size(group) > 1:
            raise TypeError(
                f"{type(self).__name__} overrides {overridden}, which the loss of several ranks "
                "does not call: expected a subclass of open_clip's own SigLipLoss "
                "(fused_siglip.integrations.open_clip.unpatch() before it is defined)"
            )
        if overridden:
            loss = self._loss(*inputs)
        elif group is not None:
            loss = siglip_loss(*inputs, group=group, dist_impl=self.dist_impl)
        else:
            loss = siglip_loss(*inputs)
        return {"contrastive_loss": loss} if output_dict else loss

    # what open_clip's class has besides, for its subclasses

    def _overridden(self) -> str:
        """Name of a method below that a subclass (or this instance) has replaced, or ""."""
        for name in ("_loss", "get_logits", "get_ground_truth"):
            if name in vars(self) or getattr(type(self), name) is not getattr(SigLipLoss, name):
                return name
        return ""

    def get_ground_truth(
        self, device: torch.device, dtype: torch.dtype, num_logits: int, negative_only: bool = False
    ) -> Tensor:  # (num_logits, num_logits)
        """Labels: 1 on the diagonal unless ``negative_only``, -1 elsewhere."""
        labels = -torch.ones((num_logits, num_logits), device=device, dtype=dtype)
        if not negative_only:
            labels = 2 * torch.eye(num_logits, device=device, dtype=dtype) + labels
        return labels

    def get_logits(
        self,
        image_features: Tensor,  # (M, D)
        text_features: Tensor,  # (N, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
    ) -> Tensor:  # (M, N)
        """The matrix of logits, which the loss itself does not need."""
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits += logit_bias  # in place, as open_clip: the dtype stays that of the product
        return logits

    def _loss(
        self,
        image_features: Tensor,  # (B, D)
        text_features: Tensor,  # (B, D)
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        negative_only: bool = False,
    ) -> Tensor:  # ()
        """The loss of one block of texts."""
        if not self._overridden():
            return siglip_loss(
                image_features, text_features, logit_scale, logit_bias, negative_only=negative_only
            )
        logits = self.get_logits(image_features, text_features, logit_scale, logit_bias)
        labels = self.get_ground_truth(
            image_features.device,
            image_features.dtype,
            image_features.shape[0],
            negative_only=negative_only,
        )
        return -nn.functional.logsigmoid(labels * logits).sum() / image_features.shape[0]


class _LossOptions(TypedDict):
    """What :func:`siglip_loss` is called with besides."""

    positives: Positives | None
    label_smoothing: float
    dist_impl: str | None
    workspace_bytes: int | None
    backend: str | None


class LearnableSigLipLoss(_WithGroup):
    """The loss with its own learnable scale and bias, for a loop that has neither.

    The parameters are those of the paper (arXiv 2303.15343, section 3.1): ``logit_scale`` holds the
    logarithm t' of the factor t = exp(t'), starting at log 10, and ``logit_bias`` b, starting at
    -10; both of shape (1,). Train them with the towers. open_clip and big_vision decay neither:
    :meth:`no_weight_decay` names them for the optimizer's groups. Under DDP put this module inside
    the wrapped model, so that the ranks keep them equal.

    Both are float32 and stay so: ``bfloat16()``, ``half()`` and ``to(dtype)`` of this module or one
    around it leave them, since a step of 1e-3 is less than half a rounding of -10 in bfloat16.
    ``double()`` makes them float64. On the meta device they have no values; ``to_empty`` starts
    them, and so does :meth:`reset_parameters`.

    Args:
        init_logit_scale: t' to start from.
        init_logit_bias: b to start from.
        max_logit_scale: upper bound of the factor t (not of t'), such as the 100 of CLIP; beyond
            it the loss uses the bound, and only a gradient that leads back reaches t'. None: no
            bound, as in the paper.
        positives: how much positive pairs count or which target they have, as in
            :func:`fused_siglip.siglip_loss`.
        label_smoothing: likewise.
        group: as in :func:`fused_siglip.siglip_loss`; "world" is looked up when the module is
            called. ``torch.distributed.group.WORLD`` is None before ``init_process_group``: give
            "world" instead.
        dist_impl: likewise.
        workspace_bytes: likewise.
        backend: likewise.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: a start that is not finite, or whose factor does not fit float32, a bound that
            is not above 0, a label_smoothing that is not 0 to 1; in ``forward``, a group that was
            None because it was looked up before ``init_process_group``, or was destroyed.
    """

    logit_scale: nn.Parameter
    logit_bias: nn.Parameter

    def __init__(  # noqa: PLR0913, all that does not change from call to call
        self,
        init_logit_scale: float = math.log(10),
        init_logit_bias: float = -10.0,
        *,
        max_logit_scale: float | None = None,
        positives: Positives | None = None,
        label_smoothing: float = 0.0,
        group: dist.ProcessGroup | str | None = OMITTED,
        dist_impl: str | None = None,
        workspace_bytes: int | None = None,
        backend: str | None = None,
    ):
        super().__init__()
        validation.check_start(init_logit_scale, init_logit_bias, max_logit_scale)
        validation.check_positives(positives)
        validation.check_label_smoothing(label_smoothing)
        self.init_logit_scale = float(init_logit_scale)
        self.init_logit_bias = float(init_logit_bias)
        # (1,) since FSDP shards no tensor without dimensions; not by nn.init, which others patch
        for name, (value,) in self._starts().items():
            start = torch.full((1,), value, dtype=torch.float32)
            self.register_parameter(name, nn.Parameter(start))
        self._made_on_meta = self.logit_scale.is_meta
        self.max_logit_scale = max_logit_scale
        self.group = group
        self.options: _LossOptions = {
            "positives": positives,
            "label_smoothing": label_smoothing,
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
        image_weights: Tensor | None = None,  # (M,)
        text_weights: Tensor | None = None,  # (N,)
        reduction: str = "mean",
    ) -> Tensor:  # (), or (M,)
        """The loss of L2-normalized features; all arguments as in :func:`siglip_loss`."""
        return siglip_loss(
            image_features,
            text_features,
            self.factor(),
            self.logit_bias,
            image_ids=image_ids,
            text_ids=text_ids,
            negatives=negatives,
            image_weights=image_weights,
            text_weights=text_weights,
            reduction=reduction,
            group=self._group.get(none_is_world=self.options["dist_impl"] is not None),
            **self.options,
        )

    def factor(self) -> Tensor:  # (1,)
        """t = exp(t'), at most ``max_logit_scale``: what multiplies the similarities. float32."""
        if self.logit_scale.dtype.itemsize < 4:
            warnings.warn(
                f"logit_scale is {self.logit_scale.dtype} here, which rounds t by up to 0.4% "
                "(mixed precision of FSDP, or an assignment): expected float32, such as by "
                "fully_shard(loss) without a param_dtype, before the model around it",
                stacklevel=2,
            )
        if self.max_logit_scale is None:
            return scalars.exp(self.logit_scale)
        return scalars.bounded_exp(self.logit_scale, float(self.max_logit_scale))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay should leave alone (timm's convention)."""
        return {"logit_scale", "logit_bias"}

    def reset_parameters(self) -> None:
        """Set t' and b to their starts."""
        for name, (value,) in self._starts().items():
            # by the function that transformers replaces, to spare what a checkpoint has set
            nn.init.constant_(getattr(self, name), value)

    def _starts(self) -> dict[str, tuple[float]]:
        return {"logit_scale": (self.init_logit_scale,), "logit_bias": (self.init_logit_bias,)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LearnableSigLipLoss:
        return super()._apply(scalars.keeping_scalars(self, fn, self._starts()), recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._starts():
            value = state_dict.get(prefix + name)
            if not isinstance(value, Tensor):
                continue
            if value.dim() == 0:  # checkpoints from before they had a dimension
                value = value.reshape(1)
            if value.is_floating_point() and value.dtype.itemsize < 4:  # assign=True keeps dtypes
                value = value.float()
            state_dict[prefix + name] = value
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _is_hf_initialized(self) -> bool:
        """What transformers asks before it initializes a module whose weights a checkpoint lacks.

        Its own initializer knows torch's modules only and would leave whatever memory holds. It
        marks the parameters that it has loaded, which ``reset_parameters`` spares.
        """
        if self._made_on_meta and not self.logit_scale.is_meta:
            for name, values in self._starts().items():
                parameter = getattr(self, name)
                if not getattr(parameter, "_is_hf_initialized", False):
                    scalars.fill(parameter, values)
            self._made_on_meta = False
        return vars(self).get("_hf_initialized", False)

    @_is_hf_initialized.setter
    def _is_hf_initialized(self, value: bool) -> None:
        vars(self)["_hf_initialized"] = value
