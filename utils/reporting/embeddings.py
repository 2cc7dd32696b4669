"""The test images as TensorBoard's projector shows them: near each other where the network sees them alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from networks.outputs import Features
from utils.text import one_line
from utils.training.building import Trained

PROJECTED = 10_000  # pictures at most: more take minutes to write and to show


def project(trained: Trained, loader: DataLoader, class_names: Sequence[str]) -> dict[str, object]:
    """Return what TensorBoard's projector shows of the test images: an embedding each, its class, a small picture."""
    network, plan, execution = trained.network, trained.plan, trained.execution
    embeddings, thumbnails, class_of = [], [], []

    def keep(module: nn.Module, inputs: tuple, how: dict[str, object], output: Features) -> None:
        if how.get("kind") != "part":
            passes.append(output.embedding)

    hook = network.backbone.register_forward_hook(keep, with_kwargs=True)
    try:
        for batch in loader:
            passes = []
            with torch.no_grad(), execution.autocast():
                images = execution.images(batch.images)
                # `forward`, not a call: no other view
                network.forward(images, mask_background=plan.mask_background, branches=network.prediction)
            # the pass over the object where there is one, over the picture where not
            seen = [embedding for embedding in passes[:2] if len(embedding) == len(images)]
            embeddings.append(seen[-1].float().cpu())
            thumbnails.append(F.interpolate(batch.images.float(), size=(32, 32)) / 255)
            class_of += [one_line(" ".join(class_names[label].split())) for label in batch.labels.tolist()]
    finally:
        hook.remove()
    return {"mat": torch.cat(embeddings), "metadata": class_of, "label_img": torch.cat(thumbnails)}
