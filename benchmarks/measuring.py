"""What the benchmarks share: interleaved timing, memory, and a description of the machine."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torchvision

PROJECT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(PROJECT))  # `python benchmarks/NAME.py` looks for modules beside the script only

from utils.files import write_text  # noqa: E402

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: str = "wall",
    before: Callable[[str], object] | None = None,
) -> dict[str, dict]:
    """Time each variant once per round, in turn, so that a change of the machine's load meets all of them alike.

    A first round warms up and is not counted, nor is `before`, which is called with the name of what comes. `clock`
    "cpu" counts this process's processor time, which on a machine shared with others leaves out the waiting for a
    core: for one thread and no GPU, where it is what the wall clock would show on a machine of one's own. Returns, by
    name, `seconds` (one per round), their `median` and `minimum`, and `peak_memory_mib`: on a GPU what the variant
    allocated at most, on Linux the process's largest resident size while it ran (all that was there before included),
    else None.
    """
    results = {name: {"seconds": []} for name in variants}
    gc.collect()
    gc.disable()
    try:
        for round_number in range(rounds + 1):
            for name, variant in variants.items():
                if before is not None:
                    before(name)
                if round_number == 0:
                    reset_peak_memory(device)
                synchronize(device)
                start = CLOCKS[clock]()
                variant()
                synchronize(device)
                seconds = CLOCKS[clock]() - start
                if round_number == 0:
                    results[name]["peak_memory_mib"] = peak_memory(device)
                else:
                    results[name]["seconds"].append(seconds)
    finally:
        gc.enable()
    for result in results.values():
        result |= {"median": statistics.median(result["seconds"]), "minimum": min(result["seconds"])}
    return results


def ratio(numerator: Mapping, denominator: Mapping) -> float:
    """The median, over the rounds, of the ratio of two variants' times in the same round.

    Nearer together in time than two medians, so that a machine shared with others disturbs it less.
    """
    pairs = zip(numerator["seconds"], denominator["seconds"], strict=True)
    return statistics.median(above / below for above, below in pairs)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return


def peak_memory(device: torch.device) -> float | None:
    """MiB since `reset_peak_memory`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), None)
    return None if line is None else int(line.split()[1]) / 1024


def machine(device: torch.device) -> dict[str, object]:
    """Where and with what this was measured."""
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "load_average": load_average(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "largest_resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.machine()


def load_average() -> float | None:
    """Processes that wanted a core in the last minute: above the count of cores, the figures are disturbed."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def write_json(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=2) + "\n")
