"""Make the README's pictures from a run on the demo birds: `python docs/make_pictures.py checkpoint/demo-sgkrl`.

    python docs/make_pictures.py --leak \\
      checkpoint/demo-sgkrl_published-batch-graph checkpoint/demo-sgkrl_published-image-graph

makes leak.jpg from two runs of `--model sgkrl_published`, the first with `--graph_scope batch`, the second with
`--graph_scope image`, each evaluated twice: with `test.py` and with `test.py --shuffle`.

The run has to be trained (`python train.py`) and evaluated (`python test.py checkpoint/demo-sgkrl/best.pth`). The
report's picture needs chromium; without it that one is left as it is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from config import rebuilt, restored  # noqa: E402
from datasets import Pictures, collate, loading_of, read_catalogue  # noqa: E402
from networks.evidence import forward_with_evidence  # noqa: E402
from networks.graph import nearest_neighbours, published_neighbours  # noqa: E402
from networks.windows import REFERENCE_GRID, WINDOW_SETS  # noqa: E402
from utils.data.demo_birds import draw_demo_picture  # noqa: E402
from utils.errors import UserError, exit_with_one_sentence  # noqa: E402
from utils.options import flat  # noqa: E402
from utils.reporting.drawing import INK, PAPER, SHADOW, TRACK, WINDOWS, to_pillow  # noqa: E402
from utils.reporting.panels import image_panel  # noqa: E402
from utils.training.building import load_trained  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
FOUR_BIRDS = 716  # pixels from the top of a run's pictures/test.png: its legend and two rows
LINES = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))  # Okabe and Ito


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the README's pictures from a run on the demo birds.")
    parser.add_argument("run", type=Path, nargs="?", help="the run's folder, trained and evaluated")
    parser.add_argument("--leak", type=Path, nargs=2, metavar=("BATCH_RUN", "IMAGE_RUN"), help="only leak.jpg")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to (docs)")
    options = parser.parse_args(arguments)
    if (options.run is None) == (options.leak is None):
        parser.error("give a run's folder, or --leak and two")
    options.out.mkdir(parents=True, exist_ok=True)
    if options.leak:
        path = options.out / "leak.jpg"
        draw_leak(*options.leak).save(path, quality=88, optimize=True)
        print(f"{path}: {path.stat().st_size // 1024} KB")
        return
    draw_pipeline(options.run / "best.pth").save(options.out / "pipeline.jpg", quality=88, optimize=True)
    with Image.open(options.run / "pictures" / "test.png") as drawn:
        four_birds = drawn.convert("RGB").crop((0, 0, drawn.width, FOUR_BIRDS))
    four_birds.save(options.out / "demo.jpg", quality=88, optimize=True)
    draw_windows().save(options.out / "windows.jpg", quality=88, optimize=True)
    draw_curves(options.run).save(options.out / "curves.png", optimize=True)
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print("no chromium here: report.jpg is left as it is")
    else:
        photograph(browser, options.run / "report.html").save(options.out / "report.jpg", quality=85, optimize=True)
    for path in sorted(options.out.glob("*.[jp][pn]g")):
        print(f"{path}: {path.stat().st_size // 1024} KB")


def draw_pipeline(checkpoint: Path) -> Image.Image:
    """What the network finds in the test bird that it names rightly and most surely of those with a good box."""
    trained = load_trained(checkpoint, rebuilt, device="cpu", precision="float32", workers=0)
    network, names = trained.network, trained.saved["class_names"]
    entries = read_catalogue("demo", None).test[::5]
    batch = collate(list(Pictures(entries, **loading_of(trained.settings))))
    output, evidence = forward_with_evidence(network, trained.execution.images(batch.images))
    probabilities = network.predict_logits(output).softmax(dim=1)
    true = probabilities.gather(1, batch.labels[:, None])[:, 0]
    scale = network.input_size / batch.images.shape[-1]
    distance = (output.object_boxes - batch.boxes * scale).abs().amax(dim=1) / network.input_size
    index = int((true - distance).argmax())
    values, labels = (t.tolist() for t in probabilities[index].topk(5))
    panel = image_panel(
        draw_demo_picture(entries[index].source),
        output,
        index,
        [names[label] for label in labels],
        values,
        input_size=network.input_size,
        title="top 5",
        evidence=evidence[index],
        height=256,
    )
    return to_pillow(panel)


def draw_windows() -> Image.Image:
    """The window sizes of the set for birds on a drawn bird, one panel per group."""
    entry = read_catalogue("demo", None).test[45]
    side, top, gap = 280, 44, 16
    bird = draw_demo_picture(entry.source).resize((side, side), Image.Resampling.BICUBIC, box=entry.box)
    groups = WINDOW_SETS["birds"]
    figure = Image.new("RGB", (gap + len(groups) * (side + gap), top + side + gap), PAPER)
    draw = ImageDraw.Draw(figure)
    cell = side / REFERENCE_GRID
    for number, (sizes, quota) in enumerate(groups):
        left = gap + number * (side + gap)
        shape = ", ".join(f"{height}x{width}" for height, width in sizes[:3]) + (" ..." if len(sizes) > 3 else "")
        draw.text((left, 12), f"group {number + 1}: windows of {shape} cells", fill=INK, font=_font(14), anchor="lm")
        draw.text((left, 31), f"the {quota} best with little overlap are kept", fill=INK, font=_font(13), anchor="lm")
        figure.paste(bird, (left, top))
        grid = Image.new("L", (side, side))
        lines = ImageDraw.Draw(grid)
        for step in range(REFERENCE_GRID + 1):
            lines.line((step * cell, 0, step * cell, side), fill=70)
            lines.line((0, step * cell, side, step * cell), fill=70)
        figure.paste((255, 255, 255), (left, top), grid)
        for place, (height, width) in enumerate(sizes[:3]):
            row, column = round((REFERENCE_GRID - height) * place / 2), round((REFERENCE_GRID - width) * place / 2)
            x, y = left + column * cell, top + row * cell
            box = (round(x), round(y), round(x + width * cell) - 1, round(y + height * cell) - 1)
            draw.rectangle(box, outline=WINDOWS[place], width=3)
            draw.rectangle((box[0], box[1], box[0] + 40, box[1] + 18), fill=WINDOWS[place])
            draw.text((box[0] + 20, box[1] + 9), f"{height}x{width}", fill=INK, font=_font(13), anchor="mm")
    return figure


def draw_curves(run: Path) -> Image.Image:
    """Accuracies, losses and boxes over the epochs, read from the run's TensorBoard events."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0})
    events.Reload()
    tags = set(events.Tags()["scalars"])
    charts = [
        ("validation/accuracy", [t for t in sorted(tags) if t.startswith("validation/accuracy/")], True),
        (
            "loss",
            ["train/loss/total", "train/loss/object", "validation/loss/object"],
            False,
        ),
        ("validation/box_iou", ["validation/box_iou/share_at_0.5", "validation/box_iou/mean"], True),
    ]
    width, height = 400, 300
    figure = Image.new("RGB", (len(charts) * width, height), PAPER)
    for number, (title, names, is_share) in enumerate(charts):
        curves = {t: [(p.step, p.value) for p in events.Scalars(t)] for t in names if t in tags}
        figure.paste(_chart(title, curves, (width, height), is_share=is_share), (number * width, 0))
    return figure


def _chart(title: str, curves: dict[str, list], size: tuple[int, int], *, is_share: bool) -> Image.Image:
    scale = 2  # drawn larger and reduced: smooth lines
    width, height = size[0] * scale, size[1] * scale
    chart = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(chart)
    left, right, top, bottom = 44 * scale, width - 14 * scale, 30 * scale, height - 28 * scale
    highest = 1.0 if is_share else max((v for points in curves.values() for _, v in points), default=1.0)
    last = max((step for points in curves.values() for step, _ in points), default=1)
    draw.text((left, 14 * scale), title, fill=INK, font=_font(13 * scale), anchor="lm")
    for tick in range(5):
        y = bottom - (bottom - top) * tick / 4
        draw.line((left, y, right, y), fill=TRACK, width=scale)
        value = f"{tick / 4:.0%}" if is_share else f"{highest * tick / 4:.1f}"
        draw.text((left - 6 * scale, y), value, fill=INK, font=_font(10 * scale), anchor="rm")

    def at(step: float, value: float) -> tuple[float, float]:
        return left + (right - left) * (step - 1) / max(last - 1, 1), bottom - (bottom - top) * value / highest

    for step in range(1, last + 1, max(1, last // 5)):
        draw.text((at(step, 0)[0], bottom + 10 * scale), str(step), fill=INK, font=_font(10 * scale), anchor="mm")
    for number, (name, points) in enumerate(curves.items()):
        colour = LINES[number % len(LINES)]
        draw.line([at(*point) for point in points], fill=colour, width=2 * scale, joint="curve")
        y = bottom - (8 + 15 * (len(curves) - 1 - number)) * scale if is_share else top + (8 + 15 * number) * scale
        short = name.rpartition("/")[2] if is_share else name.replace("/loss/", " ")
        draw.rectangle((right - 16 * scale, y - 2 * scale, right, y + scale), fill=colour)
        draw.text((right - 20 * scale, y), short, fill=INK, font=_font(11 * scale), anchor="rm")
    return chart.reduce(scale)


def draw_leak(batch_run: Path, image_run: Path) -> Image.Image:
    """Left: the graph of four test birds in class order, linked over the batch and inside each image.

    Right: how often the graph branch of the two runs is right on the test images in class order and shuffled.
    """
    scale = 2  # drawn larger and reduced: smooth lines
    accuracies = {scope: _graph_accuracies(run, scope) for run, scope in ((batch_run, "batch"), (image_run, "image"))}
    trained = load_trained(batch_run / "best.pth", rebuilt, device="cpu", precision="float32", workers=0)
    network, names = trained.network, trained.saved["class_names"]
    entries = read_catalogue("demo", None).test[40:44]
    batch = collate(list(Pictures(entries, **loading_of(trained.settings))))
    with torch.no_grad():
        output = network(trained.execution.images(batch.images))
    side, gap, size = 150 * scale, 14 * scale, network.input_size
    crops = []
    for entry, box in zip(entries, output.object_boxes.tolist(), strict=True):
        picture = draw_demo_picture(entry.source)
        left, top, right, bottom = (edge * picture.width / size for edge in (*box[:2], box[2] + 1, box[3] + 1))
        crops.append(picture.resize((side, side), Image.Resampling.BICUBIC, box=(left, top, right, bottom)))

    windows = output.window_boxes
    corners, k = windows[..., :2], network.graph.neighbours
    over_batch = published_neighbours(corners.flatten(0, 1)[None], k)[0]
    inside = torch.block_diag(*nearest_neighbours(corners, k)).bool()
    figure = Image.new("RGB", (1010 * scale, 496 * scale), PAPER)
    draw = ImageDraw.Draw(figure)
    left, tops = 16 * scale, (74 * scale, 306 * scale)
    titles = ("--graph_scope batch, as published", "--graph_scope image, ours")
    for title, adjacency, top, up in zip(titles, (over_batch, inside), tops, (58, 30), strict=True):
        owner = torch.arange(len(adjacency)) // windows.shape[1]
        others = int((adjacency & (owner[:, None] != owner)).sum())
        text = f"{title}: {others or 'none'} of {int(adjacency.sum())} edges lead to another picture"
        draw.text((left, top - up * scale), text, fill=INK, font=_font(14 * scale), anchor="lm")
        for number, crop in enumerate(crops):
            figure.paste(crop, (left + number * (side + gap), top))
        offsets = torch.tensor([[left + number * (side + gap), top] for number in range(len(crops))])
        _draw_graph(draw, windows * side / size, offsets, adjacency, scale)
        for number, entry in enumerate(entries):
            place = (left + number * (side + gap) + side / 2, top + side + 12 * scale)
            draw.text(place, names[entry.label], fill=INK, font=_font(12 * scale), anchor="mm")
    figure = figure.reduce(scale)
    figure.paste(_accuracy_bars(accuracies, (320, 496)), (figure.width - 320, 0))
    return figure


def _graph_accuracies(run: Path, scope: str) -> dict[str, tuple[float, list[float]]]:
    """Return the share that the graph branch gets right, and its 95 % interval, by the order of the test images."""
    found = {}
    for order, ending, flag in (("in class order", "", ""), ("shuffled", "-shuffled", " --shuffle")):
        path = run / f"report{ending}.json"
        if not path.is_file():
            raise UserError(f"there is no report {path}: write it with python test.py {run / 'best.pth'}{flag}")
        report = json.loads(path.read_text(encoding="utf-8"))
        settings = flat(restored(report["settings"]))
        trained_with = tuple(settings.get(name) for name in ("dataset", "model", "graph_scope"))
        if trained_with != ("demo", "sgkrl_published", scope):
            flags = f"--model sgkrl_published --graph_scope {scope}"
            raise UserError(f"{run} was not trained on the demo birds with {flags}: give the folder of a run that was")
        graph = report["branches"]["graph"]
        found[order] = (graph["top1"], graph["top1_interval_95"])
    return found


def _draw_graph(draw: ImageDraw.ImageDraw, windows: Tensor, offsets: Tensor, adjacency: Tensor, scale: int) -> None:
    """Draw windows [B, N, 4] in pixels of pictures that lie at offsets [B, 2], and the edges [BN, BN] between them."""
    B, N, _ = windows.shape
    boxes = (windows + offsets.repeat(1, 2)[:, None]).flatten(0, 1)
    for number, (x0, y0, x1, y1) in enumerate(boxes.round().int().tolist()):
        for grown, colour in ((scale, SHADOW), (0, WINDOWS[number % N])):
            draw.rectangle((x0 - grown, y0 - grown, x1 + grown, y1 + grown), outline=colour, width=2 * scale + grown)
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2).tolist()
    pairs = (adjacency | adjacency.T).triu(1).nonzero().tolist()
    for far in (False, True):
        for one, other in pairs:
            if (one // N != other // N) != far:
                continue
            (x0, y0), (x1, y1) = centres[one], centres[other]
            bow = 14 * scale + 0.16 * abs(x1 - x0) if far else 0  # over what lies between
            steps = torch.linspace(0, 1, 40).tolist()
            curve = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0) - 4 * bow * t * (1 - t)) for t in steps]
            draw.line(curve, fill=PAPER, width=4 * scale, joint="curve")
            draw.line(curve, fill=LINES[0] if far else LINES[1], width=2 * scale, joint="curve")
    for number, (x, y) in enumerate(centres):
        radius = 5 * scale
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), WINDOWS[number % N], SHADOW, scale)


def _accuracy_bars(accuracies: dict[str, dict], size: tuple[int, int]) -> Image.Image:
    """Bars of accuracies by scope and order, with 95 % intervals."""
    scale = 2
    chart = Image.new("RGB", (size[0] * scale, size[1] * scale), PAPER)
    draw = ImageDraw.Draw(chart)
    left, right, top, bottom = 48 * scale, chart.width - 16 * scale, 74 * scale, 424 * scale
    draw.text((left, 16 * scale), "the graph branch on the test images", fill=INK, font=_font(14 * scale), anchor="lm")
    for tick in range(6):
        y = bottom - (bottom - top) * tick / 5
        draw.line((left, y, right, y), fill=TRACK, width=scale)
        draw.text((left - 6 * scale, y), f"{tick / 5:.0%}", fill=INK, font=_font(11 * scale), anchor="rm")
    colours = dict(zip(next(iter(accuracies.values())), LINES[:2], strict=True))
    for number, (order, colour) in enumerate(colours.items()):
        x, y = left + number * 118 * scale, 42 * scale
        draw.rectangle((x, y - 6 * scale, x + 12 * scale, y + 6 * scale), fill=colour)
        draw.text((x + 18 * scale, y), order, fill=INK, font=_font(12 * scale), anchor="lm")
    group, bar = (right - left) / len(accuracies), 46 * scale
    for number, (scope, by_order) in enumerate(accuracies.items()):
        middle = left + (number + 0.5) * group
        for place, (order, (share, (low, high))) in enumerate(by_order.items()):
            x = middle + (place - 0.5) * (bar + 6 * scale)
            y, low, high = (bottom - (bottom - top) * value for value in (share, low, high))
            draw.rectangle((x - bar / 2, y, x + bar / 2, bottom), fill=colours[order])
            draw.line((x, low, x, high), fill=INK, width=scale)
            for end in (low, high):
                draw.line((x - 4 * scale, end, x + 4 * scale, end), fill=INK, width=scale)
            draw.text((x, high - 10 * scale), f"{share:.1%}", fill=INK, font=_font(12 * scale), anchor="mm")
        draw.text((middle, bottom + 16 * scale), f"{scope} graph", fill=INK, font=_font(13 * scale), anchor="mm")
    note = "lines: 95 % intervals"
    draw.text((right, bottom + 42 * scale), note, fill=INK, font=_font(11 * scale), anchor="rm")
    return chart.reduce(scale)


def photograph(browser: str, page: Path) -> Image.Image:
    """The upper part of the report, as a browser shows it."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "page.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1150,1100"]
        subprocess.run(
            [browser, *options, f"--user-data-dir={folder}/profile", f"--screenshot={shot}", page.resolve().as_uri()],
            check=True,
            capture_output=True,
        )
        with Image.open(shot) as picture:
            return picture.convert("RGB")


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
