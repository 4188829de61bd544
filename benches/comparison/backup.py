"""Full backup and restore of one database of about SIZE_GIB, on one disk: seawall against PostgreSQL's own tools.

Backup: `seawall backup` beside a running agent, against `pg_basebackup -Ft -X none` with client-side zstd at the same
level and two workers, both into directories of the same disk, both syncing what they wrote. Restore: `seawall restore`,
which verifies and syncs every file, against `zstd -d | tar -x` of pg_basebackup's own tar, which does neither; a second
row adds a `sync` to it. Interleaved, nothing pinned. Each of seawall's restores is compared with pg_basebackup's tar,
file by file, once.
"""

import shutil
import statistics
import subprocess
import sys

from ground import (DISK, GIB, MIB, PAIRS, SIZE_GIB, Server, call, directory, end, files_equal, measure, print_verdicts,
                    scratch_directory, spread, start, stored_bytes, usable_seawall, wait_until)

LEVEL = 1
SCALE_PER_GIB = 68  # pgbench -s: about 15 MiB each
BACKUP_BAR, RESTORE_BAR, RSS_MIB_MAX = 1.0, 1.0, 128
# What differs by design: seawall's settings for the recovery, and what says that it is one.
OURS = {"postgresql.auto.conf", "seawall.restore.json", "recovery.signal", "backup_label", "tablespace_map"}


class Bench:
    def __init__(self, scratch, seawall, server):
        self.scratch, self.seawall, self.server = scratch, seawall, server
        self.repository, self.agent = scratch / "repository", None
        self.configuration = scratch / "seawall.toml"
        self.configuration.write_text(
            f"[clusters.main]\npostgres = \"{server.conninfo}\"\ntail_interval = \"1s\"\n"
            f"[clusters.main.backup]\nautomatic = false\n\n[repositories.local]\nurl = \"file://{self.repository}\"\n")
        directory(self.repository)

    def begin(self):
        call(self.seawall, "--config", self.configuration, "init", "--apply")
        self.agent = start(self.seawall, "--config", self.configuration, "run", log=self.scratch / "agent.log")
        streams = "select count(*) from pg_stat_replication where state = 'streaming'"
        wait_until("the agent streams", lambda: self.server.sql(streams) == "1")

    def backup(self, tool, name):
        """A run, and where its files are."""
        self.server.sql("checkpoint")
        output = self.scratch / name
        if tool == "seawall":
            output = self.repository
            command = [self.seawall, "--config", self.configuration, "backup"]
        else:
            command = [self.server.bin / "pg_basebackup", "-d", self.server.conninfo, "-D", output, "-Ft", "-X", "none",
                       "-c", "fast", f"--compress=client-zstd:level={LEVEL},workers=2"]
        return measure(self.server, command, output), output

    def restore(self, tar, name):
        """Runs of seawall's restore, of tar alone, and of tar and a sync, each into a directory of its own."""
        into = {tool: self.scratch / f"{name}.{tool}" for tool in ("seawall", "tar", "tar+sync")}
        extract = f"zstd -dcq '{tar}' | tar -x -C '%s'"
        commands = {
            "seawall": [self.seawall, "--config", self.configuration, "restore", "--pgdata", into["seawall"]],
            "tar": ["sh", "-c", extract % into["tar"]],
            "tar+sync": ["sh", "-c", extract % into["tar+sync"] + f" && sync -f '{into['tar+sync']}'"],
        }
        runs = {}
        for tool, command in commands.items():
            if tool != "seawall":
                directory(into[tool])
            subprocess.run(["sync"], check=True)
            runs[tool] = measure(self.server, command, into[tool])
        return runs, into


def compare_files(ours, theirs):
    """Every file of the tar is in seawall's restore with the same bytes."""
    count = 0
    for path in theirs.rglob("*"):
        name = path.relative_to(theirs)
        if path.is_file() and not path.is_symlink() and str(name) not in OURS:
            other = ours / name
            if not other.is_file():
                raise RuntimeError(f"seawall did not restore {name}")
            # The two are different backups of an idle server: what each of its checkpoints writes differs.
            if str(name).startswith("base/") and not files_equal(path, other):
                raise RuntimeError(f"{name} differs")
            count += 1
    print(f"  verified: {count} files", file=sys.stderr, flush=True)


def main():
    with scratch_directory(DISK, 6 * SIZE_GIB) as scratch:
        seawall = usable_seawall(scratch)
        if seawall is None:
            return 0
        ground = directory(scratch / "ground")
        server = Server(ground, "max_wal_size = 1TB\nsynchronous_commit = off\n")
        bench = Bench(ground, seawall, server)
        try:
            return run(bench)
        finally:
            if bench.agent:
                end(bench.agent)
            server.stop()


def run(bench):
    server = bench.server
    print(f"backup: making a database of {SIZE_GIB:.1f} GiB", file=sys.stderr, flush=True)
    call(server.bin / "pgbench", "-i", "-q", "-s", max(1, round(SIZE_GIB * SCALE_PER_GIB)), server.conninfo)
    server.sql("vacuum freeze")
    server.sql("checkpoint")
    size = int(server.sql("select sum(pg_database_size(oid)) from pg_database"))
    bench.begin()
    backups, restores, wall = {"seawall": [], "pg_basebackup": []}, [], {"backup": [], "restore": [], "synced": []}
    for index in range(PAIRS):
        tools = ("seawall", "pg_basebackup") if index % 2 == 0 else ("pg_basebackup", "seawall")
        pair = {}
        for tool in tools:
            pair[tool], output = bench.backup(tool, f"backup{index}")
            backups[tool].append(pair[tool])
            print(f"  {tool:14} backup  wall {pair[tool].wall:6.2f} s  cpu {pair[tool].cpu:6.2f} s", file=sys.stderr, flush=True)
        wall["backup"].append(pair["seawall"].wall / pair["pg_basebackup"].wall)
        tar = bench.scratch / f"backup{index}" / "base.tar.zst"
        runs, into = bench.restore(tar, f"restore{index}")
        for tool, found in runs.items():
            print(f"  {tool:14} restore wall {found.wall:6.2f} s", file=sys.stderr, flush=True)
        restores.append(runs["seawall"])
        wall["restore"].append(runs["seawall"].wall / runs["tar"].wall)
        wall["synced"].append(runs["seawall"].wall / runs["tar+sync"].wall)
        if index == 0:
            compare_files(into["seawall"], into["tar"])
            stored = stored_bytes(bench.repository) / stored_bytes(bench.scratch / "backup0")
        for place in [*into.values(), bench.scratch / f"backup{index}"]:
            shutil.rmtree(place)
    median = statistics.median
    print(f"\nbackup and restore of {size / GIB:.2f} GiB (medians of {PAIRS})\n")
    for tool, found in backups.items():
        rate = size / MIB / median(run.wall for run in found)
        print(f"  {tool:14} backup  {median(run.wall for run in found):7.2f} s  {rate:6.0f} MiB/s  CPU "
              f"{median(run.cpu for run in found):6.2f} s  peak {max(run.rss for run in found) / MIB:5.1f} MiB")
    backup_rss = max(run.rss for run in backups["seawall"]) / MIB
    restore_rss = max(run.rss for run in restores) / MIB
    return print_verdicts("seawall against PostgreSQL's tools, median of paired ratios", [
        (f"backup, wall, pg_basebackup client-zstd:{LEVEL}, 2 workers", spread(wall["backup"], "x"), median(wall["backup"]), BACKUP_BAR),
        ("restore, wall, zstd -d | tar -x", spread(wall["restore"], "x"), median(wall["restore"]), RESTORE_BAR),
        ("restore, wall, zstd -d | tar -x && sync -f", spread(wall["synced"], "x"), median(wall["synced"]), None),
        ("bytes of the first backup", f"{stored:.3f}x", stored, None),
        ("peak RSS of a backup, MiB", f"{backup_rss:.1f}", backup_rss, RSS_MIB_MAX),
        ("peak RSS of a restore, MiB", f"{restore_rss:.1f}", restore_rss, RSS_MIB_MAX),
    ])
