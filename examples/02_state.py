"""The state is two tensors: read a prompt once, fork it, save it, go on from the file."""

import argparse
import tempfile
from pathlib import Path

import torch

import mambakit
from mambakit.assets import default_model_path

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model)
model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()

prompt = tokenizer("The captain opened the letter and read:", return_tensors="pt").input_ids
with torch.no_grad():
    state = model(prompt[:, :-1], use_cache=True).cache_params  # all but the last token, which generate() reads
print(f"read {state.get_seq_length()} tokens into {state.nbytes / 1024:.0f} KiB; a million would take as much\n")

# Three continuations; the prompt is not read again.
forks = state.select([0, 0, 0])
texts = model.generate(prompt[:, -1:].repeat(3, 1), cache_params=forks, max_new_tokens=25, do_sample=True, seed=1)
for text in texts:
    print("-", tokenizer.decode(text).replace("\n", " "))

# The same, from a file.
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "letter.safetensors"
    state.save(path)
    loaded = mambakit.MambaCache.load(path, model.config)
again = model.generate(
    prompt[:, -1:].repeat(3, 1), cache_params=loaded.select([0, 0, 0]), max_new_tokens=25, do_sample=True, seed=1
)
print("\nfrom the file:", "the same" if torch.equal(again, texts) else "different")
