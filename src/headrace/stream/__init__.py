"""Weight streaming: pinned rows stay in memory, the others are prefetched through a ring of buffers.

layout   pinned rows, streamed rows, and the order of the weight groups of a pass
arena    aligned memory reserved once
files    weights read from their own file, without the page cache where the file system allows
weights  the stream itself: readers, ring, prefetch over the end of a pass
"""

from headrace.stream.arena import Arena
from headrace.stream.files import WeightFile
from headrace.stream.layout import Layout, WeightGroup
from headrace.stream.readers import ReadCounters
from headrace.stream.weights import WeightStream

__all__ = ["Arena", "Layout", "ReadCounters", "WeightFile", "WeightGroup", "WeightStream"]
