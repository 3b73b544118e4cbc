"""Given answers for the proposer, taken from a corpus: data.answers of a run on it.

    python -m ssp_jax.answers --corpus=FILE_OR_FOLDER --out=answers.jsonl [--eval=test.jsonl ...]

Titles, names, dates, numbers and terms, a few of each passage; those that are an answer in an
evaluation set, as exact match compares them, are left out. The same corpus and seed give the same
file. Each row also says its kind and passage, so that you can take out what you do not want.
"""

import hashlib
import heapq
import json
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from ssp_jax.config import BOUNDS, Range
from ssp_jax.corpus import passages
from ssp_jax.corpus.candidates import QUOTAS, Candidate, Frequencies, choose, forms
from ssp_jax.data import Document, Position, load_questions
from ssp_jax.errors import InputError, printable
from ssp_jax.game.rewards import comparable, normalize_answer
from ssp_jax.retriever.progress import Progress
from ssp_jax.runtime import files, signals
from ssp_jax.runtime.command import Parser, exit_code, user_path

LIMIT = 50_000  # answers of the paper's training set
SEARCHES = 3  # an answer asks for 1 to so many, by chance
EXAMPLES = 5  # shown of each kind


@dataclass(frozen=True)
class Answer:
    """An answer and where it stands."""

    candidate: Candidate
    place: tuple[int, int]  # number of its passage, from 0, and its own among those of the passage
    passage: str  # id
    draw: int  # a random number, by seed and answer

    def row(self) -> str:
        """As data.answers has it, and where it comes from."""
        row = {
            "ground_truth": self.candidate.text,
            "search_turns": 1 + self.draw % SEARCHES,
            "kind": self.candidate.kind,
            "passage": self.passage,
        }
        return json.dumps(row, ensure_ascii=False)


class Chosen:
    """At most `limit` answers, no two equal: a random sample of all that are offered.

    It depends on the seed and not on the order of the corpus, for those with the lowest numbers
    stay.
    """

    def __init__(self, limit: int, seed: int, held_out: Collection[str]) -> None:
        """held_out: answers of the evaluation, in comparable form."""
        self.answers: dict[str, Answer] = {}  # by comparable form
        self.left_out: set[str] = set()  # in comparable form, for they are held out
        self._limit = limit
        self._key = seed.to_bytes(8, "little")
        self._held_out = held_out
        self._highest: list[tuple[int, str]] = []  # a heap of negated numbers

    def offer(self, row: int, document: Document, candidates: Iterator[Candidate]) -> None:
        """Takes what a passage gives, up to the quota of each kind."""
        given: Counter[str] = Counter()
        for number, candidate in enumerate(candidates):
            form = comparable(candidate.text)
            if form in self._held_out:
                self.left_out.add(form)
            elif given[candidate.kind] < QUOTAS[candidate.kind] and self._is_new(candidate, form):
                given[candidate.kind] += 1
                answer = Answer(candidate, (row, number), document.id, self._draw(form))
                self._add(form, answer)

    def _is_new(self, candidate: Candidate, form: str) -> bool:
        return form not in self.answers and bool(normalize_answer(candidate.text))

    def _draw(self, form: str) -> int:
        return int.from_bytes(hashlib.blake2b(form.encode(), digest_size=8, key=self._key).digest())

    def _add(self, form: str, answer: Answer) -> None:
        self.answers[form] = answer
        heapq.heappush(self._highest, (-answer.draw, form))
        if len(self.answers) > self._limit:
            _, highest = heapq.heappop(self._highest)
            del self.answers[highest]

    def in_order(self) -> list[Answer]:
        """In the order of the corpus."""
        return sorted(self.answers.values(), key=lambda answer: answer.place)


def find_answers(
    corpus: str | Path, limit: int, seed: int, held_out: Collection[str]
) -> tuple[Chosen, int]:
    """Answers of a corpus, and the number of its passages.

    Reads it twice: counts how many passages have each text, and then chooses. Raises InputError.
    """
    frequencies = Frequencies()
    for document in _read(corpus, "counting words and names"):
        frequencies.add(forms(document))
    chosen = Chosen(limit, seed, held_out)
    for row, document in enumerate(_read(corpus, "choosing answers")):
        chosen.offer(row, document, choose(document, frequencies))
    if not chosen.answers:
        raise InputError(
            f"{corpus}: expected passages with titles, names, dates, numbers or terms, found "
            f"{frequencies.passages} passages and none that can be an answer"
        )
    return chosen, frequencies.passages


def _read(corpus: str | Path, what: str) -> Iterator[Document]:
    """The passages of a corpus, with progress."""
    progress = Progress()
    position = Position()
    size = max(passages.stamp(Path(corpus))["size"], 1)
    for document in passages.read_passages(corpus, position):
        progress.share(what, min(position.bytes / size, 1.0))
        yield document


def summary(chosen: Chosen, number: int) -> Iterator[str]:
    """The lines that the command prints: what was found, with examples of each kind."""
    answers = chosen.in_order()
    yield f"{len(answers):,} answers from {number:,} passages"
    for kind in QUOTAS:
        of_kind = [answer for answer in answers if answer.candidate.kind == kind]
        spread = sorted(of_kind, key=lambda answer: answer.draw)[:EXAMPLES]
        examples = "; ".join(answer.candidate.text for answer in spread)
        yield f"  {kind:<8}{len(of_kind):8,}   {examples}".rstrip()
    if chosen.left_out:
        examples = "; ".join(sorted(chosen.left_out)[:EXAMPLES])
        yield f"  {len(chosen.left_out):,} are left out, as answers of the evaluation: {examples}"


def main(arguments: Sequence[str] | None = None, prog: str = "python -m ssp_jax.answers") -> int:
    return exit_code(lambda: _run(arguments, prog))


def _run(arguments: Sequence[str] | None, prog: str) -> None:
    parser = Parser(prog=prog, description=__doc__)
    corpus_help = "what retriever.corpus takes: a file of passages, or a folder of .txt and .md"
    parser.add_argument("--corpus", required=True, metavar="PATH", help=corpus_help)
    out_help = "a .jsonl file, for config key data.answers"
    parser.add_argument("--out", required=True, metavar="FILE", help=out_help)
    eval_help = "a file of data.eval_sets, whose answers are left out; may be repeated"
    parser.add_argument("--eval", action="append", default=[], metavar="FILE", help=eval_help)
    limit_help = f"answers at most, drawn by chance ({LIMIT:,})"
    parser.add_argument("--limit", default=LIMIT, type=int, metavar="N", help=limit_help)
    parser.add_argument("--seed", default=0, type=int, metavar="N", help="of that chance (0)")
    args = parser.parse(arguments)
    Range(0, 10_000_000, above=True).check("flag --limit", args.limit)
    BOUNDS["seed"].check("flag --seed", args.seed)
    corpus = _corpus(user_path(args.corpus, "--corpus"))
    out = _out(user_path(args.out, "--out"), corpus)
    held_out: set[str] = set()
    for path in args.eval:
        questions = load_questions(user_path(path, "--eval"))
        held_out.update(comparable(gold) for task in questions for gold in task.answers)

    if remark := passages.left_out(corpus):
        print(printable(remark))
    chosen, number = find_answers(corpus, args.limit, args.seed, held_out)
    with files.replacing(out, str(out)) as file:
        file.writelines(f"{answer.row()}\n" for answer in chosen.in_order())
    print(*map(printable, summary(chosen, number)), sep="\n")
    print(printable(f"{out} is written: --config.data.answers={out}"))


def _corpus(path: str) -> Path:
    corpus = Path(path)
    passages.stamp(corpus)  # says where there is none
    if not corpus.is_file() and not corpus.is_dir():
        raise InputError(f"{corpus}: expected a file or a folder, for it is read twice")
    return corpus


def _out(path: str, corpus: Path) -> Path:
    out = Path(path)
    if out.suffix != ".jsonl":
        raise InputError(f"--out={path}: expected a name that ends in .jsonl")
    if out.exists() and out.samefile(corpus):
        raise InputError(f"--out={path}: expected another file than --corpus")
    return out


if __name__ == "__main__":
    signals.leave(main())
