"""mambakit as a model of EleutherAI's lm-evaluation-harness: `--model mambakit`.

Importing this module registers it. The harness finds only the models it knows by itself, so its command line is reached
through ours: `mambakit evaluate harness run --model mambakit --tasks lambada_openai`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from mambakit.assets import default_model_path
from mambakit.evaluation.likelihood import log_likelihoods
from mambakit.generation.score import TokenScorer
from mambakit.generation.start_token import start_token
from mambakit.generation.stream import SamplingParams, Stream
from mambakit.models.auto import AutoModelForCausalLM, AutoTokenizer
from mambakit.models.devices import default_device, default_dtype, usable_device
from mambakit.quoting import brief

# What a task may ask of generation, besides where to stop.
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")


@register_model("mambakit")
class MambaHarnessLM(TemplateLM):
    """A Mamba model behind the harness's interface. There is no longest input: nothing is truncated.

    Args:
        pretrained: id or folder; the model that ships with mambakit when absent.
        device: a GPU where there is one, when absent.
        dtype: of the weights; "auto" is the checkpoint's, float32 on a CPU.
        batch_size: sequences of a forward pass at most; "auto" or 1 (what the harness gives when nothing is asked)
            packs as many as ``batch_tokens`` hold, since packed sequences need no padding and equal one another
            exactly.
        batch_tokens: tokens of a forward pass, about.
        max_batch_size: another limit on ``batch_size``.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = "auto",
        batch_tokens: int = 4096,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        name = str(default_model_path()) if pretrained is None else pretrained
        self._device = default_device() if device is None else usable_device(device)
        dtype = default_dtype(self._device) if dtype == "auto" else dtype
        self.tokenizer = AutoTokenizer.from_pretrained(name)
        self.model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(self._device).eval()
        self.name = name
        self.batch_tokens = int(batch_tokens)
        size = 0 if str(batch_size).startswith("auto") or int(batch_size) == 1 else int(batch_size)
        self.batch_size = min(size or max_batch_size, max_batch_size) if max_batch_size else size

    @property
    def eot_token_id(self) -> int:
        return start_token(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; Mamba's tokenizers put nothing around a text unless ``add_special_tokens`` asks for it."""
        return self.tokenizer(string, add_special_tokens=bool(add_special_tokens), verbose=False, **kwargs).input_ids

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        with tqdm(total=len(requests), desc="log-likelihoods", disable=disable_tqdm) as bar:
            found = log_likelihoods(
                self.model, [(context, continuation) for _, context, continuation in requests],
                batch_tokens=self.batch_tokens, batch_size=self.batch_size, progress=bar.update,
            )  # fmt: skip
        results = [(likelihood.log_prob, likelihood.greedy) for likelihood in found]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole documents, each read to its end with the state carried: every token is given all before it."""
        results = []
        for request in tqdm(requests, desc="documents", disable=disable_tqdm):
            scorer = TokenScorer(self.model, self.eot_token_id)
            ids = torch.tensor(self.tok_encode(request.args[0]), dtype=torch.int64, device="cpu")
            total = sum(float(scorer(part).double().sum()) for part in ids.split(self.batch_tokens) if len(part))
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return results

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations, each until one of its stop strings; greedy unless the task samples.

        Raises:
            ValueError: a task asks for an option of generation that is not known here.
        """
        results = []
        for request in tqdm(requests, desc="texts", disable=disable_tqdm):
            context, given = request.args
            options = dict(given)
            until = options.pop("until", None) or []
            limit = next((options.pop(k) for k in ("max_gen_toks", "max_new_tokens") if k in options), 256)
            sampled = options.pop("do_sample", options.get("temperature", 0.0) > 0)
            unknown = sorted(set(options) - set(_SAMPLING))
            if unknown:
                raise ValueError(
                    f"generation option {brief(unknown[0])} is not known; use {', '.join(_SAMPLING)} and until"
                )
            options.setdefault("temperature", 1.0)
            if not sampled:
                options["temperature"] = 0.0
            stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
            ids = torch.tensor(self.tok_encode(context) or [self.eot_token_id], dtype=torch.int64, device="cpu")
            stream = Stream(self.model, self.tokenizer, ids, SamplingParams(**options), int(limit), stop)
            for _ in stream:
                pass
            results.append(stream.text)
            self.cache_hook.add_partial("generate_until", (context, given), stream.text)
        return results

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The history as one prompt, by the tokenizer's own template."""
        return self.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )  # fmt: skip


def run_harness(arguments: list[str]) -> None:
    """The harness's own command line, with mambakit registered."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["lm_eval", *with_device(arguments)]
    cli_evaluate()


def with_device(arguments: list[str]) -> list[str]:
    """The arguments with the device that there is, where neither they nor their --config name one: the harness's own
    default is "cuda:0" on any machine."""
    runs = bool(arguments) and (arguments[0] == "run" or arguments[0].startswith("-"))
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=True)
    known.add_argument("--device")
    known.add_argument("--config", "-C")
    known.add_argument("--help", "-h", action="store_true")
    given, _ = known.parse_known_args(arguments)
    if not runs or given.help or given.device or _names_device(given.config):
        return arguments
    return [*arguments, "--device", str(default_device())]


def _names_device(config: str | None) -> bool:
    """Whether the harness's YAML file names a device. A file that cannot be read is the harness's to refuse."""
    import yaml

    if config is None or not Path(config).is_file():
        return False
    try:
        settings = yaml.safe_load(Path(config).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError):
        return False
    return isinstance(settings, dict) and bool(settings.get("device"))
