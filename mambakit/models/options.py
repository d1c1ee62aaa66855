"""transformers' options that a Mamba model cannot follow, each with its remedy: none is ignored without a message."""

from __future__ import annotations

import copy
import warnings
from typing import Any

from mambakit.decoding.draft_model import DraftModel
from mambakit.decoding.drafted_batch import Drafting
from mambakit.decoding.drafting import read_draft_tokens
from mambakit.decoding.prompt_lookup import PromptLookup
from mambakit.quoting import brief

_ONE_PROCESS = (
    "a model is loaded by one process onto the devices of device_map; `mambakit train` and `mambakit serve` spread "
    "over several"
)
_OWN_KERNELS = "mambakit brings its own kernels (`mambakit env` lists them); drop it"
_NO_ADAPTERS = "load the base model, then mambakit.training.lora.load_adapters or peft.PeftModel.from_pretrained"
_LOADING = {
    "load_in_8bit": 'use quantization="int8"', "load_in_4bit": 'use quantization="int4"',
    "quantization_config": 'use quantization="int8", "int4", "fp8" or "lossless"',
    "variant": "it reads model.safetensors or pytorch_model.bin; give the file that name in a folder of its own",
    "from_tf": "it reads PyTorch's weights; convert them first",
    "from_flax": "it reads PyTorch's weights; convert them first",
    "tp_plan": _ONE_PROCESS, "tp_size": _ONE_PROCESS, "device_mesh": _ONE_PROCESS, "distributed_config": _ONE_PROCESS,
    "use_kernels": _OWN_KERNELS, "kernel_config": _OWN_KERNELS, "allow_all_kernels": _OWN_KERNELS,
    "experts_implementation": "a Mamba model has no experts; drop it",
    "key_mapping": "names are translated already; rename the tensors in the file where they are others",
    "adapter_kwargs": _NO_ADAPTERS, "adapter_name": _NO_ADAPTERS,
    "proxies": "set HTTPS_PROXY, which huggingface_hub reads", "use_auth_token": "its name is token",
    "resume_download": "downloads are always resumed; drop it", "mirror": "set HF_ENDPOINT",
    "code_revision": "no code is loaded; drop it",
    "tqdm_class": "downloads show huggingface_hub's own bars; drop it",
    "offload_state_dict": "use device_map and offload_folder",
}  # fmt: skip
# Options that can have one value only.
_ONLY = {
    "weights_only": (True, "pickled code is never run; get the weights as safetensors"),
    "low_cpu_mem_usage": (True, "weights are always read without a second copy; drop it"),
}
# Options that change nothing: a warning says why.
_WITHOUT_EFFECT = {
    "attn_implementation": "a Mamba model has no attention, so the choice changes nothing",
    "trust_remote_code": "mambakit's own classes read the checkpoint, and no code of it is run",
}
_SPECULATIVE = "drafts are assistant_model's or prompt_lookup_num_tokens'; drop it"
_INPUTS = "generate() reads one document in each row; give attention_mask for padding"
_GENERATING = {
    "assistant_tokenizer": "a draft model has the tokens of the model; drop it",
    "assistant_early_exit": _SPECULATIVE, "use_mtp": _SPECULATIVE,
    "cache_implementation": "a Mamba state has one form; drop the argument",
    "cache_config": "a Mamba state has one form; drop the argument",
    "max_cache_len": "a Mamba state does not grow; drop the argument",
    "output_attentions": "a Mamba model has no attentions; ask for output_hidden_states",
    **dict.fromkeys(
        ("position_ids", "seq_idx", "cu_seqlens", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        _INPUTS,
    ),
    "labels": "generate() has no loss; call the model", "num_items_in_batch": "generate() has no loss; call the model",
    "token_type_ids": "a Mamba model has no token types; drop them",
}  # fmt: skip


def check_loading(options: dict[str, Any]) -> dict[str, Any]:
    """The options of `from_pretrained`, `from_config` and `pipeline` that remain to be followed.

    Those that change nothing are taken out, with a warning.

    Raises:
        ValueError: an option that cannot be followed.
    """
    # transformers' Auto classes pass the revision that they found here. It asks for no adapter.
    passed_on = options.get("adapter_kwargs")
    if isinstance(passed_on, dict) and passed_on.keys() <= {"revision", "_commit_hash"}:
        options = {name: value for name, value in options.items() if name != "adapter_kwargs"}
    for name, remedy in _LOADING.items():
        if options.get(name) is not None and options[name] is not False:
            raise ValueError(f"{name}={brief(options[name])} cannot be followed: {remedy}")
    for name, (only, remedy) in _ONLY.items():
        if options.get(name) not in (None, only):
            raise ValueError(f"{name}={brief(options[name])} cannot be followed: {remedy}")
    for name, why in _WITHOUT_EFFECT.items():
        if options.get(name):
            warnings.warn(f"{name}={brief(options[name])}: {why}", stacklevel=3)
    return {name: value for name, value in options.items() if name not in (*_WITHOUT_EFFECT, *_ONLY, *_LOADING)}


def check_generating(arguments: dict[str, Any], settings: Any) -> None:
    """ValueError for an argument of `generate`, or a field of its configuration, that cannot be followed."""
    for name, remedy in _GENERATING.items():
        value = arguments.get(name)
        value = getattr(settings, name, None) if value is None else value
        if value is not None and value is not False:
            shown = brief(value) if isinstance(value, (str, int, float, bool, dict)) else f"a {type(value).__name__}"
            raise ValueError(f"{name}={shown}: {remedy}")
    scale = setting(arguments, settings, "guidance_scale", 1)
    if scale == 1 and arguments.get("negative_prompt_ids") is not None:
        raise ValueError("negative_prompt_ids are read with a guidance_scale other than 1; give one, or drop them")
    if scale != 1 and setting(arguments, settings, "num_beams", 1) > 1:
        raise ValueError(
            f"guidance_scale={scale} with num_beams: the state of the text without a prompt would not follow its beam; "
            "use num_beams=1"
        )


def setting(arguments: dict[str, Any], settings: Any, name: str, default: Any) -> Any:
    """The value of an argument of `generate`: as given, else of the generation configuration, else ``default``."""
    value = arguments.get(name)
    value = getattr(settings, name, None) if value is None else value
    return default if value is None else value


def drafting_of(model: Any, arguments: dict[str, Any], settings: Any) -> tuple[Drafting | None, Any]:
    """(the drafter that `generate` was asked for, the generation configuration without it).

    transformers would cut the state back to the accepted tokens, which it cannot be: its own assisted decoding must not
    see these arguments, which are removed from ``arguments``.

    Raises:
        ValueError: two drafters, numbers outside 1 to 15, beams, or a draft model that does not fit.
    """
    names = ("prompt_lookup_num_tokens", "num_assistant_tokens", "max_matching_ngram_size")
    own = model.generation_config if settings is None else settings
    values = {name: setting(arguments, own, name, None) for name in names}
    for name in names:
        arguments.pop(name, None)
    assistant = arguments.pop("assistant_model", None)
    if values["prompt_lookup_num_tokens"] is None and assistant is None:
        return None, settings
    if values["prompt_lookup_num_tokens"] is not None and assistant is not None:
        raise ValueError("assistant_model and prompt_lookup_num_tokens are two drafters; give one")
    if setting(arguments, own, "num_beams", 1) > 1:
        raise ValueError("drafts are of one text each, and num_beams writes several; use num_beams=1")
    if settings is not None and getattr(settings, "prompt_lookup_num_tokens", None) is not None:
        settings = copy.deepcopy(settings)
        settings.prompt_lookup_num_tokens = None
    elif settings is None and getattr(own, "prompt_lookup_num_tokens", None) is not None:
        settings = copy.deepcopy(own)
        settings.prompt_lookup_num_tokens = None
    if assistant is not None:
        drafter = DraftModel(assistant)
        drafter.require_fit(model)
        count = 4 if values["num_assistant_tokens"] is None else values["num_assistant_tokens"]
        return Drafting(drafter, read_draft_tokens(count, name="num_assistant_tokens")), settings
    longest = 4 if values["max_matching_ngram_size"] is None else values["max_matching_ngram_size"]
    count = read_draft_tokens(values["prompt_lookup_num_tokens"], name="prompt_lookup_num_tokens")
    return Drafting(PromptLookup(longest, min(2, longest)), count), settings
