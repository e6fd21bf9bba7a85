"""What a call costs the host, on a batch so small that nothing else takes time.

    python -m benchmarks.suites.host      # prints; microseconds depend on the machine, ratios less

Loss and all four gradients of 4 x 8 features on one thread of a CPU, the torch backend. On a GPU
much the same calls are made, and a step on a small batch takes as long as they do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from ..common.baselines import LOSSES
from ..common.timing import interleaved, quantile
from ..common.workloads import make_inputs, step

BASELINES = ("fused_torch", "eager", "open_clip")


def measure(calls: int) -> dict[str, list[float]]:
    """Seconds of every call, in turn."""
    inputs = make_inputs(4, 8, "float32", "cpu")
    known = {name: LOSSES[name] for name in BASELINES if LOSSES[name].obstacle("cpu") is None}
    steps = {name: step(baseline.loss, inputs) for name, baseline in known.items()}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return interleaved(steps, calls, warmup=min(calls, 300))
    finally:
        torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.host", description=__doc__)
    parser.add_argument("--calls", type=int, default=3000)
    args = parser.parse_args(arguments)
    seconds = measure(args.calls)
    # of a busy machine the fastest calls say most
    fast = {name: quantile(values, 0.1) for name, values in seconds.items()}
    for name, value in fast.items():
        print(f"{name:<12} {value * 1e6:6.0f} us  {value / fast['eager']:.2f} of eager")


if __name__ == "__main__":
    main()
