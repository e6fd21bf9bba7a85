"""Writes a results file of the lines that no test runs, and why, from coverage's report.

``make coverage`` calls ``python -m benchmarks.report.coverage_report REPORT.json``. The exit status
is 1 where a line that no test runs has no reason here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..common.results import environment, write_results

ON_CUDA = "a CUDA device"
NOT_FREE = f"{ON_CUDA}: where the host would wait for a number"
STACKS = "the tests of the stacks run it (make test-integrations)"
INTERPRETED = "the Triton backend: its tests in the interpreter run it"
# By file and function.
REASONS = {
    "fused_siglip/testing/environment.py _device": "the self-check on a GPU",
    "fused_siglip/testing/environment.py panels": "the self-check on a GPU",
    "fused_siglip/testing/environment.py _version": "triton not installed: its version line",
    "fused_siglip/testing/selfcheck.py describe": "the self-check on a GPU",
    "fused_siglip/testing/timing.py _interleaved": "the times of a GPU",
    "fused_siglip/testing/timing.py _free_bytes": "the times of a GPU, or not on Linux",
    "fused_siglip/testing/rounding.py _unit": INTERPRETED,
    "fused_siglip/distributed/agreement.py _exchange": "a group without gloo: NCCL exchanges",
    "fused_siglip/distributed/agreement.py check_ranks_agree": INTERPRETED,
    "fused_siglip/distributed/exchange.py _holds_text_grad": INTERPRETED,
    "fused_siglip/distributed/exchange.py Local.blocks_of_ids": "without ids nobody asks",
    "fused_siglip/distributed/exchange.py GroupExchange.blocks_of_ids": "without ids nobody asks",
    "fused_siglip/distributed/exchange.py GroupExchange.divisor": NOT_FREE,
    "fused_siglip/distributed/exchange.py GroupExchange.real_texts": NOT_FREE,
    "fused_siglip/distributed/groups.py _Omitted.__repr__": "what help() shows of a default",
    "fused_siglip/modules.py LearnableSigLipLoss._is_hf_initialized": STACKS,
    "fused_siglip/scalars.py keeping_scalars": "a subclass without one of the scalars",
    "fused_siglip/scalars.py keeping_scalars.apply": "a subclass with more than the scalars",
    "fused_siglip/scalars.py fill": STACKS,
    "fused_siglip/score_operators.py call": "torch.compile, whose traces are not counted",
    "fused_siglip/score_sweep.py ScoreSweep._operand": INTERPRETED,
    "fused_siglip/score_sweep.py restore_infinity": "a side that is left out: not today",
    "kernels/alignment.py aligned_vector": INTERPRETED,
    "kernels/registry.py gpu": f"{ON_CUDA}: what it is",
    "kernels/registry.py _gpu": f"{ON_CUDA}: what it is",
    "kernels/registry.py why_not_default": "Triton's interpreter: it could run, and is not chosen",
    "kernels/torch_panel.py TorchPanel.__call__": f"{ON_CUDA}: half operands that stay half",
    "kernels/torch_panel.py TorchPanel._add_up": NOT_FREE,
    "kernels/torch_panel.py TorchPanel.partials": NOT_FREE,
    "kernels/torch_panel.py TorchPanel._logits": NOT_FREE,
    "kernels/torch_products.py add_product": f"{ON_CUDA}: half operands with a float32 sum",
    "kernels/torch_similarities.py TorchSimilarities._similarities": f"{ON_CUDA}: half operands",
    "kernels/torch_totals.py TorchTotals.finish": NOT_FREE,
}


def rows(report: dict) -> list[dict]:
    """Rows of the results file, from ``coverage json``."""
    totals = report["totals"]
    found = [
        {
            "kind": "total",
            "lines": totals["covered_lines"] / totals["num_statements"],
            "branches": totals["covered_branches"] / totals["num_branches"],
            "num_lines": totals["num_statements"],
            "num_branches": totals["num_branches"],
        }
    ]
    for file, content in report["files"].items():
        for function, region in content["functions"].items():
            missing = region["missing_lines"]
            lines = [str(line) for line in missing]
            lines += [f"{a}->{b}" for a, b in region["missing_branches"] if b not in missing]
            if lines:
                where = f"{file} {function}".strip()
                row = {"kind": "not covered", "where": f"{where}: {', '.join(lines)}"}
                found.append(row | {"why": REASONS.get(where)})
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.report.coverage_report", description=__doc__)
    parser.add_argument("report", type=Path, help="what `coverage json` wrote")
    parser.add_argument("--output", type=Path, help="results file; by default under results/")
    args = parser.parse_args(arguments)
    found = rows(json.loads(args.report.read_text()))
    print(f"written to {write_results('coverage', environment(), found, args.output)}")
    unexplained = [r["where"] for r in found if r["kind"] == "not covered" and r["why"] is None]
    for where in unexplained:
        print(f"not covered, and no reason given: {where}")
    return int(bool(unexplained))


if __name__ == "__main__":
    raise SystemExit(main())
