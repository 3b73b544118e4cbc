"""The command that writes scripted games: reads the corpus, plays, says what was left out."""

import time
from collections.abc import Iterator, Sequence
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
from ssp_jax.warm_start.links import Fact, Links
from ssp_jax.warm_start.script import Manner, Script

MAX_PASSAGES = 500_000  # whose titles are read: as many as memory has for sure
_LINE_SECONDS = 5.0  # between lines of progress


def write(flags: Any) -> None:
    """Writes the games that the flags ask for. Raises InputError."""
    retriever = _open(flags.corpus, flags.index)
    passages = range(min(len(retriever), MAX_PASSAGES))
    links = Links(retriever.document(row) for row in passages)
    facts = list(usable(links, flags.without, flags.kinds, flags.fields))
    _say(
        f"{len(links.names):,} names are titles; of {len(links.facts):,} facts "
        f"{len(facts):,} are used"
    )
    script = Script(
        retriever,
        links,
        facts,
        prompts.STYLES[flags.style],
        QuestionRules(**default.get_config().rules),
        top_k=flags.top_k,
        noise=flags.noise,
        manner=Manner(flags.one_hop, flags.one_hop_fields, flags.stop_early, flags.search_again),
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


def usable(
    links: Links, without: Sequence[str], kinds: Sequence[str], fields: Sequence[str] = ()
) -> Iterator[Fact]:
    """The facts that no question of these files touches, and that are about these kinds of things.

    No name in them is in a question or an answer, and what a field tells is not asked for. kinds:
    as passages call what the facts lead to, or what has the field, where they say what it is to
    what they tell of; all kinds if none is given. fields: the only ones, if any is given.
    Raises InputError for a kind that no name has, and for a field that no passage has.
    """
    found = {links.kind(name) for name in links.names}
    if unknown := sorted(set(kinds) - found):
        raise InputError(
            f"--kinds: expected words that passages call what they are about, such as country; "
            f"found {unknown[0]!r}, which no passage uses so"
        )
    told = {fact.noun for fact in links.facts if fact.is_field}
    if unknown := sorted(set(fields) - told):
        raise InputError(
            "--fields: expected what passages tell of things, such as currency; "
            f"found {unknown[0]!r}, which too few tell"
        )
    tasks = [task for path in without for task in data.load_questions(path)]
    answers = {comparable(answer) for task in tasks for answer in task.answers}
    named = {name for task in tasks for _, name in links.named(task.question)}
    asked = " ".join(task.question.lower() for task in tasks)
    for fact in links.facts:
        about = {fact.subject, fact.object}
        if about & named or answers & set(map(comparable, about)):
            continue
        if fact.is_field and (fact.noun in asked or (fields and fact.noun not in fields)):
            continue
        about_kind = links.kind(fact.subject if fact.is_field else fact.object)
        if not kinds or (fact.noun and about_kind in kinds):
            yield fact


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
