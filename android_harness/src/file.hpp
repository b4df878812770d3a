// Files, read so that nothing but a plain file is ever opened.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>

namespace hh {

// A file descriptor that closes itself.
class Fd {
 public:
  explicit Fd(int fd = -1) : fd_(fd) {}
  Fd(Fd&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Fd& operator=(Fd&& other) noexcept;
  ~Fd();
  int get() const { return fd_; }
  explicit operator bool() const { return fd_ >= 0; }

 private:
  int fd_;
};

// Opens a plain file for reading. `code` is the error code to throw with.
Fd open_plain(const std::string& path, const char* code, uint64_t& size);

std::string read_file(const std::string& path, uint64_t limit, const char* code);

// A read-only mapping.
class Mapping {
 public:
  Mapping(const std::string& path, const char* code);
  // With another file behind it, unless `more` is empty. The first must end where a page does.
  Mapping(const std::string& path, const std::string& more, const char* code);
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping();
  std::span<const std::byte> bytes() const { return {data_, size_}; }
  // Gives the pages back; they come in again from the file if anyone looks.
  void drop_pages() const;

 private:
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

// Writes to a temporary name beside `path`; commit() renames it. Throws code "io".
class AtomicFile {
 public:
  explicit AtomicFile(std::string path);
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;
  ~AtomicFile();
  void write(const void* data, size_t bytes);
  void commit();

 private:
  std::string path_, temporary_;
  Fd fd_;
};

std::string sha256_of_file(const std::string& path, const char* code);
std::string errno_text(int error);

}  // namespace hh
