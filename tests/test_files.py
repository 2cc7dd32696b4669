"""What is written while it is told, to a reader that leaves."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import sys
from utils.files import show, write_text
show("first")
sys.stdin.read()  # until the reader has gone
for word in ("second", "third"):
    show(word)
write_text(sys.argv[1], "whole")
print("last")
"""


def test_a_reader_that_leaves_costs_no_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PROGRAM, str(path)], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "first\n"
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 0
    assert path.read_text() == "whole"
