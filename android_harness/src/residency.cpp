#include "residency.hpp"

#include <algorithm>

#include "events.hpp"

namespace hh {

Residency::Residency(std::vector<Slot> slots, std::vector<size_t> calls, bool prefetch, Loaded loaded)
    : slots_(std::move(slots)),
      calls_(std::move(calls)),
      loaded_(std::move(loaded)),
      residents_(slots_.size()),
      reported_(slots_.size()) {
  bool any = std::ranges::any_of(slots_, [](const Slot& s) { return s.stream; });
  if (prefetch && any) helper_ = std::thread([this] { work(); });
}

Residency::~Residency() {
  if (!helper_.joinable()) return;
  {
    std::lock_guard lock(mutex_);
    quit_ = true;
  }
  changed_.notify_all();
  helper_.join();
}

Residency::Ready Residency::load(size_t slot) {
  Ready ready;
  double start = now_ms();
  try {
    ready.model = slots_[slot].engine->load(slots_[slot].info);
  } catch (...) {
    ready.error = std::current_exception();
  }
  ready.ms = now_ms() - start;
  if (ready.model) ready.ms -= ready.model->blocked_ms;
  return ready;
}

void Residency::report(size_t slot, const Ready& ready) {
  if (reported_[slot]) return;
  reported_[slot] = true;
  loaded_(slots_[slot].info, ready.ms, ready.model->cache);
}

void Residency::load_residents(const std::function<void()>& go_on) {
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (!slots_[i].engine->must_pack(slots_[i].info)) continue;
    go_on();
    Ready ready = load(i);
    if (ready.error) std::rethrow_exception(ready.error);
    report(i, ready);
  }
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (slots_[i].stream) continue;
    go_on();
    Ready ready = load(i);
    if (ready.error) std::rethrow_exception(ready.error);
    report(i, ready);
    residents_[i] = std::move(ready.model);
  }
}

size_t Residency::next_streamed(size_t call) const {
  for (size_t i = call + 1; i < calls_.size(); ++i)
    if (slots_[calls_[i]].stream && calls_[i] != current_slot_) return calls_[i];
  return kNone;
}

Model& Residency::acquire(size_t call) {
  const size_t slot = calls_[call];
  if (!slots_[slot].stream) {
    if (!residents_[slot]) {
      Ready ready = load(slot);
      if (ready.error) std::rethrow_exception(ready.error);
      residents_[slot] = std::move(ready.model);
    }
    return *residents_[slot];
  }
  if (current_slot_ != slot) {
    current_.reset();
    current_slot_ = kNone;
    Ready ready;
    if (requested_ == slot) {
      ready = await();
    } else {
      if (requested_ != kNone) await();
      ready = load(slot);
    }
    if (ready.error) std::rethrow_exception(ready.error);
    report(slot, ready);
    current_ = std::move(ready.model);
    current_slot_ = slot;
  }
  if (helper_.joinable() && requested_ == kNone)
    if (size_t next = next_streamed(call); next != kNone) request(next);
  return *current_;
}

void Residency::release(size_t call) {
  if (current_slot_ == kNone) return;
  // Resident ones may be called in between.
  auto next = std::find_if(calls_.begin() + static_cast<ptrdiff_t>(call) + 1, calls_.end(),
                           [this](size_t slot) { return slots_[slot].stream; });
  const bool again = next != calls_.end() && *next == current_slot_;
  if (!again) {
    if (!current_->packed.intact()) changed(current_slot_);
    current_.reset();
    current_slot_ = kNone;
  }
}

void Residency::changed(size_t slot) {
  throw Error("io", "artifact '" + slots_[slot].info.id + "': its packed weights in the cache were "
                    "changed or cut off while they were in use, so the picture may be wrong "
                    "(run again: they will be packed anew)");
}

void Residency::check_intact() {
  for (size_t i = 0; i < slots_.size(); ++i)
    if (residents_[i] && !residents_[i]->packed.intact()) {
      residents_[i].reset();
      changed(i);
    }
}

void Residency::drop_streamed() {
  current_.reset();
  current_slot_ = kNone;
  if (requested_ != kNone) await();
}

void Residency::stream_all() {
  drop_streamed();
  for (Slot& slot : slots_) slot.stream = true;
  for (auto& model : residents_) model.reset();
}

void Residency::request(size_t slot) {
  requested_ = slot;
  {
    std::lock_guard lock(mutex_);
    todo_ = slot;
    done_ = false;
  }
  changed_.notify_all();
}

Residency::Ready Residency::await() {
  requested_ = kNone;
  std::unique_lock lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
  done_ = false;
  return std::move(result_);
}

void Residency::work() {
  std::unique_lock lock(mutex_);
  for (;;) {
    changed_.wait(lock, [this] { return quit_ || todo_ != kNone; });
    if (quit_) return;
    size_t slot = std::exchange(todo_, kNone);
    lock.unlock();
    Ready ready = load(slot);
    lock.lock();
    result_ = std::move(ready);
    done_ = true;
    changed_.notify_all();
  }
}

}  // namespace hh
