"""``make demo``: training on emoji, what was learned, and what the loss costs."""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from benchmarks.common.baselines import LOSSES
from benchmarks.common.memory import peak_bytes
from benchmarks.common.results import environment, write_results
from benchmarks.common.timing import beside_floor
from benchmarks.common.workloads import Inputs, step

from ..report import cost_table, plot_costs
from .data import (
    LANGUAGES,
    TONES,
    Emoji,
    Split,
    load_emoji,
    names_of,
    plain,
    seen_elsewhere,
    split,
)
from .ngrams import bags
from .search import MODEL, make_index
from .show import QUERIES, contact_sheet, lines
from .training import PLAN, TINY, Model, Plan, draw_batches, ranks, train

SEED = 0
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Length:
    training: Plan
    repeats: dict[int, int]  # number of names in a batch: how often each loss is timed


LENGTHS = {
    "quick": Length(TINY, {256: 2, 512: 2}),
    "short": Length(PLAN, {2048: 5, 4096: 3, 8192: 3, 16384: 2}),
    "full": Length(PLAN, {2048: 20, 4096: 10, 8192: 5, 16384: 5, 32768: 3}),
}


def run(length: str, output: Path, record: bool) -> None:
    """Everything that ``make demo`` prints and writes."""
    where = environment()
    print(f"{where['device']}, {where['threads']} threads, torch {where['torch']}\n", flush=True)
    chosen = LENGTHS[length]
    emoji = load_emoji()
    parts = split(emoji)
    print(introduction(emoji, parts), flush=True)
    torch.manual_seed(SEED)
    batches = draw_batches(parts.train, chosen.training, SEED)
    start = time.perf_counter()
    peak, model = peak_bytes(lambda: train(Model(), emoji, batches, seed=SEED))
    training = {
        "kind": "training",
        "steps": len(batches),
        "batch_size": max(map(len, batches)),
        "seconds": time.perf_counter() - start,
        "peak_bytes": peak,
    }
    index = make_index(model, emoji)
    output.mkdir(parents=True, exist_ok=True)
    index.save(output / MODEL)

    found = recall(model, emoji, parts)
    print("\n" + recall_table(found))
    known = {plain(name) for name in names_of(emoji, parts.train)}
    notes = [f"  ({q.says}{'; trained with' if plain(q.text) in known else ''})" for q in QUERIES]
    print("\n" + lines(index, [query.text for query in QUERIES], notes), flush=True)

    costs = measure(model, emoji, parts, chosen.repeats)
    print("\n" + cost_table(costs))
    print(
        f"training in batches of up to {training['batch_size']} names held {peak >> 20} MiB at "
        "most, all included"
    )
    folder = ROOT / "docs" if record else output
    folder.mkdir(parents=True, exist_ok=True)
    written = [folder / "demo_emoji.png", folder / "demo_memory.png"]
    contact_sheet(index, QUERIES, written[0])
    plot_costs(costs, where, written[1])
    # without a path of its own the file goes to benchmarks/results/
    path = None if record else output / "demo.json"
    written.append(write_results("demo", where, [training, *found, *costs], path))
    print("\nwritten: " + ", ".join(os.path.relpath(path) for path in written))
    print('ask it: python -m examples.emoji "red car" "猫"')


def introduction(emoji: Emoji, parts: Split) -> str:
    return (
        f"{len(emoji)} emoji by OpenMoji, named in {len(emoji.languages)} languages: "
        f"{len(parts.train)} names to train with\n"
        f"held out: {len(parts.held_out)} names of emoji that have others to train with, and all "
        f"{len(parts.unseen_emoji)} names of some emoji"
    )


def recall(model: Model, emoji: Emoji, parts: Split) -> list[dict]:
    """How often the right one of all pictures is first, and among the first five: one row for each
    language and one for all, of held-out names and of emoji without any name to train with."""
    rows = []
    for kind in ("held_out", "unseen_emoji"):
        names = getattr(parts, kind)
        rank = ranks(model, emoji, names).numpy()
        alike = seen_elsewhere(emoji, names, parts.train)
        toned = np.array([bool(TONES.search(character)) for character in emoji.characters])
        language, everything = names % len(emoji.languages), np.ones(len(names), dtype=bool)
        wanted = {code: language == i for i, code in enumerate(emoji.languages)}
        wanted |= {"all": everything, "not alike": ~alike}
        wanted["no tone"] = ~toned[names // len(emoji.languages)]
        for code, here in wanted.items():
            rows.append({
                "kind": "recall",
                "split": kind,
                "language": code,
                "names": int(here.sum()),
                "pictures": len(emoji),
                "first": float((rank[here] == 1).mean()),
                "five": float((rank[here] <= 5).mean()),
            })  # fmt: skip
    return rows


def recall_table(rows: list[dict]) -> str:
    line = "{:<12} {:>6} {:>8} {:>11}".format
    held_out = {row["language"]: row for row in rows if row["split"] == "held_out"}
    (unseen,) = (r for r in rows if (r["split"], r["language"]) == ("unseen_emoji", "all"))
    lines = [
        "held-out names by language: how often their picture is found",
        line("", "names", "first", "among five"),
    ]
    names = {**LANGUAGES, "all": "all"}
    lines += [
        line(names[code], row["names"], f"{row['first']:.1%}", f"{row['five']:.1%}")
        for code, row in held_out.items()
        if code in names
    ]
    unlike, plain_skin = held_out["not alike"], held_out["no tone"]
    lines += [
        f"the {plain_skin['names']} of emoji that are not a tone of skin of another: "
        f"{plain_skin['first']:.1%} first, {plain_skin['five']:.1%} among five",
        f"without those that another language spells the same, {unlike['names']} are left: "
        f"{unlike['first']:.1%} first, {unlike['five']:.1%} among five",
        f"emoji none of whose names was trained with: {unseen['first']:.1%} first, "
        f"{unseen['five']:.1%} among five",
    ]
    return "\n".join(lines)


def measure(model: Model, emoji: Emoji, parts: Split, repeats: dict[int, int]) -> list[dict]:
    """Time and peak memory of the loss and all gradients, on batches as training has them."""
    random = np.random.default_rng(SEED)
    scalars = model.loss.factor().detach(), model.loss.logit_bias.detach()
    rows = []
    for size, count in tqdm(repeats.items(), desc="measuring", unit="batch size", leave=False):
        names = random.permutation(parts.train)[:size]
        text_ids = torch.from_numpy(names // len(emoji.languages))
        image_ids = text_ids.unique()
        with torch.no_grad():
            inputs = Inputs(
                model.image(torch.from_numpy(emoji.pictures)[image_ids]),
                model.text(bags(names_of(emoji, names))),
                *scalars,
            )
        ids = {"image_ids": image_ids, "text_ids": text_ids}
        steps = {
            name: step(functools.partial(LOSSES[name].loss, **ids), inputs)
            for name in ("fused_torch", "eager")
        }
        timed = beside_floor(steps, inputs, count)
        for name, function in steps.items():
            peak, (_, *gradients) = peak_bytes(function)
            rows.append({
                "kind": "cost",
                "loss": name,
                "mode": "full",
                "batch_size": size,
                "images": len(image_ids),
                "dim": inputs.x.shape[1],
                "dtype": "float32",
                "repeats": count,
                **timed[name],
                "peak_extra_bytes": peak - sum(g.nbytes for g in gradients),
            })  # fmt: skip
    return rows
