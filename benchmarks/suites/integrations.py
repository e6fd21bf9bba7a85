"""Peak memory of each training stack's own loss and of the fused one in its place, on a CPU.

    make bench-integrations      # measures, and writes a results file

What is measured is what the tests of the integrations assert on: tests/integrations/.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import sentence_models
import transformers_memory
from tqdm import tqdm

from ..common.memory import peak_extra_bytes
from ..common.results import environment, write_results
from ..common.workloads import Case

BATCH_SIZES = (1024, 4096)
DIM = 256  # of the losses that are measured alone


def _cases(size: int) -> Iterator[tuple[dict, Callable[[], int]]]:
    """For each row of one batch size its fields, and the function that measures it."""
    for loss, name in (("open_clip", "SigLipLoss of open_clip"), ("fused_torch", "SigLipLoss")):
        row = {"stack": "open_clip", "what": "loss alone", "loss": name, "dim": DIM}
        yield row, partial(peak_extra_bytes, Case(loss, size, DIM))
    for loss in ("MultipleNegativesRankingLoss", "SigLipLoss", "CachedSigLipLoss"):
        row = {"stack": "sentence-transformers", "what": "loss alone", "loss": loss, "dim": DIM}
        yield row, partial(sentence_models.peak_extra_bytes, loss, size, dim=DIM)
    for loss, name in (("own", "SiglipModel"), ("fused", "SiglipModel, patched")):
        row = {"stack": "transformers", "what": "step of tiny towers", "loss": name}
        row["dim"] = transformers_memory.DIM
        yield row, partial(transformers_memory.peak_extra_bytes, loss, size)


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.suites.integrations", description=__doc__)
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args()
    found, rows = environment(), []
    for size in BATCH_SIZES:
        for row, measure in tqdm(list(_cases(size)), desc=f"B = {size}", leave=False):
            row |= {"kind": "memory", "batch_size": size, "dtype": "float32"}
            rows.append(row | {"peak_extra_bytes": measure()})
            print(f"{row['stack']}, {row['loss']}, B = {size}: "
                  f"{rows[-1]['peak_extra_bytes'] / 2**20:.0f} MiB", flush=True)  # fmt: skip
    print(f"written to {write_results('integrations', found, rows, args.output)}")


if __name__ == "__main__":
    main()
