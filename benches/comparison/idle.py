"""A server that writes nothing: what the agent asks of the store, counted between them. W7.

Environment: IDLE (120) seconds
"""

import os
import time

from ground import DISK, Server, cpu_of, directory, end, lsn_bytes, print_verdicts, scratch_directory, start, usable_seawall, wait_until
from stores import CountingProxy, Store

IDLE = int(os.environ.get("IDLE", "120"))
REQUESTS_PER_MINUTE_MAX, CPU_PERCENT_MAX = 0, 0.2


def main():
    with scratch_directory(DISK, 1) as scratch:
        seawall = usable_seawall(scratch)
        if seawall is None:
            return 1
        server = Server(directory(scratch / "idle"), "")
        store = Store(scratch)
        proxy, agent = CountingProxy(store.port), None
        try:
            configuration = store.configuration(scratch / "idle.toml", server.conninfo, "idle", endpoint=proxy.endpoint)
            agent = start(seawall, "--config", configuration, "run", log=scratch / "idle" / "agent.log", env=store.environment)
            durable = "select coalesce(max(flush_lsn), '0/0') from pg_stat_replication where application_name = 'seawall'"
            wait_until("all is durable", lambda: lsn_bytes(server.sql(durable)) >= server.written() > 0)
            # The last lines of its beginning: a look at other writers, superfluous tails.
            time.sleep(15)
            position, cpu, began, before = server.written(), cpu_of(agent.pid), time.monotonic(), len(proxy.requests)
            time.sleep(IDLE)
            seconds = time.monotonic() - began
            asked = [method for _, method in proxy.requests[before:]]
            used = 100 * (cpu_of(agent.pid) - cpu) / seconds
            if server.written() != position:
                print(f"the server was not idle: {server.written() - position} bytes of WAL")
            if agent.poll() is not None or before == 0:
                raise RuntimeError("the agent did not archive:\n" + (scratch / "idle" / "agent.log").read_text()[-3000:])
        finally:
            if agent:
                end(agent)
            proxy.stop()
            store.stop()
            server.stop()
    rate = len(asked) * 60 / seconds
    return print_verdicts(f"an idle server, {seconds:.0f} s: what the agent asks of the store", [
        ("requests a minute", f"{rate:.1f} {dict((m, asked.count(m)) for m in sorted(set(asked))) or ''}", rate, REQUESTS_PER_MINUTE_MAX),
        ("CPU, percent of a core", f"{used:.2f}", used, CPU_PERCENT_MAX),
    ])
