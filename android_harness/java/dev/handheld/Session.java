package dev.handheld;

import java.nio.charset.StandardCharsets;

/**
 * A bundle that is open for running, for Java and Kotlin.
 *
 * <p>Use it from one thread at a time; {@link #cancel} and {@link #memoryWarning} may be called
 * from any. An Android app calls {@link #memoryWarning} from {@code onTrimMemory}.
 *
 * <pre>{@code
 * Session(jobJson, listener).use { session ->
 *     session.setInput("prompt_embeds", embeds)
 *     session.run()
 *     val picture = session.output("picture")  // uint8 [1, H, W, 3]
 * }
 * }</pre>
 */
public final class Session implements AutoCloseable {
    static {
        System.loadLibrary("handheld_jni");
    }

    /** Told what happens, on the thread that runs. */
    public interface Listener {
        /** Takes one event of the harness protocol, as JSON. */
        void onEvent(String json);

        /** Takes how many of the program's calls are done. */
        default void onProgress(int done, int total) {}

        /** Called by native code, with the event as UTF-8. */
        default void onEventBytes(byte[] json) {
            onEvent(new String(json, StandardCharsets.UTF_8));
        }
    }

    /** The library refused or failed. The message is a JSON object with code and message. */
    public static final class Failure extends RuntimeException {
        private static final long serialVersionUID = 1L;

        Failure(byte[] reason) {
            super(new String(reason, StandardCharsets.UTF_8));
        }
    }

    private final Object closing = new Object();
    private long handle;

    /** Opens the bundle of a job; see docs/harness-protocol.md. The listener may be null. */
    public Session(String jobJson, Listener listener) {
        long[] place = new long[1];
        check(nativeOpen(utf8(jobJson), listener, place));
        handle = place[0];
    }

    /** The library's version. */
    public static String version() {
        return new String(nativeVersion(), StandardCharsets.UTF_8);
    }

    /** The engines built in, as a JSON object from name to version. */
    public static String engines() {
        return new String(nativeEngines(), StandardCharsets.UTF_8);
    }

    /** Gives an input; the bytes are the tensor's, little-endian, and are copied. */
    public synchronized void setInput(String name, byte[] data) {
        check(nativeSetInput(open(), utf8(name), data));
    }

    /** Draws noise from another seed from the next run on; read as unsigned. */
    public synchronized void setSeed(long seed) {
        check(nativeSetSeed(open(), seed));
    }

    /** Runs the program once. */
    public synchronized void run() {
        check(nativeRun(open(), false));
    }

    /** Runs the job's warm-up and timed iterations. */
    public synchronized void runJob() {
        check(nativeRun(open(), true));
    }

    /** A copy of a result of the last run. */
    public synchronized byte[] output(String role) {
        byte[] found = nativeOutput(open(), utf8(role));
        if (found == null) throw new Failure(nativeLastError());
        return found;
    }

    /** Makes a run under way end after the current call. */
    public void cancel() {
        synchronized (closing) {
            if (handle != 0) nativeCancel(handle);
        }
    }

    /** Drops what is resident and streams it from now on; a run under way goes on. */
    public void memoryWarning() {
        synchronized (closing) {
            if (handle != 0) nativeMemoryWarning(handle);
        }
    }

    /** Ends a run under way and frees everything. */
    @Override
    public void close() {
        cancel();
        synchronized (this) {
            synchronized (closing) {
                if (handle != 0) nativeClose(handle);
                handle = 0;
            }
        }
    }

    private long open() {
        if (handle == 0) throw new IllegalStateException("the session is closed");
        return handle;
    }

    private static byte[] utf8(String text) {
        return text.getBytes(StandardCharsets.UTF_8);
    }

    private static void check(byte[] reason) {
        if (reason != null) throw new Failure(reason);
    }

    private static native byte[] nativeVersion();

    private static native byte[] nativeEngines();

    private static native byte[] nativeOpen(byte[] job, Listener listener, long[] place);

    private static native byte[] nativeSetInput(long handle, byte[] name, byte[] data);

    private static native byte[] nativeSetSeed(long handle, long seed);

    private static native byte[] nativeRun(long handle, boolean job);

    private static native byte[] nativeOutput(long handle, byte[] role);

    private static native byte[] nativeLastError();

    private static native void nativeCancel(long handle);

    private static native void nativeMemoryWarning(long handle);

    private static native void nativeClose(long handle);
}
