"""A corpus of invented places that name each other, and its index, for tests of a warm start."""

import json
from collections.abc import Sequence
from pathlib import Path

from ssp_jax.retriever.build import build_index
from ssp_jax.retriever.search import Retriever
from ssp_jax.warm_start.links import Links

# Each name once: a river flows through a town, which lies in a land, which borders a sea.
RIVERS = ("Alba", "Bregna", "Corvo", "Dulna", "Elsanda", "Fimra", "Garda", "Holmia")
TOWNS = ("Aston", "Belvar", "Cumber", "Dornik", "Estel", "Faring", "Grunau", "Hestia")
LANDS = ("Ardenia", "Borvia", "Candia", "Delmark", "Elbonia", "Florin", "Guilder", "Havnia")
SEAS = ("Amber Sea", "Bitter Sea", "Coral Sea", "Dead Sea", "Eel Sea", "Fog Sea", "Gulf", "Horn")


def passages() -> list[dict[str, str]]:
    rows = []
    for river, town, land, sea in zip(RIVERS, TOWNS, LANDS, SEAS, strict=True):
        rows += [
            (f'"{river}"', f"{river} is a long, quiet river that flows through {town} only."),
            (f'"{town} (town)"', f"{town} is a very old market town in {land}."),
            (f'"{land} - Location"', f"{land}. Location: the far north, bordering the {sea}"),
            (f'"{sea}"', f"The {sea} is cold and deep, with storms in each winter."),
        ]
    return [{"id": str(i), "contents": f"{t}\n{text}"} for i, (t, text) in enumerate(rows)]


def told() -> list[dict[str, str]]:
    """What is told of the lands in fields."""
    rows = []
    for land, sea in zip(LANDS, SEAS, strict=True):
        text = f"highest hill: Mount {land[:3]} 812 m lowest place: the {sea} mean height: 12 m"
        rows += [(f'"{land}"', f"{land} is a small country in the north.")]
        rows += [(f'"{land} - Height"', f"{land}. Height: {text}")]
    return [{"id": f"t{i}", "contents": f"{t}\n{text}"} for i, (t, text) in enumerate(rows)]


def write_corpus(path: Path, more: Sequence[dict[str, str]] = ()) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in [*passages(), *more]))
    return path


def indexed(folder: Path, more: Sequence[dict[str, str]] = ()) -> tuple[Retriever, Links]:
    """The search of the corpus and of more passages, and their links."""
    corpus = write_corpus(folder / "corpus.jsonl", more)
    settings = {"stemmer": "english", "stopwords": "en", "k1": 1.5, "b": 0.75}
    build_index(corpus, folder / "index", **settings)
    retriever = Retriever.load(folder / "index", threads=1)
    return retriever, Links(retriever.document(row) for row in range(len(retriever)))
