"""The sweep over the rows of the ablation table; nothing is trained here."""

from __future__ import annotations

import itertools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablation  # noqa: E402
import sweep_results  # noqa: E402
import sweep_rows  # noqa: E402

ACCURACIES = {"resnet": (0.5, 0.6), "mmal": (0.75, 0.85), "published": (0.6, 0.7)}  # by row and seed
ACCURACIES["published-batch-graph"] = ACCURACIES["published"]


@pytest.fixture
def broken() -> set[str]:
    """Names of runs that fail."""
    return set()


def test_the_averaged_weights_are_the_result_of_a_run_that_has_them(monkeypatch, tmp_path):
    figures = {"validation/accuracy/prediction": 0.5, "validation_ema/accuracy/prediction": 0.75}
    boxes = {"validation/box_iou/share_at_0.5": 0.1, "validation_ema/box_iou/share_at_0.5": 0.2}

    def script(name, flags, environment, processes):
        assert ("--ema_decay", "0.999") in itertools.pairwise(flags)
        (tmp_path / "cub-resnet-ema-0").mkdir()
        line = {"epoch": 1, **figures, **boxes, "speed/train_images_per_second": 9.0}
        (tmp_path / "cub-resnet-ema-0" / "log.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(ablation, "script", script)
    options, _ = ablation.parse_arguments(["--runs", str(tmp_path)])
    result = ablation.run("resnet-ema", 0, sweep_rows.COMMON, options)
    assert result["validation"] == {"accuracy/prediction": 0.75, "box_iou/share_at_0.5": 0.2}
    assert result["boxes_by_epoch"] == [0.2]


def test_comparators_load_pictures_at_the_side_of_the_common_flags():
    for common, side in (sweep_rows.COMMON, "224"), ([*sweep_rows.COMMON, "--input_size=320"], "320"):
        flags = sweep_rows.flags_of("cal", 0, common)
        assert ("--resize_size", side) in itertools.pairwise(flags)
        assert sweep_rows.INPUT_SIZE not in flags


@pytest.mark.parametrize(("epochs", "equal"), [(3, "13"), (6, "26"), (12, "52")])
def test_equal_compute_means_the_epochs_of_the_sweep(epochs, equal):
    flags = sweep_rows.flags_of("resnet-equal-compute", 0, [*sweep_rows.COMMON, "--epochs", str(epochs)])
    assert [value for name, value in itertools.pairwise(flags) if name == "--epochs"][-1] == equal


@pytest.fixture
def scripts(monkeypatch, broken) -> list[tuple[str, list[str]]]:
    """What train.py and test.py would leave, without them; returns the calls."""
    calls = []

    def script(name, flags, environment, processes=1):
        calls.append((name, flags))
        options = {first: second for first, second in itertools.pairwise(flags) if first.startswith("--")}
        if name == "test.py":
            folder, ending = ablation.Path(flags[0]).parent, "-last-shuffled" if "--shuffle" in flags else "-last"
            row, _, seed = folder.name.removeprefix("cub-").rpartition("-")
            right = round(20 * ACCURACIES[row][int(seed)])
            branches = {"prediction": {"top1": right / 20}}
            if row == "published-batch-graph":
                branches["graph"] = {"top1": 0.25 if "--shuffle" in flags else 0.875}
            (folder / f"report{ending}.json").write_text(json.dumps({"epoch": 2, "branches": branches, "boxes": None}))
            rows = [f"/data/birds/{i}.jpg,a,b,{int(i < right)}\n" for i in range(20)]
            rows = rows[::-1] if "--shuffle" in flags else rows
            text = "picture,label,prediction,correct\n" + "".join(rows)
            (folder / f"predictions{ending}.csv").write_text(text)
            return
        if options["--name"] in broken:
            raise RuntimeError(f"{name} ended with exit code 1")
        folder = ablation.Path(options["--checkpoint_dir"]) / f"cub-{options['--name']}"
        folder.mkdir(parents=True, exist_ok=True)
        row, _, seed = options["--name"].rpartition("-")
        accuracy = ACCURACIES[row][int(seed)]
        lines = [
            {"epoch": n, "validation/accuracy/prediction": accuracy * n / 2, "speed/train_images_per_second": 9.0}
            for n in (1, 2)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    monkeypatch.setattr(ablation, "script", script)
    return calls


def sweep(folder, *more: str) -> list[dict]:
    return ablation.main(["--runs", str(folder), "--rows", "resnet", "mmal", "--seeds", "0", "1", *more])


def test_rows_and_seeds_become_runs_and_a_table(scripts, tmp_path, capsys):
    results = sweep(tmp_path, "--data_root", "birds", "--epochs", "2")
    assert [(result["row"], result["seed"]) for result in results] == [
        (row, seed) for seed in (0, 1) for row in ("resnet", "mmal")
    ]
    for _, flags in scripts:  # common flags, those of this sweep, those of the row
        assert flags[: len(sweep_rows.COMMON)] == list(sweep_rows.COMMON)
        assert flags[len(sweep_rows.COMMON) :][:4] == ["--data_root", "birds", "--epochs", "2"]
    assert {name for name, _ in scripts} == {"train.py"}
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == results
    assert "test" not in results[0]
    shown = capsys.readouterr().out
    assert "| resnet | 2 | 7.1 | 55.0 |  |" in shown
    assert "| mmal | 2 | 7.1 | 80.0 |  |" in shown


def test_test_images_are_looked_at_once_and_rows_are_paired(scripts, tmp_path, capsys):
    sweep(tmp_path, "--test")
    assert "mmal against resnet: +25.0 points" in capsys.readouterr().out
    sweep(tmp_path, "--test")
    assert [name for name, _ in scripts].count("test.py") == 4


@pytest.mark.parametrize("processes", [1, 3])
def test_runs_train_in_as_many_processes_as_asked_for(monkeypatch, tmp_path, processes):
    commands = []

    def refuse(command, **_):
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", "not now")

    monkeypatch.setattr(ablation.subprocess, "run", refuse)
    with pytest.raises(SystemExit, match="not now"):
        sweep(tmp_path, "--processes", str(processes), "--seeds", "0", "--rows", "resnet")
    (command,) = commands
    launcher = command[1 : command.index(str(ablation.PROJECT / "train.py"))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    assert launcher == (torchrun if processes == 3 else [])


def results_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_sweep_goes_on_on_another_machine(scripts, tmp_path, capsys):
    """The file came along, the runs' folders did not; data and weights lie elsewhere."""
    file = tmp_path / "kept" / "results.jsonl"
    here = ["--results", str(file), "--test", "--rows", "resnet"]
    sweep(tmp_path / "one", *here, "--data_root", "/data/birds", "--pretrained", "/weights/r50.pth", "--workers", "9")
    assert len(scripts) == 4
    first = results_of(file)
    there = ["--results", str(file), "--data_root=D:/x", "--pretrained", "/elsewhere/r50.pth", "--device", "cuda:1"]
    results = sweep(tmp_path / "two", *there, "--cache", "ram", "--test")
    trained = [flags[flags.index("--name") + 1] for name, flags in scripts[4:] if name == "train.py"]
    assert trained == ["mmal-0", "mmal-1"]
    assert results_of(file)[:2] == first  # kept as they were, the new ones behind
    assert [result["row"] for result in results_of(file)] == ["resnet", "resnet", "mmal", "mmal"]
    assert sorted(map(str, results)) == sorted(map(str, results_of(file)))
    assert "mmal against resnet: +25.0 points" in capsys.readouterr().out

    sweep(tmp_path / "three", *there, "--epochs", "9")  # other flags are other runs, and stay apart in the table
    assert len(results_of(file)) == 8
    capsys.readouterr()
    ablation.main(["--table", str(file)])
    assert capsys.readouterr().out.count("| mmal | 2 |") == 3  # validation of both, test images of one


def test_runs_stored_without_test_figures_are_evaluated(scripts, tmp_path):
    sweep(tmp_path)
    assert not any("right" in result for result in results_of(tmp_path / "results.jsonl"))
    sweep(tmp_path, "--test")
    results = results_of(tmp_path / "results.jsonl")
    assert len(results) == 4
    assert all("test" in result for result in results)
    calls = len(scripts)
    sweep(tmp_path)
    sweep(tmp_path, "--test")
    assert len(scripts) == calls


def test_a_report_of_an_earlier_epoch_is_not_taken(scripts, tmp_path):
    """The run went on after somebody had evaluated it."""
    sweep(tmp_path)
    for report in (tmp_path / "cub-resnet-0").glob("*"):
        assert report.name == "log.jsonl"
    stale = {"epoch": 1, "branches": {"prediction": {"top1": 0.05}}, "boxes": None}
    (tmp_path / "cub-resnet-0" / "report-last.json").write_text(json.dumps(stale))
    results = sweep(tmp_path, "--test")
    assert results[0]["test"] == {"accuracy/prediction": 0.5}


def test_a_run_that_was_stopped_in_an_evaluation_has_the_speed_of_its_other_epochs(scripts, tmp_path):
    """An epoch that only its evaluation was left of has no speed."""
    sweep(tmp_path)
    log = tmp_path / "cub-resnet-0" / "log.jsonl"
    log.write_text(log.read_text().replace("9.0", "null", 1))
    options, _ = ablation.parse_arguments(["--runs", str(tmp_path)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ablation, "script", lambda *arguments: None)
        assert ablation.run("resnet", 0, sweep_rows.COMMON, options)["train_images_per_second"] == 9.0
        log.write_text(log.read_text().replace("9.0", "null"))
        assert ablation.run("resnet", 0, sweep_rows.COMMON, options)["train_images_per_second"] is None


def test_lines_are_small_and_say_nothing_of_the_machine(scripts, tmp_path):
    sweep(tmp_path, "--test", "--data_root", "/data/birds", "--pretrained", "/weights/r50.pth", "--classes", "*_Gull")
    text = (tmp_path / "results.jsonl").read_text(encoding="utf-8")
    assert str(tmp_path) not in text
    assert "/data" not in text
    assert "/weights" not in text
    assert "checkpoint_dir" not in text
    for result in results_of(tmp_path / "results.jsonl"):
        assert "--data_root DATA --pretrained r50.pth --classes '*_Gull'" in result["command"]
        assert result["pictures"] == 20
        names = sorted(f"{i}.jpg" for i in range(20))
        right = round(20 * ACCURACIES[result["row"]][result["seed"]])
        assert result["right"] == "".join(str(int(int(name[:-4]) < right)) for name in names)


def test_a_graph_over_the_batch_is_tested_in_both_orders(scripts, tmp_path, capsys):
    rows = ["--rows", "resnet", "published", "published-batch-graph"]
    results = sweep(tmp_path, *rows, "--test")
    evaluations = [flags for name, flags in scripts if name == "test.py"]
    assert len(evaluations) == 8
    assert ["--shuffle" in flags for flags in evaluations if "batch-graph" in flags[0]] == [False, True] * 2
    shuffled = [result for result in results if "test_shuffled" in result]
    assert {result["row"] for result in shuffled} == {"published-batch-graph"}
    assert shuffled[0]["test"]["accuracy/graph"] > shuffled[0]["test_shuffled"]["accuracy/graph"]
    shown = capsys.readouterr().out
    assert "| row | seeds | spread | prediction | graph | boxes |" in shown
    assert "| published-batch-graph | 2 | 7.1 | 65.0 | 87.5 |  |" in shown
    assert "| published-batch-graph, shuffled | 2 | 7.1 | 65.0 | 25.0 |  |" in shown
    assert "published, shuffled" not in shown
    # against the first and against published, each pair once
    assert shown.count("against resnet:") == 2
    assert shown.count("against published:") == 1
    ablation.main(["--table", str(tmp_path / "results.jsonl")])
    table = capsys.readouterr().out
    assert table == shown
    assert len(scripts) == 6 + 8


def test_rows_are_paired_with_any_other(scripts, tmp_path, capsys):
    sweep(tmp_path, "--rows", "resnet", "published", "published-batch-graph", "--test")
    capsys.readouterr()
    ablation.main(["--table", str(tmp_path / "results.jsonl"), "--against", "published", "published-batch-graph"])
    shown = [line for line in capsys.readouterr().out.splitlines() if "against" in line]
    assert [line.split(",")[0] for line in shown] == [
        "resnet against published: -10.0 points",
        "published-batch-graph against published: +0.0 points",
        "resnet against published-batch-graph: -10.0 points",
    ]
    assert all(line.endswith("; seeds 0, 1)") for line in shown)


def test_a_row_to_pair_with_must_be_in_the_table(scripts, tmp_path):
    sweep(tmp_path, "--rows", "resnet", "published")
    ran = len(scripts)
    for options in (["--table", str(tmp_path / "results.jsonl")], ["--runs", str(tmp_path), "--rows", "resnet"]):
        with pytest.raises(ValueError, match="--against mmal is no row of this table, which has resnet"):
            ablation.main([*options, "--against", "mmal"])
    assert len(scripts) == ran


def test_a_run_that_fails_does_not_end_the_sweep(scripts, broken, tmp_path, capsys):
    broken |= {"resnet-0", "mmal-1"}
    with pytest.raises(
        SystemExit, match=r"2 of 4 runs failed:\nresnet seed 0: RuntimeError: train.py ended.*\nmmal seed 1: "
    ):
        sweep(tmp_path, "--test")
    done = [(result["row"], result["seed"]) for result in results_of(tmp_path / "results.jsonl")]
    assert done == [("mmal", 0), ("resnet", 1)]
    shown = capsys.readouterr().out
    assert "| resnet | 1 |  | 60.0 |" in shown
    assert "mmal against resnet: no seed that both have" in shown
    broken.clear()
    assert len(sweep(tmp_path, "--test")) == 4
    broken |= {f"{row}-{seed}" for row in ("resnet", "mmal") for seed in (2, 3)}
    with pytest.raises(SystemExit, match="2 of 2 runs failed"):
        ablation.main(["--runs", str(tmp_path), "--rows", "resnet", "--seeds", "2", "3"])


@pytest.mark.parametrize(
    ("file", "runs"), [("birds-224.jsonl", 35), ("birds-224-systems.jsonl", 30), ("cub200-224.jsonl", 26)]
)
def test_recorded_runs_are_recognised(file, runs):
    """Rows that a line names and that are still there would not be run again."""
    results = sweep_results.read_results(Path(ablation.__file__).parent / "results" / file)
    assert len(results) == runs
    for result in results:
        if result["row"] in sweep_rows.ROWS:
            flags = sweep_rows.flags_of(result["row"], result["seed"], shlex.split(result["common"]))
            assert sweep_rows.command_of(flags) == result["command"]
            assert ablation.is_tested(result, flags)


def test_runs_of_older_versions_are_shown(scripts, tmp_path, capsys):
    """They called the prediction the answer."""
    sweep(tmp_path, "--test")
    capsys.readouterr()
    path = tmp_path / "results.jsonl"
    ablation.main(["--table", str(path)])
    shown = capsys.readouterr().out
    path.write_text(path.read_text().replace("accuracy/prediction", "accuracy/answer"))
    ablation.main(["--table", str(path)])
    assert capsys.readouterr().out == shown


def test_runs_on_different_images_are_not_paired(scripts, tmp_path, capsys):
    sweep(tmp_path, "--test")
    path = tmp_path / "results.jsonl"
    results = results_of(path)
    results[1]["right"] = results[1]["right"][1:]
    path.write_text("".join(json.dumps(result) + "\n" for result in results))
    ablation.main(["--table", str(path)])
    assert "mmal against resnet: they were tested on different images" in capsys.readouterr().out


@pytest.mark.parametrize("line", ["{", "[]", '{"row": "resnet"}'])
def test_another_file_is_refused_and_left_alone(scripts, tmp_path, line):
    path = tmp_path / "results.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(ValueError, match=r"line 1 of .*results\.jsonl is no result"):
        sweep(tmp_path)
    with pytest.raises(ValueError, match="line 1 of"):
        ablation.main(["--table", str(path)])
    assert path.read_text() == line + "\n"
    assert scripts == []


def test_every_row_has_possible_settings():
    from config import parse_settings

    for row in sweep_rows.ROWS:
        parse_settings([*sweep_rows.flags_of(row, 0, sweep_rows.COMMON), "--data_root", "birds"])
    with pytest.raises(SystemExit):
        ablation.main(["--rows", "nonsense"])
