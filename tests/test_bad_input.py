"""The catalogue of refused input: for each command, everything that it refuses and the sentence that it says.

A case makes its files in an empty folder, which is the current one, and gives a command line. It must end with exit
code 2 and one sentence on stderr, compile nothing, and leave every file that was there as it was.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from model_folders import edit_config, edit_tensors

from ssp_jax import audit, generate, main, plan, report, retriever
from ssp_jax.metrics import CompileCounter

Make = Callable[[Path], list[str]]  # an empty folder -> a command line; its first word is a key of COMMANDS
COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "main": lambda argv: main.main(["main", *argv]),
    "generate": lambda argv: generate.main(["generate", *argv]),
    "plan": lambda argv: plan.main(["plan", *argv]),
    "retriever": retriever.main,
    "report": report.main,
    "audit": audit.main,
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


PROMPT = '{"prompt": "The capital of France is"}'
CHAT = '{"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]}'
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


MODEL_FOLDERS = [
    Case("a config.json that is no object", model(lambda f: (f / "config.json").write_text("[]")), "config.json"),
    Case("a model type that is not ours", model(lambda f: edit_config(f, model_type="gpt2")), "config.json.*gpt2"),
    Case("a tensor is missing", model(lambda f: edit_tensors(f, **{"model.norm.weight": None})), "model.norm.weight"),
]

TOKENIZER_CONFIG, TOKENIZER_JSON = "tokenizer_config.json", "tokenizer.json"
BOMB = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
NO_SYSTEM = "{% for m in messages if m['role'] != 'system' %}{{ m['content'] }}{% endfor %}"
TOKENIZERS = [
    *(
        Case(f"{file} is missing", ask(PROMPT, damage=remove(file)), f"model/{file} does not exist; expected a")
        for file in (TOKENIZER_CONFIG, TOKENIZER_JSON)
    ),
    *(
        Case(f"{file} is {what}", ask(PROMPT, damage=write(file, content)), rf"{file}.*{says}")
        for file in (TOKENIZER_CONFIG, TOKENIZER_JSON, "special_tokens_map.json", "added_tokens.json")
        for what, content, says in (
            ("no JSON", "{", "not valid JSON"),
            ("no object", "[]", "JSON object"),
            ("nested deep", '{"a": ' + nested(100_000) + "}", "nested too deeply"),
            ("no text", b"\xff\xfe", "not valid JSON"),
        )
    ),
    *(
        Case(f"{key} {value!r}", ask(PROMPT, damage=edit_json(file, **{key: value})), f'{file}: key "{key}".*{says}')
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
            *(("config.json", "eos_token_id", value, "ids from 0 to 2047") for value in (-1, 1.5, 2048, "2", [2, -1])),
            ("generation_config.json", "eos_token_id", [True], "ids from 0 to 2047, found True"),
        )
    ),
    Case("an added token without an id", ask(PROMPT, damage=edit_json("added_tokens.json", a="b")), 'token "a"'),
    Case("a version to come", ask(PROMPT, damage=edit_json(TOKENIZER_JSON, version="9")), "tokenizer.json .*version"),
    *(
        Case(f"tokenizer.json {key} {value!r}", ask(PROMPT, damage=edit_json(TOKENIZER_JSON, **{key: value})), says)
        for key, value, says in (
            ("model", {"type": "Unheard"}, f"{TOKENIZER_JSON} cannot be read"),
            ("model", 5, f"{TOKENIZER_JSON} cannot be read"),
            ("added_tokens", 5, f"{TOKENIZER_JSON} cannot be read"),
            ("added_tokens", ["a"], f"{TOKENIZER_JSON} cannot be read"),
            ("normalizer", {"type": "Unheard"}, f"{TOKENIZER_JSON} cannot be read"),
            ("decoder", {"type": "Unheard"}, f"{TOKENIZER_JSON} cannot be read"),
            ("added_tokens", [token("<a>", 2048)], 'token "<a>" has id 2048; the model has 2048 rows'),
        )
    ),
    Case(
        "an eos token that is nowhere",
        ask(PROMPT, damage=edit_json(TOKENIZER_CONFIG, eos_token="<stop>")),
        f'{TOKENIZER_JSON} lacks the token "<stop>"',
    ),
    Case("a template in no text", ask(CHAT, damage=write("chat_template.jinja", b"\xff")), "chat_template.jinja"),
    Case("templates without a default", template([{"name": "rag", "template": "a"}]), "named 'rag', and none"),
    Case("no template", template(None), "has no chat template"),
    Case("a template that is no template", template("{% for %}"), "chat template of .*refuses"),
    Case("a template that divides by zero", template("{{ 1 / 0 }}"), "chat template of .*ZeroDivisionError"),
    Case("a template that imports", template("{% import 'os' as os %}"), "chat template of .*cannot be read"),
    Case("a template that recurses", template("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"), "RecursionError"),
    Case("a template that does not end", template(BOMB), "takes more than 3 s or 4 GiB"),
    Case("a template that fills memory", template("{{ 'a' * 10 ** 11 }}"), "takes more than 3 s or 4 GiB"),
    Case("a template that refuses roles", template("{{ raise_exception('no system') }}"), "messages: no system"),
    Case("a template of one text", template("Hello."), r"drops message 1 of 2 \(system: 'Be brief.'\)"),
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
            ('{"messages": [{"role": "user", "content": "\\ud83d"}]}', (), "messages.content.*valid Unicode"),
            ("[1]", (), "in.jsonl line 1: expected a JSON object"),
            ("", (), "expected at least one line"),
            (PROMPT, ("--out=nowhere/out.jsonl",), "--out=nowhere/out.jsonl: expected a file that can be written"),
            (PROMPT, ("--out=.",), "--out=.: expected a file that can be written"),
            (PROMPT, ("--prompts=nowhere.jsonl",), "nowhere.jsonl: expected a readable file"),
            (PROMPT, ("--index=nowhere",), "--index=nowhere: expected the folder"),
            (PROMPT, ("--max_tokens=0",), "flag --max_tokens is 0; expected more than 0, up to 16777216"),
            (PROMPT, ("--max_tokens=1000000000",), "flag --max_tokens is 1000000000; expected at most"),
            (PROMPT, ("--max_tokens=many",), "max_tokens"),
            (PROMPT, ("--temperature=-1",), "flag --temperature is -1.0; expected 0, or at least 0.01"),
            (PROMPT, ("--temperature=nan",), "flag --temperature is nan; expected a finite number"),
            (PROMPT, ("--temperature=inf",), "flag --temperature is inf; expected a finite number"),
            (PROMPT, ("--temperature=1e-30",), "flag --temperature is 1e-30; expected 0, or at least 0.01"),
            (PROMPT, ("--seed=-1",), "flag --seed is -1; expected at least 0"),
            (PROMPT, ("--seed=4294967296",), "flag --seed is 4294967296; expected at most 4294967295"),
            (PROMPT, ("--top_k=0",), "flag --top_k is 0; expected more than 0"),
            (PROMPT, ("--top_k=1000000000",), "flag --top_k is 1000000000; expected at most"),
            (PROMPT, ("--max_searches=0",), "flag --max_searches is 0; expected more than 0"),
            (PROMPT, ("--dtype=int8",), "float32"),
            (PROMPT, ("--style=mine",), "search_r1"),
            (PROMPT, ("--template=mine",), "raw_chatml"),
            (PROMPT, ("--max_token=3",), "max_token"),
            (PROMPT, ("stray",), "unexpected argument 'stray'"),
            (PROMPT, ("--model=nowhere",), "nowhere"),
            (PROMPT, ("--model=",), "flag --model is missing"),
            (PROMPT, ("--prompts=",), "--out needs --prompts"),
        )
    ),
    Case(
        "a prompt of 600,000 characters",
        ask(PROMPT + '\n{"prompt": "' + "The capital. " * 50_000 + '"}'),
        r"in.jsonl line 2: the prompt has \d{3},\d{3} tokens; expected fewer than the 1,024 of the model's context",
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

CONFIGS_AND_FLAGS = [
    Case("an unknown key", tiny("step=1"), "there is no key step; the nearest is steps"),
    Case("a wrong type", tiny("steps=many"), "key steps must be int"),
]

CORPORA_AND_INDEXES: list[Case] = []

ANSWERS_AND_QUESTIONS = [
    Case("answers that are no JSON", data("data.answers", "{not json"), r"rows\.jsonl line 1: .*JSON object"),
]

SERVERS_AND_JUDGES: list[Case] = []

WORKDIRS: list[Case] = []

SECTIONS = {
    "model folder": MODEL_FOLDERS,
    "tokenizer": TOKENIZERS,
    "config": CONFIGS_AND_FLAGS,
    "generate": GENERATE,
    "index": CORPORA_AND_INDEXES,
    "data": ANSWERS_AND_QUESTIONS,
    "server": SERVERS_AND_JUDGES,
    "workdir": WORKDIRS,
}
CASES = [pytest.param(case, id=f"{section}: {case.name}") for section, cases in SECTIONS.items() for case in cases]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    command, *arguments = case.make(tmp_path)
    before = contents(tmp_path)
    compiles = CompileCounter()
    code = COMMANDS[command](arguments)
    said = capsys.readouterr().err
    assert code == 2, said
    *progress, sentence = said.splitlines()  # what was being done, and why it ended
    assert sentence.startswith("ssp_jax: ") and re.search(case.says, sentence), said
    assert not [line for line in progress if re.search("ssp_jax: |Traceback", line)], said
    after = contents(tmp_path)
    assert {path: after.get(path) for path in before} == before
    assert compiles.count == 0
