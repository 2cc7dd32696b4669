"""The input benchmark runs and reports what it promises; how fast is for the benchmark itself to say."""

from __future__ import annotations

import json
from pathlib import Path

from launching import run_script


def test_it_reports_every_setting(tmp_path: Path) -> None:
    options = ["--images", "8", "--batch_size", "4", "--image_size", "96", "--rounds", "1", "--workers", "0", "1"]
    result = run_script("benchmarks/input.py", *options, "--device", "cpu", "--json", str(tmp_path / "out.json"))
    assert result.returncode == 0, result.stderr
    assert "Warning" not in result.stderr
    report = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert report["pictures"]["mean_size"] == [500, 375]
    here, beside = report["measurements"]
    assert (here["workers"], beside["workers"]) == (0, 1)
    assert list(here["rows"]) == ["plain", "files", "ram", "disk", "decode", "device"]
    assert list(beside["rows"]) == ["plain", "files", "ram", "disk"]
    for rows in (here["rows"], beside["rows"]):
        assert rows["plain"]["ratio"] == 1
        assert all(row["images_per_second"] > 0 and row["ratio"] > 0 for row in rows.values())
        assert all(name in result.stdout for name in rows)
