"""All argument errors of the public functions: raised before any work, naming the argument."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from .distributed.groups import check_group_type, is_ready, look_up
from .kernels import BACKENDS, accumulate_dtype, check_backend
from .negatives import Below, Negatives
from .positives import Positives

FEATURE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
REDUCTIONS = ("mean", "sum", "none")


# By whether the argument is logit_scale or logit_bias.
_NO_DTENSOR = {
    False: (
        "this rank's rows as a plain tensor (its to_local()), and group= for the loss of all ranks"
    ),
    True: (
        "a plain tensor, as the forward of the module that holds the parameter sees it: compute "
        "the loss, or what is passed here, in there; or pass its "
        "full_tensor(grad_placements=[Partial('avg')]), since full_tensor() alone gets a wrong "
        "gradient"
    ),
}


def _kind(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")


def _choices(names: tuple[str, ...]) -> str:
    return " or ".join(repr(name) for name in names)


def _check_choice(name: str, value: object, choices: Collection[str], or_none: str = "") -> None:
    if isinstance(value, str) and value in choices:
        return
    expected = or_none + _choices(tuple(choices))
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {_kind(value)}: expected {expected}")
    raise ValueError(f"{name} is {value!r}: expected {expected}")


def _check_tensor(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {_kind(value)}: expected {expected}")
    # by its name: its module is not imported for this, and torch.compile sees no attribute of it
    if type(value).__name__ == "DTensor":
        raise TypeError(f"{name} is a DTensor: expected {_NO_DTENSOR[name.startswith('logit_')]}")
    if value.is_nested:
        raise TypeError(f"{name} is a nested tensor: expected a dense (strided) tensor")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has layout {value.layout}: expected a dense (strided) tensor")
    if value.is_meta:
        raise ValueError(f"{name} is on the meta device, which holds no values")


def check_features(image_features: Tensor, text_features: Tensor) -> torch.dtype:
    """Check both feature tensors against each other; return the dtype of the products' operands.

    Under autocast that is autocast's dtype, as for torch.matmul (which leaves float64 alone).
    """
    for name, value in (("image_features", image_features), ("text_features", text_features)):
        _check_tensor(name, value, "a tensor of shape (batch, D)")
        if value.dim() != 2:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected (batch, D)")
        if value.dtype not in FEATURE_DTYPES:
            raise TypeError(
                f"{name} has dtype {value.dtype}: expected float32, bfloat16, float16 or float64"
            )
    if image_features.device != text_features.device:
        raise ValueError(
            f"text_features is on {text_features.device} and image_features on "
            f"{image_features.device}: expected one device"
        )
    if image_features.shape[1] != text_features.shape[1]:
        raise ValueError(
            f"text_features has D = {text_features.shape[1]} and image_features D = "
            f"{image_features.shape[1]}: expected the same"
        )
    dtype, text_dtype = image_features.dtype, text_features.dtype
    device_type = image_features.device.type
    if torch.is_autocast_enabled(device_type) and torch.float64 not in (dtype, text_dtype):
        return torch.get_autocast_dtype(device_type)
    if dtype != text_dtype:
        raise TypeError(
            f"text_features has dtype {text_dtype} and image_features {dtype}: expected the same "
            "(or autocast, which casts both)"
        )
    return dtype


def check_scalar(
    name: str, value: float | Tensor, device: torch.device, dtype: torch.dtype
) -> None:
    """Check logit_scale or logit_bias: a number, or a floating tensor of one element.

    A number must fit the dtype that features of ``dtype`` accumulate in; NaN and infinity do.
    """
    if isinstance(value, Tensor):
        _check_tensor(name, value, "a number or a tensor of one element")
        if not value.dtype.is_floating_point:
            raise TypeError(f"{name} has dtype {value.dtype}: expected a floating dtype")
        if value.dim() > 1 or value.numel() != 1:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}: expected one element, () or (1,)"
            )
        if value.device != device:
            raise ValueError(f"{name} is on {value.device}: expected {device}, as the features")
    elif not isinstance(value, numbers.Real) or isinstance(value, bool):
        raise TypeError(f"{name} is a {_kind(value)}: expected a number or a tensor of one element")
    else:
        accumulate = accumulate_dtype(dtype)
        largest = torch.finfo(accumulate).max
        if largest < abs(value) < math.inf:
            raise ValueError(f"{name} does not fit {accumulate}: expected {largest:.2g} at most")


def check_pairing(
    image_features: Tensor,
    text_features: Tensor,
    image_ids: Tensor | None,
    text_ids: Tensor | None,
    negative_only: bool = False,
    alternatives: str = "or image_ids and text_ids, or negative_only=True",
) -> None:
    """Check that positives are defined: the diagonal, ids for both towers, or none at all.

    alternatives: what a function has for M != N.
    """
    if not isinstance(negative_only, bool):
        raise TypeError(f"negative_only is a {_kind(negative_only)}: expected a bool")
    if (image_ids is None) != (text_ids is None):
        given, missing = ("image_ids", "text_ids")[:: 1 if text_ids is None else -1]
        raise ValueError(f"{given} was given without {missing}: expected both or neither")
    if image_ids is None or text_ids is None:
        m, n = image_features.shape[0], text_features.shape[0]
        if m != n and not negative_only:
            raise ValueError(
                f"text_features has {n} rows and image_features {m}: expected the same number, "
                f"{alternatives}"
            )
        return
    for name, ids, features in (
        ("image_ids", image_ids, image_features),
        ("text_ids", text_ids, text_features),
    ):
        rows = features.shape[0]
        # no number of rows in words that are made ahead: torch.compile would take it for a constant
        _check_tensor(name, ids, "an integer tensor of shape (batch,)")
        if ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool:
            raise TypeError(f"{name} has dtype {ids.dtype}: expected an integer dtype")
        if ids.dtype == torch.uint64:  # its upper half would turn negative, which means padding
            raise TypeError(f"{name} has dtype torch.uint64: expected one that int64 can hold")
        if ids.shape != (rows,):
            raise ValueError(
                f"{name} has shape {tuple(ids.shape)}: expected ({rows},), one id a row"
            )
        if ids.device != features.device:
            raise ValueError(
                f"{name} is on {ids.device}: expected {features.device}, as the features"
            )


def check_row_weights(name: str, weights: Tensor | None, features: Tensor) -> None:
    """Check image_weights or text_weights but for their values: rows.check_values has those."""
    if weights is None:
        return
    rows = features.shape[0]
    _check_tensor(name, weights, "None or a floating tensor of shape (batch,)")
    if not weights.dtype.is_floating_point:
        raise TypeError(f"{name} has dtype {weights.dtype}: expected a floating dtype")
    if weights.shape != (rows,):
        raise ValueError(
            f"{name} has shape {tuple(weights.shape)}: expected ({rows},), one weight a row"
        )
    if weights.device != features.device:
        raise ValueError(
            f"{name} is on {weights.device}: expected {features.device}, as the features"
        )


def check_positives(positives: Positives | None) -> None:
    # what they hold was checked when they were made
    if positives is not None and not isinstance(positives, Positives):
        raise TypeError(
            f"positives is a {_kind(positives)}: expected None, PositiveWeight(...) or "
            "PositiveTarget(...)"
        )


def check_aligned(
    positives: Positives | None, image_features: Tensor, text_features: Tensor
) -> None:
    """Check that positives fit the batch."""
    m, n = image_features.shape[0], text_features.shape[0]
    if positives is not None and positives.aligned is not None and m != n:
        raise ValueError(
            f"positives has aligned={positives.aligned}, which is of pairs (i, i), and there "
            f"are {m} images and {n} texts: expected as many"
        )


def check_label_smoothing(label_smoothing: float) -> None:
    # float first: an abstract class takes longer to ask
    is_number = isinstance(label_smoothing, (float, numbers.Real))
    if not is_number or isinstance(label_smoothing, bool):
        raise TypeError(f"label_smoothing is a {_kind(label_smoothing)}: expected a number")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing is {label_smoothing}: expected 0 to 1")


def check_negatives(negatives: Negatives | None, negative_only: bool) -> None:
    # what they hold was checked when they were made
    if negatives is not None and not isinstance(negatives, Negatives):
        raise TypeError(
            f"negatives is a {_kind(negatives)}: expected None, Random(keep, seed), Hardest(keep), "
            "Easiest(keep) or Below(margin)"
        )
    if isinstance(negatives, Below) and negative_only:
        raise ValueError(
            "negatives is a Below and negative_only is True: expected positives, which its margin "
            "is measured from, or other negatives"
        )


def check_options(
    reduction: str,
    workspace_bytes: int | None,
    backend: str | None,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Check the options that choose how the loss is computed."""
    _check_choice("reduction", reduction, REDUCTIONS)
    if workspace_bytes is not None:
        if not isinstance(workspace_bytes, int) or isinstance(workspace_bytes, bool):
            raise TypeError(
                f"workspace_bytes is a {_kind(workspace_bytes)}: expected a number of bytes (int)"
            )
        if workspace_bytes <= 0:
            raise ValueError(f"workspace_bytes is {workspace_bytes}: expected more than 0")
        if workspace_bytes >= 2**63:
            raise ValueError("workspace_bytes does not fit 63 bits: expected less than 2**63")
    if backend is not None:
        _check_choice("backend", backend, BACKENDS, "None, ")
    check_backend(backend, device, dtype)


def check_dist_impl(dist_impl: str | None, known: Collection[str]) -> None:
    if dist_impl is not None:
        _check_choice("dist_impl", dist_impl, known, "None, ")


def check_group(
    group: dist.ProcessGroup | str | None, dist_impl: str | None, known: Collection[str]
) -> dist.ProcessGroup | None:
    """Check group and dist_impl; return the group of the global batch, None for one process."""
    check_dist_impl(dist_impl, known)
    check_group_type(group)
    if group is None and dist_impl is None:
        return None
    if group is None and not is_ready():
        raise ValueError(
            "group and dist_impl need torch.distributed: expected init_process_group before the "
            "loss"
        )
    group = look_up(group)
    return group if group is not None and dist.get_world_size(group) > 1 else None


def check_world(rank: int, world_size: int, dist_impl: str | None, known: Collection[str]) -> None:
    """Check the constructor of SigLipLoss."""
    check_dist_impl(dist_impl, known)
    for name, value in (("rank", rank), ("world_size", world_size)):
        if not isinstance(value, numbers.Integral) or isinstance(value, bool):
            raise TypeError(f"{name} is a {_kind(value)}: expected an int")
    if world_size < 1:
        raise ValueError(f"world_size is {world_size}: expected at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank is {rank}: expected 0 to {world_size - 1} (world_size - 1)")


def check_start(
    init_logit_scale: float, init_logit_bias: float, max_logit_scale: float | None
) -> None:
    """Check the constructor of LearnableSigLipLoss."""
    for name, value in (
        ("init_logit_scale", init_logit_scale),
        ("init_logit_bias", init_logit_bias),
    ):
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            raise TypeError(f"{name} is a {_kind(value)}: expected a number")
        if not math.isfinite(value):
            raise ValueError(f"{name} is {value}: expected a finite number")
    start = init_logit_scale
    if max_logit_scale is not None:
        if not isinstance(max_logit_scale, numbers.Real) or isinstance(max_logit_scale, bool):
            raise TypeError(
                f"max_logit_scale is a {_kind(max_logit_scale)}: expected a number or None"
            )
        if not max_logit_scale > 0:
            raise ValueError(f"max_logit_scale is {max_logit_scale}: expected more than 0")
        start = min(start, math.log(max_logit_scale))
    largest = math.log(torch.finfo(torch.float32).max)
    if start > largest:
        raise ValueError(
            f"init_logit_scale is {init_logit_scale}: expected the logarithm of the factor, at "
            f"most {largest:.1f} (its exp must fit float32), or a max_logit_scale"
        )


def check_membership(
    group: dist.ProcessGroup | str | None, rank: int, world_size: int
) -> dist.ProcessGroup | None:
    """Hold the rank and world_size a module was made with against its process group.

    A module with a group and neither of them (0 and 1) takes those of the group.
    """
    if not is_ready() and world_size > 1:
        raise ValueError(
            f"world_size is {world_size} without torch.distributed: expected init_process_group "
            "before the loss, or world_size=1"
        )
    taken = group is not None and (rank, world_size) == (0, 1)
    group = look_up(group)
    if group is None or taken:
        return group
    actual = (dist.get_rank(group), dist.get_world_size(group))
    if actual != (rank, world_size):
        raise ValueError(
            f"rank and world_size are {rank} and {world_size}: expected {actual[0]} and "
            f"{actual[1]}, as in the process group"
        )
    return group
