"""torch's collectives as the loss calls them: one name a version, and errors in our words."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor

# torch 2.13 renamed the collectives over one tensor and warns of the old names
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def resolve_group(group_name: str) -> dist.ProcessGroup:
    # by any name: torch's type for names is a str, and younger than the oldest torch that works
    resolve: Callable[[Any], dist.ProcessGroup] = dist.distributed_c10d._resolve_process_group
    return resolve(group_name)


@contextlib.contextmanager
def comm_errors(group: dist.ProcessGroup, what: str) -> Iterator[None]:
    """Say what failed where a collective ends in an error of its transport."""
    try:
        yield
    except RuntimeError as error:
        raise RuntimeError(
            f"fused_siglip: rank {dist.get_rank(group)} of {dist.get_world_size(group)} lost "
            f"contact in the {what}: another rank failed, left the group or is late"
        ) from error


def all_reduce(tensor: Tensor, op: str, group: dist.ProcessGroup, what: str) -> Tensor:
    """Replace ``tensor`` by its "SUM" or "MAX" over the ranks."""
    with comm_errors(group, what):
        dist.all_reduce(tensor, getattr(dist.ReduceOp, op), group)
    return tensor
