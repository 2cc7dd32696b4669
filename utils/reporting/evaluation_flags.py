"""The command line of test.py."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from networks.outputs import ENSEMBLINGS
from utils.command_line import Parser, nonempty_path
from utils.reporting.exit_threshold import parse_threshold


def parse_arguments(arguments: Sequence[str] | None, *, views: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Return the options of test.py, and what else was given: settings for a published checkpoint.

    `views`: names of those that a picture can be classified by. Raises SettingsError for what cannot be meant.
    """
    parser = Parser(
        description="Evaluate a checkpoint on the test images of its data set, or compare runs that were evaluated.",
        epilog="With a checkpoint of a system's published code, any setting of train.py may follow.",
        usage="test.py CHECKPOINT [--option value ...] | test.py --compare RUN RUN ...",
        allow_abbrev=False,
    )
    parser.add_argument(
        "checkpoint", type=nonempty_path, nargs="?", help="best.pth or last.pth of a run, or a published file"
    )
    parser.add_argument("--branches", nargs="+", help="report these beside the prediction (default: all that matter)")
    parser.add_argument("--embeddings", action="store_true", help="write TensorBoard's projector of the test images")
    parser.add_argument("--save_logits", action="store_true", help="write every branch's logits of the test images")
    parser.add_argument("--shuffle", action="store_true", help="read the test images in random order (the run's seed)")
    parser.add_argument(
        "--weights", choices=("plain", "ema"), help="of a run with ema_decay (default: ema, the average)"
    )
    parser.add_argument(
        "--ensembling",
        choices=ENSEMBLINGS,
        help="combine the branches otherwise (learned: weights from validation images)",
    )
    parser.add_argument("--views", nargs="+", choices=views, help="classify by these views of a picture, too; slower")
    parser.add_argument(
        "--out", type=nonempty_path, metavar="DIR", help="folder of the report (default: the checkpoint's)"
    )
    parser.add_argument(
        "--include_trained", action="store_true", help="evaluate images that the run was trained on, too"
    )
    early = parser.add_argument_group("early exit (sgkrl, sgkrl_published)")
    early.add_argument(
        "--exit_threshold",
        type=parse_threshold,
        metavar="P",
        help="images surer than P skip the windows (1: none does); learned: P as training has learnt it",
    )
    early.add_argument("--exit_curve", action="store_true", help="find the threshold that loses nothing on validation")
    comparison = parser.add_argument_group("compare")
    comparison.add_argument(
        "--compare", type=nonempty_path, nargs="+", metavar="RUN", help="folders of runs, or report files"
    )
    comparison.add_argument(
        "--format", choices=("text", "csv", "markdown"), default="text", help="how to print the table (%(default)s)"
    )
    machine = parser.add_argument_group("machine (default: as in training)")
    machine.add_argument("--data_root", metavar="DIR", help="where the data lie: the run's, or other pictures by class")
    machine.add_argument("--labels", metavar="FILE", help="dataset csv: the table of these pictures, all in one")
    machine.add_argument("--class_level", type=int, metavar="N", help="how many levels deep the class folders lie")
    machine.add_argument("--device", help="cpu, cuda, cuda:1 ..., mps")
    machine.add_argument("--precision", choices=("auto", "float32", "bf16", "fp16"))
    machine.add_argument("--evaluation_batch_size", type=int, metavar="N", help="images at a time")
    machine.add_argument("--workers", type=int, metavar="N", help="processes that load pictures")
    options, more = parser.parse_known_args(arguments)
    if (options.checkpoint is None) == (options.compare is None):
        parser.error("give one checkpoint, or --compare and the folders of runs")
    if more and options.compare:
        parser.refuse(more)
    return options, more
