"""predict.py from its command line: names, probabilities, drawings, and what it reports of pictures it cannot read."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy
import pytest
import torch
from cases import slow_but_for
from launching import run_script
from PIL import Image

import config
import predict
from datasets import DataError, Entry, Pictures, collate, loading_of
from networks import MODELS
from utils.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from utils.errors import exit_with_one_sentence
from utils.reporting.panels import image_panel
from utils.training.building import build_from_settings, load_trained

pytestmark = pytest.mark.usefixtures("thin_trunk")


@pytest.fixture(scope="module")
def checkpoints(tiny_run, tmp_path_factory) -> Path:
    """An untrained checkpoint of every model, whose settings name a folder that cannot be on this machine."""
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    for model in MODELS:
        settings = config.parse_settings(tiny_run(folder, "--precision", "float32", model=model))
        network = build_from_settings(settings, 3, load_weights=False)
        values = dataclasses.asdict(settings) | {"data_root": "~nobody_of_that_name/birds"}
        content = {"settings": values, "class_names": ["blue", "green", "red <b>"], "selected_on": "nothing"}
        save_checkpoint(folder / f"{model}.pth", content | {"epoch": 1, "network": network.state_dict()})
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Pictures of all sizes and modes in two folders, two of one name, two that are none, and some hidden."""
    root = tmp_path_factory.mktemp("album")
    (root / "one").mkdir()
    (root / "two" / "deeper").mkdir(parents=True)
    (root / ".hidden").mkdir()
    pixels = numpy.random.default_rng(4).integers(0, 256, (60, 90, 3)).astype("uint8")
    picture = Image.fromarray(pixels)
    picture.save(root / "one" / "same name.png")
    picture.transpose(Image.Transpose.ROTATE_90).convert("L").save(root / "two" / "same name.png")
    picture.convert("P").save(root / "two" / "deeper" / "palette.bmp")
    picture.convert("CMYK").resize((300, 9)).save(root / "two" / "flat.jpg")
    picture.convert("LA").resize((1, 1)).save(root / "two" / "point.png")
    picture.save(root / ".hidden" / "hidden.png")
    (root / "two" / "text.jpg").write_text("no picture")
    (root / "one" / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    (root / "one" / "notes.txt").write_text("no picture, and none by its name")
    return root


READABLE = ["one/same name.png", "two/deeper/palette.bmp", "two/flat.jpg", "two/point.png", "two/same name.png"]


def run(checkpoint: Path, *words: object) -> list[str]:
    return ["--checkpoint", str(checkpoint), "--device", "cpu", "--workers", "0", *map(str, words)]


def test_a_folder_streams_json_and_skips_what_is_no_picture(checkpoints, pictures, tmp_path, capsys):
    out = tmp_path / "drawings"
    with pytest.raises(SystemExit) as stopped:
        predict.main(run(checkpoints / "sgkrl.pth", pictures, "--json", "--out", out, "--top", 9, "--batch_size", 2))
    assert stopped.value.code == 1
    shown = capsys.readouterr()
    lines = [json.loads(line) for line in shown.out.splitlines()]
    assert [line["picture"] for line in lines] == [str(pictures / name) for name in READABLE]
    for line in lines:
        assert sorted(p["name"] for p in line["predictions"]) == ["blue", "green", "red <b>"]
        probabilities = [p["probability"] for p in line["predictions"]]
        assert probabilities == sorted(probabilities, reverse=True)
        assert sum(probabilities) == pytest.approx(1, abs=1e-5)
        with Image.open(line["drawing"]) as drawing:
            assert drawing.format == "PNG"
    drawn = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert drawn == {".output", *(f"{name}.png" for name in READABLE)}  # the mark keeps them from being read as data
    for name in ("text.jpg", "cut.jpg"):
        assert name in shown.err
    assert "2 of 7 pictures" in shown.err.splitlines()[-1]
    assert "Traceback" not in shown.err


@pytest.mark.parametrize("masked", [False, True])
def test_the_documented_way_to_load_a_checkpoint_predicts_the_same(masked, checkpoints, pictures, tmp_path, capsys):
    """docs/systems.md, with the paths of this test; nothing of the settings is in the weights."""
    picture = pictures / "one" / "same name.png"
    content = load_checkpoint(checkpoints / "sgkrl.pth")
    content["settings"]["options"]["mask_from_epoch"] = content["epoch"] if masked else content["epoch"] + 1
    content["settings"] |= {"data_root": "/nowhere", "checkpoint_dir": f"{picture}/below/a/file"}  # of another machine
    save_checkpoint(tmp_path / "sgkrl.pth", content)
    document = (Path(config.__file__).parent / "docs" / "systems.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(from pathlib.*?)^```", document, re.MULTILINE | re.DOTALL)
    code = code.replace("checkpoint/demo-sgkrl/best.pth", str(tmp_path / "sgkrl.pth"))
    code = code.replace("bird.jpg", str(picture))
    exec(code, found := {})
    arguments = run(tmp_path / "sgkrl.pth", picture, "--json", "--out", tmp_path, "--exit_threshold", "1")
    predict.main(arguments)
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    expected = {prediction["name"]: prediction["probability"] for prediction in line["predictions"]}
    probabilities = dict(zip(found["names"], found["probabilities"][0].tolist(), strict=True))
    assert probabilities == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("model", slow_but_for(("sgkrl", "resnet", "pmg", "dflcnn"), MODELS))
def test_predictions_equal_the_network_on_the_data_sets_own_pictures(model, checkpoints, pictures, tmp_path, capsys):
    predict.main(run(checkpoints / f"{model}.pth", pictures / "one" / "same name.png", "--json", "--out", tmp_path))
    (line,) = map(json.loads, capsys.readouterr().out.splitlines())
    trained = load_trained(checkpoints / f"{model}.pth", config.rebuilt, data_root=".")
    sample = Pictures([Entry(pictures / "one" / "same name.png", 0)], **loading_of(trained.settings))[0]
    images = trained.execution.images(collate([sample]).images)
    with torch.no_grad():
        output = trained.network(images)
        expected = trained.network.predict_logits(output).softmax(dim=1)[0]
    names = ["blue", "green", "red <b>"]
    for prediction in line["predictions"]:
        assert prediction["probability"] == pytest.approx(expected[names.index(prediction["name"])].item(), abs=1e-5)
    if output.object_boxes is None:
        assert line["object_box"] is None
    else:  # the picture is 90 x 60 pixels, of which a system that crops sees the middle
        loading = loading_of(trained.settings)
        side, resized = loading["image_size"], loading["resize_size"]
        offset = (resized - side) // 2
        x0, y0, x1, y1 = (offset + edge * side / 96 for edge in (output.object_boxes[0] + torch.tensor([0, 0, 1, 1])))
        edges = [x0 * 90 / resized, y0 * 60 / resized, x1 * 90 / resized, y1 * 60 / resized]
        edges = [float(edge) for edge in edges]
        assert line["object_box"] == pytest.approx(edges, abs=0.06)


def test_a_prediction_does_not_depend_on_its_batch_nor_on_drawing(checkpoints, pictures, tmp_path, capsys):
    probabilities = []
    for words in (["--batch_size", 5], ["--batch_size", 1, "--no_drawings"]):
        names = [pictures / name for name in READABLE]
        predict.main(run(checkpoints / "sgkrl.pth", *names, "--json", "--out", tmp_path / "out", *words))
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        probabilities.append(
            torch.tensor([[p["probability"] for p in sorted(x["predictions"], key=str)] for x in lines]).sort().values
        )
    assert torch.allclose(*probabilities, atol=1e-4)
    assert all(line["drawing"] is None for line in lines)
    assert len(list((tmp_path / "out").rglob("*.png"))) == len(READABLE)


def test_text_names_the_likeliest_first(checkpoints, pictures, tmp_path, capsys):
    path = pictures / "two" / "flat.jpg"
    predict.main(run(checkpoints / "resnet.pth", path, "--out", tmp_path, "--top", 2))
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{path}: ")
    shares = [float(part.rpartition(" ")[2].rstrip("%")) for part in line.removeprefix(f"{path}: ").split(", ")]
    assert len(shares) == 2
    assert shares[0] >= shares[1]


def test_drawings_in_a_folder_of_pictures_are_no_pictures_the_next_time(checkpoints, pictures, tmp_path, capsys):
    folder = tmp_path / "album"
    folder.mkdir()
    Image.new("RGB", (30, 20), "red").save(folder / "red.png")
    for _ in range(2):
        predict.main(run(checkpoints / "resnet.pth", folder, "--out", folder / "out"))
        assert len(capsys.readouterr().out.splitlines()) == 1
    shutil.copy(folder / "red.png", folder / "red.png.png")  # a picture called as the drawing of another one
    for _ in range(3):
        predict.main(run(checkpoints / "resnet.pth", folder, "--out", folder))
        assert len(capsys.readouterr().out.splitlines()) == 2


@pytest.mark.parametrize("given", [".", ".."])
def test_the_folder_may_be_the_one_where_one_is(tmp_path, monkeypatch, given):
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path if given == "." else tmp_path / "inner")
    assert predict.find_pictures([Path(given)], leave_out=tmp_path / "out") == [Path(given) / "red.png"]


def test_drawings_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pictures = [Path("a/x.jpg"), Path("b/x.jpg"), Path("a/x.png"), tmp_path / "c" / ".." / "a" / "sub" / "x.jpg"]
    drawings = predict.drawing_paths(pictures, Path("out"))
    assert len({os.path.normpath(path) for path in drawings.values()}) == 4
    assert drawings[Path("a/x.jpg")] == Path("out/a/x.jpg.png")
    assert all(os.path.normpath(path).startswith(f"out{os.sep}") for path in drawings.values())


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["absent.jpg"], "no picture or folder absent.jpg"),
        (["EMPTY"], "expected files such as"),
        (["PICTURE", "--top", "0"], "top is 0"),
        (["PICTURE", "--batch_size", "-1"], "batch_size is -1"),
        (["PICTURE", "--workers", "-1"], "workers is -1"),
        (["PICTURE", "--device", "tpu"], "device is 'tpu'"),
        (["PICTURE", "--top", "many"], "many"),
        (["PICTURE", "--speed"], "--speed"),
        ([], "PICTURE_OR_FOLDER"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(checkpoints, pictures, tmp_path, capsys, words, sentence):
    places = {"EMPTY": tmp_path, "PICTURE": pictures / READABLE[0]}
    words = [places.get(word, word) for word in words]
    with pytest.raises(SystemExit) as stopped, exit_with_one_sentence():
        predict.main(run(checkpoints / "resnet.pth", "--out", tmp_path / "out", *words))
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not shown.out
    assert not (tmp_path / "out").exists()


def test_a_file_that_is_no_checkpoint_is_refused(pictures, tmp_path):
    with pytest.raises(CheckpointError, match=r"no checkpoint .*absent\.pth"):
        predict.main(run(tmp_path / "absent.pth", pictures))
    with pytest.raises(DataError, match="absent"):
        predict.main(run(tmp_path / "absent.pth", tmp_path / "absent"))


def test_nothing_but_json_is_on_standard_output(checkpoints, pictures, tmp_path):
    """As a program that reads it sees it, with loader processes; and no bar where there is no terminal."""
    words = ("--checkpoint", str(checkpoints / "mmal.pth"), "--json", "--workers", "2", "--out", "out", str(pictures))
    ended = run_script("predict.py", *words, folder=tmp_path, thin=True)
    assert ended.returncode == 1
    assert len([json.loads(line) for line in ended.stdout.splitlines()]) == len(READABLE)
    assert "\r" not in ended.stderr
    assert "%|" not in ended.stderr
    # what is no picture, two skipped, where the drawings are, how many were skipped
    assert len(ended.stderr.splitlines()) == 5


@pytest.mark.parametrize("model", slow_but_for(("sgkrl", "resnet", "flrdf", "ntsnet", "dflcnn"), MODELS))
@pytest.mark.parametrize("size", [(90, 60), (4, 400), (400, 4)], ids=str)
def test_drawings_show_what_there_is(model, size, checkpoints):
    trained = load_trained(checkpoints / f"{model}.pth", config.rebuilt, data_root=".")
    images = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(1))
    output, evidence = predict.forward_with_evidence(trained.network, images, size=16)
    panel = image_panel(
        Image.new("RGB", size, (90, 120, 30)),
        output,
        1,
        ["a", "b" * 200],
        [0.75, 0.25],
        input_size=96,
        evidence=evidence[1],
        height=160,
    )
    assert panel.dtype == torch.uint8
    assert panel.shape[0] == 3
    tile = round(160 * min(max(size[0] / size[1], 0.5), 2))
    tiles = 2 if output.object_boxes is None else 3  # picture, crop, evidence
    assert panel.shape[2] == max(12 + tiles * (tile + 4) + 300 + 12, panel.shape[2] if tile < 160 else 0)


def test_checkpoints_are_planned_for_the_epoch_they_were_saved_in(checkpoints, tmp_path):
    content = load_checkpoint(checkpoints / "sgkrl.pth")
    content["settings"]["options"]["mask_from_epoch"] = 3
    within = {"epoch": 3, "step": 1, "learning_rate": 0.1, "meter": {"images": 4, "sums": {}, "counts": {}}}
    for epoch, progress, masked in ((2, None, False), (3, None, True), (2, within, True)):
        save_checkpoint(tmp_path / "last.pth", content | {"epoch": epoch, "progress": progress})
        trained = load_trained(tmp_path / "last.pth", config.rebuilt, data_root=".")
        assert trained.plan.mask_background is masked
        assert not trained.network.training


@pytest.mark.skipif(sys.platform != "linux", reason="file names are any bytes on Linux only")
@pytest.mark.parametrize("form", [["--json"], []], ids=str)
def test_names_that_are_no_text_are_written_out(checkpoints, tmp_path, form):
    folder = tmp_path / "album"
    folder.mkdir()
    Image.new("RGB", (30, 20), "red").save(tmp_path / "red.png")
    (tmp_path / "red.png").rename(folder / os.fsdecode(b"br\xf8d.png"))
    words = run(checkpoints / "resnet.pth", folder, *form)
    ended = run_script("predict.py", *words, folder=tmp_path, thin=True)
    assert ended.returncode == 0, ended.stderr
    assert r"\udcf8d.png" in ended.stdout
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 1


def test_no_drawing_takes_the_place_of_a_picture_or_of_another(tmp_path):
    """Drawn into the folder of the pictures, one of which is called as another one's drawing."""
    names = ("a.jpg", "a.jpg.png", "a.jpg.drawing.png", "b.jpg")
    pictures = [tmp_path / name for name in names]
    drawings = predict.drawing_paths(pictures, tmp_path)
    assert len({*drawings.values(), *pictures}) == 8
    assert drawings[tmp_path / "b.jpg"].name == "b.jpg.png"
