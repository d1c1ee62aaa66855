"""The error of SSM states in bfloat16 (``ssm_state_dtype``): log-likelihoods of a text, token by token, beside float32.

    python benchmarks/state_dtype.py --text book.txt --json out.json          # the embedded model
    python benchmarks/state_dtype.py --model MODEL --dtype bfloat16 --device cuda --text book.txt

The text is cut into --rows windows of --length tokens. All are read together, a token at a time, as decoding does: the
states are rounded after every token. Printed by position: the mean negative log-likelihood with states of float32 and
of bfloat16, the mean divergence KL(float32 || bfloat16) of the two distributions, the share of tokens whose most
probable successor is another one, and the relative error of the states.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mambakit
from benchmarks import record
from mambakit.assets import default_model_path


@torch.inference_mode()
def compare(path: str, dtype: str, device: str, ids: torch.Tensor, parts: int) -> list[dict[str, float]]:
    """Of each of ``parts`` stretches of positions of ``ids`` (b, l), the means over its tokens and all rows."""
    models = {}
    for kind in ("float32", "bfloat16"):
        model = mambakit.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, ssm_state_dtype=kind)
        models[kind] = model.to(device).eval()
    caches = {kind: model.backbone.new_cache(len(ids)) for kind, model in models.items()}
    assert list(caches["bfloat16"].tensors().values())[1].dtype == torch.bfloat16
    ids, sums, found = ids.to(device), torch.zeros(4, dtype=torch.float64), []
    each = -(-(ids.shape[1] - 1) // parts)
    for i in range(ids.shape[1] - 1):
        log_probs = {
            kind: model(ids[:, i : i + 1], cache_params=caches[kind]).logits[:, 0].double().log_softmax(-1)
            for kind, model in models.items()
        }
        wide, narrow = log_probs["float32"], log_probs["bfloat16"]
        target = ids[:, i + 1 : i + 2]
        sums += torch.stack([
            -wide.gather(1, target).mean(), -narrow.gather(1, target).mean(),
            (wide.exp() * (wide - narrow)).sum(1).mean(), (wide.argmax(1) != narrow.argmax(1)).double().mean(),
        ]).cpu()  # fmt: skip
        count = i % each + 1
        if count == each or i == ids.shape[1] - 2:
            exact, rounded = (list(caches[kind].tensors().values())[1].double() for kind in ("float32", "bfloat16"))
            nll, other, divergence, flips = (sums / count).tolist()
            error = float((exact - rounded).norm() / exact.norm())
            found.append({
                "position": i + 1, "nll_float32": nll, "nll_bfloat16": other, "divergence": divergence,
                "other_choice": flips, "state_error": error,
            })  # fmt: skip
            sums.zero_()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=default_model_path())
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--dtype", default="float32", help="of the weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--parts", type=int, default=4, help="stretches of positions")
    record.add_argument(parser)
    options = parser.parse_args()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(options.model)
    text = options.text.read_text(encoding="utf-8", errors="replace")[: 12 * options.rows * options.length]
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: options.rows * options.length]
    if len(ids) < options.rows * options.length:
        parser.error(f"{options.text} has {len(ids)} tokens; {options.rows} rows of {options.length} need more")
    rows = compare(options.model, options.dtype, options.device, ids.view(options.rows, -1), options.parts)
    print(f"{'position':>8} {'nll float32':>12} {'bfloat16':>9} {'KL':>10} {'other choice':>13} {'state error':>12}")
    for r in rows:
        print(
            f"{r['position']:>8} {r['nll_float32']:12.4f} {r['nll_bfloat16']:9.4f} {r['divergence']:10.2e} "
            f"{r['other_choice']:13.2%} {r['state_error']:12.2e}"
        )
    record.write(options.json, {"state_dtype": rows}, gpus=int(options.device == "cuda"))


if __name__ == "__main__":
    main()
