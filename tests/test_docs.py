"""What documents say exists: commands and options, links, code, no traces of a machine."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from handheld import cli

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {ROOT / "docs" / "cli.md"}
DOCUMENTS = sorted(
    p
    for p in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("*_harness/**/*.md")]
    if p.is_file()
)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img[^>]* src=\"([^\"]+)\"")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"(?:^(?: {4}|\$ )?|`)(handheld [a-z][^`\n]*)", re.MULTILINE)
PLACEHOLDERS = ("COMMAND", "...")


def names(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def commands() -> list[tuple[str, str]]:
    found = []
    for path in DOCUMENTS:
        if path in GENERATED:
            continue
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        for match in COMMAND.finditer(text):
            line = match.group(1).split("  #")[0].strip()
            if not any(p in line for p in PLACEHOLDERS):
                found.append((names(path), line))
    return found


def test_there_are_documents():
    assert {"README.md", "docs/design.md", "CONTRIBUTING.md"} <= {names(p) for p in DOCUMENTS}
    assert len(commands()) > 5


@pytest.mark.parametrize(("document", "line"), commands())
def test_commands_and_options_exist(document, line):
    _, *words = shlex.split(line)
    command = cli.load(words.pop(0))
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    known = {o for p in command.params for o in (*p.opts, *p.secondary_opts)}
    given = {w.split("=")[0] for w in words if w.startswith("-") and not w[1:2].isdigit()}
    assert given <= known | {"--help"}, f"{document}: {line}"
    if hasattr(command, "commands") and words:
        pytest.fail(f"{document}: {line}: '{words[0]}' is not one of {sorted(command.commands)}")


def test_the_pipeline_uses_commands_that_exist():
    tree = yaml.safe_load((ROOT / "examples/github/release.yml").read_text(encoding="utf-8"))
    seen = []
    for job in tree["jobs"].values():
        for step in job["steps"]:
            script = step.get("run", "").replace("\\\n", " ")
            for match in re.finditer(r"(?:^|do )\s*(handheld [a-z][^;\n|]*)", script, re.MULTILINE):
                test_commands_and_options_exist("release.yml", match.group(1))
                seen.append(match.group(1).split()[1])
    assert {"export", "verify", "bench", "report", "compare", "release"} <= set(seen)


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    known = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        for target in re.findall(r"(?:`|^ {4})make ([a-z-]+)", text, re.MULTILINE):
            assert target in known, f"{names(path)}: make {target}"


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    kept = (re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings)
    return set(kept)


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_links_resolve(path):
    text = FENCE.sub("", path.read_text(encoding="utf-8"))
    for match in LINK.finditer(text):
        link = match.group(1) or match.group(2)
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.is_relative_to(ROOT), f"{link} leaves the repository"
        assert target.exists(), f"{link} does not exist"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target.read_text(encoding="utf-8")), f"no heading for {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=names)
def test_no_traces_of_a_machine(path):
    text = path.read_text(encoding="utf-8")
    for pattern in (r"/(work|home|root|Users|tmp)/", r"\.\./shared", r"\b[iI]ssue \d", r"(?i)TODO"):
        assert not re.search(pattern, text), f"{pattern} in {names(path)}"


def test_tables_have_even_rows():
    for path in DOCUMENTS:
        width = 0
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            cells = line.replace("\\|", "").count("|") if line.startswith("|") else 0
            assert not (width and cells) or cells == width, f"{names(path)}:{number}"
            width = cells


def test_noise_vectors():
    import hashlib

    import numpy as np

    from handheld import noise

    text = (ROOT / "docs" / "program.md").read_text(encoding="utf-8")
    power = {"2^64 - 1": 2**64 - 1, "2^32 - 1": 2**32 - 1}
    rows = re.findall(r"^\| ([^|]+) \| ([^|]+) \| `([^`]+)` \| `([^`]+)` \|", text, re.MULTILINE)
    assert len(rows) == 4
    for seed_text, stream_text, words, bits in rows:
        seed, stream = (power.get(t) or int(t) for t in (seed_text, stream_text))
        drawn = noise.normal(seed, (4,), stream)
        assert [f"{v:08x}" for v in drawn.view(np.uint32)] == bits.split()
        made = noise._words(seed, stream, np.zeros(1, dtype=np.uint64))
        assert [f"{int(w):08x}" for w in made] == words.split()
    million = noise.normal(0, (1_000_000,)).astype("<f4").tobytes()
    assert hashlib.sha256(million).hexdigest() in text


def test_the_walk_through_targets_runs(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "adding-a-target.md").read_text(encoding="utf-8")
    blocks = [code for language, code in FENCE.findall(text) if language == "python"]
    assert len(blocks) == 2
    space: dict[str, object] = {"__name__": "walk"}
    exec(compile("\n".join(blocks), "docs/adding-a-target.md", "exec"), space)
    assert (tmp_path / "small.pt2").is_file()


@pytest.mark.slow
def test_the_walk_throughs_target_is_exported_and_verified_once_installed(tmp_path, smallest):
    pytest.importorskip("torch")
    text = (ROOT / "docs" / "adding-a-target.md").read_text(encoding="utf-8")
    blocks = dict(reversed(FENCE.findall(text)))  # the first of each language
    entries = tomllib.loads(blocks["toml"])["project"]["entry-points"]["handheld.targets"]
    module = entries["torch-program"].partition(":")[0]
    file = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
    file.parent.mkdir()
    (file.parent / "__init__.py").touch()
    file.write_text(blocks["python"], encoding="utf-8")
    # What pip would leave beside it.
    facts = tmp_path / "my_package-1.0.dist-info"
    facts.mkdir()
    (facts / "METADATA").write_text("Metadata-Version: 2.1\nName: my_package\nVersion: 1.0\n")
    (facts / "entry_points.txt").write_text(
        "[handheld.targets]\n" + "".join(f"{n} = {v}\n" for n, v in entries.items())
    )
    paths = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def handheld(*arguments):
        done = subprocess.run(
            [sys.executable, "-m", "handheld", *arguments, "--json"],
            env=environment, capture_output=True, text=True, check=False, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout)

    out = tmp_path / "out"
    (made,) = handheld(
        "export", str(smallest), "--target", "torch-program", "-p", "fp32", "-o", str(out)
    )
    assert made["target"] == "torch-program"
    assert made["snr_db"] > 100
    report = handheld("verify", str(out), "--checkpoint", str(smallest))
    assert report["passed"]


def test_committed_files_hold_no_traces_of_a_machine():
    try:
        done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    bad = re.compile(b"|".join(re.escape(str(p)).encode() for p in (ROOT, Path.home() / ".cache")))
    for name in done.stdout.decode().split("\0"):
        path = ROOT / name
        if name and path.is_file() and path.stat().st_size < 2**20:
            assert not bad.search(path.read_bytes()), name
