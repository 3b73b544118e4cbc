"""A model is asked in the form in which it was trained, unless its user says otherwise."""

import argparse
from pathlib import Path

import pytest

from ssp_jax.config.command_line import parse_command_line
from ssp_jax.errors import InputError
from ssp_jax.export import form
from ssp_jax.generate.__main__ import parse_flags
from tests.conftest import ROOT


def trained(folder: Path, *overrides: str) -> Path:
    """A folder with the file of a run of the tiny config."""
    keys = [f"--config.{override}" for override in overrides]
    config = parse_command_line([f"--config={ROOT}/configs/tiny.py", *keys]).config
    folder.mkdir()
    (folder / form.FILE).write_text(form.text(config, 40))
    return folder


def filled(*arguments: str) -> argparse.Namespace:
    flags = parse_flags(arguments)
    form.fill(flags)
    return flags


def test_flags_that_are_left_out_are_those_of_the_training(tmp_path: Path) -> None:
    changes = (
        "prompt.template=raw_chatml",
        "prompt.worked_examples=2",
        "prompt.tell_repeats=True",
        "retriever.top_k=2",
    )
    model = trained(tmp_path / "model", *changes)
    flags = filled(f"--model={model}", "--index=index")
    assert (flags.style, flags.template, flags.worked_examples) == ("brief", "raw_chatml", 2)
    assert (flags.top_k, flags.max_searches, flags.max_tokens) == (2, 4, 320)
    assert (flags.turn_tokens, flags.observation_tokens, flags.tell_repeats) == (40, 120, True)


def test_flags_that_are_given_win(tmp_path: Path) -> None:
    given = ("--style=search_r1", "--top_k=1", "--max_tokens=99", "--index=index")
    flags = filled(f"--model={trained(tmp_path / 'model')}", *given)
    assert (flags.style, flags.top_k, flags.max_tokens) == ("search_r1", 1, 99)


def test_without_searches_the_limits_of_the_training_do_not_hold(tmp_path: Path) -> None:
    flags = filled(f"--model={trained(tmp_path / 'model')}")
    assert (flags.style, flags.max_tokens, flags.turn_tokens) == ("brief", 1024, 1024)


def test_any_other_model_is_asked_as_before(tmp_path: Path) -> None:
    flags = filled(f"--model={tmp_path}", "--index=index")
    assert (flags.style, flags.template, flags.worked_examples) == ("search_r1", "chat", 0)
    assert (flags.top_k, flags.max_searches, flags.max_tokens) == (3, 10, 1024)
    assert (flags.turn_tokens, flags.observation_tokens) == (1024, 2048)


def test_an_adapter_has_the_form_of_its_own_training(tmp_path: Path) -> None:
    base = trained(tmp_path / "base", "prompt.style=search_r1")
    adapter = trained(tmp_path / "adapter")
    assert filled(f"--model={base}", f"--adapter={adapter}").style == "brief"
    (adapter / form.FILE).unlink()
    assert filled(f"--model={base}", f"--adapter={adapter}").style == "search_r1"


def test_keys_of_another_version_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / form.FILE).write_text(
        '{"config": {"prompt.mood": "calm", "prompt.style": "brief"}}'
    )
    assert form.read(str(tmp_path)) == {"prompt.style": "brief"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "ssp_jax_training.json is not valid JSON"),
        ('{"config": []}', 'key "config" expected an object'),
        ('{"config": {"prompt.style": 3}}', '"prompt.style" expected str, found 3'),
        ('{"config": {"prompt.style": "x"}}', "expected one of search_r1, .* found 'x'"),
        ('{"config": {"limits.searches": 0}}', '"limits.searches" is 0; expected more than 0'),
    ],
)
def test_a_form_that_no_run_has_is_refused(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / form.FILE).write_text(content)
    with pytest.raises(InputError, match=says):
        form.read(str(tmp_path))
