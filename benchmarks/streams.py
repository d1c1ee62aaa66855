"""Many streams scored at once: `StreamScorer` beside one packed prefill of as many tokens.

    python benchmarks/streams.py --device cuda --json out.json                 # a GPU, 130m in bfloat16
    python benchmarks/streams.py --device cpu --threads 2 --embedded --json out.json

Each of ``--streams`` streams gets a chunk of ``--tokens`` tokens in one call, from the state that its earlier chunks
left. Beside it, in turn, over the same tokens:

    packed prefill    all chunks packed without padding, from zero states, states kept, no logits
    packed scoring    the same, and -ln p of every token: the same work without slots, selection of states, and copies

Nothing is timed before the surprises of some streams equal those of one forward over the whole stream.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.assets import default_model_path
from mambakit.decoding.chunks import chunk_sizes
from mambakit.decoding.prefill import hidden_states, prefill_states
from mambakit.generation.stream_scorer import StreamScorer
from mambakit.generation.token_scores import groups, surprise

SHAPE_130M = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 24}


def make_model(embedded: bool, device: torch.device) -> Any:
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    if embedded:
        return mambakit.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=dtype).to(device).eval()
    torch.manual_seed(0)
    return mambakit.MambaForCausalLM(mambakit.MambaConfig(**SHAPE_130M)).to(device, dtype).eval()


@torch.no_grad()
def require_exact(model: Any) -> None:
    """The surprises are those of whole streams; in half precision up to its rounding."""
    ids = torch.randint(1, model.config.vocab_size, (3, 96))
    scorer = StreamScorer(model, first_token=0)
    cuts = (ids[:, :33], ids[:, 33:34], ids[:, 34:])
    found = [scorer.score_tokens({str(i): row for i, row in enumerate(part)}) for part in cuts]
    for i, row in enumerate(ids):
        inputs = torch.cat([torch.zeros(1, dtype=torch.int64), row[:-1]])[None].to(model.device)
        whole = -model(inputs).logits[0].log_softmax(-1).cpu().gather(1, row[:, None])[:, 0]
        # Random tokens surprise by 15 nats; bfloat16 rounds each layer's output to 8 bits.
        rtol, atol = (1e-4, 1e-5) if model.dtype == torch.float32 else (0.02, 0.1)
        torch.testing.assert_close(torch.cat([part[str(i)] for part in found]), whole, rtol=rtol, atol=atol)


def contenders(model: Any, streams: int, tokens: int) -> dict[str, Callable[[], object]]:
    ids = torch.randint(1, model.config.vocab_size, (streams, tokens))
    names = [str(i) for i in range(streams)]
    scorer = StreamScorer(model, first_token=0)
    rows = list(ids.to(model.device))
    size = chunk_sizes(model.device).batch

    @torch.no_grad()
    def packed(score: bool) -> None:
        found = []
        for group in groups(rows, [tokens] * streams, size):
            cache = model.backbone.new_cache(len(group))
            if not score:
                prefill_states(model, group, cache)
                continue
            (hidden,) = hidden_states(model, group, cache, chunk_size=size)
            found.append(surprise(model, torch.cat(hidden), torch.cat(group)))
        if found:
            torch.cat(found).cpu()
        if model.device.type == "cuda":
            torch.cuda.synchronize()

    return {
        "StreamScorer": lambda: scorer.score_tokens(dict(zip(names, ids, strict=True))),
        "packed scoring": lambda: packed(True),
        "packed prefill": lambda: packed(False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=256, help="of each stream's chunk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of a CPU")
    parser.add_argument(
        "--embedded", action="store_true", help="the embedded model; else random weights of the 130m shape"
    )
    record.add_argument(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --device cpu measures the CPU")
    if options.threads:
        torch.set_num_threads(options.threads)
    model = make_model(options.embedded, torch.device(options.device))
    require_exact(model)
    ways = contenders(model, options.streams, options.tokens)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(options.rounds + 1):
        for name, run in ways.items():
            began = time.perf_counter()
            run()
            if number:  # the first round warms up
                times[name].append(time.perf_counter() - began)
    total = options.streams * options.tokens
    rows = [
        {
            "what": name, "streams": options.streams, "tokens": options.tokens,
            "tokens_per_second": round(total / statistics.median(found)),
        }
        for name, found in times.items()
    ]  # fmt: skip
    for row in rows:
        share = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        print(f"{row['what']:16} {row['tokens_per_second']:>12,} tokens/s  {share:6.2f} of StreamScorer's")
    model_name = "the embedded model" if options.embedded else "130m, random weights"
    record.write(
        options.json, {"streams": rows}, gpus=int(options.device == "cuda"), notes=f"{model_name}, {model.dtype}"
    )


if __name__ == "__main__":
    main()
