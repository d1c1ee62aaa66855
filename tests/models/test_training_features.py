"""What training leans on: checkpointing, casts, LoRA, compile, export, classification, the mixer alone."""

from __future__ import annotations

import pytest
import torch

import mambakit
from tests.models.configurations import BASE, pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")


def test_gradient_checkpointing_gives_the_same_gradients():
    model = pair("use_bias")[0].train()
    ids = tokens(2, 11)
    model(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_keeps_the_recurrence_in_float32(dtype):
    model = pair("plain")[0]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.to(dtype)
    for name, parameter in model.named_parameters():
        kept = name.endswith(("A_log", ".D", "dt_proj.bias"))
        assert parameter.dtype == (torch.float32 if kept else dtype), name
        if kept:
            assert torch.equal(parameter, before[name])
    out = model(tokens(2, 9), use_cache=True)
    assert out.logits.dtype == torch.float32
    assert out.cache_params.conv_states.dtype == dtype
    assert out.cache_params.ssm_states.dtype == torch.float32
    assert model.double().backbone.layers[0].mixer.A_log.dtype == torch.float64


def test_bfloat16_is_close_to_float64():
    model = pair("plain")[0].bfloat16()
    ids = tokens(2, 33)
    with torch.no_grad():
        half = model(ids).logits
        exact = model.double()(ids).logits
    assert (half - exact).norm() / exact.norm() < 2e-2


def test_autocast_trains_with_float32_masters():
    model = pair("plain")[0].train()
    ids = tokens(2, 11)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
    out.loss.backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    exact = model(ids, labels=ids).loss
    assert abs(out.loss - exact) < 3e-2 * exact


@pytest.mark.parametrize("target", ["in_proj", "x_proj", "dt_proj"])
def test_lora_through_peft_acts_trains_and_merges(target):
    peft = pytest.importorskip("peft")
    model = pair("use_bias")[0]
    ids = tokens(2, 7)
    base = model(ids).logits.detach()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=[target], task_type="CAUSAL_LM"))
    _require_lora_acts(adapted, ids, base)
    out = adapted(ids).logits
    assert worst(adapted.merge_and_unload()(ids).logits, out) < 1e-5


@pytest.mark.parametrize("target", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_lora_injected_into_the_layers_acts_on_every_linear_layer(target):
    """PEFT refuses out_proj by the model type, since transformers' fused path bypasses it there; ours does not."""
    peft = pytest.importorskip("peft")
    model = pair("use_bias")[0]
    ids = tokens(2, 7)
    base = model(ids).logits.detach()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=[target]), model.backbone.layers)
    _require_lora_acts(model, ids, base)
    out = model(ids).logits
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
    assert worst(model(ids).logits, out) < 1e-5


def _require_lora_acts(model, ids, base):
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    out = model(ids, labels=ids)
    assert worst(out.logits, base) > 1e-4
    out.loss.backward()
    grads = [p.grad for n, p in model.named_parameters() if "lora_" in n]
    assert grads
    assert all(g is not None and g.abs().max() > 0 for g in grads)


def test_a_linear_replacement_that_adds_its_own_bias_is_not_biased_twice():
    model = pair("plain")[0]
    ids = tokens(1, 7)
    expected = model(ids).logits
    for block in model.backbone.layers:
        old = block.mixer.dt_proj
        plain = torch.nn.Linear(old.in_features, old.out_features)
        plain.load_state_dict(old.state_dict())
        block.mixer.dt_proj = plain
    assert worst(model(ids).logits, expected) < 1e-5


def test_transformers_trainer(tmp_path):
    """Trainer and accelerate, unchanged: padding, accumulation with num_items_in_batch, checkpointing of
    activations."""
    pytest.importorskip("accelerate")
    import transformers

    model = pair("plain")[0].train()
    rows = [tokens(1, n)[0] for n in (9, 5, 7, 9)] * 4

    def collate(batch):
        width = max(len(row) for row in batch)
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row))) for row in batch])
        mask = torch.stack([(torch.arange(width) < len(row)).long() for row in batch])
        return {"input_ids": ids, "attention_mask": mask, "labels": ids}

    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=12, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        learning_rate=1e-2, logging_steps=1, report_to=[], use_cpu=True, gradient_checkpointing=True, save_steps=6,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < 0.9 * losses[0]
    again = mambakit.MambaForCausalLM.from_pretrained(tmp_path / "checkpoint-12")
    assert torch.equal(again.backbone.norm_f.weight, model.backbone.norm_f.weight)


def test_transformers_trainer_compiles(tmp_path):
    """``torch_compile_mode``: on a CPU the mode captures nothing, and the step is the same."""
    pytest.importorskip("accelerate")
    import transformers

    rows = [{"input_ids": row, "labels": row} for row in tokens(8, 9)]
    losses = {}
    for mode in (None, "reduce-overhead"):
        torch.manual_seed(0)
        torch._dynamo.reset()
        config = mambakit.MambaConfig(vocab_size=61, hidden_size=8, state_size=4, num_hidden_layers=1)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, logging_steps=1,
            report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, torch_compile_mode=mode, seed=1,
        )  # fmt: skip
        trainer = transformers.Trainer(mambakit.MambaForCausalLM(config), arguments, train_dataset=rows)
        trainer.train()
        losses[mode] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert arguments.torch_compile
    assert losses["reduce-overhead"] == pytest.approx(losses[None], rel=1e-4)
    torch._dynamo.reset()


def test_compile_fullgraph():
    model = pair("plain")[0]
    ids = tokens(2, 13)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert worst(compiled(ids, use_cache=False).logits, model(ids).logits) < 1e-5
    model.train()
    compiled(ids, labels=ids).loss.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert worst(grads[name], parameter.grad) < 1e-4, name


def test_compile_fullgraph_with_a_cache():
    model = pair("plain")[0]
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    ids = tokens(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        cache = model.backbone.new_cache(2)
        parts = [compiled(ids[:, t : t + 1], cache_params=cache).logits for t in range(6)]
    assert worst(torch.cat(parts, 1), expected) < 1e-5


def test_export_with_a_dynamic_length_does_not_grow():
    class Logits(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    model = pair("plain")[0]
    sizes = []
    for length in (16, 64):
        program = torch.export.export(
            Logits(model), (tokens(1, length),), dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2)}}
        )
        sizes.append(len(program.graph.nodes))
        other = tokens(1, 37)
        assert worst(program.module()(other), model(other).logits) < 1e-5
    assert sizes[0] == sizes[1]


def test_classification_pools_on_the_last_real_token():
    config = mambakit.MambaConfig(**BASE, num_labels=3)
    model = mambakit.MambaForSequenceClassification(config).eval()
    ids = tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    mask[1, :4] = 0
    logits = model(ids, attention_mask=mask).logits
    for row, cut in enumerate((slice(0, 5), slice(4, 9), slice(0, 9))):
        assert worst(logits[row], model(ids[row : row + 1, cut]).logits[0]) < 1e-5
    padded = ids.clone()
    padded[0, 5:] = config.pad_token_id
    assert worst(model(padded).logits[0], logits[0]) < 1e-5
    labels = torch.tensor([0, 2, 1])
    out = model(ids, attention_mask=mask, labels=labels)
    assert worst(out.loss, torch.nn.functional.cross_entropy(logits, labels)) < 1e-6
    with pytest.raises(ValueError, match="no real token"):
        model(ids, attention_mask=torch.zeros_like(ids))


def test_classification_losses():
    model = mambakit.MambaForSequenceClassification(mambakit.MambaConfig(**BASE, num_labels=1)).eval()
    ids, target = tokens(2, 4), torch.tensor([0.5, -1.0])
    out = model(ids, labels=target)
    assert worst(out.loss, (out.logits[:, 0] - target).square().mean()) < 1e-6
    model = mambakit.MambaForSequenceClassification(mambakit.MambaConfig(**BASE, num_labels=3)).eval()
    many = torch.tensor([[1.0, 0, 1], [0, 0, 1]])
    out = model(ids, labels=many)
    assert worst(out.loss, torch.nn.functional.binary_cross_entropy_with_logits(out.logits, many)) < 1e-6


def test_the_mixer_alone():
    config = mambakit.MambaConfig(hidden_size=16, num_hidden_layers=1)
    mixer = mambakit.MambaMixer(config)
    x = torch.randn(2, 10, 16)
    whole = mixer(x)
    cache = mambakit.MambaCache(config, 2)
    parts = [mixer(x[:, a:b], cache) for a, b in ((0, 4), (4, 5), (5, 10))]
    assert worst(torch.cat(parts, 1), whole) < 1e-5


def test_unknown_activation_and_bad_fields():
    with pytest.raises(ValueError, match="hidden_act 'sliu' is not known"):
        mambakit.MambaModel(mambakit.MambaConfig(**{**BASE, "hidden_act": "sliu"}))
    with pytest.raises(ValueError, match="conv_kernel is 0"):
        mambakit.MambaConfig(conv_kernel=0)
    with pytest.raises(ValueError, match="time_step_init_scheme"):
        mambakit.MambaConfig(time_step_init_scheme="uniform")
