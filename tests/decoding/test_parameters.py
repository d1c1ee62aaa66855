"""Numbers that Python callers give: coerced, or refused by name. Nothing else reaches what chooses tokens."""

from __future__ import annotations

import dataclasses
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from mambakit.decoding.parameters import SAMPLING
from mambakit.generation.engine import Engine, Request
from mambakit.generation.speculative import SpeculativeStream
from mambakit.generation.stream import Sampling, Stream
from tests.models.configurations import pair

pytestmark = pytest.mark.filterwarnings("ignore")


def test_the_table_is_samplings():
    fields = [(f.name, f.default) for f in dataclasses.fields(Sampling) if f.name != "logit_bias"]
    assert fields == [(name, number.default) for name, number in SAMPLING.items()]


@pytest.mark.parametrize(
    "one", [1, 1.0, True + 0, np.int8(1), np.float16(1), torch.tensor(1), torch.tensor(1.0), Fraction(1), np.array(1)]
)
@pytest.mark.parametrize("name", SAMPLING)
def test_any_kind_of_one_is_one(name, one):
    value = getattr(Sampling(**{name: one}), name)
    assert value == 1
    assert type(value) is (int if SAMPLING[name].whole else float)


@pytest.mark.parametrize("name", SAMPLING)
def test_none_is_the_default(name):
    assert Sampling(**{name: None}) == Sampling()


@pytest.mark.parametrize(
    "value",
    [
        True,
        np.True_,
        torch.tensor(True),
        "1",
        b"1",
        [1],
        (1,),
        {},
        1j,
        torch.ones(1),
        np.ones(1),
        Decimal(1),
        object(),
        torch.tensor(1j),
    ],
)
@pytest.mark.parametrize("name", SAMPLING)
def test_what_is_no_number_is_refused_by_name(name, value):
    with pytest.raises(TypeError, match=f"^{name} is .*; it must be a "):
        Sampling(**{name: value})


@pytest.mark.parametrize(
    "value",
    [float("nan"), float("inf"), -float("inf"), -1e-300, 10**400, -(10**5000), Fraction(10**5000), np.float16("inf")],
    ids=range(8),
)
@pytest.mark.parametrize("name", SAMPLING)
def test_what_is_out_of_range_is_refused_by_name(name, value):
    if value == -1e-300 and name in ("presence_penalty", "frequency_penalty"):
        value = -100.5  # these may be negative
    with pytest.raises(ValueError, match=f"^{name} is .*; it must be a ") as error:
        Sampling(**{name: value})
    assert len(str(error.value)) < 300


def test_minus_zero_is_greedy():
    assert str(Sampling(temperature=-0.0).temperature) == "0.0"
    assert Sampling(temperature=0, top_k=3.0) == Sampling(temperature=0.0, top_k=3)
    with pytest.raises(ValueError, match="top_k is 1.5; it must be a whole number"):
        Sampling(top_k=1.5)


@pytest.fixture(scope="module")
def model():
    return pair("plain")[0]


@pytest.mark.parametrize(
    ("ids", "error"),
    [
        ([], "expected \\(l,\\)"), ([[1]], "expected \\(l,\\)"), ([1.0], "whole numbers"), ([True], "whole numbers"),
        ("ab", "token ids"), (5, "token ids"), (None, "token ids"), ([10**30], "token ids"), ([None], "token ids"),
        (torch.ones(2), "whole numbers"), (torch.tensor(3), "expected \\(l,\\)"), (["\ud800"], "token ids"),
    ],
)  # fmt: skip
def test_prompts_that_are_none(model, ids, error):
    for make in (lambda: Request(ids), lambda: Stream(model, None, ids), lambda: SpeculativeStream(model, None, ids)):
        with pytest.raises((TypeError, ValueError), match=error):
            make()


@pytest.mark.parametrize("ids", [[1, 2], (1, 2), np.array([1, 2], np.int32), torch.tensor([1, 2], dtype=torch.uint8)])
def test_prompts_of_any_kind(model, ids):
    (request,) = Engine(model).write([Request(ids, max_new_tokens=np.int64(3))])
    assert request.tokens == Engine(model).write([Request(torch.tensor([1, 2]), max_new_tokens=3.0)])[0].tokens


@pytest.mark.parametrize("token", [-1, 61, 2**62, -(2**63)])
def test_tokens_that_the_model_does_not_have(model, token):
    engine = Engine(model)
    with pytest.raises(ValueError, match=f"has token {token}; the model's are 0 to 60"):
        engine.submit(Request([1, token]))
    with pytest.raises(ValueError, match=f"has token {token}"):
        engine.submit(Request([1], context=[token]))
    with pytest.raises(ValueError, match=f"has token {token}"):
        Stream(model, None, [token])
    assert not engine.waiting


@pytest.mark.parametrize("value", [0, -1, 1.5, float("inf"), float("nan"), True, "5", 2**63, 10**400])
def test_counts(model, value):
    for make in (
        lambda: Request([1], max_new_tokens=value),
        lambda: Stream(model, None, [1], chunk_size=value),
        lambda: SpeculativeStream(model, None, [1], draft_tokens=value),
        lambda: Engine(model, rows=value),
        lambda: Engine(model, chunk_size=value),
    ):
        with pytest.raises((TypeError, ValueError), match="(max_new_tokens|chunk_size|draft_tokens|rows) is "):
            make()


@pytest.mark.parametrize("stop", [1, [1], [None], ["a", ""], "", object(), {"a": 1}])
def test_stops_that_are_none(model, stop):
    with pytest.raises((TypeError, ValueError), match="stop"):
        Stream(model, None, [1], stop=stop)


def test_one_stop_string_is_one():
    assert Stream(pair("plain")[0], None, [1], stop="ab").stop == ("ab",)
    with pytest.raises(TypeError, match="give a Sampling"):
        Request([1], {"temperature": 1})


@pytest.mark.parametrize(
    "value, error, message",
    [
        ([5], TypeError, "logit_bias is"),
        ({"5": 1}, TypeError, 'a token of logit_bias is "5"'),
        ({-1: 1}, ValueError, "a token of logit_bias is -1"),
        ({5: "1"}, TypeError, r'logit_bias\[5\] is "1"'),
        ({5: float("inf")}, ValueError, r"logit_bias\[5\] is Infinity"),
        ({5: None}, None, ""),
    ],
)
def test_biases(value, error, message):
    if error is None:
        assert Sampling(logit_bias=value).logit_bias == {5: 0.0}
        return
    with pytest.raises(error, match=message):
        Sampling(logit_bias=value)
