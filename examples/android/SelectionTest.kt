// Gives the answers that every implementation of selection must give:
// java -jar ... tests/golden/selection
import org.handheld.release.Phone
import org.handheld.release.Release
import org.json.JSONArray
import org.json.JSONObject
import java.io.File
import kotlin.system.exitProcess

fun main(args: Array<String>) {
    val folder = File(args[0])
    val release = Release(File(folder, "release.json").readText())
    val cases = JSONArray(File(folder, "cases.json").readText())
    var wrong = 0
    for (i in 0 until cases.length()) {
        val case = cases.getJSONObject(i)
        val choice = release.select(phone(case.getJSONObject("phone")))
        val wanted = if (case.isNull("variant")) null else case.getString("variant")
        val mode = if (case.isNull("residency")) null else case.getString("residency")
        if (choice?.variant != wanted || choice?.residency != mode) {
            println("${case.getJSONObject("phone")}: $choice, not $wanted $mode")
            wrong++
        }
    }
    println("${cases.length()} phones, $wrong wrong")
    if (wrong > 0 || cases.length() == 0) exitProcess(1)
}

fun phone(json: JSONObject) = Phone(
    platform = json.getString("platform"),
    soc = json.optString("soc", "").ifEmpty { null },
    ramBytes = if (json.has("ram_bytes")) json.getLong("ram_bytes") else null,
    budgetBytes = if (json.has("budget_bytes")) json.getLong("budget_bytes") else null,
    os = if (json.has("os")) json.getInt("os") else null,
    freeBytes = if (json.has("free_bytes")) json.getLong("free_bytes") else null,
    engines = json.optJSONArray("engines")?.let { a -> (0 until a.length()).map(a::getString).toSet() }
)
