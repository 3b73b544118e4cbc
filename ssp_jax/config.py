"""The command line and config files, checked before any JAX work; one sentence for each mistake.

A config file is Python with `get_config() -> ConfigDict`; it starts from configs/default.py, which
owns every key. `--config.SECTION.KEY=VALUE` overrides one key, through ml_collections.config_flags.
"""

import argparse
import dataclasses
import math
import re
import runpy
import traceback
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import default
from ssp_jax.errors import InputError
from ssp_jax.game import examples, prompts, rewards, rules
from ssp_jax.retriever import settings
from ssp_jax.runtime.command import Parser, nearest, one_line, user_path
from ssp_jax.user_code import load

# of the repository, or where `pip install .` has put configs/
ROOT = Path(default.__file__).parent.parent
FREE_SECTION = "data.eval_sets"  # its keys are names of the user's own choice, its values files
# Keys of paths, besides those of FREE_SECTION.
PATHS = (
    "model.path",
    "model.adapter",
    "data.answers",
    "retriever.corpus",
    "retriever.index",
    "retriever.encoder",
)
# What a file of assignments can do wrong; anything else is a defect and keeps its traceback.
_FILE_ERRORS = (
    SyntaxError,
    ImportError,
    NameError,
    AttributeError,
    LookupError,
    TypeError,
    ValueError,
    OSError,
    ArithmeticError,
    AssertionError,
    RuntimeError,
    MemoryError,
)


def flatten_config(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"learner.rows": 8, ...}; an empty section leaves nothing."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat |= flatten_config(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


MODES = ("train", "eval", "warm_start")


@dataclass(frozen=True)
class Origin:
    """The checkpoint of another run that a new one starts from."""

    workdir: str
    step: int | None  # None: the newest

    def __str__(self) -> str:
        return self.workdir if self.step is None else f"{self.workdir}@{self.step}"


@dataclass(frozen=True)
class CommandLine:
    config: ConfigDict  # locked
    workdir: str
    mode: str  # of MODES
    file: str  # of the config
    origin: Origin | None = None


def add_flags(parser: Parser) -> None:
    """Adds the flags of a command that takes a config; overrides of its keys are what is left."""
    parser.add_argument("--config", default="", metavar="FILE", help="such as configs/tiny.py")
    workdir = "of the run; runs/NAME for configs/NAME.py"
    parser.add_argument("--workdir", default="", metavar="FOLDER", help=workdir)
    origin = "start from a checkpoint of another run, with its optimizer, pool and memory"
    parser.add_argument("--from", default="", metavar="WORKDIR[@STEP]", dest="origin", help=origin)
    mode = "eval plays the question sets alone, warm_start trains on episodes"
    parser.add_argument("--mode", default=MODES[0], choices=MODES, help=mode)


def parse_command_line(arguments: Sequence[str]) -> CommandLine:
    """Parses `--config=FILE [--workdir=FOLDER] [--mode=MODE] [--config.KEY=VALUE ...]`.

    Raises InputError.
    """
    parser = Parser(prog="python -m ssp_jax.main", add_help=False)
    add_flags(parser)
    return command_line(*parser.parse_known_args(arguments))


def command_line(given: argparse.Namespace, overrides: list[str]) -> CommandLine:
    """The config that flags of add_flags() and overrides of keys give. Raises InputError."""
    if not given.config:
        raise InputError(
            "flag --config is missing; expected a config file, such as --config=configs/tiny.py"
        )
    if "://" in given.workdir:
        raise InputError(
            f"--workdir={given.workdir} is a URL; expected a folder (gcsfuse makes one of a bucket)"
        )
    workdir = user_path(given.workdir, "--workdir")
    path = _find(user_path(given.config, "--config"))
    config = load_config(path)
    _override(config, overrides)
    by_default = Path("runs") / path.stem
    origin = _origin(given.origin) if given.origin else None
    if origin and given.mode != "train":
        raise InputError(f"--from={origin} starts a run; expected no --mode={given.mode} beside it")
    return CommandLine(config, workdir or str(by_default), given.mode, str(path), origin)


def _origin(text: str) -> Origin:
    found = re.fullmatch(r"(.+)@(\d{1,9})", text)
    if found is None:
        return Origin(user_path(text, "--from"), None)
    return Origin(user_path(found[1], "--from"), int(found[2]))


def load_config(path: Path) -> ConfigDict:
    """Runs a config file, checks its result against configs/default.py, and locks it."""
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except _FILE_ERRORS as error:
        raise InputError(_file_error(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise InputError(
            f"{path}: get_config() gives {type(config).__name__}; expected an ml_collections "
            "ConfigDict"
        )
    _check(config, str(path))
    _expand_paths(config)
    return config.lock()


def of_values(values: dict[str, Any], where: str) -> ConfigDict:
    """The config of a run, from its keys as a file has them (workdir.as_read).

    where: names the file. Keys that are younger than the run have their defaults. Raises
    InputError.
    """
    defaults = default_values()
    found = {}
    for key, value in values.items():
        is_tuple = isinstance(value, list) and isinstance(defaults.get(key), tuple)
        found[key] = tuple(value) if is_tuple else value
    config = default.get_config().copy_and_resolve_references()
    with config.unlocked(), config.ignore_type():
        config.update_from_flattened_dict(found)
    _check(config, where)
    check_numbers(config)
    return config.lock()


def _expand_paths(config: ConfigDict) -> None:
    paths = {}
    for key, value in flatten_config(config).items():
        is_own = key in USER_CODE and load.is_one(value)
        if key in PATHS or key.startswith(f"{FREE_SECTION}.") or is_own:
            paths[key] = user_path(value, f"config key {key}")
    with config.unlocked():
        config.update_from_flattened_dict(paths)


def _find(name: str) -> Path:
    """A path from the current folder, or from the repository's."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    names = [path.stem for path in sorted((ROOT / "configs").glob("*.py"))]
    found = nearest(Path(name).stem, names)
    known = f"the nearest is configs/{found}.py" if found else f"configs has {', '.join(names)}"
    raise InputError(f"--config={name}: there is no such file; {known}")


def _override(config: ConfigDict, overrides: list[str]) -> None:
    """Applies `--config.KEY=VALUE` arguments in place."""
    rest = ["ssp_jax", *overrides]  # absl expects a program first
    overridden = _set_names(config, rest)
    known = default_values() | flatten_config(config)
    for argument in rest[1:]:
        flag = re.match(r"--?([^=]+)", argument)
        if flag is None:
            continue  # the value of `--config.KEY VALUE`, or a stray word: found below
        name = flag[1]
        if name.startswith("noconfig."):
            name = name.removeprefix("no")
        key = name.removeprefix("config.")
        if not name.startswith("config."):
            raise InputError(_no_flag(name, known))
        if key not in known:
            raise InputError(f"--{name}: {_no_key(key, known)}")
        overridden.add(key)
    values = flags.FlagValues()
    values.set_gnu_getopt(True)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=rest)
        stray = values(rest)[1:]
    except (flags.Error, TypeError, ValueError) as error:
        found = re.search(r"flag --config\.([\w.]+)=(.*?): ", str(error), flags=re.DOTALL)
        if found is None:
            raise InputError(one_line(error)) from None
        key, value = found.groups()
        raise InputError(_wrong_type(key, repr(value), known)) from None
    if stray:
        raise InputError(f"unexpected argument {stray[0]!r}; write overrides as --config.KEY=VALUE")
    _check(config, "--config." + ", --config.".join(sorted(overridden)))
    _expand_paths(config)


def _set_names(config: ConfigDict, rest: list[str]) -> set[str]:
    """Moves `--config.data.eval_sets.NAME=FILE` from `rest` into the config; returns the keys.

    An empty FILE removes the set. config_flags reads a key as Python, where 2wikimultihopqa is no
    name.
    """
    found: dict[str, str] = {}
    pattern = rf"--?config\.({re.escape(FREE_SECTION)}\.[^=]*)(?:=(.*))?"
    at = 1
    while at < len(rest):
        flag = re.fullmatch(pattern, rest[at], re.DOTALL)
        if flag is None:
            at += 1
            continue
        key, value = flag.groups()
        del rest[at]
        if value is None:  # the next word
            if at == len(rest):
                raise InputError(f"Missing value for flag --config.{key}")
            value = rest.pop(at)
        found[key] = value
        _check_name(f"--config.{key}", key)
    with config.unlocked():
        config.update_from_flattened_dict({key: value for key, value in found.items() if value})
        for key in (key for key, value in found.items() if not value):
            _remove_set(config, key.removeprefix(f"{FREE_SECTION}."))
    return set(found)


def _remove_set(config: ConfigDict, name: str) -> None:
    sets = config.data.eval_sets
    if name not in sets:
        known = ", ".join(sets) or "none"
        raise InputError(
            f"--config.{FREE_SECTION}.{name}=: expected a file, or the name of a set of the config "
            f"that is to be removed; it has {known}"
        )
    del sets[name]


def _check_name(where: str, key: str) -> None:
    """Checks the name of an evaluation set: files, metrics, tables and flags have to show it."""
    name = key.removeprefix(f"{FREE_SECTION}.")
    if not re.fullmatch(r"[\w-]+", name):
        raise InputError(
            f"{where}: the name of the set is {name!r}; expected letters, digits, _ and - alone"
        )


def default_values() -> dict[str, Any]:
    return flatten_config(default.get_config())


def _check(config: ConfigDict, where: str) -> None:
    """Raises InputError unless the keys are those of the default, each with its type.

    The elements of tuples are checked too.
    """
    expected = default_values()
    found = flatten_config(config)
    for key, value in found.items():
        if key.startswith(f"{FREE_SECTION}."):
            expected[key] = ""
            _check_name(where, key)
        if key not in expected:
            raise InputError(f"{where}: {_no_key(key, expected)}")
        same = type(value) is type(expected[key])
        if same and isinstance(value, tuple):
            allowed = set(map(type, expected[key]))
            same = set(map(type, value)) <= allowed
        if not same:
            raise InputError(f"{where}: {_wrong_type(key, repr(value), expected)}")
    if missing := sorted(expected.keys() - found.keys()):
        raise InputError(
            f"{where}: key {missing[0]} is missing; start from configs/default.py, which has every "
            "key"
        )


def _no_key(key: str, known: dict[str, Any]) -> str:
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key} is a section; set one of its keys, such as {inside[0]}"
    sections = dict.fromkeys(known_key.partition(".")[0] for known_key in known)
    found = nearest(key, [*known, *sections])
    expected = f"the nearest is {found}" if found else "--help=WORD finds keys by a word"
    return f"there is no key {key}; {expected}"


def _no_flag(name: str, known: dict[str, Any]) -> str:
    keys = [f"config.{key}" for key in known]
    found = nearest(name, ["config", "workdir", "mode", "from", *keys])
    expected = f"the nearest is --{found}" if found else "--help lists the flags"
    return f"unknown flag --{name}; {expected}"


def _wrong_type(key: str, shown: str, known: dict[str, Any]) -> str:
    """shown: the value, as it stands in the sentence."""
    example = known[key]
    kind = type(example).__name__
    if isinstance(example, tuple):
        kind = f"tuple of {type(example[0]).__name__}"
    return f"key {key} must be {kind}, such as {example!r}, and not {shown}"


def _file_error(path: Path, error: BaseException) -> str:
    """Where in the config file, which key, and the nearest one."""
    whole_trace = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in whole_trace if frame.filename == str(path)]
    if isinstance(error, SyntaxError) or not frames:
        line = getattr(error, "lineno", None)
        where = f"{path} line {line}" if line else str(path)
        what = "it has no get_config()" if str(error) == "'get_config'" else one_line(error)
        return f"{where}: {what}"

    where = f"{path} line {frames[-1].lineno}"
    known = default_values()
    assigned = re.match(r"\w+\.([\w.]+)\s*=\s*(.*?)\s*(?:#.*)?$", frames[-1].line or "")
    if assigned and assigned[1] not in known:
        return f"{where}: {_no_key(assigned[1], known)}"
    if assigned and isinstance(error, TypeError | ValueError):
        return f"{where}: {_wrong_type(assigned[1], assigned[2], known)}"
    if unknown := re.search(r'Key "([\w.]+)" does not exist', str(error)):
        return f"{where}: {_no_key(unknown[1], known)}"
    return f"{where}: {type(error).__name__}: {one_line(error)}"


# Keys whose value is one of a few names.
CHOICES: dict[str, Iterable[str]] = {
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("full", "attention", "dots", "none"),
    "model.attention": ("auto", "splash", "flash", "xla"),
    "prompt.style": prompts.STYLES,
    "prompt.template": ("chat", "raw_chatml"),
    "game.rl_pair": rules.RL_PAIRS,
    "retriever.kind": ("bm25", "dense", "hybrid", "http"),
    "retriever.stemmer": settings.STEMMERS,
    "retriever.stopwords": settings.STOPWORDS,
    "retriever.pooling": settings.POOLINGS,
    "retriever.device_dtype": settings.DTYPES,
    "game.train": get_args(rules.Trained),
    "game.noise_unit": get_args(rules.NoiseUnit),
    "game.noise_source": get_args(rules.NoiseSource),
    "game.batch_fill": get_args(rules.BatchFill),
    "reward.metric": rewards.METRIC_NAMES,
    "eval.judge": rewards.METRIC_NAMES,
    "reward.proposer": rewards.PROPOSER_REWARDS,
    "engine.schedule": ("pipelined", "barrier"),
    "learner.kl_type": ("k1", "k2", "k3"),
    "learner.proposer_baseline": get_args(rules.ProposerBaseline),
    "learner.aggregation": ("sequence_mean", "token_mean", "constant"),
    "learner.schedule": ("constant", "cosine", "linear"),
    "learner.momentum_dtype": ("float32", "bfloat16"),
    "learner.update_order": ("solver_first", "proposer_first", "combined"),
    "learner.old_logprobs": ("sampler", "recompute"),
    "warm_start.keep": ("right", "all"),
    "checkpoint.export": ("auto", "model", "adapter", "none"),
}

# Of these, the keys that also take a function or class of the user's own file.
USER_CODE = ("reward.metric", "eval.judge", "retriever.kind")


@dataclass(frozen=True)
class Range:
    """The numbers that a key may have: from `low` to `high`."""

    low: float
    high: float
    above: bool = False  # low itself is too low
    below: bool = False  # high itself is too high
    zero: bool = False  # 0 is one of them, whatever low is

    def check(self, what: str, value: float) -> None:
        """what: the key or flag."""
        high = f"{self.high:.15g}"
        if isinstance(value, float) and not math.isfinite(value):
            expected = "a finite number"
        elif value < self.low or (self.above and value == self.low):
            if self.zero and value == 0:
                return
            to = "less than" if self.below else "up to"
            expected = f"{self._minimum()}, {to} {high}"
        elif value > self.high or (self.below and value == self.high):
            limit = "less than" if self.below else "at most"
            expected = f"{limit} {high}"
        else:
            return
        shown: object = value
        if isinstance(value, int) and abs(value) > 1e30:
            shown = f"a number of {value.bit_length()} bits"
        raise InputError(f"{what} is {shown}; expected {expected}")

    def _minimum(self) -> str:
        bound = "more than" if self.above else "at least"
        minimum = f"{bound} {self.low:.15g}"
        return f"0, or {minimum}" if self.zero else minimum


# GRPO with rank 64 fell from 73.1 to 8.7 % at batch 128, and with 128 stayed near the floor; ranks
# 8 and 16 trained ("Structure over Scale", ICML 2026 workshop).
_HIGHEST_RANK = 64
_INT32 = (1 << 31) - 1  # of JAX's arrays and counters
_WHOLE = Range(0, _INT32)
_COUNT = Range(0, _INT32, above=True)
_ROWS = Range(0, rules.ID_ROWS, above=True)
_TOKENS = Range(0, 1 << 24, above=True)  # float32 has each position up to there
_FACTOR = Range(0, 1e6)
_SECONDS = Range(0, 86_400, above=True)  # sockets know no longer ones than some weeks
_RETRIES = Range(0, 1000)
# below, float32 logits and gradients overflow; 0 is greedy
_TEMPERATURE = Range(0.01, 100, zero=True)
_DEVICES = Range(-1, 1 << 20)

# Every key that is a number, or a tuple of them.
BOUNDS: dict[str, Range] = {
    "seed": Range(0, (1 << 32) - 1),  # JAX's generators take 32 bits and drop the rest
    "steps": _WHOLE,
    "lora.rank": _WHOLE,
    "lora.alpha": Range(0, 1e6, above=True),
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "mesh.tensor": _DEVICES,
    "retriever.threads": Range(0, 4096),
    "retriever.timeout_s": _SECONDS,
    "retriever.retries": _RETRIES,
    "retriever.top_k": Range(0, 10_000, above=True),
    "retriever.device_gib": Range(settings.ALL, 1e6),
    "retriever.k1": Range(0, 1000),
    "retriever.b": Range(0, 1),
    "prompt.worked_examples": Range(0, examples.MOST),
    "game.answers_per_step": _ROWS,
    "game.group_size": Range(0, rules.ID_ATTEMPTS, above=True),
    "game.noise_documents": Range(0, 10_000),
    "game.reset_interval": _COUNT,
    "game.pool_reuse": Range(0, rules.ID_ROWS),
    "game.resample_rounds": Range(0, rules.ID_ATTEMPTS - 1, above=True),
    "rules.min_searches": _WHOLE,
    "rules.min_chars": _WHOLE,
    "rules.max_chars": _COUNT,
    "rules.min_words": _WHOLE,
    "reward.invalid_question": Range(-1e6, 1e6),
    "judge.concurrency": Range(0, 10_000, above=True),
    "judge.timeout_s": _SECONDS,
    "judge.retries": _RETRIES,
    "judge.max_tokens": _TOKENS,
    "limits.prompt_tokens": _TOKENS,
    "limits.verify_prompt_tokens": _TOKENS,
    "limits.response_tokens": _TOKENS,
    "limits.verify_response_tokens": _TOKENS,
    "limits.turn_tokens": _TOKENS,
    "limits.turns": _COUNT,
    "limits.searches": _COUNT,
    "limits.observation_tokens": _TOKENS,
    "sampling.temperature": dataclasses.replace(_TEMPERATURE, zero=False),
    "sampling.verify_temperature": _TEMPERATURE,
    "sampling.top_k": _WHOLE,
    "sampling.top_p": Range(0, 1, above=True),
    "sampling.eval_temperature": _TEMPERATURE,
    "engine.slots": _ROWS,
    "engine.chunk": Range(0, 1 << 16, above=True),
    "engine.cache_tokens": _TOKENS,
    "engine.cache_buckets": _TOKENS,
    "engine.row_shares": Range(0, 1, above=True),
    "engine.kv_cache_gib": _FACTOR,
    "engine.extend_buckets": _TOKENS,
    "engine.extend_rows": _ROWS,
    "learner.learning_rate": Range(0, 1, above=True),
    "learner.warmup_steps": _WHOLE,
    "learner.decay_steps": _COUNT,
    "learner.final_rate": Range(0, 1),
    "learner.adam_b1": Range(0, 1, below=True),
    "learner.adam_b2": Range(0, 1, below=True),
    "learner.weight_decay": Range(0, 100),
    "learner.max_grad_norm": Range(0, 1e9, above=True),
    "learner.solver_mini_batches": _ROWS,
    "learner.proposer_mini_batches": _ROWS,
    "learner.row_tokens": _TOKENS,
    "learner.rows": _ROWS,
    "learner.logprob_chunk": _TOKENS,
    "learner.clip_low": _FACTOR,
    "learner.clip_high": _FACTOR,
    "learner.clip_dual": Range(1, 1e6, above=True, zero=True),
    "learner.kl_coef": _FACTOR,
    "learner.kl_bound": _FACTOR,
    "learner.importance_cap": Range(0, 1e9, above=True),
    "learner.max_bad_updates": _COUNT,
    "eval.every": _WHOLE,
    "eval.max_questions": _WHOLE,
    "warm_start.held_out": Range(0, 1, above=True, below=True),
    "warm_start.steps": _WHOLE,
    "warm_start.episodes_per_step": _ROWS,
    "warm_start.learning_rate": Range(0, 1, above=True),
    "warm_start.stop_loss": _FACTOR,
    "warm_start.look_every": _COUNT,
    "warm_start.form_prompts": _WHOLE,
    "checkpoint.every": _WHOLE,
    "checkpoint.minutes": Range(0, 1e6),
    "checkpoint.keep": _COUNT,
    "log.episodes_every": _WHOLE,
}


def check_values(config: ConfigDict, *, evaluating: bool = False) -> None:
    """Raises InputError for values that cannot work, alone or together. Reads no file."""
    check_numbers(config)
    _check_given(flatten_config(config), evaluating)


def check_numbers(config: ConfigDict) -> None:
    """Raises InputError for names and numbers that cannot work, alone or together."""
    values = flatten_config(config)
    for key, names in CHOICES.items():
        is_own = key in USER_CODE and load.is_one(values[key])
        if values[key] not in names and not is_own:
            own = ", or FILE.py:NAME" if key in USER_CODE else ""
            raise InputError(
                f"config key {key} is {values[key]!r}; expected one of {', '.join(names)}{own}"
            )
    for key, bounds in BOUNDS.items():
        value = values[key]
        for number in value if isinstance(value, tuple) else (value,):
            bounds.check(f"config key {key}", number)
    _check_sizes(config, values)
    _check_search(config.retriever)
    _check_lora(config.lora)
    _check_export(config)
    _check_rules(config)


def _check_given(values: dict[str, Any], evaluating: bool) -> None:
    """Raises InputError where a key is empty that a run with these choices needs."""
    sets = (key for key in values if key.startswith(f"{FREE_SECTION}."))
    needed = dict.fromkeys(["model.path", *sets], "a path")
    if not evaluating:
        needed["data.answers"] = "a path"
    if values["retriever.kind"] == "http":
        needed["retriever.url"] = (
            "the address of a search server, such as http://127.0.0.1:8000/retrieve"
        )
    elif not values["retriever.index"] and not load.is_one(values["retriever.kind"]):
        needed["retriever.corpus"] = "a path"
    if values["retriever.kind"] in settings.KINDS:
        needed["retriever.encoder"] = "the Hugging Face folder of an encoder"
    if "openai" in (values["reward.metric"], values["eval.judge"]):
        needed["judge.url"] = "an address such as http://127.0.0.1:8000/v1"
        needed["judge.model"] = "its name on that server"
    _check_not_empty(values, needed)


def _check_not_empty(values: dict[str, Any], needed: dict[str, str]) -> None:
    for key, expected in needed.items():
        if not values[key]:
            raise InputError(f"config key {key} is empty; expected {expected}")


def check_warm_start(config: ConfigDict) -> None:
    """check_values for a warm start, which plays no game."""
    check_numbers(config)
    episodes = "files of episodes, or folders of runs, between commas"
    needed = {"model.path": "a path", "warm_start.episodes": episodes}
    _check_not_empty(flatten_config(config), needed)


def longest_episode(config: ConfigDict) -> int:
    """Tokens of the longest episode that is trained on."""
    return int(config.limits.prompt_tokens + config.limits.response_tokens)


def _check_sizes(config: ConfigDict, values: dict[str, Any]) -> None:
    """Raises InputError for lengths that do not hold what they must hold."""
    limits = config.limits
    trained = longest_episode(config)
    verified = limits.verify_prompt_tokens + min(limits.verify_response_tokens, limits.turn_tokens)
    needs = {
        "learner.row_tokens": (trained, "limits.prompt_tokens + limits.response_tokens"),
        "engine.cache_tokens": (
            max(trained, verified),
            "limits.prompt_tokens + limits.response_tokens, and for limits.verify_prompt_tokens "
            "with the smaller of limits.verify_response_tokens and limits.turn_tokens",
        ),
    }
    for key, (minimum, why) in needs.items():
        if values[key] < minimum:
            raise InputError(
                f"config key {key} is {values[key]}; expected at least {minimum}, for {why}"
            )
    _check_ids(config)
    _check_engine(config)
    c = config.learner
    if c.row_tokens % c.logprob_chunk:
        raise InputError(
            f"config key learner.row_tokens is {c.row_tokens}; expected a multiple of "
            f"learner.logprob_chunk = {c.logprob_chunk}"
        )


def _check_engine(config: ConfigDict) -> None:
    cache_tokens = config.engine.cache_tokens
    buckets = config.engine.extend_buckets
    if not buckets:
        raise InputError("config key engine.extend_buckets is empty; expected at least one length")
    if max(buckets) > cache_tokens:
        raise InputError(
            f"config key engine.extend_buckets has {max(buckets)}; expected at most "
            f"engine.cache_tokens = {cache_tokens}"
        )
    judged = "policy" in (config.reward.metric, config.eval.judge)
    if judged and config.judge.max_tokens >= cache_tokens:
        raise InputError(
            f"config key judge.max_tokens is {config.judge.max_tokens}; expected less than "
            f"engine.cache_tokens = {cache_tokens}, which must hold what is judged too"
        )


def _check_search(c: ConfigDict) -> None:
    if c.kind in settings.KINDS and c.top_k > settings.MAX_TOP_K:
        raise InputError(
            f"config key retriever.top_k is {c.top_k}; expected at most {settings.MAX_TOP_K} with "
            f"retriever.kind={c.kind}"
        )


def _check_lora(c: ConfigDict) -> None:
    all_targets = default_values()["lora.targets"]
    names = ", ".join(all_targets)
    for target in c.targets:
        if target not in all_targets:
            raise InputError(f"config key lora.targets has {target!r}; expected some of {names}")
    if c.rank and not c.targets:
        raise InputError(f"config key lora.targets is empty; expected some of {names}")
    if len(set(c.targets)) < len(c.targets):
        raise InputError("config key lora.targets has a name twice; expected each once")


def _check_export(config: ConfigDict) -> None:
    if config.checkpoint.export == "adapter" and not (config.lora.rank or config.model.adapter):
        raise InputError(
            "config key checkpoint.export is 'adapter' and lora.rank is 0, so that there is none; "
            "expected auto, model or none, or a rank"
        )


def export_kind(config: ConfigDict) -> str:
    """What a run writes at its end: "model", "adapter" or "none"."""
    kind = str(config.checkpoint.export)
    if kind == "auto":
        return "adapter" if config.lora.rank else "model"
    return kind


def _check_ids(config: ConfigDict) -> None:
    """Raises InputError where the ids of episodes have no room for what a step plays."""
    game = config.game
    proposals, attempts = rules.group_sizes(game.rl_pair, game.group_size)
    played = game.answers_per_step * proposals * attempts  # a judge may be asked about each of them
    if played > rules.ID_ROWS:
        raise InputError(
            f"config key game.answers_per_step is {game.answers_per_step}, which with "
            f"game.group_size makes {played} attempts a step; expected at most {rules.ID_ROWS}"
        )


def _check_rules(config: ConfigDict) -> None:
    """Raises InputError for rules that no question can keep: all would be refused."""
    asked = config.rules
    limits = config.limits
    for key, value, limit, of in (
        ("min_chars", asked.min_chars, asked.max_chars, "rules.max_chars"),
        ("min_words", asked.min_words, (asked.max_chars + 1) // 2, "the words of rules.max_chars"),
        ("min_searches", asked.min_searches, limits.searches, "limits.searches"),
        ("min_searches", asked.min_searches, limits.turns - 1, "limits.turns - 1"),
    ):
        if value > limit:
            raise InputError(f"config key rules.{key} is {value}; expected at most {limit}, {of}")


def advice(config: ConfigDict, platform: str) -> list[str]:
    """Sentences for the start of a run on choices that work but are seldom meant.

    platform: of the devices, in JAX's words.
    """
    sentences = []
    truncated = config.sampling.top_k or config.sampling.top_p < 1
    if truncated and config.learner.old_logprobs == "sampler":
        sentences.append(
            "sampling.top_k and top_p leave tokens out that the trainer counts, so ratios to the "
            "sampler's log-probs are too small and clipped for nothing; "
            "learner.old_logprobs=recompute corrects it"
        )
    if config.lora.rank > _HIGHEST_RANK:
        sentences.append(
            f"lora.rank is {config.lora.rank}: ranks above {_HIGHEST_RANK} can collapse under "
            "GRPO; 16 or 32 are enough"
        )
    c = config.retriever
    is_e5 = "e5" in Path(c.encoder).name.lower()
    if c.kind in settings.KINDS and is_e5 and not c.query_prefix:
        sentences.append(
            "retriever.query_prefix is empty: E5 encoders were trained with query_prefix "
            "'query: ' and passage_prefix 'passage: ', and find less without, unless the "
            "encoder's folder has prompts of its own"
        )
    if platform == "cpu" and config.model.dtype == "bfloat16":
        # A decode step of Qwen2.5-0.5B: 450 ms and not 120, on 2 cores.
        sentences.append(
            "model.dtype is bfloat16, which CPUs compute three to four times slower than float32; "
            "--config.model.dtype=float32 is faster here"
        )
    return sentences
