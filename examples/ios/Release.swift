// Which variant of a release this phone gets, and a picture from it, over the harness library's C
// API. Selection follows docs/release.md; on Linux it compiles and gives the answers of Python's.
import Foundation
import CHandheld  // a module map over handheld.h

struct Phone {
  var platform = "ios"
  var soc: String?
  var ramBytes: Int? = Int(ProcessInfo.processInfo.physicalMemory)
  var budgetBytes: Int?  // os_proc_available_memory() plus the present footprint
  var os: Int? = ProcessInfo.processInfo.operatingSystemVersion.majorVersion
  var freeBytes: Int?
  var engines: Set<String>?
}

struct Choice: Equatable {
  let variant: String
  let residency: String
}

struct Release: Decodable {
  struct Mode: Decodable {
    let residency: String
    let memoryBytes: Int
  }
  struct Needs: Decodable {
    let platforms: [String]
    let soc: [String]
    let minOs: [String: Int]
    let engines: [String]
    let storageBytes: Int
  }
  struct Variant: Decodable {
    let id: String
    let needs: Needs
    let modes: [Mode]
  }
  let schemaVersion: Int
  let budget: [String: Double]
  let variants: [Variant]

  init(json: Data) throws {
    let decoder = JSONDecoder()
    decoder.keyDecodingStrategy = .convertFromSnakeCase
    self = try decoder.decode(Release.self, from: json)
    guard schemaVersion == 1 else { throw HandheldError(message: "unknown release version") }
  }

  /// The first mode of the first variant that fits, or nil: nothing fits.
  func select(_ phone: Phone) -> Choice? {
    let assumed = phone.ramBytes.flatMap { ram in
      budget[phone.platform].map { Int(Double(ram) * $0) }
    }
    guard let budget = phone.budgetBytes ?? assumed else { return nil }
    for variant in variants where fits(variant.needs, phone) {
      if let mode = variant.modes.first(where: { $0.memoryBytes <= budget }) {
        return Choice(variant: variant.id, residency: mode.residency)
      }
    }
    return nil
  }

  private func fits(_ needs: Needs, _ phone: Phone) -> Bool {
    guard needs.platforms.contains(phone.platform) else { return false }
    if let have = phone.engines, !have.isSuperset(of: needs.engines) { return false }
    if !needs.soc.isEmpty {
      guard let soc = phone.soc, needs.soc.contains(where: { isSoc(soc, $0) }) else { return false }
    }
    if let least = needs.minOs[phone.platform] {
      guard let os = phone.os, os >= least else { return false }
    }
    return phone.freeBytes.map { $0 >= needs.storageBytes } ?? true
  }

  private func isSoc(_ have: String, _ wanted: String) -> Bool {
    let words = have.uppercased().split(whereSeparator: \.isWhitespace)
    let theirs = wanted.uppercased().filter { !$0.isWhitespace }
    // A maker may stand in front: "QTI SM8650".
    return [words, Array(words.dropFirst())].map { $0.joined() }.contains { ours in
      ours == theirs || ours.hasPrefix(theirs + "-")
    }
  }
}

struct HandheldError: Error {
  let message: String
  static var last: HandheldError { HandheldError(message: String(cString: hh_last_error())) }
}

/// Draws a picture: uint8, height x width x 3.
func generate(
  folder: URL, choice: Choice, cache: URL, inputs: [String: Data], seed: UInt64
) throws -> Data {
  let bundle = folder.appendingPathComponent("bundle").path
  let release = folder.appendingPathComponent("release.json").path
  guard hh_check_release(release, choice.variant, bundle) == HH_OK else { throw HandheldError.last }
  let job: [String: Any] = [
    "bundle": bundle, "residency": choice.residency, "threads": 4, "cache": cache.path,
  ]
  let text = String(decoding: try JSONSerialization.data(withJSONObject: job), as: UTF8.self)
  var session: OpaquePointer?
  guard hh_open(text, nil, nil, &session) == HH_OK else { throw HandheldError.last }
  defer { hh_close(session) }
  for (name, data) in inputs {
    let status = data.withUnsafeBytes { hh_set_input(session, name, $0.baseAddress, $0.count) }
    guard status == HH_OK else { throw HandheldError.last }
  }
  guard hh_set_seed(session, seed) == HH_OK, hh_run(session) == HH_OK else {
    throw HandheldError.last
  }
  var picture: UnsafeRawPointer?
  var count = 0
  guard hh_output(session, "picture", &picture, &count) == HH_OK, let picture else {
    throw HandheldError.last
  }
  return Data(bytes: picture, count: count)
}
