"""ssp_jax: Search Self-Play (arXiv 2510.18821) as one JAX program.

Letters at the end of array names, one per axis (logits_BTV), the same in every file:
  B  rows of a batch, or slots
  M  rows of one call to the sampler (prefill)
  T  tokens (in einsum strings t of queries, T or s of keys)
  S  cache length
  V  vocabulary
  D  model width
  L  layers
  N  query heads
  K  key/value heads
  R  query heads per key/value head (N = K * R)
  H  head size
  F  feed-forward width
  C  a chunk: decode steps, or positions whose logits exist at once
  A  states of the stop automaton
  J  later pieces of the cache
  U  blocks of the vocabulary
  W  columns of a window: a block of the vocabulary, or what is written into the cache
  X  all leading axes as one
  I  inputs of a matrix product
  O  outputs of a matrix product
  E  episodes
  P  tasks of a step
  Q  questions that survived verification
  G  attempts per question
  Y  rank of a LoRA adapter
  Z  draws of the bootstrap
A number is an axis of that size (max_B1, next_A256).

Sources in docstrings and comments: [P] the paper, arXiv 2510.18821v1; [C] its reference code; [H]
our own choice.
"""
