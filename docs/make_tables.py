"""Writes docs/config_keys.md and docs/metrics.md from the code that owns what they say.

python docs/make_tables.py
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from anywhere

from ssp_jax.config.comments import Section, read_sections
from ssp_jax.metric_table import METRICS

FOLDER = Path(__file__).parent

CONFIG_KEYS = """\
# Config keys

Made from [configs/default.py](../configs/default.py) by `python docs/make_tables.py`: do not edit.
A run takes each key as `--config.KEY=VALUE`; a wrong key, type or value ends it at once with one
sentence. `python -m ssp_jax --help=WORD` finds keys by a word. Sources: [P] the paper, arXiv
2510.18821v1; [C] its reference code; [H] this project's choice. `""` is an empty text.
"""

METRICS_HEAD = """\
# Metrics

Made from [metric_table.py](../ssp_jax/metric_table.py) by `python docs/make_tables.py`: do
not edit. Each step is a line of `metrics.jsonl` in the workdir, and a point of each scalar in
`tensorboard/`; an evaluation is a line of its own. A value that is not finite is null.

In names ROLE is solver, proposer, or both (`learner.update_order=combined`), and SET is the name of
a question set, or average. Percentages of `eval/` also have a 95 % interval, as NAME_low and
NAME_high.
"""


def config_keys() -> str:
    """The text of docs/config_keys.md."""
    return "\n".join([CONFIG_KEYS, *map(_section, read_sections())])


def _section(section: Section) -> str:
    rows = [(f"`{key.name}`", f"`{key.default}`", key.comment) for key in section.keys]
    head = f"## {section.name or 'The whole run'}\n"
    intro = [f"{section.comment}\n"] if section.comment else []
    return "\n".join([head, *intro, *_table(("key", "default", "meaning"), rows)]) + "\n"


def metrics() -> str:
    """The text of docs/metrics.md."""
    parts = [METRICS_HEAD]
    for heading, found in METRICS.items():
        rows = []
        for metric in found:
            only = f" Only where {metric.written}." if metric.written else ""
            rows.append((f"`{metric.name}`", metric.unit, metric.meaning + only))
        table = _table(("metric", "unit", "meaning"), rows)
        parts.append("\n".join([f"## {heading}\n", *table]) + "\n")
    return "\n".join(parts)


def _table(heads: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for row in rows:
        yield "| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |"


if __name__ == "__main__":
    (FOLDER / "config_keys.md").write_text(config_keys(), encoding="utf-8")
    (FOLDER / "metrics.md").write_text(metrics(), encoding="utf-8")
