"""The ensembling `learned`: the weight that each branch has in the prediction, learnt on the images of an evaluation.

A log-linear pool (Genest & Zidek, "Combining Probability Distributions", Statistical Science 1986) whose weights need
not sum to 1: one number is a branch's weight and temperature.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from networks.outputs import NetworkOutput, combine_logits
from networks.system import System
from utils.reporting.metrics import topk_correct
from utils.training.distributed import gather
from utils.training.kept_logits import KeptLogits

ITERATIONS, HALVINGS = 100, 40  # far more than are needed
NEARLY_OPTIMAL = 1e-10  # length of the projected gradient
NEARLY_ZERO = 1e-6
DECREASE = 1e-4  # Armijo's share of the decrease that the gradient promises
ROUNDING = 1e-15  # of an objective, relative
LEARNT_FROM = 2**26  # logits: enough for 80,000 images of 200 classes, or 1,600 of 10,000


def fit_weights(log_probabilities: Tensor, labels: Tensor) -> Tensor:
    """Return the weights [K] float64, not negative, of branches whose sum of log-probabilities predicts labels best.

    That is, where sum over n images of cross-entropy(w @ log_probabilities, labels) + ||w - 1/K||^2 / 2 is lowest. The
    second term, a normal prior of standard deviation 1, keeps the weights finite where all images are right, gives
    branches that are copies equal weights, and counts less the more images there are. The sum is strictly convex, so
    that there is one minimum, which does not depend on the order of the images but for rounding. Weights that all are
    zero, of branches worse than a guess, would predict nothing: they are 1/K instead.

    By the projected Newton method of Bertsekas, "Projected Newton Methods for Optimization Problems with Simple
    Constraints", SIAM J. Control and Optimization 1982.

    Args:
        log_probabilities: [K, n, classes], on the CPU.
        labels: [n] int64.
    """
    pooled = log_probabilities.double()
    branches, images, _ = pooled.shape
    equal = torch.full((branches,), 1 / branches, dtype=torch.float64)
    if not images:
        return equal
    right = pooled.gather(2, labels.expand(branches, -1)[..., None]).squeeze(2)  # [K, n]

    def objective(weights: Tensor) -> Tensor:
        cross_entropy = torch.tensordot(weights, pooled, 1).logsumexp(1) - weights @ right
        return cross_entropy.mean() + (weights - equal).square().sum() / (2 * images)

    weights, value = equal, objective(equal)
    for _ in range(ITERATIONS):
        probabilities = torch.tensordot(weights, pooled, 1).softmax(1)  # [n, classes]
        expected = (pooled * probabilities).sum(2)  # [K, n]
        gradient = (expected - right).mean(1) + (weights - equal) / images
        gap = (weights - (weights - gradient).clamp(min=0)).norm().item()
        if gap < NEARLY_OPTIMAL:
            break
        centred = pooled - expected[..., None]
        hessian = (centred * probabilities).flatten(1) @ centred.flatten(1).T + torch.eye(branches).double()
        held = (weights <= min(NEARLY_ZERO, gap)) & (gradient > 0)  # these stay at their bound: no Newton step
        apart = held[:, None] | held
        hessian = torch.where(apart, torch.eye(branches).double(), hessian / images)
        step = torch.linalg.solve(hessian, gradient)
        for halving in range(HALVINGS):
            tried = (weights - step / 2**halving).clamp(min=0)
            reached, promised = objective(tried), gradient @ (weights - tried)
            if reached <= value - DECREASE * promised + ROUNDING * value.abs():
                break
        else:
            break
        weights, value = tried, reached
    return weights if weights.any() else equal


class EnsembleLearning:
    """Collects what the branches of a system's prediction say in an evaluation, and learns their weights from it.

    `also`: branches that are kept, too, for what is learnt after the weights.
    """

    def __init__(self, system: System, also: tuple[str, ...] = ()) -> None:
        self.system = system
        self.kept = KeptLogits(tuple(dict.fromkeys((*system.prediction, *also))))

    def add(self, output: NetworkOutput, labels: Tensor) -> None:
        """Take a batch with its labels [B]."""
        self.kept.add(output, labels)

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield logits [K, n, classes] and labels [n] of this process."""
        for logits, labels in self.kept.parts():
            yield torch.stack([logits[name] for name in self.system.prediction]), labels

    def _learnt_from(self) -> tuple[Tensor, Tensor]:
        """Return logits [K, n, classes] and labels [n] of all processes: of too many evenly spread ones."""
        step = max(math.ceil(sum(gather(self.kept.numbers)) / LEARNT_FROM), 1)
        own = [(logits[:, ::step].contiguous(), labels[::step]) for logits, labels in self._parts()]
        shares = gather(own and (torch.cat([part for part, _ in own], dim=1), torch.cat([part for _, part in own])))
        logits, labels = zip(*filter(len, shares), strict=True)
        return torch.cat(logits, dim=1), torch.cat(labels)

    def finish(self) -> dict[str, float]:
        """Give the system, in all processes, the weights learnt from the images of all; return the figures they change.

        These are `accuracy/prediction`, on the same images, and `ensemble_weight/<branch>`. Weights stay as they are
        where the logits are not finite.
        """
        logits, labels = self._learnt_from()
        if logits.isfinite().all():
            weights = fit_weights(logits.double().log_softmax(2), labels)
            weights = torch.tensor(gather(weights.tolist())[0])  # of the first process: machines may round otherwise
            self.system.ensemble_weights.copy_(weights)
        weights = self.system.ensemble_weights.cpu()
        own = [topk_correct(combine_logits(logits, "learned", weights), labels, 1) for logits, labels in self._parts()]
        right, images = map(sum, zip(*gather((sum(int(r.sum()) for r in own), sum(map(len, own)))), strict=True))
        named = zip(self.system.prediction, weights.tolist(), strict=True)
        return {"accuracy/prediction": right / images} | {f"ensemble_weight/{n}": w for n, w in named}
