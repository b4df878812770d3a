#include "pack_cache.hpp"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/utsname.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "engine.hpp"
#include "sha256.hpp"

namespace hh {
namespace {

constexpr size_t kMaxPath = 250;  // ExecuTorch's options hold 255 characters
constexpr const char* kTemporary = ".tmp-";

void make_folders(const std::string& path) {
  for (size_t i = 1; i <= path.size(); ++i)
    if (i == path.size() || path[i] == '/') ::mkdir(path.substr(0, i).c_str(), 0755);
}

std::string stamp_of(const std::string& path) {
  struct stat st {};
  if (::lstat(path.c_str(), &st) != 0 || !S_ISREG(st.st_mode) || st.st_size == 0) return {};
  return std::to_string(st.st_size) + " " + std::to_string(st.st_mtim.tv_sec) + "." +
         std::to_string(st.st_mtim.tv_nsec) + "\n";
}

std::string read_small(const std::string& path) {
  try {
    return read_file(path, 256, "io");
  } catch (const Error&) {
    return {};
  }
}

}  // namespace

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

PackCache::PackCache(std::string folder, const std::string& build) : folder_(std::move(folder)) {
  if (folder_.empty()) return;
  make_folders(folder_);
  directory_ = Fd(::open(folder_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!directory_ || ::access(folder_.c_str(), W_OK | X_OK) != 0) return;
  if (folder_.size() + 128 > kMaxPath) folder_ = "/proc/self/fd/" + std::to_string(directory_.get());
  Sha256 hash;
  hash.update(build.data(), build.size());
  tag_ = hash.hex().substr(0, 16);
  usable_ = true;
  remove_leftovers();
}

std::string PackCache::file(const std::string& artifact_sha256) const {
  return folder_ + "/" + artifact_sha256.substr(0, 32) + "-" + tag_ + ".packed";
}

std::optional<std::string> PackCache::find(const std::string& artifact_sha256) const {
  if (!usable_) return std::nullopt;
  std::string path = file(artifact_sha256);
  std::string stamp = stamp_of(path);
  if (stamp.empty() || stamp != read_small(path + ".stamp")) return std::nullopt;
  // The pages will be wanted soon; a helper's thread may fetch them while another model runs.
  if (Fd fd{::open(path.c_str(), O_RDONLY | O_CLOEXEC)})
    ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_WILLNEED);
  return path;
}

std::optional<std::string> PackCache::begin(const std::string& artifact_sha256, uint64_t bytes) {
  if (!usable_) return std::nullopt;
  struct statvfs disk {};
  if (::fstatvfs(directory_.get(), &disk) != 0) return std::nullopt;
  uint64_t available = static_cast<uint64_t>(disk.f_bavail) * disk.f_frsize;
  if (available < 3 * bytes + (uint64_t{64} << 20)) return std::nullopt;
  return folder_ + "/" + kTemporary + std::to_string(::getpid()) + "-" +
         std::to_string(counter_++) + "-" + artifact_sha256.substr(0, 16);
}

bool PackCache::publish(const std::string& artifact_sha256, const std::string& temporary) {
  std::string stamp = stamp_of(temporary);
  if (stamp.empty()) {
    abandon(temporary);
    return false;
  }
  Fd lock(::openat(directory_.get(), ".lock", O_RDWR | O_CREAT | O_CLOEXEC, 0644));
  if (!lock) return false;
  while (::flock(lock.get(), LOCK_EX) != 0 && errno == EINTR) {
  }
  std::string path = file(artifact_sha256);
  try {
    if (::rename(temporary.c_str(), path.c_str()) != 0) return false;
    AtomicFile out(path + ".stamp");
    out.write(stamp.data(), stamp.size());
    out.commit();
  } catch (const Error&) {
    return false;
  }
  return true;
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

}  // namespace hh
