"""The sweep over the rows of the ablation table; nothing is trained here."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import ablation  # noqa: E402

ACCURACIES = {"resnet": (0.5, 0.6), "mmal": (0.75, 0.85)}  # by seed


@pytest.fixture
def scripts(monkeypatch) -> list[tuple[str, list[str]]]:
    """What train.py and test.py would leave, without them; returns the calls."""
    calls = []

    def script(name, flags, environment):
        calls.append((name, flags))
        options = dict(zip(flags[::2], flags[1::2], strict=False))
        if name == "test.py":
            folder = ablation.Path(flags[0]).parent
            model, seed = folder.name.removeprefix("cub-").split("-")
            right = round(20 * ACCURACIES[model][int(seed)])
            report = {"branches": {"answer": {"top1": right / 20}}, "boxes": None}
            (folder / "report-last.json").write_text(json.dumps(report))
            rows = [f"{i}.jpg,a,b,{int(i < right)}\n" for i in range(20)]
            (folder / "predictions-last.csv").write_text("picture,label,prediction,answer\n" + "".join(rows))
            return
        folder = ablation.Path(options["--checkpoint_dir"]) / f"cub-{options['--name']}"
        folder.mkdir(parents=True, exist_ok=True)
        model = flags[len(flags) - 1 - flags[::-1].index("--model") + 1]
        accuracy = ACCURACIES[model][int(options["--seed"])]
        lines = [
            {"epoch": epoch, "validation/accuracy/answer": accuracy * epoch / 2, "speed/train_images_per_second": 9.0}
            for epoch in (1, 2)
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
        assert flags[: len(ablation.COMMON)] == list(ablation.COMMON)
        assert flags[len(ablation.COMMON) :][:4] == ["--data_root", "birds", "--epochs", "2"]
    assert {name for name, _ in scripts} == {"train.py"}
    lines = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == results
    shown = capsys.readouterr().out
    assert "| resnet | 2 | 7.1 | 55.0 |  |" in shown
    assert "| mmal | 2 | 7.1 | 80.0 |  |" in shown


def test_test_images_are_looked_at_once_and_rows_are_paired(scripts, tmp_path, capsys):
    sweep(tmp_path, "--test")
    assert "mmal against resnet: +25.0 points" in capsys.readouterr().out
    sweep(tmp_path, "--test")
    assert [name for name, _ in scripts].count("test.py") == 4


def test_every_row_has_possible_settings():
    from config import parse_settings

    for flags in ablation.ROWS.values():
        parse_settings([*ablation.COMMON, "--data_root", "birds", *flags])
    with pytest.raises(SystemExit):
        ablation.main(["--rows", "nonsense"])
