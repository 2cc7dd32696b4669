"""docs/settings.md and docs/systems.md have what the code has, and docs/runs.md names tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from config import PUBLISHED, Settings, complete
from networks import MODELS, find_system
from utils.options import flat, hints

DOCS = Path(__file__).parents[1] / "docs"
SETTINGS, SYSTEMS = ((DOCS / name).read_text(encoding="utf-8") for name in ("settings.md", "systems.md"))
RECIPES = dict(
    re.findall(r"^\| `(\w+)` \| (.*) \|$", SETTINGS.partition("### Recipes of the systems")[2], re.MULTILINE)
)


def test_every_shared_setting_has_a_row():
    first_cells = " ".join(re.findall(r"^\|([^|]*)\|", SETTINGS, re.MULTILINE))
    assert not [name for name in hints(Settings) if f"`{name}`" not in first_cells]


@pytest.mark.parametrize("model", MODELS)
def test_every_system_has_a_row_with_all_that_is_its_own_and_a_section(model):
    (row,) = re.findall(rf"^\| \[`{model}`\]\(#{model}\).*$", SYSTEMS, re.MULTILINE)
    system = find_system(model)
    assert not [name for name in (*hints(system.Options), *system.branches) if not re.search(rf"\b{name}\b", row)]
    assert f"\n## {model}\n" in SYSTEMS


@pytest.mark.parametrize("model", sorted(set(MODELS) & set(RECIPES)))
def test_a_recipe_names_what_differs_from_the_shared_values(model):
    run = flat(complete(Settings(model=model, dataset="cub", data_root="somewhere")))
    unused = {"steps": "decay_rate", "exponential": "milestones"}.get(run["schedule"], "")
    usual = PUBLISHED | {"resize_size": run["image_size"]}
    differing = {name for name in usual if run[name] != usual[name]} - {unused, "warmup_epochs"}
    before_others = RECIPES[model].partition("; from random weights")[0]
    assert set(re.findall(r"`(\w+)` (?:`|√?\d)", before_others)) == differing
    for name in differing & {"epochs", "batch_size", "resize_size", "schedule", "optimizer"}:
        assert re.search(rf"`{name}` `?{run[name]}\b", before_others)


def test_every_promise_names_tests_that_are_there():
    """As `file.py: part of a name`, more names of the same file behind it, or a file alone."""
    rows = (DOCS / "runs.md").read_text(encoding="utf-8").partition("| promise | test |")[2].strip().splitlines()[1:]
    assert len(rows) > 20
    for row in rows:
        content = ""
        for named in re.findall(r"`([^`]+)`", row.rpartition(" | ")[2]):
            file, _, word = named.rpartition(": ") if named.startswith("test_") else ("", "", named)
            if named.endswith(".py"):
                file, word = named, "def test_"
            if file:
                (path,) = Path(__file__).parent.rglob(file)
                content = path.read_text(encoding="utf-8")
            assert re.search(rf"^def test_\w*{word}|^{word}", content, re.MULTILINE), named
