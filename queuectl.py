#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""queuectl: a background job queue for the command line, in one file.

It runs shell commands on one machine: later, in parallel, by priority, with retries,
never twice at once, and loses none. SQLite stores the jobs, workers run them in slots,
failures are retried with exponential backoff and end in a dead letter queue.

Words
    job        one shell command, kept until it is deleted
    run        one start of a job's command; a job that is retried has several
    attempt    a run whose end is charged to the job (a crash of the worker is not)
    queue      the name under which jobs are grouped; also the whole database
    worker     one `worker start`: two processes, a supervisor and the worker proper
    supervisor the parent: it starts the worker, and kills its processes after it
    slot       room in a worker for a running command; a job may need several
    claim      a worker's right to one run of a job; also the number of that run
    fence      a guard on writes about a run: only while its claim is held
    heartbeat  a counter that a worker raises regularly while it is alive
    lease      how long after its last heartbeat a worker keeps its claims
    dead       failed for good: in the dead letter queue (DLQ) until a user acts
    lost       the outcome of a run whose worker died
    rank       the order of ready jobs: by priority, with ageing also by time
    ready      waits only for its slots; scheduled: for its time; blocked: for jobs;
               held: for a user's `release`
    tick       one transaction of a worker: record ends of runs, claim jobs

Life cycle

    enqueue --> pending --claim--> processing --complete--> completed
                 ^   ^                 |  |  |
                 |   +----release------+  |  +--cancel--> cancelled (also from
                 |                        |               pending and failed)
                 |                        |
                 |   failed <----fail-----+
                 |     |  (due again after its backoff: claim)
                 |     +--- attempts used up: bury --> dead
                 +------------- retry, by a user (from any but processing)

Invariants
    (I1) A state changes only by a verb of MOVES, in a statement that guards on the
         old state, and in one transaction with its row in `events`.
    (I2) A job is 'processing' exactly when it has a claim.     [CHECK in the schema]
    (I3) Only the holder of a job's claim can end its run; a late one changes nothing.
    (I4) A claim number is never used twice.                               [counters]
    (I5) From the commit of a claim until the last process of its run is gone, the
         run's lock is held: by the worker up to the start, then by the process tree.
    (I6) A job is taken from a worker only if the worker is gone, or has sent no
         heartbeat for a lease, and only when the run's lock is free.
    (I7) A waiting job is ready, scheduled, blocked or held; only a ready one can be
         claimed. [CHECK, index]
    (I8) `counts` equals the number of jobs by queue and state.
    (I9) One thread of a worker uses the database, and starts and reaps the commands; a
         transaction waits only for the write lock and the disk.
    (I10) An HTTP request is handled only if it names this host, has a token, and does
         not come from another site; none waits for the network in a transaction.

Contents: `grep -n '^# ----' queuectl.py`
     1 Words        states, moves, limits, errors; times, sizes and names as text
     2 Records      rows and values as named tuples
     3 Rules        what follows a run's end, which job is next, histograms: pure
     4 Cron         the runs of a schedule, as of Debian's cron: pure
     5 Fields       job fields, filters, settings; job objects from JSON and lines
     6 SQL          every statement, the schema, its migrations
     7 SQLite       the database file: opening, transactions, commits, backup
     8 Host         locks, who is alive, the process table, notifications
     9 Ledger       the only code that adds, changes or deletes jobs
    10 Queue        the library: each method is one transaction, or only reads
    11 Claims       one tick of a worker; the other workers
    12 Check        the file, the queue's rules, its surroundings
    13 Views        records as text, JSON or metrics
    14 Processes    a command and its output; the supervisor
    15 Worker       slots, what to do next, shutdown
    16 Page         the dashboard, as a browser gets it
    17 API          one function per operation; routes, OpenAPI
    18 Access       from the bytes of a head to an admitted request
    19 Server       connections, event streams, time limits, TLS
    20 MCP          tools for AI agents, on stdin and stdout
    21 Install      a launcher, completion scripts, a unit file for systemd
    22 Terminal     where commands print and read
    23 Commands     one small function per command, and the table of all
    24 Main         from the words of a command line to its exit status
"""

from __future__ import annotations

import argparse
import bisect
import codecs
import collections
import contextlib
import datetime
import errno
import functools
import gc
import io
import json
import math
import os
import re
import select
import signal
import sqlite3
import struct
import sys
import threading
import time
import types

try:
    import fcntl
except ImportError:  # Windows: clients work there, workers exit with an error
    fcntl = None  # type: ignore[assignment]

TYPE_CHECKING = False   # true for type checkers; `typing` takes 2 ms to import
if TYPE_CHECKING:
    import concurrent.futures as futures
    import socket
    import ssl
    from collections.abc import (
        Callable, Collection, Iterable, Iterator, Mapping, Sequence)
    from typing import Any, NamedTuple, NoReturn, TextIO, TypeVar

    T = TypeVar("T")
    Skip = Callable[["QueueError"], object]         # gets the error of a skipped job
    Given = tuple[dict[str, Any], str]  # a job object and its place, as `line 3`
    Rows = Callable[..., list[tuple[Any, ...]]]     # runs a SELECT
else:
    class _RecordType(type):
        """As typing.NamedTuple, which compiles each annotation: 0.2 ms a record."""

        def __new__(cls: type[type], name: str, bases: tuple[type, ...],
                    body: dict[str, Any]) -> type:
            fields = body.get("__annotations__", {})
            record = collections.namedtuple(
                name, fields, module=body["__module__"],
                defaults=[body.pop(field) for field in fields if field in body])
            for key, value in body.items():
                if key not in ("__module__", "__qualname__"):
                    setattr(record, key, value)
            return record

    NamedTuple = type.__new__(_RecordType, "NamedTuple", (), {})

__version__ = "0.1.0"
__all__ = ["Job", "Queue", "QueueError", "Run", "main"]


# ---- 1 Words -----------------------------------------------------------------
# Guards and CHECKs in SQL and choices of flags are generated from these tables. A new
# value of STATES, WAITS or OUTCOMES needs a migration that rebuilds a table.

PENDING, PROCESSING, COMPLETED, FAILED, DEAD, CANCELLED = STATES = (
    "pending", "processing", "completed", "failed", "dead", "cancelled")


class Move(NamedTuple):
    """One arrow of the life cycle."""
    sources: tuple[str, ...]
    target: str
    because: str


# The life cycle (I1); `fail` and `bury` also apply to lost runs. No two verbs share a
# source and a target, so these tell the `because` of an event without a stored reason.
MOVES = {
    #                from                   to          because
    "claim":    Move((PENDING, FAILED),     PROCESSING, "claimed by a worker"),
    "complete": Move((PROCESSING,),         COMPLETED,  "exit status 0"),
    "fail":     Move((PROCESSING,),         FAILED,     "waits for its retry"),
    "bury":     Move((PROCESSING,),         DEAD,       "no attempt left"),
    "release":  Move((PROCESSING,),         PENDING,    "released by its worker"),
    "cancel":   Move((PENDING, FAILED, PROCESSING), CANCELLED, "cancelled"),
    "retry":    Move((DEAD, CANCELLED, COMPLETED, FAILED, PENDING), PENDING,
                     "retried by a user"),
}
WAITING = MOVES["claim"].sources
OVER = tuple(state for state in STATES if state not in (*WAITING, PROCESSING))
# The states of jobs that a command applies to.
STATES_FOR = {"retry": MOVES["retry"].sources, "cancel": MOVES["cancel"].sources,
              "delete": (*WAITING, *OVER), "edit": (*WAITING, DEAD),
              "wait": (*WAITING, PROCESSING), "hold": WAITING, "release": WAITING}

# Why a job waits (I7): for a slot, its time, other jobs, or a user's `release`.
READY, SCHEDULED, BLOCKED, HELD = WAITS = ("ready", "scheduled", "blocked", "held")

# How a run ended. LOST: its worker was lost. RELEASED: requeued, no attempt counted.
DONE, FAILURE, TIMEOUT, STOPPED, RELEASED, LOST = OUTCOMES = (
    "completed", "failed", "timeout", "cancelled", "released", "lost")
LEASE_EXPIRED = "killed by another worker: its own had sent no heartbeat for a lease"

CANCEL = "cancel"               # requested for a running job
DRAIN, NOW = "drain", "now"     # requested of a worker
ASKED = "asked to stop"
# Levels of findings: a rule is broken; something needs attention; it passes by itself.
PROBLEM, WARNING, NOTE = "problem", "warning", "note"
# The verbs that statistics count; ends of runs are counted as `run:OUTCOME`.
TALLIED = ("complete", "fail", "bury", "cancel")
EVERY_QUEUE = "*"     # the row of `queues` that pauses all; not a valid name
DEFAULT_QUEUE = "default"
HOOKS_QUEUE = "hooks"   # of jobs added by hooks; they trigger no hooks
# 2 is argparse's. `wait` exits with a job's status, which may be any of these.
EX_OK, EX_NO, EX_USAGE = 0, 1, 2
EX_TIMEOUT = 124      # as timeout(1)
EX_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

WORKER_PATIENCE = 2.0  # seconds a worker waits for the write lock before it logs it
# With SQLite's busy handler one of 8 workers waited 5.1 s for a claim, with this 0.8 s.
BUSY_PAUSE = 0.001     # seconds between two attempts to lock the database
FALLBACK_POLL = 1.0    # seconds between polls: a notification may be lost
RESCUE_TICK = 0.02     # seconds between two checks of processes that are being killed
SYNC_PAUSE = 1.0       # seconds between two attempts to record results on a bad disk
CLOCK_NOISE = 1.0      # seconds; a smaller step back changes no delay
READ_SIZE = 65536      # bytes; the capacity of a pipe on Linux
MAX_SLOTS = 512        # of one worker
MAX_TEXT = 131_071     # bytes of a command or NAME=value; with a NUL, Linux's limit
MAX_ENV = 1 << 20      # bytes of all variables of a job; execve(2) takes about 2 MiB
MAX_SEARCH = 256       # characters
MAX_KEY = 1024         # characters of a unique or once key, such as a path
MAX_DURATION = 1e10    # seconds, about 300 years: keeps every sum a valid date
MAX_WHOLE = 10**9      # of retries, priorities, limits: no sum of them overflows SQLite
PAGE_SIZE = 1000       # jobs read at once from a long list
SOCKET_BUFFER = 4096   # bytes of notifications read at once
SHRINK_PAGES = 500     # pages of the file freed in one transaction: a few ms
CHECK_SHOWN = 20       # findings of one kind that `check` lists
LOCK_SUFFIX = "-lock"        # of the file beside the database; SQLite has -wal and -shm
APPLICATION_ID = 0x51435431  # "QCT1", bytes 68 to 71 of the file


class QueueError(Exception):
    """A refusal, never a bug. `message` says what is wrong, `hint` what to do, or "".
    `code` is one of those in the README, never renamed. A subclass exists only where a
    caller acts differently.
    """
    status = 503                # of the HTTP reply
    headers: tuple[tuple[str, str], ...] = ()       # of that reply
    exit_status = EX_NO
    item: int | None = None     # number of the one at fault in a batch, from 0

    def __init__(self, code: str, message: str, hint: str = "") -> None:
        super().__init__(f"{message}; {hint}" if hint else message)
        self.code, self.message, self.hint = code, message, hint
        if code == "disk-full":
            self.status = 507   # WebDAV's (RFC 4918, section 11.5)

    def name_place(self, place: str) -> None:
        """Put a place, such as `line 3`, before the message; "": change nothing."""
        if place:
            self.message = f"{place}: {self.message}"
            self.args = (f"{place}: {self}",)       # the exception's text


class NotFound(QueueError):
    status = 404


class Conflict(QueueError):
    """The current state does not allow it; a sweep skips such a job."""
    status = 409


class Invalid(QueueError):
    """A given value is wrong; `key` names the job's field, if it is one."""
    status = 400
    usual_code = "invalid-value"

    def __init__(self, message: str, hint: str = "", key: str | None = None) -> None:
        super().__init__(self.usual_code if key is None else "invalid-job",
                         message, hint)
        self.key = key


class Usage(Invalid):
    """The command line is invalid."""
    exit_status = EX_USAGE
    usual_code = "usage"


class Unavailable(QueueError):
    """The database cannot be written now; nothing was changed. Workers retry."""


class Gone(QueueError):
    """The database was deleted, moved or replaced while it was open."""


class Refused(QueueError):
    """Anything else."""


class Stale(Exception):
    """A bug: a statement failed or changed too few rows. It is rolled back."""


def no_such_job(job_id: str) -> NotFound:
    return NotFound("no-such-job", f"no job {job_id!r}",
                    "`queuectl list` shows what there is")


# Times. A stored time has 24 characters, so that text sorts as time does.
EPOCH = datetime.datetime(1970, 1, 1)
MILLISECOND = datetime.timedelta(milliseconds=1)


@functools.lru_cache(maxsize=16)    # a tick formats its time many times
def iso(moment: float) -> str:
    """Epoch seconds as stored: UTC, whole milliseconds, rounded down; OverflowError."""
    # 1e-3 outweighs a float's rounding error. fromtimestamp() may end in 2038.
    stamp = EPOCH + math.floor(moment * 1000 + 1e-3) * MILLISECOND
    return stamp.isoformat(timespec="milliseconds") + "Z"


def iso_up(moment: float) -> str:
    """As `iso`, rounded up, so that nothing starts early."""
    return iso(moment + 0.000998)


def epoch(stamp: str) -> float:
    """The epoch seconds of a stored time."""
    # Without its Z, which fromisoformat() accepts since Python 3.11 only.
    return (datetime.datetime.fromisoformat(stamp[:-1]) - EPOCH) / MILLISECOND / 1000


def span(seconds: float) -> str:
    """A duration for people, in at most two units: 2ms, 0.02s, 12s, 1m 5s, 3d 4h."""
    if 0 < seconds < 0.00995:
        return f"{math.ceil(seconds * 1000 - 0.5) or 1}ms"
    if seconds < 9.995:
        return f"{seconds:.2f}".rstrip("0").rstrip(".") + "s"
    whole = round(seconds)
    for size, unit, small, smaller in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"),
                                       (60, "m", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size}{unit}" + (f" {rest}{smaller}" if rest else "")
    return f"{whole}s"


def ago(stamp: str | None, now: float) -> str:
    """A stored time relative to now: `5s ago`, `in 2m` (rounded up); None: `-`."""
    if stamp is None:
        return "-"
    away = epoch(stamp) - now
    if abs(away) < 1:
        return "now"
    return f"in {span(math.ceil(away))}" if away > 0 \
        else f"{span(math.floor(-away))} ago"


UNITS = {"ms": 0.001, "min": 60.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0,
         "w": 604800.0}     # a pattern tries them in this order
# Compiled when used: most commands need few patterns, and `re` caches them.
_NUMBER = "[0-9]+(?:[.][0-9]+)?"
_DURATION = f"(?:{_NUMBER}(?:{'|'.join(UNITS)}))+"
DURATION_FORMS = "500ms, 30s, 5m, 2h, 1d, 1w, 1h30m or bare seconds"


def parse_duration(text: object) -> float:
    """Seconds of `500ms`, `30s`, `1h30m`, `1.5` or a number; else Invalid."""
    word, seconds = str(text).strip(), -1.0
    if type(text) in (int, float) or re.fullmatch(_NUMBER, word):
        seconds = float(word)
    elif re.fullmatch(_DURATION, word):
        seconds = sum(float(n) * UNITS[unit] for n, unit in
                      re.findall(f"({_NUMBER})({'|'.join(UNITS)})", word))
    if not 0 <= seconds <= MAX_DURATION:
        raise Invalid(f"{text!r} is not a duration", f"use {DURATION_FORMS}")
    return seconds


def _next_clock_time(text: str, now: float) -> float:
    """The next local HH:MM. A time that the clocks skip moves by the size of the jump;
    a repeated one counts twice (PEP 495: the second has a `fold` of 1).
    """
    hour, minute, *second = map(int, text.split(":"))
    wanted = datetime.datetime.combine(datetime.date.fromtimestamp(now),
                                       datetime.time(hour, minute, sum(second)))
    first, again = wanted.timestamp(), wanted.replace(fold=1).timestamp()
    if max(first, again) > now:
        return first if first > now else again
    return (wanted + datetime.timedelta(days=1)).timestamp()


def parse_time(text: object, now: float) -> float:
    """Epoch seconds of ISO 8601 (no zone: local time), a number, `+DUR` or `HH:MM`;
    else Invalid. It may be in the past.
    """
    word = str(text).strip()
    try:
        if type(text) in (int, float) or re.fullmatch(_NUMBER, word):
            moment = float(word)
            if not 0 <= moment <= MAX_DURATION:
                raise ValueError
        elif word.startswith("+"):
            moment = now + parse_duration(word[1:])
        elif re.fullmatch(r"[0-9]{1,2}:[0-9]{2}(:[0-9]{2})?", word):
            moment = _next_clock_time(word, now)
        else:   # before Python 3.11 fromisoformat() accepts an offset, but no Z
            moment = datetime.datetime.fromisoformat(
                re.sub(r"[Zz]$", "+00:00", word)).timestamp()
        iso_up(moment)      # refuses what cannot be stored, as NaN or the year 10000
    except (ValueError, OverflowError, OSError):
        raise Invalid(f"{text!r} is not a time", "use 2026-01-31T18:00, "
                      "2026-01-31T18:00Z, epoch seconds, +10m or 18:00") from None
    return moment


def parse_past(text: object, now: float) -> float:
    """Epoch seconds of a time in the past, or a duration ago; of HH:MM the last one."""
    if not isinstance(text, str):
        raise Invalid(f"{text!r} is not text", "use 1h or 2026-01-31T18:00Z")
    if re.fullmatch(_DURATION, text):
        return now - parse_duration(text)
    moment = parse_time(text, now)
    if moment > now and ":" in text[:3]:    # by the calendar: a day may have 23 hours
        moment = (datetime.datetime.fromtimestamp(moment)
                  - datetime.timedelta(days=1)).timestamp()
    if moment > now:
        raise Invalid(f"{text!r} is in the future", "give a past time, or 1h")
    return moment


SIZES = {"": 1, "b": 1, "kib": 1 << 10, "mib": 1 << 20, "k": 1 << 10, "m": 1 << 20,
         "kb": 1000, "mb": 10**6}


def parse_size(text: str) -> int:
    """Bytes of `64KiB`, `1MiB` or a bare number, at most 16 MiB; else Invalid."""
    match = re.fullmatch(r"([0-9]{1,12})\s*([A-Za-z]*)", text.strip())
    unit = SIZES.get(match[2].lower()) if match else None
    if not match or not unit or int(match[1]) * unit > 16 << 20:
        raise Invalid(f"{text!r} is not a size", "use 64KiB or 1MiB; up to 16MiB")
    return int(match[1]) * unit


def parse_share(text: str) -> float:
    if not re.fullmatch(r"[01]\.?|[01]?\.[0-9]+", text) or float(text) > 1:
        raise Invalid(f"{text!r} is not a share", "use a number from 0 to 1")
    return float(text)


def parse_whole(text: str, least: int = 0, most: int = MAX_WHOLE) -> int:
    """A whole number within bounds, in plain digits; else Invalid."""
    if not re.fullmatch(r"[+-]?[0-9]{1,12}", text) or not least <= int(text) <= most:
        raise Invalid(f"{text!r} is not a whole number from {least} to {most}")
    return int(text)


_NAME = "[A-Za-z0-9._:@-]{1,128}"
NAME_FORM = "use 1 to 128 of A-Z a-z 0-9 . _ : @ -"


def parse_gpus(text: str) -> str:
    """`all`, or names or indices, each once, as 0,1; else Invalid."""
    names = text.split(",")
    if not all(re.fullmatch("[A-Za-z0-9._:/-]{1,128}", name) for name in names) \
            or not len({*names}) == len(names) <= MAX_SLOTS:
        raise Invalid(f"{text!r} is not a list of GPUs",
                      "use `all`, or indices or UUIDs, each once, as 0,1")
    return text


def parse_name(text: object) -> str:
    """A name of a job, queue, tag, worker or schedule; else Invalid."""
    if not isinstance(text, str) or not re.fullmatch(_NAME, text):
        raise Invalid(f"{text!r} is not a name", NAME_FORM)
    return text


def parse_path(text: str) -> str:
    """A path, but not "", as of a shell's variable that is not set; else Invalid."""
    if not text:
        raise Invalid("'' is not a path", "give one, or leave the flag out")
    return text


def nearest(word: str, words: Collection[str]) -> str:
    """A hint that names the most similar of the words, or ""."""
    import difflib  # 5 ms, and only for a mistake
    # Swapped letters first: difflib rates `abd` nearer to `abdc` than `abcd`.
    close = [one for one in words if sorted(one) == sorted(word)] \
        or difflib.get_close_matches(word, words, 1, 0.6)
    return f"did you mean `{close[0]}`?" if close else ""


def parse_state(text: object) -> str:
    if text not in STATES:
        raise Invalid(f"there is no state {text!r}",
                      nearest(str(text), STATES) or "use " + ", ".join(STATES))
    return str(text)


def parse_states(text: str) -> list[str]:
    return [parse_state(state) for state in text.split(",")]


_STATUS = "([01]?[0-9]{1,2}|2[0-4][0-9]|25[0-5])"
_STATUSES = f"{_STATUS}(-{_STATUS})?"
CODES_FORM = f"{_STATUSES}(,{_STATUSES})*"


def parse_codes(text: object) -> tuple[int, ...]:
    """The exit statuses of `2,64-78`, in order; else Invalid."""
    if isinstance(text, float) and text.is_integer():   # JSON has one kind of number
        text = int(text)
    if not re.fullmatch(CODES_FORM, str(text)):
        raise Invalid(f"{text!r} is not a list of exit statuses",
                      "use 2,64-78, with numbers from 0 to 255")
    codes = set[int]()
    for part in str(text).split(","):
        ends = sorted(map(int, part.split("-")))
        codes.update(range(ends[0], ends[-1] + 1))
    return tuple(sorted(codes))


def counted(n: int, noun: str, plural: str = "") -> str:
    return f"{n} {noun if n == 1 else plural or noun + 's'}"


def is_text(value: object) -> bool:
    """Return True for a string without NUL and lone surrogates, which JSON allows."""
    return isinstance(value, str) and not re.search("[\0\ud800-\udfff]", value)


# ---- 2 Records ---------------------------------------------------------------
# Rows and values, all immutable. Times are text as stored (UTC, ISO 8601, ms, Z). Rows
# are read by position, so a new column comes last.

class Job(NamedTuple):
    """One row of `jobs`. For a new field see README, "To change it"."""
    seq: int = 0                # order of enqueueing; the N of job-N
    id: str = ""
    command: str = ""
    state: str = PENDING
    attempts: int = 0           # ended runs that were charged to the job
    max_retries: int = -1       # runs that may fail before it is dead, including the
                                # first (0 is the same as 1); -1: as configured
    created_at: str = ""
    updated_at: str = ""        # last change of state, or edit
    queue: str = DEFAULT_QUEUE
    priority: int = 0           # higher first
    run_at: str = ""            # not before this time; "": at once
    timeout: float | None = None        # seconds; 0: never; None: by worker or settings
    backoff_base: float | None = None   # seconds; None: by worker or settings
    after: tuple[str, ...] = ()         # ids of jobs that must be completed first
    unique: str | None = None   # key of which only one job may be unfinished
    tags: tuple[str, ...] = ()
    env: Mapping[str, str] = {}         # never changed
    cwd: str = ""
    crashes: int = 0            # runs that were lost with their worker
    worker: str | None = None   # name of the worker that runs it
    started_at: str | None = None       # of the last run
    finished_at: str | None = None      # of the last run that ended
    exit_code: int | None = None        # of the last run; 128+N: signal N
    error: str | None = None    # why the last run failed
    waits: str | None = None    # one of WAITS; None: it does not wait
    rank: int = 0               # lower starts first; see `rank_of`
    claim: int | None = None    # number of the current run: the fencing token (I3)
    end_requested: str | None = None    # CANCEL or LOST: this run is being ended
    runs: int = 0               # times it was claimed
    unmet: int = 0              # jobs in `after` and `after_any` that it waits for
    after_any: tuple[str, ...] = ()     # ids of jobs that must have finished first
    once: str | None = None     # key that only one job may ever have
    slots: int = 1              # of its worker, while it runs
    backoff_max: float | None = None    # seconds; None: as configured
    no_retry_on: str | None = None      # exit statuses that are final: "2,64-78"
    expires_at: str | None = None       # cancelled then, unless a run has begun
    held: bool = False          # waits until a user releases it
    at_time: bool = False       # run_at is an absolute time, not the end of a delay


class Run(NamedTuple):
    """One row of `runs`, written with the claim, before the command starts."""
    claim: int                  # never used twice (I4)
    job: int                    # Job.seq
    number: int                 # 1, 2, ... within the job
    worker_id: int              # Worker.id
    worker: str                 # the worker's name: its row is deleted when it exits
    slot: int                   # 1 ... slots; 0: claimed ahead, not started
    started_at: str
    finished_at: str | None     # None: under way
    duration: float | None      # seconds, monotonic; None: the end was not seen
    outcome: str | None         # one of OUTCOMES
    exit_code: int | None
    error: str | None
    output_bytes: int           # printed in total; `output` may hold less
    output: bytes               # its beginning and end
    slots: str = ""             # all slots of a job that takes several, as "1,3"
    gpus: str | None = None     # the GPUs of its slots, as "0,1"; None: no GPU worker


class Worker(NamedTuple):
    """One row of `workers`: a worker that runs, or that was killed."""
    id: int
    name: str
    host: str
    boot: str                   # the kernel's boot id; "": there is none
    pid: int                    # may be reused; `boot` and `born` tell
    born: str                   # start time of the process, as the kernel reports it
    slots: int
    queues: tuple[str, ...]     # (): all
    port: int | None            # UDP, loopback, for notifications
    started_at: str
    heartbeat_at: str           # only shown: the lease depends on their number
    heartbeats: int
    stop_requested: str | None  # DRAIN or NOW
    gpus: tuple[str, ...] = ()  # one for each slot; (): it assigns none
    # Not in the table, and only in what Queue.workers() returns:
    is_alive: bool | None = None        # None: on another machine
    is_expired: bool = False            # no heartbeat for a lease: not counted
    late_after: float = math.inf        # seconds without a heartbeat: shown
    running: Sequence[Job] = ()

    @property
    def busy(self) -> int:
        return sum(job.slots for job in self.running)

    def takes(self, queue: str) -> bool:
        return not self.queues or queue in self.queues


class Event(NamedTuple):
    """One change of a job's state; deleted with the job."""
    id: str
    source: str | None          # None: enqueued
    target: str
    at: str
    reason: str
    seq: int = 0                # grows in the order of the commits


class Schedule(NamedTuple):
    """One row of `schedules`."""
    name: str
    cron: str                   # five fields, @daily and the like, or @every DUR
    job: Mapping[str, Any]      # a job object, checked at each run
    paused: bool
    created_at: str
    next_run: str
    last_run: str | None        # when its last job was enqueued
    last_job: int | None        # Job.seq of that
    tz: str | None              # IANA name of its zone; None: the worker's local zone
    skipped: int                # runs skipped because the previous job had not finished
    last_success: str | None    # when one of its jobs last completed
    catch_up: bool = True       # missed runs cause one run as soon as possible
    last_state: str | None = None       # how one of its jobs last ended; one of OVER


class Cron(NamedTuple):
    """A schedule: the values of its five fields, each sorted; or an interval."""
    minutes: tuple[int, ...]
    hours: tuple[int, ...]
    days: tuple[int, ...]       # of the month
    months: tuple[int, ...]
    weekdays: tuple[int, ...]   # 0: Sunday
    is_either: bool             # no day field begins with *: a match of one is enough
    is_wild: bool               # minute or hour begins with *: an interval, not a time
    every: float | None = None  # seconds, for @every, which has no fields


class QueueView(NamedTuple):
    name: str
    paused: bool
    limit: int                  # jobs at once; 0: no limit
    counts: dict[str, int]      # with all states


class Progress(NamedTuple):
    """Numbers of jobs."""
    waiting: int
    running: int
    completed: int              # since the database was created, or as `since` says
    unsuccessful: int           # dead or cancelled; the same
    later: int                  # of `waiting`: neither due nor ready

    @property
    def over(self) -> int:
        return self.completed + self.unsuccessful

    @property
    def left(self) -> int:
        return self.waiting + self.running

    def since(self, first: Progress) -> Progress:
        """With only the jobs that have finished since `first` was read."""
        return self._replace(completed=self.completed - first.completed,
                             unsuccessful=self.unsuccessful - first.unsuccessful)


class Outcome(NamedTuple):
    """How one run ended."""
    kind: str                   # one of OUTCOMES
    exit_code: int | None = None
    error: str | None = None
    duration: float | None = None   # seconds
    output: bytes = b""
    output_bytes: int = 0


class Settings(NamedTuple):
    """The configuration, parsed, in the order of SETTINGS; seconds; None: off."""
    max_retries: int
    backoff_base: float
    backoff_max: float
    backoff_jitter: float
    timeout: float | None
    kill_grace: float
    shell: str                  # a path
    output_limit: int           # bytes
    output_dir: str | None      # a path
    retention_completed: float | None
    retention_dead: float | None
    heartbeat: float
    lease: float
    crash_limit: int
    on_completed: str | None
    on_dead: str | None
    on_idle: str | None
    priority_ageing: float | None


class WorkerOptions(NamedTuple):
    """The flags of `worker start`."""
    slots: int = 1
    name: str | None = None             # None: host-pid
    queues: tuple[str, ...] = ()        # (): all
    timeout: float | None = None        # for jobs that set none
    backoff_base: float | None = None   # for jobs that set none
    drain: bool = False
    max_jobs: int | None = None
    grace: float | None = None          # seconds; None: no limit
    gpus: tuple[str, ...] = ()          # one for each slot; (): it assigns none

    def adapt(self, settings: Settings) -> Settings:
        """The configuration of this worker: its flags come first."""
        return settings._replace(
            timeout=settings.timeout if self.timeout is None else self.timeout,
            backoff_base=settings.backoff_base if self.backoff_base is None
            else self.backoff_base)


class Claim(NamedTuple):
    """A job that a worker has taken."""
    job: Job
    number: int         # the fencing token: only increases, never reused
    slots: tuple[int, ...]      # (): a spare, without a slot yet
    lock: int           # descriptor that holds the run's lock; -1: no such locks here

    @property
    def slot(self) -> int:
        """The lowest of its slots; 0: a spare."""
        return self.slots[0] if self.slots else 0

    def release(self) -> None:
        """Close the lock in this process; the process tree still holds it (I5)."""
        if self.lock >= 0:
            os.close(self.lock)


class Change(NamedTuple):
    """A change of state. `Ledger.move` sets in `after` what follows from the state."""
    verb: str
    before: Job
    after: Job
    reason: str = ""
    outcome: Outcome | None = None      # None: no run has ended


class Tick(NamedTuple):
    """The result of one tick of a worker, once it is committed."""
    changes: list[Change]           # runs that have ended
    claims: list[Claim]
    mine: dict[int, str | None]     # this worker's claims: what is requested of each
    stop: str | None                # DRAIN or NOW
    is_behind: bool                 # more jobs are due than one tick makes ready
    is_expiring: bool               # there is more to delete
    is_overtaken: bool              # a ready job ranks before the spare claims
    settings: Settings
    notes: list[str]                # schedules that skipped a run or were paused
    removed: list[Worker]           # dead workers
    now: float                      # epoch seconds


class Spread(NamedTuple):
    """The distribution of durations; seconds, None without values."""
    n: int
    mean: float | None
    p50: float | None
    p95: float | None
    p99: float | None


class Summary(NamedTuple):
    """What a queue, or all queues, did in a period."""
    enqueued: int
    completed: int          # jobs
    retried: int            # failed attempts with a retry to follow
    died: int
    cancelled: int
    lost: int               # runs lost with their worker
    run_time: Spread        # of runs whose end was seen
    wait_time: Spread       # from due to started
    at: str = ""            # the minute, if the period is one


class Finding(NamedTuple):
    """What `check` reports, or why a job waits."""
    level: str                  # PROBLEM, WARNING or NOTE
    code: str
    message: str
    hint: str                   # what to do, or ""


class Scrape(NamedTuple):
    """The values of the metrics."""
    jobs: dict[tuple[str, str], int]                    # by queue and state
    tallies: list[tuple[str, str, int, int, float]]     # of all time
    oldest: dict[str, float]        # seconds since the first ready job became due
    paused: dict[str, bool]         # by queue
    workers: list[Worker]
    database_bytes: int
    schedules: list[Schedule]
    blocked: int                    # jobs that cannot run until another is retried


class Status(NamedTuple):
    """What `status` shows."""
    counts: dict[str, int]          # by state; with all states
    workers: list[Worker]
    paused: list[str]
    next_due: Job | None
    database: str
    next_schedule: Schedule | None
    blocked: int                    # jobs that cannot run until another is retried
    attention: list[Finding]        # what keeps due work from running
    held: int


# ---- 3 Rules -----------------------------------------------------------------

def backoff(failures: int, base: float, settings: Settings, chance: float) -> float:
    """Seconds to wait after the `failures`-th failed attempt: base, 2 base, 4 base ...
    up to backoff-max; `chance` (0 to 1) spreads it by backoff-jitter.
    """
    # 2.0 ** 1024 overflows.
    wait = min(settings.backoff_max, base * 2.0 ** min(failures - 1, 64))
    wait *= 1 + settings.backoff_jitter * (2 * chance - 1)
    return min(settings.backoff_max, wait)


def rank_of(priority: int, run_at: str, settings: Settings) -> int:
    """A waiting job's rank, lower first: by priority, or with ageing by the due time
    minus priority-ageing for each unit of priority. All jobs age equally, so it is
    stored.
    """
    if settings.priority_ageing is None:
        return -priority
    worth = round(settings.priority_ageing * 1000)
    return round(epoch(run_at) * 1000) - priority * worth


def judged(job: Job, outcome: Outcome) -> Outcome:
    """The outcome, or LOST if the run failed while another worker was killing it."""
    if job.end_requested == LOST and outcome.kind in (FAILURE, TIMEOUT):
        return outcome._replace(kind=LOST, exit_code=None, error=LEASE_EXPIRED)
    return outcome


def settle(job: Job, outcome: Outcome, settings: Settings, chance: float,
           now: float) -> tuple[str, Job, str]:
    """The verb that follows from a run's end, the job to store, and the reason.

    Success comes before a requested cancel, and that before any other outcome: a job
    whose worker is lost while it is being cancelled does not run again.
    """
    job = job._replace(exit_code=outcome.exit_code, error=outcome.error,
                       finished_at=iso(now),
                       attempts=job.attempts + (outcome.kind == DONE))
    if outcome.kind == DONE:
        return "complete", job, "exit status 0"
    if job.end_requested == CANCEL or outcome.kind == STOPPED:
        return "cancel", job, "cancelled while it ran"
    if outcome.kind == RELEASED:    # due now, even if the clock was set back
        job = job._replace(run_at=min(job.run_at, iso(now)), expires_at=job.expires_at
                           if outcome.duration is None else None)   # None: not started
        return "release", job, MOVES["release"].because
    if outcome.kind == LOST:        # due at once
        job = job._replace(crashes=job.crashes + 1, run_at=iso(now))
        if job.crashes < settings.crash_limit:
            return "fail", job, "its worker was lost"
        return "bury", job, f"its worker was lost {job.crashes} times"
    job = job._replace(attempts=job.attempts + 1)
    reason = outcome.error or outcome.kind
    if job.attempts >= job.max_retries:
        return "bury", job, reason
    if job.no_retry_on and outcome.exit_code in parse_codes(job.no_retry_on):
        return "bury", job, f"{reason} (not retried: no-retry-on {job.no_retry_on})"
    if job.backoff_max is not None:
        settings = settings._replace(backoff_max=job.backoff_max)
    base = settings.backoff_base if job.backoff_base is None else job.backoff_base
    wait = backoff(job.attempts, base, settings, chance)
    return "fail", job._replace(run_at=iso_up(now + wait), at_time=False), reason


def since_set_back(run_at: str, asked: float, now: float) -> str:
    """The end of a delay minus any step back of the clock since it was requested."""
    return iso_up(epoch(run_at) - max(0.0, asked - now))


def brought_forward(job: Job, now: float) -> Job:
    """The job with its delay restarted if it began in the future: the clock was set
    back.
    """
    began = epoch(job.updated_at)
    if job.at_time or began <= now + CLOCK_NOISE:
        return job
    run_at = iso_up(now + max(0.0, epoch(job.run_at) - began))
    return job._replace(run_at=run_at, updated_at=iso(now))


def choose(line: Iterable[Job], room: Callable[[str], int], slots: int,
           spares: int = 0) -> tuple[list[Job], bool]:
    """The jobs to claim for that many free slots, then as spares; True if no others in
    the line may start. A job that needs more slots than are free ends the line: jobs
    behind it would take slots that it waits for.
    """
    taken: dict[str, int] = {}
    chosen: list[Job] = []
    for job in line:
        if not slots + spares:
            break
        if taken.get(job.queue, 0) >= room(job.queue):
            continue
        if job.slots <= slots:
            slots -= job.slots
        elif slots or job.slots > 1:
            return chosen, True
        else:
            spares -= 1
        taken[job.queue] = taken.get(job.queue, 0) + 1
        chosen.append(job)
    return chosen, not slots + spares


def start_order(job: Job) -> tuple[int, str, int]:
    return job.rank, job.run_at, job.seq


RECORD_PAUSE = 0.01    # seconds to collect ends of runs while slots have work


def wanted_spares(pace: float, slots: int) -> int:
    """How many jobs to claim ahead: as many as start in two RECORD_PAUSEs, if runs are
    so short (`pace`: mean seconds) that slots would wait for commits.
    """
    if pace > 0.01:
        return 0
    # Until they start, no other worker can take them.
    return min(64, math.ceil(slots * (1 + 2 * RECORD_PAUSE / max(pace, 1e-4))))


def lease_of(settings: Settings) -> float:
    """Seconds; with less than three heartbeats, live workers would lose claims."""
    return max(settings.lease, 3 * settings.heartbeat)


class Heartbeats:
    """Seconds since each worker's last heartbeat, as this process has observed them."""

    def __init__(self) -> None:
        self.seen: dict[int, tuple[int, float]] = {}   # number of heartbeats, seconds
        self._last = -math.inf

    def look(self, counts: Mapping[int, int], now: float,
             settings: Settings) -> dict[int, float]:
        """Seconds without a heartbeat by worker; `now` is monotonic. A long gap between
        two calls does not count: this process was suspended or waited for the lock.
        """
        step, self._last = now - self._last, now
        if step > max(2 * settings.heartbeat, settings.lease / 2):
            step = 0.0
        self.seen = {
            worker: (count, self.seen[worker][1] + step)
            if worker in self.seen and self.seen[worker][0] == count else (count, 0.0)
            for worker, count in counts.items()}
        return {worker: seconds for worker, (_, seconds) in self.seen.items()}


class Output:
    """A command's output: its beginning and its end, each half of `limit` bytes. The
    end is cut only beyond twice its size and READ_SIZE: each byte moves at most once.
    """

    def __init__(self, limit: int) -> None:
        self._head_size, self._tail_size = limit // 2, limit - limit // 2
        self._head, self._tail = bytearray(), bytearray()
        self.total = 0

    def feed(self, piece: bytes) -> None:
        self.total += len(piece)
        room = self._head_size - len(self._head)
        self._head += piece[:room]
        self._tail += piece[room:]
        if len(self._tail) > 2 * self._tail_size + READ_SIZE:
            del self._tail[:len(self._tail) - self._tail_size]

    def kept(self) -> bytes:
        end = bytes(self._tail[-self._tail_size:]) if self._tail_size else b""
        return bytes(self._head) + end


def left_out(n: int) -> bytes:
    return f"\n[... {n} bytes left out ...]\n".encode()


def output_file(directory: str, job_id: str, run: int) -> str:
    return os.path.join(directory, f"{job_id}.{run}.log")


def readable(kept: bytes, total: int, seen: int = 0) -> bytes:
    """Kept output from byte `seen` on, with a line in the middle for omitted bytes."""
    middle = len(kept) // 2
    end_from = total - (len(kept) - middle)     # where the kept end begins
    if total == len(kept):
        return kept[seen:]
    if seen >= end_from:
        return kept[len(kept) - (total - seen):]
    return kept[seen:middle] + left_out(end_from - max(seen, middle)) + kept[middle:]


def last_line(output: bytes) -> str:
    """The last line that is not blank, often the error message, fit for terminals."""
    text = output[-2000:].decode("utf-8", "replace")
    text = re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text).strip()     # ECMA-48, 5.4
    return "".join(c if c.isprintable() else " "
                   for c in re.split("[\r\n]", text)[-1].strip())[:200]


# Upper bounds of histogram buckets: in each decade the E24 series (IEC 60063) with 5.0
# for 5.1, so that 1, 2 and 5 are bounds. A percentile is the upper bound of its bucket:
# never too low, at most 15% too high. The last one is 105 days.
BOUNDS = tuple(digit * 10.0 ** decade for decade in range(-5, 6) for digit in (
    10, 11, 12, 13, 15, 16, 18, 20, 22, 24, 27, 30,
    33, 36, 39, 43, 47, 50, 56, 62, 68, 75, 82, 91))


def bucket_of(seconds: float) -> int:
    return min(bisect.bisect_left(BOUNDS, seconds), len(BOUNDS) - 1)


def percentile(buckets: Mapping[int, int], share: float) -> float | None:
    """The bound up to which `share` of the values lie; None without values."""
    left = share * sum(buckets.values())
    for bucket in sorted(buckets):
        left -= buckets[bucket]
        if left <= 1e-9:    # 0, within a float's rounding error
            return BOUNDS[bucket]
    return None


def summary(rows: Iterable[tuple[str, int, int, float]]) -> Summary:
    """The sum of tallies (kind, bucket, n, total). The kinds are `enqueue`, `delete`,
    those of TALLIED, `run:OUTCOME`; and `run_time` and `wait_time`, which alone have
    buckets and a total in seconds.
    """
    buckets: dict[str, dict[int, int]] = collections.defaultdict(collections.Counter)
    totals: dict[str, float] = collections.defaultdict(float)
    for kind, bucket, n, total in rows:
        buckets[kind][bucket] += n
        totals[kind] += total

    def count(kind: str) -> int:
        return sum(buckets[kind].values())

    def spread(kind: str) -> Spread:
        return Spread(count(kind), totals[kind] / count(kind) if count(kind) else None,
                      *(percentile(buckets[kind], share) for share in (.5, .95, .99)))
    return Summary(
        count("enqueue"), count("complete"), count("fail"), count("bury"),
        count("cancel"), count(f"run:{LOST}"), spread("run_time"), spread("wait_time"))


METRIC_BOUNDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0,
                 300.0, 1000.0, 3000.0, 10000.0)     # seconds


def cumulated(buckets: Mapping[int, int]) -> list[int]:
    """The `le` buckets of a Prometheus histogram; the last one counts all values."""
    # BOUNDS are products of floats, which may differ a little from literals.
    return [sum(n for bucket, n in buckets.items() if BOUNDS[bucket] <= 1.001 * bound)
            for bound in (*METRIC_BOUNDS, math.inf)]


# ---- 4 Cron ------------------------------------------------------------------

# Field, lowest and highest value, names (counted from the lowest).
CRON_FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("minute", 0, 59, ()), ("hour", 0, 23, ()), ("day of month", 1, 31, ()),
    ("month", 1, 12, ("jan", "feb", "mar", "apr", "may", "jun",
                      "jul", "aug", "sep", "oct", "nov", "dec")),
    ("day of week", 0, 7,       # 7 is Sunday, too
     ("sun", "mon", "tue", "wed", "thu", "fri", "sat")))
CRON_NAMES = {"@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *",
              "@weekly": "0 0 * * 0", "@daily": "0 0 * * *", "@midnight": "0 0 * * *",
              "@hourly": "0 * * * *"}
DAY = 86400             # seconds; no zone has changed its clocks twice within one
EPOCH_DAY = EPOCH.toordinal()
CRON_DAYS = 41 * 366    # searched; 29 February is each weekday within 40 years


def _cron_values(text: str, number: int) -> tuple[int, ...]:
    """The values of a field: a list of `*`, `1-5` or `5`, the first two with a step."""
    field, least, most, names = CRON_FIELDS[number]

    def value(word: str) -> int:
        if word.lower() in names:
            return least + names.index(word.lower())
        if re.fullmatch("[0-9]{1,2}", word) and least <= int(word) <= most:
            return int(word)
        named = f" or {names[0]} to {names[-1]}" if names else ""
        raise Invalid(f"the {field} field does not take {word!r}",
                      f"use {least} to {most}{named}, or *, 1,3, 1-5, */2")
    found: set[int] = set()
    for part in text.split(","):
        interval, slash, step = part.partition("/")
        low, dash, high = interval.partition("-")
        first, last = (least, most) if interval == "*" \
            else (value(low), value(high if dash else low))
        if first > last:
            ends = names or (str(least), str(most))
            raise Invalid(f"{interval!r} in the {field} field runs backwards",
                          f"use two: {low}-{ends[-1]},{ends[0]}-{high}")
        if slash and interval != "*" and not dash:
            raise Invalid(f"{part!r} in the {field} field is a step without a range",
                          f"use {interval}-{most}/{step}")
        longest = most - least + 1      # a longer step is a mistake
        if slash and not (re.fullmatch("[0-9]{1,2}", step)
                          and 1 <= int(step) <= longest):
            raise Invalid(f"the {field} field does not take the step of {part!r}",
                          f"use 1 to {longest}")
        found.update(range(first, last + 1, int(step) if slash else 1))
    return tuple(sorted(found))


def parse_cron(text: str) -> Cron:
    """The schedule of a cron line; else Invalid."""
    line = text.strip()
    if line.lower() == "@reboot":
        raise Invalid("'@reboot' is not a time", "put `queuectl enqueue` where the "
                      "worker is started at boot, as in its service unit")
    every = re.fullmatch(r"@every\s+(.+)", line, re.I)
    if every:
        seconds = parse_duration(every[1])
        if not 1 <= seconds <= CRON_DAYS * DAY:
            raise Invalid(f"{line!r} is too short or too long", "use 1s to 40 years")
        return Cron((), (), (), (), (), False, True, seconds)
    if line.startswith("@") and line.lower() not in CRON_NAMES:
        raise Invalid(f"{line!r} is not a schedule",
                      f"use @every DUR, {', '.join(CRON_NAMES)}")
    texts = CRON_NAMES.get(line.lower(), line).split()
    if len(texts) != len(CRON_FIELDS):
        raise Invalid(f"{line!r} has {counted(len(texts), 'field')}, not 5", "use "
                      "minute, hour, day of month, month, day of week, as in '30 2 * * "
                      "mon-fri'")
    minutes, hours, days, months, weekdays = (
        _cron_values(text, number) for number, text in enumerate(texts))
    starred = [text.startswith("*") for text in texts]
    is_either = not starred[2] and not starred[4]
    longest = (31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # days of the months
    if not is_either and days[0] > max(longest[month - 1] for month in months):
        raise Invalid(f"{line!r} never comes: no month of it has a day {days[0]}",
                      "choose another day or month")
    return Cron(minutes, hours, days, months, tuple(sorted({n % 7 for n in weekdays})),
                is_either, starred[0] or starred[1])


# Local dates that match are found by the calendar alone, which skips years quickly.
# Around each, periods of constant offset from UTC are searched for local minutes that
# match. Clock changes are treated as in the source of cron(8):
#   - a fixed time that is skipped runs at the change; a repeated one runs once;
#   - an interval follows the clock: a skipped time does not run, a repeated one runs
#     again (but a skip of 1 to 4 minutes is made up, as after waking up late);
#   - from 3 hours forwards, or more than 3 back, only the new time counts.
# All runs made up at one change are one run.

def _is_cron_day(cron: Cron, day: int) -> bool:
    date = datetime.date.fromordinal(EPOCH_DAY + day)
    if date.month not in cron.months:
        return False
    in_month = date.day in cron.days
    in_week = date.isoweekday() % 7 in cron.weekdays
    return in_month or in_week if cron.is_either else in_month and in_week


def _utc_offset(moment: int, zone: datetime.tzinfo | None) -> int:
    """Seconds by which local clocks are ahead of UTC; zone None: the process's own."""
    utc = datetime.datetime.fromtimestamp(moment, datetime.timezone.utc)
    offset = utc.astimezone(zone).utcoffset()
    return round(offset.total_seconds()) if offset else 0


def _stretches(start: int, end: int,
               zone: datetime.tzinfo | None) -> Iterator[tuple[int, int, int]]:
    """Start, end (excluded) and offset of each period of constant offset. A zone does
    not tell when it changes: this compares moments a DAY apart, and bisects.
    """
    offset = _utc_offset(start, zone)
    for low in range(start, end, DAY):
        high = min(low + DAY, end)
        if _utc_offset(high, zone) == offset:
            continue
        while high - low > 1:
            middle = (low + high) // 2
            if _utc_offset(middle, zone) == offset:
                low = middle
            else:
                high = middle
        yield start, high, offset
        start, offset = high, _utc_offset(high, zone)
    yield start, end, offset


def _runs(cron: Cron, after: int, until: int,
          zone: datetime.tzinfo | None) -> Iterator[int]:
    """The runs after one moment and before another, in order; some more than once.

    `seen` is the last local minute before a change, `first` the one after it. Within
    the limits of `near` the search continues from `seen` instead: after a change
    forwards this finds the skipped minutes, which run at `start`; after one back it
    omits the repeated ones. 0 is a change within one minute.
    """
    near = range(6) if cron.is_wild else range(-179, 181)   # minutes, from cron.c
    seen = None
    # From a day before, for the last minute before a change.
    for start, end, offset in _stretches(after - DAY, until, zone):
        first, last = (start + offset) // 60, (end - 1 + offset) // 60
        if seen is not None and first - seen in near:
            first = seen + 1
        seen = last
        if start <= after:
            first = max(first, (after + offset) // 60 + 1)
        hours = (day * 24 + hour for day in range(first // 1440, last // 1440 + 1)
                 if _is_cron_day(cron, day) for hour in cron.hours)
        for minute in (hour * 60 + minute for hour in hours
                       if first // 60 <= hour <= last // 60 for minute in cron.minutes):
            if first <= minute <= last:
                yield max(minute * 60 - offset, start)


def first_run(cron: Cron, after: float, zone: datetime.tzinfo | None = None,
              start: float = 0.0) -> float:
    """The first run after a moment; math.inf if there is none, as in an hour that the
    zone always skips. `@every` counts from `start`.
    """
    if cron.every is not None:
        return start + cron.every * (1 + (after - start) // cron.every)
    since = math.floor(after)
    first = since // DAY - 1    # the local date may be the day before
    last = datetime.date.max.toordinal() - EPOCH_DAY - 3    # of the calendar
    for day in range(first, min(first + CRON_DAYS, last)):
        if _is_cron_day(cron, day):
            # An offset is less than a day to either side.
            start = max(since, (day - 1) * DAY)
            for run in _runs(cron, start, (day + 2) * DAY, zone):
                return float(run)
    return math.inf


def cron_words(line: str) -> str:
    """A simple schedule in words, as `at 02:30 on mon-fri`; any other as its line."""
    line = " ".join(line.split())
    fields = CRON_NAMES.get(line.lower(), line).lower()
    if every := re.fullmatch("@every (.+)", fields):
        return f"every {span(parse_duration(every[1]))}"
    step = re.fullmatch(r"\*/(\d+) \* \* \* \*", fields)
    if step and 60 % int(step[1]) == 0:
        return f"every {counted(int(step[1]), 'minute')}"
    at = re.fullmatch(r"(\d+) (\d+) \* \* (\*|[a-z]+(-[a-z]+)?)", fields)
    if at:
        return f"at {int(at[2]):02}:{int(at[1]):02} " \
            + ("every day" if at[3] == "*" else f"on {at[3]}")
    return line


def zone_of(name: str | None) -> datetime.tzinfo | None:
    """The time zone of an IANA name, else Invalid; None: the process's own."""
    if name is None:
        return None
    if name in ("UTC", "Etc/UTC"):      # also where no zone data is installed
        return datetime.timezone.utc
    import zoneinfo  # 4 ms, and only for schedules
    try:
        if name == "localtime":         # a file on Debian, but machines differ
            raise ValueError
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise Invalid(f"the time zone {name!r} is unknown here",
                      "use a name such as Europe/Berlin, or install `tzdata`") from None


def local_zone(now: float) -> str | None:
    """The IANA name of the process's time zone, or None. That of a file counts only if
    the offsets agree now and in half a year: a container may mount the host's zone over
    one of another name.
    """
    path = os.environ.get("TZ", "/etc/localtime").lstrip(":") or "UTC"
    is_file = path.startswith("/")
    names = [os.path.realpath(path).rpartition("/zoneinfo/")[2] if is_file else path]
    if path == "/etc/localtime":
        with contextlib.suppress(OSError, ValueError), \
                open("/etc/timezone", encoding="ascii") as file:
            names.append(file.read().strip())
    moments = (int(now), int(now) + 182 * DAY)
    for name in names:
        with contextlib.suppress(Invalid):
            zone = zone_of(name)
            if not is_file or all(_utc_offset(moment, zone) == _utc_offset(moment, None)
                                  for moment in moments):
                return name
    return None


def split_zone(cron: str, tz: str | None, now: float) -> tuple[str, str | None]:
    """A cron line without its `CRON_TZ=ZONE`, and its zone; Invalid."""
    match = re.fullmatch(r"\s*(?:CRON_)?TZ=(\S+)\s+(.*)", cron, re.S)
    if match and tz not in (None, match[1]):
        raise Invalid(f"two time zones are given: {match[1]} and {tz}", "give one")
    zone = match[1] if match else tz
    zone_of(zone)
    return (match[2] if match else cron), zone or local_zone(now)


def runs_of(schedule: Schedule, after: float) -> Iterator[float]:
    cron, zone = parse_cron(schedule.cron), zone_of(schedule.tz)
    start = epoch(schedule.created_at) if cron.every else 0.0
    while (after := first_run(cron, after, zone, start)) < math.inf:
        yield after


def run_after(schedule: Schedule, now: float) -> str:
    """A schedule's first run after a moment, as stored; Invalid if it has none."""
    for run in runs_of(schedule, now):
        return iso(run)
    raise Invalid(f"{schedule.cron!r} never comes", "choose another time")


# ---- 5 Fields ----------------------------------------------------------------
# One row defines a job's field, a filter or a setting: checks, flags, schemas and help
# are generated from it. Then parsers of job objects. Nothing here reads the queue.

_ENV_NAME = "[A-Za-z_][A-Za-z0-9_]*"


def as_utf8(text: str) -> str:
    """Text from the system, which has surrogates in an ASCII locale; UnicodeError."""
    return text if is_text(text) else os.fsencode(text).decode()


def word_bytes(word: str) -> bytes:
    """The bytes of an argument, whatever the locale; UnicodeError."""
    try:
        return os.fsencode(word)
    except UnicodeEncodeError:  # a program's own text, where the locale is ASCII
        return word.encode()


def shell_word(word: bytes) -> str:
    """A word that a POSIX shell expands to exactly these bytes."""
    import shlex  # 1 ms
    with contextlib.suppress(UnicodeDecodeError):
        return shlex.quote(word.decode())
    if word.endswith(b"\n"):    # $(...) strips it
        raise Invalid(f"{word!a} is not UTF-8 and ends with a newline",
                      "rename the file: a command cannot hold such a name", "command")
    printed = re.sub(r"[^A-Za-z0-9_./ ]", lambda byte: f"\\{ord(byte[0]):03o}",
                     word.decode("latin-1"))
    return f"\"$(printf '{printed}')\""


def shell_command(words: Iterable[bytes]) -> str:
    return " ".join(map(shell_word, words))


def _command(value: Any) -> str:
    if not is_text(value) or not value.strip():
        raise Invalid("empty or not text",
                      "give a shell command, in UTF-8 and without NUL")
    size = len(value.encode())
    if size > MAX_TEXT:
        raise Invalid(f"{size:,} bytes long, more than the {MAX_TEXT:,} that can "
                      "be started", "put it into a script and enqueue that")
    return str(value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, (str, list, tuple)):
        raise Invalid(f"{value!r} is not a list of names", NAME_FORM)
    names = [value] if isinstance(value, str) else value
    return tuple(dict.fromkeys(map(parse_name, names)))


def _text(least: int, most: int) -> Callable[[Any], str]:
    def parse(value: Any) -> str:
        if not is_text(value) or not least <= len(value) <= most:
            raise Invalid(f"{str(value)[:80]!r} is not text of {least} to {most:,} "
                          "characters")
        return str(value)
    return parse


def _env(value: Any) -> dict[str, str]:
    if not isinstance(value, dict):
        raise Invalid(f"{value!r} is not an object", 'use {"NAME": "value"}')
    total = 0
    for name, text in value.items():
        if not isinstance(name, str) or not re.fullmatch(_ENV_NAME, name):
            raise Invalid(f"invalid variable name {name!r}", "use A-Z a-z 0-9 _")
        if not is_text(text):
            raise Invalid(f"the value of {name} is not text", "put it in quotes")
        size = len(f"{name}={text}".encode())
        total += size
        if size > MAX_TEXT or total > MAX_ENV:
            raise Invalid(
                f"{name} is too long: at most {MAX_TEXT:,} bytes each, {MAX_ENV:,} in "
                "all", "put the value into a file and give its name")
    return value


def _directory(value: Any) -> str:
    if not is_text(value) or not value:
        raise Invalid(f"{value!r} is not a directory's path")
    return os.path.abspath(str(value))      # it need not exist before the job runs


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise Invalid(f"{value!r} is neither true nor false")
    return value


def _time_text(text: str) -> str:
    """The text of a time, checked; `checked` needs to see whether it is `+DUR`."""
    parse_time(text, time.time())
    return text


def _or_null(schema: Mapping[str, Any]) -> dict[str, Any]:
    kinds = schema["type"]
    return {**schema, "type": [*([kinds] if isinstance(kinds, str) else kinds), "null"]}


# JSON Schema. A pattern ignores numbers. Those of durations and dates are narrower than
# the parsers: a pattern cannot bound a sum, or the days of a month.
_SPAN_PART = "[0-9]{1,6}([.][0-9]{1,3})?(ms|s|m)|[0-9]{1,4}([.][0-9]{1,3})?(h|d)"
SPAN_FORM = f"({_SPAN_PART}){{1,3}}|[0-9]{{1,9}}([.][0-9]{{1,3}})?"
_DATE_FORM = ("^20[0-9]{2}-(0[1-9]|1[0-2])-(0[1-9]|1[0-9]|2[0-8])"
              "T([01][0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{3})?)?Z$")
_NO_NUL = "^[^\\u0000]+$"
_TEXT, _WHOLE, _REAL = {"type": "string"}, {"type": "integer"}, {"type": "number"}
_STAMP = {"type": "string", "format": "date-time"}
_AMOUNT = {"type": "integer", "minimum": 0}
_STATE = {"type": "string", "enum": list(STATES)}
NAME_SCHEMA = {"type": "string", "pattern": f"^{_NAME}$"}


class Kind(NamedTuple):
    """What the values of a field may be."""
    parse: Callable[..., Any]           # a value of JSON, a flag or a query
    input: dict[str, Any] = {}          # JSON Schema of what it accepts
    output: dict[str, Any] = {}         # JSON Schema of what replies contain
    flag: dict[str, Any] = {}           # argparse settings; `type` raises Invalid
    is_timed: bool = False              # `parse` also takes the present time

    def value(self, given: Any, now: float) -> Any:
        return self.parse(given, now) if self.is_timed else self.parse(given)


class Field(NamedTuple):
    """A key of a job object, a filter, a parameter of a query, or a setting."""
    name: str
    kind: Kind
    uses: str = ""      # of a job: e enqueue, u edit, s schedule; k: kept by the queue
    help: str = ""
    group: str = ""     # of the help
    flags: tuple[str, ...] = ()     # where not --name
    default: str = ""   # of a setting


def _whole(least: int, output: dict[str, Any], most: int = MAX_WHOLE) -> Kind:
    def parse(value: Any) -> int:
        # JSON has one kind of number, so 5.0 is the whole number 5.
        if type(value) not in (int, float) or value % 1 or not least <= value <= most:
            raise Invalid(f"{value!r} is not a whole number from {least} to {most}")
        return int(value)
    return Kind(parse, {"type": ["integer", "null"], "minimum": least,
                        "maximum": most}, output,
                {"metavar": "N", "type": lambda text: parse_whole(text, least, most)})


_ID = Kind(parse_name, _or_null(NAME_SCHEMA), NAME_SCHEMA, {"metavar": "ID"})
_TAGS = Kind(_names, {"type": ["array", "string", "null"], "items": NAME_SCHEMA,
                      "pattern": f"^{_NAME}$"}, {"type": "array", "items": NAME_SCHEMA},
             {"action": "append", "metavar": "T"})
_NEEDS = _TAGS._replace(flag={"action": "append", "metavar": "ID"})
_UNIQUE = Kind(
    _text(1, MAX_KEY), {"type": ["string", "null"], "minLength": 1,
                        "maxLength": MAX_KEY, "pattern": _NO_NUL},
    _or_null(_TEXT), {"metavar": "KEY"})
_SPAN = Kind(
    parse_duration, {"type": ["number", "string", "null"], "minimum": 0,
                     "maximum": MAX_DURATION, "pattern": f"^({SPAN_FORM})$"},
    _or_null(_REAL), {"metavar": "DUR", "type": parse_duration})
_CODES = {"type": ["string", "integer", "null"], "minimum": 0, "maximum": 255,
          "pattern": f"^({CODES_FORM})$"}
_TIME = Kind(
    parse_time, {"type": ["string", "number", "null"], "minimum": 0,
                 "maximum": MAX_DURATION, "pattern": _DATE_FORM}, _STAMP,
    {"metavar": "TIME", "type": _time_text}, is_timed=True)


# In the order and the groups of the help. The last group is ignored, so that the output
# of `show --json` is valid input.
FIELDS = {field.name: field._replace(group=group) for group, fields in {
    "the job": (
        Field("command", Kind(
            _command, {"type": "string", "minLength": 1, "maxLength": MAX_TEXT,
                       "pattern": "^[^\\u0000]*[^\\u0000\\s][^\\u0000]*$"},
            _TEXT, {"metavar": "C"}), "eu", "the shell command"),
        Field("id", _ID, "e", "the id (default: job-N)"),
        Field("queue", _ID._replace(flag={"metavar": "Q"}), "eus",
              "the queue (default: default)"),
        Field("tags", _TAGS, "es", "a tag; repeatable", flags=("--tag",)),
        Field("unique", _UNIQUE, "es",
              "add nothing while a job with this key is unfinished"),
        Field("once", _UNIQUE, "e",
              "add nothing while any job with this key exists, in any state"),
        Field("env", Kind(
            _env, {"type": ["object", "null"], "additionalProperties": {
                "type": "string", "pattern": "^[^\\u0000]*$"},
                "propertyNames": {"pattern": f"^{_ENV_NAME}$"}},
            {"type": "object", "additionalProperties": _TEXT},
            {"action": "append", "metavar": "K=V"}), "es",
              "a variable for the command; K: copy it from here; repeatable"),
        Field("cwd", Kind(_directory, {"type": ["string", "null"], "minLength": 1,
                                       "pattern": _NO_NUL}, _TEXT, {"metavar": "DIR"}),
              "es", "the working directory (default: the current one)")),
    "when it runs": (
        Field("priority", _whole(-MAX_WHOLE, _WHOLE), "eus",
              "higher first (default: 0)", flags=("--priority", "-p")),
        Field("slots", _whole(1, _AMOUNT, MAX_SLOTS), "eus",
              "slots of a worker, or GPUs, that it takes (default: 1)"),
        Field("delay", _SPAN, "eu", "not before this time has passed"),
        Field("run_at", _TIME, "eu",
              "not before: ISO 8601, epoch seconds, +DUR or HH:MM"),
        Field("after", _NEEDS, "e", "run once that job is completed; repeatable"),
        Field("after_any", _NEEDS, "e",
              "run once that job has finished, with any outcome; repeatable"),
        Field("expires", _SPAN, "es", "cancel it if it has not started by then"),
        Field("expires_at", _TIME._replace(output=_or_null(_STAMP)), "e",
              "the same, as a time"),
        Field("held", Kind(_flag, {"type": ["boolean", "null"]}, {"type": "boolean"},
                           {"action": "store_true", "default": None}), "e",
              "wait until it is released", flags=("--hold",))),
    "how it ends": (
        Field("max_retries", _whole(0, _AMOUNT), "eus",
              "runs that may fail, including the first (default: as configured)"),
        Field("timeout", _SPAN, "eus",
              "end a run after this time; 0: never (default: as configured)"),
        Field("backoff_base", _SPAN, "es",
              "wait after the first failure; doubles (default: as configured)"),
        Field("backoff_max", _SPAN, "es", "no wait is longer (default: as configured)"),
        Field("no_retry_on", Kind(
            lambda value: parse_codes(value) and str(
                int(value) if isinstance(value, float) else value), _CODES,
            _or_null(_TEXT), {"metavar": "CODES"}), "es",
              "exit statuses after which it is dead at once, as 2,64-78")),
    "": (Field(name, Kind(lambda value: value, {
        "description": "maintained by the queue: ignored"}, schema), "k")
        for name, schema in (
        ("state", _STATE), ("attempts", _AMOUNT), ("created_at", _STAMP),
        ("updated_at", _STAMP), ("crashes", _AMOUNT), ("worker", _or_null(_TEXT)),
        ("started_at", _or_null(_STAMP)), ("finished_at", _or_null(_STAMP)),
        ("exit_code", _or_null(_WHOLE)), ("error", _or_null(_TEXT)),
        ("runs", {}), ("waiting_for", {})))}.items() for field in fields}
# In column order; `show` adds `runs` and `waiting_for`.
JSON_KEYS = tuple(name for name in Job._fields
                  if name in FIELDS and FIELDS[name].kind.output)
SCHEDULE_TAG = "schedule:"      # and the schedule's name: a tag of each of its jobs

# Filters of jobs: flags of commands and parameters of the API; Sql.FILTERS has their
# clauses. In a query, blank text is no filter.
_BLANK_OR_NAME = Kind(parse_name, {"type": "string", "pattern": f"^({_NAME})?$"})
FILTERS = {field.name: field for field in (
    Field("state", Kind(
        parse_states,
        {"type": "array", "items": {"type": "string", "pattern":
                                    "^(({0})(,({0}))*)?$".format("|".join(STATES))}},
        flag={"action": "extend", "metavar": "S", "type": parse_states}),
        help="one of " + ", ".join(STATES) + "; repeatable, or S,S",
        flags=("--state", "-s")),
    Field("queue", _BLANK_OR_NAME._replace(flag={"metavar": "Q"}),
          help="only of this queue"),
    Field("tag", _BLANK_OR_NAME._replace(flag={"metavar": "T"}),
          help="only with this tag"),
    Field("search", Kind(_text(0, MAX_SEARCH), {
        "type": "string", "maxLength": MAX_SEARCH, "pattern": "^[^\\u0000]*$"},
        flag={"metavar": "TEXT"}), help="text in the id, the command or the error"),
    Field("exit_code", Kind(
        parse_codes, {"type": ["string", "integer"], "minimum": 0, "maximum": 255,
                      "pattern": f"^({CODES_FORM})?$"},
        flag={"metavar": "CODES", "type": parse_codes}),
        help="only if the last run exited with one of these"),
    Field("since", Kind(
        parse_past, {"type": "string", "pattern":
                     f"^({SPAN_FORM})?$|{_DATE_FORM.replace('^20[0-9]', '^20[01]')}"},
        flag={"metavar": "TIME", "type": lambda text: parse_past(text, time.time())},
        is_timed=True),
        help="only if added, started, ended or edited since then, or within DUR"))}
SELECTORS = tuple(name for name in FILTERS if name != "state")


def _off_or(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text in ("none", "") else parse(text)


def _between(least: float, most: float = MAX_DURATION) -> Callable[[str], float]:
    def parse(text: str) -> float:
        seconds = parse_duration(text)
        if seconds < least:
            raise Invalid(f"{text!r} is too short", f"use at least {least}s")
        if seconds > most:
            raise Invalid(f"{text!r} is too long", f"use at most {span(most)}")
        return seconds
    return parse


def _absolute(text: str) -> str:
    if not is_text(text) or not os.path.isabs(text):
        raise Invalid(f"{text!r} is not an absolute path", "begin it with /")
    return text


_SPAN_OR_NONE, _COMMAND_OR_NONE = _off_or(parse_duration), _off_or(str)
# Fields of `Settings`; values are text, as a user sets them and as stored.
SETTINGS = {name: Field(name, Kind(parse), help=help, default=default)
            for name, default, parse, help in (
    ("max-retries", "3", parse_whole,
     "runs that may fail before a job is dead, including the first"),
    ("backoff-base", "2s", parse_duration,
     "wait after the first failure; doubled after each further one"),
    ("backoff-max", "1h", parse_duration, "no retry waits longer"),
    ("backoff-jitter", "0", parse_share,
     "random share of the wait, 0 to 1"),
    ("timeout", "none", _SPAN_OR_NONE, "a run is ended after this time"),
    ("kill-grace", "5s", parse_duration, "time between SIGTERM and SIGKILL"),
    ("shell", "/bin/sh", _absolute, "runs the commands, as SHELL -c COMMAND"),
    ("output-limit", "64KiB", parse_size,
     "output kept of a run: its beginning and its end"),
    ("output-dir", "none", _off_or(_absolute),
     "directory for the whole output of each run (ID.RUN.log), which is never deleted"),
    ("retention-completed", "none", _SPAN_OR_NONE,
     "completed jobs are deleted after this time"),
    ("retention-dead", "none", _SPAN_OR_NONE, "dead jobs are deleted after this time"),
    # Each heartbeat is a commit with an fsync, even if the worker is idle.
    ("heartbeat", "5s", _between(0.1), "how often a worker shows that it is alive"),
    ("lease", "30s", _between(1),
     "a worker without a heartbeat for this time (or for 3) loses its jobs"),
    ("crash-limit", "5", lambda text: parse_whole(text, 1),
     "lost runs after which a job is dead"),
    ("on-completed", "none", _COMMAND_OR_NONE,
     "shell command after each completed job"),
    ("on-dead", "none", _COMMAND_OR_NONE, "shell command after each dead job"),
    ("on-idle", "none", _COMMAND_OR_NONE, "shell command when no job is left"),
    # 30 days in milliseconds by MAX_WHOLE is 2.6e18: `rank_of` stays below 2 ** 63.
    ("priority-ageing", "none", _off_or(_between(1, 30 * 86400)),
     "waiting time that raises a job's priority by one"))}


def setting_key(key: str) -> str:
    """The key as in SETTINGS, from either spelling; else NotFound."""
    name = key.replace("_", "-")
    if name not in SETTINGS:
        raise NotFound("no-such-setting", f"there is no setting {key!r}",
                       nearest(name, SETTINGS) or "`queuectl config list` shows them")
    return name


def settings_of(stored: Mapping[str, str]) -> Settings:
    return Settings(*(setting.kind.parse(stored.get(key, setting.default))
                      for key, setting in SETTINGS.items()))


def parse_keys(text: str) -> list[str]:
    """The keys of `id,exit-code`, each one of JSON_KEYS; else Invalid."""
    keys = text.replace("-", "_").split(",")
    if unknown := [key for key in keys if key not in JSON_KEYS]:
        raise Invalid(f"a job has no field {unknown[0]!r}",
                      "it has " + ", ".join(JSON_KEYS))
    return keys


def field_value(field: Field, value: Any, now: float = 0.0) -> Any:
    """A field's value, checked; Invalid names the field as its key."""
    try:
        return field.kind.value(value, now)
    except Invalid as error:
        raise Invalid(f"{field.name}: {error.message}", error.hint, field.name) \
            from None


def refuse_expired(run_at: str, expires_at: str | None) -> None:
    if expires_at and expires_at <= run_at:
        raise Invalid("run_at: the job expires before it is due",
                      "give an earlier time, or let it expire later", "run_at")


def checked(fields: Mapping[str, Any], now: float, use: str = "e") -> dict[str, Any]:
    """The columns that the keys of a job object set; Invalid names the key at fault.
    `use` is "e" for a new job, "u" for an edit, which refuses null (the default).
    """
    if not isinstance(fields, dict):
        raise Invalid("a job is a JSON object", 'it looks like {"command": "echo hi"}',
                      "command")
    found: dict[str, Any] = {}
    for given, value in fields.items():
        key = given.replace("-", "_") if isinstance(given, str) else given
        field = FIELDS.get(key)
        if field is None or (use == "u" and "u" not in field.uses):
            known = [name for name, one in FIELDS.items() if use in one.uses]
            raise Invalid(f"{key} cannot be edited" if field
                          else f"unknown key {given!r}", nearest(str(key), known)
                          or "use one of: " + ", ".join(known), str(given))
        if key in found:
            raise Invalid(f"{key} is given twice", "give it once", key)
        if use in field.uses and (value is not None or use == "u"):
            found[key] = field_value(field, value, now)
            # After the clock is set back, a delay restarts and a time stays.
            if key == "run_at":
                found["at_time"] = not (isinstance(value, str)
                                        and value.strip().startswith("+"))
    for span_key, key in ("delay", "run_at"), ("expires", "expires_at"):
        if span_key in found and key in found:
            raise Invalid(f"{span_key} and {key} are both given", "give one", span_key)
        if span_key in found:
            found[key] = now + found.pop(span_key)
            found.update({"at_time": False} if key == "run_at" else {})
        if key in found:
            found[key] = iso_up(found[key])
    refuse_expired(found.get("run_at", ""), found.get("expires_at"))
    return found


def new_job(fields: Mapping[str, Any], now: float) -> Job:
    """The job that a JSON object describes; Invalid as in `checked`."""
    job = Job(**checked(fields, now))
    if not job.command:
        raise Invalid("the job has no command", 'give {"command": "..."} at least',
                      "command")
    return job


def ignored_keys(fields: Mapping[str, Any]) -> list[str]:
    """The keys of a job object that the queue maintains; the user is warned."""
    return [key for key in fields if "k" in FIELDS[key.replace("-", "_")].uses]


def is_json(text: str) -> bool:
    """Return False for a shell's `{ list; }`, `[ test ]`, `[[ test ]]`: these need a
    blank after the bracket; JSON with one continues otherwise.
    """
    return bool(re.match(r'\s*(\{(\S|\s*["}]|\s*$)|\[(["\d]|\s*([{\]\n]|$)))', text))


def _objects_of(value: Any) -> list[dict[str, Any]]:
    values = value if isinstance(value, list) else [value]
    for number, item in enumerate(values, 1):
        if not isinstance(item, dict):
            raise Invalid(f"item {number} is not a JSON object",
                          'each looks like {"command": "echo hi"}', "command")
    return values


def fields_of(text: str) -> list[dict[str, Any]]:
    """The job objects, unchecked, in an argument or a line: an object, an array, or a
    command. Invalid JSON is no command: to run it would hide the mistake.
    """
    if not is_json(text):
        return [{"command": text.strip()}]
    try:
        return _objects_of(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise Invalid(f"not valid JSON ({error})",
                      'a job object looks like {"command": "echo hi"}',
                      "command") from None


def items(objects: Iterable[dict[str, Any]]) -> list[Given]:
    return [(fields, f"item {number}") for number, fields in enumerate(objects, 1)]


@contextlib.contextmanager
def at_place(place: str) -> Iterator[None]:
    try:
        yield
    except Invalid as error:
        error.name_place(place)
        raise


_MARK = re.compile(rb"\{#?\}")


class Lines:
    """Makes job objects from lines, or from items that end with NUL. In a template,
    `words`, the line replaces `{}`, its number `{#}`; it is always one argument, by
    default the last. `fields` are those of each job; `copied` variables stay as they
    are.
    """

    def __init__(self, null: bool = False, words: Sequence[bytes] = (),
                 fields: Mapping[str, Any] = {}, copied: Collection[str] = ()) -> None:
        self.end = b"\0" if null else b"\n"
        has_mark = any(b"{}" in word for word in words)
        self._words = [*words] if has_mark or not words else [*words, b"{}"]
        self._null, self._fields, self._copied = null, fields, copied
        self._lines = self._items = 0       # items: lines that are not empty

    def read(self, line: bytes) -> list[Given]:
        """The job objects of the next line; Invalid names the line."""
        self._lines += 1
        self._items += bool(line)
        place = f"item {self._items}" if self._null else f"line {self._lines}"
        with at_place(place):
            if self._words:
                return [(self._filled(line), place)] if line else []
            try:
                text = line.decode("utf-8-sig").strip()     # may begin with a BOM
            except UnicodeDecodeError as error:
                raise Invalid(
                    f"not UTF-8 ({error.reason} at byte {error.start})",
                    "JSON and shell commands are UTF-8; names in any encoding: "
                    "`enqueue - -- PROG ARG...`", "command") from None
            is_job = text and not text.startswith("#")
            return [(fields, place) for fields in fields_of(text)] if is_job else []

    def _filled(self, item: bytes) -> dict[str, Any]:
        if b"\0" in item:
            raise Invalid("an argument cannot hold a NUL",
                          "--null reads items that end with NUL", "command")

        def filled(text: bytes, item: bytes = item) -> bytes:
            return _MARK.sub(lambda mark: item if mark[0] == b"{}"
                             else b"%d" % self._items, text)

        def filled_field(key: str, value: Any) -> Any:
            if isinstance(value, dict):
                return {name: text if name in self._copied else filled_field(key, text)
                        for name, text in value.items()}
            if isinstance(value, list):
                return [filled_field(key, text) for text in value]
            try:
                return filled(value.encode()).decode()
            except UnicodeDecodeError:
                if key in ("unique", "once"):
                    return filled(value.encode(), ascii(item).encode()).decode()
                raise Invalid(f"{key}: {item!a} is not UTF-8",
                              "only the command can hold such a name", key) from None

        command = [shell_word(filled(word)) for word in self._words]
        for place, word in enumerate(self._words):
            # An unquoted item could be a keyword or an assignment of the shell.
            if _MARK.search(word) and command[place][0] not in "'\"" \
                    and (place == 0 or "=" in command[place]):
                command[place] = f"'{command[place]}'"
        fields = {key: filled_field(key, value)
                  if key in ("id", "unique", "once", "tags", "env") else value
                  for key, value in self._fields.items()}
        return {**fields, "command": " ".join(command), "env": {
            **fields.get("env", {}), "QUEUECTL_ITEM": str(self._items)}}


def jobs_in(content: bytes, lines: Lines | None = None) -> Iterator[Given]:
    """The job objects of a file: one JSON value of several lines, else those of each
    line. Invalid names the line at fault.
    """
    # By the first bytes, few files need to be tried as one JSON value.
    if lines is None and b"\n" in content.strip() \
            and content[:200].lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"[", b"{"):
        whole = None
        with contextlib.suppress(ValueError, RecursionError):
            whole = json.loads(content.decode("utf-8-sig"))
        if whole is not None:
            yield from items(_objects_of(whole))
            return
    lines = lines or Lines()
    # Not splitlines(): a command may contain a CR.
    for line in content.split(lines.end):
        yield from lines.read(line)


# ---- 6 SQL -------------------------------------------------------------------
# Every statement. Only constants of this file are formatted into one, never a value.
# Frequent statements use an index and sort nothing (tests check it): with a million
# jobs a claim takes 7 us, by a wrong index 170 ms.

def _list(words: Iterable[str]) -> str:
    """Constants as SQL literals: CHECKs and indexes take no parameters."""
    return ", ".join(f"'{word}'" for word in words)


def _insert(table: str, *keys: str) -> str:
    return (f"INSERT INTO {table} ({', '.join(map(json.dumps, keys))}) "
            f"VALUES ({', '.join(f':{key}' for key in keys)})")


def _upsert(table: str, key: str, value: str) -> str:
    return (f"{_insert(table, key, value)} "
            f"ON CONFLICT ({key}) DO UPDATE SET {value} = excluded.{value}")


def _set(keys: str) -> str:
    return "SET " + ", ".join(f"{key} = :{key}" for key in keys.split())


# The orders of lists. Each ends with seq, so it is total and a page can continue. For
# one finished state, newest, oldest, finished, ended and state use an index.
ORDERS = {
    "newest":   "seq DESC",
    "oldest":   "seq",
    "priority": "priority DESC, run_at, seq",
    "run-at":   "run_at, seq",
    "finished": "finished_at DESC NULLS LAST, seq DESC",
    "ended":    "finished_at NULLS FIRST, seq",
    "queue":    "queue, seq DESC",
    "state":    "state, seq DESC",
}
END_OF_TIME = 1 << 62   # a seq above all others


# Output may be 16 MiB a run.
_RUN_WITHOUT_OUTPUT = ", ".join(
    "x'' AS output" if field == "output" else f"runs.{field}" for field in Run._fields)


class Sql:
    """Every statement the program runs. A partial index serves only statements with
    its literals, not with a parameter in their place.
    """

    # `counters`: the last number used in each table; none is used again (I4).
    #   AUTOINCREMENT would write at each INSERT.
    # `waits` and `rank` follow from other columns. They are for the indexes, which hold
    #   ready jobs in order: with scheduled jobs in the same index, 100,000 jobs for
    #   tomorrow cost each claim 13 ms. A change of state writes to each index of the
    #   job, so most are partial. jobs_delayed is for a clock that was set back.
    # `counts`, `runs`, `unmet`: to count a million jobs by state takes 100 ms even by
    #   an index.
    # `unblocking`: completed jobs with very many dependents; those above `after` still
    #   count the job as unmet.
    SCHEMA = f"""
        CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
        CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;

        CREATE TABLE jobs (
            seq INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, command TEXT NOT NULL,
            state TEXT NOT NULL CHECK (state IN ({_list(STATES)})),
            attempts INTEGER NOT NULL DEFAULT 0, max_retries INTEGER NOT NULL,
            created_at TEXT NOT NULL, updated_at TEXT NOT NULL, queue TEXT NOT NULL,
            priority INTEGER NOT NULL DEFAULT 0, run_at TEXT NOT NULL,
            timeout REAL, backoff_base REAL, after TEXT NOT NULL DEFAULT '[]',
            "unique" TEXT, tags TEXT NOT NULL DEFAULT '[]',
            env TEXT NOT NULL DEFAULT '{{}}', cwd TEXT NOT NULL,
            crashes INTEGER NOT NULL DEFAULT 0, worker TEXT,
            started_at TEXT, finished_at TEXT, exit_code INTEGER, error TEXT,
            waits TEXT CHECK (waits IN ({_list(WAITS)})),
            rank INTEGER NOT NULL DEFAULT 0, claim INTEGER, end_requested TEXT,
            runs INTEGER NOT NULL DEFAULT 0, unmet INTEGER NOT NULL DEFAULT 0,
            after_any TEXT NOT NULL DEFAULT '[]',
            once TEXT, slots INTEGER NOT NULL DEFAULT 1, backoff_max REAL,
            no_retry_on TEXT, expires_at TEXT, held INTEGER NOT NULL DEFAULT 0,
            at_time INTEGER NOT NULL DEFAULT 0,
            CHECK ((state = '{PROCESSING}') = (claim IS NOT NULL)),
            CHECK ((claim IS NULL) = (worker IS NULL)),
            CHECK ((state IN ({_list(WAITING)})) = (waits IS NOT NULL)),
            CHECK (end_requested IS NULL OR claim IS NOT NULL)
        );
        CREATE INDEX jobs_by_state ON jobs (state, seq);
        CREATE INDEX jobs_in_line ON jobs (rank, run_at, seq) WHERE waits = 'ready';
        CREATE INDEX jobs_in_queue ON jobs (queue, rank, run_at, seq)
            WHERE waits = 'ready';
        CREATE INDEX jobs_by_time ON jobs (run_at) WHERE waits = 'scheduled';
        CREATE INDEX jobs_delayed ON jobs (updated_at)
            WHERE waits = 'scheduled' AND at_time = 0;
        CREATE INDEX jobs_blocked ON jobs (seq) WHERE waits = 'blocked';
        CREATE INDEX jobs_held ON jobs (seq) WHERE waits = 'held';
        CREATE INDEX jobs_by_expiry ON jobs (expires_at)
            WHERE expires_at IS NOT NULL AND waits IS NOT NULL;
        CREATE UNIQUE INDEX jobs_by_claim ON jobs (claim) WHERE claim IS NOT NULL;
        CREATE UNIQUE INDEX jobs_by_unique ON jobs ("unique")
            WHERE "unique" IS NOT NULL AND (waits IS NOT NULL OR claim IS NOT NULL);
        CREATE UNIQUE INDEX jobs_by_once ON jobs (once) WHERE once IS NOT NULL;
        CREATE INDEX jobs_by_end ON jobs (state, finished_at)
            WHERE waits IS NULL AND claim IS NULL;

        CREATE TABLE runs (
            claim INTEGER PRIMARY KEY, job INTEGER NOT NULL, number INTEGER NOT NULL,
            worker_id INTEGER NOT NULL, worker TEXT NOT NULL, slot INTEGER NOT NULL,
            started_at TEXT NOT NULL, finished_at TEXT, duration REAL,
            outcome TEXT CHECK (outcome IN ({_list(OUTCOMES)})),
            exit_code INTEGER, error TEXT, output_bytes INTEGER NOT NULL DEFAULT 0,
            output BLOB NOT NULL DEFAULT x'', slots TEXT NOT NULL DEFAULT '', gpus TEXT,
            CHECK ((finished_at IS NULL) = (outcome IS NULL))
        );
        CREATE INDEX runs_by_job ON runs (job);

        CREATE TABLE events (
            seq INTEGER PRIMARY KEY, job INTEGER NOT NULL, "from" TEXT,
            "to" TEXT NOT NULL, at TEXT NOT NULL, reason TEXT
        );
        CREATE INDEX events_by_job ON events (job);

        CREATE TABLE dependencies (
            needs INTEGER NOT NULL, job INTEGER NOT NULL,
            any_outcome INTEGER NOT NULL DEFAULT 0, PRIMARY KEY (needs, job)
        ) WITHOUT ROWID;
        CREATE INDEX dependencies_by_job ON dependencies (job);
        CREATE TABLE unblocking (needs INTEGER PRIMARY KEY, after INTEGER NOT NULL);

        CREATE TABLE tags (
            tag TEXT NOT NULL, job INTEGER NOT NULL, PRIMARY KEY (tag, job)
        ) WITHOUT ROWID;
        CREATE INDEX tags_by_job ON tags (job);

        CREATE TABLE queues (
            name TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0,
            job_limit INTEGER NOT NULL DEFAULT 0
        ) WITHOUT ROWID;

        CREATE TABLE schedules (
            name TEXT PRIMARY KEY, cron TEXT NOT NULL, job TEXT NOT NULL,
            paused INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL,
            next_run TEXT, last_run TEXT, last_job INTEGER, tz TEXT,
            skipped INTEGER NOT NULL DEFAULT 0, last_success TEXT,
            catch_up INTEGER NOT NULL DEFAULT 1, last_state TEXT
        ) WITHOUT ROWID;

        CREATE TABLE workers (
            id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, host TEXT NOT NULL,
            boot TEXT NOT NULL, pid INTEGER NOT NULL, born TEXT NOT NULL,
            slots INTEGER NOT NULL, queues TEXT NOT NULL, port INTEGER,
            started_at TEXT NOT NULL, heartbeat_at TEXT NOT NULL,
            heartbeats INTEGER NOT NULL DEFAULT 0, stop_requested TEXT,
            gpus TEXT NOT NULL DEFAULT '[]'
        );

        CREATE TABLE counters (
            jobs INTEGER NOT NULL, runs INTEGER NOT NULL, events INTEGER NOT NULL,
            workers INTEGER NOT NULL
        );

        CREATE TABLE counts (
            queue TEXT NOT NULL, state TEXT NOT NULL,
            n INTEGER NOT NULL CHECK (n >= 0), PRIMARY KEY (queue, state)
        ) WITHOUT ROWID;

        CREATE TABLE tallies (
            minute INTEGER NOT NULL, queue TEXT NOT NULL, kind TEXT NOT NULL,
            bucket INTEGER NOT NULL, n INTEGER NOT NULL, total REAL NOT NULL DEFAULT 0,
            PRIMARY KEY (minute, queue, kind, bucket)
        ) WITHOUT ROWID;"""

    # Written when the database is created: `id` and `created_at`.
    INSERT_META = _insert("meta", "key", "value")
    META = "SELECT value FROM meta WHERE key = :key"
    STORED_SETTINGS = "SELECT key, value FROM settings"     # the rest have defaults
    SET = _upsert("settings", "key", "value")
    UNSET = "DELETE FROM settings WHERE key = :key"

    FIRST_COUNTERS = "INSERT INTO counters VALUES (0, 0, 0, 0)"
    COUNTERS = "SELECT jobs, runs, events, workers FROM counters"
    SET_COUNTERS = f"UPDATE counters {_set('jobs runs events workers')}"

    INSERT_JOB = _insert("jobs", *Job._fields)
    JOB = "SELECT * FROM jobs WHERE id = :id"
    JOB_BY_SEQ = "SELECT * FROM jobs WHERE seq = :seq"
    JOB_BY_CLAIM = "SELECT * FROM jobs WHERE claim = :claim AND claim IS NOT NULL"
    JOB_BY_UNIQUE = """
        SELECT * FROM jobs
         WHERE "unique" = :unique
           AND "unique" IS NOT NULL AND (waits IS NOT NULL OR claim IS NOT NULL)"""
    JOB_BY_ONCE = "SELECT * FROM jobs WHERE once = :once AND once IS NOT NULL"
    JOBS_NAMED = "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(:ids))"
    FILTERS = {
        "before": "seq < :before",
        "ahead": "seq NOT IN (SELECT CAST(value AS BIGINT) FROM json_each(:ahead))",
        "queue": "queue = :queue",
        "tag": "seq IN (SELECT job FROM tags WHERE tag = :tag)",
        "search": "({})".format(" OR ".join(
            rf"lower({column}) LIKE lower(:search) ESCAPE '\'"
            for column in ("command", "id", "error"))),
        "exit_code": "exit_code IN (SELECT CAST(value AS BIGINT) "
                     "FROM json_each(:exit_code))",
        "since": "updated_at >= :since",
        "ended_before": "finished_at < :ended_before",
        "ended_at": "(finished_at, seq) > (:ended_at, :ended_seq)",     # to continue
    }

    @classmethod
    def listing(cls, states: Sequence[str], order: str,
                values: Mapping[str, Any]) -> str:
        """The jobs of these states (none: of any) that match the values. Each state is
        a SELECT of its own, by its index: for `state IN` SQLite sorts all rows.
        """
        reads = [f"SELECT * {cls._fitting(some, values)} ORDER BY {order} LIMIT :limit"
                 for some in [[state] for state in states] or [[]]]
        if len(reads) == 1:
            return reads[0]
        return " UNION ALL ".join(
            f"SELECT * FROM ({read}) AS read_{n}" for n, read in enumerate(reads)
            ) + f" ORDER BY {order} LIMIT :limit"

    @classmethod
    def counting(cls, states: Sequence[str], values: Mapping[str, Any]) -> str:
        return f"SELECT COUNT(*) {cls._fitting(states, values)}"

    @classmethod
    def _fitting(cls, states: Sequence[str], values: Mapping[str, Any]) -> str:
        clauses = [cls.FILTERS[key] for key in values if key in cls.FILTERS]
        if states:
            clauses.append(f"state IN ({_list(states)})")
            if {*states} <= {*OVER}:    # the literals of jobs_by_end
                clauses.append("waits IS NULL AND claim IS NULL")
        return "FROM jobs" + " WHERE " * bool(clauses) + " AND ".join(clauses)

    # The oldest ready job. From one rank to the next by the index, a thousand at most:
    # with ageing almost every job has its own rank.
    _OLDEST = """
        SELECT MIN((SELECT MIN(run_at) FROM jobs
                     WHERE waits = 'ready' AND queue = :queue
                       AND jobs.rank = ranks.rank))
          FROM """
    OLDEST_READY = f"""
        WITH RECURSIVE ranks (rank, n) AS (
            SELECT MIN(rank), 1 FROM jobs
             WHERE waits = 'ready' AND queue = :queue
             UNION ALL
            SELECT (SELECT MIN(jobs.rank) FROM jobs
                     WHERE waits = 'ready' AND queue = :queue
                       AND jobs.rank > ranks.rank), n + 1
              FROM ranks
             WHERE rank IS NOT NULL AND n < 1000) {_OLDEST} ranks"""
    # Of the first and the last rank only: enough to see that a job waits long, and
    # quick with any number of ranks.
    OLDEST_ENDS = _OLDEST + """(
            SELECT MIN(rank) AS rank FROM jobs
             WHERE waits = 'ready' AND queue = :queue
             UNION ALL
            SELECT MAX(rank) FROM jobs
             WHERE waits = 'ready' AND queue = :queue) AS ranks"""
    # Due but still scheduled: many only if no worker has run for long.
    OLDEST_DUE = """
        SELECT queue, MIN(run_at)
          FROM (SELECT queue, run_at
                  FROM jobs
                 WHERE waits = 'scheduled' AND run_at <= :now
                 ORDER BY run_at LIMIT 1000) AS due
         GROUP BY queue"""
    COUNT_DUE = """
        SELECT COUNT(*)
          FROM (SELECT 1 FROM jobs
                 WHERE waits = 'ready' AND queue = :queue AND slots <= :widest
                 UNION ALL
                SELECT 1 FROM jobs
                 WHERE waits = 'scheduled' AND run_at <= :now AND queue = :queue
                   AND slots <= :widest
                 LIMIT :most) AS due"""
    COUNT_HELD = "SELECT COUNT(*) FROM jobs WHERE waits = 'held'"
    COUNT_LATER = """
        SELECT COUNT(*)
          FROM (SELECT queue FROM jobs WHERE waits = 'scheduled' AND run_at > :now
                 UNION ALL
                SELECT queue FROM jobs WHERE waits = 'blocked'
                 UNION ALL
                SELECT queue FROM jobs WHERE waits = 'held') AS later
         WHERE CAST(:queue AS TEXT) IS NULL OR queue = :queue"""
    RETRY = """
        SELECT 1 FROM jobs
         WHERE state = 'failed' AND queue = :queue AND waits IN ('ready', 'scheduled')
           AND slots <= :widest
         LIMIT 1"""
    NEXT_DUE = "SELECT * FROM jobs WHERE waits = 'scheduled' ORDER BY run_at LIMIT 1"
    DUE_AT = """
        SELECT MIN(at)
          FROM (SELECT MIN(run_at) AS at FROM jobs WHERE waits = 'scheduled'
                 UNION ALL
                SELECT MIN(next_run) FROM schedules WHERE paused = 0
                 UNION ALL
                SELECT MIN(expires_at) FROM jobs
                 WHERE expires_at IS NOT NULL AND waits IS NOT NULL) AS times"""
    # Is a job ready; is anything due?
    ANY_WORK = """
        SELECT EXISTS (SELECT 1 FROM jobs WHERE waits = 'ready'),
               EXISTS (SELECT 1 FROM jobs WHERE waits = 'scheduled' AND run_at <= :now)
            OR EXISTS (SELECT 1 FROM schedules WHERE paused = 0 AND next_run <= :now)
            OR EXISTS (SELECT 1 FROM jobs WHERE expires_at <= :now
                                            AND waits IS NOT NULL)
            OR EXISTS (SELECT 1 FROM unblocking)
            OR EXISTS (SELECT 1 FROM jobs WHERE waits = 'scheduled' AND at_time = 0
                                            AND updated_at > :ahead)"""
    # (I7)
    MAKE_READY = """
        UPDATE jobs
           SET waits = 'ready'
         WHERE seq IN (SELECT seq
                         FROM jobs
                        WHERE waits = 'scheduled' AND run_at <= :now
                        ORDER BY run_at LIMIT :limit)"""
    EXPIRED = """
        SELECT * FROM jobs
         WHERE expires_at <= :now AND expires_at IS NOT NULL AND waits IS NOT NULL
         ORDER BY expires_at LIMIT :limit"""
    # Delays that began in the future: the clock was set back.
    DELAYED = """
        SELECT * FROM jobs
         WHERE waits = 'scheduled' AND at_time = 0 AND updated_at > :ahead
         ORDER BY updated_at LIMIT :limit"""
    LINE = """
        SELECT * FROM jobs
         WHERE waits = 'ready' AND slots <= :widest
         ORDER BY rank, run_at, seq LIMIT :limit"""
    # For one queue, if the first jobs of LINE cannot be claimed.
    QUEUE_LINE = LINE.replace("'ready'", "'ready' AND queue = :queue")
    # Few rows: jobs that no worker can take come to the front.
    COUNT_WIDE = """
        SELECT COUNT(*), MIN(id)
          FROM (SELECT id, slots FROM jobs
                 WHERE waits = 'ready' AND queue = :queue
                 ORDER BY rank, run_at, seq LIMIT 1000) AS due
         WHERE slots > :widest"""
    BEFORE = """
        SELECT COUNT(*) FROM jobs
         WHERE waits = 'ready' AND queue = :queue
           AND (rank, run_at, seq) < (:rank, :run_at, :seq)"""

    # The only statement that changes a state (I1). With the state alone, a late worker
    # could end a later claim (I3). No claim: 0.
    MOVE = "UPDATE jobs " + _set(
        "state attempts crashes updated_at run_at worker started_at finished_at "
        "exit_code error waits rank claim end_requested runs at_time expires_at "
        "held") + """
         WHERE seq = :seq
           AND state = :source AND COALESCE(claim, 0) = :source_claim"""
    EDIT = "UPDATE jobs " + _set(" ".join(
        name for name in Job._fields if name in FIELDS and "u" in FIELDS[name].uses)
        + " waits rank updated_at at_time held") + """
         WHERE seq = :seq AND state = :state"""
    WAITING = """
        SELECT seq, priority, run_at FROM jobs
         WHERE waits IS NOT NULL AND seq > :after
         ORDER BY seq LIMIT :limit"""
    SET_RANK = "UPDATE jobs SET rank = :rank WHERE seq = :seq"
    REQUEST_END = f"UPDATE jobs {_set('end_requested')} WHERE claim = :claim " \
        "AND claim IS NOT NULL"
    # Before the first signal to a lost run, so that an end its worker records after all
    # counts as a crash (`judged`).
    SEIZE = """
        UPDATE jobs SET end_requested = 'lost'
         WHERE claim = :claim AND claim IS NOT NULL AND end_requested IS NULL"""
    MINE = """
        SELECT claim, end_requested, unmet FROM jobs
         WHERE claim IS NOT NULL AND worker = :worker"""

    # Events are ordered by seq, not by time: clocks are set back.
    INSERT_EVENT = _insert("events", "seq", "job", "from", "to", "at", "reason")
    EVENTS_AFTER = """
        SELECT jobs.id, "from", "to", at, reason, events.seq FROM events
          JOIN jobs ON jobs.seq = events.job
         WHERE events.seq > :after
           AND at >= :since
           AND (CAST(:queue AS TEXT) IS NULL OR jobs.queue = :queue)
         ORDER BY events.seq LIMIT :limit"""

    # `any_outcome`: 0 for `after`, 1 for `after_any`. A missing job is met.
    INSERT_NEED = _insert("dependencies", "needs", "job", "any_outcome")
    DEPENDENTS = """
        SELECT needs, job FROM dependencies
         WHERE needs IN (SELECT CAST(value AS BIGINT) FROM json_each(:needs))
           AND job > :after AND any_outcome BETWEEN :least AND :most
         ORDER BY needs, job LIMIT :limit"""
    MEET = """
        UPDATE jobs
           SET unmet = unmet - 1,
               waits = CASE WHEN waits = 'blocked' AND unmet = 1
                           THEN CASE WHEN run_at > :now THEN 'scheduled'
                                     ELSE 'ready' END
                           ELSE waits END
         WHERE seq = :job AND unmet > 0"""
    # A finished job is retried: dependents that have not begun wait again.
    UNMEET = """
        UPDATE jobs
           SET unmet = unmet + 1,
               waits = CASE WHEN waits IN ('ready', 'scheduled') THEN 'blocked'
                            ELSE waits END
         WHERE seq IN (SELECT job
                         FROM dependencies
                        WHERE needs = :needs AND job <= :upto
                          AND any_outcome >= :least)"""
    UNBLOCKING = "SELECT needs, after FROM unblocking ORDER BY needs"
    SET_UNBLOCKING = _upsert("unblocking", "needs", "after")
    DELETE_UNBLOCKING = "DELETE FROM unblocking WHERE needs = :needs"
    WAITING_DEPENDENT = """
        SELECT jobs.id FROM dependencies
          JOIN jobs ON jobs.seq = dependencies.job
         WHERE dependencies.needs = :needs AND jobs.waits IS NOT NULL
           AND any_outcome <= :most
         LIMIT 1"""
    # The first job that is blocked forever, and how many are: jobs after a dead or
    # cancelled one, or after :caller (the job that runs this command), and the jobs
    # after these; if :held also held jobs.
    STUCK = """
        WITH RECURSIVE stuck (seq) AS (
            SELECT seq FROM jobs WHERE waits = 'held' AND :held = 1
             UNION ALL
            SELECT jobs.seq FROM jobs
             WHERE waits = 'blocked'
               AND EXISTS (SELECT 1
                             FROM dependencies
                             JOIN jobs AS needed ON needed.seq = dependencies.needs
                            WHERE dependencies.job = jobs.seq
                              AND (needed.seq = :caller
                                   OR any_outcome = 0
                                      AND needed.state IN ('dead', 'cancelled')))
             UNION
            SELECT dependencies.job FROM stuck
              JOIN dependencies ON dependencies.needs = stuck.seq
             WHERE EXISTS (SELECT 1
                             FROM jobs
                            WHERE jobs.seq = dependencies.job AND waits = 'blocked')),
             found AS (
            SELECT jobs.seq FROM stuck
             CROSS JOIN jobs
             WHERE jobs.seq = stuck.seq
               AND (CAST(:queue AS TEXT) IS NULL OR queue = :queue)
               AND (CAST(:among AS TEXT) IS NULL OR jobs.seq IN (
                    SELECT CAST(value AS BIGINT) FROM json_each(:among))))
        SELECT jobs.*, (SELECT COUNT(*) FROM found) FROM jobs
         WHERE seq = (SELECT MIN(seq) FROM found)"""
    LAST_NEED_END = """
        SELECT MAX(jobs.finished_at) FROM dependencies
          JOIN jobs ON jobs.seq = dependencies.needs
         WHERE dependencies.job = :job"""

    INSERT_TAG = _insert("tags", "tag", "job")
    # The job last, so that no reader finds a job without its history.
    DELETE_JOB = tuple(f"DELETE FROM {place} = :seq" for place in (
        "runs WHERE job", "events WHERE job", "tags WHERE job",
        "dependencies WHERE job", "dependencies WHERE needs", "unblocking WHERE needs",
        "jobs WHERE seq"))

    # Claims only grow (I4), so they order the runs of a job.
    INSERT_RUN = _insert("runs", *Run._fields[:7], "slots", "gpus")
    _OPEN = "WHERE claim = :claim AND outcome IS NULL"
    BEGIN_RUN = f"UPDATE runs {_set('slot started_at')} {_OPEN}"
    # Stored output is not replaced by less: who records a lost run has none.
    END_RUN = "UPDATE runs " + _set(
        "slot started_at finished_at duration outcome exit_code error") + f""",
               output = CASE WHEN output_bytes > :output_bytes THEN output
                             ELSE :output END,
               output_bytes = CASE WHEN output_bytes > :output_bytes THEN output_bytes
                                   ELSE :output_bytes END
         {_OPEN}"""
    SAVE_OUTPUT = f"UPDATE runs {_set('output output_bytes')} {_OPEN}"
    RUNS = "SELECT * FROM runs WHERE job = :job ORDER BY claim DESC LIMIT :limit"
    RUN = "SELECT * FROM runs WHERE job = :job AND number = :number"
    CLAIMED = """
        SELECT workers.id, workers.slots, jobs.slots, jobs.queue, jobs.seq FROM jobs
          JOIN runs ON runs.claim = jobs.claim
          JOIN workers ON workers.id = runs.worker_id
         WHERE jobs.claim IS NOT NULL
         ORDER BY jobs.claim"""
    LAST_STARTED = """
        SELECT jobs.* FROM runs
          JOIN jobs ON jobs.seq = runs.job
         WHERE runs.slot > 0
         ORDER BY runs.claim DESC LIMIT 1"""
    UNDER_WAY = f"""
        SELECT {_RUN_WITHOUT_OUTPUT} FROM jobs
          JOIN runs ON runs.claim = jobs.claim
         WHERE jobs.claim IS NOT NULL
         ORDER BY jobs.claim"""

    QUEUES = "SELECT name, paused, job_limit FROM queues"
    SET_PAUSED = _upsert("queues", "name", "paused")
    SET_LIMIT = _upsert("queues", "name", "job_limit")
    FORGET_QUEUES = "DELETE FROM queues WHERE paused = 0 AND job_limit = 0"

    INSERT_SCHEDULE = _insert("schedules", *Schedule._fields)
    SCHEDULES = "SELECT * FROM schedules ORDER BY name"
    SET_SCHEDULE = "UPDATE schedules " + _set(
        "cron job tz catch_up paused next_run last_run last_job skipped") + """
         WHERE name = :name"""
    SET_RESULT = """
        UPDATE schedules
           SET last_state = :state,
               last_success = CASE :state WHEN 'completed' THEN :at
                                          ELSE last_success END
         WHERE name = :name"""
    DELETE_SCHEDULE = "DELETE FROM schedules WHERE name = :name"

    INSERT_WORKER = _insert("workers", *Worker._fields[:14])
    WORKERS = "SELECT * FROM workers ORDER BY id"
    STOP_REQUESTED = "SELECT stop_requested FROM workers WHERE id = :id"
    HEARTBEAT = """
        UPDATE workers SET heartbeat_at = :now, heartbeats = heartbeats + 1
         WHERE id = :id"""
    STOP_WORKER = "UPDATE workers SET stop_requested = :stop_requested WHERE id = :id"
    RENAME_WORKER = "UPDATE workers SET name = :name WHERE id = :id"
    DELETE_WORKER = "DELETE FROM workers WHERE id = :id"
    # Also those of lost runs, whose processes may still use them.
    GPUS_IN_USE = """
        SELECT runs.gpus FROM jobs
         CROSS JOIN runs
          LEFT JOIN workers ON workers.id = runs.worker_id
         WHERE jobs.claim IS NOT NULL AND runs.claim = jobs.claim
           AND runs.gpus IS NOT NULL AND runs.worker_id <> :id
           AND COALESCE(workers.host, :host) = :host"""
    # By id, as another worker may have the name. CROSS JOIN makes SQLite begin with the
    # few running jobs, not with all runs (108 ms for 300,000).
    DELETE_IDLE_WORKER = """
        DELETE FROM workers
         WHERE id = :id
           AND NOT EXISTS (SELECT 1
                             FROM jobs
                            CROSS JOIN runs
                            WHERE jobs.claim IS NOT NULL AND runs.claim = jobs.claim
                              AND runs.worker_id = :id)"""
    PORTS = "SELECT port FROM workers WHERE port IS NOT NULL"

    # Completion: what begins with a word lies from :word to :end in an index; `look`
    # limits the rows read, `limit` the result.
    NEWEST_IDS = """
        SELECT seq, id, state, substr(command, 1, 80)
          FROM (SELECT * FROM jobs WHERE state = :state ORDER BY seq DESC LIMIT :look)
            AS newest
         WHERE id >= :word AND id < :end
         LIMIT :limit"""
    IDS_FROM = """
        SELECT seq, id, state, substr(command, 1, 80) FROM jobs
         WHERE id >= :word AND id < :end
         ORDER BY id LIMIT :look"""
    TAGS_FROM = """
        SELECT DISTINCT tag FROM tags
         WHERE tag >= :word AND tag < :end
         ORDER BY tag LIMIT :limit"""
    WORKER_NAMES = "SELECT name, host || ' ' || pid FROM workers ORDER BY name"
    SCHEDULE_NAMES = "SELECT name, cron FROM schedules ORDER BY name"

    # Not by triggers (I8): workers claimed 40% fewer jobs a second. Rows stay at 0, as
    # a metric must not vanish, and is never below, as that must not stop a worker.
    COUNTS = "SELECT queue, state, n FROM counts"
    COUNT = """
        INSERT INTO counts (queue, state, n)
        VALUES (:queue, :state, CASE WHEN :n > 0 THEN :n ELSE 0 END)
            ON CONFLICT (queue, state) DO UPDATE
           SET n = CASE WHEN counts.n + :n > 0 THEN counts.n + :n ELSE 0 END"""
    # Minute 0 is all time.
    TALLY = _insert("tallies", "minute", "queue", "kind", "bucket", "n", "total") + """
            ON CONFLICT (minute, queue, kind, bucket) DO UPDATE
           SET n = tallies.n + excluded.n, total = tallies.total + excluded.total"""
    TALLIES_EVER = "SELECT queue, kind, bucket, n, total FROM tallies WHERE minute = 0"
    TALLIES_SINCE = """
        SELECT queue, kind, bucket, SUM(n), SUM(total) FROM tallies
         WHERE minute >= :minute
         GROUP BY queue, kind, bucket"""
    TALLIES_BY_MINUTE = """
        SELECT minute, kind, bucket, SUM(n), SUM(total) FROM tallies
         WHERE minute >= :first AND minute <= :last
           AND (CAST(:queue AS TEXT) IS NULL OR queue = :queue)
         GROUP BY minute, kind, bucket"""
    # Includes deleted jobs, so that progress does not go back.
    OVER_EVER = """
        SELECT kind, SUM(n) FROM tallies
         WHERE minute = 0
           AND kind IN ('complete', 'bury', 'cancel')
           AND (CAST(:queue AS TEXT) IS NULL OR queue = :queue)
         GROUP BY kind"""
    DELETE_TALLIES = """
        DELETE FROM tallies
         WHERE (minute, queue, kind, bucket) IN (
               SELECT minute, queue, kind, bucket FROM tallies
                WHERE minute > 0 AND minute < :before
                LIMIT :limit)"""

    # For `check`, as they read whole tables: a code, a message for each row found.
    RULES = (
        ("counters", "the counter of {} jobs is wrong (I8)", """
            SELECT queue || '/' || state
              FROM (SELECT queue, state, 1 AS n FROM jobs
                     UNION ALL
                    SELECT queue, state, -n FROM counts) AS both_sides
             GROUP BY queue, state
            HAVING SUM(n) <> 0"""),
        ("counters", "the last number of {} is too low, so it would be used again (I4)",
         " UNION ".join(
             f"SELECT '{table}' FROM counters WHERE {table} < (SELECT MAX({key}) "
             f"FROM {table})" for table, key in (
                 ("jobs", "seq"), ("runs", "claim"), ("events", "seq"),
                 ("workers", "id")))),
        ("claims", "{} is processing, but has no run under way (I2)", """
            SELECT jobs.id FROM jobs
              LEFT JOIN runs ON runs.claim = jobs.claim AND runs.job = jobs.seq
                            AND runs.outcome IS NULL
             WHERE jobs.claim IS NOT NULL AND runs.claim IS NULL"""),
        ("claims", "run number {} is under way, but no job holds its claim (I3)", """
            SELECT runs.claim FROM runs
              LEFT JOIN jobs ON jobs.claim = runs.claim
             WHERE runs.outcome IS NULL AND jobs.seq IS NULL"""),
        ("history", "the state of {} is not where its last event leads (I1)", """
            SELECT jobs.id FROM jobs
              LEFT JOIN events ON events.seq = (SELECT MAX(seq) FROM events
                                                 WHERE job = jobs.seq)
             WHERE COALESCE(events."to", '') <> jobs.state"""),
        ("waits", "{} waits for other jobs, but these are all completed (I7)",
         "SELECT id FROM jobs WHERE waits = 'blocked' AND unmet = 0"),
        ("waits", "{} may be claimed, but what it comes after is not over (I7)",
         "SELECT id FROM jobs WHERE waits IN ('ready', 'scheduled') AND unmet > 0"),
        ("waits", "the number of jobs that {} waits for is wrong (I7)", """
            SELECT jobs.id FROM jobs
              LEFT JOIN dependencies ON dependencies.job = jobs.seq
              LEFT JOIN jobs AS needed ON needed.seq = dependencies.needs
              LEFT JOIN unblocking ON unblocking.needs = dependencies.needs
             GROUP BY jobs.seq
            HAVING jobs.unmet <> COUNT(CASE
                WHEN any_outcome = 0 AND needed.state <> 'completed'
                  OR needed.state IN ('pending', 'failed', 'processing')
                  OR unblocking.after < jobs.seq
                     AND (any_outcome = 1 OR needed.state = 'completed')
                THEN 1 END)"""),
        ("orphans", "there are rows of {}, which is no job", """
            SELECT DISTINCT 'number ' || job
              FROM (SELECT job FROM runs UNION SELECT job FROM events
                     UNION SELECT job FROM tags UNION SELECT job FROM dependencies
                     UNION SELECT needs FROM dependencies) AS belongings
             WHERE job NOT IN (SELECT seq FROM jobs)"""),
    )


# From each older format to the current one. Tables whose CHECKs or keys differ are
# renamed and created again, as ALTER TABLE cannot change these; so are all indexes.
def _rebuilt(tables: Sequence[str], copies: str) -> str:
    return "".join(f"ALTER TABLE {name} RENAME TO old_{name};" for name in tables) \
        + re.sub("(TABLE|INDEX)", r"\1 IF NOT EXISTS", Sql.SCHEMA) + copies \
        + "".join(f"DROP TABLE old_{name};" for name in tables)


UPGRADES = {
    1: _rebuilt(
        ("jobs", "runs", "events", "workers", "schedules", "dependencies"), """
        INSERT INTO counters
        SELECT COALESCE(MAX(CASE name WHEN 'old_jobs' THEN seq END), 0),
               COALESCE(MAX(CASE name WHEN 'old_runs' THEN seq END), 0),
               COALESCE(MAX(CASE name WHEN 'old_events' THEN seq END), 0),
               COALESCE(MAX(CASE name WHEN 'old_workers' THEN seq END), 0)
          FROM sqlite_sequence;
        INSERT INTO runs SELECT *, '', NULL FROM old_runs;
        INSERT INTO events SELECT * FROM old_events;
        INSERT INTO workers SELECT *, '[]' FROM old_workers;
        INSERT INTO schedules SELECT *, NULL, 0, NULL, 1, NULL FROM old_schedules;
        INSERT INTO dependencies SELECT *, 0 FROM old_dependencies;
        INSERT INTO jobs
        SELECT seq, id, command, state, attempts, max_retries, created_at, updated_at,
               queue, priority, run_at, timeout, backoff_base, after, "unique", tags,
               env, cwd, crashes, worker, started_at, finished_at, exit_code, error,
               CASE gate WHEN 'open' THEN 'ready' WHEN 'time' THEN 'scheduled'
                         WHEN 'after' THEN 'blocked' END,
               rank, claim, wish,
               (SELECT COALESCE(MAX(number), 0) FROM runs WHERE job = old_jobs.seq),
               (SELECT COUNT(*)
                  FROM dependencies
                  JOIN old_jobs AS needed ON needed.seq = dependencies.needs
                 WHERE dependencies.job = old_jobs.seq
                   AND needed.state <> 'completed'),
               '[]', NULL, 1, NULL, NULL, NULL, 0,
               COALESCE(gate = 'time' AND state = 'pending', 0)
          FROM old_jobs;"""),
    2: _rebuilt(
        ("jobs",), """
        ALTER TABLE runs ADD COLUMN slots TEXT NOT NULL DEFAULT '';
        ALTER TABLE runs ADD COLUMN gpus TEXT;
        ALTER TABLE dependencies ADD COLUMN any_outcome INTEGER NOT NULL DEFAULT 0;
        ALTER TABLE schedules ADD COLUMN catch_up INTEGER NOT NULL DEFAULT 1;
        ALTER TABLE schedules ADD COLUMN last_state TEXT;
        ALTER TABLE workers ADD COLUMN gpus TEXT NOT NULL DEFAULT '[]';
        INSERT INTO jobs (
               seq, id, command, state, attempts, max_retries, created_at, updated_at,
               queue, priority, run_at, timeout, backoff_base, after, "unique", tags,
               env, cwd, crashes, worker, started_at, finished_at, exit_code, error,
               waits, rank, claim, end_requested, runs, unmet, once, at_time)
        SELECT * FROM old_jobs;"""),
}
SCHEMA_VERSION = 1 + max(UPGRADES)


# ---- 7 SQLite ----------------------------------------------------------------
# The only code that uses sqlite3; it has no rules of the queue. It opens or refuses
# files, runs statements, and turns errors into QueueError, or into Stale for our bugs.

BUSY_DEADLINE = 60.0   # seconds a command waits for the write lock
BRIEF = 0.2            # seconds that `glance` waits for a lock
FILE_PAGE = 4096       # bytes of a page of the database, SQLite's default
READ_AS_IS = "mode=ro&immutable=1"     # without locks, journal, WAL and changes

# What sqlite3 raises: damaged text cannot be decoded, invalid text not encoded.
SqlError = (sqlite3.Error, UnicodeError)


def not_a_queue(path: str) -> Refused:
    return Refused("not-a-queue", f"{path} is not a queuectl database",
                   "give another path with --db")


# By messages, as Python 3.9 has no error codes; its message is empty for damaged text.
_REFUSALS: tuple[tuple[str, Callable[[str, Exception], QueueError]], ...] = (
    ("closed database", lambda path, error: Refused(
        "unsupported", "this queue was closed", "open a new queuectl.Queue")),
    ("locked|busy", lambda path, error: Unavailable(
        "busy", f"{path} is busy: another program holds its write lock",
        "try again, or end that program")),
    ("full", lambda path, error: Unavailable(
        "disk-full", f"no room on the disk for {path}; nothing was changed",
        "free some space and try again")),
    ("not a database|encrypted", lambda path, error: not_a_queue(path)),
    ("malformed|corrupt|decode|^$", lambda path, error: Refused(
        "damaged", f"{path} is damaged", "restore a backup, or save what can be read "
        f"with `sqlite3 {path} .recover`")),
    ("readonly|unable to open|disk i/o", lambda path, error: Unavailable(
        "unwritable", f"cannot use {path} ({error})",
        "check the disk and who may write the file and its directory")),
    ("too big", lambda path, error: Invalid(
        "the text is too long for the database", "shorten it")),
)


def refusal(error: Exception, path: str) -> QueueError | None:
    """The refusal for an error of SQLite; None if it is our bug."""
    if isinstance(error, sqlite3.IntegrityError):
        return None     # it may quote words of _REFUSALS
    if isinstance(error, UnicodeEncodeError):
        return Invalid("the text is not UTF-8", "give valid UTF-8")
    return next((refuse(path, error) for words, refuse in _REFUSALS
                 if re.search(words, str(error).lower())), None)


def system_path(path: str) -> str:
    """A path in UTF-8 as a path of this locale, with the same bytes."""
    return os.fsdecode(path.encode("utf-8", "surrogateescape"))


def _connect(path: str, mode: str, timeout: float = 0.0) -> sqlite3.Connection:
    # The path may not be UTF-8; ?, #, % and // have a meaning in a URI.
    escaped = "".join(f"%{byte:02x}" for byte in os.fsencode(path))
    return sqlite3.connect(f"file:{escaped}?{mode}", uri=True, timeout=timeout,
                           isolation_level=None, check_same_thread=False,
                           cached_statements=256)


def _stat(path: str | int) -> tuple[int, int, int, int]:
    """Device, number, size and time of change of a file; zeros if there is none."""
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns
    return 0, 0, 0, 0


class SQLite:
    """A database file, with one connection, which threads may share by its lock."""

    # Kind, version, vacuum and WAL belong to the file; the rest to a connection.
    KIND = "PRAGMA application_id"
    SET_KIND = f"PRAGMA application_id = {APPLICATION_ID}"  # before WAL: in the header
    VERSION = "PRAGMA user_version"
    SET_VERSION = "PRAGMA user_version = {}"    # takes no parameter
    ANY_TABLE = "SELECT EXISTS (SELECT 1 FROM sqlite_master)"
    INDEXES = "SELECT name FROM sqlite_master WHERE type = 'index' AND sql IS NOT NULL"
    LENIENT = "PRAGMA writable_schema = ON"     # for a connection that only reads
    VACUUM_STEPWISE = "PRAGMA auto_vacuum = INCREMENTAL"    # before the first table
    JOURNAL = "PRAGMA journal_mode = WAL"
    CONFIGURATION = (
        JOURNAL, "PRAGMA synchronous = FULL",       # or a power cut loses commits
        "PRAGMA journal_size_limit = 16777216",     # shrinks the WAL after a long read
        "PRAGMA wal_autocheckpoint = 3000")         # 12 MiB: a third of the copying
    EMPTY_WAL = "PRAGMA wal_checkpoint(TRUNCATE)"
    FREE_PAGES = "PRAGMA freelist_count"

    def __init__(self, path: str, create: bool = True,
                 may_upgrade: Callable[[SQLite], object] = lambda db: None) -> None:
        if sqlite3.sqlite_version_info < (3, 34):
            raise Refused("unsupported", f"SQLite {sqlite3.sqlite_version} is too old",
                          "queuectl needs 3.34 or newer")
        try:
            self.path = os.path.realpath(system_path(path))
        except FileNotFoundError:
            raise Unavailable("unwritable", "the current directory is gone",
                              "change to another, or give an absolute --db") from None
        self._wal_path = self.path + "-wal"
        self.patience = BUSY_DEADLINE       # seconds to wait for the write lock
        self.is_new = False                 # this process created its tables
        self.upgrade_backup = ""            # path, if this process upgraded it
        self._may_upgrade = may_upgrade     # raises QueueError if not
        self._process = os.getpid()
        self._lock = threading.RLock()      # guards the connection in a transaction
        self._make_file(create)
        self._refuse_foreign(create)
        beside = self._wal_path, self.path + "-shm"
        self.is_read_only = not (os.access(self.path, os.W_OK) and (
            os.access(os.path.dirname(self.path), os.W_OK)
            or all(os.access(name, os.W_OK) for name in beside)))
        # Of files that SQLite is told not to change (immutable=1): what stat(2) says.
        self._frozen: list[tuple[int, int, int, int]] = []
        self._opened = 0        # how often the file was opened
        self._db = self._patiently(self._open)
        self._inode = _stat(self.path)[:2]
        self._wal: tuple[int, ...] | None = None    # of its -wal; None: not seen yet
        try:
            self._set_up(create)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        with self._lock:
            if not self.is_in_place():
                # Commits in the WAL must go to this file, not to one of the same name.
                self.relieve()
            self._db.close()

    # Opening a file that is not a queue must not change it. In order: create an empty
    # file; read the header without writing; open the file; create or upgrade the
    # tables. Another process may be at any of these steps, or may have died there.

    def _make_file(self, create: bool) -> None:
        if not os.path.lexists(self.path):
            self._refuse_empty(create)
            try:    # 0600 from its first moment; SQLite gives -wal and -shm the same
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR,
                                     0o600))
            except OSError as error:
                raise Unavailable("unwritable",
                                  f"cannot make {self.path} ({error.strerror})",
                                  "give a path in a directory that you may write") \
                    from None
        elif not os.path.isfile(self.path):
            raise Refused("not-a-queue", f"{self.path} is not a file",
                          "give another path with --db")
        elif os.stat(self.path).st_nlink > 1:
            raise Refused("unsupported", f"{self.path} has another name (a hard link)",
                          "each name would have a WAL of its own: remove one, or make "
                          "a symbolic link")
        # These have the mode that the file had when SQLite made them.
        for name in (self._wal_path, self.path + "-shm"):
            if os.access(self.path, os.W_OK) and not os.access(name, os.W_OK):
                with contextlib.suppress(OSError):
                    os.chmod(name, os.stat(self.path).st_mode & 0o777)

    def _refuse_foreign(self, create: bool) -> None:
        """Read the header without a lock, a journal or a write.

        Not by open(): closing that descriptor would release this process's locks of the
        file. immutable=1 may show old data, but kind and version do not change later.
        """
        size = os.stat(self.path).st_size
        if size == 0 or (size <= FILE_PAGE and os.path.exists(f"{self.path}-journal")):
            self._refuse_empty(create)      # the journal may undo the first page
            return
        has_wal = os.path.exists(self._wal_path)    # before the kind, which is older
        with contextlib.closing(self._patiently(
                lambda: _connect(self.path, READ_AS_IS))) as peek:
            # During a checkpoint the header may refer to pages that only the WAL has.
            peek.execute(self.LENIENT)
            kind, version, tables = self._nature(peek)
        if kind == version == tables == 0 and not has_wal:
            self._refuse_empty(create)      # another process has begun to make it
        elif kind != APPLICATION_ID:
            raise not_a_queue(self.path)
        self._refuse_newer(version)

    def _open(self) -> sqlite3.Connection:
        """Open the file; if it cannot be written, without creating other files.

        Without a -wal there is no writer, and immutable=1 needs no -shm. SQLite would
        then ignore commits in a -wal, so a file that has any is opened or refused.
        """
        self._opened += 1
        if not self.is_read_only:
            return _connect(self.path, "mode=rw")
        self._frozen = []
        if os.path.exists(self._wal_path):
            db = _connect(self.path, "mode=ro")
            try:
                db.execute(self.ANY_TABLE).fetchall()
                return db
            except sqlite3.Error as error:
                db.close()
                refused = refusal(error, self.path)
                if refused is None or refused.code != "unwritable":
                    raise
                if os.stat(self._wal_path).st_size:
                    self._refuse_read_only(", and its -wal holds changes that can be "
                                           "read only where one may write")
        self._frozen = [_stat(self.path), _stat(self._wal_path)]
        return _connect(self.path, READ_AS_IS)

    def _ask(self, sql: str, db: sqlite3.Connection | None = None) -> int:
        return int(self._patiently(
            lambda: (db or self._db).execute(sql).fetchall())[0][0])

    def _nature(self, db: sqlite3.Connection) -> tuple[int, int, int]:
        """The file's kind, its format's version, and 1 if it has a table: with a
        version it has, though maybe only in the WAL.
        """
        kind, version = self._ask(self.KIND, db), self._ask(self.VERSION, db)
        return kind, version, 1 if version else self._ask(self.ANY_TABLE, db)

    def _refuse_empty(self, create: bool) -> None:
        if not create:
            why = " (the file is empty)" * os.path.lexists(self.path)
            raise Refused("no-queue", f"no queue at {self.path}{why}",
                          "`queuectl enqueue 'echo hi'` makes one")

    def _refuse_newer(self, version: int) -> None:
        if version > SCHEMA_VERSION:
            raise Refused("newer-version", f"{self.path} was written by a newer "
                          f"queuectl (format {version}, this one knows "
                          f"{SCHEMA_VERSION})", "use that version")

    def _refuse_read_only(self, why: str = "") -> None:
        if self.is_read_only:
            raise Unavailable("unwritable", f"{self.path} is read-only{why}",
                              "make it and its directory writable, or work on a copy")

    def _set_up(self, create: bool) -> None:
        # The version is read each time, as another process may change it in between.
        if self._ask(self.VERSION) == 0:
            self._refuse_empty(create)
            self._refuse_read_only()
            kind, _, tables = self._nature(self._db)
            if tables or kind not in (0, APPLICATION_ID):
                raise not_a_queue(self.path)
            # These change one page. The tables are created by one commit to the WAL: if
            # that is interrupted with a rollback journal, the file looks damaged to
            # readers that must not change it.
            for sql in (self.VACUUM_STEPWISE, self.SET_KIND, self.JOURNAL):
                self.rows(sql)
            self._upgrade()
        version = self._ask(self.VERSION)
        self._refuse_newer(version)
        if version < SCHEMA_VERSION:
            self._refuse_read_only(", and has an older format that must be upgraded")
        if self.is_read_only:
            return
        for sql in self.CONFIGURATION:
            self.rows(sql)
        if self._ask(self.VERSION) < SCHEMA_VERSION:
            self._upgrade()

    def _upgrade(self) -> None:
        """Create the tables, or upgrade an older format after a backup, in one
        transaction, so not by executescript(); unless another process has done so.
        """
        with self.transaction():
            version = self._ask(self.VERSION)
            if version == 0:
                # It may have locks of an earlier database of that name.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(self.path + LOCK_SUFFIX)
            elif version < SCHEMA_VERSION:
                self._may_upgrade(self)
                self.upgrade_backup = f"{self.path}.format-{version}.backup"
                self.backup(self.upgrade_backup)
            else:
                return
            self.is_new = version == 0
            script = Sql.SCHEMA + Sql.FIRST_COUNTERS if self.is_new \
                else UPGRADES[version]
            for [name] in self.rows(self.INDEXES):
                self.rows(f"DROP INDEX {name}")
            for statement in filter(str.strip, script.split(";")):
                self.rows(statement)
            self.rows(self.SET_VERSION.format(SCHEMA_VERSION))
            if self.is_new:
                self.write(Sql.INSERT_META, [
                    {"key": "id", "value": os.urandom(8).hex()},
                    {"key": "created_at", "value": iso(time.time())}])

    def backup(self, path: str) -> None:
        """Copy the last committed state while others write; mode 0600.

        The copy is renamed from `.part` when it is complete and on disk. It replaces an
        older copy, but no other file, and none with a WAL, which SQLite would apply.
        """
        if _stat(path)[:2] == self._inode:
            raise Conflict("in-use", f"{path} is the queue itself", "give another name")
        if os.path.exists(path):
            kind = -1
            with contextlib.suppress(sqlite3.Error), \
                    contextlib.closing(_connect(path, READ_AS_IS)) as peek:
                [[kind]] = peek.execute(self.KIND).fetchall()
            if kind != APPLICATION_ID:
                raise Refused("not-a-queue", f"{path} is there and no backup of a "
                              "queue", "give another name, or remove it")
        self._refuse_wal(path)
        part = f"{path}.{os.getpid()}.part"
        try:
            os.close(os.open(part, os.O_CREAT | os.O_TRUNC | os.O_RDWR, 0o600))
            with contextlib.closing(_connect(part, "mode=rw")) as copy, \
                    contextlib.closing(self._reader()) as source:
                source.backup(copy)     # in one step: no commit restarts it
            self._refuse_wal(path)      # again: it may have been opened meanwhile
            os.replace(part, path)
            # fsync(2) of a new file does not store its name.
            fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)
        except sqlite3.Error as error:
            raise self._refusal(error, path) from error
        except OSError as error:
            raise Unavailable("unwritable", f"cannot write {path} ({error.strerror})",
                              "give a path in a directory that you may write") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(part)

    @staticmethod
    def _refuse_wal(path: str) -> None:
        if _stat(path + "-wal")[2]:
            raise Conflict("in-use", f"{path}-wal is not empty: a program uses "
                           "that backup, or was killed", "open it once, or give "
                           "another name")

    def _reader(self) -> sqlite3.Connection:
        return _connect(self.path,
                        READ_AS_IS if self._frozen else "mode=ro")

    def _refusal(self, error: Exception, path: str = "") -> Exception:
        return refusal(error, path or self.path) or Stale(
            f"{type(error).__name__}: {error}")

    def _patiently(self, action: Callable[[], Any],
                   patience: float | None = None) -> Any:
        if os.getpid() != self._process:    # both would damage the file
            raise Refused("unsupported", "this queue was opened before a fork",
                          "open a queuectl.Queue of its own in each process")
        end = time.monotonic() + (self.patience if patience is None else patience)
        while True:
            try:
                return action()
            except SqlError as error:
                refused = self._refusal(error)
                if getattr(refused, "code", "") != "busy" or time.monotonic() >= end:
                    raise refused from error
                time.sleep(BUSY_PAUSE)

    def _begin(self, patience: float) -> None:
        """Begin to write; refuse a file that, checked under the lock, lost its name
        (Gone), or was upgraded since it was opened.
        """
        self._refuse_read_only()
        # IMMEDIATE: deferred, it cannot wait after a read.
        self._patiently(lambda: self._db.execute("BEGIN IMMEDIATE"), patience)
        if not self.is_in_place():
            self.rollback()
            raise Gone("database-gone",
                       f"{self.path}, or its -wal, was deleted or replaced while it "
                       "was open", "open it anew")
        version = self._ask(self.VERSION)
        if version > SCHEMA_VERSION:
            self.rollback()
            self._refuse_newer(version)

    def begin(self) -> bool:
        """Begin a transaction at once; False if another connection writes."""
        try:
            self._begin(0.0)
        except Unavailable as error:
            if error.code != "busy":
                raise
            return False
        return True

    def commit(self) -> None:
        """Commit, in any thread; if that fails, call `rollback` next."""
        self._patiently(lambda: self._db.execute("COMMIT"))

    def rollback(self) -> None:
        """Undo the transaction, unless an error such as a full disk has ended it."""
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Begin, with patience; commit, or roll back and raise."""
        with self._lock:
            self._begin(self.patience)
            try:
                yield
                self.commit()
            finally:
                self.rollback()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[None]:
        """Read the state of the first read; be brief, as the WAL grows meanwhile. In a
        transaction, or another snapshot, it changes nothing.
        """
        with self._lock:
            if self._patiently(lambda: self._db.in_transaction):
                yield
                return
            self.rows("BEGIN")
            try:
                yield
            finally:
                self.rollback()

    def rows(self, sql: str, **values: Any) -> list[tuple[Any, ...]]:
        """All rows of a statement: an unfinished one would block each commit."""
        with self._lock:    # a transaction of this thread holds it already
            if self._frozen and not self._db.in_transaction and self._frozen != [
                    _stat(self.path), _stat(self._wal_path)]:
                self._db.close()    # another user has written to the file
                self._db = self._patiently(self._open)
            found: list[tuple[Any, ...]] = self._patiently(
                lambda: self._db.execute(sql, values).fetchall())
        return found

    def write(self, sql: str, rows: Sequence[Any], expect: int | None = None) -> int:
        """Run a statement for each row; returns the number of changed rows. Stale if
        that is not `expect`, as a guard did not hold (I3).
        """
        if not rows:
            return 0
        changed: int = self._patiently(
            lambda: self._db.executemany(sql, rows).rowcount)
        if expect not in (None, changed):
            raise Stale(f"{changed} of {expect} rows changed by {sql.split()[:2]}")
        return changed

    def changes(self) -> int:
        """A number that changes when another connection commits."""
        return (self._opened << 32) + int(self.rows("PRAGMA data_version")[0][0])

    def integrity(self) -> list[str]:
        """The damage that SQLite finds; reads the whole file."""
        said = [row[0] for row in self.rows(f"PRAGMA integrity_check({CHECK_SHOWN})")]
        return [] if said == ["ok"] else said

    def relieve(self) -> None:
        """On a full disk: copy the WAL into the file, which may have room for it."""
        with self._lock, contextlib.suppress(sqlite3.Error):
            self._db.execute(self.EMPTY_WAL).fetchall()

    def shrink(self) -> bool:
        """Free unused pages if there are many; return True if there may be more."""
        [[free]], [[pages]] = self.rows(self.FREE_PAGES), self.rows("PRAGMA page_count")
        if free < max(SHRINK_PAGES, pages // 4):
            return False
        self.rows(f"PRAGMA incremental_vacuum({SHRINK_PAGES})")
        return bool(self.rows(self.FREE_PAGES)[0][0] < free)

    def size(self) -> int:
        return _stat(self.path)[2] + _stat(self._wal_path)[2]

    def is_in_place(self) -> bool:
        """Return True if the path still leads to the open file, and to its -wal."""
        wal = _stat(self._wal_path)[:2]
        if self._wal is None and self._db.in_transaction:
            self._wal = wal     # it exists from the first transaction on
        return _stat(self.path)[:2] == self._inode and self._wal in (None, wal)


@contextlib.contextmanager
def glance(path: str) -> Iterator[Rows]:
    """A function that runs a SELECT; it creates and upgrades no queue, and waits BRIEF.

    Raises QueueError, also if the file's format has no such column. The mode is "rw",
    as a read-only connection leaves an empty WAL behind.
    """
    path = system_path(path)
    try:
        with contextlib.closing(_connect(path, READ_AS_IS)) as peek:
            peek.execute(SQLite.LENIENT)
            if peek.execute(SQLite.KIND).fetchall() != [(APPLICATION_ID,)]:
                raise not_a_queue(path)
        with contextlib.closing(_connect(path, "mode=rw", BRIEF)) as db:
            yield lambda sql, **values: db.execute(sql, values).fetchall()
    except SqlError as error:
        raise refusal(error, path) or Refused("unsupported",
                                              f"{path} is of another format ({error})",
                                              "use its version") from error


# ---- 8 Host ------------------------------------------------------------------
# Which workers and runs are alive: by locks of open file descriptions, which a process
# tree inherits; without these, by process ids with start times. Features are probed,
# not derived from the system's name.

WORKER_LOCKS = 1 << 62    # offsets from here are workers' ids; below, claim numbers
# struct flock as in fcntl(2) on 64 bits: type, whence, start, length, pid (0), padded
# as by the compiler.
_FLOCK = "hhqqi"
SCRATCH_LOCK = 0        # offset to probe locks: no run has that number
# The file also has a record of each slot's process: claim, pid, pid namespace, seconds
# since boot before the start, duration of the start.
_PROCESS = struct.Struct("=qiIdf")
PLACES = 1024           # of workers, by id modulo this; limits the file's size
_PLACE_SIZE = (MAX_SLOTS + 1) * _PROCESS.size


def _flock(fd: int, command: int, kind: int, offset: int) -> int:
    """Call fcntl(2) for a byte; returns the type that it answers."""
    answer = fcntl.fcntl(fd, command, struct.pack(_FLOCK, kind, 0, offset, 1, 0))
    return int(struct.unpack(_FLOCK, answer)[0])


def boot_time() -> float:
    """Seconds since boot, by the clock of /proc/PID/stat."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


def _read(path: str) -> bytes:
    """A file of /proc; b"" if it is missing or unreadable; OSError without descriptors.
    """
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return b""


def _stat_fields(pid: int) -> list[bytes]:
    """The fields of /proc/PID/stat after the name; [] for no process or a zombie.

    Field n of proc(5) is [n - 3]: [2] the group, [3] the session, [19] the start.
    """
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return [] if not fields or fields[0] in (b"Z", b"X") else fields


def _pids() -> list[int]:
    own = os.getpid()
    with contextlib.suppress(FileNotFoundError):
        return [int(name) for name in os.listdir("/proc")
                if name.isdigit() and int(name) != own]
    return []


def _pid_namespace() -> int:
    # Containers have their own.
    return _stat("/proc/self/ns/pid")[1] & 0xFFFFFFFF


class Locks:
    """Locks on one small file beside the database, one byte for each worker or run.

    Each lock belongs to the open file description of its `hold`, so it lasts until the
    last process that inherited it has exited; plain locks are not inherited.
    """

    def __init__(self, path: str, probe: int = -1) -> None:
        self.path = path
        self._probe = probe             # a descriptor of the file; -1: not opened yet
        # None: not tried yet.
        self._works = True if probe >= 0 else \
            None if hasattr(fcntl, "F_OFD_SETLK") else False

    def hold(self, offset: int) -> int:
        """Take a lock and return its descriptor, -1 without such locks; Conflict if it
        is held.
        """
        if self._works is False:
            return -1
        fd = -1
        try:
            fd = self._open(os.O_RDWR | os.O_CREAT)
            if self._is_proven(fd):
                _flock(fd, fcntl.F_OFD_SETLK, fcntl.F_WRLCK, offset)
                return fd
        except OSError as error:
            if fd >= 0:
                os.close(fd)
            if fd >= 0 and error.errno in (errno.EAGAIN, errno.EACCES):
                raise Conflict("in-use",
                               f"lock {offset} of {self.path} is taken") from None
            raise Unavailable("unwritable",
                              f"cannot lock {self.path} ({error.strerror})",
                              "check who may write that directory, and its disk") \
                from None
        os.close(fd)
        return -1

    def is_held(self, offset: int) -> bool | None:
        """Return True if a process, this one included, holds the lock, or may hold it;
        None if this user may not read the file.
        """
        if self._works is False:
            return False
        try:
            if self._probe < 0:
                self._probe = self._open(os.O_RDONLY)
            return self._is_proven(self._probe) and _flock(
                self._probe, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, offset) != fcntl.F_UNLCK
        except FileNotFoundError:
            return False        # no lock was ever held
        except PermissionError:
            return None
        except OSError:
            return True

    def holders(self, offset: int) -> list[int]:
        """The other processes that hold the lock; [] without /proc."""
        # In fdinfo the kernel lists a descriptor's locks, with their offsets:
        # `lock: 1: OFDLCK ADVISORY WRITE -1 fe:00:4407538 77 77` for claim 77.
        line = re.compile(rb"lock:.*OFDLCK.* %d %d$" % (offset, offset), re.M)
        file, found = _stat(self.path or self._probe)[:2], list[int]()
        for pid in _pids():
            with contextlib.suppress(OSError):
                found += [pid] * any(
                    line.search(_read(f"/proc/{pid}/fdinfo/{fd}"))
                    and _stat(f"/proc/{pid}/fd/{fd}")[:2] == file
                    for fd in os.listdir(f"/proc/{pid}/fd"))
        return found

    def note(self, lock: int, worker: int, claim: Claim, pid: int,
             since: float) -> None:
        """Record by the worker's descriptor `lock` the process started for a run after
        `since`: other workers kill it if worker and supervisor were killed.
        """
        with contextlib.suppress(OSError):      # a full disk: the lock tells enough
            os.pwrite(lock, _PROCESS.pack(
                claim.number, pid, _pid_namespace(), since, boot_time() - since),
                worker % PLACES * _PLACE_SIZE + claim.slot * _PROCESS.size)

    def process_of(self, run: Run) -> int | None:
        """The process of a run, by its id and start time; 0 if it has exited or there
        are no locks; None if none was started.
        """
        if self._works is False:
            return 0
        try:
            with open(self.path, "rb") as file:
                file.seek(run.worker_id % PLACES * _PLACE_SIZE)
                records = file.read(_PLACE_SIZE)
        except OSError:
            return 0
        records = records[:len(records) // _PROCESS.size * _PROCESS.size]
        for claim, pid, namespace, since, took in _PROCESS.iter_unpack(records):
            if claim == run.claim:
                fields = _stat_fields(pid)
                if not fields or namespace != _pid_namespace():
                    return 0
                started = int(fields[19]) / os.sysconf("SC_CLK_TCK")    # 10 ms ticks
                return pid if -0.02 <= started - since <= took + 0.02 else 0
        return None

    def _is_proven(self, fd: int) -> bool:
        """Return True if two open file descriptions conflict: macOS has another `struct
        flock`, old kernels answer EINVAL. A shared lock works on read-only files.
        """
        if self._works is None:
            other = self._open(os.O_RDONLY)
            try:
                _flock(other, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, SCRATCH_LOCK)
                self._works = _flock(
                    fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, SCRATCH_LOCK) == fcntl.F_RDLCK
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EAGAIN, errno.EACCES):
                    raise
                self._works = error.errno != errno.EINVAL
            finally:
                os.close(other)
        return self._works

    def close(self) -> None:
        if self._probe >= 0:
            os.close(self._probe)
            self._probe = -1

    def _open(self, flags: int) -> int:
        # Not inherited, except where a command is started with its run's lock.
        return os.open(self.path, os.O_CLOEXEC | flags, 0o600)


def is_same_birth(one: str, other: str) -> bool:
    """Return True if two start times are of one process; those of ps differ by 1 s."""
    if "" in (one, other) or one == other:
        return one == other != ""
    try:
        first, second = (time.mktime(time.strptime(born, "%a %b %d %H:%M:%S %Y"))
                         for born in (one, other))
    except (ValueError, OverflowError):
        return False
    return abs(first - second) <= 2


class Host:
    """This machine and the locks of one database."""

    def __init__(self, path: str) -> None:
        self.name = os.uname().nodename if hasattr(os, "uname") else ""
        self.boot = _read("/proc/sys/kernel/random/boot_id").decode().strip()
        self.locks = Locks(path + LOCK_SUFFIX)

    def born(self, pid: int) -> str:
        """The start time of a process; "" if it has exited. With /proc it is in ticks
        since the boot, so `boot` must be compared, too.
        """
        if self.boot:
            fields = _stat_fields(pid)
            return fields[19].decode() if fields else ""
        import subprocess  # 5 ms, and only where there is no /proc
        try:
            said = subprocess.run(
                ["ps", "-o", "lstart=", "-p", str(pid)], check=False,
                env={**os.environ, "LC_ALL": "C"}, stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL).stdout
        except FileNotFoundError:   # no ps: only the worker's lock tells
            return ""
        return said.decode("utf-8", "replace").strip()

    def is_alive(self, worker: Worker) -> bool | None:
        """Return True if the worker's process exists, None if unknown, as on another
        machine. Its lock file may have been deleted, or be of another user; its pid may
        be of a container.
        """
        if worker.boot and self.boot and worker.boot != self.boot:
            # With this machine's name: it has been rebooted since.
            return False if worker.host == self.name else None
        if worker.boot != self.boot or (not self.boot and worker.host != self.name):
            # One of the two has no /proc: only the lock may prove it.
            return self.locks.is_held(WORKER_LOCKS + worker.id) or None
        is_held = self.locks.is_held(WORKER_LOCKS + worker.id)
        if is_held:
            return True
        try:
            return is_same_birth(self.born(worker.pid), worker.born) or is_held
        except OSError:     # out of descriptors
            return None


class Wakeup:
    """A pipe to wake a thread in poll, also from a signal handler, where
    `threading.Event.set` hung on its lock.
    """

    def __init__(self) -> None:
        self.reader, self.writer = os.pipe()
        os.set_blocking(self.reader, False)
        os.set_blocking(self.writer, False)

    def set(self) -> None:
        with contextlib.suppress(BlockingIOError):      # full: it wakes, too
            os.write(self.writer, b"!")

    def clear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while len(os.read(self.reader, SOCKET_BUFFER)) == SOCKET_BUFFER:
                pass

    def close(self) -> None:
        os.close(self.reader)
        os.close(self.writer)


class Poller:
    """Descriptors to wait for, each with a handler for input or its end."""

    def __init__(self) -> None:
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, handler: Callable[[], None]) -> None:
        if fd >= 0:
            self._poll.register(fd, select.POLLIN)
            self._handlers[fd] = handler

    def drop(self, fd: int) -> None:
        """Remove a descriptor; to be called before it is closed."""
        if self._handlers.pop(fd, None):
            self._poll.unregister(fd)

    def wait(self, seconds: float) -> None:
        """Wait up to `seconds` for input, then call the handlers. Rounded up: with 0
        for the last millisecond the loop would spin. poll(2) takes 24 days at most.
        """
        for fd, _ in self._poll.poll(math.ceil(min(seconds, 3600) * 1000)):
            handler = self._handlers.get(fd)
            if handler:     # else dropped by an earlier handler
                handler()


LOOPBACK = "127.0.0.1"

# Datagrams to a worker: jobs were added; something else has changed; store the output
# of running commands.
NEW_JOBS, NEW_ORDERS, PEEK = b"jobs", b"orders", b"output"
PEEK_PATIENCE = 0.5     # seconds that a client waits for it, and a worker for more


def notify_workers(ports: Iterable[int], message: bytes) -> None:
    """Wake workers. Never waits or fails: a lost datagram costs FALLBACK_POLL."""
    import socket  # 3 ms, and only if there is a worker
    with contextlib.suppress(OSError), \
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.setblocking(False)
        for port in ports:
            with contextlib.suppress(OSError):
                sender.sendto(message, (LOOPBACK, port))


NOTIFY_PATIENCE = 1.0  # seconds to wait for the service manager

# Variables for the service alone, not for its jobs.
SERVICE_NAMES = (b"NOTIFY_SOCKET", b"WATCHDOG_USEC", b"WATCHDOG_PID")


class Notifier:
    """Messages of a worker to its service manager, as by sd_notify(3)."""

    def __init__(self, environ: Mapping[bytes, bytes], service: int) -> None:
        address, usec, pid = (environ.get(name, b"") for name in SERVICE_NAMES)
        # A leading @ stands for the NUL of an abstract socket.
        self._address = b"\0" + address[1:] if address[:1] == b"@" else address
        # Half of the time-out, as sd_watchdog_enabled(3) recommends.
        self.interval = self._watchdog_at = math.inf    # seconds; monotonic
        if usec.isdigit() and int(usec) and pid in (b"", b"%d" % service):
            self.interval, self._watchdog_at = int(usec) / 2e6, 0.0
        self._status, self._is_stopping = "", False

    def ready(self) -> None:
        self._tell("READY=1", NOTIFY_PATIENCE)

    def stopping(self) -> None:
        if not self._is_stopping:
            self._tell("STOPPING=1", NOTIFY_PATIENCE)
        self._is_stopping = True

    def step(self, status: str) -> float:
        """Send what is due; return when to call it next (monotonic). Not in a thread,
        which would continue while the worker's loop hangs.
        """
        now = time.monotonic()
        if now >= self._watchdog_at:
            self._tell("WATCHDOG=1")
            self._watchdog_at = now + self.interval
        if status != self._status and self._tell(f"STATUS={status}"):
            self._status = status
        return min(self._watchdog_at, now + FALLBACK_POLL) if self._address \
            else math.inf

    def _tell(self, text: str, patience: float = 0.0) -> bool:
        """Send a message; return True if it was accepted in time."""
        import socket  # a worker has it already
        with contextlib.suppress(OSError), \
                socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.settimeout(patience)
            return bool(self._address and sender.sendto(text.encode(), self._address))
        return False


def inherited() -> list[int]:
    """The numbers of descriptors that may be open, except the standard streams."""
    found: Iterable[str | int] = range(1024)
    with contextlib.suppress(OSError):      # in a container without /proc
        found = os.listdir("/dev/fd")
    return [number for number in map(int, found) if number > 2]


def stop_signals() -> list[int]:
    """The signals that stop this process; not SIGHUP if it is ignored, as by nohup."""
    return [number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def handling(handlers: Mapping[int, Any], wakeup_fd: int) -> Iterator[None]:
    """Install signal handlers, and write signals to a descriptor, as one delivered to
    another thread does not wake the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler)
              for number, handler in handlers.items()}
    old_fd = signal.set_wakeup_fd(wakeup_fd, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in before.items():
            signal.signal(number, handler)


# ---- 9 Ledger ----------------------------------------------------------------
# Rows as records, and the only code that adds, moves, edits and deletes jobs, in the
# caller's transaction.

KEPT_MINUTES = 8 * 1440     # tallies by the minute are kept for this time
LATE_SCHEDULE = 60.0        # seconds; a run that is later was missed
DUE_BATCH = 2000            # jobs that one transaction unblocks or makes ready: 50 ms


def _words(text: str) -> tuple[str, ...]:
    return () if text == "[]" else tuple(json.loads(text))


_encoded = json.JSONEncoder(ensure_ascii=False).encode


def row_of(record: Job | Worker | Schedule) -> dict[str, Any]:
    """The columns of a record by name, with lists and objects as JSON."""
    return {key: _encoded(value) if isinstance(value, (tuple, list, dict)) else value
            for key, value in record._asdict().items()}


def job_of(row: tuple[Any, ...]) -> Job:
    # 13: after, 15: tags, 16: env, 30: after_any, 36: held
    return Job._make(row)._replace(
        after=_words(row[13]), tags=_words(row[15]), after_any=_words(row[30]),
        env=json.loads(row[16]) if row[16] != "{}" else {}, held=bool(row[36]))


def waits_of(job: Job, now: float) -> str:
    if job.held:
        return HELD
    if job.unmet:
        return BLOCKED
    return SCHEDULED if job.run_at > iso(now) else READY


def as_waiting(job: Job) -> Job:
    """A job claimed ahead, as people see it: it waits for a slot."""
    return job._replace(state=PENDING, waits=READY, claim=None, worker=None,
                        started_at=None, runs=job.runs - 1)


@contextlib.contextmanager
def at_item(item: int) -> Iterator[None]:
    try:
        yield
    except QueueError as error:
        error.item = item
        raise


def _refuse_cycle(needs: Sequence[Mapping[str, int]], seqs: Mapping[str, int],
                  first: int) -> None:
    """Only jobs of one batch can form a cycle: a job cannot name a later one."""
    import graphlib  # 1 ms, and only for dependencies
    sorter: graphlib.TopologicalSorter[int] = graphlib.TopologicalSorter()
    for need in needs:
        if need["needs"] >= first:
            sorter.add(need["job"], need["needs"])
    try:
        sorter.prepare()
    except graphlib.CycleError as error:
        cycle = set(error.args[1])
        names = sorted(id for id, seq in seqs.items() if seq in cycle)
        with at_item(min(cycle) - first):
            raise Invalid(
                f"{', '.join(names[:5])} wait for each other" if len(names) > 1 else
                f"{names[0]} waits for itself", "take one of these out", "after") \
                from None


def hook_env(job: Job, output: bytes) -> dict[str, str]:
    """The variables of a hook, each cut to what execve(2) takes."""
    end = output[-4096:].decode("utf-8", "replace").replace("\0", "\ufffd")
    if len(output) > 4096:
        end = end.lstrip("\ufffd")      # the rest of a character
    found = {
        "JOB_ID": job.id, "STATE": job.state, "ERROR": job.error or "",
        "EXIT_CODE": "" if job.exit_code is None else str(job.exit_code),
        "COMMAND": job.command, "TAGS": " ".join(job.tags), "OUTPUT_TAIL": end,
        "SCHEDULE": next((tag[len(SCHEDULE_TAG):] for tag in job.tags
                          if tag.startswith(SCHEDULE_TAG)), "")}
    room = MAX_TEXT - len("QUEUECTL_OUTPUT_TAIL=")      # the longest name
    return {f"QUEUECTL_{key}": text.encode()[:room].decode("utf-8", "ignore")
            for key, text in found.items()}


class Ledger:
    """Rows as records; counters and numbers of the current transaction."""

    def __init__(self, db: SQLite) -> None:
        self.db = db
        self.rows, self.write, self.snapshot = db.rows, db.write, db.snapshot
        self.changes, self.begin, self.commit = db.changes, db.begin, db.commit
        # Used only in a transaction, so guarded by its lock.
        self._counts: dict[tuple[str, str], int] = {}
        self._tallies: dict[tuple[int, str, str, int], tuple[int, float]] = {}
        self._numbers: dict[str, int] = {}      # the last numbers taken, by counter
        self._parsed: tuple[dict[str, str], Settings] = ({}, settings_of({}))

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Ledger]:
        """Begin to write; write the counters and commit, or roll back and raise."""
        with self.db.transaction():
            try:
                yield self
                self.write_counters()
            finally:
                self._forget()

    def write_counters(self) -> None:
        """Write the counters (I8); a worker calls it before `commit`."""
        self.write(Sql.COUNT, [{"queue": queue, "state": state, "n": n}
                               for (queue, state), n in self._counts.items() if n])
        self.write(Sql.TALLY, [
            {"minute": minute, "queue": queue, "kind": kind, "bucket": bucket, "n": n,
             "total": total} for (minute, queue, kind, bucket), (n, total)
            in self._tallies.items()])
        if self._numbers:
            self.do(Sql.SET_COUNTERS, self._numbers)
        self._forget()

    def rollback(self) -> None:
        self._forget()
        self.db.rollback()

    def _forget(self) -> None:
        self._counts.clear()
        self._tallies.clear()
        self._numbers.clear()

    def take_numbers(self, counter: str, n: int = 1, above: int = 0) -> int:
        """The first of `n` new numbers, more than `above` (I4)."""
        if not self._numbers:
            [last] = self.rows(Sql.COUNTERS)
            self._numbers.update(zip(("jobs", "runs", "events", "workers"), last))
        first = 1 + max(self._numbers[counter], above)
        self._numbers[counter] = first + n - 1
        return first

    def count(self, queue: str, state: str, change: int) -> None:
        """Count `change` more jobs; written at the end of the transaction."""
        self._counts[queue, state] = self._counts.get((queue, state), 0) + change

    def counts(self) -> dict[tuple[str, str], int]:
        """The number of jobs by queue and state, without zeros."""
        counts = collections.Counter({
            (queue, state): n for queue, state, n in self.rows(Sql.COUNTS)})
        counts.update(self._counts)
        return +counts

    def tally(self, now: float, queue: str, kind: str,
              value: float | None = None) -> None:
        """Count one of a kind, or its seconds, for this minute and for all time."""
        bucket = 0 if value is None else bucket_of(value)
        for minute in (0, int(now // 60)):
            n, total = self._tallies.get((minute, queue, kind, bucket), (0, 0.0))
            self._tallies[minute, queue, kind, bucket] = n + 1, total + (value or 0.0)

    def row(self, sql: str, **values: Any) -> tuple[Any, ...] | None:
        return next(iter(self.rows(sql, **values)), None)

    def do(self, sql: str, values: Mapping[str, Any]) -> int:
        return self.write(sql, [values])

    def change(self, sql: str, rows: Sequence[Any]) -> None:
        """As `write`; Stale unless each row was changed (I3)."""
        self.write(sql, rows, len(rows))

    def jobs(self, sql: str, **values: Any) -> list[Job]:
        return [job_of(row) for row in self.rows(sql, **values)]

    def job(self, job_id: str) -> Job:
        for job in self.jobs(Sql.JOB, id=job_id):
            return job
        raise no_such_job(job_id)

    def workers(self) -> list[Worker]:
        return [Worker(*row)._replace(queues=_words(row[7]), gpus=_words(row[13]))
                for row in self.rows(Sql.WORKERS)]

    def schedules(self) -> list[Schedule]:
        """All schedules, by name; `job` is {} if it is no JSON object."""
        found = []
        for row in self.rows(Sql.SCHEDULES):
            job = None
            with contextlib.suppress(ValueError):
                job = json.loads(row[2])
            found.append(Schedule(*row)._replace(
                job=job if isinstance(job, dict) else {}, paused=bool(row[3]),
                catch_up=bool(row[11])))
        return found

    def settings(self) -> Settings:
        stored = self.stored_settings()
        if stored != self._parsed[0]:
            self._parsed = stored, settings_of(stored)
        return self._parsed[1]

    def stored_settings(self) -> dict[str, str]:
        return dict(self.rows(Sql.STORED_SETTINGS))

    def meta(self, key: str) -> str:
        row = self.row(Sql.META, key=key)
        return row[0] if row else ""

    def add(self, jobs: Sequence[Job], now: float) -> tuple[list[Job], int]:
        """Add jobs, which may name each other; returns the jobs, and how many are new.
        If a key (unique, once) is taken, it returns the job that has it. An error has
        the `item` at fault, and is raised before the first write.
        """
        # Above every job-N that a user chose, so that no N is used twice. 15 digits are
        # far below the last row number, 2 ** 63 - 1.
        chosen = (re.fullmatch("job-([1-9][0-9]{0,14})", job.id)
                  for job in jobs if job.id)
        first = self.take_numbers("jobs", len(jobs),
                                  max((int(m[1]) for m in chosen if m), default=0))
        seqs: dict[str, int] = {}                   # of new jobs, by id
        keys: dict[tuple[str, str], int] = {}       # and by key
        found: list[Job | int] = []     # of each: an older job, or the seq of a new one
        for seq, job in enumerate(jobs, first):
            holder = self._holder(job, keys)
            found.append(seq if holder is None else holder)
            if holder is not None:
                continue
            job_id = job.id or f"job-{seq}"
            if job_id in seqs or (job.id and self.row(Sql.JOB, id=job_id)):
                with at_item(seq - first):
                    raise Conflict("job-exists", f"there is a job {job_id!r} already",
                                   "choose another id, or leave the id out")
            seqs[job_id] = seq
            keys.update({(field, key): seq for field, key in (
                ("once", job.once), ("unique", job.unique)) if key is not None})
        # Later ticks lower `unmet` for all dependents of these, also for new ones.
        unblocking = dict(self.rows(Sql.UNBLOCKING))
        settings, at = self.settings(), iso(now)
        new: dict[int, Job] = {}
        needs: list[dict[str, int]] = []
        for seq in seqs.values():
            job, unmet = jobs[seq - first], 0
            for name in dict.fromkeys((*job.after, *job.after_any)):
                is_any = name not in job.after      # the stricter one, if in both
                older = [] if name in seqs else self.jobs(Sql.JOB, id=name)
                if not older and name not in seqs:
                    key = "after_any" if is_any else "after"
                    with at_item(seq - first):
                        raise Invalid(f"{key}: there is no job {name!r}",
                                      "`queuectl list` shows what there is", key)
                needed = older[0].seq if older else seqs[name]
                needs.append({"needs": needed, "job": seq, "any_outcome": int(is_any)})
                unmet += not older or needed in unblocking \
                    or older[0].state not in (OVER if is_any else (COMPLETED,))
            job = job._replace(
                seq=seq, id=job.id or f"job-{seq}", created_at=at, updated_at=at,
                run_at=job.run_at or at, unmet=unmet, max_retries=settings.max_retries
                if job.max_retries < 0 else job.max_retries)
            new[seq] = job._replace(waits=waits_of(job, now), rank=rank_of(
                job.priority, job.run_at, settings))
        if needs:
            _refuse_cycle(needs, seqs, first)
        self._insert([*new.values()], needs, now)
        return [one if isinstance(one, Job) else new[one] for one in found], len(new)

    def _holder(self, job: Job,
                keys: Mapping[tuple[str, str], int]) -> Job | int | None:
        """The older job that has a key of this one, or the seq of a new job."""
        for field, sql in ("once", Sql.JOB_BY_ONCE), ("unique", Sql.JOB_BY_UNIQUE):
            key = getattr(job, field)
            if (field, key) in keys:
                return keys[field, key]
            for holder in self.jobs(sql, **{field: key}) if key is not None else ():
                return holder
        return None

    def _insert(self, jobs: Sequence[Job], needs: Sequence[Mapping[str, int]],
                now: float) -> None:
        """Write the jobs with their first events (I1), needs, tags and counts (I8)."""
        self.write(Sql.INSERT_JOB, [row_of(job) for job in jobs])
        self._add_events([(None, "", job) for job in jobs])
        self.write(Sql.INSERT_NEED, needs)
        self.write(Sql.INSERT_TAG, [{"tag": tag, "job": job.seq}
                                    for job in jobs for tag in job.tags])
        for job in jobs:
            self.count(job.queue, PENDING, +1)
            self.tally(now, job.queue, "enqueue")

    def _add_events(self, changes: Sequence[tuple[str | None, str, Job]]) -> None:
        """Changes are: the state before, a reason ("": that of MOVES), the job."""
        first = self.take_numbers("events", len(changes))
        self.write(Sql.INSERT_EVENT, [
            {"seq": seq, "job": job.seq, "from": source, "to": job.state,
             "at": job.updated_at, "reason": reason or None}
            for seq, (source, reason, job) in enumerate(changes, first)])

    def move(self, changes: Sequence[Change], now: float,
             settings: Settings | None = None) -> list[Change]:
        """Change the states of jobs by verbs of MOVES, with what follows from a state:
        claim, worker (I2), waits, rank (I7); returns that in `after`. Each write is
        guarded by the state and claim that the job had (I1, I3).
        """
        if not changes:
            return []
        settings, done = settings or self.settings(), list[Change]()
        for change in changes:
            verb, before, after, *_ = change
            step = MOVES[verb]
            if before.state not in step.sources:
                raise Conflict("wrong-state", f"{before.id} is {before.state}, so "
                               f"`{verb}` does not apply",
                               f"`queuectl cancel {before.id}` ends it first"
                               if before.state == PROCESSING else
                               "it must be " + " or ".join(step.sources))
            job = after._replace(state=step.target, updated_at=iso(now),
                                 end_requested=None, waits=None)
            if step.target != PROCESSING:
                job = job._replace(claim=None, worker=None)
            if verb in ("fail", "retry"):   # it has started, or shall do so
                job = job._replace(expires_at=None)
            if verb == "retry":
                job = job._replace(held=False)
            if step.target in WAITING:
                job = job._replace(waits=waits_of(job, now), rank=rank_of(
                    job.priority, job.run_at, settings))
            done.append(change._replace(after=job))
        self.change(Sql.MOVE, [
            {**after._asdict(), "source": before.state,
             "source_claim": before.claim or 0} for _, before, after, *_ in done])
        self._add_events([
            (before.state, "" if reason == MOVES[verb].because else reason, after)
            for verb, before, after, reason, _ in done])
        for verb, before, after, *_ in done:
            self.count(after.queue, before.state, -1)
            self.count(after.queue, after.state, +1)
            if verb in TALLIED:
                self.tally(now, after.queue, verb)
        retried = [one.before for one in done if one.before.state in OVER]
        under_way = dict(self.rows(Sql.UNBLOCKING)) if retried else {}
        for job in retried:     # dependents wait for it again
            self.do(Sql.UNMEET, {"needs": job.seq, "least": int(job.state != COMPLETED),
                                 "upto": under_way.get(job.seq, END_OF_TIME)})
            self.do(Sql.DELETE_UNBLOCKING, {"needs": job.seq})
        over = [one.after for one in done if one.after.state in OVER]
        self._unblock([job.seq for job in over if job.state == COMPLETED], now)
        self._unblock([job.seq for job in over if job.state != COMPLETED], now, least=1)
        self.write(Sql.SET_RESULT, [
            {"name": tag[len(SCHEDULE_TAG):], "state": job.state, "at": iso(now)}
            for job in over for tag in job.tags if tag.startswith(SCHEDULE_TAG)])
        self._add_hooks(done, settings, now)    # last, as on-idle depends on the counts
        return done

    def _dependents(self, seqs: Sequence[int], after: int = 0, limit: int = END_OF_TIME,
                    least: int = 0, most: int = 1) -> list[tuple[Any, ...]]:
        return self.rows(Sql.DEPENDENTS, needs=json.dumps(seqs), after=after,
                         limit=limit, least=least, most=most) if seqs else []

    def _unblock(self, over: Sequence[int], now: float, least: int = 0) -> None:
        """Lower `unmet` of dependents; if there are very many, later ticks do it."""
        found = self._dependents(over, limit=DUE_BATCH + 1, least=least)
        if len(found) <= DUE_BATCH:
            self._meet(found, now)
        else:
            self.write(Sql.SET_UNBLOCKING, [{"needs": seq, "after": 0} for seq in over])

    def unblock_more(self, now: float) -> bool:
        """Unblock further dependents of finished jobs; True if there may be more."""
        for needs, after in self.rows(Sql.UNBLOCKING)[:1]:
            [job] = self.jobs(Sql.JOB_BY_SEQ, seq=needs)
            found = self._dependents([needs], after, DUE_BATCH,
                                     int(job.state != COMPLETED))
            self._meet(found, now)
            if len(found) < DUE_BATCH:
                self.do(Sql.DELETE_UNBLOCKING, {"needs": needs})
            else:
                self.do(Sql.SET_UNBLOCKING, {"needs": needs, "after": found[-1][1]})
            return True
        return False

    def expire(self, now: float) -> bool:
        """Cancel jobs that have not started in time; True if there may be more."""
        jobs = self.jobs(Sql.EXPIRED, now=iso(now), limit=DUE_BATCH)
        self.move([Change("cancel", job, job._replace(
            finished_at=iso(now), error="expired"), "expired") for job in jobs], now)
        return len(jobs) == DUE_BATCH

    def _meet(self, found: Sequence[tuple[int, int]], now: float) -> None:
        self.change(Sql.MEET, [{"job": job, "now": iso(now)} for _, job in found])

    def _add_hooks(self, changes: Sequence[Change], settings: Settings,
                   now: float) -> None:
        """Enqueue the hooks; `on-idle` once for all jobs that end together."""
        commands = {COMPLETED: settings.on_completed, DEAD: settings.on_dead}
        ends = [change for change in changes if change.after.state in OVER
                and change.after.queue != HOOKS_QUEUE]
        wanted = [(commands.get(change.after.state), change) for change in ends]
        if ends and settings.on_idle and not any(
                queue != HOOKS_QUEUE and state not in OVER
                for queue, state in self.counts()):
            wanted.append((settings.on_idle, ends[-1]))
        folder = os.path.dirname(self.db.path)      # maybe not UTF-8
        hooks = [Job(command=command, queue=HOOKS_QUEUE,
                     cwd=folder if is_text(folder) else "/",
                     env=hook_env(change.after, self._last_output(change)))
                 for command, change in wanted if command]
        if hooks:
            self.add(hooks, now)

    def _last_output(self, change: Change) -> bytes:
        """That of the job's last run, which may not be stored yet."""
        if change.outcome and change.outcome.output:
            return change.outcome.output
        rows = self.rows(Sql.RUN, job=change.after.seq, number=change.after.runs)
        return Run(*rows[0]).output if rows else b""

    def record(self, ends: Sequence[tuple[Claim, Outcome]], settings: Settings,
               now: float) -> list[Change]:
        """Record the ends of runs whose claims are held; returns the changes. The jobs
        must have the current `end_requested` and `unmet`.
        """
        import random  # 1 ms, and only in a worker
        if not ends:
            return []
        changes, rows = [], []
        for claim, outcome in ends:
            outcome = judged(claim.job, outcome)
            verb, after, reason = settle(claim.job, outcome, settings, random.random(),
                                         now)
            changes.append(Change(verb, claim.job, after, reason, outcome))
            kind = STOPPED if verb == "cancel" else outcome.kind
            rows.append({**outcome._asdict(), "claim": claim.number, "slot": claim.slot,
                         "started_at": claim.job.started_at, "finished_at": iso(now),
                         "outcome": kind})
            self.tally(now, claim.job.queue, f"run:{kind}")
            if outcome.duration is not None:
                self.tally(now, claim.job.queue, "run_time", outcome.duration)
        changes = self.move(changes, now, settings)
        self.change(Sql.END_RUN, rows)
        return changes

    def _remove(self, job: Job, now: float) -> None:
        if job.state == PROCESSING:
            raise Conflict("wrong-state", f"{job.id} is processing",
                           f"`queuectl cancel {job.id}` first")
        needing = self.row(Sql.WAITING_DEPENDENT, needs=job.seq,
                           most=int(job.state not in OVER))
        if needing and job.state != COMPLETED:
            raise Conflict("in-use", f"{needing[0]} waits for {job.id} ({job.state})",
                           f"delete or cancel {needing[0]}, too")
        # Those that still count the job as unmet.
        mark = dict(self.rows(Sql.UNBLOCKING)).get(job.seq, END_OF_TIME)
        for kind, met in enumerate(((COMPLETED,), OVER)):
            self._meet(self._dependents([job.seq], mark if job.state in met else 0,
                                        least=kind, most=kind), now)
        for statement in Sql.DELETE_JOB:
            self.do(statement, {"seq": job.seq})
        self.count(job.queue, job.state, -1)
        self.tally(now, job.queue, "delete")    # not shown

    def remove(self, jobs: Sequence[Job], skip: Skip, now: float) -> list[Job]:
        """Delete jobs; `skip` is called with the error of each that is needed."""
        left = sorted(jobs, key=lambda job: -job.seq)   # dependents first
        while True:
            kept = dict[int, Conflict]()
            for job in left:
                try:
                    self._remove(job, now)
                except Conflict as why:     # raised before the first write
                    kept[job.seq] = why
            if len(kept) == len(left):
                break
            left = [job for job in left if job.seq in kept]
        for reason in kept.values():
            skip(reason)
        return [job for job in jobs if job.seq not in kept]

    def edit(self, before: Job, after: Job, now: float) -> Job:
        """Write a user's changes to a job; Conflict, Invalid before the first write."""
        if before.state not in STATES_FOR["edit"]:
            raise Conflict("wrong-state",
                           f"{before.id} is {before.state}, so it cannot be edited",
                           "it must be " + " or ".join(STATES_FOR["edit"]))
        if before.waits is None and after.run_at != before.run_at:
            raise Conflict("wrong-state", f"{before.id} is {before.state}, so no time "
                           "is set for it", f"`queuectl retry {before.id}` takes "
                           "--run-at and --delay")
        if after.run_at != before.run_at:
            refuse_expired(after.run_at, after.expires_at)
        if after.state == FAILED and before.max_retries != after.max_retries \
                and after.attempts >= after.max_retries:
            raise Invalid(f"max_retries: {after.id} has failed {after.attempts} times "
                          "already", f"use at least {after.attempts + 1}",
                          "max_retries")
        if before.waits and after.run_at == before.run_at:
            after = brought_forward(after, now)     # before `updated_at` changes
        waits = waits_of(after, now) if (after.run_at, after.held) != (
            before.run_at, before.held) else before.waits
        after = after._replace(updated_at=iso(now), waits=waits, rank=rank_of(
            after.priority, after.run_at, self.settings()))
        self.change(Sql.EDIT, [after._asdict()])
        self.count(before.queue, before.state, -1)
        self.count(after.queue, after.state, +1)
        return after

    def rerank(self) -> None:
        settings, after = self.settings(), 0
        while rows := self.rows(Sql.WAITING, after=after, limit=PAGE_SIZE):
            self.change(Sql.SET_RANK, [
                {"seq": seq, "rank": rank_of(priority, run_at, settings)}
                for seq, priority, run_at in rows])
            after = rows[-1][0]

    def bring_forward(self, now: float) -> None:
        """Restart delays that began in the future: the clock was set back."""
        jobs = [brought_forward(job, now) for job in self.jobs(
            Sql.DELAYED, ahead=iso(now + CLOCK_NOISE), limit=DUE_BATCH)]
        if jobs:
            settings = self.settings()
            self.change(Sql.EDIT, [
                {**job._asdict(), "rank": rank_of(job.priority, job.run_at, settings)}
                for job in jobs])

    def set_schedule(self, schedule: Schedule, **changes: Any) -> Schedule:
        schedule = schedule._replace(**changes)
        self.do(Sql.SET_SCHEDULE, row_of(schedule))
        return schedule

    def fire(self, schedule: Schedule, now: float) -> str:
        """Add the job of a due schedule, or skip the run and say why: its last job or
        one with its key is unfinished, or the run was missed.
        """
        schedule, due = schedule._replace(next_run=run_after(schedule, now)), \
            schedule.next_run
        if not schedule.catch_up and now - epoch(due) > LATE_SCHEDULE:
            self.set_schedule(schedule)
            return f"its run of {due} was missed and is not made up"
        for last in self.jobs(Sql.JOB_BY_SEQ, seq=schedule.last_job):
            if last.state not in OVER:
                self.set_schedule(schedule, skipped=schedule.skipped + 1)
                return f"a run is skipped, {last.id} is still {last.state}"
        [job], new = self.add([new_job(schedule.job, now)], now)
        if not new:
            self.set_schedule(schedule, skipped=schedule.skipped + 1)
            return f"a run is skipped, {job.id} ({job.state}) has its unique key"
        self.set_schedule(schedule, last_run=iso(now), last_job=job.seq)
        return ""

    def correct_next_run(self, schedule: Schedule, now: float) -> str:
        """Recompute the next run after the clock was set back: as in Debian's cron(8),
        that of an interval by a minute or more, that of a fixed time by three hours.
        """
        next_run, last_run = run_after(schedule, now), schedule.last_run
        repeated = 60 if parse_cron(schedule.cron).is_wild else 10800   # seconds
        if next_run < schedule.next_run and (
                last_run is None or last_run < next_run
                or last_run > iso(now + repeated)):
            self.set_schedule(schedule, next_run=next_run)
        return ""


# ---- 10 Queue ----------------------------------------------------------------
# The library. A method that writes checks its arguments before it takes the write lock,
# if possible, and wakes the workers after the commit.

SWEEP_BATCH = 100       # jobs changed in one transaction: some 10 ms of write lock
SWEEP_PAUSE = 0.003     # seconds between two of these, for other writers
LONG_WAIT = 3600.0      # seconds; a due job that waits longer is reported
DUE_COUNTED = 1000      # due jobs of a queue that `status` counts: 2 ms
WATCH_TICK = 0.02       # seconds between two checks for commits, of 5 us each


def current_directory() -> str:
    """The default cwd of jobs; Invalid if it cannot be stored."""
    try:
        return as_utf8(os.getcwd())
    except (FileNotFoundError, UnicodeError) as error:
        raise Invalid("the current directory is gone" if isinstance(error, OSError)
                      else "the current directory's name is not UTF-8", "give a cwd",
                      "cwd") from None


def _states(state: str | Sequence[str]) -> list[str]:
    return [*dict.fromkeys(map(parse_state, [state] if isinstance(state, str)
                               else state))]


def _bound(filters: Mapping[str, Any]) -> dict[str, Any]:
    """The values of filters; Sql.listing makes a clause for each key.

    An unknown filter is a TypeError: ignoring it would list, or delete, more jobs.
    """
    unknown = {*filters} - {*Sql.FILTERS, "ended_seq"}
    if unknown:
        raise TypeError(f"no such filter: {', '.join(sorted(unknown))}")
    stored: dict[str, Callable[[Any], str]] = {
        "search": lambda text: "%{}%".format(
            re.sub(r"([%_\\])", r"\\\1", FILTERS["search"].kind.parse(text))),
        "exit_code": json.dumps, "since": iso}
    return {key: stored[key](value) if key in stored else value
            for key, value in filters.items() if value is not None}


def _refuse(why: QueueError) -> NoReturn:
    raise why


_warning = functools.partial(Finding, WARNING)


def _refuse_older_workers(db: SQLite) -> None:
    """Refuse an upgrade that would break a running worker, and lose its runs."""
    host = Host(db.path)
    with contextlib.closing(host.locks):
        for worker in (Worker(*row) for row in db.rows(Sql.WORKERS)):
            if host.is_alive(worker):
                raise Conflict("in-use", f"worker {worker.name} of an older queuectl "
                               f"uses {db.path}", "let it finish its jobs with `kill "
                               f"{worker.pid}`, then try again")


class Queue:
    """A queue: each public method is one transaction, or only reads.

    A missing database is created, or with `create` false refused. Threads may share an
    object; after a fork, each process opens its own. All methods may raise Unavailable,
    or Refused for a damaged file; those that write also Gone, if it was deleted.
    `clock` returns epoch seconds; timeouts use the monotonic clock.

        with Queue("queue.db") as queue:
            job = queue.enqueue("make test", priority=5, delay="10m", tags=["ci"])
            queue.wait(job.id, timeout=3600)[0].exit_code
    """

    def __init__(self, path: str = "queue.db", create: bool = True,
                 clock: Callable[[], float] = time.time,
                 host: Host | None = None) -> None:
        self.store = Ledger(SQLite(os.fspath(path), create, _refuse_older_workers))
        self.path = self.store.db.path
        self.clock = clock
        self.host = host or Host(self.path)

    def __enter__(self) -> Queue:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.store.db.close()
        self.host.locks.close()

    @contextlib.contextmanager
    def _writing(self, message: bytes = NEW_JOBS) -> Iterator[Ledger]:
        """A transaction; it wakes the workers after its commit."""
        with self.store.transaction() as store:
            yield store
        self.wake(message)

    def enqueue(self, command: str | None = None, **fields: Any) -> Job:
        """Add one job; `fields` are the keys of a job object, as `delay=10`.

        Raises Invalid (with the `key` at fault) and Conflict. If the `unique` or `once`
        key is taken, returns the job that has it, unchanged.
        """
        return self.enqueue_many([{"command": command, **fields}])[0]

    def enqueue_many(self, jobs: Iterable[Job | dict[str, Any]]) -> list[Job]:
        """As `enqueue`, all of these jobs or none; they may name each other in `after`.
        `item` of an error is the index of the job at fault.
        """
        return self.add(jobs)[0]

    def add(self, jobs: Iterable[Job | dict[str, Any]]) -> tuple[list[Job], int]:
        """As `enqueue_many`; also returns how many of the jobs are new."""
        now, wanted = self.clock(), list[Job]()
        for item, given in enumerate(jobs):
            with at_item(item):
                job = given if isinstance(given, Job) else new_job(given, now)
                wanted.append(job if job.cwd
                              else job._replace(cwd=current_directory()))
        with self._writing() as store:
            begun = self.clock()    # a delay counts from the call: see since_set_back
            return store.add([
                job if not job.run_at or job.at_time else
                job._replace(run_at=since_set_back(job.run_at, now, begun))
                for job in wanted], begun)

    def job(self, job_id: str) -> Job:
        """The job of that id, else NotFound."""
        return self.store.job(job_id)

    def shown(self, job_id: str) -> Job:
        """As `job`, as people see it: one claimed ahead is pending."""
        job = self.job(job_id)
        is_ahead = job.state == PROCESSING and job.seq in self._ahead()
        return as_waiting(job) if is_ahead else job

    def jobs(self, state: str | Sequence[str] = (), sort: str = "newest",
             limit: int = 0, **filters: Any) -> list[Job]:
        """The matching jobs; `sort` is a key of ORDERS, `filters` are keys of
        Sql.FILTERS. Invalid for an unknown state or sort.
        """
        states = _states(state)
        with self.store.snapshot():
            ahead = self._ahead() if PROCESSING in states or not states else {}
            if ahead and states and PENDING not in states:
                filters["ahead"] = json.dumps([*ahead])
            found = self._jobs(states, sort, limit, **filters)
        return [as_waiting(job) if job.seq in ahead else job for job in found]

    def _jobs(self, states: Sequence[str], sort: str, limit: int = 0,
              **filters: Any) -> list[Job]:
        # As stored, so that they may be changed.
        if sort not in ORDERS:
            raise Invalid(f"cannot sort by {sort!r}", "use " + ", ".join(ORDERS))
        values = _bound(filters)
        return self.store.jobs(Sql.listing(states, ORDERS[sort], values),
                               limit=limit or END_OF_TIME, **values)

    def _ahead(self) -> dict[int, str]:
        """The queues of jobs claimed ahead, by seq; people see them waiting. A worker
        starts jobs in the order of its claims, and stores their slots late.
        """
        held, ahead = collections.Counter[int](), dict[int, str]()
        for worker, slots, taken, queue, seq in self.store.rows(Sql.CLAIMED):
            held[worker] += taken
            if held[worker] > slots:
                ahead[seq] = queue
        return ahead

    def count(self, state: str | Sequence[str] = (), older_than: float | None = None,
              **filters: Any) -> int:
        """The number of matching jobs; arguments as in `sweep`."""
        if older_than is not None:
            filters["ended_before"] = self._ended_before(older_than)
        values = _bound(filters)
        return int(self.store.rows(Sql.counting(_states(state), values),
                                   **values)[0][0])

    def _ended_before(self, older_than: float) -> str:
        # The comparison is `<`, and stored times are whole milliseconds.
        return iso(self.clock() - older_than + 0.001)

    def pages(self, limit: int = 0, state: str | Sequence[str] = (),
              **filters: Any) -> Iterator[Job]:
        """As `jobs`, newest first, read in pages to save memory."""
        before, left = END_OF_TIME, limit or END_OF_TIME
        while left > 0:
            page = self.jobs(state, "newest", min(PAGE_SIZE, left), before=before,
                             **filters)
            yield from page
            if len(page) < PAGE_SIZE:
                return
            before, left = page[-1].seq, left - len(page)

    def runs(self, job_id: str, limit: int = END_OF_TIME) -> list[Run]:
        """The last `limit` runs of a job, oldest first."""
        job = self.store.job(job_id)
        rows = self.store.rows(Sql.RUNS, job=job.seq, limit=limit)
        return [Run(*row) for row in reversed(rows)]

    def run(self, job_id: str, number: int | None = None) -> Run:
        """One run of a job by its number, from 1; by default the last. NotFound."""
        job = self.store.job(job_id)
        row = self.store.row(Sql.RUN, job=job.seq,
                             number=job.runs if number is None else number)
        if row is None:
            what = "has not run yet" if number is None else f"has no run {number}"
            raise NotFound("no-such-run", f"{job_id} {what}",
                           f"`queuectl show {job_id}` says more")
        return Run(*row)

    def last_started(self) -> Job:
        """The job of the newest run, else NotFound."""
        for job in self.store.jobs(Sql.LAST_STARTED):
            return job
        raise NotFound("no-such-run", "no job has run yet",
                       "`queuectl list` shows why each one waits")

    def fresh_run(self, job_id: str, number: int | None = None,
                  patience: float = PEEK_PATIENCE) -> Run:
        """As `run`; if it is running, with its current output."""
        run = self.run(job_id, number)
        if run.outcome is None:
            self.peek(patience)
            run = self.run(job_id, run.number)
        return run

    def peek(self, patience: float = PEEK_PATIENCE) -> None:
        """Ask the workers to store the output of running commands now, and wait up to
        `patience` seconds for that or another commit.
        """
        seen = self.store.changes()
        if self.wake(PEEK):
            self.await_change(seen, patience)

    def events_since(self, seq: int = 0, limit: int = PAGE_SIZE,
                     queue: str | None = None, since: str = "") -> list[Event]:
        """The changes after number `seq`, in the order of commits."""
        return [Event(id, source, target, at, reason or next(
            (move.because for move in MOVES.values()
             if move.target == target and source in move.sources), "enqueued"), seq)
            for id, source, target, at, reason, seq in self.store.rows(
                Sql.EVENTS_AFTER, after=seq, limit=limit, queue=queue, since=since)]

    def last_event(self) -> int:
        """The `seq` of the latest change, 0 if there is none; never decreases."""
        return int(self.store.rows(Sql.COUNTERS)[0][2])

    def await_change(self, seen: int, timeout: float) -> int:
        """Wait up to `timeout` seconds for a commit by another connection since
        `store.changes()` was `seen`; returns its new value.
        """
        end = time.monotonic() + timeout
        while self.store.changes() == seen and (left := end - time.monotonic()) > 0:
            time.sleep(min(WATCH_TICK, left))
        return self.store.changes()

    def wait(self, *job_ids: str, timeout: float | None = None,
             tell: Callable[[Progress], None] = lambda progress: None) -> list[Job]:
        """Wait for jobs; returns each once, as it was when first seen finished. `tell`
        gets the progress.

        Raises NotFound, also for a job deleted meanwhile; Refused after `timeout`
        seconds (`not-finished`), or if no unfinished job can end (`blocked`).
        """
        jobs, over = dict.fromkeys(job_ids), dict[str, Job]()

        def look() -> list[Job] | str:
            wanted = [job_id for job_id in jobs if job_id not in over]
            with self.store.snapshot():
                found = {job.id: job for job in self.named(wanted)}
                ahead = self._ahead()
            for job_id in wanted:
                if job_id not in found:
                    raise no_such_job(job_id)
            over.update((job.id, job) for job in found.values() if job.state in OVER)
            left = len(jobs) - len(over)
            running = sum(job.state == PROCESSING and job.seq not in ahead
                          for job in found.values())
            now = iso(self.clock())
            later = sum(job.waits in (BLOCKED, HELD) or (
                job.waits == SCHEDULED and job.run_at > now) for job in found.values())
            completed = sum(job.state == COMPLETED for job in over.values())
            tell(Progress(left - running, running, completed, len(over) - completed,
                          later))
            if len(over) == len(jobs):
                return [over[job_id] for job_id in jobs]
            caller = self.caller()
            others = [job for job in map(found.__getitem__, wanted) if job.state
                      not in OVER and (caller is None or job.seq != caller.seq)]
            if all(job.waits in (READY, BLOCKED, HELD) for job in others):
                ready = [job for job in others if job.waits == READY]
                stuck, _ = (0, []) if ready else self.stuck(
                    caller=caller, held=True, among=others)
                self._refuse_blocked(caller, ready or others, stuck, len(others))
            return f"{left} of {len(jobs)} jobs"
        return self._wait_for(look, timeout)

    def wait_all(self, queue: str | None = None, timeout: float | None = None,
                 tell: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Wait until no job (of the queue) is unfinished, including jobs added
        meanwhile; returns what has finished since the call. Otherwise as `wait`.
        """
        first = self.progress(queue)

        def look() -> Progress | str:
            now = self.progress(queue).since(first)
            tell(now)
            if not now.left:
                return now
            caller = self.caller()
            own = int(caller is not None and queue in (None, caller.queue))
            if now.running <= own:
                stuck, jobs = self.stuck(queue, caller, held=True)
                if stuck < now.waiting:
                    jobs = self.jobs(WAITING, "priority", 1, queue=queue)
                self._refuse_blocked(caller, jobs, stuck, now.waiting)
            return counted(now.left, "job")
        return self._wait_for(look, timeout)

    def _wait_for(self, look: Callable[[], T | str], timeout: float | None) -> T:
        """Call `look` until it returns a result; a text names what is unfinished."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while True:
            seen, began = self.store.changes(), time.monotonic()
            found = look()
            if not isinstance(found, str):
                return found
            now = time.monotonic()
            if now >= end:
                error = Refused("not-finished", f"{found} not over yet",
                                "wait longer, or see `queuectl list`")
                error.exit_status = EX_TIMEOUT
                raise error
            # Limit polling to a sixth of a core, however long a look takes.
            time.sleep(min(5 * (now - began), end - now))
            self.await_change(seen, min(FALLBACK_POLL, end - time.monotonic()))

    def named(self, job_ids: Sequence[str]) -> list[Job]:
        """Those of the jobs that exist, in any order."""
        return self.store.jobs(Sql.JOBS_NAMED, ids=json.dumps(job_ids)) \
            if job_ids else []

    def caller(self) -> Job | None:
        """The job of this queue that runs this process; None: not part of a job."""
        claim, path = (os.environ.get(name, "") for name in (
            "QUEUECTL_CLAIM", "QUEUECTL_DB"))
        if not re.fullmatch("[0-9]{1,18}", claim) \
                or os.path.realpath(path) != self.path:
            return None
        found = self.store.jobs(Sql.JOB_BY_CLAIM, claim=int(claim))
        return found[0] if found else None

    def _refuse_blocked(self, caller: Job | None, jobs: Sequence[Job], stuck: int,
                        left: int) -> None:
        """Refuse if all `left` jobs are `stuck`, or the first of `jobs` needs the slots
        of `caller`.
        """
        if stuck >= left and not jobs:
            raise Refused("blocked", f"{caller.id if caller else 'this job'} runs this "
                          "command, so it cannot end before the command does",
                          "wait for other jobs, or outside of the job")
        if stuck >= left:
            others = f" (and {stuck - 1} more)" if stuck > 1 else ""
            raise Refused("blocked", f"{jobs[0].id}{others} cannot run: it "
                          f"{self.why_stuck(jobs[0])}", "retry, release or cancel that "
                          "job, or cancel what comes after it")
        if not caller or not jobs or jobs[0].waits != READY:
            return
        job, limits = jobs[0], {view.name: view.limit for view in self.queues()}
        workers = [one for one in self.workers()
                   if one.takes(job.queue) and not one.is_expired]
        has_last_slot = caller.worker in [one.name for one in workers] and all(
            one.slots - caller.slots * (one.name == caller.worker) < job.slots
            for one in workers)
        if has_last_slot or (caller.queue == job.queue and limits.get(job.queue) == 1):
            raise Refused("blocked", f"{job.id} cannot start: {caller.id}, which runs "
                          "this command, has the slots that it needs", "let the job "
                          "end first, or start another worker")

    def stuck(self, queue: str | None = None, caller: Job | None = None,
              held: bool = False, among: Sequence[Job] | None = None
              ) -> tuple[int, list[Job]]:
        """The number of jobs (of those `among` which) blocked forever, or by `caller`,
        and the first of them; with `held` also held jobs, and those after them.
        """
        rows = self.store.rows(
            Sql.STUCK, caller=caller and caller.seq, queue=queue, held=int(held),
            among=None if among is None else json.dumps([job.seq for job in among]))
        return sum(row[-1] for row in rows), [job_of(row[:-1]) for row in rows]

    def why_stuck(self, job: Job) -> str:
        """What blocks a job of `stuck`, as `comes after build (dead)`."""
        return "is held" if job.held else "comes after " + next(
            (f"{id} ({state})" for state, id in self._needed(job)), "other jobs")

    def _needed(self, job: Job) -> list[tuple[str, str]]:
        """The states and ids of the jobs that a blocked job waits for, worst first."""
        worst = DEAD, CANCELLED, HELD, PENDING, FAILED, PROCESSING
        return sorted(((HELD if one.held else one.state, one.id)
                       for one in self.named([*job.after, *job.after_any])
                       if one.state not in (
                           (COMPLETED,) if one.id in job.after else OVER)),
                      key=lambda need: worst.index(need[0]))

    def is_all_paused(self) -> bool:
        return any(name == EVERY_QUEUE for name, _, _ in self.store.rows(Sql.QUEUES))

    def _stops(self, workers: Sequence[Worker]) -> Callable[[str], list[Finding]]:
        """A function: why no job of a queue starts."""
        views, all_paused = {one.name: one for one in self.queues()}, \
            self.is_all_paused()

        def stops(queue: str) -> list[Finding]:
            _, paused, limit, counts = views.get(queue) \
                or QueueView(queue, False, 0, {PROCESSING: 0})
            return [_warning(*row) for is_so, *row in (
                (all_paused, "paused", "all queues are paused", ""),
                (paused, "paused", f"queue `{queue}` is paused", ""),
                (limit and counts[PROCESSING] >= limit, "limit",
                 f"queue `{queue}` is at its limit {limit}",
                 f"`queuectl queue set {queue} --limit N` changes it"),
                (not workers, "no-worker", "no worker is running",
                 "`queuectl worker start` starts one"),
                (workers and not any(one.takes(queue) for one in workers), "no-worker",
                 f"no worker takes queue `{queue}`",
                 f"`queuectl worker start --queue {queue}` starts one")) if is_so]
        return stops

    def hindrances(self, jobs: Iterable[Job]) -> dict[str, list[Finding]]:
        """Why each of these jobs waits, by id ([]: only for its turn), or that the
        worker that runs it is gone.
        """
        workers = [one for one in self.workers() if not one.is_expired]
        names, stops, found = {one.name for one in workers}, self._stops(workers), {}
        most = max([0, *(one.slots for one in workers)])
        # The first that may start may wait for more slots. Few rows: the line is long.
        first = [one for one in self.store.jobs(Sql.LINE, widest=MAX_SLOTS, limit=20)
                 if one.slots <= most and not stops(one.queue)][:1]
        for job in jobs:
            if job.state == PROCESSING and job.worker not in names:
                found[job.id] = [_warning(
                    "no-worker", f"its worker {job.worker} is gone; "
                    "`queuectl worker start` runs it again", "")]
            if job.waits is None:
                continue
            found[job.id] = [_warning(
                "blocked", f"after {id} ({state})",
                f"retry {id}, or cancel what comes after it"
                if state in (DEAD, CANCELLED) else "")
                for state, id in (self._needed(job) if job.waits == BLOCKED else ())]
            tries = f" (retry {job.attempts} of {job.max_retries - 1})" \
                if job.state == FAILED and job.attempts else ""
            able = [one for one in workers if one.takes(job.queue)]
            free = [one.slots - one.busy for one in able if one.slots >= job.slots]
            fits = [one for one in able
                    if one.slots - one.busy >= job.slots and job.waits == READY]
            found[job.id] += stops(job.queue) + [Finding(*row) for is_so, *row in (
                (job.held, WARNING, "held", "held",
                 f"`queuectl release {job.id}` lets it run"),
                (job.expires_at and job.expires_at <= iso(self.clock()), WARNING,
                 "expired", "expired: the next worker cancels it", ""),
                (job.waits == SCHEDULED, NOTE, "due",
                 f"due {ago(job.run_at, self.clock())}{tries}", ""),
                (able and not free, WARNING, "too-wide",
                 f"needs {job.slots} slots, the largest worker has "
                 f"{max([0, *(one.slots for one in able)])}", ""),
                (free and job.waits == READY and max(free) < job.slots > 1, NOTE,
                 "slots", f"waits for {job.slots} slots, {max([0, *free])} free", ""),
                *((fits and one.id != job.id and all(
                    each.takes(one.queue)
                    and each.slots - each.busy < one.slots <= each.slots
                    for each in fits), NOTE, "behind",
                   f"behind {one.id}, which waits for {one.slots} slots", "")
                  for one in first),
            ) if is_so]
        return found

    def waiting_for(self, job: Job) -> list[str]:
        """Why a job waits, or that its worker is gone, as text."""
        found = self.hindrances([job]).get(job.id, [])
        reasons = [one.message for one in found]
        if job.waits is None or any(one.code != "slots" for one in found):
            return reasons
        stops = self._stops([one for one in self.workers() if not one.is_expired])
        n = sum(self.store.rows(Sql.BEFORE, queue=view.name, rank=job.rank,
                                run_at=job.run_at, seq=job.seq)[0][0]
                for view in self.queues() if not stops(view.name))
        return reasons + [f"behind {counted(n, 'other job')}"] * bool(n) \
            or ["next in line"]

    def left_waiting(self, queues: Collection[str] = ()) -> Iterator[str]:
        """What waits in these queues (default: all) after `--drain`, and why."""
        for view in self.queues():
            left = sum(view.counts[state] for state in WAITING)
            if not left or (queues and view.name not in queues):
                continue
            stuck, jobs = self.stuck(view.name, held=True)
            for job in jobs:
                yield f"left waiting: {stuck} of queue {view.name} cannot run: " \
                    f"{job.id} {self.why_stuck(job)}"
            later = [job for job in self.jobs(
                WAITING, "run-at", PAGE_SIZE, queue=view.name)
                if job.waits in (SCHEDULED, READY)]
            for job in later[:1]:
                why = [one.message for one in self.hindrances([job])[job.id]
                       if one.code != "no-worker"] or [
                           f"needs {counted(job.slots, 'slot')}"]
                yield f"left waiting: {left - stuck} of queue {view.name}: {job.id} " \
                    + ", ".join(why)

    def counts(self, queue: str | None = None) -> dict[str, int]:
        """The number of jobs in each state; those claimed ahead count as pending."""
        counts = dict.fromkeys(STATES, 0)
        for (name, state), n in self._counts().items():
            if queue in (None, name):
                counts[state] += n
        return counts

    def _counts(self) -> dict[tuple[str, str], int]:
        with self.store.snapshot():
            counts = collections.Counter(self.store.counts())
            for queue in self._ahead().values():
                counts[queue, PROCESSING] -= 1
                counts[queue, PENDING] += 1
        return counts

    def status(self) -> Status:
        """What `status` shows; several reads, not one snapshot."""
        counts, workers = self.counts(), self.workers()
        due = self.store.jobs(Sql.NEXT_DUE)
        schedule = min((one for one in self.schedules() if not one.paused),
                       key=lambda one: one.next_run, default=None)
        stuck = self.stuck() if counts[DEAD] + counts[CANCELLED] else (0, [])
        return Status(
            counts, workers,
            [name for name, paused, _ in self.store.rows(Sql.QUEUES) if paused],
            due[0] if due else None, self.path, schedule,
            stuck[0], [*self._attention(workers, *stuck)],
            self.store.rows(Sql.COUNT_HELD)[0][0])

    def _attention(self, workers: Sequence[Worker], n_stuck: int,
                   stuck: Sequence[Job]) -> Iterator[Finding]:
        """What keeps due work from running; the last two arguments are of `stuck`."""
        now, workers = self.clock(), [one for one in workers if not one.is_expired]
        stops, oldest = self._stops(workers), self._oldest(
            [view.name for view in self.queues()], now, Sql.OLDEST_ENDS)
        paused = [name for name in oldest
                  if any(one.code == "paused" for one in stops(name))]
        for name in sorted({*oldest} - {*paused}, key=oldest.__getitem__, reverse=True):
            most = max([0, *(one.slots for one in workers if one.takes(name))])
            [[n, first]] = self.store.rows(Sql.COUNT_WIDE, queue=name, widest=most)
            if n and most:
                yield _warning(
                    "too-wide", f"{counted(n, 'job')} of queue {name} cannot run: "
                    f"{first} needs more than {counted(most, 'slot')}, and no worker "
                    "has more", f"`queuectl edit {first} --slots {most}`, or start a "
                    "larger worker")
            if most and oldest[name] < LONG_WAIT:
                continue
            [[n]] = self.store.rows(Sql.COUNT_DUE, queue=name, now=iso(now),
                                    most=DUE_COUNTED, widest=MAX_SLOTS)
            why = [*stops(name), _warning(
                "long-wait", "", "start more workers, or see with `queuectl status` "
                "what runs instead")][0]
            text = f"queue {name} has {n}{'+' * (n == DUE_COUNTED)} due " \
                f"job{'s' * (n != 1)}, the oldest for {span(oldest[name])}"
            yield why._replace(message=f"{text}; {why.message}".rstrip("; "))
        if paused and len(paused) == len(oldest):
            yield _warning(
                "paused", f"all due jobs are in paused queues: {', '.join(paused)}",
                "`queuectl resume` starts them" if self.is_all_paused()
                else f"`queuectl resume --queue {paused[0]}`")
        for one in sorted(self.schedules(), key=lambda one: one.next_run):
            last = self.last_job(one)
            if one.paused:
                continue
            if last and self._skips(one, last):
                yield _warning(
                    "schedule-skips", f"schedule {one.name} skips runs ({one.skipped} "
                    f"so far): {last.id} is still {last.state}",
                    f"`queuectl show {last.id}`; a --timeout ends a run that hangs")
            if last and last.state == DEAD:
                yield _warning("schedule-failed", "the last job of schedule "
                               f"{one.name}, {last.id}, is dead: {last.error}",
                               f"`queuectl logs {last.id}`")
            if one.next_run < iso(now - (LATE_SCHEDULE if workers else 0.0)):
                late = f"schedule {one.name} has been due for " \
                    f"{span(now - epoch(one.next_run))}, and "
                yield _warning("overdue-schedule", f"{late}its workers do not run it",
                               "see `queuectl worker list`") if workers else _warning(
                                  "no-worker", f"{late}no worker is running",
                                  "`queuectl worker start` starts one")
        hooks = [key for key, value in self.store.settings()._asdict().items()
                 if key.startswith("on_") and value]
        if hooks and workers and HOOKS_QUEUE not in oldest and "no-worker" in [
                one.code for one in stops(HOOKS_QUEUE)]:
            yield _warning("hooks", "no worker takes queue hooks, so the command of "
                           f"{hooks[0].replace('_', '-')} will not run",
                           "`queuectl worker start --queue hooks`")
        for job in stuck:
            yield _warning("blocked", f"{counted(n_stuck, 'job')} cannot run: {job.id} "
                           f"{self.why_stuck(job)}", "retry or cancel what they come "
                           "after; `queuectl list --state pending` shows it")

    @staticmethod
    def _skips(schedule: Schedule, last: Job) -> bool:
        """Return True if a run was skipped since this job of it was added."""
        with contextlib.suppress(Invalid):
            return last.state not in OVER and schedule.next_run > run_after(
                schedule, epoch(schedule.last_run or ""))
        return False

    def queues(self) -> list[QueueView]:
        """The queues that have jobs, a limit or a pause, and the default queue."""
        counts: dict[str, dict[str, int]] = {}
        for (name, state), n in self._counts().items():
            counts.setdefault(name, dict.fromkeys(STATES, 0))[state] = n
        known = {name: (bool(paused), limit)
                 for name, paused, limit in self.store.rows(Sql.QUEUES)}
        return [QueueView(name, *known.get(name, (False, 0)), counts.get(
            name, dict.fromkeys(STATES, 0)))
            for name in sorted({DEFAULT_QUEUE, *counts, *known} - {EVERY_QUEUE})]

    def progress(self, queue: str | None = None) -> Progress:
        """The progress of a queue, or of all. Deletions do not reduce it."""
        counts = self.counts(queue)
        over = dict(self.store.rows(Sql.OVER_EVER, queue=queue))
        [[later]] = self.store.rows(Sql.COUNT_LATER, queue=queue, now=iso(self.clock()))
        waiting = sum(counts[state] for state in WAITING)
        return Progress(
            waiting, counts[PROCESSING], over.get("complete", 0),
            over.get("bury", 0) + over.get("cancel", 0), min(later, waiting))

    def workers(self) -> list[Worker]:
        """The workers that are not dead, with their running jobs; one on another
        machine until it is removed. Not in a transaction: it may run `ps` (I9).
        """
        settings = self.store.settings()
        # By the clocks of two machines, so never used to reap runs.
        oldest = iso(self.clock() - lease_of(settings))
        running: dict[int, list[Job]] = {}
        with self.store.snapshot():
            ahead = self._ahead()
            for run in [Run(*row) for row in self.store.rows(Sql.UNDER_WAY)]:
                running.setdefault(run.worker_id, []).extend(
                    job for job in self.store.jobs(Sql.JOB_BY_CLAIM, claim=run.claim)
                    if job.seq not in ahead)
        found = [(one, self.host.is_alive(one)) for one in self.store.workers()]
        return [one._replace(
            is_alive=is_alive,
            is_expired=is_alive is None and one.heartbeat_at < oldest,
            late_after=3 * settings.heartbeat,      # one may be late on a busy machine
            running=running.get(one.id, ()))
            for one, is_alive in found if is_alive is not False]

    def backup(self, path: str) -> None:
        """Copy the queue while workers run; see `SQLite.backup`."""
        self.store.db.backup(system_path(path))

    def stats(self, duration: float | None = None) -> dict[str, Summary]:
        """Totals by queue, "" for all, over the last `duration` seconds (None: since it
        was created), in whole minutes, at most eight days (see `covered`).
        """
        rows = self.store.rows(Sql.TALLIES_EVER) if duration is None else \
            self.store.rows(Sql.TALLIES_SINCE, minute=self._minute(duration))
        queues = sorted({queue for queue, kind, *_ in rows if kind != "delete"})
        return {queue: summary(row[1:] for row in rows if queue in ("", row[0]))
                for queue in ["", *queues]}

    def _minute(self, duration: float) -> int:
        # At least 1: minute 0 is all time.
        now = self.clock()
        return max(1, int((now - duration) // 60), int(now // 60) - KEPT_MINUTES)

    def covered(self, duration: float | None) -> float:
        """The seconds that `stats` covers, at most the queue's age."""
        now = self.clock()      # may have been set back
        age = max(0.001, now - epoch(self.store.meta("created_at")))
        return age if duration is None else min(age, now - 60 * self._minute(duration))

    def history(self, minutes: int, queue: str | None = None) -> list[Summary]:
        """Totals of each of the last minutes, oldest first, the current one last."""
        last = int(self.clock() // 60)
        first = max(1, last - minutes + 1)
        found: dict[int, list[tuple[str, int, int, float]]] = {
            minute: [] for minute in range(first, last + 1)}
        for minute, *tally in self.store.rows(Sql.TALLIES_BY_MINUTE, first=first,
                                              last=last, queue=queue):
            found[minute].append(tuple(tally))
        return [summary(rows)._replace(at=iso(minute * 60))
                for minute, rows in found.items()]

    def _oldest(self, queues: Iterable[str], now: float,
                ready: str = Sql.OLDEST_READY) -> dict[str, float]:
        # Seconds since the first job of each queue was due.
        due = dict(self.store.rows(Sql.OLDEST_DUE, now=iso(now)))
        first = {queue: min(filter(None, (
            due.get(queue), *(row[0] for row in self.store.rows(
                ready, queue=queue)))), default=None) for queue in queues}
        return {queue: max(0.0, now - epoch(run_at)) for queue, run_at in first.items()
                if run_at is not None}

    def scrape(self) -> Scrape:
        """The values of the metrics; in a snapshot, so that each job counts once."""
        now = self.clock()
        with self.store.snapshot():
            jobs = self._counts()
            tallies = self.store.rows(Sql.TALLIES_EVER)
            oldest = self._oldest({queue for queue, _ in jobs}, now)
            paused = {name: bool(paused) for name, paused, _
                      in self.store.rows(Sql.QUEUES)}
            schedules = self.schedules()
            blocked, _ = self.stuck()
        return Scrape(jobs, tallies, oldest, paused, self.workers(),
                      self.store.db.size(), schedules, blocked)

    # Changing jobs: all or none of those named, or all that match, in a sweep. Raises
    # NotFound, and Conflict for a job in another state. `skip` is called with the error
    # of each unchanged job; for named ones it raises it.

    def retry(self, *job_ids: str, **fields: Any) -> list[Job]:
        """Make jobs due now, with attempts reset to 0, and change fields as `edit`.
        Earlier runs are kept; jobs waiting for a retried one wait for it again.
        """
        return self._change("retry", job_ids, fields)

    def retry_dead(self, *job_ids: str, **fields: Any) -> list[Job]:
        """As `retry`, for dead jobs only."""
        return self._change("retry", job_ids, fields, DEAD)

    def cancel(self, *job_ids: str) -> list[Job]:
        """Cancel jobs. A running one is returned as 'processing': its worker ends it,
        or it completes.
        """
        return self._change("cancel", job_ids)

    def delete(self, *job_ids: str) -> list[Job]:
        """Delete jobs with their history; Conflict, too, if another job waits."""
        return self._change("delete", job_ids)

    def hold(self, *job_ids: str) -> list[Job]:
        """Let waiting jobs wait until they are released, or retried."""
        return self._change("hold", job_ids)

    def release(self, *job_ids: str) -> list[Job]:
        return self._change("release", job_ids)

    def edit(self, *job_ids: str, **fields: Any) -> list[Job]:
        """Change fields (use u in FIELDS) of waiting or dead jobs, but no time of dead
        ones; Invalid has the `key` at fault.
        """
        return self._change("edit", job_ids, fields)

    def _change(self, verb: str, job_ids: Sequence[str],
                fields: Mapping[str, Any] = {}, state: str | None = None) -> list[Job]:
        change = self._changer(verb, fields)
        with self._writing(NEW_ORDERS if verb == "cancel" else NEW_JOBS) as store:
            # Each once: a second move would fail, as the state has changed (I1).
            jobs = [store.job(job_id) for job_id in dict.fromkeys(job_ids)]
            for job in jobs:
                if state not in (None, job.state):
                    raise Conflict("wrong-state", f"{job.id} is {job.state}, not "
                                   f"{state}", f"`queuectl retry {job.id}` retries any "
                                   "job")
            return change(jobs, _refuse)

    def _changer(self, verb: str, fields: Mapping[str, Any]
                 ) -> Callable[[list[Job], Skip], list[Job]]:
        """A function that changes jobs, within a transaction; Invalid for a field."""
        changes: dict[str, Callable[[list[Job], Skip], list[Job]]] = {
            "retry": self._retry, "cancel": self._cancel, "edit": lambda jobs, _: jobs,
            "hold": self._hold, "release": functools.partial(self._hold, held=False),
            "delete": lambda jobs, skip: self.store.remove(jobs, skip, self.clock())}
        change = changes[verb]
        if not fields:
            return change
        asked = self.clock()
        edits = checked(fields, asked, "u")

        def change_and_edit(jobs: list[Job], skip: Skip) -> list[Job]:
            jobs, edited, now = change(jobs, skip), list[Job](), self.clock()
            values = edits if edits.get("at_time", True) else {
                **edits, "run_at": since_set_back(edits["run_at"], asked, now)}
            for job in jobs:
                try:
                    edited.append(self.store.edit(job, job._replace(**values), now))
                except (Conflict, Invalid) as why:
                    skip(why)
            return edited
        return change_and_edit

    def sweep(self, verb: str, state: str | Sequence[str] = (),
              keep: Skip = lambda why: None, fields: Mapping[str, Any] = {},
              **filters: Any) -> Iterator[list[Job]]:
        """Change all matching jobs, in small transactions; each yields the changed
        jobs, and the caller may stop. `verb` is a key of STATES_FOR.

        Jobs in another state are passed over; for those whose unique key is taken, or
        that others wait for, `keep` is called with the error. `older_than`: only jobs
        that finished so many seconds ago. Other filters as in `jobs`.
        """
        change = self._changer(verb, fields)
        older_than = filters.pop("older_than", None)
        states, sort, is_again = _states(state), "newest", True
        if older_than is not None:
            if not {*states} <= {*OVER}:    # a failed job is waiting
                raise Invalid("`older_than` counts from a job's end",
                              "it fits " + ", ".join(OVER))
            states, sort = states or [*OVER], "ended"
            filters["ended_before"] = self._ended_before(older_than)
        # By key, as skipped jobs still match; chains of dependents take several passes.
        while is_again:
            kept, n, place, is_more = list[QueueError](), 0, dict(filters), True
            while is_more:
                with self.store.transaction():
                    found = self._jobs(states, sort, SWEEP_BATCH, **place)
                    changed = change([job for job in found
                                      if job.state in STATES_FOR[verb]], kept.append)
                if changed and verb != "delete":    # which unblocks nothing
                    self.wake(NEW_ORDERS if verb == "cancel" else NEW_JOBS)
                yield changed       # outside the transaction, as the caller may be slow
                n, is_more = n + len(changed), len(found) == SWEEP_BATCH
                if is_more:
                    place.update({"before": found[-1].seq} if sort == "newest" else {
                        "ended_at": found[-1].finished_at, "ended_seq": found[-1].seq})
                    time.sleep(SWEEP_PAUSE)
            is_again = verb == "delete" and bool(kept) and n > 0
        for why in kept:
            keep(why)
        while verb == "delete":
            with self.store.transaction() as store:
                may_go_on = store.db.shrink()
            if not may_go_on:
                return
            yield []
            time.sleep(SWEEP_PAUSE)

    def _retry(self, jobs: Sequence[Job], skip: Skip) -> list[Job]:
        now, changes, holders = self.clock(), list[Change](), dict[str, Job]()
        for job in jobs:
            key = job.unique if job.state in OVER else None
            if key is not None and key not in holders:
                holders.update((key, holder) for holder in self.store.jobs(
                    Sql.JOB_BY_UNIQUE, unique=key))
            if key in holders:
                holder = holders[key]
                skip(Conflict(
                    "in-use", f"{job.id} cannot wait again: {holder.id} has the same "
                    f"unique key {key!r}", "retry one of the two" if holder.state in
                    OVER else f"wait for {holder.id}, or cancel it"))
                continue
            if key is not None:
                holders[key] = job
            # The results of the last run are kept in its own row.
            changes.append(Change("retry", job, job._replace(
                attempts=0, crashes=0, run_at=iso(now), at_time=False, started_at=None,
                finished_at=None, exit_code=None, error=None)))
        return [change.after for change in self.store.move(changes, now)]

    def _cancel(self, jobs: Sequence[Job], _: object) -> list[Job]:
        """For a running job, store a request: its state changes when its run ends."""
        now = self.clock()
        running = [job for job in jobs if job.state == PROCESSING]
        self.store.change(Sql.REQUEST_END, [
            {"claim": job.claim, "end_requested": CANCEL} for job in running])
        moved = self.store.move([Change("cancel", job, job._replace(
            finished_at=iso(now))) for job in jobs if job.state != PROCESSING], now)
        changed = {job.seq: job for job in (
            *(change.after for change in moved),
            *(job._replace(end_requested=CANCEL) for job in running))}
        return [changed[job.seq] for job in jobs]

    def _hold(self, jobs: Sequence[Job], skip: Skip, held: bool = True) -> list[Job]:
        changed, now = list[Job](), self.clock()
        for job in jobs:
            if job.waits and job.held != held:
                changed.append(self.store.edit(job, job._replace(held=held), now))
            elif skip is _refuse:       # a sweep passes over it
                state = job.state if not job.waits else "held" if held else "not held"
                raise Conflict("wrong-state", f"{job.id} is {state}",
                               f"`queuectl show {job.id}` says more")
        return changed

    def pause(self, *queues: str) -> None:
        """Stop claiming from these queues (default: all); running jobs continue."""
        self._set_queues(queues, Sql.SET_PAUSED, paused=True)

    def resume(self, *queues: str) -> None:
        """End the pause of these queues; without names, that of all together, while
        queues that were paused by name stay paused.
        """
        self._set_queues(queues, Sql.SET_PAUSED, paused=False)

    def limit_queue(self, queue: str, limit: int) -> None:
        """Limit the jobs of a queue that run at once, over all workers; 0: no limit."""
        self._set_queues([queue], Sql.SET_LIMIT,
                         job_limit=_whole(0, _AMOUNT).parse(limit))

    def _set_queues(self, names: Sequence[str], sql: str, **values: int) -> None:
        names = [*map(parse_name, names)] or [EVERY_QUEUE]
        with self._writing() as store:
            store.write(sql, [{"name": name, **values} for name in names])
            store.do(Sql.FORGET_QUEUES, {})

    def schedules(self) -> list[Schedule]:
        return self.store.schedules()

    def schedule(self, name: str) -> Schedule:
        """The schedule of that name, else NotFound."""
        known = {one.name: one for one in self.schedules()}
        if name not in known:
            raise NotFound("no-such-schedule", f"there is no schedule {name!r}",
                           nearest(name, known)
                           or "`queuectl schedule list` shows them")
        return known[name]

    def last_job(self, schedule: Schedule) -> Job | None:
        """The last job of a schedule; None if there was none, or it was deleted."""
        found = self.store.jobs(Sql.JOB_BY_SEQ, seq=schedule.last_job)
        return found[0] if found else None

    def add_schedule(self, name: str, cron: str, tz: str | None = None,
                     catch_up: bool = True, **fields: Any) -> Schedule:
        """Add a schedule; `fields` are its jobs', which get the tag `schedule:NAME`.

        `tz` is an IANA name; None: the zone of `CRON_TZ=` before the line, else the
        local zone, by its name. `catch_up`: missed runs cause one late run. Invalid,
        also for `id`, `after` and times of the job; Conflict for a taken name.
        """
        now = self.clock()
        parse_name(name)
        line, zone = split_zone(cron, tz, now)
        fields["cwd"] = fields.get("cwd") or current_directory()
        schedule = Schedule(name, line, self._schedule_job(name, fields), False,
                            iso(now), "", None, None, zone, 0, None, catch_up)
        with self._writing() as store:
            if name in [one.name for one in store.schedules()]:
                raise Conflict("schedule-exists",
                               f"there is a schedule {name!r} already",
                               f"`queuectl schedule edit {name}` changes it")
            store.do(Sql.INSERT_SCHEDULE, {
                **row_of(schedule), "next_run": run_after(schedule, now)})
            return self.schedule(name)

    def edit_schedule(self, name: str, cron: str | None = None, tz: str | None = None,
                      catch_up: bool | None = None, **fields: Any) -> Schedule:
        """Change a schedule, from its next run on; None: as it is."""
        with self._writing() as store:
            now, old = self.clock(), self.schedule(name)
            line, zone = split_zone(cron or old.cron, tz, now)
            if tz is None and line == (cron or old.cron):
                zone = old.tz
            new = old._replace(
                cron=line, tz=zone, job=self._schedule_job(name, {**old.job, **fields}),
                catch_up=old.catch_up if catch_up is None else catch_up)
            if (new.cron, new.tz) != (old.cron, old.tz):
                new = new._replace(next_run=run_after(new, now))
            return store.set_schedule(new)

    def _schedule_job(self, name: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        # Stored as given, as each run uses the defaults of its time.
        now = self.clock()
        job = {key.replace("-", "_"): value for key, value in fields.items()}
        for key in {*job} & {"id", "once", "after", "after_any", "run_at", "delay",
                             "expires_at", "held"}:
            raise Invalid(f"{key} does not fit a schedule", "leave it out", key)
        tags = field_value(FIELDS["tags"], job.get("tags") or (), now)
        job["tags"] = [*dict.fromkeys((*tags, f"{SCHEDULE_TAG}{name}"))]
        new_job(job, now)
        return job

    def remove_schedule(self, name: str) -> Schedule:
        """Delete a schedule; its jobs stay."""
        with self.store.transaction() as store:
            schedule = self.schedule(name)
            store.do(Sql.DELETE_SCHEDULE, {"name": name})
        return schedule

    def pause_schedule(self, name: str) -> Schedule:
        """Pause a schedule; its jobs continue."""
        with self.store.transaction() as store:
            return store.set_schedule(self.schedule(name), paused=True)

    def resume_schedule(self, name: str) -> Schedule:
        """End a schedule's pause; missed runs are not made up."""
        with self._writing() as store:
            now, schedule = self.clock(), self.schedule(name)
            new_job(schedule.job, now)
            if schedule.paused:
                schedule = store.set_schedule(schedule, paused=False,
                                              next_run=run_after(schedule, now))
            return schedule

    def run_schedule(self, name: str) -> Job:
        """Enqueue a schedule's job now, even if it is paused; Conflict if an unfinished
        job has its unique key.
        """
        with self._writing() as store:
            now, schedule = self.clock(), self.schedule(name)
            [job], new = store.add([new_job(schedule.job, now)], now)
            if not new:
                raise Conflict("job-exists", f"{job.id} ({job.state}) has the unique "
                               f"key of {name}", f"wait for {job.id}, or cancel it")
            store.set_schedule(schedule, last_run=iso(now), last_job=job.seq)
            return job

    def setting(self, key: str) -> str:
        """The value of a setting as text; NotFound names the nearest key."""
        name = setting_key(key)
        return self.store.stored_settings().get(name, SETTINGS[name].default)

    def configure(self, key: str, value: str | None) -> None:
        """Set a setting, as text (`30s`; `none` or "": off); None: to its default."""
        name = setting_key(key)
        if value is not None:
            value = value.strip() or "none"
            SETTINGS[name].kind.parse(value)
            if name == "shell" and not (os.path.isfile(value)
                                        and os.access(value, os.X_OK)):
                raise Invalid(f"{value} cannot be executed", "give another shell")
        with self._writing(NEW_ORDERS) as store:
            store.do(Sql.UNSET if value is None else Sql.SET,
                     {"key": name, "value": value})
            if name == "priority-ageing":
                store.rerank()

    def stop_workers(self, *names: str, now: bool = False) -> list[Worker]:
        """Request workers (default: all) to finish their jobs and exit, or with `now`
        to kill and requeue them; returns these workers at once.
        """
        living = {worker.name: worker for worker in self.workers()}
        for name in names:
            if name not in living:
                raise NotFound(
                    "no-such-worker", f"no worker {name!r} is running",
                    nearest(name, living) or "`queuectl worker list` shows them")
        asked = [living[name] for name in names or living]
        if asked:
            with self._writing(NEW_ORDERS) as store:
                # By id, so not a later worker of the same name.
                store.write(Sql.STOP_WORKER, [
                    {"id": worker.id, "stop_requested": NOW if now else DRAIN}
                    for worker in asked])
        return asked

    def wake(self, message: bytes) -> bool:
        """Notify all workers; return True if there may be one."""
        ports = [row[0] for row in self.store.rows(Sql.PORTS)]
        if ports:
            notify_workers(ports, message)
        return bool(ports)


# ---- 11 Claims ---------------------------------------------------------------
# The worker's use of the database. All its writes are in one transaction, the tick, as
# an fsync takes milliseconds. Claims are its own runs, Peers the other workers; neither
# starts commands or waits.

CLAIM_SCAN = 64        # ready jobs that a tick reads before it reads queue by queue
EXPIRE_BATCH = 100     # expired jobs that a tick deletes


class Report(NamedTuple):
    """What a tick records."""
    ended: Mapping[int, Outcome] = {}   # own runs, by claim
    lost: Sequence[Run] = ()            # of other workers; their processes have exited
    seized: Sequence[Run] = ()          # of other workers; to be killed next
    dead: Sequence[Worker] = ()         # to be removed if they hold no claim
    outputs: Mapping[int, Output] = {}  # of running commands
    is_heartbeat: bool = False          # also do what is due once a heartbeat


def lost_end(store: Ledger, host: Host, run: Run) -> list[tuple[Claim, Outcome]]:
    """The end of a lost run, to be recorded; [] if another worker has recorded it. One
    that had not begun is released, and counts as no crash.
    """
    outcome = Outcome(LOST, error=f"its worker {run.worker} was lost")
    if host.locks.process_of(run) is None:
        outcome = Outcome(RELEASED, error="its worker was lost before it had begun")
    return [(Claim(job, run.claim, (run.slot,), -1), outcome)
            for job in store.jobs(Sql.JOB_BY_CLAIM, claim=run.claim)]


class Claims:
    """The claims of one worker; used only by the thread of its loop (I9). Inserts the
    worker's row: `port` gets notifications, `pid` is the process to signal.
    """

    def __init__(self, queue: Queue, options: WorkerOptions, port: int | None = None,
                 pid: int = 0) -> None:
        self._queue, self._options = queue, options
        self._store, self._host, self._clock = queue.store, queue.host, queue.clock
        # As of the last commit, with jobs as claimed: a running job is never edited.
        self._held: dict[int, Claim] = {}
        self._taken: list[Claim] = []   # by a tick that is not committed
        self._last_tick = math.inf      # to see the clock set back
        self._begun: set[int] = set()   # spares whose slot is not stored yet
        self._begun_before: frozenset[int] = frozenset()    # at the last tick
        self._expired: dict[str, dict[str, Any]] = {}   # where to continue
        self.lock = -1                  # descriptor that holds the worker's own lock
        try:
            self.worker = self._enter(port, pid or os.getpid())
        except BaseException:
            if self.lock >= 0:
                os.close(self.lock)
            raise

    def _enter(self, port: int | None, pid: int) -> Worker:
        store, host, now = self._store, self._host, iso(self._clock())
        name = self._options.name or f"{host.name}-{pid}"
        # Outside of the transaction, as it may run `ps` (I9).
        worker = Worker(0, name, host.name, host.boot, pid, host.born(pid),
                        self._options.slots, self._options.queues, port, now, now, 0,
                        None, self._options.gpus)
        gone = {one.id for one in store.workers()}
        gone -= {one.id for one in self._queue.workers() if not one.is_expired}
        with store.transaction():
            for one in store.workers():
                if one.name == name and one.id not in gone:
                    raise Conflict("in-use",
                                   f"a worker named {name!r} is running already",
                                   "choose another --name")
                shared = {*worker.gpus} & {*one.gpus}
                if shared and one.host == host.name and one.id not in gone:
                    raise Conflict("in-use", f"worker {one.name} uses GPU "
                                   f"{min(shared)} already", "choose other --gpus")
                if one.name == name:    # its row stays until its runs are recorded
                    store.do(Sql.RENAME_WORKER, {"id": one.id,
                                                 "name": f"{name}#{one.id}"})
            # The lock comes before the row: for another container, which cannot see the
            # process, a row with a free lock is a dead worker.
            number, self.lock = self._lock_number("workers", WORKER_LOCKS)
            worker = worker._replace(id=number)
            store.do(Sql.INSERT_WORKER, row_of(worker))
        return worker

    def leave_if_drained(self) -> bool:
        """Delete the worker's row if no work is left, so that nobody who adds a job
        later sees a worker.
        """
        with self._store.transaction() as store:
            return self.is_drained() and bool(store.do(
                Sql.DELETE_WORKER, {"id": self.worker.id}))

    def leave(self) -> None:
        """Delete the worker's row, after its runs have ended; then release its lock."""
        try:
            with self._store.transaction() as store:
                store.do(Sql.DELETE_WORKER, {"id": self.worker.id})
        finally:
            if self.lock >= 0:
                os.close(self.lock)

    def is_work_ready(self, free: Sequence[int]) -> bool:
        """Return True if a tick may find work for these slots; reads only.

        Due jobs of any queue count, as any worker makes them ready; ready jobs only if
        this worker can claim them, or idle workers would wake each other.
        """
        now = self._clock()
        [[is_any_ready, is_due]] = self._store.rows(Sql.ANY_WORK, now=iso(now),
                                                    ahead=iso(now + CLOCK_NOISE))
        return bool(is_due or (
            is_any_ready and self._choose(len(self._without_used(free)))))

    def next_due(self) -> float | None:
        """Epoch seconds when the next job or schedule is due; None: never."""
        [[at]] = self._store.rows(Sql.DUE_AT)
        return epoch(at) if at else None

    def orders(self) -> tuple[str | None, dict[int, str | None]]:
        """`stop` and `mine` as in `Tick`."""
        row = self._store.row(Sql.STOP_REQUESTED, id=self.worker.id)
        return row[0] if row else None, {
            claim: asked for claim, asked, _ in self._store.rows(
                Sql.MINE, worker=self.worker.name)}

    def tick(self, report: Report, free: Sequence[int],
             most: int | None = None) -> Tick | None:
        """Record the report and claim jobs, `most` at most, for the free slots (0: a
        spare), without the COMMIT; None if another connection is writing.

        Call `commit` next, in any thread, then `committed` or `failed`; until then
        nothing else uses the connection. After a failure, repeat the report.
        """
        if not self._store.begin():
            return None
        self._taken, self._begun_before = [], frozenset(self._begun)
        try:
            return self._write(report, free, most)
        except BaseException:
            self._store.rollback()
            for one in self._taken:
                one.release()
            raise

    def _write(self, report: Report, free: Sequence[int], most: int | None) -> Tick:
        """The order matters: ends of runs free slots and unblock jobs, schedules add
        jobs, due jobs become ready, ready ones are claimed.
        """
        store, now = self._store, self._clock()
        settings = self._options.adapt(store.settings())
        row = store.row(Sql.STOP_REQUESTED, id=self.worker.id)
        if report.is_heartbeat or row is None:
            self._write_heartbeat(now)
            store.write(Sql.BEGIN_RUN, [
                {"claim": claim, "slot": self._held[claim].slot,
                 "started_at": self._held[claim].job.started_at}
                for claim in self._begun - report.ended.keys()])
        # The fence (I3): the end of a claim that is not among these is dropped, as
        # another worker took it. Claims of a dead worker of the same name do no harm.
        rows = store.rows(Sql.MINE, worker=self.worker.name)
        mine = {claim: asked for claim, asked, _ in rows}
        unmet = {claim: n for claim, _, n in rows}
        ends = [(self._as_now(self._held[claim], mine[claim], unmet[claim]), outcome)
                for claim, outcome in report.ended.items() if claim in mine]
        ends += [end for run in report.lost for end in lost_end(store, self._host, run)]
        changes = store.record(ends, settings, now)
        store.write(Sql.SEIZE, [{"claim": run.claim} for run in report.seized])
        removed = [worker for worker in report.dead
                   if store.do(Sql.DELETE_IDLE_WORKER, {"id": worker.id})]
        store.write(Sql.SAVE_OUTPUT, [
            {"claim": claim, "output": output.kept(), "output_bytes": output.total}
            for claim, output in report.outputs.items()])
        store.bring_forward(now)
        notes, behind = list[str](), store.unblock_more(now)
        [[due_at]] = store.rows(Sql.DUE_AT)
        if now < self._last_tick - CLOCK_NOISE or (due_at and due_at <= iso(now)):
            notes, behind = self._fire(now), store.expire(now) or behind
            # Nothing is claimed until all due jobs are ready: the last may rank first.
            behind = behind or store.do(Sql.MAKE_READY, {
                "now": iso(now), "limit": DUE_BATCH}) == DUE_BATCH
        stop = row[0] if row else None
        spares = [start_order(one.job) for one in self._held.values()
                  if not one.slots and one.number not in report.ended]
        is_overtaken = bool(spares) and any(
            start_order(job) < max(spares) for job in self._choose(self.worker.slots))
        claims = [] if behind or stop or is_overtaken or not free \
            else self._claim(free, most, now, settings)
        mine.update((one.number, None) for one in claims)
        is_expiring = bool(report.is_heartbeat or self._expired) \
            and self._expire(now, settings)
        store.write_counters()
        return Tick(changes, claims, mine, stop, behind, is_expiring, is_overtaken,
                    settings, notes, removed, now)

    @staticmethod
    def _as_now(claim: Claim, asked: str | None, unmet: int) -> Claim:
        if asked is None and unmet == claim.job.unmet:
            return claim
        return claim._replace(job=claim.job._replace(end_requested=asked, unmet=unmet))

    def commit(self) -> None:
        self._store.commit()

    def committed(self, tick: Tick, report: Report) -> None:
        """Add the claims of a committed tick."""
        for claim in report.ended:
            self._held.pop(claim, None)
        if report.is_heartbeat:
            self._begun -= self._begun_before   # others began after the tick
        self._begun -= report.ended.keys()
        self._held.update((one.number, one) for one in tick.claims)
        self._last_tick = tick.now

    def failed(self, tick: Tick) -> None:
        self._expired.clear()
        self._store.rollback()
        for one in tick.claims:
            one.release()

    def _write_heartbeat(self, now: float) -> None:
        """Also restores the row of this worker if it was removed, by another name if
        its own is taken.
        """
        worker = self.worker
        if self.lock >= 0 and not os.fstat(self.lock).st_nlink:
            raise Gone("database-gone", f"{self._host.locks.path} was deleted", "start "
                       "the worker anew")   # the locks are invisible to others
        _, runs, _, workers = self._store.rows(Sql.COUNTERS)[0]
        if workers < worker.id or runs < max(self._held, default=0):    # (I4)
            raise Gone("database-gone", "an older copy has replaced "
                       f"{self._queue.path}", "start the worker anew")
        if not self._store.do(Sql.HEARTBEAT, {"id": worker.id, "now": iso(now)}):
            if any(other.name == worker.name for other in self._store.workers()):
                worker = worker._replace(name=f"{worker.name}#{worker.id}")
            self._store.do(Sql.INSERT_WORKER, row_of(
                worker._replace(heartbeat_at=iso(now))))
            self.worker = worker

    def _fire(self, now: float) -> list[str]:
        """Add the jobs of due schedules, and correct all next runs in the first tick
        and after the clock was set back; returns messages for the log.
        """
        store, notes, at = self._store, list[str](), iso(now)
        is_back = now < self._last_tick - CLOCK_NOISE
        for schedule in store.schedules():
            if schedule.paused or not (is_back or schedule.next_run <= at):
                continue
            try:
                note = (store.fire if schedule.next_run <= at
                        else store.correct_next_run)(schedule, now)
                notes += [f"schedule {schedule.name}: {note}"] * bool(note)
            except Invalid as error:    # other work continues
                store.set_schedule(schedule, paused=True)
                notes.append(f"schedule {schedule.name} is paused: {error.message}")
        return notes

    def begin(self, claim: Claim, slot: int) -> Claim:
        """Give a spare claim its slot; stored at its end or by the next heartbeat."""
        begun = claim._replace(slots=(slot,), job=claim.job._replace(
            started_at=iso(self._clock())))
        self._held[claim.number] = begun
        self._begun.add(claim.number)
        return begun

    def _without_used(self, free: Sequence[int]) -> list[int]:
        """The free slots, except those whose GPUs other workers' runs use."""
        gpus = self.worker.gpus
        used = {gpu for [names] in self._store.rows(
            Sql.GPUS_IN_USE, id=self.worker.id, host=self.worker.host)
            for gpu in names.split(",")} if gpus else {}
        return [slot for slot in free if not used or gpus[slot - 1] not in used]

    def _claim(self, free: Sequence[int], most: int | None, now: float,
               settings: Settings) -> list[Claim]:
        """Claim the next jobs, `most` at most; a slot 0 is a spare."""
        store, taken, at = self._store, self._taken, iso(now)
        gpus, left = self.worker.gpus, self._without_used([n for n in free if n])
        for job in self._choose(len(left), free.count(0))[:most]:
            slots, left = tuple(left[:job.slots]), left[job.slots:]
            number, lock = self._lock_number("runs", 0)     # before the commit (I5)
            taken.append(Claim(job, number, slots, lock))
            # The wait for a slot begins when the job is due, its last run has ended and
            # its dependencies are met.
            needs = store.rows(Sql.LAST_NEED_END, job=job.seq)[0][0] \
                if job.after or job.after_any else None
            ready_at = max(job.run_at, job.finished_at or "", needs or "")
            store.tally(now, job.queue, "wait_time", max(0.0, now - epoch(ready_at)))
        store.write(Sql.INSERT_RUN, [
            {"claim": one.number, "job": one.job.seq, "number": one.job.runs + 1,
             "worker_id": self.worker.id, "worker": self.worker.name,
             "slot": one.slot, "started_at": at,
             "slots": ",".join(map(str, one.slots)) if len(one.slots) > 1 else "",
             "gpus": ",".join(gpus[slot - 1] for slot in one.slots) if gpus else None}
            for one in taken])
        changes = store.move([Change("claim", one.job, one.job._replace(
            claim=one.number, worker=self.worker.name, runs=one.job.runs + 1,
            started_at=at, finished_at=None, exit_code=None, error=None))
            for one in taken], now, settings)
        return [one._replace(job=change.after) for one, change in zip(taken, changes)]

    def _lock_number(self, counter: str, base: int) -> tuple[int, int]:
        """A new number, and the descriptor of its lock, at `base` + number. A number
        whose lock is held is skipped: an older copy of the file was restored.
        """
        while True:
            number = self._store.take_numbers(counter)
            with contextlib.suppress(Conflict):
                return number, self._host.locks.hold(base + number)

    def _choose(self, slots: int, spares: int = 0) -> list[Job]:
        """The next jobs that fit and whose queues have room: usually the first ready
        jobs; the second read can skip a few. Behind a long backlog that cannot run,
        each queue is read by jobs_in_queue: `queue NOT IN` would read all of it.
        """
        free, widest = slots + spares, self.worker.slots
        room = self._room(free)
        for limit in (free, max(CLAIM_SCAN, 2 * free)):
            line = self._store.jobs(Sql.LINE, limit=limit, widest=widest)
            chosen, is_all = choose(line, room, slots, spares)
            if is_all or len(line) < limit:
                return chosen
        waiting = {queue for queue, state in self._store.counts()
                   if state in WAITING and room(queue) > 0}
        return choose(sorted((
            job for queue in waiting for job in self._store.jobs(
                Sql.QUEUE_LINE, queue=queue, limit=free, widest=widest)),
            key=start_order), room, slots, spares)[0]

    def _room(self, free: int) -> Callable[[str], int]:
        """A function: how many more jobs of a queue may start, of up to `free`."""
        queues = {name: (paused, limit)
                  for name, paused, limit in self._store.rows(Sql.QUEUES)}
        running = {queue: n for (queue, state), n in self._store.counts().items()
                   if state == PROCESSING} if queues else {}

        def room(queue: str) -> int:
            paused, limit = queues.get(queue, (0, 0))
            if paused or EVERY_QUEUE in queues or not self.worker.takes(queue):
                return 0
            return max(0, limit - running.get(queue, 0)) if limit else free
        return room

    def _expire(self, now: float, settings: Settings) -> bool:
        """Delete some expired jobs and old tallies; True if there may be more. Jobs
        that others wait for are kept, and passed over.
        """
        more = False
        for state, kept in ((COMPLETED, settings.retention_completed),
                            (DEAD, settings.retention_dead)):
            if kept is None:
                continue
            found = self._queue.jobs(state, "ended", EXPIRE_BATCH, ended_before=iso(
                now - kept + 0.001), **self._expired.pop(state, {}))
            self._store.remove(found, lambda why: None, now)
            if len(found) == EXPIRE_BATCH:
                self._expired[state] = {"ended_at": found[-1].finished_at,
                                        "ended_seq": found[-1].seq}
                more = True
        deleted = self._store.do(Sql.DELETE_TALLIES, {
            "before": int(now // 60) - KEPT_MINUTES, "limit": SHRINK_PAGES})
        return self._store.db.shrink() or bool(deleted) or more

    def is_drained(self) -> bool:
        """Return True if nothing runs, is due or waits for a retry in its queues,
        except in paused ones.
        """
        if self._store.rows(Sql.UNBLOCKING):
            return False
        counts, caller = self._store.counts(), self._queue.caller()
        if caller and caller.state == PROCESSING:   # it waits for this very worker
            counts[caller.queue, PROCESSING] -= 1
        if any(n and state == PROCESSING and self.worker.takes(queue)
               for (queue, state), n in counts.items()):
            return False
        now, room, widest = iso(self._clock()), self._room(1), self.worker.slots
        return not any(
            ((queue, FAILED) in counts
             and self._store.row(Sql.RETRY, queue=queue, widest=widest))
            or self._store.rows(Sql.COUNT_DUE, queue=queue, now=now, most=1,
                                widest=widest)[0][0]
            for queue in {queue for queue, _ in counts} if room(queue))


class Peers:
    """The workers other than `own` (None: called by a command), and their lost runs.

    A lost run is seized in the database, its processes are killed, then it is recorded.
    Several workers may do so at once: only one finds the claim and records it (I3).
    """

    def __init__(self, queue: Queue, own: int | None = None) -> None:
        self._store, self._host, self._clock = queue.store, queue.host, queue.clock
        self._own, self._heartbeats = own, Heartbeats()
        self._ages: Mapping[int, float] = {}    # seconds since the last heartbeat seen

    def look(self) -> None:
        """Read the counts of heartbeats, after an own one: while no worker can write,
        none expires.
        """
        self._ages = self._heartbeats.look(
            {worker.id: worker.heartbeats for worker in self._store.workers()
             if worker.id != self._own},
            time.monotonic(), self._store.settings())

    def lost(self) -> list[Run]:
        """The runs whose worker is dead or expired. Call it after a tick, which
        restores the own row if it was removed.
        """
        lease = lease_of(self._store.settings())
        with self._store.snapshot():    # a run may end, and its worker exit or start
            runs = [Run(*row) for row in self._store.rows(Sql.UNDER_WAY)]
            workers = {worker.id: worker for worker in self._store.workers() if runs}
        lost = {id for id, worker in workers.items() if id != self._own
                and (self._ages.get(id, 0.0) >= lease
                     or self._host.is_alive(worker) is False)}
        return [run for run in runs if run.worker_id not in workers
                or run.worker_id in lost]

    def record(self, run: Run) -> list[Change]:
        """Record a lost run from a command, and remove its dead worker."""
        gone = [worker for worker in self._store.workers()
                if worker.id == run.worker_id
                and self._host.is_alive(worker) is False]       # may run `ps` (I9)
        with self._store.transaction() as store:
            ends = lost_end(store, self._host, run)
            changes = store.record(ends, store.settings(), self._clock())
            for worker in gone:
                store.do(Sql.DELETE_IDLE_WORKER, {"id": worker.id})
        return changes

    def dead(self) -> list[Worker]:
        """Workers that exited, or are unknown and sent no heartbeat for a lease."""
        lease = lease_of(self._store.settings())
        return [one for one in self._store.workers()
                if (is_alive := self._host.is_alive(one)) is False
                or (is_alive is None and self._ages.get(one.id, 0.0) >= lease)]

    def remove_expired(self, ids: Collection[int]) -> set[int]:
        """Remove the unknown ones of these workers that are dead: the next worker finds
        their runs lost. One that is alive restores its row.
        """
        beats = {one.id: one.heartbeats for one in self.dead()
                 if one.id in ids and self._host.is_alive(one) is None}
        if not beats:
            return set()
        with self._store.transaction() as store:
            gone = {one.id for one in store.workers()     # may have sent one meanwhile
                    if beats.get(one.id) == one.heartbeats}
            store.write(Sql.DELETE_WORKER, [{"id": id} for id in gone])
        return gone

    def await_stop(self, workers: Sequence[Worker],
                   timeout: float) -> Iterator[tuple[Worker, bool]]:
        """Yield each worker when it has stopped, with True if it was removed."""
        end, left = time.monotonic() + timeout, {one.id: one for one in workers}
        while left:
            time.sleep(RESCUE_TICK)
            self.look()
            removed = self.remove_expired(left)
            known = {one.id for one in self._store.workers()}
            for worker in [*left.values()]:
                is_alive = self._host.is_alive(worker)
                if not is_alive and (worker.id not in known or is_alive is False):
                    del left[worker.id]
                    yield worker, worker.id in removed
            if left and time.monotonic() >= end:
                raise Refused("not-finished", ", ".join(
                    one.name for one in left.values()) + " still running jobs",
                    "wait longer, or give --now")


# ---- 12 Check ----------------------------------------------------------------
# Nothing here writes, so it may run beside workers.

# Usual are 12 to 16 MiB; more only while a connection reads an old state.
WAL_LARGE = 64 << 20   # bytes
DISK_LOW = 100 << 20   # bytes free on the disk
CHECK_PATIENCE = 2.0   # seconds for a directory to respond

# Unsafe: WAL needs memory shared by all users of the file. Prefixes, as names have
# versions: nfs4, smb3, gfs2.
NETWORK_FILESYSTEMS = (
    "nfs", "cifs", "smb", "9p", "afs", "ceph", "gluster", "lustre", "gpfs", "beegfs",
    "ocfs", "gfs", "sshfs", "rclone", "s3fs", "virtiofs", "vboxsf", "prl_fs")


def filesystem_of(path: str, mounts: str) -> str:
    """The type of the file system that holds an absolute path; "" if unknown.

    `mounts` is the text of /proc/self/mountinfo (proc(5)):

        36 35 98:0 / /mnt/a\\040b rw shared:1 - ext4 /dev/sda1 rw    /mnt/a b: ext4
    """
    found, kind = -1, ""
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), before.split()[4])
        is_inside = path == point or path.startswith(point.rstrip("/") + "/")
        if is_inside and len(point) >= found and after:     # a later mount hides others
            found, kind = len(point), after.split()[0]
    return kind


def is_network_filesystem(kind: str) -> bool:
    name = kind[len("fuse."):] if kind.startswith("fuse.") else kind
    return name.startswith(NETWORK_FILESYSTEMS)


def _pid_list(pids: Sequence[int]) -> str:
    return f"process{'es' * (len(pids) > 1)} {', '.join(map(str, pids))}"


class Inspection:
    """Everything that `check` examines in one queue."""

    def __init__(self, queue: Queue) -> None:
        self._queue, self._store = queue, queue.store

    def findings(self) -> list[Finding]:
        looks = (self._file, self._schedules, self._clock, self._lost_runs,
                 self._workers, self._output_dir, self._ground)
        found = [finding for look in looks for finding in look()]
        return sorted(found, key=lambda one: one.level != PROBLEM)

    def _file(self) -> Iterator[Finding]:
        # In one snapshot, as the rules compare tables.
        with self._store.snapshot():
            damage = self._store.db.integrity()
            for line in damage:
                yield Finding(PROBLEM, "damaged", f"the file is damaged: {line}",
                              "stop the workers and restore a backup, or save what "
                              f"can be read: sqlite3 {self._queue.path} .recover")
            if damage:      # the rules would only find results of it
                return
            for code, message, statement in Sql.RULES:
                for row in self._store.rows(statement)[:CHECK_SHOWN]:
                    yield Finding(PROBLEM, code, message.format(row[0]),
                                  "this is a bug in queuectl, or in a program that "
                                  "wrote the file: keep a copy and report it")

    def _schedules(self) -> Iterator[Finding]:
        for one in self._store.schedules():
            try:
                new_job(one.job, 0.0)
                parse_cron(one.cron)
                zone_of(one.tz)
            except Invalid as error:    # written by another program or version
                yield Finding(PROBLEM, "schedule", f"the schedule {one.name} "
                              f"is invalid, so it does not run: {error.message}",
                              f"`queuectl schedule edit {one.name}` mends it")

    def _clock(self) -> Iterator[Finding]:
        ahead = iso(self._queue.clock() + CLOCK_NOISE)
        found = self._store.jobs(Sql.DELAYED, ahead=ahead, limit=DUE_BATCH)
        if found:
            yield Finding(WARNING, "clock", f"the clock was set back: {len(found)} "
                          f"jobs wait longer than their own delay: {found[0].id} ...",
                          "a worker brings them forward; `queuectl worker start`")

    def _lost_runs(self) -> Iterator[Finding]:
        for run in Peers(self._queue).lost():
            left = sorted(self._queue.host.locks.holders(run.claim))
            said = f"; still running: {_pid_list(left)}" if left else ""
            jobs = self._store.jobs(Sql.JOB_BY_SEQ, seq=run.job)    # may be deleted
            name = jobs[0].id if jobs else f"job number {run.job}"
            yield _warning(
                "lost-run",
                f"run {run.number} of {name} has lost its worker {run.worker}{said}",
                "`queuectl worker start` ends what is left and runs the job again")

    def _workers(self) -> Iterator[Finding]:
        status = self._queue.status()
        yield from status.attention
        for worker in status.workers:
            age = self._queue.clock() - epoch(worker.heartbeat_at)
            if worker.is_expired or age > worker.late_after:
                yield _warning(
                    "silent-worker", f"worker {worker.name} on {worker.host} "
                    f"has sent no heartbeat for {span(age)}",
                    f"if it is gone, `queuectl worker stop {worker.name}` removes it"
                    if worker.is_expired else
                    f"it is suspended or cannot write: see process {worker.pid}")

    def _output_dir(self) -> Iterator[Finding]:
        directory, found = self._store.settings().output_dir, ["it does not respond"]
        if directory is None:
            return

        def look(place: str) -> None:
            while not os.path.lexists(place):   # a worker makes it
                place = os.path.dirname(place)
            disk = os.statvfs(place)
            free = disk.f_bavail * disk.f_frsize
            found[0] = "it is not a directory" if not os.path.isdir(place) \
                else "it is not writable" if not os.access(place, os.W_OK | os.X_OK) \
                else f"{free >> 20} MiB are free" if free < DISK_LOW else ""
        # In a thread, as a network mount may hang.
        thread = threading.Thread(target=look, args=(directory,), daemon=True)
        thread.start()
        thread.join(CHECK_PATIENCE)
        if found[0]:
            yield _warning(
                "output-dir", f"output cannot be copied to {directory}: {found[0]}",
                "mend that, or `queuectl config unset output-dir`")

    def _ground(self) -> Iterator[Finding]:
        path = self._queue.path
        kind = filesystem_of(path, _read("/proc/self/mountinfo").decode(
            "utf-8", "replace"))
        if is_network_filesystem(kind):
            yield _warning("network-filesystem", "the file is on a network or shared "
                           f"file system ({kind}): SQLite's WAL is not safe there",
                           "move it to a disk of this machine")
        wal = _stat(path + "-wal")[2]
        if wal > WAL_LARGE:
            yield _warning("large-wal", f"the WAL has grown to {wal >> 20} MiB",
                           "a program reads an old state of the file: end it; the WAL "
                           "shrinks at a later commit")
        disk = os.statvfs(os.path.dirname(path))
        free = disk.f_bavail * disk.f_frsize    # f_bfree has root's reserve
        if free < DISK_LOW and not self._store.db.is_read_only:
            yield _warning("disk-low", f"{free >> 20} MiB are free on the disk", "free "
                           "some space: without it no job can be added or recorded")
        mode = os.stat(path).st_mode & 0o777
        if mode & 0o077:
            yield _warning("open-mode", f"other users may access the file (mode "
                           f"{mode:o}): whoever writes it runs commands as the user of "
                           "its workers", f"chmod 600 {path}*")


# ---- 13 Views ----------------------------------------------------------------
# Records as text or JSON; nothing here prints, reads the queue or reads a clock.

# These colours follow the terminal's theme (ECMA-48, SGR 30 to 37).
STATE_COLOURS = {PENDING: "36", PROCESSING: "34", COMPLETED: "32", FAILED: "33",
                 DEAD: "31", CANCELLED: "35"}
PAINT = r"\033\[[0-9;]*m"      # a pattern
BOLD, DIM, WARN, BAD = "1", "2", STATE_COLOURS[FAILED], STATE_COLOURS[DEAD]
STATUS_SHOWN = 5        # findings that `status` lists


class Style(NamedTuple):
    colour: bool
    width: int          # columns; 0: no limit
    now: float

    def paint(self, text: str, code: str) -> str:
        return f"\033[{code}m{text}\033[0m" if self.colour and code else text


def _local(moment: float) -> datetime.datetime:
    at = EPOCH.replace(tzinfo=datetime.timezone.utc) + datetime.timedelta(0, moment)
    with contextlib.suppress(OSError, OverflowError, ValueError):   # out of range
        at = at.astimezone()
    return at


def local_time(moment: float, now: float | None = None,
               digits: str = "seconds") -> str:
    """Return `14:03:07+01:00`, with the date unless it is today (None: always)."""
    at = _local(moment)
    if now is not None and at.date() == _local(now).date():
        return at.timetz().isoformat(digits)
    return at.isoformat(" ", digits)


def when_text(stamp: str | None, now: float) -> str:
    return f"{local_time(epoch(stamp), now)} ({ago(stamp, now)})" if stamp else "-"


# JSON of records, for `--json` and the API.

def object_schema(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": dict(properties),
            "required": list(properties)}


def array_schema(items: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": dict(items)}


_FLAG, _REAL_OR_NULL = {"type": "boolean"}, _or_null(_REAL)
_TEXT_OR_NULL, _STAMP_OR_NULL = _or_null(_TEXT), _or_null(_STAMP)
_JOB = {key: FIELDS[key].kind.output for key in JSON_KEYS}
_RUN = {"number": _AMOUNT, "worker": _TEXT, "started_at": _STAMP,
        "finished_at": _STAMP_OR_NULL, "duration": _REAL_OR_NULL,
        "outcome": _TEXT_OR_NULL, "exit_code": _or_null(_WHOLE),
        "error": _TEXT_OR_NULL, "output": _TEXT, "slots": _TEXT,
        "gpus": _TEXT_OR_NULL}
_WORKER = {"name": _TEXT, "host": _TEXT, "pid": _AMOUNT, "slots": _AMOUNT,
           "running": array_schema(_TEXT), "queues": array_schema(_TEXT),
           "started_at": _STAMP, "heartbeat_at": _STAMP, "gpus": array_schema(_TEXT),
           "busy": _AMOUNT}
_SPREAD = {"count": _AMOUNT,
           **dict.fromkeys(("mean", "p50", "p95", "p99"), _REAL_OR_NULL)}
_SUMMARY = {**dict.fromkeys(("enqueued", "completed", "retried", "dead", "cancelled",
                             "lost"), _AMOUNT),
            "success_rate": _REAL_OR_NULL, "throughput": _REAL_OR_NULL,
            "run_time": object_schema(_SPREAD), "wait_time": object_schema(_SPREAD)}
# The keys of each JSON object, in order, with their JSON Schema. Keys are only added.
SHAPES: dict[str, dict[str, Any]] = {
    "Job": _JOB, "Run": _RUN, "Worker": _WORKER, "Spread": _SPREAD, "Summary": _SUMMARY,
    "WholeJob": {**_JOB, "waiting_for": array_schema(_TEXT),
                 "runs": array_schema(object_schema(_RUN))},
    "Queue": {"name": NAME_SCHEMA, "paused": _FLAG, "limit": _AMOUNT,
              "jobs": object_schema(dict.fromkeys(STATES, _AMOUNT))},
    "Schedule": {"name": _TEXT, "cron": _TEXT, "tz": _TEXT_OR_NULL,
                 "command": _TEXT_OR_NULL, "queue": _TEXT, "paused": _FLAG,
                 "next_run": _STAMP_OR_NULL, "last_run": _STAMP_OR_NULL,
                 "last_job": _TEXT_OR_NULL,
                 "last_state": {"enum": [*STATES, None]},
                 "last_success": _STAMP_OR_NULL, "skipped": _AMOUNT,
                 "catch_up": _FLAG},
    "Event": {"id": _TEXT, "from": {"enum": [*STATES, None]}, "to": _STATE,
              "at": _STAMP, "reason": _TEXT},
    "Status": {"jobs": object_schema(dict.fromkeys((*STATES, "total"), _AMOUNT)),
               "workers": array_schema(object_schema(_WORKER)),
               "paused": array_schema(_TEXT), "next_due": _STAMP_OR_NULL,
               "database": _TEXT, "blocked": _AMOUNT,
               "attention": array_schema(object_schema(dict.fromkeys(
                   Finding._fields, _TEXT)))},
    "Minute": {"at": _STAMP, "completed": _AMOUNT, "failed": _AMOUNT,
               "retried": _AMOUNT, **dict.fromkeys(
                   ("wait_p50", "wait_p95", "run_p50", "run_p95"), _REAL_OR_NULL)},
    "Stats": {"seconds": _REAL, **_SUMMARY, "queues": {
        "type": "object", "additionalProperties": object_schema(_SUMMARY)}}}


def as_json(shape: str, record: object, **given: Any) -> dict[str, Any]:
    """Return a record as JSON: `given`, and its attributes for all other keys."""
    return {key: given[key] if key in given else getattr(record, key)
            for key in SHAPES[shape]}


def error_object(error: QueueError) -> dict[str, Any]:
    return {"error": {"code": error.code, "message": error.message, "hint": error.hint}}


def job_object(job: Job, keys: Sequence[str] = JSON_KEYS) -> dict[str, Any]:
    return {key: getattr(job, key) for key in keys}


def note_of(job: Job, hindrances: Sequence[Finding]) -> str:
    """Return why it waits (other than for its time), its worker or its error."""
    if job.state == PENDING:
        return ", ".join(one.message for one in hindrances if one.code != "due") or (
            "" if job.waits == SCHEDULED else "waits for a free slot")
    if job.state == PROCESSING:
        return f"on {job.worker}"
    return (job.error or "") if job.state != COMPLETED else ""


def show_object(job: Job, runs: Sequence[Run],
                reasons: Sequence[str]) -> dict[str, Any]:
    return as_json("WholeJob", job, waiting_for=reasons, runs=[
        as_json("Run", run, slots=run.slots or str(run.slot), output=readable(
            run.output, run.output_bytes).decode("utf-8", "replace")) for run in runs])


def worker_object(worker: Worker) -> dict[str, Any]:
    return as_json("Worker", worker, running=[job.id for job in worker.running])


def queue_object(view: QueueView) -> dict[str, Any]:
    return as_json("Queue", view, jobs=view.counts)


def schedule_object(schedule: Schedule, last: Job | None) -> dict[str, Any]:
    """Return a schedule with its last job; the command of an invalid one is null."""
    return as_json("Schedule", schedule, command=schedule.job.get("command"),
                   queue=schedule.job.get("queue", DEFAULT_QUEUE),
                   last_job=last and last.id,
                   last_state=last.state if last else schedule.last_state)


def event_object(event: Event) -> dict[str, Any]:
    return as_json("Event", event, **{"from": event.source, "to": event.target})


def status_object(status: Status) -> dict[str, Any]:
    due = (status.next_due and status.next_due.run_at,
           status.next_schedule and status.next_schedule.next_run)
    return as_json("Status", status, next_due=min(filter(None, due), default=None),
                   jobs={**status.counts, "total": sum(status.counts.values())},
                   workers=[worker_object(view) for view in status.workers],
                   attention=[finding._asdict() for finding in status.attention])


def minute_object(minute: Summary) -> dict[str, Any]:
    wait, run = minute.wait_time, minute.run_time
    return as_json("Minute", minute, failed=minute.died, wait_p50=wait.p50,
                   wait_p95=wait.p95, run_p50=run.p50, run_p95=run.p95)


def stats_object(stats: Mapping[str, Summary], seconds: float) -> dict[str, Any]:
    """Return summaries by queue, "" for all; throughput in jobs per second."""
    def spread(values: Spread) -> dict[str, Any]:
        return {"count": values.n, **{name: value and round(value, 4) for name, value
                                      in values._asdict().items() if name != "n"}}

    def summed(one: Summary) -> dict[str, Any]:
        over = one.completed + one.died
        return as_json(
            "Summary", one, dead=one.died,
            success_rate=one.completed / over if over else None,
            throughput=one.completed / seconds if seconds > 0 else None,
            run_time=spread(one.run_time), wait_time=spread(one.wait_time))
    return {"seconds": round(seconds, 3), **summed(stats[""]), "queues": {
        queue: summed(one) for queue, one in stats.items() if queue}}


def finding_lines(findings: Sequence[Finding], path: str, style: Style) -> list[str]:
    shades = {PROBLEM: BAD, WARNING: WARN}
    grave = sum(finding.level == PROBLEM for finding in findings)
    return [*(f"{style.paint(f'{level:<8}', shades[level])} {message}\n{'':<9}{hint}"
              for level, _, message, hint in findings),
            f"{counted(grave, 'problem')} in {path}" if grave else f"sound: {path}"]


def dumps(value: Any, indent: int | None = None) -> str:
    """Return JSON; a byte that was not UTF-8, now a surrogate, becomes `?`."""
    text = json.dumps(value, indent=indent, ensure_ascii=False)
    return text.encode("utf-8", "replace").decode()


def one_line(text: str) -> str:
    """Return the text on one line, with control characters escaped."""
    if text.isprintable():      # False for bidirectional controls, too
        return text
    return "".join(c if c.isprintable() or c == "\u200d"    # joins emoji
                   else c.encode("unicode_escape", "surrogatepass").decode()
                   for c in text.replace("\n", "; ").replace("\t", " "))


def wide(char: str) -> int:
    """Return a character's columns: 0 if combining, 2 if wide (Unicode, annex 11)."""
    if char < "\u0300":     # the first combining character; none below it is wide
        return 1
    import unicodedata  # 1 ms, and only for text beyond Latin
    if unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1


def columns(text: str) -> int:
    if "\033" in text:
        text = re.sub(PAINT, "", text)
    return len(text) if text.isascii() else sum(map(wide, text))


def cut(text: str, width: int, tail: int = 0) -> str:
    """Shorten text to `width` columns (0: no limit): `abc…`, or with a tail `ab…f`."""
    if width <= 0 or columns(text) <= width:
        return text
    painted = re.fullmatch(f"({PAINT})(.*)({PAINT})", text)
    if painted:
        return painted[1] + cut(painted[2], width, tail) + painted[3]
    kept, used = "", 1 + tail
    for char in text:
        used += wide(char)
        if used > width:
            break
        kept += char
    return f"{kept}…{text[len(text) - tail:]}"


def fold(line: str, width: int) -> list[str]:
    """Break a line at spaces into lines of that width (0: no limit), indented as what
    follows its first gap of two spaces. A number stays with the word after it.
    """
    if "\n" in line:
        return [part for one in line.split("\n") for part in fold(one, width)]
    if not width or columns(line) <= width:
        return [line]
    plain = re.sub(PAINT, "", line)
    gap = re.search(r"\S  +", plain[:width // 2])
    indent = gap.end() if gap else len(plain) - len(plain.lstrip())
    lines = [""]
    for word in re.findall(r" *(?:[^ ]{0,15}\d )?[^ ]+", line):
        if lines[-1].strip() and columns(lines[-1] + word) > width:
            lines.append(" " * indent + word.lstrip())
        else:
            lines[-1] += word
    return lines


def state_cell(job: Job) -> str:
    """`failed (1)`, `pending (after)`, `pending (held)`."""
    if job.held and job.waits:
        return f"{job.state} (held)"
    if job.state in (FAILED, DEAD) and job.exit_code is not None:
        return f"{job.state} ({job.exit_code})"
    if job.state == PENDING and job.waits == BLOCKED:
        return f"{job.state} (after)"
    return job.state


def _whole_span(start: str | None, now: float) -> str:
    return span(max(0, math.floor(now - epoch(start or ""))))


def when_cell(job: Job, now: float) -> str:
    if job.state == PROCESSING:
        return f"for {_whole_span(job.started_at, now)}"
    if job.state in WAITING and job.waits != SCHEDULED:
        return f"waits {_whole_span(job.run_at, now)}"
    return ago(job.run_at if job.state in WAITING else job.finished_at, now)


def grid(rows: Sequence[Mapping[str, str]], style: Style,
         default: Mapping[str, str] = {}, spare: Sequence[str] = (
             "ZONE", "CRASHES", "PRIO", "LIMIT", "COMPLETED", "CANCELLED", "SKIPPED",
             "TAGS", "QUEUE", "CRON", "TRIES", "SLOTS")) -> list[str]:
    """Return rows as aligned columns, without those of which all cells are `default`.

    In a narrow window the last column (a command) is cut at its end, then the first
    (a name) in its middle, then `spare` columns are left out, then all are cut.
    """
    table = {head: [head, *(row[head] for row in rows)] for head in rows[0]
             if any(row[head] != default.get(head) for row in rows)}
    widths = {head: max(map(columns, column)) for head, column in table.items()}
    first, last = next(iter(table)), next(reversed(table))
    if style.width:
        least = {**widths, last: min(12, widths[last]), first: min(20, widths[first])}

        def room() -> int:
            return style.width - sum(least.values()) - 2 * len(least) + 2
        for head in spare:
            if room() < 0 and head not in (first, last):
                least.pop(head, None)
        for size, heads in ((10, (last, first)), (8, (last, first)), (10, least),
                            (8, least), (5, (last, first, *least))):
            for head in heads:
                least[head] -= max(0, min(-room(), least[head] - size))
        for head in (first, last):
            least[head] += max(0, min(room(), widths[head] - least[head]))
        widths = least
    cells = [[cut(cell, width, width // 3 * (head == first)) for cell in table[head]]
             for head, width in widths.items()]
    head, *lines = ["  ".join(cell + " " * (width - columns(cell)) for cell, width
                              in zip(row, widths.values())).rstrip()
                    for row in zip(*cells)]
    return [style.paint(head, DIM), *lines]


def job_table(jobs: Sequence[Job], style: Style,
              why: Mapping[str, str] | None = None) -> list[str]:
    """`why` says by id why each job waits, and replaces the time."""
    paint = style.paint
    is_tried = any(job.attempts > 1 or job.state in (FAILED, DEAD) for job in jobs)
    return grid([{
        "ID": paint(job.id, BOLD),
        "STATE": paint(job.state if why and job.state == PENDING else state_cell(job),
                       STATE_COLOURS[job.state]),
        "QUEUE": job.queue, "PRIO": str(job.priority), "SLOTS": str(job.slots),
        "TRIES": f"{job.attempts + (job.state == PROCESSING)}/{max(1, job.max_retries)}"
        if is_tried else "",
        "CRASHES": str(job.crashes), "TAGS": ",".join(job.tags),
        "WHEN": "" if why else paint(when_cell(job, style.now), DIM),
        "WHY": cut(why.get(job.id, ""), 40) if why else "",
        "COMMAND": one_line(job.command)} for job in jobs], style, {
            "QUEUE": DEFAULT_QUEUE, "PRIO": "0", "SLOTS": "1", "TRIES": "",
            "CRASHES": "0", "TAGS": "", "WHEN": "", "WHY": ""})


def field_cell(job: Job, key: str, now: float) -> str:
    value = getattr(job, key)
    if value in (None, "", (), {}):
        return "-"
    if FIELDS[key].kind.output.get("format") == "date-time":
        return local_time(epoch(value), now)
    if isinstance(value, float):
        return span(value)
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, dict):
        return " ".join(f"{name}={cut(one_line(text), 200)}"
                        for name, text in value.items())
    return one_line(value if isinstance(value, str) else dumps(value))


def field_table(jobs: Sequence[Job], keys: Sequence[str], style: Style) -> list[str]:
    return grid([{key.upper(): field_cell(job, key, style.now) for key in keys}
                 for job in jobs], style, spare=())


def worker_line(worker: Worker, style: Style) -> str:
    age = style.now - epoch(worker.heartbeat_at)
    parts = [style.paint(worker.name, BOLD), f"pid {worker.pid}",
             f"{worker.busy}/{worker.slots} slots busy",
             f"up {_whole_span(worker.started_at, style.now)}"]
    if worker.queues:
        parts.append("queues " + ",".join(worker.queues))
    if worker.gpus:
        parts.append("gpus " + ",".join(worker.gpus))
    if worker.stop_requested:
        parts.append("stopping")
    if age > worker.late_after:
        parts.append(style.paint(f"no heartbeat for {span(age)}", WARN))
    return "  ".join(parts)


def running_line(job: Job, style: Style) -> str:
    line = f"{job.id}  {when_cell(job, style.now)}  {one_line(job.command)}"
    return cut(line, style.width - 12 if style.width else 0)    # 12: the indentation


def status_lines(status: Status, style: Style) -> list[str]:
    rows = [("jobs", "  ".join(
        style.paint(f"{n} {state}", STATE_COLOURS[state] if n else DIM)
        for state, n in status.counts.items()), "")]
    if all(worker.is_expired for worker in status.workers):
        rows.append(("workers", "none running; `queuectl worker start` starts one", ""))
        if n := status.counts[PROCESSING]:
            rows.append((WARNING, f"lost with its worker: {counted(n, 'job')}, which "
                                  "the next worker runs again", WARN))
    for worker in status.workers:
        rows += [("workers", worker_line(worker, style), ""), *(
            ("workers", f"  {running_line(job, style)}", "") for job in worker.running)]
    if status.paused:
        rows.append(("paused", ", ".join("all queues" if name == EVERY_QUEUE else name
                                         for name in status.paused), WARN))
    if status.held:
        rows.append(("held", f"{counted(status.held, 'job')} until `queuectl release`",
                     ""))
    job, schedule = status.next_due, status.next_schedule
    if schedule and (not job or schedule.next_run < job.run_at):
        rows.append(("next due", f"schedule {schedule.name} "
                                 f"{ago(schedule.next_run, style.now)}", ""))
    elif job:
        what = "retry" if job.state == FAILED else "scheduled"
        rows.append(("next due", f"{job.id} {ago(job.run_at, style.now)} ({what})", ""))
    for one in status.attention[:STATUS_SHOWN]:
        is_said = any(one.hint in text for _, text, _ in rows)
        rows.append((one.level, one.message + f"; {one.hint}" * (not is_said), WARN))
    more = len(status.attention) - STATUS_SHOWN
    if more > 0:
        rows.append((WARNING, f"and {more} more; `queuectl check` lists them", ""))
    if status.counts[DEAD]:
        rows.append(("dead", "`queuectl dlq` lists the dead jobs", BAD))
    rows.append(("database", status.database, DIM))
    names = ["", *(name for name, _, _ in rows)]
    return [style.paint(line, colour) for above, (name, text, colour)
            in zip(names, rows)
            for line in fold(f"{'' if name == above else name:<10}{text}", style.width)]


def queue_lines(views: Sequence[QueueView], style: Style) -> list[str]:
    states = [state for state in STATES
              if any(view.counts[state] for view in views)] or [PENDING]
    return grid([{
        "QUEUE": view.name, "LIMIT": str(view.limit or "-"),
        **{state.upper(): str(view.counts[state]) for state in states},
        "NOTE": "paused" if view.paused else ""} for view in views], style)


def schedule_lines(schedules: Sequence[tuple[Schedule, Job | None]],
                   style: Style) -> list[str]:
    return grid([{
        "NAME": one.name, "CRON": one.cron, "ZONE": one.tz or "local",
        "NEXT": "paused" if one.paused else ago(one.next_run, style.now),
        "LAST": f"{last.state if last else one.last_state} "
                f"{ago(one.last_run, style.now)}" if one.last_run else "-",
        "SKIPPED": str(one.skipped), "QUEUE": str(one.job.get("queue", DEFAULT_QUEUE)),
        "COMMAND": one_line(str(one.job.get("command")))}
        for one, last in schedules], style, {"SKIPPED": "0"})


def when_lines(schedule: Schedule, now: float) -> list[str]:
    runs = [f"{_local(run):%a} "
            f"{local_time(run, None, 'seconds' if run % 60 else 'minutes')}"
            for run, _ in zip(runs_of(schedule, now), range(3))]
    return [f"{schedule.name}: {cron_words(schedule.cron)}, "
            f"{schedule.tz or 'local time'}", "next: " + ", ".join(runs)]


def schedule_show_lines(schedule: Schedule, last: Job | None, now: float) -> list[str]:
    try:
        lines = when_lines(schedule, now)
    except Invalid as error:
        lines = [f"{schedule.name}: {schedule.cron}, {schedule.tz or 'local time'}",
                 f"cannot be read: {error.message}"]
    return [*lines, *["paused"] * schedule.paused,
            *["no catch-up after missed runs"] * (not schedule.catch_up), *(
        f"{name:<10}{text}" for name, text in (
            ("queue", schedule.job.get("queue", DEFAULT_QUEUE)),
            ("command", one_line(str(schedule.job.get("command")))),
            ("last run", when_text(schedule.last_run, now)),
            ("last job", f"{last.id} ({last.state})" if last else "-"),
            ("success", when_text(schedule.last_success, now)),
            ("skipped", counted(schedule.skipped, "run"))))]


def event_line(event: Event, style: Style) -> str:
    to = style.paint(event.target, STATE_COLOURS[event.target])
    at = local_time(epoch(event.at), style.now, "milliseconds")
    return (f"{at}  {style.paint(event.id, BOLD)}  {event.source or '-'} -> {to}"
            f"  {one_line(event.reason)}")


class Pace:
    """How fast jobs have finished: in the last 30 seconds, or the last ten of them."""

    def __init__(self) -> None:
        # The moment and the number of finished jobs, at first and whenever it grew.
        self._marks = collections.deque[tuple[float, int]]()

    def rate(self, progress: Progress, now: float) -> float | None:
        """Jobs per second; None: unknown, or they take longer than they did."""
        marks = self._marks
        if not progress.running and len(marks) == 1:
            marks.clear()       # nothing has run yet
        if not marks or progress.over != marks[-1][1]:
            marks.append((now, progress.over))
        while len(marks) > 2 and marks[1][0] < now - 30 \
                and progress.over >= marks[1][1] + 10:
            marks.popleft()
        took = marks[-1][0] - marks[0][0]
        rate = (marks[-1][1] - marks[0][1]) / took if took > 0 else 0.0
        return rate if rate > 0 and now - marks[-1][0] < max(2, 3 / rate) else None


def progress_line(progress: Progress, rate: float | None, width: int) -> str:
    """Return `[#####............] 20/60  4 running  20s left  2.0/s`, or as much of it
    as fits. Jobs that are not due are neither in the total nor the estimate.
    """
    due = progress.left - progress.later
    total = progress.over + due
    words = [f"{progress.over:,}/{total:,}", f"{progress.running:,} running"]
    if rate and due:
        words.append(f"{span(math.ceil(due / rate))} left")
    if progress.later:
        words.append(f"{progress.later:,} not due")
    if progress.unsuccessful:
        words.append(f"{progress.unsuccessful:,} dead or cancelled")
    while len(words) > 1 and len("  ".join(words)) > width:
        words.pop()
    text = "  ".join(words)
    if rate and due and len(text) < width - 25:     # with a bar of 12
        text += f"  {rate:,.1f}/s" if rate >= 1 else f"  {60 * rate:.1f}/min"
    size = min(40, width - len(text) - 3)
    filled = size * progress.over // total if total else size
    return f"[{'#' * filled}{'.' * (size - filled)}] {text}" if size >= 10 else text


def prefixed(job_id: str, output: bytes, place: int, style: Style) -> bytes:
    """Return the lines of output, each after the job's id in the colour `place`."""
    shades = list(STATE_COLOURS.values())
    prefix = style.paint(f"{job_id} |", shades[place % len(shades)]).encode()
    ending = b"\n" if output and not output.endswith(b"\n") else b""
    return b"".join(prefix + b" " + line
                    for line in (output + ending).splitlines(keepends=True))


def worker_lines(workers: Sequence[Worker], style: Style) -> list[str]:
    return [line for worker in workers for line in (
        f"{worker_line(worker, style)}  host {worker.host}"
        f"  heartbeat {ago(worker.heartbeat_at, style.now)}",
        *(f"  {running_line(job, style)}" for job in worker.running))]


def show_lines(job: Job, runs: Sequence[Run], reasons: Sequence[str],
               settings: Settings, style: Style) -> list[str]:
    elsewhere = ("id", "command", "state", "attempts", "max_retries", "run_at", "held",
                 "created_at", "updated_at", "started_at", "finished_at", "exit_code")
    rows = (
        ("job", style.paint(job.id, BOLD)),
        ("command", f"\n{'':<13}".join(map(one_line, job.command.split("\n")))),
        ("state", style.paint(state_cell(job), STATE_COLOURS[job.state])),
        *(("", reason) for reason in reasons),
        ("attempts", f"{job.attempts} of {max(1, job.max_retries)}"
                     + f", run {job.runs} is running" * (job.state == PROCESSING)),
        *((key.replace("_", " "), field_cell(job, key, style.now)) for key in FIELDS
          if key in JSON_KEYS and key not in elsewhere
          and (key == "queue" or getattr(job, key) != Job._field_defaults[key])),
        ("due", when_text(job.run_at, style.now) if job.state in WAITING else ""),
        ("shell", "" if settings.shell == SETTINGS["shell"].default
         else one_line(settings.shell)),
        ("all output", one_line(output_file(settings.output_dir, job.id, job.runs))
         if settings.output_dir and runs else ""),
        ("enqueued", when_text(job.created_at, style.now)),
        ("cancelled", when_text(job.finished_at or job.updated_at, style.now)
         if job.state == CANCELLED else ""))
    lines = [line for name, text in rows if text for line in fold(
        f"{name:<13}{text}", 0 if name == "command" else style.width)]
    if not runs:
        return lines
    head, *table = grid([{
        "RUN": str(run.number), "OUTCOME": run.outcome or "running",
        "EXIT": "-" if run.exit_code is None else str(run.exit_code),
        "TOOK": "-" if run.duration is None else span(run.duration),
        "STARTED": local_time(epoch(run.started_at), style.now),
        "WORKER": run.worker + (f"  gpus {run.gpus}" if run.gpus else "")}
        for run in runs], style)
    return [*lines, "", head, *(part for run, line in zip(runs, table) for part in [
        line, *fold(f"     {one_line(run.error or '')}", style.width)] if part.strip())]


def stats_lines(stats: Mapping[str, Summary], seconds: float,
                style: Style) -> list[str]:
    def times(values: Spread) -> str:
        return "  ".join(f"{name} {span(round(getattr(values, name) or 0.0, 4))}"
                         for name in ("mean", "p50", "p95", "p99")) if values.n else "-"

    def pace(n: int) -> str:
        units = (1, "a second"), (60, "a minute"), (3600, "an hour"), (86400, "a day")
        rate = n / seconds if seconds > 0 else 0.0
        size, unit = next((one for one in units if rate * one[0] >= 1), units[-1])
        return f"{rate * size:.1f} jobs {unit}" if n else "-"
    lines = [f"since     {span(seconds)} ago"]
    for queue, one in stats.items():
        if queue and len(stats) == 2:
            continue    # a single queue equals all
        over = one.completed + one.died
        rate = f"{100 * one.completed / over:.1f}%" if over else "-"
        lines += [*[""] * bool(queue), style.paint(f"queue     {queue or 'all'}", BOLD),
                  f"jobs      {one.enqueued} enqueued, {one.completed} completed, "
                  f"{one.died} dead, {one.cancelled} cancelled",
                  f"success   {rate}, {counted(one.retried, 'retry', 'retries')}, "
                  f"{counted(one.lost, 'lost run')}",
                  f"rate      {pace(one.completed)}",
                  f"run time  {times(one.run_time)}",
                  f"waiting   {times(one.wait_time)}"]
    return lines


def change_line(change: Change, now: float) -> str:
    job, outcome = change.after, change.outcome or Outcome(RELEASED)
    took, error = span(outcome.duration or 0.0), outcome.error or ""
    if outcome.kind == LOST:    # same states as a failed run, but no attempt
        what = f"{job.id} lost: {job.error}, crash {job.crashes}"
        return what + {FAILED: ", runs again now", DEAD: ", now dead: lost too often",
                       CANCELLED: ", cancelled"}.get(job.state, "")
    if job.state == COMPLETED:
        return f"{job.id} completed in {took}"
    if job.state not in (FAILED, DEAD):
        return f"{job.id} {'cancelled' if job.state == CANCELLED else 'requeued'} " \
            f"after {took}"
    # Of `exit status 1: last line` or `timed out after 2s` only the beginning.
    cause = error if outcome.exit_code is None else re.sub(
        " status|(:| after ).*", "", error)
    wait = max(0.0, epoch(job.run_at) - now)
    follows = "now in the dead letter queue" if job.state == DEAD \
        else f"again in {span(wait if wait < 1 else round(wait, 1))}"
    return f"{job.id} {job.state} ({cause}) after {took}, attempt " \
        f"{change.before.attempts + 1} of {max(1, job.max_retries)}, {follows}"


def _labels(**labels: str) -> str:
    # Prometheus and JSON have the same escapes.
    return f"{{{','.join(f'{name}={dumps(text)}' for name, text in labels.items())}}}"


def metrics_text(scrape: Scrape) -> str:
    """Return the metrics in Prometheus' text format 0.0.4."""
    # Also queues without jobs: a counter must never disappear.
    queues = sorted({DEFAULT_QUEUE, *(queue for queue, _ in scrape.jobs),
                     *(row[0] for row in scrape.tallies), *scrape.paused}
                    - {EVERY_QUEUE})
    # By queue and kind:
    tallies: dict[tuple[str, str], dict[int, int]] = collections.defaultdict(dict)
    totals: dict[tuple[str, str], float] = collections.defaultdict(float)
    for queue, kind, bucket, n, total in scrape.tallies:
        tallies[queue, kind][bucket] = n
        totals[queue, kind] += total

    def ever(queue: str, kind: str) -> int:
        return sum(tallies[queue, kind].values())

    def times(kind: str) -> Iterator[tuple[str, float]]:
        for queue in queues:
            counts = cumulated(tallies[queue, kind])
            for bound, n in zip([*map(repr, METRIC_BOUNDS), "+Inf"], counts):
                yield "_bucket" + _labels(queue=queue, le=bound), n
            yield "_sum" + _labels(queue=queue), totals[queue, kind]
            yield "_count" + _labels(queue=queue), counts[-1]

    def by_queue(value: Callable[[str], float]) -> Iterator[tuple[str, float]]:
        return ((_labels(queue=queue), value(queue)) for queue in queues)

    def by_schedule(value: Callable[[Schedule], float]) -> Iterator[tuple[str, float]]:
        return ((_labels(schedule=one.name), value(one)) for one in scrape.schedules)

    lines = list[str]()

    def add(name: str, kind: str, help: str,
            samples: Iterable[tuple[str, float]]) -> None:
        lines.extend((
            f"# HELP queuectl_{name} {help}", f"# TYPE queuectl_{name} {kind}",
            *(f"queuectl_{name}{rest} {value!r}" for rest, value in samples)))

    stopped = scrape.paused.get(EVERY_QUEUE, False)
    workers = [worker for worker in scrape.workers if not worker.is_expired]
    busy = sum(worker.busy for worker in workers)
    idle = max(0, sum(worker.slots for worker in workers) - busy)
    add("jobs", "gauge", "Jobs by state.", (
        (_labels(queue=queue, state=state), scrape.jobs.get((queue, state), 0))
        for queue in queues for state in STATES))
    add("jobs_completed_total", "counter", "Jobs completed.",
        by_queue(lambda queue: ever(queue, "complete")))
    add("attempts_total", "counter", "Ended runs by outcome.", (
        (_labels(queue=queue, outcome=outcome), ever(queue, f"run:{outcome}"))
        for queue in queues for outcome in OUTCOMES))
    add("job_duration_seconds", "histogram", "Duration of runs.", times("run_time"))
    add("job_wait_seconds", "histogram", "Time from due to started.",
        times("wait_time"))
    add("oldest_pending_seconds", "gauge", "Time since the next job to run became due.",
        by_queue(lambda queue: scrape.oldest.get(queue, 0)))
    add("queue_paused", "gauge", "1 if the queue is paused.",
        by_queue(lambda queue: int(stopped or scrape.paused.get(queue, False))))
    add("workers", "gauge", "Running workers.", [("", len(workers))])
    add("worker_slots", "gauge", "Slots of the workers.",
        [(_labels(state="busy"), busy), (_labels(state="idle"), idle)])
    add("database_bytes", "gauge", "Size of the database and its WAL.",
        [("", scrape.database_bytes)])
    add("jobs_blocked", "gauge", "Jobs blocked by dead or cancelled jobs.",
        [("", scrape.blocked)])
    add("schedule_skipped_total", "counter",
        "Runs skipped because the previous job had not finished.",
        by_schedule(lambda one: one.skipped))
    add("schedule_last_success_timestamp_seconds", "gauge",
        "When a job of the schedule last completed; 0: not yet.",
        by_schedule(lambda one: epoch(one.last_success) if one.last_success else 0))
    add("build_info", "gauge", "Version of queuectl.",
        [(_labels(version=__version__), 1)])
    return "\n".join(lines) + "\n"


# ---- 14 Processes ------------------------------------------------------------
# A Command is one run of one command; it never blocks and does not use the queue. The
# supervisor is the worker's parent: it kills process trees, and all remaining processes
# when the worker ends. Both are subreapers (prctl(2)): an orphan of a job becomes a
# child of the worker, or of the supervisor once the worker is dead. So all processes of
# a job stay below the supervisor, even if they leave the session and clear their
# environment; once wait(2) fails with ECHILD, none is left.

def _watch_process(pid: int) -> int:
    """Return a descriptor that becomes readable when the process exits, or -1."""
    try:
        return os.pidfd_open(pid)
    except (AttributeError, OSError):   # before Linux 5.3, or no descriptor is free
        return -1


def exit_words(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    names = {int(one): one.name for one in signal.Signals}
    return f"killed by {names.get(-status, f'signal {-status}')}"


class Archive:
    """Writes files in `output-dir` by a daemon thread, which opens a file for each
    write, so that the directory may come and go. Commands that print faster than it
    writes wait for it (`is_behind`), but not once it hangs: then output is left out,
    and a line in the file says so. `tell` gets errors.
    """
    ROOM = 16 << 20     # bytes that may wait to be written
    PATIENCE = 5.0      # seconds without a write after which it hangs
    PAUSE = 0.02        # seconds in which output is collected for a write
    COST = 256          # bytes that a piece takes beyond its length
    SHORT = 10_000      # incomplete files remembered at most
    AGAIN = 3600.0      # seconds until an error is told again

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._failed, self._told = dict[str, float](), dict[str, float]()   # monotonic
        self._queue: Any = None     # a SimpleQueue of paths and pieces
        self._directory = ""        # of the newest file
        # Bytes; the loop writes the first of each pair, the thread the second.
        self._given = self._written = 0
        self._omitted, self._lost = dict[bytes, int](), dict[bytes, int]()  # by path
        self._moved_at = 0.0    # monotonic: the last write, or the first after a rest

    def add(self, directory: str, job: Job) -> Callable[[bytes], None]:
        """Create the file of a run; return a function that appends to it."""
        self._directory = directory
        if self._queue is None:
            import queue    # the log has loaded it
            self._queue = queue.SimpleQueue()
            threading.Thread(target=self._work, daemon=True).start()
        append = functools.partial(
            self._append, output_file(directory, job.id, job.runs).encode())
        append(b"")
        return append

    def _append(self, path: bytes, piece: bytes) -> None:
        if self._waiting() > self.ROOM and self._hangs():
            self._count(self._omitted, path, len(piece))
        else:
            self._note_omitted()
            self._put(path, piece)

    def _count(self, missing: dict[bytes, int], path: bytes, size: int) -> None:
        if path in missing or len(missing) < self.SHORT:
            missing[path] = missing.get(path, 0) + size

    def _note_omitted(self) -> None:
        while self._omitted:
            path, size = self._omitted.popitem()
            self._put(path, left_out(size))

    def _put(self, path: bytes, piece: bytes) -> None:
        if not self._waiting():
            self._moved_at = time.monotonic()
        self._given += len(piece) + self.COST
        self._queue.put((path, piece))

    def _waiting(self) -> int:
        return self._given - self._written

    def _hangs(self) -> bool:
        return time.monotonic() >= self._moved_at + self.PATIENCE

    def is_behind(self) -> bool:
        return self._waiting() > self.ROOM and not self._hangs()

    def report(self) -> None:
        if not self._waiting():
            self._note_omitted()
        elif self._hangs():
            self._fail("it does not respond")
        for error, at in list(self._failed.items()):
            if at >= self._told.get(error, -math.inf) + self.AGAIN:
                self._told[error] = at
                self._tell(f"output is not copied to {error}")

    def end(self, seconds: float) -> None:
        """Wait up to `seconds` for the rest to be written, unless the thread hangs."""
        until = time.monotonic() + seconds
        while self._waiting() and time.monotonic() < until and not self._hangs():
            time.sleep(self.PAUSE / 2)
        self.report()

    def _fail(self, why: str) -> None:
        self._failed[f"{self._directory}: {why}"] = time.monotonic()

    def _work(self) -> None:
        while True:
            path, piece = self._queue.get()
            batch = {path: [piece]}
            while not self._queue.empty():
                path, piece = self._queue.get()
                batch.setdefault(path, []).append(piece)
            for path, pieces in batch.items():
                self._write(path, memoryview(b"".join(pieces)))
                self._written += sum(map(len, pieces)) + self.COST * len(pieces)
                self._moved_at = time.monotonic()
            self._note_lost()
            if self._waiting() < self.ROOM // 16:
                time.sleep(self.PAUSE)

    def _note_lost(self) -> None:
        for path in list(self._lost):
            self._write(path, memoryview(b""))
            if path in self._lost:
                return

    def _write(self, path: bytes, rest: memoryview) -> None:
        fd, flags = -1, (os.O_WRONLY | os.O_CREAT | os.O_APPEND
                         | os.O_NONBLOCK | os.O_NOFOLLOW)
        try:
            with contextlib.suppress(FileNotFoundError):
                fd = os.open(path, flags, 0o600)
            if fd < 0:
                os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
                fd = os.open(path, flags, 0o600)
            if path in self._lost:
                os.write(fd, left_out(self._lost[path]))
                del self._lost[path]
            while rest:
                rest = rest[os.write(fd, rest[:READ_SIZE]):]
                self._moved_at = time.monotonic()
        except OSError as error:
            if rest:
                self._count(self._lost, path, len(rest))
            self._fail(error.strerror or str(error))
        finally:
            if fd >= 0:
                os.close(fd)


class Command:
    """One run of a command. The worker calls `read` when `pipe` is readable, `peek`
    when `watch` is, and `finish` after the exit.
    """

    def __init__(self, claim: Claim, timeout: float | None, output_limit: int,
                 copy: Callable[[bytes], None] | None) -> None:
        self.claim, self._timeout = claim, timeout      # seconds; None: never
        self.copy = copy                    # gets all output
        self.pid, self._begun = -1, 0.0
        self._status: int | None = None     # of its exit; None: not reaped
        self.output = Output(output_limit)
        self.pipe, self.watch = -1, -1      # descriptors to poll; -1: none
        self.why: str | None = None         # the outcome if the worker kills it
        self.is_being_killed = False        # the supervisor is killing its tree
        self.is_refused = False             # the rest of the tree is another user's
        self.ends_at = math.inf             # monotonic: its time-out

    def start(self, env: dict[bytes, bytes], shell: str, cwd: str = "") -> None:
        """Start it in its own session, beyond Ctrl+C; OSError, ValueError."""
        text, lock = self.claim.job.command.encode(), self.claim.lock
        if text[:1] in (b"-", b"+"):    # options of a shell; not all know --
            text = b" " + text
        words = [shell.encode(), b"-c", text]
        if cwd:     # posix_spawn(3) cannot change to it
            words = [b"/bin/sh", b"-c", b'cd -- "$1" || exit 126; shift; exec "$@"',
                     b"/bin/sh", cwd.encode(), *words]
        self.pipe, writer = os.pipe()
        try:
            os.set_blocking(self.pipe, False)
            # No other tree inherits the lock (I5): one thread starts all commands (I9),
            # and closes it before the next.
            if lock >= 0:
                os.set_inheritable(lock, True)
            self._begun = time.monotonic()
            # Python ignores two signals, which would make `yes | head` report an error.
            self.pid = os.posix_spawn(
                words[0], words, env, file_actions=(
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_DUP2, writer, 1), (os.POSIX_SPAWN_DUP2, writer, 2)),
                setsid=True, setsigmask=(), setsigdef=(signal.SIGPIPE, signal.SIGXFSZ))
        except BaseException:
            os.close(self.pipe)
            raise
        finally:
            os.close(writer)
        self.watch = _watch_process(self.pid)
        if self._timeout is not None:
            self.ends_at = self._begun + self._timeout

    def peek(self) -> int | None:
        """Return the exit status, negative for a signal, or None; do not reap it, so
        that its process id is not reused.
        """
        if self._status is None and hasattr(os, "waitid"):
            found = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            return found and (found.si_status if found.si_code == os.CLD_EXITED
                              else -found.si_status)
        return self._reap(os.WNOHANG)   # macOS before Python 3.13

    def _reap(self, options: int = 0) -> int | None:
        if self._status is None:
            pid, status = os.waitpid(self.pid, options)
            self._status = os.waitstatus_to_exitcode(status) if pid else None
        return self._status

    def read(self) -> bool:
        """Read output once; return False at its end."""
        try:
            piece = os.read(self.pipe, READ_SIZE)
        except BlockingIOError:
            return True
        self.output.feed(piece)
        if self.copy and piece:
            self.copy(piece)
        if not piece:
            os.close(self.pipe)
            self.pipe = -1
        return bool(piece)

    def finish(self) -> Outcome:
        """Reap the exited command and read the output so far of its processes."""
        try:
            status = self._reap() or 0
        except ChildProcessError:       # reaped by `kill_all`
            status = -signal.SIGKILL
        duration = time.monotonic() - self._begun
        self.ends_at = math.inf
        if self.watch >= 0:
            os.close(self.watch)
            self.watch = -1
        stop, seen = self.output.total + (1 << 20), -1  # others may go on printing
        while self.pipe >= 0 and seen < self.output.total < stop:
            seen = self.output.total
            self.read()

        kept, error = self.output.kept(), None
        code: int | None = 128 - status if status < 0 else status
        # `why` has priority: a shell that catches SIGTERM may exit with 0.
        kind = self.why or (FAILURE if status else DONE)
        if kind == TIMEOUT:
            code, error = EX_TIMEOUT, f"timed out after {span(self._timeout or 0)}"
        elif kind == LOST:
            code, error = None, LEASE_EXPIRED
        elif kind == FAILURE:
            words = last_line(kept)
            error = exit_words(status) + (f": {words}" if words else "")
        return Outcome(kind, code, error, duration, kept, self.output.total)


# Processes except zombies, by id: parent, group, session, start time in ticks.
Table = dict[int, tuple[int, int, int, int]]


def process_table() -> Table:
    """Return all processes; without /proc from `ps`, with 0 for the last two."""
    stats = {pid: fields for pid in _pids() if (fields := _stat_fields(pid))}
    if stats:
        return {pid: (int(fields[1]), int(fields[2]), int(fields[3]), int(fields[19]))
                for pid, fields in stats.items()}
    import subprocess  # 5 ms, and only where there is no /proc
    said = subprocess.run(["ps", "-axo", "pid=,ppid=,pgid=,stat="], check=False,
                          stdout=subprocess.PIPE, stderr=subprocess.DEVNULL).stdout
    rows = [line.split() for line in said.splitlines()]
    return {int(pid): (int(parent), int(group), 0, 0) for pid, parent, group, state
            in rows if not state.startswith(b"Z") and int(pid) != os.getpid()}


def _descendants(table: Table, roots: Iterable[int]) -> set[int]:
    children: dict[int, list[int]] = {}
    for pid, (parent, *_) in table.items():
        children.setdefault(parent, []).append(pid)
    found, todo = set[int](), list(roots)
    while todo:
        pid = todo.pop()
        if pid not in found:
            found.add(pid)
            todo += children.get(pid, ())
    return found


class Tree:
    """Kills one run's process tree (I6): SIGTERM, after the grace SIGKILL.

    The tree consists of `head`, the run's first process (0: it is gone), its group and
    session, which have its id, orphans whose environment has the claim, and all
    descendants; if none is left, of the holders of the run's lock.
    """

    def __init__(self, grace: float, claim: int = 0, head: int = 0) -> None:
        self.claim, self._head = claim, head
        self.kill_at = time.monotonic() + grace
        self.left: set[int] = set()             # remaining processes; 0: unknown ones
        self.is_refused = False                 # all that remain are another user's
        self._start = 0                         # of `head`, as in a Table
        self._known: dict[int, int] = {}        # start times of `left`
        self._asked: set[int] = set()   # got SIGTERM; groups negative, as for kill(2)

    def step(self, locks: Locks | None, table: Table,
             orphans: Mapping[int, int]) -> None:
        """Update `left`, and signal it. `orphans`: claims by process."""
        head = self._head
        if head in table:
            self._start = self._start or table[head][3]
            if table[head][3] != self._start:   # the id was reused
                head = self._head = 0
        self.left = _descendants(table, [
            pid for pid, (_, group, session, start) in table.items()
            if self._known.get(pid) == start or orphans.get(pid) == self.claim
            or (head and head in (pid, group, session))])
        if not self.left and locks and locks.is_held(self.claim) is not False:
            self.left = set(locks.holders(self.claim)) or {0}
        refused = self.send(self.left - {0}, table)
        self.is_refused = bool(refused) and self.left <= refused
        self._known = {pid: table[pid][3] for pid in self.left if pid in table}

    def send(self, left: Collection[int], table: Table,
             groups: Iterable[int] = ()) -> set[int]:
        """Signal processes, their groups and `groups`; return those that refused
        SIGKILL. Groups first: a shell must not run on because its command was killed.
        Then SIGCONT: a stopped process does not handle SIGTERM (signal(7)).
        """
        late, refused = time.monotonic() >= self.kill_at, set[int]()
        groups = {*groups, *(table[pid][1] for pid in left if pid in table)} \
            - {os.getpgrp(), 0}
        for target in (*(-group for group in groups), *left):
            if target in self._asked and not late:
                continue
            try:
                os.kill(target, signal.SIGKILL if late else signal.SIGTERM)
                os.kill(target, signal.SIGCONT)
            except ProcessLookupError:
                pass
            except PermissionError:
                refused |= {target} if late else set()
            self._asked |= {target} if target > 0 else {
                target, *(pid for pid, row in table.items() if row[1] == -target)}
        return refused & set(left)


class Trees:
    """The process trees being killed."""

    def __init__(self) -> None:
        self.at = math.inf                      # monotonic: the next step
        self._trees: list[Tree] = []
        self._left: set[int] = set()            # processes at the last step
        self._pause = 0.0                       # seconds between two steps

    def add(self, claim: int, head: int, grace: float) -> None:
        self._trees.append(Tree(grace, claim, head))
        self.at = 0.0

    def step(self, locks: Locks | None, parents: Collection[int]) -> list[Tree]:
        """Signal all trees; return those that are gone, or refused by other users.
        OSError if no descriptor is free. Children of `parents` may be orphans.
        """
        begun = time.monotonic()
        self.at = begun + RESCUE_TICK
        table = process_table()
        orphans = {
            pid: int(named[1]) for pid, (parent, *_) in table.items()
            if parent in parents and pid not in parents and (named := re.search(
                rb"(?:^|\0)QUEUECTL_CLAIM=(\d+)\0", _read(f"/proc/{pid}/environ")))}
        for one in self._trees:
            one.step(locks, table, orphans)
        over = [one for one in self._trees if one.is_refused or not one.left]
        self._trees = [one for one in self._trees if one.left]
        # The pause doubles without a change; steps take at most a fifth of the time.
        left = set[int]().union(*(one.left for one in self._trees))
        self._pause = 0.005 if left != self._left else min(2 * self._pause, 0.2)
        self._left, now = left, time.monotonic()
        self.at = now + max(self._pause, 4 * (now - begun)) if self._trees else math.inf
        return over


def await_ends(queue: Queue, jobs: Sequence[Job],
               say: Callable[[str], object]) -> list[Job]:
    """Return cancelled jobs once they have ended. Runs of dead workers are killed here
    (I6); those of frozen workers are left to other workers.
    """
    peers, trees, lost = Peers(queue), Trees(), dict[int, Run]()
    locks, grace = queue.host.locks, queue.store.settings().kill_grace
    begun, is_said = time.monotonic(), False
    while any(job.state == PROCESSING for job in jobs):
        for run in peers.lost():
            if run.claim not in lost and any(job.claim == run.claim for job in jobs):
                lost[run.claim] = run
                trees.add(run.claim, locks.process_of(run) or 0, grace)
        for tree in trees.step(locks, ()) if time.monotonic() >= trees.at else ():
            if not tree.left:
                peers.record(lost.pop(tree.claim))
        jobs = [queue.job(job.id) if job.state == PROCESSING else job for job in jobs]
        waited = time.monotonic() - begun
        if waited > 1 and not is_said:
            is_said = True
            say("waiting for the worker to end what runs")
        if waited > grace + 10:
            raise Refused("not-finished", "a running job has not ended yet",
                          "`queuectl check` shows what is left of it" if lost else
                          "its worker will record it; `queuectl status` shows both")
        time.sleep(RESCUE_TICK)
    return list(jobs)


def become_subreaper() -> None:
    with contextlib.suppress(ImportError, OSError, AttributeError):
        import ctypes  # 10 ms, and only in a worker
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)     # PR_SET_CHILD_SUBREAPER


def kill_all(grace: float = 0.0, groups: Iterable[int] = (), spared: Iterable[int] = (),
             hurry: Sequence[int] = ()) -> list[int]:
    """Kill all descendants of this process; return those of other users, which remain.

    SIGKILL follows after `grace` seconds, or once `hurry` has an element. `spared`:
    children to leave alone. `groups` are needed without /proc.
    """
    pause, tree, seen = 0.001, Tree(grace), set[int]()
    while True:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pause = 0.001
        except ChildProcessError:
            return []
        try:
            table = process_table()
        except OSError:     # no descriptor is free
            time.sleep(RESCUE_TICK)
            continue
        if hurry:
            tree.kill_at = 0.0
        left = _descendants(table, [os.getpid()]) - _descendants(table, spared) \
            - {os.getpid()}
        refused = tree.send(left, table, groups)
        if left <= refused and (refused or spared) and not seen - refused:
            return sorted(refused)      # seen twice, so no new one appeared
        pause, seen = 0.001 if left - seen else min(2 * pause, 0.2), left
        time.sleep(pause)


# Messages between worker and supervisor: kind, claim or signal, process, seconds. HELLO
# carries the lock that both hold while they live. START names a group to kill where
# there are no subreapers, 0 once it is gone. REFUSED: the rest of a tree is another
# user's.
HELLO, RENEW, START, KILL, KILLED, REFUSED, SIGNAL = range(7)
_MESSAGE = struct.Struct("=qqqd")


class Link:
    """One end of the socket between worker and supervisor; it never blocks. While
    `is_behind`, call `flush` again soon. `peer` is the other's process id.
    """

    def __init__(self, end: socket.socket, peer: int = 0) -> None:
        self._socket, self.peer = end, peer
        end.setblocking(False)
        self._unsent, self._unread = b"", b""
        self.is_open = True             # False: the other side has closed it

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, kind: int, number: int = 0, pid: int = 0,
             seconds: float = 0.0) -> None:
        self._unsent += _MESSAGE.pack(kind, number, pid, seconds)

    @property
    def is_behind(self) -> bool:
        return bool(self._unsent) and self.is_open

    def flush(self, lock: int = -1) -> None:
        import socket
        if not self._unsent:
            return
        try:
            sent = socket.send_fds(self._socket, [self._unsent], [lock]) if lock >= 0 \
                else self._socket.send(self._unsent)
            self._unsent = self._unsent[sent:]
        except BlockingIOError:
            pass
        except OSError:
            self.is_open = False

    def receive(self) -> Iterator[tuple[int, int, int, float, int]]:
        """Yield the messages received, each with a descriptor or -1."""
        import socket
        locks = list[int]()
        while self.is_open:
            try:
                piece, found, *_ = socket.recv_fds(self._socket, SOCKET_BUFFER, 1)
            except BlockingIOError:
                break
            except OSError:
                piece, found = b"", []
            locks += found
            self._unread += piece
            self.is_open = bool(piece)
        while len(self._unread) >= _MESSAGE.size:
            message = _MESSAGE.unpack_from(self._unread)
            self._unread = self._unread[_MESSAGE.size:]
            yield (*message, locks.pop() if locks else -1)


class Supervisor:
    """The worker's parent; it has no database or threads. `worker` is the process id of
    its child; `spared` are earlier children.
    """

    def __init__(self, link: Link, worker: int, wakeup: Wakeup, signals: list[int],
                 spared: Collection[int]) -> None:
        self._link, self._worker = link, worker
        self._signals, self._spared = signals, spared
        self._poller = Poller()
        self._poller.add(wakeup.reader, wakeup.clear)
        self._poller.add(link.fileno(), self._receive)
        self._locks: Locks | None = None    # of the worker, held until the end
        self._trees = Trees()
        self._groups: dict[int, int] = {}   # by claim
        self._lease, self._late_at = math.inf, math.inf     # seconds; monotonic
        self._is_warned = False             # it is late, and has one more second
        self._grace = 0.0                   # seconds between SIGTERM and SIGKILL
        self._status: int | None = None     # of the worker; None: it runs
        self._why_killed = ""
        self._has_begun = False             # HELLO has been received
        self._stopped_by = 0                # a signal received before HELLO

    def run(self) -> tuple[int, str]:
        """Run until no process is left; return the worker's exit status, and an error
        or "".
        """
        while (status := self._status) is None:
            self._step()
        refused = kill_all(self._grace if status >= 0 else 0.0, self._groups.values(),
                           self._spared, self._signals)
        if self._locks:
            self._locks.close()
        if self._stopped_by:
            return 128 + self._stopped_by, ""
        told = list[str]()
        if status < 0:
            why = self._why_killed or f"the worker was {exit_words(status)}"
            told.append(f"{why}: its jobs were killed")
        if refused:
            told.append(f"still running, as another user: {_pid_list(refused)}")
        return (status if status >= 0 else EX_NO), "; ".join(told)

    def _step(self) -> None:
        at = min(self._late_at, self._trees.at)
        if self._link.is_behind:
            at = min(at, time.monotonic() + RESCUE_TICK)
        self._poller.wait(max(0.0, at - time.monotonic()))
        self._receive()
        if time.monotonic() >= self._trees.at:
            with contextlib.suppress(OSError):  # no descriptor is free: retried
                for tree in self._trees.step(
                        self._locks, (self._worker, os.getpid())):
                    self._link.send(REFUSED if tree.left else KILLED, tree.claim,
                                    min(tree.left, default=0))
            self._receive()
        self._link.flush()
        if not self._link.is_open:
            self._poller.drop(self._link.fileno())
        self._reap()
        now = time.monotonic()
        if self._status is not None or now < self._late_at:
            return
        # Allow one more second: both may have been stopped, as by Ctrl+Z.
        if self._is_warned and now < self._late_at + 0.5:
            self._why_killed = f"the worker did not respond for {span(self._lease)}"
            os.kill(self._worker, signal.SIGKILL)
            self._late_at = math.inf
        else:
            self._is_warned, self._late_at = True, now + 1.0

    def _receive(self) -> None:
        count = len(self._signals)      # those received before the messages read next
        for kind, number, pid, seconds, lock in self._link.receive():
            if kind == HELLO:
                self._has_begun = True
                self._locks = Locks("", lock) if lock >= 0 else None
            elif kind == RENEW:
                self._lease, self._late_at = seconds, time.monotonic() + seconds
                self._is_warned = False
            elif kind == START and pid:
                self._groups[number] = pid
            elif kind == START:
                self._groups.pop(number, None)
            elif kind == KILL and number:
                self._trees.add(number, pid, seconds)
            elif kind == KILL:
                self._grace = seconds
        for number in self._signals[:count]:
            if not self._has_begun:     # nothing runs yet
                self._stopped_by = number
                os.kill(self._worker, signal.SIGKILL)
            self._link.send(SIGNAL, number)
        del self._signals[:count]

    def _reap(self) -> None:
        with contextlib.suppress(ChildProcessError):
            while self._status is None and (found := os.waitpid(-1, os.WNOHANG))[0]:
                if found[0] == self._worker:
                    self._status = os.waitstatus_to_exitcode(found[1])


def _work(work: Callable[[Link], int], link: Link, signals: Iterable[int]) -> NoReturn:
    status = EX_NO
    try:
        become_subreaper()
        # Not SIG_IGN, which the jobs would inherit.
        for number in signals:
            signal.signal(number, lambda *_: None)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        status = work(link)
    except Exception:   # a bug, which os._exit would hide
        sys.excepthook(*sys.exc_info())
    finally:
        os._exit(status)


def supervise(work: Callable[[Link], int]) -> tuple[int, str]:
    """Run `work` in a child process; return its exit status, and an error or "".

    Call it before any thread or connection exists. The child gets signals only by its
    Link: a terminal sends each to both processes, but it must count once.
    """
    import socket
    become_subreaper()
    ours, theirs = socket.socketpair()
    # The last four would otherwise kill worker and supervisor if sent to the group.
    expected = [*stop_signals(), signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2,
                signal.SIGALRM]
    signals, own, spared = list[int](), os.getpid(), set[int]()
    with contextlib.suppress(ChildProcessError, AttributeError):
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        # Children of a shell that exec'ed this program.
        spared = {pid for pid, row in process_table().items() if row[0] == own}
    with contextlib.closing(Wakeup()) as wakeup, handling(
            {**dict.fromkeys(expected, lambda number, _: signals.append(number)),
             signal.SIGCHLD: lambda number, _: None}, wakeup.writer):
        worker = os.fork()
        if not worker:
            signal.set_wakeup_fd(-1)    # the parent's pipe
            wakeup.close()
            ours.close()
            _work(work, Link(theirs, own), expected)
        theirs.close()
        with ours:
            return Supervisor(Link(ours), worker, wakeup, signals, spared).run()


# ---- 15 Worker ---------------------------------------------------------------
# `worker start`: one loop runs the commands of claims. Nothing blocks it: COMMIT, with
# its fsync, runs in another thread, during which the connection is not used. (Whole
# transactions in that thread are no faster: each statement switches the GIL.)

PROGRESS_PAUSE = 0.1   # seconds between two progress lines at least
EXPIRE_PAUSE = 0.05    # seconds between two steps of retention
NOTICES_AT_ONCE = 64   # notifications read at once
PEEK_PAUSE = 0.1       # seconds between two commits of output that clients asked for
SPARE_PATIENCE = 0.05  # seconds until spare claims are released
GPU_PATIENCE = 20.0    # seconds; without its daemon nvidia-smi takes some to answer
FOUND = -1             # a lost run that is not yet marked in the database

# The machine is short of a resource: not the job's failure.
SCARCE = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)


class Agenda:
    """The steps of the loop, and when each is due: once it is wanted and no longer
    held. Times are monotonic.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._entries = {name: [math.inf, 0.0] for name in names}

    def want(self, name: str, at: float = 0.0) -> None:
        """Make it due then; of several requests the earliest counts."""
        entry = self._entries[name]
        entry[0] = min(entry[0], at)

    def hold(self, name: str, until: float = math.inf) -> None:
        self._entries[name][1] = until

    def is_wanted(self, name: str, now: float) -> bool:
        """Return True if it is wanted by now, held or not."""
        return self._entries[name][0] <= now

    def due(self, now: float) -> Iterator[str]:
        """Yield and drop the names that are due, in order, also those that the caller
        wants meanwhile, if they come later in it.
        """
        for name, entry in self._entries.items():
            if max(entry) <= now:
                entry[0] = math.inf
                yield name

    def sleep(self, now: float) -> float:
        return max(0.0, min(map(max, self._entries.values())) - now)


class Directories:
    """Decides which directories the worker may enter; `home` is its own.

    chdir(2) into a hung network mount never returns, so there the command's process
    calls it, which costs a second exec.
    """

    def __init__(self) -> None:
        try:    # a descriptor stays right when the directory is moved or deleted
            self.home = os.open(".", os.O_RDONLY)
        except OSError:     # not readable
            self.home = os.open("/", os.O_RDONLY)
        self._mounts = ""
        self.refresh()

    def refresh(self) -> None:
        self._known = dict[str, bool]()
        with contextlib.suppress(OSError):      # no descriptor is free
            self._mounts = _read("/proc/self/mountinfo").decode("utf-8", "replace")

    def is_local(self, path: str) -> bool:
        """Return True if no part of it is on a network file system."""
        if path not in self._known:
            self._known[path] = self._find(path)
        return self._known[path]

    def _find(self, path: str) -> bool:
        at, left, links = "/", path.split("/"), 40      # Linux's limit
        while left and links:
            at = os.path.normpath(os.path.join(at, left.pop(0)))
            kind = filesystem_of(at, self._mounts)
            if is_network_filesystem(kind) or kind.startswith(("autofs", "fuse")):
                return False    # before a system call on it, which may hang
            with contextlib.suppress(OSError, ValueError):      # no link
                target = os.readlink(at.encode("utf-8", "surrogateescape"))
                links -= 1
                left = os.path.join(os.path.dirname(at), target.decode(
                    "utf-8", "surrogateescape")).split("/") + left
                at = "/"
        return links > 0


def _refuse_platform() -> None:
    if fcntl is None or not hasattr(select, "poll"):
        raise Refused("unsupported",
                      "workers need a POSIX system (Linux, macOS, BSD, WSL)",
                      "start the worker there")


def _prepare_descriptors(slots: int) -> None:
    """Raise the soft limit of open files, and hide inherited ones from jobs; Refused
    if the hard limit is too low for that many slots.
    """
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        hard = 1 << 20
    needed = 4 * slots + 32     # a slot: pipe, watch, lock, one for a spare claim
    if needed > hard:
        raise Refused("unsupported", f"only {hard} open files are allowed here, and "
                      f"{counted(slots, 'slot')} may need {needed}",
                      "use fewer slots, or raise `ulimit -n`")
    # 4096 suffice for MAX_SLOTS. Jobs inherit the limit; some close all numbers below.
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(4096, hard)), hard))
    for number in inherited():
        with contextlib.suppress(OSError):      # that of listdir is closed
            os.set_inheritable(number, False)


def gpu_names(text: str) -> tuple[str, ...]:
    """The GPUs of --gpus; for `all` as nvidia-smi lists them, Refused without any."""
    if text != "all":
        return tuple(text.split(","))
    import subprocess   # 5 ms
    try:
        said = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], check=False,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            timeout=GPU_PATIENCE, encoding="utf-8", errors="replace").stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        said = getattr(error, "strerror", f"no answer in {span(GPU_PATIENCE)}")
    found = re.findall("(?m)^[0-9]+$", said)
    if not found:
        raise Refused("unsupported", "no GPU found; nvidia-smi: "
                      + cut(one_line(said.strip()), 200),
                      "name the GPUs, as `--gpus 0,1`")
    return tuple(found)


class Callbacks(NamedTuple):
    """What a worker calls."""
    log: Callable[[str], None]
    ready: Callable[[str], None]        # with its name, once it has a row
    progress: Callable[[Progress], None] | None = None      # while it drains


class Runner:
    """Runs jobs in slots; one thread owns the database and the commands (I9).

    A claim passes through `_do_tick`, `_do_committed` and `_start`; its command exits,
    or the supervisor kills it (`_kill`, KILLED); then follows `_finish`, and the next
    tick records the end.
    """

    def __init__(self, queue: Queue, claims: Claims, options: WorkerOptions, link: Link,
                 notices: socket.socket, calls: Callbacks) -> None:
        self._queue, self._claims, self._options = queue, claims, options
        self._link, self._notices, self._calls = link, notices, calls
        self._log = calls.log
        self._first_progress: Progress | None = None
        self._settings = options.adapt(queue.store.settings())
        self._notifier = Notifier(os.environb, claims.worker.pid)
        self._environ = {**os.environb, b"QUEUECTL_DB": os.fsencode(queue.path)}
        for name in SERVICE_NAMES:      # for the worker, not for jobs
            self._environ.pop(name, None)
        # `tick` is last, since the commit then uses the connection.
        self._agenda = Agenda((
            "renew", "grace", "deadline", "spares", "committed", "notify", "unread",
            "orders", "heartbeat", "peers", "look", "progress", "tick"))
        self._wakeup = Wakeup()         # for the end of a commit
        self._poller = Poller()
        self._poller.add(self._wakeup.reader,
                         functools.partial(self._agenda.want, "committed"))
        self._poller.add(link.fileno(), self._on_message)
        self._poller.add(notices.fileno(), self._on_notice)
        self._directories = Directories()
        self._peers = Peers(queue, claims.worker.id)
        self._watches: dict[int, Worker] = {}   # by a descriptor, readable at its end
        self._free = list(range(1, options.slots + 1))
        self._quota = math.inf if options.max_jobs is None else options.max_jobs
        self._commands: dict[int, Command] = {}         # by claim
        self._archive = Archive(self._log)
        self._unread: list[Command] = []        # they wait for the archive
        self._unsaved: dict[int, Output] = {}   # grew since it was stored, by claim
        self._spares: list[Claim] = []          # claimed beyond the slots, in order
        self._ended: dict[int, Outcome] = {}            # not recorded yet
        # Lost runs of other workers, by claim: FOUND, KILL (being killed) or KILLED.
        self._lost: dict[int, tuple[Run, int]] = {}
        self._dead: list[Worker] = []                   # to be removed
        self._is_heartbeat = False              # of the next tick
        self._commit: tuple[Tick, Report, futures.Future[None]] | None = None
        self._leaving: str | None = None                # wanted: None, DRAIN or NOW
        self._peek_until = self._peek_at = 0.0  # monotonic: clients wait for output
        self._retry_at = self._claim_at = 0.0   # monotonic: no tick or claim before
        self._failing_since: float | None = None        # monotonic: ticks fail
        self._complaint = ""                            # the last one logged
        self._pace = math.inf                   # seconds: recent mean of runs
        self.totals = collections.Counter[str]()    # ended runs by the job's state

    def run(self, executor: futures.Executor) -> int:
        """Run until asked to stop; return the exit status. After an error nothing is
        recorded: another worker finds the runs lost.
        """
        self._executor = executor
        self._notifier.ready()
        worker, slots = self._claims.worker, self._options.slots
        gpus = f"GPUs {','.join(worker.gpus)}, " if worker.gpus else ""
        self._log(f"worker {worker.name} started: {counted(slots, 'slot')}, {gpus}"
                  f"{', '.join(worker.queues) or 'all queues'}, {self._queue.path}")
        for name in ("renew", "heartbeat", "orders", "notify", "tick",
                     *["progress"] * bool(self._calls.progress)):
            self._agenda.want(name)
        try:
            while not self._is_over():
                self._step()
        finally:
            self._link.send(KILL, 0, 0, self._settings.kill_grace)
            self._link.flush()
            self._notifier.stopping()
            self._archive.end(lease_of(self._settings) / 2)     # before it is late
            self.close()
        return EX_NO if self._commands or not self._link.is_open else EX_OK

    def close(self) -> None:
        for watch in self._watches:
            os.close(watch)
        os.close(self._directories.home)
        self._wakeup.close()

    def _step(self) -> None:
        # Steps that need the connection wait for a commit, and after a failure.
        agenda, ready_at = self._agenda, math.inf if self._commit else self._retry_at
        for name in ("orders", "heartbeat", "peers", "progress", "tick"):
            agenda.hold(name, ready_at)
        agenda.hold("look", max(ready_at, self._claim_at) if self._usable()
                    else math.inf)
        self._poller.wait(min(agenda.sleep(time.monotonic()),
                              RESCUE_TICK if self._link.is_behind else math.inf))
        for name in agenda.due(time.monotonic()):
            try:
                getattr(self, f"_do_{name}")()
            except Unavailable as error:
                self._complain(error)
                agenda.want(name)
        self._link.flush()

    def _is_over(self) -> bool:
        """Return True if the worker may exit: nothing runs or must be recorded, and it
        claims no more. After a second request to stop it does not wait for processes
        that cannot be killed.
        """
        is_busy = self._ended or self._commit or self._spares or any(
            self._leaving != NOW or not command.is_refused
            for command in self._commands.values())
        return not is_busy and bool(self._leaving or not self._quota)

    def _usable(self) -> list[int]:
        """The free slots, unless no more jobs are to be claimed."""
        return self._free if self._quota and not self._leaving else []

    def _do_renew(self) -> None:
        """Tell the supervisor that the loop runs, even if no worker can write: the next
        that can kills these jobs before it runs them again.
        """
        self._link.send(RENEW, seconds=lease_of(self._settings))
        self._agenda.want("renew", time.monotonic() + self._settings.heartbeat)
        self._archive.report()
        time.tzset()    # /etc/localtime may have changed
        self._directories.refresh()
        # Reap the orphans of jobs, but not commands, which have their watches.
        own = {command.pid for command in self._commands.values()}
        with contextlib.suppress(AttributeError, OSError):
            if os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
                return
            for pid in set(_pids()) - own:
                with contextlib.suppress(ChildProcessError):    # another's child
                    os.waitpid(pid, os.WNOHANG)

    def _do_notify(self) -> None:
        running, slots = len(self._commands), self._options.slots
        status = f"finishing {counted(running, 'running job')}" if self._leaving else \
            f"{slots - len(self._free)} of {counted(slots, 'slot')} busy"
        self._agenda.want("notify", self._notifier.step(status + self.total()))

    def _do_look(self) -> None:
        """Look for work without a commit, which would make all other workers look:
        when the next job is due, or after the polling interval, as notifications get
        lost and clocks are set.
        """
        now = time.monotonic()
        if self._claims.is_work_ready(self._free):
            self._agenda.want("tick")
            return
        if self._options.drain and not (
                self._commands or self._ended or self._agenda.is_wanted("tick", now)) \
                and self._claims.is_drained() and self._claims.leave_if_drained():
            self._quota = 0
            return
        due = self._claims.next_due()
        wait = math.inf if due is None else due - self._queue.clock()
        self._agenda.want("look", now + min(wait, FALLBACK_POLL))

    def _do_heartbeat(self) -> None:
        self._is_heartbeat = True
        self._agenda.want("tick")

    def _do_tick(self) -> None:
        lost, now = self._lost.values(), time.monotonic()
        outputs = self._unsaved if self._is_heartbeat or (
            self._peek_at <= now < self._peek_until) else {}
        report = Report(dict(self._ended), [run for run, at in lost if at == KILLED],
                        [run for run, at in lost if at == FOUND], tuple(self._dead),
                        outputs, self._is_heartbeat)
        free: list[int] = []
        if not self._leaving and now >= self._claim_at:
            # None with GPUs: the GPU is stored with the claim.
            spares = 0 if self._options.gpus else min(
                wanted_spares(self._pace, self._options.slots) - len(self._spares),
                self._quota - len(self._free))
            free = [*self._free, *[0] * int(spares)]
        tick = self._claims.tick(report, free, int(min(self._quota, len(free))))
        if tick is None:
            raise Unavailable("busy", f"{self._queue.path} is busy: another program "
                              "holds its write lock", "end that program")
        if outputs:
            self._unsaved = {}
        future = self._executor.submit(self._claims.commit)
        self._commit = tick, report, future
        future.add_done_callback(lambda _: self._wakeup.set())

    def _do_committed(self) -> None:
        """Use the result of the commit; after a failure the next tick repeats all."""
        assert self._commit is not None
        self._wakeup.clear()
        (tick, report, future), self._commit = self._commit, None
        try:
            future.result()
        except BaseException as error:
            self._claims.failed(tick)
            if not isinstance(error, Unavailable):
                raise
            self._unsaved.update((claim, output) for claim, output
                                 in report.outputs.items() if claim in self._commands)
            self._complain(error)
            self._agenda.want("tick")
            return
        self._claims.committed(tick, report)
        # What was added since the tick stays.
        for claim in report.ended:
            del self._ended[claim]
        for run in report.lost:
            del self._lost[run.claim]
        self._dead = [worker for worker in self._dead if worker not in tick.removed]
        self._complaint, self._failing_since, self._settings = "", None, tick.settings
        for change in tick.changes:
            outcome = change.outcome or Outcome(RELEASED)
            if outcome.duration is not None:    # None: not started, or another worker's
                self.totals[change.after.state] += 1
            if outcome.duration is not None or outcome.kind == LOST:
                self._log(change_line(change, tick.now))
        for note in tick.notes:
            self._log(note)
        for worker in tick.removed:
            if self._queue.host.is_alive(worker) is None:
                self._log(f"worker {worker.name} on {worker.host} is removed: it sent "
                          f"no heartbeat for {span(lease_of(tick.settings))}")
        self._start_all(tick.claims)
        if tick.is_overtaken:
            self._do_spares()
        self._obey(tick.stop, tick.mine)
        for run in report.seized:
            self._lost[run.claim] = run, KILL
            self._link.send(KILL, run.claim,
                            self._queue.host.locks.process_of(run) or 0,
                            self._settings.kill_grace)
        self._plan(tick, report)

    def _plan(self, tick: Tick, report: Report) -> None:
        now, agenda = time.monotonic(), self._agenda
        if tick.is_behind:
            agenda.want("tick")
        elif tick.is_expiring:
            agenda.want("tick", now + EXPIRE_PAUSE)
        agenda.want("look")     # held until a slot is free
        if tick.changes and self._watches and not self._usable():
            with contextlib.suppress(Unavailable):  # they also poll
                self._queue.wake(NEW_JOBS)  # others must run what these ends unblock
        if report.is_heartbeat:     # from now: on a slow disk others need time, too
            self._is_heartbeat = False
            agenda.want("heartbeat", now + self._settings.heartbeat)
            agenda.want("peers")
        if report.outputs:
            self._peek_at = now + PEEK_PAUSE

    def _complain(self, error: QueueError) -> None:
        """Log it once, unless the wait is short. Commands and time-outs continue."""
        now = time.monotonic()
        self._failing_since = self._failing_since or now
        self._retry_at = now + (BUSY_PAUSE if error.code == "busy" else SYNC_PAUSE)
        if error.code != "busy":
            # The next tick claims nothing: if no descriptor was free for a claim's
            # lock, heartbeats and ends must still be recorded.
            self._claim_at = now + 2 * SYNC_PAUSE
            self._queue.store.db.relieve()
        elif now < self._failing_since + WORKER_PATIENCE:
            return
        if error.message != self._complaint:
            self._complaint = error.message
            self._log(f"cannot write to the queue, retrying: {error.message}")

    def _start_all(self, claims: Sequence[Claim]) -> None:
        self._quota -= len(claims)
        for claim in claims:
            if self._leaving:
                self._release(claim)
            elif claim.slots:
                self._free = [n for n in self._free if n not in claim.slots]
                self._start(claim)
            else:
                self._spares.append(claim)
                self._agenda.hold("spares", time.monotonic() + SPARE_PATIENCE)
                self._agenda.want("spares")
        self._start_spares()

    def _start_spares(self) -> None:
        while self._spares and self._free:
            self._start(self._claims.begin(self._spares.pop(0), self._free.pop(0)))

    def _do_spares(self) -> None:
        """Release the spares; no more are claimed before the next run's end."""
        while self._spares:
            self._release(self._spares.pop(0))
            self._pace = math.inf

    def _release(self, claim: Claim) -> None:
        claim.release()
        self._quota += 1
        self._keep(claim.number, Outcome(RELEASED))

    def _start(self, claim: Claim) -> None:
        """Start a claimed job's command in its slot. The lock, held since before the
        claim's commit (I5), passes to the process tree.
        """
        job = claim.job
        timeout = self._settings.timeout if job.timeout is None else job.timeout
        folder = self._settings.output_dir
        command = Command(claim, timeout or None, self._settings.output_limit,
                          self._archive.add(folder, job) if folder else None)
        self._log(f"{job.id} started: {cut(one_line(job.command), 100)}")
        shell = self._settings.shell
        is_local = all(map(self._directories.is_local, (job.cwd, shell)))
        try:
            if job.cwd and is_local:
                os.chdir(job.cwd.encode())
            since = boot_time()
            command.start(self._environment(claim), shell,
                          "" if is_local else job.cwd or ".")
            self._queue.host.locks.note(self._claims.lock, self._claims.worker.id,
                                        claim, command.pid, since)
        except (OSError, ValueError) as error:
            self._not_started(claim, error)
            return
        finally:
            os.fchdir(self._directories.home)
            claim.release()
        self._commands[claim.number] = command
        self._poller.add(command.pipe, functools.partial(self._read, command))
        self._poller.add(command.watch, functools.partial(self._look_at, command))
        self._agenda.want("deadline", command.ends_at if command.watch >= 0 else 0.0)
        if not self._queue.host.boot:
            self._link.send(START, claim.number, command.pid)

    def _not_started(self, claim: Claim, error: Exception) -> None:
        self._free = sorted((*self._free, *claim.slots))
        cwd, shell = claim.job.cwd, self._settings.shell
        words = f"could not be started: {error}"
        if isinstance(error, OSError):
            if error.errno in SCARCE:
                self._claim_at = time.monotonic() + SYNC_PAUSE
                self._release(claim._replace(lock=-1))
                self._log(f"{claim.job.id} could not be started: {error.strerror}; "
                          f"requeued, no claims for {span(SYNC_PAUSE)}")
                return
            if error.errno == errno.E2BIG:      # also for a single text over 128 KiB
                words = "the command and its environment are too long for the system"
            elif error.filename == cwd.encode():
                words = f"cannot enter {cwd} ({error.strerror})"
            elif error.filename == shell.encode():
                words = f"cannot execute the shell {shell} ({error.strerror})"
        self._keep(claim.number, Outcome(FAILURE, None, words, 0.0))

    def _environment(self, claim: Claim) -> dict[bytes, bytes]:
        # As bytes, so that text is UTF-8 in any locale.
        job = claim.job
        own = {**job.env, "QUEUECTL_JOB_ID": job.id,
               "QUEUECTL_ATTEMPT": str(job.attempts + 1), "QUEUECTL_QUEUE": job.queue,
               "QUEUECTL_SLOT": str(claim.slot), "QUEUECTL_CLAIM": str(claim.number)}
        gpus = self._claims.worker.gpus
        if gpus:    # replaces the job's own
            own["CUDA_VISIBLE_DEVICES"] = ",".join(gpus[n - 1] for n in claim.slots)
        if job.queue == HOOKS_QUEUE:    # the id of the job that triggered the hook
            own["QUEUECTL_JOB_ID"] = job.env.get("QUEUECTL_JOB_ID", job.id)
        return {**self._environ,
                **{name.encode(): text.encode() for name, text in own.items()}}

    def _read(self, command: Command) -> None:
        pipe = command.pipe
        if command.copy and self._archive.is_behind():
            self._poller.drop(pipe)
            self._unread.append(command)
            self._agenda.want("unread", time.monotonic() + Archive.PAUSE)
        elif not command.read():
            self._poller.drop(pipe)
            self._look_at(command)      # it has probably exited
        elif command.claim.number in self._commands:
            self._unsaved[command.claim.number] = command.output
            if self._peek_until > time.monotonic():
                self._agenda.want("tick", self._peek_at)

    def _do_unread(self) -> None:
        commands, self._unread = self._unread, []
        for command in commands:
            self._poller.add(command.pipe, functools.partial(self._read, command))

    def _look_at(self, command: Command) -> None:
        """Finish a command's run if it has exited. If a signal killed it, its
        background processes are killed first, or would overlap with a retry.
        """
        if command.claim.number not in self._commands or command.is_being_killed:
            return
        status = command.peek()
        if status is not None and status < 0:
            self._kill(command, None)
        elif status is not None:
            self._finish(command)

    def _finish(self, command: Command) -> None:
        self._poller.drop(command.watch)
        pipe, claim = command.pipe, command.claim
        outcome = command.finish()
        # An open pipe stays in use: SIGPIPE would kill background processes.
        if command.pipe < 0:
            self._poller.drop(pipe)
        del self._commands[claim.number]
        self._unsaved.pop(claim.number, None)
        if not self._queue.host.boot:
            self._link.send(START, claim.number, 0)
        self._free = sorted((*self._free, *claim.slots))
        took = outcome.duration or 0.0
        self._pace = took if self._pace == math.inf else 0.8 * self._pace + 0.2 * took
        self._start_spares()
        self._keep(claim.number, outcome)

    def _keep(self, claim: int, outcome: Outcome) -> None:
        self._ended[claim] = outcome
        pause = RECORD_PAUSE if self._spares and not self._free else 0.0
        self._agenda.want("tick", time.monotonic() + pause)

    def _do_deadline(self) -> None:
        now = time.monotonic()
        for command in list(self._commands.values()):
            if command.watch < 0:
                self._look_at(command)
            if now >= command.ends_at:
                self._kill(command, TIMEOUT)
        self._agenda.want("deadline", min((
            now + RESCUE_TICK if command.watch < 0 and not command.is_being_killed
            else command.ends_at for command in self._commands.values()),
            default=math.inf))

    def _kill(self, command: Command, why: str | None) -> None:
        """Have the supervisor kill the tree; `why`, if any, becomes the outcome. Until
        KILLED arrives, the command is not reaped.
        """
        command.why = command.why or why        # keep the first reason
        command.ends_at = math.inf
        if not command.is_being_killed:     # a second KILL would restart the grace
            command.is_being_killed = True
            self._poller.drop(command.watch)
            self._link.send(KILL, command.claim.number, command.pid,
                            self._settings.kill_grace)

    def _on_message(self) -> None:
        for kind, number, pid, *_ in self._link.receive():
            if kind == SIGNAL:
                self._on_signal(signal.Signals(number))
            elif command := self._commands.get(number):
                if kind == REFUSED:
                    self._on_refused(command, pid)
                else:
                    self._finish(command)
            elif kind == KILLED and number in self._lost:
                self._lost[number] = self._lost[number][0], KILLED
                self._agenda.want("tick")
        if not self._link.is_open:
            self._poller.drop(self._link.fileno())
            self._on_supervisor_killed()

    def _on_signal(self, number: signal.Signals) -> None:
        if self._leaving == NOW and self._failing_since:
            runs = counted(len(self._ended), "run")
            raise Gone("unwritable", f"{number.name}: {runs} cannot be recorded and "
                       "will be found lost", "")
        # A second SIGHUP is ignored: when a terminal closes, kernel and shell send one
        # each.
        at_once = number == signal.SIGQUIT or (
            self._leaving and number != signal.SIGHUP)
        self._leave(NOW if at_once else DRAIN, number.name)

    def _on_refused(self, command: Command, pid: int) -> None:
        if not command.is_refused:
            command.is_refused = True
            self._log(f"{command.claim.job.id} cannot be killed: process {pid} belongs "
                      "to another user; the run lasts until that process exits")

    def _on_supervisor_killed(self) -> None:
        refused = kill_all()
        self._leave(NOW, "error: this worker's supervisor was killed")
        for claim, command in list(self._commands.items()):
            if refused and self._queue.host.locks.is_held(claim) is not False:
                self._on_refused(command, refused[0])
            else:
                self._finish(command)

    def _do_orders(self) -> None:
        """Read requests and settings; any local user may cause it, so no commit."""
        self._watch_new()       # a new worker also sends one
        self._settings = self._options.adapt(self._queue.store.settings())
        self._obey(*self._claims.orders())

    def _obey(self, stop: str | None, mine: Mapping[int, str | None]) -> None:
        """Carry out requests; a claim missing in `mine` was taken over."""
        if stop:
            self._leave(stop, ASKED)
        if any(mine.get(one.number, LOST) for one in self._spares):
            self._do_spares()
        for claim, command in list(self._commands.items()):
            if claim not in mine and command.why != LOST:
                self._log(f"{command.claim.job.id} was taken over, as this worker sent "
                          "no heartbeat for a lease; killing its command")
            if asked := mine.get(claim, LOST):
                self._kill(command, STOPPED if asked == CANCEL else LOST)

    def _leave(self, how: str, why: str) -> None:
        """Begin to stop: DRAIN, then NOW, never back."""
        if self._leaving in (how, NOW):
            return
        if self._leaving is None and self._options.grace is not None:
            self._agenda.want("grace", time.monotonic() + self._options.grace)
        self._leaving = how
        self._do_spares()
        self._notifier.stopping()
        running, again = counted(len(self._commands), "running job"), {
            ASKED: "`queuectl worker stop --now`", "SIGHUP": "SIGTERM"}.get(
                why, f"a second {why}")
        self._log(f"{why}: killing and requeuing {running}" if how == NOW else
                  f"{why}: finishing {running}, claiming no more; {again} requeues them"
                  if self._commands else f"{why}: claiming no more")
        for command in self._commands.values() if how == NOW else ():
            self._kill(command, RELEASED)

    def _do_grace(self) -> None:
        self._leave(NOW, "grace is over")

    def _watch_new(self) -> None:
        """Watch each new worker's supervisor, which exits last."""
        host, known = self._queue.host, {one.id for one in self._watches.values()}
        for worker in self._queue.store.workers():
            if worker.id in known or worker.id == self._claims.worker.id \
                    or worker.boot != host.boot:
                continue
            with contextlib.suppress(OSError):      # no descriptor is free
                if host.is_alive(worker) is False:
                    self._agenda.want("heartbeat")
                elif is_same_birth(host.born(worker.pid), worker.born) \
                        and (watch := _watch_process(worker.pid)) >= 0:
                    self._watches[watch] = worker
                    self._poller.add(watch, functools.partial(self._on_end, watch))

    def _on_end(self, watch: int) -> None:
        del self._watches[watch]
        self._poller.drop(watch)
        os.close(watch)
        # Its worker, if it was killed as well, holds the lock for a moment.
        self._agenda.want("heartbeat", time.monotonic() + RESCUE_TICK)

    def _do_peers(self) -> None:
        """Find lost runs, to be marked in the database, then killed, then recorded."""
        self._peers.look()
        found = {run.claim: (run, FOUND) for run in self._peers.lost()}
        self._dead = self._peers.dead()
        if found.keys() - self._lost.keys() or self._dead:
            self._agenda.want("tick")
        self._lost = {**found, **self._lost}

    def _on_notice(self) -> None:
        words = list[bytes]()
        with contextlib.suppress(BlockingIOError, ConnectionError):
            while len(words) < NOTICES_AT_ONCE:
                words.append(self._notices.recv(SOCKET_BUFFER))
        self._agenda.want("look")
        # The kernel drops some if many arrive.
        if NEW_ORDERS in words or len(words) == NOTICES_AT_ONCE:
            self._agenda.want("orders")
        if PEEK in words:
            self._peek_until = time.monotonic() + PEEK_PATIENCE
            if self._unsaved:
                self._agenda.want("tick", self._peek_at)

    def _do_progress(self) -> None:
        """Show the progress, at the cost of a twentieth of the time at most."""
        assert self._calls.progress is not None
        began = time.monotonic()
        now = Progress(*map(sum, zip(*map(
            self._queue.progress, self._options.queues or (None,)))))
        self._first_progress = first = self._first_progress or now
        self._calls.progress(now.since(first))
        ended = time.monotonic()
        self._agenda.want("progress", ended + max(PROGRESS_PAUSE, 20 * (ended - began)))

    def total(self) -> str:
        done = ", ".join(
            f"{self.totals[state]} {'requeued' if state == PENDING else state}"
            for state in (*STATES[2:], PENDING) if state in self.totals)
        return f": {done}" if done else ""


def run_worker(queue: Queue, options: WorkerOptions, link: Link,
               calls: Callbacks) -> int:
    """Run a worker until it is asked to stop; return its exit status."""
    import concurrent.futures as futures  # 9 ms, and only in a worker
    import socket
    _prepare_descriptors(options.slots)
    with contextlib.ExitStack() as stack:
        # Any local user may send to it, which costs a look at the database. It is bound
        # before the row shows others its port.
        notices = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        notices.setblocking(False)
        port = None
        with contextlib.suppress(OSError):      # no loopback
            notices.bind((LOOPBACK, 0))
            port = notices.getsockname()[1]
        claims = Claims(queue, options, port, link.peer)

        @stack.callback
        def leave() -> None:
            queue.store.db.patience = WORKER_PATIENCE
            with contextlib.suppress(QueueError):   # others delete the row
                claims.leave()
        link.send(HELLO)
        link.flush(claims.lock)
        queue.wake(NEW_ORDERS)      # so that the others watch this one
        runner = Runner(queue, claims, options, link, notices, calls)
        calls.ready(claims.worker.name)
        try:
            with futures.ThreadPoolExecutor(1) as executor:
                status = runner.run(executor)
        except Gone as error:
            calls.log(f"error: {error.message}, so this worker kills its jobs and "
                      "stops; restart it")
            return EX_NO
    calls.log(f"worker {claims.worker.name} stopped{runner.total()}")
    if options.drain and status == EX_OK:
        for line in queue.left_waiting(options.queues):
            calls.log(line)
        return EX_NO if DEAD in runner.totals else EX_OK
    return status


# ---- 16 Page -----------------------------------------------------------------
# The dashboard, in one reply. Its Content-Security-Policy allows the style and the
# script by their hashes, so a style= or an onclick= would do nothing.

PAGE = r'''<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>queuectl</title>
<link rel="icon" href="data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22
 viewBox=%220 0 16 16%22%3E%3Crect width=%2216%22 height=%2216%22 rx=%223.5%22
 fill=%22%233157d5%22/%3E%3Cpath d=%22M4 5h8M4 8h8M4 11h4.5%22 stroke=%22%23fff%22
 stroke-width=%221.6%22 stroke-linecap=%22round%22/%3E%3C/svg%3E">
<style>
/* One accent, for what runs and for what can be pressed. Other hues are states. */
:root {
  color-scheme: light dark;
  --ground: light-dark(#f7f7f8, #0b0c0e); --panel: light-dark(#fff, #131417);
  --hover: light-dark(#f4f4f6, #1a1b1f); --line: light-dark(#e4e4e8, #26282d);
  --edge: light-dark(#8a8d94, #70737c); --ink: light-dark(#17181c, #ededf0);
  --quiet: light-dark(#5a5d66, #a0a3ac); --accent: light-dark(#3157d5, #8eacff);
  --on-accent: light-dark(#fff, #0b1020); --tint: light-dark(#eef2fe, #1a2138);
  --warn: light-dark(#8a5800, #e3ab4d); --bad: light-dark(#c02f28, #ff837b);
  --good: light-dark(#1f9460, #45b985); --fair: light-dark(#c47d0c, #dfa549);
  --bad-tint: light-dark(#fdf1f0, #2a1718); --warn-tint: light-dark(#fdf6e7, #2a2113);
  --mono: ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  --small: .75rem; --text: .8125rem; --large: 1.125rem; --figure: 1.5rem;
}
* { box-sizing: border-box } [hidden] { display: none !important }
html { scroll-padding-top: 4rem }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 400 var(--text)/1.5 system-ui, sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere }
h1, h2, h3, p, ul, dl, dd, figure, pre { margin: 0; padding: 0; list-style: none }
h1 { font-size: var(--large); font-weight: 600; letter-spacing: -.01em }
h2 { font-size: var(--text); font-weight: 600 }
h3 { font-size: var(--text); font-weight: 500 }
code, pre, .mono { font-family: var(--mono); font-size: .95em }
a { color: inherit; text-decoration: none }
a:hover, footer a, .toast a, #health a, .reason a, .tag {
  text-decoration: underline; text-underline-offset: .2em }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px }
[tabindex="-1"]:focus { outline: none }
.quiet { color: var(--quiet) } .small { font-size: var(--small) }
.bad { color: var(--bad) } .warn { color: var(--warn) }
.cut { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; min-width: 0 }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden;
  clip-path: inset(50%); white-space: nowrap }

/* Things to press. */
button, select, input, textarea { font: inherit; color: inherit; min-height: 2rem;
  min-width: 0; padding: 0 .5rem; border: 1px solid var(--edge); border-radius: 6px;
  background: var(--panel) }
button { padding: 0 .75rem; border-color: var(--line); cursor: pointer;
  white-space: nowrap }
button:hover { background: var(--hover) }
button:disabled { color: var(--quiet); opacity: .6; cursor: default }
button.primary { background: var(--accent); border-color: var(--accent);
  color: var(--on-accent); font-weight: 500 }
button.primary:hover { filter: brightness(1.08) }
button.danger { color: var(--bad) }
button.plain { min-height: 1.5rem; padding: 0 .375rem; border-color: transparent;
  background: none; color: var(--quiet); font-size: var(--small) }
button.plain:hover { color: var(--ink); background: var(--hover) }
textarea { padding: .375rem .5rem; resize: vertical; width: 100% }
input[type=checkbox] { min-height: 0; accent-color: var(--accent) }
::placeholder { color: var(--quiet); opacity: 1 }

/* A state is a mark and a word. */
.state { display: inline-flex; align-items: baseline; gap: .5rem; white-space: nowrap }
.mark { flex: none; align-self: center; display: inline-block; width: .5rem;
  height: .5rem; border-radius: 50%; background: currentColor }
.mark, .plot [class], .legend i { color: var(--hue) }
.pending, .cancelled { --hue: var(--quiet) }
.processing, .run { --hue: var(--accent) }
.completed { --hue: var(--good) } .dead { --hue: var(--bad) }
.failed, .wait { --hue: var(--fair) }
.pending .mark { background: none; border: 1.5px solid currentColor }
.cancelled .mark { border-radius: 0; height: 2px } .dead .mark { border-radius: 1px }
.failed .mark { border-radius: 1px; transform: rotate(45deg) scale(.9) }
.processing .mark { animation: breathe 2s ease-in-out infinite }
@keyframes breathe { 50% { opacity: .35 } }

/* The frame. Most boxes are one of these two. */
#board, .pair, .stack, #job, .split, .row, dialog form { display: grid; gap: .875rem }
.top, .notice, .brand, footer, #health, .panel > header, .legend, .worker h3, .filters,
.pager, .title, .actions, .buttons, .toast { display: flex; flex-wrap: wrap;
  gap: .25rem .75rem; align-items: center }
.top, .notice { padding: .625rem max(1.25rem, 50vw - 43.75rem);
  border-bottom: 1px solid var(--line) }
.top { position: sticky; top: 0; z-index: 5; background: var(--ground) }
.top, .worker h3, .toast { flex-wrap: nowrap }
.brand { gap: .5rem; font-weight: 600 }
.brand svg { color: var(--accent); width: 1.125rem; height: 1.125rem }
.top .path { flex: 1; color: var(--quiet); font-size: var(--small) }
main, footer { max-width: 90rem; margin: 0 auto; padding: 1rem 1.25rem }
footer, .legend { color: var(--quiet); font-size: var(--small) }
.notice { background: var(--warn-tint) }
.notice.bad { position: sticky; top: 3.3125rem; z-index: 4; background: var(--bad-tint);
  color: var(--ink) }
body.stale main > * { opacity: .6 }
.panel { background: var(--panel); border: 1px solid var(--line); border-radius: 8px;
  min-width: 0 }
.panel > header { padding: .375rem .875rem; min-height: 2.375rem }
.panel > header h2 { margin-right: auto }
.none { padding: .25rem .875rem .875rem; color: var(--quiet) }

/* The board: counts and charts and lists at the left, the machinery at the right. */
#board { grid-template-columns: minmax(0, 1fr) }
#health .mark { width: .625rem; height: .625rem }
.counts { display: grid; grid-template-columns: repeat(6, minmax(0, 1fr)); gap: 1px;
  overflow: hidden; background: var(--line) }
.counts a { padding: .5rem .875rem .625rem; background: var(--panel) }
.counts a > * { display: block } .counts a > .state { display: flex }
.counts a:focus-visible { outline-offset: -3px; border-radius: 7px }
.counts a:hover { text-decoration: none; background: var(--hover) }
.counts a[aria-current] { background: var(--tint);
  box-shadow: inset 0 -2px var(--accent) }
.counts b { font-size: var(--figure); font-weight: 500; line-height: 1.3;
  letter-spacing: -.02em }
.pair { grid-template-columns: repeat(2, minmax(0, 1fr)) }
.stack { align-content: start; min-width: 0 }

/* Charts. */
.chart .legend { flex-basis: 100% }
.legend b { color: var(--ink); font-weight: 500 }
.legend i { display: inline-block; width: .5rem; height: .5rem; margin-right: .375rem;
  border-radius: 1px; background: currentColor }
.plot { position: relative; height: 6rem; margin: .5rem .875rem 1.5rem 3rem }
.plot svg { display: block; width: 100%; height: 100%; overflow: visible }
.plot text { fill: var(--quiet); font-size: .6875rem }
.plot .rule { stroke: var(--line) } .plot .cursor { stroke: var(--edge) }
.plot rect { fill: currentColor } .plot .partial, #times rect { opacity: .5 }
.plot input { position: absolute; inset: 0; width: 100%; height: 100%; margin: 0;
  opacity: 0; cursor: crosshair; touch-action: pan-y }
.plot:has(:focus-visible) { outline: 2px solid var(--accent); outline-offset: 2px }
details > summary { cursor: pointer; color: var(--quiet); font-size: var(--small) }

/* Short lists: one line for the job, one for the words. */
.brief { display: grid; grid-template-columns: .5rem 4.5rem minmax(0, 1fr) auto;
  gap: 0 .5rem; align-items: baseline; min-height: 1.625rem;
  padding: .25rem .875rem .3125rem; border-top: 1px solid var(--line) }
.brief .reason { grid-column: 2 / -1 }
.reason { font-size: var(--small); color: var(--quiet) }
.reason.bad { color: var(--bad) }
.worker { border-top: 1px solid var(--line); padding: .3125rem 0 .4375rem }
.worker h3, .worker > p { padding: 0 .875rem } .worker h3 .cut { flex: 1 }
.worker .brief { border-top: 0; padding-block: .125rem }
.slots { display: flex; gap: 2px; flex-wrap: wrap; max-width: 7rem }
.slots i { width: .5rem; height: .5rem; border-radius: 1px; background: var(--line) }
.slots i.busy { background: var(--accent) }
.item { padding: .3125rem .875rem .4375rem; border-top: 1px solid var(--line) }
.item > div { display: flex; gap: .5rem; justify-content: space-between }
#queues td { padding-block: .125rem }
#queues td:first-child { padding-block: .25rem }
#queues button, .panel > header .plain { margin-right: -.375rem }

/* The table of jobs. */
.filters { gap: .5rem; padding: 0 .875rem .75rem }
.filters input[type=search] { flex: 1 1 14rem }
.filters input[name=tag] { width: 7.5rem }
table { width: 100%; border-collapse: collapse; text-align: left }
th { font-weight: 400; white-space: nowrap; color: var(--quiet);
  font-size: var(--small) }
th, td { padding: .3125rem .5rem; border-top: 1px solid var(--line);
  vertical-align: baseline }
th:first-child, td:first-child { padding-left: .875rem }
th:last-child, td:last-child { padding-right: .875rem }
.number { text-align: right; white-space: nowrap }
#jobs table { table-layout: fixed }
#jobs tbody tr:hover { background: var(--hover) }
#jobs td { height: 2.25rem }
.c-state { width: 7rem } .c-id { width: 5.5rem } .c-queue { width: 5rem }
.c-tries { width: 3rem } .c-took { width: 4.5rem } .c-age { width: 4.75rem }
.c-act { width: 4.25rem } .c-act button { margin-right: -.375rem }
#runs th:nth-child(2) { width: 60% }
.c-id a, .brief > a { font-family: var(--mono); font-size: .95em }
.line { display: flex; gap: .5rem; align-items: baseline }
.line .tag { flex: none; max-width: 7rem; min-width: 1.5rem }
.pager { gap: .5rem; padding: .5rem .875rem; border-top: 1px solid var(--line) }
.pager span { margin-right: auto }
.begin { padding: .5rem .875rem 1.25rem; max-width: 44rem }
.begin li { margin-top: .75rem }
.begin pre, .command { padding: .5rem .75rem; border: 1px solid var(--line);
  border-radius: 6px; background: var(--ground); white-space: pre-wrap }

/* A job's page. */
.title h1 { font-family: var(--mono) }
.title .actions { margin-left: auto }
.split { grid-template-columns: minmax(0, 1fr) 20rem; align-items: start }
.why { padding: .625rem .875rem; border-left: 3px solid var(--edge) }
.why.bad { border-left-color: var(--bad); color: var(--ink) }
.why div + div { margin-top: .5rem } .why h2 { font-weight: 400 }
.fields { display: grid; grid-template-columns: 6.5rem minmax(0, 1fr);
  padding: 0 .875rem .75rem; gap: .25rem .5rem }
.fields dt { color: var(--quiet) }
dt::first-letter, label::first-letter { text-transform: uppercase }
.output { max-height: 26rem; min-height: 4rem; overflow: auto; padding: .75rem .875rem;
  border-top: 1px solid var(--line); font-size: var(--small); line-height: 1.55;
  white-space: pre-wrap; border-radius: 0 0 7px 7px }
tr[aria-current] { background: var(--tint) }

/* Dialogs and answers. */
dialog { width: min(34rem, calc(100vw - 2rem)); max-height: calc(100dvh - 2rem);
  padding: 0; border: 1px solid var(--line); border-radius: 10px;
  background: var(--panel); color: var(--ink);
  box-shadow: 0 12px 40px rgb(0 0 0 / .25) }
dialog::backdrop { background: rgb(0 0 0 / .4) }
dialog form { padding: 1.125rem 1.25rem }
dialog h2 { font-size: var(--large) }
.row { grid-template-columns: repeat(auto-fill, minmax(min(9rem, 100%), 1fr)) }
.field { display: grid; gap: .25rem; align-content: start }
.field:has(textarea) { grid-column: 1 / -1 }
.field input:not([type=checkbox]) { width: 100% }
.field [aria-invalid=true] { border-color: var(--bad) }
.buttons { justify-content: flex-end }
dialog details > :not(summary) { margin-top: .75rem }
.toasts { position: fixed; right: 1rem; bottom: 1rem; z-index: 20;
  max-width: min(26rem, calc(100vw - 2rem)) }
.toast { justify-content: space-between; margin-top: .5rem; padding: .5rem .875rem;
  border: 1px solid var(--line); border-radius: 8px; background: var(--panel);
  box-shadow: 0 6px 20px rgb(0 0 0 / .14) }
.toast.bad { color: var(--ink); border-color: var(--bad) }

@media (min-width: 68rem) {
  #board { grid-template-columns: minmax(0, 1fr) 21rem }
  #health, .counts { grid-column: 1 / -1 }
  .side { grid-column: 2; grid-row: 3 / span 9 }
  .pair, #jobs { grid-column: 1 }
}
@media (max-width: 62rem) { .split { grid-template-columns: minmax(0, 1fr) } }
@media (max-width: 44rem) {
  main, footer { padding: .875rem .75rem }
  .top, .notice { padding: .5rem .75rem }
  .notice.bad { top: 3.0625rem }
  .top .path { visibility: hidden }
  .counts { grid-template-columns: repeat(3, minmax(0, 1fr)) }
  .counts a { padding-inline: .5rem }
  .pair { grid-template-columns: minmax(0, 1fr) }
  .filters > * { flex: 1 1 8rem }
  .filters input[type=search] { flex-basis: 100% }
  .title .actions { margin-left: 0; width: 100% }
  #jobs thead { display: block; position: absolute; width: 1px; height: 1px;
    overflow: hidden; clip-path: inset(50%) }
  #jobs table, #jobs tbody { display: block }
  #jobs tr { display: grid; gap: 0 .5rem; padding: .4375rem .875rem;
    grid-template-columns: auto auto minmax(0, 1fr) auto; align-items: center;
    border-top: 1px solid var(--line) }
  #jobs td { height: auto; padding: 0; border: 0; width: auto }
  #jobs .c-command { grid-row: 2; grid-column: 1 / -1 }
  #jobs .c-queue, #jobs .c-tries { grid-row: 3 }
  #jobs .c-act { grid-row: 3; grid-column: 3 / -1; justify-self: end }
  #jobs .c-queue { grid-column: 1 }
  #jobs .c-queue, #jobs .c-id { max-width: 8rem }
  #jobs .c-tries { grid-column: 2; text-align: left }
  .wide { display: none }
}
@media (prefers-reduced-motion: reduce) {
  *, *::before { animation: none !important; transition: none !important }
}
@media (forced-colors: active) {
  .mark, .slots i, .legend i { forced-color-adjust: none }
}
</style>
<script type="module">
const PAGE = 50;            // jobs in the table, never more in the document
const SHORT = 4;            // lines in the short lists
const SLOTS = 12;           // lines a worker shows
const KEPT = 1 << 20;       // characters of an output that are drawn
const OVERDUE = 30;         // seconds without heartbeat that call for attention
const PATIENCE = 30000;     // ms to wait for an answer, or for any event

// ---- 1 Elements. Data reaches the document as text nodes only. ----

const $ = (selector, root = document) => root.querySelector(selector);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];

function fill(node, attributes, children = []) {
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") node.addEventListener(name, value);
    else if (value !== null && value !== undefined && value !== false)
      node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(2).filter(child => child || child === 0));
  return node;
}

// h("tag.class.class", { attribute: value, event: function } or nothing, ...children)
function h(kind, ...rest) {
  const [tag, ...classes] = kind.split(".");
  const attributes = rest[0]?.constructor === Object ? rest.shift() : {};
  const node = fill(document.createElement(tag), attributes, rest);
  node.classList.add(...classes);
  return node;
}

const draw = (tag, attributes, ...children) => fill(
  document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

// If the element with the focus is gone, focus the nearest heading.
function rescueFocus() {
  if (document.activeElement === document.body)
    $(shown ? "#job h1" : "#jobs-title").focus({ preventScroll: true });
}

// Run `change`, and give the focus to the same stop among those of the new content.
function keepingFocus(node, change) {
  const stops = root => $$("a, button", root);
  const place = stops(node).indexOf(document.activeElement);
  const fresh = change() || node;
  if (place >= 0) stops(fresh)[place]?.focus();
  if (place >= 0) rescueFocus();
}

// Make the children of `parent` those of `items`; what is unchanged keeps its focus.
function renderList(parent, items, keyOf, build) {
  const wanted = new Map(items.map(item => [keyOf(item), item]));
  const had = parent.contains(document.activeElement);
  for (const node of [...parent.children])
    if (!wanted.has(node.key)) node.remove();
  const known = new Map([...parent.children].map(node => [node.key, node]));
  let index = 0;
  for (const [key, item] of wanted) {
    const signature = JSON.stringify(item);
    let node = known.get(key);
    if (!node || node.signature !== signature) {
      const fresh = Object.assign(build(item), { key, signature });
      if (node) keepingFocus(node, () => { node.replaceWith(fresh); return fresh; });
      node = fresh;
    }
    if (parent.children[index] !== node)
      parent.insertBefore(node, parent.children[index] || null);
    index += 1;
  }
  if (had) rescueFocus();
  const none = $(":scope > .none:not(#no-match)", parent.closest(".panel"));
  if (none) none.hidden = items.length > 0;
}

// Build the content of `node` anew if what it shows has changed.
function renderOnce(node, value, build) {
  const signature = JSON.stringify(value);
  if (node.signature === signature) return;
  node.signature = signature;
  keepingFocus(node, () => node.replaceChildren(...build()));
}

// ---- 2 Words and figures. ----

function span(seconds) {
  if (seconds > 0 && seconds < 0.001) return "<1ms";
  if (seconds > 0 && seconds < 0.9995) return `${Math.round(seconds * 1000)}ms`;
  if (seconds < 9.95 && !Number.isInteger(seconds)) return `${seconds.toFixed(1)}s`;
  const whole = Math.round(seconds), two = number => String(number).padStart(2, "0");
  if (whole < 60) return `${whole}s`;
  const minutes = Math.floor(whole / 60), hours = Math.floor(minutes / 60);
  if (hours < 1) return `${minutes}m ${two(whole % 60)}s`;
  if (hours < 24) return `${hours}h ${two(minutes % 60)}m`;
  return `${Math.floor(hours / 24)}d ${hours % 24}h`;
}

const count = number => number.toLocaleString("en-US");
const many = (number, word, plural = `${word}s`) =>
  `${count(number)} ${number === 1 ? word : plural}`;
const clockTime = at => new Date(at).toLocaleTimeString([], {
  hour: "2-digit", minute: "2-digit", hour12: false });
const fullTime = at => new Date(at).toLocaleString([], {
  dateStyle: "medium", timeStyle: "medium", hour12: false });

// Elements that say how far a moment is away; they tick.
const CLOCKS = {
  elapsed: seconds => span(Math.max(0, Math.floor(seconds))),
  ago: seconds => seconds < 2 ? "now"
    : `${span(Math.floor(seconds)).split(" ")[0]} ago`,
  due: seconds => seconds > -1 ? "now" : `in ${span(Math.ceil(-seconds))}`,
};
const now = () => Date.now() + model.skew;
const since = at => (now() - Date.parse(at)) / 1000;

function clock(form, at) {
  return h("time", { datetime: at, "data-clock": form, title: fullTime(at) },
           CLOCKS[form](since(at)));
}

function tick() {
  for (const node of $$("[data-clock]"))
    setText(node, CLOCKS[node.dataset.clock](since(node.dateTime)));
}

function stateWord(state, word = state) {
  return h("span", { class: `state ${state}` }, h("i.mark"), word);
}

// ---- 3 What is known. ----

const model = {
  role: null, actions: {}, skew: 0, link: "connecting",     // live, lost, out
  status: null, history: [], queues: [], schedules: [],
  running: [], waiting: [], failures: [], jobs: [], next: null,
};
const NO_FILTER = { state: "", queue: "", tag: "", search: "" };
let filter = { ...NO_FILTER };
let cursors = [""];         // of the pages up to this one
let shown = null;           // the job's page: { id, run, job, ... }; null: the board

const states = () => Object.keys(model.actions);
const mayChange = () => model.role === "full";
const may = (job, verb) => mayChange() && model.actions[job.state].includes(verb);
const jobPath = id => `#/jobs/${encodeURIComponent(id)}`;
const boardPath = changes => {
  const wanted = Object.entries({ ...NO_FILTER, ...changes }).filter(([, v]) => v);
  return wanted.length ? `#/?${new URLSearchParams(wanted)}` : "#/";
};
const button = (word, click, kind = "", label = null) =>
  h("button", { type: "button", class: kind, "aria-label": label, click }, word);
const link = (href, text, kind = "") => h("a", { href, class: kind }, text);
const jobLink = id => h("a.cut", { href: jobPath(id), title: id }, id);

const TONES = { dead: "bad", failed: "warn" };
function reasonLine(job) {
  const note = (job.note || "").replaceAll("`", ""), retries = job.state === "failed";
  const isLater = (retries || job.state === "pending") && since(job.run_at) < 0;
  const parts = [isLater && [retries ? "retry " : "due ", clock("due", job.run_at)],
                 isLater && note && (retries ? ": " : ", "), note]
    .flat().filter(Boolean);
  return parts.length ? h("div", { class: `reason cut ${TONES[job.state] || ""}`,
                                   title: note }, parts) : null;
}

// ---- 4 The server. ----

class Refused extends Error {}

async function ask(method, path, body) {
  const options = { method, cache: "no-store", signal: AbortSignal.timeout(PATIENCE) };
  if (method !== "GET") options.headers = { "Content-Type": "application/json" };
  if (method === "POST") options.body = JSON.stringify(body || {});
  let reply;
  try { reply = await fetch(path, options); }
  catch { throw new Refused("the server does not answer"); }
  const skew = Date.parse(reply.headers.get("Date")) - Date.now();
  model.skew = Math.abs(skew) > 2000 ? skew : 0;     // the header counts whole seconds
  if (reply.status === 401) logOut();
  if (reply.ok) return reply;
  const { error = `the server answered ${reply.status}`, hint, key } =
    await reply.json().catch(() => ({}));
  throw Object.assign(new Refused(hint ? `${error}; ${hint}` : error),
                      { status: reply.status, key });
}

const get = async path => (await ask("GET", path)).json();
const jobUrl = (id, rest = "") => `/api/jobs/${encodeURIComponent(id)}${rest}`;

async function getJobs(query) {
  const page = await get(`/api/jobs?${new URLSearchParams(query)}`);
  page.jobs = page.jobs.map(job => ({ ...job, note: page.notes[job.id] }));
  return page;
}

// Calls `work` at most once in `pause` ms and never twice at once; of the calls that
// come meanwhile, one is kept. Only what the user asked for is urgent.
function coalesced(work, pause) {
  let timer = null, isBusy = false, isWanted = false, last = -Infinity;
  async function run() {
    timer = null; isBusy = true; isWanted = false;
    try { await work(); }
    catch (error) { if (!(error instanceof Refused)) throw error; }
    finally {
      isBusy = false; last = performance.now();
      if (isWanted) request();
    }
  }
  function request(isUrgent = false) {
    if (isBusy) isWanted = true;
    else if (timer === null || isUrgent) {
      clearTimeout(timer);
      const rest = Math.max(0, last + pause - performance.now());
      timer = setTimeout(run, isUrgent ? 0 : rest);
    }
  }
  return request;
}

const refresh = {
  jobs: coalesced(readJobs, 700),
  lists: coalesced(async () => {
    const listed = async (limit, state) => (await getJobs({ limit, state })).jobs;
    [model.running, model.waiting, model.failures] = await Promise.all([
      listed(100, "processing"), listed(SHORT, "pending"),
      listed(SHORT, "dead,failed")]);
    showWorkers(); showLists();
  }, 1000),
  queues: coalesced(async () => {
    model.queues = await get("/api/queues");
    showQueues();
  }, 1000),
  history: coalesced(async () => {
    model.history = (await get("/api/history?minutes=60")).minutes;
    showCharts(); showStatus();
  }, 5000),
  schedules: coalesced(async () => {
    model.schedules = await get("/api/schedules");
    showSchedules();
  }, 10000),
  job: coalesced(readJob, 300),
};

function refreshAll(isUrgent) {
  if (document.hidden || model.link === "out") return;
  if (shown) return refresh.job(isUrgent);
  for (const name in refresh) if (name !== "job") refresh[name](isUrgent);
}

async function readJobs() {
  const asked = JSON.stringify([filter, cursors]);
  const page = await getJobs({ ...filter, limit: PAGE, after: cursors.at(-1) })
    .catch(error => {
      if (error.status !== 400) throw error;
      return { jobs: [], next: null, words: error.message };
    });
  if (asked !== JSON.stringify([filter, cursors])) return refresh.jobs(true);
  setText($("#no-match"), page.words || "No job fits this filter.");
  [model.jobs, model.next] = [page.jobs, page.next];
  showJobs();
}

// ---- 5 Live: server-sent events. ----

let stream = null, retryPause = 1000, retryTimer = null, lastStatus = "", heardAt = 0;

function listen() {
  disconnect();
  heardAt = performance.now();
  stream = new EventSource("/api/events");
  stream.addEventListener("open", onConnect);
  stream.addEventListener("error", onDisconnect);
  stream.addEventListener("status", ({ data }) => {
    heardAt = performance.now();
    if (data === lastStatus) return;
    lastStatus = data;
    model.status = JSON.parse(data);
    showStatus(); refreshAll();
  });
  stream.addEventListener("change", event => {
    if (!shown || JSON.parse(event.data).id === shown.id) refreshAll();
  });
  stream.addEventListener("resync", () => refreshAll());
}

function onConnect() {
  retryPause = 1000;
  const wasLost = model.link === "lost";
  model.link = "live";
  showConnection(); refreshAll(true);
  if (wasLost) answer("The server is back; this is how things stand now.");
}

function disconnect() {
  clearTimeout(retryTimer);
  stream?.close();
}

function onDisconnect() {
  disconnect();
  if (model.link === "live") model.link = "lost";
  showConnection();
  retryTimer = setTimeout(reconnect, retryPause);
  retryPause = Math.min(retryPause * 2, 15000);
}

async function reconnect() {
  try { await enter(); listen(); }
  catch { if (model.link !== "out") onDisconnect(); }
}

async function enter() {
  const { role, actions, fields, version, database } = await get("/api/session");
  Object.assign(model, { role, actions });
  if (!$("#enqueue [name]")) buildForm(fields);
  if (model.link === "out") model.link = "connecting";
  setText($("#database"), database);
  $("#database").title = database;
  setText($("#version"), `queuectl ${version}`);
  $("#read-only").hidden = mayChange();
  for (const node of $$(".changes")) node.hidden = !mayChange();
  route();
}

function logOut() {
  model.link = "out";
  disconnect();
  $("#board").hidden = $("#job").hidden = true;
  $("#logged-out").hidden = false;
  for (const node of $$(".changes, #read-only")) node.hidden = true;
  for (const dialog of $$("dialog[open]")) dialog.close();
  $("#answers").replaceChildren();
  showConnection();
}

// ---- 6 The board. ----

const LINKS = { connecting: ["pending", "Connecting"], live: ["completed", "Live"],
                lost: ["dead", "Offline"], out: ["cancelled", "Logged out"] };

function showConnection() {
  const isLost = model.link === "lost", [state, word] = LINKS[model.link];
  $("#live").className = `state ${state}`;
  setText($("#live span"), word);
  document.body.classList.toggle("stale", isLost);
  if ($("#lost").hidden === isLost)
    setText($("#lost span"), isLost ? "The server does not answer. What you see " +
      `is from ${fullTime(Date.now())}; trying again.` : "");
  $("#lost").hidden = !isLost;
  showTitle();
}

function showTitle() {
  const { processing, dead } = model.status?.jobs || {};
  const state = model.link === "out" ? "logged out" :
    model.link !== "live" ? "offline" :
    shown && shown.job ? `${shown.job.id} ${shown.job.state}` : !model.status ? "" :
    processing ? `${count(processing)} running` : dead ? `${count(dead)} dead` : "idle";
  document.title = state ? `${state} - queuectl` : "queuectl";
}

function showStatus() {
  if (!model.status) return;
  showCounts(); showHealth(); showWorkers(); showQueues(); showJobs(); showTitle();
}

const sum = (rows, name) => rows.reduce((total, one) => total + one[name], 0);

function showHealth() {
  const { jobs: { dead }, paused, attention } = model.status;
  const found = [
    ...attention.filter(one => one.code !== "paused").map(one => one.message),
    dead && link(boardPath({ state: "dead" }),
                 `${many(dead, "job is", "jobs are")} dead`),
    ...paused.map(name => name === "*" ? "all queues are paused"
                                       : `queue ${name} is paused`)].filter(Boolean);
  const [level, title] = attention.some(one => one.code === "no-worker")
    ? ["dead", "Stalled"] : found.length ? ["failed", "Needs attention"]
    : ["completed", "Healthy"];
  $("#health h1").className = `state ${level}`;
  setText($("#health h1 span"), title);
  renderOnce($("#health p"), found.map(part => part.textContent || part), () =>
    found.flatMap((part, n) => n ? [" \u00b7 ", part] : part));
}

function showCounts() {
  if (!model.status) return;
  const { jobs, workers, next_due: due } = model.status;
  const done = sum(model.history, "completed"), died = sum(model.history, "failed");
  const success = Math.floor(done / (done + died) * 1000) / 10;
  const notes = {
    pending: since(due) < 0 && due, failed: "will be retried", dead: "need attention",
    processing: `of ${many(sum(workers, "slots"), "slot")}`,
    completed: done + died ? `${success}% this hour` : "" };
  const tiles = states().map(state => ({
    state, number: count(jobs[state]), isChosen: filter.state === state,
    note: notes[state] || "" }));
  renderList($("#counts"), tiles, one => one.state,
    ({ state, number, isChosen, note }) =>
      h("a", { href: boardPath({ state: isChosen ? "" : state }),
               "aria-current": isChosen && "true" },
        stateWord(state), h("b", number), h("span.small.quiet.cut",
          state === "pending" && note ? ["next ", clock("due", note)] : note)));
}

// ---- 7 Charts of the last 60 minutes, oldest first; the last is not over yet. ----

const RATES = [["completed", "completed"], ["retried", "failed"], ["failed", "dead"]];
const TIMES = [["run", "run time"], ["wait", "waiting"]];
const TICKS = [0.001, 0.01, 0.1, 1, 10, 60, 600, 3600, 36000, 360000];
const figure = seconds => seconds === null ? "none" : span(seconds);
const cursor = { rates: null, times: null };    // the minute that is read; null: none

// `whole` is read when no minute is; a bar is [class, low, high].
const CHARTS = {
  rates: {
    whole: data => Object.fromEntries(RATES.map(([name]) => [name, sum(data, name)])),
    figures: one => RATES.map(([name, hue]) => [hue, name, count(one[name])]),
    bars(one) {
      let top = 0;
      return RATES.map(([name, hue]) => [hue, top, top += one[name]])
        .filter(([, low, high]) => high > low);
    },
    scale(most) {
      const step = 10 ** Math.floor(Math.log10(most));
      const top = [2, 4, 6, 8, 10].map(n => n * step).find(n => n >= most);
      return [value => value / top, [0, top / 2, top].map(n => [n, count(n)])];
    },
  },
  times: {
    whole: data => data.findLast(one => CHARTS.times.bars(one).length) || data.at(-1),
    figures: one => TIMES.map(([key, word]) => [key, word, [...new Set(
      ["p50", "p95"].map(part => figure(one[`${key}_${part}`])))].join(" / ")]),
    bars: one => TIMES.map(([key]) => [key, one[`${key}_p50`], one[`${key}_p95`]])
      .filter(([, low]) => low !== null),
    scale(most, least) {
      const low = TICKS.findLast(t => t <= Math.min(least, 1)) || TICKS[0];
      const high = TICKS.find(t => t >= Math.max(most, low * 10)) || TICKS.at(-1);
      return [value => Math.log(Math.max(value, low) / low) / Math.log(high / low),
              TICKS.filter(t => t >= low && t <= high)
                .map(t => [t, span(t).replace(/ 00[sm]/, "")])];
    },
  },
};

function showChart(id) {
  const { whole, figures, bars, scale } = CHARTS[id], data = model.history;
  const n = cursor[id], one = data[n] || whole(data), shapes = data.map(bars);
  const values = shapes.flat().flatMap(([, low, high]) => [low, high]);
  const [share, ticks] = scale(Math.max(1, ...values), Math.min(1, ...values));
  const x = minutes => `${minutes / 0.6}%`, y = part => `${100 - 100 * part}%`;
  $(`#${id} svg`).replaceChildren(
    ...ticks.flatMap(([value, label]) => [
      draw("line", { class: "rule", x2: "100%", y1: y(share(value)),
                     y2: y(share(value)) }),
      draw("text", { x: -6, y: y(share(value)), dy: 3.5, "text-anchor": "end" },
           label)]),
    ...data.map((minute, at) => [clockTime(minute.at), at])
      .filter(([time, at]) => /(00|15|30|45)$/.test(time) && at > 1 && at < 57)
      .map(([time, at]) => draw("text", { x: x(at), y: "100%", dy: 14,
                                          "text-anchor": "middle" }, time)),
    ...shapes.flatMap((several, at) => several.map(([hue, low, high]) => {
      const top = Math.max(share(high), share(low) + 0.02);     // one is seen as well
      return draw("rect", { class: hue + (at === 59 ? " partial" : ""), x: x(at + 0.05),
        y: y(top), width: x(0.9), height: `${100 * (top - share(low))}%` });
    })),
    values.length ? "" : draw("text", { x: "50%", y: "50%", "text-anchor": "middle" },
                              "nothing measured yet"),
    n === null ? "" : draw("line", { class: "cursor", x1: x(n + 0.5), x2: x(n + 0.5),
                                     y2: "100%" }));
  const when = one.at ? clockTime(one.at) : "last hour", told = figures(one);
  $(`#${id} .legend`).replaceChildren(h("span", when), ...told.map(
    ([hue, word, value]) => h("span", h("i", { class: hue }), `${word} `,
                              h("b", value))));
  $(`#${id} input`).ariaValueText = `${when}: ` +
    told.map(([, word, value]) => `${word} ${value}`).join(", ");
}

function showCharts() {
  if (model.history.length) Object.keys(CHARTS).forEach(showChart);
}

// A slider lies over each chart: the minute is chosen by pointer, touch and arrow keys.
function bindSlider(id) {
  const slider = $(`#${id} input`), read = n => {
    cursor[id] = n;
    showCharts();
  };
  fill(slider, {
    input: () => read(Number(slider.value)), blur: () => read(null),
    pointerleave: () => read(null), pointermove: event => {
      const { left, width } = slider.getBoundingClientRect();
      read(Math.min(59, Math.max(0, Math.floor((event.clientX - left) / width * 60))));
    } });
}

// ---- 8 Short lists, workers, queues, schedules. ----

function brief(job, figure, reason) {
  return h("div.brief",
    h("span", { class: job.state }, h("i.mark"), h("span.unseen", job.state)),
    jobLink(job.id), h("code.cut", { title: job.command }, job.command),
    h("span.quiet.small.number", figure), reason);
}

function showLists() {
  for (const name of ["waiting", "failures"])
    renderList($(`#${name}`), model[name], job => job.id, job => h("li", brief(job,
      name === "waiting" ? job.queue : clock("ago", job.updated_at), reasonLine(job))));
}

function workerBlock({ name, host, pid, queues, slots, busy, more, overdue, jobs }) {
  const squares = Array.from({ length: Math.min(slots, 64) }, (_, n) =>
    h("i", { class: n < busy && "busy" }));
  return h("div.worker",
    h("h3",
      h("span.cut", { title: `${host}, process ${pid}` }, name,
        h("span.quiet.small", queues.length ? `, only ${queues.join(", ")}` : "")),
      h("span.slots", { "aria-hidden": "true" }, squares),
      h("span.quiet.small", `${busy} of ${slots} busy`)),
    overdue && h("p.reason.bad", "no heartbeat for ", clock("elapsed", overdue)),
    jobs.map(job => brief(job, clock("elapsed", job.started_at))),
    more > 0 && h("p.reason", link(boardPath({ state: "processing" }),
                                   `and ${count(more)} more`)));
}

function showWorkers() {
  if (!model.status) return;
  const blocks = model.status.workers.map(({ heartbeat_at, running, ...worker }) => ({
    ...worker, more: running.length - SLOTS,
    overdue: since(heartbeat_at) > OVERDUE && heartbeat_at,
    jobs: model.running.filter(job => job.worker === worker.name).slice(0, SLOTS) }));
  renderList($("#workers"), blocks, one => one.name, workerBlock);
  const slots = sum(blocks, "slots");
  setText($("#slots"), slots ? many(slots, "slot") : "");
}

function showQueues() {
  const rows = model.queues.map(queue => (
    { ...queue, waiting: queue.jobs.pending + queue.jobs.failed }));
  renderList($("#queues tbody"), rows, one => one.name, queue => {
    const { name, paused, limit } = queue, verb = paused ? "Resume" : "Pause";
    return h("tr",
      h("td", link(boardPath({ queue: name }), name),
        paused && h("div.small.warn", "paused")),
      h("td.number", count(queue.jobs.processing),
        limit > 0 && h("span.quiet", ` of ${count(limit)}`)),
      h("td.number", count(queue.waiting)),
      mayChange() && h("td.number", button(
        verb, () => pause(name, paused), "plain", `${verb} queue ${name}`)));
  });
  $("#queues").hidden = !rows.length;
  setText($("#pause-all"), isAllPaused() ? "Resume all" : "Pause all");
  const names = rows.map(one => one.name);
  $("#queue-names").replaceChildren(...names.map(name => h("option", { value: name })));
  options($("#filters [name=queue]"), "All queues", names, filter.queue);
}

function options(select, all, names, chosen) {
  const wanted = ["", ...new Set(chosen ? [...names, chosen] : names)];
  if (JSON.stringify(wanted) !== JSON.stringify([...select.options].map(o => o.value)))
    select.replaceChildren(...wanted.map(name =>
      h("option", { value: name }, name || all)));
  select.value = chosen;
}

function showSchedules() {
  renderList($("#schedules"), model.schedules, one => one.name, one =>
    h("li.item",
      h("div", h("span.cut", one.name),
        h("span.small.quiet.number", one.paused ? h("span.warn", "paused")
          : one.next_run ? clock("due", one.next_run) : "never")),
      h("p.small.quiet.cut", { title: one.command },
        h("code", one.cron), " \u00b7 ", h("code", one.command))));
}

// ---- 9 The table of jobs. ----

function took(job) {
  if (job.state === "processing") return clock("elapsed", job.started_at);
  if (!job.started_at || !job.finished_at || job.state === "pending") return "";
  return span((Date.parse(job.finished_at) - Date.parse(job.started_at)) / 1000);
}

function jobRow(job) {
  const cell = (name, ...children) =>
    h("td", { role: "cell", class: `c-${name}` }, children);
  const [verb, act] = may(job, "cancel") ? ["Cancel", cancelJob] : ["Retry", retryJob];
  return h("tr", { role: "row" },
    cell("state", stateWord(job.state)),
    cell("id", h("div.cut", jobLink(job.id))),
    cell("command",
      h("div.line", h("code.cut", { title: job.command }, job.command),
        job.tags.slice(0, 2).map(tag => link(
          boardPath({ ...filter, tag }), tag, "tag small quiet"))),
      reasonLine(job)),
    cell("queue", h("div.cut.quiet", job.queue)),
    cell("tries number", h("span.quiet", job.attempts ?
      `${job.attempts}/${Math.max(1, job.max_retries)}` : "")),
    cell("took number", took(job)),
    cell("age number", h("span.quiet", clock("ago", job.updated_at))),
    mayChange() && cell("act number",
      button(verb, () => act(job), "plain", `${verb} ${job.id}`)));
}

function showJobs() {
  if (shown) return;
  renderList($("#jobs tbody"), model.jobs, job => job.id, jobRow);
  showPager();
  const isEmpty = model.status?.jobs.total === 0 && !model.jobs.length;
  $("#begin").hidden = !isEmpty;
  $("#filters").hidden = $("#jobs table").hidden = isEmpty;
  $("#no-match").hidden = isEmpty || model.jobs.length > 0 || !model.status;
}

function showPager() {
  const page = cursors.length, first = (page - 1) * PAGE + 1;
  const { jobs = {} } = model.status || {}, isNarrow = selectors().length > 0;
  const all = isNarrow ? undefined : jobs[filter.state || "total"];
  setText($("#pager span"), !model.jobs.length ? "" :
    `${count(first)} to ${count(first + model.jobs.length - 1)}` +
    (all === undefined ? "" : ` of ${count(all)}`));
  $("#newer").disabled = page === 1;
  $("#older").disabled = !model.next;
  $("#pager").hidden = page === 1 && !model.next && !model.jobs.length;
  $("#retry-all").hidden = !(mayChange() && jobs.dead && filter.state === "dead");
  setText($("#retry-all"), isNarrow ? "Retry all that fit"
                                    : `Retry all ${count(jobs.dead || 0)} dead`);
}

function goToPage(isOlder) {
  if (isOlder) cursors.push(model.next); else cursors.pop();
  $("#jobs-title").focus();
  $("#jobs-title").scrollIntoView({ block: "start" });
  refresh.jobs(true);
}

const selectors = () => Object.entries(filter).filter(([name, value]) =>
  value && name !== "state");
const filterOf = valueOf => Object.fromEntries(Object.keys(NO_FILTER).map(name =>
  [name, valueOf(name) || ""]));

function filterFromForm() {
  applyFilter(filterOf(name => $("#filters").elements[name].value.trim()));
  history.replaceState(null, "", boardPath(filter));
}

function applyFilter(chosen) {
  if (JSON.stringify(chosen) !== JSON.stringify(filter)) cursors = [""];
  filter = chosen;
  const { elements } = $("#filters");
  options(elements.state, "All states", states(), filter.state);
  options(elements.queue, "All queues", model.queues.map(one => one.name),
          filter.queue);
  for (const name of ["tag", "search"])
    if (elements[name] !== document.activeElement) elements[name].value = filter[name];
  $("#clear").hidden = !Object.values(filter).some(Boolean);
  showCounts(); refresh.jobs(true);
}

// ---- 10 A job's page. ----

const chosenRun = () => shown.job.runs.find(run => run.number === shown.run) ||
  shown.job.runs.at(-1) || null;

async function readJob() {
  const page = shown;
  const job = await get(jobUrl(page.id)).catch(error => {
    if (error.status !== 404) throw error;
    return null;
  });
  if (page !== shown) return;
  page.job = job;
  for (const node of $$("#job .found")) node.hidden = !job;
  $("#no-job").hidden = Boolean(job);
  if (job) { showJob(); readOutput(); }
  showTitle();
}

function showJob() {
  const { job } = shown;
  renderOnce($("#job-state"), job.state, () => [stateWord(job.state)]);
  const verbs = [["retry", job.state === "pending" ? "Run now" : "Retry", retryJob],
                 ["cancel", "Cancel job", cancelJob],
                 ["delete", "Delete", deleteJob, "danger"]];
  renderOnce($("#job .actions"), job.state, () => verbs
    .filter(([verb]) => may(job, verb))
    .map(([, word, work, kind]) => button(word, () => work(shown.job), kind)));
  setText($("#job .command"), job.command);
  const why = [["What went wrong", job.state === "completed" ? [] : [job.error]],
               ["Why it waits", job.waiting_for.map(reason =>
                 reason.replaceAll("`", ""))]].filter(([, lines]) => lines[0]);
  const box = $("#job-why");
  box.classList.toggle("bad", job.state in TONES);
  renderOnce(box, why, () => why.map(([title, lines]) =>
    h("div", h("h2.small.quiet", title), lines.map(line => h("p", line)))));
  box.hidden = !why.length;
  const details = Object.entries(job).filter(([key, value]) =>
    !ELSEWHERE.includes(key) && !EMPTY.includes(JSON.stringify(value)));
  renderOnce($("#job .fields"), details, () => details.flatMap(([key, value]) => [
    h("dt", words(key)), h("dd", DETAILS[key] ? DETAILS[key](value, job)
                                 : key.endsWith("_at") ? fullTime(value) : value)]));
  const chosen = chosenRun();
  renderList($("#runs tbody"), job.runs.map(({ output, ...run }) => (
    { ...run, id: job.id, isChosen: run.number === chosen.number })).reverse(),
    run => run.number, runRow);
  $("#runs").hidden = !chosen;
}

const ELSEWHERE = ["id", "command", "state", "error", "runs", "waiting_for"];
const EMPTY = ["null", "false", '""', "[]", "{}"];
const words = key => key.replaceAll("_", " ");
const duration = seconds => seconds === 0 ? "never" : span(seconds);
const linksTo = path => all => all.map(one => [link(path(one), one, "tag"), " "]);
const DETAILS = {       // others: as they are, and a moment as a time
  attempts: (n, job) => `${n} of ${Math.max(1, job.max_retries)}` +
    (job.state === "processing" ? `, run ${job.runs.length} is running` : ""),
  queue: queue => link(boardPath({ queue }), queue, "tag"),
  cwd: path => h("code", path),
  tags: linksTo(tag => boardPath({ tag })),
  after: linksTo(jobPath), after_any: linksTo(jobPath),
  timeout: duration, backoff_base: duration, backoff_max: duration,
  env: variables => h("code", Object.entries(variables).map(pair =>
    pair.join("=")).join(" ")),
};

const OUTCOMES = { completed: "completed", lost: "dead", cancelled: "cancelled",
                   released: "pending" };   // others: failed

function runRow(run) {
  const state = run.outcome ? OUTCOMES[run.outcome] || "failed" : "processing";
  const cell = (kind, ...children) => h("td", { class: kind }, children);
  return h("tr", { "aria-current": run.isChosen && "true" },
    cell("", h("a.tag", { href: `${jobPath(run.id)}?run=${run.number}`,
                          "aria-label": `Output of run ${run.number}` }, run.number)),
    cell("", stateWord(state, run.outcome || "running"),
         run.error && h("div.reason", run.error)),
    cell("number", run.exit_code),
    cell("number", run.outcome ? figure(run.duration)
                               : clock("elapsed", run.started_at)),
    cell("number quiet", clock("ago", run.started_at)),
    cell("quiet wide", run.worker, run.gpus && `, GPU ${run.gpus}`));
}

// ---- 11 A run's output, followed while it runs. ----

let follow = null;      // the run whose output is shown; see readOutput

function unfollow() {
  clearTimeout(follow?.timer);
  follow = null;
}

function readOutput() {
  const run = chosenRun();
  if (!run) return showOutput("", "");
  if (!follow || follow.id !== shown.id || follow.number !== run.number) {
    unfollow();
    follow = { id: shown.id, number: run.number, offset: 0, text: "", isAtEnd: true,
               decoder: new TextDecoder(), isOver: false, isBusy: false };
    setText($("#output"), "");
  } else if (follow.isOver) return;
  follow.willEnd = Boolean(run.finished_at || run.outcome);
  more(follow);
}

async function more(mine) {
  if (mine.isBusy || mine !== follow || mine.isOver) return;
  clearTimeout(mine.timer);
  mine.isBusy = true;
  const isLast = mine.willEnd;
  try {
    const reply = await ask("GET", jobUrl(mine.id,
      `/output?run=${mine.number}&offset=${mine.offset}`));
    const bytes = await reply.arrayBuffer();
    mine.offset = Number(reply.headers.get("X-Total-Bytes")) ||
      mine.offset + bytes.byteLength;
    mine.text = (mine.text + mine.decoder.decode(bytes, { stream: true })).slice(-KEPT);
    mine.isOver = isLast;
  } catch (error) { if (!(error instanceof Refused)) throw error; }
  finally { mine.isBusy = false; }
  if (mine !== follow) return;
  showOutput(mine.text, `run ${mine.number}${mine.isOver ? "" : ", following"}`);
  if (!mine.isOver) mine.timer = setTimeout(() => more(mine), mine.willEnd ? 0 : 700);
}

// As a terminal would leave it: no colours, and of an overwritten line the last words.
function readable(text) {
  return text.replace(/\x1b\[[0-9;?]*[ -\/]*[@-~]/g, "").replace(/\r\n/g, "\n")
    .replace(/[^\n]*\r(?=[^\n])/g, "");
}

function showOutput(text, note) {
  const box = $("#output");
  setText($("#output-note"), note);
  setText(box, readable(text) || (!follow ? "Nothing to show before the first run." :
    !text && follow.isOver ? "It printed nothing." : "Nothing printed yet."));
  box.classList.toggle("quiet", !text);
  if (follow && follow.isAtEnd) box.scrollTop = box.scrollHeight;
  $("#to-end").hidden = !follow || follow.isAtEnd;
}

function noteScroll({ target: box }) {
  if (follow)
    follow.isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 24;
  $("#to-end").hidden = !follow || follow.isAtEnd;
}

function toEnd() {
  $("#output").scrollTop = $("#output").scrollHeight;
  $("#output").focus();
}

// ---- 12 Actions: each has an answer, a wide or final one a question first. ----

function toast(place, kind, ...parts) {
  const node = h("div", { class: `toast ${kind}` }, h("span", parts),
    button("Dismiss", () => node.remove(), "plain"));
  place.append(node);
  while (place.children.length > 3) place.firstChild.remove();
  return node;
}

function answer(...parts) {
  const node = toast($("#answers"), "", ...parts);
  setTimeout(() => node.contains(document.activeElement) || node.remove(), 6000);
}

function confirmed(title, text, verb, isDanger = true) {
  const dialog = $("#question"), yes = $("#question-yes");
  for (const [part, words] of Object.entries({ title, text, yes: verb }))
    setText($(`#question-${part}`), words);
  yes.className = isDanger ? "danger" : "primary";
  dialog.returnValue = "no";
  dialog.showModal();
  return new Promise(done => dialog.addEventListener("close", () =>
    done(dialog.returnValue === "yes"), { once: true }));
}

// Ask for a change, after a question if there is one.
async function act(method, path, body, say, question, complain = error =>
    model.link === "out" || toast($("#errors"), "bad", `Not done: ${error.message}`)) {
  if (question && !await confirmed(...question)) return;
  try { answer(...say(await (await ask(method, path, body)).json())); }
  catch (error) {
    if (!(error instanceof Refused)) throw error;
    complain(error);
  } finally { refreshAll(true); }
}

const retryJob = job => act("POST", jobUrl(job.id, "/retry"), {},
  () => [jobLink(job.id), " is queued again."], job.state === "completed" && [
    `Run ${job.id} again?`, "It was completed. It runs a second time from the start.",
    "Run again", false]);

function cancelJob(job) {
  const runs = job.state === "processing";
  return act("POST", jobUrl(job.id, "/cancel"), {},
    () => [jobLink(job.id), runs ? " is being ended." : " is cancelled."], runs && [
      `End ${job.id}?`, "Its command is running. It is sent SIGTERM, and SIGKILL if " +
      "it does not go.", "End and cancel"]);
}

async function deleteJob({ id }) {
  if (!await confirmed(`Delete ${id}?`, "The job, its runs and its output are " +
                       "removed for good.", "Delete")) return;
  location.hash = boardPath(filter);      // first: the job is not found once deleted
  act("DELETE", jobUrl(id), null, () => [`${id} is deleted.`]);
}

function retryAll() {
  const which = selectors().length ? "all dead jobs that fit the filter"
    : many(model.status.jobs.dead, "dead job");
  return act("POST", "/api/dlq/retry", Object.fromEntries(selectors()),
    jobs => [`${many(jobs.length, "job is", "jobs are")} queued again.`], [
      `Retry ${which}?`, "They run again at once, with their attempts at 0.",
      "Retry them", false]);
}

const isAllPaused = () => Boolean(model.status?.paused.includes("*"));

function pause(queue, isPaused) {       // null: all queues
  const verb = isPaused ? "resume" : "pause";
  return act("POST", `/api/${verb}`, { queue }, () =>
    [`${queue ? `Queue ${queue} is` : "All queues are"} ${verb}d.`],
    !queue && !isPaused && ["Pause all queues?", "No job starts until they are " +
      "resumed. Running jobs continue.", "Pause all", false]);
}

// ---- 13 The form for a new job, from the fields that the server names. ----

const USUAL = ["command", "queue", "tags", "priority", "delay"];    // others: "More"
const listOf = text => text.split(/[\s,]+/).filter(Boolean);
const envOf = text => Object.fromEntries(text.split("\n").filter(line => line.trim())
  .map(line => /^\s*(.*?)\s*(?:=(.*))?$/.exec(line))
  .map(([, key, value = ""]) => [key, value]));
const INPUTS = {    // by the type of the value: hint, from text to value, attributes
  integer: ["", Number, { type: "number" }],
  boolean: ["", () => true, { type: "checkbox" }],
  array: ["; several with spaces between", listOf],
  object: ["; NAME=VALUE, one a line", envOf, { rows: 2 }],
  command: ["", text => text, { rows: 3, required: true }],
  text: ["", text => text.trim()],
};
const inputOf = ({ name, schema }) =>
  INPUTS[name] || INPUTS[[schema.type].flat()[0]] || INPUTS.text;

function buildForm(fields) {
  const build = field => {
    const { name, help } = field, [hint, , more = {}] = inputOf(field);
    return h("div.field", h("label", { for: `f-${name}` }, words(name)),
      h(more.rows ? "textarea.mono" : "input", {
        id: `f-${name}`, name, autocomplete: "off", "aria-describedby": `h-${name}`,
        spellcheck: more.rows && "false", list: name === "queue" && "queue-names",
        ...more }),
      h("span.small.quiet", { id: `h-${name}` }, help.split(";")[0] + hint));
  };
  const isUsual = one => USUAL.includes(one.name);
  $("#enqueue h2").after(
    h("div.row", fields.filter(isUsual).map(build)),
    h("details", h("summary", "More"),
      h("div.row", fields.filter(one => !isUsual(one)).map(build))));
  model.fields = fields;
}

// The words in the dialog, and the field that they are about.
function showFormError(dialog, { message, key }) {
  setText($("[role=alert]", dialog), message);
  for (const field of $$("[name]", dialog)) {
    field.removeAttribute("aria-invalid");
    if (field.name !== key) continue;
    field.setAttribute("aria-invalid", "true");
    if (field.closest("details")) field.closest("details").open = true;
    field.focus();
  }
}

async function submitJob(event) {
  event.preventDefault();
  const dialog = $("#enqueue"), form = event.target, submit = $("[type=submit]", form);
  if (!form.elements.command.value.trim())
    return showFormError(dialog, { message: "There is no command.", key: "command" });
  const job = Object.fromEntries(model.fields
    .map(field => [field, form.elements[field.name]])
    .filter(([, one]) => one.type === "checkbox" ? one.checked : one.value.trim())
    .map(([field, one]) => [field.name, inputOf(field)[1](one.value)]));
  submit.disabled = true;
  await act("POST", "/api/jobs", job, ({ id }) => {
    dialog.close();
    form.reset();
    return [jobLink(id), " is enqueued."];
  }, null, error => showFormError(dialog, error));
  submit.disabled = false;
}

// ---- 14 Routes, keys, start. ----

function route(event) {
  if (model.link === "out" || model.role === null) return;
  const [path, query = ""] = location.hash.slice(1).split("?");
  const wanted = new URLSearchParams(query), left = shown && shown.id;
  const id = !path.startsWith("/jobs/") ? null    // decodeURIComponent may throw
    : new URLSearchParams(`id=${path.slice(6)}`).get("id");
  const run = Number(wanted.get("run")) || null;
  if (id !== left) unfollow();
  if (id === null) {
    shown = null;
    applyFilter(filterOf(name => wanted.get(name)));
  } else if (id !== left) {
    shown = { id, run, job: null };
    setText($("#job h1"), id);
    for (const node of $$("#job .found, #no-job")) node.hidden = true;
    $("#back").href = boardPath(filter);
  } else shown.run = run;
  $("#logged-out").hidden = true;
  $("#board").hidden = Boolean(shown);
  $("#job").hidden = !shown;
  if (event && id !== left && shown) {
    $("#job h1").focus();
    window.scrollTo(0, 0);
  } else if (event && id !== left) {
    const links = [...$$("#jobs .c-id a"), ...$$("#board .brief > a")];
    (links.find(link => link.hash === jobPath(left)) || $("#health h1")).focus();
  }
  showTitle(); refreshAll(true);
}

function onKey(event) {
  const isTyping = event.target.closest("input, textarea, select, dialog");
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || isTyping ||
      model.link === "out") return;
  event.preventDefault();
  if (shown) location.hash = boardPath(filter);
  setTimeout(() => $("#filters [name=search]").focus());
}

const on = (kind, works) => Object.entries(works).forEach(([selector, work]) =>
  $(selector).addEventListener(kind, work));
let typing = null;
on("click", {
  "#reconnect": reconnect, "#pause-all": () => pause(null, isAllPaused()),
  "#retry-all": retryAll, "#newer": () => goToPage(false), "#to-end": toEnd,
  "#older": () => goToPage(true), "[data-close]": () => $("#enqueue").close(),
  "#enqueue-open": () => {
    showFormError($("#enqueue"), { message: "" });
    $("#enqueue").showModal();
  },
  "#clear": () => {
    location.hash = boardPath({});
    $("#filters [name=search]").focus();
  } });
on("submit", { "#enqueue form": submitJob,
               "#filters": event => event.preventDefault() });
on("input", { "#filters": () => {
  clearTimeout(typing);
  typing = setTimeout(filterFromForm, 250);
} });
on("scroll", { "#output": noteScroll });
for (const dialog of $$("dialog"))
  dialog.addEventListener("close", () => setTimeout(rescueFocus));
addEventListener("hashchange", route);
addEventListener("keydown", onKey);
addEventListener("online", reconnect);
// A hidden page frees its connection: browsers allow six to a host.
document.addEventListener("visibilitychange", () =>
  document.hidden ? disconnect() : reconnect());
Object.keys(CHARTS).forEach(bindSlider);
setInterval(tick, 1000);
setInterval(() => {
  if (model.link !== "live" || document.hidden) return;
  refresh.history();
  // No error reports a dead connection.
  if (performance.now() > heardAt + PATIENCE) onDisconnect();
}, 15000);
reconnect();
</script>
</head>
<body>
<header class="top">
  <a class="brand" href="#/" aria-label="queuectl, all jobs">
    <svg viewBox="0 0 16 16" aria-hidden="true"><rect width="16" height="16" rx="3.5"
     fill="currentColor"/><path d="M4 5h8M4 8h8M4 11h4.5" stroke="var(--on-accent)"
     stroke-width="1.6" stroke-linecap="round"/></svg>queuectl</a>
  <span class="path mono cut" id="database"></span>
  <span class="state pending" id="live"><i class="mark"></i>
    <span>Connecting</span></span>
  <button type="button" id="enqueue-open" class="primary changes"
   hidden>Enqueue</button>
</header>
<div id="lost" class="notice bad" role="alert" hidden>
  <span></span><button type="button" id="reconnect">Try now</button></div>
<div id="read-only" class="notice" hidden>
  Read only: this login can see everything and change nothing.</div>
<main>
  <section id="logged-out" class="panel begin" hidden>
    <h1 tabindex="-1">You are not logged in</h1>
    <p>The login belongs to one start of <code>queuectl web</code>. Open the address
      that it printed in its terminal, or start it again:</p>
    <pre>queuectl web</pre>
  </section>

  <div id="board" hidden>
    <div id="health"><h1 class="state" tabindex="-1"><i class="mark"></i><span>Reading
      the queue</span></h1><p class="quiet"></p></div>
    <nav class="panel counts" id="counts" aria-label="Jobs by state"></nav>
    <div class="pair">
      <figure class="panel chart" id="rates">
        <header><h2>Jobs per minute</h2><div class="legend"></div></header>
        <div class="plot"><svg aria-hidden="true"></svg><input type="range" min="0"
          max="59" value="59" aria-label="Minute to read, jobs per minute"></div>
      </figure>
      <figure class="panel chart" id="times">
        <header><h2>Waiting and run time, p50 to p95</h2><div class="legend"></div>
          </header>
        <div class="plot"><svg aria-hidden="true"></svg><input type="range" min="0"
          max="59" value="59" aria-label="Minute to read, waiting and run time"></div>
      </figure>
    </div>
    <div class="pair">
      <section class="panel" aria-labelledby="waiting-title">
        <header><h2 id="waiting-title">Waiting</h2>
          <a class="small quiet" href="#/?state=pending">All that wait</a></header>
        <ul id="waiting"></ul><p class="none">Nothing waits.</p></section>
      <section class="panel" aria-labelledby="failures-title">
        <header><h2 id="failures-title">Failures</h2>
          <a class="small quiet" href="#/?state=dead">All dead</a></header>
        <ul id="failures"></ul><p class="none">Nothing has failed.</p></section>
    </div>
    <div class="stack side">
      <section class="panel" aria-labelledby="workers-title">
        <header><h2 id="workers-title">Workers</h2>
          <span class="quiet small" id="slots"></span></header>
        <div id="workers"></div><p class="none">No worker is running. Start one:<br>
          <code>queuectl worker start</code></p></section>
      <section class="panel" aria-labelledby="queues-title">
        <header><h2 id="queues-title">Queues</h2>
          <button type="button" class="plain changes" id="pause-all" hidden></button>
        </header>
        <table id="queues" hidden><thead><tr><th scope="col">Queue</th><th scope="col"
          class="number">Running</th><th scope="col" class="number">Waiting</th>
          <th scope="col" class="changes" hidden><span class="unseen">Action</span></th>
          </tr></thead><tbody></tbody></table>
        <p class="none">No queue has jobs yet.</p></section>
      <section class="panel" aria-labelledby="schedules-title">
        <header><h2 id="schedules-title">Schedules</h2></header>
        <ul id="schedules"></ul><p class="none">No recurring jobs.</p></section>
    </div>
    <section class="panel" id="jobs" aria-labelledby="jobs-title">
      <header><h2 id="jobs-title" tabindex="-1">Jobs</h2>
        <button type="button" class="changes" id="retry-all" hidden></button></header>
      <form class="filters" id="filters" role="search" aria-label="Jobs">
        <input type="search" name="search" aria-label="Search commands, ids and errors"
         placeholder="Search commands, ids and errors" autocomplete="off"
         maxlength="200">
        <select name="state" aria-label="State"></select>
        <select name="queue" aria-label="Queue"></select>
        <input name="tag" aria-label="Tag" placeholder="Tag" autocomplete="off"
         maxlength="128"><button type="button" id="clear">Clear</button>
      </form>
      <table role="table" aria-labelledby="jobs-title">
        <thead role="rowgroup"><tr role="row">
          <th role="columnheader" scope="col" class="c-state">State</th>
          <th role="columnheader" scope="col" class="c-id">Job</th>
          <th role="columnheader" scope="col" class="c-command">Command</th>
          <th role="columnheader" scope="col" class="c-queue">Queue</th>
          <th role="columnheader" scope="col" class="c-tries number">Tries</th>
          <th role="columnheader" scope="col" class="c-took number">Run time</th>
          <th role="columnheader" scope="col" class="c-age number">Changed</th>
          <th role="columnheader" scope="col" class="c-act number changes" hidden>
            Action</th></tr></thead>
        <tbody role="rowgroup"></tbody>
      </table>
      <p class="none" id="no-match" hidden>No job fits this filter.</p>
      <div class="begin" id="begin" hidden>
        <p>The queue is empty. To begin, in a terminal:</p>
        <ol><li>Enqueue a command<pre>queuectl enqueue 'echo Hello World'</pre></li>
          <li>Start a worker to run it<pre>queuectl worker start</pre></li></ol>
      </div>
      <nav class="pager" id="pager" aria-label="Pages of jobs">
        <span class="quiet small"></span>
        <button type="button" id="newer">Newer</button>
        <button type="button" id="older">Older</button></nav>
    </section>
  </div>

  <article id="job" hidden>
    <a class="quiet" id="back">&larr; All jobs</a>
    <div class="title"><h1 tabindex="-1"></h1><span class="found" id="job-state"></span>
      <div class="actions found"></div></div>
    <p id="no-job">There is no such job.</p>
    <div class="split found">
      <div class="stack">
        <pre class="command"></pre>
        <div class="panel why" id="job-why"></div>
        <section class="panel" aria-labelledby="runs-title">
          <header><h2 id="runs-title">Runs</h2></header>
          <table id="runs"><thead><tr><th scope="col">Run</th><th scope="col">Outcome
            </th><th scope="col" class="number">Exit</th><th scope="col" class="number">
            Took</th><th scope="col" class="number">Started</th><th scope="col"
            class="wide">Worker</th></tr></thead><tbody></tbody></table>
          <p class="none">It has not run yet.</p></section>
        <div class="panel">
          <header><h2 id="output-title">Output</h2>
            <span class="quiet small" id="output-note"></span>
            <button type="button" class="plain" id="to-end">Go to the end</button>
            </header>
          <pre class="output" id="output" tabindex="0" role="region"
           aria-labelledby="output-title"></pre></div>
      </div>
      <section class="panel" aria-labelledby="fields-title">
        <header><h2 id="fields-title">Details</h2></header>
        <dl class="fields"></dl></section>
    </div>
  </article>
</main>
<footer>
  <span id="version"></span>
  <a href="/metrics">Metrics</a><a href="/api/openapi.json">API</a>
</footer>

<dialog id="enqueue" aria-labelledby="enqueue-title">
  <form method="dialog" novalidate>
    <h2 id="enqueue-title">Enqueue a job</h2>
    <datalist id="queue-names"></datalist>
    <p class="bad" role="alert"></p>
    <div class="buttons"><button type="button" data-close>Close</button>
      <button type="submit" class="primary">Enqueue</button></div>
  </form>
</dialog>
<dialog id="question" aria-labelledby="question-title" aria-describedby="question-text">
  <form method="dialog">
    <h2 id="question-title"></h2>
    <p id="question-text"></p>
    <div class="buttons"><button type="submit" value="no">No, leave it</button>
      <button type="submit" value="yes" class="primary" id="question-yes"></button>
    </div>
  </form>
</dialog>
<div class="toasts"><div id="answers" role="status"></div>
  <div id="errors" role="alert"></div></div>
</body>
</html>
'''


# ---- 17 API ------------------------------------------------------------------
# The operations: from a queue and an admitted Request to a Reply, without sockets and
# tokens. `respond` (Access) converts a QueueError to a status and JSON. ROUTES lists
# and describes all operations.

MAX_BODY = 10 << 20         # bytes
MAX_HEAD = 32 << 10         # bytes of request line and headers
MAX_TARGET = 8 << 10        # bytes of path and query; at least 8000 (RFC 9110, 4.1)
MAX_BATCH = 10_000          # jobs in one request: about 5 MiB of reply
MAX_PAGE, USUAL_PAGE = 1000, 50     # jobs in one reply
MAX_MINUTES = 1440          # of history: a day
OUTPUT_PATIENCE = 0.25      # seconds to wait for a running job's newest output

FULL, READ = ROLES = ("full", "read")   # each has a token
JSON_TYPE, TEXT_TYPE = "application/json", "text/plain; charset=utf-8"
EVENTS_TYPE, PAGE_TYPE = "text/event-stream", "text/html; charset=utf-8"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Request(NamedTuple):
    """A request; `admit` (Access) fills in the last four fields."""
    method: str
    target: str                     # path and query, as sent
    headers: Mapping[str, str]      # names in lower case (RFC 9110, section 5.1)
    body: bytes = b""               # read after the request is admitted (I10)
    peer: str = ""                  # the client's address
    role: str = ""
    how: str = ""                   # "cookie", "bearer" or "no token", for the log
    params: Mapping[str, Any] = {}
    job_id: str = ""                # in the path


class Reply(NamedTuple):
    status: int
    body: bytes = b""
    kind: str = JSON_TYPE
    headers: tuple[tuple[str, str], ...] = ()
    log: str = ""                   # a line for the log, after a change
    follows: int | None = None      # stream the events after this one; -1: from now on


class Route(NamedTuple):
    method: str
    path: str                   # the segment ID matches a job's id
    summary: str
    reply: str                  # the name of its schema, or its media type
    answer: Callable[[Queue, Request], Any]     # a Reply, or a value to show as JSON
    params: tuple[Field, ...] = ()
    body: str = ""              # the name of its schema; "": none
    status: int = 200


def denied(status: int, message: str, hint: str = "",
           *headers: tuple[str, str]) -> Refused:
    error = Refused("refused", message, hint)
    error.status, error.headers = status, headers
    return error


def json_reply(value: Any, status: int) -> Reply:
    return Reply(status, dumps(value, None).encode())


def refusal_reply(error: QueueError) -> Reply:
    """Return {"error": "...", "hint": "...", "key": "timeout", "item": 1}."""
    fields = {"error": error.message, "hint": error.hint or None,
              "key": getattr(error, "key", None), "item": error.item}
    reply = json_reply({key: one for key, one in fields.items() if one is not None},
                       error.status)
    retry = (("Retry-After", "2"),) if error.status == 503 else ()
    return reply._replace(headers=error.headers or retry)


def _whole_param(name: str, least: int, most: int, help: str) -> Field:
    return Field(name, Kind(lambda text: parse_whole(text, least, most), {
        "type": "integer", "minimum": least, "maximum": most}), help=help)


def query_fields(query: str) -> list[tuple[str, str]]:
    """Return the decoded names and values of a query; Invalid."""
    import urllib.parse  # 4 ms, and only in a server
    try:
        # Strict: a byte that is not UTF-8 must not become U+FFFD in a search.
        return urllib.parse.parse_qsl(query, keep_blank_values=True, encoding="utf-8",
                                      errors="strict", max_num_fields=64)
    except ValueError:
        raise Invalid("the query cannot be read",
                      "use at most 64 fields, in UTF-8") from None


def read_params(params: Sequence[Field], query: str) -> dict[str, Any]:
    """Return the checked values of a query; empty text is ignored.

        state=dead&state=failed&queue=&limit=5
        -> {"state": ["dead", "failed"], "limit": 5}

    An unknown name is refused, since ignoring a mistyped filter would return too much;
    so is a repeated one, unless it is a list.
    """
    known = {param.name: param for param in params}
    values: dict[str, Any] = {}
    for name, text in query_fields(query):
        if name not in known:
            raise Invalid(f"unknown parameter {name!r}", "there are: "
                          + ", ".join(known) if known else "there is none here")
        kind = known[name].kind.input["type"]
        if not text and kind != "integer":
            continue
        value = field_value(known[name], text, time.time())
        if kind == "array":
            values.setdefault(name, []).extend(value)
        elif name in values:
            raise Invalid(f"{name} is given twice", "give it once")
        else:
            values[name] = value
    return values


def _bounded_int(digits: str) -> int:
    # int() takes quadratic time: 14 s for a million digits (CVE-2020-10735).
    if len(digits) > 40:
        raise ValueError("a number of more than 40 digits")
    return int(digits)


def parsed_json(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"), parse_int=_bounded_int)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def json_body(request: Request) -> Any:
    """Return the body as JSON, {} if there is none.

    Its type is required: a foreign page may send forms and plain text without a
    preflight (Fetch, "CORS-safelisted request-header"), but not JSON.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != JSON_TYPE and (kind or request.body):
        raise denied(415, f"the type of the body is {kind or 'missing'}",
                     f"send Content-Type: {JSON_TYPE}")
    try:
        return parsed_json(request.body or b"{}")
    except ValueError as error:
        raise Invalid(f"the body is not JSON ({error})") from None


def _object_body(request: Request, *keys: str) -> dict[str, Any]:
    """Return the body, an object with only these keys; Invalid names another key.

    Routes without a body call it too, to refuse forms and other types.
    """
    fields = json_body(request)
    if not isinstance(fields, dict):
        raise Invalid("the body is not an object", "send {} at least")
    for key in fields:
        if key not in keys:
            raise Invalid(f"unknown key {key!r}", "there are: " + ", ".join(keys)
                          if keys else "there is none here", str(key))
    return fields


def _filters_of(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: field_value(FILTERS[key], value, time.time())
            for key, value in fields.items() if value is not None}


def get_session(queue: Queue, request: Request) -> dict[str, Any]:
    return {"role": request.role, "version": __version__, "database": queue.path,
            "actions": {state: [verb for verb in ("retry", "cancel", "delete")
                                if state in STATES_FOR[verb]] for state in STATES},
            "fields": [{"name": one.name, "help": one.help, "schema": one.kind.input}
                       for one in FIELDS.values() if "e" in one.uses]}


def get_jobs(queue: Queue, request: Request) -> dict[str, Any]:
    # The cursor is a seq: with an offset, new jobs would shift the pages, and late
    # pages would cost more than the first.
    params = dict(request.params)
    limit, before = params.pop("limit", USUAL_PAGE), params.pop("after", None)
    jobs = queue.jobs(params.pop("state", ()), limit=limit + 1, before=before, **params)
    shown, hindrances = jobs[:limit], queue.hindrances(jobs[:limit])
    return {"jobs": [job_object(job) for job in shown],
            "next": str(jobs[limit - 1].seq) if len(jobs) > limit else None,
            "notes": {job.id: note_of(job, hindrances.get(job.id, ()))
                      for job in shown}}


def get_job(queue: Queue, request: Request) -> dict[str, Any]:
    job = queue.shown(request.job_id)
    return show_object(job, queue.runs(job.id), queue.waiting_for(job))


def get_output(queue: Queue, request: Request) -> Reply:
    number, offset = request.params.get("run"), request.params.get("offset", 0)
    try:
        # Has the worker of a running job store its newest output.
        run = queue.fresh_run(request.job_id, number, OUTPUT_PATIENCE)
    except NotFound as error:
        if number is not None or error.code != "no-such-run":
            raise
        # Not 404: a client may follow the output before the first run starts.
        return Reply(200, b"", TEXT_TYPE, (("X-Run", "0"), ("X-Total-Bytes", "0")))
    output = readable(run.output, run.output_bytes, offset)
    return Reply(200, output, TEXT_TYPE, (("X-Run", str(run.number)),
                                          ("X-Total-Bytes", str(run.output_bytes))))


def post_jobs(queue: Queue, request: Request) -> Any:
    # If the unique key is taken, the reply is the job that has it, also with 201.
    given = json_body(request)
    if isinstance(given, list):
        if len(given) > MAX_BATCH:
            raise Invalid(f"more than {MAX_BATCH} jobs", "send them in parts")
        return list(map(job_object, queue.enqueue_many(given)))
    try:
        return job_object(queue.enqueue_many([given])[0])
    except QueueError as error:
        error.item = None       # there is only one
        raise


def _change_job(request: Request, change: Callable[..., list[Job]],
                keys: Sequence[str] = ()) -> dict[str, Any]:
    return job_object(change(request.job_id, **_object_body(request, *keys))[0])


def post_dlq_retry(queue: Queue, request: Request) -> list[dict[str, Any]]:
    fields = _object_body(request, "ids", *SELECTORS)
    if "ids" in fields:
        if len(fields) > 1:
            raise Invalid("ids and a filter are both given", "give one", "ids")
        return list(map(job_object, queue.retry_dead(*_names(fields["ids"]))))
    jobs = list[Job]()
    # In small transactions: one for a million jobs would hold the write lock too long,
    # and its reply would fill memory. The client repeats the request for the rest.
    for batch in queue.sweep("retry", DEAD, **_filters_of(fields)):
        jobs += batch
        if len(jobs) >= MAX_BATCH:
            break
    return list(map(job_object, jobs))


def _change_pause(queue: Queue, request: Request,
                  change: Callable[..., Any]) -> dict[str, Any]:
    change(*_filters_of(_object_body(request, "queue")).values())
    return {"paused": queue.status().paused}


def get_health(queue: Queue, request: Request) -> dict[str, Any]:
    queue.last_event()      # proves that the database can be read
    return {"status": "ok"}


def get_events(queue: Queue, request: Request) -> Reply:
    # Sent by a browser that reconnects (HTML, "Server-sent events").
    last = request.headers.get("last-event-id", "")
    return Reply(200, b"", EVENTS_TYPE,
                 follows=int(last) if re.fullmatch("[0-9]{1,18}", last) else -1)


# The description of the API as OpenAPI 3.1. `make fuzz` checks that the API accepts
# what the schemas allow, and refuses what they forbid. Bodies forbid unknown keys;
# replies may gain keys.

def _body_schema(properties: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False,
            "properties": dict(properties), **more}


_SET = {"not": {"type": "null"}}
EDITABLE = tuple(name for name, field in FIELDS.items() if "u" in field.uses)
SCHEMAS: dict[str, dict[str, Any]] = {
    **{name: object_schema(keys) for name, keys in SHAPES.items()},
    "Error": {**object_schema({"error": _TEXT, "hint": _TEXT, "key": _TEXT,
                               "item": _AMOUNT}), "required": ["error"]},
    "Session": object_schema({"role": {"type": "string", "enum": list(ROLES)},
                              "version": _TEXT, "database": _TEXT,
                              "actions": object_schema(dict.fromkeys(
                                  STATES, array_schema(_TEXT))),
                              "fields": array_schema(object_schema({
                                  "name": _TEXT, "help": _TEXT, "schema": {}}))}),
    "History": object_schema({"minutes": array_schema(
        object_schema(SHAPES["Minute"]))}),
    "Page": object_schema({
        "jobs": array_schema(object_schema(SHAPES["Job"])), "next": _or_null(_TEXT),
        "notes": {"type": "object", "additionalProperties": _TEXT}}),
    "Paused": object_schema({"paused": array_schema(_TEXT)}),
    "Health": object_schema({"status": {"const": "ok"}}),
    "Description": {"type": "object"},
    # `required` alone would forbid {"delay": 5, "run_at": null}, which is accepted.
    "NewJob": _body_schema(
        {name: field.kind.input for name, field in FIELDS.items()},
        required=["command"], **{"not": {
            "required": ["delay", "run_at"],
            "properties": {"delay": _SET, "run_at": _SET}}}),
    "Changes": _body_schema(
        {name: {"allOf": [FIELDS[name].kind.input, _SET]} for name in EDITABLE},
        **{"not": {"required": ["delay", "run_at"]}}),
    "Nothing": {"type": "object", "additionalProperties": False},
    "WhichQueue": _body_schema({"queue": _or_null(NAME_SCHEMA)}),
    # {} fits only the second; ids with a filter fit neither.
    "WhichDead": {"oneOf": [
        _body_schema({"ids": {"type": ["array", "string"], "items": NAME_SCHEMA,
                              "pattern": f"^{_NAME}$"}}, required=["ids"]),
        _body_schema({key: {**_or_null(FILTERS[key].kind.input),    # "" only in queries
                            "minLength": int(key != "search")} for key in SELECTORS})]}}
PUBLIC = ("/healthz", "/metrics")       # need no token: they reveal no commands


def _schema_named(name: str) -> dict[str, Any]:
    """Return a reference to the schema of `Job`, `[Job]` or `Job|[Job]`."""
    if "|" in name:
        return {"oneOf": [_schema_named(one) for one in name.split("|")]}
    if name.startswith("["):
        return {"type": "array", "items": _schema_named(name[1:-1]),
                **({"maxItems": MAX_BATCH} if name == "[NewJob]" else {})}
    return {"$ref": f"#/components/schemas/{name}"}


def _media(name: str) -> dict[str, Any]:
    if "/" in name:
        return {"content": {name.partition(";")[0]: {"schema": _TEXT}}}
    return {"content": {JSON_TYPE: {"schema": _schema_named(name)}}}


def _operation(route: Route) -> dict[str, Any]:
    found: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", f"{route.method.lower()}{route.path}"),
        "summary": route.summary,
        "parameters": [{"name": param.name, "in": "query", "description": param.help,
                        "schema": param.kind.input} for param in route.params],
        "responses": {
            str(route.status): {"description": "Done.", **_media(route.reply)},
            "default": {"description": "Refused.", **_media("Error")}}}
    if "/ID" in route.path:
        found["parameters"].append({"name": "ID", "in": "path", "required": True,
                                    "schema": NAME_SCHEMA})
    if route.body:      # optional where {} is valid
        found["requestBody"] = {"required": route.body.startswith("NewJob"),
                                **_media(route.body)}
    # Empty: needs no token (OpenAPI 3.1, Operation Object).
    return {**found, "security": []} if route.path in PUBLIC else found


def description(routes: Iterable[Route]) -> dict[str, Any]:
    """Return the API as OpenAPI 3.1, without the cookie, which is for browsers."""
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = paths.setdefault(route.path.replace("/ID", "/{ID}"), {})
        path[route.method.lower()] = _operation(route)
    return {"openapi": "3.1.0", "info": {"title": "queuectl", "version": __version__},
            "paths": paths, "security": [{"token": []}],
            "components": {"schemas": SCHEMAS, "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer"}}}}


ROUTES: tuple[Route, ...] = (
    Route("GET", "/", "The dashboard.", PAGE_TYPE,
          lambda queue, _: Reply(200, PAGE.encode(), PAGE_TYPE)),
    Route("GET", "/api/session", "The client's role, and the queue.", "Session",
          get_session),
    Route("GET", "/api/status", "Counts, workers, next due job.", "Status",
          lambda queue, _: status_object(queue.status())),
    Route("GET", "/api/stats", "Throughput, success and times.", "Stats",
          lambda queue, request: stats_object(
              queue.stats(request.params.get("since")),
              queue.covered(request.params.get("since"))),
          (Field("since", Kind(parse_duration, {
              "type": "string", "pattern": f"^({SPAN_FORM})?$"}),
              help="only the last DUR; at most 8 days"),)),
    Route("GET", "/api/history", "Statistics by minute.", "History",
          lambda queue, request: {"minutes": [
              minute_object(minute) for minute in queue.history(
                  request.params.get("minutes", 60), request.params.get("queue"))]},
          (_whole_param("minutes", 1, MAX_MINUTES, "how many; default 60"),
           FILTERS["queue"])),
    Route("GET", "/api/workers", "The workers and their running jobs.", "[Worker]",
          lambda queue, _: [worker_object(one) for one in queue.workers()]),
    Route("GET", "/api/queues", "The queues, with pause, limit and counts.", "[Queue]",
          lambda queue, _: [queue_object(one) for one in queue.queues()]),
    Route("GET", "/api/schedules", "The recurring jobs.", "[Schedule]",
          lambda queue, _: [schedule_object(one, queue.last_job(one))
                            for one in queue.schedules()]),
    Route("GET", "/api/jobs", "A page of jobs, newest first.", "Page", get_jobs, (
        *FILTERS.values(),
        _whole_param("limit", 1, MAX_PAGE, f"jobs per page; default {USUAL_PAGE}"),
        Field("after", Kind(lambda text: parse_whole(text, 1, 10**12), {
            "type": "string", "pattern": "^([1-9][0-9]{0,11})?$"}),
            help="`next` of the previous page"))),
    Route("POST", "/api/jobs", "Add a job, or an array of them: all or none.",
          "Job|[Job]", post_jobs, body="NewJob|[NewJob]", status=201),
    Route("GET", "/api/jobs/ID", "A job with its runs.", "WholeJob", get_job),
    Route("GET", "/api/jobs/ID/output",
          "The output of a run so far; empty before the first run. X-Run is its number,"
          " X-Total-Bytes the offset at its end.", TEXT_TYPE, get_output, (
              _whole_param("run", 1, 10**9, "number of the run; default the last"),
              _whole_param("offset", 0, 10**12 - 1, "bytes to skip"))),
    Route("POST", "/api/jobs/ID/retry",
          "Run a job again now, with changes if the body has any.", "Job",
          lambda queue, request: _change_job(request, queue.retry, EDITABLE),
          body="Changes"),
    Route("POST", "/api/jobs/ID/cancel",
          "Cancel a job. A running one is terminated soon after the reply.", "Job",
          lambda queue, request: _change_job(request, queue.cancel), body="Nothing"),
    Route("DELETE", "/api/jobs/ID",
          "Delete a job that is not running, and its history.", "Job",
          lambda queue, request: _change_job(request, queue.delete)),
    Route("POST", "/api/dlq/retry", "Requeue dead jobs, by id or by filter.", "[Job]",
          post_dlq_retry, body="WhichDead"),
    Route("POST", "/api/pause", "Pause one queue or all; running jobs continue.",
          "Paused", lambda queue, request: _change_pause(queue, request, queue.pause),
          body="WhichQueue"),
    Route("POST", "/api/resume",
          "Resume one queue, or all that are not paused by name.", "Paused",
          lambda queue, request: _change_pause(queue, request, queue.resume),
          body="WhichQueue"),
    Route("GET", "/api/events", "A stream of state changes and of the status, with "
          "Last-Event-ID from that event on.", EVENTS_TYPE, get_events),
    Route("GET", "/healthz", "Whether the database responds.", "Health", get_health),
    Route("GET", "/metrics", "The metrics for Prometheus.", METRICS_TYPE,
          lambda queue, _: Reply(
              200, metrics_text(queue.scrape()).encode(), METRICS_TYPE)),
    Route("GET", "/api/openapi.json", "This description.", "Description",
          lambda queue, _: description(ROUTES)))


# ---- 18 Access ---------------------------------------------------------------
# From the bytes of a head to an admitted request, without the database, and before any
# body is read (I10). No state is kept between requests. Each check prevents an attack:
#
#     head            request smuggling: only a form that proxies read the same way
#     Host            DNS rebinding: a foreign page whose host name resolves to us
#     Origin,         CSRF: a foreign page that makes a browser send requests with our
#     Sec-Fetch-Site  cookie
#     token, cookie   other users of this machine, who also reach loopback
#     role            changes by read-only clients

class Site(NamedTuple):
    """What a server admits."""
    token: str                      # "": none is needed
    read_token: str = ""            # "": there is none
    hosts: frozenset[str] = frozenset()     # accepted names: lower case, without port
    is_wide: bool = False           # listens on all addresses: accepts any IP as Host
    is_secure: bool = False         # uses TLS
    is_read_only: bool = False
    cookie: str = "queuectl"        # its name; all ports of a host share cookies


# RFC 9112 without its leniency: no bare CR or LF, no NUL, no folded lines, no space
# before the colon. http.server and a proxy in front of it may read these differently.
_TOKEN = rb"[!#-'*+.^_`|~0-9A-Za-z-]+"
HEAD_FORM = (_TOKEN + rb" [!-~]+ HTTP/1\.[01]\r\n(?:" + _TOKEN
             + rb":[\t -~\x80-\xff]*\r\n)*\r\n")
_SINGLE = ("host", "content-length", "transfer-encoding", "authorization", "origin",
           "content-type")      # refused if repeated: a proxy may use the other one


class Reader:
    """The input of a connection. One time-out covers a whole head or body; in
    http.server each read has its own. Refused (408) when it expires.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = bytearray()

    def _read_until(self, is_enough: Callable[[], object], seconds: float) -> bool:
        """Fill the buffer until it is enough; return False at the end of the input."""
        import socket as sockets
        ends_at = time.monotonic() + seconds
        while not is_enough():
            try:
                left = ends_at - time.monotonic()
                if left <= 0:
                    raise sockets.timeout
                self._sock.settimeout(left)
                piece = self._sock.recv(READ_SIZE)
            except sockets.timeout:     # a TimeoutError since Python 3.10
                raise denied(408, "the request is too slow") from None
            if not piece:
                return False
            self._buffer += piece
        return True

    def wait(self, seconds: float) -> bool:
        """Return True if input arrives in that time."""
        with contextlib.suppress(Refused):
            return self._read_until(lambda: self._buffer, seconds)
        return False

    def head(self, seconds: float) -> bytes:
        """Read up to the empty line; ConnectionError, Refused."""
        form = re.compile(rb"\r?\n\r?\n")
        if not self._read_until(lambda: form.search(self._buffer)
                                or len(self._buffer) > MAX_HEAD, seconds):
            raise ConnectionError   # never act on half a head
        end = form.search(self._buffer)
        if end is None or end.end() > MAX_HEAD:
            raise denied(431, "the headers are too large")
        return self._take(end.end())

    def read(self, size: int, seconds: float) -> bytes:
        """Read that many bytes, fewer at the end of the input; Refused."""
        self._read_until(lambda: len(self._buffer) >= size, seconds)
        return self._take(size)

    def drain(self, seconds: float) -> None:
        with contextlib.suppress(Refused):
            self._read_until(self._buffer.clear, seconds)

    def _take(self, size: int) -> bytes:
        taken = bytes(self._buffer[:size])
        del self._buffer[:size]
        return taken


def headers_of(fields: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the headers by lower-case name; Invalid if ambiguous."""
    headers: dict[str, str] = {}
    for name, value in fields:
        name, value = name.lower(), value.strip(" \t")
        if name in headers and name in _SINGLE:
            raise Invalid(f"{name} is sent twice")
        comma = "; " if name == "cookie" else ", "      # RFC 9110, 5.3; RFC 9113, 8.2.3
        headers[name] = headers[name] + comma + value if name in headers else value
    return headers


def body_size(headers: Mapping[str, str]) -> int:
    """Return the length of the body in bytes; Refused if unknown or too large.

    Chunked bodies are refused: request smuggling needs two ways to give a length (RFC
    9112, section 11.2; section 6.3 allows 411).
    """
    if "transfer-encoding" in headers:
        raise denied(411, "the body comes in chunks", "send Content-Length")
    size = headers.get("content-length", "0")
    if not re.fullmatch("[0-9]{1,18}", size):   # int() takes +1 and 1_0, too
        raise Invalid("Content-Length is not a number")
    if int(size) > MAX_BODY:
        raise denied(413, f"the body is over {MAX_BODY} bytes", "send it in parts")
    return int(size)


def _check_host(site: Site, request: Request) -> None:
    # DNS cannot forge an IP address, so a server on all addresses accepts any of those.
    match = re.fullmatch(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+?)\.?(:[0-9]{1,5})?",
                         request.headers.get("host", ""))
    if match is None:       # 400: RFC 9112, section 3.2
        raise Invalid("the request names no Host")
    host = match[1].lower()
    is_address = host.startswith("[") or re.fullmatch(r"[0-9]+(\.[0-9]+){3}", host)
    if host not in site.hosts and not (site.is_wide and is_address):
        raise denied(403, f"this is not {host}",
                     "use the host that `queuectl web` printed, or give it --host")


def _check_origin(request: Request) -> None:
    # Only browsers send these headers. Both schemes are accepted, as a proxy may add
    # TLS. The origin of sandboxed frames and files is "null". `same-site` may be
    # another port of this host.
    scheme, _, place = request.headers.get("origin", "").partition("://")
    is_foreign = "origin" in request.headers and (
        scheme not in ("http", "https")
        or place.lower() != request.headers.get("host", "").lower())
    # A foreign page may link here: a GET changes nothing, and it cannot read the reply.
    is_change = request.method not in ("GET", "HEAD")
    if is_foreign or (is_change and request.headers.get(
            "sec-fetch-site", "same-origin") not in ("same-origin", "none")):
        raise denied(403, "another site's page has sent this")


def cookie_value(token: str) -> str:
    """Return a cookie that proves the token without revealing it: other servers on this
    host see it, since cookies ignore ports. A restart does not change it.
    """
    import hmac
    return hmac.new(token.encode(), b"queuectl cookie", "sha256").hexdigest()


def _role_of_token(site: Site, given: str, made: Callable[[str], str] = str) -> str:
    # Compared in constant time.
    import hmac
    found = ""
    for role, token in ((FULL, site.token), (READ, site.read_token)):
        # `compare_digest` accepts only ASCII text, but any bytes.
        if token and hmac.compare_digest(given.encode(), made(token).encode()):
            found = role
    return found


def role_of(site: Site, request: Request) -> tuple[str, str]:
    """Return the client's role ("": unauthenticated), and how it was proved."""
    if not site.token:
        return FULL, "no token"
    header = request.headers.get("authorization")
    if header is not None:
        scheme, _, token = header.partition(" ")
        return _role_of_token(
            site, token.strip() if scheme.lower() == "bearer" else ""), "bearer"
    # The first of a name is used: browsers send the one with the longest path first.
    cookies = dict(part.strip().partition("=")[::2] for part in reversed(
        request.headers.get("cookie", "").split(";")))
    return _role_of_token(site, cookies.get(site.cookie, ""), cookie_value), "cookie"


def _no_token() -> Refused:
    # RFC 9110, section 15.5.2, requires the challenge.
    return denied(401, "that needs a token", "open the URL that `queuectl web` "
                  "printed, or send Authorization: Bearer TOKEN",
                  ("WWW-Authenticate", 'Bearer realm="queuectl"'))


def find_route(method: str, path: str) -> Route:
    """Return the route; Refused with 404 or 405."""
    found = {route.method: route for route in ROUTES if re.fullmatch(
        re.escape(route.path).replace("/ID", "/[^/]+"), path)}
    if not found:
        raise denied(404, "there is nothing at that path",
                     "/api/openapi.json lists what there is")
    if "GET" in found:
        found["HEAD"] = found["GET"]
    if method not in found:
        allowed = ", ".join(found)
        raise denied(405, f"{method} is not for that path", f"use {allowed}",
                     ("Allow", allowed))
    return found[method]


def admit(site: Site, request: Request) -> tuple[Route, Request] | Reply:
    """Return the route and the completed request, or the reply to a login.

    Refused; NotFound for an invalid job id. The body is not needed (I10).
    """
    if len(request.target) > MAX_TARGET:
        raise denied(414, f"path and query are over {MAX_TARGET} bytes")
    # An absolute URL, as sent to proxies, would contain a second host to check.
    if not re.fullmatch("/[!-~]*", request.target) or "#" in request.target:
        raise Invalid("that is not a path", "it begins with / and is ASCII")
    path, _, query = request.target.partition("?")
    _check_host(site, request)
    _check_origin(request)
    # Not in the API, where a token in the query would stay in logs and histories.
    if path == "/" and request.method in ("GET", "HEAD"):
        token = dict(query_fields(query)).get("token")
        query = ""      # for the page's script
        if token is not None:
            if site.token and not _role_of_token(site, token):
                raise _no_token()
            cookie = f"{site.cookie}={cookie_value(token)}; Path=/; HttpOnly; " \
                "SameSite=Strict" + "; Secure" * site.is_secure
            # 303 keeps the token out of the browser's history.
            return Reply(303, headers=(("Location", "/"), ("Set-Cookie", cookie)))
    role, how = role_of(site, request)
    role = READ if role and site.is_read_only else role
    # Before the route, so that a 404 leaks nothing.
    if not role and path not in PUBLIC:
        raise _no_token()
    route = find_route(request.method, path)
    if route.method != "GET" and role != FULL:
        raise denied(403, "this token or server is read-only")
    params = read_params(route.params, query)
    job_id = ""
    if "/ID" in route.path:
        import urllib.parse
        job_id = urllib.parse.unquote(path.split("/")[3], errors="replace")     # once
        if not re.fullmatch(_NAME, job_id):
            raise no_such_job(job_id)
    return route, request._replace(role=role, how=how, params=params, job_id=job_id)


def respond(route: Route, queue: Queue, request: Request) -> Reply:
    """Return the reply to an admitted request, for a change with a line for the log.

        web: POST /api/jobs/job-1/cancel by bearer from 127.0.0.1: 200 job-1 cancelled

    Unauthenticated requests are not logged: they could fill the disk.
    """
    try:
        found = route.answer(queue, request)
        reply = found if isinstance(found, Reply) else json_reply(found, route.status)
    except QueueError as error:
        found, reply = error.message, refusal_reply(error)
    if route.method == "GET":
        return reply
    path = request.target.partition("?")[0]
    result = found      # an error, or jobs, a job, the paused queues
    if isinstance(found, list):
        result = counted(len(found), "job")
    elif isinstance(found, dict):
        result = " ".join(str(found[key]) for key in ("id", "state", "paused")
                          if key in found)
    return reply._replace(log=one_line(
        f"web: {route.method} {cut(path, 200)} by {request.how} from {request.peer}: "
        f"{reply.status} {cut(result, 200)}").rstrip())


@functools.lru_cache(maxsize=4)
def page_policy(page: str) -> str:
    """Return a CSP that allows only the page's style and script, by hash: job output
    could not run even if the page showed it as HTML.
    """
    import base64
    import hashlib
    style, script = ("'sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest(
        )).decode() + "'" for tag in ("style", "script")
        for text in re.findall(f"<{tag}[^>]*>(.*?)</{tag}>", page, re.S))
    return (f"default-src 'none'; style-src {style}; script-src {script}; "
            "connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'")


# Of every reply: no caching on disk, since replies contain commands; no sniffing of job
# output; no Referer, since the first URL contains the token; no use by foreign pages.
HEADERS = (
    ("Cache-Control", "no-store"), ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"), ("X-Frame-Options", "DENY"),
    ("Cross-Origin-Opener-Policy", "same-origin"),
    ("Cross-Origin-Resource-Policy", "same-origin"))


# ---- 19 Server ---------------------------------------------------------------
# Connections, event streams, TLS. The main thread accepts connections until a signal
# arrives; http.server's handler serves each in a thread of its own. Every wait for a
# client or the database has a limit, and no transaction is open during one for a client
# (I10).

MAX_CONNECTIONS = 100       # each has a thread
MAX_ANONYMOUS = 2           # unauthenticated requests answered concurrently
WEB_PATIENCE = 5.0          # seconds a change waits for the write lock
HEAD_SECONDS = 10           # for a whole head, and for TLS to begin
BODY_SECONDS = 60           # for a whole body
KEEP_SECONDS = 60           # that a connection may be idle between requests
SEND_SECONDS = 10           # for each READ_SIZE bytes of a reply
LINGER_SECONDS = 1          # for the client to read a refusal before the close
ACCEPT_PAUSE = 0.05         # seconds, when no descriptor is free
STOP_SECONDS = 1            # for unfinished replies when the server stops
KEEP_ALIVE = 15             # seconds between events; proxies cut idle connections
MAX_STREAMS = 32            # event streams that are open at once
SPARE_DATABASES = 4         # kept open for the next requests
FEED_TICK = 0.2             # seconds between two polls of a stream
STATUS_PAUSE = 0.5          # seconds between two status events
STATUS_EVERY = 5.0          # seconds; a worker's death changes nothing in the file
FEED_BATCH = 1000           # changes sent singly; more become one `resync`


def sse(event: str, value: Any, seq: int) -> bytes:
    """Return a server-sent event. Browsers return the last `id` when they reconnect."""
    return f"id: {seq}\nevent: {event}\ndata: {dumps(value, None)}\n\n".encode()


def event_stream(queue: Queue, last: int,
                 clock: Callable[[], float] = time.monotonic) -> Iterator[bytes]:
    """Yield at each poll the new server-sent events, or b"".

    They are the changes after event `last` (-1: only future ones), and the status when
    it differs, or as a sign of life. Nothing else may use `queue`: PRAGMA data_version
    shows only commits of other connections.
    """
    seen, shown_at, sent_at, is_stale = -1, -math.inf, -math.inf, False
    shown: dict[str, Any] = {}
    seq, unsent = queue.last_event(), b"retry: 2000\n\n"
    if last > seq:      # of another database, such as before a backup was restored
        unsent += sse("resync", {}, seq)
    elif last >= 0:
        seq = last
    while True:
        # Read before the events, so that the next poll finds what is committed between.
        changes = queue.store.changes()
        if changes != seen:
            seen, is_stale = changes, True
            events = queue.events_since(seq, FEED_BATCH + 1)
            if len(events) > FEED_BATCH:
                seq = queue.last_event()
                unsent += sse("resync", {}, seq)
            elif events:
                seq = events[-1].seq
                unsent += b"".join(sse("change", event_object(one), one.seq)
                                 for one in events)
        now = clock()
        if now >= shown_at + (STATUS_PAUSE if is_stale else STATUS_EVERY):
            status = status_object(queue.status())
            # Messages say how long, so they always differ.
            now_shown = {**status, "attention": [one["code"] for one
                                                 in status["attention"]]}
            if now_shown != shown or now >= sent_at + KEEP_ALIVE:
                unsent += sse("status", status, seq)
                sent_at = now
            shown, shown_at, is_stale = now_shown, now, False
        yield unsent
        unsent = b""


class Connections:
    """The open connections. Beyond MAX_CONNECTIONS, a new one replaces the one that has
    been idle longest. An authenticated request is busy until its reply is sent.

    Dropping a connection shuts its socket down, which interrupts its thread's read or
    write; the thread closes the socket.
    """
    DROPPED, STREAM, BUSY = -math.inf, 1e300, math.inf

    def __init__(self) -> None:
        self._lock = threading.Lock()       # held for moments
        self._since: dict[socket.socket, float] = {}    # idle since then, or a state

    def enter(self, sock: socket.socket) -> bool:
        """Add a connection; return False if none can be dropped for it."""
        with self._lock:
            live = [one for one, since in self._since.items() if since > self.DROPPED]
            if len(live) >= MAX_CONNECTIONS:
                longest = min(live, key=self._since.__getitem__)
                # Dropped connections keep their threads for a moment: limit those, too.
                if self._since[longest] >= self.STREAM \
                        or len(self._since) >= 3 * MAX_CONNECTIONS:
                    return False
                self._drop(longest)
            self._since[sock] = time.monotonic()
            return True

    def _drop(self, sock: socket.socket) -> None:
        import socket as sockets
        self._since[sock] = self.DROPPED
        # SSLSocket.shutdown() would turn TLS off while the thread reads or writes.
        with contextlib.suppress(OSError):
            sockets.socket.shutdown(sock, sockets.SHUT_RDWR)

    def mark(self, sock: socket.socket, state: float) -> None:
        """Set its state; ConnectionError if it was dropped, Refused over MAX_STREAMS.
        """
        with self._lock:
            if self._since[sock] == self.DROPPED:
                raise ConnectionError
            streams = list(self._since.values()).count(self.STREAM)
            if state == self.STREAM and streams >= MAX_STREAMS:
                raise denied(503, f"{MAX_STREAMS} event streams are open already",
                             "close one", ("Retry-After", "10"))
            self._since[sock] = state

    def leave(self, sock: socket.socket) -> None:
        with self._lock:
            self._since.pop(sock, None)

    def drop_all(self) -> bool:
        """Drop all idle connections and streams; return True if others are busy."""
        with self._lock:
            for sock, since in list(self._since.items()):
                if self.DROPPED < since < self.BUSY:
                    self._drop(sock)
            return self.BUSY in self._since.values()


class Service:
    """The state that all connections share."""

    def __init__(self, site: Site, path: str, log: Callable[[str], None]) -> None:
        self.site, self.path, self.log = site, path, log
        self.connections = Connections()
        self.anonymous = threading.Semaphore(MAX_ANONYMOUS)
        self._spare: list[Queue] = []       # open databases that no request uses

    @contextlib.contextmanager
    def database(self) -> Iterator[Queue]:
        """An open database for one request, as each waits for the write lock alone.

        A few stay open, since to open one takes as long as most requests do.
        """
        try:
            while not (queue := self._spare.pop()).store.db.is_in_place():
                queue.close()
        except IndexError:
            queue = Queue(self.path, create=False)
            queue.store.db.patience = WEB_PATIENCE
        try:
            yield queue
        finally:
            if len(self._spare) < SPARE_DATABASES:
                self._spare.append(queue)
            else:
                queue.close()

    def close(self) -> None:
        while self._spare:
            self._spare.pop().close()

    def log_bug(self) -> None:
        """Log the exception being handled, with its traceback."""
        import traceback
        self.log("web: internal error\n" + traceback.format_exc())


def _handler_class(service: Service, is_tls: bool) -> type:
    """Return the handler of connections. http.server parses heads that matched
    HEAD_FORM, and formats the heads of replies.
    """
    import http.server      # 40 ms, and only in a server

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = request_version = "HTTP/1.1"
        command = ""

        def setup(self) -> None:
            self.reader = Reader(self.request)
            if is_tls:      # not in the main thread, which it would block
                self.request.settimeout(HEAD_SECONDS)
                self.request.do_handshake()

        def finish(self) -> None:
            """Do nothing: replies are not buffered."""

        def handle(self) -> None:
            # QueueError: a stream's database failed; its client gets the error when it
            # reconnects.
            with contextlib.suppress(OSError, QueueError):
                while self.reader.wait(KEEP_SECONDS) and self.converse():
                    pass

        def converse(self) -> bool:
            """Serve one request; return True if another may follow."""
            self.command, self.is_last, self.is_unread = "", True, True
            try:
                reply = self.reply()
            except QueueError as refusal:
                reply = refusal_reply(refusal)
            except OSError:
                raise
            except Exception:   # a bug: the server runs on
                service.log_bug()
                reply = refusal_reply(denied(500, "internal error"))
            self.is_last = self.is_last or self.is_unread
            self.send_reply(reply)
            if reply.follows is not None:
                self.send_events(reply.follows)
            service.connections.mark(self.request, time.monotonic())
            if self.is_unread:
                # Closing a socket with unread input resets the connection, and the
                # client may lose the reply (RFC 9112, section 9.6).
                self.request.shutdown(1)    # SHUT_WR: the client may still send
                self.reader.drain(LINGER_SECONDS)
            return not self.is_last

        def reply(self) -> Reply:
            """Read a request, its body only if admitted; return the reply; QueueError.
            """
            head = self.reader.head(HEAD_SECONDS)
            if not re.fullmatch(HEAD_FORM, head):
                raise Invalid("that is not HTTP/1.1", "see RFC 9112")
            self.raw_requestline, _, fields = head.partition(b"\r\n")
            self.rfile = io.BytesIO(fields)
            self.parse_request()
            headers = headers_of(self.headers.items())
            is_old = self.request_version == "HTTP/1.0"     # old health checks
            if is_old:
                headers.setdefault("host", "localhost")
            size = body_size(headers)
            self.is_unread = size > 0
            self.is_last = is_old or \
                "close" in re.split("[ ,]+", headers.get("connection", "").lower())
            admitted = admit(service.site, Request(
                self.command, self.path, headers, b"", str(self.client_address[0])))
            if isinstance(admitted, Reply):
                return admitted
            route, request = admitted
            if request.role:
                service.connections.mark(self.request, Connections.BUSY)
            if size:
                if route.method == "GET":   # some need no token
                    raise denied(413, "that takes no body", "send none")
                if headers.get("expect", "").lower() == "100-continue" and not is_old:
                    self.request.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
                request = request._replace(body=self.reader.read(size, BODY_SECONDS))
                if len(request.body) < size:
                    raise Invalid("the body ends too soon")
                self.is_unread = False
            with contextlib.nullcontext() if request.role else service.anonymous:
                service.connections.mark(self.request, Connections.BUSY if request.role
                                         else time.monotonic())
                with service.database() as queue:
                    reply = respond(route, queue, request)
            if reply.log:
                service.log(reply.log)
            if self.command == "HEAD":
                return reply._replace(follows=None)
            if reply.follows is not None:
                service.connections.mark(self.request, Connections.STREAM)
                self.is_last = True
            return reply

        def handle_expect_100(self) -> bool:
            return True     # `reply` sends 100, after the checks

        def send_error(self, code: int, message: str | None = None,
                       explain: str | None = None) -> NoReturn:
            raise denied(code, message or "unreadable")

        def send_reply(self, reply: Reply) -> None:
            self.wfile = io.BytesIO()
            self.send_response_only(reply.status)
            for name, value in (
                    ("Date", self.date_time_string()), ("Content-Type", reply.kind),
                    ("Content-Security-Policy", page_policy(PAGE)),
                    *HEADERS, *reply.headers):
                self.send_header(name, value)
            if reply.follows is None:
                self.send_header("Content-Length", str(len(reply.body)))
            if self.is_last:
                self.send_header("Connection", "close")
            self.end_headers()
            head, body = self.wfile.getvalue(), reply.body
            whole = memoryview(head if self.command == "HEAD" else head + body)
            # In parts, since the time-out of `sendall` covers the whole call.
            self.request.settimeout(SEND_SECONDS)
            for at in range(0, len(whole), READ_SIZE):
                self.request.sendall(whole[at:at + READ_SIZE])

        def send_events(self, last: int) -> None:
            """Send new events until the client or the database goes away."""
            poller = select.poll()
            poller.register(self.request, getattr(select, "POLLRDHUP", select.POLLIN))
            with Queue(service.path, create=False) as queue:
                for piece in event_stream(queue, last):
                    self.request.sendall(piece)
                    # Without POLLRDHUP any input is taken for the client's end.
                    if poller.poll(1000 * FEED_TICK) \
                            or not queue.store.db.is_in_place():
                        return

    return Handler


# Sent by the main thread, which must not block.
BUSY_REPLY = (b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
              b"Retry-After: 5\r\nContent-Length: 33\r\nConnection: close\r\n\r\n"
              b'{"error": "too many connections"}')


def resolved(host: str, port: int) -> tuple[int, tuple[Any, ...]]:
    """Return the family and address to listen on, IPv4 if the name has both."""
    import socket as sockets
    try:
        found = sockets.getaddrinfo(host, port, type=sockets.SOCK_STREAM,
                                    flags=sockets.AI_PASSIVE)
    except (OSError, UnicodeError):
        raise Invalid(f"there is no host {host!r}",
                      "give --host an address of this machine") from None
    family, _, _, _, address = min(found, key=lambda one: one[0] != sockets.AF_INET)
    return int(family), address


def site_of(args: argparse.Namespace, address: str, environ: Mapping[str, str],
            names: Iterable[str]) -> Site:
    """Return the site for the arguments of `web`; `names` are this machine's. Whether
    it is local depends on `address`: even the name `localhost` may resolve to another.
    """
    import ipaddress    # 4 ms
    there = ipaddress.ip_address(address.partition("%")[0])
    if args.no_auth and not there.is_loopback:
        raise Usage(f"with --no-auth anybody who reaches {args.host} could run "
                    "commands", "omit --no-auth or --host")
    tokens = []
    for name in "QUEUECTL_TOKEN", "QUEUECTL_READ_TOKEN":
        tokens.append(environ.get(name, ""))
        if not re.fullmatch("[!-~]*", tokens[-1]):  # else no header can carry it
            raise Invalid(f"{name} has spaces or non-ASCII characters",
                          "use letters and digits")
    token, read_token = tokens
    if token and token == read_token:
        raise Invalid("QUEUECTL_TOKEN and QUEUECTL_READ_TOKEN are the same",
                      "set different tokens, or only one")
    hosts = ["localhost", "127.0.0.1", "[::1]",
             f"[{args.host}]" if ":" in args.host else args.host]
    if there.is_unspecified:
        hosts += [part for name in names for part in (name, name.partition(".")[0])]
    return Site(
        "" if args.no_auth else token or os.urandom(24).hex(),
        "" if args.no_auth else read_token,
        frozenset(name.lower() for name in hosts if name), there.is_unspecified,
        args.tls_cert is not None, args.read_only,
        f"queuectl_{args.port or os.urandom(4).hex()}")


def tls_context(args: argparse.Namespace) -> ssl.SSLContext | None:
    if args.tls_cert is None:
        if args.tls_key is not None:
            raise Usage("--tls-key is given without --tls-cert", "give both")
        return None
    import ssl  # 9 ms, and only with a certificate
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        # Without a password callback OpenSSL would ask at the terminal.
        context.load_cert_chain(args.tls_cert, args.tls_key, lambda: "")
    except (OSError, ValueError) as error:  # ValueError: it needs a password
        raise Refused("unreadable",
                      f"cannot use the certificate {args.tls_cert} ({error})",
                      "give PEM files, the key without a password") from None
    return context


def listen(service: Service, args: argparse.Namespace, family: int,
           address: tuple[Any, ...]) -> Any:
    """Return the server of `web`, which listens; Conflict, Refused."""
    tls = tls_context(args)
    import socketserver

    # HTTPServer would look up our host name, which may take seconds.
    class Listener(socketserver.ThreadingMixIn, socketserver.TCPServer):
        address_family = family
        allow_reuse_address = True      # else TIME_WAIT delays a restart
        daemon_threads, block_on_close = True, False
        request_queue_size = 128

        def get_request(self) -> Any:
            try:
                sock, client = self.socket.accept()
            except OSError:     # no descriptor is free
                time.sleep(ACCEPT_PAUSE)
                raise
            return (sock if tls is None else tls.wrap_socket(
                sock, server_side=True, do_handshake_on_connect=False)), client

        def verify_request(self, request: Any, client_address: Any) -> bool:
            return service.connections.enter(request) or self.refuse(request)

        def process_request(self, request: Any, client_address: Any) -> None:
            try:
                super().process_request(request, client_address)
            except RuntimeError:    # no thread can be started
                self.refuse(request)
                self.shutdown_request(request)

        def refuse(self, request: Any) -> bool:
            if tls is None:
                with contextlib.suppress(OSError):
                    request.setblocking(False)
                    request.send(BUSY_REPLY)
            return False

        def shutdown_request(self, request: Any) -> None:
            service.connections.leave(request)
            super().shutdown_request(request)

        def handle_error(self, request: Any, client_address: Any) -> None:
            # OSError: the client disconnected, or TLS failed.
            if not isinstance(sys.exc_info()[1], OSError):
                service.log_bug()

    try:
        return Listener(address, _handler_class(service, tls is not None))
    except OSError as error:
        place = f"port {args.port} of {args.host}"
        if error.errno == errno.EADDRINUSE:
            raise Conflict("in-use", f"{place} is in use",
                           "give another --port, or stop that server") from None
        raise Refused("unsupported", f"cannot listen on {place} ({error.strerror})",
                      "give another --host or --port") from None


def serve(listener: Any, service: Service, announce: Callable[[], None]) -> None:
    """Serve until a signal arrives; only in the main thread.

    It waits without a time-out, so an idle server uses no CPU.
    """
    listener.socket.setblocking(False)  # a client may disconnect before `accept`
    wakeup = Wakeup()
    with contextlib.closing(wakeup), handling(
            dict.fromkeys(stop_signals(), lambda *_: None), wakeup.writer):
        try:
            announce()
            awaited = (wakeup.reader, listener)
            while wakeup.reader not in select.select(awaited, (), ())[0]:
                listener.handle_request()
        finally:
            listener.server_close()
            end = time.monotonic() + STOP_SECONDS
            while service.connections.drop_all() and time.monotonic() < end:
                time.sleep(0.01)
            service.close()


def printed_url(site: Site, host: str, port: int) -> str:
    """Return the URL that logs in; for a wildcard address, with this machine's name."""
    import urllib.parse
    name = os.uname().nodename if site.is_wide else host
    name = f"[{name}]" if ":" in name else name
    query = f"?token={urllib.parse.quote(site.token, safe='')}" if site.token else ""
    return f"http{'s' * site.is_secure}://{name}:{port}/{query}"


# ---- 20 MCP ------------------------------------------------------------------
# The Model Context Protocol (modelcontextprotocol.io) on stdin and stdout: JSON-RPC, a
# message per line. One thread: calls that wait are polled while no message comes.

MODERN = "2026-07-28"       # no handshake: each request names its version
HANDSHAKES = ("2025-11-25", "2025-06-18")
RESERVED = "io.modelcontextprotocol/"       # begins the protocol's keys of `_meta`
TASKS = f"{RESERVED}tasks"  # an extension: an enqueued job is a task
MAX_MESSAGE = 4 << 20       # bytes
USUAL_PART, MAX_PART = 2048, 8192       # bytes of output in a result
LISTED = 20                 # jobs in a list; at most MAX_PAGE
USUAL_WAIT = 50.0           # seconds; many clients give up after 60
END_WAIT = 10.0             # seconds for cancelled jobs to end
START_PAUSE = 5.0           # seconds after a worker was started in vain
AGENT_TICK = 0.05           # seconds between two looks at jobs that are waited for
GUIDE = ("Runs shell commands in the background; they outlive this session. `enqueue` "
         "returns an id at once; `wait` for several ids rather than poll `status`.")
NOT_JSON, NOT_A_REQUEST, NO_METHOD, BAD_PARAMS, BUG, NO_CAPABILITY, BAD_VERSION = (
    -32700, -32600, -32601, -32602, -32603, -32021, -32022)


class ProtocolError(Exception):
    """A JSON-RPC error: code, message, data. A tool that fails raises QueueError."""


class Waiting(NamedTuple):
    """A call that is answered once these jobs have ended, or at a time (monotonic)."""
    job_ids: Sequence[str]
    until: float
    tail: int = 0


class Tool(NamedTuple):
    name: str
    help: str
    changes: bool
    call: Callable[[Any, dict[str, Any]], dict[str, Any] | Waiting]     # of an Agent
    fields: tuple[Field, ...]
    required: tuple[str, ...] = ()


def tool_object(tool: Tool) -> dict[str, Any]:
    # Without patterns and bounds: agents read all this in each session, and the error
    # for a wrong value says more.
    return {"name": tool.name, "description": tool.help,
            "inputSchema": _body_schema({field.name: {
                "type": field.kind.input["type"], "description": field.help,
                **({"items": _TEXT} if "array" in field.kind.input["type"] else {})}
                for field in tool.fields}, required=list(tool.required)),
            "annotations": {"readOnlyHint": not tool.changes,
                            "destructiveHint": tool.changes}}


def tool_result(value: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    # The text is for clients that know no structured content.
    return {"resultType": "complete", "structuredContent": value,
            "content": [{"type": "text", "text": dumps(value)}], **more}


def arguments(tool: Tool, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call, checked, but for fields of a job, which the queue
    checks. Null counts as not given.
    """
    fields, found = {field.name: field for field in tool.fields}, {}
    for name, value in given.items():
        if name not in fields:
            raise Invalid(f"unknown argument {name!r}", nearest(name, fields)
                          or "there are: " + ", ".join(fields))
        if FILTERS.get(name) is fields[name] and value is not None:
            # As in a flag, it is text.
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        with at_place(name):
            if value is not None:
                found[name] = value if fields[name].uses \
                    else fields[name].kind.value(value, time.time())
    for name in tool.required:
        if not found.get(name):
            raise Invalid(f"{name} is missing", "give it")
    return found


def output_object(job: Job, run: Run, start: int | None, limit: int) -> dict[str, Any]:
    """Return a part of the output, from a byte on (None: the last part). The text ends
    between characters; `next` is the byte to continue with.
    """
    kept, total, middle = run.output, run.output_bytes, len(run.output) // 2
    first = max(total - limit, 0) if start is None else min(start, total)
    after, end_from = min(first + limit, total), total - (len(kept) - middle)
    if total > len(kept) and middle <= after < end_from:
        after = end_from
    rest = readable(kept, total, first)
    part = rest[:len(rest) - len(readable(kept, total, after))]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    text = decoder.decode(part, after == total and run.outcome is not None)
    if start is None and first:     # perhaps within a character
        text = text.lstrip("\ufffd")
    return {"id": job.id, "run": run.number, "state": job.state, "from": first,
            "next": after - len(decoder.getstate()[0]), "output": text}


def output_tool(queue: Queue, given: Mapping[str, Any]) -> dict[str, Any]:
    job = queue.job(given["id"])    # first: if it is over, all output is there
    run = queue.fresh_run(job.id, given.get("run"), OUTPUT_PATIENCE)
    return output_object(job, run, given.get("from"),
                         min(given.get("limit", USUAL_PART), MAX_PART))


class Agent:
    """A connection to a client; `write` gets each line of the answers.

    The first `enqueue` creates a missing queue. `start` starts a worker (None: that is
    left to the user).
    """

    def __init__(self, path: str, tools: Iterable[Tool], write: Callable[[str], object],
                 start: Callable[[], object] | None = None) -> None:
        self._path, self._write, self._start = path, write, start
        self._tools = {tool.name: tool for tool in tools}
        self._queue: Queue | None = None        # opened when needed
        self._start_at = 0.0                    # no worker is started before
        self.waits: dict[str | int, Waiting] = {}       # by request id

    def queue(self, create: bool = False) -> Queue:
        """Return the queue, opened again if its file was replaced."""
        if self._queue and not self._queue.store.db.is_in_place():
            self._queue.close()
            self._queue = None
        if self._queue is None:
            self._queue = Queue(self._path, create)
            self._queue.store.db.patience = WEB_PATIENCE
        return self._queue

    def briefs(self, job_ids: Sequence[str], tail: int = 0) -> dict[str, Any]:
        """Return the jobs by id: their state, and what is unusual. Starts a worker if
        only that is missing.
        """
        found, failed = {}, list[str]()
        while True:
            jobs = [self.queue().job(job_id) for job_id in job_ids]
            why = self.queue().hindrances(jobs)
            if not any([one.code for one in reasons] == ["no-worker"]
                       for reasons in why.values()):
                self._start_at = 0.0
                break
            if not self._start or time.monotonic() < self._start_at:
                break
            self._start_at = time.monotonic() + START_PAUSE
            try:
                self._start()
            except QueueError as error:
                failed = [str(error)]
        for job in jobs:
            is_told = (job.error or "").startswith("exit status")
            more = {"exit_code": job.exit_code, "error": not is_told and job.error,
                    "waiting_for": [*(f"{one.message}; {one.hint}".rstrip("; ")
                                      for one in why.get(job.id, ())), *failed],
                    "output": tail and job.runs and output_tool(
                        self.queue(), {"id": job.id, "limit": tail})["output"]}
            found[job.id] = {"state": job.state, **{
                key: value for key, value in more.items() if value}}
        return found

    def take(self, line: bytes) -> None:
        """Answer a message, or leave that to `poll`."""
        if not line.strip():
            return
        request_id, method = None, None
        try:
            try:
                if len(line) > MAX_MESSAGE:
                    raise ValueError(f"more than {MAX_MESSAGE} bytes")
                message = parsed_json(line)
            except ValueError as error:
                raise ProtocolError(NOT_JSON, f"not JSON: {error}") from None
            if not isinstance(message, dict) or message.get("jsonrpc") != "2.0":
                raise ProtocolError(NOT_A_REQUEST, "not a message of JSON-RPC 2.0")
            method, params = message.get("method"), message.get("params", {})
            if "id" not in message or {*message} & {"result", "error"}:
                if method == "notifications/cancelled" and isinstance(params, dict):
                    self.waits = {key: waiting for key, waiting in self.waits.items()
                                  if key != params.get("requestId")}
                return
            if type(message["id"]) not in (str, int) or not isinstance(method, str):
                raise ProtocolError(NOT_A_REQUEST, "a request has a method and an id: "
                                    "text or a whole number")
            request_id = message["id"]
            result = self._result(method, params)
            if isinstance(result, Waiting):
                self.waits[request_id] = result
                return
            answer = {"result": result}
        except ProtocolError as error:
            answer = {"error": dict(zip(("code", "message", "data"), error.args))}
        except Exception as error:  # a bug: the server runs on
            import traceback
            traceback.print_exc()
            answer = {"error": {"code": BUG, "message": f"internal error: {error!r}"}}
        self._write(dumps({"jsonrpc": "2.0", "id": request_id, **answer}))

    def poll(self) -> None:
        """Answer the calls whose wait is over."""
        for request_id, waiting in [*self.waits.items()]:
            result = self._end_of(waiting)
            if result:
                del self.waits[request_id]
                self._write(dumps(
                    {"jsonrpc": "2.0", "id": request_id, "result": result}))

    def _end_of(self, waiting: Waiting) -> dict[str, Any] | None:
        try:
            if self._start:
                self.briefs(waiting.job_ids)
            if time.monotonic() < waiting.until:
                self.queue().wait(*waiting.job_ids, timeout=0)
            return tool_result({"jobs": self.briefs(waiting.job_ids, waiting.tail)})
        except QueueError as error:
            return None if error.code == "not-finished" \
                else tool_result(error_object(error), isError=True)

    def _result(self, method: str, params: Any) -> Any:
        meta: Any = (params.get("_meta") or {}) if isinstance(params, dict) else None
        if not isinstance(meta, dict):
            raise ProtocolError(BAD_PARAMS, "params or _meta are not an object")
        version, client = (meta.get(f"{RESERVED}{key}") for key in (
            "protocolVersion", "clientCapabilities"))
        is_modern = version is not None or method == "server/discover"
        if is_modern and not isinstance(version, str):
            raise ProtocolError(BAD_PARAMS, f"_meta lacks {RESERVED}protocolVersion")
        if is_modern and version != MODERN:
            raise ProtocolError(BAD_VERSION, "unsupported protocol version", {
                "supported": [MODERN, *HANDSHAKES], "requested": version})
        server = {"name": "queuectl", "version": __version__}
        common = {"resultType": "complete", "ttlMs": 3_600_000, "cacheScope": "private",
                  "_meta": {f"{RESERVED}serverInfo": server}}
        about = {"capabilities": {"tools": {}}, "instructions": GUIDE}
        tasks: dict[str, Any] = {"extensions": {TASKS: {}}}
        is_offered = is_modern and "enqueue" in self._tools
        has_tasks = is_offered and isinstance(client, dict) \
            and TASKS in (client.get("extensions") or ())
        if method == "tools/call":
            return self._call(params.get("name"), params.get("arguments") or {},
                              has_tasks)
        if method == "tools/list":
            return {"tools": [*map(tool_object, self._tools.values())], **common}
        if method in ("tasks/get", "tasks/update", "tasks/cancel") and is_offered:
            if not has_tasks:
                raise ProtocolError(NO_CAPABILITY, "the client does not declare tasks",
                                    {"requiredCapabilities": tasks})
            return self._task(method, params.get("taskId"))
        if method == "server/discover":
            about["capabilities"] = {"tools": {}, **(tasks if has_tasks else {})}
            return {"supportedVersions": [MODERN, *HANDSHAKES], **about, **common}
        if method == "initialize" and not is_modern:
            asked = params.get("protocolVersion")
            return {"protocolVersion": asked if asked in HANDSHAKES else HANDSHAKES[0],
                    "serverInfo": server, **about}
        if method == "ping" and not is_modern:
            return {}
        raise ProtocolError(NO_METHOD, f"there is no method {method!r}")

    def _call(self, name: Any, given: Any, has_tasks: bool) -> Any:
        tool = self._tools.get(name) if isinstance(name, str) else None
        if not tool or not isinstance(given, dict):
            raise ProtocolError(BAD_PARAMS, "arguments are not an object" if tool
                                else f"unknown tool {name!r}")
        try:
            found = tool.call(
                self, given if name == "enqueue" else arguments(tool, given))
        except QueueError as error:
            return tool_result(error_object(error), isError=True)
        if isinstance(found, Waiting):
            return self._end_of(found) or found
        return {**self._task("tasks/get", found["id"]), "resultType": "task"} \
            if has_tasks and name == "enqueue" else tool_result(found)

    def _task(self, method: str, job_id: Any) -> dict[str, Any]:
        # The ids need not be hard to guess: only this client can send one.
        try:
            job = self.queue().job(parse_name(job_id))
            if method == "tasks/cancel" and job.state not in OVER:
                self.queue().cancel(job.id)
            is_over = job.state in (COMPLETED, DEAD)
            found = self.briefs([job.id], USUAL_PART if is_over else 0)[job.id]
        except QueueError as error:
            raise ProtocolError(BAD_PARAMS, str(error)) from None
        if method != "tasks/get":
            return {"resultType": "complete"}
        result = tool_result({"id": job.id, **found},
                             **({"isError": True} if job.state == DEAD else {}))
        return {"resultType": "complete", "taskId": job.id,
                "status": "completed" if is_over else
                "cancelled" if job.state == CANCELLED else "working",
                "statusMessage": ": ".join([job.state, *found.get("waiting_for", ())]),
                "createdAt": job.created_at, "lastUpdatedAt": job.updated_at,
                "ttlMs": None, "pollIntervalMs": 1000,
                **({"result": result} if is_over else {})}


def enqueue_tool(agent: Agent, given: dict[str, Any]) -> dict[str, Any]:
    [job], new = agent.queue(create=True).add([given])
    return {"id": job.id, **agent.briefs([job.id])[job.id],
            **({} if new else {"added": False})}


def wait_tool(agent: Agent, given: Mapping[str, Any]) -> Waiting:
    return Waiting(given["ids"], time.monotonic() + given.get("timeout", USUAL_WAIT),
                   given.get("tail", 0))


def cancel_tool(agent: Agent, given: Mapping[str, Any]) -> Waiting:
    agent.queue().cancel(*given["ids"])
    return Waiting(given["ids"], time.monotonic() + END_WAIT)


def retry_tool(agent: Agent, given: dict[str, Any]) -> dict[str, Any]:
    ids = given.pop("ids")
    agent.queue().retry(*ids, **given)
    return {"jobs": agent.briefs(ids)}


def status_tool(agent: Agent, given: Mapping[str, Any]) -> dict[str, Any]:
    if given.get("ids"):
        return {"jobs": agent.briefs(given["ids"], given.get("tail", 0))}
    found = status_object(agent.queue().status())
    found["jobs"] = {state: n for state, n in found["jobs"].items() if n}
    found["workers"] = [{key: one[key] for key in ("name", "slots", "running")}
                        for one in found["workers"]]
    return {key: value for key, value in found.items() if value or key == "workers"}


def list_tool(agent: Agent, given: dict[str, Any]) -> dict[str, Any]:
    limit = min(given.pop("limit", LISTED), MAX_PAGE)
    jobs = agent.queue().jobs(given.pop("state", ()), limit=limit + 1, **given)
    return {"jobs": [{"id": job.id, "state": job.state,
                      "command": cut(one_line(job.command), 80)}
                     for job in jobs[:limit]], "more": len(jobs) > limit}


_JOBS = Field("ids", Kind(_names, {"type": "array"}), help="ids of jobs")
_TAIL = Field("tail", _whole(0, {}), help="include so many last bytes of the output")
TOOLS = (
    Tool("enqueue", "Run a shell command in the background. Returns the job's id.",
         True, enqueue_tool, tuple(one for one in FIELDS.values() if "e" in one.uses),
         ("command",)),
    Tool("status", "The state of jobs; without ids, of the queue.", False, status_tool,
         (_JOBS, _TAIL)),
    Tool("output", "What a job has printed: the last part, or a part from a byte on.",
         False, lambda agent, given: output_tool(agent.queue(), given), (
             Field("id", _ID, help="of the job"),
             Field("from", _whole(0, {}), help="a byte: `next` of the last result"),
             Field("limit", _whole(4, {}),
                   help=f"bytes: default {USUAL_PART}, at most {MAX_PART}"),
             Field("run", _whole(1, {}), help="its number; default: the last")),
         ("id",)),
    Tool("wait", "Wait until jobs have ended, or for a time; returns their state.",
         False, wait_tool, (
             _JOBS, Field("timeout", _SPAN, help=f"default {USUAL_WAIT:.0f}s"), _TAIL),
         ("ids",)),
    Tool("cancel", "Cancel jobs; running ones are terminated.", True, cancel_tool,
         (_JOBS,), ("ids",)),
    Tool("retry", "Run jobs again that have ended or wait for a retry.", True,
         retry_tool, (_JOBS, *(FIELDS[name] for name in EDITABLE)), ("ids",)),
    Tool("list", "The newest jobs: id, state, command.", False, list_tool, (
        *FILTERS.values(),
        Field("limit", _whole(1, {}), help=f"default {LISTED}, at most {MAX_PAGE}"))))


def serve_agent(agent: Agent, fd: int) -> None:
    """Answer the messages that come on a descriptor, until its end."""
    rest, piece = b"", b"-"
    while piece:
        if select.select([fd], [], [], AGENT_TICK if agent.waits else None)[0]:
            piece = os.read(fd, READ_SIZE)
            if len(rest) <= MAX_MESSAGE or b"\n" in piece:      # else a line too long
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    agent.take(line)
        agent.poll()
    agent.take(rest)


# ---- 21 Install --------------------------------------------------------------

# At each Tab the scripts run `queuectl __complete -- WORD...`; the last word is the one
# under the cursor. The answer has one line per choice, `WORD<tab>MEANING`, or is
# `<tab>files<tab>BEFORE` (or `dirs`): the shell completes file names, after BEFORE. zsh
# may load the file from $fpath as the function itself, which must then call the
# function defined in it. All keep the order, newest jobs first (nosort, which bash has
# since 4.4; -V; -k). PROGRAM replaces an alias or an uncompiled script.
SHELLS = {"bash": """\
# Completion for queuectl in bash. In ~/.bashrc:  eval "$(queuectl completion bash)"
# For an alias q:  complete -o nosort -F _queuectl q
_queuectl() {
    local rest line=${COMP_LINE:0:COMP_POINT} word part i at=-1 words=() run=("$1")
    # bash also splits words at : = @: join those that no blank separates.
    for ((i = 0; i <= COMP_CWORD; i++)); do
        rest=${line#"${line%%[![:space:]]*}"} part=${COMP_WORDS[i]}
        ((i < COMP_CWORD)) || part=$rest
        if ((i)) && [[ $rest == "$line" ]]; then words[at]+=$part
        else words[++at]=$part; fi
        line=${rest#"$part"}
    done
    # bash replaces only $2: remove the text before it from the choices.
    rest=${words[at]%"$2"}
    [[ $1 != *.py ]] && type -P -- "$1" >/dev/null || run=(PROGRAM)
    COMPREPLY=()
    while IFS= read -r line; do
        word=${line%%$'\t'*}
        case $line in
        '') ;;
        $'\tfiles\t@') while IFS= read -r word; do
                printf -v word %q "$word"; COMPREPLY+=("@$word")
            done <<< "$(compgen -f -- "${words[at]#@}")" ;;
        $'\tfiles'*) compopt -o default ;;
        $'\tdirs'*) compopt -o dirnames ;;
        *) COMPREPLY+=("${word#"$rest"}") ;;
        esac
    done <<< "$("${run[@]}" __complete -- "${words[@]:1}" 2>/dev/null)"
}
complete -o nosort -F _queuectl queuectl queuectl.py 2>/dev/null ||
    complete -F _queuectl queuectl queuectl.py
""", "zsh": """\
#compdef queuectl queuectl.py
# Completion for queuectl in zsh. Save it as _queuectl in a directory of $fpath, or add
# to ~/.zshrc, after compinit:  eval "$(queuectl completion zsh)"
_queuectl() {
    local line word
    local -a run values shown
    run=("${(Q)words[1]}")
    [[ $run[1] != *.py ]] && whence -p -- $run[1] >/dev/null || run=(PROGRAM)
    run+=(__complete -- "${(@)words[2,CURRENT-1]}" "$PREFIX")
    for line in "${(@f)$("${run[@]}" 2>/dev/null)}"; do
        word=${line%%$'\t'*}
        case $line in
        $'\tfiles'*) compset -P "${(b)line##*$'\t'}"; _files; return ;;
        $'\tdirs'*) compset -P "${(b)line##*$'\t'}"; _files -/; return ;;
        *$'\t') values+=("$word") shown+=("$word") ;;
        *) values+=("$word") shown+=("${(r:24:)word}  ${line#*$'\t'}") ;;
        esac
    done
    compadd -V queuectl -l -d shown -a values
}
if [[ $zsh_eval_context[-1] == loadautofunc ]]; then _queuectl "$@"
else compdef _queuectl queuectl queuectl.py; fi
""", "fish": """\
# Completion for queuectl in fish. In ~/.config/fish/config.fish:
#     queuectl completion fish | source
# For an alias q:  complete -c q -w queuectl
function __queuectl_complete
    set -l words (commandline -opc)
    set -l word (commandline -ct)
    set -l run $words[1]
    if string match -q '*.py' -- $run; or not command -sq -- $run
        set run PROGRAM
    end
    set -e words[1]
    for line in ($run __complete -- $words "$word" 2>/dev/null)
        set -l parts (string split \\t -- $line)
        if test -n "$parts[1]"
            printf '%s\\n' $line
        else
            set -l start (math 1 + (string length -- "$parts[3]"))
            set -l typed (string sub -s $start -- "$word")
            if test $parts[2] = dirs
                printf "$parts[3]%s\\n" (__fish_complete_directories "$typed" '')
            else
                printf "$parts[3]%s\\n" (__fish_complete_path "$typed")
            end
        end
    end
end
complete -c queuectl -c queuectl.py -f -k -a '(__queuectl_complete)'
"""}
# Python caches the bytecode of imported modules, not of scripts. The module's directory
# replaces the current one, from which a stray json.py could be imported.
BY_IMPORT = ("import sys; sys.path[0] = sys.argv.pop(1); import queuectl; "
             "sys.exit(queuectl.main())")
LIBRARY = os.path.join("lib", "queuectl")   # of an installed module, below --to


def start_words() -> tuple[str, ...]:
    """Return the words that start this program with cached bytecode, anywhere;
    UnicodeError.
    """
    python = as_utf8(sys.executable or "python3")   # Python may not know its own path
    file = as_utf8(os.path.abspath(__file__))
    folder, name = os.path.split(file)
    if name != "queuectl.py":       # it cannot be imported
        return python, file
    launcher = os.path.join(folder[:-len(LIBRARY)], "bin", "queuectl")
    if folder.endswith(os.sep + LIBRARY) and os.access(launcher, os.X_OK):
        return (launcher,)
    return python, "-c", BY_IMPORT, folder


def start_worker(path: str, *flags: str) -> str:
    """Start a detached worker in a new process, and return what it prints. It keeps no
    descriptor of the caller; Unavailable has its error.
    """
    import subprocess   # 6 ms
    done = subprocess.run(
        (*start_words(), "--db", path, "worker", "start", "--detach", *flags),
        check=False, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise Unavailable("unsupported", "no worker could be started: "
                          + done.stderr.strip().partition("error: ")[2])
    return done.stdout.strip()


def _replace(path: str, content: bytes, mode: int) -> None:
    """Write a file atomically."""
    part = f"{path}.{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(part, mode)
        os.replace(part, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def install(to: str) -> str:
    """Install or replace module, bytecode and launcher below a directory; return the
    launcher. Refused, Unavailable.
    """
    import py_compile   # 5 ms
    import shlex
    try:    # works also in a zip archive
        source: bytes = globals()["__loader__"].get_data(__file__)
    except (AttributeError, KeyError, NameError, OSError):
        raise Refused("unsupported", "this program's own file cannot be read",
                      "run it as `python3 queuectl.py`") from None
    library, launcher = os.path.join(to, LIBRARY), os.path.join(to, "bin", "queuectl")
    words = (sys.executable or "python3", "-c", BY_IMPORT, library)
    script = f"#!/bin/sh\nexec {shlex.join(words)} \"$@\"\n"
    umask = os.umask(0o022)     # other users may run what root installs
    try:
        os.makedirs(library, exist_ok=True)
        os.makedirs(os.path.dirname(launcher), exist_ok=True)
        module = os.path.join(library, "queuectl.py")
        _replace(module, source, 0o644)
        # An explicit path, regardless of $PYTHONPYCACHEPREFIX.
        py_compile.compile(module, os.path.join(
            library, "__pycache__", f"queuectl.{sys.implementation.cache_tag}.pyc"))
        _replace(launcher, os.fsencode(script), 0o755)
    except OSError as error:
        raise Unavailable("unwritable",
                          f"cannot write {error.filename} ({error.strerror})",
                          "choose a directory with --to") from None
    finally:
        os.umask(umask)
    return launcher


def systemd_word(word: str, is_program: bool = False) -> str:
    """Quote a word of ExecStart=: %x is a specifier (systemd.unit(5)), $X a variable,
    and quoted words have C's escapes (systemd.service(5), "Command lines"). In the
    program's path $ is literal.
    """
    if re.fullmatch("[A-Za-z0-9_./:@,=+-]+", word):
        return word
    escaped = re.sub(r'[\0-\x1f\x7f"\\]', lambda char: f"\\x{ord(char[0]):02x}",
                     word.replace("%", "%%"))
    return f'"{escaped if is_program else escaped.replace("$", "$$")}"'


UNIT_FILE = """\
# The {what} of {shown}
#
# Save this as {place}
# (for a second queue: under another name), then:{token}
#     systemctl{scope} daemon-reload
#     systemctl{scope} enable --now {name}.service
#     journalctl {journal} {name}.service --follow{linger}

[Unit]
Description=queuectl {what}, {described}{mounts}

[Service]
Type={type}{user}
ExecStart={command}
Restart=on-failure
RestartSec=5
# 2: the command line is invalid; a restart would not help.
RestartPreventExitStatus=2
{service}
[Install]
WantedBy={target}
"""
# Restrictions that any service manager can apply, and those that need root's.
_BY_ANY = "".join(f"#{name}=yes\n" for name in (
    "NoNewPrivileges", "RestrictSUIDSGID", "LockPersonality", "RestrictRealtime"))
_BY_ROOT = "#CapabilityBoundingSet=\n" + "".join(f"#Protect{name}=yes\n" for name in (
    "KernelTunables", "KernelModules", "KernelLogs", "ControlGroups", "Clock"))
WORKER_SERVICE = f"""\
NotifyAccess=all
# An upgrade of the database makes a backup first.
TimeoutStartSec=10min
# `stop` and `restart` let running jobs finish: only the worker gets SIGTERM.
KillMode=mixed
# How long that may take; infinity also delays a shutdown of the machine. With
# `queuectl systemd --grace 5m` the worker requeues its jobs after 5 minutes.
TimeoutStopSec={{stop_timeout}}
# A worker that hangs is killed and restarted; its jobs run again.
WatchdogSec=60
# If the kernel kills a job for lack of memory, the worker and its other jobs continue.
OOMPolicy=continue

# Jobs get this environment, not that of your shell:
#Environment=LANG=C.UTF-8 PATH=/usr/local/bin:/usr/bin:/bin

# Most restrictions also disable sudo in jobs. If no job needs sudo, another setuid
# program or root's privileges:
{_BY_ANY}{_BY_ROOT}\
# If no job writes to /usr, /boot or /etc:
#ProtectSystem=full
# If neither the queue nor files shared with others are in /tmp:
#PrivateTmp=yes
# Do not use ProtectProc=, ProcSubset= and PrivatePIDs=, which hide the processes of
# jobs from the worker, and PrivateNetwork=, which blocks notifications.
"""
WEB_SERVICE = f"""\
# QUEUECTL_TOKEN=..., and QUEUECTL_READ_TOKEN=... for users that may only read.
EnvironmentFile={{tokens}}
# It prints its URL, http://HOST:PORT/?token=TOKEN, which no log should keep.
StandardOutput=null

{_BY_ANY.replace("#", "")}{{by_root}}\
# For a port below 1024:
#CapabilityBoundingSet=CAP_NET_BIND_SERVICE
#AmbientCapabilities=CAP_NET_BIND_SERVICE
# If the queue is not in /tmp:
#PrivateTmp=yes
"""


def unit_file(command: Sequence[str], path: str, is_own: bool, is_web: bool,
              grace: float | None = None) -> str:
    """Return a systemd unit that runs a worker or the dashboard: the user's own, or the
    system's, which runs as the owner of the database. A worker has `grace` seconds to
    stop (None: any time).
    """
    owner, stop_timeout = os.getuid(), "infinity"
    with contextlib.suppress(OSError):
        owner = os.stat(path).st_uid
    user = str(owner)
    with contextlib.suppress(KeyError):     # the user has no name
        import pwd  # not on Windows
        user = pwd.getpwuid(owner).pw_name
    if grace is not None:
        stored: dict[str, str] = {}     # the default, if there is no queue yet
        with contextlib.suppress(QueueError), glance(path) as rows:
            stored = dict(rows(Sql.STORED_SETTINGS))
        # 15 s later than the worker kills its jobs, systemd kills the worker.
        stop_timeout = f"{math.ceil(grace + settings_of(stored).kill_grace) + 15}s"
    # RequiresMountsFor= has specifiers; a backslash makes the next character literal,
    # so control characters cannot be escaped.
    folders = dict.fromkeys(map(os.path.dirname, (path, os.path.realpath(path))))
    mounts = " ".join('"' + re.sub(r'(["\\])', r"\\\1", folder).replace("%", "%%") + '"'
                      for folder in folders if folder.isprintable())
    program, *arguments = command
    shown, name = one_line(path), "queuectl-web" if is_web else "queuectl"
    tokens = "%h/.config/queuectl-web.env" if is_own else "/etc/queuectl-web.env"
    service = WEB_SERVICE if is_web else WORKER_SERVICE
    return UNIT_FILE.format(
        what="dashboard" if is_web else "worker", name=name,
        # A trailing backslash would continue the line (systemd.syntax(7)).
        shown=shown, described=shown.replace("%", "%%").rstrip("\\"),
        mounts=mounts and f"\nRequiresMountsFor={mounts}",
        place=f"~/.config/systemd/user/{name}.service" if is_own
        else f"/etc/systemd/system/{name}.service",
        token="\n#     token=$(od -An -N32 -tx8 /dev/urandom | tr -d ' \\n')\n"
              f"#     (umask 077; echo QUEUECTL_TOKEN=$token > "
              f"{tokens.replace('%h', '~')})" if is_web else "",
        scope=" --user" if is_own else "",
        journal="--user-unit" if is_own else "--unit",
        linger="\n#     loginctl enable-linger   (to run while you are logged out)"
        if is_own else "", user="" if is_own else f"\nUser={user}",
        type="exec" if is_web else "notify",
        command=" ".join((systemd_word(program, True), *map(systemd_word, arguments))),
        service=service.format(
            stop_timeout=stop_timeout, by_root=_BY_ROOT.replace("#", "#" * is_own),
            tokens="-" * ("--no-auth" in command) + tokens),
        target="default.target" if is_own else "multi-user.target")


# ---- 22 Terminal -------------------------------------------------------------
# The input and output of commands. Results go to stdout, messages to stderr. A command
# prints only through its Screen, which removes a progress line before other output, and
# distinguishes a full disk from a closed pipe.

LOG_LINES = 1000       # texts queued for a log
LOG_PAUSE = 0.02       # seconds between two writes of a log: each switches threads
LOG_LINGER = 1.0       # seconds to write the rest of a log at exit
STREAM_PAUSE = 0.02    # seconds in which lines of a stream are collected
STREAM_BATCH = 1000    # lines of a stream in one transaction
MAX_LINE = 4 << 20     # bytes kept of a line of a stream


def is_drawable(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def is_foreground() -> bool:
    """Return False for a background job of stderr's terminal."""
    try:
        return os.tcgetpgrp(2) == os.getpgrp()
    except (AttributeError, OSError):   # Windows; not its controlling terminal
        return True


def window() -> os.terminal_size:
    import shutil   # 4 ms, and only for a terminal or help
    return shutil.get_terminal_size()


class Log(io.TextIOBase):
    """sys.stderr of a worker or server: a bounded queue, written by a daemon thread.

    A full pipe or terminal delays nothing; lines that do not fit are dropped and
    counted. The thread writes to the descriptor: blocked in sys.stderr, it would hold a
    lock that the interpreter needs to exit.
    """

    def __init__(self, fd: int) -> None:
        import queue    # 2 ms
        super().__init__()
        self._fd, self._full = fd, queue.Full
        self._texts: queue.Queue[str] = queue.Queue(LOG_LINES)
        self._dropped, self._lock = 0, threading.Lock()     # lines; guards this count
        self._is_ending = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def write(self, text: str) -> int:
        try:
            self._texts.put_nowait(text)
        except self._full:
            with self._lock:
                self._dropped += text.count("\n")
        return len(text)

    def end(self) -> None:
        """Wait up to LOG_LINGER seconds for the rest to be written, or for Ctrl+C."""
        self._is_ending.set()
        with contextlib.suppress(self._full):
            self._texts.put_nowait("")      # wakes the thread
        with contextlib.suppress(KeyboardInterrupt):
            self._thread.join(LOG_LINGER)

    def _work(self) -> None:
        while not (self._is_ending.is_set() and self._texts.empty()):
            text = self._texts.get()
            while not self._texts.empty():
                text += self._texts.get()
            with self._lock:
                dropped, self._dropped = self._dropped, 0
            note = f"{dropped:,} lines of this log were dropped: it was not read or " \
                "could not be written\n" if dropped else ""
            if not self._put((text + note).encode("utf-8", "backslashreplace")):
                with self._lock:
                    self._dropped += dropped + text.count("\n")
            self._is_ending.wait(LOG_PAUSE)

    def _put(self, rest: bytes) -> bool:
        while rest:
            try:
                rest = rest[os.write(self._fd, rest):]
            except BlockingIOError:     # another program made it non-blocking
                select.select([], [self._fd], [])
            except OSError:
                return False
        return True


@contextlib.contextmanager
def log_on_stderr() -> Iterator[None]:
    try:
        log = Log(sys.stderr.fileno())
    except (OSError, ValueError):   # not a file, as in a program that calls `main`
        yield
        return
    with contextlib.redirect_stderr(log):
        try:
            yield
        finally:
            log.end()


class Screen:
    """The output of a command. With `quiet` (--quiet, --json) it prints neither notes
    nor progress; logs and errors are still printed.

    Progress is a line on stderr, redrawn in place. A command that `acts` continues if
    its results cannot be written; `finish` then raises the first error.
    """

    def __init__(self, quiet: bool = False, acts: bool = False) -> None:
        self._quiet, self._acts = quiet, acts
        self._failure: OSError | None = None
        self._drawn, self._drawn_at = "", -math.inf
        self._is_terminal = is_drawable(sys.stderr)
        self.draws = not quiet and self._is_terminal

    def out(self, *lines: str) -> None:
        """Print results, one per line; Unavailable or BrokenPipeError."""
        self.clear()
        self._try(lambda: sys.stdout.writelines(f"{line}\n" for line in lines))

    def raw(self, output: bytes) -> None:
        """Print a job's output unchanged, since it may be binary."""
        self.flush()
        self._try(lambda: (sys.stdout.buffer.write(output), sys.stdout.buffer.flush()))

    def flush(self) -> None:
        self._try(sys.stdout.flush)

    def finish(self) -> None:
        """Flush, and raise the first failure, except for a closed pipe."""
        self.flush()
        if self._failure and not isinstance(self._failure, BrokenPipeError):
            # No hint to repeat the command: changes have been made.
            raise Unavailable("unwritable",
                              f"the result could not be written ({self._failure})",
                              "`queuectl status` shows what was done") from None

    def _try(self, write: Callable[[], object]) -> None:
        try:
            if self._failure is None:
                write()
        except OSError as error:
            self._failure = error
            if not self._acts:
                self.finish()
                raise

    @staticmethod
    def check_reader() -> None:
        """Raise BrokenPipeError if stdout is a pipe without a reader."""
        poller = select.poll()
        with contextlib.suppress(OSError, ValueError):  # stdout is not a file
            poller.register(sys.stdout.fileno(), 0)     # poll always reports errors
        if poller.poll(0):
            raise BrokenPipeError

    def note(self, *lines: str) -> None:
        if not self._quiet:
            self._write(*lines)

    def log(self, text: str) -> None:
        now = time.time()
        stamp = local_time(now, now if sys.stderr.isatty() else None)
        # The line may replace the progress line of another process (EL).
        end = "\033[K\n" if self._is_terminal else "\n"
        self._write(f"{stamp} {text}", end=end, drawn=self._drawn.rstrip("\r"))

    def clear(self) -> None:
        if self._drawn:
            self._write()

    def show(self, text: str) -> None:
        """Redraw the progress line, ten times a second at most, in the foreground."""
        now = time.monotonic()
        if not self.draws or now < self._drawn_at + 0.1 or not is_foreground():
            return
        with contextlib.suppress(AttributeError, ValueError):   # not the main thread
            if signal.getsignal(signal.SIGTSTP) == signal.SIG_DFL:
                signal.signal(signal.SIGTSTP, self._suspend)
        self._drawn_at = now
        self._write(drawn=text)

    @staticmethod
    def room() -> int:
        """Return the columns for a progress line on stderr: on some terminals a full
        line moves the cursor to the next (terminfo(5), am).
        """
        try:
            return (os.get_terminal_size(2).columns or 80) - 1
        except OSError:
            return 79

    def _suspend(self, *_: object) -> None:
        # Not by sys.stderr, which this may interrupt.
        if self._drawn and is_foreground():
            self._drawn = ""
            os.write(2, b"\r\033[J")
        os.kill(os.getpid(), signal.SIGSTOP)

    def _write(self, *lines: str, end: str = "\n", drawn: str = "") -> None:
        """In one write, erase the progress line (ECMA-48, ED: it may be several lines
        since the window was narrowed), print lines and redraw it. The cursor stays
        before it, so that other processes print over it. Errors are ignored.
        """
        width = self.room() if self._is_terminal else 0
        text = "".join(f"{part}{end}" for line in lines for part in fold(line, width))
        erase = "\r\033[J" if self._drawn else ""
        self._drawn = drawn and cut(drawn, self.room()) + "\r"
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(erase + text + self._drawn)
            sys.stderr.flush()

    @staticmethod
    def style() -> Style:
        """Return colours (no-color.org) and width of stdout; 0: no limit, for files."""
        return Style(is_drawable(sys.stdout) and not os.environ.get("NO_COLOR"),
                     window().columns if sys.stdout.isatty() else 0, time.time())


def print_error(error: QueueError, as_json: bool) -> int:
    if as_json:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(dumps(error_object(error)) + "\n")
    else:
        Screen().note(f"queuectl: error: {one_line(str(error))}")
    return error.exit_status


def _variable(given: str) -> tuple[str, str]:
    """Return name and value of `NAME=VALUE`; of `NAME` that of the environment."""
    name, sign, value = given.partition("=")
    try:
        return name, value if sign else as_utf8(os.environ[name])
    except KeyError:
        raise Usage(f"--env {given!r} is not in the environment",
                    "export it, or write --env NAME=VALUE") from None
    except UnicodeError:
        raise Usage(f"--env {given!r}: its value is not UTF-8",
                    "write --env NAME=VALUE") from None


def flag_fields(args: argparse.Namespace) -> dict[str, Any]:
    given = {name: value for name, value in vars(args).items()
             if name in FIELDS and "e" in FIELDS[name].uses and value is not None}
    if "env" in given:
        given["env"] = dict(map(_variable, given["env"]))
    return given


def merged(fields: Mapping[str, Any], flags: Mapping[str, Any]) -> dict[str, Any]:
    """Return the job object with flags in place of its keys, with `-` or `_`; `delay`
    and `run_at`, `expires` and `expires_at` replace each other.
    """
    replaced = {*flags}.union(*(pair for pair in (
        ("delay", "run_at"), ("expires", "expires_at")) if {*pair} & {*flags}))
    return {**{key: value for key, value in fields.items()
               if key.replace("-", "_") not in replaced}, **flags}


def checked_jobs(given: Iterable[Given], now: float,
                 ignored: set[str]) -> Iterator[tuple[str, Job]]:
    """The jobs that job objects ask for, with their places, which Invalid names;
    `ignored` gets the keys that the queue maintains.
    """
    for fields, place in given:
        with at_place(place):
            job = new_job(fields, now)
        ignored.update(ignored_keys(fields))
        yield place, job


def ignored_warning(keys: Collection[str]) -> str:
    return "warning: ignored keys that only the queue sets: " + ", ".join(sorted(keys))


def piped_stdin() -> TextIO:
    if sys.stdin is None:
        raise Refused("unreadable", "stdin is closed", "give a file or a pipe")
    return sys.stdin


def _content(path: str) -> bytes:
    try:
        if path == "-":
            return piped_stdin().buffer.read()
        with open(system_path(path), "rb") as file:
            return file.read()
    except OSError as error:
        raise Refused("unreadable", f"cannot read {path} ({error.strerror})",
                      "give another file") from None


_SHELLS = rb"(.*/)?(sh|ash|bash|dash|fish|ksh|mksh|zsh)"


def _script_at(words: Sequence[bytes], shell: int) -> int | None:
    """Return the index of the script after -c of the shell at that index, or None."""
    if not re.fullmatch(_SHELLS, words[shell], re.DOTALL):
        return None
    has_script, place = False, shell + 1
    while place < len(words) and re.match(rb"[-+].", words[place]):
        word = words[place]
        place += 1
        if word == b"--":
            break
        is_short = word[:2] != b"--"
        has_script |= word[:1] == b"-" and is_short and b"c" in word
        # `-o pipefail`, `-eo pipefail` and `--rcfile F` take another word.
        place += word.endswith(b"o") if is_short \
            else word in (b"--rcfile", b"--init-file")
    return place if has_script else None


def lines_of(args: argparse.Namespace) -> Lines:
    """Return the reader of a batch's lines: as jobs, or by the template after `--`.

    Usage if an item would become part of a shell script, and so run as code.
    """
    words: list[bytes] | None = args.words
    if words is None:
        return Lines(args.null)
    scripts = {_script_at(words, shell) for shell in range(len(words))}
    marked = {place for place, word in enumerate(words) if b"{}" in word}
    if scripts & (marked or {len(words)}):      # without {} it is appended
        raise Usage("an item within the script of a shell would be run as code",
                    "pass it as an argument: sh -c 'echo \"$1\"' sh {}")
    return Lines(args.null, words, flag_fields(args),
                 {name for name in args.env or () if "=" not in name})


def given_jobs(args: argparse.Namespace) -> tuple[bool, list[Given]]:
    """Return True for a batch, which prints an array or a count, and the job objects.

        enqueue -- PROG ARG   one command; the boundaries of its words are kept
        enqueue --file F      a batch, and so are @F and - (stdin)
        enqueue - -- PROG     a batch from a template
        enqueue JOB           an object, a command, or an array, which is a batch
        enqueue --command C   one job from flags
        enqueue --stream      none yet
    """
    job, words, flags = args.job or "", args.words, flag_fields(args)
    is_batch = args.stream or args.file is not None or job[:1] == "@" or job == "-"
    sources = [args.job, args.file, None if is_batch else words]
    for is_wrong, message, hint in (
            (words == [], "there is no command after --", "write -- PROG ARG..."),
            (args.stream and (args.job not in (None, "-") or args.file or args.command),
             "--stream reads only stdin", "give no other job"),
            (args.stream and args.wait, "--stream and --wait do not go together",
             "`queuectl wait --all` waits"),
            (args.null and not is_batch, "--null needs stdin or a file",
             "add - or --file F"),
            (sources.count(None) < 2,
             "JOB, --file and words after -- exclude each other",
             "give one; several words go in quotes or after --"),
            (args.command is not None and (words or not (
                args.job is None or is_batch or is_json(job))),
             "two commands are given", "give one of them"),
            (not is_batch and sources == [None] * 3 and args.command is None,
             "nothing to enqueue", "try `queuectl enqueue 'echo hi'`")):
        if is_wrong:
            raise Usage(message, hint)
    if is_batch:
        lines = lines_of(args) if args.stream or words or args.null else None
        found = [] if args.stream else list(jobs_in(
            _content(args.file or job[job != "-":]), lines))
        flags = {} if words else flags      # a template has applied them
    elif words:
        found = [({"command": shell_command(words)}, "")]
    elif args.job is not None:
        is_batch = is_json(job) and job.lstrip().startswith("[")
        found = items(fields_of(job)) if is_batch else [(fields_of(job)[0], "")]
    else:
        found = [({}, "")]
    return is_batch, [(merged(fields, flags), place) for fields, place in found]


def line_batches(fd: int, end: bytes = b"\n") -> Iterator[list[bytes]]:
    """Yield the lines of a stream as they arrive, all of STREAM_PAUSE seconds at once:
    a fast stream needs one fsync for many lines.

    A line is cut at MAX_LINE, too long for a job. An interrupt follows the lines
    already read.
    """
    rest, lines, due, piece = b"", list[bytes](), math.inf, b"-"
    while piece:
        try:
            left = due - time.monotonic()
            if not lines or (len(lines) < STREAM_BATCH and left > 0 and fcntl
                             and select.select([fd], [], [], left)[0]):
                piece = os.read(fd, READ_SIZE)  # a file would read ahead of select()
                *whole, rest = (rest + piece).split(end)
                rest = rest[:MAX_LINE]
                due = due if lines or not whole else time.monotonic() + STREAM_PAUSE
                lines += whole
                continue
        except KeyboardInterrupt:
            yield lines
            raise
        yield lines
        lines, due = [], math.inf
    if lines or rest:
        yield [*lines, rest]


class Stream:
    """Adds jobs from lines as they arrive; skips a line with an invalid job.

    `refuse` gets each error, `warn` each warning; `refused` counts the skipped lines.
    """

    def __init__(self, queue: Queue, flags: Mapping[str, Any],
                 refuse: Callable[[QueueError], object],
                 warn: Callable[[str], object], lines: Lines | None = None) -> None:
        self._queue, self._flags = queue, flags
        self._refuse, self._warn = refuse, warn
        self._lines = lines or Lines()
        self._ignored: set[str] = set()     # keys already warned of
        self.refused = 0

    def add(self, lines: Sequence[bytes]) -> list[Job]:
        """Add the jobs of these lines in one transaction, and return them. On a full
        disk, wait: the lines cannot be read again. An error without `item` ends the
        stream.
        """
        given, warned_of = list[tuple[str, Job]](), {*self._ignored}
        for line in lines:
            try:    # a delay counts from when the line came
                given += [*checked_jobs(
                    [(merged(fields, self._flags), place)
                     for fields, place in self._lines.read(line)],
                    self._queue.clock(), self._ignored)]
            except QueueError as error:
                self._skip(error)
        if self._ignored > warned_of:
            self._warn(ignored_warning(self._ignored - warned_of))
        complained = False
        while given:
            try:
                return self._queue.enqueue_many([job for _, job in given])
            except Unavailable as error:
                if not complained:
                    self._refuse(Unavailable(
                        error.code, error.message,
                        f"retrying; {counted(len(given), 'job')} wait"))
                complained = True
                time.sleep(SYNC_PAUSE)
            except QueueError as error:
                if error.item is None:
                    raise
                place = given[error.item][0]
                error.name_place(place)
                self._skip(error)
                given = [one for one in given if one[0] != place]
            except KeyboardInterrupt:
                self._refuse(Refused(
                    "not-finished", f"interrupted: {counted(len(given), 'job')} from "
                    f"{given[0][0]} on may not have been added", "send them again"))
                raise
        return []

    def _skip(self, error: QueueError) -> None:
        self.refused += 1
        self._refuse(error)


# ---- 23 Commands -------------------------------------------------------------
# A function per command, and the table of all. A command returns its exit status (None:
# EX_OK), and refuses by raising. `args.words` holds the words after `--`.

PEOPLE_LIMIT = 50      # jobs that `list` shows a person
SHOWN_RUNS = 20        # runs that `show` shows a person
READER_TICK = 0.1      # seconds between two looks whether stdout is still read


def _print_json(value: Any, screen: Screen) -> None:
    """An object, indented for people; else an array, an element at a time, per line."""
    if isinstance(value, dict):
        screen.out(dumps(value, 2 if sys.stdout.isatty() else None))
        return
    line = "["
    for one in value:
        screen.out(line)
        line = "  " + dumps(one) + ","
    screen.out(line.rstrip(",") + ("]" if line == "[" else "\n]"))


def _view(args: argparse.Namespace, screen: Screen, found: object,
          lines: Iterable[str]) -> None:
    if args.json:
        _print_json(found, screen)
    else:
        width = screen.style().width
        screen.out(*(part for line in lines for part in fold(line, width)))


def _whys(queue: Queue, jobs: Iterable[Job]) -> dict[str, str]:
    """Why jobs wait, by id, unless that passes by itself."""
    found = {job_id: [one for one in findings if one.level != NOTE]
             for job_id, findings in queue.hindrances(jobs).items()}
    return {job_id: "; ".join([", ".join(one.message for one in findings),
                               *(one.hint for one in findings if one.hint)])
            for job_id, findings in found.items() if findings}


def _say_why(queue: Queue, screen: Screen, jobs: Iterable[Job],
             said: set[str]) -> None:
    for job_id, why in _whys(queue, jobs).items():
        if why not in said:
            screen.note(f"{job_id} waits: {why}")
        said.add(why)


def _bar(screen: Screen, queue: Queue | None = None,
         waiting: Callable[[], Iterable[Job]] = list) -> Callable[[Progress], None]:
    """A function that draws the progress and, with a queue, says once why the jobs of
    `waiting` do not run.
    """
    pace, said = Pace(), set[str]()

    def show(progress: Progress) -> None:
        if queue and progress.waiting and not progress.running:
            _say_why(queue, screen, waiting(), said)
        rate = pace.rate(progress, time.monotonic())
        screen.show(progress_line(progress, rate, screen.room()))
    return show


def _await(queue: Queue, screen: Screen, job_ids: Sequence[str],
           timeout: float | None = None) -> tuple[int, list[Job]]:
    """Wait for jobs; an exit status, and the jobs as they have finished."""
    began = time.monotonic()
    bar = _bar(screen, queue, lambda: [
        job for job in map(queue.job, job_ids[:PEOPLE_LIMIT]) if job.state in WAITING])
    jobs = queue.wait(*job_ids, timeout=timeout, tell=bar)
    done = sum(job.state == COMPLETED for job in jobs)
    if len(jobs) > 1:
        screen.note(f"{done} of {len(jobs)} jobs completed, "
                    f"after {span(time.monotonic() - began)}")
        return EX_OK if done == len(jobs) else EX_NO, jobs
    job, = jobs
    screen.note(f"{job.id} {job.state}{f' ({job.error})' if job.error else ''}")
    # One that was cancelled before it ran has no exit status.
    return EX_OK if done else job.exit_code or EX_NO, jobs


def _report(args: argparse.Namespace, queue: Queue, screen: Screen, jobs: Iterable[Job],
            say: Callable[[Iterable[Job]], object]) -> int:
    """Say what was done to jobs. With --wait, wait for them; with --json, too, print
    them only then: stdout is one JSON text.
    """
    if not vars(args).get("wait"):
        say(jobs)
        return EX_OK
    jobs, status = [*jobs], EX_OK
    if not args.json:
        say(jobs)
    if jobs:
        status, jobs = _await(queue, screen, [job.id for job in jobs])
    if args.json:
        say(jobs)
    return status


def _say_added(jobs: Sequence[Job], new: int, args: argparse.Namespace,
               screen: Screen) -> None:
    known, (is_batch, _) = len(jobs) - new, args.given
    if args.json:
        _print_json(map(job_object, jobs) if is_batch else job_object(jobs[0]), screen)
    elif args.quiet or not is_batch:
        screen.out(*(job.id for job in jobs))
    elif known:
        screen.out(f"{new} added, {known} already there")
    elif jobs:
        screen.out(f"{new} added: " + " ... ".join(
            dict.fromkeys([jobs[0].id, jobs[-1].id])))
    else:
        screen.note("the input has no jobs; nothing was added")
    if known and not is_batch:
        screen.note(f"{jobs[0].id} ({jobs[0].state}) has that key: nothing was added")
    screen.flush()


def _note_no_worker(queue: Queue, screen: Screen, jobs: Sequence[Job] = ()) -> None:
    most = max((one.slots for one in queue.workers() if not one.is_expired), default=0)
    if not most:
        screen.note("no worker is running; `queuectl worker start` starts one")
    for job in [job for job in jobs if job.slots > most > 0][:1]:
        screen.note(f"{job.id} needs {job.slots} slots, the largest worker has {most}; "
                    f"`queuectl edit {job.id} --slots {most}`, or start a larger one")


def _enqueue_stream(args: argparse.Namespace, queue: Queue, screen: Screen) -> int:
    # SIGTERM acts as Ctrl+C: what was read is added first.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    queue.store.db.patience = WORKER_PATIENCE    # it tries again itself, and says so
    reader = lines_of(args)
    stream = Stream(queue, {} if args.words else flag_fields(args),
                    lambda error: print_error(error, args.json), screen.note, reader)
    for lines in line_batches(piped_stdin().fileno(), reader.end):
        jobs = stream.add(lines)
        screen.out(*(dumps(job_object(job), None) if args.json else job.id
                     for job in jobs))
        screen.flush()
    return EX_NO if stream.refused else EX_OK


def _add(queue: Queue, given: Sequence[Given], screen: Screen) -> tuple[list[Job], int]:
    """Add a batch; its jobs, and how many are new. All are checked before the
    transaction, which holds the write lock.
    """
    specs, ignored = list[Job](), set[str]()
    for _, job in checked_jobs(given, queue.clock(), ignored):
        specs.append(job)
        if len(specs) % 1000 == 0:
            screen.show(f"{len(specs):,} of {len(given):,} jobs checked")
    if ignored:
        screen.note(ignored_warning(ignored))
    try:
        return queue.add(specs)
    except QueueError as error:
        if error.item is not None:
            error.name_place(given[error.item][1])
        raise


def cmd_enqueue(args: argparse.Namespace, queue: Queue, screen: Screen) -> int:
    if args.stream:
        return _enqueue_stream(args, queue, screen)
    jobs, new = _add(queue, args.given[1], screen)
    n, stuck = queue.stuck(held=True, among=[
        job for job in jobs if job.waits == BLOCKED])
    for job in stuck:
        more = f" and {n - 1} more" if n > 1 else ""
        screen.note(f"warning: {job.id}{more} cannot run: it {queue.why_stuck(job)}; "
                    "retry or release that job")
    status = _report(args, queue, screen, jobs,
                     lambda jobs: _say_added([*jobs], new, args, screen))
    if jobs and not args.wait:
        _note_no_worker(queue, screen, jobs)
    return status


@contextlib.contextmanager
def opened(args: argparse.Namespace, screen: Screen) -> Iterator[Queue]:
    """The queue of a command. Its jobs are read first (preset: `read`), so that an
    invalid command line creates no queue.
    """
    args.given = args.read(args) if "read" in args else None
    with Queue(args.path, create=args.entry.opens == CREATES) as queue:
        if queue.store.db.is_new:
            screen.note(f"made a new queue at {queue.path}")
        if queue.store.db.upgrade_backup:
            screen.note(f"upgraded {queue.path}; before that, it was copied to "
                        f"{queue.store.db.upgrade_backup}")
        yield queue


def cmd_worker_start(args: argparse.Namespace, link: Link, screen: Screen) -> int:
    # Flags that were not given are None: jobs and settings, read when they are needed,
    # decide, so a `config set` reaches a running worker.
    gpus = gpu_names(args.gpus) if args.gpus else ()
    options = WorkerOptions(
        len(gpus) or args.count or 1, args.name, tuple(args.queue), args.timeout,
        args.backoff_base, args.drain, args.max_jobs, args.grace, gpus)
    # Collecting garbage among all that is loaded took an eighth of a worker's time.
    gc.freeze()
    gc.set_threshold(100_000)
    with opened(args, screen) as queue:
        try:
            return run_worker(queue, options, link, Callbacks(
                (lambda line: None) if args.quiet else screen.log, args.ready,
                _bar(screen) if args.drain and screen.draws else None))
        finally:
            screen.clear()


def cmd_worker_stop(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    asked, caller = queue.stop_workers(*args.names, now=args.now), queue.caller()
    own = caller and caller.worker      # it waits for this very command
    if not asked:
        screen.note("no worker is running")
    for worker in asked:
        if worker.is_expired:
            screen.note(f"{worker.name} has sent no heartbeat for "
                        f"{span(queue.clock() - epoch(worker.heartbeat_at))}; it is "
                        "removed if none comes within "
                        f"{span(lease_of(queue.store.settings()))}")
    for worker, is_removed in Peers(queue).await_stop(
            [one for one in asked if one.name != own],
            math.inf if args.timeout is None else args.timeout):
        screen.note(worker.name + (" is removed: it sent no heartbeat" if is_removed
                                   else " has stopped"))
    if caller and any(one.name == own for one in asked):
        raise Refused("blocked", f"{own} runs {caller.id}, which runs this command, so "
                      "it stops when that job ends", "let the job end")


def cmd_worker_list(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    views = queue.workers()
    _view(args, screen, [worker_object(view) for view in views],
          worker_lines(views, screen.style()))
    _note_no_worker(queue, screen)


def _await_news(queue: Queue, screen: Screen, seen: int, seconds: float) -> None:
    """Wait for a commit, `seconds` at most; BrokenPipeError if nobody reads stdout."""
    end = time.monotonic() + seconds
    while queue.store.changes() == seen and (left := end - time.monotonic()) > 0:
        screen.check_reader()
        queue.await_change(seen, min(left, READER_TICK))


def cmd_status(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    """With --watch, redraw it in place on a terminal, else print it when it changes."""
    in_place = is_drawable(sys.stdout) and not args.json
    known, picture = None, ""
    try:
        while True:
            seen, status = queue.store.changes(), queue.status()
            lines, found = status_lines(status, screen.style()), status_object(status)
            if args.watch is None:
                _view(args, screen, found, lines)
                return
            what = status_object(status._replace(
                workers=[one._replace(heartbeat_at="") for one in status.workers],
                attention=[one._replace(message="") for one in status.attention]))
            if in_place:
                # The cursor stays above the picture, so a resize moves it along. Each
                # line is erased before, and what is below after (ECMA-48, EL and ED).
                # One line stays free: a picture that scrolls could not be drawn over.
                # ?7 is DEC's autowrap.
                lines = lines[:max(1, window().lines - 1)]
                picture = "\r\033[?7l" + "".join(
                    f"\033[K{line}\n" for line in lines) + "\033[?7h\033[J"
                screen.raw(f"{picture}\033[{len(lines)}A".encode())
            elif what != known:
                stamp = [f"-- {local_time(screen.style().now)}"] * bool(known)
                screen.out(*[dumps(found)] if args.json else [*stamp, *lines])
            known = what
            screen.flush()
            _await_news(queue, screen, seen, args.watch)
            time.sleep(min(args.watch, 0.1))    # at most ten pictures a second
    except KeyboardInterrupt:
        screen.raw(picture.encode())    # over what the terminal has echoed
        raise


def _filters(args: argparse.Namespace) -> dict[str, Any]:
    """The filters given as flags. The --queue of `edit` is a change: it has --in-queue.
    """
    given = vars(args)
    given = {**given, "queue": given.get("in_queue", given.get("queue"))}
    return {name: value for name, value in given.items() if value is not None
            and name in ("older_than", *SELECTORS)}


def _edits(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in flag_fields(args).items()
            if name != "queue" or "in_queue" in args}


def _output_of(queue: Queue, job: Job) -> bytes:
    """The output of a job's last run; b"" if it has none, or is gone by now."""
    try:
        run = queue.run(job.id)
    except NotFound:
        return b""
    return readable(run.output, run.output_bytes)


def cmd_list(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    filters, style, states = _filters(args), screen.style(), tuple(args.state or ())
    if args.json:   # by the page, or all in memory, if they are to be sorted
        limit, is_sorted = args.limit or 0, len(states) > 1 or args.sort != "newest"
        _print_json(({**job_object(job, args.fields or JSON_KEYS), **(
            {"output": _output_of(queue, job).decode("utf-8", "replace")}
            if args.show_output else {})} for job in (
                queue.jobs(states, args.sort, limit, **filters) if is_sorted
                else queue.pages(limit, state=states, **filters))), screen)
        return
    is_dlq = args.entry.words[0] == "dlq"
    limit = PEOPLE_LIMIT if args.limit is None else args.limit
    # One more, to know whether there are more.
    jobs = queue.jobs(states, args.sort, limit + 1 if limit else 0, **filters)
    shown = jobs[:limit or None]
    why = {} if not all(job.waits for job in shown) else {
        job_id: ", ".join(one.message for one in found) or "waits for a slot"
        for job_id, found in queue.hindrances(shown).items()}
    head, *lines = [""] if not shown else job_table(shown, style, why) \
        if not args.fields else field_table(shown, args.fields, style)
    if shown and not args.show_output:
        screen.out(head)
    for job, line in zip(shown, lines):
        screen.out(line)
        if args.show_output:
            screen.raw(_output_of(queue, job))
        elif is_dlq and job.error and not args.fields:
            screen.out(*(style.paint(part, DIM) for part in fold(
                "    " + one_line(job.error), style.width)))
    if not shown:
        screen.note("the dead letter queue is empty" if is_dlq and not filters
                    else "no such jobs" if filters or states
                    else "no jobs; `queuectl enqueue 'echo hi'` adds one")
    elif len(jobs) > len(shown):
        screen.note(f"there are more than {limit}; --limit 0 shows all")


def cmd_show(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    # Three reads, not one snapshot: a job that changes meanwhile may look inconsistent.
    job = queue.shown(args.id)
    reasons = queue.waiting_for(job)
    if args.json:
        _print_json(show_object(job, queue.runs(args.id), reasons), screen)
        return
    runs = queue.runs(args.id, SHOWN_RUNS)
    screen.out(*show_lines(job, runs, reasons, queue.store.settings(), screen.style()))
    output = _output_of(queue, job)
    if output:
        screen.out("", screen.style().paint(f"OUTPUT of run {runs[-1].number}", DIM))
        screen.raw(output if output.endswith(b"\n") else output + b"\n")


def _last_lines(output: bytes, n: int | None) -> bytes:
    """The last lines of it; None: all. A CR ends none: a progress bar is one line."""
    lines = output.split(b"\n")
    return output if n is None else \
        b"\n".join(lines[-n - output.endswith(b"\n"):]) * bool(n)


def followed(queue: Queue, job_id: str, only: int | None = None,
             lines: int | None = None, seen: int = 0) -> Iterator[tuple[bytes, str]]:
    """Yield what is new of a job's output at each step, and a note on a run that has
    ended before a retry, or "", until the job, or the run `only`, has ended.

    `lines`: of what is there already only the last ones; `seen`: bytes to skip. The job
    is read before its run: if it is over, the run's end was recorded in the same
    transaction, so no output is missed. Bytes are counted as printed: what is left out
    of the middle meanwhile is reported.
    """
    number, is_over = only, False       # of the current run; None: the last
    while not is_over:
        job = queue.job(job_id)
        try:
            run = queue.run(job_id, number)
        except NotFound as error:
            if job.state in OVER and number != only:    # cancelled before its retry
                return
            if job.state in OVER or error.code != "no-such-run":
                raise
            yield b"", ""       # it has not begun
            continue
        fresh = _last_lines(readable(run.output, run.output_bytes, seen), lines)
        number, seen, lines, note = run.number, run.output_bytes, None, ""
        if run.outcome is not None:
            is_over = only is not None or (
                job.state in OVER and run.number == queue.run(job_id).number)
            if not is_over:     # the next run may not have begun
                note = f"-- run {run.number} of {job_id}: {run.outcome}"
                number, seen = run.number + 1, 0
        yield fresh, note


def _follow(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    """Print output as it arrives until the jobs are over; of several, whole lines."""
    ids, caller = list(dict.fromkeys(args.ids)), queue.caller()
    if caller and caller.id in ids:
        raise Refused("blocked",
                      f"{caller.id} runs this command, so its output has no end",
                      "follow it from outside the job")
    left = {job_id: followed(queue, job_id, args.attempt, args.tail, args.start or 0)
            for job_id in ids}
    said, say_at, begun = set[str](), 0.0, dict.fromkeys(ids, b"")
    while left:
        screen.check_reader()
        jobs = queue.named([*left])
        if any(job.state == PROCESSING for job in jobs):
            queue.peek()
        if time.monotonic() >= say_at:
            _say_why(queue, screen, jobs, said)
            say_at = time.monotonic() + FALLBACK_POLL
        for job_id in [*left]:
            fresh, note = next(left[job_id], (b"", None))
            if len(ids) > 1:
                fresh = begun[job_id] + fresh
                end = fresh.rfind(b"\n") + 1 if note == "" else len(fresh)
                fresh, begun[job_id] = prefixed(
                    job_id, fresh[:end], ids.index(job_id), screen.style()), fresh[end:]
            if fresh:
                screen.raw(fresh)
            if note:
                screen.note(note)
            if note is None:
                del left[job_id]
        time.sleep(0.1 if left else 0)


def _start(run: Run, args: argparse.Namespace) -> int:
    """The byte that --from or --tail names, at the earliest the end of an omission."""
    start = args.start or 0
    if args.tail is None:
        return start
    is_whole = run.output_bytes == len(run.output)
    kept = run.output if is_whole else run.output[len(run.output) // 2:]
    return max(start, run.output_bytes - len(_last_lines(kept, args.tail)))


def cmd_logs(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    if not args.ids:
        job = queue.last_started()
        args.ids = [job.id]
        screen.note(f"-- {job.id}: {one_line(job.command)}")
    if args.follow:
        if args.json:
            raise Usage("--follow and --json do not go together",
                        "continue with --from and the `next` of the last result")
        _follow(args, queue, screen)
        return
    # Read all first: if one is missing nothing is printed.
    jobs = [queue.job(job_id) for job_id in args.ids]
    for job_id, why in _whys(queue, [job for job in jobs if not job.runs]).items():
        raise NotFound("no-such-run", f"{job_id} has not run yet", why)
    if any(queue.run(job_id, args.attempt).outcome is None for job_id in args.ids):
        queue.peek()
    runs = [queue.run(job_id, args.attempt) for job_id in args.ids]
    _say_why(queue, screen, jobs, set())
    if args.json:
        found = [output_object(job, run, _start(run, args), run.output_bytes)
                 for job, run in zip(jobs, runs)]
        _print_json(found if len(found) > 1 else found[0], screen)
        return
    for place, (job_id, run) in enumerate(zip(args.ids, runs)):
        output = _last_lines(readable(run.output, run.output_bytes, args.start or 0),
                             args.tail)
        screen.raw(prefixed(job_id, output, place, screen.style())
                   if len(args.ids) > 1 else output)


NOT_IDS, WHICH = "instead of ids", "which jobs"     # groups of flags that choose jobs
# What was done to jobs.
DONE_TO = {"retry": "pending again", "cancel": "cancelled", "delete": "deleted",
           "edit": "edited", "wait": "waited for", "hold": "held",
           "release": "released"}
# The states of the jobs to change, if none is named.
USUAL_STATES = {**STATES_FOR, "retry": (FAILED, DEAD, CANCELLED), "delete": OVER}


def _choice(verb: str, args: argparse.Namespace
            ) -> tuple[Sequence[str], dict[str, Any]] | None:
    """The states and filters that choose the jobs, or None if ids do; Usage."""
    filters, is_preset = _filters(args), "state" in args.entry.preset
    is_wide = bool(args.all or filters or (args.state and not is_preset))
    if bool(args.ids) == is_wide:
        flags = [one.names[0] for one in args.entry.options if one.group == NOT_IDS]
        raise Usage("ids and filters are both given" if is_wide
                    else "no jobs are named",
                    f"give ids, or {', '.join(flags[:-1])} or {flags[-1]}")
    if not is_wide:
        return None
    for name, value in filters.items():
        if value == "":     # as of a shell's variable that is not set
            raise Usage(f"--{name} is empty", "give a value, or leave it out")
    states = args.state or USUAL_STATES[verb]
    for state in states:
        if state not in STATES_FOR[verb]:
            raise Usage(f"{verb} does not apply to {state} jobs",
                        "it applies to: " + ", ".join(STATES_FOR[verb]))
    if "older_than" in filters and {*states} & {*WAITING}:
        raise Usage("--older-than applies only to finished jobs",
                    "choose from: " + ", ".join(OVER))
    return states, filters


def cmd_wait(args: argparse.Namespace, queue: Queue, screen: Screen) -> int:
    """Wait for jobs: with --all or --queue alone also for those added meanwhile."""
    choice, status, jobs = _choice("wait", args), EX_OK, list[Job]()
    job_ids = args.ids
    if choice and (args.state or {*choice[1]} - {"queue"}):
        job_ids = [job.id for job in queue.pages(state=choice[0], **choice[1])]
        if not job_ids:
            screen.note("no unfinished job matches")
    elif choice:
        bar = _bar(screen, queue, lambda: queue.jobs(
            WAITING, "oldest", PEOPLE_LIMIT, queue=args.queue))
        before = queue.last_event()
        done = queue.wait_all(args.queue, args.timeout, bar)
        screen.note(f"all jobs have finished: {done.completed} completed, "
                    f"{done.unsuccessful} dead or cancelled meanwhile")
        status = EX_NO if done.unsuccessful else EX_OK
        jobs = sorted(job for job in queue.named([event.id for event in (
            queue.events_since(before, END_OF_TIME, args.queue) if args.json else ())])
            if job.state in OVER)
    if job_ids:
        status, jobs = _await(queue, screen, job_ids, args.timeout)
    if args.json:
        _print_json(map(job_object, jobs), screen)
    return status


def _say_jobs(jobs: Iterable[Job], said: str, args: argparse.Namespace,
              screen: Screen) -> None:
    """Report what was done to jobs as it is done, also if it is interrupted."""
    if args.json:
        _print_json(map(job_object, jobs), screen)
        return
    n, first = 0, ""
    try:
        for job in jobs:
            n, first = n + 1, first or job.id
    except KeyboardInterrupt:
        screen.note(f"interrupted: {n:,} jobs {said}")
        raise
    if n or not args.ids:       # else all have completed before
        screen.note(f"{first} {said}" if n == 1 else
                    f"{n:,} jobs {said}" if n else "no such jobs")


def _amounts(queue: Queue, states: Sequence[str], filters: Mapping[str, Any]) -> str:
    """How many jobs fit: `12 completed, 3 dead`; "" if none does."""
    counted = [(queue.count(state, **filters), state) for state in states]
    return ", ".join(f"{n:,} {state}" for n, state in counted if n)


def _wide(verb: str, args: argparse.Namespace, queue: Queue, screen: Screen,
          choice: tuple[Sequence[str], Mapping[str, Any]]) -> Iterator[Job]:
    """Change all that fit, in small transactions; an interrupt keeps what is done."""
    states, filters = choice
    if not vars(args).get("yes", True):
        if not (sys.stdin and sys.stdin.isatty()):
            raise Usage("this needs confirmation, but stdin is not a terminal",
                        "give --yes")
        amounts = _amounts(queue, states, filters)
        try:
            if amounts:
                print(f"This will {verb} jobs: {amounts}. Continue? [y/N] ", end="",
                      file=sys.stderr, flush=True)
        except OSError as error:
            raise Unavailable("unwritable", "the question could not be written "
                              f"({error})", "give --yes") from None
        if amounts and sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Refused("declined", "nothing was changed", "answer y, or give --yes")
    done, skipped = 0, list[QueueError]()
    for batch in queue.sweep(verb, states, skipped.append, _edits(args), **filters):
        done += len(batch)
        screen.show(f"{done:,} jobs {DONE_TO[verb]} ...")
        yield from batch
    if skipped:
        screen.note(f"{len(skipped):,} left unchanged: {skipped[0]}")


def cmd_change(args: argparse.Namespace, queue: Queue, screen: Screen) -> int:
    """Change jobs; the last word of the command is the verb, and a method of Queue."""
    verb, edits = args.entry.words[-1], _edits(args)
    said, choice = DONE_TO[verb], _choice(verb, args)
    if verb == "edit":
        if not edits:
            raise Usage("nothing to change", "give a flag, as --priority 5")
        said += ": " + ", ".join(
            f"{key.replace('_', '-')} {span(one) if isinstance(one, float) else one}"
            for key, one in edits.items())
    change = queue.retry_dead if args.entry.words[0] == "dlq" else getattr(queue, verb)
    jobs = _wide(verb, args, queue, screen, choice) if choice \
        else change(*args.ids, **edits)
    return _report(args, queue, screen, jobs,
                   lambda jobs: _say_jobs(jobs, said, args, screen))


def cmd_purge(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    choice = states, filters = _choice("delete", args) or ((), {})
    if args.dry_run:
        amounts = _amounts(queue, states, filters)
        screen.note(f"would delete jobs: {amounts}" if amounts else "no such jobs")
        found = {"deleted": 0, "would_delete": queue.count(states, **filters)}
    elif args.json:
        jobs = _wide("delete", args, queue, screen, choice)
        found = {"deleted": sum(1 for _ in jobs)}
    else:
        _say_jobs(_wide("delete", args, queue, screen, choice), "deleted", args, screen)
    if args.json:
        _print_json(found, screen)


def cmd_cancel(args: argparse.Namespace, queue: Queue, screen: Screen) -> int:
    """Cancel jobs; wait until running ones have ended. 1 if all complete first."""
    choice = _choice("cancel", args)

    def ended() -> Iterator[Job]:
        running = list[Job]()       # ended together: each may take `kill-grace`
        for job in _wide("cancel", args, queue, screen, choice) if choice \
                else queue.cancel(*args.ids):
            if job.state == PROCESSING:
                running.append(job)
            else:
                yield job
        for job in await_ends(queue, running, screen.note):
            if job.state == CANCELLED:
                yield job
            else:
                screen.note(f"{job.id} was {job.state} before it could be cancelled")
    _say_jobs(ended(), "cancelled", args, screen)
    is_done = any(job.state == CANCELLED for job in queue.named(args.ids))
    return EX_OK if choice or is_done else EX_NO


def _named_queues(queues: Sequence[str]) -> str:
    return f"queue{'s' * (len(queues) > 1)} {', '.join(queues)}" if queues \
        else "all queues"


def cmd_pause(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    queue.pause(*args.queue)
    flags = "".join(f" --queue {name}" for name in args.queue)
    screen.note(f"{_named_queues(args.queue)} paused; running jobs continue; "
                f"`queuectl resume{flags}` ends the pause")


def cmd_resume(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    queue.resume(*args.queue)
    # Without names it ends only the pause of all queues together.
    left = ", ".join(view.name for view in queue.queues() if view.paused)
    screen.note((f"{_named_queues(args.queue)} resumed" if args.queue
                 else "the pause of all queues is over")
                + (f"; still paused: {left}" if left else ""))
    if queue.is_all_paused():
        screen.note("all queues are paused; `queuectl resume` ends that")


def cmd_queue_list(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    views = queue.queues()
    _view(args, screen, [queue_object(view) for view in views],
          queue_lines(views, screen.style()))
    if queue.is_all_paused():
        screen.note("all queues are paused; `queuectl resume` ends that")


def cmd_queue_set(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    queue.limit_queue(args.queue, args.limit)
    screen.note(f"queue {args.queue}: " + (
        f"at most {args.limit} at once" if args.limit else "no limit"))


def _scheduled(args: argparse.Namespace) -> dict[str, Any]:
    if args.entry.words[1] == "edit" and not args.words and not args.job:
        return flag_fields(args)
    if bool(args.words) == bool(args.job):
        raise Usage("a schedule needs one command",
                    "write -- PROG ARG... or a shell command in quotes")
    given = [{"command": shell_command(args.words)}] if args.words \
        else fields_of(args.job)
    if len(given) != 1:
        raise Usage("a schedule has one job", "add a schedule for each")
    return merged(given[0], flag_fields(args))


def cmd_schedule_add(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    timing = args.cron, args.tz, args.catch_up
    if args.entry.words[1] == "add":
        schedule = queue.add_schedule(args.name, args.cron, args.tz,
                                      args.catch_up is not False, **args.given)
    elif args.given or timing != (None, None, None):
        schedule = queue.edit_schedule(args.name, *timing, **args.given)
    else:
        raise Usage("nothing to change", "give a cron line, a command or a flag")
    screen.note(*when_lines(schedule, queue.clock()))
    _note_no_worker(queue, screen)


def cmd_schedule_list(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    found = [(one, queue.last_job(one)) for one in queue.schedules()]
    if args.json:       # a line per key, as there are few
        screen.out(dumps([schedule_object(*one) for one in found], 2))
    else:
        _view(args, screen, None,
              schedule_lines(found, screen.style()) if found else ())
    if not found:
        screen.note("no schedules; `queuectl schedule add NAME CRON -- PROG ARG...` "
                    "adds one")


def cmd_schedule_show(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    schedule = queue.schedule(args.name)
    last = queue.last_job(schedule)
    _view(args, screen, schedule_object(schedule, last),
          schedule_show_lines(schedule, last, queue.clock()))


def cmd_schedule_change(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    verb = args.entry.words[1]
    schedule = getattr(queue, f"{verb}_schedule")(args.name)
    said = {"remove": "removed; its jobs stay", "pause": "paused"}.get(verb)
    screen.note(*([f"{schedule.name} {said}"] if said
                  else when_lines(schedule, queue.clock())))


def cmd_schedule_run(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    screen.out(queue.run_schedule(args.name).id)


def cmd_events(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    after, since_when = 0, "" if args.since is None else iso(args.since)
    while True:     # by the page; `newest` first: read after it, it could skip a change
        seen, newest = queue.store.changes(), queue.last_event()
        page = queue.events_since(after, PAGE_SIZE, args.queue, since_when)
        style = screen.style()
        screen.out(*(line for one in page for line in (
            [dumps(event_object(one), None)] if args.json
            else fold(event_line(one, style), style.width))))
        if len(page) == PAGE_SIZE:      # there may be more
            after = page[-1].seq
            continue
        if not args.follow:
            return
        screen.flush()
        after = max([newest, *(one.seq for one in page[-1:])])
        _await_news(queue, screen, seen, FALLBACK_POLL)


def cmd_config_list(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    stored, style, found = queue.store.stored_settings(), screen.style(), {}
    lines = [style.paint(f"{'KEY':<20} {'VALUE':<8} {'DEFAULT':<8} MEANING", DIM)]
    for key, setting in SETTINGS.items():
        default, meaning = setting.default, setting.help
        value = stored.get(key, default)
        found[key] = {"value": value, "default": default, "meaning": meaning}
        shade = BOLD if key in stored else ""
        is_short = columns(one_line(value)) <= 8
        shown = style.paint(f"{one_line(value) if is_short else 'below':<8}", shade)
        lines.append(f"{key:<20} {shown} {default:<8} {meaning}")
        lines += [f"{'':<20} {style.paint(one_line(line), shade)}"
                  for line in value.split("\n") if not is_short]
    _view(args, screen, found, lines)


def cmd_config_get(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    screen.out(queue.setting(args.key))


def cmd_config_set(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    """Set a setting, or reset it (preset: `value` None)."""
    queue.configure(args.key, args.value)
    key = setting_key(args.key)
    screen.note(f"{key} = {one_line(queue.setting(key))}" + (
        " (the default)" if args.value is None else f": {SETTINGS[key].help}"))


def cmd_stats(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    stats, seconds = queue.stats(args.since), queue.covered(args.since)
    _view(args, screen, stats_object(stats, seconds),
          stats_lines(stats, seconds, screen.style()))


def cmd_check(args: argparse.Namespace, queue: Queue, screen: Screen) -> int:
    findings = Inspection(queue).findings()
    is_sound = all(finding.level != PROBLEM for finding in findings)
    _view(args, screen, {"sound": is_sound, "findings": [
        finding._asdict() for finding in findings]},
        finding_lines(findings, queue.path, screen.style()))
    return EX_OK if is_sound else EX_NO


def cmd_backup(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    queue.backup(args.file)
    with Queue(args.file, create=False) as copy:    # which verifies it
        jobs = sum(copy.counts().values())
    screen.note(f"{counted(jobs, 'job')} copied to {args.file}")


def cmd_web(args: argparse.Namespace, queue: Queue, screen: Screen) -> None:
    # The address comes before the site: whether strangers reach it decides whether a
    # token may be left out.
    family, address = resolved(args.host, args.port)
    site = site_of(args, address[0], os.environ, [queue.host.name])
    service = Service(site, queue.path, screen.log)
    listener = listen(service, args, family, address)
    if args.tls_cert is None and args.host not in ("localhost", "::1") \
            and not address[0].startswith("127."):
        screen.note("warning: without --tls-cert, others on the network can read the "
                    "token")

    def _announce() -> None:
        screen.out(printed_url(site, args.host, listener.server_address[1]))
        screen.flush()
    serve(listener, service, _announce)


def cmd_completion(args: argparse.Namespace, _: object, screen: Screen) -> None:
    import shlex  # 1 ms
    screen.out(SHELLS[args.shell].replace("PROGRAM", shlex.join(start_words()))
               .rstrip("\n"))


def cmd_install(args: argparse.Namespace, _: object, screen: Screen) -> None:
    import shlex
    import shutil
    is_root = hasattr(os, "geteuid") and os.geteuid() == 0
    to = os.path.expanduser(args.to or ("/usr/local" if is_root else "~/.local"))
    if to.startswith("~"):
        raise Refused("unsupported",
                      f"{to} has no meaning here: there is no home directory",
                      "give a directory: --to DIR")
    launcher = install(os.path.abspath(to))
    folder, found = os.path.dirname(launcher), shutil.which("queuectl")
    screen.out(launcher)
    if os.path.realpath(folder) not in [    # by any of its names
            os.path.realpath(entry) for entry in os.get_exec_path() if entry]:
        screen.note(f"{folder} is not on PATH; add this line to ~/.profile:\n"
                    f"    export PATH={shlex.quote(folder)}:\"$PATH\"")
    elif found and os.path.realpath(found) != os.path.realpath(launcher):
        screen.note(f"warning: on PATH, {found} comes before it")


def cmd_mcp(args: argparse.Namespace, _: object, screen: Screen) -> None:
    if args.worker and args.read_only:
        raise Usage("--worker and --read-only do not go together", "give one")
    out = Screen()      # unlike `screen` it stops when nobody reads

    def write(line: str) -> None:
        out.out(line)
        out.flush()

    tools = [tool for tool in TOOLS if not (tool.changes and args.read_only)]
    start = functools.partial(start_worker, args.path, "--drain", "--count",
                              str(args.worker)) if args.worker else None
    agent = Agent(args.path, tools, write, start)
    if sys.stdin and sys.stdin.isatty():
        screen.note("waiting for messages of an MCP client; press Ctrl+C to exit")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        serve_agent(agent, piped_stdin().fileno())


def cmd_version(args: argparse.Namespace, _: object, screen: Screen) -> None:
    _view(args, screen, {"version": __version__}, [f"queuectl {__version__}"])


def database_path(given: str | None) -> str:
    """As given, else as the environment says; `--db "$UNSET"` counts as none."""
    return given or os.environ.get("QUEUECTL_DB") or "queue.db"


class Option(NamedTuple):
    """One argument of a command: its names and settings as argparse takes them, and its
    group in the help. Its metavar tells completion what to offer.
    """
    names: tuple[str, ...]
    settings: dict[str, Any]
    group: str

    @property
    def dest(self) -> str:
        name: str = self.settings.get("dest", self.names[0].lstrip("-"))
        return name.replace("-", "_")


_TYPES: dict[str, Callable[[str], Any]] = {"N": parse_whole, "DUR": parse_duration}
_MANY = {"[]": "?", "...": "+", "[...]": "*"}


def option(shown: str, help: str, group: str = "", **settings: Any) -> Option:
    """An argument as it is shown, `--follow -f`, `--limit N`, `[ID...]`: a word without
    dashes is its metavar, which may imply its type.
    """
    *names, last = shown.split()
    if last.startswith("-"):
        switch = {"action": "store_true", "help": help, **settings}
        return Option((*names, last), switch, group)
    metavar = last.strip("[.]")
    settings = {"metavar": metavar, "help": help, **settings}
    if metavar != last:
        settings["nargs"] = _MANY[last.replace(metavar, "")]
    if metavar in _TYPES:
        settings.setdefault("type", _TYPES[metavar])
    return Option(tuple(names) or (settings.pop("dest", metavar.lower()),), settings,
                  group)


def _grouped(group: str, *options: Option) -> tuple[Option, ...]:
    return tuple(one._replace(group=group) for one in options)


def _flags_of(fields: Mapping[str, Field], use: str = "") -> tuple[Option, ...]:
    """The flags for the fields of that use. A wrong number or time is a usage error;
    text is checked with the job.
    """
    return tuple(
        Option(field.flags or ("--" + field.name.replace("_", "-"),),
               {"dest": field.name, "help": field.help, **field.kind.flag}, field.group)
        for field in fields.values() if use in field.uses)


def _changing(*options: Option) -> tuple[Option, ...]:
    """The flags of a command that keeps what is not given: they have no defaults."""
    return tuple(one._replace(settings={**one.settings, "help": re.sub(
        r" [(](the )?default.*[)]$", "", one.settings["help"])}) for one in options)


_JSON = option("--json", "print JSON and nothing else", "output")
_IDS = option("[ID...]", "the jobs", dest="ids")
_STATE_FLAG, *_FILTERS = _flags_of(FILTERS)
_FITTING = _grouped(WHICH, _STATE_FLAG, *_FILTERS)
_YES = option("--yes -y", "do not ask for confirmation; required with filters or "
              "--all if stdin is not a terminal")
_ALL = option("--all", "all jobs that the command applies to")
_WHICH = (_IDS, *_grouped(NOT_IDS, _ALL, _STATE_FLAG, *_FILTERS), _JSON)
_EDITS = _changing(*_flags_of(FIELDS, "u"))
# The --queue of `retry` chooses jobs.
_WAIT = option("--wait", "wait for the jobs; for one, exit with its status", "output")
_AGAIN = (*(one for one in _EDITS if one.dest != "queue"), _WAIT)
_QUEUES = option("--queue Q", "only this queue; repeatable (default: all)",
                 action="append", type=parse_name, default=[])
_SCHEDULED = (
    option("[COMMAND]", "a shell command; a program and its arguments go after --",
           dest="job"),
    option("--tz ZONE", "a time zone, such as Europe/Berlin (default: the local zone)"),
    option("--catch-up", "after missed runs, run once late (the default)",
           action="store_const", const=True, dest="catch_up"),
    option("--no-catch-up", "skip missed runs", action="store_const",
           const=False, dest="catch_up"), *_flags_of(FIELDS, "s"))
_WAIT_LIMIT = option("--timeout DUR", "wait at most this long")
_FOLLOW = option("--follow -f", "keep printing as more arrives")
_SCHEDULE = option("NAME", "the schedule's name")
_CRON_HELP = "minute hour day month weekday, a name such as @daily, or @every DUR"
_KEY = option("KEY", "the setting: " + ", ".join(SETTINGS))
_LIMIT = option("--limit -n N", "at most N; 0: all (default: 50; with --json: all)",
                "output")
_COLUMNS = option("--fields F,F", "only these keys of the job object, in this order",
                  "output", type=parse_keys)
_OLDER = option("--older-than DUR", "only jobs that finished at least this long ago",
                WHICH)
_WORKER_FLAGS = (   # flags of `worker start` that a service may have as well
    option("--count -c N", "slots: jobs at once (default: 1)",
           type=lambda text: parse_whole(text, 1, MAX_SLOTS)),
    option("--gpus LIST", "one slot for each of these GPUs: 0,1 or `all`; sets "
           "CUDA_VISIBLE_DEVICES of each job", type=parse_gpus),
    _QUEUES, option("--name NAME", "the worker's name (default: HOST-PID)",
                    type=parse_name),
    *_grouped("defaults for jobs that set none",
              option("--timeout DUR", "end a run after this time"),
              option("--backoff-base DUR", "wait after the first failure")),
    option("--grace DUR", "after a request to stop, requeue jobs that run longer",
           "when it exits"))
_OWN_UNIT = option("--user", "a unit of your own, not of the system")
_WEB_FLAGS = (
    option("--host HOST", "where to listen (default: 127.0.0.1, this machine only)",
           default="127.0.0.1"),
    option("--port -p N", "the port (default: 8080; 0: any free one)", default=8080,
           type=lambda text: parse_whole(text, 0, 65535)),
    option("--read-only", "allow no changes"),
    option("--no-auth", "require no token; on this machine only"),
    option("--tls-cert F", "serve TLS with this certificate (PEM)"),
    option("--tls-key F", "its key, if it is in another file"))


def _again(flag: Option, value: Any) -> list[str]:
    # The words of a flag, if it is not the default; for another directory.
    if value in (None, flag.settings.get("default")) or value is False:
        return []
    if flag.settings.get("metavar") == "F":
        value = as_utf8(os.path.abspath(value))
    if isinstance(value, float):
        value = f"{value:.3f}".rstrip("0").rstrip(".")
    return [flag.names[0], *[str(value)] * (value is not True)]


def cmd_systemd(args: argparse.Namespace, _: object, screen: Screen) -> None:
    """Print a unit file for this queue, which need not exist yet."""
    is_web = args.entry.words[1] == "web"
    starts = ["web"] if is_web else ["worker", "start"]     # and the flags once more
    try:
        for flag in args.entry.options:
            value = getattr(args, flag.dest)
            for one in value if isinstance(value, list) else [value]:
                starts += _again(flag, one) if flag is not _OWN_UNIT else ()
        path = as_utf8(os.path.abspath(system_path(args.path)))
        command = (*start_words(), "--db", path, *starts)
    except FileNotFoundError:
        raise Unavailable("unwritable", "the current directory is gone",
                          "change to another, or give an absolute --db") from None
    except UnicodeError:
        raise Refused("unsupported", "a path is not UTF-8, and systemd takes no other",
                      "rename its directories") from None
    screen.out(unit_file(command, path, args.user, is_web,
                         getattr(args, "grace", None)).rstrip("\n"))


# What a command does with the database. Only those that add or set something, or serve,
# create it: any other would hide a mistyped path. Those that only read stop once their
# results cannot be written.
CREATES, CHANGES, READS, NEITHER = "creates", "changes", "reads", "neither"


class Entry(NamedTuple):
    """One command. `also` are other tools' names for it; `preset` are values of
    arguments of `run` that it lacks.
    """
    words: tuple[str, ...]
    run: Callable[[argparse.Namespace, Any, Screen], int | None]
    help: str
    opens: str
    options: tuple[Option, ...] = ()
    examples: Sequence[str] = ()
    also: Sequence[str] = ()
    preset: Mapping[str, Any] = types.MappingProxyType({})


def _entry(name: str, run: Callable[[argparse.Namespace, Any, Screen], int | None],
           help: str, opens: str, *options: Option, eg: str, also: str = "",
           **preset: Any) -> Entry:
    return Entry(tuple(name.split()), run, help, opens, options, eg.split("\n"),
                 also.split(", ") if also else (), preset)


COMMANDS = (    # in the order of the help
    _entry(
        "enqueue", cmd_enqueue, "add a job, or many", CREATES,
        option("[JOB]", "a shell command, a JSON object or array, @FILE, or - for "
               "stdin; a program and its arguments go after --"),
        option("--file F", "one job per line: JSON or a shell command; with -- PROG "
               "ARG... each line replaces {} in an argument, or is appended; {#} is "
               "its number"),
        option("--null -0", "items end with NUL, as those of find -print0"),
        option("--stream", "add lines of stdin as they arrive"),
        *_flags_of(FIELDS, "e"),
        _WAIT,
        option("--quiet -q", "print ids only", "output"), _JSON,
        eg="enqueue 'make -C /src test' --priority 5 --timeout 30m\n"
           "enqueue -- convert 'my photo.png' out.jpg\n"
           "find . -name '*.log' -print0 | queuectl enqueue - -0 -- gzip -k {}",
        also="add, submit, push, put, new, create, run, exec, batch, sbatch, import",
        read=given_jobs),
    _entry(
        "worker start", cmd_worker_start, "run jobs until stopped", CREATES,
        *_WORKER_FLAGS, *_grouped(
            "when it exits",
            option("--drain", "exit once no job is running, due or waiting for a "
                   "retry"),
            option("--max-jobs N", "exit after this many runs")),
        option("--quiet -q", "log only errors"),
        option("--detach", "run in the background; return once the worker is ready"),
        option("--log FILE", "append the log to this file (default: stderr; with "
               "--detach: the database's path plus .log)", type=parse_path),
        eg="worker start --count 4\nworker start --gpus all --detach",
        also="start, run, work, daemon, up, drain, worker run"),
    _entry("worker stop", cmd_worker_stop,
           "stop workers once their running jobs have ended", CHANGES,
           option("[NAME...]", "the workers (default: all)", dest="names"),
           option("--now", "terminate the running jobs and requeue them"), _WAIT_LIMIT,
           eg="worker stop\nworker stop --now",
           also="stop, down, quit, shutdown, worker kill"),
    _entry("worker list", cmd_worker_list, "show the workers", READS, _JSON,
           eg="worker list --json", also="workers, worker ls, worker status"),
    _entry("status", cmd_status, "show counts, workers and the next job", READS,
           option("--watch [SECONDS]", "repeat on each change, and on a terminal every "
                  "SECONDS (default: 1)",
                  "output", const=1.0, type=_between(0.1)), _JSON,
           eg="status\nstatus --watch", also="st, stat, top"),
    _entry(
        "list", cmd_list, "show jobs, newest first", READS, *_FITTING, _LIMIT, _COLUMNS,
        option("--sort KEY", "one of " + ", ".join(ORDERS), "output",
               choices=tuple(ORDERS), default="newest"),
        option("--show-output -o", "also print the output of each", "output"), _JSON,
        eg="list --state pending,failed -n 9\nlist --state dead --tag nightly --json",
        also="ls, ps, jobs, squeue, atq"),
    _entry("show", cmd_show, "show one job in full, and why it does not run", READS,
           option("ID", "the job"), _JSON, eg="show job-1\nshow job-1 --json",
           also="get, info, inspect, describe, job"),
    _entry("logs", cmd_logs, "print the output of jobs", READS,
           option("[ID...]", "the jobs (default: the one started last)", dest="ids"),
           _FOLLOW,
           option("--attempt N", "the N-th run (default: the last)"),
           option("--tail N", "only the last N lines"),
           option("--from BYTE", "skip so many bytes of the full output; with --json, "
                  "continue with `next` of the last result", dest="start",
                  type=parse_whole), _JSON,
           eg="logs job-1 --tail 20\nlogs -f job-1 job-2",
           also="log, output, tail, cat, follow"),
    _entry("wait", cmd_wait, "wait until jobs have finished", READS, _IDS, *_grouped(
        NOT_IDS, option("--all", "all jobs, including those added meanwhile"),
        _STATE_FLAG, *_FILTERS), _WAIT_LIMIT,
        option("--quiet -q", "print no messages"), _JSON,
        eg="wait job-1\nwait --all --timeout 1h", also="join"),
    _entry("retry", cmd_change, "run jobs again, changed if you like", CHANGES,
           *_WHICH, *_AGAIN,
           eg="retry job-1 --timeout 1h\nretry --state dead --queue gpu",
           also="rerun, requeue, restart, redo"),
    _entry("cancel", cmd_cancel, "cancel jobs; terminate running ones", CHANGES,
           *_WHICH, _YES, eg="cancel job-1 job-2\ncancel --tag nightly",
           also="kill, abort, terminate, scancel"),
    _entry("hold", cmd_change, "keep waiting jobs from starting until `release`",
           CHANGES, *_WHICH, eg="hold job-1\nhold --tag nightly",
           also="suspend, stash"),
    _entry("release", cmd_change, "let held jobs start", CHANGES, *_WHICH,
           eg="release job-1\nrelease --all", also="unhold, unstash"),
    _entry("edit", cmd_change, "change waiting or dead jobs", CHANGES, _IDS,
           *_grouped(NOT_IDS, _ALL, _STATE_FLAG, *(
               one if one.dest != "queue" else
               option("--in-queue Q", "only of this queue", type=parse_name)
               for one in _FILTERS)), *_EDITS, _JSON,
           eg="edit job-1 --priority 9\nedit --in-queue gpu --queue night",
           also="update, modify, change, set"),
    _entry("delete", cmd_change,
           "delete jobs that are not running; by filter, finished ones", CHANGES,
           *_WHICH, _YES, eg="delete job-1\ndelete --state cancelled",
           also="rm, del, remove, atrm"),
    _entry("purge", cmd_purge, "delete finished jobs, or those that fit the filters",
           CHANGES, *_FITTING, _OLDER,
           option("--dry-run", "only print what would be deleted"), _YES, _JSON,
           eg="purge --state completed --older-than 7d\npurge --dry-run",
           also="clean, clear, prune, gc, flush", ids=[], all=True),
    _entry("dlq list", cmd_list, "show the dead jobs", READS,
           *_grouped(WHICH, *_FILTERS), _LIMIT, _COLUMNS, _JSON,
           eg="dlq --since 1h\ndlq list --fields id,exit_code,error",
           also="dead, failed, dlq ls, dlq show",
           state=[DEAD], sort="finished", show_output=False),
    _entry("dlq retry", cmd_change, "requeue dead jobs", CHANGES, _IDS,
           *_grouped(NOT_IDS, _ALL, *_FILTERS), *_AGAIN, _JSON,
           eg="dlq retry job-1\ndlq retry --all --timeout 1h", also="dlq requeue",
           state=[DEAD]),
    _entry("dlq purge", cmd_purge, "delete dead jobs", CHANGES,
           *_grouped(WHICH, *_FILTERS), _OLDER, _YES, _JSON,
           eg="dlq purge --older-than 30d\ndlq purge --yes",
           also="dlq rm, dlq delete, dlq clear",
           state=[DEAD], dry_run=False, ids=[], all=True),
    _entry("pause", cmd_pause, "start no more jobs until `resume`", CREATES, _QUEUES,
           eg="pause\npause --queue gpu", also="suspend, freeze"),
    _entry("resume", cmd_resume, "start jobs again", CHANGES, _QUEUES,
           eg="resume\nresume --queue gpu", also="unpause, continue"),
    _entry("queue list", cmd_queue_list, "show the queues", READS, _JSON,
           eg="queue list --json", also="queues, queue ls"),
    _entry("queue set", cmd_queue_set, "limit how many jobs of a queue run at once",
           CREATES, option("Q", "the queue", dest="queue"),
           option("--limit N", "jobs at once; 0: no limit", required=True),
           eg="queue set gpu --limit 1\nqueue set gpu --limit 0",
           also="limit, queue limit"),
    _entry(
        "schedule add", cmd_schedule_add, "add a recurring job", CREATES, _SCHEDULE,
        option("CRON", _CRON_HELP), *_SCHEDULED,
        eg="schedule add nightly '30 2 * * *' -- backup /home\n"
           "schedule add report '0 9 * * mon-fri' './report | mail -s report me'\n"
           "schedule add poll '@every 90s' --no-catch-up -- ./poll",
        also="cron, crontab, schedule create, schedule new", read=_scheduled),
    _entry("schedule edit", cmd_schedule_add, "change a schedule, from its next run on",
           CHANGES, _SCHEDULE, option("[CRON]", _CRON_HELP), *_changing(*_SCHEDULED),
           eg="schedule edit nightly '0 3 * * *'\nschedule edit nightly --timeout 2h",
           also="schedule update, schedule set", read=_scheduled),
    _entry("schedule list", cmd_schedule_list, "show the schedules", READS, _JSON,
           eg="schedule list --json", also="schedules, schedule ls"),
    _entry("schedule show", cmd_schedule_show, "show one schedule in full", READS,
           _SCHEDULE, _JSON, eg="schedule show nightly"),
    _entry("schedule remove", cmd_schedule_change, "remove a schedule; its jobs stay",
           CHANGES, _SCHEDULE, eg="schedule remove nightly",
           also="schedule rm, schedule delete"),
    _entry("schedule pause", cmd_schedule_change, "pause a schedule", CHANGES,
           _SCHEDULE, eg="schedule pause nightly", also="schedule stop"),
    _entry("schedule resume", cmd_schedule_change, "resume a schedule", CHANGES,
           _SCHEDULE, eg="schedule resume nightly", also="schedule start"),
    _entry("schedule run", cmd_schedule_run, "enqueue a schedule's job now", CHANGES,
           _SCHEDULE, eg="schedule run nightly", also="schedule trigger"),
    _entry("stats", cmd_stats, "show throughput, success rate and times", READS,
           option("--since DUR", "only the last DUR; at most 8 days"), _JSON,
           eg="stats\nstats --since 1h", also="metrics, statistics"),
    _entry("events", cmd_events, "show the state changes of jobs, oldest first",
           READS, _FOLLOW, *_flags_of({"queue": FILTERS["queue"]}),
           option("--since TIME", "only changes since then, or within DUR",
                  type=lambda text: parse_past(text, time.time())), _JSON,
           eg="events --since 1h\nevents --follow --json", also="history, watch"),
    _entry("config list", cmd_config_list, "show the settings", READS, _JSON,
           eg="config\nconfig list --json", also="settings, config ls, config show"),
    _entry("config get", cmd_config_get, "print a setting", READS, _KEY,
           eg="config get max-retries"),
    _entry("config set", cmd_config_set, "change a setting", CREATES, _KEY,
           option("VALUE", "its new value"),
           eg="config set max-retries 5\nconfig set on-dead "
              "'curl -fsS -d \"$QUEUECTL_JOB_ID\" localhost:9000'"),
    _entry("config unset", cmd_config_set, "reset a setting to its default",
           CHANGES, _KEY, eg="config unset max-retries",
           also="config reset, config rm", value=None),
    _entry(
        "web", cmd_web, "serve the dashboard, the API and the metrics", CREATES,
        *_WEB_FLAGS,
        eg="web\nweb --port 9000 --read-only\n"
           "web --host 0.0.0.0 --tls-cert cert.pem --tls-key key.pem",
        also="serve, server, dashboard, ui"),
    _entry("backup", cmd_backup, "make a consistent copy while workers run", READS,
           option("FILE", "where to write it; an older backup is replaced"),
           eg="backup /mnt/usb/queue.db", also="dump, copy, save, export"),
    _entry("check", cmd_check, "look for problems in the queue and its disk", READS,
           _JSON, eg="check --json", also="doctor, verify, fsck, health"),
    _entry("completion", cmd_completion, "print a completion script for a shell",
           NEITHER, option("SHELL", ", ".join(SHELLS), choices=tuple(SHELLS)),
           eg="completion bash", also="completions"),
    _entry("systemd worker", cmd_systemd, "print a systemd unit that runs a worker",
           NEITHER, *_WORKER_FLAGS, _OWN_UNIT,
           eg="systemd --count 4 --grace 5m\n--db /srv/jobs.db systemd --user",
           also="service, unit"),
    _entry("systemd web", cmd_systemd, "print a systemd unit that runs the dashboard",
           NEITHER, *_WEB_FLAGS, _OWN_UNIT,
           eg="systemd web --port 9000\nsystemd web --user --read-only"),
    _entry("install", cmd_install, "install this program, without pip or network",
           NEITHER, option("--to DIR", "where lib/queuectl and bin/queuectl go "
                           "(default: ~/.local; as root /usr/local)", type=parse_path),
           eg="install --to ~/.local", also="setup"),
    _entry("mcp", cmd_mcp, "serve AI agents over MCP, on stdin and stdout", NEITHER,
           option("--read-only", "omit the tools that change anything"),
           option("--worker N", "start a detached worker with N slots whenever a job "
                  "needs one; it exits when no work is left",
                  type=lambda text: parse_whole(text, 1, MAX_SLOTS)),
           eg="mcp --worker 4\n--db /srv/jobs.db mcp --read-only", also="agent"),
    _entry("version", cmd_version, "show the version", NEITHER, _JSON, eg="version"),
)
# What stands above a command in `queuectl help`.
HEADINGS = {"enqueue": "first steps", "list": "jobs", "pause": "queues and schedules",
            "stats": "history and settings", "web": "operation"}
TITLES = {"": "A background job queue for the command line",
          "dlq": "The dead letter queue: jobs that failed for good",
          "worker": "Workers run jobs in their slots",
          "config": "Settings, stored in the database", "queue": "Queues of jobs",
          "schedule": "Recurring jobs",
          "systemd": "Unit files by which systemd runs workers and the dashboard"}
# What `queuectl` alone prints where there is no queue yet.
WELCOME = """\
There is no queue at {path} yet. Begin with:

    queuectl enqueue 'echo Hello World'      add a job
    queuectl worker start                    run the jobs; Ctrl+C stops
    queuectl --help                          all commands"""
# Values by metavar, explained where a command takes one.
FORMATS = {
    "DUR": "a duration: 500ms, 30s, 5m, 2h, 1d, 1w, 1h30m, or seconds: 1.5",
    "TIME": "ISO 8601 (local time without a zone), epoch seconds, +DUR, or HH:MM",
    "CRON": "`30 2 * * mon-fri`, @hourly, @daily, @weekly, @monthly, @yearly",
    "CODES": "exit statuses and ranges of them: 2,64-78"}
# The end of `queuectl help`.
MANUAL = """\
values:
  DUR   {}
  TIME  {}
  CRON  {}
  ID, NAME, Q, T
        1 to 128 of the characters A-Z a-z 0-9 . _ : @ -

defaults:
  A job's own value comes first, then a flag of its worker (--timeout,
  --backoff-base), then the setting: `queuectl config list`.

exit status:
  0     done
  1     failed, or the answer is no: one line on stderr says why
  2     the command line is invalid
  124   `wait --timeout` expired
  130   interrupted by Ctrl+C; a worker or server shuts down and exits with 0
  `wait ID`, `enqueue --wait` and `retry --wait` exit with the status of their
  one job: 128+N if signal N ended it, 124 if it timed out.

environment:
  QUEUECTL_DB           the database, if there is no --db
  QUEUECTL_TOKEN        the token of `web`
  QUEUECTL_READ_TOKEN   one that cannot change anything
  NO_COLOR              if not empty: no colours
  A job has QUEUECTL_JOB_ID, QUEUECTL_ATTEMPT, QUEUECTL_QUEUE, QUEUECTL_CLAIM,
  QUEUECTL_SLOT and QUEUECTL_DB; a job of a template also QUEUECTL_ITEM.
  A hook (`config set on-dead`) has those of the job that has ended:
  QUEUECTL_JOB_ID, QUEUECTL_STATE, QUEUECTL_EXIT_CODE, QUEUECTL_ERROR,
  QUEUECTL_COMMAND, QUEUECTL_TAGS, QUEUECTL_SCHEDULE, QUEUECTL_OUTPUT_TAIL.

files:
  queue.db              the database, in the current directory, if no other is
                        named; beside it -wal and -shm (SQLite's), -lock (of
                        the workers) and .log (of `worker start --detach`)"""
_DB = option("--db PATH", "the database (default: $QUEUECTL_DB, else queue.db)",
             "options", default=argparse.SUPPRESS, type=parse_path)
_VERSION = option("--version", "show the version and exit", action="version",
                  version=f"queuectl {__version__}")
_HELP = option("--help -h", "show this help and exit", action="help")


# ---- 24 Main -----------------------------------------------------------------
# From a command line to an exit status. Parsing, help and completion build the parser
# of one command: argparse's subparsers would build those of all, which takes as long as
# everything else together. `main` returns the exit status to its callers; only
# argparse, after a help text, exits the process.

OFFERED = 200          # choices of completion at most
LOOKED_AT = 2000       # newest jobs of each state that completion reads

COMPLETE = "__complete"     # the command that completion scripts run
ASKS = ("-h", "--help", "--version")
MARK = "\0"            # completion: replaces the word under the cursor
# Values that the shell completes, by metavar.
PATHS = {"F": "files", "FILE": "files", "PATH": "files", "DIR": "dirs"}
# These take the words after the first `--` unchanged.
TAKE_WORDS = (cmd_enqueue, cmd_schedule_add)


def usual(entries: Sequence[Entry]) -> Entry:
    """Return the default command of a group, or of all: `status` or `list`."""
    return min(entries, key=lambda entry: (entry.words != ("status",),
                                           entry.words[-1] != "list"))


def _no_command(names: Sequence[str], group: Sequence[Entry]) -> Usage:
    wrong = " ".join(names[:2 if group else 1])
    meant = [f"`{' '.join(entry.words)}`" for entry in COMMANDS if wrong in entry.also]
    near = nearest(wrong, [" ".join(entry.words if group else entry.words[:1])
                           for entry in group or COMMANDS])
    return Usage(f"there is no command `{wrong}`",
                 f"did you mean {' or '.join(meant)}?" if meant else near or (
                     "there are: " + ", ".join(entry.words[1] for entry in group)
                     if group else "`queuectl --help` lists them"))


def find(words: Sequence[str]) -> tuple[Sequence[Entry], list[str]]:
    """Return the commands that these words may name, and the other words; Usage.

        --db x.db retry job-1 -> `retry`
        dlq --limit 5         -> `dlq list`, the `usual` one, before a flag
        dlq, help dlq         -> all of the group
        --db x.db, --help     -> COMMANDS

    Of the flags before the name only --db takes a value.
    """
    at = 0
    while at < len(words) and words[at].startswith("-"):
        if words[at] in ASKS:
            return COMMANDS, [*words]
        at += 2 if words[at] == "--db" else 1
    flags, names = [*words[:at]], [*words[at:]]
    if not names:
        return COMMANDS, flags
    if names[0] == "help":
        return find([*flags, *names[1:], "--help"])
    for length in (2, 1):
        for entry in COMMANDS:
            if entry.words == tuple(names[:length]):
                return [entry], [*flags, *names[length:]]
    group = [entry for entry in COMMANDS if entry.words[0] == names[0]]
    if group and (len(names) == 1 or names[1].startswith("-")):
        is_open = len(names) == 1 or names[1] in ASKS
        return group if is_open else [usual(group)], [*flags, *names[1:]]
    raise _no_command(names, group)


class Help(argparse.RawDescriptionHelpFormatter):
    def _split_lines(self, text: str, width: int) -> list[str]:
        return fold(" ".join(text.split()), width)     # textwrap breaks names at `-`


class Parser(argparse.ArgumentParser):
    """argparse, but errors are raised."""

    def error(self, message: str) -> NoReturn:
        raise Usage(message, f"see `{self.prog} --help`")

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except QueueError as error:
            raise argparse.ArgumentError(action, str(error)) from None

    def _print_message(self, message: str, file: object = None) -> None:
        # That of argparse ignores a full disk.
        screen = Screen()
        screen.out(message.rstrip("\n"))
        screen.flush()

    def parsed(self, words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        # With `--`, intermixed parsing would drop it and read flags after it.
        return self.parse_known_args([*words]) if "--" in words \
            else self.parse_known_intermixed_args([*words])


class Choice(argparse.Action):
    """A flag that chooses jobs. Given twice it is an error: if the last one counted,
    `delete --tag a --tag b` would delete more than was meant.
    """

    def __call__(self, parser: argparse.ArgumentParser, namespace: argparse.Namespace,
                 values: object, flag: str | None = None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"{flag} is given twice")
        setattr(namespace, self.dest, values)


def parser_of(entry: Entry, strict: bool = True) -> Parser:
    """Return a command's parser. If not strict, for completion, nothing is required or
    checked, there are no defaults, and all values of a flag are kept.

    No abbreviations: a new flag could change what `--run` means.
    """
    name = " ".join(("queuectl", *entry.words))
    usage = [{"?": "[{}]", "*": "[{} ...]", "+": "{} ..."}.get(
        one.settings.get("nargs", ""), "{}").format(one.settings["metavar"])
        for one in entry.options if not one.names[0].startswith("-")]
    metavars = [one.settings.get("metavar") for one in entry.options]
    examples = "\n".join(
        f"  {'' if '| queuectl' in example else 'queuectl '}{example}"
        for example in entry.examples)
    epilog = [*(["examples:", examples, ""] if examples else ()), *(
        f"{kind}: {text}" for kind, text in FORMATS.items() if kind in metavars),
        "Exit statuses, environment, files: `queuectl help`."]
    parser = Parser(
        prog=name, allow_abbrev=False, add_help=False,
        usage=" ".join((name, "[OPTION ...]", *usage)),
        description=entry.help[0].upper() + entry.help[1:] + ".",
        # argparse's usage line lists all flags, and its width needs shutil.
        formatter_class=lambda prog: Help(prog, width=window().columns - 2),
        epilog="\n".join(epilog) if entry.words else MANUAL.format(*FORMATS.values()))
    groups: dict[str, Any] = {}
    for one in (*entry.options, _DB, _HELP):
        title = one.group or (
            "options" if one.names[0].startswith("-") else "arguments")
        if title not in groups:
            groups[title] = parser.add_argument_group(title)
        settings = {"action": Choice, **one.settings} \
            if one.group in (NOT_IDS, WHICH) else one.settings
        if not strict:
            settings = {key: settings[key] for key in ("nargs", "dest")
                        if key in settings}
            if one.names[0].startswith("-"):
                settings["action"] = "append" if "metavar" in one.settings \
                    else "store_true"
            settings["default"] = argparse.SUPPRESS
        action = groups[title].add_argument(*one.names, **settings)
        action.required = action.required and strict
    # Because `-0` is a flag, argparse would read `-5` as one.
    parser._has_negative_number_optionals.clear()
    parser.set_defaults(entry=entry, words=None, **entry.preset)
    return parser


def _overview(entries: Sequence[Entry]) -> Entry:
    """Return an entry whose help lists a group of commands, or all."""
    words = () if entries is COMMANDS else entries[0].words[:1]
    name = " ".join(("queuectl help", *words))
    headings = {" ".join(entries[0].words): "commands"} if words else HEADINGS
    text = f"{TITLES[' '.join(words)]}.\n"
    for entry in entries:
        one = " ".join(entry.words)
        text += f"\n{headings[one]}:\n" if one in headings else ""
        text += f"  {one:<15}  {entry.help}\n"
    return Entry(
        words, lambda *_: EX_OK, f"{text}\nDetails: `{name} COMMAND`. "
        f"Without a command: `{' '.join(usual(entries).words)}`", NEITHER,
        (option("COMMAND", argparse.SUPPRESS), _VERSION))


def _unexpected(entry: Entry, extra: Sequence[str]) -> Usage:
    """Return the error for unexpected words. It suggests a flag only for one that no
    command has: `list --drain` is not a typing error.
    """
    flags = [name for one in entry.options for name in one.names if name[:2] == "--"]
    flag = extra[0].partition("=")[0]
    known = {name for one in COMMANDS for flag in one.options for name in flag.names}
    hint = nearest(flag, [*flags, "--db"]) \
        if flag.startswith("--") and flag not in known else ""
    if not hint and entry.run is cmd_enqueue:
        hint = "quote a command of several words, or write -- before it"
    return Usage(f"unexpected: {' '.join(extra)}",
                 hint or f"see `queuectl {' '.join(entry.words)} --help`")


def _as_utf8(word: str) -> str:
    try:
        return as_utf8(word)
    except UnicodeError:
        raise Usage(f"the argument {word!a} is not UTF-8",
                    "only words after `enqueue --` may be other bytes") from None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    entries, words = find(argv)
    asked = next((word for word in words if word in ASKS), None)
    if asked and len(entries) > 1:
        parser_of(_overview(entries)).parse_args([asked])   # prints, and exits
    entry, rest = usual(entries), None
    if entry.run in TAKE_WORDS and "--" in words:
        at = words.index("--")
        words, rest = words[:at], words[at + 1:]
    args, extra = parser_of(entry).parsed([_as_utf8(word) for word in words])
    if extra:
        raise _unexpected(entry, extra)
    if getattr(args, "gpus", None) and args.count:
        raise Usage("--gpus and --count are both given", "each GPU is one slot: give "
                    "only --gpus")
    try:
        args.words = rest and [word_bytes(word) for word in rest]
    except UnicodeError:
        raise Usage("a word after -- is not text", "give valid Unicode") from None
    return args


def unquoted(word: str) -> str:
    if not any(char in word for char in "\\'\""):
        return word
    import shlex  # 1 ms
    for end in ("", "'", '"'):      # closes an open quote
        with contextlib.suppress(ValueError):
            return "".join(shlex.split(word + end))
    return word


def _job_choices(rows: Rows, bounds: Mapping[str, Any],
                 states: Sequence[str]) -> list[tuple[str, str]]:
    found = [row for state in states
             for row in rows(Sql.NEWEST_IDS, state=state, **bounds)]
    found.sort(reverse=True)
    if bounds["word"] and len(found) < OFFERED:
        found += [row for row in rows(Sql.IDS_FROM, **bounds) if row[2] in states]
    return [(job_id, f"{state}: {command}")
            for _, job_id, state, command in dict.fromkeys(found)]


# The values in the database, by metavar; for NAME by command.
_IN_QUEUE: dict[str, Callable[..., Sequence[tuple[str, str]]]] = {
    "ID": _job_choices,
    "Q": lambda rows, *_: [(name, "") for name in sorted({
        *(name for name, *_ in rows(Sql.QUEUES)),
        *(name for name, _, n in rows(Sql.COUNTS) if n)} - {EVERY_QUEUE})],
    "T": lambda rows, bounds, _: [(tag, "") for tag, in rows(Sql.TAGS_FROM, **bounds)],
    "worker": lambda rows, *_: rows(Sql.WORKER_NAMES),
    "schedule": lambda rows, *_: rows(Sql.SCHEDULE_NAMES)}


def _values(entry: Entry, one: Option, word: str,
            path: str) -> Sequence[tuple[str, str]] | None:
    """Return the values of an argument, each with its meaning; None: of any kind.

    `glance` does not create, upgrade or wait. Few rows are read, by an index: `name >=
    word AND name < end` can use it, LIKE cannot (SQLite, "The LIKE Optimization").
    Names are ASCII without DEL.
    """
    kind, verb = one.settings.get("metavar", ""), " ".join(entry.words).split(" ")[-1]
    states = entry.preset.get("state", STATES_FOR.get(verb, STATES))
    if one is _KEY:
        return [(key, setting.help) for key, setting in SETTINGS.items()]
    fixed = one.settings.get("choices") or {"S": states, "F,F": JSON_KEYS}.get(kind)
    if fixed:
        return [(value, "") for value in fixed]
    if kind == "NAME" and entry.opens in (READS, CHANGES):      # not a new name
        kind = entry.words[0]
    if kind not in _IN_QUEUE or one.names[0] == "--id":
        return None
    bounds = {"word": word, "end": word + "\x7f", "look": LOOKED_AT, "limit": OFFERED}
    path = os.path.expanduser(os.path.expandvars(path))
    with contextlib.suppress(QueueError), glance(database_path(path)) as rows:
        return _IN_QUEUE[kind](rows, bounds, states)
    return ()


def _command_choices(entries: Sequence[Entry]) -> list[tuple[str, str]]:
    if entries is not COMMANDS:
        return [(entry.words[1], entry.help) for entry in entries]
    return [*{entry.words[0]: TITLES.get(entry.words[0], entry.help)
              for entry in entries}.items(), ("help", "explain a command")]


def offers(words: Sequence[str]) -> list[str]:
    """Return the lines for a completion script (Install); Usage for an invalid line.

    The words are unquoted; the last one is under the cursor. MARK replaces it, or the
    value in `--flag=value`, so that the parser shows which argument it belongs to. The
    choices are, in this order: values of a flag, flags, the rest of a command's name,
    values of another argument, or flags again if there are none.
    """
    *before, word = words or ("",)
    entries, rest = find(before)
    entry = _overview(entries) if entries is COMMANDS else usual(entries)
    if entry.run in TAKE_WORDS and "--" in rest:
        return ["\tfiles\t"]       # the words of the user's command
    flag, sign, value = word.partition("=")
    head, word = (flag + sign, value) if word.startswith("--") and sign else ("", word)
    args, extra = parser_of(entry, False).parsed([*rest, head + MARK])
    if extra not in ([], [MARK]):
        return []
    given = {name: value if isinstance(value, list) else [value]
             for name, value in vars(args).items()}
    options = (*entry.options, _DB, _HELP)
    one = next((one for one in options if MARK in given.get(one.dest, ())), None)
    # Long names, and a complete short one; given flags only if repeatable.
    choices: Iterable[tuple[str, str]] = [
        (name, one.settings.get("help", "")) for one in options
        if one.settings.get("action") in ("append", "extend") or one.dest not in given
        for name in one.names if name.startswith("--") or name == word != "-"]
    is_needed = one and (head or (one.names[0].startswith("-")
                                  and one.settings.get("nargs") != "?"))
    if one and (is_needed or not word.startswith("-")):
        metavar = one.settings.get("metavar")
        if metavar in PATHS:
            return [f"\t{PATHS[metavar]}\t{head}"]
        if metavar == "JOB" and word.startswith("@"):
            return ["\tfiles\t@"]
        found = _values(entry, one, word, next(filter(
            None, reversed(given.get("db", []))), ""))
        if is_needed or found is not None:
            choices = found or ()
    if not is_needed and not word.startswith("-") and len(entries) > 1:
        choices = _command_choices(entries)
    taken = given[one.dest] if one else ()
    return [f"{head}{choice}\t{cut(one_line(meaning), 60)}"
            for choice, meaning in choices
            if choice.startswith(word) and choice not in taken][:OFFERED]


def _told(action: Callable[[], int], as_json: bool = False) -> int:
    """Run an action and report its errors, but for bugs; return the exit status."""
    try:
        return action()
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    except BrokenPipeError:     # the reader has closed the pipe
        return EX_OK
    except QueueError as error:
        refusal = error
    except OSError as error:    # not converted by any function
        place = f": {error.filename}" if error.filename else ""
        limits = "see what `ulimit -a` allows" if error.errno in SCARCE else ""
        refusal = Refused("unsupported", f"{error.strerror or error}{place}", limits)
    except RuntimeError as error:
        if "new thread" not in str(error):
            raise
        refusal = Refused("unsupported", "the system allows no more threads",
                          "see what `ulimit -a` allows")
    return print_error(refusal, as_json)


def _run_supervised(args: argparse.Namespace, log: int = -1, report: int = -1) -> int:
    """Run a worker. It writes to stderr; once it is ready, to `log`, if there is one.

    Before that, a detached worker writes to the pipe `report`; then NUL, name, NUL.
    """
    def work(link: Link) -> int:
        if report >= 0:
            os.dup2(report, 2)
        with contextlib.ExitStack() as stack:
            stack.enter_context(log_on_stderr())

            def ready(name: str) -> None:
                if log >= 0:
                    stack.close()       # writes the rest
                    os.dup2(log, 2)
                    stack.enter_context(log_on_stderr())
                if report >= 0:     # BrokenPipeError if the caller has been killed
                    os.write(report, f"\0{name}\0".encode())
            args.ready, screen = ready, Screen(args.quiet)
            return _told(lambda: cmd_worker_start(args, link, screen))
    status, told = supervise(lambda link: _told(lambda: work(link)))
    if told:
        if log >= 0:
            os.dup2(log, 2)
        with log_on_stderr():
            Screen().log(f"error: {told}")
    return status


def _detach(args: argparse.Namespace, log: int) -> int:
    """Run a worker in a session of its own; return when it is ready or has failed."""
    reader, report = os.pipe()
    worker = os.fork()
    if not worker:
        try:
            os.setsid()
            null = os.open(os.devnull, os.O_RDWR)
            for number, source in enumerate((null, null, log)):
                os.dup2(source, number)
            # The caller may wait until nobody holds its pipes and locks. These are not
            # closed: a file object of Python would later close what has its number.
            for number in {*inherited()} - {log, report}:
                with contextlib.suppress(OSError):
                    os.fstat(number)    # it is open
                    os.dup2(null, number, inheritable=False)
            _told(lambda: _run_supervised(args, log, report))
        except Exception:   # a bug, which os._exit would hide
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(EX_OK)
    os.close(report)
    said = b""
    try:
        while said.count(b"\0") < 2 and (piece := os.read(reader, READ_SIZE)):
            said += piece
    except KeyboardInterrupt:
        os.kill(worker, signal.SIGTERM)
        raise
    notes, _, name = said.decode().rstrip("\0").partition("\0")
    screen = Screen(acts=True)
    screen.note(*notes.splitlines())
    if name:
        screen.out(f"worker {name} started; log: {args.log}")
        screen.finish()
    elif not notes:
        raise Unavailable("unsupported", "the worker died before it was ready",
                          f"see {args.log}")
    return EX_OK if name else EX_NO


def _start_worker(args: argparse.Namespace) -> int:
    _refuse_platform()
    if not args.log and not args.detach:
        return _run_supervised(args)
    args.log = os.path.abspath(args.log or f"{args.path}.log")
    try:    # does not wait for the reader of a FIFO
        log = os.open(system_path(args.log), os.O_WRONLY | os.O_CREAT | os.O_APPEND
                      | os.O_NONBLOCK | os.O_NOCTTY, 0o600)
    except OSError as error:
        raise Unavailable("unwritable", f"cannot write {args.log} ({error.strerror})",
                          "give another --log") from None
    return _detach(args, log) if args.detach else _run_supervised(args, log)


def _run(argv: Sequence[str]) -> int:
    args = _parse(argv)
    args.path = database_path(getattr(args, "db", None))
    entry = args.entry
    if entry.run is cmd_worker_start:
        return _start_worker(args)
    screen = Screen(getattr(args, "json", False) or getattr(args, "quiet", False),
                    acts=entry.opens != READS)
    try:
        with contextlib.ExitStack() as stack:
            if entry.run is cmd_web:
                stack.enter_context(log_on_stderr())
            queue = entry.opens != NEITHER and stack.enter_context(opened(args, screen))
            status = int(entry.run(args, queue, screen) or EX_OK)
    except Refused as error:
        # `queuectl` alone, where there is no queue yet, is no error.
        if error.code != "no-queue" or entry.words != ("status",) or "status" in argv:
            raise
        screen.out(WELCOME.format(path=os.path.abspath(args.path)))
        status = EX_OK
    finally:
        screen.clear()
    screen.finish()
    return status


def _open_standard_streams() -> None:
    """Open /dev/null for a closed stdin, stdout or stderr: the database would get the
    free descriptor, and output be written to it. sys.stdin stays None (`piped_stdin`).
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest number, this one
        if getattr(sys, name) is None and name != "stdin":
            setattr(sys, name, open(  # noqa: SIM115 (stays open)
                number, "w", encoding="utf-8", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # UTF-8 in any locale
            stream.reconfigure(
                encoding="utf-8", errors="backslashreplace",
                line_buffering=True if stream is sys.stderr else None)


def _complete(words: Sequence[str]) -> int:
    # Completion must never print a traceback.
    with contextlib.suppress(Exception):
        for line in offers([unquoted(_as_utf8(word)) for word in words]):
            print(line)
        sys.stdout.flush()
    return EX_OK


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line; return its exit status.

    `argv` excludes the program's name; the default is sys.argv[1:]. stdout and stderr
    are permanently changed to UTF-8.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        _open_standard_streams()
    except KeyboardInterrupt:
        return EX_INTERRUPTED
    end = words.index("--") if "--" in words else len(words)
    # Errors of parsing also need to know whether --json was given.
    status = _complete(words[2:]) if words[:1] == [COMPLETE] else _told(
        lambda: _run(words), "--json" in words[:end])
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):   # already reported, or of a log
            # The interpreter would flush the rest at exit, and report it.
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return status


if __name__ == "__main__":
    sys.exit(main())
