"""Runs side by side: tables, paired bootstrap, and what test.py leaves for them."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
from pathlib import Path

import numpy
import pytest
import torch
from cases import slow_but_for
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import config
import datasets
from utils.checkpoint import CheckpointError, save_checkpoint
from utils.errors import exit_with_one_sentence
from utils.options import flat
from utils.reporting import compare as comparing
from utils.reporting.compare import ComparisonError, EvaluatedRun, compare, paired_bootstrap
from utils.reporting.results import read_predictions
from utils.training.building import build_from_settings
from utils.training.execution import Execution

pytestmark = pytest.mark.usefixtures("thin_trunk")


@pytest.fixture(scope="module")
def evaluated(tiny_run, tmp_path_factory, evaluation_script) -> dict[str, Path]:
    """Untrained runs of two models, evaluated; the first of them with its last.pth, too."""
    places = {}
    torch.manual_seed(0)
    for model in ("mmal", "resnet"):
        folder = tmp_path_factory.mktemp("runs") / f"folder-{model}"
        folder.mkdir()
        settings = config.parse_settings(tiny_run(folder, model=model))
        network = build_from_settings(settings, 3, load_weights=False)
        content = {"settings": dataclasses.asdict(settings), "class_names": ["blue", "green", "red"]}
        content |= {"selected_on": "nothing", "epoch": 1, "network": network.state_dict()}
        save_checkpoint(folder / "best.pth", content)
        (folder / "log.jsonl").touch()  # of a run
        evaluation_script.main([str(folder / "best.pth"), *(["--embeddings"] if model == "mmal" else [])])
        places[model] = folder
    save_checkpoint(places["mmal"] / "last.pth", content | {"progress": None})
    evaluation_script.main([str(places["mmal"] / "last.pth")])
    return places


def test_reports_are_named_after_their_checkpoints(evaluated):
    names = {path.name for path in evaluated["mmal"].iterdir()}
    for ending in ("", "-last"):
        assert {f"report{ending}.json", f"report{ending}.html", f"predictions{ending}.csv"} <= names
        assert (evaluated["mmal"] / "pictures" / f"test{ending}.png").is_file()
        report = json.loads((evaluated["mmal"] / f"report{ending}.json").read_text("utf-8"))
        assert report["checkpoint"].endswith(f"{ending.removeprefix('-') or 'best'}.pth")


def test_test_figures_and_embeddings_reach_tensorboard(evaluated):
    events = EventAccumulator(str(evaluated["mmal"] / "test"))
    events.Reload()
    report = json.loads((evaluated["mmal"] / "report.json").read_text("utf-8"))
    (point,) = events.Scalars("accuracy/prediction")
    assert (point.step, point.value) == (1, pytest.approx(report["branches"]["prediction"]["top1"]))
    (table,) = (evaluated["mmal"] / "test").rglob("tensors.tsv")
    embeddings = numpy.loadtxt(table)
    assert embeddings.shape == (6, 128)
    assert numpy.ptp(embeddings, axis=0).max() > 0
    assert not list((evaluated["resnet"] / "test").rglob("tensors.tsv"))


def test_predictions_hold_every_image_and_agree_with_the_report(evaluated, picture_tree):
    report = json.loads((evaluated["mmal"] / "report.json").read_text("utf-8"))
    rows = read_predictions(evaluated["mmal"] / "predictions.csv")
    assert len(rows) == report["images"] == 6
    for row in rows:
        picture = Path(row["picture"])
        assert picture.is_relative_to(picture_tree)
        assert row["label"] == picture.parent.name
        assert (row["correct"] == "1") == (row["label"] == row["prediction"])
        assert 1 / 3 <= float(row["probability"]) <= 1
    for branch, values in report["branches"].items():
        column = "correct" if branch == "prediction" else branch
        assert values["top1"] == pytest.approx(sum(row[column] == "1" for row in rows) / 6)
    assert sum(entry["count"] for entry in report["calibration"]["bins"]) == 6


def test_html_shows_the_mistakes(evaluated):
    report = json.loads((evaluated["resnet"] / "report.json").read_text("utf-8"))
    wrong = round((1 - report["branches"]["prediction"]["top1"]) * 6)
    page = (evaluated["resnet"] / "report.html").read_text("utf-8")
    assert page.count("<figure>") == wrong > 0
    assert page.count("data:image/jpeg") == wrong


def test_the_table_has_what_differs_and_the_figures(evaluated, capsys, evaluation_script):
    evaluation_script.main(["--compare", str(evaluated["mmal"]), str(evaluated["resnet"]), "--format", "csv"])
    header, *rows = csv.reader(io.StringIO(capsys.readouterr().out))
    assert [row[header.index("run")] for row in rows] == ["folder-mmal", "folder-resnet"]
    assert [row[header.index("model")] for row in rows] == ["mmal", "resnet"]
    assert "backbone" not in header  # the same in both
    assert "checkpoint_dir" not in header
    for row, model in zip(rows, ("mmal", "resnet"), strict=True):
        report = json.loads((evaluated[model] / "report.json").read_text("utf-8"))
        assert row[header.index("prediction %")] == f"{100 * report['branches']['prediction']['top1']:.1f}"
        assert row[header.index("images/s")] == f"{report['images_per_second']:.1f}"
    assert rows[1][header.index("object %")] == ""
    assert len({len(row) for row in (header, *rows)}) == 1


@pytest.mark.parametrize("form", ["text", "markdown"])
def test_text_and_markdown_end_with_the_paired_comparison(evaluated, form):
    text = compare([evaluated["mmal"], evaluated["resnet"], evaluated["mmal"] / "report-last.json"], form)
    lines = text.splitlines()
    assert sum(" points, " in line for line in lines) == 3
    assert "folder-mmal-last against folder-mmal" in text
    if form == "markdown":
        table = [line for line in lines if line.startswith("|")]
        assert len(table) == 5
        assert len({line.count("|") for line in table}) == 1


def test_checkpoints_stand_for_their_reports(evaluated):
    by_checkpoint = compare([evaluated["mmal"] / "best.pth", evaluated["mmal"] / "last.pth"], "csv")
    assert by_checkpoint == compare([evaluated["mmal"], evaluated["mmal"] / "report-last.json"], "csv")


def test_what_somebody_else_wrote_is_no_formula(evaluated, tmp_path):
    report = json.loads((evaluated["mmal"] / "report.json").read_text("utf-8"))
    report["settings"] |= {"labels": "=HYPERLINK(1)", "seed": -1}
    (tmp_path / "report.json").write_text(json.dumps(report), "utf-8")
    header, _, row = csv.reader(io.StringIO(compare([evaluated["mmal"], tmp_path], "csv")))
    found = dict(zip(header, row, strict=True))
    assert (found["labels"], found["seed"]) == ("'=HYPERLINK(1)", "-1")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("report.json", "python test.py .*best.pth$"),
        ("report-last-shuffled.json", "python test.py .*last.pth --shuffle$"),
        ("report-mirror.json", "test.py and the options that its name stands for$"),
    ],
)
def test_a_missing_report_comes_with_a_command_that_works(evaluated, tmp_path, name, command):
    (tmp_path / "last.pth").touch()
    with pytest.raises(ComparisonError, match=command):
        compare([evaluated["mmal"], tmp_path / name])


def test_settings_that_a_report_does_not_know_were_as_before(evaluated, tmp_path):
    report = json.loads((evaluated["mmal"] / "report.json").read_text("utf-8"))
    settings = report["settings"]
    # of a version in which every setting stood in one list
    settings |= settings.pop("options") | {"answer": settings.pop("prediction"), "wiring": "trained", "dropout": 0.25}
    for name in (
        "localization",
        "localization_stride",
        "localization_threshold",
        "window_source",
        "crop_scale",
        "raw_size",
    ):
        del settings[name]
    report["branches"]["answer"] = report["branches"].pop("prediction")
    (tmp_path / "report.json").write_text(json.dumps(report), "utf-8")
    table = (evaluated["mmal"] / "predictions.csv").read_text("utf-8")
    (tmp_path / "predictions.csv").write_text(table.replace(",correct,", ",answer,", 1), "utf-8")

    def restore(saved):
        return flat(config.restored({"crop_scale": 0.5, **saved}))

    header, first, second = csv.reader(io.StringIO(compare([evaluated["mmal"], tmp_path], "csv", restore=restore)))
    assert header[1 : header.index("images")] == ["crop_scale", "dropout"]
    assert (first[1], second[1:3]) == ("1.0", ["0.5", "0.25"])
    assert first[header.index("images") : -1] == second[header.index("images") : -1]
    assert "+0.0 points" in compare([evaluated["mmal"], tmp_path])


def test_data_that_lie_elsewhere_are_the_same_images(evaluated, tmp_path):
    """Another machine's paths: pictures count by their place in the data set."""
    copy = tmp_path / "elsewhere"
    copy.mkdir()
    report = json.loads((evaluated["mmal"] / "report.json").read_text("utf-8"))
    root = report["settings"]["data_root"]
    report["settings"]["data_root"] = "/another/place"
    (copy / "report.json").write_text(json.dumps(report), "utf-8")
    table = (evaluated["mmal"] / "predictions.csv").read_text("utf-8")
    (copy / "predictions.csv").write_text(table.replace(root, "/another/place"), "utf-8")
    assert "+0.0 points" in compare([evaluated["mmal"], copy])
    (copy / "predictions.csv").write_text("\n".join(table.splitlines()[:-1]), "utf-8")
    assert "different images" in compare([evaluated["mmal"], copy])
    (copy / "predictions.csv").unlink()
    assert "no predictions.csv" in compare([evaluated["mmal"], copy])
    formula = copy.rename(copy.with_name("=1+1"))
    assert compare([evaluated["mmal"], formula], "csv").splitlines()[-1].startswith("'=1+1,")


def test_bootstrap_agrees_with_resampling_image_by_image():
    generator = numpy.random.default_rng(5)
    first, second = generator.random(300) < 0.6, generator.random(300) < 0.75
    found = paired_bootstrap(first, second)
    assert found.difference == pytest.approx(second.mean() - first.mean())
    drawn = [generator.integers(0, 300, 300) for _ in range(4000)]
    differences = [second[images].mean() - first[images].mean() for images in drawn]
    assert (found.low, found.high) == pytest.approx(tuple(numpy.quantile(differences, (0.025, 0.975))), abs=0.012)
    assert found == paired_bootstrap(first, second)  # seeded


def test_an_image_is_drawn_with_all_its_seeds():
    """What seeds have in common is no second opinion: twice the same run says what it said once."""
    generator = numpy.random.default_rng(6)
    first, second = generator.random((3, 300)) < 0.6, generator.random((3, 300)) < 0.75
    second[1] = second[0]
    found = paired_bootstrap(first, second)
    drawn = [generator.integers(0, 300, 300) for _ in range(4000)]
    differences = [second[:, images].mean() - first[:, images].mean() for images in drawn]
    assert found.difference == pytest.approx(second.mean() - first.mean())
    assert (found.low, found.high) == pytest.approx(tuple(numpy.quantile(differences, (0.025, 0.975))), abs=0.008)
    once = paired_bootstrap(first[0], second[0])
    twice = paired_bootstrap(first[[0, 0]], second[[0, 0]])
    assert (twice.low, twice.high) == pytest.approx((once.low, once.high), abs=0.005)


def test_bootstrap_of_equal_and_of_opposite_runs():
    same = paired_bootstrap([True, False] * 50, [True, False] * 50)
    assert same[1:] == (0, 0, 0, 0, 0)
    opposite = paired_bootstrap([False] * 40, [True] * 40)
    assert opposite[1:] == (1, 1, 1, 0, 40)


def test_the_interval_holds_95_percent():
    """Of ten thousand images, half of which differ: 1.96 deviations of 0.005 either way."""
    found = paired_bootstrap([False] * 10_000, [True, False] * 5_000)
    assert (found.low, found.high) == pytest.approx((0.4902, 0.5098), abs=5e-4)


def test_runs_are_paired_picture_by_picture():
    """However their tables are ordered."""
    first = {str(n): n % 2 == 0 for n in range(40)}
    one, other = EvaluatedRun("A", {}, first), EvaluatedRun("B", {}, dict(reversed(first.items())))
    sentence = comparing._sentence(one, other)
    assert sentence == "B against A: +0.0 points, they are right on the same 20 of 40 images"
    better = comparing._sentence(one, EvaluatedRun("B", {}, dict.fromkeys(first, True)))
    assert better.endswith("only A); more than the choice of test images explains")
    turned = {picture: not right if picture in set("0123") else right for picture, right in first.items()}
    sentence = comparing._sentence(one, EvaluatedRun("B", {}, turned))
    assert sentence.startswith("B against A: +0.0 points, 95 % interval -")
    assert sentence.endswith("2 only B gets right, 2 only A)")  # an interval round 0 says nothing


@pytest.mark.parametrize(("turned", "is_sure"), [(5, False), (6, True)])
def test_few_images_that_differ_are_not_enough(turned, is_sure):
    """The bootstrap never draws the other way where none went it; a fair coin falls five times alike in 1 of 16."""
    first = {str(n): n >= turned for n in range(40)}
    sentence = comparing._sentence(EvaluatedRun("A", {}, first), EvaluatedRun("B", {}, dict.fromkeys(first, True)))
    assert sentence.endswith("explains") == is_sure
    assert comparing.exact_probability(0, turned) == 2 / 2**turned


def test_the_exact_probability_is_that_of_fair_coins():
    assert comparing.exact_probability(3, 3) == comparing.exact_probability(0, 0) == 1
    assert comparing.exact_probability(2, 8) == comparing.exact_probability(8, 2) == pytest.approx(0.109375)
    assert comparing.exact_probability(1400, 1600) == pytest.approx(0.00028, abs=1e-5)


def test_pictures_of_other_classes_are_not_paired():
    """Two data sets that name their files alike."""
    right = {"0.jpg": True, "1.jpg": False}
    one = EvaluatedRun("A", {}, right, {"0.jpg": "ant", "1.jpg": "bee"})
    other = EvaluatedRun("B", {}, right, {"0.jpg": "tram", "1.jpg": "bus"})
    assert comparing._sentence(one, other).endswith("their images have other labels, so they cannot be paired")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--compare", "EMPTY", "EMPTY"], "python test.py EMPTY/best.pth"),
        (["--compare", "RUN"], "at least two"),
        (["--compare", "RUN", "BROKEN"], "no report of test.py"),
        (["--compare", "RUN", "RUN/epoch-003.pth"], "python test.py RUN/epoch-003.pth"),
        (["--compare", "RUN", "RUN", "--speed"], "--speed"),
        ([], "give one checkpoint"),
        (["RUN/best.pth", "--compare", "RUN"], "give one checkpoint"),
        (["RUN/best.pth", "--epochs", "3"], "unrecognized arguments: --epochs"),
        (["RUN/best.pth", "--format", "table"], "table"),
    ],
)
def test_what_cannot_be_is_said_in_one_sentence(evaluated, tmp_path, capsys, evaluation_script, words, sentence):
    (tmp_path / "report.json").write_text("{}")
    places = {"EMPTY": str(tmp_path / "empty"), "RUN": str(evaluated["mmal"]), "BROKEN": str(tmp_path)}
    (tmp_path / "empty").mkdir()

    def placed(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    with pytest.raises(SystemExit) as stopped, exit_with_one_sentence():
        evaluation_script.main([placed(word) for word in words])
    shown = capsys.readouterr()
    assert stopped.value.code == 2
    assert placed(sentence) in shown.err
    assert len(shown.err.splitlines()) == 1


@pytest.mark.parametrize("threshold", slow_but_for(["0.4"], ["0.34", "0.4", "1"]))
def test_mistakes_are_drawn_with_an_early_exit_too(tiny_run, tmp_path, evaluation_script, threshold):
    torch.manual_seed(2)
    settings = config.parse_settings(tiny_run(tmp_path, model="sgkrl"))
    network = build_from_settings(settings, 3, load_weights=False)
    content = {"settings": dataclasses.asdict(settings), "class_names": ["blue", "green", "red"]}
    content |= {"selected_on": "nothing", "epoch": 1, "network": network.state_dict()}
    save_checkpoint(tmp_path / "best.pth", content)
    evaluation_script.main([str(tmp_path / "best.pth"), "--exit_threshold", threshold])
    ending = "" if threshold == "1" else f"-exit_{threshold}"
    report = json.loads((tmp_path / f"report{ending}.json").read_text("utf-8"))
    wrong = round((1 - report["branches"]["prediction"]["top1"]) * 6)
    page = (tmp_path / f"report{ending}.html").read_text("utf-8")
    assert page.count("<figure>") == wrong > 0
    assert (report["exited"] is None) == (threshold == "1")
    assert ("skip the windows" in page) == (threshold != "1")


@pytest.mark.parametrize("scope", slow_but_for(["batch"], ["image", "batch"]))
def test_shuffled_images_keep_their_predictions_unless_a_graph_links_the_batch(
    tiny_run, tmp_path, evaluation_script, capsys, scope
):
    torch.manual_seed(3)
    words = ["--graph_scope", scope, "--prediction", "graph", "--seed", "5"]
    settings = config.parse_settings(tiny_run(tmp_path, *words, model="sgkrl_published"))
    network = build_from_settings(settings, 3, load_weights=False)
    content = {"settings": dataclasses.asdict(settings), "class_names": ["blue", "green", "red"]}
    content |= {"selected_on": "nothing", "epoch": 1, "network": network.state_dict()}
    (tmp_path / "log.jsonl").touch()
    probabilities, pictures, printed = [], [], []
    for name, more, ending in (("best", [], ""), ("last", ["--shuffle"], "-last-shuffled")):
        save_checkpoint(tmp_path / f"{name}.pth", content)
        evaluation_script.main([str(tmp_path / f"{name}.pth"), "--embeddings", *more])
        printed.append(capsys.readouterr().out)
        rows = read_predictions(tmp_path / f"predictions{ending}.csv")
        pictures.append([row["picture"] for row in rows])
        assert all(row["label"] == Path(row["picture"]).parent.name for row in rows)
        probabilities.append({row["picture"]: float(row["probability"]) for row in rows})
        # what is beside the table in the same order
        page = (tmp_path / f"report{ending}.html").read_text("utf-8")
        wrong = {row["picture"] for row in rows if row["correct"] == "0"}
        assert {row["picture"] for row in rows if f"<small>{row['picture']}</small>" in page} == wrong
        (metadata,) = (tmp_path / f"test{ending}").rglob("metadata.tsv")
        assert metadata.read_text("utf-8").split() == [row["label"] for row in rows]
        assert (tmp_path / "pictures" / f"test{ending}.png").is_file()
    assert len(list(tmp_path.glob("report*.json"))) == 2
    assert pictures[0] == sorted(pictures[0]) != pictures[1]
    orders = [json.loads((tmp_path / f"report{e}.json").read_text("utf-8"))["order"] for e in ("", "-last-shuffled")]
    assert orders == ["in class order", "shuffled with seed 5"]
    shown = [order in text for order, text in zip(orders, printed, strict=True)]
    if scope == "image":
        assert probabilities[0] == pytest.approx(probabilities[1], abs=1e-4)
        assert "+0.0 points" in compare([tmp_path, tmp_path / "report-last-shuffled.json"])
        assert shown == [False, False]
    else:
        one, other = probabilities
        assert one.keys() == other.keys()
        assert max(abs(one[picture] - other[picture]) for picture in one) > 1e-3
        assert shown == [True, True]


def test_a_report_that_is_missing_is_named(tmp_path):
    with pytest.raises(ComparisonError, match=r"report\.json"):
        compare([tmp_path, tmp_path])
    with pytest.raises(ComparisonError, match=r"last\.pth --shuffle$"):
        compare([tmp_path / "report-last-shuffled.json", tmp_path])


def test_published_checkpoints_are_evaluated_directly(picture_tree, tmp_path, evaluation_script, capsys):
    """Weights of our own under the published names, and the settings from the command line."""
    torch.manual_seed(1)
    words = ["--dataset", "folder", "--data_root", str(picture_tree), "--backbone", "resnet18", "--input_size", "96"]
    words += ["--test_fraction", "0.25", "--device", "cpu", "--workers", "0", "--precision", "float32"]
    windows = ["--windows", "((((5, 5),), 2),)"]
    settings = config.parse_settings([*words, *windows, "--model", "sgkrl_published"])
    network = build_from_settings(settings, 3, load_weights=False).eval()
    state = {}
    for name, value in network.state_dict().items():
        ((theirs, ours),) = (pair for pair in network.published_names.items() if name.startswith(pair[1]))
        state[f"module.{theirs}{name.removeprefix(ours)}"] = value
    path = tmp_path / "published.pth"
    save_checkpoint(path, {"epoch": 50, "model_state_dict": state, "learning_rate": 0.001})
    evaluation_script.main([str(path), "--model", "sgkrl_published", *words, *windows, "--graph_scope", "batch"])
    report = json.loads((tmp_path / "report-published.json").read_text("utf-8"))
    assert (report["epoch"], report["prediction"]) == (50, "object")
    assert report["settings"]["model"] == "sgkrl_published"
    assert report["settings"]["options"]["graph_scope"] == "batch"
    catalogue, _ = datasets.load_catalogue(settings)
    right = 0
    for entry, sample in zip(catalogue.test, datasets.Pictures(catalogue.test, image_size=96), strict=True):
        with torch.no_grad():  # epoch 50 masks the background
            images = Execution(torch.device("cpu")).images(datasets.collate([sample]).images)
            output = network(images, mask_background=True)
        right += output.logits["object"].argmax().item() == entry.label
    assert report["branches"]["object"]["top1"] == pytest.approx(right / len(catalogue.test))

    capsys.readouterr()
    with pytest.raises(CheckpointError, match="--model"):
        evaluation_script.main([str(path), *words])
    with pytest.raises(CheckpointError, match="no published checkpoints are known of this model"):
        evaluation_script.main([str(path), "--model", "resnet", *words])
    with pytest.raises(CheckpointError, match="does not fit"):
        evaluation_script.main([str(path), "--model", "mmal", *words])


@pytest.mark.parametrize(
    "change",
    [
        lambda report: report.pop("images"),
        lambda report: report.update(images_per_second="fast"),
        lambda report: report["branches"]["prediction"].pop("top1_interval_95"),
        lambda report: report["branches"].update(raw={}),
        lambda report: report.update(branches=[]),
        lambda report: report.update(boxes={"mean": 1}),
        lambda report: report.update(settings="resnet"),
    ],
)
def test_a_report_that_lacks_something_is_refused_by_name(evaluated, tmp_path, change):
    report = json.loads((evaluated["resnet"] / "report.json").read_text("utf-8"))
    change(report)
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    with pytest.raises(ComparisonError) as refusal:
        compare([evaluated["mmal"], path])
    assert str(path) in str(refusal.value)
