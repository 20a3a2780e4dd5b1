"""Packages that not every installation has, and how to get them. Never imports them."""

from importlib.metadata import version
from importlib.util import find_spec

_TORCHAO = (0, 18)  # the first that transformers opens all of what is written here with


def torchao_problem() -> str | None:
    """Why torchao can't be used, and what to do, in one line; None when it can."""
    if find_spec("torchao") is None:
        return "torchao is not installed; pip install 'dscompress[torchao]'"
    found = version("torchao")
    if tuple(int(part) for part in found.split(".")[:2]) < _TORCHAO:
        wanted = ".".join(map(str, _TORCHAO))
        return f"torchao {found} is too old; pip install 'torchao>={wanted}'"
    return None


def missing_extra(package: str, extra: str) -> str | None:
    """Why a package of an extra can't be used, and what to do, in one line; None when it is there."""
    if find_spec(package) is not None:
        return None
    return f"{package} is not installed; pip install 'dscompress[{extra}]'"
