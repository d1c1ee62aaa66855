"""What `test_torchrun.py` runs under torchrun: `mambakit train`, then transformers' Trainer and accelerate, unchanged.

torchrun --nproc-per-node 2 under_torchrun.py FOLDER
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import save_file

from tests.models.configurations import pair


def model():
    torch.manual_seed(3)
    return pair("plain")[0].train()


def collate(batch: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in batch)
    ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in batch])
    mask = torch.stack([(torch.arange(width) < len(row)).long() for row in batch])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids}


def run_trainer(folder: Path, rows_each: int) -> dict[str, torch.Tensor]:
    """The weights that three of Trainer's updates make of `model`."""
    torch.manual_seed(4)
    rows = [torch.randint(1, 61, (length,)) for length in (9, 5, 7, 12, 3, 8) * 4]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder / "trainer"), max_steps=3, per_device_train_batch_size=rows_each, learning_rate=0.1,
        optim="sgd", max_grad_norm=1.0, lr_scheduler_type="constant", report_to=[], use_cpu=True, save_strategy="no",
        disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    ours = model()
    transformers.Trainer(model=ours, args=arguments, train_dataset=rows, data_collator=collate).train()
    return {name: p.detach() for name, p in ours.named_parameters()}


def gradient(ids: torch.Tensor, accelerator=None) -> torch.Tensor:
    """The embedding's gradient; with an accelerator, of this process's rows, averaged by it."""
    ours = model()
    called = ours
    backward = torch.Tensor.backward
    if accelerator is not None:
        called, backward = accelerator.prepare(ours), accelerator.backward
        ids = ids.chunk(accelerator.num_processes)[accelerator.process_index]
    backward(called(input_ids=ids, labels=ids).loss)
    return ours.backbone.embeddings.weight.grad


def main() -> None:
    import accelerate

    from mambakit import cli

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    assert cli.main(["train", str(folder / "config.toml"), "parallel=fsdp", f"out={folder / 'run'}"]) == 0
    assert not dist.is_initialized()
    # One launch is one meeting of processes, whose keys are in torchrun's store. For a second one they meet in a file,
    # as another process could take a port meanwhile. Trainer and accelerate take the group that is there.
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    dist.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=size)
    weights = run_trainer(folder, 2)
    accelerator = accelerate.Accelerator(cpu=True)
    torch.manual_seed(5)
    weights["gradient"] = gradient(torch.randint(1, 61, (4, 11)), accelerator)
    assert dist.get_world_size() == 2
    if dist.get_rank() == 0:
        save_file({name: t.contiguous() for name, t in weights.items()}, folder / "weights.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
