from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, RunMain
from ml_collections import ConfigDict

from configs import default
from ssp_jax.config import FREE_SECTION, flatten_config, load_config, nearest, parse_command_line
from ssp_jax.data import InputError

CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
DEFAULT = "--config=configs/default.py"


def parse(*arguments: str) -> tuple[ConfigDict, str]:
    return parse_command_line(["main.py", *arguments])


def config_file(folder: Path, *statements: str) -> Path:
    path = folder / "mine.py"
    body = "".join(f"    {statement}\n" for statement in ("c = default.get_config()", *statements, "return c"))
    path.write_text(f"from configs import default\n\n\ndef get_config():\n{body}")
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_exactly_the_keys_of_default(name: str) -> None:
    config, workdir = parse(f"--config=configs/{name}")
    assert workdir == f"runs/{name.removesuffix('.py')}" and config.is_locked
    expected = flatten_config(default.get_config())
    own = {key: value for key, value in flatten_config(config).items() if not key.startswith(FREE_SECTION)}
    assert {key: type(value) for key, value in own.items()} == {key: type(value) for key, value in expected.items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_states_only_differences(name: str) -> None:
    """STYLE: a reader of a config sees what is special about it, and nothing else."""
    source, expected = (ROOT / "configs" / name).read_text(), flatten_config(default.get_config())
    config, _ = parse(f"--config=configs/{name}")
    for key, value in flatten_config(config).items():
        stated = f"c.{key} = " in source
        assert name == "default.py" or not stated or value != expected.get(key), f"{key} repeats the default"


def test_overrides_keep_their_types() -> None:
    config, workdir = parse(
        DEFAULT,
        "--workdir=elsewhere",
        "--config.steps=3",
        "--config.learner.learning_rate",
        "1",
        "--noconfig.eval.before",
        "--config.engine.cache_buckets=(32, 64)",
        "--config.model.path=a folder",
        f"--config.{FREE_SECTION}.hotpot=hotpot.jsonl",
    )
    changed = {
        "steps": 3,
        "learner.learning_rate": 1.0,
        "eval.before": False,
        "engine.cache_buckets": (32, 64),
        "model.path": "a folder",
        f"{FREE_SECTION}.hotpot": "hotpot.jsonl",
    }
    assert flatten_config(config) == flatten_config(default.get_config()) | changed
    assert workdir == "elsewhere" and isinstance(config.learner.learning_rate, float) and config.is_locked


def test_a_config_file_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file(tmp_path, "c.steps = 5")
    monkeypatch.chdir(tmp_path)
    assert parse("--config=mine.py")[0].steps == 5
    assert parse("--config", "configs/default.py")[0].steps == default.get_config().steps


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((), "flag --config is missing"),
        (("--config=configs/defalt.py",), "the nearest is configs/default.py"),
        ((DEFAULT, "--config.lerner.rows=1"), "there is no key lerner.rows; the nearest is learner.rows"),
        ((DEFAULT, "--config.learner.x=1"), "there is no key learner.x; the nearest is learner."),
        ((DEFAULT, "--config.learning_rate=1"), "no key learning_rate; the nearest is learner.learning_rate"),
        ((DEFAULT, "--noconfig.eval.befor"), "there is no key eval.befor; the nearest is eval.before"),
        ((DEFAULT, "--config.learner=1"), "learner is a section; set one of its keys, such as learner."),
        ((DEFAULT, "--steps=1"), "unknown flag --steps; the nearest is --config.steps"),
        ((DEFAULT, "--workdri=x"), "unknown flag --workdri; the nearest is --workdir"),
        ((DEFAULT, "--config.steps=many"), "key steps must be int, such as 200, and not 'many'"),
        ((DEFAULT, "--config.steps=2.5"), "key steps must be int, such as 200, and not '2.5'"),
        ((DEFAULT, "--config.eval.before=maybe"), "key eval.before must be bool, such as True, and not 'maybe'"),
        ((DEFAULT, "--config.learner.clip_low=x"), "key learner.clip_low must be float, such as 0.2, and not 'x'"),
        ((DEFAULT, "--config.engine.cache_buckets=(1, 'a')"), "must be tuple of int, such as (1024, 4096), and not"),
        ((DEFAULT, "--config.steps"), "Missing value for flag --config.steps"),
        ((DEFAULT, "stray"), "unexpected argument 'stray'"),
    ],
)
def test_a_wrong_command_line_is_one_sentence(arguments: tuple[str, ...], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(*arguments)
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("statement", "sentence"),
    [
        ("c.lerner.rows = 1", "mine.py line 6: there is no key lerner.rows; the nearest is learner.rows"),
        ("c.learner.row = 1", "mine.py line 6: there is no key learner.row; the nearest is learner.rows"),
        ("c.update({'lerner': {}})", "mine.py line 6: there is no key lerner; the nearest is learner."),
        ("c.steps = 'many'  # as it takes", "mine.py line 6: key steps must be int, such as 200, and not 'many'"),
        ("c.learner = 3", "mine.py line 6: learner is a section"),
        ("c.steps = True", "mine.py: key steps must be int, such as 200, and not True"),
        ("c.engine.cache_buckets = ('a',)", "mine.py: key engine.cache_buckets must be tuple of int"),
        ("c.unlock(); c.step = 1", "mine.py: there is no key step; the nearest is steps"),
        ("c.unlock(); del c.steps", "mine.py: key steps is missing"),
        ("c.steps = unknown", "mine.py line 6: NameError"),
        ("c.steps = (", "mine.py line 6: '(' was never closed"),
        ("return None", "mine.py: get_config() gives NoneType"),
    ],
)
def test_a_wrong_config_file_is_one_sentence(tmp_path: Path, statement: str, sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        load_config(config_file(tmp_path, statement))
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_without_get_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=r"empty.py: it has no get_config\(\)"):
        load_config(tmp_path / "empty.py")


def test_evaluation_sets_are_free_names_of_files(tmp_path: Path) -> None:
    new: Any = load_config(config_file(tmp_path, "c.unlock()", "c.data.eval_sets = {'mine': 'mine.jsonl'}"))
    assert new.data.eval_sets.mine == "mine.jsonl" and new.is_locked
    with pytest.raises(InputError, match="key data.eval_sets.mine must be str"):
        load_config(config_file(tmp_path, "c.unlock()", "c.data.eval_sets = {'mine': 3}"))


def test_nearest_looks_at_section_and_last_part() -> None:
    names = ["learner.rows", "retriever.index", "model.path", "learner.learning_rate"]
    assert nearest("lerner.x", names) == "learner.rows"
    assert nearest("model.learning_rate", names) == "learner.learning_rate"
    assert nearest("path", names) == "model.path"


@pytest.mark.parametrize(
    ("override", "key"), [("--config.lerner.rows=1", "learner.rows"), ("--config.learner.rows=many", "learner.rows")]
)
def test_main_ends_with_code_2_and_one_line(run_main: RunMain, override: str, key: str) -> None:
    done = run_main(DEFAULT, override)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("ssp_jax: ") and key in done.stderr
