"""Speculative decoding: a small model guesses, the large one verifies several guesses at once; the text is the same."""

import argparse

import mambakit
from mambakit.assets import default_model_path
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.generation.drafters import DraftModel, PromptLookup
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.stream import Stream

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
parser.add_argument("--draft-model", help="a smaller model of the same vocabulary; else the model's own int4 weights")
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model)
load = mambakit.AutoModelForCausalLM.from_pretrained
model = load(arguments.model, dtype="float32").eval()
draft = load(arguments.draft_model or arguments.model, dtype="float32").eval()
if arguments.draft_model is None:
    draft.quantize("int4")

ids = tokenizer("The old man looked at the sea and", return_tensors="pt").input_ids[0]
greedy = SamplingParams(temperature=0)
plain = Stream(model, tokenizer, ids, greedy, max_new_tokens=60)
text = "".join(plain)
print(text.replace("\n", " "), "\n")
for name, drafter in (("a draft model", DraftModel(draft)), ("prompt lookup", PromptLookup())):
    stream = SpeculativeStream(model, tokenizer, ids, greedy, max_new_tokens=60, drafter=drafter)
    same = "the same text" if "".join(stream) == text else "another text"
    print(
        f"{name}: {same}; {stream.accepted} of {stream.proposed} guesses right, "
        f"{stream.rounds} passes over the weights for {len(stream.tokens)} tokens"
    )
