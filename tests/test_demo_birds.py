"""The drawn birds: the same again each time, alike in all but the marks, and where their boxes are."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pytest
import torch

from datasets import Catalogue, Entry, Pictures, read_catalogue
from utils.data import demo_birds
from utils.data.augmentation import Augmentation


@pytest.fixture(scope="module")
def demo() -> Catalogue:
    return read_catalogue("demo", None)


def test_demo_catalogue(demo: Catalogue) -> None:
    species = len(demo_birds.SPECIES)
    assert 8 <= species <= 12 and len(set(demo.class_names)) == species
    assert Counter(entry.label for entry in demo.train) == dict.fromkeys(range(species), demo_birds.DEMO_TRAIN)
    assert Counter(entry.label for entry in demo.test) == dict.fromkeys(range(species), demo_birds.DEMO_TEST)
    assert not {entry.source for entry in demo.train} & {entry.source for entry in demo.test}
    assert demo.has_boxes and demo == read_catalogue("demo", None, seed=9)
    boxes = np.array([entry.box for entry in demo.train + demo.test])
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1) / demo_birds.DEMO_SIZE
    assert boxes.min() >= 0 and boxes.max() <= demo_birds.DEMO_SIZE
    assert sides.min() > 0.55 and sides.max() <= 0.91


def test_demo_species_share_every_mark() -> None:
    """No single mark names a species, and no two species share all of them."""
    marks = [species[1:] for species in demo_birds.SPECIES]
    assert len(set(marks)) == len(marks)
    shared = [Counter(column) for column in zip(*marks, strict=True)]
    alone = [value for column in shared for value, count in column.items() if count == 1]
    assert alone == ["straight", "tipped"]


def test_demo_is_drawn_the_same_again(demo: Catalogue) -> None:
    def checksum() -> str:
        pictures = (
            demo_birds.draw_demo_picture(entry.source).tobytes() for entry in demo.train[::40] + demo.test[::40]
        )
        return hashlib.sha256(b"".join(pictures)).hexdigest()

    state = torch.get_rng_state()
    assert checksum() == checksum()
    assert torch.equal(torch.get_rng_state(), state)
    first, second = (demo_birds.draw_demo_picture(number) for number in (0, 1))
    assert first.tobytes() != second.tobytes() and first.size == (demo_birds.DEMO_SIZE,) * 2


def test_demo_boxes_are_the_birds_extents(demo: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures without their birds differ from them nowhere but in the box, and up to its edges."""
    entries = (demo.train + demo.test)[::17]
    drawn = [demo_birds.draw_demo_picture(entry.source) for entry in entries]
    paint = demo_birds.paint
    monkeypatch.setattr(demo_birds, "paint", lambda *args, light=None: None if light is not None else paint(*args))
    for entry, picture in zip(entries, drawn, strict=True):
        bare = demo_birds.draw_demo_picture(entry.source)
        difference = np.abs(np.asarray(picture, dtype=int) - np.asarray(bare, dtype=int)).max(axis=2)
        rows, columns = np.nonzero(difference)
        extents = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        assert extents == pytest.approx(entry.box, abs=1.3)  # whole pixels, and a soft edge


def test_demo_mean_colour_says_little(demo: Catalogue) -> None:
    def colours(entries: list[Entry]) -> tuple[np.ndarray, np.ndarray]:
        means = [np.asarray(demo_birds.draw_demo_picture(entry.source)).mean(axis=(0, 1)) for entry in entries]
        return np.array(means), np.array([entry.label for entry in entries])

    train, train_labels = colours(demo.train[::8])
    test, test_labels = colours(demo.test[::4])
    classes = np.stack([train[train_labels == label].mean(axis=0) for label in range(len(demo.class_names))])
    answers = ((test[:, None] - classes) ** 2).sum(axis=2).argmin(axis=1)
    assert (answers == test_labels).mean() < 2 / len(demo.class_names)


def test_demo_samples(demo: Catalogue) -> None:
    sample = Pictures(demo.train, image_size=64, augment=Augmentation())[5, 1]
    assert sample.image.shape == (3, 64, 64) and sample.path == "demo/0005"
    assert (sample.box[2:] > sample.box[:2]).all()
