"""The commands: one list, one way to parse, help without JAX, and keys that are found by a word."""

import importlib.util
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from configs import default
from ssp_jax import __main__ as commands
from ssp_jax.config.help import find_keys
from ssp_jax.config.keys import flatten_config
from ssp_jax.errors import InputError
from tests.conftest import ROOT

# Prints the help of each command, and then which of them have loaded JAX.
HELP_OF_ALL = """
import sys
from ssp_jax import __main__ as commands
loaded = []
for name in (*commands.COMMANDS, "--help", "--help=kl_coef"):
    try:
        commands.main([name] if name.startswith("-") else [name, "--help"])
    except SystemExit as end:
        assert end.code == 0
    loaded += [name] if "jax" in sys.modules else []
print("loaded:", loaded)
"""


def test_help_of_a_command_does_not_load_jax() -> None:
    done = subprocess.run([sys.executable, "-c", HELP_OF_ALL], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.endswith("loaded: []\n")
    for name in commands.COMMANDS:
        assert f"usage: python -m ssp_jax {name} [-h" in done.stdout
    for flag in (
        "--config FILE",
        "--topology CHIPS",
        "--worked_examples N",
        "--corpus",
        "--games N",
    ):
        assert flag in done.stdout


def test_without_a_command_all_are_listed_with_a_line_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert commands.main([], prog="ssp-jax") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, command in commands.COMMANDS.items():
        (line,) = (line for line in lines if line.startswith(f"  ssp-jax {name} "))
        assert line.endswith(command.does) and len(line) <= 80


def test_a_command_that_is_not_there_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.main(["trian", "--config=configs/tiny.py"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "no command 'trian'; expected one of train, eval" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train"], "flag --config is missing"),
        (["eval", "--mode=other"], "--mode: invalid choice: 'other'"),
        (["generate"], "flag --model is missing"),
        (["generate", "--model=x", "--max_token=3"], "flag --max_token; the nearest is --max_tok"),
        (["report", "nowhere"], "nowhere: expected a run folder"),
        (["plan", "--config=configs/tiny.py", "--tokens=0"], "flag --tokens is 0; expected more"),
        (["index", "--corpus=none.jsonl", "--out=none"], "none.jsonl: expected a readable corpus"),
        (["search", "--index=none"], "required: query; --help lists the flags of "),
        (["export", "nowhere"], "nowhere: expected a run folder, found no config.json"),
        (["audit", "--answers=none.jsonl", "--games=3"], "unknown flag --games; --help lists"),
    ],
)
def test_a_command_is_the_module_of_that_name(
    arguments: list[str],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert commands.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and says in said
    assert not list(ROOT.glob("none*"))


def test_an_installation_has_the_console_command() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["ssp-jax"].partition(":")
    assert getattr(importlib.import_module(module), function) is commands.run


def test_the_module_forms_are_the_same_commands() -> None:
    """python -m ssp_jax.NAME has a file for each of them."""
    for command in commands.COMMANDS.values():
        spec = importlib.util.find_spec(command.module)
        assert spec is not None and spec.origin is not None
        assert 'if __name__ == "__main__":' in Path(spec.origin).read_text()
    done = subprocess.run([sys.executable, "-m", "ssp_jax"], capture_output=True, text=True)
    assert done.stdout == commands.listing("python -m ssp_jax") + "\n"


def test_every_key_is_found_by_its_name_with_its_default() -> None:
    for name, value in flatten_config(default.get_config()).items():
        text = find_keys(name)
        assert f"--config.{name}=" in text
        follows_another = name == "limits.turn_tokens"
        assert str(value) in text or value == "" or follows_another


def test_a_word_finds_keys_by_their_comments_with_what_holds_for_their_section() -> None:
    text = find_keys("DAPO")
    assert "--config.learner.drop_no_advantage=False\n    Leave out episodes" in text
    assert find_keys("limits.turns").startswith("limits: tokens, if not said otherwise")
    assert "--config.data.eval_sets" in find_keys("eval_sets")


def test_a_word_of_no_key_is_bad_input() -> None:
    with pytest.raises(InputError, match="no key has 'learning_rat[e]s' .*learner.learning_rate"):
        find_keys("learning_rates")
    with pytest.raises(InputError, match="none is spelt alike"):
        find_keys("xyzzy")
