"""sentence-transformers: ``SigLipLoss(model)`` and its cached (GradCache) form.

Scale and bias belong to the model, not to the loss: the trainer wraps only the model in DDP, clips,
zeroes and saves only what is the model's. The last column's forward pass hands out all that the
loss depends on, since DDP takes for used what the outputs of its last forward pass lead to. The
model's class is exchanged for one that does this (_sentence_model.py). A saved model needs neither
that class nor this package.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import validation
from ..distributed.agreement import report_bad_arguments
from ..distributed.groups import WORLD, is_ready, look_up
from ..loss import siglip_loss
from ..positives import Positives
from . import require

require("sentence-transformers", ">=6.2,<7")

from sentence_transformers import SentenceTransformer  # noqa: E402
from sentence_transformers.base.losses import (  # noqa: E402
    CachedLossMixin,
    has_static_embedding_input,
)
from sentence_transformers.base.losses.merged_forward import merge_feature_batches  # noqa: E402
from sentence_transformers.sentence_transformer.losses.adaptive_layer import (  # noqa: E402
    TransformerDecorator,
)

from ._sentence_columns import (  # noqa: E402
    anchor_weights,
    at_least_two,
    check_one_positive_each,
    normalized,
)
from ._sentence_model import (  # noqa: E402
    PACKED,
    REQUEST,
    SCALE_AND_BIAS_FILE,
    WHICH,
    give_scale_and_bias,
    made_too_late,
    parameter_name,
    unpacked,
    unwrapped,
)

__all__ = ["SCALE_AND_BIAS_FILE", "CachedSigLipLoss", "SigLipLoss"]


class SigLipLoss(nn.Module):
    """Sigmoid contrastive loss (SigLIP) of (anchor, positive) pairs, with exact gradients and
    without the matrix of scores.

    Every anchor is compared with every positive of the batch, by cosine similarity s: its own is a
    positive pair, the others are negative ones. The loss is ``-log sigmoid(+-(t s + b))`` summed
    over the texts and averaged over the anchors (arXiv 2303.15343, algorithm 1). Further columns
    are hard negatives, as in ``MultipleNegativesRankingLoss``: negative for every anchor. Labels
    are not used, or are weights of the anchors (``weights_from_labels``).
    ``BatchSamplers.NO_DUPLICATES`` keeps repeated texts, which would count as negatives, out of a
    batch.

    The scale t = exp(t') and the bias b are learned: the two elements of the parameter
    ``model.logit_scale_and_bias``. Being the model's, they are averaged by DDP, clipped and kept in
    checkpoints with it, and the trainer does not decay them (its rule spares names with "bias"; so
    should yours). They stay float32 in a half-precision model. ``model.save_pretrained`` writes
    them to ``siglip_loss.json``; the saved model loads as any other.

    Several losses of one model share them, and another loss goes on where they are
    (``model.reset_parameters()`` starts anew). With a ``name`` a loss has its own.

    Args:
        model: a SentenceTransformer, not yet wrapped (DDP, torch.compile); optimizers made by hand
            come after the loss.
        init_logit_scale: t' to start from, the logarithm of the factor.
        init_logit_bias: b to start from.
        gather_across_devices: compute the loss of the global batch of all processes (the default
            process group, looked up when called). With DDP's averaging its gradients are exact.
            Ranks may have different numbers of columns.
        name: losses of the same name share scale and bias, those of different names do not. None:
            shared by all without a name.
        positives: ``PositiveWeight(p)`` or ``PositiveTarget(p)``: how much an anchor and its
            positive count, or their target. Every anchor has one positive here.
        label_smoothing: as in :func:`fused_siglip.siglip_loss`.
        weights_from_labels: the data set's column of labels ("label", "labels", "score" or
            "scores") holds a weight of each anchor, a float of at least 0 that multiplies the loss
            of all its pairs. In a group all ranks give it, or none does.

    Raises:
        TypeError: an argument of the wrong type, or labels that should be weights.
        ValueError: a bad argument; a start that is not the one of the scale and bias that the model
            has from another loss of this name; in ``forward``, fewer than two columns, or no labels
            where they should be weights.

    ``forward(sentence_features, labels)`` returns the loss: a float32 scalar (float64 for a float64
    model). As in the library, columns after the anchor are embedded in one pass where they can be.
    """

    def __init__(
        self,
        model: SentenceTransformer,
        init_logit_scale: float = math.log(10),
        init_logit_bias: float = -10.0,
        gather_across_devices: bool = False,
        *,
        name: str | None = None,
        positives: Positives | None = None,
        label_smoothing: float = 0.0,
        weights_from_labels: bool = False,
    ):
        super().__init__()
        if not isinstance(model, SentenceTransformer):
            raise TypeError(
                f"model is a {type(model).__name__}: expected a SentenceTransformer, before it is "
                "wrapped"
            )
        validation.check_start(init_logit_scale, init_logit_bias, None)
        validation.check_positives(positives)
        validation.check_label_smoothing(label_smoothing)
        self.positives, self.label_smoothing = positives, label_smoothing
        self.weights_from_labels = weights_from_labels
        self.init_logit_scale = init_logit_scale
        self.init_logit_bias = init_logit_bias
        self.gather_across_devices = gather_across_devices
        self.name = name
        self._parameter = parameter_name(name)
        start = (float(init_logit_scale), float(init_logit_bias))
        theirs = getattr(model, "_siglip_starts", {}).get(self._parameter, start)
        if theirs != start:
            raise ValueError(
                f"model has scale and bias of another loss, which started at {theirs}, and this "
                f"one is to start at {start}: expected the same start to share them, or name= for "
                "scale and bias of this loss's own"
            )
        self.model = model

    def __setattr__(self, name: str, value: Any) -> None:
        # the trainer puts in other models: fresh ones of model_init, and wrapped ones
        is_model = name == "model" and isinstance(value, SentenceTransformer)
        if is_model and not hasattr(value, self._parameter):
            start = (self.init_logit_scale, self.init_logit_bias)
            give_scale_and_bias(value, self._parameter, *start)
        super().__setattr__(name, value)

    def forward(
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:  # ()
        anchors, *texts = at_least_two(sentence_features)
        merged = merge_feature_batches(texts) if len(texts) > 1 else None
        *others, last = texts if merged is None else [merged]
        embeddings = [self.model(features)["sentence_embedding"] for features in (anchors, *others)]
        last[REQUEST], last[WHICH] = embeddings, self._parameter
        try:
            output = self.model(last)
        finally:
            last.pop(REQUEST, None), last.pop(WHICH, None)
        if self._parameter not in output:
            raise made_too_late()
        logit_scale, logit_bias = output[self._parameter][:2]  # DataParallel strings them together
        embeddings.append(output["sentence_embedding"])
        if merged is not None:
            anchors, merged_texts = embeddings
            embeddings = [anchors, *merged_texts.chunk(len(texts))]
        return self._loss(embeddings, logit_scale, logit_bias, labels)

    def _loss(
        self,
        columns: list[Tensor],  # (B, D) each, not normalized
        logit_scale: Tensor,
        logit_bias: Tensor,
        labels: Tensor | None,  # (B,)
    ) -> Tensor:  # ()
        """Loss of the embeddings of all columns."""
        columns = [normalized(column) for column in columns]
        anchors, texts = columns[0], columns[1]
        image_ids = text_ids = None
        world = look_up(WORLD) if self.gather_across_devices and is_ready() else None
        rank, world_size = 0, 1
        if world is not None:
            rank, world_size = dist.get_rank(world), dist.get_world_size(world)
        weights = None
        # also for pairs where ranks gather: another rank may have further columns
        by_id = len(columns) > 2 or world_size > 1
        try:
            if self.weights_from_labels:
                weights = anchor_weights(labels)
            if by_id:
                check_one_positive_each(anchors, texts)
        except (TypeError, ValueError):
            if world is not None and world_size > 1:
                report_bad_arguments(world, anchors.device)
            raise
        if by_id:
            texts = torch.cat(columns[1:])
            # unique in the global batch: text i is anchor i's positive, those beyond are nobody's
            text_ids = torch.arange(len(texts), device=texts.device) * world_size + rank
            image_ids = text_ids[: len(anchors)]
        group = WORLD if self.gather_across_devices else None
        return siglip_loss(
            anchors, texts, logit_scale, logit_bias,
            image_ids=image_ids, text_ids=text_ids, image_weights=weights, group=group,
            positives=self.positives, label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def get_config_dict(self) -> dict[str, Any]:
        given: dict[str, Any] = {} if self.name is None else {"name": self.name}
        if self.positives is not None:
            given["positives"] = repr(self.positives)
        if self.label_smoothing:
            given["label_smoothing"] = self.label_smoothing
        if self.weights_from_labels:
            given["weights_from_labels"] = True
        return given | {
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
        model: as in :class:`SigLipLoss`, like all that is not described here.
        mini_batch_size: rows embedded at a time.
        mini_batch_num_tokens: pack mini-batches by number of tokens instead, up to this many.
        show_progress_bar: show the mini-batches' progress.

    Raises:
        TypeError, ValueError: as :class:`SigLipLoss`; sizes below 1; a model of static embeddings,
            whose inputs cannot be split; in ``forward``, inside AdaptiveLayerLoss, which no cached
            loss works in, or under DataParallel (SigLipLoss works with both). MatryoshkaLoss works,
            with dimensions of 2 or more.
    """

    forward_cached: Callable[..., Tensor]  # of CachedLossMixin

    def __init__(  # noqa: PLR0913, the library's and ours
        self,
        model: SentenceTransformer,
        init_logit_scale: float = math.log(10),
        init_logit_bias: float = -10.0,
        mini_batch_size: int = 32,
        mini_batch_num_tokens: int | None = None,
        gather_across_devices: bool = False,
        show_progress_bar: bool = False,
        *,
        name: str | None = None,
        positives: Positives | None = None,
        label_smoothing: float = 0.0,
        weights_from_labels: bool = False,
    ):
        super().__init__(
            model, init_logit_scale, init_logit_bias, gather_across_devices, name=name,
            positives=positives, label_smoothing=label_smoothing,
            weights_from_labels=weights_from_labels,
        )  # fmt: skip
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
        self, sentence_features: Iterable[dict[str, Any]], labels: Tensor | None = None
    ) -> Tensor:  # ()
        if isinstance(vars(unwrapped(self.model)[0]).get("forward"), TransformerDecorator):
            raise ValueError(
                "CachedSigLipLoss inside AdaptiveLayerLoss: expected SigLipLoss there, since what "
                "embeds again in the backward pass no longer sees its layers"
            )
        if isinstance(self.model, nn.DataParallel):
            raise ValueError(
                "CachedSigLipLoss under DataParallel: expected one process a device (torchrun, "
                "DistributedDataParallel), or SigLipLoss"
            )
        columns = at_least_two(sentence_features)
        columns[-1] = {**columns[-1], REQUEST: PACKED, WHICH: self._parameter}
        return self.forward_cached(columns, labels)

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Tensor | None = None,
        *,
        with_backward: bool = False,
    ) -> Tensor:  # ()
        """Loss of the embeddings, by column and mini-batch: (b, D); those of the last column have
        two rows more, for scale and bias. With ``with_backward`` their ``grad`` is set."""
        *columns, last = reps
        rows = [sum(len(mini_batch) for mini_batch in column) for column in (columns[0], last)]
        if rows[0] == rows[1]:
            raise made_too_late()
        logit_scale, logit_bias = unpacked(last[-1][-2:])
        columns.append([packed[:-2] for packed in last])
        loss = self._loss(
            [torch.cat(column) for column in columns], logit_scale, logit_bias, labels
        )
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss

    def get_config_dict(self) -> dict[str, Any]:
        return super().get_config_dict() | {
            "mini_batch_size": self.mini_batch_size,
            "mini_batch_num_tokens": self.mini_batch_num_tokens,
        }
