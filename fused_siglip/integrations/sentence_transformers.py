"""sentence-transformers: ``SigLipLoss(model)`` and its cached (GradCache) form.

Scale and bias belong to the model, not to the loss: the trainer wraps only the model in DDP, clips,
zeroes and saves only what is the model's. The last column's forward pass hands out all that the
loss depends on, since DDP takes for used what the outputs of its last forward pass lead to. The
model's class is exchanged for one that does this (:class:`_WithScaleAndBias`); a saved model needs
neither it nor this package.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import _checks
from ..functional import siglip_loss
from . import require

require("sentence-transformers", ">=6.0,<7")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.losses import (  # noqa: E402
    CachedLossMixin,
    has_static_embedding_input,
)

SCALE_AND_BIAS_FILE = "siglip_loss.json"

# The model's parameter (2,): t' and b. "bias" in its name is what keeps the trainer's weight decay
# away, and one parameter is one entry less to forget.
_PARAMETER = "logit_scale_and_bias"
# What a loss writes into the last column's features: the embeddings of the other columns, to get
# them back with [t, b] under the parameter's name; or _PACKED, to get [t, b] behind the embeddings,
# all as one vector.
_REQUEST = "siglip_request"
_PACKED = "packed"
_OTHERS = "other_sentence_embeddings"


class SigLipLoss(nn.Module):
    """Sigmoid contrastive loss (SigLIP) of (anchor, positive) pairs, with exact gradients and
    without the matrix of scores.

    Every anchor is compared with every positive of the batch, by cosine similarity s: its own is a
    positive pair, the others are negative ones. The loss is ``-log sigmoid(+-(t s + b))`` summed
    over the texts and averaged over the anchors (arXiv 2303.15343, algorithm 1). Further columns
    are hard negatives, as in ``MultipleNegativesRankingLoss``: negative for every anchor. Labels
    are not used. ``BatchSamplers.NO_DUPLICATES`` keeps repeated texts, which would count as
    negatives, out of a batch.

    The scale t = exp(t') and the bias b are learned: the two elements of the parameter
    ``model.logit_scale_and_bias``, which a new loss sets to its start. Being the model's, they are
    averaged by DDP, clipped and kept in checkpoints with it, and the trainer does not decay them
    (its rule spares names with "bias"; so should yours). ``model.save_pretrained`` writes them to
    ``siglip_loss.json``; the saved model loads as any other.

    Args:
        model: a SentenceTransformer, not yet wrapped (DDP, torch.compile); optimizers made by hand
            come after the loss.
        init_logit_scale: t' to start from, the logarithm of the factor.
        init_logit_bias: b to start from.
        gather_across_devices: compute the loss of the global batch of all processes (the default
            process group). With DDP's averaging its gradients are exact.

    Raises:
        TypeError, ValueError: bad arguments; in ``forward``, fewer than two columns.

    ``forward(sentence_features, labels)`` returns the loss: a float32 scalar (float64 for a float64
    model).
    """

    def __init__(
        self,
        model: SentenceTransformer,
        init_logit_scale: float = math.log(10),
        init_logit_bias: float = -10.0,
        gather_across_devices: bool = False,
    ):
        super().__init__()
        if not isinstance(model, SentenceTransformer):
            raise TypeError(
                f"model is a {type(model).__name__}: expected a SentenceTransformer, before it is "
                "wrapped"
            )
        _checks.check_start(init_logit_scale, init_logit_bias, None)
        self.init_logit_scale = init_logit_scale
        self.init_logit_bias = init_logit_bias
        self.gather_across_devices = gather_across_devices
        self.model = model
        with torch.no_grad():
            getattr(model, _PARAMETER).copy_(torch.tensor([init_logit_scale, init_logit_bias]))

    def __setattr__(self, name: str, value: Any) -> None:
        # the trainer puts in other models: fresh ones of model_init, and wrapped ones
        unwrapped = name == "model" and isinstance(value, SentenceTransformer)
        if unwrapped and not hasattr(value, _PARAMETER):
            _give_scale_and_bias(value, self.init_logit_scale, self.init_logit_bias)
        super().__setattr__(name, value)

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:  # ()
        *others, last = _at_least_two(sentence_features)
        embeddings = [self.model(features)["sentence_embedding"] for features in others]
        last[_REQUEST] = embeddings
        try:
            output = self.model(last)
        finally:
            last.pop(_REQUEST, None)
        if _PARAMETER not in output:
            raise _made_too_late()
        logit_scale, logit_bias = output[_PARAMETER][:2]  # DataParallel strings copies together
        embeddings = [*embeddings, output["sentence_embedding"]]
        return self._loss(embeddings, logit_scale, logit_bias)

    def _loss(self, columns: list[Tensor], logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
        """Loss of the embeddings of all columns, each (B, D) and not normalised."""
        columns = [_normalized(column) for column in columns]
        anchors, texts = columns[0], columns[1]
        options = {}
        rank, world_size = 0, 1
        if self.gather_across_devices and dist.is_available() and dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
            options["group"] = dist.group.WORLD
        if len(columns) > 2:
            if len(columns[1]) != len(anchors):
                raise ValueError(
                    f"{len(anchors)} anchors have {len(columns[1])} positives: expected one each"
                )
            texts = torch.cat(columns[1:])
            # unique in the global batch: text i is anchor i's positive, those beyond are nobody's
            ids = torch.arange(len(texts), device=texts.device) * world_size + rank
            options |= {"image_ids": ids[: len(anchors)], "text_ids": ids}
        return siglip_loss(anchors, texts, logit_scale, logit_bias, **options)

    def get_config_dict(self) -> dict[str, Any]:
        return {
            "init_logit_scale": self.init_logit_scale,
            "init_logit_bias": self.init_logit_bias,
            "gather_across_devices": self.gather_across_devices,
        }

    @property
    def citation(self) -> str:
        return """
@inproceedings{zhai2023sigmoid,
    title={Sigmoid Loss for Language Image Pre-Training},
    author={Xiaohua Zhai and Basil Mustafa and Alexander Kolesnikov and Lucas Beyer},
    booktitle={Proceedings of the IEEE/CVF International Conference on Computer Vision},
    year={2023},
    url={https://arxiv.org/abs/2303.15343},
}
"""


class CachedSigLipLoss(CachedLossMixin, SigLipLoss):
    """:class:`SigLipLoss` with gradient caching: memory grows with the mini-batch, not the batch.

    The batch is embedded in mini-batches without gradients, the loss of the whole batch gives the
    gradients of the embeddings, and in ``backward`` each mini-batch is embedded again, with the
    same dropout, to carry them on (GradCache, arXiv 2101.06983; the library's own machinery). The
    gradients are those of :class:`SigLipLoss`. Those of scale and bias travel with the last
    mini-batch, so accumulation, GradScaler and DDP treat them like all others.

    Args:
        model, init_logit_scale, init_logit_bias, gather_across_devices: as in :class:`SigLipLoss`.
        mini_batch_size: rows embedded at a time.
        mini_batch_num_tokens: pack mini-batches by number of tokens instead, up to this many.
        show_progress_bar: show the mini-batches' progress.

    Raises:
        TypeError, ValueError: as :class:`SigLipLoss`; sizes below 1; a model of static embeddings,
            whose inputs cannot be split; in ``forward``, inside MatryoshkaLoss or under
            DataParallel (SigLipLoss works with both).
    """

    def __init__(
        self,
        model: SentenceTransformer,
        init_logit_scale: float = math.log(10),
        init_logit_bias: float = -10.0,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
    ):
        super().__init__(model, init_logit_scale, init_logit_bias, gather_across_devices)
        if has_static_embedding_input(model):
            raise ValueError(
                "model starts with a StaticEmbedding, whose inputs cannot be split into "
                "mini-batches: expected another model, or SigLipLoss"
            )
        for name, value in (
            ("mini_batch_size", mini_batch_size),
            ("mini_batch_num_tokens", mini_batch_num_tokens),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}: expected at least 1")
        self.mini_batch_size = mini_batch_size
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.show_progress_bar = show_progress_bar

    def forward(
        self, sentence_features: Iterable[dict[str, Tensor]], labels: Tensor | None = None
    ) -> Tensor:  # ()
        if "calculate_loss" in vars(self):  # MatryoshkaLoss truncates what it takes for embeddings
            raise ValueError(
                "CachedSigLipLoss inside MatryoshkaLoss: expected SigLipLoss there, or the cached "
                "loss on its own"
            )
        if isinstance(self.model, nn.DataParallel):
            raise ValueError(
                "CachedSigLipLoss under DataParallel: expected one process a device (torchrun, "
                "DistributedDataParallel), or SigLipLoss"
            )
        columns = _at_least_two(sentence_features)
        columns[-1] = {**columns[-1], _REQUEST: _PACKED}
        return self.forward_cached(columns, labels)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:  # ()
        """Loss of the embeddings, by column and mini-batch: (b, D); those of the last column are
        packed with scale and bias, (b D + 2). With ``with_backward`` their ``grad`` is set."""
        *columns, last = reps
        if last[-1].ndim != 1:
            raise _made_too_late()
        dim = columns[0][0].shape[1]
        logit_scale, logit_bias = last[-1][-2:]
        columns.append([packed[:-2].view(-1, dim) for packed in last])
        loss = self._loss([torch.cat(column) for column in columns], logit_scale, logit_bias)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }


class _WithScaleAndBias:
    """What a SentenceTransformer does besides once a loss has given it scale and bias.

    The trainer resumes by loading a second model of the same class from the checkpoint and copying
    its state: so this class reads what it has saved.
    """

    def __init__(self, model_name_or_path: str | None = None, *args, **kwargs):
        super().__init__(model_name_or_path, *args, **kwargs)
        file = Path(model_name_or_path or "", SCALE_AND_BIAS_FILE)
        if file.is_file():
            saved = json.loads(file.read_text())
            _give_scale_and_bias(self, saved["logit_scale"], saved["logit_bias"])

    def save(self, path: str, *args, **kwargs) -> None:
        super().save(path, *args, **kwargs)
        if path is None:  # the library's way of not saving
            return
        logit_scale, logit_bias = getattr(self, _PARAMETER).tolist()
        saved = {"logit_scale": logit_scale, "logit_bias": logit_bias}
        Path(path, SCALE_AND_BIAS_FILE).write_text(json.dumps(saved, indent=2) + "\n")

    def forward(self, input: dict[str, Tensor], **kwargs) -> dict[str, Tensor]:
        request = input.pop(_REQUEST, None)
        output = super().forward(input, **kwargs)
        if request is None:
            return output
        logit_scale, logit_bias = getattr(self, _PARAMETER)
        values = torch.stack([logit_scale.exp(), logit_bias])
        if request == _PACKED:  # in float32 at least, which the values need
            embedding = output["sentence_embedding"]
            wide = embedding.to(torch.promote_types(embedding.dtype, values.dtype))
            output["sentence_embedding"] = torch.cat([wide.flatten(), values.to(wide.dtype)])
        else:
            output.update({_PARAMETER: values, _OTHERS: request})
        return output

    @property
    def dtype(self) -> torch.dtype | None:  # of the weights: not of the first parameter, ours
        others = (p.dtype for name, p in self.named_parameters() if name != _PARAMETER)
        return next(others, None)


@functools.cache
def _class_with_scale_and_bias(base: type[SentenceTransformer]) -> type[SentenceTransformer]:
    """A subclass by the same name (model cards print it), which pickle finds in this module."""
    cls = type(base.__name__, (_WithScaleAndBias, base), {"__module__": __name__})
    cls.__qualname__ = f"_Trained{base.__name__}"
    return cls


_TrainedSentenceTransformer = _class_with_scale_and_bias(SentenceTransformer)


def _give_scale_and_bias(model: SentenceTransformer, logit_scale: float, logit_bias: float) -> None:
    if not isinstance(model, _WithScaleAndBias):
        model.__class__ = _class_with_scale_and_bias(type(model))
    values = torch.tensor([logit_scale, logit_bias], dtype=torch.float32, device=model.device)
    model.register_parameter(_PARAMETER, nn.Parameter(values))


def _at_least_two(sentence_features: Iterable[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    columns = list(sentence_features)
    if len(columns) < 2:
        raise ValueError(
            f"the dataset has {len(columns)} input column(s): expected an anchor, a positive and "
            "perhaps negatives"
        )
    return columns


def _made_too_late() -> RuntimeError:
    return RuntimeError(
        "the model's forward pass returned no scale and bias: expected the loss to be made before "
        "the model is wrapped or prepared"
    )


def _normalized(embeddings: Tensor) -> Tensor:  # (B, D), float32 or wider
    wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
    return nn.functional.normalize(wide, dim=-1)
