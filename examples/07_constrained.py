"""Output that must have a form: a JSON schema, a regular expression, a grammar. Needs llguidance
(mambakit[constrain])."""

import argparse
import json

import mambakit
from mambakit.assets import default_model_path
from mambakit.decoding.sampling_params import SamplingParams
from mambakit.generation.constrain import Constraint
from mambakit.generation.stream import Stream

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model, padding_side="left")
model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()

# One text, as a stream.
schema = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 20},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "at_sea": {"type": "boolean"},
    },
    "required": ["name", "age", "at_sea"],
    "additionalProperties": False,
}
constraint = Constraint(model, tokenizer, json_schema=schema)
ids = tokenizer("The captain, in his own words: ", return_tensors="pt").input_ids[0]
stream = Stream(model, tokenizer, ids, constraint.sampling(SamplingParams(seed=3)), max_new_tokens=80)
print("a JSON text:", json.loads("".join(stream)))

# A batch, with generate(): every row follows the grammar by itself.
date = Constraint(model, tokenizer, regex=r"(January|May|October) ([1-9]|[12][0-9]), 1[78][0-9]{2}")
prompts = ["The ship left the harbour on", "He was born on", "The letter was dated"]
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
out = model.generate(**inputs, max_new_tokens=24, logits_processor=[date.processor()], do_sample=True, seed=1)
for prompt, row in zip(prompts, out[:, inputs.input_ids.shape[1] :], strict=True):
    print(prompt, tokenizer.decode(row, skip_special_tokens=True))
