"""``make longrun STEPS=n``: training steps whose batch size changes, watched for growth and drift.

Every step takes another batch; a third carry ids and padding, half are bfloat16, and the float32
ones go through torch.compile. At checkpoints a fixed batch must give the bits it gave at the start,
the step just made must be as exact as ever, and memory, Python objects and compiled graphs are
counted.
"""

from __future__ import annotations

import argparse
import gc
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from benchmarks.common.results import environment, write_results
from fused_siglip import siglip_loss
from support.inputs import Inputs, loss_and_grads, make_inputs
from support.tolerances import error_ratios

LARGEST = 512


def rss() -> int:
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def batch_of(step: int) -> Inputs:
    draw = random.Random(step)
    dtype = torch.float32 if step % 4 < 2 else torch.bfloat16
    size = draw.randint(2, LARGEST)  # torch.compile takes 1 for a constant
    return make_inputs(size, size, 32, dtype, ids=step % 3 == 0, seed=step)


def paired(x, y, t, b):
    return siglip_loss(x, y, t, b)


def with_ids(x, y, t, b, image_ids, text_ids):
    return siglip_loss(x, y, t, b, image_ids=image_ids, text_ids=text_ids)


def run(steps: int, checkpoints: int) -> Iterator[dict]:
    """A row at each checkpoint, the first after a tenth of the way to the second."""
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    # one function a kind, as in a training loop: dynamo forgets sizes where ids come and go
    compiled = [torch.compile(f, fullgraph=True, backend=counter) for f in (paired, with_ids)]
    probe = make_inputs(300, 300, 32, torch.bfloat16)
    expected = loss_and_grads(siglip_loss, probe)
    sizes, every = set(), max(steps // checkpoints, 1)
    for step in range(1, steps + 1):
        inputs = batch_of(step)
        sizes.add(len(inputs.image_features))
        float32 = inputs.image_features.dtype == torch.float32
        values = loss_and_grads(compiled[bool(inputs.ids)] if float32 else siglip_loss, inputs)
        if step % every and step != every // 10:
            continue
        again = loss_and_grads(siglip_loss, probe)
        gc.collect()
        yield {
            "kind": "checkpoint",
            "step": step,
            "sizes": len(sizes),
            "graphs": counter.frame_count,
            "rss_bytes": rss(),
            "objects": len(gc.get_objects()),
            "share": max(error_ratios(values, inputs).values()),
            "same_bits": all(torch.equal(a, e) for a, e in zip(again, expected, strict=True)),
        }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="longrun", description=__doc__)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--checkpoints", type=int, default=10)
    parser.add_argument("--output", type=Path, help="write a results file")
    args = parser.parse_args(arguments)
    found, rows = environment(), []
    for row in run(args.steps, args.checkpoints):
        rows.append(row)
        print(row, flush=True)
    if args.output is not None:
        write_results("longrun", found, rows, args.output)
    good = all(row["same_bits"] and row["share"] <= 1 for row in rows)
    return int(not good or rows[-1]["graphs"] > rows[0]["graphs"])


if __name__ == "__main__":
    sys.exit(main())
