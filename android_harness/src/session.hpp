// One opened bundle: what hh_session is behind the C API.
#pragma once

#include <atomic>
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "engines.hpp"
#include "events.hpp"
#include "executor.hpp"
#include "job.hpp"
#include "manifest.hpp"
#include "residency.hpp"

namespace hh {

class Session {
 public:
  using Progress = std::function<void(size_t done, size_t total)>;

  // `cancelled` is asked while the bundle is being opened.
  Session(Job job, EventSink events, const std::function<bool()>& cancelled);

  void set_input(const std::string& name, const void* data, size_t bytes);
  void set_seed(uint64_t seed);
  void run();
  void run_job();
  std::span<const std::byte> output(const std::string& role) const;
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  // From any thread: everything is streamed from the next call on.
  void memory_warning();
  void on_progress(Progress progress) { progress_ = std::move(progress); }
  void emit(Event event) const { emit_text(event.text()); }
  void emit_text(const char* json) const {
    if (events_) events_(json);
  }

 private:
  struct Timing {
    double engine = 0, load = 0;
    std::vector<double> calls;
  };

  const Program& program() const { return size_->program; }
  bool plan_memory(std::vector<Slot>& slots, const std::vector<size_t>& calls) const;
  void open_artifacts(const std::function<void()>& go_on);
  std::unique_ptr<SafeTensors> open_constants() const;
  Engine& engine_for(const Artifact& artifact);
  void read_job_inputs();
  void prepare_inputs();
  double iterate(const char* kind);  // its milliseconds
  bool enough(const std::vector<double>& timed, double elapsed_ms);
  void save_memory();
  void pass(SafeTensorsWriter* dump);
  void dump_calls();
  void emit_memory(const char* phase) const;
  void emit_thermal() const;
  void emit_outputs() const;
  double psnr(std::span<const std::byte> picture) const;
  void check_cancelled();

  Job job_;
  EventSink events_;
  Manifest manifest_;
  const Size* size_ = nullptr;
  std::unique_ptr<Executor> executor_;
  std::unique_ptr<Engines> engines_;
  std::unique_ptr<Residency> residency_;
  std::map<std::string, bool> given_;  // by input: the caller gave it
  uint64_t seed_ = 0;
  bool draw_ = true;
  bool ran_ = false;
  int64_t index_ = 0;
  Timing timing_;
  std::atomic<bool> cancelled_{false};
  Progress progress_;
  std::mutex running_;
  std::atomic<bool> memory_is_short_{false};
  size_t judged_ = 0;  // timed runs when their spread was last looked at
};

}  // namespace hh
