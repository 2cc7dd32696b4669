"""Run an ONNX file that export.py wrote, without PyTorch: `python run_exported_onnx.py model.onnx PICTURE...`."""

import json
import sys

import numpy
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1])
facts = {name: json.loads(value) for name, value in session.get_modelmeta().custom_metadata_map.items()}
size, first = (facts["resize_size"], facts["resize_size"]), round((facts["resize_size"] - facts["image_size"]) / 2)
seen = (first, first, first + facts["image_size"], first + facts["image_size"])  # the middle of it
pictures = [Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR) for path in sys.argv[2:]]
pictures = [picture.crop(seen) for picture in pictures]
images = numpy.stack([numpy.asarray(picture) for picture in pictures]).transpose(0, 3, 1, 2)
for path, probabilities in zip(sys.argv[2:], session.run(["probabilities"], {"images": images})[0], strict=True):
    print(f"{path}: {facts['class_names'][probabilities.argmax()]} {probabilities.max():.1%}")
