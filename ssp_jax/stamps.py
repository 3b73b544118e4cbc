"""A digest of each file that a run depends on, kept with every checkpoint.

A resumed run compares them: other answers, another corpus or other initial weights (the reference
model, the policy judge) would silently make it another run. Question sets are not among them: they
train nothing, and an evaluation plays again what has changed in them. A search server
(retriever.url) has no digest.
"""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ssp_jax.errors import InputError, masked
from ssp_jax.model import hf_files, hf_save
from ssp_jax.model.hf_files import Folder
from ssp_jax.retriever import build
from ssp_jax.user_code import load

# Of a larger file of weights so many blocks are read, evenly spread: training moves all weights,
# and 15 GB take a second or two. Up to WHOLE bytes a file is read as a whole.
WHOLE = 2**28
BLOCK = 2**20
BLOCKS = 128


def of_weights(path: str) -> dict[str, str]:
    """Digests of the files of the model folder's weights, by name."""
    model = hf_files.find(path)
    names = _weight_files(model)
    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(lambda name: _of_weights(model, name), names))
    return {masked(model.place(name)): digest for name, digest in zip(names, digests, strict=True)}


def of_adapter(path: str) -> dict[str, str]:
    """Digests of the files of the adapter's folder, by name."""
    adapter = hf_files.find(path)
    config = _of_file(adapter.path / hf_files.ADAPTER_CONFIG)
    weights = _of_weights(adapter, hf_files.ADAPTER_FILE)
    stamps = {hf_files.ADAPTER_CONFIG: config, hf_files.ADAPTER_FILE: weights}
    return {masked(adapter.place(name)): digest for name, digest in stamps.items()}


def of_files(model_path: str, *trained_on: str) -> dict[str, str]:
    """Digests of the model folder's other files, and of those that are trained on, by name."""
    model = hf_files.find(model_path)
    stamps = {}
    for name in ("config.json", *hf_save.COPIED):
        if (model.path / name).is_file():
            stamps[model.place(name)] = _of_file(model.path / name)
    for path in trained_on:
        stamps[path] = _of_file(Path(path))
    return {masked(name): digest for name, digest in stamps.items()}


def of_index(corpus: str, index: str) -> dict[str, str]:
    """Digest of the corpus, or of the index where `corpus` is empty, by name."""
    return {corpus or index: build.source(corpus, index)}


def of_code(value: str) -> dict[str, str]:
    """Digest of the user's file of a value FILE.py:NAME, by name."""
    return {masked(load.file_of(value)): load.digest(value)}


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
