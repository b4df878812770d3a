"""Who may ask, how much, and for what: tokens, rates, a prompt policy."""

from __future__ import annotations

import hashlib
import logging
import pkgutil
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from handheld.errors import UsageError
from handheld.files import describe_os_error, write_file
from handheld_export.serve.errors import Refusal
from handheld_export.serve.settings import Settings

Policy = Callable[[str, str], str | None]
"""Takes a prompt and the client's name; returns why it is refused, or None."""

_LINE = re.compile(r"(?P<name>[\w.@-]{1,64}) (?P<sha256>[0-9a-f]{64})(?: (?P<expires>\S+))?")
_MAX_CLIENTS = 10_000
_log = logging.getLogger("handheld.serve")


class Tokens:
    """A file of hashed bearer tokens, read again whenever it changes.

    A line is a name, the sha256 of a token, and optionally the time at which it expires, in
    ISO 8601 with an offset. Lines that begin with ``#`` are comments. A name may have several
    tokens, so that a new one is handed out before the old one goes.

    Tokens are 256 random bits, which is why a plain hash is enough: there is nothing to
    guess that salt and slowness would protect.

    Parameters
    ----------
    path : Path

    Raises
    ------
    UsageError
        If the file cannot be read. Later such faults are logged, and the tokens read before
        stay in force.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._names: dict[bytes, tuple[str, datetime | None]] = {}
        self._seen: tuple[int, int, int] | None = None
        self._seen, self._names = _stamp(path), _read_tokens(path)

    def name(self, token: str) -> str | None:
        """Return whose token it is, None if nobody's."""
        self._refresh()
        found = self._names.get(hashlib.sha256(token.encode()).digest())
        if found is None or (found[1] is not None and found[1] <= datetime.now(UTC)):
            return None
        return found[0]

    def _refresh(self) -> None:
        try:
            stamp = _stamp(self.path)
            if stamp == self._seen:
                return
            self._seen = stamp
            self._names = _read_tokens(self.path)
            _log.info("tokens", extra={"event": "tokens", "count": len(self._names)})
        except UsageError as error:
            if self._seen is not None:
                _log.error("tokens", extra={"event": "tokens-unreadable", "reason": str(error)})
            self._seen = None


def _stamp(path: Path) -> tuple[int, int, int]:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from None
    return status.st_mtime_ns, status.st_size, status.st_ino


def _read_tokens(path: Path) -> dict[bytes, tuple[str, datetime | None]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise _unreadable(path, error) from None
    except UnicodeDecodeError:
        raise UsageError("is not UTF-8 text", path=path, remedy="write it again") from None
    found = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = _LINE.fullmatch(line.strip())
        expires = None
        try:
            if match and match["expires"]:
                expires = datetime.fromisoformat(match["expires"])
        except ValueError:
            match = None
        if match is None or (expires is not None and expires.tzinfo is None):
            raise UsageError(
                "is not NAME SHA256 [EXPIRES]",
                path=f"{path}:{number}",
                remedy="make lines with  handheld serve-text --new-token NAME --tokens FILE",
            )
        found[bytes.fromhex(match["sha256"])] = (match["name"], expires)
    return found


def _unreadable(path: Path, error: OSError) -> UsageError:
    message, remedy = describe_os_error(error)
    return UsageError(f"cannot read: {message}", path=path, remedy=remedy)


def new_token(path: Path, name: str) -> str:
    """Add a random token to a file, hashed, and return it.

    Raises
    ------
    UsageError
        If the name is not one, or the file cannot be read.
    OutputError
        If the file cannot be written.
    """
    token = secrets.token_urlsafe(32)
    line = f"{name} {hashlib.sha256(token.encode()).hexdigest()}"
    if not _LINE.fullmatch(line):
        raise UsageError(
            f"'{name}' is not a client's name", remedy="use up to 64 letters, digits, and . @ - _"
        )
    before = ""
    if path.exists():
        _read_tokens(path)
        before = path.read_text(encoding="utf-8")
    mode = path.stat().st_mode & 0o777 if path.exists() else 0o600
    if before and not before.endswith("\n"):
        before += "\n"
    write_file(path, f"{before}{line}\n".encode())
    path.chmod(mode)
    return token


class Rates:
    """A token bucket per client.

    Parameters
    ----------
    rate : float
        Prompts per second.
    burst : float
        Prompts that may come at once.
    """

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self.burst = max(burst, 1.0)
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def take(self, client: str, count: int, now: float | None = None) -> float:
        """Take prompts from a client's bucket; return the seconds to wait if it lacks them."""
        moment = time.monotonic() if now is None else now
        level, since = self._levels.pop(client, (self.burst, moment))
        level = min(self.burst, level + (moment - since) * self.rate)
        # A request over the burst would never fit: a full bucket lets it in, and goes into debt.
        lacking = min(float(count), self.burst) - level
        if lacking <= 0:
            level -= count
        self._levels[client] = (level, moment)
        if len(self._levels) > _MAX_CLIENTS:
            self._levels.popitem(last=False)
        return max(0.0, lacking / self.rate)


class Access:
    """What a server lets in.

    Parameters
    ----------
    settings : Settings

    Raises
    ------
    UsageError
        If the file of tokens or the policy is not usable.
    """

    def __init__(self, settings: Settings) -> None:
        self._tokens = Tokens(settings.tokens) if settings.tokens else None
        share = settings.rate / settings.workers
        self._rates = Rates(share, settings.burst / settings.workers) if share > 0 else None
        self._policy = _load_policy(settings.policy) if settings.policy else None

    def client(self, headers: Mapping[str, str], peer: str) -> str:
        """Return the name of who asks.

        Parameters
        ----------
        headers : mapping
            With names in lower case.
        peer : str
            What the client is called where nobody has tokens.

        Raises
        ------
        Refusal
            If the token is missing or not valid.
        """
        if self._tokens is None:
            return peer
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Refusal(401, "a bearer token is needed")
        name = self._tokens.name(token.strip())
        if name is None:
            raise Refusal(401, "the token is not valid")
        return name

    def charge(self, client: str, count: int) -> None:
        """Count prompts.

        Raises
        ------
        Refusal
            If the client has asked too much.
        """
        if self._rates is not None and (wait := self._rates.take(client, count)) > 0:
            raise Refusal(429, "too many prompts", wait)

    def check(self, prompt: str, client: str) -> None:
        """Ask the operator's policy about a prompt.

        Raises
        ------
        Refusal
            If it refuses, or fails: a broken policy lets nothing through.
        """
        if self._policy is None:
            return
        try:
            reason = self._policy(prompt, client)
        except Exception as error:
            # The error's text may quote the prompt.
            _log.error("policy", extra={"event": "policy-failed", "error": type(error).__name__})
            raise Refusal(500, "the prompt policy failed") from None
        if reason is not None:
            raise Refusal(403, f"the prompt is refused: {reason}")


def _load_policy(name: str) -> Policy:
    try:
        found = pkgutil.resolve_name(name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UsageError(
            f"there is no prompt policy '{name}': {error}",
            field="--policy",
            remedy="name an importable MODULE:FUNCTION",
        ) from None
    if not callable(found):
        raise UsageError(f"'{name}' cannot be called", field="--policy", remedy="name a function")
    policy: Policy = found
    return policy
