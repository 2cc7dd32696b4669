"""Named loss terms against PyTorch's cross-entropy, taken by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from networks.losses import classification_losses
from networks.outputs import NetworkOutput

LABELS = torch.tensor([0, 3, 4, 1])


def make_output(dtype: torch.dtype = torch.float32) -> NetworkOutput:
    generator = torch.Generator().manual_seed(0)
    raw, graph = (3 * torch.randn(4, 5, generator=generator) for _ in range(2))
    window = 3 * torch.randn(4, 7, 5, generator=generator)
    logits = {"raw": raw, "window": window, "graph": graph}
    return NetworkOutput({name: value.to(dtype) for name, value in logits.items()}, torch.zeros(4, 4))


def by_hand(logits: Tensor, label: int, label_smoothing: float) -> float:
    log_probabilities = (logits.double().exp() / logits.double().exp().sum()).log()
    return float(-(1 - label_smoothing) * log_probabilities[label] - label_smoothing * log_probabilities.mean())


@pytest.mark.parametrize("label_smoothing", (0.0, 0.1))
def test_terms_by_hand(label_smoothing: float) -> None:
    output = make_output()
    terms = classification_losses(output, LABELS, label_smoothing=label_smoothing)
    assert list(terms) == ["raw", "window", "graph"]
    for name in ("raw", "graph"):
        single = [
            by_hand(row, int(label), label_smoothing) for row, label in zip(output.logits[name], LABELS, strict=True)
        ]
        assert terms[name].item() == pytest.approx(sum(single) / 4, rel=1e-5)
        expected = F.cross_entropy(output.logits[name], LABELS, label_smoothing=label_smoothing)
        assert torch.equal(terms[name], expected)
    windows = output.logits["window"]
    single = [by_hand(windows[b, n], int(LABELS[b]), label_smoothing) for b in range(4) for n in range(7)]
    assert terms["window"].item() == pytest.approx(sum(single) / 28, rel=1e-5)


def test_smoothing_is_off_by_default() -> None:
    output = make_output()
    assert classification_losses(output, LABELS) == classification_losses(output, LABELS, label_smoothing=0.0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_terms_are_float32_whatever_the_logits(dtype: torch.dtype) -> None:
    low = classification_losses(make_output(dtype), LABELS)
    for name, logits in make_output(dtype).logits.items():
        assert low[name].dtype == torch.float32
        same = NetworkOutput({name: logits.float()})
        assert torch.equal(low[name], classification_losses(same, LABELS)[name])


def test_gradient_of_a_branch_comes_from_its_own_term() -> None:
    output = make_output()
    for logits in output.logits.values():
        logits.requires_grad_()
    terms = classification_losses(output, LABELS)
    terms["window"].backward()
    assert output.logits["raw"].grad is None
    gradient = output.logits["window"].grad
    expected = (output.logits["window"].softmax(-1) - F.one_hot(LABELS, 5)[:, None]) / 28
    torch.testing.assert_close(gradient, expected.detach())


def test_one_image_and_one_window() -> None:
    output = NetworkOutput({"raw": torch.zeros(1, 4), "window": torch.zeros(1, 1, 4)})
    terms = classification_losses(output, torch.tensor([2]))
    assert terms["raw"].item() == pytest.approx(torch.tensor(4.0).log().item())
    assert terms["window"].item() == pytest.approx(torch.tensor(4.0).log().item())
