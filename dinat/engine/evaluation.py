"""The evaluation command: a checkpoint or a published model, on a data set, to a line of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import IterableDataset

from dinat.data import (
    Normalize,
    accepted_labels,
    class_to_idx,
    competing_classes,
    eval_loader,
    eval_transform,
    open_split,
    resolve_preprocessing,
)
from dinat.engine import checkpoint, report
from dinat.engine.distributed import join
from dinat.engine.models import autocast_dtype, build_model, check_model_name, find_weights, load_weights, to_dict
from dinat.engine.scoring import Scores, measure
from dinat.errors import UserError
from dinat.published import TOP1


@dataclass(frozen=True)
class Origin:
    """What a checkpoint tells about the run that it comes from; empty for a file of bare weights.

    `model` is a `model` section that builds the architecture, `classes` the class names in index order.
    """

    model: dict[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    classes: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, weights: Path | None) -> Origin:
        """The origin of a weights file: of a timm model folder, of a training checkpoint of ours, or of neither."""
        if weights is None:
            return cls()
        folder = weights.parent
        if weights.name == "model.safetensors" and (folder / "config.json").is_file():
            described = json.loads((folder / "config.json").read_text())
            run = OmegaConf.load(folder / "config.yaml") if (folder / "config.yaml").is_file() else None
            names = described.get("label_names") or []
            return cls({"name": f"local-dir:{folder}"}, described["num_classes"], list(names), to_dict(run))
        if weights.suffix == ".pt":
            saved = checkpoint.read_checkpoint(weights, key="checkpoint")
            return cls(saved["config"]["model"], saved["num_classes"], saved["classes"], saved["config"])
        return cls()


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates a model as `configs/eval.yaml` describes, and writes results.csv (and what else it asks for).

    What the configuration leaves at null is as in the run that the checkpoint comes from, so that `checkpoint=RUN`
    alone repeats the figure that training ended with.

    Returns:
        timm's columns (model, top1, top1_err, top5, top5_err, param_count in millions, img_size, crop_pct,
        interpolation), then loss, count, skipped and checkpoint.

    Raises:
        UserError: for a mistake in the configuration, the checkpoint or the data.
    """
    with join(cfg.runtime.device) as world, report.logging_to(None, world.primary):
        weights = find_weights(cfg.checkpoint, "checkpoint") if cfg.checkpoint else None
        origin = Origin.of(weights)
        data = merge_data(cfg.data, origin.config.get("data"))
        runtime = {"dtype": "float32", "workers": 0, "channels_last": False} | origin.config.get("runtime", {})
        runtime |= {key: value for key, value in cfg.runtime.items() if value is not None}
        batch_size = cfg.batch_size or origin.config.get("eval_batch_size", 256)
        benchmark = data.get("benchmark")
        if benchmark == "imagenet_real" and (cfg.per_class or cfg.confusion):
            raise UserError(
                "per_class and confusion need one label per image, data.benchmark=imagenet_real has any number."
            )
        dtype = autocast_dtype(runtime["dtype"])
        section = model_section(cfg.model, origin)
        check_model_name(section["name"])
        class_map = {name: index for index, name in enumerate(origin.classes)} or None
        dataset = open_split(data, "validation", class_map=class_map)

        model = build(section, origin, weights, cfg.use_ema, data, dataset).to(world.device)
        if runtime["channels_last"]:
            model = model.to(memory_format=torch.channels_last)
        if runtime["compile"]:
            model.compile()
        preprocessing = resolve_preprocessing(data, model, section["kwargs"].get("img_size"))
        loader = eval_loader(
            dataset, eval_transform(preprocessing), preprocessing["input_size"], batch_size=batch_size,
            rank=world.rank, ranks=world.size, workers=runtime["workers"], pin_memory=world.device.type == "cuda",
        )  # fmt: skip
        total = None if isinstance(dataset, IterableDataset) else len(loader)
        with report.Bar("evaluation", total, batch_size * world.size, primary=world.primary) as bar:
            scores = measure(
                model,
                loader,
                world,
                num_classes=model.num_classes,
                prepare=Normalize(preprocessing, world.device, runtime["channels_last"]),
                autocast=partial(torch.autocast, world.device.type, dtype, enabled=dtype != torch.float32),
                on_bad_image=data["on_bad_image"],
                confusion=cfg.confusion,
                competing=competing_classes(benchmark),
                accepted=accepted_labels(benchmark),
                tick=bar.advance,
            )
        row = results_row(model, preprocessing, scores)
        if world.primary:
            folder = Path(cfg.output or (weights.parent if weights else "."))
            folder.mkdir(parents=True, exist_ok=True)
            names = origin.classes or list(class_to_idx(dataset)) or [str(i) for i in range(model.num_classes)]
            report.write_csv(folder / "results.csv", [row])
            if cfg.table:
                published = TOP1.get(full_name(model)) if section["pretrained"] and benchmark == "imagenet" else None
                report.add_row(Path(cfg.table), table_row(row, benchmark or data["name"], published))
            if cfg.per_class:
                report.write_csv(folder / "per_class.csv", per_class_rows(scores, names))
            if cfg.confusion:
                report.draw_confusion(folder / "confusion.png", scores, names)
        return row | {"count": scores.count, "skipped": scores.skipped, "checkpoint": str(weights) if weights else None}


def merge_data(data: DictConfig, trained: Mapping[str, Any] | None) -> dict[str, Any]:
    """The `data` section to use: the given one if it names a data set, else the run's with what is given changed."""
    given = to_dict(data)
    chosen = {key: value for key, value in given.items() if value is not None}
    if "name" in chosen:
        return {**given, "val_split": "validation", "on_bad_image": "skip", "download": False, **chosen}
    if not trained:
        raise UserError(
            "data is not chosen, and the checkpoint does not tell. Set it, e.g. data=folder data.root=PATH."
        )
    return {**trained, **chosen}


def model_section(model: DictConfig, origin: Origin) -> dict[str, Any]:
    """The `model` section to build from: what is given, on what the checkpoint tells."""
    section = {"pretrained": False, "checkpoint": None, "drop_path_rate": None, "kwargs": {}} | origin.model
    section |= {"checkpoint": None, "pretrained": model.pretrained}
    section["kwargs"] = {**to_dict(section["kwargs"]), **to_dict(model.kwargs)}
    section["name"] = model.name or section.get("name")
    if section["name"] is None:
        raise UserError("model.name is not set, and the checkpoint does not tell. Set it to the weights' architecture.")
    return section


def build(
    section: dict[str, Any], origin: Origin, weights: Path | None, use_ema: bool, data: Mapping[str, Any], dataset: Any
) -> nn.Module:
    """The model with its weights, checked against the classes of the data."""
    classes = class_to_idx(dataset)
    in_data = max(classes.values()) + 1 if classes else data["num_classes"]
    model = build_model(section, origin.num_classes or (in_data if weights else None))
    if in_data is not None and in_data != model.num_classes:
        raise UserError(
            f"class counts differ: the model has {model.num_classes}, the data {in_data}. "
            "Evaluate on the data that the model was trained for, or map its classes with data.class_map."
        )
    if weights:
        load_weights(model, weights, use_ema=use_ema)
    return model


def results_row(model: nn.Module, preprocessing: Mapping[str, Any], scores: Scores) -> dict[str, Any]:
    """A row of timm's results tables, and the loss."""
    return {
        "model": model.pretrained_cfg["architecture"],
        "top1": round(scores.top1, 4),
        "top1_err": round(100 - scores.top1, 4),
        "top5": round(scores.top5, 4),
        "top5_err": round(100 - scores.top5, 4),
        "param_count": round(sum(parameter.numel() for parameter in model.parameters()) / 1e6, 2),
        "img_size": preprocessing["input_size"][-1],
        "crop_pct": preprocessing["crop_pct"],
        "interpolation": preprocessing["interpolation"],
        "loss": round(scores.loss, 6),
    }


def full_name(model: nn.Module) -> str:
    """Name and tag of a timm model."""
    return ".".join(filter(None, (model.pretrained_cfg["architecture"], model.pretrained_cfg.get("tag"))))


def table_row(row: Mapping[str, Any], data: str, published: float | None) -> dict[str, Any]:
    """A row of the table of many evaluations: the data, timm's columns, published top-1, ours minus it."""
    difference = None if published is None else round(row["top1"] - published, 4)
    return {"data": data, **row, "published": published, "difference": difference}


def per_class_rows(scores: Scores, names: list[str]) -> list[dict[str, Any]]:
    """Images, correct ones and accuracy (%) of each class; accuracy is None for a class without images."""
    counts = zip(scores.total.tolist(), scores.correct.tolist(), strict=True)
    return [
        {
            "class": index,
            "name": name,
            "count": total,
            "correct": correct,
            "top1": 100 * correct / total if total else None,
        }
        for index, (name, (total, correct)) in enumerate(zip(names, counts, strict=True))
    ]
