"""A masked language model of DNA that reads in both directions, and both strands alike; fill-mask with it."""

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

import mambakit
from mambakit.opening import open_text

parser = argparse.ArgumentParser()
parser.add_argument("--train", help="FASTA, plain or compressed (default: random genes, read on either strand)")
parser.add_argument("--heldout", help="FASTA of another genome")
parser.add_argument("--steps", type=int, default=80)
parser.add_argument("--length", type=int, default=128)
parser.add_argument("--width", type=int, default=64)
parser.add_argument("--layers", type=int, default=2)
arguments = parser.parse_args()

tokenizer = mambakit.AutoTokenizer.from_pretrained("hyena-dna")
A, C, G, T = tokenizer("ACGT").input_ids
MASK = tokenizer.mask_token_id
complement = list(range(16))
for one, other in ((A, T), (C, G), (G, C), (T, A)):
    complement[one] = other


def genome(path: str | None, seed: int) -> torch.Tensor:
    """(l,) ids: a FASTA's letters, or genes of 12 codons in random order, each on one of the two strands."""
    if path:
        with open_text(Path(path)) as file:
            return torch.tensor(tokenizer("".join(x.strip() for x in file if x[0] != ">")).input_ids)
    codons = np.random.default_rng(0).integers(A, T + 1, (12, 36))  # the same genes in both genomes
    draw = np.random.default_rng(seed)
    genes = [codons[draw.integers(12)] for _ in range(2000)]
    swap = np.array(complement)
    return torch.tensor(np.concatenate([swap[g][::-1] if draw.random() < 0.5 else g for g in genes]))


def batch(ids: torch.Tensor, rows: int, draw: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows (b, l) with 15 % of the letters masked, and labels that are -100 elsewhere."""
    starts = torch.randint(len(ids) - arguments.length, (rows, 1), generator=draw)
    whole = ids[starts + torch.arange(arguments.length)]
    hidden = torch.rand(whole.shape, generator=draw) < 0.15
    return whole.masked_fill(hidden, MASK), whole.masked_fill(~hidden, -100)


torch.manual_seed(0)
config = mambakit.BiMambaConfig(
    vocab_size=16, hidden_size=arguments.width, num_hidden_layers=arguments.layers, complement=complement
)
model = mambakit.BiMambaForMaskedLM(config)
ids, draw = genome(arguments.train, 1), torch.Generator().manual_seed(0)
optimizer = torch.optim.AdamW(model.parameters(), 8e-3, weight_decay=0.1)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 8e-3, total_steps=arguments.steps)
for _ in range(arguments.steps):
    masked, labels = batch(ids, 16, draw)
    loss = model(masked, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()

model.eval()
masked, labels = batch(genome(arguments.heldout, 2), 64, torch.Generator().manual_seed(1))
with torch.no_grad():
    out = model(masked, labels=labels)
    other = model(torch.tensor(complement)[masked.flip(1)]).logits.flip(1)[..., complement]
right = (out.logits.argmax(-1) == labels)[labels != -100].float().mean()
print(f"masked letters of another genome: {out.loss / np.log(2):.3f} bits each, {right:.1%} right")
print(f"the other strand's logits differ by {(out.logits - other).abs().max():.1e}")
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    fill = mambakit.pipeline("fill-mask", model=folder, tokenizer=tokenizer)
text = tokenizer.decode(masked[0])
print("likeliest:", [(found[0]["token_str"], round(found[0]["score"], 2)) for found in fill(text)[:5]])
