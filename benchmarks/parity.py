"""Greedy decoding of a real model in float32: our engine against torch, token by token.

    python benchmarks/parity.py --model=FOLDER            # our engine; needs what the project needs
    python benchmarks/parity.py --model=FOLDER --write    # makes the golden; needs torch and
                                                          # transformers, not JAX

Eight fixed prompts, 64 tokens each, all prompts in the engine's slots at once. Goldens hold token
ids, no weights, and lie in benchmarks/goldens under the folder's name. Each token has the distance
of the two best logits in the reference: where two programs choose differently, it distinguishes a
tie that rounding decides (far below 1e-3) from an error.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ROOT / "benchmarks" / "goldens"
NEW_TOKENS = 64
PROMPTS: tuple[str | list[dict[str, str]], ...] = (
    "The capital of Norway is",
    "def quicksort(numbers):\n    ",
    "Im Jahre 1789 begann in Frankreich",
    "1, 1, 2, 3, 5, 8, 13,",
    "Once upon a time, in a valley that no map shows, there lived a clockmaker. Every clock in her "
    "house told another time, and when a traveller asked her which of them was right, she "
    "answered:",
    [{"role": "user", "content": "Name three rivers of Africa and the seas they reach."}],
    [
        {"role": "system", "content": "You are a helpful and harmless assistant."},
        {
            "role": "user",
            "content": "Write the Python one-liner that reverses the words of a sentence.",
        },
    ],
    [
        {"role": "user", "content": "What does <search> capital of Peru </search> mean here?"},
        {"role": "assistant", "content": "It asks a search engine for the capital of Peru."},
        {"role": "user", "content": "日本の首都はどこですか。"},
    ],
)


def prompt_tokens(tokenizer: Any) -> list[list[int]]:
    def encode(prompt: str | list[dict[str, str]]) -> list[int]:
        if isinstance(prompt, str):
            return tokenizer.encode(prompt)
        text = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
        return tokenizer.encode(text, add_special_tokens=False)

    return [encode(prompt) for prompt in PROMPTS]


def golden_path(folder: Path) -> Path:
    return GOLDENS / f"parity_{folder.name}.json"


def write(folder: Path) -> None:
    """The reference: greedy, float32, every setting of generation_config.json but the eos tokens
    off.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    options = {"dtype": torch.float32, "trust_remote_code": False}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    eos = model.generation_config.eos_token_id
    stops = sorted({tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])} - {None})
    model.generation_config = transformers.GenerationConfig(
        eos_token_id=stops, pad_token_id=stops[0]
    )
    asked = prompt_tokens(tokenizer)
    longest = max(map(len, asked))
    padding = [longest - len(tokens) for tokens in asked]  # on the left
    made = model.generate(
        torch.tensor([[stops[0]] * n + tokens for n, tokens in zip(padding, asked, strict=True)]),
        attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(made.logits, 1).topk(2).values
    rows = []
    for i, tokens in enumerate(asked):
        chosen = made.sequences[i, longest:].tolist()
        ends = [at for at, token in enumerate(chosen) if token in stops]
        chosen = chosen[: ends[0] + 1] if ends else chosen  # what follows is padding
        gaps = (best[i, :, 0] - best[i, :, 1])[: len(chosen)].tolist()
        rows.append(
            {"prompt_ids": tokens, "token_ids": chosen, "gaps": [round(gap, 5) for gap in gaps]}
        )
        print(repr(tokenizer.decode(chosen)), "smallest gap", min(rows[-1]["gaps"]))
    made_by = f"torch {torch.__version__}, transformers {transformers.__version__}, float32"
    lines = ",\n".join("  " + json.dumps(row) for row in rows)
    GOLDENS.mkdir(exist_ok=True)
    golden_path(folder).write_text(
        f'{{"made_by": {json.dumps(made_by)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8"
    )


def check(folder: Path) -> bool:
    """Prints where ours and the golden part; True when all token ids are equal."""
    sys.path.insert(0, str(ROOT))
    from ssp_jax.game.roles import ASSISTANT
    from ssp_jax.generate import ask

    golden = json.loads(golden_path(folder).read_text(encoding="utf-8"))
    m = ask.load_model(folder, "float32")
    asked = prompt_tokens(m.tokenizer)
    if asked != [row["prompt_ids"] for row in golden["rows"]]:
        print("the prompts have other token ids: another tokenizer than the golden's")
        return False
    episodes = ask.play(m, ask.make_context(m.tokenizer, NEW_TOKENS), ASSISTANT, asked)
    equal = 0
    for number, (episode, row) in enumerate(zip(episodes, golden["rows"], strict=True)):
        ours, theirs = episode.tokens[episode.prompt_length :], row["token_ids"]
        if ours == theirs:
            equal += 1
            continue
        at = next(
            (i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]),
            None,
        )
        if at is None:
            print(f"prompt {number}: {len(ours)} tokens, the golden has {len(theirs)}")
        else:
            gap = f"the reference's two best logits are {row['gaps'][at]} apart there"
            print(f"prompt {number}: token {at} is {ours[at]}, the golden has {theirs[at]}; {gap}")
    count = sum(len(row["token_ids"]) for row in golden["rows"])
    compared = f"{equal} of {len(PROMPTS)} prompts equal, {count} tokens"
    print(f"{folder.name}: {compared}, against {golden['made_by']}")
    return equal == len(PROMPTS)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--model",
        type=lambda path: Path(path).expanduser(),
        required=True,
        help="Hugging Face folder",
    )
    parser.add_argument("--write", action="store_true", help="make the golden with torch")
    args = parser.parse_args()
    folder = args.model.resolve()
    if args.write:
        write(folder)
        return 0
    if not golden_path(folder).is_file():
        print(f"{golden_path(folder)} does not exist; make it with --write", file=sys.stderr)
        return 2
    return 0 if check(folder) else 1


if __name__ == "__main__":
    sys.exit(main())
