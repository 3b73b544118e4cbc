"""The command line and config files, checked before any JAX work; one sentence for each mistake.

A config file is Python with `get_config() -> ConfigDict`; it starts from configs/default.py, which
owns every key. `--config.SECTION.KEY=VALUE` overrides one key, through ml_collections.config_flags.
"""
