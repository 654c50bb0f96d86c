"""Where one kernel hands over to another. Read by the planner, so without torch."""

# Up to here every product goes through ggml, whose rows do not influence each other. Drafts are verified, and batches
# decoded, within this limit.
FEW_ROWS = 16

# From so many rows on ggml has kernels that unpack a tile of weights for all of them at once, for most formats of 256
# weights a block. They add up in another order than the dot products do, so a row's last bits differ.
TILE_ROWS = 8

# Rows of activations that the kernel for interleaved weights takes together. Where a row's result must not depend on the
# number of rows, others are filled up to a multiple.
ACTIVATION_ROWS = 4

# Experts of a layer that are multiplied together: what they work on lies in memory at the same time.
EXPERTS_TOGETHER = 16

# Formats that keep more than bf16 does. Their many-row products run in full fp32.
PRECISE_TYPES = frozenset({"F32", "F16"})
