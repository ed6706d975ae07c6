"""The operator as PyTorch sees it: schema, fake, autograd and vmap of one forward and one backward op.

Registered this way it works under torch.compile, torch.export, FX, TorchScript, autocast (see `functional`),
torch.func, meta tensors and FlopCounterMode (see `flops`), and a new backend changes none of that.  Nothing here
imports Triton.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from .geometry import Neighborhood, check_fits
from .impl import Passes, prepare
from .impl.layout import PREPARED, Forward, layouts_of, problem_of, unpacked
from .impl.precision import working_dtype

_lib = torch.library.Library("dinat_kernels", "DEF")
# Without key and value, the query is a packed projection (..., 3, heads, dim) of all three.  The window is one list,
# kernel_size, dilation, stride and is_causal (0 or 1) of every axis, because each list takes time to pass.
_INPUTS = "Tensor query, Tensor? key, Tensor? value, Tensor? rpb"
_WINDOW = "int[] window, float scale, str backend"
_lib.define(
    f"attention({_INPUTS}, {_WINDOW}, bool with_lse=True) "
    "-> (Tensor out, Tensor lse)",  # without lse, that is empty, and there is no gradient
    tags=[torch.Tag.pt2_compliant_tag],
)
_lib.define(
    f"attention_backward(Tensor grad_out, Tensor? grad_lse, {_INPUTS}, Tensor out, Tensor lse, {_WINDOW}) "
    "-> Tensor[]",  # of the inputs that there are
    tags=[torch.Tag.pt2_compliant_tag],
)


@lru_cache(maxsize=PREPARED)
def prepared(backend: str, flat_window: tuple[int, ...], scale: float, problem: tuple, with_lse: bool = True) -> Passes:
    """What plain calls, autograd and the ops below run; problem as `problem_of`."""
    window = Neighborhood.from_flat(flat_window)
    check_fits(window, layouts_of(problem)[0].shape[1:-2])  # traced and scripted layers come here unchecked
    return prepare(backend or None, problem, window, scale, with_lse=with_lse)


@torch.library.impl(_lib, "attention", "CompositeExplicitAutograd")
def _attention(query, key, value, rpb, window, scale, backend, with_lse=True):
    passes = prepared(backend, tuple(window), scale, problem_of(query, key, value, rpb), with_lse)
    out, lse = passes.forward(query, key, value, rpb)
    return out, lse if with_lse else out.new_empty(0)


@torch.library.impl(_lib, "attention_backward", "CompositeExplicitAutograd")
def _attention_backward(grad_out, grad_lse, query, key, value, rpb, out, lse, window, scale, backend):
    passes = prepared(backend, tuple(window), scale, problem_of(query, key, value, rpb))
    run = passes.backward(grad_out.stride(), grad_lse is not None)
    return run(grad_out, grad_lse, query, key, value, rpb, out, lse)


@torch.library.register_fake("dinat_kernels::attention", lib=_lib)
def _attention_fake(query, key, value, rpb, window, scale, backend, with_lse=True):
    query, _, value = unpacked(query, key, value)
    out = value.new_empty((*query.shape[:-1], value.shape[-1]))
    lse = query.new_empty(query.shape[:-1], dtype=working_dtype(query.dtype)) if with_lse else out.new_empty(0)
    return out, lse


@torch.library.register_fake("dinat_kernels::attention_backward", lib=_lib)
def _attention_backward_fake(grad_out, grad_lse, query, key, value, rpb, *args):
    return [x.new_empty(x.shape) for x in (query, key, value, rpb) if x is not None]


def _save_for_backward(ctx, inputs, output):
    query, key, value, rpb, *ctx.arguments, with_lse = inputs
    if not with_lse:
        raise RuntimeError(
            "neighborhood attention was traced where no gradient was wanted, and is asked for one. Trace it again, "
            "outside of torch.no_grad() and with an input that requires a gradient."
        )
    ctx.save_for_backward(query, key, value, rpb, *output)
    ctx.set_materialize_grads(False)  # lse has none, most of the time
    ctx.passes = None


def _differentiate(ctx, grad_out, grad_lse):
    saved = ctx.saved_tensors  # once: checkpointing gives them no second time
    if grad_out is None:
        grad_out = torch.zeros_like(saved[4])
    # With gradients enabled, somebody wants a second derivative: the op says that there is none.
    if ctx.passes is not None and not (_is_grad_enabled() or is_watched(grad_out, grad_lse)):
        grads = ctx.passes.backward(grad_out.stride(), grad_lse is not None)(grad_out, grad_lse, *saved)
    else:
        backward = _Backward.apply if _in_functorch() else torch.ops.dinat_kernels.attention_backward
        grads = backward(grad_out, grad_lse, *saved, *ctx.arguments)
    grads = iter(grads)
    return (*[None if x is None else next(grads) for x in saved[:4]], *[None] * (len(ctx.arguments) + 1))


def _refuse_double_backward(ctx, *grads):
    raise RuntimeError(
        'neighborhood attention has no second derivative. Use backend="reference" if you need one (small maps only).'
    )


torch.library.register_autograd("dinat_kernels::attention", _differentiate, setup_context=_save_for_backward, lib=_lib)
torch.library.register_autograd("dinat_kernels::attention_backward", _refuse_double_backward, lib=_lib)


class _Forward(torch.autograd.Function):
    """The same derivative for torch.func, whose transforms reject what `register_autograd` generates, and for dispatch
    modes, where that takes fifty microseconds longer.
    """

    generate_vmap_rule = True
    forward = staticmethod(lambda *args: torch.ops.dinat_kernels.attention(*args))
    setup_context = staticmethod(_save_for_backward)
    backward = staticmethod(_differentiate)


class _Direct(torch.autograd.Function):
    """The same derivative where nobody watches, without the dispatcher, which would take a hundred microseconds."""

    @staticmethod
    def forward(ctx, query, key, value, rpb, *arguments_and_passes):
        *arguments, passes = arguments_and_passes
        output = passes.forward(query, key, value, rpb)
        _save_for_backward(ctx, (query, key, value, rpb, *arguments, True), output)
        ctx.passes = passes
        return output

    backward = staticmethod(_differentiate)


class _Backward(torch.autograd.Function):
    generate_vmap_rule = True
    forward = staticmethod(lambda *args: tuple(torch.ops.dinat_kernels.attention_backward(*args)))
    setup_context = staticmethod(lambda ctx, inputs, output: None)
    backward = staticmethod(_refuse_double_backward)


def _in_functorch() -> bool:
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


_PLAIN = (Tensor, Parameter, type(None))
# Looked up once: on small maps, every step counts.
_is_compiling, _is_grad_enabled = torch.compiler.is_dynamo_compiling, torch.is_grad_enabled
_is_tracing, _is_transforming, _modes = (
    torch._C._is_tracing,
    torch._C._are_functorch_transforms_active,
    torch._C._len_torch_dispatch_stack,
)


def is_watched(*tensors: Tensor | None) -> bool:
    """Whether a compiler, tracer, transform, dispatch mode or subclass of Tensor wants to see what is done."""
    if _is_compiling() or _is_tracing() or _is_transforming() or _modes() or forward_ad._current_level >= 0:
        return True
    for x in tensors:  # noqa: SIM110  a loop is twice as fast as any()
        if type(x) not in _PLAIN:
            return True
    return False


def needs_grad(query: Tensor, key: Tensor | None, value: Tensor | None, rpb: Tensor | None) -> bool:
    """Whether autograd will want to differentiate a call on these tensors."""
    return _is_grad_enabled() and (
        query.requires_grad
        or (key is not None and (key.requires_grad or value.requires_grad))
        or (rpb is not None and rpb.requires_grad)
    )


def differentiable(backend: str, window: Neighborhood, scale: float, problem: tuple) -> Forward:
    """The forward op for tensors of these layouts that nobody watches, as autograd sees it; problem as `problem_of`."""
    arguments = window.flat(), scale, backend
    passes = prepared(backend, tuple(arguments[0]), scale, problem)
    return lambda query, key, value, rpb: _Direct.apply(query, key, value, rpb, *arguments, passes)


def attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    rpb: Tensor | None,
    window: Neighborhood,
    scale: float,
    backend: str,
    with_lse: bool,
) -> tuple[Tensor, Tensor]:
    """The forward op.

    Args:
        query, key, value: as in `unpacked`.
        backend: as `resolve` returns it.
        with_lse: if not, lse may be empty.
    """
    compiling = torch.compiler.is_compiling()
    op = torch.ops.dinat_kernels.attention if compiling or torch.jit.is_tracing() else _Forward.apply
    # torch.compile compiles again once a gradient is wanted; whoever traces otherwise may want one later.
    with_lse = with_lse or not compiling or torch.compiler.is_exporting() or needs_grad(query, key, value, rpb)
    return op(query, key, value, rpb, window.flat(), scale, backend, with_lse)


def _vmap(op, rpb_at: int, one_by_one):
    """The vmap rule of `op`: fold the mapped dimension into the batch, or loop where every sample has its own bias."""

    def rule(info, in_dims, *args):
        size = info.batch_size
        mapped = list(zip(args, in_dims, strict=True))
        if one_by_one(args[rpb_at], in_dims[rpb_at]):
            samples = [op(*[a.select(dim, i) if isinstance(dim, int) else a for a, dim in mapped]) for i in range(size)]
            results = [torch.stack(parts) for parts in zip(*samples, strict=True)]
        else:

            def fold(a, dim):
                a = a.expand(size, *a.shape) if dim is None else a.movedim(dim, 0)
                return a.flatten(0, 1)

            folded = [fold(a, dim) if isinstance(a, Tensor) and i != rpb_at else a for i, (a, dim) in enumerate(mapped)]
            results = [r.unflatten(0, (size, r.shape[0] // size)) for r in op(*folded)]
        pack = tuple if op is torch.ops.dinat_kernels.attention else list
        return pack(results), pack([0] * len(results))

    return rule


torch.library.register_vmap(
    "dinat_kernels::attention",
    _vmap(torch.ops.dinat_kernels.attention, 3, lambda rpb, dim: dim is not None),
    lib=_lib,
)
torch.library.register_vmap(
    "dinat_kernels::attention_backward",
    _vmap(torch.ops.dinat_kernels.attention_backward, 5, lambda rpb, dim: rpb is not None),
    lib=_lib,
)
