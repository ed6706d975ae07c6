"""Predictions as COCO's result files: what the evaluation servers and other tools read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dinat import rle
from dinat.files import write_atomically, write_text


def detection_records(
    image_id: int, file_name: str, prediction: dict[str, Any], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The detections of an image as COCO's records: box [left, top, width, height], score, run-length encoded mask.

    Args:
        file_name: of the image; COCO has none here, and its readers do not mind.
        prediction: `boxes` (N, 4) XYXY, `scores`, `labels` and perhaps `masks` (N, H, W), in the original frame.
        category_ids: the data's id of each label.
    """
    boxes = prediction["boxes"].detach().double().cpu()
    columns = (boxes.tolist(), prediction["scores"].tolist(), prediction["labels"].tolist())
    records = [
        {
            "image_id": image_id,
            "file_name": file_name,
            "category_id": category_ids[label],
            "bbox": [left, top, right - left, bottom - top],
            "score": score,
        }
        for (left, top, right, bottom), score, label in zip(*columns, strict=True)
    ]
    if prediction.get("masks") is not None:
        for record, mask in zip(records, rle.encode(prediction["masks"]), strict=True):
            record["segmentation"] = mask
    return records


def write_detections(
    path: Path, predictions: Iterable[tuple[int, str, dict[str, Any]]], category_ids: Sequence[int]
) -> None:  # fmt: skip
    """Writes the records of all `(image_id, file name of the image, prediction)` as one JSON list."""
    records = [record for prediction in predictions for record in detection_records(*prediction, category_ids)]
    write_text(path, json.dumps(records))


def write_panoptic(
    path: Path, predictions: Iterable[tuple[int, str, dict[str, Any]]], category_ids: Sequence[int]
) -> None:  # fmt: skip
    """Writes a panoptic JSON file, and a PNG for each image into the folder of the same name.

    Args:
        predictions: (image_id, file name of the image, prediction with `panoptic` (H, W) and `segments`).
        category_ids: the data's id of each label.
    """
    folder = path.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    annotations = []
    for image_id, file_name, prediction in predictions:
        name = Path(file_name).with_suffix(".png").name
        write_ids(folder / name, prediction["panoptic"].cpu().numpy())
        segments = [
            {"id": segment["id"], "category_id": category_ids[segment["label"]]} for segment in prediction["segments"]
        ]
        annotations.append({"image_id": image_id, "file_name": name, "segments_info": segments})
    write_text(path, json.dumps({"annotations": annotations}))


def write_ids(path: Path, ids: np.ndarray) -> None:
    """Writes segment ids (H, W) as COCO's colours: red + 256 green + 65536 blue."""
    colours = np.stack([ids % 256, ids // 256 % 256, ids // 256**2], axis=-1).astype(np.uint8)
    write_atomically(path, lambda temporary: Image.fromarray(colours).save(temporary, format="PNG"))
