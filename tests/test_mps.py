"""`--device mps` on machines without it: what is refused, and that nothing asks it for float64, which it has not."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from networks.localization import _above_mean, activation_map
from utils.errors import UserError, exit_with_one_sentence
from utils.training.distributed import choose_device, setup_distributed


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    return monkeypatch


def test_it_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match="device is 'mps' and PyTorch finds no Metal GPU here: set device to cpu"):
        choose_device("mps")


def test_it_is_taken_where_there_is_one_and_only_if_asked_for(mps):
    mps.setattr(torch.amp, "is_autocast_available", lambda kind: True)
    assert setup_distributed("mps") == torch.device("mps")
    assert choose_device("auto").type != "mps"
    mps.setattr(torch.amp, "is_autocast_available", lambda kind: kind != "mps")
    with pytest.raises(UserError, match=r"lacks too much: use 2\.5 or newer"):
        choose_device("mps")


def test_several_processes_are_refused(mps):
    mps.setattr(torch.amp, "is_autocast_available", lambda kind: True)
    mps.setenv("RANK", "0")
    mps.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="one process trains"):
        setup_distributed("mps")


def test_what_pytorch_lacks_is_said_in_one_sentence(capsys):
    text = (
        "The operator 'aten::thing' is not currently implemented for the MPS device. If you want this op, open an issue"
    )
    with pytest.raises(SystemExit) as end, exit_with_one_sentence():
        raise NotImplementedError(text)
    said = capsys.readouterr().err
    assert end.value.code == 1
    assert said.count("\n") == 1
    assert "aten::thing" in said
    assert "PYTORCH_ENABLE_MPS_FALLBACK=1" in said
    with pytest.raises(NotImplementedError), exit_with_one_sentence():
        raise NotImplementedError("a method of a base class")


class NoFloat64(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for value in tree_leaves(result):
            assert not (isinstance(value, torch.Tensor) and value.dtype == torch.float64 and value.is_mps), function
        return result


def test_the_map_of_the_object_needs_no_float64():
    with FakeTensorMode():
        maps = torch.empty(2, 8, 7, 7, device="mps")
        with NoFloat64():
            above = _above_mean(activation_map(maps), 1.0)
        with pytest.raises(AssertionError), NoFloat64():
            maps.sum(dtype=torch.float64)
    assert (above.dtype, above.device.type, above.shape) == (torch.bool, "mps", (2, 7, 7))
