// Gives the answers that every implementation of selection must give:
// SelectionTest tests/golden/selection
import Foundation

struct Case: Decodable {
  struct Described: Decodable {
    let platform: String
    let soc: String?
    let ramBytes: Int?
    let budgetBytes: Int?
    let os: Int?
    let freeBytes: Int?
    let engines: [String]?
  }
  let phone: Described
  let variant: String?
  let residency: String?
}

@main
struct SelectionTest {
  static func main() throws {
    let folder = URL(fileURLWithPath: CommandLine.arguments[1])
    let release = try Release(
      json: Data(contentsOf: folder.appendingPathComponent("release.json")))
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    let cases = try decoder.decode(
      [Case].self, from: Data(contentsOf: folder.appendingPathComponent("cases.json")))
    var wrong = 0
    for item in cases {
      let phone = Phone(
        platform: item.phone.platform, soc: item.phone.soc, ramBytes: item.phone.ramBytes,
        budgetBytes: item.phone.budgetBytes, os: item.phone.os, freeBytes: item.phone.freeBytes,
        engines: item.phone.engines.map(Set.init))
      let choice = release.select(phone)
      if choice?.variant != item.variant || choice?.residency != item.residency {
        print("\(item.phone): \(String(describing: choice)), not \(item.variant ?? "nothing")")
        wrong += 1
      }
    }
    print("\(cases.count) phones, \(wrong) wrong")
    if wrong > 0 || cases.isEmpty { exit(1) }
  }
}
