"""What a process has told its environment before JAX starts."""

import json
import os
import platform
import subprocess
import sys
from typing import Any

import pytest

SAYS = """
import json, sys
from pathlib import Path
from ssp_jax import backend
backend.prepare()
print(json.dumps([sys.argv, Path("/proc/self/environ").read_text().split(chr(0))]))
"""
pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")


def started(**environment: str) -> Any:
    """Arguments and the environment that the process began with, which is what the C library has read."""
    command = [sys.executable, "-W", "error", "-c", SAYS, "a b", "--c"]
    process = subprocess.Popen(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True)
    said = process.communicate(timeout=60)[0]
    return json.loads(said)


def test_a_run_on_the_cpu_starts_itself_once_more_with_huge_pages() -> None:
    arguments, environment = started(JAX_PLATFORMS="cpu", GLIBC_TUNABLES="")
    assert arguments == ["-c", "a b", "--c"] and "GLIBC_TUNABLES=glibc.malloc.hugetlb=1" in environment


def test_a_run_elsewhere_is_left_alone() -> None:
    assert "GLIBC_TUNABLES=x.y=1" in started(JAX_PLATFORMS="tpu", GLIBC_TUNABLES="x.y=1")[1]
