import pytest
import torch

from conftest import gaussian_data_model, perturb
from nfdm_lightning.errors import ConfigError
from nfdm_lightning.marginals import Consistency, energy_test
from nfdm_lightning.processes import NFDM, Gaussian


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
    gaps = Consistency(200, nfe=100, times=4).evaluate(wrong)
    assert min(gap.test.p_value for gap in gaps) < 0.01
    assert max(gap.test.distance for gap in gaps) > 0.02


def test_bad_settings_are_refused():
    for wrong in ({"samples": -1}, {"samples": 1}, {"nfe": 1}, {"times": 0}):
        with pytest.raises(ConfigError, match="Consistency"):
            Consistency(**wrong)
