"""README and docs: links, keys and commands hold, and pages made from code are current."""

import importlib.metadata
import re
import runpy
import shlex
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import default
from ssp_jax import main
from ssp_jax.__main__ import COMMANDS
from ssp_jax.config.checks import check_numbers, check_values
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.config.comments import read_sections
from ssp_jax.config.keys import FREE_SECTION, flatten_config
from ssp_jax.data import load_answers
from ssp_jax.evaluation import scores
from ssp_jax.export import __main__ as export
from ssp_jax.game.causes import CAUSES
from ssp_jax.game.metrics import round_metrics
from ssp_jax.game.rules import FAULTS
from ssp_jax.generate import __main__ as generate
from ssp_jax.metric_table import METRICS
from ssp_jax.report.drawing import CHARTS
from ssp_jax.rollout.engine import Stats
from ssp_jax.runtime.logger import COLUMNS
from ssp_jax.warm_start import __main__ as warm_start
from tests.conftest import ROOT

DEFAULT = "--config=configs/default.py"
DOCS = ROOT / "docs"
TABLE = {metric.name for group in METRICS.values() for metric in group}


def table_name(metric: str) -> str:
    """The name under which the table has a metric of a run."""
    metric = re.sub("^update/(solver|proposer|both)/", "update/ROLE/", metric)
    return re.sub("^eval/.*/([^/]*?)(_low|_high)?$", r"eval/SET/\1", metric)


def test_the_pages_of_keys_and_metrics_are_those_of_the_code() -> None:
    made = runpy.run_path(str(DOCS / "make_tables.py"))
    assert (DOCS / "config_keys.md").read_text() == made["config_keys"]()
    assert (DOCS / "metrics.md").read_text() == made["metrics"]()


def test_every_key_is_explained_in_the_file_that_owns_it() -> None:
    keys = [key for section in read_sections() for key in section.keys]
    assert {key.name for key in keys} == {*flatten_config(default.get_config()), FREE_SECTION}
    assert [key.name for key in keys if not key.comment] == []


def test_a_comment_belongs_to_the_key_below_it_or_beside_it() -> None:
    keys = {key.name: key for section in read_sections() for key in section.keys}
    assert keys["seed"].comment == "one integer fixes the whole run"
    assert keys["retriever.top_k"].comment == "Passages per search [P s4.1]."
    assert keys["limits.turn_tokens"].default == "response_tokens"
    two_lines = keys["game.noise_documents"].comment
    assert two_lines.startswith("Distinct documents") and "passages of the corpus" in two_lines


def test_each_metric_that_is_shown_or_made_has_its_meaning_in_the_table() -> None:
    shown = [line for chart in CHARTS for line in chart.lines.values() if isinstance(line, str)]
    shown += [column.metric for column in COLUMNS]
    evaluated = [f"eval/SET/{name}" for name in (*scores.COLUMNS, "n")]
    assert {table_name(name) for name in (*shown, *evaluated, *round_metrics([], Stats()))} <= TABLE
    faults = {name.removeprefix("fault/") for name in TABLE if name.startswith("fault/")}
    assert faults == set(FAULTS) >= set(CAUSES)


# --- links, keys and commands of all pages --------------------------------------------------------


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md"))]
CODE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"(?<!`)`([^`]+)`(?!`)")
SECTIONS = {key.partition(".")[0] for key in flatten_config(default.get_config()) if "." in key}
# Pages in which section.name is a module of the code and not a key.
ABOUT_CODE = ("CONTRIBUTING.md", "architecture.md", "log.md", "security.md", "metrics.md")


def prose(page: Path) -> str:
    return CODE.sub("", page.read_text())


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on GitHub."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists() and file.is_relative_to(ROOT), target
        assert not anchor or anchor in anchors(file), target


def test_the_readme_leads_to_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w.]+)", (ROOT / "README.md").read_text()))
    assert {page.name for page in DOCS.glob("*.md")} <= linked


def test_the_readme_has_the_bounds_of_the_page_of_plans() -> None:
    row = re.compile(r"^\| qwen7b \| ([^ ,]+).* (\d+) s \|$", re.MULTILINE)
    bounds = dict(row.findall((DOCS / "plan.md").read_text()))
    readme = (ROOT / "README.md").read_text()
    assert f"at least {bounds['gpu:h100x8']} s a step" in readme
    assert f"at least {bounds['v5p:2x2x2']} and {bounds['v6e:4x4']} s" in readme


def keys_in(page: Path) -> Iterator[str]:
    """What stands in a page as `section.key` or `section.key=value`."""
    text = prose(page)
    if page.name == "migrating_from_verl.md":  # the first column has keys of verl
        text = re.sub(r"^\|[^|]*\|", "", text, flags=re.MULTILINE)
    for span in SPAN.findall(text):
        found = re.fullmatch(r"(?:--config\.)?([a-z_]+)\.([\w.]+)(?:=(\S+))?", span)
        if found and found[1] in SECTIONS and page.name not in ABOUT_CODE:
            yield span.removeprefix("--config.")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_keys_of_a_page_are_keys_of_a_config(page: Path) -> None:
    known = flatten_config(default.get_config())
    for span in keys_in(page):
        key, is_set, value = span.partition("=")
        if key.startswith(FREE_SECTION):
            continue
        assert key in known, span
        if is_set and not value.startswith("<"):
            config = parse_command_line([DEFAULT, f"--config.{span}"]).config
            check_numbers(config)


def parse_warm_start(words: list[str]) -> None:
    if words[0] == warm_start.SCRIPT:
        warm_start.script_flags(words[1:])
    else:
        main.parse(warm_start.translated(words))


# Of commands that check their flags before they do anything.
PARSERS = {
    "generate": generate.parse_flags,
    "export": export.parse_flags,
    "warm_start": parse_warm_start,
}
OTHERS = ("pytest", "docker", "kubectl", "mkdir", "unzip")
PROGRAMS = ("python", "ssp-jax", "pip", "make", "launch/", *OTHERS)


def commands_of(page: Path) -> Iterator[list[str]]:
    """The words of each command: lines of code without a language, and spans that begin as one."""
    for language, block in CODE.findall(page.read_text()):
        if language in ("", "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                yield shlex.split(line.partition(" | ")[0], comments=True)
    for span in SPAN.findall(prose(page)):
        program, _, rest = span.partition(" ")
        if rest and program.startswith(PROGRAMS):
            yield shlex.split(span)


def flags_in(file: Path) -> set[str]:
    """The flags that a program declares, in its file."""
    return set(re.findall(r"(?:add_argument|DEFINE_\w+)\(\s*\"(?:--)?(\w+)\"", file.read_text()))


def check_python(words: list[str]) -> None:
    """A module of the package, or a file: its flags are flags that it has."""
    words = [word for word in words if word not in ("...", "…")]
    if words[:2] == ["-m", "pip"]:
        return check_pip(words[2:])
    if words[:2] == ["-m", "ssp_jax"]:
        return check_command(words[2:])
    if words[:2] == ["-m", "ssp_jax.main"]:
        given, _ = main.parse(words[2:])
        check_values(given.config)
        return None
    if words[0] == "-m":
        parts = words[1].split(".")
        file = ROOT.joinpath(*parts).with_suffix(".py")
        file = file if file.exists() else ROOT.joinpath(*parts, "__main__.py")
    else:
        file = ROOT / words[0]
    if file.parent.name in PARSERS:
        PARSERS[file.parent.name](words[2:])
        return None
    of_config = [word for word in words if word.startswith("--config")]
    if of_config:
        parse_command_line(of_config)
    for word in words[1:]:
        flag = re.match(r"--(\w+)", word)
        assert flag is None or word in of_config or flag[1] in flags_in(file), word
    assert file.is_file(), words
    return None


def check_command(words: list[str]) -> None:
    """A command of the list, by its name; alone, or with arguments that its module takes."""
    if words and not words[0].startswith("--help"):
        command = COMMANDS[words[0]]
        if words[1:]:
            module = command.module.removesuffix(".__main__")
            check_python(["-m", module, *command.arguments, *words[1:]])


def check_pip(words: list[str]) -> None:
    """Files of requirements and extras are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    of_jax = importlib.metadata.metadata("jax").get_all("Provides-Extra") or []
    extras = {".": set(project["optional-dependencies"]), "jax": set(of_jax)}
    for word in words:
        if word.endswith(".txt"):
            assert (ROOT / word).is_file(), word
        if found := re.fullmatch(r"(\.|jax)\[(.*)\]", word):
            assert set(found[2].split(",")) <= extras[found[1]], word


def check_launch(words: list[str]) -> None:
    """A script of launch/ takes these words: its dry run ends well."""
    if "--dry-run" not in words:
        at = words.index("--") if "--" in words else len(words)
        words = [*words[:at], "--dry-run", *words[at:]]
    done = subprocess.run([str(ROOT / words[0]), *words[1:]], capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def check(words: list[str]) -> None:
    while "=" in words[0]:  # variables of the environment
        words = words[1:]
    program, *rest = words
    if program in ("python", "python3"):
        check_python(rest)
    elif program == "ssp-jax":
        check_command(rest)
    elif program == "pip":
        check_pip(rest)
    elif program.startswith("launch/"):
        check_launch(words)
    elif program == "make":
        target = next(word for word in rest if "=" not in word)
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target
    else:
        assert program in OTHERS, words
        files = [word for word in rest if re.search(r"/.*\.(py|yaml)$|Dockerfile$", word)]
        assert all((ROOT / word).is_file() for word in files), words


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_commands_of_a_page_are_ones_that_the_programs_take(page: Path) -> None:
    for words in commands_of(page):
        if words:
            check(words)


def test_answers_of_search_r1s_training_rows_become_given_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Python of the page for those who come from verl, on rows as Search-R1 writes them."""
    targets = [["Paris", "City of Paris"], ["81"], ["Paris"]]
    rows = [{"reward_model": {"style": "rule", "ground_truth": {"target": t}}} for t in targets]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "train.parquet")
    page = (DOCS / "migrating_from_verl.md").read_text()
    (code,) = (block for language, block in CODE.findall(page) if language == "python")
    monkeypatch.chdir(tmp_path)
    exec(code, {})
    tasks = load_answers(tmp_path / "answers.txt")
    assert [task.answers for task in tasks] == [("81",), ("Paris",)]
