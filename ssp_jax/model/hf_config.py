"""config.json of a Hugging Face folder → ModelConfig, by the rules of transformers.

Where transformers 4 and 5 have different keys for one setting, transformers' precedence holds. A
key that would give other numbers than transformers' is refused by name, and so is a size that no
model has: the size of everything that follows depends on it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ssp_jax.errors import InputError, shown
from ssp_jax.model.decoder import ModelConfig, RopeScaling
from ssp_jax.model.hf_files import ADAPTER_CONFIG, Folder

FILE = "config.json"
# model_type -> what `architectures` says beside it
ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Defaults of transformers, for keys that published folders leave out. Other keys must be there.
LLAMA_ROPE_THETA = 10000.0
QWEN3_HEAD_DIM = 128
NORM_EPS = 1e-6
_CONTEXT_TOKENS = {"qwen2": 32768, "qwen3": 32768, "llama": 2048}

# Largest accepted values: several times those of published models, or the largest that make sense.
_INTS = {
    "vocab_size": 2**24,
    "num_hidden_layers": 1000,
    "hidden_size": 2**18,
    "num_attention_heads": 2**12,
    "num_key_value_heads": 2**12,
    "head_dim": 2**14,
    "intermediate_size": 2**20,
    "max_position_embeddings": 2**32,
    "original_max_position_embeddings": 2**32,
    "r": 2**14,
}
_FLOATS = {
    "rms_norm_eps": 1.0,
    "layer_norm_eps": 1.0,
    "rope_theta": 1e15,
    "factor": 1e6,
    "low_freq_factor": 1e6,
    "high_freq_factor": 1e6,
    "lora_alpha": 1e6,
}
# Values with which we compute what transformers computes. A missing key counts as the first one.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),  # two names of one function
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "use_sliding_window": (False,),
    "is_causal": (True,),
    "quantization_config": (None,),
    "compression_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "per_layer_config": (None,),
    "text_config": (None,),
    "vision_config": (None,),
    "transformers_weights": (None,),  # another file than model.safetensors
}
# Ignored, because they change nothing that is computed here: attention_dropout (the update
# needs the log-probs that were sampled, without dropout), initializer_range, use_cache,
# pretraining_tp (the same product in pieces), dtype and torch_dtype (model.dtype and --dtype
# decide), sliding_window and max_window_layers (without use_sliding_window).


@dataclasses.dataclass(frozen=True)
class Keys:
    """The keys of a JSON object, and where it is, for messages."""

    place: str
    values: Mapping[str, Any]

    def wrong(self, key: str, what: str) -> InputError:
        return InputError(f'{self.place}: key "{key}" {what}')

    def number(self, key: str, default: float | None = None) -> Any:
        """A positive int or float, within _INTS or _FLOATS. Raises InputError.

        An int is accepted for a float.
        """
        kind: type[int] | type[float] = int if key in _INTS else float
        value = self.values.get(key, default)
        if value is None and key not in self.values:
            raise self.wrong(key, "is missing")
        is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not is_number or not value > 0:
            raise self.wrong(key, f"expected a positive {kind.__name__}, found {shown(value)}")
        maximum = _INTS[key] if key in _INTS else _FLOATS[key]
        if value > maximum:
            raise self.wrong(key, f"is {shown(value)}; expected at most {maximum:g}")
        return kind(value)

    def is_true(self, key: str) -> bool:
        """Whether the key is there and true. Raises InputError for what is no boolean."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.wrong(key, f"expected true or false, found {shown(value)}")
        return value


def read(folder: Folder) -> ModelConfig:
    """The shape of the model as config.json declares it. Raises InputError."""
    if folder.has(ADAPTER_CONFIG) and not folder.has(FILE):
        raise InputError(
            f"{folder.place(FILE)} does not exist and {ADAPTER_CONFIG} does; expected the folder "
            "of the adapter's base here, and this one as model.adapter (--adapter of generate)"
        )
    keys = Keys(folder.place(FILE), folder.read_json(FILE))
    kind = _architecture(keys)
    refuse_code(folder, FILE, keys.values)
    _check_supported(keys, kind)
    _check_model_type(keys, kind)
    embed_dim = keys.number("hidden_size")
    heads = keys.number("num_attention_heads")
    kv_heads = _kv_heads(keys, kind, heads)
    theta, scaling = _rope(keys, kind)
    return ModelConfig(
        vocab_size=keys.number("vocab_size"),
        num_layers=keys.number("num_hidden_layers"),
        embed_dim=embed_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=_head_dim(keys, kind, embed_dim, heads),
        mlp_dim=keys.number("intermediate_size"),
        rope_theta=theta,
        rope_scaling=scaling,
        norm_eps=keys.number("rms_norm_eps", NORM_EPS),
        tie_embeddings=keys.is_true("tie_word_embeddings"),
        qkv_bias=kind == "qwen2",
        qk_norm=kind == "qwen3",
    )


def context_tokens(folder: Folder) -> int:
    """The longest context, in tokens, for which the model has positions, with RoPE scaling."""
    keys = Keys(folder.place(FILE), folder.read_json(FILE))
    kind = _architecture(keys)
    tokens = keys.number("max_position_embeddings", _CONTEXT_TOKENS[kind])
    _, scaling = _rope(keys, kind)
    if scaling is None:
        return int(tokens)
    return max(tokens, int(scaling.factor * scaling.original_max_position_embeddings))


def refuse_code(folder: Folder, file: str, values: Mapping[str, Any]) -> None:
    """Raises InputError for auto_map: it names Python files of the folder for transformers to run.

    file: where `values` come from.
    """
    if values.get("auto_map"):
        raise InputError(
            f'{folder.place(file)}: key "auto_map" asks to run code of the model folder, which is '
            "never done; remove the key if transformers' own code gives the same"
        )


def _architecture(keys: Keys) -> str:
    """The model type, a key of ARCHITECTURES."""
    listed = keys.values.get("architectures")
    if listed is not None and not isinstance(listed, list):
        raise keys.wrong("architectures", f"expected a list of names, found {shown(listed)}")
    architecture = (listed or [None])[0]
    for kind, name in ARCHITECTURES.items():
        if name == architecture:
            return kind
    supported = ", ".join(ARCHITECTURES.values())
    raise keys.wrong("architectures", f"is {shown(architecture)}; supported are {supported}")


def _check_model_type(keys: Keys, kind: str) -> None:
    """transformers reads this key alone, so it must agree with `architectures`."""
    found = keys.values.get("model_type", kind)
    if found != kind:
        expected = f'expected "{kind}", as {ARCHITECTURES[kind]} has it'
        raise keys.wrong("model_type", f"is {shown(found)}; {expected}")


def _check_supported(keys: Keys, kind: str) -> None:
    for key, supported in _SUPPORTED.items():
        if key == "attention_bias" and kind == "qwen2":
            continue  # its code has biases at q, k and v and ignores the key
        if key in keys.values and keys.values[key] not in supported:
            only = f"only {supported[0]!r} is supported"
            raise keys.wrong(key, f"is {shown(keys.values[key])}; {only}")
    layers = keys.values.get("layer_types")
    if layers is None:
        return
    if not isinstance(layers, list):
        raise keys.wrong("layer_types", f"expected a list of names, found {shown(layers)}")
    for layer in layers:
        if layer != "full_attention":
            only = 'only "full_attention" is supported'
            raise keys.wrong("layer_types", f"contains {shown(layer)}; {only}")


def _kv_heads(keys: Keys, kind: str, heads: int) -> int:
    """Key/value heads of grouped-query attention. Older Llamas have no key: as many as heads."""
    key = "num_key_value_heads"
    is_absent = key not in keys.values
    if keys.values.get(key) is None and (kind == "llama" or not is_absent):
        return heads
    kv_heads: int = keys.number(key)
    if heads % kv_heads:
        raise keys.wrong(key, f"is {kv_heads}, which does not divide {heads} heads")
    return kv_heads


def _head_dim(keys: Keys, kind: str, embed_dim: int, heads: int) -> int:
    head_dim: int
    if keys.values.get("head_dim") is not None or (kind == "qwen3" and "head_dim" in keys.values):
        head_dim = keys.number("head_dim")
    elif kind == "qwen3":
        head_dim = QWEN3_HEAD_DIM
    elif embed_dim % heads == 0:
        head_dim = embed_dim // heads
    else:
        reason = f"{heads} heads do not divide hidden_size {embed_dim}"
        raise keys.wrong("head_dim", f"is missing and {reason}")
    if head_dim % 2:
        raise keys.wrong("head_dim", f"is {head_dim}; rotary positions need an even number")
    return head_dim


def _rope(keys: Keys, kind: str) -> tuple[float, RopeScaling | None]:
    """rope_theta and the RoPE scaling.

    transformers 5 writes both into rope_parameters, 4 wrote rope_theta and rope_scaling. Where both
    objects are present transformers 5 takes all of rope_scaling: model cards say to add one. A
    rope_theta inside the object wins over the one beside it.
    """
    scaling = _object(keys, "rope_scaling")
    parameters = _object(keys, "rope_parameters")
    beside = {key: keys.values[key] for key in ("rope_theta",) if key in keys.values}
    default = {"rope_theta": LLAMA_ROPE_THETA} if kind == "llama" else {}
    rope = Keys(keys.place, default | beside | (scaling or parameters))
    for key, value in rope.values.items():
        if isinstance(value, dict):
            raise rope.wrong(key, "is an object; rotary positions are the same in all layers here")
    factor = rope.values.get("partial_rotary_factor")
    if factor not in _SUPPORTED["partial_rotary_factor"]:
        raise rope.wrong("partial_rotary_factor", f"is {shown(factor)}; only 1.0 is supported")
    name = rope.values.get("rope_type", rope.values.get("type", "default"))
    if name not in ("default", "llama3"):
        only = 'only "default" and "llama3" are supported'
        raise rope.wrong("rope_type", f"is {shown(name)}; {only}")
    if scaling and "rope_theta" in parameters and "rope_theta" not in scaling | beside:
        # transformers would fall back to its default, which cannot be meant with both objects.
        raise keys.wrong("rope_scaling", 'replaces "rope_parameters" and lacks its rope_theta')
    theta = rope.number("rope_theta")
    if name == "default":
        return theta, None
    return theta, _llama3(keys, rope)


def _object(keys: Keys, key: str) -> dict[str, Any]:
    value = keys.values.get(key)
    if value is not None and not isinstance(value, dict):
        raise keys.wrong(key, f"expected a JSON object, found {shown(value)}")
    return value or {}


def _llama3(keys: Keys, rope: Keys) -> RopeScaling:
    factors = {key: rope.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if factors["low_freq_factor"] >= factors["high_freq_factor"]:
        raise rope.wrong("low_freq_factor", "expected a number below high_freq_factor")
    # transformers' order: the key beside the object, the key inside it, the whole context.
    key = "original_max_position_embeddings"
    if key in keys.values:
        length = keys.number(key)
    elif key not in rope.values and "max_position_embeddings" in keys.values:
        length = Keys(keys.place, {key: keys.values["max_position_embeddings"]}).number(key)
    else:
        length = rope.number(key)
    return RopeScaling(**factors, original_max_position_embeddings=length)
