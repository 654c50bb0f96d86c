"""Which GGUF architectures run, and why the others do not. Read by `plan`, so without transformers.

A test holds this list against transformers' own GGUF mapping.
"""

from headrace.errors import UnsupportedError, did_you_mean

SUPPORTED = (
    "bloom",
    "falcon",
    "gemma2",
    "gemma3",
    "gpt-oss",
    "gpt2",
    "lfm2",
    "llama",
    "mamba",
    "minimax-m2",
    "nemotron",
    "phi3",
    "qwen2",
    "qwen2moe",
    "qwen3",
    "qwen3moe",
    "stablelm",
    "starcoder2",
    "t5",
)

NOT_YET = {
    "deci": "its layers differ from each other, which is not supported yet",
    "gemma4": "its layers share keys and values; as a folder it runs",
    "mistral": "converters write Mistral's models as llama, so another tool made this file",
    "qwen35": "files hold the value heads of its linear attention in another order, by columns too; as a folder it runs",
    "qwen35moe": "files hold the value heads of its linear attention in another order, by columns too; as a folder it runs",
    "t5encoder": "encoders do not generate text",
    "umt5": "converters write UMT5 models as t5, so another tool made this file",
}


def check_architecture(name: str, path: str) -> None:
    """Raise `UnsupportedError` unless a model of this architecture can run."""
    if name in NOT_YET:
        raise UnsupportedError(f"{path} is a {name} model: {NOT_YET[name]}", hint=f"supported: {', '.join(SUPPORTED)}")
    if name not in SUPPORTED:
        raise UnsupportedError(f"{path} has the unknown architecture `{name}`", hint=did_you_mean(name, SUPPORTED))
