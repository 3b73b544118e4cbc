"""Stop strings → token automaton: stops found exactly, on device, one table lookup a token.

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
    """Rows are states. Stop states absorb: once a stop is found, the state stays until someone sets
    it to ROOT.
    """

    # int8 or int16: the state after reading a token; here S counts states, not cache positions
    table_SV: np.ndarray
    stop_S: np.ndarray  # int8: index of the stop string that this state has found, or NO_STOP


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
    """What the tokenizer's own decoder does: GPT-2's byte alphabet (True) or sentencepiece's ▁ and
    <0xNN> (False).
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InputError(
            f"tokenizer {tokenizer.name_or_path!r} has no tokenizer.json; expected a fast tokenizer"
        )
    decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
    kinds = {part["type"] for part in [decoder, *decoder.get("decoders", [])] if part}
    if "ByteLevel" in kinds:
        return True
    if kinds & {"ByteFallback", "Metaspace"}:
        return False
    raise InputError(
        f"tokenizer {tokenizer.name_or_path!r} decodes with {sorted(kinds) or 'nothing'}; "
        "expected ByteLevel (Qwen, Llama 3) or ByteFallback / Metaspace (sentencepiece)"
    )


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 characters stand for themselves, the other bytes follow from
    U+0100 on, in order.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(_BYTES) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(_BYTES + i): b for i, b in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level(text: str) -> bytes:
    if all(character in _ALPHABET for character in text):
        return bytes(_ALPHABET[character] for character in text)
    # what the tokenizer's own decoder does with a token that is not in its alphabet
    return text.encode()


def _sentencepiece(text: str) -> bytes:
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        return bytes([int(text[3:5], 16)])
    return text.replace("▁", " ").encode()


def build_automaton(
    stop_strings: Sequence[str], token_bytes: Sequence[bytes], vocab_size: int
) -> Automaton:
    """The table of `vocab_size` columns (the rows of the embedding, which may exceed the
    tokenizer's ids).

    The stop string completed first in the text wins; where two end at the same byte, the one listed
    first. A token without bytes (special, or a padding row of the embedding) leaves the state as it
    is: the text that is parsed is decoded without it (tokens.decode), and shows a stop string
    around it as one.
    """
    if "" in stop_strings or len(set(stop_strings)) < len(stop_strings):
        raise ValueError(f"stop strings must be distinct and not empty, got {list(stop_strings)}")
    if len(token_bytes) > vocab_size:
        raise InputError(
            f"the tokenizer has {len(token_bytes)} tokens but the model only {vocab_size} embedding rows"
        )
    next_SB, stop_S = _byte_automaton([stop.encode() for stop in stop_strings])
    dtype = np.int8 if len(stop_S) <= np.iinfo(np.int8).max else np.int16
    states_S1 = np.arange(len(stop_S), dtype=dtype)[:, None]
    # right for tokens without bytes; the others follow
    table_SV = np.repeat(states_S1, vocab_size, axis=1)

    # All tokens advance by one byte together, longest first, so that those still reading are a
    # prefix.
    lengths = np.array([len(text) for text in token_bytes], np.int64)
    longest_first = np.argsort(-lengths, kind="stable")
    starts, lengths = (np.cumsum(lengths) - lengths)[longest_first], lengths[longest_first]
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    reading = int(np.count_nonzero(lengths))
    state_SV = np.repeat(states_S1, reading, axis=1)
    for position in range(int(lengths.max(initial=0))):
        n = int(np.count_nonzero(lengths > position))
        state_SV[:, :n] = next_SB[state_SV[:, :n], text[starts[:n] + position]]
    table_SV[:, longest_first[:reading]] = state_SV
    return Automaton(table_SV, stop_S)


def _byte_automaton(stops: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Aho-Corasick (1975) with absorbing stop states: next_SB [S, 256] and stop_S [S].

    States are the proper prefixes of the stop strings in breadth-first order, ROOT first, then one
    stop state each. A prefix that already contains a stop is never reached: the automaton is in
    that stop's state by then.
    """
    prefixes = sorted(
        {stop[:n] for stop in stops for n in range(len(stop))} | {b""}, key=lambda p: (len(p), p)
    )
    prefixes = [p for p in prefixes if not any(stop in p for stop in stops)]
    state_of = {prefix: state for state, prefix in enumerate(prefixes)}
    stop_S = np.array([NO_STOP] * len(prefixes) + list(range(len(stops))), np.int8)
    next_SB = np.zeros((len(stop_S), _BYTES), np.int16)
    for prefix, state in state_of.items():
        for byte in range(_BYTES):
            read = prefix + bytes([byte])
            found = [i for i, stop in enumerate(stops) if read.endswith(stop)]
            # Not a stop: the longest suffix that is a prefix of some stop; b"" always is one.
            suffixes = (read[n:] for n in range(len(read) + 1))
            next_SB[state, byte] = (
                len(prefixes) + found[0]
                if found
                else next(state_of[s] for s in suffixes if s in state_of)
            )
    for i in range(len(stops)):
        next_SB[len(prefixes) + i] = len(prefixes) + i
    return next_SB, stop_S
