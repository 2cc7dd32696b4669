"""report.html: what it holds, that it needs nothing else, and how it works in a real browser."""

from __future__ import annotations

import html.parser
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from utils.reporting.confusions import confusion_matrix
from utils.reporting.metrics import calibration
from utils.reporting.report import Mistake, epoch_of, write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
HOSTILE = "</script><script>document.title='taken'</script><img src=http://example.org/x onerror=alert(1)>\"'&"


def made_up_report(folder: Path, classes: int = 200) -> tuple[Path, list[str], torch.Tensor]:
    """The page of made-up predictions of `classes` classes, the first of which has a hostile name."""
    generator = torch.Generator().manual_seed(3)
    names = [HOSTILE, "Ünïcode 鳥", *(f"class {number}" for number in range(2, classes))]
    labels = torch.arange(classes - 1).repeat(5)  # the last class has no image
    wrong = torch.rand(len(labels), generator=generator) < 0.3
    predictions = torch.where(wrong, torch.randint(classes, (len(labels),), generator=generator), labels)
    probabilities = torch.rand(len(labels), generator=generator)
    correct = predictions == labels
    share = correct.float().mean().item()
    values = {"top1": share, "top1_interval_95": (0.1, 0.9), "top5": 1.0, "top5_interval_95": (0.5, 1.0)}
    overlaps = torch.rand(len(labels), generator=generator)
    report = {
        "checkpoint": f"checkpoint/{HOSTILE}/best.pth",
        "epoch": 3,
        "progress": None,
        "best_epoch": 3,
        "selected_on": "60 validation images",
        "data": {"root": "birds", "notes": [f"5 images of {HOSTILE} are left out"], "trained_on": 0},
        "prediction": "mean probability of raw, object",
        "images": len(labels),
        "exited": None,
        "branches": {"prediction": values, "raw": values | {"top1": 0.25}, "object": values | {"top1": 0.125}},
        "mean_per_class_accuracy": share,
        "classes": classes,
        "classes_with_images": classes - 1,
        "calibration": calibration(probabilities, correct),
        "boxes": {"mean": overlaps.mean().item(), "share_at_0.5": (overlaps >= 0.5).float().mean().item()},
        "images_per_second": 12.5,
        "settings": {"model": "sgkrl", "name": HOSTILE, "classes": None, "options": {"graph_edges": "overlap"}},
    }
    drawing = torch.randint(256, (3, 60, 90), dtype=torch.uint8, generator=generator)
    mistakes = [Mistake(drawing, f"{HOSTILE}/{n}.jpg", HOSTILE, names[n + 1], 1 - n / 100) for n in range(24)]
    matrix = confusion_matrix(predictions, labels, classes)
    path = folder / "report.html"
    write_report(path, report, class_names=names, matrix=matrix, overlaps=overlaps, mistakes=mistakes)
    return path, names, matrix


class Elements(html.parser.HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, list[str], torch.Tensor]:
    return made_up_report(tmp_path_factory.mktemp("report"))


def test_no_address_outside_the_page(page):
    elements = Elements(page[0].read_text(encoding="utf-8"))
    assert len(elements.tags) > 1000
    for tag, attributes in elements.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            address = attributes.get(name)
            assert address is None or address.startswith(("data:image/", "#")), (tag, name, address[:80])
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
    styles = re.findall(r"<style>(.*?)</style>", page[0].read_text(encoding="utf-8"), flags=re.DOTALL)
    assert "url(" not in "".join(styles)
    assert "@import" not in "".join(styles)


def test_classes_without_images_are_said_to_be_left_out(page):
    assert "mean accuracy of the classes (of 199 classes: 1 have no test image)" in page[0].read_text("utf-8")


def test_hostile_names_stay_text(page):
    elements = Elements(page[0].read_text(encoding="utf-8"))
    assert [tag for tag, _ in elements.tags].count("script") == 2  # ours, and the data of the matrix
    assert any(HOSTILE in text for text in elements.text)


def test_matrix_data_equal_the_counts(page):
    path, names, matrix = page
    (data,) = re.findall(r'<script type="application/json" id="matrix-data">(.*?)</script>', path.read_text("utf-8"))
    data = json.loads(data)
    assert data["names"] == names
    counts = torch.zeros_like(matrix)
    for row, cells in enumerate(data["rows"]):
        for column, count in cells:
            counts[row, column] = count
    assert torch.equal(counts, matrix)


def test_every_class_and_setting_has_its_row(page):
    path, names, matrix = page
    elements = Elements(path.read_text("utf-8"))
    values = [attributes.get("data-value") for tag, attributes in elements.tags if tag == "td"]
    assert set(names) <= set(values)
    assert {"model", "sgkrl", "None", "graph_edges", "overlap"} <= set(values)
    assert "options" not in values
    accuracy = (matrix.diagonal() / matrix.sum(dim=1))[5].item()
    numbers = [float(value) for value in values if re.fullmatch(r"[\d.]+", value)]
    assert any(number == pytest.approx(accuracy, abs=1e-6) for number in numbers)


@pytest.mark.parametrize("boxes", [True, False])
def test_a_system_without_boxes_or_mistakes_has_a_page_too(tmp_path, boxes):
    report = {
        "checkpoint": "best.pth",
        "epoch": 1,
        "progress": None,
        "best_epoch": None,
        "selected_on": "x",
        "data": {"root": None, "notes": [], "trained_on": 0},
        "prediction": "raw",
        "images": 4,
        "exited": None,
        "branches": {
            "prediction": {"top1": 1.0, "top1_interval_95": (0.5, 1.0), "top5": 1.0, "top5_interval_95": (0.5, 1.0)}
        },
        "mean_per_class_accuracy": 1.0,
        "classes": 2,
        "classes_with_images": 2,
        "calibration": calibration(torch.ones(4), torch.ones(4)),
        "boxes": {"mean": 0.5, "share_at_0.5": 0.5} if boxes else None,
        "images_per_second": 1.0,
        "settings": {},
    }
    matrix = torch.diag(torch.tensor([2, 2]))
    write_report(tmp_path / "report.html", report, class_names=["a", "b"], matrix=matrix)
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "No test image was classified wrongly" in text
    assert "epoch 1, chosen by x" in text
    assert "top-5" not in text  # of two classes
    assert "mean accuracy of the classes<" in text
    assert "nothing to measure" in text


def test_calibration_equals_a_slow_reference():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.cat([torch.rand(500, generator=generator), torch.tensor([0.0, 1.0, 0.2, 0.4])])
    correct = torch.rand(504, generator=generator) < probabilities
    found = calibration(probabilities, correct, bins=10)
    expected = 0.0
    for number, entry in enumerate(found["bins"]):
        inside = [i for i, p in enumerate(probabilities.tolist()) if min(int(p * 10), 9) == number]
        assert entry["count"] == len(inside)
        mean = sum(probabilities[i].item() for i in inside) / len(inside)
        right = sum(correct[i].item() for i in inside) / len(inside)
        assert entry["probability"] == pytest.approx(mean)
        assert entry["accuracy"] == pytest.approx(right)
        expected += len(inside) / 504 * abs(mean - right)
    assert found["expected_error"] == pytest.approx(expected)
    assert calibration(torch.tensor([1.0, 1.0]), torch.tensor([True, False]))["expected_error"] == 0.5
    assert calibration(torch.zeros(0), torch.zeros(0))["expected_error"] == 0


# ---- In a browser ---------------------------------------------------------------------------------------------------

# Put into a copy of the page: collects errors, works the page as a hand would, and leaves what it saw in the document.
WATCH = """<script>
window.seen = {errors: [], requests: []};
addEventListener("error", event => seen.errors.push(String(event.message || event.target.outerHTML)), true);
addEventListener("securitypolicyviolation", event => seen.errors.push("refused: " + event.blockedURI));
</script>"""
WORK = """<script>
addEventListener("load", () => {
  const column = (table, index) => [...table.tBodies[0].rows].map(row => row.cells[index].dataset.value);
  const classes = document.querySelector("#classes table");
  const press = index => classes.tHead.rows[0].cells[index].querySelector("button").click();
  press(2); seen.falling = column(classes, 2).map(Number);
  press(2); seen.rising = column(classes, 2).map(Number);
  seen.direction = classes.tHead.rows[0].cells[2].getAttribute("aria-sort");
  press(0); seen.names = column(classes, 0);
  seen.rowsKept = classes.tBodies[0].rows.length;
  seen.pictures = [...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight]);
  const place = document.querySelector("#matrix image").getBoundingClientRect();
  const at = (row, column) => {
    document.getElementById("matrix").dispatchEvent(new PointerEvent("pointermove", {
      clientX: place.left + (column + 0.5) / 200 * place.width,
      clientY: place.top + (row + 0.5) / 200 * place.height}));
    return document.getElementById("cell").textContent;
  };
  seen.corner = at(0, 0); seen.cell = at(7, 7);
  seen.width = place.width; seen.height = place.height;
  seen.title = document.title;
  const requests = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.requests = requests.filter(name => !name.startsWith("data:"));
  const result = document.createElement("pre");
  result.id = "seen"; result.textContent = JSON.stringify(seen); document.body.append(result);
});
</script>"""


def seen_in_browser(page: Path, folder: Path) -> dict:
    text = page.read_text(encoding="utf-8")
    worked = folder / "worked.html"
    worked.write_text(text.replace("<title>", WATCH + "<title>", 1).replace("</body>", WORK + "</body>"), "utf-8")
    ended = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000"),
            *("--window-size=1200,900", f"--user-data-dir={folder / 'profile'}", "--dump-dom", worked.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', ended.stdout, flags=re.DOTALL)
    assert found, ended.stderr[-2000:]
    return json.loads(html.unescape(found[1]))


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine: the page is not tried in a browser")
def test_in_a_browser_nothing_fails_tables_sort_and_pictures_load(page, tmp_path):
    path, names, matrix = page
    seen = seen_in_browser(path, tmp_path)
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["falling"] == sorted(seen["falling"], reverse=True)
    assert seen["rising"] == sorted(seen["falling"])
    assert seen["direction"] == "ascending"
    assert seen["rowsKept"] == len(names)
    assert sorted(seen["names"]) == sorted(names)
    assert [name for name in seen["names"] if name.startswith("class ")] == [f"class {n}" for n in range(2, 200)]
    assert seen["pictures"] == [[True, 90, 60]] * 24
    assert seen["title"] == f"checkpoint/{HOSTILE}/best.pth"
    assert seen["corner"] == f"{HOSTILE} taken for {HOSTILE}: {matrix[0, 0]} of 5"
    assert seen["cell"] == f"class 7 taken for class 7: {matrix[7, 7]} of 5"
    assert seen["width"] == pytest.approx(seen["height"])
    assert seen["width"] >= 3 * 200  # pixels: a cell can be pointed at


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        ({"epoch": 3, "best_epoch": 3}, "epoch 3, chosen by x"),
        ({"epoch": 3, "best_epoch": None, "weights": "ema"}, "epoch 3, averaged weights, chosen by x"),  # of others
        ({"epoch": 5, "best_epoch": 3}, "epoch 5, not the best epoch, 3, which was chosen by x"),
        (
            {"epoch": 5, "best_epoch": 5, "progress": {"epoch": 6, "step": 40}},
            "step 40 of epoch 6, not the best epoch, 5, which was chosen by x",
        ),
        (
            {"epoch": 0, "best_epoch": 0, "progress": {"epoch": 1, "step": 40}},
            "step 40 of epoch 1, before any epoch was evaluated",
        ),
    ],
    ids=str,
)
def test_only_the_best_epoch_was_chosen(report, sentence):
    assert epoch_of({"progress": None, "selected_on": "x"} | report) == sentence
