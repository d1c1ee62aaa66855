"""The lm-evaluation-harness drives mambakit: requests as it makes them, a whole task, and its command line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mambakit
from mambakit.generation.score import score_text
from tests.models.tiny import save_tiny

pytest.importorskip("lm_eval")
pytestmark = pytest.mark.filterwarnings("ignore")
ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["The cat sat on the mat.", "The dog slept by the fire, naïve and tired.", "On the mat."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path, eos_token_id=303)  # no token of its tokenizer: texts run to their full length
    return path


@pytest.fixture(scope="module")
def model(folder):
    from lm_eval.api.registry import get_model

    import mambakit.evaluation.harness  # noqa: F401  (registers it)

    return get_model("mambakit").create_from_arg_string(f"pretrained={folder}", {"batch_size": 1, "device": "cpu"})


def instances(kind: str, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def test_loglikelihood_is_that_of_the_harness_own_model(folder, model):
    """The same requests through the harness's transformers model, one at a time."""
    from lm_eval.models.huggingface import HFLM

    other = HFLM(
        pretrained=mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), batch_size=1,
        tokenizer=mambakit.AutoTokenizer.from_pretrained(folder), max_length=512,
    )  # fmt: skip
    pairs = [(t.rpartition(" ")[0], " " + t.rpartition(" ")[2]) for t in TEXTS] + [("", TEXTS[0]), ("The cat ", "sat")]
    requests = instances("loglikelihood", *pairs)
    ours, theirs = model.loglikelihood(requests, disable_tqdm=True), other.loglikelihood(requests, disable_tqdm=True)
    for (log_prob, greedy), (expected, their_greedy) in zip(ours, theirs, strict=True):
        assert log_prob == pytest.approx(expected, rel=1e-4)
        assert greedy == their_greedy
    requests = instances("loglikelihood_rolling", *((t,) for t in TEXTS))
    rolling = model.loglikelihood_rolling(requests, disable_tqdm=True)
    assert rolling == pytest.approx(other.loglikelihood_rolling(requests, disable_tqdm=True), rel=1e-4)
    assert rolling[1] == pytest.approx(-score_text(model.model, model.tokenizer, TEXTS[1]).nats, rel=1e-5)


def test_generate_until(model):
    greedy = {"max_gen_toks": 12, "do_sample": False, "temperature": 0.0}
    (plain,) = model.generate_until(
        instances("generate_until", ("The cat", {**greedy, "until": []})), disable_tqdm=True
    )
    ids = model.tokenizer("The cat", return_tensors="pt", add_special_tokens=False).input_ids
    whole = model.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert plain == model.tokenizer.decode(whole)
    stop = plain[3:5]
    (cut,) = model.generate_until(
        instances("generate_until", ("The cat", {**greedy, "until": [stop]})), disable_tqdm=True
    )
    assert cut == plain[: plain.index(stop)]
    with pytest.raises(ValueError, match="'num_beams' is not known"):
        model.generate_until(instances("generate_until", ("a", {"num_beams": 2})), disable_tqdm=True)


@pytest.mark.slow
def test_a_task_from_local_files(folder, tmp_path):
    """Tasks like BLiMP and LAMBADA through the harness's evaluator and command line, and by our own commands."""
    pairs = [{"good": a, "bad": b} for a in TEXTS for b in TEXTS if a != b]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    task = tmp_path / "tasks" / "pairs.yaml"
    task.parent.mkdir()
    task.write_text(f"""
task: tiny_pairs
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{tmp_path / "pairs.jsonl"}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{{{[good, bad]}}}}"
metric_list:
  - metric: acc
""")
    command = [
        sys.executable, "-m", "mambakit", "evaluate", "harness", "run", "--model", "mambakit", "--model_args",
        f"pretrained={folder}", "--tasks", "tiny_pairs", "--include_path", str(task.parent), "--device", "cpu",
        "--output_path", str(tmp_path / "out"),
    ]  # fmt: skip
    environment = {
        **os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    (report,) = (tmp_path / "out").rglob("results_*.json")
    accuracy = json.loads(report.read_text())["results"]["tiny_pairs"]["acc,none"]
    records = [{"sentence_good": p["good"], "sentence_bad": p["bad"], "UID": "u", "field": "f"} for p in pairs]
    path = tmp_path / "b.jsonl"
    path.write_text("\n".join(map(json.dumps, records)))
    from mambakit.evaluation.benchmarks import blimp

    ours = blimp(
        mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(),
        mambakit.AutoTokenizer.from_pretrained(folder), [path],
    )  # fmt: skip
    assert accuracy == pytest.approx(ours.accuracy)
