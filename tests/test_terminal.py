"""What reaches the terminal: foreign text is shown, and does not act on it."""

import json

import pytest

from ssp_jax import audit
from ssp_jax.errors import json_line, printable
from ssp_jax.generate import __main__ as generate
from ssp_jax.report import __main__ as report
from ssp_jax.retriever import __main__ as retriever
from ssp_jax.runtime.logger import Logger

# A window title, a cleared screen (in seven bits and in one of C1), a turned direction, a
# backspace; markup of rich.
ACTS = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202eabc\b\x7f"
HOSTILE = f"capital {ACTS} [bold]:cat:[/bold]"


def assert_inert(text):
    assert printable(text) == text
    assert "\\x1b]0;owned" in text  # it is shown


def assert_plain(text):
    """Neither markup nor emoji of rich."""
    assert "[bold]:cat:[/bold]" in text.replace("\n", "")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    row = {"id": f"1{ACTS}", "contents": f"{HOSTILE}\n{HOSTILE}"}
    (folder / "corpus.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["build", f"--corpus={folder / 'corpus.jsonl'}", f"--out={folder / 'index'}"]
    assert retriever.main(arguments) == 0
    return folder / "index"


def test_passages_of_a_search(index, capsys):
    assert retriever.main(["search", f"--index={index}", "capital"]) == 0
    out = capsys.readouterr().out
    assert_inert(out)
    assert_plain(out)


def test_answers_and_sets_of_an_audit(tmp_path, capsys):
    rows = [{"ground_truth": HOSTILE, "search_turns": 1}] * 3
    (tmp_path / "answers.jsonl").write_text("".join(map("{}\n".format, map(json.dumps, rows))))
    name = tmp_path / "set\x1b]0;owned\x07.jsonl"
    name.write_text(json.dumps({"question": HOSTILE, "golden_answers": [HOSTILE]}) + "\n")
    assert audit.main([f"--answers={tmp_path / 'answers.jsonl'}", f"--eval={name}"]) == 0
    out = capsys.readouterr().out
    assert_inert(out)
    assert "set\\x1b]0;owned" in out


def test_lines_and_tables_of_a_run(tmp_path, capsys):
    with Logger(str(tmp_path), 1, tensorboard=False) as logger:
        logger.say(f"of {HOSTILE}")
        logger.table(HOSTILE, [[HOSTILE, 1.0]], [HOSTILE, "score"])
        logger.episodes(1, [{"text": HOSTILE}])
    out = capsys.readouterr().out
    assert_inert(out)
    assert_plain(out)
    written = (tmp_path / "episodes/step_000001.jsonl").read_text()
    assert printable(written) == written and json.loads(written) == {"text": HOSTILE}


def test_names_of_files_in_sentences(capsys):
    assert generate.main([f"--model={ACTS}"]) == 2
    assert_inert(capsys.readouterr().err)
    assert report.main([f"nowhere{ACTS}"]) == 2
    assert_inert(capsys.readouterr().err)
    assert audit.main([f"--answers={ACTS}"]) == 2
    assert_inert(capsys.readouterr().err)


@pytest.mark.parametrize("text", [HOSTILE, "\ud83d", "\U000e0041", "Zürich 東京\n", '"\\'])
def test_a_json_line_is_inert_and_reads_as_what_it_is(text):
    line = json_line({"text": text})
    assert printable(line) == line and "\n" not in line
    assert json.loads(line) == {"text": text}
    assert "Zürich" not in text or "Zürich 東京" in line
    line.encode()
