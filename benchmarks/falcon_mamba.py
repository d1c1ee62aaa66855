"""FalconMamba beside plain Mamba of the same shape: a step and prompts, on one NVIDIA GPU or on a CPU.

    python benchmarks/falcon_mamba.py --json out.json                 # the 7B shape on a GPU, bfloat16, int8 and int4
    python benchmarks/falcon_mamba.py --device cpu --shape 130m --rows 1 4
    python benchmarks/falcon_mamba.py --device cpu --shape 7b --formats int4 --rows 1 --prompts --llama    # Q4_0, too

Random weights: one layer's, copied into memory of its own for every layer, so that 7B models are made in seconds. Each
figure names the decoder that the registry chooses. On a GPU it is the median of `--rounds` calls. On a CPU the
contenders are timed in turn in every round and the smallest time counts, since other work only adds to it; the forward
of FalconMamba, which served before there was a step for it, is timed there, too. Nothing is timed before its logits are
near the forward's. llama.cpp (llama-cpp-python, gguf) has the same weights in its own format and its defaults. The 7B
shape in int4 takes about 5 GiB a model; `--families FalconMamba` leaves plain Mamba out.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.decoding.prefill import prefill
from mambakit.decoding.registry import ForwardDecoder, choose, kept_decoder, token_step

SHAPES = {"tiny": (64, 2, 512), "130m": (768, 24, 50280), "1.4b": (2048, 48, 50280), "7b": (4096, 64, 65024)}
FAMILIES = {
    "FalconMamba": (mambakit.FalconMambaConfig, mambakit.FalconMambaForCausalLM),
    "Mamba": (mambakit.MambaConfig, mambakit.MambaForCausalLM),
}
FORMATS = {"cuda": ("bfloat16", "int8", "int4"), "cpu": ("float32", "bfloat16", "int8", "int4")}
# Of logits to the forward's: rounding of activations, and on a CPU of the inputs of integer products.
BOUND = {"float32": 1e-4, "bfloat16": 2e-2, "int8": 2e-2, "int4": 2e-2}


def one_layer(family: str, shape: str, device: str) -> Any:
    """A model of the shape with a single layer, float32."""
    width, _, vocabulary = SHAPES[shape]
    config, kind = FAMILIES[family]
    torch.manual_seed(0)
    with torch.device(device):
        return kind(config(vocab_size=vocabulary, hidden_size=width, num_hidden_layers=1)).eval()


def repeated(one: Any, format: str, layers: int, shared: bool = False) -> Any:
    """The model with so many layers, each a copy; ``shared``: all of them the one layer itself."""
    if format != "float32":
        one = one.to(torch.bfloat16)
    if format.startswith("int"):
        one.quantize(format)
    first = one.backbone.layers[0]
    blocks = [first, *(first if shared else copy.deepcopy(first) for _ in range(layers - 1))]
    if not shared:
        for i, block in enumerate(blocks):
            block.layer_idx = block.mixer.layer_idx = i
    one.backbone.layers = nn.ModuleList(blocks)
    one.config.num_hidden_layers = layers
    one.generation_config.eos_token_id, one.generation_config.pad_token_id = None, 0
    return one


def check(model: Any, format: str, step: Callable[[torch.Tensor], torch.Tensor], rows: int) -> None:
    """The step's logits from an empty state are near the forward's."""
    tokens = torch.randint(0, model.config.vocab_size, (rows,), device=model.device)
    expected = model(tokens[:, None], cache_params=model.backbone.new_cache(rows)).logits[:, -1].float()
    found = step(tokens).float()
    error = float((found - expected).norm() / expected.norm())
    assert error < BOUND[format], f"{format}, {rows} rows: logits differ by {error:.1e}: nothing is timed"


def on_gpu(call: Callable[[], object], rounds: int) -> float:
    """Seconds: the median of calls between CUDA events."""
    times = []
    for i in range(rounds + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        if i >= 2:
            times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def in_turn(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds: the smallest of the rounds, in each of which every contender runs once, each time another one first."""
    best, names = dict.fromkeys(contenders, float("inf")), list(contenders)
    for i in range(rounds + 1):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            call = contenders[name]
            begin = time.perf_counter()
            call()
            if i > 0:  # the first round warms up
                best[name] = min(best[name], time.perf_counter() - begin)
    return best


def stepper(model: Any, format: str, rows: int) -> Callable[[], object]:
    if model.device.type == "cuda":
        step = token_step(model, model.backbone.new_cache(rows))
        check(model, format, step, rows)
        return kept_decoder(model, rows)
    step, token = token_step(model, model.backbone.new_cache(rows)), torch.zeros(rows, dtype=torch.int64)
    check(model, format, step, rows)
    return lambda: step(token)


def reader(model: Any, rows: int, length: int) -> Callable[[], object]:
    """Reads prompts as `generate` does."""
    ids = torch.randint(0, model.config.vocab_size, (rows, length), device=model.device)
    return lambda: prefill(model, ids, model.backbone.new_cache(rows))


def llama_step(options: argparse.Namespace, format: str) -> Callable[[], object]:
    """One token by llama.cpp, of the same weights."""
    from benchmarks.cpu import LLAMA_FORMATS, Llama, write_gguf

    model = repeated(one_layer("FalconMamba", options.shape, "cpu"), "float32", SHAPES[options.shape][1], shared=True)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write_gguf(model, path, LLAMA_FORMATS[format])
        del model
        context = Llama(path, options.threads, 64)
    return lambda: context.feed([7])


def measure(options: argparse.Namespace, format: str, found: list[dict[str, object]]) -> None:
    """Steps and prompts of one format, added to what is found; the record is written after each."""
    layers = SHAPES[options.shape][1]
    models = {f: repeated(one_layer(f, options.shape, options.device), format, layers) for f in options.families}

    def note(what: str, rows: int, seconds: dict[str, float], decoders: dict[str, str]) -> None:
        text = ", ".join(f"{who} {t * 1e3:.3f} ms" for who, t in seconds.items())
        if len(options.families) > 1:
            text += f"; FalconMamba / Mamba {seconds['FalconMamba'] / seconds['Mamba']:.2f}"
        by = " and ".join(sorted(set(decoders.values())))
        print(f"{options.shape} {format:>8} {what:>16}: {text}  [{by}]", flush=True)
        for who, t in seconds.items():
            found.append(
                {
                    "shape": options.shape, "format": format, "what": what, "rows": rows, "who": who, "seconds": t,
                    "decoder": decoders.get(who, ""),
                }
            )  # fmt: skip
        record.write(options.json, {"falcon": found}, gpus=int(options.device == "cuda"))

    for rows in options.rows:
        decoders = {family: choose(model, rows).name for family, model in models.items()}
        calls = {family: stepper(model, format, rows) for family, model in models.items()}
        if options.device == "cuda":
            seconds = {family: on_gpu(call, options.rounds) for family, call in calls.items()}
        else:
            token, (first, model) = torch.zeros(rows, dtype=torch.int64), next(iter(models.items()))
            forward = ForwardDecoder(model, model.backbone.new_cache(rows))
            calls[f"{first}'s forward"] = lambda f=forward, t=token: f.step(t)
            if options.llama and rows == 1:
                calls["llama.cpp, FalconMamba"] = llama_step(options, format)
            seconds = in_turn(calls, options.rounds)
        note(f"step x {rows}", rows, seconds, decoders)
    for prompt in options.prompts:
        rows, length = map(int, prompt.split("x"))
        calls = {family: reader(model, rows, length) for family, model in models.items()}
        if options.device == "cuda":
            seconds = {family: on_gpu(call, max(3, options.rounds // 4)) for family, call in calls.items()}
        else:
            seconds = in_turn(calls, max(2, options.rounds // 4))
        note(f"prompt {prompt}", rows, seconds, {})


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--formats", nargs="+", choices=FORMATS["cpu"])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 32, 64], help="texts of a step; on a CPU 1 to 16")
    parser.add_argument("--prompts", nargs="*", default=["4x2048", "1x512"], metavar="ROWSxTOKENS")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2, help="of a CPU")
    parser.add_argument("--llama", action="store_true", help="on a CPU: a step of llama.cpp's, too")
    record.add_argument(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no NVIDIA GPU is here: --device cpu compares the steps of the native library")
    torch.set_num_threads(options.threads)
    results: list[dict[str, object]] = []
    for format in options.formats or FORMATS[options.device]:
        measure(options, format, results)


if __name__ == "__main__":
    main()
