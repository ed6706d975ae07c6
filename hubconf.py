"""torch.hub: `torch.hub.load("OWNER/REPOSITORY", "dinat_mini", pretrained=True)`; every model is an entry point."""

import sys
from functools import partial, update_wrapper
from pathlib import Path

import timm

sys.path.append(str(Path(__file__).parent / "kernels"))  # torch.hub adds the repository itself

from dinat.models import FAMILIES  # registers the models

dependencies = ["torch", "timm", "huggingface_hub", "safetensors"]

for _module in FAMILIES:
    for _name in timm.list_models(module=_module):
        globals()[_name] = update_wrapper(partial(timm.create_model, _name), timm.model_entrypoint(_name))
