"""The loss of the global batch in real processes on this machine: time, traffic and peak memory.

``python -m benchmarks.suites.distributed`` prints tables, writes their rows to a results file and
draws docs/distributed_memory.png; README.md says how each number is measured.
"""

from __future__ import annotations

import argparse
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import fused_siglip
from fused_siglip.estimate import cost
from tests.support.processes import launch, returned

from ..common.baselines import open_clip_loss_module
from ..common.memory import hold_no_freed_memory, peak_bytes
from ..common.results import ROOT, environment, write_results
from ..common.timing import interleaved, median
from ..common.traffic import counted

# How many times (W - 1) chunks, each the size of a rank's texts, a rank sends in a step of
# open_clip's: once forward and once backward; "reduce" finds each chunk as a sum with zeros, at
# twice the price.
OPEN_CLIP_SENDS = {"bidir": 2, "shift": 2, "reduce": 4, "gather": 2}
MODES = [("fused", "ring"), ("fused", "gather"), *(("open_clip", i) for i in OPEN_CLIP_SENDS)]
WARM_UP_BATCH = 64
LIMIT = 1800.0  # seconds a launch may take
DTYPE = torch.float32

Step = Callable[[], tuple[Tensor, ...]]


def make_step(whose: str, impl: str, rank: int, world_size: int, rows: int, dim: int) -> Step:
    """A function that computes this rank's loss and gradients."""
    # open_clip calls what torch has new names for
    warnings.filterwarnings("ignore", "torch.distributed.nn.functional", FutureWarning)
    package = fused_siglip if whose == "fused" else open_clip_loss_module()
    loss = package.SigLipLoss(rank=rank, world_size=world_size, dist_impl=impl)
    generator = torch.Generator().manual_seed(rank)
    x, y = (F.normalize(torch.randn(rows, dim, generator=generator)) for _ in range(2))
    leaves = [v.requires_grad_() for v in (x, y, torch.tensor(10.0), torch.tensor(-10.0))]

    def step() -> tuple[Tensor, ...]:
        value = loss(*leaves)
        return (value.detach(), *torch.autograd.grad(value, leaves))

    return step


def peak_of_step(rank: int, world_size: int, rows: int, dim: int, whose: str, impl: str) -> int:
    """In a fresh process: peak memory of a step above its features, the gradients included."""
    hold_no_freed_memory()
    # connects the ranks, loads code
    make_step(whose, impl, rank, world_size, min(rows, WARM_UP_BATCH), dim)()
    step = make_step(whose, impl, rank, world_size, rows, dim)
    dist.barrier()
    return peak_bytes(step)[0]


def peak_of_collectives(rank: int, world_size: int, rows: int, dim: int) -> dict[str, int]:
    """What gloo itself allocates at most, beyond the tensors it is given."""
    hold_no_freed_memory()
    all_gather = fused_siglip.distributed.collectives.all_gather
    reduce_scatter = fused_siglip.distributed.collectives.reduce_scatter
    right, left = (rank + 1) % world_size, (rank - 1) % world_size

    def exchange(out: Tensor, into: Tensor) -> None:
        for work in dist.batch_isend_irecv(
            [dist.P2POp(dist.isend, out, right), dist.P2POp(dist.irecv, into, left)]
        ):
            work.wait()

    def peaks(rows: int) -> dict[str, int]:
        one, other = torch.ones(rows, dim), torch.ones(rows, dim)
        everyone = torch.ones(world_size * rows, dim)
        calls = {
            "send and receive": lambda: exchange(one, other),
            "all-gather": lambda: all_gather(everyone, one),
            "reduce-scatter": lambda: reduce_scatter(one, everyone),
            "all-reduce": lambda: dist.all_reduce(one),
        }
        found = {}
        for name, call in calls.items():
            dist.barrier()
            found[name] = peak_bytes(lambda call=call: (call(),))[0]
        return found

    peaks(min(rows, WARM_UP_BATCH))
    return peaks(rows)


def times_and_traffic(
    rank: int, world_size: int, rows: int, dim: int, repeats: int
) -> dict[tuple[str, str], dict]:
    """For every mode this rank's seconds of each step, those inside exchanges, and bytes sent."""
    steps = {mode: make_step(*mode, rank, world_size, rows, dim) for mode in MODES}
    inside: dict[tuple[str, str], list[float]] = {mode: [] for mode in MODES}
    sent, losses = {}, {}
    with counted() as traffic:

        def measured(mode: tuple[str, str]) -> None:
            traffic.reset()
            losses[mode] = steps[mode]()[0].item()
            inside[mode].append(traffic.seconds)
            sent[mode] = traffic.bytes_sent

        functions: dict[str, Callable[[], object]] = {}
        for mode in MODES:  # a barrier before each, which is timed as a function of its own
            functions[f"barrier {mode}"] = dist.barrier
            functions[str(mode)] = lambda mode=mode: measured(mode)
        seconds = interleaved(functions, repeats)
    return {
        mode: {
            "seconds": seconds[str(mode)],
            "inside": inside[mode][-repeats:],
            "bytes_sent": sent[mode],
            "loss": losses[mode],
        }
        for mode in MODES
    }


def measure(world_sizes: Sequence[int], rows: int, dim: int, repeats: int) -> Iterator[list[dict]]:
    """The rows of each world size, those of the modes and those of gloo's own memory."""
    total = len(world_sizes) * (len(MODES) + 2)
    with tqdm(total=total, unit="launch", leave=False) as bar:
        for world_size in world_sizes:
            shape = {"world_size": world_size, "local_batch": rows, "dim": dim}
            bar.set_description(f"W = {world_size}")
            times = returned(launch(times_and_traffic, world_size, rows, dim, repeats, limit=LIMIT))
            bar.update()
            found = []
            for mode in MODES:
                peaks = returned(launch(peak_of_step, world_size, rows, dim, *mode))
                bar.update()
                row = _row(*mode, **shape, ranks=[rank[mode] for rank in times])
                found.append(row | {"peak_bytes": max(peaks), "peak_bytes_smallest": min(peaks)})
            if world_size > 1:
                collectives = returned(launch(peak_of_collectives, world_size, rows, dim))
                for name in collectives[0]:
                    peak = max(rank[name] for rank in collectives)
                    found.append({"kind": "gloo", "operation": name, **shape, "peak_bytes": peak})
            bar.update()
            yield found


def _row(
    whose: str, impl: str, world_size: int, local_batch: int, dim: int, ranks: list[dict]
) -> dict:
    rounds = range(len(ranks[0]["seconds"]))
    # a step ends when its last rank does; ranks wait for each other inside the exchanges
    seconds = [max(r["seconds"][i] for r in ranks) for i in rounds]
    inside = [sum(r["inside"][i] for r in ranks) / len(ranks) for i in rounds]
    predicted = None
    if whose == "fused":
        expected = cost.bytes_sent(impl, world_size, local_batch, dim, DTYPE)
        predicted = cost.peak_bytes(impl, world_size, local_batch, dim, DTYPE, "cpu", "torch")
    else:
        chunk = local_batch * dim * DTYPE.itemsize
        expected = OPEN_CLIP_SENDS[impl] * (world_size - 1) * chunk
    return {
        "kind": "distributed",
        "loss": whose,
        "dist_impl": impl,
        "world_size": world_size,
        "local_batch": local_batch,
        "dim": dim,
        "dtype": str(DTYPE).removeprefix("torch."),
        "repeats": len(rounds),
        "seconds": median(seconds),
        "communication_seconds": median(inside),
        "compute_seconds": median(s - c for s, c in zip(seconds, inside, strict=True)),
        "bytes_sent": max(r["bytes_sent"] for r in ranks),
        "bytes_formula": expected,
        "predicted_peak_bytes": predicted,
        "mean_loss": sum(r["loss"] for r in ranks) / len(ranks),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.distributed", description=__doc__)
    parser.add_argument("--world-sizes", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--local-batch", type=int, default=1024)
    parser.add_argument("--dim", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=5, help="steps of each mode")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    parser.add_argument("--plot", type=Path, default=ROOT / "docs" / "distributed_memory.png")
    args = parser.parse_args(arguments)
    # here, so that the ranks need not load matplotlib
    from ..common.plots import plot_distributed
    from ..report.distributed_report import growth, modes_table

    if args.quick:
        args.world_sizes, args.local_batch, args.dim, args.repeats = [1, 2, 3], 128, 64, 2

    where = environment() | {"threads": 1, "cores": os.cpu_count()}  # of a rank, of all
    print(", ".join(f"{key} {value}" for key, value in where.items() if key != "commit"))
    rows: list[dict] = []
    for new in measure(args.world_sizes, args.local_batch, args.dim, args.repeats):
        shape = f"{args.local_batch} x {args.dim} fp32 on every rank"
        print(f"\nW = {new[0]['world_size']}, {shape}\n{modes_table(new)}", flush=True)
        rows += new
    changes = growth(rows).replace(", ", "\n")
    print(f"\npeak memory per rank, from the smallest world of several to the largest:\n{changes}")
    path = write_results("distributed", where, rows, args.output)
    plot_distributed(rows, where, args.plot)
    print(f"\n{len(rows)} rows written to {path}")


if __name__ == "__main__":
    main()
