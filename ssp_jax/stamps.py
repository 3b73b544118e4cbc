"""What a run depends on beside its config: a digest of each file, kept with every checkpoint.

A resumed run compares them: other answers, another corpus or other initial weights (the reference
model, the policy judge) would make it another run without a word. Question sets are not among them:
they train nothing, and an evaluation plays anew what has changed in them. A search server
(retriever.url) cannot be asked for one.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ml_collections import ConfigDict

from ssp_jax.errors import InputError, masked
from ssp_jax.model import hf_files, hf_save
from ssp_jax.model.hf_files import Folder
from ssp_jax.retriever import build

# Larger files of weights are read in so many blocks, evenly spread: training moves all weights, and
# 15 GB are read in a second or two. Up to WHOLE bytes a file is read as a whole.
WHOLE = 2**28
BLOCK = 2**20
BLOCKS = 128


def of_weights(path: str) -> dict[str, str]:
    """Of the model folder's weights, by name."""
    model = hf_files.find(path)
    names = _weight_files(model)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _of_weights(model, name), names))
    return {masked(model.place(name)): digest for name, digest in zip(names, digests, strict=True)}


def of_files(config: ConfigDict) -> dict[str, str]:
    """Of the answers and the model folder's other files, by name."""
    model = hf_files.find(config.model.path)
    stamps = {}
    for name in ("config.json", *hf_save.COPIED):
        if (model.path / name).is_file():
            stamps[model.place(name)] = _of_file(model.path / name)
    stamps[config.data.answers] = _of_file(Path(config.data.answers))
    return {masked(name): digest for name, digest in stamps.items()}


def of_search(config: ConfigDict, index: str) -> dict[str, str]:
    """Of the corpus, or of the index where no corpus is given. `config`: section retriever."""
    if config.kind == "http":
        return {}
    return {str(config.corpus or index): build.source(config.corpus, index)}


def _weight_files(model: Folder) -> list[str]:
    if model.has(hf_files.SINGLE_FILE):
        return [hf_files.SINGLE_FILE]
    weight_map = model.read_json(hf_files.INDEX_FILE)["weight_map"]
    return [hf_files.INDEX_FILE, *sorted(set(weight_map.values()))]


def _of_weights(model: Folder, name: str) -> str:
    if name == hf_files.INDEX_FILE:
        return _of_file(model.path / name)
    file = model.open(name)
    digest = hashlib.blake2b(str(file.size).encode(), digest_size=16)
    step = BLOCK if file.size <= WHOLE else (file.size - BLOCK) // (BLOCKS - 1)
    for begin in range(0, file.size, step):
        with file.read(begin, min(begin + BLOCK, file.size)) as raw:
            digest.update(raw.data)
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file ({error.strerror})") from None
