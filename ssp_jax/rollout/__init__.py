"""Tokens, fast: the slot engine, the compiled sampler, the key-value cache, exact stops. Knows
nothing of search.
"""
