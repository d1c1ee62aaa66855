"""What a replica loads before it serves: model, tokenizer, and what drafts for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mambakit.serving.messages import WorkerOptions

if TYPE_CHECKING:
    from mambakit.decoding.drafting import Drafter


def load(options: WorkerOptions) -> tuple[Any, Any]:
    """(model in eval mode on its device, tokenizer); this replica takes its part of the CPU's threads."""
    import torch
    import transformers

    from mambakit.models.auto import AutoTokenizer

    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.sharers))
    device = torch.device(options.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return _model(options.model, options), AutoTokenizer.from_pretrained(options.tokenizer or options.model)


def load_drafter(options: WorkerOptions) -> Drafter | None:
    """What proposes tokens for its texts; None: nothing does."""
    from mambakit.generation.drafters import DraftModel, PromptLookup

    if options.draft_model is not None:
        return DraftModel(_model(options.draft_model, options))
    return PromptLookup() if options.prompt_lookup else None


def _model(name: str, options: WorkerOptions) -> Any:
    import torch

    from mambakit.models.adapters import merge_adapters
    from mambakit.models.auto import AutoConfig, AutoModelForCausalLM, require_text
    from mambakit.models.devices import default_dtype

    device = torch.device(options.device)
    require_text(name, AutoConfig.from_pretrained(name))
    model = AutoModelForCausalLM.from_pretrained(name, dtype=options.dtype or default_dtype(device))
    if hasattr(model, "peft_config"):
        merge_adapters(model)  # plain layers: the decoders read their weights
    return model.to(device).eval()
