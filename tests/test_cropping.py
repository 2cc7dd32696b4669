"""Pictures that are loaded larger than they are seen: random crops in training, the central one otherwise."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from made_pictures import bright_box
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import RandomCrop, functional

import predict
import train
from datasets import Entry, Pictures
from networks.systems.resnet import ResNetClassifier
from utils.checkpoint import load_checkpoint
from utils.data.augmentation import Augmentation
from utils.data.cropping import central_offset, cut_out, cut_square, draw_offset, seen_part
from utils.data.pixels import LONGEST, load_pixels

pytestmark = pytest.mark.usefixtures("thin_trunk")

UNCHANGED = Augmentation(flip=0, brightness=0, contrast=0)


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1, 256, (height, width, 3), generator=generator, dtype=torch.uint8).permute(2, 0, 1)


@pytest.mark.parametrize("padding", [0, 5])
def test_squares_are_cut_as_torchvision_cuts_them(padding: int) -> None:
    image, size = noise(21, 34), 20
    box = torch.tensor([3.0, 2, 30.5, 19])
    padded = functional.pad(image, padding)
    boxes = tv_tensors.BoundingBoxes(box[None] + padding, format="XYXY", canvas_size=padded.shape[-2:])
    generator = np.random.default_rng(0)
    offsets = [draw_offset(21, 34, size, padding, generator) for _ in range(60)]
    for offset in {*offsets, (-padding, -padding), (1 + padding, 14 + padding)}:
        ours, our_box = cut_square(image, box, offset, size)
        place = (offset[0] + padding, offset[1] + padding, size, size)
        assert torch.equal(ours, functional.crop(padded, *place))
        assert torch.equal(our_box, functional.crop(boxes, *place)[0])
    assert torch.equal(cut_square(noise(20, 20), None, (0, 0), 20)[0], noise(20, 20))


@pytest.mark.parametrize("sides", [(30, 30), (31, 30), (33, 47), (24, 60)], ids=str)
def test_the_central_square_is_torchvisions(sides: tuple[int, int]) -> None:
    image = noise(*sides)
    ours, _ = cut_square(image, None, central_offset(*sides, 24), 24)
    assert torch.equal(ours, functional.center_crop(image, 24))


@pytest.mark.parametrize("padding", [0, 3])
def test_squares_are_drawn_as_torchvision_draws_them(padding: int) -> None:
    generator = np.random.default_rng(0)
    ours = np.array([draw_offset(25, 30, 24, padding, generator) for _ in range(4000)]) + padding
    torch.manual_seed(0)
    crop, image = RandomCrop(24, padding=padding), tv_tensors.Image(torch.zeros(1, 25, 30))
    draw = crop.make_params if hasattr(crop, "make_params") else crop._get_params  # torchvision < 0.20
    drawn = [draw([image]) for _ in range(4000)]
    theirs = np.array([(params["top"], params["left"]) for params in drawn])
    for axis, count in ((0, 2 + 2 * padding), (1, 7 + 2 * padding)):
        shares, expected = (np.bincount(values[:, axis], minlength=count) / 4000 for values in (ours, theirs))
        assert len(shares) == len(expected) == count
        assert np.abs(shares - expected).max() < 0.05
        assert (shares > 0).all()


@pytest.mark.parametrize("padding", [0, 8])
def test_box_found_again_in_random_crops(rectangle: Entry, padding: int) -> None:
    pictures = Pictures(
        [rectangle], image_size=96, resize_size=120, augment=UNCHANGED._replace(flip=0.5, padding=padding)
    )
    boxes = set()
    for seed in range(40):
        sample = pictures[0, seed]
        image = sample.image.flip(-1) if sample.augmentation[0] else sample.image
        assert image.shape == (3, 96, 96) and image.dtype == torch.uint8
        assert bright_box(image) == pytest.approx(sample.box.tolist(), abs=1)
        boxes.add(tuple(sample.box.tolist()))
    assert len(boxes) > 20
    assert (sum(float(pictures[0, seed].image.min()) == 0 for seed in range(40)) > 20) == (padding > 0)


def test_evaluation_sees_the_central_square(rectangle: Entry) -> None:
    sample, whole = Pictures([rectangle], image_size=96, resize_size=120)[0], Pictures([rectangle], image_size=120)[0]
    assert torch.equal(sample.image, whole.image[:, 12:108, 12:108])
    assert sample.box.tolist() == pytest.approx([0, 18, 48, 78])  # (12, 30, 60, 90) in the picture of 120 x 120
    assert sample.augmentation is None


def test_nothing_more_is_drawn_without_crops(rectangle: Entry) -> None:
    plain = Pictures([rectangle], image_size=96, augment=Augmentation())
    cropped = Pictures([rectangle], image_size=96, resize_size=120, augment=Augmentation(padding=4))
    for seed in range(5):
        assert torch.equal(plain[0, seed].augmentation, Augmentation().draw(np.random.default_rng(seed)))
        assert torch.equal(plain[0, seed].augmentation, cropped[0, seed].augmentation)
        assert torch.equal(plain[0, seed].image, Pictures([rectangle], image_size=96)[0].image)


@pytest.mark.parametrize("size", [(200, 120), (500, 331), (96, 96)], ids=str)
@pytest.mark.parametrize("resize_size", [96, 120, 117])
@pytest.mark.parametrize("keep_aspect_ratio", [False, True])
def test_boxes_are_carried_back_to_the_picture(
    tmp_path, size: tuple[int, int], resize_size: int, keep_aspect_ratio: bool
) -> None:
    """What predict.py reports of an object in the central square is where it is in the file's pixels."""
    box = tuple(float(round(share * size[axis % 2])) for axis, share in enumerate((0.35, 0.25, 0.7, 0.6)))
    pixels = np.full((*size[::-1], 3), 40, dtype=np.uint8)
    pixels[int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = 200
    Image.fromarray(pixels).save(tmp_path / "rectangle.png")
    loading = {"image_size": 96, "resize_size": resize_size, "keep_aspect_ratio": keep_aspect_ratio}
    sample = Pictures([Entry(tmp_path / "rectangle.png", 0, box)], **loading)[0]
    found = sample.box / 96 * 64 - torch.tensor([0, 0, 1, 1])  # inclusive, in pixels of an input of 64
    seen = seen_part(*size, **loading)
    network = SimpleNamespace(input_size=64)
    assert predict.box_in(seen, SimpleNamespace(object_boxes=found[None]), 0, network) == pytest.approx(box, abs=0.11)
    picture = Image.fromarray(pixels)
    drawn = cut_out(picture, seen)
    assert (drawn is picture) == (resize_size == 96 and (size == (96, 96) or not keep_aspect_ratio))
    scale = [side / 64 for side in drawn.size] * 2
    edges = [edge * factor for edge, factor in zip((found + torch.tensor([0, 0, 1, 1])).tolist(), scale, strict=True)]
    assert bright_box(torch.from_numpy(np.array(drawn)).permute(2, 0, 1)) == pytest.approx(edges, abs=1)


@pytest.mark.parametrize("size", [(200, 120), (120, 200), (77, 77), (333, 500), (1000, 701)], ids=str)
def test_shorter_sides_are_resized_as_torchvision_does(tmp_path, size: tuple[int, int]) -> None:
    pixels = noise(*size[::-1])
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "noise.png")
    box = (10.0, 20, 50, 70)
    image, carried = load_pixels(Entry(tmp_path / "noise.png", 0, box), 64, keep_aspect_ratio=True)
    assert torch.equal(image, functional.resize(pixels, 64, antialias=True))
    canvas = tv_tensors.BoundingBoxes([box], format="XYXY", canvas_size=size[::-1])
    assert carried.tolist() == pytest.approx(functional.resize(canvas, 64)[0].tolist(), abs=0.01)


@pytest.mark.parametrize("orientation", [1, 6])
def test_shapes_do_not_depend_on_how_a_photograph_is_stored(tmp_path, orientation: int) -> None:
    """Large ones are decoded at a fraction of their size, some of them turned."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.zeros((701, 1023, 3), dtype=np.uint8)).save(tmp_path / "large.jpg", exif=exif)
    image, _ = load_pixels(Entry(tmp_path / "large.jpg", 0), 64, keep_aspect_ratio=True)
    shape = (64, int(64 * 1023 / 701))
    assert tuple(image.shape[1:]) == (shape if orientation == 1 else shape[::-1])


def test_a_strip_does_not_fill_the_memory(tmp_path) -> None:
    Image.new("RGB", (3, 3000), "white").save(tmp_path / "strip.png")
    image, box = load_pixels(Entry(tmp_path / "strip.png", 0, (0, 0, 3, 1500)), 32, keep_aspect_ratio=True)
    assert tuple(image.shape[1:]) == (32 * LONGEST, 32)
    assert box.tolist() == [0, 0, 32, 64]


def test_a_run_with_all_of_it_goes_on_exactly_and_is_used(tiny_run, tmp_path, evaluation_script, capsys) -> None:
    """Stopped within an epoch; with the pictures out of files, and out of the cache."""
    everything = "--resize_size 112 --keep_aspect_ratio --padding 6 --rotation 15 --saturation 0.3 --erasing 0.5"
    everything += " --crop_scale 0.6 --auto_augment randaugment --normalization half --epochs 2"
    everything = everything.split()
    whole = tiny_run(tmp_path / "whole", *everything, "--cache", "none")
    stopped = tiny_run(tmp_path / "stopped", *everything, "--cache", "disk", "--save_every_steps", "1")
    train.main(whole)
    after_step, calls = ResNetClassifier.after_step, []

    def interrupted(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 5:  # 3 batches an epoch: in the second one of epoch 2
            raise KeyboardInterrupt
        after_step(*arguments)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(ResNetClassifier, "after_step", interrupted)
        train.main(stopped)
    train.main(stopped)
    folders = [tmp_path / name / "folder-resnet" for name in ("whole", "stopped")]
    networks = [load_checkpoint(folder / "last.pth")["network"] for folder in folders]
    assert all(torch.equal(value, networks[1][name]) for name, value in networks[0].items())

    evaluation_script.main([str(folders[0] / "best.pth")])
    report = json.loads((folders[0] / "report.json").read_text(encoding="utf-8"))
    rows = (folders[0] / "predictions.csv").read_text(encoding="utf-8").splitlines()[1:]
    picture = next(part for part in rows[0].split(",") if part.endswith(".png"))
    capsys.readouterr()
    words = ["--checkpoint", str(folders[0] / "best.pth"), "--out", str(tmp_path / "out"), "--json", "--device", "cpu"]
    predict.main([*words, "--workers", "0", picture])
    prediction = json.loads(capsys.readouterr().out)["predictions"][0]
    assert report["images"] == len(rows) == 6
    assert prediction["name"] in rows[0]
