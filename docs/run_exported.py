"""Run a file that export.py wrote, without this code base: `python run_exported.py model.pt2 PICTURE...`."""

import json
import sys

import numpy
import torch
from PIL import Image

facts = {"facts.json": ""}
model = torch.export.load(sys.argv[1], extra_files=facts).module()
facts = json.loads(facts["facts.json"])
size, first = (facts["resize_size"], facts["resize_size"]), round((facts["resize_size"] - facts["image_size"]) / 2)
seen = (first, first, first + facts["image_size"], first + facts["image_size"])  # the middle of it
pictures = [Image.open(path).convert("RGB").resize(size, Image.Resampling.BILINEAR) for path in sys.argv[2:]]
pictures = [picture.crop(seen) for picture in pictures]
images = torch.from_numpy(numpy.stack([numpy.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2)
for path, probabilities in zip(sys.argv[2:], model(images.contiguous())["probabilities"], strict=True):
    print(f"{path}: {facts['class_names'][probabilities.argmax()]} {probabilities.max():.1%}")
