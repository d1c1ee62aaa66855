"""Requests and tokens per second and time to first token of `mambakit serve`, greedy and sampled, by replicas.

    python benchmarks/serving.py --replicas 2 --compare                       # the embedded model, on a CPU
    python benchmarks/serving.py --replicas 2 --compare --random-shape 1.4b --json out.json  # two NVIDIA GPUs, bfloat16
    python benchmarks/serving.py --temperature 0.8 --top-p 0.95                              # one setting only

Starts a server, sends it all requests from --concurrency clients over HTTP, streamed, and stops it; with --compare the
same with one replica before, and the ratios. Without --temperature and --top-p everything is measured twice: greedy,
and with temperature 1, which is OpenAI's default. Sampled requests carry no seed, as most clients' do not. Each prompt
is other random tokens, each text runs to its full length or to the end that the model chooses, and tokens are counted
by the server's usage field. Before, `generate` writes as many texts as a replica has slots, with the same prompts,
lengths and sampling, on the first device alone: the server's tokens per second are also given as a share of what its
replicas would write that way. Nothing is timed before the server has answered one request from each client. The clients
are processes of their own, so that reading streams does not slow down the server.

It needs no network with the embedded model, a folder or --random-shape, and of packages `mambakit[serve]` alone: torch,
transformers, tokenizers, safetensors, huggingface_hub, filelock, numpy, rich, starlette, uvicorn, httptools, uvloop,
prometheus-client, jinja2, llguidance, and what these require.
"""

from __future__ import annotations

import argparse
import http.client
import json
import multiprocessing
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import record
from benchmarks.record import ROOT
from mambakit.threads import bound_spinning

SHAPES = {"tiny": (64, 2), "130m": (768, 24), "1.4b": (2048, 48)}
VOCABULARY = 50280
RATIOS = ("requests_per_second", "tokens_per_second", "first_token_p50", "first_token_p99", "seconds")
Options = argparse.Namespace
Sampling = dict[str, float]


def make_checkpoint(shape: str, folder: Path) -> None:
    """Random weights, and a tokenizer that has a word for every token."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    import mambakit

    width, layers = SHAPES[shape]
    words = {f" w{i}": i for i in range(VOCABULARY)}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=" w0")), unk_token=" w0"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = mambakit.MambaForCausalLM(mambakit.MambaConfig(hidden_size=width, num_hidden_layers=layers))
    model.generation_config.eos_token_id = None
    model.to(torch.bfloat16).save_pretrained(folder)
    model.cpu()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Server:
    """`mambakit serve`, ready."""

    def __init__(self, model: str | None, replicas: int, options: Options):
        command = [sys.executable, "-m", "mambakit", "serve", "--port", "0", "--replicas", str(replicas)]
        command += [
            "--slots",
            str(options.slots),
            "--max-waiting",
            "100000",
            "--max-new-tokens",
            str(options.new_tokens),
        ]
        command += ["--model", model] if model else []
        command += ["--devices", *options.devices[:replicas]] if options.devices else []
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, "PYTHONPATH": paths}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        found = re.search(r" at http://([\d.]+):(\d+)", self.process.stdout.readline())
        if found is None:
            sys.exit("the server did not start; its messages are above")
        self.host, self.port = found[1], int(found[2])
        began = time.monotonic()
        while self.health()["status"] != "ok":
            if self.process.poll() is not None or time.monotonic() - began > 300:
                sys.exit("the server did not become ready; its messages are above")
            time.sleep(0.1)
        self.start_seconds = time.monotonic() - began

    def health(self) -> dict:
        connection = http.client.HTTPConnection(self.host, self.port)
        try:
            connection.request("GET", "/health")
            return json.loads(connection.getresponse().read())
        except ConnectionError:
            return {"status": "gone"}
        finally:
            connection.close()

    def stop(self) -> None:
        self.process.terminate()
        self.process.communicate()


def prompts(count: int, options: Options, seed: int) -> list[list[int]]:
    generator = random.Random(seed)
    return [[generator.randrange(1, options.vocabulary) for _ in range(options.prompt_tokens)] for _ in range(count)]


def samplings(options: Options) -> list[Sampling]:
    """The settings to measure, as fields of a request."""
    if options.temperature is None and options.top_p is None:
        return [{"temperature": 0.0}, {"temperature": 1.0}]
    given = {"temperature": 1.0 if options.temperature is None else options.temperature}
    return [given if options.top_p is None else {**given, "top_p": options.top_p}]


def title(sampling: Sampling) -> str:
    return "greedy" if sampling == {"temperature": 0.0} else ", ".join(f"{k} {v:g}" for k, v in sampling.items())


def request(
    connection: http.client.HTTPConnection, prompt: list[int], new_tokens: int, sampling: Sampling
) -> dict[str, float]:
    """One streamed text: the times of the request, of its first event and of its end, and its number of tokens."""
    body = {
        "prompt": prompt, "max_tokens": new_tokens, "stream": True, "stream_options": {"include_usage": True},
        **sampling,
    }  # fmt: skip
    began, first, usage = time.monotonic(), 0.0, b""
    sending = "POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"}
    connection.request(*sending)
    try:
        response = connection.getresponse()
    except http.client.RemoteDisconnected:  # llama.cpp's server closes a connection after each stream
        connection.close()
        connection.request(*sending)
        response = connection.getresponse()
    if response.status != 200:
        raise RuntimeError(f"HTTP {response.status}: {response.read().decode()}")
    while line := response.readline():
        first = first or time.monotonic()
        if line.startswith(b"data: {"):
            usage = line
    tokens = json.loads(usage[6:])["usage"]["completion_tokens"]
    return {"began": began, "first": first, "end": time.monotonic(), "tokens": tokens}


def client(
    host: str, port: int, new_tokens: int, sampling: Sampling, mine: list[list[list[int]]]
) -> list[dict[str, float]]:
    """A process: for each list of prompts, a thread that sends them one after another over one connection."""

    def send(these: list[list[int]]) -> list[dict[str, float]]:
        connection = http.client.HTTPConnection(host, port)
        try:
            return [request(connection, prompt, new_tokens, sampling) for prompt in these]
        finally:
            connection.close()

    with ThreadPoolExecutor(len(mine)) as pool:
        return [one for found in pool.map(send, mine) for one in found]


def load(
    server: Server, options: Options, count: int, new_tokens: int, sampling: Sampling, seed: int
) -> list[dict[str, float]]:
    """``count`` requests, --concurrency of them at a time."""
    all_prompts = prompts(count, options, seed)
    lanes = [lane for i in range(options.concurrency) if (lane := all_prompts[i :: options.concurrency])]
    processes = min(options.clients, len(lanes))
    with ProcessPoolExecutor(processes) as pool:
        parts = [
            pool.submit(client, server.host, server.port, new_tokens, sampling, lanes[i::processes])
            for i in range(processes)
        ]
        return [one for part in parts for one in part.result()]


def generated(model: str | None, options: Options) -> list[float]:
    """Tokens per second of `generate` at a batch of --slots, of each setting. Runs in a process of its own, so that the
    device is free for the server afterwards.
    """
    import torch

    import mambakit
    from mambakit.assets import default_model_path
    from mambakit.models.devices import default_dtype

    device = torch.device((options.devices or ["cuda:0" if torch.cuda.is_available() else "cpu"])[0])
    name = model or default_model_path()
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(name, dtype=default_dtype(device)).to(device).eval()
    loaded.generation_config.eos_token_id = None  # as long as the server's texts, which may end
    found = []
    for sampling in samplings(options):
        given = {"do_sample": False} if not sampling["temperature"] else {"do_sample": True, "top_k": 0, **sampling}
        times = []
        for seed in range(1 + options.generate_rounds):
            ids = torch.tensor(prompts(options.slots, options, seed), dtype=torch.int64, device=device)
            began = time.monotonic()
            loaded.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=options.new_tokens,
                min_new_tokens=options.new_tokens, **given,
            ).cpu()  # fmt: skip
            times.append(time.monotonic() - began)
        found.append(options.slots * options.new_tokens / statistics.median(times[1:]))
        print(f"generate, batch {options.slots}, {title(sampling)}: {found[-1]:.0f} tokens/s", flush=True)
    return found


def measure(model: str | None, replicas: int, options: Options, alone: list[float]) -> list[dict]:
    """One server with ``replicas``: a row for each setting."""
    server = Server(model, replicas, options)
    try:
        rows = []
        for number, sampling in enumerate(samplings(options)):
            load(server, options, options.concurrency, min(8, options.new_tokens), sampling, seed=2 * number + 1)
            found = load(server, options, options.requests, options.new_tokens, sampling, seed=2 * number + 2)
            rows.append(summary(found, replicas, sampling, server.start_seconds))
            if alone:
                share = rows[-1]["tokens_per_second"] / (replicas * alone[number])
                rows[-1] |= {"generate_tokens_per_second": alone[number], "share_of_generate": share}
                print(f"  {share:.2f} of {replicas} x generate's {alone[number]:.0f} tokens/s", flush=True)
        return rows
    finally:
        server.stop()


def summary(found: list[dict[str, float]], replicas: int, sampling: Sampling, start_seconds: float) -> dict:
    seconds = max(one["end"] for one in found) - min(one["began"] for one in found)
    firsts = sorted(one["first"] - one["began"] for one in found)
    row = {
        "replicas": replicas, "sampling": title(sampling), **sampling, "requests_per_second": len(found) / seconds,
        "tokens_per_second": sum(one["tokens"] for one in found) / seconds,
        "first_token_p50": statistics.median(firsts), "first_token_p99": firsts[min(len(firsts) - 1, len(firsts) * 99
        // 100)],
        "seconds": seconds, "start_seconds": start_seconds,
    }  # fmt: skip
    print(
        f"{replicas} replicas, {row['sampling']}: {row['requests_per_second']:8.2f} requests/s "
        f"{row['tokens_per_second']:10.0f} tokens/s, "
        f"first token p50 {row['first_token_p50'] * 1e3:.0f} ms, p99 {row['first_token_p99'] * 1e3:.0f} ms "
        f"({len(found)} requests in {seconds:.1f} s; ready after {start_seconds:.1f} s)",
        flush=True,
    )
    return row


def gpus_used(options: Options) -> int:
    import torch

    return min(options.replicas, torch.cuda.device_count())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--compare", action="store_true", help="the same with one replica, and the ratios")
    parser.add_argument("--devices", nargs="+", help="one for each replica (default: assigned by the server)")
    parser.add_argument("--model", help="hub id or folder (default: the embedded model)")
    parser.add_argument("--random-shape", choices=SHAPES, help="a checkpoint of random weights of this shape instead")
    parser.add_argument("--slots", "--rows", type=int, default=8, help="of a replica")
    parser.add_argument("--temperature", type=float, help="0 is greedy (default: both 0 and 1)")
    parser.add_argument("--top-p", type=float, help="nucleus (default: 1)")
    parser.add_argument("--concurrency", type=int, help="requests at a time (default: slots times replicas)")
    parser.add_argument("--requests", type=int, help="in all (default: four times the concurrency)")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--clients", type=int, default=min(8, os.cpu_count() or 1), help="processes that send")
    parser.add_argument("--generate-rounds", type=int, default=3, help="of generate beside it; 0: none")
    record.add_argument(parser)
    options = parser.parse_args()
    bound_spinning()  # as the command does: of this process, and of those that it starts
    options.concurrency = options.concurrency or options.slots * options.replicas
    options.requests = options.requests or 4 * options.concurrency
    with tempfile.TemporaryDirectory() as folder:
        model = options.model
        options.vocabulary = VOCABULARY if options.random_shape else 512
        if options.random_shape:
            make_checkpoint(options.random_shape, Path(folder))
            model = folder
        alone: list[float] = []
        if options.generate_rounds:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                alone = process.submit(generated, model, options).result()
        counts = [1, options.replicas] if options.compare else [options.replicas]
        measured = [measure(model, count, options, alone) for count in counts]
    if options.compare:
        for one, many in zip(*measured, strict=True):
            ratio = {name: many[name] / one[name] for name in RATIOS}
            print(
                f"{options.replicas} replicas to 1, {one['sampling']}: {ratio['tokens_per_second']:.2f} x the "
                f"tokens/s, first "
                f"token p50 {ratio['first_token_p50']:.2f} x, p99 {ratio['first_token_p99']:.2f} x"
            )
    record.write(options.json, {"serving": [row for rows in measured for row in rows]}, gpus=gpus_used(options))


if __name__ == "__main__":
    main()
