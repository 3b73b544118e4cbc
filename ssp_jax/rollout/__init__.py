"""Tokens, fast: the slot engine, the compiled sampler, the key-value cache, exact stops.

It knows nothing of search.
"""
