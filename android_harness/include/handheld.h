/* Handheld: run a bundle.
 *
 * The C API that apps embed. All functions may be called from any thread, one at a time per
 * session; hh_cancel and hh_memory_warning may be called at any moment. Strings are UTF-8. Nothing throws.
 */
#ifndef HANDHELD_H
#define HANDHELD_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#define HH_API __attribute__((visibility("default")))

typedef struct hh_session hh_session;

typedef enum hh_status {
  HH_OK = 0,
  HH_FAILED = 1,  /* the run failed, or was cancelled */
  HH_BAD_INPUT = 2 /* the job, the bundle or an input is wrong */
} hh_status;

/* One event of the harness protocol, as one JSON object without a line end. */
typedef void (*hh_event_fn)(void* user, const char* json);

/* Version of this library, for example "0.1.0". */
HH_API const char* hh_version(void);

/* The engines built in, as a JSON object from name to version. */
HH_API const char* hh_engines(void);

/* What went wrong last in this thread: a JSON object {"code": ..., "message": ...}. */
HH_API const char* hh_last_error(void);

/* Check that a bundle is the variant of a release that its release.json (a path) means: the hash of
 * its manifest, and size and hash of every file. Do it once after an update; hh_open checks the
 * bundle against its own manifest every time. */
HH_API hh_status hh_check_release(const char* release_json, const char* variant,
                                  const char* bundle);

/* Decide what stays in memory within a budget: a JSON object {"budget", "activations", "packed",
 * "artifacts": [{"id", "bytes", "workspace"}], "calls": [index, ...]} in, {"resident", "streamed",
 * "prefetch", "peak_bytes"} out, which is good until the next call in this thread; NULL if the
 * budget is too small. hh_open does the same for a job with a memory_budget. */
HH_API const char* hh_plan_memory(const char* json);

/* Open the bundle of a job (the JSON text of protocol.Job), plan residency, make resident
 * artifacts ready. Events may be NULL. */
HH_API hh_status hh_open(const char* job_json, hh_event_fn events, void* user, hh_session** out);

/* Give a program input by name; the bytes are copied. Inputs named in the job are read from
 * their files at hh_open. Noise inputs are drawn from the seed unless given. */
HH_API hh_status hh_set_input(hh_session* session, const char* name, const void* data, size_t bytes);

/* Redraw noise inputs from another seed at the next run. */
HH_API hh_status hh_set_seed(hh_session* session, uint64_t seed);

/* Run the program once. Emits one iteration event. */
HH_API hh_status hh_run(hh_session* session);

/* Run the job's warm-up and timed iterations, with memory, output and done events. */
HH_API hh_status hh_run_job(hh_session* session);

/* A result of the last run, by role ("picture"); valid until the next run or close. */
HH_API hh_status hh_output(hh_session* session, const char* role, const void** data, size_t* bytes);

/* Make hh_run or hh_run_job return HH_FAILED (code "cancelled") after the current call. With
 * NULL, make every hh_open under way do so after the current artifact. Only stores to atomics,
 * so a signal handler may call it. */
HH_API void hh_cancel(hh_session* session);

/* Be told after each call of the program how many of its calls are done. On the thread that
 * runs it. NULL stops it. */
typedef void (*hh_progress_fn)(void* user, size_t done, size_t total);
HH_API hh_status hh_on_progress(hh_session* session, hh_progress_fn progress, void* user);

/* The system is short of memory: drop resident artifacts, and stream them from now on. Call it
 * from any thread, also during a run, which then goes on and draws the same picture. */
HH_API void hh_memory_warning(hh_session* session);

HH_API void hh_close(hh_session* session);

/* Draw standard normal noise as runtime/handheld/noise.py specifies. */
HH_API void hh_noise(uint64_t seed, uint32_t stream, float* out, size_t count);

#ifdef __cplusplus
}
#endif

#endif
