"""What only a GPU can show. Without one everything here is skipped, and pytest says so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import Augmentation
from networks import MODELS, build_network
from networks.folding import fold_batch_norm
from utils.training.averaging import Average
from utils.training.compilation import compile_backbone
from utils.training.execution import HALF_PRECISIONS, Execution
from utils.training.loss_scale import build_loss_scale
from utils.training.precision import has_native_bf16
from utils.training.replicas import Replicas
from utils.training.targets import build_mixing

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

CLASSES, SIZE = 5, 128


def build(model: str) -> nn.Module:
    torch.manual_seed(0)
    network = build_network(model, num_classes=CLASSES, backbone="resnet18", input_size=SIZE)
    for name, parameter in network.backbone.named_parameters():
        if name.endswith("bn2.weight"):
            nn.init.constant_(parameter, 0.3)
    return network.cuda()


def pictures(batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    blobs = F.interpolate(torch.randn(batch, 3, 5, 5, generator=generator), size=(SIZE, SIZE), mode="bicubic")
    return (1.5 * blobs + 0.3 * torch.randn(batch, 3, SIZE, SIZE, generator=generator)).cuda()


@pytest.mark.parametrize("precision", ("float32", "bf16"))
@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("model", MODELS)
def test_the_host_never_waits_for_the_device(model: str, training: bool, precision: str) -> None:
    """In the forward pass, the loss, the backward pass and the optimizer's step; folded where it only predicts."""
    network = build(model).train() if training else fold_batch_norm(build(model))
    execution = Execution(torch.device("cuda"), precision)
    images, labels = execution.images(pictures()), torch.tensor([0, 0, 1, 1]).cuda()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)

    def step() -> None:
        with execution.autocast(), torch.set_grad_enabled(training):
            output = network(images)
        if training:
            optimizer.zero_grad()
            sum(network.losses(output, labels).values()).backward()
            optimizer.step()
        else:
            network.predict_logits(output)

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_host_does_not_wait_for_augmented_pictures() -> None:
    execution = Execution(torch.device("cuda"), "bf16")
    images = torch.randint(0, 256, (4, 3, SIZE, SIZE), generator=torch.Generator().manual_seed(1)).to(torch.uint8)
    generator = np.random.default_rng(0)
    augment = Augmentation(crop_scale=0.5, rotation=20.0, saturation=0.3, erasing=1.0)
    rows = torch.stack([augment.draw(generator) for _ in range(4)])
    pinned = images.pin_memory(), rows.pin_memory()
    execution.images(*pinned)  # constants are copied once
    torch.cuda.set_sync_debug_mode("error")
    try:
        with execution.autocast():
            found = execution.images(*pinned)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = Execution(torch.device("cpu")).images(images, rows)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("alphas", ((0.2, 0.0), (0.0, 1.0), (0.2, 1.0)))
def test_the_host_does_not_wait_for_mixed_pictures_nor_for_an_average(alphas: tuple[float, float]) -> None:
    network, images, labels = build("resnet"), pictures(), torch.tensor([0, 3, 1, 1]).cuda()
    mix, average = build_mixing(CLASSES, mixup=alphas[0], cutmix=alphas[1]), Average(network, 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for seed in range(4):  # the first update of the average copies
            torch.manual_seed(seed)
            found = mix(images, labels)
            average.update_parameters(network)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.manual_seed(3)
    expected = mix(images.cpu(), labels.cpu())
    torch.testing.assert_close([value.cpu() for value in found], list(expected))


@pytest.mark.parametrize("precision", HALF_PRECISIONS)
@pytest.mark.parametrize("model", MODELS)
def test_steps_in_mixed_precision_are_finite(model: str, precision: str) -> None:
    if precision == "bf16" and not has_native_bf16(torch.device("cuda")):
        pytest.skip("needs bf16")
    network = build(model).train().to(memory_format=torch.channels_last)
    execution = Execution(torch.device("cuda"), precision)
    optimizer, loss_scale = torch.optim.SGD(network.parameters(), lr=1e-3), build_loss_scale(execution)
    before = [parameter.detach().clone() for parameter in network.parameters()]
    for _ in range(12):  # the first ones in fp16 may be left out, until the scale of the loss is small enough
        optimizer.zero_grad()
        with execution.autocast():
            output = network(execution.images(pictures()))
        terms = network.losses(output, torch.tensor([0, 0, 1, 1]).cuda())
        loss_scale.scale(sum(terms.values())).backward()
        loss_scale.step(optimizer)
        loss_scale.update()
    assert all(torch.isfinite(term) for term in terms.values())
    assert not all(torch.equal(*pair) for pair in zip(before, network.parameters(), strict=True))
    assert all(torch.isfinite(parameter).all() for parameter in network.parameters())
    assert all(logits.dtype == torch.float32 for logits in output.logits.values())


def devices_of(count: int) -> list[int]:
    """As many GPUs, or the same one several times."""
    return [number % torch.cuda.device_count() for number in range(count)]


@pytest.mark.parametrize("model", MODELS)
def test_two_replicas_predict_as_one_network(model: str) -> None:
    network, images = build(model).eval(), pictures(5)
    parallel = Replicas(network, device_ids=devices_of(2))
    with torch.no_grad():
        whole, shared = network(images), parallel(images)
    for name, logits in whole.logits.items():
        torch.testing.assert_close(shared.logits[name], logits, rtol=1e-3, atol=1e-3)
    for field in ("object_boxes", "window_boxes", "object_masks"):
        if getattr(whole, field) is not None:
            assert torch.equal(getattr(shared, field), getattr(whole, field))


@pytest.mark.parametrize("model", MODELS)
def test_two_replicas_learn_as_one_network(model: str) -> None:
    """The same gradients, with batch norm and dropout in evaluation mode: each replica would have its own."""
    images, labels = pictures(4), torch.tensor([0, 0, 1, 1]).cuda()
    gradients = []
    for parallel in (False, True):
        network = build(model).eval()
        wrapped = Replicas(network, device_ids=devices_of(2)) if parallel else network
        sum(network.losses(wrapped(images), labels).values()).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    alone, shared = gradients
    assert alone.keys() == shared.keys()
    for name, gradient in alone.items():
        torch.testing.assert_close(shared[name], gradient, rtol=1e-2, atol=1e-3 * gradient.abs().max().item() + 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_replicas_compute_in_the_precision_of_their_caller(dtype: torch.dtype) -> None:
    """Five pictures on four GPUs are three shares."""
    seen = []

    class Recording(nn.Linear):
        def forward(self, images: torch.Tensor, *, branches: tuple[str, ...]) -> torch.Tensor:
            output = super().forward(images)
            seen.append((len(images), output.dtype, branches))
            return output

    network = Replicas(Recording(4, 4).cuda(), device_ids=devices_of(4))
    with torch.autocast("cuda", dtype=dtype):
        output = network(torch.ones(5, 4, device="cuda"), branches=("raw",))
    assert sorted(seen, key=str) == [(1, dtype, ("raw",)), (2, dtype, ("raw",)), (2, dtype, ("raw",))]
    assert (len(output), output.dtype) == (5, dtype)


def test_a_compiled_backbone_predicts_as_before() -> None:
    network, images = build("sgkrl").eval(), pictures()
    with torch.no_grad():
        expected = network(images).logits
        compile_backbone(network)
        found = network(images).logits
    for name, logits in expected.items():
        torch.testing.assert_close(found[name], logits, rtol=1e-2, atol=1e-2)


def test_graphics_memory_is_given_back_between_batches() -> None:
    """The third training step needs no more than the second."""
    network = build("sgkrl").train()
    images, labels = pictures(), torch.tensor([0, 0, 1, 1]).cuda()
    peaks = []
    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        sum(network.losses(network(images), labels).values()).backward()
        network.zero_grad()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[2] <= peaks[1] * 1.01
