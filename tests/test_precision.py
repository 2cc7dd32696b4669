"""Which precision a run computes in, float32 classifiers, and the compiled backbone."""

from __future__ import annotations

import ctypes
import json
import platform
from pathlib import Path

import pytest
import torch
from torch import nn

import train
from networks import build_network
from utils.checkpoint import CheckpointError, load_checkpoint
from utils.training import precision
from utils.training.allocator import keep_freed_memory
from utils.training.compilation import compile_backbone
from utils.training.precision import cpu_flags, has_native_bf16, resolve_precision

pytestmark = pytest.mark.usefixtures("thin_trunk")

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("lines", "native"),
    (
        ("model name : some CPU\nflags\t\t: fpu avx2 avx512f avx512_bf16\n", True),
        ("flags\t\t: fpu amx_tile amx_bf16\n", True),
        ("Features\t: fp asimd i8mm bf16\n", True),
        ("flags\t\t: fpu avx2 avx512f\n", False),
        ("model name\t: avx512_bf16\n", False),  # no list of flags
        ("", False),
    ),
)
def test_processors_tell_whether_they_have_bf16(lines: str, native: bool, tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "cpuinfo"
    path.write_text(lines, encoding="utf-8")
    flags = cpu_flags(str(path))
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    assert has_native_bf16(CPU) == native
    assert resolve_precision("auto", CPU) == ("bf16" if native else "float32")


def test_a_system_that_does_not_tell_computes_in_float32(tmp_path: Path) -> None:
    assert cpu_flags(str(tmp_path / "absent")) == set()
    assert not has_native_bf16(torch.device("mps"))


@pytest.mark.parametrize("capability, native", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_from_ampere_on_have_bf16(capability: tuple, native: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert has_native_bf16(torch.device("cuda", 0)) == native


@pytest.mark.parametrize("name", ("float32", "bf16"))
def test_a_choice_is_left_alone(name: str) -> None:
    assert resolve_precision(name, CPU) == name


def test_what_auto_was_settled_to_belongs_to_the_run(tiny_run, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(precision, "cpu_flags", lambda: {"avx512_bf16"})
    arguments = tiny_run(tmp_path, "--precision", "auto", "--images_per_class", "1")
    train.main(arguments)
    folder = tmp_path / "folder-resnet"
    assert load_checkpoint(folder / "last.pth")["settings"]["precision"] == "bf16"
    assert json.loads((folder / "config.json").read_text(encoding="utf-8"))["precision"] == "bf16"
    train.main(arguments)  # the same again, which has nothing left to do
    monkeypatch.setattr(precision, "cpu_flags", lambda: set())
    with pytest.raises(CheckpointError, match=r"precision 'bf16' there and 'float32' here"):
        train.main(arguments)


def test_a_compiled_backbone_keeps_the_names_of_its_weights() -> None:
    network = build_network("resnet", num_classes=5, backbone="resnet18", input_size=96)
    names = list(network.state_dict())
    compile_backbone(network)
    assert list(network.state_dict()) == names
    with pytest.raises(ValueError, match="data_parallel"):
        compile_backbone(nn.DataParallel(network))


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch) -> None:
    assert keep_freed_memory() == (platform.libc_ver()[0] == "glibc")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())  # a C library without it
    assert not keep_freed_memory()
