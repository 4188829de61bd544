"""Catch-up into one S3 store: seawall (zstd 1) against WAL-RUS (zstd, at its own default level: 1). W3 with upload.

The same server, WAL and store for both, interleaved; the tool on core 1, server and store on core 0. Judged: CPU seconds
of the tool (PIN=1), stored bytes, peak memory. All segments of the first run of each are decoded and compared.
WAL-RUS has no end of its own: it is told to stop once the last whole segment is stored.
"""

import os
import re
import shutil
import statistics
import sys

from corpora import CORPORA, make_corpus
from ground import (GIB, MIB, PAIRS, PINNED, RETRIES, SCRATCH, SERVER_CORE, SIZE_GIB, call, directory, drop_slot, lsn_text,
                    measure, memcpy_rate, print_verdicts, scratch_directory, spread, usable_seawall, verify_stored)
from stores import BUCKET, REGION, WAL_RUS, Store, peer

SEGMENT = re.compile(r"[0-9A-F]{24}\.zst(d)?")
CPU_RATIO_MAX, STORED_RATIO_MAX, RSS_MIB_MAX = 0.7, 1.0, 64


class Bench:
    def __init__(self, corpus, store, seawall, walrus):
        self.corpus, self.store, self.seawall, self.walrus = corpus, store, seawall, walrus
        self.runs, self.count = {"seawall": [], "wal-rus": []}, 0
        self.segments = {}  # bytes of the segments' objects alone, without indexes, tails and what else is beside them

    def run_once(self, tool, look=None):
        self.count += 1
        server, name = self.corpus.server, f"run{self.count}"
        output = directory(self.store.bucket / name)
        server.sql(f"select pg_copy_physical_replication_slot('base', '{name}')")
        try:
            if tool == "seawall":
                configuration = self.store.configuration(server.scratch / f"{name}.toml", server.conninfo, name, slot=name)
                call(self.seawall, "--config", configuration, "init", "--create", env=self.store.environment)
                command = [self.seawall, "--config", configuration, "run", "--until", lsn_text(self.corpus.end)]
                run = measure(server, command, output, self.store.environment)
            else:
                spool = directory(server.scratch / f"{name}.spool")
                last = self.corpus.segments[-1].name
                run = measure(server, [self.walrus, "wal-receive", spool], output, self.walrus_environment(name),
                              lambda: any(True for _ in output.rglob(f"{last}.zst*")))
            self.segments[tool] = sum(path.stat().st_size for path in output.rglob("*") if SEGMENT.fullmatch(path.name))
            if look:
                look(output)
            return run
        finally:
            shutil.rmtree(output, ignore_errors=True)
            server.sql("select pg_terminate_backend(active_pid) from pg_replication_slots "
                       f"where slot_name = '{name}' and active")
            drop_slot(server, name)

    def walrus_environment(self, name):
        return self.store.environment | {
            "WALG_S3_PREFIX": f"s3://{BUCKET}/{name}", "AWS_ENDPOINT": self.store.endpoint, "AWS_S3_FORCE_PATH_STYLE": "true",
            "AWS_REGION": REGION, "WALG_COMPRESSION_METHOD": "zstd", "WALG_UPLOAD_CONCURRENCY": "4", "WALG_SLOTNAME": name,
            "PGHOST": str(self.corpus.server.scratch), "PGPORT": "5432", "PGUSER": "postgres", "PGDATABASE": "postgres",
        }

    def run(self, tool, look=None):
        for attempt in range(RETRIES + 1):
            run = self.run_once(tool, look)
            if not run.is_disturbed or attempt == RETRIES:
                break
        self.runs[tool].append(run)
        mark = " (disturbed)" if run.is_disturbed else ""
        print(f"  {tool:10} wall {run.wall:6.2f} s  cpu {run.cpu:6.2f} s{mark}", file=sys.stderr, flush=True)
        return run


def compare(name, scratch, seawall, walrus):
    print(f"{name}: making the corpus", file=sys.stderr, flush=True)
    corpus = make_corpus(name, scratch)
    try:
        corpus.server.pin()
        store = Store(scratch)
        try:
            bench, pairs = Bench(corpus, store, seawall, walrus), []
            for index in range(PAIRS):
                order = ("seawall", "wal-rus") if index % 2 == 0 else ("wal-rus", "seawall")
                run = {tool: bench.run(tool, verify_stored(corpus, tool) if index == 0 else None) for tool in order}
                pairs.append((run["seawall"], run["wal-rus"]))
        finally:
            store.stop()
    finally:
        corpus.server.stop()
    print_runs(corpus, bench.runs)
    cpu = [ours.cpu / theirs.cpu for ours, theirs in pairs]
    stored = [ours.output / theirs.output for ours, theirs in pairs]
    wall = [ours.wall / theirs.wall for ours, theirs in pairs]
    segments = bench.segments["seawall"] / bench.segments["wal-rus"]
    rss = max(run.rss for run in bench.runs["seawall"]) / MIB
    return print_verdicts(f"{name}: seawall against wal-rus zstd into one S3 store, median of paired ratios", [
        ("CPU" + ("" if PINNED else " (not pinned)"), spread(cpu, "x"), statistics.median(cpu), CPU_RATIO_MAX),
        ("stored bytes", spread(stored, "x"), statistics.median(stored), STORED_RATIO_MAX),
        ("stored bytes of segments alone", f"{segments:.3f}x", segments, None),
        ("wall", spread(wall, "x"), statistics.median(wall), None),
        ("peak RSS, MiB", f"{rss:.1f}", rss, RSS_MIB_MAX),
    ])


def print_runs(corpus, runs):
    gib = corpus.size / GIB
    print(f"\n{corpus.name}: {gib:.2f} GiB in {len(corpus.segments)} segments (medians)\n")
    print("| tool       | runs |  wall s | CPU s/GiB | RSS MiB | stored MiB | disturbed |")
    print("|------------|-----:|--------:|----------:|--------:|-----------:|----------:|")
    for tool, found in runs.items():
        def median(pick, of=found):
            return statistics.median(pick(run) for run in of)
        print(f"| {tool:10} | {len(found):4} | {median(lambda run: run.wall):7.2f} | {median(lambda run: run.cpu) / gib:9.2f} "
              f"| {max(run.rss for run in found) / MIB:7.1f} | {median(lambda run: run.output) / MIB:10.1f} "
              f"| {sum(run.is_disturbed for run in found):9} |")


def main():
    walrus = peer(*WAL_RUS)
    missed = 0
    with scratch_directory(SCRATCH, 3.5 * SIZE_GIB) as scratch:
        seawall = usable_seawall(scratch)
        if seawall is None:
            return 1
        runnable = scratch / "walrus"
        shutil.copy(walrus, runnable)
        if PINNED:
            os.sched_setaffinity(0, SERVER_CORE)
        print(f"calibration: memcpy {memcpy_rate():.0f} MiB/s; {WAL_RUS[1]} {WAL_RUS[2]}")
        for name in CORPORA:
            place = directory(scratch / name)
            missed += compare(name, place, seawall, runnable)
            shutil.rmtree(place)
    return missed
