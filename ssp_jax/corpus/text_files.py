"""Text and Markdown files, cut into passages of about PASSAGE_WORDS words.

Passages end where paragraphs or sentences do, and never reach over a heading. Their title is the
heading above them, after that of the whole file or its name.
"""

import contextlib
import itertools
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ssp_jax.corpus import words
from ssp_jax.data import Document, Position, read_lines
from ssp_jax.errors import InputError

PASSAGE_WORDS = 100  # as in Wikipedia 2018 of DPR and Search-R1
_ENOUGH = 0.8 * PASSAGE_WORDS  # from here on a passage ends with its paragraph
_LIMIT = 1.25 * PASSAGE_WORDS  # a sentence that would pass it begins the next passage
_REST = 0.25 * PASSAGE_WORDS  # fewer at the end of a section stay with the passage before
_CHARS_PER_WORD = 10  # at most; with the space after it
_FRONT_MATTER_LINES = 100
_PARAGRAPH_LINES = 1000

_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*")
_RULER = re.compile(r"=+|-{2,}|(?:\*\s*){3,}|(?:_\s*){3,}")
_OWN_LINE = re.compile(r"[-*+•]\s|\d+[.)]\s|[|>]")  # what begins a line of a list, table or quote
_TABLE_RULE = re.compile(r"[\s|:-]+")
_FENCES = ("```", "~~~")
_COMMENT = re.compile(r"<!--.*?-->")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_EMPHASIS = re.compile(r"\*\*|__|`|(?<!\w)[*_](?=\w)|(?<=\w)[*_](?!\w)")
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])[-_]+|[-_]+(?=[^\W\d_])")
# Where a sentence may end, with what follows it: not after an initial, nor before a small letter.
_SENTENCE_END = re.compile(
    r"(?<!\b[A-Z])[.!?…]+[\"'”’»)\]]*\s+(?![a-z])|[。！？｡][”’」』）]*\s*|[।॥۔؟]\s*|\n+"
)
_WORD = re.compile(r"\s*\S+\s*")


def passages_of(
    path: Path, name: str, position: Position | None = None
) -> Generator[Document, None, None]:
    """The passages of a file. name: of the file, for their ids: name#1, name#2, ..."""
    number = itertools.count(1)
    with contextlib.closing(_text_lines(path, position)) as lines:
        for title, section in itertools.groupby(_paragraphs(lines, name), lambda p: p.title):
            for text in _cut(_pieces(paragraph.text for paragraph in section)):
                yield Document(f"{name}#{next(number)}", title, text)


@dataclass(frozen=True)
class _Paragraph:
    title: str  # of its section
    text: str  # ends with a newline


def _text_lines(path: Path, position: Position | None) -> Generator[tuple[int, str], None, None]:
    """The lines that are not blank, and their numbers from 1."""
    with contextlib.closing(read_lines(path, position)) as lines:
        for number, line in lines:
            try:
                yield number, line.decode("utf-8").rstrip()
            except UnicodeDecodeError as error:
                expected = f"expected UTF-8 text ({error.reason})"
                raise InputError(f"{path} line {number}: {expected}") from None


# --- paragraphs -----------------------------------------------------------------------------------


@dataclass
class _Section:
    """Where a reader of a file is: the headings above the line, and the paragraph so far."""

    name: str  # of the file, in words
    headings: list[tuple[int, str]] = field(default_factory=list)  # level, 1 to 6, and text
    lines: list[str] = field(default_factory=list)

    @property
    def title(self) -> str:
        """The heading above, after the first one: "Parental leave: Who can apply"."""
        texts = [text for _, text in self.headings]
        if not self.headings or self.headings[0][0] > 1:
            texts.insert(0, self.name)
        return ": ".join(dict.fromkeys((texts[0], texts[-1])))

    def paragraph(self) -> Iterator[_Paragraph]:
        """The paragraph that ends here, if there is one."""
        if self.lines:
            yield _Paragraph(self.title, _joined(self.lines) + "\n")
            self.lines = []

    def begin(self, level: int, text: str) -> None:
        """Goes below a heading."""
        self.headings = [above for above in self.headings if above[0] < level]
        self.headings.append((level, text))


def _paragraphs(lines: Iterable[tuple[int, str]], name: str) -> Iterator[_Paragraph]:
    """The paragraphs of a file; of Markdown without the signs of its form."""
    path = Path(name.lower().removesuffix(".gz"))
    stem = Path(name).name[: len(path.stem)]
    section = _Section(_BETWEEN_WORDS.sub(" ", stem))
    if path.suffix == ".txt":
        yield from _plain(lines, section)
    else:
        yield from _markdown(_without_front_matter(lines, section), section)


def _plain(lines: Iterable[tuple[int, str]], section: _Section) -> Iterator[_Paragraph]:
    last = 0
    for number, line in lines:
        # Blank lines are left out of `lines`. A file without any is read piece by piece, too.
        if number > last + 1 or len(section.lines) == _PARAGRAPH_LINES:
            yield from section.paragraph()
        section.lines.append(line.strip())
        last = number
    yield from section.paragraph()


def _markdown(lines: Iterable[tuple[int, str]], section: _Section) -> Iterator[_Paragraph]:
    last = 0
    in_code = False
    for number, line in lines:
        text = line.strip()
        if (number > last + 1 and not in_code) or len(section.lines) == _PARAGRAPH_LINES:
            yield from section.paragraph()
        last = number
        if text.startswith(_FENCES):
            yield from section.paragraph()
            in_code = not in_code
        elif in_code:
            section.lines.append("\n" + line)  # with a line break before it
        elif heading := _HEADING.fullmatch(text):
            yield from section.paragraph()
            section.begin(len(heading[1]), _readable(heading[2]))
        elif _RULER.fullmatch(text):
            yield from _ruled(section, text)
        elif not _TABLE_RULE.fullmatch(text) and (readable := _readable(text)):
            section.lines.append(readable)
    yield from section.paragraph()


def _ruled(section: _Section, ruler: str) -> Iterator[_Paragraph]:
    """A line of === or --- makes the line above a heading; others end the paragraph."""
    if len(section.lines) == 1 and ruler[0] in "=-":
        section.begin(1 if ruler[0] == "=" else 2, section.lines.pop())
    yield from section.paragraph()


def _without_front_matter(
    lines: Iterable[tuple[int, str]], section: _Section
) -> Iterator[tuple[int, str]]:
    """The lines after the settings between --- that some programs put first; takes their title."""
    lines = iter(lines)
    begun: list[tuple[int, str]] = []
    for number, line in lines:
        begun.append((number, line))
        is_first = len(begun) == 1
        if is_first and line != "---":
            break
        if not is_first and line in ("---", "..."):
            begun.clear()
            break
        if title := re.fullmatch(r"title:\s*['\"]?(.*?)['\"]?", line):
            section.name = title[1] or section.name
        if len(begun) == _FRONT_MATTER_LINES:
            break
    return itertools.chain(begun, lines)


def _readable(text: str) -> str:
    """A line of Markdown without links' targets and marks of emphasis."""
    text = _LINK.sub(r"\1", _COMMENT.sub("", text))
    return _EMPHASIS.sub("", text).strip()


def _joined(lines: list[str]) -> str:
    """The lines of a paragraph: those of lists, tables and code stay, others are one line."""
    parts: list[str] = []
    for before, line in itertools.pairwise(["", *lines]):
        own = line.startswith("\n") or _OWN_LINE.match(line)
        # Chinese that a program has wrapped has no space there.
        is_one_word = words.is_paired(before[-1:]) and words.is_paired(line[:1])
        separator = "\n" if own else "" if is_one_word else " "
        parts += [separator, line.strip()]
    return "".join(parts).strip()


# --- passages -------------------------------------------------------------------------------------


def _pieces(paragraphs: Iterable[str]) -> Iterator[str]:
    """Sentences, and parts of those that are too long, with the spaces after them."""
    for text in paragraphs:
        begin = 0
        for end in _SENTENCE_END.finditer(text):
            yield from _parts(text[begin : end.end()])
            begin = end.end()
        yield from _parts(text[begin:])


def _parts(sentence: str) -> Iterator[str]:
    """The sentence itself, or parts of at most PASSAGE_WORDS."""
    if _size(sentence) <= PASSAGE_WORDS:
        if sentence:
            yield sentence
        return
    part = ""
    size = 0.0
    for word in _WORD.findall(sentence):
        # A script without spaces may have no shorter word than the whole sentence.
        for begin in range(0, len(word), PASSAGE_WORDS):
            piece = word[begin : begin + PASSAGE_WORDS]
            added = _size(piece)
            if size + added > PASSAGE_WORDS:
                yield part
                part = ""
                size = 0.0
            part += piece
            size += added
    yield part


def _size(text: str) -> float:
    """In words. What is no text, such as a table of digits, counts by its characters."""
    return max(words.length(text), len(text) / _CHARS_PER_WORD)


def _cut(pieces: Iterable[str]) -> Iterator[str]:
    """Passages of the pieces of a section."""
    before = ""  # the last whole passage, which may still get the rest of the section
    text = ""
    size = 0.0
    for piece in pieces:
        added = _size(piece)
        ends_here = size + added > _LIMIT or (size >= _ENOUGH and text.endswith("\n"))
        if text and ends_here:
            if before:
                yield before.strip()
            before = text
            text = ""
            size = 0.0
        text += piece
        size += added
    if before and size < _REST:
        yield (before + text).strip()
    else:
        yield from (passage.strip() for passage in (before, text) if passage.strip())
