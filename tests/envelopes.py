"""Every envelope of devicectl that is known, as its versions write them, from list to copy."""

from __future__ import annotations

import copy
from typing import Any

CORE = "com.apple.dt.CoreDeviceError"
BOARD = "FBSOpenApplicationErrorDomain"
SERVICE = "FBSOpenApplicationServiceErrorDomain"
DEVICE = "4F480C10-679A-47F3-AE36-99D0EC643774"
APP = "dev.handheld.bench"


def info(command: str, outcome: str = "success") -> dict[str, Any]:
    return {
        "arguments": ["devicectl", *command.split("."), "--json-output", "answer.json"],
        "commandType": f"devicectl.{command}",
        "environment": {"TERM": "xterm"},
        "outcome": outcome,
        "version": "397.28",
    }


def ok(command: str, **result: Any) -> dict[str, Any]:
    return {"info": info(command), "result": result}


def text(value: str) -> dict[str, str]:
    return {"string": value}


def failed(command: str, *chain: tuple[str, int, str], key: str = "NSLocalizedDescription"):
    """An error, with those that it wraps, outermost first."""
    inner: dict[str, Any] | None = None
    for domain, code, words in reversed(chain):
        user: dict[str, Any] = {key: text(words)}
        if inner is not None:
            user["NSUnderlyingError"] = {"error": inner}
        inner = {"code": code, "domain": domain, "userInfo": user}
    return {"info": info(command, "failed"), "error": inner}


LISTED: dict[str, Any] = {
    "capabilities": [
        {"featureIdentifier": "com.apple.coredevice.feature.installapp", "name": "Install"}
    ],
    "connectionProperties": {
        "authenticationType": "manualPairing",
        "isMobileDeviceOnly": False,
        "lastConnectionDate": "2026-01-01T12:00:00.000Z",
        "pairingState": "paired",
        "potentialHostnames": ["phone.coredevice.local"],
        "transportType": "wired",
        "tunnelIPAddress": "fd00::1",
        "tunnelState": "connected",
        "tunnelTransportProtocol": "tcp",
    },
    "deviceProperties": {
        "bootState": "booted",
        "bootedFromSnapshot": True,
        "ddiServicesAvailable": True,
        "developerModeStatus": "enabled",
        "hasInternalOSBuild": False,
        "name": "Test iPhone",
        "osBuildUpdate": "22B83",
        "osVersionNumber": "18.1",
    },
    "hardwareProperties": {
        "cpuType": {"name": "arm64e", "subType": 2, "type": 16777228},
        "deviceType": "iPhone",
        "ecid": 18446744073709551615,
        "hardwareModel": "D83AP",
        "internalStorageCapacity": 256_000_000_000,
        "isProductionFused": True,
        "marketingName": "iPhone 15 Pro",
        "platform": "iOS",
        "productType": "iPhone16,1",
        "reality": "physical",
        "serialNumber": "XXXXXXXXXX",
        "supportedCPUTypes": [{"name": "arm64e", "subType": 2, "type": 16777228}],
        "supportedDeviceFamilies": [1],
        "thinningProductType": "iPhone16,1",
        "udid": "00008130-001C4D5A1E80001C",
    },
    "identifier": DEVICE,
    "tags": [],
    "visibilityClass": "default",
}


def listed(**changes: dict[str, Any]) -> dict[str, Any]:
    """A device with some values changed; None takes one away."""
    item = copy.deepcopy(LISTED)
    for part, values in changes.items():
        for name, value in values.items():
            if value is None:
                item[part].pop(name)
            else:
                item[part][name] = value
    return item


AWAY = listed(
    connectionProperties={"transportType": None, "tunnelState": "unavailable"},
    deviceProperties={"ddiServicesAvailable": False, "developerModeStatus": None},
)
STRANGER = listed(connectionProperties={"pairingState": "unpaired", "transportType": None})
GLASSES = listed(hardwareProperties={"platform": "xrOS", "productType": "RealityDevice14,1"})

SUCCESSES = {
    "list": ok("list.devices", devices=[LISTED, AWAY, STRANGER, GLASSES]),
    "list-none": ok("list.devices", devices=[]),
    "details": ok("device.info.details", **LISTED),
    "lock-state": ok("device.info.lockState", deviceIdentifier=DEVICE, passcodeRequired=True,
                     unlockedSinceBoot=True),
    "install": ok("device.install.app", deviceIdentifier=DEVICE, installedApplications=[
        {"bundleID": APP, "databaseSequenceNumber": 7, "installationURL": "file:///private/var/x/"}
    ]),
    "launch": ok("device.process.launch", deviceIdentifier=DEVICE,
                 launchOptions={"activatedWhenStarted": True, "terminateExisting": True},
                 process={"executable": "file:///private/var/x/Bench", "processIdentifier": 4711}),
    "processes": ok("device.info.processes", deviceIdentifier=DEVICE, runningProcesses=[
        {"processIdentifier": 1, "executable": "file:///sbin/launchd"}, {"processIdentifier": 4711}
    ]),
    "files": ok("device.info.files", deviceIdentifier=DEVICE, files=[
        {"name": "Documents", "resources": {"fileSize": 96, "isDirectory": True}}
    ]),
    "copy-to": ok("device.copy.to", deviceIdentifier=DEVICE, files=[]),
    "copy-from": ok("device.copy.from", deviceIdentifier=DEVICE, files=[{"relativePath": "a"}]),
    "terminate": ok("device.process.terminate", deviceIdentifier=DEVICE,
                    process={"processIdentifier": 4711}, signal={"name": "SIGTERM", "value": 15}),
    "memory-warning": ok("device.process.sendMemoryWarning", deviceIdentifier=DEVICE,
                         process={"processIdentifier": 4711}),
    "empty": {"info": info("device.process.terminate")},
}  # fmt: skip

LAUNCH = (CORE, 10002, "The application failed to launch.")
COPY = (CORE, 7000, "The file could not be copied.")
FAILURES = {
    "not-connected": failed("device.copy.to", (CORE, 1011, "The device is not connected.")),
    "no-such-device": failed("device.info.details", (CORE, 1000, "Device not found.")),
    "vanished": failed("device.process.launch", (CORE, 1, "The connection was interrupted.")),
    "locked": failed("device.process.launch", LAUNCH, (BOARD, 7, "Locked."),
                     key="NSLocalizedFailureReason"),
    "untrusted": failed("device.process.launch", LAUNCH, (BOARD, 3, "Untrusted developer.")),
    "not-installed": failed("device.process.launch", LAUNCH, (SERVICE, 1, "Not installed.")),
    "no-file": failed("device.copy.from", COPY, ("NSCocoaErrorDomain", 260, "No such file.")),
    "copy-timed-out": failed("device.copy.to", COPY, ("NSPOSIXErrorDomain", 60, "Timed out.")),
    "full": failed("device.copy.to", COPY, ("NSPOSIXErrorDomain", 28, "No space left on device.")),
    "renamed-field": failed("device.info.processes", (CORE, 28001, "Unknown field.")),
    "lock-state": failed("device.info.lockState", ("com.apple.mobiledevice", -402653181, "No.")),
    "install": failed("device.install.app", (CORE, 3002, "Failed to install the app."),
                      ("IXRemoteErrorDomain", 6, "No profile."), ("MIInstaller", 13, "Signature.")),
    "plain-text": {"info": info("device.copy.to", "failed"), "error": {
        "code": 7000, "domain": CORE, "userInfo": {"NSLocalizedDescription": "in words"}}},
    "no-user-info": {"info": info("device.copy.to", "failed"),
                     "error": {"code": 7000, "domain": CORE}},
    "no-error": {"info": info("device.install.app", "failed")},
    "timeout": {"info": info("device.process.launch", "timeout")},
}  # fmt: skip


def versions(tree: dict[str, Any]) -> list[dict[str, Any]]:
    """Return an envelope as version 1, which names no version, to 4."""
    return [
        tree if version == 1 else {**tree, "info": {**tree["info"], "jsonVersion": version}}
        for version in (1, 2, 3, 4)
    ]


ALL = [e for tree in (*SUCCESSES.values(), *FAILURES.values()) for e in versions(tree)]
