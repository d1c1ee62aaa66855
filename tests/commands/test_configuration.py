"""--config: a TOML file of options."""

from __future__ import annotations

import pytest

from mambakit import cli
from mambakit.commands import serve
from mambakit.commands.serve import _NUMBERS


@pytest.fixture
def served(monkeypatch):
    """The arguments with which the command would run."""
    seen = []
    monkeypatch.setattr(serve, "run", lambda args: seen.append(args) or 0)

    def call(*argv: str):
        seen.clear()
        assert cli.main(["serve", *argv]) == 0
        return seen[0]

    return call


def file_of(tmp_path, text: str) -> str:
    path = tmp_path / "serve.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_options_of_every_kind(tmp_path, served):
    file = file_of(
        tmp_path,
        'model = "a model"\nslots = 3\nheartbeat-seconds = 7\nprefix_cache = true\nlog-prompts = false\n'
        'devices = ["cpu", "cuda:1"]\nallowed-host = ["a.example", "b.example"]\nallowed-origin = "*"\n',
    )
    args = served("--config", file)
    assert (args.model, args.slots, args.heartbeat_seconds) == ("a model", 3, 7.0)
    assert (args.prefix_cache, args.log_prompts) == (True, False)
    assert args.devices == ["cpu", "cuda:1"]
    assert args.allowed_host == ["a.example", "b.example"]
    assert args.allowed_origin == ["*"]
    assert args.port == 8000, "the rest is as without a file"


def test_the_command_line_replaces_the_file(tmp_path, served):
    file = file_of(tmp_path, 'slots = 3\nport = 9\nallowed-host = ["a.example"]\ndevices = ["cpu", "cpu"]\n')
    for argv in (
        ("--config", file, "--slots", "5", "--allowed-host=b.example", "--devices", "cuda:0"),
        ("--rows", "5", "--allowed-host=b.example", "--devices", "cuda:0", f"--config={file}"),
    ):
        args = served(*argv)
        assert (args.slots, args.port, args.allowed_host, args.devices) == (5, 9, ["b.example"], ["cuda:0"])


def test_every_number_may_stand_in_the_file(tmp_path, served):
    values = {number.name[2:]: type(number.low)(number.low + 1) for number in _NUMBERS}
    args = served("--config", file_of(tmp_path, "".join(f"{name} = {value}\n" for name, value in values.items())))
    assert {name: getattr(args, name.replace("-", "_")) for name in values} == values


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("slots = ", "not valid TOML"),
        ("slot = 3", 'there is no option "slot"; did you mean slots?'),
        ("[replicas]\nslots = 3", "there are no tables"),
        ('slots = "3"', 'slots is "3"; it must be a whole number'),
        ("slots = 3.5", "slots is 3.5; it must be a whole number"),
        ("slots = true", "slots is true; it must be a whole number"),
        ('idle-seconds = "x"', "it must be a number"),
        ("prefix-cache = 1", "prefix-cache is 1; it must be true or false"),
        ("model = 5", "model is 5; it must be a string"),
        ('model = ""', "--model is empty"),
        ("devices = []", "devices is empty"),
        ("devices = [1]", "devices is 1; it must be a string"),
        ('config = "other.toml"', "there is no option"),
        ('make-key = "x"', "there is no option"),
        ('dtype = "float8"', "--dtype"),
        ('log-format = "xml"', "--log-format"),
    ],
)
def test_a_wrong_file_is_refused(text, says, tmp_path, served, capsys):
    try:
        code = cli.main(["serve", "--config", file_of(tmp_path, text)])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert says in capsys.readouterr().err


def test_a_file_that_is_not_there(tmp_path, served, capsys):
    for name in (tmp_path / "none.toml", tmp_path):
        assert cli.main(["serve", "--config", str(name)]) == 2
        assert str(name) in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["serve", "--config"])
    assert "expected one argument" in capsys.readouterr().err
