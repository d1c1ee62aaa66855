"""Prefill, decode and a training step of the 130m shape on a CPU, beside transformers and llama.cpp.

    python benchmarks/cpu.py                        # 2 threads; llama-cpp-python and gguf run where installed
    python benchmarks/cpu.py --threads 8 --json out.json

Random weights; the contenders have the same ones. Every round times each contender once, in turn, so that a machine
whose speed drifts is unkind to all alike; a figure is the median over rounds. Shares are of the read bandwidth (a sum
over 256 MB on all threads) and of the matrix products alone in torch, both measured in the same rounds.
Decode times the kernels of a step (`DecodeStep`), from a token's embedding to its logits; nobody samples.
llama.cpp runs with its defaults (weights repacked), except for a format that crashes with them, which the output then
says.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from mambakit import MambaConfig, MambaForCausalLM
from mambakit.decoding.registry import token_step
from mambakit.ops._backends import native
from mambakit.ops.decode.cpu import DecodeStep
from mambakit.ops.decode.packed import PackedLayer
from mambakit.ops.linear import pack
from mambakit.ops.linear.cpu import KINDS
from mambakit.ops.linear.lossless import DTYPES

LLAMA_FORMATS = {"float32": "F32", "bfloat16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
# Ours -> llama.cpp's of the same precision. The lossless ones hold the same numbers in 28 and 12 bits.
RIVALS = LLAMA_FORMATS | {"lossless32": "F32", "lossless16": "F16"}
NAMES = {
    "float32": "decode, batch 1, float32", "lossless32": "float32, lossless (28 bits)", "bfloat16": "bfloat16",
    "lossless16": "bfloat16, lossless (12 bits)", "int8": "int8", "int4": "int4",
}  # fmt: skip
STEPS = 16  # tokens per timing of decode


def decode_step(model: MambaForCausalLM, format: str, batch: int = 1) -> DecodeStep:
    def packed(linear):
        return pack(linear.weight.to(DTYPES.get(format, torch.float32)), format)

    narrow = {"float32": "float32", "lossless32": "float32"}.get(format, "bfloat16")  # (d, 48) is too narrow for groups
    layers = []
    for block in model.backbone.layers:
        m = block.mixer
        layers.append(
            PackedLayer(
                norm=block.norm.weight,
                in_proj=packed(m.in_proj),
                in_proj_bias=m.in_proj.bias,
                conv=m.conv1d.weight.squeeze(1),
                conv_bias=m.conv1d.bias,
                x_proj=packed(m.x_proj),
                dt_proj=pack(m.dt_proj.weight, narrow),
                dt_bias=m.dt_proj.bias,
                A=-torch.exp(m.A_log),
                D=m.D,
                out_proj=packed(m.out_proj),
                out_proj_bias=m.out_proj.bias,
            )
        )
    cache = model.backbone.new_cache(batch)
    config = model.config
    states = cache.conv_states, cache.ssm_states
    return DecodeStep(layers, model.backbone.norm_f.weight, packed(model.lm_head), config.layer_norm_epsilon, *states)


def step_bytes(step: DecodeStep) -> int:
    """Weights and states that one step reads."""
    layers, head = step._program.held[2], step._program.held[3]
    linears = [w for layer in layers for w in (layer.in_proj, layer.x_proj, layer.dt_proj, layer.out_proj)]
    return sum(w.nbytes for w in linears) + head.nbytes + sum(s.nbytes for s in step._program.held[:2])


class Prefill:
    """The matrix products of a prefill and nothing else."""

    def __init__(self, model: MambaForCausalLM, length: int):
        self.layers = [
            [m.in_proj.weight, m.x_proj.weight, m.dt_proj.weight, m.out_proj.weight]
            for m in (block.mixer for block in model.backbone.layers)
        ]
        self.head = model.lm_head.weight
        self.inputs = {w.shape[1]: torch.randn(length, w.shape[1]) for w in self.layers[0]}

    def __call__(self) -> None:
        for weights in self.layers:
            for w in weights:
                F.linear(self.inputs[w.shape[1]], w)
        F.linear(self.inputs[self.head.shape[1]][-1:], self.head)


def write_gguf(model: MambaForCausalLM, path: Path, format: str) -> None:
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(str(path), "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_ssm_conv_kernel(config.conv_kernel)
    writer.add_ssm_inner_size(config.intermediate_size)
    writer.add_ssm_state_size(config.state_size)
    writer.add_ssm_time_step_rank(config.time_step_rank)
    writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(config.vocab_size)
    if getattr(config, "mixer_rms_eps", None) is not None:  # FalconMamba
        writer.add_bool("mamba.ssm.dt_b_c_rms", True)
    quantised = gguf.GGMLQuantizationType[format]
    packed: dict[int, object] = {}  # a layer may stand for several

    def add(name: str, tensor: torch.Tensor, linear: bool = False) -> None:
        data = tensor.detach().float().numpy()
        if linear and format != "F32" and not (format.startswith("Q") and data.shape[1] % 32):
            if id(tensor) not in packed:
                packed[id(tensor)] = gguf.quants.quantize(data, quantised)
            writer.add_tensor(name, packed[id(tensor)], raw_dtype=quantised)
        else:
            writer.add_tensor(name, data)

    add("token_embd.weight", model.lm_head.weight, linear=True)
    add("output_norm.weight", model.backbone.norm_f.weight)
    for i, block in enumerate(model.backbone.layers):
        m, name = block.mixer, f"blk.{i}."
        add(name + "attn_norm.weight", block.norm.weight)
        add(name + "ssm_in.weight", m.in_proj.weight, linear=True)
        add(name + "ssm_conv1d.weight", m.conv1d.weight.squeeze(1))
        add(name + "ssm_conv1d.bias", m.conv1d.bias)
        add(name + "ssm_x.weight", m.x_proj.weight, linear=True)
        add(name + "ssm_dt.weight", m.dt_proj.weight)
        add(name + "ssm_dt.bias", m.dt_proj.bias)
        add(name + "ssm_a", -torch.exp(m.A_log))
        add(name + "ssm_d", m.D)
        add(name + "ssm_out.weight", m.out_proj.weight, linear=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Llama:
    """One llama.cpp context, driven through the low-level interface: no sampling, no tokenizer."""

    def __init__(self, path: Path, threads: int, length: int, repack: bool = True):
        import llama_cpp as c

        self.c = c
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        parameters.use_extra_bufts = repack
        self.model = c.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        options = c.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = length + 4096, length, length
        options.n_threads = options.n_threads_batch = threads
        self.context = c.llama_init_from_model(self.model, options)

    def feed(self, tokens: list[int]) -> None:
        array = (self.c.llama_token * len(tokens))(*tokens)
        if self.c.llama_decode(self.context, self.c.llama_batch_get_one(array, len(tokens))):
            raise RuntimeError("llama_decode failed")

    def clear(self) -> None:
        self.c.llama_memory_clear(self.c.llama_get_memory(self.context), True)


def llamas(model: MambaForCausalLM, threads: int, length: int) -> dict[str, Llama]:
    try:
        import gguf  # noqa: F401
        import llama_cpp
    except ImportError:
        print("llama-cpp-python or gguf is not installed: its columns are left out")
        return {}
    llama_cpp.llama_backend_init()
    silent = llama_cpp.llama_log_callback(lambda *_: None)
    llama_cpp.llama_log_set(silent, None)
    llamas.silent = silent  # type: ignore[attr-defined]  # C keeps the pointer
    with tempfile.TemporaryDirectory() as folder:
        result = {}
        for format, name in LLAMA_FORMATS.items():
            path = Path(folder) / f"{name}.gguf"
            write_gguf(model, path, name)
            # With its weights repacked, its default, 0.3.36 crashed on a Q8_0 prompt on one processor (a Xeon with
            # AMX).
            repack = survives(path, threads, length)
            if not repack:
                print(f"llama.cpp {name} crashes with repacked weights here: it runs without (use_extra_bufts=False)")
            result[format] = Llama(path, threads, length, repack)
        return result


def survives(path: Path, threads: int, length: int) -> bool:
    """Whether llama.cpp reads a prompt and a token of this file with its defaults, tried in a process of its own."""
    code = f"from cpu import Llama; from pathlib import Path; m = Llama(Path({str(path)!r}), {threads}, {length}); "
    code += f"m.feed([1] * {length}); m.feed([1])"
    return subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True).returncode == 0


def generate_times(model: MambaForCausalLM, ids: torch.Tensor, rounds: int) -> tuple[float, float]:
    """Seconds a token of the bare step and of generate(), in turn; what generate() does once is taken out."""
    model.generation_config.eos_token_id = None
    step = token_step(model, model.backbone.new_cache(1))
    token = torch.zeros(1, dtype=torch.int64)

    def clock(call: Callable[[], object]) -> float:
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    bare, whole = [], []
    with torch.no_grad():
        for i in range(rounds + 1):
            one = clock(lambda: [step(token) for _ in range(2 * STEPS)]) / (2 * STEPS)
            short = clock(lambda: model.generate(ids, max_new_tokens=4, do_sample=False))
            long = clock(lambda: model.generate(ids, max_new_tokens=4 + 2 * STEPS, do_sample=False))
            if i > 0:
                bare.append(one)
                whole.append((long - short) / (2 * STEPS))
    return statistics.median(bare), statistics.median(whole)


def their_training_step(threads: int, length: int, patience: float) -> float | None:
    """Seconds of transformers' first training step, in a process of its own; None when it takes longer than
    ``patience``."""
    code = f"""
import time, torch
from transformers import MambaConfig, MambaForCausalLM
torch.set_num_threads({threads})
model = MambaForCausalLM(MambaConfig(hidden_size=768, num_hidden_layers=24, vocab_size=50280)).train()
ids = torch.randint(0, 50280, (1, {length}))
print("ready", flush=True)
begin = time.perf_counter()
model(ids, labels=ids).loss.backward()
print(time.perf_counter() - begin)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready", "transformers' model could not be made"
    try:
        return float(process.communicate(timeout=patience)[0])
    except subprocess.TimeoutExpired:
        process.kill()
        return None


def median_times(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds per call; every round times each contender once."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, call in contenders.items():
            begin = time.perf_counter()
            call()
            if i > 0:  # the first round warms up
                times[name].append(time.perf_counter() - begin)
    return {name: statistics.median(t) for name, t in times.items()}


def compared(what: str, rate: float, seconds: float, times: dict[str, float], llama_format: str) -> dict[str, object]:
    """A row of the run's record."""
    rival = times.get(f"llama.cpp {llama_format}")
    against = {"against_llama": rival / seconds, "llama_format": llama_format} if rival else {}
    return {"what": what, "tokens_per_second": rate, "against_transformers": times["transformers"] / seconds, **against}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--patience", type=float, default=120, help="seconds to wait for transformers' training step")
    record.add_argument(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    from transformers import MambaConfig as TheirConfig
    from transformers import MambaForCausalLM as Theirs

    shape = {"hidden_size": 768, "num_hidden_layers": 24, "vocab_size": 50280}
    ours = MambaForCausalLM(MambaConfig(**shape)).eval()
    theirs = Theirs(TheirConfig(**shape)).eval()
    theirs.load_state_dict(ours.state_dict())
    ids = torch.randint(0, 50280, (1, options.length))
    print("native:", native.describe())

    with torch.no_grad():
        difference = (ours(ids).logits - theirs(ids).logits).abs().max().item()
        assert difference < 1e-2, f"logits differ by {difference}: nothing is timed"
        steps = {format: decode_step(ours, format) for format in KINDS}
        embedding = ours.backbone.embeddings(ids[:, :1])[:, 0]
        cache = theirs(ids[:, :4], use_cache=True).cache_params
        llama = llamas(ours, options.threads, options.length)
        buffer = torch.ones(2**26)

        def repeat(call: Callable[[], object]) -> Callable[[], object]:
            return lambda: [call() for _ in range(STEPS)]

        prefill: dict[str, Callable[[], object]] = {
            "mambakit": lambda: ours(ids, use_cache=True, logits_to_keep=1),
            "products": Prefill(ours, options.length),
            "transformers": lambda: theirs(ids, use_cache=True, logits_to_keep=1),
        }
        for format, context in llama.items():
            prefill[f"llama.cpp {LLAMA_FORMATS[format]}"] = lambda c=context: (c.clear(), c.feed(ids[0].tolist()))
        prefill_times = median_times(prefill, options.rounds)

        decode: dict[str, Callable[[], object]] = {"read": lambda: buffer.sum()}
        for format, step in steps.items():
            decode[f"mambakit {format}"] = repeat(lambda s=step: s(embedding))
        decode["transformers"] = repeat(lambda: theirs(ids[:, :1], cache_params=cache, use_cache=True))
        for format, context in llama.items():
            decode[f"llama.cpp {LLAMA_FORMATS[format]}"] = repeat(lambda c=context: c.feed([7]))
        decode_times = median_times(decode, options.rounds)

    results: dict[str, dict[str, float]] = {"prefill": {}, "decode": {}, "training": {}}
    print(f"\nprefill {options.length}: tokens/s")
    for name, seconds in prefill_times.items():
        results["prefill"][name] = options.length / seconds
        print(f"  {name:<22}{options.length / seconds:8.0f}   mambakit is {seconds / prefill_times['mambakit']:.2f}x")
    ours_ms = prefill_times["mambakit"]
    rows = [
        compared(f"prefill {options.length}", options.length / ours_ms, ours_ms, prefill_times, "F32")
        | {"share": prefill_times["products"] / ours_ms, "share_of": "the same products alone in torch"}
    ]
    bandwidth = buffer.nbytes / decode_times.pop("read")
    results["decode"]["read bandwidth GB/s"] = bandwidth / 1e9
    print(f"\ndecode, batch 1: tokens/s; read bandwidth {bandwidth / 1e9:.1f} GB/s")
    for name, seconds in decode_times.items():
        rate = results["decode"][name] = STEPS / seconds
        line = f"  {name:<22}{rate:8.1f}"
        format = name.removeprefix("mambakit ")
        if format in steps:
            share = results["decode"][f"{name}, share of bandwidth"] = step_bytes(steps[format]) * rate / bandwidth
            line += f"   {share:4.0%} of the bandwidth"
            rows.append(
                compared(NAMES[format], rate, seconds, decode_times, RIVALS[format])
                | {"share": share, "share_of": "the read bandwidth"}
            )
            rival = decode_times.get(f"llama.cpp {RIVALS[format]}")
            line += "" if rival is None else f"   {rival / seconds:.2f}x llama.cpp {RIVALS[format]}"
            line += f"   {decode_times['transformers'] / seconds:.2f}x transformers float32"
        print(line)

    print("\ngenerate(), batch 1, greedy: ms a token beside the bare step's")
    results["generate"] = {}
    for format in KINDS:
        model = ours if format == "float32" else copy.deepcopy(ours)
        if format in ("bfloat16", "lossless16"):
            model.bfloat16()
        if format.startswith(("int", "lossless")):
            model.quantize(format.rstrip("1236") if format.startswith("lossless") else format)
        bare, whole = generate_times(model, ids[:, :8], options.rounds)
        results["generate"][f"{format}, generate / step"] = whole / bare
        print(f"  {format:<22}{whole * 1e3:8.2f}   step {bare * 1e3:.2f}   {whole / bare:.3f}x")
        del model

    if not options.skip_training:

        def step(model) -> float:
            model.train()
            begin = time.perf_counter()
            model.zero_grad()
            model(ids, labels=ids).loss.backward()
            return time.perf_counter() - begin

        step(ours)
        mine = statistics.median(step(ours) for _ in range(3))
        print(f"\ntraining step 1 x {options.length}: mambakit {mine:.2f} s", flush=True)
        result = results["training"] = {"mambakit s": mine}
        peer = their_training_step(options.threads, options.length, options.patience)
        if peer is None:
            result["ratio, at least"] = options.patience / mine
            print(
                f"  transformers: not done after {options.patience:.0f} s, so at least {options.patience / mine:.0f}x"
            )
        else:
            result |= {"transformers s": peer, "ratio": peer / mine}
            print(f"  transformers {peer:.1f} s (its first): mambakit is {peer / mine:.1f}x")
    isa = f"instruction set {native.current_isa()}"
    parts = {part: [{"what": what, "value": value} for what, value in found.items()] for part, found in results.items()}
    record.write(options.json, {"bandwidth": bandwidth, "rows": rows, **parts}, gpus=0, notes=isa)


if __name__ == "__main__":
    main()
