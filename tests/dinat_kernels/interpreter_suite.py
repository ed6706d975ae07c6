"""The Triton kernels in Triton's interpreter, on CPU tensors.  Run by test_triton_interpreter.py, in a process that has
TRITON_INTERPRET=1 from its start.  No bfloat16: the interpreter's products of it are wrong."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from dinat_kernels import backends, na1d, na2d, na3d
from dinat_kernels.impl import fused
from safetensors.torch import load_file

NA = {1: na1d, 2: na2d, 3: na3d}
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "ops_rpb.json").read_text()) + json.loads((GOLDEN / "ops_gna.json").read_text())


def programs(case: dict) -> int:
    """About how many programs a golden case needs; the interpreter runs some 50 a second."""
    dilations = case["dilation"] if isinstance(case["dilation"], list) else [case["dilation"]] * case["rank"]
    return case["batch"] * case["heads"] * math.prod(dilations) * max(1, math.prod(case["spatial"]) // 64)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Results start as NaN: what a kernel does not write shows."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))


@pytest.mark.parametrize("case", [case for case in CASES if programs(case) <= 12], ids=lambda case: case["name"])
def test_golden(case, fill):
    prefix = case.get("seed_prefix", case["name"])
    shape = (case["batch"], *case["spatial"], case["heads"], case["head_dim"])
    q, k, v = (fill.tensor_for_input(f"{prefix}/{name}", shape) for name in "qkv")
    table = (case["heads"],) + (2 * case["kernel_size"] - 1,) * case["rank"] if case["rpb"] else None
    results = NA[case["rank"]](
        q,
        k,
        v,
        case["kernel_size"],
        dilation=case["dilation"],
        stride=case.get("stride", 1),
        is_causal=case.get("is_causal", False),
        rpb=fill.tensor_for_input(f"{prefix}/rpb", table) if table else None,
        return_lse=True,
        backend="triton",
    )
    golden = load_file(GOLDEN / ("ops_rpb.safetensors" if case["rpb"] else "ops_gna.safetensors"))
    for name, result in zip(("out", "lse"), results, strict=True):
        torch.testing.assert_close(result, golden[f"{case['name']}/{name}"], atol=2e-5, rtol=0)


def random_problem(seed: int) -> dict:
    """Every head size, rank, dtype and kind of length (dense, dense + 1, any) in turn; the rest by chance."""
    rng = random.Random(seed)
    rank = (2, 1, 2, 3)[seed % 4]
    longest = {1: 60, 2: 14, 3: 5}[rank]
    lengths, kernel, dilation, stride, causal = [], [], [], [], []
    for _ in range(rank):
        k = rng.randint(1, {1: 12, 2: 7, 3: 3}[rank])
        d = rng.randint(1, min(longest // k, 5 - rank))
        lengths.append([k * d, k * d + 1, rng.randint(max(k * d, longest // 2), longest)][seed % 3])
        kernel.append(k)
        dilation.append(d)
        stride.append(rng.choice([1, 1, rng.randint(1, k)]))
        causal.append(rng.random() < 0.15)
    kv_heads = rng.choice([1, 1, 2])
    head_dim = (8, 16, 24, 32, 40, 64, 80, 128)[seed // 5]
    return dict(
        rank=rank,
        shape=(rng.choice([1, 1, 1, 2]), *lengths),
        heads=kv_heads * rng.choice([1, 1, 2]),
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=rng.choice([head_dim, head_dim, 8, 48]),
        rpb=rng.random() < 0.7 and not any(causal),
        scale=rng.choice([None, None, 0.0, 0.3, -0.2]),
        dtype=torch.float16 if seed % 5 == 0 else torch.float32,
        window=dict(kernel_size=kernel, dilation=dilation, stride=stride, is_causal=causal),
    )


@pytest.mark.parametrize("seed", range(40))
def test_matches_the_definition(seed):
    torch.manual_seed(seed)
    p = random_problem(seed)
    # Views of one packed projection, as in the layers.
    sizes = p["heads"] * p["head_dim"], p["kv_heads"] * p["head_dim"], p["kv_heads"] * p["value_dim"]
    heads = p["heads"], p["kv_heads"], p["kv_heads"]
    packed = torch.randn(*p["shape"], sum(sizes), dtype=p["dtype"]).split(sizes, -1)
    inputs = [x.unflatten(-1, (n, -1)) for x, n in zip(packed, heads, strict=True)]
    rpb = torch.randn(p["heads"], *(2 * k - 1 for k in p["window"]["kernel_size"])) if p["rpb"] else None
    options = dict(p["window"], scale=p["scale"], return_lse=True)
    attend = NA[p["rank"]]
    results = attend(*inputs, rpb=rpb, backend="triton", **options)
    exact_rpb = None if rpb is None else rpb.double()
    exact = attend(*[x.double() for x in inputs], rpb=exact_rpb, backend="reference", **options)
    rounding = [2e-5, 2e-5] if p["dtype"] == torch.float32 else [3e-3, 1e-4]
    for result, e, tolerance in zip(results, exact, rounding, strict=True):
        torch.testing.assert_close(result.double(), e, atol=tolerance, rtol=0)


@pytest.mark.parametrize("side", range(7, 15))
def test_published_window_on_small_maps(side):
    q, k, v = torch.randn(1, side, 21 - side if side < 14 else 7, 3, 1, 32).unbind(3)
    rpb = torch.randn(1, 13, 13)
    result = na2d(q, k, v, 7, rpb=rpb, backend="triton")
    torch.testing.assert_close(result, na2d(q, k, v, 7, rpb=rpb, backend="reference"), atol=2e-5, rtol=0)


def test_transposed_maps_are_read_in_place():
    q, k, v = (torch.randn(2, 6, 9, 2, 16).transpose(1, 2) for _ in range(3))
    result = na2d(q, k, v, 3, backend="triton")
    torch.testing.assert_close(result, na2d(q, k, v, 3, backend="reference"), atol=2e-5, rtol=0)


def test_offsets_of_64_bits(monkeypatch):
    """The same results with the arithmetic that large maps need."""
    q, k, v = torch.randn(1, 8, 9, 3, 2, 8).unbind(3)
    expected = na2d(q, k, v, 3, dilation=2, backend="triton")
    make_plan = fused.launch.make_plan

    def wide(*args):
        plan = make_plan(*args)
        return plan._replace(constants=plan.constants | dict(WIDE=True))

    monkeypatch.setattr(fused.launch, "_plan", wide)
    torch.testing.assert_close(na2d(q, k, v, 3, dilation=2, backend="triton"), expected, atol=0, rtol=0)


def test_gradients_are_those_of_the_tiled_backend():
    inputs = [torch.randn(1, 6, 7, 2, 8, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(2, 5, 5, requires_grad=True))

    def gradients(backend):
        q, k, v, rpb = inputs
        out, lse = na2d(q, k, v, 3, rpb=rpb, return_lse=True, backend=backend)
        return torch.autograd.grad(out.sin().sum() + lse.cos().sum(), inputs)

    for a, e in zip(gradients("triton"), gradients("reference"), strict=True):
        torch.testing.assert_close(a, e, atol=5e-5, rtol=1e-4)


def test_opcheck(monkeypatch):
    monkeypatch.undo()  # the checks compare what fakes allocate
    q, k, v = torch.randn(2, 5, 6, 3, 2, 8).unbind(3)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(
        torch.ops.dinat_kernels.attention, (*inputs, rpb, [3, 3], [1, 2], [1, 1], [0, 0], 0.3, "triton")
    )


def test_what_is_not_covered_is_refused():
    assert backends()["triton"] is None
    x = torch.randn(1, 8, 1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cannot run on cpu tensors here: .* have no torch\.float64"):
        na1d(x, x, x, 3, backend="triton")
    x = torch.randn(1, 8, 1, 129)
    with pytest.raises(RuntimeError, match="no head_dim or value_dim above 128"):
        na1d(x, x, x, 3, backend="triton")


def test_an_empty_batch_launches_nothing():
    x = torch.randn(0, 8, 1, 8)
    assert na1d(x, x, x, 3, backend="triton").shape == x.shape
