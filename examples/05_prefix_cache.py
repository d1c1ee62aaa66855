"""Prompts that begin alike are read once: the state after a prefix is found again by what its tokens are."""

import argparse
import tempfile

import mambakit
from mambakit.assets import default_model_path
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Stream

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model)
model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()

story = "The captain had sailed for forty years, and he had never seen such a storm. " * 40
questions = ("He turned to the mate and said:", "The mate answered:", "That night he wrote in his book:")

with tempfile.TemporaryDirectory() as folder:
    for round in ("first", "second"):  # the second time from the files, as another process would find them
        cache = PrefixCache(model, folder=folder, chunk_size=128)
        for question in questions:
            before = cache.statistics.tokens_saved
            ids = tokenizer(story + question, return_tensors="pt").input_ids[0]
            state = cache.read(ids)
            stream = Stream(model, tokenizer, **state.prompt(), sampling=SamplingParams(seed=1), max_new_tokens=12)
            text = "".join(stream).replace("\n", " ")
            print(f"{round}: {cache.statistics.tokens_saved - before:4d} of {len(ids)} tokens known | {question}{text}")
