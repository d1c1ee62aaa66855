"""`mambakit chat`: turns, forks, files, and states that are read once."""

from __future__ import annotations

import array
import io
import json
import sys

import pytest

from mambakit import cli
from mambakit.commands.chat_model import LocalModel, Plain
from mambakit.commands.conversation import Conversation
from mambakit.errors import UsageError
from tests.serving.api_server import api_server, byte_tokenizer

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


# -- the tree ----------------------------------------------------------------------------------------------------------


def spoken(*words: str) -> Conversation:
    chat = Conversation()
    for number, said in enumerate(words):
        chat.add("assistant" if number % 2 else "user", said)
    return chat


def words_of(chat: Conversation) -> list[str]:
    return [turn.text for turn in chat.current.path()]


def test_back_and_forks():
    chat = spoken("a", "b", "c", "d")
    assert chat.fork("here") == "here"
    chat.back()
    assert words_of(chat) == ["a", "b"]
    chat.add("user", "x")
    assert chat.fork() == "fork2"
    chat.back("here")
    assert words_of(chat) == ["a", "b", "c", "d"]
    chat.back("2")
    assert words_of(chat) == []
    chat.back("fork2")
    assert words_of(chat) == ["a", "b", "x"]
    with pytest.raises(UsageError, match="beginning of the chat"):
        chat.back("9")
    with pytest.raises(UsageError, match="there are: here, fork2"):
        chat.back("there")
    with pytest.raises(UsageError, match="begin with a letter"):
        chat.fork("7")


def test_a_saved_chat_has_all_its_forks(tmp_path):
    chat = spoken("a", 'b\n"ü"', "c", "d")
    chat.fork("end")
    chat.back()
    chat.add("user", "x")
    chat.save(tmp_path / "t.json", "m", None)
    found = Conversation.load(tmp_path / "t.json")
    assert words_of(found) == ["a", 'b\n"ü"', "x"]
    found.back("end")
    assert words_of(found) == ["a", 'b\n"ü"', "c", "d"]
    assert len(found.root.children[0].children[0].children) == 2


@pytest.mark.parametrize(
    "change",
    [
        "", "[]", "{}", '{"format": "mambakit-chat-1"}', "[" * 100000,
        {"turns": [{"role": "user", "text": "a", "after": 1}]},
        {"turns": [{"role": "robot", "text": "a", "after": 0}]}, {"turns": [{"role": "user", "text": 3, "after": 0}]},
        {"current": -1}, {"current": True}, {"forks": {"a": 99}}, {"forks": []}, {"turns": 3}, {"format": "other"},
    ],
)  # fmt: skip
def test_a_file_that_is_no_chat(change, tmp_path):
    file = tmp_path / "t.json"
    spoken("a").save(file, "m", None)
    if isinstance(change, str):
        file.write_text(change)
    else:
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match="no chat that /save wrote"):
        Conversation.load(file)


# -- a model in this process -------------------------------------------------------------------------------------------

SAMPLING = {
    "temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.1, "max_new_tokens": 12,
    "seed": None, "stop": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def local():
    import argparse

    return LocalModel(argparse.Namespace(model=None, device="cpu", dtype=None), None)


@pytest.fixture(params=["plain", "template", "stops"])
def answerer(request, local, monkeypatch):
    monkeypatch.setattr(local, "plain", Plain("I", "She") if request.param == "stops" else Plain())
    if request.param == "template":
        monkeypatch.setattr(local, "plain", None)
        monkeypatch.setattr(local.tokenizer, "chat_template", TEMPLATE)
    return local


def talk(answerer, chat: Conversation, words: str) -> int:
    """The number of tokens that were read."""
    chat.add("user", words)
    turn = chat.add("assistant", "")
    assert "".join(answerer.reply(turn, SAMPLING)) == turn.text
    return answerer.reading


def forget(chat: Conversation) -> None:
    for turn in chat.current.path():
        turn.memory = None


def test_a_turn_reads_what_is_new_and_says_the_same(answerer):
    chat = Conversation()
    first = talk(answerer, chat, "It was a dark and stormy night, and the rain fell in torrents. " * 8)
    second = talk(answerer, chat, "Who is there?")
    third = talk(answerer, chat, "Go on.")
    assert first > 100
    assert max(second, third) < 30
    remembered = words_of(chat)

    chat = Conversation()
    for words in remembered[::2]:
        talk(answerer, chat, words)
        forget(chat)
    assert answerer.reading > 100, "without states all is read"
    assert words_of(chat) == remembered


def test_a_fork_does_not_change_its_sibling(answerer):
    chat = Conversation()
    talk(answerer, chat, "The old man looked at the sea.")
    place = chat.fork()
    talk(answerer, chat, "What did he see?")
    one = words_of(chat)
    chat.back(place)
    talk(answerer, chat, "Why was he sad?")
    chat.back(place)
    assert talk(answerer, chat, "What did he see?") < 30
    assert words_of(chat) == one


def test_a_reply_that_was_stopped_is_read_again(answerer):
    chat = Conversation()
    talk(answerer, chat, "The old man looked at the sea.")
    chat.add("user", "And then?")
    turn = chat.add("assistant", "")
    pieces = answerer.reply(turn, SAMPLING | {"max_new_tokens": 400})
    next(pieces)
    pieces.close()
    assert turn.memory is None
    assert talk(answerer, chat, "Go on.") < 60


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def chat(monkeypatch, capsys):
    def run(lines: str, *argv: str) -> tuple[str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
        code = cli.main(["chat", "--temperature", "0", "--max-new-tokens", "8", *argv])
        out, err = capsys.readouterr()
        assert code == 0, err
        return out, err

    return run


def test_a_chat_is_saved_and_gone_on_with(chat, tmp_path):
    file = tmp_path / "talk.json"
    first, told = chat(f"It was night.\n/save {file}\nAnd then?\n", "--device", "cpu")
    assert "talk.json.safetensors" in told
    again, told = chat("/state\nAnd then?\n", "--device", "cpu", "--load", str(file))
    assert "a state of" in told
    assert first.endswith(again)
    (tmp_path / "talk.json.safetensors").write_bytes(b"damaged")
    without, told = chat("And then?\n", "--device", "cpu", "--load", str(file))
    assert "without its state" in told
    assert without.strip(), "the words are read again"


def test_chats_of_one_stem_keep_a_state_each(chat, tmp_path):
    names = [tmp_path / name for name in ("a.json", "a.txt", "a")]
    texts = {}
    for name, words in zip(names, ("It was night.", "It was noon.", "It rained."), strict=True):
        texts[name], _ = chat(f"{words}\n/save {name}\nAnd then?\n", "--device", "cpu")
    for name in names:
        again, told = chat("/state\nAnd then?\n", "--device", "cpu", "--load", str(name))
        assert "a state of" in told
        assert again.strip()
        assert texts[name].endswith(again)


def test_mistakes_leave_the_chat_as_it_was(chat, tmp_path):
    out, told = chat(
        "/nothing\n/back\n/back x\n/again\n/save\n/save /no/such/folder/t.json\n/load\n/load /no/file\n/set x 1\n"
        "/set temperature 9\n/set temperature hot\n/system\n/history\n/set top-k 5\n/set\n//quoted\n/history\n/exit\n"
        "more\n",
        "--device", "cpu",
    )  # fmt: skip
    assert told.count("error: ") == 12
    assert "top_k 5" in told
    assert "user: /quoted" in out
    assert "more" not in out


def test_a_chat_is_not_written_over_its_state(chat, tmp_path):
    file = tmp_path / "talk.safetensors"
    _, told = chat(f"one\n/save {file}\n", "--device", "cpu")
    assert "name the chat's file .json" in told
    assert not file.exists()


def test_a_chat_that_is_gone_on_with_has_its_own_beginning(tmp_path, capsys):
    assert cli.main(["chat", "--device", "cpu", "--load", str(tmp_path / "t.json"), "--system", "Be brief."]) == 2
    assert "--load goes on with one; drop one" in capsys.readouterr().err


def test_a_line_that_goes_on(chat):
    out, _ = chat("one\\\ntwo\n/history\n", "--device", "cpu")
    assert "user: one\ntwo\n" in out


def test_options_of_a_server_and_of_a_model(capsys):
    assert cli.main(["chat", "--server", "http://127.0.0.1:9", "--model", "x"]) == 2
    assert "drop --model" in capsys.readouterr().err
    assert cli.main(["chat", "--server", "http://127.0.0.1:9"]) == 2
    assert "cannot be reached" in capsys.readouterr().err
    for url in ("ftp://x", "http://", "http://x:port"):
        assert cli.main(["chat", "--server", url]) == 2
        assert "--server" in capsys.readouterr().err


def test_with_a_server(chat, capsys):
    with api_server() as one:
        one.replicas.piece = "yes "
        capsys.readouterr()  # the server's own line
        for url in (f"http://{one.host}", f"http://{one.host}/v1/", one.host):
            out, told = chat("Are you there?\n/history\n/state\n", "--server", url)
            assert out == "yes " * 8 + "\nuser: Are you there?\nassistant: " + ("yes " * 8).strip() + "\n", told
            assert "server keeps" in told
        ids = array.array("q", one.replicas.jobs[-1].prompt_ids).tolist()
        assert byte_tokenizer().decode(ids) == "User: Are you there?\nAssistant:"


def test_generate_with_a_server(capsys):
    with api_server() as one:
        one.replicas.piece = "ab"
        capsys.readouterr()  # the server's own line
        common = ["generate", "Once", "--server", one.host, "--max-new-tokens", "3"]
        assert cli.main(common) == 0
        assert capsys.readouterr().out == "Onceababab\n"
        assert cli.main([*common, "--json", "--num-return-sequences", "2"]) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert [line["text"] for line in lines] == ["ababab"] * 2
        assert [line["completion_tokens"] for line in lines] == [3, 3]
        assert cli.main([*common[:-1], "99999"]) == 2
        assert "max_tokens" in capsys.readouterr().err
    common[3] = "127.0.0.1:9"
    for option in (["--model", "x"], ["--prompt-lookup"], ["--save-state", "x"], ["--logprobs", "1", "--json"]):
        assert cli.main([*common, *option]) == 2
        assert option[0] in capsys.readouterr().err
    assert cli.main(["generate", "a", "--api-key", "x"]) == 2
    assert "--server" in capsys.readouterr().err
