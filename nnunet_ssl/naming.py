"""Trainer names: how nnU-Net finds a trainer, and settings written into its name."""

import ast
import importlib
import types
import typing
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from nnunet_ssl.errors import UserError

TRAINERS = "nnunet_ssl.trainers"


def discovery_folder() -> Path:
    """Return the folder that `nnUNet_extTrainer` must name."""
    return Path(__file__).parent / "discovery"


def trainer_classes(module: str = TRAINERS) -> dict[str, type]:
    """Return the trainers that a module exports, by name."""
    exported = importlib.import_module(module)
    if not hasattr(exported, "__all__"):
        raise UserError(f"Module {module} has no __all__. List the names of its trainers there.")
    return {name: getattr(exported, name) for name in exported.__all__}


def variants(module: str) -> Callable[[str], type]:
    """Make a module-level `__getattr__` that builds `Trainer+key=value` from a module's trainers.

    Write `__getattr__ = variants("my_package.my_trainers")` into the file that nnU-Net finds, and
    settings in the name work for your own trainers too.
    """

    def __getattr__(name: str) -> type:
        if "+" in name and name.split("+")[0] in trainer_classes(module):
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
    classes = trainer_classes(module)
    if base_name not in classes:
        raise UserError(f"No trainer {base_name!r}. There are: {', '.join(sorted(classes))}.")
    base: Any = classes[base_name]
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
