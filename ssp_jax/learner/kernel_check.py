"""Whether an attention kernel computes on this device what it should."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ssp_jax.model import attention

Kernel = Callable[..., jax.Array]  # (q, k, v, segments) -> o


def check_kernel(name: str, kernel: Kernel, heads: tuple[int, int, int], dtype: Any) -> None:
    """Raises InputError where a kernel does not run, or does not compute what `packed` does.

    heads: N, K and H. It and its gradients run on the default device, for one small packed row.
    """
    case = _small_case(heads, dtype)
    exact = [x.astype(jnp.float32) for x in case[:4]]
    attention.check_kernel(
        name,
        ("o", "dq", "dk", "dv"),
        lambda: _with_gradients(kernel, *case),
        lambda: _with_gradients(attention.packed, *exact, case[4]),
    )


def _small_case(heads: tuple[int, int, int], dtype: Any) -> tuple[jax.Array, ...]:
    """q, k, v, a cotangent and segment ids of one row: several tiles, ragged segments, padding."""
    T = 500
    N, K, H = heads
    rng = np.random.default_rng(0)
    ends = (130, 131, 320, 470)
    number_T = 1 + np.searchsorted(ends, np.arange(T), side="right")
    is_real_T = np.arange(T) < ends[-1]
    segment_ids_BT = jnp.asarray(np.where(is_real_T, number_T, 0)[None], jnp.int32)

    def draw(count: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal((1, T, count, H)), dtype)

    do_BTNH = draw(N) * jnp.asarray(is_real_T[None, :, None, None], dtype)  # as in a loss
    return draw(N), draw(K), draw(K), do_BTNH, segment_ids_BT


def _run(
    kernel: Kernel,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    do_BTNH: jax.Array,
    segment_ids_BT: jax.Array,
) -> tuple[jax.Array, ...]:
    """o, dq, dk and dv."""
    o_BTNH, back = jax.vjp(lambda *qkv: kernel(*qkv, segment_ids_BT), q_BTNH, k_BTKH, v_BTKH)
    return o_BTNH, *back(do_BTNH)


_with_gradients = jax.jit(_run, static_argnums=0)
