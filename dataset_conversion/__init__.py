"""Conversions of original downloads, one script per data set; `core` tells how one is written."""

import ast
import importlib
from collections.abc import Sequence
from pathlib import Path

from nnunet_ssl.errors import UserError


def scripts() -> dict[str, str]:
    """Return name -> first line of the docstring, of every data set (modules with `find`)."""
    found = {}
    for file in sorted(Path(__file__).parent.glob("*.py"), key=lambda p: p.stem.lower()):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        if any(isinstance(part, ast.FunctionDef) and part.name == "find" for part in tree.body):
            first = (ast.get_docstring(tree) or "").partition("\n")[0]
            found[file.stem] = first.removeprefix(f"{file.stem}: ")
    return found


def overview() -> str:
    """The help of `nnunet_ssl convert`."""
    lines = ["usage: nnunet_ssl convert NAME -i SRC -d ID [--labeled N] [--draw K] ...", ""]
    known = scripts()
    width = max(map(len, known))
    lines += [f"  {name.ljust(width)}  {text}" for name, text in known.items()]
    return "\n".join([*lines, "", "Options of one: nnunet_ssl convert NAME -h"])


def main(argv: Sequence[str]) -> int:
    """Run `nnunet_ssl convert`; `argv` begins with the name of the data set.

    Raises:
        UserError: unknown name, or what the conversion refuses.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(overview())
        return 0
    known = {name.lower(): name for name in scripts()}
    name = known.get(argv[0].lower())
    if name is None:
        raise UserError(
            f"There is no conversion {argv[0]!r}, but {', '.join(known.values())}. For own scans "
            f"take folder."
        )
    from nnunet_ssl.dataset_conversion.core import convert

    return convert(importlib.import_module(f"{__name__}.{name}"), argv[1:])
