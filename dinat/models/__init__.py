"""Model families; importing this registers them with timm."""

from . import dinat_s, isotropic, nat, volumes
from .nat import NAT
from .volumes import VolumeNAT

__all__ = ["NAT", "VolumeNAT", "dinat_s", "isotropic", "nat", "volumes"]
