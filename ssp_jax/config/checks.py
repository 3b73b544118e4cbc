"""Values that cannot work, alone or together. No file is read."""

from typing import Any

from ml_collections import ConfigDict

from ssp_jax.config.derived import longest_episode
from ssp_jax.config.keys import default_values, flatten_config, is_eval_set
from ssp_jax.config.values import check_each
from ssp_jax.errors import InputError
from ssp_jax.game import rules
from ssp_jax.retriever import settings
from ssp_jax.user_code import load


def check_values(config: ConfigDict, *, evaluating: bool = False) -> None:
    """Raises InputError for values that cannot work, alone or together. Reads no file."""
    check_numbers(config)
    _check_given(flatten_config(config), evaluating)


def check_warm_start(config: ConfigDict) -> None:
    """check_values for a warm start, which plays no game."""
    check_numbers(config)
    episodes = "files of episodes, or folders of runs, between commas"
    needed = {"model.path": "a path", "warm_start.episodes": episodes}
    _check_not_empty(flatten_config(config), needed)


def _check_given(values: dict[str, Any], evaluating: bool) -> None:
    """Raises InputError where a key is empty that a run with these choices needs."""
    sets = filter(is_eval_set, values)
    needed = dict.fromkeys(["model.path", *sets], "a path")
    if not evaluating:
        needed["data.answers"] = "a path"
    if values["retriever.kind"] == "http":
        needed["retriever.url"] = (
            "the address of a search server, such as http://127.0.0.1:8000/retrieve"
        )
    elif not values["retriever.index"] and not load.is_one(values["retriever.kind"]):
        needed["retriever.corpus"] = "a path"
    if values["retriever.kind"] in settings.VECTOR_KINDS:
        needed["retriever.encoder"] = "the Hugging Face folder of an encoder"
    if "openai" in (values["reward.metric"], values["eval.judge"]):
        needed["judge.url"] = "an address such as http://127.0.0.1:8000/v1"
        needed["judge.model"] = "its name on that server"
    _check_not_empty(values, needed)


def _check_not_empty(values: dict[str, Any], needed: dict[str, str]) -> None:
    for key, expected in needed.items():
        if not values[key]:
            raise InputError(f"config key {key} is empty; expected {expected}")


def check_numbers(config: ConfigDict) -> None:
    """Raises InputError for names and numbers that cannot work, alone or together."""
    values = flatten_config(config)
    check_each(values)
    _check_sizes(config, values)
    _check_search(config.retriever)
    _check_lora(config.lora)
    _check_export(config)
    _check_rules(config)


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
    if c.kind in settings.VECTOR_KINDS and c.top_k > settings.MAX_TOP_K:
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
