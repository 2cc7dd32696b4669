"""What holds whatever comes in: settings, lists of a data set, boxes, windows and masks made up by hypothesis.

The examples are the same in every run, so that nothing fails only now and then.
"""

from __future__ import annotations

import dataclasses
import tempfile
import types
import typing
from pathlib import Path

import numpy as np
import reference
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from config import DATASETS, Settings, complete, parse_settings
from datasets import Entry, read_catalogue
from networks import MODELS, Shared, build_options, find_system
from networks.crops import crop_and_resize, resize_boxes
from networks.localization import largest_component
from networks.windows import greedy_selection
from utils.data.catalogue import Catalogue
from utils.errors import UserError
from utils.options import SettingsError, flat, hints
from utils.reporting.metrics import paired_box_iou
from utils.shared_settings import OF_DATA_SET

HINTS = hints(Settings)
OWN = {model: hints(find_system(model).Options) for model in MODELS}  # the settings that each system alone has


def examples(count: int):
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        phases=(Phase.explicit, Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow],  # it measures the machine
    )


# ---- Settings -------------------------------------------------------------------------------------------------------

FOLDERS = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=15).map("no such folder/{}".format)
PATTERNS = st.text(min_size=1, max_size=8).filter(lambda pattern: pattern[0] != "-")  # '[-]a*' can be written
SHARES = st.floats(0, 1, exclude_max=True)
POSITIVE = st.floats(0, exclude_min=True, allow_infinity=False)
COUNTS = st.integers(0, 2**63 - 1)
# shared setting -> values that are possible whatever the others are
POSSIBLE = {
    "model": st.sampled_from(sorted(MODELS)),
    "dataset": st.sampled_from(sorted(DATASETS)),
    "data_root": FOLDERS,
    "checkpoint_dir": FOLDERS,
    "name": st.from_regex(r"[\w.+-]{1,12}", fullmatch=True),
    "classes": st.lists(PATTERNS, min_size=1, max_size=3).map(tuple),
    "fresh": st.booleans(),
    "seed": COUNTS,
    "validation": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "select_on": st.sampled_from(["validation", "test"]),
    "test_fraction": st.floats(0, 1, exclude_min=True, exclude_max=True),
    "flip": st.floats(0, 1),
    "brightness": SHARES,
    "contrast": SHARES,
    "crop_scale": st.floats(0.01, 1),
    "backbone": st.sampled_from(["resnet50", "resnet101"]),
    "pretrained": st.text(max_size=10),
    "stride_on_first_conv": st.booleans(),
    "prediction": st.lists(st.sampled_from(["raw", "object", "graph"]), min_size=1, unique=True).map(tuple),
    "dropout": SHARES,
    "batch_norm": st.just("shared"),
    "epochs": st.integers(5, 500),
    "learning_rate": POSITIVE,
    "head_learning_rate_factor": POSITIVE,
    "momentum": SHARES,
    "weight_decay": POSITIVE | st.just(0.0),
    "milestones": st.lists(st.integers(1, 500), max_size=4).map(tuple),
    "clip_gradient_norm": POSITIVE | st.just(0.0),
    "label_smoothing": SHARES,
    "loss_weights": st.dictionaries(st.sampled_from(["raw", "object", "window"]), POSITIVE | st.just(0.0)),
    "save_every_steps": COUNTS,
    "keep_checkpoints": COUNTS,
    "on_bad_image": st.sampled_from(["stop", "skip"]),
    "skip_nonfinite": COUNTS,
    "device": st.from_regex(r"auto|cpu|cuda(:[0-9]{1,2})?", fullmatch=True),
    "data_parallel": st.booleans(),
    "precision": st.sampled_from(["auto", "float32", "bf16", "fp16"]),
    "channels_last": st.booleans(),
    "compile": st.booleans(),
    "workers": st.integers(0, 1024),
    "prefetch": st.integers(1, 1024),
    "sync_batch_norm": st.booleans(),
    "cache": st.sampled_from(["none", "ram", "disk"]),
    "evaluation_batch_size": st.integers(1, 2**63 - 1),
    "log_every_steps": COUNTS,
    "pictures_every": COUNTS,
}


# those that go together are drawn in `possible_settings`, all others by their types
DRAWN = {"input_size", "image_size", "images_per_class", "batch_size", "batch_norm", "options"}

TEXTS_OF_OPTIONS = st.sampled_from(["fusion", "weighting", "birds", "vehicles"])


def values_of(hint: typing.Any) -> st.SearchStrategy:
    """Values of an annotated type within its limits, small ones more often than others."""
    kind, parts = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is typing.Annotated:
        return values_of(parts[0]).filter(lambda value: all(limit.allows(value) for limit in parts[1:]))
    if kind in (types.UnionType, typing.Union):
        return st.one_of(*map(values_of, parts))
    if kind is typing.Literal:
        return st.sampled_from(parts)
    if kind is tuple:
        several = parts[-1] is ...
        if several and parts[0] is str:
            return st.lists(TEXTS_OF_OPTIONS, max_size=2, unique=True).map(tuple)
        items = map(values_of, parts[:1] if several else parts)
        return st.lists(*items, max_size=3).map(tuple) if several else st.tuples(*items)
    return {
        bool: st.booleans(),
        int: st.integers(0, 20) | st.integers(0, 2**63 - 1),
        float: st.floats(0, 1) | st.floats(0, allow_infinity=False),
        str: TEXTS_OF_OPTIONS,
        types.NoneType: st.none(),
    }[kind]


@st.composite
def possible_options(draw, model: str, shared: Shared) -> dict[str, object]:
    """A system's own settings, of which any number were edited, to values that go together."""
    options: dict[str, object] = {}
    for name, hint in OWN[model].items():
        if draw(st.booleans()):
            edited = options | {name: draw(values_of(hint), label=name)}
            try:
                build_options(find_system(model), edited, shared)
            except UserError:
                continue  # not beside what was drawn before it
            options = edited
    return options


@st.composite
def possible_settings(draw) -> Settings:
    """Settings, complete, in which any number of fields were edited."""
    always = ("model", "data_root", "epochs")
    optional = {name: values for name, values in POSSIBLE.items() if name not in always}
    values = draw(st.fixed_dictionaries({name: POSSIBLE[name] for name in always}, optional=optional))
    if draw(st.booleans()):
        values["input_size"] = 32 * draw(st.integers(3, 20))
        values["image_size"] = values["input_size"] + draw(st.integers(0, 500))
    if draw(st.booleans()):
        values["images_per_class"] = draw(st.integers(2, 5))
        values["batch_size"] = values["images_per_class"] * draw(st.integers(2, 9))
    if not values.get("sync_batch_norm") and draw(st.booleans()):
        values["batch_norm"] = draw(st.sampled_from(["shared", "per_pass"]))
    dataset = values.get("dataset", "demo")
    if dataset == "demo" and "backbone" not in values:
        values["stride_on_first_conv"] = False  # the demo's backbone has no place for it
    other = {name for name, owner in OF_DATA_SET.items() if owner != dataset}
    for name in sorted(HINTS.keys() - POSSIBLE.keys() - DRAWN - other):
        if draw(st.booleans()):
            edited = values | {name: draw(values_of(HINTS[name]), label=name)}
            try:
                complete(Settings(**edited))
            except UserError:
                continue  # not beside what was drawn before it
            values = edited
    chosen = complete(Settings(**values))
    shared = Shared(**{name: getattr(chosen, name) for name in Shared._fields})
    return complete(dataclasses.replace(chosen, options=draw(possible_options(chosen.model, shared))))


def words_of(values: dict[str, object]) -> list[str]:
    """The command line that asks for settings by name."""
    words = []
    for name, value in values.items():
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--no-{name}"]
        elif isinstance(value, dict):
            words += [f"--{name}", *(f"{key}={number!r}" for key, number in value.items())]
        elif isinstance(value, tuple) and not any(isinstance(item, tuple) for item in value):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words += [f"--{name}={value}"]
    return words


@examples(20)
@given(possible_settings())
def test_settings_come_back_from_the_command_line(chosen):
    assert parse_settings(words_of(flat(chosen))) == chosen
    assert complete(chosen) == chosen


@examples(60)
@given(st.data(), st.sampled_from(MODELS))
def test_options_of_every_system_come_from_the_command_line_as_from_the_file(data, model):
    shared = {"model": model, "dataset": "folder", "data_root": "x"}
    options = data.draw(possible_options(model, Shared()), label="options")
    assert parse_settings(words_of(shared | options)) == complete(Settings(**shared, options=options))


NUMBERS = st.integers() | st.floats() | st.sampled_from([2**63, 10**400, -(10**400), True])
TEXTS = st.text(st.characters(), max_size=10) | st.sampled_from(["*_Gull", "auto", "none", "relative", "birds", "~a/b"])
JUNK = st.recursive(
    st.none() | NUMBERS | TEXTS | st.binary(max_size=3) | st.sampled_from([object(), ..., print, int, 1j]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(TEXTS | st.integers(), inner, max_size=2)
    ),
    max_leaves=8,
)


@examples(200)
@given(
    st.sampled_from(MODELS),
    st.dictionaries(st.sampled_from(sorted(HINTS)), JUNK, max_size=3),
    st.dictionaries(st.sampled_from(sorted({name for own in OWN.values() for name in own})), JUNK, max_size=3),
)
def test_junk_is_taken_or_refused_in_one_line(model, values, options):
    given = {"model": model, "data_root": "x", "options": options} | values
    try:
        chosen = complete(Settings(**given))
    except SettingsError as refusal:
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 1000
        names = [*values, *options, *(given["options"] if isinstance(given["options"], dict) else ())]
        assert any(str(name) in str(refusal) or repr(name) in str(refusal) for name in names)
    else:
        assert complete(chosen) == chosen


FLAGS = [f"--{name}" for names in (HINTS, *OWN.values()) for name in names]


@examples(100)
@given(st.lists(st.sampled_from(FLAGS) | TEXTS | NUMBERS.map("{!r:.99}".format), max_size=6))
def test_a_command_line_of_junk_is_taken_or_refused_in_one_line(words):
    try:
        parse_settings([word for word in words if not word.startswith("-h")])  # help is a way out of its own
    except SettingsError as refusal:
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 1000


# ---- The lists of CUB -----------------------------------------------------------------------------------------------

# Names may hold spaces within, and the spaces and line ends of other scripts anywhere.
KEYS = st.text("ab01_-#'é鳥\xa0\u2028\u3000", min_size=1, max_size=6)
NAMES = st.lists(KEYS, min_size=1, max_size=3).map(" ".join)
EDGES = st.floats(0, 1e6) | st.integers(0, 500).map(float)


@st.composite
def birds(draw) -> dict[str, list[tuple[str, ...]]]:
    """The rows of the five lists, each in an order of its own, as texts."""
    keys, names = (draw(st.lists(texts, min_size=2, max_size=4, unique=True)) for texts in (KEYS, NAMES))
    class_names = dict(zip(keys, names, strict=False))
    files = draw(st.dictionaries(KEYS, st.tuples(NAMES, NAMES).map("/".join), min_size=2, max_size=6))
    images = list(files)
    classes = draw(st.lists(st.sampled_from(list(class_names)), min_size=len(images), max_size=len(images)))
    boxes = draw(st.lists(st.tuples(*[EDGES] * 4), min_size=len(images), max_size=len(images)))
    flags = draw(st.lists(st.sampled_from("01"), min_size=len(images), max_size=len(images)))
    tables = {
        "classes": list(class_names.items()),
        "images": list(files.items()),
        "image_class_labels": list(zip(images, classes, strict=True)),
        "bounding_boxes": [(image, *map(repr, box)) for image, box in zip(images, boxes, strict=True)],
        "train_test_split": list(zip(images, flags, strict=True)),
    }
    return {name: draw(st.permutations(rows)) for name, rows in tables.items()}


@st.composite
def as_text(draw, rows: list[tuple[str, ...]]) -> bytes:
    """A list as one editor or the other leaves it: line ends, blank lines, spaces, a mark at its start."""
    line_end = draw(st.sampled_from(["\n", "\r\n", "\r"]))
    gap, margin = draw(st.sampled_from([" ", "\t", "  ", " \t "])), draw(st.sampled_from(["", " ", "\t"]))
    lines = [margin + gap.join(row) + margin for row in rows]
    for place in draw(st.lists(st.integers(0, len(lines)), max_size=2)):
        lines.insert(place, margin)
    mark = draw(st.sampled_from([b"", b"\xef\xbb\xbf"]))
    return mark + (line_end.join(lines) + draw(st.sampled_from(["", line_end]))).encode()


def plain_catalogue(tables: dict[str, list[tuple[str, ...]]], root: Path) -> tuple[list[Entry], list[Entry], list[str]]:
    """Training and test entries and class names, looked up row by row."""
    class_of, split_of = dict(tables["image_class_labels"]), dict(tables["train_test_split"])
    used = [(key, name) for key, name in tables["classes"] if key in class_of.values()]
    entries: dict[str, list[Entry]] = {"1": [], "0": []}
    for image, file in tables["images"]:
        (corner,) = [row[1:] for row in tables["bounding_boxes"] if row[0] == image]
        x, y, width, height = map(float, corner)
        label = [key for key, _ in used].index(class_of[image])
        entries[split_of[image]].append(Entry(root / "images" / file, label, (x, y, x + width, y + height)))
    return entries["1"], entries["0"], [name for _, name in used]


def can_be_a_data_set(tables: dict[str, list[tuple[str, ...]]]) -> bool:
    """Two classes or more have pictures, and some to train on; there are test pictures, and none is listed twice."""
    train, test, names = plain_catalogue(tables, Path("x"))
    files = {file for _, file in tables["images"]}
    in_use = {entry.label for entry in train} == set(range(len(names)))
    return in_use and len(names) > 1 and len(test) > 0 and len(files) == len(tables["images"])


@examples(30)
@given(st.data(), birds().filter(can_be_a_data_set))
def test_lists_of_any_spelling_give_the_same_catalogue(data, tables):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name, rows in tables.items():
            (root / f"{name}.txt").write_bytes(data.draw(as_text(rows), label=name))
        for _, file in tables["images"]:
            (root / "images" / file).parent.mkdir(parents=True, exist_ok=True)
            (root / "images" / file).touch()
        assert read_catalogue("cub", root) == Catalogue(*plain_catalogue(tables, root))  # and no notes


# ---- Boxes ----------------------------------------------------------------------------------------------------------


def pixels(box: tuple[int, int, int, int]) -> set[tuple[int, int]]:
    x0, y0, x1, y1 = box
    return {(x, y) for x in range(x0, x1) for y in range(y0, y1)}


@examples(60)
@given(st.lists(st.tuples(*[st.tuples(*[st.integers(-4, 9)] * 4)] * 2), min_size=1, max_size=5))
def test_overlap_is_that_of_sets_of_pixels(pairs):
    """Boxes without area and with their edges swapped included."""
    overlaps = paired_box_iou(*(torch.tensor(boxes) for boxes in zip(*pairs, strict=True)))
    for overlap, (one, other) in zip(overlaps.tolist(), pairs, strict=True):
        both, either = pixels(one) & pixels(other), pixels(one) | pixels(other)
        assert abs(overlap - len(both) / max(len(either), 1)) < 1e-6


@examples(60)
@given(st.data(), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4))
def test_a_resized_box_covers_the_same_part(data, width, height, scale):
    """Of a picture in which every pixel has become scale x scale pixels."""
    x0, y0 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x1, y1 = data.draw(st.integers(x0, width - 1)), data.draw(st.integers(y0, height - 1))
    picture = np.arange(width * height).reshape(height, width)
    big = np.kron(picture, np.ones((scale, scale), dtype=int))
    box = torch.tensor([[x0, y0, x1, y1]])
    u0, v0, u1, v1 = resize_boxes(box, scale)[0].tolist()
    covered = np.kron(picture[y0 : y1 + 1, x0 : x1 + 1], np.ones((scale, scale), dtype=int))
    assert np.array_equal(big[v0 : v1 + 1, u0 : u1 + 1], covered)
    back = resize_boxes(resize_boxes(box.double(), scale), 1 / scale)
    assert torch.allclose(back, box.double(), atol=1e-9)


def looked_up(image: Tensor, x: float, y: float, outside: str) -> Tensor:
    """The colour at a point of an image [C, H, W], between its four nearest pixels."""
    _, H, W = image.shape
    if outside == "border":
        x, y = min(max(x, 0.0), W - 1.0), min(max(y, 0.0), H - 1.0)
    column, row = int(np.floor(x)), int(np.floor(y))
    colour = torch.zeros(image.shape[0], dtype=image.dtype)
    for c, r in ((column, row), (column + 1, row), (column, row + 1), (column + 1, row + 1)):
        if 0 <= c < W and 0 <= r < H:
            colour = colour + image[:, r, c] * ((1 - abs(x - c)) * (1 - abs(y - r)))
    return colour


@examples(60)
@given(st.data(), st.integers(2, 6), st.integers(2, 6), st.integers(2, 4), st.sampled_from(["border", "zeros"]))
def test_crops_are_looked_up_point_by_point(data, height, width, size, outside):
    corners = st.floats(-3, 9) | st.integers(-3, 9).map(float)
    count = data.draw(st.integers(1, 3))
    boxes = data.draw(st.lists(st.tuples(*[corners] * 4), min_size=2 * count, max_size=2 * count))
    images = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(size), dtype=torch.float64)
    crops = crop_and_resize(images, torch.tensor(boxes, dtype=torch.float64).view(2, count, 4), size, outside=outside)
    assert crops.shape == (2 * count, 3, size, size)
    for number, (x0, y0, x1, y1) in enumerate(boxes):
        for row in range(size):
            for column in range(size):
                x, y = x0 + (x1 - x0) * column / (size - 1), y0 + (y1 - y0) * row / (size - 1)
                colour = looked_up(images[number // count], x, y, outside)
                assert torch.allclose(crops[number, :, row, column], colour, atol=1e-9)


# ---- Windows and masks ----------------------------------------------------------------------------------------------


def selected_one_by_one(
    scores: list[int], conflicts: list[list[bool]], quota: int, restrictions: list[list[bool]]
) -> list[int]:
    left, chosen = list(range(len(scores))), []
    for step in range(quota):
        preferred = [i for i in left if restrictions[step][i]] if step < len(restrictions) else []
        candidates = preferred or left
        chosen.append(max(candidates, key=lambda i: (scores[i], -i)) if candidates else chosen[-1])
        left = [i for i in left if not conflicts[chosen[-1]][i]]
    return chosen


@examples(80)
@given(st.data(), st.integers(1, 7), st.integers(1, 6), st.integers(1, 3))
def test_windows_are_selected_as_one_by_one(data, count, quota, batch):
    """Equal scores, everything in conflict and nothing left to choose included."""
    row = st.lists(st.booleans(), min_size=count, max_size=count)
    conflicts = data.draw(st.lists(row, min_size=count, max_size=count), label="conflicts")
    for i in range(count):
        conflicts[i][i] = True  # as of every box with itself
    scores = data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=count, max_size=count), min_size=batch))
    restrictions = data.draw(st.lists(row, max_size=quota + 1), label="restrictions")
    picks = greedy_selection(
        torch.tensor(scores).float(), torch.tensor(conflicts), quota, [torch.tensor(r) for r in restrictions]
    )
    assert picks.tolist() == [selected_one_by_one(row, conflicts, quota, restrictions) for row in scores]


@examples(100)
@given(st.data(), st.integers(1, 9), st.integers(1, 9))
def test_the_largest_component_is_that_of_scikit_image(data, height, width):
    bits = data.draw(st.lists(st.integers(0, 2 ** (height * width) - 1), min_size=1, max_size=4))
    masks = np.array([[bit >> i & 1 for i in range(height * width)] for bit in bits], dtype=bool)
    masks = masks.reshape(-1, height, width)
    found = largest_component(torch.from_numpy(masks)).numpy()
    for mask, component in zip(masks, found, strict=True):
        assert np.array_equal(component, reference.largest_component(mask))
