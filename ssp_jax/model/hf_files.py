"""Model folders (on this machine, in a bucket, on the Hugging Face hub) and the safetensors files
in them.

The file format (8-byte header length, JSON header, raw tensors) is read and written here, without
the safetensors package: so a process can take just its own part of a tensor, from a disk or from a
bucket, and cut it along any axis.
"""

import atexit
import collections
import contextlib
import dataclasses
import functools
import json
import math
import mmap
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ssp_jax.errors import InputError, first_line, shown

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
Bounds = tuple[int, int]  # first, and one past the last
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # all that a model has beside its weights
_FILE_NAME = re.compile(r"(?!\.\.?$)[^/\\\0]{1,255}")
_MAX_HEADER_BYTES = 100_000_000  # as the format has it
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Folder:
    """A model folder: its small files are always local, its weights may lie in a bucket."""

    name: str  # as the user gave it
    path: Path  # local
    bucket: Any = None  # the fsspec file system that has the weights, None when they are in `path`
    prefix: str = ""  # of the weights' names in the bucket
    names: frozenset[str] = frozenset()  # of the files in the bucket

    def place(self, file: str) -> str:
        """How messages name a file."""
        return f"{self.name.rstrip('/')}/{file}"

    def read_json(self, file: str) -> dict[str, Any]:
        path, place = self.path / file, self.place(file)
        if not path.is_file():
            raise InputError(f"{place} does not exist; expected a Hugging Face folder with {file}")
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(f"{place} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"{place} is not valid JSON: {error}") from None
        except RecursionError:
            raise InputError(f"{place} is nested too deeply to be JSON of a model folder") from None
        if not isinstance(values, dict):
            raise InputError(f"{place} expected a JSON object, found {type(values).__name__}")
        return values

    def has(self, file: str) -> bool:
        return (self.path / file).is_file() or file in self.names

    def open(self, file: str) -> "_LocalFile | _BucketFile":
        if not self.has(file):
            raise InputError(f"{self.place(file)} does not exist; it should hold model weights")
        if self.bucket is not None:
            return _BucketFile(self.place(file), self.bucket, f"{self.prefix}/{file}")
        return _LocalFile(self.place(file), self.path / file)


def find(folder: str | Path) -> Folder:
    """The folder of a local path, of a URL that fsspec knows (gs://, s3://, ...) or of a hub name
    (Qwen/Qwen2.5-7B).
    """
    name = str(folder)
    if "://" in name:
        return _in_bucket(name)
    path = Path(folder).expanduser()
    try:
        if path.is_dir():
            return Folder(name, path)
        if path.exists():
            raise InputError(f"model folder {name} is a file; expected the folder that it is in")
    except OSError as error:  # such as a name that is too long
        raise InputError(f"model folder {name[:200]} cannot be read: {error.strerror}") from None
    if _HUB_NAME.fullmatch(name):
        return Folder(name, _from_hub(name))
    raise InputError(
        f"model folder {name} does not exist; expected a local folder, a URL such as gs://… or a hub name"
    )


@functools.cache  # small files are fetched once per process
def _in_bucket(url: str) -> Folder:
    import fsspec  # slow to import, and only needed here

    path = Path(tempfile.mkdtemp(prefix="ssp_jax_model_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    try:
        bucket, prefix = fsspec.core.url_to_fs(url)
        files = {
            Path(entry["name"]).name: entry["name"] for entry in bucket.ls(prefix, detail=True)
        }
        for name in files:
            if name.endswith(_SMALL_FILES):
                bucket.get_file(files[name], str(path / name))
    # the protocol's package is missing, or nobody knows the protocol
    except (ImportError, ValueError) as error:
        raise InputError(f"model folder {url} cannot be reached: {first_line(error)}") from None
    except FileNotFoundError:
        raise InputError(f"model folder {url} does not exist") from None
    except _bucket_errors() as error:
        raise InputError(f"model folder {url} cannot be read: {first_line(error)}") from None
    return Folder(url, path, bucket, prefix.rstrip("/"), frozenset(files))


def _bucket_errors() -> tuple[type[Exception], ...]:
    """What a store raises, such as for missing credentials: OSError, and what clients that are in
    use have beside it.

    (To be asked when something was raised: only then are they loaded.)
    """
    kinds = {
        "google.auth.exceptions": "GoogleAuthError",
        "gcsfs.retry": "HttpError",
        "botocore.exceptions": "BotoCoreError",
        "azure.core.exceptions": "AzureError",
    }
    return OSError, *(
        getattr(sys.modules[module], kind)
        for module, kind in kinds.items()
        if module in sys.modules
    )


@functools.cache
def _from_hub(name: str) -> Path:
    """The hub's local copy of a model, downloaded by those who have a network and no copy yet."""
    from huggingface_hub import snapshot_download  # only needed here

    wanted = ["*.safetensors", *(f"*{suffix}" for suffix in _SMALL_FILES)]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["*/*"]))
    # of the hub and the network, and of names that it cannot have
    except (OSError, ValueError) as error:
        reason = first_line(error)
        raise InputError(
            f"model {name} is neither a local folder nor to be had from the Hugging Face hub ({reason})"
        ) from None


# --- reading ---


class _LocalFile:
    """A mapped file: only the pages that somebody looks at are read, and each is given back as soon
    as it is copied.

    Without giving them back they would count as memory of this process, which would then hold the
    model twice.
    """

    # bytes that one thread handles at a time: few calls, and little memory beside the arrays
    chunk = 2**22

    def __init__(self, place: str, path: Path) -> None:
        self.place, self.size = place, path.stat().st_size
        with path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        self._bytes = np.frombuffer(self._map or b"", np.uint8)

    @contextlib.contextmanager
    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Bytes, to be used inside the `with` only."""
        yield self._bytes[begin:end]
        if self._map is not None and end > begin:
            page = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, end - page)


class _BucketFile:
    """A file that is read by ranges. A range is contiguous: what lies between the columns of a cut
    is read as well.
    """

    chunk = 2**24  # a request takes tens of milliseconds, whatever it brings

    def __init__(self, place: str, bucket: Any, path: str) -> None:
        self.place, self._bucket, self._path = place, bucket, path
        self.size = int(bucket.size(path))

    @contextlib.contextmanager
    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        yield np.frombuffer(self._bucket.cat_file(self._path, begin, end), np.uint8)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file. Nothing of it is read before `read`."""

    file: _LocalFile | _BucketFile
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int  # byte in the file

    @property
    def place(self) -> str:
        return f'{self.file.place}: tensor "{self.name[:200]}"'

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self, shape: Sequence[int], box: Sequence[Bounds]) -> np.ndarray:
        """A copy of one box of the tensor, which is seen in `shape` (its own, or axes split
        further).
        """
        row = math.prod(shape[1:]) * self.dtype.itemsize
        columns = tuple(slice(*bounds) for bounds in box[1:])
        with self.file.read(self.begin + box[0][0] * row, self.begin + box[0][1] * row) as raw:
            rows = raw.view(f"u{self.dtype.itemsize}").reshape(-1, *shape[1:])
            return rows[(slice(None), *columns)].copy().view(self.dtype)


def tensor_names(folder: Folder) -> frozenset[str]:
    """Names of all tensors; of a folder without weights none."""
    if folder.has(SINGLE_FILE):
        return frozenset(_open_file(folder, SINGLE_FILE))
    return frozenset(_weight_map(folder)) if folder.has(INDEX_FILE) else frozenset()


def open_tensors(folder: Folder) -> dict[str, Tensor]:
    """All tensors of a folder: from its single file, or from the files that the index names."""
    if folder.has(SINGLE_FILE):  # before an index, as transformers has it
        return _open_file(folder, SINGLE_FILE)
    if not folder.has(INDEX_FILE):
        raise InputError(
            f"{folder.name} has no model weights; expected {SINGLE_FILE} or {INDEX_FILE}"
        )
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values()))
    with ThreadPoolExecutor() as pool:
        found = dict(
            zip(files, pool.map(functools.partial(_open_file, folder), files), strict=True)
        )
    for name, file in weight_map.items():
        if name not in found[file]:
            raise InputError(
                f'{folder.place(file)}: tensor "{name}" is missing, though {INDEX_FILE} says it is there'
            )
    # transformers takes every tensor of the files, listed or not: no index may hide one.
    for file, tensors in found.items():
        for name in tensors:
            if weight_map.get(name) != file:
                other = weight_map.get(name, "no file")
                raise InputError(
                    f'{folder.place(INDEX_FILE)}: tensor "{name}" is missing from key "weight_map" '
                    f"for {file}, which has it; {other} is given"
                )
    return {name: found[file][name] for name, file in weight_map.items()}


def _weight_map(folder: Folder) -> dict[str, str]:
    """Tensor -> file of this folder."""
    index = folder.place(INDEX_FILE)
    weight_map = folder.read_json(INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise InputError(
            f'{index}: key "weight_map" is missing or does not give a file name for each tensor'
        )
    for file in sorted(set(weight_map.values())):
        if not _FILE_NAME.fullmatch(file):
            raise InputError(
                f'{index}: key "weight_map" gives the file {shown(file)}; expected one of this folder'
            )
    return weight_map


def _open_file(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a file, which must be exactly what follows the header: as safetensors' own
    reader has it.
    """
    file = folder.open(name)
    with file.read(0, min(8, file.size)) as raw:
        start = 8 + int.from_bytes(raw.tobytes(), "little")
    if file.size < 8 or start > file.size:
        raise InputError(
            f"{file.place} is truncated or not a safetensors file: it has {file.size} bytes"
        )
    header = _read_header(file, start)
    metadata = header.pop("__metadata__", None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(
        isinstance(text, str) for text in metadata.values()
    ):
        raise InputError(f"{file.place}: __metadata__ in its header is not an object of texts")
    tensors = {key: _open_tensor(file, start, key, entry) for key, entry in header.items()}
    end = start
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.begin, tensor.size)):
        if tensor.begin != end:
            what = "overlaps another tensor" if tensor.begin < end else "follows bytes of no tensor"
            raise InputError(
                f"{tensor.place} {what}: it begins at byte {tensor.begin}; expected {end}"
            )
        end += tensor.size
    if end != file.size:
        raise InputError(
            f"{file.place} has {file.size - end} bytes after its last tensor; expected none"
        )
    return tensors


def _read_header(file: Any, start: int) -> dict[str, Any]:
    if start - 8 > _MAX_HEADER_BYTES:
        raise InputError(
            f"{file.place}: its header has {start - 8} bytes; expected at most {_MAX_HEADER_BYTES}"
        )

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (twice, _), *_ = collections.Counter(name for name, _ in pairs).most_common(1)
            raise InputError(f"{file.place}: its header has {shown(twice)} twice")
        return values

    try:
        with file.read(8, start) as raw:
            header = json.loads(raw.tobytes(), object_pairs_hook=without_duplicates)
    except InputError:
        raise
    except (ValueError, RecursionError):
        raise InputError(
            f"{file.place} is not a safetensors file: its header is not valid JSON"
        ) from None
    if not isinstance(header, dict):
        raise InputError(f"{file.place} is not a safetensors file: its header is not a JSON object")
    return header


def _open_tensor(file: Any, start: int, name: str, entry: Any) -> Tensor:
    place = f'{file.place}: tensor "{name[:200]}"'
    try:
        kind, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{place} has no dtype, shape and data_offsets in the header") from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        found = f"shape {shown(shape)} and offsets {shown([begin, end])}"
        raise InputError(f"{place} has {found}; expected natural numbers")
    if not isinstance(kind, str) or kind not in DTYPES:
        name_of_it = kind[:20] if isinstance(kind, str) else shown(kind)
        raise InputError(f"{place} has dtype {name_of_it}; expected {', '.join(DTYPES)}")
    if start + end > file.size:
        raise InputError(
            f"{place} ends at byte {start + end}, but the file is truncated: it has {file.size}"
        )
    if math.prod(shape) * DTYPES[kind].itemsize != end - begin:
        raise InputError(f"{place} of shape {shown(shape)} has {end - begin} bytes")
    return Tensor(file, name, DTYPES[kind], shape, start + begin)


# --- writing ---

# file -> process that writes it, shapes of its tensors
Plan = dict[str, tuple[int, dict[str, tuple[int, ...]]]]


def plan_files(
    owners: dict[str, int], shapes: dict[str, tuple[int, ...]], dtype: np.dtype, max_bytes: int
) -> Plan:
    """Files of at most `max_bytes` (a larger tensor has its own), each with tensors of one process."""
    files: list[tuple[int, dict[str, tuple[int, ...]]]] = []
    for process in sorted(set(owners.values())):
        filled = max_bytes
        for tensor, shape in shapes.items():
            if owners[tensor] == process:
                size = math.prod(shape) * dtype.itemsize
                if filled + size > max_bytes:
                    files.append((process, {}))
                    filled = 0
                files[-1][1][tensor] = shape
                filled += size
    if len(files) == 1:
        return {SINGLE_FILE: files[0]}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": file
        for number, file in enumerate(files, 1)
    }


def write_file(
    path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterator[np.ndarray], tag: str
) -> None:
    """One safetensors file with the next arrays; tag is their dtype, a key of DTYPES."""
    # transformers refuses files without it
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * DTYPES[tag].itemsize
        header[tensor] = {"dtype": tag, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in shapes:
            file.write(next(arrays).view(np.uint8).data)
