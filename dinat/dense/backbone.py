"""timm's models as backbones of Hugging Face transformers, with all their arguments.

Importing this file registers the pair with `AutoConfig` and `AutoBackbone`, so that models with such a backbone load by
`from_pretrained`. transformers' own `TimmBackbone` takes none of the arguments that these models live by.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoBackbone, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin
from transformers.modeling_outputs import BackboneOutput

from .features import Features


class TimmConfig(BackboneConfigMixin, PreTrainedConfig):
    """A timm model's name and arguments.

    Args:
        name: of the timm model.
        arguments: of `Features`: those of the model, `stage_norm`, `out_indices`.
    """

    model_type = "dinat_timm"

    def __init__(self, name: str | None = None, arguments: dict[str, Any] | None = None, **kwargs: Any) -> None:
        for key in ("stage_names", "out_features", "out_indices"):  # the backbone knows them
            kwargs.pop(key, None)
        super().__init__(**kwargs)
        self.name = name
        self.arguments = arguments or {}


class TimmBackbone(BackboneMixin, PreTrainedModel):
    """`Features` with the interface of transformers' backbones."""

    config_class = TimmConfig
    main_input_name = "pixel_values"
    base_model_prefix = "features"
    has_attentions = False

    def __init__(self, config: TimmConfig) -> None:
        features = Features(config.name, **config.arguments)
        config.stage_names = [f"stage{i}" for i in range(len(features.channels))]
        config.set_output_features_output_indices(config.stage_names, list(range(len(features.channels))))
        super().__init__(config)
        self.num_features = features.channels
        self.features = features
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """timm has initialised all weights; buffers that no checkpoint holds are made here, after the meta device."""
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()

    def forward(self, pixel_values: Tensor, return_dict: bool | None = None, **_: Any) -> BackboneOutput | tuple:
        maps = tuple(self.features(pixel_values))
        return (maps,) if return_dict is False else BackboneOutput(feature_maps=maps)


AutoConfig.register(TimmConfig.model_type, TimmConfig)
AutoBackbone.register(TimmConfig, TimmBackbone)


def load_pretrained(backbone: TimmBackbone) -> None:
    """Give it the weights that timm or this package has for the model."""
    config = backbone.config
    backbone.features.load_state_dict(Features(config.name, pretrained=True, **config.arguments).state_dict())
