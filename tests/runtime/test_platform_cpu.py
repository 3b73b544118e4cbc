"""When a run is on the CPU."""

import pytest

from ssp_jax.runtime import platform


@pytest.mark.parametrize(
    ("platforms", "gpu", "tpu", "expected"),
    [
        ("cpu", True, True, True),
        ("", False, False, True),
        ("", True, False, False),
        ("", False, True, False),
        ("tpu", False, False, False),
        ("cuda,cpu", True, False, False),
    ],
)
def test_the_cpu_is_used_where_nothing_else_is_there_or_asked_for(
    monkeypatch: pytest.MonkeyPatch, platforms: str, gpu: bool, tpu: bool, expected: bool
) -> None:
    monkeypatch.setattr(platform, "gpu_will_be_used", lambda environment: gpu)
    monkeypatch.setattr(platform, "tpu_may_be_used", lambda environment: tpu)
    assert platform.cpu_will_be_used({"JAX_PLATFORMS": platforms}) is expected


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
    monkeypatch.setattr(platform.platform, "libc_ver", lambda: (libc, ""))
    environment = {"GLIBC_TUNABLES": before} if before else {}
    assert platform.set_huge_pages(environment) is (after is not None)
    assert environment.get("GLIBC_TUNABLES") == (after or before)
