"""llama.cpp from the package `xllamacpp`: the oracle for tokenisation and detokenisation of a GGUF file."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


class _ModelParams(ctypes.Structure):
    """`llama_model_params` of the pinned version; returned by value, so its size must be right."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, ctypes.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *((name, ctypes.c_void_p) for name in ("tensor_split", "progress", "progress_data", "kv_overrides")),
        *((name, ctypes.c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc")),
        ("load_mtp", ctypes.c_bool),
    ]


class LlamaVocabulary:
    """The vocabulary of a GGUF file as llama.cpp reads it; no weights are loaded."""

    def __init__(self, path: Path):
        """Raises `ValueError` where llama.cpp refuses the file."""
        self._lib = _library()
        options = self._lib.llama_model_default_params()
        assert options.use_extra_bufts, "the layout of llama_model_params has changed"
        options.vocab_only = True
        self._model = self._lib.llama_model_load_from_file(str(path).encode(), options)
        if not self._model:
            raise ValueError(f"llama.cpp refuses {path}")
        self._vocab = self._lib.llama_model_get_vocab(self._model)

    def __del__(self) -> None:
        if getattr(self, "_model", None):
            self._lib.llama_model_free(self._model)

    def tokens(self, text: str, *, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text, as `llama-completion -p` has them."""
        data = text.encode()
        capacity = 4 * len(data) + 16
        found = (ctypes.c_int32 * capacity)()
        count = self._lib.llama_tokenize(self._vocab, data, len(data), found, capacity, add_special, parse_special)
        assert count >= 0
        return list(found[:count])

    def text(self, ids: list[int], *, special: bool = False) -> str:
        """The text of tokens, without control tokens unless `special`."""
        capacity = 64 * len(ids) + 64
        out = ctypes.create_string_buffer(capacity)
        id_array = (ctypes.c_int32 * len(ids))(*ids)
        size = self._lib.llama_detokenize(self._vocab, id_array, len(ids), out, capacity, False, special)
        assert size >= 0
        return out.raw[:size].decode(errors="replace")

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes that `llama-completion` prints for a token; none for a control token unless `special`."""
        out = ctypes.create_string_buffer(4096)
        size = self._lib.llama_token_to_piece(self._vocab, token, out, len(out), 0, special)
        assert size >= 0
        return out.raw[:size]

    @property
    def begin(self) -> int | None:
        """The BOS token that is added to prompts, if any."""
        return int(self._lib.llama_vocab_bos(self._vocab)) if self._lib.llama_vocab_get_add_bos(self._vocab) else None


@cache
def _library() -> Any:
    package = find_spec("xllamacpp")
    assert package is not None, "install requirements-dev.txt"
    (shared_object,) = Path(str(package.origin)).parent.glob("*.so")
    lib = ctypes.CDLL(str(shared_object))
    lib.llama_model_default_params.restype = _ModelParams
    lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, _ModelParams]
    for function in (lib.llama_model_load_from_file, lib.llama_model_get_vocab):
        function.restype = ctypes.c_void_p
    lib.llama_model_get_vocab.argtypes = lib.llama_model_free.argtypes = [ctypes.c_void_p]
    lib.llama_tokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    lib.llama_detokenize.argtypes = [
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int32, ctypes.c_char_p, ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
    ]  # fmt: skip
    lib.llama_token_to_piece.argtypes = [
        ctypes.c_void_p, ctypes.c_int32, ctypes.c_void_p, ctypes.c_int32, ctypes.c_int32, ctypes.c_bool,
    ]  # fmt: skip
    lib.llama_vocab_bos.argtypes = lib.llama_vocab_get_add_bos.argtypes = [ctypes.c_void_p]
    lib.llama_vocab_get_add_bos.restype = ctypes.c_bool
    lib.llama_log_set(_SILENT, None)
    return lib


_SILENT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
