"""What a system is: the one base of all files in `networks/systems/`.

A system's file holds all that only one published method has: its options, its parts put together, `forward`, its
losses, its optimizer steps and the run defaults of its paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from networks.backbone import Backbone
from networks.losses import classification_losses
from networks.outputs import NetworkOutput, combine_branches
from networks.shared import Shared

ENSEMBLE_WEIGHTS = "ensemble_weights"  # a buffer of a system whose ensembling is learned


@dataclass(frozen=True)
class NoOptions:
    """The options of a system that has none."""


class Step(NamedTuple):
    """One optimizer step: what the network is shown, and what it learns from that."""

    images: Tensor  # [B', 3, S, S]
    targets: Tensor  # [B', ...] labels, as the system's `losses` takes them
    terms: tuple[str, ...] | None = None  # the loss terms that are trained; None: all
    branches: tuple[str, ...] | None = None  # what the pass computes; None: what the epoch's loss terms need
    boxes: Tensor | None = None  # [B', 4] of the objects, as the system's `forward` takes them


class System(nn.Module):
    """A network with several branches of logits, and how it is trained.

    `__init__` of a system calls this one first, then adds its parts: after `backbone` and `dropout`, in the order in
    which they are to draw their random weights.
    """

    Options: ClassVar[type] = NoOptions
    # Values for settings left at None, below the user's and the data set's; one may be a function of the other settings
    run_defaults: ClassVar[Mapping[str, object | Callable[[Shared], object]]] = {}
    # How names begin in checkpoints of the published code, and in ours (see `utils.checkpoint.load_published`)
    published_names: ClassVar[Mapping[str, str]] = {}
    absent_when_published: ClassVar[tuple[str, ...]] = ()  # our names of what such files may lack: it stays as it is

    # The next three are the class's, by which settings are checked; `__init__` may change them as its options ask for
    branches: tuple[str, ...]  # the names of its logits
    evaluated: tuple[str, ...]  # those that evaluation computes: the ones that only serve training left out
    prediction: tuple[str, ...]  # those that are ensembled
    ensembling: str = "mean_probability"  # how, one of `outputs.ENSEMBLINGS`; `run_defaults` may choose another
    loss_weights: Mapping[str, float]  # the weight of each of its loss terms
    needed_for: Mapping[str, tuple[str, ...]] = {}  # loss terms of no one branch -> branches they need; left out: all
    loss_descriptions: Mapping[str, str] = {}  # what TensorBoard says of loss terms of no one branch, a line each
    trained_through_others: ClassVar[tuple[str, ...]] = ()  # branches that learn without a loss of their own
    warmup_branches: tuple[str, ...] = ("raw",)  # loss terms that train in the first epochs; (): it has no warm-up
    needs_labels: ClassVar[bool] = False  # whether `forward` gets the step's targets as `labels` in training
    # Gradients are absent (None) before each step: a parameter that the step does not reach stays as it is. False: they
    # are zero once they have been there, so that it moves by momentum and weight decay, as in PyTorch before 2.0.
    absent_gradients: bool = True
    # Of groups in `parameter_groups` beside `trunk` and `heads`, whose factor is a shared setting
    learning_rate_factors: ClassVar[Mapping[str, float]] = {}
    class_weights: Tensor | None = None  # [classes], of cross-entropies; set before training
    smallest_batch: ClassVar[int] = 1  # images that each device learns from at least: 2 if heads normalise over them
    can_exit_early: bool = False  # whether sure images may skip a pass in evaluation, by its `exit_threshold`
    own_views: ClassVar[tuple[str, ...]] = ()  # of `networks.views.VIEWS`, those that only some systems have

    def __init__(self, backbone: Backbone, options: object, shared: Shared):
        super().__init__()
        self.options = options
        self.input_size = shared.input_size  # side in pixels of what the backbone sees
        self.raw_size = self.input_size  # the same of the first pass, over the whole picture
        self.backbone = backbone
        self.dropout = nn.Dropout(shared.dropout)
        # Where `ensembling` is learned, [len(prediction)], not negative: the weight of each branch's log-probabilities
        self.register_buffer(ENSEMBLE_WEIGHTS, None)
        self.colocalization: nn.Module | None = None  # `networks.colocalization`, of a system that finds objects by it
        self.learned_localization: nn.Module | None = None  # the same of `networks.learned_localization`

    def forward(
        self,
        images: Tensor,
        *,
        labels: Tensor | None = None,
        mask_background: bool = False,
        branches: tuple[str, ...] | None = None,
    ) -> NetworkOutput:
        """Map normalised images [B, 3, S, S], S >= input_size, to a `NetworkOutput`.

        Only the passes that `branches` need are computed (None: all). `labels` [B] come in training, where
        `needs_labels`; `mask_background` blanks what is not the object, where the system knows that. A system that has
        a colocalization takes `boxes` [B, 4] besides, those that `find_objects` has found and augmentation has carried;
        without them it finds the objects itself. A learned localization is taught by them, and in evaluation leaves
        them aside.
        """
        raise NotImplementedError

    @property
    def takes_boxes(self) -> bool:
        """Whether `forward` takes the objects' `boxes`, which `find_objects` finds once, before training."""
        return self.colocalization is not None or self.learned_localization is not None

    def find_objects(self, images: Tensor) -> Tensor:
        """Return the boxes [B, 4] of the objects in normalised images [B, 3, S, S], in input_size pixels, inclusive.

        Only where `takes_boxes`, and after `prepare`: training does not change them. Where they teach a localization,
        until `objects_are_found`.
        """
        learned = self.learned_localization
        return (self.colocalization if learned is None else learned.teacher[0]).boxes(images)

    def is_taught_by(self, boxes: Tensor | None) -> bool:
        """Whether a pass with these boxes teaches a localization."""
        return self.training and boxes is not None and self.learned_localization is not None

    def objects_are_found(self) -> None:
        """Let go, before training, of what only `find_objects` needs."""
        if self.learned_localization is not None:
            self.learned_localization.forget_teacher()

    def steps(self, images: Tensor, labels: Tensor, boxes: Tensor | None = None) -> Iterator[Step]:
        """Yield the optimizer steps of a batch of normalised images [B, 3, S, S] and labels [B].

        A step is taken before the next one is asked for, which so may look at the weights it has changed. `boxes`
        [B, 4] come only where `takes_boxes`.
        """
        yield Step(images, labels, boxes=boxes)

    def losses(self, output: NetworkOutput, targets: Tensor, *, label_smoothing: float = 0.0) -> dict[str, Tensor]:
        """Return every loss term that an output allows, by name, as float32 scalars: the cross-entropy of each branch.

        And `localization`, where one is taught. `targets` [B] int64, or shares of the classes [B, classes] where
        `takes_mixed_pictures`. Cross-entropies weight the classes by `class_weights`; other terms do not.
        """
        terms = classification_losses(
            output, targets, label_smoothing=label_smoothing, class_weights=self.class_weights
        )
        if self.learned_localization is not None and output.extras is not None:
            terms["localization"] = self.learned_localization.loss(output.extras["inside"], output.extras["boxes"])
        return terms

    @classmethod
    def takes_mixed_pictures(cls) -> bool:
        """Whether it can be trained by mixup and CutMix: one branch, one step, and the losses above."""
        as_here = (getattr(cls, name) is getattr(System, name) for name in ("steps", "losses", "after_step"))
        return len(cls.branches) == 1 and not cls.needs_labels and all(as_here)

    def ensemble_by(self, ensembling: str) -> None:
        """Predict by one of `outputs.ENSEMBLINGS` from now on; weights that are to be learned begin equal."""
        self.ensembling, count = ensembling, len(self.prediction)
        device = next(self.parameters()).device
        learned = ensembling == "learned" and count > 1
        self.ensemble_weights = torch.full((count,), 1 / count, device=device) if learned else None

    def predict_logits(self, output: NetworkOutput) -> Tensor:
        """Return the prediction, logits [B, classes], of the branches of `prediction` ensembled by `ensembling`."""
        return combine_branches(output, self.prediction, self.ensembling, self.ensemble_weights)

    def branch_weights(self) -> Tensor | None:
        """Return how much each branch of `prediction` counts in it, [len(prediction)]; None: all alike."""
        return self.ensemble_weights

    def heads(self) -> list[nn.Module]:
        """Return the parts that start from random weights and may want a higher learning rate than the trunk."""
        return [self.classifier]

    def parameter_groups(self) -> dict[str, list[nn.Parameter]]:
        """Return all trainable parameters by group: `trunk` learns at the learning rate, `heads` times its factor."""
        parts = [part for part in (*self.heads(), self.learned_localization) if part is not None]
        heads = [p for part in parts for p in part.parameters() if p.requires_grad]
        known = {id(p) for p in heads}
        trunk = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        return {"trunk": trunk, "heads": heads}

    def masks_background(self, epoch: int) -> bool:
        """Whether the background is masked in an epoch, counted from 1."""
        return False

    def prepare(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Look at the training images before a new run, such as for a k-means start, and change weights or buffers.

        Called in every process, with batches of all its training images as the first epoch could show them (but for a
        last incomplete batch): normalised images [B, 3, S, S] and labels [B], on the device. Here a colocalization is
        fitted, where there is one.
        """
        pictures = (images for images, _ in batches)
        if self.colocalization is not None:
            self.colocalization.fit(pictures)
        if self.learned_localization is not None:
            self.learned_localization.take_teacher(self.backbone, self.input_size, pictures)

    def use_own_view(self, view: str) -> int:
        """Use one of `own_views` from here on; return how many views that are with the picture."""
        raise NotImplementedError

    def after_step(self, output: NetworkOutput, targets: Tensor) -> None:
        """Change buffers after an optimizer step, such as moving averages; nothing here has a gradient."""
