"""Forked scripts behave as if Python had been started with them, and each script starts with a Python of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from launching import PROJECT, Script, run_script

SHOW = """
import os, sys, torch, torchvision
print(sys.argv, os.getcwd(), os.environ["COLOUR"], sys.path[0], __name__, torch.get_num_threads())
print(torchvision.models.get_model("resnet18").fc.in_features, "torch" in globals())
os.environ["COLOUR"] = "red"
sys.exit(3)
"""
ENDINGS = {
    "pass": (0, ""),
    "raise SystemExit('a sentence')": (1, "a sentence"),
    "1 / 0": (1, "ZeroDivisionError: division by zero"),
    "import os, signal; os.kill(os.getpid(), signal.SIGTERM)": (-signal.SIGTERM, ""),
    "import atexit, sys; atexit.register(sys.stderr.write, 'at the end')": (0, "at the end"),
}


def script_of(folder: Path, code: str) -> str:
    (folder / "script.py").write_text(code, encoding="utf-8")
    return str(folder / "script.py")


@pytest.mark.parametrize("thin", [False, True])
def test_a_script_has_its_own_words_folder_environment_and_trunk(thin, tmp_path):
    script = script_of(tmp_path, SHOW)
    for _ in range(2):  # what one leaves is not seen by the next
        ended = run_script(script, "--flag", "name\udcf8", folder=tmp_path, thin=thin, COLOUR="blue")
        assert ended.returncode == 3, ended.stderr
        first, second = ended.stdout.splitlines()
        assert first == f"{[script, '--flag', 'name' + chr(0xDCF8)]} {tmp_path} blue {tmp_path} __main__ 1"
        assert second == f"{128 if thin else 512} True"
    assert "COLOUR" not in os.environ


@pytest.mark.parametrize("code", ENDINGS)
def test_a_script_ends_as_it_would_alone(code, tmp_path):
    ended = run_script(script_of(tmp_path, code))
    number, last = ENDINGS[code]
    assert ended.returncode == number
    assert ended.stderr.strip().splitlines()[-1:] == [last] * bool(last)


def test_a_script_can_be_stopped_and_has_a_limited_time(tmp_path):
    script = script_of(tmp_path, "import time; print('here', flush=True); time.sleep(60)")
    with Script(script) as process:
        assert process.poll() is None
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert (process.poll(), process.returncode) == (-signal.SIGKILL, -signal.SIGKILL)
    with pytest.raises(TimeoutError), Script(script) as process:
        process.communicate(timeout=0.2)
    assert process.returncode == -signal.SIGKILL


@pytest.mark.slow
@pytest.mark.parametrize("name", ["train.py", "test.py", "predict.py", "export.py", "benchmarks/ablation.py"])
def test_every_script_starts_from_any_folder(name, tmp_path):
    command = [sys.executable, str(PROJECT / name), "--help"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "--" in ended.stdout
    assert list(tmp_path.iterdir()) == []
