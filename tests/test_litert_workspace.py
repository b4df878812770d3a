"""Pages that go from one model's workspace to another's: none is lost, none taken from others."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler"),
    pytest.mark.skipif(sys.platform != "linux", reason="moves pages as Linux does"),
]

SOURCES = Path(__file__).resolve().parents[1] / "android_harness" / "src"
LIBRARY = """
#include <cstdlib>
extern "C" void* grab(size_t bytes) {
  void* block = nullptr;
  return posix_memalign(&block, 64, bytes) == 0 ? block : nullptr;
}
extern "C" void drop(void* block) { free(block); }
"""
PROGRAM = """
#include "litert_workspace.hpp"
#include <cstdio>
extern "C" void* grab(size_t);
extern "C" void drop(void*);
using namespace hh::litert;

constexpr size_t MiB = size_t{1} << 20;

struct Model {
  explicit Model(Pool& pool) : pool(pool), workspace(&pool) { workspace.settle(); }
  ~Model() {
    pool.detach(workspace);
    if (block) drop(block);
  }
  // As XNNPACK does: the larger block is asked for and zeroed before the smaller one goes.
  bool run(size_t bytes, unsigned char value) {
    pool.attach(workspace);
    const Workspace::Scope scope(&workspace);
    if (bytes > size) {
      void* more = grab(bytes);
      if (!more) return false;
      std::memset(more, 0, bytes);
      if (block) drop(block);
      block = more;
      size = bytes;
    }
    auto* at = static_cast<unsigned char*>(block);
    std::memset(at, value, size);
    for (size_t i = 0; i < size; i += 4096) {
      if (at[i] != value) return false;
    }
    return true;
  }
  Pool& pool;
  Workspace workspace;
  void* block = nullptr;
  size_t size = 0;
};

int main() {
  if (!Workspace::redirect(reinterpret_cast<void*>(&grab))) return 2;
  Pool pool;
  Model a(pool), b(pool), c(pool);
  if (!a.run(20 * MiB, 1) || !b.run(30 * MiB, 2)) return 3;
  if (!a.run(50 * MiB, 3)) return 4;  // grows: its first block goes
  // What comes to the addresses that went must stay where it is.
  constexpr size_t kOthers = 40;
  unsigned char* others[kOthers];
  for (auto& other : others) {
    other = static_cast<unsigned char*>(mmap(nullptr, 2 * MiB, PROT_READ | PROT_WRITE,
                                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    std::memset(other, 9, 2 * MiB);
  }
  for (int round = 0; round < 3; ++round) {
    if (!b.run(30 * MiB, 4) || !c.run((40 + 20 * round) * MiB, 5) || !a.run(50 * MiB, 6)) return 5;
  }
  for (const auto* other : others) {
    for (size_t i = 0; i < 2 * MiB; i += 4096) {
      if (other[i] != 9) return 6;
    }
  }
  return 0;
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("workspace")
    (folder / "library.cpp").write_text(LIBRARY)
    (folder / "program.cpp").write_text(PROGRAM)
    compile_ = ["c++", "-std=c++20", "-O1", "-Wall", "-Wextra", f"-I{SOURCES}"]
    library = folder / "liblibrary.so"
    for words in (
        [*compile_, "-shared", "-fPIC", "library.cpp", "-o", str(library)],
        [*compile_, "program.cpp", str(library), f"-Wl,-rpath,{folder}", "-ldl", "-o", "program"],
    ):
        subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True)
    return folder / "program"


def test_a_workspace_that_grows_in_the_middle_of_a_run(program):
    """Before, moving pages that were gone left holes (SIGSEGV) or took what others had there."""
    done = subprocess.run([str(program)], check=False, timeout=60)
    assert done.returncode == 0
