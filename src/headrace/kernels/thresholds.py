"""Row counts at which one kernel hands over to another. Read by the planner, so without torch."""

# Max rows of a matmul that always goes through ggml, whose rows do not influence each other. Drafts are verified, and batches
# decoded, within this limit.
DECODE_MAX_ROWS = 16

# Min rows of ggml's tile kernels, which exist for most formats of 256 weights a block. They unpack a tile of weights for all
# rows at once. They add up in another order than the dot products do, so a row's last bits differ.
TILE_ROWS = 8

# Rows of weights and columns of a tile, for formats of floats.
TILE_WEIGHT_ROWS = 4
TILE_COLUMNS = 16

# Rows of activations that the kernel for repacked weights takes together. Row-invariant rows are padded to a multiple.
ACTIVATION_ROWS = 4

# Rows of a prompt chunk, the unit of prefill and of prefix caching. Where prefill is not row-invariant, chunks are multiplied
# separately, so that results do not depend on the other rows of a pass; torch's GEMM needs more rows to be fast.
CHUNK_ROWS = 64
GEMM_CHUNK_ROWS = 128

# Rows of a chunk at the start of a prompt, if prefill is row-invariant: more of a prefix is shared.
SMALL_CHUNK_ROWS = 8

# Tokens of a block, the unit in which memory of KV caches is counted: pages of 4 KiB hold 16 or 32 positions of a head.
KV_BLOCK_TOKENS = 64

# Max rows of a chunk for which an expert's weights are multiplied packed; for more rows they are unpacked first.
EXPERT_DECODE_MAX_ROWS = 4

# Experts of a layer that are multiplied together: their activations are in memory at the same time.
EXPERTS_PER_CALL = 16

# Formats with more precision than bf16. Their prefill matmuls run in full fp32.
PRECISE_TYPES = frozenset({"F32", "F16"})
