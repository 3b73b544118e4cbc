"""Making the vectors of an index: by an encoder on all devices, or from an index file of faiss."""

import functools
import struct
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError
from ssp_jax.model.decoder import Params
from ssp_jax.retriever import encoder, encoder_files, index, vectors
from ssp_jax.retriever.build import recover
from ssp_jax.retriever.dense import Shape
from ssp_jax.retriever.encoder_files import TextEncoder
from ssp_jax.retriever.index import Passages
from ssp_jax.retriever.progress import Progress
from ssp_jax.retriever.settings import EncoderKeys
from ssp_jax.retriever.vectors import BLOCK_ROWS, About

# A passage is padded to one of these numbers of tokens, or to the encoder's longest text.
PASSAGE_TOKENS = (32, 64, 96, 128, 192, 256, 384)
# Tokens that a device encodes in one call. A CPU gains nothing from more, and needs more memory.
CALL_TOKENS = 1 << 15
CALL_TOKENS_ON_CPU = 1 << 12

# faiss's index file of IndexFlatIP: its name, width, rows, two constants, whether it is trained,
# metric, and numbers that follow, which are float32.
_FAISS = struct.Struct("<4siqqq?iQ")
_FAISS_FLAT = b"IxFI"
_FAISS_CONSTANT = 1 << 20
# Names of other types, by which a sentence can say what a file is.
_FAISS_NAMES = {
    b"IxF2": "IndexFlatL2",
    b"IxFl": "IndexFlat of another metric",
    b"IwFl": "IndexIVFFlat",
    b"IwPQ": "IndexIVFPQ",
    b"IwSq": "IndexIVFScalarQuantizer",
    b"IHNf": "IndexHNSWFlat",
    b"IHNs": "IndexHNSWSQ",
    b"IxPq": "IndexPQ",
    b"IxSQ": "IndexScalarQuantizer",
    b"IxPT": "IndexPreTransform",
    b"IxMp": "IndexIDMap",
    b"IxM2": "IndexIDMap2",
}


def ensure_vectors(
    index_dir: str | Path, encoder_folder: str, keys: EncoderKeys, dtype: str = "bfloat16"
) -> None:
    """Encodes the passages of an index unless that is done. Raises InputError.

    A build that was killed goes on, and ends as one that was not: vectors are a function of the
    passages, the encoder and the devices.
    """
    meta, passages, text_encoder = _open(index_dir, encoder_folder, keys)
    about = About.of(text_encoder, meta["corpus"]["sha256"], len(passages), dtype)
    blocks_from = functools.partial(_encoded_blocks, text_encoder, passages)
    vectors.ensure(Path(index_dir), about, blocks_from, "encoding")


def import_faiss(
    file: str | Path,
    index_dir: str | Path,
    encoder_folder: str,
    keys: EncoderKeys,
    dtype: str = "bfloat16",
) -> None:
    """Takes the vectors of an index from a flat index file of faiss. Raises InputError.

    Its rows must be the passages in their order, by this encoder with these keys: a file says
    nothing of where it comes from.
    """
    meta, passages, text_encoder = _open(index_dir, encoder_folder, keys)
    about = About.of(text_encoder, meta["corpus"]["sha256"], len(passages), dtype)
    rows = open_faiss(Path(file), about.width, about.passages)
    blocks_from = functools.partial(_imported_blocks, Path(file), rows)
    vectors.ensure(Path(index_dir), about, blocks_from, f"reading {Path(file).name}")


def _open(
    index_dir: str | Path, encoder_folder: str, keys: EncoderKeys
) -> tuple[dict[str, Any], Passages, TextEncoder]:
    folder = Path(index_dir)
    recover(folder)
    try:
        meta, passages = index.open_passages(folder, Progress())
    except OSError as error:
        raise InputError(f"{folder}: expected an index that can be read ({error})") from None
    return meta, passages, encoder_files.load(encoder_folder, keys)


# --- by an encoder --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def encode_passages(
    s: Shape, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array
) -> jax.Array:
    """The passages' vectors, float32 [B, D]."""
    return encoder.encode(s.config, s.pooling, params, tokens_BT, lengths_B, s.dtype)


def _encoded_blocks(
    text_encoder: TextEncoder, passages: Passages, first: int
) -> Iterator[np.ndarray]:
    """Vectors [rows, D] of each block from `first` on.

    Which passages are encoded together follows from the block alone. While the devices encode a
    block, a thread makes the tokens of the next.
    """
    devices = jax.local_devices()
    on_cpu = devices[0].platform == "cpu"
    mesh = Mesh(np.array(devices), ("rows",))
    params = jax.device_put(text_encoder.params, NamedSharding(mesh, P()))
    dtype = "float32" if on_cpu else "bfloat16"
    shape = Shape(text_encoder.config, text_encoder.recipe.pooling, dtype)
    call_tokens = len(devices) * (CALL_TOKENS_ON_CPU if on_cpu else CALL_TOKENS)

    def tokens_of(block: int) -> list[list[int]]:
        rows = range(block * BLOCK_ROWS, min((block + 1) * BLOCK_ROWS, len(passages)))
        documents = map(passages.document, rows)
        # As Search-R1 encodes them, and as bm25 reads them.
        return text_encoder.passage_tokens([f"{d.title}\n{d.text}" for d in documents])

    def encoded(tokens: list[list[int]]) -> np.ndarray:
        by_rows = NamedSharding(mesh, P("rows"))
        results = []
        for places, batch in _batches(tokens, text_encoder, call_tokens, len(devices)):
            results.append(
                (places, encode_passages(shape, params, *jax.device_put(batch, by_rows)))
            )
        found = np.empty((len(tokens), text_encoder.config.embed_dim), np.float32)
        for places, vectors_BD in results:
            found[places] = np.asarray(vectors_BD)[: len(places)]
        return found

    blocks = -(-len(passages) // BLOCK_ROWS)
    with ThreadPoolExecutor(1, thread_name_prefix="tokens") as pool:
        ahead = pool.submit(tokens_of, first) if first < blocks else None
        for block in range(first, blocks):
            assert ahead is not None
            tokens = ahead.result()
            ahead = pool.submit(tokens_of, block + 1) if block + 1 < blocks else None
            yield encoded(tokens)


def _batches(
    tokens: Sequence[list[int]], text_encoder: TextEncoder, call_tokens: int, devices: int
) -> Iterator[tuple[list[int], tuple[np.ndarray, np.ndarray]]]:
    """Batches of passages that are about as long: their places, token numbers and lengths.

    A batch has call_tokens tokens with its padding, and a multiple of `devices` rows.
    """
    longest = text_encoder.recipe.max_tokens
    sizes = sorted({*(n for n in PASSAGE_TOKENS if n < longest), longest})
    by_length = defaultdict(list)
    for place, own in enumerate(tokens):
        by_length[next(n for n in sizes if len(own) <= n)].append(place)
    for length, places in sorted(by_length.items()):
        rows = max(1, call_tokens // length // devices) * devices
        for start in range(0, len(places), rows):
            some = places[start : start + rows]
            own_tokens = [tokens[place] for place in some]
            yield some, encoder_files.padded(own_tokens, rows, length)


# --- from a file of faiss -------------------------------------------------------------------------


def open_faiss(file: Path, width: int, rows: int) -> np.ndarray:
    """The rows of a file of faiss's IndexFlatIP, float32 [rows, width], mapped.

    Raises InputError unless it has that type, width and number of rows, and is whole.
    """
    try:
        size = file.stat().st_size
        with open(file, "rb") as opened:
            header = opened.read(_FAISS.size)
    except OSError as error:
        raise InputError(f"{file}: expected an index file of faiss ({error.strerror})") from None
    kind = header[:4]
    if kind != _FAISS_FLAT:
        name = _FAISS_NAMES.get(kind, f"{kind!r}")
        raise InputError(f"{file}: is of type {name}; expected faiss's IndexFlatIP ('IxFI')")
    if len(header) < _FAISS.size:
        raise InputError(f"{file}: is truncated: it has {size} bytes and no whole header")
    _, found_width, found_rows, *constants, is_trained, metric, numbers = _FAISS.unpack(header)
    facts = {
        "width": (found_width, width),
        "number of vectors": (found_rows, rows),
        "constants": (constants, [_FAISS_CONSTANT] * 2),
        "flag of training": (is_trained, True),
        "metric": (metric, 0),
        "number of numbers": (numbers, rows * width),
        "number of bytes": (size, _FAISS.size + 4 * rows * width),
    }
    for name, (found, expected) in facts.items():
        if found != expected:
            raise InputError(f"{file}: has the {name} {found}; expected {expected}")
    return np.memmap(file, np.dtype("<f4"), "r", _FAISS.size, (rows, width))


def _imported_blocks(file: Path, rows: np.ndarray, first: int) -> Iterator[np.ndarray]:
    for start in range(first * BLOCK_ROWS, len(rows), BLOCK_ROWS):
        block = np.array(rows[start : start + BLOCK_ROWS])
        is_finite = np.isfinite(block).all(axis=1)
        if not is_finite.all():
            row = start + int(np.argmin(is_finite))
            raise InputError(f"{file}: vector {row:,} has NaN or infinity; expected numbers")
        yield block
