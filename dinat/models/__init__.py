"""Model families; importing this registers them with timm."""

from . import dinat_s, isotropic, nat
from .nat import NAT

__all__ = ["NAT", "dinat_s", "isotropic", "nat"]
