"""Does a config fit on a slice, which changes make it fit, and a step's least seconds there."""

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from ssp_jax.assembly import sections
from ssp_jax.config.keys import flatten_config
from ssp_jax.errors import InputError, printable
from ssp_jax.model import decoder, hf_load, presets, sharding
from ssp_jax.model.decoder import ModelConfig
from ssp_jax.plan import compile, hardware, memory, roofline, this_machine
from ssp_jax.plan.hardware import GIB, Slice
from ssp_jax.plan.memory import Target
from ssp_jax.plan.roofline import Work
from ssp_jax.runtime import platform

_NO_SCALE = dict.fromkeys(memory.PHASES, 1.0)

# A change of these makes room by giving up slots.
_GIVE_UP_SLOTS = {"engine.slots", "engine.kv_cache_gib"}


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
    def scale(self) -> dict[str, float]:
        """By phase, what the compiler reports of temporaries over their estimate."""
        if not self.programs:
            return _NO_SCALE
        estimate = memory.temporaries(self.target, self.persistent["parameters"])
        return {phase: self.temporaries[phase] / size for phase, size in estimate.items()}

    @property
    def fits(self) -> bool:
        has_room = max(self.peaks.values()) <= self.slice.device.usable
        return has_room and all(program.fits for program in self.programs)

    @property
    def cache_budget(self) -> float:
        """Bytes that the fullest phase of play leaves to the key/value cache."""
        room = _cache_room(self.peaks, self.slice.device.usable)
        return room + self.persistent["key/value cache"]


def make_target(config: ConfigDict, model: ModelConfig, slice_: Slice, *, compiled: bool) -> Target:
    """The config on the slice; compiled: on devices of its compiler, else on an abstract mesh."""
    model = dataclasses.replace(model, lora=sections.make_lora(config))
    host = None
    if compiled:
        mesh: Any = sharding.make_mesh(config.mesh.to_dict(), compile.make_devices(slice_))
        # The programs of one host are compiled for a slice of one host: the TPU compiler takes four
        # chips of a large slice for a small one, and then fails on their numbers.
        if slice_.hosts > 1:
            host = compile.make_devices(hardware.one_host(slice_))
    else:
        mesh = sharding.abstract_mesh(config.mesh.to_dict(), slice_.devices)
    return Target(
        config,
        model,
        mesh,
        # A CPU gives keys and values what all slots can need.
        hbm=None if slice_.platform == hardware.CPU else slice_.device.hbm,
        per_host=slice_.per_host,
        host=host,
        platform=slice_.platform,
        gpu=slice_.chip.gpu.capability if slice_.chip.gpu else None,
    )


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
    usable = slice_.device.usable
    target = memory.with_cache_room(target, persistent, temporaries, usable)
    persistent = memory.persistent_bytes(target)
    return Plan(target, slice_, persistent, temporaries, roofline.work(target, load), programs)


def _cache_room(peaks: Mapping[str, float], usable: float) -> float:
    """Bytes by which the cache may grow; negative: by which it must shrink."""
    return usable - max(peaks[phase] for phase in memory.CACHED if phase in peaks)


def _longest_slots(target: Target, cache_budget: float) -> int:
    """Longest episodes that a cache of so many bytes a device holds."""
    per_shard = max(int(cache_budget // memory.longest_episode(target)), 0)
    return per_shard * target.row_shards


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


def _half(number: int, shards: int) -> int:
    """Half of it, 0 where that does not divide over the shards."""
    half = number // 2
    return half if half % shards == 0 else 0


def candidate_changes(target: Target, cache_room: float) -> Iterator[tuple[str, Any]]:
    """Changes of one key that need less memory.

    Each keeps the config valid and its learning the same.

    cache_room: bytes a device by which the key/value cache may grow, or, negative, must shrink.
    """
    config = target.config
    c = config.learner
    e = config.engine
    if half := _half(c.rows, target.row_shards):
        yield "learner.rows", half
    if target.extend_rows > 1:
        yield "engine.extend_rows", e.extend_rows // 2
    if len(e.extend_buckets) > 1:
        yield "engine.extend_buckets", tuple(sorted(e.extend_buckets)[:-1])
    if c.logprob_chunk > 128 and c.logprob_chunk % 2 == 0:
        yield "learner.logprob_chunk", c.logprob_chunk // 2
    if half := _half(e.slots, target.row_shards):
        yield "engine.slots", half
    cache_bytes = memory.persistent_bytes(target)["key/value cache"] + cache_room
    cache_gib = math.floor(cache_bytes / GIB * 100) / 100
    if cache_room < 0 and cache_gib * GIB >= memory.longest_episode(target):
        yield "engine.kv_cache_gib", cache_gib
    if sharding.tensor_divides(target.model.num_kv_heads, config.mesh.tensor * 2):
        yield "mesh.tensor", config.mesh.tensor * 2
    savers = _savers(target)
    present = flatten_config(config)
    yield from [(key, value) for key, value in savers.items() if present[key] != value]


def _savers(target: Target) -> dict[str, Any]:
    """Values that cost time and save memory."""
    c = target.config.learner
    savers: dict[str, Any] = {"model.remat": "full"}
    has_own_memory = target.hbm is not None  # beside the host's
    if has_own_memory:
        savers["learner.offload_moments"] = True
    if target.search is not None and target.search.rows:
        savers["retriever.device_dtype"] = "int8"
    if c.kl_coef and has_own_memory:
        savers["learner.offload_reference"] = True
    return savers


@dataclasses.dataclass(frozen=True)
class _Estimate:
    """A config on a slice, from shapes, with temporaries times a scale."""

    target: Target
    usable: float  # bytes of a device
    persistent: dict[str, float]
    temporaries: dict[str, float]

    @property
    def peaks(self) -> dict[str, float]:
        return memory.peaks(self.target, self.persistent, self.temporaries)

    @property
    def excess(self) -> float:
        """Bytes over all phases by which it does not fit, with all that the cache would take."""
        return sum(max(peak - self.usable, 0.0) for peak in self.peaks.values())

    @property
    def cache_room(self) -> float:
        return _cache_room(self.peaks, self.usable)

    @property
    def longest_slots(self) -> int:
        budget = self.persistent["key/value cache"] + self.cache_room
        return _longest_slots(self.target, budget)

    @property
    def shortfall(self) -> float:
        """Bytes over all phases by which it does not fit, with the least that the cache may take.

        A cache that the config sizes takes what it says, and on a CPU it takes all.
        """
        given_up = 0.0
        shrinks = self.target.hbm is not None and not self.target.config.engine.kv_cache_gib
        if shrinks:
            given_up = self.persistent["key/value cache"] - memory.longest_episode(self.target)
        total = 0.0
        for phase, peak in self.peaks.items():
            needed = peak - given_up if phase in memory.CACHED else peak
            total += max(needed - self.usable, 0.0)
        return total


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
    return _Estimate(target, slice_.device.usable, persistent, scaled)


@dataclasses.dataclass(frozen=True)
class _Search:
    """A search for changes that fit on a slice."""

    config: ConfigDict
    model: ModelConfig
    slice: Slice
    scale: Mapping[str, float]  # see changes_that_fit()

    def estimate(self, values: Mapping[str, Any]) -> _Estimate | None:
        changed = with_values(self.config, values)
        return _estimate(changed, self.model, self.slice, self.scale)

    def candidates(self, values: Mapping[str, Any]) -> list[tuple[str, Any]]:
        """Changes that may come after these."""
        before = self.estimate(values)
        return [] if before is None else list(candidate_changes(before.target, before.cache_room))

    def with_one(self, key: str) -> dict[str, Any]:
        """The key's change as often as it helps, nothing where it does not fit all the same."""
        chosen: dict[str, Any] = {}
        present = self.estimate(chosen)
        while present is not None and present.excess > 0:
            values = {k: value for k, value in self.candidates(chosen) if k == key}
            after = self.estimate(values) if values else None
            if after is None or after.excess >= present.excess:
                break
            present, chosen = after, values
        return chosen if present is not None and present.shortfall == 0 else {}

    def with_several(self, left_out: Set[str] = frozenset()) -> dict[str, Any]:
        """Changes of keys, always the one that helps most; nothing where it never fits."""
        chosen: dict[str, Any] = {}
        present = self.estimate(chosen)
        while present is not None and present.shortfall > 0:
            changes = [pair for pair in self.candidates(chosen) if pair[0] not in left_out]
            tried = [chosen | dict([pair]) for pair in changes]
            found = [(self.estimate(values), values) for values in tried]
            better = [(after.shortfall, i) for i, (after, _) in enumerate(found) if after]
            least, i = min(better, default=(math.inf, 0))
            if least >= present.shortfall:
                return {}
            present, chosen = found[i]
        return chosen


def changes_that_fit(
    config: ConfigDict, model: ModelConfig, slice_: Slice, scale: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Changes that are enough: of one key each, or of several where none is.

    Of several, too, where those of one key give up slots that the others keep. scale: by phase,
    what the compiler reports of temporaries over their estimate.
    """
    search = _Search(config, model, slice_, scale)
    keys = [key for key, _ in search.candidates({})]
    found = [values for key in keys if (values := search.with_one(key))]
    if all(values.keys() <= _GIVE_UP_SLOTS for values in found):
        found.insert(0, search.with_several(left_out=_GIVE_UP_SLOTS))
    if not any(found):
        found = [search.with_several()]
    return [values for values in found if values]


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
    if estimate.excess == 0 or (change and estimate.shortfall == 0):
        return values
    found = _Search(changed, model, slice_, _NO_SCALE).with_several() if change else {}
    return values | found if found else None


def smallest(
    config: ConfigDict, model: ModelConfig, slices: list[Slice]
) -> tuple[Slice, dict[str, Any]] | None:
    """The first slice that fits, and the values that the config needs there.

    Keys other than rows and slots change only where no slice fits without.
    """
    for slice_ in slices:
        values = _fitting(config, model, slice_, change=False)
        if values is not None:
            return slice_, values
    # Where the largest slice is too small the others need no search.
    if not slices or _fitting(config, model, slices[-1], change=True) is None:
        return None
    for slice_ in slices:
        values = _fitting(config, model, slice_, change=True)
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
        "search index": _search_note(target),
    }


def _search_note(target: Target) -> str:
    search = target.search
    if search is None:
        return ""
    return (
        f"{search.rows:,} of {search.passages:,} vectors of {search.encoder.embed_dim} x "
        f"{search.dtype}, and the encoder"
    )


def _memory_lines(plan: Plan) -> Iterator[str]:
    target = plan.target
    device = plan.slice.device
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
        verdict = "" if peak <= device.usable else "   does not fit"
        yield f"  {phase:<10}{sizes}{peak / device.hbm:9.0%}{verdict}"

    layout = memory.cache_layout(target)
    slots, *later = [target.hosts * n for n in layout.rows]
    line = f"key/value cache: {slots} slots (config: {target.config.engine.slots})"
    for n, start in zip(later, layout.starts[1:], strict=True):
        line += f", {n} beyond {start} tokens"
    yield line
    longest = _longest_slots(target, plan.cache_budget)
    yield (
        f"  {plan.cache_budget / GIB:.2f} GiB per device are free for it: "
        f"{longest} slots of {target.sizes.cache_tokens} tokens each"
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
    yield from _flops_lines(plan)
    yield from _cycle_lines(plan, load)


def _cycle_lines(plan: Plan, load: roofline.Workload) -> Iterator[str]:
    """What a TPU's compiler expects of the step, beside the lower bound."""
    if not (plan.programs and plan.slice.is_tpu):
        return
    clock = plan.slice.device.clock
    yield (
        f"the compiler's own estimates at {clock} GHz, which nobody has run: operations one after "
        "the other, no Pallas kernels (attention of the update)"
    )
    yield f"  {'':<30}{'ms a call':>12}{'calls':>10}{'seconds':>10}"
    calls = roofline.calls(plan.target, load)
    total = 0.0
    for program in plan.programs:
        if program.phase in calls:
            number = calls[program.phase]
            seconds = program.cycles / (clock * 1e9)
            total += number * seconds
            times = f"{1e3 * seconds:12.4g}{number:10.4g}{number * seconds:10.3g}"
            yield f"  {program.name:<30}{times}"
    yield f"  {'total':<30}{total:32.3g}"


def _flops_lines(plan: Plan) -> Iterator[str]:
    """What the compiler counts, beside the table, which has our own counts.

    No bytes: libtpu counts those of a prefetch to VMEM twice.
    """
    for program in plan.programs:
        # Only these two: the others loop over layers, and the compiler counts a loop's body once.
        if program.flops is None or program.phase not in ("prefill", "decode"):
            continue
        note = ", its loop over tokens counted once" if program.phase == "decode" else ""
        yield (
            f"  the compiler counts for one {program.name}: {program.flops / 1e12:.3g} TFLOPs{note}"
        )
    if plan.programs and not plan.slice.is_tpu:
        yield "  TFLOPs and GB are counted from shapes: the compiler for GPUs reports none"


def _compiler_lines(plan: Plan) -> Iterator[str]:
    """Which compiler was asked, with which flags."""
    version = f"jax {jax.__version__}"
    if not plan.programs:
        yield "from shapes alone: no compiler was asked"
    elif plan.slice.is_tpu:
        yield f"compiled by libtpu for this slice; {version}"
    else:
        options = compile.compile_options(plan.target.platform)
        flags = " ".join(f"--{name}={value}".lower() for name, value in options.items())
        yield f"compiled by XLA for this GPU, without its search for the fastest kernels; {version}"
        yield f"  with the flags of a run: {flags}"
    gpu = plan.slice.chip.gpu
    if gpu and not gpu.has_bfloat16 and plan.target.dtype == jnp.bfloat16:
        yield (
            "this GPU does not multiply bfloat16: XLA computes in float32, at the rate of its "
            "ordinary units, with temporaries of twice the size"
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
    yield from _compiler_lines(plan)
    yield f"attention of the update: {plan.target.learner.attention}"
    yield f"attention of decoding: {plan.target.attend_by}"
    yield from _memory_lines(plan)
    yield from _time_lines(plan, load)
    if not plan.fits:
        yield "it does not fit; what would (estimates):"
        yield from _change_lines(plan)
    elif math.isinf(plan.target.cache_room):
        yield "it fits"
        yield from _remat_lines(plan)
    else:
        yield "it fits; keys and values get what the programs leave"
        yield from _room_lines(plan)
        yield from _remat_lines(plan)


def _remat_lines(plan: Plan) -> Iterator[str]:
    """The flag with which the update computes least a second time, where it has the room."""
    config = plan.target.config
    for remat in reversed(decoder.REMAT):
        if remat == config.model.remat:
            return
        values = {"model.remat": remat}
        changed = with_values(config, values)
        after = _estimate(changed, plan.target.model, plan.slice, plan.scale)
        if after is not None and after.shortfall == 0:
            yield f"there is room to compute less twice (estimate): {_overrides(values)}"
            return


def _slots_after(plan: Plan, values: Mapping[str, Any]) -> int:
    """Longest episodes that fit at the same time with these values, estimated."""
    changed = with_values(plan.target.config, values)
    after = _estimate(changed, plan.target.model, plan.slice, plan.scale)
    return after.longest_slots if after else 0


def _change_line(plan: Plan, values: Mapping[str, Any]) -> str:
    tokens = plan.target.sizes.cache_tokens
    return f"  {_overrides(values)}   ({_slots_after(plan, values)} slots of {tokens} tokens)"


def _room_lines(plan: Plan) -> Iterator[str]:
    """Flags that leave more room to keys and values."""
    target = plan.target
    present = _slots_after(plan, {})
    changes = changes_that_fit(target.config, target.model, plan.slice, plan.scale)
    more = [values for values in changes if _slots_after(plan, values) > present]
    if more:
        yield "more of them with (estimates):"
    for values in more:
        yield _change_line(plan, values)


def _change_lines(plan: Plan) -> Iterator[str]:
    """Flags with which it would fit: changed keys on the same slice, or a larger slice."""
    config = plan.target.config
    model = plan.target.model
    scale = plan.scale
    changes = changes_that_fit(config, model, plan.slice, scale)
    for values in changes:
        yield _change_line(plan, values)
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
        f"{config.model.path}: the smallest slice of each TPU generation and number of each GPU "
        "that fits, from shapes alone"
    )
    for kind in (*hardware.TPUS, *hardware.GPUS):
        slices = hardware.slices_of(kind)
        if found := smallest(config, model, slices):
            slice_, values = found
            yield f"  {slice_.name:<14}{slice_.chips:4} chips  {_overrides(values)}".rstrip()
        else:
            yield f"  {kind:<14}none up to {slices[-1].chips} chips with this mesh, rows and slots"


def show(
    config: ConfigDict, topology: str | None, *, shapes: bool, tokens: int, sampled: int
) -> int:
    """Prints the plan of a config; 1 where it does not fit on the slice, else 0.

    topology: None for the smallest slices that fit. shapes: ask no compiler. tokens: of a mean
    episode, of which `sampled` are written by the model. Raises InputError.
    """
    jax.config.update("jax_platforms", "cpu")  # the machine that plans is not the one that runs
    model = read_model(config.model.path)
    if topology is None:
        print(*map(printable, smallest_slices(config, model)), sep="\n")
        return 0
    slice_ = hardware.parse_topology(topology)
    compiled = not shapes and _has_compiler(slice_)
    load = roofline.workload(config, tokens, sampled)
    plan = make_plan(config, model, slice_, load, compiled=compiled)
    print(*map(printable, report(plan, load)), sep="\n")
    return 0 if plan.fits else 1


def keys_for_this_machine(
    config: ConfigDict, model: ModelConfig, slice_: Slice
) -> dict[str, Any] | None:
    """Values with which a config fits on this machine, with an adapter if need be; None: none."""
    first = this_machine.first_values(config, slice_)
    adapter = {} if config.lora.rank else _ADAPTER
    for more in ({}, adapter):
        values = first | {key: change(config) for key, change in more.items()}
        found = _fitting(with_values(config, values), model, slice_, change=True)
        if found is not None:
            return values | found
    return None


# Ten times the learning rate of full fine-tuning: docs/lora.md.
_ADAPTER: dict[str, Callable[[ConfigDict], Any]] = {
    "lora.rank": lambda config: 32,
    "learner.learning_rate": lambda config: float(f"{10 * config.learner.learning_rate:.6g}"),
}


def show_this_machine(config: ConfigDict) -> int:
    """Prints keys with which a config fits on this machine; 1 where there are none, else 0."""
    model = read_model(config.model.path)
    slice_ = this_machine.this_slice()
    values = keys_for_this_machine(config, model, slice_)
    print(printable(f"{config.model.path} on this machine: {this_machine.describe(slice_)}"))
    if values is None:
        print(
            "it does not fit, with an adapter neither: shorten limits.* and learner.row_tokens, or "
            "take a smaller model"
        )
        return 1
    found = _estimate(with_values(config, values), model, slice_, _NO_SCALE)
    assert found is not None
    playing = max(peak for phase, peak in found.peaks.items() if phase in memory.PLAY)
    updating = max(peak for phase, peak in found.peaks.items() if phase in memory.UPDATE)
    sizes = [min(peak, found.usable) / GIB for peak in (playing, updating)]
    print(f"it fits, from shapes: {sizes[0]:.1f} GiB playing, {sizes[1]:.1f} updating; with")
    print(f"  {_overrides(values) or 'no other keys'}")
    return 0


def _has_compiler(slice_: Slice) -> bool:
    """Whether the compiler for the slice is installed; where not, says how to get it."""
    if slice_.is_tpu:
        name, extra, installed = "libtpu", "plan", platform.tpu_installed()
    else:
        name, extra = "JAX's CUDA plugin", "plan-gpu"
        installed = platform.gpu_compiler_installed()
    if not installed:
        _log(f"{name} is not installed (pip install '.[{extra}]'): estimates from shapes alone")
    return installed
