"""The paper's scores of a model, to stand beside ours (arXiv 2510.18821v1, Table 1)."""

import re

SETS = ("nq", "triviaqa", "popqa", "hotpotqa", "2wikimultihopqa", "musique", "bamboogle")

Scores = tuple[float, ...]  # pass@1 by a judge, percent, in the order of SETS

# Names on the Hugging Face hub, where the paper names one. The scores of Qwen3-8B + SSP on
# 2wikimultihopqa cannot come from 500 questions; all are given as printed.
_TABLE_1: dict[str, tuple[Scores, Scores]] = {
    "Qwen2.5-7B": (
        (32.0, 33.2, 25.0, 18.0, 10.8, 11.0, 26.4),
        (54.2, 73.6, 56.0, 52.8, 33.2, 24.0, 47.2),
    ),
    "Qwen2.5-7B-Instruct": (
        (44.2, 64.0, 36.4, 45.0, 32.8, 16.8, 51.2),
        (54.8, 73.4, 51.8, 51.8, 38.8, 21.2, 54.4),
    ),
    "Llama-3.1-8B-Instruct": (
        (50.2, 65.2, 45.8, 34.6, 19.4, 11.4, 30.4),
        (58.0, 75.8, 55.4, 44.2, 34.4, 16.2, 40.0),
    ),
    "Qwen3-8B": (
        (53.6, 76.0, 50.8, 54.2, 48.0, 26.6, 58.4),
        (56.0, 78.2, 55.0, 58.0, 51.5, 28.0, 67.2),
    ),
    "ZeroSearch_wiki_V2_Qwen2.5_7B": (
        (52.2, 66.6, 50.2, 43.2, 34.6, 17.6, 40.8),
        (54.2, 69.0, 53.0, 44.0, 37.2, 19.6, 44.0),
    ),
    "SearchR1-nq_hotpotqa_train-qwen2.5-7b-em-ppo-v0.2": (
        (56.6, 75.4, 57.2, 58.2, 45.2, 29.6, 55.2),
        (57.8, 78.0, 58.4, 60.4, 45.6, 30.6, 59.2),
    ),
    "R-Search-7b-grpo": (
        (50.8, 71.0, 53.8, 54.0, 56.4, 29.8, 53.6),
        (52.4, 74.2, 56.8, 54.2, 58.0, 31.4, 55.2),
    ),
    "Qwen2.5-14B-Instruct": (
        (56.0, 77.0, 53.8, 57.0, 48.4, 26.6, 64.8),
        (57.4, 77.8, 54.6, 61.2, 49.4, 28.0, 69.6),
    ),
    "Qwen2.5-32B-Instruct": (
        (58.0, 78.4, 53.4, 57.0, 48.4, 27.4, 63.2),
        (62.6, 82.8, 55.0, 62.8, 49.2, 32.0, 69.6),
    ),
}


def table_1(model_path: str) -> dict[str, tuple[float, float]]:
    """Set -> (before, after) for the model of this name; empty where the paper has none.

    model_path: a hub name, a folder of that name, or one of the hub's cache
    (models--OWNER--NAME/snapshots/HASH). The name must come last: runs/NAME/export is another
    model.
    """
    path = re.sub(r"/snapshots/[^/]+$", "", model_path.rstrip("/"))
    name = re.split("/|--", path)[-1].lower()
    for known, (before, after) in _TABLE_1.items():
        if known.lower() == name:
            return dict(zip(SETS, zip(before, after, strict=True), strict=True))
    return {}
