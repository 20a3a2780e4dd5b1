"""Numbers of things and of bytes as people read them. Sizes are decimal (1 MB = 10^6 bytes), as disks state them."""


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
