"""A batch shared among GPUs, without one: what each gets is cut as torch cuts it, and threads run on the CPU."""

from __future__ import annotations

import sys
import threading

import pytest
import torch
from torch import nn

from utils.training.replicas import Replicas


@pytest.fixture
def cut_on_the_cpu(monkeypatch) -> None:
    """Shares of tensors stay where they are."""

    def apply(devices, sizes, dimension, tensor):
        return tensor.chunk(len(devices), dimension)

    monkeypatch.setattr(torch.nn.parallel.scatter_gather.Scatter, "apply", apply)


@pytest.mark.usefixtures("cut_on_the_cpu")
@pytest.mark.parametrize(
    ("images", "gpus", "shares"), [(8, 4, [2, 2, 2, 2]), (9, 4, [3, 3, 3]), (6, 4, [2, 2, 2]), (1, 2, [1]), (5, 1, [5])]
)
def test_no_gpu_is_called_without_images(images, gpus, shares) -> None:
    network = Replicas(nn.Identity())
    network.dim = 0
    inputs, options = network.scatter(
        (torch.arange(images),),
        {"labels": torch.arange(images), "branches": ("raw", "object"), "mask_background": False, "boxes": None},
        list(range(gpus)),
    )
    assert [len(share) for (share,) in inputs] == shares
    assert torch.equal(torch.cat([share for (share,) in inputs]), torch.arange(images))
    assert [len(option["labels"]) for option in options] == shares
    rest = {"branches": ("raw", "object"), "mask_background": False, "boxes": None}
    assert all(option | rest == option for option in options)


@pytest.mark.parametrize(("dtype", "enabled"), [(torch.float16, True), (torch.bfloat16, True), (torch.float16, False)])
def test_threads_compute_in_the_precision_of_the_caller(monkeypatch, dtype, enabled) -> None:
    """A new thread of its own has autocast's default type."""

    def parallel_apply(modules, inputs, kwargs, devices):
        outputs = [None] * len(modules)

        def work(number: int) -> None:
            with torch.autocast("cpu", enabled=True):  # as torch's threads do where it is enabled
                outputs[number] = modules[number](*inputs[number], **kwargs[number])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(len(modules))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outputs

    monkeypatch.setattr(sys.modules[nn.DataParallel.__module__], "parallel_apply", parallel_apply)
    network = Replicas(nn.Identity())
    network.device_ids, network.src_device_obj = [0, 1], torch.device("cpu")
    layers = [nn.Linear(4, 4), nn.Linear(4, 4)]
    with torch.autocast("cpu", dtype=dtype, enabled=enabled):
        outputs = network.parallel_apply(layers, [(torch.ones(2, 4),)] * 2, [{}] * 2)
    assert [output.dtype for output in outputs] == [dtype if enabled else torch.float32] * 2
