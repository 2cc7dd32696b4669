"""What every system costs, beside the plain ResNet: `python benchmarks/systems.py`.

For each: its parameters; the backbone passes of a prediction; multiplications with an addition (MAC) of a prediction
and of a training step, per image, counted by PyTorch as they run (convolutions and matrix products, backward pass
included); and how many images a second it predicts and trains, as a multiple of the plain network's. The two are timed
in turn, in one process, on pictures from memory; everything is counted as train.py and test.py run it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measuring import CLOCKS, interleaved, machine, ratio, write_json
from throughput_variants import Inference, TrainingStep, images_for, in_layout, pass_shapes
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from tqdm import tqdm

from networks import MODELS, build_network
from networks.folding import cast_for_autocast, fold_batch_norm
from networks.system import System
from utils.errors import exit_with_one_sentence
from utils.training.allocator import keep_freed_memory
from utils.training.distributed import choose_device
from utils.training.execution import Execution
from utils.training.precision import resolve_precision

PLAIN = "resnet"
# name -> a system with other options than its own; measured where they are asked for
VARIANTS = {
    "sgkrl-stage3-windows": ("sgkrl", {"window_source": "stage3"}),
    "mmal-stage3-windows": ("mmal", {"window_source": "stage3"}),
    "sgkrl-raw-128": ("sgkrl", {"raw_size": 128}),
    "sgkrl-raw-128-stage3-windows": ("sgkrl", {"raw_size": 128, "window_source": "stage3"}),
    "sgkrl-raw-224": ("sgkrl", {"raw_size": 224}),
    "sgkrl-raw-224-stage3-windows": ("sgkrl", {"raw_size": 224, "window_source": "stage3"}),
}


def main(arguments: Sequence[str] | None = None) -> dict:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_freed_memory()
    device = choose_device(options.device)
    execution = Execution(device, resolve_precision(options.precision, device), channels_last=True)
    report = {"options": {n: str(v) if isinstance(v, Path) else v for n, v in vars(options).items()}}
    report |= {"machine": machine(device), "precision": execution.precision, "systems": {}}
    plain = {mode: prepared(PLAIN, mode, options, execution) for mode in ("inference", "train")}
    for model in tqdm(options.models, desc="systems", disable=None):
        report["systems"][model] = measure(model, plain, options, execution)
        if options.json is not None:
            write_json(options.json, report)
    print(as_heading(report), as_table(report["systems"]), sep="\n\n")
    return report


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Cost of every system beside the plain ResNet.")
    parser.add_argument(
        "--models",
        nargs="+",
        choices=(*MODELS, *VARIANTS),
        default=MODELS,
        metavar="MODEL",
        help="default: all systems",
    )
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--input_size", type=int, default=448)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16", "fp16"), default="auto")
    parser.add_argument("--inference_batch", type=int, default=8, metavar="IMAGES")
    parser.add_argument("--train_batch", type=int, default=8, metavar="IMAGES")
    parser.add_argument("--rounds", type=int, default=3, help="times that each is measured (default: 3)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 1 on a machine shared with others")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for --threads 1 on a shared machine"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    return parser.parse_args(arguments)


def built(model: str, options: argparse.Namespace, device: torch.device) -> System:
    """The network as train.py builds it on pretrained weights; which they are does not change its cost."""
    torch.manual_seed(0)
    shared = {"num_classes": options.classes, "backbone": options.backbone, "input_size": options.input_size}
    model, own = VARIANTS.get(model, (model, {}))
    return build_network(model, **shared, **own).to(device)


def prepared(model: str, mode: str, options: argparse.Namespace, execution: Execution) -> Inference | TrainingStep:
    network = in_layout(built(model, options, execution.device), execution)
    if mode == "train":
        images = images_for(options, options.train_batch)
        labels = torch.arange(options.train_batch) // 2 % options.classes  # pairs, which some losses need
        return TrainingStep(network, images, labels, execution)
    network = fold_batch_norm(network.eval())
    if execution.half is not None:
        cast_for_autocast(network, execution.half)
    return Inference(network, images_for(options, options.inference_batch), execution)


def measure(model: str, plain: dict, options: argparse.Namespace, execution: Execution) -> dict:
    network = built(model, options, execution.device)
    result = {"parameters": sum(p.numel() for p in network.parameters())}
    del network
    for mode, images in (("inference", options.inference_batch), ("train", options.train_batch)):
        call = plain[mode] if model == PLAIN else prepared(model, mode, options, execution)
        shapes = [list(shape) for shape in pass_shapes(call)]
        timings = interleaved({"plain": plain[mode], "system": call}, options.rounds, execution.device, options.clock)
        result[mode] = {
            "passes": shapes,
            "gmac_per_image": multiply_adds(call) / images / 1e9,
            "images_per_second": images / timings["system"]["median"],
            "times_plain": 1.0 if model == PLAIN else ratio(timings["plain"], timings["system"]),
        }
    return result


class Operations(TorchDispatchMode):
    """Counts floating-point operations by PyTorch's formulas, as FlopCounterMode does.

    That one also keeps them by module, for which it needs gradients everywhere, and sgkrl_published has parts without.
    """

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        formula = flop_registry.get(function.overloadpacket)
        if formula is not None:
            self.number += formula(*args, **(kwargs or {}), out_val=result)
        return result


def multiply_adds(call: Callable[[], object]) -> float:
    """Multiplications with an addition in one call, as its convolutions and matrix products run."""
    with Operations() as counted:
        call()
    return counted.number / 2


# ---- showing --------------------------------------------------------------------------------------------------------


def as_heading(report: dict) -> str:
    options, where = report["options"], report["machine"]
    return (
        f"{options['backbone']}, {options['input_size']} px, {options['classes']} classes, {report['precision']}; "
        f"batches of {options['inference_batch']} (prediction) and {options['train_batch']} (training)\n"
        f"{where['processor']}, {where['device']}, {where['threads']} threads, {options['clock']} clock, "
        f"load {where['load_average']}, torch {where['torch']}, {where['date']}"
    )


def as_table(systems: dict[str, dict]) -> str:
    lines = [
        "| `--model` | parameters (M) | passes of a prediction | GMAC, prediction | GMAC, training step "
        "| prediction, speed | training, speed |",
        "|---|---|---|---|---|---|---|",
    ]
    for model, result in systems.items():
        inference, train = result["inference"], result["train"]
        lines.append(
            f"| `{model}` | {result['parameters'] / 1e6:.1f} | {as_passes(inference['passes'])} | "
            f"{inference['gmac_per_image']:.1f} | {train['gmac_per_image']:.1f} | "
            f"{inference['times_plain']:.2f} | {train['times_plain']:.2f} |"
        )
    return "\n".join(lines)


def as_passes(shapes: Sequence[Sequence[int]]) -> str:
    """For instance "448, 448, 7 x 224": what one image sends through the backbone, in pixels or in cells of a map."""
    images = shapes[0][0]
    passes = [(shape[0] // images, f"{shape[-1]}{'' if shape[1] == 3 else ' cells'}") for shape in shapes]
    return ", ".join(side if number == 1 else f"{number} x {side}" for number, side in passes)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
