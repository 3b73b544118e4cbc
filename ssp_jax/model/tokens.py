"""Text to token ids and back, so that no text injects control tokens.

Control tokens begin and end turns and texts, such as <|im_end|>. Only a chat template writes them.
Text of models, passages, questions and files that spells one gets the ordinary tokens of its
characters: otherwise an answer could end its own turn and write somebody else's. All other text has
exactly the ids that transformers gives it.

The tags of the game are text, also where a tokenizer has them as special tokens: they are parsed
and shown, so decoding never skips them.
"""

import functools
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssp_jax.errors import reading

# All names that the styles of prompts.py write and parse between angle brackets.
TAGS = (
    "think",
    "search",
    "information",
    "observation",
    "original_evidence",
    "answer",
    "question",
)
_WRITTEN_TAGS = tuple(f"<{slash}{tag}>" for tag in TAGS for slash in ("", "/"))
_SURROGATE = re.compile("[\ud800-\udfff]")


def is_tag(content: str) -> bool:
    """Whether an added token is a tag of the game, contains one, or is a piece of one."""
    return any(tag in content or content in tag for tag in _WRITTEN_TAGS)


def template_of(tokenizer: Any) -> str | dict[str, str] | None:
    """The source of the chat template: of several the default, or all by name if none is that."""
    template = tokenizer.chat_template
    return template.get("default", template) if isinstance(template, dict) else template


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Spelling -> id: the special tokens, and those added tokens that the chat template writes."""
    source = template_of(tokenizer)
    return _control_tokens(tokenizer, source if isinstance(source, str) else "", len(tokenizer))


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, source: str, size: int) -> dict[str, int]:
    """control_tokens, cached by the template's source and the size of the tokenizer."""
    special = set(tokenizer.all_special_ids)
    found = {}
    for token_id, token in tokenizer.added_tokens_decoder.items():
        text = token.content
        is_markup = not text.strip().isalnum() and not text.isspace()
        in_template = text in source and is_markup
        is_control = token.special or token_id in special or in_template
        if is_control and not is_tag(text):
            found[text] = token_id
    return found


@functools.lru_cache(maxsize=8)
def _spelling(controls: tuple[str, ...]) -> re.Pattern[str]:
    """A pattern of control tokens; the longest one at a position matches, as in tokenizers."""
    longest_first = sorted(controls, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def whole(text: str) -> str:
    """The text with U+FFFD for lone surrogates: JSON parsers accept them, tokenizers do not."""
    return _SURROGATE.sub("\ufffd", text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text, none of them a control token, and no special tokens added around it."""
    text = whole(text)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    controls = set(control_tokens(tokenizer).values())
    if controls.isdisjoint(ids):
        return ids
    return _splitter(tokenizer).encode(text)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that is parsed and shown: without control tokens, with all tags."""
    controls = set(control_tokens(tokenizer).values())
    text_ids = [token_id for token_id in ids if token_id not in controls]
    text: str = tokenizer.decode(
        text_ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


class Spelled:
    """Replaces control tokens that texts spell by marks, while a chat template renders them.

    So the control tokens in a rendered template are the template's own.
    """

    def __init__(self, tokenizer: Any):
        self._pattern = _spelling(tuple(control_tokens(tokenizer)))
        self._of_mark: dict[str, str] = {}  # mark -> the text that it stands for

    def mark(self, value: Any) -> Any:
        """A text, or lists and dictionaries of texts, with marks for control tokens."""
        if isinstance(value, str):
            return self._pattern.sub(self._new_mark, whole(value))
        if isinstance(value, list):
            return [self.mark(item) for item in value]
        if isinstance(value, dict):
            return {key: self.mark(item) for key, item in value.items()}
        return value

    def _new_mark(self, found: re.Match[str]) -> str:
        mark = new_mark(len(self._of_mark))
        self._of_mark[mark] = found[0]
        return mark

    def encode(self, tokenizer: Any, text: str) -> list[int]:
        """Ids of a rendered template, with its own control tokens and no others."""
        controls = set(control_tokens(tokenizer).values())
        num_own = len(self._pattern.findall(text))
        if not self._of_mark:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            # There are more if a normalizer has made a control token out of a text.
            if sum(token_id in controls for token_id in ids) <= num_own:
                return ids
        return _splitter(tokenizer).encode(text, self._pattern, self._of_mark)


_NONCE = uuid.uuid4().hex  # so that no text contains a mark; no id depends on it


def new_mark(number: int) -> str:
    """A placeholder for a text, of characters that no chat template changes."""
    return f"q{_NONCE}q{number}q"


class _Splitter:
    """A copy of a tokenizer whose control tokens have other names.

    It splits a text that spells a control token into ordinary tokens.
    """

    def __init__(self, tokenizer: Any, controls: Mapping[str, int]):
        import tokenizers

        values = json.loads(tokenizer.backend_tokenizer.to_str())
        self._names = {content: f"<{_NONCE}:{i}>" for i, content in enumerate(controls)}
        id_of_name = {}
        for token in values["added_tokens"]:
            content = token["content"]
            id_of_name[self._names.get(content, content)] = token["id"]
            if content in self._names:
                token |= {"content": self._names[content], "normalized": False}
        values["model"] = self._renamed(values["model"])
        values |= {"truncation": None, "padding": None, "post_processor": None}
        with reading(f"tokenizer {tokenizer.name_or_path!r}"):
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(values))
        # The copy may number added tokens anew: its id -> the tokenizer's.
        self._id = {self._backend.token_to_id(name): i for name, i in id_of_name.items()}

    def _renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        """The tokenizer's model with other names for control tokens in its vocabulary.

        Otherwise it could choose a piece that is a control token. Pieces that take part in merges
        keep their names: they are text as well.
        """
        merged = set()
        for pair in values.get("merges") or ():
            a, b = pair.split(" ") if isinstance(pair, str) else pair
            merged |= {a, b, a + b}
        names = {text: name for text, name in self._names.items() if text not in merged}
        vocabulary = values.get("vocab")
        if isinstance(vocabulary, dict):
            vocabulary = {names.get(piece, piece): index for piece, index in vocabulary.items()}
        elif isinstance(vocabulary, list):  # of Unigram
            vocabulary = [[names.get(piece, piece), score] for piece, score in vocabulary]
        unknown = str(values.get("unk_token"))  # no key of a Unigram, null in many others
        renamed: dict[str, Any] = {"vocab": vocabulary}
        if unknown in names:
            renamed["unk_token"] = names[unknown]
        return {key: renamed.get(key, value) for key, value in values.items()}

    def encode(
        self,
        text: str,
        own: re.Pattern[str] | None = None,
        spelled: Mapping[str, str] | None = None,
    ) -> list[int]:
        """Ids of a text.

        own: matches the text's control tokens. spelled: mark -> the text that it stands for.
        """
        if own is not None:
            text = own.sub(lambda found: self._names[found[0]], text)
        for mark, content in (spelled or {}).items():
            text = text.replace(mark, content)
        ids: Iterable[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self._id.get(token_id, token_id) for token_id in ids]


def _splitter(tokenizer: Any) -> _Splitter:
    """The splitter, made when a text first spells a control token: that may take seconds."""
    return _make_splitter(tokenizer, tuple(control_tokens(tokenizer).items()))


@functools.lru_cache(maxsize=8)
def _make_splitter(tokenizer: Any, controls: tuple[tuple[str, int], ...]) -> _Splitter:
    return _Splitter(tokenizer, dict(controls))
