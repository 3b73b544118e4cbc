"""What a question set could score at most: the share of its golds that searches can find at all.

A gold counts as found where cover exact match would find it: as whole words, in normal form.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ssp_jax.data import Document, Task
from ssp_jax.game.rewards import comparable, cover_exact_match
from ssp_jax.retriever import settings
from ssp_jax.retriever.search import LocalRetriever, Searcher
from ssp_jax.runtime import figures, processes, records

FILE = "coverage.json"  # in the folder eval of a workdir
NEAR = 3  # passages of a search
FAR = settings.MAX_TOP_K  # the most that all kinds of search give
SMALL = 200_000  # passages; 31,677 of 390 bytes are read in 2.7 s of a core
_AT_ONCE = 64  # questions of a search

# Columns in the order of tables, with their titles.
COLUMNS = {
    "in_corpus": "gold in a passage",
    "in_titles": "gold a title",
    "in_near": f"gold in {NEAR} passages of the question",
    "in_far": f"in {FAR}",
    "in_question": "gold in the question",
}


def measure(
    sets: Mapping[str, Sequence[Task]],
    retriever: LocalRetriever,
    progress: Callable[[int], None] = lambda passages: None,
) -> dict[str, dict[str, Any]]:
    """For each set the share of questions in each column, their number and their digest.

    progress: called with the number of passages read so far.
    """
    golds = {comparable(gold) for tasks in sets.values() for task in tasks for gold in task.answers}
    documents = map(retriever.document, range(len(retriever)))
    anywhere, titles = _found(golds, documents, progress)
    found = {}
    for name, tasks in sets.items():
        hits = dict.fromkeys(COLUMNS, 0)
        for first in range(0, len(tasks), _AT_ONCE):
            some = tasks[first : first + _AT_ONCE]
            results = retriever.search([task.question for task in some], FAR)
            for task, passages in zip(some, results, strict=True):
                own = set(map(comparable, task.answers))
                texts = [_text(passage) for passage in passages]
                hits["in_corpus"] += bool(own & anywhere)
                hits["in_titles"] += bool(own & titles)
                hits["in_near"] += _any_covers(texts[:NEAR], task)
                hits["in_far"] += _any_covers(texts, task)
                hits["in_question"] += cover_exact_match(task.question, task.answers)
        shares = {column: number / len(tasks) for column, number in hits.items()}
        found[name] = {"questions": len(tasks), "digest": processes.digest(list(tasks)), **shares}
    return found


def of_run(
    folder: Path, sets: Mapping[str, Sequence[Task]], retriever: Searcher | None
) -> dict[str, dict[str, Any]]:
    """What `measure` found for these questions and this search, or finds now in a small corpus.

    folder: eval of a workdir. A large corpus is read by ssp_jax.audit, which writes the same file.
    """
    path = folder / FILE
    if not isinstance(retriever, LocalRetriever):
        return {}
    digests = {name: processes.digest(list(tasks)) for name, tasks in sets.items()}
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
        known = before["sets"] if before["search"] == retriever.source else {}
        same = {name: known[name] for name in sets if known[name]["digest"] == digests[name]}
    except (OSError, ValueError, LookupError, TypeError):  # none, or one that was cut off
        same = {}
    if len(same) == len(sets) or len(retriever) > SMALL:
        return same
    found = measure(sets, retriever)
    write(path, found, retriever)
    return found


def write(path: Path, found: Mapping[str, Any], retriever: LocalRetriever) -> None:
    records.write_document(path, {"search": retriever.source, "sets": found})


def sentence(name: str, found: Mapping[str, Any]) -> str:
    """How far a score of a set can go, for people."""
    shares = {column: figures.percent(100 * found[column]) for column in COLUMNS}
    return (
        f"{name}: the gold of {shares['in_corpus']} % of the questions stands in a passage, and of "
        f"{shares['in_near']} % in the {NEAR} that the question itself finds"
    )


def _any_covers(texts: Sequence[str], task: Task) -> bool:
    return any(cover_exact_match(text, task.answers) for text in texts)


def _text(passage: Document) -> str:
    return f"{passage.title} {passage.text}"


def _found(
    golds: set[str], documents: Iterable[Document], progress: Callable[[int], None]
) -> tuple[set[str], set[str]]:
    """The golds, in normal form, that stand in a passage, and those that are a title."""
    by_first: defaultdict[str, list[list[str]]] = defaultdict(list)
    for gold in golds:
        words = gold.split()
        by_first[words[0]].append(words)
    anywhere: set[str] = set()
    titles: set[str] = set()
    for number, document in enumerate(documents, 1):
        title = comparable(document.title)
        if title in golds:
            titles.add(title)
        words = comparable(_text(document)).split()
        for place, word in enumerate(words):
            for gold_words in by_first.get(word, ()):
                if words[place : place + len(gold_words)] == gold_words:
                    anywhere.add(" ".join(gold_words))
        progress(number)
    return anywhere, titles
