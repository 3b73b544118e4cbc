"""The roles as small state machines: the moves of a proposer, verifier or solver after each stop.

Tokens are the truth: an episode is one growing token list, with a mark per token (sampled or given)
and the sampler's log-prob. Both are made here once and only carried afterwards. Text is a view of
the tokens, decoded for parsing and for people.
"""

import functools
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ssp_jax.data import Document
from ssp_jax.errors import InputError
from ssp_jax.game import chat, prompts
from ssp_jax.game.examples import Example
from ssp_jax.game.rules import ID_ATTEMPTS, ID_ROWS
from ssp_jax.model import tokens
from ssp_jax.rollout import sampler
from ssp_jax.rollout.stops import Automaton, build_automaton, token_bytes


@dataclass(frozen=True)
class Role:
    name: str
    stops: tuple[str, ...]  # stop strings: the closing tags that end its turns
    code: int  # first part of an episode id, and the index of its stop automaton


SOLVER = Role("solver", (prompts.SEARCH_STOP, prompts.ANSWER_STOP), 0)
PROPOSER = Role("proposer", (prompts.SEARCH_STOP, prompts.QUESTION_STOP), 1)
VERIFIER = Role("verifier", (prompts.ANSWER_STOP,), 2)
ASSISTANT = Role("assistant", (), 3)  # outside the game: judges, and plain prompts (generate)
ROLES = (SOLVER, PROPOSER, VERIFIER, ASSISTANT)

# Tokens. Taking a prefix from another prompt costs a call of its own.
_SHORTEST_PREFIX = 64
SEARCH_ENGINE = "search engine"  # the author of a turn that no role wrote


def check_rows(place: str, number: int) -> None:
    """InputError where a role would have more episodes than there are ids."""
    if number > ID_ROWS:
        raise InputError(f"{place}: expected at most {ID_ROWS:,} at a time, found {number:,}")


def episode_id(role: Role, row: int, attempt: int) -> int:
    """A number below 2**31 that names an episode within a step.

    It is the same whenever and wherever the episode is played: with a position it makes the random
    key of a token. row: of the game or question; attempt: of this role at it.
    """
    if row >= ID_ROWS or attempt >= ID_ATTEMPTS:
        raise ValueError(
            f"episode ids hold {ID_ROWS} rows and {ID_ATTEMPTS} attempts, got row {row}, {attempt}"
        )
    return (role.code * ID_ROWS + row) * ID_ATTEMPTS + attempt


def role_automata(tokenizer: Any, vocab_size: int) -> list[Automaton]:
    """One stop automaton per role, in the order of their codes."""
    pieces = token_bytes(tokenizer)
    return [build_automaton(role.stops, pieces, vocab_size) for role in ROLES]


@dataclass(frozen=True)
class Limits:
    """Config section `limits`, in tokens, turns and searches."""

    prompt_tokens: int
    verify_prompt_tokens: int
    response_tokens: int
    turn_tokens: int
    turns: int
    searches: int
    observation_tokens: int
    verify_response_tokens: int = sys.maxsize

    def prompt(self, role: Role) -> int:
        """The longest prompt of this role."""
        return self.verify_prompt_tokens if role is VERIFIER else self.prompt_tokens

    def response(self, role: Role) -> int:
        """The longest response of this role, insertions included."""
        return self.verify_response_tokens if role is VERIFIER else self.response_tokens


@dataclass(frozen=True)
class EpisodeContext:
    """The parts that all players of a run share."""

    tokenizer: Any
    style: prompts.Style
    template: str
    limits: Limits
    # Worked examples: each game is shown one of these sets; evaluations and questions of users the
    # first.
    example_sets: tuple[tuple[Example, ...], ...] = ((),)
    tell_repeats: bool = False  # config key prompt.tell_repeats

    @functools.cached_property
    def prefixes(self) -> tuple[tuple[int, ...], ...]:
        """What the prompts of each role begin with, whatever they are about; the longest first."""
        style = self.style
        probes = ("Who?", "7 is", "an")  # no two begin alike
        same = []
        for shown in self.example_sets:
            for examples in (("",) * len(probes), probes):  # of an answer that has none, and some
                asked = zip(probes, range(len(probes)), examples, strict=True)
                same.append([prompts.proposer_messages(style, *task, shown) for task in asked])
            same.append([prompts.solver_messages(style, text, shown) for text in probes])
            documents = [Document(text, text, text) for text in probes]
            same.append([prompts.verifier_messages(style, d.text, [d], shown) for d in documents])
        found = {_common([self.prompt(messages) for messages in role]) for role in same}
        return tuple(sorted(found, key=len, reverse=True))

    def shared_prefix(self, prompt: Sequence[int]) -> int:
        """How many tokens a prompt begins with that others have too; 0 where they are few."""
        fitting = (len(p) for p in self.prefixes if tuple(prompt[: len(p)]) == p)
        length = min(next(fitting, 0), len(prompt) - 2)
        return length if length >= _SHORTEST_PREFIX else 0

    def prompt(self, messages: list[dict[str, str]]) -> list[int]:
        return chat.encode_prompt(self.tokenizer, messages, self.template)

    def encode(self, text: str) -> list[int]:
        return tokens.encode(self.tokenizer, text)

    def decode(self, ids: Sequence[int]) -> str:
        return tokens.decode(self.tokenizer, ids)

    def observation(self, documents: Sequence[Document]) -> list[int]:
        """Tokens of an inserted result."""
        return self.cut(prompts.observation(self.style, documents))

    @functools.cached_property
    def repeat_observation(self) -> list[int]:
        """Tokens that are inserted in place of a result that was shown before."""
        return self.cut(prompts.repeat_observation(self.style))

    def cut(self, text: str) -> list[int]:
        """Tokens of an observation, encoded alone.

        One that is too long loses its end, but not its closing tag.
        """
        ids = self.encode(text)
        limit = self.limits.observation_tokens
        if len(ids) <= limit:
            return ids
        return ids[: max(0, limit - len(self._closing))] + self._closing

    def seen(self, documents: Sequence[Document]) -> list[Document]:
        """The documents as far as their observation shows them."""
        ids = self.encode(prompts.observation(self.style, documents))
        limit = self.limits.observation_tokens
        if len(ids) <= limit:
            return list(documents)
        # The last token may be a part of a character.
        text = self.decode(ids[: max(0, limit - len(self._closing))]).rstrip("\ufffd")
        return prompts.seen_documents(self.style, documents, len(text))

    @functools.cached_property
    def _closing(self) -> list[int]:
        """Tokens that end an observation."""
        return self.encode(self.style.observation_text.split("{documents}")[1])


def _common(prompts_: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The longest sequence that all begin with."""
    columns = itertools.takewhile(
        lambda column: len(set(column)) == 1, zip(*prompts_, strict=False)
    )
    return tuple(column[0] for column in columns)


def check_context(context: EpisodeContext) -> None:
    """InputError where every game would fail: a prompt that the template refuses, a lost tag.

    A tokenizer may lower the case of a text, or lack a character of a tag: no stop would ever fire.
    """
    style = context.style
    shown = context.example_sets[0]
    document = Document("1", "Paris", "Paris is a city.")
    context.prompt(prompts.solver_messages(style, "Who?", shown))
    context.prompt(prompts.proposer_messages(style, "Paris", 1, "Who?\n", shown))
    context.prompt(prompts.verifier_messages(style, "Who?", [document], shown))
    token_bytes(context.tokenizer)
    for name in ("search", "answer", "question"):
        tag = f"<{name}> Paris </{name}>"
        found = context.decode(context.encode(tag)).strip()
        if found != tag:
            raise InputError(
                f"tokenizer {context.tokenizer.name_or_path!r} makes {found!r} of {tag!r}; "
                "expected one that keeps the tags of the game"
            )


@dataclass(frozen=True)
class Episode:
    """A finished episode.

    tokens, sampled and logprobs are aligned. logprobs is 0 where a token was given.
    """

    uid: int  # see episode_id
    role: str
    tokens: list[int]
    sampled: list[bool]
    logprobs: list[float]
    prompt_length: int
    queries: tuple[str, ...]
    # all results, in the order seen, repeats included, as far as they were shown
    documents: tuple[Document, ...]
    turns: tuple[tuple[str, str], ...]  # (role or SEARCH_ENGINE, text), for parsing and for people
    stop_reason: str
    cut_results: int = 0  # results that limits.observation_tokens has cut

    @property
    def text(self) -> str:
        """The text that the model itself wrote."""
        return "".join(text for who, text in self.turns if who == self.role)

    @property
    def num_sampled(self) -> int:
        return sum(self.sampled)

    @property
    def num_results(self) -> int:
        """Results that were inserted, told repeats included."""
        return sum(who == SEARCH_ENGINE for who, _ in self.turns)

    def turns_for_json(self) -> list[dict[str, str]]:
        return [{"who": who, "text": text} for who, text in self.turns]


@dataclass
class EpisodePlayer:
    """An episode in play: implements the engine's protocol Player."""

    context: EpisodeContext
    role: Role
    uid: int  # see episode_id
    temperature: float
    tokens: list[int]
    tag: Any = None  # what the episode belongs to: a game, a question, a line of a file
    prompt_length: int = field(init=False)
    shared_prefix: int = field(init=False)  # tokens
    sampled: list[bool] = field(init=False)
    logprobs: list[float] = field(init=False)
    queries: list[str] = field(init=False, default_factory=list)
    documents: list[Document] = field(init=False, default_factory=list)
    turns: list[tuple[str, str]] = field(init=False, default_factory=list)
    stop_reason: str = field(init=False, default="")  # "" while playing
    # ids of each result that was shown, or the query of one without documents
    _found: set[tuple[str, ...]] = field(init=False, default_factory=set)
    _cut_results: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.prompt_length = len(self.tokens)
        self._turn_start = len(self.tokens)
        self.sampled = [False] * len(self.tokens)
        self.logprobs = [0.0] * len(self.tokens)
        of_the_game = self.role is not ASSISTANT
        self.shared_prefix = self.context.shared_prefix(self.tokens) if of_the_game else 0
        if len(self.tokens) > self.context.limits.prompt(self.role):
            self.stop_reason = "prompt_tokens"

    @property
    def stop_automaton(self) -> int:
        return self.role.code

    def token_limit(self) -> int:
        return min(self._turn_start + self.context.limits.turn_tokens, self._longest)

    @property
    def _longest(self) -> int:
        """Total number of tokens of an episode with the longest response."""
        return self.prompt_length + self.context.limits.response(self.role)

    def append(self, tokens: list[int], logprobs: list[float]) -> None:
        self.tokens += tokens
        self.logprobs += logprobs
        self.sampled += [True] * len(tokens)

    def end_turn(self, tokens: list[int], logprobs: list[float], stop: int) -> str | None:
        """The query to search for, or None when the episode is over.

        A search beyond limits.searches ends it.
        """
        self.append(tokens, logprobs)
        text = self.context.decode(self.tokens[self._turn_start :])
        self.turns.append((self.role.name, text))
        if stop == sampler.EOS:
            self.stop_reason = "eos"
        elif stop == sampler.FULL:
            self.stop_reason = "cache_tokens"
        elif stop == sampler.LIMIT:
            full = len(self.tokens) >= self._longest
            self.stop_reason = "response_tokens" if full else "turn_tokens"
        elif self.role.stops[stop] != prompts.SEARCH_STOP:
            self.stop_reason = self.role.stops[stop].strip("</>")
        elif len(self.queries) >= self.context.limits.searches:
            self.stop_reason = "searches"
        else:
            query = prompts.last_search(text)
            if query is not None:
                self.queries.append(query)
                return query
            self.stop_reason = "malformed_search"
        return None

    def insert_result(self, result: Sequence[Document]) -> None:
        tokens = self._observation(result)
        self.turns.append((SEARCH_ENGINE, self.context.decode(tokens)))
        if len(self.turns) // 2 >= self.context.limits.turns:
            self.stop_reason = "turns"
        elif len(self.tokens) + len(tokens) >= self._longest:
            self.stop_reason = "response_tokens"
        if self.stop_reason:
            return
        self.tokens += tokens
        self.sampled += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)
        self._turn_start = len(self.tokens)

    def _observation(self, result: Sequence[Document]) -> list[int]:
        """What is inserted. A greedy player that reads the same again writes the same again."""
        found = tuple(document.id for document in result) or ("", self.queries[-1])
        if self.context.tell_repeats and found in self._found:
            return self.context.repeat_observation
        self._found.add(found)
        seen = self.context.seen(result)
        self._cut_results += seen != list(result)
        self.documents += seen
        return self.context.observation(result)

    def episode(self) -> Episode:
        return Episode(
            uid=self.uid,
            role=self.role.name,
            tokens=self.tokens,
            sampled=self.sampled,
            logprobs=self.logprobs,
            prompt_length=self.prompt_length,
            queries=tuple(self.queries),
            documents=tuple(self.documents),
            turns=tuple(self.turns),
            stop_reason=self.stop_reason,
            cut_results=self._cut_results,
        )


def eos_tokens(tokenizer: Any, generation_config: dict[str, Any]) -> tuple[int, ...]:
    """Ids that end a turn: the tokenizer's own, and those of generation_config (an id or a list).

    InputError where there is none.
    """
    extra = generation_config.get("eos_token_id")
    others = extra if isinstance(extra, list) else [extra]
    ids = {tokenizer.eos_token_id, *others} - {None}
    if not ids:
        raise InputError(
            "no file of the model folder names an eos token; expected one in "
            "tokenizer_config.json, generation_config.json or config.json"
        )
    return tuple(sorted(int(i) for i in ids))
