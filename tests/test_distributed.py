"""Several processes: the same training as one, exact counts, and an end where one of them dies."""

from __future__ import annotations

import dataclasses
from functools import partial

import pytest
import torch
from launching import TORCHRUN, run_python, run_script, run_two_processes
from torch import nn
from whole_runs import read_log

from config import parse_settings
from datasets import evaluation_loader, load_catalogue, training_loader
from utils.checkpoint import load_checkpoint
from utils.errors import exit_with_one_sentence
from utils.training import distributed


def test_two_processes_train_as_one_with_the_doubled_batch(tiny_run, tmp_path):
    """In batches of 4, or of 2 in each process, one image after the other; of the 6 validation images, batches of 4 and
    2, or 3 and 3.
    """
    options = ("--epochs", "2", "--dropout", "0", "--learning_rate", "0.001", "--keep_checkpoints", "2")
    options += ("--ema_decay", "0.9")
    options += ("--frozen_trunk_epochs", "1")  # whose parameters are unused in the first epoch only
    runs = []
    for name, launch, more in (("one", run_script, ()), ("two", run_two_processes, ("--gradient_accumulation", "2"))):
        arguments = tiny_run(tmp_path / name, *options, "--seed", "3", *more)
        result = launch("tests/frozen_statistics.py", *arguments, thin=True)
        assert result.returncode == 0, result.stderr[-2000:]
        folder = tmp_path / name / "folder-resnet"
        runs.append([load_checkpoint(folder / f"epoch-00{epoch}.pth")["network"] for epoch in (1, 2)])
        runs[-1].append(read_log(folder))
    (early, one, log_of_one), (_, two, log_of_two) = runs
    for name, weights in one.items():
        change = (weights - early[name]).abs().max()
        assert (two[name] - weights).abs().max() <= 1e-2 * change, name
        assert change > 0 or "running" in name or "num_batches" in name, name
    for epoch_of_one, epoch_of_two in zip(log_of_one, log_of_two, strict=True):
        for name, value in epoch_of_one.items():
            if "images" in name and "per_second" not in name or name.startswith("validation/accuracy"):
                assert epoch_of_two[name] == value, name  # counts: no image twice
            elif "loss" in name:
                assert epoch_of_two[name] == pytest.approx(value, rel=1e-4), name
    assert (log_of_two[0]["train/images"], log_of_two[0]["validation/images"]) == (12, 6)


@pytest.mark.parametrize(
    "launch",
    [
        pytest.param(run_two_processes, id="forked"),
        pytest.param(partial(run_python, *TORCHRUN), id="by torchrun", marks=pytest.mark.slow),
    ],
)
def test_a_process_that_is_killed_ends_the_other_with_a_sentence(launch, tiny_run, tmp_path):
    arguments = tiny_run(tmp_path, "--epochs", "3", "--workers", "1")
    result = launch("tests/troubled_rank.py", "kill", "2", *arguments, timeout=100)
    assert result.returncode == (2 if launch is run_two_processes else 1)  # both processes failed
    assert result.stderr.count("error: another process of this run ended, or the connection to it broke") == 1
    assert "continues from its last checkpoint" in result.stderr
    assert "[rank0]: Traceback" not in result.stderr
    assert not (tmp_path / "folder-resnet" / "last.pth").exists()


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (torch.distributed.DistBackendError("NCCL error in: ProcessGroupNCCL.cpp:1"), True),
        (RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
    ],
)
def test_lost_connections_are_told_from_faults(error, ours, capsys):
    with pytest.raises(SystemExit if ours else RuntimeError), exit_with_one_sentence():
        raise error
    assert ("another process of this run ended" in capsys.readouterr().err) == ours


def test_synchronised_batch_norm_needs_processes_and_gpus(monkeypatch):
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    options = {"data_parallel": False, "sync_batch_norm": True}
    assert distributed.wrap_network(network, torch.device("cpu"), **options) is network  # a process alone
    monkeypatch.setattr(distributed, "is_distributed", lambda: True)
    with pytest.raises(
        ValueError, match="sync_batch_norm is True and the device is cpu: it needs GPUs, set it to False"
    ):
        distributed.wrap_network(network, torch.device("cpu"), **options)
    wrapped = []
    monkeypatch.setattr(nn.parallel, "DistributedDataParallel", lambda network, **o: wrapped.append(type(network[1])))
    for synchronised in (False, True):
        options["sync_batch_norm"] = synchronised
        distributed.wrap_network(network, torch.device("cuda", 0), **options)
    assert wrapped == [nn.BatchNorm2d, nn.SyncBatchNorm]


def test_a_gpu_that_was_asked_for_by_number_becomes_the_current_one(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for name in ("cpu", "cuda", "cuda:1"):
        distributed.choose_device(name)
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("auto", True), ("cuda:1", True), ("mps", False)])
@pytest.mark.parametrize("workers", ["0", "1"])
def test_batches_are_pinned_for_the_gpu_that_computes(monkeypatch, tiny_run, tmp_path, device, pinned, workers):
    settings = dataclasses.replace(parse_settings(tiny_run(tmp_path, "--workers", workers)), device=device)
    entries = load_catalogue(settings)[0].train
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaders = training_loader(settings, entries), evaluation_loader(settings, entries)
    assert [loader.pin_memory for loader in loaders] == [pinned, pinned]
