"""The operator inside PyTorch's machinery: compile, export, autocast, torch.func, meta tensors, FLOPs, TorchScript."""

import subprocess
import sys

import pytest
import torch
from dinat_kernels import backends, impl, na2d
from dinat_kernels.impl.layout import Layout
from torch.autograd import forward_ad
from torch.export import Dim
from torch.utils.flop_counter import FlopCounterMode

forward, backward = torch.ops.dinat_kernels.attention, torch.ops.dinat_kernels.attention_backward


def make(requires_grad: bool = False) -> list[torch.Tensor]:
    """query, key, value of a (2, 8, 9) map with 4 heads, and a bias table for a 3x3 window."""
    return [torch.randn(2, 8, 9, 4, 8, requires_grad=requires_grad) for _ in range(3)] + [
        torch.randn(4, 5, 5, requires_grad=requires_grad)
    ]


def attend(q, k, v, rpb):
    return na2d(q, k, v, 3, dilation=(1, 2), rpb=rpb, return_lse=True)


class Attend(torch.nn.Module):
    def __init__(self, rpb: torch.Tensor) -> None:
        super().__init__()
        self.rpb = torch.nn.Parameter(rpb)

    def forward(self, q, k, v):
        return attend(q, k, v, self.rpb)[0]


WINDOW = ([3, 3, 1, 2, 1, 1, 0, 0], 0.3, "torch")


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_opcheck(with_bias, packed):
    q, k, v, rpb = make(requires_grad=True)
    if packed:
        q, k, v = torch.stack([q, k, v], -3).detach().requires_grad_(), None, None
    rpb = rpb if with_bias else None
    torch.library.opcheck(forward, (q, k, v, rpb, *WINDOW))
    with torch.no_grad():
        out, lse = forward(q, k, v, rpb, *WINDOW)
    grads = (torch.randn_like(out), torch.randn_like(lse))
    q, k, v, rpb = (None if x is None else x.detach() for x in (q, k, v, rpb))
    torch.library.opcheck(backward, (*grads, q, k, v, rpb, out, lse, *WINDOW))


def test_compiled_without_gradients_keeps_no_lse():
    """And the same function, once a gradient is wanted, is compiled again."""
    lses = []

    def backend(graph, inputs):
        (call,) = (n for n in graph.graph.nodes if n.target is forward)
        lses.append(call.args[-1])
        return graph

    q, k, v, rpb = make(requires_grad=True)
    compiled = torch.compile(lambda: na2d(q, k, v, 3, rpb=rpb), backend=backend, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(), na2d(q, k, v, 3, rpb=rpb))
    actual, expected = (
        torch.autograd.grad(out.sin().sum(), [q, rpb]) for out in (compiled(), na2d(q, k, v, 3, rpb=rpb))
    )
    torch.testing.assert_close(actual, expected)
    says_exporting = torch.compile(lambda: torch.compiler.is_exporting(), backend="eager")()  # always in PyTorch 2.10
    assert lses == [says_exporting, True]


def test_a_gradient_of_what_was_traced_without_is_an_error():
    q, k, v, rpb = make(requires_grad=True)
    with pytest.raises(RuntimeError, match="traced where no gradient was wanted"):
        forward(q, k, v, rpb, *WINDOW, False)
    torch.library.opcheck(forward, (*(x.detach() for x in (q, k, v, rpb)), *WINDOW, False))


def test_a_program_exported_without_gradients_has_them():
    """It is not compiled again, as a compiled function is."""

    class Layer(Attend):
        def forward(self, q, k, v):
            return na2d(q, k, v, 3, rpb=self.rpb)

    q, k, v, rpb = make()
    with torch.no_grad():
        program = torch.export.export(Layer(rpb), (q, k, v), strict=True).module()
    out = program(q, k, v)
    (actual,) = torch.autograd.grad(out.sin().sum(), program.rpb)
    (expected,) = torch.autograd.grad(na2d(q, k, v, 3, rpb=rpb.requires_grad_()).sin().sum(), rpb)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic):
    inputs = make(requires_grad=True)
    compiled = torch.compile(attend, fullgraph=True, dynamic=dynamic, backend="aot_eager")

    def outputs_and_gradients(function):
        outputs = function(*inputs)
        return [*outputs, *torch.autograd.grad(sum(o.sin().sum() for o in outputs), inputs)]

    for a, e in zip(outputs_and_gradients(compiled), outputs_and_gradients(attend), strict=True):
        torch.testing.assert_close(a, e)


def test_export_is_plain_aten_with_dynamic_batch():
    q, k, v, rpb = make()
    model = Attend(rpb)
    program = torch.export.export(model, (q, k, v), dynamic_shapes=[{0: Dim.DYNAMIC}] * 3)
    assert not [node for node in program.graph.nodes if "dinat" in str(node.target)]
    wider = [torch.cat([x, x, x]) for x in (q, k, v)]
    torch.testing.assert_close(program.module()(*wider), model(*wider))


@pytest.mark.parametrize(
    "options", [dict(strict=True), dict(dynamic_shapes=[{0: Dim.DYNAMIC, 1: Dim.DYNAMIC}] * 3)], ids=["strict", "size"]
)
def test_export_keeps_the_operator_where_it_cannot_be_unrolled(options):
    q, k, v, rpb = make()
    model = Attend(rpb)
    program = torch.export.export(model, (q, k, v), **options)
    assert [node for node in program.graph.nodes if node.target is forward.default]
    torch.testing.assert_close(program.module()(q, k, v), model(q, k, v))
    if "dynamic_shapes" in options:
        q, k, v = (torch.randn(3, 11, 9, 4, 8) for _ in range(3))
        torch.testing.assert_close(program.module()(q, k, v), model(q, k, v))


def test_vmap():
    q, k, v, rpb = make()
    queries, tables = torch.randn(3, *q.shape), torch.randn(4, 3, 5, 5)
    each = torch.stack([attend(x, k, v, rpb)[0] for x in queries])
    torch.testing.assert_close(torch.func.vmap(lambda x: attend(x, k, v, rpb)[0])(queries), each)
    mapped = torch.func.vmap(lambda x: attend(x, k, v, rpb)[0], in_dims=2, out_dims=1)
    torch.testing.assert_close(mapped(queries.movedim(0, 2)), each.movedim(0, 1))
    each = torch.stack([attend(q, k, v, t)[0] for t in tables.unbind(1)])
    torch.testing.assert_close(torch.func.vmap(lambda t: attend(q, k, v, t)[0], in_dims=1)(tables), each)


@pytest.mark.parametrize("argument", [0, 1, 3])
def test_per_sample_gradients(argument):
    _, k, v, rpb = make()
    queries = torch.randn(3, *k.shape)

    def loss(*inputs):
        return sum(o.sin().sum() for o in attend(*inputs))

    expected = []
    for q in queries:
        inputs = [x.clone().requires_grad_() for x in (q, k, v, rpb)]
        expected.append(torch.autograd.grad(loss(*inputs), inputs[argument])[0])
    actual = torch.func.vmap(torch.func.grad(loss, argnums=argument), in_dims=(0, None, None, None))(queries, k, v, rpb)
    torch.testing.assert_close(actual, torch.stack(expected))


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_autocast_halves_activations_and_keeps_the_bias(backend):
    q, k, v, rpb = make(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out, lse = na2d(q, k, v, 3, rpb=rpb, return_lse=True, backend=backend)
        out.float().sum().backward()
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)
    assert q.grad.dtype == rpb.grad.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        torch.testing.assert_close(na2d(q, k, v, 3, rpb=rpb, backend=backend), out)
    rounded = [x.detach().bfloat16().float() for x in (q, k, v)]
    exact, exact_lse = na2d(*rounded, 3, rpb=rpb.detach(), return_lse=True)
    torch.testing.assert_close(out.float(), exact, atol=2e-2, rtol=2e-2)
    # Autocast does not reach into the operator (that would cost 1e-2); the CPU's half kernel has an exp good to 2e-5.
    torch.testing.assert_close(lse, exact_lse, atol=2e-4, rtol=0)


def test_autocast_leaves_float64_and_integers_alone():
    q = torch.randn(1, 6, 6, 1, 2, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert na2d(q, q, q, 3).dtype == torch.float64
        with pytest.raises(ValueError, match="query must be a floating-point tensor"):
            na2d(q.int(), q, q, 3)


def test_the_operator_refuses_a_window_that_does_not_fit():
    q = torch.randn(1, 4, 4, 1, 2)
    with pytest.raises(ValueError, match=r"kernel_size 3 \* dilation 2 = 6 > length 4"):
        forward(q, q, q, None, [3, 3, 2, 2, 1, 1, 0, 0], 1.0, "")


def test_formulas_survive_a_look_at_the_flop_counter():
    script = """
import importlib.util, torch, dinat_kernels
importlib.util.find_spec("torch.utils.flop_counter")
from torch.utils.flop_counter import FlopCounterMode
q = torch.randn(1, 8, 8, 1, 4)
with FlopCounterMode(display=False) as counter:
    dinat_kernels.na2d(q, q, q, 3)
print(counter.get_total_flops())
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert int(run.stdout) == 2 * 64 * 9 * (4 + 4)


def test_meta_tensors():
    q, k, v, rpb = (x.to("meta") for x in make())
    out, lse = attend(q, k, v, rpb)
    assert (out.shape, lse.shape, out.device.type) == ((2, 8, 9, 4, 8), (2, 8, 9, 4), "meta")
    for dtype, of_lse in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        out, lse = attend(*(x.to(dtype) for x in (q, k, v)), rpb)
        assert (out.dtype, lse.dtype) == (dtype, of_lse)


@pytest.mark.parametrize("packed", [True, False])
def test_flops_count_visible_keys(packed):
    q, k, v, rpb = make(requires_grad=True)
    inputs = (torch.stack([q, k, v], -3), None, None) if packed else (q, k, v)
    with FlopCounterMode(display=False) as counter:
        forward(*inputs, rpb, *WINDOW)[0].sum().backward()
    product = 2 * 2 * 72 * 4 * 9 * 8  # one matrix product: 2 FLOP x batch x queries x heads x visible keys x head_dim
    assert counter.get_total_flops() == product * (2 + 5)
    if not packed:  # five products, three of head_dim and two of value_dim: logits twice, both gradients of them
        with FlopCounterMode(display=False) as counter:
            forward(q, k, v[..., :5], rpb, *WINDOW)[0].sum().backward()
        assert counter.get_total_flops() == product // 8 * (8 + 5 + 3 * 8 + 2 * 5)


def test_flops_of_a_backward_pass_alone():
    q, k, v, rpb = make(requires_grad=True)
    out = na2d(q, k, v, 3, rpb=rpb).sum()
    with FlopCounterMode(display=False) as counter:
        out.backward()
    assert counter.get_total_flops() == 5 * 2 * 2 * 72 * 4 * 9 * 8


def test_autocast_does_not_reach_the_backward_pass():
    inputs = make(requires_grad=True)
    out = na2d(*inputs[:3], 3, rpb=inputs[3])
    expected = torch.autograd.grad(out.sum(), inputs, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(out.sum(), inputs)
    torch.testing.assert_close(actual, expected, atol=0, rtol=0)


@pytest.mark.parametrize("argument", range(4))
def test_one_input_alone_may_want_a_gradient(argument):
    inputs = make(requires_grad=True)
    (expected,) = torch.autograd.grad(attend(*inputs)[0].sin().sum(), inputs[argument])
    alone = [x if i == argument else x.detach() for i, x in enumerate(inputs)]
    (actual,) = torch.autograd.grad(attend(*alone)[0].sin().sum(), alone[argument])
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PyTorch scripts a part of it
def test_forward_mode_is_exact_or_refused():
    """A tangent is never dropped."""
    q, k, v, direction = torch.randn(4, 1, 5, 6, 1, 3, dtype=torch.float64)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(q, direction)
        actual = forward_ad.unpack_dual(na2d(dual, k, v, 3, backend="reference")).tangent
        with pytest.raises((RuntimeError, NotImplementedError)):
            na2d(dual, k, v, 3, backend="torch")
    step = 1e-6 * direction
    expected = (na2d(q + step, k, v, 3) - na2d(q - step, k, v, 3)) / 2e-6
    torch.testing.assert_close(actual, expected, atol=1e-7, rtol=0)


def test_second_derivative_is_refused():
    q, k, v, _ = make(requires_grad=True)
    (grad,) = torch.autograd.grad(na2d(q, k, v, 3).sin().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()
    out = na2d(q, k, v, 3, backend="reference")
    (grad,) = torch.autograd.grad(out.sin().sum(), q, create_graph=True)
    grad.sum().backward()


def test_the_choice_of_a_backend(monkeypatch):
    """By what is known of CUDA tensors, of which there need not be any."""
    monkeypatch.setattr(impl, "_TRITON_INSTALLED", True)

    def chosen(dtype=torch.float16, device="cuda", head_dim=128, value_dim=128):
        shapes = ((1, 8, 1, dim) for dim in (head_dim, value_dim))
        query, value = (Layout(shape, (0, 0, 0, 1), dtype, torch.device(device)) for shape in shapes)
        return impl.resolve(None, query, value)

    assert (chosen(), chosen(device="cpu")) == ("triton", "torch")
    assert {chosen(torch.float64), chosen(head_dim=129), chosen(value_dim=129)} == {"torch"}


def test_dynamo_traces_the_choice_of_a_backend():
    """As it does for CUDA tensors, of which there need not be any."""
    cuda = torch.device("cuda")

    def choose(x):
        return x + 1 if impl.unavailable("triton", cuda) is None else x - 1

    compiled = torch.compile(choose, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.zeros(1)), choose(torch.zeros(1)))


def test_backends_say_what_runs_and_why_not():
    available = backends()
    assert available["reference"] is available["torch"] is None
    assert available["triton"]
    q, k, v, _ = make()
    with pytest.raises(RuntimeError, match="backend='triton' cannot run on cpu tensors here: "):
        na2d(q, k, v, 3, backend="triton")
