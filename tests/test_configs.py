import functools
import math
import re
import runpy
import shlex
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from configs import default
from ssp_jax.config.checks import check_numbers, check_values
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.config.files import load_config
from ssp_jax.config.keys import FREE_SECTION, flatten_config
from ssp_jax.config.values import BOUNDS
from ssp_jax.errors import InputError
from ssp_jax.model import decoder
from ssp_jax.plan import planner as plan
from ssp_jax.plan import roofline
from ssp_jax.plan.hardware import GIB, parse_topology
from ssp_jax.runtime.command import nearest
from tests.conftest import ROOT, RunMain


@dataclass(frozen=True)
class Shape:
    """From the model's published config.json."""

    params: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    width: int
    ffn: int


_7B = Shape(7_615_616_512, 28, 28, 4, 128, 3584, 18944)
_05B = Shape(494_032_768, 24, 14, 2, 64, 896, 4864)
_1P5B = Shape(1_543_714_304, 28, 12, 2, 128, 1536, 8960)
_3B = Shape(3_085_938_688, 36, 16, 2, 128, 2048, 11008)
SHAPES = {
    "llama3p1_8b": Shape(8_030_261_248, 32, 32, 8, 128, 4096, 14336),
    "paper_7b": _7B,
    "paper_7b_base": _7B,
    "own_data": _1P5B,
    "qwen0p5b": _05B,
    "qwen0p5b_16gb": _05B,
    "qwen14b": Shape(14_770_033_664, 48, 40, 8, 128, 5120, 13824),
    "qwen1p5b": _1P5B,
    "qwen1p5b_lora": _1P5B,
    "qwen32b": Shape(32_763_876_352, 64, 40, 8, 128, 5120, 27648),
    "qwen3_8b": Shape(8_190_735_360, 36, 32, 8, 128, 4096, 12288),
    "qwen3b": _3B,
    "qwen3b_lora": _3B,
    "qwen7b": _7B,
    "qwen7b_base": _7B,
    "qwen7b_lora": _7B,
    "r_search_7b": _7B,
    "search_r1_7b": _7B,
    "smollm2_135m": Shape(134_515_008, 30, 9, 3, 64, 576, 1536),
    "vital_0p5b": _05B,
    "zerosearch_7b": _7B,
}
LAPTOP = ("tiny", "tiny_lora", "vital_135m")  # for CPUs, so that no plan is made
CONFIGS = sorted(path.name for path in (ROOT / "configs").glob("*.py"))
DEFAULT = "--config=configs/default.py"
PLAN_PAGE = (ROOT / "docs" / "plan.md").read_text()


def parse(*arguments: str) -> tuple[ConfigDict, str]:
    found = parse_command_line(arguments)
    return found.config, found.workdir


def config_file(folder: Path, *statements: str) -> Path:
    path = folder / "mine.py"
    body = "".join(
        f"    {statement}\n" for statement in ("c = default.get_config()", *statements, "return c")
    )
    path.write_text(f"from configs import default\n\n\ndef get_config():\n{body}")
    return path


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_has_exactly_the_keys_of_default(name: str) -> None:
    config, workdir = parse(f"--config=configs/{name}")
    assert workdir == f"runs/{name.removesuffix('.py')}" and config.is_locked
    expected = flatten_config(default.get_config())
    own = {
        key: value
        for key, value in flatten_config(config).items()
        if not key.startswith(FREE_SECTION)
    }
    assert {key: type(value) for key, value in own.items()} == {
        key: type(value) for key, value in expected.items()
    }


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_states_only_differences(name: str) -> None:
    """STYLE: a reader of a config sees what is special about it, and nothing else."""
    source = (ROOT / "configs" / name).read_text()
    base = re.search(r"from configs import (\w+)", source)
    if base is None:
        assert name == "default.py"
        return
    expected = flatten_config(parse(f"--config=configs/{base[1]}.py")[0])
    for key, value in flatten_config(parse(f"--config=configs/{name}")[0]).items():
        assert f"c.{key} = " not in source or value != expected.get(key), f"{key} repeats {base[1]}"


def contract(name: str) -> dict[str, str]:
    """The named lines of a config's docstring."""
    text = str(runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["__doc__"])
    return dict(
        re.findall(r"^(command|hardware|memory|time|score) +(.+)$", text, flags=re.MULTILINE)
    )


def test_every_config_has_a_shape_here() -> None:
    names = {name.removesuffix(".py") for name in CONFIGS}
    assert set(SHAPES) == names - {"default", *LAPTOP, "__init__"}


@pytest.mark.parametrize("name", [*SHAPES, *LAPTOP])
def test_a_config_states_command_hardware_memory_time_and_score(name: str) -> None:
    lines = contract(name)
    assert set(lines) == {"command", "hardware", "memory", "time", "score"}
    command = lines["command"].rpartition("python -m ssp_jax.main ")[2].split()
    assert f"--config=configs/{name}.py" in command
    assert parse(*command)[0].model.path


def memory(name: str) -> list[tuple[str, int, int, int, str, list[str]]]:
    """Each hardware of a docstring: topology, GiB while playing, updating and of a device, their
    source, and keys.
    """
    text = str(runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["__doc__"])
    lines = text[text.index("memory") : text.index("\ntime")]
    found = re.findall(
        r"(\S+:\S+) +(\d+) GiB playing, (\d+) updating of (\d+), (from shapes|compiled)"
        r"(?:; with((?:\s+--\S+)+))?",
        lines,
    )
    return [
        (topology, int(a), int(b), int(c), source, keys.split())
        for topology, a, b, c, source, keys in found
    ]


@pytest.mark.parametrize("name", SHAPES)
def test_a_config_fits_its_hardware_as_its_docstring_says(name: str) -> None:
    """What plan says from shapes is what is written, and fits; what was compiled is near it."""
    shape = SHAPES[name]
    hardware = contract(name)["hardware"]
    for topology, playing, updating, hbm, source, keys in memory(name):
        config = parse(f"--config=configs/{name}.py", *keys)[0]
        check_values(config)
        slice_ = parse_topology(topology)
        model = plan.read_model(config.model.path)
        sizes = (
            model.num_layers,
            model.num_heads,
            model.num_kv_heads,
            model.head_dim,
            model.embed_dim,
            model.mlp_dim,
        )
        assert sizes == (
            shape.layers,
            shape.heads,
            shape.kv_heads,
            shape.head,
            shape.width,
            shape.ffn,
        )
        assert topology in hardware or hardware.startswith(
            f"{slice_.chips} x {slice_.kind.upper()} "
        )
        made = plan.make_plan(
            config, model, slice_, roofline.workload(config, 3000, 1000), compiled=False
        )
        said = [round(size / GIB) for size in (made.play_peak, made.update_peak, slice_.device.hbm)]
        assert made.fits and hbm == said[2] and max(playing, updating) < slice_.device.hbm / GIB
        if source == "from shapes":
            assert [playing, updating] == said[:2]
        else:
            assert 0.5 < playing / said[0] < 2 and 0.5 < updating / said[1] < 2
    assert memory(name)


def test_the_page_of_plans_quotes_the_docstrings() -> None:
    number = r" (\d+) \|"
    row = rf"^\| (\w+) \| (\S+?:\w+)( \*)?(?:, (.*?))? \|{number * 4}"
    rows = re.findall(row, PLAN_PAGE, flags=re.MULTILINE)
    assert Counter(name for name, *_ in rows) == {"qwen7b": 3, "qwen14b": 3, "qwen32b": 3}
    for name, topology, star, keys, *numbers, slots in rows:
        overrides = [f"--config.{key}" for key in keys.replace("`", "").split()]
        (said,) = (line for line in memory(name) if line[0] == topology)
        assert list(said[1:4]) == [int(n) for n in numbers] and said[5] == overrides
        assert said[4] == ("compiled" if star else "from shapes")
        assert parse(f"--config=configs/{name}.py", *overrides)[0].engine.slots == int(slots)


def test_memory_by_hand() -> None:
    """7B on 8 devices: float32 parameters and moments, bfloat16 reference and copy, and 256 / 8
    whole slots; of a row, the products of all layers.
    """
    p = _7B.params
    token = 2 * _7B.layers * _7B.kv_heads * _7B.head * 2
    while_playing = (14 * p / 8 + 2 * p + 256 // 8 * 12288 * token) / GIB
    # The input, two sums, queries, outputs of attention, keys, values and two products of the MLP.
    heads = 2 * (_7B.heads + _7B.kv_heads) * _7B.head
    layer = 3 * _7B.width + heads + 2 * _7B.ffn
    while_updating = (18 * p / 8 + 12288 * _7B.layers * layer * 2) / GIB
    _, playing, updating, *_ = memory("qwen7b")[0]
    assert 1.0 < playing / while_playing < 1.5 and 1.0 < updating / while_updating < 1.5


@pytest.mark.parametrize("name", [name for name in CONFIGS if "_lora" in name])
def test_a_config_with_lora_has_a_rank_and_a_learning_rate_of_its_own(name: str) -> None:
    """Ten times that of full fine-tuning; more than rank 64 may collapse."""
    with_lora = parse(f"--config=configs/{name}")[0]
    full = parse(f"--config=configs/{name.replace('_lora', '')}")[0]
    assert 0 < with_lora.lora.rank <= 64 and full.lora.rank == 0
    assert 3 < with_lora.learner.learning_rate / full.learner.learning_rate < 11


def test_all_projections_of_a_layer_have_an_adapter_by_default() -> None:
    assert default.get_config().lora.targets == tuple(decoder.PROJECTIONS)


def test_a_7b_plays_128_episodes_of_3000_tokens_on_one_gpu_with_lora() -> None:
    """What is resident is the base, what is trained with its moments and copies, and the cache."""
    config = parse("--config=configs/qwen7b_lora.py")[0]
    model = plan.read_model(config.model.path)
    slice_ = parse_topology("gpu:h100x1")
    target = plan.make_target(config, model, slice_, compiled=False)
    layout = plan.memory.cache_layout(target)
    assert min(layout.rows[0], layout.tokens // 3000) >= 128
    assert layout.ends[-1] == config.engine.cache_tokens == 12288
    kept = plan.memory.persistent_bytes(target)
    adapter = kept["parameters"] + kept["optimizer"] + kept["reference"]
    needed = 2 * _7B.params + adapter + kept["key/value cache"]
    assert plan.memory.resident_bytes(target, kept, "decode") < 1.15 * needed


def test_the_papers_hyper_parameters() -> None:
    """arXiv 2510.18821v1, Table 4, sections 3.3, 4.1 and B; clip_high and the kind of KL are the
    reference script's.
    """
    c = parse("--config=configs/qwen7b.py")[0]
    assert (c.game.answers_per_step, c.game.group_size) == (256, 5)
    # Mini-batches of 128 answers, which the reference counts as 128 x 5 trajectories of either
    # role.
    assert (c.learner.solver_mini_batches, c.learner.proposer_mini_batches) == (256 * 5 // 640, 1)
    assert c.limits.turn_tokens == c.limits.response_tokens
    assert (c.learner.clip_dual, c.learner.kl_bound) == (3.0, 10.0)
    assert (c.learner.learning_rate, c.learner.warmup_steps) == (1e-6, 5)
    assert (c.limits.prompt_tokens, c.limits.response_tokens, c.limits.searches) == (4096, 8192, 10)
    assert (c.learner.kl_coef, c.learner.kl_type, c.learner.clip_high) == (0.01, "k3", 0.285)
    assert (c.sampling.temperature, c.sampling.eval_temperature) == (1.0, 0.0)
    assert (c.game.noise_documents, c.retriever.top_k, c.game.reset_interval) == (4, 3, 10)
    assert (c.game.rl_pair, c.game.batch_fill, c.reward.proposer) == (
        "reinforce_grpo",
        "periodic_reset",
        "one_minus_mean",
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_no_turn_ends_before_the_response_does_unless_a_config_says_so(name: str) -> None:
    """The paper limits the response only, and a thinking model's turn may fill it; also a longer
    one.
    """
    source = (ROOT / "configs" / name.replace("tiny_lora", "tiny")).read_text()
    own = "c.limits.turn_tokens = " in source and name != "default.py"
    for response in ((), ("--config.limits.response_tokens=9999",)):
        limits = parse(f"--config=configs/{name}", *response)[0].limits
        assert (limits.turn_tokens == limits.response_tokens) != own
    limits = parse(f"--config=configs/{name}", "--config.limits.turn_tokens=7")[0].limits
    assert limits.turn_tokens == 7 != limits.response_tokens


def test_the_cpu_command_of_vital_is_a_valid_one() -> None:
    text = str(runpy.run_path(str(ROOT / "configs" / "vital_0p5b.py"))["__doc__"])
    command = text[text.rindex("    python -m ssp_jax.main") :].replace("\\\n", " ").split("\n")[0]
    config, _ = parse(*shlex.split(command)[3:])
    check_values(config)
    assert (config.game.answers_per_step, config.game.group_size, config.steps) == (16, 4, 1)
    assert config.prompt.worked_examples == 2


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
    assert (
        workdir == "elsewhere"
        and isinstance(config.learner.learning_rate, float)
        and config.is_locked
    )


def test_a_config_file_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config_file(tmp_path, "c.steps = 5")
    monkeypatch.chdir(tmp_path)
    assert parse("--config=mine.py")[0].steps == 5
    assert parse("--config", "configs/default.py")[0].steps == default.get_config().steps


def numbers() -> dict[str, Any]:
    """Each key of the default that is a number, or has numbers."""

    def numeric(value: Any) -> bool:
        values = value if isinstance(value, tuple) else (value,)
        return value != () and not any(isinstance(x, bool | str) for x in values)

    return {
        key: value for key, value in flatten_config(default.get_config()).items() if numeric(value)
    }


@functools.cache
def tiny() -> ConfigDict:
    return load_config(ROOT / "configs" / "tiny.py")


def changed(**values: Any) -> ConfigDict:
    """The tiny config with some keys changed."""
    config = tiny().copy_and_resolve_references()
    with config.unlocked():
        config.update_from_flattened_dict(values)
    return config


def test_every_number_has_bounds_that_hold_its_default() -> None:
    assert set(BOUNDS) == set(numbers())
    check_numbers(load_config(ROOT / "configs" / "default.py"))


@pytest.mark.parametrize("key", BOUNDS)
def test_what_is_beyond_the_bounds_is_told_by_name(key: str) -> None:
    bounds = BOUNDS[key]
    example = numbers()[key]
    least = bounds.low if bounds.above else math.nextafter(bounds.low, -math.inf)
    most = bounds.high if bounds.below else math.nextafter(bounds.high, math.inf)
    whole = isinstance(example, int | tuple)
    wrong: list[float] = [math.floor(least), math.ceil(most), 10**400] if whole else [least, most]
    wrong += [] if whole else [math.nan, math.inf, -math.inf]
    for value in wrong:
        if bounds.zero and value == 0:
            continue
        given = (value,) if isinstance(example, tuple) else value
        with pytest.raises(InputError, match=rf"^config key {key} is .*; expected ") as caught:
            check_numbers(changed(**{key: given}))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 150


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"rules.min_chars": 99, "rules.max_chars": 98},
            "rules.min_chars is 99; expected at most 98, rules.max_chars",
        ),
        (
            {"rules.min_words": 99, "rules.max_chars": 98},
            "rules.min_words is 99; expected at most 49, the words",
        ),
        ({"rules.min_searches": 5}, "rules.min_searches is 5; expected at most 4, limits.searches"),
        (
            {"rules.min_searches": 4, "limits.turns": 4},
            "rules.min_searches is 4; expected at most 3, limits.turns - 1",
        ),
    ],
)
def test_rules_that_no_question_can_keep_are_told(values: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        check_numbers(changed(**values))


@pytest.mark.parametrize("name", ["2wikimultihopqa", "nq-open", "items", "Müsli", "_"])
def test_a_set_has_the_name_that_the_user_gives_it(name: str) -> None:
    for flag in (
        (f"--config.{FREE_SECTION}.{name}=a=b",),
        (f"-config.{FREE_SECTION}.{name}", "a=b"),
    ):
        config, _ = parse("--config=configs/tiny.py", *flag, "--config.steps=3")
        assert dict(config.data.eval_sets)[name] == "a=b" and len(config.data.eval_sets) == 3
        assert config.steps == 3 and config.is_locked


def test_an_empty_file_removes_a_set() -> None:
    remove = f"--config.{FREE_SECTION}.two_hop="
    assert list(parse("--config=configs/tiny.py", remove)[0].data.eval_sets) == ["one_hop"]
    config, _ = parse("--config=configs/tiny.py", remove, f"--config.{FREE_SECTION}.one_hop", "")
    assert not config.data.eval_sets and config.is_locked
    check_values(config)
    both = (remove, f"--config.{FREE_SECTION}.mine=a.jsonl")
    assert set(parse("--config=configs/tiny.py", *both)[0].data.eval_sets) == {"one_hop", "mine"}


def test_a_home_folder_is_found_in_every_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config_file(
        tmp_path, "c.model.path = '~/model'", "c.unlock()", "c.data.eval_sets = {'a': '~/a'}"
    )
    keys = ("data.answers", "retriever.corpus", "retriever.index", f"{FREE_SECTION}.b")
    overrides = [f"--config.{key}=~/{key}" for key in keys]
    config, workdir = parse("--config=~/mine.py", "--workdir=~/run", *overrides)
    assert workdir == f"{tmp_path}/run"
    found = flatten_config(config)
    assert (
        found["model.path"] == f"{tmp_path}/model" and found[f"{FREE_SECTION}.a"] == f"{tmp_path}/a"
    )
    assert {key: found[key] for key in keys} == {key: f"{tmp_path}/{key}" for key in keys}
    assert parse(DEFAULT, "--workdir=a/~b")[1] == "a/~b"
    with pytest.raises(
        InputError, match="--workdir=~no-such-user/run: expected a folder of a known user"
    ):
        parse(DEFAULT, "--workdir=~no-such-user/run")
    with pytest.raises(InputError, match="config key data.answers=~no-such-user/a: expected"):
        parse(DEFAULT, "--config.data.answers=~no-such-user/a")


def test_a_file_without_get_config_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(InputError, match=r"empty.py: it has no get_config\(\)"):
        load_config(tmp_path / "empty.py")


def test_evaluation_sets_are_free_names_of_files(tmp_path: Path) -> None:
    new: Any = load_config(
        config_file(tmp_path, "c.unlock()", "c.data.eval_sets = {'mine': 'mine.jsonl'}")
    )
    assert new.data.eval_sets.mine == "mine.jsonl" and new.is_locked


def test_nearest_looks_at_section_and_last_part() -> None:
    names = ["learner.rows", "retriever.index", "model.path", "learner.learning_rate"]
    assert nearest("lerner.row", names) == "learner.rows"
    assert nearest("model.learning_rate", names) == "learner.learning_rate"
    assert nearest("path", names) == "model.path"
    assert nearest("learner.batch", names) is None
    assert nearest("wandb", names) is None


@pytest.mark.parametrize(
    ("override", "key"),
    [("--config.lerner.rows=1", "learner.rows"), ("--config.learner.rows=many", "learner.rows")],
)
def test_main_ends_with_code_2_and_one_line(run_main: RunMain, override: str, key: str) -> None:
    done = run_main(DEFAULT, override)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.count("\n") == 1 and done.stderr.startswith("ssp_jax: ") and key in done.stderr
    )
