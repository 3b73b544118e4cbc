"""Model folders (local, in a bucket, on the Hugging Face hub) and their safetensors files.

The file format (8-byte header length, JSON header, raw tensors) is read and written here, without
the safetensors package: so a process reads only its own shard of a tensor, from a disk or from a
bucket, cut along any axis.
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
from typing import Any, TypeGuard

import ml_dtypes
import numpy as np

from ssp_jax.errors import InputError, first_line, shown

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# Of a folder of PEFT, which holds an adapter and not its base.
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
# The end of the name of a table of whole numbers that old folders of encoders hold; it is not read.
POSITIONS = "embeddings.position_ids"
Bounds = tuple[int, int]  # first, and one past the last
_SMALL_FILES = (".json", ".txt", ".model", ".jinja")  # all that a model has beside its weights
_FILE_NAME = re.compile(r"(?!\.\.?$)[^/\\\0]{1,255}")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the format
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
        """The JSON object of one of the small files. Raises InputError."""
        path = self.path / file
        place = self.place(file)
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
        """Whether the file exists, on this machine or in the bucket."""
        return (self.path / file).is_file() or file in self.names

    def open(self, file: str) -> "_LocalFile | _BucketFile":
        """A file of weights. Raises InputError if it does not exist."""
        if not self.has(file):
            raise InputError(f"{self.place(file)} does not exist; it should hold model weights")
        if self.bucket is not None:
            return _BucketFile(self.place(file), self.bucket, f"{self.prefix}/{file}")
        return _LocalFile(self.place(file), self.path / file)


def find(folder: str | Path) -> Folder:
    """The folder at a local path, a URL of fsspec (gs://...) or a hub name (Qwen/Qwen2.5-7B).

    Raises InputError.
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
        f"model folder {name} does not exist; "
        "expected a local folder, a URL such as gs://… or a hub name"
    )


def is_hub_name(folder: str) -> bool:
    """Whether a folder is none of this machine, but a name of the Hugging Face hub."""
    return bool(_HUB_NAME.fullmatch(folder)) and not Path(folder).exists()


@functools.cache  # small files are fetched once per process
def _in_bucket(url: str) -> Folder:
    """A folder in a bucket, with a local copy of its small files."""
    import fsspec  # slow to import, and only needed here

    path = Path(tempfile.mkdtemp(prefix="ssp_jax_model_"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    try:
        bucket, prefix = fsspec.core.url_to_fs(url)
        entries = bucket.ls(prefix, detail=True)
        files = {Path(entry["name"]).name: entry["name"] for entry in entries}
        for name in files:
            if name.endswith(_SMALL_FILES):
                bucket.get_file(files[name], str(path / name))
    # The package of the protocol is not installed, or fsspec does not know the protocol.
    except (ImportError, ValueError) as error:
        raise InputError(f"model folder {url} cannot be reached: {first_line(error)}") from None
    except FileNotFoundError:
        raise InputError(f"model folder {url} does not exist") from None
    except _bucket_errors() as error:
        raise InputError(f"model folder {url} cannot be read: {first_line(error)}") from None
    return Folder(url, path, bucket, prefix.rstrip("/"), frozenset(files))


def _bucket_errors() -> tuple[type[Exception], ...]:
    """Errors that a store raises, such as for missing credentials: OSError, and its client's own.

    To be called when an error was raised: only then is the client imported.
    """
    clients = {
        "google.auth.exceptions": "GoogleAuthError",
        "gcsfs.retry": "HttpError",
        "botocore.exceptions": "BotoCoreError",
        "azure.core.exceptions": "AzureError",
    }
    errors: list[type[Exception]] = [OSError]
    for module, name in clients.items():
        if module in sys.modules:
            errors.append(getattr(sys.modules[module], name))
    return tuple(errors)


@functools.cache
def _from_hub(name: str) -> Path:
    """The hub's local copy of a model, downloaded first where there is none."""
    from huggingface_hub import snapshot_download  # only needed here

    wanted = ["*.safetensors", *(f"*{suffix}" for suffix in _SMALL_FILES)]
    try:
        # Folders hold other forms of the same weights, but for an encoder's 1_Pooling.
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=["[!1]*/*"]))
    # OSError: of the hub and the network. ValueError: no valid name.
    except (OSError, ValueError) as error:
        raise InputError(
            f"model {name} is neither a local folder nor to be had from the Hugging Face hub "
            f"({first_line(error)})"
        ) from None


# --- reading ---


class _LocalFile:
    """A memory-mapped file, whose pages are released once they are copied.

    Otherwise they would count as memory of this process, which would hold the model twice.
    """

    # Bytes that one thread handles at a time: few calls, and little memory beside the arrays.
    chunk = 2**22

    def __init__(self, place: str, path: Path) -> None:
        self.place = place
        self.size = path.stat().st_size
        with path.open("rb") as file:
            # An empty file cannot be mapped.
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if self.size else None
        self._bytes = np.frombuffer(self._map or b"", np.uint8)

    @contextlib.contextmanager
    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        """Bytes (uint8), to be used inside the `with` only."""
        yield self._bytes[begin:end]
        if self._map is not None and end > begin:
            page = begin - begin % mmap.PAGESIZE
            self._map.madvise(mmap.MADV_DONTNEED, page, end - page)


class _BucketFile:
    """A file that is read by contiguous ranges, also where only some columns are needed."""

    chunk = 2**24  # a request takes tens of milliseconds, however few bytes it gets

    def __init__(self, place: str, bucket: Any, path: str) -> None:
        self.place = place
        self._bucket = bucket
        self._path = path
        self.size = int(bucket.size(path))

    @contextlib.contextmanager
    def read(self, begin: int, end: int) -> Iterator[np.ndarray]:
        yield np.frombuffer(self._bucket.cat_file(self._path, begin, end), np.uint8)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a file, known by its header; `read` reads it."""

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
        """A copy of one box of the tensor. shape: its own, or with axes split further."""
        row_bytes = math.prod(shape[1:]) * self.dtype.itemsize
        begin = self.begin + box[0][0] * row_bytes
        end = self.begin + box[0][1] * row_bytes
        columns = [slice(*bounds) for bounds in box[1:]]
        with self.file.read(begin, end) as raw:
            rows = raw.view(f"u{self.dtype.itemsize}").reshape(-1, *shape[1:])
            return rows[(slice(None), *columns)].copy().view(self.dtype)


def tensor_names(folder: Folder) -> frozenset[str]:
    """Names of all tensors; none of a folder without weights. Raises InputError."""
    if folder.has(SINGLE_FILE):
        return frozenset(open_file(folder, SINGLE_FILE))
    if folder.has(INDEX_FILE):
        return frozenset(_weight_map(folder))
    return frozenset()


def open_tensors(folder: Folder) -> dict[str, Tensor]:
    """All tensors of a folder, by name, from its single file or the files in its index.

    Raises InputError.
    """
    if folder.has(SINGLE_FILE):  # as in transformers, it wins over an index
        return open_file(folder, SINGLE_FILE)
    if not folder.has(INDEX_FILE):
        raise InputError(
            f"{folder.name} has no model weights; expected {SINGLE_FILE} or {INDEX_FILE}"
        )
    weight_map = _weight_map(folder)
    files = sorted(set(weight_map.values()))
    with ThreadPoolExecutor() as pool:
        opened = pool.map(functools.partial(open_file, folder), files)
        tensors_of_file = dict(zip(files, opened, strict=True))
    _check_weight_map(folder, weight_map, tensors_of_file)
    return {name: tensors_of_file[file][name] for name, file in weight_map.items()}


def _check_weight_map(
    folder: Folder, weight_map: dict[str, str], tensors_of_file: dict[str, dict[str, Tensor]]
) -> None:
    """Raises InputError unless the index lists exactly the tensors of the files."""
    for name, file in weight_map.items():
        if name not in tensors_of_file[file]:
            raise InputError(
                f'{folder.place(file)}: tensor "{name}" is missing, '
                f"though {INDEX_FILE} says it is there"
            )
    # transformers takes every tensor of the files, listed or not: no index may hide one.
    for file, tensors in tensors_of_file.items():
        for name in tensors:
            if weight_map.get(name) != file:
                other = weight_map.get(name, "no file")
                raise InputError(
                    f'{folder.place(INDEX_FILE)}: tensor "{name}" is missing from key "weight_map" '
                    f"for {file}, which has it; {other} is given"
                )


def _weight_map(folder: Folder) -> dict[str, str]:
    """The index: tensor -> file of this folder. Raises InputError."""
    index = folder.place(INDEX_FILE)
    weight_map = folder.read_json(INDEX_FILE).get("weight_map")
    if not _is_object_of_texts(weight_map):
        raise InputError(
            f'{index}: key "weight_map" is missing or does not give a file name for each tensor'
        )
    for file in sorted(set(weight_map.values())):
        if not _FILE_NAME.fullmatch(file):
            raise InputError(
                f'{index}: key "weight_map" gives the file {shown(file)}; '
                "expected one of this folder"
            )
    return weight_map


def _is_object_of_texts(value: Any) -> TypeGuard[dict[str, str]]:
    return isinstance(value, dict) and all(isinstance(text, str) for text in value.values())


def open_file(folder: Folder, name: str) -> dict[str, Tensor]:
    """The tensors of a file. Raises InputError.

    They must fill exactly the bytes after the header, as safetensors' own reader demands.
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
    if metadata is not None and not _is_object_of_texts(metadata):
        raise InputError(f"{file.place}: __metadata__ in its header is not an object of texts")
    tensors = {key: _open_tensor(file, start, key, entry) for key, entry in header.items()}
    _check_layout(file, start, tensors)
    return tensors


def _check_layout(file: "_LocalFile | _BucketFile", start: int, tensors: dict[str, Tensor]) -> None:
    """Raises InputError unless the tensors fill the file from `start` on, gapless and disjoint."""
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


def _read_header(file: Any, start: int) -> dict[str, Any]:
    """The JSON object in the bytes from 8 to `start`. Raises InputError."""
    if start - 8 > _MAX_HEADER_BYTES:
        raise InputError(
            f"{file.place}: its header has {start - 8} bytes; expected at most {_MAX_HEADER_BYTES}"
        )

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            [(twice, _)] = collections.Counter(name for name, _ in pairs).most_common(1)
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
    """The tensor of a header's entry; `start` is where the header ends. Raises InputError."""
    place = f'{file.place}: tensor "{name[:200]}"'
    try:
        tag = entry["dtype"]
        shape = tuple(entry["shape"])
        begin, end = entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise InputError(f"{place} has no dtype, shape and data_offsets in the header") from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        found = f"shape {shown(shape)} and offsets {shown([begin, end])}"
        raise InputError(f"{place} has {found}; expected natural numbers")
    dtypes = DTYPES | {"I64": np.dtype(np.int64)} if name.endswith(POSITIONS) else DTYPES
    if not isinstance(tag, str) or tag not in dtypes:
        found = tag[:20] if isinstance(tag, str) else shown(tag)
        raise InputError(f"{place} has dtype {found}; expected {', '.join(DTYPES)}")
    if start + end > file.size:
        raise InputError(
            f"{place} ends at byte {start + end}, but the file is truncated: it has {file.size}"
        )
    if math.prod(shape) * dtypes[tag].itemsize != end - begin:
        raise InputError(f"{place} of shape {shown(shape)} has {end - begin} bytes")
    return Tensor(file, name, dtypes[tag], shape, start + begin)


# --- writing ---

Shapes = dict[str, tuple[int, ...]]  # tensor -> its shape
FilePlan = dict[str, tuple[int, Shapes]]  # file -> the process that writes it, its tensors


def plan_files(
    owners: dict[str, int],
    shapes: Shapes,
    dtype: np.dtype,
    max_bytes: float,
    single_file: str = SINGLE_FILE,
) -> FilePlan:
    """Deals tensors out to files of at most `max_bytes`, each with tensors of one process.

    owners: tensor -> process. A tensor of more than `max_bytes` has a file of its own.
    single_file: the name where one file holds all.
    """
    files: list[tuple[int, Shapes]] = []
    for process in sorted(set(owners.values())):
        own: Shapes = {}
        filled = 0
        for tensor, shape in shapes.items():
            if owners[tensor] != process:
                continue
            size = math.prod(shape) * dtype.itemsize
            if not own or filled + size > max_bytes:
                own = {}
                filled = 0
                files.append((process, own))
            own[tensor] = shape
            filled += size
    if len(files) == 1:
        return {single_file: files[0]}
    names = [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    return dict(zip(names, files, strict=True))


def write_file(path: Path, shapes: Shapes, arrays: Iterator[np.ndarray], tag: str) -> None:
    """Writes one safetensors file with the next arrays; tag is their dtype, a key of DTYPES."""
    # transformers refuses files without the metadata.
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes.items():
        begin = end
        end += math.prod(shape) * DTYPES[tag].itemsize
        header[tensor] = {"dtype": tag, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format asks for aligned tensors
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _ in shapes:
            file.write(next(arrays).view(np.uint8).data)
