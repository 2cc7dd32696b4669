"""Do the fast settings see the same? Boxes, windows and predictions on real pictures, against plain float32.

    python benchmarks/agreement.py --checkpoint checkpoint/cub-sgkrl/best.pth
    python benchmarks/agreement.py --dataset cub --data_root DIR     # settings as for train.py: nothing trained but
                                                                     # the backbone's ImageNet weights

Every test picture (or `--images` of them, evenly spread) goes through the network in float32 with its batch norms and
in the NCHW layout, and through folded copies in channels_last, in float32 and in bf16.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import machine, write_json
from torch import Tensor
from tqdm import tqdm

from config import parse_settings, rebuilt
from datasets import evaluation_loader, load_catalogue
from networks.folding import fold_batch_norm
from utils.checkpoint import load_run
from utils.errors import exit_with_one_sentence
from utils.reporting.metrics import inclusive_to_edges, paired_box_iou
from utils.training.averaging import weights_of
from utils.training.building import build_from_settings
from utils.training.distributed import choose_device
from utils.training.execution import Execution
from utils.training.seeding import seed_everything


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description="Agreement of the fast settings with plain float32.")
    parser.add_argument("--checkpoint", type=Path, help="of a run; without it: settings of train.py, nothing trained")
    parser.add_argument("--images", type=int, default=0, help="so many test pictures, evenly spread (default: all)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--data_root", help="with --checkpoint: where the data set lies on this machine")
    options, others = parser.parse_known_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    place = {"data_root": options.data_root} if options.data_root else {}
    if options.checkpoint is not None:
        saved = load_run(options.checkpoint)
        settings = rebuilt(saved["settings"], **place)
    else:
        saved = None
        settings = parse_settings([*others, *(word for name, value in place.items() for word in (f"--{name}", value))])
    seed_everything(settings.seed)
    catalogue, _ = load_catalogue(settings)
    entries = catalogue.test
    if 0 < options.images < len(entries):
        entries = [entries[i] for i in torch.linspace(0, len(entries) - 1, options.images).long().tolist()]
    plain = build_from_settings(settings, len(catalogue.class_names), load_weights=saved is None)
    if saved is not None:
        plain.load_state_dict(weights_of(saved, None, options.checkpoint)[0])  # as test.py and predict.py do
    device = choose_device(settings.device)
    plain = plain.to(device).eval()
    folded = fold_batch_norm(plain).to(memory_format=torch.channels_last)
    scale = {"normalization": settings.normalization}
    reference = Execution(device, "float32", channels_last=False, **scale)
    ways = {f"folded, channels_last, {name}": Execution(device, name, **scale) for name in ("float32", "bf16")}
    agreements: dict[str, list[dict[str, Tensor]]] = {name: [] for name in ways}
    for batch in tqdm(evaluation_loader(settings, entries), disable=None):
        expected = outcome(plain, batch.images, reference)
        for name, execution in ways.items():
            agreements[name].append(agreement(outcome(folded, batch.images, execution), expected))
    figures = {
        name: {
            key: torch.cat([batch[key].double() for batch in batches if key in batch]).mean().item()
            for key in dict.fromkeys(key for batch in batches for key in batch)
        }
        for name, batches in agreements.items()
    }
    print(f"{len(entries)} test pictures of {settings.dataset}, {settings.model}, {settings.input_size} px, ", end="")
    print(f"{options.checkpoint or 'nothing trained'}; against float32, NCHW, not folded")
    for name, values in figures.items():
        print(f"{name}: " + ", ".join(f"{key} {value:.2%}" for key, value in values.items()))
    report = {"machine": machine(device), "images": len(entries), "settings": dataclasses.asdict(settings)}
    report |= {"checkpoint": str(options.checkpoint), "agreement": figures}
    if options.json is not None:
        write_json(options.json, report)
    return report


def outcome(network: torch.nn.Module, images: Tensor, execution: Execution) -> dict[str, Tensor | None]:
    with execution.autocast():
        output = network(execution.images(images), branches=network.evaluated)
    return {
        "object": output.object_boxes,
        "windows": output.window_boxes,
        "parts": output.part_boxes,
        "prediction": network.predict_logits(output).softmax(dim=1),
    }


def agreement(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> dict[str, Tensor]:
    """For each image [B]: the same choices, or the share of the same ones; and what its prediction differs by."""
    same: dict[str, Tensor] = {}
    if expected["object"] is not None:
        same["same box"] = (found["object"] == expected["object"]).all(dim=1)
        edges = [inclusive_to_edges(boxes["object"]) for boxes in (found, expected)]
        same["box IoU >= 0.9"] = paired_box_iou(*edges) >= 0.9
    for name in ("windows", "parts"):
        if expected[name] is not None:  # in the same group at another rank is the same window
            pairs = (found[name][:, :, None] == expected[name][:, None]).all(dim=3)
            same[f"same {name}"] = pairs.any(dim=1).double().mean(dim=1)
            if "same box" in same and same["same box"].any():
                same[f"same {name} in the same box"] = same[f"same {name}"][same["same box"]]
    same["same prediction"] = found["prediction"].argmax(dim=1) == expected["prediction"].argmax(dim=1)
    likeliest = expected["prediction"].argmax(dim=1, keepdim=True)
    differences = (found["prediction"] - expected["prediction"]).gather(1, likeliest)
    same["mean difference of the prediction's probability"] = differences.abs().squeeze(1)
    return same


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
