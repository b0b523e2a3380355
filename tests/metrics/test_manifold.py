"""Precision, recall, density and coverage against their definitions and torch-fidelity."""

import pytest
import torch
from fewstep.distill.metrics.manifold import manifold, radii
from torch import Tensor


def precision_recall(real: Tensor, generated: Tensor, block: int = 2048) -> tuple[float, float]:
    return manifold(real, generated, block=block)[:2]


def density_coverage(real: Tensor, generated: Tensor, block: int = 2048) -> tuple[float, float]:
    return manifold(real, generated, block=block)[2:]


def sets(seed: int = 0, n: int = 41, m: int = 29, shift: float = 0.7) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 4, generator=draw), torch.randn(m, 4, generator=draw) * 0.8 + shift


def by_hand(real: Tensor, generated: Tensor, k: int) -> tuple[list[list[bool]], list[list[bool]]]:
    """in_real[j][i]: generated j lies in the ball of real i; in_generated[i][j] the other way round."""

    def reach(x: Tensor) -> list[float]:
        return [sorted(float((a - b).norm()) for b in x)[k] for a in x.double()]

    r, g = real.double(), generated.double()
    reach_r, reach_g = reach(r), reach(g)
    in_real = [[float((y - x).norm()) <= reach_r[i] for i, x in enumerate(r)] for y in g]
    in_generated = [[float((y - x).norm()) <= reach_g[j] for j, y in enumerate(g)] for x in r]
    return in_real, in_generated


@pytest.mark.parametrize("block", [7, 2048])
def test_each_is_its_definition(block: int) -> None:
    real, generated = sets()
    in_real, in_generated = by_hand(real, generated, 3)
    precision, recall = precision_recall(real, generated, block=block)
    assert precision == pytest.approx(sum(map(any, in_real)) / 29)
    assert recall == pytest.approx(sum(map(any, in_generated)) / 41)
    assert 0.2 < precision < 1 and 0.2 < recall < 1 and precision != recall
    in_real, _ = by_hand(real, generated, 5)
    density, coverage = density_coverage(real, generated, block=block)
    assert density == pytest.approx(sum(map(sum, in_real)) / (5 * 29))
    assert coverage == pytest.approx(sum(any(row[i] for row in in_real) for i in range(41)) / 41)
    assert 0.1 < coverage < 1 and abs(density - coverage) > 0.01


def test_precision_and_recall_are_torch_fidelitys() -> None:
    from torch_fidelity import metric_prc

    real, generated = sets(1, 64, 64)
    theirs = metric_prc.calculate_precision_recall_full(generated, real, neighborhood=3, batch_size=16)
    assert precision_recall(real, generated) == pytest.approx(theirs[:2], abs=1e-12)


def test_a_dropped_mode_lowers_recall_and_a_stray_mode_precision() -> None:
    draw = torch.Generator().manual_seed(2)
    mode = torch.randn(200, 8, generator=draw) * 0.1
    both = torch.cat([mode, torch.randn(200, 8, generator=draw) * 0.1 + 3])
    half = torch.randn(400, 8, generator=draw) * 0.1
    precision, recall = precision_recall(both, half)
    assert precision > 0.8 and recall < 0.55
    precision, recall = precision_recall(half, both)
    assert precision < 0.55 and recall > 0.8
    assert density_coverage(both, half)[1] < 0.55 < density_coverage(half, both)[1]


def test_copies_are_all_inside_and_strangers_all_outside() -> None:
    real, _ = sets(3)
    assert precision_recall(real, real) == (1, 1)
    assert density_coverage(real, real)[1] == 1
    assert precision_recall(real, real + 100) == (0, 0)
    assert density_coverage(real, real + 100) == (0, 0)


def test_radius_leaves_the_point_itself_out() -> None:
    assert radii(torch.tensor([[0.0], [1.0], [3.0], [7.0]]), (2, 1)).tolist() == [[3, 2, 3, 6], [1, 1, 2, 4]]


def test_unfit_features_are_refused() -> None:
    real, generated = sets()
    for a, b, message in (
        (real[:5], generated, "5 neighbours need more"),
        (real, generated[:, :3], "dimensions have no distance"),
        (real * torch.nan, generated, "not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            manifold(a, b)


def test_radii_at_hand_change_nothing() -> None:
    real, generated = sets()
    assert manifold(real, generated, reach=radii(real, (3, 5))) == manifold(real, generated)
    assert manifold(real, generated, neighbours=(2, 4))[0] < manifold(real, generated, neighbours=(4, 4))[0]
