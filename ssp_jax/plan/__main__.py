"""Does a config fit on hardware that you don't have, and how long must a step take there at least?

    python -m ssp_jax.plan --config=configs/qwen7b.py --topology=v5p:2x2x2 [--config.KEY=VALUE ...]

--topology   v5e:4x4, v6e:4x4, v5p:2x2x2, tpu7x:2x2x1, gpu:h100x8, ...; without it: the smallest
             slice of each TPU generation that fits, from shapes alone
--shapes     no compiler: estimates from shapes alone, in a second
--tokens     tokens of a mean episode (3000), of which the model writes --sampled (1000)

For a TPU the run's programs are compiled ahead of time by the TPU's own compiler, on any CPU (pip
install '.[plan]'), which reports the memory that they need. For a GPU there is no such compiler,
and temporaries are estimates.
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

from ssp_jax import assemble
from ssp_jax.config import BOUNDS, Range, check_numbers, flatten_config, parse_command_line
from ssp_jax.errors import InputError, printable
from ssp_jax.model import hf_load, presets, sharding
from ssp_jax.model.decoder import ModelConfig
from ssp_jax.plan import compile, hardware, memory, roofline
from ssp_jax.plan.hardware import GIB, Slice
from ssp_jax.plan.memory import Target
from ssp_jax.plan.roofline import Work
from ssp_jax.runtime import platform
from ssp_jax.runtime.command import parse_known_flags, run_command

_NO_SCALE = dict.fromkeys(memory.PHASES, 1.0)

_Attempt = tuple[float, dict[str, Any]]  # bytes by which it does not fit, and changed values


@dataclasses.dataclass(frozen=True)
class Plan:
    """Bytes and work per device."""

    target: Target
    slice: Slice
    persistent: dict[str, float]  # bytes by kind of array, memory.persistent_bytes()
    temporaries: dict[str, float]  # bytes by phase
    work: dict[str, Work]  # by phase
    programs: list[compile.Program]  # none: from shapes alone

    @property
    def peaks(self) -> dict[str, float]:
        """Bytes by phase."""
        return memory.peaks(self.target, self.persistent, self.temporaries)

    @property
    def play_peak(self) -> float:
        return max(peak for phase, peak in self.peaks.items() if phase in memory.PLAY)

    @property
    def update_peak(self) -> float:
        return max(peak for phase, peak in self.peaks.items() if phase in memory.UPDATE)

    @property
    def fits(self) -> bool:
        has_room = max(self.peaks.values()) <= self.slice.device.hbm
        return has_room and all(program.fits for program in self.programs)

    @property
    def cache_budget(self) -> float:
        """Bytes that the fullest phase of play leaves to the key/value cache."""
        return _cache_room(self.peaks, self.slice.device.hbm) + self.persistent["key/value cache"]


def make_target(config: ConfigDict, model: ModelConfig, slice_: Slice, *, compiled: bool) -> Target:
    """The config on the slice; compiled: on devices of its compiler, else on an abstract mesh."""
    model = dataclasses.replace(model, lora=assemble.make_lora(config))
    host = None
    if compiled:
        mesh: Any = sharding.make_mesh(config.mesh.to_dict(), compile.make_devices(slice_))
        # The programs of one host are compiled for a slice of one host: the compiler takes four
        # chips of a large slice for a small one, and then fails on their numbers.
        if slice_.hosts > 1:
            one_host = hardware.slices_of(slice_.kind)[0]
            host = compile.make_devices(one_host)
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
    """The plan of a config on a slice; compiled: with temporaries from the slice's compiler."""
    target = make_target(config, model, slice_, compiled=compiled)
    persistent = memory.persistent_bytes(target)
    temporaries = memory.temporaries(target, persistent["parameters"])
    programs = compile.compile_all(target, _log) if compiled else []
    for phase in {program.phase for program in programs}:
        sizes = [program.temporaries for program in programs if program.phase == phase]
        temporaries[phase] = max(sizes)
    return Plan(target, slice_, persistent, temporaries, roofline.work(target, load), programs)


def _cache_room(peaks: Mapping[str, float], hbm: float) -> float:
    """Bytes by which the cache may grow; negative: by which it must shrink."""
    return hbm - max(peaks[phase] for phase in memory.CACHED)


def _log(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def read_model(path: str) -> ModelConfig:
    """The shape of the model of a folder, or of a published one by its name."""
    if (Path(path) / "config.json").is_file():
        return hf_load.read_config(path)
    return presets.architecture(path)


# --- changes that make it fit ---------------------------------------------------------------------


def with_values(config: ConfigDict, values: Mapping[str, Any]) -> ConfigDict:
    """A copy of the config with these values, by key."""
    changed = copy.deepcopy(config)
    with changed.unlocked():
        changed.update_from_flattened_dict(dict(values))
    return changed


def candidate_changes(target: Target, cache_room: float) -> Iterator[tuple[str, Any]]:
    """Changes of one key that need less memory.

    Each keeps the config valid and its learning the same.

    cache_room: bytes a device by which the key/value cache may grow, or, negative, must shrink.
    """
    config = target.config
    c = config.learner
    e = config.engine
    for key, number in (("learner.rows", c.rows), ("engine.slots", e.slots)):
        half = number // 2
        if half >= target.row_shards and half % target.row_shards == 0:
            yield key, half
    cache_bytes = memory.persistent_bytes(target)["key/value cache"] + cache_room
    cache_gib = math.floor(cache_bytes / GIB * 100) / 100
    if cache_room < 0 and cache_gib * GIB >= memory.longest_episode(target):
        yield "engine.kv_cache_gib", cache_gib
    if target.extend_rows > 1:
        yield "engine.extend_rows", e.extend_rows // 2
    if len(e.extend_buckets) > 1:
        yield "engine.extend_buckets", tuple(sorted(e.extend_buckets)[:-1])
    if c.logprob_chunk > 128 and c.logprob_chunk % 2 == 0:
        yield "learner.logprob_chunk", c.logprob_chunk // 2
    if sharding.tensor_divides(target.model.num_kv_heads, config.mesh.tensor * 2):
        yield "mesh.tensor", config.mesh.tensor * 2
    savers: dict[str, Any] = {"model.remat": "full", "learner.offload_moments": True}
    if c.kl_coef:
        savers["learner.offload_reference"] = True
    present = flatten_config(config)
    yield from [(key, value) for key, value in savers.items() if present[key] != value]


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
    """None where the config cannot run on the slice. scale: by phase."""
    try:
        target = make_target(config, model, slice_, compiled=False)
        persistent = memory.persistent_bytes(target)
    except InputError:
        return None
    temporaries = memory.temporaries(target, persistent["parameters"])
    scaled = {phase: size * scale.get(phase, 1.0) for phase, size in temporaries.items()}
    return _Estimate(target, memory.peaks(target, persistent, scaled), slice_.device.hbm)


def changes_that_fit(
    config: ConfigDict, model: ModelConfig, slice_: Slice, scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """All single changes that are enough, or one set of changes that are together, best first.

    scale: by phase, what the compiler reports of temporaries over their estimate.
    """

    def attempts(values: dict[str, Any]) -> list[_Attempt]:
        """`values` and one more change each."""
        base = with_values(config, values)
        before = _estimate(base, model, slice_, scale)
        if before is None:
            return []
        found = []
        for key, value in candidate_changes(before.target, _cache_room(before.peaks, before.hbm)):
            after = _estimate(with_values(base, {key: value}), model, slice_, scale)
            if after is not None:
                found.append((after.excess, values | {key: value}))
        return found

    def best_of(found: list[_Attempt]) -> _Attempt | None:
        return min(found, key=lambda attempt: attempt[0], default=None)

    single = attempts({})
    if enough := [values for excess, values in single if excess == 0]:
        return enough
    # Greedy: the best change so far, and the best one after it, while that helps.
    best = best_of(single)
    while best is not None and best[0] > 0:
        further = best_of(attempts(best[1]))
        best = further if further is not None and further[0] < best[0] else None
    return [best[1]] if best is not None else []


def _fitting(
    config: ConfigDict, model: ModelConfig, slice_: Slice, change: bool
) -> dict[str, Any] | None:
    """Values with which this config fits on the slice, None where there are none.

    Rows and slots are raised to the mesh's next multiple; other keys change only if `change`.
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
    """The first slice that fits, and the values that the config needs there.

    Keys other than rows and slots change only where no slice fits without.
    """
    for change in (False, True):
        for slice_ in slices:
            values = _fitting(config, model, slice_, change)
            if values is not None:
                return slice_, values
    return None


# --- the report -----------------------------------------------------------------------------------


def _overrides(values: Mapping[str, Any]) -> str:
    """The values as flags of the command line."""
    return " ".join(f"--config.{key}={value}".replace(" ", "") for key, value in values.items())


def _notes(target: Target) -> dict[str, str]:
    """A few words on each kind of persistent array."""
    c = target.config.learner
    on_host = ", in host memory but for the "
    lora = target.model.lora
    optimizer = "Adam's moments"
    if c.offload_moments:
        optimizer += f"{on_host}optimizer step"
    reference = "kl_coef is 0"
    if c.kl_coef:
        reference = f"{target.dtype}" if lora is None else f"the initial adapter, {target.dtype}"
        if c.offload_reference:
            reference += f"{on_host}scores"
    return {
        "parameters": "float32" if lora is None else f"an adapter of rank {lora.rank}, float32",
        "optimizer": optimizer,
        "reference": reference,
        "sampler copy": f"{target.dtype}, while playing",
        "frozen base": f"{target.dtype}, while updating; while playing, in the sampler copy",
        "key/value cache": "while playing",
        "gradients": "float32, while updating",
    }


def _memory_lines(plan: Plan) -> Iterator[str]:
    target = plan.target
    hbm = plan.slice.device.hbm
    notes = _notes(target)
    yield "kept, GiB per device"
    for name, size in plan.persistent.items():
        yield f"  {name:<18}{size / GIB:8.2f}   {notes[name]}"

    source = "estimated from shapes alone"
    if plan.programs:
        source = "from the compiler, padding and code included"
    yield f"phases, GiB per device; temporaries {source}"
    yield f"  {'':<10}{'kept':>10}{'temporaries':>14}{'peak':>9}{'of HBM':>9}"
    for phase, peak in plan.peaks.items():
        temporary = plan.temporaries[phase]
        sizes = f"{(peak - temporary) / GIB:10.2f}{temporary / GIB:14.2f}{peak / GIB:9.2f}"
        verdict = "" if peak <= hbm else "   does not fit"
        yield f"  {phase:<10}{sizes}{peak / hbm:9.0%}{verdict}"

    layout = memory.cache_layout(target)
    slots, *later = [target.hosts * n for n in layout.rows]
    line = f"key/value cache: {slots} slots (config: {target.config.engine.slots})"
    for n, start in zip(later, layout.starts[1:], strict=True):
        line += f", {n} beyond {start} tokens"
    yield line
    per_device = max(int(plan.cache_budget // memory.longest_episode(target)), 0)
    yield (
        f"  {plan.cache_budget / GIB:.2f} GiB per device are free for it: "
        f"{per_device * target.row_shards} slots of {target.sizes.cache_tokens} tokens each"
    )


def _time_lines(plan: Plan, load: roofline.Workload) -> Iterator[str]:
    chip = plan.slice.device
    yield (
        f"one step, lower bound: {load.played} episodes played ({load.trained} trained) "
        f"of {load.tokens} tokens, {load.sampled} of them sampled;"
    )
    yield (
        f"  {chip.flops / 1e12:.0f} TFLOP/s, {chip.bandwidth / 1e9:.0f} GB/s of HBM "
        f"and {chip.link / 1e9:.0f} GB/s of links per device at their peaks; "
        "all slots always busy; searches, scheduling and the judge take no time"
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
        # Only these two: the others loop over layers, and the compiler counts a loop's body once.
        if not program.fits or program.phase not in ("prefill", "decode"):
            continue
        note = ", its loop over tokens counted once" if program.phase == "decode" else ""
        yield (
            f"  the compiler counts for one {program.name}: {program.flops / 1e12:.3g} TFLOPs "
            f"and {program.hbm / 1e9:.3g} GB{note}"
        )


def report(plan: Plan, load: roofline.Workload) -> Iterator[str]:
    """The lines that the command prints for one slice."""
    slice_ = plan.slice
    hosts = f"{slice_.hosts} host{'s' * (slice_.hosts > 1)}"
    per_chip = f" ({slice_.chip.devices} devices each)" if slice_.chip.devices > 1 else ""
    mesh = " x ".join(f"{axis} {size}" for axis, size in plan.target.mesh.shape.items())
    yield (
        f"{plan.target.config.model.path} on {slice_.name}: {slice_.chips} chips{per_chip}, "
        f"{hosts}, {slice_.device.hbm / GIB:.1f} GiB per device; mesh {mesh}"
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
    yield from _change_lines(plan)


def _change_lines(plan: Plan) -> Iterator[str]:
    """Flags with which it would fit: changed keys on the same slice, or a larger slice."""
    config = plan.target.config
    model = plan.target.model
    scale = _NO_SCALE
    if plan.programs:
        estimate = memory.temporaries(plan.target, plan.persistent["parameters"])
        scale = {phase: plan.temporaries[phase] / size for phase, size in estimate.items()}
    changes = changes_that_fit(config, model, plan.slice, scale)
    for values in changes:
        yield f"  {_overrides(values)}"
    slices = hardware.slices_of(plan.slice.kind)
    found = smallest(config, model, [s for s in slices if s.chips > plan.slice.chips])
    if found:
        slice_, values = found
        yield f"  --topology={slice_.name} {_overrides(values)}".rstrip()
    elif not changes:
        yield (
            "  no change of mesh, rows, slots or buckets alone: "
            "shorten limits.* and learner.row_tokens"
        )
    if not config.lora.rank:
        rank = {"lora.rank": 32}
        more = _fitting(with_values(config, rank), model, plan.slice, change=True)
        if more is not None:
            note = "trains an adapter, with a learning rate of its own: docs/lora.md"
            yield f"  {_overrides(rank | more)}  ({note})"


def smallest_slices(config: ConfigDict, model: ModelConfig) -> Iterator[str]:
    """The lines that the command prints without --topology."""
    yield (
        f"{config.model.path}: the smallest slice of each TPU generation that fits, "
        "from shapes alone"
    )
    for kind in hardware.TPUS:
        slices = hardware.slices_of(kind)
        if found := smallest(config, model, slices):
            slice_, values = found
            yield f"  {slice_.name:<14}{slice_.chips:4} chips  {_overrides(values)}".rstrip()
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
    if compiled and not platform.tpu_installed():
        _log("libtpu is not installed (pip install '.[plan]'): estimates from shapes alone")
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
