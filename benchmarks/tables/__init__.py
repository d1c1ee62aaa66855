"""The documentation's tables: which records each one reads, and how its cells are written.

`render.py` puts them into the documents.

To show a new run, keep its record in docs/benchmarks and name it here.
"""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.tables import architectures, context, cpu, decoders, experiments, gpu, kernels, readme
from benchmarks.tables.records import Content, Records, kept, plain

TABLES: dict[str, Callable[[Records], Content]] = {
    "train-step": gpu.train_step,
    "decode-steps": gpu.decode_steps,
    "generate": gpu.generate,
    "engine": gpu.engine,
    "eager": gpu.eager,
    "first-token": gpu.first_token,
    "falcon": gpu.falcon,
    "packed-prompts": gpu.packed_prompts,
    "serving-sampled": gpu.serving_sampled,
    "sampling": gpu.sampling,
    "drafts": gpu.drafts,
    "drafts-7b": gpu.drafts_7b,
    "architectures": architectures.architectures,
    "cards": architectures.cards,
    "prompt-lengths": gpu.prompt_lengths,
    "multi-gpu-training": gpu.multi_gpu_training,
    "multi-gpu-context": gpu.multi_gpu_context,
    "serving-replicas": gpu.serving_replicas,
    "scan": kernels.scan,
    "conv": kernels.conv,
    "layouts": kernels.layouts,
    "norm": kernels.norm,
    "cross-entropy": kernels.cross_entropy,
    "decode-ways": kernels.decode_ways,
    "decoders": decoders.decoders,
    "cpu": cpu.cpu,
    "cpu-others": cpu.cpu_others,
    "cpu-isa": cpu.cpu_isa,
    "falcon-cpu": cpu.falcon_cpu,
    "soak": cpu.soak,
    "second-turn": cpu.second_turn,
    "serving-peer": cpu.serving_peer,
    "busy-machine": cpu.busy_machine,
    "numerics": cpu.numerics,
    "long-prompt": cpu.long_prompt,
    "reuse": cpu.reuse,
    "guesses": cpu.guesses,
    "quantization": cpu.quantization,
    "embedded-model": cpu.embedded_model,
    "state-tuning-text": experiments.state_tuning("text"),
    "state-tuning-dna": experiments.state_tuning("dna"),
    "recurrent": experiments.recurrent,
    "readme-cpu": readme.readme_cpu,
    "readme-gpu": readme.readme_gpu,
}
if kept("context"):  # else there is nothing to show yet
    TABLES["context"] = context.context


def table(name: str, records: Records) -> Content:
    """A table of TABLES, or RECORD/PART: the part's rows as they are, their keys as the heads."""
    if name in TABLES:
        return TABLES[name](records)
    record, _, part = name.partition("/")
    if not part:
        raise KeyError(
            f"there is no table {name}: add it to benchmarks/tables, or name a record and its part (RECORD/PART)"
        )
    rows = records.rows(record, part)
    return list(rows[0]), [[plain(row.get(key)) for key in rows[0]] for row in rows]
