"""Matrix products and the linear layer, with LoRA, and with transposed kernels for CPU decoding."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

# Up to so many rows skinny_matmul packs the rows and not the weight; with more it is no faster.
SKINNY_ROWS = 128
# The name, for remat policies, of the sum of a frozen product and its adapter's.
KEPT = "with_adapter"


def _product(num_in: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    x_axes = tuple(range(x.ndim - num_in, x.ndim))
    kernel_axes = tuple(range(num_in))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), ((x_axes, kernel_axes), ((), ())))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def contract(num_in: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The last num_in axes of x with the first of the kernel, in the dtype of x.

    The gradient of the kernel comes in the kernel's own dtype, so a float32 master weight never
    sees a rounded one. It is one product of an output gradient that is made once: left alone, XLA's
    CPU backend writes a transposed copy of it, computed again from its inputs (measured: twice the
    time of the layer). That backend also copies the first factor, transposed: there the smaller one
    comes first.
    """
    return _product(num_in, x, kernel)


def _contract_forward(
    num_in: int, x: jax.Array, kernel: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    # plain, so that a remat policy sees the product
    return _product(num_in, x, kernel), (x, kernel)


def _contract_backward(
    num_in: int, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = residuals
    dy = jax.lax.optimization_barrier(dy)
    num_out = kernel.ndim - num_in

    # dx: dy with the kernel, over the output axes
    dy_out = tuple(range(dy.ndim - num_out, dy.ndim))
    kernel_out = tuple(range(num_in, kernel.ndim))
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), ((dy_out, kernel_out), ((), ())))

    # dkernel: x with dy, over the axes in front
    leading = tuple(range(x.ndim - num_in))

    def product(a: jax.Array, b: jax.Array) -> jax.Array:
        dimensions = ((leading, leading), ((), ()))
        return jax.lax.dot_general(a, b, dimensions, preferred_element_type=kernel.dtype)

    def swapped(a: jax.Array, b: jax.Array) -> jax.Array:
        flipped = jax.lax.optimization_barrier(product(b, a))  # else XLA swaps them back
        return jnp.transpose(flipped, (*range(num_out, kernel.ndim), *range(num_out)))

    if x.size <= dy.size:
        return dx, product(x, dy)
    return dx, jax.lax.platform_dependent(x, dy, cpu=swapped, default=product)


contract.defvjp(_contract_forward, _contract_backward)


def skinny_matmul(x_XI: jax.Array, weight_OI: jax.Array, dtype: Any) -> jax.Array:
    """x @ weight.T [X, O] on a CPU, for few rows of x.

    The weight is the first factor, and x is transposed beforehand: so Eigen packs x and not the
    weight. Barriers keep XLA from turning it back into x @ W.T, which takes 1.6 times as long
    (8 rows, 151,936 x 896).
    """
    x_IX = jax.lax.optimization_barrier(x_XI.T)
    dimensions = (((1,), (0,)), ((), ()))
    product_OX = jax.lax.dot_general(weight_OI, x_IX, dimensions, preferred_element_type=dtype)
    return jax.lax.optimization_barrier(product_OX).T


def matmul(x_XI: jax.Array, weight_OI: jax.Array, dtype: Any) -> jax.Array:
    """x @ weight.T, [X, O]."""
    dimensions = (((1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_XI, weight_OI, dimensions, preferred_element_type=dtype)


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters (LoRA, arXiv 2106.09685): a layer computes W x + scale * B A x."""

    rank: int
    alpha: float
    targets: tuple[str, ...]  # layers that have one, by their names in PEFT: keys of PROJECTIONS
    rank_stabilized: bool = False  # rsLoRA (arXiv 2312.03732)

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float) -> jax.Array:
    """kernel + scale * A B in float32: the kernel of a layer that computes what both compute.

    a: [*in_shape, Y]. b: [Y, *out_shape].
    """
    axes = (((a.ndim - 1,), (0,)), ((), ()))
    a32 = a.astype(jnp.float32)
    b32 = b.astype(jnp.float32)
    # else TPUs multiply in bfloat16
    product = jax.lax.dot_general(a32, b32, axes, precision=jax.lax.Precision.HIGHEST)
    return kernel.astype(jnp.float32) + scale * product


# Names of the two leaves that a layer with an adapter has beside its kernel: A and B.
LORA_LEAVES = ("lora_a", "lora_b")


class Linear(nnx.Module):
    """Contracts the last len(in_shape) axes of x with a kernel of in_shape + out_shape.

    lora: adds A [*in_shape, Y] and B [Y, *out_shape]. They start as in PEFT: A uniform, B zero.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        rngs: nnx.Rngs,
        bias: bool = False,
        gain: float = 1.0,
        lora: Lora | None = None,
    ):
        fan_in = math.prod(in_shape)
        std = gain / math.sqrt(fan_in)
        shape = in_shape + out_shape
        key = rngs.params()
        self.kernel = nnx.Param(std * jax.random.normal(key, shape, jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_shape, jnp.float32))
        if lora is not None:
            bound = 1 / math.sqrt(fan_in)
            a_shape = (*in_shape, lora.rank)
            # A key made from the kernel's: kernels are the same with and without adapters.
            key = jax.random.fold_in(key, 1)
            a = jax.random.uniform(key, a_shape, jnp.float32, minval=-bound, maxval=bound)
            self.lora_a = nnx.Param(a)
            self.lora_b = nnx.Param(jnp.zeros((lora.rank, *out_shape), jnp.float32))
        self.num_in = len(in_shape)
        self.use_bias = bias
        self.lora_scale = None if lora is None else lora.scale

    def product(self, x: jax.Array) -> jax.Array:
        return contract(self.num_in, x, self.kernel[...])

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.product(x)
        if self.lora_scale is not None:
            # Not merged into the kernel: in bfloat16 the sum would round most of an update away.
            low_rank = contract(self.num_in, x, self.lora_a[...])
            y = y + contract(1, self.lora_scale * low_rank, self.lora_b[...])
            # A policy that keeps products keeps both of them where it does not keep their sum.
            y = checkpoint_name(y, KEPT)
        if self.use_bias:
            bias = self.bias[...].astype(x.dtype)
            leading = (1,) * (y.ndim - bias.ndim)
            y = y + bias.reshape(leading + bias.shape)
        return y


def transpose(kernel: jax.Array, num_in: int) -> jax.Array:
    """The kernel with its num_in contracted axes last."""
    return jnp.moveaxis(kernel, range(num_in), range(-num_in, 0))


def transpose_back(transposed: jax.Array, num_in: int) -> jax.Array:
    """The kernel that `transpose` was given."""
    return jnp.moveaxis(transposed, range(-num_in, 0), range(num_in))


class TransposedLinear(Linear):
    """The same with the contracted axes last in its kernel: see decoder.transpose_kernels."""

    def __init__(self, linear: Linear):
        self.num_in = linear.num_in
        self.use_bias = linear.use_bias
        self.lora_scale = linear.lora_scale
        self.transposed = nnx.Param(transpose(linear.kernel[...], linear.num_in))
        if linear.use_bias:
            self.bias = linear.bias
        if linear.lora_scale is not None:
            self.lora_a = linear.lora_a
            self.lora_b = linear.lora_b

    def product(self, x: jax.Array) -> jax.Array:
        kernel = self.transposed[...]
        out_shape = kernel.shape[: -self.num_in]
        size = math.prod(x.shape[-self.num_in :])
        x_XI = x.reshape(-1, size)
        kernel_OI = kernel.reshape(-1, size)
        multiply = skinny_matmul if len(x_XI) <= SKINNY_ROWS else matmul
        y_XO = multiply(x_XI, kernel_OI, x.dtype)
        return y_XO.reshape(x.shape[: -self.num_in] + out_shape)
