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
    keep: float = 1.0
    seed: int = 0

    @property
    def by_score(self) -> bool:
        return self.kind in ("hardest", "easiest")


ALL_NEGATIVES = NegativeChoice()


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
            self.dist_impl, self.reduction, *self.negatives, self.dtype,
        )  # fmt: skip

    @classmethod
    def from_op(  # noqa: PLR0913, an operator takes no bundles
        cls,
        negative_only: bool,
        image: bool,
        text: bool,
        scalars: bool,
        workspace_bytes: int | None,
        backend: str | None,
        group_name: str | None,
        dist_impl: str | None,
        reduction: str,
        kind: str | None,
        keep: float,
        seed: int,
        dtype: torch.dtype | None = None,
    ) -> LossSpec:
        """The spec of an operator's arguments after the tensors."""
        return cls(
            GradMask(image, text, scalars), negative_only, NegativeChoice(kind, keep, seed),
            reduction, backend, workspace_bytes, group_name, dist_impl, dtype,
        )  # fmt: skip


# The operator's arguments after the tensors.
SCHEMA = (
    "bool negative_only, bool need_image_grad, bool need_text_grad, bool need_scalar_grads, "
    "int? workspace_bytes, str? backend, str? group_name, str? dist_impl, str reduction, "
    "str? negatives, float keep, SymInt seed, ScalarType? dtype=None"
)
