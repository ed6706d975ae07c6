"""Every public name of four releases of NATTEN; what the installed modules are; switches, questions, checks, FLOP."""

import importlib
import importlib.util
import json
import logging
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from dinat_kernels import na2d, natten
from dinat_kernels.natten import checks, flops, functional, switches, v0_17, v0_21
from packaging.version import Version
from torch.utils.flop_counter import FlopCounterMode

NAMES = json.loads((Path(__file__).parent / "public_names.json").read_text())["releases"]
# What is neither served nor worth it: autograd functions, kernels, tests, profilers.
REFUSED_MODULES = {
    "0.14": set(),
    "0.15": {"nested", "ops", "utils.testing"},
    "0.17": {"autotuner", "flex", "nested", "ops", "utils.testing"},
    "0.21": {"attn_merge", "backends", "profiler", "profiling_utils", "token_permute"}
    | {f"utils.{name}" for name in ("device", "dtype", "environment", "testing", "varlen")},
}


@pytest.fixture
def install() -> Iterator:
    yield natten.install
    natten.uninstall()


@pytest.mark.parametrize("release", NAMES)
def test_every_public_name_is_served_or_refused(release, install):
    version = release.rpartition(".")[0]
    install(version)
    for module, names in NAMES[release].items():
        refused = {f"natten.{name}" for name in REFUSED_MODULES[version] if f"{module}.".startswith(f"natten.{name}.")}
        if refused:
            with pytest.raises(ImportError, match=rf"^dinat_kernels has no {refused.pop()}: \w.{{15,}}\.$"):
                importlib.import_module(module)
            continue
        found = importlib.import_module(module)
        for name in names.split():
            if hasattr(found, name):
                exec(f"from {module} import {name}", scope := {})
                assert scope[name] is getattr(found, name)
            else:
                assert module not in ("natten", "natten.types", "natten.natten2d"), name
                sentence = rf"^dinat_kernels has no {module}.{name}: \w.{{15,}}\.$"
                with pytest.raises(AttributeError, match=sentence):
                    getattr(found, name)
                with pytest.raises(ImportError, match=sentence):
                    exec(f"from {module} import {name}", {})


def test_names_of_another_release_say_so(install):
    install("0.14")
    sentence = (
        r"natten.functional.na2d_qk_with_bias is of another NATTEN: dinat_kernels.natten.install\('0.15'\) has it"
    )
    with pytest.raises(ImportError, match=sentence):
        exec("from natten.functional import na2d_qk_with_bias")
    with pytest.raises(ImportError, match=r"natten.context is of another NATTEN: .*install\('0.21'\)"):
        importlib.import_module("natten.context")
    with pytest.raises(ImportError, match=r"cannot import name 'na5d' from 'natten\.functional'"):
        exec("from natten.functional import na5d")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'natten.na5d'"):
        importlib.import_module("natten.na5d")
    with pytest.raises(AttributeError, match="module 'natten' has no attribute 'na5d'"):
        importlib.import_module("natten").na5d  # noqa: B018


@pytest.mark.parametrize("release", NAMES)
def test_modules_are_modules(release, install):
    """What code and tools ask of any module: file, version, reload, what `import natten` alone reaches."""
    install(release.rpartition(".")[0])
    module = importlib.import_module("natten")
    assert Version(module.__version__) >= Version(release) > Version("0.14.5")
    assert module.__version__ == f"{release}+dinat"
    assert Path(module.__file__).is_file()
    assert Path(module.functional.__file__).is_file()
    assert importlib.util.find_spec("natten.flops" if release != "0.21.7" else "natten.modules").loader
    layer = module.NeighborhoodAttention2D
    del module.NeighborhoodAttention2D
    assert importlib.reload(module).NeighborhoodAttention2D is layer
    exec("from natten import *", scope := {})
    assert scope["NeighborhoodAttention2D"] is layer
    assert hasattr(module, "context") == (release in ("0.17.5", "0.21.7"))


def test_na2d_is_a_module_in_0_17_and_a_function_in_0_21(install):
    install("0.17")
    assert importlib.import_module("natten").na2d.NeighborhoodAttention2D is v0_17.NeighborhoodAttention2D
    assert importlib.import_module("natten.natten3d").NeighborhoodAttention3D is v0_17.NeighborhoodAttention3D
    install("0.21")
    assert importlib.import_module("natten").na2d is natten.na2d


def test_functions_are_those_of_the_release(install):
    q = torch.randn(1, 2, 6, 7, 8, 4)
    heads_last = q.movedim(1, -2)
    for version in ("0.17", "0.21"):
        install(version)
        functions = importlib.import_module("natten.functional")
        assert functions.na3d_qk is functional.na3d_qk
    install("0.17")
    experimental = importlib.import_module("natten.experimental").na3d
    expected = v0_17.na3d(heads_last, heads_last, heads_last, 3, 2)
    torch.testing.assert_close(experimental(heads_last, heads_last, heads_last, 3, 2), expected)
    install("0.15")
    functions = importlib.import_module("natten.functional")
    torch.testing.assert_close(functions.na3d_qk(q, q, 3, 1, 2, 4), functional.na3d_qk(q, q, (3, 1, 1), (2, 4, 4)))
    assert importlib.import_module("natten").NeighborhoodAttention2D(16, 2, 3).rpb is not None


def test_questions_are_answered_truthfully(install):
    install("0.17")
    module = importlib.import_module("natten")
    for question in (module.has_fused_na, module.has_fna, module.has_half, module.has_bfloat):
        assert question() is question(0) is True
    assert not any(q() for q in (module.has_gemm, module.has_tf32_gemm, module.has_fp32_gemm, module.has_fp64_gemm))
    assert module.has_cuda() is torch.cuda.is_available()
    assert module.is_fna_enabled() is module.is_fused_na_enabled() is True
    install("0.21")
    assert importlib.import_module("natten").HAS_LIBNATTEN is False
    assert importlib.import_module("natten").get_configs_for_cutlass_fna(*[torch.randn(1, 4, 4, 2, 8)] * 3) == []
    assert checks.get_device_cc() == 0 or torch.cuda.is_available()


SWITCHES = [
    ("use_gemm_na", "is_gemm_na_enabled", False),
    ("use_tiled_na", "is_tiled_na_enabled", False),
    ("use_tf32_in_gemm_na", "is_tf32_in_gemm_na_enabled", False),
    ("use_deterministic_algorithms", "are_deterministic_algorithms_enabled", False),
    ("use_kv_parallelism_in_fused_na", "is_kv_parallelism_in_fused_na_enabled", False),
    ("use_fused_na", "is_fused_na_enabled", True),
    ("use_fna", "is_fna_enabled", True),
    ("allow_flex_compile", "is_flex_compile_allowed", False),
]


@pytest.mark.parametrize(("switch", "question", "default"), SWITCHES)
def test_switches_are_remembered(switch, question, default, install):
    install("0.17")
    before = {name: getattr(switches, name)() for _, name, _ in SWITCHES if name != question}
    assert getattr(switches, question)() is default
    related = {"is_kv_parallelism_in_fused_na_enabled", "is_fused_na_enabled", "is_fna_enabled"}
    for mode in (True, False, True):
        getattr(switches, switch)(mode)
        assert getattr(switches, question)() is mode
    for name in before.keys() - (related if question in related else set()):
        assert getattr(switches, name)() is before[name], name
    getattr(switches, switch)(not default)
    install("0.17")
    assert getattr(switches, question)() is default


def test_switches_with_more_than_two_positions(install):
    install("0.21")
    for name in ("gemm_na", "tiled_na", "tf32"):
        query = f"is_{name}_enabled" if name != "tf32" else "is_tf32_in_gemm_na_enabled"
        assert getattr(switches, f"enable_{name}")() is getattr(switches, query)() is True
        assert getattr(switches, f"disable_{name}")() is getattr(switches, query)() is False
    switches.use_fused_na(kv_parallel=False)
    assert not switches.is_kv_parallelism_in_fused_na_enabled()
    assert not switches.should_use_flex_attention()
    switches.use_flex_attention()
    assert (switches.should_use_flex_attention(), switches.should_force_flex_attention()) == (True, False)
    assert switches.is_kv_parallelism_in_fused_na_enabled()
    switches.force_flex_attention()
    assert (switches.should_use_flex_attention(), switches.should_force_flex_attention()) == (True, True)
    switches.use_fused_na(False)
    assert not switches.should_use_flex_attention()
    assert not switches.should_force_flex_attention()
    assert not switches.is_kv_parallelism_in_fused_na_enabled()
    assert not switches.is_fna_enabled()

    switches.allow_flex_compile(backprop=True)
    assert switches.is_flex_compile_backprop_allowed()
    switches.disable_flex_compile_backprop()
    assert (switches.is_flex_compile_allowed(), switches.is_flex_compile_backprop_allowed()) == (True, False)
    switches.allow_flex_compile_backprop()
    assert switches.is_flex_compile_backprop_allowed()
    switches.disable_flex_compile()
    assert not switches.is_flex_compile_allowed()
    assert not switches.is_flex_compile_backprop_allowed()

    passes = switches.is_autotuner_enabled_for_forward, switches.is_autotuner_enabled_for_backward
    thorough = switches.is_autotuner_thorough_for_forward, switches.is_autotuner_thorough_for_backward
    assert not switches.is_autotuner_enabled()
    switches.use_autotuner(True, None, None, True, steps_backward=7)
    assert [f() for f in (*passes, *thorough)] == [True, False, False, True]
    assert (switches.AutotunerContext.steps_backward, switches.AutotunerContext.steps_forward) == (7, 5)
    switches.use_autotuner(False, True)
    assert [f() for f in (*passes, *thorough)] == [False, True, False, True]
    assert switches.is_autotuner_enabled()
    switches.disable_autotuner()
    assert not any(f() for f in (*passes, *thorough, switches.is_autotuner_enabled))
    switches.AutotunerContext.reset()
    assert switches.AutotunerContext.steps_backward == 5

    choices = "default", "strict", "unrestricted"
    for choice in reversed(choices):
        switches.set_memory_usage_preference(choice)
        assert [getattr(switches, f"is_memory_usage_{c}")() for c in choices] == [c == choice for c in choices]
        assert switches.get_memory_usage_preference().name.lower() == choice
    with pytest.raises(ValueError, match="pref must be one of 'default', 'strict', 'unrestricted', got 'most'"):
        switches.set_memory_usage_preference("most")


def test_checks_of_arguments():
    assert checks.check_kernel_size_arg(2, [3, 5]) == (3, 5)
    assert checks.check_input_size_arg(3, 8) == (8, 8, 8)
    assert checks.check_stride_arg(2, None) == checks.check_dilation_arg(2, None) == (1, 1)
    assert checks.check_causal_arg(2, None) == (False, False)
    assert checks.check_causal_arg(2, (True, False)) == (True, False)
    for name in ("input_size", "kernel_size", "stride", "dilation"):
        with pytest.raises(ValueError, match=rf"{name} must be one int or 2 of them .*, got \(1, 2, 3\)"):
            getattr(checks, f"check_{name}_arg")(2, (1, 2, 3))
    with pytest.raises(ValueError, match=r"kernel_size must be one int or 2 of them .*, got None"):
        checks.check_kernel_size_arg(2, None)
    assert v0_17.check_all_args(2, 5, (2, 3), None) == ((5, 5), (2, 3), (False, False))
    assert v0_21.check_all_args(2, 5, 4, (2, 3), (False, True)) == ((5, 5), (4, 4), (2, 3), (False, True))
    assert v0_21.check_all_args(1, 5, None, None, None) == ((5,), (1,), (1,), (False,))
    assert checks.create_dim_from_int(3, 2) == (2, 2, 2)
    assert checks.create_causal_arg_from_bool(2, True) == (True, True)
    assert checks.get_num_na_weights((3, 5)) == 15


def test_checks_of_tensors():
    value = torch.randn(2, 3, 6, 7, 4, dtype=torch.float64, requires_grad=True)
    attn = checks.make_attn_tensor_from_input(value, 9)
    assert (attn.shape, attn.dtype, attn.requires_grad) == ((2, 3, 6, 7, 9), torch.float64, True)
    more = torch.randn(2, 3, 5, 4)
    assert checks.check_additional_keys(value, None) == 0
    assert checks.check_additional_keys(value, more) == 5
    with pytest.raises(ValueError, match=r"\(batch, heads, tokens, dim\) = \(2, 3, 5, 4\), got \(2, 2, 5, 4\)"):
        checks.check_additional_keys(value, more[:, :2])
    assert checks.check_additional_values(attn, None, value, 9) == 0
    assert checks.check_additional_values(attn, more, value, 4) == 5
    with pytest.raises(ValueError, match="attn must have 14 weights per token, got 9"):
        checks.check_additional_values(attn, more, value, 9)


def test_types_are_types(install):
    install("0.21")
    types = importlib.import_module("natten.types")
    assert set(typing.get_args(types.DimensionTypeOrDed)) == {int, tuple[int], tuple[int, int], tuple[int, int, int]}
    assert set(typing.get_args(types.CausalArg2DTypeOrDed)) == {bool, tuple[bool, bool]}
    assert [schedule.value for schedule in types.KernelSchedule] == [0, 1, 2]
    assert importlib.import_module("natten.utils.log").get_logger("x") is logging.getLogger("x")


@pytest.mark.parametrize("heads_last", [True, False])
@pytest.mark.parametrize("causal", [(False, False), (True, False)])
def test_flop_counts(heads_last, causal):
    """The same as PyTorch's counter, which the operator's own formulas serve; half as many multiply-adds."""
    q, v = torch.randn(2, 6, 7, 3, 4), torch.randn(2, 6, 7, 3, 5)
    with FlopCounterMode(display=False) as counter:
        na2d(q, q, v, 3, dilation=(1, 2), is_causal=causal)
    shapes = [tuple(x.shape if heads_last else x.movedim(-2, 1).shape) for x in (q, v)]
    window = dict(kernel_size=(3, 3), dilation=(1, 2), is_causal=causal, is_heads_last=heads_last)
    total = flops.fna_flop_count(shapes[0], shapes[0], shapes[1], **window)
    assert total == counter.get_total_flops()
    assert flops.fna_flop_count(shapes[0], shapes[0], shapes[1], **window, return_macs=True) * 2 == total
    if causal == (False, False):
        assert flops.na_qk_flop_count(shapes[0], shapes[0], **window) == 2 * 2 * 3 * 42 * 9 * 4
        assert flops.na_av_flop_count(None, shapes[1], **window) == 2 * 2 * 3 * 42 * 9 * 5


@pytest.mark.skipif(not flops.has_fvcore, reason="fvcore is not installed: pip install fvcore")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_fvcore_counts_layers_and_functions(install):
    install("0.14")
    module = importlib.import_module("natten.flops")
    x = torch.randn(2, 6, 8, 16)
    layer = importlib.import_module("natten").NeighborhoodAttention2D(16, 2, 3, 2)
    macs = 2 * 48 * (16 * 48 + 16 * 16 + 2 * 9 * 16)  # per token: qkv, proj, 9 keys by 16 channels twice
    assert module.get_flops(layer, x, disable_warnings=True) == macs

    class Composed(torch.nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (2, 8)).movedim(-2, 1)
            return functional.natten2dav(functional.natten2dqk(q, q, 3, 1).softmax(-1), q, 3, 1)

    assert module.get_flops(Composed(), x, disable_warnings=True) == 2 * 48 * 2 * 9 * 16


@pytest.mark.skipif(flops.has_fvcore, reason="fvcore is installed")
def test_without_fvcore_the_message_says_so():
    with pytest.raises(ImportError, match=r"get_flops needs fvcore: pip install fvcore, or use .*FlopCounterMode"):
        flops.get_flops(torch.nn.Identity(), torch.randn(1))
