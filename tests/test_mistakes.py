"""What test.py shows of single images: its mistakes, and where they lie in TensorBoard's projector."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import config
from datasets import evaluation_loader, load_batch, load_catalogue, loading_of
from utils.reporting.embeddings import project
from utils.reporting.mistakes import draw_mistakes, mistaken_batches
from utils.training.building import Trained, build_from_settings, make_ready

pytestmark = pytest.mark.usefixtures("thin_trunk")

NAMES = ["blue", "caf\udce9 of\none", "red"]  # a folder's name in Latin-1


@pytest.fixture(scope="module")
def trained(tiny_run, tmp_path_factory) -> Trained:
    torch.manual_seed(0)
    settings = config.parse_settings(tiny_run(tmp_path_factory.mktemp("runs"), model="sgkrl"))
    network = build_from_settings(settings, 3, load_weights=False)
    return make_ready(network, settings, {"class_names": NAMES, "epoch": 1})


@pytest.mark.parametrize("predicted", range(3))
def test_a_mistake_is_the_one_that_was_counted(trained: Trained, predicted: int) -> None:
    """A prediction may depend on the batch, and these are other batches."""
    settings = trained.settings
    catalogue, _ = load_catalogue(settings)
    judged = [(entry, predicted, 0.625) for entry in catalogue.test[:3]]
    batches = mistaken_batches(
        judged, lambda entries: load_batch(entries, settings), loading=loading_of(settings), step=2
    )
    mistakes = draw_mistakes(trained, batches)
    assert [(mistake.predicted, mistake.probability) for mistake in mistakes] == [(NAMES[predicted], 0.625)] * 3
    assert [mistake.true for mistake in mistakes] == [NAMES[entry.label] for entry, *_ in judged]
    assert [Path(mistake.picture) for mistake in mistakes] == [entry.source for entry, *_ in judged]


def test_the_projector_shows_objects_however_many_parts_are_looked_at(trained: Trained, monkeypatch) -> None:
    """With an early exit there may be as many windows as images, and no pass over the picture before the object's."""
    network, objects = trained.network, []

    def forward(images: torch.Tensor, **_) -> None:
        objects.append(network.backbone(2 * images, kind="object").embedding)
        network.backbone(3 * images, kind="part")

    monkeypatch.setattr(network, "forward", forward)
    catalogue, _ = load_catalogue(trained.settings)
    shown = project(trained, evaluation_loader(trained.settings, catalogue.test), NAMES)
    assert torch.equal(shown["mat"], torch.cat(objects))


def test_classes_of_any_name_reach_the_projector(trained: Trained) -> None:
    catalogue, _ = load_catalogue(trained.settings)
    shown = project(trained, evaluation_loader(trained.settings, catalogue.test), NAMES)
    assert len(shown["metadata"]) == len(shown["mat"]) == len(catalogue.test)
    assert all(name.encode() and name.isprintable() for name in shown["metadata"])
