"""The version, and the nnU-Net versions it was tried on."""

__version__ = "0.1.0"
NNUNET_MIN = (2, 8, 1)
NNUNET_BELOW = (2, 9)


def nnunet_range() -> str:
    """The supported versions as pip writes them: `nnunetv2>=2.8.1,<2.9`."""
    low, high = (".".join(map(str, v)) for v in (NNUNET_MIN, NNUNET_BELOW))
    return f"nnunetv2>={low},<{high}"


def check_nnunet_version() -> str:
    """Return the installed nnunetv2 version if the trainers were tried on it.

    Raises:
        UserError: nnunetv2 is missing or outside the supported range.
    """
    import re
    from importlib.metadata import PackageNotFoundError, version

    from nnunet_ssl.errors import UserError

    try:
        found = version("nnunetv2")
    except PackageNotFoundError:
        found = "missing"
    numbers = tuple(int(n) for n in re.findall(r"\d+", found)[:3])
    if not NNUNET_MIN <= numbers < NNUNET_BELOW:
        raise UserError(
            f"nnunetv2 is {found}; nnunet_ssl {__version__} uses internals of "
            f"{nnunet_range()}. Run: pip install '{nnunet_range()}'"
        )
    return found
