"""Many logs at once: each a stream with a state of its own, scored as chunks of them come, saved and resumed."""

import argparse
import tempfile
from pathlib import Path

import mambakit
from mambakit.assets import default_model_path
from mambakit.generation.quantile import RunningQuantile
from mambakit.generation.stream_scorer import StreamScorer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default=default_model_path())
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained(arguments.model)
model = mambakit.AutoModelForCausalLM.from_pretrained(arguments.model, dtype="float32").eval()
scorer = StreamScorer(model, tokenizer)

machines = [f"machine {i}" for i in range(20)]
usual = RunningQuantile(0.98, window=100)
with tempfile.TemporaryDirectory() as folder:
    for minute in range(8):
        lines = {name: ["He walked to the gate, and the gate was shut.\n"] for name in machines}
        if minute == 6:
            lines["machine 13"].append("smoke came out of the roof and the people ran.\n")
        threshold = usual.value  # of the minutes before
        for name, scores in scorer.score_lines(lines).items():  # all streams in one forward
            for score in scores:
                usual.add(score.nats_per_token)
                if threshold is not None and score.nats_per_token > threshold:
                    print(f"minute {minute}, {name}: {score.nats_per_token:.2f} nats per token | {score.text.rstrip()}")
        scorer.save(Path(folder) / "streams")  # after a restart, the streams go on as if nothing had happened
        scorer = StreamScorer.load(Path(folder) / "streams", model, tokenizer)
print(f"{len(scorer)} streams, {scorer.tokens('machine 13')} tokens of machine 13")
