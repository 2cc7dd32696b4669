"""Who may import whom, read from the sources with `ast` and held to the design.

`train.py`, `test.py`, `predict.py`, `export.py`, `tests/` and `benchmarks/` may use everything. The others: `networks/`
torch, torchvision, itself and what is light of utils (errors, options); a system parts, never another system; `utils/`
of the project only itself and what works for every system (`FOR_EVERY_SYSTEM`), never a part; `config.py` the standard
library, `networks` and what is light; `datasets.py` errors and `utils.data`.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = frozenset({"train", "test", "predict", "export"})
SYSTEMS = frozenset(path.stem for path in (ROOT / "networks" / "systems").glob("*.py")) - {"__init__"}
# The standard library is all that they need.
LIGHT = frozenset(
    {
        "utils.config_slips",
        "utils.errors",
        "utils.options",
        "utils.shared_settings",
        "utils.flags",
        "utils.command_line",
        "utils.older_runs",
        "utils.other_flags",
        "utils.text",
    }
)
# Imported where they are needed, with a sentence where they are not installed.
OPTIONAL = {"networks.pretrained": {"safetensors.torch"}}
FOR_EVERY_SYSTEM = frozenset(
    {"networks", "networks.system", "networks.outputs", "networks.folding", "networks.evidence"}
)
PROJECT = PAGES | {"config", "datasets", "networks", "utils", "tests", "benchmarks"}
STANDARD_LIBRARY = frozenset(sys.stdlib_module_names) - PROJECT  # the standard library has a `test` too


def source_files() -> dict[str, Path]:
    """Module name -> file, for every project file that is held to a rule."""
    files = [*ROOT.glob("*.py"), *ROOT.glob("networks/**/*.py"), *ROOT.glob("utils/**/*.py")]
    return {module_name(path.relative_to(ROOT)): path for path in sorted(files)}


def module_name(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def imported_modules(source: str, name: str, *, is_package: bool = False) -> Iterator[str]:
    """Every module that `source`, the text of module `name`, imports, wherever in the file; type checking too.

    `from package import part` is `package.part` where that is a module of the project, else `package`.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = name.split(".")
                kept = len(parts) - node.level + (1 if is_package else 0)
                origin = ".".join([*parts[:kept], *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{origin}.{alias.name}"
                yield inner if is_module(inner) else origin


def is_within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def refusal(importer: str, imported: str) -> str | None:
    """Why `importer` may not import `imported`, or None where it may."""
    room, top = importer.split(".")[0], imported.split(".")[0]
    if room in PAGES:
        return None
    if room == "networks":
        if top in {"networks", "torch", "torchvision"} or top in STANDARD_LIBRARY or imported in LIGHT:
            return None
        if imported in OPTIONAL.get(importer, ()):
            return None
        return "networks/ may import torch, torchvision, utils.errors, utils.options and itself only"
    if imported in LIGHT and importer in LIGHT:
        return None
    if importer in LIGHT:
        return None if top in STANDARD_LIBRARY | {"torch"} else f"{importer} may import the standard library only"
    if room == "utils":
        if top not in PROJECT or top == "utils" or imported in FOR_EVERY_SYSTEM:
            return None
        return f"utils/ may import itself and {', '.join(sorted(FOR_EVERY_SYSTEM))}, no other module of the project"
    if room == "config":
        if top in STANDARD_LIBRARY or imported in LIGHT or imported == "networks":
            return None
        return f"config.py may import the standard library, networks and {', '.join(sorted(LIGHT))} only"
    if room == "datasets":
        if top not in PROJECT or imported == "utils.errors" or is_within(imported, "utils.data"):
            return None
        return "datasets.py may import utils.errors and utils.data, no other module of the project"
    return f"{importer} is in none of the rooms that the design names"


@functools.cache
def imports_of(name: str, path: Path) -> frozenset[str]:
    return frozenset(imported_modules(path.read_text(encoding="utf-8"), name, is_package=path.name == "__init__.py"))


def system_of(module: str) -> str | None:
    return module.rpartition(".")[2] if is_within(module, "networks.systems") and module != "networks.systems" else None


FILES = source_files()


def test_there_is_something_to_check() -> None:
    assert {"networks", "networks.outputs", "networks.systems.sgkrl", "networks.localization"} <= FILES.keys()


@pytest.mark.parametrize("name", FILES)
def test_imports_stay_inside_the_rules(name: str) -> None:
    wrong = {imported: refusal(name, imported) for imported in imports_of(name, FILES[name])}
    assert not {imported: reason for imported, reason in wrong.items() if reason}


@pytest.mark.parametrize("name", [name for name in FILES if system_of(name)])
def test_a_system_never_reaches_another_system(name: str) -> None:
    """Not through a part either, nor through the package, which knows them all."""
    seen, waiting = {name}, [name]
    while waiting:
        current = waiting.pop()
        for imported in imports_of(current, FILES[current]):
            assert imported != "networks", f"{current} imports from the package, which imports every system"
            assert system_of(imported) in (None, system_of(name)), f"{name} reaches {imported} through {current}"
            if imported in FILES and imported not in seen:
                seen.add(imported)
                waiting.append(imported)


@pytest.mark.parametrize(
    ("importer", "source", "wrong"),
    (
        ("networks.windows", "import numpy", True),
        ("networks.windows", "def later():\n    from config import Config", True),
        ("networks.windows", "import torch.nn.functional as F\nfrom torchvision.ops import nms\nimport math", False),
        ("networks.windows", "from . import outputs\nfrom .outputs import Features", False),
        ("networks.windows", "from ..utils import metrics", True),
        ("networks.windows", "import utils.reporting.metrics", True),
        ("networks.windows", "import datasets", True),
        ("utils.reporting.metrics", "from networks.outputs import NetworkOutput\nfrom networks import outputs", False),
        ("utils.reporting.metrics", "from networks import build_network", False),
        ("utils.reporting.metrics", "from networks import outputs, windows", True),
        ("utils.reporting.metrics", "import networks.systems.mmal", True),
        ("utils.reporting.metrics", "import config", True),
        ("utils.reporting.metrics", "import train", True),
        (
            "utils.reporting.metrics",
            "import numpy, torch\nfrom utils.training.seeding import x\nfrom . import seeding",
            False,
        ),
        ("config", "import dataclasses", False),
        ("config", "import torch", True),
        ("config", "from networks.windows import WINDOW_SETS", True),
        ("config", "from networks import build_network", False),
        ("networks.systems.mmal", "from utils.options import Count", False),
        ("networks.systems.mmal", "import utils.run", True),
        ("datasets", "import numpy, torch, PIL.Image", False),
        ("datasets", "from utils.data import demo_birds\nfrom utils.errors import UserError", False),
        ("datasets", "import utils.reporting.metrics", True),
        ("datasets", "from utils.training.distributed import rank", True),
        ("datasets", "from config import Settings", True),
        ("utils.data.pixels", "from datasets import Entry", True),
        ("train", "import config, datasets, networks, utils.reporting.metrics", False),
        ("misc", "import math", True),
    ),
)
def test_the_rules_see_what_they_should(importer: str, source: str, wrong: bool) -> None:
    assert any(refusal(importer, imported) for imported in imported_modules(source, importer)) == wrong
