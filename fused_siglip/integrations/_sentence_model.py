"""The scale and bias of a sentence-transformers model, which its losses share.

A loss exchanges the model's class for one that hands them out with the last column's embeddings.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from .. import scalars

SCALE_AND_BIAS_FILE = "siglip_loss.json"

# The model's parameter (2,): t' and b; of a loss with a name, followed by "_" and the name. "bias"
# in it keeps the trainer's weight decay away, and one parameter is one entry less to forget.
PARAMETER = "logit_scale_and_bias"
# What a loss writes into the last column's features: the embeddings of the other columns, to get
# them back with [t, b] under the parameter's name; or PACKED, to get [t, b] in rows below the
# embeddings. And which parameter it means.
REQUEST = "siglip_request"
WHICH = "siglip_parameter"
PACKED = "packed"
OTHERS = "other_sentence_embeddings"

# What stands behind the next class in every class that is made of it.
if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer as _Model
else:
    _Model = object


class _WithScaleAndBias(_Model):
    """What a SentenceTransformer does besides once a loss has given it scale and bias.

    The trainer resumes by loading a second model of the same class from the checkpoint and copying
    its state: so this class reads what it has saved.
    """

    _siglip_starts: Mapping[str, tuple[float, float]] = {}  # (t', b) by parameter; never changed

    def __init__(self, model_name_or_path: str | None = None, *args: Any, **kwargs: Any):
        super().__init__(model_name_or_path, *args, **kwargs)
        file = Path(model_name_or_path or "", SCALE_AND_BIAS_FILE)
        if not file.is_file():
            return
        saved = json.loads(file.read_text())
        named: dict[str | None, dict[str, float]] = {
            name: value for name, value in saved.items() if isinstance(value, dict)
        }
        if "logit_scale" in saved:
            named[None] = saved
        for name, values in named.items():
            start = (values["logit_scale"], values["logit_bias"])
            give_scale_and_bias(self, parameter_name(name), *start)

    def save(self, path: str | None, *args: Any, **kwargs: Any) -> None:
        super().save(path, *args, **kwargs)
        if path is None:  # the library's way of not saving
            return
        saved: dict[str, Any] = {}
        for parameter in self._siglip_starts:
            logit_scale, logit_bias = getattr(self, parameter).tolist()
            values = {"logit_scale": logit_scale, "logit_bias": logit_bias}
            name = parameter.removeprefix(PARAMETER).removeprefix("_")
            saved |= {name: values} if name else values
        Path(path, SCALE_AND_BIAS_FILE).write_text(json.dumps(saved, indent=2) + "\n")

    def reset_parameters(self) -> None:
        """Set scale and bias to their starts (not the weights of the model's modules)."""
        for parameter, start in self._siglip_starts.items():
            scalars.fill(getattr(self, parameter), start)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _WithScaleAndBias:
        return super()._apply(scalars.keeping_scalars(self, fn, self._siglip_starts), recurse)

    def forward(self, input: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        request, which = input.pop(REQUEST, None), input.pop(WHICH, PARAMETER)
        output = super().forward(input, **kwargs)
        if request is None:
            return output
        parameter = getattr(self, which)
        logit_bias = parameter[1].to(torch.promote_types(parameter.dtype, torch.float32))
        values = torch.stack([scalars.exp(parameter[0]), logit_bias])
        if request == PACKED:
            output["sentence_embedding"] = _packed(output["sentence_embedding"], values)
        else:
            output.update({which: values, OTHERS: request})
        return output

    @property
    def dtype(self) -> torch.dtype | None:  # of the weights: not of the first parameter, ours
        own = self._siglip_starts
        return next((p.dtype for name, p in self.named_parameters() if name not in own), None)


def _packed(embeddings: Tensor, values: Tensor) -> Tensor:  # (b, D), (2,) -> (b + 2, D)
    """Scale and bias in rows below the embeddings, each a direction: (value, 1, 0, ...).

    What MatryoshkaLoss takes for embeddings is cut to fewer columns and normalized; a direction is
    what remains. In float32 at least, which the values need.
    """
    if embeddings.shape[1] < 2:
        raise ValueError("CachedSigLipLoss of embeddings of 1 dimension: expected 2 or more")
    wide = embeddings.to(torch.promote_types(embeddings.dtype, values.dtype))
    rows = torch.stack([values.to(wide.dtype), wide.new_ones(2)], dim=1)  # (2, 2)
    return torch.cat([wide, nn.functional.pad(rows, (0, embeddings.shape[1] - 2))])


def unpacked(rows: Tensor) -> tuple[Tensor, Tensor]:  # (2, D)
    if rows.shape[1] < 2:
        raise ValueError(
            "CachedSigLipLoss inside MatryoshkaLoss with a dimension of 1: expected dimensions of "
            "2 or more, or SigLipLoss"
        )
    logit_scale, logit_bias = rows[:, 0] / rows[:, 1]
    return logit_scale, logit_bias


@functools.cache
def _class_with_scale_and_bias(base: type) -> type:
    """A subclass by the same name (model cards print it), which pickle finds in this module."""
    cls = type(base.__name__, (_WithScaleAndBias, base), {"__module__": __name__})
    cls.__qualname__ = f"_Trained{base.__name__}"
    return cls


_TrainedSentenceTransformer = _class_with_scale_and_bias(SentenceTransformer)


def parameter_name(name: str | None) -> str:
    if name is None:
        return PARAMETER
    if not isinstance(name, str):
        raise TypeError(f"name is a {type(name).__name__}: expected a str or None")
    if not name.isidentifier() or name in ("logit_scale", "logit_bias"):
        raise ValueError(
            f"name is {name!r}: expected letters, digits and underscores, and not 'logit_scale' or "
            "'logit_bias'"
        )
    return f"{PARAMETER}_{name}"


def give_scale_and_bias(
    model: SentenceTransformer, parameter: str, logit_scale: float, logit_bias: float
) -> None:
    if not isinstance(model, _WithScaleAndBias):
        cls: Any = type(model)
        model.__class__ = _class_with_scale_and_bias(cls)
    start = (float(logit_scale), float(logit_bias))
    model._siglip_starts = {**getattr(model, "_siglip_starts", {}), parameter: start}
    values = torch.tensor(start, dtype=torch.float32, device=model.device)
    model.register_parameter(parameter, nn.Parameter(values))


def unwrapped(model: nn.Module) -> SentenceTransformer:
    """Out of DDP, DataParallel and torch.compile."""
    inner: Any = model
    while not isinstance(inner, SentenceTransformer):
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return inner


def made_too_late() -> RuntimeError:
    return RuntimeError(
        "the model's forward pass returned no scale and bias: expected the loss to be made before "
        "the model is wrapped or prepared"
    )
