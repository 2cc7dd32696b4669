"""The worked example of docs/adding_a_system.md, run as it stands there."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch

import networks
import networks.systems
import train
from networks import build_network, find_system
from utils.errors import UserError
from utils.options import SettingsError

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "adding_a_system.md"

pytestmark = pytest.mark.usefixtures("thin_trunk")


@pytest.fixture
def two_poolings(tmp_path, monkeypatch) -> str:
    """The example's file in a folder that belongs to `networks/systems/` for this test."""
    (source,) = re.findall(r"^```python\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    name = "two_poolings"
    assert f"networks/systems/{name}.py" in DOCUMENT.read_text(encoding="utf-8")
    (tmp_path / f"{name}.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(networks.systems, "__path__", [*networks.systems.__path__, str(tmp_path)])
    monkeypatch.setattr(networks, "MODELS", (*networks.MODELS, name))
    yield name
    sys.modules.pop(f"networks.systems.{name}", None)


def test_the_example_is_short(two_poolings):
    assert len(Path(find_system(two_poolings).__init__.__code__.co_filename).read_text().splitlines()) <= 42


def test_the_example_is_built_by_its_name(two_poolings):
    network = build_network(two_poolings, num_classes=3, backbone="resnet18", input_size=96, peaks=2)
    output = network(torch.rand(2, 3, 96, 96))
    assert {name: tuple(logits.shape) for name, logits in output.logits.items()} == {"raw": (2, 3), "peak": (2, 3)}
    assert network.predict_logits(output).shape == (2, 3)
    with pytest.raises(SettingsError, match="peaks is a setting of two_poolings, not of mmal"):
        build_network("mmal", num_classes=3, peaks=2)


def test_the_example_trains_continues_and_is_evaluated(two_poolings, tiny_run, tmp_path, evaluation_script):
    arguments = tiny_run(tmp_path, "--peaks", "3", "--warmup_epochs", "0", model=two_poolings)
    train.main(arguments)
    folder = tmp_path / "folder-two_poolings"
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (settings["options"], settings["weight_decay"]) == ({"peaks": 3}, 5e-4)
    line = json.loads((folder / "log.jsonl").read_text(encoding="utf-8"))
    total = line["train/loss/raw"] + 0.5 * line["train/loss/peak"]
    assert line["train/loss/total"] == pytest.approx(total, rel=1e-6)
    train.main(arguments)  # there is nothing left to do
    evaluation_script.main([str(folder / "best.pth")])
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["prediction"] == "mean probability of raw, peak"


def test_a_file_with_several_systems_is_refused(two_poolings, tmp_path):
    path = tmp_path / f"{two_poolings}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n\nclass Another(TwoPoolings):\n    pass\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"two_poolings.py defines 2 subclasses of System; expected one"):
        find_system(two_poolings)
