"""A threshold of confidence for an evaluation: given, learnt in training, or chosen on validation images."""

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
from utils.training.building import Trained
from utils.training.engine import evaluate

LEARNED = "learned"  # asks for the threshold that training has kept


def parse_threshold(text: str) -> float | str:
    """Read --exit_threshold; whether it is a probability is for `config.rebuilt` to say."""
    try:
        return text if text == LEARNED else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a probability, or {LEARNED}") from None


def has_learned_threshold(saved: Mapping[str, Any]) -> bool:
    return (saved.get("weights") or "plain") in saved.get("exit_threshold", {})


def learned_threshold(saved: Mapping[str, Any]) -> float:
    """Return what training has learnt for the weights taken of a checkpoint: 1, so that none exits, where nothing."""
    return saved["exit_threshold"][saved.get("weights") or "plain"] if has_learned_threshold(saved) else 1.0


def let_exit_early(
    trained: Trained,
    options: argparse.Namespace,
    shared: Mapping[str, Any],
    *,
    rebuilt: Callable[..., Any],
    validation: Callable[[], tuple[DataLoader, str]],
) -> Any:
    """Set the network's threshold, if it has one, to what was asked for; return the settings with it.

    Args:
        options: of test.py: checkpoint, exit_threshold, exit_curve.
        shared: arguments of every `evaluate`.
        rebuilt: `config.rebuilt`.
        validation: loads the run's validation images, and says in words which these are.

    Raises SettingsError for a system without early exit, and where a learnt threshold is not there.
    """
    network, settings, asked = trained.network, trained.settings, options.exit_threshold
    saved = dataclasses.asdict(settings)
    if asked == LEARNED:
        if not has_learned_threshold(trained.saved):
            raise SettingsError(
                f"exit_threshold is {LEARNED}, and {options.checkpoint} holds none, as not all runs learn one: give a "
                "number, or --exit_curve"
            )
        asked = learned_threshold(trained.saved)
    if options.exit_curve and options.views:
        raise SettingsError(
            "--exit_curve measures pictures that are looked at once, and --views asks for more: leave one of them out"
        )
    if options.exit_curve or asked not in (None, 1):
        rebuilt(saved, exit_threshold=0.0)  # refuses a system, or a graph, that cannot do without
    if not network.can_exit_early:
        return settings
    chosen = settings.options["exit_threshold"] if asked is None else asked
    if options.exit_curve:
        chosen = _calibrated(network, *validation(), shared)
    network.exit_threshold = chosen
    return rebuilt(saved, exit_threshold=chosen)


def _calibrated(network: System, loader: DataLoader, name: str, shared: Mapping[str, Any]) -> float:
    """Print accuracy against compute on validation images; return the threshold that loses nothing there."""
    collector = ExitCollector(network)
    evaluate(network, loader, branches=network.branches, on_batch=collector, description="validation", **shared)
    curve = collector.curve()
    chosen = choose_threshold(curve)
    show(f"early exit, measured on {name}:\n{curve_text(curve, chosen)}\n")
    return chosen.threshold
