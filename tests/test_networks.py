"""Networks: shapes, zero start, derivatives in time that forward mode gets right, and what training at scale needs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from conftest import central_difference, perturb
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks import DiT, ResidualMLP, UNet, VDMUNet, auto
from nfdm_lightning.networks.attention import ImageAttention, SelfAttention
from nfdm_lightning.networks.blocks import ResBlock, group_norm
from nfdm_lightning.networks.dit import sincos_positions
from nfdm_lightning.processes.base import time_derivative
from nfdm_lightning.reverse import check_time_differentiable

Build = Callable[..., nn.Module]

attention_unet = partial(UNet, channels=8, attention=(8, 4), head_channels=4)
residual_unet = partial(UNet, channels=8, blocks=2, attention=(4,), head_channels=8, residual_resampling=True)
small_vdm = partial(VDMUNet, channels=8, blocks=2, groups=4, heads=2)
small_dit = partial(DiT, patch=2, width=16, depth=2, heads=2)

BIG = {
    "unet_attention": (attention_unet, (2, 8, 6), (3, 8, 6)),
    "unet_residual": (residual_unet, (3, 8, 8), (2, 8, 8)),
    "vdm": (small_vdm, (2, 5, 4), (3, 5, 4)),
    "dit": (small_dit, (2, 4, 6), (3, 4, 6)),
}
CASES = {
    "mlp": (ResidualMLP, (3,), (6,)),
    "mlp_image": (ResidualMLP, (1, 4, 4), (2, 4, 4)),
    "unet": (UNet, (3, 8, 8), (6, 8, 8)),
    "unet_oblong": (UNet, (1, 6, 4), (2, 6, 4)),
    **BIG,
}
each = pytest.mark.parametrize(("build", "inp", "out"), CASES.values(), ids=CASES)
each_big = pytest.mark.parametrize(("build", "inp", "out"), BIG.values(), ids=BIG)


def perturbed(build: Build, *shapes: tuple[int, ...], scale: float = 0.15, **settings: object) -> nn.Module:
    torch.manual_seed(0)
    network = build(*shapes, **settings)
    perturb(network, scale)
    return network


def inputs(shape: tuple[int, ...], number: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(number, *shape, generator=generator), torch.linspace(0.3, 0.8, number)


def gradients(network: nn.Module, x: Tensor, t: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns the output and the gradients of a loss in the input and every parameter."""
    x = x.detach().requires_grad_()
    output = network(x, t)
    return output.detach(), list(torch.autograd.grad(output.tanh().square().sum(), [x, *network.parameters()]))


def assert_all_close(got: list[Tensor], expected: list[Tensor], rtol: float, atol: float) -> None:
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=rtol, atol=atol)


@each
def test_output_starts_at_zero_and_samples_do_not_mix(build, inp, out):
    torch.manual_seed(0)
    network = build(inp, out)
    x, t = inputs(inp, 4)
    assert torch.equal(network(x, t), torch.zeros(4, *out))
    perturb(network)
    torch.testing.assert_close(network(x, t)[1:2], network(x[1:2], t[1:2]))
    assert network(x, t).std() > 0.1


@each
def test_time_derivative_and_its_gradient(build, inp, out):
    """Forward mode against finite differences, its parameter gradient against these and the double-backward form."""
    network = perturbed(build, inp, out, scale=0.1)
    check_time_differentiable(network, "it")
    x, t = inputs(inp)
    weight = torch.randn(2, *out)
    value, derivative = time_derivative(lambda u: network(x, u), t)
    torch.testing.assert_close(value, network(x, t))
    with torch.no_grad():
        torch.testing.assert_close(derivative, central_difference(lambda u: network(x, u), t), rtol=1e-6, atol=1e-6)
    parameters = list(network.parameters())
    got = torch.autograd.grad((derivative * weight).sum(), parameters, allow_unused=True)
    with sdpa_kernel(SDPBackend.MATH):  # fused attention has no second derivative either
        _, other = torch.autograd.functional.jvp(lambda u: network(x, u), t, torch.ones(2), create_graph=True)
        expected = torch.autograd.grad((other * weight).sum(), parameters, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        if e is not None:  # the last bias has no part in the derivative
            torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-9)

    start, direction = [p.detach().clone() for p in parameters], [torch.randn_like(p) for p in parameters]

    @torch.no_grad()
    def moved(amount: Tensor) -> Tensor:
        for parameter, at, step in zip(parameters, start, direction, strict=True):
            parameter.copy_(at + amount * step)
        return (time_derivative(lambda u: network(x, u), t)[1] * weight).sum()

    along = sum((g * d).sum() for g, d in zip(got, direction, strict=True) if g is not None)
    torch.testing.assert_close(along, central_difference(moved, torch.tensor(0.0), 1e-4), rtol=1e-6, atol=1e-6)


@each
def test_second_derivative_in_time(build, inp, out):
    """Forward mode over forward mode, which a penalty on curvature takes."""
    network = perturbed(build, inp, out, scale=0.1)
    x, t = inputs(inp)

    def velocity(u: Tensor) -> Tensor:
        return time_derivative(lambda v: network(x, v), u)[1]

    acceleration = time_derivative(velocity, t)[1]
    torch.testing.assert_close(acceleration, central_difference(velocity, t), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["unet_attention", "unet_residual", "vdm", "dit"])
def test_fused_attention_is_the_plain_one(name):
    build, inp, out = BIG[name]
    network = perturbed(build, inp, out)
    x, t = inputs(inp)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused, fused_gradients = gradients(network, x, t)
        with pytest.raises(NotImplementedError, match="forward AD"):
            torch.func.jvp(lambda u: network(x, u), (t,), (torch.ones(2),))
    with sdpa_kernel(SDPBackend.MATH):
        plain, plain_gradients = gradients(network, x, t)
    torch.testing.assert_close(fused, plain, rtol=1e-10, atol=1e-10)
    assert_all_close(fused_gradients, plain_gradients, rtol=1e-9, atol=1e-10)


def test_self_attention_against_torch():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    perturb(ours)
    pairs = ((theirs.in_proj_weight, ours.qkv.weight), (theirs.in_proj_bias, ours.qkv.bias))
    with torch.no_grad():
        for to, source in (*pairs, (theirs.out_proj.weight, ours.out.weight), (theirs.out_proj.bias, ours.out.bias)):
            to.copy_(source)
    h = torch.randn(2, 5, 12)
    torch.testing.assert_close(ours(h), theirs(h, h, h)[0])


def test_image_attention_against_explicit_sums():
    torch.manual_seed(0)
    attend = ImageAttention(4, 2, group_norm(4, 2))
    h = torch.randn(2, 4, 3, 5)
    assert torch.equal(attend(h), h)
    perturb(attend, 0.5)
    normal, inner = attend.norm(h), attend.attention
    query, key, value = (
        (torch.einsum("of,bfhw->bohw", w, normal) + b[:, None, None]).reshape(2, 2, 2, 3, 5)  # (B, heads, 2, H, W)
        for w, b in zip(inner.qkv.weight.chunk(3), inner.qkv.bias.chunk(3), strict=True)
    )
    logits = torch.einsum("bndhw,bndij->bnhwij", query, key) / 2**0.5
    weights = logits.exp() / logits.exp().sum((-2, -1), keepdim=True)
    mixed = torch.einsum("bnhwij,bndij->bndhw", weights, value).reshape(2, 4, 3, 5)
    expected = h + torch.einsum("of,bfhw->bohw", inner.out.weight, mixed) + inner.out.bias[:, None, None]
    torch.testing.assert_close(attend(h), expected)


@pytest.mark.parametrize(
    ("attention", "expected"),
    [((), []), ((8,), [8, 8, 8, 4]), ((4,), [4, 4, 4, 4]), ((8, 4), [8, 8, 8, 4, 4, 4, 4])],
)
def test_unet_attends_where_it_is_told(attention, expected):
    network = UNet((1, 8, 4), (1, 8, 4), channels=8, attention=attention, head_channels=4)
    heights = []
    for layer in network.modules():
        if isinstance(layer, ImageAttention):
            layer.register_forward_hook(lambda _, args, __: heights.append(args[0].shape[2]))
            assert layer.attention.heads == layer.attention.out.in_features // 4
    network(*inputs((1, 8, 4)))
    assert sorted(heights) == sorted(expected)
    assert (network.mid_out is not None) == bool(attention)


def test_resampling_blocks_start_as_plain_resampling():
    torch.manual_seed(0)
    h, embedding = torch.randn(2, 4, 4, 6), torch.randn(2, 8)
    down = ResBlock(4, 4, 8, 2, 0.0, resample=nn.AvgPool2d(2))
    up = ResBlock(4, 4, 8, 2, 0.0, resample=nn.Upsample(scale_factor=2))
    mean = h.reshape(2, 4, 2, 2, 3, 2).mean((3, 5))
    torch.testing.assert_close(down(h, embedding), mean)
    assert torch.equal(up(h, embedding), h.repeat_interleave(2, 2).repeat_interleave(2, 3))
    perturb(down)
    normal = functional.silu(down.norm1(h)).reshape(2, 4, 2, 2, 3, 2).mean((3, 5))  # resampled before the convolution
    scale, shift = down.time(embedding)[:, :, None, None].chunk(2, 1)
    update = down.conv2(functional.silu(down.norm2(down.conv1(normal)) * (1 + scale) + shift))
    torch.testing.assert_close(down(h, embedding), mean + update)


@pytest.mark.parametrize(
    ("build", "inp", "out", "size", "keys", "total", "square"),
    [
        (UNet, (2, 8, 8), (4, 8, 8), 12755.533893089754, 95, -60.20271751368304, 1457.2774136736452),
        (ResidualMLP, (3,), (2,), 10394.348425375098, 32, 4.6150723337165065, 10.359751839341246),
    ],
    ids=["unet", "mlp"],
)
def test_default_networks_stay_what_results_were_made_with(build, inp, out, size, keys, total, square):
    """Initialisation, parameters and function, against numbers of the code before there was attention."""
    torch.manual_seed(0)
    network = build(inp, out)
    assert sum(p.abs().sum().item() for p in network.parameters()) == pytest.approx(size, rel=1e-9)
    assert len(network.state_dict()) == keys
    perturb(network)
    x = torch.linspace(-1, 1, 3 * torch.Size(inp).numel()).reshape(3, *inp)
    output = network(x, torch.tensor([0.1, 0.5, 0.9]))
    assert [output.sum().item(), output.square().sum().item()] == pytest.approx([total, square], rel=1e-8)


def test_vdm_is_a_unet_of_one_level_with_attention_in_the_middle():
    """Same parameters, same function: the other's attention outside the middle is at its start, the identity."""
    torch.manual_seed(0)
    vdm = VDMUNet((2, 4, 4), (3, 4, 4), channels=8, blocks=3, fourier=(), groups=4, heads=2)
    settings = {"multipliers": (1,), "attention": (4,), "head_channels": 4, "positions": False}
    unet = UNet((2, 4, 4), (3, 4, 4), channels=8, blocks=3, groups=4, **settings)
    perturb(vdm)
    missing, unexpected = unet.load_state_dict(vdm.state_dict(), strict=False)
    assert not unexpected
    assert all(".attention." in name and not name.startswith("mid") for name in missing)
    x, t = inputs((2, 4, 4))
    torch.testing.assert_close(vdm(x, t), unet(x, t))
    assert len(vdm.down) == 3
    assert len(vdm.up) == 4


def test_fourier_features():
    network = VDMUNet((2, 3, 3), (2, 3, 3), channels=4, blocks=0, fourier=(0, 2), groups=2)
    x = inputs((2, 3, 3))[0]
    parts = network.features(x).split(2, 1)
    assert torch.equal(parts[0], x)
    sines, cosines = torch.cat(parts[1:3], 1), torch.cat(parts[3:], 1)
    torch.testing.assert_close(sines.square() + cosines.square(), torch.ones(2, 4, 3, 3))
    for channel in range(2):
        for at, frequency in enumerate((1.0, 4.0)):
            angle = torch.atan2(sines[:, 2 * at + channel], cosines[:, 2 * at + channel])
            turns = (angle - frequency * torch.pi * x[:, channel]) / (2 * torch.pi)
            torch.testing.assert_close(turns, turns.round(), rtol=0, atol=1e-12)
    assert torch.equal(VDMUNet((2, 3, 3), (2, 3, 3), channels=4, blocks=0, fourier=(), groups=2).features(x), x)
    grey = (2 * (torch.arange(256.0) + 0.5) / 256 - 1).expand(1, 1, 1, 256)
    at_default = VDMUNet((1, 1, 256), (1, 1, 256), channels=4, blocks=0, groups=2).features(grey)[0, :, 0]
    torch.testing.assert_close(at_default[1, 1:], -at_default[1, :-1])  # n = 7: one level is half a turn
    torch.testing.assert_close(at_default[3:, 1:].abs(), at_default[3:, :-1].abs())
    half = network.bfloat16().features(x.bfloat16())
    assert half.dtype == torch.bfloat16
    expected = (4 * torch.pi * x.bfloat16().double()).sin()
    torch.testing.assert_close(half[:, 4:6].double(), expected, rtol=0, atol=0.01)


def test_patches_are_those_of_unfold_and_come_back():
    network = DiT((3, 4, 6), (3, 4, 6), width=8, depth=0, heads=1)
    x = inputs((3, 4, 6))[0]
    torch.testing.assert_close(network.patches(x), functional.unfold(x, 2, stride=2).transpose(1, 2))
    torch.testing.assert_close(network.image(network.patches(x)), x)


def test_positions_are_sines_and_cosines_of_rows_and_columns():
    grid = sincos_positions(3, 5, 16).reshape(3, 5, 16)
    assert torch.equal(grid[0, 0], torch.tensor([0.0, 1, 0, 1]).repeat_interleave(4))
    torch.testing.assert_close(grid[2, 3, 0], torch.tensor(2.0).sin())
    torch.testing.assert_close(grid[2, 3, 7], torch.tensor(2 * 10.0**-3).cos())
    torch.testing.assert_close(grid[2, 3, 9], torch.tensor(3 * 10.0**-1).sin())
    torch.testing.assert_close(grid[2, 3, 12], torch.tensor(3.0).cos())
    # what two positions have in common depends on the step between them alone
    torch.testing.assert_close((grid[0, 1] * grid[1, 3]).sum(), (grid[1, 2] * grid[2, 4]).sum())


def test_dit_block_has_norm_scale_shift_and_gate_in_their_places():
    network = perturbed(small_dit, (2, 4, 6), (3, 4, 6))
    block = network.blocks[0]
    h, embedding = torch.randn(2, 6, 16), torch.randn(2, 16)
    names = ("scale1", "shift1", "gate1", "scale2", "shift2", "gate2")

    def block_with(**values: float | Tensor) -> Tensor:
        with torch.no_grad():
            block.modulation.weight.zero_()
            for name, bias in zip(names, block.modulation.bias.chunk(6), strict=True):
                bias.copy_(torch.as_tensor(values.get(name, 0.0)))
        return block(h, embedding)

    unit = functional.rms_norm(h, (16,), eps=1e-6)
    shift, gate = torch.randn(16), torch.randn(16)
    assert torch.equal(block_with(scale1=2.0, shift1=1.0, scale2=3.0, shift2=1.0), h)
    torch.testing.assert_close(
        block_with(gate1=gate, scale1=0.5, shift1=shift), h + gate * block.attention(1.5 * unit + shift)
    )
    torch.testing.assert_close(block_with(gate2=gate, scale2=0.5, shift2=shift), h + gate * block.mlp(1.5 * unit + shift))
    inner = h + gate * block.attention(unit)
    both = block_with(gate1=gate, gate2=1.0)
    torch.testing.assert_close(both, inner + block.mlp(functional.rms_norm(inner, (16,), eps=1e-6)))


def test_dropout_acts_in_training_alone():
    for build, shape in (
        (ResidualMLP, (3,)),
        (UNet, (1, 4, 4)),
        (partial(VDMUNet, channels=8, blocks=1), (1, 4, 4)),
    ):
        network = perturbed(build, shape, shape, dropout=0.5)
        x, t = inputs(shape, 4)
        assert not torch.equal(network(x, t), network(x, t))
        network.eval()
        assert torch.equal(network(x, t), network(x, t))


@contextmanager
def counted(network: nn.Module) -> Iterator[list[int]]:
    """Counts how often a block in the middle runs."""
    runs = [0]
    block = network.blocks[-1] if isinstance(network, DiT) else network.mid

    def count(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        runs[0] += 1

    handle = block.register_forward_pre_hook(count)
    yield runs
    handle.remove()


@pytest.mark.parametrize(("name", "dropout"), [(name, 0.0) for name in BIG] + [("unet_residual", 0.3), ("vdm", 0.3)])
def test_checkpointing_changes_nothing_but_memory(name, dropout):
    build, inp, out = BIG[name]
    settings = {"dropout": dropout} if dropout else {}
    plain = perturbed(build, inp, out, **settings)
    saving = perturbed(build, inp, out, **settings, checkpointing=True)
    assert saving.checkpointing
    assert not plain.checkpointing
    x, t = inputs(inp)
    results = []
    for network, runs in ((plain, 1), (saving, 2)):
        torch.manual_seed(5)
        with counted(network) as count:
            results.append(gradients(network, x, t))
        assert count == [runs]
    torch.testing.assert_close(results[1][0], results[0][0], rtol=1e-12, atol=1e-12)
    assert_all_close(results[1][1], results[0][1], rtol=1e-12, atol=1e-12)
    with torch.no_grad(), counted(saving) as count:
        saving(x, t)
    assert count == [1]


@each_big
def test_channels_last_changes_nothing(build, inp, out):
    network = perturbed(build, inp, out)
    x, t = inputs(inp)
    plain = gradients(network, x, t)
    network.to(memory_format=torch.channels_last)
    last = gradients(network, x.contiguous(memory_format=torch.channels_last), t)
    torch.testing.assert_close(last[0], plain[0], rtol=1e-10, atol=1e-10)
    assert_all_close(last[1], plain[1], rtol=1e-10, atol=1e-10)


@each
def test_bfloat16_autocast_stays_close(build, inp, out):
    """Output, gradient and time derivative, within twice the error measured; autocast leaves float64 alone: from float32."""
    network = perturbed(build, inp, out, scale=0.1).float()
    x, t = (part.float() for part in inputs(inp, 4))

    def results() -> dict[str, Tensor]:
        output, gradient = gradients(network, x, t)
        flat = torch.cat([part.flatten() for part in gradient])
        return {"output": output, "gradient": flat, "derivative": time_derivative(lambda u: network(x, u), t)[1]}

    exact = results()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = results()
    for name, expected in exact.items():
        error = (rounded[name].float() - expected).norm() / expected.norm()
        assert 0 < error < 0.05, name


@pytest.mark.parametrize(
    ("name", "settings"), [("unet_residual", {"blocks": 1}), ("vdm", {"blocks": 1}), ("dit", {"depth": 1})]
)
def test_compiled_network_is_the_same(name, settings):
    build, inp, out = BIG[name]
    network = perturbed(build, inp, out, **settings)
    x, t = inputs(inp)
    torch.compiler.reset()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    (output, got), (plain, expected) = gradients(compiled, x, t), gradients(network, x, t)
    torch.testing.assert_close(output, plain, rtol=1e-10, atol=1e-10)
    assert_all_close(got, expected, rtol=1e-9, atol=1e-10)


def test_auto_chooses_by_shape():
    assert isinstance(auto((2,), (4,)), ResidualMLP)
    assert isinstance(auto((3, 8, 8), (6, 8, 8)), UNet)
    assert isinstance(auto((1, 7, 7), (1, 7, 7)), ResidualMLP)


IMAGE = (1, 8, 8)


@pytest.mark.parametrize(
    ("build", "inp", "out", "message"),
    [
        (UNet, (2,), (2,), "UNet maps"),
        (UNet, IMAGE, (1, 4, 4), "UNet maps"),
        (UNet, (1, 6, 7), (1, 6, 7), "divisible by 2"),
        (partial(UNet, attention=(8, 16)), IMAGE, IMAGE, r"no level of height 16.*give \[8, 4\]"),
        (partial(UNet, attention=(4,), head_channels=48), IMAGE, IMAGE, "head_channels=48 must divide the 64 features"),
        (partial(UNet, attention=(8,)), IMAGE, IMAGE, "head_channels=64 must divide the 32 features"),
        (partial(UNet, attention=(8,), head_channels=0), IMAGE, IMAGE, "head_channels=0 must divide"),
        (VDMUNet, (8,), (8,), "VDMUNet maps"),
        (VDMUNet, IMAGE, (1, 8), "VDMUNet maps"),
        (partial(VDMUNet, channels=8, heads=3), IMAGE, IMAGE, "heads=3 must divide the 8 features"),
        (partial(VDMUNet, channels=8, heads=0), IMAGE, IMAGE, "heads=0 must divide"),
        (DiT, (8,), (8,), "DiT maps"),
        (partial(DiT, patch=3), IMAGE, IMAGE, "patch=3 must divide height and width.*8x8"),
        (partial(DiT, patch=0), IMAGE, IMAGE, "patch=0 must divide"),
        (partial(DiT, width=64, heads=5), IMAGE, IMAGE, "heads=5 must divide the 64 features"),
        (partial(DiT, width=66, heads=6), IMAGE, IMAGE, "width=66 of DiT must be divisible by 4"),
    ],
)
def test_networks_refuse_what_they_cannot_do(build, inp, out, message):
    with pytest.raises(ConfigError, match=message):
        build(inp, out)
