#include "pack_cache.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <memory>
#include <sstream>
#include <thread>

#include "engine.hpp"
#include "sha256.hpp"

namespace hh {
namespace {

constexpr size_t kMaxPath = 250;  // ExecuTorch's options hold 255 characters
constexpr const char* kTemporary = ".tmp-";
constexpr auto kPatience = std::chrono::minutes(2);

void make_folders(const std::string& path) {
  for (size_t i = 1; i <= path.size(); ++i)
    if (i == path.size() || path[i] == '/') ::mkdir(path.substr(0, i).c_str(), 0755);
}

std::string read_small(const std::string& path) {
  try {
    return read_file(path, 512, "io");
  } catch (const Error&) {
    return {};
  }
}

// Against accidents, not against attacks: any word that differs makes another hash.
uint64_t hash_blocks(int fd, uint64_t size, bool whole) {
  constexpr size_t kBlock = 64 * 1024, kSamples = 64, kSample = 4096;
  auto buffer = std::make_unique<uint64_t[]>(kBlock / sizeof(uint64_t));
  uint64_t lanes[4] = {size, 1, 2, 3};
  auto add = [&](uint64_t at, size_t bytes) {
    std::memset(buffer.get(), 0, kBlock);
    ssize_t n = ::pread(fd, buffer.get(), bytes, static_cast<off_t>(at));
    lanes[0] += static_cast<uint64_t>(n);
    for (size_t i = 0; i < kBlock / sizeof(uint64_t) && i * sizeof(uint64_t) < bytes; ++i) {
      uint64_t& lane = lanes[i % 4];
      lane = (lane ^ buffer[i]) * 0x9e3779b97f4a7c15;
      lane ^= lane >> 29;
    }
  };
  if (whole) {
    for (uint64_t at = 0; at < size; at += kBlock) add(at, kBlock);
  } else {
    for (size_t i = 0; i < kSamples; ++i) add(size / kSamples * i, kSample);
    add(size - std::min<uint64_t>(size, kSample), kSample);
  }
  uint64_t hash = 0;
  for (uint64_t lane : lanes) hash = (hash ^ lane) * 0xff51afd7ed558ccd, hash ^= hash >> 32;
  return hash;
}

// What an opened file must be like: "KEY SIZE TIME" and, of its content, samples and the whole.
std::string facts_of(int fd, const std::string& key) {
  struct stat st {};
  if (::fstat(fd, &st) != 0 || !S_ISREG(st.st_mode) || st.st_size == 0) return {};
  return key + " " + std::to_string(st.st_size) + " " + std::to_string(st.st_mtim.tv_sec) + "." +
         std::to_string(st.st_mtim.tv_nsec) + " ";
}

std::string short_hash(const std::string& text) {
  Sha256 hash;
  hash.update(text.data(), text.size());
  return hash.hex().substr(0, 16);
}

std::string hash_text(int fd, bool whole) {
  struct stat st {};
  if (::fstat(fd, &st) != 0) return {};
  return std::to_string(hash_blocks(fd, static_cast<uint64_t>(st.st_size), whole));
}

// Tells this processor from others: packed layouts depend on its instructions.
std::string processor_id() {
  utsname name{};
  ::uname(&name);
  std::string text = name.machine;
  Fd fd(::open("/proc/cpuinfo", O_RDONLY | O_CLOEXEC));
  char buffer[16384];
  ssize_t n = fd ? ::read(fd.get(), buffer, sizeof buffer - 1) : 0;
  buffer[n > 0 ? n : 0] = '\0';
  for (const char* field : {"\nflags", "\nFeatures"})
    if (const char* found = std::strstr(buffer, field))
      text.append(found + 1, std::strcspn(found + 1, "\n"));
  return text;
}

}  // namespace

PackedFile::PackedFile(std::string path, Fd fd) : path_(std::move(path)), fd_(std::move(fd)) {
  ::fstat(fd_.get(), &then_);
}

bool PackedFile::intact() const {
  struct stat now {};
  return !fd_ || (::fstat(fd_.get(), &now) == 0 && now.st_size == then_.st_size &&
                  now.st_mtim.tv_sec == then_.st_mtim.tv_sec &&
                  now.st_mtim.tv_nsec == then_.st_mtim.tv_nsec);
}

bool PackedFile::mapped() const {
  std::ifstream maps("/proc/self/maps");
  if (!maps) return true;
  std::string line, place, rights, offset, device;
  while (std::getline(maps, line)) {
    unsigned long long inode = 0;
    std::istringstream fields(line);
    if (fields >> place >> rights >> offset >> device >> inode && inode == then_.st_ino) return true;
  }
  return false;
}

void PackedFile::prefetch() const { ::posix_fadvise(fd_.get(), 0, 0, POSIX_FADV_WILLNEED); }

PackCache::PackCache(std::string folder, const std::string& build, bool verify)
    : folder_(std::move(folder)), verify_(verify) {
  if (folder_.empty()) return;
  make_folders(folder_);
  directory_ = Fd(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_ || ::access(folder_.c_str(), W_OK | X_OK) != 0) return;
  // Paths travel to engines in short options, and as text between quotes.
  if (folder_.size() + 128 > kMaxPath || folder_.find_first_of("\"\n\\") != std::string::npos)
    folder_ = "/proc/self/fd/" + std::to_string(directory_.get());
  tag_ = short_hash(build) + "-" + short_hash(processor_id());
  usable_ = true;
  remove_leftovers();
}

std::string PackCache::key(const std::string& artifact_sha256) const {
  return artifact_sha256.substr(0, 32) + "-" + tag_;
}

std::string PackCache::file(const std::string& artifact_sha256) const {
  return folder_ + "/" + key(artifact_sha256) + ".packed";
}

std::optional<PackedFile> PackCache::find(const std::string& artifact_sha256) {
  std::optional<PackedFile> found = look(artifact_sha256);
  // The pages will be wanted soon; a helper's thread may fetch them while another model runs.
  if (found) found->prefetch();
  return found;
}

std::optional<PackedFile> PackCache::look(const std::string& artifact_sha256) {
  if (!usable_) return std::nullopt;
  std::string path = file(artifact_sha256);
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (!fd) return std::nullopt;
  const std::string facts = facts_of(fd.get(), key(artifact_sha256));
  const std::string stamp = read_small(path + ".stamp");
  if (facts.empty() || stamp.rfind(facts, 0) != 0) return std::nullopt;
  const std::lock_guard lock(mutex_);
  if (auto known = verified_.find(path); known == verified_.end() || known->second != stamp) {
    const size_t gap = stamp.find(' ', facts.size());
    const std::string sampled = stamp.substr(facts.size(), gap - facts.size());
    if (hash_text(fd.get(), false) != sampled) return std::nullopt;
    if (verify_ && stamp.substr(gap + 1) != hash_text(fd.get(), true) + "\n") return std::nullopt;
    verified_[path] = stamp;
  }
  return PackedFile(path, std::move(fd));
}

PackCache::Turn PackCache::wait(const std::string& artifact_sha256) const {
  Turn turn;
#if defined(F_OFD_SETLK)
  turn.fd_ = Fd(::openat(directory_.get(), ".lock", O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  struct flock range {};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  // One byte of the file for each artifact.
  range.l_start = static_cast<off_t>(std::hash<std::string>{}(key(artifact_sha256)) >> 2);
  range.l_len = 1;
  // Of a process that hangs no more is waited for than it takes: then two pack the same.
  const auto end = std::chrono::steady_clock::now() + kPatience;
  while (turn.fd_ && ::fcntl(turn.fd_.get(), F_OFD_SETLK, &range) != 0 &&
         (errno == EAGAIN || errno == EACCES || errno == EINTR) &&
         std::chrono::steady_clock::now() < end)
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
#else
  (void)artifact_sha256;
#endif
  return turn;
}

std::string PackCache::begin(const std::string& artifact_sha256, const std::string& artifact,
                             uint64_t bytes) {
  struct statvfs disk {};
  const uint64_t wanted = 3 * bytes + (uint64_t{16} << 20);
  if (::fstatvfs(directory_.get(), &disk) == 0) {
    const uint64_t free = static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize;
    if (free < wanted)
      throw Error("io", "artifact '" + artifact + "': no room to pack its weights: " +
                            std::to_string(free / 1'000'000) + " MB are free in " + folder_ + ", " +
                            std::to_string(wanted / 1'000'000 + 1) +
                            " MB are wanted (free some, or run without a cache)");
  }
  return folder_ + "/" + kTemporary + std::to_string(::getpid()) + "-" +
         std::to_string(counter_++) + "-" + artifact_sha256.substr(0, 16);
}

std::optional<PackedFile> PackCache::publish(const std::string& artifact_sha256,
                                             const std::string& temporary) {
  Fd fd(::open(temporary.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW));
  const std::string facts = fd ? facts_of(fd.get(), key(artifact_sha256)) : std::string();
  if (facts.empty() || ::fsync(fd.get()) != 0) {
    abandon(temporary);
    return std::nullopt;
  }
  const std::string stamp = facts + hash_text(fd.get(), false) + " " + hash_text(fd.get(), true) + "\n";
  const std::string path = file(artifact_sha256);
  // A reader between the two renames finds a file that is not the stamp's, and packs its own.
  try {
    AtomicFile out(path + ".stamp");
    out.write(stamp.data(), stamp.size());
    if (::rename(temporary.c_str(), path.c_str()) != 0)
      throw Error("io", path + ": cannot write: " + errno_text(errno));
    out.commit();
  } catch (...) {
    abandon(temporary);
    throw;
  }
  remove_others(artifact_sha256);
  const std::lock_guard lock(mutex_);
  verified_[path] = stamp;
  return PackedFile(path, std::move(fd));
}

void PackCache::abandon(const std::string& temporary) const { ::unlink(temporary.c_str()); }

// What processes left behind that were killed while they packed.
void PackCache::remove_leftovers() const {
  std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(folder_.c_str()), ::closedir);
  if (!folder) return;
  while (const dirent* entry = ::readdir(folder.get())) {
    if (std::strncmp(entry->d_name, kTemporary, std::strlen(kTemporary)) != 0) continue;
    auto pid = static_cast<pid_t>(std::strtol(entry->d_name + std::strlen(kTemporary), nullptr, 10));
    if (pid > 0 && ::kill(pid, 0) != 0 && errno == ESRCH)
      ::unlinkat(directory_.get(), entry->d_name, 0);
  }
}

// What other builds of the engine packed of an artifact for this processor. A process that has such a
// file mapped goes on with it.
void PackCache::remove_others(const std::string& artifact_sha256) const {
  std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir(folder_.c_str()), ::closedir);
  if (!folder) return;
  const std::string own = key(artifact_sha256);
  const std::string artifact = own.substr(0, own.find('-') + 1);
  const std::string processor = own.substr(own.rfind('-')) + ".packed";
  while (const dirent* entry = ::readdir(folder.get())) {
    const std::string name = entry->d_name;
    if (!name.starts_with(artifact) || !name.ends_with(processor) || name.starts_with(own)) continue;
    ::unlinkat(directory_.get(), (name + ".stamp").c_str(), 0);
    ::unlinkat(directory_.get(), name.c_str(), 0);
  }
}

}  // namespace hh
