"""Prompts of one text on a GPU: cut into powers of two, read by graphs from their second use on."""

import pytest
import torch

from mambakit import FalconMambaConfig, FalconMambaForCausalLM, MambaConfig, MambaForCausalLM
from mambakit.decoding import bucket_graphs, cuda_graph, padded_rows
from mambakit.decoding import prefill as prompt
from mambakit.decoding.chunks import LARGEST_BUCKET, LARGEST_PADDED, bucket_of, parts
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Sampling
from mambakit.models.outputs import MambaCausalLMOutput
from tests.decoding.eager_graph import read_in_buckets
from tests.models.configurations import pair

CUDA = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
GPU = pytest.param("cuda", marks=CUDA)


@pytest.fixture
def on(monkeypatch):
    """Makes a device serve: on a CPU the pieces without their graphs."""

    def serve(device: str) -> str:
        if device == "cpu":
            read_in_buckets(monkeypatch)
        return device

    return serve


@pytest.mark.parametrize("length", [1, 2, 7, 64, 511, 512, 1000, 4095, 4096, 4097, 20_000])
@pytest.mark.parametrize("longest", [1, 3, 64, 511, 600, 4096, 10**6])
def test_parts_add_up(length, longest):
    found = parts(length, longest)
    assert sum(found) == length
    assert found == sorted(found, reverse=True)
    assert all(0 < size <= min(longest, LARGEST_BUCKET) for size in found)
    assert all(size & (size - 1) == 0 for size in found if size > LARGEST_PADDED)
    assert len(found) <= length // min(longest, LARGEST_PADDED) + 1
    for size in found:
        bucket = bucket_of(size)
        assert bucket & (bucket - 1) == 0
        assert size <= bucket < 2 * size or bucket == 16
        assert bucket == size or bucket <= LARGEST_PADDED


@pytest.mark.parametrize("kind", ["plain", "falcon"])
@pytest.mark.parametrize("kernel", [1, 2, 4])
@torch.no_grad()
def test_padding_on_the_left_changes_no_state(on, kind, kernel):
    """Any padding, behind any state: the tokens' own logits and states, whatever stands in the padding."""
    on("cpu")
    torch.manual_seed(0)
    own = (MambaConfig, MambaForCausalLM) if kind == "plain" else (FalconMambaConfig, FalconMambaForCausalLM)
    model = own[1](own[0](hidden_size=32, num_hidden_layers=2, vocab_size=64, conv_kernel=kernel)).eval()
    graphs = bucket_graphs.BucketGraphs(model)
    states = graphs.states(model, 1)
    for count in (1, 2, 3, 5, 15, 16):
        ids, junk = torch.randint(0, 64, (count,)), torch.randint(0, 64, (16 - count,))
        for start in (0, 1, 2, 7):
            cache = model.backbone.new_cache(1)
            if start:
                model(torch.randint(0, 64, (1, start)), cache_params=cache)
            states.load_(cache)
            hidden = graphs._forward(model, torch.cat([junk, ids, torch.tensor([16 - count])])[None])
            expected = model(ids[None], cache_params=cache).logits[:, -1]
            assert torch.allclose(model.lm_head(hidden)[:, -1], expected, atol=1e-5)
            for name, tensor in states.tensors().items():
                assert torch.allclose(tensor, cache.tensors()[name], atol=1e-5), (name, count, start)
            assert torch.equal(states.conv_states, cache.conv_states) or count < 16


def test_on_a_cpu_it_is_the_models_forward():
    model = pair("plain")[0]
    ids = torch.randint(0, 50, (2, 9))
    cache, other = model.backbone.new_cache(2), model.backbone.new_cache(2)
    with torch.no_grad():
        expected = model(ids, cache_params=other, logits_to_keep=1).logits[:, -1]
        assert torch.equal(prompt.prefill(model, ids, cache), expected)
    assert torch.equal(cache.ssm_states, other.ssm_states)
    assert cache.get_seq_length() == 9


def made(device: str, dtype: torch.dtype = torch.float32) -> MambaForCausalLM:
    torch.manual_seed(0)
    config = MambaConfig(hidden_size=128, num_hidden_layers=3, vocab_size=320, time_step_rank=16)
    return MambaForCausalLM(config).to(device, dtype).eval()


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_pieces_give_the_whole_prompts_logits_and_state(on, device):
    model = made(on(device))
    first = model.backbone.new_cache(1)
    model(torch.randint(0, 320, (1, 5), device=device), cache_params=first)
    for length in (1, 3, 77, 77, 77, 600, 600, 600):
        ids = torch.randint(0, 320, (1, length), device=device)
        cache, other = first.clone(), first.clone()
        logits = prompt.prefill(model, ids, cache)
        expected = model(ids, cache_params=other).logits[:, -1]
        assert torch.allclose(logits, expected, atol=1e-4, rtol=1e-4)
        assert torch.allclose(cache.ssm_states, other.ssm_states, atol=1e-4, rtol=1e-4)
        assert torch.allclose(cache.conv_states, other.conv_states, atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == 5 + length


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_the_bits_do_not_depend_on_what_was_read_before(on, device):
    """Eager at first, captured at the second use, replayed from then on."""
    model = made(on(device), torch.bfloat16)
    ids = torch.randint(0, 320, (1, 333), device=device)
    found = []
    for _ in range(4):
        cache = model.backbone.new_cache(1)
        found.append((prompt.prefill(model, ids, cache).clone(), cache.ssm_states.clone()))
        prompt.prefill(model, torch.randint(0, 320, (1, 77), device=device), model.backbone.new_cache(1))
    for logits, state in found[1:]:
        assert torch.equal(logits, found[0][0])
        assert torch.equal(state, found[0][1])


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@torch.no_grad()
def test_generate_reads_its_prompt_in_pieces(on, device, sampled, monkeypatch):
    model = made(on(device))
    ids = torch.randint(1, 320, (1, 45), device=device)
    options = {"max_new_tokens": 12, "do_sample": sampled, "eos_token_id": None, "pad_token_id": 0, "seed": 3}
    with monkeypatch.context() as without:
        for module in ("models.generate", "decoding.prefill"):
            without.setattr(f"mambakit.{module}.reads_in_buckets", lambda model, rows: False)
        expected = model.generate(ids, **options)
    for _ in range(3):
        cache = model.backbone.new_cache(1)
        assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)
        assert torch.equal(model.generate(ids, cache_params=cache, **options), expected)
        assert cache.get_seq_length() == 45 + 11
        assert torch.equal(model.generate(ids, prefill_chunk_size=16, **options), expected)
    if device == "cuda":
        reader = cuda_graph._kept[model].things["prefill",]
        assert sorted(reader._graphs) == [(1, 16), (1, 64)]  # 45, also in parts of 16
    hooked = []
    handle = model.register_forward_hook(lambda module, inputs, output: hooked.append(output.logits.shape))
    assert torch.equal(model.generate(ids, **options), expected)
    assert len(hooked) == 12
    handle.remove()


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_a_forward_of_another_kind_is_given_the_whole_prompt(on, device):
    """It does not know that the prompt has been read."""
    lengths = []

    class Own(MambaForCausalLM):
        def forward(self, input_ids, cache_params=None, use_cache=None, **kwargs):
            lengths.append(input_ids.shape[1])
            output = self.backbone(input_ids, cache_params=cache_params, use_cache=use_cache)
            return MambaCausalLMOutput(
                logits=self.lm_head(output.last_hidden_state[:, -1:]).float(), cache_params=output.cache_params
            )

    model = made(on(device))
    ids = torch.randint(1, 320, (1, 11), device=device)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, **options)
    own = Own(model.config).to(device).eval()
    own.load_state_dict(model.state_dict())
    assert torch.equal(own.generate(ids, **options), expected)
    assert lengths[0] == 11
    inner = model.forward
    model.forward = lambda *arguments, **kwargs: inner(*arguments, **kwargs)
    assert torch.equal(model.generate(ids, **options), expected)
    del model.forward
    with pytest.raises(ValueError, match="prefill_chunk_size is 0"):
        model.generate(ids, prefill_chunk_size=0, **options)


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_a_failed_call_leaves_the_state(on, device):
    model = made(on(device))
    ids = torch.randint(1, 320, (1, 20), device=device)
    cache = model.backbone.new_cache(1)
    with pytest.raises(ValueError):
        model.generate(ids, cache_params=cache, max_length=5, max_new_tokens=-3)
    assert cache.get_seq_length() == 0
    assert not cache.ssm_states.any()


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_the_engine_reads_by_graphs(on, device):
    model = made(on(device))
    model.generation_config.eos_token_id = None
    ids = torch.randint(1, 320, (90,))
    expected = model.generate(ids[None].to(device), max_new_tokens=8, do_sample=False, pad_token_id=0)[0, 90:].tolist()
    for _ in range(3):
        engine = Engine(model, slots=2, chunk_size=64)
        done = engine.write([Request(ids, Sampling(temperature=0), max_new_tokens=8) for _ in range(3)])
        assert [request.tokens for request in done] == [expected] * 3


@pytest.mark.parametrize(("length", "slots"), [(1, 8), (16, 8), (31, 8), (64, 8), (64, 32), (200, 8), (512, 64)])
@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_a_part_of_several_prompts(on, device, length, slots):
    """Each prompt has the bits that it has alone, in any row beside any others, and what its own forward gives."""
    model = made(on(device), torch.bfloat16 if device == "cuda" else torch.float32)
    bucket = bucket_of(length)
    rows = bucket_graphs.rows_together(bucket, slots)
    assert rows * bucket <= (1024 if slots >= 32 else 512)
    assert rows == {16: 16, 32: 16, 64: 8 * (1 + (slots >= 32)), 256: 2, 512: 1}[bucket]
    begun = model.backbone.new_cache(1)
    model(torch.randint(0, 320, (1, 5), device=device), cache_params=begun)
    mine = torch.randint(0, 320, (length,))
    least = bucket // 2 + 1 if bucket > 16 else 1
    for start in (None, begun):
        expected = None
        for row in [0, 0, 0, rows - 1, rows // 2]:  # eager, captured, replayed, elsewhere
            count = int(torch.randint(row + 1, rows + 1, ()))
            lengths = torch.randint(least, bucket + 1, (count,)).tolist()
            tokens = [mine if i == row else torch.randint(0, 320, (lengths[i],)) for i in range(count)]
            caches = [None if i % 2 else begun.clone() for i in range(count)]
            caches[row] = None if start is None else start.clone()
            given = caches[row]
            seen = [0 if cache is None else 5 for cache in caches]
            found, logits = bucket_graphs.read_together(model, tokens, caches, rows, want_logits=True)
            assert given is None or found[row] is given
            assert [c.get_seq_length() for c in found] == [s + len(t) for s, t in zip(seen, tokens, strict=True)]
            result = logits[row], *found[row].tensors().values()
            expected = expected or [t.clone() for t in result]
            for one, other in zip(result, expected, strict=True):
                assert torch.equal(one, other), row
        alone = model.backbone.new_cache(1) if start is None else start.clone()
        whole = model(mine[None].to(device), cache_params=alone).logits[0, -1]
        tolerance = 1e-4 if device == "cpu" else 0.05  # bfloat16: products of other shapes round otherwise
        assert torch.allclose(whole, expected[0], atol=tolerance, rtol=tolerance)
        assert torch.allclose(alone.ssm_states, expected[2], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("size", [None, 5, 64])
@torch.no_grad()
def test_a_padded_batch_as_whole_rows(on, device, size, monkeypatch):
    """Each row as it is alone, behind any state, in one chunk or several; `generate` the same as packed."""
    model = made(on(device))
    if device == "cpu":
        monkeypatch.setattr(prompt, "takes_padding", lambda model: True)
    lengths, longest = [23, 1, 20, 22, 9], 23
    ids = torch.randint(1, 320, (5, longest), device=device)
    mask = torch.tensor([[0] * (longest - n) + [1] * n for n in lengths], device=device)
    begun = model.backbone.new_cache(5)
    model(torch.randint(1, 320, (5, 6), device=device), cache_params=begun)
    read, seen = [], []
    kept = prompt.read_rows
    monkeypatch.setattr(prompt, "read_rows", lambda *a: read.append(a[4]) or kept(*a))
    cache = begun.clone()
    logits = prompt.prefill(model, ids, cache, attention_mask=mask, chunk_size=size, progress=seen.append)
    assert len(read) == 1
    assert seen == [5 * min(longest, end) for end in range(read[0], longest + read[0], read[0])]
    assert cache.get_seq_length() == 6 + longest
    tolerance = 1e-4 if device == "cpu" else 2e-3
    for row, n in enumerate(lengths):
        alone = model.backbone.new_cache(1)
        alone.copy_(begun, [row], [0])
        want = model(ids[row : row + 1, longest - n :], cache_params=alone).logits[0, -1]
        assert torch.allclose(logits[row], want, atol=tolerance, rtol=tolerance)
        for name, state in cache.tensors().items():
            same = alone.tensors()[name]
            assert torch.allclose(state[:, row], same[:, 0], atol=tolerance, rtol=tolerance), name
    states = begun.clone()
    prompt.prefill_states(model, ids, states, attention_mask=mask, chunk_size=size)
    assert all(torch.equal(a, b) for a, b in zip(states.tensors().values(), cache.tensors().values(), strict=True))
    written = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert len(read) == 3
    monkeypatch.setattr(prompt, "takes_padding", lambda model: False)
    assert torch.equal(
        written, model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    )
    assert len(read) == 3


@pytest.mark.parametrize("holes", ["right", "inside", "most"])
def test_what_is_no_padding_on_the_left_is_packed(holes):
    mask = torch.ones(4, 10, dtype=torch.int64)
    assert padded_rows.pads_of(mask).tolist() == [0] * 4
    mask[1, :9] = 0
    assert padded_rows.pads_of(mask).tolist() == [0, 9, 0, 0]
    if holes == "right":
        mask[2, 9] = 0
    elif holes == "inside":
        mask[2, 4] = 0
    else:
        mask[0, :9], mask[2, :5] = 0, 0
    assert padded_rows.pads_of(mask) is None


@pytest.mark.parametrize("device", ["cpu", GPU])
@pytest.mark.parametrize("cached", [False, True])
@torch.no_grad()
def test_an_engines_prompts_are_read_together(on, device, cached, monkeypatch):
    """Prompts of many lengths, with states and without: each text as alone, in few forwards.

    A final state is that of its slot or, where that has read on, a copy's that a forward has brought to the end: which
    of the two depends on when the engine looks, so their last bits may differ.
    """
    model = made(on(device))
    model.generation_config.eos_token_id = None
    begun = model.backbone.new_cache(1)
    model(torch.randint(0, 320, (1, 5), device=device), cache_params=begun)
    lengths = [1, 2, 3, 31, 32, 32, 32, 33, 64, 64, 90, 127, 200, 300, 520, 600]

    def requests():
        torch.manual_seed(1)
        return [
            Request(
                torch.randint(1, 320, (n,)), Sampling(seed=i) if i % 3 else Sampling(0), 8,
                state=begun if i % 5 == 4 else None, keep_state=i % 4 == 0,
            )
            for i, n in enumerate(lengths)
        ]  # fmt: skip

    def engine():
        return Engine(model, 16, prefix_cache=PrefixCache(model, chunk_size=64) if cached else None)

    alone = [engine().write([request])[0] for request in requests()]
    forwards, read = [], bucket_graphs.BucketGraphs.read

    def counted(graphs, model, tokens, rows):
        forwards.append((rows, bucket_of(len(tokens[0]))))
        return read(graphs, model, tokens, rows)

    monkeypatch.setattr(bucket_graphs.BucketGraphs, "read", counted)
    together = engine().write(requests())
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    for one, other in zip(together, alone, strict=True):
        if one.keep_state:
            pair_of_states = one.final_state.ssm_states, other.final_state.ssm_states
            if device == "cpu":
                assert torch.equal(*pair_of_states)
            assert torch.allclose(*pair_of_states, rtol=0.02, atol=1e-4)
            assert one.final_state.get_seq_length() == other.final_state.get_seq_length()
    # One row: of a text whose final state is read on, where its slot has read further than its end.
    alone_too = {1} if device != "cpu" else set()
    if not cached:
        # 1 to 3; 31 to 32; 33 to 64; 90 and 127; 200; 300 and what begins 520 and 600; later the rests of these.
        one_each = [(16, 16), (16, 32), (8, 64), (4, 128), (2, 256), (1, 512), (1, 512), (1, 512)]
        of_prompts = [(rows, bucket) for rows, bucket in forwards if rows not in alone_too or bucket == 512]
        assert sorted(of_prompts) == sorted([*one_each, (16, 16), (4, 128)])
    assert all(rows in {bucket_graphs.rows_together(bucket, 16), *alone_too} for rows, bucket in forwards)


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_a_bad_state_ends_its_own_text_alone(on, device):
    model, other = made(on(device)), pair("plain")[0].to(device)
    good = Request(torch.randint(1, 320, (16,)), max_new_tokens=3)
    bad = Request(torch.randint(1, 320, (16,)), max_new_tokens=3, state=other.backbone.new_cache(1))
    engine = Engine(model, 4)
    for request in (good, bad, late := Request(torch.randint(1, 320, (16,)), max_new_tokens=3)):
        engine.submit(request)
    for _ in engine.run():
        pass
    assert "another model" in bad.error
    assert len(good.tokens) == len(late.tokens) == 3


@pytest.mark.parametrize("device", ["cpu", GPU])
@torch.no_grad()
def test_adapters_switched_off_are_noticed(on, device):
    """A graph has passed the switch when it was captured."""
    peft = pytest.importorskip("peft")
    model = made(on(device))
    targets = ["x_proj", "dt_proj"]
    peft.inject_adapter_in_model(peft.LoraConfig(target_modules=targets, init_lora_weights=False), model)
    ids = torch.randint(1, 320, (1, 6), device=device)

    def read() -> torch.Tensor:
        return prompt.prefill(model, ids, model.backbone.new_cache(1)).clone()

    with_adapters = [read() for _ in range(3)]
    before = cuda_graph.placement_of(model)
    assert cuda_graph.placement_of(model) is before
    layers = [m for m in model.modules() if hasattr(m, "enable_adapters") and hasattr(m, "merged_adapters")]
    assert len(layers) == 6
    for layer in layers:
        layer.enable_adapters(False)
    assert cuda_graph.placement_of(model) is not before
    plain = [read() for _ in range(3)]
    assert not torch.allclose(plain[0], with_adapters[0], atol=1e-3)
    for logits in plain:
        assert torch.allclose(logits, model(ids, logits_to_keep=1).logits[:, -1], atol=1e-4)


LENGTHS = (5, 1, 17, 9)


def texts_of_lengths(lengths=LENGTHS):
    return [torch.randint(1, 320, (n,), generator=torch.Generator().manual_seed(n)) for n in lengths]


@pytest.mark.parametrize("chunk_size", [None, 1, 4, 7, 32, 1000])
@torch.no_grad()
def test_prompts_of_different_lengths_are_packed(chunk_size):
    """The logits after each one's own last token, in whatever chunk that is; the states go on."""
    model = made("cpu")
    before, texts, more = texts_of_lengths((3, 3, 3, 3)), texts_of_lengths(), texts_of_lengths((2, 6, 1, 3))
    cache, done = model.backbone.new_cache(4), []
    prompt.prefill_states(model, before, cache, chunk_size=chunk_size)
    found = prompt.prefill(model, texts, cache, chunk_size=chunk_size, progress=done.append)
    again = prompt.prefill(model, more, cache, chunk_size=chunk_size)
    assert done[-1] == sum(LENGTHS)
    assert done == sorted(done)
    for i in range(4):
        whole = torch.cat([before[i], texts[i]])
        assert torch.allclose(found[i], model(whole[None]).logits[0, -1], atol=1e-4, rtol=1e-4)
        output = model(torch.cat([whole, more[i]])[None], use_cache=True)
        assert torch.allclose(again[i], output.logits[0, -1], atol=1e-4, rtol=1e-4)
        state = cache.select([i])
        assert torch.allclose(state.ssm_states, output.cache_params.ssm_states, atol=1e-4, rtol=1e-4)
        assert torch.allclose(state.conv_states, output.cache_params.conv_states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("chunk_size", [None, 4, 6, 1000])
@torch.no_grad()
def test_a_batch_padded_on_the_left(chunk_size):
    model, longest = made("cpu"), max(LENGTHS)
    texts = texts_of_lengths()
    ids = torch.stack([torch.cat([t.new_full((longest - len(t),), 7), t]) for t in texts])
    mask = torch.stack([torch.arange(longest) >= longest - len(t) for t in texts]).long()
    cache = model.backbone.new_cache(4)
    found = prompt.prefill(model, ids, cache, attention_mask=mask, chunk_size=chunk_size)
    packed = model.backbone.new_cache(4)
    assert torch.allclose(found, prompt.prefill(model, texts, packed), atol=1e-4, rtol=1e-4)
    assert torch.allclose(cache.ssm_states, packed.ssm_states, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [LENGTHS, (21,), (1,), (0, 3, 0)])
@pytest.mark.parametrize("chunk_size", [1, 4, 6, 1000])
@torch.no_grad()
def test_hidden_states_chunk_by_chunk(lengths, chunk_size):
    model = made("cpu")
    texts = texts_of_lengths(lengths)
    cache, parts, most = model.backbone.new_cache(len(texts)), [[] for _ in texts], 0
    for hidden in prompt.hidden_states(model, texts, cache, chunk_size=chunk_size):
        most = max(most, sum(map(len, hidden)))
        for part, found in zip(parts, hidden, strict=True):
            part.append(found)
    assert most <= max(chunk_size, len(texts))
    for text, part in zip(texts, parts, strict=True):
        if len(text):
            expected = model.backbone(text[None]).last_hidden_state[0]
            assert torch.allclose(torch.cat(part), expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_hidden_states_without_a_cache_are_of_one_forward():
    model, texts = made("cpu"), texts_of_lengths()
    (hidden,) = prompt.hidden_states(model, texts, chunk_size=sum(LENGTHS))
    assert [len(part) for part in hidden] == list(LENGTHS)
    with pytest.raises(ValueError, match="needs a cache"):
        list(prompt.hidden_states(model, texts, chunk_size=sum(LENGTHS) - 1))


@torch.no_grad()
def test_nothing_to_read_and_sizes_that_are_none():
    model = made("cpu")
    cache = model.backbone.new_cache(2)
    prompt.prefill_states(model, texts_of_lengths((0, 0)), cache)
    assert list(prompt.hidden_states(model, texts_of_lengths((0, 0)), cache)) == []
    assert cache.get_seq_length() == 0
    with pytest.raises(ValueError, match="chunk_size is 0; it must be 1 or more"):
        prompt.prefill(model, texts_of_lengths(), model.backbone.new_cache(4), chunk_size=0)


@torch.no_grad()
def test_a_model_with_a_hook_is_called_for_every_chunk():
    model, ids, called = made("cpu"), torch.randint(1, 320, (1, 10)), []
    expected = prompt.prefill(model, ids, model.backbone.new_cache(1), chunk_size=4)
    handle = model.register_forward_hook(lambda module, inputs, output: called.append(inputs[0].shape[1]))
    assert torch.equal(prompt.prefill(model, ids, model.backbone.new_cache(1), chunk_size=4), expected)
    assert called == [4, 4, 2]
    handle.remove()
