"""Check 3: greedy tokens of the tiny model are those that a CPU wrote, however they are played."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.proof.rows import Row, Setting, at_least, verdict
from ssp_jax.data import Document
from ssp_jax.game import roles
from ssp_jax.game.prompts import STYLES
from ssp_jax.model import decoder, hf_load
from ssp_jax.rollout.engine import Engine, Sizes, Stats

ROOT = Path(__file__).resolve().parent.parent.parent
MODEL = ROOT / "assets/tiny/model"
CORPUS = ROOT / "assets/tiny/corpus.jsonl"
GOLDEN = ROOT / "benchmarks/goldens/greedy_tiny.json"
ROLES = {role.name: role for role in roles.ROLES}
LIMITS = roles.Limits(
    prompt_tokens=64,
    verify_prompt_tokens=400,
    response_tokens=320,
    turn_tokens=40,
    turns=5,
    searches=4,
    observation_tokens=120,
)
# Prompts of the golden end in each of the three pieces of the cache, and episodes grow through
# them.
SIZES = Sizes(
    slots=8,
    chunk=16,
    cache_tokens=720,
    cache_buckets=(48, 96),
    extend_buckets=(128,),
    extend_rows=4,
)
# Two pieces make fewer programs to compile.
ONE_PIECE = dataclasses.replace(SIZES, cache_buckets=())
ATTEMPTS = 2  # at each prompt, with the same tokens: the second has a copy of the first's prompt


@dataclass(frozen=True)
class Model:
    """The tiny model in float32, and the tokenizer."""

    config: decoder.ModelConfig
    stacked: decoder.Params
    unstacked: decoder.Params  # as the sampler has it
    context: roles.EpisodeContext
    eos: tuple[int, ...]


def load_model() -> Model:
    config = hf_load.read_config(MODEL)
    tokenizer = hf_load.load_tokenizer(MODEL)
    stacked = hf_load.load(MODEL, config, None, jnp.float32)
    unstacked = jax.jit(decoder.unstack, static_argnums=1)(stacked, jnp.float32)
    context = roles.EpisodeContext(tokenizer, STYLES["brief"], "chat", LIMITS)
    eos = roles.eos_tokens(tokenizer, hf_load.read_generation_config(MODEL))
    return Model(config, stacked, unstacked, context, eos)


class Overlap:
    """A search without an index: the passages that have most words of the query in common.

    Of equals the earlier ones.
    """

    def __init__(self, top_k: int = 2):
        self._top_k = top_k
        self._passages: list[tuple[set[str], Document]] = []
        for line in CORPUS.read_text(encoding="utf-8").splitlines():
            values = json.loads(line)
            title, _, text = values["contents"].partition("\n")
            document = Document(values["id"], title, text)
            self._passages.append((_words(values["contents"]), document))

    def __call__(self, queries: Sequence[str]) -> list[list[Document]]:
        return [self._best(_words(query)) for query in queries]

    def _best(self, query: set[str]) -> list[Document]:
        def common(passage: tuple[set[str], Document]) -> int:
            return len(passage[0] & query)

        # sorted() keeps the order of equals.
        best = sorted(self._passages, key=common, reverse=True)[: self._top_k]
        return [document for _, document in best]


def _words(text: str) -> set[str]:
    return set("".join(c.lower() if c.isalnum() else " " for c in text).split())


def play(
    model: Model,
    sizes: Sizes,
    prompts: Sequence[tuple[roles.Role, list[int]]],
    search: Callable[[list[str]], Any],
    attempts: int = 1,
) -> tuple[list[roles.Episode], Stats]:
    """Greedy episodes, prompt after prompt, `attempts` of each."""
    automata = roles.role_automata(model.context.tokenizer, model.config.vocab_size)
    # Memory is not asked for: the tiny model's keys and values fit anywhere.
    options: dict[str, Any] = {"free_bytes": lambda: None}
    engine = Engine(model.config, sizes, automata, model.eos, jnp.float32, search, **options)
    players = []
    for row, (role, prompt) in enumerate(prompts):
        for attempt in range(attempts):
            uid = roles.episode_id(role, row, attempt)
            players.append(roles.EpisodePlayer(model.context, role, uid, 0.0, list(prompt)))
    stats = engine.play(model.unstacked, jax.random.key(0), players)
    return [player.episode() for player in players], stats


def check(setting: Setting) -> Iterator[Row]:
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))["rows"]
    prompts = [(ROLES[row["role"]], row["prompt_ids"]) for row in golden]
    model = load_model()
    search = Overlap()

    sizes = dataclasses.replace(SIZES, cache_buckets=(48,)) if setting.small else SIZES
    episodes, stats = play(model, sizes, prompts, search, ATTEMPTS)
    twice = [row for row in golden for _ in range(ATTEMPTS)]
    pieces = len(sizes.cache_ends())
    yield compare(f"8 slots, chunks of 16, {pieces} pieces, shared prompts", episodes, twice)
    reasons = sorted({row["stop_reason"] for row in golden})
    found = [episode.stop_reason for episode in episodes]
    equal = found == [row["stop_reason"] for row in twice]
    yield verdict("stops are those of the CPU", ", ".join(sorted(set(found))), str(reasons), equal)
    # All prompts but their last tokens, which are fed by the first decode step.
    whole = sum(len(prompt) - 1 for _, prompt in prompts)
    yield at_least("tokens of prompts copied from another slot", stats.shared_tokens, whole)
    yield verdict("pieces of the cache in which prompts end", *depths(sizes, prompts))

    chunks_of_1 = dataclasses.replace(ONE_PIECE, chunk=1)
    one_slot = dataclasses.replace(ONE_PIECE, slots=1)
    for name, sizes in (("chunks of 1", chunks_of_1), ("1 slot", one_slot)):
        episodes, _ = play(model, sizes, prompts, search)
        yield compare(f"{name}, one piece", episodes, golden)


def depths(sizes: Sizes, prompts: Sequence[tuple[roles.Role, list[int]]]) -> tuple[str, str, bool]:
    """Measured, expected, and whether they are the same."""
    ends = sizes.cache_ends()
    found = {1 + sum(len(prompt) > end for end in ends) for _, prompt in prompts}
    expected = set(range(1, len(ends) + 1))
    return str(sorted(found)), str(sorted(expected)), found == expected


def compare(name: str, episodes: Sequence[roles.Episode], golden: Sequence[dict[str, Any]]) -> Row:
    """Whether the episodes have the golden's tokens; else where the first one differs."""
    equal = 0
    first = ""
    for number, (episode, row) in enumerate(zip(episodes, golden, strict=True)):
        if episode.tokens == row["tokens"]:
            equal += 1
        elif not first:
            pairs = zip(episode.tokens, row["tokens"], strict=False)
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), "its length")
            first = f"; episode {number} differs first at {at}, its smallest gap is {row['gap']}"
    measured = f"{equal} of {len(golden)} episodes{first}"
    return verdict(f"tokens of the CPU: {name}", measured, "all equal", equal == len(golden))
