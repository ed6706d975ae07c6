"""Neighborhood-attention vision backbones for timm: NAT, DiNAT, DiNAT_s and isotropic models.

`import dinat` registers them: `timm.create_model("dinat_mini")`, `timm.list_models("*nat_*")`.
"""

from . import models

__all__ = ["models"]
__version__ = "0.1.0"
