"""Settings of the documentation; its option tables are made from the command line itself."""

import inspect
import re
import sys
from pathlib import Path

import typer

from patchsvdd_fast import __version__
from patchsvdd_fast.cli.app import app

sys.path.insert(0, str(Path(__file__).parent))  # for public_names

project = "patchsvdd_fast"
release = __version__
html_title = f"patchsvdd_fast {release}"
html_theme = "furo"
html_show_copyright = False
smartquotes = False  # would make dashes of the options in "--resume"
extensions = ["myst_parser", "sphinx.ext.autodoc", "public_names"]
myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3
default_role = "literal"  # docstrings have code in single backticks
autodoc_typehints = "none"  # docstrings say more: shapes, dtypes, units
autodoc_member_order = "bysource"


def options_table(command):
    """The arguments and options of a command as a table in Markdown."""
    rows = ["| | default | |", "|---|---|---|"]
    for parameter in command.params:
        names = [*parameter.opts, *parameter.secondary_opts]
        if parameter.param_type_name == "argument":
            names = [f"{parameter.name.upper()}{'...' if parameter.nargs < 0 else ''}"]
        default = "" if parameter.default is None else f"`{parameter.default}`"
        if isinstance(parameter.show_default, str):
            default = parameter.show_default
        elif isinstance(parameter.default, bool):
            default = "on" if parameter.default else "off"
        text = parameter.help.replace("<", "&lt;").replace("|", r"\|")
        shown = " ".join(f"`{name}`" for name in names)
        metavar = parameter.metavar or ""
        if metavar.startswith("["):  # what it may be
            choices = metavar.strip("[]").split("|")
            shown += f" {', '.join(f'`{choice}`' for choice in choices)}"
        rows.append(f"| {shown} | {default} | {text} |")
    return "\n".join(rows)


commands = typer.main.get_command(app)
myst_substitutions = {
    f"options_{name}": options_table(command)
    for name, command in {"all": commands, **commands.commands}.items()
}


def list_arguments(app, what, name, obj, options, lines):
    """Make a list of what a docstring says of arguments: "name: what it is", "name, name: ...".

    Lines that begin with "- " are a list below the argument before them, such as of its values.
    """
    try:
        names = "|".join(map(re.escape, inspect.signature(obj).parameters))
    except (TypeError, ValueError):  # nothing that is called
        return
    if not names:
        return
    begins = rf"(?:^|(?<=[.,:;] ))((?:{names})(?:, (?:{names}))*): "
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", "\n".join(lines)):
        marked = re.sub(r"^ *- ", "\0", paragraph, flags=re.MULTILINE)
        before, *pairs = re.split(begins, " ".join(marked.split()))
        if not pairs and not (paragraphs and "\0" in before and paragraphs[-1].startswith("- ")):
            paragraphs.append(paragraph)
            continue
        before, *values = before.split("\0")
        items = [f"  - {value.strip()}" for value in values]
        for argument, said in zip(pairs[::2], pairs[1::2], strict=True):
            text, *values = said.split("\0")
            items.append(f"- `{argument}`: {text.strip(' ,;')}")
            items += [f"  - {value.strip()}" for value in values]
        # What a function returns and raises is said of no argument.
        items[-1:] = re.split(r"(?<=[.)]) (?=(?:Returns|Raises|Results) )", items[-1], maxsplit=1)
        paragraphs += [before.strip(" ,;"), *items]
    lines[:] = "\n\n".join(filter(None, paragraphs)).split("\n")


def setup(app):
    """Called by Sphinx."""
    app.connect("autodoc-process-docstring", list_arguments)
