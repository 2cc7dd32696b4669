"""Run a file that export.py wrote, without this code base: `python run_exported.py model.pt2 PICTURE...`."""

import json
import sys

import numpy
import torch
from PIL import Image, ImageOps


def load(path, at_least):
    """Upright RGB: a large JPEG decoded smaller, 16 bits as 8, what is transparent on white; and its size in full."""
    picture = Image.open(path)
    stored, sideways = picture.size, picture.getexif().get(0x0112, 1) >= 5
    drafted = picture.format == "JPEG" and picture.draft(None, (at_least, at_least))
    picture = ImageOps.exif_transpose(picture)
    size = (stored[::-1] if sideways else stored) if drafted else picture.size
    if picture.mode.startswith("I"):
        picture = Image.fromarray((numpy.asarray(picture).clip(0, 65535) / 257).round().astype("uint8"))
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    return picture.convert("RGB"), size


facts = {"facts.json": ""}
model = torch.export.load(sys.argv[1], extra_files=facts).module()
facts = json.loads(facts["facts.json"])
for path in sys.argv[2:]:
    shorter, seen = facts["resize_size"], facts["image_size"]
    picture, size = load(path, 2 * shorter)
    sides = size if facts["keep_aspect_ratio"] else (1, 1)
    size = [min(int(shorter * side / min(sides)), 4 * shorter) for side in sides]
    left, top = (round((side - seen) / 2) for side in size)  # the middle is what the network was trained to see
    picture = picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + seen, top + seen))
    images = torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None].to(facts.get("device", "cpu"))
    probabilities = model(images)["probabilities"][0]
    print(f"{path}: {facts['class_names'][probabilities.argmax()]} {probabilities.max():.1%}")
