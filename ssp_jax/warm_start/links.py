"""Links of a corpus with titles: a passage that names the title of another one links to it.

So does what it says in a field (fields.py), and by an adjective: who "was a Russian playwright" is
from what is titled Russia.

A title is taken as Wikipedia has it, `Narcissus (plant)`, or as `Ecuador - Location`, where several
passages are about one thing. A name counts where it stands as its title writes it: words that begin
small, such as "newt", are no links.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from ssp_jax.data import Document
from ssp_jax.game.rewards import comparable
from ssp_jax.warm_start.fields import Fields

# Of a passage's text: a result is cut to limits.observation_tokens, and the fact must be seen.
SEEN_CHARACTERS = 240
# Words before the object: fewer say nothing, more are a paragraph.
MIN_WORDS = 4
MAX_WORDS = 16
_MIN_NAME = 3  # characters
# What a sentence calls the thing that it is about: "Bray is a coastal town in" has town.
_KIND = re.compile(
    r"\b(?:is|was|are|were) (?:one of )?(?:an?|the) (?:[\w'’-]+,? )*?([a-z]{3,})(?<!ed)(?<!ly)"
    r"(?=[.;(]| (?:in|of|on|at|by|for|from|to|with|and|or|near|between|that|which|who|whose|where"
    r"|found|known|made|\w+ed (?:in|on|at|by|from|to|with|as|for|of))\b)"
)
_NO_KINDS = ("type", "form", "kind", "name", "term", "title", "part", "set", "group", "series")
_SENTENCE_END = re.compile(r"(?<=[a-z0-9)]{2})[.!?;] +(?=[A-Z])")


# "Rome is the capital of": what follows is the place that Rome belongs to.
_BELONGING = re.compile(
    r" (?:in|of|from)(?: the)?(?: (?:north|south|east|west|central|mid)[a-z]*)?$", re.IGNORECASE
)
_ADJECTIVE = re.compile(r"\b(?:is|was|are|were) (?:an?|the) ([A-Z][a-z]{3,}(?:n|ese|ish|i)) [a-z]")
_ADJECTIVE_ENDINGS = (
    "n",
    "an",
    "ian",
    "ean",
    "ese",
    "ish",
    "i",
)  # that with the longest stem first
_MIN_STEM = 4  # characters; Chad and Chadian
_MAX_CHANGED = 2  # of a name's end, which the adjective has not: Turkey and Turkish


@dataclass(frozen=True)
class Title:
    """`Ecuador - Location`: name Ecuador, aspect Location. Without an aspect it is ""."""

    name: str
    aspect: str

    @property
    def query(self) -> str:
        """The words by which the passage is found."""
        return f"{self.name} {self.aspect}".strip()


@dataclass(frozen=True)
class Fact:
    """A statement of a passage that a name completes.

    statement: names the subject, and is followed by the object. noun: what the object is to the
    subject, such as "lowest point" or "country"; "" if only the statement tells. adjective: what
    the passage has in place of the object, to the end of the clause.
    """

    document: Document
    subject: str
    statement: str
    object: str
    noun: str = ""
    adjective: str = ""

    @property
    def is_field(self) -> bool:
        return bool(self.noun and title_of(self.document).aspect)

    @property
    def asked(self) -> str:
        """A name for the object by the subject, such as "the country of Bray"."""
        return f"the {self.noun} of {self.subject}"

    @property
    def read(self) -> str:
        """What the passage says, and the object as what is asked for."""
        said = f"{self.statement} {self.adjective or self.object}."
        if self.noun and not self.is_field:
            said += f" The {self.noun} is {self.object}."
        return said[:1].upper() + said[1:]


def title_of(document: Document) -> Title:
    """The title without quotes, and without what tells it from others of that name."""
    title = document.title.strip().strip('"').strip()
    name, dash, aspect = title.partition(" - ")
    if not dash:
        name = re.sub(r" \([^()]*\)$", "", title)
    return Title(name.strip(), aspect.strip())


class Links:
    """The names of a corpus, and the facts of its passages."""

    def __init__(self, documents: Iterable[Document]) -> None:
        self.names: dict[str, list[Document]] = defaultdict(list)  # -> the passages about it
        for document in documents:
            name = title_of(document).name
            if len(name) >= _MIN_NAME and not name[0].islower():
                self.names[name].append(document)
        # First word -> names, the longest first.
        self._by_word: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.names, key=lambda name: (-len(name), name)):
            self._by_word[_first_word(name)].append(name)
        self._kinds = {name: _kind(documents) for name, documents in self.names.items()}
        listed = [document for documents in self.names.values() for document in documents]
        told = [(title_of(document).aspect, _told(document)) for document in listed]
        self._fields = Fields((aspect, text) for aspect, text in told if aspect)
        # The adjectives of names of which much is told, by their first letters.
        self._by_stem: dict[str, list[str]] = defaultdict(list)
        for name in self.names:
            if len(name) >= _MIN_STEM and self.aspects(name):
                self._by_stem[name[:_MIN_STEM]].append(name)
        self.facts = [fact for document in listed for fact in self._find(document)]

    def aspects(self, name: str) -> list[str]:
        """What passages about a name are titled by beside it."""
        titles = map(title_of, self.names.get(name, ()))
        return [title.aspect for title in titles if title.aspect]

    def kind(self, name: str) -> str:
        """What its passage says that a name is, in one word, such as country; "" if nothing."""
        return self._kinds.get(name, "")

    def named(self, text: str) -> Iterator[tuple[int, str]]:
        """The names in a text with their places, from left to right; of those at a place the
        longest.
        """
        end = 0
        for word in re.finditer(r"[^\W_]+", text):
            begin = word.start()
            if begin < end or not _begins(text, begin):
                continue
            for name in self._by_word.get(word[0], ()):
                if text.startswith(name, begin) and _ends(text, begin + len(name)):
                    end = begin + len(name)
                    yield begin, name
                    break

    def _find(self, document: Document) -> Iterator[Fact]:
        """What the beginning of a passage states about what it is titled by."""
        title = title_of(document)
        fields = list(self._fields.of(title.aspect, _told(document))) if title.aspect else []
        for noun, value in fields:
            asked = f"the {noun} of {title.name} is"
            if not _tells(asked, value) and not names(title.name, value):
                yield Fact(document, title.name, asked, value, noun)
        if fields:
            return
        text = document.text[:SEEN_CHARACTERS]
        yield from self._by_adjective(document, title, text)
        seen: set[str] = set()
        for begin, name in self.named(text):
            if begin + len(name) >= SEEN_CHARACTERS or name in seen:
                continue
            statement = _statement(title, text[:begin])
            if statement is None or _tells(statement, name) or not names(title.name, statement):
                continue
            seen.add(name)
            belongs = not title.aspect and _BELONGING.search(statement)
            noun = self.kind(name) if belongs else ""
            yield Fact(document, title.name, statement, name, noun)

    def _by_adjective(self, document: Document, title: Title, text: str) -> Iterator[Fact]:
        """What the first sentence says a thing is by an adjective of a name."""
        sentence = _SENTENCE_END.split(text)[0]
        found = None if title.aspect else _ADJECTIVE.search(sentence)
        if not found or not names(title.name, sentence[: found.start(1)]):
            return
        name = self._of_adjective(found[1])
        clause = re.split(r"[,.;(]", sentence[found.start(1) :])[0].split()
        if name and self.kind(name):
            statement = sentence[: found.start(1)].strip()
            adjective = " ".join(clause[:MAX_WORDS])
            yield Fact(document, title.name, statement, name, self.kind(name), adjective)

    def _of_adjective(self, word: str) -> str:
        """The name that an adjective is of, by their common beginning; "" if none is near."""
        for ending in _ADJECTIVE_ENDINGS:
            stem = word.removesuffix(ending)
            if stem == word or len(stem) < _MIN_STEM:
                continue
            near = [
                name
                for name in self._by_stem[stem[:_MIN_STEM]]
                if name.startswith(stem) and len(name) - len(stem) <= _MAX_CHANGED
            ]
            if near:
                return min(near, key=len)
        return ""


def names(name: str, text: str) -> re.Match[str] | None:
    """Where a text has a name, also with further words in it, as Johann Sebastian Bach."""
    words = map(re.escape, name.split())
    return re.search(r"\b" + r"(?: [^ ,.()]+){0,3} ".join(words) + r"(?!\w)", text)


def _kind(documents: Iterable[Document]) -> str:
    """The kind that the first sentence of one of the passages about a thing states."""
    for document in documents:
        sentence = _SENTENCE_END.split(document.text[:SEEN_CHARACTERS])[0]
        found = None if title_of(document).aspect else _KIND.search(sentence)
        if found and found[1] not in _NO_KINDS:
            return found[1]
    return ""


def _first_word(name: str) -> str:
    found = re.search(r"[^\W_]+", name)
    return found[0] if found else ""


def _begins(text: str, begin: int) -> bool:
    """A name may begin here: no part of a longer one, such as York of New York."""
    before = text[:begin].rstrip(" ").rpartition(" ")[2]
    follows = before[:1].isupper() and not before.endswith((".", ",", ";", ":", ")"))
    return begin == 0 or (text[begin - 1] in ' ("' and not follows)


def _ends(text: str, end: int) -> bool:
    """A name may end here: no letter and no further capital follows."""
    after = text[end : end + 2]
    return not after[:1].isalnum() and not (after[:1] in " -'’" and after[1:].isupper())


def _told(document: Document) -> str:
    """What is seen of a passage behind its name and aspect."""
    title = title_of(document)
    return document.text[:SEEN_CHARACTERS].removeprefix(f"{title.name}. {title.aspect}: ")


def _statement(title: Title, before: str) -> str | None:
    """What a passage says before a name: from the start of its sentence, or of its aspect."""
    if title.aspect:
        label = f"{title.name}. {title.aspect}: "
        if not before.startswith(label):
            return None
        aspect = title.aspect[:1].lower() + title.aspect[1:]
        before = f"the {aspect} of {title.name} is {before.removeprefix(label)}"
    sentence = _SENTENCE_END.split(before)[-1]
    words = len(sentence.split())
    whole = sentence.count("(") == sentence.count(")") and sentence.count('"') % 2 == 0
    return sentence.strip() if whole and MIN_WORDS <= words <= MAX_WORDS else None


def _tells(statement: str, name: str) -> bool:
    """Whether the statement gives the name away, in the words of the game's own rule or nearly."""
    return name.lower() in statement.lower() or comparable(statement).endswith(comparable(name))
