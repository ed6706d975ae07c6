"""The 49 published models for dense prediction: what each is made of, how it was tested, what its authors reached.

Detectors and UPerNet are of https://github.com/SHI-Labs/Neighborhood-Attention-Transformer (arXiv:2204.07143 for NAT,
arXiv:2209.15001 for DiNAT and DiNAT_s), as is Mask2Former; OneFormer is of https://github.com/SHI-Labs/OneFormer
(arXiv:2211.06220). Everything is from the configurations there. None of the figures is measured here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import PretrainedCfg

from dinat.classes import CLASSES, Classes

Dilations = tuple[tuple[int, ...], ...]  # of every block, by level


@dataclass(frozen=True)
class Published:
    """A published model.

    Attributes:
        name: METHOD_BACKBONE.DATA.
        method: as in `dinat.dense.METHODS`.
        backbone: a timm model of this package; its tag is of the weights that training began with.
        dilations: of every block, by level.
        task: that it was trained for, as in `DenseModel.tasks`.
        data: the key of its classes in `dinat.classes.CLASSES`.
        resize: of a test image, as in `dinat.data.dense_transforms`.
        figures: of the validation split, in percent: `box_ap`, `mask_ap`, `miou`, `pq`, `pq_things`, `pq_stuff`, of
            one scale; `miou_multi_scale` of several, with mirrored images.
        path: of the weights on the publisher's server.
        hub: their repository on the Hugging Face hub.
        head: arguments of the method's class, where the published model has other than the class's own.
        multi_scale: (shortest, longest) of every scale of a test with several, each also mirrored.
    """

    name: str
    method: str
    backbone: str
    dilations: Dilations
    task: str
    data: str
    resize: dict[str, Any]
    figures: dict[str, float]
    path: str
    hub: str | None = None
    head: dict[str, Any] = field(default_factory=dict)
    multi_scale: tuple[tuple[int, int], ...] = ()
    host: ClassVar[str] = "https://shi-labs.com"

    @property
    def classes(self) -> Classes:
        return CLASSES[self.data]

    @property
    def arguments(self) -> dict[str, Any]:
        """What the method's class is called with."""
        things = {"things": list(self.classes.things)} if self.task == "panoptic" else {}
        dilations = [list(level) for level in self.dilations]
        return {
            "num_classes": len(self.classes), "backbone": self.backbone, "backbone_kwargs": {"dilations": dilations},
            "task": self.task, **things, **self.head,
        }  # fmt: skip

    @property
    def preprocessing(self) -> dict[str, Any]:
        """What is done to a test image, as config.json of a model folder says it."""
        return {
            "mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD),
            "transform": [{"resize": dict(self.resize)}],
            "views": [[{"resize": {**self.resize, "shortest": a, "longest": b}}] for a, b in self.multi_scale],
        }  # fmt: skip

    @property
    def described(self) -> dict[str, Any]:
        """What config.json of a folder with this model says, see `dinat.dense.save`."""
        return {
            "task": self.task,
            "model": {"name": self.name, "backbone": None, "kwargs": {}},
            "num_classes": len(self.classes),
            "label_names": list(self.classes.names),
            "category_ids": list(self.classes.ids),
            "preprocessing": self.preprocessing,
        }

    @property
    def pretrained_cfg(self) -> PretrainedCfg:
        """Where the weights are, as timm says it of backbones."""
        of_oneformer = self.method == "oneformer"
        repository = "OneFormer" if of_oneformer else "Neighborhood-Attention-Transformer"
        paper = "2204.07143" if self.backbone.startswith("nat_") else "2209.15001"
        return PretrainedCfg(
            architecture=self.name.partition(".")[0],
            tag=self.name.partition(".")[2],
            url=f"{self.host}/projects/{self.path}",
            hf_hub_id=self.hub,
            num_classes=len(self.classes),
            license="mit",
            origin_url=f"https://github.com/SHI-Labs/{repository}",
            paper_ids=f"arXiv:{'2211.06220' if of_oneformer else paper}",
        )


_DEPTHS = {"nat_mini": (3, 4, 6, 5), "dinat_mini": (3, 4, 6, 5), "dinat_s_tiny": (2, 2, 6, 2)}
_DEPTHS |= dict.fromkeys(("dinat_s_small", "dinat_s_base", "dinat_s_large"), (2, 2, 18, 2))


def _backbone(name: str, dilations: str) -> dict[str, Any]:
    """The fields of a backbone; NAT has no dilations.

    Args:
        name: with the tag of its initial weights.
        dilations: as in "1 28 | 1 7 1 14 | ...": what the blocks of each level repeat; a level of fewer blocks has the
            last ones.
    """
    depths = _DEPTHS.get(name.partition(".")[0], (3, 4, 18, 5))
    levels = [level.split() for level in ("1 | 1 | 1 | 1" if name.startswith("nat_") else dilations).split("|")]
    fitted = ((level * n)[: max(n, len(level))][-n:] for level, n in zip(levels, depths, strict=True))
    return {"backbone": name, "dilations": tuple(tuple(map(int, level)) for level in fitted)}


def _initial(backbone: str) -> str:
    """The backbone with the tag of the weights that mm* models began with."""
    return f"{backbone}.shi_in22k" if backbone.endswith("large") else f"{backbone}.shi_in1k"


def _resize(shortest: int, longest: int, resample: str = "pil") -> dict[str, Any]:
    return {"shortest": shortest, "longest": longest, "resample": resample}


def _detectors() -> Iterator[Published]:
    for name, box_ap, mask_ap, path in (
        ("mask_rcnn_nat_mini", 46.5, 41.7, "nat/checkpoints/DET/nat_mini_maskrcnn.pth"),
        ("mask_rcnn_nat_tiny", 47.7, 42.6, "nat/checkpoints/DET/nat_tiny_maskrcnn.pth"),
        ("mask_rcnn_nat_small", 48.4, 43.2, "nat/checkpoints/DET/nat_small_maskrcnn.pth"),
        ("mask_rcnn_dinat_mini", 47.2, 42.5, "dinat/checkpoints/coco/maskrcnn_dinat_mini.pth"),
        ("mask_rcnn_dinat_tiny", 48.6, 43.5, "dinat/checkpoints/coco/maskrcnn_dinat_tiny.pth"),
        ("mask_rcnn_dinat_small", 49.3, 44.0, "dinat/checkpoints/coco/maskrcnn_dinat_small.pth"),
        ("mask_rcnn_dinat_s_tiny", 46.6, 42.1, "dinat/checkpoints/coco/maskrcnn_dinat_s_tiny.pth"),
        ("mask_rcnn_dinat_s_small", 48.6, 43.5, "dinat/checkpoints/coco/maskrcnn_dinat_s_small.pth"),
        ("cascade_mask_rcnn_nat_mini", 50.3, 43.6, "nat/checkpoints/DET/nat_mini_cascademaskrcnn.pth"),
        ("cascade_mask_rcnn_nat_tiny", 51.4, 44.5, "nat/checkpoints/DET/nat_tiny_cascademaskrcnn.pth"),
        ("cascade_mask_rcnn_nat_small", 52.0, 44.9, "nat/checkpoints/DET/nat_small_cascademaskrcnn.pth"),
        ("cascade_mask_rcnn_nat_base", 52.3, 45.1, "nat/checkpoints/DET/nat_base_cascademaskrcnn.pth"),
        ("cascade_mask_rcnn_dinat_mini", 51.2, 44.4, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_mini.pth"),
        ("cascade_mask_rcnn_dinat_tiny", 52.2, 45.1, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_tiny.pth"),
        ("cascade_mask_rcnn_dinat_small", 52.9, 45.8, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_small.pth"),
        ("cascade_mask_rcnn_dinat_base", 53.4, 46.2, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_base.pth"),
        ("cascade_mask_rcnn_dinat_large", 55.3, 47.8, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_large.pth"),
        ("cascade_mask_rcnn_dinat_s_tiny", 51.0, 44.1, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_s_tiny.pth"),
        ("cascade_mask_rcnn_dinat_s_small", 52.3, 45.2, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_s_small.pth"),
        ("cascade_mask_rcnn_dinat_s_base", 52.6, 45.3, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_s_base.pth"),
        ("cascade_mask_rcnn_dinat_s_large", 54.8, 47.2, "dinat/checkpoints/coco/cascadedmaskrcnn_dinat_s_large.pth"),
    ):
        method, backbone = re.fullmatch(r"(\w+_rcnn)_(\w+)", name).groups()
        yield Published(
            f"{name}.coco", method, task="detection", data="coco",
            **_backbone(_initial(backbone), "1 28 | 1 7 1 14 | 1 3 1 5 1 7 | 1 3"),
            resize=_resize(800, 1333, "bilinear"), figures={"box_ap": box_ap, "mask_ap": mask_ap}, path=path,
        )  # fmt: skip


# of models that were trained at 512, 640 and 1280 pixels
_DILATIONS_512 = "1 16 | 1 4 1 8 | 1 2 1 3 1 4 | 1 2"
_DILATIONS_640 = "1 20 | 1 5 1 10 | 1 2 1 3 1 4 1 5 1 2 1 3 1 4 1 5 1 5 | 1 2"
_DILATIONS_1280 = "1 28 | 1 7 1 14 | 1 3 1 5 1 5 1 7 1 3 1 5 1 5 1 7 1 7 | 1 3"
_RATIOS = (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)


def _upernets() -> Iterator[Published]:
    for backbone, miou, several, path in (
        ("nat_mini", 45.1, 46.4, "nat/checkpoints/SEG/nat_mini_upernet.pth"),
        ("nat_tiny", 47.1, 48.4, "nat/checkpoints/SEG/nat_tiny_upernet.pth"),
        ("nat_small", 48.0, 49.5, "nat/checkpoints/SEG/nat_small_upernet.pth"),
        ("nat_base", 48.5, 49.7, "nat/checkpoints/SEG/nat_base_upernet.pth"),
        ("dinat_mini", 45.8, 47.2, "dinat/checkpoints/ade20k/upernet_dinat_mini.pth"),
        ("dinat_tiny", 47.8, 48.8, "dinat/checkpoints/ade20k/upernet_dinat_tiny.pth"),
        ("dinat_small", 48.9, 49.9, "dinat/checkpoints/ade20k/upernet_dinat_small.pth"),
        ("dinat_base", 49.6, 50.4, "dinat/checkpoints/ade20k/upernet_dinat_base.pth"),
        ("dinat_large", 54.0, 54.9, "dinat/checkpoints/ade20k/upernet_dinat_large.pth"),
        ("dinat_s_tiny", 46.0, 47.4, "dinat/checkpoints/ade20k/upernet_dinat_s_tiny.pth"),
        ("dinat_s_small", 48.6, 49.9, "dinat/checkpoints/ade20k/upernet_dinat_s_small.pth"),
        ("dinat_s_base", 49.4, 50.2, "dinat/checkpoints/ade20k/upernet_dinat_s_base.pth"),
        ("dinat_s_large", 53.4, 54.6, "dinat/checkpoints/ade20k/upernet_dinat_s_large.pth"),
    ):
        # the configurations of the large models say 512, but their figures are of 640 pixels
        shortest, dilations = (640, _DILATIONS_640) if backbone.endswith("large") else (512, _DILATIONS_512)
        yield Published(
            f"upernet_{backbone}.ade20k", "upernet", task="semantic", data="ade20k",
            **_backbone(_initial(backbone), dilations),
            resize=_resize(shortest, 4 * shortest, "bilinear"), head={"size_divisor": 1},
            figures={"miou": miou, "miou_multi_scale": several}, path=path,
            multi_scale=tuple((int(shortest * ratio), int(4 * shortest * ratio)) for ratio in _RATIOS),
        )  # fmt: skip


_SIZES = {"coco": (800, 1333), "ade20k": (640, 2560), "cityscapes": (1024, 2048)}
_LONGEST = {"ade20k": 4480, "cityscapes": 4096}  # of a test at several scales


def _mask2formers() -> Iterator[Published]:
    dilations = "1 14 | 1 4 1 7 | 1 2 1 3 1 2 1 3 1 2 1 3 1 2 1 3 1 3 | 1"
    for data, task, figures in (
        ("coco", "instance", {"mask_ap": 50.8}),
        ("ade20k", "instance", {"mask_ap": 35.4}),
        ("cityscapes", "instance", {"mask_ap": 45.1}),
        ("ade20k", "semantic", {"miou": 57.3, "miou_multi_scale": 58.1}),
        ("cityscapes", "semantic", {"miou": 83.9, "miou_multi_scale": 84.5}),
        ("coco", "panoptic", {"pq": 58.5, "pq_things": 64.9, "pq_stuff": 48.8, "mask_ap": 49.2, "miou": 68.3}),
        ("ade20k", "panoptic", {"pq": 49.4, "mask_ap": 35.0, "miou": 56.3}),
        ("cityscapes", "panoptic", {"pq": 67.2, "mask_ap": 44.5, "miou": 83.4}),
    ):
        semantic = task == "semantic"
        shortest, longest = _SIZES[data]
        yield Published(
            f"mask2former_dinat_large.{data}_{task}", "mask2former",
            **_backbone("dinat_large_384_11x11.shi_in22k", dilations),
            task="detection" if task == "instance" else task,
            data=f"{data}_{task}" if f"{data}_{task}" in CLASSES else data,
            resize=_resize(shortest, longest), head={"queries": 100 if semantic else 200, "combine_first": semantic},
            figures=figures, path=f"dinat/checkpoints/m2f/mask2former_dinat_large_{data}_{task}.pth",
            multi_scale=tuple((int(shortest * ratio), _LONGEST[data]) for ratio in _RATIOS) if semantic else (),
        )  # fmt: skip


def _queries(count: int) -> dict[str, Any]:
    """Arguments of a OneFormer: as many instances as queries, and masks resized first, for every task."""
    return {"queries": count, "instances": count, "combine_first": False}


_ADE20K_SCALES = {
    640: tuple((shortest, 4480) for shortest in (320, 480, 640, 800, 960, 1120)),
    896: tuple((shortest, 6272) for shortest in (448, 678, 896, 1120, 1344, 1568)),
    1280: tuple((shortest, 8960) for shortest in (640, 960, 1280, 1600, 1920, 2240)),
}


def _ade20k_oneformer(name: str, shortest: int, queries: int, dilations: str, path: str, **figures: float) -> Published:
    return Published(
        name, "oneformer", task="panoptic", data="ade20k",
        **_backbone("dinat_large_384_11x11.shi_in22k_ft_in1k", dilations),
        resize=_resize(shortest, 4 * shortest), figures=figures, path=f"oneformer/ade20k/{path}",
        head={**_queries(queries), "object_threshold": 0.5}, multi_scale=_ADE20K_SCALES[shortest],
    )  # fmt: skip


def _oneformers() -> Iterator[Published]:
    """On the hub, only the repositories of Cityscapes and COCO say which model they hold."""
    yield _ade20k_oneformer(
        "oneformer_dinat_large.ade20k", 640, 250, _DILATIONS_640, "250_16_dinat_l_oneformer_ade20k_160k.pth",
        pq=50.5, mask_ap=36.0, miou=58.3, miou_multi_scale=58.4,
    )  # fmt: skip
    yield _ade20k_oneformer(
        "oneformer_dinat_large_896.ade20k", 896, 250, _DILATIONS_640,
        "896x896_250_16_dinat_l_oneformer_ade20k_160k.pth",
        pq=51.2, mask_ap=36.8, miou=58.1, miou_multi_scale=58.6,
    )  # fmt: skip
    yield _ade20k_oneformer(
        "oneformer_dinat_large_1280.ade20k", 1280, 250, _DILATIONS_1280,
        "1280x1280_250_16_dinat_l_oneformer_ade20k_160k.pth",
        pq=51.5, mask_ap=37.1, miou=58.3, miou_multi_scale=58.7,
    )  # fmt: skip
    yield _ade20k_oneformer(
        "oneformer_dinat_large_1280.coco_ft_ade20k", 1280, 150, _DILATIONS_1280,
        "coco_pretrain_1280x1280_150_16_dinat_l_oneformer_ade20k_160k.pth",
        pq=53.4, mask_ap=40.2, miou=58.4, miou_multi_scale=58.8,
    )  # fmt: skip
    yield Published(
        "oneformer_dinat_large.cityscapes", "oneformer", task="panoptic", data="cityscapes",
        **_backbone("dinat_large.shi_in22k", "1 18 | 1 5 1 9 | 1 2 1 3 1 4 | 1 2"),
        resize=_resize(*_SIZES["cityscapes"]), head=_queries(250),
        figures={"pq": 67.6, "mask_ap": 45.6, "miou": 83.1, "miou_multi_scale": 84.0},
        path="oneformer/cityscapes/250_16_dinat_l_oneformer_cityscapes_90k.pth",
        hub="shi-labs/oneformer_cityscapes_dinat_large",
        multi_scale=tuple((int(1024 * ratio), _LONGEST["cityscapes"]) for ratio in _RATIOS),
    )  # fmt: skip
    yield Published(
        "oneformer_dinat_large.coco", "oneformer", task="panoptic", data="coco_panoptic",
        **_backbone("dinat_large_384_11x11.shi_in22k_ft_in1k", _DILATIONS_640), resize=_resize(*_SIZES["coco"]),
        head=_queries(150),
        figures={"pq": 58.0, "pq_things": 64.3, "pq_stuff": 48.4, "mask_ap": 49.2, "miou": 68.1},
        path="oneformer/coco/150_16_dinat_l_oneformer_coco_100ep.pth", hub="shi-labs/oneformer_coco_dinat_large",
    )  # fmt: skip
    yield Published(
        "oneformer_dinat_large.mapillary", "oneformer", task="panoptic", data="mapillary",
        **_backbone("dinat_large_384_11x11.shi_in22k_ft_in1k", _DILATIONS_640), resize=_resize(2048, 2048),
        head=_queries(250), figures={"pq": 47.8, "miou": 64.0, "miou_multi_scale": 64.9},
        path="oneformer/mapillary/250_16_dinat_l_oneformer_mapillary_300k.pth",
    )  # fmt: skip


PUBLISHED = {row.name: row for row in (*_detectors(), *_upernets(), *_mask2formers(), *_oneformers())}
