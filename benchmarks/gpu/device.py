"""One call that measures everything a GPU has to show, within ten minutes.

``python -m benchmarks.gpu.device`` runs the parts of parts/, most valuable first. It writes a
results file after each part, draws a plot, and prints every figure beside its target last. A part
that fails is named, and the others still run. Several calls can share the work: ``--only`` picks
parts, ``--into`` adds their rows to an earlier call's file. On a CPU, and with ``--quick``, the
sizes are tiny, to see whether everything runs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import torch

from ..common.markdown import aligned
from ..common.results import RESULTS, environment, results_path, write_results
from .acceptance import targets
from .part_process import Event, PartProcess, events
from .parts import PARTS, Part
from .parts.run import FULL, QUICK, Run

CARD = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def card(run: Run) -> dict[str, str] | None:
    """The GPU's clocks, power and temperature now. Reads only."""
    command = ["nvidia-smi", f"--query-gpu={','.join(CARD)}", "--format=csv,noheader"]
    if not run.on_gpu:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return card_values(done.stdout, torch.cuda.current_device())
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return None


def card_values(output: str, index: int) -> dict[str, str]:
    """nvidia-smi's line of the GPU with this index."""
    values = output.splitlines()[index].split(",")
    return dict(zip(CARD, map(str.strip, values), strict=True))


class Isolated:
    """Runs parts in a worker process, a fresh one after each that went wrong."""

    def __init__(self) -> None:
        self.worker: PartProcess | None = None

    def __call__(self, part: Part, run: Run) -> list[Event]:
        self.worker = self.worker or PartProcess()
        found = list(self.worker.events(part.rows, run))
        if found[-1][0] == "failed":
            self.close()
        return found

    def close(self) -> None:
        if self.worker is not None:
            self.worker.close()
        self.worker = None


def in_process(part: Part, run: Run) -> list[Event]:
    return list(events(part.rows, run))


def run_parts(
    names: Sequence[str],
    run: Run,
    execute: Callable[[Part, Run], list[Event]],
    on_rows: Callable[[list[dict]], object],
    kept: Sequence[dict] = (),
) -> list[dict]:
    """Run the parts in the registry's order; ``on_rows`` gets all rows so far after each.

    A part's rows end with one that says how it went. ``kept`` are the rows of an earlier call.
    """
    rows = [*kept, {"kind": "part", "part": "start", "status": "ok", "card": card(run)}]
    chosen = {name: part for name, part in PARTS.items() if name in names}
    deadlines = _deadlines(chosen, run)
    for name, part in chosen.items():
        start = time.monotonic()
        if run.on_gpu and run.seconds_left() < part.seconds / 3:
            status, why = "skipped", "no time left"
        else:
            *new, (status, why) = execute(part, run.until(deadlines[name]))
            rows += [row for _, row in new]
        seconds = time.monotonic() - start
        row = {"kind": "part", "part": name, "status": status, "why": why}
        rows.append({**row, "seconds": seconds, "card": card(run)})
        print(f"{name:<12} {status:<8} {seconds:6.1f} s  {_last_line(why)}", flush=True)
        on_rows(rows)
    return rows


def _deadlines(parts: dict[str, Part], run: Run) -> dict[str, float]:
    """When each part has to end: it has its share of the time and what earlier parts leave."""
    now, total = time.monotonic(), sum(part.seconds for part in parts.values())
    stretch = max(run.seconds_left() / total, 1.0) if parts else 1.0
    ends = itertools.accumulate(part.seconds for part in parts.values())
    return {
        name: min(run.deadline, now + stretch * end) for name, end in zip(parts, ends, strict=True)
    }


SAME = ("device", "torch", "triton", "python", "commit")  # in calls that share a file


def kept_rows(path: Path, where: dict, names: Sequence[str]) -> list[dict]:
    """The rows of an earlier call's file, without those of the parts that run again.

    ``where`` is dirty if either was. Raises ValueError where another device, version or commit
    wrote the file.
    """
    content = json.loads(path.read_text())
    for key in SAME:
        if content["environment"][key] != where[key]:
            raise ValueError(
                f"--into {path}: its {key} is {content['environment'][key]!r}, here it is "
                f"{where[key]!r}: expected the same"
            )
    where["dirty"] |= content["environment"]["dirty"]
    kept: list[dict] = []
    part: list[dict] = []
    for row in content["rows"]:
        part.append(row)
        if row["kind"] == "part":  # the last of its rows
            kept += part if row["part"] not in names else []
            part = []
    return kept


def _last_line(why: str | None) -> str:
    return why.splitlines()[-1][:68] if why else ""


def report(rows: list[dict]) -> str:
    """Every figure that the run has to show, beside its target; what failed comes last."""
    found = ([t.what, t.measured, t.target, t.verdict] for t in targets(rows))
    lines = [aligned(["", "measured", "target", "met"], found)]
    failed = [row["part"] for row in rows if row.get("status") == "failed"]
    skipped = [row["part"] for row in rows if row.get("status") == "skipped"]
    lines.append(f"failed: {', '.join(failed) or 'none'}; skipped: {', '.join(skipped) or 'none'}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.device", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes (on a CPU always)")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="part")
    parser.add_argument("--output-dir", type=Path, default=RESULTS, help="by default results/")
    parser.add_argument("--into", type=Path, help="results file of an earlier call, to add to")
    parser.add_argument("--commit", help="of the tree, where git does not know it")
    parser.add_argument("--budget-minutes", type=float, default=9.0)
    args = parser.parse_args(arguments)

    deadline = time.monotonic() + 60 * args.budget_minutes
    on_gpu = torch.device(args.device).type == "cuda"
    run = Run(args.device, FULL if on_gpu and not args.quick else QUICK, deadline)
    where = environment(args.device, args.commit)
    path = args.output_dir / (args.into or results_path("device", where)).name
    try:
        kept = kept_rows(args.into, where, args.only) if args.into else []
    except (OSError, ValueError) as error:
        parser.error(str(error))
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)

    def save(rows: list[dict]) -> None:
        write_results("device", where, rows, path)

    if on_gpu:  # a part may take the GPU's context with it
        with closing(Isolated()) as execute:
            rows = run_parts(args.only, run, execute, save, kept)
    else:
        rows = run_parts(args.only, run, in_process, save, kept)

    try:
        from ..common.plots import plot_costs

        plot_costs(rows, where, path.with_suffix(".png"))
    except Exception as error:  # a missing plot must not cost the numbers
        print(f"no plot: {error}")
    print(f"\n{len(rows)} rows in {path}\n\n{report(rows)}")
    return int(any(row.get("status") == "failed" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
