"""Turn a checkpoint into one file that runs without this code: `python export.py --checkpoint FILE --out model.pt2`.

The whole system is in it, from pixels to probabilities: normalisation, boxes, crops, windows. `model.pt2` is a program
of torch.export, `model.onnx` one of ONNX (needs `pip install onnx onnxscript`). docs/run_exported.py runs the
first, docs/run_exported_onnx.py the second.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import torch
from torch import Tensor, nn

from datasets import loading_of
from utils.command_line import Parser, nonempty_path
from utils.config_slips import config_as_edited
from utils.data.image_batches import NORMALIZATIONS
from utils.errors import UserError, exit_with_one_sentence
from utils.files import atomic_write, make_folder_of
from utils.reporting.metrics import inclusive_to_edges
from utils.training.building import load_trained

with config_as_edited():
    from config import rebuilt

FORMATS = (".pt2", ".onnx")
ONNX_PACKAGES = ("onnx", "onnxscript")
ONNX_TORCH = (2, 6)
TRACED_WITH = 3  # images; the batch stays free, but torch.export takes 0 and 1 for constants
BATCH = torch.export.Dim("batch", min=1, max=65536)


class Pipeline(nn.Module):
    """A system from pixels to its prediction, with tensors only."""

    def __init__(self, network: nn.Module, *, mask_background: bool, normalization: str = "imagenet") -> None:
        super().__init__()
        self.network = network
        self.mask_background = mask_background
        for name, values in zip(("mean", "std"), NORMALIZATIONS[normalization], strict=True):
            self.register_buffer(name, torch.tensor(values).reshape(3, 1, 1) * 255, persistent=False)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Map RGB images [B, 3, S, S] uint8 to `probabilities` [B, classes] and, where the system finds objects,
        `object_boxes` [B, 4]: their edges (x0, y0, x1, y1) as shares of the image's width and height, 0 to 1.
        """
        normalised = (images.float() - self.mean) / self.std
        output = self.network(normalised, mask_background=self.mask_background, branches=self.network.prediction)
        result = {"probabilities": self.network.predict_logits(output).float().softmax(dim=1)}
        if output.object_boxes is not None:
            result["object_boxes"] = inclusive_to_edges(output.object_boxes) / self.network.input_size
        return result


def parse_arguments(arguments: Sequence[str] | None):
    parser = Parser(description="Turn a checkpoint into one file that runs without this code.", allow_abbrev=False)
    parser.add_argument(
        "--checkpoint", type=nonempty_path, required=True, metavar="FILE", help="best.pth or last.pth of a run"
    )
    parser.add_argument(
        "--weights", choices=("plain", "ema"), help="of a run with ema_decay (default: ema, the average)"
    )
    parser.add_argument("--out", type=nonempty_path, required=True, metavar="FILE", help="model.pt2, or model.onnx")
    parser.add_argument("--device", default="cpu", help="what the file will run on: cpu, cuda ... (%(default)s)")
    options = parser.parse_args(arguments)
    if options.out.suffix not in FORMATS:
        raise UserError(f"out is {options.out}; expected a file that ends in {' or '.join(FORMATS)}")
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if options.out.suffix == ".onnx" and missing:
        raise UserError(f"ONNX needs {' and '.join(missing)}: pip install {' '.join(ONNX_PACKAGES)}")
    if options.out.suffix == ".onnx" and tuple(map(int, torch.__version__.split(".")[:2])) < ONNX_TORCH:
        raise UserError(f"ONNX needs PyTorch {'.'.join(map(str, ONNX_TORCH))} or newer; this is {torch.__version__}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    # In float32 and plainly laid out: what runs the file chooses its own way to compute.
    plain = {"device": options.device, "precision": "float32", "channels_last": False, "compile": False}
    trained = load_trained(options.checkpoint, rebuilt, weights=options.weights, data_root=".", **plain)
    make_folder_of(options.out)  # before the long work
    normalization = trained.settings.normalization
    pipeline = Pipeline(trained.network, mask_background=trained.plan.mask_background, normalization=normalization)
    pipeline = pipeline.eval().to(trained.execution.device)
    facts = {"class_names": trained.saved["class_names"], **loading_of(trained.settings)}
    facts["device"] = trained.execution.device.type
    # In memory first: PyTorch's writer ends the whole program where the disk is full.
    content = io.BytesIO()
    if options.out.suffix == ".pt2":
        program = trace(pipeline, facts["image_size"])
        torch.export.save(program, content, extra_files={"facts.json": json.dumps(facts)})
    else:
        save_onnx(pipeline, content, facts)
    with atomic_write(options.out) as file:
        file.write(content.getbuffer())
    size, place = facts["image_size"], "" if facts["device"] == "cpu" else f" on {facts['device']}"
    print(
        f"{options.out}: {options.out.stat().st_size / 2**20:.0f} MB, takes RGB images [B, 3, {size}, {size}] uint8"
        f"{place}, "
        f"gives probabilities of {len(facts['class_names'])} classes"
    )


def trace(pipeline: Pipeline, image_size: int) -> torch.export.ExportedProgram:
    """Return the pipeline as one graph for batches of any size."""
    images = torch.zeros(TRACED_WITH, 3, image_size, image_size, dtype=torch.uint8, device=pipeline.mean.device)
    with torch.no_grad():
        return torch.export.export(pipeline, (images,), dynamic_shapes=({0: BATCH},))


def save_onnx(pipeline: Pipeline, file: BinaryIO, facts: dict[str, object]) -> None:
    """Write the pipeline as an ONNX model with its class names as metadata."""
    import onnx

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    program = trace(pipeline, facts["image_size"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of versions of its own parts
        program = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=["images"],
            output_names=["probabilities", "object_boxes"][: len(program.graph_signature.user_outputs)],
            custom_translation_table={torch.ops.aten.sort.stable: stable_sort},
        )
    model = program.model_proto
    for name, value in facts.items():
        model.metadata_props.add(key=name, value=json.dumps(value))
    onnx.save(model, file)


def stable_sort(values, *, stable: bool = True, dim: int = -1, descending: bool = False):
    """`torch.sort` in ONNX, whose TopK puts the lower of equal values' indices first, as a stable sort does."""
    from onnxscript import opset18

    axis = opset18.Constant(value_ints=[dim])
    count = opset18.Gather(opset18.Shape(values), axis)
    return opset18.TopK(values, count, axis=dim, largest=int(descending), sorted=1)


if __name__ == "__main__":
    with exit_with_one_sentence(elsewhere="--out", less_memory="use a machine with more"):
        main()
