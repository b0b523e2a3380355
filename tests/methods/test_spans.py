"""The laws of (r, t): recorded statistics, the share of points, cuts and independence of the batch."""

import pytest
import torch
from fewstep.distill.diffusion.draws import Draws
from fewstep.distill.methods.meanflow.spans import draw_spans
from torch import Tensor

ROWS = 100_000


class Fast(Draws):
    """The same laws from one generator for all rows."""

    def __init__(self) -> None:
        super().__init__(0, 0, range(0))
        self.source = torch.Generator().manual_seed(0)

    def normal(self, shape: object) -> Tensor:
        return torch.randn(ROWS, generator=self.source)

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return torch.rand(ROWS, generator=self.source)


@pytest.mark.parametrize(
    ("normal", "mean_t", "mean_r"), [((-0.4, 1.0), 0.5345, 0.3016), ((-2.0, 2.0), 0.3535, 0.0961)]
)
def test_recorded_means_of_the_sorted_law(normal: tuple[float, float], mean_t: float, mean_r: float) -> None:
    r, t = draw_spans(Fast(), "sorted", 1.0, normal)
    assert t.mean().item() == pytest.approx(mean_t, abs=2e-3)
    assert r.mean().item() == pytest.approx(mean_r, abs=2e-3)
    assert (r <= t).all() and r.min() > 0 and t.max() < 1
    r, t = draw_spans(Fast(), "sorted", 0.25, normal)
    assert (r == t).float().mean().item() == pytest.approx(0.75, abs=5e-3)
    assert t.mean().item() == pytest.approx(mean_t, abs=2e-3)


def test_recorded_means_of_the_separate_law() -> None:
    """More than a quarter of the rows have r = t, and t keeps its own law."""
    r, t = draw_spans(Fast(), "separate", 1.0, (-0.6, 1.6), (-4.0, 1.6))
    assert t.mean().item() == pytest.approx(0.3984, abs=2e-3)
    assert r.mean().item() == pytest.approx(0.0415, abs=1e-3)
    r, t = draw_spans(Fast(), "separate", 0.75, (-0.6, 1.6), (-4.0, 1.6))
    assert (r == t).float().mean().item() == pytest.approx(0.2999, abs=5e-3)
    assert t.mean().item() == pytest.approx(0.3984, abs=2e-3)
    assert (r <= t).all()


def test_few_times_are_near_the_noise() -> None:
    t = torch.sigmoid(-0.4 + torch.randn(ROWS))
    assert (t > 0.9).float().mean().item() == pytest.approx(0.0047, abs=1.5e-3)
    r, single = draw_spans(Fast(), "separate", 0.0, (-0.4, 1.0))
    assert (single > 0.9).float().mean().item() == pytest.approx(0.0047, abs=1.5e-3)
    assert torch.equal(r, single)


@pytest.mark.parametrize("law", ["sorted", "separate"])
def test_spans_are_cut_to_what_can_be_reached(law: str) -> None:
    r, t = draw_spans(Fast(), law, 0.8, (-2.0, 2.0), within=(0.1, 0.6))  # type: ignore[arg-type]
    assert r.min() == t.min() == 0.1 and r.max() == t.max() == 0.6
    assert (r <= t).all() and t.dtype == r.dtype == torch.float64


def test_a_row_has_its_span_whatever_the_batch() -> None:
    whole = draw_spans(Draws(3, 5, range(6)), "sorted", 0.5, (-0.4, 1.0))
    part = draw_spans(Draws(3, 5, range(4, 6)), "sorted", 0.5, (-0.4, 1.0))
    assert torch.equal(torch.stack(whole)[:, 4:], torch.stack(part))
