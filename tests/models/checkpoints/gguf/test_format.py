"""A model in a GGUF file: written, described, loaded (packed where it is), converted, and used by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mambakit
from mambakit import CheckpointError
from mambakit.cli import main
from mambakit.decoding.registry import choose
from mambakit.models.checkpoints import convert, describe
from mambakit.models.checkpoints.gguf import names, types
from mambakit.models.checkpoints.gguf.blocks import bytes_of
from mambakit.models.checkpoints.gguf.container import read_header, write_file
from mambakit.modules.quantized_linear import QuantizedLinear
from tests.models.checkpoints.gguf.test_blocks import random_blocks
from tests.models.configurations import pair, tokens, worst
from tests.models.tiny import save_tiny

# A is stored, its logarithm is not: exp and log in float64, each rounded to float32 once.
A_LOG = 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "m"
    save_tiny(folder, hidden_size=64)
    return folder


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


@pytest.mark.parametrize("name", ["plain", "untied", "state_size_8", "time_step_rank_7", "epsilon", "falcon"])
def test_float32_comes_back(name, tmp_path):
    model = pair(name)[0]
    model.save_gguf(tmp_path / "m.gguf")
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert type(loaded) is type(model)
    for key, value in model.state_dict().items():
        if key.endswith("A_log"):
            torch.testing.assert_close(loaded.state_dict()[key], value, rtol=0, atol=A_LOG)
        else:
            assert torch.equal(loaded.state_dict()[key], value), key
    for field in ("hidden_size", "num_hidden_layers", "state_size", "conv_kernel", "time_step_rank", "vocab_size",
                  "layer_norm_epsilon", "tie_word_embeddings", "bos_token_id", "eos_token_id"):  # fmt: skip
        assert getattr(loaded.config, field) == getattr(model.config, field), field
    if name == "falcon":
        assert loaded.config.mixer_rms_eps == model.config.mixer_rms_eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_dtypes_come_back(dtype, tmp_path):
    model = pair("plain")[0].to(dtype)
    model.save_gguf(tmp_path / "m.gguf")
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert loaded.dtype == dtype
    for key, value in model.state_dict().items():
        if not key.endswith("A_log"):
            assert torch.equal(loaded.state_dict()[key], value), key


@pytest.mark.parametrize(("dtype", "format"), [("q8_0", "int8"), ("q4_0", "int4")])
def test_blocks_run_packed(dtype, format, folder, tmp_path):
    """No weight is widened, and the logits are those of the same numbers in plain layers."""
    convert(folder, tmp_path / "m.gguf", "gguf", dtype)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    layers = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 3 * loaded.config.num_hidden_layers + 1
    assert {(layer.format, layer.group) for layer in layers} == {(format, 32)}
    assert loaded.config.quantization_config == {"quant_method": "mambakit", "format": format, "group": 32}
    header = read_header(tmp_path / "m.gguf")
    stored = header.tensors["blk.0.ssm_in.weight"]
    assert torch.equal(
        loaded.backbone.layers[0].mixer.in_proj.packed.dequantized(),
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf").dequantize().backbone.layers[0]
        .mixer.in_proj.weight,
    )  # fmt: skip
    assert stored.type.name == dtype.upper()
    ids = tokens(1, 20, 300)
    packed = logits(loaded, ids)
    # 20 rows multiply widened weights: only sums differ. A decode step rounds activations to 16 bits.
    assert worst(packed, logits(loaded.dequantize(), ids)) < 1e-5
    loaded.save_gguf(tmp_path / "again.gguf", dtype)
    again = read_header(tmp_path / "again.gguf")
    assert again.bytes_of("blk.0.ssm_in.weight").tobytes() == header.bytes_of("blk.0.ssm_in.weight").tobytes()


def mixed_file(path: Path, tied: bool, large: dict[str, types.BlockType]) -> None:
    """A random model with tensors of several types, as llama.cpp's quantiser writes them."""
    torch.manual_seed(0)
    fields = {"hidden_size": 256, "num_hidden_layers": 2, "vocab_size": 64, "tie_word_embeddings": tied}
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(**fields, initializer_range=0.1))
    model.save_gguf(path)
    header = read_header(path)
    tensors = {}
    for name, place in header.tensors.items():
        kind = next((k for k in large if k in name and len(place.shape) == 2), None)
        type = place.type if kind is None else large[kind]
        if type.name in ("Q4_K", "Q5_K", "Q6_K", "Q5_0"):  # no quantiser here: any bits, with small scales
            raw = random_blocks(type.name, place.shape[0] * place.shape[1] // type.numbers, seed=len(name))
            raw = _small(type, raw)
        else:
            value = torch.from_numpy(header.bytes_of(name)).view(torch.float32).view(place.shape)
            raw = bytes_of(value, type)
        tensors[name] = (place.shape, type, lambda raw=raw: raw)
    write_file(path.with_name("new.gguf"), {**header.metadata, "general.file_type": 15}, tensors)
    path.with_name("new.gguf").replace(path)


def _small(type: types.BlockType, raw: bytes) -> bytes:
    blocks = torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(-1, type.bytes)
    for at in (208,) if type.name == "Q6_K" else (0, 2) if type.name.endswith("K") else (0,):
        blocks[:, at : at + 2] = torch.full((len(blocks), 1), 3e-4).half().view(torch.uint8)
    return blocks.numpy().tobytes()


MIXED = {
    "Q8_0 with a tied Q6_K head": (True, {"token_embd": types.Q6_K, "ssm_in": types.Q8_0, "ssm_out": types.Q8_0}),
    "Q4_0 with a Q6_K head": (False, {"output.w": types.Q6_K, "token_embd": types.Q4_0, "ssm_in": types.Q4_0,
                                      "ssm_out": types.Q4_0, "ssm_x": types.Q4_0}),
    "Q4_0 with a tied Q8_0 head": (True, {"token_embd": types.Q8_0, "ssm_in": types.Q4_0, "ssm_x": types.Q4_0}),
    "K types": (True, {"token_embd": types.Q6_K, "ssm_in": types.Q4_K, "ssm_out": types.Q5_K, "ssm_x": types.Q5_0}),
}  # fmt: skip


@pytest.mark.parametrize("case", MIXED)
def test_files_of_several_types(case, tmp_path):
    tied, large = MIXED[case]
    path = tmp_path / "m.gguf"
    mixed_file(path, tied, large)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(path)
    packed = {k for k, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
    runs = {types.Q8_0, types.Q4_0}
    expected = {
        f"backbone.layers.{i}.mixer.{layer}"
        for i in range(2) for layer, key in (("in_proj", "ssm_in"), ("x_proj", "ssm_x"), ("out_proj", "ssm_out"))
        if large.get(key) in runs
    }  # fmt: skip
    if large["token_embd" if tied else "output.w"] in runs:
        expected.add("lm_head")
    assert packed == expected
    assert describe(path).parameters == loaded.num_parameters()
    ids = tokens(2, 9, 64)
    before = logits(loaded, ids)
    assert torch.isfinite(before).all()
    cache = loaded.generate(ids[:1], max_new_tokens=5, do_sample=False)
    assert cache.shape == (1, 14)

    loaded.save_pretrained(tmp_path / "saved")  # the packed format holds what is mixed, too
    again = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert {k for k, m in again.named_modules() if isinstance(m, QuantizedLinear)} == expected
    assert torch.equal(logits(again, ids), before)
    assert describe(tmp_path / "saved").parameters == loaded.num_parameters()
    base = mambakit.AutoModel.from_pretrained(path)
    assert torch.equal(
        base(ids).last_hidden_state, mambakit.AutoModel.from_pretrained(tmp_path / "saved")(ids).last_hidden_state
    )

    if packed:
        loaded.dequantize()
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert worst(logits(loaded, ids), before) < 1e-5
    loaded.save_pretrained(tmp_path / "plain")
    plain = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(logits(plain, ids), logits(loaded, ids))


def test_a_packed_file_is_decoded_by_the_native_library(folder, tmp_path):
    convert(folder, tmp_path / "m.gguf", "gguf", "q8_0")
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert choose(model, 1).name == "native library (CPU)"


def test_a_file_in_a_folder(folder, tmp_path):
    """transformers' ``gguf_file``."""
    convert(folder, tmp_path / "a" / "m.gguf", "gguf")
    model = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "a", gguf_file="m.gguf")
    ids = tokens(1, 5, 300)
    assert worst(logits(model, ids), logits(mambakit.AutoModelForCausalLM.from_pretrained(folder), ids)) < 1e-5
    assert mambakit.AutoTokenizer.from_pretrained(tmp_path / "a", gguf_file="m.gguf")("The cat").input_ids
    assert mambakit.AutoConfig.from_pretrained(tmp_path / "a", gguf_file="m.gguf").hidden_size == 64
    with pytest.raises(CheckpointError, match=r"no config.json in .*; name the file \(.*m\.gguf\)"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="there is no file .*other.gguf"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "a", gguf_file="other.gguf")
    with pytest.raises(CheckpointError, match="there is no file .*other.gguf"):
        mambakit.AutoModelForCausalLM.from_pretrained(str(tmp_path / "other.gguf"))
    with pytest.raises(CheckpointError, match=r"there is no file other.gguf; give one that is here, or one on the hub"):
        mambakit.AutoModelForCausalLM.from_pretrained("other.gguf")


def test_a_classifier_on_a_file(folder, tmp_path):
    convert(folder, tmp_path / "m.gguf", "gguf")
    model = mambakit.AutoModelForSequenceClassification.from_pretrained(tmp_path / "m.gguf", num_labels=3)
    assert model(tokens(2, 5, 300)).logits.shape == (2, 3)


def test_commands(folder, tmp_path, capsys):
    file = str(tmp_path / "m.gguf")
    assert main(["convert", str(folder), file, "--dtype", "q8_0"]) == 0
    assert main(["info", file, "--json"]) == 0
    info = json.loads(capsys.readouterr().out.partition("\n")[2])
    assert (info["format"], info["architecture"], info["tokenizer"]) == ("gguf", "Mamba", True)
    assert info["dtypes"]["Q8_0"] > 0
    assert main(["generate", "The cat", "--model", file, "--max-new-tokens", "4"]) == 0
    assert capsys.readouterr().out
    assert main(["convert", file, str(tmp_path / "back")]) == 0
    assert describe(tmp_path / "back").format == "transformers"
    assert describe(tmp_path / "back").tokenizer
    assert main(["quantize", file, str(tmp_path / "int4"), "--to", "int4"]) == 0
    assert describe(tmp_path / "int4").tokenizer


def test_what_cannot_be_written(folder, tmp_path):
    file = tmp_path / "m.gguf"
    for name, message in {
        "use_bias": "use_bias is True", "expand_3": "expand is 3", "gelu": "hidden_act is 'gelu'",
    }.items():  # fmt: skip
        with pytest.raises(CheckpointError, match=message):
            pair(name)[0].save_gguf(file)
    model = pair("plain")[0]
    with pytest.raises(ValueError, match="type is Q3_K; choose one of F32"):
        model.save_gguf(file, "Q3_K")
    with pytest.raises(CheckpointError, match="the model's are packed"):
        pair("plain")[0].quantize("int8").save_gguf(file)
    with pytest.raises(CheckpointError, match="causal language models"):
        mambakit.MambaModel(model.config).save_gguf(file)
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] = 1e6
    with pytest.raises(CheckpointError, match="in_proj.weight has 1e.06, and F16 holds at most 65504"):
        model.save_gguf(file, "F16")
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="not finite"):
        model.save_gguf(file)
    assert not list(tmp_path.iterdir())
    for target, message in {"m.bin": "ends with .gguf", "": "target is empty"}.items():
        with pytest.raises(ValueError, match=message):
            convert(folder, tmp_path / target if target else "", "gguf")
    with pytest.raises(ValueError, match="which a GGUF file alone has"):
        convert(folder, tmp_path / "x", "transformers", "q8_0")
    convert(folder, file, "gguf")
    with pytest.raises(ValueError, match="exists; name a new file"):
        convert(folder, file, "gguf")
    with pytest.raises(ValueError, match="a GGUF file's name"):
        convert(folder, tmp_path / "y.gguf", "transformers")


def test_a_model_without_a_convolution_bias_is_written_with_zeros(tmp_path):
    """llama.cpp asks for the tensor."""
    model = pair("no_conv_bias")[0]
    model.save_gguf(tmp_path / "m.gguf")
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "m.gguf")
    assert not loaded.backbone.layers[0].mixer.conv1d.bias.any()
    ids = tokens(1, 9)
    assert worst(logits(loaded, ids), logits(model, ids)) < 1e-5


def test_names_both_ways():
    for name in pair("use_bias")[0].state_dict():
        assert names.name_in_model(names.name_in_file(name)) == name
    assert names.name_in_model("blk.0.attn_q.weight") == "blk.0.attn_q.weight"
