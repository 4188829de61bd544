"""Catch-up into a directory: seawall, pg_receivewal (plain, lz4, gzip:1), plain zstd.

A PostgreSQL on tmpfs retains a corpus of WAL behind a slot; each run streams all of it through a copy of that slot, as
after an outage. The tool has core 1 for itself, server and everything else are on core 0. Runs are interleaved
(A B B A), and judged by the ratio of each pair, because wall times of a machine drift and ratios do not.
"""

import os
import shutil
import statistics
import sys

from corpora import CORPORA, FILLS, make_corpus
from ground import (GIB, MIB, PAIRS, PINNED, RETRIES, SCRATCH, SERVER_CORE, SIZE_GIB, call, directory, drop_slot, files_equal, lsn_text, measure,
                    memcpy_rate, scratch_directory, spread, usable_seawall, verify_stored,
                    versions)

RECEIVERS = {
    "pg_receivewal": ["--no-sync"],
    "pg_receivewal lz4": ["--no-sync", "-Z", "lz4"],
    "pg_receivewal gzip:1": ["--no-sync", "-Z", "gzip:1"],
    "pg_receivewal, sync": [],
    "pg_receivewal lz4, sync": ["-Z", "lz4"],
    "pg_receivewal gzip:1, sync": ["-Z", "gzip:1"],
}
# Seawall's bars: (reference, what, at most this ratio).
TARGETS = [
    ("zstd -1 -T1", "cpu", 1.25),
    ("pg_receivewal lz4", "wall", 1.3),
    ("pg_receivewal gzip:1", "wall", 0.5),
]
RSS_MIB_MAX = 64


class Bench:
    def __init__(self, corpus, seawall):
        self.corpus, self.seawall = corpus, seawall
        self.runs, self.count = {}, 0

    def prepare(self, tool):
        """A fresh output directory and slot, and the command of one run."""
        server, self.count = self.corpus.server, self.count + 1
        output, slot = directory(server.scratch / f"out{self.count}"), f"run{self.count}"
        if tool.startswith("zstd"):
            return ["zstd", "-1", "-T1", "-q", "--output-dir-flat", output, *self.corpus.segments], output, None
        server.sql(f"select pg_copy_physical_replication_slot('base', '{slot}')")
        end = lsn_text(self.corpus.end)
        if tool == "seawall":
            where = ["--postgres", server.conninfo, "--repository", f"file://{output}", "--slot", slot]
            call(self.seawall, "init", "--create", *where)
            return [self.seawall, "run", *where, "--until", end], output, slot
        receiver = [server.bin / "pg_receivewal", "-d", server.conninfo, "-D", output, "-S", slot, "-E", end, "--no-loop"]
        return receiver + RECEIVERS[tool], output, slot

    def run_once(self, tool, look=None):
        command, output, slot = self.prepare(tool)
        try:
            run = measure(self.corpus.server, command, output)
            if look:
                look(output)
            return run
        finally:
            shutil.rmtree(output, ignore_errors=True)
            if slot:
                self.corpus.server.sql(
                    f"select pg_terminate_backend(active_pid) from pg_replication_slots where slot_name = '{slot}' and active"
                )
                drop_slot(self.corpus.server, slot)

    def run(self, tool, look=None):
        for attempt in range(RETRIES + 1):
            run = self.run_once(tool, look)
            if not run.is_disturbed or attempt == RETRIES:
                break
        self.runs.setdefault(tool, []).append(run)
        mark = " (disturbed)" if run.is_disturbed else ""
        print(f"  {tool:28} wall {run.wall:6.2f} s  cpu {run.cpu:6.2f} s{mark}", file=sys.stderr, flush=True)
        return run

    def pairs(self, one, other):
        """A B B A …: whatever drifts touches both sides of the pairs alike."""
        found = []
        for index in range(PAIRS):
            order = (one, other) if index % 2 == 0 else (other, one)
            run = {tool: self.run(tool) for tool in order}
            found.append((run[one], run[other]))
        return found


# --- Verification ---


def verify_plain(corpus):
    """pg_receivewal's uncompressed segments are the server's own: then those stand for them in all comparisons."""

    def look(output):
        for path in corpus.segments:
            if not (output / path.name).exists() or not files_equal(path, output / path.name):
                raise RuntimeError(f"pg_receivewal's {path.name} differs from the server's")

    return look


# --- The report ---


def print_table(corpus, runs):
    gib = corpus.size / GIB
    print(f"\n{corpus.name}: {gib:.2f} GiB in {len(corpus.segments)} segments (medians)\n")
    print(f"| {'tool':28} | runs |  wall s | MiB/s | CPU s/GiB | walsender s/GiB | RSS MiB | stored MiB | ratio | disturbed |")
    print(f"|{'-' * 30}|-----:|--------:|------:|----------:|----------------:|--------:|-----------:|------:|----------:|")
    for tool, list_of_runs in runs.items():
        def median(pick, of=list_of_runs):
            return statistics.median(pick(run) for run in of)
        wall, stored = median(lambda run: run.wall), median(lambda run: run.output)
        print(f"| {tool:28} | {len(list_of_runs):4} | {wall:7.2f} | {gib * 1024 / wall:5.0f} | {median(lambda run: run.cpu) / gib:9.2f} "
              f"| {median(lambda run: run.walsender) / gib:15.2f} | {max(run.rss for run in list_of_runs) / MIB:7.1f} "
              f"| {stored / MIB:10.1f} | {corpus.size / max(stored, 1):5.1f} | {sum(run.is_disturbed for run in list_of_runs):9} |")


def judge(corpus, pairs, runs):
    """Prints each ratio against its target; the number missed."""
    missed = 0
    print(f"\n{corpus.name}: seawall against each, median of paired ratios [spread]\n")
    for reference, found in pairs.items():
        for what in ("wall", "cpu"):
            ratios = [getattr(ours, what) / getattr(theirs, what) for ours, theirs in found]
            judged = "cpu" if PINNED else "wall"
            target = next((most for tool, kind, most in TARGETS if (tool, kind) == (reference, what) and kind == judged), None)
            verdict = ""
            if target is not None:
                is_met = statistics.median(ratios) <= target
                missed += not is_met
                verdict = f"target <= {target}: {'met' if is_met else 'MISSED'}"
            print(f"  {what:4} / {reference:22} {spread(ratios, 'x'):28} {verdict}")
    rss = max(run.rss for run in runs["seawall"]) / MIB
    missed += rss >= RSS_MIB_MAX
    print(f"  peak RSS {rss:.1f} MiB{'':41} target < {RSS_MIB_MAX}: {'met' if rss < RSS_MIB_MAX else 'MISSED'}")
    return missed


def compare(name, scratch, seawall):
    """One corpus from its server's start to its tables; the number of missed targets."""
    print(f"{name}: making the corpus", file=sys.stderr, flush=True)
    corpus = make_corpus(name, scratch)
    try:
        corpus.server.pin()
        print(f"{name}: {corpus.size / GIB:.2f} GiB, up to {lsn_text(corpus.end)}", file=sys.stderr, flush=True)
        bench = Bench(corpus, seawall)
        bench.run("pg_receivewal", verify_plain(corpus))
        references = [tool for tool, _, _ in TARGETS]
        pairs = {}
        if seawall:
            bench.run_once("seawall", verify_stored(corpus, "seawall"))
            pairs = {reference: bench.pairs("seawall", reference) for reference in references}
        else:
            for index in range(PAIRS):
                for tool in references if index % 2 == 0 else references[::-1]:
                    bench.run(tool)
        for tool in RECEIVERS:
            if tool not in bench.runs:
                bench.run(tool)
        print_table(corpus, bench.runs)
        return judge(corpus, pairs, bench.runs) if seawall else 0
    finally:
        corpus.server.stop()


def main():
    unknown = set(CORPORA) - set(FILLS)
    if unknown:
        sys.exit(f"unknown corpora: {' '.join(sorted(unknown))}")
    missed = 0
    with scratch_directory(SCRATCH, 3.5 * SIZE_GIB) as scratch:
        seawall = usable_seawall(scratch)
        if PINNED:
            os.sched_setaffinity(0, SERVER_CORE)
        else:
            print("nothing is pinned: wall time is judged, CPU is not", file=sys.stderr)
        print(f"calibration: memcpy {memcpy_rate():.0f} MiB/s; {'; '.join(versions(seawall))}")
        for name in CORPORA:
            place = directory(scratch / name)
            missed += compare(name, place, seawall)
            shutil.rmtree(place)
    return missed
