"""Export a model for another runtime: ONNX (onnxruntime), PyTorch's pt2 (torch.export), or C++ (AOTInductor).

What is written is run beside the model and compared.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from mambakit.commands.options import check_output_file, check_output_folder
from mambakit.errors import UsageError
from mambakit.output import say, table, terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", help="hub id, folder or .gguf file; packed weights are unpacked, adapters merged")
    parser.add_argument("target", help="a new folder for onnx, a new .pt2 file for pt2 and aoti")
    parser.add_argument("--to", choices=("onnx", "pt2", "aoti"), required=True)
    parser.add_argument("--no-speed", action="store_true", help="compare results, not speeds")


def run(args: argparse.Namespace) -> int:
    target = Path(args.target)
    if args.to == "onnx":
        check_output_folder("target", args.target, new=True)
    else:
        if target.suffix != ".pt2":
            raise UsageError(f"target is {args.target!r}; give a new file whose name ends with .pt2")
        if target.exists():
            raise UsageError(f"{args.target} exists; name a new file")
        check_output_file("target", args.target)

    import transformers

    from mambakit.export import aoti, onnx, pt2
    from mambakit.models.checkpoints.conversion import load_language_model
    from mambakit.models.quantization import is_quantized

    if args.to == "onnx":
        onnx.require_packages()
    if args.to == "aoti":
        aoti.require_compiler()
    transformers.utils.logging.disable_progress_bar()
    model = load_language_model(args.source, "export", "float32")[0].eval()
    if is_quantized(model.config):
        model.dequantize()
    if args.to == "pt2":
        pt2.to_pt2(model, target)
        say(terminal(), f"{target}: differs from the model by {pt2.check(model, target):.1e} at most")
        return 0
    if args.to == "aoti":
        aoti.to_aoti(model, target)
        say(terminal(), f"{target}: differs from the model by {aoti.check(model, target):.1e} at most")
        return 0
    onnx.to_onnx(model, target)
    report = onnx.check(model, target, speed=not args.no_speed)
    say(terminal(), f"{target}: onnxruntime differs from the model by {report.error:.1e} at most")
    if report.speeds:
        table(("tokens/s, batch 1", ""), [(name, f"{rate:,.0f}") for name, rate in report.speeds.items()])
    return 0
