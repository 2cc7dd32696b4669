"""Run an ONNX file that export.py wrote, without PyTorch: `python run_exported_onnx.py model.onnx PICTURE...`."""

import json
import sys

import numpy
import onnxruntime
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


session = onnxruntime.InferenceSession(sys.argv[1])
facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
for path in sys.argv[2:]:
    shorter, seen = facts["resize_size"], facts["image_size"]
    picture, size = load(path, 2 * shorter)
    sides = size if facts["keep_aspect_ratio"] else (1, 1)
    size = [min(int(shorter * side / min(sides)), 4 * shorter) for side in sides]
    left, top = (round((side - seen) / 2) for side in size)  # the middle is what the network was trained to see
    picture = picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + seen, top + seen))
    probabilities = session.run(["probabilities"], {"images": numpy.array(picture).transpose(2, 0, 1)[None]})[0][0]
    print(f"{path}: {facts['class_names'][probabilities.argmax()]} {probabilities.max():.1%}")
