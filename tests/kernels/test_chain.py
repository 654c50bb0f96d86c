"""Operations in a chain give what torch gives, bit for bit, and norms and gates what the kernels give alone."""

from collections.abc import Iterator

import pytest
import torch

from headrace.kernels import Kernels

GENERATOR = torch.Generator().manual_seed(7)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    made = Kernels(2)
    yield made
    made.close()


WIDE = random(3, 5, 64)
OPERANDS = [
    (random(1, 1, 96), random(1, 1, 96)),
    (random(1, 1, 4096), random(1, 1, 4096)),  # both threads
    (random(1, 1, 4098), random(1, 1, 4098)),  # which cannot share it evenly
    (random(1, 1, 96), random(96)),
    (random(96), random(1, 1, 96)),
    (random(1, 12, 1, 64), random(1, 1, 1, 64)),
    (random(2, 12, 3, 64), random(2, 1, 3, 1)),
    (WIDE[:, :, :32], WIDE[:, :, 32:]),
    (WIDE[:, 1:3], WIDE[:, 3:]),
    (WIDE.transpose(0, 1), random(5, 3, 64)),
    (random(4, 1), random(4, 6)),
    (random(3, 7), 0.3),
    (random(1), 2.0),
]


@pytest.mark.parametrize("operands", OPERANDS)
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_two_numbers_make_what_they_make_in_torch(
    kernels: Kernels, name: str, operands: tuple[torch.Tensor, torch.Tensor]
) -> None:
    expected = getattr(torch, name)(*operands)
    out = torch.full_like(expected, 9)
    chain = kernels.chain(1)
    if chain.combine(name, out, *operands):
        chain.seal(True)
        chain.compute()
        assert torch.equal(out, expected)
    else:
        assert name in ("sub", "div")
        assert operands[0].shape != expected.shape


@pytest.mark.parametrize("operands", [(WIDE.transpose(0, 2), WIDE.transpose(0, 2)), (random(4, 6), random(6, 4).T)])
def test_what_ggml_would_die_of_is_left_to_torch(kernels: Kernels, operands: tuple[torch.Tensor, torch.Tensor]) -> None:
    assert not kernels.chain(1).combine("add", torch.empty(operands[0].shape), *operands)
    assert not kernels.chain(1).combine("add", torch.empty(3, dtype=torch.int64), torch.ones(3), torch.ones(3))


def test_parts_are_copied_to_where_they_belong(kernels: Kernels) -> None:
    parts = [WIDE[:, 1:3, 32:], random(3, 2, 16)]
    out = torch.empty(3, 2, 48)
    chain = kernels.chain(2)
    assert chain.copy(out[..., :32], parts[0])
    assert chain.copy(out[..., 32:], parts[1])
    chain.seal(True)
    chain.compute()
    assert torch.equal(out, torch.cat(parts, -1))


@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (1, 8960), (1, 4100), (3, 64), (40, 96)])
def test_norms_and_gates_are_near_to_torchs_and_the_same_in_a_chain(kernels: Kernels, rows: int, columns: int) -> None:
    x, weight = random(rows, 2 * columns)[:, columns:], random(columns)
    norm, gate = torch.empty(rows, columns), torch.empty(rows, columns)
    kernels.rms_norm(norm, x, weight, 1e-6)
    kernels.silu(gate, x)
    torch.testing.assert_close(norm, torch.rms_norm(x, (columns,), weight, 1e-6), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gate, torch.nn.functional.silu(x), rtol=2e-6, atol=1e-6)
    chained = torch.empty(rows, columns), torch.empty(rows, columns)
    chain = kernels.chain(3)
    assert chain.rms_norm(chained[0], x, weight, 1e-6)
    assert chain.silu(chained[1], x)
    chain.seal(True)
    chain.compute()
    assert torch.equal(chained[0], norm)
    assert torch.equal(chained[1], gate)
    for row in range(rows):
        alone = torch.empty(1, columns)
        kernels.rms_norm(alone, x[row : row + 1], weight, 1e-6)
        assert torch.equal(alone[0], norm[row])
        kernels.silu(alone, x[row : row + 1])
        assert torch.equal(alone[0], gate[row])
