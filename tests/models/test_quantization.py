"""Weight-only quantisation: close to the model it came from, smaller, saved and loaded, refused where it cannot be."""

from __future__ import annotations

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import mambakit
from mambakit.decoding.prefill import prefill
from mambakit.decoding.registry import token_step
from mambakit.generation.score import score_text
from mambakit.models.checkpoints import describe
from mambakit.modules.quantized_linear import QuantizedLinear
from tests.models.configurations import pair, tokens, worst
from tests.models.tiny import save_tiny, with_own_embeddings

pytestmark = pytest.mark.filterwarnings("ignore")
TEXT = (
    "The old man took his hat from the chair and went slowly to the door. He stood there for a moment, as though he "
    "had forgotten something, and then he turned and looked at her. 'I shall not come again,' he said."
)


@pytest.mark.parametrize(
    "argument",
    [{"output_loading_info": True}, {"max_memory": {"cpu": "1GB"}}, {"offload_folder": "aside"}],
)
def test_arguments_that_packed_weights_cannot_follow(tmp_path, argument):
    pair("plain")[0].quantize("int8").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"packed, and {next(iter(argument))} cannot be followed.*mambakit convert"):
        mambakit.MambaForCausalLM.from_pretrained(tmp_path, **argument)
    harmless = {"dtype": "float32", "device_map": "cpu", "low_cpu_mem_usage": True, "output_loading_info": False}
    assert mambakit.MambaForCausalLM.from_pretrained(tmp_path, **harmless).dtype == torch.float32


@pytest.mark.parametrize("name", ["plain", "use_bias", "untied", "odd_everything", "falcon"])
@pytest.mark.parametrize(("format", "limit"), [("int8", 2e-2), ("int4", 0.4), ("fp8", 0.1)])
@torch.no_grad()
def test_close_to_the_model(name, format, limit):
    model = pair(name)[0]
    ids = tokens(2, 24)
    exact = model(ids).logits
    model.quantize(format)
    logits = model(ids).logits
    assert 0 < (logits - exact).norm() / exact.norm() < limit
    cache = model(ids[:, :20], use_cache=True).cache_params  # more rows than the native product takes, then fewer
    step = token_step(model, cache)
    for t in range(20, 24):
        assert worst(step(ids[:, t]), logits[:, t]) < 1e-4


@pytest.mark.parametrize(("format", "limit"), [("int8", 0.01), ("int4", 0.12), ("fp8", 0.02)])
def test_the_embedded_models_bits_per_character(format, limit):
    from mambakit.assets import default_model_path

    model = mambakit.AutoModelForCausalLM.from_pretrained(default_model_path(), dtype="float32").eval()
    tokenizer = mambakit.AutoTokenizer.from_pretrained(default_model_path())
    before = score_text(model, tokenizer, TEXT).bits_per_character
    after = score_text(model.quantize(format), tokenizer, TEXT).bits_per_character
    assert abs(after - before) < limit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["plain", "use_bias", "untied", "odd_everything", "falcon"])
@torch.no_grad()
def test_lossless_packing_keeps_every_weight(name, dtype):
    model = pair(name)[0].to(dtype)
    weights = {n: m.weight.clone() for n, m in model.named_modules() if n.endswith(("_proj", "lm_head"))}
    ids = tokens(2, 24)
    exact = model(ids).logits
    model.quantize("lossless")
    packed = {n: m for n, m in model.named_modules() if isinstance(m, QuantizedLinear)}
    assert len(packed) == 3 * model.config.num_hidden_layers + 1
    for n, module in packed.items():
        assert torch.equal(module.packed.dequantized().to(dtype), weights[n])
    assert worst(model(ids).logits, exact) < (
        1e-5 if dtype == torch.float32 else 5e-2
    )  # products round in other places
    generated = model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated.shape == (1, 11)


def test_lossless_lists_are_checked(tmp_path):
    model = pair("plain")[0]
    with torch.no_grad():
        model.backbone.layers[0].mixer.in_proj.weight[2, 3] = 1e-20  # a weight for the list
    model.quantize("lossless").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    name = "backbone.layers.0.mixer.in_proj.columns"
    assert 3 in tensors[name].tolist()
    tensors[name] += 1000
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(mambakit.CheckpointError, match="list of single weights is damaged"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "lossless"])
@pytest.mark.parametrize("name", ["plain", "use_bias", "falcon"])
@torch.no_grad()
def test_saved_and_loaded(name, format, tmp_path):
    model = pair(name)[0].quantize(format, 32 if format in ("int8", "int4") else None)
    model.save_pretrained(tmp_path)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    plain = pair(name)[0]
    described = describe(tmp_path)
    assert described.parameters == sum(p.numel() for p in plain.parameters())  # of the model, not of the bytes
    kinds = ("in_proj", "x_proj", "out_proj", "lm_head")
    packed = sum(m.weight.numel() for n, m in plain.named_modules() if n.endswith(kinds))
    assert described.dtypes["lossless32" if format == "lossless" else format] == packed
    assert described.state_bytes == model.backbone.new_cache(1).nbytes
    assert loaded.name_or_path == str(tmp_path)
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    half = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    layer = half.backbone.layers[0].mixer.in_proj
    assert isinstance(layer, QuantizedLinear)
    kept = layer.values if format == "lossless" else layer.scales
    assert kept.dtype == half.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert half.backbone.embeddings.weight.dtype == torch.bfloat16


def test_on_loading(tmp_path):
    model = save_tiny(tmp_path)
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, quantization="int8")
    assert isinstance(loaded.lm_head, QuantizedLinear)
    ids = tokens(1, 5)
    assert torch.equal(loaded(ids).logits, model.quantize("int8")(ids).logits)
    stored = sum(b.nbytes for b in loaded.backbone.layers[0].mixer.in_proj.buffers())
    assert stored < 0.35 * 2 * 48 * 24 * 4


def test_what_is_refused(tmp_path):
    model = pair("plain")[0]
    with pytest.raises(ValueError, match="'int3'; choose one of int8, int4, fp8, lossless"):
        model.quantize("int3")
    with pytest.raises(ValueError, match="group is 48"):
        model.quantize("int8", 48)
    with pytest.raises(ValueError, match="these weights are torch.float16"):
        pair("plain")[0].half().quantize("lossless")
    model.backbone.layers[1].mixer.in_proj = torch.nn.Identity()
    with pytest.raises(ValueError, match="in_proj is a Identity, not a plain linear layer; merge adapters first"):
        model.quantize("int8")
    model = pair("plain")[0].quantize("int8")
    with pytest.raises(mambakit.CheckpointError, match=r"the model's are packed; dequantize\(\) it first"):
        model.save_original(tmp_path)
    model.save_pretrained(tmp_path)
    with pytest.raises(mambakit.CheckpointError, match="quantise the original checkpoint again"):
        mambakit.MambaForCausalLM.from_pretrained(tmp_path, hidden_size=48)
    with pytest.raises(ValueError, match="device_map names 2 devices; a quantised model lies on one"):
        mambakit.MambaForCausalLM.from_pretrained(tmp_path, device_map={"backbone": "cpu", "lm_head": "meta"})
    assert mambakit.MambaForCausalLM.from_pretrained(tmp_path, device_map={"": "meta"}).device.type == "meta"


@torch.no_grad()
def test_layers_packed_by_hand(tmp_path):
    """In a plain model: what needs plain weights says so, and the model is quantised and dequantised whole."""
    model, ids = pair("plain")[0], tokens(2, 9)
    mixer = model.backbone.layers[1].mixer
    mixer.in_proj = QuantizedLinear.from_linear(mixer.in_proj, "int4", 128)
    before = model(ids).logits
    with pytest.raises(ValueError, match="layers.1.mixer.in_proj is int4, groups of 128, and config.* says plain"):
        model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"weights are packed \(int4\); call model.dequantize\(\) first"):
        model.resize_token_embeddings(70)
    for save in (model.save_original, model.save_gguf):
        with pytest.raises(mambakit.CheckpointError, match=r"the model's are packed; dequantize\(\) it first"):
            save(tmp_path / "other")
    again = copy.deepcopy(model).quantize("int8")
    assert again.backbone.layers[1].mixer.in_proj.format == "int8"
    again.save_pretrained(tmp_path / "int8")
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    assert torch.equal(loaded(ids).logits, again(ids).logits)
    plain = model.dequantize()
    assert worst(plain(ids).logits, before) < 1e-4
    plain.save_pretrained(tmp_path / "plain")
    assert torch.equal(mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("replaced", ["plain", "int4", "group"])
def test_layers_of_another_kind_than_the_configuration_says(replaced, tmp_path):
    model = pair("plain")[0].quantize("int8", 64)
    mixer = model.backbone.layers[0].mixer
    plain = mixer.out_proj.dequantized(torch.float32)
    kinds = {"int4": ("int4", 64), "group": ("int8", 128)}
    mixer.out_proj = QuantizedLinear.from_linear(plain, *kinds[replaced]) if replaced in kinds else plain
    with pytest.raises(
        ValueError, match=r"layers.0.mixer.out_proj is .* says int8, groups of 64: .*model.quantize\(\)"
    ):
        model.save_pretrained(tmp_path)
    model.quantize("int8").save_pretrained(tmp_path)


def test_packed_numbers_of_another_dtype_are_refused(tmp_path):
    """int4's words of a row of 32 are as many as int8's numbers: only their dtype tells them apart."""
    model = pair("plain")[0].quantize("int8", 64)
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    stored = load_file(file)
    name = "backbone.layers.0.mixer.in_proj.data"
    save_file(stored | {name: stored[name].to(torch.int16)}, file, {"format": "pt"})
    with pytest.raises(mambakit.CheckpointError, match="of torch.int16 in the file and .* of torch.int8 in"):
        mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "lossless"])
@pytest.mark.parametrize("name", ["plain", "odd_everything", "falcon"])
@torch.no_grad()
def test_tied_embeddings_are_the_packed_heads_rows(name, format, dtype, tmp_path):
    model = pair(name)[0].to(dtype)
    before = model.backbone.embeddings.weight.clone()
    model.quantize(format, 32 if format in ("int8", "int4") else None)
    rows = model.lm_head.packed.dequantized().to(dtype)
    assert torch.equal(model.backbone.embeddings.weight, rows)
    assert torch.equal(rows, before) == (format == "lossless")
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "lm_head.data" in stored
    assert not [key for key in stored if "embeddings" in key]
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == dtype
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    wide = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32")
    assert torch.equal(wide.backbone.embeddings.weight, model.lm_head.packed.dequantized())  # not rounded on the way


@torch.no_grad()
def test_embeddings_that_are_not_the_heads_rows_are_stored(tmp_path):
    untied = pair("untied")[0]
    before = untied.backbone.embeddings.weight.clone()
    untied.quantize("int8").save_pretrained(tmp_path / "untied")
    assert torch.equal(load_file(tmp_path / "untied" / "model.safetensors")["backbone.embeddings.weight"], before)
    model, embeddings = with_own_embeddings("int8")
    model.save_pretrained(tmp_path / "own")
    loaded = mambakit.AutoModelForCausalLM.from_pretrained(tmp_path / "own")
    assert torch.equal(loaded.backbone.embeddings.weight, embeddings)
    assert describe(tmp_path / "own").parameters == sum(p.numel() for p in pair("plain")[0].parameters())
    ids = tokens(2, 9)
    assert torch.equal(loaded(ids).logits, model(ids).logits)


@pytest.mark.parametrize("format", ["int8", "lossless"])
@torch.no_grad()
def test_base_models_and_classifiers_of_a_language_models_file(format, tmp_path):
    ids = tokens(2, 9)
    for name, model in (("tied", pair("plain")[0].quantize(format)), ("own", with_own_embeddings(format)[0])):
        model.save_pretrained(tmp_path / name)
        want = model.backbone(ids).last_hidden_state
        base = mambakit.AutoModel.from_pretrained(tmp_path / name)
        assert torch.equal(base(ids).last_hidden_state, want)
        assert not hasattr(base, "lm_head")
        with pytest.warns(UserWarning, match="holds no score.weight: it is drawn anew"):
            classifier = mambakit.AutoModelForSequenceClassification.from_pretrained(tmp_path / name, num_labels=3)
        assert torch.equal(classifier.backbone(ids).last_hidden_state, want)
        assert classifier.score.weight.any()
        classifier.save_pretrained(tmp_path / f"{name} classifier")
        again = mambakit.AutoModelForSequenceClassification.from_pretrained(tmp_path / f"{name} classifier")
        assert torch.equal(again(ids).logits, classifier(ids).logits)
        base.save_pretrained(tmp_path / f"{name} base")
        again = mambakit.AutoModel.from_pretrained(tmp_path / f"{name} base")
        assert torch.equal(again(ids).last_hidden_state, want)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("format", ["int8", "int4", "fp8", "lossless"])
@torch.no_grad()
def test_prompts_and_tokens_on_a_gpu(format):
    """Few rows and many, captured prompts, and steps of 1 to 20 slots, beside float64; fp8 rounds activations."""
    config = mambakit.MambaConfig(hidden_size=512, num_hidden_layers=3, vocab_size=1000)
    torch.manual_seed(0)
    model = mambakit.MambaForCausalLM(config).to("cuda", torch.bfloat16).eval().quantize(format)
    exact = copy.deepcopy(model).cpu().dequantize("float64")
    bound = 8e-2 if format == "fp8" else 2e-2
    for b, length in ((1, 20), (1, 300), (1, 700), (3, 90), (20, 40)):
        ids = torch.randint(0, 1000, (b, length + 2), device="cuda")
        want = exact(ids.cpu()).logits
        got = model(ids).logits.double().cpu()
        assert (got - want).norm() / want.norm() < bound
        for _ in range(3):  # eager, captured, replayed
            cache = model.backbone.new_cache(b)
            last = prefill(model, ids[:, :length], cache).double().cpu()
            assert (last - want[:, length - 1]).norm() / want[:, length - 1].norm() < bound
        step = token_step(model, cache)
        for t in (length, length + 1):
            logits = step(ids[:, t]).double().cpu()
            assert (logits - want[:, t]).norm() / want[:, t].norm() < bound
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # whose layers run op by op
    same = compiled(ids, use_cache=False).logits.double().cpu()
    assert (same - want).norm() / want.norm() < bound
