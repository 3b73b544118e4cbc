"""Stops: whatever the tokenisation, the table finds exactly what a search in the bytes of the text
finds.
"""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ssp_jax.errors import InputError
from ssp_jax.game import prompts
from ssp_jax.game.roles import EpisodeContext, Limits
from ssp_jax.rollout.stops import NO_STOP, ROOT, Automaton, build_automaton, token_bytes

STOPS = ("</search>", "</answer>", "</question>")


def run(automaton: Automaton, tokens: list[int]) -> list[int]:
    """What a decode loop does: one lookup a token; the stop seen after each of them."""
    state, found = ROOT, []
    for token in tokens:
        state = automaton.table_AV[state, token]
        found.append(int(automaton.stop_A[state]))
    return found


def search(stops: list[str], texts: list[bytes]) -> list[int]:
    """The plain definition: the stop that ends first in the text."""
    found, text, now = [], b"", NO_STOP
    for piece in texts:
        text += piece
        ends = [
            (text.find(s.encode()) + len(s.encode()), i)
            for i, s in enumerate(stops)
            if s.encode() in text
        ]
        if now == NO_STOP and ends:
            now = min(ends)[1]
        found.append(now)
    return found


def pieces(*texts: str) -> tuple[list[bytes], list[int]]:
    """A vocabulary that holds exactly these tokens, and the ids that spell them in order."""
    return [text.encode() for text in texts], list(range(len(texts)))


ALPHABET = "</sé>"
STOP_SETS = st.lists(st.text(ALPHABET, min_size=1, max_size=6), min_size=1, max_size=4, unique=True)
# Tokens are any bytes of the alphabet, so that they cut characters and stop strings anywhere; some
# have none.
VOCABULARIES = st.lists(st.binary(max_size=5), min_size=1, max_size=4).map(
    lambda extra: [
        *(ALPHABET.encode()[i : i + 1] for i in range(len(ALPHABET.encode()))),
        b"",
        *extra,
    ]
)


@given(st.data(), STOP_SETS, VOCABULARIES)
@settings(deadline=None)  # a busy machine is no failure
def test_equals_a_search_in_the_text(data, stops, vocabulary):
    # Tokens made of pieces of the stops themselves make matches likely.
    for stop in stops:
        cut = data.draw(st.integers(0, len(stop.encode())))
        vocabulary = [*vocabulary, stop.encode()[:cut], stop.encode()[cut:] + b"\n"]
    tokens = data.draw(st.lists(st.integers(0, len(vocabulary) - 1), max_size=30))
    automaton = build_automaton(stops, vocabulary, vocab_size=len(vocabulary) + 3)
    assert run(automaton, tokens) == search(stops, [vocabulary[t] for t in tokens])


@pytest.mark.parametrize(
    "texts",
    [
        ["a", "</search>"],
        ["</", "search", ">"],
        [*"</search>"],
        ["</se", "arch", ">\n\n"],  # completed in the middle of a token
        ["x</", "search>y"],
        ["ab</search></answer>"],  # two in one token: the first one counts
        ["</s", "</search>"],  # a broken start before the real one
        ["<", "<", "</searc", "h>"],
        ["</search</search", ">"],
    ],
)
def test_every_tokenisation_is_found(texts):
    vocabulary, tokens = pieces(*texts)
    assert run(build_automaton(STOPS, vocabulary, len(vocabulary)), tokens) == [NO_STOP] * (
        len(texts) - 1
    ) + [0]


@pytest.mark.parametrize(
    "texts",
    [["</search", " >"], ["< /search>"], ["<search>"], ["</sear", "x", "ch>"], ["</Search>"]],
)
def test_near_misses_are_not_found(texts):
    vocabulary, tokens = pieces(*texts)
    assert set(run(build_automaton(STOPS, vocabulary, len(vocabulary)), tokens)) == {NO_STOP}


def test_found_stop_stays_whatever_follows():
    vocabulary, tokens = pieces("</answer>", "</search>", "x", "")
    assert run(build_automaton(STOPS, vocabulary, 6), [*tokens, 5]) == [1, 1, 1, 1, 1]


def test_character_split_over_tokens():
    whole = "。終わり".encode()
    vocabulary = [whole[:2], whole[2:7], whole[7:] + b"x"]
    assert run(build_automaton(["。終わり"], vocabulary, 3), [0, 1, 2]) == [NO_STOP, NO_STOP, 0]


def test_special_token_and_padding_row_are_not_in_the_text():
    vocabulary, _ = pieces("</sea", "rch>", "", "x")
    automaton = build_automaton(STOPS, vocabulary, vocab_size=6)
    for silent in (2, 4, 5):  # the special token, then two rows that the tokenizer does not have
        assert run(automaton, [silent, 0, silent, silent, 1, silent]) == [NO_STOP] * 4 + [0, 0]
        assert set(run(automaton, [0, silent, 3, 1])) == {NO_STOP}


def test_stop_inside_another():
    """`ab` ends before `abc` and together with `xab`: the one listed first is found."""
    vocabulary, _ = pieces("a", "b", "c", "x")
    assert run(build_automaton(["abc", "ab", "xab"], vocabulary, 4), [3, 0, 1, 2]) == [
        NO_STOP,
        NO_STOP,
        1,
        1,
    ]
    assert run(build_automaton(["xab", "ab"], vocabulary, 4), [3, 0, 1]) == [NO_STOP, NO_STOP, 0]


def test_more_than_127_states_take_two_bytes():
    vocabulary, tokens = pieces("a" * 150, "b")
    small, large = (
        build_automaton(["ab"], vocabulary, 2),
        build_automaton(["a" * 150 + "b"], vocabulary, 2),
    )
    assert (small.table_AV.dtype, large.table_AV.dtype) == (np.dtype(np.int8), np.dtype(np.int16))
    assert run(large, tokens) == [NO_STOP, 0]


def test_no_stop_strings_find_nothing():
    vocabulary, tokens = pieces("a")
    assert run(build_automaton([], vocabulary, 2), tokens) == [NO_STOP]


@pytest.mark.parametrize("stops", [["a", ""], ["a", "a"]])
def test_unusable_stop_strings(stops):
    with pytest.raises(ValueError, match="distinct and not empty"):
        build_automaton(stops, [b"a"], 1)


def test_tokenizer_larger_than_the_model():
    with pytest.raises(InputError, match="2 tokens but the model only 1"):
        build_automaton(STOPS, [b"a", b"b"], 1)


def test_qwen_sized_table_is_built_quickly():
    random = np.random.default_rng(0)
    lengths = random.poisson(6, 151_000)
    lengths[:2] = 128  # the longest tokens of Qwen2.5 are 128 spaces
    vocabulary = [random.bytes(n) for n in lengths]
    start = time.process_time()
    automaton = build_automaton(STOPS, vocabulary, vocab_size=151_936)
    assert time.process_time() - start < 3
    assert automaton.table_AV.shape == (23 + 3, 151_936) and automaton.table_AV.dtype == np.int8


# --- token_bytes: the bytes of the ids, put together, are the bytes of the text ---

TEXT = "Wo ist  Zürich?\n\n終 🙂 </search>\t\x00 ~"


def byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken("<thé nk>", special=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def sentencepiece() -> PreTrainedTokenizerFast:
    """As Llama 2 has it: ▁ for a space, <0xNN> for what the vocabulary lacks."""
    words = [
        "<unk>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        *"Woistz<>/s終",
        "▁i",
        "▁ist",
    ]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, "st"]))}
    merges = [("▁", "i"), ("s", "t"), ("▁i", "st")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<unk>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("make", [byte_level, sentencepiece])
def test_token_bytes_spell_the_text(make):
    tokenizer = make()
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    bytes_of = token_bytes(tokenizer)
    assert len(ids) > 5
    assert b"".join(bytes_of[i] for i in ids) == TEXT.encode()
    assert run(build_automaton(STOPS, bytes_of, len(bytes_of)), ids)[-1] == 0


REAL = {make.__name__: make() for make in (byte_level, sentencepiece)}
TEXTS = st.lists(
    st.sampled_from([*STOPS, "</", "</sear", "ch>", "<", "/search>", "終", "ü🙂", " ", "ist"]),
    max_size=8,
)


@pytest.mark.parametrize("name", REAL)
@given(parts=TEXTS, data=st.data())
@settings(deadline=None, max_examples=40)
def test_random_tokenisations_of_real_tokenizers(name, parts, data):
    """Any cut of a text into tokens, through characters and stops too, with special ones and such
    as the tokenizer lacks between them: found as soon as the text, as players of the game have
    it, has a stop.
    """
    tokenizer, text = REAL[name], "".join(parts)
    special = next(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)
    padding = len(tokenizer)
    bytes_of, rest, ids = [*token_bytes(tokenizer), b""], text.encode(), []
    while rest:
        ids.append(
            data.draw(
                st.sampled_from([i for i, b in enumerate(bytes_of) if b and rest.startswith(b)])
            )
        )
        rest = rest[len(bytes_of[ids[-1]]) :]
        ids += data.draw(st.sampled_from([[], [special], [padding, special]]))
    found = run(build_automaton(STOPS, bytes_of, len(bytes_of)), ids)
    assert found == search(STOPS, [bytes_of[i] for i in ids])
    decoded = EpisodeContext(
        tokenizer, prompts.STYLES["brief"], "chat", Limits(9, 9, 9, 9, 9, 9, 9)
    ).decode(ids)
    assert (NO_STOP not in found[-1:] and bool(ids)) == any(stop in decoded for stop in STOPS)


def test_added_tokens_have_bytes_and_special_ones_none():
    tokenizer = byte_level()
    bytes_of = token_bytes(tokenizer)
    assert len(bytes_of) == len(tokenizer)
    assert bytes_of[tokenizer.get_vocab()["<|im_end|>"]] == b""
    assert bytes_of[tokenizer.get_vocab()["<thé nk>"]] == "<thé nk>".encode()


def test_every_byte_has_its_token():
    bytes_of = token_bytes(byte_level())
    assert {bytes([b]) for b in range(256)} <= set(bytes_of)


def test_unknown_kind_of_tokenizer():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    with pytest.raises(InputError, match="expected ByteLevel"):
        token_bytes(tokenizer)
