"""The Triton kernels in Triton's interpreter, on CPU tensors.  Run by test_triton_interpreter.py, in a process that has
TRITON_INTERPRET=1 from its start.  No bfloat16: the interpreter's products of it are wrong."""

import json
import math
import random
from pathlib import Path

import pytest
import torch
from dinat_kernels import backends, impl, na1d, na2d, na3d, tune
from dinat_kernels.functional import attend
from dinat_kernels.geometry import Neighborhood, make_neighborhood
from dinat_kernels.impl import fused
from dinat_kernels.impl.fused import configs
from dinat_kernels.impl.layout import Call, layout_of
from safetensors.torch import load_file
from torch.autograd import forward_ad

NA = {1: na1d, 2: na2d, 3: na3d}
GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "ops_rpb.json").read_text()) + json.loads((GOLDEN / "ops_gna.json").read_text())


def programs(case: dict) -> int:
    """About how many programs a golden case needs; the interpreter runs some 50 a second."""
    dilations = case["dilation"] if isinstance(case["dilation"], list) else [case["dilation"]] * case["rank"]
    return case["batch"] * case["heads"] * math.prod(dilations) * max(1, math.prod(case["spatial"]) // 64)


pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("case", [case for case in CASES if programs(case) <= 10], ids=lambda case: case["name"])
def test_golden(case, fill):
    prefix = case.get("seed_prefix", case["name"])
    shape = (case["batch"], *case["spatial"], case["heads"], case["head_dim"])
    inputs = [fill.tensor_for_input(f"{prefix}/{name}", shape) for name in "qkv"]
    if case["rpb"]:
        table = (case["heads"],) + (2 * case["kernel_size"] - 1,) * case["rank"]
        inputs.append(fill.tensor_for_input(f"{prefix}/rpb", table))
    inputs = [x.requires_grad_() for x in inputs]
    q, k, v, *rpb = inputs
    out, lse = NA[case["rank"]](
        q,
        k,
        v,
        case["kernel_size"],
        dilation=case["dilation"],
        stride=case.get("stride", 1),
        is_causal=case.get("is_causal", False),
        rpb=rpb[0] if rpb else None,
        return_lse=True,
        backend="triton",
    )
    results = dict(out=(out, 2e-5), lse=(lse, 2e-5))
    if rpb:  # those are the cases with gradients
        dq, dk, dv, drpb = torch.autograd.grad(out, inputs, fill.tensor_for_input(f"{prefix}/dout", shape))
        results |= dict(dq=(dq, 5e-5), dk=(dk, 5e-5), dv=(dv, 5e-5), drpb=(drpb, 1e-4 * drpb.abs().max().item()))
    golden = load_file(GOLDEN / ("ops_rpb.safetensors" if case["rpb"] else "ops_gna.safetensors"))
    for name, (result, tolerance) in results.items():
        torch.testing.assert_close(result, golden[f"{case['name']}/{name}"], atol=tolerance, rtol=0)


def random_problem(seed: int) -> dict:
    """Every head size, rank, dtype and kind of length (dense, dense + 1, any) in turn; the rest by chance."""
    rng = random.Random(seed)
    rank = (2, 1, 2, 3)[seed % 4]
    longest = {1: 50, 2: 10, 3: 4}[rank]
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


def compare(p: dict, seed: int = 0) -> None:
    """Outputs and all gradients with those of the definition in float64, with or without a gradient of lse."""
    torch.manual_seed(seed)
    half = p["dtype"] == torch.float16
    # Views of one packed projection, as in the layers.
    sizes = p["heads"] * p["head_dim"], p["kv_heads"] * p["head_dim"], p["kv_heads"] * p["value_dim"]
    heads = p["heads"], p["kv_heads"], p["kv_heads"]
    packed = torch.randn(*p["shape"], sum(sizes), dtype=p["dtype"]).split(sizes, -1)
    inputs = [x.unflatten(-1, (n, -1)) for x, n in zip(packed, heads, strict=True)]
    if p["rpb"]:
        inputs.append(torch.randn(p["heads"], *(2 * k - 1 for k in p["window"]["kernel_size"])))
    d_out = torch.randn(*p["shape"], p["heads"], p["value_dim"], dtype=p["dtype"])
    d_lse = torch.randn(*p["shape"], p["heads"])

    def run(backend: str, dtype: torch.dtype | None) -> list[torch.Tensor]:
        leaves = [x.to(dtype or x.dtype).requires_grad_() for x in inputs]
        q, k, v, *rpb = leaves
        window = dict(p["window"], scale=p["scale"], rpb=rpb[0] if rpb else None)
        outputs = NA[p["rank"]](q, k, v, **window, return_lse=True, backend=backend)
        d_outputs = [d.to(x.dtype) for d, x in zip((d_out, d_lse), outputs, strict=True)]
        count = 1 + seed % 2  # outputs that have a gradient
        return [*outputs, *torch.autograd.grad(outputs[:count], leaves, d_outputs[:count])]

    tolerances = [3e-3, 1e-4, 2e-2, 2e-2, 2e-2, 2e-2] if half else [2e-5, 2e-5, 5e-5, 5e-5, 5e-5, 1e-4]
    for i, (result, exact) in enumerate(zip(run("triton", None), run("reference", torch.float64), strict=True)):
        largest = max(1.0, exact.abs().max().item()) if half or i == 5 else 1.0
        torch.testing.assert_close(result.double(), exact, atol=tolerances[i] * largest, rtol=0)


@pytest.mark.parametrize("seed", range(40))
def test_matches_the_definition(seed):
    compare(random_problem(seed), seed)


# Maps on which the published window is dense, one or a few tokens larger than that, and has an interior.
@pytest.mark.parametrize("side", range(7, 15))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_published_window_on_small_maps(side, dtype):
    shape, window = (1, side, 21 - side if side < 14 else 7), dict(kernel_size=[7, 7])
    compare(dict(PLAIN, rank=2, shape=shape, head_dim=32, value_dim=32, window=window, dtype=dtype))


PLAIN = dict(heads=1, kv_heads=1, rpb=True, scale=None, dtype=torch.float32)
# What is special about the inverse of a neighbourhood, and about tiles that are not full.
INVERSE = {
    "border keys are seen from up to kernel_size - 1 away": ((1, 23), [6], [1], [1], [False]),
    "strided windows": ((1, 23), [7], [1], [3], [False]),
    "blocks": ((1, 20), [6], [1], [6], [False]),
    "strided causal windows": ((1, 23), [7], [2], [4], [True]),
    "groups of unequal length": ((1, 11, 10), [3, 2], [3, 4], [1, 1], [False, False]),
    "a partial tile on each axis": ((1, 5, 9), [3, 3], [1, 1], [1, 2], [False, False]),
    "images of one program": ((4, 4, 4), [4, 4], [1, 1], [1, 1], [False, False]),
}


@pytest.mark.parametrize("name", INVERSE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_inverse_windows(name, dtype):
    shape, *axes = INVERSE[name]
    window = dict(zip(("kernel_size", "dilation", "stride", "is_causal"), axes, strict=True))
    rpb = not any(window["is_causal"])
    problem = dict(rank=len(shape) - 1, shape=shape, head_dim=8, value_dim=8, window=window, dtype=dtype, rpb=rpb)
    compare(PLAIN | problem)


@pytest.fixture
def plans_of(monkeypatch):
    """Compares with other configurations than the shipped ones, and returns the plans."""

    def run(problem: dict, **rows: configs.Config) -> list[fused.launch.Plan]:
        plans, make_plan = [], fused.launch.make_plan
        monkeypatch.setattr(fused.launch, "choose", lambda of: rows[of.kernel])
        monkeypatch.setattr(fused.launch, "make_plan", lambda *args: plans.append(make_plan(*args)) or plans[-1])
        fused.launch.forget_plans()
        compare(PLAIN | dict(rank=2, head_dim=8, value_dim=8) | problem)
        return plans

    return run


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_halves(dtype, plans_of):
    """Groups of two windows: a tile is as large as a window; those of keys have several blocks of queries."""
    row = configs.Config(16, 64, 4, 1)
    problem = dict(shape=(2, 8, 8), window=dict(kernel_size=[4, 4]), dtype=dtype)
    plans = plans_of(problem, forward=row, query=row, key=row._replace(block=32))
    assert {plan.extent for plan in plans} == {"halves"}
    assert {plan.constants["TILE"][:3] for plan in plans} == {(1, 4, 4)}
    assert all(plan.constants["BOX"][-1] > 1 for plan in plans if plan.name == "key")


# By hand: tiles of 4x4 have 6x6 on the other side, whole groups of 5x5 themselves, tiles of 4x8 5x9.
PARTS = {
    "halves": ((2, 8, 8), [4, 4], 1, (16, 16), (16, 16, 16)),
    "grouped queries": ((2, 8, 8), [4, 4], 2, (16, 32), (32, 16)),
    "whole groups": ((2, 5, 5), [5, 5], 1, (32, 16), (16, 16)),
    "tiles that are not full": ((1, 7, 11), [3, 3], 1, (32, 32), (32, 16)),
}


@pytest.mark.parametrize("name", PARTS)
def test_blocks_in_parts(name, plans_of):
    """One block holds the box, in parts of different sizes."""
    shape, kernel_size, heads, (tile, block), parts = PARTS[name]
    row = configs.Config(tile, block, 4, 1, parts=4)
    problem = dict(shape=shape, heads=heads, window=dict(kernel_size=kernel_size), dtype=torch.float32)
    plans = plans_of(problem, forward=row, query=row, key=row)
    assert {plan.constants["BQ" if plan.name == "key" else "BK"] for plan in plans} == {parts}
    assert {plan.constants["BOX"][-1] for plan in plans} == {1}


def test_tiles_are_near_cubes():
    shape = fused.launch.tile_shape
    assert shape((1, 56, 56), 16) == (1, 4, 4)
    assert shape((1, 56, 56), 40) == (1, 5, 8)
    assert shape((1, 4, 56), 40) == (1, 4, 10)  # no longer than the group
    assert shape((16, 32, 32), 40) == (2, 4, 4)  # 3x4x4 are too many
    assert shape((1, 5, 8), 40) == (1, 5, 8)


def test_a_box_that_no_block_holds_has_blocks_without_parts():
    shape = fused.launch.block_shape
    assert shape((1, 10, 14), 64, 3) == ((64, 64, 16), (10, 14, 1))
    assert shape((1, 11, 14), 128, 2) == ((128, 32), (11, 14, 1))
    assert shape((1, 14, 14), 64, 3) == shape((1, 14, 14), 64) == ((64,), (4, 14, 4))
    assert shape((1, 7, 7), 64, 3) == ((64,), (7, 7, 1))


def test_transposed_maps_are_read_in_place():
    q, k, v = (torch.randn(2, 6, 9, 2, 16).transpose(1, 2) for _ in range(3))
    result = na2d(q, k, v, 3, backend="triton")
    torch.testing.assert_close(result, na2d(q, k, v, 3, backend="reference"), atol=2e-5, rtol=0)


def of_packed(packed: torch.Tensor, rpb: torch.Tensor, window: Neighborhood, backend: str) -> list[torch.Tensor]:
    """Output and gradients of a layer's packed projection."""
    out = attend(2, packed, None, None, window, None, rpb, return_lse=False, backend=backend)
    return [out, *torch.autograd.grad(out.sin().sum(), (packed, rpb))]


@pytest.mark.parametrize(
    ("size", "gap"), [((7, 8), 1), ((7, 8), 2), ((6, 6), 1)], ids=["halo", "with a gap", "whole groups"]
)
def test_gradients_of_a_packed_projection(size, gap):
    """Written where the projection's backward pass reads them, beside each other, wherever it lies itself."""
    packed = torch.randn(2, *size, 3 * gap, 2, 8)[..., ::gap, :, :].requires_grad_()
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    window = make_neighborhood(2, 3, 2)
    for result, exact in zip(*(of_packed(packed, rpb, window, name) for name in ("triton", "reference")), strict=True):
        torch.testing.assert_close(result, exact, atol=5e-5, rtol=0)


def test_offsets_of_64_bits(monkeypatch):
    """The same results with the arithmetic that large maps need."""
    packed, rpb = torch.randn(1, 8, 9, 3, 2, 8, requires_grad=True), torch.randn(2, 5, 5, requires_grad=True)
    window = make_neighborhood(2, 3, 2)
    expected = of_packed(packed, rpb, window, "triton")
    make_plan = fused.launch.make_plan

    def wide(*args):
        plan = make_plan(*args)
        return plan._replace(constants=plan.constants | dict(WIDE=True))

    monkeypatch.setattr(fused.launch, "make_plan", wide)
    fused.launch.forget_plans()
    torch.testing.assert_close(of_packed(packed, rpb, window, "triton"), expected, atol=0, rtol=0)


def test_two_runs_are_bit_equal():
    inputs = [torch.randn(1, 6, 7, 2, 8, requires_grad=True) for _ in range(3)]
    inputs.append(torch.randn(2, 5, 5, requires_grad=True))

    def gradients():
        q, k, v, rpb = inputs
        return torch.autograd.grad(na2d(q, k, v, 3, rpb=rpb, backend="triton").sin().sum(), inputs)

    assert all(map(torch.equal, gradients(), gradients()))


def test_one_optimizer_step_of_a_model():
    """Local and dilated layers on four map sizes, autograd around them, AdamW."""
    timm = pytest.importorskip("timm")
    import dinat  # noqa: F401

    images, labels = torch.randn(1, 3, 32, 32), torch.tensor([3])

    def step(backend: str) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = timm.create_model("dinat_pico", num_classes=4, depths=(2, 1, 1), backend=backend)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        return model.state_dict()

    expected = step("reference")
    for name, tensor in step("triton").items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-4, rtol=0, msg=name)


def test_opcheck():
    pytest.importorskip("expecttest")
    q, k, v = torch.randn(2, 5, 6, 3, 2, 8).unbind(3)
    rpb = torch.randn(2, 5, 5, requires_grad=True)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    torch.library.opcheck(torch.ops.dinat_kernels.attention, (*inputs, rpb, [3, 3, 1, 2, 1, 1, 0, 0], 0.3, "triton"))


def test_what_is_not_covered_is_refused():
    assert backends()["triton"] is None
    x = torch.randn(1, 8, 1, 8, dtype=torch.float64)
    with pytest.raises(RuntimeError, match=r"cannot run on cpu tensors here: .* have no torch\.float64"):
        na1d(x, x, x, 3, backend="triton")
    x = torch.randn(1, 8, 1, 129)
    with pytest.raises(RuntimeError, match="no head_dim or value_dim above 128"):
        na1d(x, x, x, 3, backend="triton")


def test_an_interpreter_that_fails_with_numpy_is_refused(monkeypatch):
    installed = dict(triton="3.6.0", numpy="2.4.0rc1")
    monkeypatch.setattr(impl.metadata, "version", installed.get)
    monkeypatch.setattr(impl, "uninterpretable", impl.uninterpretable.__wrapped__)  # not what it was before
    x = torch.randn(1, 8, 1, 8)
    with pytest.raises(RuntimeError, match=r"interpreter of Triton before 3\.7 needs NumPy before 2\.4"):
        na1d(x, x, x, 3, backend="triton")
    installed["triton"] = "3.10.0+git"
    assert impl.unavailable("triton", x.device) is None


def test_a_tangent_is_refused():
    """Kernels would lose it in silence."""
    x, direction = torch.randn(2, 1, 8, 1, 8)
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError)):
        na1d(forward_ad.make_dual(x, direction), x, x, 3, backend="triton")


def test_an_empty_batch_launches_nothing():
    x = torch.randn(0, 8, 1, 8)
    assert na1d(x, x, x, 3, backend="triton").shape == x.shape


def test_plans():
    """What no small problem shows: offsets of 64 bits, several images of a program, products in tf32."""

    def is_wide(*size: int) -> bool:
        shape = (*size, 4, 32)  # 2**7 elements a token
        layouts = ((shape, torch.empty(shape, device="meta").stride()),) * 3
        window = make_neighborhood(2, 7)
        gpu = fused.launch.Gpu("sm_90", 132)
        plan = fused.launch.make_plan("forward", layouts, torch.float16, gpu, window, False, 1, "ieee")
        return plan.constants["WIDE"]

    assert (is_wide(1, 4096, 4096), is_wide(1, 4096, 4095)) == (True, False)  # 2**31 elements, and 2**19 less
    assert (is_wide(16, 1024, 1024), is_wide(15, 1024, 1024)) == (True, False)
    images = fused.launch.images_per_program
    assert images(1, 8, 100, 1) == 1
    assert images(64, 8, 16, 1) == 32  # two parts fill the GPU, and take the time of 4 + 32 images
    assert images(64, 8, 23, 1) == 13  # five fill it almost twice: 2 * (4 + 13)
    assert images(127, 16, 16, 1) == 64  # at most, and then 63
    assert images(25, 100, 400, 1) == 7  # 7, 7, 7, 4


# Batches that no number of programs divides: the last one does the rest.
@pytest.mark.parametrize(("batch", "size"), [(n, (2, 7)) for n in (1, 3, 25)] + [(25, (3, 3)), (127, (3, 3))])
def test_batches(batch, size, monkeypatch):
    choose = fused.launch.images_per_program
    chosen = []
    monkeypatch.setattr(
        fused.launch, "images_per_program", lambda *args: chosen.append((args[0], choose(*args))) or chosen[-1][1]
    )
    fused.launch.forget_plans()
    window = dict(kernel_size=[min(3, n) for n in size])
    compare(PLAIN | dict(rank=2, shape=(batch, *size), head_dim=8, value_dim=8, window=window))
    assert any(n % images for n, images in chosen) == (batch in (25, 127))


@pytest.mark.parametrize("allowed", ["tf32", "ieee"])
def test_precision_is_what_pytorch_is_set_to(allowed):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, allowed
    try:
        assert fused.launch._precision(torch.float32) == allowed
        assert fused.launch._precision(torch.float16) == "ieee"
    finally:
        matmul.fp32_precision = before


def test_tune(monkeypatch, tmp_path):
    """The fastest configuration of each class of problems is kept, at once, and used from then on."""
    forward, query, halo = (
        configs.ProblemClass(kernel, "sm_90", 32, 16, extent, 9)
        for kernel, extent in (("forward", "dense"), ("query", "dense"), ("forward", "halo"))
    )
    slow = configs.Config(16, 32, 1, 1)
    (tmp_path / "tuned.json").write_text(json.dumps({str(forward): slow, "forward/sm_80": slow}))
    monkeypatch.setenv("DINAT_TUNE_FILE", str(tmp_path / "tuned.json"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    configs.user_configs.cache_clear()
    trials, tried, gpu = tune.trials, [], fused.launch.Gpu("sm_90", 132)

    def seconds(launch) -> float:
        """Three stages are fastest, eight warps do not run, and halos are interrupted."""
        if launch.plan.name == "key":
            raise KeyboardInterrupt
        if launch.plan.options["num_warps"] == 8:
            raise RuntimeError("out of resources")
        tried.append(launch.plan)
        return 4 - launch.plan.options["num_stages"]

    monkeypatch.setattr(tune, "on_gpu", seconds)
    monkeypatch.setattr(tune, "trials", lambda layer, batch, _, time: trials(layer, batch, "meta", time, gpu))
    with pytest.raises(KeyboardInterrupt):
        tune.main(["--dtype", "float32", "--head-dim", "8", "--kernel-size", "3", "--batch", "1"])
    tuned = json.loads((tmp_path / "tuned.json").read_text())
    best = {problem: configs.shipped(problem)._replace(num_stages=3) for problem in (forward, query, halo)}
    assert tuned == {str(problem): list(config) for problem, config in best.items()} | {"forward/sm_80": list(slow)}
    assert {plan.name for plan in tried} == {"forward", "query", "rpb"}  # each alone, a class those that it may change
    configs.user_configs.cache_clear()
    assert configs.choose(forward) == best[forward]
    assert configs.choose(forward._replace(window=25)) == configs.shipped(forward._replace(window=25))
    configs.user_configs.cache_clear()
    fused.launch.forget_plans()


@pytest.mark.parametrize("extent", ["dense", "halves", "halo"])
@pytest.mark.parametrize("kernel", ["forward", "query", "key"])
def test_candidates(kernel, extent):
    """What is shipped comes first, and is what others are compared with: those one step away, and those of the table.

    An H200 found the best of its halo's tiles two steps from what was shipped, 1.5 times as fast.
    """
    problem = configs.ProblemClass(kernel, "sm_90", 16, 32, extent, 49)
    shipped, *others = tune.candidates(problem)
    assert shipped == configs.shipped(problem)
    assert len({shipped, *others}) == 1 + len(others) <= 32
    assert shipped._replace(programs=2 * shipped.programs) in others
    for arch in ("sm_80", "sm_100", "gfx942"):
        assert configs.shipped(problem._replace(arch=arch)) in (shipped, *others)


@pytest.mark.parametrize("kind", ["fewer key heads", "wider values", "a key from elsewhere"])
def test_strides_of_query_key_and_value_differ(kind):
    kv_heads, value_dim = 2 if kind == "fewer key heads" else 4, 16 if kind == "wider values" else 8
    q, k, v = torch.randn(2, 6, 7, 4, 8), torch.randn(2, 6, 7, kv_heads, 8), torch.randn(2, 6, 7, kv_heads, value_dim)
    if kind == "a key from elsewhere":
        k = torch.randn(2, 6, 7, 5, 4, 8)[:, :, :, 2]
    inputs = [x.requires_grad_() for x in (q, k, v, torch.randn(4, 5, 5))]
    d_out = torch.randn(2, 6, 7, 4, value_dim)
    found = []
    for backend in ("triton", "reference"):
        out = na2d(*inputs[:3], 3, rpb=inputs[3], backend=backend)
        found.append([out, *torch.autograd.grad(out, inputs, d_out)])
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)


def test_gradients_may_lie_apart():
    """Each in rows of its own length, where query, key and value lie beside each other."""
    inputs = [x.requires_grad_() for x in torch.randn(2, 6, 7, 3, 4, 8).unbind(3)]
    call = Call(*map(layout_of, inputs), None, make_neighborhood(2, 3), 0.3, True, None)
    with torch.no_grad():
        out, lse = fused.prepare(call)(*inputs, None)
        d_out = torch.randn(out.shape)
        grads = [torch.empty(2, 6, 7, rows, 4, 8)[..., -1, :, :] for rows in (1, 2, 3)]
        backward = fused.prepare_backward(call, layout_of(d_out), False, list(map(layout_of, grads)))
        backward(d_out, None, *inputs, None, out, lse, grads)
    expected = torch.autograd.grad(na2d(*inputs, 3, scale=0.3, backend="reference"), inputs, d_out)
    torch.testing.assert_close(grads, list(expected), atol=1e-4, rtol=1e-4)


def test_kernels_one_by_one_are_the_passes():
    """What tuning and benchmarks time is a forward and a backward pass, in the same order and memory."""
    q, k, v = torch.randn(1, 6, 9, 3, 2, 8).unbind(3)
    rpb, d_out = torch.randn(2, 5, 5), torch.randn(1, 6, 9, 2, 8)
    inputs = [x.clone().requires_grad_() for x in (q, k, v, rpb)]
    out = na2d(*inputs[:3], 3, rpb=inputs[3], backend="triton")
    expected = torch.autograd.grad(out, inputs, d_out)
    launches = tune.launches(q, k, v, rpb, d_out, make_neighborhood(2, 3))
    assert [launch.plan.name for launch in launches] == ["forward", "query", "key"]
    assert all(launch.tensors[4].isnan().all() for launch in launches[:1])  # nothing has run yet
    for launch in launches:
        launch()
    assert torch.equal(launches[0].tensors[4], out)
    dq, dk, dv = (launches[1].tensors[-4], *launches[2].tensors[-2:])
    assert all(map(torch.equal, (dq, dk, dv), expected))


def test_model_of_volumes():
    """Odd sides, and an axis that is shorter than its dilated window."""
    from dinat.models import VolumeNAT

    options = dict(embed_dim=16, depths=(1,), num_heads=(1,), num_classes=3, kernel_size=3, stem_stride=2)
    ours, reference = (
        VolumeNAT(dilations=[[(1, 1, 2)]], backend=backend, **options).eval() for backend in ("triton", "reference")
    )
    reference.load_state_dict(ours.state_dict())
    volume = torch.randn(1, 1, 5, 7, 9)
    with torch.no_grad():
        torch.testing.assert_close(ours(volume), reference(volume), atol=1e-6, rtol=1e-5)
