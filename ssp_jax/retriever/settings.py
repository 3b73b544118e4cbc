"""What a user says of dense search: kinds, bounds, and the keys of an encoder. Knows no JAX."""

import dataclasses

from ssp_jax.errors import InputError

KINDS = ("dense", "hybrid")  # of searches that need vectors
MAX_TOP_K = 50  # each candidate costs a device a block of rows
ALL = -1.0  # GiB of a device: as many as there are vectors, none on CPUs
POOLINGS = ("mean", "cls")
DTYPES = ("bfloat16", "int8")  # of vectors


@dataclasses.dataclass(frozen=True)
class EncoderKeys:
    """What the user says of an encoder, where its folder does not."""

    pooling: str = "mean"  # of POOLINGS
    normalize: bool = True
    query_prefix: str = ""
    passage_prefix: str = ""


@dataclasses.dataclass(frozen=True)
class DenseSettings:
    """How dense search runs."""

    encoder: str  # Hugging Face folder
    keys: EncoderKeys | None = None  # None: as the vectors were built
    device_gib: float = ALL
    device_dtype: str = "bfloat16"  # of DTYPES


def check_flags(kind: str, encoder: str, top_k: int) -> None:
    """Raises InputError unless the flags of a command make a search."""
    if kind in KINDS and not encoder:
        raise InputError(
            f"flag --encoder is missing; expected a Hugging Face folder with --kind={kind}"
        )
    if kind in KINDS and top_k > MAX_TOP_K:
        raise InputError(
            f"flag --top_k is {top_k}; expected at most {MAX_TOP_K} with --kind={kind}"
        )
