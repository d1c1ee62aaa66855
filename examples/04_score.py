"""How likely does the model find a text? Bits per character, and the tokens that surprised it most."""

import argparse

import mambakit
from mambakit.assets import default_model_path
from mambakit.generation.score import score_text

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model)
model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
text = "He took off his hat and bowed to the lady, who smiled and gave him her helicopter."
score = score_text(model, tokenizer, text, per_token=True)
print(f"{score.bits_per_character:.2f} bits per character, perplexity {score.perplexity:.1f} per token")
ids = tokenizer(text).input_ids
for log_prob, token in sorted(zip(score.log_probs, ids, strict=True))[:5]:
    print(f"{log_prob:7.2f} nats  {tokenizer.decode([token])!r}")
