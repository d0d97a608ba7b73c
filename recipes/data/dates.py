"""Dates as people write them, and as computers do: the embedded data of `seq2seq.py`.

Written for this project. A note such as "please return it by the 3rd of March 2021" is to become "2021-03-03". No date
of the test occurs in training, so the held-out accuracy measures whether the model can read dates, not memory.
"""

import calendar
import datetime
import random

_FIRST, _LAST = datetime.date(1980, 1, 1), datetime.date(2039, 12, 31)

_DATES = (
    "{day} {month} {year}",
    "{month} {day}, {year}",
    "the {ordinal} of {month} {year}",
    "{month} {ordinal}, {year}",
    "{day} {short} {year}",
    "{day}.{number}.{year}",
    "{day} / {number} / {year}",
)

_NOTES = (
    "{date}",
    "please return it by {date}",
    "due on {date}",
    "the reading room is closed on {date}",
    "borrowed on {date} and renewed once",
    "on {date} the author reads from her novel",
    "reserved until {date} at the desk",
    "your card is valid until {date}",
)


def make_records(count: int, *, seed: int) -> list[dict[str, str]]:
    """Return `count` notes with a date each, no date twice, as records of `source` and `target`."""
    draw = random.Random(seed)
    days = draw.sample(range((_LAST - _FIRST).days + 1), count)
    return [_record(_FIRST + datetime.timedelta(days=number), draw) for number in days]


def _record(date: datetime.date, draw: random.Random) -> dict[str, str]:
    written = draw.choice(_DATES).format(
        day=date.day,
        ordinal=f"{date.day}{_ending(date.day)}",
        number=date.month,
        month=calendar.month_name[date.month],
        short=calendar.month_abbr[date.month],
        year=date.year,
    )
    return {"source": draw.choice(_NOTES).format(date=written), "target": date.isoformat()}


def _ending(day: int) -> str:
    """Return what an ordinal ends in: 1st, 2nd, 3rd, 4th, 11th, 21st."""
    return "th" if day in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
