from __future__ import annotations

import hashlib

import pytest

pytest.importorskip("kserve")

from handheld.errors import UsageError
from handheld_export.serve import access
from handheld_export.serve.access import Access, Rates, Tokens, new_token
from handheld_export.serve.errors import Refusal
from handheld_export.serve.settings import Settings


def digest(token):
    return hashlib.sha256(token.encode()).hexdigest()


def test_tokens_expire_and_are_hashed(tmp_path):
    path = tmp_path / "tokens"
    made = new_token(path, "app")
    assert path.stat().st_mode & 0o777 == 0o600
    assert made not in path.read_text()
    path.write_text(
        f"# clients\n\n{path.read_text()}"
        f"old {digest('a')} 2020-01-01T00:00:00+00:00\n"
        f"new {digest('b')} 2120-01-01T00:00:00+00:00\n"
    )
    tokens = Tokens(path)
    assert tokens.name(made) == "app"
    assert tokens.name("a") is None
    assert tokens.name("b") == "new"
    path.unlink()
    assert tokens.name("b") == "new", "a file that is gone changes nothing"


def test_tokens_that_change_while_they_are_read_are_read_again(tmp_path, monkeypatch):
    path = tmp_path / "tokens"
    new_token(path, "old")
    made = []

    def change(path, read=access._read_tokens):
        found = read(path)
        if not made:
            path.write_text(f"new {digest('token')}\n")
            made.append(path)
        return found

    monkeypatch.setattr(access, "_read_tokens", change)
    assert Tokens(path).name("token") == "new"


@pytest.mark.parametrize(
    "line",
    ["name", "name abc", f"two words {'0' * 64}", f"a {'0' * 64} soon", f"a {'0' * 64} 2120-01-01"],
)
def test_broken_files_of_tokens(tmp_path, line):
    path = tmp_path / "tokens"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(UsageError) as e:
        Tokens(path)
    assert e.value.path.endswith(":2")
    with pytest.raises(UsageError):
        new_token(path, "app")
    with pytest.raises(UsageError, match="not a client's name"):
        new_token(tmp_path / "other", "a b")
    assert not (tmp_path / "other").exists()


def test_rates_fill_again():
    rates = Rates(2.0, 4.0)
    assert [rates.take("a", 1, 0.0) for _ in range(5)] == [0, 0, 0, 0, 0.5]
    assert rates.take("b", 1, 0.0) == 0
    assert rates.take("a", 1, 0.5) == 0
    assert rates.take("a", 100, 0.5) == 2.0, "more than fits waits for a full bucket"
    assert rates.take("a", 100, 9.0) == 0
    assert rates.take("a", 1, 9.0) == 48.5, "what was taken over the burst is owed"
    assert rates.take("a", 1, 57.5) == 0


def test_refusals_of_clients(tmp_path):
    path = tmp_path / "tokens"
    made = new_token(path, "app")
    checked = Access(Settings(tmp_path, tokens=path))
    assert checked.client({"authorization": f"bearer {made}"}, "peer") == "app"
    for headers in (
        {},
        {"authorization": made},
        {"authorization": "Bearer "},
        {"authorization": f"Basic {made}"},
    ):
        with pytest.raises(Refusal) as e:
            checked.client(headers, "peer")
        assert e.value.http_status == 401
    assert Access(Settings(tmp_path)).client({}, "peer") == "peer"


@pytest.mark.parametrize("name", ["nowhere:x", "json:nothing", "json:__name__", "::"])
def test_policies_that_are_none(tmp_path, name):
    with pytest.raises(UsageError):
        Access(Settings(tmp_path, policy=name))
