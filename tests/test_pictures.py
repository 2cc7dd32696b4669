"""The panel, pixel by pixel where it matters: boxes on their edges, kept pixels untouched, every part optional."""

from __future__ import annotations

import numpy
import pytest
import torch
from PIL import Image

from utils.reporting.drawing import DIMMED, PREDICTED_BOX, RIGHT, TRUE_BOX, WINDOWS, WRONG, load_font, shortened
from utils.reporting.figures import GAP, PADDING, Caption
from utils.reporting.pictures import localization_panel, save_png

SIZE = 96
LEGEND = 22 + PADDING  # height of the legend and the space below


def _images(batch_size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (batch_size, 3, SIZE, SIZE), generator=generator).to(torch.uint8)


def _tile(panel, *, legend=True, column=0):
    """A picture of the first row, cut out of the panel."""
    top = PADDING + (LEGEND if legend else 0)
    left = PADDING + column * (SIZE + GAP)
    return panel[:, top : top + SIZE, left : left + SIZE]


def _has(region, colour):
    return (region == torch.tensor(colour, dtype=torch.uint8).reshape(3, *[1] * (region.dim() - 1))).all(dim=0)


def test_the_predicted_box_lies_on_its_border_pixels_and_leaves_the_inside():
    images = _images(1)
    panel = localization_panel(images, object_boxes=torch.tensor([[20.0, 31.0, 63.0, 79.0]]), tile_height=SIZE)
    tile = _tile(panel)
    border = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    border[31:80, 20:64] = True
    border[34:77, 23:61] = False  # lines are 3 pixels wide, inwards
    assert torch.equal(_has(tile, PREDICTED_BOX), border)
    assert torch.equal(tile[:, 34:77, 23:61], images[0, :, 34:77, 23:61])
    assert torch.equal(tile[:, :, 65:], images[0, :, :, 65:])  # and outside, but for the dark line round the box
    assert torch.equal(tile[:, :30], images[0, :, :30])


def test_boxes_grow_with_the_tile():
    panel = localization_panel(_images(1), object_boxes=torch.tensor([[0.0, 0.0, 47.0, 95.0]]), tile_height=2 * SIZE)
    top = PADDING + LEGEND
    row = _has(panel[:, top + SIZE, PADDING : PADDING + 2 * SIZE], PREDICTED_BOX)
    assert row.nonzero().flatten().tolist() == [0, 1, 2, 93, 94, 95]  # pixel 47 ends at edge 48 -> 96 -> pixel 95


def test_the_true_box_is_dashed_on_its_edges():
    true_boxes = torch.tensor([[10.0, 12.0, 90.0, 80.0]])
    tile = _tile(localization_panel(_images(1), true_boxes=true_boxes, tile_height=SIZE))
    coloured = _has(tile, TRUE_BOX)
    rows, columns = coloured.nonzero().unbind(dim=1)
    assert (rows.min(), columns.min(), rows.max(), columns.max()) == (12, 10, 79, 89)
    assert 0.5 < coloured[12, 10:90].float().mean() < 0.8
    assert not coloured[14:78, 12:88].any()


def test_the_mask_dims_what_it_leaves_out_and_nothing_else():
    images = _images(1)
    mask = torch.zeros(1, 3, 3, dtype=torch.bool)
    mask[0, 1, :2] = True
    tile = _tile(localization_panel(images, masks=mask, tile_height=SIZE))
    assert torch.equal(tile[:, 32:64, :64], images[0, :, 32:64, :64])
    dimmed = (images[0].double() * DIMMED).to(torch.uint8)
    assert torch.equal(tile[:, :31], dimmed[:, :31])
    assert torch.equal(tile[:, 65:], dimmed[:, 65:])
    assert (tile[:, 31, :64] > 200).all()  # the outline, on the side left out
    everything = localization_panel(images, masks=torch.ones(1, 3, 3, dtype=torch.bool), tile_height=SIZE)
    assert torch.equal(_tile(everything), images[0])


def test_windows_are_drawn_on_the_crop_only():
    images, crops = _images(1), _images(1, seed=1)
    windows = torch.tensor([[[0.0, 0.0, 40.0, 40.0], [50.0, 30.0, 95.0, 95.0]]])
    panel = localization_panel(images, crops=crops, window_boxes=windows, tile_height=SIZE)
    assert torch.equal(_tile(panel), images[0])
    crop = _tile(panel, column=1)
    first, second = _has(crop, WINDOWS[0]), _has(crop, WINDOWS[1])
    assert first[40, :41].all()
    assert first[15:41, 40].all()
    assert second[95, 50:].all()
    assert second[30:, 95].all()
    assert torch.equal(crop[:, 45:, :45], crops[0, :, 45:, :45])


def test_repeated_windows_keep_readable_numbers():
    crops = torch.zeros(1, 3, SIZE, SIZE, dtype=torch.uint8)
    windows = torch.tensor([80.0, 80.0, 95.0, 95.0]).expand(1, 7, 4)
    crop = _tile(localization_panel(crops, crops=crops, window_boxes=windows, tile_height=SIZE), column=1)
    assert all(_has(crop, colour).sum() > 40 for colour in WINDOWS)  # no label covers another


@pytest.mark.parametrize("batch_size", [0, 1, 2, 3, 5])
def test_any_number_of_pictures_with_or_without_each_part(batch_size):
    images = _images(batch_size)
    boxes = torch.tensor([[8.0, 8.0, 60.0, 70.0]]).expand(batch_size, 4)
    parts = {
        "object_boxes": boxes,
        "true_boxes": boxes,
        "masks": torch.ones(batch_size, 3, 3, dtype=torch.bool),
        "crops": images,
        "captions": [Caption("auk", "auk")] * batch_size,
    }
    whole = localization_panel(images, **parts, window_boxes=boxes[:, None], tile_height=SIZE)
    assert whole.dtype == torch.uint8
    rows = -(-batch_size // 2)
    assert whole.shape[1] == PADDING + LEGEND + rows * (SIZE + 40 + PADDING)
    for name, part in parts.items():
        alone = localization_panel(images, **{name: part}, tile_height=SIZE)
        assert (alone.shape[0], alone.dtype) == (3, torch.uint8)


def test_plain_pictures_are_unchanged_and_in_order():
    images = _images(3)
    panel = localization_panel(images, columns=2, tile_height=SIZE)
    second_row = PADDING + SIZE + PADDING
    assert torch.equal(_tile(panel, legend=False), images[0])
    assert torch.equal(panel[:, second_row : second_row + SIZE, PADDING : PADDING + SIZE], images[2])


def test_boxes_that_leave_the_picture_or_make_no_sense_are_drawn_inside():
    boxes = torch.tensor([[-50.0, -50.0, 500.0, 500.0], [90.0, 90.0, 5.0, 5.0], [float("nan")] * 4])
    panel = localization_panel(_images(3), object_boxes=boxes, true_boxes=boxes, tile_height=SIZE, columns=3)
    assert _has(_tile(panel), PREDICTED_BOX)[2, 2]


def test_captions_say_right_wrong_or_neither_and_never_widen_the_panel():
    def strip(caption):
        panel = localization_panel(_images(1), captions=[caption], tile_height=SIZE, columns=1)
        return panel[:, -PADDING - 40 :]

    assert _has(strip(Caption("auk", "auk")), RIGHT).any()
    assert not _has(strip(Caption("auk", "auk")), WRONG).any()
    assert _has(strip(Caption("auk", "crow")), WRONG).any()
    unknown = strip(Caption("auk"))
    assert not (_has(unknown, RIGHT) | _has(unknown, WRONG)).any()
    long = strip(Caption("auk " * 40, "crow " * 40, "99 %"))
    assert (long[:, :, -PADDING:] == 255).all()


def test_windows_without_crops_are_refused():
    with pytest.raises(ValueError, match="crops"):
        localization_panel(_images(1), window_boxes=torch.zeros(1, 2, 4))


def test_saved_picture_reads_back(tmp_path):
    image = _images(1)[0]
    save_png(tmp_path / "new" / "picture.png", image)
    loaded = numpy.array(Image.open(tmp_path / "new" / "picture.png"))
    assert torch.equal(torch.from_numpy(loaded).permute(2, 0, 1), image)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["picture.png"]


def test_names_of_any_length_are_shortened_as_letter_by_letter():
    font = load_font(13)
    for text in ("Crested Auklet", "W" * 40, "i" * 400, "a b " * 50):
        expected = text
        while font.getlength(expected + ("..." if expected != text else "")) > 120:
            expected = expected[:-1]
        assert shortened(text, font, 120) == (text if expected == text else expected.rstrip() + "...")
    assert len(shortened("W" * 1_000_000, font, 120)) < 20  # in no time: of a million letters few are looked at
    assert shortened("Wren", font, 0) == "..."
