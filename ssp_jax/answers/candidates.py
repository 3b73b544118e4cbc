"""Texts of a passage that may be answers: titles, names, dates, numbers, terms.

Patterns and counts only, no language's grammar [H]. What a capital letter tells in Latin, Greek and
Cyrillic, quotes, brackets and katakana tell where there are none; and a term is a word or phrase
that several passages have and most have not. The counts are of passages, not of occurrences.
"""

import itertools
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ssp_jax.corpus import words
from ssp_jax.data import Document

MAX_CHARS = 60
MAX_WORDS = 8
# Answers of a kind that one passage gives: names are most of what people ask for.
QUOTAS = {"title": 1, "name": 2, "date": 1, "number": 1, "term": 1}
FORMS = 1 << 21  # texts whose passages are counted at the same time, some 300 MB

_MONTHS = (
    "(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|"
    "Sept?(?:ember)?|Oct(?:ober)?|Nov(?:ember)?|Dec(?:ember)?)"
)
_DATE = re.compile(
    # 2024年3月5日, 3月5日
    r"\d{4}年(?:\d{1,2}月(?:\d{1,2}日)?)?|\d{1,2}月\d{1,2}日"
    # 2024-03-05, 5.3.2024
    r"|\b\d{4}-\d\d-\d\d\b|\b\d{1,2}[./]\d{1,2}[./]\d{4}\b"
    # 5 March 2024, March 2024, March 5, 2024, 5 March
    rf"|\b(?:\d{{1,2}}(?:st|nd|rd|th)? )?{_MONTHS}\.? (?:\d{{1,2}}(?:st|nd|rd|th)?,? )?\d{{4}}\b"
    rf"|\b\d{{1,2}}(?:st|nd|rd|th)? {_MONTHS}\b|\b{_MONTHS} \d{{1,2}}(?:st|nd|rd|th)?\b"
    # 5. Mai 2024, 5 de mayo de 2024
    r"|\b\d{1,2}\.? (?:de )?[^\W\d_]{3,12} (?:de )?[12]\d{3}\b"
    # a year
    r"|(?<![\w.,$€£¥/-])(?:1[5-9]|20)\d\d(?![\w%/-]|[.,]\d)"
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9.,_/-])[$€£¥]?(?:\d{1,3}(?:[,.]\d{3})+|\d+)(?:[.,]\d+)?"
    r"(?:\s?(?:%|percent|thousand|million|billion|trillion|万|亿|億|兆))?"
    r"(?![A-Za-z0-9_/-]|[.,]\d)"
)
_NUMBERING = re.compile(r"[.)]\s")  # after the number of a line
_QUOTED = re.compile('[“"«「『《〈]([^“”"«»「」『』《》〈〉\n]{2,60})[”"»」』》〉]')
_KATAKANA = re.compile("[ァ-ヺ][ァ-ヺー]+(?:・[ァ-ヺー]+)*")
_TOKEN = re.compile(r"[^\W_]+(?:[’'&.-][^\W_]+)*")
_POSSESSIVES = ("'s", "’s")
_PRONOUN = re.compile("I(?:['’]|$)")  # the English one
_SENTENCE_END = re.compile('[.!?:;…\n“"«»”(•|]')
# Small words within names, of several languages.
_LINKS = frozenset(
    ("of", "the", "for", "&", "de", "da", "di", "do", "du", "des", "del", "della", "der", "den")
    + ("la", "le", "las", "los", "el", "al", "van", "von", "zu", "y")
)
_CALENDAR = re.compile(rf"{_MONTHS}|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day")
_MAX_NAME_WORDS = 6
_MAX_LINKS = 2  # in a row
_TERM_LETTERS = 6  # of a word with capital and small letters
_PHRASE_LETTERS = 4  # of each of two such words
_CASELESS_LETTERS = 3  # of a word in a script without capitals
# Letters of Chinese that begin or end few words, but many clauses.
_PARTICLES = frozenset("的了在是和与與及或也都而其之以于於到为為被把对對从從这這那有们們不一个個")
_FIRST_CHINESE = "\u2e80"
_HIRAGANA = re.compile("[\u3041-\u309f]")
_GRAMS = range(2, 8)  # letters of a term in a script without spaces
_FRAGMENT = 0.75  # a longer term that has this share of a shorter one's passages takes its place


@dataclass(frozen=True)
class Candidate:
    kind: str  # of QUOTAS
    text: str


class Frequencies:
    """In how many passages a text stands, for any number of texts in bounded memory.

    The rarest are forgotten where there are too many, as in lossy counting.
    """

    def __init__(self, limit: int = FORMS) -> None:
        self._limit = limit
        self._counts: dict[str, int] = {}
        self.passages = 0

    def __getitem__(self, text: str) -> int:
        return self._counts.get(text, 0)

    def add(self, forms: Iterable[str]) -> None:
        """Counts one passage, with these texts, each once."""
        self.passages += 1
        for form in forms:
            self._counts[form] = self._counts.get(form, 0) + 1
        forgotten = 1
        while len(self._counts) > self._limit:
            self._counts = {text: n for text, n in self._counts.items() if n > forgotten}
            forgotten *= 2

    def is_common(self, text: str) -> bool:
        """Whether so many passages have a term that it tells no passage from the others."""
        return self[text] > max(4, self.passages // 50)

    def is_everywhere(self, text: str) -> bool:
        """Whether so many passages have a name that a question cannot lead to it."""
        return self[text] > max(5, self.passages // 10)


def forms(document: Document) -> set[str]:
    """The texts of a passage whose frequencies choose() asks for."""
    found = _Found.of(document.text)
    names: set[str] = set()
    for name in found.names:
        names |= {name.text, name.rest}
    names.update(filter(_is_caseless, words.split(document.text)))
    names.update(found.quoted, found.lower_words, found.phrases, found.dates, found.numbers)
    for run in words.runs(document.text):
        for n in (*_GRAMS, _GRAMS.stop):  # the longest tell which terms are fragments
            names.update(_gram(run, i, n) for i in range(len(run) - n + 1))
    return names - {""}


def choose(document: Document, frequencies: Frequencies) -> Iterator[Candidate]:
    """The candidates of a passage, best first within each kind."""
    found = _Found.of(document.text)
    by_kind = {
        "title": _titles(document, frequencies),
        "name": _names(found, frequencies),
        "date": found.dates,
        "number": found.numbers,
        "term": _terms(document.text, found, frequencies),
    }
    for kind, texts in by_kind.items():
        for text in dict.fromkeys(texts):
            if _is_answer(text):
                yield Candidate(kind, text)


def _is_answer(text: str) -> bool:
    """Short, on one line, visible, and no list that is written as text."""
    is_short = 2 <= len(text) <= MAX_CHARS and len(text.split()) <= MAX_WORDS
    return is_short and text.isprintable() and text[0] not in "[({" and any(map(str.isalnum, text))


# --- what stands in a passage ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Name:
    text: str
    rest: str  # without the first word, where that may be capital only because it begins a sentence
    begins: bool  # a sentence

    def resolved(self, frequencies: Frequencies) -> str:
        """The name, without a first word that other sentences write small; may be empty."""
        first = self.text.split()[0]
        return self.rest if self.begins and frequencies[first.lower()] else self.text


@dataclass(frozen=True)
class _Found:
    """What the patterns find in a passage, in its order."""

    dates: list[str]
    numbers: list[str]
    names: list[_Name]
    quoted: list[str]  # and katakana
    lower_words: list[str]
    phrases: list[str]  # of two lower words

    @classmethod
    def of(cls, text: str) -> "_Found":
        dates = [found[0] for found in _DATE.finditer(text)]
        text = _DATE.sub(_blank, text)
        numbers = [found[0] for found in _NUMBER.finditer(text) if _is_number(text, found)]
        tokens = list(_TOKEN.finditer(text))
        lower = [token[0] for token in tokens if token[0].islower() and token[0].isalpha()]
        return cls(
            dates=dates,
            numbers=numbers,
            names=list(_name_runs(text, tokens)),
            quoted=list(_quoted(text)),
            lower_words=lower,
            phrases=_phrases(text, tokens),
        )


def _blank(found: re.Match[str]) -> str:
    """As many commas, which end a name and begin no sentence."""
    return "," * len(found[0])


def _is_number(text: str, found: re.Match[str]) -> bool:
    """Two digits or more, and not the number of a line."""
    digits = sum(map(str.isdecimal, found[0]))
    begins_line = found.start() == 0 or text[found.start() - 1] == "\n"
    return digits > 1 and not (begins_line and _NUMBERING.match(text, found.end()))


def _name_runs(text: str, tokens: list[re.Match[str]]) -> Iterator[_Name]:
    """Capitalised words that follow each other, with the small words between them."""
    run: list[str] = []
    links: list[str] = []  # small words after the run, which a capital must follow
    begins = False
    end = 0
    for token in tokens:
        gap = text[end : token.start()]
        end = token.end()
        word = token[0][:-2] if token[0].endswith(_POSSESSIVES) else token[0]
        starts_sentence = token.start() == 0 or _SENTENCE_END.search(gap) is not None
        after_initial = bool(run) and len(run[-1]) == 2 and run[-1][1] == "."
        goes_on = bool(run) and gap == (". " if after_initial else " ")
        if goes_on and word in _LINKS and len(links) < _MAX_LINKS:
            links.append(word)
            continue
        is_capital = word[:1].isupper() and not _PRONOUN.match(word)
        is_model = word.isdecimal() and len(word) < 4 and bool(run) and not links
        if goes_on and (is_capital or is_model):
            run += [*links, f"{word}." if _is_initial(text, token) else word]
            links = []
        else:
            yield from _name(run, begins)
            run = [f"{word}." if _is_initial(text, token) else word] if is_capital else []
            links = []
            begins = starts_sentence
        if word != token[0]:  # a possessive ends the name
            yield from _name(run, begins)
            run = []
    yield from _name(run, begins)


def _quoted(text: str) -> Iterator[str]:
    """What stands in quotes and is no sentence, and words in katakana."""
    for found in _QUOTED.finditer(text):
        if found[1][-1].isalnum():
            yield found[1].strip()
    yield from _KATAKANA.findall(text)


def _is_initial(text: str, token: re.Match[str]) -> bool:
    return len(token[0]) == 1 and text[token.end() : token.end() + 1] == "."


def _name(run: list[str], begins: bool) -> Iterator[_Name]:
    while run and run[-1].endswith("."):  # the initial of another name
        run = run[:-1]
    if 0 < len(run) <= _MAX_NAME_WORDS:
        rest = list(itertools.dropwhile(_LINKS.__contains__, run[1:]))
        yield _Name(" ".join(run), " ".join(rest), begins)


def _phrases(text: str, tokens: list[re.Match[str]]) -> list[str]:
    found = []
    for first, second in itertools.pairwise(tokens):
        both = (first[0], second[0])
        is_near = text[first.end() : second.start()] == " "
        if is_near and all(map(_is_long_and_small, both)):
            found.append(" ".join(both))
    return found


def _is_long_and_small(word: str) -> bool:
    return len(word) >= _PHRASE_LETTERS and word.islower() and word.isalpha()


# --- what is chosen -------------------------------------------------------------------------------


def plain_title(document: Document) -> str:
    """The title without the quotes that Search-R1's corpus has around it."""
    return document.title.strip().strip('"').strip()


def _titles(document: Document, frequencies: Frequencies) -> Iterator[str]:
    """The title, or its last part, where the passage speaks of it in these words."""
    title = plain_title(document)
    for form in (title, title.rpartition(": ")[2]):
        is_named = form.lower() in document.text.lower()
        if form and is_named and not frequencies.is_common(form.lower()):
            yield form


def _names(found: _Found, frequencies: Frequencies) -> list[str]:
    """Names, of several words first, and among these those that other passages have too."""
    names = [name.resolved(frequencies) for name in found.names] + found.quoted
    kept = []
    for name in names:
        is_known = _CALENDAR.fullmatch(name) or frequencies.is_everywhere(name)
        if len(name) > 1 and not is_known:
            kept.append(name)
    return sorted(kept, key=lambda name: (" " not in name, frequencies[name] < 2))


def _terms(text: str, found: _Found, frequencies: Frequencies) -> Iterator[str]:
    """Phrases, long words, and parts of clauses without spaces; the longest first."""

    def is_term(form: str) -> bool:
        return frequencies[form] > 1 and not frequencies.is_common(form)

    def is_rare(word: str) -> bool:
        return not frequencies.is_common(word)

    phrases = [phrase for phrase in found.phrases if all(map(is_rare, phrase.split()))]
    caseless = filter(_is_caseless, words.split(text))
    long = [word for word in found.lower_words if len(word) >= _TERM_LETTERS]
    for group in (phrases, _grams(text, frequencies), _repeated(long), _repeated(caseless)):
        yield from sorted(filter(is_term, group), key=len, reverse=True)


def _repeated(found: Iterable[str]) -> list[str]:
    """The words that a passage has twice: what it is about, and few of its verbs."""
    return [word for word, number in Counter(found).items() if number > 1]


def _is_caseless(word: str) -> bool:
    """Whether a word is of a script with spaces and without capitals, such as Hindi or Arabic."""
    is_letters = word.upper() == word.lower() and word[0].isalpha()
    return is_letters and len(word) >= _CASELESS_LETTERS and not words.is_paired(word[0])


def _grams(text: str, frequencies: Frequencies) -> Iterator[str]:
    """Letters that stand together in several passages, and more often than with a neighbour."""
    for run in words.runs(text):
        for n in _GRAMS:
            for i in range(len(run) - n + 1):
                gram = _gram(run, i, n)
                if _is_whole(gram) and not _is_fragment(run, i, n, frequencies):
                    yield gram


def _gram(run: Sequence[str], i: int, n: int) -> str:
    return "".join(run[i : i + n])


def _is_whole(gram: str) -> bool:
    """Whether the letters may be a word: none of a particle at its ends, no hiragana."""
    is_alphabet = gram[0] < _FIRST_CHINESE  # in which two letters are a syllable
    if is_alphabet and len(gram) < _CASELESS_LETTERS:
        return False
    return not (gram[0] in _PARTICLES or gram[-1] in _PARTICLES or _HIRAGANA.search(gram))


def _is_fragment(run: Sequence[str], i: int, n: int, frequencies: Frequencies) -> bool:
    """Whether run[i : i + n] mostly stands beside a letter that it stands beside here."""
    enough = _FRAGMENT * frequencies[_gram(run, i, n)]
    longer = []
    if i > 0:
        longer.append(_gram(run, i - 1, n + 1))
    if i + n < len(run):
        longer.append(_gram(run, i, n + 1))
    return any(frequencies[form] >= enough for form in longer)
