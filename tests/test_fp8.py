"""Rounding to FP8: the formats' values by their specification, and errors that can be worked out by hand."""

import numpy as np
import pytest

from fp8lab.metrics import quality


@pytest.mark.parametrize(
    ("name", "count", "largest", "smallest"), [("E4M3", 253, 448, 2**-9), ("E5M2", 247, 57344, 2**-16)]
)
def test_the_values_of_the_specification(torch, name, count, largest, smallest):
    values = quality.values_of(name)
    assert len(values) == count and values[-1] == largest == -values[0] == quality.largest_of(name)
    assert values[values > 0][0] == smallest
    codes = torch.arange(256, dtype=torch.uint8).view(getattr(torch, quality.FORMATS[name][2])).double()
    assert np.array_equal(values, np.unique(codes[codes.isfinite()].numpy()))


def test_rounding_is_to_the_nearest_and_clips(torch):
    x = torch.tensor([0.3, 1.05, 17.0, 500.0, -1e6, 0.0005])
    assert quality.round_to(x, "E4M3", 1.0).tolist() == [0.3125, 1.0, 16.0, 448.0, -448.0, 0.0]
    assert quality.round_to(x, "E5M2", 1.0).tolist()[:2] == [0.3125, 1.0]
    assert quality.round_to(torch.tensor([2.6]), "INT8", 2.0).tolist() == [2.0]


def test_scaling_reaches_the_largest_value_and_the_error_is_relative(torch):
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    assert quality.round_to(x, "E4M3", quality.per_tensor_scale(x, "E4M3")).abs().max() == pytest.approx(x.abs().max())
    small, large = (quality.rounding_error(x * size, "E4M3").relative for size in (1e-6, 1e6))
    assert small == pytest.approx(large, rel=0.02) and 0.025 < small < 0.028
    assert quality.rounding_error(x, "E5M2").relative == pytest.approx(2 * small, rel=0.05)
    assert quality.rounding_error(x * 1000, "E4M3", 1.0).clipped == pytest.approx(0.654, abs=0.01)  # P(|x| > 0.448)
    assert quality.per_tensor_scale(torch.zeros(3), "E4M3") == 1.0


def test_an_outlier_costs_int8_long_before_e4m3_and_e5m2_nothing(torch):
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(1))
    cost = {
        name: [quality.outlier_error(x, name, size) for size in (10, 1e3, 1e6)] for name in ("E4M3", "E5M2", "INT8")
    }
    assert cost["INT8"][1] > 0.5 and cost["E4M3"][1] < 0.03 < 0.5 < cost["E4M3"][2]
    assert cost["E5M2"][2] == pytest.approx(cost["E5M2"][0], rel=0.05)


def test_the_worst_error_at_a_magnitude():
    magnitudes = np.array([1.0, 1.99, 448.0, 896.0])
    assert quality.relative_step("E4M3", magnitudes) == pytest.approx([0.0625, 0.0625 / 1.99, 16 / 448, 0.5])
