"""Matrix products and the linear layer; on CPUs with kernels transposed for the few rows of a
decode step.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

# rows up to which they are packed, and not the weight: more, and it is no longer faster
SKINNY_ROWS = 128


def _product(num_in: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    axes = (tuple(range(x.ndim - num_in, x.ndim)), tuple(range(num_in)))
    return jax.lax.dot_general(x, kernel.astype(x.dtype), (axes, ((), ())))


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
    num_in: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    dy = jax.lax.optimization_barrier(dy)
    lead, num_out = tuple(range(x.ndim - num_in)), kernel.ndim - num_in
    out = (tuple(range(dy.ndim - num_out, dy.ndim)), tuple(range(num_in, kernel.ndim)))
    dx = jax.lax.dot_general(dy, kernel.astype(dy.dtype), (out, ((), ())))

    def gradient(a: jax.Array, b: jax.Array) -> jax.Array:
        return jax.lax.dot_general(
            a, b, ((lead, lead), ((), ())), preferred_element_type=kernel.dtype
        )

    def swapped(a: jax.Array, b: jax.Array) -> jax.Array:
        flipped = jax.lax.optimization_barrier(gradient(b, a))  # else XLA swaps them back
        return jnp.transpose(flipped, (*range(num_out, kernel.ndim), *range(num_out)))

    if x.size <= dy.size:
        return dx, gradient(x, dy)
    return dx, jax.lax.platform_dependent(x, dy, cpu=swapped, default=gradient)


contract.defvjp(_contract_forward, _contract_backward)


def skinny_matmul(x_XI: jax.Array, weight_OI: jax.Array, dtype: Any) -> jax.Array:
    """x @ weight.T on a CPU, the weight in front and x turned beforehand: with few rows Eigen then
    packs what is small.

    Barriers keep XLA from turning it back into x @ W.T, which takes 1.6 times as long (8 rows,
    151,936 x 896).
    """
    x_IX = jax.lax.optimization_barrier(x_XI.T)
    product = jax.lax.dot_general(
        weight_OI, x_IX, (((1,), (0,)), ((), ())), preferred_element_type=dtype
    )
    return jax.lax.optimization_barrier(product).T


def matmul(x_XI: jax.Array, weight_OI: jax.Array, dtype: Any) -> jax.Array:
    return jax.lax.dot_general(
        x_XI, weight_OI, (((1,), (1,)), ((), ())), preferred_element_type=dtype
    )


def _transposed_product(num_in: int, x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The last num_in axes of x with the last of the kernel."""
    lead, out, size = x.shape[:-num_in], kernel.shape[:-num_in], math.prod(x.shape[-num_in:])
    x_XI, kernel_OI = x.reshape(-1, size), kernel.reshape(-1, size)
    product = skinny_matmul if len(x_XI) <= SKINNY_ROWS else matmul
    return product(x_XI, kernel_OI, x.dtype).reshape(lead + out)


class Linear(nnx.Module):
    """Contracts the last `len(in_shape)` axes of x with a kernel of shape in_shape + out_shape,
    plus a bias.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        rngs: nnx.Rngs,
        bias: bool = False,
        gain: float = 1.0,
    ):
        std = gain / math.sqrt(math.prod(in_shape))
        self.kernel = nnx.Param(
            std * jax.random.normal(rngs.params(), in_shape + out_shape, jnp.float32)
        )
        if bias:
            self.bias = nnx.Param(jnp.zeros(out_shape, jnp.float32))
        self.num_in, self.use_bias, self.is_transposed = len(in_shape), bias, False

    def transpose_kernel(self) -> None:
        """Puts the axes that are contracted behind the others; see `turned`."""
        self.transposed = nnx.Param(
            jnp.moveaxis(self.kernel[...], range(self.num_in), range(-self.num_in, 0))
        )
        self.is_transposed = True
        del self.kernel

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.is_transposed:
            y = _transposed_product(self.num_in, x, self.transposed[...])
        else:
            y = contract(self.num_in, x, self.kernel[...])
        if self.use_bias:
            bias = self.bias[...].astype(x.dtype)
            y = y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)
        return y
