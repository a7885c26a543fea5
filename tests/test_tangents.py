"""Value and time derivative in one pass, against torch's forward mode, with their gradients."""

import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from nfdm_lightning.networks import DiT, ResidualMLP, UNet, VDMUNet
from nfdm_lightning.processes.base import time_derivative
from nfdm_lightning.processes.tangents import UnsupportedError, value_and_tangent

DOUBLE = torch.float64


def by_forward_mode(function, t):
    return torch.func.jvp(function, (t,), (torch.ones_like(t),))[:2]


def with_gradients(way, function, t, inputs):
    """Returns value, derivative, and the gradients of a random linear function of both in the inputs."""
    with sdpa_kernel(SDPBackend.MATH):  # as time_derivative has it
        value, derivative = way(function, t)
    weights = torch.randn((2, *value.shape), generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    objective = (weights[0] * value + weights[1] * derivative).sum()
    return [value, derivative, *torch.autograd.grad(objective, inputs, allow_unused=True)]


def assert_same(function, t, inputs):
    results = [with_gradients(way, function, t, inputs) for way in (value_and_tangent, by_forward_mode)]
    for one, other in zip(*results, strict=True):
        if one is None or other is None:  # an absent gradient is zero
            assert one is None or not one.any()
            assert other is None or not other.any()
            continue
        assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


class EveryActivation(nn.Module):
    def __init__(self):
        super().__init__()
        kinds = [
            nn.SELU(),
            nn.GELU(),
            nn.GELU("tanh"),
            nn.Softplus(),
            nn.Softplus(2.0, 1.0),
            nn.ELU(0.7),
            nn.Tanh(),
            nn.ReLU(),
        ]
        kinds += [nn.Sigmoid(), nn.LeakyReLU(), nn.Mish(), nn.SiLU()]
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), kind) for kind in kinds)
        self.inp = nn.Linear(3, 12)

    def forward(self, x, t):
        h = self.inp(torch.cat([x, t[:, None]], 1))
        for layer in self.layers:
            h = h + layer(3 * h)
        return h


NETWORKS = {
    "activations": (EveryActivation, (2,)),
    "mlp": (lambda: ResidualMLP((2,), (4,), width=16), (2,)),
    "unet": (lambda: UNet((1, 8, 8), (2, 8, 8), channels=8), (1, 8, 8)),
    "unet_attention": (
        lambda: UNet((1, 8, 8), (2, 8, 8), channels=8, attention=[4], head_channels=8, residual_resampling=True),
        (1, 8, 8),
    ),
    "vdm": (lambda: VDMUNet((1, 8, 8), (2, 8, 8), channels=16, blocks=1), (1, 8, 8)),
    "dit": (lambda: DiT((1, 8, 8), (2, 8, 8), width=16, depth=2, heads=2), (1, 8, 8)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks(name):
    build, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    network = build().double()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.15, generator=generator)
    x = torch.randn((3, *shape), generator=generator, dtype=DOUBLE, requires_grad=True)
    t = torch.rand(3, generator=generator, dtype=DOUBLE, requires_grad=True)
    assert_same(lambda time: network(x, time), t, [x, t, *network.parameters()])


def image(t, x):  # (B, 4, 4, 4), depends on both
    return torch.sin(t[:, None, None, None] * x) + x.square() + t[:, None, None, None]


OPERATIONS = {
    "sum": lambda h, x: 2 * h + x - 0.5 + (1 - h) + (x - h) + h.sub(x, alpha=3) + torch.add(h, x, alpha=2) - (-h),
    "sum of small and large": lambda h, x: h.mean((2, 3), keepdim=True) + x + (x + h.flatten(1).sum(1)[:, None, None, None]),
    "product": lambda h, x: h * x * h * 2 * (3 * h),
    "quotient": lambda h, x: h / 2 + 1 / (3 + h**2) + x / (2 + h.square()) + h / (1 + x**2) + h.div(h**2 + 1),
    "matmul": lambda h, x: h @ x + x @ h + h @ h + torch.matmul(h, h.transpose(2, 3)),
    "numbers": lambda h, x: torch.exp(h / 4) + (1 + h**2).log() + h.sin() + h.cos() + (1 + h**2).sqrt() + (1 + h**2).rsqrt(),
    "powers": lambda h, x: h**3 + h.pow(2) + (1 + h**2) ** -0.5 + torch.square(h) + (1 + h.square()) ** x + 2**h,
    "squashed": lambda h, x: h.tanh() + h.sigmoid() + functional.silu(h) + torch.relu(h) + functional.leaky_relu(h, 0.3),
    "shapes": lambda h, x: (
        torch.cat([h, x], 1)
        .unflatten(1, (2, 4))
        .permute(0, 2, 1, 3, 4)
        .flatten(1, 2)
        .chunk(2, 1)[1]
        .transpose(2, 3)[:, :, 1:3]
        .reshape(3, 4, -1)
        .unsqueeze(1)
        .expand(3, 4, 4, 8)
        .narrow(3, 2, 4)
    ),
    "parts": lambda h, x: torch.stack([*h.unbind(1)], 2) * h.split(2, 1)[0][:, :1] + h.flip(1) + torch.roll(h, 1, 2),
    "resolution": lambda h, x: functional.interpolate(functional.avg_pool2d(h, 2), scale_factor=2.0),
    "softmax": lambda h, x: torch.softmax(h, 1) + functional.softmax(h, dim=2) + h.softmax(-1),
    "attention": lambda h, x: functional.scaled_dot_product_attention(h, h * x, h + x),
    "masked attention": lambda h, x: functional.scaled_dot_product_attention(h, x, h, is_causal=True),
    "attention with a scale": lambda h, x: functional.scaled_dot_product_attention(x, h, x, scale=0.1),
    "norms": lambda h, x: functional.group_norm(h, 2) + functional.group_norm(h, 4, eps=0.1),
    "written out norm": lambda h, x: h * torch.rsqrt(h.square().mean(1, keepdim=True) + 1e-6),
    "no rule": lambda h, x: torch.logsumexp(h, 1, keepdim=True) + torch.atan(h) + torch.where(h > 1, h, x) + h.clamp(-1, 1),
    "bent by time": lambda h, x: functional.linear(h, h[0, 0]) + functional.conv2d(x, h[:, :, :3, :3], padding=1),
    "two at once": lambda h, x: sum(torch.max(h, 1)[0].unbind(1))[:, None, None] + h,
    "complex numbers": lambda h, x: (
        torch.fft.irfft(torch.fft.rfft(h), n=4) + torch.fft.fft(h).abs() + torch.complex(h, x).real
    ),
    "attributes": lambda h, x: h @ h.mT + h.mT + h[0, 0].T * h.ndim,
    "types": lambda h, x: h.type(torch.float64) * (3 * h).to(torch.long) + h.to(torch.bool) * x + (2 * h).long(),
    "powers of nothing": lambda h, x: (h - h.detach()) ** 0 + h**0 + h**1,
    "detached": lambda h, x: h.detach() * x,
    "views of sums": lambda h, x: (x + h.mean((1, 2, 3))[:, None, None, None]).view(16, 16).view(4, 4, 4, 4),
    "no time at all": lambda h, x: x * 2 + torch.zeros_like(h),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4, 4, 4, 4, generator=generator, dtype=DOUBLE, requires_grad=True)
    t = torch.rand(4, generator=generator, dtype=DOUBLE, requires_grad=True)
    if name == "shapes":
        x = x[:3].detach().requires_grad_()
        t = t[:3].detach().requires_grad_()
    assert_same(lambda time: OPERATIONS[name](image(time, x), x), t, [x, t])


@pytest.mark.parametrize("dims", [0, 1, 3])
def test_group_norm_over_any_dimensions(dims):
    generator = torch.Generator().manual_seed(4)
    weight, bias = (torch.randn(6, generator=generator, dtype=DOUBLE, requires_grad=True) for _ in range(2))
    x = torch.randn((3, 6, *[2] * dims), generator=generator, dtype=DOUBLE, requires_grad=True)
    t = torch.rand(3, generator=generator, dtype=DOUBLE, requires_grad=True)
    time = (-1, *[1] * (dims + 1))
    assert_same(lambda u: functional.group_norm(torch.sin(u.view(time) * x), 3, weight, bias), t, [x, t, weight, bias])
    assert_same(lambda u: functional.group_norm(torch.sin(u.view(time) * x), 3, weight.detach()), t, [x, t])


@pytest.mark.parametrize(
    "function",
    [
        lambda h: functional.group_norm(h, 2),
        functional.silu,
        functional.gelu,
        functional.selu,
        lambda h: torch.softmax(h, 1),
        functional.softplus,
    ],
)
def test_second_gradients(function):
    # what a penalty on a gradient asks for: the derivative of the gradient of value and tangent
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 3, generator=generator, dtype=DOUBLE, requires_grad=True)
    t = torch.rand(2, generator=generator, dtype=DOUBLE, requires_grad=True)

    def gradient(point, time):
        value, derivative = value_and_tangent(lambda u: function(torch.sin(u[:, None, None] * point)), time)
        return torch.autograd.grad((value**2).sum() + (derivative**2).sum(), (point, time), create_graph=True)

    assert torch.autograd.gradcheck(gradient, (x, t))


def test_one_precision_with_another():
    t = torch.rand(3)
    value, derivative = value_and_tangent(lambda time: time + torch.ones(3, dtype=DOUBLE), t)
    assert value.dtype == derivative.dtype == DOUBLE


def writes(time):
    h = time * 2
    h[0] = 5
    return h * time


@pytest.mark.parametrize("function", [writes, lambda time: (time * 2).mul_(time), lambda time: (time * 2).sin_()])
def test_what_writes_into_a_tensor_takes_the_slow_way(function):
    t = torch.rand(3, dtype=DOUBLE)
    with pytest.raises(UnsupportedError):
        value_and_tangent(function, t)
    with pytest.warns(UserWarning, match="slower: .* writes into a tensor"):
        value, derivative = time_derivative(function, t)
    expected = by_forward_mode(function, t)
    assert torch.equal(value, expected[0])
    assert torch.equal(derivative, expected[1])


def test_derivatives_within_derivatives():
    # also where the inner function sees the outer time in its closure, which one kind of tangent could not tell apart
    t = torch.rand(3, dtype=DOUBLE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inner = time_derivative(lambda u: time_derivative(lambda v: v**3, u)[1], t)[1]
        mixed = time_derivative(lambda u: time_derivative(lambda v: v**2 * u, t)[1], t)[1]
        within = torch.func.jvp(lambda u: time_derivative(lambda v: v**3, u)[1], (t,), (torch.ones_like(t),))[1]
    assert torch.allclose(inner, 6 * t)
    assert torch.allclose(mixed, 2 * t)
    assert torch.allclose(within, 6 * t)
    assert torch.allclose(time_derivative(lambda u: u**2, t)[1], 2 * t)  # nothing is left behind


def test_inference_mode_and_autocast():
    network = UNet((1, 8, 8), (2, 8, 8), channels=8).float()
    nn.init.normal_(network.out.weight, generator=torch.Generator().manual_seed(6))
    x, t = torch.ones(2, 1, 8, 8, dtype=torch.float32), torch.tensor([0.2, 0.7], dtype=torch.float32)
    expected = by_forward_mode(lambda time: network(x, time), t)
    with torch.inference_mode():
        found = time_derivative(lambda time: network(x, time), t)
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        found = time_derivative(lambda time: network(x, time), t)
        expected = by_forward_mode(lambda time: network(x, time), t)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_modules_can_be_tracked():
    network, t = UNet((1, 8, 8), (2, 8, 8), channels=8), torch.rand(2)
    with warnings.catch_warnings(), FlopCounterMode(display=False) as counter:
        warnings.simplefilter("error")
        time_derivative(lambda time: network(torch.ones(2, 1, 8, 8), time), t)
    assert counter.get_total_flops() > 0


def test_what_is_no_torch_function_is_refused_and_not_wrong():
    @torch.jit.script
    def scripted(time: torch.Tensor) -> torch.Tensor:
        return time * time

    t = torch.rand(3, dtype=DOUBLE)
    with pytest.raises(UnsupportedError, match="TorchScript"):
        value_and_tangent(scripted, t)
    with pytest.warns(UserWarning, match="slower"):
        assert torch.allclose(time_derivative(scripted, t)[1], 2 * t)


def test_gradients_with_and_without_a_graph_of_their_own():
    # a tangent that depends on the value that it goes with: no path may be counted twice
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(2, 4, 3, generator=generator, dtype=DOUBLE, requires_grad=True)
    t = torch.rand(2, generator=generator, dtype=DOUBLE, requires_grad=True)
    functions = [
        lambda h: functional.silu(h.exp()),
        lambda h: functional.gelu(h.softmax(1)),
        lambda h: functional.group_norm(h / (1 + h**2), 2),
        lambda h: functional.selu(functional.group_norm(functional.silu(h.tanh()), 2)),
    ]
    for function in functions:

        def derivative(time, function=function):
            return time_derivative(lambda u: function(torch.sin(u[:, None, None] * x)), time)[1].square().sum()

        plain, graphed = (torch.autograd.grad(derivative(t), (x, t), create_graph=graph) for graph in (False, True))
        for one, other in zip(plain, graphed, strict=True):
            assert torch.allclose(one, other, rtol=1e-10, atol=1e-12)


class Square(torch.autograd.Function):
    @staticmethod
    def forward(x):
        return x * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad

    @staticmethod
    def jvp(ctx, tangent):
        return 2 * ctx.saved_tensors[0] * tangent


def without_gradients(h):
    with torch.no_grad():
        weight = h.square().mean()
    return weight * h


SLOW = {
    "autograd.Function": Square.apply,
    "another gradient mode": without_gradients,
    "relu in place by position": lambda h: functional.leaky_relu(h - 1.0, 0.3, True) + h,
    "relu in place by keyword": lambda h: functional.hardtanh(h + 1.0, inplace=True) + h,
    "vmap": lambda h: torch.func.vmap(lambda a: functional.silu(a * h))(torch.ones(2, dtype=DOUBLE)).sum(0),
    "keywords": lambda h: torch.mul(input=h, other=h),
    "data": lambda h: h.data * h,
    "swallowed": lambda h: swallowed(h) + h,
}


def swallowed(h):
    try:
        return h.clone().mul_(2)
    except Exception:
        return h * 0


@pytest.mark.parametrize("name", SLOW)
def test_what_cannot_be_followed_takes_the_slow_way(name):
    generator = torch.Generator().manual_seed(8)
    x = torch.randn(4, 4, 4, 4, generator=generator, dtype=DOUBLE, requires_grad=True)
    t = torch.rand(4, generator=generator, dtype=DOUBLE, requires_grad=True)
    way = [time_derivative, by_forward_mode]
    with pytest.warns(UserWarning, match="slower"):
        one, other = (with_gradients(each, lambda time: SLOW[name](image(time, x)), t, [x, t]) for each in way)
    for a, b in zip(one, other, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_a_module_with_backward_hooks_takes_the_slow_way():
    layer = nn.Linear(3, 3).double()
    layer.register_full_backward_hook(lambda *_: None)
    x, t = torch.ones(2, 3, dtype=DOUBLE), torch.rand(2, dtype=DOUBLE)
    with pytest.warns(UserWarning, match="slower"):
        derivative = time_derivative(lambda time: layer(time[:, None] * x), t)[1]
    assert torch.allclose(derivative, x @ layer.weight.T)


def test_an_inner_derivative_in_another_thread_is_refused():
    t = torch.rand(3, dtype=DOUBLE)
    with ThreadPoolExecutor(1) as pool, pytest.raises(UnsupportedError):
        value_and_tangent(lambda u: pool.submit(lambda: u * u).result(), t)


def test_batched_gradients_and_empty_batches():
    x = torch.randn(3, 4, 5, dtype=DOUBLE, requires_grad=True)
    t = torch.rand(3, dtype=DOUBLE)

    def derivative(point, time):
        return time_derivative(lambda u: functional.silu(functional.group_norm(u[:, None, None] * point, 2)), time)[1]

    vectors = torch.randn(2, 3, 4, 5, dtype=DOUBLE)
    result = derivative(x, t)
    batched = torch.autograd.grad(result, x, vectors, is_grads_batched=True, retain_graph=True)[0]
    single = torch.stack([torch.autograd.grad(result, x, vector, retain_graph=True)[0] for vector in vectors])
    assert torch.allclose(batched, single)
    empty = x[:0].detach().requires_grad_()
    derivative(empty, t[:0]).sum().backward()
    assert empty.grad.shape == (0, 4, 5)


def test_large_inputs_have_no_curvature():
    for function in (
        functional.gelu,
        lambda h: functional.gelu(h, approximate="tanh"),
        functional.silu,
        functional.softplus,
    ):
        x = torch.tensor([1e13, -1e13], dtype=torch.float32, requires_grad=True)
        derivative = time_derivative(lambda u, x=x, function=function: function(x * u), torch.ones(2, dtype=torch.float32))[
            1
        ]
        derivative.sum().backward()
        assert torch.equal(x.grad, torch.tensor([1.0, 0.0]))
