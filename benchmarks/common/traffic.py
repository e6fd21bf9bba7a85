"""What a process hands to torch.distributed: bytes sent, and seconds spent inside.

The functions are wrapped from outside for the duration of a block; the code that calls them is
measured as it is.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from unittest import mock

import torch.distributed as dist

import fused_siglip.distributed.collectives


@dataclass
class Traffic:
    """What this rank exchanged since the last reset.

    Bytes of a collective are the least a rank can send in it: W - 1 blocks in an all-gather, a
    reduce-scatter or a scatter of W blocks, 2 (W - 1) / W of the tensor in an all-reduce.
    """

    bytes_sent: int = 0
    seconds: float = 0.0  # starting exchanges, waiting for them and for other ranks

    def reset(self) -> None:
        self.bytes_sent, self.seconds = 0, 0.0


class _TimedWork:
    def __init__(self, work: dist.Work, traffic: Traffic):
        self.work, self.traffic = work, traffic

    def wait(self) -> bool:
        start = time.perf_counter()
        try:
            return self.work.wait()
        finally:
            self.traffic.seconds += time.perf_counter() - start


def _others(group: dist.ProcessGroup | None) -> int:
    return dist.get_world_size(group) - 1


def _batch_isend_irecv(operations: list[dist.P2POp]) -> int:
    return sum(op.tensor.nbytes for op in operations if op.op is dist.isend)


def _all_gather(out, tensor, group=None, **_) -> int:
    return _others(group) * tensor.nbytes


def _all_to_all(out, tensor, group=None, **_) -> int:
    return _others(group) * tensor.nbytes // (_others(group) + 1)


def _reduce_scatter(out, tensor, group=None, **_) -> int:
    return _others(group) * out.nbytes


def _all_reduce(tensor, op=None, group=None, **_) -> int:
    return 2 * tensor.nbytes * _others(group) // (_others(group) + 1)


def _scatter(tensor, scatter_list=None, src=None, group=None, **_) -> int:
    return _others(group) * tensor.nbytes if scatter_list else 0  # the source alone has a list


# Ours under the names it calls; the others as open_clip and torch.distributed.nn call them.
_WRAPPED: list[tuple[object, str, Callable[..., int]]] = [
    (fused_siglip.distributed.collectives, "all_gather", _all_gather),
    (fused_siglip.distributed.collectives, "reduce_scatter", _reduce_scatter),
    (dist, "batch_isend_irecv", _batch_isend_irecv),
    (dist, "all_gather", _all_gather),
    (dist, "all_reduce", _all_reduce),
    (dist, "all_to_all_single", _all_to_all),
    (dist, "scatter", _scatter),
]


@contextlib.contextmanager
def counted() -> Iterator[Traffic]:
    """Count what this process exchanges inside the block."""
    traffic = Traffic()

    def wrap(function: Callable, sent: Callable[..., int]) -> Callable:
        def call(*args, **kwargs):
            traffic.bytes_sent += sent(*args, **kwargs)
            start = time.perf_counter()
            try:
                result = function(*args, **kwargs)
            finally:
                traffic.seconds += time.perf_counter() - start
            if isinstance(result, list):  # the works of a batch
                return [_TimedWork(work, traffic) for work in result]
            return result

        return call

    with contextlib.ExitStack() as stack:
        for owner, name, sent in _WRAPPED:
            wrapper = wrap(getattr(owner, name), sent)
            stack.enter_context(mock.patch.object(owner, name, wrapper))
        yield traffic
