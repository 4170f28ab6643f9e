"""One layer's index: every tar entry, and every place where decompression can start. Built in one pass, then kept.

`build` reads a blob once from front to back and writes the index file; `load` opens such a file; a `LayerIndex` gives
entries in stream order and decodes any span of the layer. ``format`` holds the file format's specification,
``reader`` reads it, ``passes`` is the pass, ``child`` the process it runs in.

Not here: where index files are kept (`ocifs.store`), what entries mean together (`ocifs.overlay`), caching of decoded
spans (`ocifs.spans`).
"""

from ocifs.layer_index.child import Build, Built, Content, Expected, StoredBytes, build
from ocifs.layer_index.format import FORMAT_VERSION, Mismatch
from ocifs.layer_index.reader import LayerIndex, LayerRange, Span, SpanDecoder, SpanTable, load

__all__ = [
    "FORMAT_VERSION",
    "Build",
    "Built",
    "Content",
    "Expected",
    "LayerIndex",
    "LayerRange",
    "Mismatch",
    "Span",
    "SpanDecoder",
    "SpanTable",
    "StoredBytes",
    "build",
    "load",
]
