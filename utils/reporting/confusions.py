"""Which classes are taken for which: a matrix [C, C] of counts, rows true classes, columns predicted ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from utils.errors import UserError

MATRIX_CLASSES = 1000  # of more, a report lists the pairs: a whole matrix is too large for browsers and spreadsheets


def confusion_matrix(predictions: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """Count [C, C] int64 of images by true class (row) and predicted class (column), from two [B] int64 tensors.

    Raises:
        UserError: a prediction or a label outside 0 .. num_classes - 1.
    """
    for name, values in (("prediction", predictions), ("label", labels)):
        if values.numel() > 0 and not 0 <= int(values.min()) <= int(values.max()) < num_classes:
            raise UserError(f"a {name} in {int(values.min())} .. {int(values.max())} with {num_classes} classes")
    pairs = labels.long() * num_classes + predictions.long()
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def worst_confusions(matrix: Tensor, class_names: Sequence[str], count: int = 10) -> list[dict[str, str | int | float]]:
    """The most frequent mistakes of a confusion matrix [C, C], the most frequent first.

    Returns:
        dicts of `true` and `predicted` (class names), `count` (images), `share` (of the images of the true class).
    """
    images_per_class = matrix.sum(dim=1).tolist()
    return [
        {
            "true": class_names[true],
            "predicted": class_names[predicted],
            "count": images,
            "share": images / images_per_class[true],
        }
        for true, predicted, images in confusions(matrix)[:count].tolist()
    ]


def confusions(matrix: Tensor) -> Tensor:
    """Return the mistakes in a confusion matrix [C, C], the most frequent first: rows of true class, predicted, images.

    Only pairs that happened, as of thousands of classes nearly none of all pairs does.
    """
    pairs = matrix.nonzero()
    pairs = pairs[pairs[:, 0] != pairs[:, 1]]
    images = matrix[pairs[:, 0], pairs[:, 1]]
    return torch.cat([pairs, images[:, None]], dim=1)[images.argsort(descending=True, stable=True)]


def classes_with_images(matrix: Tensor) -> int:
    """How many classes of a confusion matrix [C, C] have images."""
    return int((matrix.sum(dim=1) > 0).sum())


def mean_per_class_accuracy(matrix: Tensor) -> float:
    """Mean of the accuracies of the classes in a confusion matrix [C, C]; classes without images are left out."""
    images_per_class = matrix.sum(dim=1)
    present = images_per_class > 0
    if not present.any():
        return 0.0
    return (matrix.diagonal()[present].double() / images_per_class[present]).mean().item()
