"""Operations in a fused graph equal torch's, bit for bit; its norms and gates equal the kernels' own."""

from collections.abc import Iterator

import pytest
import torch

from headrace.kernels import Kernels, WeightSlice
from headrace.kernels.attention_graph import AttentionNodes, Heads, Positions
from headrace.kernels.expert_mlp import ExpertShapes
from headrace.kernels.matmul import ExpertMatmul

pytestmark = pytest.mark.zoo

GENERATOR = torch.Generator().manual_seed(7)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


@pytest.fixture
def kernels() -> Iterator[Kernels]:
    kernels = Kernels(2)
    yield kernels
    kernels.close()


WIDE = random(3, 5, 64)
OPERANDS = [
    (random(1, 1, 96), random(1, 1, 96)),
    (random(1, 1, 4096), random(1, 1, 4096)),  # both threads
    (random(1, 1, 4098), random(1, 1, 4098)),  # threads cannot share it evenly
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
def test_elementwise_operations_in_a_fused_graph_equal_torch(
    kernels: Kernels, name: str, operands: tuple[torch.Tensor, torch.Tensor]
) -> None:
    expected = getattr(torch, name)(*operands)
    out = torch.full_like(expected, 9)
    graph = kernels.fused_graph(1)
    if graph.combine(name, out, *operands):
        graph.finalize(True)
        graph.compute()
        assert torch.equal(out, expected)
    else:
        assert name in ("sub", "div")
        assert operands[0].shape != expected.shape


@pytest.mark.parametrize("operands", [(WIDE.transpose(0, 2), WIDE.transpose(0, 2)), (random(4, 6), random(6, 4).T)])
def test_operands_that_crash_ggml_are_left_to_torch(
    kernels: Kernels, operands: tuple[torch.Tensor, torch.Tensor]
) -> None:
    assert not kernels.fused_graph(1).combine("add", torch.empty(operands[0].shape), *operands)
    assert not kernels.fused_graph(1).combine("add", torch.empty(3, dtype=torch.int64), torch.ones(3), torch.ones(3))


def test_a_fused_graph_concatenates_tensors(kernels: Kernels) -> None:
    parts = [WIDE[:, 1:3, 32:], random(3, 2, 16)]
    out = torch.empty(3, 2, 48)
    graph = kernels.fused_graph(2)
    assert graph.copy(out[..., :32], parts[0])
    assert graph.copy(out[..., 32:], parts[1])
    graph.finalize(True)
    graph.compute()
    assert torch.equal(out, torch.cat(parts, -1))


@pytest.mark.parametrize(("rows", "columns"), [(1, 96), (1, 8960), (1, 4100), (3, 64), (40, 96)])
def test_rms_norm_and_silu_are_near_torch_and_equal_in_a_fused_graph(kernels: Kernels, rows: int, columns: int) -> None:
    x, weight = random(rows, 2 * columns)[:, columns:], random(columns)
    norm, gate = torch.empty(rows, columns), torch.empty(rows, columns)
    kernels.rms_norm(norm, x, weight, 1e-6)
    kernels.silu(gate, x)
    torch.testing.assert_close(norm, torch.rms_norm(x, (columns,), weight, 1e-6), rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(gate, torch.nn.functional.silu(x), rtol=2e-6, atol=1e-6)
    fused = torch.empty(rows, columns), torch.empty(rows, columns)
    graph = kernels.fused_graph(3)
    assert graph.rms_norm(fused[0], x, weight, 1e-6)
    assert graph.silu(fused[1], x)
    graph.finalize(True)
    graph.compute()
    assert torch.equal(fused[0], norm)
    assert torch.equal(fused[1], gate)
    for row in range(rows):
        alone = torch.empty(1, columns)
        kernels.rms_norm(alone, x[row : row + 1], weight, 1e-6)
        assert torch.equal(alone[0], norm[row])
        kernels.silu(alone, x[row : row + 1])
        assert torch.equal(alone[0], gate[row])


def test_a_fused_graph_reorders_the_elements_of_a_row(kernels: Kernels) -> None:
    x, order = random(1, 1, 96), torch.randperm(96, generator=GENERATOR)
    out = torch.empty(1, 1, 96)
    graph = kernels.fused_graph(1)
    assert graph.select(out, x, order)
    graph.finalize(True)
    graph.compute()
    assert torch.equal(out, x.index_select(-1, order))


@pytest.mark.parametrize(
    ("queries", "kv_heads", "key_width", "value_width"), [(12, 2, 128, 128), (4, 4, 16, 24), (6, 1, 8, 8)]
)
@pytest.mark.parametrize("count", [1, 7, 64, 200])
def test_attention_of_a_row_is_near_torch_and_equal_in_a_fused_graph(
    kernels: Kernels, queries: int, kv_heads: int, key_width: int, value_width: int, count: int
) -> None:
    capacity, scale = 256, 0.2
    keys, values = (random(kv_heads, capacity, width).half() for width in (key_width, value_width))
    query, new = random(queries, key_width), (random(kv_heads, key_width), random(kv_heads, value_width))
    held = keys.clone(), values.clone()
    for whole, own in zip(held, new, strict=True):
        whole[:, count - 1] = own
    wide = [one[:, :count].float() for one in held]
    out = torch.empty(queries, value_width)
    kernels.attend(query, wide[0], wide[1], scale, out)
    grouped = query.view(1, kv_heads, -1, key_width)
    expected = torch.nn.functional.scaled_dot_product_attention(grouped, wide[0][None], wide[1][None], scale=scale)
    torch.testing.assert_close(out, expected.view(queries, -1), rtol=1e-5, atol=1e-5)

    heads = Heads(queries, kv_heads, key_width, value_width)
    graph = kernels.fused_graph(AttentionNodes.OPERATIONS)
    attending = graph.attend(heads, capacity, scale)
    graph.finalize(True)
    fused = torch.empty(queries, value_width)
    buffers = [torch.empty(kv_heads, capacity, width) for width in (key_width, value_width)]
    attending.set(
        count,
        (query.data_ptr(), 4 * key_width),
        fused.data_ptr(),
        *[Positions(one.data_ptr(), 4 * one.stride(0)) for one in buffers],
    )
    rows = tuple((one.data_ptr(), 4 * one.stride(0)) for one in new)
    places = [Positions(one.data_ptr(), 2 * one.stride(0)) for one in (keys, values)]
    attending.set_packed(count, rows, *places)  # type: ignore[arg-type]
    graph.compute()
    assert torch.equal(fused, out)
    assert torch.equal(keys, held[0])  # the row's own K and V are in their place
    assert torch.equal(values, held[1])


@pytest.mark.parametrize("parts", [1, 2])
def test_the_expert_mlp_of_a_row_equals_separate_matmuls(kernels: Kernels, parts: int) -> None:
    hidden, inner, count = 64, 96, 3
    x = random(1, hidden)
    ups = [random(2 * inner, hidden) for _ in range(count)]
    downs = [random(hidden, inner) for _ in range(count)]

    def weight_slice(rows: torch.Tensor) -> WeightSlice:
        return WeightSlice("F32", len(rows), rows.data_ptr(), 0)

    shapes = ExpertShapes((("F32", 2 * inner // parts),) * parts, (("F32", hidden),))
    slices = [[*up.split(2 * inner // parts), down] for up, down in zip(ups, downs, strict=True)]
    outputs = [torch.empty(1, hidden) for _ in range(count)]
    addresses = [[one.data_ptr() for one in expert] for expert in slices]
    kernels.expert_mlp(x, shapes, addresses, [output.data_ptr() for output in outputs])
    for up, down, output in zip(ups, downs, outputs, strict=True):
        gate_up, gate, expected = torch.empty(1, 2 * inner), torch.empty(1, inner), torch.empty(1, hidden)
        kernels.matmul_each([ExpertMatmul(x, weight_slice(up), gate_up, 1)])
        kernels.silu(gate, gate_up[:, :inner])
        kernels.matmul_each([ExpertMatmul(gate * gate_up[:, inner:], weight_slice(down), expected, 1)])
        assert torch.equal(output, expected)
