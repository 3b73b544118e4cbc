"""Experiment trackers: the numbers of metrics.jsonl, and samples of games, where a team looks.

Weights & Biases and trackio are optional packages with one interface. WANDB_MODE=offline needs no
account; `wandb sync` sends such a run later. A run that goes on is one run there too: its steps are
the axis, and steps that are played again have the same numbers.
"""

import importlib
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from ssp_jax.errors import InputError
from ssp_jax.runtime.command import one_line
from ssp_jax.workdir import as_read

ID_FILE = "tracker.id"  # in a workdir: the name of its run among others
GAMES = 3  # of a dump that are sent

_PACKAGES = ("wandb", "trackio")  # and the config keys of section log that name a project


class PackageRun:
    """A run of one of the packages, a Tracker of the logger.

    After its first failure it is silent, and the run goes on.
    """

    def __init__(self, module: Any, run: Any, failures: tuple[type[Exception], ...]) -> None:
        self._module = module
        self._run = run
        self._failures = failures
        self._failed = False
        self._is_trackio = module.__name__ == "trackio"

    def log(self, step: int, metrics: Mapping[str, float]) -> str:
        """Sends the numbers of a step. A sentence where that fails."""
        return self._try(lambda: self._send(step, dict(metrics)))

    def games(self, step: int, records: Sequence[Mapping[str, Any]]) -> str:
        """Sends some games of a step as text. A sentence where that fails."""
        text = "\n\n---\n\n".join(map(game_text, records[:GAMES]))
        return self._try(lambda: self._send(step, {"games": self._text(text)}))

    def close(self) -> str:
        """Sends what is left."""
        return self._try(self._run.finish)

    def _send(self, step: int, values: dict[str, Any]) -> None:
        """wandb's own steps only grow, and a resumed run plays some again: its axis is a number of
        ours. trackio has that name for itself.
        """
        if self._is_trackio:
            self._run.log(values, step=step)
        else:
            self._run.log({"step": step, **values})

    def _text(self, text: str) -> Any:
        if self._is_trackio:
            return self._module.Markdown(f"```\n{text}\n```")
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        return self._module.Html(f"<pre>{escaped}</pre>", inject=False)

    def _try(self, send: Callable[[], Any]) -> str:
        if self._failed:
            return ""
        try:
            send()
        except self._failures as error:
            self._failed = True
            return f"{self._module.__name__} gets no more of this run: {one_line(error)}"
        return ""


def game_text(record: Mapping[str, Any]) -> str:
    """A game of a dump, for people: what was asked, what became of it, and who wrote what."""
    question = record["question"]
    asked = question["text"] if question else f"none ({record['fault']})"
    lines = [f"answer: {record['answer']}", f"question: {asked}"]
    scores = [attempt["score"] for attempt in record["attempts"]]
    lines.append(f"scores: {scores}, reward of the proposer: {record['proposer_reward']}")
    players = {"proposer": record["proposer"]}
    if record["attempts"]:
        players["solver"] = record["attempts"][0]
    for role, episode in players.items():
        if episode:
            turns = "".join(turn["text"] for turn in episode["turns"])
            lines.append(f"\n[{role}, ended by {episode['stop_reason']}]\n{turns.strip()}")
    return "\n".join(lines)


def open_trackers(config: ConfigDict, workdir: Path) -> list[PackageRun]:
    """The trackers that the config names, each with its run begun or gone on with.

    Raises InputError where a package is missing or refuses.
    """
    starts = {"wandb": _start_wandb, "trackio": _start_trackio}
    found = []
    for name in _PACKAGES:
        if project := config.log[name]:
            module = _package(name)
            failures = _failures(name, module)
            try:
                run = starts[name](module, project, config, workdir)
            except failures as error:
                raise InputError(
                    f"config key log.{name}={project}: {name} refuses it ({one_line(error)})"
                ) from None
            found.append(PackageRun(module, run, failures))
    return found


def check_installed(config: ConfigDict) -> None:
    """Raises InputError where a tracker is named whose package is missing."""
    for name in _PACKAGES:
        if config.log[name]:
            _package(name)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise InputError(
            f"config key log.{name} needs the package {name}; pip install '.[{name}]'"
        ) from None


def _failures(name: str, module: Any) -> tuple[type[Exception], ...]:
    """What a package raises where it cannot send."""
    return (module.Error, OSError) if name == "wandb" else (RuntimeError, ValueError, OSError)


def _start_wandb(wandb: Any, project: str, config: ConfigDict, workdir: Path) -> Any:
    entity, _, own = project.rpartition("/")
    run = wandb.init(
        entity=entity or None,
        project=own,
        id=_id(workdir),
        name=workdir.name,
        dir=str(workdir),
        config=as_read(config),
        resume="allow",
        settings=wandb.Settings(console="off", silent=True),
    )
    run.define_metric("*", step_metric="step")
    return run


def _start_trackio(trackio: Any, project: str, config: ConfigDict, workdir: Path) -> Any:
    return trackio.init(
        project,
        name=f"{workdir.name}-{_id(workdir)}",
        config=as_read(config),
        resume="allow",
        embed=False,
    )


def _id(workdir: Path) -> str:
    """The name of a workdir's run, which stays the same when it goes on."""
    path = workdir / ID_FILE
    if not path.exists():
        path.write_text(secrets.token_hex(6), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
