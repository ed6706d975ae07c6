"""DiNAT (and NAT) of Hugging Face transformers without NATTEN.

    import dinat.integrations.transformers

    dinat.integrations.transformers.enable()
    model = AutoModelForImageClassification.from_pretrained("shi-labs/dinat-mini-in1k-224")

These models need functions of NATTEN that its newer releases do not have.  Besides, transformers 4.54 and newer treat a
feature map as a sequence when they call them: 4.x raises, 5.x passes the axes in a wrong order.  `enable` replaces the
attention of these models, and nothing else, in this process.

Importing this lets transformers 5 and newer read folders with our backbone (`dinat convert --to huggingface`), and
changes nothing else.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from types import ModuleType

import torch
import transformers
from dinat_kernels import na2d
from dinat_kernels.natten.functional import natten2dav, natten2dqkrpb
from packaging.version import Version

if Version(transformers.__version__) >= Version("5"):
    import dinat.dense.backbone  # noqa: F401  registers it

_OLDEST, _UNKNOWN = "4.54", "6"  # the first version this is written for, and the first one it is not
_MODULES = ("transformers.models.dinat.modeling_dinat", "transformers.models.deprecated.nat.modeling_nat")
_originals: list[tuple[object, str, object]] = []  # (owner, attribute, what it was); empty while not enabled


def _attend(self, hidden_states: torch.Tensor, output_attentions: bool | None = False) -> tuple[torch.Tensor, ...]:
    """`NeighborhoodAttention.forward` of transformers.

    Args:
        hidden_states: (batch, height, width, dim), padded by the caller to at least the window.
        output_attentions: also return the attention weights (batch, heads, height, width, kernel_size ** 2).
    """
    shape = (self.num_attention_heads, self.attention_head_size)
    query, key, value = (layer(hidden_states).unflatten(-1, shape) for layer in (self.query, self.key, self.value))
    window = self.kernel_size, getattr(self, "dilation", 1)
    if not output_attentions and not (self.training and self.dropout.p > 0):
        return (na2d(query, key, value, window[0], dilation=window[1], rpb=self.rpb).flatten(-2),)
    query, key, value = (x.movedim(-2, 1) for x in (query * self.attention_head_size**-0.5, key, value))
    weights = self.dropout(natten2dqkrpb(query, key, self.rpb, *window).softmax(-1))
    out = natten2dav(weights, value, *window).movedim(1, -2).flatten(-2)
    return (out, weights) if output_attentions else (out,)


def _without_natten(requires_backends: Callable) -> Callable:
    def check(obj: object, backends: str | list[str]) -> None:
        backends = [backends] if isinstance(backends, str) else backends
        requires_backends(obj, [backend for backend in backends if backend != "natten"])

    return check


def _import(name: str) -> ModuleType:
    """Import a model file, as if NATTEN were not installed if the one that is lacks what the file imports."""
    try:
        return importlib.import_module(name)
    except ImportError:
        available = transformers.utils.is_natten_available
        transformers.utils.is_natten_available = lambda: False
        try:
            return importlib.import_module(name)
        finally:
            transformers.utils.is_natten_available = available


def enable() -> None:
    """Let `AutoModelForImageClassification`, `AutoBackbone` and others run DiNAT here; models made before too.

    Raises:
        RuntimeError: this version of transformers is unknown; nothing has been changed.
    """
    if _originals:
        return
    version = transformers.__version__
    modules = []
    known = Version(_OLDEST) <= Version(version) < Version(_UNKNOWN)
    if known:
        modules = [_import(name) for name in _MODULES if _exists(name)]
        known = modules and all(map(_is_known, modules))
    if not known:
        raise RuntimeError(
            f"transformers {version} is unknown to dinat, which knows {_OLDEST} up to, not including, {_UNKNOWN}, as "
            "long as the attention of DiNAT has the same arguments. Install another version of one of them."
        )
    for module in modules:
        for owner, name, replacement in (
            (module, "requires_backends", _without_natten(module.requires_backends)),
            (module.NeighborhoodAttention, "forward", _attend),
        ):
            _originals.append((owner, name, getattr(owner, name)))
            setattr(owner, name, replacement)


def disable() -> None:
    """Undo `enable`: transformers is as it was, and its DiNAT needs NATTEN again."""
    while _originals:
        setattr(*_originals.pop())


def _exists(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False


def _is_known(module: ModuleType) -> bool:
    """Whether the attention of a model file is called as the replacement expects."""
    forward = inspect.signature(module.NeighborhoodAttention.forward)
    return list(forward.parameters) == ["self", "hidden_states", "output_attentions"] and hasattr(
        module, "requires_backends"
    )
