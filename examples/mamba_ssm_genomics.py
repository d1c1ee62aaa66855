"""Genomics: mamba_ssm's language model over nucleotides, trained and then continuing a sequence; nothing installed."""

import tempfile

import mambakit

mambakit.provide()  # before the imports that need mamba_ssm

import torch
from mamba_ssm.models.config_mamba import MambaConfig
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
from torch import nn

LETTERS, UNIT = "ACGT", 5


def batch(size: int, copies: int = 5):
    """Tandem repeats, as forensic profiles count them: a unit of five nucleotides, again and again."""
    return torch.randint(0, 4, (size, UNIT)).repeat(1, copies)


def text(ids) -> str:
    return "".join(LETTERS[i] for i in ids.tolist())


def losses(model, ids):
    """Nats of each nucleotide but the first, (l - 1,)."""
    logits = model(ids).logits[:, :-1, :4]
    return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").mean(0)


torch.manual_seed(0)
model = MambaLMHeadModel(MambaConfig(d_model=48, n_layer=2, vocab_size=4))
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(120):
    loss = losses(model, batch(32)).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
with torch.no_grad():
    found = losses(model, batch(200))
first, later = found[: UNIT - 1].mean(), found[UNIT - 1 :].mean()
print(f"nats a nucleotide: {first:.2f} in the first unit (ln 4 is 1.39), {later:.2f} in its repeats")
with tempfile.TemporaryDirectory() as folder:  # the format is upstream's, and mambakit's own models read it
    model.save_pretrained(folder)
    again = MambaLMHeadModel.from_pretrained(folder)
start = batch(1, 2)
print(f"{text(start[0])} continues as {text(again.generate(start, 25, vocab_size=4)[0, 2 * UNIT :])}")
