"""Check 2: packed attention and its gradients, against NumPy in float64."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.proof.rows import Row, Setting, verdict
from ssp_jax.learner import flash
from ssp_jax.model import attention

# Name, as attention.select_kernel returns it -> (q, k, v, segments) -> o.
KERNELS: dict[str, Callable[..., jax.Array]] = {
    "xla": attention.packed,
    "splash": attention.splash,
    "flash": flash.attend,
}
KEYS = ("auto", "xla")  # values of config key model.attention
# Largest relative error; bfloat16 rounds to 2^-8 at each of several operations.
LIMITS = {"float32": 1e-5, "bfloat16": 1e-2}
RAGGED = (0.31, 0.02, 0.17, 0.44)  # shares of a row that segments take; padding has the rest


@dataclass(frozen=True)
class Heads:
    queries: int
    keys: int
    size: int


def kernels() -> dict[str, str]:
    """All implementations that a run can choose on this device, and the key that chooses each."""
    platform = jax.default_backend()
    gpu = attention.capability(jax.devices()[0])
    return {attention.select_kernel(key, platform, gpu): key for key in KEYS}


def check(setting: Setting) -> Iterator[Row]:
    shapes: tuple[Heads, ...] = (Heads(14, 2, 64), Heads(28, 4, 128))  # of Qwen2.5-0.5B and 7B
    T = 1024
    if setting.small:
        shapes = (Heads(6, 2, 16),)
        T = 320  # two blocks of queries
    for heads in shapes:
        for dtype in LIMITS:
            case = make_case(heads, T, dtype)
            expected = reference(case)
            for kernel in kernels():
                found = compute(KERNELS[kernel], case)
                errors = {name: relative_error(found[name], expected[name]) for name in found}
                shape = f"{heads.queries}/{heads.keys} heads of {heads.size}"
                yield row(f"{kernel}, {dtype}, {shape}: relative errors", errors, LIMITS[dtype])


def row(name: str, errors: dict[str, float], limit: float) -> Row:
    measured = ", ".join(f"{key} {error:.2g}" for key, error in errors.items())
    # NaN is not below the limit.
    is_ok = all(error <= limit for error in errors.values())
    return verdict(name, measured, f"each <= {limit:g}", is_ok)


@dataclass(frozen=True)
class Case:
    """A packed row: values are those of `dtype`, held as float64."""

    dtype: str
    q_TNH: np.ndarray
    k_TKH: np.ndarray
    v_TKH: np.ndarray
    do_TNH: np.ndarray  # gradient of the output; 0 in the padding, as in a loss
    segments_T: np.ndarray  # int32, 0 is padding


def make_case(heads: Heads, T: int, dtype: str) -> Case:
    rng = np.random.default_rng(heads.queries)

    def draw(n: int) -> np.ndarray:
        return rng.normal(size=(T, n, heads.size)).astype(jnp.dtype(dtype)).astype(np.float64)

    ends_S = np.round(np.cumsum(RAGGED) * T).astype(int)
    number_T = 1 + np.searchsorted(ends_S, np.arange(T), side="right")
    segments_T = np.where(np.arange(T) < ends_S[-1], number_T, 0).astype(np.int32)
    do_TNH = draw(heads.queries) * (segments_T > 0)[:, None, None]
    q_TNH = draw(heads.queries)
    return Case(dtype, q_TNH, draw(heads.keys), draw(heads.keys), do_TNH, segments_T)


def reference(case: Case) -> dict[str, np.ndarray]:
    """o, dq, dk and dv in float64, segment by segment; 0 in the padding."""
    found = {
        "o": np.zeros_like(case.q_TNH),
        "dq": np.zeros_like(case.q_TNH),
        "dk": np.zeros_like(case.k_TKH),
        "dv": np.zeros_like(case.v_TKH),
    }
    _, N, H = case.q_TNH.shape
    K = case.k_TKH.shape[1]
    for segment in range(1, case.segments_T.max() + 1):
        own = case.segments_T == segment
        q = case.q_TNH[own]
        k = np.repeat(case.k_TKH[own], N // K, axis=1)
        v = np.repeat(case.v_TKH[own], N // K, axis=1)
        do = case.do_TNH[own]

        scores = np.einsum("tnh,snh->nts", q, k) * H**-0.5
        scores[:, ~np.tri(len(q), dtype=bool)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        o = np.einsum("nts,snh->tnh", weights, v)

        dweights = np.einsum("tnh,snh->nts", do, v)
        delta_NT = np.einsum("tnh,tnh->nt", do, o)
        dscores = weights * (dweights - delta_NT[:, :, None]) * H**-0.5
        dk = np.einsum("nts,tnh->snh", dscores, q)
        dv = np.einsum("nts,tnh->snh", weights, do)
        found["o"][own] = o
        found["dq"][own] = np.einsum("nts,snh->tnh", dscores, k)
        # Each key/value head has the gradients of its query heads.
        found["dk"][own] = dk.reshape(len(q), K, N // K, H).sum(2)
        found["dv"][own] = dv.reshape(len(q), K, N // K, H).sum(2)
    return found


def compute(kernel: Callable[..., jax.Array], case: Case) -> dict[str, np.ndarray]:
    """o, dq, dk and dv of an implementation, as float64; its padding is 0 here."""
    dtype = jnp.dtype(case.dtype)

    def on_device(x: np.ndarray) -> jax.Array:
        return jnp.asarray(x[None], dtype)

    segments_BT = jnp.asarray(case.segments_T[None])

    @jax.jit
    def run(q: jax.Array, k: jax.Array, v: jax.Array, do: jax.Array) -> Any:
        o, back = jax.vjp(lambda *qkv: kernel(*qkv, segments_BT), q, k, v)
        return (o, *back(do))

    # In float32 a GPU would round to TF32; in bfloat16 it computes as a run does.
    precision = "highest" if case.dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        values = run(*map(on_device, (case.q_TNH, case.k_TKH, case.v_TKH, case.do_TNH)))
    is_real_T11 = (case.segments_T > 0)[:, None, None]
    arrays = [np.asarray(x[0]).astype(np.float64) for x in values]
    # NaN in the padding stays NaN, and fails.
    return {name: x * is_real_T11 for name, x in zip(("o", "dq", "dk", "dv"), arrays, strict=True)}


def relative_error(value: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(value - expected) / np.linalg.norm(expected))
