"""Checkpoints: written so that a file is there whole or not at all, and read without running code from it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn


class CheckpointError(ValueError):
    """A checkpoint that cannot be used, said in one sentence that names the file."""


def save_checkpoint(path: str | Path, content: Mapping[str, object]) -> None:
    """Write `content` to `path`, through a temporary file beside it that replaces it once it is on the disk."""
    path = Path(path)
    temporary = path.with_name(path.name + ".part")
    try:
        with temporary.open("wb") as file:
            torch.save(dict(content), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)  # half a file would only fill the disk


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint into CPU memory; only tensors and plain values are accepted. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: give the path of a file such as best.pth")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    except Exception:  # in a damaged file torch stumbles over whatever it meets
        raise CheckpointError(f"checkpoint {path} is refused: it is damaged, or holds more than tensors") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}; expected what train.py writes")
    return content


# How names begin in checkpoints of the published MMAL-Net and SG-KRL code, and in ours.
_PUBLISHED_PREFIXES = {
    "pretrained_model.": "backbone.trunk.",
    "rawcls_net.": "classifier.",
    "CBAM.channelattention.fc.": "weighting.channel.mlp.",
    "CBAM.spatialattention.conv1.": "weighting.spatial.conv.",
    "gcn_model.conv1.": "graph.convolutions.0.",
    "gcn_model.conv3.": "graph.convolutions.1.",
    "gcn_model.classifier.": "graph.classifier.",
    "fusion4.q_proj.": "fusion.stage3.query.",
    "fusion4.k_proj.": "fusion.stage3.key.",
    "fusion4.v_proj.": "fusion.stage3.value.",
    "fusion4.out_proj.": "fusion.stage3.out.",
    "fusion3.q_proj.": "fusion.stage2.query.",
    "fusion3.k_proj.": "fusion.stage2.key.",
    "fusion3.v_proj.": "fusion.stage2.value.",
    "fusion3.out_proj.": "fusion.stage2.out.",
}


def load_published(network: nn.Module, path: str | Path) -> None:
    """Load a checkpoint of the published MMAL-Net or SG-KRL code into a network of that model.

    SG-KRL wants `wiring="published"`. Everything has to fit: raises CheckpointError naming what is missing, left over
    or of another shape (the published files' unused `pretrained_model.fc` excepted).
    """
    content = load_checkpoint(path)
    state = content.get("model_state_dict", content)
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} is no published checkpoint: it holds no 'model_state_dict' of tensors")
    state = {name.removeprefix("module."): value for name, value in state.items()}
    state = {name: value for name, value in state.items() if not name.startswith("pretrained_model.fc.")}
    expected = network.state_dict()
    published_name = {renamed: name for name in state if (renamed := _rename_published(name)) in expected}
    problems = {
        "left over": sorted(state.keys() - published_name.values()),
        "missing": [_published_name_of(name) for name in expected if name not in published_name],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(expected[ours].shape)}"
            for ours, name in published_name.items()
            if state[name].shape != expected[ours].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {_first_few(names)}" for problem, names in problems.items() if names)
        raise CheckpointError(
            f"published checkpoint {path} does not fit this network (SG-KRL needs wiring='published'); {listed}"
        )
    network.load_state_dict({ours: state[name] for ours, name in published_name.items()})


def _first_few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _rename_published(name: str) -> str | None:
    for published, ours in _PUBLISHED_PREFIXES.items():
        if name.startswith(published):
            return ours + name.removeprefix(published)
    return None


def _published_name_of(name: str) -> str:
    """Return the published name of a parameter of ours, or ours where that code has no such thing."""
    for published, ours in _PUBLISHED_PREFIXES.items():
        if name.startswith(ours):
            return published + name.removeprefix(ours)
    return name
