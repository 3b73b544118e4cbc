"""--help=WORD: the keys of the config with WORD in their names or comments."""

import shutil
from collections.abc import Iterable, Iterator
from textwrap import fill

from ssp_jax.config.comments import Key, Section, read_sections
from ssp_jax.errors import InputError, shown
from ssp_jax.runtime.command import nearest

_LEGEND = (
    "Values are defaults. [P]: the paper, arXiv 2510.18821; [C]: its reference code; [H]: this "
    "project's choice."
)
_WIDTH = 100  # of the text, where the terminal is not narrower


def find_keys(word: str) -> str:
    """Each key with its default and comment, which has the unit. Raises InputError for none."""
    sections = read_sections()
    in_names = [key for key in _keys(sections) if word.lower() in key.name.lower()]
    in_comments = [key for key in _keys(sections) if word.lower() in key.comment.lower()]
    chosen = {key.name for key in [*in_names, *in_comments]}
    if not chosen or not word.strip():
        found = nearest(word, [key.name for key in _keys(sections)])
        expected = f"; the nearest is {found}" if found else ", and none is spelt alike"
        raise InputError(f"--help={word}: no key has {shown(word)} in name or comment{expected}")
    lines = [line for section in sections for line in _section(section, chosen)]
    return "\n".join([*lines, *_filled(_LEGEND)])


def _keys(sections: Iterable[Section]) -> Iterator[Key]:
    for section in sections:
        yield from section.keys


def _section(section: Section, chosen: set[str]) -> Iterator[str]:
    """The chosen keys of a section, below what holds for the whole section."""
    keys = [key for key in section.keys if key.name in chosen]
    if keys and section.comment:
        yield from _filled(f"{section.name}: {section.comment}")
    for key in keys:
        yield f"--config.{key.name}={key.default}"
        yield from _filled(key.comment, indent=4)
    if keys:
        yield ""


def _filled(text: str, indent: int = 0) -> Iterator[str]:
    margin = " " * indent
    width = min(_WIDTH, shutil.get_terminal_size((_WIDTH, 24)).columns)
    if text:
        yield fill(text, width, initial_indent=margin, subsequent_indent=margin)
