"""Identifies files and folders that are no readable models, with a hint for each.

Files are identified by their first bytes, folders by the names of their files.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

from headrace.errors import CheckpointError, UnsupportedError

SIGNATURE_BYTES = 512
_AGAIN = "download or copy the file again"
_UNPACK = "unpack it first"
_OTHER_FORMAT = "get a safetensors or GGUF version of the model"
_CONVERT = "convert the model again with a current converter of llama.cpp"

# (first bytes, format, hint). The first match counts.
_SIGNATURES: tuple[tuple[bytes, str, str], ...] = (
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "run: git lfs pull"),
    (b"\x1f\x8b", "packed with gzip", _UNPACK),
    (b"\xfd7zXZ\x00", "packed with xz", _UNPACK),
    (b"BZh", "packed with bzip2", _UNPACK),
    (b"\x28\xb5\x2f\xfd", "packed with Zstandard", _UNPACK),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _UNPACK),
    (b"lmgg", "in the old format GGML", _CONVERT),
    (b"fmgg", "in the old format GGMF", _CONVERT),
    (b"tjgg", "in the old format GGJT", _CONVERT),
    (b"algg", "a LoRA adapter in the old format GGLA", "convert the base model again, with the adapter merged into it"),
    (b"\x89HDF\r\n\x1a\n", "in HDF5, as Keras and TensorFlow write it", _OTHER_FORMAT),
    (b"\x93NUMPY", "an array of NumPy", _OTHER_FORMAT),
    (b"GGUF", "a GGUF file", "rename it to NAME.gguf, and name that"),
)  # fmt: skip
_PICKLE = "a pickle of PyTorch, which can run code when read"


def identify_format(start: bytes, size: int) -> tuple[str, str] | None:
    """(format, hint) of a file, from its first `SIGNATURE_BYTES` and its size; None if unknown."""
    if not size:
        return "empty", _AGAIN
    if size < 4:
        return f"only {size} bytes long", _AGAIN
    # Checked first: the length at the start of a safetensors file may equal another format's signature.
    if 2 <= int.from_bytes(start[:8], "little") <= 1 << 30 and start[8:9] == b"{":
        return "a safetensors file", "name the folder that it lies in, or give it a name that ends with .safetensors"
    for signature, what, hint in _SIGNATURES:
        if start.startswith(signature):
            return what, hint
    if start.startswith(b"PK\x03\x04"):
        pickled = b"data.pkl" in start or b"archive/" in start
        return (_PICKLE, _OTHER_FORMAT) if pickled else ("a zip archive", _UNPACK)
    if re.match(rb"\x80[\x02-\x05]", start):
        return _PICKLE, _OTHER_FORMAT
    if start[257:262] == b"ustar":
        return "a tar archive", _UNPACK
    if not start.strip(b"\0"):
        return "all zeros: the download is incomplete", _AGAIN
    return _text(start)


def _text(start: bytes) -> tuple[str, str] | None:
    words = start.lstrip().lower()
    if words.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, not the file itself", "download it again; the page may say why it was refused"
    if words.startswith(b"<?xml"):
        return "XML, most likely an error that a server sent", "download it again"
    if words.startswith(b"{"):
        return "JSON, most likely an error that a server sent", "download it again"
    if words and all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return "a text, most likely an error that a server sent", "download it again"
    return None


def check_bytes(path: str, start: bytes, size: int, wanted: str) -> None:
    """Raise `CheckpointError` if the first bytes show another format than `wanted`."""
    found = identify_format(start, size)
    if found is not None:
        raise CheckpointError(f"{path} is not {wanted}: it is {found[0]}", hint=found[1])


def check_gguf(path: str, metadata: dict[str, Any], tensors: Collection[str]) -> None:
    """Raise `UnsupportedError` for a valid GGUF file that holds no language model."""
    kind, architecture = metadata.get("general.type"), metadata.get("general.architecture")
    found = None
    if kind == "adapter" or any(name.endswith((".lora_a", ".lora_b")) for name in tensors):
        found = "a LoRA adapter, not a model", "merge it into its base model (llama-export-lora), and run that"
    elif kind == "imatrix" or any(name.endswith(".in_sum2") for name in tensors):
        found = "an importance matrix, with which models are quantised", "name the model itself"
    elif kind == "mmproj" or architecture == "clip":
        found = "a projector (mmproj) for images or sound", "name the language model that it belongs to"
    elif architecture == "controlvector":
        found = "a control vector, not a model", "name the model that it is for"
    elif not tensors and (kind == "vocab" or "tokenizer.ggml.tokens" in metadata):
        found = "a vocabulary without weights", "get a file of the same model that holds tensors"
    if found is not None:
        raise UnsupportedError(f"{path} is {found[0]}", hint=found[1])


# (pattern of a file's name, format, hint)
_NAMES: tuple[tuple[str, str, str], ...] = (
    (r"adapter_config\.json|adapter_model\..*", "an adapter (LoRA), not a model", "merge it into its base model and save that"),
    (r"model_index\.json", "a pipeline of the diffusers library, which makes no text", "name a language model"),
    (r"consolidated.*\.safetensors", "in Mistral's own format", "get the model.safetensors files of the same model"),
    (r"pytorch_model.*\.bin|.*\.pth?|.*\.ckpt", "pickled, which can run code when read", _OTHER_FORMAT),
    (r".*\.onnx(_data)?", "in the format ONNX", _OTHER_FORMAT),
    (r"tf_model.*\.h5|.*\.h5", "in TensorFlow's format", _OTHER_FORMAT),
    (r"flax_model.*\.msgpack", "in Flax's format", _OTHER_FORMAT),
)  # fmt: skip


def foreign_name(name: str) -> tuple[str, str] | None:
    """(format, hint) of a file by its name if its format is unsupported; else None."""
    return next(((what, hint) for pattern, what, hint in _NAMES if re.fullmatch(pattern, name, re.DOTALL)), None)


def check_names(folder: str, names: Iterable[str]) -> None:
    """Raise if a folder's file names show an unsupported format, or GGUF files."""
    found = sorted(names)
    packed = [name for name in found if name.endswith(".gguf")]
    if packed:
        raise CheckpointError(
            f"{folder} is a folder of {len(packed)} GGUF files", hint=f"name the .gguf file in it: {packed[0]}"
        )
    foreign = [(name, one) for name in found if (one := foreign_name(name)) is not None]
    for name, (what, hint) in sorted(foreign, key=lambda pair: [row[1] for row in _NAMES].index(pair[1][0])):
        raise UnsupportedError(f"{folder}/{name} is {what}", hint=hint)
