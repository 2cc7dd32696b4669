"""Several views of a picture: which they are, how they are combined, and what stays that of the picture itself."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from cases import slow_but_for
from small_systems import CLASSES, SIZE, Variant, assert_same, make_images, run
from torch import Tensor
from torchvision.transforms.functional import five_crop, ten_crop

import predict
import train
from datasets import Pictures
from networks import MODELS
from networks.evidence import forward_with_evidence
from networks.outputs import SEVERAL_PER_IMAGE
from networks.views import OF_EVERY_SYSTEM, add_views, other_views
from utils.data.cropping import pictures_alone
from utils.data.pixels import load_pixels
from utils.errors import UserError
from utils.reporting.results import read_predictions

pytestmark = pytest.mark.usefixtures("thin_trunk")

VIEWS = OF_EVERY_SYSTEM
CHOICES = (("mirror",), ("five_crops",), VIEWS)


def views_by_hand(image: Tensor, views: tuple[str, ...]) -> list[Tensor]:
    """All views of one image [3, S, S], itself first, cut by their pixels."""
    size = image.shape[-1]
    side, found = size * 7 // 8, [image]
    if "five_crops" in views:
        low, high = size - side, (size - side) // 2
        for y, x in ((0, 0), (0, low), (low, 0), (low, low), (high, high)):
            crop = image[:, y : y + side, x : x + side]
            found.append(F.interpolate(crop[None], size=(size, size), mode="bilinear", align_corners=False)[0])
    if "mirror" in views:
        found += [torch.stack([view[:, :, size - 1 - x] for x in range(size)], dim=2) for view in found]
    return found


@pytest.mark.parametrize("views", CHOICES, ids="+".join)
def test_views_are_those_cut_by_hand(views: tuple[str, ...]) -> None:
    images = make_images(SIZE, batch=2)
    got = torch.stack([images, *other_views(images, views)], dim=1)  # [B, views, 3, S, S]
    for image, found in zip(images, got, strict=True):
        expected = views_by_hand(image, views)
        assert len(found) == len(expected) == {"mirror": 2, "five_crops": 6}.get("+".join(views), 12)
        missing = list(expected)
        for view in found:
            missing = [other for other in missing if not torch.allclose(view, other, atol=1e-5)]
        assert missing == []


@torch.no_grad()
@pytest.mark.parametrize("model", slow_but_for(("sgkrl", "pmg"), MODELS))
def test_a_system_is_ensembled_over_the_views_one_by_one(model: str) -> None:
    plain, network = Variant(model).evaluated, Variant(model).build().eval()
    images = make_images(2 * SIZE, batch=2)
    assert add_views(network, ("mirror",)) == 2
    (output, passes), (own, passes_of_one) = run(network, images), run(plain, images)
    assert len(passes) == 2 * len(passes_of_one)
    assert_same(output, own, except_for=tuple(own.logits))  # boxes, masks and extras
    mirrored = plain(images.flip(-1))
    for name, logits in output.logits.items():
        both = torch.stack([own.logits[name], mirrored.logits[name]])
        if name in SEVERAL_PER_IMAGE:
            assert torch.equal(logits, own.logits[name])
        elif network.ensembling == "mean_probability":
            torch.testing.assert_close(logits.softmax(-1), both.softmax(-1).mean(dim=0))
        else:
            torch.testing.assert_close(logits, both.mean(dim=0))
    members = [plain.predict_logits(plain(view)) for view in (images, images.flip(-1))]
    if network.ensembling == "mean_probability":
        expected = sum(member.softmax(-1) for member in members) / 2
        torch.testing.assert_close(network.predict_logits(output).softmax(-1), expected)
    elif network.ensembling == "learned":  # log-probabilities of the views' mean logits
        torch.testing.assert_close(network.predict_logits(output), plain.predict_logits(output))
    else:
        torch.testing.assert_close(network.predict_logits(output), sum(members) / 2)


@torch.no_grad()
def test_twelve_views_of_each_image_by_itself() -> None:
    variant = Variant("resnet")
    network, images = variant.build().eval(), make_images(SIZE, batch=3)
    assert add_views(network, VIEWS) == 12
    found = network(images).logits["raw"].softmax(-1)
    for image, probabilities in zip(images, found, strict=True):
        each = [variant.evaluated(view[None]).logits["raw"].softmax(-1) for view in views_by_hand(image, VIEWS)]
        torch.testing.assert_close(probabilities, torch.cat(each).mean(dim=0), rtol=1e-3, atol=1e-4)


def test_evidence_is_of_the_picture_for_what_all_views_predict() -> None:
    plain, network = Variant("mmal").evaluated, Variant("mmal").build().eval()
    images = make_images(SIZE, batch=2)
    add_views(network, ("mirror",))
    output, evidence = forward_with_evidence(network, images, size=16)
    own, _ = forward_with_evidence(plain, images, size=16)
    assert torch.equal(output.object_boxes, own.object_boxes)
    assert output.logits["object"].shape == (2, CLASSES)
    assert evidence.isfinite().all()
    assert (evidence.sum(dim=(1, 2)) > 0).all()
    assert not any(value.requires_grad for value in output.logits.values())


@torch.no_grad()
@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_five_crops_are_those_of_the_whole_resized_picture(rectangle, keep_aspect_ratio: bool) -> None:
    """They are torchvision's FiveCrop and TenCrop."""
    loading = {"resize_size": SIZE + 21, "keep_aspect_ratio": keep_aspect_ratio}
    (whole, _), side = load_pixels(rectangle, SIZE + 21, keep_aspect_ratio), SIZE
    sample = Pictures([rectangle], image_size=side, **loading, corners=True)[0]
    squares = five_crop(whole, [side, side])
    assert torch.equal(sample.image, torch.cat([squares[4], *squares[:4]], dim=1))
    assert sample.image.permute(1, 2, 0).is_contiguous()
    plain = Pictures([rectangle], image_size=side, **loading)[0]
    assert torch.equal(pictures_alone(sample.image), plain.image)
    assert torch.equal(sample.box, plain.box)

    variant = Variant("resnet")
    for views, expected in ((("five_crops",), squares), (("five_crops", "mirror"), ten_crop(whole, [side, side]))):
        network = variant.build().eval()
        assert add_views(network, views, corners=True) == len(expected)
        output, passes = run(network, sample.image[None] / 255)
        assert len(passes) == len(expected)
        each = variant.evaluated(torch.stack(list(expected)) / 255).logits["raw"].softmax(-1)
        torch.testing.assert_close(output.logits["raw"].softmax(-1)[0], each.mean(dim=0), rtol=1e-3, atol=1e-4)
        assert network(plain.image[None] / 255).logits["raw"].shape == (1, CLASSES)  # nothing is kept of the one before


def test_evaluating_and_predicting_with_corners(tiny_run, tmp_path, picture_tree, evaluation_script, capsys) -> None:
    train.main(tiny_run(tmp_path, "--resize_size", "110"))
    folder = tmp_path / "folder-resnet"
    words = [str(folder / "best.pth"), "--views", "five_crops", "--embeddings"]
    evaluation_script.main(words)
    assert "prediction: raw, over 5 views (five_crops)" in capsys.readouterr().out
    row = read_predictions(folder / "predictions-five_crops.csv")[0]
    words = ["--checkpoint", str(folder / "best.pth"), "--json", "--device", "cpu", "--out", str(tmp_path / "drawn")]
    predict.main([*words, "--views", "five_crops", "--workers", "0", row["picture"]])
    line = json.loads(capsys.readouterr().out)
    assert line["predictions"][0]["name"] == row["prediction"]
    assert line["predictions"][0]["probability"] == pytest.approx(float(row["probability"]), abs=1e-3)


def test_unknown_views_are_refused() -> None:
    for view in ("upside_down", "three_crops"):  # of CAL only
        with pytest.raises(UserError, match=f"views has '{view}'; choose from mirror, five_crops$"):
            add_views(Variant("resnet").evaluated, ("mirror", view))


def test_evaluating_and_predicting_with_views(tiny_run, tmp_path, picture_tree, evaluation_script, capsys) -> None:
    train.main(tiny_run(tmp_path, model="mmal"))
    folder = tmp_path / "folder-mmal"
    evaluation_script.main([str(folder / "best.pth")])
    capsys.readouterr()
    evaluation_script.main([str(folder / "best.pth"), "--views", "mirror"])
    assert "prediction: object, over 2 views (mirror)" in capsys.readouterr().out
    one, two = (json.loads((folder / f"report{end}.json").read_text("utf-8")) for end in ("", "-mirror"))
    assert (one["views"], two["views"], one["boxes"], one["images"]) == (1, 2, two["boxes"], two["images"])
    rows = [read_predictions(folder / f"predictions{end}.csv") for end in ("", "-mirror")]
    assert rows[0] != rows[1]

    picture = sorted(picture_tree.rglob("*.png"))[0]
    words = ["--checkpoint", str(folder / "best.pth"), "--json", "--device", "cpu", "--workers", "0", str(picture)]
    lines = []
    for more in ([], ["--views", "mirror", "five_crops"]):
        predict.main([*words, "--out", str(tmp_path / "drawn"), *more])
        lines.append(json.loads(capsys.readouterr().out))
    assert lines[0]["object_box"] == lines[1]["object_box"]
    probabilities = [sorted((p["name"], p["probability"]) for p in line["predictions"]) for line in lines]
    assert probabilities[0] != probabilities[1]
