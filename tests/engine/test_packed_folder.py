"""A packed folder in the engine: logits of the plain folder, bit for bit, streamed and pinned. The plan reads fewer bytes."""

from pathlib import Path

import pytest
import torch

from headrace.checkpoint import open_checkpoint
from headrace.checkpoint.packing import pack_folder
from headrace.engine import Rows
from headrace.plan.shape import shape_of
from headrace.stream import WeightFile
from support.engines import build_engine, greedy_logits
from support.zoo.folders import write_folder
from support.zoo.gguf_files import random_model

pytestmark = pytest.mark.zoo


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    base = tmp_path_factory.mktemp("folders")
    plain = write_folder(random_model("llama"), base / "plain", torch.bfloat16, shards=2)
    return plain, Path(pack_folder(str(plain), str(base / "packed")).path)


@pytest.mark.parametrize(("share", "unit_bytes"), [(0.0, 9000), (0.4, 1), (1.0, 64 << 10)])
def test_logits_are_those_of_the_plain_folder_bit_for_bit(
    folders: tuple[Path, Path], share: float, unit_bytes: int
) -> None:
    logits = []
    for folder in folders:
        with build_engine(folder, share=share, options={"unit_bytes": unit_bytes}) as engine:
            logits.append(greedy_logits(engine))
    assert torch.equal(*logits)


class Counting(WeightFile):
    read_bytes = 0

    def read(self, offset: int, target: memoryview, needed: int) -> int:
        count = super().read(offset, target, needed)
        Counting.read_bytes += count
        return count


def test_counted_read_bytes_are_those_that_came_from_the_disk(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        with build_engine(folder, share=0.3, options={"readers": 0}, open_file=Counting) as engine:
            cache = engine.new_cache(8)
            for _ in range(2):
                engine.step([Rows(cache=cache, tokens=[1])])
            Counting.read_bytes = 0
            engine.step([Rows(cache=cache, tokens=[1])])
            assert engine.passes[-1].read_bytes == Counting.read_bytes > 0


def test_the_plan_reads_fewer_bytes_than_it_multiplies(folders: tuple[Path, Path]) -> None:
    plain, packed = (shape_of(open_checkpoint(folder)) for folder in folders)
    assert plain.weights_bytes == packed.weights_bytes
    assert plain.read_share == 1.0
    assert 0.75 < packed.read_share < 0.9
