"""Does a config fit on hardware that you don't have, and how long must a step take there at least?

    python -m ssp_jax.plan --config=configs/qwen7b.py --topology=v5p:2x2x2 [--config.KEY=VALUE ...]

--topology   v5e:4x4, v6e:4x4, v5p:2x2x2, tpu7x:2x2x1, gpu:h100x8, ...; without it: the smallest slice of each TPU
             generation that fits, from shapes alone
--shapes     no compiler: estimates from shapes alone, in a second
--tokens     tokens of a mean episode (3000), of which the model writes --sampled (1000)

For a TPU the run's programs are compiled ahead of time by the TPU's own compiler, on any CPU (pip
install '.[plan]'): what they need is what it says. For a GPU there is no such compiler, and
temporaries are estimates.
"""

import copy
import dataclasses
import math
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from ssp_jax.config import BOUNDS, Range, check_numbers, flatten_config, parse_command_line
from ssp_jax.errors import InputError, printable
from ssp_jax.model import hf_load, presets, sharding
from ssp_jax.model.decoder import ModelConfig
from ssp_jax.plan import compile, hardware, memory, roofline
from ssp_jax.plan.hardware import GIB, Slice
from ssp_jax.plan.memory import Target
from ssp_jax.plan.roofline import Work
from ssp_jax.runtime.command import parse_known_flags, run_command

_NO_SCALE = dict.fromkeys(memory.PHASES, 1.0)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes and work per device."""

    target: Target
    slice: Slice
    kept: dict[str, float]
    temporaries: dict[str, float]
    work: dict[str, Work]
    programs: list[compile.Program]  # none: from shapes alone

    @property
    def peaks(self) -> dict[str, float]:
        return memory.peaks(self.target, self.kept, self.temporaries)

    @property
    def play_peak(self) -> float:
        return max(peak for phase, peak in self.peaks.items() if phase in memory.PLAY)

    @property
    def update_peak(self) -> float:
        return max(peak for phase, peak in self.peaks.items() if phase in memory.UPDATE)

    @property
    def fits(self) -> bool:
        return max(self.peaks.values()) <= self.slice.device.hbm and all(
            p.fits for p in self.programs
        )

    @property
    def cache_budget(self) -> float:
        """Bytes that the key/value cache may take: what the fullest phase of play leaves."""
        return _cache_room(self.peaks, self.slice.device.hbm) + self.kept["key/value cache"]


def make_target(config: ConfigDict, model: ModelConfig, slice_: Slice, *, compiled: bool) -> Target:
    host = None
    if compiled:
        mesh: Any = sharding.make_mesh(config.mesh.to_dict(), compile.make_devices(slice_))
        # What one host runs is compiled for a slice of one host: the compiler takes four chips of a
        # large slice for a small one, and then stumbles over their numbers.
        host = (
            compile.make_devices(hardware.slices_of(slice_.kind)[0]) if slice_.hosts > 1 else None
        )
    else:
        mesh = sharding.abstract_mesh(config.mesh.to_dict(), slice_.devices)
    platform = "tpu" if slice_.is_tpu else "gpu"
    return Target(config, model, mesh, slice_.device.hbm, slice_.per_host, host, platform)


def make_plan(
    config: ConfigDict,
    model: ModelConfig,
    slice_: Slice,
    load: roofline.Workload,
    *,
    compiled: bool,
) -> Plan:
    target = make_target(config, model, slice_, compiled=compiled)
    kept = memory.persistent_bytes(target)
    temporaries = memory.temporaries(target, kept["parameters"])
    programs = compile.compile_all(target, _tell) if compiled else []
    for phase in {program.phase for program in programs}:
        temporaries[phase] = max(
            program.temporaries for program in programs if program.phase == phase
        )
    return Plan(target, slice_, kept, temporaries, roofline.work(target, load), programs)


def _cache_room(peaks: Mapping[str, float], hbm: float) -> float:
    return hbm - max(peaks[phase] for phase in memory.CACHED)


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def read_model(path: str) -> ModelConfig:
    if (Path(path) / "config.json").is_file():
        return hf_load.read_config(path)
    return presets.architecture(path)


# What would make it fit


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict(dict(values))
    return changed


def _moves(target: Target, cache_room: float) -> Iterator[tuple[str, Any]]:
    """Changes of one key that need less memory; each keeps the config valid and what it learns the
    same.

    cache_room: bytes a device by which the key/value cache may grow, or must shrink.
    """
    config, model, c, e = target.config, target.model, target.config.learner, target.config.engine
    for key, number in (("learner.rows", c.rows), ("engine.slots", e.slots)):
        if number // 2 >= target.parts and number // 2 % target.parts == 0:
            yield key, number // 2
    room = (
        math.floor((memory.persistent_bytes(target)["key/value cache"] + cache_room) / GIB * 100)
        / 100
    )
    if cache_room < 0 and room * GIB >= memory.longest_episode(target):
        yield "engine.kv_cache_gib", room
    if target.extend_rows > 1:
        yield "engine.extend_rows", e.extend_rows // 2
    if len(e.extend_buckets) > 1:
        yield "engine.extend_buckets", tuple(sorted(e.extend_buckets)[:-1])
    if c.logprob_chunk > 128 and c.logprob_chunk % 2 == 0:
        yield "learner.logprob_chunk", c.logprob_chunk // 2
    if sharding.tensor_divides(model.num_kv_heads, config.mesh.tensor * 2):
        yield "mesh.tensor", config.mesh.tensor * 2
    frugal = {"model.remat": "full", "learner.offload_moments": True}
    if c.kl_coef:
        frugal["learner.offload_reference"] = True
    yield from (
        (key, value) for key, value in frugal.items() if flatten_config(config)[key] != value
    )


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """A config on a slice, from shapes, with temporaries times a scale."""

    target: Target
    peaks: dict[str, float]
    hbm: float

    @property
    def excess(self) -> float:
        """Bytes over all phases by which it does not fit."""
        return sum(max(peak - self.hbm, 0.0) for peak in self.peaks.values())


def _estimate(
    config: ConfigDict, model: ModelConfig, slice_: Slice, scale: Mapping[str, float]
) -> _Estimate | None:
    """None where it cannot run."""
    hbm = slice_.device.hbm
    try:
        target = make_target(config, model, slice_, compiled=False)
        kept = memory.persistent_bytes(target)
    except InputError:
        return None
    temporaries = memory.temporaries(target, kept["parameters"])
    scaled = {phase: size * scale.get(phase, 1.0) for phase, size in temporaries.items()}
    return _Estimate(target, memory.peaks(target, kept, scaled), hbm)


def changes_that_fit(
    config: ConfigDict, model: ModelConfig, slice_: Slice, scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Single changes that are enough; where there is none, the changes that together are, the most
    useful first.

    From estimates, times `scale`: what the compiler said of a phase over its estimate.
    """

    def tried(values: dict[str, Any]) -> list[tuple[float, dict[str, Any]]]:
        base = with_values(config, values)
        now = _estimate(base, model, slice_, scale)
        if now is None:
            return []
        found = []
        for key, value in _moves(now.target, _cache_room(now.peaks, now.hbm)):
            then = _estimate(with_values(base, {key: value}), model, slice_, scale)
            if then is not None:
                found.append((then.excess, values | {key: value}))
        return found

    first = tried({})
    if enough := [values for excess, values in first if excess == 0]:
        return enough
    best = min(first, key=lambda x: x[0], default=None)
    while best is not None and best[0] > 0:
        further = min(tried(best[1]), key=lambda x: x[0], default=None)
        best = further if further is not None and further[0] < best[0] else None
    return [best[1]] if best is not None else []


def _fitting(
    config: ConfigDict, model: ModelConfig, slice_: Slice, change: bool
) -> dict[str, Any] | None:
    """Values with which this config fits: rows and slots raised to the mesh's next multiple, and
    changes if allowed.
    """
    try:
        mesh = sharding.abstract_mesh(config.mesh.to_dict(), slice_.devices)
    except InputError:
        return None
    shards = sharding.row_shards(mesh)
    flat = flatten_config(config)
    values = {
        key: -(-flat[key] // shards) * shards
        for key in ("learner.rows", "engine.slots")
        if flat[key] % shards
    }
    changed = with_values(config, values)
    estimate = _estimate(changed, model, slice_, _NO_SCALE)
    if estimate is None:
        return None
    if estimate.excess == 0:
        return values
    found = changes_that_fit(changed, model, slice_, _NO_SCALE) if change else []
    return values | found[0] if found else None


def smallest(
    config: ConfigDict, model: ModelConfig, slices: list[Slice]
) -> tuple[Slice, dict[str, Any]] | None:
    """The first slice that fits and the values that the config needs there; with changes only where
    none fits as is.
    """
    for change in (False, True):
        for slice_ in slices:
            values = _fitting(config, model, slice_, change)
            if values is not None:
                return slice_, values
    return None


# The report


def _overrides(values: Mapping[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}".replace(" ", "") for key, value in values.items())


def _memory_lines(plan: Plan) -> Iterator[str]:
    target, hbm, c = plan.target, plan.slice.device.hbm, plan.target.config.learner
    away = ", in host memory but for the "
    notes = {
        "parameters": "float32",
        "optimizer": "Adam's moments" + (f"{away}optimizer step" if c.offload_moments else ""),
        "reference": f"{target.dtype}{f'{away}scores' if c.offload_reference else ''}"
        if c.kl_coef
        else "kl_coef is 0",
        "sampler copy": f"{target.dtype}, while playing",
        "key/value cache": "while playing",
        "gradients": "float32, while updating",
    }
    yield "kept, GiB per device"
    for name, size in plan.kept.items():
        yield f"  {name:<18}{size / GIB:8.2f}   {notes[name]}"
    source = (
        "from the compiler, padding and code included"
        if plan.programs
        else "estimated from shapes alone"
    )
    yield f"phases, GiB per device; temporaries {source}"
    yield f"  {'':<10}{'kept':>10}{'temporaries':>14}{'peak':>9}{'of HBM':>9}"
    for phase, peak in plan.peaks.items():
        temporary = plan.temporaries[phase]
        verdict = "" if peak <= hbm else "   does not fit"
        sizes = f"{(peak - temporary) / GIB:10.2f}{temporary / GIB:14.2f}{peak / GIB:9.2f}"
        yield f"  {phase:<10}{sizes}{peak / hbm:9.0%}{verdict}"
    layout, tokens = memory.cache_layout(target), target.sizes.cache_tokens
    numbers = [target.hosts * n for n in layout.rows]
    later = "".join(
        f", {n} beyond {start} tokens"
        for n, start in zip(numbers[1:], layout.starts[1:], strict=True)
    )
    yield f"key/value cache: {numbers[0]} slots (config: {target.config.engine.slots}){later}"
    full = max(int(plan.cache_budget // memory.longest_episode(target)), 0) * target.parts
    yield f"  {plan.cache_budget / GIB:.2f} GiB per device are free for it: {full} slots of {tokens} tokens each"


def _time_lines(plan: Plan, load: roofline.Workload) -> Iterator[str]:
    chip = plan.slice.device
    yield (
        f"one step, lower bound: {load.played} episodes played ({load.trained} trained) of {load.tokens} tokens, "
        f"{load.sampled} of them sampled;"
    )
    yield (
        f"  {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s of HBM and {chip.link / 1e9:.0f} GB/s of "
        "links per device at their peaks; all slots always busy; searches, scheduling and the judge take no time"
    )
    yield f"  {'':<10}{'TFLOPs':>12}{'HBM GB':>12}{'link GB':>12}{'seconds':>10}   bound by"
    total = 0.0
    for phase, work in plan.work.items():
        seconds = work.seconds(chip)
        bound = max(seconds, key=lambda name: seconds[name])
        total += seconds[bound]
        sizes = f"{work.flops / 1e12:12.4g}{work.hbm / 1e9:12.4g}{work.link / 1e9:12.4g}"
        yield f"  {phase:<10}{sizes}{seconds[bound]:10.2f}   {bound}"
    yield f"  {'total':<10}{total:46.2f}"
    for program in plan.programs:
        if program.fits and program.phase in ("prefill", "decode"):  # the others loop over layers
            yield (
                f"  the compiler counts for one {program.name}: {program.flops / 1e12:.3g} TFLOPs and "
                f"{program.hbm / 1e9:.3g} GB"
                + (", its loop over tokens counted once" * (program.phase == "decode"))
            )


def report(plan: Plan, load: roofline.Workload) -> Iterator[str]:
    slice_, shape = plan.slice, plan.target.mesh.shape
    hosts = f"{slice_.hosts} host{'s' * (slice_.hosts > 1)}"
    per_chip = f" ({slice_.chip.devices} devices each)" if slice_.chip.devices > 1 else ""
    yield (
        f"{plan.target.config.model.path} on {slice_.name}: {slice_.chips} chips{per_chip}, {hosts}, "
        f"{slice_.device.hbm / GIB:.1f} GiB per device; mesh {' x '.join(f'{n} {s}' for n, s in shape.items())}"
    )
    if plan.programs:
        yield f"compiled by libtpu for this slice; jax {jax.__version__}"
    else:
        yield "from shapes alone: no compiler was asked"
    yield f"attention of the update: {plan.target.learner.attention}"
    yield from _memory_lines(plan)
    yield from _time_lines(plan, load)
    if plan.fits:
        yield "it fits"
        return
    yield "it does not fit; what would (estimates):"
    config, model = plan.target.config, plan.target.model
    estimate = memory.temporaries(plan.target, plan.kept["parameters"])
    scale = (
        {phase: plan.temporaries[phase] / estimate[phase] for phase in estimate}
        if plan.programs
        else _NO_SCALE
    )
    changes = changes_that_fit(config, model, slice_, scale)
    for values in changes:
        yield f"  {_overrides(values)}"
    found = smallest(
        config, model, [s for s in hardware.slices_of(slice_.kind) if s.chips > slice_.chips]
    )
    if found:
        yield f"  --topology={found[0].name} {_overrides(found[1])}".rstrip()
    elif not changes:
        yield "  no change of mesh, rows, slots or buckets alone: shorten limits.* and learner.row_tokens"


def smallest_slices(config: ConfigDict, model: ModelConfig) -> Iterator[str]:
    yield f"{config.model.path}: the smallest slice of each TPU generation that fits, from shapes alone"
    for kind in hardware.TPUS:
        slices = hardware.slices_of(kind)
        found = smallest(config, model, slices)
        if found:
            yield f"  {found[0].name:<14}{found[0].chips:4} chips  {_overrides(found[1])}".rstrip()
        else:
            yield f"  {kind:<14}none up to {slices[-1].chips} chips with this mesh, rows and slots"


def main(argv: list[str]) -> int:
    jax.config.update("jax_platforms", "cpu")  # the machine that plans is not the one that runs
    return run_command(_run, argv, help=__doc__ or "")


def _run(argv: list[str]) -> int:
    own, rest = _parse(argv)
    config = parse_command_line(rest).config
    check_numbers(config)
    model = read_model(config.model.path)
    if own.topology is None:
        print(*map(printable, smallest_slices(config, model)), sep="\n")
        return 0
    slice_ = hardware.parse_topology(own.topology)
    compiled = slice_.is_tpu and not own.shapes
    if compiled and not compile.available():
        _tell("libtpu is not installed (pip install '.[plan]'): estimates from shapes alone")
        compiled = False
    load = roofline.workload(config, own.tokens, own.sampled)
    plan = make_plan(config, model, slice_, load, compiled=compiled)
    print(*map(printable, report(plan, load)), sep="\n")
    return 0 if plan.fits else 1


def _parse(argv: list[str]) -> tuple[Any, list[str]]:
    """This command's own flags, and the rest, which is ssp_jax.main's."""
    values = flags.FlagValues()
    flags.DEFINE_string("topology", None, "chips", flag_values=values)
    flags.DEFINE_bool("shapes", False, "do not compile", flag_values=values)
    flags.DEFINE_integer("tokens", 3000, "of a mean episode", flag_values=values)
    flags.DEFINE_integer("sampled", 1000, "of these, written by the model", flag_values=values)
    rest = parse_known_flags(values, argv)
    BOUNDS["engine.cache_tokens"].check("flag --tokens", values.tokens)
    Range(0, values.tokens, above=True).check("flag --sampled", values.sampled)
    return values, rest


if __name__ == "__main__":
    sys.exit(main(sys.argv))
