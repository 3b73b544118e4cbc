"""One token for each row from its logits: temperature, top-k, top-p, and a key of its own."""

import dataclasses

import jax
import jax.numpy as jnp

_BLOCK = 128  # vocabulary columns per block of the two-level draw


@dataclasses.dataclass(frozen=True)
class Truncation:
    """Tokens that may be drawn: the top_k likeliest (0: all), of these the likeliest that reach
    top_p together.

    Log-probs are those of the distribution that is left, since it is the one sampled from. The
    trainer computes its own over the whole vocabulary, which is lower by the log of the mass kept
    here, token by token: with a truncation the ratio of the two is no longer 1 for the same
    weights, and the objective should recompute the old log-probs.
    """

    top_k: int = 0
    top_p: float = 1.0

    def cut(self, logits_BV: jax.Array) -> jax.Array:
        """logits with -inf where a token may not be drawn. Equal logits at the border all stay."""
        if self.top_k:
            logits_BV = _keep(logits_BV, jnp.ones_like(logits_BV), float(self.top_k))
        if self.top_p < 1.0:
            logits_BV = _keep(logits_BV, jax.nn.softmax(logits_BV, axis=-1), self.top_p)
        return logits_BV


ALL_TOKENS = Truncation()


def _keep(logits_BV: jax.Array, mass_BV: jax.Array, minimum: float) -> jax.Array:
    """The largest logits whose mass reaches `minimum`, -inf for the others.

    The border is found by halving, since sorting is slow. Float bits, with those of negative
    numbers inverted, are integers in the same order: 32 halvings are exact.
    """
    bits = jax.lax.bitcast_convert_type(logits_BV, jnp.int32)
    order_BV = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    rows = logits_BV.shape[:1]

    def halve(_: int, border: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        # The mass from low_B on reaches `minimum`, that from high_B on does not.
        low_B, high_B = border
        middle_B = (low_B >> 1) + (high_B >> 1) + (low_B & high_B & 1)
        mass_B = jnp.where(order_BV >= middle_B[:, None], mass_BV, 0.0).sum(-1)
        enough_B = mass_B >= minimum
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    lowest_B = jnp.full(rows, -(2**31), jnp.int32)
    highest_B = jnp.full(rows, 2**31 - 1, jnp.int32)
    border_B, _ = jax.lax.fori_loop(0, 32, halve, (lowest_B, highest_B))
    return jnp.where(order_BV >= border_B[:, None], logits_BV, -jnp.inf)


def sample(
    logits_BV: jax.Array,
    key: jax.Array,
    uid_B: jax.Array,
    position_B: jax.Array,
    temperature_B: jax.Array,
    truncation: Truncation = ALL_TOKENS,
) -> tuple[jax.Array, jax.Array]:
    """Next tokens (int32) and their log-probs (float32), both [B].

    The key of a token is a function of (key, episode id, position) alone. Temperature 0 is greedy.

    Drawn by the Gumbel-max trick in two levels: a block of the vocabulary, then a token inside it.
    Exact, with V / 128 + 128 random numbers a row instead of V. Comparing perturbed log-probs (and
    not a random number with a running sum, which is cheaper still) makes rounding matter once in a
    million tokens, not once in a thousand: so a trajectory survives another batch size. Greedy rows
    take the block of the largest logit, and no noise.
    """
    B, V = logits_BV.shape
    is_sampled_B1 = (temperature_B > 0)[:, None]
    divisor_B1 = jnp.where(is_sampled_B1, temperature_B[:, None], 1.0)
    scaled_BV = truncation.cut(logits_BV / divisor_B1)
    padding = ((0, 0), (0, -V % _BLOCK))
    padded_BV = jnp.pad(scaled_BV, padding, constant_values=-jnp.inf)
    blocks_BUW = padded_BV.reshape(B, -1, _BLOCK)
    U = blocks_BUW.shape[1]

    def noise(uid: jax.Array, position: jax.Array) -> jax.Array:
        token_key = jax.random.fold_in(jax.random.fold_in(key, uid), position)
        return jax.random.gumbel(token_key, (U + _BLOCK,))

    # Numbers for the blocks, then for the tokens inside one.
    noise_B = jnp.where(is_sampled_B1, jax.vmap(noise)(uid_B, position_B), 0.0)

    # The block: by its log-prob, or by its largest logit.
    max_BU = jnp.max(blocks_BUW, axis=-1)
    max_B1 = jnp.max(max_BU, axis=-1, keepdims=True)
    mass_BU = jnp.sum(jnp.exp(blocks_BUW - max_B1[..., None]), axis=-1)
    total_B1 = max_B1 + jnp.log(mass_BU.sum(-1, keepdims=True))
    level_BU = jnp.where(is_sampled_B1, max_B1 + jnp.log(mass_BU) - total_B1, max_BU)
    block_B1 = jnp.argmax(level_BU + noise_B[:, :U], axis=-1, keepdims=True)

    # The token inside it.
    block_BW = jnp.take_along_axis(blocks_BUW, block_B1[..., None], axis=1)[:, 0]
    logp_BW = block_BW - total_B1
    column_B1 = jnp.argmax(logp_BW + noise_B[:, U:], axis=-1, keepdims=True)
    token_B1 = block_B1 * _BLOCK + column_B1
    logp_B1 = jnp.take_along_axis(logp_BW, column_B1, axis=-1)
    return token_B1[:, 0].astype(jnp.int32), logp_B1[:, 0]
