"""Pairs of functions and docstrings: no leak from the test's modules, and the same on every run."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn", reason="the studies need the [demo] extra")
pytest.importorskip("matplotlib", reason="the studies need the [demo] extra")
pytest.importorskip("tqdm", reason="the studies need the [demo] extra")

from benchmarks.studies import batch_size, negatives, retrieval, starts
from benchmarks.studies.functions import (
    MIN_WORDS,
    NEAR,
    Pair,
    functions,
    harvest,
    near_copies,
    normalised,
    side,
    sources,
    split,
    words,
)
from fused_siglip import LearnableSigLipLoss

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = ("tune", "test")
SOURCE = '''
class Box:
    def area(self, scale):
        """Area of the box, in units of scale squared.

        Not part of the text: a second paragraph.
        """
        def inner(value):
            """Nobody needs to find this inner function."""
            return value * value
        return inner(scale) * self.width * self.height  # a comment stays

def escape(a):
    """Warns of an invalid escape, and is found all the same."""
    return re.split("\\d" + chr(12), a, flags=re.DOTALL, maxsplit=limit, unused=None)

def short(a):
    """Too few."""
    return a + a * a - a / a + abs(a) + round(a) + min(a, a) + max(a, a)

def signature(a):
    """signature(Tensor a, *, int b) -> Tensor and more words"""
    return a + abs(a) + round(a) + min(a, a) + max(a, a) + len(a) + sum(a)

def stub(a):
    """Does a great many useful things to a."""
    raise NotImplementedError

if True:
    async def fetch(address, tries):
        \'\'\'Read all that is behind an address.\'\'\'
        for attempt in range(tries):
            data = await connect(address, attempt)
            if data is not None:
                return data.decode()
'''


@pytest.fixture(scope="module")
def pairs() -> list[Pair]:
    return harvest()


@pytest.fixture(scope="module")
def parts(pairs) -> dict[str, list[Pair]]:
    return split(pairs)


def test_functions_of_a_file():
    found = {pair.text.split()[0]: pair for pair in functions("shapes", SOURCE)}
    assert set(found) == {"Area", "Warns", "Read"}
    area, fetch = found["Area"], found["Read"]
    assert area.text == "Area of the box, in units of scale squared."
    assert area.signature.strip() == "def area(self, scale):"
    assert "a comment stays" in area.body
    assert "second paragraph" not in area.code
    assert "units of scale" not in area.code
    assert fetch.text == "Read all that is behind an address."
    assert fetch.code.strip().startswith("async def fetch") and fetch.code.endswith("decode()")
    assert list(functions("template", "def {{name}}(): pass")) == []


def test_words_take_identifiers_apart():
    assert words("HTTPServer_v2.getItem(x1)") == ["http", "server", "v", "get", "item", "x"]
    assert normalised("Pool 2d, over a Pool") == normalised("over A pool (3D)")


def test_there_are_thousands_of_three_packages(pairs, parts):
    assert len(parts["train"]) > max(batch_size.BATCH_SIZES)
    assert min(len(parts[name]) for name in HELD_OUT) > 1000
    found = Counter(pair.module.partition(".")[0] for pair in pairs)
    assert found["numpy"] > 500 and found["torch"] > 3000
    assert len(pairs) - found["numpy"] - found["torch"] > 3000


def test_no_tests_no_vendored_copies_no_empty_texts(pairs):
    modules = {module for package in ("stdlib", "numpy", "torch") for module, _ in sources(package)}
    for module in modules | {pair.module for pair in pairs}:
        folders = module.split(".")
        assert not {"test", "tests", "testing", "vendor", "_vendor", "site-packages"} & set(folders)
    assert min(len(words(pair.text)) for pair in pairs) >= MIN_WORDS
    assert not [pair for pair in pairs if pair.text in pair.code]


def test_no_two_pairs_are_alike(pairs):
    for field in ("text", "body"):
        keys = Counter(normalised(getattr(pair, field)) for pair in pairs)
        assert keys.most_common(1)[0][1] == 1, field


def test_modules_are_on_one_side_only(pairs, parts):
    modules = {name: {pair.module for pair in found} for name, found in parts.items()}
    assert not modules["train"] & modules["test"]
    assert not modules["train"] & modules["tune"]
    assert not modules["tune"] & modules["test"]
    assert all(side(module) == name for name, found in modules.items() for module in found)
    assert all(len(modules[name]) > 100 for name in HELD_OUT)
    total = sum(map(len, parts.values()))
    assert total < len(pairs) < 1.05 * total  # the near copies that were left out of train


@pytest.mark.parametrize("name", HELD_OUT)
def test_what_is_held_out_does_not_occur_in_train(parts, name):
    for field in ("text", "body"):
        train = {normalised(getattr(pair, field)) for pair in parts["train"]}
        held_out = {normalised(getattr(pair, field)) for pair in parts[name]}
        assert not train & held_out
        sets = [set(key) for key in train]
        for key in sorted(held_out)[::80]:  # near copies, by the definition
            own = set(key)
            assert all(len(own & other) < NEAR * len(own | other) for other in sets), key


def test_near_copies_are_found():
    one = Pair(
        "a", "def f(x):", "return alpha + beta * gamma - delta / epsilon", "Adds some things."
    )
    renamed = Pair(
        "b", "def g(y):", "return alpha + beta2 * gamma - (delta / epsilon)", "Other words."
    )
    reworded = Pair("c", "def h(z):", "return nothing of the kind", "Some things: adds (1).")
    other = Pair("d", "def k(w):", "return alpha + beta", "Says what is not above")
    assert near_copies([renamed, reworded, other], [one]).tolist() == [True, True, False]


def test_the_same_pairs_and_tokens_in_every_process():
    code = (
        "import hashlib; from benchmarks.studies.retrieval import load; h = hashlib.sha256()\n"
        "for name, part in load(('numpy',)).items():\n"
        "    h.update(name.encode() + part.code.numpy().tobytes() + part.text.numpy().tobytes())\n"
        "print(h.hexdigest())"
    )
    digests = set()
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-W", "ignore", "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        digests.add(done.stdout.strip())
    assert len(digests) == 1 and len(digests.pop()) == hashlib.sha256().digest_size * 2


def test_tokens_are_unique_padded_and_cut():
    found = retrieval.tokens("normalise normalize normalise in", 6)
    assert found[:4] == list(dict.fromkeys(found[:4])) and found[4:] == [0, 0]  # norm- is shared
    assert min(found[:4]) > 0 and max(found) < retrieval.VOCABULARY
    assert len(retrieval.tokens("a b c d e f g h", 3)) == 3


def test_retrieval_counts_ranks():
    best = retrieval.retrieval(torch.eye(20))
    assert best == {"mrr": 1, "recall_at_1": 1, "recall_at_10": 1}
    tied = retrieval.retrieval(torch.zeros(20, 20))
    assert tied == {"mrr": 1 / 20, "recall_at_1": 0, "recall_at_10": 0}
    second = torch.eye(20) + 2 * torch.eye(20).roll(1, dims=1)
    assert retrieval.retrieval(second)["mrr"] == 1 / 2
    noise = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    level = retrieval.chance(1000)
    for name, value in retrieval.retrieval(noise).items():
        assert value == pytest.approx(level[name], rel=0.5, abs=0.002), name


def test_training_learns_and_repeats():
    part = retrieval.load(("numpy",))["train"]
    sizes = {"batch_size": 128, "steps": 60, "rate": 1e-2, "seed": 3}
    first, again = (retrieval.train(LearnableSigLipLoss(), part, **sizes) for _ in range(2))
    assert first.losses == again.losses
    assert first.losses[-1] < 0.6 * first.losses[0]
    found = retrieval.retrieval(retrieval.similarities(first.code, first.text, part))
    assert found["mrr"] > 10 * retrieval.chance(len(part))["mrr"]


def test_examples_seen_are_matched():
    seen = Counter(cell["steps"] * cell["batch_size"] for cell in batch_size.cells(quick=False))
    assert len(seen) == 1
    assert set(batch_size.BATCH_SIZES) == {64, 256, 1024, 4096, 8192}
    for loss, taken in batch_size.RATE.items():
        assert set(taken.values()) <= set(batch_size.RATES)
        assert batch_size.rate_of(loss, 64) == taken[64]
        assert batch_size.rate_of(loss, 4096) == taken[1024] * 2


def test_pairs_seen_are_matched():
    cells = negatives.cells(quick=False)
    assert {cell["keep"] * cell["steps"] for cell in cells if cell["matched"]} == {negatives.STEPS}
    assert {cell["steps"] for cell in cells if not cell["matched"]} >= {negatives.STEPS}


@pytest.mark.parametrize("study", [batch_size.STUDY, starts.STUDY, negatives.STUDY])
def test_a_study_from_cells_to_section(study, tmp_path):
    rows = [{**cell, **study.run(cell), "seconds": 1.0} for cell in study.cells(True)]
    section = study.section(rows, tmp_path)
    assert section.startswith("## ")
    assert (tmp_path / f"paper_{study.name}.png").read_bytes().startswith(b"\x89PNG")
    assert f"paper_{study.name}.png" in section
