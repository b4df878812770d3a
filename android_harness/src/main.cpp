// handheld-harness JOB.json: runs a job, one event a line on standard output.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstring>
#include <string>

#include "handheld.h"

namespace {

std::atomic<hh_session*> session{nullptr};
std::atomic<bool> interrupted{false};
static_assert(std::atomic<hh_session*>::is_always_lock_free);

// hh_cancel only stores to atomics, which a signal handler may do.
void stop(int) {
  interrupted = true;
  hh_cancel(session.load());
}

// A mapped file was cut off, or a disk filled up under one: there is no way on, but a last word.
void lost_pages(int) {
  constexpr char line[] =
      "{\"event\":\"error\",\"t_ms\":0,\"code\":\"io\",\"message\":\"pages of a mapped file are gone: a file "
      "of the bundle or the cache was cut off while in use, or the disk is full\"}\n";
  ssize_t ignored = ::write(STDOUT_FILENO, line, sizeof line - 1);
  (void)ignored;
  ::_exit(HH_FAILED);
}

// Engines give up so when they cannot write packed weights; they say why on standard error.
void gave_up(int) {
  constexpr char line[] =
      "{\"event\":\"error\",\"t_ms\":0,\"code\":\"engine\",\"message\":\"the engine gave up, for a reason that it "
      "printed: is the disk full? free some, or run without a cache\"}\n";
  ssize_t ignored = ::write(STDOUT_FILENO, line, sizeof line - 1);
  (void)ignored;
  ::_exit(HH_FAILED);
}

bool write_all(int fd, const char* data, size_t bytes) {
  while (bytes > 0) {
    ssize_t n = ::write(fd, data, bytes);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return false;
    data += n;
    bytes -= static_cast<size_t>(n);
  }
  return true;
}

// One write per line: a line is never half there, whatever kills us.
void print(void*, const char* json) {
  std::string line = std::string(json) + '\n';
  if (!write_all(STDOUT_FILENO, line.data(), line.size())) stop(0);
}

bool read_job(const char* path, std::string& text) {
  constexpr size_t kLimit = 16 << 20;
  int fd = std::strcmp(path, "-") == 0 ? STDIN_FILENO : ::open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  char buffer[16384];
  ssize_t n = 0;
  while ((n = ::read(fd, buffer, sizeof buffer)) != 0) {
    if (n < 0 && errno == EINTR && !interrupted) continue;
    if (n < 0 || text.size() + static_cast<size_t>(n) > kLimit) break;
    text.append(buffer, static_cast<size_t>(n));
  }
  if (fd != STDIN_FILENO) ::close(fd);
  return n == 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::strcmp(argv[1], "--version") == 0) return std::puts(hh_version()) < 0;
  if (argc == 2 && std::strcmp(argv[1], "--engines") == 0) return std::puts(hh_engines()) < 0;
  if (argc == 2 && std::strcmp(argv[1], "--plan-memory") == 0) {
    std::string text;
    if (!read_job("-", text)) return HH_BAD_INPUT;
    const char* plan = hh_plan_memory(text.c_str());
    std::fprintf(plan ? stdout : stderr, "%s\n", plan ? plan : hh_last_error());
    return plan ? HH_OK : HH_BAD_INPUT;
  }
  if (argc == 5 && std::strcmp(argv[1], "--check-release") == 0) {
    hh_status status = hh_check_release(argv[2], argv[3], argv[4]);
    if (status != HH_OK) std::fprintf(stderr, "%s\n", hh_last_error());
    return status;
  }
  if (argc != 2 || (argv[1][0] == '-' && argv[1][1] != '\0')) {
    std::fputs(
        "usage: handheld-harness JOB.json | - | --version | --engines | --plan-memory |\n"
        "       --check-release RELEASE.json VARIANT BUNDLE\n",
        stderr);
    return HH_BAD_INPUT;
  }
  struct sigaction action {};
  action.sa_handler = stop;
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
  std::signal(SIGPIPE, SIG_IGN);
  std::signal(SIGBUS, lost_pages);
  std::signal(SIGABRT, gave_up);
  std::signal(SIGXFSZ, SIG_IGN);  // then writing fails, which is reported

  std::string job;
  if (!read_job(argv[1], job)) {
    std::fprintf(stderr, "%s: cannot read the job\n", argv[1]);
    print(nullptr, "{\"event\":\"error\",\"t_ms\":0,\"code\":\"job\",\"message\":\"cannot read the job file\"}");
    return HH_BAD_INPUT;
  }
  hh_session* opened = nullptr;
  hh_status status = hh_open(job.c_str(), print, nullptr, &opened);
  if (status == HH_OK) {
    session = opened;
    // The signal may have come before there was a session to cancel.
    if (interrupted) hh_cancel(opened);
    status = hh_run_job(opened);
  }
  session = nullptr;
  hh_close(opened);
  return status;
}
