"""Panel kernels: one backend a file, each a class with the interface of :class:`Panel`.

Installed as ``fused_siglip.kernels``. Importing this package imports neither triton nor a device.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# fp16 holds dL/dz of an easy negative (4.5e-5 at b = -10) only as a subnormal. Panels in fp16 are
# written times this power of two, and the two products divide by it: exact, and |g| <= 1 cannot
# overflow.
GRAD_SCALE = {torch.float16: 2.0**15}

OLDEST_CAPABILITY = (8, 0)  # of CUDA devices that the Triton kernel is compiled for

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def multiplies_half_into_fp32(device_type: str) -> bool:
    """Whether torch's products take half operands and accumulate into an fp32 output.

    CUDA does (out_dtype, with an fp32 addend since torch 2.10); ROCm builds refuse it.
    """
    return device_type == "cuda" and torch.version.hip is None


def float32_products(device_type: str = "cuda") -> str:
    """How torch multiplies float32 matrices there: "ieee", or rounded first, such as "tf32".

    ``torch.set_float32_matmul_precision`` sets what is read here too;
    ``torch.get_float32_matmul_precision`` raises once a user has set this attribute.
    """
    of_device = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    precision = of_device.matmul.fp32_precision
    return "ieee" if precision == "none" else precision


class Positives(NamedTuple):
    """Which pairs of one panel are positive. Without ids and without diagonal: none."""

    diagonal: int | None = None  # local pair (i, i + diagonal) is positive
    image_ids: Tensor | None = None  # (m,) int64; pair (i, j) is positive where the ids are equal
    text_ids: Tensor | None = None  # (n,) int64; and takes no part where either is negative

    def block(self, rows: slice) -> Positives:
        """Of some rows of the panel."""
        diagonal = None if self.diagonal is None else self.diagonal + rows.start
        image_ids = None if self.image_ids is None else self.image_ids[rows]
        return Positives(diagonal, image_ids, self.text_ids)


class RandomPairs(NamedTuple):
    """Negatives kept by a hash of the pair (see fused_siglip/negatives.py)."""

    image_keys: Tensor  # (m,) int32
    text_keys: Tensor  # (n,) int32
    below: int  # kept where the pair's hash, an int32, is below it

    @property
    def share(self) -> float:
        """Of pairs that are kept, on average."""
        return (self.below + 2**31) / 2**32

    def block(self, rows: slice, cols: slice = slice(None)) -> RandomPairs:
        """Of some rows and columns."""
        return RandomPairs(self.image_keys[rows], self.text_keys[cols], self.below)


class AtLeast(NamedTuple):
    """Negatives kept by their logit: dropped where (s - centre) * factor < least (NaN is kept)."""

    centres: Tensor  # (m,) accumulation dtype, as are the others
    factors: Tensor  # (m,) (s - centre) * factor lies within -1 and 1, the first to keep highest
    least: Tensor  # (m,)

    def block(self, rows: slice, cols: slice = slice(None)) -> AtLeast:
        """Of some rows; thresholds hold for every column."""
        return AtLeast(*(of_images[rows] for of_images in self))


class Panel(Protocol):
    """What a backend does with one panel: product, scale and bias, log-sigmoid, dL/dz."""

    tile: tuple[int, int]  # panel sides are multiples of it (the last panel may be smaller)
    # The sum of g*s is left 0, the caller takes it from g Y or g^T X; of a single panel, puts it
    # into totals[1].
    gs_from_products: bool
    # D and the rows' distance are multiples of it, features adjacent, addresses multiples of 16
    # bytes: see aligned and aligned_ids
    align: int
    count_bits: tuple[int, ...]  # of a place that count() tells apart in each step, 20 in all

    @staticmethod
    def workspace_bytes(
        rows: int,
        cols: int,
        dtype: torch.dtype,
        write_g: bool,
        scalar_grads: bool,
        selects: bool = False,
    ) -> int:
        """Bytes the constructor allocates; the arguments are the constructor's."""

    def __init__(
        self,
        rows: int,
        cols: int,
        dtype: torch.dtype,  # of the operands x, y and g
        device: torch.device,
        write_g: bool,
        scalar_grads: bool,
        selects: bool = False,  # negatives are chosen, or counted
    ): ...

    def __call__(
        self,
        x: Tensor,  # (m, D) image features, m <= rows; right with any strides
        y: Tensor,  # (n, D) text features, n <= cols; likewise
        logit_scale: Tensor,  # () in the accumulation dtype
        logit_bias: Tensor,  # () likewise
        positives: Positives,
        sums: Tensor | None,  # (3,) accumulation dtype, overwritten: sums of softplus(u), g*s and
        # g; without scalar_grads (1,), the first. None: they stay in ``partials``
        kept: RandomPairs | AtLeast | None = None,  # None: all negatives
    ) -> Tensor | None:  # (m, n) g times GRAD_SCALE in dtype, a view of the workspace; or None
        ...

    partials: Tensor  # (3 or 1, k) what adds up to the sums of the last call, given None for them

    @staticmethod
    def finish(
        partials: Tensor,  # (3 or 1, k) accumulation dtype: sums, as in a call, over parts of pairs
        logit_scale: Tensor,  # () likewise
        divisor: float | Tensor,  # ()
        factor: float = 1.0,
    ) -> tuple[Tensor, Tensor]:  # (), (3,) accumulation dtype
        """The loss, and [sum of g*s, sum of g, t / factor], all over ``divisor``: the gradients of
        t and of b, and what those of the features, made times ``factor``, are to be multiplied by.
        """

    def add_product(
        self,
        out: Tensor,  # (m, D) or, transposed, (n, D), accumulation dtype
        g: Tensor,  # (m, n) from the last call
        other: Tensor,  # (n, D) or, transposed, (m, D)
        alpha: float,
        fresh: bool,
        transposed: bool,
    ) -> None:
        """out = alpha * g @ other (g^T @ other), added to what is there unless ``fresh``.

        Where nothing was kept nothing is multiplied: a tile at a time, or better.
        """

    def count(
        self,
        x: Tensor,  # (m, D)
        y: Tensor,  # (n, D)
        positives: Positives,
        centres: Tensor,  # (m,) of AtLeast
        factors: Tensor,  # (m,) likewise
        known: Tensor | None,  # (m,) int32: the bits of earlier steps; None in the first one
        step: int,
        counts: Tensor,  # (m, 2**count_bits[step]) int32, added to; contiguous
    ) -> None:
        """Count an image's negatives by the place (see places.py) of (s - centre) * factor.

        Its bits are told apart from the first to the last: the bin is those that come after the
        ``known`` ones, and only negatives with these are counted. NaN has the highest place.
        """


def triton_obstacle(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why the Triton backend cannot run on this device and dtype, or None where it can."""
    device = torch.device(device)
    if not _TRITON_INSTALLED:
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "it has no float64 (use backend='torch')"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it needs a CUDA or ROCm device, not {device.type} (or TRITON_INTERPRET=1 to debug)"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.is_available():
        found = torch.cuda.get_device_properties(device)  # which torch.compile knows for a constant
        if (found.major, found.minor) < OLDEST_CAPABILITY:
            return (
                "it needs CUDA compute capability 8.0 or newer, this device has "
                f"{found.major}.{found.minor}"
            )
    return None


def check_backend(name: str | None, device: torch.device, dtype: torch.dtype) -> None:
    """Raise ValueError where Triton was asked for by name and cannot run."""
    obstacle = triton_obstacle(device, dtype) if name == "triton" else None
    if obstacle is not None:
        raise ValueError(f"backend='triton' cannot run here: {obstacle}")


def default_obstacle(device: torch.device | str, dtype: torch.dtype) -> str | None:
    """Why Triton is not what a caller gets who names no backend, or None where it is."""
    obstacle = triton_obstacle(device, dtype)
    if obstacle is None and torch.device(device).type != "cuda":
        return f"it is only chosen on a CUDA or ROCm device, not on {torch.device(device).type}"
    return obstacle


def default_backend(device: torch.device | str, dtype: torch.dtype) -> str:
    """The backend for a caller who names none: Triton on a GPU where it can, else torch."""
    return "triton" if default_obstacle(device, dtype) is None else "torch"


@functools.cache
def _torch_panel() -> type[Panel]:
    from .panel_torch import TorchPanel

    return TorchPanel


@functools.cache
def _triton_panel() -> type[Panel]:
    from .panel_triton import TritonPanel

    return TritonPanel


# What ``backend=`` takes, and how to get the class behind it: triton is imported only when asked
# for.
BACKENDS: dict[str, Callable[[], type[Panel]]] = {"torch": _torch_panel, "triton": _triton_panel}


def panel_class(name: str) -> type[Panel]:
    """The class behind a backend's name."""
    return BACKENDS[name]()


_VECTOR_BYTES = 16  # the widest load; Triton's launcher tells such addresses from others


def at_aligned_address(tensor: Tensor) -> bool:
    """Whether a tensor starts where a load of full width may."""
    return tensor.data_ptr() % _VECTOR_BYTES == 0


def aligned(features: Tensor, align: int) -> bool:
    """Whether (m, D) features suit a panel with this ``align``.

    Otherwise the sweep hands the panel a copy, padded with zeros, since every row would be read
    element by element: by a kernel that is compiled anew and spills its registers.
    """
    if align == 1:
        return True
    rows, adjacent = features.stride()
    dense = adjacent == 1 and rows % align == 0 and features.shape[1] % align == 0
    return dense and at_aligned_address(features)


def aligned_ids(ids: Tensor | None, align: int) -> Tensor | None:  # (m,)
    """Ids as a panel with this ``align`` reads them: adjacent, and starting as features do."""
    if ids is None or align == 1 or (ids.is_contiguous() and at_aligned_address(ids)):
        return ids
    return ids.clone(memory_format=torch.contiguous_format)
