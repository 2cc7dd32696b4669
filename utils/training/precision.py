"""Which arithmetic a device has in hardware."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.training.distributed import any_process

NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 twice, 64-bit ARM; as Linux lists them


def resolve_precision(name: str, device: torch.device) -> str:
    """Turn the setting `precision` into "float32" or "bf16"; "auto" is bf16 where `device` computes it natively."""
    if name != "auto":
        return name
    return "bf16" if has_native_bf16(device) else "float32"


def agreed_precision(name: str, device: torch.device) -> str:
    """The same for a run of several processes: float32 where one of them has no other. All of them have to ask."""
    here = resolve_precision(name, device)
    return "float32" if any_process(here == "float32", device) else here


def has_native_bf16(device: torch.device) -> bool:
    """True where bfloat16 is computed by the hardware and not imitated, which is slower than float32.

    NVIDIA GPUs from compute capability 8.0 on (Ampere, 2020); AMD's GPUs where PyTorch says so; CPUs with AVX512-BF16,
    AMX or ARM's BF16 instructions. False where the operating system does not tell (other than Linux), and for other
    devices.
    """
    if device.type == "cuda":
        if torch.version.hip is not None:
            return torch.cuda.is_bf16_supported()
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and not NATIVE_BF16_FLAGS.isdisjoint(cpu_flags())


def cpu_flags(path: str = "/proc/cpuinfo") -> set[str]:
    """The instruction sets of this machine's CPU as Linux names them; empty where it does not tell."""
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return set()
    return {
        flag
        for line in lines
        if line.partition(":")[0].strip() in ("flags", "Features")
        for flag in line.partition(":")[2].split()
    }
