"""Serve a model over HTTP (OpenAI's completions API), any number of replicas of it behind one address."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
from pathlib import Path

from mambakit.commands.loading import add_model_arguments
from mambakit.quoting import brief


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_model_arguments(parser)
    parser.add_argument(
        "--served-model-name", metavar="NAME", help="what it goes by in the API (default: its own name)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1; 0.0.0.0: all)")
    parser.add_argument("--port", type=int, default=8000, help="port to listen on (default 8000; 0: any that is free)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="what clients must send as a bearer token (default: $MAMBAKIT_API_KEY, or none)",
    )

    replicas = parser.add_argument_group("replicas: processes with a model each")
    replicas.add_argument(
        "--replicas", type=int, metavar="N", help="how many (default: one for each of --devices, else 1)"
    )
    replicas.add_argument(
        "--devices",
        nargs="+",
        metavar="DEVICE",
        help="where; dealt to the replicas in turn (default: the GPUs, or the CPU)",
    )
    replicas.add_argument("--rows", type=int, default=8, help="texts a replica writes together (default 8)")
    replicas.add_argument(
        "--prefill-chunk-size", type=int, metavar="N",
        help="prompt tokens read at a time (default 512 on a CPU, 2048 elsewhere)",
    )  # fmt: skip
    replicas.add_argument("--prefix-cache", action="store_true", help="keep states of prompts, and find them again")
    replicas.add_argument(
        "--prefix-cache-mb",
        type=int,
        default=1024,
        metavar="MB",
        help="memory for them, in each replica (default 1024)",
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-waiting", type=int, default=256, help="texts that may wait for a row (default 256)")
    limits.add_argument("--max-new-tokens", type=int, default=4096, help="of a text, at most (default 4096)")
    limits.add_argument("--max-prompt-tokens", type=int, default=65536, help="of a prompt, at most (default 65536)")
    limits.add_argument(
        "--max-texts", type=int, default=128, help="of a request: prompts times n, at most (default 128)"
    )
    limits.add_argument(
        "--drain-seconds", type=float, default=30.0, help="time for texts under way after a signal to stop (default 30)"
    )


def run(args: argparse.Namespace) -> int:
    for package in ("starlette", "uvicorn", "prometheus_client"):
        if importlib.util.find_spec(package) is None:
            raise ValueError(f'serving needs {package}, which is not installed: pip install "mambakit[serve]"')
    _check(args)

    from mambakit.assets import default_model_path
    from mambakit.serving.messages import WorkerOptions
    from mambakit.serving.server import ServerOptions, serve

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    for library in ("httpx", "huggingface_hub", "transformers"):
        logging.getLogger(library).setLevel(logging.WARNING)
    model = str(args.model or default_model_path())
    serve(
        ServerOptions(
            worker=WorkerOptions(
                model=model,
                dtype=args.dtype,
                rows=args.rows,
                chunk_size=args.prefill_chunk_size,
                prefix_cache_bytes=args.prefix_cache_mb << 20 if args.prefix_cache else 0,
            ),
            devices=_devices(args),
            name=args.served_model_name or (Path(model).resolve().name if Path(model).is_dir() else model),
            host=args.host,
            port=args.port,
            max_waiting=args.max_waiting,
            max_new_tokens=args.max_new_tokens,
            max_prompt_tokens=args.max_prompt_tokens,
            max_texts=args.max_texts,
            drain_seconds=args.drain_seconds,
            api_key=args.api_key or os.environ.get("MAMBAKIT_API_KEY") or None,
        )
    )
    return 0


def _check(args: argparse.Namespace) -> None:
    least = {
        "replicas": 1, "rows": 1, "prefill_chunk_size": 1, "prefix_cache_mb": 1, "max_waiting": 0, "max_new_tokens": 1,
        "max_prompt_tokens": 1, "max_texts": 1, "drain_seconds": 0, "port": 0,
    }  # fmt: skip
    for name, low in least.items():
        value = getattr(args, name)
        if value is not None and not value >= low:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; it must be {low} or more")
    if args.port > 65535:
        raise ValueError(f"--port is {args.port}; it must be at most 65535")
    if args.device and args.devices:
        raise ValueError("--device and --devices both say where; give one")


def _devices(args: argparse.Namespace) -> tuple[str, ...]:
    """One for each replica."""
    devices = [args.device] if args.device else args.devices
    if devices is None or any(device.startswith("cuda") for device in devices):
        import torch

        gpus = torch.cuda.device_count()  # without touching any: each is a replica's own
    if devices is None:
        devices = [f"cuda:{i}" for i in range(gpus)] or ["cpu"]
        if args.replicas is None:
            devices = devices[:1]
    devices = ["cuda:0" if device == "cuda" else device for device in devices]
    for device in devices:
        kind, _, index = device.partition(":")
        if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
            raise ValueError(f"there is no device {brief(device)}; give cpu, cuda:0, cuda:1, ...")
        if kind == "cuda" and int(index) >= gpus:
            raise ValueError(f"{device} is not here: there are {gpus} NVIDIA GPUs; use one that `mambakit env` lists")
    count = args.replicas or len(devices)
    if args.devices and count < len(devices):
        raise ValueError(
            f"--replicas is {count}, but {len(devices)} --devices are named; name fewer, or have a replica on each"
        )
    return tuple(devices[i % len(devices)] for i in range(count))
