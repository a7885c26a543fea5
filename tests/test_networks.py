"""Networks: shapes, zero start, and derivatives in time that forward mode gets right."""

import pytest
import torch

from conftest import central_difference, perturb
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.networks import ResidualMLP, UNet, auto

CASES = [
    (ResidualMLP, (3,), (6,)),
    (ResidualMLP, (1, 4, 4), (2, 4, 4)),
    (UNet, (3, 8, 8), (6, 8, 8)),
    (UNet, (1, 6, 4), (2, 6, 4)),
]


@pytest.mark.parametrize(("build", "inp", "out"), CASES)
def test_output_starts_at_zero_and_samples_do_not_mix(build, inp, out):
    torch.manual_seed(0)
    network = build(inp, out)
    x, t = torch.randn(4, *inp), torch.rand(4)
    assert torch.equal(network(x, t), torch.zeros(4, *out))
    perturb(network)
    torch.testing.assert_close(network(x, t)[1:2], network(x[1:2], t[1:2]))


@pytest.mark.parametrize(("build", "inp", "out"), CASES)
def test_time_derivative_and_its_gradient(build, inp, out):
    """Forward mode against a finite difference, and its parameter gradient against the double-backward form."""
    torch.manual_seed(0)
    network = build(inp, out)
    perturb(network, 0.1)
    x, t, weight = torch.randn(2, *inp), torch.tensor([0.3, 0.8]), torch.randn(2, *out)
    value, derivative = torch.func.jvp(lambda u: network(x, u), (t,), (torch.ones(2),))
    torch.testing.assert_close(value, network(x, t))
    with torch.no_grad():
        torch.testing.assert_close(derivative, central_difference(lambda u: network(x, u), t), rtol=1e-6, atol=1e-6)
    parameters = list(network.parameters())
    got = torch.autograd.grad((derivative * weight).sum(), parameters, allow_unused=True)
    _, other = torch.autograd.functional.jvp(lambda u: network(x, u), t, torch.ones(2), create_graph=True)
    expected = torch.autograd.grad((other * weight).sum(), parameters, allow_unused=True)
    for g, e in zip(got, expected, strict=True):
        if e is not None:  # the last bias has no part in the derivative
            torch.testing.assert_close(g, e, rtol=1e-7, atol=1e-9)


def test_dropout_acts_in_training_alone():
    torch.manual_seed(0)
    for network, x in (
        (ResidualMLP((3,), (3,), dropout=0.5), torch.randn(4, 3)),
        (UNet((1, 4, 4), (1, 4, 4), dropout=0.5), torch.randn(4, 1, 4, 4)),
    ):
        perturb(network)
        t = torch.rand(4)
        assert not torch.equal(network(x, t), network(x, t))
        network.eval()
        assert torch.equal(network(x, t), network(x, t))


def test_auto_chooses_by_shape():
    assert isinstance(auto((2,), (4,)), ResidualMLP)
    assert isinstance(auto((3, 8, 8), (6, 8, 8)), UNet)
    assert isinstance(auto((1, 7, 7), (1, 7, 7)), ResidualMLP)


@pytest.mark.parametrize(
    ("inp", "out", "message"),
    [((2,), (2,), "maps"), ((1, 8, 8), (1, 4, 4), "maps"), ((1, 6, 7), (1, 6, 7), "divisible by 2")],
)
def test_unet_refuses_shapes_it_cannot_serve(inp, out, message):
    with pytest.raises(ConfigError, match=message):
        UNet(inp, out)
