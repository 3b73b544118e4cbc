"""The journey of a user with passages and nothing else: answers, index, config, a step, a question.

The passages are those of a company that does not exist, made here.
"""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ssp_jax import main
from ssp_jax.answers import __main__ as answers
from ssp_jax.data import load_answers
from ssp_jax.generate import __main__ as generate
from ssp_jax.retriever import __main__ as retriever
from ssp_jax.retriever import index as index_files
from ssp_jax.retriever.search import Retriever, open_retriever
from tests.conftest import ROOT
from tests.test_train import SMALL

TOWNS = ("Zurich", "Oslo", "Porto", "Kyoto", "Lima", "Quebec", "Graz", "Turin", "Leeds", "Cork")
FIRST = ("Ada", "Bruno", "Clara", "Dario", "Edith", "Felix", "Greta", "Hugo", "Irma", "Jonas")
LAST = ("Vogel", "Tanaka", "Moreau", "Silva", "Novak", "Berg", "Rossi", "Quinn", "Adler", "Costa")
FILLER = (
    "The report of the quarter was read by all teams.",
    "Orders are taken by telephone until noon.",
    "Every change is written down before it is made.",
    "The workshop is cleaned on the last day of a month.",
    "Visitors are asked to wear a badge.",
)
TRAINING = SMALL | {
    "model.path": f"{ROOT}/assets/tiny/model",
    "steps": 1,
    "log.episodes_every": 1,
    "data.eval_sets.one_hop": "",
    "data.eval_sets.two_hop": "",
    "log.tensorboard": False,
}


def company(folder: Path) -> None:
    """150 files of two passages each, half of them Markdown; each has facts of its own."""
    rng = random.Random(0)
    for n in range(150):
        person = f"{FIRST[n % 10]} {LAST[n // 10 % 10]}"
        product = f"Nimbus {100 + n}"
        facts = (
            f"The {product} is built in {TOWNS[n % 7]} by {person}.",
            f"It was sold first in {1990 + n % 30} and weighs {1200 + 7 * n} grams.",
        )
        sections = []
        for fact in facts:
            sentences = [fact, *rng.choices(FILLER, k=9)]
            sections.append(" ".join(sentences))
        place = folder / f"line-{n % 5}"
        place.mkdir(parents=True, exist_ok=True)
        if n % 2:
            text = f"# {product}\n\n{sections[0]}\n\n## History\n\n{sections[1]}\n"
            (place / f"{n}.md").write_text(text)
        else:
            (place / f"{product}.txt").write_text("\n\n".join(sections))


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with passages, an index of them, and their answers."""
    place = tmp_path_factory.mktemp("own")
    company(place / "passages")
    assert retriever.main(["build", f"--corpus={place}/passages", f"--out={place}/index"]) == 0
    out = f"--out={place}/answers.jsonl"
    assert answers.main([f"--corpus={place}/passages", out]) == 0
    return place


def test_a_folder_of_a_company_is_searched(own: Path) -> None:
    search = Retriever.load(own / "index", threads=1)
    assert len(search) == 300
    for n in (17, 80):
        (found,) = search.search([f"Where is the Nimbus {100 + n} built?"], 1)[0]
        assert f"The Nimbus {100 + n} is built in {TOWNS[n % 7]}" in found.text
        assert found.title == f"Nimbus {100 + n}"


def test_answers_of_a_company_are_its_names_and_numbers(own: Path) -> None:
    rows = [json.loads(line) for line in (own / "answers.jsonl").read_text().splitlines()]
    found = {row["ground_truth"] for row in rows}
    people = {f"{first} {last}" for first in FIRST for last in LAST}
    assert len(found & people) == 100
    assert {f"Nimbus {100 + n}" for n in range(150)} <= found
    assert len(found & {str(1200 + 7 * n) for n in range(150)}) > 100
    assert found & {str(year) for year in range(1990, 2020)}
    assert not found & {"The", "Orders", "Every", "Visitors", "It"}
    assert len({row["passage"] for row in rows}) > 250


CONFIG = """
from configs import tiny


def get_config():
    c = tiny.get_config()
    c.retriever.corpus = "{own}/passages"
    c.retriever.index = "{own}/index"
    c.data.answers = "{own}/answers.jsonl"
    return c
"""


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compile")
def test_a_run_on_a_companys_passages_is_trained_and_asked(
    own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(CONFIG.format(own=own))
    before = (own / "index/meta.json").stat().st_mtime_ns
    keys = [f"--config.{key}={value}" for key, value in TRAINING.items()]
    assert main.main(["--config=mine.py", "--workdir=run", *keys]) == 0, capsys.readouterr().err
    assert (own / "index/meta.json").stat().st_mtime_ns == before  # it is the folder's
    metrics = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[0])["step"] == 1
    played = "".join(path.read_text() for path in (tmp_path / "run").rglob("*.json*"))
    given = [task.answers[0] for task in load_answers(own / "answers.jsonl")]
    assert any(json.dumps(answer)[1:-1] in played for answer in given)
    capsys.readouterr()
    flags = [f"--index={own}/index", "--max_tokens=64", "--max_searches=1"]
    assert generate.main(["run/export", "Who builds the Nimbus 117?", *flags]) == 0
    assert capsys.readouterr().out.strip()


CHINESE_TOWNS = ("北京", "上海", "广州", "成都", "杭州", "南京", "西安", "重庆", "苏州", "大连")


def chinese(folder: Path) -> None:
    """100 passages of Chinese, one a file."""
    folder.mkdir()
    for n in range(100):
        name = f"云雀{'甲乙丙丁戊己庚辛壬癸'[n % 10]}{'春夏秋冬东西南北中外'[n // 10]}"
        text = f"{name}是公司的无人机，在{CHINESE_TOWNS[n % 7]}工厂生产，重量为{1200 + 7 * n}克。"
        (folder / f"{n:03}.txt").write_text(text * 2)


JAPANESE = ("富士山は静岡県と山梨県にまたがる山である。", "琵琶湖は滋賀県にある湖である。")
THAI = ("แม่น้ำเจ้าพระยาไหลผ่านกรุงเทพมหานคร", "ภูเก็ตเป็นเกาะทางภาคใต้ของประเทศไทย")
HINDI = ("गंगा नदी वाराणसी से होकर बहती है।", "ताजमहल आगरा में यमुना के किनारे है।")


def test_a_hundred_chinese_passages_are_searched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chinese(tmp_path / "zh")
    index = f"--out={tmp_path}/index"
    assert retriever.main(["build", f"--corpus={tmp_path}/zh", index]) == 0
    assert answers.main([f"--corpus={tmp_path}/zh", f"--out={tmp_path}/a.jsonl"]) == 0
    captured = capsys.readouterr()
    assert "100 passages" in captured.out and captured.err == ""
    search = Retriever.load(tmp_path / "index", threads=1)
    for n, query in ((37, "云雀辛冬在哪里生产？"), (52, "云雀丙西的重量"), (99, "癸外无人机")):
        (found,) = search.search([query], 1)[0]
        assert found.id == f"{n:03}.txt#1", (query, found)
    assert len(load_answers(tmp_path / "a.jsonl")) >= 100


@pytest.mark.parametrize(
    ("texts", "queries"),
    [
        (JAPANESE, ("富士山の場所", "滋賀県の湖")),
        (THAI, ("เจ้าพระยา", "เกาะภูเก็ต")),
        (HINDI, ("वाराणसी की नदी", "आगरा का ताजमहल")),
    ],
    ids=["Japanese", "Thai", "Hindi"],
)
def test_a_query_finds_its_passage_in_other_scripts(
    tmp_path: Path, texts: tuple[str, ...], queries: tuple[str, ...]
) -> None:
    rows = (json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "corpus.jsonl").write_text("".join(rows))
    arguments = ["build", f"--corpus={tmp_path}/corpus.jsonl", f"--out={tmp_path}/index"]
    assert retriever.main(arguments) == 0
    search = Retriever.load(tmp_path / "index", threads=1)
    for row, query in enumerate(queries):
        assert [hit for hit, _ in search.hits([query], 1)[0]] == [row]


def as_before(index: Path, rename: Callable[[str], str] = str) -> None:
    """Makes an index one of a version that knew one rule for words, and found these words."""
    vocabulary = json.loads((index / "vocab.index.json").read_text())
    renamed = {rename(word): number for word, number in vocabulary.items()}
    (index / "vocab.index.json").write_text(json.dumps(renamed))
    meta = json.loads((index / "meta.json").read_text())
    assert meta["settings"].pop("words") == "scripts"
    (index / "meta.json").unlink()
    index_files.write_meta(index, meta)


def test_an_index_of_an_earlier_version_is_kept_and_searched_as_before(
    own: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = Path(shutil.copytree(own / "index", tmp_path / "index"))
    as_before(index)
    meta = (index / "meta.json").read_bytes()
    settings: dict[str, Any] = {"stemmer": "english", "stopwords": "en", "k1": 1.5, "b": 0.75}
    earlier = open_retriever(own / "passages", index, **settings)
    assert (index / "meta.json").read_bytes() == meta  # it was not built anew
    now = Retriever.load(own / "index")
    queries = [f"Nimbus {n} in {town}" for n in range(100, 250, 10) for town in TOWNS]
    assert earlier.hits(queries, 3) == now.hits(queries, 3)
    # Letters as they were split then, also where today's rule has others.
    assert earlier.hits(["Nimbus\u0301117"], 1) == now.hits(["Nimbus 117"], 1)
    assert capsys.readouterr().err == ""


def test_an_index_of_clauses_gets_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = (json.dumps({"text": f"clause{n}"}) + "\n" for n in range(10))
    (tmp_path / "corpus.jsonl").write_text("".join(rows))
    arguments = [f"--corpus={tmp_path}/corpus.jsonl", f"--out={tmp_path}/index", "--stemmer="]
    assert retriever.main(["build", *arguments]) == 0
    as_before(tmp_path / "index", lambda word: word.replace("clause", "云雀是公司的无人机"))
    capsys.readouterr()
    search = Retriever.load(tmp_path / "index", threads=1)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "took whole clauses of Chinese" in said
    assert "delete the index to build it anew" in said
    assert search.search(["无人机"], 1) == [[]]
    assert len(search.search(["云雀是公司的无人机7"], 1)[0]) == 1
