"""Run an ONNX file that export.py wrote, without PyTorch: `python run_exported_onnx.py model.onnx PICTURE...`."""

import json
import sys

import numpy
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
for path in sys.argv[2:]:
    picture, shorter, seen = Image.open(path).convert("RGB"), facts["resize_size"], facts["image_size"]
    sides = picture.size if facts["keep_aspect_ratio"] else (1, 1)
    size = [min(int(shorter * side / min(sides)), 4 * shorter) for side in sides]
    left, top = (round((side - seen) / 2) for side in size)  # the middle is what the network was trained to see
    picture = picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + seen, top + seen))
    probabilities = session.run(["probabilities"], {"images": numpy.array(picture).transpose(2, 0, 1)[None]})[0][0]
    print(f"{path}: {facts['class_names'][probabilities.argmax()]} {probabilities.max():.1%}")
