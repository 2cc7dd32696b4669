"""Checkpoints: written so that a file is there whole or not at all, and read without running code from it."""

from __future__ import annotations

import contextlib
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from networks.system import System
from utils.checkpoint_content import NETWORK, TRAINING, problem_of
from utils.errors import UserError, is_out_of_memory, tells_of_dead_loader
from utils.files import SavingError, atomic_write, sync_folder
from utils.text import first_few

BEGIN_ANEW = "start anew with --fresh, which moves the run aside"
# Where published code puts the weights in a file, and those of a classifier that it keeps apart
WRAPPED_AS = ("model_state_dict", "net_state_dict", "state_dict", "net")
CLASSIFIER_AS = "metric"


class CheckpointError(UserError):
    """A checkpoint that cannot be used, said in one sentence that names the file."""


def save_checkpoint(path: str | Path, content: Mapping[str, object]) -> None:
    """Write `content` to `path`, through a temporary file beside it that replaces it once it is on the disk.

    Raises SavingError where that is impossible.
    """
    try:
        with atomic_write(path) as file:
            torch.save(dict(content), file)
    except RuntimeError as error:  # torch's own writer turns whatever happens in it into one
        cause: BaseException = error
        while cause.__context__ is not None:
            cause = cause.__context__
        if isinstance(cause, OSError):
            raise SavingError(path, cause) from error
        if cause is not error or is_out_of_memory(error) or tells_of_dead_loader(error):
            raise cause from None  # a Ctrl-C, or the news that a process which loads pictures has died
        raise SavingError(path, str(error).splitlines()[0]) from error


def save_last(folder: Path, content: Mapping[str, object]) -> None:
    """Write `last.pth` of a run's folder and keep the one before it as `previous.pth`. Raises SavingError."""
    last = folder / "last.pth"
    waiting = folder / "next.pth"
    save_checkpoint(waiting, content)
    if last.exists():
        last.replace(folder / "previous.pth")
    waiting.replace(last)
    sync_folder(folder)


def load_last(
    folder: Path, *, set_aside: bool = False, load: Callable[[Path], dict] | None = None
) -> tuple[Path, dict] | None:
    """Read the newest whole checkpoint of a run's folder: its path and content, or None where there is none yet.

    A damaged one is passed over with a warning on standard error, and with `set_aside` renamed to `*.damaged`, so that
    the next `save_last` does not keep it in place of a whole one. `load` reads a file, `load_checkpoint` where it is
    None. Raises CheckpointError where none can be read, with what to do then.
    """
    # next.pth is there, and whole, only where a run was killed between the renamings of `save_last`.
    paths = [folder / name for name in ("last.pth", "next.pth", "previous.pth")]
    paths = [path for path in paths if path.exists()]
    while paths:
        path, *paths = paths
        try:
            return path, (load or load_checkpoint)(path)
        except CheckpointError as error:
            if not paths:
                remedy = f"put a whole one in its place, or {BEGIN_ANEW}"
                raise CheckpointError(f"{error}: {remedy}") from None
            print(f"warning: {error}; going on from {paths[0]} instead", file=sys.stderr, flush=True)
            if set_aside:
                path.replace(path.with_name(path.name + ".damaged"))
    return None


def load_run(path: str | Path, content: dict | None = None) -> dict:
    """Read a checkpoint that train.py wrote, best.pth or last.pth. Raises CheckpointError for any other file.

    `content`: what `load_checkpoint` has read of it already.
    """
    content = load_checkpoint(path) if content is None else content
    if (problem := problem_of(content, NETWORK)) is not None:
        raise CheckpointError(f"{path} is no whole checkpoint of train.py: {problem}; give best.pth or last.pth")
    return content


def load_to_continue(path: str | Path) -> dict:
    """Read a checkpoint that training can go on from. Raises CheckpointError for any other file."""
    content = load_checkpoint(path)
    if (problem := problem_of(content, NETWORK | TRAINING)) is not None:
        raise CheckpointError(f"{path} is no checkpoint to go on from ({problem})")
    return content


@contextlib.contextmanager
def fits(path: Path, remedy: str) -> Iterator[None]:
    """Raise CheckpointError where a checkpoint's state does not fit what it is loaded into in the block."""
    try:
        yield
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError) as error:  # PyTorch's, for a state dict
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{path} does not fit the network of its settings ({reason[:300]}): {remedy}") from error


def load_checkpoint(path: str | Path) -> dict:
    """Read a checkpoint into CPU memory; only tensors and plain values are accepted. Raises CheckpointError.

    One of a run is read whole a second time for the checksums that `torch.save` has put beside every tensor, and which
    `torch.load` does not look at.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path}: give the path of a file such as best.pth")
    try:
        kind = _kind_of_program(path)
        if kind is not None:
            raise CheckpointError(f"checkpoint {path} is refused: it is {kind}; give best.pth or last.pth of a run")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below
            content = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(content, dict) and "settings" in content and not _has_its_checksums(path):
            raise CheckpointError(f"checkpoint {path} is refused: it is damaged, its checksums do not agree")
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error}") from None
    except Exception as error:  # in a damaged file torch stumbles over whatever it meets
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"checkpoint {path} is refused: it is damaged, or holds more than tensors") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"checkpoint {path} holds a {type(content).__name__}; expected what train.py writes")
    return content


# Archives of torch that hold a program beside its weights, by the end of a file's name that only they have
PROGRAMS = {
    "/constants.pkl": "a program of TorchScript",
    "models/model.json": "a program of torch.export",
    "serialized_exported_program.json": "a program of torch.export",
}


def _kind_of_program(path: Path) -> str | None:
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    return next((kind for end, kind in PROGRAMS.items() if any(name.endswith(end) for name in names)), None)


def _has_its_checksums(path: Path) -> bool:
    """Whether each file in torch's archive is as its CRC-32 says; a file in torch's older form has none."""
    if not zipfile.is_zipfile(path):
        return True
    with zipfile.ZipFile(path) as archive:
        return archive.testzip() is None


def load_published(network: System, path: str | Path, content: dict | None = None) -> None:
    """Load a checkpoint of a system's published code into a network of that system, such as `sgkrl_published`.

    Everything has to fit: raises CheckpointError naming what is missing, left over or of another shape, and for a
    system whose published files are not known. Exceptions are the trunk's `fc` where it is unused, the system's
    `absent_when_published`, which may stand beside the weights, and the counters of batch norms, which nothing reads
    and files of PyTorch 0.4.0 and older lack. `content`: what `load_checkpoint` has read of the file already.
    """
    names, published = network.published_names, {ours: theirs for theirs, ours in network.published_names.items()}
    if not names:
        raise CheckpointError(f"{path}: no published checkpoints are known of this model; choose another one")
    content = load_checkpoint(path) if content is None else content
    state = next((content[name] for name in WRAPPED_AS if name in content), content)
    if not _holds_tensors_by_name(state):
        raise CheckpointError(
            f"{path} is no published checkpoint: it holds no tensors by name, nor such under {', '.join(WRAPPED_AS)}"
        )
    if isinstance(classifier := content.get(CLASSIFIER_AS), dict):
        state = {**state, **{n: v for n, v in classifier.items() if isinstance(n, str) and isinstance(v, Tensor)}}
    beside = {published.get(name) for name in network.absent_when_published} & content.keys()
    state = {**state, **{name: content[name] for name in beside if isinstance(content[name], Tensor)}}
    # A part that was spread over GPUs by itself has the prefix behind its own name.
    state = {".".join(part for part in name.split(".") if part != "module"): value for name, value in state.items()}
    unused = tuple(f"{theirs}fc." for theirs, ours in names.items() if ours == "backbone.trunk.")
    unused = tuple(name for name in unused if name not in names)  # a system may classify with the trunk's own
    state = {name: value for name, value in state.items() if not name.startswith(unused)}
    expected = network.state_dict()
    optional = {name for name in expected if name.endswith("num_batches_tracked")} | {*network.absent_when_published}
    published_name = {renamed: name for name in state if (renamed := _renamed(name, names)) in expected}
    known = {*published_name, *optional}
    for ours, name in published_name.items():  # a 1x1 convolution of a vector is a linear layer
        if state[name].shape == (*expected[ours].shape, 1, 1):
            state[name] = state[name].flatten(1)
    problems = {
        "left over": sorted(state.keys() - published_name.values()),
        "missing": [_renamed(name, published) or name for name in expected if name not in known],
        "of another shape": [
            f"{name} {tuple(state[name].shape)} instead of {tuple(expected[ours].shape)}"
            for ours, name in published_name.items()
            if state[name].shape != expected[ours].shape
        ],
    }
    if any(problems.values()):
        listed = "; ".join(f"{problem}: {first_few(found, 5)}" for problem, found in problems.items() if found)
        raise CheckpointError(
            f"published checkpoint {path} does not fit this network (SG-KRL's fit sgkrl_published); {listed}"
        )
    found = {ours: state[name] for ours, name in published_name.items()}
    network.load_state_dict({name: expected[name] for name in optional} | found)


def _holds_tensors_by_name(state: object) -> bool:
    return isinstance(state, dict) and all(isinstance(n, str) and isinstance(v, Tensor) for n, v in state.items())


def _renamed(name: str, beginnings: Mapping[str, str]) -> str | None:
    """Return a parameter's name with its beginning replaced, None where it has none of these beginnings."""
    for old, new in beginnings.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return None
