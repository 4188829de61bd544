"""Synchronous commits: pgbench simple-update with one client, waiting for each archive in turn. W6.

On a directory: seawall against `pg_receivewal --synchronous`, beside commits that wait for the local disk alone. On S3:
seawall against one bare PUT, to the same store, of the size its tails had. A commit waits for the local disk besides,
which weighs where a PUT takes less than a sync: so there are two distances. Data and directories are on DISK, not
tmpfs: here a sync costs what it costs. Rounds are interleaved (A B B A); nothing is pinned.

Environment: DISK (/var/tmp), ROUNDS (4), SECONDS (6) of pgbench in each round, DISTANCES_MS ("0 20")
"""

import contextlib
import os
import signal
import statistics
import sys
import threading
import time

from ground import DISK, Server, call, directory, end, print_verdicts, scratch_directory, spread, start, usable_seawall, wait_until
from stores import Client, CountingProxy, Store

ROUNDS = int(os.environ.get("ROUNDS", "4"))
SECONDS = int(os.environ.get("SECONDS", "6"))
# Each answer held back so long: this machine, and a store in the same region.
DISTANCES_MS = [int(word) for word in os.environ.get("DISTANCES_MS", "0 20").split()]
DIRECTORY_RATIO_MAX, PUT_RATIO_MAX = 1.5, 1.5
SETTINGS = "synchronous_commit = on\nmax_wal_size = 8GB\nwal_sender_timeout = 60s\n"


class Commits:
    """A server whose commits can be made to wait for a standby by name."""

    def __init__(self, scratch):
        self.scratch = scratch
        self.server = Server(scratch, SETTINGS)
        call(self.server.bin / "pgbench", "-i", "-q", "-s", 5, self.server.conninfo)
        self.rounds = 0

    def wait_for(self, name):
        """Commits wait for `name` from now on, or for nobody."""
        self.server.sql(f"alter system set synchronous_standby_names = '{name}'")
        self.server.sql("select pg_reload_conf()")
        if name:
            state = f"select 1 from pg_stat_replication where application_name = '{name}' and sync_state = 'sync'"
            wait_until(f"{name} is the synchronous standby", lambda: self.server.sql(state) == "1", 90)

    def median_us(self):
        """Of one round's transactions."""
        self.rounds += 1
        prefix = self.scratch / f"commits{self.rounds}"
        call(self.server.bin / "pgbench", "-n", "-N", "-c", 1, "-T", SECONDS, "-l", "--log-prefix", prefix, self.server.conninfo)
        [log] = self.scratch.glob(f"{prefix.name}.*")
        found = sorted(int(line.split()[2]) for line in log.read_text().splitlines())
        return statistics.median(found)

    @contextlib.contextmanager
    def standby(self, name, command, env=None):
        process = start(*command, log=self.scratch / f"{name}.log", env=env)
        try:
            self.wait_for(name)
            self.settle()
            yield process
        finally:
            self.wait_for("")
            end(process, signal.SIGINT)

    def settle(self):
        """Until a commit no longer has to wait for somebody's next look at the server."""
        for _ in range(100):
            began = time.monotonic()
            self.server.sql("select pg_logical_emit_message(true, 'settle', '')")
            if time.monotonic() - began < 0.1:
                return
        print("commits stay slower than 100 ms", file=sys.stderr)


def show(name, value):
    print(f"  {name:24} median {value:7.0f} us", file=sys.stderr, flush=True)
    return value


def on_directory(commits, seawall):
    plain, repository = directory(commits.scratch / "plain"), f"file://{directory(commits.scratch / 'repository')}"
    receiver = [commits.server.bin / "pg_receivewal", "-d", commits.server.conninfo, "-D", plain, "--synchronous"]
    agent = [seawall, "run", "--postgres", commits.server.conninfo, "--repository", repository]
    commands, found = {"pg_receivewal": receiver, "seawall": agent}, {"pg_receivewal": [], "seawall": [], "local": []}
    commits.median_us()  # warms up
    for index in range(ROUNDS):
        found["local"].append(show("local disk", commits.median_us()))
        for name in ["pg_receivewal", "seawall"][:: 1 if index % 2 == 0 else -1]:
            with commits.standby(name, commands[name]):
                found[name].append(show(name, commits.median_us()))
    ratios = [ours / theirs for ours, theirs in zip(found["seawall"], found["pg_receivewal"])]
    return print_verdicts("synchronous commits, one client, directory: median of rounds' medians", [
        ("local disk alone, us", spread(found["local"]), 0, None),
        ("pg_receivewal --synchronous, us", spread(found["pg_receivewal"]), 0, None),
        ("seawall, us", spread(found["seawall"]), 0, None),
        ("seawall / pg_receivewal --synchronous", spread(ratios, "x"), statistics.median(ratios), DIRECTORY_RATIO_MAX),
    ])


class TailSizes(threading.Thread):
    """The sizes of tail objects, seen while they are there: they are deleted once merged."""

    def __init__(self, place):
        super().__init__(daemon=True)
        self.place, self.sizes, self.is_over = place, {}, threading.Event()

    def run(self):
        while not self.is_over.wait(0.02):
            for path in self.place.rglob("*.tail/*.zst"):
                with contextlib.suppress(OSError):
                    self.sizes[path.name] = path.stat().st_size

    def median(self):
        self.is_over.set()
        self.join()
        return int(statistics.median(self.sizes.values()))


def on_s3(commits, seawall, store):
    """At each distance: what a commit waits beside one PUT."""
    missed = 0
    for distance_ms in DISTANCES_MS:
        proxy = CountingProxy(store.port, distance_ms / 1000) if distance_ms else None
        try:
            missed += at_distance(commits, seawall, store, distance_ms, proxy)
        finally:
            if proxy:
                proxy.stop()
    return missed


def at_distance(commits, seawall, store, distance_ms, proxy):
    prefix, endpoint = f"commits{distance_ms}", proxy and proxy.endpoint
    configuration = store.configuration(commits.scratch / f"{prefix}.toml", commits.server.conninfo, prefix, endpoint, prefix)
    agent = [seawall, "--config", configuration, "run"]
    client, size = Client(proxy.port if proxy else store.port), None
    found = {"local": [], "seawall": [], "put": []}
    for index in range(ROUNDS):
        found["local"].append(show("local disk", commits.median_us()))
        with commits.standby("seawall", agent, store.environment):
            if size is None:
                # Not one of the rounds: looking costs.
                looker = TailSizes(store.bucket / prefix)
                looker.start()
                commits.median_us()
                size = looker.median()
            found["seawall"].append(show(f"seawall, S3 at {distance_ms} ms", commits.median_us()))
        found["put"].append(show(f"bare PUT of {size} B", bare_puts(client, size, f"{prefix}/{index}")))
    ratios = [ours / bare for ours, bare in zip(found["seawall"], found["put"])]
    shares = [(ours - local) / bare for ours, local, bare in zip(found["seawall"], found["local"], found["put"])]
    return print_verdicts(f"synchronous commits, one client, S3 (s3s-fs on disk) at {distance_ms} ms: median of rounds' medians", [
        ("local disk alone, us", spread(found["local"]), 0, None),
        (f"one bare PUT of {size} B, us", spread(found["put"]), 0, None),
        ("seawall, us", spread(found["seawall"]), 0, None),
        ("seawall / bare PUT", spread(ratios, "x"), statistics.median(ratios), PUT_RATIO_MAX),
        ("(seawall - local disk alone) / bare PUT", spread(shares, "x"), 0, None),
    ])


def bare_puts(client, size, prefix):
    body, found, until, count = os.urandom(size), [], time.monotonic() + SECONDS, 0
    while time.monotonic() < until:
        began = time.perf_counter()
        client.put(f"bare/{prefix}/{count:09}", body)
        found.append((time.perf_counter() - began) * 1e6)
        count += 1
    return statistics.median(found)


def main():
    with scratch_directory(DISK, 3) as scratch:
        seawall = usable_seawall(scratch)
        if seawall is None:
            return 1
        commits = Commits(directory(scratch / "commits"))
        try:
            missed = on_directory(commits, seawall)
            store = Store(scratch)
            try:
                return missed + on_s3(commits, seawall, store)
            finally:
                store.stop()
        finally:
            commits.server.stop()
