// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "HandheldHarness",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "HandheldProtocol", targets: ["HandheldProtocol"]),
        .library(name: "HandheldRuntime", targets: ["HandheldRuntime"]),
        .library(name: "HandheldEngines", targets: ["HandheldEngines"]),
    ],
    targets: [
        .target(name: "HandheldProtocol"),
        .target(name: "HandheldRuntime", dependencies: ["HandheldProtocol"]),
        .target(name: "HandheldEngines", dependencies: ["HandheldRuntime"]),
        .testTarget(name: "HandheldProtocolTests", dependencies: ["HandheldProtocol"]),
        .testTarget(name: "HandheldRuntimeTests", dependencies: ["HandheldRuntime"]),
    ]
)
