import os
import subprocess
import sys
from pathlib import Path

import pytest

from ssp_jax.runtime import platform

NAMES = [*platform.XLA_FLAGS, "XLA_CLIENT_MEM_FRACTION", platform.HOST_MEMORY]


def test_all_defaults_are_set_and_told() -> None:
    environment: dict[str, str] = {}
    added = " ".join(platform.set_defaults(environment))
    assert all(name in added for name in NAMES)
    assert environment["XLA_CLIENT_MEM_FRACTION"] == str(platform.MEMORY_FRACTION)
    assert environment["XLA_FLAGS"] == " ".join(
        f"{name}={value}" for name, value in platform.XLA_FLAGS.items()
    )


def test_what_the_user_has_set_stays() -> None:
    flags = " ".join(f"{flag}=1" for flag in platform.XLA_FLAGS)
    given = {
        "XLA_FLAGS": f"--xla_dump_to=x {flags}",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5",
        platform.HOST_MEMORY: "7",
    }
    environment = dict(given)
    assert platform.set_defaults(environment) == [] and environment == given


def test_other_flags_of_the_user_are_kept() -> None:
    environment = {"XLA_FLAGS": "--xla_dump_to=x"}
    platform.set_defaults(environment)
    assert environment["XLA_FLAGS"].split() == [
        "--xla_dump_to=x",
        *(f"{n}={v}" for n, v in platform.XLA_FLAGS.items()),
    ]


def test_the_compiler_gets_the_flags_that_a_run_would_set() -> None:
    """But not those that the environment has, which XLA reads itself."""
    first, *others = platform.XLA_FLAGS
    assert platform.missing_flags({}) == platform.XLA_FLAGS
    assert list(platform.missing_flags({"XLA_FLAGS": f"{first}=false"})) == others


@pytest.mark.parametrize(("processes", "share"), [(1, 0.85), (2, 0.425)])
def test_page_locked_memory_is_bounded_by_what_the_machine_has(
    processes: int, share: float
) -> None:
    environment = {"OMPI_COMM_WORLD_LOCAL_SIZE": str(processes)}
    platform.set_defaults(environment)
    gib = platform.host_memory() / 2**30
    assert share * gib - 1 <= int(environment[platform.HOST_MEMORY]) <= share * gib


def test_a_container_has_the_memory_of_its_limit(tmp_path: Path) -> None:
    whole = platform.host_memory([])
    limit = tmp_path / "memory.max"
    for text, expected in (("max\n", whole), (f"{1 << 30}\n", 1 << 30), (f"{1 << 62}\n", whole)):
        limit.write_text(text)
        assert platform.host_memory([limit, tmp_path / "missing"]) == expected


@pytest.mark.parametrize(
    ("said", "expected"), [("0,1,2", 3), ("", 0), ("-1", 0), ("GPU-8a,GPU-9b", 2), ("0,-1,2", 1)]
)
def test_visible_gpus_are_counted_as_cuda_does(said: str, expected: int) -> None:
    assert platform.visible_gpus({"CUDA_VISIBLE_DEVICES": said}) == expected


def test_without_a_choice_all_gpus_of_the_driver_are_visible(tmp_path: Path) -> None:
    for address in ("0000:00:05.0", "0000:00:06.0"):
        (tmp_path / address).mkdir()
    assert (
        platform.visible_gpus({}, tmp_path),
        platform.visible_gpus({}, tmp_path / "missing"),
    ) == (2, 0)


@pytest.mark.parametrize(
    ("platforms", "driver", "plugin", "expected"),
    [
        ("", True, True, True),
        ("cuda,cpu", True, True, True),
        ("cpu", True, True, False),
        ("tpu", True, True, False),
        ("", False, True, False),
        ("", True, False, False),
    ],
)
def test_a_gpu_is_expected_where_jax_would_take_one(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    platforms: str,
    driver: bool,
    plugin: bool,
    expected: bool,
) -> None:
    if driver:
        (tmp_path / "version").touch()
    found = {"jax_cuda12_plugin": object()} if plugin else {}
    monkeypatch.setattr(platform.importlib.util, "find_spec", found.get)
    assert platform.gpu_will_be_used({"JAX_PLATFORMS": platforms}, tmp_path / "version") is expected


def test_jax_knows_every_flag() -> None:
    """XLA ends the process at a flag that it does not know, on any backend."""
    flags = " ".join(f"{name}={value}" for name, value in platform.XLA_FLAGS.items())
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    for given, expected in ((flags, True), ("--xla_gpu_no_such_flag=true", False)):
        done = subprocess.run(
            command, env=os.environ | {"XLA_FLAGS": given}, capture_output=True, timeout=300
        )
        assert (done.returncode == 0) is expected, done.stderr
