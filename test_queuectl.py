"""The tests of queuectl, in the order of its sections; real processes come last."""

from __future__ import annotations

import argparse
import ast
import collections
import contextlib
import inspect
import io
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import types
import unittest
from typing import NamedTuple

import queuectl
from queuectl import (
    CANCELLED, COMPLETED, DEAD, FAILED, MOVES, PENDING, PROCESSING, STATES,
    Claims, Outcome, Output, PoolOptions, Queue, Silence, Spec)

MODULE = os.path.abspath(queuectl.__file__)
NOON = 1_800_000_000.0
DEADLINE = 30.0     # seconds until a condition that should hold is given up


class FakeClock:
    """A wall clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


def wait_for(condition, what="the condition", seconds=DEADLINE):
    """The condition's first true value; an error after so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.01)
    raise AssertionError(f"waited {seconds} s in vain for {what}")


def settings(**changes):
    return queuectl.settings_of({})._replace(**changes)


class TestCase(unittest.TestCase):
    """Each test has a directory and a database of its own."""

    def setUp(self):
        self.dir = tempfile.mkdtemp(prefix="queuectl test ü ")
        self.addCleanup(shutil.rmtree, self.dir, True)
        self.path = os.path.join(self.dir, "queue.db")
        self.clock = FakeClock()

    def a_queue(self):
        queue = Queue(self.path, clock=self.clock)
        self.addCleanup(queue.close)
        return queue

    def a_pool(self, queue, **options):
        claims = Claims(queue, PoolOptions(**{"slots": 4, **options}))
        claims.register(None)
        return claims

    def claim_one(self, queue, claims):
        return claims.turn({}, {}, [1]).claimed[0]


def is_running(pid):
    """Whether the process lives; a zombie whose parent does not reap it does not."""
    return bool(queuectl._stat_fields(int(pid)))


def run_cli(*argv):
    """(exit status, stdout, stderr) of a command line, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = queuectl.main(list(argv))
        except SystemExit as end:
            code = end.code
    return code, out.getvalue(), err.getvalue()


# ---- 0 Architecture ----------------------------------------------------------

class Architecture(unittest.TestCase):
    source = inspect.getsource(queuectl)
    tree = ast.parse(source)
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]

    def test_no_definition_names_one_below_it(self):
        line = {node.name: node.lineno for node in self.tree.body
                if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
        for node in self.tree.body:
            for name in ast.walk(node):
                if isinstance(name, ast.Name) and line.get(name.id, 0) > name.lineno:
                    self.fail(f"line {name.lineno}: {name.id} is defined below its use")

    def test_banners_are_the_contents_of_the_docstring(self):
        banners = re.findall(r"^# ---- (\d+) (\w+) -+$", self.source, re.M)
        contents = re.findall(r"^ +(\d+) (\w+)  ", queuectl.__doc__, re.M)

        self.assertEqual(banners, contents)
        self.assertTrue(all(len(line) <= 88 for line in self.source.splitlines()))

    def test_functions_are_short(self):
        sizes = sorted(node.end_lineno - node.lineno + 1 for node in self.functions)

        self.assertLessEqual(sizes[len(sizes) // 2], 9)
        self.assertLessEqual(sizes[int(len(sizes) * 0.95)], 30)
        self.assertLessEqual(sizes[-1], 50)

    def test_public_functions_and_classes_have_docstrings(self):
        for node in ast.walk(self.tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) \
                    and not node.name.startswith("_") and node.name != "row" \
                    and node.name not in ("note", "restore", "room", "parse", "parsed"):
                self.assertTrue(ast.get_docstring(node), node.name)

    def test_only_the_standard_library_is_imported(self):
        names = {alias.name.split(".")[0] for node in ast.walk(self.tree)
                 if isinstance(node, ast.Import) for alias in node.names}

        if hasattr(sys, "stdlib_module_names"):
            self.assertLessEqual(names, set(sys.stdlib_module_names))

    def test_importing_loads_no_heavy_module(self):
        code = ("import sys, queuectl; print([m for m in ('subprocess', 'socket', "
                "'concurrent.futures', 'http', 'logging', 'dataclasses', 'urllib') "
                "if m in sys.modules])")
        out = subprocess.run([sys.executable, "-S", "-c", code], cwd=os.path.dirname(
            MODULE), stdout=subprocess.PIPE, check=True).stdout

        self.assertEqual(out.strip(), b"[]")

    def test_the_inline_metadata_agrees_with_the_project_file(self):
        with open(os.path.join(os.path.dirname(MODULE), "pyproject.toml")) as file:
            project = file.read()

        for line in ('requires-python = ">=3.9"', "dependencies = []"):
            self.assertIn(f"# {line}\n", self.source)
            self.assertIn(f"{line}\n", project)

    def test_every_command_is_in_the_readme(self):
        with open(os.path.join(os.path.dirname(MODULE), "README.md")) as file:
            readme = file.read()

        for entry in queuectl.COMMANDS:
            self.assertIn("queuectl " + " ".join(entry.words), readme)


# ---- 3 Rules -----------------------------------------------------------------

class Rules(TestCase):
    def test_durations(self):
        for text, seconds in (("500ms", 0.5), ("30s", 30), ("1h30m", 5400), ("1.5", 1.5),
                              ("1d", 86400), (2, 2), (0.5, 0.5)):
            with self.subTest(text):
                self.assertAlmostEqual(queuectl.parse_duration(text), seconds)
        for text in ("", "5x", "-1", -1, True, None, "1e99", float("inf"), float("nan")):
            with self.subTest(text), self.assertRaises(queuectl.InvalidValue):
                queuectl.parse_duration(text)

    def test_times(self):
        for text, moment in (("2027-01-15T08:00:00Z", NOON), ("+10m", NOON + 600),
                             ("2027-01-15T09:00:00+01:00", NOON), (str(int(NOON)), NOON),
                             (NOON + 1, NOON + 1)):
            with self.subTest(text):
                self.assertEqual(queuectl.parse_time(text, NOON), moment)
        clock_time = time.strftime("%H:%M", time.localtime(NOON + 60))
        self.assertEqual(queuectl.parse_time(clock_time, NOON), NOON + 60)
        for text in ("tomorrow", "25:00", "", None, "2026-13-01", 1e300, -1e300):
            with self.subTest(text), self.assertRaises(queuectl.InvalidValue):
                queuectl.parse_time(text, NOON)

    def test_a_stored_time_survives_the_way_to_a_number_and_back(self):
        for stamp in ("2026-11-24T08:22:13.123Z", "0001-01-01T00:00:00.000Z",
                      "9999-12-31T23:59:59.999Z", "1969-12-31T23:59:59.999Z"):
            self.assertEqual(queuectl.iso(queuectl.epoch(stamp)), stamp)

    def test_backoff_doubles_up_to_its_cap_and_never_overflows(self):
        waits = [queuectl.backoff(n, 2.0, settings(), 0.5) for n in (1, 2, 3, 10**6)]
        self.assertEqual(waits, [2.0, 4.0, 8.0, 3600.0])

        spread = settings(backoff_jitter=0.5)
        self.assertEqual([queuectl.backoff(1, 2.0, spread, chance) for chance in (0, 1)],
                         [1.0, 3.0])

    def test_every_outcome_leads_to_its_verb(self):
        job = self.a_queue().enqueue("x", max_retries=2)._replace(state=PROCESSING)
        table = (
            #outcome       attempts  crashes  wish      verb
            ("completed",  0,        0,       None,     "complete"),
            ("completed",  0,        0,       "cancel", "complete"),
            ("failed",     0,        0,       None,     "fail"),
            ("failed",     1,        0,       None,     "bury"),
            ("failed",     0,        0,       "cancel", "cancel"),
            ("timeout",    1,        0,       None,     "bury"),
            ("cancelled",  0,        0,       None,     "cancel"),
            ("released",   1,        0,       None,     "release"),
            ("released",   1,        0,       "cancel", "cancel"),
            ("lost",       1,        0,       None,     "fail"),
            ("lost",       1,        4,       None,     "bury"),
        )
        for kind, attempts, crashes, wish, verb in table:
            with self.subTest(kind=kind, attempts=attempts, crashes=crashes, wish=wish):
                now = job._replace(attempts=attempts, crashes=crashes, wish=wish)
                self.assertEqual(queuectl.settle(
                    now, Outcome(kind), settings(), None, 0.5, NOON)[0], verb)

    def test_output_keeps_both_ends_whatever_the_pieces(self):
        text = bytes(range(256)) * 1000
        for size in (1, 7, 4096, 300000):
            output = Output(101)
            for at in range(0, len(text), size):
                output.feed(text[at:at + size])
            self.assertEqual(output.kept(), text[:50] + text[-51:])
            self.assertEqual(output.total, len(text))
        self.assertIn(b"155 bytes left out", queuectl.readable(b"x" * 101, 256))

    def test_a_follower_gets_each_byte_once_or_is_told_what_is_missing(self):
        output = Output(10)
        output.feed(b"abcd")
        self.assertEqual(queuectl.since(output.kept(), output.total, 2), b"cd")
        output.feed(b"efghijklmnop")
        self.assertEqual(queuectl.since(output.kept(), output.total, 4),
                         b"e\n[... 6 bytes left out ...]\nlmnop")
        self.assertEqual(queuectl.since(output.kept(), output.total, 14), b"op")

    def test_silence_counts_only_what_was_watched(self):
        silence = Silence(10)
        silence.look({1: 5}, 0.0)
        self.assertEqual(silence.look({1: 5}, 4.0), {1: 4.0})
        self.assertEqual(silence.look({1: 5}, 1000.0), {1: 14.0})  # we were suspended
        self.assertEqual(silence.look({1: 6}, 1001.0), {1: 0.0})

    def test_percentiles_are_within_a_twentieth(self):
        values = [n / 1000 for n in range(1, 1001)]
        buckets = {}
        for value in values:
            buckets[queuectl.bucket_of(value)] = buckets.get(
                queuectl.bucket_of(value), 0) + 1

        self.assertAlmostEqual(queuectl.percentile(buckets, 0.5), 0.5, delta=0.05)
        self.assertAlmostEqual(queuectl.percentile(buckets, 0.99), 0.99, delta=0.1)
        self.assertIsNone(queuectl.percentile({}, 0.5))


# ---- 4 Input -----------------------------------------------------------------

class Input(TestCase):
    def test_what_is_wrong_names_its_key(self):
        table = (
            ({"command": ""}, "command"), ({"command": 5}, "command"), ({}, "command"),
            ({"command": "a\0b"}, "command"), ({"command": "\ud800"}, "command"),
            ({"command": "x", "priority": "high"}, "priority"),
            ({"command": "x", "priority": True}, "priority"),
            ({"command": "x", "max_retries": -1}, "max_retries"),
            ({"command": "x", "id": "a b"}, "id"), ({"command": "x", "id": ""}, "id"),
            ({"command": "x", "timeout": "soon"}, "timeout"),
            ({"command": "x", "run_at": "soon"}, "run_at"),
            ({"command": "x", "delay": 1, "run_at": 1}, "delay"),
            ({"command": "x", "env": {"1A": "b"}}, "env"),
            ({"command": "x", "env": {"A": 1}}, "env"),
            ({"command": "x", "after": [1]}, "after"),
            ({"command": "x", "priorty": 1}, "priorty"),
        )
        for fields, key in table:
            with self.subTest(fields), self.assertRaises(queuectl.InvalidJob) as caught:
                queuectl.spec_of(fields, NOON)
            self.assertEqual(caught.exception.key, key)

    def test_a_typing_mistake_gets_the_nearest_key(self):
        with self.assertRaisesRegex(queuectl.InvalidJob, "did you mean `priority`"):
            queuectl.spec_of({"command": "x", "priorty": 1}, NOON)

    def test_json_and_shell_are_told_apart(self):
        for text in ("echo hi", "{ echo a; }", "[ -f x ] && y", "[[ -f x ]]"):
            self.assertEqual(queuectl.fields_of(text), [{"command": text}])
        for text in ('{"command": "x"}', '{ "command": "x"}', '[{"command": "x"}]'):
            self.assertEqual(queuectl.fields_of(text), [{"command": "x"}])
        for text in ("{command: x}", '{"command": ', '["x"]', "[1]"):
            with self.assertRaises(queuectl.InvalidJob):
                queuectl.fields_of(text)

    def test_a_bad_line_is_named(self):
        lines = b"\xef\xbb\xbfecho a\r\n\n# a comment\n{\"command\": \"b\"}\n"
        self.assertEqual(list(queuectl.fields_of_lines(lines)),
                         [(1, {"command": "echo a"}), (4, {"command": "b"})])
        for bad in (b"{x}", b"\xff"):
            with self.assertRaisesRegex(queuectl.InvalidJob, "^line 5: "):
                list(queuectl.fields_of_lines(lines + bad))


# ---- 5 SQL -------------------------------------------------------------------

class Statements(TestCase):
    def statements(self):
        for name, text in vars(queuectl.Sql).items():
            if name.isupper() and isinstance(text, str) \
                    and name not in ("SCHEMA", "PAGE"):
                yield name, text
        for text in queuectl.Sql.DELETE_JOB:
            yield "DELETE_JOB", text

    def test_every_statement_prepares(self):
        queue = self.a_queue()
        db = sqlite3.connect(queue.path)
        self.addCleanup(db.close)
        for name, text in self.statements():
            names = dict.fromkeys(re.findall(r":(\w+)", text))
            values = names if names else [None] * text.count("?")
            with self.subTest(name):
                if not text.lstrip().startswith(("PRAGMA", "BEGIN", "COMMIT", "ROLL")):
                    db.execute("EXPLAIN " + text, values).fetchall()

    def test_the_claim_uses_its_indexes_and_sorts_nothing(self):
        db = sqlite3.connect(self.a_queue().path)
        self.addCleanup(db.close)
        for name, index in (("LINE", "jobs_in_line"), ("QUEUE_LINE", "jobs_in_queue"),
                            ("NEXT_DUE", "jobs_by_time"), ("LET_IN", "jobs_by_time"),
                            ("JOB_BY_CLAIM", "jobs_by_claim"), ("MINE", "jobs_by_claim"),
                            ("JOB_BY_UNIQUE", "jobs_by_unique"), ("BEFORE", "jobs_in_line")):
            text = getattr(queuectl.Sql, name)
            plan = " ".join(row[3] for row in db.execute(
                "EXPLAIN QUERY PLAN " + text, dict.fromkeys(re.findall(r":(\w+)", text))))
            with self.subTest(name):
                self.assertIn(index, plan)
                self.assertNotIn("TEMP B-TREE", plan)


# ---- 6 Store -----------------------------------------------------------------

class Files(TestCase):
    def test_the_file_is_private(self):
        self.assertEqual(os.stat(self.a_queue().path).st_mode & 0o777, 0o600)

    def test_every_commit_is_durable(self):
        store = self.a_queue().store
        self.assertEqual(store.row("PRAGMA synchronous"), (2,))
        self.assertEqual(store.row("PRAGMA journal_mode"), ("wal",))

    def test_foreign_files_are_refused_and_left_as_they_are(self):
        other = os.path.join(self.dir, "other.db")
        db = sqlite3.connect(other)
        db.execute("CREATE TABLE t (x)")
        db.commit()
        db.close()
        with open(other, "rb") as file:
            sqlite_file = file.read()
        newer = os.path.join(self.dir, "newer.db")
        Queue(newer).close()
        db = sqlite3.connect(newer)
        db.execute("PRAGMA user_version = 99")
        db.close()
        with open(newer, "rb") as file:
            newer_file = file.read()
        for content, error in ((sqlite_file, queuectl.NotAQueue),
                               (newer_file, queuectl.NewerVersion),
                               (b"hello, this is no database\n" * 99, queuectl.NotAQueue)):
            with open(self.path, "wb") as file:
                file.write(content)
            with self.assertRaises(error):
                Queue(self.path)
            with open(self.path, "rb") as file:
                self.assertEqual(file.read(), content)

    def test_reading_creates_nothing(self):
        with self.assertRaises(queuectl.NoQueue):
            Queue(self.path, create=False)
        self.assertEqual(os.listdir(self.dir), [])

    def test_a_queue_from_before_a_fork_is_refused_in_words(self):
        queue = self.a_queue()
        queue.store._process += 1
        with self.assertRaisesRegex(queuectl.Unsupported, "before a fork"):
            queue.counts()


# ---- 8 Ledger, 9 Queue -------------------------------------------------------

class Promises(TestCase):
    def in_state(self, queue, claims, state):
        """A job that came to a state on the ways of the queue itself."""
        job = queue.enqueue("x", max_retries=1 if state == DEAD else 2)
        if state == CANCELLED:
            queue.cancel(job.id)
        elif state != PENDING:
            claim = self.claim_one(queue, claims).claim
            if state != PROCESSING:
                kind = "completed" if state == COMPLETED else "failed"
                claims.turn({claim: Outcome(kind, 0, None, 0.1)}, {}, [])
        self.assertEqual(queue.job(job.id).state, state)
        return queue.job(job.id)

    def test_a_verb_moves_only_from_its_sources(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        for verb, step in MOVES.items():
            for state in STATES:
                if state in step.sources:
                    continue
                with self.subTest(verb=verb, state=state):
                    job = self.in_state(queue, claims, state)
                    with self.assertRaises(queuectl.WrongState), \
                            queue.store.transaction() as store:
                        queuectl.move(store, verb, job, job, NOON)
                    self.assertEqual(queue.job(job.id).state, state)
                    with contextlib.suppress(queuectl.QueueError):
                        queue.delete(job.id)

    def test_every_change_of_state_has_its_event(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        job = self.in_state(queue, claims, DEAD)
        queue.retry(job.id)

        self.assertEqual([(e.source, e.target) for e in queue.events(job.id)], [
            (None, PENDING), (PENDING, PROCESSING), (PROCESSING, DEAD), (DEAD, PENDING)])

    def test_a_batch_is_added_whole_or_not_at_all(self):
        queue = self.a_queue()
        with self.assertRaises(queuectl.JobExists) as caught:
            queue.enqueue_many([Spec("a", id="x"), Spec("b"), Spec("c", id="x")])

        self.assertEqual(caught.exception.item, 2)
        self.assertEqual(sum(queue.counts().values()), 0)

    def test_a_number_is_never_used_again(self):
        queue = self.a_queue()
        self.assertEqual(queue.enqueue("a").id, "job-1")
        queue.delete("job-1")
        self.assertEqual(queue.enqueue("a").id, "job-2")
        queue.enqueue("a", id="job-10")
        queue.delete("job-10")
        self.assertGreater(queue.enqueue("a").seq, 10)

    def test_a_unique_key_adds_no_second_job_until_the_first_is_over(self):
        queue = self.a_queue()
        first = queue.enqueue("a", unique="k")
        self.assertEqual(queue.enqueue("a", unique="k").id, first.id)
        queue.cancel(first.id)
        second = queue.enqueue("a", unique="k")
        self.assertNotEqual(second.id, first.id)
        with self.assertRaises(queuectl.InUse):
            queue.retry(first.id)

    def test_a_job_waits_for_those_it_comes_after(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        queue.enqueue_many([Spec("b", id="b", after=("a",)), Spec("a", id="a")])
        first = claims.turn({}, {}, [1, 2])
        self.assertEqual([c.job.id for c in first.claimed], ["a"])
        self.assertEqual(queue.waiting_for(queue.job("b"))[0], "after a (processing)")
        second = claims.turn({first.claimed[0].claim: Outcome("completed", 0)}, {}, [1])
        self.assertEqual([c.job.id for c in second.claimed], ["b"])

    def test_jobs_that_wait_for_each_other_are_refused(self):
        with self.assertRaisesRegex(queuectl.InvalidJob, "a, b wait for each other"):
            self.a_queue().enqueue_many([Spec("a", id="a", after=("b",)),
                                         Spec("b", id="b", after=("a",))])

    def test_counts_agree_with_the_table_whatever_happens(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        for state in (*STATES[1:], PENDING):    # a pending one would be claimed first
            self.in_state(queue, claims, state)
        queue.retry_dead()
        for state, n in queue.counts().items():
            self.assertEqual(n, len(queue.jobs(state)), state)

    def test_retry_resets_the_attempts_and_keeps_the_history(self):
        queue = self.a_queue()
        job = self.in_state(queue, self.a_pool(queue), DEAD)
        job = queue.retry_dead(job.id)[0]

        self.assertEqual((job.state, job.attempts), (PENDING, 0))
        self.assertEqual(len(queue.runs(job.id)), 1)
        with self.assertRaisesRegex(queuectl.WrongState, "not dead"):
            queue.retry_dead(job.id)

    def test_an_id_given_twice_counts_once(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        one, two = self.in_state(queue, claims, DEAD), self.in_state(queue, claims, DEAD)
        self.assertEqual(len(queue.retry_dead(one.id, one.id)), 1)
        self.assertEqual(len(queue.cancel(one.id, one.id)), 1)
        self.assertEqual(len(queue.retry(one.id, one.id)), 1)
        self.assertEqual(len(queue.delete(one.id, one.id)), 1)
        for state, n in queue.counts().items():
            self.assertEqual(n, len(queue.jobs(state)), state)
        self.assertEqual(queue.job(two.id).state, DEAD)

    def test_purging_keeps_what_others_wait_for(self):
        queue = self.a_queue()
        job = self.in_state(queue, self.a_pool(queue), DEAD)
        self.in_state(queue, self.a_pool(queue, name="other"), DEAD)
        queue.enqueue("y", after=[job.id])

        self.assertEqual(queue.purge_dead(older_than=3600), 0)
        self.assertEqual(queue.purge_dead(), 1)
        self.assertEqual(queue.job(job.id).state, DEAD)

    def test_a_setting_takes_effect_at_once_and_only_if_valid(self):
        queue = self.a_queue()
        queue.configure("max_retries", "5")
        self.assertEqual(queue.enqueue("x").max_retries, 5)
        with self.assertRaises(queuectl.InvalidValue):
            queue.configure("backoff-base", "soon")
        with self.assertRaisesRegex(queuectl.NoSuchSetting, "did you mean `timeout`"):
            queue.configure("timout", "1s")

    def test_a_listing_of_several_states_is_in_order(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        for state in (PENDING, CANCELLED, COMPLETED):
            self.in_state(queue, claims, CANCELLED)
            self.in_state(queue, claims, COMPLETED)
        found = [job.seq for job in queue.jobs([CANCELLED, COMPLETED])]

        self.assertEqual(found, sorted(found, reverse=True))
        self.assertEqual([j.seq for j in queue.pages(state=COMPLETED, limit=2)],
                         [j.seq for j in queue.jobs(COMPLETED, limit=2)])


# ---- 10 Claims ---------------------------------------------------------------

class Turns(TestCase):
    def test_order_is_priority_then_due_time_then_age(self):
        queue = self.a_queue()
        queue.enqueue("x", id="late")
        queue.enqueue("x", id="early", run_at=NOON - 60)
        queue.enqueue("x", id="high", priority=1)
        queue.enqueue("x", id="later")

        turn = self.a_pool(queue).turn({}, {}, [1, 2, 3, 4])
        self.assertEqual([c.job.id for c in turn.claimed],
                         ["high", "early", "late", "later"])

    def test_nothing_starts_before_its_time(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        queue.enqueue("x", delay=10)
        self.clock.now += 9.998
        self.assertEqual(claims.turn({}, {}, [1]).claimed, [])
        self.clock.now += 0.003
        self.assertEqual(len(claims.turn({}, {}, [1]).claimed), 1)

    def test_a_job_for_now_starts_though_the_clock_was_set_back(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        queue.enqueue("x")
        self.clock.now -= 86400
        self.assertEqual(len(claims.turn({}, {}, [1]).claimed), 1)

    def test_a_late_worker_cannot_end_a_later_claim(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        queue.enqueue("x")
        old = self.claim_one(queue, claims)
        os.close(old.lock)
        claims.rescue(queuectl.Run(*queue.store.row(
            queuectl.Sql.RUN_BY_CLAIM, claim=old.claim)))
        new = self.claim_one(queue, claims)

        late = claims.turn({old.claim: Outcome("completed", 0)}, {}, [])
        self.assertEqual(late.settled, [])
        self.assertEqual(queue.job("job-1").claim, new.claim)
        self.assertEqual(queue.job("job-1").crashes, 1)
        self.assertEqual(queue.job("job-1").attempts, 0)

    def test_a_run_that_a_rescuer_ended_is_a_crash_though_its_pool_thawed(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        queue.enqueue("x")
        claim = self.claim_one(queue, claims).claim
        claims.seize(queue.runs("job-1"))

        claims.turn({claim: Outcome("failed", 143, "killed by SIGTERM", 1.0)}, {}, [])
        job = queue.job("job-1")
        self.assertEqual((job.state, job.attempts, job.crashes), (FAILED, 0, 1))
        self.assertEqual(queue.runs("job-1")[0].outcome, "lost")

    def test_a_pool_that_lost_its_jobs_and_lives_stays_in_the_table(self):
        queue = self.a_queue()
        claims = self.a_pool(queue, name="frozen")
        queue.enqueue("x")
        os.close(self.claim_one(queue, claims).lock)
        claims.rescue(queue.runs("job-1")[0])
        self.assertEqual([v.worker.name for v in queue.workers()], ["frozen"])

        with queue.store.transaction() as store:
            store.do(queuectl.Sql.DELETE_WORKER, {"id": claims.worker.id})
        claims.turn({}, {}, [])
        self.assertEqual([v.worker.id for v in queue.workers()], [claims.worker.id])
        self.assertEqual(claims.stranded({}), [])

    def test_a_turn_that_cannot_commit_has_not_happened(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        queue.enqueue("x")
        claim = self.claim_one(queue, claims)
        queue.store.patience = 0.01
        rival = sqlite3.connect(queue.path, isolation_level=None)
        self.addCleanup(rival.close)
        rival.execute("BEGIN IMMEDIATE")

        with self.assertRaises(queuectl.Busy):
            claims.turn({claim.claim: Outcome("completed", 0)}, {}, [1])
        self.assertEqual(queue.job("job-1").state, PROCESSING)
        rival.execute("ROLLBACK")
        claims.turn({claim.claim: Outcome("completed", 0)}, {}, [1])
        self.assertEqual(queue.job("job-1").state, COMPLETED)

    def test_paused_full_and_foreign_queues_are_passed_over(self):
        queue = self.a_queue()
        queue.enqueue_many([Spec("x", queue="paused", priority=9)] * 100)
        queue.enqueue_many([Spec("x", queue="one", priority=5)] * 100)
        queue.enqueue_many([Spec("x", queue="free")] * 3)
        with queue.store.transaction() as store:
            store.do("INSERT INTO queues VALUES ('paused', 1, 0), ('one', 0, 1)", {})

        turn = self.a_pool(queue).turn({}, {}, [1, 2, 3])
        self.assertEqual([c.job.queue for c in turn.claimed], ["one", "free", "free"])
        only = self.a_pool(queue, name="only", queues=("free",)).turn({}, {}, [1, 2])
        self.assertEqual([c.job.queue for c in only.claimed], ["free"])

    def test_two_pools_never_get_the_same_job(self):
        queue = self.a_queue()
        queue.enqueue_many([Spec("x")] * 6)
        one, two = self.a_pool(queue, name="a"), self.a_pool(queue, name="b")
        got = [c.claim for c in one.turn({}, {}, [1, 2, 3]).claimed
               + two.turn({}, {}, [1, 2, 3]).claimed]
        self.assertEqual(len(set(got)), 6)
        with self.assertRaises(queuectl.InUse):
            self.a_pool(queue, name="a")


# ---- 11 Check ----------------------------------------------------------------

class Checks(TestCase):
    # What a mistake would leave behind, and the code under which it must be found.
    BREAKS = (
        ("counters", "UPDATE counts SET n = n + 1"),
        ("claims", "DELETE FROM runs WHERE outcome IS NULL"),
        ("claims", "UPDATE runs SET outcome = NULL, finished_at = NULL"),
        ("history", "UPDATE jobs SET state = 'cancelled' WHERE state = 'completed'"),
        ("history", "DELETE FROM events"),
        ("gates", "UPDATE jobs SET gate = 'after' WHERE gate = 'open'"),
        ("gates", "UPDATE jobs SET gate = 'open' WHERE gate = 'after'"),
        ("orphans", "INSERT INTO tags VALUES ('t', 999)"),
    )

    def a_used_queue(self):
        """A queue with a job completed, running, waiting, and waiting for another."""
        queue = self.a_queue()
        claims = self.a_pool(queue, name="used")
        queue.enqueue("x", id="done")
        claims.turn({self.claim_one(queue, claims).claim: Outcome("completed", 0)}, {}, [])
        queue.enqueue("x", id="runs")
        self.claim_one(queue, claims)
        queue.enqueue("x", id="waits", tags=["t"])
        queue.enqueue("x", id="after", after=["waits"])
        return queue

    def problems(self, queue):
        return [finding.code for finding in queuectl.Inspection(queue).findings()
                if finding.level == queuectl.PROBLEM]

    def test_a_sound_queue_has_no_problem(self):
        self.assertEqual(self.problems(self.a_used_queue()), [])

    def test_what_breaks_a_rule_is_found(self):
        for number, (code, statement) in enumerate(self.BREAKS):
            with self.subTest(statement):
                self.path = os.path.join(self.dir, f"{number}.db")
                queue = self.a_used_queue()
                with queue.store.transaction() as store:
                    store.do(statement, {})
                self.assertIn(code, self.problems(queue))

    def test_a_file_system_is_told_by_the_longest_mount_point(self):
        mounts = ("22 1 254:0 / / rw - ext4 /dev/vda rw\n"
                  "30 22 0:30 / /home rw shared:1 - nfs4 host:/home rw\n"
                  "31 30 0:31 / /home/my\\040disk rw - xfs /dev/vdb rw\n")
        for path, kind in (("/queue.db", "ext4"), ("/home/a/queue.db", "nfs4"),
                           ("/homes/queue.db", "ext4"), ("/home/my disk/q.db", "xfs")):
            self.assertEqual(queuectl.filesystem_of(path, mounts), kind)
        self.assertEqual(queuectl.filesystem_of("/x", ""), "")

    def test_versions_of_sqlite_with_the_bug_are_known(self):
        for version, is_bad in (((3, 34, 1), True), ((3, 44, 5), True), ((3, 44, 6), False),
                                ((3, 45, 0), True), ((3, 50, 6), True), ((3, 50, 7), False),
                                ((3, 51, 2), True), ((3, 51, 3), False), ((3, 53, 0), False)):
            self.assertEqual(queuectl.has_wal_bug(version), is_bad, version)


# ---- 12 Views ----------------------------------------------------------------

class Views(TestCase):
    def test_a_worker_says_what_happened_and_what_comes_next(self):
        queue = self.a_queue()
        claims = self.a_pool(queue)
        for base, wait in ((0.01, "0.01s"), (2, "2s")):
            queue.enqueue("x", id=f"base-{base}", backoff_base=base)
            claim = self.claim_one(queue, claims).claim
            settled = claims.turn({claim: Outcome("failed", 1, "x", 0.02)}, {}, []).settled
            self.assertEqual(
                queuectl.settled_line(settled[0], NOON),
                f"base-{base} failed (exit 1) after 0.02s, attempt 1 of 3, again in {wait}")


# ---- 15 CLI ------------------------------------------------------------------

class CommandLine(TestCase):
    def cli(self, *argv):
        return run_cli("--db", self.path, *argv)

    def test_the_words_of_a_command_keep_their_boundaries(self):
        self.cli("enqueue", "--", "sh", "-c", "a && b")
        self.assertEqual(json.loads(self.cli("show", "job-1", "--json")[1])["command"],
                         "sh -c 'a && b'")

    def test_a_flag_overrides_the_field(self):
        out = self.cli("enqueue", '{"command": "x", "priority": 1, "delay": 5}', "-p", "7",
                       "--run-at", "+1h", "--json")[1]
        self.assertEqual(json.loads(out)["priority"], 7)

    def test_the_object_has_the_keys_of_the_contract_in_their_order(self):
        out = json.loads(self.cli("enqueue", "x", "--json")[1])
        self.assertEqual(tuple(out), queuectl.JSON_KEYS)
        self.assertRegex(out["run_at"], r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z$")

    def test_exit_statuses_and_one_line_of_error(self):
        self.cli("enqueue", "x")
        for argv, status in ((("show", "nope"), 1), (("enqueue", "{}"), 1),
                             (("statsu",), 2), (("enqueue",), 2),
                             (("enqueue", "echo", "hi"), 2), (("list", "-s", "bad"), 2),
                             (("worker", "start", "-c", "0"), 2), (("logs", "job-1"), 1),
                             (("config", "set", "timeout", "soon"), 1),
                             (("dlq", "retry", "job-1"), 1), (("worker", "stop"), 0)):
            with self.subTest(argv):
                code, out, err = self.cli(*argv)
                self.assertEqual((code, out), (status, ""))
                self.assertEqual(err.count("\n"), 1)
                if status:
                    self.assertTrue(err.startswith("queuectl: error: "), err)

    def test_odd_bytes_and_values_are_refused_in_words(self):
        self.cli("enqueue", "x")
        for argv, status in ((("show", "\udcff"), 2), (("list", "--search", "\udcff"), 2),
                             (("worker", "start", "--queue", ""), 2),
                             (("worker", "start", "--name", "a\nb"), 2),
                             (("config", "set", "lease", "\u0663"), 1),
                             (("enqueue", "--file", "/nope"), 1),
                             (("enqueue", "--command", "x", "y"), 2),
                             (("enqueue", '{"command":"x","a":1}'), 1),
                             (("enqueue", '{"command":"x","max-retries":1,"max_retries":2}'),
                              1)):
            with self.subTest(argv):
                code, out, err = self.cli(*argv)
                self.assertEqual((code, out, err.count("\n")), (status, "", 1), err)
        self.cli("config", "set", "timeout", "")
        self.assertEqual(self.cli("config", "get", "timeout")[1], "none\n")

    def test_an_error_under_json_is_one_object(self):
        self.cli("enqueue", "x")
        code, out, err = self.cli("show", "nope", "--json")
        self.assertEqual((code, out), (1, ""))
        self.assertEqual(json.loads(err)["error"]["code"], "no-such-job")

    def test_a_bad_line_adds_nothing(self):
        path = os.path.join(self.dir, "jobs.txt")
        with open(path, "w") as file:
            file.write('echo a\n{"command": "b", "id": "b"}\n{"command": "c", "id": "b"}')
        code, _, err = self.cli("enqueue", "@" + path)
        self.assertEqual(code, 1)
        self.assertIn("line 3: ", err)
        self.assertEqual(json.loads(self.cli("list", "--json")[1]), [])

    def test_readers_refuse_a_queue_that_is_not_there(self):
        for argv in (("list",), ("status",), ("stats",), ("worker", "stop")):
            code, _, err = self.cli(*argv)
            self.assertEqual(code, 1)
            self.assertIn("no queue at", err)
        self.assertEqual(self.cli()[0], 0)
        self.assertFalse(os.path.exists(self.path))

    def test_every_command_has_help(self):
        for entry in queuectl.COMMANDS:
            code, out, _ = run_cli(*entry.words, "--help")
            self.assertEqual(code, 0)
            self.assertIn(entry.help, out.replace("\n", " "))


# ---- Real processes ----------------------------------------------------------

class Program(TestCase):
    """The program as its users meet it: other processes, real signals."""

    def command(self, *argv):
        return [sys.executable, MODULE, *argv, "--db", self.path] \
            if "--" not in argv else [sys.executable, MODULE, "--db", self.path, *argv]

    def call(self, *argv, **options):
        done = subprocess.run(self.command(*argv), stdout=subprocess.PIPE,
                              stderr=subprocess.PIPE, cwd=self.dir, timeout=60,
                              check=False, **options)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    def enqueue(self, *argv):
        code, out, err = self.call("enqueue", "-q", *argv)
        self.assertEqual(code, 0, err)
        return out.strip()

    def worker(self, *argv, **options):
        log = open(os.path.join(self.dir, "worker.log"), "ab")
        self.addCleanup(log.close)
        process = subprocess.Popen(self.command("worker", "start", *argv), cwd=self.dir,
                                   stderr=log, **options)
        self.addCleanup(self.end, process)
        return process

    def end(self, process):
        if process.poll() is None:
            process.kill()
        process.wait()
        with contextlib.suppress(queuectl.QueueError), Queue(self.path, False) as queue:
            for row in queue.store.rows(queuectl.Sql.UNDER_WAY):
                for pid in queue.host.members(row[0]):
                    queue.host.signal(pid, signal.SIGKILL)

    def job(self, job_id):
        with Queue(self.path, create=False) as queue:
            return queue.job(job_id)

    def runs(self, job_id):
        with Queue(self.path, create=False) as queue:
            return queue.runs(job_id)

    def wait_state(self, job_id, state):
        return wait_for(lambda: self.job(job_id).state == state, f"{job_id} {state}")

    def drain(self, *argv):
        code, _, err = self.call("worker", "start", "--drain", *argv)
        self.assertEqual(code, 0, err)
        return err

    def path_of(self, name):
        return os.path.join(self.dir, name)

    def read(self, name):
        with open(self.path_of(name)) as file:
            return file.read()

    def test_the_first_walk(self):
        self.enqueue('{"command": "echo Hello World"}')
        self.enqueue("exit 1", "--backoff-base", "10ms")
        log = self.drain("--timeout", "5s")

        self.assertEqual(self.job("job-1").state, COMPLETED)
        self.assertEqual(self.job("job-2").state, DEAD)
        self.assertEqual(self.call("logs", "job-1")[1], "Hello World\n")
        self.assertRegex(log, r"job-2 failed \(exit 1\) after \S+, attempt 1 of 3, again in")
        self.assertIn("job-2", self.call("dlq")[1])
        self.assertEqual(self.call("dlq", "retry", "job-2")[0], 0)
        self.assertEqual(self.job("job-2").attempts, 0)

    def test_three_pools_run_each_job_once(self):
        lines = "echo $QUEUECTL_JOB_ID >> ran\n" * 300
        self.call("enqueue", "-", input=lines.encode())
        pools = [self.worker("-c", "4", "--drain", "--name", f"w{n}") for n in range(3)]
        for pool in pools:
            self.assertEqual(pool.wait(60), 0)

        self.assertEqual(sorted(self.read("ran").split()),
                         sorted(f"job-{n}" for n in range(1, 301)))
        self.assertNotIn("locked", self.read("worker.log"))

    def test_output_is_bytes_and_bounded(self):
        self.enqueue("printf '\\377caf\\351'", "--id", "bytes")
        self.enqueue("head -c 3000000 /dev/zero; echo end", "--id", "big")
        self.drain("-c", "2")

        self.assertEqual(self.runs("bytes")[0].output, b"\xffcaf\xe9")
        run = self.runs("big")[0]
        self.assertEqual((len(run.output), run.output_bytes), (65536, 3000004))
        self.assertTrue(run.output.endswith(b"end\n"))

    def test_a_background_child_goes_on_and_holds_nobody_up(self):
        self.enqueue("(while [ ! -e go ]; do sleep .05; done; echo late; touch went) &"
                     " echo front")
        self.worker()
        self.wait_state("job-1", COMPLETED)
        self.assertFalse(os.path.exists(self.path_of("went")))
        open(self.path_of("go"), "w").close()
        wait_for(lambda: os.path.exists(self.path_of("went")), "the child's end")

    def test_a_time_out_ends_a_tree_that_will_not_go(self):
        self.call("config", "set", "kill-grace", "200ms")
        self.enqueue("trap '' TERM; setsid sh -c 'trap \"\" TERM; echo $$ > out; "
                     "sleep 100; sleep 100' & sleep 100; sleep 100",
                     "--timeout", "500ms", "--max-retries", "1")
        self.drain()

        run = self.runs("job-1")[0]
        self.assertEqual((run.outcome, run.exit_code), ("timeout", 124))
        self.assertFalse(is_running(self.read("out")))

    def test_a_command_killed_from_outside_leaves_nothing_that_a_retry_would_meet(self):
        self.enqueue("setsid sleep 100 & echo $! > pid; kill -9 $$", "--max-retries", "1")
        self.drain()

        self.assertEqual(self.job("job-1").exit_code, 137)
        self.assertFalse(is_running(self.read("pid")))

    def test_what_cannot_start_fails_in_words(self):
        self.enqueue("nonexistentcommand", "--max-retries", "1")
        self.enqueue("pwd", "--cwd", self.path_of("gone"), "--max-retries", "1")
        self.drain()

        self.assertEqual(self.job("job-1").exit_code, 127)
        self.assertIn("not found", self.job("job-1").error)
        self.assertIn("is not there", self.job("job-2").error)

    def test_a_lost_worker_is_charged_as_a_crash_and_its_tree_ended_first(self):
        self.enqueue("echo $$ >> pids; setsid sh -c 'echo $$ >> pids; sleep 100' & "
                     "[ -e second ] && exit 0; touch second; sleep 100")
        first = self.worker("--name", "first")
        wait_for(lambda: os.path.exists(self.path_of("second"))
                 and len(self.read("pids").split()) == 2, "the start")
        left = self.read("pids").split()
        first.kill()
        first.wait()
        self.worker("--name", "next")
        self.wait_state("job-1", COMPLETED)

        job = self.job("job-1")
        self.assertEqual((job.crashes, job.attempts), (1, 1))
        self.assertEqual([run.outcome for run in self.runs("job-1")],
                         ["lost", "completed"])
        for pid in left:
            self.assertFalse(is_running(pid), pid)

    def test_check_names_what_a_lost_worker_has_left(self):
        self.enqueue("echo $$ > pid; sleep 100")
        worker = self.worker("--name", "w")
        wait_for(lambda: os.path.exists(self.path_of("pid")) and self.read("pid"), "a start")
        self.assertEqual(json.loads(self.call("check", "--json")[1])["sound"], True)
        worker.kill()
        worker.wait()

        code, out, _ = self.call("check", "--json")
        found = [one for one in json.loads(out)["findings"] if one["code"] == "lost-run"]
        self.assertEqual(code, 0)
        self.assertIn(self.read("pid").strip(), found[0]["message"])

    def test_a_living_worker_takes_over_from_a_dead_one(self):
        first = self.worker("--name", "first")
        wait_for(lambda: os.path.exists(self.path), "the queue")
        self.enqueue("[ -e second ] && exit 0; touch second; sleep 100")
        wait_for(lambda: os.path.exists(self.path_of("second")), "the start")
        self.worker("--name", "next")
        wait_for(lambda: len(json.loads(self.call("worker", "list", "--json")[1])) == 2)
        first.kill()
        first.wait()

        self.wait_state("job-1", COMPLETED)
        self.assertEqual(self.job("job-1").crashes, 1)

    def test_a_frozen_worker_loses_its_jobs_and_changes_nothing_when_it_thaws(self):
        self.call("config", "set", "lease", "1s")
        self.call("config", "set", "heartbeat", "200ms")
        self.enqueue("echo $$ >> runs; [ -e second ] && sleep 1 && exit 0; touch second; "
                     "sleep 100")
        first = self.worker("--name", "first")
        wait_for(lambda: os.path.exists(self.path_of("second")), "the start")
        first.send_signal(signal.SIGSTOP)
        self.addCleanup(first.send_signal, signal.SIGCONT)
        self.worker("--name", "next")
        wait_for(lambda: len(self.read("runs").split()) == 2, "the second run")
        first.send_signal(signal.SIGCONT)
        self.wait_state("job-1", COMPLETED)

        self.assertEqual([run.outcome for run in self.runs("job-1")],
                         ["lost", "completed"])
        self.assertEqual(self.job("job-1").crashes, 1)

    def test_the_first_signal_finishes_the_running_job(self):
        self.enqueue("touch began; while [ ! -e go ]; do sleep .05; done; echo done")
        self.enqueue("echo never")
        worker = self.worker(start_new_session=True)
        wait_for(lambda: os.path.exists(self.path_of("began")), "the start")
        os.killpg(worker.pid, signal.SIGINT)     # as Ctrl+C, to the whole group
        wait_for(lambda: "SIGINT" in self.read("worker.log"), "the log")
        open(self.path_of("go"), "w").close()

        self.assertEqual(worker.wait(DEADLINE), 0)
        self.assertEqual(self.job("job-1").state, COMPLETED)
        self.assertEqual(self.job("job-2").state, PENDING)

    def test_the_second_signal_hands_the_job_back_uncharged(self):
        self.enqueue("touch began; sleep 100")
        worker = self.worker()
        wait_for(lambda: os.path.exists(self.path_of("began")), "the start")
        worker.terminate()
        wait_for(lambda: "SIGTERM" in self.read("worker.log"), "the log")
        worker.terminate()

        self.assertEqual(worker.wait(DEADLINE), 0)
        job = self.job("job-1")
        self.assertEqual((job.state, job.attempts, job.crashes), (PENDING, 0, 0))
        self.assertEqual(self.runs("job-1")[0].outcome, "released")

    def test_workers_stop_from_another_terminal(self):
        self.enqueue("touch began; sleep 100")
        worker = self.worker("--name", "one")
        wait_for(lambda: os.path.exists(self.path_of("began")), "the start")
        code, _, err = self.call("worker", "stop", "--timeout", "100ms")
        self.assertEqual((code, "still finishing" in err), (1, True))
        self.assertEqual(self.call("worker", "stop", "one", "--now")[0], 0)

        self.assertEqual(worker.wait(DEADLINE), 0)
        self.assertEqual(self.job("job-1").state, PENDING)

    def test_cancel_ends_a_running_job_also_of_a_dead_worker(self):
        self.enqueue("touch began; sleep 100")
        self.enqueue("touch began2; sleep 100")
        worker = self.worker("-c", "2")
        wait_for(lambda: os.path.exists(self.path_of("began"))
                 and os.path.exists(self.path_of("began2")), "the start")
        self.assertEqual(self.call("cancel", "job-1")[0], 0)
        self.assertEqual(self.job("job-1").state, CANCELLED)
        worker.kill()
        worker.wait()
        self.assertEqual(self.call("cancel", "job-2")[0], 0)
        self.assertEqual(self.job("job-2").state, CANCELLED)

    def test_logs_follow_a_running_job_to_its_end(self):
        self.enqueue("echo one; while [ ! -e go ]; do sleep .05; done; echo two")
        self.worker()
        self.wait_state("job-1", PROCESSING)
        wait_for(lambda: self.call("logs", "job-1")[1] == "one\n", "live output")
        follower = subprocess.Popen(self.command("logs", "-f", "job-1"),
                                    stdout=subprocess.PIPE)
        self.assertEqual(follower.stdout.readline(), b"one\n")
        open(self.path_of("go"), "w").close()
        rest = follower.communicate(timeout=DEADLINE)[0]
        self.assertEqual((follower.returncode, rest), (0, b"two\n"))

    def test_an_idle_worker_is_woken_and_a_retry_comes_on_time(self):
        self.worker()
        wait_for(lambda: os.path.exists(self.path)
                 and self.call("worker", "list")[1], "the worker")
        self.enqueue("exit 1", "--backoff-base", "300ms", "--max-retries", "2")
        self.wait_state("job-1", DEAD)

        first, second = self.runs("job-1")
        wait = queuectl.epoch(second.started_at) - queuectl.epoch(first.finished_at)
        self.assertGreaterEqual(wait, 0.3)

    def test_a_delayed_job_does_not_wait_for_the_next_heartbeat(self):
        self.call("config", "set", "heartbeat", "1h")
        self.worker()
        wait_for(lambda: self.call("worker", "list")[1], "the worker")
        self.enqueue("true", "--delay", "300ms")
        self.wait_state("job-1", COMPLETED)

    def test_a_worker_whose_database_went_away_stops_loudly(self):
        self.call("config", "set", "heartbeat", "100ms")
        worker = self.worker()
        wait_for(lambda: "started" in self.read("worker.log"), "the worker")
        os.unlink(self.path)

        self.assertEqual(worker.wait(DEADLINE), 1)
        self.assertIn("deleted or replaced", self.read("worker.log"))

    def test_results_wait_for_a_lock_that_somebody_holds(self):
        self.enqueue("touch ran; while [ ! -e go ]; do sleep .05; done")
        rival = sqlite3.connect(self.path, isolation_level=None)
        self.addCleanup(rival.close)
        worker = self.worker("--drain")
        wait_for(lambda: os.path.exists(self.path_of("ran")), "the run")
        rival.execute("PRAGMA busy_timeout = 10000")
        rival.execute("BEGIN IMMEDIATE")
        open(self.path_of("go"), "w").close()
        wait_for(lambda: "will go on trying" in self.read("worker.log"), "the log")
        rival.execute("COMMIT")

        self.assertEqual(worker.wait(DEADLINE), 0)
        self.assertEqual(self.job("job-1").state, COMPLETED)
        self.assertEqual(len(self.runs("job-1")), 1)

    def test_closed_streams_and_directories_give_no_traceback(self):
        self.enqueue("true")
        odd = os.fsencode(self.dir) + b"/\xff"
        os.mkdir(odd)
        quoted = " ".join("'" + word + "'" for word in (sys.executable, MODULE))
        db = "'" + self.path + "'"
        for script, status in (
                (f"{quoted} --db {db} enqueue true >&-", 0),
                (f"{quoted} --db {db} enqueue true 2>&-", 0),
                (f"{quoted} --db {db} enqueue - <&-", 1),
                (f"{quoted} --db {db} list >/dev/full", 1),
                (f"{quoted} --db {db} worker start --drain <&- >&- 2>&-", 0),
                (f"cd *; {quoted} --db {db} enqueue true", 1),
                (f"cd *; {quoted} enqueue true --cwd /", 0),
                (f"mkdir gone; cd gone; rmdir ../gone; {quoted} list", 1)):
            with self.subTest(script.rpartition(" ")[2]):
                done = subprocess.run(["/bin/sh", "-c", "rm -f q; " + script.replace(
                    "cd *", "cd \"$ODD\"")], cwd=self.dir, stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE, env={**os.environb, b"ODD": odd}, check=False)
                self.assertEqual(done.returncode, status, done.stderr)
                self.assertNotIn(b"Traceback", done.stderr)

    def test_text_is_utf_8_in_an_ascii_locale(self):
        ascii_only = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0",
                      "PYTHONCOERCECLOCALE": "0"}
        subprocess.run([os.fsencode(word) for word in self.command(
            "enqueue", "echo 'ünï'")], env=ascii_only, cwd=self.dir, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.call("worker", "start", "--drain", env=ascii_only)

        self.assertEqual(self.runs("job-1")[0].output.decode(), "ünï\n")

    def test_a_reader_that_leaves_ends_the_command_quietly(self):
        self.call("enqueue", "-", input=b"echo a\n" * 5000)
        done = subprocess.run(["/bin/sh", "-c", '"$@" | head -n 1', "sh",
                               *self.command("list", "--json")],
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=True)
        self.assertEqual((done.stdout, done.stderr), (b"[\n", b""))

    def test_a_killed_enqueuer_leaves_all_of_a_batch_or_nothing(self):
        self.enqueue("true")
        for delay in (0.02, 0.06, 0.1, 0.14):
            process = subprocess.Popen(self.command("enqueue", "-q", "-"),
                                       stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
            process.stdin.write(b"echo a\n" * 3000)
            process.stdin.close()
            time.sleep(delay)   # not a wait: the moment of the kill
            process.kill()
            process.wait()
            with Queue(self.path) as queue:
                self.assertEqual(queue.counts()[PENDING] % 3000, 1)

    def test_real_files_come_out_as_made_directly(self):
        """The demo in small: hash the standard library's sources, a job a file."""
        import hashlib
        folder = os.path.dirname(os.__file__)
        names = sorted(name for name in os.listdir(folder) if name.endswith(".py"))[:60]
        lines = "".join(json.dumps({"command": f"sha256sum < {name}", "cwd": folder,
                                    "id": name}) + "\n" for name in names)
        self.call("enqueue", "-", input=(lines + "exit 9\n").encode())
        self.call("config", "set", "backoff-base", "10ms")
        self.drain("-c", "4")

        for name in names:
            with open(os.path.join(folder, name), "rb") as file:
                wanted = hashlib.sha256(file.read()).hexdigest()
            self.assertEqual(self.runs(name)[0].output.split()[0].decode(), wanted)
        self.assertEqual(json.loads(self.call("status", "--json")[1])["jobs"]["dead"], 1)


# ---- Chaos -------------------------------------------------------------------
# Four histories are compared: what clients were told, the ledger that the jobs keep
# outside of the database, the tables of runs and events, and the final states.

# What each job does. Its lines in the ledger are one write each, so they never mix;
# its lock is its own, so two runs at once are seen by the job itself.
JOB = r"""
id=$QUEUECTL_JOB_ID run=${QUEUECTL_RUN#*-}
note() { read -r up _ </proc/uptime; echo "$1 $id $run $$ $up" >>ledger; }
exec 9>>"locks/$id"
flock -n 9 || note overlap
[ "$QUEUECTL_QUEUE" != one ] || { exec 8>>locks/.one; flock -n 8 || note crowd; }
note start
case $1 in
nap)   sleep "$2" ;;
deaf)  trap "" TERM; sleep "$2"; sleep "$2" ;;
away)  setsid -w sleep "$2" ;;
flaky) [ "$QUEUECTL_ATTEMPT" -ge 2 ] || exit 3 ;;
poor)  exit 4 ;;
loud)  head -c 200000 /dev/zero ;;
kid)   sleep 1 8>&- 9>&- & ;;
esac
note end
"""
# Only a pool's death may end a run that did not end by itself, however often.
CHAOS_SETTINGS = {"heartbeat": "300ms", "lease": "2s", "kill-grace": "500ms",
                  "backoff-base": "50ms", "crash-limit": "100000", "max-retries": "99"}
OWN_DOING = ("completed", "failed", "timeout")
SIGNALLED = (-signal.SIGTERM, -signal.SIGHUP, -signal.SIGINT, 130)


class Note(NamedTuple):
    """A line of the ledger."""
    what: str       # start, end, overlap (two runs of a job), crowd (a limit broken)
    job: str
    claim: int
    pid: int
    uptime: float


class Told(NamedTuple):
    """A client's command and what it was told: 0 done, else refused, None: killed."""
    verb: str
    ids: tuple[str, ...]
    status: int | None


def read_ledger(directory):
    with contextlib.suppress(FileNotFoundError), \
            open(os.path.join(directory, "ledger")) as file:
        return [Note(what, job, int(claim), int(pid), float(up))
                for what, job, claim, pid, up in map(str.split, file)]
    return []


class Checker:
    """Compares the histories; `violations` are lines that begin with a rule's name."""

    def __init__(self, path, told, ledger):
        self.told, self.ledger = told, ledger
        self.violations = []
        with Queue(path, create=False) as queue:
            self.jobs = {job.id: job for job in queue.jobs(sort="oldest")}
            rows = queue.store.rows
            self.runs = [queuectl.Run(*row) for row in
                         rows("SELECT * FROM runs ORDER BY claim")]
            self.events = rows('SELECT job, "from", "to" FROM events ORDER BY seq')
            self.counts = queue.counts()
            self.tallies = dict(rows("SELECT kind, SUM(n) FROM tallies "
                                     "WHERE minute = 0 GROUP BY kind"))
            self.integrity = rows("PRAGMA integrity_check")
        self.gone = {id for one in told if one.verb == "delete" and one.status != 1
                     for id in one.ids}

    def check(self):
        """All rules; the violations."""
        for rule in (self.acknowledged, self.whole, self.started, self.alone,
                     self.numbered, self.caused, self.charged, self.summed, self.stuck):
            for violation in rule():
                self.violations.append(f"{rule.__name__}: {violation}")
        return self.violations

    def acknowledged(self):
        """What a client was told has happened, and has not been undone."""
        reached = collections.Counter(
            (seq, "retry" if target == PENDING and source not in (None, PROCESSING)
             else target) for seq, source, target in self.events)
        for verb, ids, status in self.told:
            if status != 0:
                continue
            for id in ids:
                job = self.jobs.get(id)
                if verb == "delete":
                    if job:
                        yield f"{id} was deleted and is there"
                elif job is None:
                    if id not in self.gone:
                        yield f"{id} was acknowledged ({verb}) and is gone"
                elif verb == "cancel" and not reached[job.seq, CANCELLED]:
                    yield f"{id} was cancelled and has never been so"
                elif verb == "retry" and not reached[job.seq, "retry"]:
                    yield f"{id} was retried and has never been so"

    def whole(self):
        """All or none of a batch."""
        for verb, ids, _ in self.told:
            if verb == "enqueue":
                there = [id for id in ids if id in self.jobs or id in self.gone]
                missing = set(ids) - set(there)
                if missing and any(id in self.jobs for id in there):
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

    def alone(self):
        """Never two runs of a job at once, nor two jobs where one is the limit."""
        last = {}
        for note in self.ledger:
            if note.what in ("overlap", "crowd"):
                yield f"{note}"
            before = last.get(note.job)
            if note.what == "end" and before and before.claim != note.claim:
                yield f"{note} ended after {before} had started"
            if note.what == "start":
                last[note.job] = note

    def numbered(self):
        """A claim's number is never used twice."""
        starts = collections.Counter(
            note.claim for note in self.ledger if note.what == "start")
        for claim, n in starts.items():
            if n > 1:
                yield f"claim {claim} was started {n} times"

    def caused(self):
        """No state without a cause: the events lead there, by MOVES, run by run."""
        chains, claims = {}, {}
        for seq, source, target in self.events:
            chains.setdefault(seq, []).append((source, target))
        for run in self.runs:
            claims[run.job] = claims.get(run.job, 0) + 1
        arrows = {(source, move.target) for move in MOVES.values()
                  for source in move.sources} | {(None, PENDING)}
        for job in self.jobs.values():
            chain = chains.get(job.seq, [])
            states = [None] + [target for _, target in chain]
            if [source for source, _ in chain] != states[:-1] \
                    or not set(chain) <= arrows or states[-1] != job.state:
                yield f"{job.id} is {job.state} after {chain}"
            if states.count(PROCESSING) != claims.get(job.seq, 0):
                yield f"{job.id} has {claims.get(job.seq)} runs after {chain}"

    def charged(self):
        """Attempts are ends of the job's own doing, crashes are lost runs."""
        runs, since = {}, {}
        for run in self.runs:
            runs.setdefault(run.job, []).append(run)
        for seq, source, target in self.events:
            if target == PROCESSING and runs.get(seq):
                since.setdefault(seq, []).append(runs[seq].pop(0))
            elif target == PENDING and source not in (None, PROCESSING):
                since[seq] = []     # retried by a person
        for job in self.jobs.values():
            ends = [run.outcome for run in since.get(job.seq, [])]
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

    def stuck(self):
        """At the end nothing is under way, and nothing waits for nothing."""
        for job in self.jobs.values():
            needs = [self.jobs[id].state for id in job.after if id in self.jobs]
            if job.state in (PROCESSING, FAILED) or (job.state == PENDING and (
                    job.gate != "after" or set(needs) <= {COMPLETED})):
                yield f"{job.id} is {job.state} (gate {job.gate}, needs {needs})"
        for run in self.runs:
            if run.outcome is None:
                yield f"run {run.claim} has no end"


class Nemesis:
    """A queue, three pools, clients, and all that can befall them, by a seed."""

    POOLS, SLOTS = 3, 3
    FAULTS = (      # how often a second each happens
        ("enqueue", 2.4), ("cancel", 0.4), ("retry", 0.4), ("delete", 0.2),
        ("kill_pool", 0.9), ("freeze_pool", 0.15), ("signal_pool", 0.15),
        ("hold_lock", 0.05), ("kill_job", 0.2))

    def __init__(self, directory, seed):
        self.dir, self.chance = directory, random.Random(seed)
        for folder in ("locks", "logs"):
            os.makedirs(os.path.join(directory, folder))
        with open(os.path.join(directory, "job.sh"), "w") as file:
            file.write(JOB)
        self.env = {**os.environ, "PYTHONPATH": os.path.dirname(MODULE),
                    "QUEUECTL_DB": os.path.join(directory, "queue.db")}
        self.pools, self.clients = {}, []
        self.told, self.ids, self.later = [], [], []
        self.done = collections.Counter()       # what befell them, by its name
        self.strange = []                       # what no fault explains
        with Queue(self.env["QUEUECTL_DB"]) as queue:
            for key, value in CHAOS_SETTINGS.items():
                queue.configure(key, value)
        self.db = sqlite3.connect(self.env["QUEUECTL_DB"], timeout=5,
                                  isolation_level=None)
        self.db.execute("INSERT INTO queues VALUES ('one', 0, 1)")

    def start(self, *argv, **options):
        """A queuectl of its own, in a session of its own."""
        return subprocess.Popen([sys.executable, "-m", "queuectl", *argv], cwd=self.dir,
                                env=self.env, start_new_session=True, **options)

    def start_pool(self, *argv):
        self.done["pools"] += 1
        name = f"w{self.done['pools']}"
        with open(os.path.join(self.dir, "logs", name), "ab") as log:
            self.pools[name] = self.start("worker", "start", "--count", str(self.SLOTS),
                                          "--name", name, *argv, stderr=log)

    def judge_pool(self, name, status):
        """A pool in charge ends well or by kill -9; before and after, also by signals."""
        with open(os.path.join(self.dir, "logs", name), errors="replace") as file:
            log = file.read()
        in_charge = f"worker {name} started" in log and f"worker {name} stopped" not in log
        if status not in (0, -signal.SIGKILL) and (in_charge or status not in SIGNALLED):
            self.strange.append(f"pool {name} ended with {status}")
        if not in_charge:   # Python's own words for a SIGINT before ours are loaded
            log = re.sub(r"(?s)Traceback (?:(?!in main).)*\nKeyboardInterrupt\n", "", log)
        self.strange += [f"{name}: {line}" for line in log.splitlines()
                         if "Traceback" in line or "rror:" in line
                         or "itself failed" in line]

    def after(self, seconds, action):
        self.later.append((time.monotonic() + seconds, action))

    def run(self, seconds):
        """Let them work under faults for so long, then in peace; the violations."""
        end = time.monotonic() + seconds
        rate = sum(rate for _, rate in self.FAULTS)
        strike_at = 0.0
        while time.monotonic() < end:
            self.tend()
            if time.monotonic() >= strike_at:
                strike_at = time.monotonic() + self.chance.expovariate(rate)
                names, rates = zip(*self.FAULTS)
                getattr(self, self.chance.choices(names, rates)[0])()
            time.sleep(0.005)
        return self.finish()

    def tend(self):
        """Start pools that are missing, do what is due, hear what clients were told."""
        now = time.monotonic()
        due = [item for item in self.later if item[0] <= now]
        self.later = [item for item in self.later if item[0] > now]
        for _, action in due:
            action()
        for name, pool in list(self.pools.items()):
            if pool.poll() is not None:
                del self.pools[name]
                self.judge_pool(name, pool.returncode)
        while len(self.pools) < self.POOLS:
            self.start_pool()
        for client in [client for client in self.clients if client[0].poll() is not None]:
            self.clients.remove(client)
            self.hear(*client)

    # Clients: half of them are killed at some moment of their short lives.

    def client(self, verb, ids, *argv, text=b""):
        process = self.start(*argv, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL,
                             stderr=subprocess.PIPE)
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(text)
            process.stdin.close()
        self.clients.append((process, verb, tuple(ids)))
        self.done["clients"] += 1
        if self.chance.random() < 0.5:
            self.after(self.chance.uniform(0.02, 0.16), lambda: self.kill(process))

    def hear(self, process, verb, ids):
        said = process.stderr.read().decode()
        process.stderr.close()
        killed = process.returncode == -signal.SIGKILL
        self.told.append(Told(verb, ids, None if killed else process.returncode))
        if not killed and (process.returncode not in (0, 1) or "Traceback" in said
                           or "locked" in said):
            self.strange.append(f"{verb} {ids} ended with {process.returncode}: {said}")

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
               "priority": chance.randint(-2, 2), "cwd": self.dir,
               "queue": chance.choice(("default", "default", "other", "one"))}
        if how == "poor":
            job["max_retries"] = 2
        if n and chance.random() < 0.2:
            job["after"] = [ids[chance.randrange(n)]]
        if chance.random() < 0.2:
            job["delay"] = round(chance.uniform(0, 2), 2)
        return job

    def some_id(self):
        recent = self.ids[-60:]
        return self.chance.choice(recent) if recent else "none"

    def cancel(self):
        job_id = self.some_id()
        self.client("cancel", [job_id], "cancel", job_id)

    def retry(self):
        job_id = self.some_id()
        self.client("retry", [job_id], "retry", job_id)

    def delete(self):
        job_id = self.some_id()
        self.client("delete", [job_id], "delete", job_id)

    # Faults.

    def some_pool(self):
        return self.chance.choice(sorted(self.pools))

    def kill_pool(self):
        self.kill(self.pools[self.some_pool()])

    def freeze_pool(self):
        pool = self.pools[self.some_pool()]
        if pool.poll() is None:
            self.done["freezes"] += 1
            pool.send_signal(signal.SIGSTOP)
            self.after(self.chance.uniform(0.1, 5), lambda: self.thaw(pool))

    def thaw(self, pool):
        if pool.poll() is None:
            pool.send_signal(signal.SIGCONT)

    def signal_pool(self):
        """As Ctrl+C and its kin, to the whole group; at times twice."""
        pool = self.pools[self.some_pool()]
        number = self.chance.choice((signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        for _ in range(self.chance.choice((1, 1, 2))):
            if pool.poll() is None:
                self.done["signals"] += 1
                os.killpg(pool.pid, number)

    def hold_lock(self):
        if not self.db.in_transaction:
            with contextlib.suppress(sqlite3.OperationalError):
                self.db.execute("BEGIN IMMEDIATE")
                self.done["locks"] += 1
                self.after(self.chance.uniform(0.1, 2.5), self.release)

    def release(self):
        if self.db.in_transaction:
            self.db.execute("ROLLBACK")

    def kill_job(self):
        """A signal to the group of a job that runs: its own doing, as far as we know."""
        for note in reversed(read_ledger(self.dir)[-20:]):
            token = f"-{note.claim}\0".encode()
            if token in queuectl._read(f"/proc/{note.pid}/environ"):
                with contextlib.suppress(ProcessLookupError):
                    self.done["job signals"] += 1
                    number = self.chance.choice((signal.SIGTERM, signal.SIGKILL))
                    os.killpg(os.getpgid(note.pid), number)
                return

    # Peace.

    def finish(self):
        """No more faults: all that is left must come to its end."""
        for _, action in self.later:
            action()
        self.later = []
        self.release()
        try:
            wait_for(lambda: (self.tend(), not self.clients)[1], "the clients", 60)
            wait_for(lambda: (self.tend(), self.is_quiet())[1], "the queue's end", 60)
        except AssertionError as error:
            self.strange.append(str(error))
        for pool in self.pools.values():
            pool.terminate()
        for name, pool in self.pools.items():
            self.judge_pool(name, pool.wait(DEADLINE))
        self.db.close()
        return self.strange + Checker(
            self.env["QUEUECTL_DB"], self.told, read_ledger(self.dir)).check()

    def is_quiet(self):
        return self.db.execute("SELECT COUNT(*) FROM jobs WHERE claim IS NOT NULL OR "
                               "gate IN ('open', 'time')").fetchone()[0] == 0


CAN_CHAOS = all(map(shutil.which, ("flock", "setsid"))) and os.path.exists("/proc/uptime")


def chaos_round(directory, seconds, seed):
    """One round: (violations, what befell, jobs, runs, lost runs)."""
    nemesis = Nemesis(directory, seed)
    violations = nemesis.run(seconds)
    with Queue(nemesis.env["QUEUECTL_DB"], create=False) as queue:
        runs = queue.store.row("SELECT COUNT(*), SUM(outcome = 'lost') FROM runs")
        done = nemesis.done + collections.Counter(
            jobs=sum(queue.counts().values()), runs=runs[0], lost=runs[1] or 0)
    return violations, done


def chaos(seconds, seed):
    """Rounds of a minute until the time is over; a verdict. 0 or 1."""
    end, total, bad, number = time.monotonic() + seconds, collections.Counter(), 0, 0
    while not number or time.monotonic() < end:
        number += 1
        directory = tempfile.mkdtemp(prefix="queuectl chaos ")
        length = max(1, min(60, end - time.monotonic()))
        violations, done = chaos_round(directory, length, f"{seed}-{number}")
        total += done
        bad += len(violations)
        print(f"round {number}: {told_counter(done)}: "
              f"{len(violations)} violations", flush=True)
        for violation in violations:
            print(f"    {violation}")
        if violations:
            print(f"    kept: {directory}")
        else:
            shutil.rmtree(directory, True)
    print(f"{number} rounds, seed {seed}: {told_counter(total)}")
    print(f"verdict: {'all promises kept' if not bad else f'{bad} VIOLATIONS'}")
    return 1 if bad else 0


def told_counter(counter):
    return ", ".join(f"{counter[name]} {name}" for name in sorted(counter))


@unittest.skipUnless(CAN_CHAOS, "needs flock, setsid and /proc")
class Chaos(TestCase):
    def test_a_few_seconds_of_it_break_no_promise(self):
        violations, done = chaos_round(os.path.join(self.dir, "round"), 5, "small")

        self.assertEqual(violations, [])
        self.assertGreater(done["kills"], 0)
        self.assertGreater(done["runs"], 0)


# ---- Model -------------------------------------------------------------------
# The same rules, driven in memory: two pools, clients and a nemesis take steps in an
# order drawn from a seed, under clocks that only the model moves. A mutant is the
# module with one guard taken out: the checker must find each of them.

class Process:
    """The command of a run, as far as the kernel knows it."""

    def __init__(self, job, claim, is_deaf):
        self.job, self.claim, self.is_deaf = job, claim, is_deaf
        self.fate = None        # done, failed: by itself; killed: by a signal


class ModelPool:
    """What `Pool` does, step by step: it turns, starts, obeys, watches, rescues."""

    def __init__(self, world, name):
        self.world, self.claims = world, world.q.Claims(
            world.queue, world.q.PoolOptions(slots=2, name=name))
        self.id = self.claims.register(None).id
        self.pid = world.enter(self)
        self.state, self.beat_at = "alive", world.mono
        self.waiting, self.rides, self.ended = [], {}, {}   # claimed, processes, outcomes
        self.why = {}                                       # claim: why it is being ended
        self.silence = world.q.Silence(2 * world.settings.heartbeat)
        self.rescues = {}

    def turn(self):
        for _ in range(len(self.waiting)):      # mostly, threads start them before
            if self.world.chance.random() < 0.7:
                self.start()
        busy = {claimed.claim for claimed in self.waiting} | set(self.rides)
        turn = self.claims.turn(self.ended, {}, range(1, 3 - len(busy)))
        self.ended, self.beat_at = {}, self.world.mono
        for claimed in turn.claimed:
            self.world.claimed(claimed)
        self.waiting += turn.claimed
        for claim in busy:
            wish = turn.mine.get(claim, queuectl.LOST)
            if wish is not None:
                self.end(claim, queuectl.STOPPED if wish == queuectl.CANCEL else wish)

    def end(self, claim, why):
        self.why.setdefault(claim, why)
        if claim in self.rides:
            self.world.signal(self.world.pid_of(claim), signal.SIGTERM)

    def start(self):
        """Start what was claimed first, unless it was to be ended before it began."""
        if self.waiting:
            claimed = self.waiting.pop(0)
            if claimed.claim in self.why:
                self.world.held.discard(claimed.claim)
                self.ended[claimed.claim] = self.world.q.Outcome(self.why[claimed.claim])
            else:
                self.rides[claimed.claim] = self.world.start(claimed)

    def reap(self):
        """Hand over the outcome of what has exited."""
        for claim, process in list(self.rides.items()):
            if process.fate is not None:
                del self.rides[claim]
                kind = "completed" if process.fate == "done" else "failed"
                if process.fate == "killed":
                    kind = self.why.get(claim, "failed")
                self.ended[claim] = self.world.q.Outcome(
                    kind, 0 if kind == "completed" else 1, None, 0.1)
            elif claim in self.why:
                self.world.signal(self.world.pid_of(claim), signal.SIGKILL)

    def watch(self):
        silent = self.silence.look(self.claims.beats(), self.world.mono)
        fresh = [lost for lost in self.claims.stranded(silent)
                 if lost.run.claim not in self.rescues]
        if fresh:
            self.claims.seize(run for run, _ in fresh)
        for lost in fresh:
            self.world.suspected(lost.run)
            self.rescues[lost.run.claim] = lost.run, self.world.q.Leftovers(
                self.world, lost, self.world.settings.kill_grace)
        self.claims.forget_dead()

    def rescue(self):
        """One look at one lost run's leftovers; record it when nothing is left."""
        for claim, (run, leftovers) in list(self.rescues.items()):
            if leftovers.step(self.world.mono):
                del self.rescues[claim]
                self.claims.rescue(run)

    def round(self):
        for step in (self.reap, self.turn, self.start, self.start, self.watch, self.rescue):
            step()


class World:
    """Clocks, kernel, pools and clients of one episode; also the queue's `Host`."""

    name, boot = "model", "boot"
    STEPS = (   # how often each happens, relative to the others
        ("tick", 8), ("enqueue", 6), ("turn", 8), ("start", 6), ("exit", 6),
        ("rescue", 4), ("cancel", 2), ("retry", 2), ("delete", 1), ("purge", 1),
        ("crash", 1), ("freeze", 1.5), ("thaw", 0.4), ("jump", 1), ("suspend", 0.5))

    def __init__(self, module, path, seed):
        self.q, self.chance = module, random.Random(seed)
        self.mono, self.wall, self.latest = 0.0, NOON, NOON
        self.held, self.processes, self.pools = set(), {}, {}
        self.told, self.ledger, self.broken = [], [], []
        self.peaks = {}     # job: the latest time that the clock has shown since enqueued
        self.steps, self.is_nested = 0, False
        self.locks = self
        self.queue = module.Queue(path, clock=lambda: self.wall, host=self)
        self.settings = self.queue.store.settings()
        with self.queue.store.transaction() as store:
            store.do("INSERT INTO queues VALUES ('one', 0, 1)", {})
        self.ids = []

    # The kernel.

    def enter(self, pool):
        """Give the pool a process id of its own."""
        pid = 1000 + pool.id
        with self.queue.store.transaction() as store:
            store.do("UPDATE workers SET pid = :pid WHERE id = :id",
                     {"pid": pid, "id": pool.id})
        pool.claims.worker = pool.claims.worker._replace(pid=pid)
        self.pools[pool.id] = pool
        return pid

    def hold(self, offset):
        if offset < queuectl.POOL_LOCKS:
            self.held.add(offset)
        return -1

    def close(self):
        pass

    def pid_of(self, claim):
        return 100_000 + claim

    def born(self, pid):
        return "then"

    def is_alive(self, worker):
        pool = self.pools.get(worker.id)
        return pool is not None and pool.state != "dead"

    def is_over(self, claim, session=0):
        return claim not in self.held

    def members(self, claim, session=0):
        process = self.processes.get(claim)
        return [self.pid_of(claim)] if process and process.fate is None else []

    def holders(self, claim):
        if claim not in self.held:
            return []
        return self.members(claim) or [
            pool.pid for pool in self.pools.values()
            if claim in [claimed.claim for claimed in pool.waiting]]

    def signal(self, pid, number):
        if pid < 100_000:
            if number == signal.SIGKILL:
                self.kill(self.pools[pid - 1000])
            return
        process = self.processes[pid - 100_000]
        if process.fate is None and (number == signal.SIGKILL or (
                number == signal.SIGTERM and not process.is_deaf)):
            self.over(process, "killed")

    def over(self, process, fate):
        process.fate = fate
        self.held.discard(process.claim)
        if fate != "killed":
            self.note("end", process.job, process.claim)

    def note(self, what, job, claim):
        self.ledger.append(Note(what, job.id, claim, 0, self.mono))

    def kill(self, pool):
        """kill -9: its processes live on, and the locks that they have inherited."""
        pool.state = "dead"
        self.held -= {claimed.claim for claimed in pool.waiting}
        pool.waiting = []

    # What the rules say of the moment itself.

    def claimed(self, claimed):
        if claimed.job.run_at > self.q.iso(self.peaks[claimed.job.id]):
            self.broken.append(f"punctual: {claimed.job.id} before {claimed.job.run_at}")
        if self.queue.store.unmet(claimed.job):
            self.broken.append(f"ordered: {claimed.job.id} before {claimed.job.after}")

    def start(self, claimed):
        job = claimed.job
        alive = [p for p in self.processes.values() if p.fate is None]
        if any(p.job.id == job.id for p in alive):
            self.note("overlap", job, claimed.claim)
        if job.queue == "one" and any(p.job.queue == "one" for p in alive):
            self.note("crowd", job, claimed.claim)
        self.note("start", job, claimed.claim)
        process = Process(job, claimed.claim, self.chance.random() < 0.3)
        self.processes[claimed.claim] = process
        self.held.add(claimed.claim)
        return process

    def suspected(self, run):
        """A run is taken from a pool: that one is gone, or silent for a lease."""
        pool = self.pools[run.pool]
        if pool.state != "dead" and self.mono - pool.beat_at < self.settings.lease:
            self.broken.append(f"excused: run {run.claim} of a pool that is "
                               f"{pool.state}")

    # Steps.

    def run(self, steps):
        """Take so many steps, then come to an end in peace; the violations."""
        names, weights = zip(*self.STEPS)
        for name in self.chance.choices(names, weights, k=steps):
            self.steps += 1
            self.staff()
            self.aim()
            getattr(self, "step_" + name)()
        self.peace()
        found = [*self.broken, *self.truthful()]
        self.queue.close()
        return found + Checker(self.queue.path, self.told, self.ledger).check()

    def truthful(self):
        """A run is recorded as it ended."""
        for seq, claim, outcome in self.queue.store.rows(
                "SELECT job, claim, outcome FROM runs WHERE outcome IS NOT NULL"):
            process = self.processes.get(claim)
            fate = process and process.fate
            if {"completed": "done", "failed": "failed"}.get(outcome, fate) != fate:
                yield f"truthful: run {claim} of {seq} is {outcome}, but {fate}"

    def staff(self):
        """Two pools that live or are frozen, always."""
        while sum(pool.state != "dead" for pool in self.pools.values()) < 2:
            ModelPool(self, f"pool{len(self.pools)}")

    def alive(self):
        return [pool for pool in self.pools.values() if pool.state == "alive"]

    def step_tick(self, seconds=None):
        """Time goes by, and each living pool comes to its turn."""
        seconds = self.chance.uniform(0, 6) if seconds is None else seconds
        self.mono += seconds
        self.set_clock(self.wall + seconds)
        for pool in self.alive():
            pool.round()

    def set_clock(self, wall):
        self.wall, self.latest = wall, max(wall, self.latest)
        self.peaks = {job: max(peak, wall) for job, peak in self.peaks.items()}

    def step_jump(self):
        self.set_clock(self.wall + self.chance.choice((-86400, -3600, 3600, 86400)))

    def step_suspend(self):
        """The machine sleeps for minutes: nobody is to blame."""
        self.mono += 600
        self.set_clock(self.wall + 600)
        for pool in self.pools.values():
            pool.beat_at += 600 - 2 * self.settings.heartbeat

    def some_pool(self):
        return self.chance.choice(self.alive() or [None])

    def step_turn(self):
        for pool in self.alive()[:1] if self.chance.random() < 0.5 else self.alive()[1:]:
            pool.reap()
            pool.turn()

    def interleave(self, claims):
        """Let the other pools have their turn in the middle of this one's."""
        if not self.is_nested:
            self.is_nested = True
            for pool in self.alive():
                if pool.claims is not claims:
                    pool.turn()
            self.is_nested = False

    def step_start(self):
        pool = self.some_pool()
        if pool:
            pool.start()

    def step_rescue(self):
        pool = self.some_pool()
        if pool:
            pool.rescue()

    def step_exit(self):
        running = [p for p in self.processes.values() if p.fate is None]
        if running:
            self.over(self.chance.choice(running),
                      self.chance.choice(("done", "done", "failed")))

    def step_crash(self):
        pool = self.some_pool()
        if pool:
            self.kill(pool)

    def step_freeze(self):
        """At the worst of moments, if one is there: between a claim and its start."""
        between = [pool for pool in self.alive() if pool.waiting]
        pool = between[0] if between else self.some_pool()
        if pool:
            pool.state = "frozen"

    def aim(self):
        """Thaw at the worst of moments: a rescuer is at work, or has just been."""
        for pool in self.pools.values():
            if pool.state == "frozen" and self.chance.random() < 0.7 and (
                    any(ride.fate == "killed" for ride in pool.rides.values())
                    or any(process.job.id == claimed.job.id and process.fate is None
                           for claimed in pool.waiting
                           for process in self.processes.values())):
                pool.state = "alive"

    def step_thaw(self):
        for pool in self.pools.values():
            if pool.state == "frozen":
                pool.state = "alive"

    # Clients.

    def tell(self, verb, ids, action):
        try:
            jobs = action()
            self.told.append(Told(verb, tuple(ids), 0))
            return jobs
        except self.q.QueueError:
            self.told.append(Told(verb, tuple(ids), 1))
            return []

    def step_enqueue(self):
        ids = [f"j{self.steps}-{n}" for n in range(self.chance.randint(1, 3))]
        specs = [self.q.Spec(
            "x", id=one, priority=self.chance.randint(-1, 1), cwd="/",
            queue=self.chance.choice(("default", "one")),
            run_at=self.wall + self.chance.choice((0, 0, 0, 2, 10, 4000)),
            after=tuple(self.chance.sample(ids[:n] + self.ids[-4:], 1))
            if self.chance.random() < 0.3 and ids[:n] + self.ids[-4:] else ())
            for n, one in enumerate(ids)]
        self.ids += [job.id for job in self.tell(
            "enqueue", ids, lambda: self.queue.enqueue_many(specs))]
        self.peaks.update((one, self.wall) for one in ids)

    def some_id(self):
        return self.chance.choice(self.ids[-12:] or ["none"])

    def step_cancel(self):
        job_id = self.some_id()
        for job in self.tell("wish", [job_id], lambda: self.queue.cancel(job_id)):
            if job.state == CANCELLED:      # else its worker ends it first
                self.told.append(Told("cancel", (job_id,), 0))

    def step_retry(self):
        job_id = self.some_id()
        self.tell("retry", [job_id], lambda: self.queue.retry(job_id))

    def step_delete(self):
        job_id = self.some_id()
        self.tell("delete", [job_id], lambda: self.queue.delete(job_id))

    def step_purge(self):
        dead = [job.id for job in self.queue.jobs(DEAD)]
        self.queue.purge_dead()
        left = {job.id for job in self.queue.jobs(DEAD)}
        self.told.append(Told("delete", tuple(id for id in dead if id not in left), 0))

    def peace(self):
        """No faults any more: within bounded time all must be over."""
        self.step_thaw()
        self.set_clock(self.latest + 4000)     # no delay is longer
        for _ in range(400):
            self.staff()
            self.step_tick(1)
            for process in self.processes.values():
                if process.fate is None and not process.is_deaf:
                    self.over(process, "done")
                process.is_deaf = False
            if not self.queue.store.rows("SELECT 1 FROM jobs WHERE claim IS NOT NULL OR "
                                         "gate IN ('open', 'time') LIMIT 1"):
                return


# Each guard with the text that it is, what stands there without it, and the rule of the
# checker that must find out.
MUTANTS = (
    ("stuck", "no fence: a late worker ends a later claim", (
        ("found = self._store.jobs(Sql.JOB_BY_CLAIM, claim=claim)",
         'found = self._store.jobs("SELECT jobs.* FROM jobs JOIN runs ON runs.job = '
         'jobs.seq WHERE runs.claim = :claim AND jobs.claim IS NOT NULL", claim=claim)'),)),
    ("alone", "recovery unguarded: what a lost worker left is not ended first", (
        ("        if host.is_over(claim):\n            return True",
         "        return True"),)),
    ("caused", "read, then write: the job is chosen before the transaction", (
        ("            with self._store.transaction() as store:\n"
         "                self._beat(now)",
         "            early = [self._store.jobs(Sql.JOB_BY_SEQ, seq=place.seq)[0]\n"
         "                     for place in self._choose(len(free))]\n"
         "            self._host.interleave(self)\n"
         "            with self._store.transaction() as store:\n"
         "                self._beat(now)"),
        ("self._claim(free, locks, now)",
         "[self._take(job, slot, locks, now) for job, slot in zip(early, free)]"),
        ("           AND state = :source AND claim IS :held\n", ""))),
    ("alone", "the run's lock is taken after the claim's commit", (
        ("lock = self._host.locks.hold(claim)     # before the commit (I5)", "lock = -1"),)),
    ("alone", "a queue's limit ignores what this turn has claimed", (
        ("busy = running.get(queue, 0) + self._store.noted(queue, PROCESSING)",
         "busy = 0"),)),
    ("excused", "a pool is lost as soon as it is silent", (
        ("or silent.get(pool, 0.0) >= lease)", "or pool in silent)"),)),
    ("excused", "time in which nobody looked counts as silence", (
        ("step = min(now - self._last, self._gap)", "step = now - self._last"),)),
    ("numbered", "a claim's number is used again", (
        ("            claim         INTEGER PRIMARY KEY AUTOINCREMENT",
         "            claim         INTEGER PRIMARY KEY"),)),
    ("charged", "a crash is charged as an attempt", (
        ("crashes=job.crashes + 1, run_at", "attempts=job.attempts + 1, run_at"),)),
    ("truthful", "a run that a rescuer ended counts as failed", (
        ("        outcome = judged(before, outcome)\n", ""),)),
    ("caused", "a change of state without its event", (
        ("    store.do(Sql.INSERT_EVENT, {\n        \"job\": before.seq",
         "    verb == 'fail' or store.do(Sql.INSERT_EVENT, {\n        \"job\": before.seq"),)),
    ("summed", "the counters are not kept", (
        ("    store.count(after.queue, after.state, +1)\n", ""),)),
    ("punctual", "a job is due at once", (
        ("return TIMED if job.run_at > iso(now) else OPEN", "return OPEN"),
        ("TIMED if run_at > now else OPEN", "OPEN"))),
    ("ordered", "a job does not wait for those it comes after", (
        ("        if blocked:\n            self._added", "        if ():\n            self._added"),)),
    ("stuck", "jobs are not let go on when what they wait for is completed", (
        ("        _regate_dependents(store, after, now)\n    return", "        pass\n    return"),)),
    ("acknowledged", "a cancelled job is not moved", (
        ('return move(self.store, "cancel", job, job._replace(finished_at=iso(now)), now)',
         "return job._replace(state=CANCELLED)"),)),
)


def mutant(changes):
    """The module with some of its text changed; each text must be there once."""
    source = inspect.getsource(queuectl)
    for old, new in changes:
        assert source.count(old) == 1, (source.count(old), old)
        source = source.replace(old, new)
    module = types.ModuleType("mutant")
    exec(compile(source, "mutant", "exec"), module.__dict__)
    return module


def memory_directory():
    """Where a database costs no fsync."""
    return tempfile.mkdtemp(prefix="queuectl model ", dir="/dev/shm"
                            if os.access("/dev/shm", os.W_OK) else None)


def model(module, seeds, rule="", steps=300):
    """Episodes, up to the first in which a rule, or that one, is broken: (steps, found)."""
    directory, taken = memory_directory(), 0
    try:
        for seed in seeds:
            world = World(module, os.path.join(directory, f"{seed}.db"), seed)
            found = [one for one in world.run(steps) if one.startswith(rule)]
            taken += world.steps
            if found:
                return taken, [f"seed {seed}: {violation}" for violation in found]
    finally:
        shutil.rmtree(directory, True)
    return taken, []


class Model(unittest.TestCase):
    def test_no_interleaving_breaks_a_rule(self):
        self.assertEqual(model(queuectl, range(30))[1], [])

    def test_each_guard_is_needed_and_its_lack_is_found(self):
        for rule, what, changes in MUTANTS:
            with self.subTest(what):
                self.assertTrue(model(mutant(changes), range(200), rule)[1])


# ---- Demo --------------------------------------------------------------------

def demo(count=1000, slots=4):
    """Compress real files, a job each, and compare every result with one made here."""
    import gzip
    folder = os.path.dirname(os.__file__)
    files = sorted(os.path.join(where, name) for where, _, names in os.walk(folder)
                   for name in names if name.endswith((".py", ".txt")))[:count]
    with tempfile.TemporaryDirectory() as here:
        def call(*argv, **options):
            return subprocess.run([sys.executable, MODULE, *argv], cwd=here, check=True,
                                  stdout=subprocess.PIPE, **options).stdout.decode()
        lines = [json.dumps({"id": f"file-{n}", "env": {"FILE": path},
                             "command": f'gzip -9 < "$FILE" > {n}.gz'})
                 for n, path in enumerate(files)]
        lines += [f'echo "no luck with {n}"; exit {n}' for n in (1, 2, 3)]
        call("config", "set", "backoff-base", "50ms")
        print(call("enqueue", "-", input="\n".join(lines).encode()), end="")
        begun = time.monotonic()
        call("worker", "start", "--count", str(slots), "--drain",
             stderr=subprocess.DEVNULL)
        took = time.monotonic() - begun
        print(f"drained by {slots} slots in {took:.1f} s\n")
        print(call("status"), call("dlq"), sep="\n")
        print(call("logs", "--tail", "1", f"job-{len(files) + 3}"), end="")
        same = 0
        for n, path in enumerate(files):
            with open(path, "rb") as original, gzip.open(f"{here}/{n}.gz") as result:
                same += original.read() == result.read()
        dead = json.loads(call("dlq", "list", "--json"))
        print(f"{same} of {len(files)} files came out right, {len(dead)} of 3 jobs that "
              "were made to fail are in the dead letter queue")
        return 0 if same == len(files) and len(dead) == 3 else 1


def main():
    """`--demo`, `--chaos`; without a flag the tests."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--chaos", type=queuectl.parse_duration, metavar="DUR")
    parser.add_argument("--seed", default="1")
    args, rest = parser.parse_known_args()
    if args.demo:
        return demo()
    if args.chaos is not None:
        return chaos(args.chaos, args.seed)
    return unittest.main(argv=[sys.argv[0], *rest])


if __name__ == "__main__":
    sys.exit(main())
