"""The command of a warm start: what it cannot use is one sentence, before anything is compiled."""

import pytest

from ssp_jax import main
from ssp_jax.errors import InputError
from ssp_jax.warm_start import __main__ as command
from tests.warm_start.test_run import run, scripted


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    return scripted(tmp_path_factory.mktemp("games"))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"warm_start__episodes": ""}, "config key warm_start.episodes is empty; expected files"),
        ({"warm_start__keep": "some"}, "warm_start.keep is 'some'; expected one of right, all"),
        ({"warm_start__held_out": 1.0}, "warm_start.held_out is 1.0; expected less than 1"),
        (
            {"learner__row_tokens": 256, "limits__response_tokens": 128},
            "tokens; expected at most learner.row_tokens = 256",
        ),
    ],
)
def test_what_it_cannot_use_is_one_sentence(episodes, tmp_path, changes, says):
    workdir = tmp_path / "run"
    with pytest.raises(InputError) as raised:
        run(workdir, episodes, **changes)
    assert says in str(raised.value)
    assert not workdir.exists()


def test_the_command_is_a_mode_of_main(capsys):
    flags = ["--config=configs/tiny.py", "--model=M", "--episodes=E", "--config.steps=3"]
    assert command.main(flags) == 2
    assert "flag --out is missing; expected a folder" in capsys.readouterr().err
    given, _ = main.parse(command.translated([*flags, "--out=O"]))
    assert (given.mode, given.workdir, given.config.model.path) == ("warm_start", "O", "M")
    assert given.config.warm_start.episodes == "E" and given.config.steps == 3
