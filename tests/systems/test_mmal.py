"""MMAL-Net: three passes over picture, object and windows, of which evaluation needs two."""

from __future__ import annotations

import object_checks
import pytest
import system_checks
import torch
from small_systems import CLASSES, SIZE, Variant, flat, learners, make_images, run

from networks.systems.mmal import MMALNet

pytestmark = pytest.mark.usefixtures("thin_trunk")

MMAL = Variant("mmal")
WINDOWS_OF_CELLS = Variant("mmal", window_source="stage3")
ONE_WINDOW = ((((14, 14),), 1),)


@pytest.mark.parametrize("check", system_checks.CHECKS, ids=lambda check: check.__name__)
def test_windows_of_cells(check: system_checks.Check) -> None:
    check(WINDOWS_OF_CELLS)


def test_branches() -> None:
    network = MMAL.evaluated
    assert isinstance(network, MMALNet)
    assert network.branches == ("raw", "object", "window")
    assert network.evaluated == ("raw", "object")  # the windows only serve training
    assert network.prediction == ("object",)
    assert network.loss_weights == {"raw": 1.0, "object": 1.0, "window": 1.0}
    assert network.heads() == [network.classifier]
    assert all(parameter.requires_grad for parameter in network.parameters())


@torch.no_grad()
def test_output() -> None:
    for images in (make_images(), make_images(2 * SIZE)):
        output, given = run(MMAL.evaluated, images)
        assert tuple(output.logits) == ("raw", "object", "window")
        assert output.logits["window"].shape == (2, 7, CLASSES)
        assert list(flat(output)) == [
            *("logits.raw", "logits.object", "logits.window"),
            *("object_boxes", "window_boxes"),
        ]
        half = (2 * 7, 3, SIZE // 2, SIZE // 2)
        assert [tuple(x.shape) for x in given] == [(2, 3, SIZE, SIZE), (2, 3, SIZE, SIZE), half]


@pytest.mark.parametrize(("branch", "passes"), (("raw", 1), ("object", 2), ("window", 3)))
@torch.no_grad()
def test_passes_of_a_branch(branch: str, passes: int) -> None:
    output, given = run(MMAL.evaluated, make_images(), branches=(branch,))
    assert len(given) == passes
    assert branch in output.logits
    assert (output.window_boxes is None) == (branch == "raw")


@torch.no_grad()
def test_evaluation_leaves_the_windows_pass_out() -> None:
    output, given = run(MMAL.evaluated, make_images(), branches=MMAL.evaluated.evaluated)
    assert tuple(output.logits) == ("raw", "object")
    assert len(given) == 2
    assert output.window_boxes is not None  # they cost no pass, and are drawn


@pytest.mark.parametrize(("size", "windows"), ((160, ONE_WINDOW), (224, "vehicles")), ids=str)
def test_contract_with_other_windows(size: int, windows: str | tuple) -> None:
    system_checks.output_keeps_the_contract_at_other_input_sizes(Variant("mmal", windows=windows), (size,))


@torch.no_grad()
def test_prediction() -> None:
    output = MMAL.evaluated(make_images())
    assert torch.equal(MMAL.evaluated.predict_logits(output), output.logits["object"])
    chosen = MMAL.build(prediction=("raw", "object"))
    mean = (output.logits["raw"].softmax(-1) + output.logits["object"].softmax(-1)) / 2
    torch.testing.assert_close(chosen.predict_logits(output), mean.log())


@torch.no_grad()
def test_objects_of_larger_images_are_cut_out_of_these() -> None:
    images = make_images(2 * SIZE)
    small = torch.nn.functional.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True)
    from_large, from_small = MMAL.evaluated(images), MMAL.evaluated(small)
    assert torch.equal(from_large.object_boxes, from_small.object_boxes)
    assert not torch.allclose(from_large.logits["object"], from_small.logits["object"], atol=1e-5)


def test_crops_of_larger_images_have_more_detail() -> None:
    object_checks.crops_of_larger_images_have_more_detail(MMAL)


@pytest.mark.parametrize("factor", (1, 2))
def test_background_is_never_blanked(factor: int) -> None:
    cut = object_checks.object_is_cut_out(MMAL, factor)
    assert torch.equal(cut.plain[1], cut.masked[1])


@pytest.mark.parametrize("maps", object_checks.ODD_MAPS)
def test_maps_without_an_object_give_the_whole_image(maps: str) -> None:
    object_checks.maps_without_an_object_give_the_whole_image(MMAL, maps)


@pytest.mark.parametrize("value", (0.1, 0.7, 3.3, 12.1, -0.3, 1.1), ids=str)
@torch.no_grad()
def test_constant_last_map_gives_the_whole_image(value: float) -> None:
    """Whatever rounding makes of its mean, and whatever the map before it shows."""
    for input_size in (96, 160, 224):
        network = MMAL.build_scripted(object_checks.half_constant(value), input_size=input_size).eval()
        output = network(make_images(input_size))
        assert output.object_boxes.tolist() == [[0, 0, input_size - 1, input_size - 1]] * 2


def test_who_learns_from_a_branch() -> None:
    """Nothing flows through boxes and windows; all branches reach the trunk."""
    both = {"backbone", "classifier"}
    assert learners(MMAL.build_scripted(dropout=0.0), make_images()) == dict.fromkeys(("raw", "object", "window"), both)


def test_no_gradient_flows_through_the_crops() -> None:
    object_checks.no_gradient_flows_through_the_crops(MMAL)


def test_dropout_acts_on_every_branch() -> None:
    system_checks.dropout_acts_on_every_branch(MMAL)
    system_checks.dropout_acts_on_every_branch(WINDOWS_OF_CELLS)


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"input_size": 0}, ("0", "96")),
        ({"prediction": ("window",)}, ("window", "object")),
        ({"windows": ((((14, 14),), 2),)}, ("2", "1", "4x4")),
        ({"windows": ()}, ("windows",)),
        ({"backbone": "vgg16"}, ("vgg16", "resnet50")),
        ({"graph_neighbours": 9}, ("graph_neighbours", "setting of sgkrl", "not of mmal")),
        ({"localization_stride": 8}, ("localization_stride", "8", "32", "16")),
    ),
    ids=str,
)
def test_what_cannot_be_built_is_refused(settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        MMAL.build(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
