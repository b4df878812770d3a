// Which variant of a release this phone gets, and a picture from it. Selection follows
// docs/release.md and is tested against tests/golden/selection; it needs org.json only, which
// Android has built in.
package org.handheld.release

import org.json.JSONArray
import org.json.JSONObject
import java.io.Closeable
import java.io.File

/** What is known of a phone; null where it does not tell. */
data class Phone(
    val platform: String = "android",
    val soc: String? = null,
    val ramBytes: Long? = null,
    val budgetBytes: Long? = null,
    val os: Int? = null,
    val freeBytes: Long? = null,
    val engines: Set<String>? = null
)

data class Choice(val variant: String, val residency: String)

class Release(json: String) {
    private val tree = JSONObject(json)

    init {
        val version = tree.getInt("schema_version")
        require(version == 1) { "release.json has the unknown version $version" }
    }

    /** Returns the first mode of the first variant that fits, or null: nothing fits. */
    fun select(phone: Phone): Choice? {
        val budget = phone.budgetBytes ?: phone.ramBytes?.let { ram ->
            tree.getJSONObject("budget").optDouble(phone.platform).takeUnless { it.isNaN() }
                ?.let { (ram * it).toLong() }
        } ?: return null
        for (variant in objects(tree.getJSONArray("variants"))) {
            if (!fits(variant.getJSONObject("needs"), phone)) continue
            for (mode in objects(variant.getJSONArray("modes"))) {
                if (mode.getLong("memory_bytes") <= budget) {
                    return Choice(variant.getString("id"), mode.getString("residency"))
                }
            }
        }
        return null
    }

    private fun fits(needs: JSONObject, phone: Phone): Boolean {
        if (phone.platform !in strings(needs.getJSONArray("platforms"))) return false
        val engines = phone.engines
        if (engines != null && !engines.containsAll(strings(needs.getJSONArray("engines")))) {
            return false
        }
        val socs = strings(needs.getJSONArray("soc"))
        if (socs.isNotEmpty() && socs.none { isSoc(phone.soc ?: "", it) }) return false
        val least = needs.getJSONObject("min_os")
        if (least.has(phone.platform)) {
            val os = phone.os ?: return false
            if (os < least.getInt(phone.platform)) return false
        }
        val free = phone.freeBytes
        return free == null || free >= needs.getLong("storage_bytes")
    }

    private fun isSoc(have: String, wanted: String): Boolean {
        val words = have.split(Regex("\\s+")).filter { it.isNotEmpty() }
        val theirs = wanted.filterNot { it.isWhitespace() }
        // A maker may stand in front: "QTI SM8650".
        return listOf(words, words.drop(1)).map { it.joinToString("") }.any {
            it.equals(theirs, ignoreCase = true) || it.startsWith("$theirs-", ignoreCase = true)
        }
    }

    private fun objects(array: JSONArray) = (0 until array.length()).map(array::getJSONObject)

    private fun strings(array: JSONArray) = (0 until array.length()).map(array::getString)
}

/** The harness library's C API, handheld.h, as a JNI binding gives it. */
interface Harness {
    fun checkRelease(releaseJson: String, variant: String, bundle: String)
    fun open(jobJson: String): Session
}

interface Session : Closeable {
    fun setInput(name: String, data: ByteArray)
    fun setSeed(seed: Long)
    fun run()
    fun output(role: String): ByteArray
}

/** Draws a picture: uint8, height x width x 3. */
fun generate(
    harness: Harness,
    folder: File,
    choice: Choice,
    cache: File,
    inputs: Map<String, ByteArray>,
    seed: Long
): ByteArray {
    val bundle = File(folder, "bundle")
    harness.checkRelease(File(folder, "release.json").path, choice.variant, bundle.path)
    val job = JSONObject()
        .put("bundle", bundle.path)
        .put("residency", choice.residency)
        .put("threads", 4)
        .put("cache", cache.path)
    harness.open(job.toString()).use { session ->
        for ((name, data) in inputs) session.setInput(name, data)
        session.setSeed(seed)
        session.run()
        return session.output("picture")
    }
}
