import dataclasses
import math
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from configs import default
from ssp_jax.assembly import sections
from ssp_jax.errors import InputError
from ssp_jax.model import decoder, presets, sharding, weights
from ssp_jax.plan import __main__ as command
from ssp_jax.plan import compile, hardware, memory, roofline, search
from ssp_jax.plan import planner as plan
from ssp_jax.plan.hardware import GIB
from ssp_jax.rollout import engine, kv_cache
from ssp_jax.runtime import platform
from tests.conftest import ROOT

SMALL = decoder.ModelConfig(1024, 2, 256, 4, 2, 64, 512, qkv_bias=True)
# Parameters of the published weights, from the hub's own count.
COUNTS = {
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-Coder-0.5B": 494_032_768,
    "SmolLM2-135M": 134_515_008,
    "Qwen3-0.6B": 596_049_920,
    "Qwen3-8B": 8_190_735_360,
    "Llama-3.2-1B": 1_235_814_400,
    "Llama-3.1-8B": 8_030_261_248,
}


def config(**values: Any) -> ConfigDict:
    return plan.with_values(
        default.get_config(), {key.replace("__", "."): value for key, value in values.items()}
    )


def target(model_config: decoder.ModelConfig, devices: int = 8, **values: Any) -> memory.Target:
    c = config(**values)
    return memory.Target(
        c,
        model_config,
        sharding.abstract_mesh(c.mesh.to_dict(), devices),
    )


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_published_shapes_have_the_published_number_of_parameters(name: str, count: int) -> None:
    shapes = jax.tree.leaves(
        decoder.abstract_params(presets.architecture(f"someone/{name}-Instruct"))
    )
    assert sum(math.prod(x.shape) for x in shapes) == count


def test_a_model_folder_is_read_and_an_unknown_name_is_told() -> None:
    assert plan.read_model(str(ROOT / "assets" / "tiny" / "model")).num_layers > 0
    assert plan.read_model("Qwen/Qwen2.5-7B-Instruct").mlp_dim == 18944
    assert plan.read_model("somebody/Search_qwen2.5-7b_grpo") == plan.read_model("Qwen/Qwen2.5-7B")
    with pytest.raises(InputError, match="model.path is 'Qwen/Qwen9'.*one of .*Qwen2.5-7B"):
        plan.read_model("Qwen/Qwen9")


@pytest.mark.parametrize(
    ("text", "chips", "devices", "hosts"),
    [
        ("v5p:2x2x2", 8, 8, 2),
        ("v6e:4x4", 16, 16, 4),
        ("tpu7x:2x2x1", 4, 8, 1),
        ("v6e:2x4", 8, 8, 2),  # hosts of four chips, as GKE has them too
        ("v6e-8", 8, 8, 1),
        ("v5e-1", 1, 1, 1),
        ("v5e:1x1", 1, 1, 1),
        ("v6e-16", 16, 16, 4),
        ("v5p-16", 8, 8, 2),  # counts TensorCores
        ("gpu:h100x8", 8, 8, 1),
        ("gpu:h100x32", 32, 32, 4),
        ("gpu:a100-40x1", 1, 1, 1),
        ("gpu:4090x2", 2, 2, 1),
    ],
)
def test_topologies(text: str, chips: int, devices: int, hosts: int) -> None:
    slice_ = hardware.parse_topology(text)
    assert (slice_.chips, slice_.devices, slice_.hosts) == (chips, devices, hosts)
    assert slice_.device.hbm * slice_.devices == slice_.chip.hbm * slice_.chips


@pytest.mark.parametrize(
    "text",
    ["v9:2x2", "v5p:2x2", "v5p:2x2x0", "gpu:h100", "gpu:v5px8", "v5p", "gpu:h100x2x2"]
    + ["v5p-3", "v6e-2", "v6e-eight", "tpu7x-8", "gpu:h100x12"],
)
def test_a_wrong_topology_is_one_sentence(text: str) -> None:
    with pytest.raises(InputError, match=f"--topology={text}: expected"):
        hardware.parse_topology(text)


def test_an_a100_has_80_gb_where_nothing_else_is_said() -> None:
    whole, half = (hardware.parse_topology(f"gpu:{name}x1") for name in ("a100", "a100-40"))
    assert hardware.parse_topology("gpu:a100-80x1").chip == whole.chip
    assert 0.49 < half.chip.hbm / whole.chip.hbm < 0.51


@pytest.mark.parametrize("kind", [*hardware.TPUS, *hardware.GPUS])
def test_slices_of_a_kind_grow_and_hosts_are_whole(kind: str) -> None:
    slices = hardware.slices_of(kind)
    assert [s.chips for s in slices] == sorted({s.chips for s in slices})
    assert all(s.chips <= s.chips_per_host or s.chips % s.chips_per_host == 0 for s in slices)
    assert {"v5e": 1, "v6e": 1, "v5p": 4, "tpu7x": 4}.get(kind, 1) == slices[0].chips
    for slice_ in slices:
        assert slice_ == hardware.parse_topology(slice_.name)
        if slice_.hosts > 1:
            assert hardware.one_host(slice_).chips == slice_.chips_per_host


def test_what_is_kept_is_what_a_run_allocates() -> None:
    """Bytes on one device of the real arrays, on the 8 fake devices of the tests."""
    c = config(engine__cache_tokens=64, engine__slots=8, mesh__tensor=2, model__path="x")
    s = memory.Target(c, SMALL, sections.make_mesh(c))
    state = zeros(memory.train_state(s))
    kept = memory.persistent_bytes(s)
    assert kept["parameters"] == on_one_device(state.params) == kept["gradients"]
    assert kept["optimizer"] == on_one_device(state.opt_state) > 1.99 * kept["parameters"]
    # Two key/value heads over tensor=2, eight slots over fsdp=4; bfloat16; the small int columns
    # come on top.
    cache = 2 * SMALL.num_layers * (8 // 4) * (2 // 2) * 64 * SMALL.head_dim * 2
    assert cache < kept["key/value cache"] < 1.01 * cache
    assert kept["reference"] == kept["parameters"] / 2
    total = sum(math.prod(x.shape) for x in jax.tree.leaves(decoder.abstract_params(SMALL)))
    # whole over fsdp, most of it split over tensor
    assert total * 2 / 2 < kept["sampler copy"] < total * 2
    assert memory.persistent_bytes(target(SMALL, learner__kl_coef=0.0))["reference"] == 0


def on_one_device(tree: Any) -> int:
    """Bytes of these arrays on a device."""
    return sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(tree))


def zeros(tree: Any) -> Any:
    """Arrays of these shapes and shardings."""
    return jax.tree.map(
        lambda x: jax.device_put(jax.numpy.zeros(x.shape, x.dtype), x.sharding), tree
    )


@pytest.mark.ci
def test_with_lora_the_base_is_kept_once_in_two_layouts() -> None:
    c = config(mesh__tensor=2, lora__rank=4, engine__cache_tokens=64, engine__slots=8)
    model = dataclasses.replace(SMALL, lora=sections.make_lora(c))
    s = memory.Target(c, model, sections.make_mesh(c))
    state = zeros(memory.train_state(s))
    kept = memory.persistent_bytes(s)
    assert decoder.split_adapter(state.params)[0] == {}
    assert kept["parameters"] == kept["gradients"] == 2 * kept["reference"]
    assert kept["parameters"] == on_one_device(state.params)
    assert kept["optimizer"] == on_one_device(state.opt_state)

    base = weights.FrozenBase(SMALL, zeros(memory.frozen_base(s)), s.mesh)
    assert kept["frozen base"] == on_one_device(base.for_learner())
    adapter = sharding.sampler_copy(model, s.mesh, s.dtype)(state.params)
    assert kept["sampler copy"] == on_one_device(base.for_sampler()) + on_one_device(adapter)


def test_with_lora_a_phase_has_the_base_once() -> None:
    p = small_plan(GIB, learner__row_tokens=512, learner__rows=4, engine__slots=16, lora__rank=4)
    sizes = {name: 2.0**i for i, name in enumerate(p.persistent)}
    peaks = memory.peaks(p.target, sizes, dict.fromkeys(p.temporaries, 0.0))
    adapter = sizes["parameters"] + sizes["optimizer"] + sizes["reference"]
    updating = adapter + sizes["frozen base"]
    playing = adapter + sizes["sampler copy"]
    assert peaks == {
        "reshard": playing,
        "prefill": playing + sizes["key/value cache"],
        "decode": playing + sizes["key/value cache"],
        "scores": updating,
        "gradients": updating + sizes["gradients"],
        "optimizer": updating + sizes["gradients"],
    }
    # of a layer's kernels the widest, in bfloat16: a share on each of four devices, gathered there
    largest = SMALL.num_layers * SMALL.embed_dim * SMALL.mlp_dim * 2
    assert p.temporaries["reshard"] == largest / 4 + largest
    text = "\n".join(plan.report(p, roofline.workload(config(), 300, 100)))
    assert "an adapter of rank 4, float32" in text and "frozen base" in text


def test_the_7b_arithmetic_with_lora_by_hand() -> None:
    c = config(lora__rank=32, learner__rows=1, engine__slots=8)
    model = presets.ARCHITECTURES["Qwen2.5-7B"]
    slice_ = hardware.parse_topology("gpu:h100x1")
    s = plan.make_target(c, model, slice_, compiled=False)
    s = dataclasses.replace(s, hbm=None)  # of which full fine-tuning needs more
    kept = memory.persistent_bytes(s)
    # Inputs and outputs of q, k, v, o, gate, up and down, for each of 32 ranks and 28 layers.
    adapter = 32 * 28 * (7168 + 2 * 4096 + 7168 + 3 * 22528)
    assert (kept["parameters"], kept["reference"]) == (4 * adapter, 2 * adapter)
    assert kept["frozen base"] == 2 * COUNTS["Qwen2.5-7B"]
    assert kept["sampler copy"] == 2 * (COUNTS["Qwen2.5-7B"] + adapter)

    load = roofline.workload(c, 3000, 1000)
    full = dataclasses.replace(s, model=model)
    work, of_full = (roofline.work(target, load) for target in (s, full))
    # Forward, recomputed, of the reference, and gradients of activations: one of five is gone.
    saved = 2 * (COUNTS["Qwen2.5-7B"] - 152064 * 3584) * load.trained * 3000
    added = 10 * adapter * load.trained * 3000
    flops = of_full["update"].flops - saved + added
    assert work["update"].flops == pytest.approx(flops, rel=1e-4)
    assert 1.01 < work["prefill"].flops / of_full["prefill"].flops < 1.02
    assert work["decode"].hbm > of_full["decode"].hbm


def test_the_7b_arithmetic_by_hand() -> None:
    s = target(presets.ARCHITECTURES["Qwen2.5-7B"])
    kept = memory.persistent_bytes(s)
    assert kept["parameters"] * 8 == pytest.approx(4 * COUNTS["Qwen2.5-7B"], rel=0.01)
    assert kept["sampler copy"] == 2 * COUNTS["Qwen2.5-7B"]
    assert kept["key/value cache"] == pytest.approx(64 / 8 * 12288 * 28 * 2 * 4 * 128 * 2, rel=1e-3)
    load = roofline.workload(s.config, 3000, 1000)
    assert (load.played, load.trained) == (256 + 256 + 1280, 256 + 1280)
    work = roofline.work(s, load)
    # Forward, backward twice, once more for remat, the reference: 5 x 2 FLOPs a parameter and
    # token, and attention.
    weights_only = 10 * (COUNTS["Qwen2.5-7B"] - 152064 * 3584) * load.trained * 3000 / 8
    assert weights_only < work["update"].flops < 1.1 * weights_only
    assert work["decode"].hbm > 1792 * 1000 / 64 * 13e9


@pytest.mark.parametrize(
    ("tokens", "read"),
    [
        (900, 64 * 1024),
        # beyond 1,024 tokens are a ninth, a third and two thirds of the slots: 8, 22 and 43
        (1152, 64 * 1024 + 8 * 3072),
        (1536, 64 * 1024 + 32 * 3072),
        (3072, 64 * 4096),
        # beyond 4,096 a fifth, and all rows of the pieces before
        (5120, 64 * 4096 + 16 * 8192),
    ],
)
def test_a_step_reads_the_rows_of_the_deepest_piece_that_are_in_use(tokens: int, read: int) -> None:
    layout = kv_cache.full_layout((1024, 4096, 12288), 128, shards=2)
    assert roofline.tokens_read(layout, (0.125, 0.25, 0.5), tokens, 64) == read
    # Where there are fewer rows than slots would take, all of them.
    few = kv_cache.Layout(layout.ends, (128, 16, 4), shards=2)
    of_few = {900: 64 * 1024, 5120: 64 * 1024 + 8 * 3072 + 2 * 8192}
    assert roofline.tokens_read(few, (), tokens, 64) == of_few.get(tokens, 64 * 1024 + 8 * 3072)


def test_the_decode_bound_counts_the_shares_of_rows() -> None:
    model = presets.ARCHITECTURES["Qwen2.5-7B"]
    token = 28 * 2 * 4 * 128 * 2
    hbm = []
    for shares in ((), (0.5,)):
        s = target(model, engine__row_shares=shares)
        # up to 1,280 tokens: a fifth of the 8 slots of a device is beyond 1,024
        load = roofline.workload(s.config, 1280, 1000)
        hbm.append(roofline.work(s, load)["decode"].hbm)
    steps = 1792 * 1000 / 64
    assert hbm[0] - hbm[1] == steps * 4 * 3072 * token

    # The kernel for GPUs reads what is in use, on average half of an episode.
    s = dataclasses.replace(s, platform="gpu", gpu=(9, 0))
    in_use = roofline.work(s, load)["decode"].hbm
    assert hbm[1] - in_use == steps * (8 * (1024 - 640) + 4 * 3072) * token


def test_workload_follows_the_roles() -> None:
    both = roofline.workload(config(game__rl_pair="grpo_grpo", game__verify=False), 3000, 1000)
    assert both.played == both.trained == 256 * 5 + 256 * 5 * 5
    solver = roofline.workload(config(game__train="solver"), 10**6, 10**6)
    assert solver.trained == 1280 and solver.tokens == 4096 + 8192 and solver.sampled == 8192


def small_plan(hbm: float, **values: Any) -> plan.Plan:
    c = config(
        engine__cache_tokens=512,
        engine__extend_buckets=(64,),
        engine__cache_buckets=(256,),
        **values,
    )
    slice_ = hardware.parse_topology("v5p:2x2x1")
    slice_ = dataclasses.replace(slice_, chip=dataclasses.replace(slice_.chip, hbm=hbm))
    return plan.make_plan(c, SMALL, slice_, roofline.workload(c, 300, 100), compiled=False)


def test_the_cache_of_a_plan_is_the_one_that_the_engine_makes() -> None:
    """From the memory that is free once the sampler's copy is there, up to the longest episode in
    every slot.
    """
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 4, "engine__slots": 1024}
    whole = small_plan(GIB, **values)
    assert memory.cache_layout(whole.target).rows == (1024, 1024)
    present = sum(
        whole.persistent[name] for name in ("parameters", "optimizer", "reference", "sampler copy")
    )
    hbm = present + whole.persistent["key/value cache"]  # 0.8 of what is free is not enough
    p = small_plan(hbm, **values)
    expected = engine.cache_budget(p.target.sizes, int(hbm - present))
    layout = memory.cache_layout(p.target)
    assert layout.rows[0] > layout.rows[1] and expected is not None
    assert 0.99 * expected < p.persistent["key/value cache"] < 1.01 * expected
    assert (
        small_plan(hbm, **values, engine__kv_cache_gib=0.01).persistent["key/value cache"]
        < 0.0101 * GIB
    )
    # the least it can play with
    assert memory.cache_layout(small_plan(present / 2, **values).target).rows == (4, 4)


def test_what_the_cache_may_take_is_what_play_leaves() -> None:
    p = small_plan(GIB, learner__row_tokens=512, learner__rows=4, engine__slots=16)
    room = 0.95 * GIB - max(p.peaks["prefill"], p.peaks["decode"])
    assert p.fits and p.cache_budget == room + p.persistent["key/value cache"]
    # two layers, two heads of 64, keys and values, bfloat16
    slots = 4 * math.floor(p.cache_budget / (512 * 1024))
    assert f" {slots} slots of 512 tokens" in "\n".join(
        plan.report(p, roofline.workload(config(), 300, 100))
    )


def test_a_twentieth_of_the_memory_is_left_free() -> None:
    """For gaps between arrays and for workspaces of libraries, as the engine leaves it."""
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 4, "engine__slots": 16}
    need = max(small_plan(GIB, **values, engine__kv_cache_gib=0.01).peaks.values())
    for share, fits in ((0.94, True), (0.96, False)):
        assert small_plan(need / share, **values, engine__kv_cache_gib=0.01).fits is fits


def test_the_cache_gives_up_what_the_programs_need() -> None:
    """A prefill of few rows leaves more of it, which is said."""
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 4, "engine__slots": 1024}
    values |= {"model__attention": "xla", "engine__extend_rows": 256}
    roomy = small_plan(GIB, **values)
    hbm = max(roomy.peaks.values()) * 0.8
    p = small_plan(hbm, **values)
    engines = engine.cache_budget(p.target.sizes, int(hbm - p.peaks["reshard"]))
    assert engines is not None and p.fits
    assert p.persistent["key/value cache"] < engines
    text = list(plan.report(p, roofline.workload(p.target.config, 300, 100)))
    advice = [line for line in text if "--config.engine.extend_rows=" in line]
    assert "it fits; keys and values get what the programs leave" in text and advice
    # The same config with a cache of that size is not given less than it asks for.
    fixed_size = engines / GIB
    assert not small_plan(hbm, **values, engine__kv_cache_gib=fixed_size).fits


def test_play_and_update_do_not_keep_what_the_other_needs() -> None:
    """As train.py does it: the copy and the cache are gone before the update, and gradients before
    play.
    """
    p = small_plan(GIB, learner__row_tokens=512, learner__rows=4, engine__slots=16)
    sizes = {name: 2.0**i for i, name in enumerate(p.persistent)}
    peaks = memory.peaks(p.target, sizes, dict.fromkeys(p.temporaries, 0.0))
    always = sizes["parameters"] + sizes["optimizer"] + sizes["reference"]
    playing = always + sizes["sampler copy"]
    assert peaks == {
        "reshard": playing,
        "prefill": playing + sizes["key/value cache"],
        "decode": playing + sizes["key/value cache"],
        "scores": always,
        "gradients": always + sizes["gradients"],
        "optimizer": always + sizes["gradients"],
    }
    assert set(p.temporaries) == set(memory.PHASES) - {"search"}  # of vectors, which it lacks
    assert "scores" not in small_plan(GIB, learner__kl_coef=0.0, learner__rows=4).temporaries


def test_what_is_offloaded_is_there_only_where_it_is_used() -> None:
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 4}
    there, away = (
        small_plan(GIB, **values, learner__offload_moments=flag, learner__offload_reference=flag)
        for flag in (False, True)
    )
    saved = {phase: there.peaks[phase] - away.peaks[phase] for phase in there.peaks}
    moments, reference = there.persistent["optimizer"], there.persistent["reference"]
    assert saved.pop("scores") == moments and saved.pop("optimizer") == reference
    assert set(saved.values()) == {moments + reference}
    text = "\n".join(plan.report(away, roofline.workload(config(), 300, 100)))
    assert (
        "in host memory but for the optimizer step" in text
        and "in host memory but for the scores" in text
    )


def fixed(found: list[dict[str, Any]], key: str) -> Any:
    return next((values[key] for values in found if set(values) == {key}), None)


# Parameters of the published encoders without their pooler and token types, by hand.
@pytest.mark.parametrize(
    ("name", "count"), [("intfloat/e5-base-v2", 108_890_112), ("all-MiniLM-L6-v2", 22_564_608)]
)
def test_published_encoders_have_the_published_number_of_parameters(name: str, count: int) -> None:
    values = dict(retriever__kind="dense", retriever__encoder=name)
    found = target(SMALL, **values).search
    assert found is not None and found.parameters == count
    with pytest.raises(InputError, match="retriever.encoder is 'a/b'.*one of e5-small-v2, e5-base"):
        search.read_encoder("a/b")


def test_vectors_are_on_the_devices_in_all_phases() -> None:
    """21,015,324 rows on 8 devices are 41 chunks of 65,536 on each, and each has the encoder."""
    plain = memory.persistent_bytes(target(SMALL))
    dense = dict(retriever__kind="dense", retriever__encoder="e5-base-v2")
    for dtype, row in (("bfloat16", 2 * 768), ("int8", 768 + 4)):
        with_search = target(SMALL, retriever__device_dtype=dtype, **dense)
        persistent = memory.persistent_bytes(with_search)
        index = persistent.pop("search index")
        assert index == 41 * 65_536 * row + 4 * 108_890_112 and persistent == plain
        temporary = memory.temporaries(with_search, persistent["parameters"])
        peaks = memory.peaks(with_search, persistent | {"search index": index}, temporary)
        before = memory.peaks(target(SMALL), plain, temporary)
        assert peaks.keys() == set(memory.PHASES)
        assert all(peaks[phase] == before[phase] + index for phase in before)
    host = memory.persistent_bytes(target(SMALL, retriever__device_gib=0.0, **dense))
    assert host["search index"] == 4 * 108_890_112


def test_changes_make_it_fit() -> None:
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 64, "engine__slots": 16}
    need = small_plan(GIB, **values).peaks["gradients"]
    p = small_plan(need * 0.9, **values)
    text = "\n".join(plan.report(p, roofline.workload(p.target.config, 300, 100)))
    assert not p.fits and "does not fit" in text and "--config.learner.rows=32" in text
    assert small_plan(need * 0.9, **values | {"learner__rows": 32}).fits
    assert "it fits" in "\n".join(
        plan.report(small_plan(need * 1.1, **values), roofline.workload(config(), 300, 100))
    )


def test_a_plan_that_does_not_fit_names_lora_where_it_is_enough() -> None:
    """Last, for it is another training; a plan that has it already does not."""
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 4, "engine__slots": 16}
    p = small_plan(GIB, **values)
    states = p.persistent["optimizer"] + p.persistent["parameters"]
    load = roofline.workload(p.target.config, 300, 100)
    tight = small_plan(max(p.peaks.values()) - states / 2, **values)
    assert not tight.fits
    assert "--config.lora.rank=32" in list(plan.report(tight, load))[-1]
    assert "lora" not in "\n".join(plan.report(p, load))
    for hbm in (1e5, tight.slice.device.hbm):
        with_lora = small_plan(hbm, **values, lora__rank=32)
        assert "lora" not in "\n".join(plan.report(with_lora, load))


def test_the_remat_that_computes_least_is_offered_where_it_fits() -> None:
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 64, "engine__slots": 16}

    def offered(hbm: float, remat: str = "full") -> list[str]:
        p = small_plan(hbm, **values, model__remat=remat)
        lines = plan.report(p, roofline.workload(p.target.config, 300, 100))
        return [line.split("=")[-1] for line in lines if "compute less twice" in line]

    need = {
        remat: max(small_plan(GIB, **values, model__remat=remat).peaks.values()) / 0.94
        for remat in ("none", "dots", "attention", "full")
    }
    assert list(need.values()) == sorted(need.values(), reverse=True)
    assert [offered(size) for size in need.values()] == [["none"], ["dots"], ["attention"], []]
    assert offered(need["none"], "none") == offered(need["dots"], "dots") == []


def test_a_smaller_cache_or_offloading_is_offered_where_it_is_enough() -> None:
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 4, "engine__slots": 2048}
    values |= {"engine__extend_rows": 1, "engine__kv_cache_gib": 1.0}
    p = small_plan(GIB, **values)
    assert p.persistent["key/value cache"] > 0.2 * GIB
    tight = small_plan(max(p.peaks.values()) - 0.01 * GIB, **values)
    assert not tight.fits
    found = plan.changes_that_fit(
        tight.target.config, SMALL, tight.slice, dict.fromkeys(memory.PHASES, 1.0)
    )
    smaller = fixed(found, "engine.kv_cache_gib")
    assert (
        smaller
        and small_plan(tight.slice.device.hbm, **values | {"engine__kv_cache_gib": smaller}).fits
    )
    need = max(p.peaks.values()) - p.persistent["optimizer"] / 2
    tight = small_plan(need / 0.95, **values)
    found = plan.changes_that_fit(
        tight.target.config, SMALL, tight.slice, dict.fromkeys(memory.PHASES, 1.0)
    )
    assert fixed(found, "learner.offload_moments") is True


def test_a_change_is_made_as_often_as_it_helps() -> None:
    """Half of the rows of a prefill, and half of these, until there is room for the whole cache."""
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 4, "engine__slots": 16}
    values |= {"engine__extend_rows": 512, "engine__kv_cache_gib": 0.005}
    need = small_plan(GIB, **values).peaks["prefill"]
    tight = small_plan(need * 0.3, **values)
    search = plan._Search(tight.target.config, SMALL, tight.slice, plan._NO_SCALE)
    rows = search.with_one("engine.extend_rows")["engine.extend_rows"]
    assert rows <= 128
    found = plan.changes_that_fit(tight.target.config, SMALL, tight.slice, plan._NO_SCALE)
    assert fixed(found, "engine.extend_rows") == rows
    assert small_plan(need * 0.3, **values | {"engine__extend_rows": rows}).fits
    assert not small_plan(need * 0.3, **values | {"engine__extend_rows": 2 * rows}).fits


def test_several_changes_where_one_is_not_enough() -> None:
    values: dict[str, Any] = {"learner__row_tokens": 512, "learner__rows": 64, "engine__slots": 16}
    p = small_plan(small_plan(GIB, **values).peaks["gradients"] * 0.3, **values)
    (found,) = plan.changes_that_fit(
        p.target.config, SMALL, p.slice, dict.fromkeys(memory.PHASES, 1.0)
    )
    assert found["learner.rows"] <= 16


def test_the_smallest_slice_gets_rows_and_slots_that_divide() -> None:
    c = config(engine__cache_tokens=512, learner__rows=6, engine__slots=6, learner__row_tokens=512)
    one_chip, *slices = hardware.slices_of("v5e")
    assert plan.smallest(c, SMALL, [one_chip]) == (one_chip, {})
    found = plan.smallest(c, SMALL, slices)
    assert (
        found is not None
        and found[0].name == "v5e:2x2"
        and found[1] == {"learner.rows": 8, "engine.slots": 8}
    )


def test_without_a_compiler_the_table_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "_PLUGINS", ())
    tiny = [
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--config.model.path={ROOT / 'assets' / 'tiny' / 'model'}",
    ]
    assert command.main([*tiny, "--topology=gpu:h100x1", "--tokens=200", "--sampled=50"]) == 0
    out, err = capsys.readouterr()
    for said in ("from shapes alone", "attention of the update: flash", "it fits", "72.8 GiB"):
        assert said in out
    assert "pip install '.[plan-gpu]'" in err
    assert command.main([*tiny, "--topology=v9:1"]) == 2
    assert command.main([*tiny, "--topolgy=v5p:2x2x1"]) == 2
    assert command.main(tiny) == 0
    out = capsys.readouterr().out
    for slice_ in ("v6e-1", "v5p:2x2x1", "gpu:t4x1", "gpu:h100x1"):
        assert f"  {slice_} " in out


@pytest.mark.ci
@pytest.mark.skipif(
    not platform.tpu_installed(), reason="libtpu is not installed: pip install '.[plan]'"
)
def test_the_tpu_compiler_agrees_with_the_shapes() -> None:
    small = {"engine__slots": 4, "engine__chunk": 2, "engine__extend_rows": 4, "learner__rows": 4}
    c = config(
        **small,
        engine__cache_tokens=256,
        engine__extend_buckets=(64,),
        engine__cache_buckets=(128,),
        learner__row_tokens=512,
        learner__logprob_chunk=128,
        mesh__tensor=2,
    )
    slice_ = hardware.parse_topology("v5p:2x2x1")
    # Many heads, so that scores are large; one layer, for a program of two takes twice the time.
    model = dataclasses.replace(SMALL, num_heads=16, num_layers=1)
    p = plan.make_plan(c, model, slice_, roofline.workload(c, 300, 100), compiled=True)
    assert [program.phase for program in p.programs] == [
        "prefill",
        "decode",
        "reshard",
        "scores",
        "gradients",
        "optimizer",
    ]
    kept = p.persistent["parameters"]
    xla = dataclasses.replace(p.target, config=plan.with_values(c, {"model.attention": "xla"}))
    estimate, in_blocks = (memory.temporaries(s, kept) for s in (p.target, xla))
    assert p.fits and 0.2 < p.temporaries["gradients"] / estimate["gradients"] < 5
    for phase in ("scores", "gradients"):  # with the kernel scores of attention take no memory
        assert p.temporaries[phase] < 0.4 * in_blocks[phase], phase
    text = "\n".join(plan.report(p, roofline.workload(c, 300, 100)))
    assert "compiled by libtpu" in text and "attention of the update: splash" in text
    # of a step all programs but the reshard, with the optimizer step for each of two roles
    *_, estimates = text.partition("the compiler's own estimates at 1.75 GHz")
    lines = estimates.splitlines()[2:8]
    names = ("prefill of", "decode of", "scores of", "gradients of", "optimizer step", "total")
    assert all(name in line for name, line in zip(names, lines, strict=True))
    assert all(float(line.split()[-1]) > 0 for line in lines)


@pytest.mark.ci
@pytest.mark.skipif(
    not platform.tpu_installed(), reason="libtpu is not installed: pip install '.[plan]'"
)
def test_the_tpu_compiler_moves_one_parameter_of_a_base_at_a_time() -> None:
    c = config(lora__rank=4, mesh__tensor=2, engine__slots=4, learner__rows=4)
    slice_ = hardware.parse_topology("v5p:2x2x1")
    s = plan.make_target(c, SMALL, slice_, compiled=True)
    programs = [source.compile() for source in compile._reshard_sources(s)]
    assert [program.phase for program in programs] == ["reshard"] * 3
    _, there, back = programs
    stacked = memory.frozen_base(s)["layers"]
    largest = max(map(memory.device_bytes, jax.tree.leaves(stacked)))
    base = memory.device_bytes(memory.frozen_base(s))
    assert largest <= min(there.temporaries, back.temporaries)
    assert max(there.temporaries, back.temporaries) < base
    # the update takes the base beside the adapter
    *_, gradients, _ = compile._learner_sources(s)
    assert gradients.function.lower(*gradients.arguments)


@pytest.mark.ci
@pytest.mark.skipif(
    not platform.tpu_installed(), reason="libtpu is not installed: pip install '.[plan]'"
)
def test_what_a_host_runs_compiles_where_its_chips_are_not_numbered_in_a_row() -> None:
    c = config(
        engine__slots=64, engine__chunk=1, engine__cache_tokens=64, learner__rows=64, mesh__tensor=4
    )
    s = plan.make_target(
        c,
        dataclasses.replace(SMALL, num_kv_heads=4),
        hardware.parse_topology("v6e:8x8"),
        compiled=True,
    )
    assert [device.id for device in s.mesh.devices.ravel()[:4]] == [0, 1, 8, 9]
    assert s.playing.shape == {"data": 1, "fsdp": 1, "tensor": 4}
    assert all(source.compile().fits for source in compile._sampler_sources(s))


@pytest.mark.ci
@pytest.mark.skipif(
    not platform.tpu_installed(), reason="libtpu is not installed: pip install '.[plan]'"
)
def test_a_program_that_the_compiler_gives_up_on_is_reported() -> None:
    """Scores of XLA's attention are too large."""
    sizes = dict(engine__slots=4, engine__chunk=1, engine__cache_tokens=10**8)
    c = config(**sizes, learner__rows=4, model__attention="xla")
    slice_ = hardware.parse_topology("v5e:2x2")
    s = memory.Target(c, SMALL, sharding.make_mesh(c.mesh.to_dict(), compile.make_devices(slice_)))
    decode = list(compile._sampler_sources(s))[1].compile()
    assert not decode.fits and decode.temporaries > 16 * GIB


def machine(gib: float, kind: str = hardware.CPU) -> hardware.Slice:
    """A machine as --hardware=this finds it."""
    gpu = None if kind == hardware.CPU else hardware.Gpu(gib * GIB, (8, 9), 0, 0.0, 0)
    chip = hardware.Chip(gib * GIB, 0.0, 0.0, 0.0, 1, 1, (), gpu=gpu)
    return hardware.Slice("this machine", chip, 1, kind, "1", 1)


@pytest.mark.parametrize("kind", [hardware.CPU, "NVIDIA L4"])
def test_keys_for_this_machine_make_it_fit_and_are_no_more_than_it_needs(kind: str) -> None:
    c = config(learner__row_tokens=512, engine__slots=16, learner__rows=4, model__remat="none")
    needed = []
    for gib in (64.0, 0.6, 0.001):
        slice_ = machine(gib, kind)
        values = plan.keys_for_this_machine(c, SMALL, slice_)
        needed.append(values)
        if values is None:
            continue
        after = plan._estimate(plan.with_values(c, values), SMALL, slice_, plan._NO_SCALE)
        # A CPU has room for all that the slots can need; elsewhere the cache takes what is left.
        assert after is not None
        assert (after.excess if kind == hardware.CPU else after.shortfall) == 0
        assert not any("offload" in key for key in values) or kind != hardware.CPU
    first = {"model.dtype": "float32", "learner.rows": 1, "engine.slots": 8}
    first |= {"engine.extend_rows": 1}
    assert needed[0] == (first if kind == hardware.CPU else {})
    assert needed[-1] is None and needed[1] != needed[0]


def test_a_cpu_has_room_for_all_its_slots() -> None:
    """Its cache does not give way, as one on a GPU does."""
    c = config(
        learner__row_tokens=512,
        learner__rows=1,
        engine__slots=8,
        engine__extend_rows=1,
        model__dtype="float32",
    )
    whole = plan._estimate(c, SMALL, machine(64.0), plan._NO_SCALE)
    assert whole is not None
    cache = whole.persistent["key/value cache"]
    needed = max(whole.peaks.values()) - cache / 2
    assert needed > max(whole.peaks[phase] for phase in memory.UPDATE)
    smaller = machine(needed / machine(1.0).device.usable)
    values = plan.keys_for_this_machine(c, SMALL, smaller)
    assert values
    after = plan._estimate(plan.with_values(c, values), SMALL, smaller, plan._NO_SCALE)
    assert after is not None and after.excess == 0


def test_this_machine_is_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    """The eight devices of the tests share its memory."""
    tiny = [
        f"--config={ROOT / 'configs' / 'tiny.py'}",
        f"--config.model.path={ROOT / 'assets' / 'tiny' / 'model'}",
        "--hardware=this",
    ]
    assert command.main(tiny) == 0
    first, second, keys = capsys.readouterr().out.splitlines()
    assert "on this machine: 8 x cpu, " in first and first.endswith(" GiB each for a run")
    assert second.startswith("it fits, from shapes: 0.0 GiB playing, 0.0 updating")
    assert keys == "  --config.learner.rows=1"
    assert command.main([*tiny, "--topology=v6e-8"]) == 2
    assert "--hardware and --topology name two machines" in capsys.readouterr().err
