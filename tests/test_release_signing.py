from __future__ import annotations

import random
import subprocess
import sys
from datetime import UTC, datetime, timedelta

import pytest

import releases
from handheld.errors import HandheldError, ReleaseError, TrustError, UsageError
from handheld.release import signing
from handheld.release.builder import Options, build
from handheld.release.signing import Identity
from handheld.release.trust import verify


@pytest.fixture(scope="module")
def signed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signed")
    private, public = releases.keys(folder)
    return releases.release(folder, private).path, Identity(key=public)


def test_signature_holds(signed):
    path, identity = signed
    assert verify(path, identity).manifest.version == 1


def test_the_standards_own_program_agrees(signed):
    path, identity = signed
    program = [sys.executable, "-m", "model_signing", "verify", "key", str(path)]
    command = [*program, "--signature", path / "model.sig", "--public_key", identity.key]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_another_key_does_not_do(signed, tmp_path):
    _, other = releases.keys(tmp_path)
    with pytest.raises(TrustError, match="does not hold") as caught:
        verify(signed[0], Identity(key=other))
    assert caught.value.exit_code == 1


def test_unsigned_is_not_trusted(tmp_path):
    _, public = releases.keys(tmp_path)
    path = releases.release(tmp_path).path
    with pytest.raises(TrustError, match="is not signed"):
        verify(path, Identity(key=public))
    assert verify(path, None).manifest.name == "sample"


def test_nobody_is_nobody(tmp_path):
    with pytest.raises(UsageError, match="nobody"):
        Identity()
    with pytest.raises(UsageError, match="no such key"):
        Identity(key=tmp_path / "none")


def test_keys_that_cannot_sign(tmp_path, signed):
    bad = tmp_path / "bad.pem"
    bad.write_text("-----BEGIN NOTHING-----")
    with pytest.raises(UsageError, match="EC key"):
        signing.sign(tmp_path, {}, "x", Identity(key=bad))


def test_encrypted_keys_take_their_password_from_the_environment(tmp_path, monkeypatch):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    secret, public = tmp_path / "secret.pem", tmp_path / "pub.pem"
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"open sesame"),
        )
    )
    public.write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    with pytest.raises(UsageError, match="HANDHELD_KEY_PASSWORD"):
        signing.sign(tmp_path, {"a": ("0" * 64, 1)}, "x", Identity(key=secret))
    monkeypatch.setenv("HANDHELD_KEY_PASSWORD", "open sesame")
    signing.sign(tmp_path, {"a": ("0" * 64, 1)}, "x", Identity(key=secret))
    found = signing.signed_digests(tmp_path / "model.sig", Identity(key=public))
    assert found == {"a": "0" * 64}
    monkeypatch.setenv("HANDHELD_KEY_PASSWORD", "wrong")
    with pytest.raises(UsageError, match="cannot sign"):
        signing.sign(tmp_path, {}, "x", Identity(key=secret))


def certificate(folder):
    """Write a root, a leaf for signing, and the leaf's key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    def name(text):
        return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])

    def build_one(subject, issuer, key, signer, is_root):
        now = datetime.now(UTC)
        usage = x509.KeyUsage(
            digital_signature=not is_root, content_commitment=False, key_encipherment=False,
            data_encipherment=False, key_agreement=False, key_cert_sign=is_root,
            crl_sign=is_root, encipher_only=False, decipher_only=False,
        )  # fmt: skip
        builder = (
            x509.CertificateBuilder()
            .subject_name(name(subject))
            .issuer_name(name(issuer))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))
            .not_valid_after(now + timedelta(days=30))
            .add_extension(x509.BasicConstraints(ca=is_root, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
        )
        if not is_root:
            builder = builder.add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), critical=False
            )
        return builder.sign(signer, hashes.SHA256())

    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    pem = serialization.Encoding.PEM
    files = [folder / n for n in ("root.pem", "leaf.pem", "leaf.key")]
    files[0].write_bytes(build_one("root", "root", root_key, root_key, True).public_bytes(pem))
    files[1].write_bytes(build_one("leaf", "root", key, root_key, False).public_bytes(pem))
    files[2].write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return files


def test_certificates(tmp_path):
    root, leaf, key = certificate(tmp_path)
    (tmp_path / "other").mkdir()
    stranger, _, _ = certificate(tmp_path / "other")
    made = releases.bundle(tmp_path / "b")
    identity = Identity(key=key, certificates=(leaf, root))
    build([made], [releases.record(made)], tmp_path / "r", Options("s", 1), identity)
    assert verify(tmp_path / "r", Identity(certificates=(root,))).manifest.name == "s"
    with pytest.raises(TrustError):
        verify(tmp_path / "r", Identity(certificates=(stranger,)))


def test_a_release_never_goes_back(signed):
    path, identity = signed
    assert verify(path, identity, least_version=1)
    with pytest.raises(TrustError, match="never goes back"):
        verify(path, identity, least_version=2)


def test_expired(tmp_path):
    private, public = releases.keys(tmp_path)
    made = releases.bundle(tmp_path / "b")
    expires = datetime(2027, 1, 1, tzinfo=UTC)
    options = Options("s", 1, expires=expires)
    build([made], [releases.record(made)], tmp_path / "r", options, Identity(key=private))
    identity = Identity(key=public)
    assert verify(tmp_path / "r", identity, now=expires - timedelta(seconds=1))
    with pytest.raises(TrustError, match="expired"):
        verify(tmp_path / "r", identity, now=expires)


def change(path, rng):
    """Change a release in one random way; return how to undo it."""
    files = sorted(p for p in path.rglob("*") if p.is_file())
    file = rng.choice(files)
    kind = rng.choice(["byte", "byte", "byte", "insert", "cut", "delete", "add", "rename", "swap"])
    data = file.read_bytes()
    if kind in ("byte", "insert", "cut"):
        place = rng.randrange(len(data))
        new = bytearray(data)
        if kind == "byte":
            new[place] ^= rng.randrange(1, 256)
        elif kind == "insert":
            new.insert(place, rng.randrange(256))
        else:
            del new[place]
        file.write_bytes(new)
        return f"{kind} {file} {place}", lambda: file.write_bytes(data)
    if kind == "delete":
        file.unlink()
        return f"{kind} {file}", lambda: file.write_bytes(data)
    if kind == "add":
        added = file.parent / f"added-{rng.randrange(10**6)}"
        added.write_bytes(rng.choice([b"", data]))
        return f"{kind} {added}", added.unlink
    if kind == "rename":
        renamed = file.with_name(f"{file.name}{rng.choice('ab')}")
        file.rename(renamed)
        return f"{kind} {file}", lambda: renamed.rename(file)
    other = rng.choice([f for f in files if f.read_bytes() != data])
    theirs = other.read_bytes()
    file.write_bytes(theirs)
    other.write_bytes(data)

    def back():
        file.write_bytes(data)
        other.write_bytes(theirs)

    return f"{kind} {file} {other}", back


def every_change_is_noticed(signed, count):
    path, identity = signed
    rng = random.Random(1)
    for _ in range(count):
        what, undo = change(path, rng)
        try:
            with pytest.raises((TrustError, ReleaseError)):
                verify(path, identity)
                pytest.fail(f"not noticed: {what}")
        finally:
            undo()
    verify(path, identity)


def test_random_changes_are_noticed(signed):
    every_change_is_noticed(signed, 60)


@pytest.mark.slow
def test_two_thousand_random_changes_are_noticed(signed):
    every_change_is_noticed(signed, 2000)


def test_every_byte_of_the_signature_counts(signed, tmp_path):
    path, identity = signed
    data = (path / "model.sig").read_bytes()
    rng = random.Random(2)
    copy = tmp_path / "model.sig"
    for _ in range(300):
        new = bytearray(data)
        new[rng.randrange(len(new))] ^= rng.randrange(1, 256)
        copy.write_bytes(new)
        with pytest.raises(TrustError):
            signing.signed_digests(copy, identity)


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{" * 5000, "\x00", '{"mediaType": 1}'])
def test_hostile_signatures(signed, tmp_path, text):
    (tmp_path / "model.sig").write_text(text)
    with pytest.raises(TrustError):
        signing.signed_digests(tmp_path / "model.sig", signed[1])


def test_keyless_says_what_is_missing(signed, tmp_path, monkeypatch):
    from model_signing._signing import sign_sigstore

    def unreachable(**_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(sign_sigstore, "Signer", unreachable)
    with pytest.raises(HandheldError, match="no route to host"):
        signing.sign(tmp_path, {"a": ("0" * 64, 1)}, "x", Identity(keyless=("", "")))
