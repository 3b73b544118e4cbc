"""ssp_jax: Search Self-Play (arXiv 2510.18821) as one JAX program.

Letters in array names, the same in every file: B rows in a batch, T tokens (t query / T key time),
S cache length, V vocabulary, D model width, L layers, N query heads, K key/value heads, R query
heads per key/value head (N = K * R), H head size, F feed-forward width, P tasks in a step, Q
questions that survived verification, G attempts per question, E episodes.

Sources in docstrings and comments: [P] the paper, arXiv 2510.18821v1; [C] its reference code; [H]
our own choice.
"""
