import pytest
import torch

from conftest import gaussian_data_model, perturb
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.marginals import Consistency, energy_test
from nfdm_lightning.processes import NFDM, Gaussian
from nfdm_lightning.solvers import Ancestral, Heun, Solution


def test_energy_distance_against_its_definition():
    a, b = torch.randn(40, 2, 3), torch.randn(40, 2, 3) + 0.3
    result = energy_test(a, b, torch.Generator().manual_seed(0), permutations=9)

    def mean(u, v):
        return torch.stack([(x - y).norm() for x in u for y in v]).mean()

    expected = (2 * mean(a, b) - mean(a, a) - mean(b, b)) / (2 * mean(a, b))
    assert result.distance == pytest.approx(float(expected), rel=1e-9)


def test_energy_test_is_uniform_under_the_null_and_finds_a_shift():
    generator = torch.Generator().manual_seed(1)
    p_values = [energy_test(torch.randn(50, 2), torch.randn(50, 2), generator, 99).p_value for _ in range(60)]
    assert 0.35 < sum(p_values) / 60 < 0.65
    assert sum(p <= 0.1 for p in p_values) < 16
    assert energy_test(torch.randn(100, 2), torch.randn(100, 2) + 1, generator, 99).p_value == 0.01
    same = torch.randn(20, 2)
    assert energy_test(same, same, generator, 99).distance <= 0


def test_marginals_of_an_exact_model_agree_and_those_of_a_wrong_one_do_not():
    exact = gaussian_data_model(Gaussian((2,)), 0.8)
    gaps = Consistency(200, nfe=100, times=4).evaluate(exact)
    assert [gap.t for gap in gaps] == [0.0, 0.25, 0.5, 0.75]
    assert min(gap.test.p_value for gap in gaps) > 0.01

    process = NFDM((2,))
    perturb(process, 0.6)
    wrong = gaussian_data_model(process, 0.8)
    gaps = Consistency(200, nfe=50, times=2).evaluate(wrong)
    assert min(gap.test.p_value for gap in gaps) < 0.01
    assert max(gap.test.distance for gap in gaps) > 0.02


def test_samples_that_share_their_source_are_exchanged_in_pairs():
    generator, p_values = torch.Generator().manual_seed(2), []
    for _ in range(60):
        source = torch.randn(60, 2)
        a, b = source + 0.2 * torch.randn(60, 2), source + 0.2 * torch.randn(60, 2)
        p_values.append(energy_test(a, b, generator, 99, paired=True).p_value)
    assert 0.35 < sum(p_values) / 60 < 0.65
    assert sum(p <= 0.1 for p in p_values) < 16
    source = torch.randn(200, 2)
    a, b = source + 0.2 * torch.randn(200, 2), source + 0.2 * torch.randn(200, 2) + 0.1
    assert energy_test(a, b, generator, 99, paired=True).p_value <= 0.02
    assert energy_test(a, b, generator, 99).p_value > 0.2  # all permutations would not see it


def test_both_are_compared_at_the_times_that_are_named(monkeypatch):
    from nfdm_lightning import marginals

    def solution(steps, z):
        times = torch.linspace(1, 0, steps + 1)
        return Solution(z, steps, times, times.view(-1, 1, 1).expand(-1, *z.shape))

    class Sde(Ancestral):
        def solve(self, reverse, z, generator=None, trajectory=False):
            return solution(self.steps, z)

    class Ode(Heun):
        def solve(self, reverse, z, generator=None, trajectory=False):
            return solution(self.steps, z)

    seen = []
    monkeypatch.setattr(marginals, "Ancestral", Sde)
    monkeypatch.setattr(marginals, "Heun", Ode)
    monkeypatch.setattr(marginals, "energy_test", lambda a, b, *_, **__: seen.append((float(a[0, 0]), float(b[0, 0]))))
    gaps = Consistency(4, nfe=10, times=3).evaluate(gaussian_data_model(Gaussian((2,)), 0.8))
    assert torch.allclose(torch.tensor(seen), torch.tensor([gap.t for gap in gaps])[:, None])
    assert len(gaps) == 3


def test_bad_settings_are_refused():
    for wrong in ({"samples": -1}, {"samples": 1}, {"nfe": 1}, {"times": 0}):
        with pytest.raises(ConfigError, match="Consistency"):
            Consistency(**wrong)
