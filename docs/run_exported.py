"""Run a file that export.py wrote, without this code base: `python run_exported.py model.pt2 PICTURE...`."""

import json
import sys

import numpy
import torch
from PIL import Image

facts = {"facts.json": ""}
model = torch.export.load(sys.argv[1], extra_files=facts).module()
facts = json.loads(facts["facts.json"])
for path in sys.argv[2:]:
    picture, shorter, seen = Image.open(path).convert("RGB"), facts["resize_size"], facts["image_size"]
    sides = picture.size if facts["keep_aspect_ratio"] else (1, 1)
    size = [min(int(shorter * side / min(sides)), 4 * shorter) for side in sides]
    left, top = (round((side - seen) / 2) for side in size)  # the middle is what the network was trained to see
    picture = picture.resize(size, Image.Resampling.BILINEAR).crop((left, top, left + seen, top + seen))
    probabilities = model(torch.from_numpy(numpy.array(picture)).permute(2, 0, 1)[None])["probabilities"][0]
    print(f"{path}: {facts['class_names'][probabilities.argmax()]} {probabilities.max():.1%}")
