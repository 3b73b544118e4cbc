"""What a run ends with: where its report lies, how to ask its model, how to use one's own data."""

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from ssp_jax.assembly.search import index_folder
from ssp_jax.config.derived import export_kind
from ssp_jax.config.files import load_config
from ssp_jax.config.keys import FREE_SECTION, flatten_config
from ssp_jax.errors import InputError, masked, sentence
from ssp_jax.model import hf_save
from ssp_jax.report import page
from ssp_jax.retriever import settings
from ssp_jax.runtime.logger import Logger


def show(config: ConfigDict, workdir: Path, logger: Logger) -> None:
    """The last lines of a run."""
    write_report(workdir, logger)
    logger.say(f"ask the model: {_how_to_ask(config, workdir)}")
    logger.say(f"your own passages, as docs/own_data.md says: {_own_passages(config)}")


def write_report(workdir: Path, logger: Logger) -> None:
    """Writes the report and says where it lies. Without one the run is no worse."""
    out = workdir / page.FILE
    try:
        with logger.phase("reporting"):
            page.write(workdir, out)
    except InputError as error:
        logger.say(f"report: none could be written ({sentence(error)})")
    else:
        logger.say(f"report: {out}, for a browser")


def to_play(config: ConfigDict, workdir: Path, file: str) -> str:
    """The command of self-play that starts from what a warm start in the workdir has exported.

    file: of the config, from which the keys of the command differ.
    """
    before = flatten_config(load_config(Path(file)))
    keys = flatten_config(config)
    changed = {key: value for key, value in keys.items() if value != before.get(key)}
    start = "model.adapter" if export_kind(config) == "adapter" else "model.path"
    changed[start] = str(workdir / hf_save.FOLDER)
    flags = [f"--config={file}", f"--workdir={workdir}_play"]
    for key, value in changed.items():
        if not key.startswith("warm_start."):
            flags.append(f"--config.{key}={value}")
    return " ".join([_python(), "-m ssp_jax.main", *map(shlex.quote, flags)])


def _own_passages(config: ConfigDict) -> str:
    """The commands of a run like this one on passages of the user's own."""
    take = f"{_python()} -m ssp_jax.answers --corpus=FOLDER --out=answers.jsonl"
    keys = ["retriever.corpus=FOLDER", "data.answers=answers.jsonl"]
    keys += [f"{FREE_SECTION}.{name}=" for name in config.data.eval_sets]
    flags = " ".join(f"--config.{key}" for key in keys)
    return f"{take}, and then the same command with another --workdir and {flags}"


def _how_to_ask(config: ConfigDict, workdir: Path) -> str:
    kind = export_kind(config)
    if kind == "none":
        return f"{_python()} -m ssp_jax.export {shlex.quote(str(workdir))} exports it"
    return to_ask(config, str(workdir), workdir / hf_save.FOLDER, kind)


def to_ask(config: ConfigDict, workdir: str, export: Path, kind: str) -> str:
    """The command that asks what was trained, and exported to a folder as a model or adapter.

    The form of its prompts stands in the folder.
    """
    flags = _flags(config, workdir, export, kind)
    return " ".join([_python(), "-m ssp_jax.generate", *map(shlex.quote, flags)])


def _flags(config: ConfigDict, workdir: str, export: Path, kind: str) -> Iterator[str]:
    if kind == "adapter":
        yield f"--model={masked(config.model.path)}"
        yield f"--adapter={export}"
    else:
        yield f"--model={export}"
    if config.retriever.kind in settings.INDEX_KINDS:
        yield f"--index={index_folder(config.retriever, workdir)}"
    if config.retriever.kind in settings.VECTOR_KINDS:
        yield f"--kind={config.retriever.kind}"
        yield f"--encoder={config.retriever.encoder}"


def _python() -> str:
    """How a shell in this folder calls this interpreter."""
    if shutil.which("python") == sys.executable:
        return "python"
    executable = Path(sys.executable)
    inside = executable.is_relative_to(Path.cwd())
    return shlex.quote(str(executable.relative_to(Path.cwd()) if inside else executable))
