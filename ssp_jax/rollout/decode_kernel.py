"""Attention of decoding by a kernel that stops at each slot's length.

"flash" is the kernel for NVIDIA GPUs, in decode_triton.py, "splash" that for TPUs, in
decode_mosaic.py: the words of attention.select_kernel. On a CPU both are interpreted, which only
tests ask for.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from ssp_jax.model.attention import PartialSoftmax, check_kernel, combine
from ssp_jax.rollout import decode_mosaic, decode_triton, kv_cache

_LENGTHS = (0, 1, 128, 129, 384)  # of the slots that a kernel is checked with


def keys_read_together(
    kernel: str, heads: int, head_dim: int, dtype: Any, lengths: Sequence[int]
) -> int:
    """Keys that are read of a slot are a multiple of it; 0 where the kernel is not for these sizes.

    heads: of keys on a device. lengths: of the pieces of the cache.
    """
    if kernel == "flash":
        return decode_triton.tile(head_dim, dtype, lengths)
    return decode_mosaic.block(decode_mosaic.tile(heads, head_dim, dtype, lengths))


def _by_platform(kernel: str) -> dict[str, Callable[..., Any]]:
    attend: Callable[..., Any] = decode_triton.attend
    platform = "cuda"
    if kernel == "splash":
        attend = decode_mosaic.attend
        platform = "tpu"
    return {
        "cpu": functools.partial(attend, interpret=True),
        platform: functools.partial(attend, interpret=False),
    }


def attend(
    kernel: str,
    q_BTNH: jax.Array,
    length_B: jax.Array,
    k: Sequence[jax.Array],
    v: Sequence[jax.Array],
    rows_JB: jax.Array,
    mesh: jax.sharding.Mesh | None = None,
) -> list[PartialSoftmax]:
    """Attention of one query of each slot to the first length_B tokens of its own, split by split.

    k, v: of each piece of the cache, as in KVCache. rows_JB: the row that a slot has of each later
    piece, int32; of those that hold its tokens it must have one. mesh: of several devices, over
    whose axis `tensor` heads are split; None for a single device.
    """
    by_platform = _by_platform(kernel)

    def run(*arrays: Any) -> Any:
        return jax.lax.platform_dependent(*arrays, **by_platform)

    if mesh is not None:
        heads = P(None, None, "tensor")
        of_cache = [P(None, "tensor")] * len(k)
        context = jax.sharding.get_abstract_mesh()
        # Mosaic asks that all axes are manual; where slots are split, their axes are already.
        axes = mesh.axis_names if context.empty else ("tensor",)
        run = jax.shard_map(
            run,
            mesh=mesh if context.empty else context,
            in_specs=(heads, P(), of_cache, of_cache, P()),
            out_specs=(P(None, None, None, "tensor"),) * 3,
            axis_names=frozenset(axes),
            check_vma=False,
        )
    parts = zip(*run(q_BTNH, length_B, list(k), list(v), list(rows_JB)), strict=True)
    return [PartialSoftmax(*part) for part in parts]


def check(kernel: str, heads: tuple[int, int, int], dtype: Any) -> None:
    """Raises InputError where the kernel is wrong on the default device. heads: N, K and H."""
    q_BTNH, cache, view = _small_case(heads, dtype)
    length_B = jnp.array(_LENGTHS)

    def attend(earlier: Any, q_BTNH: jax.Array, cache: kv_cache.KVCache) -> tuple[jax.Array]:
        # beside a key whose score and value are 0
        zeros_BTN = jnp.zeros(q_BTNH.shape[:3])
        own = PartialSoftmax(jnp.zeros(q_BTNH.shape), zeros_BTN, zeros_BTN + 1)
        return (combine([own, *earlier(q_BTNH, cache, length_B)]),)

    run = jax.jit(attend, static_argnums=0)
    exact = jax.tree.map(lambda x: x.astype(jnp.float32), (q_BTNH, cache))
    by_kernel = functools.partial(view.attend_to_lengths, kernel=kernel, mesh=None)
    check_kernel(
        f"{kernel} of decoding",
        ("o",),
        lambda: run(by_kernel, q_BTNH, cache),
        lambda: run(view.attend_all, *exact),
    )


def _small_case(
    heads: tuple[int, int, int], dtype: Any
) -> tuple[jax.Array, kv_cache.KVCache, kv_cache.View]:
    """Queries, keys and values of slots of _LENGTHS, in two pieces."""
    N, K, H = heads
    slots = len(_LENGTHS)
    layout = kv_cache.Layout((128, 384), (slots, 3))
    rows_JB = jnp.array([[3, 3, 3, 2, 0]])  # 3: none
    rng = np.random.default_rng(0)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape), dtype)

    pieces = list(zip(layout.rows, layout.lengths, strict=True))
    k = tuple(draw(n, K, H, S) for n, S in pieces)
    v = tuple(draw(n, K, S, H) for n, S in pieces)
    view = kv_cache.View(layout, rows_JB, len(pieces))
    return draw(slots, 1, N, H), kv_cache.KVCache(k, v), view
