"""Each way in which collators mark documents means the same boundaries, and what contradicts itself raises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import transformers

import mambakit
from mambakit.models.documents import Marks, begin_inside, documents_of
from tests.models.configurations import pair, tokens, worst

pytestmark = pytest.mark.filterwarnings("ignore")
CPU = torch.device("cpu")
LENGTHS = [3, 1, 5, 2]


def marks_of(lengths: list[int]) -> dict:
    """All that is known, of documents of these lengths in one row, as transformers' collator gives it."""
    cu = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    return {
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "seq_idx": torch.cat([torch.full((n,), i, dtype=torch.int32) for i, n in enumerate(lengths)])[None],
        "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": max(lengths), "max_length_k": max(lengths),
    }  # fmt: skip


MARKS = marks_of(LENGTHS)
WAYS = {
    "position_ids": ("position_ids",), "seq_idx": ("seq_idx",), "cu_seq_lens_q": ("cu_seq_lens_q",),
    "cu_seq_lens_k": ("cu_seq_lens_k",),
    "flash": ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"), "all": tuple(MARKS),
    "positions and index": ("position_ids", "seq_idx"), "index and length": ("seq_idx", "max_length_q"),
}  # fmt: skip
FORMS = {
    "int64": lambda v: v.long() if torch.is_tensor(v) else v,
    "int32": lambda v: v.int() if torch.is_tensor(v) else v,
    "list": lambda v: v.tolist() if torch.is_tensor(v) else v,
    "numpy": lambda v: v.numpy() if torch.is_tensor(v) else np.int64(v),
    "tensor numbers": lambda v: v if torch.is_tensor(v) else torch.tensor(v),
}


def separately(model, ids, lengths, **kwargs):
    return torch.cat([model(part, **kwargs)[0] for part in ids.split(lengths, 1)], 1)


@pytest.mark.parametrize("name", ["plain", "falcon"])
@pytest.mark.parametrize("way", WAYS)
@torch.no_grad()
def test_documents_are_read_apart(name, way):
    model, ids = pair(name)[0], tokens(1, sum(LENGTHS))
    marks = {key: MARKS[key] for key in WAYS[way]}
    expected = separately(model, ids, LENGTHS)
    assert worst(model(ids, **marks).logits, expected) < 1e-5
    assert worst(model.backbone(ids, **marks)[0], separately(model.backbone, ids, LENGTHS)) < 1e-5
    assert worst(model(ids, cu_seqlens=MARKS["cu_seq_lens_q"], **marks).logits, expected) < 1e-5
    assert worst(model(ids, attention_mask=torch.ones_like(ids), **marks).logits, expected) < 1e-5
    assert worst(model(ids, attention_mask=MARKS["seq_idx"] + 1, **marks).logits, expected) < 1e-5
    assert worst(model(inputs_embeds=model.get_input_embeddings()(ids), **marks).logits, expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_dtypes_and_containers(form):
    model, ids = pair("plain")[0], tokens(1, sum(LENGTHS))
    expected = separately(model, ids, LENGTHS)
    marks = {name: FORMS[form](value) for name, value in MARKS.items()}
    assert worst(model(ids, **marks).logits, expected) < 1e-5
    assert worst(model(ids, cu_seqlens=FORMS[form](MARKS["cu_seq_lens_q"])).logits, expected) < 1e-5
    for name in ("position_ids", "seq_idx"):  # without the batch's dimension
        assert worst(model(ids, **{name: FORMS[form](MARKS[name][0])}).logits, expected) < 1e-5


@pytest.mark.parametrize("way", [*WAYS, "attention_mask"])
@torch.no_grad()
def test_the_loss_leaves_out_what_nothing_precedes(way):
    model, ids = pair("plain")[0], tokens(1, sum(LENGTHS))
    marks = {"attention_mask": MARKS["seq_idx"] + 3} if way == "attention_mask" else {k: MARKS[k] for k in WAYS[way]}
    parts = [part for part in ids.split(LENGTHS, 1) if part.shape[1] > 1]
    count = sum(part.shape[1] - 1 for part in parts)
    expected = sum(model(p, labels=p).loss * (p.shape[1] - 1) for p in parts) / count
    assert worst(model(ids, labels=ids, **marks).loss, expected) < 1e-5
    marked = ids.clone()
    marked[:, MARKS["position_ids"][0] == 0] = -100  # as collators do
    assert worst(model(ids, labels=marked, **marks).loss, expected) < 1e-5


@torch.no_grad()
def test_batches_of_rows():
    model, ids = pair("plain")[0], tokens(2, 8)
    lengths = ([3, 5], [1, 1, 6])
    rows = [marks_of(list(row)) for row in lengths]
    expected = torch.cat([separately(model, ids[i : i + 1], list(row)) for i, row in enumerate(lengths)])
    flat = torch.tensor([0, 3, 8, 9, 10, 16], dtype=torch.int32)
    stacked = {name: torch.cat([row[name] for row in rows]) for name in ("position_ids", "seq_idx")}
    for marks in (
        {"cu_seq_lens_q": flat}, stacked, {"seq_idx": stacked["seq_idx"]}, {"attention_mask": stacked["seq_idx"] + 1},
        {**stacked, "cu_seq_lens_q": flat, "cu_seq_lens_k": flat, "max_length_q": 6, "max_length_k": 6},
    ):  # fmt: skip
        assert worst(model(ids, **marks).logits, expected) < 1e-5
    one = {"position_ids": rows[0]["position_ids"], "seq_idx": rows[0]["seq_idx"]}  # one row for all
    assert worst(model(ids, **one).logits[1:], separately(model, ids[1:], [3, 5])) < 1e-5
    with pytest.raises(ValueError, match="from one row of the batch into the next at token 8"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 5, 16]))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_beside_documents(side):
    model, ids = pair("plain")[0], tokens(1, 11)
    real = slice(3, 11) if side == "left" else slice(0, 8)
    mask, idx, positions = torch.zeros(3, 1, 11, dtype=torch.int64)
    mask[:, real], idx[:, real], positions[:, real] = (
        1,
        torch.tensor([0] * 5 + [1] * 3),
        torch.cat([torch.arange(5), torch.arange(3)]),
    )
    numbered = torch.where(mask == 1, idx + 1, 0)
    expected = separately(model, ids[:, real], [5, 3])
    for padding in (-1, 0, 7):  # an index of padding means nothing
        marks = {"seq_idx": torch.where(mask == 1, idx, padding), "position_ids": positions}
        for given in (marks, {"seq_idx": marks["seq_idx"]}, {"max_length_q": 5, **marks}):
            assert worst(model(ids, attention_mask=mask, **given).logits[:, real], expected) < 1e-5
    assert worst(model(ids, attention_mask=numbered).logits[:, real], expected) < 1e-5
    with pytest.raises(ValueError, match="seq_idx is negative"):
        model(ids, seq_idx=torch.where(mask == 1, idx, -1))


@torch.no_grad()
def test_after_a_state():
    model, ids = pair("plain")[0], tokens(1, 10)
    before = model(ids[:, :4], use_cache=True).cache
    whole = separately(model, ids, [6, 4])[:, 4:]
    for marks in (
        {"position_ids": torch.tensor([[4, 5, 0, 1, 2, 3]])}, {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1]])},
        {"seq_idx": torch.tensor([[0] * 6 + [1] * 4])}, {"cu_seq_lens_q": [0, 2, 6]},
        {"position_ids": torch.tensor([[4, 5, 0, 1, 2, 3]]), "cu_seq_lens_q": [0, 2, 6], "max_length_q": 4},
    ):  # fmt: skip
        assert worst(model(ids[:, 4:], cache_params=before.clone(), **marks).logits, whole) < 1e-5
    fresh = model(ids[:, 4:], cache_params=before.clone(), seq_idx=torch.tensor([[0] * 4 + [1] * 6])).logits
    assert worst(fresh, model(ids[:, 4:]).logits) < 1e-5


WRONG = {
    "seq_idx": [[0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3]], "position_ids": [[*range(11)]], "cu_seq_lens_q": [0, 3, 5, 9, 11],
    "cu_seq_lens_k": [0, 11], "max_length_q": 4, "max_length_k": 2, "attention_mask": [[1] * 6 + [2] * 5],
    "cu_seqlens": [0, 11],
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
@torch.no_grad()
def test_contradictions_raise(name):
    model, ids = pair("plain")[0], tokens(1, sum(LENGTHS))
    wrong = torch.tensor(WRONG[name])
    with pytest.raises(ValueError, match=f"{name}|max_length"):
        model(ids, **{**MARKS, name: wrong})
    for other in ("position_ids", "seq_idx", "cu_seq_lens_q"):
        if other != name:
            with pytest.raises(ValueError, match=name):
                model(ids, **{other: MARKS[other], name: wrong})


@pytest.mark.parametrize("marks, message", [
    ({"cu_seq_lens_q": [0, 3]}, "cu_seq_lens_q must rise from 0 to the packed length 11"),
    ({"cu_seq_lens_k": [1, 11]}, "cu_seq_lens_k must rise"), ({"cu_seq_lens_q": [0, 7, 3, 11]}, "must rise"),
    ({"cu_seq_lens_q": [0.0, 11.0]}, "float32, expected"), ({"cu_seq_lens_q": [[0, 11]]}, r"\(1, 2\)"),
    ({"cu_seq_lens_q": [11]}, r"\(1,\)"), ({"seq_idx": [[0, 0, 1]]}, r"seq_idx has shape \(1, 3\), expected \(1, 11\)"),
    ({"position_ids": torch.zeros(3, 1, 11)}, "position_ids has shape"),
    ({"max_length_q": 10}, "a document has 11 tokens"),
    ({"max_length_q": 11, "max_length_k": 12}, "they are of one text"),
    (
        {"attention_mask": torch.zeros(1, 11).index_fill(1, torch.tensor([3]), -1e9)},
        "what is added to attention scores",
    ),
    ({"attention_mask": torch.full((1, 11), 0.5)}, "what is added"),
    ({"attention_mask": torch.full((1, 11), -1)}, "from -1 to -1"),
])  # fmt: skip
@torch.no_grad()
def test_wrong_values_raise(marks, message):
    model, ids = pair("plain")[0], tokens(1, 11)
    with pytest.raises(ValueError, match=message):
        model(ids, **marks)


def test_random_documents_in_every_way():
    rng = np.random.default_rng(0)
    for _ in range(200):
        b, length = int(rng.integers(1, 4)), int(rng.integers(1, 12))
        begins = torch.tensor(rng.random((b, length)) < 0.3)
        begins[:, 0] = True
        idx = begins.cumsum(1)
        columns = torch.arange(length).expand(b, -1)
        positions = columns - torch.where(begins, columns, 0).cummax(1).values
        flat = begins.flatten().nonzero().squeeze(1)
        cu = torch.cat([flat, torch.tensor([b * length])])
        expected = begins.clone()
        expected[:, 0] = False
        longest = int(cu.diff().max())
        every = {
            "position_ids": positions, "seq_idx": idx, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu,
            "max_length_q": longest,
        }  # fmt: skip
        for given in (every, *({name: every[name]} for name in list(every)[:4])):
            found = documents_of((b, length), CPU, None, Marks(**given))
            assert torch.equal(begin_inside(found.starts, None), expected)
        found = documents_of((b, length), CPU, idx, Marks(position_ids=positions))
        assert torch.equal(begin_inside(found.starts, None), expected)
        if longest > 1:
            with pytest.raises(ValueError, match="max_length_q"):
                documents_of((b, length), CPU, None, Marks(**{**every, "max_length_q": longest - 1}))
        moved = begins.clone()
        row, column = int(rng.integers(0, b)), int(rng.integers(0, length))
        moved[row, column] ^= True
        if column:
            with pytest.raises(ValueError, match="mark different documents"):
                documents_of((b, length), CPU, None, Marks(position_ids=positions, seq_idx=moved.cumsum(1)))


@torch.no_grad()
def test_a_classifier_scores_rows():
    model = mambakit.MambaForSequenceClassification(pair("plain")[0].config).eval()
    ids = tokens(2, 6)
    plain = model(ids).logits
    one = {"position_ids": torch.arange(6)[None], "seq_idx": torch.zeros(2, 6, dtype=torch.int32), "max_length_q": 6}
    assert torch.equal(model(ids, cu_seq_lens_q=[0, 6, 12], **one).logits, plain)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    assert torch.equal(model(ids, mask, position_ids=positions).logits, model(ids, mask).logits)
    for several in (
        {"position_ids": [[0, 1, 0, 1, 2, 3]]}, {"seq_idx": [[0, 0, 0, 0, 0, 1]]}, {"cu_seq_lens_q": [0, 6, 8, 12]},
        {"attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 2, 2, 2]])},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="a classifier scores one of each row"):
            model(ids, **several)


@pytest.mark.parametrize("options", [
    {}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True},
    {"return_flash_attn_kwargs": True, "return_seq_idx": True},
    {"return_position_ids": False, "return_seq_idx": True},
    {"return_position_ids": False, "return_flash_attn_kwargs": True},
])  # fmt: skip
@torch.no_grad()
def test_transformers_collator(options):
    model = pair("plain")[0]
    features = [{"input_ids": tokens(1, n)[0].tolist()} for n in LENGTHS]
    batch = transformers.DataCollatorWithFlattening(**options)(features)
    out = model(**batch)
    assert worst(out.logits, separately(model, batch["input_ids"], LENGTHS)) < 1e-5
    count = sum(LENGTHS) - len(LENGTHS)
    parts = [torch.tensor([f["input_ids"]]) for f in features if len(f["input_ids"]) > 1]
    assert worst(out.loss, sum(model(p, labels=p).loss * (p.shape[1] - 1) for p in parts) / count) < 1e-5


@pytest.mark.parametrize(
    "options", [{"packing": True}, {"padding_free": True}, {"packing": True, "padding_free": True}, {}]
)
def test_trl_trains(options, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    torch.manual_seed(0)
    model = pair("plain")[0]
    rows = datasets.Dataset.from_dict({"input_ids": [tokens(1, n)[0].tolist() for n in [5, 9, 3, 7] * 4]})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=3, report_to=[], use_cpu=True,
        logging_steps=1, dataset_kwargs={"skip_prepare_dataset": not options.get("packing", False)}, bf16=False,
        save_strategy="no",
        eos_token=None, max_length=16 if options.get("packing") else None, **options,
    )  # fmt: skip
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_words(), eos_token="0", pad_token="0", unk_token="0"
    )
    trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 3
    batch = next(iter(trainer.get_train_dataloader()))
    model.eval()
    with torch.no_grad():
        found = model(**batch).logits
        if options:
            starts = [*(batch["position_ids"][0] == 0).nonzero().flatten().tolist(), found.shape[1]]
            assert len(starts) > 2
            assert worst(found, separately(model, batch["input_ids"], np.diff(starts).tolist())) < 1e-5


def _words():
    import tokenizers

    return tokenizers.Tokenizer(tokenizers.models.WordLevel({str(i): i for i in range(61)}, unk_token="0"))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("marked", [False, True])
def test_lengths_under_another_default_device(marked, masked):
    """They are counted on the CPU, whatever torch's default device is."""
    torch.manual_seed(0)
    model = mambakit.MambaForCausalLM(mambakit.MambaConfig(vocab_size=61, hidden_size=16, num_hidden_layers=2)).eval()
    ids = torch.randint(1, 60, (1, 12))
    given = {"max_length_q": 12, "max_length_k": 12}
    if marked:
        given["seq_idx"] = torch.tensor([[0] * 5 + [1] * 7])
    if masked:
        given["attention_mask"] = torch.tensor([[1] * 10 + [0] * 2])
    expected = model(ids, **given).logits
    with torch.device("meta"):
        assert torch.equal(model(ids, **given).logits, expected)
        with pytest.raises(ValueError, match="max_length_q is 3"):
            model(ids, **{**given, "max_length_q": 3, "max_length_k": 3})
