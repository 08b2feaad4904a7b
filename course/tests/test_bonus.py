"""Bonus: the forward kernel, in Triton's interpreter on a CPU, against the plain definition."""

import pytest
import torch

from similarity import plain_similarity


@pytest.mark.points(10)
@pytest.mark.parametrize("shape", [(5, 3, 2, 40), (1, 4, 3, 8), (3, 8, 1, 100), (20, 5, 3, 70)], ids=str)  # B, K, N / B, D
def test_the_four_numbers_of_small_and_odd_sizes_and_of_many_tiles(units, shape, monkeypatch):
    pytest.importorskip("triton")
    from speed import similarity_triton

    monkeypatch.setattr(similarity_triton, "tile", (16, 32))  # so that there are several of rows, too
    B, K, R, D = shape
    rows, columns = units(B * R, D).float(), units(B, K, D).float()
    excluded = torch.eye(B, dtype=torch.bool)
    if B > 2:
        excluded[0, 2] = excluded[2, 0] = True
    for temperature in (0.2, 0.002):  # at 0.002 an exponential without the maximum overflows
        numbers = torch.stack(similarity_triton.forward_in_tiles(rows, columns, excluded, temperature))
        expected = torch.stack(plain_similarity(rows, columns, temperature, excluded))
        torch.testing.assert_close(numbers, expected, rtol=1e-5, atol=1e-5 if temperature == 0.2 else 1e-3)
