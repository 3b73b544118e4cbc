"""Statistics of the training answers, their overlap with the evaluation, and what searches reach.

    python -m ssp_jax.audit --answers=answers.jsonl [--eval=test.parquet --eval=dev.jsonl ...]
    python -m ssp_jax.audit --index=INDEX --eval=test.parquet [--kind=dense --encoder=FOLDER]

Self-play needs no questions, but a proposer that is given the answers of the evaluation writes
questions close to it. Answers are compared as exact match compares them: lower case, no articles,
no punctuation, and unchanged where nothing would be left ("A", "The The", "+").

With --index it reads the whole corpus, and shows of each set the share of questions whose gold is
there at all, among titles, in what the question's own words find, and in the question itself. The
first bounds a solver that copies its answers from passages. --out=RUN/eval/coverage.json leaves it
where a run shows it beside its scores; of a small corpus a run finds it out by itself.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from ssp_jax.data import Task, load_answers, load_question_sets
from ssp_jax.errors import InputError, printable
from ssp_jax.game.rewards import comparable, normalize_answer
from ssp_jax.retriever import settings
from ssp_jax.retriever.progress import Progress
from ssp_jax.runtime import figures, signals
from ssp_jax.runtime.command import Parser, exit_code, user_path

EXAMPLES = 3


@dataclass(frozen=True)
class Overlap:
    """One evaluation set against the training answers."""

    questions: int
    repeated: int  # questions with the text of an earlier one
    shared: list[str]  # normalised training answers that are an answer here, most questions first
    asked: int  # questions that have one of these among their answers


def normalized(tasks: Sequence[Task]) -> list[set[str]]:
    """The answers of each task, equal where exact match calls them equal."""
    return [set(map(comparable, task.answers)) for task in tasks]


def overlap(training: set[str], questions: Sequence[Task]) -> Overlap:
    """training: normalised answers."""
    hits = [golds & training for golds in normalized(questions)]
    counts = Counter(answer for shared in hits for answer in sorted(shared))
    return Overlap(
        questions=len(questions),
        repeated=len(questions) - len({task.question for task in questions}),
        shared=[answer for answer, _ in counts.most_common()],
        asked=sum(map(bool, hits)),
    )


def answers_table(tasks: Sequence[Task]) -> Table:
    """Statistics of the training answers."""
    texts = [task.answers[0] for task in tasks]
    counts = Counter(map(comparable, texts))
    repeats = f"{len(texts) - len(counts):,}"
    often = [f"{answer!r} x {n}" for answer, n in counts.most_common(EXAMPLES) if n > 1]
    if often:
        repeats += f" (most: {', '.join(often)})"
    words = np.array([len(text.split()) for text in texts])
    longest = max(texts, key=len)
    empty = sum(not normalize_answer(text) for text in texts)
    searches = sorted(Counter(task.searches for task in tasks).items())

    table = _table("Training answers", "", "")
    table.add_row("answers", f"{len(texts):,}")
    table.add_row("different, normalised", f"{len(counts):,}")
    table.add_row("repeats", printable(repeats))
    word_counts = f"{words.min()} / {np.median(words):g} / {words.max()}"
    table.add_row("words, least / median / most", word_counts)
    table.add_row("characters, longest", printable(f"{len(longest)}: {longest[:60]!r}"))
    table.add_row("empty once normalised", f"{empty:,}")
    search_counts = ", ".join(f"{n}: {count:,}" for n, count in searches)
    table.add_row("searches asked for: answers", search_counts)
    return table


def overlap_table(training: set[str], sets: dict[str, list[Task]]) -> Table:
    """Overlap of each evaluation set with the training answers."""
    table = _table(
        "Evaluation",
        "set",
        "questions",
        "repeated",
        "answer in training",
        "of questions",
        "most asked",
    )
    for name, questions in sets.items():
        found = overlap(training, questions)
        table.add_row(
            printable(name),
            f"{found.questions:,}",
            f"{found.repeated:,}",
            f"{found.asked:,}",
            f"{found.asked / found.questions:.1%}",
            printable(", ".join(found.shared[:EXAMPLES])),
        )
    return table


def _table(title: str, *columns: str) -> Table:
    """An empty table; columns between the first and the last hold numbers."""
    table = Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        show_header=any(columns),
    )
    for i, column in enumerate(columns):
        is_number = 0 < i < len(columns) - 1
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    return table


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ssp_jax.audit") -> int:
    return exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    parser = Parser(prog=prog, description=__doc__)
    answers_help = "config key data.answers"
    parser.add_argument("--answers", default="", metavar="FILE", help=answers_help)
    eval_help = "a file of data.eval_sets; may be repeated"
    parser.add_argument("--eval", action="append", default=[], metavar="FILE", help=eval_help)
    parser.add_argument("--index", default="", metavar="FOLDER", help="a built search index")
    parser.add_argument("--kind", default="bm25", choices=settings.INDEX_KINDS)
    encoder_help = "that made the index's vectors, for --kind=dense and hybrid"
    parser.add_argument("--encoder", default="", metavar="FOLDER", help=encoder_help)
    parser.add_argument("--out", default="", metavar="FILE", help="of what --index shows, as JSON")
    args = parser.parse(arguments)
    _check(args)
    files = [user_path(path, "--eval") for path in args.eval]
    names = [Path(path).name for path in files]
    if len(set(names)) < len(names):
        names = files
    sets = load_question_sets(dict(zip(names, files, strict=True)))
    width = None if sys.stdout.isatty() else 120
    # No markup: answers have brackets.
    console = Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False)
    if args.answers:
        tasks = load_answers(user_path(args.answers, "--answers"))
        console.print(answers_table(tasks))
        if sets:
            console.print(overlap_table(set().union(*normalized(tasks)), sets))
    if args.index:
        console.print(_coverage(args, sets))


def _check(args: argparse.Namespace) -> None:
    """Raises InputError where flags do not go together."""
    if not args.answers and not args.index:
        raise InputError("flags --answers and --index are missing; expected one of them or both")
    if args.index and not args.eval:
        raise InputError("flag --index needs --eval: the questions whose golds are looked for")
    if args.out and not args.index:
        raise InputError("flag --out needs --index: it gets what is found there")
    settings.check_flags(args.kind, args.encoder, settings.MAX_TOP_K)


def _coverage(args: argparse.Namespace, sets: dict[str, list[Task]]) -> Table:
    """What searches can reach of each set; --out gets it too."""
    # Mistakes above are reported before the seconds that JAX takes. Nothing here needs a device.
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from ssp_jax.evaluation import coverage
    from ssp_jax.retriever import dense

    retriever = dense.load_local(
        args.kind,
        user_path(args.index, "--index"),
        threads=0,
        top_k=settings.MAX_TOP_K,
        settings=settings.DenseSettings(user_path(args.encoder, "--encoder")),
    )
    progress = Progress()
    total = len(retriever)
    found = coverage.measure(
        sets,
        retriever,
        lambda done: progress.share(f"reading {total:,} passages", done / total),
    )
    if args.out:
        coverage.write(Path(user_path(args.out, "--out")), found, retriever)
    table = _table("Coverage: percent of the questions", "set", "questions")
    for title in coverage.COLUMNS.values():
        table.add_column(title, justify="right", overflow="fold")
    for name, shares in found.items():
        cells = [figures.percent(100 * shares[column]) for column in coverage.COLUMNS]
        table.add_row(printable(name), f"{shares['questions']:,}", *cells)
    return table


if __name__ == "__main__":
    signals.leave(main())
