"""The page and the picture: whole files whose data are the numbers', and text of users that stays text."""

from __future__ import annotations

import base64
import json
import re

import numpy as np
import pytest
import torch

import mambakit
from mambakit import cli
from mambakit.inspection import inspect, page, summarize
from mambakit.inspection.summary import _COLUMNS, attention_map, half_life_quantiles, layer_maps
from tests.models.tiny import save_tiny

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    save_tiny(path)
    return path


@pytest.fixture(scope="module")
def both(folder):
    model = mambakit.AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    return model, mambakit.AutoTokenizer.from_pretrained(folder)


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', html, re.DOTALL)[1])


def test_the_page_holds_the_numbers(both):
    found = inspect(*both, "The cat </script><script>alert(1)</script> & sat\n")
    html = page(summarize(found), "<b>name</b>")
    assert html.count("</script>") == 2
    data = data_of(html)
    assert "".join(data["pieces"][1:]) == "The cat </script><script>alert(1)</script> & sat\n"
    assert data["model"] == "<b>name</b>"
    assert data["surprise"] == pytest.approx(found.surprise.tolist(), abs=1e-3)
    step = data["maps"]["step"]
    values = np.frombuffer(base64.b64decode(step["data"]), np.uint8).reshape(2, step["columns"])
    back = step["low"] * (step["high"] / step["low"]) ** (values / 255)
    inside = (found.step.numpy() > step["low"]) & (found.step.numpy() < step["high"])
    assert np.allclose(back[inside], found.step.numpy()[inside], rtol=0.02)
    assert not re.search(r'(?:src|href)="', html)  # needs nothing else


def test_long_texts_are_pooled(both):
    model, tokenizer = both
    found = inspect(model, tokenizer, torch.randint(1, 300, (_COLUMNS + 300,)), layers=[0], channels=[0])
    maps, width = layer_maps(found), 2
    assert maps["kept"].values.shape == (2, -(-len(found.tokens) // width))
    kept = maps["kept"]
    mean = float(found.kept[1, 10:12].double().mean())
    assert float(kept.values[1, 5]) == pytest.approx(
        min(1, max(0, (mean - kept.low) / (kept.high - kept.low))), abs=1e-6
    )
    last = float(found.kept[1, -1])  # its column has one token
    assert float(kept.values[1, -1]) == pytest.approx(
        min(1, max(0, (last - kept.low) / (kept.high - kept.low))), abs=1e-6
    )
    shares = attention_map(found, 0)
    assert shares.width == 3
    assert float(shares.values.max()) == 1
    assert len(half_life_quantiles(found)) == 2


def test_the_command(folder, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    outs = [str(tmp_path / name) for name in ("a.html", "a.png", "a.npz")]
    command = ["inspect", "--model", str(folder), "--layers", "1", "--channels", "0", "5"]
    for name in outs:
        command += ["--out", name]
    assert cli.main([*command, "--", "The cat sat on the mat"]) == 0
    assert "surprise" not in capsys.readouterr().err
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
    arrays = np.load(outs[2])
    assert arrays["layer1_channels"].tolist() == [0, 5]
    assert "".join(arrays["pieces"][1:]) == "The cat sat on the mat"
    assert set(data_of((tmp_path / "a.html").read_text())["attention"]) == {"1"}
    text = tmp_path / "text"
    text.write_text("The dog slept")
    assert cli.main(["inspect", "--model", str(folder), "--file", str(text), "--out", outs[0]]) == 0
    assert "".join(data_of((tmp_path / "a.html").read_text())["pieces"][1:]) == "The dog slept"


def test_mistakes(folder, tmp_path, capsys):
    out = ["--out", str(tmp_path / "a.html")]
    for arguments, message in (
        (["x"], "--out"),
        (out, "give a text, or --file"),
        (["x", "--out", str(tmp_path / "a.gif")], "ends in none of .html, .png, .npz"),
        (["x", "--out", str(tmp_path / "no" / "a.html")], "there is no folder"),
        (["x", *out, "--layers", "9"], "layer 9 is not among"),
    ):
        assert cli.main(["inspect", "--model", str(folder), *arguments]) == 2, arguments
        assert message in capsys.readouterr().err
