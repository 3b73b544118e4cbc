"""The environment of a process before JAX starts."""

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ssp_jax.runtime.platform import tpu_installed, tpu_may_be_used

SAYS = """
import json, sys
from pathlib import Path
from ssp_jax.runtime import platform
platform.prepare()
print(json.dumps([sys.argv, Path("/proc/self/environ").read_text().split(chr(0))]))
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def started(**environment: str) -> Any:
    """Arguments and the environment that the process began with, which is what the C library has
    read.
    """
    command = [sys.executable, "-W", "error", "-c", SAYS, "a b", "--c"]
    process = subprocess.Popen(
        command, env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    said = process.communicate(timeout=60)[0]
    return json.loads(said)


def test_a_run_on_the_cpu_starts_itself_once_more_with_huge_pages() -> None:
    arguments, environment = started(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="")
    assert (
        arguments == ["-c", "a b", "--c"] and "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in environment
    )


def test_a_run_elsewhere_is_left_alone() -> None:
    assert "GLIBC_TUNABLES=x.y=1" in started(JAX_PLATFORMS="tpu", GLIBC_TUNABLES="x.y=1")[1]


QUIET = """
import sys
if sys.argv[1]:
    import jax
from ssp_jax.runtime import platform
platform.prepare()
import jax
print(jax.devices()[0].platform)
"""


@pytest.mark.parametrize("imported", ["", "jax"])
# it starts itself once more, or does not
@pytest.mark.parametrize("tunables", ["", "glibc.malloc.hugetlb=1"])
@pytest.mark.skipif(
    not tpu_installed() or tpu_may_be_used({}), reason="libtpu is not installed, or a TPU is there"
)
def test_a_run_starts_quietly_where_libtpu_is_and_no_tpu(imported: str, tunables: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    environment |= {"GLIBC_TUNABLES": tunables, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", QUIET, imported]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


def test_an_index_is_built_quietly_and_takes_no_device(tmp_path: Path) -> None:
    (tmp_path / "corpus.jsonl").write_text(
        '{"id": "0", "contents": "Paris\\nThe capital of France"}\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [
        sys.executable,
        "-m",
        "ssp_jax.retriever",
        "build",
        "--corpus=corpus.jsonl",
        "--out=index",
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stderr) == (0, "") and "1 passages" in done.stdout
