// One activation workspace for all LiteRT models of an engine.
//
// XNNPACK gives every compiled model a workspace of its own (22 MB for an SDXL transformer
// segment), though only one model runs at a time and nothing in a workspace outlives a run;
// LiteRT offers no way to share it. So the allocation functions that LiteRT's library imports
// are redirected: a large block that a model asks for becomes an address range of its own,
// and the physical pages behind it move from model to model when they run. Where the
// redirection or the moving is not possible, models keep workspaces of their own.
//
// What may move is decided by what was never touched while the model was prepared: packed
// weights are written then, a workspace only when the model runs.
#pragma once

#include <dlfcn.h>
#include <elf.h>
#include <fcntl.h>
#include <link.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <unordered_map>
#include <vector>

#ifndef MREMAP_DONTUNMAP
#define MREMAP_DONTUNMAP 4
#endif

namespace hh::litert {

class Pool;

// Large blocks of one model, in the order it asked for them. Used by one thread at a time.
class Workspace {
 public:
  static constexpr size_t kBlock = size_t{2} << 20;  // whole page tables move at once

  struct Region {
    char* base;
    size_t bytes;  // multiple of kBlock
    bool movable;
  };

  explicit Workspace(Pool* pool) : pool_(pool) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;

  // While one lives, large blocks that this thread asks for belong to `workspace`.
  class Scope {
   public:
    explicit Scope(Workspace* workspace) : before_(owner()) { owner() = workspace; }
    Scope(const Scope&) = delete;
    Scope& operator=(const Scope&) = delete;
    ~Scope() { owner() = before_; }

   private:
    Workspace* before_;
  };

  // Call when the model is prepared and has not run yet.
  void settle() {
    for (Region& region : regions_) region.movable = untouched(region);
    settled_ = true;
  }

  const std::vector<Region>& regions() const { return regions_; }

  // Redirects the library that contains `symbol`. Returns whether that was possible.
  static bool redirect(void* symbol) {
    Search search{reinterpret_cast<uintptr_t>(symbol), 0, 0};
    dl_iterate_phdr(&patch, &search);
    return search.allocations > 0 && search.releases > 0;
  }

 private:
  friend class Pool;

  static constexpr size_t kLarge = size_t{1} << 20;

  static Workspace*& owner() {
    static thread_local Workspace* current = nullptr;
    return current;
  }

  struct Registry {
    std::mutex mutex;
    std::unordered_map<void*, Workspace*> owners;
  };
  static Registry& registry() {
    static auto* it = new Registry;  // outlives every static of the library
    return *it;
  }

  static int allocate(void** out, size_t alignment, size_t size) {
    Workspace* mine = owner();
    if (mine && size >= kLarge && alignment <= kBlock) {
      if (void* block = mine->add(size)) {
        *out = block;
        return 0;
      }
    }
    return posix_memalign(out, alignment, size);
  }

  static void release(void* block) {
    if (block && reinterpret_cast<uintptr_t>(block) % kBlock == 0) {
      Registry& all = registry();
      const std::scoped_lock lock(all.mutex);
      if (const auto found = all.owners.find(block); found != all.owners.end()) {
        found->second->remove(static_cast<char*>(block));
        all.owners.erase(found);
        return;
      }
    }
    std::free(block);
  }

  void* add(size_t size);

  void* reserve(size_t size) {
    const size_t bytes = (size + kBlock - 1) / kBlock * kBlock;
    void* raw = mmap(nullptr, bytes + kBlock, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    auto* start = static_cast<char*>(raw);
    const size_t head = (kBlock - reinterpret_cast<uintptr_t>(start) % kBlock) % kBlock;
    if (head) munmap(start, head);
    if (head != kBlock) munmap(start + head + bytes, kBlock - head);
    char* base = start + head;
    regions_.push_back({base, bytes, settled_});
    Registry& all = registry();
    const std::scoped_lock lock(all.mutex);
    all.owners[base] = this;
    return base;
  }

  void remove(char* base);

  // Neither in memory nor swapped out.
  static bool untouched(const Region& region) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t pages = region.bytes / page;
    std::vector<uint64_t> entries(pages);
    const int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
    const auto bytes = static_cast<ssize_t>(pages * sizeof(uint64_t));
    const auto at = static_cast<off_t>(reinterpret_cast<uintptr_t>(region.base) / page * 8);
    const bool read = fd >= 0 && pread(fd, entries.data(), static_cast<size_t>(bytes), at) == bytes;
    if (fd >= 0) close(fd);
    constexpr uint64_t kPresentOrSwapped = uint64_t{3} << 62;
    return read && std::none_of(entries.begin(), entries.end(),
                                [](uint64_t e) { return (e & kPresentOrSwapped) != 0; });
  }

  struct Search {
    uintptr_t inside;
    int allocations, releases;
  };

  static int patch(dl_phdr_info* info, size_t, void* data) {
    auto& search = *static_cast<Search*>(data);
    const auto covers = [&](const ElfW(Phdr)& h) {
      const uintptr_t start = info->dlpi_addr + h.p_vaddr;
      return h.p_type == PT_LOAD && search.inside >= start && search.inside < start + h.p_memsz;
    };
    const auto* headers = info->dlpi_phdr;
    if (std::none_of(headers, headers + info->dlpi_phnum, covers)) return 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (headers[i].p_type == PT_DYNAMIC) {
        patch(info->dlpi_addr,
              reinterpret_cast<const ElfW(Dyn)*>(info->dlpi_addr + headers[i].p_vaddr), search);
      }
    }
    return 1;
  }

  static void patch(uintptr_t load, const ElfW(Dyn)* dynamic, Search& search) {
#if defined(__x86_64__)
    const auto imports = [](auto type) {
      return type == R_X86_64_JUMP_SLOT || type == R_X86_64_GLOB_DAT || type == R_X86_64_64;
    };
#elif defined(__aarch64__)
    const auto imports = [](auto type) {
      return type == R_AARCH64_JUMP_SLOT || type == R_AARCH64_GLOB_DAT || type == R_AARCH64_ABS64;
    };
#else
    const auto imports = [](auto) { return false; };
#endif
#if defined(__LP64__)
    // glibc stores addresses in the dynamic section, other loaders offsets.
    const auto at = [load](uintptr_t value) { return value < load ? load + value : value; };
    const char* names = nullptr;
    const ElfW(Sym)* symbols = nullptr;
    uintptr_t tables[2] = {};
    size_t sizes[2] = {};
    for (; dynamic->d_tag != DT_NULL; ++dynamic) {
      switch (dynamic->d_tag) {
        case DT_STRTAB: names = reinterpret_cast<const char*>(at(dynamic->d_un.d_ptr)); break;
        case DT_SYMTAB:
          symbols = reinterpret_cast<const ElfW(Sym)*>(at(dynamic->d_un.d_ptr));
          break;
        case DT_JMPREL: tables[0] = at(dynamic->d_un.d_ptr); break;
        case DT_PLTRELSZ: sizes[0] = dynamic->d_un.d_val; break;
        case DT_RELA: tables[1] = at(dynamic->d_un.d_ptr); break;
        case DT_RELASZ: sizes[1] = dynamic->d_un.d_val; break;
        default: break;
      }
    }
    if (!names || !symbols) return;
    for (int t = 0; t < 2; ++t) {
      const auto* entry = reinterpret_cast<const ElfW(Rela)*>(tables[t]);
      for (size_t n = tables[t] ? sizes[t] / sizeof(*entry) : 0; n; --n, ++entry) {
        if (!imports(ELF64_R_TYPE(entry->r_info))) continue;
        const char* name = names + symbols[ELF64_R_SYM(entry->r_info)].st_name;
        if (std::strcmp(name, "posix_memalign") == 0) {
          search.allocations +=
              replace(load + entry->r_offset, reinterpret_cast<uintptr_t>(&allocate));
        } else if (std::strcmp(name, "free") == 0) {
          search.releases += replace(load + entry->r_offset, reinterpret_cast<uintptr_t>(&release));
        }
      }
    }
#else
    (void)load, (void)dynamic, (void)search, (void)imports;
#endif
  }

  static int replace(uintptr_t slot, uintptr_t function) {
    const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    void* start = reinterpret_cast<void*>(slot / page * page);
    if (mprotect(start, page, PROT_READ | PROT_WRITE) != 0) return 0;
    std::memcpy(reinterpret_cast<void*>(slot), &function, sizeof function);
    return 1;
  }

  Pool* pool_;
  std::vector<Region> regions_;
  bool settled_ = false;
};

// The pages that go round. Block i of a workspace is always backed by the same pages, wherever
// they were last.
class Pool {
 public:
  // Brings the pages to a workspace. Call before each run.
  void attach(const Workspace& workspace) {
    if (holder_ == &workspace && regions_ == workspace.regions_.size()) return;
    size_t i = 0;
    for (const Workspace::Region& region : workspace.regions_) {
      if (!region.movable) continue;
      for (size_t at = 0; at < region.bytes; at += Workspace::kBlock, ++i) {
        if (i == places_.size()) places_.push_back(nullptr);
        move(places_[i], region.base + at);
      }
    }
    holder_ = &workspace;
    regions_ = workspace.regions_.size();
  }

  // Forgets the pages of a region that is about to go, as when a model asks for a larger one in the
  // middle of a run. Moving them later would tear a hole where they should come, or take what has
  // come to their addresses since.
  void forget(const Workspace& workspace, const Workspace::Region& region) {
    const auto inside = [&](const char* place) {
      return place && place >= region.base && place < region.base + region.bytes;
    };
    places_.erase(std::remove_if(places_.begin(), places_.end(), inside), places_.end());
    if (holder_ == &workspace) holder_ = nullptr;
  }

  // Forgets the pages that are in a workspace. Call before it goes.
  void detach(const Workspace& workspace) {
    for (const Workspace::Region& region : workspace.regions_) {
      for (char*& place : places_) {
        if (place >= region.base && place < region.base + region.bytes) place = nullptr;
      }
    }
    if (holder_ == &workspace) holder_ = nullptr;
  }

 private:
  static void move(char*& place, char* target) {
    if (place && place != target) {
      void* moved = mremap(place, Workspace::kBlock, Workspace::kBlock,
                           MREMAP_MAYMOVE | MREMAP_FIXED | MREMAP_DONTUNMAP, target);
      if (moved == MAP_FAILED) {
        madvise(place, Workspace::kBlock, MADV_DONTNEED);
        // What was refused may have taken away what was mapped at the target.
        mmap(target, Workspace::kBlock, PROT_READ | PROT_WRITE,
             MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
      }
    }
    place = target;
  }

  std::vector<char*> places_;
  const Workspace* holder_ = nullptr;
  size_t regions_ = 0;
};

inline void* Workspace::add(size_t size) {
  void* block = reserve(size);
  // Asked for in the middle of a run: the pages must come now.
  if (block && settled_) pool_->attach(*this);
  return block;
}

inline void Workspace::remove(char* base) {
  const auto found = std::find_if(regions_.begin(), regions_.end(),
                                  [base](const Region& r) { return r.base == base; });
  // Before it is settled, no pages have come to it, and others may be running.
  if (settled_) pool_->forget(*this, *found);
  munmap(base, found->bytes);
  regions_.erase(found);
}

}  // namespace hh::litert
