"""Whether JAX looks for a TPU, or for a GPU of which only the compiler is there."""

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
    ("installed", "there", "environment", "expected"),
    [
        ("libtpu", {}, {}, "cpu"),
        ("", {}, {}, None),  # JAX says nothing
        ("jax_cuda12_plugin", {}, {}, "cpu"),
        ("jax_cuda12_plugin", {}, {"JAX_PLATFORMS": "cuda"}, None),
        ("libtpu", {"vendor": "0x1ae0"}, {}, None),
        ("libtpu", {"device": "accel0"}, {}, None),
        ("libtpu", {"device": "vfio/0"}, {}, None),
        ("libtpu", {"device": "vfio/vfio"}, {}, "cpu"),  # there without any device
        ("libtpu", {}, {"TPU_WORKER_HOSTNAMES": "a-0,a-1"}, None),
        ("libtpu", {}, {"MEGASCALE_NUM_SLICES": "2"}, None),
        ("libtpu", {}, {"JAX_PLATFORMS": "tpu"}, None),  # the user has said it
        ("libtpu", {}, {"JAX_PLATFORMS": ""}, "cpu"),
    ],
)
def test_jax_does_not_look_for_a_device_where_none_can_be(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    installed: str,
    there: dict[str, str],
    environment: dict[str, str],
    expected: str | None,
) -> None:
    """Of a package that is installed for its compiler."""
    found = {installed: object()}
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
