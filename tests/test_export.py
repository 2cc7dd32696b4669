"""Exported systems predict as the eager ones do, on images and batch sizes that they were not traced with."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

import config
import export
from datasets import Entry, Pictures, collate, loading_of
from networks import MODELS, build_network, find_system
from utils.checkpoint import save_checkpoint
from utils.data.image_batches import normalised
from utils.errors import exit_with_one_sentence
from utils.files import SavingError
from utils.training.building import build_from_settings, load_trained

PROJECT = Path(export.__file__).resolve().parent
WINDOWS = ((((5, 5),), 2), (((8, 8),), 1))
FOUR_WINDOWS = ((((5, 5),), 2), (((8, 8),), 2))  # a node and its three neighbours in a single picture, as published
CELLS = {"window_source": "stage3"}
ONNX_IS_THERE = all(importlib.util.find_spec(name) for name in (*export.ONNX_PACKAGES, "onnxruntime"))
NAMES = ["blue", "green <b>", "rød"]


def pipeline_of(model: str, **options) -> export.Pipeline:
    torch.manual_seed(3)
    windows = {"windows": WINDOWS} if "windows" in find_system(model).Options.__dataclass_fields__ else {}
    options = {"num_classes": 3, "backbone": "resnet18", "input_size": 96, **windows, **options}
    return export.Pipeline(build_network(model, **options).eval(), mask_background=True).eval()


def random_images(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Noise round a bright patch somewhere: the boxes differ from image to image."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 90, (count, 3, size, size), generator=generator, dtype=torch.uint8)
    for image in images:
        x, y = torch.randint(0, size // 2, (2,), generator=generator).tolist()
        image[:, y : y + size // 2, x : x + size // 3] += 150
    return images


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(pytest.param(model, {}, marks=[] if model == "mmal" else pytest.mark.slow) for model in MODELS),
        pytest.param(
            "sgkrl_published",
            {"graph_scope": "batch", "prediction": ("graph",), "windows": FOUR_WINDOWS},
            marks=pytest.mark.slow,
        ),
        pytest.param("mmal", {"batch_norm": "per_pass"}, marks=pytest.mark.slow),
        pytest.param("sgkrl", CELLS, marks=pytest.mark.slow),
        pytest.param("sgkrl", {"pretrained": None, "localization": "colocalization"}, marks=pytest.mark.slow),
        pytest.param("sgkrl", {"pretrained": None, "localization": "learned"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_graphs_predict_as_the_eager_systems_do(model, options):
    pipeline = pipeline_of(model, **options)
    if pipeline.network.takes_boxes:
        pipeline.network.prepare([(normalised(random_images(4, 128)), torch.zeros(4, dtype=torch.int64))])
        pipeline.network.objects_are_found()
    graph = export.trace(pipeline, 128).module()
    for count in (1, 2, 5):
        images = random_images(count, 128, seed=count)
        with torch.no_grad():
            expected = pipeline(images)
        found = graph(images)
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            assert torch.allclose(found[name], values, atol=1e-5), name
    # Nothing was fixed while tracing. CAL crops where a map reaches a tenth of its maximum: untrained, all do.
    if "object_boxes" in expected and model != "cal":
        assert len(expected["object_boxes"].unique(dim=0)) > 1


@pytest.fixture(scope="module")
def checkpoint(tiny_run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    torch.manual_seed(0)
    loading = ("--resize_size", "118", "--normalization", "half")
    settings = config.parse_settings(tiny_run(folder, "--precision", "float32", *loading, model="sgkrl"))
    network = build_from_settings(settings, 3, load_weights=False)
    values = dataclasses.asdict(settings)
    content = {"settings": values, "class_names": NAMES, "selected_on": "nothing", "epoch": 1}
    save_checkpoint(folder / "best.pth", content | {"network": network.state_dict()})
    return folder / "best.pth"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures")
    paths = []
    for number, (width, height) in enumerate([(90, 60), (50, 120), (96, 96)]):
        pixels = random_images(1, 120, seed=number)[0].permute(1, 2, 0).numpy()[:height, :width]
        paths.append(folder / f"{number}.png")
        Image.fromarray(numpy.ascontiguousarray(pixels)).save(paths[-1])
    return paths + other_kinds(folder, Image.open(paths[0]))


def other_kinds(folder: Path, picture: Image.Image) -> list[Path]:
    """A picture as cameras and drawing programs store it: turned, transparent, with 16 bits, large."""
    exif = Image.Exif()
    exif[274] = 6
    picture.save(folder / "turned.png", exif=exif)
    picture.save(folder / "turned.tif", exif=exif)
    transparent = picture.convert("RGBA")
    transparent.putalpha(Image.linear_gradient("L").resize(picture.size))
    transparent.save(folder / "transparent.png")
    gray = numpy.asarray(picture.convert("L")).astype("uint16") * 257
    Image.fromarray(gray).save(folder / "sixteen.png")
    large = picture.resize((1800, 1200))
    large.save(folder / "large.jpg", quality=95, exif=exif)
    large.save(folder / "several.jpg", format="MPO", save_all=True, append_images=[large.rotate(180)])
    names = ("turned.png", "turned.tif", "transparent.png", "sixteen.png", "large.jpg", "several.jpg")
    return [folder / name for name in names]


def predictions_of(checkpoint: Path, pictures: list[Path]) -> list[tuple[str, float]]:
    """The likeliest name and its probability by the code base itself, from the files."""
    trained = load_trained(checkpoint, config.rebuilt)
    batch = collate(list(Pictures([Entry(path, 0) for path in pictures], **loading_of(trained.settings))))
    with torch.no_grad():
        output = trained.network(trained.execution.images(batch.images))
        values, labels = trained.network.predict_logits(output).softmax(dim=1).max(dim=1)
    return [(NAMES[label], value) for label, value in zip(labels.tolist(), values.tolist(), strict=True)]


def run_example(name: str, model: Path, pictures: list[Path], folder: Path) -> list[str]:
    """Copied out of the project, so that it finds nothing of it."""
    example = Path(shutil.copy(PROJECT / "docs" / name, folder))
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH" or not ONNX_IS_THERE}
    if ONNX_IS_THERE:
        environment["PYTHONPATH"] = os.environ.get("PYTHONPATH", "")
    ended = subprocess.run(
        [sys.executable, str(example), str(model), *map(str, pictures)],
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"},
        timeout=120,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


@pytest.mark.slow
def test_the_example_runs_the_file_without_this_code(checkpoint, pictures, tmp_path, capsys):
    out = tmp_path / "deep" / "model.pt2"
    export.main(["--checkpoint", str(checkpoint), "--out", str(out)])
    assert "3 classes" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["model.pt2"]
    lines = run_example("run_exported.py", out, pictures, tmp_path)
    predictions = predictions_of(checkpoint, pictures)
    assert lines == [f"{path}: {n} {v:.1%}" for path, (n, v) in zip(pictures, predictions, strict=True)]
    assert len((PROJECT / "docs" / "run_exported.py").read_text("utf-8").splitlines()) <= 40


@pytest.mark.skipif(not ONNX_IS_THERE, reason="onnx, onnxscript or onnxruntime is missing: ONNX files are not tried")
@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(pytest.param(model, {}, marks=pytest.mark.slow) for model in MODELS),
        ("sgkrl", CELLS),
    ],
    ids=str,
)
def test_onnx_predicts_as_the_eager_systems_do(model, options, tmp_path):
    import onnxruntime

    pipeline = pipeline_of(model, **options)
    export.save_onnx(pipeline, tmp_path / "model.onnx", {"class_names": NAMES, "image_size": 128})
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert json.loads(session.get_modelmeta().custom_metadata_map["class_names"]) == NAMES
    for count in (1, 2, 5):
        images = random_images(count, 128, seed=count)
        with torch.no_grad():
            expected = pipeline(images)
        found = session.run(list(expected), {"images": images.numpy()})
        for name, values in zip(expected, found, strict=True):
            assert numpy.allclose(values, expected[name].numpy(), atol=1e-5), name


@pytest.mark.skipif(not ONNX_IS_THERE, reason="onnx, onnxscript or onnxruntime is missing: ONNX files are not tried")
def test_the_onnx_example_runs_without_pytorch(checkpoint, pictures, tmp_path):
    export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "model.onnx")])
    lines = run_example("run_exported_onnx.py", tmp_path / "model.onnx", pictures, tmp_path)
    predictions = predictions_of(checkpoint, pictures)
    assert lines == [f"{path}: {n} {v:.1%}" for path, (n, v) in zip(pictures, predictions, strict=True)]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--out", "model.pth"], "out is model.pth"),
        (["--out", "model.pt2", "--checkpoint", "absent.pth"], "absent.pth"),
        (["--out", "model.pt2", "--device", "cuda:99"], "cuda:99"),
        ([], "--out"),
        pytest.param(
            ["--out", "model.onnx"],
            "pip install onnx",
            marks=pytest.mark.skipif(ONNX_IS_THERE, reason="the packages are there"),
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(checkpoint, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped, exit_with_one_sentence():
        export.main(["--checkpoint", str(checkpoint), *words])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_is_noticed_before_the_long_work(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "note.txt").touch()
    monkeypatch.setattr(export, "trace", lambda *arguments: pytest.fail("it was traced"))
    with pytest.raises(SavingError, match="note.txt could not be written"):
        export.main(["--checkpoint", str(checkpoint), "--out", str(tmp_path / "note.txt" / "model.pt2")])
