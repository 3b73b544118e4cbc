"""The words of a text, as search and answers see it, in any script.

A word is two letters or digits or more, in lower case, as in bm25s. Combining marks, such as the
vowel signs of Hindi, belong to the letter before them. Chinese, Japanese, Korean, Thai, Lao, Khmer
and Burmese do not set words apart, or not from their particles: there each two letters that follow
each other are a word (as in Lucene's CJKBigramFilter), and a letter alone is one.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence

PLAIN = ""  # words as indexes before this rule have them: letters and digits alone, in any script
SCRIPTS = "scripts"  # the rule above

_PLAIN_WORD = re.compile(r"\w\w+")
# Blocks of scripts that are cut into pairs of letters.
_PAIRED_BLOCKS = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1100, 0x11FF),  # letters of Hangul
    (0x1780, 0x17FF),  # Khmer
    (0x3005, 0x3007),  # signs among Chinese characters
    (0x3031, 0x3035),
    (0x3041, 0x31FF),  # kana, Bopomofo, letters of Hangul
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0x9FFF),
    (0xA9E0, 0xA9FF),  # Burmese
    (0xAA60, 0xAA7F),
    (0xAC00, 0xD7FF),  # syllables of Hangul
    (0xF900, 0xFAFF),  # Chinese characters
)
_RARE_CHINESE = "\U00020000-\U0003ffff"
_WIDE_FORMS = "\uff01-\uffee"  # of ASCII, and narrow ones of kana and Hangul
_VARIATION_SELECTORS = range(0xFE00, 0xFE10)  # of emoji: they belong to no word
_DOTTED_I = "\u0130"  # Turkish; in lower case Python makes two characters of it


@functools.cache
def paired_letters() -> str:
    """The letters that are cut into pairs, as the inside of a regular expression's brackets."""
    found = []
    for first, last in _PAIRED_BLOCKS:
        for code in range(first, last + 1):
            category = unicodedata.category(chr(code))
            if category[0] == "L" or category == "Nl":
                found.append(code)
    return _ranges(found) + _RARE_CHINESE


@functools.cache
def _marks() -> str:
    """Combining marks of the first plane, likewise. More ranges would slow every search down."""
    found = []
    for code in range(0x300, 0x10000):
        is_mark = unicodedata.category(chr(code)) in ("Mn", "Mc")
        if is_mark and code not in _VARIATION_SELECTORS:
            found.append(code)
    return _ranges(found)


def _ranges(codes: Iterable[int]) -> str:
    """Ascending code points as ranges of a regular expression."""
    found: list[list[int]] = []
    for code in codes:
        if found and code == found[-1][1] + 1:
            found[-1][1] = code
        else:
            found.append([code, code])
    return "".join(f"{chr(first)}-{chr(last)}" for first, last in found)


@functools.cache
def _special() -> re.Pattern[str]:
    """A character that makes the words of a text others than the plain ones."""
    return re.compile(f"[{_marks()}{paired_letters()}{_WIDE_FORMS}{_DOTTED_I}]")


@functools.cache
def _mark() -> re.Pattern[str]:
    return re.compile(f"[{_marks()}]")


@functools.cache
def _wide() -> re.Pattern[str]:
    return re.compile(f"[{_WIDE_FORMS}]+")


@functools.cache
def _joiners() -> re.Pattern[str]:
    """Signs of no width that choose the form of a letter, and end no word."""
    return re.compile(f"(?<=[{_marks()}])[\u200c\u200d]+")


@functools.cache
def _letter() -> re.Pattern[str]:
    """One letter of those that are paired, with its marks."""
    return re.compile(f"[{paired_letters()}][{_marks()}]*")


@functools.cache
def _run_or_word() -> re.Pattern[str]:
    """A run of letters that are paired, or a word of other scripts."""
    other = rf"[^\W{paired_letters()}]"
    return re.compile(f"((?:{_letter().pattern})+)|{other}(?:{other}|[{_marks()}])+")


def splitter(rule: str) -> Callable[[str], list[str]]:
    """The function that gives a text's words. rule: PLAIN or SCRIPTS."""
    return split_plain if rule == PLAIN else split


def split_plain(text: str) -> list[str]:
    """The words of a text by the older rule."""
    return _PLAIN_WORD.findall(text.lower())


def split(text: str) -> list[str]:
    """The words of a text, in their order.

    Those of a text in which nothing is special are the plain ones, at the plain ones' speed.
    """
    if text.isascii() or not _special().search(text):
        return split_plain(text)
    words: list[str] = []
    for found in _run_or_word().finditer(_normal(text)):
        if found[1] is None:
            words.append(found[0])
        else:
            words += _pairs(found[1])
    return words


def _normal(text: str) -> str:
    """Lower case, one form of each letter with its marks, and of wide and narrow letters."""
    text = _wide().sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFC", text).replace(_DOTTED_I, "i").lower()
    return _joiners().sub("", text)


def _pairs(run: str) -> list[str]:
    letters = letters_of(run)
    if len(letters) == 1:
        return [run]
    return list(map("".join, itertools.pairwise(letters)))


def letters_of(run: str) -> Sequence[str]:
    """The letters of a run of paired letters, each with its marks."""
    return _letter().findall(run) if _mark().search(run) else run


def runs(text: str) -> Iterator[Sequence[str]]:
    """The runs of paired letters of a text, as they stand there, in letters with their marks."""
    if not text.isascii():
        for found in _run_or_word().finditer(text):
            if found[1]:
                yield letters_of(found[1])


def covered(text: str) -> tuple[int, int]:
    """How many characters of a text are in words, and how many there are, without spaces."""
    visible = sum(map(len, text.split()))
    if text.isascii() or not _special().search(text):
        return sum(map(len, split_plain(text))), visible
    inside = sum(len(found[0]) for found in _run_or_word().finditer(_normal(text)))
    return min(inside, visible), visible


def length(text: str) -> float:
    """The length of a text in words; two letters of scripts without spaces count as one."""
    spaced = len(text.split())
    if text.isascii():
        return spaced
    return spaced + len(_letter().findall(text)) / 2


def is_paired(character: str) -> bool:
    """Whether a character is a letter of those that are cut into pairs."""
    return _letter().match(character) is not None
