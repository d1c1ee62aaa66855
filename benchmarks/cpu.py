"""Prefill, decode and a training step of the 130m shape on a CPU, beside transformers and llama.cpp.

    python benchmarks/cpu.py                        # 2 threads; llama-cpp-python and gguf run where installed
    python benchmarks/cpu.py --threads 8 --json out.json

Random weights; the contenders have the same ones. Every round times each contender once, in turn, so that a machine whose
speed drifts is unkind to all alike; a figure is the median over rounds. Shares are of the read bandwidth (a sum over 256
MB on all threads) and of the matrix products alone in torch, both measured in the same rounds.
Decode times the kernels of a step (`DecodeStep`), from a token's embedding to its logits; nobody samples.
llama.cpp runs without weight repacking (see `Llama`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from mambakit import MambaConfig, MambaForCausalLM
from mambakit.ops import native
from mambakit.ops.linear import pack
from mambakit.ops.linear.api import FORMATS
from mambakit.ops.native.decode import DecodeStep, LayerWeights

LLAMA_FORMATS = {"float32": "F32", "bfloat16": "F16", "int8": "Q8_0", "int4": "Q4_0"}
STEPS = 16  # tokens per timing of decode


def decode_step(model: MambaForCausalLM, format: str, batch: int = 1) -> DecodeStep:
    def packed(linear):
        return pack(linear.weight, format)

    layers = []
    for block in model.backbone.layers:
        m = block.mixer
        layers.append(
            LayerWeights(
                norm=block.norm.weight,
                in_proj=packed(m.in_proj),
                in_proj_bias=m.in_proj.bias,
                conv=m.conv1d.weight.squeeze(1),
                conv_bias=m.conv1d.bias,
                x_proj=packed(m.x_proj),
                # (d, 48): too narrow for groups of 64
                dt_proj=pack(m.dt_proj.weight, format if format in ("float32", "bfloat16") else "bfloat16"),
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
    quantised = gguf.GGMLQuantizationType[format]

    def add(name: str, tensor: torch.Tensor, linear: bool = False) -> None:
        data = tensor.detach().float().numpy()
        if linear and format != "F32" and not (format.startswith("Q") and data.shape[1] % 32):
            writer.add_tensor(name, gguf.quants.quantize(data, quantised), raw_dtype=quantised)
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

    def __init__(self, path: Path, threads: int, length: int):
        import llama_cpp as c

        self.c = c
        parameters = c.llama_model_default_params()
        parameters.n_gpu_layers = 0
        # With repacked weights 0.3.36 crashed on a Q8_0 prompt (Xeon with AMX, virtual machine; cause not established). Off for
        # every format: its quantised figures may be below what it reaches where repacking works.
        parameters.use_extra_bufts = False
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
            result[format] = Llama(path, threads, length)
        return result


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-training", action="store_true")
    parser.add_argument("--json", type=Path)
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
        steps = {format: decode_step(ours, format) for format in FORMATS}
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
            rival = decode_times.get(f"llama.cpp {LLAMA_FORMATS[format]}")
            line += "" if rival is None else f"   {rival / seconds:.2f}x llama.cpp {LLAMA_FORMATS[format]}"
            line += f"   {decode_times['transformers'] / seconds:.2f}x transformers float32"
        print(line)

    if not options.skip_training:

        def train(model) -> Callable[[], object]:
            model.train()
            return lambda: (model.zero_grad(), model(ids, labels=ids).loss.backward())

        times = median_times({"mambakit": train(ours), "transformers": train(theirs)}, 1)
        results["training"] = {name: options.length / seconds for name, seconds in times.items()}
        ratio = times["transformers"] / times["mambakit"]
        print(
            f"\ntraining step 1 x {options.length}: mambakit {results['training']['mambakit']:.0f} tokens/s, {ratio:.2f}x"
        )
    if options.json:
        options.json.write_text(json.dumps({"native": native.describe(), **results}, indent=2, default=str))


if __name__ == "__main__":
    main()
