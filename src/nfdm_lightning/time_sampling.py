r"""Where training draws its times: uniformly, spread out over the batch, or where the loss varies most.

.. math:: \int_0^1 \ell(t)\, dt = \mathbb E_{t \sim p}\, \frac{\ell(t)}{p(t)}

for any density p > 0 on [0, 1], so that the bound stays what it is, and only the variance of its estimate and of its
gradient depends on p. A learned noise schedule (VDM, arXiv 2107.00630, section 5.1; ``LearnedMonotone`` and ``MuLAN`` here)
has the same freedom inside the process: a density trained by gradients, besides these two, would be a third name for it.
"""

import abc

import torch
from torch import Tensor, distributed

from nfdm_lightning.errors import ConfigError


def low_discrepancy_times(number: int, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""Draws :math:`t_i = (u + i / B) \bmod 1` in random order, (number,): uniform each, spread out together.

    The order is random so that a sample's place in the batch says nothing of its time (VDM, arXiv 2107.00630, appendix I.1).
    """
    u = torch.rand(1, generator=generator, dtype=torch.float64)
    order = torch.randperm(number, generator=generator)
    times = (u + order / number) % 1
    return times.to(like)


class TimeSampler(abc.ABC):
    """Draws the times of a training batch; a subclass writes :meth:`place`, the inverse of its cumulative distribution.

    One that learns writes :meth:`observe`, :meth:`state_dict` and :meth:`load_state_dict` too: its state is kept in
    checkpoints, apart from the weights, which can be used with any other sampler.
    """

    @abc.abstractmethod
    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the times t of cumulative probability u, and their weights 1 / p(t), all (B,)."""

    def draw(self, number: int, like: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Returns times in random order, spread out over the batch, and their weights 1 / p(t), (number,) each.

        Args:
            number: B.
            like: any tensor, for dtype and device.
            generator: CPU generator; None is torch's global one.
        """
        return self.place(low_discrepancy_times(number, like, generator))

    def observe(self, t: Tensor, losses: Tensor) -> None:  # noqa: B027
        """Learns from a batch of training, after it was drawn.

        Args:
            t: the times drawn, (B,).
            losses: the diffusion term there, without its weight, (B,).
        """

    def state_dict(self) -> dict[str, Tensor]:
        """Returns what was learned."""
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:  # noqa: B027
        """Goes on from what :meth:`state_dict` returned."""


class LowDiscrepancyTimes(TimeSampler):
    """Uniform times that are spread out over the batch, :func:`low_discrepancy_times`."""

    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return u, torch.ones_like(u)


class UniformTimes(TimeSampler):
    """Independent uniform times."""

    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return u, torch.ones_like(u)

    def draw(self, number: int, like: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        return self.place(torch.rand(number, generator=generator, dtype=torch.float64).to(like))


class AdaptiveTimes(TimeSampler):
    r"""Importance sampling of t, learned while training: spread out over the batch, and dense where the loss is large.

    .. math:: p(t) = (1 - a)\, \frac{\sqrt{m_k}}{\tfrac1K \sum_j \sqrt{m_j}} + a, \qquad
        m_k = \mathbb E\big[\ell^2 \mid t \in \text{bin } k\big], \qquad k = \lfloor K t \rfloor

    with m_k a running average over the training steps, of all processes together. For a = 0 this is the density of least
    variance of the loss with independent times; what it does for the gradient is in RESULTS.md. The weights 1/p are at most
    1/a. Before the first observation p is uniform, and so it is when a run is continued with another number of bins.

    Args:
        bins: K.
        uniform: a, the share of uniform times.
        decay: of the running average, per batch.

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(self, bins: int = 32, uniform: float = 0.1, decay: float = 0.99) -> None:
        if bins < 1:
            raise ConfigError(f"AdaptiveTimes: bins={bins} must be at least 1")
        if not 0 < uniform <= 1:
            raise ConfigError(f"AdaptiveTimes: uniform={uniform} must lie in (0, 1]: it bounds the weights of the loss")
        if not 0 <= decay < 1:
            raise ConfigError(f"AdaptiveTimes: decay={decay} must lie in [0, 1)")
        self.bins, self.uniform, self.decay = bins, uniform, decay
        self._sums = torch.zeros(2, bins)  # of squared losses and of their number, on the device of the losses

    def place(self, u: Tensor) -> tuple[Tensor, Tensor]:
        probabilities = self.probabilities(u)
        # not cumsum and searchsorted: on a GPU the former depends on the order in which its threads finish
        before = (probabilities * torch.ones_like(probabilities).expand(self.bins, -1).tril(-1)).sum(1)
        k = (u[:, None] >= before[1:]).sum(1)
        within = (u - before[k]) / probabilities[k]
        return (k + within.clamp(0, 1)) / self.bins, 1 / (self.bins * probabilities[k])

    def probabilities(self, like: Tensor) -> Tensor:
        """Returns the probability of each bin, (K,)."""
        squares, counts = self._sums.to(like)
        overall = squares.sum() / counts.sum().clamp_min(1)
        # one sample's worth of the overall mean, so that a bin not yet seen is an ordinary one
        moments = (squares + overall) / (counts + 1)
        sizes = torch.where(moments.sum() > 0, moments, 1).sqrt()
        return (1 - self.uniform) * sizes / sizes.sum() + self.uniform / self.bins

    @torch.no_grad()
    def observe(self, t: Tensor, losses: Tensor) -> None:
        squares = losses**2
        finite = torch.isfinite(squares)  # one overflow must not spoil the density for ever
        values = torch.stack([torch.where(finite, squares, 0), finite.to(losses)])
        bin_of = (t * self.bins).long().clamp(0, self.bins - 1)
        member = bin_of[:, None] == torch.arange(self.bins, device=t.device)
        sums = (values[:, :, None] * member).sum(1)
        if distributed.is_available() and distributed.is_initialized():
            distributed.all_reduce(sums)
        self._sums = self.decay * self._sums.to(sums) + sums

    def state_dict(self) -> dict[str, Tensor]:
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        if state["sums"].shape == self._sums.shape:
            self._sums = state["sums"].clone()
