"""Which arithmetic a device has in hardware."""

from __future__ import annotations

from pathlib import Path

import torch

from utils.options import SettingsError
from utils.training.distributed import any_process

NATIVE_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # x86 twice, 64-bit ARM; as Linux lists them


def resolve_precision(name: str, device: torch.device) -> str:
    """Turn the setting `precision` into "float32", "bf16" or "fp16"; "auto" is bf16 where `device` has it natively.

    fp16 is for CUDA's GPUs, and "auto" elsewhere: others imitate it, or have no scaled loss.
    """
    if name != "auto" and (name != "fp16" or device.type == "cuda"):
        return name
    return "bf16" if has_native_bf16(device) else "float32"


def agreed_precision(name: str, device: torch.device) -> str:
    """The same for a run of several processes: float32 where one of them has no other. All of them have to ask.

    Raises SettingsError for fp16 where a run cannot be trained in it.
    """
    if name == "fp16" and device.type != "cuda":
        raise SettingsError(f"precision is 'fp16'; expected 'float32', 'bf16' or 'auto' on {device}: only GPUs have it")
    here = resolve_precision(name, device)
    return "float32" if any_process(here == "float32", device) else here


def note_on_fp16(given: str, settled: str, device: torch.device) -> str | None:
    """Return what to say where "auto" is float32 on a GPU of NVIDIA's that has units for fp16: Volta and Turing."""
    if given != "auto" or settled != "float32" or device.type != "cuda" or torch.version.hip is not None:
        return None
    if not (7, 0) <= torch.cuda.get_device_capability(device) < (8, 0):
        return None
    return "this GPU has no bf16, so that precision auto is float32; --precision fp16 may be several times as fast"


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
