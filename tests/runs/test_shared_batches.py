"""Batches that several processes or GPUs share."""

from __future__ import annotations

import shutil
from functools import partial
from types import SimpleNamespace

import pytest
from launching import TORCHRUN, run_python, run_two_processes
from torch import nn
from whole_runs import read_log

import train
from utils.checkpoint import load_checkpoint
from utils.errors import UserError
from utils.training.building import check_shares
from utils.training.distributed import unwrap


@pytest.mark.parametrize("model", ["pmg", "mcloss"])
def test_two_processes_that_get_one_image_each_are_refused_where_heads_normalise_over_images(
    tiny_run, tmp_path, monkeypatch, model
):
    monkeypatch.setattr(train, "world_size", lambda: 2)
    with pytest.raises(UserError, match="gets 1 training image and needs 2") as refusal:
        train.main(tiny_run(tmp_path, "--batch_size", "2", model=model))
    assert len(str(refusal.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("batch_size", "images", "gpus", "smallest"),
    [(2, 9, 1, 2), (1, 9, 1, 1), (4, 1, 1, 1), (8, 9, 4, 2), (4, 9, 4, 1), (5, 9, 3, 1), (9, 9, 4, 3), (6, 9, 2, 3)],
)
def test_the_smallest_share_of_a_batch_is_that_of_the_last_gpu(batch_size, images, gpus, smallest):
    """As torch's scatter cuts a batch; a training set below `batch_size` is one batch."""
    network = nn.Module() if gpus == 1 else nn.DataParallel(nn.Module())
    (network if gpus == 1 else network.module).smallest_batch = smallest
    network.device_ids = list(range(gpus))
    loader = SimpleNamespace(batch_size=batch_size, sampler=range(images))
    check_shares(network, loader)
    unwrap(network).smallest_batch = smallest + 1
    with pytest.raises(UserError, match=f"gets {smallest} training image"):
        check_shares(network, loader)
    unwrap(network).norm = nn.SyncBatchNorm(1)
    check_shares(network, loader)


@pytest.mark.parametrize(
    ("model", "launch"),
    [
        pytest.param("resnet", partial(run_python, *TORCHRUN), id="resnet by torchrun", marks=pytest.mark.slow),
        ("scrim", partial(run_two_processes, thin=True)),
        pytest.param("apinet", partial(run_two_processes, thin=True), marks=pytest.mark.slow),
        pytest.param("ntsnet", partial(run_two_processes, thin=True), marks=pytest.mark.slow),
    ],
)
def test_two_processes_train_and_evaluate_together(model, launch, tiny_run, picture_tree, tmp_path):
    """With a single image to select on: the second process has none, and must not keep the first one waiting."""
    tree = tmp_path / "tree"
    shutil.copytree(picture_tree, tree / "train")
    (tree / "test" / "red").mkdir(parents=True)
    shutil.copy(picture_tree / "red" / "0.png", tree / "test" / "red")
    options = ("--data_root", str(tree), "--select_on", "test", "--warmup_epochs", "0")
    arguments = tiny_run(tmp_path, *options, model=model)
    result = launch("train.py", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    folder = tmp_path / f"folder-{model}"
    (line,) = read_log(folder)
    assert line["test/images"] == 1
    assert line["train/images"] == 24  # all of them: the test images choose, so none is held back
    assert result.stdout.count("epoch 1/1") == 1
    assert result.stdout.count("done") == 1
    weights = load_checkpoint(folder / "last.pth")["network"]
    assert not [name for name in weights if name.startswith("module.")]


def test_a_batch_that_processes_cannot_share_is_refused(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "world_size", lambda: 4)
    for options, words in (
        (("--batch_size", "6"), ["6", "4"]),
        (("--images_per_class", "2"), ["4", "images_per_class 2"]),
    ):
        with pytest.raises(UserError) as refusal:
            train.main(tiny_run(tmp_path, *options))
        assert all(word in str(refusal.value) for word in words)
    assert list(tmp_path.iterdir()) == []
