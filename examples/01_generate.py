"""Write text with the model that ships with mambakit, or with --model."""

import argparse

import mambakit

parser = argparse.ArgumentParser()
parser.add_argument("--model")
arguments = parser.parse_args()

pipe = mambakit.pipeline("text-generation", model=arguments.model)
for prompt in ("It was a dark and stormy night", "The old man looked at the sea and"):
    out = pipe(prompt, max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95)
    print(out[0]["generated_text"], end="\n\n")
