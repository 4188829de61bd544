"""From commit to durable in the store: pgbench TPC-B with four clients into S3. W4.

The server says twice every few milliseconds, in one row, how far it has flushed its own WAL and how far the archive says
it is durable. Every commit that was answered before a look lies before the first position; its lag is the time until the
second passes there. So a look's lag is that of a commit made just then, and looks are spread evenly over time.

Environment: DURATION (60) seconds, TAIL_INTERVAL (1) seconds
"""

import os
import subprocess
import time

from ground import DISK, Server, call, directory, end, environment, lsn_bytes, print_verdicts, scratch_directory, start, usable_seawall, wait_until
from stores import Store

DURATION = int(os.environ.get("DURATION", "60"))
TAIL_INTERVAL = float(os.environ.get("TAIL_INTERVAL", "1"))
LOOK = ("select pg_current_wal_flush_lsn(), coalesce((select flush_lsn from pg_stat_replication "
        "where application_name = 'seawall'), '0/0');\n")


class Looker:
    """One kept session."""

    def __init__(self, server):
        self.session = subprocess.Popen([server.bin / "psql", "-XAtq", "-d", server.conninfo], env=environment(), text=True,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def look(self):
        """(when, own position, durable position); the time is the one before the question, so lags are not too short."""
        when = time.monotonic()
        self.session.stdin.write(LOOK)
        self.session.stdin.flush()
        own, durable = self.session.stdout.readline().strip().split("|")
        return when, lsn_bytes(own), lsn_bytes(durable)

    def close(self):
        self.session.stdin.close()
        self.session.wait(30)


def lags(looks):
    """Of each look whose end was seen: seconds until the durable position passed its own."""
    found, later = [], 0
    for index, (when, own, _) in enumerate(looks):
        later = max(later, index)
        while later < len(looks) and looks[later][2] < own:
            later += 1
        if later == len(looks):
            break
        found.append(looks[later][0] - when)
    return found


def percentile(values, share):
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]


def main():
    with scratch_directory(DISK, 3) as scratch:
        seawall = usable_seawall(scratch)
        if seawall is None:
            return 1
        server = Server(directory(scratch / "lag"), "synchronous_commit = on\nmax_wal_size = 8GB\n")
        store = Store(scratch)
        agent = None
        try:
            call(server.bin / "pgbench", "-i", "-q", "-s", 20, server.conninfo)
            configuration = store.configuration(scratch / "lag.toml", server.conninfo, "lag",
                                                more=f'tail_interval = "{int(TAIL_INTERVAL * 1000)}ms"')
            agent = start(seawall, "--config", configuration, "run", log=scratch / "lag" / "agent.log", env=store.environment)
            looker = Looker(server)
            wait_until("the archive has caught up", lambda: is_caught_up(looker))
            server.sql("checkpoint")
            pgbench = start(server.bin / "pgbench", "-n", "-c", 4, "-T", DURATION, server.conninfo, log=scratch / "lag" / "pgbench.log")
            looks = []
            while pgbench.poll() is None:
                looks.append(looker.look())
                time.sleep(0.005)
            load_ended = time.monotonic()
            while time.monotonic() < load_ended + TAIL_INTERVAL + 10 and looks[-1][2] < looks[-1][1]:
                looks.append(looker.look())
                time.sleep(0.005)
            looker.close()
        finally:
            if agent:
                end(agent)
            store.stop()
            server.stop()
    found = lags(looks)
    bar = TAIL_INTERVAL + 0.5
    p50, p95, p99 = (percentile(found, share) for share in (0.5, 0.95, 0.99))
    written = (looks[-1][1] - looks[0][1]) / (1 << 20)
    return print_verdicts(f"commit to durable in S3, pgbench with 4 clients, {written:.0f} MiB of WAL in {DURATION} s, "
                          f"tail_interval {TAIL_INTERVAL} s, {len(found)} looks", [
        ("p50, s", f"{p50:.3f}", p50, None),
        ("p95, s", f"{p95:.3f}", p95, None),
        ("p99, s", f"{p99:.3f}", p99, bar),
        ("longest, s", f"{max(found):.3f}", max(found), None),
    ])


def is_caught_up(looker):
    _, own, durable = looker.look()
    return durable >= own
