"""The operator against golden outputs, and the tiled backend against the dense float64 definition."""

import json
import math
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from dinat_kernels import functional, na1d, na2d, na3d, ops
from dinat_kernels.geometry import make_neighborhood
from dinat_kernels.impl import tiled
from dinat_kernels.impl.layout import Call, Layout
from dinat_kernels.impl.tiled import backward, cpu, plan, unrolled
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

NA = {1: na1d, 2: na2d, 3: na3d}
GOLDEN = Path(__file__).parents[1] / "golden"
RPB_CASES = json.loads((GOLDEN / "ops_rpb.json").read_text())
GNA_CASES = json.loads((GOLDEN / "ops_gna.json").read_text())
BACKENDS = ["reference", "torch"]


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    return load_file(GOLDEN / "ops_rpb.safetensors") | load_file(GOLDEN / "ops_gna.safetensors")


def golden_inputs(case: dict, fill) -> dict[str, torch.Tensor]:
    prefix = case.get("seed_prefix", case["name"])
    shape = (case["batch"], *case["spatial"], case["heads"], case["head_dim"])
    inputs = {name: fill.tensor_for_input(f"{prefix}/{name}", shape) for name in ("q", "k", "v", "dout")}
    if case["rpb"]:
        table = (case["heads"],) + (2 * case["kernel_size"] - 1,) * case["rank"]
        inputs["rpb"] = fill.tensor_for_input(f"{prefix}/rpb", table)
    return inputs


def forget() -> None:
    """Prepare what follows anew."""
    functional._prepare.cache_clear()
    ops.prepared.cache_clear()


def close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected.to(actual.dtype), atol=tolerance, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", RPB_CASES + GNA_CASES, ids=lambda case: case["name"])
def test_golden(case, backend, golden, fill):
    """26 cases of NATTEN 0.14.6 (bias, backward) and 0.21.7 (stride, causal axes, even windows)."""
    x = {name: tensor.requires_grad_() for name, tensor in golden_inputs(case, fill).items()}
    out, lse = NA[case["rank"]](
        x["q"],
        x["k"],
        x["v"],
        case["kernel_size"],
        dilation=case["dilation"],
        stride=case.get("stride", 1),
        is_causal=case.get("is_causal", False),
        rpb=x.get("rpb"),
        return_lse=True,
        backend=backend,
    )
    close(out, golden[f"{case['name']}/out"], 2e-5)
    close(lse, golden[f"{case['name']}/lse"], 2e-5)
    if case["rpb"]:
        out.backward(x["dout"])
        for name in "qkv":
            close(x[name].grad, golden[f"{case['name']}/d{name}"], 2e-5)
        close(x["rpb"].grad, golden[f"{case['name']}/drpb"], 2e-4)


def random_problem(seed: int) -> dict:
    """A small problem: every third has k * d == L, every third L == k * d + 1, the rest small k on long axes."""
    rng = random.Random(seed)
    rank = rng.choice([1, 2, 2, 3])
    longest = {1: 60, 2: 18, 3: 8}[rank]
    spatial, kernel, dilation, stride, causal = [], [], [], [], []
    for _ in range(rank):
        k = rng.randint(1, {1: 9, 2: 7, 3: 4}[rank])
        d = rng.randint(1, max(1, longest // k // 2))
        length = [k * d, k * d + 1, rng.randint(k * d, max(k * d, longest))][seed % 3]
        spatial.append(length)
        kernel.append(k)
        dilation.append(d)
        stride.append(rng.choice([1, 1, rng.randint(1, k)]))
        causal.append(rng.random() < 0.2)
    kv_heads = rng.choice([1, 2])
    return dict(
        rank=rank,
        batch=rng.choice([1, 3]),
        spatial=spatial,
        heads=kv_heads * rng.choice([1, 1, 3]),
        kv_heads=kv_heads,
        head_dim=rng.choice([1, 4, 8]),
        value_dim=rng.choice([2, 8]),
        rpb=rng.random() < 0.6 and not any(causal),
        scale=rng.choice([None, 0.0, 0.7]),
        window=dict(kernel_size=kernel, dilation=dilation, stride=stride, is_causal=causal),
    )


def random_inputs(p: dict, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    at = (p["batch"], *p["spatial"])
    q = torch.randn(*at, p["heads"], p["head_dim"], dtype=dtype)
    k = torch.randn(*at, p["kv_heads"], p["head_dim"], dtype=dtype)
    v = torch.randn(*at, p["kv_heads"], p["value_dim"], dtype=dtype)
    table = [2 * k - 1 for k in p["window"]["kernel_size"]]
    return [q, k, v, torch.randn(p["heads"], *table, dtype=dtype) if p["rpb"] else None]


def run_with_gradients(p: dict, inputs: list, backend: str, grads: tuple) -> list[torch.Tensor]:
    inputs = [None if x is None else x.clone().requires_grad_() for x in inputs]
    q, k, v, rpb = inputs
    outputs = NA[p["rank"]](q, k, v, **p["window"], scale=p["scale"], rpb=rpb, return_lse=True, backend=backend)
    pairs = [(output, grad.to(output.dtype)) for output, grad in zip(outputs, grads, strict=True) if grad is not None]
    torch.autograd.backward(*zip(*pairs, strict=True))
    return [*outputs, *(x.grad for x in inputs if x is not None)]


def output_gradients(p: dict) -> tuple[torch.Tensor, torch.Tensor]:
    at = (p["batch"], *p["spatial"], p["heads"])
    return torch.randn(*at, p["value_dim"], dtype=torch.float64), torch.randn(at, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(150))
def test_tiled_matches_the_definition(seed, monkeypatch):
    """Outputs and all gradients, given those of out, of lse or of both; float64, so that only a real error shows."""
    torch.manual_seed(seed)
    new_empty = torch.Tensor.new_empty  # what nobody writes shows, too
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    if seed % 2:  # several chunks of work even at this size
        monkeypatch.setattr(unrolled, "_CHUNK", 200)
        monkeypatch.setattr(backward, "_CHUNK", 200)
        monkeypatch.setattr(cpu, "_SCRATCH", 2_000)
        monkeypatch.setattr(cpu, "_BIAS_CHUNK", 200)
    p = random_problem(seed)
    inputs, (d_out, d_lse) = random_inputs(p), output_gradients(p)
    grads = [(d_out, d_lse), (d_out, None), (None, d_lse)][seed % 3]
    actual = run_with_gradients(p, inputs, "torch", grads)
    expected = run_with_gradients(p, inputs, "reference", grads)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if e is None else e, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(0, 12))
def test_precision(seed, dtype):
    """Against the float64 definition on the same rounded inputs: float32 arithmetic, one rounding of each result."""
    torch.manual_seed(seed)
    p = random_problem(seed)
    inputs = [None if x is None else x.to(dtype) for x in random_inputs(p)]
    grads = tuple(g.to(dtype).double() for g in output_gradients(p))
    actual = run_with_gradients(p, inputs, "torch", grads)
    exact = run_with_gradients(p, [None if x is None else x.double() for x in inputs], "reference", grads)
    rounding = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for a, e in zip(actual, exact, strict=True):
        scale = max(1.0, e.abs().max().item())
        torch.testing.assert_close(a.double() / scale, e / scale, atol=rounding, rtol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_gradcheck(rank, backend):
    spatial = {1: (9,), 2: (5, 6), 3: (3, 4, 3)}[rank]
    q, k, v = (torch.randn(1, *spatial, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
    dilation = {1: 2, 2: (1, 2), 3: 1}[rank]
    rpb = torch.randn(2, *[5] * rank, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda q, k, v, rpb: NA[rank](q, k, v, 3, dilation=dilation, rpb=rpb, return_lse=True, backend=backend),
        (q, k, v, rpb),
    )


def test_strides_do_not_matter():
    """q, k, v as views of one packed projection, and transposed maps, give the same result as contiguous copies."""
    packed = torch.randn(2, 6, 9, 3, 4, 8)
    q, k, v = packed.unbind(3)
    expected = na2d(q.contiguous(), k.contiguous(), v.contiguous(), 3)
    torch.testing.assert_close(na2d(q, k, v, 3), expected, atol=0, rtol=0)
    q, k, v = (x.contiguous().transpose(1, 2) for x in (q, k, v))
    torch.testing.assert_close(na2d(q, k, v, 3), expected.transpose(1, 2), atol=1e-6, rtol=0)
    wider = torch.randn(1, 20, 21, 2, 12, requires_grad=True)  # whose strides are no multiples of 8
    gradients = []
    for backend in BACKENDS:
        q, k, v = wider[..., :8], wider[..., 2:10], wider[..., 4:]
        gradients.append(torch.autograd.grad(na2d(q, k, v, 3, backend=backend).sin().sum(), wider)[0])
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("side", [5, 16])
def test_last_dimension_may_be_strided(side):
    """As heads split off an NCHW projection are."""
    q, k, v = (torch.randn(1, 16, side, side).view(1, 2, 8, side, side).permute(0, 3, 4, 1, 2) for _ in range(3))
    torch.testing.assert_close(na2d(q, k, v, 3), na2d(q, k, v, 3, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_window_of_one_returns_the_value(backend):
    q, k, v = (torch.randn(2, 5, 7, 2, 4) for _ in range(3))
    torch.testing.assert_close(na2d(q, k, v, 1, backend=backend), v)


def test_window_of_the_map_is_dense_attention():
    q, k, v = (torch.randn(2, 7, 7, 2, 8) for _ in range(3))
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.flatten(1, 2).transpose(1, 2) for x in (q, k, v)))
    torch.testing.assert_close(na2d(q, k, v, 7).flatten(1, 2).transpose(1, 2), dense)


def test_empty_batch():
    q = torch.randn(0, 5, 5, 2, 4, requires_grad=True)
    out = na2d(q, q, q, 3)
    out.sum().backward()
    assert out.shape == q.grad.shape == (0, 5, 5, 2, 4)


def test_repeated_runs_are_bit_equal():
    p = random_problem(5)
    inputs, grads = random_inputs(p, torch.float32), output_gradients(p)
    torch.use_deterministic_algorithms(True)
    try:
        first = run_with_gradients(p, inputs, "torch", grads)
        second = run_with_gradients(p, inputs, "torch", grads)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_plans_are_cached_and_bounded():
    limit = plan.plan_of.cache_info().maxsize
    for length in range(3, limit + 20):
        x = torch.randn(1, length, 1, 2)
        na1d(x, x, x, 3)
    assert plan.plan_of.cache_info().currsize <= limit
    made = plan.plan_of.cache_info().misses
    na1d(x, x, x, 3)
    assert plan.plan_of.cache_info().misses == made


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes():
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return result


@pytest.mark.parametrize("dilation", [1, 5])
def test_no_tensor_grows_faster_than_the_map(dilation, monkeypatch):
    monkeypatch.setattr(cpu, "_scratch", cpu._Scratch())  # other tests may have left it large

    def largest(side: int) -> int:
        q = torch.randn(1, side, side, 1, 4)
        window = make_neighborhood(2, 7, dilation)
        with LargestTensor() as record:
            layout = Layout(q.shape, q.stride(), q.dtype, q.device)
            call = Call(layout, layout, layout, None, window, 1.0, True, None)
            out, lse = tiled.prepare(call)(q, q, q, None)
            backward = tiled.prepare_backward(call, layout, True, [layout] * 3)
            backward(out, lse, q, q, q, None, out, lse, [torch.empty_like(q)] * 3)
        return record.numel

    for side in (32, 64, 128):
        assert largest(side) <= 256 * side**2  # entries per token: at most the keys of a tile


def test_memory_at_256x256_tokens():
    """Peak resident memory of forward and backward; one dense logits matrix would take 17 GB."""
    script = r"""
import re, torch
from dinat_kernels import na2d
def memory(kind):  # in MB; VmHWM is the peak of VmRSS
    return int(re.search(kind + r":\s+(\d+) kB", open("/proc/self/status").read())[1]) / 1024
x = torch.randn(1, 256, 256, 1, 32, requires_grad=True)
before = memory("VmRSS")
na2d(x, x, x, 7, backend="torch").sum().backward()
print(memory("VmHWM") - before)
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert 0 < float(run.stdout) < 400  # MB


Q = torch.randn(2, 8, 9, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(query=Q[0]), r"query must be 5-dimensional, .* got shape \(8, 9, 4, 8\)"),
        (dict(query=Q.int()), "query must be a floating-point tensor, got torch.int32"),
        (dict(key=Q.half()), "key must have the dtype and device of query, torch.float32 on cpu, got torch.float16"),
        (dict(key=Q[:, :, :8]), r"key must have the batch and spatial sizes of query, \(2, 8, 9\), got \(2, 8, 8\)"),
        (dict(key=Q[..., :4]), "key must have the head_dim of query, 8, got 4"),
        (dict(value=Q[..., :2, :]), "value must have the heads of key, 4, got 2"),
        (dict(key=Q[..., :3, :], value=Q[..., :3, :]), "multiple of those of key, got 4 and 3"),
        (dict(kernel_size=5, dilation=2), r"kernel_size 5 \* dilation 2 = 10 > length 8 on axis 0"),
        (dict(rpb=torch.zeros(4, 3, 3)), r"rpb must have shape .* = \(4, 5, 5\), got \(4, 3, 3\)"),
        (dict(rpb=torch.zeros(4, 5, 5), is_causal=(False, True)), "rpb cannot be combined with a causal axis"),
        (dict(kernel_size={3}), r"kernel_size must be one int or 2 of them \(one per axis\), got \{3\}"),
        (dict(scale=[1.0]), r"scale must be a number or None, got \[1.0\]"),
        (dict(scale="a"), "scale must be a number or None, got 'a'"),
        (dict(query=Q[..., :0], key=Q[..., :0]), "query must have a head_dim of at least 1, got 0"),
        (dict(value=Q[..., :0]), "value must have a head_dim of at least 1, got 0"),
        (dict(backend="cuda"), "backend must be None or one of 'reference', 'torch', 'triton', got 'cuda'"),
    ],
)
def test_bad_input(changes, message):
    arguments = dict(query=Q, key=Q, value=Q, kernel_size=3) | changes
    with pytest.raises(ValueError, match=message):
        na2d(**arguments)


def test_scale_defaults_to_the_inverse_root_and_zero_is_legal():
    q, k, v = (torch.randn(1, 6, 6, 1, 4) for _ in range(3))
    torch.testing.assert_close(na2d(q, k, v, 3), na2d(q, k, v, 3, scale=0.5))
    out, lse = na2d(q, k, v, 3, scale=0.0, return_lse=True)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(9)))
    torch.testing.assert_close(out[0, 0, 0, 0], v[0, :3, :3, 0].mean((0, 1)))


def test_bias_that_changes_in_place_is_seen():
    """Bias and mask of a small map are kept between calls; writing through `.data` leaves no trace but the values."""
    q, k, v = torch.randn(1, 14, 14, 3, 2, 8).unbind(3)
    rpb = torch.nn.Parameter(torch.randn(2, 13, 13))
    for _ in range(2):
        expected = na2d(q, k, v, 7, rpb=rpb, backend="reference")
        torch.testing.assert_close(na2d(q, k, v, 7, rpb=rpb, backend="torch"), expected)
        rpb.data[:, 3:9] += 1
    other = rpb.detach().view(2, 13, 13)[:, :7, :7].contiguous()  # another window on the same map
    expected = na2d(q, k, v, 4, rpb=other, backend="reference")
    torch.testing.assert_close(na2d(q, k, v, 4, rpb=other, backend="torch"), expected)


def test_kept_biases_are_bounded(monkeypatch):
    cache = cpu._BiasCache()
    monkeypatch.setattr(cpu, "_biases", cache)
    monkeypatch.setattr(cpu, "_BIAS_CACHE", 4 * (4 * 2 * 14**4))  # four of two heads on 14x14 tokens
    q, k, v = torch.randn(2, 14, 14, 3, 2, 8).unbind(3)
    tables = [torch.randn(2, 13, 13) for _ in range(9)]
    for rpb in tables + tables:
        na2d(q, k, v, 7, rpb=rpb, backend="torch")
    assert len(cache._entries) == 4
    assert cache._bytes == sum(bias.nbytes for _, bias in cache._entries.values())


def _packed(*shape):
    return torch.randn(*shape[:-2], 3, *shape[-2:]).unbind(-3)


def _neighbors_by_chance(*shape):
    """Key and value follow the query in memory as in a packed projection, but PyTorch knows of three storages."""
    memory = torch.randn(math.prod(shape) * 3).numpy()
    width, tokens = math.prod(shape[-2:]), math.prod(shape[:-2])
    rows = (torch.from_numpy(memory[i * width :]) for i in range(3))
    return [x[: (tokens - 1) * 3 * width + width].as_strided((tokens, width), (3 * width, 1)).view(shape) for x in rows]


LAYOUTS = {
    "contiguous": lambda *shape: [torch.randn(shape) for _ in range(3)],
    "packed": _packed,
    "neighbors by chance": _neighbors_by_chance,
    "heads first": lambda *s: [torch.randn(s[0], s[3], *s[1:3], s[4]).permute(0, 2, 3, 1, 4) for _ in range(3)],
    "width first": lambda *s: [torch.randn(s[0], s[2], s[1], *s[3:]).transpose(1, 2) for _ in range(3)],
    "last dimension strided": lambda *s: [torch.randn(*s[:4], 2 * s[4])[..., ::2] for _ in range(3)],
    "mixed": lambda *s: [_packed(*s)[1], torch.randn(s), torch.randn(*s[:3], 2 * s[3], s[4])[:, :, :, ::2]],
    "parts of wider ones": lambda *s: [torch.randn(*s[:3], 4 * s[3], s[4])[:, :, :, : s[3]] for _ in range(3)],
    "one image of more": lambda *s: [x[: s[0]] for x in _packed(s[0] + 2, *s[1:])],
    "every other image": lambda *s: [x[::2] for x in _packed(2 * s[0], *s[1:])],
}


@pytest.mark.parametrize("small", [False, True], ids=["", "small chunks"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_the_fused_path(layout, batch, small, monkeypatch):
    """Maps, halves, dense groups and halos, wherever q, k and v lie; results are contiguous, as the op's fake says."""
    if small:  # several calls, of some images or some rows of tiles
        monkeypatch.setattr(cpu, "_SCRATCH", 40_000)
        monkeypatch.setattr(cpu, "_BIAS_CHUNK", 5_000)
    forget()
    torch.manual_seed(0)
    assert plan.plan_of((14, 15), make_neighborhood(2, 7), cpu._COSTS_OF_ONE_IMAGE).are_halves
    for size, dilation in [((7, 9), 1), ((14, 15), 1), ((14, 15), 2), ((21, 17), 1)]:
        q, k, v = LAYOUTS[layout](batch, *size, 2, 8)
        for rpb in (None, torch.randn(2, 13, 13), torch.randn(2, 13, 26)[..., ::2]):
            for _ in range(2):  # prepared, and found again
                out, lse = na2d(q, k, v, 7, dilation=dilation, rpb=rpb, return_lse=True, backend="torch")
                expected = na2d(q, k, v, 7, dilation=dilation, rpb=rpb, return_lse=True, backend="reference")
                torch.testing.assert_close((out, lse), expected, atol=2e-5, rtol=0)
                assert out.is_contiguous()
                assert lse.is_contiguous()
                out = na2d(q, k, v, 7, dilation=dilation, rpb=rpb, backend="torch")
                torch.testing.assert_close(out, expected[0], atol=2e-5, rtol=0)
    forget()


PACKED = {
    "as projected": lambda *shape: torch.randn(*shape[:-2], 3, *shape[-2:]),
    "of more images": lambda *shape: torch.randn(shape[0] + 2, *shape[1:-2], 3, *shape[-2:])[1:-1],
    "one by one": lambda *shape: torch.randn(3, *shape).movedim(0, -3),
    "with a gap": lambda *shape: torch.randn(*shape[:-2], 6, *shape[-2:])[..., ::2, :, :],
    "heads first": lambda *shape: torch.randn(*shape[:-2], shape[-2], 3, shape[-1]).transpose(-3, -2),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", PACKED)
def test_packed_projections(layout, batch, dtype):
    """As layers hand them over: values and gradients against the reference, which gets query, key and value."""
    torch.manual_seed(0)
    for size, dilation in [((7, 9), 1), ((14, 15), 1), ((14, 14), 2), ((21, 17), 1)]:
        packed = PACKED[layout](batch, *size, 2, 8).to(dtype).requires_grad_()
        rpb = torch.randn(2, 13, 13, dtype=dtype, requires_grad=True)
        window = make_neighborhood(2, 7, dilation)

        def attend(*inputs, backend, window=window, rpb=rpb):
            return functional.attend(2, *inputs, window, None, rpb, return_lse=True, backend=backend)

        def gradients(out, lse, packed=packed, rpb=rpb):
            return torch.autograd.grad(out.sin().sum() + lse.sum(), [packed, rpb])

        expected = attend(*packed.unbind(-3), backend="reference")
        expected_gradients = gradients(*expected)
        for backend in BACKENDS:
            with torch.no_grad():
                torch.testing.assert_close(attend(packed, None, None, backend=backend), expected, atol=2e-5, rtol=0)
            actual = attend(packed, None, None, backend=backend)
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(gradients(*actual), expected_gradients, atol=1e-4, rtol=1e-5)


def test_a_packed_projection_has_three_parts():
    packed = torch.randn(1, 7, 7, 2, 1, 8)
    for backend in BACKENDS:
        with pytest.raises(ValueError, match=r"must have shape \(..., 3, heads, dim\), got \(1, 7, 7, 2, 1, 8\)"):
            functional.attend(2, packed, None, None, make_neighborhood(2, 7), None, None, False, backend)


def test_a_bias_for_several_images(monkeypatch):
    """Five images, two and two and one at a time."""
    window = make_neighborhood(2, 7)
    p = plan.plan_of((21, 17), window, cpu._COSTS)
    assert not p.uniform
    monkeypatch.setattr(cpu, "_BIAS_OF_IMAGES", 2 * 2 * math.prod(p.counts) * p.query_slots * p.key_slots)
    forget()
    q, k, v = torch.randn(5, 21, 17, 3, 2, 8).unbind(3)
    for rpb in (None, torch.randn(2, 13, 13)):
        expected = na2d(q, k, v, 7, rpb=rpb, return_lse=True, backend="reference")
        for _ in range(2):
            actual = na2d(q, k, v, 7, rpb=rpb, return_lse=True, backend="torch")
            torch.testing.assert_close(actual, expected, atol=2e-5, rtol=0)
    forget()


def test_results_are_not_the_memory_of_tiles():
    q, k, v = torch.randn(1, 21, 21, 3, 2, 8).unbind(3)
    first = na2d(q, k, v, 7, backend="torch")
    before = first.clone()
    na2d(v, q, k, 7, backend="torch")
    assert torch.equal(first, before)


def test_another_default_device(monkeypatch):
    """Tensors are where the inputs are, and memory that is kept is the CPU's."""
    monkeypatch.setattr(cpu, "_scratch", cpu._Scratch())
    forget()
    q, k, v = torch.randn(2, 21, 21, 3, 2, 8).unbind(3)
    with torch.device("meta"):
        out = na2d(q, k, v, 7, backend="torch")
    torch.testing.assert_close(out, na2d(q, k, v, 7, backend="reference"))


def test_calls_from_several_threads():
    """Kept biases are shared, memory for gathered tiles is each thread's own."""
    problems = []
    for side, dilation in [(14, 1), (14, 2), (21, 1), (28, 4)]:
        q, k, v = torch.randn(2, side, side, 3, 2, 8).unbind(3)
        rpb = torch.randn(2, 13, 13)
        expected = na2d(q, k, v, 7, dilation=dilation, rpb=rpb, backend="reference")
        problems.append((q, k, v, dilation, rpb, expected))

    def largest_error(seed: int) -> float:
        errors = []
        for q, k, v, dilation, rpb, expected in random.Random(seed).choices(problems, k=40):
            errors.append((na2d(q, k, v, 7, dilation=dilation, rpb=rpb, backend="torch") - expected).abs().max().item())
        return max(errors)

    with ThreadPoolExecutor(4) as pool:
        assert max(pool.map(largest_error, range(4))) < 2e-5
