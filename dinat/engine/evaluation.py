"""The evaluation command: a checkpoint or a published model, on a data set, to a line of results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch.utils.data import IterableDataset

from dinat import dense
from dinat.distributed import join
from dinat.engine import checkpoint, report
from dinat.engine.scoring import measure
from dinat.engine.settings import check_settings
from dinat.errors import UserError
from dinat.files import read_json, write_csv
from dinat.tasks import Origin, find_task
from dinat.tasks.models import find_weights, to_channels_last, to_dict


def evaluate(cfg: DictConfig) -> dict[str, Any]:
    """Evaluates a model as `configs/eval.yaml` describes, and writes results.csv (and what else it asks for).

    What the configuration leaves at null is as in the run that the checkpoint comes from, so that `checkpoint=RUN`
    alone repeats the figure that training ended with.

    Returns:
        The columns of results.csv (timm's for classification: model, top1, top1_err, top5, top5_err, param_count in
        millions, img_size, crop_pct, interpolation, then loss), then task, headline (which figure counts), count,
        skipped and checkpoint.

    Raises:
        UserError: for a mistake in the configuration, the checkpoint or the data.
    """
    check_settings(cfg, null=True)
    with join(cfg.runtime.device) as world, report.logging_to(None, world.primary):
        given = {"checkpoint": cfg.checkpoint, "model.checkpoint": cfg.model.checkpoint}
        origin = origin_of(next((find_weights(path, key) for key, path in given.items() if path), None))
        data = merge_data(cfg.data, origin.config.get("data"))
        runtime = {"dtype": "float32", "workers": 0, "channels_last": False} | origin.config.get("runtime", {})
        runtime |= {key: value for key, value in cfg.runtime.items() if value is not None}
        section = model_section(cfg.model, origin)
        name = cfg.test.task or origin.task or dense.task_of(section["name"]) or "classification"
        task = find_task(name)(data, section, runtime, world, cfg.test)
        task.check_details(per_class=cfg.per_class, confusion=cfg.confusion)
        task.open_validation(origin)

        model = task.load_model(origin, cfg.use_ema).to(world.device)
        if runtime["channels_last"]:
            model = to_channels_last(model)
        if runtime["compile"]:
            model.compile()
        batch_size = cfg.batch_size or origin.config.get("eval_batch_size", task.eval_batch_size)
        loader = task.eval_loader(batch_size)
        total = None if isinstance(loader.dataset, IterableDataset) else len(loader)
        with report.Bar("evaluation", total, batch_size * world.size, primary=world.primary) as bar:
            details = {"per_class": cfg.per_class, "confusion": cfg.confusion}
            scores = measure(task, model, loader, tick=bar.advance, **details)
        row = task.results_row(model, scores.figures)
        if world.primary:
            folder = Path(cfg.output or (origin.weights.parent if origin.weights else "."))
            folder.mkdir(parents=True, exist_ok=True)
            write_csv(folder / "results.csv", [row])
            if cfg.table:
                source, published = data.get("benchmark") or data["name"], task.published(model)
                report.add_row(Path(cfg.table), table_row(row, task.headline, source, published), task.headline)
            if scores.per_class is not None:
                write_csv(folder / "per_class.csv", scores.per_class)
            if scores.confusion is not None:
                names = task.classes or list(map(str, range(task.num_classes)))
                report.draw_confusion(folder / "confusion.png", scores.confusion, names)
        weights = str(origin.weights) if origin.weights else None
        return row | {
            "task": name,
            "headline": task.headline,
            "count": scores.count,
            "skipped": scores.skipped,
            "checkpoint": weights,
        }


def origin_of(weights: Path | None) -> Origin:
    """The origin of a weights file: of an exported model folder, of a training checkpoint of ours, or of neither."""
    if weights is None:
        return Origin()
    folder = weights.parent
    if weights.name == "model.safetensors" and (folder / "config.json").is_file():
        described = read_json(folder / "config.json")
        if "num_classes" not in described:  # not of ours or timm's, but of transformers
            return Origin(weights)
        run = to_dict(OmegaConf.load(folder / "config.yaml")) if (folder / "config.yaml").is_file() else {}
        classes, task = list(described.get("label_names") or []), described.get("task", "classification")
        return Origin(weights, {"name": f"local-dir:{folder}"}, described["num_classes"], classes, run, task)
    if weights.suffix == ".pt":
        saved = checkpoint.read_checkpoint(weights, key="checkpoint")
        config = saved["config"]
        return Origin(
            weights,
            config["model"],
            saved["num_classes"],
            saved["classes"],
            config,
            config.get("task", "classification"),
        )
    return Origin(weights)


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
    section = {"backbone": None, "drop_path_rate": None, "kwargs": {}} | origin.model
    section |= {"checkpoint": None, "pretrained": model.pretrained}
    section["backbone"] = model.backbone or section["backbone"]
    section["kwargs"] = {**to_dict(section["kwargs"]), **to_dict(model.kwargs)}
    section["name"] = model.name or section.get("name")
    if section["name"] is None:
        raise UserError("model.name is not set, and the checkpoint does not tell. Set it to the weights' architecture.")
    return section


def table_row(row: Mapping[str, Any], headline: str, data: str, published: float | None) -> dict[str, Any]:
    """A row of the table of many evaluations: the data, the result's columns, the published figure, ours minus it."""
    difference = None if published is None else round(row[headline] - published, 4)
    return {"data": data, **row, "published": published, "difference": difference}
