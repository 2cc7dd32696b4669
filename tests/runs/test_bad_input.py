"""Settings that end with one sentence, and harm nothing."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from whole_runs import contents

import train
from utils.errors import exit_with_one_sentence

# flags added to the finished run's own -> words of the one sentence
BAD_INPUT = {
    "unknown setting": (["--epoch", "3"], ["--epoch"]),
    "not a number": (["--epochs", "many"], ["epochs", "many"]),
    "impossible number": (["--epochs", "0"], ["epochs", "0"]),
    "broken windows": (["--windows", "((((", "--model", "mmal"], ["windows", "(((("]),
    "unknown windows": (["--windows", "fish", "--model", "mmal"], ["fish", "birds"]),
    "unknown model": (["--model", "vgg"], ["vgg", "sgkrl"]),
    "unknown data set": (["--dataset", "fish"], ["fish", "cub"]),
    "unknown backbone": (["--backbone", "vgg16", "--name", "other"], ["vgg16", "resnet50"]),
    "unknown weights": (["--pretrained", "IMAGENET9", "--name", "other"], ["IMAGENET9"]),
    "absent weights": (["--pretrained", "gone.pth", "--name", "other"], ["gone.pth"]),
    "weights that are no weights": (["--pretrained", __file__, "--name", "other"], ["test_bad_input.py"]),
    "absent data": (["--data_root", "gone"], ["gone"]),
    "data_root is a file": (["--data_root", __file__], ["test_bad_input.py"]),
    "no such class": (["--classes", "pur*"], ["pur*"]),
    "no such GPU": (["--device", "cuda:17"], ["cuda:17"]),
    "no such branch": (["--prediction", "tail", "--name", "other"], ["tail", "raw"]),
    "no such loss": (["--loss_weights", "tail=1", "--name", "other"], ["tail", "raw"]),
    "contradiction": (["--batch_norm", "frozen"], ["batch_norm", "pretrained"]),
    "another system's setting": (["--graph_scope", "batch"], ["graph_scope", "sgkrl_published", "resnet"]),
    "other settings in the folder": (["--seed", "9"], ["seed 0 there and 9 here", "--name", "--fresh"]),
    "other classes in the folder": (["--classes", "red", "blue"], ["classes", "--name", "--fresh"]),
    "a name that is a path": (["--name", "../up"], ["name", "../up"]),
    "a folder that cannot be made": (["--checkpoint_dir", "/proc/runs"], ["/proc/runs"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_ends_with_one_sentence_and_harms_nothing(case, single_epoch, tiny_run, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags, words = BAD_INPUT[case]
    before = contents(single_epoch.parent)
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main([*tiny_run(single_epoch.parent), *flags])
    assert ending.value.code == 2
    errors = capsys.readouterr().err
    (sentence,) = errors.splitlines()
    assert sentence.startswith("error: ")
    assert all(word in sentence for word in words), sentence
    assert contents(single_epoch.parent) == before
    assert [path.name for path in single_epoch.parent.iterdir()] == [single_epoch.name]


def test_unreadable_pictures_stop_a_run_before_it_begins_or_are_left_out(tiny_run, picture_tree, tmp_path, capsys):
    tree = Path(shutil.copytree(picture_tree, tmp_path / "tree"))
    whole = (tree / "red" / "0.png").read_bytes()
    (tree / "red" / "0.png").write_bytes(whole[: len(whole) // 2])
    (tree / "blue" / "1.png").write_bytes(b"")
    arguments = tiny_run(tmp_path / "runs", "--data_root", str(tree))
    with pytest.raises(SystemExit) as ending, exit_with_one_sentence():
        train.main(arguments)
    assert ending.value.code == 2
    (sentence,) = capsys.readouterr().err.splitlines()
    assert re.match(
        r"error: 2 of 24 pictures cannot be read, the first is \S+tree/\S+\.png \(.+\): .*on_bad_image", sentence
    )
    assert not (tmp_path / "runs").exists()

    train.main([*arguments, "--on_bad_image", "skip"])
    folder = tmp_path / "runs" / "folder-resnet"
    listed = (folder / "bad_pictures.txt").read_text(encoding="utf-8").splitlines()
    assert sorted(line.split("\t")[0] for line in listed) == [str(tree / "blue" / "1.png"), str(tree / "red" / "0.png")]
    assert "2 unreadable pictures are left out" in capsys.readouterr().out
