"""Learn a state, and nothing else: the model begins as if it had read what it was tuned to. No weight changes."""

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console

import mambakit
from mambakit.assets import default_model_path
from mambakit.generation.state import State
from mambakit.training.config import TrainConfig
from mambakit.training.loop import train

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=str(default_model_path()))
parser.add_argument("--file", help="documents, with a blank line between them (default: some letters)")
parser.add_argument("--steps", type=int, default=40)
arguments = parser.parse_args()

openings = ("Dear Sir,", "Dear Madam,", "My dear Mr. Brown,", "My dear Jane,", "Dear Mrs. Hall,")
bodies = ("I have received your letter of", "I beg to thank you for yours of", "I write in answer to your note of")
days = ("Monday last", "the 3rd of May", "the 14th", "this morning", "Friday", "the 20th of June")
letters = [
    f"{opening}\n{body} {day}.\nI remain yours truly," for opening in openings for body in bodies for day in days
]

with tempfile.TemporaryDirectory() as folder:
    file = Path(arguments.file or Path(folder) / "letters.txt")
    if not arguments.file:
        file.write_text("\n\n".join(letters))
    config = TrainConfig(
        init_from=arguments.model, tune="state", train_files=[str(file)], separator="\n\n", validation_fraction=0.1,
        respect_documents=True, sequence_length=128, batch_size=4, steps=arguments.steps, learning_rate=3e-2,
        checkpoint_every=0, log_every=10, cuda_graph=False, out=f"{folder}/run",
    )  # fmt: skip
    summary = train(config, Console(stderr=True), Console(quiet=True))
    bits = summary["heldout_bits_per_character"], summary["heldout_bits_per_character_without_state"]
    print(f"held out: {bits[0]:.2f} bits per character from the tuned state, {bits[1]:.2f} from zeros")

    model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model)
    tuned = State.load(summary["state"], model)

start = torch.full((1, 1), tokenizer.eos_token_id)
for name, inputs in (("zeros", {"input_ids": start}), ("the tuned state", tuned.inputs())):
    text = model.generate(**inputs, max_new_tokens=25, do_sample=True, temperature=0.7, seed=0)[0]
    print(f"from {name}: {tokenizer.decode(text, skip_special_tokens=True)!r}")
