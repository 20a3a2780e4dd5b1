"""Numbers of things and of bytes as people read and write them. Sizes are decimal: 1 MB = 10^6 bytes, as disks say."""

import re


def parse_size(text: str) -> int | None:
    """Bytes of a size such as 8GB, 7.5GiB or 500MB; None for what is no size above zero."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i)?B?", text.strip(), re.IGNORECASE)
    if match is None:
        return None
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " ")) or None


def size(count: float) -> str:
    """Bytes, three digits: 92.3 MB."""
    return _scaled(count, ["B", "kB", "MB", "GB", "TB"])


def count(number: float) -> str:
    """A number of things, three digits: 134M, 8.03B."""
    return _scaled(number, ["", "K", "M", "B", "T"])


def _scaled(value: float, units: list[str]) -> str:
    unit = 0
    while value >= 999.5 and unit < len(units) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    gap = " " if units[0] else ""
    return f"{value:.{digits}f}{gap}{units[unit]}".rstrip()
