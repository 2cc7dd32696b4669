"""Weights to start a trunk from: by torchvision's names for them, or from files in the forms that are about."""

from __future__ import annotations

import contextlib
import warnings
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from utils.errors import UserError, is_out_of_memory

SUFFIXES = (".pth", ".pt", ".safetensors")
# Where files keep the weights beside other things; ours an average, where there is one, that is the run's result
WRAPPED_AS = ("state_dict", "model", "ema", "network")
PREFIXES = ("module.", "backbone.", "trunk.")  # of parameter names, one behind the other


def is_weights_file(pretrained: str) -> bool:
    """Tell a file of weights from the name of torchvision weights."""
    return Path(pretrained).suffix in SUFFIXES or _at_home(pretrained).is_file()


def _at_home(path: str | Path) -> Path:
    """The path with `~` for a home that there is."""
    with contextlib.suppress(RuntimeError):
        return Path(path).expanduser()
    return Path(path)


def torchvision_weights(name: str, weights_name: str) -> torchvision.models.WeightsEnum:
    """Return the weights of that name for a network. Raises UserError with the known ones."""
    choices = torchvision.models.get_model_weights(name)
    try:
        return choices[weights_name.rpartition(".")[2]]
    except KeyError:
        raise UserError(
            f"unknown pretrained weights {weights_name!r} for {name}: give a .pth file or one of "
            f"{', '.join(choices.__members__)}"
        ) from None


def load_trunk_weights(trunk: nn.Module, path: str | Path, *, unused: str = "fc.") -> None:
    """Load a file of weights with torchvision's parameter names into a network, in any floating type.

    They are plain or under `state_dict`, `model` or, in our own checkpoints, `ema` or `network`; their names may begin
    with `module.`, `backbone.` and `trunk.`, and then only those that do are the trunk's. `unused`, the classifier's,
    are left out; of statistics per pass, those of whole pictures are taken. Raises UserError without the file, and
    where it does not hold exactly this trunk's weights.
    """
    path = _at_home(path)
    state = _of_pictures(_without_prefixes(read_weights(path)))
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    own = trunk.state_dict()
    for name, value in state.items():
        is_weight = name in own and own[name].is_floating_point()  # not an index or a counter
        if is_weight and not (value.is_floating_point() and value.isfinite().all()):
            raise UserError(f"pretrained weights {path} do not fit: {name} is not all finite numbers with a fraction")
    # Old files (torch < 0.4.1) lack these counters, which nothing here reads.
    counters = {name: value for name, value in own.items() if name.endswith("num_batches_tracked")}
    try:
        trunk.load_state_dict(counters | state, strict=True)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"pretrained weights {path} do not fit this backbone: {reason[:300]}") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return a file's tensors by name, out of what they are wrapped in. Raises UserError where there are none."""
    if not path.is_file():
        raise UserError(f"pretrained weights {path} are not there: give the path of a .pth file")
    content = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    state = content
    for name in WRAPPED_AS:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            state = content[name]
            break
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, Tensor) for name, value in state.items()
    ):
        raise UserError(f"pretrained weights {path} hold no state dict: a dict of tensors by name was expected")
    return state


def _read_torch(path: Path) -> object:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # what the bytes of other files make an unpickler raise is listed nowhere
        if is_out_of_memory(error):
            raise
        kind = type(error).__name__
        raise UserError(f"pretrained weights {path} are not a plain file of tensors ({kind})") from None


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(
            f"pretrained weights {path} need the package safetensors: pip install safetensors, or give a .pth file"
        ) from None
    try:
        return load_file(path)
    except OSError:
        raise
    except Exception as error:
        kind = type(error).__name__
        raise UserError(f"pretrained weights {path} are not a plain file of tensors ({kind})") from None


def _of_pictures(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the state with one set of statistics for a batch norm that has them per pass: see `batch_norm`."""
    apart = {name.removesuffix("passes") for name in state if name.endswith(".passes")}
    one = {name: value for name, value in state.items() if not name.endswith(".passes")}
    for norm in apart:
        one |= {f"{norm}{which}": state[f"{norm}{which}"][0] for which in ("running_mean", "running_var")}
    return one


def _without_prefixes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters without what their names begin with; only those that do where some do."""
    for prefix in PREFIXES:
        those = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
        state = those or state
    return state
