"""An architecture that the library does not know: a gated linear recurrence, alone and in a hybrid with Mamba.

Its state has other names, numbers, shapes and dtypes than Mamba's: ``memory`` (m,), and ``count`` (), an int64 that
turns the output, so that a count that is lost changes the tokens.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import nn

import mambakit
from mambakit.modules import StateTensor
from mambakit.modules.mixers import MIXERS, Mixer
from mambakit.modules.placement import opened


class ToyMixer(Mixer):
    """m_t = g_t m_{t-1} + (1 - g_t) v_t, g_t = sigmoid(W_g x_t + bias);  y_t = W_o (m_t * silu(z_t) * (1 + cos(t /
    3)))."""

    STATE_FIELDS = ("expand",)

    @staticmethod
    def state_tensors(config, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return StateTensor("memory", (config.hidden_size + 3,), wide), StateTensor("count", (), torch.int64)

    def __init__(self, config, layer_idx=0):
        super().__init__()
        self.layer_idx, self.m = layer_idx, config.hidden_size + 3
        self.in_proj = nn.Linear(config.hidden_size, 3 * self.m)
        self.out_proj = nn.Linear(self.m, config.hidden_size)
        self.bias = nn.Parameter(torch.empty(self.m))
        self.reset_own_parameters()

    def initial_values(self):
        return {"bias": torch.full_like(self.bias, 0.5)}

    def forward(self, x, cache_params=None, packing=None):
        cache = opened(cache_params, self.layer_idx, x.device)
        gate, value, z = self.in_proj(x).chunk(3, -1)  # (b, l, m) each
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        gate, value = (gate + self.bias).to(wide).sigmoid(), value.to(wide)
        if packing is None:
            sequences = [slice(None)]
        else:
            cuts = packing.cu_seqlens.tolist()
            sequences = [slice(a, b) for a, b in pairwise(cuts)]
        rows = x.shape[0] if packing is None else len(sequences)
        if cache is None:
            memory, count = gate.new_zeros(rows, self.m), torch.zeros(rows, dtype=torch.int64, device=x.device)
        else:
            memory, count = cache.layer(self.layer_idx, None if packing is None else packing.read)
        outputs, memories, counts = [], [], []
        for i, sequence in enumerate(sequences):
            at = slice(None) if packing is None else slice(i, i + 1)
            m, n, mixed = memory[at], count[at], []
            for g, v in zip(gate[:, sequence].unbind(1), value[:, sequence].unbind(1), strict=True):
                m, n = g * m + (1 - g) * v, n + 1
                mixed.append(m * (1 + torch.cos(n.to(wide) / 3))[:, None])
            outputs.append(torch.stack(mixed, 1) if mixed else gate[:, sequence])
            memories.append(m)
            counts.append(n)
        self._keep(cache, packing, torch.cat(memories), torch.cat(counts))
        y = torch.cat(outputs, 1) * nn.functional.silu(z.to(wide))
        return self.out_proj(y.to(x.dtype))

    def _keep(self, cache, packing, memory, count):
        if cache is None:
            return
        if torch.is_grad_enabled() or not (packing is None or packing.in_place):
            cache.update(self.layer_idx, memory, count, rows=None if packing is None else packing.write)
            return
        slots = slice(None) if packing is None else packing.write
        for own, new in zip(cache.memory(self.layer_idx), (memory, count), strict=True):
            own[slots] = new


class ToyConfig(mambakit.MambaConfig):
    model_type = "toy"

    def mixer_class(self, layer_idx):
        return ToyMixer


class HybridConfig(mambakit.MambaConfig):
    """Toy, Mamba, Toy, ...: layers of different specifications."""

    model_type = "hybrid"

    def mixer_class(self, layer_idx):
        return MIXERS["mamba"] if layer_idx % 2 else ToyMixer


CONFIGS = {"toy": ToyConfig, "hybrid": HybridConfig}


def toy(name: str = "toy", **fields) -> mambakit.MambaForCausalLM:
    """A random model of three layers in eval mode."""
    torch.manual_seed(3)
    base = {"vocab_size": 61, "hidden_size": 12, "num_hidden_layers": 3, "tie_word_embeddings": False}
    model = mambakit.MambaForCausalLM(CONFIGS[name](**{**base, "initializer_range": 0.4, **fields})).eval()
    model.generation_config.eos_token_id = None
    return model
