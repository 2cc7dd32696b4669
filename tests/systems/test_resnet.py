"""The plain ResNet: one pass, one branch, nothing found."""

from __future__ import annotations

import pytest
import system_checks
import torch
from small_systems import SIZE, Variant, flat, learners, make_images, run

from networks.systems.resnet import ResNetClassifier

pytestmark = pytest.mark.usefixtures("thin_trunk")

PLAIN = Variant("resnet")


def test_branches() -> None:
    network = PLAIN.evaluated
    assert isinstance(network, ResNetClassifier)
    assert network.branches == network.evaluated == network.prediction == ("raw",)
    assert network.loss_weights == {"raw": 1.0}
    assert network.heads() == [network.classifier]
    assert all(parameter.requires_grad for parameter in network.parameters())


@torch.no_grad()
def test_one_pass() -> None:
    for images in (make_images(), make_images(2 * SIZE)):
        output, given = run(PLAIN.evaluated, images)
        assert list(flat(output)) == ["logits.raw"]
        assert [tuple(x.shape) for x in given] == [(2, 3, SIZE, SIZE)]


@torch.no_grad()
def test_logits_are_those_of_the_mean_of_the_last_map() -> None:
    network, images = PLAIN.evaluated, make_images()
    embeddings = network.backbone(images).final.mean(dim=(2, 3))
    expected = embeddings @ network.classifier.weight.T + network.classifier.bias
    torch.testing.assert_close(network(images).logits["raw"], expected)


def test_who_learns() -> None:
    assert learners(PLAIN.build_scripted(), make_images()) == {"raw": {"backbone", "classifier"}}


def test_dropout_acts() -> None:
    system_checks.dropout_acts_on_every_branch(PLAIN)


def test_mixed_precision_on_a_real_trunk() -> None:
    system_checks.mixed_precision_keeps_logits_and_losses_in_float32(PLAIN, scripted=False)


def test_a_real_trunk_traces_without_graph_break() -> None:
    """Here alone; the other systems are traced on a scripted one, which is faster."""
    system_checks.forward_traces_without_graph_break(PLAIN.build(), make_images(2 * SIZE))


@pytest.mark.parametrize("prediction", (("object",), ()), ids=str)
def test_other_predictions_are_refused(prediction: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        PLAIN.build(prediction=prediction)
    assert all(word in str(caught.value) for word in (str(prediction), "raw"))
