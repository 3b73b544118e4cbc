"""The Hugging Face folder of an encoder: shape, weights, tokenizer, and what is done around it.

How hidden states become a vector, and what is put before a text, stand in the files that
sentence-transformers adds to a folder. Where a folder has none, the user's keys say it.
"""

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ssp_jax.errors import InputError, shown
from ssp_jax.model import decoder, hf_config, hf_files, hf_tokenizer
from ssp_jax.model.decoder import Params
from ssp_jax.model.hf_config import Keys
from ssp_jax.model.hf_files import Folder, Tensor
from ssp_jax.model.hf_table import Name
from ssp_jax.retriever.encoder import EncoderConfig, Pooling
from ssp_jax.retriever.settings import POOLINGS, EncoderKeys

MODULES = "modules.json"  # what sentence-transformers does with a text, in order
PROMPTS = "config_sentence_transformers.json"
LENGTH = "sentence_bert_config.json"
# Names of poolings in sentence-transformers, of new folders and of old ones.
_POOLING_NAMES = {"mean": "pooling_mode_mean_tokens", "cls": "pooling_mode_cls_token"}
# Names of prompts for passages: "document" is sentence-transformers' own.
_PASSAGE_PROMPTS = ("document", "passage", "corpus")
# Values with which we compute what transformers computes. A missing key counts as the first one.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
# Parts that turn hidden states into something else than a vector.
_UNUSED = ("pooler.", "cls.")

_LAYER = "encoder.layer.{}."
_SELF = _LAYER + "attention.self."
_AFTER = _LAYER + "attention.output."
# The parameters; axes in the letters of ssp_jax/__init__.py.
TABLE = (
    Name("embed/tokens", "embeddings.word_embeddings.weight", "V D", "VD"),
    Name("embed/positions", "embeddings.position_embeddings.weight", "T D", "TD"),
    Name("embed/norm/scale", "embeddings.LayerNorm.weight", "D", "D"),
    Name("embed/norm/bias", "embeddings.LayerNorm.bias", "D", "D"),
    Name("layers/attention/q/kernel", _SELF + "query.weight", "NH D", "DNH"),
    Name("layers/attention/q/bias", _SELF + "query.bias", "NH", "NH"),
    Name("layers/attention/k/kernel", _SELF + "key.weight", "NH D", "DNH"),
    Name("layers/attention/k/bias", _SELF + "key.bias", "NH", "NH"),
    Name("layers/attention/v/kernel", _SELF + "value.weight", "NH D", "DNH"),
    Name("layers/attention/v/bias", _SELF + "value.bias", "NH", "NH"),
    Name("layers/attention/o/kernel", _AFTER + "dense.weight", "D NH", "NHD"),
    Name("layers/attention/o/bias", _AFTER + "dense.bias", "D", "D"),
    Name("layers/attention_norm/scale", _AFTER + "LayerNorm.weight", "D", "D"),
    Name("layers/attention_norm/bias", _AFTER + "LayerNorm.bias", "D", "D"),
    Name("layers/up/kernel", _LAYER + "intermediate.dense.weight", "F D", "DF"),
    Name("layers/up/bias", _LAYER + "intermediate.dense.bias", "F", "F"),
    Name("layers/down/kernel", _LAYER + "output.dense.weight", "D F", "FD"),
    Name("layers/down/bias", _LAYER + "output.dense.bias", "D", "D"),
    Name("layers/mlp_norm/scale", _LAYER + "output.LayerNorm.weight", "D", "D"),
    Name("layers/mlp_norm/bias", _LAYER + "output.LayerNorm.bias", "D", "D"),
)
# One row for each token type, of which a text alone has type 0.
TOKEN_TYPES = "embeddings.token_type_embeddings.weight"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is done with a text before and after the encoder."""

    pooling: Pooling
    query_prefix: str
    passage_prefix: str
    max_tokens: int  # what is longer is cut


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """An encoder with its tokenizer. Its params are in host memory, float32."""

    name: str  # of its folder, as the user gave it
    digest: str  # of weights, shape and tokenizer
    config: EncoderConfig
    recipe: Recipe
    params: Params
    tokenizer: Any  # of the package tokenizers, which threads may share

    def query_tokens(self, queries: Sequence[str]) -> list[list[int]]:
        return self._tokens(self.recipe.query_prefix, queries)

    def passage_tokens(self, passages: Sequence[str]) -> list[list[int]]:
        return self._tokens(self.recipe.passage_prefix, passages)

    def _tokens(self, prefix: str, texts: Sequence[str]) -> list[list[int]]:
        prefixed = [prefix + text for text in texts]
        return [encoded.ids for encoded in self.tokenizer.encode_batch(prefixed)]


def padded(
    token_lists: Sequence[list[int]], rows: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
    """Token numbers [rows, length] and lengths [rows] of these texts, int32, padded with zeros."""
    tokens_BT = np.zeros((rows, length), np.int32)
    lengths_B = np.zeros((rows,), np.int32)
    for row, tokens in enumerate(token_lists):
        tokens_BT[row, : len(tokens)] = tokens
        lengths_B[row] = len(tokens)
    return tokens_BT, lengths_B


def load(folder: str | Path, keys: EncoderKeys) -> TextEncoder:
    """The encoder of a folder. Raises InputError."""
    found = hf_files.find(folder)
    config = read_config(found)
    recipe = read_recipe(found, config, keys)
    tokenizer = _load_tokenizer(found, config, recipe.max_tokens)
    leaves = _load_leaves(found, config)
    digest = hashlib.blake2b(f"{config} {tokenizer.to_str()}".encode(), digest_size=16)
    for path in sorted(leaves):
        digest.update(leaves[path].data)
    params = decoder.unflatten(leaves)
    return TextEncoder(str(folder), digest.hexdigest(), config, recipe, params, tokenizer)


def read_config(folder: Folder) -> EncoderConfig:
    """The shape in config.json. Raises InputError where it is not BERT's architecture."""
    keys = Keys(folder.place(hf_config.FILE), folder.read_json(hf_config.FILE))
    hf_config.refuse_code(folder, hf_config.FILE, keys.values)
    kind = keys.values.get("model_type")
    if kind != "bert":
        raise keys.wrong("model_type", f'is {shown(kind)}; only encoders of "bert" are supported')
    for key, supported in _SUPPORTED.items():
        value = keys.values.get(key, supported[0])
        if value not in supported:
            raise keys.wrong(key, f"is {shown(value)}; only {supported[0]!r} is supported")
    config = EncoderConfig(
        vocab_size=keys.number("vocab_size"),
        num_layers=keys.number("num_hidden_layers"),
        embed_dim=keys.number("hidden_size"),
        num_heads=keys.number("num_attention_heads"),
        mlp_dim=keys.number("intermediate_size"),
        positions=keys.number("max_position_embeddings"),
        norm_eps=keys.number("layer_norm_eps", EncoderConfig.norm_eps),
    )
    if config.embed_dim % config.num_heads:
        raise keys.wrong("hidden_size", f"is no multiple of {config.num_heads} attention heads")
    return config


# --- what sentence-transformers adds --------------------------------------------------------------


def read_recipe(folder: Folder, config: EncoderConfig, keys: EncoderKeys) -> Recipe:
    """Pooling, prefixes and length of the folder's files, or else of the user's keys.

    Raises InputError.
    """
    prompts = folder.read_json(PROMPTS).get("prompts") if folder.has(PROMPTS) else None
    prompts = prompts or {}
    texts = prompts.values() if isinstance(prompts, dict) else [None]
    if not all(isinstance(text, str) for text in texts):
        raise InputError(f'{folder.place(PROMPTS)}: key "prompts" expected an object of texts')
    of_passages = [prompts[name] for name in _PASSAGE_PROMPTS if prompts.get(name)]
    return Recipe(
        pooling=_pooling(folder, keys),
        query_prefix=prompts.get("query") or keys.query_prefix,
        passage_prefix=of_passages[0] if of_passages else keys.passage_prefix,
        max_tokens=_max_tokens(folder, config),
    )


def _max_tokens(folder: Folder, config: EncoderConfig) -> int:
    if not folder.has(LENGTH):
        return config.positions
    values = folder.read_json(LENGTH)
    length = values.get("max_seq_length") or config.positions
    if type(length) is not int or not 2 < length <= config.positions:
        raise InputError(
            f'{folder.place(LENGTH)}: key "max_seq_length" expected a number of tokens up to '
            f"{config.positions}, found {shown(length)}"
        )
    return length


def _pooling(folder: Folder, keys: EncoderKeys) -> Pooling:
    if not folder.has(MODULES):
        return Pooling(keys.pooling, keys.normalize)
    place = folder.place(MODULES)
    try:
        modules = json.loads((folder.path / MODULES).read_text(encoding="utf-8"))
        steps = [(module["type"].rpartition(".")[2], module["path"]) for module in modules]
    except (ValueError, RecursionError, TypeError, KeyError, AttributeError):
        raise InputError(
            f'{place}: expected a list of modules of sentence-transformers, each with "type" and '
            '"path"'
        ) from None
    names = [name for name, _ in steps]
    if names not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise InputError(
            f"{place}: has the modules {', '.join(map(shown, names))}; "
            "supported are Transformer, Pooling and Normalize, in this order"
        )
    return Pooling(_pooling_kind(folder, steps[1][1]), "Normalize" in names)


def _pooling_kind(folder: Folder, module: Any) -> str:
    """The pooling of a module's folder, of POOLINGS."""
    if not isinstance(module, str) or "/" in module or ".." in module:
        raise InputError(f"{folder.place(MODULES)}: {shown(module)} is no folder of a module")
    file = f"{module}/config.json"
    values = folder.read_json(file)
    kind = values.get("pooling_mode")
    if kind is None:
        chosen = [
            name for name, value in values.items() if name.startswith("pooling_mode") and value
        ]
        kinds = [kind for kind, name in _POOLING_NAMES.items() if chosen == [name]]
        kind = kinds[0] if kinds else chosen
    if kind not in POOLINGS:
        raise InputError(
            f"{folder.place(file)}: pools by {shown(kind)}; supported are {', '.join(POOLINGS)}"
        )
    return kind


# --- tokenizer and weights ------------------------------------------------------------------------


def _load_tokenizer(folder: Folder, config: EncoderConfig, max_tokens: int) -> Any:
    tokenizer = hf_tokenizer.load(folder, config.vocab_size).backend_tokenizer
    # Whatever the file says of these: a program pads, and knows the longest text.
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_tokens)
    return tokenizer


def axis_sizes(config: EncoderConfig) -> dict[str, int]:
    """The size of each letter of TABLE."""
    return {
        "V": config.vocab_size,
        "T": config.positions,
        "D": config.embed_dim,
        "N": config.num_heads,
        "H": config.head_dim,
        "F": config.mlp_dim,
    }


def _load_leaves(folder: Folder, config: EncoderConfig) -> dict[str, np.ndarray]:
    """Path in params -> float32 array. Raises InputError."""
    tensors = _open_tensors(folder)
    sizes = axis_sizes(config)
    leaves = {}
    for name in TABLE:
        layers = range(config.num_layers if name.layered else 1)
        shape = name.file_shape(sizes)
        order = [name.split.index(letter) for letter in name.axes]
        of_layers = []
        for layer in layers:
            array = _read(folder, tensors, name.tensor.format(layer), shape)
            apart = array.reshape([sizes[letter] for letter in name.split])
            of_layers.append(apart.transpose(order))
        stacked = np.stack(of_layers) if name.layered else of_layers[0]
        leaves[name.path] = np.ascontiguousarray(stacked)
    rows = tensors[TOKEN_TYPES].shape[0] if TOKEN_TYPES in tensors else 1
    types = _read(folder, tensors, TOKEN_TYPES, (max(rows, 1), config.embed_dim))
    leaves["embed/positions"] += types[:1]
    return leaves


def _open_tensors(folder: Folder) -> dict[str, Tensor]:
    """The tensors by their names in a bare BertModel. Raises InputError for unknown ones."""
    known = {TOKEN_TYPES, *(name.tensor for name in TABLE)}
    tensors = {}
    for name, tensor in hf_files.open_tensors(folder).items():
        bare = name.removeprefix("bert.")
        if bare.startswith(_UNUSED) or bare.endswith(hf_files.POSITIONS):
            continue
        words = bare.split(".")
        if len(words) > 2 and words[:2] == ["encoder", "layer"]:
            words[2] = "{}"
        if ".".join(words) not in known:
            raise InputError(f"{tensor.place} is not part of the encoder in config.json")
        tensors[bare] = tensor
    return tensors


def _read(
    folder: Folder, tensors: dict[str, Tensor], name: str, shape: tuple[int, ...]
) -> np.ndarray:
    """A tensor of this shape, as float32. Raises InputError."""
    if name not in tensors:
        raise InputError(f'{folder.name}: tensor "{name}" is missing from its weights')
    tensor = tensors[name]
    if tensor.shape != shape:
        raise InputError(
            f"{tensor.place} has shape {shown(tensor.shape)}; config.json asks for {shape}"
        )
    array = tensor.read(shape, [(0, size) for size in shape]).astype(np.float32)
    if not np.isfinite(array).all():
        raise InputError(f"{tensor.place} has values that are not finite (NaN or infinity)")
    return array
