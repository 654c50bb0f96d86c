"""Supported GGUF architectures, and why others do not run. `plan` reads this without importing transformers.

A test compares this list with transformers' own GGUF mapping.
"""

from headrace.errors import UnsupportedError, did_you_mean

SUPPORTED = (
    "afmoe",
    "arcee",
    "bloom",
    "cohere2",
    "command-r",
    "deepseek2",
    "dots1",
    "ernie4_5",
    "ernie4_5-moe",
    "exaone-moe",
    "exaone4",
    "falcon",
    "gemma",
    "gemma2",
    "gemma3",
    "gemma4",
    "glm-dsa",
    "glm4",
    "glm4moe",
    "gpt-oss",
    "gpt2",
    "granite",
    "granitehybrid",
    "granitemoe",
    "hunyuan-dense",
    "hunyuan-moe",
    "lfm2",
    "lfm2moe",
    "llama",
    "llama4",
    "mamba",
    "minimax-m2",
    "mistral3",
    "nemotron",
    "nemotron_h",
    "nemotron_h_moe",
    "olmo2",
    "olmoe",
    "phi3",
    "phimoe",
    "qwen2",
    "qwen2moe",
    "qwen2vl",
    "qwen3",
    "qwen35",
    "qwen35moe",
    "qwen3moe",
    "qwen3next",
    "qwen3vl",
    "qwen3vlmoe",
    "seed_oss",
    "smollm3",
    "stablelm",
    "starcoder2",
    "t5",
)

NOT_YET = {
    "deci": "transformers has no such model, and runs it by code that comes with the model",
    "mistral": "converters write Mistral's models as llama, so another tool made this file",
    "t5encoder": "encoders do not generate text",
    "umt5": "converters write UMT5 models as t5, so another tool made this file",
}


_NO_LANGUAGE_MODELS = {
    "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 neo-bert modern-bert eurobert gemma-embedding": (
        "an encoder, for embeddings; it does not generate text"
    ),
    "flux sd1 sdxl sd3 aura hidream cosmos ltxv hyvid wan lumina2 qwen_image pig": (
        "it makes images or videos, and is not a language model"
    ),
}


def check_architecture(name: str, path: str) -> None:
    """Raise `UnsupportedError` unless a model of this architecture can run."""
    for names, why in _NO_LANGUAGE_MODELS.items():
        if name in names.split():
            raise UnsupportedError(f"{path} is a {name} model: {why}", hint="name a model that generates text")
    if name in NOT_YET:
        raise UnsupportedError(f"{path} is a {name} model: {NOT_YET[name]}", hint=f"supported: {', '.join(SUPPORTED)}")
    if name not in SUPPORTED:
        raise UnsupportedError(f"{path} has the unknown architecture `{name}`", hint=did_you_mean(name, SUPPORTED))
