"""The files of `deploy/`: they parse, and every option, path, port and series in them is there."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from mambakit import cli
from mambakit.serving.api import operations
from mambakit.serving.api.declarations import Operation
from mambakit.serving.metrics import Metrics
from mambakit.toml_files import read_toml

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
PATHS = {one.path for one in vars(operations).values() if isinstance(one, Operation)}


def options_of(*arguments: str):
    """What `mambakit serve` reads of these arguments; wrong ones raise."""
    return cli._parse(["serve", *arguments])


def test_the_configuration_is_read_and_what_is_commented_out_would_be(tmp_path):
    options = options_of("--config", str(DEPLOY / "serve.toml"))
    assert (options.host, options.log_format, options.prefix_cache) == ("0.0.0.0", "json", True)
    text = re.sub(r"^# (?=[a-z-]+ = )", "", (DEPLOY / "serve.toml").read_text(), flags=re.MULTILINE)
    file = tmp_path / "serve.toml"
    file.write_text(text)
    options = options_of("--config", str(file))
    assert options.devices == ["cuda:0", "cuda:1"]
    assert options.allowed_host == ["models.example.org"]
    assert len(read_toml(file)) > len(read_toml(DEPLOY / "serve.toml")) + 7


def test_the_unit():
    unit = configparser.ConfigParser(interpolation=None, strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "mambakit.service")
    program, command, *_ = shlex.split(unit["Service"]["ExecStart"])
    assert (Path(program).name, command) == ("mambakit", "serve")
    assert "-HUP" in unit["Service"]["ExecReload"]
    drain = read_toml(DEPLOY / "serve.toml")["drain-seconds"]
    assert int(unit["Service"]["TimeoutStopSec"]) > drain + 10
    assert set(unit.sections()) == {"Unit", "Service", "Install"}


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="there is no systemd")
def test_systemd_reads_the_unit():
    command = ["systemd-analyze", "verify", str(DEPLOY / "mambakit.service")]
    told = subprocess.run(command, capture_output=True, text=True).stderr.splitlines()
    # The program itself is not installed there.
    assert [line for line in told if line.startswith("mambakit.service") and "not executable" not in line] == []


def documents() -> dict[str, dict]:
    return {one["kind"]: one for one in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def test_the_manifest(tmp_path):
    found = documents()
    assert set(found) == {"ConfigMap", "Deployment", "Service", "PodDisruptionBudget"}
    file = tmp_path / "serve.toml"
    file.write_text(found["ConfigMap"]["data"]["serve.toml"])
    options = options_of("--config", str(file))
    pod = found["Deployment"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": options.port}
    for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
        asked = container[probe]["httpGet"]
        assert asked["path"] in PATHS
        assert asked["port"] in ports
    assert found["Service"]["spec"]["ports"][0]["targetPort"] in ports
    waits = float(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > options.drain_seconds + waits
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert set(mounts) == {volume["name"] for volume in pod["volumes"]}
    assert options.api_key_file.startswith(mounts["keys"] + "/")
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    for selector in (
        found["Deployment"]["spec"]["selector"]["matchLabels"],
        found["Service"]["spec"]["selector"],
        found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
    ):
        assert selector.items() <= labels


def test_the_container():
    text = (DEPLOY / "Dockerfile").read_text()
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    lines = [line for line in joined.splitlines() if line.strip()]
    known = {
        "ARG",
        "FROM",
        "RUN",
        "WORKDIR",
        "COPY",
        "ENV",
        "EXPOSE",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "ENTRYPOINT",
        "USER",
    }
    assert {line.split()[0] for line in lines} <= known
    stages = re.findall(r"^FROM \S+ AS (\w+)$", joined, re.MULTILINE)
    assert set(re.findall(r"--target (\w+)", text)) == {"cpu", "cuda"} <= set(stages)
    for stage in re.findall(r"--from=(\w+)", joined):
        assert stage in stages
    for source in re.findall(r"^COPY (deploy/\S+)", joined, re.MULTILINE):
        assert (ROOT / source).is_file()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", joined, re.MULTILINE)
    program, *arguments = json.loads(entry)
    assert (program, arguments[0]) == ("mambakit", "serve")
    copied = re.search(r"^COPY deploy/serve.toml (\S+)$", joined, re.MULTILINE)
    assert copied is not None
    assert arguments[1:] == ["--config", copied[1]]
    extras = set(re.findall(r"\[([\w,]+)\]\"", joined))
    declared = read_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]
    assert {extra for group in extras for extra in group.split(",")} <= set(declared)
    port = read_toml(DEPLOY / "serve.toml")["port"]
    assert f"EXPOSE {port}" in lines
    (probe,) = re.findall(r"http://127.0.0.1:(\d+)(/\w+)", joined)
    assert (int(probe[0]), probe[1]) == (port, "/readyz")
    for command in re.findall(r"docker run .* mambakit:\w+ (.*)$", text, re.MULTILINE):
        options_of(*shlex.split(command))


# -- the dashboard -----------------------------------------------------------------------------------------------------


def series() -> dict[str, set[str]]:
    """The labels of every series that a server shows, by its name."""
    metrics = Metrics()
    for one in list(vars(metrics).values()):
        names = getattr(one, "_labelnames", ())
        if names:
            one.labels(*(["x"] * len(names)))
    found: dict[str, set[str]] = {}
    for line in metrics.text().decode().splitlines():
        if not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels = set(re.findall(r'(\w+)="', rest)) if rest else set()
            found.setdefault(name.split(" ")[0], set()).update(labels)
    return found


def test_the_dashboard():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    variables = {one["name"] for one in board["templating"]["list"]}
    known = series()
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    used = set()
    for panel in panels:
        assert panel["targets"]
        for target in panel["targets"]:
            expression = target["expr"]
            assert expression.count("(") == expression.count(")")
            names = set(re.findall(r"\bmambakit_\w+", expression))
            assert names <= set(known), f"{panel['title']}: there is no {names - set(known)}"
            used |= names
            given = {"job", "instance"} | set.union(*(known[name] for name in names))
            asked = set(re.findall(r"(\w+)=~?\"", expression)) | {
                label for by in re.findall(r"by \(([\w, ]+)\)", expression) for label in by.split(", ")
            }
            asked |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert asked <= given, f"{panel['title']}: there is no label {asked - given}"
            assert set(re.findall(r"\$(\w+)", expression)) <= variables | {"__rate_interval"}
    left_out = {re.sub(r"_(bucket|count|sum|created|total)$", "", name) for name in set(known) - used}
    shown = {re.sub(r"_(bucket|count|sum|created|total)$", "", name) for name in used}
    assert left_out <= shown, "every series has its panel"


def test_panels_do_not_overlap():
    board = json.loads((DEPLOY / "grafana.json").read_text())
    cells = set()
    for one in board["panels"]:
        place = one["gridPos"]
        area = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not area & cells, one["title"]
        assert place["x"] + place["w"] <= 24
        cells |= area
