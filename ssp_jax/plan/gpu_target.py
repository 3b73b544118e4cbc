"""What XLA's compiler wants to know of a GPU that is not there, as its GpuTargetConfig in text."""

import dataclasses

from ssp_jax.plan.hardware import Chip

# CUDA and cuDNN of the target: what jax-cuda12-plugin 0.10.2 asks for at least, with the CUDA that
# knows the B200.
_CUDA = (12, 8, 0)
_CUDNN = (9, 8, 0)


@dataclasses.dataclass(frozen=True)
class _Limits:
    """Of a streaming multiprocessor."""

    threads: int
    shared_kib: int  # shared memory
    lanes: int  # float32 operations of a clock
    name: str  # of a GPU that has these, as JAX 0.12 knows it: it lowers a kernel for what has one


# By compute capability. Source: CUDA C++ Programming Guide, table of technical specifications, and
# its table of throughput for the lanes.
_LIMITS = {
    (7, 5): _Limits(1024, 64, 64, "Tesla T4"),
    (8, 0): _Limits(2048, 164, 64, "NVIDIA A100"),
    (8, 9): _Limits(1536, 100, 128, "NVIDIA L4"),
    (9, 0): _Limits(2048, 228, 128, "NVIDIA H100"),
    (10, 0): _Limits(2048, 228, 128, "NVIDIA B200"),
}
_REGISTERS = 65536  # of a multiprocessor and of a block, for all of these
_SHARED_OF_BLOCK = 48 * 1024  # without an opt-in
# Shared memory that CUDA keeps of each block from compute capability 8.0 on.
_RESERVED = 1024


def target_config(chip: Chip) -> str:
    """The text for one GPU."""
    gpu = chip.gpu
    assert gpu is not None
    major, minor = gpu.capability
    limits = _LIMITS[gpu.capability]
    shared = limits.shared_kib * 1024
    device = {
        "threads_per_block_limit": 1024,
        "threads_per_warp": 32,
        "threads_per_core_limit": limits.threads,
        "block_dim_limit_x": 2**31 - 1,
        "block_dim_limit_y": 2**16 - 1,
        "block_dim_limit_z": 2**16 - 1,
        "shared_memory_per_block": _SHARED_OF_BLOCK,
        "shared_memory_per_block_optin": shared - (_RESERVED if major >= 8 else 0),
        "shared_memory_per_core": shared,
        "registers_per_core_limit": _REGISTERS,
        "registers_per_block_limit": _REGISTERS,
        "core_count": gpu.processors,
        "fpus_per_core": limits.lanes,
        "clock_rate_ghz": gpu.clock,
        "l2_cache_size": gpu.l2,
        "memory_bandwidth": int(chip.bandwidth),
        "device_memory_size": int(gpu.memory),
    }
    lines = [f"  {name}: {value}" for name, value in device.items()]
    return "\n".join(
        [
            "gpu_device_info {",
            *lines,
            f"  cuda_compute_capability {{ major: {major} minor: {minor} }}",
            "}",
            'platform_name: "CUDA"',
            f'device_description_str: "{limits.name}"',
            "runtime_version {{ major: {} minor: {} patch: {} }}".format(*_CUDA),
            "dnn_version_info {{ major: {} minor: {} patch: {} }}".format(*_CUDNN),
        ]
    )
