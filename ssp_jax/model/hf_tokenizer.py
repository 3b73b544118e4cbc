"""The tokenizer of a model folder, loaded by transformers.

Its files are checked first, so that an error names the file and the key at fault.
"""

import os
from collections.abc import Callable
from typing import Any

from ssp_jax.errors import InputError, reading, shown
from ssp_jax.model import hf_config
from ssp_jax.model.hf_files import Folder

CONFIG = "tokenizer_config.json"
TOKENIZER = "tokenizer.json"
SPECIAL = "special_tokens_map.json"
ADDED = "added_tokens.json"
TEMPLATE = "chat_template.jinja"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return _is_text(value) or (isinstance(value, dict) and _is_text(value.get("content")))


def _are_tokens(value: Any) -> bool:
    found = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and all(map(_is_token, found))


def _are_numbered_tokens(value: Any) -> bool:
    return isinstance(value, dict) and all(map(str.isdecimal, value)) and _are_tokens(value)


def _is_template(value: Any) -> bool:
    """One template, or a list of named ones, as transformers writes several."""
    if isinstance(value, dict):
        return all(map(_is_text, value.values()))
    if isinstance(value, list):
        return all(map(_is_named_template, value))
    return _is_text(value)


def _is_named_template(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    return _is_text(value.get("name")) and _is_text(value.get("template"))


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Check = tuple[Callable[[Any], bool], str]  # a predicate, and the expected value in words
_TOKEN: _Check = (_is_token, "a token, as text or as an object with a text in content")
_SWITCH: _Check = (_is_switch, "true or false")
# Keys of tokenizer_config.json and special_tokens_map.json; each may be missing or null.
_CHECKS: dict[str, _Check] = {
    "bos_token": _TOKEN,
    "eos_token": _TOKEN,
    "unk_token": _TOKEN,
    "pad_token": _TOKEN,
    "sep_token": _TOKEN,
    "cls_token": _TOKEN,
    "mask_token": _TOKEN,
    "additional_special_tokens": (_are_tokens, "a list of tokens"),
    "extra_special_tokens": (_are_tokens, "a list of tokens, or an object of them"),
    "added_tokens_decoder": (_are_numbered_tokens, "an object with a token for each id"),
    "chat_template": (_is_template, 'a text, or a list of {"name", "template"}'),
    "tokenizer_class": (_is_text, "a text"),
    "model_max_length": (_is_number, "a number"),
    "add_bos_token": _SWITCH,
    "add_eos_token": _SWITCH,
    "add_prefix_space": _SWITCH,
    "clean_up_tokenization_spaces": _SWITCH,
    "split_special_tokens": _SWITCH,
}


def load(folder: Folder, vocab_size: int) -> Any:
    """A transformers fast tokenizer whose tokens all fit the model's vocabulary of `vocab_size`.

    Raises InputError.
    """
    settings = _checked_settings(folder)
    # Otherwise transformers warns that there is no PyTorch.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from tokenizers import Tokenizer  # slow to import, and only needed here
    from transformers import AutoTokenizer

    try:
        with reading(folder.place(CONFIG)):
            # Without trust_remote_code=False it asks on the terminal whether to run code of the
            # folder.
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder.path), local_files_only=True, trust_remote_code=False
            )
    except InputError:
        # Blames this file if it is at fault.
        with reading(folder.place(TOKENIZER)):
            Tokenizer.from_file(str(folder.path / TOKENIZER))
        raise
    tokenizer.name_or_path = folder.name  # as the user knows it
    _check_eos(folder, settings, tokenizer)
    _check_ids(folder, tokenizer, vocab_size)
    return tokenizer


def _checked_settings(folder: Folder) -> dict[str, Any]:
    """tokenizer_config.json. Raises InputError if it or a file beside it is malformed."""
    settings = folder.read_json(CONFIG)
    hf_config.refuse_code(folder, CONFIG, settings)
    folder.read_json(TOKENIZER)
    for file in (CONFIG, SPECIAL):
        if folder.has(file):
            _check_keys(folder.place(file), folder.read_json(file))
    if folder.has(ADDED):
        for token, token_id in folder.read_json(ADDED).items():
            if type(token_id) is not int or token_id < 0:
                raise InputError(
                    f'{folder.place(ADDED)}: token "{token}" expected an id, found {token_id!r}'
                )
    if (folder.path / TEMPLATE).is_file():
        with reading(folder.place(TEMPLATE)):
            (folder.path / TEMPLATE).read_text(encoding="utf-8")
    return settings


def _check_keys(place: str, values: dict[str, Any]) -> None:
    for key, (is_right, expected) in _CHECKS.items():
        value = values.get(key)
        if value is not None and not is_right(value):
            raise InputError(f'{place}: key "{key}" expected {expected}, found {shown(value)}')


def _check_eos(folder: Folder, settings: dict[str, Any], tokenizer: Any) -> None:
    """Raises InputError if the files lack the eos token.

    transformers would add it with a new id, which the model has never seen.
    """
    content = folder.read_json(TOKENIZER)
    declared = set(folder.read_json(ADDED) if folder.has(ADDED) else ())
    tokens = list(content.get("added_tokens") or ())
    tokens += (settings.get("added_tokens_decoder") or {}).values()
    declared |= {token if isinstance(token, str) else token["content"] for token in tokens}
    vocabulary = content.get("model", {}).get("vocab") or ()
    if isinstance(vocabulary, list):  # of Unigram: a piece and its score
        vocabulary = [piece for piece, _ in vocabulary]
    eos = tokenizer.eos_token
    if eos is not None and eos not in declared and eos not in vocabulary:
        raise InputError(
            f'{folder.place(TOKENIZER)} lacks the token "{eos}", its eos_token, which ends a text'
        )


def _check_ids(folder: Folder, tokenizer: Any, vocab_size: int) -> None:
    """Raises InputError if a token has no row in the model's embedding.

    The padding token may lack one: it is never fed to the model.
    """
    never_fed = {tokenizer.pad_token} - {tokenizer.eos_token}
    fed = {token: i for token, i in tokenizer.get_vocab().items() if token not in never_fed}
    if not fed:
        raise InputError(f"{folder.place(TOKENIZER)} has no tokens; expected a vocabulary")
    token = max(fed, key=lambda token: fed[token])
    if fed[token] >= vocab_size:
        raise InputError(
            f'{folder.place(TOKENIZER)}: token "{token}" has id {fed[token]}; '
            f"the model has {vocab_size} rows"
        )
