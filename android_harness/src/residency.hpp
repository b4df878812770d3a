// Which artifacts are loaded when: resident ones once, streamed ones around their calls.
#pragma once

#include <condition_variable>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include "engine.hpp"

namespace hh {

struct Slot {
  ArtifactInfo info;
  Engine* engine = nullptr;
  bool stream = false;
};

class Residency {
 public:
  using Loaded = std::function<void(const ArtifactInfo&, double ms, CacheState)>;

  // `calls` holds the slot of every call of the program, in order. `loaded` is told, on the
  // caller's thread, when a slot is ready for the first time.
  Residency(std::vector<Slot> slots, std::vector<size_t> calls, bool prefetch, Loaded loaded);
  ~Residency();

  // Packs what is not packed yet, one after the other, so that packing never adds to what is
  // held. Then loads what stays. `go_on` is asked between artifacts and throws to stop.
  void load_residents(const std::function<void()>& go_on);

  // The model of a call; the next streamed one starts loading on the helper's thread.
  Model& acquire(size_t call);
  // The call is over: a streamed model that the next call does not use goes.
  void release(size_t call);
  // Throws Error("io") if packed weights that were used since they were loaded have changed. What
  // is concerned is loaded anew by the next run.
  void check_intact();
  // Drops every streamed model, also after an error.
  void drop_streamed();
  // From now on everything is streamed; what was resident goes. Between calls only.
  void stream_all();

 private:
  static constexpr size_t kNone = SIZE_MAX;
  struct Ready {
    std::unique_ptr<Model> model;
    std::exception_ptr error;
    double ms = 0;
  };

  [[noreturn]] void changed(size_t slot);
  Ready load(size_t slot);
  void report(size_t slot, const Ready&);
  size_t next_streamed(size_t call) const;
  void request(size_t slot);
  Ready await();  // the result of the last request
  void work();

  std::vector<Slot> slots_;
  std::vector<size_t> calls_;
  Loaded loaded_;
  std::vector<std::unique_ptr<Model>> residents_;
  std::vector<bool> reported_;

  std::unique_ptr<Model> current_;
  size_t current_slot_ = kNone;
  size_t requested_ = kNone;  // seen by the caller's thread only

  std::mutex mutex_;
  std::condition_variable changed_;
  size_t todo_ = kNone;
  bool done_ = false, quit_ = false;
  Ready result_;
  std::thread helper_;
};

}  // namespace hh
