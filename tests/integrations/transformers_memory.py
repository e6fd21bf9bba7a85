"""Peak memory of a training step of transformers' SigLIP: with its own loss and with the fused one.

``python tests/integrations/transformers_memory.py fused 4096`` measures one case in its own process
and prints bytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOSSES = ("own", "fused")
DIM = 32


def peak_extra_bytes(loss: str, batch_size: int) -> int:
    """Peak resident memory of a forward and backward pass above model and batch, on a CPU.

    The towers' own activations are in it, so the towers are tiny: one layer of width 32, four
    patches, one token. In a fresh process, since one that has run before may reuse memory.
    """
    command = [sys.executable, __file__, loss, str(batch_size)]
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    if child.returncode != 0:
        raise RuntimeError(f"{command[2:]} failed ({child.returncode}):\n{child.stderr[-2000:]}")
    return int(child.stdout.split()[-1])


def memory_rows(batch_sizes: tuple[int, ...] = (1024, 4096)) -> list[dict]:
    """One row a loss and batch size, for benchmarks/common/timing.py's write_results."""
    return [
        {
            "kind": "memory",
            "stack": "transformers",
            "loss": loss,
            "batch_size": size,
            "dim": DIM,
            "dtype": "float32",
            "peak_extra_bytes": peak_extra_bytes(loss, size),
        }
        for size in batch_sizes
        for loss in LOSSES
    ]


def _measure(loss: str, batch_size: int) -> int:
    from tiny_siglip import make_batch, make_model

    from benchmarks.common.memory import WARM_UP_BATCH, peak_bytes
    from fused_siglip.integrations.transformers import patch_siglip

    model = make_model("siglip", hidden_size=DIM, num_hidden_layers=1)
    if loss == "fused":
        patch_siglip(model)

    def inputs(size: int) -> dict:
        batch = make_batch("siglip", size)
        return batch | {name: batch[name][:, :1] for name in ("input_ids", "attention_mask")}

    def step(batch: dict) -> tuple:
        loss = model(**batch, return_loss=True).loss
        loss.backward()
        return (loss.detach(),)

    step(inputs(WARM_UP_BATCH))  # loads code and fills the libraries' own pools
    batch = inputs(batch_size)
    return peak_bytes(lambda: step(batch))[0]


if __name__ == "__main__":
    print(_measure(sys.argv[1], int(sys.argv[2])))
