"""The index of torch's CPU wheels: given to pip where it answers, and left out with a sentence where it does not."""

import pytest

from tests.support.servers.clients_servers import AnsweringServer, SilentServer, answer, refused_url
from tests.support.torch_index import option_for


def test_index_that_answers_is_given_to_pip() -> None:
    with AnsweringServer([answer(200)]) as server:
        url = f"{server.url}/whl/cpu"

        assert option_for(url) == f"--extra-index-url={url}"
        assert server.requests[0].startswith(b"GET /whl/cpu/torch/ ")


def test_no_index_is_asked_where_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert option_for("") == ""
    assert capsys.readouterr().err == ""


def test_folder_is_given_to_pip_as_it_is() -> None:
    assert option_for("file:///wheels/simple") == "--extra-index-url=file:///wheels/simple"


def test_index_that_refuses_connections_is_left_out_with_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    url = refused_url()

    assert option_for(url) == ""
    assert capsys.readouterr().err.startswith(f"{url} cannot be used (")


def test_index_that_never_answers_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with SilentServer() as server:
        assert option_for(server.url, probe_seconds=0.1) == ""

    assert "timed out" in capsys.readouterr().err


def test_index_that_has_no_torch_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    with AnsweringServer([answer(403)]) as server:
        assert option_for(server.url) == ""

    assert "it answers 403" in capsys.readouterr().err
