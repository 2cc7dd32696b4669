"""The cache gives the same pixels as the files, whatever happens to its builders and to what it was built from."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import re
import resource
import signal
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from cases import slow_but_for
from PIL import Image
from test_imports import FILES, imports_of
from torch.utils.data import DataLoader

import train
from datasets import Augmentation, DataError, Entry, Pictures, collate, load_pixels
from utils.checkpoint import load_checkpoint
from utils.data import picture_cache
from utils.data.decoded import build_cache, fingerprint
from utils.data.picture_cache import CacheError, bytes_needed, cache_in_memory, cache_on_disk
from utils.data.pixels import shapes_of
from utils.errors import exit_with_one_sentence

pytestmark = pytest.mark.usefixtures("thin_trunk")

SIZE = 24
LOADING = {"utils.data.pixels", "utils.data.decoding"}  # what makes the pixels of a file
DRAWING = {"utils.data.demo_birds", "utils.data.demo_drawing", "utils.data.demo_species"}


@pytest.fixture
def entries(tmp_path: Path) -> list[Entry]:
    """Eight photographs of noise, larger and smaller than SIZE, one of them large enough to be decoded small."""
    generator = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    entries = []
    for number, (width, height) in enumerate([(30, 20), (20, 30), (200, 150), (24, 24), (60, 40), (9, 90), (70, 70)]):
        path = tmp_path / "pictures" / f"{number}.jpg"
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        entries.append(Entry(path, number, (1, 2, width / 2, height - 3) if number % 3 else None))
    return [*entries, Entry(5, 7, (10, 20, 200, 180))]


def decoder(entries: Sequence[Entry], size: int = SIZE):
    return lambda row: load_pixels(entries[row], size)


def in_memory(entries: Sequence[Entry], folder: Path):
    return cache_in_memory([entry.source for entry in entries], shapes_of(entries, SIZE), decoder(entries))


def on_disk(entries: Sequence[Entry], folder: Path, size: int = SIZE):
    name, digest = fingerprint(entries, size)
    sources = [entry.source for entry in entries]
    shapes = partial(shapes_of, entries, size)
    return cache_on_disk(folder / f"{name}.pictures", digest, sources, shapes, decoder(entries, size))


@pytest.mark.parametrize("build", [in_memory, on_disk])
@pytest.mark.parametrize("workers", slow_but_for([2], [0, 2]))
def test_the_same_pixels_as_without(build, workers: int, entries: list[Entry], tmp_path: Path) -> None:
    cache = build(entries, tmp_path / "cache")
    chosen = [*entries[4:], *entries[:3]]  # another order, and not all of them
    batches = []
    for pictures in (
        Pictures(chosen, image_size=SIZE, augment=Augmentation()),
        Pictures(chosen, image_size=SIZE, augment=Augmentation(), cache=cache),
    ):
        loader = DataLoader(pictures, batch_size=3, collate_fn=collate, num_workers=workers)
        batches.append(list(loader))
    for plain, cached in zip(*batches, strict=True):
        assert torch.equal(plain.images, cached.images)
        assert torch.equal(plain.augmentation, cached.augmentation)
        assert plain.labels.tolist() == cached.labels.tolist() and plain.paths == cached.paths
        assert (plain.boxes is None) == (cached.boxes is None)
    plain, cached = (Pictures(chosen, image_size=SIZE, cache=c) for c in (None, cache))
    for one, other in zip(plain, cached, strict=True):
        assert (one.box is None and other.box is None) or torch.equal(one.box, other.box)


def test_files_are_read_once(entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for build in (in_memory, on_disk):
        pictures = Pictures(entries, image_size=SIZE, cache=build(entries, tmp_path / "cache"))
        with monkeypatch.context() as patch:
            patch.setattr("datasets.load_pixels", None)
            assert len(list(pictures)) == len(entries)
    with monkeypatch.context() as patch:  # and a file that is there is used again
        patch.setattr(picture_cache, "_build", None)
        on_disk(entries, tmp_path / "cache")


@pytest.mark.parametrize("build", [in_memory, on_disk])
def test_a_process_that_is_not_forked_sees_the_same(build, entries: list[Entry], tmp_path: Path) -> None:
    cache = build(entries, tmp_path / "cache")
    written = len(pickle.dumps(cache))
    again = pickle.loads(pickle.dumps(cache))
    assert list(again) == [entry.source for entry in entries]
    assert all(torch.equal(again[entry.source][0], cache[entry.source][0]) for entry in entries)
    if build is on_disk:  # mapped anew, not copied
        assert written < bytes_needed(shapes_of(entries, SIZE)) / 2


@pytest.mark.parametrize("change", ["content", "time", "list", "box", "size", "code"])
def test_whatever_pixels_depend_on_builds_it_anew(
    change: str, entries: list[Entry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    on_disk(entries, folder)
    path = entries[0].source
    size = SIZE
    if change == "content":
        Image.new("RGB", (50, 50), (1, 2, 3)).save(path)
    elif change == "time":
        os.utime(path, (1, 1))
    elif change == "list":
        entries = entries[1:]
    elif change == "box":
        entries[1] = entries[1]._replace(box=(0, 0, 5, 5))
    elif change == "size":
        size = 32
    else:
        monkeypatch.setattr("PIL.__version__", "0.0")
    built = []
    build = picture_cache._build
    monkeypatch.setattr(picture_cache, "_build", lambda *arguments: built.append(1) or build(*arguments))
    cache = on_disk(entries, folder, size)
    assert built == [1]
    for entry in entries:
        image, box = load_pixels(entry, size)
        assert torch.equal(cache[entry.source][0], image)
        assert box is None or torch.equal(cache[entry.source][1], box)
    # What changed in place takes the old file's place; another list or size gets a file of its own.
    files = len(list(folder.glob("*.pictures")))
    assert files == (2 if change in ("list", "box", "size") else 1)


@pytest.mark.parametrize("drawn", [False, True])
def test_only_code_that_makes_pixels_builds_it_anew(
    drawn: bool, entries: list[Entry], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change to a reader of lists, to a sampler, to whatever else leaves the pixels as they are."""
    if not drawn:
        entries = [entry for entry in entries if isinstance(entry.source, Path)]
    unchanged, read_bytes = fingerprint(entries, SIZE), Path.read_bytes
    matter = set()
    for module, file in FILES.items():
        with monkeypatch.context() as patch:
            edit = {file: b"# a comment"}
            patch.setattr(Path, "read_bytes", lambda path, edit=edit: read_bytes(path) + edit.get(path.resolve(), b""))
            name, digest = fingerprint(entries, SIZE)
        assert name == unchanged[0]
        if digest != unchanged[1]:
            matter.add(module)
    assert matter == (LOADING | DRAWING if drawn else LOADING)


def test_no_code_that_makes_pixels_is_forgotten() -> None:
    """What `load_pixels` may call lies in its module or in those that it imports; sentences for errors show nowhere."""
    reached, waiting = set(), ["utils.data.pixels"]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        waiting += [name for name in imports_of(module, FILES[module]) if name in FILES and name not in reached]
    no_pixels = {"utils.data", "utils.data.errors", "utils.data.threads", "utils.errors", "utils.text"}
    assert reached - no_pixels == LOADING | DRAWING


def test_a_damaged_file_is_built_anew(entries: list[Entry], tmp_path: Path) -> None:
    on_disk(entries, tmp_path / "cache")
    (path,) = tmp_path.rglob("*.pictures")
    whole = path.read_bytes()
    for content in (b"", whole[:-1], whole + b"0", bytes(len(whole))):
        path.write_bytes(content)
        on_disk(entries, tmp_path / "cache")
        assert path.read_bytes() == whole


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_pictures_of_different_shapes_are_kept(cache: str, entries: list[Entry], tmp_path: Path) -> None:
    loading = {"image_size": SIZE, "resize_size": 30, "keep_aspect_ratio": True}
    settings = SimpleNamespace(**loading, cache=cache, dataset="folder", checkpoint_dir=str(tmp_path))
    kept = build_cache(settings, entries)
    shapes = [tuple(load_pixels(entry, 30, True)[0].shape[1:]) for entry in entries]
    assert shapes == shapes_of(entries, 30, True)
    assert shapes == [(30, 45), (45, 30), (30, 40), (30, 30), (30, 45), (120, 30), (30, 30), (30, 30)]
    again = pickle.loads(pickle.dumps(kept))  # another process, that maps the file anew
    for keys in (kept, again):
        plain, cached = (Pictures(entries, **loading, augment=Augmentation(padding=2), cache=c) for c in (None, keys))
        for one, other in zip(plain, cached, strict=True):
            assert torch.equal(one.image, other.image) and torch.equal(one.augmentation, other.augmentation)
            assert (one.box is None and other.box is None) or torch.equal(one.box, other.box)
    files = {path.name for path in tmp_path.rglob("*.pictures")}
    build_cache(SimpleNamespace(**vars(settings) | {"keep_aspect_ratio": False}), entries)
    assert len({path.name for path in tmp_path.rglob("*.pictures")} - files) == (cache == "disk")


def test_a_damaged_table_of_shapes_is_built_anew(entries: list[Entry], tmp_path: Path) -> None:
    on_disk(entries, tmp_path / "cache")
    (path,) = tmp_path.rglob("*.pictures")
    whole = path.read_bytes()
    for damaged in (whole[:40], whole[:32] + bytes(8) + whole[40:]):
        path.write_bytes(damaged)
        on_disk(entries, tmp_path / "cache")
        assert path.read_bytes() == whole


def _build_slowly(entries: list[Entry], folder: Path, seconds: float, built: Path) -> None:
    def decode(row: int):
        time.sleep(seconds)
        with built.open("a") as file:
            file.write("x")
        return load_pixels(entries[row], SIZE)

    name, digest = fingerprint(entries, SIZE)
    sources, shapes = [entry.source for entry in entries], partial(shapes_of, entries, SIZE)
    cache_on_disk(folder / f"{name}.pictures", digest, sources, shapes, decode)


def test_of_two_processes_one_builds_and_the_other_waits(entries: list[Entry], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder, built = tmp_path / "cache", tmp_path / "built"
    processes = [context.Process(target=_build_slowly, args=(entries, folder, 0.05, built)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert len(built.read_text()) == len(entries)
    assert torch.equal(on_disk(entries, folder)[5][0], load_pixels(entries[-1], SIZE)[0])
    assert not list(folder.glob("*.part"))


def test_a_killed_builder_leaves_nothing_that_is_taken_for_a_cache(entries: list[Entry], tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    folder, built = tmp_path / "cache", tmp_path / "built"
    process = context.Process(target=_build_slowly, args=(entries, folder, 0.2, built))
    process.start()
    deadline = time.monotonic() + 60
    while not (built.exists() and built.stat().st_size > 2) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert list(folder.glob("*.part")) and not list(folder.glob("*.pictures"))
    cache = on_disk(entries, folder)
    assert all(torch.equal(cache[entry.source][0], load_pixels(entry, SIZE)[0]) for entry in entries)
    assert not list(folder.glob("*.part"))


def _limited(entries: list[Entry], folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    with exit_with_one_sentence():
        on_disk(entries, folder)


def test_a_full_disk_is_said_and_leaves_nothing(entries: list[Entry], tmp_path: Path, capfd, monkeypatch) -> None:
    folder = tmp_path / "cache"
    process = multiprocessing.get_context("fork").Process(target=_limited, args=(entries, folder))
    process.start()
    process.join(60)
    assert process.exitcode == 2
    assert re.fullmatch(
        r"error: \S+\.pictures could not be written \(File too large\): make room.*\n", capfd.readouterr().err
    )
    assert [path.suffix for path in folder.iterdir()] == [".lock"]
    monkeypatch.setattr(picture_cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(CacheError, match=r"needs 0\.0 GB and 0\.0 GB of the disk are free: make room"):
        on_disk(entries, folder)


def test_too_little_memory_is_said_before_anything_is_decoded(
    entries: list[Entry], tmp_path: Path, monkeypatch
) -> None:
    needed = bytes_needed(shapes_of(entries, SIZE))
    monkeypatch.setattr(picture_cache, "free_memory", lambda: needed)
    in_memory(entries, tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        CacheError, match=r"8 pictures of 24 x 24 pixels in 2 processes need .* set cache to disk or none"
    ):
        cache_in_memory([entry.source for entry in entries], shapes_of(entries, SIZE), None)
    monkeypatch.undo()
    assert picture_cache.free_memory() > 1e6


def test_too_little_memory_that_processes_share_is_said(entries: list[Entry], tmp_path: Path, monkeypatch) -> None:
    """Where they are not forked from the one that has the pictures."""

    def refuse(values: torch.Tensor) -> None:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    monkeypatch.setattr(picture_cache.multiprocessing, "get_start_method", lambda: "forkserver")
    monkeypatch.setattr(torch.Tensor, "share_memory_", refuse)
    with pytest.raises(CacheError, match=r"8 pictures need 0\.0 GB .*\(28\)\): set cache to disk or none"):
        in_memory(entries, tmp_path)


@pytest.mark.parametrize("build", [in_memory, on_disk])
def test_an_unreadable_picture_is_named(build, entries: list[Entry], tmp_path: Path) -> None:
    entries[3].source.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"3\.jpg cannot be read as a picture"):
        build(entries, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.p[ai]*[st]"))


def test_a_run_is_the_same_with_any_cache_and_may_change_it(tiny_run, tmp_path: Path) -> None:
    runs = {}
    for cache, workers in (("none", "0"), ("ram", "1"), ("disk", "1")):
        options = ("--epochs", "2", "--workers", workers, "--prefetch", "3")
        train.main(tiny_run(tmp_path / cache, *options, "--cache", cache))
        runs[cache] = load_checkpoint(tmp_path / cache / "folder-resnet" / "last.pth")["network"]
    for cache in ("ram", "disk"):
        assert all(torch.equal(runs["none"][name], value) for name, value in runs[cache].items())
    assert len(list((tmp_path / "disk" / "cache").glob("folder-96-*.pictures"))) == 1
    train.main(tiny_run(tmp_path / "ram", "--epochs", "2", "--cache", "none"))  # is not refused as another run


def changed_on_disk(entries: list[Entry], folder: Path) -> Path:
    """The file of a cache, the last picture of which is not what was written there."""
    on_disk(entries, folder)
    (path,) = folder.rglob("*.pictures")
    content = bytearray(path.read_bytes())
    content[-100:] = bytes(100)
    path.write_bytes(content)
    return path


def test_changed_pixels_are_not_trained_on(entries: list[Entry], tmp_path: Path) -> None:
    changed_on_disk(entries, tmp_path)
    cache = on_disk(entries, tmp_path)
    assert torch.equal(cache[entries[0].source][0], load_pixels(entries[0], SIZE)[0])
    with pytest.raises(CacheError, match="damaged.*remove it"):
        cache[entries[-1].source]


def test_a_worker_reports_changed_pixels_in_one_sentence(entries: list[Entry], tmp_path: Path) -> None:
    path = changed_on_disk(entries, tmp_path)
    pictures = Pictures(entries, image_size=SIZE)
    pictures.cache = on_disk(entries, tmp_path)
    with pytest.raises(CacheError) as raised:
        list(DataLoader(pictures, num_workers=1, collate_fn=collate))
    assert str(raised.value) == f"{path} is damaged, it is not what was written there: remove it, and start again"


def test_a_pipe_in_its_place_is_refused(entries: list[Entry], tmp_path: Path) -> None:
    on_disk(entries, tmp_path)
    (path,) = tmp_path.rglob("*.pictures")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheError, match="not a file"):
        on_disk(entries, tmp_path)
