// swift-tools-version: 5.9
import PackageDescription

let package = Package(
    name: "HandheldHarness",
    platforms: [.iOS(.v17), .macOS(.v14)],
    products: [
        .library(name: "HandheldProtocol", targets: ["HandheldProtocol"])
    ],
    targets: [
        .target(name: "HandheldProtocol"),
        .testTarget(name: "HandheldProtocolTests", dependencies: ["HandheldProtocol"]),
    ]
)
