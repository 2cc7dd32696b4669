"""The loss terms that systems share; each system names its own in `losses`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from networks.outputs import NetworkOutput
from networks.precision import at_least_float32


def classification_losses(
    output: NetworkOutput,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Cross-entropy of every branch, by name; `labels` [B] int64, or shares of the classes [B, classes].

    For logits [B, N, classes] the label holds for each of the N and the term is the mean over B * N. `class_weights`
    [classes]: see `cross_entropy`.
    """
    terms = {}
    for name, logits in output.logits.items():
        targets = labels
        if logits.ndim == 3:
            targets = labels[:, None].expand(*logits.shape[:2], *labels.shape[1:]).flatten(0, 1)
        logits = at_least_float32(logits.flatten(0, -2))
        terms[name] = cross_entropy(logits, targets, class_weights=class_weights, label_smoothing=label_smoothing)
    return terms


def cross_entropy(
    logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Mean over n images of their cross-entropy times the weight of their class; `targets` [n] or shares [n, classes].

    Not as torch's in two things. There the sum is divided by the weights of these images, of one image its own, so that
    in small parts of a batch, or shares of several processes, class weights would do less and less. And there what
    label smoothing gives to the other classes is weighted by theirs: of a common class, rare ones would get more than
    it keeps.
    """
    if class_weights is None:
        return F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    return cross_entropies(logits, targets, class_weights=class_weights, label_smoothing=label_smoothing).mean()


def cross_entropies(
    logits: Tensor, targets: Tensor, *, class_weights: Tensor | None = None, label_smoothing: float = 0.0
) -> Tensor:
    """Cross-entropy of each image times the weight of its class, as in `cross_entropy`: [n], of logits [n, classes].

    Or [n, ...] of logits [n, classes, ...] and `targets` [n, ...]. A mixed picture's classes count by their shares.
    """
    if class_weights is None or not targets.is_floating_point():
        each = F.cross_entropy(logits, targets, reduction="none", label_smoothing=label_smoothing)
        return each if class_weights is None else each * class_weights[targets]
    surprise, weighted = -logits.log_softmax(dim=1), targets * class_weights
    smooth = weighted.sum(dim=1) * surprise.mean(dim=1)
    return (1 - label_smoothing) * (weighted * surprise).sum(dim=1) + label_smoothing * smooth


def ranking_loss(scores: Tensor, part_logits: Tensor, labels: Tensor) -> Tensor:
    """Teach scores [B, P, M] to rank the M parts of each module as the part classifier does.

    Yang et al., "Learning to Navigate for Fine-grained Classification", ECCV 2018, section 3.2: for every two parts of
    which the classifier (`part_logits` [B, P * M, classes]) gives the true label more to the first one, the hinge
    `max(0, 1 - first score + second score)`. The mean over the M * (M - 1) / 2 pairs and over the images, summed over
    the modules; the published code sums over the pairs, which only makes the navigators, the sole ones to learn from
    this, learn faster. Only the scores get a gradient.
    """
    B, P, M = scores.shape
    log_probabilities = part_logits.detach().float().log_softmax(dim=-1)
    doubt = -log_probabilities.gather(2, labels[:, None, None].expand(B, P * M, 1)).reshape(B, P, M)
    should_lead = doubt[..., :, None] < doubt[..., None, :]  # [B, P, M, M]: the row's part over the column's
    scores = scores.float()
    hinge = F.relu(1 - scores[..., :, None] + scores[..., None, :])
    return (hinge * should_lead).sum(dim=(1, 2, 3)).mean() / max(M * (M - 1) / 2, 1)


def contrastive_loss(features: Tensor, labels: Tensor) -> Tensor:
    """Draw features [B, P, D] together, the nearer the more they have in common: class, and module that made them.

    Sun et al., "Multi-Attention Multi-Class Constraint for Fine-grained Image Recognition", ECCV 2018, section 3.2.
    Seen from every feature (image, module), the others are of the same module and class, the same module only, the same
    class only, or neither. Three N-pair losses, `log(1 + sum over negatives of exp(negative - positive similarity))`:
    same module and class against all others; same module against neither; same class against neither. Each is averaged
    over the positives of a feature, then over the features that have one (0 where none has); the three are added.
    """
    B, P, _ = features.shape
    features = F.normalize(features.float().flatten(0, 1), dim=1, eps=1e-6)  # [B * P, D], image by image
    similarity = features @ features.T
    image = torch.arange(B, device=features.device).repeat_interleave(P)
    module = torch.arange(P, device=features.device).repeat(B)
    same_class = labels[image][:, None] == labels[image][None, :]
    same_module = module[:, None] == module[None, :]
    oneself = torch.eye(B * P, dtype=torch.bool, device=features.device)
    both = same_class & same_module & ~oneself
    neither = ~same_class & ~same_module
    return (
        _n_pair_loss(similarity, both, ~both & ~oneself)
        + _n_pair_loss(similarity, same_module & ~same_class, neither)
        + _n_pair_loss(similarity, same_class & ~same_module, neither)
    )


def _n_pair_loss(similarity: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """All [n, n]: row = the feature one looks from. Similarities are cosines, so no exponential can overflow."""
    against = (similarity.exp() * negatives).sum(dim=1, keepdim=True)
    losses = torch.log1p(against * (-similarity).exp()) * positives
    counts = positives.sum(dim=1)
    has_positive = counts > 0
    means = losses.sum(dim=1) / counts.clamp(min=1)
    return (means * has_positive).sum() / has_positive.sum().clamp(min=1)


def semantic_loss(parts: Tensor) -> Tensor:
    """Draw vectors [B, P, D] of one part together, whatever the images show, and those of different parts apart.

    The regulariser of Luo et al., "Cross-X Learning for Fine-Grained Visual Categorization", ICCV 2019, as the
    published code has it: with M_pq the mean cosine of part p and part q over all B * B pairs of images, an image and
    itself included, the sum of 1 - M_pp over the parts, and of M_pq over the pairs of parts.
    """
    means = F.normalize(parts.float(), dim=-1, eps=1e-6).mean(dim=0)  # [P, D]; a mean of products is one of means
    similarity = means @ means.T
    return (1 - similarity.diagonal()).sum() + similarity.triu(diagonal=1).sum()


def agreement_loss(logits: Tensor, others: Tensor) -> Tensor:
    """Return KL(p || q), the mean over images, of the class probabilities p by `logits` and q by `others` [B, classes].

    Both get a gradient. From Luo et al., as above.
    """
    p, q = (values.float().log_softmax(dim=-1) for values in (logits, others))
    return (p.exp() * (p - q)).sum(dim=-1).mean()
