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


# what stands in the example, what somebody makes of it -> words of the one sentence
SLIPS = {
    "no options": ("    Options = Options\n", "", "has no Options, and the file a class of that name"),
    "options that are none": ("@dataclass(frozen=True)\n", "", "has Options that are no dataclass"),
    "a shared setting's name": ("    peaks: ", "    dropout: int = 1\n    peaks: ", "has dropout in its Options"),
    "a key that is no setting": (
        '"weight_decay"',
        '"wieght_decay"',
        "which is no shared setting (did you mean weight_decay?)",
    ),
    "no branches": ('    branches = evaluated = prediction = ("raw", "peak")\n', "", "has no branches"),
    "a comma forgotten": (
        "    loss_weights",
        '    prediction = "raw"\n    loss_weights',
        "has a text as its prediction; expected a tuple: ('raw',)",
    ),
    "a prediction of another branch": (
        "    loss_weights",
        '    prediction = ("tail",)\n    loss_weights',
        "has 'tail' in prediction",
    ),
    "no branch to warm up with": (
        "    loss_weights",
        '    warmup_branches = ("whole",)\n    loss_weights',
        "has 'whole' in warmup_branches; expected some of its branches, raw, peak, or ()",
    ),
}


def rewrite(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_are_one_sentence_before_a_run_begins(two_poolings, tiny_run, tmp_path, slip):
    before, after, words = SLIPS[slip]
    arguments = [*tiny_run(tmp_path / "runs"), "--model", two_poolings]
    rewrite(tmp_path / f"{two_poolings}.py", before, after)
    with pytest.raises(SettingsError, match=re.escape(words)) as refusal:
        train.main(arguments)
    assert str(refusal.value).startswith(f"{two_poolings}.py: TwoPoolings has ")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        (', "peak": 0.5', "", "has a branch peak and no weight of its loss"),
        (
            "    def heads(self):",
            "    def losses(self, *arguments, **options):\n"
            "        return super().losses(*arguments, **options) | {'extra': 0}\n\n    def heads(self):",
            "has a loss term extra and no weight of it",
        ),
        ('"peak": 0.5', '"peak": 0.5, "tail": 1', "has a loss term tail and only a weight of it"),
    ],
)
def test_losses_and_their_weights_have_the_same_names(two_poolings, tiny_run, tmp_path, before, after, words):
    rewrite(tmp_path / f"{two_poolings}.py", before, after)
    with pytest.raises(UserError, match=words):
        train.main(tiny_run(tmp_path / "runs", "--warmup_epochs", "0", model=two_poolings))


def test_a_run_goes_on_with_a_setting_that_its_system_got_since(two_poolings, tiny_run, tmp_path, evaluation_script):
    arguments = tiny_run(tmp_path / "runs", "--warmup_epochs", "0", model=two_poolings)
    train.main([*arguments, "--epochs", "2", "--schedule", "steps"])
    rewrite(tmp_path / f"{two_poolings}.py", "    peaks: ", "    power: int = 2  # of nothing\n    peaks: ")
    sys.modules.pop(f"networks.systems.{two_poolings}")
    train.main([*arguments, "--epochs", "3", "--schedule", "steps"])
    evaluation_script.main([str(tmp_path / "runs" / f"folder-{two_poolings}" / "last.pth")])
    with pytest.raises(UserError, match="power 2 there and 3 here"):
        train.main([*arguments, "--epochs", "3", "--schedule", "steps", "--power", "3"])


def test_a_file_that_cannot_be_imported_is_no_other_run_s_affair(two_poolings, tiny_run, tmp_path, evaluation_script):
    (tmp_path / f"{two_poolings}.py").write_text("import nothing_of_this_name\n", encoding="utf-8")
    arguments = tiny_run(tmp_path / "runs")
    for _ in range(2):
        train.main(arguments)
    evaluation_script.main([str(tmp_path / "runs" / "folder-resnet" / "best.pth")])
    with pytest.raises(SettingsError, match="imput_size"):
        train.main([*arguments, "--imput_size", "96"])
    with pytest.raises(ModuleNotFoundError):
        train.main(tiny_run(tmp_path / "runs", model=two_poolings))


def test_a_file_with_several_systems_is_refused(two_poolings, tmp_path):
    path = tmp_path / f"{two_poolings}.py"
    path.write_text(path.read_text(encoding="utf-8") + "\n\nclass Another(TwoPoolings):\n    pass\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"two_poolings.py defines 2 subclasses of System; expected one"):
        find_system(two_poolings)
