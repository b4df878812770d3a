"""Write the generated pages again: docs/cli.md from the commands' help, docs/schema."""

from __future__ import annotations

from pathlib import Path

from handheld import cli, schema
from handheld.files import write_file

FOLDER = Path(__file__).resolve().parent
_HEADER = """# Command line

Written by `make docs` from the commands' own help.
"""


def commands() -> list[tuple[str, ...]]:
    """Return the words of every command of this distribution, groups before their members."""
    found: list[tuple[str, ...]] = []
    for name in cli.LISTED:
        found.append((name,))
        found.extend((name, member) for member in getattr(cli.load(name), "commands", {}))
    return found


def command_line() -> str:
    """Return the text of docs/cli.md."""
    pages = [_HEADER]
    for words in [(), *commands()]:
        command = cli.load(words[0]) if words else cli.command()
        for member in words[1:]:
            command = command.commands[member]
        name = " ".join(("handheld", *words))
        context = command.make_context(name, [], resilient_parsing=True, max_content_width=100)
        context.terminal_width = 100
        text = command.get_help(context)
        body = "\n".join(line.rstrip() for line in text.strip().splitlines())
        pages.append(f"## {name}\n\n```text\n{body}\n```\n")
    return "\n".join(pages)


def main() -> None:
    """Write all generated pages."""
    schema.write(FOLDER / "schema")
    write_file(FOLDER / "cli.md", command_line().encode())


if __name__ == "__main__":
    main()
