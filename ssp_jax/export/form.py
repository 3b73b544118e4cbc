"""The form in which a model was trained, in a small file beside its weights. Without JAX.

`generate` reads it back, so that a model is asked as it was trained and evaluated.
"""

import argparse
import json
from typing import Any

from ml_collections import ConfigDict

from ssp_jax.config.keys import default_values, flatten_config
from ssp_jax.config.values import BOUNDS, CHOICES
from ssp_jax.errors import InputError, masked, shown
from ssp_jax.model import hf_files

FILE = "ssp_jax_training.json"
# Config keys that say how the model is asked.
KEYS = ("prompt.", "limits.", "sampling.", "retriever.top_k")
# Flags of `generate` that get their value from there, unless the user gives one: the key, and the
# value where there is no such file. Those of SEARCH_FLAGS get it for searches alone.
FLAGS: dict[str, tuple[str, Any]] = {
    "style": ("prompt.style", "search_r1"),
    "template": ("prompt.template", "chat"),
    "worked_examples": ("prompt.worked_examples", 0),
}
SEARCH_FLAGS: dict[str, tuple[str, Any]] = {
    "top_k": ("retriever.top_k", 3),
    "max_searches": ("limits.searches", 10),
    "max_tokens": ("limits.response_tokens", 1024),
}
OBSERVATION_TOKENS = 2048  # of a search result, where the file does not say


def text(config: ConfigDict, step: int) -> str:
    """The content of the file, for the weights after a step of a run."""
    keys = {key: value for key, value in flatten_config(config).items() if key.startswith(KEYS)}
    document = {"base_model": masked(config.model.path), "steps": step, "config": keys}
    return json.dumps(document, indent=2) + "\n"


def read(folder: str) -> dict[str, Any]:
    """The config keys of a model's training; none where its folder has no such file.

    folder: as hf_files.find takes it. Raises InputError.
    """
    found = hf_files.find(folder)
    if not found.has(FILE):
        return {}
    place = found.place(FILE)
    values = found.read_json(FILE).get("config")
    if not isinstance(values, dict):
        raise InputError(f'{place}: key "config" expected an object, found {shown(values)}')
    defaults = default_values()
    known = {key: value for key, value in values.items() if key in defaults}
    for key, value in known.items():
        _check(place, key, value, defaults[key])
    return known


def _check(place: str, key: str, value: Any, default: Any) -> None:
    """Raises InputError where a key has a value that no run can have."""
    if type(value) is not type(default):
        expected = type(default).__name__
        raise InputError(f'{place}: key "{key}" expected {expected}, found {shown(value)}')
    if key in CHOICES and value not in CHOICES[key]:
        names = ", ".join(CHOICES[key])
        raise InputError(f'{place}: key "{key}" expected one of {names}, found {shown(value)}')
    if key in BOUNDS:
        BOUNDS[key].check(f'{place}: key "{key}"', value)


def fill(flags: argparse.Namespace) -> None:
    """Gives flags of `generate` that the user left out the values of the model's training.

    Adds turn_tokens, observation_tokens and tell_repeats, which are no flags. Raises InputError.
    """
    trained = (flags.adapter and read(flags.adapter)) or read(flags.model)
    of_searches = trained if flags.index else {}
    for flags_of, keys in ((FLAGS, trained), (SEARCH_FLAGS, of_searches)):
        for name, (key, otherwise) in flags_of.items():
            if getattr(flags, name) is None:
                setattr(flags, name, keys.get(key, otherwise))
    flags.turn_tokens = of_searches.get("limits.turn_tokens", flags.max_tokens)
    flags.tell_repeats = of_searches.get("prompt.tell_repeats", False)
    flags.observation_tokens = of_searches.get("limits.observation_tokens", OBSERVATION_TOKENS)
