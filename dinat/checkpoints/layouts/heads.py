"""Heads and necks of other layouts, brought to our names by the rows of `mm.py` and `detectron2.py`.

Folders of transformers, and models of this package, have our own names, there without "network.".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from dinat.errors import CheckpointError

from . import detectron2, mm

# a pattern of the whole key, and its name here; or one name for each of the equal parts that the tensor is cut into
Row = tuple[str, str | tuple[str, ...]]


@dataclass(frozen=True)
class Head:
    """The parts of a dense model around its backbone, of one method.

    Attributes:
        rows: names of them in each layout.
        sign: a pattern that finds a key of this method, and no key of the others, in every layout.
        classifier: our name of a parameter with one entry for each class, and perhaps one more.
        per_class: a pattern of our names: of all that depends on the number of classes.
        optional: a pattern of our names: of parts that a model may be made without.
        of_training: another, of a part that files may lack as well.
        constants: our names of single tensors that files may lack.
    """

    rows: Sequence[Row]
    sign: str
    classifier: str
    per_class: str
    optional: str = "$^"
    of_training: str = "$^"
    constants: tuple[str, ...] = ()


_RCNN = [(r"(?:fpn|rpn|box_heads|box_predictors|mask_heads|mask_predictors)\..+", r"\g<0>")]
_QUERIES = [(r"(?:network\.)?((?:model|class_predictor|criterion)\..+)", r"network.\1")]
_RCNN_PER_CLASS = r"box_predictors\.|mask_predictors\.\d\.mask_fcn_logits\."
_MASKS, _EMPTY_WEIGHT = r"mask_(?:heads|predictors)\.", ("network.criterion.empty_weight",)

HEADS = {
    "mask_rcnn": Head(
        [*mm.MASK_RCNN, *_RCNN],
        sign=r"^roi_head\.bbox_head\.fc_cls|^box_heads\.0\.fc6",
        classifier="box_predictors.0.cls_score.bias",
        per_class=_RCNN_PER_CLASS,
        optional=_MASKS,
    ),
    "cascade_mask_rcnn": Head(
        [*mm.CASCADE_MASK_RCNN, *_RCNN],
        sign=r"^roi_head\.bbox_head\.2\.fc_cls|^box_predictors\.2\.",
        classifier="box_predictors.0.cls_score.bias",
        per_class=_RCNN_PER_CLASS,
        optional=_MASKS,
    ),
    "upernet": Head(
        [*mm.UPERNET, (r"network\.(.+)", r"network.\1")],
        sign=r"^(?:network\.)?decode_head\.",
        classifier="network.decode_head.classifier.bias",
        per_class=r"network\.\w+_head\.classifier\.",
        optional=r"network\.auxiliary_head\.",
    ),
    "mask2former": Head(
        [*detectron2.MASK2FORMER, *_QUERIES],
        sign=r"\.(?:query_feat|static_query|queries_features)\.",
        classifier="network.class_predictor.bias",
        per_class=r"network\.(?:class_predictor|criterion\.empty_weight)",
        constants=_EMPTY_WEIGHT,
    ),
    "oneformer": Head(
        [*detectron2.ONEFORMER, *_QUERIES],
        sign=r"\btask_mlp\.",
        classifier="network.model.transformer_module.decoder.class_embed.bias",
        per_class=r"network\.(?:model\.transformer_module\.decoder\.class_embed|criterion\.empty_weight)",
        optional=r"network\.criterion\.logit_scale$",
        of_training=r"network\.model\.text_mapper\.",
        constants=(*_EMPTY_WEIGHT, "network.criterion.logit_scale"),
    ),
}


def method_of(keys: Iterable[str]) -> str | None:
    """The method of a dense model with these keys, in any layout; None if it is none of `HEADS`."""
    keys = list(keys)
    return next((method for method, head in HEADS.items() if any(re.search(head.sign, key) for key in keys)), None)


def rename_heads(state: Mapping[str, Tensor], rows: Sequence[Row]) -> dict[str, Tensor]:
    """`state` under the names of the first row whose pattern is the key.

    Raises:
        CheckpointError: keys that no row is for.
    """
    out, unknown = {}, []
    for key, value in state.items():
        found = ((match, names) for pattern, names in rows if (match := re.fullmatch(pattern, key)))
        match, names = next(found, (None, ()))
        if match is None:
            unknown.append(key)
        elif isinstance(names, str):
            out[match.expand(names)] = value
        else:
            out |= {match.expand(n): x.clone() for n, x in zip(names, value.chunk(len(names)), strict=True)}
    if unknown:
        raise CheckpointError(f"{len(unknown)} keys of the checkpoint belong to no known part: {sorted(unknown)[:3]}.")
    return out
