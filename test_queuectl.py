"""The tests of queuectl, in the order of its sections; real processes come last.

What holds only as a whole: Chaos, Model, CrashPoints, PowerCut (deaths and rivals at any
moment); Anywhere, ElsewherePosix, Services (where it runs); Readme (what it says).

MUTANTS and MOMENTS name functions of the module: they have to follow it.
"""

from __future__ import annotations

import argparse
import ast
import atexit
import collections
import contextlib
import copy
import datetime
import errno
import fcntl
import functools
import gc
import hashlib
import http.client
import importlib.util
import inspect
import io
import itertools
import json
import linecache
import marshal
import math
import multiprocessing.connection
import os
import pty
import random
import re
import resource
import select
import shlex
import shutil
import signal
import socket
import sqlite3
import ssl
import struct
import subprocess
import sys
import tempfile
import termios
import threading
import time
import traceback
import types
import unittest
import zipapp
import zoneinfo
from concurrent import futures
from typing import Callable, NamedTuple
from unittest import mock

import queuectl
from queuectl import (
    CANCELLED, COMPLETED, DEAD, FAILED, MOVES, PENDING, PROCESSING, STATES, SWEEP_BATCH,
    Heartbeats, Job, Outcome, Output, WorkerOptions, Queue)

MODULE = os.path.abspath(queuectl.__file__)
NOON = 1_800_000_000.0
NOBODY = 2 ** 22    # no process has this id: Linux gives at most one less
DEADLINE = 30.0     # seconds until a condition must hold
NEEDS_LOCKS = unittest.skipUnless(
    hasattr(fcntl, "F_OFD_SETLK"), "Python knows no locks of open files here")


def setUpModule():
    """Background jobs of a shell ignore SIGINT, children of nohup SIGHUP."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


class Telling(unittest.TestResult):
    """Keeps what a test reports, in a form that another process can take."""

    def __init__(self):
        super().__init__()
        self.told = []
        for verb in ("startTest", "stopTest", "addSuccess", "addSkip", "addDuration",
                     "addError", "addFailure"):
            setattr(self, verb, functools.partial(self.tell, verb))

    def addSubTest(self, test, subtest, err):
        if err is not None:
            self.tell("addFailure", test, err, subtest)

    def tell(self, verb, test, word=None, subtest=""):
        if isinstance(word, tuple):
            word = f"{subtest}\n" + "".join(traceback.format_exception(*word))
        self.told.append((verb, test.id(), *[word] * (word is not None)))


class Abreast(unittest.TestSuite):
    """Runs several tests at a time, each in another process: most of them only wait.

    A class that prepares something for all of its tests stays together, and comes first.
    """

    def run(self, result, debug=False):
        tests, together = {test.id(): test for test in self.each(self)}, {}
        for name, test in tests.items():
            is_shared = type(test).setUpClass.__func__ is not unittest.TestCase.setUpClass.__func__
            together.setdefault(type(test) if is_shared else name, []).append(test)
        missing = dict(enumerate(sorted(together.values(), key=len, reverse=True), 1))
        program()
        todo, give = os.pipe()
        os.write(give, b"".join(number.to_bytes(2, "big") for number in missing))
        os.close(give)
        workers = {self.worker(missing, todo) for _ in range(2 * (os.cpu_count() or 1))}
        while workers:
            for worker in multiprocessing.connection.wait(workers):
                try:
                    number, told = worker.recv()
                except EOFError:
                    workers.remove(worker)
                    os.wait()
                    continue
                missing.pop(number, None)
                self.report(result, tests, told)
                if result.shouldStop:
                    os.read(todo, 65536)
                    missing.clear()
        os.close(todo)
        for test in itertools.chain(*missing.values()):
            self.report(result, tests, [("startTest", test.id()), (
                "addError", test.id(), "its process died"), ("stopTest", test.id())])
        return result

    @staticmethod
    def worker(parts, todo):
        """Fork a process that runs parts while there are some; the pipe for its results."""
        told, tell = multiprocessing.Pipe(duplex=False)
        if os.fork() == 0:
            try:
                while number := int.from_bytes(os.read(todo, 2), "big"):
                    result = Telling()
                    unittest.TestSuite(parts[number]).run(result)
                    tell.send((number, result.told))
            finally:
                os._exit(0)
        tell.close()
        return told

    @staticmethod
    def report(result, tests, told):
        for verb, name, *words in told:
            if verb in ("addError", "addFailure"):
                words = [(AssertionError, AssertionError("\n" + words[0]), None)]
            getattr(result, verb)(tests.get(name) or unittest.suite._ErrorHolder(name), *words)

    def each(self, suite):
        for test in suite:
            yield from self.each(test) if isinstance(test, unittest.TestSuite) else [test]


def load_tests(_loader, tests, _pattern):
    """All tests of the module; a named class or test runs in this process."""
    return Abreast(tests)


@functools.cache
def program():
    """The words that start queuectl as an installed program, with its bytecode kept.

    Started by its path, it would be compiled each time, which takes longest.
    """
    place = tempfile.mkdtemp(prefix="queuectl program ")
    atexit.register(shutil.rmtree, place, True)
    entry = os.path.join(place, "queuectl")
    write_bytes(entry, f"""# -*- coding: utf-8 -*-
import sys
sys.pycache_prefix, sys.dont_write_bytecode = {place!r}, False
sys.path[0] = {os.path.dirname(MODULE)!r}
from queuectl import main
sys.exit(main())
""".encode())
    # At once: a start that may not write files would leave half of the bytecode.
    subprocess.run([sys.executable, entry, "--version"], check=True, stdout=subprocess.DEVNULL)
    return [sys.executable, entry]


def read_bytes(path):
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:
        return file.read()
    return b""


def write_bytes(path, content):
    with open(path, "wb") as file:
        file.write(content)


class FakeClock:
    """A wall clock that moves only by the test."""

    now = NOON

    def __call__(self):
        return self.now


def wait_for(condition, what="the condition", seconds=DEADLINE):
    """The condition's first true value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"waited {seconds} s in vain for {what}")
        time.sleep(0.01)
    return value


def settings(**changes):
    return queuectl.settings_of({})._replace(**changes)


def ticked(claims, free=(), ended=(), **report):
    """A tick, committed by this thread; slot 0 asks for a spare claim."""
    report = queuectl.Report(dict(ended), **{"is_heartbeat": True, **report})
    tick = wait_for(lambda: claims.tick(report, free), "the lock")
    try:
        claims.commit()
    except BaseException:
        claims.failed(tick)
        raise
    claims.committed(tick, report)
    for claim in tick.claims:
        note_start(claims, claim)
    return tick


def note_start(claims, claim):
    """Record that the command of a run was started, as a worker does."""
    if claim.slot and claims.lock >= 0:
        claims._host.locks.note(claims.lock, claims.worker.id, claim, NOBODY, queuectl.boot_time())


def ids(jobs):
    """The ids of jobs, or of the jobs of claims."""
    return [getattr(one, "job", one).id for one in jobs]


def output_of(text):
    output = Output(99)
    output.feed(text)
    return output


class Case(unittest.TestCase):
    """Each test has a directory, a database and a clock that it moves.

    Its queue and worker are made at first use. At the end that queue must be sound,
    unless the test has spoiled it.
    """

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="queuectl test ü ")
        self.addCleanup(shutil.rmtree, self.dir, True)
        self.clock, self.is_spoiled, self.numbers = FakeClock(), False, itertools.count()
        self.anew()

    def anew(self):
        """Begin with an empty queue, at noon."""
        self.path = self.path_of(f"{next(self.numbers) or 'queue'}.db")
        self.clock.now = NOON
        for name in ("queue", "claims"):
            vars(self).pop(name, None)

    def after(self, seconds):
        self.clock.now += seconds

    def path_of(self, name):
        return os.path.join(self.dir, name)

    def exists(self, name):
        return os.path.exists(self.path_of(name))

    def read(self, name):
        return read_bytes(self.path_of(name)).decode()

    def touch(self, name):
        write_bytes(self.path_of(name), b"")

    def forget(self, *names):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(self.path_of(name))

    def a_queue(self):
        queue = Queue(self.path, clock=self.clock)
        self.addCleanup(queue.close)
        return queue

    @functools.cached_property
    def queue(self):
        queue = self.a_queue()
        self.addCleanup(self.assert_sound, queue)
        return queue

    def worker(self, queue=None, port=None, slots=4, **options):
        return queuectl.Claims(queue or self.queue, WorkerOptions(slots=slots, **options), port)

    @functools.cached_property
    def claims(self):
        return self.worker()

    def problems(self, queue=None):
        return [one for one in queuectl.Inspection(queue or self.queue).findings()
                if one.level == queuectl.PROBLEM]

    def assert_sound(self, queue=None):
        """No counter, event or claim is wrong (I8)."""
        queue = queue or self.queue     # which may be closed
        if not self.is_spoiled:
            with Queue(queue.path, False, queue.clock) as again:
                self.assertEqual(self.problems(again), [])
            self.assertEqual(History(queue.path).violations(), [])

    def do(self, sql, **values):
        with self.queue.store.transaction() as store:
            store.do(sql, values)

    def spoil(self, sql):
        """Run a statement that leaves the database unsound."""
        self.is_spoiled = True
        self.do(sql)

    def job(self, command="true", **fields):
        return self.queue.enqueue(command, **fields)

    def jobs(self, these, **fields):
        """So many jobs; or one for each of these: an id, or the fields that it has."""
        return self.queue.enqueue_many([
            {"command": "true", **fields, **(one if isinstance(one, dict) else {"id": one})}
            for one in ([{}] * these if isinstance(these, int) else these)])

    def job_in(self, state):
        """A job that reached the state by the queue's own methods."""
        job = self.job(max_retries=1 if state == DEAD else 2)
        if state == CANCELLED:
            self.queue.cancel(job.id)
        elif state == PROCESSING:
            self.claim()
        elif state != PENDING:
            self.run_next(int(state != COMPLETED))
        self.assertEqual(self.state(job.id), state)
        return self.queue.job(job.id)

    def state(self, job_id):
        return self.queue.job(job_id).state

    def tick(self, free=0, ended=(), by=None, **report):
        """A tick of a worker; `free`: how many slots, or their numbers."""
        free = range(1, free + 1) if isinstance(free, int) else free
        return ticked(by or self.claims, free, ended, **report)

    def claim(self, by=None):
        """Claim the next job."""
        return self.tick(1, by=by).claims[0]

    def end(self, runs, how=0, by=None, free=0):
        """End a run, or several: with an exit status, a kind of end, or an outcome."""
        if isinstance(how, int):
            how = Outcome("failed" if how else "completed", how, None, 0.1)
        elif isinstance(how, str):
            how = Outcome(how)
        return self.tick(free, {
            getattr(one, "claim", getattr(one, "number", one)): how
            for one in (runs if isinstance(runs, list) else [runs])}, by)

    def run_next(self, how=0, by=None):
        """Claim the next job and end its run."""
        claim = self.claim(by)
        self.end(claim, how, by)
        return claim

    def begin(self, spare, slot):
        """Give a spare claim a slot."""
        begun = self.claims.begin(spare, slot)
        note_start(self.claims, begun)
        return begun

    def leave_behind(self, claims):
        """Make the worker look dead: no lock, and a row of an earlier boot."""
        let_go(claims.lock)
        self.do("UPDATE workers SET boot = 'earlier' WHERE id = :id", id=claims.worker.id)

    def lose(self, claim):
        """The worker of a run dies; another worker records it."""
        claim.release()
        return queuectl.Peers(self.queue).record(self.queue.run(claim.job.id))

    def a_socket(self, timeout):
        """For notifications; closed at the end."""
        wake_ups = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.addCleanup(wake_ups.close)
        wake_ups.bind((queuectl.LOOPBACK, 0))
        wake_ups.settimeout(timeout)
        return wake_ups

    def peers(self, claims=None, ages=()):
        """The other workers, for this one; `ages`: seconds without a heartbeat."""
        peers = queuectl.Peers(self.queue, (claims or self.claims).worker.id)
        peers._ages = dict(ages)
        return peers


def let_go(lock):
    """Close the descriptor of a lock; some platforms have no such locks."""
    if lock >= 0:
        os.close(lock)


def is_running(pid):
    """Whether the process lives; a zombie does not."""
    return bool(queuectl._stat_fields(int(pid)))


def child_of(pid):
    """The only child of a process, such as the worker of a supervisor; None: it has none."""
    for name in os.listdir("/proc"):
        if name.isdigit() and queuectl._stat_fields(int(name))[1:2] == [b"%d" % pid]:
            return int(name)
    return None


def members(path):
    """The processes of a queue's runs, by their environment."""
    mark, claim = b"QUEUECTL_DB=" + os.fsencode(path) + b"\0", b"QUEUECTL_CLAIM="
    environs = {pid: queuectl._read(f"/proc/{pid}/environ") for pid in queuectl._pids()}
    return [pid for pid, environ in environs.items()
            if mark in environ and claim in environ and is_running(pid)]


def kill(*pids, number=signal.SIGKILL):
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def run_cli(*argv):
    """(exit status, stdout, stderr) of a command line, in this process."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8", newline="", write_through=True)
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = queuectl.main(list(argv))
        except SystemExit as end:
            code = end.code
    return code, out.buffer.getvalue().decode(), err.getvalue()


@contextlib.contextmanager
def refused(code, words="", **facts):
    """A QueueError of that code ends the block, and is kept as `error`.

    `words` is a pattern in its text, `facts` are its attributes.
    """
    caught, facts = types.SimpleNamespace(error=None), {"code": code, **facts}
    try:
        yield caught
    except queuectl.QueueError as error:
        caught.error = error
    found = {name: getattr(caught.error, name, None) for name in facts}
    if found != facts or not re.search(words, str(caught.error)):
        raise AssertionError(f"{caught.error!r} {found}, not {facts} {words}")


def swept(queue, verb, state=(), /, **filters):
    """The ids of all jobs that a sweep has changed."""
    return [job.id for batch in queue.sweep(verb, state, **filters) for job in batch]


# ---- 0 Architecture ----------------------------------------------------------

def beside(name):
    """The text of a file beside the module."""
    with open(os.path.join(os.path.dirname(MODULE), name), encoding="utf-8") as file:
        return file.read()


class Architecture(unittest.TestCase):
    source = inspect.getsource(queuectl)
    tree = ast.parse(source)
    banners = re.findall(r"^# ---- (\d+) (\w+) -+$", source, re.M)
    readme = property(lambda self: beside("README.md"))
    tests = property(lambda self: inspect.getsource(sys.modules[__name__]))

    def test_no_definition_names_one_below_it(self):
        line = {node.name: node.lineno for node in self.tree.body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        self.assertEqual([(name.lineno, name.id) for node in self.tree.body
                          for name in ast.walk(node) if isinstance(name, ast.Name)
                          and line.get(name.id, 0) > name.lineno], [])

    def test_banners_are_the_contents_of_the_docstring(self):
        self.assertEqual(self.banners, re.findall(r"^ +(\d+) (\w+)  ", queuectl.__doc__, re.M))

    def test_each_invariant_is_cited_where_it_is_kept_and_where_it_is_tested(self):
        invariants = re.findall(r"^    \((I\d+)\) ", queuectl.__doc__, re.M)
        self.assertEqual(invariants, [f"I{n}" for n in range(1, len(invariants) + 1)])
        for text in (self.source.replace(queuectl.__doc__, ""), self.tests):
            self.assertEqual([name for name in invariants if not re.search(
                rf"\b{name}\b", text)], [])

    def test_the_readme_sends_who_changes_it_to_places_that_there_are(self):
        [table] = re.findall(r"^### To change it\n(.*?)^## ", self.readme, re.S | re.M)
        found = re.findall(r"`([A-Za-z_]+)`", table)
        self.assertGreater(len(found), 15)
        self.assertEqual([name for name in found if not re.search(
            rf"^ *(class |def )?{name}\b|= {name} = ", self.source + self.tests, re.M)], [])
        self.assertLessEqual(set(re.findall(r"\(([A-Z]\w+)[,;)]", table)),
                             {name for _, name in self.banners})

    def test_the_life_cycle_is_that_of_the_moves_wherever_it_is_drawn(self):
        drawn = re.search(r"^Life cycle\n\n(.*?)\n\nInvariants", queuectl.__doc__, re.S | re.M)[1]
        for verb, step in MOVES.items():
            self.assertRegex(drawn, rf"(?s){verb}.*{step.target}|{step.target}.*{verb}")
        self.assertIn(drawn, self.readme)

    def test_tables_and_records_name_the_same_filters_and_settings(self):
        self.assertLessEqual(set(queuectl.FILTERS) - {"state"}, set(queuectl.Sql.FILTERS))
        self.assertEqual(queuectl.Settings._fields, tuple(
            key.replace("-", "_") for key in queuectl.SETTINGS))

    def test_the_codes_of_errors_are_those_that_the_table_and_the_readme_list(self):
        classes = {"NotFound", "Conflict", "Unavailable", "Gone", "Refused"}
        raised = {node.args[0].value for node in ast.walk(self.tree)
                  if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
                  and node.func.id in classes and isinstance(node.args[0], ast.Constant)}
        raised |= {error.code for error in (queuectl.Usage(""), queuectl.Invalid(""),
                                            queuectl.Invalid("", key="id"))}
        self.assertEqual(classes | {"Invalid"},
                         {one.__name__ for one in queuectl.QueueError.__subclasses__()})
        [listed] = re.findall(r"The codes: (.*?)\.\n", self.readme, re.S)
        self.assertEqual({*re.findall("`(.*?)`", listed), "refused"}, raised)   # over HTTP

    def test_only_the_engine_names_sqlite3(self):
        first, last = (self.source[:self.source.index(f"# ---- {banner}")].count("\n")
                       for banner in ("7 SQLite ", "8 Host "))
        used = [node.lineno for node in ast.walk(self.tree)
                if isinstance(node, ast.Name) and node.id == "sqlite3"]
        self.assertTrue(used)
        self.assertEqual([n for n in used if not first < n < last], [])

    def test_importing_loads_the_standard_library_only_and_no_heavy_module(self):
        names = {alias.name.split(".")[0] for node in ast.walk(self.tree)
                 if isinstance(node, ast.Import) for alias in node.names}
        if hasattr(sys, "stdlib_module_names"):
            self.assertLessEqual(names, set(sys.stdlib_module_names))
        code = ("import sys, queuectl; print([m for m in ('subprocess', 'socket', "
                "'concurrent.futures', 'http', 'logging', 'dataclasses', 'urllib') "
                "if m in sys.modules])")
        self.assertEqual(subprocess.check_output(
            [sys.executable, "-S", "-c", code], cwd=os.path.dirname(MODULE)).strip(), b"[]")

    def test_the_project_file_and_the_readme_agree_with_the_module(self):
        for line in ('requires-python = ">=3.9"', "dependencies = []"):
            self.assertIn(f"# {line}\n", self.source)
            self.assertIn(f"{line}\n", beside("pyproject.toml"))
        words = {" ".join(entry.words) for entry in queuectl.COMMANDS}
        self.assertEqual([name for name in words if f"queuectl {name}" not in self.readme], [])
        self.assertEqual([name for entry in queuectl.COMMANDS
                          for name in entry.also if name in words], [])


# ---- 1 Words, 3 Rules --------------------------------------------------------

@contextlib.contextmanager
def local_zone(name):
    """Have local times be those of a zone."""
    try:
        with mock.patch.dict(os.environ, TZ=name):
            time.tzset()
            yield
    finally:
        time.tzset()


def each(case, function, table):
    """For each row, what the function makes of it is in its last column."""
    for *given, wanted in table:
        with case.subTest(given):
            case.assertEqual(function(*given), wanted)


class Words(Case):
    def test_durations(self):
        each(self, queuectl.parse_duration, (
            ("500ms", 0.5), ("30s", 30), ("1h30m", 5400), ("5min", 300),
            ("1w2d3ms", 777600.003), ("1.5", 1.5), ("1d", 86400), (2, 2), (0.5, 0.5)))
        for text in ("", "5x", "-1", -1, True, None, "1e99", math.inf, math.nan):
            with self.subTest(text), refused("invalid-value"):
                queuectl.parse_duration(text)

    def test_times(self):
        clock = datetime.datetime.fromtimestamp
        each(self, queuectl.parse_time, (
            ("2027-01-15T08:00:00Z", NOON, NOON), ("2027-01-15T09:00:00+01:00", NOON, NOON),
            ("+10m", NOON, NOON + 600), (str(int(NOON)), NOON, NOON),
            (NOON + 1, NOON, NOON + 1),
            (clock(NOON + 60).strftime("%H:%M"), NOON, NOON + 60),
            (clock(NOON + 61).strftime("%H:%M:%S"), NOON, NOON + 61),
            (clock(NOON).strftime(" %H:%M "), NOON, NOON + 86400),
            (clock(NOON).strftime("%H:%M"), NOON - 0.5, NOON)))
        for text in ("tomorrow", "25:00", "", None, True, "2026-13-01", 1e300, -1e300):
            with self.subTest(text), refused("invalid-value"):
                queuectl.parse_time(text, NOON)

    @unittest.skipUnless(hasattr(time, "tzset"), "POSIX")
    def test_a_local_time_that_is_skipped_or_repeated(self):
        """By the clock before the jump; a time of day that is repeated comes twice."""
        def parsed(text, now):
            now = queuectl.epoch(f"2027-{now}:00.000Z")
            return queuectl.iso(queuectl.parse_time(text, now))[5:16]
        with local_zone("CET-1CEST,M3.5.0,M10.5.0/3"):
            each(self, parsed, (    # 2027-10-31: 03:00 becomes 02:00; 03-28: 02:00 becomes 03:00
                ("2027-03-28T02:30", "01-01T00:00", "03-28T01:30"),
                ("2027-10-31T02:30", "01-01T00:00", "10-31T00:30"),
                ("02:30", "10-31T00:10", "10-31T00:30"), ("02:30", "10-31T00:30", "10-31T01:30"),
                ("02:15", "10-31T00:45", "10-31T01:15"), ("02:30", "10-31T01:30", "11-01T01:30"),
                ("02:50", "10-31T00:45", "10-31T00:50"), ("02:30", "03-28T00:10", "03-28T01:30"),
                ("02:30", "03-28T01:30", "03-29T00:30")))

    def test_a_stored_time_survives_the_way_to_a_number_and_back(self):
        for stamp in ("2026-11-24T08:22:13.123Z", "0001-01-01T00:00:00.000Z",
                      "9999-12-31T23:59:59.999Z", "1969-12-31T23:59:59.999Z"):
            self.assertEqual(queuectl.iso(queuectl.epoch(stamp)), stamp)

    def test_durations_and_moments_are_told_in_two_units_at_most(self):
        each(self, queuectl.span, (
            (0, "0s"), (0.0001, "1ms"), (0.0024, "2ms"), (0.008499, "8ms"), (0.00995, "0.01s"),
            (1, "1s"), (9.99, "9.99s"), (9.995, "10s"), (59, "59s"), (60, "1m"), (65, "1m 5s"),
            (3600, "1h"), (3720, "1h 2m"), (86400, "1d"), (273600, "3d 4h")))
        each(self, lambda away: queuectl.ago(queuectl.iso(NOON + away), NOON), (
            (0.999, "now"), (-0.999, "now"), (1, "in 1s"), (-1.5, "1s ago"), (1.5, "in 2s")))
        self.assertEqual(queuectl.ago(None, NOON), "-")

    def test_the_nearest_word_has_the_same_letters_or_most_of_them(self):
        each(self, queuectl.nearest, (
            ("abdc", ["abd", "abcd"], "did you mean `abcd`?"),
            ("pririty", ["state", "priority"], "did you mean `priority`?"),
            ("xyz", ["state", "priority"], "")))
        with refused("no-such-setting", "; .*config list"):
            queuectl.setting_key("xyz")
        for word, hint in (("deed", "did you mean `dead`?"), (5, "use pending, "),
                           ("xyz", "use " + ", ".join(STATES))):
            with self.subTest(word), refused("invalid-value") as caught:
                queuectl.parse_state(word)
            self.assertIn(hint, caught.error.hint)

    def test_exit_statuses_are_numbers_and_ranges(self):
        each(self, queuectl.parse_codes, (
            ("2", (2,)), (3, (3,)), ("66-64,2,65", (2, 64, 65, 66)), ("0-255", (*range(256),))))
        for text in ("256", "", "a", "-1", "1-", "1,,2", True, None):
            with self.subTest(text), refused("invalid-value", "use 2,64-78"):
                queuectl.parse_codes(text)


class Rules(Case):
    def test_backoff_doubles_up_to_its_cap_and_never_overflows(self):
        even, spread = settings(), settings(backoff_jitter=0.5)
        each(self, queuectl.backoff, (
            (1, 2.0, even, 0.5, 2.0), (2, 2.0, even, 0.5, 4.0), (3, 2.0, even, 0.5, 8.0),
            (10**6, 2.0, even, 0.5, 3600.0), (1, 2.0, spread, 0, 1.0), (1, 2.0, spread, 1, 3.0)))

    def test_every_outcome_leads_to_its_verb_and_says_why(self):
        job = self.job(max_retries=2)._replace(state=PROCESSING)
        done, ended = "exit status 0", "cancelled while it ran"
        lost, back = "its worker was lost", MOVES["release"].because
        for kind, attempts, crashes, asked, *wanted in (
                # ... verb, attempts and crashes that are charged, reason
                ("completed", 0, 0, None, "complete", 1, 0, done),
                ("completed", 0, 0, "cancel", "complete", 1, 0, done),
                ("failed", 0, 0, None, "fail", 1, 0, "failed"),
                ("failed", 1, 0, None, "bury", 1, 0, "failed"),
                ("failed", 0, 0, "cancel", "cancel", 0, 0, ended),
                ("timeout", 0, 0, None, "fail", 1, 0, "timeout"),
                ("timeout", 1, 0, None, "bury", 1, 0, "timeout"),
                ("cancelled", 0, 0, None, "cancel", 0, 0, ended),
                ("released", 1, 0, None, "release", 0, 0, back),
                ("released", 1, 0, "cancel", "cancel", 0, 0, ended),
                ("lost", 1, 0, None, "fail", 0, 1, lost),
                ("lost", 1, 4, None, "bury", 0, 1, "its worker was lost 5 times")):
            with self.subTest(kind=kind, attempts=attempts, crashes=crashes, asked=asked):
                verb, after, reason = queuectl.settle(
                    job._replace(attempts=attempts, crashes=crashes, end_requested=asked),
                    Outcome(kind), settings(), 0.5, NOON)
                self.assertEqual([verb, after.attempts - attempts, after.crashes - crashes, reason],
                                 wanted)

    def test_a_job_names_final_exit_statuses_and_its_longest_wait(self):
        job = self.job(max_retries=9, backoff_base=10, backoff_max=15, no_retry_on="2,64-78")
        each(self, lambda kind, code, attempts: (lambda verb, after, _: (
            verb, after.run_at))(*queuectl.settle(
                job._replace(attempts=attempts), Outcome(kind, code), settings(), 0.5, NOON)), (
            ("failed", 1, 0, ("fail", queuectl.iso(NOON + 10))),
            ("failed", 63, 1, ("fail", queuectl.iso(NOON + 15))),
            ("failed", 64, 0, ("bury", job.run_at)), ("failed", 78, 0, ("bury", job.run_at)),
            ("failed", 2, 0, ("bury", job.run_at)), ("completed", 0, 0, ("complete", job.run_at))))
        self.assertEqual([self.job(no_retry_on=value).no_retry_on for value in (5, 5.0, "5")],
                         ["5"] * 3)
        for text in ("", "a", "300", "2,", "1-", "0,-1", True, 2.5):
            with self.subTest(text), refused("invalid-job", key="no_retry_on"):
                self.job(no_retry_on=text)

    def test_only_a_failure_is_laid_to_the_worker_that_killed_the_run(self):
        job, silent = self.job()._replace(state=PROCESSING), queuectl.LEASE_EXPIRED
        for kind, judged, error in (("failed", "lost", silent), ("timeout", "lost", silent),
                                    ("completed", "completed", None),
                                    ("released", "released", None)):
            for asked, wanted in (("lost", (judged, error)), (None, (kind, None))):
                outcome = queuectl.judged(job._replace(end_requested=asked), Outcome(kind, 1))
                self.assertEqual((outcome.kind, outcome.error), wanted)

    def test_the_line_ends_at_the_first_job_that_needs_more_slots_than_are_free(self):
        """`2b`: a job of 2 slots in queue b."""
        job, anything = self.job(), {"a": 99, "b": 99}

        def chosen(line, slots, spares=0, room=anything):
            jobs, is_all = queuectl.choose([
                job._replace(seq=n, slots=int(one[0]), queue=one[1])
                for n, one in enumerate(line.split())], room.get, slots, spares)
            return [one.seq for one in jobs], is_all
        each(self, chosen, (
            ("1a 1b 1a 1b", 3, ([0, 1, 2], True)), ("1a 1b", 3, ([0, 1], False)),
            ("1a 1a", 0, ([], True)), ("", 1, ([], False)),
            ("1a 1b 1a 1b 1a 1b", 9, 0, {"a": 1, "b": 3}, ([0, 1, 3, 5], False)),
            ("2a 1a 1a", 1, ([], True)), ("1a 2a 1a", 2, ([0], True)),
            ("2a 1a 1a", 3, ([0, 1], True)), ("1a 2b 3a", 6, ([0, 1, 2], True)),
            ("2a 2a", 4, 0, {"a": 1}, ([0], False)),        # a limit counts jobs
            ("2b 1a", 1, 0, {"a": 1, "b": 0}, ([1], True)),     # what may not start
            ("2b 2b 1a 1a", 3, 0, {"a": 9, "b": 1}, ([0, 2], True)),
            ("1a 1a 1a 1a", 1, 2, ([0, 1, 2], True)),
            ("1a 1a 2a 1a", 1, 2, ([0, 1], True)),          # a spare has one slot
            ("2a 1a 1a", 1, 2, ([], True)), ("1a 2a 1a", 2, 2, ([0], True))))

    def test_jobs_are_held_ready_only_where_runs_are_quicker_than_a_commit(self):
        each(self, queuectl.wanted_spares, (
            (math.inf, 4, 0), (0.0101, 4, 0), (0.01, 4, 12), (0.01, 1, 3), (0.005, 2, 10),
            (0.003, 1, 8), (0.001, 2, 42), (0.001, 4, 64), (0.0, 1, 64), (0.0, 512, 64)))

    def test_only_watched_time_without_a_heartbeat_counts(self):
        for heartbeat, lease in ((5.0, 10.0), (1.0, 20.0)):     # 10 s between two looks
            look = functools.partial(lambda look, now, count, moment: look(
                {1: count}, moment, now)[1], Heartbeats().look,
                settings(heartbeat=heartbeat, lease=lease))
            each(self, look, (
                (5, 0.0, 0.0), (5, 4.0, 4.0), (5, 1000.0, 4.0),     # we were suspended
                (5, 1005.0, 9.0), (5, 1015.0, 19.0), (5, 1025.1, 19.0), (6, 1026.0, 0.0)))

    def test_output_keeps_both_ends_whatever_the_pieces(self):
        text = bytes(range(256)) * 1000
        for size in (1, 7, 4096, 300000):
            output = Output(101)
            for at in range(0, len(text), size):
                output.feed(text[at:at + size])
            self.assertEqual((output.kept(), output.total), (text[:50] + text[-51:], len(text)))
        for limit, kept in ((0, b""), (1, b"h"), (2, b"ah"), (3, b"agh")):
            output = Output(limit)
            output.feed(b"abcdefgh")
            self.assertEqual(output.kept(), kept)

    def test_output_holds_little_more_than_its_limit_and_one_piece(self):
        output = Output(100)
        for _ in range(5):
            output.feed(bytes(queuectl.READ_SIZE))
        self.assertLessEqual(sum(len(part) for part in vars(output).values() if isinstance(
            part, bytearray)), 2 * 100 + queuectl.READ_SIZE)

    def test_a_reader_gets_each_byte_once_or_is_told_what_is_missing(self):
        each(self, queuectl.readable, (
            (b"abcd", 4, 0, b"abcd"), (b"abcd", 4, 1, b"bcd"),
            (b"abgh", 8, 0, b"ab\n[... 4 bytes left out ...]\ngh"),
            *((b"abcdelmnop", 16, seen, fresh) for seen, fresh in (
                (4, b"e\n[... 6 bytes left out ...]\nlmnop"),
                (10, b"\n[... 1 bytes left out ...]\nlmnop"),
                (11, b"lmnop"), (14, b"op"), (16, b""), (17, b"")))))

    def test_the_last_line_that_says_something_stands_for_the_output(self):
        each(self, queuectl.last_line, (
            (b"", ""), (b" \n\n", ""), (b"a\n b \n\n \n", "b"), (b"caf\xff", "caf\ufffd"),
            (b"a\x1b[1mb\a\x1b[0m\n\x1b[0m", "ab "), (b"x" * 300, "x" * 200),
            (b"first\n" + b"y" * 2000, "y" * 200), (b"x" + b" " * 2000, "")))

    def test_percentiles_are_at_most_a_bucket_too_high(self):
        buckets = collections.Counter(queuectl.bucket_of(n / 1000) for n in range(1, 1001))
        self.assertAlmostEqual(queuectl.percentile(buckets, 0.5), 0.5, delta=0.05)
        self.assertAlmostEqual(queuectl.percentile(buckets, 0.99), 0.99, delta=0.1)
        self.assertIsNone(queuectl.percentile({}, 0.5))
        # On a bound lies what is below it; none is above the last.
        self.assertEqual(queuectl.percentile({0: 1, 5: 9}, 0.2), queuectl.BOUNDS[5])
        counts = queuectl.cumulated(collections.Counter(map(
            queuectl.bucket_of, (0.001, 0.001, 0.0011, *[1e12] * 4))))
        self.assertEqual((queuectl.bucket_of(1e12), counts[:2], counts[-2:]),
                         (len(queuectl.BOUNDS) - 1, [2, 3], [3, 7]))

    def test_a_summary_counts_each_kind_and_spreads_the_times(self):
        half, second, ten = map(queuectl.bucket_of, (0.5, 1.0, 10.0))
        done = queuectl.summary([
            ("enqueue", 0, 9, 0.0), ("complete", 0, 4, 0.0), ("complete", 0, 1, 0.0),
            ("fail", 0, 2, 0.0), ("bury", 0, 3, 0.0), ("cancel", 0, 6, 0.0),
            ("run:lost", 0, 7, 0.0), ("run_time", half, 90, 45.0),
            ("run_time", second, 8, 8.0), ("run_time", ten, 2, 20.0),
            ("wait_time", second, 2, 2.0)])
        self.assertEqual(done[:8], (
            9, 5, 2, 3, 6, 7, (100, 0.73, 0.5, 1.0, 10.0), (2, 1.0, 1.0, 1.0, 1.0)))
        self.assertEqual(queuectl.summary([])[:7], (*[0] * 6, (0, None, None, None, None)))


# ---- 4 Cron ------------------------------------------------------------------

HAS_ZONES = "Europe/Berlin" in zoneinfo.available_timezones()
UTC = datetime.timezone.utc

# Days before a change of a zone's clocks.
ZONE_CHANGES = [(zone, day) for zone, *days in (
    ("Europe/Berlin", "2024-03-30", "2024-10-26"), ("America/New_York", "2024-03-09", "2024-11-02"),
    ("Australia/Lord_Howe", "2024-04-06", "2024-10-05"),    # half an hour
    ("America/Sao_Paulo", "2018-11-03", "2018-02-17"),      # 0:00 is skipped, 23:00 repeated
    ("Antarctica/Troll", "2024-03-30", "2024-10-26"),       # two hours
    ("Pacific/Apia", "2011-12-29", "2012-03-31"),           # a day is skipped
    ("Europe/Dublin", "2024-03-30", "2024-10-26"),          # winter is the odd time
    ("Antarctica/Casey", "2018-03-10", "2018-10-06"),       # three hours back, and on
    ("Asia/Kathmandu", "1985-12-31"),                       # 15 minutes on
    ("Pacific/Kwajalein", "1993-08-20")) for day in days]
SPAN = 4 * 86400        # seconds from such a day that hold the change
WILD, FIXED = "*/10 * * * *", "5,30 0-5 * * *"


def stamp(text: str, zone: datetime.tzinfo = UTC) -> float:
    """Epoch seconds of a local time; of a repeated one the first."""
    return datetime.datetime.fromisoformat(text).replace(tzinfo=zone).timestamp()


class JumpyZone(datetime.tzinfo):
    """A zone whose clock is set on by some minutes at one moment, and perhaps back."""

    def __init__(self, at: float, minutes: int, back: float = math.inf) -> None:
        self.at, self.back = at, back
        self.offsets = (datetime.timedelta(minutes=-(minutes // 2)),
                        datetime.timedelta(minutes=minutes - minutes // 2))

    def fromutc(self, when):
        is_later = self.at <= when.replace(tzinfo=UTC).timestamp() < self.back
        return (when + self.offsets[is_later]).replace(fold=is_later)

    def utcoffset(self, when):
        return self.offsets[when.fold]


def random_field(dice: random.Random, low: int, high: int) -> tuple[str, set[int]]:
    """A field of a cron line and the values that it stands for."""
    full = range(low, high + 1)
    step, some = dice.randint(1, len(full)), dice.choices(full, k=dice.choice((1, 1, 3)))
    first, last = sorted(dice.choices(full, k=2))
    text, values = dice.choice((
        ("*", full), ("*", full), (f"*/{step}", full[::step]),
        (f"{first}-{last}", range(first, last + 1)),
        (f"{first}-{last}/{step}", range(first, last + 1, step)),
        (f"{last},{first}-{last}", range(first, last + 1)),
        *[(",".join(map(str, some)), some)] * 2))
    return text, set(values)


def random_cron(dice: random.Random, days: bool = True) -> tuple[str, list[set[int]]]:
    """A cron line and the values of its fields; `days`: not on every day."""
    ranges = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 7))
    fields = [random_field(dice, low, high) for low, high in ranges]
    if not days:
        fields[2:] = [("*", set(range(low, high + 1))) for low, high in ranges[2:]]
    return " ".join(text for text, _ in fields), [values for _, values in fields]


def comes(line: str, values: list[set[int]], minute: int) -> bool:
    """Whether a cron line matches a local minute since 1970, as find_jobs of cron.c."""
    if minute % 60 not in values[0] or minute // 60 % 24 not in values[1]:
        return False
    when = datetime.date(1970, 1, 1) + datetime.timedelta(days=minute // 1440)
    days = [when.day in values[2], when.isoweekday() % 7 in {n % 7 for n in values[4]}]
    has_star = any(line.split()[field][0] == "*" for field in (2, 4))
    return (all if has_star else any)(days) and when.month in values[3]


def ticks(start: int, end: int, zone: datetime.tzinfo) -> list[tuple[int, list, list]]:
    """The main loop of Debian's cron, minute by minute: when it wakes up in (start, end], the
    local minutes for which it runs wildcard jobs, and those for fixed times.

    Only the clock is read better: cron.c asks for the offset when tm_isdst has changed.
    """
    virtual, running, found = None, None, []
    for moment in range(start - 2 * 86400, end + 1, 60):
        local = datetime.datetime.fromtimestamp(moment, zone)
        clock = int(moment + local.utcoffset().total_seconds()) // 60
        if clock == running:
            continue
        running = clock
        virtual = clock - 1 if virtual is None else virtual
        diff, wild, fixed = clock - virtual, [clock], []
        if 0 < diff <= 180:
            fixed = list(range(virtual + 1, clock + 1))
            wild = fixed if diff <= 5 else wild
        elif not -180 < diff <= 0:
            fixed = [clock]
        virtual = clock if fixed else virtual
        if moment > start:
            found.append((moment, wild, fixed))
    return found


def walk(line: str, start: float, end: float, zone: datetime.tzinfo | None = None) -> list[float]:
    cron = queuectl.parse_cron(line)
    runs = [queuectl.first_run(cron, start, zone)]
    while runs[-1] <= end:
        runs.append(queuectl.first_run(cron, runs[-1], zone))
    return runs[:-1]


@unittest.skipUnless(HAS_ZONES, "there are no time zones on this machine")
def schedule(cron):
    return queuectl.Schedule("s", cron, {}, False, queuectl.iso(NOON), "", None, None, "UTC",
                             0, None)


class Cron(unittest.TestCase):
    berlin = zoneinfo.ZoneInfo("Europe/Berlin") if HAS_ZONES else None

    def test_a_field_is_read_as_debian_reads_it(self):
        each(self, lambda line, field: getattr(queuectl.parse_cron(line), field), (
            ("5,1,5,03 * * * *", "minutes", (1, 3, 5)), ("*/60 * * * *", "minutes", (0,)),
            ("58-59,*/30 * * * *", "minutes", (0, 30, 58, 59)), ("0 */24 * * *", "hours", (0,)),
            ("0 0 1 jan,MAR-May *", "months", (1, 3, 4, 5)),
            ("0 0 1 jan-dec/6 *", "months", (1, 7)), ("0 0 1 11-Dec *", "months", (11, 12)),
            ("0 0 * * 5-7", "weekdays", (0, 5, 6)), ("0 0 * * 1-7/2", "weekdays", (0, 1, 3, 5)),
            ("0 0 * * Sun-SAT", "weekdays", (*range(7),)), ("0 0 * * */7", "weekdays", (0,)),
            (" 0\t0 *  * tue,fri ", "weekdays", (2, 5)),
            ("0 0 * * fri-sat,sun-mon", "weekdays", (0, 1, 5, 6)),      # as hints say
            ("0 0 * * 6-sat,sun-0", "weekdays", (0, 6)), ("0 0 1,* * 1", "is_either", True),
            ("0,* 0 * * *", "is_wild", False), ("*,0 0 * * *", "is_wild", True)))

    def test_a_name_stands_for_five_fields(self):
        each(self, queuectl.parse_cron, ((name, queuectl.parse_cron(line)) for name, line in (
            ("@yearly", "0 0 1 1 *"), ("@annually", "0 0 1 1 *"), ("@monthly", "0 0 1 * *"),
            ("@weekly", "0 0 * * 0"), ("@daily", "0 0 * * *"), ("@midnight", "0 0 * * *"),
            ("@hourly", "0 * * * *"), (" @Daily ", "0 0 * * *"))))

    def test_a_mistake_is_named_with_its_field_and_with_what_to_write(self):
        fields = "minute", "hour", "day of month", "month", "day of week"
        for place, hint, texts in (
                (0, "0 to 59", "60 -5 5- 1,,2 1-2-3 *-5 *5 1.5 +5 \u0665"),
                (1, "0 to 23", "24 jan"), (2, "1 to 31", "0 32 L"),
                (3, "1 to 12 or jan to dec", "13 0 mon"),
                (4, "0 to 7 or sun to sat", "8 Friday"), (0, "1 to 60", "*/0 */61 */ */2/3"),
                (1, "1 to 24", "1-5/25"), (2, "1 to 31", "*/32"), (0, "use 5-59/15", "5/15"),
                (1, "use two: 22-23,0-2", "22-2"), (4, "use two: Fri-sat,sun-mon", "Fri-mon")):
            for text in texts.split():
                with self.subTest(text), refused("invalid-value", fields[place]) as caught:
                    queuectl.parse_cron("* " * place + text + " *" * (4 - place))
                self.assertIn(hint, caught.error.hint)
        for line, words, hint in (
                ("", "0 fields, not 5", "minute, hour, day of month"), ("*", "1 field, ", "minute"),
                ("0 0 * * * *", "6 fields", "30 2 * * mon-fri"),
                ("@reboot", "not a time", "enqueue"), ("@dayly", "not a schedule", "@daily"),
                ("@daily x", "not a schedule", "@daily"),
                ("0 0 31 2 *", "never comes: .* a day 31", "another day or month"),
                ("0 0 30-31 feb */2", "never comes: .* a day 30", "month")):
            with self.subTest(line), refused("invalid-value", words) as caught:
                queuectl.parse_cron(line)
            self.assertIn(hint, caught.error.hint)

    def test_a_day_is_taken_if_its_month_can_have_it(self):
        for month, last in enumerate((31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31), 1):
            self.assertLess(self.first(f"0 0 {last} {month} *", "2024-01-01"), math.inf)
            for day in range(last + 1, 32):
                with self.subTest(month=month, day=day), refused("invalid-value"):
                    queuectl.parse_cron(f"0 0 {day} {month} *")

    def first(self, line, after, zone=UTC, clock=None):
        return queuectl.first_run(queuectl.parse_cron(line), stamp(after, zone), clock or zone)

    def test_the_next_run_is_strictly_after_the_moment(self):
        rows = (("*/5 * * * *", "2024-05-01T10:00", "2024-05-01T10:05"),
                ("*/5 * * * *", "2024-05-01T09:59:59.999", "2024-05-01T10:00"),
                ("*/5 * * * *", "2024-05-01T10:00:00.001", "2024-05-01T10:05"),
                ("59 23 31 12 *", "2024-12-31T23:59", "2025-12-31T23:59"),
                ("0 0 13 * fri", "2024-05-10", "2024-05-13"),
                ("0 0 29 2 *", "2096-03-01", "2104-02-29"),
                ("0 0 29 2 */7", "2072-01-01", "2088-02-29"),
                ("0 0 29 2 */7", "2088-03-01", "2128-02-29"),
                ("0 0 * * *", "1969-12-30T12:00", "1969-12-31"),
                ("0 0 * * *", "1960-02-28T12:00", "1960-02-29"))
        for name in ("UTC", "Europe/Berlin", "Pacific/Kiritimati", "Pacific/Pago_Pago"):
            zone = zoneinfo.ZoneInfo(name)
            each(self, self.first, ((line, after, zone, stamp(run, zone))
                                    for line, after, run in rows))

    def test_a_jump_of_three_hours_is_a_correction_and_one_of_minutes_a_late_wake_up(self):
        jump, daily, hourly = int(stamp("2024-05-01T12:00")), "%M %H * * *", "%M * * * *"
        for minutes, line, count in (   # that the clock is set on; runs within or after these
                (179, daily, 1), (180, daily, 0), (240, daily, 0), (-180, daily, 1),
                (-181, daily, 2), (-240, daily, 2), (1, hourly, 1), (4, hourly, 1), (5, hourly, 0)):
            zone, span = JumpyZone(jump, minutes), abs(minutes) * 60
            within = jump + zone.offsets[0].total_seconds() + 60 * (minutes // 2)
            with self.subTest(minutes=minutes):
                line = time.strftime(line, time.gmtime(within))
                runs = walk(line, jump - span, jump + span, zone)
                self.assertEqual(len(runs), count)
                self.assertTrue(minutes < 0 or runs == [jump] * count)

    def test_clocks_set_on_for_two_days_are_followed_there_and_back(self):
        zone = JumpyZone(stamp("2024-05-01T06:00"), 60, stamp("2024-05-03T06:00"))
        self.assertEqual(self.first("0 12 2 * *", "2024-05-01", UTC, zone),
                         stamp("2024-05-02T11:30"))

    def agree(self, dice, zone, start: int, end: int, count: int) -> None:
        woken = ticks(start, end, zone)
        for number in range(count):
            line, values = random_cron(dice, days=number % 3 == 0)
            with self.subTest(line, zone=zone, start=start):
                try:
                    cron = queuectl.parse_cron(line)
                except queuectl.Invalid as error:
                    self.assertIn("never comes", str(error))
                    continue
                kind = 1 if line[0] == "*" or line.split()[1][0] == "*" else 2
                runs = [float(tick[0]) for tick in woken
                        if any(comes(line, values, minute) for minute in tick[kind])]
                self.assertEqual(walk(line, start, end, zone), runs)
                for moment in (dice.uniform(start, end) for _ in range(6)):
                    if later := [run for run in runs if run > moment]:
                        self.assertEqual(queuectl.first_run(cron, moment, zone), later[0])

    def test_runs_are_those_of_debians_loop_whatever_the_jump(self):
        dice = random.Random(7)
        for name, day in ZONE_CHANGES:
            zone = zoneinfo.ZoneInfo(name)
            start = int(stamp(day, zone))
            self.agree(dice, zone, start, start + SPAN, 9)
        for minutes in (-1500, -240, -181, -180, -179, -60, -5, -1, 1, 3, 4, 5, 6, 20,
                        90, 178, 179, 180, 181, 1440):
            jump = int(stamp("2024-05-01")) + 60 * dice.randrange(1440)
            self.agree(dice, JumpyZone(jump, minutes), jump - 7200, jump + 90000, 4)

    def test_what_the_zone_always_skips_or_is_after_the_calendar_never_comes(self):
        skipped = "*/60 2 25-31 3 */7"      # last Sunday of March
        self.assertEqual(self.first(skipped, "2024-01-01", self.berlin), math.inf)
        self.assertLess(self.first(skipped, "2024-01-01"), math.inf)
        for after in (stamp("9999-12-30T10:00"), 1e12, 1e15):
            with self.subTest(after=after), refused("invalid-value", "never comes"):
                queuectl.run_after(schedule("* * * * *"), after)
        self.assertEqual(self.first("* * * * *", "9999-12-20"), stamp("9999-12-20T00:01"))

    def test_an_interval_counts_from_the_start_of_its_schedule(self):
        each(self, lambda line, seconds: queuectl.epoch(queuectl.run_after(
            schedule(line), NOON + seconds)) - NOON, (
                ("@every 90m", 0, 5400), ("@every 90m", 5399, 5400), ("@EVERY 1h30m", 5400, 10800),
                ("@every  7s", 1, 7), ("@every 90m", -1, 0), ("@every 1d", 86399, 86400)))
        for line in ("@every", "@every 0.5s", "@every x", "@every 99999d", "@every -5m"):
            with self.subTest(line), refused("invalid-value"):
                queuectl.parse_cron(line)
        self.assertEqual(queuectl.cron_words("@every 90m"), "every 1h 30m")

    def test_an_offset_of_odd_seconds_makes_no_run_twice(self):
        monrovia = zoneinfo.ZoneInfo("Africa/Monrovia")     # 44:30 behind, until 1972
        jump = stamp("1972-01-07T00:44:30")
        runs = walk("* * * * *", jump - 90, jump + 90, monrovia)
        self.assertEqual([run - jump for run in runs], [-60, 0, 30, 90])

    @unittest.skipUnless(hasattr(time, "tzset"), "POSIX")
    def test_without_a_zone_the_process_s_own_is_taken_as_it_is_now(self):
        for name, day in ZONE_CHANGES:
            zone = zoneinfo.ZoneInfo(name)
            start = stamp(day, zone)
            for line in (WILD, FIXED):
                with self.subTest(line, zone=name, day=day), local_zone(name):
                    self.assertEqual(walk(line, start, start + SPAN),
                                     walk(line, start, start + SPAN, zone))

    def test_a_plain_schedule_is_said_in_words_and_any_other_by_its_line(self):
        each(self, queuectl.cron_words, (
            ("*/5 * * * *", "every 5 minutes"), ("*/60 * * * *", "every 60 minutes"),
            ("30 2 * * *", "at 02:30 every day"), ("@Daily", "at 00:00 every day"),
            ("0  9 * *  Mon-FRI ", "at 09:00 on mon-fri"), ("5 9 * * sun", "at 09:05 on sun"),
            (" 0  9,12 * * * ", "0 9,12 * * *"), *((line, line) for line in (
                "*/7 * * * *", "0 */2 * * *", "*/10 9-17 * * 1-5", "0 9 * * 0,6", "@yearly",
                "0 0 1,15 * *", "0 0 13 * fri", "0 0 1 * 0-6", "*/5 * * 6 *", "0 9 * 6 1"))))

    def test_the_same_words_mean_the_same_runs(self):
        dice, said = random.Random(9), {}
        for _ in range(6000):
            line = random_cron(dice)[0]
            with contextlib.suppress(queuectl.Invalid):
                cron = queuectl.parse_cron(line)._replace(is_wild=False)
                if len(cron.days) == 31 or len(cron.weekdays) == 7:
                    cron = cron._replace(is_either=False)
                self.assertEqual(said.setdefault(queuectl.cron_words(line), cron)[:5], cron[:5])


# ---- 5 Fields ----------------------------------------------------------------

class Fields(Case):
    def test_what_is_wrong_names_its_key(self):
        wrong = {
            "command": ("", 5, "a\0b", "\ud800", "x" * (queuectl.MAX_TEXT + 1)),
            "priority": ("high", True, 5.5, 1e300, math.inf, 10**9 + 1), "max_retries": (-1,),
            "id": ("a b", ""), "timeout": ("soon", 10**400), "run_at": ("soon", 10**400, -1),
            "env": (5, {"1A": "b"}, {"A": 1}, {1: "b"}), "after": ([1],),
            "unique": ("", "k" * 1025, 5), "cwd": ("", 5), "tags": ("a b", 5),
            "priorty": (1,), "unlike": (1,)}
        for fields, key, words in (
                *(({key: value}, key, "") for key, values in wrong.items() for value in values),
                ({"command": None}, "command", "has no command"), ({5: 1}, "5", ""),
                ({"delay": 1, "run_at": 1}, "delay", "both given"),
                ({"max-retries": 1, "max_retries": 1}, "max_retries", "given twice"),
                ({"priorty": 1}, "priorty", "did you mean `priority`"),
                ({"xyz": 1}, "xyz", "; use one of: command")):
            with self.subTest(fields), refused("invalid-job", words, key=key):
                queuectl.new_job({"command": "x", **fields}, NOON)

    def test_a_field_is_one_column_one_key_and_one_row_of_the_table(self):
        columns = [row[1] for row in self.queue.store.rows("PRAGMA table_info(jobs)")]
        private = {"seq", "waits", "rank", "claim", "end_requested", "unmet", "at_time"}

        self.assertEqual(columns, [*Job._fields])
        self.assertEqual({*Job._fields} - private,
                         {*queuectl.FIELDS} - {"delay", "expires", "waiting_for"})
        self.assertEqual({*queuectl.JSON_KEYS}, {*Job._fields} - private - {"runs"})

    def test_values_of_settings_are_accepted_up_to_their_bounds(self):
        for key, taken, *wrong in (
                ("output-limit", {"64KiB": 65536, "0": 0, "3 k": 3072, "2kb": 2000,
                                  "16MiB": 1 << 24},
                 "", "x", "-1", "0x", "9" * 5000, "5x", "16777217", "17MiB"),
                ("backoff-jitter", {".5": 0.5, "1": 1.0}, "1.1", "", "nan"),
                ("heartbeat", {"100ms": 0.1}, "99ms"), ("lease", {"1s": 1.0}, "0.9"),
                ("max-retries", {"0": 0, "1000000000": 10**9}, "-1", "1000000001"),
                ("crash-limit", {"1": 1}, "0"), ("timeout", {"none": None, "": None}),
                ("on-dead", {"none": None, "echo": "echo"}), ("shell", {}, "sh", "none"),
                ("output-dir", {}, "out"), ("priority-ageing", {"30d": 2592e3}, "30d1s", "0.9s"),
                ("backoff-max", {"10000000000": 1e10}, "10000000001")):
            parse = queuectl.SETTINGS[key].kind.parse
            each(self, parse, taken.items())
            for text in wrong:
                with self.subTest(key=key, text=text), refused("invalid-value"):
                    parse(text)

    def test_json_and_shell_are_told_apart(self):
        for text in ("echo hi", "{ echo a; }", "[ -f x ] && y", "[[ -f x ]]",
                     '[ "$HOME" = /root ] && y', "[ 1 = 1 ]", '[ "a" ]'):
            self.assertEqual(queuectl.fields_of(text), [{"command": text}])
        for text in ('{"command": "x"}', '{ "command": "x"}', '[{"command": "x"}]'):
            self.assertEqual(queuectl.fields_of(text), [{"command": "x"}])
        for text, why in (("{command: x}", ""), ('{"command": ', ""), ('["x"]', ""), ("[1]", ""),
                          ('[{"command": "x"}, 5]', "^item 2 is not")):
            with self.subTest(text), refused("invalid-job", why):
                queuectl.fields_of(text)

    def test_keys_may_be_written_with_dashes_and_what_the_queue_keeps_is_ignored(self):
        self.assertEqual(queuectl.new_job({
            "command": "x" * queuectl.MAX_TEXT, "max-retries": 7, "timeout": None, "state": "dead",
            "created-at": "2026", "after": "a", "tags": ["t", "u", "t"], "cwd": "here",
            "unique": "k" * 1024, "priority": -1e9}, NOON), Job(
            command="x" * queuectl.MAX_TEXT, max_retries=7, after=("a",), tags=("t", "u"),
            unique="k" * 1024, cwd=os.path.abspath("here"), priority=-10**9))
        self.assertIs(type(queuectl.new_job({"command": "x", "priority": 5.0}, NOON).priority), int)
        self.assertEqual(queuectl.ignored_keys({"command": 1, "created-at": 2, "state": 3}),
                         ["created-at", "state"])

    def test_text_is_utf8_whatever_the_locale(self):
        self.assertEqual(queuectl.as_utf8("caf\udcc3\udca9"), "caf\u00e9")
        with self.assertRaises(UnicodeError):
            queuectl.as_utf8("\udcff")

    def test_a_file_is_one_json_value_or_a_job_a_line(self):
        a, b = {"command": "a"}, {"command": "b"}
        both = json.dumps([a, b], indent=1).encode()
        each(self, lambda content: list(queuectl.jobs_in(content)), (
            (both, [(a, "item 1"), (b, "item 2")]),
            (b"\xef\xbb\xbf \n" + both + b"\n", [(a, "item 1"), (b, "item 2")]),
            (json.dumps(a, indent=1).encode(), [(a, "item 1")]),
            (json.dumps([a, b]).encode() + b"\n", [(a, "line 1"), (b, "line 1")]),
            (b'\xef\xbb\xbfa\r\n\n# a comment\n{"command": "b"}\n', [(a, "line 1"), (b, "line 4")]),
            (b"{ a; }\nb", [({"command": "{ a; }"}, "line 1"), (b, "line 2")]),
            (b"[ -f x ]\r\n  b  ", [({"command": "[ -f x ]"}, "line 1"), (b, "line 2")]),
            (b"", [])))
        deep = b'[{"command":' * 50_000
        for bad, why in ((b"a\n{x}", "^line 2: not valid JSON"),
                         (b"a\n\n\xff", "^line 3: not UTF-8"), (deep + b"\n" + deep, "")):
            with self.subTest(bad[:9]), refused("invalid-job", why):
                list(queuectl.jobs_in(bad))


# ---- 6 SQL -------------------------------------------------------------------

class Statements(Case):
    def statements(self):
        for name, text in vars(queuectl.Sql).items():
            if name.isupper() and name[0] != "_" and isinstance(text, str) and name != "SCHEMA":
                yield name, text
        yield from (("DELETE_JOB", text) for text in queuectl.Sql.DELETE_JOB)
        yield from ((name, text) for name, _, text in queuectl.Sql.RULES)

    def plan_of(self, text, how="QUERY PLAN", **values):
        return [row[-1] for row in self.queue.store.rows(f"EXPLAIN {how} {text}", **{
            **dict.fromkeys(re.findall(r":(\w+)", text)), **values})]

    def test_every_statement_prepares_and_is_portable(self):
        for name, text in self.statements():
            with self.subTest(name):
                self.plan_of(text, "")
                self.assertNotRegex(text, r"IS :|IS NOT :|:\w+ IS |IS NOT \w+\.|"
                                          r"M(AX|IN)\([^()]*,|LIMIT -|INSERT OR|strftime|"
                                          r"\?|CROSS JOIN \w+ ON|CREATE|PRAGMA")

    # What a worker or a command asks again and again, and what each step goes by.
    HOT = (
        ("jobs_in_line",   "LINE"),
        ("jobs_in_queue",  "OLDEST_ENDS BEFORE QUEUE_LINE COUNT_WIDE COUNT_DUE"),
        ("jobs_in_",       "ANY_WORK"),     # either: each holds the ready ones alone
        ("jobs_by_time",   "NEXT_DUE DUE_AT MAKE_READY ANY_WORK COUNT_DUE"),
        ("jobs_by_claim",  "JOB_BY_CLAIM MINE SEIZE REQUEST_END UNDER_WAY GPUS_IN_USE "
                           "DELETE_IDLE_WORKER"),
        ("jobs_by_once",   "JOB_BY_ONCE"),
        ("jobs_delayed",   "DELAYED ANY_WORK"),
        ("jobs_by_expiry", "EXPIRED DUE_AT ANY_WORK"),
        ("jobs_blocked",   "STUCK"),
        ("jobs_by_unique", "JOB_BY_UNIQUE"),
        ("runs_by_job",    "RUNS RUN"),
        ("jobs_by_state",  "NEWEST_IDS"),
        ("autoindex_jobs", "JOBS_NAMED JOB IDS_FROM"),
        ("PRIMARY KEY",    "EVENTS_AFTER TAGS_FROM MOVE MEET JOB_BY_SEQ BEGIN_RUN "
                           "END_RUN SAVE_OUTPUT DEPENDENTS HEARTBEAT STOP_REQUESTED "
                           "TALLIES_EVER"),
    )

    def test_frequent_statements_use_an_index_and_do_not_sort(self):
        for index, names in self.HOT:
            for name in names.split():
                with self.subTest(name):
                    plan = "\n".join(self.plan_of(getattr(queuectl.Sql, name)))
                    self.assertIn(index, plan)
                    self.assertNotIn("TEMP B-TREE", plan)
                    # What is gone through whole is short, or one row.
                    self.assertNotRegex(plan, r"(?m)^SCAN(?!.*(USING (COVERING )?INDEX|"
                                              r"CONSTANT ROW|json_each|schedules|SUBQUERY|subquery|"
                                              r"found|unblocking|stuck|due$|times$|newest$))")

    def test_listings_use_an_index(self):
        before, since = {"ended_before": ""}, {"ended_at": "", "ended_seq": 1}
        for states, order, values, wanted in (
                ([DEAD], "finished", {}, "USING INDEX"), ([DEAD], "newest", {}, "USING INDEX"),
                ([DEAD], "finished", before, "USING INDEX"),
                ([DEAD], "ended", before, "USING INDEX"),
                ([DEAD], "ended", {**before, **since}, "USING INDEX"),
                ([DEAD], "newest", {"since": "", "exit_code": "[]"}, "USING INDEX"),
                ([DEAD], "newest", {"before": 1}, "USING INDEX"),
                ([], "newest", {"before": 1}, r".*INTEGER PRIMARY KEY \(rowid<\?\)")):
            with self.subTest(order, states=states, values=values):
                plan = " ".join(self.plan_of(queuectl.Sql.listing(
                    states, queuectl.ORDERS[order], values), **values, limit=1))
                self.assertRegex(plan, f"SEARCH (TABLE )?jobs {wanted}")
                self.assertNotIn("TEMP B-TREE", plan)

    def test_the_oldest_due_job_of_a_queue_is_told_whatever_its_priority(self):
        self.jobs([{"priority": 1}, {"queue": "q", "priority": 9}])
        self.end(self.tick(2).claims)
        self.after(100)         # what is over has the same priorities, and is older
        self.jobs([{"queue": "q", "priority": 1}, {"queue": "other"},
                   {"queue": "late", "delay": 50}])
        for seconds, oldest in ((50, {"q": 50.0, "other": 50.0, "late": 0.0}),
                                (7, {"default": 7.0, "q": 57.0, "other": 57.0, "late": 7.0})):
            self.jobs([{"run_at": NOON + 150}, {"queue": "q", "priority": 9}, {"queue": "q"}])
            self.jobs(1001, run_at=NOON + 150, cwd="/")
            self.after(seconds)
            self.assertEqual(self.queue.scrape().oldest, {"default": 0.0, **oldest})

    def test_times_of_several_ticks_add_up(self):
        self.job(id="fails", max_retries=9, backoff_base=0.0)
        for seconds, mean in ((1.0, 1.0), (3.0, 2.0), (5.0, 3.0)):
            self.run_next(Outcome("failed", 1, None, seconds))
            self.assertEqual(self.queue.stats()[""].run_time.mean, mean)
        self.assertEqual([run.number for run in self.queue.runs("fails")], [1, 2, 3])

    def test_a_change_from_an_older_state_is_refused(self):
        """(I1), (I3)"""
        stale = self.job()
        self.queue.cancel(stale.id)
        self.queue.retry(stale.id)
        claim = self.claim()
        for before in (stale, stale._replace(state=PROCESSING),
                       claim.job._replace(claim=claim.number + 1)):
            with self.subTest(before), self.assertRaises(queuectl.Stale), \
                    self.queue.store.transaction() as store:
                store.move([queuectl.Change("cancel", before, before)], NOON)
        self.assertEqual(self.state(stale.id), PROCESSING)

    def test_behind_a_paused_queue_others_are_in_order_and_runs_numbered_by_job(self):
        self.queue.pause("paused")       # so the others are asked for their own lines
        self.jobs(200, queue="paused", priority=9)
        self.jobs([{"priority": n, "id": f"p{n}", "queue": "five"} for n in range(5)])
        self.assertEqual(self.claim().job.id, "p4")
        self.queue.pause("five")
        self.jobs(["other", {"id": "a", "max_retries": 9, "backoff_base": 0}])
        self.claim()
        for number in (1, 2, 3):
            self.run_next(1)
            self.assertEqual([run.number for run in self.queue.runs("a")], [*range(1, number + 1)])
        for name in ("a", "other"):
            self.assertEqual(self.queue.run(name, 1).job, self.queue.job(name).seq)

    def test_the_schema_refuses_impossible_states(self):
        """(I2), (I7): processed without a claim, or not; waiting for nothing, or when over."""
        self.job()
        for change in ("state = 'processing'", "claim = 1", "waits = NULL", "state = 'completed'"):
            with self.subTest(change), self.assertRaises(queuectl.Stale):
                self.do(f"UPDATE jobs SET {change}")


# ---- 7 SQLite ----------------------------------------------------------------

# What the second format did not have.
NEW_IN_3 = (
    ", 'held'", "after_any TEXT NOT NULL DEFAULT '[]',",
    """ slots INTEGER NOT NULL DEFAULT 1, backoff_max REAL,
            no_retry_on TEXT, expires_at TEXT, held INTEGER NOT NULL DEFAULT 0,""",
    "CREATE INDEX jobs_held ON jobs (seq) WHERE waits = 'held';",
    """CREATE INDEX jobs_by_expiry ON jobs (expires_at)
            WHERE expires_at IS NOT NULL AND waits IS NOT NULL;""",
    " slots TEXT NOT NULL DEFAULT '', gpus TEXT,",
    "any_outcome INTEGER NOT NULL DEFAULT 0,",
    """,
            catch_up INTEGER NOT NULL DEFAULT 1, last_state TEXT""",
    """,
            gpus TEXT NOT NULL DEFAULT '[]'""")
NEW_COLUMNS = {"jobs": 6, "runs": 2, "dependencies": 1, "schedules": 2, "workers": 1}


# The first format, as it was released: jobs that wait in each way, that run (the end of
# one is requested), that are over; the newest job was deleted.
FORMAT_1 = """
    PRAGMA application_id = 1363366961; PRAGMA user_version = 1;
    CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE settings (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
    CREATE TABLE jobs (seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE,
        command TEXT NOT NULL, state TEXT NOT NULL CHECK (state IN ('pending', 'processing',
        'completed', 'failed', 'dead', 'cancelled')), attempts INTEGER NOT NULL DEFAULT 0,
        max_retries INTEGER NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL,
        queue TEXT NOT NULL, priority INTEGER NOT NULL DEFAULT 0, run_at TEXT NOT NULL,
        timeout REAL, backoff_base REAL, after TEXT NOT NULL DEFAULT '[]', "unique" TEXT,
        tags TEXT NOT NULL DEFAULT '[]', env TEXT NOT NULL DEFAULT '{}', cwd TEXT NOT NULL,
        crashes INTEGER NOT NULL DEFAULT 0, worker TEXT, started_at TEXT, finished_at TEXT,
        exit_code INTEGER, error TEXT, gate TEXT CHECK (gate IN ('open', 'time', 'after')),
        rank INTEGER NOT NULL DEFAULT 0, claim INTEGER, wish TEXT,
        CHECK ((state = 'processing') = (claim IS NOT NULL)),
        CHECK ((claim IS NULL) = (worker IS NULL)), CHECK ((state IN ('pending',
        'failed')) = (gate IS NOT NULL)), CHECK (wish IS NULL OR claim IS NOT NULL));
    CREATE INDEX jobs_by_state ON jobs (state, seq);
    CREATE INDEX jobs_in_line ON jobs (rank, run_at, seq) WHERE gate = 'open';
    CREATE INDEX jobs_in_queue ON jobs (queue, rank, run_at, seq) WHERE gate = 'open';
    CREATE INDEX jobs_by_time ON jobs (run_at) WHERE gate = 'time';
    CREATE UNIQUE INDEX jobs_by_claim ON jobs (claim) WHERE claim IS NOT NULL;
    CREATE UNIQUE INDEX jobs_by_unique ON jobs ("unique")
        WHERE "unique" IS NOT NULL AND (gate IS NOT NULL OR claim IS NOT NULL);
    CREATE INDEX jobs_by_end ON jobs (state, finished_at) WHERE gate IS NULL AND claim IS NULL;
    CREATE TABLE runs (claim INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL,
        number INTEGER NOT NULL, pool INTEGER NOT NULL, worker TEXT NOT NULL,
        slot INTEGER NOT NULL, started_at TEXT NOT NULL, finished_at TEXT, duration REAL,
        outcome TEXT CHECK (outcome IN ('completed', 'failed', 'timeout', 'cancelled',
        'released', 'lost')), exit_code INTEGER, error TEXT,
        output_bytes INTEGER NOT NULL DEFAULT 0, output BLOB NOT NULL DEFAULT x'',
        CHECK ((finished_at IS NULL) = (outcome IS NULL)));
    CREATE INDEX runs_by_job ON runs (job);
    CREATE TABLE events (seq INTEGER PRIMARY KEY AUTOINCREMENT, job INTEGER NOT NULL,
        "from" TEXT, "to" TEXT NOT NULL, at TEXT NOT NULL, reason TEXT);
    CREATE INDEX events_by_job ON events (job);
    CREATE TABLE dependencies (needs INTEGER NOT NULL, job INTEGER NOT NULL,
        PRIMARY KEY (needs, job)) WITHOUT ROWID;
    CREATE INDEX dependencies_by_job ON dependencies (job);
    CREATE TABLE tags (tag TEXT NOT NULL, job INTEGER NOT NULL,
        PRIMARY KEY (tag, job)) WITHOUT ROWID;
    CREATE INDEX tags_by_job ON tags (job);
    CREATE TABLE queues (name TEXT PRIMARY KEY, paused INTEGER NOT NULL DEFAULT 0,
        job_limit INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
    CREATE TABLE schedules (name TEXT PRIMARY KEY, cron TEXT NOT NULL, job TEXT NOT NULL,
        paused INTEGER NOT NULL DEFAULT 0, created_at TEXT NOT NULL, next_run TEXT,
        last_run TEXT, last_job INTEGER) WITHOUT ROWID;
    CREATE TABLE workers (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE,
        host TEXT NOT NULL, boot TEXT NOT NULL, pid INTEGER NOT NULL, born TEXT NOT NULL,
        slots INTEGER NOT NULL, queues TEXT NOT NULL, port INTEGER, started_at TEXT NOT NULL,
        heartbeat_at TEXT NOT NULL, beat INTEGER NOT NULL DEFAULT 0, wish TEXT);
    CREATE TABLE counts (queue TEXT NOT NULL, state TEXT NOT NULL, n INTEGER NOT NULL
        CHECK (n >= 0), PRIMARY KEY (queue, state)) WITHOUT ROWID;
    CREATE TABLE tallies (minute INTEGER NOT NULL, queue TEXT NOT NULL, kind TEXT NOT NULL,
        bucket INTEGER NOT NULL, n INTEGER NOT NULL, total REAL NOT NULL DEFAULT 0,
        PRIMARY KEY (minute, queue, kind, bucket)) WITHOUT ROWID;
    INSERT INTO meta VALUES ('id', '0123456789abcdef'),
                            ('created_at', '2027-01-01T12:00:00.000Z');
    INSERT INTO jobs (seq, id, state, gate, priority, after, "unique", claim, wish, exit_code,
                      command, max_retries, attempts, queue, rank, cwd, env, tags, worker,
                      created_at, updated_at, run_at, started_at, finished_at)
    SELECT column1, column2, column3, column4, column5, column6, column7, column8, column9,
           column10, 'x', 3, column10 IS NOT NULL, 'default', -column5, '/', '{"A": "b"}',
           '["t"]', CASE WHEN column8 THEN 'w' END, t, t,
           CASE column4 WHEN 'time' THEN '2999-01-01T00:00:00.000Z' ELSE t END,
           CASE WHEN column8 OR column10 IS NOT NULL THEN t END,
           CASE WHEN column10 IS NOT NULL THEN t END
      FROM (SELECT '2027-01-01T12:00:00.000Z' AS t), (VALUES
           (1, 'done', 'completed', NULL, 0, '[]', NULL, NULL, NULL, 0),
           (2, 'dead', 'dead', NULL, 0, '[]', NULL, NULL, NULL, 1),
           (3, 'again', 'failed', 'time', 0, '[]', NULL, NULL, NULL, 1),
           (4, 'runs', 'processing', NULL, 0, '[]', NULL, 4, NULL, NULL),
           (5, 'ends', 'processing', NULL, 0, '[]', NULL, 5, 'cancel', NULL),
           (6, 'ready', 'pending', 'open', 7, '[]', NULL, NULL, NULL, NULL),
           (7, 'scheduled', 'pending', 'time', 0, '[]', NULL, NULL, NULL, NULL),
           (8, 'blocked', 'pending', 'after', 0, '["done", "dead", "runs"]', 'k', NULL, NULL,
            NULL));
    INSERT INTO dependencies VALUES (1, 8), (2, 8), (4, 8);
    INSERT INTO tags SELECT 't', seq FROM jobs;
    INSERT INTO runs (claim, job, number, pool, worker, slot, started_at, finished_at, outcome)
    VALUES (1, 1, 1, 1, 'w', 1, '', '', 'completed'), (2, 2, 1, 1, 'w', 1, '', '', 'failed'),
           (3, 3, 1, 1, 'w', 1, '', '', 'lost'), (4, 4, 1, 1, 'w', 1, '', NULL, NULL),
           (5, 5, 1, 1, 'w', 2, '', NULL, NULL), (6, 3, 2, 1, 'w', 1, '', '', 'failed');
    INSERT INTO events (seq, job, "from", "to", at) SELECT seq, seq, NULL, state, '' FROM jobs;
    INSERT INTO counts SELECT 'default', state, COUNT(*) FROM jobs GROUP BY state;
    INSERT INTO schedules VALUES ('s', '@daily', '{"command": "x", "cwd": "/"}', 0, '',
                                  '2999-01-01T00:00:00.000Z', NULL, NULL);
    INSERT INTO workers SELECT 1, 'w', 'h', '', 1, '', 2, '[]', NULL, created_at, created_at,
                               2, NULL FROM jobs WHERE seq = 1;
    UPDATE sqlite_sequence SET seq = seq + 1 WHERE name = 'jobs';
    UPDATE sqlite_sequence SET seq = 99 WHERE name IN ('events', 'runs');
    """


class Files(Case):
    def test_each_connection_is_durable_and_private(self):
        """Also if somebody has changed the file's journal by hand."""
        self.a_queue().close()
        self.files_after(self.path, "PRAGMA journal_mode = DELETE")
        self.assertEqual(os.stat(self.path).st_mode & 0o777, 0o600)
        each(self, lambda name: self.queue.store.row(f"PRAGMA {name}")[0], (
            ("synchronous", 2), ("journal_mode", "wal"), ("auto_vacuum", 2), ("busy_timeout", 0),
            ("journal_size_limit", 16 << 20), ("wal_autocheckpoint", 3000)))

    def ids_in(self, path):
        with Queue(path, create=False) as queue:
            return ids(queue.jobs())

    def put(self, files):
        self.path = os.path.join(tempfile.mkdtemp(dir=self.dir), "queue.db")
        for suffix, content in files.items():
            write_bytes(self.path + suffix, content)

    def files_after(self, path, *statements):
        """What is on the disk, by suffix, when a program has run these and was killed."""
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as db:
            for statement in statements:
                db.execute(statement).fetchall()
            return {suffix: read_bytes(path + suffix) for suffix in ("", "-wal")
                    if os.path.exists(path + suffix)}

    def files(self):
        folder = os.path.dirname(self.path)
        return {name[len("queue.db"):]: read_bytes(os.path.join(folder, name))
                for name in os.listdir(folder)}

    def test_a_file_in_the_midst_of_a_checkpoint_is_not_taken_for_damaged(self):
        """The first page is written, the file not yet as long as that one says."""
        self.a_queue()      # keeps the WAL when the other is closed
        short = read_bytes(self.path)
        self.job("x" * 60_000, id="big")
        wal = read_bytes(self.path + "-wal")
        self.queue.store.rows(queuectl.SQLite.EMPTY_WAL)
        torn = {"": read_bytes(self.path)[:4096] + short[4096:], "-wal": wal}
        self.put(torn)
        with Queue(self.path, create=False) as again:
            self.assertEqual(len(again.job("big").command), 60_000)
        self.put(torn)
        with queuectl.glance(self.path) as rows:
            self.assertEqual(rows("SELECT length(command) FROM jobs"), [(60_000,)])

    def test_a_file_that_was_upgraded_while_it_was_open_is_not_written(self):
        for version, error in (99, refused("newer-version")), (FORMAT, contextlib.nullcontext()):
            self.queue.store.rows(f"PRAGMA user_version = {version}")
            with error:
                self.queue.enqueue("true")
        self.assertEqual(len(self.queue.jobs()), 1)

    def test_foreign_and_newer_files_are_refused_and_left_as_they_are(self):
        def made(*statements, table=("CREATE TABLE t (x)",), **beside):
            path = os.path.join(tempfile.mkdtemp(dir=self.dir), "x")
            return {**self.files_after(path, *statements, *table),
                    **{f"-{suffix}": content for suffix, content in beside.items()}}
        self.a_queue().close()
        newer = self.files_after(self.path, "PRAGMA user_version = 99", queuectl.SQLite.EMPTY_WAL,
                                 "INSERT INTO settings VALUES ('of', 'tomorrow')")
        in_wal = self.files_after(self.path, "PRAGMA user_version = 99")
        for number, (files, error) in enumerate((
                (newer, "newer-version"), ({"": newer[""]}, "newer-version"),
                (in_wal, "newer-version"), (made("PRAGMA user_version = 1"), "not-a-queue"),
                *(({"": content}, "not-a-queue") for content in (
                    b"hello\n", b"#!/bin/sh\n" * 999, bytes(8192),
                    b"SQLite format 3\0" + bytes(100))),
                (made("PRAGMA journal_mode = WAL"), "not-a-queue"),
                (made(journal=b"x" * 512), "not-a-queue"),
                (made("PRAGMA page_size = 512", journal=b""), "not-a-queue"),
                (made("PRAGMA application_id = 7", table=(), journal=b""), "not-a-queue"))):
            with self.subTest(number):
                self.put(files)
                with refused(error) as caught:
                    Queue(self.path)
                self.assertTrue(caught.error.hint)
                if files is not in_wal:     # that had to be read
                    self.assertEqual(self.files(), files)

    def test_a_half_made_queue_is_none_until_it_is_made(self):
        undone = struct.pack(">8s5I", bytes.fromhex("d9d505f920a163d7"), 0, 0, 0, 512, 4096)
        kind, journal = queuectl.SQLite.SET_KIND, queuectl.SQLite.JOURNAL
        for number, files in enumerate((
                {"": b""}, {"": b"torn" * 1024, "-journal": undone.ljust(512, b"\0")},
                *(self.files_after(self.path_of(f"made {n}"), *statements)
                  for n, statements in enumerate((
                      ("PRAGMA user_version = 1", "PRAGMA user_version = 0"), (kind,),
                      (queuectl.SQLite.VACUUM_STEPWISE,), (kind, journal)))))):
            with self.subTest(number):
                self.put(files)
                with refused("no-queue"):
                    Queue(self.path, create=False)
                self.assertEqual(self.files(), files)
                self.assertEqual(self.a_queue().enqueue("x").id, "job-1")

    def test_of_two_that_make_a_queue_at_once_one_makes_it(self):
        path, made = self.path, []

        class Overtaken(queuectl.SQLite):
            def _nature(self, db):
                found = super()._nature(db)
                with Queue(path) as other:
                    other.enqueue("x", id="first")
                    made.append(other.store.meta("id"))
                return found
        store = queuectl.Ledger(Overtaken(path))
        self.addCleanup(store.db.close)
        self.assertEqual(store.job("first").command, "x")
        self.assertEqual([store.meta("id")], made)

    def a_released_file(self):
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            db.executescript(FORMAT_1)
            host = queuectl.Host(self.path)
            db.execute("UPDATE workers SET host = ?, boot = ?", (host.name, host.boot))
            db.commit()

    def schema(self, queue):
        return {name: "".join(sql.split()) for name, sql in queue.store.rows(
            "SELECT name, sql FROM sqlite_master WHERE name NOT LIKE 'sqlite%'")}

    def test_the_tables_change_only_with_the_version_of_the_format(self):
        """If not: add a step to UPGRADES, and keep the change as in NEW_IN_3."""
        formats = [self.format_2(), queuectl.Sql.SCHEMA]
        self.assertEqual(
            [hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]
             for text in formats], ["3bc20ada7c4b2d87", "8ac20dd7af0317ca"])
        self.assertEqual(queuectl.SCHEMA_VERSION, 3)

    def format_2(self):
        return functools.reduce(lambda text, new: text.replace(new, ""), NEW_IN_3,
                                queuectl.Sql.SCHEMA)

    def test_a_file_of_the_second_format_is_upgraded_with_its_content(self):
        for state in reversed(STATES):
            self.job_in(state)
        self.jobs([{"id": "later", "delay": 60}, {"id": "blocked", "after": ["later"]}])
        self.queue.add_schedule("s", "@daily", command="true")
        self.do("UPDATE workers SET host = 'other', boot = 'other'")    # not running here
        before = self.queue.jobs(), self.queue.schedules(), self.queue.workers()
        columns = {table: self.queue.store.rows(f"PRAGMA table_info({table})")
                   for table in NEW_COLUMNS}
        with contextlib.closing(sqlite3.connect(self.path)) as db:
            for table in NEW_COLUMNS:
                db.execute(f"ALTER TABLE {table} RENAME TO new_{table}")
            for [index] in db.execute("SELECT name FROM sqlite_master "
                                      "WHERE type = 'index' AND sql IS NOT NULL").fetchall():
                db.execute(f"DROP INDEX {index}")
            db.executescript(re.sub("(TABLE|INDEX)", r"\1 IF NOT EXISTS", self.format_2()))
            for table in NEW_COLUMNS:
                names = ", ".join(f'"{row[1]}"' for row in db.execute(
                    f"PRAGMA table_info({table})").fetchall())
                db.execute(f"INSERT INTO {table} SELECT {names} FROM new_{table}")
                db.execute(f"DROP TABLE new_{table}")
            db.executescript("PRAGMA user_version = 2")
        self.queue.close()
        self.queue = self.a_queue()
        self.assertEqual((self.queue.jobs(), self.queue.schedules(), self.queue.workers()),
                         before)
        self.assertEqual({table: self.queue.store.rows(f"PRAGMA table_info({table})")
                          for table in NEW_COLUMNS}, columns)

    def test_a_file_of_the_first_format_is_upgraded_with_its_content(self):
        self.a_released_file()
        queue = self.a_queue()
        self.assertEqual(
            [(job.id, job.waits, job.runs, job.unmet, job.at_time, job.end_requested)
             for job in queue.jobs(sort="oldest")],
            [("done", None, 1, 0, 0, None), ("dead", None, 1, 0, 0, None),
             ("again", "scheduled", 2, 0, 0, None), ("runs", None, 1, 0, 0, None),
             ("ends", None, 1, 0, 0, "cancel"), ("ready", "ready", 0, 0, 0, None),
             ("scheduled", "scheduled", 0, 0, 1, None), ("blocked", "blocked", 0, 2, 0, None)])
        with contextlib.closing(sqlite3.connect(self.path + ".format-1.backup")) as old:
            for table in ("tags", "dependencies", "events", "runs", "workers", "counts"):
                rows = f"SELECT * FROM {table}"
                self.assertEqual(old.execute(rows).fetchall(), [
                    row[:len(row) - NEW_COLUMNS.get(table, 0)]
                    for row in queue.store.rows(rows)])
        self.assertEqual(self.problems(queue), [])
        self.path = self.path_of("new.db")
        self.assertEqual(self.schema(queue), self.schema(self.queue))

    def test_an_upgrade_that_fails_at_any_statement_has_changed_nothing(self):
        self.a_released_file()
        parts = queuectl.UPGRADES[1].split(";")
        for n in range(0, len(parts), 5):
            with self.subTest(n), self.assertRaises(queuectl.Stale), mock.patch.dict(
                    queuectl.UPGRADES, {1: ";".join([*parts[:n], "BREAK"])}):
                Queue(self.path)
            self.assertEqual(version_of(self.path), 1)
        queue = self.a_queue()
        self.assertEqual((len(queue.jobs()), self.problems(queue)), (8, []))

    @NEEDS_LOCKS
    def test_work_of_the_first_format_goes_on_after_the_upgrade(self):
        """(I4): no number of a row that was deleted is used again."""
        self.a_released_file()
        self.queue = self.a_queue()
        for lost in self.peers().lost():
            self.peers().record(lost)   # nothing tells that it had begun, so it is released
        self.assertEqual([self.state(name) for name in ("runs", "ends")], [PENDING, CANCELLED])
        ready = self.claim()
        self.queue.retry("dead")
        self.after(60)
        claims = [ready]
        while claims:
            claims = self.end(claims, free=4).claims
        self.assertEqual(self.state("blocked"), COMPLETED)
        self.assertEqual((ready.job.id, ready.number, self.claims.worker.id), ("ready", 100, 2))
        self.assertEqual(self.job().id, "job-10")
        self.assertGreater(self.queue.events_since(90)[0].seq, 99)
        self.assertEqual(self.problems(), [])

    @NEEDS_LOCKS
    def test_locks_of_an_earlier_database_of_that_name_do_not_count(self):
        self.worker(self.a_queue())
        for suffix in ("", "-wal", "-shm"):
            os.unlink(self.path + suffix)
        self.assertEqual(self.worker(self.a_queue()).worker.id, 1)

    def test_an_sqlite_that_is_too_old_is_refused(self):
        for version, told in (((3, 33, 0), refused("unsupported", "needs 3.34 or newer")),
                              ((3, 34, 0), contextlib.nullcontext())):
            self.assertEqual(os.listdir(self.dir), [])
            with mock.patch.object(sqlite3, "sqlite_version_info", version), told:
                self.a_queue()

    def test_a_backup_in_use_is_not_replaced(self):
        copy = self.path_of("copy.db")
        self.queue.backup(copy)
        with Queue(copy) as works:
            works.enqueue("true", id="later")
            with refused("in-use", "uses that backup"):
                self.queue.backup(copy)
            killed = {suffix: read_bytes(copy + suffix) for suffix in ("", "-wal")}
        for suffix, content in killed.items():
            write_bytes(copy + suffix, content)
        with refused("in-use", "or was killed"):
            self.queue.backup(copy)
        self.assertEqual(self.ids_in(copy), ["later"])
        self.queue.backup("/" + copy)       # that path is odd, and right
        self.assertEqual(self.ids_in(copy), [])

    def test_a_backup_that_fails_leaves_nothing_and_is_refused_unless_it_is_our_mistake(self):
        copy, reader = self.path_of("copy.db"), self.queue.store.db._reader

        def late():     # another program opens a queue of that name while the copy is made
            write_bytes(copy + "-wal", b"x")
            return reader()
        full, ours = map(sqlite3.OperationalError, ("database or disk is full", "no such thing"))
        for failing, told, left in (
                (mock.Mock(side_effect=full), refused("disk-full"), []),
                (mock.Mock(side_effect=ours), self.assertRaises(queuectl.Stale), []),
                (late, refused("in-use"), ["copy.db-wal"])):
            self.queue.store.db._reader = failing
            with self.subTest(failing), told:
                self.queue.backup(copy)
            self.assertEqual([name for name in os.listdir(self.dir) if "copy" in name], left)

    def test_a_backup_replaces_only_an_older_one_and_leaves_nothing_else(self):
        copy, synced = self.path_of("copy.db"), []
        write_bytes(self.path_of("text"), b"mine")
        self.job(id="first")
        with mock.patch.object(os, "fsync", lambda fd: synced.append(
                (os.fstat(fd).st_ino, os.path.exists(copy)))):
            self.queue.backup(copy)
        self.assertEqual(synced, [(os.stat(self.dir).st_ino, True)])    # its name is on the disk
        self.job(id="second")
        descriptors = os.listdir("/dev/fd")     # SQLite has kept one for the next time
        self.queue.backup(copy)
        self.assertEqual(os.listdir("/dev/fd"), descriptors)
        self.assertEqual(os.stat(copy).st_mode & 0o777, 0o600)
        self.assertEqual(self.ids_in(copy), ["second", "first"])
        for path, error in (("queue.db", "in-use"), ("text", "not-a-queue"), ("", "not-a-queue"),
                            ("none/copy", "unwritable")):
            with self.subTest(path), refused(error):
                self.queue.backup(self.path_of(path))
        self.assertEqual([name for name in os.listdir(self.dir) if "part" in name], [])
        self.assertEqual(self.read("text"), "mine")

    def test_nothing_is_written_to_a_file_that_has_lost_its_name(self):
        moved = self.path_of("moved.db")
        for change in (os.unlink, lambda path: os.rename(self.path_of("other"), path),
                       lambda path: os.rename(path, moved)):
            with self.a_queue() as queue:
                queue.enqueue("x" * 9000, id="kept")
                self.assertEqual(queue.store.db.size(), sum(
                    os.stat(self.path + suffix).st_size for suffix in ("", "-wal")))
                Queue(self.path_of("other")).close()
                self.assertTrue(queue.store.db.is_in_place())
                change(self.path)
                self.assertFalse(queue.store.db.is_in_place())
                with refused("database-gone", "deleted or replaced"):
                    queue.enqueue("b", id="lost")
                self.assertEqual(ids(queue.jobs()), ["kept"])
        self.assertEqual(read_bytes(self.path + "-wal"), b"")
        self.assertEqual(self.ids_in(moved), ["kept"])

    def test_a_transaction_that_sqlite_ended_hides_no_error(self):
        for begin in (self.queue.store.snapshot, self.queue.store.transaction):
            with self.subTest(begin), self.assertRaises(ZeroDivisionError), begin():
                self.queue.store.rows("ROLLBACK")     # as it does after some errors
                raise ZeroDivisionError

    def test_a_statement_that_fails_is_refused_unless_it_is_our_mistake(self):
        insert = "INSERT INTO almost_full VALUES (?)"
        with self.queue.store.transaction() as store:
            store.rows("CREATE TEMPORARY TABLE almost_full (x UNIQUE)")
            store.do(insert, (1,))
            for ask, *values in ((store.do, insert, ("\ud800",)),
                                 (store.write, insert, [("\ud800",)])):
                with self.subTest(values), refused("invalid-value"):
                    ask(*values)
            for ask, *values in ((store.do, insert, (1,)), (store.write, insert, [(2,), (1,)]),
                                 (store.do, "DO", ()), (store.rows, "DO")):
                with self.subTest(values), self.assertRaises(queuectl.Stale):
                    ask(*values)

    def test_odd_text_is_refused(self):
        for call in (self.queue.job, self.queue.cancel, lambda text: self.queue.jobs(search=text)):
            with refused("invalid-value"):
                call("\ud800")

    def test_an_error_of_sqlite_is_told_as_what_a_user_can_do(self):
        for kind, *words, code in (
                ("OperationalError", "database is locked", "table is locked", "a: busy", "busy"),
                ("OperationalError", "database or disk is full", "disk-full"),
                ("DatabaseError", "file is not a database", "file is encrypted", "not-a-queue"),
                ("DatabaseError", "disk image is malformed", "index corrupted", "", "damaged"),
                ("OperationalError", "attempt to write a readonly database", "disk I/O error",
                 "unable to open database file", "unwritable"),
                ("ProgrammingError", "Cannot operate on a closed database.", "unsupported"),
                ("DataError", "string or blob too big", "invalid-value")):
            for text in words:
                with self.subTest(text):
                    found = queuectl.refusal(getattr(sqlite3, kind)(text), "q.db")
                    self.assertEqual((found.code, bool(found.message and found.hint)), (code, True))
        for error, code in (
                (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates"), "invalid-value"),
                (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start"), "damaged")):
            self.assertEqual(queuectl.refusal(error, "q.db").code, code)
        self.assertIsNone(queuectl.refusal(sqlite3.OperationalError("no such table"), ""))

    def test_a_path_may_have_any_letters(self):
        os.mkdir(self.path_of("a?mode=ro#1%41 \u00e9"))
        self.path = self.path_of("a?mode=ro#1%41 \u00e9/q?.db")
        self.job(id="here")
        self.queue.backup(self.path + "#copy")
        for path in (self.path, self.path + "#copy"):
            self.assertEqual(self.ids_in(path), ["here"])
            with queuectl.glance(path) as rows:
                self.assertEqual(rows("SELECT id FROM jobs"), [("here",)])

    def test_what_is_no_file_of_ours_is_refused(self):
        with refused("no-queue"):
            Queue(self.path, create=False)
        self.assertEqual(os.listdir(self.dir), [])
        self.touch("queue.db")
        for name, create, error in (
                ("", True, "not-a-queue"), ("", False, "not-a-queue"),
                ("queue.db", False, "no-queue"),
                ("none/q.db", True, "unwritable"), ("none/q.db", False, "no-queue")):
            with self.subTest(name, create=create), refused(error):
                Queue(self.path_of(name), create)
        self.assertEqual(self.read("queue.db"), "")
        self.assertEqual(self.job().id, "job-1")
        with Queue(self.path_of("other.db")) as other:
            self.assertNotEqual(self.queue.store.meta("id"), other.store.meta("id"))
        os.link(self.path_of("other.db"), self.path_of("same.db"))
        for name in ("other.db", "same.db"):
            with refused("unsupported", "hard link"):
                Queue(self.path_of(name))

    def test_a_glance_makes_nothing_and_refuses_what_is_not_ours(self):
        write_bytes(self.path_of("text"), b"no database at all " * 99)
        self.files_after(self.path_of("other.db"), "CREATE TABLE jobs (id)")
        before, column = os.listdir(self.dir), "id"
        for name, error in (("none.db", "unwritable"), ("text", "not-a-queue"),
                            ("other.db", "not-a-queue"), ("queue.db", "unsupported")):
            if name == "queue.db":
                self.assertEqual(os.listdir(self.dir), before)
                self.queue.jobs()
                column = "column_of_days_to_come"
            with self.subTest(name), refused(error), queuectl.glance(self.path_of(name)) as rows:
                rows(f"SELECT {column} FROM jobs")

    def test_the_wal_is_emptied_for_a_full_disk(self):
        self.job("x" * 9000, id="big")
        self.assertGreater(os.stat(self.path + "-wal").st_size, 9000)
        self.queue.store.db.relieve()
        self.assertEqual(os.stat(self.path + "-wal").st_size, 0)
        self.assertEqual(len(self.queue.job("big").command), 9000)

    def test_counts_of_a_transaction_are_seen_in_it_and_go_with_it(self):
        self.job()
        with self.assertRaises(ZeroDivisionError), self.queue.store.transaction() as store:
            store.count("default", PENDING, 2)
            store.count("new", PENDING, 1)
            self.assertEqual(store.counts(), {("default", PENDING): 3, ("new", PENDING): 1})
            raise ZeroDivisionError
        self.assertEqual(self.queue.store.counts(), {("default", PENDING): 1})

    def test_a_transaction_in_three_steps_is_committed_by_another_thread(self):
        store, other = self.a_queue().store, self.a_queue()
        self.assertTrue(store.begin())
        begun = time.monotonic()
        self.assertFalse(other.store.begin())
        self.assertLess(time.monotonic() - begun, 0.5)      # `patience` is a minute
        self.assertEqual(store.take_numbers("jobs", 3), 1)
        store.count("default", PENDING, 1)
        store.write_counters()
        with futures.ThreadPoolExecutor(1) as executor:
            executor.submit(store.commit).result()
        self.assertEqual(other.counts()[PENDING], 1)

        self.assertTrue(other.store.begin())
        self.assertEqual(other.store.take_numbers("jobs"), 4)
        other.store.rollback()
        with store.transaction():
            self.assertEqual([store.take_numbers("jobs"), store.take_numbers("jobs", above=10)],
                             [4, 11])
        os.unlink(self.path)
        with refused("database-gone"):
            store.begin()

# ---- 8 Host ------------------------------------------------------------------

class Hosts(Case):
    @NEEDS_LOCKS
    def test_without_proc_a_lock_tells_that_a_worker_lives(self):
        blind = self.claims.worker._replace(boot="", born="")
        self.assertIs(self.queue.host.is_alive(blind), True)
        let_go(self.claims.lock)
        self.assertIsNone(self.queue.host.is_alive(blind))
        self.assertIs(self.queue.host.is_alive(blind._replace(boot="another")), False)

    @NEEDS_LOCKS
    def test_without_access_to_the_locks_only_a_living_process_is_known(self):
        host, worker = queuectl.Host(self.path), self.claims.worker
        with mock.patch.object(host.locks, "_open", side_effect=PermissionError):
            each(self, host.is_alive, (
                (worker, True), (worker._replace(born="1"), None),
                (worker._replace(boot="", born=""), None)))

    def test_without_proc_and_ps_no_start_time_is_known(self):
        host = queuectl.Host(self.path)
        host.boot = ""
        with mock.patch.dict(os.environ, PATH="/nowhere"):
            self.assertEqual(host.born(os.getpid()), "")

    @NEEDS_LOCKS
    def test_only_a_taken_lock_is_said_to_be_taken(self):
        files = len(os.listdir("/proc/self/fd"))
        for number, code in ((errno.EAGAIN, "in-use"), (errno.EACCES, "in-use"),
                             (errno.ENOLCK, "unwritable")):
            with mock.patch.object(queuectl, "fcntl", mock.Mock(fcntl=mock.Mock(
                    side_effect=OSError(number, "")), F_WRLCK=0, F_RDLCK=0)), refused(code):
                queuectl.Locks(self.path_of("lock")).hold(1)
        self.assertEqual(len(os.listdir("/proc/self/fd")), files)

    def test_a_start_told_by_ps_may_differ_by_a_second(self):
        at = "Wed Nov 25 03:56:15 2026"
        each(self, queuectl.is_same_birth, (
            (at, at, True), (at, at.replace(":15", ":16"), True),
            (at, at.replace(":15", ":59"), False), (at, "", False), (at, "8112", False),
            ("", "", False), ("8112", "8113", False)))

    def sleeper(self, command=("sleep", "100"), **options):
        process = subprocess.Popen(command, **options)
        self.addCleanup(process.wait)
        self.addCleanup(process.kill)
        return process

    def end(self, claim, head=0, grace=0.1, locks=None, parents=()):
        trees = queuectl.Trees()
        trees.add(claim, head, grace)
        wait_for(lambda: trees.step(locks, parents), "the end of the tree")

    def test_a_tree_is_ended_with_what_has_left_its_group_and_its_session(self):
        """(I6)"""
        head = self.sleeper(["/bin/sh", "-c", "setsid sleep 100 & setsid setsid sleep 100 & "
                             "echo $!; trap '' TERM; while :; do sleep .1; done"],
                            start_new_session=True, stdout=subprocess.PIPE)
        with head.stdout:
            other = head.stdout.readline()
        self.end(1, head.pid)
        self.assertEqual([is_running(head.pid), is_running(other)], [False] * 2)

    def test_an_orphan_is_told_by_its_claim(self):
        orphan, other = (self.sleeper(env={"QUEUECTL_CLAIM": claim}) for claim in ("7", "77"))
        self.end(7, grace=0.0, parents=(os.getpid(),))
        self.assertEqual([is_running(orphan.pid), is_running(other.pid)], [False, True])

    @NEEDS_LOCKS
    def test_the_holders_of_a_lock_are_ended_last(self):
        locks = queuectl.Locks(self.path_of("lock"))
        self.addCleanup(locks.close)
        fd = locks.hold(7)
        holder = self.sleeper(pass_fds=[fd], start_new_session=True)
        os.close(fd)
        self.assertEqual(locks.holders(7), [holder.pid])
        self.end(7, locks=locks)
        self.assertFalse(is_running(holder.pid))

    def test_what_cannot_be_ended_is_looked_at_less_and_less_often(self):
        trees, pauses = queuectl.Trees(), []
        trees.add(7, 0, 0.0)
        with mock.patch.object(queuectl, "_descendants", lambda *_: {NOBODY}), \
                mock.patch.object(queuectl.time, "monotonic", lambda: 0.0):
            for _ in range(12):
                self.assertEqual(trees.step(None, ()), [])
                pauses.append(trees.at)
        self.assertEqual((pauses[:3], pauses[-1]), ([0.005, 0.01, 0.02], 0.2))

    @NEEDS_LOCKS
    def test_a_run_s_process_is_found_again_and_no_other_of_that_number(self):
        self.job()
        claim, process = self.claim(), self.sleeper()
        run, locks = self.queue.run("job-1"), self.queue.host.locks
        for since, found in ((-0.5, process.pid), (5, 0)):
            locks.note(self.claims.lock, self.claims.worker.id, claim, process.pid,
                       queuectl.boot_time() + since)
            self.assertEqual(locks.process_of(run), found)
        self.assertIsNone(locks.process_of(run._replace(claim=99)))


class Manager:
    """A service manager, as far as sd_notify goes: a socket that keeps what it receives."""

    def __init__(self, test, address):
        self.said, self._socket = [], socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        test.addCleanup(self._socket.close)
        self._socket.bind(address)
        self._socket.setblocking(False)

    def received(self):
        """All that was said until now, in its order."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.said.append(self._socket.recv(4096).decode())
        return self.said


class Notices(Case):
    def test_a_manager_is_told_each_thing_when_it_is_due(self):
        name = f"queuectl-{os.getpid()}".encode()       # no file
        manager, notifier = Manager(self, b"\0" + name), queuectl.Notifier({
            b"NOTIFY_SOCKET": b"@" + name, b"WATCHDOG_USEC": b"60000000"}, os.getpid())
        notifier.ready()
        for _ in range(3):
            notifier.step("waiting")
        notifier.stopping()
        self.assertEqual(manager.received(), ["READY=1", "WATCHDOG=1", "STATUS=waiting",
                                              "STOPPING=1"])
        for address in (b"/nowhere/at/all", b"relative", b"x" * 200):   # it is gone
            queuectl.Notifier({b"NOTIFY_SOCKET": address}, 1).ready()

    def test_the_watchdog_is_told_if_it_asked_this_process(self):
        each(self, lambda usec, pid=b"": queuectl.Notifier({
            b"WATCHDOG_USEC": usec, **({b"WATCHDOG_PID": pid} if pid else {})},
            os.getpid()).interval, (
            (b"", math.inf), (b"3000000", 1.5), (b"3000000", b"%d" % os.getpid(), 1.5),
            (b"3000000", b"1", math.inf), (b"0", math.inf), (b"soon", math.inf)))

# ---- 9 Ledger, 10 Queue ------------------------------------------------------

class Promises(Case):
    def test_a_verb_moves_only_from_its_sources(self):
        """(I1)"""
        for verb, step in MOVES.items():
            for state in set(STATES) - set(step.sources):
                with self.subTest(verb=verb, state=state):
                    job = self.job_in(state)
                    with refused("wrong-state"), self.queue.store.transaction() as store:
                        store.move([queuectl.Change(verb, job, job)], NOON)
                    self.assertEqual(self.state(job.id), state)
                    with contextlib.suppress(queuectl.QueueError):
                        self.queue.delete(job.id)

    def test_an_unknown_filter_is_refused(self):
        for ask in (self.queue.jobs, self.queue.count, lambda **given: [*self.queue.pages(**given)],
                    functools.partial(swept, self.queue, "delete")):
            with self.assertRaisesRegex(TypeError, "no such filter: tags"):
                ask(tags="nightly")

    def test_a_broken_rule_is_not_told_as_a_taken_key(self):
        job = self.job(unique="k")
        with self.assertRaises(queuectl.Stale), self.queue.store.transaction() as store:
            store.move([queuectl.Change("retry", job, job._replace(attempts=None))], NOON)

    def test_a_batch_is_added_whole_or_not_at_all(self):
        ring = [{"id": f"r{n}", "after": [f"r{(n + 1) % 6}", "free"]} for n in range(6)]
        for specs, code, item, words in (
                (["x", {}, "x"], "job-exists", 2, ""),
                ([{"unique": "k"}, {"unique": "k"}, {"after": ["none"]}], "invalid-job", 2, ""),
                ([{"id": "a", "after": ["b"]}, {"id": "b", "after": ["a"]}], "invalid-job", 0,
                 "a, b wait for each other"),
                (["free", {"after": ["free"]}, *ring], "invalid-job", 2,
                 "^r0, r1, r2, r3, r4 wait for each other")):
            with self.subTest(specs), refused(code, words, item=item):
                self.jobs(specs)
        self.assertEqual(sum(self.queue.counts().values()), 0)

    def test_a_job_comes_back_as_it_was_given(self):
        self.job(id="first")
        given = {"id": "x", "queue": "q", "priority": 7, "max_retries": 4, "timeout": 9.0,
                 "backoff_base": 3.0, "after": ("first",), "unique": "u", "tags": ("a", "b"),
                 "env": {"A": "ü"}, "cwd": "/", "run_at": "2027-03-01T00:00:00.000Z", "once": "o",
                 "backoff_max": 60.0, "no_retry_on": "2,64-78", "after_any": ("first",),
                 "expires_at": "2027-03-02T00:00:00.000Z", "held": True, "slots": 2}
        self.job("make all", **given)
        job = self.queue.job("x")
        self.assertEqual(job, job._replace(**given))
        self.assertLessEqual({name for name, field in queuectl.FIELDS.items()
                              if "e" in field.uses} - {"delay", "expires", "command"}, set(given))
        self.assertEqual(self.queue.store.rows("SELECT after, tags, env FROM jobs"), [
            ("[]", "[]", "{}"), ('["first"]', '["a", "b"]', '{"A": "ü"}')])

    def test_a_number_is_never_used_again(self):
        """(I4)"""
        for given, wanted in ((None, "job-1"), (None, "job-2"), ("job-10", "job-10")):
            self.assertEqual(self.job(id=given).id, wanted)
            self.queue.delete(wanted)
        self.assertGreater(self.job().seq, 10)

    def test_a_unique_key_adds_no_second_job_until_the_first_is_over(self):
        names = []
        for _ in range(2):
            jobs = [self.job(unique="k", max_retries=1) for _ in range(2)]
            self.assertEqual(jobs[0].id, jobs[1].id)
            self.assertNotIn(jobs[0].id, names)
            names.append(jobs[0].id)
            if len(names) == 2:
                with refused("in-use", f"job-1 cannot .*: {names[1]} has .*'k'.*; wait for"):
                    self.queue.retry("job-1")
            self.run_next(1)
        with refused("in-use", f"{names[1]} cannot .* job-1 has .*; retry one of"):
            self.queue.retry(*names)
        for wanted in ([names[1]], []):     # the newest
            self.assertEqual(swept(self.queue, "retry", DEAD), wanted)
        with refused("in-use"):
            self.queue.retry_dead("job-1")

    def test_a_taken_unique_key_adds_neither_a_job_nor_needs(self):
        self.jobs(["x", {"id": "old", "unique": "old"}])
        jobs = self.jobs([{"unique": key, **({"after": ["x"]} if needs else {})} for key, needs in (
            ("k", True), ("k", True), ("l", False), ("l", True), ("old", True), (None, False))])
        self.assertEqual(ids(jobs), ["job-3", "job-3", "job-5", "job-5", "old", "job-8"])
        self.assertEqual([self.queue.job(job.id).waits for job in jobs],
                         ["blocked"] * 2 + ["ready"] * 4)
        self.assertEqual(self.queue.counts()[PENDING], 5)
        self.assertEqual(self.queue.store.rows("SELECT needs, job FROM dependencies"),
                         [(1, jobs[0].seq)])

    def test_a_job_waits_for_those_it_comes_after(self):
        self.jobs([{"id": "b", "after": ["a"]}, "a"])
        claims = self.tick(2).claims
        self.assertEqual(ids(claims), ["a"])
        self.assertEqual(self.queue.waiting_for(self.queue.job("b"))[0], "after a (processing)")
        self.assertEqual(ids(self.end(claims, free=1).claims), ["b"])

        jobs = self.jobs([{"id": "c", "after": ["a"]}, {"id": "d", "after": ["a", "b", "c"]}])
        self.assertEqual([job.waits for job in jobs], ["ready", "blocked"])
        self.queue.delete("a")
        self.assertEqual([self.queue.job(name).waits for name in "cd"], ["ready", "blocked"])
        self.assertEqual(self.queue.waiting_for(jobs[1])[:2],
                         ["after c (pending)", "after b (processing)"])

    def test_a_job_after_any_end_waits_until_the_others_have_finished(self):
        for state in (COMPLETED, DEAD, CANCELLED):
            with self.subTest(state):
                self.anew()
                self.jobs([{"id": "first", "max_retries": 1},
                           {"id": "strict", "after": ["first"]},
                           {"id": "any", "after_any": ["first"]},
                           {"id": "last", "after_any": ["any"], "after": ["any"]}])
                self.assertEqual(self.queue.waiting_for(self.queue.job("any"))[0],
                                 "after first (pending)")
                with refused("in-use", "waits for first"):
                    self.queue.delete("first")
                if state == CANCELLED:
                    self.queue.cancel("first")
                else:
                    self.run_next(int(state == DEAD))
                waits = ["ready" if state == COMPLETED else "blocked", "ready", "blocked"]
                self.assertEqual([self.queue.job(name).waits
                                  for name in ("strict", "any", "last")], waits)
                self.assertEqual(self.job(after_any=["first"]).waits, "ready")
                self.assertEqual(ids(self.queue.stuck()[1]),
                                 ["strict"] * (state != COMPLETED))
                self.assert_sound()
                self.queue.retry("first")
                self.assertEqual([self.queue.job(name).waits for name in (
                    "strict", "any", "last")], ["blocked"] * 3)
                self.queue.cancel("first")
                self.queue.cancel("strict")
                self.queue.delete("first")
                self.assertEqual(self.queue.job("any").waits, "ready")
        with refused("invalid-job", "no job 'none'", key="after_any"):
            self.job(after_any=["none"])

    def test_a_held_job_waits_until_it_is_released(self):
        self.jobs([{"id": "held", "held": True}, {"id": "b", "after": ["held"]}, {"id": "c"},
                   {"id": "failed", "priority": 1}])
        self.run_next(1)
        self.queue.hold("failed", "c")
        self.after(60)
        self.assertEqual(self.tick(4).claims, [])
        self.assertTrue(self.claims.is_drained())
        self.assertEqual(self.queue.waiting_for(self.queue.job("c"))[0], "held")
        self.assertEqual([*self.queue.left_waiting()], [
            "left waiting: 4 of queue default cannot run: held is held"])
        for ask in (self.queue.wait_all, functools.partial(self.queue.wait, "b")):
            with refused("blocked", "held"):
                ask(timeout=0)
        self.assertEqual(self.queue.stuck(), (0, []))
        for ask, name, words in (("hold", "held", "is held"), ("release", "b", "not held")):
            with refused("wrong-state", words):
                getattr(self.queue, ask)(name)
        self.assertEqual(ids(self.queue.retry("c")), ["c"])
        self.queue.hold("b")
        self.assertEqual(sorted(swept(self.queue, "release")), ["b", "failed", "held"])
        self.assertEqual([self.queue.job(name).waits for name in ("held", "b", "c", "failed")],
                         ["ready", "blocked", "ready", "ready"])
        self.assert_sound()

    def test_a_job_that_has_not_started_in_time_is_cancelled(self):
        self.jobs([{"id": "late", "expires": 60}, {"id": "blocked", "after": ["late"],
                   "expires": "1m"}, {"id": "any", "after_any": ["late"]},
                   {"id": "fails", "priority": 1, "expires": 60, "backoff_base": 100},
                   {"id": "then", "expires_at": NOON + 61}])
        self.run_next(1)
        self.after(60)
        self.assertTrue(self.claims.is_work_ready([1]))
        self.assertEqual(self.queue.waiting_for(self.queue.job("late"))[0],
                         "expired: the next worker cancels it")
        self.assertEqual(ids(self.tick(2).claims), ["any", "then"])
        self.assertEqual(self.queue.job("fails").expires_at, None)
        last = {event.id: (event.target, event.reason) for event in self.queue.events_since()}
        self.assertEqual([last[name] for name in ("late", "blocked", "fails")], [
            (CANCELLED, "expired"), (CANCELLED, "expired"), (FAILED, "failed")])
        late = self.queue.job("late")
        self.assertEqual((late.error, late.finished_at), ("expired", queuectl.iso(NOON + 60)))
        self.queue.retry("late")
        self.assertEqual((self.queue.job("late").waits, self.queue.job("late").expires_at),
                         ("ready", None))
        with refused("invalid-job", "both given", key="expires"):
            self.job(expires=5, expires_at=NOON)
        for change in ({"delay": 60}, {"run_at": self.clock() + 61}):
            with self.subTest(change), refused("invalid-job", "expires before", key="run_at"):
                self.job(expires=60, **change)
        self.job(id="edited", expires=60)
        with refused("invalid-job", "expires before", key="run_at"):
            self.queue.edit("edited", delay=60)

    def test_a_requeued_run_has_started_in_time_and_a_spare_claim_has_not(self):
        self.jobs([{"id": "ran", "expires": 60}, {"id": "spare", "expires": 60}])
        ran, spare = self.tick(2).claims
        self.end(ran, Outcome("released", 143, None, 1.0))
        self.end(spare, "released")
        self.after(60)
        self.assertEqual(ids(self.tick(2).claims), ["ran"])
        self.assertEqual(self.queue.job("spare").state, CANCELLED)

    def test_a_job_runs_where_it_was_enqueued_or_where_it_says(self):
        here, add = os.getcwd(), functools.partial(self.queue.add_schedule, command="x")
        self.assertEqual([self.job().cwd, self.job(cwd="/").cwd], [here, "/"])
        self.assertEqual([add("t", "@daily").job["cwd"], add(
            "s", "@daily", cwd="/", **{"max-retries": 7}, tags=["t"]).job["cwd"]], [here, "/"])
        job = self.queue.run_schedule("s")
        self.assertEqual((job.cwd, job.max_retries, job.tags), ("/", 7, ("t", "schedule:s")))
        with self.queue.store.transaction() as store:   # the worker's own
            self.assertEqual(store.add([Job(command="x")], NOON)[0][0].cwd, "")
        for fields, key in (({"tags": ["a b"]}, "tags"), ({"run_at": NOON}, "run_at")):
            with refused("invalid-job", key=key):
                add("u", "@daily", **fields)

    def test_in_a_directory_that_has_no_name_paths_must_be_absolute(self):
        self.addCleanup(os.chdir, os.getcwd())
        for name, end, words in ((b"odd-\xff", os.path.isdir, "name is not UTF-8"),
                                 (b"gone", os.rmdir, "directory is gone")):
            folder = os.path.join(os.fsencode(self.dir), name)
            os.mkdir(folder)
            os.chdir(folder)
            end(folder)
            with self.subTest(name), refused("invalid-job", words):
                self.job()
            self.assertEqual(self.job(cwd="/").cwd, "/")
        with refused("unwritable", "give an absolute --db"):
            Queue("queue.db")

    def test_a_queue_is_in_the_current_directory_and_closed_at_the_end_of_its_block(self):
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.dir)
        with Queue() as queue:
            self.assertEqual(queue.path, os.path.realpath(self.path))
            let_go(queue.host.locks.hold(1))
            queue.host.locks.is_held(1)
            probe = queue.host.locks._probe
        with refused("unsupported", "closed"):
            queue.jobs()
        with self.assertRaises(OSError):
            os.fstat(probe)

    def test_retry_resets_the_attempts_and_keeps_the_history_of_each_job_once(self):
        one, two = self.job_in(DEAD), self.job_in(DEAD)
        [job] = self.queue.retry_dead(one.id, one.id)
        self.assertEqual((job.state, job.attempts, job.crashes), (PENDING, 0, 0))
        self.assertEqual(len(self.queue.runs(job.id)), 1)
        with refused("wrong-state", "not dead"):
            self.queue.retry_dead(two.id, job.id)
        for verb in (self.queue.cancel, self.queue.retry, self.queue.delete):
            self.assertEqual(ids(verb(one.id, one.id)), [one.id])
        self.assertEqual(self.state(two.id), DEAD)

    def test_a_chain_is_deleted_whole_in_any_order(self):
        chain = [{"id": "a", "after": ["b"]}, {"id": "b", "after": ["c"]}, "c"]
        for order in itertools.permutations("abc"):
            self.jobs(chain)
            self.assertEqual(ids(self.queue.delete(*order)), [*order])
        self.jobs(chain)
        with refused("in-use"):
            self.queue.delete("c", "a")
        self.queue.cancel("b")      # so it waits no more
        self.assertEqual(ids(self.queue.delete("c")), ["c"])
        self.jobs([{"id": f"n{n}", "after": [f"n{n + 1}"] * (n < 250)} for n in range(251)])
        self.assertEqual(len(swept(self.queue, "delete", PENDING, search="true")), 252)

    def test_times_are_taken_when_the_lock_is_there(self):
        asked, queue = [], self.queue
        self.tick()
        self.job()
        queue.clock = self.claims._clock = lambda: asked.append(
            queue.store.db._db.in_transaction) or NOON
        for call in (self.claim, lambda: queue.cancel("job-1"), lambda: self.end(1, "cancelled"),
                     lambda: queue.retry("job-1"), lambda: queue.delete("job-1")):
            asked.clear()
            call()
            self.assertEqual(set(asked), {True})
        queue.clock = self.claims._clock = self.clock

    def test_extremes_of_time_and_number_are_kept(self):
        first = self.job(run_at="0001-01-01T00:00:00Z", max_retries=10**9, backoff_base="1d")
        self.job(run_at="9999-12-31T23:59:59Z", priority=10**9)
        self.spoil("UPDATE jobs SET attempts = 1000000 WHERE seq = 1")
        self.assertEqual(self.run_next(1).job.id, first.id)
        job = self.queue.job(first.id)
        self.assertEqual((job.state, job.attempts), (FAILED, 1000001))
        self.assertEqual(queuectl.epoch(job.run_at), NOON + 3600)

    def test_a_setting_takes_effect_at_once_and_only_if_valid(self):
        self.queue.configure("max_retries", " 5 ")
        self.assertEqual((self.queue.setting("max-retries"), self.job().max_retries), ("5", 5))
        for key, value, code, words in (
                ("backoff-base", "soon", "invalid-value", ""),
                ("shell", "/", "invalid-value", "/ cannot be executed"),
                ("shell", "/etc/passwd", "invalid-value", "cannot be executed"),
                ("timout", "1s", "no-such-setting", "did you mean `timeout`")):
            with refused(code, words):
                self.queue.configure(key, value)
        self.queue.configure("timeout", "")
        self.assertEqual(self.queue.setting("timeout"), "none")

    def test_listings_are_in_order_and_as_long_as_wanted(self):
        self.jobs(2001, cwd="/")
        self.queue.cancel("job-2001", "job-1", "job-7")
        newest = [f"job-{n}" for n in range(2001, 0, -1)]
        self.assertEqual(ids(self.queue.pages()), newest)
        for limit in (1, 999, 1000, 1001, 2000):
            self.assertEqual(ids(self.queue.pages(limit)), newest[:limit])
        self.assertEqual(ids(self.queue.pages(state=CANCELLED, limit=2)), ["job-2001", "job-7"])
        self.assertEqual(ids(self.queue.jobs([CANCELLED, PENDING])), newest)
        for state in ((), PENDING, (PENDING, CANCELLED)):
            self.assertEqual(len(self.queue.jobs(state, limit=3)), 3)
            self.assertEqual(len(self.queue.jobs(state)), self.queue.count(state))
        for sort in ("newest", "queue"):
            self.assertEqual(ids(self.queue.jobs(sort=sort, before=3)), ["job-2", "job-1"])
        with refused("invalid-value", "cannot sort by 'age'"):
            self.queue.jobs(sort="age")

    def test_a_sweep_changes_only_what_fits(self):
        self.jobs([{"command": "make a", "id": "a", "queue": "q", "tags": ["t"]},
                   {"command": "make b", "id": "b"},
                   {"command": "rm 100%", "id": "c", "tags": ["t", "u"]},
                   {"command": "rm b", "id": "d", "queue": "q"}])
        self.queue.cancel("d")
        for filters, state, wanted in (
                ({"queue": "q"}, PENDING, "a"), ({"tag": "t"}, (), "ca"),
                ({"search": "make"}, PENDING, "ba"), ({"search": "%"}, (), "c"),
                ({"queue": "q"}, (PENDING, CANCELLED), "da"),
                ({"queue": "q", "search": "rm"}, (), "d"), ({"queue": "no"}, (), ""),
                ({"queue": None, "tag": None, "search": None}, CANCELLED, "d")):
            with self.subTest(filters=filters, state=state):
                self.assertEqual(self.queue.count(state, **filters), len(wanted))
                self.assertEqual(swept(self.queue, "retry", state, **filters), [*wanted])
                swept(self.queue, "cancel", search="rm b")
        with refused("invalid-value", "did you mean `dead`"):
            swept(self.queue, "delete", "deda")
        for text in ("x" * 60_000, "a\0b"):
            with refused("invalid-value", "0 to 256 characters"):
                self.queue.jobs(search=text)

    def test_jobs_are_chosen_by_how_they_ended_and_by_when_they_changed(self):
        self.jobs("abc", max_retries=1)
        for status, error in ((2, "No space"), (70, "full"), (0, None)):
            self.run_next(Outcome("failed" if status else "completed", status, error))
            self.after(10)
        self.job(id="d")
        for filters, wanted in (
                ({"exit_code": (2,)}, "a"), ({"exit_code": (0, 70)}, "cb"),
                ({"search": "no SPACE"}, "a"), ({"search": "full", "exit_code": (2,)}, ""),
                ({"since": NOON + 10}, "dcb"), ({"since": NOON + 10.002}, "dc")):
            with self.subTest(filters):
                self.assertEqual("".join(ids(self.queue.jobs(**filters))), wanted)
                self.assertEqual(self.queue.count(**filters), len(wanted))

    def test_a_sweep_by_age_takes_what_is_over_the_oldest_end_first(self):
        self.jobs([*"abcd", {"id": "waits", "max_retries": 3, "backoff_base": 1000, "priority": 1}])
        self.run_next(1)
        for name in "cabd":
            self.queue.cancel(name)
            self.after(10)
        self.after(60)          # c ended 100 s ago, then a, b and d 10 s each
        for states in (FAILED, PENDING, PROCESSING, (DEAD, FAILED)):
            with refused("invalid-value", "from a job's end"):
                swept(self.queue, "delete", states, older_than=50)
        for states, seconds, wanted in ((CANCELLED, 80.5, ["c", "a"]), (CANCELLED, 80, ["b"]),
                                        ((), 0, ["d"])):
            self.assertEqual(swept(self.queue, "delete", states, older_than=seconds), wanted)
        self.assertEqual(ids(self.queue.jobs()), ["waits"])

    def test_a_sweep_passes_each_job_that_it_may_not_change_once(self):
        names = [f"needed-{n}" for n in range(2 * SWEEP_BATCH - 2)]
        for name, moment in (("one", "'2026-01-01T00:00:00.000Z'"),
                             ("own", "printf('2026-01-01T00:00:00.%03dZ', seq)")):
            with self.subTest(name):
                self.anew()
                self.jobs([*names, "free", {"id": "runs", "priority": 9}])
                self.job(id="last", after=names)
                self.queue.cancel(*names, "free")
                self.claim()
                self.do(f"UPDATE jobs SET finished_at = {moment} WHERE waits IS NULL")
                why = []
                self.assertEqual(swept(self.queue, "delete", CANCELLED, older_than=60,
                                       keep=why.append), ["free"])
                self.assertEqual(len(why), len(names))
                self.assertRegex(str(why[0]), "last waits for needed-.* .cancelled.")
        self.assertEqual(swept(self.queue, "retry", PROCESSING), [])
        self.assertEqual(swept(self.queue, "delete"), ["last", *reversed(names)])
        self.assertEqual(ids(self.queue.jobs()), ["runs"])

    def test_a_sweep_cancels_waiting_jobs_and_has_running_ones_cancelled(self):
        for state in (COMPLETED, DEAD, CANCELLED, FAILED, PROCESSING, PENDING):
            job = self.job_in(state)
        self.assertEqual(swept(self.queue, "cancel"), ["job-6", "job-5", "job-4"])
        self.assertEqual((job.id, self.state("job-5")), ("job-6", PROCESSING))
        self.assertEqual(self.tick().mine, {self.queue.job("job-5").claim: queuectl.CANCEL})

    def test_who_stops_a_sweep_keeps_what_is_done(self):
        """It takes the newest first, in batches; between two nobody has to wait."""
        other = self.a_queue()
        other.store.db.patience = 0.0
        self.jobs(2 * SWEEP_BATCH + 50)
        sweep, taken = self.queue.sweep("cancel"), []
        for left in (SWEEP_BATCH + 51, 52):
            taken += [job.seq for job in next(sweep)]
            other.enqueue("true")
            self.assertEqual(self.queue.counts()[PENDING], left)
        sweep.close()
        self.assertEqual(taken, [*range(2 * SWEEP_BATCH + 50, 50, -1)])
        self.assertEqual(len(swept(self.queue, "cancel", CANCELLED)), 0)

    def test_an_edit_takes_effect(self):
        self.job(id="a")
        for fields, wanted in (
                ({"command": "y"}, {}), ({"max_retries": 9}, {}),
                ({"timeout": "1m"}, {"timeout": 60}),
                ({"priority": 5}, {"rank": -5, "updated_at": queuectl.iso(NOON + 20)}),
                ({"delay": 60}, {"run_at": queuectl.iso(NOON + 85), "waits": "scheduled"}),
                ({"run_at": NOON - 1}, {"run_at": queuectl.iso(NOON - 1), "waits": "ready"}),
                ({"queue": "q"}, {})):
            with self.subTest(fields):
                self.after(5)
                [job] = self.queue.edit("a", **fields)
                fields.pop("delay", 0)
                self.assertEqual(job, job._replace(**{**fields, **wanted}))
                self.assertEqual(self.queue.job("a"), job)
        self.assertEqual(self.queue.counts("q")[PENDING], 1)
        self.assertEqual(sum(self.queue.counts("default").values()), 0)
        self.jobs(["first", {"id": "b", "after": ["first"]}])
        self.queue.edit("b", run_at=NOON - 60, queue="q", priority=9)
        self.assertEqual(self.queue.job("b").waits, "blocked")

    def test_a_retry_changes_fields_in_its_transaction_or_nothing(self):
        names = [self.job_in(state).id for state in (DEAD, COMPLETED, CANCELLED)]
        with refused("invalid-job", key="timeout"):
            self.queue.retry(*names, timeout="soon")
        runs = self.job_in(PROCESSING).id
        with refused("wrong-state"):
            self.queue.retry(*names, runs, timeout=5)
        self.assertEqual([self.state(name) for name in names], [DEAD, COMPLETED, CANCELLED])
        with refused("wrong-state"):
            self.queue.retry_dead(names[1], timeout=5)
        for jobs in (self.queue.retry(*names, timeout="1h", queue="q", delay=60),
                     [self.queue.job(name) for name in names]):
            for job in jobs:
                self.assertEqual((job.state, job.timeout, job.queue, job.waits, job.run_at),
                                 (PENDING, 3600, "q", "scheduled", queuectl.iso(NOON + 60)))
        self.assertEqual(self.queue.counts("q")[PENDING], 3)

    def test_a_sweep_edits_waiting_and_dead_jobs_and_passes_over_the_rest(self):
        dead, over, runs = (self.job_in(state).id for state in (DEAD, COMPLETED, PROCESSING))
        self.jobs("ab")
        why = []
        self.assertEqual(swept(self.queue, "edit", fields={"timeout": 5}), ["b", "a", dead])
        self.assertEqual(swept(self.queue, "edit", fields={"delay": 5}, keep=why.append),
                         ["b", "a"])
        self.assertRegex(str(*why), f"{dead} is dead, so no time is set.*retry {dead}")
        self.assertEqual([self.queue.job(name).timeout for name in ("a", dead, over, runs)],
                         [5, 5, None, None])
        with refused("invalid-job", key="timeout"):
            swept(self.queue, "edit", fields={"timeout": -1})
        self.assertEqual(swept(self.queue, "retry", DEAD, fields={"priority": 9}), [dead])
        self.assertEqual((self.claim().job.id, self.queue.job(dead).timeout), (dead, 5))

    def test_a_job_that_crashed_is_edited_though_none_of_its_runs_may_fail(self):
        job = self.job(max_retries=0)
        self.lose(self.claim())
        self.assertEqual(self.queue.edit(job.id, priority=1)[0].state, FAILED)

    def test_an_edit_that_is_refused_changes_nothing(self):
        over, runs, job = self.job_in(COMPLETED).id, self.job_in(PROCESSING).id, self.job(id="a")
        for names, fields, error in (
                ([runs], {"priority": 1}, "wrong-state"),
                (["a", over], {"priority": 1}, "wrong-state"),
                (["a", "gone"], {"priority": 1}, "no-such-job"),
                (["a"], {"priority": "high"}, "invalid-job"), (["a"], {"queue": ""}, "invalid-job"),
                (["a"], {"priority": 1, "id": "other"}, "invalid-job")):
            with self.subTest(names, fields=fields):
                with refused(error):
                    self.queue.edit(*names, **fields)
                self.assertEqual(self.queue.job("a"), job)

    def test_a_failed_job_keeps_an_attempt_whatever_is_edited(self):
        self.job(id="failed", max_retries=5)
        for _ in range(2):
            self.run_next(1)
            self.after(3600)
        self.job(id="new")
        with refused("invalid-job", key="max_retries", hint="use at least 3"):
            self.queue.edit("failed", max_retries=2)
        for name, number in (("failed", 3), ("new", 0)):
            self.assertEqual(self.queue.edit(name, max_retries=number)[0].max_retries, number)
        self.assertEqual(self.queue.edit("new", run_at=self.clock.now)[0].waits, "ready")

    def test_a_clock_set_back_while_the_lock_is_waited_for_stretches_no_delay(self):
        begin = self.queue.store.transaction

        def late():
            self.after(-3600)
            return begin()
        for change, seconds in ((lambda: self.job(delay=60), 60),
                                (lambda: self.queue.edit("job-1", delay=30), 30)):
            with mock.patch.object(self.queue.store, "transaction", late):
                change()
            job, now = self.queue.job("job-1"), self.clock.now
            self.assertEqual((job.run_at, job.updated_at), tuple(map(
                queuectl.iso, (now + seconds, now))))

    def test_a_change_of_ageing_gives_all_waiting_jobs_the_rank_of_new_ones(self):
        """And a retry that of its new time."""
        chance, ends = random.Random("rank"), ("0001-01-01T00:00:00Z", "9999-12-31T23:59:59Z")
        self.jobs([{"run_at": at, "priority": chance.choice((
            0, 1, -1, 10**9, -10**9, chance.randint(-99, 99)))}
            for at in (*ends, *(chance.uniform(0, 4e9) for _ in range(200)))])
        self.queue.cancel("job-9")
        for value in ("1s", "90.0015s", "30d", "none", "7m", None):
            with self.subTest(value):
                self.queue.configure("priority-ageing", value)
                self.run_next(1)
                now = self.queue.store.settings()
                for job in self.queue.jobs((PENDING, FAILED)):
                    self.assertEqual(job.rank, queuectl.rank_of(job.priority, job.run_at, now))
        self.assertEqual(job.rank, -job.priority)

    def test_a_pause_outlasts_the_queue_object_and_defaults_are_not_kept(self):
        def shown():
            return [(view.name, view.paused, view.limit) for view in self.queue.queues()]
        with Queue(self.path) as other:
            other.pause("a", "b")
            other.pause()
            other.limit_queue("c", 10**9)
        self.assertEqual(self.queue.status().paused, ["*", "a", "b"])
        self.assertEqual(shown(), [("a", True, 0), ("b", True, 0), ("c", False, 10**9),
                                   ("default", False, 0)])
        self.queue.resume()
        self.assertEqual(self.queue.status().paused, ["a", "b"])
        self.queue.resume("a", "b")
        self.queue.limit_queue("c", 0)
        for call in (self.queue.pause, self.queue.resume,
                     lambda name: self.queue.limit_queue(name, 1)):
            for name in ("a b", "*"):
                with refused("invalid-value", "is not a name"):
                    call(name)
        for name, limit in (("q", -1), ("q", 10**9 + 1), ("q", 1.5), ("", 1)):
            with refused("invalid-value"):
                self.queue.limit_queue(name, limit)
        self.assertEqual(shown(), [("default", False, 0)])

    def test_a_waiting_job_says_all_that_hinders_it(self):
        self.jobs([{"id": "dead", "priority": -1}, {"id": "full", "queue": "full"}])
        self.queue.cancel("dead")
        worker, side = self.worker(name="p", queues=("q", "full")), self.worker(queues=("side",))
        self.claim(worker)
        for name in ("full", "q"):
            self.queue.limit_queue(name, 1)
        self.queue.pause("halt")
        for queue, fields, wanted, lasting in (
                ("q", {}, ["next in line"], 0), ("q", {}, ["behind 1 other job"], 0),
                ("q", {}, ["behind 2 other jobs"], 0), ("q", {"delay": 120}, ["due in 2m"], 1),
                ("q", {"after": ["dead"]}, ["after dead (cancelled)"], 1),
                ("full", {}, ["queue `full` is at its limit 1"], 1),
                ("other", {}, ["no worker takes queue `other`"], 1),
                ("halt", {"delay": 60}, ["queue `halt` is paused", "no worker takes queue `halt`",
                                         "due in 1m"], 3)):
            with self.subTest(queue, fields=fields):
                job = self.job(queue=queue, **fields)
                self.assertEqual(self.queue.waiting_for(job), wanted)
                [found] = self.queue.hindrances([job, self.queue.job("full")]).values()
                self.assertEqual([one.message for one in found], wanted[:lasting])
                self.assertEqual([one.level == queuectl.NOTE for one in found],
                                 [one.message.startswith("due") for one in found])
        [gone] = self.queue.delete(self.job(queue="fleeting").id)
        self.assertEqual(self.queue.waiting_for(gone), ["no worker takes queue `fleeting`"])
        self.queue.pause()
        worker.leave()
        side.leave()
        self.assertEqual(self.queue.waiting_for(self.job()),
                         ["all queues are paused", "no worker is running"])
        self.assertIn("its worker p is gone", self.queue.waiting_for(self.queue.job("full"))[0])

    def test_a_job_does_not_wait_for_one_that_needs_its_slots(self):
        self.jobs([{"id": "a", "slots": 2}])
        [claim] = self.tick(3, by=self.worker(slots=3)).claims
        self.jobs([{"id": "b", "slots": 2}, {"id": "c"}])
        with mock.patch.dict(os.environ, QUEUECTL_DB=self.path, QUEUECTL_CLAIM=str(claim.number)):
            for job_id, code in (("b", "blocked"), ("c", "not-finished")):
                with refused(code):
                    self.queue.wait(job_id, timeout=0.01)
            self.worker(name="other", slots=2)
            with refused("not-finished"):
                self.queue.wait("b", timeout=0.01)

    def test_a_job_says_that_it_waits_for_slots_or_is_too_wide(self):
        self.worker(name="two", slots=2, queues=("q",))
        claims = self.worker(name="four", slots=4, queues=("q", "other"))
        self.jobs([{"id": "b", "slots": 3}, {"id": "a"}], queue="q")
        self.assertEqual([len(one.slots) for one in self.tick(4, by=claims).claims], [3, 1])
        for queue, slots, level, wanted in (
                ("q", 4, queuectl.NOTE, ["waits for 4 slots, 0 free"]),
                ("q", 2, queuectl.NOTE, ["behind 1 other job"]),    # there is such a worker
                ("q", 3, queuectl.NOTE, ["waits for 3 slots, 0 free", "behind 2 other jobs"]),
                ("q", 5, queuectl.WARNING, ["needs 5 slots, the largest worker has 4"])):
            with self.subTest(slots, queue=queue):
                job = self.job(queue=queue, slots=slots, id=f"w{slots}")
                self.assertEqual(self.queue.waiting_for(job), wanted)
                self.assertLessEqual({one.level for one in self.queue.hindrances([job])[job.id]},
                                     {level})
        self.end(claims._held[2], by=claims)
        self.job(queue="other", id="one")       # only worker four takes it
        self.assertEqual([self.queue.waiting_for(self.queue.job(id)) for id in ("w4", "one")],
                         [["waits for 4 slots, 1 free"], ["behind w4, which waits for 4 slots"]])
        self.queue.delete("one")
        [found] = self.queue.status().attention
        self.assertEqual((found.code, found.message, found.hint), (
            "too-wide", "1 job of queue q cannot run: w5 needs more than 4 slots, and no worker "
            "has more", "`queuectl edit w5 --slots 4`, or start a larger worker"))
        self.assertIn(found, queuectl.Inspection(self.queue).findings())
        self.queue.edit("w5", slots=4)
        self.assertEqual(self.queue.status().attention, [])

    def test_a_claim_in_the_environment_that_is_no_number_of_a_run_is_ignored(self):
        for claim in ("\u00b2", "9" * 30, "-1", ""):
            with self.subTest(claim), mock.patch.dict(
                    os.environ, QUEUECTL_DB=self.path, QUEUECTL_CLAIM=claim):
                self.assertIsNone(self.queue.caller())

    def test_only_jobs_that_could_start_stand_before_a_job(self):
        claims, names = self.worker(queues=("default", "full", "roomy", "halt")), ("full", "roomy")
        self.jobs([{"queue": "full"}, {"backoff_base": 120}, {}])
        self.claim(claims)
        for how in (1, 0):
            self.run_next(how, claims)
        self.assertEqual(self.queue.waiting_for(self.queue.job("job-2")),
                         ["due in 2m (retry 1 of 2)"])
        for limit, name in enumerate(names, 1):
            self.queue.limit_queue(name, limit)
        self.queue.pause("halt")
        self.jobs([{"queue": name} for name in (*names, "halt", "foreign", "default")])
        last = self.job()
        self.job()
        self.assertEqual(self.queue.waiting_for(last), ["behind 2 other jobs"])
        self.worker(name="all")
        self.assertEqual(self.queue.waiting_for(last), ["behind 3 other jobs"])

    def test_events_come_in_order_each_once_from_any_place_on(self):
        self.assertEqual((self.queue.events_since(), self.queue.last_event()), ([], 0))
        self.job(id="a", queue="q", max_retries=1)
        claim = self.claim()
        self.after(60)
        self.job(id="b")
        self.end(claim, Outcome("failed", 7, "exit status 7"))
        self.queue.cancel("b")
        self.queue.retry("a")
        events = self.queue.events_since()
        self.assertEqual([(e.id, e.source, e.target, e.reason) for e in events], [
            ("a", None, PENDING, "enqueued"), ("a", PENDING, PROCESSING, "claimed by a worker"),
            ("b", None, PENDING, "enqueued"), ("a", PROCESSING, DEAD, "exit status 7"),
            ("b", PENDING, CANCELLED, "cancelled"), ("a", DEAD, PENDING, "retried by a user")])
        for after, given, seqs in ((0, {"queue": "q"}, [1, 2, 4, 6]), (0, {"limit": 2}, [1, 2]),
                                   (0, {"since": queuectl.iso(NOON + 60)}, [3, 4, 5, 6]),
                                   (4, {}, [5, 6]), (6, {}, [])):
            self.assertEqual([e.seq for e in self.queue.events_since(after, **given)], seqs)
        self.queue.delete("a", "b")     # no number comes again
        self.assertEqual((self.queue.events_since(), self.queue.last_event()), ([], 6))
        self.job(id="a")
        self.assertEqual([e.seq for e in self.queue.events_since()], [7])

    def test_waiting_ends_with_the_last_job_and_tells_the_progress(self):
        """What was over counts, though it is retried and deleted meanwhile."""
        other, told = self.a_queue(), []
        self.jobs("abc")
        other.cancel("a")
        steps = [lambda: other.retry("a"), lambda: other.cancel("a", "b"),
                 lambda: other.delete("a"), lambda: self.run_next(by=self.worker(other))]

        def tell(progress):
            told.append(progress)
            if steps:
                steps.pop(0)()
        jobs = self.queue.wait("b", "c", "a", "b", timeout=DEADLINE, tell=tell)
        self.assertEqual([(job.id, job.state) for job in jobs],
                         [("b", CANCELLED), ("c", COMPLETED), ("a", CANCELLED)])
        self.assertEqual([told[0], *told[-2:]], [queuectl.Progress(*counts) for counts in (
            (2, 0, 0, 1, 0), (1, 0, 0, 2, 0), (0, 0, 1, 2, 0))])
        self.assertEqual((told[0].over, told[0].left), (1, 2))

    def test_waiting_for_all_counts_what_ends_meanwhile(self):
        """And all that was done, though it is deleted."""
        self.jobs(["before", "gone", "a", "b"], queue="q")
        self.job(id="c")
        self.queue.cancel("before", "gone")
        self.queue.delete("gone")
        told, other = [], self.a_queue()

        def tell(progress):
            told.append(progress)
            if len(told) < 3:
                other.cancel("ab"[len(told) - 1])
        self.assertEqual(self.queue.wait_all("q", DEADLINE, tell), (0, 0, 0, 2, 0))
        self.assertEqual(told[0], (2, 0, 0, 0, 0))
        self.run_next()
        self.queue.delete("c")
        self.job_in(PROCESSING)
        each(self, self.queue.progress, (
            ((0, 1, 1, 4, 0),), ("q", (0, 0, 0, 4, 0)), ("no", (0,) * 5)))

    def test_progress_tells_which_jobs_are_not_due(self):
        self.jobs([{"id": "now"}, {"id": "delayed", "delay": 60},
                   {"id": "blocked", "after": ["now"]}, {"queue": "q", "delay": 60},
                   {"id": "held", "held": True}])
        for seconds, later in ((0, 3), (60, 2)):    # due, though no worker has seen it
            self.after(seconds)
            self.assertEqual(self.queue.progress("default"), (4, 0, 0, 0, later))
            told = []
            with refused("not-finished"):
                self.queue.wait("now", "delayed", "blocked", "held", timeout=0, tell=told.append)
            self.assertEqual(told, [(4, 0, 0, 0, later)])

    def test_a_wait_looks_again_every_second_and_not_after_the_end(self):
        for name, names in (("wait", ["a"]), ("wait_all", [])):
            for timeout, longest in ((None, 1.0), (0.5, 0.5)):
                self.anew()
                self.job(id="a")
                look = mock.Mock(side_effect=lambda *_: self.queue.cancel("a"))
                with mock.patch.object(self.queue, "await_change", look):
                    getattr(self.queue, name)(*names, timeout=timeout)
                [[_, seconds]] = [call[0] for call in look.call_args_list]
                self.assertTrue(0 < seconds <= longest, seconds)

    def test_waiting_in_vain_is_refused(self):
        self.jobs(["a", {"id": "over", "queue": "q"}, {"queue": "q"}, {"queue": "q"}])
        self.queue.cancel("over")
        wait, wait_all, other = self.queue.wait, self.queue.wait_all, self.a_queue()
        for call, names, words in (
                (wait, ["a"], "1 of 1 jobs not over"), (wait, ["a", "over"], "1 of 2 jobs not"),
                (wait_all, ["default"], "1 job not over"), (wait_all, ["q"], "2 jobs not over")):
            with refused("not-finished", words):
                call(*names, timeout=0)
        with refused("no-such-job"):
            wait("a", "gone")
        with refused("no-such-job"):
            wait("a", timeout=DEADLINE, tell=lambda _: other.jobs() and swept(
                other, "delete", queue="default"))
        self.assertEqual(wait(), [])

    def hooks(self):
        return [(job.command, *(job.env[f"QUEUECTL_{key}"] for key in (
            "JOB_ID", "STATE", "EXIT_CODE", "ERROR")))
            for job in self.queue.jobs(queue="hooks", sort="oldest")]

    def end_one(self, kind, exit_code=None, error=None):
        outcome = Outcome(kind, exit_code, error, 0.1)
        self.end(self.run_next(outcome), outcome)       # it may be told of twice

    def test_a_hook_follows_its_kind_of_end_once_and_is_told_of_it(self):
        self.queue.configure("on-dead", "bad")      # needs no other hook
        self.job_in(COMPLETED)
        self.job_in(DEAD)
        self.assertEqual([hook[:2] for hook in self.hooks()], [("bad", "job-2")])
        self.queue.configure("on-completed", "good")
        self.queue.configure("crash-limit", "1")
        self.jobs([{"id": name, "priority": 9 - n} for n, name in enumerate("abcde")],
                  max_retries=2, backoff_base=0)
        for name, kind, code, error, hook in (
                ("a", "completed", 0, None, ("good", "a", COMPLETED, "0", "")),
                ("b", "failed", 3, "exit status 3", None),
                ("b", "failed", 4, "it: 'ünï'", ("bad", "b", DEAD, "4", "it: 'ünï'")),
                ("c", "failed", None, "no cwd", None), ("c", "cancelled", None, "cancelled", None),
                ("d", "released", None, None, None), ("d", "cancelled", None, None, None),
                ("e", "lost", None, "its worker was lost", (
                    "bad", "e", DEAD, "", "its worker was lost"))):
            with self.subTest(name=name, kind=kind):
                before = len(self.hooks())
                self.end_one(kind, code, error)
                self.assertEqual(self.hooks()[before:], [hook] if hook else [])
        self.assertEqual(self.queue.jobs(queue="hooks")[0].cwd, os.path.dirname(self.queue.path))

    def test_a_hook_is_told_of_command_tags_schedule_and_the_end_of_the_output(self):
        def told():
            env = self.queue.jobs(queue="hooks")[0].env
            return [env[f"QUEUECTL_{key}"] for key in (
                "COMMAND", "TAGS", "SCHEDULE", "OUTPUT_TAIL")]
        for key, value in (("on-completed", "good"), ("on-dead", "bad"), ("crash-limit", "1")):
            self.queue.configure(key, value)
        self.job("make 'ü'", tags=["a", "schedule:nightly"])
        output = "ü".encode() * 3000 + b"\xff\0end"
        self.end(self.claim(), Outcome("completed", 0, None, 0.1, output, len(output)))
        self.assertEqual(told(), ["make 'ü'", "a schedule:nightly", "nightly",
                                  "ü" * 2045 + "\ufffd\ufffdend"])
        self.job("x", priority=1)
        run = self.claim()
        self.tick(outputs={run.number: output_of(b"before it was lost")})
        self.end(run, "lost")
        self.assertEqual(told(), ["x", "", "", "before it was lost"])

    def test_the_jobs_of_hooks_call_no_hooks(self):
        for key in ("on-completed", "on-dead", "on-idle"):
            self.queue.configure(key, key)
        self.job(id="a")
        self.run_next()
        self.queue.edit("job-3", max_retries=1)
        for how in (0, 1):
            self.run_next(how)
        self.assertEqual([hook[0] for hook in self.hooks()], ["on-completed", "on-idle"])
        self.assertEqual(self.queue.counts()[PENDING], 0)

    def test_the_idle_hook_comes_when_nothing_is_left_and_only_then(self):
        for other, kind, count in (
                (None, "completed", 1), (None, "failed", 1), (None, "cancelled", 1),
                (None, "released", 0), ({}, "completed", 0), ({"delay": 3600}, "completed", 0),
                ({"queue": "hooks"}, "completed", 1), ({"after": ["a"]}, "failed", 0)):
            with self.subTest(other=other, kind=kind):
                self.anew()
                self.queue.configure("on-idle", "idle")
                self.job(id="a", priority=1, max_retries=1)
                if other is not None:
                    self.job("y", **other)
                self.end_one(kind, 1)
                self.assertEqual(self.queue.count(search="idle"), count)

    def test_the_idle_hook_comes_once_for_all_that_end_together_or_not_at_all(self):
        self.queue.configure("on-idle", "idle")
        last = self.jobs("abc")[2]
        self.end(self.tick(2).claims)
        self.assertEqual(self.hooks(), [])
        with self.assertRaises(ZeroDivisionError), self.queue.store.transaction() as store:
            store.move([queuectl.Change("cancel", last, last)], NOON)
            self.assertEqual(len(self.hooks()), 1)
            raise ZeroDivisionError     # as if the process were killed
        self.assertEqual((self.state("c"), self.hooks()), (PENDING, []))
        self.queue.cancel("c")
        self.assertEqual(self.hooks(), [("idle", "c", CANCELLED, "", "")])
        self.queue.cancel(self.job().id)
        self.assertEqual(len(self.hooks()), 2)

    def test_a_reader_gets_the_output_of_a_run_under_way(self):
        wake_ups, heard = self.a_socket(DEADLINE), []
        claims = self.worker(self.a_queue(), wake_ups.getsockname()[1], name="w")
        self.job()
        claim = self.claim(claims)
        while heard[-1:] != [queuectl.NEW_JOBS]:
            heard.append(wake_ups.recv(99))

        def answer():
            heard.append(wake_ups.recv(99))
            self.tick(outputs={claim.number: output_of(b"so far")}, by=claims)
        thread = threading.Thread(target=answer)
        thread.start()
        self.assertEqual(self.queue.fresh_run("job-1", patience=DEADLINE).output, b"so far")
        thread.join()
        self.assertEqual(heard[-1], queuectl.PEEK)
        self.end(claim, Outcome("completed", 0, None, 1.0, b"so far, all", 11), by=claims)
        self.assertEqual(self.queue.fresh_run("job-1", 1, DEADLINE).output, b"so far, all")
        claims.leave()
        self.job()
        self.claim()        # nobody waits for a worker that cannot hear
        with mock.patch.object(self.queue, "await_change", side_effect=AssertionError):
            self.assertEqual(self.queue.fresh_run("job-2").output, b"")

    def test_each_queue_has_its_own_statistics(self):
        """And none in which nothing was done."""
        self.jobs([{}, {"queue": "q"}])
        self.end(self.tick(2).claims)
        self.jobs([{}, {"queue": "q"}, {}])
        self.assertEqual([(name, one.enqueued, one.completed, one.run_time.n)
                          for name, one in self.queue.stats().items()],
                         [("", 5, 2, 2), ("default", 3, 1, 1), ("q", 2, 1, 1)])
        for seconds, verb, wanted in ((0, "cancel", ["", "default", "q"]), (3600, "retry", [""]),
                                      (0, "cancel", ["", "default"]), (3600, "delete", [""])):
            self.after(seconds)
            getattr(self.queue, verb)("job-3")
            self.assertEqual([*self.queue.stats(60)], wanted)

    def test_workers_are_asked_to_stop_by_name_or_all_at_once(self):
        workers = self.worker(name="one"), self.worker(name="two")
        for name, words in (("tow", "did you mean `two`"), ("nobody at all", "worker list")):
            with refused("no-such-worker", words):
                self.queue.stop_workers("one", name)
        self.assertEqual([self.tick(by=worker).stop for worker in workers], [None, None])
        self.job()
        for names, now, asked, stops in (
                ([], True, ["one", "two"], ["now", "now"]),
                (["one"], False, ["one"], ["drain", "now"])):
            self.assertEqual([one.name for one in self.queue.stop_workers(*names, now=now)], asked)
            ticks = [self.tick([1, 0], by=worker) for worker in workers]
            self.assertEqual([(tick.stop, tick.claims) for tick in ticks],
                             [(stop, []) for stop in stops])

    def test_a_file_shrinks_when_most_of_it_was_deleted(self):
        self.queue.cancel(*ids(self.jobs(6000, command="x" * 1000)))
        before = self.queue.store.row("PRAGMA page_count")[0]
        swept(self.queue, "delete", CANCELLED)
        self.assertLess(self.queue.store.row("PRAGMA page_count")[0], before / 2)


# ---- 11 Claims ---------------------------------------------------------------

class Ticks(Case):
    def test_a_worker_leaves_a_file_that_was_put_back_to_an_older_one(self):
        """(I4): its numbers would be given again."""
        self.job()
        self.claim()
        for change in ("runs = runs - 1", "runs = runs + 1, workers = workers - 1"):
            self.spoil(f"UPDATE counters SET {change}")
            with self.subTest(change), self.assertRaises(queuectl.Gone):
                self.tick()

    def test_until_all_due_jobs_are_ready_nothing_is_claimed(self):
        self.jobs(queuectl.DUE_BATCH, run_at=NOON + 1, cwd="/")
        self.job(id="urgent", run_at=NOON + 2, priority=9)
        self.after(10)
        for is_behind, claimed in ((True, []), (False, ["urgent"])):
            tick = self.tick(1)
            self.assertEqual((tick.is_behind, ids(tick.claims)), (is_behind, claimed))
        self.assertEqual(tick.mine, {tick.claims[0].number: None})

    def test_paused_full_and_foreign_queues_are_passed_over(self):
        for name, count, priority in (("paused", 100, 9), ("two", 100, 5), ("free", 5, 0)):
            self.jobs(count, queue=name, priority=priority)
        self.queue.pause("paused")
        self.queue.limit_queue("two", 2)    # for all workers together
        first = self.claim()
        self.assertEqual(first.job.queue, "two")
        for queues, claimed in (((), ["two", "free", "free"]), (("free",), ["free"] * 2)):
            tick = self.tick(len(claimed), by=self.worker(name=f"for {len(queues)}", queues=queues))
            self.assertEqual([one.job.queue for one in tick.claims], claimed)
        self.assertEqual([one.job.queue for one in self.end(first, free=3).claims],
                         ["two", "free"])
        for limit, claimed in ((1, []), (0, ["two"] * 2)):
            self.queue.limit_queue("two", limit)
            self.assertEqual([one.job.queue for one in self.tick(2).claims], claimed)

    @NEEDS_LOCKS
    def test_numbers_whose_lock_is_held_are_passed_over(self):
        """(I5); a worker's may be of later days, if the file was put back."""
        self.job()
        for number in (1, queuectl.WORKER_LOCKS + 1):
            self.addCleanup(os.close, self.queue.host.locks.hold(number))
        self.assertEqual((self.claim().number, self.claims.worker.id), (2, 2))
        self.assertEqual([one.id for one in self.queue.store.workers()], [2])

    def test_a_paused_queue_waits_and_its_runs_go_on(self):
        """A pause of all and that of a queue are two things."""
        self.jobs([{"id": "runs", "queue": "a"}, {"id": "a", "queue": "a"},
                   {"id": "b", "queue": "b"}])
        runs = self.claim()
        for verbs, claimed in (([("pause",), ("resume", "a", "b")], []),
                               ([("pause", "a"), ("resume",)], ["b"])):
            for verb, *names in verbs:
                getattr(self.queue, verb)(*names)
            self.assertEqual(ids(self.tick(4).claims), claimed)
        self.assertEqual([one.after.state for one in self.end(runs, free=1).changes], [COMPLETED])
        self.queue.resume("a")
        self.assertEqual(ids(self.tick(4).claims), ["a"])

    def test_the_order_is_priority_then_due_time_then_age_and_never_changes_with_time(self):
        chance = random.Random("order")
        jobs = [Job(command="x", id=f"j{n}", priority=chance.randint(-9, 9),
                    run_at=queuectl.iso(NOON - chance.randint(0, 10) * 60)) for n in range(40)]
        for ageing, key in (
                ("none", lambda one: (-one.priority, one.run_at)),
                ("61s", lambda one: queuectl.epoch(one.run_at) - 61 * one.priority)):
            for hours in (0, 1000):
                self.anew()
                self.queue.configure("priority-ageing", ageing)
                self.queue.enqueue_many(jobs)
                self.after(hours * 3600)
                self.assertEqual(ids(self.tick(40).claims), ids(sorted(jobs, key=key)))

    def test_a_late_worker_cannot_end_a_later_claim(self):
        """(I3)"""
        self.job()
        old = self.claim()
        self.lose(old)
        new = self.claim()
        self.assertEqual(self.end(old).changes, [])
        self.tick(outputs={old.number: output_of(b"late")})
        job = self.queue.job("job-1")
        self.assertEqual((job.claim, job.crashes, job.attempts), (new.number, 1, 0))
        self.assertEqual(self.queue.run("job-1", 1).output, b"")

    def test_a_seized_run_is_a_crash_though_its_worker_thawed_and_a_cancelled_one_is_none(self):
        self.jobs(3)
        claims = self.tick(3).claims
        self.queue.cancel("job-2")
        self.assertEqual(self.tick().mine, {1: None, 2: "cancel", 3: None})
        self.tick(seized=[self.queue.run("job-1"), self.queue.run("job-2")])
        self.end(claims, Outcome("failed", 143, "killed", 2.0))
        self.assertEqual([(job.state, job.attempts, job.crashes, self.queue.run(job.id).outcome)
                          for job in self.queue.jobs(sort="oldest")],
                         [(FAILED, 0, 1, "lost"), (CANCELLED, 0, 0, "cancelled"),
                          (FAILED, 1, 0, "failed")])
        self.assertEqual(self.queue.stats()[""].run_time.n, 3)

    def test_each_run_keeps_its_result_and_the_last_is_shown(self):
        self.jobs("ab")
        claim, foreign = self.claim(), self.claim(self.worker(name="other"))
        self.after(1)
        self.tick(outputs={claim.number: output_of(b"same")})
        self.end(claim, Outcome("failed", 3, "no luck", 1.5, b"SAME", 4))
        job, ended = self.queue.job("a"), queuectl.iso(self.clock.now)
        self.after(3600)
        [again] = self.tick([2]).claims

        first, second = self.queue.runs("a")
        self.assertEqual((job.exit_code, job.error, job.updated_at, job.finished_at),
                         (3, "no luck", ended, ended))
        self.assertEqual(first, first._replace(
            outcome="failed", exit_code=3, error="no luck", duration=1.5, output=b"SAME", slot=1,
            started_at=queuectl.iso(NOON), finished_at=ended))
        self.assertEqual((second.number, second.slot, second.outcome), (2, 2, None))
        self.assertEqual([self.queue.run("a", n).claim for n in (1, 2, None)],
                         [claim.number, again.number, again.number])
        self.assertEqual(self.queue.run("b").claim, foreign.number)
        self.assertEqual(self.queue.job("a").error, None)
        for number in (3, 0):
            with refused("no-such-run", f"no run {number}"):
                self.queue.run("a", number)

    def test_very_many_dependents_are_unblocked_in_steps(self):
        self.job(id="first")
        self.jobs(4500, after=["first"], cwd="/")
        tick, ready = self.end(self.claim()), []
        while tick.is_behind:
            ready += self.queue.store.rows("SELECT COUNT(*) FROM jobs WHERE waits = 'ready'")
            if len(ready) == 2:     # what comes in the midst of it is counted as well
                self.job(id="new", after="first")
                self.assert_sound()
            tick = self.tick()
        self.assertEqual([n for n, in ready], [2000, 4000, 4501])
        self.assertEqual(self.queue.job("new").waits, "ready")

    def test_a_retry_in_the_midst_of_it_blocks_all_again(self):
        for verb, wanted in (("retry", {"blocked": 2500, "ready": 1}), ("delete", {"ready": 2500})):
            with self.subTest(verb):
                self.anew()
                self.job(id="first")
                self.jobs(2500, after=["first"], cwd="/")
                self.run_next()
                getattr(self.queue, verb)("first")
                self.assertEqual(dict(self.queue.store.rows(
                    "SELECT waits, COUNT(*) FROM jobs GROUP BY waits")), wanted)
                self.assertFalse(self.tick().is_behind)

    def test_jobs_that_are_over_for_too_long_are_deleted(self):
        self.jobs(["good", {"id": "bad", "max_retries": 1}, "gone"])
        for how in (0, 1):
            self.run_next(how)
        self.queue.cancel("gone")
        self.after(3600)
        for key, value, left in (
                ("completed", "2h", ["gone", "bad", "good"]), ("completed", "59m", ["gone", "bad"]),
                ("dead", "61m", ["gone", "bad"]), ("dead", "1h", ["gone"])):
            with self.subTest(key=key, value=value):
                self.queue.configure(f"retention-{key}", value)
                self.assertFalse(self.tick().is_expiring)
                self.assertEqual(ids(self.queue.jobs()), left)

    def test_a_tick_that_fails_at_its_end_holds_no_lock_of_its_claims(self):
        """Nor does one where no locks work."""
        for works in (True, False) if hasattr(fcntl, "F_OFD_SETLK") else (False,):
            self.anew()
            self.queue.host.locks._works = works
            self.jobs(2)
            with mock.patch.object(self.queue.store, "write_counters", side_effect=ZeroDivisionError), \
                    self.assertRaises(ZeroDivisionError):
                self.tick(2)
            for is_held in (False, works):
                self.assertEqual([self.queue.host.locks.is_held(n) for n in (1, 2)], [is_held] * 2)
                self.tick(2)
            self.assertEqual(self.tick().mine, {1: None, 2: None})
            self.claims.leave()
            self.assertEqual(self.queue.store.workers(), [])

    def test_a_spare_claim_begins_when_a_slot_is_free(self):
        self.jobs(3)
        first, second = self.tick([0, 0]).claims
        at_once = self.claim()
        self.after(5)
        begun = self.begin(first, 2)
        self.tick()
        third = self.begin(second, 3)
        self.assertEqual((begun.slot, second.slot, at_once.slot), (2, 0, 1))
        self.after(5)
        self.end([begun, third, at_once])   # the third began and ended within one tick
        self.assertEqual([(run.slot, run.started_at, run.finished_at) for run in map(
            self.queue.run, ("job-1", "job-2"))],
            [(n, queuectl.iso(NOON + 5), queuectl.iso(NOON + 10)) for n in (2, 3)])
        self.assertEqual((self.claims._held, self.claims._begun), ({}, set()))

    def test_slots_are_kept_for_the_first_job_that_needs_more_than_are_free(self):
        """By two workers, each for itself; the one that is too small goes on."""
        one, two, small = (self.worker(name=f"w{n}", slots=n) for n in (3, 2, 1))
        self.jobs([{"id": "a"}, {"id": "b"}, {"id": "wide", "slots": 2}, {"id": "c"}, {"id": "d"}])
        [a], [b] = self.tick([1], by=one).claims, self.tick([1], by=two).claims
        for claims, free in ((one, [2]), (two, [2]), (one, [3])):   # is there no loop either?
            self.assertFalse(claims.is_work_ready(free))
            self.assertEqual(self.tick([*free, 0, 0], by=claims).claims, [])
        self.assertTrue(small.is_work_ready([1]))
        self.assertEqual(ids(self.tick([1], by=small).claims), ["c"])
        self.assertTrue(one.is_work_ready([2, 3]))
        [wide] = self.end(b, by=two, free=[1, 2]).claims
        self.assertEqual((wide.job.id, wide.slot, wide.slots), ("wide", 1, (1, 2)))
        self.assertEqual(ids(self.tick([2], by=one).claims), ["d"])
        run = self.queue.run("wide")
        self.assertEqual((run.slot, run.slots, run.gpus), (1, "1,2", None))
        status = [(one.busy, one.slots) for one in self.queue.status().workers]
        self.assertEqual(status, [(2, 3), (2, 2), (1, 1)])
        self.assertIn('worker_slots{state="busy"} 5', queuectl.metrics_text(self.queue.scrape()))
        self.assertEqual(self.end(a, by=one).changes[0].after.state, COMPLETED)

    def test_a_job_too_wide_for_a_worker_hides_no_other_from_it(self):
        """Also behind many, in many queues; a worker that drains does not wait for it."""
        claims = self.worker(slots=2, queues=("q", "r"))
        self.jobs(150, queue="q", slots=3, priority=1, backoff_base=0)
        large = self.worker(name="large", slots=3)
        self.end(self.tick(3, by=large).claims, 1, large)
        self.assertFalse(claims.is_work_ready([1, 2]))
        self.assertTrue(claims.is_drained())
        self.jobs([{"id": "a", "queue": "q", "slots": 2}, {"id": "b", "queue": "r"}])
        self.assertFalse(claims.is_drained())
        self.queue.limit_queue("q", 1)
        self.job(queue="q")
        self.assertEqual([(one.job.id, one.slots) for one in self.tick(
            [1, 2, 0, 0], by=claims).claims], [("a", (1, 2)), ("b", ())])

    def test_a_limit_counts_jobs_and_so_does_a_maximum(self):
        claims = self.worker(slots=6)
        self.queue.limit_queue("q", 2)
        self.jobs([{"queue": "q", "slots": 2}] * 3)
        tick = claims.tick(queuectl.Report(), range(1, 7), 1)
        self.assertEqual([one.slots for one in tick.claims], [(1, 2)])
        claims.failed(tick)
        self.assertEqual([one.slots for one in self.tick(6, by=claims).claims], [(1, 2), (3, 4)])

    def test_a_gpu_is_not_used_while_a_lost_run_may_use_it(self):
        lost = self.worker(name="lost", slots=2, gpus=("0", "1"))
        with refused("in-use", "worker lost uses GPU 1 already"):
            self.worker(name="w", slots=2, gpus=("2", "1"))
        self.queue.configure("crash-limit", "1")
        self.jobs([{"id": "a"}, {"id": "b"}, {"id": "wide", "slots": 2}])
        [a] = self.tick([2], by=lost).claims
        self.assertEqual((self.queue.run("a").gpus, self.queue.run("a").slots), ("1", ""))
        self.leave_behind(lost)
        heir = self.worker(name="heir", slots=2, gpus=("1", "0"))
        self.assertEqual([(one.job.id, one.slots) for one in self.tick(2, by=heir).claims],
                         [("b", (2,))])
        self.assertEqual(self.queue.run("b").gpus, "0")
        self.end(heir._held[2], by=heir)
        self.assertFalse(heir.is_work_ready([1, 2]))
        self.lose(a)
        self.assertTrue(heir.is_work_ready([1, 2]))
        self.assertEqual([one.slots for one in self.tick(2, by=heir).claims], [(1, 2)])
        self.assertEqual(self.queue.run("wide").gpus, "1,0")

    def test_a_job_is_claimed_ahead_if_one_of_several_slots_holds_all(self):
        self.jobs([{"slots": 2}, {}])
        self.tick([1, 2, 0], by=self.worker(slots=2))
        self.assertEqual([self.state(f"job-{n}") for n in (1, 2)], [PROCESSING] * 2)
        self.assertEqual(self.queue.counts()[PROCESSING], 1)
        self.assertEqual(self.queue.workers()[0].busy, 2)

    def test_jobs_claimed_ahead_are_waiting_for_people(self):
        claims = self.worker(slots=2)
        self.jobs(3, queue="q")
        self.jobs([{"id": "other"}])
        self.tick([1, 0, 0], by=claims)     # the second may have begun in slot 2
        ahead, before = self.queue.shown("job-3"), self.queue.shown("job-2")
        self.assertEqual((ahead.state, ahead.waits, ahead.worker, ahead.started_at, ahead.runs),
                         (PENDING, "ready", None, None, 0))
        self.assertEqual(before, self.queue.job("job-2"))
        self.assertEqual(self.queue.job("job-3").state, PROCESSING)
        self.assertEqual(ids(self.queue.jobs(PROCESSING)), ["job-2", "job-1"])
        self.assertEqual([job.state for job in self.queue.jobs(sort="oldest")],
                         [PROCESSING, PROCESSING, PENDING, PENDING])
        status = self.queue.status()
        self.assertEqual((status.counts[PENDING], status.counts[PROCESSING]), (2, 2))
        self.assertEqual(ids(status.workers[0].running), ["job-1", "job-2"])
        self.assertEqual(self.queue.progress("q")[:2], (1, 2))
        self.assertEqual([view.counts[PROCESSING] for view in self.queue.queues()], [0, 2])
        self.assertEqual(self.queue.scrape().jobs["q", PROCESSING], 2)
        self.assertEqual(sum(map(len, self.queue.sweep("delete", PENDING))), 1)

    def test_each_change_that_matters_to_a_worker_wakes_it(self):
        wake_ups, queue = self.a_socket(0), self.queue
        claims = self.worker(port=wake_ups.getsockname()[1])

        def heard():
            found = set()
            with contextlib.suppress(BlockingIOError):
                while True:
                    found.add(wake_ups.recv(queuectl.SOCKET_BUFFER))
            return found
        self.job(id="dead", max_retries=1)
        self.run_next(1, claims)
        self.job(id="a")
        for number, change in enumerate((
                lambda: queue.retry_dead("dead"), lambda: queue.cancel("dead"),
                lambda: queue.edit("a", priority=1), lambda: queue.pause("q"),
                lambda: queue.resume("q"), lambda: queue.limit_queue("q", 1),
                lambda: queue.cancel("a"), lambda: queue.retry("a"),
                lambda: swept(queue, "cancel"), lambda: swept(queue, "retry"), self.every,
                lambda: queue.resume_schedule("s"), lambda: queue.run_schedule("s"),
                lambda: queue.configure("priority-ageing", "1m"),
                lambda: queue.configure("priority-ageing", None), queue.stop_workers)):
            with self.subTest(number):
                heard()
                change()
                self.assertTrue(heard() & {queuectl.NEW_JOBS, queuectl.NEW_ORDERS})
        queue.cancel("a")
        heard()
        for verb, filters, is_changed in (("cancel", {}, False), ("delete", {}, True),
                                          ("retry", {"search": "none"}, False)):
            with self.subTest(verb):        # that gives a worker nothing to do
                self.assertEqual(bool(swept(queue, verb, CANCELLED, **filters)), is_changed)
                self.assertEqual(heard(), set())

    def test_a_worker_sleeps_until_a_job_or_a_schedule_is_due(self):
        self.every("@yearly", "far")
        for act, is_ready, due in (
                (self.every, False, 600),
                (lambda: self.job(id="late", delay=700), False, 600),
                (lambda: self.job(id="soon", delay=60), False, 60),
                (lambda: self.after(60), True, 60), (lambda: self.claim(), False, 600),
                (lambda: self.after(540), True, 600),
                (lambda: self.queue.pause_schedule("s"), False, 700), (self.job, True, 700)):
            act()
            with self.subTest(is_ready=is_ready, due=due):
                self.assertEqual((self.claims.is_work_ready([1]), self.claims.next_due()),
                                 (is_ready, NOON + due))
        self.assertEqual(self.queue.status().next_due.id, "late")

    def test_jobs_that_a_worker_could_not_take_are_no_work_for_it(self):
        """Else two idle workers would go on waking each other with their ticks."""
        claims, queue = self.worker(queues=("own", "full", "later")), self.queue
        queue.limit_queue("full", 1)
        self.jobs([{"queue": name, "id": name} for name in ("foreign", "own", "full")])
        self.assertTrue(claims.is_work_ready([1]))
        queue.pause("own")
        full = self.claim(claims)
        self.assertEqual(full.job.id, "full")
        for act, is_ready in (
                (lambda: self.job(queue="full"), False),
                (lambda: self.job(queue="later", delay=3600), False),
                (lambda: self.job(queue="foreign", delay=60), False),
                (lambda: self.after(60), True),     # somebody has to make it ready
                (lambda: self.tick(by=claims), False),
                (lambda: queue.resume("own"), True), (queue.pause, False), (queue.resume, True),
                (lambda: queue.pause("own"), False), (lambda: self.end(full, by=claims), True)):
            act()
            self.assertIs(claims.is_work_ready([1]), is_ready)
        queue.pause("own", "full")
        self.assertFalse(claims.is_work_ready([1]))
        self.assertTrue(self.worker(name="all").is_work_ready([1]))

    def test_a_worker_has_drained_when_its_own_queues_hold_nothing_for_now(self):
        for name, what, is_drained in (
                ("other", "pending", True), ("other", "processing", True),
                ("other", "failed", True), ("q", "pending", False), ("q", "processing", False),
                ("q", "failed", False), ("q", "due", False), ("q", "later", True),
                ("q", "cancelled", True), ("q", "paused", True)):
            with self.subTest(name, what=what):
                self.anew()
                worker = self.worker(name="worker")
                self.job(queue=name, delay={"due": 5, "later": 60}.get(what), backoff_base=3600)
                if what == "processing":
                    self.claim(worker)
                elif what == "failed":
                    self.run_next(1, worker)
                elif what == "cancelled":
                    self.queue.cancel("job-1")
                elif what == "paused":
                    self.queue.pause("q")
                self.after(10)
                self.assertIs(self.worker(name="mine", queues=("q",)).is_drained(), is_drained)
                self.assertIs(worker.is_drained(), is_drained and name == "q")
                self.assertIs(worker.leave_if_drained(), is_drained and name == "q")
                self.assertIs("worker" in [one.name for one in self.queue.store.workers()],
                              not (is_drained and name == "q"))

    def test_a_worker_is_in_the_table_until_it_leaves(self):
        claims = self.worker(port=4567, slots=3, queues=("a", "b"))
        worker, held = claims.worker, self.queue.host.locks.is_held
        self.assertEqual(self.queue.store.workers(), [worker])
        self.assertEqual(worker, worker._replace(
            id=1, pid=os.getpid(), slots=3, queues=("a", "b"), port=4567, heartbeats=0))
        self.assertIn(str(os.getpid()), worker.name)
        self.assertEqual(self.worker(name="b").worker.id, 2)
        self.after(3)
        self.tick(by=claims)
        self.assertEqual(self.queue.store.workers()[0].heartbeat_at, queuectl.iso(NOON + 3))
        claims.leave()
        self.do("CREATE TRIGGER no BEFORE INSERT ON workers BEGIN SELECT RAISE(ABORT, 'no'); END")
        with self.assertRaises(queuectl.Stale):
            self.worker(name="c")
        self.assertEqual(ids(self.queue.store.workers()), [2])
        self.assertEqual([held(queuectl.WORKER_LOCKS + n) for n in (1, 3)], [False] * 2)

    def test_a_run_is_lost_after_a_lease_of_at_least_three_heartbeats_or_without_a_row(self):
        self.job()
        self.claim()
        self.queue.configure("lease", "1s")
        other, number = self.worker(name="other"), self.claims.worker.id
        for claims, seconds, lost in ((other, 14.0, 0), (other, 15.0, 1), (None, 15.0, 0)):
            self.assertEqual(len(self.peers(claims, {number: seconds}).lost()), lost)
        self.queue.configure("heartbeat", "100ms")   # now it is as short as it can be
        self.assertEqual(self.peers(other).lost(), [])
        self.do(queuectl.Sql.DELETE_WORKER, id=number)
        self.assertEqual([run.job for run in self.peers(other).lost()], [1])

    def test_a_worker_that_comes_and_claims_between_two_looks_is_not_lost(self):
        watcher, read, came = self.worker(), self.queue.store.rows, []
        self.job()

        def rows(sql, **values):
            found = read(sql, **values)
            if sql == queuectl.Sql.WORKERS and not came:
                came.append(True)
                self.claim(self.worker(self.a_queue(), name="newcomer"))
            return found
        with mock.patch.object(self.queue.store, "rows", rows):
            self.assertEqual(self.peers(watcher).lost(), [])
        self.assertTrue(came)

    def test_a_worker_that_lost_its_jobs_and_lives_stays_in_the_table(self):
        claims, foreign = self.worker(name="frozen"), self.worker(name="foreign")
        self.job()
        claim = self.claim(claims)
        let_go(foreign.lock)
        self.do("UPDATE workers SET boot = 'other', host = 'other' WHERE id = 2")
        self.lose(claim)    # nobody here can tell if the other lives
        self.assertEqual([v.name for v in self.queue.workers()], ["frozen", "foreign"])
        self.do(queuectl.Sql.DELETE_WORKER, id=1)
        self.after(60)
        self.tick(by=claims)
        worker = self.queue.workers()[0]
        self.assertEqual((worker.id, worker.name, worker.heartbeat_at),
                         (1, "frozen", queuectl.iso(NOON + 60)))
        self.assertEqual(self.peers(claims).lost(), [])

    def test_the_name_of_a_dead_worker_is_free_and_its_jobs_are_still_found(self):
        dead, _living = self.worker(name="w"), self.worker(name="other")
        self.job()
        self.claim(dead).release()
        self.leave_behind(dead)
        claims = self.worker(name="w")
        gone = self.peers(claims).dead()
        self.assertEqual(ids(gone), [1])
        self.assertEqual(self.tick(by=claims, dead=gone).removed, [])   # it has a job yet
        self.assertEqual([one.name for one in self.queue.store.workers()], ["w#1", "other", "w"])
        [lost] = self.peers(claims).lost()
        tick = self.tick(by=claims, lost=[lost], dead=gone)
        self.assertEqual([(one.after.state, one.after.crashes) for one in tick.changes],
                         [(FAILED, 1)])
        self.assertEqual(ids(tick.removed), [1])
        self.assertEqual([one.name for one in self.queue.store.workers()], ["other", "w"])
        self.assertEqual((self.peers(claims).lost(), self.peers(claims).record(lost)), ([], []))

    def test_a_worker_that_comes_back_finds_its_name_taken(self):
        claims = self.worker(name="w")
        self.job()
        self.do(queuectl.Sql.DELETE_IDLE_WORKER, id=1)  # as those do that take it for dead
        other = self.worker(name="w")
        mine = self.claim(claims)
        self.assertEqual(self.tick(1, by=other).mine, {})
        self.end(mine, by=claims)
        self.assertEqual([(one.id, one.name) for one in self.queue.store.workers()],
                         [(1, "w#1"), (2, "w")])
        self.assertEqual(self.queue.run("job-1").worker, "w#1")

    def test_no_transaction_waits_for_the_host(self):
        """It may have to start `ps`, while all others wait for the write lock (I9)."""
        held, host = [], self.queue.host
        for ask in (host.born, host.is_alive):
            def asked(what, ask=ask):
                held.append(self.queue.store.db._db.in_transaction)
                return ask(what)
            setattr(host, ask.__name__, asked)
            self.addCleanup(vars(host).pop, ask.__name__)
        claims = self.worker(name="w")
        for view in (*self.queue.workers(), *self.queue.scrape().workers):
            self.assertEqual((view.name, view.is_alive), ("w", True))
        queuectl.Inspection(self.queue).findings()
        with refused("in-use"):
            self.worker(name="w")
        self.job()
        claim = self.claim(claims)
        self.leave_behind(claims)
        self.worker(name="w")
        self.lose(claim)
        self.assertEqual(ids(self.queue.store.workers()), [2])
        self.assertEqual((len(held) > 7, any(held)), (True, False))

    def test_the_wait_for_a_slot_begins_when_a_job_is_ready(self):
        self.jobs(["first", {"after": ["first"]}])
        claim = self.claim()
        self.after(3600)                # behind another job
        self.end(claim)
        self.after(2)
        claim = self.claim()
        self.after(100)                 # it runs
        self.end(claim, "released")
        self.after(1)
        self.claim()
        self.assertEqual(self.queue.stats()[""].wait_time[:2], (3, 1.0))    # 0 s, 2 s, 1 s

    def test_statistics_say_which_time_they_cover(self):
        self.do("UPDATE meta SET value = :at WHERE key = 'created_at'",
                at=queuectl.iso(NOON - 90 * 86400))
        for now, asked, covered in (
                (30, 1, 30), (30, 40, 90), (30, 60, 90), (30, None, 90 * 86400 + 30),
                (0.5 - 90 * 86400, 3600, 0.5)):         # it is half a second old
            self.clock.now = NOON + now
            self.assertAlmostEqual(self.queue.covered(asked), covered, 3)

    def test_counters_of_old_minutes_are_deleted_and_those_of_all_time_stay(self):
        self.clock.now = 60.0   # the first hour of 1970 is none of all time
        self.job()
        self.assertEqual([one.at for one in self.queue.history(9)], [queuectl.iso(60)])
        self.assertEqual(self.queue.stats(600)[""].enqueued, 1)
        self.clock.now = NOON
        for _ in range(300):
            self.job()
            self.after(60)
        ever = self.queue.stats()[""]
        self.after(8 * 86400 - 3600)
        while self.tick().is_expiring:
            pass
        self.assertEqual(self.queue.store.rows(
            "SELECT COUNT(DISTINCT minute) FROM tallies WHERE minute > 0"), [(60,)])
        self.assertEqual((ever.enqueued, self.queue.stats()[""]), (301, ever))
        self.assertEqual(self.queue.stats(9 * 86400)[""].enqueued, 60)

    def test_each_of_the_last_minutes_has_its_own_numbers(self):
        for _ in range(4):
            self.job()
            self.run_next()
            self.after(60)
        self.after(-60)
        self.assertEqual([(one.at, one.completed) for one in self.queue.history(3)],
                         [(queuectl.iso(NOON + 60 * n), 1) for n in (1, 2, 3)])
        self.after(-60)     # what a clock that was ahead has counted is not shown
        self.assertEqual([one.completed for one in self.queue.history(2)], [1, 1])
        self.assertEqual(self.queue.stats(59.0)[""].completed, 3)
        self.assertEqual([one.completed for one in self.queue.history(2, "other")], [0, 0])

    # NOON is the beginning of an hour, in any zone of whole hours.
    def every(self, cron="*/10 * * * *", name="s", zone=None, **fields):
        return self.queue.add_schedule(name, cron, zone, **{"command": "x", **fields})

    def next_run(self, name="s"):
        """In seconds after NOON."""
        return queuectl.epoch(self.queue.schedule(name).next_run) - NOON

    def added(self, *workers):
        """The jobs that schedules add in a tick of each worker; they end at once."""
        workers, before = workers or [self.claims], self.queue.last_event()
        for claims in workers:
            self.tick(by=claims)
        added = ids(self.queue.events_since(before))
        for claims in workers:
            if taken := self.tick(4, by=claims).claims:
                self.end(taken, by=claims)
                for one in taken:
                    one.release()
        return added

    def test_a_schedule_that_cannot_be_read_is_paused(self):
        for name, change in (("job", "job = '{\"command\": 7}'"), ("text", "job = '{'"),
                             ("list", "job = '[7]'"), ("cron", "cron = 'never'")):
            self.every("* * * * *", name)
            self.spoil(f"UPDATE schedules SET {change} WHERE name = '{name}'")
        self.job(delay=60)
        self.after(120)
        self.assertEqual(len(self.tick(2).claims), 1)
        self.assertEqual([one.paused for one in self.queue.schedules()], [True] * 4)
        self.assertEqual([self.queue.schedule(name).job for name in ("text", "list")], [{}, {}])
        self.assertEqual([one.code for one in self.problems()], ["schedule"] * 4)
        with refused("invalid-job"):
            self.queue.resume_schedule("text")

    def test_a_run_brings_one_job_whatever_the_number_of_workers(self):
        other = Queue(self.path, clock=lambda: self.clock.now - 0.7)
        self.addCleanup(other.close)
        workers, added = (self.worker(name="a"), self.worker(other, name="b")), []
        self.every(queue="q", priority=3, tags=["own"], env={"A": "b"})
        for _ in range(3600):
            self.after(1)
            if any(claims.is_work_ready([1]) for claims in workers):
                added += [(self.clock.now - NOON, job_id) for job_id in self.added(*workers)]
        self.assertEqual(added, [(600.0 * n, f"job-{n}") for n in range(1, 7)])
        job = self.queue.job("job-1")
        self.assertEqual(job, job._replace(
            command="x", queue="q", priority=3, tags=("own", "schedule:s"), env={"A": "b"},
            cwd=os.getcwd()))
        self.assertEqual(self.queue.schedule("s").last_run, queuectl.iso(NOON + 3600))
        self.assertEqual(self.next_run(), 4200)

    def test_a_clock_that_is_set_brings_no_run_twice_and_puts_none_off(self):
        day, due = 86400, 16200     # 12:30, in seconds after NOON
        for cron, start, steps in (
                ("*/10 * * * *", 0, [(601, 1), *((at, 0) for at in range(550, 1200, 10)),
                                     (1200, 1)]),
                ("*/10 * * * *", day, [(day + 600, 1), (1, 0), (601, 1), (601, 0)]),
                ("*/10 * * * *", day, [(day, 0), (1, 0), (601, 1), (601, 0)]),
                ("30 12 * * *", 0, [
                    (due + 1, 1), (due - 3600, 0), (due + 60, 0),
                    (due + day, 1), (due + day - 3600, 0), (due + day + 60, 0),
                    (due + 2 * day, 1), (due + 2 * day - 10800, 0), (due + 2 * day + 60, 0)])):
            with self.subTest(cron, start=start):
                self.anew()
                self.after(start)
                self.every(cron, zone="UTC")
                for at, jobs in steps:
                    self.clock.now = NOON + at
                    self.assertEqual(len(self.added()), jobs, at)

    def test_an_interval_goes_on_after_a_set_back_of_minutes_and_fixed_times_do_not(self):
        for back, longest in ((0.5, 120), (50, 120), (180, 60), (7200, 60), (366 * 86400, 60)):
            with self.subTest(back=back):
                self.anew()
                self.clock.now = NOON - 90
                for name, cron in (("often", "* * * * *"), ("noon", "0 8 * * *")):
                    self.every(cron, name, "UTC")
                self.clock.now = NOON + 10
                self.end(self.tick(2).claims)
                before = self.next_run("noon")
                self.after(-back)
                self.tick()
                self.assertLessEqual(self.next_run("often") + NOON - self.clock.now, longest)
                self.assertEqual(self.next_run("noon") < before, back > 10800)

    def test_a_run_put_off_and_skipped_by_a_clock_that_was_ahead_is_set_right(self):
        self.every("@yearly", "far")
        far = self.next_run("far")
        self.every("*/5 * * * *")
        self.after(300)
        self.claim()
        for seconds in (400 * 86400, 60 - 400 * 86400):     # the job of one has run a year
            self.after(seconds)
            self.tick()
        self.assertLessEqual(self.next_run() + NOON - self.clock.now, 300)
        self.assertEqual(self.next_run("far"), far)

    def test_a_clock_set_back_holds_up_no_delay_and_no_retry(self):
        self.jobs([{"id": "late", "delay": 3600}, {"id": "noon", "run_at": NOON + 3600},
                   {"id": "retry", "backoff_base": 30, "priority": 9}])
        self.run_next(1)
        self.after(-365 * 86400)
        [found] = [one for one in queuectl.Inspection(self.queue).findings() if one.code == "clock"]
        self.assertIn("2 jobs wait longer than their own delay", found.message)
        self.assertTrue(self.claims.is_work_ready([1]))
        self.tick()
        self.assertEqual([queuectl.epoch(self.queue.job(name).run_at) - self.clock.now
                          for name in ("late", "noon", "retry")],
                         [3600, 3600 + 365 * 86400, 30])
        self.assertFalse(self.claims.is_work_ready([1]))

    def test_runs_missed_in_three_days_of_suspension_are_made_up_once(self):
        workers = self.worker(name="a"), self.worker(name="b")
        for name, cron in (("often", "*/10 * * * *"), ("daily", "0 0 * * *"),
                           ("seldom", "@yearly")):
            self.every(cron, name, command=name)
        self.after(3 * 86400 + 5)
        self.assertEqual({self.queue.job(name).command for name in self.added(*workers)},
                         {"daily", "often"})
        self.assertEqual(len(self.queue.jobs()), 2)
        self.assertEqual((self.added(*workers), self.next_run("often")), ([], 3 * 86400 + 600))

    def test_a_run_whose_last_job_is_not_over_is_skipped(self):
        """The check warns of it until a run comes."""
        self.every(max_retries=2, backoff_base=3600)
        for number, (act, jobs) in enumerate((
                (bool, 1), (bool, 1),           # it waits
                (self.claim, 1), (lambda: self.end(1, 1), 1),
                (lambda: self.queue.cancel("job-1"), 2),
                (lambda: self.queue.delete("job-2"), 3)), 1):
            self.clock.now = NOON + 600 * number
            act()
            self.tick()
            self.assertEqual(self.queue.store.row(queuectl.Sql.COUNTERS)[0], jobs)
            self.assertGreater(self.next_run(), 600 * number)
            self.assertEqual("schedule-skips" in [one.code for one in queuectl.Inspection(
                self.queue).findings()], 1 < number < 5)
        schedule = self.queue.schedule("s")
        self.assertEqual((schedule.last_run, schedule.skipped), (queuectl.iso(NOON + 3600), 3))

    def test_a_missed_run_is_made_up_once_or_not_at_all(self):
        for catch_up, late, wanted in (
                (True, 59, 1), (True, 90000, 1), (False, 59, 1), (False, 61, 0), (False, 90000, 0)):
            with self.subTest(catch_up=catch_up, late=late):
                self.anew()
                self.every("@every 1h", catch_up=catch_up)
                self.after(3600 + late)
                notes = self.tick().notes
                self.assertEqual((len(self.queue.jobs()), bool(notes)), (wanted, not wanted))
                self.assertGreater(self.next_run(), 3600 + late)
                self.assertEqual(self.queue.schedule("s").skipped, 0)

    def test_a_schedule_is_edited_from_its_next_run_on(self):
        before = self.every("30 2 * * *", zone="Europe/Berlin", tags=["t"], env={"A": "b"})
        for fields, changes in (
                ({"timeout": 60}, {"job": {**before.job, "timeout": 60}}), ({}, {}),
                ({"catch_up": False}, {"catch_up": False}), ({"tz": "UTC"}, {"tz": "UTC"}),
                ({"cron": "@hourly"}, {"cron": "@hourly"}), ({"catch_up": True}, {"catch_up": True}),
                ({"cron": "CRON_TZ=Asia/Tokyo 0 9 * * *"}, {"cron": "0 9 * * *", "tz": "Asia/Tokyo"}),
                ({"tags": ["u"]}, {"job": {**before.job, "timeout": 60,
                                           "tags": ["u", "schedule:s"]}})):
            with self.subTest(fields):
                after = self.queue.edit_schedule("s", **fields)
                self.assertEqual(after, before._replace(next_run=after.next_run, **changes))
                self.assertEqual(after.next_run, queuectl.run_after(after, NOON))
                before = after
        for code, fields in (("invalid-value", {"tz": "Nowhere"}), ("invalid-value", {"cron": "x"}),
                             ("invalid-job", {"timeout": "soon"}), ("invalid-job", {"held": True})):
            with self.subTest(fields), refused(code):
                self.queue.edit_schedule("s", **fields)
        with refused("no-such-schedule"):
            self.queue.edit_schedule("t")

    def test_a_schedule_tells_how_its_last_job_ended_also_after_its_deletion(self):
        self.every("@hourly", max_retries=1)
        for how, state in ((0, COMPLETED), (1, DEAD)):
            self.after(3600)
            claim = self.claim()
            self.end(claim, how)
            schedule = self.queue.schedule("s")
            self.assertEqual((schedule.last_state, schedule.last_success),
                             (state, queuectl.iso(NOON + 3600)))
        self.assertIn("schedule-failed", [one.code for one in self.queue.status().attention])
        self.queue.delete(claim.job.id)
        self.assertEqual(queuectl.schedule_object(
            self.queue.schedule("s"), None)["last_state"], DEAD)

    def test_a_paused_schedule_makes_nothing_up(self):
        self.every()
        self.after(3605)    # to resume what was not paused changes nothing
        self.assertEqual(self.queue.resume_schedule("s").next_run, queuectl.iso(NOON + 600))
        self.assertTrue(self.queue.pause_schedule("s").paused)
        self.assertEqual((self.claims.next_due(), self.claims.is_work_ready([1]), self.added()),
                         (None, False, []))
        self.assertFalse(self.queue.resume_schedule("s").paused)
        self.assertEqual((self.next_run(), self.added()), (4200, []))
        self.clock.now = NOON + 4200
        self.assertEqual(len(self.added()), 1)

    def test_a_schedule_run_by_hand_runs_beside_its_runs(self):
        """Its jobs stay when it is removed."""
        self.every()
        self.queue.pause_schedule("s")
        job = self.queue.run_schedule("s")
        self.assertEqual((job.command, job.tags), ("x", ("schedule:s",)))
        self.assertEqual(self.queue.schedule("s").last_run, queuectl.iso(NOON))
        self.queue.resume_schedule("s")
        self.after(600)
        self.tick()
        self.assertEqual(len(self.queue.jobs()), 1)      # that one is not over
        self.queue.cancel(job.id)
        self.after(600)
        self.assertEqual(self.added(), ["job-2"])
        self.queue.remove_schedule("s")
        self.after(600)
        self.assertEqual((self.added(), ids(self.queue.jobs())), ([], ["job-2", "job-1"]))
        for call in (self.queue.remove_schedule, self.queue.pause_schedule,
                     self.queue.run_schedule):
            with refused("no-such-schedule"):
                call("s")

    def test_a_schedule_adds_nothing_while_another_job_has_its_key(self):
        self.job(id="other", unique="k", delay="1d")
        self.every(unique="k")
        self.after(600)
        with refused("job-exists", "other .pending. has"):
            self.queue.run_schedule("s")
        self.assertEqual(self.added(), [])
        schedule = self.queue.schedule("s")
        self.assertEqual((schedule.skipped, schedule.last_run, schedule.last_job), (1, None, None))

    def test_an_invalid_schedule_is_refused(self):
        self.every("@daily", "nightly")
        for name, cron, fields, error in (
                ("nightly", "@hourly", {}, "schedule-exists"),
                ("a b", "@daily", {}, "invalid-value"),
                *(("s", "@daily", fields, "invalid-job") for fields in (
                    {"command": ""}, {"command": None}, {"id": "a"}, {"after": ["a"]},
                    {"once": "k"}, {"delay": 1}, {"run-at": NOON})), ("s", "61 * * * *", {}, "invalid-value")):
            with self.subTest(name, cron=cron, fields=fields), refused(error):
                self.every(cron, name, **fields)
        self.assertEqual([one.name for one in self.queue.schedules()], ["nightly"])
        with refused("no-such-schedule", "did you mean `nightly`"):
            self.queue.schedule("nightyl")

    def test_on_the_days_of_daylight_saving_each_run_brings_one_job(self):
        """Minute by minute, for 48 hours from a local noon."""
        daily, zone = ("30 2 * * *", "15 2 * * *", "45 1 * * *", "0 3 * * *"), "Europe/Berlin"
        for month, day in ((3, 27), (10, 30)):
            with self.subTest(month=month), local_zone("CET-1CEST,M3.5.0,M10.5.0/3"):
                self.anew()
                self.clock.now = time.mktime((2027, month, day, 12, 0, 0, 0, 0, -1))
                for number, cron in enumerate((*daily, "*/30 * * * *")):
                    self.every(cron, f"s{number}", zone, command=cron)
                added = collections.Counter()
                for _ in range(48 * 60):
                    self.after(60)
                    if self.claims.is_work_ready([1]):
                        added.update(self.queue.job(name).command for name in self.added())
                self.assertEqual(added, {**dict.fromkeys(daily, 2), "*/30 * * * *": 96})

# ---- 12 Check ----------------------------------------------------------------

class Checks(Case):
    # What a mistake would leave behind, and the code under which it must be found.
    BREAKS = (
        ("counters", "UPDATE counts SET n = n + 1"),
        ("claims", "DELETE FROM runs WHERE outcome IS NULL"),
        *(("counters", f"UPDATE counters SET {name} = 0")
          for name in ("jobs", "runs", "events", "workers")),
        ("claims", "UPDATE runs SET outcome = NULL, finished_at = NULL"),
        ("history", "UPDATE jobs SET state = 'cancelled' WHERE state = 'completed'"),
        ("history", "DELETE FROM events"),
        ("waits", "UPDATE jobs SET waits = 'blocked' WHERE waits = 'ready'"),
        ("waits", "UPDATE jobs SET waits = 'ready' WHERE waits = 'blocked'"),
        ("orphans", "INSERT INTO tags VALUES ('t', 999)"),)

    def test_a_broken_rule_is_found(self):
        for code, statement in self.BREAKS:
            with self.subTest(statement):
                self.anew()
                for state in (COMPLETED, PROCESSING):
                    self.job_in(state)
                self.jobs([{"id": "waits", "tags": ["t"]}, {"after": ["waits"]}])
                self.assertEqual(self.problems(), [])
                self.spoil(statement)
                self.assertIn(code, [problem.code for problem in self.problems()])

    def test_what_keeps_due_work_from_running_is_found(self):
        """Each by `status` and `check` alike."""
        def found():
            status = [(one.code, one.message) for one in self.queue.status().attention]
            check = [(one.code, one.message) for one in queuectl.Inspection(self.queue).findings()]
            self.assertLessEqual({*status}, {*check})
            return status
        self.assertEqual(found(), [])
        self.jobs([{"id": "a", "queue": "gpu"}, {"queue": "gpu"}, {"delay": 7200}])
        self.queue.add_schedule("s", "0 0 * * *", command="true")
        self.assertEqual(found(), [
            ("no-worker", "queue gpu has 2 due jobs, the oldest for 0s; no worker is running")])
        claims = self.worker(queues=("other",))
        self.assertEqual(found(), [
            ("no-worker",
             "queue gpu has 2 due jobs, the oldest for 0s; no worker takes queue `gpu`")])
        self.queue.pause("gpu")
        self.assertEqual(found(), [("paused", "all due jobs are in paused queues: gpu")])
        self.job(queue="other")
        self.assertEqual(found(), [])       # one of them may run
        self.after(3599)
        self.assertEqual(found(), [])
        self.after(1)
        self.assertEqual(found(), [("long-wait", "queue other has 1 due job, the oldest for 1h")])
        self.queue.limit_queue("other", 1)
        self.job(queue="other")
        self.claim(claims)
        self.assertEqual(found(), [])
        self.after(3600)
        self.assertEqual(found(), [
            ("limit", "queue other has 1 due job, the oldest for 1h; queue `other` is at its limit 1"),
            ("no-worker", "queue default has 1 due job, the oldest for 0s; no worker takes queue "
             "`default`")])
        self.queue.pause()
        self.assertEqual(found(), [
            ("paused", "all due jobs are in paused queues: default, gpu, other")])

    def test_hooks_schedules_and_blocked_jobs_that_nothing_runs_are_found(self):
        def found():
            return [one.message for one in self.queue.status().attention]
        self.queue.configure("on-dead", "true")
        claims = self.worker(queues=("a",))
        self.assertEqual(found(), [
            "no worker takes queue hooks, so the command of on-dead will not run"])
        self.worker(queues=("hooks",), name="hooks")
        schedule = self.queue.add_schedule("s", "* * * * *", command="true")
        self.clock.now = queuectl.epoch(schedule.next_run) + 60
        self.assertEqual(found(), [])
        self.after(1)
        self.assertEqual(found(), [
            "schedule s has been due for 1m 1s, and its workers do not run it"])
        self.queue.pause_schedule("s")
        self.jobs([{"id": "a", "queue": "a", "max_retries": 1},
                   {"id": "b", "after": ["a"]}, {"id": "c", "after": ["b"]}])
        self.run_next(1, claims)
        self.assertEqual(found()[-1], "2 jobs cannot run: b comes after a (dead)")
        self.assertEqual(queuectl.status_object(self.queue.status())["attention"][-1]["code"],
                         "blocked")

    def test_a_suspended_worker_is_found(self):
        self.worker(name="w")
        self.after(31)
        self.assertEqual([one.code for one in queuectl.Inspection(self.queue).findings()],
                         ["silent-worker"])

    def test_a_network_file_system_is_known_by_the_longest_mount_point(self):
        mounts = ("22 1 254:0 / / rw - ext4 /dev/vda rw\n"
                  "30 22 0:30 / /home rw shared:1 - nfs4 host:/home rw\n"
                  "31 30 0:31 / /home/my\\040disk rw - xfs /dev/vdb rw\n")
        for path, kind in (("/queue.db", "ext4"), ("/home/a/queue.db", "nfs4"),
                           ("/homes/queue.db", "ext4"), ("/home/my disk/q.db", "xfs")):
            self.assertEqual(queuectl.filesystem_of(path, mounts), kind)
        self.assertEqual(queuectl.filesystem_of("/x", ""), "")
        for kinds, is_shared in (("nfs4 fuse.sshfs fuse.glusterfs fuse.ceph-fuse", True),
                                 ("ext4 fuseblk fuse.ntfs-3g", False)):
            for kind in kinds.split():
                self.assertEqual(queuectl.is_network_filesystem(kind), is_shared, kind)


# ---- 13 Views ----------------------------------------------------------------

class Views(Case):
    def test_a_worker_is_reported_after_three_missed_heartbeats(self):
        beat = queuectl.iso(NOON - 45)
        for late_after, says in ((44.7, True), (45.0, False), (180.0, False)):
            line = queuectl.worker_line(queuectl.Worker(
                1, "w", "h", "", 7, "", 1, (), None, beat, beat, 0, None)._replace(
                    late_after=late_after), self.PLAIN)
            self.assertEqual("no heartbeat for 45s" in line, says)

    PLAIN = queuectl.Style(False, 0, NOON)
    COLOURED = queuectl.Style(True, 40, NOON)

    def test_the_first_screen_names_who_works_what_rests_and_what_comes(self):
        claims = self.worker(name="box")
        self.job("make all", id="build")
        run = self.claim(claims)
        self.queue.pause("nightly")
        self.job(id="later", delay=90)
        self.job(held=True)
        lines = queuectl.status_lines(self.queue.status(), self.PLAIN)
        self.assertEqual(lines[1:-1], [
            f"workers   box  pid {os.getpid()}  1/4 slots busy  up 0s",
            "            build  for 0s  make all", "paused    nightly",
            "held      1 job until `queuectl release`", "next due  later in 1m 30s (scheduled)"])
        gone = self.queue.status()._replace(workers=[])
        self.assertIn("warning   lost with its worker: 1 job, which the next worker runs again",
                      queuectl.status_lines(gone, self.PLAIN))
        self.queue.pause()
        self.end(run, Outcome("failed", 3, "exit status 3", 2.5), by=claims)
        self.queue.delete("later")
        lines = queuectl.status_lines(self.queue.status(), self.PLAIN)
        self.assertIn("paused    all queues, nightly", lines)
        self.assertIn("next due  build in 2s (retry)", lines)
        for width, shown in ((0, [
                "RUN  OUTCOME  EXIT  TOOK  STARTED         WORKER",
                f"1    failed   3     2.5s  {queuectl.local_time(NOON, NOON)}  box",
                "     exit status 3"]), (17, ["     exit status", "     3"])):
            self.assertEqual(queuectl.show_lines(
                self.queue.job("build"), self.queue.runs("build"), [], settings(),
                self.PLAIN._replace(width=width))[-len(shown):], shown)

    def test_a_bar_says_how_far_it_is_in_the_width_there_is(self):
        P = queuectl.Progress
        for progress, rate, width, line in (
                (P(5, 0, 0, 0, 0), None, 30, "[.............] 0/5  0 running"),
                (P(6, 2, 2, 0, 0), 0.5, 49, "[####.................] 2/10  2 running  16s left"),
                (P(6, 2, 2, 0, 0), 0.5, 47, "[###................] 2/10  2 running  16s left"),
                (P(6, 2, 2, 0, 0), 0.5, 19, "2/10  2 running"),
                (P(99000, 4, 1000, 0, 0), 100, 19, "1,000/100,004"),
                (P(6, 2, 2, 0, 5), 0.5, 80,     # no estimate for what is not due
                 "[#############....................] 2/5  2 running  6s left  5 not due  30.0/min"),
                (P(5, 0, 2, 0, 5), 0.5, 60,
                 "[################################] 2/2  0 running  5 not due"),
                (P(0, 0, 3, 1, 0), 2.0, 60,
                 "[######################] 4/4  0 running  1 dead or cancelled"),
                (P(99000, 4, 1000, 0, 0), 1234.5, 70, "[...................] 1,000/100,004"
                 "  4 running  1m 21s left  1,234.5/s"),
                (P(0, 0, 0, 0, 0), None, 80, "[" + "#" * 40 + "] 0/0  0 running")):
            with self.subTest(progress=progress, width=width):
                shown = queuectl.progress_line(progress, rate, width)
                self.assertEqual(shown, line)
                self.assertLessEqual(queuectl.columns(shown), width)

    def test_an_estimate_follows_the_last_jobs_and_ends_with_them(self):
        pace = queuectl.Pace()

        def rate(over, now, running=1):
            return pace.rate(queuectl.Progress(9, running, over, 0, 0), now)
        self.assertIsNone(rate(0, 0, 0))
        self.assertIsNone(rate(0, 100, 0))
        self.assertIsNone(rate(0, 101))
        self.assertEqual(rate(1, 110), 0.1)
        self.assertEqual(rate(1, 139), 0.1)
        self.assertIsNone(rate(1, 141))         # it takes longer than the first did
        self.assertEqual(rate(2, 200), 0.02)
        for n in range(40):
            last = rate(2 + n, 200 + n)
        self.assertGreater(last, 0.9)

    def test_columns_stand_in_line_whatever_the_width_of_letters(self):
        rows = [dict(zip(("NAME", "N", "NOTE"), row)) for row in (
            ("日本", "12", "x"), ("e\u0301te", "3", ""), ("a", "4", "日本語" * 9))]
        self.assertEqual(queuectl.grid(rows, self.PLAIN), [
            "NAME  N   NOTE", "日本  12  x", "e\u0301te   3", "a     4   " + "日本語" * 9])
        shown = queuectl.grid(rows, queuectl.Style(False, 25, NOON))
        self.assertEqual(shown[3], "a     4   日本語日本語日…")
        self.assertLessEqual(queuectl.columns(shown[3]), 25)

    def test_a_narrow_window_cuts_commands_then_names_then_columns(self):
        rows = [dict(zip(("ID", "STATE", "PRIO", "WHEN", "COMMAND"), row)) for row in (
            ("nightly-backup-of-all-disks", "\x1b[32mcompleted\x1b[0m", "5", "5m ago",
             "backup --all /home /srv /var"), ("job-2", "dead (3)", "0", "now", "exit 3"))]
        for width, wanted in (
                (0, "nightly-backup-of-all-disks  completed  5     5m ago  backup --all /home /srv /var"),
                (80, "nightly-backup-of-all-disks  completed  5     5m ago  backup --all /home /srv /…"),
                (60, "nightly-backu…l-disks  completed  5     5m ago  backup --al…"),
                (52, "nightly-backu…-disks  completed  5m ago  backup --a…"),
                (40, "nightl…sks  completed  5m ago  backup -…"),
                (30, "nig…s  complet…  5m ago  back…")):
            with self.subTest(width):
                shown = [re.sub(queuectl.PAINT, "", line) for line
                         in queuectl.grid(rows, queuectl.Style(True, width, NOON))]
                self.assertEqual(shown[1], wanted)
                self.assertLessEqual(max(map(len, shown)), width or 99)
                self.assertEqual([line.index("  ") > 0 for line in shown], [True] * 3)
                self.assertEqual(shown[1].index("5m ago"), shown[2].index("now"))
        self.assertEqual(queuectl.grid(
            [{"ID": "job-58", "WHEN": "16m 58s ago", "COMMAND": "backup.sh /srv"}],
            queuectl.Style(False, 29, NOON))[1], "job-58  16m 58s ago  backup.…")

    def test_a_long_line_is_broken_at_spaces_below_its_text(self):
        line = "warning   \x1b[33mone two\x1b[0m three four five"
        for width, wanted in ((0, [line]), (33, [line]), (20, [
                "warning   \x1b[33mone two\x1b[0m", "          three four", "          five"])):
            self.assertEqual(queuectl.fold(line, width), wanted)
        self.assertEqual(queuectl.fold("   a bb cc", 7), ["   a bb", "   cc"])
        self.assertEqual(queuectl.fold("jobs  1 a  20 b  3 c", 14),
                         ["jobs  1 a", "      20 b", "      3 c"])
        self.assertEqual(queuectl.fold("a/very/long/path b", 7), ["a/very/long/path", "b"])
        self.assertEqual(queuectl.fold("one\n two three", 7), ["one", " two", " three"])

    def test_control_characters_are_shown_and_emoji_stay_whole(self):
        self.assertEqual(queuectl.one_line("a\tb\r\x1b[2J\u202e\n👩\u200d👧"),
                         "a b\\r\\x1b[2J\\u202e; 👩\u200d👧")
        for text, width in (("e\u0301", 1), ("ไม้", 2), ("日本", 4), ("👩", 2), ("\u200d", 0)):
            self.assertEqual(queuectl.columns(text), width, text)

    def test_queues_are_shown_with_the_states_that_occur(self):
        self.jobs([{"queue": "q", "id": "a"}, {"queue": "gpu"}])
        self.queue.cancel("a")
        self.queue.pause("q")
        self.queue.limit_queue("gpu", 12)
        self.assertEqual([line.split() for line in queuectl.queue_lines(
            self.queue.queues(), self.PLAIN)], [
                ["QUEUE", "LIMIT", "PENDING", "CANCELLED", "NOTE"], ["default", "-", "0", "0"],
                ["gpu", "12", "1", "0"], ["q", "-", "0", "1", "paused"]])

    def test_a_cancelled_job_is_shown_with_its_end(self):
        job = self.job(expires=60)
        self.after(60)
        self.tick(1)
        shown = queuectl.show_lines(self.queue.job(job.id), [], [], settings(), self.PLAIN)
        for line in "error        expired", f"cancelled    {queuectl.local_time(NOON + 60, NOON)}":
            self.assertIn(line, "\n".join(shown))

    def test_a_job_is_shown_without_anything_that_a_terminal_would_obey(self):
        job = self.job("echo \x1b[2J\n  rm x", cwd="/\x1b]0;title\x07")
        lines = "\n".join(queuectl.show_lines(job, [], [], settings(), self.PLAIN)).split("\n")
        self.assertEqual(lines[1:3], ["command      echo \\x1b[2J", " " * 15 + "rm x"])
        self.assertNotIn("\x1b", "".join(lines))

    def test_a_job_is_shown_with_each_field_that_is_not_the_default(self):
        job = self.job(backoff_max=60, no_retry_on="2", env={"A": "b c"}, tags=["t", "u"])
        lines = queuectl.show_lines(job, [], [], settings(), self.PLAIN)
        self.assertLessEqual({"queue        default", "env          A=b c", "tags         t,u",
                              "backoff max  1m", "no retry on  2"}, {*lines})
        self.assertFalse([line for line in lines if re.match("(priority|slots|timeout) ", line)])

    def test_schedules_are_shown_with_what_comes_and_what_was(self):
        self.queue.add_schedule("a", "*/10 * * * *", "Asia/Tokyo", command="make\nall", queue="q")
        self.queue.add_schedule("rests", "@daily", "UTC", command="x")
        self.queue.pause_schedule("rests")
        self.queue.run_schedule("a")
        self.after(120)
        for width, wanted in ((0, [
                "NAME   CRON          ZONE        NEXT    LAST            QUEUE    COMMAND",
                "a      */10 * * * *  Asia/Tokyo  in 8m   pending 2m ago  q        make; all",
                "rests  @daily        UTC         paused  -               default  x"]), (40, [
                    "NAME   NEXT    LAST            COMMAND", "a      in 8m   pending 2m ago  make; all",
                    "rests  paused  -               x"])):
            self.assertEqual(queuectl.schedule_lines(
                [(one, self.queue.last_job(one)) for one in self.queue.schedules()],
                self.PLAIN._replace(now=self.clock.now, width=width)), wanted)

    def test_a_note_says_why_a_job_does_not_run_or_what_went_wrong(self):
        self.job(id="dead", max_retries=1)
        self.end(self.claim(), 1)
        for name, fields, note in (("later", {"delay": 60}, ""),
                                   ("next", {"after": ["dead"]}, "after dead (dead)"),
                                   ("free", {}, "waits for a free slot")):
            job = self.job(id=name, **fields)
            found = [one for one in self.queue.hindrances([job])[name] if one.code != "no-worker"]
            self.assertEqual(queuectl.note_of(job, found), note)
        for state, note in ((COMPLETED, ""), (PROCESSING, "on box"), (DEAD, "oh")):
            self.assertEqual(queuectl.note_of(
                job._replace(state=state, worker="box", error="oh"), ()), note)

    def test_a_change_is_one_line_that_no_terminal_obeys(self):
        event = queuectl.Event("job-1", FAILED, DEAD, queuectl.iso(NOON), "a\x1b[2J\nb", 7)
        at = queuectl.local_time(NOON, NOON, "milliseconds")
        for source, style, shown in (
                (FAILED, self.PLAIN, "job-1  failed -> dead"),
                (None, self.COLOURED, "\x1b[1mjob-1\x1b[0m  - -> \x1b[31mdead\x1b[0m")):
            self.assertEqual(queuectl.event_line(event._replace(source=source), style),
                             f"{at}  {shown}  a\\x1b[2J; b")

    def test_each_line_of_a_job_has_the_job_before_it_in_a_colour_of_its_own(self):
        for text, shown in ((b"one\n\ntwo\xff", b"a | one\na | \na | two\xff\n"), (b"", b"")):
            self.assertEqual(queuectl.prefixed("a", text, 0, self.PLAIN), shown)
        colours = [queuectl.prefixed("a", b"x\n", place, self.COLOURED) for place in range(7)]
        self.assertEqual((colours[0], len(set(colours)), colours[6]),
                         (b"\x1b[36ma |\x1b[0m x\n", 6, colours[0]))

    def test_what_was_done_is_counted_in_words(self):
        none = queuectl.Spread(0, None, None, None, None)
        for n, rate in ((1, "1.0 jobs an hour"), (100, "1.7 jobs a minute")):
            one = queuectl.Summary(n, n, n, 0, 0, n, none._replace(n=1, mean=2.0), none)
            retries = "1 retry, 1 lost run" if n == 1 else "100 retries, 100 lost runs"
            self.assertEqual(queuectl.stats_lines({"": one}, 3600.0, self.PLAIN), [
                "since     1h ago", "queue     all",
                f"jobs      {n} enqueued, {n} completed, 0 dead, 0 cancelled",
                f"success   100.0%, {retries}", f"rate      {rate}",
                "run time  mean 2s  p50 0s  p95 0s  p99 0s", "waiting   -"])

    def test_a_unit_file_hands_over_each_word_as_it_stands(self):
        for word, there in (("/usr/bin/queue-1.db", "/usr/bin/queue-1.db"),
                            ("a b", '"a b"'), ("100%", '"100%%"'), ("$HOME", '"$$HOME"'),
                            ('a"b\\c', '"a\\x22b\\x5cc"'), ("ü;", '"ü;"'), (";", '";"'),
                            ("a\nb\x7f", '"a\\x0ab\\x7f"'), ("", '""')):
            with self.subTest(word):
                self.assertEqual(queuectl.systemd_word(word), there)
        self.assertEqual(queuectl.systemd_word("/a$b %", True), '"/a$b %%"')


# ---- 14 Processes, 15 Worker -------------------------------------------------

class ByHand:
    """An executor whose work is done when the test says so."""

    work = None

    def submit(self, work):
        self.work, self.future = work, futures.Future()
        return self.future

    def finish(self, error=None):
        work, self.work = self.work, None
        if error:
            self.future.set_exception(error)
        else:
            self.future.set_result(work())


class InThread(queuectl.Supervisor):
    """A supervisor in the process of its worker: it reaps nothing, and ends with the link."""

    def serve(self):
        while self._status is None:
            self._step()

    def _reap(self):
        if not self._link.is_open:
            self._status = 0


class Workers(Case):
    """A worker in this very process, with real commands; told by its log and the queue."""

    UNTIL_GO = "while [ ! -e go ]; do sleep .01; done"

    def anew(self):
        super().anew()
        self.queue = Queue(self.path)
        self.addCleanup(self.queue.close)
        self.said, self.word = [], None

    def run_worker(self, **options):
        """Its exit status; what it says goes to `said`, and `go` is there once it has said
        the word that the test waits for. Its supervisor is a thread.
        """
        def say(line):
            self.said.append(line)
            if self.word and self.word in line:
                self.touch("go")
        ours, theirs = socket.socketpair()
        signals, wakeup = [], queuectl.Wakeup()
        thread = threading.Thread(target=InThread(
            queuectl.Link(ours), os.getpid(), wakeup, signals, ()).serve)
        thread.start()

        def note(number, _):
            signals.append(number)
            wakeup.set()    # once more: the thread may have looked before
        with queuectl.handling({signal.SIGTERM: note, signal.SIGINT: note}, wakeup.writer):
            try:
                return queuectl.run_worker(self.queue, WorkerOptions(**{
                    "name": "w", "drain": True, **options}), queuectl.Link(theirs),
                    queuectl.Callbacks(say, str))
            finally:
                theirs.close()
                thread.join()
                ours.close()
                wakeup.close()

    def job(self, command="true", **fields):
        return super().job(command, **{"cwd": self.dir, **fields}).id

    def states(self):
        return [job.state for job in self.queue.jobs(sort="oldest")]

    def last_run(self, job_id="job-1"):
        return self.queue.runs(job_id)[-1]

    def beside(self, work):
        def with_queue():
            with Queue(self.path) as queue:
                work(queue)
        thread = threading.Thread(target=with_queue)
        thread.start()
        self.addCleanup(thread.join)

    def test_a_worker_says_what_becomes_of_its_jobs(self):
        self.job("echo a")
        self.job("exit 3", max_retries=2, backoff_base=0)
        self.assertEqual(self.run_worker(slots=2), 1)
        first, *lines, last = self.said
        self.assertEqual(first, f"worker w started: 2 slots, all queues, {self.path}")
        self.assertEqual(last, "worker w stopped: 1 completed, 1 failed, 1 dead")
        plain = [re.sub(r"(after|in) [\d.]+m?s", r"\1 T", line) for line in lines]
        for job_id, said in (("job-1", ["started: echo a", "completed in T"]), ("job-2", [
                "started: exit 3", "failed (exit 3) after T, attempt 1 of 2, again in T",
                "started: exit 3",
                "dead (exit 3) after T, attempt 2 of 2, now in the dead letter queue"])):
            self.assertEqual([line for line in plain if line.startswith(job_id)],
                             [f"{job_id} {line}" for line in said])
        self.assertEqual(self.queue.store.workers(), [])

    def test_a_worker_goes_by_its_options(self):
        for jobs, options, states, said in (
                ([{"queue": "a"}, {"queue": "b"}], {"queues": ("a", "c")},
                 [COMPLETED, PENDING], ": 1 slot, a, c, "),
                ([{"priority": -n} for n in range(5)], {"slots": 2, "max_jobs": 3, "drain": False},
                 [COMPLETED] * 3 + [PENDING] * 2, "worker w stopped: 3 completed"),
                ([{"queue": "paused"}, {"delay": 1000}, {}], {},
                 [PENDING, PENDING, COMPLETED], "worker w stopped: 1 completed"),
                ([{"command": "exit 1", "max_retries": 2}], {"backoff_base": 0.0},
                 [DEAD], "worker w stopped: 1 failed, 1 dead")):
            with self.subTest(options):
                self.anew()
                self.queue.configure("backoff-base", "1h")
                self.queue.pause("paused")
                self.jobs(jobs)
                self.run_worker(**options)
                self.assertEqual(self.states(), states)
                self.assertIn(said, "\n".join(self.said))

    def test_a_wide_job_waits_for_its_slots_and_a_small_one_behind_it_too(self):
        """The worker looks no more often for it; --max-jobs counts jobs."""
        self.job(f"echo $QUEUECTL_SLOT >> ran; {self.UNTIL_GO}", timeout=5)
        self.jobs([{"command": "echo wide $QUEUECTL_SLOT >> ran", "slots": 2},
                   {"command": "echo last >> ran"}, {}], cwd=self.dir)
        looks, look = [], queuectl.Claims.is_work_ready

        def looked(*args):
            looks.append(look(*args))
            if looks[-3:] == [False] * 3:
                self.touch("go")
            return looks[-1]
        with mock.patch.object(queuectl.Claims, "is_work_ready", looked), \
                mock.patch.object(queuectl, "FALLBACK_POLL", 0.05):
            self.run_worker(slots=2, max_jobs=3, drain=False)
        self.assertEqual(self.read("ran"), "1\nwide 1\nlast\n")
        self.assertEqual(self.states(), [COMPLETED] * 3 + [PENDING])

    def test_slots_run_side_by_side_and_no_more_than_there_are(self):
        for n in range(4):      # each waits for its neighbour, so two at once must run
            self.job(f"touch {n}; while [ ! -e {n ^ 1} ]; do sleep .01; done;"
                     " ls -d running-* 2>/dev/null | wc -l; touch running-$QUEUECTL_SLOT;"
                     " sleep .05; rm running-$QUEUECTL_SLOT")
        self.run_worker(slots=2)
        self.assertEqual(self.states(), [COMPLETED] * 4)
        runs = [self.last_run(f"job-{n}") for n in range(1, 5)]
        self.assertLessEqual({run.output for run in runs}, {b"0\n", b"1\n"})
        self.assertEqual({run.slot for run in runs}, {1, 2})

    def test_a_delayed_job_and_a_retry_start_when_they_are_due_whatever_the_heartbeat(self):
        self.queue.configure("heartbeat", "10s")
        self.job("exit 1", backoff_base=0.15, max_retries=2)
        self.job(delay=0.15)
        self.run_worker(drain=False, max_jobs=3)
        first, second = self.queue.runs("job-1")
        for due, began in ((queuectl.epoch(first.finished_at) + 0.15, second.started_at),
                           (queuectl.epoch(self.queue.job("job-2").run_at),
                            self.queue.job("job-2").started_at)):
            self.assertTrue(0 <= queuectl.epoch(began) - due < 5)

    def test_output_is_bytes_and_bounded(self):
        self.job("printf '\\377caf\\351'")
        self.job("head -c 3000000 /dev/zero; echo end")
        self.run_worker(slots=2)
        self.assertEqual(self.last_run().output, b"\xffcaf\xe9")
        run = self.last_run("job-2")
        self.assertEqual((len(run.output), run.output_bytes), (65536, 3000004))
        self.assertTrue(run.output.endswith(b"end\n"))

    def test_a_hook_can_start_whatever_its_job_was(self):
        self.queue.configure("on-completed", "echo ${#QUEUECTL_COMMAND} ${#QUEUECTL_TAGS}; "
                             "echo \"$QUEUECTL_OUTPUT_TAIL\"")
        self.job("printf 'a\\000\\377end' #".ljust(queuectl.MAX_TEXT, "x"),
                 tags=[f"{n}".rjust(128, "t") for n in range(1100)])
        self.run_worker()
        self.assertEqual(self.last_run("job-2").output.decode(),
                         "131050 131050\na\ufffd\ufffdend\n")

    def test_a_job_has_the_promised_environment(self):
        self.job("env; pwd", queue="q", env={"OWN": "ü", "QUEUECTL_QUEUE": "not this"})
        with mock.patch.dict(os.environ, {"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "9",
                                          "QUEUECTL_TEST": "inherited"}):
            self.run_worker()
        lines = self.last_run().output.decode().splitlines()
        self.assertLessEqual({
            "QUEUECTL_JOB_ID=job-1", "QUEUECTL_ATTEMPT=1", "QUEUECTL_QUEUE=q",
            "QUEUECTL_SLOT=1", f"QUEUECTL_DB={self.path}", "OWN=ü",
            "QUEUECTL_TEST=inherited", self.dir, "QUEUECTL_CLAIM=1"}, {*lines})
        self.assertEqual([line for line in lines if line.startswith(("NOTIFY", "WATCH"))], [])

    def test_time_outs_of_job_worker_and_configuration_in_this_order(self):
        self.queue.configure("timeout", "50ms")
        late, fine = ("timeout", 124, "timed out after 0.05s"), ("completed", 0, None)
        for workers, ends in ((None, {None: late, 0: fine, 5: fine}), (0.0, {None: fine}),
                              (5.0, {None: fine, 0.05: late})):
            jobs = [self.job("sleep 60" if end == late else "sleep .2", timeout=own, max_retries=1)
                    for own, end in ends.items()]
            self.run_worker(timeout=workers, slots=3)
            for job_id, (own, end) in zip(jobs, ends.items()):
                with self.subTest(own=own, workers=workers):
                    run = self.last_run(job_id)
                    self.assertEqual((run.outcome, run.exit_code, self.queue.job(job_id).error),
                                     end)

    def test_a_command_that_cannot_start_has_failed_and_frees_its_slot(self):
        here = os.getcwd()
        self.job(cwd=self.path_of("gone"), max_retries=1)
        self.job(cwd="/")
        self.run_worker()
        self.assertEqual(self.states(), [DEAD, COMPLETED])
        self.assertEqual(self.queue.job("job-1").error,
                         f"cannot enter {self.path_of('gone')} (No such file or directory)")
        self.assertEqual(self.last_run().duration, 0.0)
        self.assertEqual(os.getcwd(), here)     # whatever the directories of its jobs

    def test_the_shell_is_a_setting(self):
        shell = self.path_of("shell ü")
        write_bytes(shell, b'#!/bin/sh\necho "$#|$1|$2"; pwd')
        os.chmod(shell, 0o755)
        self.queue.configure("shell", shell)
        self.job("a 'b'")
        self.run_worker()
        with mock.patch.object(queuectl.Directories, "is_local", lambda self, path: False):
            self.job("a 'b'")
            self.run_worker()
        for name in ("job-1", "job-2"):
            self.assertEqual(self.last_run(name).output.decode(), f"2|-c|a 'b'\n{self.dir}\n")
        self.assertIn(f"shell        {shell}", queuectl.show_lines(
            self.queue.job("job-1"), [], [], self.queue.store.settings(), Views.PLAIN))
        self.forget("shell ü")
        self.job(max_retries=1)
        self.run_worker()
        self.assertEqual(self.queue.job("job-3").error,
                         f"cannot execute the shell {shell} (No such file or directory)")

    def whole(self, name):
        return read_bytes(self.path_of(f"out/{name}.log"))

    def keep_output(self):
        self.queue.configure("output-dir", self.path_of("out"))
        self.queue.configure("output-limit", "10")

    def test_a_directory_has_the_whole_output_of_each_run(self):
        self.keep_output()
        self.job("seq 100000", id="a")
        self.job("echo $QUEUECTL_ATTEMPT; (sleep .1; echo later) & exit 1", id="b", max_retries=2,
                 backoff_base=0)
        self.job("sleep .3", id="silent")
        waiting = [0]

        class Slow(queuectl.Archive):
            ROOM = 1000

            def _write(self, file, rest):
                time.sleep(0.01)
                waiting.append(self._waiting())
                super()._write(file, rest)
        with mock.patch.object(queuectl, "Archive", Slow):
            self.run_worker(slots=2)
        self.assertLess(max(waiting), 4 * queuectl.READ_SIZE)   # so `a` has waited
        self.assertEqual(self.whole("a.1"), b"".join(b"%d\n" % n for n in range(1, 100001)))
        self.assertEqual(len(self.last_run("a").output), 10)
        self.assertEqual((self.whole("b.1"), self.whole("b.2")[:2]), (b"1\nlater\n", b"2\n"))
        self.assertTrue(self.exists("out/silent.1.log"))
        self.assertEqual([os.stat(self.path_of(name)).st_mode & 0o777
                          for name in ("out", "out/a.1.log")], [0o700, 0o600])
        for name, runs in (("a", self.queue.runs("a")), ("b", [])):
            self.assertEqual(bool(runs), f"all output   {self.path_of('out/a.1.log')}" in
                             queuectl.show_lines(self.queue.job(name), runs, [],
                                                 self.queue.store.settings(), Views.PLAIN))

    def test_a_directory_that_cannot_be_written_is_reported_once(self):
        self.keep_output()
        self.queue.configure("heartbeat", "100ms")
        self.touch("out")
        self.jobs(3, command="echo x; sleep .2", cwd=self.dir)
        self.run_worker()
        self.assertEqual(self.states(), [COMPLETED] * 3)
        self.assertEqual([line for line in self.said if "output" in line],
                         [f"output is not copied to {self.path_of('out')}: Not a directory"])
        self.assertIn(f"output cannot be copied to {self.path_of('out')}: it is not a directory",
                      [one.message for one in queuectl.Inspection(self.queue).findings()])

    def test_output_that_could_not_be_written_is_counted_in_the_file(self):
        archive = queuectl.Archive(self.said.append)
        file, other = (os.fsencode(self.path_of(name)) for name in ("file", "other"))
        for path in (file, other):
            os.symlink("/dev/full", path)
        with mock.patch.object(os, "O_NOFOLLOW", 0):
            for path, text in ((file, b"12345"), (other, b"its end")):
                archive._write(path, memoryview(text))
            archive._note_lost()
        os.remove(file), os.remove(other)
        for text in (b"6", b"7"):
            archive._write(file, memoryview(text))
        archive._note_lost()
        self.assertEqual(self.read("file"), "\n[... 5 bytes left out ...]\n67")
        self.assertEqual(self.read("other"), "\n[... 7 bytes left out ...]\n")
        archive.report()
        archive.report()
        self.assertEqual(self.said, ["output is not copied to : No space left on device"])

    def test_a_directory_that_hangs_delays_no_job(self):
        hung = threading.Event()
        self.addCleanup(hung.set)

        class Hung(queuectl.Archive):
            ROOM, PATIENCE = 100000, 0.3

            def _write(self, file, rest):
                hung.wait(DEADLINE)
                super()._write(file, rest)
        self.keep_output()
        self.jobs([{"command": "seq 100000; touch end; echo 123; sleep .1"}] * 2, cwd=self.dir)
        with mock.patch.object(queuectl, "Archive", Hung):
            began = time.monotonic()
            self.run_worker()
        self.assertLess(time.monotonic() - began, 3)
        self.assertEqual(self.states(), [COMPLETED] * 2)
        self.assertEqual([line for line in self.said if "output" in line],
                         [f"output is not copied to {self.path_of('out')}: it does not respond"])
        archive = Hung(self.said.append)
        append = archive.add(self.dir, self.queue.job("job-1"))
        for _ in range(4):
            append(b"x" * 50000)
        wait_for(lambda: not archive.is_behind(), "the end of patience")
        append(b"omitted")
        hung.set()
        wait_for(lambda: not archive._waiting(), "the rest")
        archive.report()
        append(b"y")
        archive.end(DEADLINE)
        self.assertEqual(self.read("job-1.1.log").lstrip("x"), "\n[... 7 bytes left out ...]\ny")

    def test_a_command_is_no_option_of_the_shell(self):
        for command in ("-x", "+x", "--version", "-- ; echo $0"):
            self.job(command, max_retries=1)
        self.run_worker()
        runs = [self.last_run(f"job-{n}") for n in range(1, 5)]
        self.assertEqual([run.exit_code for run in runs], [127, 127, 127, 0])
        self.assertEqual(runs[-1].output.splitlines()[-1], b"/bin/sh")

    def test_a_directory_on_a_network_is_known_before_it_is_entered(self):
        os.symlink("/mnt/far", self.path_of("link"))
        os.symlink(self.path_of("loop"), self.path_of("loop"))
        directories = queuectl.Directories()
        self.addCleanup(os.close, directories.home)
        directories._mounts = ("22 1 254:0 / / rw - ext4 /dev/vda rw\n"
                               "30 22 0:30 / /mnt/far rw shared:1 - nfs4 host:/far rw\n"
                               "31 22 0:31 / /auto rw - autofs none rw\n"
                               "32 22 0:32 / /near rw - xfs /dev/vdb rw\n")
        far = ("/mnt/far", "/mnt/far/x/y", "/auto/a", *map(self.path_of, (
            "link", "link/x", "loop")))
        for path in ("/", "/near/x", "/mnt", self.dir, *far):
            self.assertIs(directories.is_local(path), path not in far, path)

    def test_a_directory_that_is_not_local_is_entered_by_the_child(self):
        with mock.patch.object(queuectl.Directories, "is_local", lambda self, path: False):
            self.job("pwd; echo $0")
            self.job(cwd=self.path_of("gone"), max_retries=1)
            self.run_worker()
        self.assertEqual(self.last_run().output.decode(), f"{self.dir}\n/bin/sh\n")
        self.assertEqual(self.last_run("job-2").exit_code, 126)
        self.assertIn(self.path_of("gone"), self.queue.job("job-2").error)

    @contextlib.contextmanager
    def in_hand(self, **options):
        """A worker whose steps the test takes, and its supervisor's side of the link."""
        options = WorkerOptions(**{"name": "w", "slots": 2, **options})
        claims = queuectl.Claims(self.queue, options)
        ours, theirs = socket.socketpair()
        notices = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        notices.setblocking(False)
        runner = self.runner = queuectl.Runner(
            self.queue, claims, options, queuectl.Link(theirs), notices,
            queuectl.Callbacks(self.said.append, str))
        runner._executor = ByHand()
        try:
            yield runner, queuectl.Link(ours)
        finally:
            self.queue.store.rollback()
            for command in runner._commands.values():
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(command.pid, signal.SIGKILL)
                    command.finish()
            for one in (ours, runner, theirs, notices):
                one.close()
            claims.leave()

    def step(self, commits=True, want=()):
        """Take a step that waits for nothing; commits are done or held up."""
        if commits and self.runner._executor.work:
            self.runner._executor.finish()
        for name in ("renew", *want):
            self.runner._agenda.want(name)
        self.runner._step()

    def steps(self, until, commits=True):
        wait_for(lambda: self.step(commits, ["look"]) or until(), "the worker")

    def steps_in_commit(self, until):
        self.steps(until, commits=False)
        self.assertIsNotNone(self.runner._commit)

    @contextlib.contextmanager
    def running(self, command="sleep 60", **options):
        self.job(command, timeout=options.pop("timeout", None))
        with self.in_hand(**options) as (runner, link):
            self.steps(lambda: runner._commands)
            yield runner, link

    def begin_commit(self):
        self.runner._agenda.want("tick")
        self.steps(lambda: self.runner._commit, commits=False)

    def kinds(self, link, kind):
        """What messages of that kind to the supervisor are about."""
        return [number for found, number, *_ in link.receive() if found == kind]

    def ended(self, link):
        return self.kinds(link, queuectl.KILL)

    def tell(self, link, *messages):
        for message in messages:
            link.send(*message)
        link.flush()

    def test_on_a_disk_slower_than_the_heartbeat_a_worker_drains(self):
        self.queue.configure("heartbeat", "100ms")
        self.job()
        with self.in_hand(drain=True) as (runner, _):
            def is_over():
                if runner._executor.work:
                    time.sleep(0.15)        # so long does a commit take
                self.step()
                return runner._is_over()
            self.step(want=("heartbeat", "look", "tick"))
            wait_for(is_over, "the end")

    def test_a_wanted_task_is_due_unless_it_is_held(self):
        agenda = queuectl.Agenda(("a", "b"))

        def assert_due(now, sleep, *names):
            self.assertEqual((agenda.sleep(now), [*agenda.due(now)]), (sleep, [*names]))
        assert_due(9.0, math.inf)
        agenda.want("b", 5.0)
        agenda.want("b", 7.0)       # the earlier one stays
        agenda.want("a", 6.0)
        assert_due(4.5, 0.5)
        agenda.hold("b", 8.0)
        assert_due(5.0, 1.0)
        assert_due(6.0, 0.0, "a")
        assert_due(7.5, 0.5)
        self.assertTrue(agenda.is_wanted("b", 5.0))
        agenda.hold("b")
        assert_due(99.0, math.inf)
        agenda.hold("b", 0.0)
        agenda.want("a")
        assert_due(99.0, 0.0, "a", "b")
        assert_due(99.0, math.inf)
        agenda.want("a")
        for name in agenda.due(99.0):       # what comes later is due at once
            if name == "a":
                agenda.want("b")
                agenda.want("a")
        self.assertEqual(name, "b")

    def test_an_exit_during_a_commit_is_recorded_by_the_next_one(self):
        with self.running(self.UNTIL_GO) as (runner, _):
            self.begin_commit()
            self.touch("go")
            self.steps_in_commit(lambda: runner._ended)
            runner._executor.finish()
            runner._step()
            self.assertEqual((list(runner._ended), self.states()), ([1], [PROCESSING]))
            self.steps(lambda: not runner._ended)
            self.assertEqual(self.states(), [COMPLETED])

    def test_a_time_out_during_a_commit_ends_the_tree_at_once(self):
        with self.running(timeout=0.05) as (runner, link):
            self.begin_commit()
            self.steps_in_commit(lambda: self.ended(link) == [1])
            self.assertEqual(runner._commands[1].why, "timeout")

    def test_a_claim_is_released_when_a_signal_comes_during_its_commit(self):
        for signals, ended in ((1, []), (2, [1])):      # the second is as `stop --now`
            with self.subTest(signals=signals), self.running(slots=4) as (runner, link):
                second = self.job("sleep 60")
                self.begin_commit()
                running = list(runner._commands)
                self.tell(link, *[(queuectl.SIGNAL, signal.SIGTERM)] * signals)
                self.steps_in_commit(lambda r=runner: r._leaving)
                self.assertEqual(self.ended(link), running if ended else [])
                self.steps(lambda r=runner: not (r._commit or r._ended))
                self.assertEqual((self.state(second), list(runner._commands)), (PENDING, running))
                self.assertEqual(self.last_run(second).outcome, "released")

    def test_a_commit_that_fails_has_done_nothing_and_is_repeated(self):
        with self.running(self.UNTIL_GO, slots=1) as (runner, _):
            self.touch("go")
            self.job()
            self.steps(lambda: runner._ended, commits=False)
            self.begin_commit()
            self.assertEqual(ids(runner._commit[0].claims), ["job-2"])
            runner._executor.finish(queuectl.Unavailable("disk-full", "no room", ""))
            runner._step()
            self.assertEqual((list(runner._ended), self.state("job-2"), runner._free),
                             ([1], PENDING, [1]))
            self.assertFalse(self.queue.host.locks.is_held(2))
            self.assertIn("cannot write to the queue, retrying: no room", self.said)
            runner._retry_at = runner._claim_at = 0.0
            self.steps(lambda: self.states() == [COMPLETED, COMPLETED])
            self.begin_commit()
            runner._executor.finish(queuectl.Gone("gone", "it is gone", ""))
            with refused("gone"):
                runner._step()

    def test_the_lease_is_renewed_and_output_read_during_a_commit(self):
        self.queue.configure("heartbeat", "100ms")
        with self.running(f"{self.UNTIL_GO}; echo more; sleep 60") as (runner, link):
            runner._agenda.want("renew")
            self.begin_commit()
            self.touch("go")
            list(link.receive())
            self.steps_in_commit(lambda: runner._commands[1].output.total)
            self.steps_in_commit(lambda: self.kinds(link, queuectl.RENEW))
        with self.in_hand() as (runner, link):
            before, heartbeat = time.monotonic(), runner._settings.heartbeat
            runner._do_renew()
            self.assertAlmostEqual(runner._agenda.sleep(before), heartbeat, 1)

    def test_an_order_during_a_commit_waits_for_it(self):
        with self.running() as (runner, link):
            self.begin_commit()
            self.step(commits=False, want=["orders"])
            self.assertEqual(self.ended(link), [])
            runner._executor.finish()
            with Queue(self.path) as other:
                other.cancel("job-1")
            self.steps(lambda: self.ended(link) == [1])
            self.assertEqual(runner._commands[1].why, "cancelled")

    def test_a_worker_complains_once_of_a_disk_and_of_a_lock_only_if_it_lasts(self):
        busy = queuectl.Unavailable("busy", "it is busy", "")
        with self.in_hand() as (runner, _):
            before = time.monotonic()
            runner._complain(busy)
            self.assertEqual((self.said, runner._claim_at), ([], 0.0))
            self.assertGreaterEqual(runner._retry_at, before + queuectl.BUSY_PAUSE)
            runner._failing_since -= queuectl.WORKER_PATIENCE
            for _ in range(2):
                runner._complain(busy)
                self.assertRegex("\n".join(self.said), "^.*it is busy$")
            with mock.patch.object(self.queue.store.db, "relieve") as relieve:
                runner._complain(queuectl.Unavailable("disk-full", "it is full", ""))
            self.assertEqual((len(self.said), relieve.call_count), (2, 1))
            self.assertGreaterEqual(runner._retry_at, before + queuectl.SYNC_PAUSE)
            self.assertGreaterEqual(runner._claim_at, before + 2 * queuectl.SYNC_PAUSE)
            runner._retry_at = 0.0
            self.begin_commit()
            self.steps(lambda: not runner._commit)
            self.assertEqual((runner._complaint, runner._failing_since), ("", None))

    def test_a_job_that_the_machine_cannot_start_is_released_for_a_moment(self):
        self.job()
        for error, kind in ((OSError(errno.EAGAIN, "no"), "released"),
                            (OSError(errno.ENOEXEC, "no"), "failed"), (ValueError("no"), "failed")):
            with self.subTest(error), self.in_hand() as (runner, _):
                runner._quota, runner._free = 0, [2]
                runner._not_started(queuectl.Claim(self.queue.job("job-1"), 7, (1,), -1), error)
                is_short = kind == "released"
                self.assertEqual((runner._ended.pop(7).kind, runner._free, runner._quota),
                                 (kind, [1, 2], int(is_short)))
                self.assertEqual(runner._claim_at > time.monotonic(), is_short)

    def test_spare_claims_are_released_in_time_and_when_they_are_overtaken(self):
        self.jobs(5, command="sleep 60")
        with self.in_hand() as (runner, _):
            runner._pace = .01
            self.steps(lambda: runner._spares)
            self.assertEqual(ids(runner._spares), ["job-3", "job-4", "job-5"])
            runner._agenda.hold("spares")
            self.queue.pause("paused")
            for queue in ("paused", "default"):
                self.job(id=f"urgent-{queue}", priority=9, queue=queue)
                self.begin_commit()
                self.assertEqual(runner._commit[0].is_overtaken, queue == "default")
                self.steps(lambda: not runner._commit)
            self.steps(lambda: not runner._spares)
            self.assertEqual({one.kind for one in runner._ended.values()}, {"released"})
            runner._pace = .01
            runner._agenda.want("tick")
            self.steps(lambda: runner._spares)
            self.assertEqual(runner._spares[0].job.id, "urgent-default")
            self.steps(lambda: not runner._spares)      # SPARE_PATIENCE
            self.assertEqual(runner._pace, math.inf)
            self.steps(lambda: not runner._ended)
            self.assertEqual(self.state("urgent-default"), PENDING)
        self.assert_sound()

    def test_output_is_stored_once_and_not_again_for_a_while(self):
        with self.running(f"echo a; {self.UNTIL_GO}; echo b; sleep 60") as (runner, _):
            self.steps(lambda: runner._commands[1].output.total == 2)
            runner._peek_until = math.inf       # a client waits, but not that impatiently
            self.begin_commit()
            self.assertEqual(runner._unsaved, {})
            runner._executor.finish(queuectl.Unavailable("busy", "it is busy", ""))
            runner._step()
            self.assertEqual([*runner._unsaved], [1])
            self.steps(lambda: self.last_run().output == b"a\n")
            self.steps(lambda: not runner._commit)
            self.assertEqual(runner._unsaved, {})
            self.assertGreater(runner._peek_at, time.monotonic())
            self.touch("go")
            self.steps(lambda: runner._commands[1].output.total == 4)
            self.assertEqual(self.last_run().output, b"a\n")
            self.steps(lambda: self.last_run().output == b"a\nb\n")

    def test_a_third_signal_ends_a_worker_that_cannot_write(self):
        with self.running() as (runner, link):
            runner._ended[1] = Outcome("released")
            for _ in range(3):      # while it can, it continues
                self.tell(link, (queuectl.SIGNAL, signal.SIGTERM))
                self.step(commits=False)
            runner._complain(queuectl.Unavailable("disk-full", "it is full", ""))
            self.tell(link, (queuectl.SIGNAL, signal.SIGTERM))
            with refused("unwritable", "SIGTERM: 1 run cannot be recorded"):
                runner._step()

    def test_a_process_that_cannot_be_ended_is_named_once(self):
        with self.running() as (runner, link):
            runner._leave("now", "A")
            self.tell(link, *[(queuectl.REFUSED, 1, 77)] * 2)
            self.steps(lambda: runner._commands[1].is_refused)
            self.steps(runner._is_over)
            self.assertEqual([line for line in self.said if "77" in line], [
                "job-1 cannot be killed: process 77 belongs to another user; the run lasts "
                "until that process exits"])

    def test_the_pace_of_runs_follows_the_latest_slowly(self):
        with self.in_hand() as (runner, _):
            for took, pace in ((1.0, 1.0), (2.0, 1.2), (0.2, 1.0)):
                command = mock.Mock(watch=-1, pipe=-1, claim=mock.Mock(number=1, slots=(1,)))
                command.finish.return_value = Outcome("success", 0, None, took)
                runner._commands[1], runner._free = command, [2]
                runner._finish(command)
                self.assertAlmostEqual(runner._pace, pace)
            runner._ended.clear()

    def test_a_worker_leaves_in_two_steps_and_never_comes_back(self):
        with self.in_hand(grace=5.0) as (runner, _):
            runner._leave("drain", "A")
            self.assertEqual(runner._leaving, "drain")
            self.assertAlmostEqual(runner._agenda.sleep(time.monotonic()), 5, 0)
            for how, who in (("drain", "B"), ("now", "C"), ("drain", "D")):
                runner._leave(how, who)
            self.assertEqual(runner._leaving, "now")
        self.assertEqual(self.said, ["A: claiming no more",
                                     "C: killing and requeuing 0 running jobs"])

    def test_a_worker_allows_itself_enough_descriptors(self):
        for limits, slots, wanted in (      # 4 for each of them, and 32
                ((50, 60), 7, (60, 60)), ((5000, resource.RLIM_INFINITY), 512, (5000, 1 << 20)),
                ((50, 1 << 19), 1, (4096, 1 << 19)), ((50, 60), 8, None)):
            with self.subTest(limits, slots=slots), \
                    mock.patch.object(resource, "getrlimit", return_value=limits), \
                    mock.patch.object(resource, "setrlimit") as set_to, \
                    contextlib.nullcontext() if wanted else \
                    refused("unsupported", "only 60 .* 8 slots may need 64"):
                queuectl._prepare_descriptors(slots)
                self.assertEqual(set_to.call_args[0][1], wanted)

    def test_a_worker_refuses_a_platform_that_is_not_posix(self):
        for name, there in (("fcntl", None), ("select", object())):
            with mock.patch.object(queuectl, name, there), refused("unsupported", "POSIX"):
                queuectl._refuse_platform()

    def test_a_process_that_only_has_a_worker_s_number_is_not_watched(self):
        """As in another container, where that number is another process's."""
        with subprocess.Popen(["sleep", "100"]) as process, self.in_hand() as (runner, _):
            self.worker(name="other")
            for born in ("1", self.queue.host.born(process.pid)):
                self.do("UPDATE workers SET pid = :pid, born = :born WHERE name = 'other'",
                        pid=process.pid, born=born)
                self.step(want=("orders", "heartbeat"))
                self.steps(lambda: runner._claims._last_tick < math.inf)
                self.assertEqual(len(runner._watches),
                                 int(born != "1" and hasattr(os, "pidfd_open")))
            process.kill()

    def test_silence_is_measured_by_the_configuration_as_it_is_now(self):
        self.job()
        self.claim().release()
        peers = self.peers(self.worker(name="own"))
        self.queue.configure("heartbeat", "1m")
        self.queue.configure("lease", "3m")
        for now, lost in ((0, 0), (60, 0), (120, 0), (180, 1)):
            with mock.patch.object(time, "monotonic", lambda now=now: float(now)):
                peers.look()
                self.assertEqual(len(peers.lost()), lost)

    def test_a_worker_that_is_taken_for_dead_ends_its_command(self):
        with self.running() as (_, link):
            self.steps(lambda: not self.runner._commit)
            with Queue(self.path) as other:
                queuectl.Peers(other).record(self.last_run())
            self.step(want=["orders"])
            self.assertEqual(self.ended(link), [1])
        self.assertIn("job-1 was taken over, as this worker sent no heartbeat for a lease; "
                      "killing its command", self.said)

    def test_a_second_worker_of_that_name_is_refused_and_the_first_goes_on(self):
        other = self.worker(name="w")
        with refused("in-use"):
            self.run_worker()
        self.assertEqual([one.name for one in self.queue.store.workers()], ["w"])
        other.leave()
        self.assertEqual(self.run_worker(), 0)

    def test_the_second_signal_or_the_end_of_the_grace_requeues_it(self):
        self.queue.configure("kill-grace", "100ms")
        for command, grace, first, said in (
                ("trap '' TERM; kill -INT $PPID; sleep .1; kill -TERM $PPID; sleep 60", None,
                 "SIGINT", "SIGTERM"),
                ("kill -TERM $PPID; sleep 60", 0.1, "SIGTERM", "grace is over")):
            with self.subTest(said):
                job_id = self.job(command, priority=1)
                self.run_worker(drain=False, grace=grace)
                job = self.queue.job(job_id)
                self.assertEqual((job.state, job.attempts, job.crashes), (PENDING, 0, 0))
                self.assertEqual(self.last_run(job_id).outcome, "released")
                self.assertIn(f"{first}: finishing 1 running job, claiming no more; "
                              f"a second {first} requeues them", self.said)
                self.assertIn(f"{said}: killing and requeuing 1 running job", self.said)
                self.assertEqual(self.said[-1], "worker w stopped: 1 requeued")
                self.queue.cancel(job_id)

    def test_a_worker_that_is_asked_to_stop_finishes_its_jobs(self):
        self.word = "finishing"
        self.job(f"touch began; {self.UNTIL_GO}")
        self.beside(lambda queue: (wait_for(lambda: self.exists("began"), "the start"),
                                   queue.stop_workers()))
        self.run_worker(drain=False)
        self.assertIn(f"{queuectl.ASKED}: finishing 1 running job, claiming no more; "
                      "`queuectl worker stop --now` requeues them", self.said)
        self.assertEqual((self.states(), self.last_run().outcome), ([COMPLETED], "completed"))


# ---- 17 API, 18 Access, 19 Server --------------------------------------------

TOKEN, READ_TOKEN = "a-long-secret", "a-reader's-secret"
SITE = queuectl.Site(TOKEN, READ_TOKEN, frozenset({"localhost", "127.0.0.1", "[::1]"}))
JSON = "application/json"


def misfit(value, schema, where=""):
    """Why a value is not as its JSON schema says, or None; for what SCHEMAS use."""
    if "$ref" in schema:
        return misfit(value, queuectl.SCHEMAS[schema["$ref"].rpartition("/")[2]], where)
    if "oneOf" in schema:
        fitting = [one for one in schema["oneOf"] if misfit(value, one) is None]
        return None if len(fitting) == 1 else f"{where} fits {len(fitting)} of oneOf"
    kinds = schema.get("type", [])
    kind = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array",
            dict: "object", type(None): "null"}[type(value)]
    if kinds and kind not in kinds and not (kind == "integer" and "number" in kinds):
        return f"{where} is {kind}, not {kinds}"
    if isinstance(value, str) and (len(value) < schema.get("minLength", 0)
                                   or not re.search(schema.get("pattern", ""), value)):
        return f"{where}: {value!r} is not {schema['pattern']}"
    if isinstance(value, int) and value > schema.get("maximum", value):
        return f"{where}: {value} is too large"
    if value not in schema.get("enum", [value]) or value != schema.get("const", value):
        return f"{where}: {value!r} is not one of them"
    inner = []
    if isinstance(value, dict):
        known, more = schema.get("properties", {}), schema.get("additionalProperties") or {}
        if missing := set(schema.get("required", ())) - set(value):
            return f"{where} lacks {missing}"
        inner = [(one, known.get(key, more), f"{where}.{key}") for key, one in value.items()]
    elif isinstance(value, list):
        inner = [(one, schema.get("items", {}), f"{where}[]") for one in value]
    return next(filter(None, (misfit(*one) for one in inner)), None)


class Web(Case):
    def ask(self, method, target, body=None, site=SITE, **headers):
        body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body or b""
        given = {"host": "localhost:8080", "authorization": f"Bearer {TOKEN}",
                 **({"content-type": JSON} if body else {}),
                 **{name.replace("_", "-"): text for name, text in headers.items()}}
        request = queuectl.Request(
            method, target, {name: text for name, text in given.items() if text is not None},
            body, "127.0.0.1")
        try:
            admitted = queuectl.admit(site, request)
        except queuectl.QueueError as error:
            return queuectl.refusal_reply(error)
        if isinstance(admitted, queuectl.Reply):
            return admitted
        return queuectl.respond(admitted[0], self.queue, admitted[1])

    def status(self, *request, **headers):
        return self.ask(*request, **headers).status

    def told(self, method, target, body=None, status=200, **headers):
        reply = self.ask(method, target, body, **headers)
        self.assertEqual(reply.status, status, reply.body)
        return json.loads(reply.body)

    def a_dead_job(self, job_id="dead", **fields):
        self.job("exit 3", id=job_id, max_retries=1, **fields)
        self.run_next(Outcome("failed", 3, "exit status 3", 0.5, b"one\ntwo\n", 8))

    def test_every_answer_is_as_it_is_described(self):
        self.a_dead_job()
        self.job("echo hi", id="one", queue="gpu", tags=["t"], env={"A": "b"})
        self.queue.add_schedule("nightly", "@daily", command="date")
        self.queue.limit_queue("gpu", 2)
        bodies = {"NewJob|[NewJob]": {"command": "x"}, "WhichDead": {},
                  "WhichQueue": {"queue": "gpu"}, "Nothing": {}, "Changes": {}, "": None}
        paths = self.told("GET", "/api/openapi.json")["paths"]
        for route in queuectl.ROUTES:
            with self.subTest(route.method + " " + route.path):
                job = "dead" if route.path.endswith("retry") else "one"
                reply = self.ask(route.method, route.path.replace("ID", job), bodies[route.body])
                told = paths[route.path.replace("/ID", "/{ID}")][route.method.lower()]
                content = told["responses"][str(reply.status)]["content"]
                schema = content[reply.kind.partition(";")[0]]["schema"]
                if reply.kind == JSON:
                    self.assertIsNone(misfit(json.loads(reply.body), schema))
                self.assertEqual(reply.log != "", route.method != "GET")

    def test_answers_are_what_the_commands_print(self):
        self.a_dead_job()
        self.job("sleep 1", id="one")
        for target, argv in (("status", "status"), ("workers", "worker list"),
                             ("jobs/dead", "show dead"), ("jobs/one", "show one")):
            printed = json.loads(run_cli("--db", self.path, *argv.split(), "--json")[1])
            self.assertEqual(self.told("GET", f"/api/{target}"), printed)
        printed = json.loads(run_cli("--db", self.path, "list", "--json")[1])
        self.assertEqual(self.told("GET", "/api/jobs"), {
            "jobs": printed, "next": None,
            "notes": {job["id"]: job["error"] or "waits for a free slot" for job in printed}})
        self.assertEqual(self.told("GET", "/api/session")["actions"], {
            PENDING: ["retry", "cancel", "delete"], PROCESSING: ["cancel"],
            COMPLETED: ["retry", "delete"], FAILED: ["retry", "cancel", "delete"],
            DEAD: ["retry", "delete"], CANCELLED: ["retry", "delete"]})

    def test_who_may_do_what(self):
        self.a_dead_job()
        made = queuectl.cookie_value
        for authorization, cookie, role in (
                (f"Bearer {TOKEN}", None, "full"), (f"bearer  {TOKEN}", None, "full"),
                (f"Bearer {READ_TOKEN}", None, "read"),
                (None, f"x=1; queuectl={made(TOKEN)}", "full"),
                (None, f"x=1; queuectl={made(READ_TOKEN)}", "read"),
                (None, None, None), (f"Bearer {TOKEN[:-1]}", None, None),
                ("Bearer ", None, None), (TOKEN, None, None), ("Bearer \xe9", None, None),
                (f"Basic {TOKEN}", None, None), ("Bearer x", f"queuectl={made(TOKEN)}", None),
                (None, f"queuectl={TOKEN}", None), (None, f"queuectl_1={made(TOKEN)}", None)):
            headers = {"authorization": authorization, "cookie": cookie}
            with self.subTest(headers):
                for method, target, status in (
                        ("GET", "/", 200), ("GET", "/api/jobs", 200), ("GET", "/api/nothing", 404),
                        ("POST", "/api/jobs/dead/retry", 200 if role == "full" else 403)):
                    self.assertEqual(self.status(method, target, **headers),
                                     status if role else 401)
                for target in ("/healthz", "/metrics"):
                    self.assertEqual(self.status("GET", target, **headers), 200)
                if role:
                    self.assertEqual(self.told("GET", "/api/session", **headers)["role"], role)
        for site, authorization, status in (
                (SITE._replace(is_read_only=True), f"Bearer {TOKEN}", 403),
                (queuectl.Site("", hosts=SITE.hosts), None, 200)):
            self.assertEqual(self.status("POST", "/api/pause", {}, site,
                                         authorization=authorization), status)
        self.assertIn(("WWW-Authenticate", 'Bearer realm="queuectl"'),
                      self.ask("GET", "/", authorization=None).headers)

    def test_the_token_in_the_url_becomes_a_cookie(self):
        for token, secure in ((TOKEN, False), (READ_TOKEN, True)):
            site = SITE._replace(is_secure=secure, cookie="queuectl_1")
            reply = self.ask("GET", f"/?token={token}", site=site, authorization=None)
            headers = dict(reply.headers)
            self.assertEqual((reply.status, headers["Location"]), (303, "/"))
            cookie, *flags = headers["Set-Cookie"].split("; ")
            self.assertEqual(flags, ["Path=/", "HttpOnly", "SameSite=Strict", *["Secure"] * secure])
            self.assertNotIn(token, cookie)
            self.assertEqual(self.status("GET", "/", site=site, authorization=None,
                                         cookie=cookie), 200)
        for target in ("/?token=", "/?token=x", f"/api/jobs?token={TOKEN}"):
            self.assertEqual(self.status("GET", target, authorization=None), 401)

    def test_foreign_hosts_and_pages_are_refused(self):
        """(I10)"""
        wide = SITE._replace(is_wide=True)
        for site, header, status, values in (
                (SITE, "host", 200, "LOCALHOST 127.0.0.1:99 [::1]:8080 localhost."),
                (SITE, "host", 403, "evil.example localhost.evil.example 10.0.0.1"),
                (SITE, "host", 400, " localhost:8080:80 localhost@evil"),
                (wide, "host", 200, "10.0.0.1:8080 [fe80::1]"), (wide, "host", 403, "evil.example"),
                (SITE, "origin", 200, "http://localhost:8080 https://localhost:8080"),
                (SITE, "origin", 403, "http://localhost null http://evil.example "
                 "file://localhost:8080 http://localhost:8080.evil.example"),
                (SITE, "sec_fetch_site", 200, "same-origin none"),
                (SITE, "sec_fetch_site", 403, "cross-site same-site")):
            for value in values.split(" "):
                with self.subTest(header, value=value):
                    asked = {"site": site, header: value}
                    self.assertEqual(self.status("POST", "/api/resume", {}, **asked), status)
                    if header != "sec_fetch_site":
                        self.assertEqual(self.status("GET", "/metrics", **asked), status)
        self.assertEqual(self.status("GET", "/metrics", host=None), 400)

    def assert_refused(self, status, method, target, body=None, **headers):
        with self.subTest(f"{method} {target[:60]} {str(body)[:40]} {headers}"):
            reply = self.ask(method, target, body, **headers)
            self.assertEqual(reply.status, status, reply.body[:200])
            if status >= 400:
                self.assertIsNone(misfit(json.loads(reply.body), queuectl.SCHEMAS["Error"]))
            self.assertEqual(status == 405, "Allow" in dict(reply.headers))

    def test_a_wrong_request_is_refused_with_the_right_status(self):
        self.job(id="one")
        # An id is decoded once, and not twice.
        for line in """
                404 GET /nothing /api/jobs/ // /api/jobs/nope /api/jobs/a%2Fb /api/../api/jobs
                404 GET /api/jobs/..%2F..%2Fetc%2Fpasswd /api/jobs/%256Fne /api/jobs/%ff%00
                404 GET /api/jobs/one/output?run=1
                200 GET /api/jobs/%6Fne /api/jobs/one/output /api/stats?since=1h30m
                200 GET /api/jobs?state=&queue=&tag=&search=&after=
                400 GET http://localhost/api/jobs * /\xe9 /api/jobs#x
                400 GET /api/jobs?limit=0 /api/jobs?limit=1001 /api/jobs?limit=1e1
                400 GET /api/jobs?limit=1&limit=2 /api/jobs?limit= /api/jobs?state=bad
                400 GET /api/jobs?stat=dead /api/jobs?after=job-1 /api/jobs?queue=a%20b
                400 GET /api/jobs?search=%00 /api/jobs?search=%ff
                400 GET /api/history?minutes=1441 /api/stats?since=soon
                200 HEAD /api/status /
                404 PUT /x
                404 POST /api/jobs/nope/retry
                404 DELETE /api/jobs/nope
                405 GET /api/pause
                405 DELETE /api/jobs
                405 OPTIONS /api/jobs
                405 TRACE /""".splitlines()[1:]:
            status, method, *targets = line.split()
            for target in targets:
                self.assert_refused(int(status), method, target)
        jobs = "/api/jobs"
        for status, method, target, *bodies in (
                (414, "GET", "/" + "x" * 9000, b""), (400, "GET", f"{jobs}?" + "&" * 100, b""),
                (400, "GET", f"{jobs}?search=" + "x" * 257, b""),
                (405, "PUT", jobs, {}), (405, "POST", "/healthz", {}),
                (400, "POST", jobs, b"{", b"\xff", b"[" * 100_000, b"1", [[]], [None],
                 b'{"priority":' + b"9" * 5000 + b"}", b'{"command":"x","timeout":NaN}',
                 [{"command": "x"}] * 10_001),
                (400, "POST", f"{jobs}/one/cancel", {"x": 1}, b"null"),
                (400, "POST", "/api/pause", {"queue": "a b"}, {"queue": 1}, []),
                (409, "POST", "/api/dlq/retry", {"ids": ["one"]}),
                (404, "POST", "/api/dlq/retry", {"ids": ["nope"]}),
                (400, "POST", "/api/dlq/retry", {"ids": None}, {"ids": [], "queue": "q"},
                 {"search": 1})):
            for body in bodies:
                self.assert_refused(status, method, target, body)
        for target, kind in ((jobs, "application/x-www-form-urlencoded"), (jobs, "text/plain"),
                             (jobs, None), (f"{jobs}/one/cancel", "text/plain")):
            self.assert_refused(415, "POST", target, b"command=x", content_type=kind)
        self.assertEqual(dict(self.ask("PUT", jobs, {}).headers)["Allow"], "GET, POST, HEAD")
        self.assertEqual(ids(self.queue.jobs()), ["one"])

    def test_a_header_that_comes_twice_is_a_list(self):
        self.assertEqual(queuectl.headers_of((
            ("Accept", "a"), ("ACCEPT", " b "), ("Cookie", "a=1"), ("Cookie", "b=2"))),
            {"accept": "a, b", "cookie": "a=1; b=2"})

    def test_jobs_are_added_and_a_mistake_is_named(self):
        one = self.told("POST", "/api/jobs", {"command": "a", "priority": 5.0}, 201)
        self.assertEqual((one["id"], one["priority"]), ("job-1", 5))
        two = self.told("POST", "/api/jobs", [
            {"command": "b", "id": "b"}, {"command": "c", "after": ["b"]}], 201)
        self.assertEqual([job["id"] for job in two], ["b", "job-3"])
        self.assertEqual(self.told("POST", "/api/jobs", [], 201), [])
        x = {"command": "x"}
        for body, status, key, item in (
                ({**x, "priority": "high"}, 400, "priority", None),
                ({"priority": 1}, 400, "command", None), ({"comand": "x"}, 400, "comand", None),
                ({**x, "after": ["nope"]}, 400, "after", None), ({**x, "id": "b"}, 409, None, None),
                ([x, {**x, "timeout": -1}], 400, "timeout", 1),
                ([x, {**x, "id": "b"}], 409, None, 1)):
            told = self.told("POST", "/api/jobs", body, status)
            self.assertEqual((told.get("key"), told.get("item")), (key, item), told)
        self.assertEqual(len(self.queue.jobs()), 3)
        long = b'{"command": "x", "priority": ' + b"9" * 99 + b"}"
        self.assertIn("40 digits", self.told("POST", "/api/jobs", long, 400)["error"])

    def test_jobs_come_in_pages(self):
        self.jobs([{"id": f"n{n}", "command": f"echo {n}", "queue": "ab"[n % 2], "tags": [f"t{n}"]}
                   for n in range(5)])
        self.queue.cancel("n0", "n1")
        seen, cursor = [], ""
        while cursor is not None:
            page = self.told("GET", f"/api/jobs?limit=2&after={cursor}")
            seen, cursor = seen + [job["id"] for job in page["jobs"]], page["next"]
        self.assertEqual(seen, ["n4", "n3", "n2", "n1", "n0"])
        for query, names in (
                ("state=cancelled", "n1 n0"), ("queue=b", "n3 n1"), ("tag=t2", "n2"),
                ("state=cancelled&state=pending&limit=4", "n4 n3 n2 n1"),
                ("search=echo%204", "n4"), ("search=N3", "n3"),
                ("queue=a&state=pending", "n4 n2"), ("search=%25", "")):
            found = self.told("GET", f"/api/jobs?{query}")["jobs"]
            self.assertEqual([job["id"] for job in found], names.split(), query)

    def retried(self, body=None):
        return {job["id"] for job in self.told("POST", "/api/dlq/retry", body)}

    def test_all_that_a_request_puts_back_is_told(self):
        for name in "abcde":
            self.a_dead_job(name)
        with mock.patch.object(queuectl, "SWEEP_BATCH", 2), \
                mock.patch.object(queuectl, "MAX_BATCH", 3):
            self.assertEqual([self.retried(), self.retried()], [{"b", "c", "d", "e"}, {"a"}])

    def test_jobs_are_retried_cancelled_and_deleted(self):
        self.a_dead_job()
        self.a_dead_job("other", queue="q")
        self.told("POST", "/api/jobs/other/retry", {"timeout": "soon"}, 400)
        self.told("POST", "/api/jobs/other/retry", {"self": 1}, 400)
        self.assertEqual(self.told("POST", "/api/jobs/other/retry", {
            "timeout": "1h", "delay": 60, "queue": "q"})["timeout"], 3600)
        self.queue.delete("other")
        self.a_dead_job("other", queue="q")
        for body, fits in (
                ({"exit_code": 4, "since": "1h", "tag": None}, True), ({"search": "no"}, True),
                ({"exit_code": "x"}, False), ({"since": "+1h"}, False), ({"since": ""}, False),
                ({"queue": ""}, False), ({"since": 5}, False), ({"exit_code": 256}, False)):
            with self.subTest(body):
                self.assertEqual(misfit(body, queuectl.SCHEMAS["WhichDead"]) is None, fits)
                self.told("POST", "/api/dlq/retry", body, 200 if fits else 400)
        self.assertEqual(self.retried({"queue": "q", "exit_code": "2-3"}), {"other"})
        self.assertEqual(self.retried({"ids": ["dead"]}), {"dead"})
        self.assertEqual(self.retried(), set())
        self.assertEqual(self.told("POST", "/api/jobs/dead/cancel")["state"], CANCELLED)
        self.told("POST", "/api/jobs/dead/cancel", status=409)
        self.assertEqual(self.told("POST", "/api/jobs/dead/retry")["state"], PENDING)
        running = self.claim().job.id
        self.told("DELETE", f"/api/jobs/{running}", status=409)
        self.assertEqual(self.told("POST", f"/api/jobs/{running}/cancel")["state"], PROCESSING)
        for job in self.queue.jobs(PENDING):
            self.assertEqual(self.told("DELETE", f"/api/jobs/{job.id}")["id"], job.id)
            self.told("GET", f"/api/jobs/{job.id}", status=404)

    def test_queues_pause_and_resume(self):
        self.job(queue="gpu")
        for verb, body, paused in (("pause", {"queue": "gpu"}, ["gpu"]),
                                   ("pause", {}, ["*", "gpu"]),
                                   ("resume", {"queue": "gpu"}, ["*"]), ("resume", None, [])):
            told = self.told("POST", f"/api/{verb}", body)
            self.assertEqual(sorted(told["paused"]), paused)
            found = {one["name"]: one["paused"] for one in self.told("GET", "/api/queues")}
            self.assertEqual(found, {"default": False, "gpu": "gpu" in paused})

    def test_output_is_followed_by_its_offset(self):
        self.a_dead_job()
        self.job(id="new")
        for target, body, run, total in (("dead/output", b"one\ntwo\n", "1", "8"),
                                         ("dead/output?run=1&offset=4", b"two\n", "1", "8"),
                                         ("dead/output?offset=99", b"", "1", "8"),
                                         ("new/output", b"", "0", "0")):
            reply = self.ask("GET", f"/api/jobs/{target}")
            self.assertEqual((reply.status, reply.body, reply.kind, dict(reply.headers)), (
                200, body, "text/plain; charset=utf-8", {"X-Run": run, "X-Total-Bytes": total}))

    def test_history_tells_each_minute(self):
        self.a_dead_job()
        self.after(120)
        minutes = self.told("GET", "/api/history?minutes=4")["minutes"]
        self.assertEqual([one["failed"] for one in minutes], [0, 1, 0, 0])
        self.assertEqual((minutes[1]["run_p50"], minutes[0]["run_p50"]), (0.5, None))
        self.assertEqual(len(self.told("GET", "/api/history?queue=no")["minutes"]), 60)

    def test_a_change_leaves_one_line_and_a_look_none(self):
        self.job(id="one")
        by = "by bearer from 127.0.0.1:"
        for method, target, body, line in (
                ("POST", "/api/jobs", {"command": "\x1b[31mevil\nline", "id": "two"},
                 f"web: POST /api/jobs {by} 201 two pending"),
                ("POST", "/api/jobs/one/cancel", None,
                 f"web: POST /api/jobs/one/cancel {by} 200 one cancelled"),
                ("POST", "/api/pause?x=%0A", {}, ""), ("GET", "/api/jobs", None, ""),
                ("POST", "/api/pause", {"queue": "\x1b\n"},
                 f"web: POST /api/pause {by} 400 queue: '\\x1b\\n' is not a name"),
                ("DELETE", "/api/jobs/one", None,
                 f"web: DELETE /api/jobs/one {by} 200 one cancelled")):
            self.assertEqual(self.ask(method, target, body).log, line)

    def test_a_database_that_does_not_answer_is_503(self):
        self.queue.store.db.patience = 0.01
        other = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(other.close)
        other.execute("BEGIN IMMEDIATE")
        reply = self.ask("POST", "/api/jobs", {"command": "x"})
        self.assertEqual((reply.status, "Retry-After" in dict(reply.headers)), (503, True))
        self.assertEqual(self.status("GET", "/api/status"), 200)
        other.execute("ROLLBACK")
        self.queue.close()
        self.assertEqual(self.status("GET", "/healthz"), 503)

    def test_the_page_runs_under_its_policy_and_needs_nothing_from_elsewhere(self):
        page, policy = queuectl.PAGE, queuectl.page_policy(queuectl.PAGE)
        for tag in ("style", "script"):
            self.assertEqual(len(re.findall(f"<{tag}[ >]", page)), 1)
        self.assertTrue(policy.startswith("default-src 'none'; "))
        self.assertEqual(policy.count("sha256-"), 2)
        self.assertNotIn("unsafe", policy)
        self.assertIsNone(re.search(r"<[^>]*\son[a-z]+=", page), "an inline handler")
        self.assertIsNone(re.search(r"""(src|href)=["'](?!data:|#|/)""", page))
        self.assertNotIn("innerHTML", page)

    def test_who_listens_on_what(self):
        def site(host, no_auth=False, names=("lab.example",), **environ):
            return queuectl.site_of(argparse.Namespace(
                host=host, port=8080, read_only=False, no_auth=no_auth, tls_cert=None), host,
                environ, list(names))
        own, wide = site("127.0.0.1"), site("0.0.0.0", QUEUECTL_TOKEN="t")
        self.assertRegex(own.token, "^[0-9a-f]{48}$")
        self.assertNotIn("lab", own.hosts)
        self.assertEqual((wide.token, wide.is_wide), ("t", True))
        self.assertLessEqual({"lab", "lab.example", "localhost"}, wide.hosts)
        self.assertEqual(site("::1", True).token, "")
        for host, no_auth, environ in (
                ("0.0.0.0", True, {}), ("10.0.0.1", True, {}),
                ("::1", False, {"QUEUECTL_TOKEN": "a b"}),
                ("::1", False, {"QUEUECTL_TOKEN": "a", "QUEUECTL_READ_TOKEN": "a"})):
            with self.assertRaises(queuectl.QueueError):
                site(host, no_auth, **environ)

    def sockets(self):
        pair = socket.socketpair()
        for sock in pair:
            self.addCleanup(sock.close)
        return pair

    def test_a_reader_bounds_bytes_and_time(self):
        theirs, sock = self.sockets()
        ours, head = queuectl.Reader(sock), b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
        theirs.sendall(head + b"body, and half a line")
        self.assertTrue(ours.wait(1))
        self.assertEqual((ours.head(0.05), ours.read(4, 0.05)), (head, b"body"))
        for read in (ours.head, lambda seconds: ours.read(99, seconds)):
            with refused("refused", status=408):
                read(0.05)
        theirs.close()
        with self.assertRaises(ConnectionError):
            ours.head(1)
        self.assertEqual((ours.read(99, 1), ours.wait(1)), (b", and half a line", False))
        for end in (b"x", b"\r\n\r\n"):
            theirs, sock = self.sockets()
            theirs.sendall(b"x" * queuectl.MAX_HEAD + end)
            with refused("refused", status=431):
                queuectl.Reader(sock).head(1)

    def test_the_longest_idle_client_is_dropped_and_the_others_stay(self):
        connections, pairs = queuectl.Connections(), [self.sockets() for _ in range(3)]
        first, second, third = (pair[0] for pair in pairs)
        busy = [mock.Mock() for _ in range(queuectl.MAX_CONNECTIONS - 2)]
        for sock in (*busy, first, second):
            self.assertTrue(connections.enter(sock))
            connections.mark(sock, connections.BUSY)
        connections.mark(first, connections.STREAM)
        self.assertFalse(connections.enter(third))
        connections.mark(second, 5.0)
        self.assertTrue(connections.enter(third))
        self.assertEqual(pairs[1][1].recv(1), b"")      # second was dropped
        for state in (connections.BUSY, 5.0):
            with self.assertRaises(ConnectionError):
                connections.mark(second, state)
        connections.mark(third, connections.BUSY)
        self.assertFalse(connections.enter(second))
        self.assertTrue(connections.drop_all())
        self.assertEqual(pairs[0][1].recv(1), b"")      # the stream ends, too
        for sock in (*busy, third):
            connections.leave(sock)
        self.assertFalse(connections.drop_all())

    def test_a_stream_sends_changes_or_that_there_were_too_many(self):
        now = 0.0
        stream = queuectl.event_stream(self.a_queue(), -1, lambda: now)
        self.assertRegex(next(stream), b'^retry: 2000\n\nid: 0\nevent: status\ndata: ')
        self.job(id="one")
        for now, sent in (
                (0.1, b'^id: 1\nevent: change\ndata: {"id": "one", "from": null, "to": "pending", '
                 b'"at": "%s", "reason": "enqueued"}\n\n$' % queuectl.iso(NOON).encode()),
                (0.6, b'^id: 1\nevent: status\ndata: .*"pending": 1'), (6.0, b"^$"),
                (16.0, b"^id: 1\nevent: status\n"), (17.0, b"^$")):
            self.clock.now = NOON + now     # for how long the job waits is no news
            self.assertRegex(next(stream), sent)
        self.jobs(queuectl.FEED_BATCH + 1)
        now = 18.0
        for one in (stream, queuectl.event_stream(self.a_queue(), 0)):
            self.assertIn(b"id: 1002\nevent: resync\ndata: {}\n\nid: 1002\nevent: status",
                          next(one))
        begin = next(queuectl.event_stream(self.a_queue(), 1001))
        self.assertEqual(re.findall(b"(?m)^event: (.*)", begin), [b"change", b"status"])


SAMPLE = r'^([a-z_]+)(?:\{((?:[a-z_]+="(?:[^"\\\n]|\\.)*",?)*)\})? ([0-9.e+-]+)$'


def parse_metrics(text):
    """({family: kind}, {(name, labels): value}); AssertionError."""
    kinds, samples, family = {}, {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ")[2]
            assert family not in kinds, f"{family} comes twice"
        elif line.startswith("# TYPE "):
            _, _, name, kinds[family] = line.split(" ")
            assert name == family
        else:
            match = re.match(SAMPLE, line)
            assert match, line
            suffixes = {"histogram": ("_bucket", "_sum", "_count")}.get(kinds[family], ("",))
            assert match[1] in [family + end for end in suffixes]
            labels = tuple(sorted(re.findall(r'([a-z_]+)="((?:[^"\\]|\\.)*)"', match[2] or "")))
            assert (match[1], labels) not in samples, line
            samples[match[1], labels] = float(match[3])
    return kinds, samples


def check_histograms(test, kinds, samples):
    """Buckets only grow, and the last one holds all."""
    for family in (name for name, kind in kinds.items() if kind == "histogram"):
        for (name, labels), count in samples.items():
            if name == family + "_count":
                buckets = [n for (other, found), n in samples.items()
                           if other == family + "_bucket" and set(labels) <= set(found)]
                test.assertEqual(buckets, sorted(buckets))
                test.assertEqual((buckets[-1], len(buckets)), (count, 17))


class Metrics(Case):
    def scrape(self, queue):
        return queuectl.metrics_text(queue.scrape())

    def a_busy_hour(self, queue, claims, jobs=4):
        for n in range(jobs):
            queue.enqueue("x", queue=("default", "gpu")[n % 2], max_retries=2)
        for outcome in ("completed", "failed", "timeout", "lost"):
            claimed = self.tick(1, by=claims).claims
            for one in claimed:
                one.release()
            self.after(7)
            self.end(claimed, Outcome(outcome, 0, None, 0.02 * jobs), by=claims)

    def test_they_are_the_metrics_of_the_contract(self):
        self.a_busy_hour(self.queue, self.worker())
        text = self.scrape(self.queue)
        kinds, samples = parse_metrics(text)
        check_histograms(self, kinds, samples)
        self.assertEqual({name for name, _ in samples}, {
            "queuectl_jobs", "queuectl_jobs_completed_total", "queuectl_attempts_total",
            *(f"queuectl_job_{what}_seconds_{part}" for what in ("duration", "wait")
              for part in ("bucket", "sum", "count")),
            "queuectl_oldest_pending_seconds", "queuectl_workers",
            "queuectl_worker_slots", "queuectl_queue_paused",
            "queuectl_database_bytes", "queuectl_build_info", "queuectl_jobs_blocked"})
        self.assertEqual(kinds["queuectl_attempts_total"], "counter")
        self.assertEqual(samples["queuectl_attempts_total", (
            ("outcome", "timeout"), ("queue", "default"))], 1)
        self.assertEqual(samples["queuectl_jobs", (("queue", "gpu"), ("state", "cancelled"))], 0)
        with contextlib.suppress(ImportError):
            from prometheus_client import parser
            self.assertEqual(len(list(parser.text_string_to_metric_families(text))), 14)

    def test_labels_are_escaped(self):
        scrape = self.queue.scrape()._replace(oldest={}, paused={'a"b\\c\nd': True})
        self.assertIn(r'queuectl_queue_paused{queue="a\"b\\c\nd"} 1', queuectl.metrics_text(scrape))

    def test_they_are_equal_to_status(self):
        self.a_busy_hour(self.queue, self.worker(), 12)
        self.job(delay=100)
        self.queue.pause("gpu")
        self.after(3)
        samples, status = parse_metrics(self.scrape(self.queue))[1], self.queue.status()
        for state in STATES:
            self.assertEqual(sum(n for (name, labels), n in samples.items()
                                 if name == "queuectl_jobs" and ("state", state) in labels),
                             status.counts[state])
        for name, labels, value in (
                ("worker_slots", {"state": "busy"},
                 sum(len(one.running) for one in status.workers)),
                ("workers", {}, len(status.workers)), ("queue_paused", {"queue": "gpu"}, 1),
                ("queue_paused", {"queue": "default"}, 0)):
            self.assertEqual(samples[f"queuectl_{name}", tuple(labels.items())], value)

    def test_the_oldest_is_of_any_priority_and_also_what_no_worker_has_let_in(self):
        for name, priority in (("a", 0), ("b", 5), ("a", -3), ("a", 7)):
            self.job(queue=name, priority=priority)
            self.clock.now += 10
        self.job(queue="c", delay=5)
        self.job(queue="d", delay=500)
        self.clock.now += 9
        samples = parse_metrics(self.scrape(self.queue))[1]
        self.assertEqual({dict(labels)["queue"]: seconds for (name, labels), seconds
                          in samples.items() if name == "queuectl_oldest_pending_seconds"},
                         {"a": 49, "b": 39, "c": 4, "d": 0, "default": 0})

    def test_counters_never_fall_in_a_day_of_purges_and_restarts(self):
        last, kinds = {}, {}
        for hour in range(24):
            with Queue(self.path, clock=self.clock) as queue:
                claims = self.worker(queue, name=f"w{hour}")
                self.a_busy_hour(queue, claims, 1 + hour % 5)
                claims.leave()
                if hour % 3 == 2:
                    for _ in queue.sweep("delete", (COMPLETED, DEAD), older_than=0):
                        pass
                kinds, now = parse_metrics(self.scrape(queue))
                check_histograms(self, kinds, now)
            self.assertLessEqual(set(last), set(now))
            for key, value in last.items():
                if re.search("_(total|bucket|sum|count)$", key[0]):
                    self.assertGreaterEqual(now[key], value, key)
            last = now
            self.clock.now += 3600
        self.assertGreater(last["queuectl_jobs_completed_total", (("queue", "default"),)], 9)


# ---- 20 MCP ------------------------------------------------------------------

MODERN_META = {"_meta": {"io.modelcontextprotocol/protocolVersion": queuectl.MODERN,
                         "io.modelcontextprotocol/clientCapabilities": {}}}


TASKS_META = json.loads(json.dumps(MODERN_META).replace("{}", json.dumps(
    {"extensions": {queuectl.TASKS: {}}})))


def message(method, params, number=1):
    return json.dumps({"jsonrpc": "2.0", "id": number, "method": method, "params": params}).encode()


class Agents(Case):
    """The protocol by hand; the worker is the test's."""

    def setUp(self):
        super().setUp()
        self.lines = []
        self.agent = queuectl.Agent(self.path, queuectl.TOOLS, self.lines.append)
        self.agent.queue = lambda create=False: self.queue

    def said(self, *messages):
        """All that is said after these messages: bytes, or what is put into JSON-RPC."""
        for one in messages:
            self.agent.take(one if isinstance(one, bytes) else json.dumps(
                {"jsonrpc": "2.0", **one} if isinstance(one, dict) else one).encode())
        lines, self.lines[:] = [*self.lines], []
        return [json.loads(line) for line in lines]

    def ask(self, method, params=None, number=1):
        """The answer to a request; None: there is none yet."""
        return next(iter(self.said(message(method, params or {}, number))), None)

    def use(self, tool, meta=None, number=1, **given):
        answer = self.ask("tools/call", {"name": tool, "arguments": given, **(meta or {})}, number)
        return answer and self.value(answer)

    def value(self, answer):
        """What a tool found, which it also says as text."""
        result = answer["result"]
        self.assertEqual(json.loads(result["content"][0]["text"]), result["structuredContent"])
        self.assertEqual(result.get("isError", False), "error" in result["structuredContent"])
        return result["structuredContent"]

    def test_failures_of_the_protocol_are_errors_of_json_rpc(self):
        future = {"_meta": {**MODERN_META["_meta"],
                            "io.modelcontextprotocol/protocolVersion": "2030-01-01"}}
        for given, code in (
                (b"{", -32700), (b'{"a": "\xff"}', -32700), (b"[" * 10**5, -32700),
                (b'{"id": 1' + b"0" * 5000 + b"}", -32700),
                (b" " * queuectl.MAX_MESSAGE + b"{}", -32700),
                (1, -32600), ([], -32600), ([json.loads(message("ping", {}))], -32600),
                ({"jsonrpc": 2, "method": "ping"}, -32600), ({"id": 1}, -32600),
                *(({"id": bad, "method": "ping"}, -32600) for bad in (None, True, 1.5, [1])),
                *((message(*call), code) for code, *call in (
                    (-32601, "tools/close", {}), (-32601, "ping", MODERN_META),
                    (-32601, "tasks/get", {"taskId": "a"}), (-32021, "tasks/get", MODERN_META),
                    (-32602, "tasks/get", {**TASKS_META, "taskId": "a"}),
                    (-32602, "tools/call", []), (-32602, "tools/call", {"_meta": 1}),
                    (-32602, "tools/call", {"name": "rm"}), (-32602, "tools/call", {"name": [1]}),
                    (-32602, "tools/call", {"name": "list", "arguments": [1]}),
                    (-32602, "server/discover", {}), (-32022, "tools/list", future)))):
            with self.subTest(str(given)[:50]):
                [answer] = self.said(given)
                self.assertEqual(answer["error"]["code"], code)
                self.assertEqual(answer["id"], None if code in (-32700, -32600) else 1)
        self.assertEqual(self.ask("tools/list", future)["error"]["data"], {
            "supported": [queuectl.MODERN, *queuectl.HANDSHAKES], "requested": "2030-01-01"})
        self.assertIn("result", self.ask("tools/list", {"_meta": None}))
        self.assertEqual(self.said(
            {"method": "notifications/initialized"}, {"method": "tools/call"}, {"method": "x"},
            {"method": "notifications/cancelled", "params": {"requestId": [1]}},
            {"id": 7, "result": {}}, b" \r"), [])

    def test_versions_are_negotiated(self):
        for asked, given in (("2025-06-18", "2025-06-18"), ("2030-01-01", "2025-11-25")):
            found = self.ask("initialize", {"protocolVersion": asked})["result"]
            self.assertEqual(found["protocolVersion"], given)
            self.assertEqual(found["capabilities"], {"tools": {}})
        for meta, extensions in ((MODERN_META, {}), (TASKS_META, {queuectl.TASKS: {}})):
            found = self.ask("server/discover", meta)["result"]
            self.assertEqual(found["supportedVersions"][0], queuectl.MODERN)
            self.assertEqual(found["capabilities"].get("extensions", {}), extensions)
        self.assertEqual(self.ask("ping"), {"jsonrpc": "2.0", "id": 1, "result": {}})

    def test_tools_say_what_they_take_and_whether_they_change_anything(self):
        tools = {one["name"]: one for one in self.ask("tools/list")["result"]["tools"]}
        self.assertEqual([(name, one["annotations"]["readOnlyHint"]) for name, one in tools.items()
                          if one["annotations"]["destructiveHint"]],
                         [("enqueue", False), ("cancel", False), ("retry", False)])
        self.assertEqual([*tools["enqueue"]["inputSchema"]["properties"]], [
            name for name, field in queuectl.FIELDS.items() if "e" in field.uses])
        self.assertLessEqual({*queuectl.FILTERS}, {*tools["list"]["inputSchema"]["properties"]})
        self.assertLess(len(json.dumps(tools)), 7000)   # an agent reads all of it

    def test_failures_of_a_tool_have_the_codes_of_the_command_line(self):
        self.job_in(PROCESSING)
        self.jobs(["a", {"id": "b", "after": "a"}])
        self.queue.cancel("a")
        for tool, given, code, words in (
                ("enqueue", {}, "invalid-job", "no command"),
                ("enqueue", {"comand": "x"}, "invalid-job", "`command`"),
                ("enqueue", {"command": "x", "id": "a"}, "job-exists", "a"),
                ("output", {"id": "c"}, "no-such-job", "c"),
                ("output", {"id": "b"}, "no-such-run", "has not run"),
                ("output", {"id": "job-1", "from": -1}, "invalid-value", "^from: -1"),
                ("status", {"ids": "a", "tial": 1}, "invalid-value", "`tail`"),
                ("wait", {"ids": None}, "invalid-value", "ids is missing"),
                ("wait", {"ids": ["b"]}, "blocked", "after a"),
                ("wait", {"ids": ["b"], "timeout": "x"}, "invalid-value", "duration"),
                ("cancel", {"ids": ["a"]}, "wrong-state", "cancelled"),
                ("retry", {"ids": ["job-1"]}, "wrong-state", "`queuectl cancel job-1` ends it first"),
                ("list", {"state": ["ded"]}, "invalid-value", "dead"),
                ("list", {"exit_code": {}}, "invalid-value", "exit_code")):
            with self.subTest(tool=tool, given=given):
                error = self.use(tool, MODERN_META, **given)["error"]
                self.assertEqual(error["code"], code)
                self.assertRegex(f"{error['message']}; {error['hint']}", words)

    def test_results_are_small(self):
        self.jobs([{"max_retries": 1}] * 3 + [{"command": "x" * 200, "tags": ["t"], "once": "k"}])
        claims = self.tick(3).claims
        self.end(claims[0], Outcome("failed", 1, "exit status 1: words", 0.1, b"words", 5))
        self.end(claims[1])
        for meta in ({}, MODERN_META):
            found = self.use("status", meta, ids=["job-1", "job-2", "job-3"])
            self.assertEqual(found, {"jobs": {"job-1": {"state": DEAD, "exit_code": 1}, "job-2": {
                "state": COMPLETED}, "job-3": {"state": PROCESSING}}})
            self.agent.take(message("tools/call", {"name": "status", "arguments": {
                "ids": ["job-1", "job-2", "job-3"]}, **meta}))
            self.assertLess(len(self.lines.pop()), 400)
        found = self.use("status", ids=["job-1", "job-4"], tail=3)["jobs"]
        self.assertEqual(found["job-1"]["output"], "rds")
        self.assertEqual(self.use("status")["jobs"], {
            "pending": 1, "processing": 1, "completed": 1, "dead": 1, "total": 4})
        [job] = self.use("list", tag="t", queue=None, state=["dead", "pending"])["jobs"]
        self.assertEqual((job["id"], len(job["command"])), ("job-4", 80))
        self.assertTrue(self.use("list", limit=1)["more"])
        self.assertFalse(self.use("enqueue", command="x", once="k")["added"])

    def test_a_wait_ends_with_its_jobs_at_its_time_or_when_it_is_cancelled(self):
        self.jobs(2)
        for number, given in (("all", {"ids": ["job-1", "job-2"]}), (5, {"ids": "job-2"}),
                              ("5", {"ids": "job-2"})):
            self.assertIsNone(self.use("wait", number=number, **given))
        self.assertEqual(self.use("wait", ids="job-1", timeout=0), self.use("status", ids="job-1"))
        self.said({"method": "notifications/cancelled", "params": {"requestId": 5}})
        claims = self.tick(2).claims
        for claim, said, waits in ((claims[0], [], 2), (claims[1], ["all", "5"], 0)):
            self.end(claim)
            self.agent.poll()
            self.assertEqual([one["id"] for one in self.said()], said)
            self.assertEqual(len(self.agent.waits), waits)

    def test_a_worker_is_started_for_jobs_that_wait_for_nothing_else(self):
        starts = []

        def start():
            starts.append(1)
            raise queuectl.Unavailable("unsupported", "no room")
        self.agent._start = start
        self.use("enqueue", command="x", delay=60)
        self.assertEqual(starts, [])
        self.assertEqual(self.use("enqueue", command="x")["waiting_for"][1:], ["no room"])
        self.assertIsNone(self.use("wait", ids="job-2"))
        self.assertEqual(starts, [1])       # not again at once
        self.agent._start_at = 0.0
        self.agent.poll()
        self.assertEqual(starts, [1, 1])

        def quick():    # it has run the job and exited before it is looked at again
            worker = self.worker()
            self.run_next(by=worker)
            worker.leave()
        self.agent._start, self.agent._start_at = quick, 0.0
        for _ in range(2):
            self.assertEqual(self.use("enqueue", command="x", priority=9)["state"], COMPLETED)

    def test_output_comes_in_parts_that_join(self):
        run = queuectl.Run(1, 1, 1, 1, "w", 1, "", "", 1.0, "completed", 0, None, 0, b"")
        job, kept = self.job(), b"abcdefghij" * 2
        for output, total in ((b"", 0), (b"plain\n" * 9, 54), ("aß日".encode() * 9, 54),
                              (kept, 20), (kept, 21), (kept, 10**6)):
            for limit in (4, 7, 50, 5000):
                with self.subTest(output, total=total, limit=limit):
                    one = run._replace(output=output, output_bytes=total)
                    start, text = 0, ""
                    for _ in range(60):
                        part = queuectl.output_object(job, one, start, limit)
                        start, text = part["next"], text + part["output"]
                    self.assertEqual(text, queuectl.readable(output, total).decode())
                    self.assertEqual(start, total)
                    part = queuectl.output_object(job, one, None, limit)
                    tail = part["output"]
                    self.assertEqual((part["next"], tail[-3:]), (total, text[-3:][-len(tail):]))
        cut = run._replace(output="aß".encode()[:2], output_bytes=2, outcome=None)
        part = queuectl.output_object(job, cut, 0, 9)
        self.assertEqual((part["next"], part["output"]), (1, "a"))     # ß is to come

    def test_a_job_is_a_task_for_a_client_that_knows_tasks(self):
        def task(method, job_id):
            return self.ask(f"tasks/{method}", {**TASKS_META, "taskId": job_id})["result"]

        created = self.ask("tools/call", {"name": "enqueue", "arguments": {
            "command": "x", "id": "t", "max_retries": 1}, **TASKS_META})["result"]
        self.assertEqual((created["resultType"], created["taskId"], created["status"]),
                         ("task", "t", "working"))
        self.assertIn("no worker is running", created["statusMessage"])
        self.run_next(3)
        found = task("get", "t")
        self.assertEqual((found["resultType"], found["status"]), ("complete", "completed"))
        self.assertTrue(found["result"]["isError"])
        self.assertEqual(found["result"]["structuredContent"]["exit_code"], 3)
        self.job(id="u")
        for method in ("update", "cancel", "cancel"):
            self.assertEqual(task(method, "u"), {"resultType": "complete"})
        self.assertEqual(task("get", "u")["status"], CANCELLED)
        self.assertEqual(self.use("enqueue", MODERN_META, command="x", id="v")["id"], "v")

    def test_a_retry_changes_the_fields_that_are_given(self):
        self.jobs([{"id": "a", "max_retries": 1}])
        self.run_next(3)
        found = self.use("retry", ids="a", timeout="1h", priority=None, delay=60)
        self.assertIn("due in", found["jobs"]["a"]["waiting_for"][0])
        self.assertEqual(self.queue.job("a").timeout, 3600)
        error = self.use("retry", ids="a", timeout="x")["error"]
        self.assertIn("timeout: 'x'", error["message"])


# ---- 22 Terminal, 23 Commands ------------------------------------------------

class CommandLine(Case):
    def cli(self, line, *more):
        return run_cli("--db", self.path, *shlex.split(line), *more)

    def printed(self, line, *more):
        """What a command prints as JSON."""
        return json.loads(self.cli(line, *more)[1])

    def fails(self, status, *lines):
        """Each prints no result, and one line that says why not."""
        for line in lines:
            with self.subTest(line):
                code, out, err = self.cli(*[line] if isinstance(line, str) else line)
                self.assertEqual((code, out, err.count("\n")), (status, "", 1), err)
                self.assertTrue(err.startswith("queuectl: error: "), err)

    def says(self, rows, status=0):
        """Each prints no result, and on stderr that."""
        for line, said in rows:
            with self.subTest(line):
                code, out, err = self.cli(line)
                self.assertEqual((code, out), (status, ""), err)
                self.assertIn(said, err)

    def test_a_long_setting_is_shown_below_its_row(self):
        self.says((("config set on-dead '\n echo a |\n cat'",
                    "on-dead = echo a |;  cat: shell command after each dead job\n"),
                   ("config set timeout ''", "timeout = none: a run is ended"),
                   ("config unset timeout", "timeout = none (the default)\n")))
        self.assertRegex(self.cli("config list")[1],
                         r"\non-dead +below +none .*\n {21}echo a \|\n {22}cat\n")

    def test_a_variable_without_a_value_is_copied_from_the_environment(self):
        with mock.patch.dict(os.environ, {"COPIED": "a=b ü", "BINARY": "\udcff"}):
            self.cli("enqueue true --env COPIED --env OWN=1 --env EMPTY=")
            self.says((("enqueue x --env ABSENT", "--env 'ABSENT' is not in the environment; "),
                       ("enqueue x --env BINARY", "its value is not UTF-8; ")), 2)
        self.assertEqual(self.queue.job("job-1").env, {"COPIED": "a=b ü", "OWN": "1", "EMPTY": ""})
        write_bytes(self.path_of("items"), b"item\n")
        with mock.patch.dict(os.environ, {"COPIED": "{}"}):
            self.cli("enqueue --env COPIED --env OWN={} --file", self.path_of("items"), "--", "x")
        env = self.queue.job("job-2").env
        self.assertEqual((env["COPIED"], env["OWN"]), ("{}", "item"))   # a template

    def test_a_variable_that_is_not_set_is_no_word_for_all(self):
        self.job()
        for line in ("delete --yes", "cancel --yes", "retry", "wait", "dlq retry",
                     "purge --yes --state pending", "dlq purge --yes"):
            self.says([(f"{line} {flag} ''", f"{flag} is empty")
                       for flag in ("--search", "--queue", "--tag")], 2)
        self.assertEqual(self.state("job-1"), PENDING)

    def test_a_flag_overrides_a_field_in_either_spelling_and_its_other_name(self):
        self.assertEqual(self.printed("enqueue -p 7 --run-at +1h --json", json.dumps(
            {"command": "x", "priority": 1, "delay": 5}))["priority"], 7)
        flags = {"max_retries": 1, "delay": 5.0}
        for fields in ({"max_retries": 5}, {"max-retries": 5}, {"run-at": "+1h"},
                       {"run_at": "+1h", "max-retries": 5}, {"delay": 9}):
            with self.subTest(fields):
                self.assertEqual(queuectl.merged({"command": "x", **fields}, flags),
                                 {"command": "x", **flags})
        stream, _ = self.a_stream(**flags)
        line = b'{"command": "x", "run-at": "+1h", "max-retries": 5}'
        self.assertEqual([job.max_retries for job in stream.add([line])], [1])

    def test_the_object_has_the_keys_of_the_contract_in_their_order(self):
        out = self.printed("enqueue x --json")
        self.assertEqual(" ".join(out), (
            "id command state attempts max_retries created_at updated_at queue priority run_at "
            "timeout backoff_base after unique tags env cwd crashes worker started_at "
            "finished_at exit_code error after_any once slots backoff_max no_retry_on "
            "expires_at held"))
        self.assertRegex(out["run_at"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")

    def test_an_error_is_one_line_and_tells_a_wrong_line_from_another_failure(self):
        self.cli("enqueue x")
        self.fails(1, "show nope", "enqueue {}", "logs job-1", "config set timeout soon",
                   "dlq retry job-1", "config set lease \u0663", "enqueue --file /nope",
                   "web --tls-cert /nope", "web --host 192.0.2.1", f"web --host {'x' * 64}",
                   ("enqueue", '{"command":"x","a":1}'),
                   ("enqueue", '{"command":"x","max-retries":1,"max_retries":2}'))
        with socket.create_server(("127.0.0.1", 0)) as taken:
            self.fails(1, f"web --port {taken.getsockname()[1]}")
        self.fails(2, "statsu", "enqueue", "enqueue echo hi", "list -s bad",
                   "worker start -c 0", "show \udcff", "list --search \udcff",
                   "worker start --queue ''", "worker start --name 'a\nb'",
                   "--db '' delete --all --yes", "status --db ''", "worker start --log ''",
                   "worker start --gpus 0,0", "worker start --gpus 0,", "worker start --gpus 0 1",
                   "worker start --gpus 0 --count 1", "systemd --gpus 0 -c 2",
                   "enqueue x --slots 0", "enqueue x --slots 513",
                    "enqueue --command x y", "web --tls-key x", "web --port 70000",
                   "web --host 0.0.0.0 --no-auth")
        self.says([("worker stop", "no worker is running\n")])
        self.cli("config set timeout ''")
        self.assertEqual(self.cli("config get timeout")[1], "none\n")
        code, out, err = self.cli("show nope --json")
        self.assertEqual((code, out, json.loads(err)["error"]["code"]), (1, "", "no-such-job"))

    def test_the_last_of_a_time_of_day_is_found_by_the_calendar(self):
        def local(*when):
            return datetime.datetime(*when).timestamp()
        self.addCleanup(time.tzset)
        with mock.patch.dict(os.environ, TZ="CET-1CEST,M3.5.0,M10.5.0/3"):     # Berlin
            time.tzset()
            for month, day in ((3, 29), (3, 30), (10, 25), (10, 26)):
                with self.subTest(month=month, day=day):
                    noon = local(2026, month, day, 12)
                    self.assertEqual(queuectl.parse_past("18:00", noon),
                                     local(2026, month, day - 1, 18))
                    self.assertEqual(queuectl.parse_past("12:00", noon), noon)

    def test_a_table_that_is_cut_says_so(self):
        for _ in range(3):
            self.job_in(DEAD)
        for line in ("list", "list --sort oldest", "dlq"):
            with self.subTest(line):
                said = [self.cli(f"{line} {limit}")[2] for limit in (
                    "", "--limit 3", "--limit 2 --json", "--limit 2")]
                self.assertEqual(said[:3], ["", "", ""])
                self.assertIn("more than 2; --limit 0 shows all", said[3])
        self.assertEqual(len(self.printed("dlq --limit 2 --json")), 2)
        self.assertEqual(len(self.cli("dlq list --limit 1")[1].splitlines()), 2)

    def test_lists_are_one_json_array_with_a_line_for_each_element(self):
        self.some_jobs()
        self.worker()
        for line, n in (("list", 5), ("dlq", 1), ("worker list", 1), ("queue list", 2),
                        ("wait good bad", 2), ("retry bad gone", 2),
                        ("edit a b -p 1", 2), ("list --tag no", 0),
                        ("""enqueue '[{"command": "x"}, {"command": "y"}]'""", 2)):
            with self.subTest(line):
                out = self.cli(f"{line} --json")[1]
                self.assertEqual((len(json.loads(out)), out.count("\n")), (n, n + 2 if n else 1))

    def test_the_fields_that_are_wanted_are_listed_in_their_order(self):
        self.job("two\nlines", id="a", tags=["t", "u"], timeout=90)
        self.queue.cancel("a")
        self.assertEqual(self.cli("list --fields timeout,tags,exit-code,cwd,command")[1], "\n".join((
            "TIMEOUT  TAGS  EXIT_CODE  CWD" + " " * (len(os.getcwd()) - 1) + "COMMAND",
            f"1m 30s   t,u   -          {os.getcwd()}  two; lines", "")))
        self.assertRegex(self.cli("list --fields finished_at")[1], r"\d\d:\d\d[+-]")
        self.assertEqual(self.cli("list -n 1 --fields attempts,id --json")[1],
                         '[\n  {"attempts": 0, "id": "a"}\n]\n')
        self.assertEqual(self.printed("dlq --fields error --json"), [])
        self.says([("dlq", "the dead letter queue is empty"), ("dlq --queue q", "no such jobs")])
        self.assertRegex(self.cli("list --fields id,stat")[2],
                         "no field 'stat'; it has id, command, state, ")
        self.fails(2, "list --fields ''", "dlq --fields id,")

    def test_words_after_the_dashes_keep_their_boundaries_and_are_no_flags_of_ours(self):
        self.cli("enqueue --", "sh", "-c", "a && b")
        self.assertEqual(self.printed("show job-1 --json")["command"], "sh -c 'a && b'")
        self.fails(1, "schedule add n bad -- mytool --json",
                   "enqueue --queue 'a b' -- mytool --json")
        self.assertIn("error", json.loads(self.cli("enqueue --json --queue 'a b' -- x")[2]))

    def test_what_is_wrong_in_a_batch_is_named_and_nothing_added(self):
        path = self.path_of("jobs.txt")
        write_bytes(path, b'echo a\n{"command": "b", "id": "b"}\n'
                          b'{"command": "c", "id": "b"}')
        self.job(id="taken")
        for batch, said in (
                (f"@{path}", "line 3: "),
                ('[{"command": "x"}, {"comand": "y"}]', "item 2: unknown key 'comand'"),
                ('[{"command": "x"}, {"command": "y", "id": "taken"}]',
                 "item 2: there is a job 'taken' already")):
            with self.subTest(said):
                code, out, err = self.cli("enqueue", batch)
                self.assertEqual((code, out), (1, ""))
                self.assertIn(f"error: {said}", err)
        self.assertEqual(len(self.queue.jobs()), 1)

    def test_readers_refuse_a_queue_that_is_not_there(self):
        self.says([(line, "no queue at") for line in ("list", "status", "stats", "worker stop")], 1)
        self.assertEqual(self.cli("")[0], 0)
        self.assertFalse(self.exists("queue.db"))

    def test_help_and_version_are_commands_too(self):
        for line, flags in (("help", "--help"), ("version", "--version"), ("help dlq", "dlq --help"),
                            ("help worker start", "worker start -h"),
                            ("--db x help list", "list --help")):
            with self.subTest(line):
                self.assertEqual(self.cli(line), self.cli(flags))
        self.assertEqual(self.printed("version --json"), {"version": queuectl.__version__})
        shown = self.cli("help")[1]
        for word in ("exit status:", "environment:", "files:", "DUR ", "TIME "):
            self.assertIn(word, shown)
        self.assertIn("DUR: ", self.cli("help enqueue")[1])

    def test_flags_may_stand_between_other_arguments(self):
        self.jobs("ab")
        for line in ("cancel a --json b", "retry --json a -- b", "edit a --priority -5 b --json"):
            with self.subTest(line):
                self.assertEqual([job["id"] for job in self.printed(line)], ["a", "b"])
        self.assertEqual(self.cli("schedule add n @daily --tz UTC x")[0], 0)

    def test_every_help_shows_its_groups_and_examples_that_parse(self):
        for entry in queuectl.COMMANDS:
            with self.subTest(entry.words):
                code, out, _ = run_cli(*entry.words, "--help")
                shown = " ".join(out.split())
                self.assertEqual((code, entry.help[1:] in shown, entry.examples != ()),
                                 (0, True, True))
                for one in entry.options:
                    self.assertIn(f"{one.group}: ".lstrip(), shown)
                    for name in one.names:
                        self.assertTrue(name in shown or name[:2] != "--", name)
                for example in entry.examples:
                    self.assertIn(" ".join(example.split()), shown)
                    self.assertIs(queuectl._parse(shlex.split(
                        example.rpartition("| queuectl ")[2])).entry, entry)

    def test_every_help_fits_a_window_of_80_columns(self):
        groups = {entry.words[:1] for entry in queuectl.COMMANDS if entry.words[1:]}
        with mock.patch.dict(os.environ, {"COLUMNS": "80"}):
            for words in ((), *groups, *(entry.words for entry in queuectl.COMMANDS)):
                out = run_cli("help", *words)[1]
                self.assertEqual([line for line in out.splitlines()
                                  if len(line) > 80 or re.search(r"\w-$", line)], [])

    def test_a_mistyped_word_names_the_nearest_and_an_abbreviation_is_none(self):
        for line, hint in (
                ("list --stat dead", "--state"), ("list --stat=dead", "--state"),
                ("enqueue --prio 5 x", "--priority"), ("enqueue x --qeue q", "--queue"),
                ("purge --dry-rn", "--dry-run"), ("status --bd x", "--db"),
                ("edit job-1 --max-retry 1", "--max-retries"), ("queue lst", "queue list"),
                ("schedul list", "schedule"), ("help lst", "list"), ("ls", "list"),
                ("ps -a", "list"), ("rm x", "delete"), ("kill", "cancel"), ("add", "enqueue"),
                ("run x", "enqueue` or `worker start"), ("start -c 4", "worker start"),
                ("log -f job-1", "logs"), ("--db x stop --now", "worker stop"),
                ("schedule rm x", "schedule remove")):
            self.says([(line, f"did you mean `{hint}`?")], 2)
        self.assertFalse(self.exists("queue.db"))
        self.says([("enqueue echo hi", "quote a command of several words")], 2)

    def test_the_name_of_a_command_is_found_among_flags(self):
        for entry in queuectl.COMMANDS:
            for before, after in ((["--db", "x"], ["--json"]), (["--db=x"], ["y", "--", "z"])):
                self.assertEqual(queuectl.find([*before, *entry.words, *after]),
                                 ([entry], [*before, *after]))
        dlq = [entry for entry in queuectl.COMMANDS if entry.words[0] == "dlq"]
        for words, found in (([], queuectl.COMMANDS), (["--db", "list"], queuectl.COMMANDS),
                             (["dlq"], dlq), (["dlq", "--help"], dlq),
                             (["--json", "dlq", "--limit", "5"], dlq[:1])):
            self.assertEqual(queuectl.find(words)[0], found, words)

    # Choosing jobs.

    def some_jobs(self):
        """Two pending jobs and one of each of completed, dead and cancelled."""
        for name, how in (("good", 0), ("bad", 3)):
            self.job("x", id=name, max_retries=1)
            self.run_next(how)
        self.jobs([{"id": "gone"}, {"command": "make", "id": "a", "tags": ["t"]},
                   {"command": "make", "id": "b", "queue": "q"}])
        self.queue.cancel("gone")
        self.claims.leave()

    def test_ids_or_a_choice_and_never_both_or_neither(self):
        self.some_jobs()
        self.fails(2, "retry", "cancel a --all", "delete a --tag t", "dlq retry", "wait",
                   "dlq retry bad --all", "wait a --all", "cancel --state dead",
                   "retry -s processing", "delete -s processing", "purge -s processing",
                   "purge -s pending --older-than 1d", "edit a", "edit --priority 1",
                   "purge -s dead -s failed --older-than 1d", "edit a --all -p 1",
                   "edit -s completed -p 1", "retry --all --yes", "hold --all --yes",
                   "delete --tag t --tag t --yes", "list --queue a --queue=q",
                   "edit --in-queue a --in-queue q -p 1", "dlq purge --older-than 1 --older-than 2")
        self.assertEqual(len(self.queue.jobs()), 5)

    def test_a_choice_changes_all_that_fit_and_says_how_many(self):
        memory = memory_directory()
        self.addCleanup(shutil.rmtree, memory)
        for line, said, left in (
                ("retry --all", "2 jobs pending again", {"good": COMPLETED}),
                ("retry --state dead", "bad pending again", {"good": COMPLETED, "gone": CANCELLED}),
                ("cancel --search make", "2 jobs cancelled", {"a": CANCELLED, "b": CANCELLED}),
                ("cancel --tag t", "a cancelled", {"a": CANCELLED, "b": PENDING}),
                ("retry -s dead,cancelled --exit-code 2,3-9", "bad pending again",
                 {"gone": CANCELLED}),
                ("delete -s dead,completed --since 1h", "2 jobs deleted", {"gone": CANCELLED}),
                ("retry -s dead --timeout 1m --delay 1h", "bad pending again", {"bad": PENDING}),
                ("edit --in-queue q --queue x", "b edited: queue x", {"good": COMPLETED}),
                ("edit --all --timeout 1m30s -p 5", "3 jobs edited: priority 5, timeout 1m 30s",
                 {"bad": DEAD, "gone": CANCELLED}),
                ("delete --queue q -s pending", "b deleted", {"a": PENDING}),
                ("delete --all", "3 jobs deleted", {"a": PENDING, "b": PENDING}),
                ("delete --tag no", "no such jobs", {"bad": DEAD}),
                ("dlq retry --all", "bad pending again", {"bad": PENDING}),
                ("dlq retry --queue q", "no such jobs", {"bad": DEAD}),
                ("dlq purge", "bad deleted", {"good": COMPLETED}),
                ("purge", "3 jobs deleted", {"a": PENDING, "b": PENDING}),
                ("purge -s pending -s dead", "3 jobs deleted",
                 {"good": COMPLETED, "gone": CANCELLED}),
                ("purge --older-than 1h", "no such jobs", {"bad": DEAD}),
                ("purge --dry-run", "would delete jobs: 1 completed, 1 dead, 1 cancelled",
                 {"bad": DEAD, "good": COMPLETED}),
                ("purge --dry-run --tag t", "no such jobs", {"a": PENDING})):
            with self.subTest(line):
                self.anew()
                self.path = os.path.join(memory, line)
                self.clock.now = time.time()
                self.some_jobs()
                yes = ["--yes"] * line.startswith(("cancel", "delete", "purge", "dlq purge"))
                self.assertEqual(self.cli(line, *yes), (0, "", said + "\n"))
                self.assertEqual({name: self.state(name) for name in left}, left)
                self.assert_sound()

    def test_a_hook_where_the_directory_has_no_name_in_utf_8(self):
        folder = os.path.join(os.fsencode(self.dir), b"odd-\xff")
        os.mkdir(folder)
        with Queue(os.fsdecode(os.path.join(folder, b"queue.db"))) as queue:
            queue.configure("on-idle", "true")
            queue.cancel(queue.enqueue("x", cwd="/").id)
            self.assertEqual([job.cwd for job in queue.jobs(queue="hooks")], ["/"])

    def test_what_was_swept_is_printed_as_json(self):
        self.some_jobs()
        self.assertEqual([job["id"] for job in self.printed("cancel --all --yes --json")],
                         ["b", "a"])
        for line, printed in (("purge --dry-run --json", {"deleted": 0, "would_delete": 5}),
                              ("purge --yes --json", {"deleted": 5}), ("retry --all --json", [])):
            self.assertEqual(self.printed(line), printed)

    def test_an_edit_says_what_it_changed(self):
        self.some_jobs()
        self.says([("edit a b --priority 5 --queue z", "2 jobs edited: queue z, priority 5")])
        self.cli("edit --in-queue z --search make --queue y")
        self.assertEqual(ids(self.queue.jobs(queue="y")), ["b", "a"])
        self.cli("edit -s dead --exit-code 3 --timeout 1h")
        self.assertEqual(self.queue.job("bad").timeout, 3600)
        self.cli("edit a b --queue z")
        self.assertIn("--all, --state, --in-queue, --tag", self.cli("edit -p 1")[2])
        [job] = self.printed("edit a --run-at 2031-01-01T00:00:00Z --json")
        self.assertEqual((job["id"], job["priority"], job["queue"], job["run_at"]),
                         ("a", 5, "z", "2031-01-01T00:00:00.000Z"))
        code, _, err = self.cli("edit good --priority 1 --json")
        self.assertEqual((code, json.loads(err)["error"]["code"]), (1, "wrong-state"))

    # Waiting.

    def test_waiting_ends_with_the_status_of_the_one_job(self):
        for name, how, status in (
                ("ok", 0, 0), ("own", 7, 7), ("late", Outcome("timeout", 124), 124),
                ("signal", Outcome("failed", 137, "killed by SIGKILL"), 137),
                ("unstarted", Outcome("failed", None, "no directory"), 1),
                ("gone", "cancelled", 1)):
            self.job(id=name, max_retries=1)
            self.run_next(how)
            self.says([(f"wait {name}", f"{name} {self.state(name)}")], status)
            self.assertEqual(self.cli(f"wait {name} -q"), (status, "", ""))
        self.says([("wait ok ok", ""), ("wait --all", ""), ("wait --tag none", ""),
                   ("wait --queue q --search none", "")])
        self.says([("wait ok own", "1 of 2 jobs completed"), ("wait nope", "")], 1)

    def test_what_was_waited_for_is_printed_as_json(self):
        self.some_jobs()
        self.assertEqual([job["id"] for job in self.printed("wait gone good --json")],
                         ["gone", "good"])
        self.assertEqual(self.cli("wait bad --json")[::2], (3, ""))
        for line, wanted in (("wait --all", ["c", "d"]), ("wait --queue q", ["d"]),
                             ("wait --all -s processing", ["d", "c"]), ("wait --tag no", []),
                             ("wait --since 2020-01-01", ["d", "c"])):
            with self.subTest(line):
                self.anew()
                self.jobs([{"id": "c"}, {"id": "d", "queue": "q"}])
                runs = self.tick(2).claims

                def ended(queue, *_, runs=runs):
                    self.end([runs.pop()])
                    return 0
                with mock.patch.object(Queue, "await_change", ended):
                    code, out, err = self.cli(f"{line} --json")
                self.assertEqual((code, err), (0, ""))
                self.assertEqual([job["id"] for job in json.loads(out)], wanted)
                self.end(runs)

    def test_waiting_too_long_is_no_success_and_a_missing_worker_is_said(self):
        self.some_jobs()
        for line in ("wait a", "wait --all", "wait --queue q", "wait --tag t", "wait a b"):
            with self.subTest(line):
                code, out, err = self.cli(f"{line} --timeout 10ms")
                self.assertEqual((code, out), (124, ""))
                self.assertRegex(err, r"^[ab] waits: no worker is running; `queuectl worker "
                                      r"start` starts one\n.*not over yet; wait longer")
        self.assertIn("no worker is running; `queuectl worker start`", self.cli("enqueue x")[2])
        self.assertEqual(self.cli("enqueue x -q")[2], "")

    def test_a_list_of_waiting_jobs_says_why_they_wait(self):
        self.jobs([{"id": "a", "held": True}, {"id": "b", "after": ["a"], "tags": ["t"]}])
        self.claims.leave()
        self.assertRegex(self.cli("list")[1], r"\na +pending +no worker is running, held +true\n")
        self.assertRegex(self.cli("list --tag t")[1], r"\nb +pending +t +after a \(held\)")

    def test_the_error_of_a_dead_job_is_broken_to_the_width_and_not_cut(self):
        self.job(max_retries=1)
        self.run_next(Outcome("failed", 3, "one two three", 0.1))
        narrow = queuectl.Style(False, 16, NOON)
        with mock.patch.object(queuectl.Screen, "style", staticmethod(lambda: narrow)):
            self.assertIn("\n    one two\n    three\n", self.cli("dlq")[1])

    def test_a_job_that_no_worker_has_slots_for_is_reported_at_once(self):
        self.worker(slots=2)
        for slots, said in ((2, ""), (4, "job-2 needs 4 slots, the largest worker has 2; `queuectl "
                                         "edit job-2 --slots 2`, or start a larger one\n")):
            self.assertEqual(self.cli(f"enqueue x --slots {slots}")[2], said)

    # Queues, schedules, changes.

    def test_queues_are_paused_limited_and_listed(self):
        self.says((("pause --queue a --queue b", "queues a, b paused;"),
                   ("pause", "all queues paused;"),
                   ("resume --queue a", "all queues are paused")))
        self.assertIn("all queues are paused; `queuectl resume` ends that",
                      self.cli("queue list")[2])
        self.says((("resume", "the pause of all queues is over; still paused: b"),
                   ("queue set gpu --limit 2", "queue gpu: at most 2 at once"),
                   ("queue set b --limit 1", "queue b: at most 1 at once"),
                   ("queue set b --limit 0", "queue b: no limit")))
        self.assertEqual([(one["name"], one["paused"], one["limit"])
                          for one in self.printed("queue list --json")],
                         [("b", True, 0), ("default", False, 0), ("gpu", False, 2)])
        self.assertEqual(self.printed("status --json")["paused"], ["b"])
        self.fails(2, "queue set gpu", "queue set gpu --limit -1", "pause --queue 'a b'")

    def test_a_schedule_is_added_shown_and_taken_away(self):
        code, out, err = self.cli("schedule add night '30 2 * * *' --queue q --priority 4 "
                                  "--env A=b --", "sh", "-c", "a && b")
        self.assertEqual((code, out), (0, ""))
        self.assertRegex(err, r"night: .*\nnext: (\w{3} \d{4}-\d\d-\d\d 02:30\S+\s){3}"
                              "no worker is running")
        [shown] = self.printed("schedule list --json")
        self.assertEqual(" ".join(shown), "name cron tz command queue paused next_run last_run "
                                          "last_job last_state last_success skipped catch_up")
        self.assertEqual(shown["command"], "sh -c 'a && b'")
        job_id = self.cli("schedule run night")[1].strip()
        job = self.printed(f"show {job_id} --json")
        self.assertEqual(job, {
            **job, "command": "sh -c 'a && b'", "queue": "q", "priority": 4,
            "tags": ["schedule:night"], "env": {"A": "b"}, "cwd": os.getcwd()})
        self.assertRegex(self.cli("schedule edit night '@every 90m' --no-catch-up -p 5 --",
                                  "true")[2], "night: every 1h 30m, ")
        [shown] = self.printed("schedule list --json")
        self.assertEqual((shown["command"], shown["catch_up"], shown["queue"]),
                         ("true", False, "q"))
        self.assertRegex(self.cli("schedule list --json")[1], r'(?m)^ +"next_run": "[^"]+",$')
        self.cli("schedule edit night '30 2 * * *' --catch-up")
        self.fails(2, "schedule edit night")
        self.says([("schedule pause night", "night paused\n")])
        self.assertRegex(self.cli("schedule")[1], r"night +30 2 \* \* \* +\S+ +paused ")
        self.says((("schedule resume night", "next: "), ("schedule remove night", "removed"),
                   ("schedule list", "no schedules")))
        self.assertEqual(self.cli(f"show {job_id}")[0], 0)

    def test_a_schedule_that_is_wrong_is_refused(self):
        self.cli("schedule add night @daily x")
        self.fails(1, "schedule add night @daily x", "schedule add b '61 * * * *' x",
                   "schedule remove nigth", "schedule run x")
        self.fails(2, "schedule add b @daily", "schedule add b", "schedule pause",
                   "schedule add b @daily x -- y", "schedule add b @daily x --id i")
        self.assertEqual(len(self.printed("schedule list --json")), 1)

    def test_changes_are_printed_oldest_first(self):
        self.clock.now = time.time()
        self.some_jobs()
        lines = [json.loads(line) for line in self.cli("events --json")[1].splitlines()]
        self.assertEqual(lines, [queuectl.event_object(e) for e in self.queue.events_since()])
        self.assertEqual(" ".join(lines[0]), "id from to at reason")
        self.assertEqual([*lines[0].values()][:3], ["good", None, PENDING])
        self.assertIn("  b  - -> pending", self.cli("events --queue q")[1])
        for since, n in (("1h", len(lines)), ("+1h", 0), ("2020-01-01", len(lines))):
            self.assertEqual(len(self.cli(f"events --since {since}")[1].splitlines()), n)
        self.fails(2, "events --since soon")

    # Following what jobs print.

    def test_a_follower_goes_through_the_retries_to_the_end(self):
        self.job(id="a", max_retries=2, backoff_base=0)
        last, early, follower = (queuectl.followed(self.queue, "a", n) for n in (None, 1, None))

        def steps(output, note="", over=False, by=follower):
            self.assertEqual(next(by), (output, note))
            if over:
                self.assertEqual(list(by), [])
        steps(b"")
        claim = self.claim()
        self.tick(outputs={claim.number: output_of(b"one\ntw")})
        steps(b"one\ntw")
        steps(b"")
        self.end(claim, Outcome("failed", 1, "", 0.1, b"one\ntwo\n", 8))
        steps(b"o\n", "-- run 1 of a: failed")
        steps(b"")
        steps(b"one\ntwo\n", over=True, by=early)
        self.run_next(Outcome("completed", 0, None, 0.1, b"done", 4))
        for one in (follower, last):
            steps(b"done", over=True, by=one)
        self.job(id="b", max_retries=2)
        self.run_next(1)
        follower = queuectl.followed(self.queue, "b")
        steps(b"", "-- run 1 of b: failed", by=follower)
        self.queue.cancel("b")
        self.assertEqual(list(follower), [])

    def test_a_follower_begins_with_the_last_lines_that_are_wanted(self):
        self.job(id="a")
        claim, lines = self.claim().number, b"1\n2\n3\n"
        followers = [queuectl.followed(self.queue, "a", lines=n) for n in (0, 2, 9, None)]
        for output, seen in ((lines, [b"", b"2\n3\n", lines, lines]),
                             (lines + b"4\n5\n", [b"4\n5\n"] * 4)):
            self.tick(outputs={claim: output_of(output)})
            self.assertEqual([next(one)[0] for one in followers], seen)

    def test_without_the_output_of_each_job_none_is_printed(self):
        self.job(id="a")
        self.queue.cancel("a")
        self.job(id="waits")
        self.says([("logs waits", "waits has not run yet; no worker is running; `queuectl"),
                   ("logs a", "a has not run yet; `queuectl show a`"),
                   ("logs waits nope", "no job 'nope'; `queuectl list`"),
                   ("logs -f a", "a has not run yet"), ("logs", "no job has run yet"),
                   ("logs -f", "no job has run yet")], 1)
        self.tick(outputs={self.claim().number: output_of(b"text")})
        self.assertEqual(self.cli("logs waits"), (0, "text", ""))
        self.job()
        self.tick([0])      # claimed, but not started
        self.assertEqual(self.cli("logs"), (0, "text", "-- waits: true\n"))
        self.fails(1, "logs waits nope", "logs waits a")

    def test_output_is_read_from_a_byte_on(self):
        self.jobs(["a", {"id": "cut", "max_retries": 1}, "late"])
        self.end(self.claim(), Outcome("completed", 0, None, 0.1, b"1%\r2%\nend\n", 10))
        self.end(self.claim(), Outcome("failed", 3, None, 0.1, b"a\nb\nc\nd\n", 100))
        self.tick(outputs={self.claim().number: output_of("aß".encode()[:2])})
        for line, state, first, after, text in (
                ("a", COMPLETED, 0, 10, "1%\r2%\nend\n"), ("a --from 6", COMPLETED, 6, 10, "end\n"),
                ("a --tail 1", COMPLETED, 6, 10, "end\n"), ("a --from 99", COMPLETED, 10, 10, ""),
                ("a --tail 2 --from 3", COMPLETED, 3, 10, "2%\nend\n"),
                ("cut --tail 1", DEAD, 98, 100, "d\n"), ("cut --tail 9", DEAD, 96, 100, "c\nd\n"),
                ("cut --from 2", DEAD, 2, 100, "b\n\n[... 92 bytes left out ...]\nc\nd\n"),
                ("late", PROCESSING, 0, 1, "a"), ("", PROCESSING, 0, 1, "a")):
            with self.subTest(line):
                wanted = {"id": line.split(" ")[0] or "late", "run": 1, "state": state,
                          "from": first, "next": after, "output": text}
                self.assertEqual(self.cli(f"logs {line} --json")[1], f"{json.dumps(wanted)}\n")
        self.assertEqual([one["from"] for one in self.printed("logs a cut --from 5 --json")], [5, 5])
        self.assertEqual(self.cli("logs a --from 6")[1], "end\n")
        self.assertEqual(self.cli("logs -f a --from 6")[1], "end\n")
        self.fails(2, "logs a --from -1", "logs --from")
        self.assertEqual(self.cli("logs a -f --json")[:2], (2, ""))

    def test_lines_end_at_newlines_only(self):
        bar = b"1%\r2%\r3%\nend"
        each(self, queuectl._last_lines, (
            (bar, None, bar), (bar, 0, b""), (bar, 1, b"end"), (bar, 2, bar), (bar, 9, bar),
            (bar + b"\n", 0, b""), (bar + b"\n", 1, b"end\n"), (bar + b"\n", 2, bar + b"\n"),
            (b"", 1, b""), (b"\n", 1, b"\n"), (b"a\n\n", 1, b"\n")))

    # Streams.

    def a_stream(self, into=None, warn=None, **flags):
        """One, and a list of what it refuses."""
        refused = []
        return queuectl.Stream(into or self.queue, flags, refused.append,
                               warn or self.fail), refused

    def batches_of(self, content):
        write_bytes(self.path_of("lines"), content)
        fd = os.open(self.path_of("lines"), os.O_RDONLY)
        self.addCleanup(os.close, fd)
        return list(queuectl.line_batches(fd))

    def test_lines_come_as_they_are_written_and_the_last_needs_no_end(self):
        read_end, write_end = os.pipe()
        self.addCleanup(os.close, read_end)
        batches = queuectl.line_batches(read_end)
        for written, lines in ((b"a\r\n\nb\nc", [b"a\r", b"", b"b"]), (b"d\n", [b"cd"])):
            os.write(write_end, written)
            self.assertEqual(next(batches), lines)
        os.write(write_end, b"e")
        os.close(write_end)
        self.assertEqual([*batches], [[b"e"]])

    def test_many_lines_at_once_are_taken_in_bounded_batches(self):
        batches = self.batches_of(b"x\n" * 200_000)
        self.assertLess(max(map(len, batches)), queuectl.STREAM_BATCH + queuectl.READ_SIZE)
        self.assertEqual(sum(line == b"x" for batch in batches for line in batch), 200_000)

    def test_of_an_endless_line_only_what_can_be_refused_is_kept(self):
        lines = [line for batch in self.batches_of(
            b"x" * (queuectl.MAX_LINE + 3 * queuectl.READ_SIZE) + b"\necho ok\n")
            for line in batch if line]
        self.assertLess(len(lines[0]), queuectl.MAX_LINE + 2 * queuectl.READ_SIZE)
        stream, refused = self.a_stream()
        self.assertEqual([job.command for job in stream.add(lines)], ["echo ok"])
        self.assertRegex(str(refused[0]), "^line 1: command")

    def test_bad_lines_of_a_stream_are_numbered_and_passed_over(self):
        self.job(id="taken")
        stream, refused = self.a_stream(queue="q")
        jobs = stream.add([
            b"echo a", b"# a comment", b"", b"{bad}", b'{"command": "b", "id": "taken"}',
            b'[{"command": "c", "id": "c"}, {"command": "d", "id": "d"}]'])
        jobs += stream.add([b'[{"command": "e"}, {"command": ""}]', b"\xff",
                            b'{"command": "f", "id": "c"}', b"echo g", b""])
        self.assertEqual([(job.command, job.queue) for job in jobs],
                         [("echo a", "q"), ("c", "q"), ("d", "q"), ("echo g", "q")])
        self.assertEqual([str(error).partition(": ")[0] for error in refused],
                         ["line 4", "line 5", "line 7", "line 8", "line 9"])
        self.assertEqual(stream.refused, 5)
        self.assertEqual(ids(self.queue.jobs(queue="q", sort="oldest")), ids(jobs))

    def test_a_stream_warns_once_of_keys_that_the_queue_keeps(self):
        notes = []
        line = b'{"command": "x", "state": "dead", "exit-code": 1}'
        self.assertEqual(len(self.a_stream(warn=notes.append)[0].add([line, line])), 2)
        self.assertEqual(notes, ["warning: ignored keys that only the queue sets: exit-code, state"])

    def test_a_stream_waits_for_a_database_that_is_busy(self):
        self.queue.store.db.patience = 0.01
        rival, refused = sqlite3.connect(self.path, isolation_level=None), []
        self.addCleanup(rival.close)
        rival.execute("BEGIN IMMEDIATE")
        stream = queuectl.Stream(self.queue, {}, lambda error: refused.append(
            (error.code, rival.execute("ROLLBACK"))), self.fail)
        self.assertEqual([job.command for job in stream.add([b"a", b"b"])], ["a", "b"])
        self.assertEqual(([code for code, _ in refused], stream.refused), (["busy"], 0))

    def test_who_interrupts_a_stream_is_told_what_may_be_missing(self):
        queue = mock.Mock(wraps=self.queue, **{"enqueue_many.side_effect": KeyboardInterrupt})
        stream, refused = self.a_stream(queue)
        with self.assertRaises(KeyboardInterrupt):
            stream.add([b"", b"a", b"b"])
        self.assertIn("2 jobs from line 2 on may not have been added", str(refused[0]))

    def test_a_usage_error_makes_no_queue(self):
        self.fails(2, "enqueue", "enqueue -0 x", "enqueue a --env A", "enqueue --",
                   "enqueue - -- sh -c {}", "schedule add n @daily", "worker start -c 0",
                   "schedule add n @daily x --env A", *(f"enqueue --stream {source}" for source in (
                       "x", "--file f", "--command x", "--wait", "@f", "--env A")))
        self.assertFalse(self.exists("queue.db"))

    def test_a_unit_file_is_of_this_program_and_queue_and_makes_none(self):
        code, out, _ = self.cli("systemd -c 2 --queue a --queue b --grace 1m30s "
                                "--backoff-base 500ms")
        self.assertEqual(code, 0)
        word = queuectl.systemd_word
        for line in (f'ExecStart={word(sys.executable)} -c "{queuectl.BY_IMPORT}" '
                     f'{word(os.path.dirname(MODULE))} --db "{self.path}" worker start '
                     "--count 2 --queue a --queue b --backoff-base 0.5 --grace 90",
                     "Type=notify", "NotifyAccess=all", "KillMode=mixed",
                     "TimeoutStopSec=110s", "OOMPolicy=continue", "Restart=on-failure",
                     "WatchdogSec=60", "WantedBy=multi-user.target"):
            self.assertIn(f"\n{line}\n", out)
        self.assertRegex(out, "\nUser=.")
        self.assertFalse(self.exists("queue.db"))
        self.cli("config set kill-grace 1m")
        self.assertIn("\nTimeoutStopSec=85s\n", self.cli("systemd --grace 10s")[1])
        self.assertRegex(self.cli("systemd --gpus MIG-a/1/2,1")[1],
                         "worker\"? \"?start\"? \"?--gpus\"? \"?MIG-a/1/2,1\"?\n")
        own = self.cli("systemd --user")[1]
        self.assertRegex(own, r"(?s)\nTimeoutStopSec=infinity\n.*\nWantedBy=default.target\n")
        self.assertNotIn("User=", own)

    def test_a_unit_file_of_the_dashboard_takes_its_token_from_a_file(self):
        for flags, lines in (
                ("--port 0 --read-only --tls-cert c.pem", (
                    "Type=exec", "EnvironmentFile=/etc/queuectl-web.env", "StandardOutput=null",
                    "NoNewPrivileges=yes", "CapabilityBoundingSet=")),
                ("--user --no-auth", (
                    "EnvironmentFile=-%h/.config/queuectl-web.env", "NoNewPrivileges=yes",
                    "#CapabilityBoundingSet="))):
            out = self.cli(f"systemd web {flags}")[1]
            for line in (*lines, "Restart=on-failure"):
                self.assertIn(f"\n{line}\n", out)
            self.assertIn(f' --db "{self.path}" web ' + flags.replace("--user ", "").replace(
                "c.pem", queuectl.systemd_word(os.path.abspath("c.pem"))) + "\n", out)
            token, stored = re.findall(r"^# {5}((?:token=|\(umask).*)$", out, re.M)
            stored = stored.replace("/etc/", "~/.config/")
            os.makedirs(self.path_of(".config"), exist_ok=True)
            self.assertEqual(subprocess.run(["sh", "-c", f"{token}\n{stored}"], env={
                **os.environ, "HOME": self.dir}, capture_output=True, check=True).stdout, b"")
            with open(self.path_of(".config/queuectl-web.env"), encoding="ascii") as file:
                self.assertRegex(file.read(), r"\AQUEUECTL_TOKEN=[0-9a-f]{64}\n\Z")


# ---- 24 Main -----------------------------------------------------------------

class Completion(Case):
    def offered(self, *words):
        """The words that may come next, and the order to complete files, if any."""
        code, out, err = run_cli(queuectl.COMPLETE, "--", "--db", self.path, *words)
        self.assertEqual((code, err), (0, ""))
        return [line.split("\t")[0] or tuple(line.split("\t")[1:]) for line in out.splitlines()]

    def offers(self, rows):
        for line, words in rows:
            with self.subTest(line):
                self.assertEqual(self.offered(*line.split(" ")), words)

    def test_commands_flags_and_values_come_from_the_table(self):
        files, states = [("files", "")], list(STATES)
        self.offers((
            ("enq", ["enqueue"]), ("dlq ", ["list", "retry", "purge"]),
            ("dlq p", ["purge"]), ("nonsense ", []), ("--v", ["--version"]),
            ("list --sta", ["--state"]), ("list -s", ["-s"]),
            ("list --state ", states), ("list -s de", ["dead"]),
            ("list -s dead --state de", []), ("list --state=d", ["--state=dead"]),
            ("list --stat de", []), ("list -sdead --state de", []),
            ("list --sort n", ["newest"]), ("list --search ", []),
            ("cancel --state ", ["pending", "failed", "processing"]),
            ("list --fields ex", ["exit_code", "expires_at"]),
            ("dlq --l", ["--limit"]), ("config get kill", ["kill-grace"]),
            ("config set kill-grace ", ["--help"]), ("list x --h", []),
            ("completion ", list(queuectl.SHELLS)),
            ("backup ", files), ("backup x ", ["--help"]), ("--db ", files),
            ("enqueue --file x", files), ("enqueue --cwd ", [("dirs", "")]),
            ("enqueue --file=x", [("files", "--file=")]),
            ("enqueue @x", [("files", "@")]), ("enqueue -- ls ", files),
            ("enqueue --unique ", []), ("enqueue --id ", []),
            ("worker start --name ", []), ("list --json --js", []),
            ("status --watch --js", ["--json"]), ("status --watch 5 --js", ["--json"]),
            ("list --bogus --", []), ("list --limit --json --", []),
            ("list x y --", []), ("dlq x --", []), ("show --json=x --", []),
            ("help dlq ", ["list", "retry", "purge"])))

    def test_every_command_and_every_long_flag_is_offered(self):
        self.assertEqual(self.offered(""),
                         [*dict.fromkeys(e.words[0] for e in queuectl.COMMANDS), "help"])
        for entry in queuectl.COMMANDS:
            flags = {name for one in entry.options for name in one.names if name[:2] == "--"}
            self.assertLessEqual(flags, {*self.offered(*entry.words, "--")}, entry.words)

    def test_a_flag_is_offered_again_only_if_it_may_come_again(self):
        offered = self.offered("enqueue", "--after", "x", "-p", "5", "--cwd=/", "--")
        self.assertEqual({"--after", "--priority", "--cwd"} & {*offered}, {"--after"})

    def test_ids_are_those_that_fit_the_newest_first(self):
        for job_id in ("a:1", "a:2", "b@1"):
            self.job("echo hi", id=job_id, max_retries=1)
        claims = self.worker(name="w1")
        self.end(self.claim(claims), 1, by=claims)
        self.claim(claims)
        # a:1 is dead, a:2 runs, b@1 waits.
        self.offers((
            ("show ", ["b@1", "a:2", "a:1"]), ("show a", ["a:2", "a:1"]), ("show x", []),
            ("show a:1", ["a:1"]), ("show 'a:1", ["a:1"]), ("logs a\\:1", ["a:1"]),
            ("dlq retry ", ["a:1"]), ("retry ", ["b@1", "a:1"]), ("cancel ", ["b@1", "a:2"]),
            ("delete b@1 ", ["a:1"]), ("enqueue --after b@", ["b@1"]),
            ("worker stop ", ["w1"]), ("worker stop w1 ", [])))
        out = run_cli(queuectl.COMPLETE, "--", "--db", self.path, "show", "b")[1]
        self.assertEqual(out, "b@1\tpending: echo hi\n")

    def test_an_old_id_is_found_by_its_beginning_and_no_more_are_offered_than_help(self):
        self.job(id="older")
        self.job(id="old")
        self.queue.enqueue_many([queuectl.new_job({"command": "x"}, NOON)
                                 for _ in range(queuectl.LOOKED_AT)])
        self.queue.cancel("job-2000", "job-1900")
        newest = [f"job-{n}" for n in range(2002, 1802, -1)]
        self.assertEqual(self.offered("show", ""), newest)
        self.assertEqual(self.offered("show", "ol"), ["old", "older"])

    def test_queues_tags_and_schedules_are_those_that_are_there(self):
        for name, tags in (("gpu", ["red", "blue"]), ("cpu", ["red"]), ("cpu", [])):
            self.job(queue=name, tags=tags)
        self.queue.add_schedule("nightly", "@daily", command="x")
        self.offers((("list --queue ", ["cpu", "gpu"]), ("list --tag ", ["blue", "red"]),
                     ("list --tag red", ["red"]), ("list --tag x", []),
                     ("worker start --queue gpu --queue ", ["cpu"]),
                     ("schedule pause ", ["nightly"])))

    def test_it_makes_and_changes_nothing_and_never_fails(self):
        self.assertEqual((self.offered("show", ""), os.listdir(self.dir)), ([], []))
        Queue(self.path_of("older.db")).close()
        for name, version in (("older.db", 0), ("foreign.db", 7)):
            with contextlib.closing(sqlite3.connect(self.path_of(name))) as db:
                db.execute(f"PRAGMA user_version = {version}")
        write_bytes(self.path_of("text.db"), b"no database " * 100)
        before = {name: read_bytes(self.path_of(name)) for name in os.listdir(self.dir)}
        for name in [*before, "", "gone/x.db"]:
            for words in (["show", ""], ["\udcff"], []):
                with self.subTest(name=name, words=words):
                    self.assertEqual(run_cli(queuectl.COMPLETE, "--", "--db", self.path_of(
                        name), *words)[0::2], (0, ""))
        self.assertEqual(before, {name: read_bytes(self.path_of(name))
                                  for name in os.listdir(self.dir)})

    def test_a_locked_queue_holds_a_key_up_no_longer_than_a_moment(self):
        self.job()
        with self.queue.store.transaction():
            self.assertEqual(self.offered("show", ""), ["job-1"])


# ---- Real processes ----------------------------------------------------------

UNTIL_GO = "while [ ! -e go ]; do sleep .02; done"


class Processes(Case):
    """Commands, workers and servers as processes of their own, by the real clock."""

    def a_queue(self):
        queue = Queue(self.path)
        self.addCleanup(queue.close)
        return queue

    @functools.cached_property
    def queue(self):
        return self.a_queue()

    def configure(self, **settings):
        with Queue(self.path) as queue:
            for key, value in settings.items():
                queue.configure(key.replace("_", "-"), value)

    def fill(self, count, **fields):
        with Queue(self.path) as queue:
            return ids(queue.enqueue_many([{"command": "true", "cwd": self.dir, **fields}] * count))

    def job(self, job_id):
        with Queue(self.path, create=False) as queue:
            return queue.job(job_id)

    def runs(self, job_id):
        with Queue(self.path, create=False) as queue:
            return queue.runs(job_id)

    def outcomes(self):
        """Of all runs, in the order of their jobs."""
        with Queue(self.path, create=False) as queue:
            return [run.outcome for job in queue.jobs(sort="oldest") for run in queue.runs(job.id)]

    def wait_state(self, job_id, state):
        return wait_for(lambda: self.job(job_id).state == state, f"{job_id} {state}")

    def wait_file(self, name):
        wait_for(lambda: self.exists(name), name)

    def wait_log(self, words, count=1):
        wait_for(lambda: self.read("worker.log").count(words) >= count, f"{words!r} in the log")

    def script(self, name, line):
        write_bytes(self.path_of(name), f"#!/bin/sh\n{line}\n".encode())
        os.chmod(self.path_of(name), 0o755)

    # Commands: in this process, or in one of their own.

    def cli(self, *argv):
        return run_cli("--db", self.path, *argv)

    def enqueue(self, *argv):
        code, out, err = self.cli("enqueue", "-q", "--cwd", self.dir, *argv)
        self.assertEqual(code, 0, err)
        return out.strip()

    def command(self, *argv):
        return [*program(), "--db", self.path, *argv]

    def done(self, argv, **options):
        """(exit status, stdout, stderr) of a program."""
        done = subprocess.run(argv, check=False, **{
            "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.dir, "timeout": 60,
            **options})
        return done.returncode, (done.stdout or b"").decode(), (done.stderr or b"").decode()

    def call(self, *argv, **options):
        return self.done(self.command(*argv), **options)

    def several(self, lines, **options):
        """The same for each of these command lines, all in one other process."""
        code, out, err = self.done(
            [sys.executable, "-c", SEVERAL, os.path.dirname(MODULE),
             json.dumps([["--db", self.path, *line] for line in lines])], **options)
        self.assertEqual(code, 0, err)
        return json.loads(out)

    def drain(self, *argv):
        code, _, err = self.call("worker", "start", "--drain", *argv)
        self.assertEqual(code, int(" dead" in err.splitlines()[-1]), err)
        return err

    # Processes that run beside the test.

    def start(self, *argv, **options):
        process = subprocess.Popen(self.command(*argv), cwd=self.dir, **options)
        self.addCleanup(self.end, process)
        for stream in (process.stderr, process.stdout, process.stdin):
            if stream:
                self.addCleanup(stream.close)
        return process

    def running(self, *argv):
        return self.start(*argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE)

    def worker(self, *argv, **options):
        with open(self.path_of("worker.log"), "ab") as log:
            return self.start("worker", "start", *argv, stderr=log, **options)

    def web(self, *argv, **environ):
        """A server and its port; `url` is what it prints."""
        with open(self.path_of("web.log"), "ab") as log:
            process = self.start(
                "web", "--port", "0", *argv, stderr=log, stdout=subprocess.PIPE,
                env={**os.environ, "QUEUECTL_TOKEN": TOKEN, "QUEUECTL_READ_TOKEN": "", **environ})
        self.addCleanup(self.stop, process)
        self.url = process.stdout.readline().decode().strip()
        return process, int(re.search(r":(\d+)/", self.url)[1])

    def stop(self, process):
        """End it as a service manager does, or at last by force."""
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
        self.end(process)

    def listed_worker(self, *argv):
        """A worker that has entered the queue."""
        def count():
            return sum(worker.heartbeats > 0 for worker in self.queue.store.workers())
        before, worker = count(), self.worker(*argv)
        wait_for(lambda: count() > before, "the worker")
        return worker

    def at_work(self, command=UNTIL_GO, *flags, worker=(), **options):
        """A worker that has started this command; `pid` holds the id of its shell."""
        self.enqueue(f"echo $$ > pid; touch began; {command}", *flags)
        process = self.worker(*worker, **options)
        self.wait_file("began")
        return process

    def end(self, process):
        if process.poll() is None:
            self.kill_both(process)
        kill(*members(os.path.realpath(self.path)))

    def kill_worker(self, process):
        """Kill the worker; its supervisor ends what it ran, and itself."""
        os.kill(wait_for(lambda: child_of(process.pid), "the worker"), signal.SIGKILL)
        process.wait()

    def kill_both(self, process):
        """Kill supervisor and worker so that neither can do anything more."""
        process.send_signal(signal.SIGSTOP)
        own = child_of(process.pid) or NOBODY
        kill(own, process.pid)
        process.wait()
        wait_for(lambda: not is_running(own), "the end of the worker")

    def assert_ends(self, process, status=0):
        self.assertEqual(process.wait(DEADLINE), status)

    @contextlib.contextmanager
    def locked(self):
        """Somebody else holds the write lock."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=DEADLINE,
                                                isolation_level=None)) as rival:
            rival.execute("BEGIN IMMEDIATE")
            yield
            rival.execute("ROLLBACK")

    def terminal(self, *argv, size=(24, 80), **environ):
        return self.on_terminal(self.command(*argv), size, environ)

    def on_terminal(self, argv, size, environ):
        terminal = OnTerminal(argv, self.dir, size, environ)
        self.addCleanup(terminal.close)
        return terminal


# Runs command lines and prints what each said.
SEVERAL = """
import contextlib, io, json, sys
sys.path.insert(0, sys.argv[1])
import queuectl
told = []
for line in json.loads(sys.argv[2]):
    out, err = io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = queuectl.main(line)
    told.append((code, out.buffer.getvalue().decode(), err.getvalue()))
print(json.dumps(told))
"""


class Picture:
    """What a terminal shows of what was written to it; it knows only what we use."""

    def __init__(self, width):
        self.lines, self._width, self._row, self._column = [""], width, 0, 0
        self._wraps, self._rest = True, ""

    def write(self, text):
        parts = re.split(r"(\x1b\[[?0-9;]*[a-zA-Z]|[\r\n])", self._rest + text)
        parts, self._rest = (parts[:-1], parts[-1]) if "\x1b" in parts[-1] else (parts, "")
        for part in parts:
            self._obey(part)

    def _obey(self, part):
        if part == "\r":
            self._column = 0
        elif part == "\n":
            self._go_down()
        elif part in ("\x1b[J", "\x1b[K"):
            if part == "\x1b[J":
                del self.lines[self._row + 1:]
            self.lines[self._row] = self.lines[self._row][:self._column]
        elif part in ("\x1b[?7l", "\x1b[?7h"):
            self._wraps = part.endswith("h")
        elif re.fullmatch(r"\x1b\[\d+A", part):
            self._row = max(0, self._row - int(part[2:-1]))
        elif not re.fullmatch(r"\x1b\[[0-9;]*m", part):
            for char in part:
                self._put(char)

    def _go_down(self):
        self._row += 1
        if self._row == len(self.lines):
            self.lines.append("")

    def _put(self, char):
        if self._column == self._width:
            if not self._wraps:
                return
            self._column = 0
            self._go_down()
        line = self.lines[self._row].ljust(self._column)
        self.lines[self._row] = line[:self._column] + char + line[self._column + 1:]
        self._column += 1


class OnTerminal:
    """A program on a terminal of its own: what it writes, and what is typed."""

    def __init__(self, argv, directory, size, environ):
        self.text, self.picture = "", Picture(size[1])
        self._main, side = pty.openpty()
        self.resize(*size)
        inherited = {name: value for name, value in os.environ.items()
                     if name not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            argv, cwd=directory, stdin=side, stdout=side, stderr=side,
            env={**inherited, "TERM": "xterm", **environ}, start_new_session=True,
            preexec_fn=functools.partial(fcntl.ioctl, side, termios.TIOCSCTTY, 0))
        os.close(side)

    def type(self, keys):
        os.write(self._main, keys)

    def resize(self, *size):
        fcntl.ioctl(self._main, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))

    def until(self, condition):
        """Read until the condition holds of the text."""
        wait_for(lambda: condition(self.text) or (self._read() and False), "the screen")

    def press(self, keys, expected):
        """Type; read until the answer holds the expected words."""
        self.text = ""
        self.type(keys.encode())
        self.until(lambda text: expected in text)

    def end(self):
        """Read to the end; the exit status."""
        wait_for(lambda: not self._read(DEADLINE), "the end")
        return self.process.wait(DEADLINE)

    def _read(self, seconds=0.05):
        """Read what is there; whether there may be more."""
        poller = select.poll()      # select() takes no number above 1023
        poller.register(self._main, select.POLLIN)
        if not poller.poll(seconds * 1000):
            return False
        try:
            piece = os.read(self._main, 65536).decode("utf-8", "replace")
        except OSError:     # EIO: no process has the other side open
            return False
        self.text += piece.replace("\r\n", "\n")
        self.picture.write(piece)
        return bool(piece)

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self._main)


# A job on a box of GPUs: a lock for each.
USES_GPUS = """
import fcntl, os, sys, time
seconds, *began = sys.argv[1:] or [0.05]
gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")
files = [open("gpu-" + gpu.replace("/", "-"), "w") for gpu in gpus]
for file in files:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
for name in began:
    open(name, "w").close()
time.sleep(float(seconds))
print(*gpus)
"""


class Program(Processes):
    """The program as its users meet it: other processes, real signals."""

    # Without pidfds a loss is noticed at the next one.
    heartbeat = "1h" if hasattr(os, "pidfd_open") else "100ms"

    def test_a_job_has_the_gpus_of_its_slots_alone(self):
        """Each job takes a lock for each of its GPUs, and fails if it is held."""
        write_bytes(self.path_of("use.py"), USES_GPUS.encode())
        use = f"{shlex.quote(sys.executable)} use.py"
        for slots in (1, 2, 1, 3, 1, 1, 2, 1, 1):
            self.enqueue(use, "--slots", str(slots), "--max-retries", "1",
                         "--env", "CUDA_VISIBLE_DEVICES=9")
        self.enqueue("true", "--slots", "4")
        self.script("nvidia-smi", 'echo "$*" > asked; printf "0\\n3\\n"')
        path = {**os.environ, "PATH": self.dir + os.pathsep + os.environ["PATH"]}
        some = self.worker("--gpus", "all", "--name", "two", env=path)
        self.listed_worker("--gpus", "GPU-a,MIG-b,2", "--name", "three")
        wait_for(lambda: self.job("job-9").state == COMPLETED, "the last that fits")

        self.assertEqual(self.cli("list", "--state", "dead")[1:], ("", "no such jobs\n"))
        self.assertEqual(self.read("asked"), "--query-gpu=index --format=csv,noheader\n")
        for name in ("two .* gpus 0,3  ", "three .* gpus GPU-a,MIG-b,2  "):
            self.assertRegex(self.cli("worker", "list")[1], name)
        self.assertIn("3 slots, GPUs GPU-a,MIG-b,2, all queues", self.read("worker.log"))
        self.assertRegex(self.cli("show", "job-4")[1], r"(?s)slots +3\n.*three  gpus GPU-a,MIG-b,2")
        [run] = json.loads(self.cli("show", "job-4", "--json")[1])["runs"]
        self.assertEqual((run["slots"], run["gpus"]), ("1,2,3", "GPU-a,MIG-b,2"))
        self.assertIn("needs 4 slots, the largest worker has 3", self.cli("show", "job-10")[1])
        code, _, err = self.call("worker", "start", "--gpus", "3")
        self.assertEqual((code, "worker two uses GPU 3 already" in err), (1, True), err)
        for answer, said in (("echo no driver; exit 9", "nvidia-smi: no driver"),
                             ("exec sleep 60", "no answer in 0.1s")):
            self.script("nvidia-smi", answer)
            with mock.patch.dict(os.environ, path), \
                    mock.patch.object(queuectl, "GPU_PATIENCE", 0.1), refused("unsupported", said):
                queuectl.gpu_names("all")
        with mock.patch.dict(os.environ, PATH="/nowhere"), \
                refused("unsupported", "nvidia-smi: No such file"):
            queuectl.gpu_names("all")
        some.terminate()
        self.assert_ends(some)

    def test_three_workers_run_each_job_once(self):
        """Quick jobs are claimed ahead; releasing them at the end charges nothing."""
        self.call("enqueue", "-", input=b"echo $QUEUECTL_JOB_ID >> ran\n" * 200
                  + b"sleep 0.3\n" * 4 + b"true\n" * 20)
        for worker in [self.worker("-c", slots, "--drain") for slots in "244"]:
            self.assert_ends(worker)
        self.assertCountEqual(self.read("ran").split(), [f"job-{n}" for n in range(1, 201)])
        self.assertNotIn("locked", self.read("worker.log"))
        self.assertEqual({(job.state, job.attempts, job.crashes) for job in self.queue.jobs()},
                         {(COMPLETED, 1, 0)})
        outcomes = collections.Counter(self.outcomes())
        self.assertEqual(outcomes.pop("completed"), 224)
        self.assertLessEqual(set(outcomes), {"released"})

    def test_no_process_of_a_job_outlives_its_time_out_its_retry_or_the_worker(self):
        self.configure(kill_grace="200ms")
        for job_id, command, *flags in (
                ("late", "trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ >> pids; "
                 "sleep 100; sleep 100' & sleep 100; sleep 100", "--timeout", "500ms"),
                ("killed", "setsid sleep 100 & echo $! >> pids; kill -9 $$"),
                ("background", "setsid sh -c 'echo $$ >> pids; trap \"echo TERM >> terms\" TERM; "
                 "while :; do sleep .05; done' > /dev/null 2>&1 & sleep .2")):
            self.enqueue(command, "--id", job_id, "--max-retries", "1", *flags)
        self.drain("-c", "3")
        self.assertEqual([(run.outcome, run.exit_code) for job in ("late", "killed", "background")
                          for run in self.runs(job)],
                         [("timeout", 124), ("failed", 137), ("completed", 0)])
        pids = self.read("pids").split()
        self.assertEqual((len(pids), [*filter(is_running, pids)]), (3, []))
        self.assertEqual(self.read("terms"), "TERM\n")

    def test_a_worker_that_fails_ends_with_the_error(self):
        self.enqueue("sleep 2", "--timeout", "50ms")
        code, _, err = self.done([sys.executable, "-c", f"""
import sys
sys.path.insert(0, {os.path.dirname(MODULE)!r})
import queuectl
queuectl.Runner._on_message = lambda self: 1 / 0
sys.exit(queuectl.main())""", "--db", self.path, "worker", "start", "--drain"])
        self.assertEqual((code, "ZeroDivisionError" in err), (1, True), err)

    def test_a_copy_of_a_queue_leaves_the_original_s_processes_alone(self):
        self.enqueue(f"touch began; {UNTIL_GO}", "--id", "x")
        original, copy = self.path, self.path_of("copy.db")
        shutil.copy(self.path, copy)
        self.worker()
        self.wait_file("began")
        self.path = copy
        self.configure(timeout="100ms")
        self.assertEqual(self.call("worker", "start", "--max-jobs", "1")[0], 0)
        self.path = original
        self.touch("go")
        self.wait_state("x", COMPLETED)

    def test_a_job_gets_no_descriptors_and_its_status_is_seen_whatever_the_worker_inherits(self):
        self.enqueue("readlink /proc/self/fd/* | grep -v pipe; exit 3", "--max-retries", "1")
        with open(self.path_of("mine"), "w") as mine:
            os.set_inheritable(mine.fileno(), True)
            self.call("worker", "start", "--drain", close_fds=False, preexec_fn=functools.partial(
                signal.signal, signal.SIGCHLD, signal.SIG_IGN))
        [run] = self.runs("job-1")
        self.assertEqual((run.exit_code, b"mine" in run.output), (3, False), run.output)

    # Workers that die, freeze or are told to stop.

    def test_a_lost_worker_is_noticed_at_once_its_tree_ended_and_charged_as_a_crash(self):
        """By a worker that was there before."""
        self.configure(heartbeat=self.heartbeat)
        self.at_work()
        self.enqueue("echo $$ >> pids; setsid sh -c 'echo $$ >> pids; sleep 100' & "
                     "[ -e second ] && exit 0; touch second; sleep 100")
        new = self.worker()
        wait_for(lambda: self.exists("second") and len(self.read("pids").split()) == 2, "the start")
        left = self.read("pids").split()
        self.kill_worker(new)
        self.wait_state("job-2", FAILED)
        self.touch("go")
        self.wait_state("job-2", COMPLETED)
        job = self.job("job-2")
        self.assertEqual((job.crashes, job.attempts), (1, 1))
        self.assertEqual([run.outcome for run in self.runs("job-2")], ["lost", "completed"])
        self.assertEqual([*filter(is_running, left)], [])

    def test_a_gpu_is_free_for_the_next_worker_once_a_lost_run_is_gone(self):
        self.configure(kill_grace="1s", crash_limit="1")
        write_bytes(self.path_of("use.py"), USES_GPUS.encode())
        use = f"{shlex.quote(sys.executable)} use.py"
        self.enqueue(f"trap '' TERM; {use} 60 began")
        worker = self.worker("--gpus", "0,1")
        self.wait_file("began")
        self.kill_both(worker)
        for _ in range(3):
            self.enqueue(use)
        self.drain("--gpus", "1,0")
        self.assertEqual(self.outcomes(), ["lost"] + ["completed"] * 3)
        gpus = [run.gpus for n in range(1, 5) for run in self.runs(f"job-{n}")]
        self.assertEqual(gpus[:2], ["0", "1"])

    def test_check_names_the_process_of_a_lost_run_that_can_be_cancelled(self):
        worker = self.at_work("sleep 100")
        self.assertTrue(json.loads(self.cli("check", "--json")[1])["sound"])
        self.kill_both(worker)
        [found] = wait_for(lambda: [
            one for one in json.loads(self.cli("check", "--json")[1])["findings"]
            if one["code"] == "lost-run"], "the loss")
        self.assertIn(self.read("pid").strip(), found["message"])
        self.assertEqual(self.cli("cancel", "job-1")[0], 0)
        self.assertEqual(self.job("job-1").state, CANCELLED)

    def test_a_frozen_worker_loses_its_jobs_and_changes_nothing_when_it_thaws(self):
        self.configure(lease="1s", heartbeat="200ms")
        self.enqueue("echo $$ >> runs; [ -e second ] && sleep 1 && exit 0; touch second; sleep 100")
        first = self.worker()
        self.wait_file("second")
        with self.locked():     # so that it does not freeze while it holds the lock
            first.send_signal(signal.SIGSTOP)   # and its supervisor, as by Ctrl+Z
            os.waitpid(first.pid, os.WUNTRACED)
            worker = child_of(first.pid)
            os.kill(worker, signal.SIGSTOP)
        self.worker()
        wait_for(lambda: len(self.read("runs").split()) == 2, "the second run")
        for pid in (worker, first.pid):
            os.kill(pid, signal.SIGCONT)
        self.wait_state("job-1", COMPLETED)
        self.assertEqual((self.outcomes(), self.job("job-1").crashes), (["lost", "completed"], 1))

    def test_the_first_signal_to_the_group_finishes_running_jobs_and_counts_once(self):
        """Ctrl+C reaches worker and supervisor; nothing else than SIGQUIT ends the job."""
        for name, outcome in (("SIGINT", "completed"), ("SIGTERM", "completed"),
                              ("SIGALRM", "completed"), ("SIGQUIT", "released")):
            with self.subTest(name):
                self.anew()
                self.forget("began", "go", "worker.log")
                worker = self.at_work(f"{UNTIL_GO}; echo done", start_new_session=True)
                self.enqueue("echo never")
                os.killpg(worker.pid, getattr(signal, name))
                self.wait_log(f"{name}: finishing 1 running" if outcome == "completed" else name)
                if outcome == "completed":
                    self.touch("go")
                self.assert_ends(worker)
                self.assertEqual(self.outcomes(), [outcome])
                self.assertEqual(self.job("job-2").state, PENDING)

    def test_jobs_are_cancelled_and_workers_stopped_from_another_terminal(self):
        self.enqueue("touch began2; sleep 100")
        worker = self.at_work("sleep 100", worker=("-c", "2", "--name", "one"))
        self.wait_file("began2")
        self.assertEqual(self.cli("cancel", "job-1")[0], 0)
        self.assertEqual(self.job("job-1").state, CANCELLED)
        code, _, err = self.cli("worker", "stop", "--timeout", "100ms")
        self.assertEqual((code, "still running jobs" in err), (1, True))
        stop = self.start("worker", "stop", "one", "--now")
        self.assert_ends(worker)
        self.assert_ends(stop)
        job = self.job("job-2")
        self.assertEqual((job.state, job.attempts, job.crashes), (PENDING, 0, 0))

    def test_who_follows_a_job_that_no_worker_takes_is_told_so_once(self):
        self.enqueue("echo hi", "--delay", "1s")
        self.listed_worker("--queue", "other")
        follower = self.running("logs", "-f", "job-1")
        said = b"job-1 waits: no worker takes queue `default`; `queuectl worker start " \
            b"--queue default` starts one\n"
        self.assertEqual(follower.stderr.readline(), said)
        self.worker()
        out, err = follower.communicate(timeout=DEADLINE)
        self.assertEqual((follower.returncode, out, err), (0, b"hi\n", b""))

    # Streams, directories, locales.

    def test_closed_streams_and_directories_give_no_traceback(self):
        self.enqueue("true")
        odd = os.fsencode(self.dir) + b"/\xff"
        os.mkdir(odd)
        ours, q = shlex.join(program()), shlex.join(self.command())
        gone = "mkdir -p gone; cd gone; rmdir ../gone; "
        for script, status, said in (
                (f"{q} enqueue true >&-", 0, ""), (f"{q} enqueue true 2>&-", 0, ""),
                (f"{q} enqueue - <&-", 1, ""), (f"{q} worker start --drain <&- >&- 2>&-", 0, ""),
                (f"PYTHONUNBUFFERED=1 {q} enqueue true 2>/dev/full", 0, ""),
                (f"PYTHONUNBUFFERED= {q} worker start --drain 2>/dev/full", 0, ""),
                (f'cd "$ODD"; {q} enqueue true', 1, ""),
                (f'cd "$ODD"; {ours} enqueue true --cwd /', 0, ""),
                (f"{gone}{ours} list", 1, ""), (f"{gone}{ours} systemd", 1, "directory is gone")):
            with self.subTest(script):
                code, _, err = self.done(["/bin/sh", "-c", script],
                                         env={**os.environb, b"ODD": odd})
                self.assertEqual((code, said in err), (status, True), err)
                self.assertNotIn("Traceback", err)

    def test_an_error_of_the_system_is_told_in_its_own_words(self):
        def broken(*_):
            raise PermissionError(13, "Permission denied", "/there")
        with mock.patch.object(queuectl, "database_path", broken):
            code, _, err = run_cli("systemd")
        self.assertEqual((code, err), (1, "queuectl: error: Permission denied: /there\n"))

    def test_text_is_utf_8_in_an_ascii_locale(self):
        env = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        self.done([os.fsencode(word) for word in self.command("enqueue", "echo 'ünï'")], env=env)
        self.call("worker", "start", "--drain", env=env)
        self.assertEqual(self.runs("job-1")[0].output.decode(), "ünï\n")
        words = [*program(), queuectl.COMPLETE, "--", "--db", self.path, "show", "job"]
        self.assertEqual(self.done(words, env=env)[1], "job-1\tcompleted: echo 'ünï'\n")

    def test_a_reader_that_leaves_ends_the_command_quietly(self):
        self.fill(5000)
        for line, wanted in (("list --json", r"\[\n"), ("events -f --json", '{"id": "job-1", .*\n')):
            with self.subTest(line):
                code, out, err = self.done(["/bin/sh", "-c", '"$@" | head -n 1', "sh",
                                            *self.command(*line.split())])
                self.assertEqual((code, err), (0, ""))
                self.assertRegex(out, f"^{wanted}$")

    # Waiting, hooks, schedules, retention: by a real worker.

    def test_a_retry_waits_for_its_jobs(self):
        for name in ("a", "b"):
            self.enqueue("exit 3", "--id", name, "--max-retries", "1")
        self.drain()
        self.listed_worker()
        self.assertEqual(self.call("retry", "a", "--wait")[::2], (
            3, "a pending again\na dead (exit status 3)\n"))
        code, out, _ = self.call("dlq", "retry", "--all", "--wait", "--json", "--command", "true")
        self.assertEqual((code, [job["state"] for job in json.loads(out)]), (0, ["completed"] * 2))

    # Commands that read and write as things happen.

    def test_who_follows_the_changes_sees_each_once(self):
        self.enqueue("exit 1", "--id", "before", "--max-retries", "1")
        follower = self.running("events", "--follow", "--json")
        seen = [json.loads(follower.stdout.readline())]
        workers = [self.worker("-c", "2", "--drain") for _ in range(2)]
        self.call("enqueue", "-", input=b"true\n" * 30)
        self.assertEqual(sorted(worker.wait(60) for worker in workers), [0, 1])     # `exit 1`
        self.drain()
        wanted = [queuectl.event_object(one) for one in self.queue.events_since()]
        seen += [json.loads(follower.stdout.readline()) for _ in wanted[1:]]
        follower.send_signal(signal.SIGINT)
        self.assertEqual(follower.communicate(timeout=DEADLINE), (b"", b""))
        self.assertEqual((follower.returncode, seen), (130, wanted))

    def test_logs_follow_one_job_as_it_prints_and_mark_the_lines_of_several(self):
        self.enqueue(f"printf 'one\\ntw'; {UNTIL_GO}; printf 'o\\nend'; touch gone", "--id", "a")
        self.enqueue("while [ ! -e gone ]; do sleep .05; done; echo b; [ -e again ] && "
                     "exit 0; touch again; exit 1", "--id", "b", "--backoff-base", "10ms")
        self.listed_worker("-c", "2")
        one, both = self.running("logs", "-f", "a"), self.running("logs", "-f", "b", "a")
        self.assertEqual((one.stdout.readline(), both.stdout.readline()), (b"one\n", b"a | one\n"))
        self.touch("go")
        self.assertEqual((one.stdout.read(), one.wait(DEADLINE)), (b"two\nend", 0))
        rest, err = both.communicate(timeout=DEADLINE)
        self.assertEqual((both.returncode, err), (0, b"-- run 1 of b: failed\n"))
        self.assertEqual(sorted(rest.splitlines()), [b"a | end", b"a | two", b"b | b", b"b | b"])
        self.assertEqual(self.cli("logs", "a", "b")[1], "a | one\na | two\na | end\nb | b\n")

    # On a terminal.

    def test_json_is_indented_for_people_and_one_line_for_programs(self):
        self.enqueue("true")
        self.terminal("show", "job-1", "--json").until(lambda text: '\n  "id": "job-1",' in text)
        for line in ("show job-1", "status", "stats", "check", "purge --dry-run"):
            self.assertEqual(self.cli(*line.split(), "--json")[1].count("\n"), 1, line)

    def test_a_watched_status_is_redrawn_in_place(self):
        self.enqueue("true")
        for size in ((24, 200), (24, 30), (2, 80)):
            with self.subTest(size):
                watch = self.terminal("status", "--watch", size=size)
                watch.until(lambda text: "1 pending" in text)
                job_id = self.enqueue("true")
                watch.until(lambda text: "2 pending" in text)
                watch.type(b"\x03")
                self.assertEqual((watch.end(), "Traceback" in watch.text), (130, False))
                shown = [line.split()[0] for line in watch.picture.lines if line[:1].islower()]
                self.assertEqual(shown[:3], ["jobs", "workers", "warning"][:size[0] - 1])
                self.assertNotIn("1 pending", "".join(watch.picture.lines))
                self.cli("delete", job_id)

    def test_a_watched_status_is_added_on_changes_where_it_cannot_draw(self):
        self.enqueue("true")
        self.configure(heartbeat="100ms")
        self.listed_worker("--queue", "other")
        as_json = self.running("status", "--watch", "0.1", "--json")
        plain = self.terminal("status", "--watch", "0.1", TERM="dumb")
        plain.until(lambda text: "database" in text)
        self.assertEqual(json.loads(as_json.stdout.readline())["jobs"]["pending"], 1)
        [worker] = self.queue.store.workers()
        wait_for(lambda: self.queue.store.workers()[0].heartbeats > worker.heartbeats + 5, "news")
        self.enqueue("true")
        plain.until(lambda text: text.count("database") == 2)
        self.assertRegex(plain.text, r"\A(\w.*\n| .*\n)+-- \d{4}-\S+ \S+\njobs      2 pending")
        self.assertNotIn("\x1b", plain.text)
        self.assertEqual(json.loads(as_json.stdout.readline())["jobs"]["pending"], 2)

    def test_a_watched_status_is_drawn_without_colour_and_in_a_new_size(self):
        self.enqueue("true")
        watch = self.terminal("status", "--watch", "0.1", NO_COLOR="1")
        watch.until(lambda text: text.count("database") == 2)
        self.assertEqual("".join(watch.picture.lines).count("database"), 1)
        self.assertNotRegex(watch.text, r"\x1b\[[0-9;]*m")
        watch.resize(24, 30)
        watch.until(lambda text: "\x1b[K          " in text)

    def test_waiting_draws_a_bar_on_a_terminal_and_removes_it(self):
        self.jobs("ab")
        wait, late = self.terminal("wait", "--all"), self.terminal("wait", "a", "--timeout", "1s")
        wait.until(lambda text: "] 0/2  0 running" in text)
        self.assertEqual(late.end(), 124)
        self.assertIn("] 0/1", late.text)
        for job_id in "ab":
            self.queue.cancel(job_id)
            if job_id == "a":
                wait.until(lambda text: "] 1/2  0 running  1 dead or cancelled" in text)
        self.assertEqual(wait.end(), 1)
        self.assertIn("2 dead or cancelled meanwhile", wait.text)
        self.assertNotIn("]", "".join(wait.picture.lines + late.picture.lines))

    def test_a_draining_worker_draws_its_bar_below_its_lines(self):
        self.enqueue(UNTIL_GO, "--id", "a")
        self.enqueue("true", "--after", "a")
        drain = self.terminal("worker", "start", "--drain", size=(24, 200))
        bar = "] 0/1  1 running  1 not due\r"
        # Without any other line, it is drawn once a second.
        drain.until(lambda text: text.rpartition("started: ")[2].count(bar) == 3)
        self.assertRegex(drain.picture.lines[-1], r"^\[\.{40}\] 0/1 ")
        self.touch("go")
        self.assertEqual(drain.end(), 0)
        *lines, last = drain.picture.lines
        self.assertEqual(last, "")      # where the shell goes on
        for line in lines:
            self.assertRegex(line, r"^\d\d:\d\d:\d\d[+-]\d\d:\d\d ")
            self.assertNotRegex(line, r"\[[#.]+\]")

    def assert_suspended(self, shown, *pids):
        """Ctrl+Z stops the last of these, and removes the bar."""
        shown.until(lambda text: "] 0/1" in text)
        shown.type(b"\x1a")
        wait_for(lambda: queuectl._stat_fields(pids[-1])[0] == b"T", "the stop")
        while shown._read():
            pass
        self.assertNotRegex("".join(shown.picture.lines), r"\[[#.]+\]")
        shown.text = ""
        kill(*pids, number=signal.SIGCONT)

    def test_a_suspended_program_leaves_no_bar(self):
        self.enqueue(UNTIL_GO, "--id", "a")
        wait = self.terminal("wait", "a")
        drain = self.terminal("worker", "start", "--drain")
        drain.until(lambda text: "] 0/1" in text)
        for _ in range(2):
            self.assert_suspended(wait, wait.process.pid)
            self.assert_suspended(drain, drain.process.pid, child_of(drain.process.pid))
        self.touch("go")

    def test_a_bar_fits_the_window_of_stderr_and_gives_way_to_other_lines(self):
        self.enqueue("true", "--id", "a")
        wait = self.terminal("wait", "a", size=(24, 20), COLUMNS="200")
        wait.until(lambda text: "0/1  0 running\r" in text)
        log = self.terminal("worker", "start", "--max-jobs", "1")
        self.assertEqual(log.end(), 0)
        self.assertNotIn(False, [line.endswith("\x1b[K") for line in log.text.splitlines()
                                 if " worker " in line])

    def test_a_background_job_draws_no_bar(self):
        self.enqueue("true", "--id", "a")
        line = shlex.join(self.command("wait", "a", "--timeout", "300ms"))
        for shell, drawn in ((f"{line}; true", True), (f"{line} & wait $!", False)):
            with self.subTest(drawn=drawn):
                shown = self.on_terminal(["sh", "-mc", shell], (24, 80), {})
                shown.end()
                self.assertEqual("] 0/1" in shown.text, drawn)
                self.assertIn("not over yet", shown.text)

    def test_no_bar_is_drawn_where_it_is_not_seen_or_not_wanted(self):
        self.enqueue("true", "--id", "a")
        for words, environ in ((("--all",), {"TERM": "dumb"}), (("a", "-q"), {})):
            wait = self.terminal("wait", *words, "--timeout", "200ms", **environ)
            self.assertEqual(wait.end(), 124)
            self.assertNotRegex(wait.text, r"0/1|\x1b")
        code, out, err = self.call("wait", "--all", "--timeout", "200ms")
        self.assertEqual((code, out), (124, ""))
        self.assertNotRegex(err + self.drain(), r"0/1|\x1b|\r")


# A process tree that no mark identifies: it has left its session, closed what it inherited
# and cleared its environment, and its parent is gone.
ESCAPING = """
import os, sys, time
for _ in range(2):
    if os.fork():
        os._exit(0) if _ else time.sleep(1000)
    os.setsid()
with open(sys.argv[1], "a") as file:
    file.write(f"{os.getpid()}\\n")
os.closerange(0, 256)
os.execve(sys.executable, ["escaped", "-c", "import time; time.sleep(1000)"], {})
"""


@unittest.skipUnless(sys.platform == "linux", "needs the subreapers of Linux")
class Supervised(Processes):
    """No process that a worker has started outlives it, whichever process is killed."""

    TREES = 5

    def escaped(self):
        """A worker, and the ids of processes of its jobs that have escaped."""
        write_bytes(self.path_of("escape.py"), ESCAPING.encode())
        self.configure(lease="1s", heartbeat="100ms")
        self.fill(self.TREES, command=f"{shlex.quote(sys.executable)} escape.py pids")
        worker = self.worker("-c", str(self.TREES))
        wait_for(lambda: self.exists("pids") and len(self.read("pids").split()) == self.TREES,
                 "the trees")
        return worker, self.read("pids").split()

    def test_a_worker_that_is_killed_or_does_not_answer_leaves_nothing(self):
        for number, said in (
                (signal.SIGKILL, "error: the worker was killed by SIGKILL: its jobs were killed"),
                (signal.SIGSTOP, "the worker did not respond for 1s")):
            with self.subTest(number):
                self.anew()
                self.forget("pids")
                worker, pids = self.escaped()
                os.kill(child_of(worker.pid), number)
                self.assert_ends(worker, 1)
                self.assertEqual([*filter(is_running, pids)], [])
                self.assertIn(said, self.read("worker.log"))

    def test_a_worker_without_its_supervisor_ends_and_requeues_all(self):
        worker, pids = self.escaped()
        pids.append(child_of(worker.pid))
        worker.kill()
        wait_for(lambda: not any(map(is_running, pids)), "the end of all")
        self.assertEqual(self.outcomes(), ["released"] * self.TREES)
        self.assertIn("this worker's supervisor was killed", self.read("worker.log"))

    def test_a_stopped_worker_resumes_its_work(self):
        """As by Ctrl+Z and fg: its supervisor was stopped, too, and no other took over."""
        self.configure(lease="1s", heartbeat="100ms")
        worker = self.at_work(worker=("--drain",))
        pids = [child_of(worker.pid), worker.pid]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for pid in pids:
                os.kill(pid, number)
            time.sleep(1.5 * (number == signal.SIGSTOP))    # longer than the lease
        self.touch("go")
        self.assert_ends(worker)
        self.assertEqual(self.outcomes(), ["completed"])

    def detached(self, *flags, **options):
        """(exit status, stdout, stderr), once nobody holds these streams."""
        self.addCleanup(self.cli, "worker", "stop", "--now")
        return self.call("worker", "start", "--detach", *flags, **options)

    def test_a_detached_worker_holds_nothing_of_its_caller(self):
        reader, writer = os.pipe()
        self.addCleanup(os.close, reader)
        code, out, err = self.detached("--name", "w", pass_fds=(writer,))
        os.close(writer)
        log = f"{self.path}.log"
        self.assertEqual((code, out), (0, f"worker w started; log: {log}\n"))
        self.assertEqual(err, f"made a new queue at {self.path}\n")
        self.assertEqual(os.read(reader, 1), b"")       # the end: it is closed there
        pid, = [worker.pid for worker in self.queue.store.workers()]
        self.assertEqual(os.getsid(pid), pid)
        self.assertEqual(os.stat(log).st_mode & 0o777, 0o600)
        self.cli("worker", "stop")
        self.assertEqual(self.detached("--name", "w", "--drain", "--count", "2")[0], 0)
        wait_for(lambda: self.read("queue.db.log").count("worker w stopped") == 2, "its end")
        self.assertRegex(self.read("queue.db.log"), r"^20\d\d-\d\d-\d\d \S+ worker w started")

    def test_a_detached_worker_may_have_a_caller_without_streams(self):
        self.enqueue("true")
        self.addCleanup(self.cli, "worker", "stop", "--now")
        for closed in ("2>&-", ">&-", "<&- >&- 2>&-"):
            with self.subTest(closed):
                words = shlex.join(self.command("worker", "start", "--detach", "--drain"))
                self.assertEqual(self.done(["sh", "-c", f"{words} {closed}"])[0], 0)
                wait_for(lambda: " stopped" in self.read("queue.db.log"), "its end")
                self.forget("queue.db.log")
        self.assertEqual(self.job("job-1").state, COMPLETED)

    def test_a_detached_worker_that_cannot_start_is_reported_by_its_caller(self):
        self.assertEqual(self.detached("--name", "w")[0], 0)
        os.mkfifo(self.path_of("unread"))
        before = self.read("queue.db.log")
        for flags, said in (
                (("--name", "w"), "error: a worker named 'w' is running already"),
                (("--log", "none/log"), "none/log (No such file or directory); give another --log"),
                (("--log", "unread"), "/unread (No such device or address); give another"),
                (("--db", "none/q.db", "--log", "log"), "error: cannot make ")):
            with self.subTest(flags):
                code, out, err = self.detached(*flags)
                self.assertEqual((code, out), (1, ""))
                self.assertIn(said, err)
        self.assertEqual(self.read("queue.db.log"), before)

    def test_a_detached_worker_that_is_killed_before_it_is_ready_is_reported(self):
        self.enqueue("true")
        with self.locked():
            caller = self.running("worker", "start", "--detach")
            supervisor = wait_for(lambda: child_of(caller.pid), "the supervisor")
            kill(wait_for(lambda: child_of(int(supervisor)), "the worker"))
            self.assert_ends(caller, 1)
        self.assertIn(b"the worker died before it was ready; see ", caller.stderr.read())
        self.assertIn("killed by SIGKILL", self.read("queue.db.log"))

    def test_a_detached_worker_whose_caller_is_killed_does_not_start(self):
        self.enqueue("true")
        with self.locked():
            caller = self.running("worker", "start", "--detach")
            supervisor = wait_for(lambda: child_of(caller.pid), "the supervisor")
            wait_for(lambda: child_of(int(supervisor)), "the worker")
            caller.kill()
            caller.wait()
        wait_for(lambda: not is_running(supervisor), "the end of the worker")
        self.assertEqual((self.state("job-1"), self.queue.workers()), (PENDING, []))

    def test_a_program_starts_a_detached_worker(self):
        self.addCleanup(self.cli, "worker", "stop", "--now")
        self.assertIn("worker w started", queuectl.start_worker(self.path, "--name", "w"))
        with self.assertRaisesRegex(queuectl.Unavailable, "no worker .*: a worker named 'w'"):
            queuectl.start_worker(self.path, "--name", "w")

    def test_a_worker_in_the_foreground_logs_to_a_file(self):
        write_bytes(self.path_of("log"), b"before\n")
        self.assertEqual(self.call("worker", "start", "--drain", "--log", "log"),
                         (0, "", f"made a new queue at {self.path}\n"))
        self.assertRegex(self.read("log"), r"^before\n20\d\d-.* started: .*\n.* stopped\n$")

    def test_orphans_are_reaped(self):
        self.configure(heartbeat="100ms")
        self.enqueue("(sleep .2 &) ; true")
        worker = self.worker()
        self.wait_state("job-1", COMPLETED)
        own = child_of(worker.pid)
        wait_for(lambda: not self.done(["ps", "--ppid", str(own), "-o", "stat="])[1], "its end")

    def test_a_terminal_that_closes_is_one_request_however_often_it_is_told(self):
        """The kernel and the shell each send SIGHUP."""
        worker = self.at_work()
        worker.send_signal(signal.SIGHUP)
        self.wait_log("SIGHUP: finishing 1 running job, claiming no more; SIGTERM requeues them")
        worker.send_signal(signal.SIGHUP)
        worker.send_signal(signal.SIGUSR1)      # received after the second SIGHUP
        self.wait_log("SIGUSR1: killing")
        self.assertNotIn("SIGHUP: killing", self.read("worker.log"))
        self.assert_ends(worker)

    def test_a_start_that_waits_for_the_file_can_be_interrupted(self):
        self.enqueue("true")
        with self.locked():
            worker = self.worker()
            wait_for(lambda: child_of(worker.pid), "the worker")
            worker.send_signal(signal.SIGINT)
            self.assertEqual(worker.wait(5), 130)

    def test_children_that_were_there_before_are_left_alone(self):
        """`sleep 100 & exec queuectl worker start`, or a log reader `2> >(logger)`."""
        self.enqueue("true")
        words = shlex.join(self.command("worker", "start", "--drain"))
        self.assertEqual(self.done(
            ["sh", "-c", f"sleep 1000 >&- 2>&- & echo $! > pid; exec {words}"])[0], 0)
        self.assertTrue(is_running(self.read("pid")))
        kill(int(self.read("pid")))

    def test_a_worker_has_stopped_when_all_of_its_processes_have(self):
        self.configure(kill_grace="300ms")
        self.enqueue("(trap '' TERM; sleep 1000) > /dev/null 2>&1 & echo $! > pid")
        worker = self.worker()
        self.wait_state("job-1", COMPLETED)
        self.assertEqual(self.cli("worker", "stop")[0], 0)
        self.assertFalse(is_running(self.read("pid")))
        worker.wait(DEADLINE)

    def test_many_trees_that_end_do_not_make_the_worker_late(self):
        self.configure(lease="1s", heartbeat="100ms", kill_grace="300ms")
        self.fill(60, command="trap '' TERM; while :; do sleep .1; done")
        worker = self.worker("-c", "60")
        wait_for(lambda: self.queue.counts()[PROCESSING] == 60, "the start")
        self.assertEqual(self.cli("worker", "stop", "--now")[0], 0)
        self.assertEqual(self.queue.counts()[PENDING], 60)
        self.assert_ends(worker)
        self.assertNotIn("did not respond", self.read("worker.log"))

    @unittest.skipUnless(hasattr(resource, "prlimit"), "no prlimit(2) here")
    def test_processes_end_also_when_descriptors_run_out(self):
        worker = self.at_work("setsid sleep 1000", "--timeout", "500ms")
        own, pid = child_of(worker.pid), self.read("pid")
        for one in (worker.pid, own):
            resource.prlimit(one, resource.RLIMIT_NOFILE, (3, 1000))
        time.sleep(1)       # longer than the time-out
        self.assertIsNone(worker.poll())
        kill(own)
        time.sleep(0.3)
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (1000, 1000))
        self.assert_ends(worker, 1)
        self.assertFalse(is_running(pid))

    @NEEDS_LOCKS
    def test_a_worker_whose_lock_file_or_log_is_deleted_stops(self):
        self.configure(heartbeat="100ms")
        for name in ("queue.db-lock", "queue.db-wal"):
            with self.subTest(name):
                worker = self.at_work("exec sleep 1000")
                os.remove(self.path_of(name))
                self.assert_ends(worker, 1)
                self.assertIn("deleted", self.read("worker.log").splitlines()[-1])
                self.assertFalse(is_running(self.read("pid")))
                self.forget("began")

    def test_a_job_may_drain_the_queue_that_it_is_in_under_a_lease_of_any_length(self):
        self.configure(lease="60d")
        self.enqueue(shlex.join(self.command("worker", "start", "--drain")))
        self.drain()

    def test_a_system_that_allows_no_more_threads_or_processes_is_named(self):
        for error in (RuntimeError("can't start new thread"),
                      BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")):
            with contextlib.redirect_stderr(io.StringIO()) as said:
                self.assertEqual(queuectl._told(mock.Mock(side_effect=error)), 1)
            self.assertIn("ulimit -a", said.getvalue())
        with self.assertRaises(RuntimeError):
            queuectl._told(mock.Mock(side_effect=RuntimeError("ours")))


HOST = b"Host: localhost\r\n"
BEARER = HOST + b"Authorization: Bearer " + TOKEN.encode() + b"\r\n"
POST = b"POST /api/jobs HTTP/1.1\r\nContent-Type: application/json\r\n" + BEARER
BUSY = POST + b"Content-Length: 99\r\n\r\n{"     # authenticated, but the body does not come


class WebServer(Processes):
    """`web` as a process: sockets, time and malice."""

    def connect(self, port, tls=None):
        sock = socket.create_connection(("127.0.0.1", port), timeout=10)
        self.addCleanup(sock.close)
        return sock if tls is None else tls.wrap_socket(sock, server_hostname="localhost")

    def client(self, port, tls=None):
        kind = http.client.HTTPConnection if tls is None else functools.partial(
            http.client.HTTPSConnection, context=tls)
        client = kind("localhost", port, timeout=10)
        self.addCleanup(client.close)
        return client

    def request(self, port, method, path, body=None, tls=None, **headers):
        """(status, headers, body), by the HTTP of the standard library."""
        with contextlib.closing(self.client(port, tls)) as client:
            client.request(method, path, None if body is None else json.dumps(body), {
                "Authorization": f"Bearer {TOKEN}", "Content-Type": JSON, **headers})
            reply = client.getresponse()
            return reply.status, reply.headers, reply.read()

    def status(self, *request, **options):
        return self.request(*request, **options)[0]

    def send(self, port, said):
        """Send raw bytes; the server may drop the connection to make room."""
        with contextlib.suppress(OSError):
            self.connect(port).sendall(said)

    def read_all(self, port, said):
        """All that raw bytes are answered with, until the server closes."""
        sock, reply = self.connect(port), b""
        with contextlib.suppress(OSError):      # it may close before all is sent
            sock.sendall(said)
            sock.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionError):
            while piece := sock.recv(65536):
                reply += piece
        return reply

    def say(self, port, said):
        """The status that raw bytes are answered with; 0: closed without a reply."""
        reply = self.read_all(port, said)
        if reply.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")):
            head, _, body = reply.partition(b"\r\n\r\n")
            size = int(re.search(rb"Content-Length: (\d+)", head)[1])
            self.assertIn("error", json.loads(body[:size]))
        return int(reply.split()[1]) if reply else 0

    def events(self, port, last=None):
        """An open stream; its lines come from the iterator."""
        client = self.client(port)
        client.request("GET", "/api/events", headers={
            "Authorization": f"Bearer {TOKEN}",
            **({} if last is None else {"Last-Event-ID": str(last)})})
        reply = client.getresponse()
        self.addCleanup(reply.close)
        return reply

    def until(self, stream, text):
        """The lines of a stream up to one that holds the text."""
        seen = []
        for line in stream:
            seen.append(line.decode())
            if text in seen[-1]:
                return "".join(seen)
        raise AssertionError(f"no {text} in {''.join(seen)}")

    def assert_answers(self, port, times=10, seconds=3):
        """An authenticated client is answered soon."""
        began = time.monotonic()
        for _ in range(times):
            self.assertEqual(self.status(port, "GET", "/api/status"), 200)
        self.assertLess(time.monotonic() - began, seconds)

    def test_a_browser_logs_in_by_the_printed_url(self):
        _, port = self.web(QUEUECTL_READ_TOKEN=READ_TOKEN)
        self.assertEqual(self.url, f"http://127.0.0.1:{port}/?token={TOKEN}")
        for method, path, authorization, status in (
                ("GET", "/api/jobs", f"Bearer {READ_TOKEN}", 200),
                ("POST", "/api/pause", f"Bearer {READ_TOKEN}", 403), ("GET", "/api/jobs", "", 401)):
            self.assertEqual(self.status(
                port, method, path, {} if method == "POST" else None,
                Authorization=authorization), status)
        client = self.client(port)
        client.request("GET", f"/?token={TOKEN}")
        reply = client.getresponse()
        reply.read()
        self.assertTrue(reply.headers["Date"].endswith(" GMT"))
        for header, text in (*queuectl.HEADERS, ("Location", "/"), (
                "Content-Security-Policy", queuectl.page_policy(queuectl.PAGE))):
            self.assertEqual(reply.headers[header], text)
        cookie = reply.headers["Set-Cookie"].split(";")[0]
        self.assertEqual((reply.status, cookie.startswith("queuectl_")), (303, True))
        for method in ("HEAD", "GET"):      # over the same connection
            client.request(method, "/", headers={"Cookie": cookie})
            reply = client.getresponse()
            self.assertEqual((reply.status, reply.read().decode()),
                             (200, queuectl.PAGE if method == "GET" else ""))
            self.assertEqual(int(reply.headers["Content-Length"]), len(queuectl.PAGE.encode()))

    def test_raw_attacks(self):
        _, port = self.web()
        self.status(port, "POST", "/api/jobs", {"command": "x", "id": "one"})
        get, end = b"GET /api/status HTTP/1.1\r\n" + BEARER, BEARER + b"\r\n"
        line, length = b"GET /api/status HTTP/1.1\r\n", b"Content-Length: "
        for status, *attacks in (
                (0, b"", b"GET /healthz HTTP/1.1\r\n" + HOST),
                (200, b"GET /healthz HTTP/1.0\r\n" + end, b"GET /healthz HTTP/1.0\r\n\r\n",
                 get + b"X: \xe9\t\r\n\r\n"),
                # What is no HTTP/1.1 request
                (400, b"\x16\x03\x01\x00\xff\r\n\r\n", b"GET\r\n\r\n", b"GET / a HTTP/1.1\r\n\r\n",
                 b"GET /\r\n\r\n", b"GET / HTTP/2.0\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n",
                 b"GET\t/\xa0\x85 HTTP/1.1\r\n" + end, b"GET /\0 HTTP/1.1\r\n" + end,
                 b"CONNECT evil:80 HTTP/1.1\r\n" + end),
                # Header lines that others may read in another way: RFC 9112, section 5
                (400, b"GET / HTTP/1.1\r\nHost: evil\r\n" + end,
                 get + b"X: a\r\n Origin: b\r\n\r\n", get + b"X: a\r" + length + b"15\r\n\r\n", get + b"X: a\0b\r\n\r\n",
                 get.replace(b"\r\n", b"\n") + b"\n", get + b"X: a\nY: b\r\n\r\n",
                 get + b"Content-Length : 1\r\n\r\n{", get + b": x\r\n\r\n",
                 get + b"what\r\nOrigin: null\r\n\r\n"),
                (431, b"GET /" + b"a" * 200_000, get + b"X: " + b"a" * 200_000,
                 get + b"X: a\r\n" * 1000 + b"\r\n", get + b"X: aaaaaaaaaaaaaaaaaaaaaa\r\n" * 9000),
                # Bodies of another length than they say
                (400, POST + length + b"2\xa0\r\n\r\n{}", POST + length + b"9" * 400 + b"\r\n\r\n",
                 POST + length + b"-1\r\n\r\n{}", POST + (length + b"2\r\n") * 2 + b"\r\n{}1",
                 POST + length + b'99\r\n\r\n{"command":"x"}', POST + b'\r\n{"command":"x"}'),
                (411, POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
                 POST + b"Transfer-Encoding: x\r\n" + length + b"2\r\n\r\n{}"),
                # A body where none is taken is refused unread, else it could fill memory.
                (413, POST + length + b"99999999\r\n\r\n" + b"[" * 99999, *(
                    b"GET /%s HTTP/1.1\r\n" % path + HOST + length + b"9999999\r\n\r\n"
                    for path in (b"metrics", b"healthz"))),
                (401, line.replace(b"1.1", b"1.0") + b"\r\n", line + HOST + b"\r\n",
                 b"GET /api/pause HTTP/1.1\r\n" + HOST + length + b"9999999\r\n\r\n",
                 b"POST /api/jobs HTTP/1.1\r\n" + HOST + length + b"9999999\r\n\r\n"
                 + b"x" * 99999),
                (403, line + b"Host: evil.example\r\n\r\n", b"POST /api/jobs HTTP/1.1\r\n" + HOST
                 + b"Content-Type: text/plain\r\nOrigin: null\r\n" + length + b"2\r\n\r\n{}")):
            for said in attacks:
                with self.subTest(said[:200]):
                    self.assertEqual(self.say(port, said), status)
        self.assert_answers(port, 1)
        self.assertEqual(ids(self.queue.jobs()), ["one"])
        log = self.read("web.log")
        self.assertNotIn("internal", log)
        self.assertIn("web: POST /api/jobs by bearer from 127.0.0.1: 201 one pending\n", log)

    def test_how_long_a_connection_lasts(self):
        _, port = self.web()
        health, end = b" /healthz HTTP/1.1\r\n", BEARER + b"\r\n"
        for first, count in (
                (b"GET" + health, 2), (b"GET /nothing HTTP/1.1\r\n", 2),
                (b"GET /healthz HTTP/1.0\r\n", 1), (b"GET" + health + b"Connection: close\r\n", 1),
                (b"GET" + health + b"Connection: Close, TE\r\n", 1),
                (b"GET /metrics HTTP/1.1\r\nContent-Length: 9\r\n", 1)):
            with self.subTest(first):
                said = self.read_all(port, first + end + b"GET" + health + end)
                self.assertEqual(said.count(b"HTTP/1.1 "), count)
        for first in (b"HEAD" + health, b"HEAD /nothing HTTP/1.1\r\n"):
            self.assertTrue(self.read_all(port, first + end).endswith(b"\r\n\r\n"))
        body = b'Expect: 100-continue\r\nContent-Length: 15\r\n\r\n{"command":"x"}'
        self.assertRegex(self.read_all(port, POST + body),
                         rb"^HTTP/1\.1 100 Continue\r\n\r\nHTTP/1\.1 201 ")
        # Not to an old client: RFC 9110, section 10.1.1.
        self.assertRegex(self.read_all(port, POST.replace(b"/1.1", b"/1.0") + body),
                         rb"^HTTP/1\.1 201 ")

    def test_a_bug_of_the_handler_is_logged(self):
        log = []
        service = queuectl.Service(None, self.path, log.append)     # no site to check
        args = argparse.Namespace(tls_cert=None, tls_key=None, host="127.0.0.1", port=0)
        with queuectl.listen(service, args, socket.AF_INET, ("127.0.0.1", 0)) as listener:
            self.connect(listener.server_address[1]).sendall(
                b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")
            listener.handle_request()
            wait_for(lambda: log, "a line of the log")
        self.assertRegex(log[0], "(?s)web: internal error.*AttributeError")

    def test_a_client_without_a_thread_is_told_that_there_are_too_many(self):
        service = queuectl.Service(None, self.path, self.fail)
        args = argparse.Namespace(tls_cert=None, tls_key=None, host="127.0.0.1", port=0)
        with queuectl.listen(service, args, socket.AF_INET, ("127.0.0.1", 0)) as listener:
            client = self.connect(listener.server_address[1])
            with mock.patch("threading.Thread.start", side_effect=RuntimeError):
                listener.handle_request()
            with client.makefile("rb") as reply:
                self.assertTrue(reply.read().endswith(b'"too many connections"}'))

    def test_slow_idle_and_unauthenticated_clients_delay_no_client_with_a_token(self):
        _, port = self.web()
        for number in range(200):
            self.send(port, (b"G", b"GET / HTTP/1.1\r\nHost: loc", b"POST /api/jobs HTTP/1.1\r\n"
                             + HOST + b"Content-Length: 9\r\n\r\n")[number % 3] * (number >= 100))
        for _ in range(20):
            self.connect(port).sendall(BUSY)
        self.assert_answers(port)
        self.assertEqual(self.status(port, "POST", "/api/jobs", {"command": "x"}), 201)
        with futures.ThreadPoolExecutor(60) as threads:
            crowd = [threads.submit(self.status, port, "GET", "/metrics", Authorization="Basic x")
                     for _ in range(120)]
            self.assert_answers(port, 1)
            self.assertEqual({one.result() for one in crowd}, {200})
        for _ in range(3 * queuectl.MAX_CONNECTIONS):
            self.send(port, b"GET /metrics HTTP/1.1\r\n" + HOST + b"\r\n")
        self.assert_answers(port)
        self.assertEqual(self.status(port, "GET", "/metrics", Authorization=""), 200)

    def test_more_than_all_threads_busy_is_503(self):
        _, port = self.web()
        for _ in range(queuectl.MAX_CONNECTIONS):
            self.connect(port).sendall(BUSY)

        def is_refused():   # unless one was dropped before it was busy
            return self.say(port, b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n") == 503 \
                or self.send(port, BUSY)
        wait_for(is_refused, "a refusal")

    @unittest.skipUnless(sys.platform == "linux", "/proc is Linux's")
    def test_an_idle_server_never_wakes_up(self):
        process, port = self.web()
        self.assertEqual(self.status(port, "GET", "/api/status"), 200)
        task = f"/proc/{process.pid}/task"

        def wake_ups():
            return [re.search(r"voluntary_ctxt_switches:\s+(\d+)", self.read(
                f"{task}/{one}/status"))[1] for one in os.listdir(task)]
        # The main thread, and the one of the log.
        wait_for(lambda: len(os.listdir(task)) <= 2, "the end of the connection's thread")
        before = wake_ups()
        time.sleep(0.5)
        self.assertEqual(wake_ups(), before)

    def test_events_come_live_and_missed_ones_on_reconnection(self):
        _, port = self.web()
        stream = self.events(port)
        self.assertEqual(stream.headers["Content-Type"], "text/event-stream")
        self.until(stream, '"total": 0')
        self.status(port, "POST", "/api/jobs", {"command": "echo hi", "id": "one"})
        self.assertIn("id: 1\nevent: change\n", self.until(stream, '"to": "pending"'))
        self.drain()
        self.assertIn("id: 2\n", self.until(stream, '"to": "completed"'))
        again = self.until(self.events(port, 1), "event: status")
        self.assertRegex(again, r"(?s)^retry: \d+\n\nid: 2\nevent: change\n.*id: 3\n.*"
                         r"id: 3\nevent: status")
        self.assertIn("resync", self.until(self.events(port, 99), "event: status"))

    def test_streams_are_limited_and_their_ends_are_noticed(self):
        _, port = self.web()
        streams = [self.events(port) for _ in range(queuectl.MAX_STREAMS)]
        self.assertEqual({stream.status for stream in streams}, {200})
        refused = self.events(port)
        self.assertEqual((refused.status, "Retry-After" in refused.headers), (503, True))
        for stream in streams:
            stream.close()
        wait_for(lambda: self.events(port).status == 200, "the end of a stream")

    def test_it_stops_at_once_with_streams_open(self):
        self.a_queue().close()
        for number in (signal.SIGTERM, signal.SIGINT):
            process, port = self.web()
            stream, idle = self.events(port), self.connect(port)
            self.until(stream, "event: status")
            began = time.monotonic()
            process.send_signal(number)
            self.assert_ends(process)
            self.assertLess(time.monotonic() - began, 1.5)
            self.assertNotIn(b"Traceback", stream.read())
            with contextlib.suppress(ConnectionResetError):     # it was not yet accepted
                self.assertEqual(idle.recv(1), b"")
        self.assertEqual(self.read("web.log"), "")

    def test_reads_go_on_while_another_holds_the_write_lock(self):
        _, port = self.web()
        self.enqueue("x", "--id", "one")
        with futures.ThreadPoolExecutor(1) as executor:
            with self.locked():
                change = executor.submit(self.status, port, "POST", "/api/jobs/one/cancel")
                began = time.monotonic()
                for target in ("/api/status", "/api/jobs", "/api/jobs/one", "/metrics", "/healthz"):
                    self.assertEqual(self.status(port, "GET", target), 200)
                self.assertLess(time.monotonic() - began, 2)
                self.assertFalse(change.done())
            self.assertEqual(change.result(), 200)

    def test_a_database_that_goes_away_and_comes_back(self):
        _, port = self.web()
        self.assertEqual(self.status(port, "GET", "/healthz"), 200)
        for end in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.rename(self.path + end, self.path_of("away" + end))
        for target in ("/healthz", "/metrics", "/api/status", "/api/events"):
            self.assertEqual(self.status(port, "GET", target), 503)
        self.enqueue("x")
        self.assertEqual(self.status(port, "GET", "/healthz"), 200)

    @unittest.skipUnless(shutil.which("openssl"), "no certificate can be made without openssl")
    def test_tls(self):
        cert, key = self.path_of("cert.pem"), self.path_of("key.pem")
        self.assertEqual(self.done(
            ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
             "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", cert,
             "-keyout", key])[0], 0)
        process, port = self.web("--tls-cert", cert, "--tls-key", key)
        self.assertTrue(self.url.startswith("https://"))
        for _ in range(20):     # these never shake hands
            self.connect(port)
        options = {"tls": ssl.create_default_context(cafile=cert),
                   "Origin": f"https://localhost:{port}"}
        status, headers, _ = self.request(port, "GET", f"/?token={TOKEN}", tls=options["tls"])
        self.assertEqual((status, "; Secure" in headers["Set-Cookie"]), (303, True))
        self.assertEqual(self.status(port, "POST", "/api/jobs", {"command": "x"}, **options), 201)
        self.assertEqual(self.say(port, b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), 0)
        stream = self.connect(port, options["tls"])
        self.addCleanup(stream.close)
        stream.sendall(b"GET /api/events HTTP/1.1\r\n" + BEARER + b"\r\n")
        with stream.makefile("rb") as lines:
            self.until(lines, '"total": 1')
            stream.sendall(b"more\r\n")     # which ends no stream
            self.status(port, "POST", "/api/jobs", {"command": "x"}, **options)
            self.until(lines, '"total": 2')
            process.send_signal(signal.SIGTERM)
            self.assert_ends(process)

    def test_twenty_scrapes_at_once_under_load_are_each_consistent(self):
        _, port = self.web()
        self.fill(200)
        worker, queue, rounds = self.worker("-c", "4", "--drain"), ("queue", "default"), 0
        with futures.ThreadPoolExecutor(20) as threads:
            while worker.poll() is None or not rounds:
                rounds += 1
                for _, _, text in threads.map(
                        lambda _: self.request(port, "GET", "/metrics"), range(20)):
                    kinds, samples = parse_metrics(text.decode())
                    check_histograms(self, kinds, samples)
                    jobs = {dict(labels)["state"]: n for (name, labels), n in samples.items()
                            if name == "queuectl_jobs"}
                    self.assertEqual(sum(jobs.values()), 200)
                    self.assertEqual({jobs[COMPLETED]}, {samples[key] for key in (
                        ("queuectl_jobs_completed_total", (queue,)),
                        ("queuectl_attempts_total", (("outcome", "completed"), queue)),
                        ("queuectl_job_duration_seconds_count", (queue,)))})


class Surroundings(Processes):
    """Pipes that are not read, disks that are full, a terminal that is stopped."""

    def closed_pipe(self):
        """The writing end of a pipe whose reader is gone."""
        reader, writer = os.pipe()
        os.close(reader)
        self.addCleanup(os.close, writer)
        return writer

    def full_disk(self):
        if not os.path.exists("/dev/full"):
            self.skipTest("there is no /dev/full here")
        full = os.open("/dev/full", os.O_WRONLY)
        self.addCleanup(os.close, full)
        return full

    def unread_fifo(self):
        """(a descriptor to read from, its name) of a FIFO that is full."""
        os.mkfifo(self.path_of("fifo"))
        reader = os.open(self.path_of("fifo"), os.O_RDWR | os.O_NONBLOCK)
        self.addCleanup(os.close, reader)
        for size in (4096, 1):
            with contextlib.suppress(BlockingIOError):
                while os.write(reader, b"\n" * size):
                    pass
        return reader, self.path_of("fifo")

    # Results that cannot be written.

    def test_a_sweep_is_finished_whether_or_not_its_report_is_read(self):
        queue, many = self.queue, 2 * SWEEP_BATCH + 1
        for status, stdout in enumerate((self.closed_pipe(), self.full_disk())):
            self.fill(many, command="x" * 100)
            for argv, state, left in (
                    (("cancel", "--all", "--yes"), CANCELLED, many),
                    (("retry", "--all"), PENDING, many),
                    (("cancel", "--all", "--yes"), CANCELLED, many),
                    (("delete", "--all", "--yes"), CANCELLED, 0)):
                with self.subTest(argv=argv, stdout=stdout):
                    code, _, err = self.call(*argv, "--json", stdout=stdout)
                    self.assertEqual((code, queue.counts()[state]), (status, left))
                    self.assertIn("could not be written" * status,
                                  json.loads(err)["error"]["message"] if status else err)
            self.fill(many)
            swept(queue, "cancel")
            for _ in range(2):      # with jobs and without
                self.assertEqual(self.call("purge", "--yes", "--json", stdout=stdout)[0], status)
                self.assertEqual(queue.counts()[CANCELLED], 0)

    def test_an_action_is_taken_and_then_reported(self):
        """A result that cannot be written is a failure, a message is none."""
        self.a_queue().close()
        streams = {"-": subprocess.PIPE, "full": self.full_disk(), "pipe": self.closed_pipe()}
        for line, stdout, stderr, status, lines in (
                ("enqueue true", "full", "-", 1, 2), ("enqueue true", "pipe", "-", 0, 1),
                ("enqueue true", "-", "full", 0, 0), ("pause", "full", "-", 0, 1),
                ("pause", "-", "pipe", 0, 0), ("retry job-1", "full", "-", 0, 1),
                ("cancel job-1 --json", "full", "-", 1, 1), ("list", "full", "-", 1, 1),
                ("systemd", "full", "-", 1, 1), ("statsu", "-", "full", 2, 0),
                ("list --nope --json", "-", "pipe", 2, 0), ("show nope", "-", "full", 1, 0),
                ("show nope --json", "-", "full", 1, 0), ("show nope --json", "-", "pipe", 1, 0),
                ("wait --all --timeout 0.05", "-", "full", 124, 0),
                *((line, *rest) for line in ("--help", "--version", "dlq --help")
                  for rest in (("full", "-", 1, 1), ("pipe", "-", 0, 0)))):
            with self.subTest(line, stdout=stdout, stderr=stderr):
                code, _, err = self.call(*line.split(), stdout=streams[stdout],
                                         stderr=streams[stderr])
                self.assertEqual((code, err.count("\n")), (status, lines), err)
        self.assertEqual([job.state for job in self.queue.jobs(sort="oldest")],
                         [CANCELLED, PENDING, PENDING])
        self.assertEqual(self.queue.status().paused, [queuectl.EVERY_QUEUE])

    def test_waiting_goes_on_and_exits_as_the_job(self):
        self.worker()
        self.assertEqual(self.call("enqueue", "sleep 0.1; exit 3", "--wait", "--max-retries", "1",
                                   stdout=self.closed_pipe())[0], 3)
        self.enqueue("sleep 0.1; exit 4", "--max-retries", "1", "--id", "a")
        for stream in (self.closed_pipe(), self.full_disk()):
            self.assertEqual(self.call("wait", "a", stdout=stream, stderr=stream)[0], 4)

    def test_a_stream_is_read_to_its_end(self):
        queue = self.queue
        for stdout, stderr in ((self.closed_pipe(), self.full_disk()),
                               (self.full_disk(), self.closed_pipe()),
                               (self.closed_pipe(), self.closed_pipe())):
            with self.subTest(stdout=stdout, stderr=stderr):
                stream = self.start("enqueue", "--stream", stdin=subprocess.PIPE,
                                    stdout=stdout, stderr=stderr)
                for line in (b"true\n", b"{bad\ntrue\n"):
                    before = len(queue.jobs())
                    stream.stdin.write(line)
                    stream.stdin.flush()
                    wait_for(lambda before=before: len(queue.jobs()) == before + 1, "the job")
                stream.stdin.close()
                self.assert_ends(stream, 1)

    def test_ctrl_c_stops_a_sweep_whose_reader_is_gone(self):
        self.fill(20000)
        sweep = self.start("cancel", "--all", "--yes", "--json", stdout=self.closed_pipe())
        wait_for(lambda: self.queue.counts()[CANCELLED] > SWEEP_BATCH, "a part of it")
        sweep.send_signal(signal.SIGINT)
        self.assert_ends(sweep, 130)
        self.assertGreater(self.queue.counts()[PENDING], 0)

    def test_a_follower_stops_soon_after_its_reader_has_gone(self):
        self.enqueue("true", "--id", "a")
        for argv in (("events", "-f"), ("status", "--watch", "1000"), ("logs", "-f", "a")):
            with self.subTest(argv):
                follower = self.running(*argv)
                if argv[0] != "logs":
                    self.assertTrue(follower.stdout.readline())
                follower.stdout.close()
                self.assert_ends(follower)
                self.assertEqual(follower.stderr.read(), b"")

    # A log that is not read.

    def test_a_log_that_is_not_read_delays_no_worker(self):
        reader, fifo = self.unread_fifo()
        queue = self.queue
        self.configure(heartbeat="100ms")
        self.jobs([{"id": f"q{n}"} for n in range(700)])
        queue.enqueue("sleep 100", id="slow", timeout=0.3, max_retries=1, priority=1)
        with open(fifo, "wb", 0) as log:
            worker = self.start("worker", "start", "-c", "4", stderr=log)
        wait_for(lambda: queue.counts()[COMPLETED] == 700, "the jobs")
        self.wait_state("slow", DEAD)
        [run] = queue.runs("slow")
        self.assertEqual((run.outcome, run.duration < 5), ("timeout", True))
        [before] = queue.store.workers()
        wait_for(lambda: queue.store.workers()[0].heartbeats > before.heartbeats, "a heartbeat")
        text = os.read(reader, 1 << 20).decode()    # now it is read
        self.assertEqual(text.strip(), "")

        def read_on():
            nonlocal text
            with contextlib.suppress(BlockingIOError):
                text += os.read(reader, 1 << 16).decode()
            return text
        wait_for(lambda: "q300 started" in read_on(), "the lines that were kept")
        queue.enqueue("true", id="late")
        wait_for(lambda: "late completed" in read_on(), "the last lines")
        lines = text.split("\n\n")[-1].split("\n")
        self.assertIn("worker", lines[0])
        [dropped] = [line for line in lines if "dropped" in line]
        missing = 700 * 2 + 2 + 2 + 1 - sum(
            bool(re.search(" (started|completed|dead)", line)) for line in lines)
        self.assertEqual(re.match("([0-9,]+) lines", dropped)[1], f"{missing:,}")
        self.assertIn("late started", lines[lines.index(dropped) + 1])
        self.assertGreater(lines.index(dropped), 1000)
        self.assertEqual(self.cli("worker", "stop")[0], 0)
        self.assert_ends(worker)

    def test_a_worker_and_a_server_exit_though_their_last_lines_are_not_read(self):
        _, fifo = self.unread_fifo()
        with open(fifo, "wb", 0) as log:
            worker = self.start("worker", "start", stderr=log)
            self.enqueue("true")
            self.wait_state("job-1", COMPLETED)
            self.assertEqual(self.cli("worker", "stop")[0], 0)
            self.anew()     # the server logs that it makes a queue
            server = self.start("web", "--port", "0", stderr=log, stdout=subprocess.PIPE)
            self.assertTrue(server.stdout.readline())
            server.send_signal(signal.SIGINT)
            self.path = self.path_of("no.db")   # the error of this worker is not read either
            write_bytes(self.path, b"this is no queue")
            failed = self.start("worker", "start", stderr=log)
            for process, status in ((worker, 0), (server, 0), (failed, 1)):
                self.assert_ends(process, status)

    def test_a_stopped_terminal_delays_no_worker(self):
        self.enqueue(UNTIL_GO, "--id", "a")
        terminal = self.terminal("worker", "start", "--drain")
        terminal.until(lambda text: "a started" in text)
        terminal.type(b"\x13")      # Ctrl+S
        self.fill(100)
        self.touch("go")
        wait_for(lambda: self.queue.counts()[COMPLETED] == 101, "the jobs")
        self.assert_ends(terminal.process)

    def test_a_log_that_is_read_has_all_lines_in_their_order(self):
        self.fill(300)
        worker = self.start("worker", "start", "--drain", "-c", "4", stderr=subprocess.PIPE)
        first, *lines, last = worker.stderr.read().decode().splitlines()
        self.assertRegex(first + last, "worker .* started.*worker .* stopped")
        said = collections.defaultdict(list)
        for line in lines:
            said[line.split()[2]].append(line.split()[3])
        self.assertEqual(list(said.values()), [["started:", "completed"]] * 300)

    # Questions.

    def test_without_a_terminal_a_wide_step_needs_a_yes(self):
        self.enqueue("x")
        wide = [tuple(line.split()) for line in (
            "delete --all", "delete --state pending", "cancel --all", "cancel --search x", "purge",
            "purge --older-than 1d", "purge -s pending", "dlq purge", "dlq purge --queue q")]
        refused = (*wide, ("delete", "--all", "--json"), ("purge", "--json"))
        for argv, (code, out, err) in zip(refused, self.several(refused, stdin=subprocess.DEVNULL)):
            with self.subTest(argv):
                self.assertEqual((code, out, err.count("\n")), (2, "", 1), err)
                self.assertIn("--yes", err)
                if "--json" in argv:
                    self.assertEqual(json.loads(err)["error"]["code"], "usage")
        closed = shlex.join(self.command("delete", "--all")) + " <&-"
        self.assertEqual(self.done(["/bin/sh", "-c", closed])[0], 2)
        self.assertEqual(self.job("job-1").state, PENDING)
        taken = (("retry", "--all"), ("purge", "--dry-run"), ("cancel", "job-1"),
                 ("dlq", "retry", "--all"), ("delete", "job-1"), *((*one, "--yes") for one in wide))
        self.assertEqual({code for code, _, _ in self.several(taken, stdin=subprocess.DEVNULL)},
                         {0})

    def test_at_a_terminal_a_wide_step_is_taken_after_a_yes(self):
        """The question is on stderr wherever that goes, and not asked if nothing would change."""
        self.fill(2)
        lines = (("cancel --all", b"n\n", 1), ("cancel --all --json", b"\n", 1),
                 ("delete --state pending", b"nyes\n", 1), ("purge -s pending", b"\x04", 1),
                 ("purge --queue none", b"", 0), ("retry --all", b"", 0),
                 ("purge --dry-run", b"", 0), ("cancel --all", b"Y\n", 0),
                 ("retry --all", b"", 0), ("cancel --all --yes", b"", 0))
        main, side = pty.openpty()
        self.addCleanup(os.close, main)
        os.write(main, b"".join(answer for _, answer, _ in lines))
        told = self.several([line.split() for line, _, _ in lines], stdin=side)
        os.close(side)
        for (line, answer, status), (code, out, err) in zip(lines, told):
            with self.subTest(line, answer=answer):
                self.assertEqual(code, status, err)
                self.assertEqual("This will" in err and "jobs: 2 pending. Continue? [y/N]" in err,
                                 answer != b"")
                self.assertEqual("nothing was changed" in err, status == 1)
                self.assertNotIn("Continue", out)
        self.assertEqual(self.queue.counts()[CANCELLED], 2)

    def test_whoever_makes_a_queue_says_so(self):
        for n, line in enumerate((
                "enqueue true", "pause", "queue set q --limit 1", "schedule add n @daily true",
                "config set timeout 5", "worker start --drain", "enqueue --stream")):
            with self.subTest(line):
                self.path = self.path_of(f"new{n}.db")
                said = f"made a new queue at {os.path.realpath(self.path)}\n"
                call = self.cli if line[0] in "pqsc" else \
                    functools.partial(self.call, stdin=subprocess.DEVNULL)
                self.assertEqual([said in call(*line.split())[2] for _ in range(2)], [True, False])
        for flag in ("--quiet", "--json"):
            self.path = self.path_of(f"{flag}.db")
            self.assertEqual(self.cli("enqueue", "true", flag)[::2], (0, ""))


class AgentProcesses(Processes):
    """The server as a client starts it."""

    def client(self, *flags, **options):
        return self.start("mcp", *flags, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **options)

    def said(self, server, method="ping", params=None):
        """The next answer, after this request (None: without one)."""
        if method:
            server.stdin.write(message(method, params or {}) + b"\n")
            server.stdin.flush()
        return json.loads(server.stdout.readline())

    def use(self, server, tool, **given):
        return self.said(server, "tools/call", {"name": tool, "arguments": given})[
            "result"]["structuredContent"]

    def test_only_enqueue_creates_the_queue_and_it_runs_where_the_server_does(self):
        with subprocess.Popen([*program(), "mcp"], cwd=self.dir, stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                              env={**os.environ, "QUEUECTL_DB": "queue.db"}) as server:
            for tool, given in (("status", {}), ("list", {}), ("retry", {"ids": ["a"]}),
                                ("wait", {"ids": ["a"]}), ("output", {"id": "a"})):
                self.assertEqual(self.use(server, tool, **given)["error"]["code"], "no-queue")
            self.assertFalse(self.exists("queue.db"))
            found = self.use(server, "enqueue", command="pwd")
            self.assertIn("no worker is running", found["waiting_for"][0])
            self.drain()
            self.assertEqual(self.use(server, "output", id="job-1")["output"],
                             os.path.realpath(self.dir) + "\n")
            os.rename(self.path, self.path_of("away.db"))
            self.assertEqual(self.use(server, "status")["error"]["code"], "no-queue")
            os.rename(self.path_of("away.db"), self.path)
            self.assertEqual(self.use(server, "status")["jobs"]["total"], 1)

    def test_the_server_ends_with_its_client_however_that_ends(self):
        self.fill(1)
        for how in ("end", "mid-line", "no reader", signal.SIGTERM, signal.SIGINT):
            with self.subTest(how):
                server = self.client()
                self.assertIn("jobs", self.use(server, "status"))
                server.stdin.write(message("tools/call", {
                    "name": "wait", "arguments": {"ids": ["job-1"]}}) + b"\n")
                server.stdin.flush()
                if how == "no reader":
                    server.stdout.close()
                    os.write(server.stdin.fileno(), message("ping", {}) + b"\n")
                elif isinstance(how, str):
                    server.stdin.write(b'{"jsonrpc": ' if how == "mid-line" else b"")
                    server.stdin.close()
                    self.assertEqual(b"-32700" in server.stdout.read(), how == "mid-line")
                else:
                    server.send_signal(how)
                self.assertEqual(server.wait(DEADLINE), 0)

    def test_a_line_of_many_megabytes_is_refused_and_the_next_is_answered(self):
        server = self.client()
        for size in (queuectl.MAX_MESSAGE + 1, 40 << 20):
            server.stdin.write(b"x" * size + b"\n")
            self.assertEqual(self.said(server)["error"]["code"], -32700)
            self.assertEqual(self.said(server, None)["result"], {})

    def test_a_session_that_only_reads_has_no_tool_that_changes(self):
        server = self.client("--read-only")
        tools = self.said(server, "tools/list")["result"]["tools"]
        self.assertEqual([tool["name"] for tool in tools], ["status", "output", "wait", "list"])
        call = {"name": "enqueue", "arguments": {"command": "true"}}
        self.assertEqual(self.said(server, "tools/call", call)["error"]["code"], -32602)

    def test_a_worker_is_started_for_the_jobs_and_outlives_the_session(self):
        server = self.client("--worker", "2", start_new_session=True)
        os.mkfifo(self.path_of("go"))
        for command in ("read go < go; echo gone", "echo two"):
            self.assertNotIn("waiting_for", self.use(server, "enqueue", command=command))
        self.use(server, "wait", ids=["job-2"])
        [worker] = self.queue.workers()
        self.assertEqual(worker.slots, 2)
        os.killpg(server.pid, signal.SIGKILL)
        write_bytes(self.path_of("go"), b"\n")
        self.wait_state("job-1", COMPLETED)
        wait_for(lambda: not is_running(worker.pid), "the worker's end")
        self.assertEqual(self.call("mcp", "--worker", "1", "--read-only")[0], 2)

    @unittest.skipUnless(importlib.util.find_spec("mcp"), "the package mcp is not installed")
    def test_the_client_library_works_with_both_kinds_of_versions(self):
        for mode in ("legacy", "auto"):
            code, out, err = self.done([sys.executable, "-c", CLIENT, mode, *self.command("mcp")])
            self.assertEqual((code, out), (0, "7 pending True\n"), err)


CLIENT = """
import asyncio, sys
from mcp import Client
from mcp.client.stdio import StdioServerParameters
async def main(mode, command, *args):
    async with Client(StdioServerParameters(command=command, args=args), mode=mode) as client:
        job = await client.call_tool("enqueue", {"command": "true"})
        bad = await client.call_tool("output", {"id": "none"})
        print(len((await client.list_tools()).tools), job.structured_content["state"], bad.is_error)
asyncio.run(main(*sys.argv[1:]))
"""


# ---- Browser -----------------------------------------------------------------
# The dashboard in a real headless Chromium, driven by WebDriver over plain HTTP.

# axe-core's one file, which `npm pack axe-core` brings; without it that test skips.
AXE = os.environ.get("QUEUECTL_AXE", os.path.expanduser("~/.cache/queuectl/axe.min.js"))


class Chromium:
    def __init__(self):
        self.profile = tempfile.mkdtemp(prefix="queuectl-browser-")
        self.driver = subprocess.Popen(["chromedriver", "--port=0"],
                                       stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        line = next(line for line in self.driver.stdout if b"successfully" in line)
        self.port = int(re.findall(rb"port (\d+)", line)[0])
        self.session = ""           # until it is open

    def open(self):
        flags = ["--headless=new", "--disable-gpu", "--disable-dev-shm-usage",
                 f"--user-data-dir={self.profile}"]
        options = {"args": flags + ["--no-sandbox"] * (os.geteuid() == 0)}
        self.session = "/session/" + self.ask("POST", "/session", {"capabilities": {
            "alwaysMatch": {"goog:loggingPrefs": {"browser": "ALL"},
                            "goog:chromeOptions": options}}})["sessionId"]

    def ask(self, method, path, body=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, self.session + path,
                               None if method == "GET" else json.dumps(body or {}))
            reply = connection.getresponse()
            value = json.loads(reply.read())["value"]
        if reply.status != 200:
            raise AssertionError(f"{path}: {value['error']}: {value['message'][:500]}")
        return value

    def run(self, script, *args):
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(args)})

    def devtools(self, command, **params):
        self.ask("POST", "/goog/cdp/execute", {"cmd": command, "params": params})

    def show_as(self, width=1280, height=800, scheme="light"):
        self.devtools("Emulation.setDeviceMetricsOverride", width=width, height=height,
                      deviceScaleFactor=1, mobile=width < 500)
        self.devtools("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": scheme}])

    def press(self, keys):
        strokes = [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")]
        self.ask("POST", "/actions", {"actions": [
            {"type": "key", "id": "keys", "actions": strokes}]})

    def close(self):
        with contextlib.suppress(OSError, AssertionError):
            self.ask("DELETE", "")
        self.driver.kill()
        self.driver.wait()
        self.driver.stdout.close()
        shutil.rmtree(self.profile, True)


TAB, ENTER, ESCAPE, LEFT = "\ue004", "\ue007", "\ue00c", "\ue012"      # as WebDriver names them
IDS = "return [...document.querySelectorAll('#jobs .c-id a')].map(a => a.text)"


@unittest.skipUnless(shutil.which("chromedriver"), "there is no chromedriver")
class Browser(Processes):
    @classmethod
    def setUpClass(cls):
        cls.chromium = Chromium()
        cls.addClassCleanup(cls.chromium.close)
        try:
            cls.chromium.open()
        except AssertionError as error:
            raise unittest.SkipTest(f"there is no browser: {error}") from None

    def setUp(self):
        super().setUp()
        self.page, self.ask = self.chromium.run, self.chromium.ask
        self.chromium.show_as()
        self.complaints = []        # what the console may hold, as regular expressions
        self.ask("POST", "/se/log", {"type": "browser"})

    def tearDown(self):
        entries = self.ask("POST", "/se/log", {"type": "browser"})
        self.page("try { localStorage.clear() } catch {}")
        self.ask("POST", "/url", {"url": "about:blank"})
        for entry in entries:
            if not any(re.search(known, entry["message"]) for known in self.complaints):
                self.fail(f"the console says {entry['message']}")

    def add(self, command="true", **fields):
        with Queue(self.path) as queue:
            return queue.enqueue(command, cwd=self.dir, **fields)

    def visit(self, url):
        self.ask("POST", "/url", {"url": url})
        self.see("return document.querySelector('#live').textContent.trim() === 'Live'")

    def log_in(self, page=""):
        """Open the printed address, and then another page; the address without the token."""
        self.web()
        self.visit(self.url)
        base = self.url.partition("?")[0]
        if page:
            self.visit(base + page)
        return base

    def see(self, script, *args):
        """Wait until a script in the page returns a true value, and return it."""
        return wait_for(lambda: self.page(script, *args), script)

    def text_of(self, selector):
        return self.page("return [...document.querySelectorAll(arguments[0])].filter(node =>"
                         " node.checkVisibility()).map(node => node.innerText.trim())", selector)

    def see_text(self, selector, *texts):
        """Wait until an element that shows all these texts is there."""
        wait_for(lambda: any(all(text in shown for text in texts)
                             for shown in self.text_of(selector)),
                 f"{selector} with {texts}, not {self.text_of(selector)}")

    def see_row(self, job_id, *texts):
        self.see_text("#jobs tbody tr", job_id, *texts)

    def click(self, selector, text=""):
        """Click the first visible element with that text; again if it was redrawn."""
        def is_clicked():
            found = self.see(
                "return [...document.querySelectorAll(arguments[0])].find(node =>"
                " node.checkVisibility() && node.innerText.includes(arguments[1]))", selector, text)
            try:
                self.page("arguments[0].scrollIntoView({block: 'center'})", found)
                self.ask("POST", f"/element/{next(iter(found.values()))}/click")
            except AssertionError as error:
                if "stale element" not in str(error):
                    raise
                return False
            return True
        wait_for(is_clicked, f"a click on {selector}")

    def type_into(self, selector, text):
        found = self.see("return document.querySelector(arguments[0])", selector)
        element = f"/element/{next(iter(found.values()))}"
        self.ask("POST", f"{element}/clear")
        self.ask("POST", f"{element}/value", {"text": text})

    def assert_focus(self, name):
        self.assertEqual(self.page("const node = document.activeElement;"
                                   "return node.id || node.name || node.innerText"), name)

    def assert_no_sideways_scroll(self):
        self.assertEqual(*self.page("const { scrollWidth, clientWidth } = document.documentElement;"
                                    "return [scrollWidth, clientWidth]"))

    def test_the_printed_url_logs_in_and_a_job_completes_without_a_reload(self):
        self.add("echo hi")
        self.log_in()
        self.page("window.isTheSamePage = true")
        self.assertNotIn("token", self.page("return location.href"))
        self.see_row("job-1", "pending", "no worker is running")
        self.see_text("#health", "Stalled")
        self.worker()
        self.see_row("job-1", "completed", "1/3")
        self.see_text("#health", "Healthy")
        self.see_text("#counts a[aria-current], #counts a", "completed", "1")
        self.assertTrue(self.page("return window.isTheSamePage"))

    def test_dead_jobs_are_retried_one_by_one_and_all_at_once(self):
        for n in range(3):
            self.add(f"echo no such table: t{n}; test -e good", max_retries=1)
        self.drain()
        self.log_in()
        self.see_text("#failures li", "job-3", "exit status 1: no such table: t2")
        self.click("#counts a", "dead")
        self.click("#jobs tr:first-child button", "Retry")
        self.see_text("#answers", "job-3 is queued again.")
        self.see(IDS + ".length === 2")
        self.touch("good")
        self.click("#retry-all", "Retry all 2 dead")
        self.see_text("#question", "Retry 2 dead jobs?")
        self.click("#question button", "Retry them")
        self.see_text("#answers", "2 jobs are queued again.")
        self.worker()
        self.see_text("#counts a", "completed", "3")

    def test_a_running_job_is_cancelled_after_a_question(self):
        self.add("sleep 100")
        self.worker()
        self.log_in()
        self.see_text("#workers", "job-1", "sleep 100", "1 of 1 busy")
        self.see("return document.title.startsWith('1 running')")
        self.click("#jobs tbody button", "Cancel")
        self.click("#question button", "No, leave it")
        self.assertEqual(self.job("job-1").state, PROCESSING)
        self.click("#jobs tbody button", "Cancel")
        self.click("#question button", "End and cancel")
        self.see_row("job-1", "cancelled")
        self.see_text("#workers", "0 of 1 busy")

    def test_output_is_followed_but_a_reader_who_scrolls_up_is_left_there(self):
        self.add(f"echo first; {UNTIL_GO}; echo last")
        self.add(f"seq 500; {UNTIL_GO}; echo last")
        self.worker("-c", "2")
        base = self.log_in()
        self.click("#jobs tbody a", "job-1")
        self.see_text("#output", "first")
        self.see_text("#job", "processing", "following")
        self.assert_focus("job-1")
        self.ask("POST", "/back")
        self.see_row("job-1", "processing")
        self.assert_focus("job-1")
        self.visit(base + "#/jobs/job-2")
        self.see("const box = document.querySelector('#output');"
                 "return box.scrollTop > 0 && (box.scrollTop = 0, true)")
        self.see_text("#to-end", "Go to the end")
        self.touch("go")
        self.see_text("#output", "last")
        self.assertEqual(self.page("return output.scrollTop"), 0)
        self.click("#to-end")
        self.assertGreater(self.page("return output.scrollTop"), 0)
        self.visit(base + "#/jobs/job-1")
        self.see_text("#job", "completed")
        self.see("return output.textContent === arguments[0]", "first\nlast\n")

    def test_filter_search_and_pages(self):
        self.jobs([{"command": f"echo {n}", "queue": "late" if n > 100 else "default",
                    "tags": ["odd"] * (n % 2)} for n in range(1, 121)])
        self.log_in()
        self.see(IDS + "[0] === 'job-120'")
        for button, shown in (("older", "51 to 100"), ("older", "101 to 120"),
                              ("newer", "51 to 100")):
            self.click(f"#{button}")
            self.see_text("#pager", f"{shown} of 120")
        self.type_into("#filters [name=tag]", "odd")
        self.see(IDS + "[0] === 'job-119'")
        self.click("#queues a", "late")
        self.see(IDS + ".length === 20")
        self.type_into("#filters [name=search]", "echo 11")
        self.see(IDS + ".length === 10")
        self.assertIn("search=echo+11", self.page("return location.hash"))
        self.click("#counts a", "dead")
        self.see_text("#no-match", "No job fits this filter.")
        self.ask("POST", "/back")
        self.see(IDS + ".length === 10")

    def test_a_command_is_shown_as_text_whatever_it_says(self):
        evil = "<img src=x onerror=alert(1)>"
        self.add(evil, max_retries=1, env={"A": evil})
        self.add(f"echo '{evil}' >&2; exit 3", max_retries=1)
        self.drain()
        base = self.log_in()
        self.see_row("job-1", evil)
        self.see_text("#failures", evil)
        self.visit(base + "#/jobs/job-2")
        self.see_text("#output", evil)
        self.see_text("#job-why", f"exit status 3: {evil}")
        for address, shown in (("%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E", evil), ("%", "%")):
            self.visit(base + "#/jobs/" + address)
            self.see_text("#job h1", shown)
            self.see_text("#no-job", "There is no such job.")
        self.assertEqual(self.page("return document.images.length"), 0)
        self.complaints = ["404"]

    def test_a_job_is_enqueued_with_the_keyboard_alone(self):
        self.add(delay=3600)
        self.log_in()
        self.see_row("job-1", "due in")
        self.chromium.press("/")
        self.see("return document.activeElement.name === 'search'")
        self.page("document.querySelector('#enqueue-open').focus()")
        self.chromium.press(ENTER)
        self.see("return document.activeElement.name === 'command'")
        self.chromium.press("echo hi" + TAB + "night")
        self.type_into("#f-delay", "1 fortnight")
        self.chromium.press(ENTER)
        self.see_text("#enqueue [role=alert]", "delay")
        self.assert_focus("f-delay")
        self.complaints = ["400"]
        self.page("document.querySelector('#enqueue details').open = true")
        self.type_into("#f-env", "A=b=c\n\n D =")
        self.click("#f-held")
        self.type_into("#f-delay", "2h")
        self.chromium.press(ENTER)
        self.see_row("job-2", "echo hi", "night", "held")
        self.assertEqual(self.job("job-2").env, {"A": "b=c", "D": ""})
        self.see_text("#answers", "job-2 is enqueued.")
        self.assert_focus("enqueue-open")

    def test_queues_are_paused_and_resumed(self):
        self.add(queue="mail")
        self.log_in()
        self.see_text("#queues tr", "mail\t0\t1\tPause")
        self.click("#queues [aria-label='Pause queue mail']")
        self.see_text("#health", "queue mail is paused")
        self.see_text("#waiting li", "job-1", "queue mail is paused")
        self.click("#pause-all")
        self.click("#question button", "Pause all")
        self.see_text("#health", "all queues are paused")
        self.click("#pause-all", "Resume all")
        self.click("#queues [aria-label='Resume queue mail']")
        self.see("return !document.querySelector('#health').innerText.includes('paused')")

    def test_a_job_is_deleted_after_a_question_and_an_empty_queue_says_how_to_begin(self):
        self.add(delay=3600)
        self.log_in("#/jobs/job-1")
        self.click("#job button", "Delete")
        self.click("#question button", "Delete")
        self.see_text("#answers", "job-1 is deleted.")
        self.see_text("#begin", "The queue is empty", "queuectl enqueue", "queuectl worker start")
        self.add()
        self.see_row("job-2", "pending")

    def test_it_says_when_it_has_lost_the_server_and_when_it_is_back(self):
        self.add(delay=3600)
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        process, _ = self.web("--port", port)
        self.visit(self.url)
        self.complaints = ["ERR_CONNECTION", "ERR_INCOMPLETE", "401", "ERR_EMPTY"]
        for token, selector, said in (
                (TOKEN, "#answers", "The server is back"),
                ("another-token-of-length", "#logged-out", "You are not logged in")):
            self.end(process)
            self.see_text("#lost", "The server does not answer.")
            self.see("return document.title.startsWith('offline')")
            process, _ = self.web("--port", port, QUEUECTL_TOKEN=token)
            self.page("document.querySelector('#reconnect').click()")
            self.see_text(selector, said)
            self.assertEqual(self.text_of("#lost"), [])

    def test_a_hidden_page_frees_its_connection_until_it_is_seen_again(self):
        self.log_in()
        hide = ("Object.defineProperty(document, 'hidden', {value: arguments[0], configurable:"
                " true}); document.dispatchEvent(new Event('visibilitychange'))")
        self.page(hide, True)
        self.see("return performance.getEntriesByType('resource').some(one =>"
                 " one.name.endsWith('/api/events'))")     # listed at its end
        self.add()
        self.page(hide, False)
        self.see_row("job-1", "pending")

    def test_a_login_that_may_only_read_shows_nothing_to_change(self):
        self.add(delay=3600)
        self.web(QUEUECTL_READ_TOKEN=READ_TOKEN)
        self.visit(self.url.replace(TOKEN, READ_TOKEN))
        self.see_row("job-1", "pending")
        self.see_text("#read-only", "Read only")
        self.assertEqual(self.text_of("button"), ["Newer", "Older"])

    def test_dark_and_light_as_the_system(self):
        self.log_in()
        colour = "return getComputedStyle(document.body).backgroundColor"
        light = self.page(colour)
        self.chromium.show_as(scheme="dark")
        self.assertNotEqual(self.page(colour), light)

    def test_a_narrow_screen_never_scrolls_sideways(self):
        self.add("echo " + "x" * 300, tags=["a-rather-long-tag"])
        self.add("echo " + "y" * 300 + "; exit 1", queue="q" * 60, max_retries=1)
        self.drain()
        base = self.log_in()
        self.chromium.show_as(width=320)
        self.visit(base)
        self.see_row("job-2", "dead")
        self.assert_no_sideways_scroll()
        self.visit(base + "#/jobs/job-2")
        self.see_text("#output", "yyy")
        self.assert_no_sideways_scroll()
        self.click("#enqueue-open")
        self.assert_no_sideways_scroll()

    def test_a_chart_is_read_with_the_arrow_keys(self):
        wait_for(lambda: time.time() % 60 < 45, "a minute that lasts for the test")
        self.add()
        self.drain()
        self.log_in()
        self.see_text("#rates .legend", "last hour", "completed 1")
        self.page("document.querySelector('#rates input').focus()")
        self.chromium.press(LEFT)       # the minute before
        self.see_text("#rates .legend", "completed 0")
        self.assertIn("completed 0", self.page(
            "return document.querySelector('#rates input').ariaValueText"))

    @unittest.skipUnless(os.path.exists(AXE), "axe-core is not there (QUEUECTL_AXE)")
    def test_axe_finds_no_fault(self):
        self.add("echo out; exit 1", max_retries=1, tags=["night"])
        self.add()
        self.drain()
        self.add("echo out; sleep 100")
        self.add(queue="mail", delay=3600)
        self.add(after=["job-1"])
        self.worker()
        self.wait_state("job-3", PROCESSING)
        base = self.log_in()
        for look in ({}, {"scheme": "dark"}, {"width": 360}):
            self.chromium.show_as(**look)
            for page, landmark in (("", "#jobs tbody tr"), ("#/jobs/job-1", "#runs"),
                                   ("#/jobs/job-3", "#runs")):
                self.visit(base + page)
                self.see("return document.querySelector(arguments[0])?.checkVisibility()", landmark)
                self.assert_accessible(page=page, **look)
            self.click("#enqueue-open")
            self.page("document.querySelector('#enqueue details').open = true")
            self.assert_accessible(dialog="enqueue", **look)
            self.chromium.press(ESCAPE)
            self.click("#job button", "Cancel job")
            self.assert_accessible(dialog="question", **look)
            self.chromium.press(ESCAPE)

    def assert_accessible(self, **where):
        with open(AXE, encoding="utf-8") as file:
            self.page("if (!window.axe) {" + file.read() + "}")
        faults = self.page(
            "return axe.run({runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa',"
            " 'wcag22aa', 'best-practice']}).then(found => found.violations.map(one =>"
            " [one.id, one.help, ...one.nodes.map(node => node.html)]))")
        with self.subTest(**where):
            self.assertEqual(faults, [])


# ---- Real shells and service managers ----------------------------------------

class Shells(Processes):
    """The completion scripts, in the shells that are there."""

    # What is typed before the tab key, and what stands there then.
    LINES = (
        ("queuectl enq", "queuectl enqueue "), ("queuectl show a", "queuectl show a:b@c "),
        ("queuectl show a:", "queuectl show a:b@c "),
        ("queuectl show a:b@", "queuectl show a:b@c "),
        ("queuectl show 'a:", "queuectl show 'a:b@c' "),
        ("queuectl list --state=d", "queuectl list --state=dead "),
        ("./queuectl.py config get kill", "./queuectl.py config get kill-grace "),
        ("q dlq re", "q dlq retry "),
        ("queuectl --db 'an other.db' show ", "queuectl --db 'an other.db' show else "),
        ("queuectl backup an", "queuectl backup an\\ other.db "),
        ("queuectl enqueue --file=an", "queuectl enqueue --file=an\\ other.db "),
        ("queuectl enqueue @an", "queuectl enqueue @an\\ other.db "))
    READY = "alias q=queuectl; echo 'rea''dy'\r"
    BASH = ("bash", "--norc", "--noprofile", "-i")

    def setUp(self):
        super().setUp()
        self.enqueue("x", "--id", "a:b@c")
        with Queue(self.path_of("an other.db")) as other:
            other.enqueue("x", id="else")
        os.mkdir(self.path_of("bin"))
        for name in ("bin/queuectl", "queuectl.py"):
            self.script(name, 'exec "{}" "{}" "$@"'.format(*program()))
        self.environ = {
            "PATH": self.path_of("bin") + os.pathsep + os.environ["PATH"], "QUEUECTL_DB": self.path,
            "PS1": "$ ", "PROMPT": "$ ", "TERM": "dumb", "LC_ALL": "C.UTF-8", "HOME": self.dir}

    def write_script(self, shell, name):
        if shutil.which(shell) is None:
            self.skipTest(f"there is no {shell}")
        write_bytes(self.path_of(name), self.cli("completion", shell)[1].encode())

    def at_prompt(self, *argv):
        self.write_script(argv[0], f"completion.{argv[0]}")
        return self.on_terminal(argv, (24, 200), self.environ)

    def check_lines(self, terminal, lines=LINES):
        for line, completed in lines:
            with self.subTest(line):
                terminal.press(line + "\t", completed)
                terminal.press("\x15echo cleared\r", "\ncleared")     # Ctrl+U

    def test_bash_with_and_without_its_package(self):
        package = "/usr/share/bash-completion/bash_completion"
        for first in ("shopt -u hostcomplete", f"source {package}"):
            if "source" in first and not os.path.exists(package):
                self.skipTest("there is no package bash-completion")
            terminal = self.at_prompt(*self.BASH)
            terminal.press(f"{first}; source completion.bash; complete -F _queuectl q; "
                           + self.READY, "\nready")
            self.check_lines(terminal)

    def test_zsh_by_its_script_and_by_its_own_search(self):
        self.write_script("zsh", "_queuectl")
        for before, after, lines in (("", "source completion.zsh; ", self.LINES),
                                     ("fpath=($PWD $fpath); ", "", self.LINES[1:2])):
            terminal = self.at_prompt("zsh", "-f", "-i")
            terminal.press(f"{before}autoload -Uz compinit; compinit -u -D; {after}{self.READY}",
                           "\nready")
            self.check_lines(terminal, lines)

    def test_fish(self):
        """It is asked, not typed to: it wants a better terminal than this one."""
        self.write_script("fish", "completion.fish")
        lines = [line for line, _ in self.LINES] + ["queuectl list --", "queuectl show "]
        asked = "; ".join(f"echo '> {number}'; complete -C {json.dumps(line)}"
                          for number, line in enumerate(lines))
        said = self.done(["fish", "--no-config", "-c", "source completion.fish; alias q queuectl; "
                          + asked], env={**os.environ, **self.environ})[1]
        *answers, flags, jobs = (one.partition("\n")[2] for one in said.split("> ")[1:])
        for (line, completed), answer in zip(self.LINES, answers):
            last = re.split(r"(?<!\\) ", completed.strip())[-1].replace("\\ ", " ").strip("'")
            with self.subTest(line):
                self.assertEqual(answer.rstrip("\n").split("\t")[0], last)
        self.assertIn("--state\tone of pending", flags)
        self.assertEqual(jobs, "a:b@c\tpending: x\n")


class Services(Processes):
    def a_service(self, *argv, **environ):
        address = self.path_of("manager")
        manager = Manager(self, address)
        worker = self.worker(*argv, env={**os.environ, "NOTIFY_SOCKET": address, **environ})
        wait_for(lambda: "READY=1" in manager.received(), "readiness")
        return manager, worker

    def test_a_manager_is_told_what_its_worker_does(self):
        self.enqueue(f"env > seen; {UNTIL_GO}")
        manager, worker = self.a_service("-c", "2", WATCHDOG_USEC="100000")
        self.assertTrue(self.cli("worker", "list")[1])     # it is ready, so it is listed
        wait_for(lambda: "STATUS=1 of 2 slots busy" in manager.received()
                 and manager.received().count("WATCHDOG=1") > 9, "the status and the watchdog")
        self.assertNotIn("STOPPING=1", manager.received())
        worker.send_signal(signal.SIGTERM)
        wait_for(lambda: {"STOPPING=1", "STATUS=finishing 1 running job"} <= {*manager.received()},
                 "the end")
        self.touch("go")
        self.assert_ends(worker)
        self.assertEqual(manager.received().count("STOPPING=1"), 1)
        self.assertNotRegex(self.read("seen"), "NOTIFY|WATCHDOG")

    def test_a_held_lock_does_not_look_like_a_hang(self):
        self.enqueue(UNTIL_GO)
        manager, _ = self.a_service(WATCHDOG_USEC="300000")
        self.wait_state("job-1", PROCESSING)
        with self.locked():
            self.touch("go")    # its end is to be recorded now
            for _ in range(8):
                manager.received().clear()
                wait_for(lambda: "WATCHDOG=1" in manager.received(), "a watchdog message", 1.4)
        self.wait_state("job-1", COMPLETED)

    @unittest.skipUnless(shutil.which("systemd-analyze"), "there is no systemd-analyze")
    def test_systemd_takes_the_units(self):
        os.mkdir(self.path_of('of 100% $HOME "ü"'))
        os.mkdir(self.path_of("run"), 0o700)
        self.path = self.path_of('of 100% $HOME "ü"/q.db')
        for flags in ((), ("--user", "--grace", "1h"), ("--queue", "a", "--name", "b"),
                      ("web", "--port", "0"), ("web", "--user", "--tls-cert", "of 100% c.pem")):
            text, unit = self.call("systemd", *flags)[1], self.path_of("queuectl.service")
            for shown in (text, re.sub("^#([A-Z])", r"\1", text, flags=re.M)):
                write_bytes(unit, shown.encode())
                with self.subTest(flags):
                    self.assertEqual(self.done(
                        ["systemd-analyze", "verify", "--user" if "--user" in flags else "--system",
                         unit], env={**os.environ, "XDG_RUNTIME_DIR": self.path_of("run")}),
                        (0, "", ""))


class Names(Processes):
    """Any file name or line is one argument of a command, and never code."""

    HOSTILE = (b"plain", b"a b", b"new\nline", b"quo\"te'", b"$(touch PWNED)",
               b"`touch PWNED`", b";touch PWNED", b"-n", b"--help", b"--", b"@file", b"#x",
               b"{}", b"{#}", b"a{}b", b"\\", b"%s\\n", b"trailing  ", b"\ttab\t", b"  ",
               b"cr\r", b"~", b"*", b"=ls", b"A=b", b"if", b"!x", b'{"command": "x"}',
               b"caf\xe9", b"\xe9'%d\\n$(touch PWNED)\n.", b"-\xff7", "\u00e4".encode() * 100)

    def setUp(self):
        super().setUp()
        self.addCleanup(os.chdir, os.getcwd())
        os.chdir(self.dir)

    def cli(self, *argv, stdin=b""):
        with io.TextIOWrapper(io.BytesIO(stdin), "utf-8", "surrogateescape") as text, \
                mock.patch("sys.stdin", text):
            return super().cli(*argv)

    def add(self, data, *argv, status=0):
        code, out, err = self.cli("enqueue", *argv, stdin=data)
        self.assertEqual(code, status, err)
        return err if status else out

    def commands(self):
        return [job.command for job in self.queue.jobs(sort="oldest")]

    def outputs(self):
        return [subprocess.run(["/bin/sh", "-c", job.command], cwd=self.dir, check=True, env={
            **os.environ, **job.env}, stdout=subprocess.PIPE).stdout
            for job in self.queue.jobs(sort="oldest")]

    def test_any_name_is_one_argument_whatever_bytes_it_has(self):
        items = b"\0".join(self.HOSTILE) + b"\0"
        for flag, words in (("-0", ("%s|", "<{}>")), ("--null", ("%s|", "last"))):
            self.add(items, flag, "-", "--", "printf", *words)
        self.assertEqual(self.outputs(), [
            form % name for form in (b"<%s>|", b"last|%s|") for name in self.HOSTILE])
        self.assertFalse(self.exists("PWNED"))

    def test_files_of_any_name_are_worked_on(self):
        os.mkdir(self.path_of("names"))
        folder, made = os.fsencode(self.path_of("names")), []
        for name in self.HOSTILE:
            with contextlib.suppress(OSError):  # a file system may take only UTF-8
                os.close(os.open(os.path.join(folder, name), os.O_CREAT | os.O_WRONLY))
                made.append(name)
        self.add(b"\0".join(made), "-0", "-", "--cwd", "names", "--", "mv", "--", "{}", "{}.done")
        self.drain("-c", "4")
        self.assertEqual(sorted(os.listdir(folder)), sorted(n + b".done" for n in made))

    def test_a_line_is_an_item_and_only_its_end_is_taken_off(self):
        lines = b"# no comment\n\n {\"command\": 1}\r\n  \n\nlast "
        write_bytes(self.path_of("list"), lines)
        for source in (("-",), ("--file", "list"), ("@list",)):
            self.add(lines, *source, "--", "printf", "%s|", "{#}", "{}")
        self.assertEqual(self.outputs(), 3 * [
            b"1|# no comment|", b"2| {\"command\": 1}\r|", b"3|  |", b"4|last |"])

    def test_marks_keywords_and_assignments_in_an_item_are_plain_text(self):
        self.add(b"{#}{}\n", "-", "--", "printf", "%s|", "{}{#}{}", "{#{}}")
        self.assertEqual(self.outputs(), [b"{#}{}1{#}{}|{#{#}{}}|"])
        self.add(b"A=b\nif\n", "-", "--", "{}", "x")
        self.assertEqual(self.commands()[1:], ["'A=b' x", "'if' x"])

    def test_flags_hold_for_each_job_and_may_hold_marks(self):
        self.add(b"a b\n\nc\n", "-", "--id", "n-{#}", "--unique", "u {}", "--once", "{}",
                 "--tag", "t{#}", "--tag", "all", "--env", "X={#}:{}=", "--queue", "q",
                 "--max-retries", "7", "--", "sh", "-c", 'printf "%s|" "$QUEUECTL_ITEM" "$1"', "sh")
        self.assertEqual([(job.id, job.unique, job.once, job.tags, job.env["X"], job.queue,
                           job.max_retries) for job in self.queue.jobs(sort="oldest")], [
            ("n-1", "u a b", "a b", ("t1", "all"), "1:a b=", "q", 7),
            ("n-2", "u c", "c", ("t2", "all"), "2:c=", "q", 7)])
        self.assertEqual(self.outputs(), [b"1|a b|", b"2|c|"])

    def test_an_interrupted_batch_is_submitted_again(self):
        template, path = ("-", "--once", "{}", "--", "true"), b"\xc3\xbc" * 1024
        self.assertIn("2 added", self.add(b"a\nb\n", *template))
        self.drain()
        code, out, err = self.cli("enqueue", *template, stdin=b"a\nb\nc\n")
        self.assertEqual((code, out), (0, "1 added, 2 already there\n"))
        self.assertEqual(len(err.splitlines()), 1, err)     # that no worker runs
        code, out, err = self.cli("enqueue", "true", "--once", "a")
        self.assertEqual((code, out), (0, "job-1\n"))
        self.assertIn("job-1 (completed) has that key: nothing was added", err)
        self.add(path, *template)
        self.assertIn("line 1: once: ", self.add(path + b"x", *template, status=1))
        for word in "3 added", "0 added, 3 already there":
            self.assertIn(word, self.add(b"caf\xe9{#}\ncaf\xe8\ncaf\\xe9\n", *template))
        self.assertIn("line 1: tag", self.add(b"\xe9", "-", "--tag", "{}", "--", "true", status=1))

    def test_results_are_those_of_a_batch(self):
        for data, words, said in ((b"a\nb\n", ("-q",), "job-1\njob-2\n"), (b"", (), "")):
            self.assertEqual(self.add(data, "-", *words, "--", "true"), said)
        [job] = json.loads(self.add(b"a\n", "-", "--json", "--", "true"))
        self.assertEqual(job["command"], "true a")
        worker = self.worker("--max-jobs", "5")
        self.add(b"a\nb\n", "-", "--wait", "--max-retries", "1", "--", "test", "a", "=", status=1)
        self.assert_ends(worker)

    def test_an_item_that_makes_no_job_adds_nothing(self):
        long = b"x" * queuectl.MAX_TEXT
        for data, argv, said in (
                (b"a\n\n" + long, ("--", "true"), "line 3: command: "),
                (b"a\nb\0c", ("--", "true"), "line 2: an argument cannot hold a NUL"),
                (b"a\n\xff", ("--id", "{}", "--", "true"), "line 2: id: "),
                (b"a\na", ("--id", "{}", "--", "true"), "line 2: there is a job 'a' "),
                (b"a\0\0" + long, ("-0", "--", "true"), "item 2: command: "),
                (b"a\0\xff\n\0", ("-0", "--", "true"), "item 2: b'\\xff\\n' is not "),
                (b"a\0\xff\0", ("-0", "--tag", "{}", "--", "true"), "item 2: tags: ")):
            with self.subTest(said):
                self.assertIn(f"error: {said}", self.add(data, "-", *argv, status=1))
        self.assertEqual(self.commands(), [])

    def test_an_item_within_the_script_of_a_shell_is_refused(self):
        for line in ("sh -c 'echo {}'", "/bin/bash -c {}", "sh -c", "env dash -ec 'x {}'",
                     "zsh -f -c 'x{}y'", "bash -euo pipefail -c 'echo {}' sh {}",
                     "bash --norc -c -- 'echo {}'", "bash --rcfile f -lc 'echo {}'",
                     "ksh +x -c -e 'echo {}'", "nice bash -o errexit -c"):
            with self.subTest(line):
                self.assertIn("sh -c 'echo \"$1\"' sh {}", self.add(
                    b"x\n", "-", "--", *shlex.split(line), status=2))
        for line in ("sh -c 'echo \"$1\"' sh {}", "sh -c 'echo \"$0\"'", "sh script {}",
                     "bash -e {} -c", "sh", "bash -c 'echo {#}' sh {}", "sh {}"):
            with self.subTest(line):
                self.add(b"x\n", "-", "--", *shlex.split(line))

    def test_words_that_make_no_template_are_a_usage_error(self):
        for line in ("- --", "- --command x -- y", "-0 -- x", "x -- y", "-0 x", "@f --file f -- x",
                     "--stream --"):
            with self.subTest(line):
                self.add(b"x\n", *line.split(), status=2)

    def test_a_negative_number_is_no_flag_beside_a_zero(self):
        self.add(b"x\0", "-0", "-", "-p", "-5", "-q")
        self.assertEqual(self.job("job-1").priority, -5)
        self.assertEqual(self.add(b"a\0b\0", "-q0", "-"), "job-2\njob-3\n")

    def test_items_without_a_template_are_jobs_and_may_hold_lines(self):
        self.add(b'echo a\necho b\0\0{"command":\n"c"}\0# no\0[{"command": "d"}]\0', "-0", "-")
        self.assertEqual(self.commands(), ["echo a\necho b", "c", "d"])
        self.assertIn("item 2: ", self.add(b"a\0\0{x}\0", "-0", "-", status=1))

    def test_a_template_takes_items_as_they_come(self):
        for flags, end in (((), b"\n"), (("-0",), b"\0")):
            stream = self.running("enqueue", "--stream", *flags, "--tag", "t{#}", "--", "printf",
                                  "%s|")
            for item in (b"a b", b"$(touch PWNED)"):
                stream.stdin.write(item + end)
                stream.stdin.flush()
                self.assertTrue(self.job(stream.stdout.readline().decode().strip()).tags)
            stream.communicate(b"caf\xe9")
            self.assertEqual(stream.returncode, 0)
        self.assertEqual(self.outputs(), 2 * [b"a b|", b"$(touch PWNED)|", b"caf\xe9|"])

    def test_of_a_line_of_a_stream_all_jobs_are_added_or_none(self):
        self.enqueue("x", "--id", "taken")
        code, out, err = self.call("enqueue", "--stream", "--json", input=b"""echo 1
[{"command": "a"}, {"command": "b", "id": "taken"}, {"command": "c", "id": "taken"}]

[{"command": "e"}, {"command": "f", "after": "unknown"}]
[{"command": "g", "id": "g", "after": "h"}, {"command": "i", "id": "h", "after": "g"}]
[{"command": "a"}, {"command": "b"}]""")
        added = [json.loads(line)["command"] for line in out.splitlines()]
        self.assertEqual((code, added, self.commands()[1:]), (1, ["echo 1", "a", "b"], added))
        self.assertEqual([json.loads(line)["error"]["message"].partition(":")[0]
                          for line in err.splitlines() if line[0] == "{"],
                         ["line 2", "line 4", "line 5"])
        self.assertEqual(self.call("enqueue", "--stream", input=b"")[:2], (0, ""))

    def test_an_argument_may_have_any_bytes(self):
        write_bytes(os.path.join(os.fsencode(self.dir), b"caf\xe9"), b"drink")
        self.assertEqual(self.call("enqueue", "--", b"cat", b"./caf\xe9")[0], 0)
        self.assertIn("caf\\351", self.commands()[0])
        code, _, err = self.call("schedule", "add", "s", "@daily", "--", b"cat", b"caf\xe9")
        self.assertEqual(code, 0, err)
        self.drain()
        self.assertEqual(self.runs("job-1")[0].output, b"drink")
        code, _, err = self.call("enqueue", "--", b"cat", b"\xff\n")
        self.assertEqual((code, "ends with a newline" in err), (1, True), err)

    def test_other_bytes_elsewhere_are_named(self):
        for argv in ((b"caf\xe9",), ("--id", b"caf\xe9", "--", "x"), ("x", "--tag", b"caf\xe9")):
            with self.subTest(argv):
                code, _, err = self.call("enqueue", *argv)
                self.assertEqual(code, 2)
                self.assertRegex(err, r"argument 'caf\\udce9' is not UTF-8")
        self.assertIn("line 2: not UTF-8", self.add(b"echo a\necho \xe9\n", "-", status=1))

    def test_a_command_that_is_too_long_to_be_started_is_refused(self):
        most, wide = queuectl.MAX_TEXT, "\u00fc" * (queuectl.MAX_TEXT // 2) + "xx"
        self.enqueue("x", "--id", "a", "--delay", "1h")
        fits = "printf %s xxx | wc -c; true ".ljust(most, "x")
        self.add(fits.encode(), "-", "--id", "fits", "--max-retries", "1")
        for refuse in (lambda: self.queue.edit("a", command=fits + "x"),
                       lambda: self.queue.add_schedule("s", "@daily", command=fits + "x")):
            with refused("invalid-job"):
                refuse()
        for line in (fits + "x", wide, json.dumps({"command": wide}),
                     json.dumps({"command": "x", "env": {"A": "y" * (most - 1)}}),
                     json.dumps({"command": "x", "env": {
                         f"A{n}": "y" * 120_000 for n in range(9)}})):
            with self.subTest(line[-10:]):
                self.assertRegex(self.add(b"a\n" + line.encode(), "-", status=1),
                                 "error: line 2: .*bytes.*; put ")
        value = "y" * (most - len("A0="))
        self.queue.enqueue('printf %s "$A7" | wc -c', id="env",
                           env={f"A{n}": value for n in range(8)})
        self.drain()
        self.assertEqual([int(self.runs(job)[0].output) for job in ("fits", "env")],
                         [3, len(value)])

    def installed(self, *argv, **options):
        return self.done([self.path_of("of ü'$x/bin/queuectl"), *argv], **options)

    def install(self, **options):
        code, out, err = self.call("install", "--to", self.path_of("of ü'$x"), **options)
        self.assertEqual((code, out), (0, self.path_of("of ü'$x/bin/queuectl\n")))
        return err

    def test_an_installed_program_runs_from_its_byte_code_anywhere(self):
        write_bytes(self.path_of("json.py"), b"raise SystemExit('the wrong json')")
        for _ in range(2):
            self.assertIn("not on PATH", self.install())
        self.assertEqual(self.installed("enqueue", "--db", self.path, "-", "-q",
                                        input=b"exit 3")[1], "job-1\n")
        self.assertEqual(self.installed("show", "nope")[0], 1)
        library = self.path_of("of ü'$x/lib/queuectl")
        self.assertEqual(os.listdir(self.path_of("of ü'$x/bin")), ["queuectl"])
        self.assertEqual(sorted(os.listdir(library)), ["__pycache__", "queuectl.py"])
        [cached] = os.listdir(f"{library}/__pycache__")
        cached = f"{library}/__pycache__/{cached}"
        write_bytes(cached, read_bytes(cached)[:16] + marshal.dumps(compile(
            "def main(): print('cached')", "queuectl.py", "exec")))
        self.assertEqual(self.installed("--version")[1], "cached\n")

    def test_an_installed_program_gets_its_signals_and_names_its_launcher(self):
        launcher = self.path_of("of ü'$x/bin/queuectl")
        self.install()
        self.command = lambda *argv: [launcher, "--db", self.path, *argv]
        worker = self.worker()
        self.wait_log(" started: ")
        worker.send_signal(signal.SIGTERM)
        self.assert_ends(worker)
        self.assertIn(f'\nExecStart={queuectl.systemd_word(launcher, True)} --db ',
                      self.installed("systemd")[1])
        self.assertIn(shlex.quote(launcher), self.installed("completion", "bash")[1])

    def test_where_files_cannot_be_written_no_program_is_installed(self):
        self.touch("file")
        code, out, err = self.call("install", "--to", self.path_of("file"))
        self.assertEqual((code, out), (1, ""))
        self.assertRegex(err, r"^queuectl: error: cannot write .*--to\n$")
        self.assertEqual(os.listdir(self.dir), ["file"])

    def test_an_install_warns_of_a_launcher_that_is_not_found_first(self):
        os.mkdir(self.path_of("other"))
        to = self.path_of("of ü'$x/bin")
        for entries, said in (([], r"not on PATH"), ([to + "/"], "^$"),
                              ([self.path_of("other"), to], "comes before")):
            with self.subTest(said):
                self.assertRegex(self.install(env={**os.environ, "PATH": os.pathsep.join(
                    (*entries, "/usr/bin", "/bin"))}), said)
            shutil.copy(to + "/queuectl", self.path_of("other"))

    def test_a_unit_waits_for_the_mounts_of_its_database(self):
        folder = self.path_of('of 100% "\\ $x')
        os.mkdir(folder)
        os.symlink(folder, self.path_of("link"))
        self.path = self.path_of("link/q.db")
        shown = [path.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
                 for path in (self.path_of("link"), os.path.realpath(folder))]
        self.assertIn(f'\nRequiresMountsFor="{shown[0]}" "{shown[1]}"\n', self.cli("systemd")[1])


# ---- Chaos -------------------------------------------------------------------
# Four histories are compared: what clients were told, the ledger that the jobs keep
# outside of the database, the tables of runs and events, and the final states.

# What each job does. Its lines in the ledger are one write each, so they never mix;
# its lock is its own, so the job itself notices two runs at once.
JOB = r"""
id=$QUEUECTL_JOB_ID run=$QUEUECTL_CLAIM
note() { read -r up _ </proc/uptime; echo "$1 $id $run $$ $up" >>ledger; }
exec 9>>"locks/$id"
flock -n 9 || note overlap
[ "$QUEUECTL_QUEUE" != one ] || { exec 8>>locks/.one; flock -n 8 || note crowd; }
IFS=, file=3
for gpu in $CUDA_VISIBLE_DEVICES; do
    unset IFS
    eval "exec $file>>locks/.$gpu"
    flock -n $file || note crowd
    file=$((file + 1))
done
unset IFS
note start
case $1 in
nap)   sleep "$2" ;;
deaf)  trap "" TERM; sleep "$2"; sleep "$2" ;;
away)  setsid -w sleep "$2" ;;
flaky) [ "$QUEUECTL_ATTEMPT" -ge 2 ] || exit 3 ;;
poor)  exit 4 ;;
loud)  head -c 200000 /dev/zero ;;
kid)   exec 3>&- 4>&- 5>&- 8>&- 9>&-; sleep 1 & ;;     # it is to outlive the run, not to hold locks
tree)  if mkdir "locks/$id.began" 2>/dev/null; then
           [ "$2" != deaf ] || trap "" TERM
           setsid sleep 60 & echo ready; sleep 60; sleep 60
       fi ;;
esac
note end
"""
# With that crash limit only its own ends can bury a job, however often workers die.
CHAOS_SETTINGS = {"heartbeat": "300ms", "lease": "2s", "kill-grace": "500ms",
                  "backoff-base": "50ms", "crash-limit": "100000", "max-retries": "99"}
OWN_DOING = ("completed", "failed", "timeout")
# Runs queuectl under a clock that is SHIFT seconds off, the same for a whole round.
CLOCK = """
import mmap, os, struct, sys, time
with open(os.environ["SHIFT"], "rb") as file:
    shared, real = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ), dict(vars(time))
shift = lambda: struct.unpack("d", shared)[0]
time.time = lambda: real["time"]() + shift()
time.time_ns = lambda: real["time_ns"]() + int(shift() * 1e9)
time.clock_gettime = lambda clock: real["clock_gettime"](clock) + (
    shift() if clock == time.CLOCK_REALTIME else 0)
time.localtime = lambda at=None: real["localtime"](time.time() if at is None else at)
time.gmtime = lambda at=None: real["gmtime"](time.time() if at is None else at)
time.strftime = lambda form, at=None: real["strftime"](form, at or time.localtime())
from queuectl import main
sys.exit(main())
"""
NO_FAULT, CLOSED_PIPE, FULL_STDOUT, FULL_STDERR = (
    "no fault", "closed pipes", "full stdouts", "full stderrs")
SIGNALLED = (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT, 130)


class Note(NamedTuple):
    """A line of the ledger."""
    what: str   # start, end, overlap (two runs of a job), crowd (a limit broken, or two
    job: str    # runs on a GPU); in the model also failed, killed
    claim: int
    pid: int
    uptime: float


class Told(NamedTuple):
    """A client's command and what it was told."""
    verb: str           # `purge` may delete the ids, `request` promises nothing
    ids: tuple[str, ...]
    status: int | None  # 0: done, though perhaps not reported; None: killed; else refused
    fault: str = NO_FAULT       # of its output


def raw(path):
    """A database as SQLite alone opens it; each statement is a transaction."""
    return contextlib.closing(sqlite3.connect(path, isolation_level=None))


def read_ledger(directory):
    lines = read_bytes(os.path.join(directory, "ledger")).decode().splitlines()
    return [Note(what, job, int(claim), int(pid), float(up))
            for what, job, claim, pid, up in map(str.split, lines)]


class History:
    """What became of a queue, by its tables, what clients were told, its jobs' ledger.

    Without a ledger the queue may be at work. An exact ledger misses no start and no end.
    """

    def __init__(self, path, told=(), ledger=None, is_exact=False):
        self.path, self.told, self.ledger, self.is_exact = path, told, ledger, is_exact
        with Queue(path, create=False) as queue:
            rows = queue.store.rows
            self.jobs = {job.id: job for job in queue._jobs((), "oldest")}
            self.runs = [queuectl.Run(*row) for row in rows("SELECT * FROM runs ORDER BY claim")]
            self.events = rows('SELECT job, "from", "to" FROM events ORDER BY seq')
            self.ties = (rows("SELECT job, tag FROM tags"),
                         rows("SELECT job, needs FROM dependencies"))
            self.counts = collections.Counter()
            for (_, state), n in queue.store.counts().items():
                self.counts[state] += n
            self.tallies = dict(rows("SELECT kind, SUM(n) FROM tallies "
                                     "WHERE minute = 0 GROUP BY kind"))
            self.integrity = rows("PRAGMA integrity_check")
            self.broken = [message.format(*row) for _, message, rule in queuectl.Sql.RULES
                           for row in rows(rule)]
            self.workers = rows("SELECT name FROM workers")
        self.gone = {id for one in told for id in one.ids if one.verb == "purge"
                     or (one.verb == "delete" and one.status != 1)}

    def violations(self):
        """What breaks a rule; each line begins with the rule's name."""
        rules = [self.caused, self.charged, self.summed, self.tied]
        if self.ledger is not None:
            rules += [self.acknowledged, self.whole, self.started, self.truthful,
                      self.alone, self.numbered, self.stuck]
        return [f"{rule.__name__}: {violation}" for rule in rules for violation in rule()]

    def acknowledged(self):
        """What a client was told has happened, and has not been undone."""
        reached = collections.Counter(
            (seq, "retry" if target == PENDING and source not in (None, PROCESSING)
             else target) for seq, source, target in self.events)

        def has_happened(verb, job):
            state = {"cancel": CANCELLED, "retry": "retry"}.get(verb)
            return verb != "delete" and (state is None or reached[job.seq, state] > 0)
        for told in self.told:
            undone = [id for id in told.ids if told.status == 0 and not (
                has_happened(told.verb, self.jobs[id]) if id in self.jobs
                else told.verb == "delete" or id in self.gone)]
            if undone:
                yield (f"{told.verb} ({told.fault}) was acknowledged, but {len(undone)} "
                       f"of {len(told.ids)} jobs show nothing of it: {undone[:3]}")

    def whole(self):
        """All or none of a batch."""
        for verb, ids, *_ in self.told:
            if verb == "enqueue":
                there = [id for id in ids if id in self.jobs or id in self.gone]
                if len(there) < len(set(ids)) and any(id in self.jobs for id in there):
                    yield f"of {ids} only {there} are there"

    def started(self):
        """Every start has its run; every success an end in the ledger."""
        runs = {run.claim: run for run in self.runs}
        ended = {note.claim for note in self.ledger if note.what == "end"}
        for note in self.ledger:
            job, run = self.jobs.get(note.job), runs.get(note.claim)
            if job and (run is None or run.job != job.seq):
                yield f"{note} has no run"
        for run in self.runs:
            if run.outcome == "completed" and run.claim not in ended:
                yield f"run {run.claim} is completed, but its command never ended"

    def truthful(self):
        """A run is recorded as it ended; what never began is no crash."""
        fates = {note.claim: note.what for note in self.ledger}
        for run in self.runs if self.is_exact else ():
            fate = fates.get(run.claim)
            if {"completed": "end", "failed": "failed"}.get(run.outcome, fate) != fate \
                    or (run.outcome == "lost" and not fate):
                yield f"run {run.claim} of {run.job} is {run.outcome}, but {fate}"

    def alone(self):
        """Never two runs of a job or on a GPU at once, nor two jobs where one is the limit."""
        last = {}
        for note in self.ledger:
            if note.what in ("overlap", "crowd"):
                yield f"{note}"
            before = last.get(note.job)
            if note.what in ("end", "failed") and before and before.claim != note.claim:
                yield f"{note} ended after {before} had started"
            if note.what == "start":
                last[note.job] = note

    def numbered(self):
        """A claim's number is never used twice."""
        starts = collections.Counter(note.claim for note in self.ledger if note.what == "start")
        return [f"claim {claim} was started {n} times" for claim, n in starts.items() if n > 1]

    def caused(self):
        """No state without a cause: the events lead there, by MOVES, run by run."""
        chains, claims = collections.defaultdict(list), collections.Counter(
            run.job for run in self.runs)
        for seq, source, target in self.events:
            chains[seq].append((source, target))
        arrows = {(source, move.target) for move in MOVES.values()
                  for source in move.sources} | {(None, PENDING)}
        for job in self.jobs.values():
            chain = chains[job.seq]
            states = [None] + [target for _, target in chain]
            if [source for source, _ in chain] != states[:-1] \
                    or not set(chain) <= arrows or states[-1] != job.state:
                yield f"{job.id} is {job.state} after {chain}"
            if states.count(PROCESSING) != claims[job.seq]:
                yield f"{job.id} has {claims[job.seq]} runs after {chain}"

    def charged(self):
        """Attempts are ends of the job's own doing, crashes are lost runs."""
        runs, since = collections.defaultdict(list), collections.defaultdict(list)
        for run in self.runs:
            runs[run.job].append(run)
        for seq, source, target in self.events:
            if target == PROCESSING and runs[seq]:
                since[seq].append(runs[seq].pop(0).outcome)
            elif target == PENDING and source not in (None, PROCESSING):
                since[seq] = []     # retried by a user
        for job in self.jobs.values():
            ends = since[job.seq]
            due = (sum(end in OWN_DOING for end in ends), ends.count("lost"))
            if (job.attempts, job.crashes) != due:
                yield f"{job.id}: {job.attempts} attempts, {job.crashes} crashes: {ends}"

    def summed(self):
        """Sum of states = enqueued - deleted; the file is sound."""
        states = [job.state for job in self.jobs.values()]
        if any(self.counts[state] != states.count(state) for state in STATES):
            yield f"counts say {self.counts}"
        if self.tallies.get("enqueue", 0) - self.tallies.get("delete", 0) != len(states):
            yield f"{self.tallies} does not give {len(states)} jobs"
        if self.integrity != [("ok",)]:
            yield f"integrity: {self.integrity}"

    def tied(self):
        """A job is there with all that belongs to it, or not at all."""
        yield from self.broken
        jobs = self.jobs.values()
        wanted = [(job.seq, tag) for job in jobs for tag in job.tags], \
            [(job.seq, self.jobs[id].seq) for job in jobs
             for id in {*job.after, *job.after_any} if id in self.jobs]
        for table, due in zip(self.ties, wanted):
            if sorted(table) != sorted(due):
                yield f"{table} should be {due}"

    def stuck(self):
        """At the end no run is under way, and each waiting job has a reason."""
        for job in self.jobs.values():
            needs = [self.jobs[id].state for over, names in (
                ((COMPLETED,), job.after), (queuectl.OVER, job.after_any)) for id in names
                if id in self.jobs and self.jobs[id].state not in over]
            if job.state == PROCESSING or (job.waits and (job.waits != "blocked" or not needs)):
                yield f"{job.id} is {job.state} (waits {job.waits}, needs {needs})"
        yield from (f"run {run.claim} has no end" for run in self.runs if run.outcome is None)

    def at_end(self):
        """The violations after the last worker: no other and no process is left, too, and
        the file is private.
        """
        mode = os.stat(self.path).st_mode & 0o777
        found = [("workers", self.workers), ("processes", members(os.path.realpath(self.path))),
                 ("mode", oct(mode) if mode != 0o600 else "")]
        return self.violations() + [f"left: {what} {which}" for what, which in found if which]


class Nemesis:
    """A queue, three workers, clients, and all faults that befall them, by a seed."""

    WORKERS, SLOTS = 3, 3
    SIZES = (("--count", "3"), ("--gpus", "gpu-a,gpu-b,gpu-c"), ("--gpus", "gpu-c,gpu-d,gpu-e"))
    FAULTS = {      # how often a second each happens
        "enqueue": 2.4, "change cancel": 0.4, "change retry": 0.4, "change delete": 0.2,
        "sweep": 0.2, "sweep_bulk": 0.3, "kill_worker": 0.9, "freeze_worker": 0.15,
        "signal_worker": 0.15, "hold_lock": 0.05, "kill_job": 0.2, f"spoil {CLOSED_PIPE}": 0.5,
        f"spoil {FULL_STDOUT}": 0.3, f"spoil {FULL_STDERR}": 0.1, "stall_log": 0.3,
        "close_log": 0.1, "jump_clock": 0.3}
    SWEEPS = (      # of a batch that others work on
        ("purge", "delete", "--yes", "--state", "completed"), ("purge", "purge", "--yes"),
        ("request", "cancel", "--yes"), ("request", "retry", "--state", "dead"))
    HELD = ("--queue", "held", "--state", "pending", "--state", "cancelled", "--yes")

    def __init__(self, directory, seed):
        self.dir, self.chance = directory, random.Random(seed)
        for folder in ("locks", "logs"):
            os.makedirs(os.path.join(directory, folder))
        for name, text in (("job.sh", JOB), ("clock", CLOCK), ("shift", "\0" * 8)):
            write_bytes(os.path.join(directory, name), text.encode())
        self.path = os.path.join(directory, "queue.db")
        self.env = {**os.environ, "PYTHONPATH": os.path.dirname(MODULE),
                    "QUEUECTL_DB": self.path, "SHIFT": os.path.join(directory, "shift")}
        self.workers, self.clients, self.fault = [], [], NO_FAULT
        self.hurt = set()       # names of those that were killed or frozen: they may lose runs
        self.muted = set()      # and of those whose log may have gaps
        self.bulk, self.steps = ("none",), []       # many ids, and what to do with them
        self.told, self.ids, self.later = [], [], []
        self.done = collections.Counter()       # faults that happened, by name
        self.strange = []                       # what no fault explains
        with Queue(self.path) as queue:
            for key, value in CHAOS_SETTINGS.items():
                queue.configure(key, value)
            queue.pause("held")
            queue.limit_queue("one", 1)
        self.db = sqlite3.connect(self.path, timeout=5, isolation_level=None)

    def start(self, *argv, **options):
        """A queuectl in a session of its own, by the shifted clock."""
        return subprocess.Popen([sys.executable, "clock", *argv], cwd=self.dir,
                                env=self.env, start_new_session=True, **options)

    def start_worker(self):
        """It logs into a file, or into a FIFO that is read into one."""
        self.done["workers"] += 1
        name = f"w{self.done['workers']}"
        log = sink = os.path.join(self.dir, "logs", name)
        reader = None
        if self.chance.random() < 0.5:
            sink += ".fifo"
            os.mkfifo(sink)
            reader = os.open(sink, os.O_RDONLY | os.O_NONBLOCK)
        with open(sink, "ab", buffering=0) as stderr:
            process = self.start("worker", "start", *self.chance.choice(self.SIZES),
                                 "--name", name, stderr=stderr)
        self.workers.append(types.SimpleNamespace(
            name=name, process=process, log=log, reader=reader, is_stalled=False))

    def drain(self, worker):
        """Copy what is in a FIFO."""
        with contextlib.suppress(BlockingIOError), open(worker.log, "ab") as file:
            while piece := os.read(worker.reader, 65536):
                file.write(piece)

    def judge_worker(self, worker):
        """A worker in charge ends well or by kill -9; before and after, also by signals.

        A log with gaps does not tell when the worker was in charge.
        """
        self.workers.remove(worker)
        name, status = worker.name, worker.process.returncode
        if worker.reader is not None:
            self.drain(worker)
            os.close(worker.reader)
        log, refusals = re.subn("queuectl: error: worker .* uses GPU .*", "",
                                read_bytes(worker.log).decode(errors="replace"))
        self.done["refused workers"] += refusals
        is_muted, started = name in self.muted, f"worker {name} started" in log
        in_charge = started and not is_muted and f"worker {name} stopped" not in log
        fitting = [0, -signal.SIGKILL, *([1, *SIGNALLED] if name in self.hurt else [])]
        if not in_charge:
            # Python's own words for a SIGINT before ours are loaded; 1 is its own, too.
            # A later signal, or a gap, cuts them off.
            log, interrupts = re.subn(
                r"(?s)(?:Fatal Python error: init_import_site[^\n]*\n[^\n]*\n)?"
                r"Traceback (?:(?!queuectl.py\", line \d+, in main).)*?"
                rf"(?:\nKeyboardInterrupt\n{'|$(?!.)' if status < 0 or is_muted else ''})",
                "", log)
            fitting += [*SIGNALLED, *(128 - one for one in SIGNALLED),
                        *([1] if interrupts or refusals or (is_muted and not started) else [])]
        if status not in fitting:
            self.strange.append(f"worker {name} ended with {status}")
        self.strange += [f"{name}: {line}" for line in log.splitlines()
                         if "Traceback" in line or "itself failed" in line
                         or ("rror:" in line and name not in self.hurt)]

    def after(self, seconds, action):
        self.later.append((time.monotonic() + seconds, action))

    def run(self, seconds):
        """Let them work under faults for so long, then in peace; the violations."""
        end, strike_at = time.monotonic() + seconds, 0.0
        names, rates = zip(*self.FAULTS.items())
        while time.monotonic() < end:
            self.tend()
            if time.monotonic() >= strike_at:
                strike_at = time.monotonic() + self.chance.expovariate(sum(rates))
                name, *what = self.chance.choices(names, rates)[0].split(" ", 1)
                getattr(self, name)(*what)
            time.sleep(0.005)
        return self.finish()

    def tend(self):
        """Start missing workers, do what is due, read logs and replies."""
        for item in [item for item in self.later if item[0] <= time.monotonic()]:
            self.later.remove(item)
            item[1]()
        for worker in [*self.workers]:
            if worker.reader is not None and not worker.is_stalled:
                self.drain(worker)
            if worker.process.poll() is not None:
                self.judge_worker(worker)
        while len(self.workers) < self.WORKERS:
            self.start_worker()
        for client in [client for client in self.clients if client[0].poll() is not None]:
            self.clients.remove(client)
            self.judge_client(*client)

    # Clients: many of them are killed at some moment of their short lives.

    def client(self, verb, ids, *argv, text=b""):
        fault, self.fault = self.fault, NO_FAULT
        outputs = [subprocess.DEVNULL, subprocess.PIPE]
        if fault == CLOSED_PIPE:
            reader, sink = os.pipe()
            size = self.chance.choice((0, 1, 10_000))
            threading.Thread(target=lambda: (os.read(reader, size), os.close(reader)),
                             daemon=True).start()
        else:       # or a full disk
            sink = os.open(os.devnull if fault == NO_FAULT else "/dev/full", os.O_WRONLY)
        outputs[fault == FULL_STDERR] = sink
        process = self.start(*argv, *["--json"] * (fault != NO_FAULT), stdin=subprocess.PIPE,
                             stdout=outputs[0], stderr=outputs[1])
        os.close(sink)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(text)
            process.stdin.close()
        self.clients.append((process, verb, tuple(ids), fault))
        self.done["clients"] += 1
        if self.chance.random() < (0.5 if fault == NO_FAULT else 0.2):
            self.after(self.chance.uniform(0.02, 0.16), lambda: self.kill(process))

    def judge_client(self, process, verb, ids, fault):
        said, status = "", process.returncode
        if process.stderr:
            said = process.stderr.read().decode()
            process.stderr.close()
        if status == -signal.SIGKILL:
            status = None
        elif status not in (0, 1) or "Traceback" in said or "locked" in said \
                or (fault == FULL_STDOUT and status == 0):
            self.strange.append(f"{verb} {ids[:9]} ({fault}) ended with {status}: {said}")
        elif fault == FULL_STDOUT and re.search("unwritable|not be written", said):
            status = 0
        self.told.append(Told(verb, ids, status, fault))
        if ids == self.bulk and status == 0:
            self.judge_bulk(verb, fault)
        elif ids == self.bulk and verb == "enqueue":
            self.steps = ["delete"]     # all of them may be there

    def judge_bulk(self, verb, fault):
        """An acknowledged step has changed every job.

        The next step hides a job that this one missed, so the histories do not show it.
        """
        state = {"cancel": CANCELLED, "delete": None}.get(verb, PENDING)
        found = self.db.execute("SELECT state, COUNT(*) FROM jobs WHERE queue = 'held' "
                                "GROUP BY state").fetchall()
        if found != [(state, len(self.bulk))] * (state is not None):
            self.strange.append(f"bulk: {verb} ({fault}) of {len(self.bulk)} jobs was "
                                f"acknowledged, but left {found}")
            self.steps[1:] = ["delete"]
        self.steps.pop(0)

    def kill(self, process):
        """kill -9, the whole group or the process alone."""
        if process.poll() is None:
            self.done["kills"] += 1
            send = os.killpg if self.chance.random() < 0.2 else os.kill
            send(process.pid, signal.SIGKILL)

    def enqueue(self):
        batch = f"b{self.done['clients']}"
        ids = [f"{batch}-{n}" for n in range(self.chance.randint(1, 9))]
        lines = [json.dumps(self.job(ids, n)) for n in range(len(ids))]
        self.ids += ids
        self.client("enqueue", ids, "enqueue", "-q", "-", text="\n".join(lines).encode())

    def job(self, ids, n):
        """A job of a batch: how it behaves, and at times what it waits for."""
        chance = self.chance
        how = chance.choice(("quick", "quick", "nap", "nap", "deaf", "away", "flaky",
                             "poor", "loud", "kid"))
        job = {"id": ids[n], "command": f"sh job.sh {how} {chance.uniform(0, 0.8):.2f}",
               "tags": [ids[n].split("-")[0]],
               "priority": chance.randint(-2, 2), "cwd": self.dir,
               "slots": chance.choice((1, 1, 1, 1, 2, self.SLOTS)),
               "queue": chance.choice(("default", "default", "other", "one"))}
        if how == "poor":
            job["max_retries"] = 2
        if how in ("poor", "flaky") and chance.random() < 0.3:
            job["backoff_base"] = 1
        if n and chance.random() < 0.2:
            job["after"] = [ids[chance.randrange(n)]]
        if chance.random() < 0.2:
            job["delay"] = round(chance.uniform(0, 2), 2)
        return job

    def some_id(self):
        return self.chance.choice(self.ids[-60:] or ["none"])

    def change(self, verb=None):
        verb, job_id = verb or self.chance.choice(("cancel", "retry", "delete")), self.some_id()
        self.client(verb, [job_id], verb, job_id)

    def sweep(self):
        """Change a batch on which workers and other clients act: it promises no state."""
        tag = self.some_id().split("-")[0]
        verb, *argv = self.chance.choice(self.SWEEPS)
        ids = [id for id in self.ids if id.startswith(f"{tag}-")] * (verb == "purge")
        self.client(verb, ids, *argv, "--tag", tag, "--json")
        self.done["sweeps"] += 1

    def sweep_bulk(self):
        """Take, or repeat, the next step with more jobs than a sweep changes at once.

        Their queue is paused, so no worker or other client changes them.
        """
        if any(client[2] == self.bulk for client in self.clients):
            return
        if not self.steps:
            self.done["bulks"] += 1
            self.bulk = tuple(f"bulk{self.done['bulks']}-{n}" for n in range(
                self.chance.randint(SWEEP_BATCH + 10, 2 * SWEEP_BATCH + 50)))
            self.steps = ["enqueue", "cancel", "retry", "delete"]
        verb = self.steps[0]
        yes = ["--yes"] * (verb == "cancel")
        argv, text = [verb, "--queue", "held", *yes, "--json"], ""
        if verb == "enqueue":
            argv = ["enqueue", "--queue", "held", "-q", "-"]
            text = "\n".join(json.dumps({"id": id, "command": "true"}) for id in self.bulk)
        elif verb == "delete":
            argv = [self.chance.choice(("delete", "purge")), *self.HELD, "--json"]
        self.client(verb, self.bulk, *argv, text=text.encode())
        self.done["sweeps"] += verb != "enqueue"

    def spoil(self, fault):
        """Spoil the output of the next client."""
        self.fault = fault
        self.done[fault] += 1
        self.chance.choice((*[self.sweep_bulk] * 6, self.sweep, self.enqueue,
                            *[self.change] * 3))()

    # Faults.

    def strike(self, fault, *pids, number=signal.SIGKILL):
        self.done[fault] += 1
        kill(*pids, number=number)

    def some_worker(self):
        """(one that runs, its own process), or (None, 0)."""
        worker = self.chance.choice(self.workers)
        own = child_of(worker.process.pid) if worker.process.poll() is None else None
        return (worker, own) if own else (None, 0)

    def mute(self, fault):
        """A worker whose log was read without a gap, which ends now; or None."""
        worker = self.chance.choice([one for one in self.workers if one.reader is not None
                                     and one.name not in self.muted] or [None])
        if worker:
            self.done[fault] += 1
            self.muted.add(worker.name)
        return worker

    def stall_log(self):
        """Fill the FIFO of a worker, and read it again some time later, or never."""
        worker = self.mute("stalled logs")
        if worker:
            worker.is_stalled = True
            fifo = os.open(f"{worker.log}.fifo", os.O_WRONLY | os.O_NONBLOCK)
            with contextlib.suppress(BlockingIOError):
                while os.write(fifo, b"." * 65536):
                    pass
            os.close(fifo)
            if self.chance.random() < 0.6:
                self.after(self.chance.uniform(0.5, 6),
                           lambda: setattr(worker, "is_stalled", False))

    def close_log(self):
        worker = self.mute("closed logs")
        if worker:
            os.close(worker.reader)
            worker.reader = None

    def jump_clock(self):
        self.done["clock jumps"] += 1
        size = self.chance.choice((5, 300, 7200, 366 * 86400))
        with open(self.env["SHIFT"], "r+b", buffering=0) as file:
            file.write(struct.pack("d", self.chance.uniform(-size, size)))

    def kill_worker(self):
        """kill -9: the worker, its supervisor, or both at once."""
        worker, own = self.some_worker()
        if worker:
            self.hurt.add(worker.name)
            how = self.chance.choice(("worker", "supervisor", "both"))
            if how == "both":
                worker.process.send_signal(signal.SIGSTOP)
            self.strike(f"kills of {how}", *[own] * (how != "supervisor"),
                        *[worker.process.pid] * (how != "worker"))

    def freeze_worker(self):
        worker, own = self.some_worker()
        if worker:
            self.hurt.add(worker.name)
            pids = [own, worker.process.pid][:self.chance.choice((1, 2))]  # or both, as by Ctrl+Z
            self.strike("freezes", *pids, number=signal.SIGSTOP)
            self.after(self.chance.uniform(0.1, 5), lambda: kill(*pids, number=signal.SIGCONT))

    def signal_worker(self):
        """As Ctrl+C and its kin, to the whole group; at times twice."""
        process = self.chance.choice(self.workers).process
        number = self.chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        for _ in range(self.chance.choice((1, 1, 2))):
            if process.poll() is None:
                self.done["signals"] += 1
                os.killpg(process.pid, number)

    def hold_lock(self):
        if not self.db.in_transaction:
            with contextlib.suppress(sqlite3.OperationalError):
                self.db.execute("BEGIN IMMEDIATE")
                self.done["locks"] += 1
                self.after(self.chance.uniform(0.1, 2.5), self.db.rollback)

    def kill_job(self):
        """A signal to the group of a job that runs: its own doing, as far as we know."""
        running = [note.pid for note in read_ledger(self.dir)[-20:] if b"QUEUECTL_CLAIM=%d\0"
                   % note.claim in queuectl._read(f"/proc/{note.pid}/environ")]
        with contextlib.suppress(ProcessLookupError, IndexError):
            os.killpg(os.getpgid(running[-1]),
                      self.chance.choice((signal.SIGTERM, signal.SIGKILL)))
            self.done["job signals"] += 1

    # Peace.

    def finish(self):
        """No more faults: all that is left must come to its end."""
        for _, action in self.later:
            action()
        self.later = []
        self.db.rollback()
        try:
            wait_for(lambda: self.tend() or not self.clients, "the clients", 60)
            self.start("delete", *self.HELD, stderr=subprocess.DEVNULL).wait(DEADLINE)
            self.told.append(Told("delete", self.bulk, 0))
            wait_for(lambda: self.tend() or not self.db.execute(
                "SELECT 1 FROM jobs WHERE claim IS NOT NULL OR waits IN ('ready', 'scheduled')"
            ).fetchall(), "the queue's end", 60)
        except (AssertionError, subprocess.TimeoutExpired) as error:
            self.strange.append(str(error))
        for worker in self.workers:
            worker.process.terminate()
        for worker in [*self.workers]:
            try:
                worker.process.wait(DEADLINE)
            except subprocess.TimeoutExpired:
                self.strange.append(f"worker {worker.name} does not stop")
                worker.process.kill()
                worker.process.wait()
            self.judge_worker(worker)
        self.strange += [
            f"excused: run {claim} of {name} is lost, but that worker was not killed or frozen"
            f"{', only its log' if name in self.muted else ''}" for claim, name in
            self.db.execute("SELECT claim, worker FROM runs WHERE outcome = 'lost'")
            if name not in self.hurt]
        self.db.close()
        return self.strange + History(self.path, self.told, read_ledger(self.dir)).violations()


NEEDS_SHELL_TOOLS = unittest.skipUnless(
    all(map(shutil.which, ("flock", "setsid")))
    and all(map(os.path.exists, ("/proc/uptime", "/dev/full"))), "needs flock, setsid and /proc")


def chaos_round(directory, seconds, seed):
    """One round: (violations, faults and jobs by name)."""
    nemesis = Nemesis(directory, seed)
    violations = nemesis.run(seconds)
    with Queue(nemesis.path, create=False) as queue:
        runs = queue.store.row("SELECT COUNT(*), SUM(outcome = 'lost') FROM runs")
        return violations, nemesis.done + collections.Counter(
            jobs=sum(queue.counts().values()), runs=runs[0], lost=runs[1] or 0)


def verdict(violations, *places):
    """Print it, and what is kept of these directories; 0 or 1."""
    for place in places:
        if violations:
            print(f"kept: {place}")
        else:
            shutil.rmtree(place, True)
    print(f"verdict: {f'{violations} VIOLATIONS' if violations else 'all promises kept'}")
    return int(violations > 0)


@NEEDS_SHELL_TOOLS
class Chaos(Case):
    def test_a_few_seconds_of_it_break_no_promise(self):
        violations, done = chaos_round(self.path_of("round"), 5, "small")
        self.assertEqual(violations, [])
        self.assertGreater(min(done["kills"], done["runs"]), 0)


# ---- Places ------------------------------------------------------------------
# Moments at which a process dies, and mutants, are found by names in the syntax tree.

@functools.cache
def module_tree():
    return ast.parse(inspect.getsource(queuectl))


def definition(name, tree):
    """The class, function or method of that name."""
    for part in name.split("."):
        [tree] = [node for node in tree.body if getattr(node, "name", "") == part]
    return tree


def places(parent):
    """(field, holder, key) of each node right below: `holder[key]` is the node."""
    for field, value in ast.iter_fields(parent):
        holder, keys = (value, range(len(value))) if isinstance(value, list) \
            else (vars(parent), [field])
        for key in keys:
            if isinstance(holder[key], ast.AST):
                yield field, holder, key


def is_named(node, name):
    """Whether it is that name, by itself or as an attribute of something."""
    return isinstance(node, (ast.Name, ast.Attribute)) \
        and f".{ast.unparse(node)}".endswith(f".{name}")


def uses(node, name):
    return any(is_named(one, name) for one in ast.walk(node))


def uses_itself(statement, name):
    """Whether a statement uses a name other than in the statements within it."""
    return any(uses(one, name) for one in ast.iter_child_nodes(statement)
               if not isinstance(one, (ast.stmt, ast.ExceptHandler)))


def statements_of(node):
    """The statements within one, in their order, but for those that handle errors."""
    for field in ("body", "orelse", "finalbody"):
        for one in getattr(node, field, ()):
            yield one
            yield from statements_of(one)


def line_of(function, side, name):
    """The line met before, or after, a function uses a name for the first time."""
    statements = list(statements_of(definition(function, module_tree())))
    n = next(n for n, one in enumerate(statements) if uses_itself(one, name))
    return statements[n + (side == "after")].lineno


class Lines:
    """How often this process meets each line of the module; its forks tell by a file.

    `die` is called when it meets a line, and for that time, that is fatal.
    """

    def __init__(self, path, fatal=(0, 0), die=None):
        self.path, self.fatal, self.die = path, fatal, die
        self.hits, self.leave = collections.Counter(), os._exit

    def trace(self, frame, event, arg):
        code, line = frame.f_code, frame.f_lineno
        if code.co_filename != MODULE or code.co_name == "<lambda>":
            return None     # a lambda's line is met already when it is made or passed
        if event == "line":
            self.hits[line] += 1
            if line == self.fatal[0] and self.hits[line] == self.fatal[1]:
                self.die()
        return self.trace

    def save_and_leave(self, status):
        sys.settrace(None)
        with open(self.path, "a") as file:
            file.write("".join(f"{line} {n}\n" for line, n in self.hits.items()))
        self.leave(status)

    def __enter__(self):
        write_bytes(self.path, b"")
        os._exit = self.save_and_leave      # of a worker, the child of its supervisor
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        return self

    def __exit__(self, *_):
        sys.settrace(None)
        threading.settrace(None)
        os._exit = self.leave
        for told in read_bytes(self.path).splitlines():
            line, n = map(int, told.split())
            self.hits[line] = max(n, self.hits[line])


def recompiled(owner, tree):
    """(a function of the module, or of a class, that one made from the tree)."""
    tree.decorator_list = []
    body = ast.parse(f"class {owner.__name__}: pass" if isinstance(owner, type) else "")
    (body.body[0] if body.body else body).body = [tree]
    space = dict(vars(queuectl))
    exec(compile(body, MODULE, "exec", annotations.compiler_flag, True), space)
    return [inspect.unwrap(getattr(one, "fget", None) or getattr(one, "__func__", one)) for one in (
        vars(owner)[tree.name],
        space[tree.name] if owner is queuectl else vars(space[owner.__name__])[tree.name])]


# ---- Model -------------------------------------------------------------------
# The same rules, driven in memory: two workers, clients and a nemesis take steps in an
# order drawn from a seed, under clocks that only the model moves. The checker must find
# that a guard is missing.

class ModelWorker:
    """What `Runner` does, step by step: it ticks, starts, obeys, watches, rescues."""

    def __init__(self, world, name):
        self.world, self.chance = world, world.chance
        self.claims = queuectl.Claims(world.queue, WorkerOptions(slots=2, name=name))
        self.id = self.claims.worker.id
        self.peers = queuectl.Peers(world.queue, self.id)
        self.pid = world.enter(self)
        self.state, self.beat_at = "alive", world.mono
        self.waiting, self.running, self.ended = [], {}, {}     # claims, processes, outcomes
        self.why = {}                                       # claim: why it is being ended
        self.rescues, self.seized, self.over, self.dead = {}, [], [], []    # lost runs

    def tick(self):
        """A tick; at times its commit fails, or a command exits meanwhile."""
        for _ in range(len(self.waiting)):      # mostly, they have started before
            if self.chance.random() < 0.7:
                self.start()
        for claim in list(self.waiting):        # at times, spares find no slot
            if not claim.slot and self.chance.random() < 0.3:
                self.waiting.remove(claim)
                self.end_unbegun(claim, "released")
        busy = {claim.number for claim in self.waiting} | set(self.running)
        spares = self.chance.choice((0, 0, 1, 2))
        report = queuectl.Report(
            dict(self.ended), tuple(self.over), tuple(self.seized), tuple(self.dead),
            is_heartbeat=self.chance.random() < 0.9)
        tick = self.claims.tick(report, [*range(1, 3 - len(busy)), *[0] * spares])
        claimed = {claim.number for claim in tick.claims}
        if self.chance.random() < 0.05:
            self.claims.failed(tick)
            self.world.held -= claimed
            return
        self.claims.commit()
        self.reap()
        if self.chance.random() < 0.02:         # committed, and dead before it knows
            self.world.held -= claimed
            self.die()
            return
        self.claims.committed(tick, report)
        self.ended = {claim: outcome for claim, outcome in self.ended.items()
                      if claim not in report.ended}
        self.beat_at = self.world.mono if report.is_heartbeat else self.beat_at
        for job in (claim.job for claim in tick.claims):
            if job.run_at > queuectl.iso(self.world.peaks[job.id]):
                self.world.broken.append(f"punctual: {job.id} before {job.run_at}")
            if self.world.queue.job(job.id).unmet:
                self.world.broken.append(f"ordered: {job.id} before {job.after}")
        self.waiting += tick.claims
        self.rescues.update((run.claim, (run, signal.SIGTERM)) for run in report.seized)
        self.over, self.dead = self.over[len(report.lost):], []
        self.seized = self.seized[len(report.seized):]
        for claim in busy - self.ended.keys():
            asked = tick.mine.get(claim, queuectl.LOST)
            if asked is not None:
                self.why.setdefault(claim, queuectl.STOPPED if asked == queuectl.CANCEL else asked)
                if claim in self.running:
                    self.world.signal(self.world.pid_of(claim), signal.SIGTERM)

    def end_unbegun(self, claim, kind):
        self.world.held.discard(claim.number)
        self.ended[claim.number] = Outcome(kind)

    def start(self):
        if self.waiting and len(self.running) < 2:
            claim = self.waiting.pop(0)
            if not claim.slot:
                claim = self.claims.begin(claim, 1)
            if claim.number in self.why:
                self.end_unbegun(claim, "released")
            else:
                self.running[claim.number] = self.world.start(claim)

    def reap(self):
        for claim, process in list(self.running.items()):
            if process.fate is not None:
                del self.running[claim]
                size = 9 if claim % 10 else 20_000
                kind = "completed" if process.fate == "done" else "failed"
                if process.fate == "killed":
                    kind = self.why.get(claim, "failed")
                self.ended[claim] = Outcome(
                    kind, int(kind != "completed"), None, 0.1, b"x" * size, size)
            elif claim in self.why:
                self.world.signal(self.world.pid_of(claim), signal.SIGKILL)

    def watch(self):
        with mock.patch.object(queuectl.time, "monotonic", lambda: self.world.mono):
            self.peers.look()
        known = {*self.rescues, *(run.claim for run in (*self.over, *self.seized))}
        for run in self.peers.lost():
            if run.claim not in known:
                self.world.check_suspicion(run)
                self.seized.append(run)
        self.dead = self.peers.dead()

    def rescue(self):
        """As a supervisor: ask what each lost run has left to end, then kill it."""
        for claim, (run, number) in list(self.rescues.items()):
            self.rescues[claim] = run, signal.SIGKILL
            left = self.world.holders(claim)
            for pid in left:
                self.world.signal(pid, number)
            if not left:
                del self.rescues[claim]
                self.over.append(run)

    def die(self):
        """kill -9: its supervisor ends its processes, or was killed as well: then they
        live on, and the locks that they have inherited.
        """
        self.state = "dead"
        self.world.held -= {claim.number for claim in self.waiting}
        self.waiting = []
        if self.chance.random() < 0.5:
            for claim in self.running:
                self.world.signal(self.world.pid_of(claim), signal.SIGKILL)

    def round(self):
        for step in (self.reap, self.tick, self.start, self.start, self.watch, self.rescue):
            if self.state == "alive":
                step()


class World:
    """Clocks, kernel, workers and clients of one episode; also the queue's `Host`."""

    name, boot = "model", "boot"
    STEPS = {   # how often each happens, relative to the others
        "time": 8, "enqueue": 6, "tick": 8, "start": 6, "exit": 6, "rescue": 4, "cancel": 2,
        "retry": 2, "delete": 1, "purge": 1, "die": 1, "freeze": 1.5, "thaw": 0.4, "jump": 1,
        "suspend": 0.5}

    def __init__(self, path, seed):
        self.chance = random.Random(seed)
        self.mono, self.wall, self.latest = 0.0, NOON, NOON
        self.held, self.processes, self.workers = set(), {}, {}
        self.told, self.ledger, self.broken, self.ids = [], [], [], []
        self.peaks = {}     # job: the latest time that the clock has shown since enqueued
        self.steps, self.is_nested = 0, False
        self.locks = self
        self.queue = Queue(path, clock=lambda: self.wall, host=self)
        self.settings = self.queue.store.settings()
        with self.queue.store.transaction() as store:
            store.do("INSERT INTO queues VALUES ('one', 0, 1)", {})

    def enter(self, worker):
        pid = 1000 + worker.id
        with self.queue.store.transaction() as store:
            store.do("UPDATE workers SET pid = :pid WHERE id = :id", {"pid": pid, "id": worker.id})
        worker.claims.worker = worker.claims.worker._replace(pid=pid)
        self.workers[worker.id] = worker
        return pid

    def hold(self, offset):
        if offset < queuectl.WORKER_LOCKS:
            self.held.add(offset)
        return -1

    def close(self):
        pass

    def pid_of(self, claim):
        return 100_000 + claim

    def born(self, pid):
        return "then"

    def is_alive(self, worker):
        found = self.workers.get(worker.id)
        return found is not None and found.state != "dead"

    def is_held(self, offset):
        return offset in self.held

    def process_of(self, run):
        return 0 if run.claim in self.processes else None

    def holders(self, claim):
        """The processes of a run, or who is about to start it, by its lock."""
        if claim not in self.held:
            return []
        process = self.processes.get(claim)
        if process and process.fate is None:
            return [self.pid_of(claim)]
        return [worker.pid for worker in self.workers.values()
                if claim in [one.number for one in worker.waiting]]

    def signal(self, pid, number):
        if pid < 100_000:
            if number == signal.SIGKILL:
                self.workers[pid - 1000].die()
            return
        process = self.processes[pid - 100_000]
        if process.fate is None and (number == signal.SIGKILL or not process.is_deaf):
            self.over(process, "killed")

    def over(self, process, fate):
        process.fate = fate
        self.held.discard(process.claim)
        self.note("end" if fate == "done" else fate, process.job, process.claim)

    def note(self, what, job, claim):
        self.ledger.append(Note(what, job.id, claim, 0, self.mono))

    def start(self, claim):
        job, alive = claim.job, self.running()
        if any(process.job.id == job.id for process in alive):
            self.note("overlap", job, claim.number)
        if job.queue == "one" and any(process.job.queue == "one" for process in alive):
            self.note("crowd", job, claim.number)
        self.note("start", job, claim.number)
        # `fate`: done or failed by itself, killed by a signal.
        self.processes[claim.number] = types.SimpleNamespace(
            job=job, claim=claim.number, is_deaf=self.chance.random() < 0.3, fate=None)
        self.held.add(claim.number)
        return self.processes[claim.number]

    def running(self):
        return [process for process in self.processes.values() if process.fate is None]

    def check_suspicion(self, run):
        """A run is taken from a worker: that one is gone, or silent for a lease."""
        worker = self.workers[run.worker_id]
        if worker.state != "dead" and self.mono - worker.beat_at < self.settings.lease:
            self.broken.append(f"excused: run {run.claim} of a worker that is "
                               f"{worker.state}")

    def run(self, steps):
        """Take so many steps, then come to an end in peace; the violations."""
        for name in self.chance.choices([*self.STEPS], [*self.STEPS.values()], k=steps):
            self.steps += 1
            self.staff()
            self.aim()
            if name in ("start", "rescue", "die"):
                self.some_worker(getattr(ModelWorker, name))
            elif name in ("cancel", "retry", "delete"):
                self.ask(name)
            else:
                getattr(self, "step_" + name)()
        self.peace()
        self.queue.close()
        return self.broken + History(
            self.queue.path, self.told, self.ledger, is_exact=True).violations()

    def staff(self):
        while sum(worker.state != "dead" for worker in self.workers.values()) < 2:
            ModelWorker(self, f"worker{len(self.workers)}")

    def alive(self):
        return [worker for worker in self.workers.values() if worker.state == "alive"]

    def some_worker(self, act):
        worker = self.chance.choice(self.alive() or [None])
        if worker:
            act(worker)

    def step_time(self, seconds=None):
        """Time goes by, and each living worker does all that it has to."""
        seconds = self.chance.uniform(0, 6) if seconds is None else seconds
        self.mono += seconds
        self.set_clock(self.wall + seconds)
        for worker in self.alive():
            worker.round()

    def set_clock(self, wall):
        self.wall, self.latest = wall, max(wall, self.latest)
        self.peaks = {job: max(peak, wall) for job, peak in self.peaks.items()}

    def step_jump(self):
        self.set_clock(self.wall + self.chance.choice((-86400, -3600, 3600, 86400)))

    def step_suspend(self):
        """The machine sleeps for minutes: nobody is to blame."""
        self.mono += 600
        self.set_clock(self.wall + 600)
        for worker in self.workers.values():
            worker.beat_at += 600

    def step_tick(self):
        for worker in self.alive()[:1] if self.chance.random() < 0.5 else self.alive()[1:]:
            worker.reap()
            worker.tick()

    def choose_early(self, claims, free):
        """For a mutant: what is chosen before the other workers tick, too."""
        claims.early = claims._choose(free)
        if not self.is_nested:
            self.is_nested = True
            for worker in self.alive():
                if worker.claims is not claims:
                    worker.tick()
            self.is_nested = False
        return claims._store

    def step_exit(self):
        if self.running():
            self.over(self.chance.choice(self.running()),
                      self.chance.choice(("done", "done", "failed")))

    def step_freeze(self):
        """At the worst of moments, if one is there: between a claim and its start."""
        between = [worker for worker in self.alive() if worker.waiting]
        if between:
            between[0].state = "frozen"
        else:
            self.some_worker(lambda worker: setattr(worker, "state", "frozen"))

    def aim(self):
        """Thaw at the worst of moments: a rescuer is at work, or has just been; and let
        the lease of a worker that is frozen between a claim and its start run out.
        """
        if any(worker.state == "frozen" and worker.waiting for worker in self.workers.values()) \
                and self.chance.random() < 0.3:
            self.step_time(5)
        for worker in self.workers.values():
            if worker.state == "frozen" and self.chance.random() < 0.7 and (
                    any(process.fate == "killed" for process in worker.running.values())
                    or any(process.job.id == claim.job.id for claim in worker.waiting
                           for process in self.running())):
                worker.state = "alive"

    def step_thaw(self):
        for worker in self.workers.values():
            if worker.state == "frozen":
                worker.state = "alive"

    def tell(self, verb, ids, action):
        try:
            jobs = action()
            self.told.append(Told(verb, tuple(ids), 0))
            return jobs
        except queuectl.QueueError:
            self.told.append(Told(verb, tuple(ids), 1))
            return []

    def step_enqueue(self):
        ids, jobs = [f"j{self.steps}-{n}" for n in range(self.chance.randint(1, 3))], []
        for n, one in enumerate(ids):
            others = ids[:n] + self.ids[-4:]
            jobs.append(Job(
                command="x", id=one, priority=self.chance.randint(-1, 1), cwd="/",
                queue=self.chance.choice(("default", "one")),
                run_at=queuectl.iso_up(self.wall + self.chance.choice((0, 0, 0, 2, 10, 4000))),
                expires_at=queuectl.iso_up(self.wall + self.chance.choice((1, 5)))
                if self.chance.random() < 0.05 else None,
                **{self.chance.choice(("after", "after_any")): tuple(
                    self.chance.sample(others, 1))}
                if self.chance.random() < 0.4 and others else {}))
        self.ids += [job.id for job in self.tell(
            "enqueue", ids, lambda: self.queue.enqueue_many(jobs))]
        self.peaks.update((one, self.wall) for one in ids)

    def ask(self, verb):
        job_id = self.chance.choice(self.ids[-12:] or ["none"])
        jobs = self.tell("wish" if verb == "cancel" else verb, [job_id],
                         lambda: getattr(self.queue, verb)(job_id))
        if verb == "cancel":    # what runs its worker ends first
            self.told += [Told(verb, (job_id,), 0) for job in jobs if job.state == CANCELLED]

    def step_purge(self):
        self.told.append(Told("delete", tuple(swept(self.queue, "delete", DEAD)), 0))

    def peace(self):
        """No faults any more: within bounded time all must be over."""
        self.step_thaw()
        self.set_clock(self.latest + 4000)     # no delay is longer
        for _ in range(400):
            self.staff()
            self.step_time(1)
            for process in self.processes.values():
                if process.fate is None and not process.is_deaf:
                    self.over(process, "done")
                process.is_deaf = False
            if not self.queue.store.rows("SELECT 1 FROM jobs WHERE claim IS NOT NULL OR "
                                         "waits IN ('ready', 'scheduled') LIMIT 1"):
                return


# Each guard: the rule of the checker that must find out that it is missing, and changes:
# a statement of Sql, a clause and what stands there instead; or a function and
#     NAME         the statements that use it are left out,
#     name NAME    an expression takes its place,
#     call NAME    that of a call of it,
#     if NAME      that of the test that uses it.
MUTANTS = (
    ("numbered", "a claim's number is used again", (
        "COUNTERS", "SELECT jobs, runs,",
        "SELECT jobs, (SELECT COALESCE(MAX(claim), 0) FROM runs),")),
    ("excused", "time in which nobody looked counts for the lease", (
        "Heartbeats.look", "if lease", "False")),
    ("charged", "a crash is charged as an attempt", ("settle", "if LOST", "False")),
    ("truthful", "a run that a rescuer ended counts as failed", (
        "Ledger.record", "call judged", "outcome")),
    ("caused", "a change of state without its event", (
        "Ledger._add_events", "INSERT_EVENT", "")),
    ("summed", "the counters are not kept", ("Ledger.move", "count", "")),
    ("punctual", "a job is due at once", ("waits_of", "name SCHEDULED", "READY")),
    ("ordered", "a job does not wait for those it comes after", (
        "waits_of", "if unmet", "False")),
    ("stuck", "jobs stay blocked when what they wait for is completed", (
        "Ledger.move", "_unblock", "")),
    ("acknowledged", "a cancelled job is not moved", (
        "Queue._cancel", "call move",
        "[Change('cancel', job, job._replace(state=CANCELLED)) for job in jobs "
        "if job.state != PROCESSING]")),
    ("caused", "no fence: a late worker ends a later claim",
        ("MOVE", "AND COALESCE(claim, 0) = :source_claim", ""), ("SQLite.write", "Stale", ""),
        ("Claims._write", "if mine", "True"),
        ("Claims._write", "call _as_now", "self._held[claim]")),
    ("caused", "read, then write: the job is chosen before the transaction",
        ("MOVE", "AND state = :source AND COALESCE(claim, 0) = :source_claim", ""),
        ("SQLite.write", "Stale", ""),
        ("Claims.tick", "call begin", "self._host.choose_early(self, len(free)).begin()"),
        ("Claims._claim", "call _choose", "self.early")),
    ("alone", "the run's lock is taken after the claim's commit", (
        "Claims._lock_number", "call hold", "-1")),
    ("alone", "a queue's limit ignores what this tick has claimed", (
        "Claims._room", "call running.get", "0")),
    ("excused", "a worker is lost after its first missing heartbeat", (
        "Peers.lost", "call lease_of", "1e-9")),
    ("truthful", "what has not begun is charged as a crash", (
        "lost_end", "if process_of", "False")))


# Seeds of episodes that found the lack of a guard; tried first, for most find none.
FINDERS = 0, 4, 30, 67, 78


def change_tree(function, what, instead):
    """Change a function's tree in place, as MUTANTS says."""
    kind, _, name = what.rpartition(" ")
    fits = {
        "": lambda field, node: isinstance(node, ast.stmt) and uses_itself(node, name),
        "name": lambda field, node: is_named(node, name),
        "call": lambda field, node: isinstance(node, ast.Call) and is_named(node.func, name),
        "if": lambda field, node: field in ("test", "ifs") and uses(node, name)}[kind]
    found = [(holder, key) for parent in ast.walk(function)
             for field, holder, key in places(parent) if fits(field, holder[key])]
    assert len(found) == 1 or (found and not kind), f"{function.name}: {what}, {found}"
    for holder, key in found:
        new = ast.parse(instead, mode="eval").body if kind else ast.Pass()
        holder[key] = ast.fix_missing_locations(ast.copy_location(new, holder[key]))


@contextlib.contextmanager
def changed(changes):
    """Functions and statements of the module are changed for a while, as MUTANTS says."""
    trees = {}
    with contextlib.ExitStack() as stack:
        for place, what, instead in changes:
            if place.isupper():
                text, count = re.subn(r"\s+".join(map(re.escape, what.split())), instead,
                                      getattr(queuectl.Sql, place))
                assert count == 1, f"{place} has {count} times {what}"
                stack.enter_context(mock.patch.object(queuectl.Sql, place, text))
            else:
                tree = trees.setdefault(place, copy.deepcopy(definition(place, module_tree())))
                change_tree(tree, what, instead)
        for place, tree in trees.items():
            old, new = recompiled(getattr(queuectl, place.rpartition(".")[0], queuectl), tree)
            stack.callback(setattr, old, "__code__", old.__code__)
            old.__code__ = new.__code__
        yield


def memory_directory():
    """Where a database costs no fsync."""
    return tempfile.mkdtemp(prefix="queuectl model ", dir="/dev/shm"
                            if os.access("/dev/shm", os.W_OK) else None)


def model(seeds, rule="", steps=300):
    """Episodes, up to the first in which a rule, or that one, is broken; the violations."""
    directory = memory_directory()
    try:
        for seed in seeds:
            world = World(os.path.join(directory, f"{seed}.db"), seed)
            try:
                found = [one for one in world.run(steps) if one.startswith(rule)]
            except queuectl.Stale as error:     # a guard of the program's own
                found = [f"{rule}: {error}"]
            if found:
                return [f"seed {seed}: {violation}" for violation in found]
    finally:
        shutil.rmtree(directory, True)
    return []


class Model(unittest.TestCase):
    def test_no_interleaving_breaks_a_rule(self):
        self.assertEqual(model(range(30)), [])

    def test_each_guard_is_needed_and_its_lack_is_found(self):
        for rule, what, *changes in MUTANTS:
            with self.subTest(what), changed(changes):
                self.assertTrue(model(dict.fromkeys([*FINDERS, *range(200)]), rule))


# ---- Crash points ------------------------------------------------------------
# What happens if the process dies between any two lines? A victim, a fork of this
# process, ends itself with SIGKILL at a line of queuectl.py, told by a trace function;
# another kind dies within a commit, when a file would grow beyond a limit. Then a worker
# picks up the pieces, and the histories are compared as above.

CRASH_SETTINGS = {**CHAOS_SETTINGS, "backoff-base": "10ms", "kill-grace": "200ms"}
CRASH_FORKS = 3         # trials at once; each waits half of its time
FAST = "/dev/shm" if os.path.isdir("/dev/shm") else None   # a kill needs no real disk

# The moments that matter most: before or after a function uses that name first.
MOMENTS = (
    ("SQLite.commit",        "before",   "_patiently"),
    ("SQLite.transaction",   "after",    "commit"),
    ("SQLite._upgrade",      "before",   "format"),
    ("SQLite._upgrade",      "before",   "split"),          # copied, nothing new yet
    ("SQLite.backup",        "before",   "replace"),
    ("Ledger.move",          "before",   "_add_events"),
    ("Claims._claim",        "after",    "_lock_number"),
    ("Claims._write",        "before",   "lost_end"),       # a rescue is not recorded
    ("Command.start",        "after",    "posix_spawn"),
    ("Command.finish",       "before",   "_reap"),          # the command has exited
    ("Tree.step",            "after",    "send"),           # a tree is killed
    ("Runner._do_committed", "after",    "result"),         # committed, and not known
    ("Runner._start",        "before",   "Command"),        # claimed, and not started
    ("Runner._keep",         "after",    "_ended"),         # an end is not recorded
)
OPENING = "Queue.__init__", "before", "Ledger"      # lines before it have no effect
RECOVER = ("worker", "start", "--drain", "-c", "2", "--name", "next")


class Step(NamedTuple):
    """A command of a scenario: what it promises for which jobs once it has said so."""
    verb: str                   # as in Told
    ids: tuple[str, ...]
    argv: tuple[str, ...]
    says: str = "\0"            # words with which it acknowledges


class Scenario(NamedTuple):
    """Commands over a prepared queue, and what else must hold."""
    name: str
    steps: tuple[Step, ...]
    prepare: Callable = lambda directory: None      # once: the queue
    set_up: Callable = lambda trial: None           # anew for each trial
    halfway: Callable = lambda trial: ()            # violations right after the kill
    at_last: Callable = lambda trial: ()            # violations after the recovery
    recovery: tuple[tuple[str, ...], ...] = (RECOVER,)
    newer: bool = False                             # victims know one more migration
    sizes: range = range(0)                         # of files at which a write is torn


class Point(NamedTuple):
    """Where a victim dies."""
    step: int
    line: int
    nth: int            # of the times that the line is met in that step
    size: int = 0       # or: when a file would grow beyond so many bytes


NOWHERE = Point(-1, 0, 0)   # a victim that is none: it lives to its end


def survived(directory, steps, at=NOWHERE, record=False, newer=False):
    """The signal that ended a victim which ran these commands, SIGALRM for a deadline; or 0."""
    shutil.rmtree(os.path.join(directory, "said"), True)
    os.mkdir(os.path.join(directory, "said"))
    pid = os.fork()
    if pid == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(DEADLINE))
            os.chdir(directory)
            os.environ["QUEUECTL_DB"] = os.path.join(directory, "queue.db")
            if newer:
                queuectl.UPGRADES[queuectl.SCHEMA_VERSION] = (
                    "CREATE TABLE extra (x);"
                    "CREATE INDEX extra_by_x ON extra (x); INSERT INTO extra VALUES (1)")
                queuectl.SCHEMA_VERSION += 1
            sys.stdout, sys.stderr = (open(fd, "w", closefd=False) for fd in (1, 2))
            for step, argv in enumerate(steps):
                live(step, argv, at if step == at.step else NOWHERE, record)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def live(step, argv, at, record):
    """Run a command; keep what it prints, its status and the lines that it meets."""
    for fd, name in enumerate((os.devnull, f"said/{step}.out", f"said/{step}.err")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), fd)
    if at.size:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (at.size, at.size))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    first, hits = os.getpid(), {}

    def die():
        """Supervisor and worker at once; the process that met the line is the last."""
        own = os.getpid()
        kill(*map(int, read_bytes(f"/proc/{own}/task/{own}/children").split())
             if own == first else [first], own)
    with contextlib.ExitStack() as stack:
        if record or at.line:
            hits = stack.enter_context(Lines("said/lines", (at.line, at.nth), die)).hits
        status = queuectl.main(argv)
    sys.stdout.flush()
    if b"was killed by SIG" in read_bytes(f"said/{step}.err"):     # the worker, by its limit
        die()
    write_bytes("said/telling", json.dumps([status, [*hits.items()]]).encode())
    os.replace("said/telling", f"said/{step}.told")     # a kill leaves it whole or absent


class Trial:
    """A copy of a scenario's queue: victims die on it until one has changed it."""

    def __init__(self, place, scenario):
        self.scenario, self.last, self.killed = scenario, NOWHERE, False
        self.dir = tempfile.mkdtemp(prefix="trial ", dir=place)
        self.path = self.path_of("queue.db")
        shutil.copytree(template(place, scenario), self.dir, dirs_exist_ok=True)
        scenario.set_up(self)
        self.before = self.content()

    def path_of(self, name):
        return os.path.join(self.dir, name)

    def content(self):
        """All that a victim may have changed, byte for byte; -shm is but an index."""
        found = {}
        for where, _, names in os.walk(self.dir):
            for name in names:
                content = read_bytes(os.path.join(where, name))
                if (content or name == "queue.db") and not (
                        name.endswith("-shm") or where.endswith("said")):
                    found[where, name] = content
        return found

    def run(self, *steps, **options):
        """Run commands; the signal that ended them."""
        return survived(self.dir, steps, newer=self.scenario.newer, **options)

    def kill(self, point):
        """Run the scenario up to the point; whether the victim died."""
        self.last = point
        number = self.run(*[step.argv for step in self.scenario.steps], at=point)
        self.killed = number in (signal.SIGKILL, signal.SIGXFSZ)
        return self.killed

    def said(self, step):
        """(what a command printed, its exit status or None, the lines it met)."""
        words = b"".join(read_bytes(self.path_of(f"said/{step}.{name}")) for name in ("out", "err"))
        told = read_bytes(self.path_of(f"said/{step}.told"))
        return (words.decode(), *(json.loads(told) if told else (None, None)))

    def told(self):
        """What the victim told of the commands that it began."""
        for number, step in enumerate(self.scenario.steps):
            if os.path.exists(self.path_of(f"said/{number}.out")):
                words, status, _ = self.said(number)
                yield Told(step.verb, step.ids, 0 if step.says in words else status)

    def ended(self, what, number, steps):
        """Violations if commands that are not killed do not end well."""
        if number:
            yield f"{what} was ended by signal {number}"
        for step in range(len(steps)):
            words, status, _ = self.said(step)
            if "Traceback" in words or "itself failed" in words \
                    or status not in (0, *([None] if number else ()),
                                      *([1] if " dead" in words else ())):
                yield f"{what} {step} ended with {status}: {words}"

    def old_list(self):
        """(what the old version prints as the list of jobs, its status)."""
        survived(self.dir, [["list", "--json"]])
        return self.said(0)[:2]

    def recover(self):
        """Let a worker pick up the pieces, compare the histories; the violations."""
        scenario = self.scenario
        found = [] if self.killed else list(self.ended("step", 0, scenario.steps))
        self.acknowledged = list(self.told())
        found += self.found_by(scenario.halfway)
        number = self.run(*scenario.recovery)
        found += self.ended("recovery", number, scenario.recovery)
        found += self.found_by(scenario.at_last)
        found += self.found_by(lambda trial: History(
            trial.path, trial.acknowledged, read_ledger(trial.dir)).at_end())
        if found:
            kill(*members(os.path.realpath(self.path)))
        else:
            shutil.rmtree(self.dir)
        point = self.last
        words = linecache.getline(MODULE, point.line).strip()
        where = f"a file of {point.size} bytes" if point.size \
            else f"line {point.line} ({words}), time {point.nth}"
        return [f"{scenario.name}, `{' '.join(scenario.steps[point.step].argv)[:30]}`, {where}: "
                f"{violation.strip()} [{os.path.basename(self.dir)}]" for violation in found]

    def found_by(self, rule):
        """The violations that a rule finds; what it cannot read is one."""
        try:
            return list(rule(self))
        except (queuectl.QueueError, sqlite3.Error, OSError) as error:
            return [f"cannot be read: {error}"]


# Scenarios.

def a_job(job_id, how, **fields):
    """A job that writes the ledger, wherever the queue was copied to."""
    return {"id": job_id, "cwd": "/",
            "command": f'cd "${{QUEUECTL_DB%/*}}" && sh job.sh {how}', **fields}


def prepared(directory, *jobs):
    """A queue with these jobs."""
    with Queue(os.path.join(directory, "queue.db")) as queue:
        for key, value in CRASH_SETTINGS.items():
            queue.configure(key, value)
        queue.limit_queue("one", 1)
        queue.enqueue_many(list(jobs))


def with_work(directory):
    prepared(directory, a_job("first", "quick"), a_job("again", "flaky"),
             a_job("next", "quick", after=["first"], tags=["late"]),
             a_job("dies", "poor", max_retries=1), a_job("a", "nap 0.02", queue="one"),
             a_job("b", "quick", queue="one"), a_job("loud", "loud"))


def with_history(directory):
    """A queue that has worked: done, dead in two queues, and waiting again."""
    prepared(directory, a_job("done", "quick", tags=["old", "good"]), *(
        a_job(f"dead-{n}", "poor", max_retries=1, queue="other" if n < 3 else "late",
              tags=["poor"]) for n in range(1, 6)))
    survived(directory, [RECOVER])
    prepared(directory, a_job("waits", "quick"), a_job("needs", "quick", after=["waits"]),
             a_job("calm", "quick", after=["done"]))


def with_trees(directory):
    prepared(directory, a_job("tree", "tree", priority=9),
             a_job("deaf", "tree deaf", priority=9), a_job("flaky", "flaky"),
             a_job("next", "quick", after=["tree"]))


def with_a_copy(directory):
    """A backup of that name is there already, from when the queue was empty."""
    prepared(directory)
    survived(directory, [["backup", "copy.backup"]])
    with_history(directory)


def strand(trial):
    """Kill a worker as soon as it has read that the trees of two jobs are complete."""
    number = trial.run(("worker", "start", "-c", "2", "--name", "first"),
                       at=Point(0, line_of("Command.read", "before", "feed"), 2))
    assert number == signal.SIGKILL


def version_of(path):
    with raw(path) as db:
        return db.execute("PRAGMA user_version").fetchone()[0]


def half_made(trial):
    """A reader finds either no queue or a whole one, and makes none."""
    words, status = trial.old_list()
    if status != 0 and "no queue at" not in words:
        yield f"a half made database: {words}"
    if status != 0 and os.path.exists(trial.path) and version_of(trial.path) != 0:
        yield "a reader has made a queue"


def half_upgraded(trial):
    """The old version reads what is not upgraded yet, and refuses what is."""
    version, now = version_of(trial.path), queuectl.SCHEMA_VERSION
    words, status = trial.old_list()
    if (version, status, "newer queuectl" in words) not in ((now, 0, False), (now + 1, 1, True)):
        yield f"format {version}: the old version ended with {status}: {words}"
    yield from copied(trial)


def upgraded(trial):
    """The next one that opens it upgrades it, after a backup."""
    now = queuectl.SCHEMA_VERSION
    with raw(trial.path) as db:
        extra = db.execute("SELECT name FROM sqlite_master WHERE name LIKE 'extra%'")
        if version_of(trial.path) != now + 1 or len(extra.fetchall()) != 2:
            yield "not upgraded, or by half"
        db.execute(f"PRAGMA user_version = {now}")  # for the checker, the old one
    if not os.path.exists(f"{trial.path}.format-{now}.backup"):
        yield "upgraded without a backup"
    yield from copied(trial)


def copied(trial):
    """A file that bears a backup's name is whole, private and of the old format.

    It holds all nine jobs; or none, if the one that was there before is not replaced.
    """
    now = queuectl.SCHEMA_VERSION
    is_done = trial.scenario.newer or trial.acknowledged[0].status == 0
    for name in os.listdir(trial.dir):
        if name.endswith(".backup"):
            path = trial.path_of(name)
            with raw(path) as db:
                found = (db.execute("PRAGMA integrity_check").fetchone()[0],
                         db.execute("SELECT COUNT(*) FROM jobs").fetchone()[0],
                         version_of(path), os.stat(path).st_mode & 0o777)
            if found != ("ok", 9, now, 0o600) and (is_done or found != ("ok", 0, now, 0o600)):
                yield f"{name}: {found}"


def configured(trial):
    """A setting that was acknowledged is in force; else it is the old or the new one."""
    with Queue(trial.path, create=False) as queue:
        value = queue.setting("max-retries")
    told = [one.status for one in trial.acknowledged if one.verb == "config"]
    if value not in (("7",) if told == [0] else ("7", "99") if told else ("99",)):
        yield f"max-retries is {value} after {told}"


def a_command(verb, ids, line, says="\0"):
    return Step(verb, tuple(ids), tuple(line.split()), says)


def a_batch(*ids):
    jobs = [a_job(id, "quick", tags=["new", id], after=[ids[n - 1]] if n else [])
            for n, id in enumerate(ids)]
    return Step("enqueue", ids, ("enqueue", "-q", json.dumps(jobs)), ids[-1])


WORK = a_command("worker", (), "worker start --drain -c 2")
SCENARIOS = {one.name: one for one in (
    Scenario("worker", (WORK,), with_work, sizes=range(33000, 90000, 9100)),
    Scenario("enqueue", (a_batch("new-1", "new-2", "new-3"),), with_history,
             sizes=range(33000, 90000, 4600)),
    Scenario("verbs", (
        a_command("cancel", ["waits"], "cancel waits", "cancelled"),
        a_command("retry", ["dead-1"], "retry dead-1", "pending again"),
        a_command("delete", ["dead-2"], "delete dead-2", "dead-2 deleted"),
        a_command("retry", ["dead-3"], "dlq retry --all --search dead-3", "pending again"),
        a_command("delete", ["dead-4", "dead-5"], "dlq purge -y", "2 jobs deleted"),
        a_command("config", (), "config set max-retries 7", "max-retries = 7")),
        with_history, at_last=configured),
    Scenario("new", (a_batch("new-1", "new-2"),), halfway=half_made, recovery=(
        ("enqueue", "true", "--id", "other"), ("delete", "other"), RECOVER),
        sizes=range(1, 130000, 4700)),
    Scenario("upgrade", (a_command("read", (), "list --json"),), with_history,
             halfway=half_upgraded, at_last=upgraded, newer=True,
             sizes=range(1, 180000, 8100)),
    Scenario("backup", (a_command("read", (), "backup copy.backup"),), with_a_copy,
             halfway=copied, at_last=copied, sizes=range(1, 180000, 8100)),
    Scenario("rescue", (WORK,), with_trees, strand))}


def template(place, scenario):
    """The directory that trials are copied from."""
    directory = os.path.join(place, f"template {scenario.name}")
    if not os.path.exists(directory):
        os.makedirs(os.path.join(directory, "locks"))
        write_bytes(os.path.join(directory, "job.sh"), JOB.encode())
        scenario.prepare(directory)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, "queue.db-lock"))
    return directory


def survey(place, name):
    """A run without a kill: (violations, every line's first time, other points)."""
    scenario = SCENARIOS[name]
    trial, moments = Trial(place, scenario), {line_of(*moment) for moment in MOMENTS}
    number = trial.run(*[step.argv for step in scenario.steps], record=True)
    met = [trial.said(step)[2] or [] for step in range(len(scenario.steps))]
    bad = [f"{name}: signal {number}"] if number else trial.recover()
    lines, others = [], [Point(0, 0, 0, size) for size in scenario.sizes]
    for step, hits in enumerate(met):   # of later steps from the opening of the file on
        found = [line for line, _ in hits]
        lines += [Point(step, line, 1)
                  for line in found[found.index(line_of(*OPENING)) if step else 0:]]
        others += [Point(step, line, nth) for line, n in hits if line in moments
                   for nth in range(1, n + 1)]
    return bad, lines, others


def walk_points(place, name, points):
    """Let a victim die at each of the points: (kills, violations)."""
    kills, bad, trial = 0, [], None
    for point in points:
        trial = trial or Trial(place, SCENARIOS[name])
        kills += trial.kill(point)
        if point == points[-1] or trial.content() != trial.before or any(
                one.status is not None for one in trial.told()):
            bad += trial.recover()
            trial = None
    return kills, bad


def in_forks(function, rows):
    """What the function returns for each row of arguments, a few at a time."""
    with multiprocessing.get_context("fork").Pool(CRASH_FORKS) as pool:
        return pool.starmap(function, rows, 1)


def surveys(place):
    return dict(zip(SCENARIOS, in_forks(survey, [(place, name) for name in SCENARIOS])))


def walk_all(place, chosen):
    """Walk {the name of a scenario: points}: (kills, violations)."""
    found = in_forks(walk_points, [(place, name, points[part::CRASH_FORKS])
                                    for name, points in chosen.items()
                                    for part in range(CRASH_FORKS)])
    return sum(kills for kills, _ in found), [one for _, bad in found for one in bad]


def crash_points(share, seed):
    """Walk a share of all points, a line per scenario, a verdict. 0 or 1."""
    chance, total = random.Random(seed), 0
    place = tempfile.mkdtemp(prefix="queuectl crash ", dir=FAST)
    for name, (bad, lines, others) in surveys(place).items():
        begun = time.monotonic()
        points = [point for point in dict.fromkeys(lines + others)
                  if share >= 1 or chance.random() < share]
        kills, found = walk_all(place, {name: points})
        total += len(bad + found)
        print(f"{name}: {len(points)} points, {kills} kills, {len(bad + found)} "
              f"violations, {time.monotonic() - begun:.0f} s", *bad, *found, sep="\n    ",
              flush=True)
    return verdict(total, place)


@NEEDS_SHELL_TOOLS
class CrashPoints(unittest.TestCase):
    """A sample of what `--crash-points` walks whole."""

    @classmethod
    def setUpClass(cls):
        cls.place, cls.chance = tempfile.mkdtemp(prefix="queuectl crash ü ", dir=FAST), \
            random.Random("small")
        cls.addClassCleanup(shutil.rmtree, cls.place, True)
        cls.surveys = surveys(cls.place)

    def walk(self, chosen):
        """Let victims die at (scenario, point) pairs: all die, and no promise breaks."""
        points = collections.defaultdict(list)
        for name, point in chosen:
            points[name].append(point)
        kills, bad = walk_all(self.place, points)
        self.assertEqual(bad, [])
        self.assertGreater(kills, len(chosen) * 0.8)

    def test_without_a_kill_every_scenario_keeps_the_promises(self):
        self.assertEqual([one for bad, _, _ in self.surveys.values() for one in bad], [])

    def test_every_moment_comes_in_some_scenario(self):
        met = {point.line for _, _, others in self.surveys.values() for point in others}
        self.assertLessEqual({line_of(*moment) for moment in MOMENTS}, met)

    def test_a_process_may_die_at_any_line(self):
        self.walk(self.chance.sample([(name, point) for name, (_, lines, _) in self.surveys.items()
                                      for point in lines], 25))

    def test_a_process_may_die_at_the_moments_that_matter(self):
        chosen = collections.defaultdict(list)
        for name, (_, _, others) in self.surveys.items():
            for point in others:
                chosen[name, point.line].append(point)
        self.walk([(name, self.chance.choice(points))
                   for (name, line), points in chosen.items() if line])

    def test_a_process_may_die_within_a_write(self):
        self.walk([(name, Point(0, 0, 0, self.chance.choice(one.sizes[:12])))
                   for name, one in SCENARIOS.items() if one.sizes])


# ---- Power cut ---------------------------------------------------------------
# A writer is frozen at any moment and its files are copied: what a power cut leaves.
# After each commit it prints what the tables hold, so a copy must open to one of these
# states: the last one printed, or the one that it had not yet printed.

CUTS = 10           # copies of the short test
DAMAGES = 4         # to each copy, of two kinds in turn
WAL_HEADER, FRAME_HEADER = 32, 24


def fingerprint(store):
    """All that the tables hold, as one word."""
    tables = [f'SELECT * FROM "{name}"' for name, in store.rows(
        "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    rows = [sorted(map(repr, store.rows(table))) for table in tables]
    return hashlib.sha256(repr(rows).encode()).hexdigest()[:20]


def write_history(path, seed):
    """A process that goes through episodes of the model: it prints each new state."""
    commit, states = queuectl.SQLite.commit, []

    def tell(store):
        states.append(fingerprint(store))
        if states[-1:] != states[-2:-1]:
            os.write(1, f"{states[-1]}\n".encode())

    def commit_and_tell(db):
        commit(db)
        tell(db)
    with Queue(path) as queue:
        tell(queue.store)
    queuectl.SQLite.commit = commit_and_tell
    World(path, seed).run(10 ** 5)


def make_queues(directory):
    """Another process: it makes one queue after the other, and prints a line for each."""
    for number in itertools.count():
        os.mkdir(os.path.join(directory, str(number)))
        with Queue(os.path.join(directory, str(number), "queue.db")) as queue:
            queue.enqueue("true")
            os.write(1, b"made\n")


class Frozen(subprocess.Popen):
    """A process that runs a function of this module, and is frozen now and then."""

    def __init__(self, function, *args):
        name = os.path.splitext(os.path.basename(__file__))[0]
        code = f"import sys, {name}; {name}.{function.__name__}(*sys.argv[1:])"
        super().__init__([sys.executable, "-c", code, *map(str, args)], stdout=subprocess.PIPE,
                         cwd=os.path.dirname(os.path.abspath(__file__)))
        os.set_blocking(self.stdout.fileno(), False)
        self.said = b""

    def lines(self):
        """All that it has printed so far."""
        if not self.stdout.closed:
            self.said += self.stdout.read() or b""
        return self.said.decode().split("\n")[:-1]

    @contextlib.contextmanager
    def frozen(self):
        """Stopped by the kernel: it changes nothing, and holds what it held."""
        self.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), f"the process ended: {status}"
        yield
        self.send_signal(signal.SIGCONT)

    def __exit__(self, *_):
        self.kill()
        self.wait()
        self.lines()
        self.stdout.close()


def copy_files(source, target, *suffixes):
    """Copy a database as plain files. No process that has it open may do this."""
    os.mkdir(target)
    for suffix in ("", *suffixes):
        with contextlib.suppress(FileNotFoundError):
            shutil.copyfile(os.path.join(source, f"queue.db{suffix}"),
                            os.path.join(target, f"queue.db{suffix}"))


def wal_commits(wal):
    """Where each commit ends that is whole in a WAL, by its salts and checksums."""
    if len(wal) < WAL_HEADER or int.from_bytes(wal[:4], "big") | 1 != 0x377F0683:
        return []
    order, size = "<>"[wal[3] & 1], int.from_bytes(wal[8:12], "big")

    def summed(content, a, b):
        words = struct.unpack(f"{order}{len(content) // 4}I", content)
        for x, y in zip(words[::2], words[1::2]):
            a = (a + x + b) & 0xFFFFFFFF
            b = (b + y + a) & 0xFFFFFFFF
        return a, b

    sums = summed(wal[:24], 0, 0)
    ends, at = [], WAL_HEADER
    if sums != struct.unpack(">II", wal[24:32]):
        return []
    while at + FRAME_HEADER + size <= len(wal):
        head, page = wal[at:at + 24], wal[at + 24:at + 24 + size]
        sums = summed(page, *summed(head[:8], *sums))
        if head[8:16] != wal[16:24] or sums != struct.unpack(">II", head[16:]):
            break
        at += FRAME_HEADER + size
        if head[4:8] != bytes(4):   # the size of the database: a commit's last frame
            ends.append(at)
    return ends


def synced_bytes(directory):
    """Up to where the WAL is on the disk for certain: a checkpoint has begun there.

    A power cut cannot damage it before that place.
    """
    shared = read_bytes(os.path.join(directory, "queue.db-shm"))
    wal = read_bytes(os.path.join(directory, "queue.db-wal"))
    if len(shared) < 132 or len(wal) < WAL_HEADER:
        return 0
    frames = struct.unpack("=I", shared[128:132])[0]    # nBackfillAttempted
    return frames and WAL_HEADER + frames * (FRAME_HEADER + int.from_bytes(wal[8:12], "big"))


def power_cut_round(directory, copies, seed):
    """Copy a writer's files so often and damage them; (violations, what was done)."""
    chance, done = random.Random(seed), collections.Counter()
    live, cuts = os.path.join(directory, "live"), []
    os.makedirs(live)
    with Frozen(write_history, os.path.join(live, "queue.db"), seed) as writer:
        wait_for(lambda: len(writer.lines()) > 2, "the writer's first commits")
        for number in range(copies):
            time.sleep(chance.uniform(0, 0.05))     # not a wait: the moment of the cut
            with writer.frozen():
                cuts.append((os.path.join(directory, str(number)), len(writer.lines()),
                             synced_bytes(live)))
                copy_files(live, cuts[-1][0], "-wal")
        wait_for(lambda: len(writer.lines()) > cuts[-1][1], "the last cut's state")
    history = {state: number for number, state in enumerate(writer.lines())}
    return [f"seed {seed}, {os.path.basename(cut[0])}: {violation}" for cut in cuts
            for violation in check_cut(cut, history, chance, done)], done


def check_cut(cut, history, chance, done):
    """Violations in a copy as it is, and in copies of it that are damaged.

    A cut: its directory, how many states had been printed, how many bytes of its WAL a
    power cut cannot touch.
    """
    directory, printed, synced = cut
    wal = read_bytes(os.path.join(directory, "queue.db-wal"))
    ends, whole = wal_commits(wal), directory + " whole"
    copy_files(directory, whole, "-wal")
    done["whole"] += 1
    now, said = opened_state(whole, history)
    yield from said
    if now not in (printed - 1, printed):
        yield f"{printed} states were printed, it opens to {now}"
        return
    for number in range(DAMAGES if synced < len(wal) else 0):
        at, where = chance.randrange(synced, len(wal)), f"{directory} {number}"
        kind, rest = (("cut off", b""), ("bit flipped", bytes(
            [wal[at] ^ 1 << chance.randrange(8)]) + wal[at + 1:]))[number % 2]
        copy_files(directory, where)
        write_bytes(os.path.join(where, "queue.db-wal"), wal[:at] + rest)
        lost = sum(end > at for end in ends)
        done[kind] += 1
        done["commits lost"] += lost
        state, said = opened_state(where, history)
        if state is None or not now - lost <= state <= now:
            said.append(f"state {state}, not {now - lost} to {now}")
        yield from (f"{kind} at {at}: {one}" for one in said)


def opened_state(directory, history):
    """The number of the state to which a copy opens, and its violations.

    Before the first state comes the making of the queue: -1 where that is undone.
    """
    path = os.path.join(directory, "queue.db")
    try:
        with Queue(path, create=False) as queue:
            state = history.get(fingerprint(queue.store))
    except queuectl.Refused as error:
        if error.code != "no-queue":
            raise
        return -1, []
    return state, History(path).violations()


def traced(lines):
    """(call, file, text) of each call of a trace where it ended, without those that failed."""
    begun = {}
    for line in lines:
        pid, _, rest = line.partition(" ")
        rest = rest.lstrip()
        if rest.endswith("<unfinished ...>"):
            begun[pid] = rest
            continue
        if rest.startswith("<... "):
            rest = begun.pop(pid, "") + rest
        found = re.match(r"(\w+)\(\d+<([^>]*)>(.*)", rest)
        if found and not re.search(r"= -1 E\w+", rest):
            yield found.groups()


class PowerCut(Processes):
    def test_a_copy_of_any_moment_opens_to_what_was_said_or_one_commit_more(self):
        violations, done = power_cut_round(self.dir, CUTS, "small")
        self.assertEqual(violations, [])
        self.assertEqual(done["whole"], CUTS)
        self.assertGreater(min(done["cut off"], done["bit flipped"], done["commits lost"]), 0)

    def test_a_queue_whose_making_was_cut_short_is_made_by_the_next_command(self):
        """Pages reach the disk in any order: the first one may be the last."""
        chance, live, cuts = random.Random("making"), self.path_of("live"), []
        os.mkdir(live)
        with Frozen(make_queues, live) as maker:
            wait_for(maker.lines, "the first queue")
            for n in range(40):
                time.sleep(chance.uniform(0, 0.02))     # the moment of the cut
                with maker.frozen():
                    place = os.path.join(live, str(len(maker.lines())))
                    if os.path.exists(place):
                        cuts.append(self.path_of(str(n)))
                        copy_files(place, cuts[-1], "-wal", "-journal")
        for cut in [*cuts]:
            made = read_bytes(os.path.join(cut, "queue.db"))
            if made and any(read_bytes(os.path.join(cut, "queue.db-journal"))[:8]):
                cuts.append(cut + " late")
                copy_files(cut, cuts[-1], "-wal", "-journal")
                write_bytes(os.path.join(cuts[-1], "queue.db"), bytes(4096) + made[4096:])
        for cut in cuts:
            path = os.path.join(cut, "queue.db")
            with self.subTest(path):
                with Queue(path) as queue:
                    before = len(queue.jobs())
                    queue.enqueue("true")
                    self.assertLessEqual(before, 1)
                    self.assertEqual(len(queue.jobs()), before + 1)
                self.assertEqual(History(path).violations(), [])

    def trace(self, *argv):
        """The calls that a command made to keep what it wrote."""
        if not shutil.which("strace"):
            self.skipTest("strace is not installed")
        log = self.path_of("trace")
        code, _, err = self.done(
            ["strace", "-f", "-y", "-s", "999", "-o", log, "-e",
             "trace=fsync,fdatasync,write,pwrite64", *self.command(*argv)])
        if not os.path.exists(log) or "ptrace" in err:
            self.skipTest("strace may not trace here")
        self.assertEqual(code, 0, err)
        with open(log, errors="replace") as file:
            return list(traced(file))

    def assert_synced(self, calls, words):
        """At the write of these words the disk has all that was written to the database."""
        waiting, synced = set(), 0
        for call, file, text in calls:
            name = os.path.basename(file)
            if call in ("fsync", "fdatasync"):
                waiting.discard(name)
                synced += 1
            elif name in ("queue.db", "queue.db-wal"):
                waiting.add(name)
            elif re.search(words, text):
                self.assertEqual(waiting, set(), words)
                return self.assertGreater(synced, 0)
        return self.fail(f"{words} is not written")

    def test_the_disk_has_a_job_and_new_files_names_before_its_id_is_printed(self):
        for number in (1, 2):   # the command that makes the database, and one more
            calls = self.trace("enqueue", "-q", "true")
            self.assert_synced(calls, f'"job-{number}')
            if number == 1:
                said = next(n for n, (_, _, text) in enumerate(calls) if '"job-1' in text)
                syncs = [(n, file) for n, (call, file, _) in enumerate(calls) if call[0] == "f"]
                logged = next(n for n, file in syncs if file.endswith("-wal"))
                self.assertTrue(any(logged < n < said and "queue.db" not in os.path.basename(file)
                                    for n, file in syncs), calls)

    def test_the_disk_has_a_result_before_the_worker_logs_it(self):
        # Lines are written a moment later, so the jobs leave moments without a write.
        self.enqueue("sleep .3")
        self.enqueue("sleep .3", "--after", "job-1")
        calls = self.trace("worker", "start", "--drain")
        for words in ("job-1 started", "job-1 completed"):
            self.assert_synced(calls, words)


# ---- Bad ground --------------------------------------------------------------
# Full disks, files that cannot be written, are damaged, are another's, or go away;
# kernels that lack something; workers that cannot be reached.

# Runs the program with parts of the kernel's interface missing or different.
LESS = """
import builtins, errno, fcntl, os, struct, sys
LOCKS = [getattr(fcntl, name, None) for name in ("F_OFD_SETLK", "F_OFD_GETLK")]
plainly, plain_open = fcntl.fcntl, builtins.open
def refuse(fd, command, *rest):
    if command in LOCKS:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
    return plainly(fd, command, *rest)
def grant(fd, command, *rest):
    if command in LOCKS:
        return struct.pack("hhqqi", fcntl.F_UNLCK, 0, 0, 1, 0)
    return plainly(fd, command, *rest)
def open_without_proc(path, *rest, **options):
    if str(path).startswith("/proc"):
        raise FileNotFoundError(2, "there is no /proc", path)
    return plain_open(path, *rest, **options)
def without(module, *names):
    for name in names:
        if hasattr(module, name):
            delattr(module, name)
def without_pidfds():
    without(os, "pidfd_open")
def with_refused_locks():
    fcntl.fcntl = refuse
def with_locks_of_processes():
    fcntl.fcntl = grant
def without_linux():
    without(fcntl, "F_OFD_SETLK", "F_OFD_GETLK")
    without(os, "pidfd_open", "waitid")
    builtins.open = open_without_proc
globals()[sys.argv.pop(1)]()
sys.path.insert(0, sys.argv.pop(1))
import queuectl
sys.exit(queuectl.main())
"""


@contextlib.contextmanager
def full(place, room=0):
    """A small disk is used up, but for so many bytes."""
    filler = os.path.join(place, "filler")
    with open(filler, "ab", buffering=0) as file:
        with contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))
        file.truncate(max(0, file.tell() - room))
    yield
    os.unlink(filler)


def bind_permissions():
    """Before an exec: permissions bind root as well. No effect on others."""
    import ctypes
    for capability in (1, 2):   # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        ctypes.CDLL(None).prctl(24, capability, 0, 0, 0)


BOUND = {"preexec_fn": bind_permissions}


def contents(directory):
    return {one.name: read_bytes(one.path) for one in os.scandir(directory) if one.is_file()}


# A queuectl that knows one format more; it begins when it is told to.
UPGRADER = """
import sys, queuectl
queuectl.UPGRADES[queuectl.SCHEMA_VERSION] = "ALTER TABLE jobs ADD COLUMN extra TEXT"
queuectl.SCHEMA_VERSION += 1
print("ready", flush=True)
sys.stdin.readline()
sys.exit(queuectl.main(["config", "list", "--db", sys.argv[1]]))
"""
FORMAT = queuectl.SCHEMA_VERSION


class BadGround(Processes):
    def mount(self, *words, place):
        os.mkdir(place)
        if not shutil.which("mount") or self.done(["mount", *words, place])[0]:
            self.skipTest("a disk of its own needs root and mount")
        self.addCleanup(subprocess.run, ["umount", "-l", place], check=False)

    def small_disk(self, size="1m"):
        place = self.path_of("disk")
        self.mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", place=place)
        self.path = os.path.join(place, "queue.db")
        return place

    def bound_place(self):
        """The database is to be in a directory of its own, on which permissions bind."""
        self.touch("probe")
        os.chmod(self.path_of("probe"), 0)
        if self.done(["cat", self.path_of("probe")], **BOUND)[0] == 0:
            self.skipTest("permissions do not bind this user")
        here = self.path_of("here")
        os.mkdir(here)
        self.addCleanup(os.chmod, here, 0o700)
        self.path = os.path.join(here, "queue.db")
        return here

    def assert_refused(self, told, words="."):
        code, out, err = told
        self.assertEqual((code, out), (1, ""), err)
        self.assertRegex(err, r"\Aqueuectl: error: [^\n]+; [^\n]+\n\Z")
        self.assertRegex(err, words)

    def assert_sound(self):
        self.assertEqual(History(self.path).violations(), [])

    def test_on_a_full_disk_only_acknowledged_jobs_are_there(self):
        place = self.small_disk()
        with full(place):
            self.assert_refused(self.cli("enqueue", "true"))
        added = [self.enqueue("true")]
        for room in range(0, 160_000, 10_000):
            with full(place, room):
                told = self.cli("enqueue", "-q", "x" * 5000)
                if told[0]:
                    self.assert_refused(told, "no room on the disk|disk I/O error")
            added += told[1].split()
        self.assertEqual(ids(self.queue.jobs(sort="oldest")), added)
        self.assertTrue(1 < len(added) < 17, added)
        self.assert_sound()

    def assert_kept_while(self, hindered):
        """A worker keeps a result while it cannot write, and says so once."""
        worker = self.at_work(f"{UNTIL_GO}; echo result")
        with hindered(child_of(worker.pid)):
            self.touch("go")
            self.wait_log("the queue, retrying")
            said = len(self.read("worker.log").splitlines())
            time.sleep(1.2)     # two more tries
            self.assertIsNone(worker.poll())
            self.assertLessEqual(len(self.read("worker.log").splitlines()), said + 1)
        self.wait_state("job-1", COMPLETED)
        self.assertEqual([run.output for run in self.runs("job-1")], [b"result\n"])
        worker.terminate()
        self.assert_ends(worker)
        self.assert_sound()

    def test_a_worker_keeps_a_result_until_there_is_room(self):
        place = self.small_disk()
        self.assert_kept_while(lambda _: full(place))

    @unittest.skipUnless(hasattr(resource, "prlimit"), "no prlimit(2) here")
    def test_a_worker_keeps_a_result_while_its_files_may_not_grow(self):
        @contextlib.contextmanager
        def limited(worker):
            size = os.path.getsize(self.path + "-wal")
            free = resource.prlimit(worker, resource.RLIMIT_FSIZE)
            resource.prlimit(worker, resource.RLIMIT_FSIZE, (size, free[1]))
            yield
            self.assertEqual(self.job("job-1").state, PROCESSING)
            resource.prlimit(worker, resource.RLIMIT_FSIZE, free)
        self.assert_kept_while(limited)

    def test_many_jobs_over_several_full_disks_run_once_each(self):
        place = self.small_disk("8m")   # its WAL has room up to its checkpoint
        jobs = self.fill(20, command="echo $QUEUECTL_JOB_ID >> ran; sleep .1")
        worker = self.worker("-c", "3", "--drain")
        for most in (2, 8):
            wait_for(lambda most=most: self.exists("ran")
                     and len(self.read("ran").split()) >= most, "some jobs")
            before = self.read("worker.log").count("the queue, retrying")
            with full(place):
                self.wait_log("the queue, retrying", before + 1)
        self.assert_ends(worker)
        self.assertEqual(sorted(self.read("ran").split()), sorted(jobs))
        self.assertEqual(self.outcomes(), ["completed"] * 20)
        self.assertLess(len(self.read("worker.log").splitlines()), 2 * 20 + 12)
        self.assert_sound()

    def test_where_files_may_not_grow_only_acknowledged_jobs_are_there(self):
        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]

        def enqueue(size):
            told = self.call("enqueue", "-q", "true", preexec_fn=lambda: resource.setrlimit(
                resource.RLIMIT_FSIZE, (size, hard)))
            if told[0]:
                self.assert_refused(told)
            return told
        told = [*map(enqueue, (0, 50_000, 122_900))]    # while it is being made
        self.assertEqual([one[0] for one in told[:2]], [1, 1])
        between, holder = self.enqueue("true"), self.a_queue()  # so the WAL stays and grows
        told += map(enqueue, (0, 5000, 30_000, 200_000))
        self.assertEqual(told[-1][0], 0)
        self.assertEqual(sorted(ids(holder.jobs())),
                         sorted([between, *"".join(one[1] for one in told).split()]))
        self.assert_sound()

    def test_a_write_lock_held_for_long_costs_time_and_nothing_else(self):
        """(I9)"""
        self.configure(heartbeat="200ms", lease="1s")
        self.fill(12, command="echo $QUEUECTL_JOB_ID >> ran; sleep 0.3")
        workers = [self.worker("-c", "2") for _ in range(2)]
        wait_for(lambda: self.exists("ran") and len(self.read("ran").split()) > 4, "the workers")
        with self.locked():
            clients = [self.running("enqueue", "-q", "echo $QUEUECTL_JOB_ID >> ran")
                       for _ in range(3)]
            time.sleep(3)       # as long as three leases
            self.assertEqual([client.poll() for client in clients], [None] * 3)
        for client in clients:
            self.assertEqual(len(client.communicate(timeout=DEADLINE)[0].split()), 1)
        wait_for(lambda: self.queue.counts()[COMPLETED] == 15, "the jobs")
        for worker in workers:
            worker.terminate()
            self.assert_ends(worker)
        self.assertEqual(self.outcomes(), ["completed"] * 15)
        self.assertEqual(sorted(self.read("ran").split()), sorted(ids(self.queue.jobs())))
        self.assertIn("the queue, retrying", self.read("worker.log"))
        self.assert_sound()

    READS = ("list --json", "logs job-1", "status", "show job-1", "check", "worker list", "stats",
             "events", "config list", "dlq", "queue list", "schedule list", "wait job-1")
    WRITES = ("enqueue true", "cancel job-2", "retry job-1", "pause", "config set lease 1m",
              "delete job-1 --json")

    def two_jobs(self):
        """One that has run, and one that waits."""
        self.enqueue("echo hello")
        self.drain()
        self.enqueue("true")

    def a_medium(self):
        """A disk with a queue on it; what makes it read-only."""
        place = self.small_disk("4m")
        self.two_jobs()
        return lambda: subprocess.run(["mount", "-o", "remount,ro", place], check=True)

    def assert_only_read(self, **options):
        names = sorted(os.listdir(os.path.dirname(self.path)))
        said = self.several([line.split() for line in self.READS + self.WRITES], **options)
        for words, (code, out, err) in zip(self.READS + self.WRITES, said):
            with self.subTest(words):
                if words in self.READS:
                    self.assertEqual((code, "error" in err), (0, False), out + err)
                else:
                    self.assertEqual((code, out), (1, ""))
                    self.assertIn("is read-only", err)
        self.assertEqual((len(json.loads(said[0][1])), said[1][1]), (2, "hello\n"))
        self.assertEqual(json.loads(said[-1][2])["error"]["code"], "unwritable")
        code, _, err = self.call("worker", "start", "--drain", **options)
        self.assertEqual((code, "is read-only" in err), (1, True), err)
        self.assertEqual(sorted(os.listdir(os.path.dirname(self.path))), names)

    def test_a_queue_on_a_read_only_disk_can_be_read_and_not_changed(self):
        make_read_only = self.a_medium()
        backup = self.path_of("disk/backup.db")
        self.cli("backup", backup)
        make_read_only()
        self.assert_only_read()
        self.assertEqual(self.cli("backup", self.path_of("copy.db"))[0], 0)
        with mock.patch.object(queuectl, "SCHEMA_VERSION", FORMAT + 1):
            code, out, err = self.cli("status")     # which would have to upgrade it
        self.assertEqual((code, out), (1, ""))
        self.assertRegex(err, "older format.*work on a copy")
        self.path = backup
        self.assert_only_read()

    def test_who_may_not_write_a_queue_may_read_it(self):
        here = self.bound_place()
        self.two_jobs()
        before = read_bytes(self.path)
        for folder, file in ((0o555, 0o444), (0o755, 0o444), (0o555, 0o666)):
            os.chmod(self.path, file)
            os.chmod(here, folder)
            with self.subTest(f"{folder:o} {file:o}"):
                self.assert_only_read(**BOUND)
                self.assertEqual(read_bytes(self.path), before)
        os.chmod(here, 0o755)
        os.chmod(self.path, 0)
        for words in ("status", "show job-1", "enqueue true", "worker start --drain"):
            with self.subTest(words):
                self.assert_refused(self.call(*words.split(), **BOUND))
        os.chmod(self.path, 0o600)
        self.assertEqual(self.call("enqueue", "-q", "true", **BOUND)[:2], (0, "job-3\n"))
        self.assert_sound()

    def test_in_a_directory_that_cannot_be_written_nothing_is_made(self):
        here = self.bound_place()
        os.chmod(here, 0o555)
        for words, said in ((["enqueue", "true"], "cannot make"), (["status"], "no queue at")):
            self.assert_refused(self.call(*words, **BOUND), said)
        self.assertEqual(os.listdir(here), [])

    def test_commits_that_cannot_be_read_are_reported_and_not_left_out(self):
        make_read_only = self.a_medium()
        with Queue(self.path) as queue:      # as it is when its worker is killed
            queue.enqueue("true")
            for name in ("a.db", "a.db-wal", "a.db-shm", "b.db", "b.db-wal"):
                shutil.copy(self.path_of("disk/queue" + name[1:]), self.path_of(f"disk/{name}"))
        make_read_only()
        self.path = self.path_of("disk/a.db")
        self.assertEqual(len(json.loads(self.call("list", "--json")[1])), 3)
        self.path = self.path_of("disk/b.db")
        self.assert_refused(self.call("list"), "its -wal holds changes that can be read only")

    def test_a_reader_of_a_queue_in_use_sees_what_others_commit(self):
        """As in a container that mounts the directory read-only."""
        self.a_medium()
        glass = self.path_of("glass")
        self.mount("--bind", self.path_of("disk"), place=glass)
        subprocess.run(["mount", "-o", "remount,bind,ro", glass], check=True)
        with Queue(os.path.join(glass, "queue.db"), create=False) as reader:
            seen = reader.store.changes()
            self.assertEqual(len(reader.jobs()), 2)
            self.enqueue("true")
            self.assertEqual(len(reader.jobs()), 3)
            self.assertNotEqual(reader.store.changes(), seen)
            with Queue(self.path) as writer:
                writer.enqueue("true")
                self.assertEqual((len(reader.jobs()), len(writer.jobs())), (4, 4))
            self.enqueue("true")
            self.assertEqual(len(reader.jobs()), 5)
        self.assertEqual(os.listdir(glass), os.listdir(self.path_of("disk")))

    def test_a_worker_whose_database_goes_away_ends_its_jobs_and_fails(self):
        other, here = self.path_of("other.db"), self.path
        self.path = other
        jobs, content, self.path = self.fill(5), read_bytes(other), here
        os.mkdir(self.path_of("there"))
        for how, go_away in (
                ("deleted", lambda: os.unlink(here)), ("replaced", lambda: os.replace(other, here)),
                ("moved", lambda: os.rename(here, self.path_of("there/queue.db")))):
            with self.subTest(how):
                self.configure(heartbeat="200ms")
                worker = self.at_work("sleep 100", "--priority", "9")
                self.enqueue("true", "--id", "late")
                go_away()
                self.assert_ends(worker, 1)
                log = self.read("worker.log")
                self.assertEqual(log.count("error: "), 1, log)
                self.assertRegex(log, "deleted or replaced.*; restart it")
                self.assertNotIn("Traceback", log)
                self.assertFalse(is_running(self.read("pid")))
                self.forget("worker.log", "began")
                if how == "replaced":
                    self.assertEqual(read_bytes(here), content)
                    self.assertEqual(ids(self.queue.jobs(PENDING, "oldest")), jobs)
                else:
                    self.assert_refused(self.cli("status"), "no queue at")
        self.path = self.path_of("there/queue.db")
        self.assertEqual(self.job("late").state, PENDING)
        self.assert_sound()

    def test_files_of_other_programs_and_newer_ones_are_refused_and_left(self):
        self.fill(1)
        with raw(self.path) as db:
            db.execute("PRAGMA user_version = 99")
        refusals = [(self.path, "newer-version", "newer queuectl")]
        for mode in ("delete", "wal"):
            refusals.append((self.path_of(f"{mode}.db"), "not-a-queue", "not a queuectl database"))
            db = sqlite3.connect(refusals[-1][0], isolation_level=None)
            self.addCleanup(db.close)       # it is in use
            db.execute(f"PRAGMA journal_mode = {mode}").fetchall()
            db.execute("CREATE TABLE jobs (id, state)")
        before = contents(self.dir)
        for self.path, code, words in refusals:
            self.assert_refused(self.call("worker", "start", "--drain"), words)
            for command in ("status", "list", "enqueue true", "config set timeout 1s"):
                with self.subTest(command):
                    self.assert_refused(self.cli(*command.split()), words)
                    self.assertEqual(contents(self.dir), before)
            self.assertEqual(json.loads(self.cli("list", "--json")[2])["error"]["code"], code)

    def test_damage_is_reported_and_reading_leaves_it_as_it_is(self):
        chance, said = random.Random("small"), collections.Counter()
        with Queue(self.path) as queue:
            claims = queuectl.Claims(queue, WorkerOptions(slots=9))
            queue.enqueue_many([Job(command=f"echo {n}", tags=("a", "b"), env={"K": f"v{n}"})
                                for n in range(40)])
            for claim in ticked(claims, range(1, 10)).claims:
                ticked(claims, (), {claim.number: Outcome(queuectl.DONE, 0, None, 1.0, b"hi", 2)})
                claim.release()
            claims.leave()
        whole = read_bytes(self.path)
        for _ in range(16):
            at, size = chance.randrange(len(whole)), chance.choice((1, 8, 64, 1024))
            hurt = (whole[:at] + bytes(chance.randrange(256) for _ in range(size))
                    + whole[at + size:])[:len(whole)]
            for command in ("status", "list --json", "show job-3 --json", "list -s pending",
                            "show job-2 --json", "stats", "config list"):
                with self.subTest(command, at=at, size=size):
                    self.forget(*os.listdir(self.dir))
                    write_bytes(self.path, hurt)
                    code, _, err = self.cli(*command.split())
                    said[code] += 1
                    self.assertIn(code, (0, 1))
                    self.assertNotIn("Traceback", err)
                    self.assertEqual(contents(self.dir), {"queue.db": hurt}, err)
        self.assertGreater(min(said[0], said[1]), 0)

    def test_a_worker_that_meets_damage_stops_with_an_error(self):
        self.fill(200)
        with Queue(self.path) as queue:
            page = queue.store.row("SELECT rootpage FROM sqlite_master WHERE name = 'jobs'")[0]
        with open(self.path, "r+b") as file:
            file.seek(page * 4096 - 4096)
            file.write(b"\xee" * 4096)
        code, out, err = self.call("worker", "start", "--drain")
        self.assert_refused((code, out, err.partition("\n")[2]), "is damaged; restore a backup")

    def upgrader(self):
        """A process that will upgrade once it is told to begin."""
        process = subprocess.Popen(
            [sys.executable, "-c", UPGRADER, self.path], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=os.path.dirname(MODULE))
        self.addCleanup(self.end, process)
        self.assertEqual(process.stdout.readline(), b"ready\n")
        return process

    def upgrade(self):
        process = self.upgrader()
        out, err = process.communicate(b"go\n", timeout=DEADLINE)
        return process.returncode, out.decode(), err.decode()

    def format_of(self, path):
        """The version of a file, whether it has the new column, and its ids."""
        with raw(path) as db:
            self.assertEqual(db.execute("PRAGMA integrity_check").fetchall(), [("ok",)])
            columns = [row[1] for row in db.execute("PRAGMA table_info(jobs)")]
            return (db.execute("PRAGMA user_version").fetchone()[0], "extra" in columns,
                    [id for id, in db.execute("SELECT id FROM jobs ORDER BY seq")])

    def test_two_that_upgrade_at_once_both_succeed_after_a_backup(self):
        jobs, both = self.fill(3), [self.upgrader() for _ in range(2)]
        for process in both:
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in both:
            self.assert_ends(process)
        said = b"".join(process.communicate()[1] for process in both).decode()
        [backup] = [self.path_of(name) for name in os.listdir(self.dir) if "backup" in name]
        self.assertEqual(backup, f"{self.path}.format-{FORMAT}.backup")
        self.assertEqual(
            said, f"upgraded {self.path}; before that, it was copied to {backup}\n")
        self.assertEqual(self.format_of(self.path), (FORMAT + 1, True, jobs))
        self.assertEqual(self.format_of(backup), (FORMAT, False, jobs))
        self.assertEqual(os.stat(backup).st_mode & 0o777, 0o600)
        with Queue(backup) as queue:
            self.assertEqual(queue.counts()[PENDING], 3)
        self.assert_refused(self.cli("status"), "newer queuectl")

    def test_an_upgrade_waits_until_no_older_worker_runs(self):
        worker = self.worker()
        wait_for(lambda: self.cli("worker", "list")[1], "the worker")
        self.assert_refused(self.upgrade(), f"older queuectl uses .*`kill {worker.pid}`")
        self.assertEqual(self.format_of(self.path), (FORMAT, False, []))
        self.assertEqual(os.listdir(self.dir).count(f"queue.db.format-{FORMAT}.backup"), 0)
        worker.terminate()
        self.assert_ends(worker)
        self.assertEqual(self.upgrade()[0], 0)

    def test_an_upgrade_without_room_for_its_backup_is_refused(self):
        place = self.small_disk()
        jobs = self.fill(30, command="echo " + "x" * 9000)
        with full(place, 200_000):
            self.assert_refused(self.upgrade(), "no room on the disk")
            self.assertEqual([name for name in os.listdir(place) if "format" in name], [])
        self.assertEqual(self.format_of(self.path), (FORMAT, False, jobs))
        self.assertEqual(self.upgrade()[0], 0)
        self.assertEqual(self.format_of(self.path), (FORMAT + 1, True, jobs))


class Kernels(Processes):
    """Kernels that lack something, workers that cannot be reached, floods of datagrams."""

    less = None     # the function of LESS that is called before the program starts

    def command(self, *argv):
        if self.less is None:
            return super().command(*argv)
        return [sys.executable, "-c", LESS, self.less, os.path.dirname(MODULE), "--db", self.path,
                *argv]

    def test_a_run_that_ends_as_its_time_is_up_ends_once_where_there_are_no_pidfds(self):
        self.less = "without_pidfds"
        self.queue.enqueue_many([
            Job(command=f"sleep 2 & sleep {.28 + n / 1000}", timeout=.3, max_retries=1, cwd="/")
            for n in range(20)])
        self.assertNotIn("Traceback", self.drain("-c", "10"))
        self.assertEqual(len(self.outcomes()), 20)
        self.assertLessEqual(set(self.outcomes()), {"completed", "timeout"})
        self.assert_sound()

    def test_locks_that_do_not_hold_are_detected(self):
        for less in ("with_refused_locks", "with_locks_of_processes"):
            with self.subTest(less):
                self.less = less
                self.anew()
                first = self.enqueue(UNTIL_GO)
                worker = self.worker("-c", "2", "--name", "w")
                self.wait_state(first, PROCESSING)
                self.assertIn("w  pid", self.call("worker", "list")[1])
                self.assertNotIn("lost", self.call("check")[1])
                self.kill_worker(worker)
                self.touch("go")
                self.drain()
                self.assertEqual((self.job(first).state, self.job(first).crashes), (COMPLETED, 1))
                self.forget("go")

    @NEEDS_LOCKS
    def test_a_lock_that_cannot_be_asked_for_counts_as_held(self):
        locks = queuectl.Locks(self.path_of("lock"))
        self.assertFalse(locks.is_held(7))
        self.assertFalse(self.exists("lock"))   # a reader leaves nothing behind
        self.addCleanup(os.close, locks.hold(7))
        _, out, _ = self.done([sys.executable, "-c", """
import resource, sys
sys.path.insert(0, sys.argv[1])
import queuectl
locks = [queuectl.Locks(sys.argv[2]) for _ in "123"]
print(locks[0].is_held(7), locks[0].is_held(8))
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
print(locks[0].is_held(7), locks[0].is_held(8), locks[1].is_held(8))
resource.setrlimit(resource.RLIMIT_NOFILE, (9, hard))
print(locks[1].is_held(7), locks[1].is_held(8), locks[2].is_held(8))
""", os.path.dirname(MODULE), locks.path])
        self.assertEqual(out.split("\n")[:3], ["True False", "True False True", "True False False"])

    def test_a_worker_without_free_descriptors_keeps_what_it_has(self):
        """Each child that a job leaves behind keeps a pipe of its worker open."""
        def end_children():
            kill(*map(int, self.read("children").split()))
        self.configure(heartbeat="100ms")
        queue, children = self.queue, 45
        self.fill(children, command="sleep 100 & echo $! >> children")
        worker = self.worker(preexec_fn=functools.partial(
            resource.setrlimit, resource.RLIMIT_NOFILE, (40, 40)))
        self.addCleanup(end_children)
        self.wait_log("Too many open files")
        [before] = queue.store.workers()
        wait_for(lambda: queue.store.workers()[0].heartbeats > before.heartbeats + 2, "heartbeats")
        self.assertTrue(0 < queue.counts()[COMPLETED] < children)
        self.assertIsNone(worker.poll())
        wait_for(lambda: end_children() or queue.counts()[COMPLETED] == children, "the rest")

    def a_foreign_worker(self, last_heartbeat="1 hour", name="old"):
        """The row of a worker in a container that was replaced; the jobs it ran."""
        claims = queuectl.Claims(self.queue, WorkerOptions(name=name))
        claimed = ticked(claims, [1]).claims
        for one in claimed:
            one.release()
        let_go(claims.lock)
        self.do("UPDATE workers SET boot = 'gone', host = 'gone', heartbeat_at = "
                "strftime('%Y-%m-%dT%H:%M:%fZ', 'now', :ago) WHERE id = :id",
                ago=f"-{last_heartbeat}", id=claims.worker.id)
        return ids(claimed)

    def names(self):
        return [worker.name for worker in self.queue.store.workers()]

    def two_foreign_workers(self):
        """One had a job, whose id is returned; "idle" had none."""
        self.configure(lease="1s", heartbeat="100ms")
        self.enqueue("true")
        [job_id] = self.a_foreign_worker()
        self.a_foreign_worker(name="idle")
        return job_id

    def test_a_worker_removes_those_whose_heartbeats_stopped(self):
        job_id = self.two_foreign_workers()
        self.worker("--name", "new")
        self.wait_state(job_id, COMPLETED)
        wait_for(lambda: self.names() == ["new"], "the removal")
        self.assertEqual(self.job(job_id).crashes, 1)
        self.assertIn("worker idle on gone is removed: it sent no heartbeat for 1s",
                      self.read("worker.log"))

    def test_stop_removes_a_worker_whose_heartbeats_stopped(self):
        job_id, begun = self.two_foreign_workers(), time.monotonic()
        code, _, err = self.cli("worker", "stop", "old")
        self.assertGreater(time.monotonic() - begun, 1)
        self.assertEqual((code, self.names()), (0, ["idle"]), err)
        self.assertIn("old is removed: it sent no heartbeat", err)
        self.assertEqual(self.cli("worker", "stop")[0], 0)
        self.assertEqual(self.names(), [])
        self.drain()
        self.assertEqual((self.job(job_id).state, self.job(job_id).crashes), (COMPLETED, 1))

    def test_stop_does_not_remove_a_worker_whose_heartbeats_come(self):
        """Its clock may be an hour late."""
        self.configure(lease="1s", heartbeat="100ms")
        self.a_foreign_worker()
        stop = self.running("worker", "stop", "--timeout", "1500ms")
        while stop.poll() is None:
            self.do("UPDATE workers SET heartbeats = heartbeats + 1")
            time.sleep(.05)
        self.assertEqual((stop.returncode != 0, self.names()), (True, ["old"]))

    def test_the_name_of_a_worker_whose_heartbeats_stopped_is_free(self):
        self.enqueue("true")
        self.a_foreign_worker("20 seconds")
        code, _, err = self.call("worker", "start", "--name", "old", "--drain")
        self.assertEqual(code, 1)
        self.assertIn("a worker named 'old' is running already", err)
        self.do("UPDATE workers SET heartbeat_at = '2020-01-01T00:00:00.000Z'")
        self.worker("--name", "old")
        wait_for(lambda: self.names() == ["old#1", "old"], "the new one")

    def test_a_worker_whose_heartbeats_stopped_does_not_count_as_running(self):
        for last_heartbeat, is_there in (("1 hour", False), ("1 minute", True)):
            with self.subTest(last_heartbeat):
                self.anew()
                self.configure(lease="30m")
                self.a_foreign_worker(last_heartbeat)
                code, out, err = self.cli("enqueue", "true")
                self.assertEqual((code, out), (0, "job-1\n"))
                listed, note = self.cli("worker", "list")[1:]
                self.assertRegex(listed, "old .*no heartbeat for")
                for said in (err, self.cli("status")[1].replace("none", "no worker is"), note,
                             self.cli("show", "job-1", "--json")[1]):
                    self.assertEqual("no worker is running" in said, not is_there)
                shown = json.loads(self.cli("status", "--json")[1])["workers"] \
                    + json.loads(self.cli("worker", "list", "--json")[1])
                self.assertEqual([one["name"] for one in shown], ["old", "old"])
                found = json.loads(self.cli("check", "--json")[1])
                told = {one["code"]: (one["level"], one["hint"]) for one in found["findings"]}
                self.assertEqual("no-worker" in told, not is_there)     # the job is due
                level, hint = told["silent-worker"]
                self.assertEqual(level, "warning")
                self.assertIn("it is suspended" if is_there else
                              "if it is gone, `queuectl worker stop old` removes it", hint)
                self.assertTrue(found["sound"])

    def test_a_job_s_wait_does_not_count_on_a_worker_without_heartbeats(self):
        self.a_foreign_worker()
        claims = queuectl.Claims(self.queue, WorkerOptions())
        self.addCleanup(claims.leave)
        self.enqueue("true", "--id", "a")
        [claim] = ticked(claims, [1]).claims
        self.addCleanup(claim.release)
        self.enqueue("true", "--id", "b")
        with mock.patch.dict(os.environ, QUEUECTL_DB=self.path,
                             QUEUECTL_CLAIM=str(claim.number)), \
                refused("blocked", "has the slots"):
            self.queue.wait("b", timeout=0.5)

    def a_worker_without_heartbeats(self, *argv):
        """One whose next heartbeat does not come during the test; its port."""
        self.configure(heartbeat="10m")
        self.listed_worker(*argv)
        [worker] = self.queue.store.workers()
        if worker.port is None:
            self.skipTest("there is no loopback here")
        return worker.port

    def flood(self, port, *messages):
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for n in range(3000):
                sender.sendto(messages[n % len(messages)], ("127.0.0.1", port))

    def test_datagrams_alone_make_no_worker_write(self):
        def writes():
            return self.queue.store.changes(), self.queue.store.workers()[0].heartbeats
        port = self.a_worker_without_heartbeats()
        self.enqueue(f"touch began; {UNTIL_GO}")
        self.wait_file("began")
        before = None
        while before != writes():
            before = writes()
            time.sleep(.2)      # until no commit comes any more
        for messages in ([b"jobs"], [b"orders"], [b"output"], [b"", b"x" * 9000],
                         [b"jobs", b"orders", b"output", b"jobs\n"]):
            with self.subTest(messages[0]):
                self.flood(port, *messages)
                self.assertEqual(writes(), before)
        self.touch("go")
        self.wait_state("job-1", COMPLETED)

    def test_requests_take_effect_at_once_also_in_a_flood_of_datagrams(self):
        port, stop = self.a_worker_without_heartbeats("-c", "2", "--name", "w"), threading.Event()

        def pour():
            while not stop.is_set():
                self.flood(port, b"jobs", b"orders", b"output")

        def cancelled(job):
            self.enqueue("sleep 100", "--id", job)
            self.wait_state(job, PROCESSING)
            self.assertEqual(self.cli("cancel", job)[0], 0)
            self.wait_state(job, CANCELLED)
        cancelled("a")
        self.cli("config", "set", "timeout", "200ms")
        self.enqueue("sleep 100", "--id", "late", "--max-retries", "1")
        self.wait_state("late", DEAD)
        self.cli("config", "set", "timeout", "0")
        pouring = threading.Thread(target=pour)
        pouring.start()
        self.addCleanup(pouring.join)
        self.addCleanup(stop.set)
        self.enqueue("true", "--id", "quick")
        self.wait_state("quick", COMPLETED)
        cancelled("b")
        self.assertEqual(self.cli("worker", "stop", "w")[0], 0)

    def test_output_is_stored_for_readers_as_it_comes_and_not_more_often(self):
        self.a_worker_without_heartbeats()
        self.enqueue("i=0; while [ ! -e go ]; do i=$((i+1)); echo $i; sleep .01; done")
        self.wait_state("job-1", PROCESSING)
        with Queue(self.path) as queue:
            wait_for(lambda: queue.fresh_run("job-1").output_bytes, "output")
            begun, seen, commits = time.monotonic(), queue.store.changes(), 0
            while time.monotonic() < begun + 1:
                queue.wake(queuectl.PEEK)
                commits += queue.store.changes() != seen
                seen = queue.store.changes()
                time.sleep(.005)
            self.assertTrue(0 < commits < 16, commits)
        self.touch("go")

    def test_a_run_in_progress_is_read_without_its_output(self):
        claims = queuectl.Claims(self.queue, WorkerOptions())
        self.fill(1)
        [claim] = ticked(claims, [1]).claims
        ticked(claims, outputs={claim.number: output_of(b"printed")})
        self.assertEqual(self.queue.run("job-1").output, b"printed")
        [row] = self.queue.store.rows(queuectl.Sql.UNDER_WAY)
        self.assertEqual(queuectl.Run(*row), self.queue.run("job-1")._replace(output=b""))


# ---- Times -------------------------------------------------------------------

class Times(Processes):
    """Zones, clocks that are set, runs that are skipped, and how times are shown."""

    def in_zone(self, zone, *argv):
        return self.call(*argv, env={**os.environ, "TZ": zone})

    def schedule(self, name, cron, *argv, zone="UTC"):
        """Add one in a zone; what is said of it."""
        code, _, err = self.in_zone(zone, "schedule", "add", name, cron, *argv, "--", "true")
        self.assertEqual(code, 0, err)
        return err

    def schedules(self):
        return json.loads(self.cli("schedule", "list", "--json")[1])

    def set_schedules(self, **values):
        """Change the row of each schedule."""
        self.do("UPDATE schedules SET " + ", ".join(f"{name} = :{name}" for name in values),
                **values)

    def test_a_schedule_keeps_the_zone_in_which_it_was_added(self):
        tokyo = "Asia/Tokyo", "0 9 * * *", "00:00"
        rows = (("k", ("30 9 * * *",), "Asia/Kolkata", "09:30+05:30",
                 ("Asia/Kolkata", "30 9 * * *", "04:00")),
                *((name, argv, "UTC", "00:00+00:00", tokyo) for name, argv in (
                    ("a", ("CRON_TZ=Asia/Tokyo 0 9 * * *",)),
                    ("b", ("0 9 * * *", "--tz", "Asia/Tokyo")),
                    ("c", ("CRON_TZ=Asia/Tokyo 0 9 * * *", "--tz", "Asia/Tokyo")))))
        for name, argv, zone, at, _ in rows:
            self.assertIn(at, self.schedule(name, *argv, zone=zone))
        self.assertEqual({one["name"]: (one["tz"], one["cron"], one["next_run"][11:16])
                          for one in self.schedules()}, {row[0]: row[-1] for row in rows})
        for argv in (("0 9 * * *", "--tz", "Mars/Olympus"),
                     ("CRON_TZ=Asia/Tokyo 0 9 * * *", "--tz", "UTC")):
            code, _, err = self.cli("schedule", "add", "x", *argv, "--", "true")
            self.assertEqual((code, "zone" in err), (1, True), err)

    def test_a_worker_in_another_zone_keeps_the_next_runs_too(self):
        self.schedule("k", "30 9 * * *", zone="Asia/Kolkata")
        self.set_schedules(next_run="2001-01-01T04:00:00.000Z")
        self.worker("--max-jobs", "1", env={**os.environ, "TZ": "America/New_York"})
        wait_for(lambda: self.schedules()[0]["last_success"], "the success")
        [one] = self.schedules()
        self.assertEqual((one["next_run"][11:16], one["last_job"], one["last_state"]),
                         ("04:00", "job-1", COMPLETED))

    def test_a_local_zone_is_found_by_its_name_or_by_its_link(self):
        if not os.path.exists("/usr/share/zoneinfo/Asia/Kolkata"):
            self.skipTest("no time zones are installed here")
        os.makedirs(self.path_of("zoneinfo/Asia"))
        other = self.path_of("zoneinfo/Asia/Tokyo")     # as where a container has the host's
        shutil.copy("/usr/share/zoneinfo/Asia/Kolkata", other)  # file mounted over its own
        zones = {":Asia/Tokyo": "Asia/Tokyo", "": "UTC", "JST-9": None,
                 ":/usr/share/zoneinfo/Asia/Kolkata": "Asia/Kolkata", f":{other}": None}
        for n, (zone, tz) in enumerate(zones.items()):
            self.assertIn(f"every day, {tz or 'local time'}\n",
                          self.schedule(f"s{n}", "0 9 * * *", zone=zone))
        self.assertEqual([one["tz"] for one in self.schedules()], [*zones.values()])
        self.assertEqual(self.schedules()[-1]["next_run"][11:16], "03:30")

    def test_a_schedule_without_a_zone_follows_a_change_of_etc_localtime(self):
        etc, zones = self.path_of("etc"), "/usr/share/zoneinfo/Asia/"
        os.mkdir(etc)
        shutil.copy("/etc/passwd", etc)
        shutil.copy(zones + "Kolkata", etc + "/localtime")
        inside = ["unshare", "-m", *["-r"] * (os.geteuid() != 0), "sh", "-c",
                  f"mount --bind {shlex.quote(etc)} /etc && unset TZ && exec \"$@\"", "sh"]
        if not shutil.which("unshare") or self.done([*inside, "true"])[0]:
            self.skipTest("no mount namespace here")
        self.configure(heartbeat="200ms")
        plainly = self.command
        self.command = lambda *argv: [*inside, *plainly(*argv)]
        self.schedule("s", "0 9 * * *")
        self.assertEqual(self.schedules()[0]["tz"], None)
        self.worker()
        self.wait_log("+05:30 worker")
        shutil.copy(zones + "Tokyo", etc + "/new")
        os.replace(etc + "/new", etc + "/localtime")

        def is_noticed():
            self.set_schedules(next_run="2001-01-01T00:00:00.000Z")
            time.sleep(0.05)
            next_run = self.schedules()[0]["next_run"]
            return next_run[11:16] == "00:00" and next_run > "2002"
        wait_for(is_noticed, "the second zone")

    def test_a_zone_that_is_unknown_here_pauses_the_schedule_and_is_reported(self):
        self.schedule("s", "* * * * *")
        self.set_schedules(tz="Mars/Olympus", next_run="2001")
        self.worker()
        said = "the time zone 'Mars/Olympus' is unknown here"
        self.wait_log(f"schedule s is paused: {said}")
        self.assertTrue(self.queue.schedule("s").paused)
        self.assertEqual(self.queue.counts(), dict.fromkeys(STATES, 0))
        self.assertIn(said, self.cli("check")[1])
        self.assertIn(f"cannot be read: {said}\npaused\n", self.cli("schedule", "show", "s")[1])

    def test_a_run_that_is_skipped_is_counted_logged_and_shown(self):
        self.cli("schedule", "add", "s", "0 0 1 1 *", "--", "sleep", "60")
        self.cli("schedule", "run", "s")
        self.worker("-c", "2")
        self.wait_state("job-1", PROCESSING)
        self.set_schedules(next_run="2001-01-02T00:00:00.000Z", last_run="2001-01-01T00:00:00.000Z")
        self.queue.wake(queuectl.NEW_JOBS)
        self.wait_log("schedule s: a run is skipped, job-1 is still processing")
        self.assertEqual(self.schedules()[0]["skipped"], 1)
        self.assertEqual(self.read("worker.log").count("a run is skipped"), 1)
        metrics = queuectl.metrics_text(self.queue.scrape())
        for text, words in (
                (self.cli("schedule", "list")[1], "SKIPPED"),
                (self.cli("schedule", "show", "s")[1], r"skipped +1 run\b"),
                (self.cli("check")[1], "schedule s skips runs"),
                (metrics, r'queuectl_schedule_skipped_total\{schedule="s"\} [1-9]'),
                (metrics, r'queuectl_schedule_last_success_timestamp_seconds\{schedule="s"\} 0')):
            self.assertRegex(text, words)

    def test_due_jobs_and_schedules_without_a_worker_are_reported(self):
        self.schedule("s", "0 0 1 1 *")
        self.assertIn("next due  schedule s in", self.cli("status")[1])
        self.fill(3, queue="gpu")
        self.enqueue("true", "--queue", "gpu", "--delay", "1h")
        self.set_schedules(next_run="2001-01-01T00:00:00.000Z")
        for command in ("status", "check"):
            code, out, _ = self.cli(command)
            self.assertEqual(code, 0)
            self.assertRegex(out, "queue gpu has 3 due jobs, the oldest for .*; no "
                                  "worker is running")
            self.assertRegex(out, "schedule s has been due for .*, and no worker is running")
        self.assertEqual(json.loads(self.cli("status", "--json")[1])["next_due"],
                         "2001-01-01T00:00:00.000Z")
        self.worker("--queue", "other")
        wait_for(lambda: "no worker takes queue" in self.cli("check")[1], "the check")
        self.cli("pause")
        self.assertNotIn("no worker", self.cli("check")[1] + self.cli("status")[1])

    def test_people_read_local_times_with_their_offset(self):
        self.enqueue("true", "--delay", "50d", "--id", "late")
        self.enqueue("true")
        stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\+05:30 "
        for command, words in (
                ("worker start --drain", rf"\A({stamp}.*\n)+\Z"),
                ("show late", rf"(?m)^due +{stamp}\(in \d+d.*\)$"),
                ("events", r"(?m)^([\d-]+ )?\d\d:\d\d:\d\d\.\d{3}\+05:30  job-2 ")):
            self.assertRegex("".join(self.in_zone("Asia/Kolkata", *command.split())[1:]), words)
        self.assertEqual(queuectl.local_time(NOON, NOON + 86400)[:10],
                         time.strftime("%Y-%m-%d", time.localtime(NOON)))

    def test_a_time_at_the_end_of_the_calendar_is_shown_too(self):
        for zone, at in (("Asia/Tokyo", "9999-12-31T23:30:00Z"),
                         ("America/New_York", "0001-01-01T00:30:00Z")):
            code, out, _ = self.in_zone(zone, "show", self.enqueue("true", "--run-at", at))
            self.assertEqual(code, 0)
            self.assertIn(at.replace("T", " ").replace("Z", "+00:00"), out)


# ---- Fuzz --------------------------------------------------------------------

# An id that a job is to come `after` must be there: no schema can say that.
FUZZ_SETTINGS = b"""
[[operations]]
include-name = "POST /api/jobs"
checks.positive_data_acceptance.enabled = false
"""


def fuzz(cases, seed):
    """Have schemathesis try the API by its own description; 0 or 1.

    No worker runs there, so no command that it makes up is ever run.
    """
    if importlib.util.find_spec("schemathesis") is None:
        print("skipped: schemathesis is not installed (pip install schemathesis)")
        return 0
    with tempfile.TemporaryDirectory() as here:
        write_bytes(os.path.join(here, "schemathesis.toml"), FUZZ_SETTINGS)
        with open(os.path.join(here, "log"), "wb") as log:
            server = subprocess.Popen(
                [sys.executable, MODULE, "web", "--port", "0"], cwd=here, stderr=log,
                stdout=subprocess.PIPE, env={**os.environ, "QUEUECTL_TOKEN": TOKEN})
        with server.stdout:
            url = server.stdout.readline().decode().partition("?")[0]
        made, failed, share = 0, 0, max(10, cases // 40)
        while made < cases and not failed:
            done = subprocess.run(
                [sys.executable, "-m", "schemathesis.cli", "run",
                 f"{url}api/openapi.json", "--header", f"Authorization: Bearer {TOKEN}",
                 "--exclude-path", "/api/events", "--max-examples", str(share),
                 "--request-timeout", "10", "--seed", f"{seed}{made}", "--no-color",
                 "--generation-database", "none"], cwd=here, check=False,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            said = done.stdout.decode("utf-8", "replace")
            found = re.search(r"(\d+) generated", said)
            failed, made = done.returncode, made + (int(found[1]) if found else cases)
            if failed:
                print(said[-20_000:])
        server.send_signal(signal.SIGTERM)
        failed = failed or server.wait(10)
        broken = read_bytes(os.path.join(here, "log")).count(b"internal error")
    print(f"{made} cases, {broken} internal errors: {'NOT ' * bool(failed or broken)}as "
          "described")
    return 1 if failed or broken else 0


# ---- Mutants -----------------------------------------------------------------
# Does any test notice if a decision is made differently? One node of one function is
# changed in a fork of this process, and the tests that have met its statement run
# there, the quickest first, until one fails. What survives shows that a test is
# missing, that code is not needed, or that the change makes no difference.

# The sections that decide.
DECIDING = ("Words", "Rules", "Cron", "Fields", "SQL", "SQLite", "Ledger", "Queue",
            "Claims", "Worker")
JUDGES = (Words, Rules, Cron, Fields, Statements, Files, Hosts, Notices, Promises, Ticks, Checks,
          Workers, Views, Web, Metrics, CommandLine, Completion)
SECTION_JUDGES = {"Worker": (Program,), "Claims": (Model,), "SQL": (Model,)}   # also
JUDGE_SECONDS = 20.0    # of tests, quickest first, that a mutant has to survive
JUDGE_PATIENCE = 40     # seconds for a test, run twice, that is to be a judge

OTHERS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot,
          ast.In: ast.NotIn, ast.Add: ast.Sub, ast.Mult: ast.Div, ast.Break: ast.Continue}
OTHERS.update({new: old for old, new in OTHERS.items()})
OTHERS.update({ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult})
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
NEEDLESS = ast.Expr, ast.Assign, ast.AugAssign, ast.AnnAssign, ast.Raise, ast.Delete
NO_DECISION = ("annotation", "returns", "decorator_list", "format_spec")
OTHER_SQL = (
    (r"\bAND\b[^()]*?(?=\n|$)", ""), (r"\bWHERE\b.*?\bAND\b", "WHERE"),
    (r"<=|>=", lambda found: found[0][0]), (r"(?<!<)[<>](?![=>])", r"\g<0>="),
    (r"\bDESC\b", "ASC"), (r"ORDER BY \w+(?! DESC)\b", r"\g<0> DESC"), ("MIN", "MAX"),
    ("MAX", "MIN"), (r"IS NOT NULL", "IS NULL"), ("<>", "="), ("=", "<>"), (r"\bOR\b", "AND"),
    (r"(?<=[a-z]) \+ ", " - "), (r"(?<=[a-z]) - ", " + "), (r"LIMIT :\w+", ""),
    (r"\w+ = :\w+,", ""), (r", \w+ = :\w+", ""), (r"\b\d+$", "0"), (r"UNION ALL", "EXCEPT"))


class Mutant(NamedTuple):
    """One change, and how to make it in a process."""
    section: str
    place: str                  # the function, or the statement of Sql
    what: str
    lines: range                # of the statement; a test that met one may notice
    make: Callable[[], None]


def other_nodes(node, parent, field):
    """What may stand in a node's place."""
    kind, value = type(node), getattr(node, "value", None)
    if field == "test" and kind is not ast.Constant:
        yield ast.Constant(False)
    if field == "ifs" or (field == "test" and kind is not ast.Constant
                          and not isinstance(parent, ast.While)):
        yield ast.Constant(True)
    if kind in OTHERS:
        yield OTHERS[kind]()
    elif kind is ast.Name and node.id in OTHER_NAMES:
        yield ast.Name(OTHER_NAMES[node.id], ast.Load())
    elif kind is ast.Constant and isinstance(value, bool):
        yield ast.Constant(not value)
    elif kind is ast.Constant and isinstance(value, (int, float)):
        yield ast.Constant(value + 1)
    elif kind is ast.Constant and isinstance(value, (str, bytes)):
        yield ast.Constant(value[:0] if value else "other")
    elif kind is ast.BoolOp:
        for value in node.values:
            rest = [one for one in node.values if one is not value]
            yield ast.BoolOp(node.op, rest) if rest[1:] else rest[0]
    elif kind is ast.UnaryOp and isinstance(node.op, (ast.Not, ast.USub)):
        yield node.operand
    elif kind is ast.Return and value and getattr(value, "value", node) is not None:
        yield ast.Return(ast.Constant(None))
    elif kind in NEEDLESS and not (kind is ast.Expr
                                   and isinstance(value, (ast.Constant, ast.Yield))):
        yield ast.Pass()


def shown(node):
    """A node as text in one line."""
    return " ".join(ast.unparse(node).split()) or type(node).__name__


def other_trees(parent, statement, words=True):
    """Change each node below in each way, for the time of a step: (what, statement).

    An operator, a name and a number are shown with their parent. Texts of messages
    decide nothing.
    """
    for field, holder, key in list(places(parent)):
        node = holder[key]
        text = getattr(node, "value", None)
        if field in NO_DECISION or isinstance(node, ast.Assert) \
                or (isinstance(node, ast.Expr) and isinstance(text, ast.Constant)) \
                or (not words and isinstance(text, str)):
            continue
        own = node if isinstance(node, ast.stmt) else statement
        is_part = isinstance(node, (ast.Constant, ast.Name, ast.cmpop, ast.operator)) \
            and field not in ("test", "ifs") and not hasattr(parent, "body")
        for other in other_nodes(node, parent, field):
            old = shown(parent if is_part else node)
            holder[key] = ast.fix_missing_locations(ast.copy_location(other, node))
            yield f"{old} -> {shown(parent if is_part else other)}", own
            holder[key] = node
        yield from other_trees(node, own, words and not isinstance(
            node, (ast.Raise, ast.JoinedStr)))


class Inside(subprocess.Popen):
    """Runs our own program in a fork of this process: at once, and as changed here."""

    def __init__(self, args, *rest, **options):
        if args[:2] == program():
            options["preexec_fn"] = functools.partial(
                self._run, args[2:], options.get("env"), options.get("preexec_fn"),
                options.get("pass_fds", ()))
        super().__init__(args, *rest, **options)

    @staticmethod
    def _run(argv, env, before, kept):
        if before:
            before()
        for fd in map(int, os.listdir("/dev/fd")):
            if fd > 2 and fd not in kept:
                with contextlib.suppress(OSError):
                    os.close(fd)
        if env is not None:
            os.environ.clear()
            os.environ.update(env)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, closefd=False) for fd, mode in enumerate("rww"))
        try:
            code = queuectl.main(argv)
        except SystemExit as end:
            code = end.code
        finally:
            sys.stdout.flush()
            os._exit(code)


def passes(test):
    """Whether a test, run here, was not seen to fail."""
    result = unittest.TestResult()
    test.run(result)
    return result.wasSuccessful()


def forked(work):
    """What a fork of this process returns as its exit status; it leaves nothing behind."""
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            os.dup2(os.open(os.devnull, os.O_RDWR), 1)
            os.dup2(1, 2)
            sys.stdout, sys.stderr = open(1, "w"), open(2, "w")     # not a test's
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            subprocess.Popen = Inside
            os._exit(work())
        finally:
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    with contextlib.suppress(ChildProcessError):    # this process is the subreaper
        while True:
            kill(*map(int, read_bytes(f"/proc/self/task/{os.getpid()}/children").split()))
            os.waitpid(-1, 0)
    for name in os.listdir(tempfile.tempdir):
        if name.startswith("queuectl test"):
            shutil.rmtree(os.path.join(tempfile.tempdir, name), True)
    return status


def judged(classes):
    """[(seconds, test, the lines that it meets)] of the tests that pass, quickest first."""
    told, found = os.path.join(tempfile.tempdir, "told"), []

    def look(test):
        signal.alarm(JUDGE_PATIENCE)
        begun = time.monotonic()
        if passes(test):
            took = time.monotonic() - begun
            with Lines(told + ".lines") as lines:
                met = lines.hits if passes(test) else ()
            write_bytes(told, json.dumps([took, *met]).encode())
        return 0
    for one in classes:
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(one):
            write_bytes(told, b"[0]")   # a fork each: no cache may know the right answer
            forked(functools.partial(look, test))
            took, *lines = json.loads(read_bytes(told))
            found.append((took, test, frozenset(lines)))
    return sorted((one for one in found if one[2]), key=lambda one: one[0])


def judge(mutant, tests):
    """Whether a test notices; one that takes far too long ends this process, so it does."""
    mutant.make()
    for took, test in tests:
        signal.setitimer(signal.ITIMER_REAL, 3 + 10 * took)
        if not passes(test):
            return True
    return False


def put_in(old, new):
    """Give a function of the module, and those it has made already, the code of another."""
    inner = {id(one): other for one, other in zip(
        *([part for part in code.co_consts if isinstance(part, types.CodeType)]
          for code in (old.__code__, new.__code__))) if one.co_name == other.co_name}
    for one in gc.get_objects() if inner else ():
        if isinstance(one, types.FunctionType) and id(one.__code__) in inner:
            one.__code__ = inner[id(one.__code__)]
    for name in ("__code__", "__defaults__", "__kwdefaults__"):
        setattr(old, name, getattr(new, name))


def code_mutants(tree, section_of, names):
    """Mutants of the functions of some sections."""
    owners = [(queuectl, tree), *((getattr(queuectl, node.name), node)
                                  for node in tree.body if isinstance(node, ast.ClassDef))]
    for owner, node in owners:
        for function in node.body:
            if isinstance(function, ast.FunctionDef) and section_of(function.lineno) in names:
                place = function.name if owner is queuectl else f"{owner.__name__}.{function.name}"
                for what, own in other_trees(function, function):
                    last = own.end_lineno if own is function or not hasattr(own, "body") \
                        else max(own.lineno, own.body[0].lineno - 1)
                    yield Mutant(section_of(own.lineno), place, what, range(own.lineno, last + 1),
                                 functools.partial(put_in, *recompiled(owner, function)))


def sql_mutants(tree):
    """Mutants of the statements, judged where they are used."""
    users = collections.defaultdict(set)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") in ("Sql", "cls"):
            users[node.attr].add(node.lineno)
    for node in definition("Sql", tree).body:
        name = getattr(getattr(node, "targets", [None])[0], "id", "")
        text = getattr(queuectl.Sql, name, None)
        if not isinstance(text, str) or name == "SCHEMA" or text.startswith("PRAGMA"):
            continue
        for old, new in OTHER_SQL:
            for found in re.finditer(old, text):
                other = found.expand(new) if isinstance(new, str) else new(found)
                if other != found[0]:
                    changed = text[:found.start()] + other + text[found.end():]
                    yield Mutant("SQL", name, f"{found[0].strip()} -> {other}", users[name],
                                 functools.partial(setattr, queuectl.Sql, name, changed))


def mutants(names):
    """The mutants of some sections."""
    source, tree = inspect.getsource(queuectl), copy.deepcopy(module_tree())
    banners = [(source.count("\n", 0, found.start()) + 1, found[1])
               for found in re.finditer(r"^# ---- \d+ (\w+) -+$", source, re.M)]

    def section_of(line):
        return [name for start, name in [(0, ""), *banners] if start <= line][-1]
    yield from code_mutants(tree, section_of, names)
    yield from sql_mutants(tree) if "SQL" in names else ()


def mutate(names, scale, seed):
    """Try a share of the mutants of some sections: those that survive unexplained, a table."""
    names, chance = names or DECIDING, random.Random(seed)
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), ".ci", "survivors.tsv")
    known = {tuple(line.split("\t")[:3]) for line in read_bytes(path).decode().splitlines()}
    with contextlib.suppress(OSError, AttributeError):  # orphans become our children
        import ctypes
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    program()       # before the forks, which share it
    tempfile.tempdir = tempfile.mkdtemp(prefix="queuectl mutants ", dir=FAST)
    begun, common = time.monotonic(), judged(JUDGES)
    judges = {name: common + judged(SECTION_JUDGES.get(name, ())) for name in names}
    print(f"{len(common)} tests looked at in {time.monotonic() - begun:.0f} s")
    figures, stale = {name: collections.Counter() for name in names}, set(known)
    for mutant in mutants(names):
        if chance.random() > scale:
            continue
        tests, left = [], JUDGE_SECONDS
        for took, test, met in judges[mutant.section]:
            if left > took and (not met.isdisjoint(mutant.lines) or (
                    mutant.section == "SQL" and isinstance(test, Statements))):
                tests.append((took, test))
                left -= took
        fate = "killed" if tests and forked(functools.partial(judge, mutant, tests)) \
            else "explained" if mutant[:3] in known else "survived" if tests else "untouched"
        figures[mutant.section][fate] += 1
        stale -= {mutant[:3]} if fate == "explained" else set()
        if fate in ("survived", "untouched"):
            print(f"{mutant.section} {mutant.place}: {mutant.what}   ({fate})", flush=True)
    shutil.rmtree(tempfile.tempdir, True)
    for key in sorted(key for key in stale if scale == 1 and key[0] in names):
        print("explained, but no survivor:", *key, sep="  ")
    fates = "killed", "explained", "survived", "untouched"  # by any test
    for row in (("section", "mutants", *fates), *((name, sum(count.values()), *map(
            count.get, fates, [0] * 4)) for name, count in figures.items())):
        print("{:10}{:>10}{:>10}{:>10}{:>10}{:>10}".format(*row))
    print(f"in {time.monotonic() - begun:.0f} s")
    return any(count["survived"] + count["untouched"] for count in figures.values())


# ---- Ends --------------------------------------------------------------------

class Ends(Processes):
    """No command waits for what cannot end, and each says what it leaves."""

    def dead_and_behind(self):
        """A dead job, and one that comes after it."""
        self.enqueue("exit 1", "--id", "build", "--max-retries", "1")
        self.drain()
        code, _, err = self.cli("enqueue", "echo", "--id", "deploy", "--after", "build")
        self.assertEqual(code, 0)
        self.assertIn("deploy cannot run: it comes after build (dead)", err)

    def test_a_wait_for_a_job_behind_a_dead_one_ends_and_names_both(self):
        self.dead_and_behind()
        self.enqueue("echo", "--id", "tell", "--after", "deploy")
        for line in ("wait --all", "wait deploy", "wait tell build", "wait --queue default",
                     "enqueue x --wait --after build"):
            with self.subTest(line):
                code, _, err = self.cli(*line.split())
                self.assertEqual(code, 1, err)
                self.assertRegex(err, "error: .*cannot run: it comes after (build|deploy)")
        code, _, err = self.cli("dlq", "purge", "--yes")
        self.assertEqual(code, 0)
        self.assertIn("1 left unchanged: deploy waits for build (dead)", err)
        self.assertIn("build", self.cli("dlq")[1])

    def test_a_wait_goes_on_while_other_jobs_can_end(self):
        self.dead_and_behind()
        self.enqueue("sleep 0.5; touch slow", "--id", "slow")
        self.worker()
        code, _, err = self.cli("wait", "--all")
        self.assertEqual((code, self.exists("slow")), (1, True), err)
        self.assertIn("deploy cannot run: it comes after build (dead)", err)

    def test_a_drain_says_what_it_leaves_and_fails_if_a_job_of_its_own_is_dead(self):
        self.enqueue("exit 1", "--id", "build", "--max-retries", "1")
        self.enqueue("echo", "--id", "deploy", "--after", "build")
        self.enqueue("echo", "--id", "later", "--delay", "1h", "--queue", "night")
        for status in (1, 0):
            code, _, err = self.call("worker", "start", "--drain")
            self.assertEqual(code, status)
            self.assertIn("1 of queue default cannot run: deploy comes after build (dead)", err)
            self.assertRegex(err, "1 of queue night: later due in ")
        self.assertIn("1 job cannot run: deploy comes after build (dead)", self.cli("check")[1])

    def test_a_job_that_waits_for_itself_is_told_so(self):
        me = shlex.join(program())
        for words in ("wait $QUEUECTL_JOB_ID", "wait --all", "worker stop", "enqueue --wait true",
                      "logs -f $QUEUECTL_JOB_ID"):
            with self.subTest(words):
                self.anew()
                self.enqueue(f"{me} {words}; echo status $?", "--timeout", "20s")
                worker = self.worker()
                self.wait_state("job-1", COMPLETED)
                self.assertRegex(self.runs("job-1")[0].output.decode(),
                                 "job-1[^\n]* (runs this command|it runs)[^$]*status 1")
                worker.terminate()
                worker.wait(DEADLINE)

    def test_a_hook_waits_for_all_others_but_not_for_itself(self):
        self.configure(on_completed=f"{shlex.join(program())} wait --all; echo status $?")
        self.enqueue("true", "--id", "a")
        self.drain()
        [hook] = self.queue.jobs(queue="hooks")
        self.assertIn(b"status 1", self.queue.run(hook.id).output)

    def test_a_guard_that_does_not_hold_raises_also_without_assertions(self):
        said = self.done([sys.executable, "-O", "-c", """if True:
            import queuectl
            queue = queuectl.Queue("o.db")
            old = queue.enqueue("x")
            queue.cancel(old.id)
            queue.retry(old.id)
            queue.cancel(old.id)
            for change in (lambda store: store.move(
                    [queuectl.Change("cancel", old, old)], 0.0),
                           lambda store: store.edit(old, old, 0.0)):
                try:
                    with queue.store.transaction() as store:
                        change(store)
                except queuectl.Stale:
                    print("stale", queue.counts()["cancelled"])
            """], env={**os.environ, "PYTHONPATH": os.path.dirname(MODULE)})
        self.assertEqual(said, (0, "stale 1\nstale 1\n", ""))

    def test_a_job_with_very_many_runs_is_shown_by_its_last(self):
        self.fill(1)
        at = "'2027-01-01T00:00:00.000Z'"
        for n in range(1, 101):
            self.do("INSERT INTO runs (job, number, worker_id, worker, slot, started_at, "
                    "finished_at, outcome, output) "
                    f"VALUES (1, :n, 1, 'w', 1, {at}, {at}, 'failed', x'41')", n=n)
        out = self.cli("show", "job-1")[1]
        self.assertRegex(out, "(?m)^100  failed")
        self.assertNotRegex(out, "(?m)^80  failed")


# ---- Anywhere ----------------------------------------------------------------

class Anywhere(Processes):
    """One walk, however the program is started and whatever surrounds it."""

    def walk(self, argv, **options):
        """Enqueue, work, and read what was printed; in a new directory, if in none."""
        options = {"stdin": subprocess.DEVNULL, "cwd": tempfile.mkdtemp(dir=self.dir), **options}
        for line, printed in ((["enqueue", "printf 'h\\303\\251'"], "job-1\n"),
                              (["worker", "start", "--drain"], ""), (["logs", "job-1"], "h\u00e9")):
            code, out, err = self.done([*argv, *line], **options)
            self.assertEqual((code, out, "Traceback" in err), (0, printed, False), err)

    def walks(self, *cells):
        """Walk in each of (argv, options), two at once."""
        with futures.ThreadPoolExecutor(2) as executor:
            walks = [(argv, options, executor.submit(self.walk, argv, **options))
                     for argv, options in cells]
        for argv, options, walk in walks:
            with self.subTest(argv=argv, **options):
                walk.result()

    def other_user(self):
        """(a Python, options of `subprocess`) of a user who may not write everywhere."""
        if os.geteuid():
            return sys.executable, {}
        nobody = {"user": 65534, "group": 65534, "extra_groups": []}
        os.chown(self.dir, 65534, 65534)
        for python in (sys.executable, shutil.which("python3", path=os.defpath)):
            with contextlib.suppress(OSError, TypeError):
                if not self.done([python, "-c", "import sqlite3"], **nobody)[0]:
                    return python, nobody
        raise unittest.SkipTest("there is no Python here that another user may run")

    def test_however_it_is_started(self):
        link, archive, python = self.path_of("link"), self.path_of("queuectl.pyz"), sys.executable
        os.symlink(MODULE, link)
        os.mkdir(self.path_of("source"))
        shutil.copy(MODULE, self.path_of("source/queuectl.py"))
        zipapp.create_archive(self.path_of("source"), archive, main="queuectl:main")
        here = {"env": {**os.environ, "PYTHONPATH": os.path.dirname(MODULE)}}
        self.walks(
            ([python, "-I", link], {}), ([python, archive], {}),
            ([python, "-W", "error", "-X", "dev", "-m", "queuectl"], here),
            ([python, "-O", "-B", "-c", "import sys, queuectl; sys.exit(queuectl.main())"], here),
            ([python, "-OO", MODULE], {}))

    def test_whatever_surrounds_it(self):
        nothing = {"PATH": os.environ.get("PATH", os.defpath)}
        odd = self.path_of("a b's \u00e4\u4e2d")
        os.mkdir(odd)
        shutil.copy(MODULE, os.path.join(odd, "queuectl.py"))
        self.walks(
            # A umask is the process's, not the thread's: a shell sets it.
            *((["sh", "-c", f'umask {umask}; exec "$@"', "sh", *program()],
               {"env": {**nothing, **env}}) for umask, env in (
                ("077", {}), ("022", {"LC_ALL": "C"}),
                ("022", {"LC_ALL": "POSIX", "PYTHONUTF8": "0"}),
                ("000", {"HOME": "/nonexistent", "TERM": "dumb", "NO_COLOR": "1"}))),
            *((["sh", "-c", f'exec "$@" {closed}', "sh", *program()],
               {"start_new_session": True}) for closed in ("<&-", "<&- 2>&-")),
            ([sys.executable, "queuectl.py"], {"cwd": odd}))

    def test_without_a_network_even_loopback(self):
        alone = ["unshare", "--net", *["--map-root-user"] * bool(os.geteuid())]
        if not shutil.which("unshare") or self.done([*alone, "true"])[0]:
            self.skipTest("a network cannot be taken away here")
        self.walk([*alone, *program()])
        plainly = self.command
        self.command = lambda *argv: [*alone, *plainly(*argv)]
        self.configure(heartbeat="500ms")
        worker = self.listed_worker()
        for line in (["enqueue", "true"], ["wait", "job-1"], ["worker", "stop"]):
            # No datagram can wake the worker: it looks by itself.
            self.assertEqual(self.call(*line)[0], 0)
        self.assert_ends(worker)

    def test_from_a_source_and_a_home_that_cannot_be_written(self):
        source = self.path_of("source")
        os.mkdir(source)
        shutil.copy(MODULE, source)
        os.chmod(os.path.join(source, "queuectl.py"), 0o444)
        os.chmod(source, 0o555)
        self.addCleanup(os.chmod, source, 0o755)
        python, user = self.other_user()
        options = {"env": {"PATH": os.defpath, "LC_ALL": "C.UTF-8",
                           "HOME": source, "PYTHONPATH": source}, **user}
        for argv in ([python, os.path.join(source, "queuectl.py")], [python, "-m", "queuectl"]):
            with self.subTest(argv):
                folder = tempfile.mkdtemp(dir=self.dir)
                if user:
                    os.chown(folder, user["user"], user["group"])
                self.walk(argv, cwd=folder, **options)
        self.assertEqual(os.listdir(source), ["queuectl.py"])

    def test_imported_by_a_thread(self):
        self.assertEqual(self.done([sys.executable, "-W", "error", "-c", """
import sys, threading
def work():
    sys.path.insert(0, sys.argv[1])
    import queuectl
    with queuectl.Queue(sys.argv[2]) as one, queuectl.Queue(sys.argv[2]) as two:
        print(one.enqueue("true").id, two.job("job-1").state)
thread = threading.Thread(target=work)
thread.start()
thread.join()
""", os.path.dirname(MODULE), self.path])[1:], ("job-1 pending\n", ""))

    def test_it_works_in_threads_and_twice_on_one_file(self):
        with Queue(self.path) as one, Queue(self.path) as two, \
                futures.ThreadPoolExecutor(4) as executor:
            added = set(executor.map(lambda n: (one, two)[n % 2].enqueue("true").id, range(40)))
            self.assertEqual(len(added), 40)
            self.assertEqual(one.counts(), two.counts())


@unittest.skipUnless(shutil.which("ps"), "there is no ps here")
class ElsewherePosix(Processes):
    """Without what only Linux has: OFD locks, pidfd, waitid, /proc."""

    less = "without_linux"
    command, cli = Kernels.command, Processes.call

    heartbeat = "100ms"
    test_three_workers = Program.test_three_workers_run_each_job_once
    test_trees_end = Program.test_no_process_of_a_job_outlives_its_time_out_its_retry_or_the_worker
    test_a_lost_worker = \
        Program.test_a_lost_worker_is_noticed_at_once_its_tree_ended_and_charged_as_a_crash
    test_cancel_and_stop = \
        Program.test_jobs_are_cancelled_and_workers_stopped_from_another_terminal
    test_logs_follow = Program.test_logs_follow_one_job_as_it_prints_and_mark_the_lines_of_several

    def test_a_time_out_ends_a_tree_whose_environment_ps_does_not_tell(self):
        """macOS hides the environment of its own programs, such as sleep."""
        os.mkdir(self.path_of("bin"))
        self.script("bin/ps", 'if [ "$1" = axeww ]; then shift; set axww "$@"; fi\n'
                              f'exec {shutil.which("ps")} "$@"')
        self.enqueue("sleep 40 & echo $! > out; sleep 40; sleep 40",
                     "--timeout", "300ms", "--max-retries", "1")
        begun = time.monotonic()
        self.call("worker", "start", "--drain", env={
            **os.environ, "PATH": self.path_of("bin") + ":" + os.environ["PATH"]})
        self.assertEqual(self.outcomes(), ["timeout"])
        self.assertFalse(is_running(self.read("out")))
        self.assertLess(time.monotonic() - begun, 20)


# ---- The README ---------------------------------------------------------------

# What its recipes need beside queuectl: programs and files that are the reader's own.
STUBS = ("kcat", "amqp-consume", "systemctl", "rsync", "flac", "curl", "make", "mail", "torchrun")
SCRIPTS = ("test.sh", "build.sh", "deploy.sh", "backup.sh", "handle.sh")
ENDLESS = ("tail -F", "queuectl web")   # they go on until they are interrupted


@unittest.skipUnless(shutil.which("bash"), "there is no bash here")
class Readme(Processes):
    def setUp(self):
        super().setUp()
        for folder in ("bin", "photos"):
            os.mkdir(self.path_of(folder))
        for name in (*(f"bin/{stub}" for stub in STUBS), *SCRIPTS):
            self.script(name, "exit 0")
        self.script("bin/python3", f'exec "{sys.executable}" "$@"')
        self.script("bin/queuectl", 'exec "{}" "{}" "$@"'.format(*program()))
        for name, text in (("photos/a b.png", "picture"), ("jobs.txt", "true\n"), ("a.wav", ""),
                           ("train.py", ""), ("orders.jsonl", '{"command": "true"}\n')):
            write_bytes(self.path_of(name), text.encode())

    def blocks(self):
        """Each block of commands, in order: (its kind, its commands, all of it)."""
        text = read_bytes(os.path.join(os.path.dirname(MODULE), "README.md")).decode()
        for kind, block in re.findall(r"```(sh|console|python)\n(.*?)```", text, re.S):
            yield kind, block if kind != "console" else "".join(
                re.findall(r"(?m)^\$ (.*\n)", block)), block

    def run_block(self, kind, text):
        """(exit status, what it printed); None: it went on until it was interrupted."""
        argv = {"python": [sys.executable, "-c", text], "console": ["bash", "-c", text],
                "sh": ["bash", "-ec", text]}[kind]      # a drain with a dead job fails
        env = {**os.environ, "HOME": self.dir, "PATH": os.pathsep.join(
                   (self.path_of("bin"), os.environ.get("PATH", os.defpath))),
               "PYTHONPATH": os.path.dirname(MODULE)}
        process = subprocess.Popen(argv, cwd=self.dir, env=env, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                   start_new_session=True)
        is_endless = any(word in text for word in ENDLESS)
        try:
            out = process.communicate(timeout=1.5 if is_endless else DEADLINE)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGTERM)
            return None, process.communicate()[0].decode()
        return process.returncode, out.decode()

    def test_every_block_of_commands_runs_in_order(self):
        ran = 0
        for kind, text, _ in self.blocks():
            with self.subTest(text):
                status, said = self.run_block(kind, text)
                self.assertEqual(status, None if any(word in text for word in ENDLESS) else 0, said)
                self.assertNotRegex(said, "Traceback|queuectl: error")
            ran += 1
        self.assertGreaterEqual(ran, 10)
        self.assertEqual([job.command for job in self.queue.jobs(DEAD)], ["exit 1"])

    def test_the_start_and_the_retries_look_as_they_are_shown(self):
        def plain(text):
            for changing in (r"\d{4}-\d\d-\d\d (?=\d\d:)", r"\d\d:\d\d:\d\d\S+", r"/.*/",
                             r"(?<=worker )[^ `]+-\d+", r"[\d.]+m?s( ago)?\b|\bnow  "):
                text = re.sub(changing, "", text)
            return text.split()     # the columns of a table are as wide as their content

        for kind, text, block in self.blocks():
            if kind == "console":
                with self.subTest(text):
                    shown = re.sub(r"(?m)^\$ .*\n", "", block)
                    self.assertEqual(plain(self.run_block(kind, text)[1]), plain(shown))


# ---- Long runs ---------------------------------------------------------------

def chaos(seconds, seed):
    """Rounds of a minute, each with power cuts, until the time is over; a verdict. 0 or 1."""
    def counted(counter):
        return ", ".join(f"{counter[name]} {name}" for name in sorted(counter))
    end, total, bad, number = time.monotonic() + seconds, collections.Counter(), 0, 0
    while not number or time.monotonic() < end - 5:
        number += 1
        directory = tempfile.mkdtemp(prefix="queuectl chaos ")
        violations, done = chaos_round(os.path.join(directory, "chaos"), max(
            1, min(60, end - time.monotonic())), f"{seed}-{number}")
        found, cuts = power_cut_round(os.path.join(directory, "cuts"), 20, f"{seed}-{number}")
        violations += found
        done += collections.Counter({f"WALs {name}": n for name, n in cuts.items()})
        total += done
        bad += len(violations)
        print(f"round {number}: {counted(done)}: {len(violations)} violations", *violations,
              *[f"kept: {directory}"] * bool(violations), sep="\n    ", flush=True)
        if not violations:
            shutil.rmtree(directory, True)
    print(f"{number} rounds, seed {seed}: {counted(total)}")
    return verdict(bad)


# ---- Bench -------------------------------------------------------------------
# Each figure beside the limit of its matter, or beside other programs that do the same,
# measured alternately within one run: so a busy minute affects both. For Linux. The sizes
# are those of a full run; `--scale 0.05` makes them smaller, for a try.

PAIRS, QUICK_PAIRS = 5, 20  # takes of each side of a ratio; where it takes milliseconds
DRAIN_JOBS, LATENCY_JOBS, WAITING_JOBS = 2000, 200, 1_000_000
IDLE_SECONDS, TRACED_SECONDS = 60, 20
KILLS, FREEZES = 20, 5
WELL_UNDER = "<= 30"        # seconds: well under 60
PATIENCE = 300              # seconds until a measure is given up
STREAMS = 20
ASK_PAUSE = 0.01            # seconds between two requests

# Other programs, where they are installed: $1 times `true` in 4 slots.
RIVALS = {
    "parallel": 'yes true | head -n "$1" | parallel --gnu -j4 --joblog joblog',
    "tsp": 'export TS_SOCKET="$PWD/tsp"; tsp -S 4; for n in $(seq "$1"); do tsp true; '
           "done; tsp -w; tsp -K",
}


def figure(value):
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def median(values):
    return sorted(values)[len(values) // 2]


def p99(values):
    return sorted(values)[int(len(values) * 0.99)]


class Row(NamedTuple):
    """A row of the table."""
    what: str
    values: list            # none: it is not measured
    goal: str = ""          # a sign and a limit, for what `of` gives
    unit: str = ""
    of: Callable = median

    def __str__(self):
        if not self.values:
            return f"| {self.what} | not measured | | |"
        value, is_met = self.of(self.values), ""
        spread = f" ({figure(min(self.values))}-{figure(max(self.values))})"
        if self.goal:
            sign, limit = self.goal.split()
            is_met = "yes" if (value <= float(limit) if sign == "<=" else value >= float(limit)) \
                else "no"
        return (f"| {self.what} | {figure(value)}{self.unit}{spread * (len(self.values) > 1)} "
                f"| {self.goal} | {is_met} |")


def ratios(above, below):
    """Pair by pair."""
    return [a / b for a, b in zip(above, below)]


def alternately(takes, rounds=PAIRS):
    """Take each measure, then each again; the values of each, by its name."""
    values = {name: [] for name in takes}
    for _ in range(rounds):
        for name, take in takes.items():
            values[name].append(take())
    return values


def row_of(path, name):
    """The row of a worker; None: it is not there."""
    with Queue(path) as queue:
        return next((worker for worker in queue.store.workers() if worker.name == name), None)


class Bench:
    """Queues and processes in a directory, in sizes by a scale."""

    def __init__(self, directory, scale):
        self.dir, self._scale, self._numbers = directory, scale, itertools.count()
        self.env = {**os.environ, "HOME": directory, "PYTHONPATH": os.path.dirname(MODULE),
                    "QUEUECTL_TOKEN": TOKEN}
        for name in ("PYTHONDONTWRITEBYTECODE", "QUEUECTL_DB"):
            self.env.pop(name, None)

    def size(self, full, least=1):
        return max(least, round(full * self._scale))

    def filled(self, count):
        """The path of a new queue with so many jobs, and no WAL."""
        path = os.path.join(self.dir, f"{next(self._numbers)}.db")
        with Queue(path) as queue:
            for start in range(0, count, 50_000):
                queue.enqueue_many([Job(command="true", cwd="/")] * min(50_000, count - start))
            queue.store.db.relieve()
        return path

    def argv(self, path, *words):
        return [sys.executable, "-m", "queuectl", "--db", path, *words]

    def seconds(self, *argv, lines=b""):
        """The time of a whole process, which must succeed."""
        begun = time.monotonic()
        subprocess.run(argv, input=lines, stdout=subprocess.DEVNULL, check=True,
                       stderr=subprocess.DEVNULL, env=self.env, cwd=self.dir)
        return time.monotonic() - begun

    def drained(self, path, slots=4):
        """The time that a whole worker takes to run what is there."""
        return self.seconds(*self.argv(path, "worker", "start", "--drain", "-c", str(slots)))

    @contextlib.contextmanager
    def process(self, *argv):
        """One that runs meanwhile."""
        with subprocess.Popen(argv, env=self.env, cwd=self.dir, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
            try:
                yield process
            finally:
                process.kill()

    @contextlib.contextmanager
    def worker(self, path, slots=4, before=()):
        """The row of a worker, which is killed at the end with all that it has started.

        `before`: a program that starts it.
        """
        name = f"worker-{next(self._numbers)}"
        with self.process(*before, *self.argv(
                path, "worker", "start", "-c", str(slots), "--name", name)):
            worker = wait_for(lambda: row_of(path, name), f"the start of {name}")
            try:
                yield worker
            finally:
                kill(child_of(worker.pid) or NOBODY, worker.pid, *members(os.path.realpath(path)))


def bench_drain(bench):
    """The same commands, by the queue and without one."""
    count = bench.size(DRAIN_JOBS, 100)
    takes = {}
    for slots in ("2", "4", "8"):
        takes[f"{slots} slots"] = lambda slots=slots: bench.drained(bench.filled(count), slots)
        takes[f"`xargs -P {slots}`"] = lambda slots=slots: bench.seconds(
            "xargs", "-P", slots, "-n1", "sh", "-c", lines=b"true\n" * count)
    for name in filter(shutil.which, RIVALS):
        rival = functools.partial(bench.seconds, "sh", "-ec", RIVALS[name], "sh")
        with contextlib.suppress(subprocess.CalledProcessError):    # another program's name
            rival("4")
            takes[name] = functools.partial(rival, str(count))
    took = alternately(takes)
    yield Row(f"drain {count:,} x `true`, 4 slots: jobs a second",
              [count / one for one in took["4 slots"]])
    for slots, other, goal in (
            ("2 slots", "`xargs -P 2`", ">= 0.9"), ("4 slots", "`xargs -P 4`", ">= 1"),
            ("8 slots", "4 slots", ">= 1"),
            *(("4 slots", name, "") for name in RIVALS)):
        yield Row(f"its rate in {slots} against {other}",
                  ratios(took.get(other, ()), took[slots]), goal)


def bench_enqueue(bench):
    """Whole processes."""
    count = bench.size(WAITING_JOBS, 1000)
    few, many = (bench.argv(bench.filled(n), "enqueue", "true") for n in (1, count))
    took = alternately({
        "python": lambda: bench.seconds(sys.executable, "-c", "pass"),
        "few": lambda: bench.seconds(*few), "many": lambda: bench.seconds(*many)}, QUICK_PAIRS)
    yield Row("`enqueue` of a job", [one * 1000 for one in took["few"]], "", " ms")
    yield Row("against `python3 -c pass`", ratios(took["few"], took["python"]), "<= 2.7")
    yield Row(f"at {count:,} jobs in the file against 1", ratios(took["many"], took["few"]),
              "<= 1.1")


def bench_latency(bench):
    """From a commit to the command's first instruction, on an idle worker.

    The command prints the time twice: in between passes what printing it costs.
    """
    path, waits, costs = bench.filled(0), [], []
    with bench.worker(path), Queue(path) as queue:
        for _ in range(bench.size(LATENCY_JOBS, 10)):
            job, committed = queue.enqueue("date +%s%N; date +%s%N; :", cwd="/"), time.time()
            wait_for(lambda job=job: queue.job(job.id).state == COMPLETED, "its end")
            first, second = (int(word) / 1e9 for word in queue.run(job.id).output.split())
            waits.append(first - committed)
            costs.append(second - first)
    waits = [(wait - median(costs)) * 1000 for wait in waits]
    yield Row("from the commit to the command's start, idle worker", waits, "<= 5", " ms")
    yield Row("... of 99 in 100", waits, "<= 20", " ms", p99)


def idle(bench, seconds, read, before=()):
    """(heartbeats, what has changed of what is read) of a worker that has no job to run."""
    path = bench.filled(0)
    with bench.worker(path, before=before) as worker:
        def beats():
            return row_of(path, worker.name).heartbeats
        wait_for(lambda: beats() >= worker.heartbeats + 2, "the end of its start")
        begun = beats(), read(worker)
        time.sleep(seconds)
        return beats() - begun[0], read(worker) - begun[1]


def cpu_ticks(worker):
    """What worker and supervisor have used so far, without their children."""
    return sum(int(used) for pid in (worker.pid, child_of(worker.pid))
               for used in queuectl._stat_fields(pid)[11:13])


def bench_idle(bench):
    seconds, log = bench.size(IDLE_SECONDS, 5), os.path.join(bench.dir, "strace")
    _, ticks = idle(bench, seconds, cpu_ticks)
    yield Row(f"an idle worker of 4 for {seconds} s: CPU",
              [ticks / os.sysconf("SC_CLK_TCK") / seconds * 100], "<= 0.1", " % of a core")
    seconds, beats, syncs = bench.size(TRACED_SECONDS, 6), 0, []
    if shutil.which("strace"):
        beats, *syncs = idle(bench, seconds, lambda _: read_bytes(log).count(b"sync("), (
            "strace", "-f", "-qq", "-o", log, "-e", "trace=fsync,fdatasync"))
    yield Row(f"its fsyncs in {seconds} s, with {beats} heartbeats", syncs, f"<= {beats + 2}")


def recovery(bench, number=signal.SIGKILL, workers=2, **settings):
    """Send a signal to the worker that runs a job: seconds until its second run.

    Another worker is there, or is started after that.
    """
    path = bench.filled(0)
    with contextlib.ExitStack() as stack:
        queue = stack.enter_context(Queue(path))
        for key, value in settings.items():
            queue.configure(key, value)
        there = [stack.enter_context(bench.worker(path, 1)) for _ in range(workers)]
        job_id = queue.enqueue("sleep 600", cwd="/").id
        wait_for(lambda: queue.job(job_id).state == PROCESSING, "its start")
        [victim] = [one for one in there if one.name == queue.job(job_id).worker]
        killed = time.time()
        os.kill(child_of(victim.pid), number)
        if workers == 1:
            stack.enter_context(bench.worker(path, 1))
        second = wait_for(lambda: queue.runs(job_id)[1:], "its second run", PATIENCE)[0]
        return queuectl.epoch(second.started_at) - killed


def bench_recovery(bench):
    for what, times, options in (
            ("a killed worker, another alive", bench.size(KILLS, 2), {}),
            ("a killed worker, one started anew", bench.size(KILLS, 2), {"workers": 1}),
            ("a frozen worker, lease 3 s", bench.size(FREEZES),
             {"number": signal.SIGSTOP, "heartbeat": "1s", "lease": "3s"})):
        waits = [recovery(bench, **options) for _ in range(times)]
        yield Row(f"{what}: until its job runs again", waits, "", " s")
        yield Row("... the longest", waits, WELL_UNDER, " s", max)


def read_events(port, is_over):
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"GET /api/events HTTP/1.1\r\n" + BEARER + b"\r\n")
        while not is_over.is_set():
            assert sock.recv(1 << 20) or is_over.is_set(), "a stream was dropped"


@contextlib.contextmanager
def watched_server(bench, path):
    """A server with open event streams that are read: its port."""
    is_over = threading.Event()
    with futures.ThreadPoolExecutor(STREAMS) as threads, \
            bench.process(*bench.argv(path, "web", "--port", "0")) as process:
        port = int(re.search(rb":(\d+)/", process.stdout.readline())[1])
        readers = [threads.submit(read_events, port, is_over) for _ in range(STREAMS)]
        try:
            yield port
        finally:
            is_over.set()
            process.kill()      # which ends the streams
            for reader in readers:
                reader.result()


def answer_times(port, path, seconds):
    """Milliseconds of each of many requests."""
    times, end = [], time.monotonic() + seconds
    with contextlib.closing(http.client.HTTPConnection("localhost", port)) as client:
        while time.monotonic() < end:
            begun = time.monotonic()
            client.request("GET", path, headers={"Authorization": f"Bearer {TOKEN}"})
            reply = client.getresponse()
            assert reply.status == 200 and reply.read()
            times.append((time.monotonic() - begun) * 1000)
            time.sleep(ASK_PAUSE)
    return times


def bench_web(bench):
    """How much an open dashboard slows the worker, and the worker the dashboard."""
    jobs, times = bench.size(DRAIN_JOBS, 50), {"/": [], "/api/status": []}

    def watched(*targets):
        path = bench.filled(jobs)
        with watched_server(bench, path) as port, futures.ThreadPoolExecutor(1) as thread:
            draining = thread.submit(bench.drained, path)
            while targets and not draining.done():
                for target in targets:
                    times[target] += answer_times(port, target, 0.2)
            return draining.result()
    took = alternately({"alone": lambda: bench.drained(bench.filled(jobs)), "watched": watched,
                        "asked": lambda: watched(*times)})
    yield Row(f"drain with {STREAMS} event streams open against without",
              ratios(took["alone"], took["watched"]), ">= 0.9")
    for target, taken in times.items():
        yield Row(f"answers of {target} meanwhile, 99 of 100", taken, "<= 100", " ms", p99)


MEASURES = {"drain": bench_drain, "enqueue": bench_enqueue, "latency": bench_latency,
            "idle": bench_idle, "recovery": bench_recovery, "web": bench_web}


def bench(names, scale):
    """Measure what is named, or all, and print each row as it is known."""
    system = os.uname()
    print(f"{os.cpu_count()} cores, Python {sys.version.split()[0]}, SQLite "
          f"{sqlite3.sqlite_version}, {system.sysname} {system.release}, sizes x {scale:g}\n\n"
          "| what | measured (median, min-max) | goal | |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="queuectl bench ") as here:
        place = Bench(here, scale)
        for name in names or MEASURES:
            try:
                for row in MEASURES[name](place):
                    print(row, flush=True)
            except (AssertionError, OSError, subprocess.SubprocessError,
                    queuectl.QueueError) as error:
                print(f"| {name} | not measured: {queuectl.one_line(str(error))} | | |")
    return 0


def main():
    """`--bench`, `--chaos`, `--fuzz`, `--crash-points`, `--mutants`; or the tests."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--chaos", type=queuectl.parse_duration, metavar="DUR")
    parser.add_argument("--crash-points", type=float, nargs="?", const=1.0, metavar="SHARE")
    parser.add_argument("--fuzz", type=int, nargs="?", const=5000, metavar="CASES")
    parser.add_argument("--bench", nargs="*", choices=tuple(MEASURES), metavar="NAME")
    parser.add_argument("--mutants", nargs="*", choices=DECIDING, metavar="SECTION")
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--seed", default="1")
    args, rest = parser.parse_known_args()
    if args.bench is not None:
        return bench(args.bench, args.scale)
    if args.chaos is not None:
        return chaos(args.chaos, args.seed)
    if args.fuzz is not None:
        return fuzz(args.fuzz, args.seed)
    if args.mutants is not None:
        return mutate(args.mutants, args.scale, args.seed)
    if args.crash_points is not None:
        return crash_points(args.crash_points, args.seed)
    return unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    sys.exit(main())
