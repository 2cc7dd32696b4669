"""How fast pictures reach the network: `python benchmarks/input.py --data_root CUB_200_2011 --image_size 448`.

Interleaved in one process, by number of loader processes (0: in the main one, a single thread):

    plain       what published code does: Pillow's open and convert, torchvision's Resize, ColorJitter,
                RandomHorizontalFlip, ToTensor and Normalize, and PyTorch's own batches of float32
    files       this project's training loader without a cache
    ram, disk   the same with decoded pictures in memory, or in one mapped file

and what bounds them, on one thread: `decode`, Pillow's decoder alone on the same files, and `device`, what is left to
the device (augmentation and normalisation of the loader's uint8 batches) where `plain` has finished images.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from measuring import interleaved, machine, ratio, write_json
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from config import Settings, complete
from datasets import Entry, read_catalogue, training_loader
from utils.data.decoded import build_cache
from utils.data.image_batches import NORMALIZATIONS
from utils.errors import UserError, exit_with_one_sentence
from utils.training.distributed import choose_device
from utils.training.execution import Execution


class PlainPictures(Dataset):
    """The pictures as published code loads them."""

    def __init__(self, entries: Sequence[Entry], settings: Settings) -> None:
        self.entries = entries
        self.transform = transforms.Compose(
            [
                transforms.Resize((settings.image_size, settings.image_size)),
                transforms.RandomHorizontalFlip(settings.flip),
                transforms.ColorJitter(settings.brightness, settings.contrast),
                transforms.ToTensor(),
                transforms.Normalize(*NORMALIZATIONS["imagenet"]),
            ]
        )

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        with Image.open(self.entries[index].source) as picture:
            return self.transform(picture.convert("RGB")), self.entries[index].label


def main(arguments: Sequence[str] | None = None) -> dict:
    options = parse_arguments(arguments)
    torch.set_num_threads(1)
    device = choose_device(options.device)
    with tempfile.TemporaryDirectory(prefix="input-") as folder:
        entries = chosen_entries(options, Path(folder) / "pictures")
        settings = complete(
            dataclasses.replace(
                Settings(),
                dataset="folder",
                data_root=folder,
                checkpoint_dir=folder,
                input_size=96,
                image_size=options.image_size,
                batch_size=options.batch_size,
                pretrained="none",
            )
        )
        caches = {name: build_cache(dataclasses.replace(settings, cache=name), entries) for name in ("ram", "disk")}
        stored = [entry.source.stat().st_size for entry in entries]
        report = {
            "options": {
                name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()
            },
            "machine": machine(device),
            "pictures": {
                "count": len(entries),
                "mean_bytes": sum(stored) / len(stored),
                "mean_size": mean_size(entries),
            },
            "measurements": [],
        }
        print(as_heading(report), flush=True)
        for workers in options.workers:
            here = dataclasses.replace(settings, workers=workers)
            variants = {"plain": partial(run_through, plain_loader(entries, here))}
            for name, cache in {"files": None, **caches}.items():
                loader = training_loader(here, entries)
                loader.dataset.cache = cache
                variants[name] = partial(run_through, loader)
            if workers == 0:
                variants |= bounds(entries, loader, Execution(device))
            # Waiting for other processes of a busy machine is not the loader's; with workers, waiting is part of it.
            results = interleaved(variants, options.rounds, device, "wall" if workers or options.wall else "cpu")
            rows = {
                name: {"images_per_second": len(entries) / result["median"], "ratio": ratio(results["plain"], result)}
                for name, result in results.items()
            }
            report["measurements"].append({"workers": workers, "rows": rows, "timings": results})
            print(as_table(workers, rows), flush=True)
    if options.json is not None:
        write_json(options.json, report)
    return report


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Decoded and augmented images per second, against published practice.")
    parser.add_argument("--data_root", type=Path, help="a CUB-200-2011 folder (default: made photographs, 500 x 375)")
    parser.add_argument("--image_size", type=int, default=448)
    parser.add_argument("--images", type=int, default=256, help="how many of the pictures (default: 256)")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=5, help="medians of so many (default: 5)")
    parser.add_argument("--wall", action="store_true", help="wall clock without workers, too, not processor time")
    parser.add_argument("--device", default="auto", help="where augmentation and normalisation are measured")
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args(arguments)


def chosen_entries(options: argparse.Namespace, folder: Path) -> list[Entry]:
    """Return pictures spread over the data set, in whole batches."""
    count = max(options.images // options.batch_size, 1) * options.batch_size
    if options.data_root is None:
        return made_photographs(folder, count)
    catalogue = read_catalogue("cub", options.data_root)
    entries = catalogue.train + catalogue.test
    if len(entries) < count:
        raise UserError(f"{options.data_root} has {len(entries)} pictures; give fewer --images than {count}")
    return [entries[position] for position in np.linspace(0, len(entries) - 1, count).astype(int)]


def made_photographs(folder: Path, count: int) -> list[Entry]:
    """Write JPEGs of 500 x 375 pixels with detail at every scale, of about the bytes of CUB's photographs."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    entries = []
    for number in range(count):
        pixels = np.zeros((375, 500, 3))
        for scale in (2, 4, 8, 16, 64, 256):
            shape = (-(-375 // scale), -(-500 // scale), 3)
            layer = Image.fromarray(generator.integers(0, 256, shape, dtype=np.uint8))
            pixels += (np.asarray(layer.resize((500, 375), Image.Resampling.BICUBIC)) - 127.5) * scale**0.5
        pixels = 127.5 + 60 * (pixels - pixels.mean()) / pixels.std()
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        entries.append(Entry(path, number % 10, (50.0, 50.0, 400.0, 300.0)))
    return entries


def mean_size(entries: Sequence[Entry]) -> list[int]:
    sizes = []
    for entry in entries:
        with Image.open(entry.source) as picture:
            sizes.append(picture.size)
    return np.mean(sizes, axis=0).round().astype(int).tolist()


def plain_loader(entries: Sequence[Entry], settings: Settings) -> DataLoader:
    return DataLoader(
        PlainPictures(entries, settings),
        batch_size=settings.batch_size,
        shuffle=True,
        num_workers=settings.workers,
        persistent_workers=settings.workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def run_through(batches: DataLoader) -> None:
    for _ in batches:
        pass


def bounds(entries: Sequence[Entry], loader: DataLoader, execution: Execution) -> dict[str, Callable[[], None]]:
    batches = list(loader)

    def decode() -> None:
        for entry in entries:
            with Image.open(entry.source) as picture:
                picture.load()

    def device() -> None:
        for batch in batches:
            execution.images(batch.images, batch.augmentation)

    return {"decode": decode, "device": device}


def as_heading(report: dict) -> str:
    where, pictures = report["machine"], report["pictures"]
    width, height = pictures["mean_size"]
    return (
        f"{where['processor']}, {where['device']}, torch {where['torch']}, {where['date']}, "
        f"load {where['load_average']}\n"
        f"{pictures['count']} JPEGs, {width} x {height} pixels and {pictures['mean_bytes'] / 1000:.0f} kB on average, "
        f"to {report['options']['image_size']} pixels"
    )


def as_table(workers: int, rows: dict[str, dict[str, float]]) -> str:
    lines = [f"\n{workers} workers{'':<8}images/s   x plain"]
    lines += [f"  {name:<12}{row['images_per_second']:>12.0f}{row['ratio']:>10.1f}" for name, row in rows.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
