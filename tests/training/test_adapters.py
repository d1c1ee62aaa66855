"""PEFT's methods on Mamba: merged weights give the results of active adapters, and folders load as in PEFT."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from safetensors.torch import load_file

from mambakit.training.lora import add_adapters, load_adapters, merge_adapters, save_adapters
from tests.models.configurations import pair, tokens, worst

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")
LINEAR = ["in_proj", "x_proj", "dt_proj"]  # out_proj, too, where mambakit injects: PEFT refuses it for the model type
METHODS = {
    "lora": lambda t: peft.LoraConfig(r=3, target_modules=t),
    "rslora": lambda t: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=t),
    "dora": lambda t: peft.LoraConfig(r=3, use_dora=True, target_modules=t),
    "dora_rslora": lambda t: peft.LoraConfig(r=3, use_dora=True, use_rslora=True, target_modules=t),
    "lora_bias": lambda t: peft.LoraConfig(r=3, lora_bias=True, target_modules=["dt_proj"]),
    "bias_all": lambda t: peft.LoraConfig(r=3, bias="all", target_modules=t),
    "bias_lora_only": lambda t: peft.LoraConfig(r=3, bias="lora_only", target_modules=t),
    "patterns": lambda t: peft.LoraConfig(
        r=3,
        target_modules=t,
        rank_pattern={"x_proj": 2, "layers.0.mixer.dt_proj": 1},
        alpha_pattern={"in_proj": 32, "dt_proj": 1},
    ),
    "some_layers": lambda t: peft.LoraConfig(r=3, target_modules=t, layers_to_transform=[1], layers_pattern="layers"),
    "exclude": lambda t: peft.LoraConfig(r=3, target_modules=t, exclude_modules=["x_proj"]),
    "regex": lambda t: peft.LoraConfig(r=3, target_modules=r".*layers\.[01]\.mixer\.(dt|x)_proj"),
    "all_linear": lambda t: peft.LoraConfig(r=3, target_modules=r".*(in_proj|dt_proj)"),
    "head_saved": lambda t: peft.LoraConfig(r=3, target_modules=t, modules_to_save=["lm_head"]),
    "norms_saved": lambda t: peft.LoraConfig(r=3, target_modules=t, modules_to_save=["norm_f"]),
    "embeddings": lambda t: peft.LoraConfig(r=3, target_modules=["embeddings", "in_proj"]),
    "fan_in_fan_out": lambda t: peft.LoraConfig(r=3, fan_in_fan_out=True, target_modules=t),
    "gaussian": lambda t: peft.LoraConfig(r=3, init_lora_weights="gaussian", target_modules=t),
    "pissa": lambda t: peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=t),
    "olora": lambda t: peft.LoraConfig(r=2, init_lora_weights="olora", target_modules=t),
    "ia3": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=[]),
    "ia3_inputs": lambda t: peft.IA3Config(target_modules=t, feedforward_modules=["x_proj", "dt_proj"]),
    "loha": lambda t: peft.LoHaConfig(r=3, target_modules=t),
    "lokr": lambda t: peft.LoKrConfig(r=3, target_modules=t),
    "oft": lambda t: peft.OFTConfig(r=0, oft_block_size=2, target_modules=t),
    "boft": lambda t: peft.BOFTConfig(boft_block_size=2, target_modules=t),
    "vera": lambda t: peft.VeraConfig(r=3, target_modules=["dt_proj"]),
    "adalora": lambda t: peft.AdaLoraConfig(total_step=10, target_modules=t),
    "fourierft": lambda t: peft.FourierFTConfig(n_frequency=20, target_modules=t),
    "hra": lambda t: peft.HRAConfig(r=2, target_modules=t),
    "ln_tuning": lambda t: peft.LNTuningConfig(target_modules=["norm"]),
}  # fmt: skip
# PEFT keeps a part of these on the tuner, which injection into layers leaves out; or their merging needs a PeftModel.
WITH_PEFT_ALONE = {"vera"}


def moved(model) -> set[str]:
    """Give everything that learns another value; the names."""
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in learning:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return learning


@pytest.mark.parametrize("variant, method", [
    *(("plain", method) for method in METHODS if method != "embeddings"),  # tied to the head here
    *(("falcon_odd", method) for method in ("lora", "dora", "bias_all", "ia3", "embeddings")),
])  # fmt: skip
def test_merged_is_what_it_was(variant, method):
    torch.manual_seed(0)
    model, ids = pair(variant)[0], tokens(2, 9)
    with torch.no_grad():
        base = model(ids).logits
    wrapped = peft.get_peft_model(model, METHODS[method](LINEAR))
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    wrapped.train()(ids, labels=ids).loss.backward()
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                parameter.sub_(parameter.grad, alpha=0.1)
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    learning = {name for name, p in wrapped.named_parameters() if p.requires_grad}
    assert changed
    assert changed <= learning
    moved(wrapped)
    wrapped.eval()
    with torch.no_grad():
        out = wrapped(ids).logits
        assert worst(out, base) > 1e-5
        cache = wrapped(ids[:, :5], use_cache=True).cache
        assert worst(wrapped(ids[:, 5:], cache_params=cache).logits, out[:, 5:]) < 1e-4
        tokens_on = wrapped.generate(input_ids=ids, max_new_tokens=4, eos_token_id=None)
        plain = wrapped.merge_and_unload()
        assert worst(plain(ids).logits, out) < 1e-4
        assert torch.equal(plain.generate(ids, max_new_tokens=4, eos_token_id=None), tokens_on)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("autocast", [False, True])
def test_dt_proj_is_a_linear_layer(dtype, autocast):
    """Its own call adds its bias, in float32 of a half model, and the layer computes the same whoever listens."""
    if autocast and dtype == torch.float64:
        pytest.skip("autocast runs no float64 model")
    torch.manual_seed(0)
    model, ids = pair("plain")[0].to(dtype), tokens(2, 9)
    projection = model.backbone.layers[0].mixer.dt_proj
    x = torch.randn(2, 3, projection.in_features, dtype=dtype)
    expected = torch.nn.functional.linear(x.double(), projection.weight.double(), projection.bias.double())
    assert worst(projection(x), expected) < (1e-2 if dtype == torch.bfloat16 else 1e-6)
    with torch.no_grad(), torch.autocast("cpu", enabled=autocast):
        out = model(ids).logits
        seen = []
        for block in model.backbone.layers:
            block.mixer.dt_proj.register_forward_hook(lambda _, inputs, output: seen.append(output))
        heard = model(ids).logits
    assert len(seen) == len(model.backbone.layers)
    assert worst(heard, out) < 1e-6 if dtype != torch.bfloat16 and not autocast else worst(heard, out) < 2e-2


def test_a_half_model_with_adapters_keeps_the_steps():
    """bfloat16 has 8 bits: a bias of -5 rounded with the product would move a step by up to 2 per cent."""
    torch.manual_seed(0)
    model, ids = pair("plain")[0], tokens(2, 64)
    with torch.no_grad():
        for block in model.backbone.layers:
            block.mixer.dt_proj.bias.sub_(3.0)
    model.bfloat16()
    with torch.no_grad():
        plain = model(ids).logits
        add_adapters(model, 2, 0.0, ["dt_proj"])  # which do nothing yet
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("method", sorted(METHODS.keys() - WITH_PEFT_ALONE))
def test_folders_of_peft(method, tmp_path):
    """Injected as PEFT itself does it: equal logits, then merged, then saved and loaded again."""
    torch.manual_seed(0)
    base, ids = pair("untied")[0], tokens(2, 9)
    wrapped = peft.get_peft_model(copy.deepcopy(base), METHODS[method](LINEAR))
    moved(wrapped)
    wrapped.eval().save_pretrained(tmp_path / "peft")
    reference = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft").eval()
    ours = copy.deepcopy(base)
    load_adapters(ours, tmp_path / "peft")
    with torch.no_grad():
        expected = reference(ids).logits
        assert worst(ours.eval()(ids).logits, expected) < 1e-5
        if method not in ("pissa", "olora"):  # which change the base weights while they are put on
            save_adapters(ours, tmp_path / "again")
            again = copy.deepcopy(base)
            load_adapters(again, tmp_path / "again")
            assert worst(again.eval()(ids).logits, expected) < 1e-5
        merge_adapters(ours)
        assert [type(m) for m in ours.modules()] == [type(m) for m in base.modules()]
        assert worst(ours(ids).logits, expected) < 1e-4


@pytest.mark.parametrize("targets", [["out_proj"], ["out_proj", "dt_proj"], ["lm_head", "out_proj"]])
def test_targets_that_peft_refuses_for_mamba(targets, tmp_path):
    """As trained on another library's model; transformers' fused path would pass by out_proj, ours does not."""
    torch.manual_seed(0)
    model, ids = pair("untied")[0], tokens(2, 9)
    base = copy.deepcopy(model)
    bare = torch.nn.Module()
    bare.backbone, bare.lm_head = model.backbone, model.lm_head
    config = peft.LoraConfig(r=2, target_modules=targets, alpha_pattern={"out_proj": 64})
    peft.inject_adapter_in_model(config, bare)
    model.lm_head = bare.lm_head
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    from safetensors.torch import save_file

    (tmp_path / "a").mkdir()
    state = peft.get_peft_model_state_dict(bare)
    save_file(
        {"base_model.model." + n: t.contiguous() for n, t in state.items()}, tmp_path / "a/adapter_model.safetensors"
    )
    config.save_pretrained(tmp_path / "a")
    load_adapters(base, tmp_path / "a")
    with torch.no_grad():
        assert worst(base(ids).logits, model(ids).logits) < 1e-5
        merge_adapters(base)
        assert worst(base(ids).logits, model(ids).logits) < 1e-4


@pytest.mark.parametrize("variant", ["untied", "plain"])
def test_adapters_on_the_head(variant, tmp_path):
    """PEFT saves the head's own weights beside them."""
    torch.manual_seed(0)
    base, ids = pair(variant)[0], tokens(2, 9)
    wrapped = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=3, target_modules=["lm_head", "in_proj"]))
    moved(wrapped)
    wrapped.eval().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    assert "base_model.model.lm_head.base_layer.weight" in stored
    ours = copy.deepcopy(base)
    load_adapters(ours, tmp_path)
    with torch.no_grad():
        assert worst(ours.eval()(ids).logits, wrapped(ids).logits) < 1e-5


def test_what_is_refused(tmp_path):
    model = pair("plain")[0]
    peft.get_peft_model(
        copy.deepcopy(model),
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2, num_attention_heads=1),
    ).save_pretrained(tmp_path / "prompt")
    with pytest.raises(ValueError, match="PROMPT_TUNING adapters put tokens before the text"):
        load_adapters(model, tmp_path / "prompt")
    wrapped = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["in_proj"]))
    wrapped.save_pretrained(tmp_path / "lora")
    path = tmp_path / "lora/adapter_config.json"
    fields = json.loads(path.read_text())
    for change in (
        {"target_modules": ["x_proj"]}, {"r": 3}, {"target_modules": ["q_proj"]}, {"layers_to_transform": [0]},
        {"use_dora": True}, {"rank_pattern": {"in_proj": 5}},
    ):  # fmt: skip
        path.write_text(json.dumps({**fields, **change}))
        with pytest.raises(ValueError, match="do not fit the model|PEFT cannot put them"):
            load_adapters(pair("plain")[0], tmp_path / "lora")
    path.write_text(json.dumps(fields))
    load_adapters(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="has adapters already"):
        load_adapters(model, tmp_path / "lora")
    with pytest.raises(ValueError, match="has adapters already"):
        add_adapters(model, 2, 0.0, ["in_proj"])
    merge_adapters(model)
    add_adapters(model, 2, 0.0, ["in_proj"])


@pytest.mark.parametrize("start", [True, False, "pissa"])
def test_a_model_whose_adapters_were_refused_is_what_it_was(start, tmp_path):
    """Also where PEFT takes the new adapters out of the weights, or starts them at random."""
    torch.manual_seed(0)
    model, ids = pair("untied")[0], tokens(2, 9)
    config = peft.LoraConfig(r=2, target_modules=["in_proj"], modules_to_save=["norm_f"])
    peft.get_peft_model(copy.deepcopy(model), config).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "target_modules": ["in_proj", "x_proj"], "init_lora_weights": start}))
    model.backbone.embeddings.requires_grad_(False)
    before = {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}
    with torch.no_grad():
        plain = model(ids).logits
    with pytest.raises(ValueError, match="do not fit the model"):
        load_adapters(model, tmp_path)
    after = dict(model.named_parameters())
    assert before.keys() == after.keys()
    assert all(torch.equal(p, after[n]) and grad == after[n].requires_grad for n, (p, grad) in before.items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain)
    path.write_text(json.dumps(fields))
    load_adapters(model, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens is .5.; only PEFT's wrapper of a model follows it"),
        ({"arrow_config": {"top_k": 1}}, "arrow_config is .* only PEFT's wrapper"),
        (
            {"use_tomorrow": True, "peft_version": "99.0"},
            "use_tomorrow is True, a field that PEFT .* does not know .*99.0",
        ),
    ],
)
def test_fields_that_would_be_passed_by_are_refused(change, message, tmp_path):
    model = pair("plain")[0]
    peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules=["in_proj"])).save_pretrained(
        tmp_path
    )
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "not_used_yet": None, **change}))
    with pytest.raises(ValueError, match=message):
        load_adapters(model, tmp_path)
    assert not hasattr(model, "peft_config")
