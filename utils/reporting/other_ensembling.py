"""An evaluation by another ensembling than that of the run: the branches stay as trained, their prediction changes."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from utils.files import show
from utils.options import SettingsError
from utils.reporting.exit_threshold import LEARNED
from utils.training.building import Trained
from utils.training.engine import evaluate


def ensemble_otherwise(
    trained: Trained,
    options: argparse.Namespace,
    shared: Mapping[str, Any],
    *,
    rebuilt: Callable[..., Any],
    validation: Callable[[], tuple[DataLoader, str]],
) -> Trained:
    """Let the network predict by the ensembling that was asked for; return it with the settings that say so.

    Weights of branches that were not learnt in training are learnt now, as there, from the validation images.

    Args:
        options: of test.py: ensembling, exit_threshold.
        shared: arguments of every `evaluate`.
        rebuilt: `config.rebuilt`.
        validation: loads the run's validation images, and says in words which these are.

    Raises SettingsError where a run has no validation images to learn from, and for the exit threshold that training
    learnt, which holds for the prediction that it had.
    """
    network, asked = trained.network, options.ensembling
    if asked in (None, network.ensembling):
        return trained
    if options.exit_threshold == LEARNED:
        raise SettingsError(
            f"--exit_threshold {LEARNED} was learnt for the run's ensembling, {network.ensembling}, not for {asked}: "
            "give a number, or --exit_curve"
        )
    images = validation() if asked == "learned" and len(network.prediction) > 1 else None
    network.ensemble_by(asked)
    if images is not None:
        loader, name = images
        evaluate(network, loader, branches=network.prediction, learn_ensemble=True, description="validation", **shared)
        show(f"note: the weights of the branches are learnt from {name}")
    return trained._replace(settings=rebuilt(dataclasses.asdict(trained.settings), ensembling=asked))
