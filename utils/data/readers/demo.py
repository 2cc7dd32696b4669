"""Birds drawn by `utils.data.demo_birds`, each species' first pictures for training."""

from __future__ import annotations

from utils.data import demo_birds
from utils.data.catalogue import Catalogue, Entry, Source


def read(_: Source) -> Catalogue:
    per_species = demo_birds.DEMO_TRAIN + demo_birds.DEMO_TEST
    entries = [
        Entry(number, number // per_species, demo_birds.demo_scene(number).box)
        for number in range(per_species * len(demo_birds.SPECIES))
    ]
    return Catalogue(
        train=[entry for entry in entries if entry.source % per_species < demo_birds.DEMO_TRAIN],
        test=[entry for entry in entries if entry.source % per_species >= demo_birds.DEMO_TRAIN],
        class_names=[species.name for species in demo_birds.SPECIES],
    )
