"""WAL to catch up on: made by a real server, kept there behind a slot."""

import os
import re
from dataclasses import dataclass

from ground import GIB, SIZE_GIB, Server, call, lsn_bytes, lsn_text

CORPORA = os.environ.get("CORPORA", "pgbench json random").split()


def fill_pgbench(server, start, size):
    """COPY and index builds, then after each checkpoint full page images, then steady updates."""
    scale = max(1, int(30 * size / GIB))
    call(server.bin / "pgbench", "-i", "-q", "-s", scale, server.conninfo)
    while server.written() - start < size:
        server.sql("checkpoint")
        call(server.bin / "pgbench", "-n", "-c", "4", "-T", "15", server.conninfo)


def fill_json(server, start, size):
    server.sql("create table doc (id bigint primary key, body jsonb)")
    server.sql("create index on doc ((body->>'customer'))")
    batch, rows = 0, 20_000
    while server.written() - start < size:
        first = batch * rows
        server.sql(
            f"insert into doc select i, jsonb_build_object('id', i, 'customer', 'c' || (random() * 100000)::int, 'at', "
            f"clock_timestamp(), 'amount', round((random() * 1000)::numeric, 2), 'state', (array['new', 'paid', 'sent', "
            f"'done'])[1 + i % 4], 'lines', jsonb_build_array(md5(i::text), (random() * 1e9)::int, 'note ' || i)) "
            f"from generate_series({first}, {first + rows - 1}) i"
        )
        server.sql(f"update doc set body = body || '{{\"state\": \"seen\"}}' where id % 3 = 0 and id >= {first}")
        batch += 1
        if batch % 20 == 0:
            server.sql("checkpoint")


def fill_random(server, start, size):
    server.sql("create table noise (id uuid, body bytea)")
    while server.written() - start < size:
        server.sql("insert into noise select gen_random_uuid(), sha512((random()::text || i)::bytea) || "
                   "sha512((random()::text || -i)::bytea) from generate_series(1, 200000) i")


FILLS = {"pgbench": fill_pgbench, "json": fill_json, "random": fill_random}


@dataclass
class Corpus:
    name: str
    server: Server
    end: int  # a segment's start: everything below it is whole segments
    segments: list  # their files in pg_wal, which the slot keeps there

    @property
    def size(self):
        return sum(path.stat().st_size for path in self.segments)


def make_corpus(name, scratch):
    size = int(SIZE_GIB * GIB) if name == "pgbench" else int(SIZE_GIB * GIB / 3)
    server = Server(scratch)
    try:
        server.sql("select pg_switch_wal()")
        server.sql("checkpoint")
        server.sql("select pg_create_physical_replication_slot('base', true)")
        start = lsn_bytes(server.sql("select restart_lsn from pg_replication_slots where slot_name = 'base'"))
        FILLS[name](server, start, size)
        server.sql("checkpoint")
        last = server.sql("select pg_walfile_name(pg_switch_wal())")
        segment = int(server.sql("select setting from pg_settings where name = 'wal_segment_size'"))
        # A receiver stops when it is beyond the end, so there is something beyond.
        server.sql("select pg_logical_emit_message(true, 'end', repeat('x', 10000))")
        server.sql("checkpoint")
        end = server.written() // segment * segment
        first = server.sql(f"select pg_walfile_name('{lsn_text(start // segment * segment + 1)}')")
        files = sorted(path for path in (server.data / "pg_wal").iterdir() if re.fullmatch("[0-9A-F]{24}", path.name))
        corpus = Corpus(name, server, end, [path for path in files if first <= path.name <= last])
        expected = (end - start // segment * segment) // segment
        assert len(corpus.segments) == expected, f"{len(corpus.segments)} segments are there, not {expected}"
        return corpus
    except BaseException:
        server.stop()
        raise

