"""Whether JAX looks for a TPU."""

from pathlib import Path

import pytest

from ssp_jax.runtime import platform


def machine(folder: Path, *, vendor: str = "0x1af4", device: str = "") -> tuple[Path, Path]:
    """Folders like those of a machine's PCI devices and of its device files."""
    pci = folder / "pci"
    devices = folder / "dev"
    (pci / "0000:00:04.0").mkdir(parents=True)
    (pci / "0000:00:04.0" / "vendor").write_text(f"{vendor}\n")
    (devices / "vfio").mkdir(parents=True)
    if device:
        (devices / device).touch()
    return pci, devices


@pytest.mark.parametrize(
    ("libtpu", "there", "environment", "expected"),
    [
        (True, {}, {}, "cpu"),
        (False, {}, {}, None),  # JAX says nothing
        (True, {"vendor": "0x1ae0"}, {}, None),
        (True, {"device": "accel0"}, {}, None),
        (True, {"device": "vfio/0"}, {}, None),
        (True, {"device": "vfio/vfio"}, {}, "cpu"),  # there without any device
        (True, {}, {"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, None),
        (True, {}, {"MEGASCALE_NUM_SLICES": "2"}, None),
        (True, {}, {"JAX_PLATFORMS": "tpu"}, None),  # the user has said it
        (True, {}, {"JAX_PLATFORMS": ""}, "cpu"),
    ],
)
def test_jax_does_not_look_for_a_tpu_where_none_can_be(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    libtpu: bool,
    there: dict[str, str],
    environment: dict[str, str],
    expected: str | None,
) -> None:
    found = {"libtpu": object()} if libtpu else {}
    monkeypatch.setattr(platform.importlib.util, "find_spec", found.get)
    assert platform.platforms_without(environment, *machine(tmp_path, **there)) == expected


@pytest.mark.parametrize(("plugin", "expected"), [("amd_gpu", None), ("xla_cuda12", "cpu")])
def test_devices_of_other_plugins_are_not_hidden(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, plugin: str, expected: str | None
) -> None:
    installed = [
        platform.importlib.metadata.EntryPoint(plugin, f"jax_plugins.{plugin}", "jax_plugins")
    ]
    monkeypatch.setattr(platform.importlib.metadata, "entry_points", lambda group: installed)
    monkeypatch.setattr(platform, "tpu_installed", lambda: True)
    monkeypatch.setattr(platform, "gpu_will_be_used", lambda environment: False)
    assert platform.platforms_without({}, *machine(tmp_path)) == expected
