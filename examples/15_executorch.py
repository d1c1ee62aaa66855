"""One token of a Mamba model as an ExecuTorch program, for phones and small devices: pip install executorch."""

import sys

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime

import mambakit
from mambakit.assets import default_model_path
from mambakit.export.aoti import TokenStep
from mambakit.models.quantization import is_quantized

source = sys.argv[1] if len(sys.argv) > 1 else default_model_path()
target = sys.argv[2] if len(sys.argv) > 2 else "mamba.pte"
model = mambakit.AutoModelForCausalLM.from_pretrained(source, dtype="float32").eval()
if is_quantized(model.config):
    model.dequantize()
step, cache = TokenStep(model), mambakit.MambaCache(model.config, 1, dtype=torch.float32)
inputs = (torch.ones(1, 1, dtype=torch.int64), *(states.clone() for states in cache.tensors().values()))
with torch.no_grad():
    program = torch.export.export(step, inputs)
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
with open(target, "wb") as file:
    file.write(lowered.buffer)

method = Runtime.get().load_program(target).load_method("forward")
logits = method.execute(list(inputs))[0]
with torch.no_grad():
    expected = step(*inputs)[0]
print(f"{target}: {len(lowered.buffer) / 2**20:.1f} MB, logits differ by {(logits - expected).abs().max():.1e}")
