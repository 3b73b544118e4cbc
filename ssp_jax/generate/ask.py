"""Ask a model, through the same slot engine that training uses."""

import contextlib
import dataclasses
import functools
import importlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import jax
import jax.numpy as jnp
from rich.console import Console

from ssp_jax.assembly.engine import make_engine
from ssp_jax.data import Row, read_rows
from ssp_jax.errors import InputError, json_line, printable
from ssp_jax.export import form
from ssp_jax.game import chat, prompts, roles
from ssp_jax.game.examples import example_sets
from ssp_jax.game.roles import (
    ASSISTANT,
    SEARCH_ENGINE,
    SOLVER,
    Episode,
    EpisodeContext,
    EpisodePlayer,
    Limits,
    Role,
    episode_id,
)
from ssp_jax.model import decoder, hf_adapter, hf_load, sharding
from ssp_jax.model.tokens import decode
from ssp_jax.model.weights import FullWeights, LoraWeights, Weights
from ssp_jax.retriever import dense
from ssp_jax.retriever.settings import DenseSettings
from ssp_jax.rollout import kv_cache
from ssp_jax.rollout.engine import Engine, SearchFn, Sizes, Stats
from ssp_jax.rollout.stops import token_bytes
from ssp_jax.runtime import device_memory, figures, files, signals
from ssp_jax.runtime.logger import PLAIN_SECONDS, Phase

CPU_CACHE_BYTES = 2 << 30  # keys and values of all slots on a CPU; accelerators say what they have
SLOTS_PER_DEVICE = 64  # more do not decode faster
TYPED_PROMPT_TOKENS = 2048  # longest prompt of a typed question


@dataclasses.dataclass(frozen=True)
class Model:
    """A Hugging Face folder, with or without an adapter, ready to generate."""

    config: decoder.ModelConfig
    tokenizer: Any
    eos: tuple[int, ...]
    dtype: Any
    mesh: jax.sharding.Mesh
    params: decoder.Params  # the sampler's unstacked form
    context_tokens: int  # the longest episode


def load_model(folder: str | Path, dtype: str = "", adapter: str = "") -> Model:
    """Loads the model onto all devices: whole on each, or split where one is too small for it.

    adapter: its folder, or "" for none. Raises InputError.
    """
    config = hf_load.read_config(folder)
    if adapter:
        config = dataclasses.replace(config, lora=hf_adapter.read(adapter, config).lora)
    tokenizer = hf_load.load_tokenizer(folder)
    kind = jnp.dtype(dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16"))
    abstract = decoder.abstract_params(config)
    numbers = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract))
    size = numbers * kind.itemsize
    tensor = devices_per_copy(config.num_kv_heads, jax.device_count(), size, _device_bytes())
    mesh = sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": tensor})
    weights: Weights
    if adapter:
        weights = LoraWeights(str(folder), config, mesh, kind, adapter)
    else:
        weights = FullWeights(str(folder), config, mesh, kind)
    params = weights.initial_for_sampler()
    eos = roles.eos_tokens(tokenizer, hf_load.read_generation_config(folder))
    return Model(config, tokenizer, eos, kind, mesh, params, hf_load.context_tokens(folder))


def _device_bytes() -> int | None:
    """Bytes of memory of one device; None where the backend does not know."""
    return device_memory.stats(jax.local_devices()[0]).get("bytes_limit")


def devices_per_copy(kv_heads: int, devices: int, size: int, limit: int | None) -> int:
    """The fewest devices, of `limit` bytes each, that hold `size` bytes of weights twice.

    Loading needs them twice. Where no number is enough: the most that can share a copy.
    """
    divisors = [n for n in range(1, kv_heads + 1) if sharding.tensor_divides(kv_heads, n)]
    numbers = [n for n in divisors if devices % n == 0]
    for number in numbers:
        if limit is None or 2 * size <= number * limit:
            return number
    return numbers[-1]


def make_sizes(m: Model, prompt_lengths: Sequence[int], room: int, searching: bool) -> Sizes:
    """Engine sizes that hold these prompts with `room` tokens after each.

    Nothing is left for the user to choose.
    """
    shards = sharding.row_shards(m.mesh)
    longest = max(prompt_lengths)
    cache = -(-(longest + room) // 128) * 128
    slot_bytes = cache * kv_cache.token_bytes(m.config, m.dtype)
    limit = _device_bytes()
    # A third of what the weights leave: a decode chunk may hold a second copy of the cache.
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(m.params))
    used = weights // m.mesh.shape["tensor"]
    room_bytes = CPU_CACHE_BYTES if limit is None else (limit - used) // 3 * m.mesh.size
    useful = min(len(prompt_lengths), SLOTS_PER_DEVICE * shards)
    slots = max(1, min(useful, room_bytes // slot_bytes))

    # A call has the length of a prompt, or of a search result: shorter ones and longer ones.
    first = min(1024, 1 << (longest - 1).bit_length())
    lengths = (first, 256, 1024) if searching else (first,)
    extend_buckets = {min(length, cache) for length in lengths}
    return Sizes(
        slots=-(-slots // shards) * shards,
        chunk=16,
        cache_tokens=cache,
        cache_buckets=tuple(b for b in (1024, 4096) if b < cache),
        extend_buckets=tuple(sorted(extend_buckets)),
        extend_rows=min(8, slots),
    )


def _room(m: Model, context: EpisodeContext, longest: int) -> int:
    """Tokens after the longest prompt. A shorter context makes a shorter cache, which ends it."""
    return max(1, min(context.limits.response_tokens, m.context_tokens - longest))


def _no_search(queries: list[str]) -> Sequence[Any]:
    raise AssertionError("a player without a search tool asked for one")


@dataclasses.dataclass(frozen=True)
class Search:
    """What answers searches. program_bytes: of a device, that it takes while the engine plays."""

    call: SearchFn = _no_search
    program_bytes: int = 0


NO_SEARCH = Search()


def _engine_of(m: Model, sizes: Sizes, search: Search) -> Engine:
    return make_engine(
        m.config,
        m.tokenizer,
        m.eos,
        sizes,
        m.dtype,
        search.call,
        m.mesh,
        search_bytes=search.program_bytes,
    )


def play(
    m: Model,
    context: EpisodeContext,
    role: Role,
    prompt_tokens: Sequence[list[int]],
    temperature: float = 0.0,
    seed: int = 0,
    search: Search = NO_SEARCH,
    on_episode: Callable[[int, Episode], None] = lambda row, episode: None,
    progress: Callable[[Stats], None] = lambda stats: None,
) -> list[Episode]:
    """Plays one episode for each prompt, all through the slots at once; returns them in order.

    on_episode(row, episode) is called as an episode ends. row: of its prompt.
    """
    lengths = [len(prompt) for prompt in prompt_tokens]
    room = _room(m, context, max(lengths))
    sizes = make_sizes(m, lengths, room, search is not NO_SEARCH)
    engine = _engine_of(m, sizes, search)
    players = []
    for row, prompt in enumerate(prompt_tokens):
        uid = episode_id(role, row, 0)
        players.append(EpisodePlayer(context, role, uid, temperature, list(prompt), tag=row))
    ended: dict[int, Episode] = {}

    def finished(player: EpisodePlayer) -> list[EpisodePlayer]:
        row = player.tag
        ended[row] = player.episode()
        on_episode(row, ended[row])
        return []

    engine.play(m.params, jax.random.key(seed), players, finished, progress)
    return [ended[row] for row in range(len(players))]


def make_context(
    tokenizer: Any,
    max_tokens: int,
    max_searches: int = 0,
    style: prompts.Style = prompts.STYLES["search_r1"],
    template: str = "chat",
    prompt_tokens: int = sys.maxsize,
    turn_tokens: int = sys.maxsize,
    observation_tokens: int = form.OBSERVATION_TOKENS,
) -> EpisodeContext:
    """The limits follow from the numbers of tokens and searches; prompts may be of any length."""
    limits = Limits(
        prompt_tokens=prompt_tokens,
        verify_prompt_tokens=prompt_tokens,
        response_tokens=max_tokens,
        turn_tokens=min(turn_tokens, max_tokens),
        turns=max_searches + 1,
        searches=max_searches,
        observation_tokens=min(observation_tokens, max_tokens),
    )
    return EpisodeContext(tokenizer, style, template, limits)


def _prompt_tokens(row: Row, tokenizer: Any, template: str) -> list[int]:
    """The prompt of a line. `prompt` gets the tokenizer's own special tokens, as Llama's first."""
    values = row.values
    if "prompt" in values:
        row.text("prompt", values["prompt"])  # only the check: spaces at the ends count
        return list(tokenizer.encode(values["prompt"]))
    turns = values.get("messages")
    if not isinstance(turns, list) or not turns:
        known = (
            "lines with a question need --index" if "question" in values else "or a text in prompt"
        )
        raise row.error("messages", f'a list of {{"role", "content"}} ({known})')
    keys = ("role", "content")
    for turn in turns:
        if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in keys):
            raise row.error("messages", 'objects with texts "role" and "content"')
        for key in keys:
            row.text(f"messages.{key}", f".{turn[key]}")  # may be empty, but no half of an emoji
    with _of(row):
        return chat.encode_prompt(tokenizer, turns, template)


@contextlib.contextmanager
def _of(row: Row) -> Iterator[None]:
    """Errors name the line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{row.path} line {row.line}: {error}") from None


def _encoded(f: Any, context: EpisodeContext, rows: Sequence[Row]) -> list[list[int]]:
    """The prompts of all lines. Raises InputError for one that the model cannot hold."""
    limit = hf_load.context_tokens(f.model)
    encoded = []
    for row in rows:
        if f.index:
            question = row.text("question", row.values.get("question"))
            with _of(row):
                prompt = context.prompt(_solver_messages(context, question))
        else:
            prompt = _prompt_tokens(row, context.tokenizer, f.template)
        if len(prompt) >= limit:
            raise InputError(
                f"{row.path} line {row.line}: the prompt has {len(prompt):,} tokens; expected "
                f"fewer than the {limit:,} of the model's context (max_position_embeddings in "
                f"{f.model}/config.json)"
            )
        encoded.append(prompt)
    return encoded


def _solver_messages(context: EpisodeContext, question: str) -> list[dict[str, str]]:
    return prompts.solver_messages(context.style, question, context.example_sets[0])


def _rows(path: str) -> list[Row]:
    with contextlib.closing(read_rows(path)) as rows:
        found = list(rows)
    if not found:
        raise InputError(f"{path}: expected at least one line, found none")
    roles.check_rows(f"lines of {path}", len(found))
    return found


def describe(episode: Episode, tokenizer: Any) -> dict[str, Any]:
    """An output line: what came after the prompt."""
    begin = episode.prompt_length
    tokens = episode.tokens[begin:]
    pairs = zip(episode.logprobs[begin:], episode.sampled[begin:], strict=True)
    logprobs = [logprob if sampled else None for logprob, sampled in pairs]
    reason = episode.stop_reason
    if reason in ("response_tokens", "turn_tokens"):
        reason = "max_tokens"
    line: dict[str, Any] = {
        "token_ids": tokens,
        "logprobs": logprobs,
        "text": decode(tokenizer, tokens),
        "stop_reason": reason,
    }
    if episode.role == SOLVER.name:
        line |= {
            "searches": episode.queries,
            "answer": prompts.last_answer(episode.text),
            "turns": episode.turns_for_json(),
        }
    return line


class _InOrder:
    """Writes each line as soon as all before it are written."""

    def __init__(self, file: IO[str], name: str):
        self._file = file
        self._name = name
        self._next = 0
        self._waiting: dict[int, dict[str, Any]] = {}

    def write(self, row: int, line: dict[str, Any]) -> None:
        self._waiting[row] = line
        try:
            while self._next in self._waiting:
                text = json_line(self._waiting.pop(self._next))
                self._file.write(text + "\n")
                self._next += 1
            self._file.flush()
        except OSError as error:
            raise InputError(
                f"{self._name}: expected room for all lines ({error.strerror})"
            ) from None


class _Progress:
    """One line on stderr: rewritten in a terminal, else a new one every few seconds."""

    def __init__(self, total: int):
        self._phase = Phase("generating", total, self._show)
        self._live = sys.stderr.isatty()
        self._last = time.monotonic()
        self._ended = False

    def __call__(self, stats: Stats) -> None:
        self._phase.advance(stats.finished, tokens=stats.tokens_per_second)

    def _show(self, detail: str) -> None:
        if self._ended:  # chunks that were already in flight
            return
        self._ended = self._phase.done == self._phase.total
        if self._live:
            end = "\n" if self._ended else ""
            print(f"\r\x1b[Kgenerating {detail}", end=end, file=sys.stderr, flush=True)
        elif self._ended or time.monotonic() - self._last >= PLAIN_SECONDS:
            self._last = time.monotonic()
            print(f"{time.strftime('%H:%M:%S')} generating {detail}", file=sys.stderr, flush=True)


def answer_file(f: Any) -> None:
    """Answers --prompts, all lines through the slots at once; replaces --out when all are there."""
    tokenizer = hf_load.load_tokenizer(f.model)
    context = _context(f, tokenizer, sys.maxsize)
    rows = _rows(f.prompts)
    encoded = _encoded(f, context, rows)
    role = SOLVER if f.index else ASSISTANT
    name = f"--out={f.out}" if f.out else "the standard output"
    opened = (
        files.replacing(f.out, name, keep=True) if f.out else contextlib.nullcontext(sys.stdout)
    )
    with opened as file:
        search = _search(f)
        m = _load(f)
        out = _InOrder(file, name)

        def on_episode(row: int, episode: Episode) -> None:
            line = describe(episode, tokenizer)
            if f.index:
                line = {"question": rows[row].values["question"].strip()} | line
            out.write(row, line)

        progress = _Progress(len(encoded))
        play(m, context, role, encoded, f.temperature, f.seed, search, on_episode, progress)


# --- questions typed by a person ------------------------------------------------------------------


class Watched(EpisodePlayer):
    """A player that shows its turns while they are written: show(text, who) gets each piece."""

    show: Callable[[str, str], None]
    _shown = 0  # characters of the turn

    def append(self, tokens: list[int], logprobs: list[float]) -> None:
        super().append(tokens, logprobs)
        text = self.context.decode(self.tokens[self._turn_start :])
        if not text.endswith("\ufffd"):  # half a character: the next chunk completes it
            self.show(text[self._shown :], self.role.name)
            self._shown = len(text)

    def insert_result(self, result: Sequence[Any]) -> None:
        super().insert_result(result)
        self.show(self.turns[-1][1], SEARCH_ENGINE)
        self._shown = 0


def answer_typed(f: Any) -> None:
    """Without --prompts: one question after the other, each shown as it is played."""
    typing = not f.words and sys.stdin.isatty()
    console = Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    tokenizer = hf_load.load_tokenizer(f.model)
    longest = min(TYPED_PROMPT_TOKENS, hf_load.context_tokens(f.model) - 1)
    context = _context(f, tokenizer, longest)
    search = _search(f)
    m = _load(f)
    sizes = make_sizes(m, [longest], _room(m, context, longest), True)
    sizes = dataclasses.replace(sizes, chunk=4)  # words appear as they come
    engine = _engine_of(m, sizes, search)

    for number, question in enumerate(f.words or _typed(typing)):
        if not typing:
            console.print(printable(f"question: {question}"), style="bold")
        role = ASSISTANT
        messages = [{"role": "user", "content": question}]
        if f.index:
            role = SOLVER
            messages = _solver_messages(context, question)
        prompt = context.prompt(messages)
        if len(prompt) > longest:
            console.print(
                f"[the question makes a prompt of {len(prompt):,} tokens; expected at most "
                f"{longest:,}]\n"
            )
            continue
        player = Watched(context, role, episode_id(role, number, 0), f.temperature, prompt)
        try:
            with _stopped_by_a_key() if typing else contextlib.nullcontext(_go_on) as check:
                facts = _show(player, engine, m.params, f, console, check)
        except _Stopped:
            facts = ["stopped", "Ctrl-D leaves"]
        console.print(printable(f"\n[{' · '.join(facts)}]\n"), style="bold")


def _show(
    player: Watched,
    engine: Engine,
    params: decoder.Params,
    f: Any,
    console: Console,
    check: Callable[[Stats], None],
) -> list[str]:
    """Plays before one's eyes; what is said below. check: called often, may raise."""

    def show(text: str, who: str) -> None:
        console.print(printable(text), end="", style="dim" if who == SEARCH_ENGINE else None)

    player.show = show
    stats = engine.play(params, jax.random.key(f.seed), [player], progress=check)
    line = describe(player.episode(), player.context.tokenizer)
    facts = [f"{stats.sampled_tokens} tokens in {figures.seconds(stats.seconds)}"]
    facts.append(f"ended by {line['stop_reason']}")
    if f.index:
        searches = len(line["searches"])
        facts = [f"answer: {line['answer']}", f"searches: {searches}", *facts]
    return facts


def _go_on(_: Stats) -> None:
    """Stops nothing."""


class _Stopped(Exception):
    """The user wants no more of this answer."""


@contextlib.contextmanager
def _stopped_by_a_key() -> Iterator[Callable[[Stats], None]]:
    """Ctrl-C, while this context is open, makes what it gives raise _Stopped; twice ends it all."""
    presses: list[int] = []

    def arrived(number: int) -> None:
        presses.append(number)
        if len(presses) > 1:
            signals.leave_at_once()

    def check(_: Stats) -> None:
        if presses:
            raise _Stopped

    with signals.heard([signal.SIGINT], arrived):
        yield check


def _typed(typing: bool) -> Iterator[str]:
    """Lines of the standard input that are not blank, until its end."""
    if typing:
        with contextlib.suppress(ImportError):  # Windows has none
            importlib.import_module("readline")  # gives input() arrow keys and a history
    while True:
        try:
            line = input("question> " if typing else "").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(
                f"the standard input: expected text in UTF-8 ({error.reason})"
            ) from None
        if line:
            yield line


def _context(f: Any, tokenizer: Any, prompt_tokens: int) -> EpisodeContext:
    """Raises InputError where the tokenizer or its template does not serve."""
    context = make_context(
        tokenizer,
        f.max_tokens,
        f.max_searches,
        prompts.STYLES[f.style],
        f.template,
        prompt_tokens,
        f.turn_tokens,
        f.observation_tokens,
    )
    shown = example_sets(f.worked_examples)
    context = dataclasses.replace(context, example_sets=shown, tell_repeats=f.tell_repeats)
    if f.index:
        if not Path(f.index).is_dir():
            raise InputError(f"--index={f.index}: expected the folder of a built search index")
        roles.check_context(context)
    else:
        token_bytes(tokenizer)
        if not f.prompts:
            context.prompt([{"role": "user", "content": "Who?"}])
    return context


def _load(f: Any) -> Model:
    print(f"loading {printable(f.model)}", file=sys.stderr, flush=True)
    with device_memory.must_fit("the model", "--dtype=bfloat16, or more or larger devices"):
        return load_model(f.model, f.dtype, f.adapter)


def _search(f: Any) -> Search:
    if not f.index:
        return NO_SEARCH
    settings = DenseSettings(f.encoder)
    found = dense.load_local(f.kind, f.index, threads=0, top_k=f.top_k, settings=settings)
    return Search(functools.partial(found.search, top_k=f.top_k), found.program_bytes)


def answer(f: Any) -> None:
    """Answers --prompts, or questions as they are typed. f: the command's flags."""
    with device_memory.must_fit(
        "generation", "a smaller --max_tokens, shorter prompts or --dtype=bfloat16"
    ):
        (answer_file if f.prompts else answer_typed)(f)
