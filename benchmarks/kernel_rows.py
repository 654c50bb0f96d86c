"""GFLOP/s of one matmul with 1 to 16 rows: dot products, the padded tile kernel, and ggml's own choice.

    python benchmarks/kernel_rows.py [Q4_K Q6_K Q8_0 F16 ...]

One matrix of 4096 by 4096. Dot products and tiles are row-invariant; ggml's choice is where its bits are those of dot products,
which the last column says. Medians of 15, after 100 ms of warming up. For formats that `has_dot_bits` names, the engine's dot
products are ggml's choice.
"""

import statistics
import sys
import time

import torch

from headrace.checkpoint.tensor import row_bytes
from headrace.kernels import Kernels, WeightSlice
from headrace.kernels.convert import convert

SIZE, ROWS = 4096, (1, 2, 4, 8, 16)
TYPES = ("Q4_K", "Q5_K", "Q6_K", "Q8_0", "Q4_0", "Q5_0", "F16", "BF16")


def measure(kind: str, rows: int, row_invariant: bool, pads: bool) -> tuple[float, torch.Tensor]:
    """(GFLOP/s, result) of `rows` rows."""
    random = torch.Generator().manual_seed(0)
    weights = torch.randn(SIZE, SIZE, generator=random)
    packed = torch.empty(SIZE * row_bytes(kind, SIZE), dtype=torch.uint8)
    convert("F32", weights.data_ptr(), kind, packed.data_ptr(), SIZE, SIZE)
    x, result = torch.randn(rows, SIZE, generator=random), torch.empty(rows, SIZE)
    kernels = Kernels(torch.get_num_threads(), row_invariant=row_invariant, tiled=[kind])
    kernels.start(spins=False, pad_decode_rows_to_tiles=pads)
    slices, seconds = [(0, WeightSlice(kind, SIZE, packed.data_ptr(), 0))], list[float]()
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.1 or len(seconds) < 15:
        start = time.perf_counter()
        kernels.matmul(x, slices, [result], rows)
        seconds.append(time.perf_counter() - start)
    kernels.close()
    return 2e-9 * rows * SIZE * SIZE / statistics.median(seconds[-15:]), result


def main() -> None:
    print("type", "rows", "dot products", "tiles", "ggml", "same bits", sep="\t")
    for kind in sys.argv[1:] or TYPES:
        for rows in ROWS:
            found = [
                measure(kind, rows, invariant, pads)
                for invariant, pads in ((True, False), (True, True), (False, False))
            ]
            rates = [f"{rate:.0f}" for rate, _ in found]
            print(kind, rows, *rates, torch.equal(found[0][1], found[2][1]), sep="\t", flush=True)


if __name__ == "__main__":
    main()
