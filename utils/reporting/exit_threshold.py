"""A threshold of confidence for an evaluation: given, or chosen on validation images; see `early_exit`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch.utils.data import DataLoader

from networks.system import System
from utils.files import show
from utils.options import SettingsError
from utils.reporting.early_exit import ExitCollector, choose_threshold, curve_text
from utils.training.engine import evaluate


def let_exit_early(
    network: System,
    settings: Any,
    options: argparse.Namespace,
    shared: Mapping[str, Any],
    *,
    rebuilt: Callable[..., Any],
    validation: Callable[[], tuple[DataLoader, str]],
) -> Any:
    """Set the network's threshold, if it has one, to what was asked for; return the settings with it.

    Args:
        options: of test.py: exit_threshold, exit_curve.
        shared: arguments of every `evaluate`.
        rebuilt: `config.rebuilt`.
        validation: loads the run's validation images, and says in words which these are.

    Raises SettingsError for a system without early exit.
    """
    asked = options.exit_threshold is not None or options.exit_curve
    if not network.can_exit_early:
        if asked and (options.exit_curve or options.exit_threshold != 1):
            raise SettingsError(
                f"{settings.model} has no pass to skip: leave exit_threshold and exit_curve out, which are for systems "
                "such as sgkrl"
            )
        return settings
    saved = dataclasses.asdict(settings)
    threshold = settings.options["exit_threshold"] if options.exit_threshold is None else options.exit_threshold
    if options.exit_curve:
        rebuilt(saved, exit_threshold=0.0)  # refuses a graph that cannot do without
        threshold = _calibrated(network, *validation(), shared)
    network.exit_threshold = threshold
    return rebuilt(saved, exit_threshold=threshold)


def _calibrated(network: System, loader: DataLoader, name: str, shared: Mapping[str, Any]) -> float:
    """Print accuracy against compute on validation images; return the threshold that loses nothing there."""
    collector = ExitCollector(network)
    evaluate(network, loader, branches=network.branches, on_batch=collector, description="validation", **shared)
    curve = collector.curve()
    chosen = choose_threshold(curve)
    show(f"early exit, measured on {name}:\n{curve_text(curve, chosen)}\n")
    return chosen.threshold
