"""Numbers that describe an epoch: accuracies with their uncertainty, box overlap, calibration.

Shares and accuracies are fractions in 0 .. 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import NormalDist

import torch
from torch import Tensor

from utils.errors import UserError
from utils.training.distributed import all_reduce_sum, gather, is_distributed


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of the true accuracy behind `correct` of `total`, as fractions (low, high); (0, 1) when total is 0.

    Wilson's score interval: unlike the normal one it stays inside 0 .. 1 and is not empty at 0 % or 100 %.
    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", 1927.

    Raises:
        UserError: correct outside 0 .. total, or confidence outside 0 .. 1 (both excluded).
    """
    if not 0 <= correct <= total:
        raise UserError(f"{correct} correct of {total}: expected 0 <= correct <= total")
    if not 0 < confidence < 1:
        raise UserError(f"confidence {confidence}: expected a number between 0 and 1")
    if total == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = correct / total
    centre = share + z**2 / (2 * total)
    margin = z * (share * (1 - share) / total + (z / (2 * total)) ** 2) ** 0.5
    scale = 1 + z**2 / total
    low = 0.0 if correct == 0 else (centre - margin) / scale  # exactly 0 and 1, without a rounding error
    high = 1.0 if correct == total else (centre + margin) / scale
    return low, high


def inclusive_to_edges(boxes: Tensor) -> Tensor:
    """Boxes [..., 4] (x0, y0, x1, y1) with inclusive end pixels -> the same with continuous edges: x1 and y1 plus 1."""
    return torch.cat([boxes[..., :2], boxes[..., 2:] + 1], dim=-1)


def paired_box_iou(boxes_a: Tensor, boxes_b: Tensor) -> Tensor:
    """Intersection over union [B] of box i of one set with box i of the other; both [B, 4], continuous edges.

    Two boxes without area have an overlap of 0. A box with its edges swapped counts as one without area. NaN where one
    of them is not known (NaN).
    """
    boxes_a, boxes_b = boxes_a.float(), boxes_b.float()
    top_left = torch.maximum(boxes_a[:, :2], boxes_b[:, :2])
    bottom_right = torch.minimum(boxes_a[:, 2:], boxes_b[:, 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(dim=1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(dim=1) for boxes in (boxes_a, boxes_b))
    union = area_a + area_b - intersection
    return torch.where(union.isnan(), union, torch.where(union > 0, intersection / union, 0.0))


def of_known(true_boxes: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    """Return those true boxes [K, 4] of [B, 4], on the CPU, that are known (not NaN), and the `boxes` [K, 4] of these.

    It is decided on the CPU, so that no GPU is waited for.
    """
    known = true_boxes[:, 0].isfinite().nonzero().flatten()
    if len(known) == len(true_boxes):
        return true_boxes, boxes
    return true_boxes[known], boxes[known.to(boxes.device, non_blocking=True)]


def topk_correct(logits: Tensor, labels: Tensor, k: int) -> Tensor:
    """Is the label among the k highest of logits [B, C]? -> [B] bool. With k >= C it always is.

    Of equal logits the first is the highest, as it is to `argmax`. Where one is not a number, none is right.
    """
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
    before = (logits > own) | ((logits == own) & earlier)
    return (before.sum(dim=1) < k) & ~logits.isnan().any(dim=1)


def share_of_predicted(logits: Tensor, shares: Tensor) -> Tensor:
    """The share [B] that the class of the highest logit [B, C] has among the `shares` [B, C] of a mixed picture."""
    return shares.gather(1, logits.argmax(dim=1, keepdim=True)).squeeze(1)


class EpochMeter:
    """Averages over an epoch, summed on the device: no batch waits for the GPU.

    Names: `loss/<term>`, `accuracy/<branch>`, `box_iou/mean`, `box_iou/share_at_0.5` and `images`.

        meter = EpochMeter(device)
        for ...:
            meter.update(labels, losses=..., logits={**output.logits, "prediction": ...}, boxes=..., true_boxes=...)
        meter.reduce()  # once, after the last batch
        values = meter.compute()
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.precision = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.images = 0
        self.reduced = False  # whether the sums are those of all processes

    @torch.no_grad()
    def update(
        self,
        labels: Tensor,
        *,
        losses: Mapping[str, Tensor] | None = None,
        logits: Mapping[str, Tensor] | None = None,
        boxes: Tensor | None = None,
        true_boxes: Tensor | None = None,
        images: int | None = None,
    ) -> None:
        """Add a batch.

        Args:
            labels: [B] int64, or shares of the classes [B, C]: right is then what share the predicted class has.
            losses: term -> scalar, the mean over this batch; weighted by B, so a small last batch counts for less.
            logits: branch -> [B, C], or [B, N, C] for several windows, which predict together by their mean.
            boxes, true_boxes: [K, 4] in continuous edges and in the same pixels (see `inclusive_to_edges`), of the
                images whose true box is known, or None; the overlap is measured where both are there.
            images: how many images are new with it; None: all B.
        """
        batch_size = labels.shape[0]
        self.images += batch_size if images is None else images
        for term, loss in (losses or {}).items():
            self._add(f"loss/{term}", loss.to(self.precision) * batch_size, batch_size)
        for branch, scores in (logits or {}).items():
            scores = scores.mean(dim=1) if scores.dim() == 3 else scores
            right = topk_correct(scores, labels, 1) if labels.dim() == 1 else share_of_predicted(scores, labels)
            self._add(f"accuracy/{branch}", right.sum(), batch_size)
        if boxes is not None and true_boxes is not None:
            overlap = paired_box_iou(boxes, true_boxes)
            self._add("box_iou/mean", overlap.to(self.precision).sum(), len(overlap))
            self._add("box_iou/share_at_0.5", (overlap >= 0.5).sum(), len(overlap))

    def _add(self, name: str, value: Tensor, count: int) -> None:
        value = value.detach().to(self.device, self.precision)
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + count

    def reduce(self) -> None:
        """Sum over all processes; call it in every one of them, once, after the last batch. Alone: nothing to do."""
        self.reduced = True
        if not is_distributed():
            return
        # a process may have met fewer names than another, or no batch at all: all agree on the names first
        names = list(dict.fromkeys(name for names_of_rank in gather(list(self.sums)) for name in names_of_rank))
        zero = torch.zeros((), device=self.device, dtype=self.precision)
        sums = torch.stack([self.sums.get(name, zero) for name in names] + [zero])  # + zero: stack refuses none
        counts = [self.counts.get(name, 0) for name in names] + [self.images]
        sums = all_reduce_sum(sums)
        counts = all_reduce_sum(torch.tensor(counts, device=self.device)).tolist()
        self.sums = dict(zip(names, sums[:-1].unbind(), strict=True))
        self.counts = dict(zip(names, counts[:-1], strict=True))
        self.images = counts[-1]

    def copy(self) -> EpochMeter:
        """What has been summed so far, which later batches do not change."""
        meter = EpochMeter(self.device)
        meter.sums, meter.counts, meter.images = dict(self.sums), dict(self.counts), self.images
        return meter

    def since(self, before: EpochMeter) -> EpochMeter:
        """What has been added since the `copy` before."""
        meter = EpochMeter(self.device)
        meter.counts = {name: count - before.counts.get(name, 0) for name, count in self.counts.items()}
        meter.counts = {name: count for name, count in meter.counts.items() if count > 0}
        meter.sums = {name: self.sums[name] - before.sums.get(name, 0) for name in meter.counts}
        meter.images = self.images - before.images
        return meter

    def state_dict(self) -> dict[str, object]:
        """What has been summed so far, over all processes (each has to ask), as numbers."""
        whole = self.copy()
        if not self.reduced:
            whole.reduce()
        return {
            "sums": {name: value.item() for name, value in whole.sums.items()},
            "counts": whole.counts,
            "images": whole.images,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from what `state_dict` returned; in one process only, or it would count several times."""
        self.sums = {
            name: torch.tensor(value, device=self.device, dtype=self.precision) for name, value in state["sums"].items()
        }
        self.counts = dict(state["counts"])
        self.images = state["images"]

    def compute(self) -> dict[str, float]:
        """The averages by name, and `images`; the only call that waits for the device."""
        sums = torch.stack(list(self.sums.values())).tolist() if self.sums else []
        averages = {name: total / max(self.counts[name], 1) for name, total in zip(self.sums, sums, strict=True)}
        return {**averages, "images": self.images}


def calibration(probabilities: Tensor, correct: Tensor, bins: int = 15) -> dict[str, object]:
    """How far the probabilities [B] of predictions can be taken at their word: by `correct` [B] bool.

    Predictions are sorted into equally wide bins of their probability. Naeini, Cooper & Hauskrecht, "Obtaining well
    calibrated probabilities using Bayesian binning", AAAI 2015; Guo et al., "On calibration of modern neural networks",
    ICML 2017.

    Returns:
        `expected_error`: mean distance of accuracy and probability over the bins, weighted by their predictions;
        `bins`: dicts of `low`, `high`, `count`, `probability` and `accuracy` (means, None in an empty bin).
    """
    probabilities, correct = probabilities.double(), correct.double()
    index = (probabilities * bins).long().clamp(0, bins - 1)
    counts = index.bincount(minlength=bins)
    sums = [index.bincount(values, minlength=bins) for values in (probabilities, correct)]
    gap = (sums[0] - sums[1]).abs().sum() / max(len(probabilities), 1)
    means = [(sum_of_bin / counts.clamp(min=1)).tolist() for sum_of_bin in sums]
    return {
        "expected_error": gap.item(),
        "bins": [
            {
                "low": number / bins,
                "high": (number + 1) / bins,
                "count": count,
                "probability": means[0][number] if count else None,
                "accuracy": means[1][number] if count else None,
            }
            for number, count in enumerate(counts.tolist())
        ],
    }
