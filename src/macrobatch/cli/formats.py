"""Numbers as people read them: bytes, durations, rates, and values with their standard errors."""

import math
from collections.abc import Sequence

NONE = "-"


def bytes_text(num_bytes: float | None) -> str:
    """Three digits and a unit of a power of 1000.

    >>> bytes_text(23_456_789), bytes_text(950), bytes_text(None)
    ('23.5 MB', '950 B', '-')
    """
    if num_bytes is None:
        return NONE
    size, unit = bytes_unit(num_bytes)
    return f"{_three_digits(num_bytes / size) if size > 1 else f'{num_bytes:.0f}'} {unit}"


def bytes_unit(num_bytes: float) -> tuple[float, str]:
    """The unit that so many bytes are said in: its size and its name.

    >>> bytes_unit(23_456_789), bytes_unit(950)
    ((1000000.0, 'MB'), (1.0, 'B'))
    """
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    return next(((size, unit) for unit, size in units if num_bytes >= 0.9995 * size), (1.0, "B"))


def counted(number: int, thing: str) -> str:
    """A number of things, the thing in the plural but for one.

    >>> counted(1, "update"), counted(2000, "update")
    ('1 update', '2,000 updates')
    """
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def listed(things: Sequence[str]) -> str:
    """Things one after the other.

    >>> listed(["1"]), listed(["1", "2", "3"])
    ('1', '1, 2 and 3')
    """
    return " and ".join([", ".join(things[:-1]), things[-1]]) if len(things) > 1 else things[0]


def share_text(share: float) -> str:
    """A share in percent; a tiny one as a power of ten.

    >>> share_text(1.04), share_text(0.0213), share_text(3.4e-7)
    ('104%', '2.1%', '3e-07')
    """
    if not share >= 1e-3:
        return f"{share:.1g}"
    return f"{100 * share:.0f}%" if share >= 0.1 else f"{number_text(100 * share, 2)}%"


def duration_text(seconds: float) -> str:
    """Minutes and seconds, hours where there are any.

    >>> duration_text(65), duration_text(3661)
    ('1:05', '1:01:01')
    """
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def seconds_text(seconds: float | None) -> str:
    """A short time in microseconds, milliseconds or seconds.

    >>> seconds_text(0.0000123), seconds_text(0.01234), seconds_text(2.5)
    ('12.3 µs', '12.3 ms', '2.50 s')
    """
    if seconds is None:
        return NONE
    if 0 < seconds < 0.9995e-3:
        return f"{_three_digits(1e6 * seconds)} µs"
    return f"{_three_digits(1000 * seconds)} ms" if seconds < 0.9995 else f"{_three_digits(seconds)} s"


def number_text(value: float | None, digits: int = 3) -> str:
    """A number with `digits` significant digits, without an exponent where it is of everyday size.

    >>> number_text(0.0123456), number_text(412.3), number_text(3.2e-7)
    ('0.0123', '412', '3.2e-07')
    """
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value)
    if value == 0:
        return "0"
    if not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}g}"
    magnitude = math.floor(math.log10(abs(value)))
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def with_error(value: float, standard_error: float) -> str:
    """A value and its standard error, both to the error's first digit, to its second where the first is 1 or 2.

    >>> with_error(0.67129, 0.0123), with_error(0.67129, 0.0078), with_error(1234.5, 67.8)
    ('0.671 ± 0.012', '0.671 ± 0.008', '1234 ± 68')
    """
    if not (math.isfinite(standard_error) and standard_error > 0):
        return number_text(value)
    magnitude = math.floor(math.log10(standard_error))
    decimals = max((1 if standard_error < 3 * 10.0**magnitude else 0) - magnitude, 0)
    if decimals > 6:
        return f"{value:.3g} ± {standard_error:.1g}"
    return f"{value:.{decimals}f} ± {standard_error:.{decimals}f}"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
