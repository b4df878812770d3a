"""Signatures over releases: OpenSSF Model Signing v1.0.

The signature is a file beside the others: a Sigstore bundle around an in-toto statement that
lists the sha256 of every file. The program ``model_signing`` of the same standard verifies it too.
Here a key's signature is a function of key and files (RFC 6979), so the same release has the same
bytes, signature included.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from handheld.errors import MissingDependencyError, TrustError, UsageError
from handheld.files import write_file
from handheld.release.folder import Digests, read_limited
from handheld.release.manifest import SIGNATURE

PASSWORD = "HANDHELD_KEY_PASSWORD"  # noqa: S105
"""Environment variable with the password of an encrypted key."""
MAX_SIGNATURE_BYTES = 8 * 2**20
"""Parsed before anything is known about it; it lists some 40,000 files."""
_SERIALIZATION = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [SIGNATURE],
}
_INSTALL = 'install with  pip install "handheld[release]"'


@dataclass(frozen=True)
class Identity:
    """Who signs, or who must have signed: one of three kinds.

    Parameters
    ----------
    key : Path, optional
        PEM file of an elliptic curve key: the private one to sign, the public one to verify.
    certificates : tuple of Path
        To sign: the signing certificate for ``key``, then its issuers. To verify: roots that
        are trusted.
    keyless : tuple of (str, str), optional
        Identity and OpenID Connect issuer, as in a certificate of Sigstore's public instance,
        for example ``("release@example.org", "https://accounts.google.com")``. To sign, only
        the fact that it is given counts: the identity comes from the environment's token.
    """

    key: Path | None = None
    certificates: tuple[Path, ...] = ()
    keyless: tuple[str, str] | None = None

    def __post_init__(self) -> None:
        """Refuse an identity that is nobody, or a file that is not there."""
        if self.key is None and not self.certificates and self.keyless is None:
            raise UsageError(
                "nobody is named who signs or is trusted",
                remedy="give --key, --certificate or --identity with --issuer",
            )
        if self.keyless is not None and (self.key or self.certificates):
            raise UsageError("keyless signatures have neither key nor certificate of their own")
        for path in (self.key, *self.certificates):
            if path is not None and not path.is_file():
                raise UsageError("no such key or certificate", path=path)


def sign(folder: Path, digests: Digests, name: str, identity: Identity) -> None:
    """Write the signature of a folder.

    Parameters
    ----------
    folder : Path
    digests : mapping
        Of every file but the signature; see :func:`handheld.release.folder.digest_tree`.
    name : str
        Of what is signed; informative.
    identity : Identity

    Raises
    ------
    UsageError
        If the key cannot be used.
    TrustError
        If Sigstore's services cannot be reached, or refuse.
    MissingDependencyError
        If ``model-signing`` is not installed.
    """
    signing = _import()
    payload = signing.payload(digests, name)
    if identity.keyless is not None:
        signature = _keyless(signing, payload)
    else:
        signature = _with_key(signing, payload, identity)
    write_file(folder / SIGNATURE, signature.bundle.to_json().encode())


def signed_digests(path: Path, identity: Identity) -> dict[str, str]:
    """Verify a signature file and return the sha256 of every file that it lists.

    Raises
    ------
    TrustError
        If it is missing, malformed, or not by this identity.
    MissingDependencyError
        If ``model-signing`` is not installed.
    """
    if identity.key is not None and identity.certificates:
        raise UsageError("a key and certificates are trusted: the key would not be looked at")
    if path.is_symlink() or not path.is_file():
        raise TrustError("is not signed", path=path, remedy="get the release from its maker")
    data = read_limited(path, MAX_SIGNATURE_BYTES)
    if len(data) > MAX_SIGNATURE_BYTES:
        raise TrustError("the signature is over the limit", path=path)
    signing = _import()
    kind = signing.keyless if identity.keyless is not None else signing.local
    try:
        signature = kind.Signature.read(path)
        manifest = _verifier(signing, identity).verify(signature)
        # Anything that another spelling of the same signature could hide is refused.
        canonical = signature.bundle.to_json().encode() == data and _is_plain(signature.bundle)
        expected = signing.from_args(_SERIALIZATION).serialization_parameters
        plain = manifest.serialization_type == expected
        found = {d.identifier: d.digest for d in manifest.resource_descriptors()}
    except Exception as error:
        # The library lets pass whatever its parsers raise, of a dozen classes.
        text = " ".join(str(error).split()) or type(error).__name__
        raise TrustError(f"the signature does not hold: {text[:300]}", path=path) from error
    if not canonical or not plain or any(d.algorithm != "sha256" for d in found.values()):
        raise TrustError("the signature is not in the form that handheld writes", path=path)
    return {name: digest.digest_hex for name, digest in found.items()}


def check(folder: Path, digests: Digests, identity: Identity) -> None:
    """Compare the files of a folder with its signature.

    Raises
    ------
    TrustError
        If the signature does not hold, or any file differs, is missing, or is not listed.
    """
    signed = signed_digests(folder / SIGNATURE, identity)
    for name in sorted(set(signed) | set(digests)):
        if name not in digests:
            raise TrustError("a signed file is missing", path=folder / name)
        if name not in signed:
            raise TrustError("the file is not signed", path=folder / name)
        if digests[name][0] != signed[name]:
            raise TrustError(
                f"was changed after it was signed: sha256 {digests[name][0]}, signed is "
                f"{signed[name]}",
                path=folder / name,
            )


@dataclass(frozen=True)
class _Library:
    """The parts of model-signing that are used here."""

    payload: Callable[[Digests, str], Any]
    from_args: Callable[[dict[str, Any]], Any]
    local: Any
    keyless: Any
    config: Any
    verify_config: Any


def _import() -> _Library:
    try:
        from model_signing import manifest as manifests
        from model_signing import signing, verifying
        from model_signing._hashing.hashing import Digest
        from model_signing._signing import sign_sigstore, sign_sigstore_pb
        from model_signing._signing.signing import Payload
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"needs {error.name}, which is missing", remedy=_INSTALL
        ) from None

    from_args = manifests.SerializationType.from_args

    def payload(digests: Digests, name: str) -> Any:
        items = [
            manifests.FileManifestItem(
                path=PurePosixPath(path), digest=Digest("sha256", bytes.fromhex(sha256))
            )
            for path, (sha256, _) in sorted(digests.items())
        ]
        return Payload(manifests.Manifest(name, items, from_args(_SERIALIZATION)))

    return _Library(
        payload, from_args, sign_sigstore_pb, sign_sigstore, signing.Config, verifying.Config
    )


def _with_key(signing: _Library, payload: Any, identity: Identity) -> Any:
    if identity.key is None:
        raise UsageError("a certificate needs its private key", remedy="give --key too")
    config = signing.config()
    try:
        with _decrypted(identity.key) as key:
            if identity.certificates:
                certificate, *issuers = identity.certificates
                config.use_certificate_signer(
                    private_key=key, signing_certificate=certificate, certificate_chain=issuers
                )
            else:
                config.use_elliptic_key_signer(private_key=key)
        return _same_again(config._signer, payload)
    except (ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"cannot sign with this key: {error}",
            path=identity.key,
            remedy="use a PEM file with an EC key of curve P-256, P-384 or P-521; its password "
            f"goes into {PASSWORD}",
        ) from None


def _same_again(signer: Any, payload: Any) -> Any:
    """Sign as the library does, but with sorted keys and a nonce made from what is signed."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from google.protobuf import json_format
    from model_signing._signing import sign_ec_key, sign_sigstore_pb
    from sigstore_models import intoto
    from sigstore_models.bundle import v1 as bundles

    raw = json_format.MessageToJson(payload.statement.pb, sort_keys=True).encode()
    key = signer._private_key
    scheme = ec.ECDSA(sign_ec_key.get_ec_key_hash(key.public_key()), deterministic_signing=True)
    envelope = intoto.Envelope(
        payload=base64.b64encode(raw),
        payload_type="application/vnd.in-toto+json",
        signatures=[
            intoto.Signature(
                sig=base64.b64encode(key.sign(sign_sigstore_pb.pae(raw), scheme)), keyid=""
            )
        ],
    )
    return sign_sigstore_pb.Signature(
        bundles.Bundle(
            media_type="application/vnd.dev.sigstore.bundle.v0.3+json",
            verification_material=signer._get_verification_material(),
            dsse_envelope=envelope,
        )
    )


class _decrypted:  # noqa: N801
    """Give a key file that needs no password."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pipe: int | None = None

    def __enter__(self) -> Path:
        password = os.environ.get(PASSWORD)
        if password is None:
            return self.path
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(self.path.read_bytes(), password.encode())
        plain = key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        # In memory only: the plain key never touches a disk.
        self.pipe = os.memfd_create("key")
        os.write(self.pipe, plain)
        return Path(f"/proc/self/fd/{self.pipe}")

    def __exit__(self, *_: object) -> None:
        if self.pipe is not None:
            os.close(self.pipe)


def _keyless(signing: _Library, payload: Any) -> Any:
    try:
        signer = signing.keyless.Signer(use_ambient_credentials=True)
        return signer.sign(payload)
    except Exception as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise TrustError(
            f"keyless signing failed: {text[:300]}",
            remedy="it needs Sigstore's services and an OpenID Connect token; else sign with --key",
        ) from error


def _verifier(signing: _Library, identity: Identity) -> Any:
    config = signing.verify_config()
    if identity.keyless is not None:
        who, issuer = identity.keyless
        config.use_sigstore_verifier(identity=who, oidc_issuer=issuer)
    elif identity.certificates:
        config.use_certificate_verifier(certificate_chain=identity.certificates)
    else:
        config.use_elliptic_key_verifier(public_key=identity.key)
    return config._verifier


def _is_plain(bundle: Any) -> bool:
    """Tell whether there is one signature, and no field that the verifier does not look at."""
    envelope = getattr(bundle, "dsse_envelope", None)
    if envelope is None:
        # Sigstore's own verifier looks at everything in its bundles.
        return True
    return len(envelope.signatures) == 1 and not envelope.signatures[0].keyid
