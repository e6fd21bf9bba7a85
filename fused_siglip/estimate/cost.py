"""What one step in the global batch costs a rank: memory, bytes, FLOPs, time. Pure functions.

A step is the loss and all four gradients; every rank has as many images as texts.
docs/distributed.md explains the formulas and holds them against measured runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..kernels import accumulate_dtype
from ..planner import PanelPlan, PlanRequest, plan_panels


class Link(NamedTuple):
    bandwidth: float  # bytes/s that one rank sends, while it receives as much
    latency: float  # seconds a hop


@dataclass(frozen=True)
class Device:
    flops: dict[torch.dtype, float]  # FLOP/s a large product sustains
    node: Link  # between the ranks of one node
    network: Link  # between nodes
    multiprocessors: int  # what the planner fits panels to


# Share of a peak rate that is reached: 790 of 989 TFLOP/s, an 8192^3 bf16 product on an H200 (the
# only one of these rates that was measured). Assumed of the other devices and of the links.
SUSTAINED = 0.8

# Seconds. NCCL's own model for its Simple protocol in a ring (src/graph/tuning.cc: baseLat, hwLat):
# per operation, per hop over NVLink, per hop over the network.
OPERATION = 8.4e-6
NVLINK_HOP, NETWORK_HOP = 3.4e-6, 9.6e-6

# Host time to enqueue what a panel and its share of a step take: about ten small operations of
# about 5 microseconds each. An order of magnitude, not a measurement.
PANEL_LAUNCHES = 50e-6

RANKS_PER_NODE = 8  # DGX and HGX of all three


def _device(
    half: float, single: float, nvlink: float, network: float, multiprocessors: int
) -> Device:
    """A device, from peak TFLOP/s of half precision and fp32 and from GB/s in one direction."""
    flops = {torch.bfloat16: half, torch.float16: half, torch.float32: single}
    return Device(
        {dtype: SUSTAINED * peak * 1e12 for dtype, peak in flops.items()},
        Link(SUSTAINED * nvlink * 1e9, NVLINK_HOP),
        Link(SUSTAINED * network * 1e9, NETWORK_HOP),
        multiprocessors,
    )


# Peaks from NVIDIA's data sheets of the SXM boards: dense tensor core bf16/fp16; fp32 outside the
# tensor cores (torch's default matmul precision); NVLink is quoted for both directions together.
# Network: the one port a GPU has in NVIDIA's own nodes.
DEVICES = {
    # 989 and 67 TFLOP/s, NVLink 900 GB/s, ConnectX-7 400 Gb/s (DGX H100, DGX H200)
    "h200": _device(989, 67, 450, 50, 132),
    "h100": _device(989, 67, 450, 50, 132),
    # 312 and 19.5 TFLOP/s, NVLink 600 GB/s, ConnectX-6 200 Gb/s (DGX A100)
    "a100": _device(312, 19.5, 300, 25, 108),
}


@dataclass(frozen=True)
class Cost:
    """What one step costs one rank."""

    peak_bytes: int  # beyond the features, the gradients that are returned included
    bytes_sent: int
    flops: int
    compute_seconds: float
    communication_seconds: float
    hidden_seconds: float  # of communication_seconds, what passes while the rank computes

    @property
    def seconds(self) -> float:
        return self.compute_seconds + self.communication_seconds - self.hidden_seconds


def _chunk_bytes(rows: int, dim: int, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of one rank's texts, and of their gradient."""
    accumulate = accumulate_dtype(dtype)
    return rows * dim * dtype.itemsize, rows * dim * accumulate.itemsize


def bytes_sent(impl: str, world_size: int, rows: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes of features and gradients a rank sends, without ids and the exchange of sizes."""
    texts, grads = _chunk_bytes(rows, dim, dtype)
    others = world_size - 1
    if impl == "gather":
        return others * (texts + grads)
    # the gradient goes all the way round, the texts stop one rank before their owner
    return others * texts + (world_size * grads if others else 0)


def step_flops(world_size: int, rows: int, dim: int) -> int:
    """FLOPs of the three products of this rank's images with all texts."""
    return 6 * rows * (world_size * rows) * dim


def _sweep_plan(
    impl: str,
    world_size: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    device_type: str,
    backend: str,
    multiprocessors: int | None,
) -> PanelPlan:
    """The panels of a sweep over the texts that come together: one rank's, or all."""
    columns = rows if impl == "ring" else world_size * rows
    request = PlanRequest(rows, columns, dim, dtype, device_type, backend)
    return plan_panels(request._replace(multiprocessors=multiprocessors))


def peak_bytes(
    impl: str,
    world_size: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    device_type: str,
    backend: str,
    multiprocessors: int | None = None,
) -> int:
    """Peak memory beyond the features, the returned gradients included.

    This is what torch allocates for the loss. The transport's own buffers are not in it.
    """
    texts, grads = _chunk_bytes(rows, dim, dtype)
    plan = _sweep_plan(impl, world_size, rows, dim, dtype, device_type, backend, multiprocessors)
    sweep = plan.peak_bytes
    if world_size == 1:
        return sweep
    if impl == "gather":
        # all texts beside the sweep; later, without both, dY beside dX and all dY
        return max(sweep + world_size * texts, world_size * grads + 2 * grads)
    # Two chunks of texts and three of gradients, of which the sweep counts one; later, without its
    # workspace, dY beside them and dX.
    return max(sweep + 2 * texts + 2 * grads, 2 * texts + 5 * grads)


def predict(
    impl: str,
    world_size: int,
    rows: int,
    dim: int,
    dtype: torch.dtype,
    device: Device,
    backend: str = "torch",
) -> Cost:
    """The cost of a step on a cluster.

    Args:
        impl: "ring" or "gather".
        world_size: number of ranks.
        rows: images, and texts, on each rank.
        dim: D, the dimension of the features.
        dtype: of the features.
        device: one of ``DEVICES``, or rates of your own.
        backend: whose panels are planned.
    """
    texts, grads = _chunk_bytes(rows, dim, dtype)
    link = device.node if world_size <= RANKS_PER_NODE else device.network
    others = world_size - 1
    flops = step_flops(world_size, rows, dim)

    panels_for = ("cuda", backend, device.multiprocessors)
    plan = _sweep_plan(impl, world_size, rows, dim, dtype, *panels_for)
    columns = rows if impl == "ring" else world_size * rows
    panels = -(-rows // max(plan.rows, 1)) * -(-columns // max(plan.cols, 1))
    sweeps = world_size if impl == "ring" else 1
    sweep = max(flops / sweeps / device.flops[dtype], panels * PANEL_LAUNCHES)

    def exchange(nbytes: int, hops: int = 1) -> float:
        return OPERATION + hops * link.latency + nbytes / link.bandwidth

    hidden = 0.0
    if others == 0:
        communication = 0.0
    elif impl == "gather":
        communication = exchange(others * texts, others) + exchange(others * grads, others)
    else:
        # the first sweep has no gradient beside it yet, the last no texts any more
        beside = [texts, *[texts + grads] * (world_size - 2), grads]
        communication = sum(map(exchange, beside)) + exchange(grads)
        hidden = sum(min(sweep, exchange(nbytes)) for nbytes in beside)
    return Cost(
        peak_bytes(impl, world_size, rows, dim, dtype, *panels_for),
        bytes_sent(impl, world_size, rows, dim, dtype),
        flops,
        sweeps * sweep,
        communication,
        hidden,
    )
