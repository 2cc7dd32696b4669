"""Make the README's pictures from a run on the demo birds: `python docs/make_pictures.py checkpoint/demo-sgkrl`.

The run has to be trained (`python train.py`) and evaluated (`python test.py checkpoint/demo-sgkrl/best.pth`). The
report's picture needs chromium; without it that one is left as it is.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # noqa: E402

from assembly import load_trained  # noqa: E402
from datasets import Pictures, collate, draw_demo_picture, read_catalogue  # noqa: E402
from networks.evidence import forward_with_evidence  # noqa: E402
from networks.windows import REFERENCE_GRID, WINDOW_SETS  # noqa: E402
from utils.panels import image_panel  # noqa: E402
from utils.pictures import INK, PAPER, TRACK, WINDOWS, to_pillow  # noqa: E402

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LINES = ((213, 94, 0), (0, 114, 178), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233))  # Okabe and Ito


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make the README's pictures from a run on the demo birds.")
    parser.add_argument("run", type=Path, help="the run's folder, trained and evaluated")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder to write to (docs)")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    draw_pipeline(options.run / "best.pth").save(options.out / "pipeline.jpg", quality=88, optimize=True)
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
    trained = load_trained(checkpoint, device="cpu", workers=0)
    network, names = trained.network, trained.saved["class_names"]
    entries = read_catalogue("demo", None).test[::5]
    batch = collate(list(Pictures(entries, image_size=trained.settings.image_size)))
    output, evidence = forward_with_evidence(network, trained.execution.images(batch.images), size=112)
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
    main()
