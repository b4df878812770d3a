#include "handheld.h"

#include <atomic>
#include <cstring>
#include <exception>
#include <new>

#include "engines.hpp"
#include "json.hpp"
#include "memory_plan.hpp"
#include "noise.hpp"
#include "release.hpp"
#include "session.hpp"

struct hh_session {
  hh::Session session;
};

namespace {

thread_local std::string last_error = "{\"code\":\"\",\"message\":\"\"}";
std::atomic<uint64_t> open_generation{0};

hh_status status_of(const std::string& code) {
  for (const char* bad : {"job", "bundle", "hash", "engine-missing", "input"})
    if (code == bad) return HH_BAD_INPUT;
  return HH_FAILED;
}

hh_status record(const hh::EventSink& events, const std::string& code, const std::string& message) {
  last_error = "{\"code\":";
  hh::json::append_string(last_error, code);
  last_error += ",\"message\":";
  hh::json::append_string(last_error, message);
  last_error += '}';
  if (events) events(hh::Event("error").add("code", code).add("message", message).text());
  return status_of(code);
}

template <class F>
hh_status guarded(const hh::EventSink& events, F&& body) {
  try {
    body();
    return HH_OK;
  } catch (const hh::Error& error) {
    return record(events, error.code, error.what());
  } catch (const std::bad_alloc&) {
    return record(events, "memory", "out of memory");
  } catch (const std::exception& error) {
    return record(events, "engine", error.what());
  } catch (...) {
    return record(events, "engine", "unknown failure");
  }
}

// An error of a run is an event as well; it goes where the session's events go.
template <class F>
hh_status run_guarded(hh_session* session, F&& body) {
  if (!session) return record({}, "job", "no session");
  hh::EventSink events = [session](const char* json) { session->session.emit_text(json); };
  return guarded(events, body);
}

}  // namespace

const char* hh_version(void) { return HANDHELD_VERSION; }

const char* hh_engines(void) {
  static const std::string text = hh::engines_json();
  return text.c_str();
}

const char* hh_last_error(void) { return last_error.c_str(); }

hh_status hh_check_release(const char* release_json, const char* variant, const char* bundle) {
  return guarded({}, [&] {
    if (!release_json || !variant || !bundle) throw hh::Error("job", "a name is missing");
    hh::check_release(release_json, variant, bundle);
  });
}

const char* hh_plan_memory(const char* json) {
  static thread_local std::string answer;
  hh_status status = guarded({}, [&] {
    if (!json) throw hh::Error("job", "there is no case to plan");
    answer = hh::answer_plan_case(json);
  });
  return status == HH_OK ? answer.c_str() : nullptr;
}

hh_status hh_open(const char* job_json, hh_event_fn events, void* user, hh_session** out) {
  hh::EventSink sink;
  if (events) sink = [events, user](const char* json) { events(user, json); };
  if (out) *out = nullptr;
  return guarded(sink, [&] {
    if (!job_json || !out) throw hh::Error("job", "no job or no place for the session");
    const uint64_t generation = open_generation.load();
    *out = new hh_session{hh::Session(hh::read_job(job_json), sink,
                                      [&] { return open_generation.load() != generation; })};
  });
}

hh_status hh_set_input(hh_session* session, const char* name, const void* data, size_t bytes) {
  return guarded({}, [&] {
    if (!session || !name || (!data && bytes)) throw hh::Error("input", "no session, name or data");
    session->session.set_input(name, data, bytes);
  });
}

hh_status hh_set_seed(hh_session* session, uint64_t seed) {
  return guarded({}, [&] {
    if (!session) throw hh::Error("input", "no session");
    session->session.set_seed(seed);
  });
}

hh_status hh_run(hh_session* session) {
  return run_guarded(session, [&] { session->session.run(); });
}

hh_status hh_run_job(hh_session* session) {
  return run_guarded(session, [&] { session->session.run_job(); });
}

hh_status hh_output(hh_session* session, const char* role, const void** data, size_t* bytes) {
  return guarded({}, [&] {
    if (!session || !role || !data || !bytes) throw hh::Error("input", "no session, role or place");
    auto found = session->session.output(role);
    *data = found.data();
    *bytes = found.size();
  });
}

void hh_cancel(hh_session* session) {
  if (session) {
    session->session.cancel();
  } else {
    open_generation.fetch_add(1);
  }
}

hh_status hh_on_progress(hh_session* session, hh_progress_fn progress, void* user) {
  return guarded({}, [&] {
    if (!session) throw hh::Error("input", "no session");
    hh::Session::Progress told;
    if (progress) told = [=](size_t done, size_t total) { progress(user, done, total); };
    session->session.on_progress(std::move(told));
  });
}

void hh_memory_warning(hh_session* session) {
  if (session) guarded({}, [&] { session->session.memory_warning(); });
}

void hh_close(hh_session* session) { delete session; }

void hh_noise(uint64_t seed, uint32_t stream, float* out, size_t count) {
  hh::draw_noise(seed, stream, out, count);
}
