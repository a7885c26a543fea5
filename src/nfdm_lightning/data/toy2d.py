"""Two-dimensional toys, drawn fresh; those that are mixtures know their exact density."""

import abc
import math
from collections.abc import Callable

import torch
from torch import Tensor

from nfdm_lightning.data.base import DataModule


class Distribution2D(abc.ABC):
    """A distribution over the plane."""

    data_std: float = 1.0
    """Standard deviation per dimension."""

    components: int | None = None
    """Number of parts that :meth:`labelled_sample` tells apart; None where there are none."""

    @abc.abstractmethod
    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws (number, 2)."""

    def labelled_sample(self, number: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Draws the same points with the parts that they are from, (number,) int64, or None where there are none."""
        return self.sample(number, generator), None


class Density2D(Distribution2D):
    """A distribution that knows its density."""

    @abc.abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Returns log p(x) in nats, (B,), for x (B, 2)."""

    def entropy(self, half_width: float = 6.0, cells: int = 2400) -> float:
        """Returns the differential entropy in nats, by the midpoint rule on [-half_width, half_width]^2."""
        axis = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells * 2 * half_width - half_width
        total = 0.0
        for row in axis.split(200):
            grid = torch.stack(torch.meshgrid(row, axis, indexing="ij"), -1).reshape(-1, 2)
            log_prob = self.log_prob(grid)
            total -= float((log_prob.exp() * log_prob).nan_to_num().sum()) * (2 * half_width / cells) ** 2
        return total


class EightGaussians(Density2D):
    r"""Eight equal Gaussians: centres on a circle of radius 4, standard deviation 0.5, all divided by sqrt(2)."""

    data_std = math.sqrt((4**2 / 2 + 0.5**2) / 2)
    components = 8

    def __init__(self) -> None:
        angles = torch.arange(8, dtype=torch.float64) * math.pi / 4
        self.centres = 4 / math.sqrt(2) * torch.stack([angles.cos(), angles.sin()], 1)
        self.std = 0.5 / math.sqrt(2)

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        return self.labelled_sample(number, generator)[0]

    def labelled_sample(self, number: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        modes = torch.randint(8, (number,), generator=generator)
        noise = torch.randn(number, 2, generator=generator, dtype=torch.float64)
        return (self.centres[modes] + self.std * noise).float(), modes

    def log_prob(self, x: Tensor) -> Tensor:
        distance = ((x[:, None] - self.centres.to(x)) ** 2).sum(-1)
        return torch.logsumexp(-0.5 * distance / self.std**2, 1) - math.log(8 * 2 * math.pi * self.std**2)


class Blob(Density2D):
    """One round Gaussian.

    Args:
        centre: its mean.
        std: its standard deviation.
    """

    def __init__(self, centre: tuple[float, float] = (0.0, 0.0), std: float = 0.5) -> None:
        self.centre, self.std = torch.tensor(centre, dtype=torch.float64), std
        self.data_std = math.sqrt(std**2 + float((self.centre**2).mean()))

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(number, 2, generator=generator, dtype=torch.float64)
        return (self.centre + self.std * noise).float()

    def log_prob(self, x: Tensor) -> Tensor:
        distance = ((x - self.centre.to(x)) ** 2).sum(-1)
        return -0.5 * distance / self.std**2 - math.log(2 * math.pi * self.std**2)


class TwoMoons(Distribution2D):
    """scikit-learn's two moons with noise 0.05, centred and scaled to unit size.

    Args:
        noise: standard deviation of the noise before scaling.
    """

    data_std = 0.9
    components = 2

    def __init__(self, noise: float = 0.05) -> None:
        self.noise = noise

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        return self.labelled_sample(number, generator)[0]

    def labelled_sample(self, number: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        from sklearn.datasets import make_moons

        seed = int(torch.randint(2**31, (1,), generator=generator))
        points, moons = make_moons(number, noise=self.noise, random_state=seed)
        scaled = (torch.from_numpy(points).float() - torch.tensor([0.5, 0.25])) * torch.tensor([1.04, 1.82])
        return scaled, torch.from_numpy(moons).long()


class Checkerboard(Density2D):
    """Uniform on the eight black squares of a 4x4 board over [-2, 2]^2."""

    data_std = 2 / math.sqrt(3)

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        column = torch.randint(4, (number,), generator=generator)
        row = 2 * torch.randint(2, (number,), generator=generator) + column % 2
        corner = torch.stack([column, row], 1) - 2
        return corner + torch.rand(number, 2, generator=generator)

    def log_prob(self, x: Tensor) -> Tensor:
        inside = (x.abs() < 2).all(1)
        black = x.floor().sum(1) % 2 == 0
        return torch.where(inside & black, -math.log(8.0), -math.inf).to(x)


class Pinwheel(Distribution2D):
    """Five Gaussian arms, rotated the further out they are.

    Args:
        arms: number of arms.
    """

    data_std = 1.11

    def __init__(self, arms: int = 5) -> None:
        self.arms = self.components = arms

    def sample(self, number: int, generator: torch.Generator | None = None) -> Tensor:
        return self.labelled_sample(number, generator)[0]

    def labelled_sample(self, number: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        arm = torch.randint(self.arms, (number,), generator=generator)
        points = torch.randn(number, 2, generator=generator) * torch.tensor([0.3, 0.1]) + torch.tensor([1.0, 0.0])
        angle = 2 * math.pi * arm / self.arms + 0.25 * points[:, 0].exp()
        cos, sin = angle.cos(), angle.sin()
        rotated = torch.stack([cos * points[:, 0] - sin * points[:, 1], sin * points[:, 0] + cos * points[:, 1]], 1)
        return 1.5 * rotated, arm


class Toy2D(DataModule):
    """Draws of a distribution over the plane: continuous data, so use a Gaussian decoder.

    Args:
        distribution: EightGaussians, TwoMoons, Checkerboard, Pinwheel or Blob, or a Distribution2D of your own.
        train_size: training samples.
        eval_size: samples of the validation and of the test split, each.
        batch_size: samples per step and process.
        eval_batch_size: samples per step and process in validation, test and prediction.
        num_workers: loader processes.
        seed: of the draws and of their order.
        labels: whether batches carry the part of the distribution that each point is from, for a conditional model.
    """

    def __init__(
        self,
        distribution: Callable[[], Distribution2D] = EightGaussians,
        train_size: int = 100_000,
        eval_size: int = 4096,
        batch_size: int = 512,
        eval_batch_size: int = 4096,
        num_workers: int = 0,
        seed: int = 0,
        labels: bool = False,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, seed, labels=labels)
        self.distribution = distribution()
        self.train_size, self.eval_size = train_size, eval_size

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    @property
    def data_std(self) -> float:
        return self.distribution.data_std

    @property
    def class_count(self) -> int | None:
        return self.distribution.components

    def arrays(self) -> dict[str, Tensor]:
        sizes = {"train": self.train_size, "val": self.eval_size, "test": self.eval_size}
        drawn = {
            name: self.distribution.labelled_sample(size, torch.Generator().manual_seed(1000 * self.seed + part))
            for part, (name, size) in enumerate(sizes.items())
        }
        self._labels = {name: labels for name, (_, labels) in drawn.items()}
        return {name: points for name, (points, _) in drawn.items()}

    def labels(self, split: str) -> Tensor | None:
        self.setup()
        return self._labels[split]
