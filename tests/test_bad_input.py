"""The catalogue of refused input: for each command, everything that it refuses and the sentence
that it says.

A case makes its files in an empty folder, which is the current one, and gives a command line. It
must end with exit code 2 and one sentence on stderr, compile nothing, and leave every file that was
there as it was.
"""

import contextlib
import fcntl
import gzip
import json
import os
import re
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from ml_collections import ConfigDict

from ssp_jax import audit, main, stamps
from ssp_jax.answers import __main__ as answers_command
from ssp_jax.config.command_line import parse_command_line
from ssp_jax.config.values import CHOICES
from ssp_jax.errors import shown
from ssp_jax.export import __main__ as export
from ssp_jax.game.rounds import ReplayState
from ssp_jax.generate import __main__ as generate
from ssp_jax.model.linear import Lora
from ssp_jax.plan import __main__ as plan
from ssp_jax.report import __main__ as report
from ssp_jax.retriever import __main__ as retriever
from ssp_jax.retriever import index as index_files
from ssp_jax.retriever import vectors
from ssp_jax.retriever.build import build_index
from ssp_jax.retriever.encoder_files import load as load_encoder
from ssp_jax.retriever.settings import EncoderKeys
from ssp_jax.retriever.vectors import About
from ssp_jax.runtime.checkpoint import Checkpoints
from ssp_jax.runtime.logger import CompileCounter
from ssp_jax.user_code import load as user_code
from ssp_jax.workdir import as_read, keep_config
from tests.conftest import ROOT
from tests.model_folders import (
    edit_config,
    edit_header,
    edit_tensors,
    split,
    write_adapter,
    write_header,
)
from tests.report.test_report import run_folder

# an empty folder -> a command line; its first word is a key of COMMANDS
Make = Callable[[Path], list[str]]
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "main": main.main,
    "generate": generate.main,
    "plan": plan.main,
    "retriever": retriever.main,
    "report": report.main,
    "audit": audit.main,
    "export": export.main,
    "answers": answers_command.main,
}


@dataclass(frozen=True)
class Case:
    name: str  # of the test
    make: Make
    says: str  # a regular expression in the sentence: the file or key, and what was expected


TINY = ROOT / "assets/tiny"
FILES = (
    f"model.path={TINY}/model",
    f"data.answers={TINY}/answers.jsonl",
    f"data.eval_sets.one_hop={TINY}/qa/one_hop.jsonl",
    f"data.eval_sets.two_hop={TINY}/qa/two_hop.jsonl",
    f"retriever.corpus={TINY}/corpus.jsonl",
)


def tiny(*overrides: str) -> Make:
    """A training run of the tiny config with these overrides."""
    return lambda folder: [
        "main",
        f"--config={ROOT}/configs/tiny.py",
        f"--workdir={folder}/run",
        *(f"--config.{override}" for override in (*FILES, *overrides)),
    ]


def tiny_eval(*overrides: str) -> Make:
    return lambda folder: [*tiny(*overrides)(folder), "--mode=eval"]


def model(damage: Callable[[Path], Any]) -> Make:
    """generate with a damaged copy of a model folder."""

    def make(folder: Path) -> list[str]:
        damage(Path(shutil.copytree(TINY / "model", folder / "model")))
        (folder / "in.jsonl").write_text('{"prompt": "The capital of France is"}\n')
        return ["generate", "--model=model", "--prompts=in.jsonl", "--out=out.jsonl"]

    return make


def data(key: str, content: str | bytes, name: str = "rows.jsonl") -> Make:
    """A training run whose config key `key` is a file with this content."""

    def make(folder: Path) -> list[str]:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
        return tiny(f"{key}={folder / name}")(folder)

    return make


LORA = Lora(4, 8.0, ("q_proj", "v_proj"))


def of_adapter(folder: Path) -> list[str]:
    """Overrides of a run that starts from an adapter of LORA."""
    section = {"lora.rank": LORA.rank, "lora.alpha": LORA.alpha, "lora.targets": LORA.targets}
    return [f"model.adapter={folder}", *(f"{key}={value}" for key, value in section.items())]


def adapted(*overrides: str, base: Path = TINY / "model", **changes: Any) -> Make:
    """A training run that starts from an adapter of LORA, with changed keys in its config."""

    def make(folder: Path) -> list[str]:
        write_adapter(folder / "adapter", base, LORA, **changes)
        return tiny(*of_adapter(folder / "adapter"), *overrides)(folder)

    return make


def asked_with(damage: Callable[[Path], Any], **changes: Any) -> Make:
    """generate with a damaged adapter of LORA, with changed keys in its config."""

    def make(folder: Path) -> list[str]:
        damage(write_adapter(folder / "adapter", TINY / "model", LORA, **changes))
        return ask(PROMPT, "--adapter=adapter")(folder)

    return make


PROMPT = '{"prompt": "The capital of France is"}'
CHAT = (
    '{"messages": [{"role": "system", "content": "Be brief."}, '
    '{"role": "user", "content": "Who?"}]}'
)
KEPT = "results of hours"  # in out.jsonl, which no refused command may touch


def ask(line: str, *flags: str, damage: Callable[[Path], Any] | None = None) -> Make:
    """generate for this line, over an old output file; with a model that may be damaged first."""

    def make(folder: Path) -> list[str]:
        path = TINY / "model"
        if damage:
            path = Path(shutil.copytree(path, folder / "model"))
            damage(path)
        (folder / "in.jsonl").write_text(line + "\n")
        (folder / "out.jsonl").write_text(KEPT)
        return ["generate", f"--model={path}", "--prompts=in.jsonl", "--out=out.jsonl", *flags]

    return make


def edit_json(file: str, **changes: Any) -> Callable[[Path], Any]:
    """Sets keys of a file of a model folder, which may not be there yet."""

    def edit(folder: Path) -> None:
        path = folder / file
        values = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps({**values, **changes}))

    return edit


def write(file: str, content: str | bytes) -> Callable[[Path], Any]:
    raw = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / file).write_bytes(raw)


def remove(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).unlink()


def template(source: Any) -> Make:
    return ask(CHAT, damage=edit_json("tokenizer_config.json", chat_template=source))


def token(content: str, number: int) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    return {"id": number, "content": content, **flags}


def rename_im_start(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_begin|>"))


def train(damage: Callable[[Path], Any], *overrides: str) -> Make:
    """A training run of the tiny config with a damaged copy of its model."""

    def make(folder: Path) -> list[str]:
        path = Path(shutil.copytree(TINY / "model", folder / "model"))
        damage(path)
        return tiny(f"model.path={path}", *overrides)(folder)

    return make


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def audited(flag: str, content: str | bytes, name: str = "rows.jsonl") -> Make:
    """The audit of a file with this content, which reads what a run reads; --answers or --eval."""

    def make(folder: Path) -> list[str]:
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name).write_bytes(raw)
        (folder / "good.txt").write_text("Paris\n")
        answers = name if flag == "--answers" else "good.txt"
        return [
            "audit",
            f"--answers={answers}",
            *([] if flag == "--answers" else [f"{flag}={name}"]),
        ]

    return make


def answers(**changes: Any) -> Make:
    """Two given answers, the second with these changes; a field that is ... is left out."""
    return audited("--answers", two_rows({"ground_truth": "Paris", "search_turns": 2}, changes))


def questions(**changes: Any) -> Make:
    return audited("--eval", two_rows({"question": "Who?", "golden_answers": ["Paris"]}, changes))


def verl(**changes: Any) -> Make:
    row = {
        "prompt": [{"role": "user", "content": "Answer. Question: Who?"}],
        "reward_model": {"ground_truth": {"target": ["Paris"]}},
    }
    return audited("--eval", two_rows(row, changes))


def truth(value: Any) -> Make:
    return verl(reward_model={"style": "rule", "ground_truth": value})


def asked(content: Any) -> Make:
    return verl(prompt=[{"role": "user", "content": content}])


def corpus(**changes: Any) -> Make:
    def make(folder: Path) -> list[str]:
        import bm25s  # noqa: F401  # which compiles an operation of JAX when it is first imported

        rows = two_rows({"id": "0", "contents": "Paris\nis a city"}, changes)
        (folder / "rows.jsonl").write_text(rows)
        return ["retriever", "build", "--corpus=rows.jsonl", "--out=index"]

    return make


def two_rows(row: dict[str, Any], changes: dict[str, Any]) -> str:
    second = {key: value for key, value in (row | changes).items() if value is not ...}
    return json.dumps(row) + "\n" + json.dumps(second) + "\n"


def config_file(*statements: str) -> Make:
    """A run of a config file of the user's own."""

    def make(folder: Path) -> list[str]:
        lines = ["c = default.get_config()", *statements, "return c"]
        body = "".join(f"    {line}\n" for line in lines)
        (folder / "mine.py").write_text(
            f"from configs import default\n\n\ndef get_config():\n{body}"
        )
        return ["main", "--config=mine.py"]

    return make


def line(command: str) -> Make:
    """A command line; DEFAULT is the default config, MODEL the tiny model's folder."""
    words = command.replace("DEFAULT", f"--config={ROOT}/configs/default.py").split()
    return lambda folder: [word.replace("MODEL", f"{TINY}/model") for word in words]


NORM = "model.norm.weight"
FIRST = "model.layers.0.input_layernorm.weight"
NESTED = nested(100_000)
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def config_text(name: str, text: str | bytes, says: str) -> Case:
    raw = text if isinstance(text, bytes) else text.encode()
    return Case(
        name, model(lambda f: (f / "config.json").write_bytes(raw)), rf"model/config\.json {says}"
    )


def config_json(says: str, **changes: Any) -> Case:
    """generate with these keys in config.json (the value `...` removes one)."""
    name = ", ".join(
        f"{key} {'missing' if value is ... else value}" for key, value in changes.items()
    )
    sentence = rf"model/config\.json: key {says}"
    return Case(name[:80], model(lambda f: edit_config(f, **changes)), sentence)


def header(
    name: str, change: Callable[[dict[str, Any]], Any], says: str, after: bytes = b""
) -> Case:
    """generate with a changed header of the weights."""
    return Case(
        name, model(lambda f: edit_header(f, change, after)), rf"model/model\.safetensors{says}"
    )


def norm(says: str, **entry: Any) -> Case:
    """generate with a changed entry of one tensor in the header of the weights."""
    name = "a tensor with " + ", ".join(f"{key} {shown(value)}" for key, value in entry.items())
    return header(name, lambda h: h[NORM].update(entry), f': tensor "{NORM}" {says}')


def index(name: str, change: Callable[[dict[str, Any]], Any], says: str) -> Case:
    """generate with two files of weights and a changed weight map."""
    return Case(name, model(lambda f: split(f, change)), says)


def not_finite(folder: Path) -> None:
    x = np.ones(128, ml_dtypes.bfloat16)
    x[7] = np.nan
    edit_tensors(folder, **{NORM: x})


def diverged(folder: Path) -> None:
    edit_tensors(folder, **{NORM: np.full(128, np.inf, ml_dtypes.bfloat16)})


CONFIG_JSON = [
    config_text("a config.json that is no object", "[]", "expected a JSON object, found list"),
    config_text("a config.json that is no JSON", "{", "is not valid JSON"),
    config_text("a config.json that is nested too deeply", NESTED, "is nested too deeply"),
    config_text(
        "a config.json in a key of which all is nested", f'{{"a": {NESTED}}}', "is nested too"
    ),
    config_text("a config.json that is not UTF-8", b'{"a": "\xff"}', "is not valid JSON"),
    config_text("a config.json with a number of 5,000 digits", f'{{"a": {"9" * 5000}}}', "is not"),
    Case(
        "no config.json",
        model(lambda f: (f / "config.json").unlink()),
        r"config\.json does not exist",
    ),
    config_json('"model_type" is \'gpt2\'; expected "qwen2"', model_type="gpt2"),
    config_json('"model_type" is \'llama\'; expected "qwen2"', model_type="llama"),
    config_json('"model_type" is None', model_type=None),
    config_json(
        "\"architectures\" is 'MistralForCausalLM'; supported", architectures=["MistralForCausalLM"]
    ),
    config_json('"architectures" is None; supported are Qwen2ForCausalLM', architectures=...),
    config_json('"architectures" is None', architectures=[]),
    config_json('"architectures" expected a list of names', architectures="Qwen2ForCausalLM"),
    config_json(
        '"architectures" expected a list of names', architectures={"a": "Qwen2ForCausalLM"}
    ),
    config_json('"architectures" is \\[', architectures=[["Qwen2ForCausalLM"]]),
    config_json('"auto_map" asks to run code', auto_map={"AutoModelForCausalLM": "mine.Mine"}),
    config_json(
        '"auto_map" asks to run code', auto_map={"AutoConfig": "other/repository--mine.Mine"}
    ),
    config_json('"hidden_size" is missing', hidden_size=...),
    config_json('"hidden_size" expected a positive int, found 128.0', hidden_size=128.0),
    config_json("\"vocab_size\" expected a positive int, found 'many'", vocab_size="many"),
    config_json('"vocab_size" expected a positive int, found \\[', vocab_size=[2048]),
    config_json('"vocab_size" is 1000000000; expected at most', vocab_size=10**9),
    config_json('"num_hidden_layers" expected a positive int, found 0', num_hidden_layers=0),
    config_json('"num_hidden_layers" expected a positive int, found True', num_hidden_layers=True),
    config_json(
        '"num_hidden_layers" is 1000000000; expected at most 1000', num_hidden_layers=10**9
    ),
    config_json('"num_attention_heads" expected a positive int', num_attention_heads=-4),
    config_json('"num_key_value_heads" is 3, which does not divide 4', num_key_value_heads=3),
    config_json('"num_key_value_heads" is missing', num_key_value_heads=...),
    config_json('"head_dim" is missing and 6 heads do not', num_attention_heads=6),
    config_json('"head_dim" is 15; rotary positions need an even', head_dim=15),
    config_json('"intermediate_size" is 1[0-9.+e]+; expected at most', intermediate_size=10**30),
    config_json('"rms_norm_eps" expected a positive float, found None', rms_norm_eps=None),
    config_json('"rms_norm_eps" expected a positive float, found nan', rms_norm_eps=float("nan")),
    config_json('"rms_norm_eps" is 10+.*; expected at most 1', rms_norm_eps=10**400),
    config_json('"rope_theta" is missing', rope_theta=...),
    config_json('"rope_theta" expected a positive float, found None', rope_theta=None),
    config_json('"rope_theta" is inf; expected at most', rope_theta=float("inf")),
    config_json('"rope_scaling" expected a JSON object', rope_scaling="yarn"),
    config_json('"rope_parameters" expected a JSON object', rope_parameters=[1]),
    config_json("\"rope_type\" is 'yarn'; only", rope_scaling={"type": "yarn", "factor": 4.0}),
    config_json(
        "\"rope_type\" is 'yarn'; only",
        rope_theta=...,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rope_scaling={"rope_type": "yarn", "factor": 4.0},
    ),
    config_json('"rope_type" is \\[', rope_scaling={"rope_type": ["llama3"]}),
    config_json(
        '"rope_scaling" replaces "rope_parameters" and lacks its rope_theta',
        rope_theta=...,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        rope_scaling={**LLAMA3, "original_max_position_embeddings": 8192},
    ),
    config_json('"factor" is missing', rope_scaling={"rope_type": "llama3"}),
    config_json('"factor" expected a positive float', rope_scaling={**LLAMA3, "factor": "8"}),
    config_json(
        '"low_freq_factor" expected a number below', rope_scaling={**LLAMA3, "low_freq_factor": 4}
    ),
    config_json(
        '"full_attention" is an object', rope_scaling={"full_attention": {"rope_theta": 1e4}}
    ),
    config_json(
        '"partial_rotary_factor" is 0.5; only 1.0', rope_scaling={"partial_rotary_factor": 0.5}
    ),
    config_json('"partial_rotary_factor" is 0.5; only', partial_rotary_factor=0.5),
    config_json('"tie_word_embeddings" expected true or false', tie_word_embeddings="false"),
    config_json(
        '"tie_word_embeddings" expected true or false, found None', tie_word_embeddings=None
    ),
    config_json('"use_sliding_window" is True; only False', use_sliding_window=True),
    config_json(
        "\"layer_types\" contains 'sliding_attention'",
        layer_types=["full_attention", "sliding_attention"],
    ),
    config_json('"layer_types" expected a list', layer_types="full_attention"),
    config_json('"mlp_bias" is True; only False', mlp_bias=True),
    config_json('"attention_bias" is True; only False', **LLAMA, attention_bias=True),
    config_json("\"hidden_act\" is 'gelu'; only 'silu'", hidden_act="gelu"),
    config_json('"is_causal" is False; only True', is_causal=False),
    config_json('"quantization_config" is', quantization_config={"bits": 4}),
    config_json('"text_config" is', text_config={"hidden_size": 128}),
    config_json('"transformers_weights" is', transformers_weights="other.safetensors"),
]

WEIGHTS = [
    Case("a tensor is missing", model(lambda f: edit_tensors(f, **{NORM: None})), NORM),
    Case("a weight that is NaN", model(not_finite), f'"{NORM}" has values that are not finite'),
    Case(
        "a tensor that the model would not use",
        model(lambda f: edit_tensors(f, **{"model.layers.0.self_attn.o_proj.bias": np.ones(8)})),
        'o_proj.bias" has dtype F64; expected',
    ),
    Case(
        "norms of queries in a model without them",
        model(
            lambda f: edit_tensors(
                f, **{"model.layers.0.self_attn.q_norm.weight": np.ones(8, "f4")}
            )
        ),
        'q_norm.weight" is not part of the model in config.json',
    ),
    Case(
        "biases that the config does not have",
        model(lambda f: edit_config(f, **LLAMA)),
        '_proj.bias" is not part of the model in config.json',
    ),
    Case(
        "fewer layers than the config says",
        model(lambda f: edit_config(f, num_hidden_layers=5)),
        'tensor "model.layers.4.input_layernorm.weight" is missing',
    ),
    Case(
        "more layers than the config says",
        model(lambda f: edit_config(f, num_hidden_layers=3)),
        'tensor "model.layers.3.*" is not part of the model in config.json',
    ),
    Case(
        "no head in an untied model",
        model(lambda f: edit_config(f, tie_word_embeddings=False)),
        'tensor "lm_head.weight" is missing',
    ),
    Case(
        "a head of another shape in a tied model",
        model(lambda f: edit_tensors(f, **{"lm_head.weight": np.ones((2049, 128), "f4")})),
        r'tensor "lm_head.weight" has shape \(2049, 128\); config.json asks for \(2048, 128\)',
    ),
    Case(
        "an adapter beside the weights",
        model(lambda f: (f / "adapter_config.json").write_text("{}")),
        "adapter_config.json asks for an adapter beside the weights",
    ),
    Case(
        "weights of 8 bits",
        model(lambda f: edit_tensors(f, **{NORM: np.ones(128, np.int8)})),
        f'"{NORM}" has dtype I8; expected F32, F16, BF16',
    ),
    Case(
        "a file that is no safetensors",
        model(lambda f: (f / "model.safetensors").write_bytes(b"\5" + bytes(7) + b"hello")),
        "model.safetensors is not a safetensors file: its header is not valid JSON",
    ),
    Case(
        "a header that is longer than the file",
        model(lambda f: (f / "model.safetensors").write_bytes(b"\xff" * 8 + b"{}")),
        "model.safetensors is truncated or not a safetensors file: it has 10 bytes",
    ),
    Case(
        "a header that is nested too deeply",
        model(lambda f: write_header(f, NESTED)),
        "model.safetensors is not a safetensors file: its header is not valid JSON",
    ),
    Case(
        "a header that has a tensor twice",
        model(lambda f: write_header(f, '{"a": {}, "a": {}}')),
        "model.safetensors: its header has 'a' twice",
    ),
    header(
        "a header that is no object",
        lambda h: [h],
        " is not a safetensors file: its header is not a",
    ),
    header(
        "an entry that is no object",
        lambda h: h | {NORM: []},
        f': tensor "{NORM}" has no dtype, shape',
    ),
    header(
        "an entry that is a number",
        lambda h: h | {NORM: 1},
        f': tensor "{NORM}" has no dtype, shape',
    ),
    header(
        "metadata of numbers",
        lambda h: h | {"__metadata__": {"a": 1}},
        ": __metadata__ in its header",
    ),
    header(
        "bytes after the last tensor", lambda h: None, " has 3 bytes after its last tensor", b"abc"
    ),
    header(
        "bytes of no tensor",
        lambda h: h.pop(FIRST) and None,
        ": tensor .* follows bytes of no tensor",
    ),
    norm("has dtype I4; expected F32, F16, BF16", dtype="I4"),
    norm(r"has dtype \[", dtype=["BF16"]),
    norm("has no dtype, shape and data_offsets", data_offsets=[1, 2, 3]),
    norm("has no dtype, shape and data_offsets", shape=None),
    norm(r"has shape \(True, 128\) and offsets .*; expected natural", shape=[True, 128]),
    norm(r"has shape \(1.5,\) and offsets", shape=[1.5]),
    norm("has shape .* and offsets .*; expected natural numbers", data_offsets=[-256, 0]),
    norm(r"of shape \(1000000000000, 1000000000000\) has 256 bytes", shape=[10**12, 10**12]),
    norm(r"of shape \(127,\) has 256 bytes", shape=[127]),
    norm("ends at byte [0-9]+, but the file is truncated", data_offsets=[10**18, 10**18 + 256]),
    header(
        "tensors that overlap",
        lambda h: h[NORM].update(data_offsets=[0, 256]),
        ": .* overlaps another",
    ),
    Case(
        "no weights",
        model(lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin")),
        "model has no model weights; expected model.safetensors or model.safetensors.index.json",
    ),
    index("an index that is empty", lambda m: {}, '"model.embed_tokens.weight" is missing'),
    index(
        "an index that is a list",
        lambda m: [],
        'index.json: key "weight_map" is missing or does not',
    ),
    index(
        "an index that gives a number",
        lambda m: m.update({NORM: 1}),
        'key "weight_map" is missing or',
    ),
    index("an index that forgets a tensor", lambda m: m.pop(NORM) and None, f'"{NORM}" is missing'),
    index(
        "an index that has the wrong file",
        lambda m: m.update({NORM: "partTrue.safetensors"}),
        "is missing",
    ),
    index(
        "an index that leaves the folder",
        lambda m: m.update({NORM: "../a.safetensors"}),
        "of this folder",
    ),
    index(
        "an index with an absolute path",
        lambda m: m.update({NORM: "/a.safetensors"}),
        "of this folder",
    ),
    index("an index with a long name", lambda m: m.update({NORM: "a" * 300}), "of this folder"),
    index("an index that names the folder", lambda m: m.update({NORM: ".."}), "of this folder"),
    index(
        "an index with a file that is missing",
        lambda m: m.update({NORM: "a.safetensors"}),
        "does not exist",
    ),
    index(
        "an index with a file that is not its own",
        lambda m: m.update({NORM: "config.json"}),
        "config.json",
    ),
]


def planned(**changes: Any) -> Make:
    """plan for a config.json with these keys, without weights."""

    def make(folder: Path) -> list[str]:
        shutil.copyfile(TINY / "model/config.json", folder / "config.json")
        edit_config(folder, **changes)
        return ["plan", f"--config={ROOT}/configs/default.py", f"--config.model.path={folder}"]

    return make


def no_folder(name: str, path: str, says: str) -> Case:
    return Case(name, lambda folder: ["generate", f"--model={path}", "--prompts=in.jsonl"], says)


MODEL_FOLDERS = [
    *CONFIG_JSON,
    *WEIGHTS,
    Case(
        "train: a thousand million layers",
        train(lambda f: edit_config(f, num_hidden_layers=10**9)),
        "at most 1000",
    ),
    Case(
        "train: a tensor is missing",
        train(lambda f: edit_tensors(f, **{NORM: None})),
        f'"{NORM}" is missing',
    ),
    Case(
        "train: a weight that is NaN", train(diverged), f'"{NORM}" has values that are not finite'
    ),
    Case(
        "plan: a thousand million layers",
        planned(num_hidden_layers=10**9),
        "is 1000000000; expected at most 1000",
    ),
    Case(
        "plan: a text for an object",
        planned(rope_scaling="yarn"),
        "config.json: key .rope_scaling. expected",
    ),
    Case(
        "a tokenizer that asks to run code",
        model(edit_json("tokenizer_config.json", auto_map={"AutoTokenizer": ["mine.Mine", None]})),
        r'model/tokenizer_config\.json: key "auto_map" asks to run code',
    ),
    no_folder(
        "a model folder that does not exist", "nowhere", "model folder nowhere does not exist"
    ),
    no_folder("a file in place of a model folder", __file__, "is a file; expected the folder"),
    no_folder(
        "a name of a folder that is too long", "a" * 5000, "cannot be read: File name too long"
    ),
    no_folder(
        "a name that the hub cannot have", "a/b--c", "neither a local folder nor to be had from the"
    ),
    no_folder(
        "a protocol that nobody knows", "zz://b/model", "cannot be reached: Protocol not known: zz"
    ),
]

TOKENIZER_CONFIG = "tokenizer_config.json"
TOKENIZER_JSON = "tokenizer.json"
BOMB = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
TOKENIZERS = [
    *(
        Case(
            f"{file} is missing",
            ask(PROMPT, damage=remove(file)),
            f"model/{file} does not exist; expected a",
        )
        for file in (TOKENIZER_CONFIG, TOKENIZER_JSON)
    ),
    *(
        Case(f"{file} is {what}", ask(PROMPT, damage=write(file, content)), rf"{file}.*{says}")
        for file in (
            TOKENIZER_CONFIG,
            TOKENIZER_JSON,
            "special_tokens_map.json",
            "added_tokens.json",
        )
        for what, content, says in (
            ("no JSON", "{", "not valid JSON"),
            ("no object", "[]", "JSON object"),
            ("nested deep", '{"a": ' + nested(100_000) + "}", "nested too deeply"),
            ("no text", b"\xff\xfe", "not valid JSON"),
        )
    ),
    *(
        Case(
            f"{key} {value!r}",
            ask(PROMPT, damage=edit_json(file, **{key: value})),
            f'{file}: key "{key}".*{says}',
        )
        for file, key, value, says in (
            (TOKENIZER_CONFIG, "eos_token", 5, "a token"),
            (TOKENIZER_CONFIG, "pad_token", ["a"], "a token"),
            (TOKENIZER_CONFIG, "bos_token", {"id": 1}, "a token"),
            (TOKENIZER_CONFIG, "additional_special_tokens", "a", "a list of tokens"),
            (TOKENIZER_CONFIG, "extra_special_tokens", [1], "a list of tokens"),
            (TOKENIZER_CONFIG, "added_tokens_decoder", [], "a token for each id"),
            (TOKENIZER_CONFIG, "added_tokens_decoder", {"one": "a"}, "a token for each id"),
            (TOKENIZER_CONFIG, "added_tokens_decoder", {"1": {}}, "a token for each id"),
            (TOKENIZER_CONFIG, "chat_template", 5, "a text, or a list"),
            (TOKENIZER_CONFIG, "chat_template", [{"name": "default"}], "a text, or a list"),
            (TOKENIZER_CONFIG, "tokenizer_class", ["Qwen2Tokenizer"], "a text"),
            (TOKENIZER_CONFIG, "model_max_length", "long", "a number"),
            (TOKENIZER_CONFIG, "add_prefix_space", "no", "true or false"),
            ("special_tokens_map.json", "eos_token", 2, "a token"),
            ("special_tokens_map.json", "additional_special_tokens", 2, "a list of tokens"),
            *(
                ("config.json", "eos_token_id", value, "ids from 0 to 2047")
                for value in (-1, 1.5, 2048, "2", [2, -1])
            ),
            ("generation_config.json", "eos_token_id", [True], "ids from 0 to 2047, found True"),
        )
    ),
    Case(
        "an added token without an id",
        ask(PROMPT, damage=edit_json("added_tokens.json", a="b")),
        'token "a"',
    ),
    Case(
        "a version to come",
        ask(PROMPT, damage=edit_json(TOKENIZER_JSON, version="9")),
        "tokenizer.json .*version",
    ),
    *(
        Case(
            f"tokenizer.json {key} {value!r}",
            ask(PROMPT, damage=edit_json(TOKENIZER_JSON, **{key: value})),
            says,
        )
        for key, value, says in (
            ("model", {"type": "Unheard"}, f"{TOKENIZER_JSON} cannot be read"),
            ("model", 5, f"{TOKENIZER_JSON} cannot be read"),
            ("added_tokens", 5, f"{TOKENIZER_JSON} cannot be read"),
            ("added_tokens", ["a"], f"{TOKENIZER_JSON} cannot be read"),
            ("normalizer", {"type": "Unheard"}, f"{TOKENIZER_JSON} cannot be read"),
            ("decoder", {"type": "Unheard"}, f"{TOKENIZER_JSON} cannot be read"),
            (
                "added_tokens",
                [token("<a>", 2048)],
                'token "<a>" has id 2048; the model has 2048 rows',
            ),
        )
    ),
    Case(
        "an eos token that is nowhere",
        ask(PROMPT, damage=edit_json(TOKENIZER_CONFIG, eos_token="<stop>")),
        f'{TOKENIZER_JSON} lacks the token "<stop>"',
    ),
    Case(
        "a template in no text",
        ask(CHAT, damage=write("chat_template.jinja", b"\xff")),
        "chat_template.jinja",
    ),
    Case(
        "templates without a default",
        template([{"name": "rag", "template": "a"}]),
        "named 'rag', and none",
    ),
    Case("no template", template(None), "has no chat template"),
    Case("a template that is no template", template("{% for %}"), "chat template of .*refuses"),
    Case(
        "a template that divides by zero",
        template("{{ 1 / 0 }}"),
        "chat template of .*ZeroDivisionError",
    ),
    Case(
        "a template that imports",
        template("{% import 'os' as os %}"),
        "chat template of .*cannot be read",
    ),
    Case(
        "a template that recurses",
        template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"),
        "RecursionError",
    ),
    Case("a template that does not end", template(BOMB), "takes more than 3 s or 4 GiB"),
    Case(
        "a template that fills memory",
        template("{{ 'a' * 10 ** 11 }}"),
        "takes more than 3 s or 4 GiB",
    ),
    Case(
        "a template that refuses roles",
        template("{{ raise_exception('no system') }}"),
        "messages: no system",
    ),
    Case(
        "a template of one text",
        template("Hello."),
        r"drops message 1 of 2 \(system: 'Be brief.'\)",
    ),
    Case(
        "a template without system",
        template(NO_SYSTEM),
        "drops message 1 of 2",
    ),
    Case(
        "raw_chatml for a tokenizer without it",
        ask(CHAT, "--template=raw_chatml", damage=rename_im_start),
        r"lacks <\|im_start\|>",
    ),
    Case(
        "a run whose template drops the system turn",
        train(edit_json(TOKENIZER_CONFIG, chat_template=NO_SYSTEM), "prompt.style=search_r1"),
        "drops message 1 of 2",
    ),
]

GENERATE = [
    *(
        Case(f"generate {line} {' '.join(flags)}", ask(line, *flags), says)
        for line, flags, says in (
            ('{"prompt": ""}', (), 'in.jsonl line 1: field "prompt" expected non-empty text'),
            ('{"prompt": 3}', (), 'in.jsonl line 1: field "prompt" expected non-empty text'),
            ('{"prompt": "\\ud83d"}', (), 'in.jsonl line 1: field "prompt" expected valid Unicode'),
            ('{"question": "Who?"}', (), "lines with a question need --index"),
            ('{"messages": []}', (), 'field "messages" expected a list of'),
            ('{"messages": [{"role": "user"}]}', (), 'objects with texts "role" and "content"'),
            (
                '{"messages": [{"role": "user", "content": "\\ud83d"}]}',
                (),
                "messages.content.*valid Unicode",
            ),
            ("[1]", (), "in.jsonl line 1: expected a JSON object"),
            ("", (), "expected at least one line"),
            (
                PROMPT,
                ("--out=nowhere/out.jsonl",),
                "--out=nowhere/out.jsonl: expected a file that can be written",
            ),
            (PROMPT, ("--out=.",), "--out=.: expected a file that can be written"),
            (PROMPT, ("--prompts=nowhere.jsonl",), "nowhere.jsonl: expected a readable file"),
            (PROMPT, ("--index=nowhere",), "--index=nowhere: expected the folder"),
            (
                PROMPT,
                ("--max_tokens=0",),
                "flag --max_tokens is 0; expected more than 0, up to 16777216",
            ),
            (
                PROMPT,
                ("--max_tokens=1000000000",),
                "flag --max_tokens is 1000000000; expected at most",
            ),
            (PROMPT, ("--max_tokens=many",), "max_tokens"),
            (
                PROMPT,
                ("--temperature=-1",),
                "flag --temperature is -1.0; expected 0, or at least 0.01",
            ),
            (PROMPT, ("--temperature=nan",), "flag --temperature is nan; expected a finite number"),
            (PROMPT, ("--temperature=inf",), "flag --temperature is inf; expected a finite number"),
            (
                PROMPT,
                ("--temperature=1e-30",),
                "flag --temperature is 1e-30; expected 0, or at least 0.01",
            ),
            (PROMPT, ("--seed=-1",), "flag --seed is -1; expected at least 0"),
            (
                PROMPT,
                ("--seed=4294967296",),
                "flag --seed is 4294967296; expected at most 4294967295",
            ),
            (PROMPT, ("--top_k=0",), "flag --top_k is 0; expected more than 0"),
            (PROMPT, ("--top_k=1000000000",), "flag --top_k is 1000000000; expected at most"),
            (PROMPT, ("--max_searches=0",), "flag --max_searches is 0; expected more than 0"),
            (PROMPT, ("--dtype=int8",), "float32"),
            (PROMPT, ("--style=mine",), "search_r1"),
            (PROMPT, ("--template=mine",), "raw_chatml"),
            (PROMPT, ("--max_token=3",), "max_token"),
            (PROMPT, ("stray",), "found both: 'stray'"),
            (PROMPT, ("--model=nowhere",), "nowhere"),
            (PROMPT, ("--model=",), "flag --model is missing"),
            (PROMPT, ("--prompts=",), "--out needs --prompts"),
        )
    ),
    Case(
        "a prompt of 600,000 characters",
        ask(PROMPT + '\n{"prompt": "' + "The capital. " * 50_000 + '"}'),
        r"in.jsonl line 2: the prompt has \d{3},\d{3} tokens; expected fewer than the 1,024 of the "
        "model's context",
    ),
    Case(
        "messages that are too long",
        ask('{"messages": [{"role": "user", "content": "' + "Who? " * 2000 + '"}]}'),
        "in.jsonl line 1: the prompt has .* tokens",
    ),
    Case(
        "the weights are cut short, and the output is there",
        ask(PROMPT, damage=lambda folder: (folder / "model.safetensors").write_bytes(b"short")),
        "model.safetensors",
    ),
    Case(
        "weights that are too few, and the output is there",
        ask(PROMPT, damage=lambda folder: edit_tensors(folder, **{"model.norm.weight": None})),
        "model.norm.weight",
    ),
]

OTHER_BASE = ROOT / "tests/goldens/qwen2"
ADAPTERS = [
    Case(
        "generate: no such adapter",
        ask(PROMPT, "--adapter=nowhere"),
        "nowhere does not exist",
    ),
    Case(
        "generate: a model as its adapter",
        ask(PROMPT, f"--adapter={TINY}/model"),
        "adapter_config.json does not exist; expected",
    ),
    Case(
        "generate: an adapter as the model",
        lambda folder: [
            write_adapter(folder / "adapter", TINY / "model", LORA),
            ["generate", "--model=adapter", "--prompts=in.jsonl"],
        ][1],
        "config.json does not exist and adapter_config.json does; .* as model.adapter",
    ),
    Case(
        "generate: DoRA",
        asked_with(lambda f: None, use_dora=True),
        'adapter/adapter_config.json: key "use_dora" is True; only False is supported',
    ),
    Case(
        "generate: an adapter that is cut short",
        asked_with(lambda f: os.truncate(f / "adapter_model.safetensors", 3000)),
        "adapter/adapter_model.safetensors: tensor .* but the file is truncated",
    ),
    Case(
        "generate: an adapter without weights",
        asked_with(lambda f: os.remove(f / "adapter_model.safetensors")),
        "adapter/adapter_model.safetensors does not exist",
    ),
    Case(
        "train: no such adapter",
        tiny("model.adapter=nowhere", "lora.rank=4"),
        "nowhere does not exist",
    ),
    Case(
        "train: an adapter of another base",
        adapted(base=OTHER_BASE),
        r"q_proj.lora_A.weight\" has shape \(4, 64\); expected \(4, 128\), for the base's q_proj",
    ),
    Case("train: PiSSA", adapted(init_lora_weights="pissa"), "is 'pissa', which may change"),
    Case(
        "train: an adapter and rank 0",
        adapted("lora.rank=0"),
        "section lora is not that of model.adapter=.*: lora.rank is 0; expected 4$",
    ),
    Case(
        "train: another alpha, and other layers",
        adapted("lora.alpha=32.0", target_modules=["v_proj"]),
        r"lora.alpha is 32.0; expected 8.0, lora.targets is .*'v_proj'.; expected .'v_proj',.$",
    ),
    Case(
        "train: rsLoRA",
        adapted(use_rslora=True),
        "lora.rank_stabilized is False; expected True$",
    ),
    Case(
        "evaluation: an adapter of more layers than it has",
        lambda folder: [*adapted(target_modules="all-linear")(folder), "--mode=eval"],
        '"base_model.*k_proj.lora_A.weight" is missing; key "target_modules" of adapter_config',
    ),
    Case(
        "an export of an adapter without one",
        tiny("checkpoint.export=adapter"),
        "checkpoint.export is 'adapter' and lora.rank is 0.*; expected auto, model or none",
    ),
    Case(
        "an export as it was once said",
        line("main DEFAULT --config.checkpoint.export=False"),
        "checkpoint.export is 'False'; expected one of auto, model, adapter, none",
    ),
    Case(
        "no export as it was once said",
        line("main DEFAULT --noconfig.checkpoint.export"),
        "checkpoint.export",
    ),
]

CONFIGS_AND_FLAGS = [
    Case("an unknown key", tiny("step=1"), "there is no key step; the nearest is steps"),
    Case("a wrong type", tiny("steps=many"), "key steps must be int, such as 40, and not 'many'"),
    Case(
        "half a step",
        line("main DEFAULT --config.steps=2.5"),
        "key steps must be int, such as 200, and not '2.5'",
    ),
    Case(
        "perhaps",
        line("main DEFAULT --config.eval.before=maybe"),
        "eval.before must be bool, such as True, and not",
    ),
    Case(
        "a text for a float",
        line("main DEFAULT --config.learner.clip_low=x"),
        "learner.clip_low must be float",
    ),
    Case(
        "a text in a tuple",
        line("main DEFAULT --config.engine.cache_buckets=(1,'a')"),
        r"must be tuple of int, such as \(1024, 4096\), and not",
    ),
    Case(
        "an index at nobody's",
        line("retriever build --corpus=c --out=~nobody-here/x"),
        "--out=~nobody-here/x: expected",
    ),
    Case(
        "a passage of all",
        line("retriever search --index=x --top_k=1000000000 who"),
        "flag --top_k is .*at most 10000",
    ),
    Case("no config", line("main"), "flag --config is missing"),
    Case(
        "no such config",
        line("main --config=configs/defalt.py"),
        "the nearest is configs/default.py",
    ),
    Case("a config that is a folder", line("main --config=/"), "there is no such file"),
    Case(
        "a wrong section",
        line("main DEFAULT --config.lerner.rows=1"),
        "no key lerner.rows; the nearest is learner.rows",
    ),
    Case(
        "a key without its section",
        line("main DEFAULT --config.learning_rate=1"),
        "nearest is learner.learning_rate",
    ),
    Case(
        "a wrong switch",
        line("main DEFAULT --noconfig.eval.befor"),
        "no key eval.befor; the nearest is eval.before",
    ),
    Case(
        "a section",
        line("main DEFAULT --config.learner=1"),
        "learner is a section; set one of its keys, such as",
    ),
    Case(
        "a key as a flag",
        line("main DEFAULT --steps=1"),
        "unknown flag --steps; the nearest is --config.steps",
    ),
    Case(
        "a wrong flag",
        line("main DEFAULT --workdri=x"),
        "unknown flag --workdri; the nearest is --workdir",
    ),
    Case(
        "a workdir in a bucket",
        line("main DEFAULT --workdir=gs://b/run"),
        "gs://b/run is a URL; expected a folder",
    ),
    Case(
        "a home of nobody",
        line("main DEFAULT --workdir=~nobody-here/x"),
        "--workdir=~nobody-here/x: expected a folder",
    ),
    Case("no value", line("main DEFAULT --config.steps"), "Missing value for flag --config.steps"),
    Case("a stray word", line("main DEFAULT stray"), "unexpected argument 'stray'"),
    Case(
        "a set without a name",
        line("main DEFAULT --config.data.eval_sets.=f"),
        "expected letters, digits, _ and -",
    ),
    Case(
        "a set with a dot",
        line("main DEFAULT --config.data.eval_sets.a.b=f"),
        "is 'a.b'; expected letters, digits",
    ),
    Case(
        "a set to be removed that is not there",
        tiny("data.eval_sets.three_hop="),
        "eval_sets.three_hop=: expected a file, or .* removed; it has one_hop, two_hop",
    ),
    Case(
        "a set without a file",
        line("main DEFAULT --config.data.eval_sets.nq"),
        "Missing value for flag",
    ),
    Case(
        "file: a wrong section",
        config_file("c.lerner.rows = 1"),
        "mine.py line 6: there is no key lerner.rows",
    ),
    Case(
        "file: a wrong key",
        config_file("c.learner.row = 1"),
        "mine.py line 6: there is no key learner.row; the nearest",
    ),
    Case(
        "file: an update",
        config_file("c.update({'lerner': {}})"),
        "mine.py line 6: there is no key lerner; the nearest",
    ),
    Case(
        "file: a text",
        config_file("c.steps = 'many'  # so"),
        "mine.py line 6: key steps must be int, such as 200, and not",
    ),
    Case("file: a section", config_file("c.learner = 3"), "mine.py line 6: learner is a section"),
    Case(
        "file: a truth",
        config_file("c.steps = True"),
        "mine.py: key steps must be int, such as 200, and not True",
    ),
    Case(
        "file: a tuple",
        config_file("c.engine.cache_buckets = ('a',)"),
        "engine.cache_buckets must be tuple of int",
    ),
    Case(
        "file: a new key",
        config_file("c.unlock(); c.step = 1"),
        "mine.py: there is no key step; the nearest is steps",
    ),
    Case(
        "file: a lost key", config_file("c.unlock(); del c.steps"), "mine.py: key steps is missing"
    ),
    Case("file: no such name", config_file("c.steps = unknown"), "mine.py line 6: NameError"),
    Case("file: a bracket", config_file("c.steps = ("), r"mine.py line 6: '\(' was never closed"),
    Case("file: a division", config_file("c.steps = 1 // 0"), "mine.py line 6: ZeroDivisionError"),
    Case(
        "file: an assertion",
        config_file("assert c.steps == 1, 'no'"),
        "mine.py line 6: AssertionError: no",
    ),
    Case(
        "file: a refusal",
        config_file("raise RuntimeError('no')"),
        "mine.py line 6: RuntimeError: no",
    ),
    Case("file: nothing", config_file("return None"), r"mine.py: get_config\(\) gives NoneType"),
    Case(
        "file: a set's name",
        config_file("c.unlock()", "c.data.eval_sets = {'a b': 'f'}"),
        "expected letters, digits",
    ),
    Case(
        "file: a set that is no path",
        config_file("c.unlock()", "c.data.eval_sets = {'a': 3}"),
        "eval_sets.a must be str",
    ),
    Case(
        "no temperature",
        tiny("sampling.temperature=nan"),
        "sampling.temperature is nan; expected a finite number",
    ),
    Case(
        "greedy training",
        tiny("sampling.temperature=0.0"),
        "temperature is 0.0; expected at least 0.01, up to 100",
    ),
    Case(
        "momentum of no sense",
        tiny("learner.adam_b1=1e30"),
        r"learner.adam_b1 is 1e\+30; expected less than 1",
    ),
    Case(
        "a crowd of judges",
        tiny("judge.concurrency=1000000000000"),
        "judge.concurrency is .*; expected at most 10000",
    ),
    Case(
        "a long verdict",
        tiny("judge.max_tokens=1000000000"),
        "judge.max_tokens is 1000000000; expected at most 16777216",
    ),
    Case(
        "a seed of 33 bits",
        tiny(f"seed={1 << 32}"),
        "seed is 4294967296; expected at most 4294967295",
    ),
    Case(
        "a seed of 64 bits",
        tiny(f"seed={1 << 63}"),
        "seed is 9223372036854775808; expected at most 4294967295",
    ),
    Case("a seed below 0", tiny("seed=-1"), "seed is -1; expected at least 0"),
    Case(
        "steps of 33 bits",
        tiny(f"steps={1 << 32}"),
        "steps is 4294967296; expected at most 2147483647",
    ),
    Case(
        "a bucket of nothing",
        tiny("engine.extend_buckets=(64,0)"),
        "engine.extend_buckets is 0; expected more than 0",
    ),
    Case(
        "rules of no question",
        tiny("rules.min_chars=2000"),
        "rules.min_chars is 2000; expected at most 1000, rules.max",
    ),
    Case(
        "more searches than turns",
        tiny("limits.turns=1"),
        "rules.min_searches is 1; expected at most 0, limits.turns",
    ),
    Case(
        "a wide bucket",
        tiny("engine.extend_buckets=(64,999)"),
        "has 999; expected at most engine.cache_tokens",
    ),
    Case(
        "a choice",
        tiny("game.batch_fill=full"),
        "game.batch_fill is 'full'; expected one of dummy, resample",
    ),
    Case(
        "plan: no slots",
        line("plan DEFAULT --config.engine.slots=0"),
        "engine.slots is 0; expected more than 0",
    ),
    Case(
        "plan: long episodes",
        line("plan DEFAULT --tokens=1000000000"),
        "flag --tokens is 1000000000; expected at most",
    ),
    Case(
        "plan: more than all",
        line("plan DEFAULT --tokens=9 --sampled=10"),
        "flag --sampled is 10; expected at most 9",
    ),
    Case(
        "generate: a home of nobody",
        ask(PROMPT, "--out=~nobody-here/x"),
        "--out=~nobody-here/x: expected a folder",
    ),
]

PASSAGES = "".join(
    f'{{"id": "p{i}", "contents": "Moon\\nthe moon and sea {i}"}}\n' for i in range(3)
)
ROWS = "indices.csc.index.npy"
SCORES = "data.csc.index.npy"


def built(folder: Path) -> Path:
    """An index of PASSAGES, in folder/index."""
    (folder / "corpus.jsonl").write_text(PASSAGES)
    build_index(folder / "corpus.jsonl", folder / "index", stemmer="", stopwords="", k1=1.5, b=0.75)
    return folder / "index"


def build(corpus: str | bytes = PASSAGES, *flags: str, name: str = "corpus.jsonl") -> Make:
    """retriever build of a corpus with this content."""

    def make(folder: Path) -> list[str]:
        built(folder)  # whatever a first build imports
        shutil.rmtree(folder / "index")
        (folder / name).write_bytes(corpus if isinstance(corpus, bytes) else corpus.encode())
        return ["retriever", "build", f"--corpus={name}", "--out=index", *flags]

    return make


def into(place: Callable[[Path], Any], *flags: str) -> Make:
    """retriever build where `place`, which gets a folder with an index, has put something in the
    way.
    """

    def make(folder: Path) -> list[str]:
        built(folder)
        place(folder)
        return ["retriever", "build", "--corpus=corpus.jsonl", "--out=index", *flags]

    return make


def search(damage: Callable[[Path], Any], *flags: str) -> Make:
    """retriever search in a damaged index."""

    def make(folder: Path) -> list[str]:
        damage(built(folder))
        return ["retriever", "search", "--index=index", *flags, "moon"]

    return make


def put(path: Path, content: str | bytes = "mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


def hostile(name: str, at: int, value: float) -> Make:
    """retriever search in an index that says itself that this number is right."""

    def damage(index: Path) -> None:
        array = np.load(index / name)
        array[at] = value
        np.save(index / name, array)
        meta = json.loads((index / "meta.json").read_text())
        (index / "meta.json").unlink()
        index_files.write_meta(index, meta)

    return search(damage)


def not_an_index(folder: Path) -> None:
    """A folder of the user's own that has a meta.json."""
    shutil.rmtree(folder / "index")
    put(folder / "index/meta.json", '{"format": 3, "name": "my project"}')
    put(folder / "index/code.py")


def folder_of_texts(command: str, content: bytes, *flags: str) -> Make:
    """retriever build of a folder with a text file, or answers from it."""

    def make(folder: Path) -> list[str]:
        put(folder / "docs/a.txt", content)
        if command == "answers":
            return ["answers", "--corpus=docs", "--out=out.jsonl", *flags]
        built(folder)  # whatever a first build imports
        shutil.rmtree(folder / "index")
        return ["retriever", "build", "--corpus=docs", "--out=index", *flags]

    return make


LEFT_ALONE = "index: expected no such folder, or an index that ssp_jax wrote and nothing else"
CORPORA_AND_INDEXES = [
    Case(
        "no corpus",
        build(PASSAGES, "--corpus=none.jsonl"),
        r"none\.jsonl: expected a readable corpus",
    ),
    Case(
        "a folder without texts as corpus",
        build(PASSAGES, "--corpus=."),
        r"\.: expected a folder with .txt or .md files, or a .jsonl file; found 1 .jsonl",
    ),
    Case(
        "a text file in another encoding",
        folder_of_texts("build", b"good\n\n\xe9t\xe9\n"),
        r"docs/a\.txt line 3: expected UTF-8 text \(invalid",
    ),
    Case(
        "a folder of texts without words",
        folder_of_texts("build", b"?\n!"),
        "docs: expected passages with words to index, found 1 passages and none",
    ),
    Case(
        "an empty corpus",
        build(""),
        "corpus.jsonl: expected passages with words to index, found 0 passages",
    ),
    Case(
        "no words",
        build('{"id": "p", "contents": "?\\n!"}\n'),
        "words to index, found 1 passages and none",
    ),
    Case("a broken line", build(PASSAGES + "{\n"), "corpus.jsonl line 4: expected a JSON object"),
    Case(
        "a passage with an id after one without",
        build('{"contents": "Moon\\nsea"}\n' + PASSAGES),
        'corpus.jsonl line 2: field "id" expected in all rows or in none; the first row has none',
    ),
    Case(
        "contents that are no text",
        build('{"id": "p", "contents": 3}\n'),
        'line 1: field "contents"',
    ),
    Case(
        "half a gzip file",
        build(gzip.compress(PASSAGES.encode())[:-9], name="c.jsonl.gz"),
        r"c\.jsonl\.gz.*gzip",
    ),
    Case("a k1 below 0", build(PASSAGES, "--k1=-1"), "k1 is -1.0.*expected a finite k1"),
    Case("a k1 without end", build(PASSAGES, "--k1=inf"), "k1 is inf"),
    Case("a b above 1", build(PASSAGES, "--b=1.5"), "b is 1.5.*between 0 and 1"),
    Case("a b of nan", build(PASSAGES, "--b=nan"), "b is nan"),
    Case(
        "a stemmer that is none",
        build(PASSAGES, "--stemmer=klingon"),
        "--stemmer.*klingon.*english",
    ),
    Case("stop words of another language", build(PASSAGES, "--stopwords=xx"), "--stopwords.*xx"),
    Case(
        "a user's folder at --out",
        into(lambda f: put(f / "here/a.py"), "--out=here"),
        "here: expected.*'a.py'",
    ),
    Case("a user's meta.json at --out", into(not_an_index), f"{LEFT_ALONE}; found 'code.py' in it"),
    Case(
        "a file in the index",
        into(lambda f: put(f / "index/notes.txt")),
        f"{LEFT_ALONE}; found 'notes.txt'",
    ),
    Case("a folder in the index", into(lambda f: put(f / "index/a/b")), f"{LEFT_ALONE}; found 'a'"),
    Case(
        "a user's X.old",
        into(lambda f: put(f / "index.old/a")),
        r"index\.old: expected no such file or folder",
    ),
    Case(
        "a user's X.building",
        into(lambda f: put(f / "index.building/a")),
        r"index\.building: expected no such",
    ),
    Case(
        "a link as X.old",
        into(lambda f: (f / "index.old").symlink_to(f / "index")),
        r"index\.old: expected no such",
    ),
    Case(
        "a file at --out",
        into(lambda f: put(f / "file"), "--out=file"),
        "file: expected no such folder",
    ),
    Case(
        "--out in a file",
        into(lambda f: put(f / "file"), "--out=file/index"),
        "where an index can be written",
    ),
    Case(
        "the root as --out",
        into(lambda f: None, "--out=/"),
        "expected a folder that can be replaced",
    ),
    Case("no index", search(shutil.rmtree), "index: expected a search index of format 3"),
    Case(
        "an index of another format",
        search(lambda i: put(i / "meta.json", '{"format": 2}')),
        "has format 2",
    ),
    Case(
        "a meta.json that is no JSON",
        search(lambda i: put(i / "meta.json", "{")),
        "meta.json is missing or not",
    ),
    Case(
        "a file is missing",
        search(lambda i: (i / ROWS).unlink()),
        f"{ROWS}: expected .* found no such file",
    ),
    Case(
        "a file is cut",
        search(lambda i: put(i / SCORES, b"")),
        f"{SCORES}: expected .* bytes, found 0 bytes",
    ),
    Case(
        "a flipped bit",
        search(lambda i: flip(i / SCORES, -1)),
        f"{SCORES}: expected the bytes that were written",
    ),
    Case(
        "a flipped bit in a passage",
        search(lambda i: flip(i / "passages.jsonl", 30)),
        "passages.jsonl line 1",
    ),
    Case("a row out of range", hostile(ROWS, 0, 10**6), f"{ROWS}.*rows below 3"),
    Case("a score of NaN", hostile(SCORES, 0, float("nan")), f"{SCORES}.*scores above 0"),
    Case(
        "an offset out of range",
        hostile("offsets.npy", 1, 10**9),
        "offsets.npy: expected 4 ascending numbers",
    ),
    Case(
        "no passages asked for",
        search(lambda i: None, "--top_k=0"),
        "flag --top_k is 0; expected more than 0",
    ),
    Case(
        "a run without its corpus",
        tiny("retriever.corpus=none.jsonl"),
        r"none\.jsonl: expected a readable corpus",
    ),
    Case(
        "a run at a user's folder",
        tiny(f"retriever.index={TINY}"),
        "tiny: expected no such folder, or an index",
    ),
]

TEXT = b"The Moon orbits the Earth. Neil Armstrong saw the Moon in 1969."
OUT = "--out=out.jsonl"
ANSWERS_OF_A_CORPUS = [
    Case("no corpus", line(f"answers {OUT}"), "required: --corpus"),
    Case("nowhere to write", line("answers --corpus=x"), "required: --out"),
    Case("a corpus that is not there", line(f"answers --corpus=x {OUT}"), "x: expected a readable"),
    Case("a device", line(f"answers --corpus=/dev/null {OUT}"), "/dev/null: .*it is read twice"),
    Case(
        "a broken text",
        folder_of_texts("answers", b"\xff"),
        r"docs/a\.txt line 1: expected UTF-8",
    ),
    Case(
        "nothing that is an answer",
        folder_of_texts("answers", b"so it is\n"),
        "docs: expected passages with titles, .* found 1 passages and none that can be an answer",
    ),
    Case(
        "evaluation questions that are none",
        folder_of_texts("answers", TEXT, "--eval=docs/a.txt"),
        r"docs/a\.txt line 1: expected a JSON object",
    ),
    Case(
        "answers as text",
        folder_of_texts("answers", TEXT, "--out=out.txt"),
        r"--out=out\.txt: expected a name that ends in \.jsonl",
    ),
    Case(
        "answers over the corpus",
        lambda folder: [corpus()(folder), line("answers --corpus=rows.jsonl --out=rows.jsonl")][1](
            folder
        ),
        "--out=rows.jsonl: expected another file than --corpus",
    ),
    Case(
        "answers in a folder that is not there",
        folder_of_texts("answers", TEXT, "--out=a/b/out.jsonl"),
        "a/b/out.jsonl: expected a file that can be written",
    ),
    Case(
        "no answers at all",
        folder_of_texts("answers", TEXT, "--limit=0"),
        "flag --limit is 0; expected more than 0",
    ),
    Case("a seed below 0", folder_of_texts("answers", TEXT, "--seed=-1"), "flag --seed is -1; ex"),
]

BERT = ROOT / "tests/goldens/bert"


def with_vectors(folder: Path, numbers: np.ndarray | None = None, **changes: Any) -> Path:
    """An index of PASSAGES with vectors of BERT, in folder/index. changes: of what they say."""
    index = built(folder)
    corpus = index_files.read_meta(index)["corpus"]["sha256"]
    about = replace(About.of(load_encoder(BERT, EncoderKeys()), corpus, 3, "bfloat16"), **changes)
    rows = np.ones((about.passages, about.width), np.float32) if numbers is None else numbers
    vectors.ensure(index, about, lambda first: iter([rows]), "writing")
    return index


def dense(
    damage: Callable[[Path], Any] = lambda index: None,
    *flags: str,
    numbers: np.ndarray | None = None,
    **changes: Any,
) -> Make:
    """retriever search by vectors, in a damaged index."""

    def make(folder: Path) -> list[str]:
        damage(with_vectors(folder, numbers, **changes))
        kind = ["--kind=dense", f"--encoder={BERT}"]
        return ["retriever", "search", *kind, "--index=index", *flags, "moon"]

    return make


def other_encoder(folder: Path) -> list[str]:
    command = dense()(folder)
    copy = Path(shutil.copytree(BERT, folder / "other"))
    edit_tensors(copy, **{"embeddings.LayerNorm.bias": np.zeros(32, np.float32)})
    return [*command, f"--encoder={copy}"]


def faiss(content: bytes) -> Make:
    """retriever import-faiss of a file with this content."""

    def make(folder: Path) -> list[str]:
        built(folder)
        (folder / "flat.index").write_bytes(content)
        flags = ["--file=flat.index", "--out=index", f"--encoder={BERT}"]
        return ["retriever", "import-faiss", *flags]

    return make


def flat(rows: int = 3, width: int = 32, kind: bytes = b"IxFI", numbers: float = 1.0) -> bytes:
    """As faiss writes an IndexFlatIP."""
    header = struct.pack("<4siqqq?iQ", kind, width, rows, 1 << 20, 1 << 20, True, 0, rows * width)
    return header + np.full((rows, width), numbers, np.float32).tobytes()


DENSE = [
    Case(
        "no encoder",
        into(lambda f: None, "--kind=dense"),
        "flag --encoder is missing; expected a Hugging Face folder with --kind=dense",
    ),
    Case(
        "an encoder of another architecture",
        into(lambda f: None, "--kind=dense", f"--encoder={TINY}/model"),
        'config.json: key "model_type" is \'qwen2\'; only encoders of "bert"',
    ),
    Case(
        "an encoder that is not there",
        into(lambda f: None, "--kind=dense", "--encoder=none"),
        "model folder none does not exist",
    ),
    Case("no corpus to build from", line("retriever build --out=x"), "flag --corpus is missing"),
    Case(
        "passages of other vectors rebuilt",
        lambda folder: [
            *("retriever", "build", "--corpus=corpus.jsonl"),
            f"--out={with_vectors(folder)}",
        ],
        f"{LEFT_ALONE}; found 'dense' in it",
    ),
    Case("no vectors", dense(lambda i: shutil.rmtree(i / "dense")), "index: has no vectors; build"),
    Case("vectors of another encoder", other_encoder, "dense was built by another encoder, .*bert"),
    Case(
        "vectors of another width",
        dense(width=31),
        "dense was built with width 31; expected 32, or delete that folder",
    ),
    Case(
        "vectors of another number",
        dense(passages=4),
        "dense has vectors of 4 passages of another corpus; expected those of the 3 beside",
    ),
    Case("vectors of another corpus", dense(corpus="x"), "passages of another corpus; expected"),
    Case(
        "vectors that are cut",
        dense(lambda i: put(i / "dense/vectors.bin", b"short")),
        "vectors.bin: expected 192 bytes, found 5",
    ),
    Case(
        "a flipped bit in a vector",
        dense(lambda i: flip(i / "dense/vectors.bin", 7)),
        "vectors.bin: expected the bytes that were written, from row 0 on",
    ),
    Case(
        "vectors that are NaN",
        dense(numbers=np.full((3, 32), np.nan, np.float32)),
        "vectors.bin: expected finite numbers, found NaN or infinity",
    ),
    Case(
        "vectors without a meta.json",
        dense(lambda i: (i / "dense/meta.json").unlink()),
        "of format 1; its meta.json is missing",
    ),
    Case("too many passages", dense(lambda i: None, "--top_k=51"), "--top_k is 51; expected at mo"),
    Case(
        "the beginning of vectors of another dtype",
        lambda folder: [
            *into(lambda f: (with_vectors(f) / "dense").rename(f / "index/dense.building"))(folder),
            *("--kind=dense", "--stemmer=", "--stopwords=", f"--encoder={BERT}", "--dtype=int8"),
        ],
        "dense.building was built with dtype 'bfloat16'; expected 'int8', or delete",
    ),
    Case("faiss: no file", faiss(b""), r"flat.index: is of type b''; expected faiss's IndexFlatIP"),
    Case("faiss: HNSW", faiss(flat(kind=b"IHNf")), "is of type IndexHNSWFlat; expected faiss's In"),
    Case("faiss: another width", faiss(flat(width=31)), "has the width 31; expected 32"),
    Case("faiss: another number", faiss(flat(rows=4)), "has the number of vectors 4; expected 3"),
    Case("faiss: cut", faiss(flat()[:-1]), "has the number of bytes 428; expected 429"),
    Case(
        "a run without an encoder", tiny("retriever.kind=dense"), "retriever.encoder is empty; ex"
    ),
    Case(
        "a run with a decoder as encoder",
        tiny("retriever.kind=hybrid", f"retriever.encoder={TINY}/model"),
        "\"model_type\" is 'qwen2'; only encoders of",
    ),
    Case(
        "a run with too many passages",
        tiny("retriever.kind=dense", f"retriever.encoder={BERT}", "retriever.top_k=51"),
        "retriever.top_k is 51; expected at most 50 with retriever.kind=dense",
    ),
    Case(
        "less than no GiB", tiny("retriever.device_gib=-2.0"), "device_gib is -2.0; expected at l"
    ),
    Case(
        "generate: no encoder",
        ask(PROMPT, "--kind=dense", "--index=x"),
        "flag --encoder is missing; expected a Hugging Face folder",
    ),
]

HALF = "half an emoji \ud83d"  # a lone surrogate
UTF8 = "expected lines of UTF-8 text, found"
DEEP = "[" * 100_000
ANSWERS_AND_QUESTIONS = [
    Case(
        "answers that are no JSON",
        data("data.answers", "{not json"),
        r"rows\.jsonl line 1: .*JSON object",
    ),
    Case(
        "questions in another form",
        data("data.eval_sets.one_hop", '{"q": 1}'),
        "line 1: .*golden_answers. expected",
    ),
    Case(
        "no file",
        line("audit --answers=missing.jsonl"),
        r"missing\.jsonl: expected a readable file",
    ),
    Case("a folder", line("audit --answers=."), "expected a readable file"),
    Case("nothing to audit", line("audit --eval=a.jsonl"), "--answers and --index are missing"),
    Case("an index alone", line("audit --index=x"), "flag --index needs --eval"),
    Case("a result of nothing", line("audit --answers=a.txt --out=x"), "flag --out needs --index"),
    Case(
        "dense without its encoder",
        line("audit --index=x --eval=a.jsonl --kind=dense"),
        "flag --encoder",
    ),
    Case(
        "a list of lines",
        audited("--answers", "[1]"),
        r"rows\.jsonl line 1: expected a JSON object, found",
    ),
    Case("a deep line", audited("--answers", DEEP), r"rows\.jsonl line 1: expected a JSON object"),
    Case("nothing", audited("--answers", "\n"), r"rows\.jsonl: expected at least one row"),
    Case("no gzip", audited("--answers", "{}", "rows.jsonl.gz"), "expected a whole gzip file"),
    Case(
        "a gzip by another name",
        audited("--answers", gzip.compress(b"Paris")),
        f"{UTF8} a gzip file, whose name must",
    ),
    Case("parquet by another name", audited("--eval", b"PAR1\x15\x04"), f"{UTF8} a parquet file"),
    Case(
        "no parquet",
        audited("--eval", "{}", "rows.parquet"),
        r"rows\.parquet after row 0: expected a whole parquet",
    ),
    Case(
        "UTF-16",
        audited("--answers", "Paris\n".encode("utf-16"), "a.txt"),
        rf"a\.txt: {UTF8} UTF-16",
    ),
    Case(
        "UTF-16 unmarked",
        audited("--answers", "Paris\n".encode("utf-16-le"), "a.txt"),
        r"a\.txt line 1: .*NUL bytes",
    ),
    Case(
        "UTF-16 of JSON",
        audited("--answers", '{"a": 1}\n'.encode("utf-16-le")),
        r"rows\.jsonl line 1: .*NUL bytes",
    ),
    Case(
        "Latin-1",
        audited("--answers", b"Paris\nR\xf6m\n", "a.txt"),
        r"a\.txt line 2: .*valid Unicode text",
    ),
    Case(
        "Latin-1 of JSON",
        audited("--answers", b'{"ground_truth": "\xe9"}'),
        r"rows\.jsonl line 1: .*utf-8",
    ),
    Case(
        "a list in a line",
        audited("--answers", "['Paris', 'P.']\n", "a.txt"),
        r"a\.txt line 1: .*one text, found a list",
    ),
    Case(
        "no answer",
        answers(ground_truth=...),
        'line 2: field "ground_truth" expected non-empty text, found nothing',
    ),
    Case(
        "a blank answer",
        answers(ground_truth=" "),
        'line 2: field "ground_truth" expected non-empty text',
    ),
    Case(
        "an unseen answer",
        answers(ground_truth="\u200b"),
        'line 2: field "ground_truth" expected non-empty text',
    ),
    Case(
        "several answers",
        answers(ground_truth=["Paris"]),
        'line 2: field "ground_truth" expected non-empty text',
    ),
    Case(
        "several in a text",
        answers(ground_truth='["Paris"]'),
        'line 2: field "ground_truth" expected one text, found',
    ),
    Case(
        "half an answer",
        answers(ground_truth=HALF),
        'line 2: field "ground_truth" expected valid Unicode text',
    ),
    Case(
        "half an example",
        answers(sys_question_example=HALF),
        'line 2: field "sys_question_example" expected valid',
    ),
    Case(
        "examples of numbers",
        answers(sys_question_example=3),
        'line 2: field "sys_question_example" expected text',
    ),
    Case(
        "no searches",
        answers(search_turns=...),
        'line 2: field "search_turns" expected a whole number from 1 to 1000',
    ),
    Case(
        "zero searches",
        answers(search_turns=0),
        'line 2: field "search_turns" expected a whole number from 1 to 1000',
    ),
    Case(
        "true searches",
        answers(search_turns=True),
        'line 2: field "search_turns" expected a whole number',
    ),
    Case(
        "spelt searches",
        answers(search_turns="2"),
        'line 2: field "search_turns" expected a whole number',
    ),
    Case(
        "endless searches",
        answers(search_turns=10**30),
        'line 2: field "search_turns" expected a whole number',
    ),
    Case(
        "one alias",
        answers(aliases="City of Light"),
        'line 2: field "aliases" expected a list of texts, found .City of Light',
    ),
    Case(
        "an empty alias",
        questions(aliases=["Lutetia", ""]),
        'line 2: field "aliases" expected non-empty text',
    ),
    Case(
        "no question",
        questions(question=...),
        'line 2: field "question" expected non-empty text, found nothing',
    ),
    Case(
        "half a question",
        questions(question=HALF),
        'line 2: field "question" expected valid Unicode text',
    ),
    Case(
        "no golds",
        questions(golden_answers=...),
        'line 2: field "golden_answers" expected text or a list of texts',
    ),
    Case(
        "an empty list", questions(golden_answers=[]), "expected text or a non-empty list of texts"
    ),
    Case(
        "an empty list in a text",
        questions(golden_answers="[]"),
        "expected text or a non-empty list of texts",
    ),
    Case(
        "an empty gold",
        questions(golden_answers=["x", ""]),
        'line 2: field "golden_answers" expected non-empty text',
    ),
    Case(
        "a number",
        questions(golden_answers=5),
        "expected text or a non-empty list of texts, found 5",
    ),
    Case(
        "numbers in a text", questions(golden_answers="[1, 2]"), "expected non-empty text, found 1"
    ),
    Case(
        "a cut list",
        questions(golden_answers='["Paris", "Ci'),
        "expected text or a list of texts, found what begins as",
    ),
    Case(
        "an object in a text",
        questions(golden_answers='{"target": ["x"]}'),
        "found an object that is written as text",
    ),
    Case(
        "a broken list of PopQA",
        questions(golden_answers=..., possible_answers='["a", b]'),
        '"possible_answers" expected',
    ),
    Case(
        "half a gold",
        questions(golden_answers=["x", HALF]),
        'line 2: field "golden_answers" expected valid Unicode',
    ),
    Case(
        "a gold with a NUL",
        questions(golden_answers="Pa\0ris"),
        "expected text without NUL characters",
    ),
    Case(
        "a source of numbers",
        questions(data_source=5),
        'line 2: field "data_source" expected text, found 5',
    ),
    Case(
        "half a source",
        questions(data_source=HALF),
        'line 2: field "data_source" expected valid Unicode text',
    ),
    Case(
        "veRL: no truth",
        truth(None),
        'line 2: field "reward_model.ground_truth" expected text or a non-empty list',
    ),
    Case(
        "veRL: no target",
        truth({"target": None}),
        '"reward_model.ground_truth.target" expected text or a non-empty',
    ),
    Case(
        "veRL: a text for a reward",
        verl(reward_model="x"),
        'field "reward_model" expected an object with a ground_truth',
    ),
    Case(
        "veRL: no turns", verl(prompt="Question: who?"), 'field "prompt" expected turns of a user'
    ),
    Case(
        "veRL: no mark", asked("Who?"), 'field "prompt" expected a last user turn with "Question: "'
    ),
    Case("veRL: no question", asked("Question: "), 'field "prompt" expected non-empty text'),
    Case(
        "veRL: a picture",
        asked([{"type": "image", "image": "x"}]),
        'field "prompt" expected a user turn of text',
    ),
    Case("veRL: texts", asked(["Question: who?"]), 'field "prompt" expected a user turn of text'),
    Case(
        "veRL: examples",
        asked("Question: a?\nAnswer: b\nQuestion: c?"),
        'one "Question: " in the last user turn',
    ),
    Case(
        "veRL: half a question",
        asked(f"Question: {HALF}"),
        'field "prompt" expected valid Unicode text',
    ),
    Case(
        "veRL: a list",
        verl(extra_info={"question": ["x"]}),
        'field "extra_info.question" expected non-empty text',
    ),
    Case(
        "a passage without id",
        corpus(id=...),
        'line 2: field "id" expected in all rows or in none; the first row has one',
    ),
    Case(
        "a passage with half an id",
        corpus(id=HALF),
        'line 2: field "id" expected valid Unicode text',
    ),
    Case(
        "a passage of nothing",
        corpus(contents=...),
        r'line 2: field "contents" expected non-empty text \(or in text',
    ),
    Case(
        "a passage of spaces",
        corpus(contents=" \n "),
        'line 2: field "contents" expected non-empty text',
    ),
    Case(
        "a passage of a title",
        corpus(contents=..., title="T"),
        'line 2: field "contents" expected non-empty text',
    ),
    Case(
        "a passage of numbers",
        corpus(contents=..., title="T", text=5),
        'line 2: field "text" expected text, found 5',
    ),
    Case(
        "a broken passage",
        corpus(contents=f"T\n{HALF}"),
        'line 2: field "contents" expected valid Unicode text',
    ),
]


def at(url: str, *overrides: str) -> Make:
    """A training run that searches at this address."""
    return tiny("retriever.kind=http", f"retriever.url={url}", "retriever.retries=0", *overrides)


def serving(
    reply: bytes, *, status: str = "200 OK", header: str = "", each_byte_s: float = 0.0
) -> Make:
    """A training run whose search server gives this reply to the one request that it gets, or byte
    by byte.
    """

    def serve(listener: socket.socket) -> None:
        # who asked has hung up
        with listener, listener.accept()[0] as connection, contextlib.suppress(OSError):
            asked = b""
            while not asked.endswith(b"}"):
                asked += connection.recv(1 << 16)
            connection.sendall(f"HTTP/1.1 {status}\r\n{header}\r\n".encode())
            for start in range(0, len(reply), 1 if each_byte_s else max(1, len(reply))):
                connection.sendall(reply[start : start + 1] if each_byte_s else reply)
                time.sleep(each_byte_s)

    def make(folder: Path) -> list[str]:
        listener = socket.create_server(("127.0.0.1", 0))
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        address = (
            f"http://me:hunter2@127.0.0.1:{listener.getsockname()[1]}/retrieve?api_key=hunter3"
        )
        return at(address, f"retriever.timeout_s={0.3 if each_byte_s else 20.0}")(folder)

    return make


def result(*items: Any) -> bytes:
    """For each of the queries that a run of tiny asks at its start."""
    return json.dumps({"result": [list(items)] * 63}).encode()


HTTP = (
    r"retriever\.url: http://\*\*\*@127\.0\.0\.1:\d+/retrieve\?api_key=\*\*\*: expected a search "
    "server"
)
GZIP = "Content-Encoding: gzip\r\n"
SERVERS_AND_JUDGES = [
    Case("no address", at(""), r"retriever\.url is empty; expected the address of a search server"),
    Case(
        "an address without scheme",
        at("127.0.0.1:80/x"),
        r"retriever\.url is '127.*expected http://HOST",
    ),
    Case(
        "another scheme",
        at("ftp://me:hunter2@host/x"),
        r"retriever\.url is 'ftp://\*\*\*@host/x'; expected http://",
    ),
    Case("no host", at("http:///x"), r"retriever\.url is 'http:///x'; expected"),
    Case(
        "a port that is none",
        at("http://host:80x/"),
        r"retriever\.url is 'http://host:80x/'; expected",
    ),
    Case(
        "a port too high",
        at("http://host:70000/"),
        r"retriever\.url is 'http://host:70000/'; expected",
    ),
    Case(
        "half an IPv6 address", at("http://[::1/"), r"retriever\.url is 'http://\[::1/'; expected"
    ),
    Case(
        "a space in the address",
        at("http://a host/x"),
        r"retriever\.url is 'http://a host/x'; expected",
    ),
    Case("nobody there", at("http://127.0.0.1:9/x"), "that answers, found .*refused"),
    Case(
        "a page that is not there",
        serving(b"no hunter2", status="404 Gone"),
        f"{HTTP} .*found 404: b'no \\*\\*\\*'",
    ),
    Case(
        "a redirection",
        serving(b"", status="307 x", header="Location: http://x/\r\n"),
        f"{HTTP} .*status 200, found 307",
    ),
    Case(
        "a busy server", serving(b"starting", status="503 Busy"), f"{HTTP} .*found 503: b'starting'"
    ),
    Case("a web page", serving(b"<html>"), f"{HTTP} that answers .*<html>"),
    Case("escape sequences", serving(b"\x1b]0;title\x07"), f"{HTTP} that answers .*x1b"),
    Case("deep JSON", serving(b"[" * 99_999), f"{HTTP} that answers"),
    Case("no result", serving(b'{"detail": "?"}'), f'{HTTP} that answers {{"result"'),
    Case(
        "too few results",
        serving(b'{"result": []}'),
        f"{HTTP} that gives a list for each of 63 queries",
    ),
    Case(
        "results that are no lists",
        serving(b'{"result": [1]}'),
        f"{HTTP} that gives a list for each",
    ),
    Case(
        "nothing found",
        serving(result()),
        f"{HTTP} that finds something for 64 queries, found no document",
    ),
    Case(
        "nothing but broken passages",
        serving(result(None, 3)),
        f"{HTTP} that gives documents, found",
    ),
    Case(
        "passages without words",
        serving(result({"id": "1", "contents": " "})),
        f"{HTTP} that finds .*, found no document but 63 unusable ones",
    ),
    Case(
        "byte after byte",
        serving(b"a" * 999, each_byte_s=0.05),
        f"{HTTP} that answers, found no whole reply in 0.3 s",
    ),
    Case(
        "a reply cut off",
        serving(b"{}", header="Content-Length: 9\r\n"),
        f"{HTTP} that answers, found IncompleteRead",
    ),
    Case("no HTTP", serving(b"", status="x"), f"{HTTP} that answers, found BadStatusLine"),
    Case(
        "an unknown encoding",
        serving(b"x", header="Content-Encoding: br\r\n"),
        f"{HTTP} .*content encoding 'br'",
    ),
    Case(
        "broken gzip", serving(b"x" * 20, header=GZIP), f"{HTTP} that answers, found .*header check"
    ),
    Case(
        "a bomb",
        serving(gzip.compress(bytes(1 << 27), 1), header=GZIP),
        f"{HTTP} .*more than 67,108,864 bytes",
    ),
]


def judged_at(url: str, *overrides: str) -> Make:
    """A training run whose judge is a server at this address."""
    asked = ("reward.metric=openai", "judge.model=a-judge", "judge.retries=0")
    return tiny(*asked, f"judge.url={url}", *overrides)


def judged(reply: bytes, *, status: str = "200 OK", header: str = "") -> Make:
    """A training run whose judge gives this reply to the question that it is asked at the start."""

    def serve(listener: socket.socket) -> None:
        with listener, contextlib.suppress(OSError):
            for _ in range(2):  # the second time with other arguments
                with listener.accept()[0] as connection:
                    asked = b""
                    while not asked.endswith(b"}"):
                        asked += connection.recv(1 << 16)
                    connection.sendall(
                        f"HTTP/1.1 {status}\r\nConnection: close\r\n{header}\r\n".encode() + reply
                    )

    def make(folder: Path) -> list[str]:
        listener = socket.create_server(("127.0.0.1", 0))
        listener.settimeout(5)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        return judged_at(
            f"http://me:hunter2@127.0.0.1:{listener.getsockname()[1]}/v1?api_key=hunter3"
        )(folder)

    return make


def chat(content: Any) -> bytes:
    return json.dumps(
        {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    ).encode()


def policy_judge(chat_template: str) -> Make:
    """A training run that the initial model judges, with this template; no other prompt has a
    system turn.
    """

    def make(folder: Path) -> list[str]:
        path = Path(shutil.copytree(TINY / "model", folder / "model"))
        edit_json("tokenizer_config.json", chat_template=chat_template)(path)
        return tiny("reward.metric=policy", f"model.path={path}")(folder)

    return make


NO_SYSTEM = (
    "{% for m in messages %}{{ m.content if m.role != 'system' else "
    "raise_exception('no system turn') }}{% endfor %}"
)
JUDGE = (
    r"judge\.url: http://\*\*\*@127\.0\.0\.1:\d+/v1\?api_key=\*\*\*: expected a server that "
    r"completes chats of judge\.model 'a-judge': "
)
NO_TEXT = f"{JUDGE}it answers with no text of a model: "
JUDGES = [
    Case("no address", judged_at(""), r"judge\.url is empty; expected an address such as http://"),
    Case(
        "no model",
        judged_at("http://h/v1", "judge.model="),
        r"judge\.model is empty; expected its name on",
    ),
    Case(
        "an address without scheme",
        judged_at("127.0.0.1:80/v1"),
        r"judge\.url is '127.*expected http://HOST",
    ),
    Case(
        "another scheme",
        judged_at("ftp://me:hunter2@h/x"),
        r"judge\.url is 'ftp://\*\*\*@h/x'; expected http://",
    ),
    Case("no host", judged_at("http:///v1"), r"judge\.url is 'http:///v1'; expected http://"),
    Case("nobody there", judged_at("http://127.0.0.1:9/v1"), r"judge\.url: .* attempts failed"),
    Case(
        "the judge of evaluations alone",
        tiny(
            "eval.judge=openai",
            "judge.model=m",
            "judge.url=http://127.0.0.1:9/v1",
            "judge.retries=0",
        ),
        r"judge\.url: http://127.0.0.1:9/v1: expected a server .* 'm': ",
    ),
    Case(
        "a page that is not there",
        judged(b"no hunter2", status="404 Gone"),
        f"{JUDGE}Error code: 404$",
    ),
    Case(
        "a key that is refused",
        judged(b'{"error": {"message": "not hunter3"}}', status="401 No"),
        rf"{JUDGE}Error code: 401 - not \*\*\*$",
    ),
    Case("a busy server", judged(b"{}", status="503 Busy"), f"{JUDGE}Error code: 503$"),
    Case(
        "arguments that no server takes",
        judged(b'{"error": {"message": "no such model"}}', status="400 Bad"),
        f"{JUDGE}Error code: 400 - no such model$",
    ),
    Case(
        "a redirection",
        judged(b"", status="307 x", header="Location: http://u:p@other/\r\n"),
        rf"{JUDGE}it redirects to http://\*\*\*@other/, which is not followed; expected the "
        "address itself$",
    ),
    Case("a web page", judged(b"<html>Welcome"), f"{NO_TEXT}<html>Welcome$"),
    Case("an empty answer", judged(b""), NO_TEXT),
    Case("no choice", judged(b'{"choices": []}'), NO_TEXT),
    Case("no content", judged(chat(None)), NO_TEXT),
    Case("content in parts", judged(chat([{"type": "text", "text": "Correct"}])), NO_TEXT),
    Case("deep JSON", judged(b"[" * 99_999), NO_TEXT),
    Case("escape sequences", judged(b"\x1b]0;title\x07"), NO_TEXT + r"\\x1b\]0;title\\x07$"),
    Case(
        "a compressed answer",
        judged(gzip.compress(chat("Correct")), header=GZIP),
        f"{JUDGE}it answers compressed",
    ),
    Case("an answer too long", judged(bytes(9 << 20)), f"{JUDGE}its answer is longer than 8 MiB$"),
    Case(
        "an answer cut off",
        judged(b"{}", header="Content-Length: 99\r\n"),
        f"{JUDGE}Connection error",
    ),
    Case("no HTTP", judged(b"", status="x"), f"{JUDGE}Connection error"),
    Case(
        "a policy judge without room",
        tiny("reward.metric=policy", "judge.max_tokens=448"),
        r"judge\.max_tokens is 448; expected less than engine\.cache_tokens",
    ),
    Case(
        "a template that refuses the judge's prompt",
        policy_judge(NO_SYSTEM),
        "chat template .*no system turn",
    ),
]


def report_of(name: str, text: str, *flags: str) -> Make:
    """The report of a run one of whose files holds this text."""

    def make(folder: Path) -> list[str]:
        (folder / "run").mkdir()
        run_folder(folder / "run")
        (folder / "run" / name).write_text(text)
        return ["report", "run", *flags]

    return make


def no_run(*flags: str) -> Make:
    return lambda folder: ["report", str(folder), *flags]


AS_WRITTEN = "expected it as a run writes it"
SET_OF_WORDS = '{"step": 1, "judge": "em", "sets": {"nq": {"right": "much"}}}'
REPORTS = [
    Case("no run", no_run(), "expected a run folder, found neither metrics.jsonl nor eval/step_"),
    Case(
        "no such folder",
        lambda folder: ["report", "none"],
        "none: expected a run folder, found none",
    ),
    Case(
        "a step without seconds",
        report_of("metrics.jsonl", '{"step": 1, "seconds": null}\n'),
        f"line 1: {AS_WRITTEN}",
    ),
    Case(
        "a row without step",
        report_of("metrics.jsonl", '{"seconds": 1}\n'),
        f"metrics.jsonl line 1: {AS_WRITTEN}",
    ),
    Case(
        "a step of words",
        report_of("metrics.jsonl", '{"step": "a"}\n'),
        f"metrics.jsonl line 1: {AS_WRITTEN}",
    ),
    Case(
        "a metric of words",
        report_of("metrics.jsonl", '{"step": 1, "seconds": 1, "reward/solver": "x"}\n'),
        f"metrics.jsonl line 1: {AS_WRITTEN}.*'x' is no number",
    ),
    Case(
        "a metric beyond all floats",
        report_of("metrics.jsonl", f'{{"step": 1, "seconds": 1{"0" * 400}}}\n'),
        f"metrics.jsonl line 1: {AS_WRITTEN}",
    ),
    Case(
        "metrics that are no JSON",
        report_of("metrics.jsonl", "no JSON\n\0\0\n"),
        f"metrics.jsonl line 1: {AS_WRITTEN}",
    ),
    Case(
        "an evaluation that is a list",
        report_of("eval/step_000001.json", "[]"),
        f"step_000001.json: {AS_WRITTEN}",
    ),
    Case(
        "an evaluation that is deep",
        report_of("eval/step_000001.json", "[" * 99_999),
        f"step_000001.json: {AS_WRITTEN}",
    ),
    Case(
        "no judge",
        report_of("eval/step_000001.json", '{"step": 1, "sets": {}}'),
        f"step_000001.json: {AS_WRITTEN}",
    ),
    Case(
        "scores of words",
        report_of("eval/step_000001.json", SET_OF_WORDS),
        f"step_000001.json: {AS_WRITTEN}",
    ),
    Case(
        "no step of an evaluation",
        report_of("eval/step_000001.json", '{"step": NaN, "judge": "em", "sets": {}}'),
        f"step_000001.json: {AS_WRITTEN}",
    ),
    Case("half a config", report_of("config.json", '{"reward'), f"config.json: {AS_WRITTEN}"),
    Case("a config that is a list", report_of("config.json", "[]"), f"config.json: {AS_WRITTEN}"),
    Case(
        "a config without metric",
        report_of("config.json", '{"reward.proposer": "azr"}'),
        f"config.json: {AS_WRITTEN}",
    ),
    Case(
        "a game without a question",
        report_of("episodes/step_000002.jsonl", '{"answer": "Paris"}\n'),
        f"step_000002.jsonl line 1: {AS_WRITTEN}",
    ),
    Case(
        "a dump of no step",
        report_of("episodes/step_x.jsonl", "{}\n"),
        f"step_x.jsonl: {AS_WRITTEN}",
    ),
    Case(
        "a page in no folder", report_of("config.json", "{}", "--out=none/a.html"), r"none/a\.html"
    ),
    Case("a page that is a folder", report_of("config.json", "{}", "--out=run"), "run: "),
    Case(
        "fewer games than none",
        report_of("config.json", "{}", "--games=-1"),
        "--games: expected 0 or more, got -1",
    ),
    Case("games of words", report_of("config.json", "{}", "--games=many"), "--games"),
]


def evaluation(*overrides: str, sets: str = "") -> Make:
    """--mode=eval with these overrides of the tiny config; sets: what stands in data.eval_sets of
    its file.
    """

    def make(folder: Path) -> list[str]:
        lines = [
            "from configs import tiny",
            "from ml_collections import ConfigDict",
            "def get_config():",
        ]
        lines += [
            "    c = tiny.get_config()",
            f"    c.data.eval_sets = ConfigDict({{{sets}}})",
            "    return c",
        ]
        (folder / "conf.py").write_text("\n".join(lines) + "\n")
        keys = [f"model.path={TINY}/model", f"retriever.corpus={TINY}/corpus.jsonl", *overrides]
        flags = [f"--config.{key}" for key in keys]
        return ["main", "--config=conf.py", f"--workdir={folder}/run", "--mode=eval", *flags]

    return make


EVALUATIONS = [
    Case(
        "no questions",
        evaluation(),
        r"data\.eval_sets is empty; expected --config\.data\.eval_sets\.NAME=FILE",
    ),
    Case(
        "a set with the average's name",
        evaluation(sets=f"'average': '{TINY}/qa/one_hop.jsonl'"),
        r"data\.eval_sets\.average: expected a name that no other row has",
    ),
    Case(
        "a judge that is none",
        evaluation("eval.judge=gpt", sets=f"'a': '{TINY}/qa/one_hop.jsonl'"),
        r"eval\.judge is 'gpt'; expected one of em, cover_em, policy, openai",
    ),
    Case(
        "a judge's server that is not there",
        evaluation(
            *(
                "eval.judge=openai",
                "judge.url=http://127.0.0.1:9/v1",
                "judge.model=m",
                "judge.retries=0",
            ),
            sets=f"'a': '{TINY}/qa/one_hop.jsonl'",
        ),
        r"judge\.url: http://127.0.0.1:9/v1: expected a server that completes chats",
    ),
]


# --- workdirs ---


def with_workdir(
    prepare: Callable[[Path, ConfigDict], Any], *overrides: str, more: tuple[str, ...] = ()
) -> Make:
    """A run of the tiny config with these overrides, in a workdir of the tiny config that has been
    prepared.
    """

    def make(folder: Path) -> list[str]:
        before = parse_command_line(tiny()(folder)[1:]).config
        (folder / "run").mkdir()
        prepare(folder / "run", before)
        return [*tiny(*overrides)(folder), *more]

    return make


def trained(run: Path, config: ConfigDict) -> None:
    """As a run leaves it before its first save, as far as this counts."""
    keep_config(str(run), config)
    (run / "metrics.jsonl").write_text('{"step": 0}\n')
    (run / "index").mkdir()
    (run / "index" / "meta.json").write_text('{"of": "the run before"}')


def with_config(content: bytes) -> Callable[[Path, ConfigDict], Any]:
    return lambda run, config: (run / "config.json").write_bytes(content)


def with_step(run: Path, config: ConfigDict) -> None:
    """One checkpoint, and nothing else."""
    files = stamps.of_weights(config.model.path)
    files |= stamps.of_files(config.model.path, config.data.answers)
    if config.model.adapter:
        files |= stamps.of_adapter(config.model.adapter)
    files |= stamps.of_index(config.retriever.corpus, config.retriever.index)
    if user_code.is_one(config.reward.metric):
        files |= stamps.of_code(config.reward.metric)
    game = {
        "memory": ReplayState().to_json(),
        "seconds": 1.0,
        "config": as_read(config),
        "stamps": files,
    }
    with Checkpoints(str(run), every=1, keep=1) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(3)}, game)


def damaged_step(damage: Callable[[Path], Any]) -> Callable[[Path, ConfigDict], Any]:
    def prepare(run: Path, config: ConfigDict) -> None:
        with_step(run, config)
        damage(run / "checkpoints/1/game/metadata")

    return prepare


def resumed(change: Callable[[Path], Any], *, index: bool = False, adapter: bool = False) -> Make:
    """A run that has a checkpoint, and whose files (model/, answers.jsonl, corpus.jsonl) then
    change in place.

    index: it searches a given index, without the corpus. adapter: it starts from adapter/.
    """

    def make(folder: Path) -> list[str]:
        shutil.copytree(TINY / "model", folder / "model")
        shutil.copy(TINY / "answers.jsonl", folder)
        lines = (TINY / "corpus.jsonl").read_text().splitlines(keepends=True)
        (folder / "corpus.jsonl").write_text("".join(lines[:20]))
        own = [f"model.path={folder}/model", f"data.answers={folder}/answers.jsonl"]
        own += ["retriever.corpus=", f"retriever.index={folder}/given"]
        own[2:] = own[2:] if index else [f"retriever.corpus={folder}/corpus.jsonl"]
        if index:
            retriever.main(["build", f"--corpus={folder}/corpus.jsonl", f"--out={folder}/given"])
        if adapter:
            own += of_adapter(write_adapter(folder / "adapter", TINY / "model", LORA))
        argv = tiny(*own)(folder)
        with_step(folder / "run", parse_command_line(argv[1:]).config)
        change(folder)
        return argv

    return make


def edit(name: str, old: str, new: str) -> Callable[[Path], Any]:
    """Other content of the same length, and the time of the old one: a date tells nothing."""

    def change(folder: Path) -> None:
        path = folder / name
        assert len(old) == len(new) and old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))

    return change


def build_again(folder: Path) -> None:
    edit("corpus.jsonl", "English", "Finnish")(folder)
    retriever.main(["build", f"--corpus={folder}/corpus.jsonl", f"--out={folder}/given"])


def locked(run: Path, config: ConfigDict) -> None:
    """Held by this process as another run would hold it, until the interpreter ends."""
    fcntl.flock(os.open(run, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def in_the_way(run: Path, config: ConfigDict) -> None:
    (run / "export").mkdir()
    (run / "export" / "notes.txt").write_text("mine")


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)


EVAL = ("--mode=eval",)
DEEP = b"[" * 100_000
WORKDIRS = [
    Case(
        "another group size",
        with_workdir(trained, "game.group_size=3"),
        r"game\.group_size was 5 and is 3; take",
    ),
    Case(
        "another beta, beside a rate that may change",
        with_workdir(trained, "learner.adam_b1=0.8", "learner.learning_rate=1e-5"),
        r"another config: learner\.adam_b1 was 0\.9 and is 0\.8; take",
    ),
    Case(
        "another k1, whose index stays",
        with_workdir(trained, "retriever.k1=0.9"),
        r"k1 was 1\.5 and is 0\.9",
    ),
    Case(
        "another seed",
        with_workdir(trained, "seed=1"),
        "holds a run of another config: seed was 0 and is 1",
    ),
    Case(
        "another answers file",
        with_workdir(trained, "data.answers=a.jsonl"),
        r"data\.answers was .*answers\.jsonl",
    ),
    Case(
        "eval, another style",
        with_workdir(trained, "prompt.style=search_r1", more=EVAL),
        'style was "brief" and is',
    ),
    Case(
        "eval, other limits",
        with_workdir(trained, "limits.searches=2", more=EVAL),
        "limits.searches was 4 and is 2",
    ),
    Case(
        "eval, another b",
        with_workdir(trained, "retriever.b=0.5", more=EVAL),
        r"retriever\.b was 0\.75 and is 0\.5",
    ),
    Case(
        "no config.json, a step of another",
        with_workdir(with_step, "seed=1"),
        "another config: seed was 0 and is 1",
    ),
    Case(
        "config.json cut",
        with_workdir(with_config(b'{"seed": 0, "st')),
        "config.json is not the config of a run: Unt",
    ),
    Case(
        "config.json empty",
        with_workdir(with_config(b"")),
        "config.json is not the config of a run: Expecting value",
    ),
    Case(
        "config.json of NULs",
        with_workdir(with_config(bytes(64))),
        "config.json is not the config of a run: Expect",
    ),
    Case(
        "config.json a list",
        with_workdir(with_config(b'[["seed", 0]]')),
        "config.json is not .*: it holds list",
    ),
    Case(
        "config.json a number",
        with_workdir(with_config(b"7")),
        "config.json is not the config of a run: it holds int",
    ),
    Case(
        "config.json no text",
        with_workdir(with_config(b"\xff\xfe{")),
        "config.json is not the .* can't decode",
    ),
    Case(
        "config.json nested",
        with_workdir(with_config(DEEP)),
        "config.json is not the config of a run: maximum rec",
    ),
    Case(
        "config.json a folder",
        with_workdir(lambda run, _: (run / "config.json").mkdir()),
        "cannot be used: .*Is a d",
    ),
    Case(
        "a file in the place of the workdir",
        lambda folder: [(folder / "run").write_text("mine"), tiny()(folder)][1],
        "workdir .*run cannot be used: .*File exists",
    ),
    Case(
        "a workdir in use",
        with_workdir(locked),
        "workdir .*run is in use by another run, which is still going on",
    ),
    Case(
        "a folder where the export goes",
        with_workdir(in_the_way),
        "run/export: expected no such folder, .* found 'notes.txt' in it; it is left alone",
    ),
    Case(
        "a step cut",
        with_workdir(damaged_step(lambda f: os.truncate(f, 99))),
        r"no checkpoint in .*run/checkpoints",
    ),
    Case(
        "a step gone",
        with_workdir(damaged_step(os.remove)),
        r"no checkpoint in .* can be read \(1: .*starts anew",
    ),
    Case(
        "other answers since",
        resumed(edit("answers.jsonl", "218", "219")),
        "answers.jsonl has changed since step 1 of",
    ),
    Case(
        "fewer answers since",
        resumed(lambda f: os.truncate(f / "answers.jsonl", 400)),
        "answers.jsonl",
    ),
    Case(
        "another corpus since",
        resumed(edit("corpus.jsonl", "English", "Finnish")),
        "corpus.jsonl has changed since",
    ),
    Case(
        "another index since",
        resumed(build_again, index=True),
        "given has changed since step 1 of .*run; expected it",
    ),
    Case(
        "other weights since",
        resumed(
            lambda f: edit_tensors(
                f / "model", **{"model.norm.weight": np.full(128, 1.5, np.float32)}
            )
        ),
        "model/model.safetensors has changed since step 1",
    ),
    Case(
        "a bit of the weights since",
        resumed(lambda f: flip_a_bit(f / "model" / "model.safetensors")),
        "model/model.safetensors has changed since step 1",
    ),
    Case(
        "another adapter since",
        resumed(lambda f: flip_a_bit(f / "adapter" / "adapter_model.safetensors"), adapter=True),
        "adapter/adapter_model.safetensors has changed since step 1",
    ),
    Case(
        "no adapter since",
        with_workdir(trained, "model.adapter=x", "lora.rank=4"),
        'lora.rank was 0 and is 4, model.adapter was "" and is "x"',
    ),
    Case(
        "another config of the model since",
        resumed(lambda f: edit_config(f / "model", x=1)),
        "model/config.json has",
    ),
    Case(
        "another tokenizer since",
        resumed(edit("model/tokenizer_config.json", ": 1024", ": 1025")),
        "model/tokenizer_config.json has changed since step 1",
    ),
    Case(
        "another end of text since",
        resumed(
            lambda f: (f / "model" / "generation_config.json").write_text('{"eos_token_id": 3}')
        ),
        "model/generation_config.json (is new|has changed) since step 1",
    ),
]

# Overrides of the tiny config, and what is said of them.
OVERRIDES = (
    ("learner.mini_batches=2", "no key .*; the nearest is learner.solver_mini_batches"),
    ("learner.solver_mini_batches=0", "learner.solver_mini_batches is 0; expected more than 0"),
    ("learner.proposer_mini_batches=0", "learner.proposer_mini_batches is 0; expected more than 0"),
    ("learner.clip_dual=0.5", "learner.clip_dual is 0.5; expected 0, or more than 1"),
    ("learner.clip_dual=1.0", "learner.clip_dual is 1.0; expected 0, or more than 1"),
    ("learner.kl_bound=-1.0", "learner.kl_bound is -1.0; expected at least 0"),
    ("learner.kl_bound=nan", "learner.kl_bound is nan; expected a finite number"),
    ("learner.kl_coef=-0.1", "learner.kl_coef is -0.1; expected at least 0"),
    ("limits.verify_response_tokens=0", "limits.verify_response_tokens is 0; expected more than 0"),
    ("game.noise_documents=-1", "game.noise_documents is -1; expected at least 0"),
    ("game.answers_per_step=0", "game.answers_per_step is 0; expected more than 0"),
    ("game.answers_per_step=500000", "game.answers_per_step is .* makes .* attempts a step; exp"),
    ("game.group_size=513", "game.group_size is 513; expected at most 512"),
    ("learner.row_tokens=256", "learner.row_tokens is 256; expected at least 384, for limits"),
    ("engine.cache_tokens=383", "engine.cache_tokens is 383; expected at least 440, for limits"),
    ("limits.verify_prompt_tokens=409", "engine.cache_tokens is 448; expected at least 449, for"),
    (
        "limits.response_tokens=4000",
        "learner.row_tokens is 384; expected at least 4064, for limits",
    ),
    (
        "learner.logprob_chunk=100",
        "learner.row_tokens is 384; expected a multiple of .*_chunk = 100",
    ),
    ("learner.rows=3 mesh.data=2", "learner.rows is 3; expected a multiple of .* = 2"),
    ("engine.slots=7 mesh.data=2", "engine.slots is 7; expected a multiple of .* = 2"),
    ("mesh.tensor=8", "mesh.tensor is 8; expected a divisor of 2 key/value heads"),
    ("engine.extend_buckets=()", "engine.extend_buckets is empty; expected at least one length"),
    ("limits.observation_tokens=1", "limits.observation_tokens is 1; expected more than"),
    (
        "checkpoint.keep_best=nq eval.every=1",
        "checkpoint.keep_best is 'nq'; expected one of average, one_hop, two_hop",
    ),
    (
        "checkpoint.keep_best=one_hop",
        "keep_best is 'one_hop'; expected .* eval.every that is not 0",
    ),
    ("rules.min_searches=5", "rules.min_searches is 5; expected at most 4"),
)
GAME_AND_UPDATE = [
    *(Case(overrides, tiny(*overrides.split()), says) for overrides, says in OVERRIDES),
    *(
        Case(f"{key}=other", tiny(f"{key}=other"), f"{key} is 'other'; expected one of .")
        for key in CHOICES
    ),
]

PROCESSES = [
    *(
        Case(
            f"only {words}",
            line(f"main DEFAULT {words}"),
            "expected --coordinator=HOST:PORT, --processes=N and --proc",
        )
        for words in (
            "--processes=2",
            "--process=0",
            "--coordinator=a:1",
            "--processes=2 --process=0",
        )
    ),
    *(
        Case(
            name,
            line(f"main DEFAULT {words}"),
            f"{words}: expected HOST:PORT of process 0, and for each process its",
        )
        for name, words in (
            ("a number beyond the last", "--coordinator=a:1 --processes=2 --process=2"),
            ("an address without a port", "--coordinator=a --processes=2 --process=0"),
            ("a port that is a name", "--coordinator=a:http --processes=2 --process=0"),
        )
    ),
    Case(
        "no processes at all",
        line("main DEFAULT --processes=0"),
        "flag --processes is 0; expected at least 1",
    ),
    Case(
        "a process before the first",
        line("main DEFAULT --process=-1"),
        "flag --process is -1; expected at least 0",
    ),
    Case("processes in words", line("main DEFAULT --processes=two"), "processes.*two"),
    Case(
        "more devices than there are",
        tiny("mesh.data=16"),
        r"mesh asks for \[16, 1, 1\] but there are 8",
    ),
    Case(
        "devices that do not divide",
        tiny("mesh.data=3", "mesh.fsdp=-1"),
        "mesh asks for .* but there are 8 devices",
    ),
    Case(
        "two axes for what is left",
        tiny("mesh.data=-1", "mesh.fsdp=-1"),
        "mesh has sizes .*; expected .* one -1",
    ),
    Case(
        "evaluation: more devices",
        tiny_eval("mesh.fsdp=9"),
        "mesh asks for .* but there are 8 devices",
    ),
]


def forked(origin: str, *overrides: str, own: bool = False, more: tuple[str, ...] = ()) -> Make:
    """A run of the tiny config from other/, which has a checkpoint of step 1.

    own: its workdir has one of its own.
    """

    def make(folder: Path) -> list[str]:
        config = parse_command_line(tiny()(folder)[1:]).config
        for name in ("other", "run") if own else ("other",):
            (folder / name).mkdir()
            with_step(folder / name, config)
        return [*tiny(*overrides)(folder), f"--from={origin}", *more]

    return make


FORKS = [
    Case("from nowhere", forked("none"), "--from=none: expected a run with a checkpoint, found"),
    Case("from no such step", forked("other@7"), "--from=other@7: there is no such .*; it has 1"),
    Case(
        "an evaluation", forked("other", more=EVAL), "--from=other starts a run; expected no --mo"
    ),
    Case("with an adapter", forked("other@1", "lora.rank=4"), r"lora\.rank was 0 and is 4; expect"),
    Case(
        "with other moments",
        forked("other", "learner.momentum_dtype=bfloat16"),
        r'momentum_dtype was "float32" and is "bfloat16"; expected it as it was',
    ),
    Case(
        "into another run",
        forked("other", own=True),
        "--from=other: workdir .*run holds a run that started by itself; take another --workdir",
    ),
    Case(
        "of a mistyped flag", line("main DEFAULT --form=a"), "unknown flag --form; the nearest is"
    ),
]


def own_code(override: str, content: str = "", later: str = "") -> Make:
    """A run of the tiny config with this own.py; later: what it holds after a first step."""

    def make(folder: Path) -> list[str]:
        (folder / "own.py").write_text(content)
        argv = tiny(override.replace("own.py", f"{folder}/own.py"))(folder)
        if later:
            config = parse_command_line(argv[1:]).config
            (folder / "run").mkdir()
            with_step(folder / "run", config)
            (folder / "own.py").write_text(later)
        return argv

    return make


RIGHT = "def f(question, answers, answer):\n    return True\n"
OWN_CODE = [
    Case("no such file", tiny("reward.metric=none.py:f"), "none.py: expected a readable file of P"),
    Case("no such name", own_code("reward.metric=own.py:f"), "own.py:f: expected a function .* f"),
    Case(
        "a metric of one argument",
        own_code("reward.metric=own.py:f", "def f(answer):\n    return True\n"),
        "reward.metric: .*own.py:f expected three parameters: question, answers, answer",
    ),
    Case(
        "a judge of evaluations that is none",
        own_code("eval.judge=own.py:f", "def f(q, a, x):\n    return 1\n"),
        "eval.judge: .*own.py:f gives 1 for the answer",
    ),
    Case(
        "a search without a method",
        own_code("retriever.kind=own.py:F", "def F(corpus, index):\n    return 1\n"),
        r"retriever.kind: .* expected a method search\(queries, top_k\)",
    ),
    Case(
        "a metric that has changed",
        own_code("reward.metric=own.py:f", RIGHT, later=RIGHT + "\n"),
        "own.py has changed since step 1 of .*run; expected it as it was, or another --workdir",
    ),
]


def exported(
    *flags: str,
    prepare: Callable[[Path, ConfigDict], Any] = with_step,
    change: Callable[[Path], Any] = lambda folder: None,
) -> Make:
    """export of a run of the tiny config, whose files (model/) may change afterwards."""

    def make(folder: Path) -> list[str]:
        shutil.copytree(TINY / "model", folder / "model")
        argv = tiny(f"model.path={folder}/model")(folder)
        config = parse_command_line(argv[1:]).config
        (folder / "run").mkdir()
        prepare(folder / "run", config)
        change(folder)
        return ["export", "run", *flags]

    return make


EXPORTS = [
    Case("no run", line("export none"), "none: expected a run folder, found no config.json in it"),
    Case("no workdir", line("export"), "arguments are required: WORKDIR"),
    Case("no such step", exported("--step=7"), "--step=7: there is no such checkpoint .* has 1"),
    Case(
        "a step before the first", exported("--step=-1"), "flag --step is -1; expected at least 0"
    ),
    Case("a step and the best", exported("--step=1", "--best"), "--step and --best name two"),
    Case("no evaluated step", exported("--best"), "--best: no checkpoint in run was evaluated"),
    Case("no step at all", exported(prepare=trained), "run with a checkpoint, found none"),
    Case("no adapter", exported("--kind=adapter"), "--kind=adapter: the run in run has no adapter"),
    Case("another kind", exported("--kind=gguf"), "--kind: invalid choice: 'gguf'"),
    Case(
        "a key of another version", exported(prepare=with_config(b'{"seeds": 1}')), "no key seeds"
    ),
    Case("a value of none", exported(prepare=with_config(b'{"seed": "a"}')), "seed must be int"),
    Case(
        "a damaged step",
        exported(prepare=damaged_step(lambda file: file.write_bytes(b"{}"))),
        "run.* can be read|checkpoint 1 in run is damaged",
    ),
    Case(
        "another base",
        exported(change=lambda folder: flip_a_bit(folder / "model/model.safetensors")),
        "model/model.safetensors has changed since step 1 of run",
    ),
    Case(
        "a folder of somebody else",
        exported("--out=notes", change=lambda f: [(f / "notes").mkdir(), (f / "notes/a").touch()]),
        "notes: expected no such folder, or a model folder that ssp_jax wrote",
    ),
    Case("no repository", exported("--push=mine"), "--push=mine: expected USER/NAME"),
]

SECTIONS = {
    "model folder": MODEL_FOLDERS,
    "tokenizer": TOKENIZERS,
    "adapter": ADAPTERS,
    "config": CONFIGS_AND_FLAGS,
    "game": GAME_AND_UPDATE,
    "generate": GENERATE,
    "index": CORPORA_AND_INDEXES,
    "answers": ANSWERS_OF_A_CORPUS,
    "dense": DENSE,
    "data": ANSWERS_AND_QUESTIONS,
    "server": SERVERS_AND_JUDGES,
    "judge": JUDGES,
    "report": REPORTS,
    "export": EXPORTS,
    "fork": FORKS,
    "own code": OWN_CODE,
    "evaluation": EVALUATIONS,
    "workdir": WORKDIRS,
    "processes": PROCESSES,
}
CASES = [
    pytest.param(case, id=f"{section}: {case.name}")
    for section, cases in SECTIONS.items()
    for case in cases
]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def empty_folders(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_dir() and not any(path.iterdir())}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *arguments = case.make(tmp_path)
    before = contents(tmp_path)
    empty_before = empty_folders(tmp_path)
    compiles = CompileCounter()
    code = COMMANDS[command](arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    *progress, sentence = said.splitlines()  # what was being done, and why it ended
    assert sentence.startswith("ssp_jax: ") and re.search(case.says, sentence), said
    assert not [line for line in progress if re.search("ssp_jax: |Traceback", line)], said
    after = contents(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert empty_folders(tmp_path) <= empty_before  # a mistyped path makes no folder
    assert compiles.count == 0
