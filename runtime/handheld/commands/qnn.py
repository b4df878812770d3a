"""``handheld qnn``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from handheld import qnn as qnn_
from handheld.commands.output import print_json

qnn = typer.Typer(
    help="Lay out Qualcomm's QNN libraries.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)


@qnn.callback()
def _group() -> None:
    """Lay out Qualcomm's QNN libraries."""


@qnn.command()
def install(
    user: Annotated[
        str, typer.Option("--for", help=f"Converter: {', '.join(qnn_.RELEASES)}.")
    ] = "executorch",
    wheel: Annotated[
        Path | None, typer.Option(help="The wheel, instead of downloading it with pip.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Lay out the QNN libraries that a converter takes, from a wheel of onnxruntime-qnn.

    Each converter takes one version only. The wheel is checked by its sha256, and the libraries
    are loaded and asked for their version. They are Qualcomm's, under the licence beside them.
    x86-64 Linux only.

    \b
    handheld qnn install
    handheld qnn install --for litert
    handheld qnn install --wheel onnxruntime_qnn-2.5.0-cp311-cp311-manylinux_2_35_x86_64.whl
    """  # noqa: D301
    console = Console(stderr=True)
    with console.status(f"laying out QNN for {user}"):
        sdk = qnn_.install(user, wheel)
    if json_output:
        print_json(
            {
                "root": str(sdk.root),
                "package": f"onnxruntime-qnn {sdk.release.version}",
                "qnn": sdk.build,
                "sha256": sdk.release.sha256,
            }
        )
    else:
        console.print(f"{sdk.root}: QNN {sdk.build}", markup=False, highlight=False, soft_wrap=True)
