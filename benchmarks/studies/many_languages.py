"""More than a hundred languages in one batch (section 4.3): what do fourteen of them lose?

It needs names that no package of pip brings, those of Unicode's CLDR 48 (Unicode License v3). From
the repository's root:

    mkdir -p build/cldr && npm pack cldr-annotations-full@48.2.0 --pack-destination build/cldr
    tar -xzf build/cldr/*.tgz -C build/cldr --strip-components=1

Where they are not, the study is left out, and its section shows the results of an earlier run.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np

from examples.emoji.data import LANGUAGES, Emoji, Split, load_emoji, split, without_tones
from examples.emoji.training import draw_batches, train
from fused_siglip import LearnableSigLipLoss

from ..common.markdown import table
from ..common.results import ROOT
from . import pictures
from .languages import BATCH_SIZE, BIAS, KEPT, RATE, STEPS
from .plots import BLUE, GREEN, ORANGE, mean, percent, plt, save, seeds
from .study import Study, above, claim, interval, mean_and_range, minus

NAMES = ROOT / "build/cldr/annotations"
ENOUGH = 1200  # emoji that a language must name
LONGER = 3  # times
SEEDS = (0, 1, 2)
COLORS = {"fourteen": ORANGE, "all": BLUE, "all, longer": GREEN}


def cells(quick: bool) -> list[dict]:
    return [
        {
            "role": role,
            "batch_size": BATCH_SIZE,
            "steps": 2 if quick else STEPS * (LONGER if role == "all, longer" else 1),
            "rate": RATE,
            "seed": seed,
        }
        for role in reversed(COLORS)  # the long ones first
        for seed in (SEEDS[:2] if quick else SEEDS)
    ]


def obstacle() -> str | None:
    if NAMES.exists():
        return None
    return f"{NAMES.relative_to(ROOT)} does not exist; the head of {__name__} says how to get it"


@functools.cache
def load() -> tuple[Emoji, Split]:
    """Emoji that all languages name which name enough of them."""
    emoji = without_tones(load_emoji())
    bare = [character.replace("\ufe0f", "") for character in emoji.characters]
    names = {path.parent.name: _names(path) for path in sorted(NAMES.glob("*/annotations.json"))}
    codes = [
        code
        for code, found in names.items()
        if "-" not in code and sum(character in found for character in bare) >= ENOUGH
    ]
    kept = [i for i, c in enumerate(bare) if all(c in names[code] for code in codes)]
    found = Emoji(
        [emoji.characters[i] for i in kept],
        [[names[code][bare[i]] for code in codes] for i in kept],
        codes,
        emoji.pictures[kept],
    )
    return found, split(found, pictures.HELD_OUT, pictures.SPLIT_SEED)


def _names(path: Path) -> dict[str, str]:
    """What a language calls each emoji."""
    entries = json.loads(path.read_text())["annotations"].get("annotations", {})
    return {character: entry["tts"][0] for character, entry in entries.items() if "tts" in entry}


def run(cell: dict) -> dict:
    emoji, parts = load()
    model = pictures.new_model(LearnableSigLipLoss(init_logit_bias=BIAS), cell["seed"])
    names = parts.train
    if cell["role"] == "fourteen":
        names = names[_in_fourteen(emoji, names)]
    batches = draw_batches(names, [(cell["steps"], cell["batch_size"])], cell["seed"])
    train(model, emoji, batches, rate=cell["rate"], seed=cell["seed"], progress=False)
    recall = pictures.recall_by_language(model, emoji, parts.held_out)
    sizes = {"emoji": len(emoji), "train": len(parts.train), "test": len(parts.held_out)}
    return {"recall": recall, "pairs": {**sizes, "languages": len(emoji.languages)}}


def _in_fourteen(emoji: Emoji, names: np.ndarray) -> np.ndarray:
    wanted = [i for i, code in enumerate(emoji.languages) if code in LANGUAGES]
    return np.isin(names % len(emoji.languages), wanted)


def _of(rows: list[dict], role: str, fourteen: bool = True) -> list[float]:
    """Recall averaged over the fourteen languages or all others, one value a seed."""
    found = sorted((row for row in rows if row["role"] == role), key=lambda row: row["seed"])
    return [
        mean([share for code, share in row["recall"].items() if (code in LANGUAGES) == fourteen])
        for row in found
    ]


def _claims(rows: list[dict]) -> list[str]:
    count = rows[0]["pairs"]["languages"]
    lines = []
    for role, how in (("all", "on as many names"), ("all, longer", f"on {LONGER} times as many")):
        gap = minus(_of(rows, role), _of(rows, "fourteen"), KEPT)
        lines.append(
            claim(
                above(gap),
                f"a model of {count} languages, trained {how}, is as good in fourteen of them as a "
                "model of the fourteen",
                "this page's own, after section 4.3",
                f"Recall minus {KEPT:.0%} of that of the fourteen: {interval(gap).points()}; seen "
                "above 0.",
            )
        )
    return lines


def _plot(rows: list[dict], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
    for x, (role, color) in enumerate(COLORS.items()):
        seeds(axis, x, _of(rows, role), color)
        if role != "fourteen":
            seeds(axis, x + 2.5, _of(rows, role, fourteen=False), color)
    axis.set_xticks([0, 1, 2, 3.5, 4.5], [*COLORS, *list(COLORS)[1:]])
    axis.set_title("Recall in the fourteen languages (left) and in the others (right)")
    percent(axis)
    save(figure, path)


def section(rows: list[dict], folder: Path) -> str:
    _plot(rows, folder / "paper_many_languages.png")
    first = next(row for row in rows if row["role"] == "all")
    pairs = first["pairs"]

    lines = [
        (
            role,
            str(next(row["steps"] for row in rows if row["role"] == role)),
            mean_and_range(_of(rows, role)),
            "-" if role == "fourteen" else mean_and_range(_of(rows, role, fourteen=False)),
        )
        for role in COLORS
    ]
    return f"""## Languages: more than a hundred

**The paper** (section 4.3) trains mSigLIP on over 100 languages.

**Here** the pairs are pictures of {pairs["emoji"]} emoji with their names in {pairs["languages"]}
languages (CLDR 48): every language, without variants by region or script, that names at least
{ENOUGH} of the emoji [above](#languages-one-batch-of-fourteen), and every emoji that all of them
name. {pairs["train"]}
names are to train with and {pairs["test"]} are held out, by pairs as above. Batches, rate and start
are those above; "fourteen" trains on names of the fourteen languages alone, "all" on as many names
of all languages, "all, longer" on {LONGER} times as many. Recall is how often the right one of all
pictures is first; chance is {1 / pairs["emoji"]:.2%}.

{table(("trained on", "steps", "fourteen languages", "the others"), lines)}

![Recall of the three models](paper_many_languages.png)

The table shows means over {len(SEEDS)} seeds (and ranges). Differences are paired by seed and have
95% intervals (Student's t).

{chr(10).join(f"- {line}" for line in _claims(rows))}

The rule of the verdicts: a claim is seen where the whole interval lies above the bound given,
opposite where it lies below, and otherwise not seen.

Limits: the names come from one file a language, and their translators worked from English. To run
this, unpack CLDR's names first (the head of
[many_languages.py](../benchmarks/studies/many_languages.py) has the commands)."""


STUDY = Study("many_languages", cells, run, section, obstacle=obstacle)
