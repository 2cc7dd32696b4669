"""Every part against its slow reference, equality checked: `python benchmarks/parts.py`.

The references of tests/reference.py go image by image, window by window, as published code does. A part that differs
from its reference ends the benchmark with exit code 1.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from measuring import CLOCKS, PROJECT, interleaved, machine, ratio, write_json
from torch import Tensor

from networks.backbone import STRIDE
from networks.crops import crop_and_resize
from networks.graph import GraphHead
from networks.jigsaw import permute_blocks, random_permutations
from networks.localization import activation_map, adaptive_mask, cell_boxes_to_pixels, localize
from networks.parts import PartProposals
from networks.suppression import suppress
from networks.windows import WindowSelector, scale_window_set
from utils.errors import exit_with_one_sentence
from utils.training.allocator import keep_freed_memory
from utils.training.distributed import choose_device

sys.path.insert(0, str(PROJECT / "tests"))

import reference  # noqa: E402

WINDOWS, NEIGHBOURS, PROPOSALS, BLOCKS, SHARE = 7, 3, 6, 2, 0.7


class Part(NamedTuple):
    ours: Callable[[], Tensor]
    slow: Callable[[], Tensor]
    tolerance: float = 0.0  # float32 sums in another order, and float32 positions of samples


def main(arguments: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="The parts against their slow references.")
    parser.add_argument("--batches", type=int, nargs="+", default=(4, 16, 64), metavar="IMAGES")
    parser.add_argument("--input_size", type=int, default=448)
    parser.add_argument("--channels", type=int, default=2048, help="of the feature maps (default: 2048, ResNet-50's)")
    parser.add_argument("--device", default="auto", help="of the parts; the references compute on the CPU")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 1 on a machine shared with others")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for --threads 1 on a shared machine"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()  # as train.py and test.py do
    device = choose_device(options.device)
    report = {"machine": machine(device), "input_size": options.input_size, "parts": []}
    print(f"{report['machine']['processor']}, {device}, {torch.get_num_threads()} threads, {options.clock} clock")
    print(f"{'part':<14}{'images':>7}{'ours ms':>10}{'reference ms':>14}{'times':>9}  equal", flush=True)
    for batch_size in options.batches:
        for name, part in parts_of(batch_size, options.input_size, options.channels, device).items():
            found, expected = part.ours().cpu(), part.slow()
            error = (found.double() - expected.double()).abs().max().item()
            timings = interleaved({"ours": part.ours, "reference": part.slow}, options.rounds, device, options.clock)
            ours, slow = timings["ours"], timings["reference"]
            times = ratio(slow, ours)
            report["parts"].append(
                {
                    "part": name,
                    "batch_size": batch_size,
                    "error": error,
                    "equal": error <= part.tolerance,
                    "times": times,
                }
                | timings
            )
            print(
                f"{name:<14}{batch_size:>7}{1000 * ours['median']:>10.2f}{1000 * slow['median']:>14.1f}{times:>9.1f}"
                f"  {'yes' if error == 0 else f'to {error:.0e}'}{'' if error <= part.tolerance else ': NO'}",
                flush=True,
            )
    if options.json is not None:
        write_json(options.json, report)
    if not all(part["equal"] for part in report["parts"]):
        sys.exit(1)
    return report


def parts_of(B: int, input_size: int, channels: int, device: torch.device) -> dict[str, Part]:
    generator = torch.Generator().manual_seed(0)
    grid = input_size // STRIDE
    # Whole numbers, so that sums are exact in any order and equal scores occur.
    features = torch.randint(0, 9, (2, B, channels, grid, grid), generator=generator).float()
    final, penultimate = features
    boxes = random_boxes((B, WINDOWS), input_size, generator)
    images = torch.randn(B, 3, input_size, input_size, generator=generator)
    nodes = torch.randn(B, WINDOWS, channels, generator=generator)
    return {
        "localization": localization(final, penultimate, device),
        "object crops": crops(images, boxes[:, :1], input_size, device),
        "window crops": crops(images, boxes, input_size // 2, device),
        "windows": windows(final, device),
        "graph": graph(nodes, boxes, device),
        "jigsaw": jigsaw(images, device),
        "suppression": suppression(final, device),
        "anchor NMS": anchor_selection(B, grid, device, generator),
    }


def localization(final: Tensor, penultimate: Tensor, device: torch.device) -> Part:
    ours_final, ours_penultimate = final.to(device), penultimate.to(device)

    def ours() -> Tensor:
        found = localize(activation_map(ours_final), activation_map(ours_penultimate))
        return torch.cat([cell_boxes_to_pixels(found.boxes, STRIDE), adaptive_mask(found).flatten(1).float()], dim=1)

    def slow() -> Tensor:
        rows = []
        for one, other in zip(final, penultimate, strict=True):
            masks = [reference.mask_above_mean(m.sum(dim=0, dtype=torch.float64).numpy()) for m in (one, other)]
            cells, box = reference.localize(*masks)
            mask = torch.from_numpy(reference.adaptive_mask(cells, box)).flatten().float()
            rows.append(torch.cat([torch.tensor(reference.cell_box_to_pixels(box, STRIDE)).float(), mask]))
        return torch.stack(rows)

    return Part(ours, slow)


def crops(images: Tensor, boxes: Tensor, size: int, device: torch.device) -> Part:
    ours_images, ours_boxes = images.to(device), boxes.to(device)

    def slow() -> Tensor:
        pairs = ((image, box) for image, own in zip(images, boxes, strict=True) for box in own)
        return torch.stack([reference.crop_and_resize(image, box, size) for image, box in pairs])

    return Part(lambda: crop_and_resize(ours_images, ours_boxes, size), slow, 1e-3)


def windows(final: Tensor, device: torch.device) -> Part:
    grid = final.shape[-1]
    selector = WindowSelector("birds", grid_size=grid, stride=STRIDE).to(device)
    window_set = scale_window_set(reference.BIRDS, grid)
    ours_final = final.to(device)

    def slow() -> Tensor:
        return torch.stack([torch.from_numpy(reference.select_windows(f, window_set, STRIDE)) for f in final])

    return Part(lambda: selector(activation_map(ours_final)), slow)


def graph(nodes: Tensor, boxes: Tensor, device: torch.device) -> Part:
    head = GraphHead(nodes.shape[-1], 200).to(device).eval()
    ours_nodes, ours_boxes = nodes.to(device), boxes.to(device)

    @torch.no_grad()
    def slow() -> Tensor:
        first, second = head.cpu().convolutions
        rows = []
        for own, own_boxes in zip(nodes, boxes, strict=True):
            edges = reference.neighbour_edges(own_boxes[:, :2].numpy(), NEIGHBOURS)
            edges = sorted({*edges, *((j, i) for i, j in edges)})
            for layer in (first, second):
                own = torch.relu(reference.graph_convolution(own, edges, layer.lin.weight, layer.bias))
            rows.append(head.classifier(own.mean(dim=0)))
        head.to(device)
        return torch.stack(rows)

    return Part(torch.no_grad()(lambda: head(ours_nodes, ours_boxes)), slow, 1e-4)


def jigsaw(images: Tensor, device: torch.device) -> Part:
    permutations = random_permutations(len(images), BLOCKS**2, torch.device("cpu"))
    ours_images, ours_permutations = images.to(device), permutations.to(device)

    def slow() -> Tensor:
        side = images.shape[-1] // BLOCKS
        result = torch.empty_like(images)
        for image, order, target in zip(images, permutations.tolist(), result, strict=True):
            for place, source in enumerate(order):
                (row, column), (from_row, from_column) = divmod(place, BLOCKS), divmod(source, BLOCKS)
                target[:, row * side : (row + 1) * side, column * side : (column + 1) * side] = image[
                    :, from_row * side : (from_row + 1) * side, from_column * side : (from_column + 1) * side
                ]
        return result

    return Part(lambda: permute_blocks(ours_images, ours_permutations, BLOCKS), slow)


def suppression(final: Tensor, device: torch.device) -> Part:
    ours_final = final.to(device)

    def slow() -> Tensor:
        result = final.clone()
        for image in result:
            for channel in image:
                channel.clamp_(max=(channel.max() * SHARE).item())
        return result

    return Part(lambda: suppress(ours_final, SHARE), slow)


def anchor_selection(B: int, grid: int, device: torch.device, generator: torch.Generator) -> Part:
    proposals = PartProposals(PROPOSALS, grid_size=grid, stride=STRIDE, every_level=False).to(device)
    conflicts = proposals.conflicts.cpu().numpy()
    anchors = proposals.boxes.cpu()
    scores = torch.randint(0, 500, (B, len(anchors)), generator=generator).float()
    ours_scores = scores.to(device)

    def slow() -> Tensor:
        return torch.stack([anchors[reference.greedy_selection(own.numpy(), conflicts, PROPOSALS)] for own in scores])

    return Part(lambda: proposals(ours_scores)[0], slow)


def random_boxes(shape: tuple[int, ...], size: int, generator: torch.Generator) -> Tensor:
    """Whole inclusive pixel boxes [..., 4] of at least an eighth of the side."""
    least = math.ceil(size / 8)
    start = torch.randint(0, size - least, (*shape, 2), generator=generator)
    room = torch.rand(*shape, 2, generator=generator) * (size - least - start)
    return torch.cat([start, start + least - 1 + room.long()], dim=-1).float()


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
