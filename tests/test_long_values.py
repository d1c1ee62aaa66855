"""A long wrong value does not come back whole in an error, nor as an error about printing it."""

from __future__ import annotations

import pytest

import mambakit
from mambakit.generation.constrain import Constraint
from mambakit.generation.drafters import PromptLookup
from mambakit.generation.engine import Engine, Request
from mambakit.generation.prefix_cache import PrefixCache
from mambakit.generation.stream import Sampling, Stream
from mambakit.training.config import TrainConfig
from tests.models.configurations import pair, tokens
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


LONG = "x" * 10_000
HUGE = 10**5000


@pytest.fixture(scope="module")
def model():
    return pair("plain")[0]


CALLS = {
    "sampling": lambda m: Sampling(temperature=LONG),
    "sampling digits": lambda m: Sampling(top_k=HUGE),
    "request": lambda m: Request([LONG]),
    "request length": lambda m: Request([1], max_new_tokens=LONG),
    "request sampling": lambda m: Request([1], LONG),
    "stop": lambda m: Stream(m, None, [1], stop=[LONG, ""]),
    "stop kind": lambda m: Stream(m, None, [1], stop=[LONG, 1]),
    "engine": lambda m: Engine(m, rows=-HUGE),
    "token": lambda m: Engine(m).submit(Request([60, 2**62])),
    "pipeline": lambda m: mambakit.pipeline(LONG),
    "model": lambda m: mambakit.AutoModelForCausalLM.from_pretrained(LONG[:250]),
    "quantize": lambda m: m.quantize(LONG),
    "configuration": lambda m: mambakit.MambaConfig(time_step_init_scheme=LONG),
    "activation": lambda m: mambakit.MambaMixer(mambakit.MambaConfig(hidden_act=LONG)),
    "training": lambda m: TrainConfig(format=LONG),
    "lookup": lambda m: PromptLookup(longest=-HUGE),
    "cache": lambda m: PrefixCache(m, memory_bytes=-HUGE),
    "generate": lambda m: m.generate(tokens(1, 3), cache_implementation=LONG),
    "chunk": lambda m: m.generate(tokens(1, 3), prefill_chunk_size=-HUGE),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_long_value_is_cut(model, call):
    with pytest.raises((TypeError, ValueError)) as error:
        call(model)
    message = str(error.value)
    assert len(message) < 1000
    assert "x" * 200 not in message
    assert "set_int_max_str_digits" not in message


@pytest.mark.parametrize("form", ["json_schema", "regex", "grammar"])
@pytest.mark.parametrize(
    "value",
    ["(" * 5000 + "\ud800", "\ud800", "[" * 100_000, {"type": LONG}, {"a": object()}, 5, "(" + LONG, {"x": 1e400}],
)
def test_constraints(constrained, form, value):
    """Whatever is no grammar is refused as a ValueError that names which it was."""
    try:
        Constraint(*constrained, **{form: value})
    except ValueError as error:
        message = str(error)
    else:
        return
    assert len(message) < 700
    assert form in message
    message.encode()


@pytest.fixture(scope="module")
def constrained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    model = save_tiny(folder)
    model.generation_config.eos_token_id = 0
    return model, mambakit.AutoTokenizer.from_pretrained(folder)
