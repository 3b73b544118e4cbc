"""Attention over packed rows, and over keys in several places. Nothing else decides how.

Packed rows: XLA einsums in blocks (`packed`), on TPUs JAX's splash kernel (`splash`), on NVIDIA
GPUs the kernels of learner/flash.py. Keys in several places: XLA einsums (`partial_softmax`,
`combine`), and for decoding on TPUs and NVIDIA GPUs the kernels of rollout/decode_kernel.py. Scores
and softmax are float32 in all of them, so that sampler and trainer agree.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from ssp_jax.errors import InputError, first_line

# the name, for remat policies, of what the backward pass of packed attention wants back
KEPT = "attention"
_MIN_BLOCK = 256  # queries of a block
_MAX_BLOCKS = 16  # of a row; blocks are unrolled
NEG_INF = -1e30  # finite: a row with no visible key (padding) stays free of NaN
LANES = 128  # of a TPU; the kernel's blocks are multiples
# The longest block of keys in the kernel's backward pass, which writes the queries' gradient for
# each: long, so that these are few. All other blocks are half of it: 1024 queries do 1024 FLOPs
# with a byte of keys and values, and a v6e, which needs most, has 560 in that time. Blocks of 2048
# queries do not fit the VMEM of a v5e or v5p.
_SPLASH_KEYS = 2048
_FLASH_FROM = (8, 0)  # compute capability: Triton compiles for Ampere and later GPUs
# Largest difference of a right kernel, as a share of the largest number: bfloat16 makes 0.005, a
# GPU's product of float32 (TF32) less, and keys of another segment 0.1 or more.
_TOLERANCE = 0.02


def capability(device: Any) -> tuple[int, int] | None:
    """Compute capability of an NVIDIA GPU; None of any other device."""
    major, _, minor = str(getattr(device, "compute_capability", "")).partition(".")
    return (int(major), int(minor)) if major.isdecimal() and minor.isdecimal() else None


def select_kernel(key: str, platform: str, gpu: tuple[int, int] | None = None) -> str:
    """ "splash", "flash" or "xla", from config key model.attention and the devices.

    gpu: compute capability of NVIDIA GPUs. Raises InputError for a kernel that the devices lack.
    """
    best = "xla"
    if platform == "tpu":
        best = "splash"
    elif gpu is not None and gpu >= _FLASH_FROM:
        best = "flash"
    if key not in ("auto", "xla", best):
        others = "auto or xla" if best == "xla" else f"auto, {best} or xla"
        raise InputError(
            f"config key model.attention is {key!r}; expected {others} on these devices"
        )
    return best if key == "auto" else key


def check_kernel(
    name: str,
    arrays: Sequence[str],
    found: Callable[[], Sequence[jax.Array]],
    expected: Callable[[], Sequence[jax.Array]],
) -> None:
    """Raises InputError where a kernel does not run, or does not compute what is expected.

    arrays: names of what both return. expected: by XLA, in float32.
    """
    remedy = "config key model.attention=xla does without it"
    try:
        results = found()
    except jax.errors.JaxRuntimeError as error:
        raise InputError(
            f"attention kernel {name} does not run on this device ({first_line(error)}); {remedy}"
        ) from None
    for array, x, y in zip(arrays, results, expected(), strict=True):
        difference = float(np.abs(np.float32(x) - np.float32(y)).max() / np.abs(y).max())
        # NaN is not below it.
        if not difference < _TOLERANCE:
            raise InputError(
                f"attention kernel {name} is wrong on this device: its {array} differs from XLA's "
                f"by {difference:.2g} of the largest, expected less than {_TOLERANCE}; {remedy}"
            )


def packed(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Causal attention [B, T, N, H] inside each segment of a packed row; segment 0 is padding.

    Differentiable in q, k and v. Queries go in blocks, each against the keys up to its end: half of
    the T x T scores are never computed, and only one block of them exists at a time, forward and
    backward (the backward pass makes them again from the log-sum-exp, as FlashAttention does, arXiv
    2205.14135).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKRTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    k_BKTH = jnp.moveaxis(k_BTKH, 1, 2)
    v_BKTH = jnp.moveaxis(v_BTKH, 1, 2)
    o_BKRTH = _blocks(q_BKRTH, k_BKTH, v_BKTH, segment_ids_BT)
    return jnp.moveaxis(o_BKRTH, 3, 1).reshape(B, T, N, H)


def spans(T: int) -> list[tuple[int, int]]:
    """First and last + 1 of each block of queries of a row of T."""
    size = max(_MIN_BLOCK, -(-T // _MAX_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _block_forward(
    q_BKRTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, visible_BTT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """One block of queries: outputs [B, K, R, T, H], and log-sums of exp(score) [B, K, R, T]."""
    scale = q_BKRTH.shape[-1] ** -0.5
    scores = jnp.einsum("bkrth,bksh->bkrts", q_BKRTH, k_BKTH, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTT[:, None, None], scores * scale, NEG_INF)
    max_BKRT = scores.max(-1)
    weights = jnp.exp(scores - max_BKRT[..., None])
    sum_BKRT = weights.sum(-1)
    dtype = v_BKTH.dtype
    o_BKRTH = jnp.einsum(
        "bkrts,bksh->bkrth", weights.astype(dtype), v_BKTH, preferred_element_type=jnp.float32
    )
    return (o_BKRTH / sum_BKRT[..., None]).astype(dtype), max_BKRT + jnp.log(sum_BKRT)


def _block_backward(
    q_BKRTH: jax.Array,
    k_BKTH: jax.Array,
    v_BKTH: jax.Array,
    visible_BTT: jax.Array,
    do_BKRTH: jax.Array,
    delta_BKRT: jax.Array,
    log_sum_BKRT: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq in v's dtype, dk and dv in float32, of one block of queries.

    visible_BTT: [B, keys, queries]. Keys come first in scores, too: so no product needs them
    transposed.
    """
    scale = q_BKRTH.shape[-1] ** -0.5
    einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
    scores = einsum("bksh,bkrth->bksrt", k_BKTH, q_BKRTH) * scale
    scores = jnp.where(visible_BTT[:, None, :, None], scores, NEG_INF)
    weights = jnp.exp(scores - log_sum_BKRT[:, :, None])
    dweights = einsum("bksh,bkrth->bksrt", v_BKTH, do_BKRTH)
    dscores = weights * (dweights - delta_BKRT[:, :, None]) * scale
    # What is used by two products is made once, and not inside each of them.
    rounded = (weights.astype(q_BKRTH.dtype), dscores.astype(q_BKRTH.dtype))
    weights, dscores = jax.lax.optimization_barrier(rounded)
    dq_BKHRT = jnp.einsum("bkhs,bksrt->bkhrt", jnp.swapaxes(k_BKTH, 2, 3), dscores)
    dk_BKTH = einsum("bksrt,bkrth->bksh", dscores, q_BKRTH)
    dv_BKTH = einsum("bksrt,bkrth->bksh", weights, do_BKRTH)
    return jnp.moveaxis(dq_BKHRT, 2, 4), dk_BKTH, dv_BKTH


def _visible(segment_ids_BT: jax.Array, start: int, end: int) -> jax.Array:
    """[B, queries start to end, keys up to end]: earlier or same position, same segment."""
    same_BTT = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
    return same_BTT & jnp.tri(end - start, end, start, dtype=bool)[None]


def _blocks_forward(
    q_BKRTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_ids_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    outputs = []
    log_sums = []
    for start, end in spans(q_BKRTH.shape[3]):
        queries = np.s_[:, :, :, start:end]
        keys = np.s_[:, :, :end]
        visible_BTT = _visible(segment_ids_BT, start, end)
        o_BKRTH, log_sum_BKRT = _block_forward(
            q_BKRTH[queries], k_BKTH[keys], v_BKTH[keys], visible_BTT
        )
        outputs.append(o_BKRTH)
        log_sums.append(log_sum_BKRT)
    o_BKRTH = checkpoint_name(jnp.concatenate(outputs, axis=3), KEPT)
    log_sum_BKRT = checkpoint_name(jnp.concatenate(log_sums, axis=3), KEPT)
    return o_BKRTH, (q_BKRTH, k_BKTH, v_BKTH, segment_ids_BT, o_BKRTH, log_sum_BKRT)


@jax.custom_vjp
def _blocks(
    q_BKRTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    return _blocks_forward(q_BKRTH, k_BKTH, v_BKTH, segment_ids_BT)[0]


def _blocks_backward(
    residuals: tuple[jax.Array, ...], do_BKRTH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BKRTH, k_BKTH, v_BKTH, segment_ids_BT, o_BKRTH, log_sum_BKRT = residuals
    delta_BKRT = (do_BKRTH.astype(jnp.float32) * o_BKRTH.astype(jnp.float32)).sum(-1)
    dq_blocks = []
    dk_BKTH = jnp.zeros(k_BKTH.shape, jnp.float32)
    dv_BKTH = jnp.zeros(v_BKTH.shape, jnp.float32)
    for start, end in spans(q_BKRTH.shape[3]):
        queries = np.s_[:, :, :, start:end]
        keys = np.s_[:, :, :end]
        visible_BTT = jnp.swapaxes(_visible(segment_ids_BT, start, end), 1, 2)
        dq, dk, dv = _block_backward(
            q_BKRTH[queries],
            k_BKTH[keys],
            v_BKTH[keys],
            visible_BTT,
            do_BKRTH[queries],
            delta_BKRT[queries],
            log_sum_BKRT[queries],
        )
        dq_blocks.append(dq)
        dk_BKTH = dk_BKTH.at[keys].add(dk)
        dv_BKTH = dv_BKTH.at[keys].add(dv)
    dq_BKRTH = jnp.concatenate(dq_blocks, axis=3)
    return dq_BKRTH, dk_BKTH.astype(k_BKTH.dtype), dv_BKTH.astype(v_BKTH.dtype), None


_blocks.defvjp(_blocks_forward, _blocks_backward)


def splash_keys(T: int) -> int:
    """The longest block of `splash` for a row of T; rows are padded to a multiple of it."""
    count = -(-T // _SPLASH_KEYS)
    return -(-T // (count * 2 * LANES)) * 2 * LANES


def splash(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    interpret: bool = False,
) -> jax.Array:
    """What `packed` computes, by JAX's Pallas kernel for TPUs: no scores in HBM, no repeated keys.

    Rows whose length does not suit the kernel are padded. XLA does not split a Pallas kernel over
    devices: see sharding.shard_map_rows_and_heads. interpret: where there is no TPU, for tests.
    """
    # Here: only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    _, T, N, H = q_BTNH.shape
    keys = splash_keys(T)
    half = keys // 2
    padding = -T % keys

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        x_BNTH = jnp.moveaxis(x_BTNH, 2, 1)
        return jnp.pad(x_BNTH, ((0, 0), (0, 0), (0, padding), (0, 0)))

    mask = kernels.CausalMask((T + padding, T + padding))
    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([mask] * N),
        block_sizes=kernels.BlockSizes(
            half, half, half, half, keys, half, use_fused_bwd_kernel=True
        ),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    q_BNTH = heads_first(q_BTNH * H**-0.5)  # the kernel does not scale
    k_BKTH = heads_first(k_BTKH)
    v_BKTH = heads_first(v_BTKH)
    segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)))
    segments = kernels.SegmentIds(segment_ids_BT, segment_ids_BT)
    o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
    return jnp.moveaxis(o_BNTH[:, :, :T], 1, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartialSoftmax:
    """Attention over some of the keys, not divided by its sum yet; float32. See `combine`."""

    o_BTNH: jax.Array  # sum of exp(score - max) * value
    max_BTN: jax.Array
    sum_BTN: jax.Array  # of exp(score - max)


def partial_softmax(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array
) -> PartialSoftmax:
    """Attention over these keys. Each of K heads of keys serves R = N / K of queries: no copies.

    A query that sees none of the keys gets a max of NEG_INF. Positions are the last axis of keys:
    with few queries the product of the scores is then twice to four times as fast on CPU as over
    keys [B, K, S, H] (measured).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    q_BKRTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    scores = jnp.einsum("bkrth,bkhs->bkrts", q_BKRTH, k_BKHS, preferred_element_type=jnp.float32)
    scores = jnp.where(visible_BTS[:, None, None], scores * H**-0.5, NEG_INF)
    max_BKRT = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - max_BKRT[..., None])
    cast = weights.astype(v_BKSH.dtype)
    o_BKRTH = jnp.einsum("bkrts,bksh->bkrth", cast, v_BKSH, preferred_element_type=jnp.float32)
    sum_BKRT = weights.sum(axis=-1)
    o_BTNH = jnp.moveaxis(o_BKRTH, 3, 1).reshape(B, T, N, H)
    max_BTN = jnp.moveaxis(max_BKRT, 3, 1).reshape(B, T, N)
    sum_BTN = jnp.moveaxis(sum_BKRT, 3, 1).reshape(B, T, N)
    return PartialSoftmax(o_BTNH, max_BTN, sum_BTN)


def combine(parts: list[PartialSoftmax]) -> jax.Array:
    """Attention [B, T, N, H], float32, over the keys of all parts.

    Each query must see a key in one of them.
    """
    max_BTN = functools.reduce(jnp.maximum, [part.max_BTN for part in parts])
    scales = [jnp.exp(part.max_BTN - max_BTN) for part in parts]
    pairs = list(zip(parts, scales, strict=True))
    sum_BTN = functools.reduce(jnp.add, [part.sum_BTN * scale for part, scale in pairs])
    o_BTNH = functools.reduce(jnp.add, [part.o_BTNH * scale[..., None] for part, scale in pairs])
    return o_BTNH / sum_BTN[..., None]
