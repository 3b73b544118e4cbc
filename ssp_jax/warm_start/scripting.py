"""The command that writes scripted games: reads the corpus, plays, says what was left out."""

import time
from collections.abc import Sequence
from typing import Any

from configs import default
from ssp_jax import data
from ssp_jax.errors import InputError, json_line, printable
from ssp_jax.game import prompts
from ssp_jax.game.rewards import comparable
from ssp_jax.game.rounds import readable
from ssp_jax.game.rules import QuestionRules
from ssp_jax.retriever.build import ensure_index
from ssp_jax.retriever.search import LocalRetriever, Retriever
from ssp_jax.runtime import files
from ssp_jax.runtime.logger import Phase
from ssp_jax.warm_start import rows
from ssp_jax.warm_start.links import Links
from ssp_jax.warm_start.script import Manner, Script

MAX_PASSAGES = 500_000  # whose titles are read: as many as memory has for sure
_LINE_SECONDS = 5.0  # between lines of progress


def write(flags: Any) -> None:
    """Writes the games that the flags ask for. Raises InputError."""
    retriever = _open(flags.corpus, flags.index)
    passages = range(min(len(retriever), MAX_PASSAGES))
    links = Links(retriever.document(row) for row in passages)
    named = named_by(flags.without, links)
    others = of_other_kinds(flags.kinds, links)
    _say(_about(links, named, flags.without, others))
    script = Script(
        retriever,
        links,
        prompts.STYLES[flags.style],
        QuestionRules(**default.get_config().rules),
        top_k=flags.top_k,
        noise=flags.noise,
        manner=Manner(flags.one_hop, flags.stop_early, flags.search_again),
        held_out=named | others,
        seed=flags.seed,
    )
    progress = _Progress(flags.games)
    hops = {1: 0, 2: 0}
    right = 0.0
    answers = []
    with files.replacing(flags.out, f"--out={flags.out}", keep=True) as file:
        for game in script.games(flags.games, progress):
            file.write(json_line({**readable(game), "player": rows.SCRIPT}) + "\n")
            searches = game.task.searches
            answers.append({"ground_truth": game.task.answers[0], "search_turns": searches})
            hops[game.task.searches] += 1
            right += game.scores[0]
        made = sum(hops.values())
        if not made:
            raise InputError(
                f"--index={flags.index}: expected passages with titles that name each other, found "
                "none on which a game can be made"
            )
    if flags.answers:
        with files.replacing(flags.answers, f"--answers={flags.answers}") as file:
            file.writelines(json_line(answer) + "\n" for answer in answers)
    fewer = "" if made == flags.games else f" of {flags.games:,}: the corpus gives no more"
    _say(
        f"{flags.out}: {made:,} games{fewer}, {hops[1]:,} of one hop and {hops[2]:,} of two; "
        f"{right / made:.0%} of the solvers are right, the others stop early on purpose"
    )


def _open(corpus: str, index: str) -> LocalRetriever:
    c = default.get_config().retriever
    ensure_index(corpus, index, stemmer=c.stemmer, stopwords=c.stopwords, k1=c.k1, b=c.b)
    return Retriever.load(index)


def named_by(paths: Sequence[str], links: Links) -> frozenset[str]:
    """The names of the corpus that question sets have, in a question or as an answer."""
    answers: set[str] = set()
    found: set[str] = set()
    for path in paths:
        for task in data.load_questions(path):
            answers |= set(map(comparable, task.answers))
            found |= {name for _, name in links.named(task.question)}
    found |= {name for name in links.names if comparable(name) in answers}
    return frozenset(found)


def of_other_kinds(kinds: Sequence[str], links: Links) -> frozenset[str]:
    """The names that the corpus does not call one of these kinds; none where no kind is given.

    Raises InputError for a kind that no name has.
    """
    if not kinds:
        return frozenset()
    found = {name: links.kind(name) for name in links.names}
    if unknown := sorted(set(kinds) - set(found.values())):
        raise InputError(
            f"--kinds: expected words that passages call what they are about, such as country; "
            f"found {unknown[0]!r}, which no passage uses so"
        )
    return frozenset(name for name, kind in found.items() if kind not in kinds)


def _about(
    links: Links, named: frozenset[str], paths: Sequence[str], others: frozenset[str]
) -> str:
    text = f"{len(links.names):,} names are titles"
    if paths:
        text += f", {len(named):,} of them left out, which {', '.join(paths)} name"
    if others:
        text += f", {len(others):,} of other kinds"
    return text


class _Progress:
    """A line every few seconds."""

    def __init__(self, total: int) -> None:
        self._phase = Phase("scripting", total, self._show)
        self._last = time.monotonic()

    def __call__(self, done: int) -> None:
        self._phase.advance(done)

    def _show(self, detail: str) -> None:
        if time.monotonic() - self._last >= _LINE_SECONDS:
            self._last = time.monotonic()
            _say(f"scripting {detail}")


def _say(text: str) -> None:
    print(printable(f"{time.strftime('%H:%M:%S')} {text}"), flush=True)
