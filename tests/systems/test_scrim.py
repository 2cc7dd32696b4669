"""SCRIM against its description, one image and one part at a time, on a small trunk that sees where things are."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import small_systems
import system_checks
import torch
import torch.nn.functional as F
from cases import slow_but_for
from parts_by_hand import COUNTS, FORMER_SCALES, gate_by_hand, list_anchors, list_boxes, propose
from small_systems import Variant, flat, learners, run
from torch import Tensor, nn
from tracing import traced

from networks import Shared, build_network, build_on_trunk
from networks.losses import classification_losses, contrastive_loss, ranking_loss
from networks.outputs import Features, NetworkOutput
from networks.parts import anchor_levels
from networks.systems.scrim import SCRIM

pytestmark = pytest.mark.usefixtures("thin_trunk")

CLASSES, SIZE, CHANNELS = 5, 128, 32


class PatchBackbone(nn.Module):
    """A trunk of one convolution: every 32 x 32 patch by itself, so that a cut in the wrong place shows."""

    channels = {"stage2": 3, "stage3": 3, "final": CHANNELS}
    embedding_channels = CHANNELS
    stride = 32

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, CHANNELS, kernel_size=32, stride=32)

    def forward(self, images: Tensor, *, kind: str = "picture") -> Features:
        final = torch.relu(4 * self.patches(images))
        earlier = [F.avg_pool2d(images, cell) for cell in (8, 16)]
        return Features(*earlier, final, final, final.mean(dim=(2, 3)))


def build(*, input_size: int = SIZE, dropout: float = 0.5, **options: object) -> SCRIM:
    torch.manual_seed(0)
    shared = Shared(input_size=input_size, dropout=dropout)
    return build_on_trunk("scrim", PatchBackbone(), CLASSES, shared=shared, coarse_channels=8, **options)


def make_images(size: int, batch: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    blobs = F.interpolate(torch.randn(batch, 3, 6, 6, generator=generator), size=(size, size), mode="bicubic")
    return 1.5 * blobs + 0.3 * torch.randn(batch, 3, size, size, generator=generator) + 0.5


# ---- step by step -------------------------------------------------------------------------------------------------


def cut_part(image: Tensor, box: np.ndarray, input_size: int) -> Tensor:
    """One part of one image `[3, S, S]`, padded with zeros, cut and resized to half of `input_size`."""
    size = image.shape[-1]
    # Half a side is what published anchors need; those of some other sizes reach further.
    scale, padding = size // input_size, size
    padded = F.pad(image, (padding,) * 4)
    x0, y0, x1, y1 = (int(value) for value in box)
    rows = slice(y0 * scale + padding, (y1 + 1) * scale + padding)
    columns = slice(x0 * scale + padding, (x1 + 1) * scale + padding)
    half = (input_size // 2, input_size // 2)
    return F.interpolate(padded[None, :, rows, columns], size=half, mode="bilinear", align_corners=True)[0]


def score_anchors(network: SCRIM, module: int, part_map: Tensor) -> np.ndarray:
    navigator, x, scores = network.navigators[module], part_map[None], []
    for stride, level, score in zip((1, 2, 2), navigator.levels, navigator.scores, strict=True):
        x = F.conv2d(x, level.weight, level.bias, stride=stride, padding=1).relu()
        scores.append(F.conv2d(x, score.weight, score.bias).flatten())
    return torch.cat(scores).numpy()


@torch.no_grad()
def classify_step_by_step(
    network: SCRIM,
    image: Tensor,
    *,
    proposals: int = 6,
    in_prediction: int = 4,
    every_level: bool = True,
    sizes: tuple[int, int, int] = (48, 96, 192),
    former: bool = False,
) -> dict[str, Tensor]:
    """All that the network says of one image `[3, S, S]`, and the parts' crops."""
    input_size = network.input_size
    small = image[None]
    if image.shape[-1] != input_size:
        small = F.interpolate(small, size=(input_size, input_size), mode="bilinear", antialias=True)
    features = network.backbone(small)
    boxes = list_boxes(input_size, sizes, FORMER_SCALES if former else None)
    levels = np.array([anchor["level"] for anchor in list_anchors(input_size)]) if every_level else None
    result: dict[str, list[Tensor]] = {name: [] for name in ("part", "boxes", "scores", "coarse", "crops")}
    for_prediction = [features.embedding[0]]
    for module in range(2):
        part_map = gate_by_hand(network.coarse_parts[module], features.final[0])
        projection = network.coarse_parts[module].projection
        result["coarse"].append(projection.weight @ part_map.mean(dim=(1, 2)) + projection.bias)
        scores = score_anchors(network, module, part_map)
        picks = propose(scores, boxes, proposals, levels=levels, inclusive=not former)
        result["scores"].append(torch.from_numpy(scores[picks]))
        for rank, pick in enumerate(picks):
            crop = cut_part(image, boxes[pick], input_size)
            embedding = network.backbone(crop[None]).embedding[0]
            result["crops"].append(crop)
            result["boxes"].append(torch.from_numpy(boxes[pick]).float())
            result["part"].append(network.part_classifier.weight @ embedding + network.part_classifier.bias)
            if rank < in_prediction:
                for_prediction.append(embedding)
    stacked = {name: torch.stack(values) for name, values in result.items()}
    stacked["raw"] = network.classifier.weight @ features.embedding[0] + network.classifier.bias
    stacked["concat"] = network.concat_classifier.weight @ torch.cat(for_prediction) + network.concat_classifier.bias
    return stacked


def assert_step_by_step(network: SCRIM, images: Tensor, **rule: object) -> None:
    network.eval()
    with torch.no_grad(), reference.recorded_passes(network) as given:
        output = network(images)
    assert len(given) == 2
    count = output.part_boxes.shape[1]
    for index, image in enumerate(images):
        expected = classify_step_by_step(network, image, **rule)
        assert torch.equal(output.part_boxes[index], expected["boxes"])
        crops = given[1][index * count : (index + 1) * count]
        torch.testing.assert_close(crops, expected["crops"], rtol=0, atol=2e-3)
        torch.testing.assert_close(output.extras["part_scores"][index], expected["scores"], rtol=1e-4, atol=1e-4)
        for name, logits in output.logits.items():
            torch.testing.assert_close(logits[index], expected[name], rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("zoom", slow_but_for((1, 2), (1, 2, 3)))
@pytest.mark.parametrize("input_size", (96, 128, 224))
def test_step_by_step(input_size: int, zoom: int) -> None:
    assert_step_by_step(build(input_size=input_size), make_images(zoom * input_size))


@pytest.mark.parametrize(("proposals", "in_prediction"), ((1, 1), (2, 1), (3, 3), (9, 2)))
@pytest.mark.parametrize("every_level", (False, True))
def test_step_by_step_with_other_settings(proposals: int, in_prediction: int, every_level: bool) -> None:
    network = build(part_proposals=proposals, parts_in_prediction=in_prediction, parts_of_every_level=every_level)
    assert network.concat_classifier.in_features == CHANNELS * (1 + 2 * in_prediction)
    images = make_images(SIZE, batch=3)
    assert_step_by_step(network, images, proposals=proposals, in_prediction=in_prediction, every_level=every_level)


@pytest.mark.parametrize("every_level", (False, True))
def test_step_by_step_with_the_anchors_of_older_runs(every_level: bool) -> None:
    network = build(anchors="former", parts_of_every_level=every_level)
    assert not torch.equal(network.proposals.boxes, build().proposals.boxes)
    assert_step_by_step(network, make_images(SIZE, batch=3), every_level=every_level, former=True)


LARGE = (96, 192, 384)


@pytest.mark.parametrize("zoom", (1, 2))
@pytest.mark.parametrize("input_size", (128, 160))
def test_step_by_step_with_parts_beyond_the_picture(input_size: int, zoom: int) -> None:
    network, images = build(input_size=input_size, anchor_sizes=LARGE), make_images(zoom * input_size, batch=3)
    assert_step_by_step(network, images, sizes=LARGE)
    with torch.no_grad():
        boxes = network(images).part_boxes
    assert (boxes < 0).any() and (boxes > input_size - 1).any()


def test_the_parts_of_these_tests_differ() -> None:
    with torch.no_grad():
        boxes = build().eval()(make_images(SIZE, batch=6)).part_boxes
    sides = boxes[..., 2] - boxes[..., 0]
    assert sides.max() > 3 * sides.min()
    assert len({tuple(image.flatten().tolist()) for image in boxes}) == 6
    assert all(not torch.equal(image[:6], image[6:]) for image in boxes)  # the modules choose parts of their own


@torch.no_grad()
def test_output_of_evaluation_and_of_training() -> None:
    network, images = build(dropout=0.0), make_images(SIZE, batch=3)
    evaluated, trained = network.eval()(images), network.train()(images)
    assert "coarse_features" not in evaluated.extras
    for index, image in enumerate(images):
        expected = classify_step_by_step(network, image)["coarse"]
        torch.testing.assert_close(trained.extras["coarse_features"][index], expected, rtol=1e-4, atol=1e-4)
    for output in (evaluated, trained):
        assert output.logits["raw"].shape == output.logits["concat"].shape == (3, CLASSES)
        assert output.logits["part"].shape == (3, 12, CLASSES)
        assert output.part_boxes.shape == (3, 12, 4) and output.extras["part_scores"].shape == (3, 2, 6)
        assert output.object_boxes is output.window_boxes is output.object_masks is None
    for name, logits in evaluated.logits.items():  # nothing but dropout and the coarse features is of training alone
        torch.testing.assert_close(trained.logits[name], logits)


@torch.no_grad()
def test_an_image_is_classified_by_itself() -> None:
    network, images = build().eval(), make_images(SIZE, batch=4)
    together = network(images)
    for index in range(4):
        alone = network(images[index : index + 1])
        for name, logits in together.logits.items():
            torch.testing.assert_close(alone.logits[name][0], logits[index], rtol=1e-4, atol=1e-4)
        assert torch.equal(alone.part_boxes[0], together.part_boxes[index])


# ---- as a whole ---------------------------------------------------------------------------------------------------

DEFAULT = Variant("scrim")


@torch.no_grad()
def test_output() -> None:
    network, size, count = DEFAULT.evaluated, small_systems.SIZE, 12  # parts, six for each of its two modules
    for images in (small_systems.make_images(), small_systems.make_images(2 * size)):
        output, given = run(network, images)
        fields = ["logits.raw", "logits.part", "logits.concat", "part_boxes", "extras.part_scores"]
        assert list(flat(output)) == fields
        assert [tuple(x.shape) for x in given] == [(2, 3, size, size), (2 * count, 3, size // 2, size // 2)]
        assert output.part_boxes.shape == (2, count, 4)
        assert (output.part_boxes.abs() < 1.5 * size).all()  # inside the zeros round the picture
        assert (output.part_boxes == output.part_boxes.round()).all()
        assert output.extras["part_scores"].shape == (2, 2, count // 2)
        assert (output.extras["part_scores"].diff(dim=2) <= 0).all()
    trained = DEFAULT.build().train()(small_systems.make_images())
    assert list(flat(trained)) == [*fields, "extras.coarse_features"]
    assert trained.extras["coarse_features"].shape[:2] == (2, 2)


@pytest.mark.parametrize(("branch", "passes"), (("raw", 1), ("part", 2), ("concat", 2)))
@torch.no_grad()
def test_passes_of_a_branch(branch: str, passes: int) -> None:
    _, given = run(DEFAULT.evaluated, small_systems.make_images(), branches=(branch,))
    assert len(given) == passes


def test_contract_at_other_input_sizes() -> None:
    system_checks.output_keeps_the_contract_at_other_input_sizes(DEFAULT, (224, 448))


@torch.no_grad()
def test_parts_of_larger_images_are_cut_out_of_these() -> None:
    network, images = DEFAULT.evaluated, small_systems.make_images(2 * small_systems.SIZE)
    from_large = network(images)
    from_small = network(F.interpolate(images, size=(small_systems.SIZE,) * 2, mode="bilinear", antialias=True))
    assert torch.equal(from_large.part_boxes, from_small.part_boxes)
    assert not torch.allclose(from_large.logits["part"], from_small.logits["part"], atol=1e-5)


def test_who_learns_from_a_branch() -> None:
    assert learners(DEFAULT.build_scripted(dropout=0.0), small_systems.make_images()) == {
        "raw": {"backbone", "classifier"},
        "part": {"backbone", "part_classifier"},
        "concat": {"backbone", "concat_classifier"},
    }


def test_dropout_acts_on_every_branch() -> None:
    system_checks.dropout_acts_on_every_branch(DEFAULT)


# ---- branches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_level", (False, True))
@torch.no_grad()
def test_the_prediction_alone_looks_at_fewer_parts(every_level: bool) -> None:
    network, images = build(parts_of_every_level=every_level).eval(), make_images(2 * SIZE, batch=3)
    with reference.recorded_passes(network) as given:
        everything = network(images)
    with reference.recorded_passes(network) as given_for_prediction:
        prediction = network(images, branches=("concat",))
    assert [len(batch) for batch in given] == [3, 3 * 12]
    assert [len(batch) for batch in given_for_prediction] == [3, 3 * 8]
    assert prediction.logits.keys() == {"raw", "concat"}
    for name, logits in prediction.logits.items():
        torch.testing.assert_close(logits, everything.logits[name])
    assert torch.equal(prediction.part_boxes, everything.part_boxes.view(3, 2, 6, 4)[:, :, :4].reshape(3, 8, 4))
    torch.testing.assert_close(prediction.extras["part_scores"], everything.extras["part_scores"][:, :, :4])
    assert torch.equal(network.predict_logits(everything), everything.logits["concat"])


@pytest.mark.parametrize("training", (False, True))
@torch.no_grad()
def test_warm_up_needs_one_pass(training: bool) -> None:
    network, images = build(dropout=0.0).train(training), make_images(SIZE)
    everything = network(images)
    with reference.recorded_passes(network) as given:
        output = network(images, branches=("raw",))
    assert len(given) == 1
    assert torch.equal(output.logits.pop("raw"), everything.logits["raw"])
    assert output == NetworkOutput({})
    assert network.losses(network(images, branches=("raw",)), torch.tensor([0, 1])).keys() == {"raw"}


@torch.no_grad()
def test_parts_bring_the_prediction_along() -> None:
    network, images = build().eval(), make_images(SIZE)
    everything, parts = network(images), network(images, branches=("part",))
    assert torch.equal(parts.logits["part"], everything.logits["part"])
    assert torch.equal(parts.extras["part_scores"], everything.extras["part_scores"])


@torch.no_grad()
def test_blanking_the_background_changes_nothing() -> None:
    network, images = build().eval(), make_images(SIZE)
    plain, masked = network(images), network(images, mask_background=True)
    assert all(torch.equal(plain.logits[name], masked.logits[name]) for name in plain.logits)
    assert torch.equal(plain.part_boxes, masked.part_boxes)


# ---- learning -----------------------------------------------------------------------------------------------------


def test_declared_branches_and_prediction() -> None:
    network = build()
    assert network.branches == network.evaluated == ("raw", "part", "concat")
    assert network.prediction == ("concat",)
    assert all(parameter.requires_grad for parameter in network.parameters())


def test_loss_terms_and_their_weights() -> None:
    network = build().train()
    terms = network.losses(network(make_images(SIZE, batch=4)), torch.tensor([0, 0, 1, 1]))
    assert terms.keys() == {"raw", "part", "concat", "ranking", "contrastive"}
    assert network.loss_weights == {"raw": 1.0, "part": 1.0, "concat": 1.0, "ranking": 1.0, "contrastive": 0.5}
    assert all(term.shape == () and term.isfinite() and term > 0 for term in terms.values())
    terms = network.losses(network.eval()(make_images(SIZE, batch=4)), torch.tensor([0, 0, 1, 1]))
    assert terms.keys() == {"raw", "part", "concat", "ranking"}


def make_scored_output(batch: int = 4, modules: int = 2, parts: int = 3) -> NetworkOutput:
    generator = torch.Generator().manual_seed(8)
    return NetworkOutput(
        {
            "raw": torch.randn(batch, 5, generator=generator),
            "part": torch.randn(batch, modules * parts, 5, generator=generator),
        },
        extras={
            "part_scores": torch.randn(batch, modules, parts, generator=generator),
            "coarse_features": torch.randn(batch, modules, 6, generator=generator),
        },
    )


LABELS = torch.tensor([0, 3, 1, 3])


def test_terms_are_those_that_the_output_allows() -> None:
    output, losses = make_scored_output(), build().losses
    assert list(losses(output, LABELS)) == ["raw", "part", "ranking", "contrastive"]
    scores, features = ({name: output.extras[name]} for name in ("part_scores", "coarse_features"))
    assert losses(output._replace(extras=scores), LABELS).keys() == {"raw", "part", "ranking"}
    unclassified = output._replace(logits={"raw": output.logits["raw"]})
    assert losses(unclassified, LABELS).keys() == {"raw", "contrastive"}
    assert losses(unclassified._replace(extras=features), LABELS).keys() == {"raw", "contrastive"}
    assert losses(unclassified._replace(extras=scores), LABELS).keys() == {"raw"}
    assert losses(unclassified._replace(extras=None), LABELS).keys() == {"raw"}
    assert all(term.shape == () and term.dtype == torch.float32 for term in losses(output, LABELS).values())


def test_terms_are_the_losses_of_their_names() -> None:
    output = make_scored_output()
    terms = build().losses(output, LABELS)
    assert torch.equal(terms["ranking"], ranking_loss(output.extras["part_scores"], output.logits["part"], LABELS))
    assert torch.equal(terms["contrastive"], contrastive_loss(output.extras["coarse_features"], LABELS))
    classified = classification_losses(output, LABELS)
    assert all(torch.equal(terms[name], classified[name]) for name in ("raw", "part"))


def test_smoothing_changes_only_what_classifies() -> None:
    output, losses = make_scored_output(), build().losses
    plain, smoothed = losses(output, LABELS), losses(output, LABELS, label_smoothing=0.2)
    assert {name for name in plain if not torch.equal(plain[name], smoothed[name])} == {"raw", "part"}
    expected = classification_losses(output, LABELS, label_smoothing=0.2)
    assert all(torch.equal(smoothed[name], expected[name]) for name in expected)


def test_losses_make_the_host_wait_nowhere() -> None:
    output, network = make_scored_output(), build()
    expected = network.losses(output, LABELS)
    with reference.ForbidHostReads():
        terms = network.losses(output, LABELS)
    assert all(torch.equal(terms[name], expected[name]) for name in expected)
    compiled = traced(network.losses)(output, LABELS)
    for name in expected:
        torch.testing.assert_close(compiled[name], expected[name])


LEARNERS = {
    "raw": {"backbone", "classifier"},
    "part": {"backbone", "part_classifier"},
    "concat": {"backbone", "concat_classifier"},
    "ranking": {"navigators"},
    "contrastive": {"backbone", "coarse_parts"},
}


@pytest.mark.parametrize("name", LEARNERS)
def test_who_learns_from_a_term(name: str) -> None:
    network = build(dropout=0.0).train()
    network.losses(network(make_images(SIZE, batch=4)), torch.tensor([0, 0, 1, 1]))[name].backward()
    learning = {
        parameter_name.split(".")[0]
        for parameter_name, parameter in network.named_parameters()
        if parameter.grad is not None and parameter.grad.abs().sum() > 0
    }
    assert learning == LEARNERS[name]
    if name in ("ranking", "contrastive"):  # both modules of their own
        for module in (*network.navigators,) if name == "ranking" else (*network.coarse_parts,):
            assert any(parameter.grad.abs().sum() > 0 for parameter in module.parameters())


def test_the_prediction_teaches_the_backbone_by_the_picture_and_by_the_parts() -> None:
    network = build(dropout=0.0).train()
    embeddings: list[Tensor] = []
    network.backbone.register_forward_hook(lambda module, inputs, features: embeddings.append(features.embedding))
    output = network(make_images(SIZE))
    of_picture, of_parts = torch.autograd.grad(output.logits["concat"].square().sum(), embeddings)
    assert of_picture.abs().sum() > 0
    used = of_parts.view(2, 2, 6, CHANNELS).abs().sum(dim=(0, 1, 3)) > 0
    assert used.tolist() == [True] * 4 + [False] * 2


def test_every_parameter_learns_from_one_step() -> None:
    network = build(dropout=0.0).train()
    terms = network.losses(network(make_images(SIZE, batch=8)), torch.arange(8) // 2)
    sum(network.loss_weights[name] * term for name, term in terms.items()).backward()
    missing = [name for name, parameter in network.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_ranking_teaches_every_level_where_each_is_proposed() -> None:
    """At first a level may lead; its best is among the parts all the same, and gets its share of the gradient."""
    network = build(dropout=0.0, part_proposals=3, parts_in_prediction=3).train()
    with torch.no_grad():
        for navigator in network.navigators:
            navigator.scores[0].bias += 100
    output = network(make_images(SIZE, batch=4))
    index = {tuple(box): number for number, box in enumerate(list_boxes(SIZE).tolist())}
    levels = anchor_levels(SIZE // 32)
    for image in output.part_boxes.int().view(8, 3, 4).tolist():
        assert [int(levels[index[tuple(box)]]) for box in image][0] == 0
        assert {int(levels[index[tuple(box)]]) for box in image} == {0, 1, 2}
    output.extras["part_scores"].square().sum().backward()
    for navigator in network.navigators:
        assert all(layer.weight.grad.abs().sum() > 0 for layer in (*navigator.levels, *navigator.scores))


def test_no_gradient_flows_through_boxes_and_crops() -> None:
    network = build().train()
    with reference.recorded_passes(network) as given:
        output = network(make_images(SIZE))
    assert not output.part_boxes.requires_grad and not any(batch.requires_grad for batch in given)
    assert output.extras["part_scores"].requires_grad and output.extras["coarse_features"].requires_grad


def test_a_navigator_learns_to_find_the_part_that_tells() -> None:
    """Steps on the ranking loss alone bring the scores into the order of the classifier's confidence."""
    network, images, labels = build(dropout=0.0).train(), make_images(SIZE, batch=4), torch.tensor([0, 0, 1, 1])
    optimizer = torch.optim.SGD(network.navigators.parameters(), lr=0.002)
    losses = []
    for _ in range(12):
        loss = network.losses(network(images), labels)["ranking"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.8 * sum(losses[:3])


# ---- settings -----------------------------------------------------------------------------------------------------


def test_heads_are_all_but_the_backbone() -> None:
    network = build()
    heads = {id(parameter) for head in network.heads() for parameter in head.parameters()}
    backbone = {id(parameter) for parameter in network.backbone.parameters()}
    assert heads | backbone == {id(parameter) for parameter in network.parameters()} and not heads & backbone


@pytest.mark.parametrize(
    ("settings", "words"),
    (
        ({"parts_in_prediction": 0}, ("parts_in_prediction", "0", "1")),
        ({"parts_in_prediction": 7}, ("parts_in_prediction", "7", "6")),
        ({"part_proposals": 3}, ("parts_in_prediction", "4", "3")),
        ({"part_proposals": 130}, ("part_proposals", "130", "129")),
        ({"prediction": ("part",)}, ("part", "raw, concat")),
        ({"part_proposals": 0}, ("part_proposals", "0", "1")),
        ({"anchor_sizes": (48, 96)}, ("anchor_sizes", "3")),
        ({"anchor_sizes": (48, 96, 0)}, ("anchor_sizes", "0")),
    ),
    ids=str,
)
def test_impossible_settings_are_refused(settings: dict, words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        build(**settings)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize("branches", ((), ("object",), ("raw", "graph"), ("contrastive",)), ids=str)
def test_unknown_branches_are_refused(branches: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="raw, part, concat"):
        build()(make_images(SIZE), branches=branches)


@pytest.mark.parametrize("shape", ((1, 3, 96, 96), (1, 3, 160, 128)), ids=str)
def test_images_of_the_wrong_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="128x128"):
        build()(torch.zeros(shape))


def test_built_by_its_name() -> None:
    torch.manual_seed(0)
    network = build_network(
        "scrim",
        num_classes=CLASSES,
        backbone="resnet18",
        input_size=96,
        coarse_channels=16,
        part_proposals=5,
        parts_in_prediction=2,
        part_max_iou=0.6,
        anchor_sizes=LARGE,
        parts_of_every_level=False,
    )
    assert isinstance(network, SCRIM) and network.prediction == ("concat",) and network.input_size == 96
    assert network.coarse_parts[0].projection.out_features == 16
    assert network.concat_classifier.in_features == network.backbone.embedding_channels * 5
    np.testing.assert_array_equal(network.proposals.boxes.numpy(), list_boxes(96, LARGE))
    with torch.no_grad():
        output = network.eval()(make_images(96))
    assert output.logits["part"].shape == (2, 10, CLASSES)
    scores = np.random.default_rng(0).standard_normal((8, COUNTS[96])).astype(np.float32)
    boxes, _ = network.proposals(torch.from_numpy(scores))
    anchors = list_boxes(96, LARGE)
    np.testing.assert_array_equal(boxes.numpy(), [anchors[propose(row, anchors, 5, max_iou=0.6)] for row in scores])
    assert any(propose(row, anchors, 5, max_iou=0.6) != propose(row, anchors, 5) for row in scores)
