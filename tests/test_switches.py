"""Settings of speed and memory leave the loss and its gradients what they are; learning rates are those asked for."""

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from conftest import PROCESSES, data_for, perturb, small_unet
from nfdm_lightning.bound import Draws
from nfdm_lightning.data import Toy2D
from nfdm_lightning.decoder import DiscreteDecoder
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.module import NeuralDiffusion
from nfdm_lightning.networks import ResidualMLP
from nfdm_lightning.predictor import XPrediction
from nfdm_lightning.processes import NFDM, AffineCoupling, Curvature, FlowNFDM

SHAPE = (2, 8, 8)
predictor = partial(XPrediction, network=small_unet)


def build(process: str = "nfdm", **settings: object) -> NeuralDiffusion:
    torch.manual_seed(0)
    model = NeuralDiffusion(SHAPE, 256, 0.5, process=PROCESSES[process], predictor=predictor, **settings)
    for layer in model.modules():  # in place: channels_last must survive
        for parameter in layer.parameters(recurse=False):
            generator = torch.Generator().manual_seed(parameter.numel())
            noise = 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(parameter.data + noise)
    return model


def loss_and_gradients(model: NeuralDiffusion, autocast: bool = False) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(0, 256, (4, *SHAPE), generator=generator) * (2 / 255) - 1
    eps, eps_0 = torch.randn(2, 4, *SHAPE, generator=generator)
    draws = Draws(torch.tensor([0.02, 0.3, 0.6, 0.97]), eps, eps_0)
    pairs = data_for(model.reverse.process, x)
    dtype = model.dtype
    draws = Draws(*(value.to(dtype) for value in (draws.t, draws.eps, draws.eps_0)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        nats = model.bound(pairs, draws).nats
    gradients = torch.autograd.grad(nats.mean(), list(model.parameters()), allow_unused=True)
    return nats, [gradient for gradient in gradients if gradient is not None]


@pytest.mark.parametrize(
    "settings",
    [{"channels_last": True}, {"checkpoint_process": True}, {"channels_last": True, "checkpoint_process": True}],
    ids=str,
)
@pytest.mark.parametrize("process", ["ndm", "nfdm", "separable", "bridge"])
def test_the_loss_does_not_depend_on(process, settings):
    model = build(process, **settings)
    weights = [parameter for parameter in model.parameters() if parameter.ndim == 4 and min(parameter.shape[1:]) > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights) == ("channels_last" in settings)
    (plain, expected), (nats, gradients) = loss_and_gradients(build(process)), loss_and_gradients(model)
    torch.testing.assert_close(nats, plain, rtol=1e-10, atol=1e-8)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-8, atol=1e-7)


def test_discrete_time_is_checkpointed_too():
    models = [build("ndm", discrete_steps=10, checkpoint_process=switch) for switch in (False, True)]
    (plain, expected), (nats, gradients) = (loss_and_gradients(model) for model in models)
    torch.testing.assert_close(nats, plain, rtol=1e-12, atol=0)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-10, atol=1e-10)


def test_couplings_may_have_attention():
    """The score is differentiated twice in reverse mode, which fused attention is not."""
    network = partial(small_unet, multipliers=(1, 1), attention=(4,), head_channels=4)
    flow = partial(AffineCoupling, network=network, layers=2)
    process = FlowNFDM(SHAPE, small_unet, flow)
    perturb(process)
    x, eps = torch.randn(2, 3, *SHAPE, generator=torch.Generator().manual_seed(0))
    process.path(eps, torch.tensor([0.2, 0.5, 0.8]), x).score.square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in process.flow.parameters())


def test_a_process_that_is_not_affine_cannot_be_checkpointed():
    with pytest.raises(ConfigError, match="checkpoint_process=true: FlowNFDM is not affine"):
        build("flow_nfdm", checkpoint_process=True)


def test_checkpointing_keeps_less():
    """What the graph holds, in numbers."""

    def held(model: NeuralDiffusion) -> int:
        kept: list[int] = []

        def pack(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            x = torch.zeros(16, *SHAPE)
            model.bound(x, Draws(torch.linspace(0.1, 0.9, 16), torch.ones(16, *SHAPE), torch.ones(16, *SHAPE)))
        return sum(kept)

    assert held(build(checkpoint_process=True)) < 0.6 * held(build())


def test_compiled_training_is_the_same(monkeypatch):
    compiled = []

    def compile_cheaply(self: nn.Module) -> None:  # the default backend takes minutes
        compiled.append(self)
        self._compiled_call_impl = torch.compile(self._call_impl, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_cheaply)
    model = build(compile=True)
    model.on_fit_start()
    assert compiled == [model.reverse.predictor.network]
    (plain, expected), (nats, gradients) = loss_and_gradients(build()), loss_and_gradients(model)
    torch.testing.assert_close(nats, plain, rtol=1e-9, atol=1e-8)
    for gradient, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-7, atol=1e-7)


def test_a_compiled_predictor_cannot_be_differentiated_in_time():
    with pytest.raises(ConfigError, match="Curvature differentiates the predictor in t, which torch cannot compile"):
        NeuralDiffusion((2,), penalties=[Curvature], compile=True)


@pytest.mark.parametrize("process", ["ndm", "nfdm", "separable", "mulan"])
def test_autocast_reaches_the_predictor_alone(process):
    model = build(process).float()
    seen: dict[str, set[torch.dtype]] = {"process": set(), "predictor": set()}
    for part, dtypes in seen.items():
        for layer in getattr(model.reverse, part).modules():
            if isinstance(layer, nn.Conv2d):
                layer.register_forward_hook(lambda _layer, _inputs, output, dtypes=dtypes: dtypes.add(output.dtype))
    mixed, _ = loss_and_gradients(model, autocast=True)
    assert seen == {"process": {torch.float32}, "predictor": {torch.bfloat16}}
    assert mixed.dtype == torch.float32
    plain, _ = loss_and_gradients(model)
    torch.testing.assert_close(mixed, plain, rtol=0.02, atol=0)


def test_forward_and_reverse_process_have_their_own_learning_rates():
    network = partial(ResidualMLP, width=8, depth=1)
    settings = {"process": partial(NFDM, network=network), "predictor": partial(XPrediction, network=network)}
    model = NeuralDiffusion((2,), lr=1e-2, process_lr=0.0, warmup_steps=0, decoder_std=0.1, **settings).float()
    perturb(model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    rates: list[list[float]] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: object) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])

    flags = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    Trainer(max_steps=2, accelerator="cpu", callbacks=[Record()], limit_val_batches=0, **flags).fit(
        model, Toy2D(train_size=64, eval_size=8, batch_size=16)
    )
    moved = {name.split(".")[1] for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == {"predictor", "volatility"}
    assert all(forward == 0 < reverse for forward, reverse in rates)


@pytest.mark.parametrize(("decay", "halfway", "end"), [("cosine", 0.505, 0.01), ("linear", 0.505, 0.01), ("constant", 1, 1)])
def test_the_learning_rate_falls(decay, halfway, end):
    from nfdm_lightning.module import _lr_factor

    factor = partial(_lr_factor, warmup=10, total=1000, decay=decay)
    assert factor(0) == pytest.approx(0.1, rel=0.01)
    assert factor(500) == pytest.approx(halfway)
    assert factor(1000) == pytest.approx(end)
    assert factor(250) > halfway or decay == "constant"


@pytest.mark.parametrize("std", [1e-3, 1e-2, 0.1, 1.0])
@pytest.mark.parametrize("levels", [2, 17, 256])
def test_the_discrete_decoder_is_normalised_and_dense(levels, std):
    """Against the softmax over all levels, with its gradient in sigma; latents far outside the levels too."""
    grid = torch.linspace(-1, 1, levels)
    generator = torch.Generator().manual_seed(0)
    x = grid[torch.randint(0, levels, (6, 5), generator=generator)]
    alpha, sigma = torch.tensor(0.9), torch.tensor(std, requires_grad=True)
    z = 0.9 * x + 2 * std * torch.randn(6, 5, generator=generator)
    z[0] = 1.5
    log_prob = DiscreteDecoder(levels).log_prob(x, z, alpha, sigma)
    dense = torch.log_softmax(-0.5 * ((z[..., None] / alpha - grid) / (sigma / alpha)) ** 2, -1)
    index = (x[..., None] - grid).abs().argmin(-1)
    expected = dense.gather(-1, index[..., None]).sum((1, 2))
    torch.testing.assert_close(log_prob, expected)
    slopes = [torch.autograd.grad(value.sum(), sigma)[0] for value in (log_prob, expected)]
    torch.testing.assert_close(*slopes)
