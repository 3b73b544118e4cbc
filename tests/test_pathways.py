"""What a run does where Pathways' proxy is in the environment. No test reaches such a proxy."""

import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import pytest

from ssp_jax.assembly.inputs import check_cache
from ssp_jax.errors import InputError
from ssp_jax.model.sharding import by_host
from ssp_jax.runtime import device_memory, platform, processes
from ssp_jax.runtime.launchers import ProcessSpec

PROXY = {"JAX_PLATFORMS": "proxy", "JAX_BACKEND_TARGET": "grpc://localhost:29000"}


@pytest.mark.parametrize(
    ("platforms", "expected"),
    [(None, False), ("", False), ("tpu,cpu", False), ("proxy", True), ("proxy,cpu", True)],
)
def test_the_proxy_is_seen_in_the_environment(platforms: str | None, expected: bool) -> None:
    environment = {} if platforms is None else {"JAX_PLATFORMS": platforms}
    assert platform.pathways_will_be_used(environment) is expected
    # Then this process has no device of its own to prepare for.
    if expected:
        assert not platform.gpu_will_be_used(environment)
        assert not platform.cpu_will_be_used(environment)
        assert platform.platforms_without(environment) is None


@pytest.fixture
def pathwaysutils(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of that name, which says that it was initialised."""
    (tmp_path / "pathwaysutils.py").write_text("def initialize():\n    print('initialised')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "pathwaysutils", raising=False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"JAX_BACKEND_TARGET": ""}, "JAX_BACKEND_TARGET is not set; expected the proxy's address"),
        ({"ENABLE_PATHWAYS_PERSISTENCE": "1"}, "ENABLE_PATHWAYS_PERSISTENCE is 1; expected 0"),
    ],
)
@pytest.mark.usefixtures("pathwaysutils")
def test_what_would_end_badly_is_said_first(changes: Mapping[str, str], said: str) -> None:
    platform.check_pathways(PROXY | {"ENABLE_PATHWAYS_PERSISTENCE": "0"})
    with pytest.raises(InputError, match=said):
        platform.check_pathways(PROXY | changes)


def test_a_missing_package_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, "pathwaysutils", raising=False)
    with pytest.raises(InputError, match=r"expected pip install '\.\[pathways\]'"):
        platform.check_pathways(PROXY)


@pytest.mark.usefixtures("pathwaysutils")
def test_the_proxy_is_made_known_before_a_command_needs_jax(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in PROXY.items():
        monkeypatch.setenv(name, value)
    platform.prepare()
    assert capsys.readouterr().out == "initialised\n"


def test_one_process_drives_all_chips() -> None:
    """Also where the environment announces other processes, as in each pod of a job."""
    others = {"TPU_WORKER_HOSTNAMES": "a-0,a-1", "JOB_COMPLETION_INDEX": "0"}
    for spec in (ProcessSpec(), ProcessSpec(processes=1)):
        processes.start(spec, PROXY | others)
    assert not processes.is_multiprocess()
    with pytest.raises(InputError, match="--processes is 2; expected 1 or no such flag"):
        processes.start(ProcessSpec("host0:1234", 2, 1), dict(PROXY))


class Device:
    """A device whose memory is read as it is through the proxy."""

    def __init__(self, said: str) -> None:
        self._said = said

    def memory_stats(self) -> Any:
        raise jax.errors.JaxRuntimeError(self._said)


def test_memory_that_is_not_reported_is_unknown_and_other_errors_stay_errors() -> None:
    unknown: Any = Device(
        "INVALID_ARGUMENT: MemoryStats is only supported for addressable PjRt devices."
    )
    assert device_memory.stats(unknown) == {} == device_memory.stats(jax.local_devices()[0])
    lost: Any = Device("UNAVAILABLE: the proxy is gone")
    with pytest.raises(jax.errors.JaxRuntimeError, match="UNAVAILABLE"):
        device_memory.stats(lost)


@pytest.mark.parametrize(
    ("gib", "kind", "free"), [(2.0, "tpu", None), (0.0, "tpu", 1 << 30), (0.0, "cpu", None)]
)
def test_the_cache_takes_what_is_free_where_that_is_known(
    gib: float, kind: str, free: int | None
) -> None:
    check_cache(gib, kind, free)
    with pytest.raises(InputError, match=r"engine\.kv_cache_gib is 0; expected GiB of keys"):
        check_cache(0.0, "tpu", None)


def test_chips_of_a_host_follow_each_other_in_the_mesh() -> None:
    """By their ids those of two hosts alternate, as the columns of a 4x4 slice do."""

    def chip(number: int, **place: int) -> types.SimpleNamespace:
        return types.SimpleNamespace(process_index=0, id=number, **place)

    chips = [chip(n, slice_index=0, virtual_task_index=n // 2 % 2) for n in range(8)]
    assert [c.id for c in by_host(chips)] == [0, 1, 4, 5, 2, 3, 6, 7]
    slices = [chip(n, slice_index=n % 2, virtual_task_index=0) for n in range(4)]
    assert [c.id for c in by_host(slices)] == [0, 2, 1, 3]
    assert [c.id for c in by_host([chip(2), chip(1)])] == [1, 2]
