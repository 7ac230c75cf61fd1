"""Trainer names: how nnU-Net finds a trainer, and settings written into its name."""

import ast
import importlib
import os
import types
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError

TRAINERS = "nnunet_ssl.trainers"
VARIABLE = "nnUNet_extTrainer"  # names the folders in which nnU-Net looks for trainers


def discovery_folder() -> Path:
    """Return the folder that `nnUNet_extTrainer` must name."""
    return Path(__file__).parent / "discovery"


def trainer_classes(module: str = TRAINERS) -> dict[str, type]:
    """Return the trainers that a module exports, by name."""
    exported = importlib.import_module(module)
    if not hasattr(exported, "__all__"):
        raise UserError(f"Module {module} has no __all__. List the names of its trainers there.")
    return {name: getattr(exported, name) for name in exported.__all__}


def find_trainer(name: str, module: str = TRAINERS) -> type | None:
    """Return the trainer of this name, without settings, or None.

    Beside the trainers of this package these are subclasses of `SemiSupervisedTrainer` in the other
    folders that `nnUNet_extTrainer` names, found as nnU-Net finds them.
    """
    classes = trainer_classes(module)
    if name in classes or module != TRAINERS or not name.isidentifier():
        return classes.get(name)
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    from nnunet_ssl.base import SemiSupervisedTrainer

    wanted = f"class {name}("
    for folder in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        files = Path(folder).rglob("*.py")  # the finder imports all of them, so look first
        if any(wanted in file.read_text(encoding="utf-8", errors="ignore") for file in files):
            found = recursive_find_python_class(
                folder, name, None, base_folder=folder, cleanup_imports_from_base_folder=True
            )
            if isinstance(found, type) and issubclass(found, SemiSupervisedTrainer):
                return found
    return None


def variants(module: str) -> Callable[[str], type]:
    """Make a module-level `__getattr__` that builds `Trainer+key=value` from a module's trainers.

    For files that nnU-Net finds. That of this package serves files in the other folders of
    `nnUNet_extTrainer`, too; trainers of an installed package need
    `__getattr__ = variants("my_package.my_trainers")` in a file there.
    """

    def __getattr__(name: str) -> type:
        if "+" in name and find_trainer(name.split("+")[0], module):
            return resolve(name, module)
        raise AttributeError(name)

    return __getattr__


def resolve(name: str, module: str = TRAINERS) -> type:
    """Return the trainer class of a name such as `SSLTrainer+num_epochs=100+seed=3`.

    The same name gives the same class. The class is called what was asked for, so nnU-Net's
    results folder, `--c`, every process and prediction agree on it.

    Raises:
        UserError: unknown trainer or setting, or a value that does not fit; lists the valid ones.
    """
    return _resolve(name, module)


@cache  # by both arguments, so that a default module gives the same class as a named one
def _resolve(name: str, module: str) -> type:
    base_name, *pairs = name.split("+")
    base: Any = find_trainer(base_name, module)
    if base is None:
        known = ", ".join(sorted(trainer_classes(module)))
        where = f" A file of your own belongs into a folder of {VARIABLE}."
        raise UserError(
            f"No trainer {base_name!r}. There are: {known}.{where if module == TRAINERS else ''}"
        )
    if not pairs:
        return base
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key in values:
            raise UserError(
                f"Trainer name {name!r}: {pair!r} must read key=value, each key once, for example "
                f"{base_name}+num_epochs=100."
            )
        values[key] = parse_setting(base, key, text)
    made: Any = type(
        name, (base,), {**values, "__module__": base.__module__, "__doc__": base.__doc__}
    )
    made.check_settings()
    return made


def parse_setting(trainer: Any, key: str, text: str) -> Any:
    """Turn the text of a setting into a value of the setting's type.

    Raises:
        UserError: unknown key or a value of another type.
    """
    known = trainer.settings()
    if key not in known:
        raise UserError(
            f"{trainer.__name__} has no setting {key!r}. Its settings, with defaults: "
            + ", ".join(f"{k}={v}" for k, v in sorted(known.items()))
        )
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        value = {"true": True, "false": False, "none": None}.get(text.lower(), text)
    hint = typing.get_type_hints(trainer).get(key, type(known[key]))
    fitting = _fit(value, hint)
    if fitting is _MISFIT:
        raise UserError(
            f"{trainer.__name__}: setting {key}={text} does not fit. It takes {_words(hint)}; "
            f"the default is {known[key]}."
        )
    return fitting


def _words(hint: Any) -> str:
    """Return what a setting of this type takes, as it is written in a trainer name."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_words(option) for option in options)
    if origin is typing.Literal:
        return " or ".join(str(option) for option in options)
    if origin is tuple:
        return f"{_words(options[0])}, or several separated by commas"
    words = {
        bool: "true or false",
        types.NoneType: "None",
        int: "a whole number",
        float: "a number",
        str: "a word",
    }
    return words.get(hint) or hint.__name__


_MISFIT = object()


def _fit(value: Any, hint: Any) -> Any:
    """Return the value as the type of the hint, or `_MISFIT`."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        fits = [_fit(value, option) for option in typing.get_args(hint)]
        return next((f for f in fits if f is not _MISFIT), _MISFIT)
    if origin is typing.Literal:
        return value if value in typing.get_args(hint) else _MISFIT
    if origin is tuple:
        if isinstance(value, str):
            value = tuple(value.split(","))
        items = value if isinstance(value, tuple) else (value,)
        fits = [_fit(v, typing.get_args(hint)[0]) for v in items]
        return _MISFIT if any(f is _MISFIT for f in fits) else tuple(fits)
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if hint is int:
        return value if isinstance(value, int) and not isinstance(value, bool) else _MISFIT
    if hint is type(None):
        return value if value is None else _MISFIT
    return value if isinstance(hint, type) and isinstance(value, hint) else _MISFIT
