"""Evaluation of one epoch, against figures computed one image at a time."""

from __future__ import annotations

import copy

import pytest
import torch
from toy_system import CPU, EVERYTHING, SIZE, WARM_UP, make_loader, make_network, make_samples, sgd

from utils.training.engine import evaluate, train_one_epoch


def _evaluate(network, loader, **options):
    shared = {"plan": EVERYTHING, "execution": CPU}
    return evaluate(network, loader, **shared | options)


def _overlap(a, b) -> float:
    width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return width * height / (sum(areas) - width * height)


@pytest.mark.parametrize("image_size", [SIZE, 2 * SIZE, 3 * SIZE])
def test_figures_equal_direct_computation_over_uneven_batches(image_size):
    samples = make_samples(11, size=image_size)
    network = make_network()
    figures = _evaluate(network, make_loader(samples, batch_size=4))
    speed = figures.pop("images_per_second")
    assert speed > 0

    expected = {"loss/raw": 0.0, "loss/object": 0.0, "accuracy/raw": 0, "accuracy/object": 0, "accuracy/prediction": 0}
    overlaps = []
    network.eval()
    for sample in samples:  # one by one
        with torch.no_grad():
            output = network(sample.image[None])
        probabilities = []
        for name in ("raw", "object"):
            p = output.logits[name][0].softmax(dim=0)
            probabilities.append(p)
            expected[f"loss/{name}"] -= p[sample.label].log().item() / 11
            expected[f"accuracy/{name}"] += (p.argmax() == sample.label).item() / 11
        expected["accuracy/prediction"] += (sum(probabilities).argmax() == sample.label).item() / 11
        x0, y0, x1, y1 = output.object_boxes[0].tolist()
        true = [edge * SIZE / image_size for edge in sample.box.tolist()]
        overlaps.append(_overlap((x0, y0, x1 + 1, y1 + 1), true))
    expected["loss/total"] = expected["loss/raw"] + 0.5 * expected["loss/object"]
    expected["box_iou/mean"] = sum(overlaps) / 11
    expected["box_iou/share_at_0.5"] = sum(overlap >= 0.5 for overlap in overlaps) / 11
    assert figures == pytest.approx({**expected, "images": 11}, rel=1e-5)
    assert expected["box_iou/mean"] > 0


def test_without_a_trained_term_there_is_no_total():
    """Where only a branch is trained that evaluation leaves out."""
    plan = EVERYTHING._replace(loss_weights={"jigsaw": 1.0})
    figures = _evaluate(make_network(), make_loader(make_samples(4), batch_size=4), plan=plan)
    assert "loss/total" not in figures
    assert {"loss/raw", "loss/object", "accuracy/prediction"} <= figures.keys()


def test_evaluation_changes_nothing():
    network = make_network()
    before = copy.deepcopy(network.state_dict())
    _evaluate(network.train(), make_loader(make_samples(7), batch_size=3))
    assert not network.training
    assert not any(module.training for module in network.modules())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    after = network.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    train_one_epoch(  # and training goes on after it
        network,
        make_loader(make_samples(4), batch_size=4),
        *sgd(network),
        plan=EVERYTHING,
        execution=CPU,
    )
    assert network.training


def test_evaluation_does_not_touch_the_random_numbers_of_training():
    network = make_network()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    loader = make_loader(make_samples(7), batch_size=3)
    loader.generator = torch.Generator()  # a loader draws a seed for its workers: from the global numbers, by default
    _evaluate(network, loader)
    assert torch.equal(torch.rand(4), expected)


def test_all_branches_are_evaluated_even_in_warm_up():
    network = make_network()
    plan = WARM_UP._replace(mask_background=True)
    figures = _evaluate(network, make_loader(make_samples(5), batch_size=5), plan=plan)
    call = {"mask_background": True, "branches": ("raw", "object"), "shape": (5, 3, SIZE, SIZE)}
    assert network.calls == [call]
    assert figures["loss/total"] == figures["loss/raw"]
    assert {"accuracy/raw", "accuracy/object", "accuracy/prediction", "loss/object"} <= figures.keys()


def test_branches_that_only_serve_training_are_not_evaluated_unless_asked_for():
    network = make_network()
    network.evaluated, network.prediction = ("raw",), ("raw",)
    loader = make_loader(make_samples(5), batch_size=5)
    figures = _evaluate(network, loader)
    assert network.calls[-1]["branches"] == ("raw",)
    assert figures["loss/total"] == figures["loss/raw"]
    assert not {"accuracy/object", "loss/object"} & figures.keys()
    figures = _evaluate(network, loader, branches=("object",))
    assert network.calls[-1]["branches"] == ("object", "raw")  # what the prediction needs is always among them
    assert figures["loss/total"] == pytest.approx(figures["loss/raw"] + 0.5 * figures["loss/object"])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_the_overlap_is_that_of_images_with_a_true_box_however_they_are_batched(batch_size):
    samples = make_samples(8)
    some = [sample._replace(box=None) if index in (2, 3, 6) else sample for index, sample in enumerate(samples)]
    known = [sample for sample in some if sample.box is not None]
    figures, expected = (_evaluate(make_network(), make_loader(s, batch_size=batch_size)) for s in (some, known))
    assert figures["images"] == 8 and expected["images"] == 5
    for name in ("box_iou/mean", "box_iou/share_at_0.5"):
        assert figures[name] == pytest.approx(expected[name], rel=1e-6)
    assert expected["box_iou/mean"] > 0


@pytest.mark.parametrize(("network_boxes", "true_boxes"), [(False, True), (True, False), (False, False)])
def test_no_overlap_without_both_boxes(network_boxes, true_boxes):
    network = make_network(boxes=network_boxes)
    figures = _evaluate(network, make_loader(make_samples(5, boxes=true_boxes), batch_size=2))
    assert not [name for name in figures if name.startswith("box_iou")]


def test_on_batch_sees_every_batch_with_its_prediction():
    seen = []
    network = make_network()

    def collect(batch, output, prediction):
        assert torch.equal(prediction, network.predict_logits(output))
        assert prediction.shape == (len(batch.labels), 3)
        seen.extend(batch.paths)

    _evaluate(network, make_loader(make_samples(7), batch_size=3), on_batch=collect)
    assert seen == [str(index) for index in range(7)]


def test_evaluation_of_no_image_at_all_ends():
    """Under torchrun a process's share of a small validation set can be empty."""
    figures = _evaluate(make_network(), make_loader([], batch_size=3))
    assert figures["images"] == 0
