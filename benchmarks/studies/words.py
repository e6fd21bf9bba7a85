# ruff: noqa: RUF001 (letters of many alphabets)
"""Captions of three digits in twelve languages, as hashed words and parts of words."""

from __future__ import annotations

import functools
import itertools
import re
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

NUMBERS = list(itertools.product(range(10), repeat=3))  # 0 0 0 to 9 9 9, as the captions spell them


class Language(NamedTuple):
    digits: str  # zero to nine
    places: str  # left, middle, right
    training: tuple[str, str]  # what a caption begins with
    test: str  # what a test's prompt begins with: in no training caption
    part: str = "{place} {digit}"
    comma: str = ", "


LANGUAGES = {
    "English": Language(
        "zero one two three four five six seven eight nine",
        "left middle right",
        ("a photo of digits:", "handwritten:"),
        "three numbers on paper:",
    ),
    "German": Language(
        "null eins zwei drei vier fünf sechs sieben acht neun",
        "links mitte rechts",
        ("ein Foto von Ziffern:", "handgeschrieben:"),
        "drei Zahlen auf Papier:",
    ),
    "French": Language(
        "zéro un deux trois quatre cinq six sept huit neuf",
        "gauche milieu droite",
        ("une photo de chiffres :", "écrit à la main :"),
        "trois nombres sur papier :",
    ),
    "Spanish": Language(
        "cero uno dos tres cuatro cinco seis siete ocho nueve",
        "izquierda centro derecha",
        ("una foto de cifras:", "escrito a mano:"),
        "tres números en papel:",
    ),
    "Polish": Language(
        "zero jeden dwa trzy cztery pięć sześć siedem osiem dziewięć",
        "lewo środek prawo",
        ("zdjęcie cyfr:", "pismo odręczne:"),
        "trzy liczby na papierze:",
    ),
    "Russian": Language(
        "ноль один два три четыре пять шесть семь восемь девять",
        "слева посередине справа",
        ("фото цифр:", "написано от руки:"),
        "три числа на бумаге:",
    ),
    "Turkish": Language(
        "sıfır bir iki üç dört beş altı yedi sekiz dokuz",
        "solda ortada sağda",
        ("rakamların fotoğrafı:", "el yazısı:"),
        "kâğıt üzerinde sayılar:",
    ),
    "Swahili": Language(
        "sifuri moja mbili tatu nne tano sita saba nane tisa",
        "kushoto katikati kulia",
        ("picha ya tarakimu:", "mwandiko wa mkono:"),
        "namba kwenye karatasi:",
    ),
    "Hindi": Language(
        "शून्य एक दो तीन चार पाँच छह सात आठ नौ",
        "बाएँ बीच दाएँ",
        ("अंकों की तस्वीर:", "हाथ से लिखा:"),
        "काग़ज़ पर संख्याएँ:",
    ),
    "Chinese": Language(
        "零 一 二 三 四 五 六 七 八 九",
        "左边 中间 右边",
        ("数字的照片：", "手写："),
        "纸上的号码：",
        "{place}{digit}",
        "，",
    ),
    "Japanese": Language(
        "零 一 二 三 四 五 六 七 八 九",
        "左は 中央は 右は",
        ("数字の写真：", "手書き："),
        "紙に書いた番号：",
        "{place}{digit}",
        "、",
    ),
    "Korean": Language(
        "영 일 이 삼 사 오 육 칠 팔 구",
        "왼쪽 가운데 오른쪽",
        ("숫자 사진:", "손글씨:"),
        "종이에 쓴 번호:",
    ),
}


def caption(language: str, number: tuple[int, ...], start: str) -> str:
    words = LANGUAGES[language]
    digits, places = words.digits.split(), words.places.split()
    parts = [
        words.part.format(place=place, digit=digits[digit])
        for place, digit in zip(places, number, strict=True)
    ]
    space = " " if start.endswith(":") else ""  # Chinese and Japanese write none
    return start + space + words.comma.join(parts)


def features(text: str) -> list[str]:
    """Words, pairs of neighbouring words, and the runs of three letters of each word.

    A word ends at a space or a punctuation mark: where a script writes no spaces, it is a phrase,
    and its letters are what it shares with others.
    """
    words = re.findall(r"[^\s,:，：、]+", text.lower())
    pairs = [f"{a} {b}" for a, b in itertools.pairwise(words)]
    return [part for word in words for part in _parts(word)] + pairs


@functools.cache
def _parts(word: str) -> tuple[str, ...]:
    return (word, *(f"-{word[i : i + 3]}-" for i in range(len(word) - 2)))


@functools.cache
def _token(feature: str, vocabulary: int) -> int:
    """The same on every machine and in every process, unlike Python's hash; 0 is padding."""
    return 1 + zlib.crc32(feature.encode()) % (vocabulary - 1)


def tokenize(texts: list[str], vocabulary: int) -> Tensor:  # (texts, longest) int64
    rows = [torch.tensor([_token(f, vocabulary) for f in features(text)]) for text in texts]
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@functools.lru_cache(maxsize=4)
def training_tokens(languages: tuple[str, ...], vocabulary: int) -> Tensor:
    """(language, start, number, longest) int64: every caption to train with."""
    texts = [
        caption(language, number, start)
        for language in languages
        for start in LANGUAGES[language].training
        for number in NUMBERS
    ]
    return tokenize(texts, vocabulary).view(len(languages), 2, len(NUMBERS), -1)


def test_tokens(language: str, vocabulary: int) -> Tensor:
    """(number, longest) int64: a prompt for each number, worded as no training caption is."""
    start = LANGUAGES[language].test
    return tokenize([caption(language, number, start) for number in NUMBERS], vocabulary)
