r"""A function of time and its time derivative in one pass, at the price of two evaluations.

Forward-mode autodiff gives :math:`\partial_t f`, but torch's own differentiates norms and activations by many small steps,
each of which the gradient then differentiates again. Here the pair (value, tangent) runs through the network as one object,
:class:`Dual`, whose rules are written by hand where that pays: linear maps are applied to both, and activations, norms and
attention have fused kernels for the tangent and for its gradient. A torch function without a rule is differentiated by
``torch.func.jvp``.

What a Dual cannot follow raises :class:`UnsupportedError`, and the whole function is then differentiated in another way:
what writes into a tensor, an ``autograd.Function``, another transformation of ``torch.func``, autocast, ``torch.compile``,
or a change of the gradient mode within the function. A hook on a Dual sees the gradient of the value alone.

The gradient of activations and GroupNorm is written out once (:class:`_Activation`, :class:`_GroupNorm`); all else is
differentiated by autograd as usual.
"""

import contextvars
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

_aten = torch.ops.aten


class UnsupportedError(Exception):
    """An operation that a Dual cannot follow: whoever meets it differentiates the whole function in another way."""


class NestedError(UnsupportedError):
    """A derivative within a derivative, whose tangents a Dual cannot tell apart."""


class _Pass:
    """One evaluation of a function by Duals: what must not change in it, and the error that ended it, if any."""

    def __init__(self, device: str) -> None:
        self.device, self.grad = device, torch.is_grad_enabled()
        self.error: UnsupportedError | None = None

    def check(self) -> None:
        """Raises UnsupportedError where a rule would be wrong."""
        if torch.is_grad_enabled() != self.grad:  # within an autograd.Function too
            raise UnsupportedError("a change of the gradient mode, or an autograd.Function, within it")
        if (other := other_mode(self.device)) is not None:
            raise UnsupportedError(f"{other} within it")


def other_mode(device: str) -> str | None:
    """Returns the name of the mode that torch is in and that a Dual cannot follow, or None."""
    if torch._C._functorch.maybe_current_level() is not None:
        return "a transformation of torch.func"
    if torch.compiler.is_compiling():
        return "torch.compile"
    return "autocast" if torch.is_autocast_enabled(device) else None


_now: contextvars.ContextVar[_Pass | None] = contextvars.ContextVar("now", default=None)


def refuse_nesting() -> None:
    """Raises NestedError inside a function that :func:`value_and_tangent` evaluates."""
    now = _now.get()
    if now is not None:
        now.error = NestedError()
        raise now.error


class Dual(Tensor):
    """A tensor with its derivative in time, passed through networks in the place of a tensor.

    Attributes:
        primal: the value.
        tangent: its derivative, of the same shape.
        made_in: the pass that it belongs to.
    """

    primal: Tensor
    tangent: Tensor
    made_in: _Pass | None

    @staticmethod
    def __new__(cls, primal: Tensor, tangent: Tensor) -> "Dual":
        made: Dual = Tensor._make_wrapper_subclass(cls, primal.shape, dtype=primal.dtype, device=primal.device)
        made.primal, made.tangent, made.made_in = primal, tangent, _now.get()
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        now = _now.get()
        with torch._C.DisableTorchFunctionSubclass():
            try:
                if now is None or any(isinstance(one, Dual) and one.made_in is not now for one in args):
                    raise NestedError("a Dual outside of the pass that it belongs to")
                rule = _RULES.get(func)
                if rule is None:
                    return _without_rule(now, func, *args, **kwargs)
                now.check()
                if kwargs.get("out") is not None:
                    raise UnsupportedError(f"{func.__name__} writes into a tensor")
                return rule(*args, **kwargs)
            except UnsupportedError as error:  # kept, should the function catch it
                for involved in (now, *(one.made_in for one in args if isinstance(one, Dual))):
                    if involved is not None:
                        involved.error = error
                raise

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        raise UnsupportedError(f"{func} bypasses the rules of Dual")


def value_and_tangent(function: Callable[[Tensor], Any], t: Tensor) -> tuple[Any, Any]:
    """Returns function(t) and its derivative in direction 1, of tensors or nested tuples of them.

    Raises:
        UnsupportedError: the function does something that cannot be followed, such as writing into a tensor.
    """
    if not t.is_floating_point():
        raise UnsupportedError("times that are no real numbers")
    now = _Pass(t.device.type)
    token = _now.set(now)
    try:
        result = function(Dual(t, torch.ones_like(t)))
        result = tree_map(_value, result), tree_map(_tangent, result)
    except (torch.OutOfMemoryError, UnsupportedError):
        raise
    except (RuntimeError, TypeError, IndexError) as error:  # of a rule, or the function's own, which then shows up again
        raise UnsupportedError(str(error).split("\n")[0]) from error
    finally:
        _now.reset(token)
    if now.error is not None:
        raise now.error
    return result


def _value(tensor: Any) -> Any:
    return tensor.primal if isinstance(tensor, Dual) else tensor


def _tangent(tensor: Any) -> Any:
    return tensor.tangent if isinstance(tensor, Dual) else torch.zeros_like(tensor)


# What has no rule


def _without_rule(now: _Pass, func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    name = getattr(func, "__name__", str(func))
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    if name in _OF_THE_VALUE or (name == "type" and len(args) == 1 and not kwargs):
        return func(*map(_value, args), **{key: _value(value) for key, value in kwargs.items()})
    if name == "data":
        raise UnsupportedError("data hides a tensor from autograd")
    now.check()
    return _by_autodiff(func, *args, **kwargs)


def _by_autodiff(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    name = getattr(func, "__name__", str(func))
    in_place = (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
    if in_place or kwargs.get("out") is not None:
        raise UnsupportedError(f"{name} writes into a tensor")
    leaves, structure = tree_flatten((args, kwargs))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Dual)]

    def call(*primals: Tensor) -> Any:
        filled = list(leaves)
        for place, primal in zip(places, primals, strict=True):
            filled[place] = primal
        called_args, called_kwargs = tree_unflatten(filled, structure)
        return func(*called_args, **called_kwargs)

    primals, tangents = (tuple(getattr(leaves[place], one) for place in places) for one in ("primal", "tangent"))
    versions = [one._version for one in (*primals, *tangents)] if not torch.is_inference_mode_enabled() else None
    try:
        values, derivatives = torch.func.jvp(call, primals, tangents)[:2]
    except (RuntimeError, TypeError) as error:
        raise UnsupportedError(f"{name}: {str(error).splitlines()[0]}") from None
    if versions is not None and versions != [one._version for one in (*primals, *tangents)]:
        raise UnsupportedError(f"{name} writes into a tensor")
    return tree_map(lambda value, tangent: Dual(value, tangent) if _smooth(value) else value, values, derivatives)


def _smooth(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


_IN_PLACE = {"__set__", "__setitem__", "__delitem__"} | {
    f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
}
# no derivative, or that of a constant: they see the value alone
_OF_THE_VALUE = {
    *("size", "dim", "numel", "nelement", "ndimension", "stride", "is_floating_point", "is_complex", "is_contiguous"),
    *("element_size", "get_device", "__len__", "__hash__", "__repr__", "is_tensor", "is_same_size"),
    *("shape", "dtype", "device", "ndim", "layout", "names", "requires_grad", "is_leaf", "grad_fn", "grad", "_version"),
    *("is_cuda", "is_cpu", "is_mps", "is_xpu", "is_meta", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"),
    *("itemsize", "nbytes", "output_nr", "retains_grad", "_backward_hooks"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like", "result_type"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("__gt__", "__lt__", "__ge__", "__le__", "__eq__", "__ne__", "gt", "lt", "ge", "le", "eq", "ne"),
    *("isfinite", "isnan", "isinf", "argmax", "argmin", "detach", "__bool__", "equal", "allclose"),
    *("register_hook", "retain_grad"),  # of module trackers, such as the one of torch's counter of operations
}


# Linear maps


def _both(func: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of a map that is linear in its first argument, the only Dual among them, and has no constant."""

    @functools.wraps(func)
    def rule(first: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(first, Dual) or any(isinstance(other, Dual) for other in (*args, *kwargs.values())):
            return _by_autodiff(func, first, *args, **kwargs)
        values, tangents = func(first.primal, *args, **kwargs), func(first.tangent, *args, **kwargs)
        if isinstance(values, Tensor):
            return Dual(values, tangents) if _smooth(values) else values
        return tuple(Dual(value, tangent) for value, tangent in zip(values, tangents, strict=True))

    return rule


def _view(first: Any, *args: Any) -> Any:
    if isinstance(args[0], torch.dtype):
        raise UnsupportedError("a view as another type")
    return Dual(first.primal.view(*args), first.tangent.reshape(*args))  # whose memory may lie otherwise


def _joined(func: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of cat and stack: linear in a sequence of tensors, Dual or not."""

    @functools.wraps(func)
    def rule(tensors: Any, *args: Any, **kwargs: Any) -> Any:
        tangents = [_tangent(tensor) for tensor in tensors]
        return Dual(func([_value(tensor) for tensor in tensors], *args, **kwargs), func(tangents, *args, **kwargs))

    return rule


def _affine(func: Callable[..., Any]) -> Callable[..., Any]:
    """The rule of layers func(input, weight, bias, ...) with a constant weight: the bias belongs to the value alone."""

    @functools.wraps(func)
    def rule(input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(input, Dual) or isinstance(weight, Dual) or isinstance(bias, Dual):
            return _by_autodiff(func, input, weight, bias, *args, **kwargs)
        value = func(input.primal, weight, bias, *args, **kwargs)
        return Dual(value, func(input.tangent, weight, None, *args, **kwargs))

    return rule


# Sums and products


def _add(a: Any, b: Any, *, alpha: float = 1) -> Any:
    value = torch.add(_value(a), _value(b), alpha=alpha)
    if isinstance(a, Dual) and isinstance(b, Dual):
        return Dual(value, torch.add(a.tangent, b.tangent, alpha=alpha))
    tangent = a.tangent if isinstance(a, Dual) else b.tangent if alpha == 1 else alpha * b.tangent
    tangent = tangent.to(value.dtype)
    return Dual(value, tangent if tangent.shape == value.shape else tangent.expand_as(value).contiguous())


def _sub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    if isinstance(a, (int, float)):  # torch.sub takes no number in front
        return Dual(a - b.primal if alpha == 1 else a - alpha * b.primal, -alpha * b.tangent)
    return _add(a, b, alpha=-alpha)


def _rsub(a: Any, b: Any, *, alpha: float = 1) -> Any:
    return _sub(b, a, alpha=alpha)


def _mul(a: Any, b: Any) -> Any:
    value = torch.mul(_value(a), _value(b))
    if isinstance(a, Dual) and isinstance(b, Dual):
        return Dual(value, torch.addcmul(a.tangent * b.primal, a.primal, b.tangent))
    return Dual(value, a.tangent * b if isinstance(a, Dual) else a * b.tangent)


def _div(a: Any, b: Any, *, rounding_mode: str | None = None) -> Any:
    if rounding_mode is not None:
        raise UnsupportedError("a division that rounds")
    if not isinstance(b, Dual):
        return Dual(a.primal / b, a.tangent / b)
    value = _value(a) / b.primal
    numerator = a.tangent - value * b.tangent if isinstance(a, Dual) else -value * b.tangent
    return Dual(value, numerator / b.primal)


def _rdiv(a: Any, b: Any) -> Any:
    return _div(b, a)


def _matmul(a: Any, b: Any) -> Any:
    value = torch.matmul(_value(a), _value(b))
    terms = []
    if isinstance(a, Dual):
        terms.append(torch.matmul(a.tangent, _value(b)))
    if isinstance(b, Dual):
        terms.append(torch.matmul(_value(a), b.tangent))
    return Dual(value, terms[0] if len(terms) == 1 else terms[0] + terms[1])


def _rmatmul(a: Any, b: Any) -> Any:
    return _matmul(b, a)


# Functions of one number


def _elementwise(func: Callable[..., Any], slope: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The rule of y = func(x) with dy/dx = slope(x, y)."""

    @functools.wraps(func)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return _by_autodiff(func, x, *args, **kwargs)
        y = func(x.primal)
        return Dual(y, slope(x.primal, y) * x.tangent)

    return rule


def _pow(x: Any, exponent: Any) -> Any:
    if isinstance(x, Dual) and isinstance(exponent, (int, float)):
        if exponent == 0:
            return Dual(torch.ones_like(x.primal), torch.zeros_like(x.tangent))
        if exponent == 2:
            return Dual(x.primal.square(), 2 * x.primal * x.tangent)
        return Dual(x.primal**exponent, exponent * x.primal ** (exponent - 1) * x.tangent)
    return _by_autodiff(torch.pow, x, exponent)


class _ActivationRule(NamedTuple):
    """An activation a: its value, and what its derivatives at x do to a tensor v, given y = a(x) too."""

    value: Callable[[Tensor], Tensor]
    """Returns a(x)."""
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Returns a'(x) v, of (v, x, y)."""
    curvature: Callable[[Tensor, Tensor, Tensor], Tensor]
    """Returns a''(x) v, of (v, x, y)."""


class _Activation(torch.autograd.Function):
    r"""An activation a with its tangent, (a(x), a'(x) x'); the gradient in x is :math:`a' g + a''\, x' g'`."""

    @staticmethod
    def forward(x: Tensor, tangent: Tensor, rule: _ActivationRule) -> tuple[Tensor, Tensor]:
        y = rule.value(x)
        return y, rule.slope(tangent, x, y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, tangent, ctx.rule = inputs
        ctx.save_for_backward(x, tangent, output[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_tangent: Tensor) -> tuple[Any, ...]:
        x, tangent, y = ctx.saved_tensors
        rule = ctx.rule
        if torch.is_grad_enabled():  # for a second gradient, which the kernels have not
            return *_backward_again(ctx, rule.value, rule.value, (x, tangent), (grad, grad_tangent)), None
        wanted, wanted_tangent = ctx.needs_input_grad[:2]
        in_x = rule.slope(grad, x, y) + rule.curvature(tangent * grad_tangent, x, y) if wanted else None
        return in_x, rule.slope(grad_tangent, x, y) if wanted_tangent else None, None


def _backward_again(
    ctx: Any,
    value: Callable[..., Tensor],
    moved: Callable[[Tensor], Tensor],
    inputs: tuple[Tensor | None, ...],
    grads: tuple[Tensor | None, Tensor | None],
) -> list[Tensor | None]:
    """Returns the gradients in x, its tangent, and other inputs, by a graph that has gradients of its own.

    Args:
        ctx: of the backward pass.
        value: the value, a function of x and the other inputs.
        moved: the function of x whose derivative the tangent goes through.
        inputs: x, its tangent, and the other inputs.
        grads: of the value and of the tangent.
    """
    # under other names: the tangent may depend on x, and that path is not to be followed here
    renamed = [None if tensor is None else tensor.view_as(tensor) for tensor in inputs]
    x, tangent, *others = renamed
    results = (value(x, *others), torch.func.jvp(moved, (x,), (tangent,))[1])
    wanted = [place for place in range(len(inputs)) if ctx.needs_input_grad[place]]
    outputs, given = zip(*(pair for pair in zip(results, grads, strict=True) if pair[1] is not None), strict=True)
    chosen = [tensor for place, tensor in enumerate(renamed) if place in wanted and tensor is not None]
    found = torch.autograd.grad(outputs, chosen, given, create_graph=True, allow_unused=True)
    return [found[wanted.index(place)] if place in wanted else None for place in range(len(inputs))]


def _silu_curvature(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    # s (1 - s) (2 + x - 2 y) v; in place, as these passes over memory are what it costs, but for v, which may be batched
    s = torch.sigmoid(x)
    return torch.addcmul(s, s, s, value=-1).mul_(torch.sub(x, y, alpha=2).add_(2)) * v


_SILU = _ActivationRule(functional.silu, lambda v, x, y: _aten.silu_backward(v, x), _silu_curvature)


def _elu_rule(alpha: float, scale: float) -> _ActivationRule:
    # from y, without another exponential: for x < 0 both derivatives are y + alpha scale
    def slope(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = _aten.elu_backward(v, alpha, scale, 1.0, True, y)
        return found

    def curvature(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return slope(_aten.threshold_backward(v, -y, 0), x, y)

    return _ActivationRule(lambda x: _aten.elu(x, alpha, scale), slope, curvature)


_SELU = _elu_rule(1.6732632423543772848170429916717, 1.0507009873554804934193349852946)


def _gelu_curvature(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    x = x.clamp(-15, 15)  # beyond, it is 0, and powers of x overflow
    return v * (2 - x.square()) * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)  # a' = Phi + x phi


def _gelu_tanh_curvature(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
    x, c = x.clamp(-15, 15), math.sqrt(2 / math.pi)
    tanh = torch.tanh(c * (x + 0.044715 * x**3))
    inner, bent = c * (1 + 3 * 0.044715 * x.square()), c * 6 * 0.044715 * x
    return v * (1 - tanh.square()) * (inner + 0.5 * x * bent - x * tanh * inner.square())


def _gelu_rule(approximate: str) -> _ActivationRule:
    return _ActivationRule(
        functools.partial(functional.gelu, approximate=approximate),
        lambda v, x, y: _aten.gelu_backward(v, x, approximate=approximate),
        _gelu_curvature if approximate == "none" else _gelu_tanh_curvature,
    )


def _softplus_rule(beta: float, threshold: float) -> _ActivationRule:
    def curvature(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        s = torch.sigmoid(beta * x)
        return beta * s * (1 - s) * (beta * x <= threshold) * v

    return _ActivationRule(
        functools.partial(functional.softplus, beta=beta, threshold=threshold),
        lambda v, x, y: _aten.softplus_backward(v, x, beta, threshold),
        curvature,
    )


def _activate(rule: _ActivationRule, x: Any, inplace: bool = False) -> Any:
    if inplace:
        raise UnsupportedError("an activation in place writes into a tensor")
    return Dual(*_Activation.apply(x.primal, x.tangent, rule))


def _elu(input: Any, alpha: float = 1.0, inplace: bool = False) -> Any:
    if alpha <= 0:
        return _by_autodiff(functional.elu, input, alpha, inplace)
    return _activate(_elu_rule(alpha, 1.0), input, inplace)


def _gelu(input: Any, approximate: str = "none") -> Any:
    return _activate(_gelu_rule(approximate), input)


def _softplus(input: Any, beta: float = 1, threshold: float = 20) -> Any:
    return _activate(_softplus_rule(beta, threshold), input)


# Norms and attention


class _GroupNorm(torch.autograd.Function):
    r"""GroupNorm with its tangent, before the affine map of the tangent.

    With n entries in a group, :math:`\hat x = (x - \mu) r` and the symmetric Jacobian
    :math:`J = r\,(1 - \tfrac1n 1 1^\top - \tfrac1n \hat x \hat x^\top)`, the tangent is :math:`w\,J x'`: what torch's fused
    backward kernel computes of x'. For a gradient u of :math:`J x'`, with :math:`b = u \cdot \hat x`,
    :math:`c = \hat x \cdot x' / n`,

    .. math:: \nabla_{x'} = J u, \qquad
        \nabla_x = -\frac rn \big[\hat x\,(u \cdot J x') + b\,J x'\big] - r c\,J u
    """

    @staticmethod
    def forward(
        x: Tensor, tangent: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        sizes = _group_sizes(x)
        y, mean, rstd = _aten.native_group_norm(x, weight, bias, *sizes, groups, eps)
        return y, _jacobian(tangent, x, mean, rstd, sizes, groups), mean, rstd

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, tangent, weight, bias, ctx.groups, ctx.eps = inputs
        _, moved, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, tangent, weight, bias, moved, mean, rstd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, u: Tensor | None, *_: Any) -> tuple[Any, ...]:
        x, tangent, weight, bias, moved, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second gradient: mean and rstd are constants here
            norm = functools.partial(functional.group_norm, eps=ctx.eps)

            def value(at: Tensor, *affine: Tensor) -> Tensor:
                return norm(at, ctx.groups, *affine)

            found = _backward_again(ctx, value, lambda at: norm(at, ctx.groups), (x, tangent, weight, bias), (grad, u))
            return *found, None, None
        sizes = _group_sizes(x)
        in_x = in_tangent = in_weight = in_bias = None
        if grad is not None:
            mask = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], ctx.needs_input_grad[3]]
            in_x, in_weight, in_bias = _aten.native_group_norm_backward(
                grad.contiguous(), x, mean, rstd, weight, *sizes, ctx.groups, mask
            )
        if u is not None:
            in_tangent = _jacobian(u, x, mean, rstd, sizes, ctx.groups)
            if ctx.needs_input_grad[0]:
                more = _group_norm_curvature(x, tangent, u, moved, in_tangent, mean, rstd, ctx.groups)
                in_x = more if in_x is None else in_x + more
        return in_x, in_tangent, in_weight, in_bias, None, None


def _group_sizes(x: Tensor) -> tuple[int, int, int]:
    return x.shape[0], x.shape[1], math.prod(x.shape[2:])


def _jacobian(v: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, sizes: tuple[int, int, int], groups: int) -> Tensor:
    mask = [True, False, False]
    moved: Tensor = _aten.native_group_norm_backward(v.contiguous(), x, mean, rstd, None, *sizes, groups, mask)[0]
    return moved


def _group_norm_curvature(
    x: Tensor, tangent: Tensor, u: Tensor, moved: Tensor, moved_u: Tensor, mean: Tensor, rstd: Tensor, groups: int
) -> Tensor:
    """Returns the gradient in x of u . J(x) x'."""
    shape = (len(x), groups, math.prod(x.shape[1:]) // groups)
    x_, tangent_, u_, moved_, moved_u_ = (tensor.reshape(shape) for tensor in (x, tangent, u, moved, moved_u))
    r, count = rstd.reshape(len(x), groups, 1), x_.shape[2]
    normed = torch.addcmul(-mean.reshape(len(x), groups, 1) * r, x_, r)
    pairs = ((u_, moved_), (u_, normed), (normed, tangent_))
    phi, b, c = (-r / count * torch.linalg.vecdot(*pair)[..., None] for pair in pairs)
    return torch.addcmul(torch.addcmul(normed * phi, moved_, b), moved_u_, c).reshape(x.shape)


def _group_norm(input: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> Any:
    if not isinstance(input, Dual) or isinstance(weight, Dual) or isinstance(bias, Dual):
        raise UnsupportedError("group_norm with weights that depend on time")
    if input.primal.numel() == num_groups:
        raise UnsupportedError("group_norm of a single entry per group, which torch refuses")
    y, moved = _GroupNorm.apply(input.primal.contiguous(), input.tangent.contiguous(), weight, bias, num_groups, eps)[:2]
    if weight is not None:
        moved = moved * weight.reshape(1, -1, *([1] * (moved.ndim - 2)))
    return Dual(y, moved)


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, **kwargs: Any
) -> Any:
    if attn_mask is not None or dropout_p or is_causal or kwargs.get("enable_gqa"):
        return _by_autodiff(
            functional.scaled_dot_product_attention, query, key, value, attn_mask, dropout_p, is_causal, **kwargs
        )
    scale = 1 / math.sqrt(query.shape[-1]) if kwargs.get("scale") is None else kwargs["scale"]
    scores = _call(torch.matmul, _call(torch.mul, query, scale), _call(torch.transpose, key, -2, -1))
    return _call(torch.matmul, _call(torch.softmax, scores, -1), value)


def _softmax(input: Any, dim: int, dtype: torch.dtype | None = None, **_: Any) -> Any:
    share = torch.softmax(input.primal, dim, dtype)
    moved = share * input.tangent
    return Dual(share, moved - share * moved.sum(dim, keepdim=True))


def _call(func: Callable[..., Any], *args: Any) -> Any:
    return (_RULES[func] if any(isinstance(one, Dual) for one in args) else func)(*args)


_T = Tensor
_LINEAR: tuple[Callable[..., Any], ...] = (
    *(_T.flatten, _T.unflatten, _T.reshape, _T.permute, _T.transpose, _T.chunk, _T.split, _T.unbind, _T.expand),
    *(_T.squeeze, _T.unsqueeze, _T.contiguous, _T.to, _T.float, _T.double, _T.sum, _T.mean, _T.neg, _T.__neg__),
    *(_T.__getitem__, _T.movedim, _T.flip, _T.roll, _T.repeat, _T.clone, _T.expand_as, _T.reshape_as, _T.narrow),
    *(_T.view_as, _T.t, _T.swapaxes, _T.cumsum, _T.diagonal, _T.tril, _T.triu, _T.type_as),
    *(_T.tensor_split, _T.select, _T.index_select),
    *(torch.flatten, torch.unflatten, torch.reshape, torch.permute, torch.transpose, torch.chunk, torch.split),
    *(torch.unbind, torch.squeeze, torch.unsqueeze, torch.sum, torch.mean, torch.neg, torch.movedim, torch.flip, torch.roll),
    *(torch.clone, torch.narrow, torch.tensor_split, torch.select, torch.index_select, torch.swapaxes, torch.cumsum),
    *(functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d, functional.interpolate),
    *(functional.adaptive_avg_pool2d, functional.pixel_shuffle, functional.pixel_unshuffle, functional.unfold),
)
_AFFINE: tuple[Callable[..., Any], ...] = (
    functional.linear,
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
)
_RULES: dict[Any, Callable[..., Any]] = {
    **{func: _both(func) for func in _LINEAR},
    _T.view: _view,
    **{func: _affine(func) for func in _AFFINE},
    **{func: _joined(func) for func in (torch.cat, torch.concat, torch.stack)},
    **dict.fromkeys((torch.add, _T.add, _T.__add__, _T.__radd__), _add),
    **dict.fromkeys((torch.sub, torch.subtract, _T.sub, _T.__sub__), _sub),
    **dict.fromkeys((torch.rsub, _T.__rsub__), _rsub),
    **dict.fromkeys((torch.mul, torch.multiply, _T.mul, _T.__mul__, _T.__rmul__), _mul),
    **dict.fromkeys((torch.div, torch.divide, torch.true_divide, _T.div, _T.__truediv__), _div),
    _T.__rtruediv__: _rdiv,
    **dict.fromkeys((torch.matmul, torch.bmm, torch.mm, _T.matmul, _T.bmm, _T.mm, _T.__matmul__), _matmul),
    _T.__rmatmul__: _rmatmul,
    **{func: _elementwise(func, lambda x, y: y) for func in (torch.exp, _T.exp)},
    **{func: _elementwise(func, lambda x, y: 1 / x) for func in (torch.log, _T.log)},
    **{func: _elementwise(func, lambda x, y: x.cos()) for func in (torch.sin, _T.sin)},
    **{func: _elementwise(func, lambda x, y: -x.sin()) for func in (torch.cos, _T.cos)},
    **{func: _elementwise(func, lambda x, y: 1 - y.square()) for func in (torch.tanh, _T.tanh, functional.tanh)},
    **{func: _elementwise(func, lambda x, y: y * (1 - y)) for func in (torch.sigmoid, _T.sigmoid, functional.sigmoid)},
    **{func: _elementwise(func, lambda x, y: 0.5 / y) for func in (torch.sqrt, _T.sqrt)},
    **{func: _elementwise(func, lambda x, y: -0.5 * y / x) for func in (torch.rsqrt, _T.rsqrt)},
    **{func: _elementwise(func, lambda x, y: 2 * x) for func in (torch.square, _T.square)},
    **{func: _elementwise(func, lambda x, y: x > 0) for func in (torch.relu, _T.relu)},
    **dict.fromkeys((torch.pow, _T.pow, _T.__pow__), _pow),
    **dict.fromkeys((torch.softmax, _T.softmax, functional.softmax), _softmax),
    functional.silu: functools.partial(_activate, _SILU),
    functional.selu: functools.partial(_activate, _SELU),
    torch.selu: functools.partial(_activate, _SELU),
    functional.elu: _elu,
    functional.gelu: _gelu,
    functional.softplus: _softplus,
    functional.group_norm: _group_norm,
    functional.scaled_dot_product_attention: _attention,
}
