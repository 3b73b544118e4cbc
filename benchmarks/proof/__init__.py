"""The checks of benchmarks/gpu_proof.py, a module each, or two that share their shapes."""
