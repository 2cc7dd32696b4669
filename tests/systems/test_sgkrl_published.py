"""SG-KRL as published: fusion and weighting that never learn, a graph over the picture or over the batch.

That it computes what the published code does is tested on checkpoints, in `test_published.py`.
"""

from __future__ import annotations

import object_checks
import pytest
import system_checks
import torch
import torch.nn.functional as F
from small_systems import CLASSES, SIZE, Variant, flat, learners, make_images, run

from networks import build_network
from networks.systems.sgkrl_published import PublishedSGKRL

pytestmark = pytest.mark.usefixtures("thin_trunk")

BRANCHES = ("raw", "object", "window", "graph")
ONE_WINDOW = ((((14, 14),), 1),)
BATCH = Variant("sgkrl_published", graph_scope="batch", depends_on_batch=("graph",))
ALL = {"image": Variant("sgkrl_published"), "batch": BATCH}


@pytest.mark.parametrize("check", system_checks.CHECKS, ids=lambda check: check.__name__)
def test_graph_over_the_batch(check: system_checks.Check) -> None:
    check(BATCH)


@torch.no_grad()
def test_graph_over_the_batch_depends_on_the_batch() -> None:
    """What is wrong in the published code, and only there: the graph links the windows of other images."""
    network, images = BATCH.evaluated, make_images(batch=5)
    together, alone = network(images), network(images[:1])
    change = (together.logits["graph"][:1] - alone.logits["graph"]).abs().max()
    assert change > 100 * (together.logits["object"][:1] - alone.logits["object"]).abs().max()
    assert change > 1e-3


@pytest.mark.slow
def test_graph_over_the_batch_traces_without_graph_break() -> None:
    """With images as large as what the backbone sees."""
    system_checks.forward_traces_without_graph_break(BATCH.build_scripted(), make_images())


@pytest.mark.parametrize("variant", ALL)
def test_branches(variant: str) -> None:
    network = ALL[variant].evaluated
    assert isinstance(network, PublishedSGKRL)
    assert network.branches == network.evaluated == BRANCHES
    assert network.prediction == ("object",)
    assert network.loss_weights == dict.fromkeys(BRANCHES, 1.0)
    assert network.heads() == [network.classifier, network.graph]
    assert (network.localization_stride, network.localization_threshold) == (32, 1.0)
    assert network.graph.scope == variant
    fixed = {name.partition(".")[0] for name, parameter in network.named_parameters() if not parameter.requires_grad}
    learnt = {name.partition(".")[0] for name, parameter in network.named_parameters() if parameter.requires_grad}
    assert (fixed, learnt) == ({"fusion", "weighting"}, {"backbone", "classifier", "graph"})


@torch.no_grad()
def test_public_interface() -> None:
    """The calls as the documentation has them."""
    net = build_network(
        "sgkrl_published",
        num_classes=36,
        backbone="resnet50",
        input_size=448,
        windows="birds",
        graph_scope="batch",
    )
    images = make_images(448, batch=1)
    out = net.eval()(images, mask_background=False)
    assert {name: tuple(logits.shape) for name, logits in out.logits.items()} == {
        "raw": (1, 36),
        "object": (1, 36),
        "window": (1, 7, 36),
        "graph": (1, 36),
    }
    assert out.object_boxes.shape == (1, 4)
    assert out.window_boxes.shape == (1, 7, 4)
    assert net.predict_logits(out).shape == (1, 36)


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_output(variant: str) -> None:
    for images in (make_images(), make_images(2 * SIZE)):
        output, given = run(ALL[variant].evaluated, images)
        assert tuple(output.logits) == BRANCHES
        assert output.logits["window"].shape == (2, 7, CLASSES)
        others = ["object_boxes", "window_boxes", "object_masks"]
        assert list(flat(output)) == [*(f"logits.{name}" for name in BRANCHES), *others]
        half = (2 * 7, 3, SIZE // 2, SIZE // 2)
        assert [tuple(x.shape) for x in given] == [(2, 3, SIZE, SIZE), (2, 3, SIZE, SIZE), half]
        assert torch.equal(ALL[variant].evaluated.predict_logits(output), output.logits["object"])


@pytest.mark.parametrize("variant", ALL)
@pytest.mark.parametrize(("branch", "passes"), (("raw", 1), ("object", 2), ("window", 3), ("graph", 3)))
@torch.no_grad()
def test_passes_of_a_branch(branch: str, passes: int, variant: str) -> None:
    _, given = run(ALL[variant].evaluated, make_images(), branches=(branch,))
    assert len(given) == passes


@pytest.mark.parametrize(
    ("variant", "size", "windows"),
    (("image", 96, ONE_WINDOW), ("batch", 160, "vehicles"), ("batch", 224, "birds")),
    ids=str,
)
def test_contract_with_other_windows(variant: str, size: int, windows: str | tuple) -> None:
    other = Variant("sgkrl_published", graph_scope=variant, windows=windows)
    system_checks.output_keeps_the_contract_at_other_input_sizes(other, (size,))


def test_background_is_masked_from_an_epoch_on() -> None:
    network = Variant("sgkrl_published", mask_from_epoch=3).build_scripted()
    assert [network.masks_background(epoch) for epoch in (1, 2, 3, 4)] == [False, False, True, True]
    assert [BATCH.evaluated.masks_background(epoch) for epoch in (45, 46)] == [False, True]


@pytest.mark.parametrize("variant", ALL)
@torch.no_grad()
def test_objects_of_larger_images_are_cut_out_of_these(variant: str) -> None:
    network, images = ALL[variant].evaluated, make_images(2 * SIZE)
    from_large = network(images)
    from_small = network(F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", antialias=True))
    assert torch.equal(from_large.object_boxes, from_small.object_boxes)
    assert not torch.allclose(from_large.logits["object"], from_small.logits["object"], atol=1e-5)


@pytest.mark.parametrize("variant", ALL)
def test_crops_of_larger_images_have_more_detail(variant: str) -> None:
    object_checks.crops_of_larger_images_have_more_detail(ALL[variant])


@pytest.mark.parametrize("factor", (1, 2))
def test_background_is_blanked_outside_the_mask(factor: int) -> None:
    object_checks.background_is_blanked_outside_the_mask(ALL["image"], factor)


@pytest.mark.parametrize("maps", object_checks.ODD_MAPS)
@pytest.mark.parametrize("variant", ALL)
def test_maps_without_an_object_give_the_whole_image(variant: str, maps: str) -> None:
    object_checks.maps_without_an_object_give_the_whole_image(ALL[variant], maps)


@pytest.mark.parametrize("variant", ALL)
def test_who_learns_from_a_branch(variant: str) -> None:
    """Nothing flows through boxes, masks and windows; all branches reach the trunk, and none fusion and weighting."""
    assert learners(ALL[variant].build_scripted(dropout=0.0), make_images()) == {
        "raw": {"backbone", "classifier"},
        "object": {"backbone", "classifier"},
        "window": {"backbone", "classifier"},
        "graph": {"backbone", "graph"},
    }


@pytest.mark.parametrize("variant", ALL)
def test_no_gradient_flows_through_the_crops(variant: str) -> None:
    object_checks.no_gradient_flows_through_the_crops(ALL[variant])


@pytest.mark.parametrize("variant", ALL)
def test_dropout_acts_on_every_branch(variant: str) -> None:
    system_checks.dropout_acts_on_every_branch(ALL[variant])


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"graph_scope": "world"}, ("world", "image", "batch")),
        ({"graph_residual": True}, ("graph_residual", "setting of sgkrl,", "not of sgkrl_published")),
        ({"crop_gradient": True}, ("crop_gradient", "setting of sgkrl,", "not of sgkrl_published")),
        ({"prediction": ("fused",)}, ("fused", "graph")),
        ({"graph_scope": "batch", "graph_edges": "overlap"}, ("graph_edges", "overlap", "batch")),
        ({"graph_scope": "batch", "exit_threshold": 0.9}, ("exit_threshold", "0.9", "batch")),
    ),
    ids=str,
)
def test_what_cannot_be_built_is_refused(settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught, torch.device("meta"):
        ALL["image"].build(**settings)
    assert all(word in str(caught.value) for word in words), str(caught.value)
