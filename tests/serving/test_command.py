"""`mambakit serve`: its limits, its end, and what it says of mistakes."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import mambakit
from mambakit import cli
from mambakit.commands.serve import _NUMBERS
from mambakit.commands.served_model import read_template
from mambakit.errors import UsageError
from tests.serving.conftest import serving, wait_until

KEY = "a-key-of-sixteen-or-more"


def alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def strict(model, tmp_path_factory):
    """A server of one row that lets one text wait, for those who know the key."""
    options = (
        "--model", model, "--slots", "1", "--max-waiting", "1", "--max-new-tokens", "100000", "--max-prompt-tokens",
        "200", "--drain-seconds", "1", "--prefix-cache", "--prefill-chunk-size", "16",
    )  # fmt: skip
    log = tmp_path_factory.mktemp("strict") / "log"
    with serving(log, *options, MAMBAKIT_API_KEY=KEY) as server:
        server.ready()
        assert server.post(prompt="x").status_code == 401
        assert server.client.get("/v1/models", headers={"Authorization": "Bearer wrong"}).status_code == 401
        server.client.headers["Authorization"] = f"Bearer {KEY}"
        yield server


BODY = {"prompt": "The cat", "temperature": 0}


def test_limits(strict):
    assert strict.complete(**BODY)["usage"]["completion_tokens"] == 16
    assert "at most 200 are read here" in strict.post(prompt="cat " * 300).json()["error"]["message"]
    assert strict.post(max_tokens=100001, **BODY).json()["error"]["param"] == "max_tokens"
    assert strict.post(n=3, **BODY).json()["error"]["param"] == "n"


def test_a_prefix_cache(strict, server):
    body = {
        "prompt": "The cat sat on the mat, and the dog. " * 5,
        "seed": 1,
        "repetition_penalty": 1.5,
        "max_tokens": 12,
    }
    first, second = strict.complete(**body), strict.complete(**body)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] <= 2, "another prompt was: The cat"
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == first["usage"]["prompt_tokens"]
    assert second["choices"] == first["choices"]
    assert server.complete(**body)["choices"] == first["choices"], "the penalty counts what was known, too"
    more = body["prompt"] + first["choices"][0]["text"] + " And"
    assert strict.complete(**body | {"prompt": more})["usage"]["prompt_tokens_details"]["cached_tokens"] > 0


def test_usage_counts_each_prompt_once(strict):
    """However many texts follow it, and whole as well as in events."""
    body = {
        "prompt": "The dog slept by the fire, and the naïve cat sat there. " * 3,
        "n": 2,
        "max_tokens": 3,
        "temperature": 0,
    }
    usages = [strict.complete(**body)["usage"]]
    *_, last, _done = strict.stream(**body, stream_options={"include_usage": True})
    usages.append(last["usage"])
    length = strict.complete(**body | {"n": 1})["usage"]["prompt_tokens"]
    assert [usage["prompt_tokens"] for usage in usages] == [length, length]
    cold, warm = [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages]
    assert cold <= 1, "another prompt may begin with the same token"
    assert warm == length
    assert [usage["completion_tokens"] for usage in usages] == [6, 6]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_a_full_queue_and_a_graceful_end(strict):
    stream = strict.stream(max_tokens=100_000, **BODY)
    next(stream)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(strict.post, max_tokens=100_000, **BODY)  # a short one would have its turn and be done
        wait_until(lambda: strict.health()["waiting"] == 1, "a text waits")
        full = strict.post(max_tokens=16, **BODY)
        assert full.status_code == 429
        assert full.headers["Retry-After"] == "1"
        assert "--max-waiting" in full.json()["error"]["message"]
        assert strict.metrics()['mambakit_requests_total{outcome="rejected",replica=""}'] == 1
        assert strict.metrics()["mambakit_waiting_requests"] == 1

        pids = [replica["pid"] for replica in strict.health()["replicas"]]
        strict.process.send_signal(signal.SIGTERM)
        *_, last = stream
        assert "1 seconds were not enough" in last["error"]["message"]
        assert waiting.result().status_code == 503
    assert strict.process.wait(20) == 0, strict.log.read_text()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(httpx.ConnectError):
        strict.client.get("/health")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes in /proc")
def test_no_replica_outlives_its_server(model, tmp_path):
    with serving(tmp_path / "log", "--model", model, "--replicas", "2") as server:
        early = server.post(prompt="x")
        assert early.status_code == 503
        assert "no replica is ready (replica 0 (cpu): loading; replica 1" in early.json()["error"]["message"]
        pids = [replica["pid"] for replica in server.health()["replicas"]]
        assert all(alive(pid) for pid in pids)
        server.process.kill()
        wait_until(lambda: not any(alive(pid) for pid in pids), "the replicas have ended", 10)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--slots", "0"), "--slots is 0; it must be 1 or more"),
        (("--port", "70000"), "--port is 70000"),
        (("--devices", "tpu"), "there is no device 'tpu'"),
        (("--devices", "cuda:99"), "cuda:99 is not here"),
        (("--devices", "cpu", "cpu", "--replicas", "1"), "--replicas is 1, but 2 --devices"),
        (("--device", "cpu", "--devices", "cpu"), "give one"),
        (("--model", "no/such/model/folder"), "neither a folder here nor a hub id"),
        (("--prompt-lookup", "--draft-model", "x"), "--draft-model and --prompt-lookup are two drafters; give one"),
        (("--draft-tokens", "4"), "--draft-tokens has no effect without --draft-model or --prompt-lookup"),
        (("--draft-tokens", "16", "--prompt-lookup"), "--draft-tokens is 16; it must be at most 15"),
        (("--draft-model", "/no/such/folder"), "there is no folder '/no/such/folder'"),
        (("--draft-model", ""), "--draft-model is empty"),
        (("--tokenizer", ""), "--tokenizer is empty"),
        (("--host", "203.0.113.1"), "cannot listen on --host 203.0.113.1"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, says, capsys):
    assert cli.main(["serve", *arguments]) == 2
    message = capsys.readouterr().err
    assert says in message
    assert len(message.strip().splitlines()) == 1


def test_a_model_that_does_not_load_ends_the_command(tmp_path, model, capsys):
    for file in Path(model).iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert cli.main(["serve", "--device", "cpu", "--port", "0", "--model", str(tmp_path)]) == 2
    assert "could not start: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "says"),
    [("--tokenizer", "has tokens up to 299, and the model's end at 99"), ("--draft-model", "the draft model has")],
)
def test_a_tokenizer_or_a_draft_model_of_another_vocabulary(option, says, tmp_path, model, capsys):
    """The model has 100 tokens, the other one and its tokenizer more."""
    for file in Path(model).iterdir():
        if "token" in file.name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    config = mambakit.MambaConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1)
    mambakit.MambaForCausalLM(config).save_pretrained(tmp_path)
    command = ["serve", "--device", "cpu", "--port", "0", "--model", str(tmp_path), option, model]
    assert cli.main(command) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("drafter", ["--draft-model", "--prompt-lookup"])
def test_drafts_change_no_text(drafter, model, server, tmp_path):
    """From a file of options; streamed, sampled with a seed, stopped, with log-probabilities."""
    file = tmp_path / "serve.toml"
    name = drafter[2:].replace("-", "_")
    value = "true" if drafter == "--prompt-lookup" else repr(model)
    file.write_text(f"model = {model!r}\nslots = 2\n{name} = {value}\ndraft_tokens = 3\ntokenizer = {model!r}\n")
    bodies = (
        {"prompt": "one two one two one two", "max_tokens": 40, "temperature": 0},
        {"prompt": "one two one two", "max_tokens": 20, "temperature": 0, "logprobs": 2},
    )  # fmt: skip
    with serving(tmp_path / "log", "--config", str(file)) as drafting:
        drafting.ready()
        for body in bodies:
            found, expected = drafting.complete(**body), server.complete(**body)
            assert found["choices"][0]["text"] == expected["choices"][0]["text"]
            assert found["usage"] == expected["usage"]
        streamed = drafting.stream(**bodies[0])
        assert (
            "".join(e["choices"][0]["text"] for e in streamed if e)
            == drafting.complete(**bodies[0])["choices"][0]["text"]
        )
        # A draft model's guesses are fewer beside other texts, and so another text is drawn.
        n = 3 if drafter == "--prompt-lookup" else 1
        sampled = {"prompt": "one two", "max_tokens": 20, "temperature": 1, "seed": 3, "n": n}
        assert drafting.complete(**sampled)["choices"] == drafting.complete(**sampled)["choices"]


def test_what_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cli.main(["serve"]) == 2
    assert 'pip install "mambakit[serve]"' in capsys.readouterr().err


def test_devices_are_dealt_in_turn(monkeypatch):
    import argparse

    from mambakit.commands.served_model import devices_of

    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)

    def devices(**given) -> tuple[str, ...]:
        return devices_of(argparse.Namespace(**{"device": None, "devices": None, "replicas": None} | given))

    assert devices() == ("cuda:0",)
    assert devices(replicas=3) == ("cuda:0", "cuda:1", "cuda:0")
    assert devices(devices=["cuda:1", "cuda:0"]) == ("cuda:1", "cuda:0")
    assert devices(device="cuda", replicas=2) == ("cuda:0", "cuda:0")
    assert devices(device="cpu", replicas=2) == ("cpu", "cpu")


BOUNDED = [number.name for number in _NUMBERS]


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", "-1", "1e30", "9" * 30, "0"])
@pytest.mark.parametrize("option", BOUNDED)
def test_numbers_are_checked_before_anything_is_loaded(option, value, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("mambakit.serving.server.serve", lambda options: None)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    try:
        status = cli.main(["serve", "--states", str(tmp_path), option, value])
    except SystemExit as ended:  # argparse's: no whole number
        status = ended.code
    if value == "0" and option in ("--port", "--max-waiting", "--drain-seconds", "--states-memory-mb"):
        assert status == 0
    else:
        assert status == 2
        assert option in capsys.readouterr().err


@pytest.mark.parametrize("number", [number for number in _NUMBERS if number.needs], ids=lambda number: number.name)
def test_an_option_without_the_one_that_it_belongs_to(number, tmp_path, monkeypatch, capsys):
    served = []
    monkeypatch.setattr("mambakit.serving.server.serve", served.append)
    value = str(number.default or 60)
    assert cli.main(["serve", number.name, value]) == 2
    assert f"{number.name} has no effect without {number.needs}" in capsys.readouterr().err
    (tmp_path / "serve.toml").write_text(f"{number.name[2:]} = {value}\n")
    assert cli.main(["serve", "--config", str(tmp_path / "serve.toml")]) == 2
    given = ["--states", str(tmp_path / "states"), "--prefix-cache", "--prompt-lookup"]
    assert cli.main(["serve", "--device", "cpu", *given, number.name, value]) == 0
    assert cli.main(["serve", "--device", "cpu"]) == 0, "its default needs nothing"
    assert len(served) == 2


def test_imports_are_bounded_by_all_bodies_that_are_received(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("mambakit.serving.server.serve", lambda options: None)
    asked = ["serve", "--device", "cpu", "--states", str(tmp_path / "states"), "--max-state-mb", "200"]
    assert cli.main(asked) == 2
    assert "more than --max-unfinished-mb 64" in capsys.readouterr().err
    assert cli.main([*asked, "--max-unfinished-mb", "200"]) == 0


def test_each_option_reaches_the_server(monkeypatch, tmp_path):
    """A number of its own for each: none is mixed up with another, and none is passed over."""
    served = []
    monkeypatch.setattr("mambakit.serving.server.serve", served.append)
    arguments, values = [], {}
    for i, number in enumerate(_NUMBERS):
        value = type(number.low)(number.low + 1000 + i if number.high > 1200 else min(number.high, 3 + i))
        values[number.name] = value
        arguments += [number.name, str(value)]
    arguments += ["--tokenizer", "another-tokenizer", "--prompt-lookup"]
    given = ["--device", "cpu", "--prefix-cache", "--states", str(tmp_path)]
    assert cli.main(["serve", *given, *arguments]) == 0
    (options,) = served
    reached = str(options)
    lost = [
        name for name, value in values.items() if str(value) not in reached and str(int(value) << 20) not in reached
    ]
    assert lost in ([], ["--replicas"]), reached
    assert len(options.devices) == values["--replicas"]
    worker = options.worker
    assert (worker.tokenizer, worker.prompt_lookup, worker.draft_model) == ("another-tokenizer", True, None)
    assert worker.draft_tokens == values["--draft-tokens"]


def test_slots_had_another_name(monkeypatch):
    served = []
    monkeypatch.setattr("mambakit.serving.server.serve", served.append)
    for name in ("--slots", "--rows"):
        assert cli.main(["serve", "--device", "cpu", name, "3"]) == 0
    assert [options.worker.slots for options in served] == [3, 3]


def test_room_for_connections(monkeypatch):
    import resource

    from mambakit.serving.http.connection_limits import connections_that_fit

    limits = [(1024, 4096)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, both: limits.append(both))
    assert connections_that_fit(None, 2) == (1000, 1024)
    assert limits[-1] == (4096, 4096), "it is raised"
    assert connections_that_fit(2900, 2) == (2900, 1024)
    assert connections_that_fit(3000, 2) == (3000, 128), "connections first"
    with pytest.raises(ValueError, match=r"--max-connections 4000 and 2 replicas need 4\d\d\d open files.*have 4096"):
        connections_that_fit(4000, 2)
    limits.append((256, 1024))
    room, backlog = connections_that_fit(None, 2)
    assert 500 < room < 1000
    assert backlog == 128
    limits.append((2048, resource.RLIM_INFINITY))
    assert connections_that_fit(None, 2) == (1000, 1024)
    assert limits[-1] == (1 << 20, resource.RLIM_INFINITY)
    limits.append((64, 64))
    with pytest.raises(ValueError, match="open files"):
        connections_that_fit(None, 2)


def test_a_chat_template(tmp_path):
    whole = tmp_path / "whole.jinja"
    whole.write_text("{% generation %}{{ raise_exception('no') }}{% endgeneration %}{{ messages }}")
    assert read_template(str(whole)) == whole.read_text()
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% if")
    with pytest.raises(ValueError, match="broken.jinja' is no template .*; give a file of Jinja"):
        read_template(str(broken))
    with pytest.raises(UsageError, match="there is no chat template file"):
        read_template(str(tmp_path / "none"))
