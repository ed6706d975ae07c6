"""Model families; importing this registers them with timm."""

from . import dinat_s, isotropic, nat, volumes
from .nat import NAT
from .volumes import VolumeNAT

FAMILIES = ("nat", "dinat_s", "isotropic", "volumes")  # timm knows the models by these modules

__all__ = ["FAMILIES", "NAT", "VolumeNAT", "dinat_s", "isotropic", "nat", "volumes"]
