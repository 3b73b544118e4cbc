"""benchmarks/parity.py says equal only where all token ids are."""

import json
from pathlib import Path

import pytest

from benchmarks import parity
from ssp_jax.game.roles import ASSISTANT
from ssp_jax.generate import ask

pytestmark = pytest.mark.ci
MODEL = Path("assets/tiny/model")


@pytest.fixture(scope="module")
def rows():
    """What a golden would hold, had torch made it."""
    m = ask.load_model(MODEL, "float32")
    asked = parity.prompt_tokens(m.tokenizer)
    made = ask.play(m, ask.make_context(m.tokenizer, parity.NEW_TOKENS), ASSISTANT, asked)
    return [
        {"prompt_ids": p, "token_ids": e.tokens[len(p) :], "gaps": [0.5] * e.num_sampled}
        for p, e in zip(asked, made, strict=True)
    ]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: None, "model: 8 of 8 prompts equal"),
        (lambda rows: rows[3]["token_ids"].__setitem__(2, 1), "prompt 3: token 2 is "),
        (lambda rows: rows[5]["token_ids"].append(1), "prompt 5: "),
        (lambda rows: rows[0]["prompt_ids"].append(1), "the prompts have other token ids"),
    ],
)
def test_a_golden_that_differs_anywhere_is_told(rows, change, said, tmp_path, monkeypatch, capsys):
    golden = json.loads(json.dumps({"made_by": "a test", "rows": rows}))
    change(golden["rows"])
    monkeypatch.setattr(parity, "GOLDENS", tmp_path)
    parity.golden_path(MODEL).write_text(json.dumps(golden))
    assert parity.check(MODEL) == ("8 of 8" in said)
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    "path", sorted(parity.GOLDENS.glob("parity_*.json")), ids=lambda path: path.stem
)
def test_committed_goldens_are_whole(path):
    golden = json.loads(path.read_text())
    assert golden["made_by"].startswith("torch ") and len(golden["rows"]) == len(parity.PROMPTS)
    for row in golden["rows"]:
        assert (
            0 < len(row["token_ids"]) == len(row["gaps"]) <= parity.NEW_TOKENS
            and min(row["gaps"]) > 0
        )
