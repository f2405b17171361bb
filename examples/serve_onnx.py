"""Classifies photographs with an exported model: ``python serve_onnx.py MODEL.onnx PHOTO...``."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image


def prepare(photo, how):
    """A photograph as the model's input [1, C, H, W], prepared as its metadata say."""
    channels, height, width = how["input_size"]
    photo = photo.convert("RGB" if channels == 3 else "L")
    size = np.array([width, height]) / how["crop_pct"]  # before the crop
    if how["crop_mode"] != "squash":
        size = np.array(photo.size) * int(size[0]) / min(photo.size)
    kernel = Image.Resampling[how["interpolation"].upper()]
    photo = photo.resize(size.astype(int).tolist(), kernel)
    left, top = round((photo.width - width) / 2), round((photo.height - height) / 2)
    pixels = np.array(photo.crop((left, top, left + width, top + height)), np.float32) / 255
    pixels = (pixels.reshape(height, width, channels) - how["mean"]) / how["std"]
    return pixels.transpose(2, 0, 1)[None].astype(np.float32)


if __name__ == "__main__":
    model = onnxruntime.InferenceSession(sys.argv[1])
    told = {k: json.loads(v) for k, v in model.get_modelmeta().custom_metadata_map.items()}
    for file in sys.argv[2:]:
        image = prepare(Image.open(file), told["preprocessing"])
        logits, keep = model.run(None, {"image": image})
        best = int(logits[0].argmax())
        name = told.get("class_names", range(logits.shape[1]))[best]
        print(f"{file}: {name} ({keep[0, -1].sum()} of {keep.shape[2]} patches kept)")
