"""Fields of passages that tell one aspect of a thing: `lowest point: Gulf of Thailand`.

Nothing marks where a value ends and the next label begins: "lowest point: Gulf of Thailand 0 m mean
elevation: 126 m". A label is what many passages of the same aspect write before a colon.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

MIN_PASSAGES = 8  # which have a label
MAX_LABEL_WORDS = 4
MAX_VALUE_WORDS = 6
MAX_SMALL_WORDS = 2  # of a value, which begin small: more are no name
_LABEL_WORD = re.compile(r"[A-Za-z]{2,}")
# Of a value: until what is added to it, such as a number with its unit.
_VALUE_END = re.compile(r' ?[(;:,/\["”]| (?=-?\d)|(?<!\b[A-Z])\. | (?=[a-z ]+: )| $')
# Not "and term of office", "exports - partners", nor lists such as "languages".
_NAME = re.compile(r"(?!and |of |in |to )[a-z ]{3,}(?:[a-rt-z]|ss)")
_DATE = re.compile(r"\d{1,2} [A-Z][a-z]+ \d{4}\b")
# Labels that say nothing without the aspect.
_SAID_OF_ALL = {"name": "{}", "title": "title of the {}"}


class Fields:
    """The labels of a corpus by aspect, and the fields of its passages."""

    def __init__(self, told: Iterable[tuple[str, str]]) -> None:
        """told: aspects, and what a passage says of them."""
        counts: dict[str, Counter[str]] = defaultdict(Counter)
        for aspect, text in told:
            counts[aspect].update({label for _, label in _endings(text)})
        self._counts = counts

    def of(self, aspect: str, text: str) -> Iterator[tuple[str, str]]:
        """What a text says of an aspect: what is told, such as "lowest point", and its value."""
        labels = list(self._labels(aspect, text))
        whole = re.sub(r" ?\(.*?\)", "", aspect).lower()
        if not labels:
            labels = [(0, 0, whole)]
        begins = [begin for begin, _, _ in labels]
        for (_, end, label), stop in zip(labels, [*begins[1:], len(text)], strict=False):
            name = _SAID_OF_ALL[label].format(whole) if label in _SAID_OF_ALL else label
            if _NAME.fullmatch(name) and (value := _value(text[end:stop])):
                yield name, value

    def _labels(self, aspect: str, text: str) -> Iterator[tuple[int, int, str]]:
        """Begin, end and words of each label, from left to right."""
        by_end: dict[int, list[str]] = defaultdict(list)
        for end, label in _endings(text):
            by_end[end].append(label)
        counts = self._counts[aspect]
        for end, labels in by_end.items():
            least = max(MIN_PASSAGES, counts[labels[0]] // 2)
            known = [label for label in labels if counts[label] >= least]
            if known:
                label = max(known, key=len)
                yield end - len(label) - 2, end, label.lower()


def _endings(text: str) -> Iterator[tuple[int, str]]:
    """The last words before each colon, the fewest first, with the place behind the colon."""
    for colon in re.finditer(r"\w(: )", text):
        words: list[str] = []
        for word in reversed(text[: colon.start(1)].split(" ")[-MAX_LABEL_WORDS:]):
            if not _LABEL_WORD.fullmatch(word):
                break
            words.insert(0, word)
            yield colon.end(1), " ".join(words)


def _value(text: str) -> str:
    """What a field begins with, if it is a name or a date; else ""."""
    text = text.lstrip(' "“')
    if date := _DATE.match(text):
        return date[0]
    # Without an end the text may have been cut in a word.
    value, *rest = _VALUE_END.split(text, maxsplit=1)
    words = value.split()
    small = sum(word[0].islower() for word in words)
    named = value[:1].isupper() and len(value) > 3 and len(words) <= MAX_VALUE_WORDS
    return value.rstrip(" .") if named and small <= MAX_SMALL_WORDS and rest else ""
