"""Under what conditions scores were made: scores of other conditions are not comparable."""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from ssp_jax.errors import masked
from ssp_jax.game.rewards import JUDGES
from ssp_jax.retriever import settings
from ssp_jax.runtime import processes
from ssp_jax.user_code import load

# Sections that bound what a solver may do and say what it is shown.
_SECTIONS = ("limits", "prompt")
_PAPER = (
    "the paper searched Wikipedia 2018 by E5-base-v2, 3 passages a search, and was judged by "
    "Qwen2.5-32B-Instruct"
)


def of(config: ConfigDict, passages: int, searched: str, template: str | None) -> dict[str, Any]:
    """What a run's evaluations have in common, for their documents.

    passages: in the index. searched: Searcher.source, which has the digest of the corpus. template:
    the tokenizer's own.
    """
    r = config.retriever
    found: dict[str, Any] = {"retriever": r.kind, "top_k": r.top_k, "searched": searched}
    if r.kind == "http":
        found["server"] = masked(r.url)
    elif not load.is_one(r.kind):
        found["passages"] = passages
    if r.kind in settings.VECTOR_KINDS:
        found["encoder"] = r.encoder
    found["judge"] = config.eval.judge
    if config.eval.judge == "openai":
        found["judge_model"] = config.judge.model
    if config.eval.judge == "policy":
        found["judge_model"] = config.model.path
    if config.eval.judge in JUDGES:
        found["judge.max_tokens"] = config.judge.max_tokens
    found["temperature"] = config.sampling.eval_temperature
    for section in _SECTIONS:
        found |= {f"{section}.{name}": value for name, value in config[section].items()}
    if config.prompt.template == "chat":
        found["chat_template"] = processes.digest(template)
    return found


def beside_the_paper(found: Mapping[str, Any]) -> str:
    """A sentence on the retriever and the judge of both sides of a table. found: by `of`."""
    search = found["retriever"]
    if "encoder" in found:
        search += f" ({found['encoder']})"
    where = found.get("server", "")
    if "passages" in found:  # a search of the user's own does not tell
        where = f"{found['passages']:,} passages"
    if where:
        search += f" of {where}"
    judge = found["judge"]
    if "judge_model" in found:
        judge += f" ({found['judge_model']})"
    ours = f"these scores: {search}, {found['top_k']} a search, judged by {judge}"
    return f"{ours}; {_PAPER}"
