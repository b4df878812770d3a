from __future__ import annotations

import json

import pytest

import releases
from handheld import cli, records


@pytest.fixture
def inputs(tmp_path):
    made = releases.bundle(tmp_path / "b")
    file = tmp_path / "runs.jsonl"
    records.append(file, releases.record(made))
    records.append(file, releases.record(number=1))  # of another bundle
    private, public = releases.keys(tmp_path)
    return tmp_path, str(made.path), str(file), str(private), str(public)


def run(capsys, *args):
    code = cli.run(["release", *args])
    return code, capsys.readouterr()


def test_build_verify_select(inputs, capsys):
    folder, bundle, runs, private, public = inputs
    out = str(folder / "r")
    args = ["build", bundle, "--records", runs, "--version", "3", "--key", private, "-o", out]
    code, shown = run(capsys, *args, "--dry-run", "--json")
    assert code == 0
    assert json.loads(shown.out)["variants"][0]["faults"] == []
    assert not (folder / "r").exists()
    code, shown = run(capsys, *args, "--label", "1.0", "--expires", "2099-01-01", "--json")
    assert code == 0
    assert json.loads(shown.out)["version"] == 3
    assert run(capsys, "verify", out, "--key", public)[0] == 0
    assert run(capsys, "verify", out, "--unsigned", "--json")[0] == 0
    code, shown = run(capsys, "verify", out, "--key", public, "--least-version", "4", "--json")
    assert (code, json.loads(shown.out)["error"]["code"]) == (1, "trust")
    code, shown = run(capsys, "verify", out)
    assert code == 2
    assert "whose release" in shown.err
    code, shown = run(capsys, "select", out, "--phone", "Google Pixel 8")
    assert (code, "sample-litert-cpu-int8, resident" in shown.out) == (0, True)
    code, shown = run(capsys, "select", out, "--platform", "ios", "--ram", "10MB", "--json")
    assert (code, json.loads(shown.out)["answers"][0]["variant"]) == (0, None)
    code, shown = run(capsys, "select", out, "--phone", "all", "--json")
    assert len(json.loads(shown.out)["answers"]) > 40
    assert run(capsys, "select", out)[0] == 2
    assert run(capsys, "select", out, "--platform", "ios", "--ram", "10")[0] == 2


def test_refusals_name_what_to_do(inputs, capsys):
    folder, bundle, _, _, public = inputs
    code, shown = run(capsys, "build", bundle, "--version", "1", "-o", str(folder / "r"))
    assert code == 1
    assert "--force ID" in shown.err
    assert not (folder / "r").exists()
    name = "sample-litert-cpu-int8"
    code, shown = run(
        capsys, "build", bundle, "--version", "1", "--force", name, "-o", str(folder / "r.zip")
    )
    assert code == 0
    assert "forced" in shown.out
    code, shown = run(capsys, "verify", str(folder / "r.zip"), "--key", public)
    assert (code, "is not signed" in shown.err) == (1, True)
    for bad in (["--expires", "soon"], ["--version", "0"], ["--key", "/none"]):
        args = ["build", bundle, "--version", "1", "--force", name, "-o", str(folder / "x"), *bad]
        assert run(capsys, *args)[0] == 2
    assert not (folder / "x").exists()


def test_a_release_of_nothing(tmp_path, capsys):
    code, shown = run(capsys, "verify", str(tmp_path), "--unsigned", "--json")
    assert (code, json.loads(shown.out)["error"]["code"]) == (2, "release")
    code, shown = run(capsys, "select", str(tmp_path), "--phone", "all")
    assert code == 2
