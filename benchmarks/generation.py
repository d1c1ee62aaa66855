"""Generation beside a Transformer of the same size: tokens/s by batch, time by length, memory, share of the bandwidth.

    python benchmarks/generation.py --json out.json --plots docs/images   # 130m, 1.4b and 2.8b on one NVIDIA GPU
    python benchmarks/generation.py --shapes 130m --parts step generate      # less
    python benchmarks/generation.py --device cpu --shapes tiny --lengths 7 9 # a look at the script itself, on a CPU

Random weights and tokens, greedy. The Transformer is transformers' Llama of as many parameters, run by `generate` with
its default cache (flash attention through SDPA) and, with --compiled, a static cache and torch.compile. Parts:

    prefill    a forward of 8 prompts of --prompt tokens, to the last token's logits, eager
    step       one token for each row, embedding to chosen token: median of steps, and the share of the bandwidth that
               reading weights and states once would take (measured in the run: a copy, counted both ways)
    generate   prompt and new tokens, prompt included in the time; third call; peak memory
    length     reading a prompt of 2^i tokens, one row
    long       a prompt of 2,048 and of --long-prompt tokens: peak memory, and the step after it
    context    new tokens a second by the length of the prompt, each model at its best batch (benchmarks/context.py)
    engine     --rows texts of --engine-prompt tokens and --new new ones, greedy and sampled: `Engine` beside `generate`

Nothing is timed before a small model's steps agree with its forward on this device. One GPU: CUDA events around whole
calls.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record as records
from mambakit.decoding.prefill import prefill
from mambakit.decoding.registry import kept_decoder, token_step
from mambakit.generation.engine import Engine, Request
from mambakit.generation.stream import Sampling

VOCABULARY = 50280
# Mamba's width and layers; Llama's width, layers, heads and inner width.
SHAPES = {
    "tiny": ((64, 2), (64, 2, 4, 176)),
    "130m": ((768, 24), (768, 12, 12, 2048)),
    "1.4b": ((2048, 48), (2048, 24, 16, 5504)),
    "2.8b": ((2560, 64), (2560, 32, 20, 6912)),
    "7b": ((4096, 64), (4096, 32, 32, 11008)),
}
Options = argparse.Namespace


def mamba(shape: str, device: str):
    width, layers = SHAPES[shape][0]
    torch.manual_seed(0)
    with torch.device(device):
        model = mambakit.MambaForCausalLM(mambakit.MambaConfig(hidden_size=width, num_hidden_layers=layers))
    return ready(model, device)


def llama(shape: str, device: str, longest: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, heads, inner = SHAPES[shape][1]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
        intermediate_size=inner, max_position_embeddings=longest, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(device):
        model = LlamaForCausalLM(config)
    return ready(model, device)


def ready(model, device: str):
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.to(torch.bfloat16 if device == "cuda" else torch.float32).eval()


class Clock:
    def __init__(self, device: str):
        self.cuda = device == "cuda"

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of one call."""
        if not self.cuda:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3

    def median(self, run: Callable[[], object], rounds: int) -> float:
        run()
        return statistics.median(self(run) for _ in range(rounds))

    def peak(self, run: Callable[[], object]) -> tuple[float, float | None]:
        """(seconds, GiB at most while it ran)."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        seconds = self(run)
        return seconds, torch.cuda.max_memory_allocated() / 2**30 if self.cuda else None


def released() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def fits(run: Callable[[], object]) -> object:
    """The result, or None where memory ran out."""
    try:
        return run()
    except torch.cuda.OutOfMemoryError:
        return None
    finally:
        released()


def check(device: str) -> None:
    model = mamba("tiny", device)
    ids = torch.randint(0, VOCABULARY, (3, 40), device=device)
    with torch.no_grad():
        out = model.generate(ids, max_new_tokens=12, do_sample=False)
        logits = model(out[:, :-1]).logits[:, 39:]
    gap = logits.max(-1).values - logits.gather(-1, out[:, 40:, None])[..., 0]
    assert gap.max() < (0.05 if device == "cuda" else 1e-3), (
        f"tokens are {gap.max():.3f} from the best: nothing is timed"
    )


def bandwidth(clock: Clock, device: str) -> float:
    """Bytes a second of a copy, reading and writing counted."""
    source = torch.ones(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / clock.median(lambda: target.copy_(source), 10)


def step_seconds(model, rows: int, clock: Clock, rounds: int) -> float:
    if model.device.type == "cuda":
        return clock.median(kept_decoder(model, rows), rounds)
    step = token_step(model, model.backbone.new_cache(rows))
    token = torch.zeros(rows, dtype=torch.int64)
    return clock.median(lambda: step(token), rounds)


def measure_steps(options: Options, clock: Clock, record: dict) -> None:
    speed = record["bandwidth"]
    print(
        f"\nstep: bandwidth {speed / 1e9:,.0f} GB/s\n{'shape':6} {'format':>6} {'batch':>5} {'ms':>8} {'tokens/s':>10} "
        f"{'share':>6}"
    )
    for shape in options.shapes:
        for format in options.formats:
            model = mamba(shape, options.device)
            if format != "plain":
                model.quantize(format)
            # Tied embeddings are the head; packed, there is a head of its own. States are read and written.
            weights = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
            if format != "plain":
                weights -= model.backbone.embeddings.weight.nbytes
            for rows in options.batches:
                seconds = fits(lambda m=model, b=rows: step_seconds(m, b, clock, options.rounds))
                if seconds is None:
                    print(f"{shape:6} {format:>6} {rows:>5} out of memory")
                    continue
                cache = model.backbone.new_cache(rows)
                touched = weights + 2 * cache.nbytes
                share = touched / speed / seconds
                print(
                    f"{shape:6} {format:>6} {rows:>5} {seconds * 1e3:8.3f} {rows / seconds:10,.0f} {share:6.0%}",
                    flush=True,
                )
                record["step"].append(
                    {"shape": shape, "format": format, "batch": rows, "seconds": seconds, "share": share}
                )
            del model
            released()


def measure_prefill(options: Options, clock: Clock, record: dict) -> None:
    print(f"\nprefill: 8 x {options.prompt}\n{'shape':6} {'ms':>8} {'tokens/s':>10}")
    for shape in options.shapes:
        model = mamba(shape, options.device)
        ids = torch.randint(0, VOCABULARY, (8, options.prompt), device=options.device)
        with torch.inference_mode():
            seconds = fits(lambda m=model, i=ids: clock.median(lambda: m(i, use_cache=True, logits_to_keep=1), 10))
        if seconds is None:
            print(f"{shape:6} out of memory")
        else:
            print(f"{shape:6} {seconds * 1e3:8.2f} {ids.numel() / seconds:10,.0f}", flush=True)
        record["prefill"].append({"shape": shape, "tokens": ids.numel(), "seconds": seconds})
        del model
        released()


def measure_generate(options: Options, clock: Clock, record: dict) -> None:
    print(
        f"\ngenerate: {options.prompt} + {options.new} tokens\n{'shape':6} {'batch':>5} {'who':>22} {'tokens/s':>10} "
        f"{'GiB':>6}"
    )
    longest = options.prompt + options.new
    for shape in options.shapes:
        ours = {"mambakit" if format == "plain" else f"mambakit, {format}": format for format in options.formats}
        peers = ["Llama", *(["Llama, compiled"] if options.compiled else [])] if not options.alone else []
        for who in (*ours, *peers):
            model = mamba(shape, options.device) if who in ours else llama(shape, options.device, longest)
            if ours.get(who, "plain") != "plain":
                model.quantize(ours[who])
            extra = {"cache_implementation": "static"} if who.endswith("compiled") else {}
            for rows in options.batches:
                ids = torch.randint(0, VOCABULARY, (rows, options.prompt), device=options.device)
                mask = torch.ones_like(ids)

                def run(m=model, i=ids, a=mask, e=extra):
                    return m.generate(i, attention_mask=a, max_new_tokens=options.new, do_sample=False, **e)

                measured = fits(lambda r=run: (r(), r(), clock.peak(r))[2])
                rate = memory = None
                if measured is not None:
                    rate, memory = rows * options.new / measured[0], measured[1]
                text = "out of memory" if rate is None else f"{rate:10,.0f} {memory or 0:6.1f}"
                print(f"{shape:6} {rows:>5} {who:>22} {text}", flush=True)
                record["generate"].append(
                    {"shape": shape, "batch": rows, "who": who, "tokens_per_second": rate, "gib": memory}
                )
            del model
            released()


def measure_lengths(options: Options, clock: Clock, record: dict) -> None:
    print(f"\nlength: one prompt\n{'shape':6} {'tokens':>8} {'who':>10} {'ms':>10}")
    shape = min(options.shapes, key=list(SHAPES).index)
    first, last = options.lengths
    for who in ("mambakit", "Llama"):
        model = mamba(shape, options.device) if who == "mambakit" else llama(shape, options.device, 2**last)
        for power in range(first, last + 1):
            ids = torch.randint(0, VOCABULARY, (1, 2**power), device=options.device)

            def run(m=model, i=ids):
                with torch.no_grad():
                    if isinstance(m, mambakit.MambaForCausalLM):  # as `generate` reads it
                        return prefill(m, i, m.backbone.new_cache(1))
                    return m(i, use_cache=True, logits_to_keep=1)

            seconds = fits(lambda r=run: clock.median(r, 3))
            text = "out of memory" if seconds is None else f"{seconds * 1e3:10.2f}"
            print(f"{shape:6} {2**power:>8} {who:>10} {text}", flush=True)
            record["length"].append({"shape": shape, "tokens": 2**power, "who": who, "seconds": seconds})
        del model
        released()


def measure_long(options: Options, clock: Clock, record: dict) -> None:
    shape = options.shapes[-1] if "1.4b" not in options.shapes else "1.4b"
    model = mamba(shape, options.device)
    print(
        f"\nlong: {shape}, one prompt and 16 new tokens\n{'tokens':>9} {'seconds':>8} {'GiB':>6} "
        f"{'ms a step after':>16}"
    )
    for tokens in (2048, options.long_prompt):
        ids = torch.randint(0, VOCABULARY, (1, tokens), device=options.device)
        model.generate(ids[:, :4096], max_new_tokens=16, do_sample=False)  # kernels are compiled, the graph captured
        seconds, memory = clock.peak(lambda i=ids: model.generate(i, max_new_tokens=16, do_sample=False))
        step = step_seconds(model, 1, clock, options.rounds)
        print(f"{tokens:>9,} {seconds:8.2f} {memory or 0:6.2f} {step * 1e3:16.3f}", flush=True)
        record["long"].append({"shape": shape, "tokens": tokens, "seconds": seconds, "gib": memory, "step": step})
    released()


SAMPLINGS = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top_p 0.95": {"temperature": 0.8, "top_p": 0.95},
}


def measure_engine(options: Options, clock: Clock, record: dict) -> None:
    rows, new = options.rows, options.new
    print(
        f"\nengine: {rows} rows, {options.engine_prompt} + {new} tokens, tokens/s\n{'shape':6} {'how':28} "
        f"{'Engine':>10} {'generate':>10}"
    )
    for shape in options.shapes:
        model = mamba(shape, options.device)
        ids = torch.randint(0, VOCABULARY, (rows, options.engine_prompt), device=options.device)
        for how, values in SAMPLINGS.items():
            greedy = values["temperature"] == 0

            engine = Engine(model, rows)  # made once, as a server does; `generate` keeps its graphs with the model

            def by_engine(e=engine, i=ids, v=values):
                e.write([Request(p, Sampling(**v, seed=seed), new) for seed, p in enumerate(i.cpu())])

            def by_generate(m=model, i=ids, v=values, g=greedy):
                choice = {"do_sample": False} if g else {"do_sample": True, "top_k": 0, **v}
                m.generate(i, attention_mask=torch.ones_like(i), max_new_tokens=new, **choice)

            speeds = []
            for run in (by_engine, by_generate):
                run()  # kernels are compiled, graphs captured
                seconds = statistics.median(clock(run) for _ in range(3))
                speeds.append(rows * new / seconds)
            print(f"{shape:6} {how:28} {speeds[0]:10,.0f} {speeds[1]:10,.0f}", flush=True)
            record["engine"].append(
                {"shape": shape, "rows": rows, "how": how, "engine": speeds[0], "generate": speeds[1]}
            )
        del model
        released()


def measure_context(options: Options, clock: Clock, record: dict) -> None:
    from benchmarks import context  # which reads this module

    context.measure(options, clock, record, lambda: save(options, record))


def plot(record: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    for name, x, y, label in (
        ("generate", "batch", "tokens_per_second", "new tokens a second, prompt included"),
        ("length", "tokens", "seconds", "seconds to read a prompt"),
    ):
        rows = [r for r in record[name] if r[y] is not None]
        if not rows:
            continue
        figure, axes = pyplot.subplots(figsize=(6.4, 4.2), layout="constrained")
        for key in dict.fromkeys((r["shape"], r["who"]) for r in rows):
            line = [r for r in rows if (r["shape"], r["who"]) == key]
            axes.plot([r[x] for r in line], [r[y] for r in line], marker="o", label=f"{key[1]}, {key[0]}")
        axes.set(xscale="log", yscale="log", xlabel=x, ylabel=label, title=record["device"])
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(folder / f"{name}.png", dpi=130)
        pyplot.close(figure)
        print(folder / f"{name}.png")


def save(options: Options, record: dict) -> None:
    import transformers

    results = {key: value for key, value in record.items() if key != "device"}
    records.write(options.json, results, gpus=int(options.device == "cuda"), transformers=transformers.__version__)


PARTS = {
    "prefill": measure_prefill, "step": measure_steps, "generate": measure_generate, "length": measure_lengths,
    "long": measure_long,
    "engine": measure_engine, "context": measure_context,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["130m", "1.4b", "2.8b"])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[part for part in PARTS if part != "context"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8, 32, 64, 128])
    parser.add_argument(
        "--formats",
        nargs="+",
        choices=("plain", "int8", "int4", "fp8"),
        default=["plain"],
        help="of the weights, in steps and generate",
    )
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rows", type=int, default=128, help="of the engine")
    parser.add_argument("--engine-prompt", type=int, default=32)
    parser.add_argument("--lengths", nargs=2, type=int, default=[10, 17], metavar=("FIRST", "LAST"), help="powers of 2")
    parser.add_argument("--long-prompt", type=int, default=1_000_000)
    parser.add_argument(
        "--compiled", action="store_true", help="the Transformer with a static cache and torch.compile, too"
    )
    parser.add_argument("--alone", action="store_true", help="generate without the Transformer")
    parser.add_argument("--rounds", type=int, default=50)
    records.add_argument(parser)
    parser.add_argument("--plots", type=Path, help="a folder for generate.png, length.png and context.png")
    from benchmarks import context

    context.add_arguments(parser)
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no NVIDIA GPU here; --device cpu --shapes tiny tries the script without one")
    import transformers

    transformers.utils.logging.set_verbosity_error()
    name = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, transformers {transformers.__version__}")
    check(options.device)
    clock = Clock(options.device)
    record: dict = {"device": name, "bandwidth": bandwidth(clock, options.device), **{part: [] for part in PARTS}}
    released()
    for part in options.parts:
        PARTS[part](options, clock, record)
        save(options, record)  # after each part: a run that is cut off leaves what it has
    if options.plots:
        plot(record, options.plots)
        if record["context"]:
            context.draw(record["context"], record["device"], options.plots / "context.png")


if __name__ == "__main__":
    main()
