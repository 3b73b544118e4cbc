"""Given answers for the proposer, taken from a corpus: data.answers of a run on it.

    python -m ssp_jax.answers --corpus=FILE_OR_FOLDER --out=answers.jsonl [--eval=test.jsonl ...]

Titles, names, dates, numbers and terms, a few of each passage; those that are an answer in an
evaluation set, as exact match compares them, are left out. The same corpus and seed give the same
file. Each row also says its kind and passage, so that you can take out what you do not want.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

from ssp_jax.answers.candidates import QUOTAS
from ssp_jax.answers.selection import Chosen, find_answers
from ssp_jax.config.values import BOUNDS, Range
from ssp_jax.corpus import passages
from ssp_jax.data import load_questions
from ssp_jax.errors import InputError, printable
from ssp_jax.game.rewards import comparable
from ssp_jax.runtime import files, signals
from ssp_jax.runtime.command import Parser, exit_code, user_path

LIMIT = 50_000  # answers of the paper's training set
EXAMPLES = 5  # shown of each kind


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
