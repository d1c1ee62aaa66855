"""The numbers of transformers' own Mamba and FalconMamba, with the same random weights, in float32 on the CPU."""

from __future__ import annotations

import pytest
import torch

import mambakit
from tests.models.configurations import NAMES, pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("name", NAMES)
def test_logits_loss_hidden_states_and_cache(name):
    ours, theirs = pair(name)
    ids = tokens(2, 19)
    with torch.no_grad():
        a = ours(ids, labels=ids, output_hidden_states=True, use_cache=True)
        b = theirs(ids, labels=ids, output_hidden_states=True, use_cache=True)
    assert worst(a.logits, b.logits) < 1e-5
    assert worst(a.loss, b.loss) < 1e-5
    assert len(a.hidden_states) == len(b.hidden_states) == ours.config.num_hidden_layers + 1
    for x, y in zip(a.hidden_states, b.hidden_states, strict=True):
        assert worst(x, y) < 1e-5
    k = ours.config.conv_kernel
    for i, layer in enumerate(b.cache_params.layers):
        # transformers keeps k inputs, of which the oldest is never used again.
        assert worst(a.cache_params.conv_states[i], layer.conv_states[0][..., -(k - 1) :]) < 1e-5
        assert worst(a.cache_params.ssm_states[i], layer.recurrent_states[0]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_every_gradient(name):
    ours, theirs = pair(name)
    ids = tokens(2, 19)
    ours.train()
    theirs.train()
    ours(ids, labels=ids).loss.backward()
    theirs(ids, labels=ids).loss.backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for n, p in ours.named_parameters():
        assert p.grad is not None, n
        assert worst(p.grad, expected[n]) < 1e-4, n


@pytest.mark.parametrize("name", NAMES)
def test_greedy_generation(name):
    ours, theirs = pair(name)
    ids = tokens(2, 9)
    a = ours.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    b = theirs.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["plain", "use_bias", "falcon"])
def test_left_padding_where_transformers_is_right(name):
    ours, theirs = pair(name)
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        a = ours(ids, attention_mask=mask).logits
        alone = ours(ids[1:, 5:]).logits
        assert worst(a[1, 5:], alone[0]) < 1e-5
        if not ours.config.use_bias:  # with use_bias transformers lets the bias of padding enter the state
            b = theirs(ids, attention_mask=mask).logits
            assert worst(a[0], b[0]) < 1e-5
            assert worst(a[1, 5:], b[1, 5:]) < 1e-5


def test_num_items_in_batch_inputs_embeds_and_logits_to_keep():
    ours, theirs = pair("plain")
    ids = tokens(2, 9)
    a = ours(ids, labels=ids, num_items_in_batch=torch.tensor(5))
    b = theirs(ids, labels=ids, num_items_in_batch=torch.tensor(5))
    assert worst(a.loss, b.loss) < 1e-6
    embeds = ours.get_input_embeddings()(ids)
    assert torch.equal(ours(inputs_embeds=embeds).logits, ours(ids).logits)
    full = ours(ids).logits
    # To rounding: a product of fewer rows may sum in another order on some processors.
    assert worst(ours(ids, logits_to_keep=3).logits, full[:, -3:]) < 1e-6
    assert worst(ours(ids, logits_to_keep=torch.tensor([0, 4])).logits, full[:, [0, 4]]) < 1e-6


def test_tuples_have_transformers_order():
    ours, theirs = pair("plain")
    ids = tokens(1, 5)
    a = ours(ids, labels=ids, return_dict=False, output_hidden_states=True, use_cache=True)
    b = theirs(ids, labels=ids, return_dict=False, output_hidden_states=True, use_cache=True)
    assert len(a) == len(b) == 4
    assert worst(a[0], b[0]) < 1e-5
    assert worst(a[1], b[1]) < 1e-5
    assert isinstance(a[2], mambakit.MambaCache)
    assert worst(a[3][0], b[3][0]) < 1e-5


@pytest.mark.parametrize("recipe", [{}, {"time_step_init_scheme": "constant"}, {"rescale_prenorm_residual": True}])
def test_initialisation_given_a_range_is_transformers(recipe):
    """The same distribution: spread of every parameter within a few per cent."""
    import transformers

    fields = {"vocab_size": 512, "hidden_size": 96, "num_hidden_layers": 2, "initializer_range": 0.1, **recipe}
    ours = dict(mambakit.MambaModel(mambakit.MambaConfig(**fields)).named_parameters())
    theirs = dict(transformers.MambaModel(transformers.MambaConfig(**fields)).named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        x, y = parameter.detach(), theirs[name].detach()
        assert x.shape == y.shape
        assert abs(x.mean() - y.mean()) <= 0.1 * y.abs().mean() + 1e-6, name
        assert abs(x.std() - y.std()) <= 0.1 * y.std() + 1e-6, name


def test_a_new_model_starts_near_the_uniform_loss():
    """768 x 24, vocabulary 50280: ln(v) = 10.83; transformers' own initialisation starts at 14.4."""
    config = mambakit.MambaConfig(hidden_size=768, num_hidden_layers=24)
    model = mambakit.MambaForCausalLM(config)
    ids = torch.randint(0, config.vocab_size, (1, 64))
    with torch.no_grad():
        loss = model(ids, labels=ids).loss.item()
    assert abs(loss - torch.tensor(config.vocab_size).log().item()) < 0.6
