"""Before JAX is loaded: 8 fake devices on the CPU, here and in the processes that tests start.
Strict JAX.
"""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
if "PYTEST_XDIST_WORKER" not in os.environ:  # whose environment is that of the first process
    _cache = tempfile.TemporaryDirectory(prefix="ssp_jax_tests_")  # gone when the tests end
    _flags = (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # As fast programs as at the highest level, of tests, and a fifth less of compiling.
        "--xla_backend_optimization_level=1",
        "--xla_llvm_disable_expensive_passes=true",
    )
    os.environ |= {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(_flags),
        # Each process finds what another has compiled, the short programs too.
        "JAX_COMPILATION_CACHE_DIR": _cache.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PERSISTENT_CACHE_ENABLE_XLA_CACHES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def programs_of_a_file() -> Iterator[None]:
    """The compiled programs of a test file are given back at its end: 2 GB, were they all kept."""
    yield
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def environment_of_a_file() -> Iterator[None]:
    """Variables that a test file sets are gone at its end: the planner sets some for libtpu."""
    before = set(os.environ)
    yield
    for name in set(os.environ) - before - {"PYTEST_CURRENT_TEST"}:
        del os.environ[name]


@pytest.fixture(scope="module")
def quick_compile() -> Iterator[None]:
    """For files whose programs run once or twice: most of LLVM's optimizations cost more than they
    give.
    """
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


RunMain = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run_main(tmp_path: Path) -> RunMain:
    """python -m ssp_jax.main with these arguments, in an empty folder (or `cwd`), as a user would
    start it.
    """

    def run(
        *arguments: str, cwd: Path = tmp_path, timeout: float = 300
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "ssp_jax.main", *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout)

    return run


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What this process writes beyond that fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the tied model of the goldens, which a test may damage."""
    return Path(shutil.copytree(ROOT / "tests/goldens/qwen2", tmp_path / "model"))
