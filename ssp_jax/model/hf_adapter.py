"""A folder of PEFT (adapter_config.json, adapter_model.safetensors) → Lora and adapter params.

What the keys mean is PEFT's, as of 0.21.2 (peft/tuners/lora/config.py, layer.py). A key with which
an adapter would compute something else than W x + scale * B A x, with the W of its base, is refused
by name. hf_save.py is the way back.
"""

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ssp_jax.errors import InputError, shown
from ssp_jax.model import hf_files, hf_load, hf_table
from ssp_jax.model.decoder import PROJECTIONS, ModelConfig, Params
from ssp_jax.model.hf_config import Keys
from ssp_jax.model.hf_files import ADAPTER_CONFIG, ADAPTER_FILE, Folder, Tensor
from ssp_jax.model.hf_table import Name
from ssp_jax.model.linear import Lora

_PICKLE = "adapter_model.bin"  # of older versions: loading it could run code
# Defaults of PEFT, for keys that a folder leaves out.
_RANK = 8
_ALPHA = 8
# Values with which an adapter computes what is computed here. A missing key counts as the first.
_SUPPORTED: dict[str, tuple[Any, ...]] = {
    "task_type": (None, "CAUSAL_LM"),
    "bias": ("none",),
    "use_dora": (False,),
    "lora_bias": (False,),
    "use_qalora": (False,),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layers_pattern": (None, [], ""),
    "layer_replication": (None, []),
    "target_parameters": (None, []),
    "trainable_token_indices": (None,),
    "alora_invocation_tokens": (None,),
    "megatron_config": (None,),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "use_bdlora": (None,),
    "velora_config": (None,),
}
# How A and B began, where that leaves the base's weights alone. The others (pissa, olora, corda,
# loftq, lora_ga) change them, and do so again when PEFT loads the adapter.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva", "mica")
_READ = frozenset(
    (
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "exclude_modules",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
    )
)
# They change nothing that an adapter computes: where it came from, how it began, and how it is run.
# fan_in_fan_out is of GPT-2's layers; for a linear layer PEFT itself takes it as false.
_IGNORED = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    )
)
_EMPTY: tuple[Any, ...] = (None, False, "", [], {})
_SUPPORTED_LAYERS = f"supported are {', '.join(PROJECTIONS)}"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What adapter_config.json says."""

    lora: Lora
    dropout: float  # probability with which its training dropped an input; nothing drops here


def read(folder: str | Path, base: ModelConfig) -> Adapter:
    """The adapter in a folder, for a base of this shape. Raises InputError."""
    found = hf_files.find(folder)
    keys = Keys(found.place(ADAPTER_CONFIG), found.read_json(ADAPTER_CONFIG))
    _check_supported(keys)
    rank = keys.number("r", _RANK)
    alpha = keys.number("lora_alpha", _ALPHA)
    _check_pattern(keys, "rank_pattern", "r", rank)
    _check_pattern(keys, "alpha_pattern", "lora_alpha", alpha)
    lora = Lora(rank, alpha, _targets(keys, base), keys.is_true("use_rslora"))
    return Adapter(lora, _dropout(keys))


def check_tensors(folder: str | Path, config: ModelConfig) -> str:
    """Checks the file's header and one row of each tensor, as `load` would. Raises InputError.

    Returns a digest of these rows. config: of the base, with the folder's Lora.
    """
    return hf_load.digest_rows(_open_tensors(hf_files.find(folder), config))


def load(folder: str | Path, config: ModelConfig, shardings: Params | None, dtype: Any) -> Params:
    """The adapter's params, of `dtype`, stacked. Raises InputError.

    config: of the base, with the folder's Lora. shardings: as in hf_load.load.
    """
    tensors = _open_tensors(hf_files.find(folder), config)
    names = hf_table.adapter_table(config)
    return hf_load.read_params(names, tensors, config, shardings, dtype)


def document(lora: Lora, base: str) -> dict[str, Any]:
    """adapter_config.json of an adapter, with PEFT's keys in PEFT's order. base: name or folder.

    It has the keys that PEFT has had since 0.9, so that old versions read it without a warning;
    those of later versions are at their defaults.
    """
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(lora.targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rank_stabilized,
    }


# --- adapter_config.json --------------------------------------------------------------------------


def _check_supported(keys: Keys) -> None:
    values = keys.values
    if values.get("peft_type") != "LORA":
        raise keys.wrong("peft_type", f'is {shown(values.get("peft_type"))}; expected "LORA"')
    for key, supported in _SUPPORTED.items():
        if key in values and values[key] not in supported:
            only = " or ".join(map(repr, supported))
            raise keys.wrong(key, f"is {shown(values[key])}; only {only} is supported")
    init = values.get("init_lora_weights")
    if (init.lower() if isinstance(init, str) else init) not in _INITS:
        raise keys.wrong(
            "init_lora_weights",
            f"is {shown(init)}, which may change the base's weights; "
            f"supported are {', '.join(map(repr, _INITS[1:]))}",
        )
    known = _SUPPORTED.keys() | _READ | _IGNORED
    for key, value in values.items():
        if key not in known and value not in _EMPTY:
            unknown = "is unknown and may change what the adapter computes"
            raise keys.wrong(key[:100], f"{unknown}; expected a key of PEFT's LoraConfig")


def _check_pattern(keys: Keys, key: str, of: str, expected: float) -> None:
    """Raises InputError where some layers have another rank or alpha. of: the key of all others."""
    pattern = keys.values.get(key)
    if pattern is not None and not isinstance(pattern, dict):
        raise keys.wrong(key, f"expected a JSON object, found {shown(pattern)}")
    for layers, value in (pattern or {}).items():
        if value != expected:
            only = f'only that of "{of}", {expected:g}, is supported'
            raise keys.wrong(key, f"gives {shown(layers)} {shown(value)}; {only}")


def _dropout(keys: Keys) -> float:
    value = keys.values.get("lora_dropout", 0.0)
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= 1:
        raise keys.wrong("lora_dropout", f"expected a number from 0 to 1, found {shown(value)}")
    return float(value)


# --- the layers that have an adapter --------------------------------------------------------------


def _targets(keys: Keys, base: ModelConfig) -> tuple[str, ...]:
    """The projections that target_modules and exclude_modules pick, in the order of PROJECTIONS.

    A stacked parameter has all layers: a projection has an adapter in all of them or in none.
    """
    key = "target_modules"
    is_target = _picker(keys, key)
    is_excluded = _picker(keys, "exclude_modules")

    def is_picked(module: str) -> bool:
        return is_target(module) and not is_excluded(module)

    _check_others(keys, base, is_picked)
    targets = []
    for projection in PROJECTIONS:
        modules = _modules(hf_table.kernel(projection), base)
        layers = sum(map(is_picked, modules))
        if 0 < layers < base.num_layers:
            found = f"picks {projection} in {layers} of {base.num_layers} layers"
            raise keys.wrong(key, f"{found}; expected all of them or none")
        if layers:
            targets.append(projection)
    if not targets:
        found = f"is {shown(keys.values.get(key))}, which picks no layer"
        raise keys.wrong(key, f"{found}; {_SUPPORTED_LAYERS}")
    return tuple(targets)


def _check_others(keys: Keys, base: ModelConfig, is_picked: Callable[[str], bool]) -> None:
    """Raises InputError where target_modules picks or names something else than a projection."""
    key = "target_modules"
    unused = keys.values.get(key)
    unused = set(unused) if isinstance(unused, list) else set()
    for name in hf_table.EVERY:
        for module in _modules(name, base):
            is_projection = module.rpartition(".")[2] in PROJECTIONS
            if is_picked(module) and not is_projection:
                raise keys.wrong(key, f"picks {module}; {_SUPPORTED_LAYERS}")
            if is_projection:
                unused -= _endings(module)
    if unused:
        raise keys.wrong(key, f"has {shown(min(unused))}; {_SUPPORTED_LAYERS}")


def _picker(keys: Keys, key: str) -> Callable[[str], bool]:
    """Whether the key picks a module: by the end of its name, a regular expression, or all."""
    value = keys.values.get(key)
    if not value:
        return lambda module: False
    if isinstance(value, list) and all(isinstance(name, str) for name in value):
        names = set(value)
        return lambda module: not names.isdisjoint(_endings(module))
    if not isinstance(value, str):
        raise keys.wrong(key, f"expected a list of names or a text, found {shown(value)}")
    if key == "target_modules" and value.lower() == "all-linear":
        return lambda module: module.rpartition(".")[2] in PROJECTIONS
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of constructs that Python means to change
            pattern = re.compile(value)
    except (re.error, RecursionError, OverflowError) as error:
        raise keys.wrong(key, f"is no regular expression ({error}): {shown(value)}") from None
    return lambda module: pattern.fullmatch(module) is not None


def _modules(name: Name, base: ModelConfig) -> list[str]:
    """PEFT's names of the modules that have this parameter, layer by layer."""
    return [tensor.rpartition(".")[0] for tensor in hf_table.tensors(name, base)]


def _endings(module: str) -> set[str]:
    """What a list may call the module: its name, or the last parts of it."""
    parts = module.split(".")
    return {".".join(parts[begin:]) for begin in range(len(parts))}


# --- adapter_model.safetensors --------------------------------------------------------------------


def _open_tensors(folder: Folder, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of the adapter of this config, by name, of which only headers are read.

    Raises InputError if one is missing, has another shape, or is of no layer with an adapter.
    """
    if folder.has(_PICKLE) and not folder.has(ADAPTER_FILE):
        raise InputError(
            f"{folder.place(_PICKLE)} is a pickle, which could run code and is never loaded; "
            f"expected {ADAPTER_FILE}, which PEFT's save_pretrained writes"
        )
    tensors = hf_files.open_file(folder, ADAPTER_FILE)
    asked = f'key "target_modules" of {ADAPTER_CONFIG}'
    names = hf_table.adapter_table(config)
    expected = hf_table.file_shapes(names, config)
    for tensor, shape in expected.items():
        if tensor not in tensors:
            raise InputError(
                f'{folder.place(ADAPTER_FILE)}: tensor "{tensor}" is missing; {asked} asks for it'
            )
        if tensors[tensor].shape != shape:
            projection = tensor.split(".")[-3]
            sizes = hf_table.sizes(config)
            of_base = hf_table.kernel(projection).file_shape(sizes)
            raise InputError(
                f"{tensors[tensor].place} has shape {shown(tensors[tensor].shape)}; expected "
                f"{shape}, for the base's {projection} is {of_base} and r is {sizes['Y']}"
            )
    for tensor in sorted(tensors.keys() - expected.keys()):
        raise InputError(f"{tensors[tensor].place} is of no layer that {asked} picks")
    return {tensor: tensors[tensor] for tensor in expected}
