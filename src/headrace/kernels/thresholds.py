"""Where one kernel hands over to another. Read by the planner, so without torch."""

# Up to here every product goes through ggml, whose rows do not influence each other. Drafts are verified, and batches
# decoded, within this limit.
DECODE_MAX_ROWS = 16

# From so many rows on ggml has kernels that unpack a tile of weights for all of them at once, for most formats of 256
# weights a block. They add up in another order than the dot products do, so a row's last bits differ.
TILE_ROWS = 8

# Rows of activations that the kernel for repacked weights takes together. Where a row's result must not depend on the
# number of rows, others are filled up to a multiple.
ACTIVATION_ROWS = 4

# Rows of a prompt chunk, the unit of prefill and of prefix caching. Each chunk is multiplied by itself where a kernel's results
# depend on the number of rows, so that they do not depend on what else a pass carries.
CHUNK_ROWS = 64

# The same for the beginning of a prompt, which other prompts often share, where all rows of a pass share each matmul anyway.
SMALL_CHUNK_ROWS = 8

# Up to so many rows of a chunk, an expert's weights are multiplied as they are; with more of them they are unpacked first.
EXPERT_DECODE_MAX_ROWS = 4

# Experts of a layer that are multiplied together: what they work on lies in memory at the same time.
EXPERTS_PER_CALL = 16

# Formats that keep more than bf16 does. Their many-row products run in full fp32.
PRECISE_TYPES = frozenset({"F32", "F16"})
