"""Crops: one call for a batch against slicing and `interpolate(align_corners=True)` one box at a time."""

from __future__ import annotations

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
from torch import Tensor
from tracing import traced

from networks.crops import boxes_in_image, crop_and_resize, crop_objects, crop_windows, resize_boxes
from utils.errors import UserError


def random_images(batch: int, height: int, width: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_boxes(shape: tuple[int, ...], height: int, width: int, *, seed: int = 0) -> Tensor:
    """Inclusive whole-pixel boxes inside the image, some of one pixel or one line; float64, as exact as the images."""
    generator = np.random.default_rng(seed)
    columns = np.sort(generator.integers(0, width, (*shape, 2)), axis=-1)
    rows = np.sort(generator.integers(0, height, (*shape, 2)), axis=-1)
    boxes = np.stack([columns[..., 0], rows[..., 0], columns[..., 1], rows[..., 1]], axis=-1)
    return torch.from_numpy(boxes).double()


def expected_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Image by image, and for `[B, N, 4]` box by box, images outermost."""
    crops = []
    for image, image_boxes in zip(images, boxes, strict=True):
        crops += [reference.crop_and_resize(image, box, size) for box in image_boxes.reshape(-1, 4).tolist()]
    return torch.stack(crops)


@pytest.mark.parametrize(("height", "width"), ((32, 32), (40, 24), (17, 61), (96, 96)))
@pytest.mark.parametrize("size", (1, 7, 32, 64))
def test_one_box_per_image(height: int, width: int, size: int) -> None:
    images, boxes = random_images(6, height, width), random_boxes((6,), height, width, seed=size)
    result = crop_and_resize(images, boxes, size)
    assert result.shape == (6, 3, size, size)
    torch.testing.assert_close(result, expected_crops(images, boxes, size), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("height", "width"), ((32, 32), (24, 50)))
@pytest.mark.parametrize("count", (1, 7))
def test_several_boxes_per_image(height: int, width: int, count: int) -> None:
    images, boxes = random_images(4, height, width, seed=1), random_boxes((4, count), height, width, seed=count)
    result = crop_and_resize(images, boxes, 20)
    assert result.shape == (4 * count, 3, 20, 20)
    torch.testing.assert_close(result, expected_crops(images, boxes, 20), rtol=0, atol=1e-9)


def test_float32_at_full_size() -> None:
    images, boxes = (
        random_images(2, 448, 448, seed=2, dtype=torch.float32),
        random_boxes((2, 3), 448, 448, seed=3).float(),
    )
    result = crop_and_resize(images, boxes, 224)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected_crops(images, boxes, 224), rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", (32, 96))
def test_corners_lines_and_single_pixels(size: int) -> None:
    height, width = 30, 44
    right, bottom = width - 1, height - 1
    boxes = torch.tensor(
        [
            [0, 0, 0, 0],
            [right, 0, right, 0],
            [0, bottom, 0, bottom],
            [right, bottom, right, bottom],
            [0, 0, right, 0],
            [right, 0, right, bottom],
            [0, 0, 1, 1],
            [right - 1, bottom - 1, right, bottom],
            [12, 7, 12, 7],
            [12, 7, 13, 20],
            [0, 0, right, bottom],
        ],
        dtype=torch.float64,
    )[None]
    images = random_images(1, height, width, seed=4)
    result = crop_and_resize(images, boxes, size)
    torch.testing.assert_close(result, expected_crops(images, boxes, size), rtol=0, atol=1e-9)
    pixel = images[0, :, 7, 12, None, None].expand(3, size, size)
    torch.testing.assert_close(result[8], pixel, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
@pytest.mark.parametrize("size", (33, 64, 448))
def test_whole_image_at_its_own_size_is_the_image(size: int, dtype: torch.dtype) -> None:
    images = random_images(2, size, size, dtype=dtype)
    boxes = torch.tensor([[0, 0, size - 1, size - 1]] * 2, dtype=dtype)
    tolerance = 1e-9 if dtype == torch.float64 else 5e-4
    torch.testing.assert_close(crop_and_resize(images, boxes, size), images, rtol=0, atol=tolerance)


def test_box_of_the_output_size_is_a_slice() -> None:
    images = random_images(1, 40, 50)
    result = crop_and_resize(images, torch.tensor([[11.0, 3.0, 30.0, 22.0]], dtype=torch.float64), 20)
    torch.testing.assert_close(result, images[:, :, 3:23, 11:31], rtol=0, atol=1e-9)


def test_corner_pixels_of_the_box_are_the_corners_of_the_crop() -> None:
    images, boxes = random_images(5, 25, 35, seed=6), random_boxes((5,), 25, 35, seed=6)
    crops = crop_and_resize(images, boxes, 16)
    for image, crop, (x0, y0, x1, y1) in zip(images, crops, boxes.int().tolist(), strict=True):
        corners = image[:, [y0, y0, y1, y1], [x0, x1, x0, x1]]
        torch.testing.assert_close(crop[:, [0, 0, -1, -1], [0, -1, 0, -1]], corners, rtol=0, atol=1e-9)


def test_fractional_box_on_a_plane() -> None:
    """Bilinear values of a plane are exact, so every crop pixel says where it was taken."""
    rows, columns = torch.meshgrid(torch.arange(30.0), torch.arange(40.0), indexing="ij")
    images = torch.stack([columns, rows, columns + rows]).double()[None]
    x0, y0, x1, y1 = 3.25, 7.5, 30.75, 19.0
    crop = crop_and_resize(images, torch.tensor([[x0, y0, x1, y1]], dtype=torch.float64), 12)[0]
    across = torch.linspace(x0, x1, 12, dtype=torch.float64).expand(12, 12)
    down = torch.linspace(y0, y1, 12, dtype=torch.float64)[:, None].expand(12, 12)
    torch.testing.assert_close(crop, torch.stack([across, down, across + down]), rtol=0, atol=1e-9)


def test_batch_equals_one_by_one() -> None:
    images, boxes = random_images(5, 32, 48, seed=7), random_boxes((5, 3), 32, 48, seed=8)
    together = crop_and_resize(images, boxes, 16)
    alone = torch.cat([crop_and_resize(image[None], box[None], 16) for image, box in zip(images, boxes, strict=True)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)
    one_each = torch.cat([crop_and_resize(images, boxes[:, index], 16)[None] for index in range(3)])
    torch.testing.assert_close(together.reshape(5, 3, 3, 16, 16), one_each.transpose(0, 1), rtol=0, atol=1e-12)


def test_values_outside_the_box_do_not_leak() -> None:
    images = torch.full((1, 3, 32, 32), 1e6, dtype=torch.float64)
    images[:, :, 8:20, 4:15] = 1
    result = crop_and_resize(images, torch.tensor([[4.0, 8.0, 14.0, 19.0]], dtype=torch.float64), 37)
    torch.testing.assert_close(result, torch.ones_like(result), rtol=0, atol=1e-6)


# ---- boxes that reach beyond the image ----------------------------------------------------------------------------

AROUND = 40  # pixels put round the image by hand, more than any box below reaches out


def reaching_boxes(height: int, width: int) -> Tensor:
    """`[N, 4]` inclusive whole pixels: over every border, over all of them, and with nothing of the image inside."""
    right, bottom = width - 1, height - 1
    boxes = [
        (-5, 2, 6, 9),  # one border after the other
        (3, -7, 8, 4),
        (right - 3, 1, right + 9, 8),
        (2, bottom - 1, 7, bottom + 12),
        (-6, -3, 4, 8),  # corners
        (right - 2, bottom - 4, right + 5, bottom + 1),
        (-9, -11, right + 13, bottom + 2),  # the whole image with some round it
        (-1, -1, width, height),
        (-1, 0, -1, bottom),  # the lines next to the image
        (width, 0, width, bottom),
        (0, height, right, height),
        (-20, 3, -4, 9),  # wholly outside
        (width + 3, -30, width + 20, -8),
        (width, height, width + 15, height + 6),
        (-1, -1, -1, -1),
        (-1, bottom, 0, bottom + 1),  # one pixel of the image
        (0, 0, right, bottom),  # and two that stay inside
        (2, 1, 8, 7),
    ]
    return torch.tensor(boxes, dtype=torch.float64)


def expected_with_surroundings(images: Tensor, boxes: Tensor, size: int, mode: str) -> Tensor:
    """The image with its surroundings made by hand, then cut as ever."""
    surrounded = F.pad(images, (AROUND,) * 4, mode=mode)
    return expected_crops(surrounded, boxes + AROUND, size)


@pytest.mark.parametrize(("height", "width"), ((32, 32), (17, 61), (23, 11), (31, 40)))
@pytest.mark.parametrize("size", (1, 7, 32, 45))
@pytest.mark.parametrize(("outside", "mode"), (("zeros", "constant"), ("border", "replicate")))
def test_boxes_beyond_the_image(height: int, width: int, size: int, outside: str, mode: str) -> None:
    images = random_images(2, height, width, seed=20) + 5  # nowhere near zero
    boxes = reaching_boxes(height, width).expand(2, -1, -1)
    result = crop_and_resize(images, boxes, size, outside=outside)
    assert result.shape == (2 * boxes.shape[1], 3, size, size)
    torch.testing.assert_close(result, expected_with_surroundings(images, boxes, size, mode), rtol=0, atol=1e-9)


def test_border_is_what_happens_unasked() -> None:
    images, boxes = random_images(1, 30, 26, seed=21), reaching_boxes(30, 26)[None]
    assert torch.equal(crop_and_resize(images, boxes, 16), crop_and_resize(images, boxes, 16, outside="border"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_zeros_beyond_the_image_at_full_size(dtype: torch.dtype) -> None:
    """Exactly nothing where no pixel is near, in the images' own type."""
    images = torch.full((1, 3, 448, 448), 3.0, dtype=dtype)
    boxes = torch.tensor([[[-96.0, -96.0, 95.0, 95.0], [400.0, 16.0, 591.0, 207.0], [448.0, 448.0, 639.0, 639.0]]])
    first, second, third = crop_and_resize(images, boxes, 192, outside="zeros")
    assert first.dtype == dtype
    expected = torch.zeros(3, 192, 192)
    expected[:, 96:, 96:] = 3
    torch.testing.assert_close(first.float(), expected, rtol=0, atol=1e-2)
    assert not first[:, :95].any() and not first[:, :, :95].any()
    expected = torch.zeros(3, 192, 192)
    expected[:, :, :48] = 3
    torch.testing.assert_close(second.float(), expected, rtol=0, atol=1e-2)
    assert not second[:, :, 49:].any()
    assert third.abs().max() < 1e-2
    assert not third[:, 1:, 1:].any()


def test_boxes_inside_do_not_care_what_is_outside() -> None:
    images, boxes = random_images(4, 29, 37, seed=22), random_boxes((4, 5), 29, 37, seed=22)
    zeros, border = (crop_and_resize(images, boxes, 19, outside=outside) for outside in ("zeros", "border"))
    torch.testing.assert_close(zeros, border, rtol=0, atol=1e-9)


def test_zeros_fade_in_within_one_pixel() -> None:
    """Between the last pixel and the zero next to it the value is in between, as between any two pixels."""
    images = torch.ones(1, 3, 9, 9, dtype=torch.float64)
    boxes = torch.tensor([[-2.0, 4.0, 1.0, 4.0]], dtype=torch.float64)
    row = crop_and_resize(images, boxes, 13, outside="zeros")[0, 0, 0]
    expected = [0, 0, 0, 0, 0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    torch.testing.assert_close(row, torch.tensor(expected).double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("outside", ("zeros", "border"))
@pytest.mark.parametrize("factor", (1, 2))
def test_windows_beyond_the_image(outside: str, factor: int) -> None:
    """`crop_windows` hands the choice on, also for images larger than the boxes' frame; `border` is its default."""
    input_size = 34
    images = random_images(2, factor * input_size, factor * input_size, seed=23) + 5
    boxes = torch.tensor([[-6, 3, 12, 20], [25, 28, 40, 43], [-19, 0, -3, 9], [4, 5, 20, 21]]).double().expand(2, 4, 4)
    result = crop_windows(images, boxes, input_size=input_size, outside=outside)
    assert result.shape == (8, 3, 17, 17)
    starts, ends = factor * boxes[..., :2], factor * (boxes[..., 2:] + 1) - 1
    mode = "constant" if outside == "zeros" else "replicate"
    expected = expected_with_surroundings(images, torch.cat([starts, ends], dim=-1), 17, mode)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-9)
    if outside == "border":
        assert torch.equal(crop_windows(images, boxes, input_size=input_size), result)


# ---- boxes in other frames ----------------------------------------------------------------------------------------


def test_resize_boxes_by_hand() -> None:
    boxes = torch.tensor([[0.0, 0.0, 447.0, 447.0], [31.0, 95.0, 63.0, 127.0]])
    assert resize_boxes(boxes, 2).tolist() == [[0, 0, 895, 895], [62, 190, 127, 255]]
    assert resize_boxes(boxes[0], 0.5).tolist() == [0, 0, 223, 223]
    assert torch.equal(resize_boxes(boxes, 1), boxes)


@pytest.mark.parametrize("shape", ((6,), (3, 5)))
@pytest.mark.parametrize("scale", (2.0, 1.5, 448 / 96, 0.25))
def test_resize_boxes_there_and_back(shape: tuple[int, ...], scale: float) -> None:
    boxes = random_boxes(shape, 96, 96)
    resized = resize_boxes(boxes, scale)
    assert resized.shape == boxes.shape
    torch.testing.assert_close(resized[..., 2:] - resized[..., :2] + 1, (boxes[..., 2:] - boxes[..., :2] + 1) * scale)
    torch.testing.assert_close(resize_boxes(resized, 1 / scale), boxes, rtol=0, atol=1e-3)


def test_boxes_in_image_by_hand() -> None:
    windows = torch.tensor([[[0.0, 0.0, 127.0, 127.0], [0.0, 0.0, 63.5, 31.75], [127.0, 0.0, 127.0, 127.0]]])
    result = boxes_in_image(windows, torch.tensor([[10.0, 20.0, 74.0, 116.0]]), 128)
    assert result.shape == (1, 3, 4)
    expected = [[10, 20, 74, 116], [10, 20, 42, 44], [74, 20, 74, 116]]
    torch.testing.assert_close(result[0], torch.tensor(expected).float(), rtol=0, atol=1e-4)


def test_boxes_in_image_of_the_whole_image_are_themselves() -> None:
    windows = random_boxes((2, 4), 96, 96).float()
    objects = torch.tensor([[0.0, 0.0, 95.0, 95.0]] * 2)
    torch.testing.assert_close(boxes_in_image(windows, objects, 96), windows, rtol=0, atol=1e-4)


def test_boxes_in_image_undo_the_resize() -> None:
    """Where the crop's corner pixels of a window came from, read off an image that holds its own coordinates."""
    size = 64
    rows, columns = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    images = torch.stack([columns, rows, rows]).double().expand(5, 3, size, size)
    objects, windows = random_boxes((5,), size, size, seed=11), random_boxes((5, 3), size, size, seed=12)
    crops = crop_and_resize(images, objects, size)
    located = boxes_in_image(windows, objects, size)
    for crop, window_boxes, located_boxes in zip(crops, windows.int().tolist(), located, strict=True):
        for (x0, y0, x1, y1), box in zip(window_boxes, located_boxes, strict=True):
            read = torch.stack([crop[0, y0, x0], crop[1, y0, x0], crop[0, y1, x1], crop[1, y1, x1]])
            torch.testing.assert_close(box.double(), read, rtol=0, atol=1e-4)


def test_windows_cut_from_the_image_show_what_the_crop_showed() -> None:
    size = 64
    generator = torch.Generator().manual_seed(13)
    coarse = torch.randn(3, 3, 4, 4, generator=generator, dtype=torch.float64)
    images = F.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=True)
    objects = torch.tensor([[0, 0, 63, 63], [5, 9, 60, 50], [20, 3, 51, 63]]).float()
    windows = torch.tensor([[0, 0, 31, 31], [31, 0, 63, 31], [15, 15, 47, 63]]).float().expand(3, 3, 4)
    from_crop = crop_and_resize(crop_and_resize(images, objects, size), windows, 32)
    from_image = crop_and_resize(images, boxes_in_image(windows, objects, size), 32)
    assert (from_crop - from_image).abs().max() < 0.02
    assert from_image.std() > 0.3


# ---- gradients, tracing -------------------------------------------------------------------------------------------


def everything(images: Tensor, objects: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    located = boxes_in_image(windows, objects, 32)
    return crop_and_resize(images, objects, 32), crop_and_resize(images, resize_boxes(located, 1.5), 16), located


def test_boxes_that_ask_for_a_gradient_get_that_of_finite_differences() -> None:
    """No sample lies on a pixel, where bilinear interpolation has a kink."""
    images = torch.rand(2, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    boxes = torch.tensor([[2.3, 3.1, 15.87, 17.9], [0.2, 1.4, 20.6, 9.3]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda boxes: crop_and_resize(images, boxes, 5), boxes)


def test_no_host_synchronisation_and_no_graph_break() -> None:
    images = random_images(2, 48, 48, dtype=torch.float32)
    inputs = images, random_boxes((2,), 32, 32).float(), random_boxes((2, 3), 32, 32, seed=1).float()
    expected = everything(*inputs)
    with reference.ForbidHostReads():
        result = everything(*inputs)
    torch.testing.assert_close(result, expected)
    torch.testing.assert_close(traced(everything)(*inputs), expected)


def test_low_precision_images_keep_their_coordinates() -> None:
    """A position such as 300.4 does not exist in bfloat16: it must not be computed in the images' type."""
    columns = torch.arange(448.0).expand(3, 448, 448)[None] / 448
    boxes = torch.tensor([[290.0, 290.0, 309.0, 309.0]])
    crop = crop_and_resize(columns.to(torch.bfloat16), boxes, 64).float()
    assert (crop - crop_and_resize(columns, boxes, 64)).abs().max() < 0.01


def test_pictures_that_are_not_square_are_refused() -> None:
    images, boxes = torch.zeros(1, 3, 96, 192), torch.tensor([[0.0, 0.0, 9.0, 9.0]])
    with pytest.raises(UserError, match="images have 96x192 pixels; expected square ones of at least 96x96"):
        crop_objects(images, boxes, input_size=96)
    with pytest.raises(UserError, match="images have 96x192 pixels; expected square ones of at least 96x96"):
        crop_windows(images, boxes[None], input_size=96)
