"""How weights reach the compute: pinned rows stay, the others pass through a ring of buffers, read ahead of their use.

layout   which rows are pinned, which are streamed, and in which order a pass visits them
memory   aligned memory made once
files    weights read from their own file, without the page cache where the file system allows
weights  the stream itself: readers, ring, prefetch over the end of a pass
"""

from headrace.stream.arena import Arena
from headrace.stream.files import WeightFile
from headrace.stream.layout import Layout, WeightGroup
from headrace.stream.readers import ReadCounters
from headrace.stream.weights import WeightStream

__all__ = ["Arena", "Layout", "ReadCounters", "WeightFile", "WeightGroup", "WeightStream"]
