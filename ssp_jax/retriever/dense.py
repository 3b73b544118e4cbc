"""Dense search in this process: a query becomes a vector, and finds the passages next to it.

The passages' vectors are on the devices of this process, split over them row by row, or in host
memory, or partly here and partly there. A batch of queries is encoded and searched by one jitted
program, on each device over its own rows; nothing is sent between devices. What devices find are
candidates, some more than are asked for: their scores are computed once more on the host, in
float32 and always in the same order, so that a result depends on the query alone.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from ssp_jax.errors import InputError
from ssp_jax.model.decoder import Params
from ssp_jax.retriever import encoder, encoder_files, index, topk, vectors
from ssp_jax.retriever.build import recover
from ssp_jax.retriever.encoder import EncoderConfig, Pooling
from ssp_jax.retriever.encoder_files import TextEncoder, padded
from ssp_jax.retriever.index import Passages
from ssp_jax.retriever.progress import Progress
from ssp_jax.retriever.search import Hits, LocalRetriever, Retriever
from ssp_jax.retriever.settings import MAX_TOP_K, DenseSettings, EncoderKeys
from ssp_jax.retriever.vectors import About, Vectors
from ssp_jax.runtime import device_memory
from ssp_jax.runtime.dispatch import compile_together

# A query is padded to one of these numbers of tokens, or to the encoder's longest text; its vector
# depends on that number, to the last bit, so it follows from the query alone.
QUERY_TOKENS = (16, 32, 128)
QUERY_BATCHES = (8, 64, 256)  # a batch is padded to one of these numbers of queries
# Queries are encoded so many at a time: the same program gives a query the same vector, to the last
# bit, whatever the size of its batch.
GROUP = QUERY_BATCHES[0]
_AXIS = "shards"

# Reciprocal rank fusion (Cormack et al. 2009) adds 1 / (60 + rank) up over both searches, of each
# of which the best MAX_TOP_K passages count [H].
_RANK_CONSTANT = 60


@dataclasses.dataclass(frozen=True)
class Shape:
    """What programs are compiled for."""

    config: EncoderConfig
    pooling: Pooling
    dtype: str  # of the encoder's arithmetic
    candidates: int = 0  # of a device
    chunk: int = 0  # rows scored at a time
    mesh: Mesh | None = None  # None: the rows are in host memory


class Shards(NamedTuple):
    """The vectors on devices: the rows of one device, then those of the next."""

    rows: Any  # of vectors.DTYPES, [devices * rows of one, D]
    scales: Any  # float32 [devices * rows of one], None for bfloat16
    counts: Any  # int32 [devices], rows that are no padding


def _encode(s: Shape, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array) -> jax.Array:
    def group(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        return encoder.encode(s.config, s.pooling, params, *rows, s.dtype)

    groups = (tokens_BT.reshape(-1, GROUP, tokens_BT.shape[1]), lengths_B.reshape(-1, GROUP))
    return jax.lax.map(group, groups).reshape(len(tokens_BT), -1)


@functools.partial(jax.jit, static_argnums=0)
def encode_queries(
    s: Shape, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array
) -> tuple[jax.Array, ...]:
    """The queries' vectors, float32 [1, B, D]."""
    return (_encode(s, params, tokens_BT, lengths_B)[None],)


@functools.partial(jax.jit, static_argnums=0)
def encode_and_search(
    s: Shape, params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, shards: Shards
) -> tuple[jax.Array, ...]:
    """The queries' vectors, and each device's candidates: scores, and rows among its own.

    The first axis of each is that of the devices: [devices, B, D] and twice [devices, B, k].
    """

    def on_device(
        params: Params, tokens_BT: jax.Array, lengths_B: jax.Array, shard: Shards
    ) -> tuple[jax.Array, ...]:
        queries_BD = _encode(s, params, tokens_BT, lengths_B)
        found = topk.device_top(
            queries_BD, shard.rows, shard.scales, shard.counts[0], s.candidates, s.chunk
        )
        return tuple(x[None] for x in (queries_BD, *found))

    split = P(_AXIS)
    assert s.mesh is not None
    run = jax.shard_map(
        on_device, mesh=s.mesh, in_specs=(P(), P(), P(), split), out_specs=split, check_vma=False
    )
    return run(params, tokens_BT, lengths_B, shards)


# --- rows on devices ------------------------------------------------------------------------------


def candidates(top_k: int) -> int:
    """How many of a device's rows are scored once more for a query.

    More than top_k, for a device compares rounded numbers: bfloat16 queries, int8 rows.
    """
    return 2 * top_k + 16


def rows_per_device(rows: int, size: int, devices: int, gib: float) -> int:
    """Rows on each device, so that they take at most `gib` with their padding; ALL: all rows.

    Where not all fit, those of all devices together are the first ones. size: bytes of a row.
    """
    each = -(-rows // devices)
    if gib < 0:
        return each
    limit = int(gib * device_memory.GIB / size)
    limit -= limit % (topk.CHUNK if limit >= topk.CHUNK else topk.BLOCK)
    return min(each, limit)


def row_bytes(width: int, dtype: str) -> int:
    """Bytes of a row on a device, with its scale."""
    return width * vectors.DTYPES[dtype].itemsize + (4 if dtype == "int8" else 0)


@functools.partial(jax.jit, donate_argnums=0)
def _put(target: jax.Array, part: jax.Array, first: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(target, part, first, axis=0)


def put_rows(found: Vectors, each: int, dtype: str, mesh: Mesh) -> Shards:
    """The first rows of the vectors, `each` on a device; chunk by chunk, to need little memory."""
    devices = list(mesh.devices.flat)
    chunk = topk.chunk_rows(each)
    padded = topk.padded_rows(each)
    columns: defaultdict[str, list[jax.Array]] = defaultdict(list)
    counts = []
    progress = Progress()
    for number, device in enumerate(devices):
        first = number * each
        last = min(first + each, len(found.rows))
        counts.append(max(0, last - first))
        shape = (padded, found.about.width)
        columns["rows"].append(jnp.zeros(shape, vectors.DTYPES[dtype], device=device))
        if dtype == "int8":
            columns["scales"].append(jnp.zeros((padded,), np.float32, device=device))
        for at in range(0, counts[-1], chunk):
            progress.share("vectors to devices", (first + at) / len(found.rows))
            for name, part in _part(found, first + at, min(first + at + chunk, last), dtype):
                whole = np.zeros((chunk, *part.shape[1:]), part.dtype)
                whole[: len(part)] = part
                columns[name][-1] = _put(columns[name][-1], whole, np.int32(at))
    columns["counts"] = [
        jax.device_put(np.array([count], np.int32), device)
        for count, device in zip(counts, devices, strict=True)
    ]
    split = NamedSharding(mesh, P(_AXIS))

    def joined(parts: list[jax.Array]) -> jax.Array:
        shape = (len(parts) * len(parts[0]), *parts[0].shape[1:])
        return jax.make_array_from_single_device_arrays(shape, split, parts)

    arrays = {name: joined(parts) for name, parts in columns.items()}
    return Shards(arrays["rows"], arrays.get("scales"), arrays["counts"])


def _part(found: Vectors, first: int, last: int, dtype: str) -> Iterator[tuple[str, np.ndarray]]:
    """Rows as a device holds them, and their scales."""
    where = slice(first, last)
    if dtype != "int8":
        yield "rows", found.rows[where]
        return
    rows, scales = found.rows[where], found.scales
    if scales is None:
        rows, of_rows = vectors.quantized(found.float32(where))
    else:
        of_rows = scales[where]
    yield "rows", rows
    yield "scales", of_rows


# --- searching ------------------------------------------------------------------------------------


class DenseRetriever(LocalRetriever):
    """Vectors of an index and their encoder. Every query but a blank one finds top_k passages."""

    def __init__(
        self,
        passages: Passages,
        found: Vectors,
        text_encoder: TextEncoder,
        settings: DenseSettings,
        top_k: int,
    ) -> None:
        """Compiles all programs. top_k: the most that will be asked for, at most MAX_TOP_K."""
        about = found.about
        dtype = "int8" if about.dtype == "int8" else settings.device_dtype
        without_name = dataclasses.replace(about, encoder="")
        super().__init__(passages, f"{without_name.to_json()} as {dtype}")
        self._vectors = found
        self._encoder = text_encoder
        self._top_k = top_k
        longest = about.recipe.max_tokens
        self._lengths = sorted({*(n for n in QUERY_TOKENS if n < longest), longest})

        devices = jax.local_devices()
        on_cpu = devices[0].platform == "cpu"
        gib = 0.0 if on_cpu and settings.device_gib < 0 else settings.device_gib
        size = row_bytes(about.width, dtype)
        self._each = rows_per_device(len(found.rows), size, len(devices), gib)
        mesh = Mesh(np.array(devices if self._each else devices[:1]), (_AXIS,))
        self._shape = Shape(
            config=text_encoder.config,
            pooling=about.recipe.pooling,
            dtype="float32" if on_cpu else "bfloat16",
            candidates=candidates(top_k),
            chunk=topk.chunk_rows(self._each),
            mesh=mesh if self._each else None,
        )
        with device_memory.must_fit("the search index", "less of config key retriever.device_gib"):
            self._params = jax.device_put(text_encoder.params, NamedSharding(mesh, P()))
            self._shards = put_rows(found, self._each, dtype, mesh) if self._each else None
            self._batches = QUERY_BATCHES if self._each else (GROUP,)
            calls = [(batch, length) for length in self._lengths for batch in self._batches]
            lowered = [self._program(*padded([], *call), lower=True) for call in calls]
            compiled = compile_together(lowered)
        self.program_bytes = max(map(device_memory.program_bytes, compiled))

    @classmethod
    def load(
        cls,
        index_dir: str | Path,
        settings: DenseSettings,
        top_k: int,
        passages: Passages | None = None,
    ) -> "DenseRetriever":
        """Opens the vectors of an index. passages: its own, where they are open already.

        Raises InputError.
        """
        folder = Path(index_dir)
        recover(folder)
        try:
            meta = index.read_meta(folder)
            if passages is None:
                meta, passages = index.open_passages(folder, Progress())
            corpus = meta["corpus"]["sha256"]
            found = vectors.open_vectors(folder, corpus, len(passages), Progress())
        except OSError as error:
            raise InputError(f"{folder}: expected an index that can be read ({error})") from None
        about = found.about
        text_encoder = encoder_files.load(settings.encoder, settings.keys or EncoderKeys())
        if settings.keys is None:
            text_encoder = dataclasses.replace(text_encoder, recipe=about.recipe)
        own = About.of(text_encoder, corpus, len(passages), about.dtype)
        vectors.check_same(folder / vectors.FOLDER, own, about)
        return cls(passages, found, text_encoder, settings, top_k)

    def _program(self, tokens_BT: np.ndarray, lengths_B: np.ndarray, lower: bool = False) -> Any:
        """The results of the program, or, to be compiled, the program."""
        arguments: tuple[Any, ...] = (self._shape, self._params, tokens_BT, lengths_B)
        program: Any = encode_queries
        if self._shards is not None:
            program = encode_and_search
            arguments += (self._shards,)
        return program.lower(*arguments) if lower else program(*arguments)

    def _search(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        if top_k > self._top_k:
            raise ValueError(f"top_k is {top_k} in a search that was loaded for {self._top_k}")
        asked = [i for i, query in enumerate(queries) if query.strip()]
        tokens = self._encoder.query_tokens([queries[i] for i in asked])
        hits: list[Hits] = [()] * len(queries)
        for places, results in self._run(tokens):
            rows = self._merge(len(places), *jax.device_get(results))
            for place, found in zip(places, self._ranked(*rows, top_k), strict=True):
                hits[asked[place]] = found
        return hits

    def _run(self, tokens: Sequence[list[int]]) -> list[tuple[list[int], tuple[Any, ...]]]:
        """The programs' results, and whose they are. All are started before one is read."""
        by_length = defaultdict(list)
        for place, own in enumerate(tokens):
            by_length[next(n for n in self._lengths if len(own) <= n)].append(place)
        running = []
        for length, places in sorted(by_length.items()):
            for first in range(0, len(places), max(self._batches)):
                some = places[first : first + max(self._batches)]
                batch = next(n for n in self._batches if len(some) <= n)
                own_tokens = [tokens[place] for place in some]
                running.append((some, self._program(*padded(own_tokens, batch, length))))
        return running

    def _merge(
        self,
        number: int,
        queries: np.ndarray,
        scores: np.ndarray | None = None,
        rows: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Vectors [B, D] of the first `number` queries, and candidates [B, k]; row -1: none."""
        queries_BD = queries[0, :number]
        parts = []
        on_devices = 0
        if scores is not None and rows is not None:
            on_devices = min(len(scores) * self._each, len(self._vectors.rows))
            firsts = self._each * np.arange(len(scores))[:, None, None]
            numbers = np.where(np.isfinite(scores), rows + firsts, -1)
            parts.append(np.moveaxis(numbers, 0, 1).reshape(len(numbers[0]), -1)[:number])
        if on_devices < len(self._vectors.rows):
            _, of_host = topk.host_top(
                queries_BD,
                self._vectors.float32,
                on_devices,
                len(self._vectors.rows),
                self._shape.candidates,
            )
            parts.append(of_host)
        return queries_BD, np.concatenate(parts, axis=1)

    def _ranked(self, queries_BD: np.ndarray, rows: np.ndarray, top_k: int) -> Iterator[Hits]:
        """The best top_k of each query's candidates, by their scores in float32."""
        for query_D, own in zip(queries_BD, rows, strict=True):
            own = own[own >= 0]
            # Summed up number by number, as no matrix product is.
            scores = (self._vectors.float32(own) * query_D[None]).sum(axis=1)
            order = np.lexsort((own, -scores))[:top_k]
            yield tuple(zip(own[order].tolist(), scores[order].tolist(), strict=True))


class HybridRetriever(LocalRetriever):
    """BM25 and dense search of one index, fused by reciprocal rank."""

    def __init__(self, sparse: Retriever, dense: DenseRetriever) -> None:
        super().__init__(sparse.passages, f"{sparse.source} and {dense.source}")
        self.program_bytes = dense.program_bytes
        self._parts = (sparse, dense)

    def _search(self, queries: Sequence[str], top_k: int) -> list[Hits]:
        scores: list[defaultdict[int, float]] = [defaultdict(float) for _ in queries]
        for part in self._parts:
            for own, hits in zip(scores, part.hits(queries, MAX_TOP_K), strict=True):
                for rank, (row, _) in enumerate(hits, 1):
                    own[row] += 1 / (_RANK_CONSTANT + rank)
        fused = []
        for own in scores:
            ranked = sorted(own.items(), key=lambda hit: (-hit[1], hit[0]))
            fused.append(tuple(ranked[:top_k]))
        return fused


def load_local(
    kind: str,
    index_dir: str | Path,
    *,
    threads: int,
    top_k: int,
    settings: DenseSettings,
) -> LocalRetriever:
    """The search of a kind, bm25, dense or hybrid, in an index that is built. Raises InputError."""
    if kind == "dense":
        return DenseRetriever.load(index_dir, settings, top_k)
    sparse = Retriever.load(index_dir, threads)
    if kind == "bm25":
        return sparse
    dense = DenseRetriever.load(index_dir, settings, MAX_TOP_K, sparse.passages)
    return HybridRetriever(sparse, dense)
