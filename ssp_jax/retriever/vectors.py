"""The vectors of an index: a folder `dense` beside its passages, one row for each of them.

meta.json says which encoder made them of which corpus; vectors.bin has the rows, bfloat16 or int8;
scales.bin, of int8 alone, has a float32 for each row; sums.bin has the CRC-32 of each BLOCK_ROWS
rows with their scales. They are written block by block into `dense.building`, which is renamed when
it is whole: a build that was killed goes on after its last whole block. Sizes and sums are compared
when the vectors are opened.
"""

import contextlib
import dataclasses
import fcntl
import functools
import json
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ssp_jax.errors import InputError
from ssp_jax.retriever import settings
from ssp_jax.retriever.encoder import Pooling
from ssp_jax.retriever.encoder_files import Recipe, TextEncoder
from ssp_jax.retriever.progress import Progress
from ssp_jax.runtime.files import sync

FOLDER = "dense"  # in that of the index
BUILDING = "dense.building"
META = "meta.json"
ROWS = "vectors.bin"
SCALES = "scales.bin"
SUMS = "sums.bin"
# To be raised when the files change their meaning.
FORMAT = 1
BLOCK_ROWS = 4096
DTYPES = dict(zip(settings.DTYPES, map(np.dtype, (ml_dtypes.bfloat16, np.int8)), strict=True))
INT8_MAX = 127
_META_TYPES = {
    "format": int,
    "corpus": str,
    "encoder": str,
    "digest": str,
    "pooling": str,
    "normalize": bool,
    "query_prefix": str,
    "passage_prefix": str,
    "max_tokens": int,
    "width": int,
    "passages": int,
    "dtype": str,
}
ANEW = "delete that folder to build it anew"


@dataclasses.dataclass(frozen=True)
class About:
    """What vectors are, as it stands in their meta.json."""

    corpus: str  # digest of the passages' source
    encoder: str  # name of the folder
    digest: str  # of the encoder
    recipe: Recipe
    width: int  # numbers of a vector
    passages: int
    dtype: str  # of DTYPES

    @classmethod
    def of(cls, encoder: TextEncoder, corpus: str, passages: int, dtype: str) -> "About":
        return cls(
            corpus=corpus,
            encoder=encoder.name,
            digest=encoder.digest,
            recipe=encoder.recipe,
            width=encoder.config.embed_dim,
            passages=passages,
            dtype=dtype,
        )

    def to_json(self) -> dict[str, Any]:
        recipe = dataclasses.asdict(self.recipe)
        pooling = recipe.pop("pooling")
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del own["recipe"]
        return own | recipe | {"pooling": pooling["kind"], "normalize": pooling["normalize"]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "About":
        recipe = Recipe(
            pooling=Pooling(values["pooling"], values["normalize"]),
            query_prefix=values["query_prefix"],
            passage_prefix=values["passage_prefix"],
            max_tokens=values["max_tokens"],
        )
        plain = ("corpus", "encoder", "digest", "width", "passages", "dtype")
        return cls(recipe=recipe, **{name: values[name] for name in plain})

    @property
    def blocks(self) -> int:
        return -(-self.passages // BLOCK_ROWS)

    def sizes(self, blocks: int) -> dict[str, int]:
        """Bytes of the files with so many blocks."""
        rows = min(blocks * BLOCK_ROWS, self.passages)
        found = {ROWS: rows * self.width * DTYPES[self.dtype].itemsize, SUMS: 4 * blocks}
        return found | ({SCALES: 4 * rows} if self.dtype == "int8" else {})


@dataclasses.dataclass(frozen=True)
class Vectors:
    """Opened vectors, mapped from disk."""

    about: About
    rows: np.ndarray  # of DTYPES, [passages, width]
    scales: np.ndarray | None  # float32 [passages], of int8

    def float32(self, where: Any) -> np.ndarray:
        """The rows at a slice or an array of numbers, as float32 [number, width]."""
        rows = self.rows[where]
        if self.scales is not None:
            return rows.astype(np.float32) * self.scales[where][:, None]
        # bfloat16 is the first half of a float32.
        return (rows.view(np.uint16).astype(np.uint32) << 16).view(np.float32)

    def is_finite(self, where: slice) -> bool:
        if self.scales is not None:
            return bool(np.isfinite(self.scales[where]).all())
        exponents = self.rows[where].view(np.uint16) & 0x7F80  # all bits set: infinity or NaN
        return bool((exponents < 0x7F80).all())


def quantized(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 [rows, width] and float32 scales [rows], whose product is nearest to these float32 rows.

    A row's largest number becomes 127 or -127.
    """
    scales = np.abs(vectors).max(axis=1, initial=0) / np.float32(INT8_MAX)
    divisors = np.where(scales > 0, scales, 1).astype(np.float32)
    return np.rint(vectors / divisors[:, None]).astype(np.int8), scales.astype(np.float32)


# --- writing --------------------------------------------------------------------------------------

# The block from which on to give float32 rows [up to BLOCK_ROWS, width], one array a block.
BlocksFrom = Callable[[int], Iterator[np.ndarray]]


def ensure(index_dir: Path, about: About, blocks_from: BlocksFrom, what: str) -> None:
    """Writes the vectors of an index unless they are there; goes on where a killed build ended.

    what: is done, for progress. Raises InputError where there are vectors, or the beginning of
    some, of another encoder, corpus or dtype: they may have taken days, so none are replaced.
    """
    folder = index_dir / FOLDER
    if folder.exists():
        check_same(folder, about, about_of(folder))
        return
    work = index_dir / BUILDING
    try:
        work.mkdir(exist_ok=True)
        with _locked(work):
            if folder.exists():  # another process has built it meanwhile
                check_same(folder, about, about_of(folder))
                return
            _write(work, about, blocks_from, what)
            work.rename(folder)
            sync(index_dir)
    except OSError as error:
        raise InputError(f"{work}: expected a folder that can be written ({error})") from None


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Lets one process of this machine at a time write. The lock ends with the process."""
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(work: Path, about: About, blocks_from: BlocksFrom, what: str) -> None:
    if (work / META).exists():
        check_same(work, about, about_of(work))
    else:
        partial = work / f"{META}.partial"
        partial.write_text(json.dumps(about.to_json() | {"format": FORMAT}, indent=1))
        sync(partial)
        partial.rename(work / META)
    first = _whole_blocks(work, about)
    progress = Progress()
    names = about.sizes(0)
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(open(work / name, "r+b")) for name in names}
        for name, size in about.sizes(first).items():
            files[name].truncate(size)
            files[name].seek(size)
        for number, vectors in enumerate(blocks_from(first), first):
            parts = _encoded(vectors, about.dtype)
            parts[SUMS] = np.array([_sum(parts)], np.uint32)
            for name, part in parts.items():
                files[name].write(part.view(np.uint8).data)
                files[name].flush()
                os.fsync(files[name].fileno())
            done = number + 1
            progress(functools.partial(_describe, about, what, first, done))


def _whole_blocks(work: Path, about: About) -> int:
    """Blocks that a killed build has written whole; makes the files that are missing."""
    counts = []
    for name in about.sizes(0):
        (work / name).touch()
        size = (work / name).stat().st_size
        whole = [n for n in range(about.blocks + 1) if about.sizes(n)[name] <= size]
        counts.append(whole[-1])
    return min(counts)


def _encoded(vectors: np.ndarray, dtype: str) -> dict[str, np.ndarray]:
    """A block as its files hold it; file -> array."""
    if dtype == "int8":
        rows, scales = quantized(vectors)
        return {ROWS: rows, SCALES: scales}
    return {ROWS: vectors.astype(DTYPES[dtype])}


def _sum(parts: dict[str, np.ndarray]) -> int:
    total = 0
    for part in parts.values():
        total = zlib.crc32(np.ascontiguousarray(part).view(np.uint8).data, total)
    return total


def _describe(about: About, what: str, first: int, blocks: int, seconds: float) -> str:
    """A line of progress. first: blocks that were there before."""
    rows = min(blocks * BLOCK_ROWS, about.passages)
    rate = (rows - first * BLOCK_ROWS) / max(seconds, 1e-9)
    seconds_left = (about.passages - rows) / max(rate, 1e-9)
    share = f"{rows:,} of {about.passages:,} passages ({rows / about.passages:.0%})"
    return f"{what}: {share}, {rate:,.0f}/s, {seconds_left:,.0f} s left"


# --- reading --------------------------------------------------------------------------------------


def about_of(folder: Path) -> About:
    """What vectors are in a folder. Raises InputError."""
    try:
        values = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        values = None
    expected = f"{folder}: expected vectors of format {FORMAT}; its {META}"
    if not isinstance(values, dict):
        raise InputError(f"{expected} is missing or not a JSON object; {ANEW}")
    if values.get("format") != FORMAT:
        raise InputError(f"{expected} has format {values.get('format')!r}; {ANEW}")
    for key, kind in _META_TYPES.items():
        if type(values.get(key)) is not kind:
            raise InputError(f'{expected} has no "{key}" of type {kind.__name__}; {ANEW}')
    if values["dtype"] not in DTYPES or values["width"] < 1 or values["passages"] < 1:
        raise InputError(f"{expected} has a dtype, width or number of passages of none; {ANEW}")
    return About.from_json(values)


def check_same(folder: Path, expected: About, found: About) -> None:
    """Raises InputError unless the vectors in a folder are those that are expected."""
    if found.digest != expected.digest:
        raise InputError(
            f"{folder} was built by another encoder, {found.encoder} ({found.digest[:8]}); "
            f"expected {expected.encoder} ({expected.digest[:8]}), or {ANEW}"
        )
    same_name = dataclasses.replace(found, encoder=expected.encoder)
    old = same_name.to_json()
    for key, value in expected.to_json().items():
        if old[key] != value:
            raise InputError(
                f"{folder} was built with {key} {old[key]!r}; expected {value!r}, or {ANEW}"
            )


def open_vectors(index_dir: Path, corpus: str, passages: int, progress: Progress) -> Vectors:
    """Maps the vectors of an index and checks them. Raises InputError, one sentence.

    corpus, passages: of the index.
    """
    folder = index_dir / FOLDER
    if not folder.is_dir():
        raise InputError(
            f"{index_dir}: has no vectors; build them with python -m ssp_jax.retriever build "
            f"--kind=dense --encoder=FOLDER --out={index_dir}"
        )
    about = about_of(folder)
    if (about.corpus, about.passages) != (corpus, passages):
        raise InputError(
            f"{folder} has vectors of {about.passages:,} passages of another corpus; expected "
            f"those of the {passages:,} beside it; {ANEW}"
        )
    for name, size in about.sizes(about.blocks).items():
        path = folder / name
        size_on_disk = path.stat().st_size if path.is_file() else 0
        if size_on_disk != size:
            raise InputError(f"{path}: expected {size} bytes, found {size_on_disk}; {ANEW}")
    dtype = DTYPES[about.dtype]
    rows = np.asarray(np.memmap(folder / ROWS, dtype, "r", shape=(about.passages, about.width)))
    scales = None
    if about.dtype == "int8":
        scales = np.asarray(np.memmap(folder / SCALES, np.float32, "r"))
    vectors = Vectors(about, rows, scales)
    _check_blocks(folder, vectors, np.fromfile(folder / SUMS, np.uint32), progress)
    return vectors


def _check_blocks(folder: Path, vectors: Vectors, sums: np.ndarray, progress: Progress) -> None:
    """Compares each block with its sum, and refuses vectors that no score can be made of."""

    def fault(block: int) -> str:
        where = slice(block * BLOCK_ROWS, (block + 1) * BLOCK_ROWS)
        parts = {ROWS: vectors.rows[where]}
        if vectors.scales is not None:
            parts[SCALES] = vectors.scales[where]
        if _sum(parts) != sums[block]:
            return "expected the bytes that were written"
        return "" if vectors.is_finite(where) else "expected finite numbers, found NaN or infinity"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), thread_name_prefix="vectors") as pool:
        for block, message in enumerate(pool.map(fault, range(len(sums)))):
            progress.share(f"checking {ROWS}", block / len(sums))
            if message:
                first = block * BLOCK_ROWS
                raise InputError(f"{folder / ROWS}: {message}, from row {first:,} on; {ANEW}")
