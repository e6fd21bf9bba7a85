"""The fused loss inside Hugging Face transformers' SigLIP and SigLIP 2 models."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar

import torch.distributed as dist
from torch import nn

from .. import scalars, validation
from ..distributed.agreement import DIST_IMPLS
from ..distributed.groups import OMITTED, WORLD, GroupRef
from ..loss import siglip_loss
from ..positives import Positives
from . import require

require("transformers", ">=5.4,<6")

from transformers import Siglip2Model, SiglipModel  # noqa: E402
from transformers.models.siglip.modeling_siglip import SiglipOutput  # noqa: E402
from transformers.models.siglip2.modeling_siglip2 import Siglip2Output  # noqa: E402
from transformers.utils import can_return_tuple  # noqa: E402

_OUTPUTS = {SiglipModel: SiglipOutput, Siglip2Model: Siglip2Output}
# Which tower an argument of the models' forward belongs to; what is not named goes to both.
_TEXT = ("input_ids", "attention_mask", "position_ids")
_IMAGE = ("pixel_values", "interpolate_pos_encoding", "pixel_attention_mask", "spatial_shapes")
# Where a patched class, and apart from it a patched instance, keeps its settings.
_SETTINGS = "_fused_siglip"
# Where a fused forward keeps the one it stands for.
_ORIGINAL = "_fused_siglip_original"

ModelOrClass = TypeVar("ModelOrClass", bound="nn.Module | type[nn.Module]")


class _LossOptions(TypedDict):
    group: dist.ProcessGroup | str | None
    dist_impl: str | None
    positives: Positives | None
    label_smoothing: float


@dataclass(frozen=True)
class _Settings:
    """What a patched model was asked for."""

    group: GroupRef  # copies share it: a process group has no copy
    dist_impl: str | None
    positives: Positives | None
    label_smoothing: float

    def loss_options(self) -> _LossOptions:
        """Options of siglip_loss, now: groups come into being after models are patched."""
        return {
            "group": self.group.get(),
            "dist_impl": self.dist_impl,
            "positives": self.positives,
            "label_smoothing": self.label_smoothing,
        }


def patch_siglip(
    model_or_class: ModelOrClass,
    *,
    group: dist.ProcessGroup | str | None = OMITTED,
    dist_impl: str | None = None,
    positives: Positives | None = None,
    label_smoothing: float = 0.0,
) -> ModelOrClass:
    """Let a SigLIP model of transformers compute its loss without the matrix of logits.

    With ``return_loss=True`` the model's ``loss`` is :func:`fused_siglip.siglip_loss` of its
    normalized embeddings, and ``logits_per_image`` and ``logits_per_text`` are None, since they are
    the (B, B) matrix; all other outputs are the model's own. Without ``return_loss`` the model's
    own forward runs, untouched. Parameters, state dict, config and class name stay as they are.

    t = exp(logit_scale) is float32 also in a half-precision model. The model's parameters keep the
    dtype that you gave them.

    Trainer divides the loss by the number of accumulated batches: ``accepts_loss_kwargs`` is False,
    or a batch with a column of labels would make it believe that the model has done so.

    Args:
        model_or_class: ``SiglipModel`` or ``Siglip2Model``, a class (all its models) or an instance
            (this one alone, and copies and pickles of it). A subclass must inherit ``forward``. An
            instance may be wrapped (DDP, FSDP, PEFT, torch.compile, a module of yours that holds
            one): the model inside is patched. Patch before anything else replaces a model's
            ``forward``, as accelerate does for mixed precision: before it goes to Trainer or
            ``Accelerator.prepare``.
        group: None for the loss of each process's own batch, which is what transformers computes.
            "world", or a process group this rank is in, for the loss of the global batch: the mean
            over the ranks of what they return, so DDP's averaging gives its exact gradient. Every
            rank must call the model with ``return_loss=True`` as often as the others; their numbers
            of pairs may differ, but the towers want at least one. "world" is looked up when the
            model is called, so it may be given before ``init_process_group``; where there is none,
            this process is the world. (``torch.distributed.group.WORLD`` is None before it: a None
            from then is an error when the model is called on several ranks.)
        dist_impl: how the ranks exchange features, as in :func:`fused_siglip.siglip_loss`. Without
            ``group`` it means "world".
        positives: ``PositiveWeight(p)`` or ``PositiveTarget(p)``: how much pair (i, i) counts, or
            its target. The models know no ids, so that an image has one positive.
        label_smoothing: as in :func:`fused_siglip.siglip_loss`; not Trainer's of labels.

    Returns:
        ``model_or_class``, patched in place. Patching again replaces the settings.

    Raises:
        TypeError: not such a class or model, a wrapper that holds none or several, a subclass with
            a ``forward`` of its own, an instance whose ``forward`` was replaced, a wrong option.
        ValueError: an unknown dist_impl, a label_smoothing that is not 0 to 1.
    """
    settings = _settings(group, dist_impl, positives, label_smoothing)
    target = _find(model_or_class)
    if _SETTINGS not in vars(target):
        if isinstance(target, type):
            _patch_class(target)
        else:
            _patch_instance(target)
    setattr(target, _SETTINGS, settings)
    return model_or_class


def _settings(
    group: dist.ProcessGroup | str | None,
    dist_impl: str | None,
    positives: Positives | None,
    label_smoothing: float,
) -> _Settings:
    """The settings, checked."""
    validation.check_dist_impl(dist_impl, DIST_IMPLS)
    validation.check_positives(positives)
    validation.check_label_smoothing(label_smoothing)
    if dist_impl is not None and (group is None or group is OMITTED):
        group = WORLD
    return _Settings(GroupRef(group), dist_impl, positives, label_smoothing)


def _patch_class(cls: Any) -> None:
    """Give a class the fused forward."""
    _check_forward(cls)
    cls.forward = _fused(cls.forward)
    cls.accepts_loss_kwargs = False


def _patch_instance(model: nn.Module) -> None:
    """Give one model the fused forward, by a class of its own."""
    cls: Any = type(model)
    _check_forward(cls)
    if "forward" in vars(model):
        raise TypeError(
            f"forward of this {cls.__name__} was replaced on the instance (accelerate does so "
            "for mixed precision and device_map): expected a model that is patched before that"
        )
    model.__class__ = _patched_class(cls)


def unpatch_siglip(model_or_class: ModelOrClass) -> ModelOrClass:
    """Undo :func:`patch_siglip` of this class or this instance; without one, do nothing.

    Returns ``model_or_class``. Raises the TypeError of :func:`patch_siglip` for other objects.
    """
    target: Any = _find(model_or_class)
    if _SETTINGS in vars(target):
        delattr(target, _SETTINGS)
        if isinstance(target, type):
            _unpatch_class(target)
        # FSDP2 may have put a class of its own on top, which then finds no settings
        elif hasattr(vars(type(target)).get("forward"), _ORIGINAL):
            target.__class__ = type(target).__base__
    return model_or_class


def _unpatch_class(cls: Any) -> None:
    """Give a class its own forward back."""
    del cls.accepts_loss_kwargs
    if cls in _OUTPUTS:
        cls.forward = getattr(cls.forward, _ORIGINAL)
    else:
        del cls.forward  # inherited


def _find(model_or_class: ModelOrClass) -> nn.Module | type[nn.Module]:
    """The class, or the one model in a module."""
    models = tuple(_OUTPUTS)
    expected = "expected SiglipModel or Siglip2Model of transformers, as a class or an instance"
    if isinstance(model_or_class, type):
        if issubclass(model_or_class, models):
            return model_or_class
        raise TypeError(f"model_or_class is the class {model_or_class.__qualname__}: {expected}")
    if not isinstance(model_or_class, nn.Module):
        raise TypeError(f"model_or_class is a {type(model_or_class).__qualname__}: {expected}")
    found = [module for module in model_or_class.modules() if isinstance(module, models)]
    if len(found) != 1:
        raise TypeError(
            f"model_or_class is a {type(model_or_class).__qualname__} that holds {len(found)} "
            f"SigLIP models: {expected}, or a module that holds one"
        )
    return found[0]


def _check_forward(cls: Any) -> None:
    """Refuse a forward whose work outside the loss is not known here."""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    if owner not in _OUTPUTS and not hasattr(owner.forward, _ORIGINAL):
        base = next(c for c in _OUTPUTS if issubclass(cls, c))
        raise TypeError(
            f"{owner.__qualname__} has a forward of its own: expected a class that inherits it "
            f"from {base.__name__} (if it calls super().forward, patch {base.__name__})"
        )
    unknown = set(_defaults(cls.forward)) - {*_TEXT, *_IMAGE, "return_loss"}
    if unknown:
        raise TypeError(
            f"forward of {cls.__name__} takes {', '.join(sorted(unknown))}, which is not known "
            "here: expected the arguments of transformers' own model"
        )


def _defaults(forward: Callable[..., Any]) -> dict[str, object]:
    """The named arguments of a model's forward, in their order, with their defaults."""
    _, *parameters = inspect.signature(forward).parameters.values()  # without self
    return {p.name: p.default for p in parameters if p.kind is not p.VAR_KEYWORD}


@functools.cache
def _patched_class(cls: Any) -> Any:
    """A subclass of the same name with the fused forward: the class of patched instances.

    Not a ``forward`` in the instance's dict: that would be lost when it is pickled (a bound method
    is pickled by name), and hidden under what accelerate puts there.
    """

    def reduce(self: nn.Module, protocol: int) -> tuple[Any, ...]:
        return _new_patched, (cls,), object.__reduce_ex__(self, 2)[2]

    body = {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")}
    body |= {"forward": _fused(cls.forward), "__reduce_ex__": reduce, "accepts_loss_kwargs": False}
    return type(cls.__name__, (cls,), body)


def _new_patched(cls: Any) -> nn.Module:
    patched = _patched_class(cls)
    return patched.__new__(patched)


def _fused(original: Callable[..., Any]) -> Any:
    """``original``, the forward of a model, with the fused loss where settings are found."""
    defaults = _defaults(original)

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        settings = getattr(self, _SETTINGS, None)
        given = dict(zip(defaults, args, strict=False)) | kwargs
        well_formed = len(given) == len(args) + len(kwargs)  # no argument twice, or too many
        if settings is None or not well_formed or not given.get("return_loss"):
            return original(self, *args, **kwargs)
        return _forward_with_loss(self, settings, **(defaults | given))

    fused: Any = functools.update_wrapper(forward, original)
    # accelerate looks for the bare forward by following __wrapped__: it must stop here
    del fused.__wrapped__
    fused.__signature__ = inspect.signature(original)  # Trainer keeps the columns named in it
    setattr(fused, _ORIGINAL, original)
    return fused


@can_return_tuple
def _forward_with_loss(
    self: SiglipModel | Siglip2Model, settings: _Settings, /, return_loss: bool, **given: Any
) -> SiglipOutput | Siglip2Output:
    """The model's outputs with the loss and without logits; normalizes as the model does."""
    text, image = (
        {name: given.pop(name) for name in names if name in given} for names in (_TEXT, _IMAGE)
    )
    model_class, output = next(item for item in _OUTPUTS.items() if isinstance(self, item[0]))
    # of transformers' class: its forward, too, would not call what a subclass overrides
    vision_outputs = model_class.get_image_features(self, **image, **given, return_dict=True)
    text_outputs = model_class.get_text_features(self, **text, **given, return_dict=True)
    image_embeds, text_embeds = vision_outputs.pooler_output, text_outputs.pooler_output
    image_embeds = image_embeds / image_embeds.norm(p=2, dim=-1, keepdim=True)  # (B, D)
    text_embeds = text_embeds / text_embeds.norm(p=2, dim=-1, keepdim=True)  # (B, D)

    device = text_embeds.device  # towers may be on two: theirs is the device of the logits
    loss = siglip_loss(
        image_embeds.to(device),
        text_embeds,
        scalars.exp(self.logit_scale.to(device)),
        self.logit_bias.to(device),
        **settings.loss_options(),
    )
    return output(
        loss=loss,
        text_embeds=text_embeds,
        image_embeds=image_embeds,
        text_model_output=text_outputs,
        vision_model_output=vision_outputs,
    )
