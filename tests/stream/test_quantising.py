"""Low-bit draft copies, quantised while they are read."""

import ctypes
from pathlib import Path

import gguf
import numpy as np
import pytest

from headrace.checkpoint import Checkpoint, open_checkpoint
from headrace.checkpoint.low_bit import low_bit_copy
from headrace.kernels.convert import convert, q4_k_blocks
from headrace.stream.arena import Arena
from headrace.stream.files import WeightFile
from headrace.stream.quantising import with_encodings
from headrace.stream.virtual import FileSet
from support.zoo.gguf_files import random_model, write_gguf


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    path = tmp_path_factory.mktemp("copy") / "tiny.gguf"
    return open_checkpoint(write_gguf(random_model("llama"), "llama", path, "F16"))


def test_matrices_shrink_and_everything_else_stays(original: Checkpoint) -> None:
    copy = low_bit_copy(original)
    for name, tensor in original.tensors.items():
        virtual = copy.tensors[name]
        if len(tensor.shape) == 2:
            assert (virtual.type, virtual.shape) == ("Q4_0", tensor.shape)
            assert virtual.nbytes < tensor.nbytes
            assert virtual.path not in original.paths
        else:
            assert virtual == tensor


def test_reads_of_any_range_give_the_same_bytes(original: Checkpoint) -> None:
    copy = with_encodings(low_bit_copy(original), original)
    files = FileSet(copy.paths, copy.virtual, WeightFile)
    ((path, virtual),) = copy.virtual.items()
    file = files[path]
    tensor = max((tensor for tensor, _ in virtual), key=lambda t: t.rows)
    source = original.tensors[tensor.name]
    raw = Path(source.path).read_bytes()[source.offset : source.offset + source.nbytes]
    plain = np.frombuffer(raw, np.float16).astype(np.float32).reshape(tensor.rows, tensor.columns)
    whole = Arena(1 << 20)
    file.read(tensor.offset, whole.view[: tensor.nbytes], tensor.nbytes)
    expected = bytes(whole.view[: tensor.nbytes])
    back = gguf.dequantize(
        np.frombuffer(expected, np.uint8).reshape(tensor.rows, -1), gguf.GGMLQuantizationType[tensor.type]
    )
    assert np.linalg.norm(back - plain) / np.linalg.norm(plain) < 0.12
    part = Arena(1 << 20)
    for start, length in ((0, 4096), (4096, 4096), (4096, 777), (8192, 100)):
        if start + length <= tensor.nbytes:
            file.read(tensor.offset + start, part.view[:length], length)
            assert bytes(part.view[:length]) == expected[start : start + length]
    files.close()


def test_our_q4_k_blocks_are_nearly_as_good_as_ggmls_searched_ones() -> None:
    weights = np.random.default_rng(0).standard_normal((64, 512)).astype(np.float32) * 0.02
    weights[3] = 0  # a block of zeros
    weights[5] = 0.01  # one sign only
    weights[6] *= 1e4
    errors = {}
    for kind, columns in (("Q4_K", 512), ("Q4_0", 512)):
        size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        packed = np.zeros((64, columns // size[0] * size[1]), np.uint8)
        convert("F32", weights.ctypes.data, kind, packed.ctypes.data, 64, columns)
        back = gguf.dequantize(packed, gguf.GGMLQuantizationType[kind])
        assert np.isfinite(back).all()
        assert (back[3] == 0).all()
        errors[kind] = float(np.linalg.norm(back[8:] - weights[8:]) / np.linalg.norm(weights[8:]))
    assert errors["Q4_K"] < errors["Q4_0"] < 0.1
    assert q4_k_blocks(weights[:2].ravel()).shape == (4, 144)


def test_f16_and_f32_sources_give_the_same_blocks() -> None:
    halves = np.random.default_rng(1).standard_normal((8, 256)).astype(np.float16)
    floats = halves.astype(np.float32)
    packed = []
    for kind, source in (("F16", halves), ("F32", floats)):
        target = (ctypes.c_uint8 * (8 * 144))()
        convert(kind, source.ctypes.data, "Q4_K", ctypes.addressof(target), 8, 256)
        packed.append(bytes(target))
    assert packed[0] == packed[1]
