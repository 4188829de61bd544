"""A large archive: what `window`, `gaps` and `expire` (its plan) take where there are a million segments.

The archive is made, not archived: directories of 256 segments of 16 MiB, their index objects merged as a finished directory's
are, and backups; segments are a few bytes each, which nobody reads. It is read as a directory, and as S3 by a small server
over the same files that counts what it is asked (it is no faster than Python: its times say little, its requests are exact).

Environment: DISK (/var/tmp): needs about 1.5 GB for a million, SEGMENTS (1000000), BACKUPS (500), DISTANCE_MS (0) of the server
"""

import http.server
import json
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from bisect import bisect_left, bisect_right
from datetime import datetime, timedelta, timezone
from pathlib import Path

from ground import DISK, MIB, SEAWALL, environment, print_verdicts, scratch_directory
from stores import ACCESS_KEY, BUCKET, REGION, SECRET_KEY, free_port

SEGMENTS = int(os.environ.get("SEGMENTS", "1000000"))
BACKUPS = int(os.environ.get("BACKUPS", "500"))
DISTANCE_MS = float(os.environ.get("DISTANCE_MS", "0"))
SECONDS_MAX, RSS_MIB_MAX = 10.0, 256
SEGMENT, PER_DIRECTORY, FIRST = 16 * MIB, 256, 1
SYSTEM_ID = "7432109876543210123"
# A segment a minute, up to now: so that what retention keeps is a part of it.
END = datetime.now(timezone.utc).replace(microsecond=0)
BODY = b"abc"


def lsn(position):
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:08X}"


def when(number):
    return (END - timedelta(minutes=FIRST + SEGMENTS - number)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def segment_name(number):
    return f"00000001{number // PER_DIRECTORY:08X}{number % PER_DIRECTORY:08X}"


def entry(number):
    """As `archiver` writes one, under a steady load of small transactions."""
    start, xid = number * SEGMENT, 700 + number * 40
    last, record_end = lsn(start + SEGMENT - 112), lsn(start + SEGMENT - 40)
    pending = {"lsn": record_end, "total": 72, "received": 40, "header": f"{number:048x}", "crc": number & 0xFFFFFFFF}
    carry = {"last_record": last, "record_end": record_end, "pending": pending, "timeline": 1, "magic": "D118"}
    drops = [{"xid": xid, "lsn": last, "time": when(number), "relations": [f"1663/5/{number}"]}] if number % 1000 == 0 else []
    return {
        "segment": segment_name(number), "start_lsn": lsn(start), "end_lsn": lsn(start + SEGMENT), "raw_bytes": SEGMENT,
        "raw_crc32": f"{number & 0xFFFFFFFF:08x}", "stored_bytes": len(BODY), "stored_crc32": "352441c2",
        "proof": "proven", "record_count": 150000, "last_record": last, "record_end": record_end,
        "min_commit_time": when(number - 1), "max_commit_time": when(number), "min_xid": xid, "max_xid": xid + 40,
        "last_commit": {"xid": xid + 40, "lsn": last, "time": when(number)}, "restore_points": [], "drops": drops,
        "truncations": [], "truncated": False, "carry": carry,
    }


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, separators=(",", ":")), encoding="utf-8")


def make(root):
    """The repository; its index objects' bytes."""
    lineage = root / "main" / SYSTEM_ID
    write(root / "repository.json", {"schema": 1, "format": 1, "created": when(0), "id": "00c0ffee"})
    write(lineage / "lineage.json", {
        "schema": 1, "system_id": SYSTEM_ID, "server_version": "18.1", "segment_size": SEGMENT, "created": when(0),
        "start_timeline": 1, "start_lsn": lsn(FIRST * SEGMENT), "slot": "seawall"})
    index_bytes, last = 0, FIRST + SEGMENTS
    for high in range(FIRST // PER_DIRECTORY, (last - 1) // PER_DIRECTORY + 1):
        numbers = range(max(FIRST, high * PER_DIRECTORY), min(last, (high + 1) * PER_DIRECTORY))
        directory = lineage / "wal" / f"00000001{high:08X}"
        index = directory / f"{segment_name(numbers[0])}-{segment_name(numbers[-1])}-0000000001.index.json"
        write(index, {"schema": 1, "segment_size": SEGMENT, "entries": [entry(number) for number in numbers]})
        index_bytes += index.stat().st_size
        # Links: a file each would take a block each.
        body = directory / f"{segment_name(numbers[0])}.zst"
        body.write_bytes(BODY)
        for number in numbers[1:]:
            os.link(body, directory / f"{segment_name(number)}.zst")
    for number in range(BACKUPS):
        make_backup(lineage, FIRST + 1 + number * max(1, (SEGMENTS - 10) // BACKUPS))
    return index_bytes


def make_backup(lineage, at):
    """A full one that starts in segment `at`."""
    began = datetime.fromisoformat(when(at)).replace(microsecond=0)
    name, start = began.strftime("%Y%m%dT%H%M%SZ") + "-full", at * SEGMENT + 40
    common = {"schema": 1, "id": name, "type": "full", "parent": None, "label": None, "version": "0.1.0",
              "started": began.strftime("%Y-%m-%dT%H:%M:%SZ"), "timeline": 1}
    begin = {"slot_restart_lsn": lsn(start), "lease": 1, "host": None}
    volume = {"tablespace": None, "number": 1, "form": "plain", "raw_bytes": 3, "raw_crc32": "00000001", "stored_bytes": 3,
              "stored_crc32": "352441c2", "manifest_files": 900}
    backup = {
        "finished": when(at + 5), "system_id": SYSTEM_ID, "server_version": "18.1", "segment_size": SEGMENT,
        "start_lsn": lsn(start), "stop_lsn": lsn(start + 4 * SEGMENT), "stop_time": when(at + 3), "data_checksums": True,
        "raw_bytes": 3, "stored_bytes": 3, "manifest": {"bytes": 3, "crc32": "00000001", "files": 900, "checksums": "CRC32C"},
        "tablespaces": [], "volumes": [volume]}
    directory = lineage / "backups" / name
    write(directory / "begin.json", common | begin)
    write(directory / "backup.json", common | backup)
    (directory / "base").mkdir()
    for object_name in ("base/0001.tar.zst", "backup_manifest"):
        (directory / object_name).write_bytes(BODY)


# --- S3 ---


class Answers(http.server.BaseHTTPRequestHandler):
    """GET, HEAD and ListObjectsV2 of the files below `root`; nothing is checked."""

    protocol_version = "HTTP/1.1"
    root, keys, counts, lock = None, [], {}, threading.Lock()

    def do_HEAD(self):
        self.answer_object("HEAD")

    def do_GET(self):
        if self.path == "/counts":
            with self.lock:
                body = json.dumps(self.counts, sort_keys=True).encode()
                self.counts.clear()
            return self.send(200, body)
        url = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(url.query, keep_blank_values=True))
        return self.answer_list(query) if "list-type" in query else self.answer_object("GET")

    def count(self, what):
        with self.lock:
            self.counts[what] = self.counts.get(what, 0) + 1
        if DISTANCE_MS:
            time.sleep(DISTANCE_MS / 1000)

    def answer_object(self, what):
        self.count(what)
        name = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).removeprefix(f"/{BUCKET}/")
        path = self.root / name
        if not path.is_file():
            return self.send(404, b"" if what == "HEAD" else b"<Error><Code>NoSuchKey</Code></Error>")
        content, headers = path.read_bytes(), {"ETag": '"e"'}
        size, status = len(content), 200
        if wanted := self.headers.get("Range"):
            first, last = (int(word) for word in wanted.removeprefix("bytes=").split("-"))
            content, status = content[first:last + 1], 206
            headers["Content-Range"] = f"bytes {first}-{last}/{size}"
        return self.send(status, content, headers, size=size if what == "HEAD" else None)

    def answer_list(self, query):
        self.count("LIST")
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        after = query.get("continuation-token") or query.get("start-after", "")
        keys, shown, truncated = self.keys, [], False
        at = max(bisect_left(keys, prefix), bisect_right(keys, after) if after else 0)
        while at < len(keys) and keys[at].startswith(prefix):
            cut = keys[at].find(delimiter, len(prefix)) if delimiter else -1
            if len(shown) == 1000:
                truncated = True
                break
            if cut >= 0:
                common = keys[at][:cut + 1]
                shown.append(f"<CommonPrefixes><Prefix>{common}</Prefix></CommonPrefixes>")
                last, at = common + "\U0010ffff", bisect_left(keys, common[:-1] + "0", at)
            else:
                size = (self.root / keys[at]).stat().st_size if not keys[at].endswith("0.zst") else len(BODY)
                shown.append(f"<Contents><Key>{keys[at]}</Key><Size>{size}</Size><ETag>\"e\"</ETag></Contents>")
                last, at = keys[at], at + 1
        more = f"<NextContinuationToken>{last}</NextContinuationToken>" if truncated else ""
        body = (f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{BUCKET}</Name><Prefix>{prefix}</Prefix>'
                f"<KeyCount>{len(shown)}</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>{str(truncated).lower()}</IsTruncated>"
                f"{more}{''.join(shown)}</ListBucketResult>")
        self.send(200, body.encode(), {"Content-Type": "application/xml"})

    def send(self, status, body, headers=None, size=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve(root, port):
    Answers.root = root
    Answers.keys = sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())
    http.server.ThreadingHTTPServer.request_queue_size = 128
    http.server.ThreadingHTTPServer(("127.0.0.1", port), Answers).serve_forever()


# --- Measuring ---


def peak_rss(pid):
    """Of this program alone: what a child's usage tells counts the parent it was forked from too."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def run(configuration, *verb, env=None):
    """(seconds, CPU seconds, peak memory, standard output)"""
    with open(configuration.parent / "answer", "w+b") as answer, open(configuration.parent / "words", "w+b") as words:
        began, peak = time.monotonic(), 0
        process = subprocess.Popen([SEAWALL, "--config", configuration, *verb], stdout=answer, stderr=words,
                                   stdin=subprocess.DEVNULL, env=environment(**env or {}))
        while True:
            try:
                peak = max(peak, peak_rss(process.pid))
            except OSError:
                pass
            pid, status, used = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            time.sleep(0.005)
        seconds = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        answer.seek(0)
        words.seek(0)
        if process.returncode not in (0, 1):
            raise RuntimeError(f"{verb}: exit {process.returncode}: {words.read().decode()[-2000:]}")
        return seconds, used.ru_utime + used.ru_stime, peak, answer.read().decode()


def check(verb, text):
    """The answer is the one that must come of this archive."""
    answer = json.loads(text)
    if verb == "window":
        intervals = answer["lineages"][0]["timelines"][0]["intervals"]
        found = (len(intervals), len(intervals[0]["backups"]), intervals[0]["to"]["lsn"])
        if found != (1, BACKUPS, lsn((FIRST + SEGMENTS) * SEGMENT)):
            raise RuntimeError(f"window: {found}")
    if verb == "gaps" and (answer["gaps"] or answer["lacks"]):
        raise RuntimeError(f"gaps: {text[:500]}")


def main():
    if not SEAWALL.exists():
        sys.exit(f"{SEAWALL} is not built")
    help_text = subprocess.run([SEAWALL, "--help"], capture_output=True, text=True, check=True).stdout
    verbs = [verb for verb in ("window", "gaps", "expire") if f" {verb} " in help_text]
    for missing in {"window", "gaps", "expire"} - set(verbs):
        print(f"{missing} skipped: this seawall has no such verb", file=sys.stderr)
    with scratch_directory(DISK, 2) as scratch:
        began = time.monotonic()
        repository = scratch / "repository"
        index_bytes = make(repository)
        print(f"{SEGMENTS} segments, {BACKUPS} backups, {index_bytes / MIB:.0f} MiB of index; made in "
              f"{time.monotonic() - began:.0f} s")
        retention = '[clusters.main.retention]\nwindow = "14d"\n' if "expire" in verbs else ""
        local, remote = scratch / "local.toml", scratch / "remote.toml"
        cluster = f'[clusters.main]\npostgres = "host=127.0.0.1 user=x"\nslot = "seawall"\n{retention}'
        local.write_text(f'{cluster}[repositories.here]\nurl = "file://{repository}"\n', encoding="utf-8")
        port = free_port()
        remote.write_text(f'{cluster}[repositories.there]\nurl = "s3://{BUCKET}"\nregion = "{REGION}"\n'
                          f'endpoint = "http://127.0.0.1:{port}"\npath_style = true\n', encoding="utf-8")
        rows = []
        for verb in verbs:
            seconds, cpu, rss, text = min(run(local, verb, "--json") for _ in range(2))
            check(verb, text)
            rows.append((f"{verb}, a directory: seconds", f"{seconds:.2f} (CPU {cpu:.2f})", seconds, SECONDS_MAX))
            rows.append((f"{verb}, a directory: peak memory, MiB", f"{rss / MIB:.0f}", rss / MIB, RSS_MIB_MAX))
        server = multiprocessing.Process(target=serve, args=(repository, port), daemon=True)
        server.start()
        wait_for(port)
        keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
        for verb in verbs:
            seconds, cpu, rss, text = run(remote, verb, "--json", env=keys)
            check(verb, text)
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/counts", timeout=60) as answer:
                asked = ", ".join(f"{number} {what}" for what, number in json.load(answer).items())
            rows.append((f"{verb}, S3: requests", asked, 0, None))
            rows.append((f"{verb}, S3 ({DISTANCE_MS:g} ms): seconds", f"{seconds:.2f} (CPU {cpu:.2f})", seconds, None))
            rows.append((f"{verb}, S3: peak memory, MiB", f"{rss / MIB:.0f}", rss / MIB, RSS_MIB_MAX))
        server.terminate()
        missed = print_verdicts("A large archive", rows)
        shutil.rmtree(repository)
    return missed


def wait_for(port):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        with socket.socket() as trial:
            if trial.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    sys.exit("the server does not listen")
