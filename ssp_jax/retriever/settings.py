"""What a user says of search: languages, kinds, bounds, keys of an encoder. Knows no JAX."""

import dataclasses

from ssp_jax.errors import InputError

# Of PyStemmer 3.1: Snowball's languages, and two older algorithms. "" leaves words as they are.
STEMMERS = (
    "",
    "arabic",
    "armenian",
    "basque",
    "catalan",
    "czech",
    "danish",
    "dutch",
    "dutch_porter",
    "english",
    "esperanto",
    "estonian",
    "finnish",
    "french",
    "german",
    "greek",
    "hindi",
    "hungarian",
    "indonesian",
    "irish",
    "italian",
    "lithuanian",
    "nepali",
    "norwegian",
    "persian",
    "polish",
    "porter",
    "portuguese",
    "romanian",
    "russian",
    "serbian",
    "sesotho",
    "spanish",
    "swedish",
    "tamil",
    "turkish",
    "yiddish",
)
# Name -> the list of bm25s, of the languages whose words are set apart by spaces.
STOPWORDS = {
    "": "",
    "en": "STOPWORDS_EN",
    "danish": "STOPWORDS_DANISH",
    "dutch": "STOPWORDS_DUTCH",
    "french": "STOPWORDS_FRENCH",
    "german": "STOPWORDS_GERMAN",
    "italian": "STOPWORDS_ITALIAN",
    "norwegian": "STOPWORDS_NORWEGIAN",
    "portuguese": "STOPWORDS_PORTUGUESE",
    "russian": "STOPWORDS_RUSSIAN",
    "spanish": "STOPWORDS_SPANISH",
    "swedish": "STOPWORDS_SWEDISH",
    "turkish": "STOPWORDS_TURKISH",
}

# Kinds of search: those that need vectors, and those of an index.
VECTOR_KINDS = ("dense", "hybrid")
INDEX_KINDS = ("bm25", *VECTOR_KINDS)
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
    if kind in VECTOR_KINDS and not encoder:
        raise InputError(
            f"flag --encoder is missing; expected a Hugging Face folder with --kind={kind}"
        )
    if kind in VECTOR_KINDS and top_k > MAX_TOP_K:
        raise InputError(
            f"flag --top_k is {top_k}; expected at most {MAX_TOP_K} with --kind={kind}"
        )
