"""Checks for the runner of benchmarks/gpu_proof.py that end as no check should."""

import os
import signal
import time
from collections.abc import Iterator

from benchmarks.proof.rows import Row, Setting, noted


def good(setting: Setting) -> Iterator[Row]:
    yield noted("good", "1")


def raises(setting: Setting) -> Iterator[Row]:
    yield noted("before it raises", "1")
    raise RuntimeError("RESOURCE_EXHAUSTED: out of memory\nand more")


def leaves(setting: Setting) -> Iterator[Row]:
    yield noted("before it leaves", "1")
    raise SystemExit("not usable")


def hangs(setting: Setting) -> Iterator[Row]:
    yield noted("before it hangs", "1")
    time.sleep(600)


def dies(setting: Setting) -> Iterator[Row]:
    yield noted("before it dies", "1")
    print("the last line that it wrote", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
