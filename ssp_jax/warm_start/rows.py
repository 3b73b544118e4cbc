"""Files of episodes to learn from: which of them are kept, and what each player saw and wrote.

A line is one of
* a game of self-play as a run's folder `episodes` has it, or of scripted players (script.py),
* a solver's episode as `ssp_jax.generate` writes it, with "golden_answers",
* a chat in the form of Search-R1, {"messages": [{"role", "content"}, ...], "golden_answers":
  [...]}, whose assistant writes <think>, <search> and <answer> around inserted <information>.
Prompts are not taken from the file: they are rendered again, as the model will meet them.
"""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssp_jax import data
from ssp_jax.data import QUESTION_MARK, Document, Row
from ssp_jax.errors import InputError
from ssp_jax.game import prompts, rewards
from ssp_jax.game.examples import Example
from ssp_jax.game.noise import distinct
from ssp_jax.game.prompts import Style
from ssp_jax.game.roles import (
    PROPOSER,
    SEARCH_ENGINE,
    SOLVER,
    VERIFIER,
    EpisodeContext,
    Role,
)
from ssp_jax.runtime.command import user_path

SCRIPT = "script"  # "player" of a scripted game: its weak moves are meant to be learnt too
GOLDS = ("golden_answers", "answers", "possible_answers")
_SHOWN = re.compile(r"\s*<(information|observation)>(.*?)</\1>\s*", re.DOTALL)

Segments = list[tuple[str, bool]]  # text, and whether the model wrote it


@dataclass(frozen=True)
class Shown:
    """An episode in words: its prompt, and what followed."""

    role: Role
    messages: list[dict[str, str]]
    segments: Segments
    game: int  # number of the line over all files: episodes of a game belong together
    row: Row


@dataclass(frozen=True)
class Form:
    """In what form a model meets a game, however it was when the game was played."""

    context: EpisodeContext
    shown: tuple[Example, ...]  # worked examples

    @property
    def style(self) -> Style:
        return self.context.style


@dataclass(frozen=True)
class Selection:
    """What is kept. Counts what is left out, by reason."""

    keep: str  # config key warm_start.keep
    metric: str  # of rewards.METRICS: whether an answer is right
    left_out: Counter[str] = dataclasses.field(default_factory=Counter)


def files(paths: str) -> list[Path]:
    """The files of config key warm_start.episodes: files, or folders of runs, between commas."""
    found: list[Path] = []
    for text in paths.split(","):
        path = Path(user_path(text.strip(), "config key warm_start.episodes"))
        if not path.is_dir():
            found.append(path)
            continue
        inside = path / "episodes" if (path / "episodes").is_dir() else path
        of_folder = sorted(inside.glob("*.jsonl"))
        if not of_folder:
            raise InputError(
                f"{path}: expected the folder of a run that dumped episodes (log.episodes_every), "
                "found no *.jsonl"
            )
        found += of_folder
    return found


def read(paths: Sequence[Path], context: EpisodeContext, selection: Selection) -> Iterator[Shown]:
    """The episodes that are kept, in the order of the files. Raises InputError."""
    sets = context.example_sets
    game = 0
    for path in paths:
        for row in data.read_rows(path):
            form = Form(context, sets[game % len(sets)])
            for role, messages, segments in _parse(row, form, selection):
                yield Shown(role, messages, segments, game, row)
            game += 1


_Parsed = Iterator[tuple[Role, list[dict[str, str]], Segments]]


def _parse(row: Row, form: Form, selection: Selection) -> _Parsed:
    if "messages" in row.values:
        return _chat(row, form, selection)
    if "attempts" in row.values:
        return _game(row, form, selection)
    if "turns" in row.values:
        return _answer(row, form, selection)
    raise row.error("messages", 'a chat (or "attempts" of a game, or "turns" of an answer)')


# --- games ---


def _game(row: Row, form: Form, selection: Selection) -> _Parsed:
    """The episodes of a game: of the proposer and verifier of a verified question, of solvers."""
    values = row.values
    whole = selection.keep == "all" or values.get("player") == SCRIPT
    question = _object(row, "question", values.get("question"))
    is_own = question is not None and not question.get("reused")
    is_verified = is_own and not values.get("fault")

    proposer = _object(row, "proposer", values.get("proposer"))
    if proposer is not None and _is_kept(is_verified or whole, PROPOSER, selection):
        answer = row.text("answer", values.get("answer"))
        searches = values.get("requested_searches")
        if type(searches) is not int:
            raise row.error("requested_searches", "a whole number")
        examples = row.optional("examples")
        messages = prompts.proposer_messages(form.style, answer, searches, examples, form.shown)
        yield PROPOSER, messages, _segments(row, "proposer", proposer, PROPOSER, form.style)
    if question is None:
        return

    text = row.text("question.text", question.get("text"))
    verifier = _object(row, "verifier", values.get("verifier"))
    if verifier is not None and is_own and _is_kept(is_verified or whole, VERIFIER, selection):
        messages = prompts.verifier_messages(
            form.style, text, _materials(row, form.context), form.shown
        )
        yield VERIFIER, messages, _segments(row, "verifier", verifier, VERIFIER, form.style)

    attempts = values["attempts"]
    if not isinstance(attempts, list):
        raise row.error("attempts", "a list of episodes")
    for value in attempts:
        attempt = _object(row, "attempts", value)
        score = attempt.get("score") if attempt else None
        if attempt is None or not isinstance(score, int | float):
            raise row.error("attempts", "episodes with a score")
        if _is_kept(score >= 1 or whole, SOLVER, selection):
            messages = prompts.solver_messages(form.style, text, form.shown)
            yield SOLVER, messages, _segments(row, "attempts", attempt, SOLVER, form.style)


def _is_kept(is_right: bool, role: Role, selection: Selection) -> bool:
    if not is_right:
        selection.left_out[role.name] += 1
    return is_right


def _object(row: Row, field: str, value: Any) -> Mapping[str, Any] | None:
    if value is not None and not isinstance(value, dict):
        raise row.error(field, "an object, or null")
    return value


def _materials(row: Row, context: EpisodeContext) -> list[Document]:
    """The documents that a verifier has read, in its order where the game recorded it; as long as
    players see them.
    """
    found: list[Document] = []
    for field in ("documents", "noise"):
        listed = row.values.get(field)
        try:
            found += [Document(**document) for document in listed or ()]
        except TypeError:
            raise row.error(field, "a list of documents with id, title and text") from None
    by_id = distinct(found)
    order = row.values.get("verifier_order") or list(by_id)
    if not isinstance(order, list) or not all(name in by_id for name in order):
        raise row.error("verifier_order", "ids of documents and noise")
    return [seen for name in order for seen in context.seen([by_id[name]])]


def _segments(
    row: Row, field: str, episode: Mapping[str, Any], role: Role, style: Style
) -> Segments:
    """What a player wrote and was shown; results in the form of this style."""
    turns = episode.get("turns")
    expected = f'turns of "{role.name}" and "{SEARCH_ENGINE}", each with "who" and "text"'
    if not isinstance(turns, list) or not turns:
        raise row.error(f"{field}.turns", expected)
    segments: Segments = []
    for turn in turns:
        who, text = (turn.get("who"), turn.get("text")) if isinstance(turn, dict) else (None, None)
        if who not in (role.name, SEARCH_ENGINE) or not isinstance(text, str):
            raise row.error(f"{field}.turns", expected)
        text = row.unicode(f"{field}.turns", text)
        segments.append((text, True) if who == role.name else (_result(text, style), False))
    return _trimmed(row, f"{field}.turns", segments)


def _trimmed(row: Row, field: str, segments: Segments) -> Segments:
    """Without results that nothing follows. Raises InputError where the model wrote nothing."""
    while segments and not segments[-1][1]:
        segments.pop()
    if not any(text for text, is_own in segments if is_own):
        raise row.error(field, "something that the model wrote")
    return segments


def _result(text: str, style: Style) -> str:
    """An inserted result with the tags and spaces of this style."""
    before, after = style.observation_text.split("{documents}")
    if text.startswith(before) and text.endswith(after):
        return text
    found = _SHOWN.fullmatch(text)
    documents = (found[2] if found else text).strip()
    if not style.strip_results:
        documents += "\n"
    return style.observation_text.format(documents=documents)


# --- answers and chats ---


def _answer(row: Row, form: Form, selection: Selection) -> _Parsed:
    """An episode of a solver, as ssp_jax.generate writes it."""
    question = row.text("question", row.values.get("question"))
    segments = _segments(row, "turns", row.values, SOLVER, form.style)
    if _is_kept(_is_right(row, segments, selection), SOLVER, selection):
        yield SOLVER, prompts.solver_messages(form.style, question, form.shown), segments


def _chat(row: Row, form: Form, selection: Selection) -> _Parsed:
    """The messages of a solver."""
    role = row.values.get("role", SOLVER.name)
    if role != SOLVER.name:
        raise row.error(
            "role",
            f'"{SOLVER.name}", for a chat does not say what other roles were given, found {role!r}',
        )
    asked, said = _exchange(row)
    question = row.values.get("question") or asked.partition(QUESTION_MARK)[2] or asked
    segments: Segments = []
    for text, is_own in said:
        segments += _split(text, form.style) if is_own else [(_result(text, form.style), False)]
    segments = _trimmed(row, "messages", segments)
    _check_turns(row, segments)
    if _is_kept(_is_right(row, segments, selection), SOLVER, selection):
        messages = prompts.solver_messages(form.style, row.text("messages", question), form.shown)
        yield SOLVER, messages, segments


def _exchange(row: Row) -> tuple[str, Segments]:
    """The last text before the assistant's first, and what follows: its texts and what it got."""
    messages = row.values["messages"]
    said: Segments = []
    asked = ""
    for message in messages if isinstance(messages, list) else ():
        who = message.get("role") if isinstance(message, dict) else None
        content = message.get("content") if isinstance(message, dict) else None
        if not isinstance(who, str) or not isinstance(content, str):
            raise row.error("messages", 'objects with texts in "role" and "content"')
        content = row.unicode("messages", content)
        if who == "assistant" or said:
            said.append((content, who == "assistant"))
        elif who == "user":
            asked = content
    if not asked or not said:
        raise row.error("messages", "a question of the user and what the assistant wrote")
    return asked, said


def _split(text: str, style: Style) -> Segments:
    """An assistant's text at the results that were inserted into it."""
    segments: Segments = []
    begin = 0
    for found in _SHOWN.finditer(text):
        segments.append((text[begin : found.start()].strip(), True))
        segments.append((_result(found[0], style), False))
        begin = found.end()
    rest = text[begin:].strip()
    # What follows the answer, such as an end-of-turn token, is never sampled.
    answer, closing, _ = rest.partition(prompts.ANSWER_STOP)
    segments.append((answer + closing, True))
    return [segment for segment in segments if segment[0]]


def _check_turns(row: Row, segments: Segments) -> None:
    """Raises InputError unless each turn ends as the game ends it."""
    own = [text for text, is_own in segments if is_own]
    alternates = [is_own for _, is_own in segments] == [i % 2 == 0 for i in range(len(segments))]
    ends = [prompts.SEARCH_STOP] * (len(own) - 1) + [prompts.ANSWER_STOP]
    if not alternates or not all(text.endswith(end) for text, end in zip(own, ends, strict=True)):
        raise row.error(
            "messages",
            f"an assistant that writes {prompts.SEARCH_STOP} before each inserted result, and "
            f"{prompts.ANSWER_STOP} at its end",
        )


def _is_right(row: Row, segments: Segments, selection: Selection) -> bool:
    if selection.keep == "all":
        return True
    field = next((name for name in GOLDS if row.values.get(name) is not None), None)
    if field is None:
        raise row.error(GOLDS[0], "the right answers (or --config.warm_start.keep=all)")
    golds = row.texts(field, row.values[field]) + row.aliases()
    own = "".join(text for text, is_own in segments if is_own)
    return rewards.solver_reward(own, golds, selection.metric) >= 1
