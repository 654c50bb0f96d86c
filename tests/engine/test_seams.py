"""The seams for several machines and devices: owners of rows, and backends."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from headrace.kernels import Kernels, WeightSlice
from support.copying_group import CopyingGroup, Member
from support.engines import build_engine, logits_of
from support.zoo.folders import CASES, tiny_model, write_folder

pytestmark = pytest.mark.zoo

EXPERTS = 8  # of a layer of the tiny Mixtral
SHARE = 0.3  # of pinned rows
PARTS = (5, 1, 1, 1, 8)  # row-invariant rows, some of them replayed


PACKED = [name for name, case in CASES.items() if case.kind in ("dense", "experts", "mla")]


@pytest.mark.parametrize("name", PACKED)
def test_two_runners_that_own_half_of_every_tensor_have_the_bits_of_one(name: str, tmp_path: Path) -> None:
    write_folder(tiny_model(name), tmp_path)
    with build_engine(tmp_path, Kernels(1), share=SHARE) as engine:
        if engine.attention_mode != "packed":
            pytest.skip("not packed attention")
        alone, _ = logits_of(engine, PARTS)
        read_alone = sum(one.read_bytes for one in engine.passes)
    group = CopyingGroup([0.37])

    def work(member: Member) -> tuple[torch.Tensor, int, int]:
        with build_engine(tmp_path, Kernels(1), share=SHARE, group=member) as engine:
            logits, _ = logits_of(engine, PARTS)
            return logits, sum(one.read_bytes for one in engine.passes), member.exchanged

    results = group.run(work)
    for logits, read, exchanged in results:
        assert torch.equal(logits, alone)
        assert exchanged > 0
        assert read < read_alone


class CountingBackend:
    """Counts calls and computes nothing."""

    threads = 1
    attends = True
    has_expert_mlp = False
    row_invariant = True

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()
        self.rows: Counter[str] = Counter()  # rows of weights multiplied, by format

    def start(self, *, spins: bool, pad_decode_rows_to_tiles: bool) -> None:
        self.calls["start"] += 1

    def has_tiles(self, type_name: str, columns: int) -> bool:
        return False

    def repack(self, weight_slice: WeightSlice, columns: int, in_place: bool = False) -> WeightSlice:
        return weight_slice

    def matmul(self, x: Any, slices: Any, outputs: Any, invariant_rows: Any = None, chunks: Sequence[int] = ()) -> None:
        self.calls["matmul"] += 1
        for _, one in slices:
            self.rows[one.type] += one.rows
        for output in outputs:
            output.zero_()

    def matmul_each(self, jobs: Any) -> None:
        self.calls["matmul_each"] += len(jobs)
        for job in jobs:
            job.output.zero_()

    def expert_mlp(self, x: Any, form: Any, experts: Any, outputs: Any) -> None:
        raise NotImplementedError

    def attend(self, query: Any, keys: Any, values: Any, scale: float, out: torch.Tensor) -> None:
        self.calls["attend"] += 1
        out.zero_()

    def rms_norm(self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> None:
        self.calls["rms_norm"] += 1
        out.copy_(x)

    def silu(self, out: torch.Tensor, x: torch.Tensor) -> None:
        self.calls["silu"] += 1
        out.copy_(x)

    def unpack(self, type_name: str, address: int, rows: int, columns: int) -> torch.Tensor:
        self.calls["unpack"] += 1
        return torch.zeros((rows, columns))

    def unpack_all(self, slices: Any, outputs: Any) -> None:
        self.calls["unpack_all"] += 1
        for output in outputs:
            output.zero_()

    def quantise_q8(self, weight: torch.Tensor) -> tuple[WeightSlice, object]:
        return WeightSlice("F32", len(weight), weight.data_ptr(), 0), weight

    def fused_graph(self, operations: int) -> None:
        return None

    def cached_matmul(self, x: Any, slices: Any, outputs: Any) -> None:
        return None

    def release(self) -> None:
        self.calls["release"] += 1

    def close(self) -> None:
        self.calls["close"] += 1


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_backend_that_only_counts_lays_out_and_runs_a_model(name: str, tmp_path: Path) -> None:
    write_folder(tiny_model(name), tmp_path)
    backend = CountingBackend()
    with build_engine(tmp_path, backend, share=SHARE) as engine:
        logits, _ = logits_of(engine, (3, 1))
        rows = sum(tensor.rows for step in engine.weights.steps if hasattr(step, "tensors") for tensor in step.tensors)
        layers = len(engine.experts.stream.bundles) if engine.experts is not None else 0
        # Routers of the next layer and the one after it, which predict experts: a row for each expert.
        predicted = sum(min(2, layers - 1 - layer) for layer in range(layers)) * EXPERTS
        read = engine.passes[-1].read_bytes
    assert logits.shape[0] == 4
    counted = sum(backend.rows.values()) - 2 * predicted
    assert counted == 2 * rows, "every row of every linear, once a pass"
    assert backend.calls["attend"] > 0
    assert backend.calls["start"] == 1
    assert backend.calls["close"] > 0
    assert read > 0
    assert (backend.calls["matmul_each"] > 0) == (name == "mixtral")
