"""``handheld release``."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from handheld import devices as devices_
from handheld import records as records_
from handheld.bundle import Bundle
from handheld.commands.output import megabytes, print_json
from handheld.errors import UsageError
from handheld.release import builder as build_
from handheld.release import catalogue, trust
from handheld.release import selection as select_
from handheld.release.folder import Release
from handheld.release.manifest import Platform, ReleaseManifest
from handheld.release.signing import Identity

if TYPE_CHECKING:
    from handheld.release.update import Result, State

release = typer.Typer(
    help="Build, verify, select from, publish and install releases.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

KeyOption = Annotated[Path | None, typer.Option("--key", help="PEM file of an elliptic curve key.")]
CertificateOption = Annotated[
    list[Path] | None,
    typer.Option("--certificate", help="PEM file of a certificate; repeatable."),
]
IdentityOption = Annotated[
    str | None, typer.Option("--identity", help="Who signed without a key, by Sigstore.")
]
IssuerOption = Annotated[
    str | None, typer.Option("--issuer", help="OpenID Connect issuer of --identity.")
]
UnsignedOption = Annotated[
    bool, typer.Option("--unsigned", help="Check hashes only, not whose release it is.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
ReleaseArgument = Annotated[Path, typer.Argument(metavar="RELEASE", help="A folder or zip file.")]


@release.callback()
def _group() -> None:
    """Build, verify, select from, publish and install releases."""


@release.command()
def build(
    bundles: Annotated[list[Path], typer.Argument(metavar="BUNDLE...", help="Preferred first.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The release; a name ending in .zip is zipped.")
    ],
    version: Annotated[
        int, typer.Option(min=1, help="Grows with every release; readers never go back.")
    ],
    name: Annotated[str | None, typer.Option(help="By default the first model's.")] = None,
    label: Annotated[str | None, typer.Option(help="The version that people see.")] = None,
    expires: Annotated[
        str | None, typer.Option(help="A date; from then on readers refuse it.")
    ] = None,
    records: Annotated[
        list[Path] | None, typer.Option(help="File of run records; repeatable.")
    ] = None,
    document: Annotated[
        list[Path] | None, typer.Option(help="Card or licence to carry along; repeatable.")
    ] = None,
    force: Annotated[
        list[str] | None,
        typer.Option(help="Id of a variant to take though it fails; the release says so."),
    ] = None,
    gate: Annotated[Path | None, typer.Option(help="TOML file of gates on numerics.")] = None,
    rules: Annotated[Path | None, typer.Option(help="TOML file over rules.toml.")] = None,
    key: KeyOption = None,
    certificate: CertificateOption = None,
    keyless: Annotated[
        bool, typer.Option("--keyless", help="Sign with the identity of the environment's token.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be taken.")] = False,
    json_output: JsonOption = False,
) -> None:
    """Make a signed release of verified bundles and their run records.

    A bundle is refused if it was not verified, fails a gate, or has no good run record. The same
    input gives the same bytes, signature with a key included. The password of an encrypted key
    is taken from HANDHELD_KEY_PASSWORD. Without a key, certificate or --keyless it is unsigned.

    \b
    handheld release build build/a build/b --records runs.jsonl --version 3 --key k.pem -o build/r
    handheld release build build/a --version 1 --force critter-litert-cpu-int4 -o build/r.zip
    handheld release build build/a --version 1 --dry-run --json -o build/r
    """  # noqa: D301
    opened = [Bundle.open(path, verify_hashes=False) for path in bundles]
    runs = [r for path in records or () for r in records_.read(path)]
    hashes = {b.sha256 for b in opened}
    options = build_.Options(
        name=name or opened[0].manifest.model.id,
        version=version,
        label=label,
        expires=_date(expires),
        force=frozenset(force or ()),
        gates=gate,
        rules=rules,
        documents=tuple(document or ()),
    )
    # A file of records usually holds more than one release's.
    own = [r for r in runs if r.bundle.sha256 in hashes]
    if dry_run:
        _print_plan(build_.examine(opened, own, options), json_output)
        return
    identity = None
    if keyless:
        identity = Identity(keyless=("", ""))
    elif key or certificate:
        identity = Identity(key=key, certificates=tuple(certificate or ()))
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    done = 0
    with bar:
        task = bar.add_task("building", total=None)

        def see(file: str, size: int) -> None:
            nonlocal done
            done += size
            bar.update(task, description=f"{done / 1e6:.0f} MB  {file}")

        manifest = build_.build(
            opened,
            own,
            output,
            options,
            identity,
            zipped=output.suffix == ".zip",
            progress=see,
        )
    _print_release(output, manifest, json_output, signed=identity is not None)


@release.command()
def verify(
    path: ReleaseArgument,
    key: KeyOption = None,
    certificate: CertificateOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    unsigned: UnsignedOption = False,
    least_version: Annotated[
        int, typer.Option(min=1, help="Refuse older ones: the newest version seen so far.")
    ] = 1,
    json_output: JsonOption = False,
) -> None:
    """Check a release: its signature, every hash, its age.

    Say whose it must be: --key with the public key, --certificate with trusted roots, or
    --identity with --issuer. Exit code 1 if it cannot be trusted, 2 if it is no whole release.

    \b
    handheld release verify build/release --key release.pub
    handheld release verify build/release.zip --certificate root.pem --least-version 3
    handheld release verify build/release --unsigned --json
    """  # noqa: D301
    who = _trusted(key, certificate, identity, issuer, unsigned)
    found = trust.verify(path, who, least_version=least_version)
    _print_release(path, found.manifest, json_output, signed=who is not None)


@release.command()
def select(
    path: ReleaseArgument,
    phone: Annotated[
        str | None, typer.Option(help="A phone of the catalogue, such as 'Pixel 8'; or all.")
    ] = None,
    device: Annotated[
        str | None, typer.Option("--device", "-d", help="A device that is attached.")
    ] = None,
    platform: Annotated[str | None, typer.Option(help="android, ios or host.")] = None,
    soc: Annotated[str | None, typer.Option(help="Such as SM8650.")] = None,
    ram: Annotated[str | None, typer.Option(help="Such as 8GB or 7600MB.")] = None,
    budget: Annotated[str | None, typer.Option(help="What the app may use, if known.")] = None,
    os_version: Annotated[int | None, typer.Option("--os", help="Major version.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Say which variant a phone gets, and why.

    The release's hashes are not checked. "Nothing fits" is an answer, with exit code 0.

    \b
    handheld release select build/release --phone "Google Pixel 8"
    handheld release select build/release --phone all --json
    handheld release select build/release --platform android --soc SM8650 --ram 12GB --os 14
    handheld release select build/release --device host
    """  # noqa: D301
    from handheld.release.folder import located, read_limited
    from handheld.release.manifest import MANIFEST, MAX_MANIFEST_BYTES, parse

    file = located(path) / MANIFEST
    if not file.is_file():
        raise UsageError("is not a release", path=path, remedy="name one that was built")
    manifest = parse(read_limited(file, MAX_MANIFEST_BYTES), file)
    if phone is not None:
        phones = catalogue.find(phone)
    elif device is not None:
        phones = [select_.Phone.of(d.facts()) for d in devices_.find(device)]
    else:
        phones = [
            select_.Phone(
                platform=_platform(platform),
                soc=soc,
                ram_bytes=_bytes(ram, "--ram"),
                budget_bytes=_bytes(budget, "--budget"),
                os=os_version,
            )
        ]
    answers = [(p, select_.select(manifest, p)) for p in phones]
    if json_output:
        print_json(
            {
                "release": manifest.name,
                "version": manifest.version,
                "answers": [
                    {
                        "phone": p.model_dump(mode="json"),
                        **a.model_dump(mode="json"),
                        "reason": a.reason,
                    }
                    for p, a in answers
                ],
            }
        )
        return
    console = Console()
    for p, answer in answers:
        title = p.name or p.soc or p.platform
        chosen = f"{answer.variant}, {answer.residency}" if answer.variant else "nothing"
        console.print(f"{title}: {chosen}", markup=False, highlight=False, soft_wrap=True)
        for v in answer.verdicts:
            line = f"  {v.variant}, {v.residency}: {v.reason}"
            console.print(line, markup=False, highlight=False, soft_wrap=True)


@release.command()
def pack(
    path: ReleaseArgument,
    store: Annotated[str, typer.Option(help="play, apple or huggingface.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the store's tools.")],
    json_output: JsonOption = False,
) -> None:
    """Lay a release out for a store's own tools, within its limits.

    Play: AI packs, device targeting by RAM and SoC, Gradle files. Apple: managed asset packs for
    Background Assets. Hugging Face: a model repository. Nothing is uploaded.

    \b
    handheld release pack build/release --store play -o build/play
    handheld release pack build/release --store apple -o build/apple --json
    """  # noqa: D301
    from handheld.release import stores

    chosen = stores.find(store)
    layout = chosen.lay_out(Release.open(path), output)
    if json_output:
        print_json(
            {
                "store": layout.store,
                "path": str(output),
                "packs": [vars(p) for p in layout.packs],
                "notes": list(layout.notes),
            }
        )
        return
    for item in layout.packs:
        typer.echo(f"{item.name}: {item.bytes / 1e6:.1f} MB, {item.files} files")
    for note in layout.notes:
        typer.echo(note)


@release.command()
def publish(
    path: ReleaseArgument,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the web site.")],
    older: Annotated[
        list[Path] | None,
        typer.Option("--from", help="An older release, to which differences are written."),
    ] = None,
    key: KeyOption = None,
    certificate: CertificateOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    json_output: JsonOption = False,
) -> None:
    """Add a signed release to a folder of static files that phones update from.

    Contents are cut into pieces by content and stored by hash, so versions share what is equal.
    With --from, files that changed all over are also offered as differences. With a key,
    certificates or an identity the signature is verified as phones will do it.

    \b
    handheld release publish build/r2 -o site --key release.pub
    handheld release publish build/r2 --from build/r1 -o site --json
    """  # noqa: D301
    from handheld.release.publish import publish as run

    console = Console(stderr=True)
    with console.status("publishing"):
        who = None
        if key or certificate or identity or issuer:
            who = _trusted(key, certificate, identity, issuer, unsigned=False)
        done = run(path, output, older or (), who)
    if json_output:
        print_json({"site": str(output), **vars(done)})
    else:
        typer.echo(
            f"{output}: version {done.version}, {done.objects} new objects, "
            f"{done.new_bytes / 1e6:.1f} MB"
        )


@release.command()
def update(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The device's folder.")],
    url: Annotated[str, typer.Argument(metavar="URL", help="Of the site, or its folder.")],
    key: KeyOption = None,
    certificate: CertificateOption = None,
    identity: IdentityOption = None,
    issuer: IssuerOption = None,
    phone: Annotated[
        str | None, typer.Option(help="A phone of the catalogue; by default this machine.")
    ] = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Hash the installed files; fetch damaged ones again.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Install a version again that was reverted.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Bring a folder to the newest release of a site, as an app does it on a phone.

    Only what changed is fetched, and an interrupted run goes on where it was. The switch is one
    rename, and the version before stays until `handheld release confirm`. A version that was
    reverted is not installed again, a newer one is.

    \b
    handheld release update ./device https://example.org/models --key release.pub
    handheld release update ./device ./site --key release.pub --phone "OnePlus 12"
    handheld release update ./device ./site --key release.pub --repair
    """  # noqa: D301
    from handheld.release import update as update_

    who = _trusted(key, certificate, identity, issuer, unsigned=False)
    assert who is not None
    if phone is not None:
        chosen = catalogue.find(phone)[0]
    else:
        # The space that counts is where FOLDER lies, which the update looks at itself.
        here = select_.Phone.of(devices_.find("host")[0].facts())
        chosen = here.model_copy(update={"free_bytes": None})
    console = Console(stderr=True)
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with bar:
        task = bar.add_task("fetching", total=None)
        done = update_.update(
            folder,
            url,
            who,
            chosen,
            repair=repair,
            retry=retry,
            progress=lambda have, total: bar.update(task, completed=have, total=total),
        )
    _print_state(folder, done.state, json_output, done)


@release.command()
def confirm(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The device's folder.")],
    json_output: JsonOption = False,
) -> None:
    """Say that the version in use has run; the one before it is removed.

    \b
    handheld release confirm ./device
    """  # noqa: D301
    from handheld.release import update as update_

    _print_state(folder, update_.confirm(folder), json_output)


@release.command()
def revert(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The device's folder.")],
    json_output: JsonOption = False,
) -> None:
    """Go back to the version before, as long as the one in use is not confirmed.

    \b
    handheld release revert ./device
    """  # noqa: D301
    from handheld.release import update as update_

    _print_state(folder, update_.revert(folder), json_output)


def _print_state(
    folder: Path, state: State, json_output: bool, result: Result | None = None
) -> None:
    from handheld.release.update import bundle_path

    path = bundle_path(folder, state.current)
    facts: dict[str, Any] = {**state.model_dump(mode="json"), "bundle": str(path)}
    if result is not None:
        facts |= {
            "changed": result.changed,
            "fetched_bytes": result.fetched_bytes,
            "reused_bytes": result.reused_bytes,
        }
    if json_output:
        print_json(facts)
        return
    now = state.current
    typer.echo(f"{path}: version {now.version}, {now.variant}, {now.residency}")
    if result is not None:
        typer.echo(f"fetched {result.fetched_bytes / 1e6:.2f} MB")
    if state.previous is not None:
        typer.echo(f"version {state.previous.version} stays until this one is confirmed")


def _trusted(
    key: Path | None,
    certificate: list[Path] | None,
    identity: str | None,
    issuer: str | None,
    unsigned: bool,
) -> Identity | None:
    if unsigned:
        return None
    if (identity is None) != (issuer is None):
        raise UsageError("go together", field="--identity and --issuer")
    keyless = (identity, issuer) if identity is not None and issuer is not None else None
    if key is None and not certificate and keyless is None:
        raise UsageError(
            "whose release must it be?",
            remedy="give --key, --certificate, or --identity with --issuer; "
            "--unsigned checks hashes only",
        )
    if key is not None and certificate:
        raise UsageError(
            "the key would not be looked at",
            field="--key and --certificate",
            remedy="trust a public key, or the roots of certificates: give one",
        )
    return Identity(key=key, certificates=tuple(certificate or ()), keyless=keyless)


def _print_plan(found: list[build_.Candidate], json_output: bool) -> None:
    if json_output:
        print_json(
            {
                "variants": [
                    {"id": c.id, "records": [r.id for r in c.records], "faults": list(c.faults)}
                    for c in found
                ]
            }
        )
        return
    console = Console()
    for c in found:
        text = "; ".join(c.faults) or f"passes, with {len(c.records)} run records"
        console.print(f"{c.id}: {text}", markup=False, highlight=False, soft_wrap=True)


def _print_release(
    path: Path, manifest: ReleaseManifest, json_output: bool, *, signed: bool
) -> None:
    if json_output:
        print_json(
            {
                "path": str(path),
                "signature": "checked" if signed else "not checked",
                **manifest.model_dump(mode="json"),
            }
        )
        return
    console = Console()
    trusted = "signature holds" if signed else "hashes hold; whose it is was not checked"
    console.print(
        f"{manifest.name} {manifest.label or ''} version {manifest.version}: {trusted}",
        markup=False,
        highlight=False,
    )
    table = Table(box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in ("variant", "unit", "for", "SoC", "MB", "memory MB", "ms", "SNR dB", ""):
        right = column in ("MB", "memory MB", "ms", "SNR dB")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for v in manifest.variants:
        snr = v.verification.snr_db
        table.add_row(
            v.id,
            v.unit,
            ", ".join(v.needs.platforms),
            ", ".join(v.needs.soc) or "any",
            megabytes(v.needs.storage_bytes),
            " / ".join(megabytes(m.memory_bytes) for m in v.modes),
            " / ".join("-" if m.median_ms is None else f"{m.median_ms:.1f}" for m in v.modes),
            "-" if snr is None else f"{snr:.1f}",
            f"forced: {len(v.forced)} faults" if v.forced else "",
        )
    console.print(table)


def _date(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise UsageError(
            f"'{text}' is no date", field="--expires", remedy="write 2027-06-30"
        ) from None
    found = found if found.tzinfo else found.replace(tzinfo=UTC)
    if found <= datetime.now(UTC):
        raise UsageError(
            f"{text} is over: nobody could install the release",
            field="--expires",
            remedy="give a date to come",
        )
    return found


def _bytes(text: str | None, option: str) -> int | None:
    if text is None:
        return None
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(GB|MB|GiB|MiB)\s*", text)
    if match is None:
        raise UsageError(f"'{text}' is no size", field=option, remedy="write 8GB or 7600MB")
    unit: dict[str, int] = {"GB": 10**9, "MB": 10**6, "GiB": 2**30, "MiB": 2**20}
    return int(float(match.group(1)) * unit[match.group(2)])


def _platform(text: str | None) -> Platform:
    known: dict[str, Platform] = {"android": "android", "ios": "ios", "host": "host"}
    if text not in known:
        raise UsageError(
            "which phone?",
            field="--platform",
            remedy=f"give --phone, --device, or --platform with one of {', '.join(known)}",
        )
    return known[text]
