"""What is read of a run's settings to load its data; `config.Settings` has all of it, and says what each means."""

from __future__ import annotations

from typing import Protocol


class DataSettings(Protocol):
    """The settings of `datasets`; types as in `config.Settings`."""

    dataset: str
    data_root: str | None
    classes: tuple[str, ...] | None
    class_level: int | None
    labels: str | None
    validation_labels: str | None
    test_labels: str | None
    image_column: str | None
    label_column: str | None
    split_column: str | None
    aircraft_level: str
    test_fraction: float
    seed: int
    on_bad_image: str
    select_on: str
    validation: float
    image_size: int
    resize_size: int
    keep_aspect_ratio: bool
    padding: int
    flip: float
    brightness: float
    contrast: float
    saturation: float
    rotation: float
    erasing: float
    crop_scale: float
    auto_augment: str
    batch_size: int
    evaluation_batch_size: int
    images_per_class: int
    workers: int
    device: str
    prefetch: int
    picture_memory: float
    cache: str
    checkpoint_dir: str
