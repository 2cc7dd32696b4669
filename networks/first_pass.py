"""The pass over the whole picture, by which a system finds the object that it looks at next.

To find an object takes less detail than to name it, so that the picture may be looked at smaller than its object is:
after the glance of Wang et al., "Glance and Focus: a Dynamic Approach to Reducing Spatial Redundancy in Image
Classification", NeurIPS 2020, section 3.
"""

from __future__ import annotations

from torch import Tensor

from networks.backbone import STRIDE
from networks.crops import refuse_unless_square, resize_images
from networks.outputs import Features
from networks.system import System
from utils.options import require


def check_raw_size(raw_size: int | None, input_size: int) -> None:
    """Raise SettingsError unless pictures of `input_size` pixels can be looked at in that size; None: in their own."""
    expected = f"a multiple of {STRIDE} from {3 * STRIDE} to input_size, {input_size}"
    fits = raw_size is None or (raw_size % STRIDE == 0 and 3 * STRIDE <= raw_size <= input_size)
    require(fits, "raw_size", raw_size, expected)


def look_at_picture(system: System, images: Tensor) -> Features:
    """Look at images [B, 3, S, S] scaled down to the system's `raw_size`, on a map of its `localization_stride`.

    Raises UserError where they are not square or smaller than its input_size.
    """
    refuse_unless_square(images, system.input_size)
    small = resize_images(images, system.raw_size)
    return system.backbone(small, dense=system.localization_stride < system.backbone.stride)
