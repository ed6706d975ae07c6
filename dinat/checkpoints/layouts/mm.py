"""Heads of mmdetection 2 and mmsegmentation 0.x, as published with NAT and DiNAT; see `heads.rename_heads`."""

UPERNET = [
    (r"(.+)\.bn\.(\w+)", r"network.\1.batch_norm.\2"),
    (r"(.+)\.conv_seg\.(\w+)", r"network.\1.classifier.\2"),
    (r"((?:decode|auxiliary)_head\..+)", r"network.\1"),
]

RCNN = [
    (r"neck\.lateral_convs\.(\d)\.conv\.(\w+)", r"fpn.inner_blocks.\1.0.\2"),
    (r"neck\.fpn_convs\.(\d)\.conv\.(\w+)", r"fpn.layer_blocks.\1.0.\2"),
    (r"rpn_head\.rpn_conv\.(\w+)", r"rpn.head.conv.0.0.\1"),
    (r"rpn_head\.rpn_cls\.(\w+)", r"rpn.head.cls_logits.\1"),
    (r"rpn_head\.rpn_reg\.(\w+)", r"rpn.head.bbox_pred.\1"),
]

_BOXES = [
    (r"fc_cls\.(\w+)", r"box_predictors.{}.cls_score.\1"),
    (r"fc_reg\.(\w+)", r"box_predictors.{}.bbox_pred.\1"),
]

_MASKS = [
    (r"convs\.(\d)\.conv\.(\w+)", r"mask_heads.{}.\1.0.\2"),
    (r"upsample\.(\w+)", r"mask_predictors.{}.conv5_mask.\1"),
    (r"conv_logits\.(\w+)", r"mask_predictors.{}.mask_fcn_logits.\1"),
]

_TWO_LAYERS = [
    (r"shared_fcs\.0\.(\w+)", r"box_heads.{}.fc6.\1"),
    (r"shared_fcs\.1\.(\w+)", r"box_heads.{}.fc7.\1"),
]

_CONVOLUTIONS = [
    (r"shared_convs\.(\d)\.conv\.(\w+)", r"box_heads.{}.\1.0.\2"),
    (r"shared_convs\.(\d)\.bn\.(\w+)", r"box_heads.{}.\1.1.\2"),
    (r"shared_fcs\.0\.(\w+)", r"box_heads.{}.5.\1"),
]


def _stage(prefix: str, stage: int, rows: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(prefix + pattern, name.replace("{}", str(stage))) for pattern, name in rows]


MASK_RCNN = [
    *RCNN,
    *_stage(r"roi_head\.bbox_head\.", 0, _BOXES + _TWO_LAYERS),
    *_stage(r"roi_head\.mask_head\.", 0, _MASKS),
]

CASCADE_MASK_RCNN = [
    *RCNN,
    *(row for s in range(3) for row in _stage(rf"roi_head\.bbox_head\.{s}\.", s, _BOXES + _CONVOLUTIONS)),
    *(row for s in range(3) for row in _stage(rf"roi_head\.mask_head\.{s}\.", s, _MASKS)),
]
