"""What a call of the loss asks for, apart from its tensors: bundled, and flattened in one place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch


class GradMask(NamedTuple):
    """Which gradients are computed. One that nobody needs costs nothing."""

    image: bool = True  # dX: 2*M*N*D FLOPs
    text: bool = True  # dY: 2*M*N*D FLOPs
    scalars: bool = True  # of scale and bias


NO_GRADS = GradMask(False, False, False)


class NegativeChoice(NamedTuple):
    """Which negatives take part, in what an operator's schema can hold."""

    kind: str | None = None  # a name in negatives.KINDS; None: all of them
    amount: float = 1.0  # the share to keep, or the margin
    seed: int = 0

    @property
    def by_score(self) -> bool:
        return self.kind in ("hardest", "easiest")


ALL_NEGATIVES = NegativeChoice()


class PositiveChoice(NamedTuple):
    """How much positives count, or which targets they have, in what a schema can hold."""

    kind: str | None = None  # a name in positives.POSITIVE_KINDS; None: each counts 1
    pair: float = 1.0
    per_image: float = 0.0
    per_text: float = 0.0
    aligned: float | None = None

    @property
    def counts(self) -> bool:
        """Whether it depends on how many positives a row has."""
        return self.per_image != 0 or self.per_text != 0

    @property
    def alone(self) -> float:
        """That of a pair without other positives."""
        if self.aligned is not None:
            return self.aligned
        return self.pair + self.per_image + self.per_text

    @property
    def largest(self) -> float:
        return max(self.pair + self.per_image + self.per_text, self.aligned or 0.0)


ALL_ALIKE = PositiveChoice()


class Execution(NamedTuple):
    """How a sweep is run."""

    backend: str  # a name in kernels.BACKENDS
    workspace_bytes: int | None = None  # None: the planner's choice


FUNCTIONS = ("siglip_loss", "retrieval_ranks", "logit_statistics")  # what a group may call


class LossSpec(NamedTuple):
    """Everything a call asks for that is not a tensor."""

    grads: GradMask
    negative_only: bool
    negatives: NegativeChoice
    positives: PositiveChoice
    label_smoothing: float
    reduction: str
    backend: str | None  # None: the default of the features' device
    workspace_bytes: int | None
    group_name: str | None  # None: this process's own batch
    dist_impl: str | None
    dtype: torch.dtype | None  # of the products' operands; None: that of the image features
    function: str = FUNCTIONS[0]  # that was called: no operator of the loss is told

    def with_grads(self, grads: GradMask) -> LossSpec:
        return LossSpec(grads, *self[1:])

    def to_op(self) -> tuple[Any, ...]:
        """The operator's arguments after the tensors, in the order of :data:`SCHEMA`."""
        return (
            self.negative_only, *self.grads, self.workspace_bytes, self.backend, self.group_name,
            self.dist_impl, self.reduction, *self.negatives, *self.positives, self.label_smoothing,
            self.dtype,
        )  # fmt: skip

    @classmethod
    def from_op(cls, *flat: Any, dtype: torch.dtype | None = None) -> LossSpec:
        """The spec of an operator's arguments after the tensors; torch leaves defaults out."""
        negative_only, image, text, scalars, workspace_bytes, backend, group_name = flat[:7]
        dist_impl, reduction = flat[7:9]
        negatives, positives = NegativeChoice(*flat[9:12]), PositiveChoice(*flat[12:17])
        return cls(
            GradMask(image, text, scalars), negative_only, negatives, positives, flat[17],
            reduction, backend, workspace_bytes, group_name, dist_impl, *(flat[18:] or (dtype,)),
        )  # fmt: skip


# The operator's arguments after the tensors.
SCHEMA = (
    "bool negative_only, bool need_image_grad, bool need_text_grad, bool need_scalar_grads, "
    "int? workspace_bytes, str? backend, str? group_name, str? dist_impl, str reduction, "
    "str? negatives, float amount, SymInt seed, str? positives, float pair, float per_image, "
    "float per_text, float? aligned, float label_smoothing, ScalarType? dtype=None"
)
