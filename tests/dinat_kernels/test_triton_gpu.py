"""The Triton kernels on a GPU: `pytest -m gpu`.  Everything here skips where there is none."""

from functools import partial

import pytest
import torch
from dinat_kernels import na1d, na2d, na3d
from dinat_kernels.functional import attend
from dinat_kernels.geometry import make_neighborhood

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA or ROCm device"),
]
NA = {1: na1d, 2: na2d, 3: na3d}
# Sizes of the map, window arguments, heads, kv_heads, head_dim, value_dim.
PROBLEMS = {
    "local": ((56, 56), dict(kernel_size=7), 2, 2, 32, 32),
    "dense groups": ((56, 56), dict(kernel_size=7, dilation=8), 2, 2, 32, 32),
    "remainders": ((45, 61), dict(kernel_size=7, dilation=(6, 8)), 3, 3, 32, 32),
    "whole map": ((7, 7), dict(kernel_size=7), 16, 16, 32, 32),
    "11x11 dense": ((44, 44), dict(kernel_size=11, dilation=4), 6, 6, 32, 32),
    "11x11": ((24, 24), dict(kernel_size=11), 4, 4, 32, 32),
    "even, strided": ((30, 33), dict(kernel_size=(6, 8), stride=(2, 8)), 4, 2, 64, 24),
    "causal sequence": ((1000,), dict(kernel_size=64, dilation=3, is_causal=True), 4, 1, 128, 128),
    "volume": ((8, 12, 10), dict(kernel_size=(3, 5, 3), dilation=(2, 1, 3)), 2, 2, 40, 80),
    "causal volume": ((8, 12, 10), dict(kernel_size=3, is_causal=(True, False, False)), 2, 2, 8, 16),
}


def make(name: str, dtype: torch.dtype, batch: int = 2) -> tuple[list[torch.Tensor], torch.Tensor | None, dict]:
    """Query, key, value as views of one packed projection, the bias table, the window."""
    size, window, heads, kv_heads, head_dim, value_dim = PROBLEMS[name]
    widths = (heads * head_dim, kv_heads * head_dim, kv_heads * value_dim)
    packed = torch.randn(batch, *size, sum(widths), device="cuda", dtype=dtype).split(widths, -1)
    q, k, v = (x.unflatten(-1, (n, -1)) for x, n in zip(packed, (heads, kv_heads, kv_heads), strict=True))
    rpb = None
    if not window.get("is_causal"):
        kernel_size = window["kernel_size"]
        sides = kernel_size if isinstance(kernel_size, tuple) else (kernel_size,) * len(size)
        rpb = torch.randn(heads, *(2 * side - 1 for side in sides), device="cuda")
    return [q, k, v], rpb, window


def eager(q, k, v, rpb, window):
    """The definition in the dtype of the inputs: logits, weights and output are all rounded."""
    dtype, size = q.dtype, q.shape[1:-2]
    # Visible pairs and their entries of the table, from the reference: logits are then the numbers of the entries.
    zero = q.new_zeros(1, *size, 1, 1, dtype=torch.float64)
    tokens = torch.eye(size.numel(), dtype=torch.float64, device=q.device).view(1, *size, 1, -1)
    numbers = None
    if rpb is not None:
        numbers = torch.arange(rpb[0].numel()).to(zero).view(1, *rpb.shape[1:]) / 2  # so that nothing underflows
    attend = NA[len(size)]
    probability, lse = attend(zero, zero, tokens, **window, rpb=numbers, return_lse=True, backend="reference")
    probability, lse = probability.view(size.numel(), -1), lse.view(-1, 1)  # (queries, keys)
    hidden = probability == 0
    bias = torch.zeros_like(probability)
    if rpb is not None:
        bias = rpb.flatten(1)[:, (2 * (probability.log() + lse)).masked_fill(hidden, 0).round().long()]
    bias = bias.masked_fill(hidden, -torch.inf)
    q, k, v = (x.flatten(1, -3).transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + bias.to(dtype)
    return (logits.softmax(-1) @ v).transpose(1, 2).unflatten(1, size)


def results(attend, inputs: list, rpb, d_out, d_lse=None) -> list[torch.Tensor]:
    """`attend(q, k, v, rpb)`, its lse where it has one, and all gradients."""
    leaves = [x.detach().requires_grad_() for x in (*inputs, rpb) if x is not None]
    outputs = attend(*leaves[:3], leaves[3] if rpb is not None else None)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    d_outputs = [d.to(out.dtype) for out, d in zip(outputs, (d_out, d_lse), strict=False)]
    return [*outputs, *torch.autograd.grad(outputs, leaves, d_outputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.usefixtures("poisoned")
def test_error_is_at_most_twice_that_of_eager(name, dtype):
    """Outputs and all gradients, in the dtype of the inputs, against the definition in float64."""
    inputs, rpb, window = make(name, dtype)
    attend = partial(NA[inputs[0].dim() - 3], **window)
    d_out = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1], device="cuda", dtype=dtype)
    doubles = [x.double() for x in inputs], None if rpb is None else rpb.double()
    exact = results(lambda q, k, v, rpb: attend(q, k, v, rpb=rpb, backend="reference"), *doubles, d_out)
    plain = results(lambda q, k, v, rpb: eager(q, k, v, rpb, window), inputs, rpb, d_out)
    fused = results(lambda q, k, v, rpb: attend(q, k, v, rpb=rpb, backend="triton"), inputs, rpb, d_out)
    for what, f, p, e in zip(("out", "dq", "dk", "dv", "drpb"), fused, plain, exact, strict=False):
        allowed = max(2 * (p.double() - e).abs().max().item(), 1e-6 * e.abs().max().item())
        error = (f.double() - e).abs().max().item()
        assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.usefixtures("poisoned")
def test_lse_and_its_gradient(name):
    inputs, rpb, window = make(name, torch.float32)
    attend = partial(NA[inputs[0].dim() - 3], **window, return_lse=True)
    d_out = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1], device="cuda")
    d_lse = torch.randn(inputs[0].shape[:-1], device="cuda")
    doubles = [x.double() for x in inputs], None if rpb is None else rpb.double()
    exact = results(lambda q, k, v, rpb: attend(q, k, v, rpb=rpb, backend="reference"), *doubles, d_out, d_lse)
    fused = results(lambda q, k, v, rpb: attend(q, k, v, rpb=rpb, backend="triton"), inputs, rpb, d_out, d_lse)
    for f, e in zip(fused, exact, strict=True):
        torch.testing.assert_close(f.double(), e, atol=1e-4 * max(1.0, e.abs().max().item()), rtol=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_tf32_is_used_where_pytorch_allows_it(name, monkeypatch):
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    inputs, rpb, window = make(name, torch.float32)
    attend = NA[inputs[0].dim() - 3]
    out = attend(*inputs, **window, rpb=rpb, backend="triton")
    exact_rpb = None if rpb is None else rpb.double()
    exact = attend(*[x.double() for x in inputs], **window, rpb=exact_rpb, backend="reference")
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=0)


@pytest.mark.parametrize("name", PROBLEMS)
def test_repeated_runs_are_bit_equal(name):
    inputs, rpb, window = make(name, torch.bfloat16)
    attend = partial(NA[inputs[0].dim() - 3], **window, backend="triton", return_lse=True)
    d_out = torch.randn(*inputs[0].shape[:-1], inputs[2].shape[-1], device="cuda")
    d_lse = torch.randn(inputs[0].shape[:-1], device="cuda")
    first, *others = (
        results(lambda q, k, v, rpb: attend(q, k, v, rpb=rpb), inputs, rpb, d_out, d_lse) for _ in range(3)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("packed", [False, True])
def test_training_keeps_inputs_outputs_and_gradients_only(packed):
    """Peak memory of forward and backward of a layer: nothing as large as q that is not one of its tensors."""
    (q, k, v), rpb, window = make("local", torch.bfloat16, batch=64)
    d_out = torch.randn_like(q, memory_format=torch.contiguous_format)
    inputs = [torch.stack([q, k, v], -3), None, None] if packed else [q, k, v]
    inputs = [x if x is None else x.detach().contiguous().requires_grad_() for x in (*inputs, rpb)]
    leaves = [x for x in inputs if x is not None]
    for _ in range(2):  # the first pass compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        out = attend(2, *inputs[:3], make_neighborhood(2, **window), None, inputs[3], return_lse=False, backend=None)
        torch.autograd.grad(out, leaves, d_out)
        peak = torch.cuda.max_memory_allocated() - before
    size = d_out.numel() * d_out.element_size()
    per_head = 4 * d_out.numel() // d_out.shape[-1]  # a float32 for every query
    assert peak <= 4 * size + 2 * per_head + (8 << 20)  # out, dq, dk, dv; lse, delta; parts of drpb


@pytest.mark.usefixtures("poisoned")
def test_gradients_of_a_packed_projection():
    """The same bits, written beside each other."""
    inputs, rpb, window = make("local", torch.bfloat16)
    packed = torch.stack(inputs, -3)
    d_out = torch.randn_like(inputs[0])

    out, dq, dk, dv, drpb = results(
        lambda q, k, v, rpb: na2d(q, k, v, **window, rpb=rpb), packed.unbind(-3), rpb, d_out
    )
    leaves = [packed.requires_grad_(), rpb.requires_grad_()]
    result = attend(2, packed, None, None, make_neighborhood(2, **window), None, rpb, return_lse=False, backend=None)
    actual = [result, *torch.autograd.grad(result, leaves, d_out)]
    assert all(map(torch.equal, actual, [out, torch.stack([dq, dk, dv], -3), drpb]))


def test_deterministic_algorithms_are_accepted():
    inputs, rpb, window = make("local", torch.bfloat16)
    torch.use_deterministic_algorithms(True)
    try:
        results(lambda q, k, v, rpb: na2d(q, k, v, **window, rpb=rpb), inputs, rpb, torch.randn_like(inputs[0]))
    finally:
        torch.use_deterministic_algorithms(False)


def test_automatic_choice_is_the_fused_kernel():
    (q, k, v), rpb, window = make("local", torch.bfloat16)
    assert torch.equal(na2d(q, k, v, **window, rpb=rpb), na2d(q, k, v, **window, rpb=rpb, backend="triton"))


def test_no_second_derivative():
    (q, k, v), rpb, window = make("local", torch.float32)
    q = q.detach().requires_grad_()
    (grad,) = torch.autograd.grad(na2d(q, k, v, **window, rpb=rpb).sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


def test_cuda_graph():
    (q, k, v), rpb, window = make("local", torch.bfloat16)
    expected = na2d(q, k, v, **window, rpb=rpb, backend="triton")  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = na2d(q, k, v, **window, rpb=rpb, backend="triton")
    out.fill_(torch.nan)
    graph.replay()
    assert torch.equal(out, expected)


def test_cuda_graphs_of_training():
    """Forward and backward pass, captured by PyTorch's own means."""
    inputs, rpb, window = make("local", torch.bfloat16)
    d_out = torch.randn_like(inputs[0])

    def attend(q, k, v, rpb):
        return na2d(q, k, v, **window, rpb=rpb, backend="triton")

    expected = results(attend, inputs, rpb, d_out)
    samples = tuple(x.detach().clone().requires_grad_() for x in (*inputs, rpb))
    graphed = torch.cuda.make_graphed_callables(attend, samples)
    actual = results(graphed, inputs, rpb, d_out)
    assert all(map(torch.equal, actual, expected))


def test_compile_fullgraph():
    inputs, rpb, window = make("dense groups", torch.bfloat16)
    d_out = torch.randn_like(inputs[0])

    def attend(q, k, v, rpb):
        return na2d(q, k, v, **window, rpb=rpb)

    compiled = results(torch.compile(attend, fullgraph=True), inputs, rpb, d_out)
    for c, e in zip(compiled, results(attend, inputs, rpb, d_out), strict=True):
        torch.testing.assert_close(c, e)


def test_opcheck():
    pytest.importorskip("expecttest")
    (q, k, v), rpb, _ = make("whole map", torch.float32)
    inputs = [x.detach().requires_grad_() for x in (q, k, v, rpb)]
    torch.library.opcheck(torch.ops.dinat_kernels.attention, (*inputs, [7, 7, 1, 1, 1, 1, 0, 0], 0.3, "triton"))


def test_more_than_2_to_the_31_elements():
    """One map whose offsets need 64 bits; the last rows against the same rows of a small map."""
    if torch.cuda.mem_get_info()[0] < 24 << 30:
        pytest.skip("needs 24 GiB of free device memory")
    rows, width, heads, dim = 22500, 512, 3, 64
    packed = torch.randn(1, rows, width, 3, heads, dim, device="cuda", dtype=torch.bfloat16)
    assert packed.numel() > 2**31
    out = na2d(*packed.unbind(3), 3, backend="triton")[:, -8:]
    expected = na2d(*packed[:, -16:].unbind(3), 3, backend="triton")[:, -8:]
    torch.testing.assert_close(out, expected, atol=0.02, rtol=0)
