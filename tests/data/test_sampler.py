"""Stateless shuffling by epoch."""

import subprocess
import sys
from collections import Counter

import pytest
from fewstep.distill.data.sampler import rows_of


@pytest.mark.parametrize(
    ("batch_size", "num_rows"), [(4, 12), (5, 12), (7, 10), (1, 3), (12, 12), (25, 10), (7, 1)]
)
def test_each_epoch_holds_each_row_once(batch_size, num_rows):
    epochs = 5
    iterations = -(-epochs * num_rows // batch_size)
    batches = [rows_of(3, i, batch_size, num_rows) for i in range(iterations)]
    assert all(len(batch) == batch_size for batch in batches)
    flat = [row for batch in batches for row in batch]
    for epoch in range(epochs):
        assert sorted(flat[epoch * num_rows : (epoch + 1) * num_rows]) == list(range(num_rows))


def test_epochs_and_seeds_differ():
    first, second = (rows_of(0, epoch, 50, 50) for epoch in (0, 1))
    assert first != second and first != rows_of(1, 0, 50, 50) and first != list(range(50))


def test_batch_size_does_not_change_the_order():
    whole = rows_of(9, 0, 60, 23)
    assert [row for i in range(12) for row in rows_of(9, i, 5, 23)] == whole


def test_first_places_are_uniform():
    counts = Counter(rows_of(seed, 0, 1, 4)[0] for seed in range(400))
    assert all(100 - 40 < counts[row] < 100 + 40 for row in range(4))


def test_another_process_gets_the_same_rows():
    code = "from fewstep.distill.data.sampler import rows_of; print(rows_of(5, 17, 8, 30))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == str(rows_of(5, 17, 8, 30))
