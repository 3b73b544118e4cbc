"""When a run is on the CPU."""

from pathlib import Path

import pytest

from ssp_jax import cpu


@pytest.mark.parametrize(
    ("platforms", "gpu", "libtpu", "vendor", "expected"),
    [("cpu", True, True, "0x1ae0", True), ("", False, False, "0x1ae0", True), ("", True, False, "0x10de", False)]
    + [("", False, True, "0x1ae0", False), ("", False, True, "0x1af4", True)]
    + [("tpu", False, False, "0x1af4", False), ("cuda,cpu", True, False, "0x10de", False)],
)
def test_the_cpu_is_used_where_nothing_else_is_there_or_asked_for(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    platforms: str,
    gpu: bool,
    libtpu: bool,
    vendor: str,
    expected: bool,
) -> None:
    (tmp_path / "0000:00:04.0").mkdir()
    (tmp_path / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    monkeypatch.setattr(cpu, "_PCI_DEVICES", tmp_path)
    monkeypatch.setattr(cpu.gpu, "will_be_used", lambda environment: gpu)
    monkeypatch.setattr(cpu.importlib.util, "find_spec", lambda name: object() if libtpu else None)
    assert cpu.will_be_used({"JAX_PLATFORMS": platforms}) is expected


@pytest.mark.parametrize(
    ("libc", "before", "after"),
    [
        ("glibc", None, "glibc.malloc.hugetlb=1"),
        ("glibc", "glibc.malloc.check=3", "glibc.malloc.check=3:glibc.malloc.hugetlb=1"),
        ("glibc", "glibc.malloc.hugetlb=0", None),
        ("", None, None),
    ],
)
def test_huge_pages_are_asked_for_where_glibc_knows_them_and_the_user_says_nothing(
    monkeypatch: pytest.MonkeyPatch, libc: str, before: str | None, after: str | None
) -> None:
    monkeypatch.setattr(cpu.platform, "libc_ver", lambda: (libc, ""))
    environment = {"GLIBC_TUNABLES": before} if before else {}
    assert cpu.set_huge_pages(environment) is (after is not None)
    assert environment.get("GLIBC_TUNABLES") == (after or before)
