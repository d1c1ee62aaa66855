"""A prompt of any length in constant memory: it is read in chunks, and only the state is kept."""

import argparse
import resource

import torch

import mambakit
from mambakit.assets import default_model_path

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
parser.add_argument("--tokens", type=int, default=20_000)
arguments = parser.parse_args()

model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()


def peak_megabytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


for length in (arguments.tokens // 10, arguments.tokens):
    prompt = torch.randint(1, model.config.vocab_size, (1, length))
    model.generate(prompt, max_new_tokens=5, do_sample=False, prefill_chunk_size=512)
    print(f"a prompt of {length:,} tokens: peak memory so far {peak_megabytes():,.0f} MB")
