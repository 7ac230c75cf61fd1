"""Conversions of original downloads, one script per data set; `core` tells how one is written."""

import ast
import importlib
from collections.abc import Sequence
from pathlib import Path

from nnunet_ssl.errors import UserError

SHARED = {"__init__", "core", "reading", "selection", "target", "writing"}


def scripts() -> dict[str, str]:
    """Return name -> first line of the docstring, of every data set."""
    files = sorted(Path(__file__).parent.glob("*.py"), key=lambda p: p.stem.lower())
    docs = {f.stem: ast.get_docstring(ast.parse(f.read_text())) for f in files}
    return {
        n: (d or "").partition("\n")[0].removeprefix(f"{n}: ")
        for n, d in docs.items()
        if n not in SHARED
    }


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
