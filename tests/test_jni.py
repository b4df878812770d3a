"""The Java and Kotlin side of the library, run by a real Java on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from handheld import harness
from handheld.errors import MissingDependencyError
from handheld.protocol import Job

pytestmark = [
    pytest.mark.slow,
    pytest.mark.system,
    pytest.mark.skipif(shutil.which("javac") is None, reason="apt install default-jdk-headless"),
]

PROGRAM = """
import dev.handheld.Session;
import java.nio.file.*;
import java.util.*;

public final class Try {
    public static void main(String[] arguments) throws Exception {
        String job = Files.readString(Path.of(arguments[0]));
        System.out.println("version " + Session.version());
        System.out.println("engines " + Session.engines());
        try {
            String nowhere = "/nowhere/\\u00e9\\ud83d\\ude00";
            new Session("{\\"bundle\\": \\"" + nowhere + "\\", \\"size\\": \\"8x8\\"}", null);
        } catch (Session.Failure failure) {
            System.out.println("refused " + failure.getMessage());
        }
        List<String> events = new ArrayList<>();
        int[] most = new int[2];
        Session.Listener listener = new Session.Listener() {
            public void onEvent(String json) { events.add(json); }
            public void onProgress(int done, int total) { most[0] = done; most[1] = total; }
        };
        Session session = new Session(job, listener);
        session.run();
        byte[] first = session.output("picture");
        session.memoryWarning();
        session.run();
        System.out.println("same " + Arrays.equals(first, session.output("picture")));
        Files.write(Path.of(arguments[1]), first);
        System.out.println("progress " + most[0] + " " + most[1]);
        for (String event : events) System.out.println(event);
        session.setSeed(-1);
        session.run();
        System.out.println("other " + !Arrays.equals(first, session.output("picture")));
        try {
            session.output("nothing");
        } catch (Session.Failure failure) {
            System.out.println("nothing " + failure.getMessage());
        }
        session.close();
        session.close();
        session.cancel();
        try (Session angry = new Session(job, json -> {
            if (json.contains("iteration")) throw new IllegalArgumentException("enough");
        })) {
            angry.run();
        } catch (IllegalArgumentException enough) {
            System.out.println("thrown " + enough.getMessage());
        }
    }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("jni")
    try:
        built = harness.build()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    java = Path(shutil.which("javac")).resolve().parents[1] / "include"
    root = harness.sources()
    # What CMake does with -DHANDHELD_JNI=ON, without building the rest a second time.
    subprocess.run(
        ["c++", "-std=c++20", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror",
         "-I", root / "include", "-I", java, "-I", java / "linux", root / "src" / "jni.cpp",
         built.library, f"-Wl,-rpath,{built.library.parent}",
         "-o", folder / "libhandheld_jni.so"],
        check=True, timeout=300,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory, smallest):
    from handheld.bundle import Bundle
    from handheld_export.checkpoint import Checkpoint
    from handheld_export.export import Options, export

    path = tmp_path_factory.mktemp("bundle") / "b"
    export(Checkpoint(smallest), Options("executorch-xnnpack", "fp32"), path, jobs=1)
    return Bundle.open(path)


def test_java_runs_a_bundle(library, bundle, tmp_path):
    sources = harness.sources() / "java" / "dev" / "handheld" / "Session.java"
    (tmp_path / "Try.java").write_text(PROGRAM)
    subprocess.run(
        ["javac", "-Xlint:all", "-Werror", "-d", tmp_path, sources, tmp_path / "Try.java"],
        check=True, timeout=300,
    )  # fmt: skip
    size = bundle.size()[0]
    path = str(bundle.file(bundle.manifest.reference.file))
    inputs = {
        i.name: {"path": path, "tensor": f"input.{i.name}"}
        for i in bundle.manifest.sizes[size].program.inputs
        if i.role != "noise"
    }
    job = Job(bundle=str(bundle.path), size=size, seed=bundle.manifest.reference.seed,
              inputs=inputs)  # fmt: skip
    (tmp_path / "job.json").write_text(job.model_dump_json())
    done = subprocess.run(
        ["java", "-Xcheck:jni", f"-Djava.library.path={library}", "-cp", tmp_path, "Try",
         tmp_path / "job.json", tmp_path / "picture.raw"],
        capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "LC_ALL": "C.UTF-8"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    said = {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}
    assert "WARNING in native method" not in done.stdout
    assert said["version"]
    assert {"executorch", "litert"} <= set(json.loads(said["engines"]))
    assert json.loads(said["refused"])["code"] == "bundle"
    assert said["same"] == said["other"] == "true"
    calls = said["progress"].split()
    assert calls[0] == calls[1]
    assert int(calls[0]) > 1
    events = [json.loads(line) for line in lines if line.startswith("{")]
    assert any(e.get("phase") == "warning" for e in events)
    assert "no output 'nothing'" in json.loads(said["nothing"])["message"]
    assert said["thrown"] == "enough"
    picture = np.fromfile(tmp_path / "picture.raw", np.uint8)
    assert picture.size == np.prod(bundle.reference()["picture"].shape)
