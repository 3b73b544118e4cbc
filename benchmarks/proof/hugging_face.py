"""Check 10: Hugging Face generate at the shape of check 5, where PyTorch is."""

import statistics
from collections.abc import Iterator

from benchmarks import generate
from benchmarks.proof.rows import Row, Setting, noted

NEW = 33  # tokens; the first comes with the prompts
REPEATS = 1


def check(setting: Setting) -> Iterator[Row]:
    # The slots of configs/qwen0p5b.py; prompts as long as half of the cache's first piece.
    name, batch, length, dtype = ("0.5B", 96, 512, "bfloat16")
    if setting.small:
        name, batch, length, dtype = ("1M", 4, 32, "float32")
    shape, _ = generate.SHAPES[name]

    def seconds(new: int) -> float:
        result = generate.run_torch(shape, batch, length, new, REPEATS, dtype)
        return statistics.median(result["seconds"])

    step = (seconds(NEW) - seconds(1)) / (NEW - 1)
    rate = f"{1e3 * step:.2f} ms, {batch / step:,.0f} tokens/s"
    yield noted(f"PyTorch, {name}, {batch} rollouts after {length} tokens: a step", rate)
