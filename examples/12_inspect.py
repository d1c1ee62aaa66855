"""What a model does with a text: which tokens surprise it, which layers open for which, what is read of the past."""

import argparse

import mambakit
from mambakit.assets import default_model_path
from mambakit.inspection import inspect

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model)
model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
text = (
    "Mr. Darcy looked at the sea. The rain fell, and the wind swept up the streets. Then Mr. Darcy said: 'I shall go.'"
)
found = inspect(model, tokenizer, text)

unusual = found.step / found.step.median(1, keepdim=True).values  # (layers, l)
print("token        surprise   the layer that opens widest, beside its median step")
for i, piece in enumerate(found.pieces[1:], 1):
    layer = int(unusual[:, i].argmax())
    print(f"{piece!r:12} {found.surprise[i]:8.2f}   layer {layer:2d}, {unusual[layer, i]:.1f} times")

last = max(found.layers)
reads = found.layers[last].shares()[-1]  # of the last token
top = reads.argsort(descending=True)[:4].tolist()
print(f"\nlayer {last} at the last token reads", ", ".join(f"{found.pieces[i]!r} {reads[i]:.0%}" for i in top))
median, longest = found.half_life[last].median(), found.half_life[last].max()
print(f"half of its states forget half of what they hold within {median:.0f} tokens; the slowest within {longest:,.0f}")
