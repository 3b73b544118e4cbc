"""Text and token ids. Which tokens steer a model, and text that must not turn into one of them.

Control tokens begin and end turns and texts, such as <|im_end|>. Only a chat template writes them.
Text of models, passages, questions and files that spells one gets the ordinary tokens of its
characters: otherwise an answer could end its own turn and speak for somebody else. Text without
such a spelling is encoded as transformers encodes it, to the id.

The tags of the game are text, whatever a tokenizer calls them: they are parsed and shown, so they
are never skipped.
"""

import functools
import json
import re
import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ssp_jax.errors import reading

# All that the styles of prompts.py write and parse between angle brackets.
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
    """An added token that is a tag of the game, holds one, or is a piece of one."""
    return any(tag in content or content in tag for tag in _WRITTEN_TAGS)


def template_of(tokenizer: Any) -> str | dict[str, str] | None:
    """The source of its chat template; of several the default one, or all of them where none is the
    default.
    """
    template = tokenizer.chat_template
    return template.get("default", template) if isinstance(template, dict) else template


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Spelling -> id: the special tokens, and those added tokens that the chat template writes."""
    source = template_of(tokenizer)
    return _control_tokens(tokenizer, source if isinstance(source, str) else "", len(tokenizer))


@functools.lru_cache(maxsize=8)
def _control_tokens(tokenizer: Any, source: str, size: int) -> dict[str, int]:
    """size: of the tokenizer. Another source or size is another entry of the cache."""
    special = set(tokenizer.all_special_ids)
    found = {}
    for index, token in tokenizer.added_tokens_decoder.items():
        in_template = token.content in source and not token.content.strip().isalnum()
        steers = token.special or index in special or (in_template and not token.content.isspace())
        if steers and not is_tag(token.content):
            found[token.content] = index
    return found


@functools.lru_cache(maxsize=8)
def _spelling(controls: tuple[str, ...]) -> re.Pattern[str]:
    """Finds control tokens in a text, the longest that begins at a place, as tokenizers do."""
    longest_first = sorted(controls, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def whole(text: str) -> str:
    """Half an emoji passes a JSON parser, and no tokenizer takes it: the replacement character
    stands for it.
    """
    return _SURROGATE.sub("\ufffd", text)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that steers nothing, without the special tokens that a tokenizer puts around a
    text.
    """
    text = whole(text)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
    controls = control_tokens(tokenizer)
    return ids if set(controls.values()).isdisjoint(ids) else _splitter(tokenizer).encode(text)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text that is parsed and shown: without control tokens, with all tags."""
    controls = set(control_tokens(tokenizer).values())
    kept = [index for index in ids if index not in controls]
    text: str = tokenizer.decode(
        kept, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text


class Spelled:
    """Control tokens that texts spell, under marks while a chat template works on these texts."""

    def __init__(self, tokenizer: Any):
        self._pattern = _spelling(tuple(control_tokens(tokenizer)))
        self._of_mark: dict[str, str] = {}

    def mark(self, value: Any) -> Any:
        """The same text, or the same lists and dictionaries of texts, with marks for control
        tokens.
        """
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
        """Ids of a rendered template. The control tokens that stand in it are the template's own."""
        controls = control_tokens(tokenizer)
        own = len(self._pattern.findall(text))
        if not self._of_mark:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False)
            steering = set(controls.values())
            # More: a normalizer has made a control token out of a text.
            if sum(index in steering for index in ids) <= own:
                return ids
        return _splitter(tokenizer).encode(text, self._pattern, self._of_mark)


_NONCE = uuid.uuid4().hex  # so that no text can hold a mark; no id depends on it


def new_mark(number: int) -> str:
    """A text that stands for another one, of characters that no chat template changes."""
    return f"q{_NONCE}q{number}q"


class _Splitter:
    """A copy of a tokenizer in which control tokens have other names: a text that spells them is
    only text.
    """

    def __init__(self, tokenizer: Any, controls: Mapping[str, int]):
        import tokenizers

        values = json.loads(tokenizer.backend_tokenizer.to_str())
        self._names = {content: f"<{_NONCE}:{i}>" for i, content in enumerate(controls)}
        added = {token["content"]: token["id"] for token in values["added_tokens"]}
        for token in values["added_tokens"]:
            if token["content"] in self._names:
                token |= {"content": self._names[token["content"]], "normalized": False}
        values["model"] = self._renamed(values["model"])
        values |= {"truncation": None, "padding": None, "post_processor": None}
        with reading(f"tokenizer {tokenizer.name_or_path!r}"):
            self._backend = tokenizers.Tokenizer.from_str(json.dumps(values))
        named = {self._names.get(content, content): index for content, index in added.items()}
        self._id = {self._backend.token_to_id(name): index for name, index in named.items()}

    def _renamed(self, values: dict[str, Any]) -> dict[str, Any]:
        """The model's own vocabulary, without the names: it could choose a piece that is a control
        token. (Pieces that others are merged from or into stay: they are text as well.)
        """
        merges = values.get("merges") or ()
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
        merged = {piece for a, b in pairs for piece in (a, b, a + b)}
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
        """own: finds the control tokens that stay ones. spelled: mark -> the text that it stands
        for.
        """
        if own is not None:
            text = own.sub(lambda found: self._names[found[0]], text)
        for mark, content in (spelled or {}).items():
            text = text.replace(mark, content)
        ids: Iterable[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self._id.get(index, index) for index in ids]


def _splitter(tokenizer: Any) -> _Splitter:
    """Made when a text first spells a control token: a large tokenizer takes seconds."""
    return _make_splitter(tokenizer, tuple(control_tokens(tokenizer).items()))


@functools.lru_cache(maxsize=8)
def _make_splitter(tokenizer: Any, controls: tuple[tuple[str, int], ...]) -> _Splitter:
    return _Splitter(tokenizer, dict(controls))
