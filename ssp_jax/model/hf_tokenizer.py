"""The tokenizer of a model folder, by transformers; what its files cannot mean is told by name
before.
"""

import os
from collections.abc import Callable
from typing import Any

from ssp_jax.errors import InputError, reading, shown
from ssp_jax.model import hf_config
from ssp_jax.model.hf_files import Folder

CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
SPECIAL, ADDED, TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"


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
    """One, or a list of named ones, as transformers writes several."""
    if isinstance(value, dict):
        return all(map(_is_text, value.values()))
    if not isinstance(value, list):
        return _is_text(value)
    entries = [entry if isinstance(entry, dict) else {} for entry in value]
    return all(_is_text(entry.get("name")) and _is_text(entry.get("template")) for entry in entries)


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_Check = tuple[Callable[[Any], bool], str]  # and what was expected, in words
_TOKEN_CHECK: _Check = (_is_token, "a token, as text or as an object with a text in content")
_NAMED_TOKENS = [f"{name}_token" for name in ("bos", "eos", "unk", "pad", "sep", "cls", "mask")]
# Keys of tokenizer_config.json and special_tokens_map.json; each may be missing or null.
_CHECKS: dict[str, _Check] = {
    **dict.fromkeys(_NAMED_TOKENS, _TOKEN_CHECK),
    "additional_special_tokens": (_are_tokens, "a list of tokens"),
    "extra_special_tokens": (_are_tokens, "a list of tokens, or an object of them"),
    "added_tokens_decoder": (_are_numbered_tokens, "an object with a token for each id"),
    "chat_template": (_is_template, 'a text, or a list of {"name", "template"}'),
    "tokenizer_class": (_is_text, "a text"),
    "model_max_length": (_is_number, "a number"),
    **dict.fromkeys(
        ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces"),
        (_is_switch, "true or false"),
    ),
    "split_special_tokens": (_is_switch, "true or false"),
}


def load(folder: Folder, rows: int) -> Any:
    """A transformers fast tokenizer, all of whose tokens have a row in the model's embedding of so
    many.
    """
    settings = _checked(folder)
    os.environ.setdefault(
        "TRANSFORMERS_VERBOSITY", "error"
    )  # it would say that there is no PyTorch
    from tokenizers import Tokenizer  # slow to import, and only needed here
    from transformers import AutoTokenizer

    try:
        with reading(folder.place(CONFIG)):
            # Without trust_remote_code=False it asks on the terminal whether to run the folder's
            # code.
            tokenizer = AutoTokenizer.from_pretrained(
                str(folder.path), local_files_only=True, trust_remote_code=False
            )
    except InputError:
        with reading(folder.place(TOKENIZER)):  # is it this file? then that is what is said
            Tokenizer.from_file(str(folder.path / TOKENIZER))
        raise
    tokenizer.name_or_path = folder.name  # as the user knows it
    _check_end(folder, settings, tokenizer)
    _check_rows(folder, tokenizer, rows)
    return tokenizer


def _checked(folder: Folder) -> dict[str, Any]:
    """tokenizer_config.json. Of all files beside it the form is looked at, too."""
    settings = folder.read_json(CONFIG)
    hf_config.refuse_code(folder, CONFIG, settings)
    folder.read_json(TOKENIZER)
    for file in (CONFIG, SPECIAL):
        if folder.has(file):
            _check_keys(folder.place(file), folder.read_json(file))
    if folder.has(ADDED):
        for token, index in folder.read_json(ADDED).items():
            if type(index) is not int or index < 0:
                raise InputError(
                    f'{folder.place(ADDED)}: token "{token}" expected an id, found {index!r}'
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


def _check_end(folder: Folder, settings: dict[str, Any], tokenizer: Any) -> None:
    """transformers would invent an eos token that the files lack; the model has never seen it."""
    content = folder.read_json(TOKENIZER)
    added = folder.read_json(ADDED) if folder.has(ADDED) else {}
    objects = [
        *(content.get("added_tokens") or ()),
        *(settings.get("added_tokens_decoder") or {}).values(),
    ]
    declared = {token if isinstance(token, str) else token["content"] for token in objects} | set(
        added
    )
    vocabulary = content.get("model", {}).get("vocab") or ()
    if isinstance(vocabulary, list):  # of Unigram: a piece and its score
        vocabulary = [piece for piece, _ in vocabulary]
    eos = tokenizer.eos_token
    if eos is not None and eos not in declared and eos not in vocabulary:
        raise InputError(
            f'{folder.place(TOKENIZER)} lacks the token "{eos}", its eos_token, which ends a text'
        )


def _check_rows(folder: Folder, tokenizer: Any, rows: int) -> None:
    """Padding is never fed to the model, and may lie beyond its rows."""
    never_fed = {tokenizer.pad_token} - {tokenizer.eos_token}
    fed = {token: i for token, i in tokenizer.get_vocab().items() if token not in never_fed}
    if not fed:
        raise InputError(f"{folder.place(TOKENIZER)} has no tokens; expected a vocabulary")
    token = max(fed, key=lambda token: fed[token])
    if fed[token] >= rows:
        raise InputError(
            f'{folder.place(TOKENIZER)}: token "{token}" has id {fed[token]}; the model has {rows} rows'
        )
