"""Stop strings to a token automaton: stops found exactly, on device, one table lookup a token.

A stop string has many tokenisations, and the token that completes it may carry more bytes
(`>\\n\\n`), so token ids cannot be compared. Instead an Aho-Corasick automaton over *bytes* is
folded into a table over tokens, once, on the host; generation then only does `state = table[state,
token]; stop = stop[state]`, starting from state ROOT.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ssp_jax.errors import InputError
from ssp_jax.model import tokens

ROOT = 0
NO_STOP = -1
_BYTES = 256


@dataclass(frozen=True)
class Automaton:
    """A states over V tokens. A stop state absorbs: the state stays until it is set to ROOT."""

    table_AV: np.ndarray  # int8 or int16: the state after reading a token
    stop_A: np.ndarray  # int8: index of the stop string that this state has found, or NO_STOP


def token_bytes(tokenizer: Any) -> list[bytes]:
    """The bytes that each id of a Hugging Face fast tokenizer adds to the text.

    Control tokens give b"": they add nothing to the text that is parsed (tokens.decode). All others
    are shown as the tokenizer's decoder writes them: Qwen3's <think> too, and a </search> that
    somebody added, special or not.
    """
    vocabulary = tokenizer.get_vocab()
    to_bytes = _byte_level if _is_byte_level(tokenizer) else _sentencepiece
    controls = set(tokens.control_tokens(tokenizer).values())
    bytes_of = [b""] * (max(vocabulary.values()) + 1)
    for text, index in vocabulary.items():
        if index not in controls:
            bytes_of[index] = to_bytes(text)
    return bytes_of


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether the tokenizer decodes GPT-2's byte alphabet; else sentencepiece's ▁ and <0xNN>.

    Raises InputError for any other decoder, and for a tokenizer that is not a fast one.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no tokenizer.json; expected a fast tokenizer"
        )
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    decoders = [decoder, *decoder.get("decoders", [])]
    kinds = {entry["type"] for entry in decoders if entry}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise InputError(
        f"tokenizer {tokenizer.name_or_path!r} decodes with {sorted(kinds) or 'nothing'}; "
        "expected ByteLevel (Qwen, Llama 3) or ByteFallback / Metaspace (sentencepiece)"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves.

    The other bytes follow from U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    for i, byte in enumerate(others):
        alphabet[chr(_BYTES + i)] = byte
    return alphabet


_ALPHABET = _byte_alphabet()


def _byte_level(text: str) -> bytes:
    if all(character in _ALPHABET for character in text):
        return bytes(_ALPHABET[character] for character in text)
    # The tokenizer's own decoder does the same with a token that is not in its alphabet.
    return text.encode()


def _sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


def build_automaton(
    stop_strings: Sequence[str], token_bytes: Sequence[bytes], vocab_size: int
) -> Automaton:
    """The automaton of these stop strings, for an embedding of vocab_size rows.

    token_bytes: of each id of the tokenizer; there may be fewer than vocab_size.

    The stop string completed first in the text wins; where two end at the same byte, the one listed
    first. A token without bytes (special, or a padding row of the embedding) leaves the state as it
    is: the text that is parsed is decoded without it (tokens.decode), and shows a stop string
    around it as one.
    """
    if "" in stop_strings or len(set(stop_strings)) < len(stop_strings):
        raise ValueError(f"stop strings must be distinct and not empty, got {list(stop_strings)}")
    if len(token_bytes) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(token_bytes)} tokens but the model only {vocab_size} "
            "embedding rows"
        )
    next_A256, stop_A = _byte_automaton([stop.encode() for stop in stop_strings])
    dtype = np.int8 if len(stop_A) <= np.iinfo(np.int8).max else np.int16
    states_A1 = np.arange(len(stop_A), dtype=dtype)[:, None]

    # A token without bytes keeps the state; the columns of the others follow.
    table_AV = np.repeat(states_A1, vocab_size, axis=1)

    # Longest first, so that the tokens that have a byte at a position are the first ones.
    lengths = np.array([len(text) for text in token_bytes], np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[longest_first]
    lengths = lengths[longest_first]
    text = np.frombuffer(b"".join(token_bytes), np.uint8)

    # All tokens advance by one byte together.
    reading = int(np.count_nonzero(lengths))
    state_AV = np.repeat(states_A1, reading, axis=1)
    for position in range(int(lengths.max(initial=0))):
        n = int(np.count_nonzero(lengths > position))
        byte_V = text[starts[:n] + position]
        before_AV = state_AV[:, :n]
        state_AV[:, :n] = next_A256[before_AV, byte_V]
    table_AV[:, longest_first[:reading]] = state_AV
    return Automaton(table_AV, stop_A)


def _byte_automaton(stops: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Aho-Corasick (1975) with absorbing stop states: next_A256 (int16) and stop_A (int8).

    States are the proper prefixes of the stop strings in breadth-first order, ROOT first, then one
    stop state each. A prefix that already contains a stop is never reached: the automaton is in
    that stop's state by then.
    """
    proper = {stop[:n] for stop in stops for n in range(len(stop))} | {b""}
    prefixes = [prefix for prefix in proper if not any(stop in prefix for stop in stops)]
    prefixes.sort(key=lambda prefix: (len(prefix), prefix))
    state_of = {prefix: state for state, prefix in enumerate(prefixes)}
    found = [NO_STOP] * len(prefixes) + list(range(len(stops)))
    stop_A = np.array(found, np.int8)
    next_A256 = np.zeros((len(stop_A), _BYTES), np.int16)
    for prefix, state in state_of.items():
        for byte in range(_BYTES):
            read = prefix + bytes([byte])
            ended = [i for i, stop in enumerate(stops) if read.endswith(stop)]
            if ended:
                next_A256[state, byte] = len(prefixes) + ended[0]
                continue
            # The longest suffix that is a prefix of some stop; b"" always is one.
            suffixes = (read[n:] for n in range(len(read) + 1))
            longest = next(suffix for suffix in suffixes if suffix in state_of)
            next_A256[state, byte] = state_of[longest]
    for i in range(len(stops)):
        next_A256[len(prefixes) + i] = len(prefixes) + i
    return next_A256, stop_A
