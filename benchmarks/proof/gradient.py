"""Check 6: an update of Qwen2.5-0.5B over one row of 12,288 tokens, with each attention."""

import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import jax

from benchmarks import update
from benchmarks.proof import attention
from benchmarks.proof.decode import against_plan
from benchmarks.proof.rows import Row, Setting, noted
from benchmarks.proof.shapes import Case, qwen_0p5b
from ssp_jax.plan import hardware, memory

REPEATS = 3
EPISODES = 4  # in a row, which they fill
# By which the peak may differ from shapes alone: a compiler's temporaries have been a third more.
MEMORY_SHARE = 0.25


@dataclass(frozen=True)
class Speed:
    """An update of one row: gradients and an optimizer step."""

    seconds: float  # median
    flops: float
    tokens: int

    def __str__(self) -> str:
        rate = self.flops / self.seconds
        text = f"{self.seconds:.3f} s, {self.tokens / self.seconds:,.0f} tokens/s, "
        text += f"{rate / 1e12:.3g} TFLOP/s"
        peak = hardware.peak_flops(jax.devices()[0].device_kind)
        return f"{text}, MFU {rate / peak:.1%}" if peak else text


def check(setting: Setting) -> Iterator[Row]:
    case = qwen_0p5b(setting)
    tokens = case.config.learner.row_tokens
    for kernel, key in attention.kernels().items():
        speed = measure(case, key)
        yield noted(f"update of 1 x {tokens} tokens, {kernel} attention", str(speed))
        yield peak_against_plan(case, kernel, key)


def shape_of(case: Case) -> update.Shape:
    m = case.model
    sizes = (m.vocab_size, m.num_layers, m.embed_dim, m.num_heads, m.num_kv_heads, m.head_dim)
    return update.Shape(*sizes, m.mlp_dim, batch=1, remat=case.config.model.remat, rows=1)


def measure(case: Case, attention_key: str) -> Speed:
    shape = shape_of(case)
    tokens = case.config.learner.row_tokens
    length = tokens // EPISODES
    played = update.episodes(shape, [length] * EPISODES, length // 4)
    seconds = update.our_seconds(shape, played, 1, tokens, REPEATS, attention=attention_key)
    return Speed(statistics.median(seconds), shape.flops(tokens, length), tokens)


def peak_against_plan(case: Case, kernel: str, key: str) -> Row:
    """The peak is that of the process: of several kernels, the highest so far."""
    name = f"peak of the update, GiB, {kernel} attention"
    return against_plan(name, planned_bytes(case, key), MEMORY_SHARE)


def planned_bytes(case: Case, attention_key: str) -> float:
    target = case.target(attention_key)
    kept = memory.persistent_bytes(target)
    phases = memory.peaks(target, kept, memory.temporaries(target, kept["parameters"]))
    return max(size for phase, size in phases.items() if phase in memory.UPDATE)
