#include "file.hpp"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>

#include "engine.hpp"
#include "sha256.hpp"

namespace hh {

std::string errno_text(int error) {
  if (error == ENOENT) return "no such file";
  return std::strerror(error);
}

Fd& Fd::operator=(Fd&& other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Fd::~Fd() {
  if (fd_ >= 0) ::close(fd_);
}

Fd open_plain(const std::string& path, const char* code, uint64_t& size) {
  // O_NONBLOCK: a named pipe must not make us wait for its writer.
  Fd fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (!fd) throw Error(code, path + ": cannot read: " + errno_text(errno));
  struct stat st {};
  if (::fstat(fd.get(), &st) != 0) throw Error(code, path + ": cannot read: " + errno_text(errno));
  if (!S_ISREG(st.st_mode)) throw Error(code, path + ": is not a plain file");
  size = static_cast<uint64_t>(st.st_size);
  return fd;
}

static size_t read_some(int fd, void* out, size_t bytes, const std::string& path, const char* code) {
  for (;;) {
    ssize_t n = ::read(fd, out, bytes);
    if (n >= 0) return static_cast<size_t>(n);
    if (errno != EINTR) throw Error(code, path + ": cannot read: " + errno_text(errno));
  }
}

std::string read_file(const std::string& path, uint64_t limit, const char* code) {
  uint64_t size = 0;
  Fd fd = open_plain(path, code, size);
  if (size > limit) throw Error(code, path + ": " + std::to_string(size) + " bytes is over the limit");
  std::string text(size, '\0');
  size_t done = 0;
  while (done < text.size()) {
    size_t n = read_some(fd.get(), text.data() + done, text.size() - done, path, code);
    if (n == 0) throw Error(code, path + ": shrank while it was read");
    done += n;
  }
  return text;
}

static std::byte* map(const std::string& path, const Fd& fd, uint64_t size, std::byte* at) {
  void* p = ::mmap(at, size, PROT_READ, MAP_PRIVATE | (at ? MAP_FIXED : 0), fd.get(), 0);
  if (p == MAP_FAILED) throw Error("memory", path + ": cannot map: " + errno_text(errno));
  return static_cast<std::byte*>(p);
}

Mapping::Mapping(const std::string& path, const char* code) {
  uint64_t size = 0;
  Fd fd = open_plain(path, code, size);
  if (size == 0) return;
  data_ = map(path, fd, size, nullptr);
  size_ = size;
}

Mapping::Mapping(const std::string& path, const std::string& more, const char* code)
    : Mapping(path, code) {
  if (more.empty()) return;
  const auto page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  uint64_t size = 0, behind = 0;
  Fd first = open_plain(path, code, size), second = open_plain(more, code, behind);
  if (size != size_ || size == 0 || size % page != 0)
    throw Error(code, path + ": has " + std::to_string(size) + " bytes, no multiple of a page of " +
                          std::to_string(page) + ", so " + more + " cannot continue it");
  if (behind == 0) throw Error(code, more + ": is empty");
  if (behind > SIZE_MAX - size) throw Error("memory", more + ": cannot map: too large");
  // Both go into a range that is kept for them, so that nothing else is in their way.
  void* range = ::mmap(nullptr, size + behind, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                       -1, 0);
  if (range == MAP_FAILED) throw Error("memory", more + ": cannot map: " + errno_text(errno));
  ::munmap(const_cast<std::byte*>(data_), size_);
  data_ = static_cast<const std::byte*>(range);
  size_ = size + behind;
  map(path, first, size, static_cast<std::byte*>(range));
  map(more, second, behind, static_cast<std::byte*>(range) + size);
}

Mapping::~Mapping() {
  if (data_) ::munmap(const_cast<std::byte*>(data_), size_);
}

void Mapping::drop_pages() const {
  if (data_) ::madvise(const_cast<std::byte*>(data_), size_, MADV_DONTNEED);
}

AtomicFile::AtomicFile(std::string path) : path_(std::move(path)) {
  temporary_ = path_ + ".tmp-" + std::to_string(::getpid());
  fd_ = Fd(::open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!fd_) throw Error("io", path_ + ": cannot write: " + errno_text(errno));
}

AtomicFile::~AtomicFile() {
  if (!temporary_.empty() && fd_) ::unlink(temporary_.c_str());
}

void AtomicFile::write(const void* data, size_t bytes) {
  const char* p = static_cast<const char*>(data);
  while (bytes > 0) {
    ssize_t n = ::write(fd_.get(), p, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) throw Error("io", path_ + ": cannot write: " + errno_text(errno));
    p += n;
    bytes -= static_cast<size_t>(n);
  }
}

void AtomicFile::commit() {
  if (::rename(temporary_.c_str(), path_.c_str()) != 0)
    throw Error("io", path_ + ": cannot write: " + errno_text(errno));
  temporary_.clear();
}

std::string sha256_of_file(const std::string& path, const char* code) {
  uint64_t size = 0;
  Fd fd = open_plain(path, code, size);
  // Read, not mapped: pages of a mapping would count as ours.
  ::posix_fadvise(fd.get(), 0, 0, POSIX_FADV_SEQUENTIAL);
  constexpr size_t kChunk = 256 * 1024;
  auto buffer = std::make_unique<unsigned char[]>(kChunk);
  Sha256 hash;
  while (size_t n = read_some(fd.get(), buffer.get(), kChunk, path, code)) hash.update(buffer.get(), n);
  return hash.hex();
}

}  // namespace hh
