"""The command line and config files: keys and types are checked before any JAX work; one sentence for each mistake.

A config file is Python with `get_config() -> ConfigDict`; it starts from configs/default.py, which owns every key.
`--config.SECTION.KEY=VALUE` overrides one key, through ml_collections.config_flags.
"""

import dataclasses
import math
import re
import runpy
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from textwrap import shorten
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import default
from ssp_jax import prompts, rewards
from ssp_jax.errors import InputError

ROOT = Path(default.__file__).parent.parent  # of the repository, or where `pip install .` has put configs/
FREE_SECTION = "data.eval_sets"  # its keys are names of the user's own choice, its values files
# What a file of assignments can do wrong; anything else is a defect and keeps its traceback.
_FILE_ERRORS = (SyntaxError, ImportError, NameError, AttributeError, LookupError, TypeError, ValueError, OSError)


def flatten_config(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"learner.rows": 8, ...}; an empty section leaves nothing."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        flat |= flatten_config(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return flat


def nearest(name: str, names: Iterable[str]) -> str:
    """The likeliest intended name: alike as a whole, and in its section or in its last part."""

    def alike(a: str, b: str) -> float:
        return SequenceMatcher(None, a, b).ratio()

    def likeness(candidate: str) -> float:
        (section, _, last), (their_section, _, their_last) = name.rpartition("."), candidate.rpartition(".")
        return alike(name, candidate) + max(alike(last, their_last), alike(section, their_section) if section else 0)

    return max(names, key=likeness)


MODES = ("train", "eval")


@dataclass(frozen=True)
class CommandLine:
    config: ConfigDict  # locked
    workdir: str
    mode: str  # of MODES


def parse_command_line(argv: list[str]) -> CommandLine:
    """`--config=FILE [--workdir=FOLDER] [--mode=MODE] [--config.KEY=VALUE ...]` (argv[0]: program)."""
    values = flags.FlagValues()
    flags.DEFINE_string("config", None, "config file", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the run lives", flag_values=values)
    flags.DEFINE_enum("mode", MODES[0], MODES, "what to do", flag_values=values)
    values.set_gnu_getopt(True)
    try:
        rest = values(argv, known_only=True)
    except flags.Error as error:
        raise InputError(_one_line(error)) from None
    if not values.config:
        raise InputError("flag --config is missing; expected a config file, such as --config=configs/tiny.py")
    if "://" in (values.workdir or ""):
        raise InputError(f"--workdir={values.workdir} is a URL; expected a folder (gcsfuse makes one of a bucket)")
    path = _find(values.config)
    config = load_config(path)
    _override(config, rest)
    return CommandLine(config, values.workdir or str(Path("runs") / path.stem), values.mode)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process stands among those of the run; nothing is given where a cluster's environment tells it."""

    coordinator: str | None = None  # HOST:PORT of process 0
    processes: int | None = None
    process: int | None = None


def take_place(argv: list[str]) -> tuple[list[str], Place]:
    """`--coordinator=HOST:PORT --processes=N --process=I`, all or none of them, or `--processes=1`; and the rest."""
    values = flags.FlagValues()
    flags.DEFINE_string("coordinator", None, "address of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, "of the run", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, "this one", lower_bound=0, flag_values=values)
    values.set_gnu_getopt(True)
    try:
        rest = values(argv, known_only=True)
    except flags.Error as error:
        raise InputError(_one_line(error)) from None
    place = Place(values.coordinator, values.processes, values.process)
    if place in (Place(), Place(processes=1)):
        return rest, place
    if place.coordinator is None or place.processes is None or place.process is None:
        raise InputError("expected --coordinator=HOST:PORT, --processes=N and --process=I together, or none of them")
    if not re.fullmatch(r"\S+:\d+", place.coordinator) or place.process >= place.processes:
        raise InputError(
            f"--coordinator={place.coordinator} --processes={place.processes} --process={place.process}: expected "
            "HOST:PORT of process 0, and for each process its own number from 0 to N - 1"
        )
    return rest, place


def load_config(path: Path) -> ConfigDict:
    """Run a config file and hold its result against configs/default.py; locked."""
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except _FILE_ERRORS as error:
        raise InputError(_file_error(path, error)) from error
    if not isinstance(config, ConfigDict):
        raise InputError(f"{path}: get_config() gives {type(config).__name__}; expected an ml_collections ConfigDict")
    _check(config, str(path))
    return config.lock()


def _find(name: str) -> Path:
    """A path from the current folder, or from the repository's."""
    for path in (Path(name), ROOT / name):
        if path.is_file():
            return path
    known = [f"configs/{path.name}" for path in sorted((ROOT / "configs").glob("*.py"))]
    raise InputError(f"--config={name}: there is no such file; the nearest is {nearest(name, known)}")


def _override(config: ConfigDict, rest: list[str]) -> None:
    """Apply `--config.KEY=VALUE` arguments in place; rest[0] is the program."""
    known = default_values() | flatten_config(config)
    overridden = set()
    for argument in rest[1:]:
        if not (flag := re.match(r"--?([^=]+)", argument)):
            continue  # the value of `--config.KEY VALUE`, or a stray word: found below
        name = flag[1].removeprefix("no") if flag[1].startswith("noconfig.") else flag[1]
        key = name.removeprefix("config.")
        if re.fullmatch(rf"{FREE_SECTION}\.\w+", key) and key not in known:
            with config.unlocked():
                config.update_from_flattened_dict({key: ""})
            known[key] = ""
        if not name.startswith("config."):
            expected = nearest(name, ["config", "workdir", "mode", *(f"config.{k}" for k in known)])
            raise InputError(f"unknown flag --{name}; the nearest is --{expected}")
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
        raise InputError(_wrong_type(found[1], found[2], known) if found else _one_line(error)) from None
    if stray:
        raise InputError(f"unexpected argument {stray[0]!r}; write overrides as --config.KEY=VALUE")
    _check(config, "--config." + ", --config.".join(sorted(overridden)))


def default_values() -> dict[str, Any]:
    return flatten_config(default.get_config())


def _check(config: ConfigDict, where: str) -> None:
    """Exactly the keys of the default, each with its type; the elements of tuples too."""
    expected, found = default_values(), flatten_config(config)
    for key, value in found.items():
        if key.startswith(f"{FREE_SECTION}."):
            expected[key] = ""
        if key not in expected:
            raise InputError(f"{where}: {_no_key(key, expected)}")
        same = type(value) is type(expected[key])
        if same and isinstance(value, tuple):
            same = {type(v) for v in value} <= {type(v) for v in expected[key]}
        if not same:
            raise InputError(f"{where}: {_wrong_type(key, value, expected)}")
    if missing := sorted(expected.keys() - found.keys()):
        raise InputError(f"{where}: key {missing[0]} is missing; start from configs/default.py, which has every key")


def _no_key(key: str, known: dict[str, Any]) -> str:
    if inside := [k for k in known if k.startswith(f"{key}.")]:
        return f"{key} is a section; set one of its keys, such as {inside[0]}"
    return f"there is no key {key}; the nearest is {nearest(key, known)}"


def _wrong_type(key: str, value: Any, known: dict[str, Any]) -> str:
    kind, example = type(known[key]).__name__, known[key]
    if isinstance(example, tuple):
        kind = f"tuple of {type(example[0]).__name__}"
    return f"key {key} must be {kind}, such as {example!r}, and not {value!r}"


def _file_error(path: Path, error: BaseException) -> str:
    """Where in the config file, which key, and the nearest one."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    if isinstance(error, SyntaxError) or not frames:
        line = getattr(error, "lineno", None)
        what = "it has no get_config()" if str(error) == "'get_config'" else _one_line(error)
        return f"{path}{f' line {line}' if line else ''}: {what}"
    where, known = f"{path} line {frames[-1].lineno}", default_values()
    assigned = re.match(r"\w+\.([\w.]+)\s*=\s*(.*?)\s*(?:#.*)?$", frames[-1].line or "")
    if assigned and assigned[1] not in known:
        return f"{where}: {_no_key(assigned[1], known)}"
    if assigned and isinstance(error, TypeError | ValueError):
        kind = type(known[assigned[1]]).__name__
        return f"{where}: key {assigned[1]} must be {kind}, such as {known[assigned[1]]!r}, and not {assigned[2]}"
    if unknown := re.search(r'Key "([\w.]+)" does not exist', str(error)):
        return f"{where}: {_no_key(unknown[1], known)}"
    return f"{where}: {type(error).__name__}: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return shorten(str(error), 200)


# proposer_solver pairs of [P Table 6] -> (proposer, solver). grpo plays a group and centres on it; reinforce plays one
# and centres on nothing; reinforcepp (REINFORCE++, arXiv 2501.03262) normalises over the whole batch.
RL_PAIRS = {
    "reinforce_grpo": ("reinforce", "grpo"),
    "reinforce_reinforce": ("reinforce", "reinforce"),
    "reinforcepp_grpo": ("reinforcepp", "grpo"),
    "grpo_reinforce": ("grpo", "reinforce"),
    "grpo_reinforcepp": ("grpo", "reinforcepp"),
    "grpo_grpo": ("grpo", "grpo"),
}

# Of one role in a step; an episode's id (episodes.episode_id) has bits for so many.
ID_ROWS, ID_ATTEMPTS = 1 << 19, 1 << 9

# Keys whose value is one of a few names.
CHOICES: dict[str, Iterable[str]] = {
    "model.dtype": ("bfloat16", "float32"),
    "model.remat": ("full", "attention", "dots", "none"),
    "model.attention": ("auto", "xla"),
    "prompt.style": prompts.STYLES,
    "prompt.template": ("chat", "raw_chatml"),
    "game.rl_pair": RL_PAIRS,
    "retriever.kind": ("bm25", "http"),
    "game.train": ("both", "solver", "proposer"),
    "game.noise_unit": ("passage", "trajectory"),
    "game.noise_source": ("previous_step", "same_step"),
    "game.batch_fill": ("dummy", "resample", "full_reuse", "periodic_reset"),
    "reward.metric": rewards.WAYS_TO_JUDGE,
    "eval.judge": rewards.WAYS_TO_JUDGE,
    "reward.proposer": rewards.PROPOSER_REWARDS,
    "engine.schedule": ("pipelined", "barrier"),
    "learner.kl_type": ("k1", "k2", "k3"),
    "learner.proposer_baseline": ("none", "batch_mean", "leave_one_out", "hop_grouped"),
    "learner.aggregation": ("sequence_mean", "token_mean", "constant"),
    "learner.schedule": ("constant", "cosine", "linear"),
    "learner.momentum_dtype": ("float32", "bfloat16"),
    "learner.update_order": ("solver_first", "proposer_first", "combined"),
    "learner.old_logprobs": ("sampler", "recompute"),
}
_MAY_BE_ZERO = (
    *("seed", "steps", "game.noise_documents", "rules.", "reward."),
    *("sampling.verify_temperature", "sampling.eval_temperature", "sampling.top_"),  # top_p is checked by itself
    *("retriever.k1", "retriever.b", "retriever.threads", "retriever.retries", "judge.retries", "engine.kv_cache_gib"),
    *(
        "learner.warmup_steps",
        "learner.weight_decay",
        "learner.kl_coef",
        "learner.clip_",
        "learner.final_rate",
        "eval.",
        "checkpoint.every",
        "log.",
    ),
)


def check_values(config: ConfigDict, *, evaluating: bool = False) -> None:
    """Values that cannot work, alone or together; each is told before any file is read."""
    values = flatten_config(config)
    for key, names in CHOICES.items():
        if values[key] not in names:
            raise InputError(f"config key {key} is {values[key]!r}; expected one of {', '.join(names)}")
    _check_given(values, evaluating)
    for key, value in values.items():
        numbers = value if isinstance(value, tuple) else (value,)
        if key.startswith("mesh.") or any(isinstance(n, str | bool) for n in numbers):
            continue
        if not all(map(math.isfinite, numbers)):
            raise InputError(f"config key {key} is {value}; expected a finite number")
        least = 0 if key.startswith(_MAY_BE_ZERO) else 1e-12
        if key != "reward.invalid_question" and any(n < least for n in numbers):
            raise InputError(f"config key {key} is {value}; expected {'at least 0' if not least else 'more than 0'}")
    _check_sizes(config, values)


def _check_given(values: dict[str, Any], evaluating: bool) -> None:
    """What a run with these choices cannot do without."""
    needed = {"model.path": "a path"} | {key: "a path" for key in values if key.startswith("data.eval_sets.")}
    if not evaluating:
        needed["data.answers"] = "a path"
    if values["retriever.kind"] == "http":
        needed["retriever.url"] = "the address of a search server, such as http://127.0.0.1:8000/retrieve"
    elif not values["retriever.index"]:
        needed["retriever.corpus"] = "a path"
    if "openai" in (values["reward.metric"], values["eval.judge"]):
        needed |= {"judge.url": "an address such as http://127.0.0.1:8000/v1", "judge.model": "its name on that server"}
    for key, expected in needed.items():
        if not values[key]:
            raise InputError(f"config key {key} is empty; expected {expected}")


def _check_sizes(config: ConfigDict, values: dict[str, Any]) -> None:
    """Numbers with an upper bound, and lengths that must hold each other."""
    if not 0 < config.sampling.top_p <= 1:
        raise InputError(f"config key sampling.top_p is {config.sampling.top_p}; expected more than 0, up to 1")
    limits = config.limits
    played = limits.prompt_tokens + limits.response_tokens
    needs = {
        "learner.row_tokens": (played, "limits.prompt_tokens + limits.response_tokens"),
        "engine.cache_tokens": (
            max(played, limits.verify_prompt_tokens + limits.turn_tokens),
            "limits.prompt_tokens + limits.response_tokens and limits.verify_prompt_tokens + limits.turn_tokens",
        ),
    }
    for key, (least, why) in needs.items():
        if values[key] < least:
            raise InputError(f"config key {key} is {values[key]}; expected at least {least}, for {why}")
    _check_ids(config)
    if not config.engine.extend_buckets:
        raise InputError("config key engine.extend_buckets is empty; expected at least one length")
    judged = "policy" in (config.reward.metric, config.eval.judge)
    if judged and config.judge.max_tokens >= config.engine.cache_tokens:
        raise InputError(
            f"config key judge.max_tokens is {config.judge.max_tokens}; expected less than engine.cache_tokens = "
            f"{config.engine.cache_tokens}, which must hold what is judged too"
        )
    if config.learner.row_tokens % config.learner.logprob_chunk:
        raise InputError(
            f"config key learner.row_tokens is {config.learner.row_tokens}; "
            f"expected a multiple of learner.logprob_chunk = {config.learner.logprob_chunk}"
        )


def _check_ids(config: ConfigDict) -> None:
    """What a step plays must have room in the ids of its episodes."""
    game, groups = config.game, RL_PAIRS[config.game.rl_pair]
    proposals, attempts = (game.group_size if algorithm == "grpo" else 1 for algorithm in groups)
    for key, number in (("group_size", attempts), ("resample_rounds", 1 + game.resample_rounds)):
        if number > ID_ATTEMPTS:
            most = ID_ATTEMPTS - (key == "resample_rounds")
            raise InputError(f"config key game.{key} is {game[key]}; expected at most {most}")
    played = game.answers_per_step * proposals * attempts  # a judge may be asked about each of them
    if played > ID_ROWS:
        raise InputError(
            f"config key game.answers_per_step is {game.answers_per_step}, which with game.group_size makes {played} "
            f"attempts a step; expected at most {ID_ROWS}"
        )


def advice(config: ConfigDict) -> list[str]:
    """Sentences for the start of a run on choices that work but are seldom meant."""
    found = []
    if (config.sampling.top_k or config.sampling.top_p < 1) and config.learner.old_logprobs == "sampler":
        found.append(
            "sampling.top_k and top_p leave tokens out that the trainer counts, so ratios to the sampler's log-probs "
            "are too small and clipped for nothing; learner.old_logprobs=recompute corrects it"
        )
    return found
