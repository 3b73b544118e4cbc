"""Asking a model: what comes out is what the model says, line for line; wrong input is one
sentence.
"""

import dataclasses
import io
import json
import math
import os
import signal
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ssp_jax.data import load_questions
from ssp_jax.errors import printable
from ssp_jax.game import prompts
from ssp_jax.generate import __main__ as generate
from ssp_jax.generate import ask
from ssp_jax.model import attention, decoder, hf_adapter, hf_load
from ssp_jax.model.linear import Lora
from ssp_jax.retriever.search import open_retriever
from ssp_jax.rollout.engine import Stats
from tests.model_folders import write_adapter

TINY = Path("assets/tiny")
MODEL = f"--model={TINY / 'model'}"
BRIEF = ("--style=brief", "--dtype=float32")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "index"
    open_retriever(TINY / "corpus.jsonl", folder, stemmer="english", stopwords="en", k1=1.5, b=0.75)
    return folder


def answers(folder, lines, *arguments):
    """The output lines for these input lines."""
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [
        MODEL,
        f"--prompts={folder / 'in.jsonl'}",
        f"--out={folder / 'out.jsonl'}",
        *BRIEF,
        *arguments,
    ]
    assert generate.main(argv) == 0
    assert {path.name for path in folder.glob("*.jsonl*")} == {"in.jsonl", "out.jsonl"}
    return [json.loads(line) for line in (folder / "out.jsonl").read_text().splitlines()]


def tiny_model():
    config = hf_load.read_config(TINY / "model")
    return config, hf_load.load(TINY / "model", config, None, jnp.float32)


def greedy(prompts, steps, model=None):
    """The same by whole forward passes, without cache or engine: (token ids, log-probs) of each."""
    config, params = model or tiny_model()
    T = max(map(len, prompts)) + steps

    @jax.jit
    def logp(tokens_1T):
        segments_1T = jnp.ones((1, T), jnp.int32)

        def attend(q, k, v):
            return attention.packed(q, k, v, segments_1T), None

        hidden_1TD = decoder.forward(
            config, params, tokens_1T, jnp.arange(T)[None], attend, dtype=jnp.float32
        )
        return jax.nn.log_softmax(decoder.logits(params, hidden_1TD[0]), axis=-1)

    def goes_on(prompt):
        tokens = list(prompt)
        logprobs = []
        for _ in range(steps):
            padded = np.zeros((1, T), np.int32)
            padded[0, : len(tokens)] = tokens
            row = np.asarray(logp(padded))[len(tokens) - 1]
            tokens.append(int(row.argmax()))
            logprobs.append(float(row.max()))
        return tokens[len(prompt) :], logprobs

    return [goes_on(prompt) for prompt in prompts]


@pytest.mark.ci
def test_greedy_lines_are_the_models_own_words_in_order(tmp_path):
    tokenizer = hf_load.load_tokenizer(TINY / "model")
    long = (
        " The capital of Norway is Oslo, the capital of Peru is Lima and the capital of Kenya is "
    )
    texts = ["Question: Which", long, "a"]
    lines = answers(tmp_path, [{"prompt": text} for text in texts], "--max_tokens=6")
    expected = greedy([tokenizer.encode(text) for text in texts], 6)
    for line, (token_ids, logprobs) in zip(lines, expected, strict=True):
        n = len(line["token_ids"])
        assert line["token_ids"] == token_ids[:n] and line["stop_reason"] == (
            "max_tokens" if n == 6 else "eos"
        )
        np.testing.assert_allclose(line["logprobs"], logprobs[:n], atol=1e-4)
        assert line["text"] == tokenizer.decode(line["token_ids"], skip_special_tokens=True)
        assert line.keys() == {"token_ids", "logprobs", "text", "stop_reason"}


@pytest.mark.slow
def test_lines_with_an_adapter_are_the_words_of_both_in_order(tmp_path):
    tokenizer = hf_load.load_tokenizer(TINY / "model")
    lora = Lora(3, 6.0, ("q_proj", "o_proj", "down_proj"), rank_stabilized=True)
    folder = write_adapter(tmp_path / "adapter", TINY / "model", lora)
    base, params = tiny_model()
    config = dataclasses.replace(base, lora=lora)
    adapter = hf_adapter.load(folder, config, None, jnp.float32)
    prompt = " The capital of Norway is "
    (line,) = answers(tmp_path, [{"prompt": prompt}], "--max_tokens=6", f"--adapter={folder}")
    number = len(line["token_ids"])
    model = config, decoder.join(params, adapter)
    prompts = [tokenizer.encode(prompt)]
    ((token_ids, logprobs),) = greedy(prompts, 6, model)
    assert line["token_ids"] == token_ids[:number]
    np.testing.assert_allclose(line["logprobs"], logprobs[:number], atol=1e-4)
    ((_, of_base),) = greedy(prompts, 6)
    assert abs(logprobs[0] - of_base[0]) > 0.01  # the adapter alone makes the difference


@pytest.mark.ci
def test_messages_go_through_the_chat_template_and_seeds_matter(tmp_path):
    tokenizer = hf_load.load_tokenizer(TINY / "model")
    messages = [{"role": "user", "content": "Question: Which city?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    # as many lines as above, of as many tokens to the next power of two: the same programs
    lines = [{"messages": messages}, {"prompt": text}, {"prompt": "a"}]
    chat, plain, _ = answers(tmp_path, lines, "--max_tokens=12")
    assert chat == plain
    hot = ("--max_tokens=12", "--temperature=1.5")
    first, again, other = (answers(tmp_path, lines, *hot, f"--seed={seed}") for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.ci
def test_the_solver_searches_and_answers(tmp_path, index):
    questions = [task.question for task in load_questions(TINY / "qa" / "one_hop.jsonl")[:5]]
    lines = answers(
        tmp_path,
        [{"question": q} for q in questions],
        f"--index={index}",
        "--max_tokens=200",
        "--top_k=2",
    )
    assert [line["question"] for line in lines] == questions
    for line in lines:
        assert line.keys() == {
            *(
                "question",
                "token_ids",
                "logprobs",
                "text",
                "stop_reason",
                "searches",
                "answer",
                "turns",
            ),
        }
        found = [turn["text"] for turn in line["turns"] if turn["who"] == "search engine"]
        assert len(line["searches"]) == len(found) == line["text"].count("</information>")
        assert all(text.count("Doc ") == 2 for text in found) and "".join(found) in line[
            "text"
        ].replace("\n<", "\n<")
        given = sum(logprob is None for logprob in line["logprobs"])
        assert bool(given) == bool(found) and len(line["logprobs"]) == len(line["token_ids"])
    assert any(line["searches"] and line["answer"] for line in lines)
    limited = answers(tmp_path, [{"question": questions[0]}], f"--index={index}", "--max_tokens=20")
    assert limited[0]["stop_reason"] == "max_tokens" and len(limited[0]["token_ids"]) <= 20


@pytest.mark.ci
def test_a_typed_question_is_played_before_ones_eyes(index, monkeypatch, capsys):
    question = load_questions(TINY / "qa" / "one_hop.jsonl")[0].question
    long = "Who? " * 2000
    acts = "\x1b]0;owned\x07[bold]:cat:<|im_end|>"
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{question}\n\n{long}\n{acts}\n"))
    assert generate.main([MODEL, *BRIEF, f"--index={index}", "--max_tokens=200"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"question: {question}\n") and shown.count("question: ") == 3
    assert "tokens; expected at most 1,023]" in shown
    assert (
        printable(shown) == shown and "question: \\x1b]0;owned\\x07[bold]:cat:<|im_end|>\n" in shown
    )
    shown = shown.partition(long)[0]
    query = prompts.last_search(shown)
    answer = prompts.last_answer(shown)
    assert query and "</search>\n<information>Doc 1(Title: " in shown
    assert f"[answer: {answer} · " in shown and "ended by" in shown


@pytest.mark.ci
def test_questions_of_the_command_line_are_answered_and_nothing_is_read(index, monkeypatch, capsys):
    questions = [task.question for task in load_questions(TINY / "qa" / "one_hop.jsonl")[:2]]
    monkeypatch.setattr("sys.stdin", None)
    flags = [*BRIEF, f"--index={index}", "--max_tokens=200"]
    assert generate.main([str(TINY / "model"), *flags, *questions]) == 0
    shown = capsys.readouterr().out
    assert [q for q in questions if f"question: {q}\n" in shown] == questions
    assert shown.count("[answer: ") == 2


def test_ctrl_c_stops_what_checks_for_it_and_not_more():
    with ask._stopped_by_a_key() as check:
        check(Stats())
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(ask._Stopped):
            while True:
                check(Stats())
                time.sleep(0.01)
    with ask._stopped_by_a_key() as check:
        check(Stats())


def test_text_is_shown_once_however_chunks_cut_it():
    tokenizer = hf_load.load_tokenizer(TINY / "model")
    context = ask.make_context(tokenizer, 50)
    tokens = tokenizer.encode("Zürich, São Paulo", add_special_tokens=False)
    shown = []
    for size in (1, 2, 3):
        shown.clear()
        player = ask.Watched(context, ask.ASSISTANT, 0, 0.0, [5])
        player.show = lambda text, who: shown.append(text)
        for i in range(0, len(tokens), size):
            player.append(tokens[i : i + size], [0.0] * len(tokens[i : i + size]))
        assert "".join(shown) == "Zürich, São Paulo"


@pytest.mark.parametrize(
    ("kv_heads", "devices", "size", "limit", "expected"),
    [
        (4, 8, 15, None, 1),
        (4, 8, 15, 30, 1),
        (4, 8, 16, 30, 2),
        (8, 8, 66, 60, 4),
        (4, 6, 70, 60, 2),  # 4 does not divide 6, so the most that is possible
        (2, 1, 90, 60, 1),
    ],
)
def test_a_model_takes_as_few_devices_as_hold_it(kv_heads, devices, size, limit, expected):
    assert ask.devices_per_copy(kv_heads, devices, size, limit) == expected


@pytest.mark.parametrize("lengths", [[1], [130, 7], [3000] * 100])
@pytest.mark.parametrize("room", [1, 500])
def test_sizes_hold_what_is_asked(lengths, room):
    m = ask.load_model(TINY / "model", "float32")
    sizes = ask.make_sizes(m, lengths, room, True)
    parts = m.mesh.shape["data"]
    assert (
        sizes.cache_tokens >= max(lengths) + room
        and max(sizes.extend_buckets) <= sizes.cache_tokens
    )
    assert sizes.slots % parts == 0 and sizes.slots < len(lengths) + parts
    c = m.config
    held = 2 * c.num_layers * c.num_kv_heads * c.head_dim * 4 * sizes.cache_tokens * sizes.slots
    assert held <= ask.CPU_CACHE_BYTES * (1 + parts)
    assert sizes.slots == min(math.ceil(len(lengths) / parts) * parts, ask.SLOTS_PER_DEVICE * parts)


def test_an_episode_ends_where_the_models_context_does():
    m = ask.load_model(TINY / "model", "float32")
    assert m.context_tokens == 1024  # max_position_embeddings
    context = ask.make_context(m.tokenizer, 500)
    assert [ask._room(m, context, longest) for longest in (10, 524, 1000, 1023)] == [
        500,
        500,
        24,
        1,
    ]


def test_a_line_without_a_question_is_named(tmp_path, capsys, index):
    (tmp_path / "in.jsonl").write_text('{"question": "Who?"}\n{"prompt": "a"}\n')
    assert generate.main([MODEL, f"--prompts={tmp_path / 'in.jsonl'}", f"--index={index}"]) == 2
    assert 'in.jsonl line 2: field "question" expected non-empty text' in capsys.readouterr().err
