"""Heads of Mask2Former and OneFormer as their authors published them (detectron2); see `heads.rename_heads`.

Ours are those of Hugging Face transformers.
"""

_PIXELS, _QUERIES = "network.model.pixel_level_module.decoder", "network.model.transformer_module"


def _rows(prefix: str, name: str, rows: list[tuple[str, str | tuple[str, ...]]]) -> list[tuple]:
    """`rows` below `prefix` there and `name` here."""
    return [
        (prefix + pattern, name + names if isinstance(names, str) else tuple(name + part for part in names))
        for pattern, names in rows
    ]


# older files lack the second "pixel_decoder."
_PIXEL_DECODER = [
    (r"input_proj\.(\d)\.(.+)", r".input_projections.\1.\2"),
    (r"transformer\.level_embed", ".level_embed"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm1\.(\w+)", r".encoder.layers.\1.self_attn_layer_norm.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.norm2\.(\w+)", r".encoder.layers.\1.final_layer_norm.\2"),
    (r"transformer\.encoder\.layers\.(\d+)\.linear([12])\.(\w+)", r".encoder.layers.\1.fc\2.\3"),
    (r"transformer\.encoder\.layers\.(\d+)\.self_attn\.(.+)", r".encoder.layers.\1.self_attn.\2"),
    (r"mask_features\.(\w+)", r".mask_projection.\1"),
    (r"(adapter|layer)_(\d)\.norm\.(\w+)", r".\1_\2.1.\3"),
    (r"(adapter|layer)_(\d)\.weight", r".\1_\2.0.weight"),
]

_MLP = r"layers\.(\d)\.(\w+)"
_SPLIT = tuple(rf".layers.\1.self_attn.{part}_proj.\2" for part in "qkv")

MASK2FORMER = [
    *_rows(r"sem_seg_head\.(?:pixel_decoder\.)?", _PIXELS, _PIXEL_DECODER),
    *_rows(
        r"sem_seg_head\.predictor\.",
        _QUERIES,
        [
            (r"(?:query_feat|static_query)\.weight", ".queries_features.weight"),
            (r"query_embed\.weight", ".queries_embedder.weight"),
            (r"level_embed\.weight", ".level_embed.weight"),
            (r"decoder_norm\.(\w+)", r".decoder.layernorm.\1"),
            (rf"mask_embed\.{_MLP}", r".decoder.mask_predictor.mask_embedder.\1.0.\2"),
        ],
    ),
    *_rows(
        r"sem_seg_head\.predictor\.transformer_",
        f"{_QUERIES}.decoder",
        [
            (r"self_attention_layers\.(\d)\.self_attn\.in_proj_(\w+)", _SPLIT),
            (r"self_attention_layers\.(\d)\.self_attn\.(.+)", r".layers.\1.self_attn.\2"),
            (r"self_attention_layers\.(\d)\.norm\.(\w+)", r".layers.\1.self_attn_layer_norm.\2"),
            (r"cross_attention_layers\.(\d)\.multihead_attn\.(.+)", r".layers.\1.cross_attn.\2"),
            (r"cross_attention_layers\.(\d)\.norm\.(\w+)", r".layers.\1.cross_attn_layer_norm.\2"),
            (r"ffn_layers\.(\d)\.linear([12])\.(\w+)", r".layers.\1.fc\2.\3"),
            (r"ffn_layers\.(\d)\.norm\.(\w+)", r".layers.\1.final_layer_norm.\2"),
        ],
    ),
    (r"sem_seg_head\.predictor\.class_embed\.(\w+)", r"network.class_predictor.\1"),
    (r"criterion\.empty_weight", "network.criterion.empty_weight"),
]

_ONEFORMER_SPLIT = tuple(rf".decoder.layers.\1.self_attn.self_attn.{part}_proj.\2" for part in "qkv")

ONEFORMER = [
    *_rows(r"sem_seg_head\.(?:pixel_decoder\.)?", _PIXELS, _PIXEL_DECODER),
    *_rows(
        r"sem_seg_head\.predictor\.",
        _QUERIES,
        [
            (r"query_embed\.weight", ".queries_embedder.weight"),
            (r"level_embed\.weight", ".level_embed.weight"),
            (r"class_transformer\.(.+)", r".decoder.query_transformer.\1"),
            (r"class_input_proj\.(\w+)", r".decoder.query_input_projection.\1"),
            (r"(decoder_norm|class_embed)\.(\w+)", r".decoder.\1.\2"),
            (rf"mask_embed\.{_MLP}", r".decoder.mask_embed.layers.\1.0.\2"),
            (r"transformer_self_attention_layers\.(\d)\.self_attn\.in_proj_(\w+)", _ONEFORMER_SPLIT),
            (r"transformer_self_attention_layers\.(\d)\.(.+)", r".decoder.layers.\1.self_attn.\2"),
            (r"transformer_cross_attention_layers\.(\d)\.(.+)", r".decoder.layers.\1.cross_attn.\2"),
            (r"transformer_ffn_layers\.(\d)\.(.+)", r".decoder.layers.\1.ffn.\2"),
        ],
    ),
    (rf"task_mlp\.{_MLP}", r"network.model.task_encoder.task_mlp.layers.\1.0.\2"),
    *_rows(
        r"text_encoder\.",
        "network.model.text_mapper.text_encoder",
        [
            (r"transformer\.resblocks\.(\d)\.attn\.(.+)", r".transformer.layers.\1.self_attn.\2"),
            (r"transformer\.resblocks\.(\d)\.ln_([12])\.(\w+)", r".transformer.layers.\1.layer_norm\2.\3"),
            (r"transformer\.resblocks\.(\d)\.mlp\.c_fc\.(\w+)", r".transformer.layers.\1.mlp.fc1.\2"),
            (r"transformer\.resblocks\.(\d)\.mlp\.c_proj\.(\w+)", r".transformer.layers.\1.mlp.fc2.\2"),
            (r"(positional_embedding|token_embedding\.weight|ln_final\.\w+)", r".\1"),
        ],
    ),
    (rf"text_projector\.{_MLP}", r"network.model.text_mapper.text_projector.layers.\1.0.\2"),
    (r"prompt_ctx\.weight", "network.model.text_mapper.prompt_ctx.weight"),
    (r"criterion\.(empty_weight|logit_scale)", r"network.criterion.\1"),
]
