"""The model card of an export: README.md, from the scores and the config of its run.

It has no dates and no times: the same weights of the same run have the same card. Without JAX.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssp_jax.config.keys import PATHS, default_values, flatten_config
from ssp_jax.errors import masked
from ssp_jax.evaluation.scores import other_rules
from ssp_jax.export import form
from ssp_jax.game import prompts
from ssp_jax.game.examples import example_sets
from ssp_jax.model import hf_files
from ssp_jax.runtime import figures

FILE = "README.md"
# What a run is, by its mode (command_line.MODES).
TRAINING = {
    "train": "Search Self-Play ([paper](https://arxiv.org/abs/2510.18821)): one model writes "
    "questions around given answers and solves them with a search tool, and both roles are trained",
    "warm_start": "supervised training on episodes of a search game",
}
# Keys that say where a run was and how it was watched, and not what it learned.
_ELSEWHERE = ("data.eval_sets.", "judge.", "mesh.", "engine.", "checkpoint.", "log.", "steps")


def text(config: ConfigDict, workdir: Path, step: int, kind: str, mode: str) -> str:
    """The card of the weights after a step.

    kind: model or adapter. mode: of the run, a key of TRAINING.
    """
    sections = [
        _front_matter(config, kind),
        _head(config, step, kind, TRAINING[mode]),
        _scores(workdir, step),
        _asking(config, kind),
        _training(config),
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(config: ConfigDict, kind: str) -> str:
    """What the Hugging Face hub reads. A local folder is no base model there."""
    lines = [f"library_name: {'peft' if kind == 'adapter' else 'transformers'}"]
    lines.append("pipeline_tag: text-generation")
    if hf_files.is_hub_name(config.model.path):
        lines.append(f"base_model: {config.model.path}")
    lines += ["tags:", "- search-self-play", "- ssp_jax"]
    return "\n".join(["---", *lines, "---", ""])


def _head(config: ConfigDict, step: int, kind: str, training: str) -> str:
    base = masked(config.model.path)
    what = "A LoRA adapter" if kind == "adapter" else "A model"
    return (
        f"# A search agent, trained from {base}\n\n"
        f"{what} after {step} steps of {training}. It began as `{base}`, and was trained by "
        "ssp_jax.\n"
    )


def _scores(workdir: Path, step: int) -> str:
    """A table of each set: percent right, before and after where both were evaluated."""
    after = _evaluation(workdir, step)
    if after is None:
        return ""
    before = _evaluation(workdir, 0) if step else None
    gains = _gains(workdir, step)
    rules = other_rules(after["judge"])
    heads = ["set", f"right by {after['judge']}, %", "95 % interval"]
    heads += [f"{title}, %" for title in rules.values()] + ["questions"]
    if before:
        heads += ["before, %", "gain (95 % interval)"]
    lines = ["## Held-out questions", "", _row(heads), _row(["---"] * len(heads))]
    for name, row in after["sets"].items():
        ends = (figures.percent(row["right_low"]), figures.percent(row["right_high"]))
        cells = [name, figures.percent(row["right"]), figures.interval(*ends)]
        cells += [figures.percent(row[column]) for column in rules] + [str(row["n"])]
        if before:
            cells += _before(before["sets"].get(name), row, gains.get(name))
        lines.append(_row(cells))
    return "\n".join([*lines, ""])


def _before(before: Any, after: Any, gain: Any) -> list[str]:
    """Cells: the score before, and the gain; the latter's interval only the end of a run has."""
    if before is None:
        return ["", ""]
    difference = figures.difference(after["right"] - before["right"])
    if gain is not None:
        ends = (figures.difference(gain["gain_low"]), figures.difference(gain["gain_high"]))
        difference += f" ({figures.interval(*ends)})"
    return [figures.percent(before["right"]), difference]


def _evaluation(workdir: Path, step: int) -> Any:
    """The document of evaluation.evaluate; None where the step was not evaluated."""
    path = workdir / "eval" / f"step_{step:06d}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def _gains(workdir: Path, step: int) -> Any:
    """Gains by sets, of the end of the run where that is this step."""
    path = workdir / "eval" / "gain.json"
    if not path.is_file():
        return {}
    document = json.loads(path.read_text(encoding="utf-8"))
    return document["sets"] if document["after"] == step else {}


def _asking(config: ConfigDict, kind: str) -> str:
    given = "--model=BASE --adapter=THIS_FOLDER" if kind == "adapter" else "--model=THIS_FOLDER"
    p = config.prompt
    style = prompts.STYLES[p.style]
    messages = prompts.solver_messages(style, "QUESTION", example_sets(p.worked_examples)[0])
    shown = json.dumps(messages, indent=2, ensure_ascii=False)
    return (
        "## Asking it\n\n"
        f"```\npython -m ssp_jax.generate {given} --index=INDEX\n```\n\n"
        f"`{form.FILE}` says in which form it was trained, and that command reads it: style "
        f"`{p.style}`, template `{p.template}`, up to "
        f"{config.limits.searches} searches of {config.retriever.top_k} passages. Elsewhere send "
        f"it these messages, stop at `{prompts.SEARCH_STOP}` and `{prompts.ANSWER_STOP}`, and "
        "append what a search found in the form "
        f"{json.dumps(style.observation_text.format(documents='PASSAGES'), ensure_ascii=False)}:\n"
        f"\n```json\n{shown}\n```\n"
    )


def _training(config: ConfigDict) -> str:
    """The keys in which the run differs from configs/default.py, without places of its machine."""
    lines = ["## Training", "", "Config keys that differ from the defaults.", ""]
    lines += [_row(["key", "value"]), _row(["---", "---"])]
    lines += [_row([f"`{key}`", f"`{value}`"]) for key, value in _changed_keys(config)]
    return "\n".join([*lines, ""])


def _changed_keys(config: ConfigDict) -> Iterator[tuple[str, Any]]:
    defaults = default_values()
    for key, value in flatten_config(config).items():
        is_place = key in PATHS or key.endswith(".url") or key.startswith(_ELSEWHERE)
        if not is_place and value != defaults[key]:
            yield key, value


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
