"""The training configuration: one flat table, each field explained where it is declared."""

from __future__ import annotations

import dataclasses

from mambakit.quoting import brief
from mambakit.training.limits import check_limits
from mambakit.training.trackers import check_trackers


@dataclasses.dataclass
class TrainConfig:
    # -- data ----------------------------------------------------------------------------------------------------------
    train_files: list[str] = dataclasses.field(default_factory=list)
    """Training files: paths, folders or patterns (`data/*.parquet`), each plain, .gz, .bz2, .xz or .zst."""
    heldout_files: list[str] = dataclasses.field(default_factory=list)
    """Files to evaluate on, never trained on."""
    validation_fraction: float = 0.0
    """Without heldout_files: the fraction of train_files' documents held out. A hash of a document's text decides, so
    that all copies of it are on one side, whatever the order of the files. Of a single document its end is held out."""
    format: str = "auto"
    """"text", "jsonl", "parquet", "fasta" or "wav"; "auto": by the file's name (.txt, .jsonl, .parquet, .fa, .wav)."""
    text_field: str = "text"
    """JSONL's key or Parquet's column that holds a document."""
    separator: str = "<|endoftext|>\n"
    """Separates the documents of a text file. Each document ends with the end-of-text token instead."""
    tokenizer: str = ""
    """A folder, tokenizer.json or hub id; "bytes"; "nucleotides" (A, C, G, T, N). Empty: `init_from`'s own, else a new
    byte-level BPE of train_files' text, nucleotides for FASTA, bytes for WAV."""
    vocab_size: int = 4096
    """Vocabulary of the tokenizer to train."""
    ambiguous: str = "mask"
    """FASTA: letters that are not A, C, G or T are read as N. "mask": N is read but never predicted. "predict": it is a
    letter like the others. "split": a run of N ends the document."""
    reverse_complement: bool = False
    """FASTA: read each document's part of a row from either strand with probability 1/2, drawn again in every epoch (a
    whole document with `stateful`)."""
    sample_rate: int = 0
    """WAV: refuse files of another rate (Hz). 0: whatever rate the first file has."""
    token_cache: str = ""
    """Folder of the tokenised files, reused for the same files and tokenizer. Empty: `tokens` in the run's folder."""
    sequence_length: int = 512
    """Tokens in a row of a batch."""
    initial_length: int = 0
    """Length warm-up: rows start this long and double up to sequence_length over `length_warmup`; a batch holds the
    same tokens throughout, cut into more rows. 0: none."""
    length_warmup: float = 0.25
    """Fraction of the run that length warm-up takes."""
    respect_documents: bool = False
    """Keep state from passing between the documents of a row, exactly. Off, rows are cut from the concatenated
    documents: of book-length documents few rows contain a boundary, and the end-of-text token marks each."""
    stateful: bool = False
    """Truncated backpropagation: row i of a batch continues row i of the previous batch from its final state. Gradients
    stop at the row's start. Documents of any length are then seen whole."""
    fresh_rows: float = 0.0
    """With `stateful`: the fraction of rows, drawn again at every step, that start from a zero state all the same. A
    model that has only seen carried states predicts the beginnings of texts, and prompts, worse."""

    # -- model (transformers' names) -----------------------------------------------------------------------------------
    hidden_size: int = 320
    num_hidden_layers: int = 12
    state_size: int = 16
    expand: int = 2
    conv_kernel: int = 4
    tie_word_embeddings: bool = True
    init_from: str = ""
    """Checkpoint (id or folder) to start from instead of new weights; the model fields above are then the checkpoint's.
    Packed weights are unpacked."""
    tune: str = "all"
    """What learns. "state": of `init_from` the initial state of each layer, and nothing else; the run writes a state
    file, which `--load-state`, `State.load` and the server take. "all": the weights, or the adapters of `lora_rank`."""
    lora_rank: int = 0
    """Fine-tune `init_from` through low-rank adapters of this rank, merged at the end. 0: train all parameters."""
    lora_alpha: float = 0.0
    """Scale of the adapters: alpha / rank times their product. 0: twice the rank."""
    lora_targets: list[str] = dataclasses.field(default_factory=lambda: ["in_proj", "x_proj", "dt_proj", "out_proj"])
    """Linear layers that get an adapter."""

    # -- optimisation --------------------------------------------------------------------------------------------------
    batch_size: int = 64
    """Rows in a batch: of one optimiser step."""
    accumulate: int = 1
    """Micro-batches of a batch, computed one after another to fit memory; the gradient is the whole batch's."""
    activation_checkpointing: bool = False
    """Keep only each layer's input for the backward pass and compute the rest again: less memory, a third more work."""
    recompute_selection: bool = False
    """Recompute each layer's convolution and time steps in the backward pass: a quarter less memory for activations, 2
    to 3 % more time. For layers with SiLU and without adapters on x_proj and dt_proj."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    final_learning_rate: float = 0.01
    """Where the schedule ends, as a fraction of the peak."""
    schedule: str = "cosine"
    """"cosine" from the peak to the end, or "wsd": stable, then a linear decay over the last fifth."""
    warmup: float = 0.02
    """Fraction of the run over which the rate rises linearly."""
    weight_decay: float = 0.1
    """On matrices only; A_log, D, biases, norms and embeddings are not decayed."""
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    """Largest norm of the gradient."""
    spike_factor: float = 0.0
    """Skip the update of a step whose gradient norm is above this many times its running mean. 0: skip only what is not
    finite. Skipped updates are reported."""
    max_skipped: int = 10
    """Stop the run after this many skipped updates in a row."""
    steps: int = 0
    """Optimiser steps. 0: as many as `epochs` take."""
    epochs: float = 1.0
    max_minutes: float = 0.0
    """Wall-clock budget in place of `steps` and `epochs`; the schedule then follows the clock. 0: none."""
    autocast: str = "bfloat16"
    """Dtype of matrix products on CUDA ("bfloat16", "float16" is not offered: it needs loss scaling) or "float32"."""
    float8: bool = False
    """Multiply in_proj and out_proj in float8 (e4m3 forward, e5m2 for gradients), through torchao, on a GPU that has
    8-bit floats; weights, optimiser and everything else are as without it."""
    cuda_graph: bool = True
    """On CUDA, capture the whole step once, collectives included, and replay it: a small model is otherwise bound by
    launches. With context_parallel the step is not captured, which the run reports."""
    parallel: str = "none"
    """How the processes that torchrun started divide the work: "ddp", each holds the model and takes a shard of the
    batch; "fsdp", each holds a shard of the model as well (FSDP2); "none", one process."""
    reduce_dtype: str = "float32"
    """With "ddp" or "fsdp": dtype in which gradients are exchanged. "bfloat16" is half the bytes; each process's
    gradient and their sum are rounded to it."""
    reshard_after_forward: bool = True
    """With "fsdp": drop other processes' shards after the forward pass, and gather them again in backward. false: a
    gather less, for the memory of the whole model's parameters on each device."""
    context_parallel: int = 1
    """Processes over which one row is sharded, with "ddp" or "fsdp": for rows longer than one device's memory."""
    seed: int = 0

    # -- run -----------------------------------------------------------------------------------------------------------
    out: str = "runs/model"
    """Folder of this run alone: the model, metrics.jsonl, the configuration, the loss curve and checkpoints/."""
    log_every: int = 20
    eval_every: int = 1000
    """Steps between evaluations on a sample of the held-out text; the whole of it is scored at the end."""
    checkpoint_every: int = 1000
    """Steps between checkpoints to resume from. 0: none."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""
    resume: bool = False
    """Continue the run in `out` from its latest checkpoint, with the settings that it was started with
    (docs/guides/training.md lists those that may change)."""
    overwrite: bool = False
    """Where `out` holds a run already: remove the files of that run, nothing else, and start again."""
    export_only: bool = False
    """With resume: train no further, write the model of the latest checkpoint."""
    keep_best: bool = False
    """Write the weights of the evaluation with the lowest held-out loss at the end, in place of the last ones."""
    early_stopping_patience: int = 0
    """End the run after this many evaluations in a row without a lower held-out loss. 0: never."""
    report_to: list[str] = dataclasses.field(default_factory=list)
    """Where metrics go besides metrics.jsonl: "tensorboard" (files in `tensorboard` in the run's folder), "wandb",
    "trackio". Each is a package to install; each reads its own settings."""
    project: str = "mambakit"
    """Project of the run at wandb and trackio; the run has the name of `out`."""
    export_dtype: str = "bfloat16"
    """Dtype of the saved weights; A_log, D and dt_proj.bias stay float32."""
    max_shard_size: str = "5GB"
    sample_prompt: str = "It was a dark and stormy night"
    """Prompt of the sample in the model card."""

    def __post_init__(self) -> None:
        check_limits(self)
        for name, choices in (
            ("schedule", ("cosine", "wsd")),
            ("autocast", ("bfloat16", "float32")),
            ("export_dtype", ("bfloat16", "float16", "float32")),
            ("format", ("auto", "text", "jsonl", "parquet", "fasta", "wav")),
            ("ambiguous", ("mask", "predict", "split")),
            ("parallel", ("none", "ddp", "fsdp")),
            ("reduce_dtype", ("float32", "bfloat16")),
            ("tune", ("all", "state")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {brief(getattr(self, name))}; choose one of {', '.join(choices)}")
        check_trackers(self.report_to)
        for name in ("keep_best", "early_stopping_patience"):
            if getattr(self, name) and not (self.validation_fraction or self.heldout_files):
                raise ValueError(
                    f"{name} compares held-out losses; set validation_fraction=0.05, or heldout_files, or drop it"
                )
        if self.validation_fraction and self.heldout_files:
            raise ValueError("validation_fraction holds out documents of train_files; drop it, or heldout_files")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be cut into accumulate={self.accumulate} equal parts"
            )
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(f"spike_factor is {self.spike_factor}; it must be above 1, or 0 for none")
        self._check_lengths()
        if self.context_parallel > 1 and self.parallel == "none":
            raise ValueError(
                f'context_parallel is {self.context_parallel} but parallel is "none"; set it to ddp or fsdp'
            )
        if self.reduce_dtype != "float32" and self.parallel == "none":
            raise ValueError(
                f'reduce_dtype is {self.reduce_dtype} but parallel is "none"; set parallel to ddp or fsdp, or drop it'
            )
        if not self.reshard_after_forward and self.parallel != "fsdp":
            raise ValueError(
                f'reshard_after_forward is false but parallel is "{self.parallel}"; set parallel=fsdp, or drop it'
            )
        if self.context_parallel > 1 and self.stateful:
            raise ValueError(
                "stateful carries the state of whole rows, which context_parallel shards; drop one of them"
            )
        if self.fresh_rows and not self.stateful:
            raise ValueError(
                "fresh_rows is for stateful rows: all others start from a zero state; drop it, or set stateful"
            )
        if self.resume and self.overwrite:
            raise ValueError("resume continues the run in out and overwrite removes it; drop one of them")
        if not str(self.out).strip():
            raise ValueError("out is empty; name the folder of the run")
        if self.export_only and not self.resume:
            raise ValueError("export_only writes the model of a run's latest checkpoint; add resume=true")
        if self.lora_rank and not self.init_from:
            raise ValueError(f"lora_rank is {self.lora_rank} but init_from is empty; adapters need a checkpoint")
        if self.tune == "state":
            self._check_state_tuning()
        if self.stateful and self.activation_checkpointing:
            raise ValueError(
                "stateful and activation_checkpointing exclude each other: a layer computed again would move the state "
                "twice; set recompute_selection to save memory"
            )
        if self.float8 and self.autocast != "bfloat16":
            raise ValueError(
                f'float8 replaces products in bfloat16, and autocast is "{self.autocast}"; drop one of them'
            )
        if self.float8 and (self.lora_rank or self.tune == "state"):
            raise ValueError("float8 is for training all weights, not adapters or a state; drop one of them")
        if self.recompute_selection and self.activation_checkpointing:
            raise ValueError("recompute_selection has no effect with activation_checkpointing; drop one of them")
        if self.recompute_selection and self.context_parallel > 1:
            raise ValueError("recompute_selection has no effect with context_parallel; drop one of them")

    def _check_state_tuning(self) -> None:
        if not self.init_from:
            raise ValueError('tune is "state" but init_from is empty; an initial state is learned for a checkpoint')
        for name, given, why in (
            ("lora_rank", self.lora_rank, "adapters are weights"),
            ("stateful", self.stateful, "carried rows start from other states than the learned one"),
            ("activation_checkpointing", self.activation_checkpointing, "a layer run twice would move its state twice"),
            ("context_parallel", self.context_parallel > 1, "only the first shard of a row has an initial state"),
            ("parallel=fsdp", self.parallel == "fsdp", "the state is small, and is not sharded: parallel=ddp"),
        ):
            if given:
                raise ValueError(f'{name} does not go with tune="state": {why}; drop one of them')

    def _check_lengths(self) -> None:
        if not self.initial_length:
            return
        if self.stateful:
            raise ValueError("initial_length cuts rows, which stateful must not; drop one of them")
        ratio, rest = divmod(self.sequence_length, max(1, self.initial_length))
        if self.initial_length < 0 or rest or ratio & (ratio - 1):
            raise ValueError(
                f"initial_length {self.initial_length} does not double to sequence_length {self.sequence_length}; use "
                "sequence_length / 2, / 4, ..."
            )
        if not 0 < self.length_warmup <= 1:
            raise ValueError(f"length_warmup is {self.length_warmup}; it is a fraction of the run, above 0 up to 1")

    def row_length(self, progress: float) -> int:
        """Tokens in a row, ``progress`` (0 to 1) through the run: sequence_length, or less during length warm-up."""
        if not self.initial_length or progress >= self.length_warmup:
            return self.sequence_length
        doublings = (self.sequence_length // self.initial_length).bit_length() - 1
        return self.initial_length << int(doublings * progress / self.length_warmup)
