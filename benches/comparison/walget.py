"""Recovery: what a nearly empty segment costs through wal-get, and what a store at a distance costs. W12.

One server's WAL, archived into a directory and into S3; recoveries of one base backup, interleaved, each on a data
directory of its own on DISK, with fsync on. Nearly empty segments (a switch each) tell what feeding alone costs: beside a
hard link and cp from a directory of the same files. pgbench's WAL tells what replay from S3 takes with every answer held
back, beside the same from the directory. Segment times are the server's own log's; nothing is pinned.

Environment: DISK (/var/tmp), SEGMENTS (300) nearly empty, REPLAY_GIB (1), RECOVERIES (3) of each, DISTANCE_MS (50)
"""

import json
import os
import re
import shutil
import statistics
import subprocess
import sys

from ground import (DISK, GIB, MIB, Server, call, directory, end, environment, lsn_text, print_verdicts, scratch_directory,
                    spread, start, usable_seawall, wait_until, IDENTITY, USER)
from stores import CountingProxy, Store

SEGMENTS = int(os.environ.get("SEGMENTS", "300"))
REPLAY_GIB = float(os.environ.get("REPLAY_GIB", "1"))
RECOVERIES = int(os.environ.get("RECOVERIES", "3"))
DISTANCE_MS = int(os.environ.get("DISTANCE_MS", "50"))
EMPTY_MS_MAX, REPLAY_RATIO_MAX = 3.0, 1.1
ID = "00000000c0ffee00"
SETTINGS = "max_wal_size = 100GB\nwal_keep_size = 100GB\nwal_sender_timeout = 60s\n"
RESTORED = re.compile(r'^(\d+\.\d+) .*restored log file "([0-9A-F]{24})"')


class Source:
    """A server, its base backup, and the archives of everything written after it."""

    def __init__(self, scratch, seawall, store, name, write):
        self.scratch, self.seawall = directory(scratch / name), seawall
        self.server = Server(self.scratch, SETTINGS)
        self.system_id = self.server.sql("select system_identifier from pg_control_system()")
        self.conninfo = self.server.conninfo
        local = self.scratch / "local.toml"
        local.write_text(f'[clusters.main]\npostgres = "{self.conninfo}"\nslot = "local"\n'
                         f'[repositories.local]\nurl = "file://{directory(self.scratch / "repository")}"\n', encoding="utf-8")
        remote = store.configuration(self.scratch / "remote.toml", self.conninfo, name, slot="remote")
        self.configurations = {"local": local, "remote": remote}
        self.environment = store.environment
        agents = [start(seawall, "--config", path, "run", log=self.scratch / f"{path.stem}.log", env=store.environment)
                  for path in self.configurations.values()]
        ready = "select count(*) from pg_replication_slots where active"
        wait_until("the agents stream", lambda: self.server.sql(ready) == "2")
        self.backup = self.scratch / "backup"
        call(self.server.bin / "pg_basebackup", "-X", "none", "-c", "fast", "-d", self.conninfo, "-D", self.backup)
        label = (self.backup / "backup_label").read_text(encoding="utf-8")
        self.start_lsn, self.first = re.search(r"START WAL LOCATION: (\S+) \(file (\S+)\)", label).groups()
        write(self.server)
        self.server.sql("select pg_switch_wal()")
        flushed = self.server.sql("select pg_current_wal_flush_lsn()")
        done = f"select count(*) from pg_replication_slots where restart_lsn >= '{flushed}'"
        wait_until("everything is archived", lambda: self.server.sql(done) == "2", 600)
        for agent in agents:
            end(agent)
        self.files = directory(self.scratch / "files")
        for path in sorted((self.server.data / "pg_wal").iterdir()):
            if re.fullmatch("[0-9A-F]{24}", path.name) and self.first <= path.name:
                shutil.copy(path, self.files)
                if USER:
                    os.chown(self.files / path.name, USER.pw_uid, USER.pw_gid)
        self.end_lsn = flushed
        self.server.stop()

    def distance(self, proxy):
        text = self.configurations["remote"].read_text(encoding="utf-8")
        far = self.scratch / "far.toml"
        far.write_text(re.sub(r'endpoint = ".*"', f'endpoint = "{proxy.endpoint}"', text), encoding="utf-8")
        self.configurations["far"] = far

    def wal_get(self, where):
        return f"{self.seawall} wal-get --restore {ID} --config {self.configurations[where]} %f %p"

    def recover(self, command):
        """Milliseconds of each segment, and from the first to the end of replay."""
        data = self.scratch / "recovered"
        shutil.rmtree(data, ignore_errors=True)
        call("cp", "-a", self.backup, data)
        marker = {
            "schema": 1, "id": ID, "cluster": "main", "lineage": self.system_id, "system_id": self.system_id,
            "segment_size": 16 * MIB, "path": [{"timeline": 1, "end_lsn": None}], "follow": False,
            "start_lsn": self.start_lsn, "end_lsn": lsn_text((1 << 64) - 1), "standby": False,
            "backup": "20261122T110000Z-full", "target": "latest", "created": "2026-11-22T11:00:00Z", "pinned": False,
        }
        (data / "seawall.restore.json").write_text(json.dumps(marker), encoding="utf-8")
        (data / "recovery.signal").touch()
        end_command = f"{self.seawall} wal-get --restore-end {ID} --config {self.configurations['local']}"
        with open(data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write(f"restore_command = '{command}'\nrecovery_end_command = '{end_command}'\nlog_line_prefix = '%n '\n"
                       "recovery_target_timeline = 'current'\nhot_standby = off\nmax_wal_size = 4GB\nwal_keep_size = 0\n")
        for name in ("seawall.restore.json", "recovery.signal", "postgresql.conf"):
            if USER:
                os.chown(data / name, USER.pw_uid, USER.pw_gid)
        os.sync()
        log = self.scratch / "recovered.log"
        with open(log, "wb") as words:
            process = subprocess.Popen([self.server.bin / "postgres", "-D", data], cwd="/", env=environment(**self.environment),
                                       stdin=subprocess.DEVNULL, stdout=words, stderr=words, **IDENTITY)
        try:
            wait_until("it has recovered", lambda: "ready to accept connections" in log.read_text() or process.poll() is not None, 1200)
        finally:
            process.terminate()
            process.wait(60)
        text = log.read_text()
        if "archive recovery complete" not in text:
            raise RuntimeError(text[-4000:])
        restored = [(float(found[1]) * 1000, found[2]) for line in text.splitlines() if (found := RESTORED.match(line))]
        started = next(float(line.split()[0]) for line in text.splitlines() if "redo starts at" in line) * 1000
        done = next(float(line.split()[0]) for line in text.splitlines() if "redo done at" in line) * 1000
        times = [at for at, _ in restored]
        return [later - earlier for earlier, later in zip(times, times[1:])], done - started


def show(name, steps, total):
    print(f"  {name:28} {total:8.0f} ms, {len(steps)} segments: median {statistics.median(steps):6.2f} ms, "
          f"mean {statistics.fmean(steps):6.2f}", file=sys.stderr, flush=True)


def write_switches(server):
    server.sql("create table switches (id bigint)")
    batch = ";".join(["insert into switches values (1)", "select pg_switch_wal()"] * 10)
    for _ in range(SEGMENTS // 10):
        for statement in batch.split(";"):
            server.sql(statement)


def write_transactions(server):
    call(server.bin / "pgbench", "-i", "-q", "-s", 20, server.conninfo)
    begun = server.written()
    while server.written() - begun < REPLAY_GIB * GIB:
        call(server.bin / "pgbench", "-n", "-N", "-c", 8, "-t", 4000, server.conninfo)


def nearly_empty(source):
    files = source.scratch / "copy"
    commands = {
        "hard link": f"ln {files}/%f %p", "cp": f"cp {files}/%f %p", "wal-get, directory": source.wal_get("local"),
        f"wal-get, S3 at {DISTANCE_MS} ms": source.wal_get("far"),
    }
    found = {name: [] for name in commands}
    for _ in range(RECOVERIES):
        for name, command in commands.items():
            shutil.rmtree(files, ignore_errors=True)
            call("cp", "-a", source.files, files)
            steps, total = source.recover(command)
            show(name, steps, total)
            found[name].append((statistics.median(steps), statistics.fmean(steps)))
    rows = []
    for name, runs in found.items():
        medians = [median for median, _ in runs]
        bar = EMPTY_MS_MAX if name == "wal-get, directory" else None
        rows.append((f"{name}: median, ms a segment", spread(medians), statistics.median(medians), bar))
        rows.append((f"{name}: mean, ms a segment", spread([mean for _, mean in runs]), 0, None))
    return print_verdicts(f"{SEGMENTS} nearly empty segments of 16 MiB, fed and replayed", rows)


def replay(source):
    found = {"local": [], "far": []}
    for index in range(RECOVERIES):
        for where in list(found)[:: 1 if index % 2 == 0 else -1]:
            steps, total = source.recover(source.wal_get(where))
            show(f"replay, {where}", steps, total)
            found[where].append(total)
    ratios = [far / local for local, far in zip(found["local"], found["far"])]
    return print_verdicts(f"replay of {REPLAY_GIB:g} GiB of pgbench's WAL through wal-get", [
        ("from a directory, s", spread([total / 1000 for total in found["local"]]), 0, None),
        (f"from S3 at {DISTANCE_MS} ms, s", spread([total / 1000 for total in found["far"]]), 0, None),
        ("at a distance / directory", spread(ratios, "x"), statistics.median(ratios), REPLAY_RATIO_MAX),
    ])


def main():
    with scratch_directory(DISK, 3 * REPLAY_GIB + SEGMENTS / 20 + 5) as scratch:
        seawall = usable_seawall(scratch)
        if seawall is None:
            return 1
        store, missed = Store(scratch), 0
        proxy = CountingProxy(store.port, DISTANCE_MS / 1000)
        try:
            for name, write, judge in [("empty", write_switches, nearly_empty), ("full", write_transactions, replay)]:
                source = Source(scratch, seawall, store, name, write)
                source.distance(proxy)
                missed += judge(source)
                shutil.rmtree(source.scratch)
        finally:
            proxy.stop()
            store.stop()
        return missed
