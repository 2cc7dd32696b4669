"""NABirds, in the layout of CUB-200-2011.

Source: Van Horn et al., "Building a bird recognition app and large scale dataset with citizen scientists" (CVPR 2015).
"""

from __future__ import annotations

from utils.data.catalogue import Catalogue, Source
from utils.data.readers.cub import read_birds


def read(source: Source) -> Catalogue:
    return read_birds(source.folder(), folder="nabirds")
