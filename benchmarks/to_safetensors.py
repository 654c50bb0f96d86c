"""A Hugging Face folder in bf16 from a GGUF of a real model: config, sharded safetensors, tokenizer, generation config.

    python benchmarks/to_safetensors.py qwen2.5-coder-1.5b-instruct-q4_k_m.gguf OUT      # 3.1 GB

The weights are those of the GGUF, dequantised and rounded to bf16: as large as the original and nearly as good, which suffices
to compare engines. Nothing is fetched: the config comes from the file's own metadata.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig, PreTrainedModel

SAME_MATRIX = 0.95  # cosine of two roundings of one matrix; of two matrices it is near 0
ENDS = ("<|im_end|>", "<|endoftext|>")  # an instruct model may end a turn or the document


def convert(gguf: Path, out: Path) -> None:
    """Write the folder; every tensor is in memory once, in bf16."""
    source, file = str(gguf.parent), gguf.name
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=file, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tie(model)
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[end] for end in ENDS if end in vocabulary] or [tokenizer.eos_token_id]
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[-1], do_sample=False)
    model.save_pretrained(out, max_shard_size="1GB")
    tokenizer.save_pretrained(out)


def tie(model: PreTrainedModel) -> None:
    """Tie embedding and head again if the GGUF has both, as llama.cpp writes tied models; the head's copy is finer."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    rows = slice(0, 4096)
    cosine = torch.cosine_similarity(
        embedding.weight[rows].float().flatten(), head.weight[rows].float().flatten(), dim=0
    )
    if cosine > SAME_MATRIX:
        vocabulary, hidden = head.weight.shape
        model.set_input_embeddings(torch.nn.Embedding(vocabulary, hidden, _weight=head.weight.detach()))
        model.config.tie_word_embeddings = True
        model.tie_weights()


def answer(folder: Path, prompt: str, tokens: int) -> str:
    """Greedy output of the folder, as proof that it is complete."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("gguf", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", default="Write a Python function that reverses a string.")
    arguments = parser.parse_args()
    convert(arguments.gguf, arguments.out)
    print(answer(arguments.out, arguments.prompt, 48))
