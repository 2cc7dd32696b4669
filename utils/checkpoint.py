"""Checkpoints: written so that a file is there whole or not at all, and read without running code from it."""

from __future__ import annotations

import os
import pickle
import re
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
    with temporary.open("wb") as file:
        torch.save(dict(content), file)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint into CPU memory; only tensors and plain values are accepted. Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: give the path of a file such as best.pth")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise CheckpointError(f"checkpoint {path} is refused: it is damaged, or holds more than tensors") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}; expected what train.py writes")
    return content


# Names of parameters in the checkpoints of the published MMAL-Net and SG-KRL code, and ours.
_PUBLISHED_NAMES = (
    (r"pretrained_model\.(.+)", r"backbone.trunk.\1"),
    (r"rawcls_net\.(.+)", r"classifier.\1"),
    (r"CBAM\.channelattention\.fc\.(.+)", r"weighting.channel.mlp.\1"),
    (r"CBAM\.spatialattention\.conv1\.(.+)", r"weighting.spatial.conv.\1"),
    (r"gcn_model\.conv1\.(.+)", r"graph.convolutions.0.\1"),
    (r"gcn_model\.conv3\.(.+)", r"graph.convolutions.1.\1"),
    (r"gcn_model\.classifier\.(.+)", r"graph.classifier.\1"),
    (r"fusion4\.q_proj\.(.+)", r"fusion.stage3.query.\1"),
    (r"fusion4\.k_proj\.(.+)", r"fusion.stage3.key.\1"),
    (r"fusion4\.v_proj\.(.+)", r"fusion.stage3.value.\1"),
    (r"fusion4\.out_proj\.(.+)", r"fusion.stage3.out.\1"),
    (r"fusion3\.q_proj\.(.+)", r"fusion.stage2.query.\1"),
    (r"fusion3\.k_proj\.(.+)", r"fusion.stage2.key.\1"),
    (r"fusion3\.v_proj\.(.+)", r"fusion.stage2.value.\1"),
    (r"fusion3\.out_proj\.(.+)", r"fusion.stage2.out.\1"),
)


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

    ours, left_over = {}, []
    for name, value in state.items():
        renamed = _rename_published(name)
        if renamed in expected:
            ours[renamed] = value
        else:
            left_over.append(name)
    missing = [name for name in expected if name not in ours]
    wrong_shape = [
        f"{name} {tuple(ours[name].shape)} instead of {tuple(expected[name].shape)}"
        for name in ours
        if ours[name].shape != expected[name].shape
    ]
    for problem, names in (("left over", left_over), ("missing", missing), ("of another shape", wrong_shape)):
        if names:
            listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise CheckpointError(f"published checkpoint {path} does not fit this network; {problem}: {listed}")
    network.load_state_dict(ours)


def _rename_published(name: str) -> str | None:
    for pattern, ours in _PUBLISHED_NAMES:
        match = re.fullmatch(pattern, name)
        if match:
            return match.expand(ours)
    return None
