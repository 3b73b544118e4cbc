"""Attention over packed rows and over keys that lie in several places: the one place that decides
how it is computed.

Packed rows: XLA einsums in blocks (`packed`), on TPUs JAX's splash kernel (`splash`). Keys in
several places: XLA einsums. Scores and softmax are float32 in all of them, so that sampler and
trainer agree.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

# the name, for remat policies, of what the backward pass of packed attention wants back
KEPT = "attention"
_MIN_BLOCK, _MAX_BLOCKS = 256, 16  # queries of a block; blocks of a row, which are unrolled
NEG_INF = -1e30  # finite: a row with no visible key (padding) stays free of NaN
LANES = 128  # of a TPU; the kernel's blocks are multiples
# The longest block of keys in the kernel's backward pass, which writes the queries' gradient for
# each: long, so that these are few. All other blocks are half of it: 1024 queries do 1024 FLOPs
# with a byte of keys and values, and a v6e, which needs most, has 560 in that time. Blocks of 2048
# queries do not fit the VMEM of a v5e or v5p.
_SPLASH_KEYS = 2048


def select_kernel(key: str, platform: str) -> str:
    """How the update attends, "splash" or "xla": config key model.attention on devices of this
    platform.
    """
    return "splash" if key == "auto" and platform == "tpu" else "xla"


def packed(
    q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    """Causal attention inside each segment of a packed row; segment 0 is padding. Differentiable in
    q, k and v.

    Queries go in blocks, each against the keys up to its end: half of the T x T scores are never
    computed, and only one block of them exists at a time, forward and backward (the backward pass
    makes them again from the log-sum-exp, as FlashAttention does, arXiv 2205.14135).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BTKH.shape[2]
    q_BKRTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    o_BKRTH = _blocks(
        q_BKRTH, jnp.moveaxis(k_BTKH, 1, 2), jnp.moveaxis(v_BTKH, 1, 2), segment_ids_BT
    )
    return jnp.moveaxis(o_BKRTH, 3, 1).reshape(B, T, N, H)


def spans(T: int) -> list[tuple[int, int]]:
    """First and last + 1 of each block of queries of a row of T."""
    size = max(_MIN_BLOCK, -(-T // _MAX_BLOCKS))
    return [(start, min(start + size, T)) for start in range(0, T, size)]


def _block_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, visible_BTS: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Outputs [B, K, R, T, H] of one block of queries, and the log of each query's sum of
    exp(score) [B, K, R, T].
    """
    scores = (
        jnp.einsum("bkrth,bksh->bkrts", q, k, preferred_element_type=jnp.float32)
        * q.shape[-1] ** -0.5
    )
    scores = jnp.where(visible_BTS[:, None, None], scores, NEG_INF)
    top_BKRT = scores.max(-1)
    weights = jnp.exp(scores - top_BKRT[..., None])
    sum_BKRT = weights.sum(-1)
    o = jnp.einsum(
        "bkrts,bksh->bkrth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    return (o / sum_BKRT[..., None]).astype(v.dtype), top_BKRT + jnp.log(sum_BKRT)


def _block_backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    visible_BST: jax.Array,
    do: jax.Array,
    delta: jax.Array,
    total: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq in v's dtype, dk and dv in float32. Keys come first in scores: so no product needs a
    transposed [S, T].
    """
    scale, product = (
        q.shape[-1] ** -0.5,
        functools.partial(jnp.einsum, preferred_element_type=jnp.float32),
    )
    scores = product("bksh,bkrth->bksrt", k, q) * scale
    scores = jnp.where(visible_BST[:, None, :, None], scores, NEG_INF)
    weights = jnp.exp(scores - total[:, :, None])
    grad = weights * (product("bksh,bkrth->bksrt", v, do) - delta[:, :, None]) * scale
    # What is used by two products is made once, and not inside each of them.
    weights, grad = jax.lax.optimization_barrier((weights.astype(q.dtype), grad.astype(q.dtype)))
    dq_BKHRT = jnp.einsum("bkhs,bksrt->bkhrt", jnp.swapaxes(k, 2, 3), grad)
    dk = product("bksrt,bkrth->bksh", grad, q)
    dv = product("bksrt,bkrth->bksh", weights, do)
    return jnp.moveaxis(dq_BKHRT, 2, 4), dk, dv


def _visible(segment_ids_BT: jax.Array, start: int, end: int) -> jax.Array:
    """[B, queries start to end, keys up to end]: earlier or same position, same segment."""
    same_BTS = segment_ids_BT[:, start:end, None] == segment_ids_BT[:, None, :end]
    return same_BTS & jnp.tri(end - start, end, start, dtype=bool)[None]


def _blocks_forward(
    q_BKRTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_ids_BT: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    blocks = [
        _block_forward(
            q_BKRTH[:, :, :, start:end],
            k_BKTH[:, :, :end],
            v_BKTH[:, :, :end],
            _visible(segment_ids_BT, start, end),
        )
        for start, end in spans(q_BKRTH.shape[3])
    ]
    o_BKRTH, total_BKRT = (
        checkpoint_name(jnp.concatenate(x, axis=3), KEPT) for x in zip(*blocks, strict=True)
    )
    return o_BKRTH, (q_BKRTH, k_BKTH, v_BKTH, segment_ids_BT, o_BKRTH, total_BKRT)


@jax.custom_vjp
def _blocks(
    q_BKRTH: jax.Array, k_BKTH: jax.Array, v_BKTH: jax.Array, segment_ids_BT: jax.Array
) -> jax.Array:
    return _blocks_forward(q_BKRTH, k_BKTH, v_BKTH, segment_ids_BT)[0]


def _blocks_backward(
    kept: tuple[jax.Array, ...], do_BKRTH: jax.Array
) -> tuple[jax.Array | None, ...]:
    q_BKRTH, k_BKTH, v_BKTH, segment_ids_BT, o_BKRTH, total_BKRT = kept
    delta_BKRT = (do_BKRTH.astype(jnp.float32) * o_BKRTH.astype(jnp.float32)).sum(-1)
    dq, dk_BKTH, dv_BKTH = (
        [],
        jnp.zeros(k_BKTH.shape, jnp.float32),
        jnp.zeros(v_BKTH.shape, jnp.float32),
    )
    for start, end in spans(q_BKRTH.shape[3]):
        q, do, delta, total = (
            x[:, :, :, start:end] for x in (q_BKRTH, do_BKRTH, delta_BKRT, total_BKRT)
        )
        visible_BST = jnp.swapaxes(_visible(segment_ids_BT, start, end), 1, 2)
        block = _block_backward(
            q, k_BKTH[:, :, :end], v_BKTH[:, :, :end], visible_BST, do, delta, total
        )
        dq.append(block[0])
        dk_BKTH, dv_BKTH = (
            dk_BKTH.at[:, :, :end].add(block[1]),
            dv_BKTH.at[:, :, :end].add(block[2]),
        )
    return (
        jnp.concatenate(dq, axis=3),
        dk_BKTH.astype(k_BKTH.dtype),
        dv_BKTH.astype(v_BKTH.dtype),
        None,
    )


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
    """What `packed` computes, by JAX's Pallas kernel for TPUs: scores stay inside a core and are
    never in HBM.

    No key is repeated, and rows whose length does not suit the kernel are padded. XLA does not
    split a Pallas kernel over devices: see sharding.on_own_rows_and_heads. interpret: where there
    is no TPU, for tests.
    """
    # Here: only TPUs need it.
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels

    (_, T, N, H), keys = q_BTNH.shape, splash_keys(q_BTNH.shape[1])
    padding, half = -T % keys, keys // 2
    segments_BS = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)))

    def heads_first(x_BTNH: jax.Array) -> jax.Array:
        return jnp.pad(jnp.moveaxis(x_BTNH, 2, 1), ((0, 0), (0, 0), (0, padding), (0, 0)))

    kernel = kernels.make_splash_mha_single_device(
        kernels.MultiHeadMask([kernels.CausalMask((T + padding, T + padding))] * N),
        block_sizes=kernels.BlockSizes(
            half, half, half, half, keys, half, use_fused_bwd_kernel=True
        ),
        residual_checkpoint_name=KEPT,
        interpret=interpret,
    )
    # the kernel does not scale
    q, k, v = heads_first(q_BTNH * H**-0.5), heads_first(k_BTKH), heads_first(v_BTKH)
    o_BNSH = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segments_BS, segments_BS))
    return jnp.moveaxis(o_BNSH[:, :, :T], 1, 2)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PartialSoftmax:
    """Attention over some of the keys, not divided by its sum yet; float32. `merged` puts parts
    together.
    """

    o_BTNH: jax.Array  # sum of exp(score - max) * value
    max_BTN: jax.Array
    sum_BTN: jax.Array  # of exp(score - max)


def partial_softmax(
    q_BTNH: jax.Array, k_BKHS: jax.Array, v_BKSH: jax.Array, visible_BTS: jax.Array
) -> PartialSoftmax:
    """Attention over these keys; each of the K key/value heads serves R = N / K query heads, no key
    is repeated.

    A query that sees none of them gets a max of NEG_INF. Positions are the last axis of keys: with
    few queries the product of the scores is then twice to four times as fast on CPU as over keys
    [B, K, S, H] (measured).
    """
    B, T, N, H = q_BTNH.shape
    K = k_BKHS.shape[1]
    q_BKRTH = jnp.moveaxis(q_BTNH.reshape(B, T, K, N // K, H), 1, 3)
    scores = (
        jnp.einsum("bkrth,bkhs->bkrts", q_BKRTH, k_BKHS, preferred_element_type=jnp.float32)
        * H**-0.5
    )
    scores = jnp.where(visible_BTS[:, None, None], scores, NEG_INF)
    max_BKRT = jnp.max(scores, axis=-1)
    weights = jnp.exp(scores - max_BKRT[..., None])
    o_BKRTH = jnp.einsum(
        "bkrts,bksh->bkrth",
        weights.astype(v_BKSH.dtype),
        v_BKSH,
        preferred_element_type=jnp.float32,
    )
    o_BTKRH, max_BTKR, sum_BTKR = (
        jnp.moveaxis(x, 3, 1) for x in (o_BKRTH, max_BKRT, weights.sum(axis=-1))
    )
    per_head = q_BTNH.shape[:3]
    return PartialSoftmax(
        o_BTKRH.reshape(q_BTNH.shape), max_BTKR.reshape(per_head), sum_BTKR.reshape(per_head)
    )


def combine(parts: list[PartialSoftmax]) -> jax.Array:
    """Attention [B, T, N, H], float32, over the keys of all parts; each query must see a key in one
    of them.
    """
    max_BTN = functools.reduce(jnp.maximum, [p.max_BTN for p in parts])
    scales = [jnp.exp(p.max_BTN - max_BTN) for p in parts]
    pairs = list(zip(parts, scales, strict=True))
    sum_BTN = functools.reduce(jnp.add, [p.sum_BTN * scale for p, scale in pairs])
    o_BTNH = functools.reduce(jnp.add, [p.o_BTNH * scale[..., None] for p, scale in pairs])
    return o_BTNH / sum_BTN[..., None]
