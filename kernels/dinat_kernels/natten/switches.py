"""NATTEN's switches and questions about features: `natten.context` of 0.17 and 0.21.

A switch chooses among equal implementations of NATTEN, of which there is one here: it is remembered, and changes
nothing.  Where it was not touched, and for what no switch changes, answers are true of this package.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import ClassVar

import torch

__all__ = [
    "AutotunerContext",
    "MemoryUsagePreference",
    "NattenContext",
    "allow_flex_compile",
    "allow_flex_compile_backprop",
    "are_deterministic_algorithms_enabled",
    "disable_autotuner",
    "disable_flex_compile",
    "disable_flex_compile_backprop",
    "disable_gemm_na",
    "disable_tf32",
    "disable_tiled_na",
    "enable_gemm_na",
    "enable_tf32",
    "enable_tiled_na",
    "force_flex_attention",
    "get_device_cc",
    "get_memory_usage_preference",
    "has_bfloat",
    "has_cuda",
    "has_fna",
    "has_fp32_gemm",
    "has_fp64_gemm",
    "has_fused_na",
    "has_gemm",
    "has_half",
    "has_tf32_gemm",
    "is_autotuner_enabled",
    "is_autotuner_enabled_for_backward",
    "is_autotuner_enabled_for_forward",
    "is_autotuner_thorough_for_backward",
    "is_autotuner_thorough_for_forward",
    "is_flex_compile_allowed",
    "is_flex_compile_backprop_allowed",
    "is_fna_enabled",
    "is_fused_na_enabled",
    "is_gemm_na_enabled",
    "is_kv_parallelism_in_fused_na_enabled",
    "is_memory_usage_default",
    "is_memory_usage_strict",
    "is_memory_usage_unrestricted",
    "is_tf32_in_gemm_na_enabled",
    "is_tiled_na_enabled",
    "set_memory_usage_preference",
    "should_force_flex_attention",
    "should_use_flex_attention",
    "use_autotuner",
    "use_deterministic_algorithms",
    "use_flex_attention",
    "use_fna",
    "use_fused_na",
    "use_gemm_na",
    "use_kv_parallelism_in_fused_na",
    "use_tf32_in_gemm_na",
    "use_tiled_na",
]


class MemoryUsagePreference(Enum):
    """How much memory NATTEN's backward pass may take for speed."""

    Default = 0
    Strict = 1
    Unrestricted = 2


class _Context:
    DEFAULTS: ClassVar[dict[str, object]]

    @classmethod
    def reset(cls) -> None:
        """Forget what was switched."""
        for name, value in cls.DEFAULTS.items():
            setattr(cls, name, value)


class NattenContext(_Context):
    """The switches' positions."""

    DEFAULTS: ClassVar = dict(
        is_deterministic_mode_enabled=False,
        is_fused_na_enabled=True,  # what layers and na1d, na2d, na3d run on
        is_kv_parallelism_enabled=False,
        is_gemm_na_enabled=False,
        is_tiled_na_enabled=False,
        is_tf32_in_gemm_na_enabled=False,
        use_flex_attention=False,
        force_flex_attention=False,
        flex_compile_allowed=False,
        flex_compile_backprop_allowed=False,
        training_memory_preference=MemoryUsagePreference.Default,
    )


class AutotunerContext(_Context):
    """The positions of the autotuner's switches."""

    DEFAULTS: ClassVar = dict(
        enabled_for_forward=False,
        enabled_for_backward=False,
        thorough_mode_forward=False,
        thorough_mode_backward=False,
        warmup_steps_forward=5,
        warmup_steps_backward=5,
        steps_forward=5,
        steps_backward=5,
    )


NattenContext.reset()
AutotunerContext.reset()


def _query(name: str, context: type[_Context] = NattenContext) -> Callable[[], bool]:
    def query() -> bool:
        """The position of a switch."""
        return getattr(context, name)

    return query


def _switch(name: str) -> tuple[Callable[..., None], Callable[[], bool], Callable[[], bool], Callable[[], bool]]:
    """Functions that set a switch, tell its position, turn it on and turn it off."""
    is_on = _query(name)

    def use(mode: bool = True) -> None:
        """Remembered, without effect."""
        setattr(NattenContext, name, bool(mode))

    def enable() -> bool:
        """Remembered, without effect."""
        use(True)
        return is_on()

    def disable() -> bool:
        """Remembered, without effect."""
        use(False)
        return is_on()

    return use, is_on, enable, disable


use_gemm_na, is_gemm_na_enabled, enable_gemm_na, disable_gemm_na = _switch("is_gemm_na_enabled")
use_tiled_na, is_tiled_na_enabled, enable_tiled_na, disable_tiled_na = _switch("is_tiled_na_enabled")
use_tf32_in_gemm_na, is_tf32_in_gemm_na_enabled, enable_tf32, disable_tf32 = _switch("is_tf32_in_gemm_na_enabled")
use_deterministic_algorithms, are_deterministic_algorithms_enabled, *_ = _switch("is_deterministic_mode_enabled")
use_kv_parallelism_in_fused_na, is_kv_parallelism_in_fused_na_enabled, *_ = _switch("is_kv_parallelism_enabled")
is_fna_enabled = is_fused_na_enabled = _query("is_fused_na_enabled")
should_use_flex_attention, should_force_flex_attention = _query("use_flex_attention"), _query("force_flex_attention")
is_flex_compile_allowed = _query("flex_compile_allowed")
is_flex_compile_backprop_allowed = _query("flex_compile_backprop_allowed")
is_autotuner_enabled_for_forward = _query("enabled_for_forward", AutotunerContext)
is_autotuner_enabled_for_backward = _query("enabled_for_backward", AutotunerContext)
is_autotuner_thorough_for_forward = _query("thorough_mode_forward", AutotunerContext)
is_autotuner_thorough_for_backward = _query("thorough_mode_backward", AutotunerContext)


def use_fused_na(
    mode: bool = True, kv_parallel: bool = True, use_flex_attention: bool = False, force_flex_attention: bool = False
) -> None:
    """Remembered, without effect: layers and `na1d`, `na2d`, `na3d` are fused."""
    NattenContext.is_fused_na_enabled = bool(mode)
    NattenContext.is_kv_parallelism_enabled = bool(mode and kv_parallel)
    NattenContext.use_flex_attention = bool(mode and use_flex_attention)
    NattenContext.force_flex_attention = bool(mode and force_flex_attention)


use_fna = use_fused_na


def use_flex_attention() -> None:
    """Remembered, without effect."""
    use_fused_na(use_flex_attention=True)


def force_flex_attention() -> None:
    """Remembered, without effect."""
    use_fused_na(use_flex_attention=True, force_flex_attention=True)


def allow_flex_compile(mode: bool = True, backprop: bool = False) -> None:
    """Remembered, without effect; `torch.compile` works in any case."""
    NattenContext.flex_compile_allowed = bool(mode)
    NattenContext.flex_compile_backprop_allowed = bool(mode and backprop)


def allow_flex_compile_backprop(mode: bool = True) -> None:
    """Remembered, without effect."""
    allow_flex_compile(is_flex_compile_allowed(), mode)


def disable_flex_compile() -> None:
    """Remembered, without effect."""
    allow_flex_compile(False)


def disable_flex_compile_backprop() -> None:
    """Remembered, without effect."""
    allow_flex_compile_backprop(False)


def use_autotuner(
    forward_pass: bool | None = None,
    backward_pass: bool | None = None,
    thorough_mode_forward: bool | None = None,
    thorough_mode_backward: bool | None = None,
    warmup_steps_forward: int | None = None,
    warmup_steps_backward: int | None = None,
    steps_forward: int | None = None,
    steps_backward: int | None = None,
) -> None:
    """Remembered, without effect: `python -m dinat_kernels.tune` finds launch configurations once, for all runs."""
    settings = dict(
        enabled_for_forward=forward_pass,
        enabled_for_backward=backward_pass,
        thorough_mode_forward=thorough_mode_forward,
        thorough_mode_backward=thorough_mode_backward,
        warmup_steps_forward=warmup_steps_forward,
        warmup_steps_backward=warmup_steps_backward,
        steps_forward=steps_forward,
        steps_backward=steps_backward,
    )
    for name, value in settings.items():
        if value is not None:
            setattr(AutotunerContext, name, value)


def disable_autotuner() -> None:
    """Turn all of `use_autotuner` off."""
    use_autotuner(False, False, False, False)


def is_autotuner_enabled() -> bool:
    """Whether `use_autotuner` was called for either pass."""
    return is_autotuner_enabled_for_forward() or is_autotuner_enabled_for_backward()


def set_memory_usage_preference(pref: str = "default") -> None:
    """Remembered, without effect.

    Raises:
        ValueError: not "default", "strict" or "unrestricted".
    """
    choices = {choice.name.lower(): choice for choice in MemoryUsagePreference}
    if pref not in choices:
        raise ValueError(f"pref must be one of {', '.join(map(repr, choices))}, got {pref!r}")
    NattenContext.training_memory_preference = choices[pref]


def get_memory_usage_preference() -> MemoryUsagePreference:
    """What `set_memory_usage_preference` chose."""
    return NattenContext.training_memory_preference


def is_memory_usage_default() -> bool:
    """Whether that is "default"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Default


def is_memory_usage_strict() -> bool:
    """Whether that is "strict"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Strict


def is_memory_usage_unrestricted() -> bool:
    """Whether that is "unrestricted"."""
    return get_memory_usage_preference() is MemoryUsagePreference.Unrestricted


def get_device_cc(device: torch.device | int | None = None) -> int:
    """Compute capability of a CUDA device, as 90 for 9.0; 0 where there is none."""
    if not (torch.cuda.is_available() and torch.version.cuda):
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def has_cuda() -> bool:
    """Whether there is a CUDA (or ROCm) device."""
    return torch.cuda.is_available()


def _everywhere(device_index: int | None = None) -> bool:
    """Fused attention, float16 and bfloat16 run on any device."""
    return True


def _nowhere(device_index: int | None = None) -> bool:
    """Implementations by matrix products of their own are not there: the fused one is for all."""
    return False


has_fna = has_fused_na = has_half = has_bfloat = _everywhere
has_gemm = has_tf32_gemm = has_fp32_gemm = has_fp64_gemm = _nowhere
