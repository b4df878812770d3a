// What dev.handheld.Session (java/) calls: the C API for Java and Kotlin.
#include <jni.h>

#include <cstdint>
#include <string>
#include <vector>

#include "handheld.h"

namespace {

JavaVM* machine = nullptr;

struct Bridge {
  hh_session* session = nullptr;
  jobject listener = nullptr;
  jmethodID on_event = nullptr, on_progress = nullptr;
};

// Java's own UTF-8 differs from everybody else's beyond the basic plane, so text travels as bytes.
std::string text_of(JNIEnv* env, jbyteArray bytes) {
  std::string out(static_cast<size_t>(env->GetArrayLength(bytes)), '\0');
  env->GetByteArrayRegion(bytes, 0, static_cast<jsize>(out.size()),
                          reinterpret_cast<jbyte*>(out.data()));
  return out;
}

jbyteArray bytes_of(JNIEnv* env, const void* data, size_t size) {
  jbyteArray out = size > INT32_MAX ? nullptr : env->NewByteArray(static_cast<jsize>(size));
  if (out)
    env->SetByteArrayRegion(out, 0, static_cast<jsize>(size), static_cast<const jbyte*>(data));
  return out;
}

jbyteArray bytes_of(JNIEnv* env, const char* text) {
  return bytes_of(env, text, std::char_traits<char>::length(text));
}

JNIEnv* environment() {
  void* env = nullptr;
  if (machine->GetEnv(&env, JNI_VERSION_1_6) == JNI_OK) return static_cast<JNIEnv*>(env);
  return nullptr;
}

// A listener that threw before must not be called again: the exception is on its way to the caller.
void event(void* user, const char* json) {
  auto* bridge = static_cast<Bridge*>(user);
  JNIEnv* env = environment();
  if (!env || !bridge->listener || env->ExceptionCheck()) return;
  jbyteArray text = bytes_of(env, json);
  if (text) env->CallVoidMethod(bridge->listener, bridge->on_event, text);
  if (env->ExceptionCheck()) hh_cancel(bridge->session);
  env->DeleteLocalRef(text);
}

void progress(void* user, size_t done, size_t total) {
  auto* bridge = static_cast<Bridge*>(user);
  JNIEnv* env = environment();
  if (!env || env->ExceptionCheck()) return;
  env->CallVoidMethod(bridge->listener, bridge->on_progress, static_cast<jint>(done),
                      static_cast<jint>(total));
  if (env->ExceptionCheck()) hh_cancel(bridge->session);
}

jbyteArray failure(JNIEnv* env, hh_status status) {
  return status == HH_OK ? nullptr : bytes_of(env, hh_last_error());
}

Bridge* bridge_of(jlong handle) { return reinterpret_cast<Bridge*>(handle); }

void destroy(JNIEnv* env, Bridge* bridge) {
  hh_close(bridge->session);
  if (bridge->listener) env->DeleteGlobalRef(bridge->listener);
  delete bridge;
}

}  // namespace

extern "C" {

JNIEXPORT jint JNI_OnLoad(JavaVM* vm, void*) {
  machine = vm;
  return JNI_VERSION_1_6;
}

#define HH_JAVA(type, name) JNIEXPORT type JNICALL Java_dev_handheld_Session_##name

HH_JAVA(jbyteArray, nativeVersion)(JNIEnv* env, jclass) { return bytes_of(env, hh_version()); }
HH_JAVA(jbyteArray, nativeEngines)(JNIEnv* env, jclass) { return bytes_of(env, hh_engines()); }

// Returns what went wrong, or null; the handle goes into place[0].
HH_JAVA(jbyteArray, nativeOpen)
(JNIEnv* env, jclass, jbyteArray job, jobject listener, jlongArray place) {
  auto* bridge = new Bridge;
  if (listener) {
    jclass kind = env->GetObjectClass(listener);
    bridge->on_event = env->GetMethodID(kind, "onEventBytes", "([B)V");
    bridge->on_progress = env->GetMethodID(kind, "onProgress", "(II)V");
    if (env->ExceptionCheck()) {
      delete bridge;
      return nullptr;
    }
    bridge->listener = env->NewGlobalRef(listener);
  }
  hh_status status = hh_open(text_of(env, job).c_str(), event, bridge, &bridge->session);
  if (status == HH_OK && listener) status = hh_on_progress(bridge->session, progress, bridge);
  if (status != HH_OK || env->ExceptionCheck()) {
    jbyteArray reason = env->ExceptionCheck() ? nullptr : failure(env, status);
    destroy(env, bridge);
    return reason;
  }
  jlong handle = reinterpret_cast<jlong>(bridge);
  env->SetLongArrayRegion(place, 0, 1, &handle);
  return nullptr;
}

HH_JAVA(jbyteArray, nativeSetInput)
(JNIEnv* env, jclass, jlong handle, jbyteArray name, jbyteArray data) {
  std::string bytes = text_of(env, data);
  return failure(env, hh_set_input(bridge_of(handle)->session, text_of(env, name).c_str(),
                                   bytes.data(), bytes.size()));
}

HH_JAVA(jbyteArray, nativeSetSeed)(JNIEnv* env, jclass, jlong handle, jlong seed) {
  return failure(env, hh_set_seed(bridge_of(handle)->session, static_cast<uint64_t>(seed)));
}

HH_JAVA(jbyteArray, nativeRun)(JNIEnv* env, jclass, jlong handle, jboolean job) {
  hh_session* session = bridge_of(handle)->session;
  hh_status status = job ? hh_run_job(session) : hh_run(session);
  return env->ExceptionCheck() ? nullptr : failure(env, status);
}

// Null if there is no such output; hh_last_error says why.
HH_JAVA(jbyteArray, nativeOutput)(JNIEnv* env, jclass, jlong handle, jbyteArray role) {
  const void* data = nullptr;
  size_t size = 0;
  if (hh_output(bridge_of(handle)->session, text_of(env, role).c_str(), &data, &size) != HH_OK)
    return nullptr;
  return bytes_of(env, data, size);
}

HH_JAVA(jbyteArray, nativeLastError)(JNIEnv* env, jclass) {
  return bytes_of(env, hh_last_error());
}

HH_JAVA(void, nativeCancel)(JNIEnv*, jclass, jlong handle) {
  hh_cancel(bridge_of(handle)->session);
}

HH_JAVA(void, nativeMemoryWarning)(JNIEnv*, jclass, jlong handle) {
  hh_memory_warning(bridge_of(handle)->session);
}

HH_JAVA(void, nativeClose)(JNIEnv* env, jclass, jlong handle) { destroy(env, bridge_of(handle)); }

}  // extern "C"
