"""The model card of a folder, README.md: what the Hugging Face hub shows of a model, and finds it by."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from dinat.files import read_json

SHOWN = 20  # classes that a card names

IN_TIMM = """\
import dinat, timm

model = timm.create_model("hf-hub:OWNER/NAME", pretrained=True)  # or local-dir:FOLDER"""
IN_DINAT = """\
from dinat import dense
from huggingface_hub import snapshot_download

model = dense.create_model("local-dir:" + snapshot_download("OWNER/NAME"), pretrained=True)"""
IN_TRANSFORMERS = """\
import dinat.integrations.transformers
from transformers import {0}

dinat.integrations.transformers.enable()
model = {0}.from_pretrained("OWNER/NAME")"""


def model_card(
    folder: Path,
    hub_task: str,
    data: str = "",
    figures: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None,
    training: Mapping[str, Any] | None = None,
) -> ModelCard:
    """The card of a model folder, from its config.json and what is known of the training.

    Args:
        folder: with a config.json of ours, of timm or of transformers.
        hub_task: the hub's word for what the model does, such as "object-detection"; of transformers' models for
            segmentation, whose config.json tells, "image-segmentation" in its place.
        data: name of the data set; "" where nobody knows.
        figures: of the validation split, in percent, but for a loss.
        labels: what people call the figures.
        training: settings worth a line.
    """
    config = read_json(folder / "config.json")
    if "task" in config:
        library, code, name = "dinat", IN_DINAT, "_".join(filter(None, map(config["model"].get, ("name", "backbone"))))
    elif "model_type" in config:
        (cls,) = config.get("architectures") or ["AutoModelForImageClassification"]
        library, code, name = "transformers", IN_TRANSFORMERS.format(cls), config["model_type"]
        hub_task = "image-segmentation" if "Segmentation" in cls else hub_task
    else:
        library, code, name = "timm", IN_TIMM, config["architecture"]
    classes = config.get("label_names") or [*config.get("id2label", {}).values()]
    count = config.get("num_classes", len(classes))
    results = [
        EvalResult(
            task_type=hub_task,
            dataset_type=data,
            dataset_name=data,
            dataset_split="validation",
            metric_type=figure,
            metric_name=(labels or {}).get(figure, figure),
            metric_value=round(value, 4),
        )
        for figure, value in (figures or {}).items()
    ]
    on_hub = data.startswith("hfds/")  # the hub does not know others
    metadata = ModelCardData(
        library_name=library,
        pipeline_tag=hub_task,
        tags=["neighborhood-attention", "dinat"],
        datasets=[data.split(":")[0].removeprefix("hfds/")] if on_hub else None,
        **({"model_name": name, "eval_results": results} if results else {}),
    )
    parts = [f"# {name}", f"`{name}`, {count} classes" + (f", trained on `{data}`." if data else ".")]
    parts += ["## Use", f"```python\n{code}\n```"]
    if results:
        rows = [(result.metric_name, f"{result.metric_value:.2f}") for result in results]
        parts += ["## Figures", "Of the validation split; in percent, but for a loss.", _table("figure", "value", rows)]
    if training:
        parts += ["## Training", _table("setting", "value", training.items())]
    if classes:
        more = f", and {len(classes) - SHOWN} more, in config.json" if len(classes) > SHOWN else ""
        parts += ["## Classes", ", ".join(classes[:SHOWN]) + more + "."]
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _table(left: str, right: str, rows: Any) -> str:
    return "\n".join([f"| {left} | {right} |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
