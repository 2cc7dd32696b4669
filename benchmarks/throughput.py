"""How fast a system trains and predicts, against its backbone alone: `python benchmarks/throughput.py --model sgkrl`.

Interleaved in one process, pictures from memory: a training step (`utils.training.engine.train_one_epoch`: loss,
gradients, optimizer, figures) and inference (`evaluated` branches and the prediction), each

    off       float32, NCHW memory layout, batch norm as it is, the C library's allocator: what published code does
    on        the chosen precision, channels_last; inference with batch norm folded into the convolutions
    compiled  with --compile: `on`, its backbone through torch.compile
    own       with --own: `on` with these settings of the system, such as raw_size=224 window_source=stage3
    floor     the backbone passes of `on` alone, on random pictures of the same shapes; in training with the backward
              pass and the optimizer's step for the backbone's weights. No head, loss, box, crop or window.

What `on` takes longer than `floor` is glue: everything that is not backbone.
"""

from __future__ import annotations

import argparse
import ast
from collections.abc import Sequence
from pathlib import Path

import torch
from measuring import CLOCKS, interleaved, machine, ratio, write_json
from throughput_variants import (
    Inference,
    TrainingStep,
    backbone_flops,
    forward_only,
    host_synchronisations,
    images_for,
    inference_variants,
    pass_shapes,
    training_variants,
)

from networks import MODELS, build_network
from networks.system import System
from utils.errors import exit_with_one_sentence
from utils.training.allocator import GLIBC_DEFAULT, keep_freed_memory
from utils.training.distributed import choose_device
from utils.training.execution import Execution
from utils.training.precision import resolve_precision

# until what `off` gave back to the system is the process's again; train.py and test.py do it once
CALLS_FOR_MEMORY = 3


def main(arguments: Sequence[str] | None = None) -> dict:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    device = choose_device(options.device)
    on = Execution(device, resolve_precision(options.precision, device), channels_last=True)
    off = Execution(device, "float32", channels_last=False)
    network = built(options).to(device)
    other = built(options, **options.own).to(device) if options.own else None
    report = {"options": {n: str(v) if isinstance(v, Path) else v for n, v in vars(options).items()}}
    report |= {"machine": machine(device), "precision": on.precision, "measurements": []}
    print(as_heading(report), flush=True)
    for batch_size in options.inference_batches:
        variants = inference_variants(network, images_for(options, batch_size), off, on, options.compile, other)
        shapes = pass_shapes(variants["on"])
        report["measurements"].append(measure("inference", batch_size, variants, shapes, options, device))
    for batch_size in options.train_batches:
        images = images_for(options, batch_size)
        labels = torch.arange(batch_size) // 2 % options.classes  # pairs, which SCRIM's contrast needs
        variants = training_variants(network, images, labels, off, on, options.compile, other)
        shapes = pass_shapes(variants["on"])
        report["measurements"].append(measure("train", batch_size, variants, shapes, options, device))
    if options.json is not None:
        write_json(options.json, report)
    return report


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Throughput of a system against its own backbone alone.")
    parser.add_argument("--model", choices=MODELS, default="sgkrl")
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--input_size", type=int, default=448)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16", "fp16"), default="auto", help="of `on`")
    parser.add_argument("--compile", action="store_true", help="measure the compiled backbone, too")
    parser.add_argument(
        "--own", type=named_value, nargs="*", metavar="NAME=VALUE", help="measure `on` with these settings, too"
    )
    parser.add_argument("--inference_batches", type=int, nargs="*", default=(1, 4, 16), metavar="IMAGES")
    parser.add_argument("--train_batches", type=int, nargs="*", default=(16,), metavar="IMAGES")
    parser.add_argument("--rounds", type=int, default=5, help="times that every variant is measured (default: 5)")
    parser.add_argument("--threads", type=int, default=0, help="CPU threads; 1 on a machine shared with others")
    parser.add_argument(
        "--clock", choices=tuple(CLOCKS), default="wall", help="cpu: for --threads 1 on a shared machine"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there, too")
    options = parser.parse_args(arguments)
    options.own = dict(options.own or ())
    return options


def named_value(text: str) -> tuple[str, object]:
    """Read `raw_size=224`, or a word such as `window_source=stage3`."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def built(options: argparse.Namespace, **own: object) -> System:
    return build_network(
        options.model,
        num_classes=options.classes,
        backbone=options.backbone,
        pretrained="none",  # random weights: batch norms and boxes are as published, which the recorded figures are of
        input_size=options.input_size,
        **own,
    )


def measure(
    mode: str,
    batch_size: int,
    variants: dict[str, Inference | TrainingStep],
    shapes: Sequence[torch.Size],
    options: argparse.Namespace,
    device: torch.device,
) -> dict:
    timed = {**variants, "floor": variants["on"].floor(shapes)}

    def before(name: str) -> None:
        keep_freed_memory(*((GLIBC_DEFAULT,) if name == "off" else ()))
        if name == "on" and device.type == "cpu":
            for _ in range(CALLS_FOR_MEMORY):
                timed[name]()

    timings = interleaved(timed, options.rounds, device, options.clock, before)
    flops = backbone_flops(variants["off"].network.backbone, shapes, training=mode == "train")
    result = {
        "mode": mode,
        "batch_size": batch_size,
        "passes": [list(shape) for shape in shapes],
        "backbone_gflop_per_image": flops / batch_size / 1e9,
        "variants": timings,
    }
    for name, timing in timings.items():
        timing["images_per_second"] = batch_size / timing["median"]
        timing["backbone_tflop_per_second"] = None if name == "own" else flops / timing["median"] / 1e12
        timing["times_off"] = ratio(timings["off"], timing)
        timing["glue_percent"] = 100 * (ratio(timing, timings["floor"]) - 1) if name in ("on", "floor") else None
    if device.type == "cuda":
        result["host_synchronisations_per_forward"] = host_synchronisations(forward_only(variants["on"]))
    print(as_table(result), flush=True)
    return result


def as_heading(report: dict) -> str:
    options, where = report["options"], report["machine"]
    return (
        f"{options['model']}, {options['backbone']}, {options['input_size']} px; on: {report['precision']}, "
        f"channels_last, inference folded\n{where['processor']}, {where['device']}, {where['threads']} threads, "
        f"{options['clock']} clock, load {where['load_average']}, torch {where['torch']}, {where['date']}\n\n"
        f"{'':<22}{'images/s':>10}{'median s':>10}{'min s':>9}{'x off':>8}{'glue %':>8}{'TFLOP/s':>9}{'MiB':>8}"
    )


def as_table(result: dict) -> str:
    lines = []
    for name, timing in result["variants"].items():
        title = f"{result['mode']} {result['batch_size']} {name}"
        glue = "" if timing["glue_percent"] is None else f"{timing['glue_percent']:.1f}"
        speed = "" if timing["backbone_tflop_per_second"] is None else f"{timing['backbone_tflop_per_second']:.3f}"
        memory = "" if timing["peak_memory_mib"] is None else f"{timing['peak_memory_mib']:.0f}"
        lines.append(
            f"{title:<22}{timing['images_per_second']:>10.2f}{timing['median']:>10.3f}{timing['minimum']:>9.3f}"
            f"{timing['times_off']:>8.2f}{glue:>8}{speed:>9}{memory:>8}"
        )
    if "host_synchronisations_per_forward" in result:
        lines.append(f"host synchronisations per forward: {result['host_synchronisations_per_forward']}")
    return "\n".join(lines)


if __name__ == "__main__":
    with exit_with_one_sentence():
        main()
