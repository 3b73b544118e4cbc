"""What a run ends with: where its report lies, how to ask its model, how to use one's own data."""

import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from ml_collections import ConfigDict

from ssp_jax.assemble import index_folder
from ssp_jax.config import default_values, export_kind
from ssp_jax.errors import InputError, masked, sentence
from ssp_jax.model import hf_save
from ssp_jax.report import page
from ssp_jax.retriever import settings
from ssp_jax.runtime.logger import Logger


def show(config: ConfigDict, workdir: Path, logger: Logger) -> None:
    """The last lines of a run."""
    write_report(workdir, logger)
    logger.say(f"ask the model: {_to_ask(config, workdir)}")
    logger.say(
        "your own data, in the formats of docs/own_data.md: the same command with another "
        "--workdir and --config.retriever.corpus=PASSAGES.jsonl --config.data.answers=ANSWERS.txt"
    )


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


def _to_ask(config: ConfigDict, workdir: Path) -> str:
    """The command that asks what was trained."""
    if export_kind(config) == "none":
        return "the same command with --config.checkpoint.export=auto exports it"
    return " ".join([_python(), "-m ssp_jax.generate", *map(shlex.quote, _flags(config, workdir))])


def _flags(config: ConfigDict, workdir: Path) -> Iterator[str]:
    export = workdir / hf_save.FOLDER
    if export_kind(config) == "adapter":
        yield f"--model={masked(config.model.path)}"
        yield f"--adapter={export}"
    else:
        yield f"--model={export}"
    if config.retriever.kind != "http":
        yield f"--index={index_folder(config.retriever, str(workdir))}"
    if config.retriever.kind in settings.KINDS:
        yield f"--kind={config.retriever.kind}"
        yield f"--encoder={config.retriever.encoder}"
    defaults = default_values()
    for name in ("style", "template"):
        if config.prompt[name] != defaults[f"prompt.{name}"]:
            yield f"--{name}={config.prompt[name]}"
    if config.prompt.worked_example:
        yield "--worked_example"


def _python() -> str:
    """How a shell in this folder calls this interpreter."""
    if shutil.which("python") == sys.executable:
        return "python"
    executable = Path(sys.executable)
    inside = executable.is_relative_to(Path.cwd())
    return shlex.quote(str(executable.relative_to(Path.cwd()) if inside else executable))
