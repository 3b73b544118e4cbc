"""Dense search of a config, from shapes: what it keeps on a device, and its largest program."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from ssp_jax.errors import InputError
from ssp_jax.model import hf_files
from ssp_jax.retriever import dense, encoder, encoder_files, index, settings, topk, vectors
from ssp_jax.retriever.encoder import EncoderConfig, Pooling

WIKI_18 = 21_015_324  # passages of the paper's corpus
# Published shapes, from the config.json of each encoder on the Hugging Face hub.
_SMALL = EncoderConfig(30522, 12, 384, 12, 1536, 512)
_BASE = EncoderConfig(30522, 12, 768, 12, 3072, 512)
_LARGE = EncoderConfig(30522, 24, 1024, 16, 4096, 512)
ENCODERS = {
    "e5-small-v2": _SMALL,
    "e5-base-v2": _BASE,
    "e5-large-v2": _LARGE,
    "bge-small-en-v1.5": _SMALL,
    "bge-base-en-v1.5": _BASE,
    "bge-large-en-v1.5": _LARGE,
    "all-MiniLM-L6-v2": EncoderConfig(30522, 6, 384, 12, 1536, 512),
}
QUERIES = dense.QUERY_BATCHES[-1]  # of the largest program


@dataclasses.dataclass(frozen=True)
class DenseSearch:
    """The search of a config on one host's devices."""

    encoder: EncoderConfig
    passages: int
    dtype: str  # of vectors.DTYPES
    gib: float  # retriever.device_gib
    candidates: int
    devices: int

    @property
    def rows(self) -> int:
        """Rows on each device, without padding."""
        size = dense.row_bytes(self.encoder.embed_dim, self.dtype)
        return dense.rows_per_device(self.passages, size, self.devices, self.gib)

    @property
    def index_bytes(self) -> float:
        """Bytes of a device's rows."""
        rows = topk.padded_rows(self.rows) if self.rows else 0
        return float(rows * dense.row_bytes(self.encoder.embed_dim, self.dtype))

    @property
    def parameters(self) -> int:
        return sum(math.prod(x.shape) for x in jax.tree.leaves(_abstract_params(self.encoder)))

    @property
    def bytes(self) -> float:
        """Bytes of a device's rows, and of the encoder, float32."""
        return self.index_bytes + 4 * self.parameters

    @property
    def temporaries(self) -> float:
        """Bytes while the largest program runs, an estimate."""
        chunk = topk.chunk_rows(self.rows)
        width = self.encoder.embed_dim
        blocks = topk.padded_rows(self.rows) / topk.BLOCK
        maxima = 2 * QUERIES * blocks * 4
        chunks = QUERIES * chunk * 4 + chunk * width * 2
        rescored = 2 * topk.GROUP * min(self.candidates, blocks) * topk.BLOCK * width * 2
        return maxima + max(chunks, rescored)

    def program(self, devices: Any) -> tuple[Any, tuple[Any, ...]]:
        """The largest program, and the shapes that it is compiled for. devices: of one host."""
        mesh = Mesh(np.asarray(devices).ravel(), ("shards",))
        shape = dense.Shape(
            config=self.encoder,
            pooling=Pooling("mean", normalize=True),
            dtype="bfloat16",
            candidates=self.candidates,
            chunk=topk.chunk_rows(self.rows),
            mesh=mesh,
        )

        def struct(dtype: Any, *sizes: int, split: bool = False) -> jax.ShapeDtypeStruct:
            where = NamedSharding(mesh, P("shards") if split else P())
            return jax.ShapeDtypeStruct(sizes, dtype, sharding=where)

        params = jax.tree.map(lambda x: struct(x.dtype, *x.shape), _abstract_params(self.encoder))
        rows = self.devices * topk.padded_rows(self.rows)
        shards = dense.Shards(
            rows=struct(vectors.DTYPES[self.dtype], rows, self.encoder.embed_dim, split=True),
            scales=struct(jnp.float32, rows, split=True) if self.dtype == "int8" else None,
            counts=struct(jnp.int32, self.devices, split=True),
        )
        tokens_BT = struct(jnp.int32, QUERIES, self.encoder.positions)
        arguments = (shape, params, tokens_BT, struct(jnp.int32, QUERIES), shards)
        return dense.encode_and_search, arguments


_abstract_params = functools.cache(encoder.abstract_params)


def dense_search(config: ConfigDict, devices: int) -> DenseSearch | None:
    """None for a config without dense search. devices: of a host."""
    c = config.retriever
    if c.kind not in settings.VECTOR_KINDS:
        return None
    depth = settings.MAX_TOP_K if c.kind == "hybrid" else c.top_k
    return DenseSearch(
        encoder=read_encoder(c.encoder),
        passages=_passages(c.index),
        dtype=c.device_dtype,
        gib=c.device_gib,
        candidates=dense.candidates(depth),
        devices=devices,
    )


@functools.cache
def read_encoder(name: str) -> EncoderConfig:
    """The shape of the encoder of a folder, or of a published one by its name.

    Raises InputError.
    """
    if (Path(name) / "config.json").is_file():
        return encoder_files.read_config(hf_files.find(name))
    last = name.rstrip("/").rpartition("/")[2].lower()
    for known, shape in ENCODERS.items():
        if known.lower() == last:
            return shape
    raise InputError(
        f"config key retriever.encoder is {name!r}: no config.json is there; expected a Hugging "
        f"Face folder, or for planning one of {', '.join(ENCODERS)}"
    )


@functools.cache
def _passages(index_dir: str) -> int:
    """Passages of the config's index, or, where it is not there, of the paper's corpus."""
    if not index_dir or not (Path(index_dir) / index.META).is_file():
        return WIKI_18
    passages: int = index.read_meta(Path(index_dir))["passages"]
    return passages
