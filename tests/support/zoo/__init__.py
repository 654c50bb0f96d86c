"""Every model of the tests, each tiny and written when it is needed.

- `gguf_files`: random models of every GGUF architecture, and their transformers models.
- `folders`: random models of every causal architecture of transformers, and their folders.
- `translators`: random encoder-decoder models, as folders and as GGUF files.
- `packers`: quantised tensors of common tools, for folders.
- `scripted`: a model whose next token depends on the last token alone. `by_position`: on the position alone.
- `headers`: headers of llamas of any size, without weights, for the planner.
- `vocabularies`: tokenizers of every kind, without a model.
"""
