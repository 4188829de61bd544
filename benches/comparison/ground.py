"""The ground every comparison stands on: who runs what, a PostgreSQL server, what a process used."""

import contextlib
import mmap
import os
import pwd
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SIZE_GIB = float(os.environ.get("SIZE_GIB", "3"))
PAIRS = int(os.environ.get("PAIRS", "5"))
SCRATCH = Path(os.environ.get("SCRATCH", "/dev/shm"))
SEAWALL = Path(os.environ.get("SEAWALL", ROOT / "target/release/seawall"))
DISK = Path(os.environ.get("DISK", "/var/tmp"))
SERVERS = Path(os.environ.get("SEAWALL_SERVERS", ROOT / "target/servers"))

GIB, MIB = 1 << 30, 1 << 20
SERVER_CORE, TOOL_CORE = {0}, {1}
# CPU is compared with one core for the tool and one for the rest; wall time with both free for both, as in real use.
PINNED = {0, 1} <= os.sched_getaffinity(0) and os.environ.get("PIN", "1") != "0"
DISTURBED = 0.10  # of a run's wall time: more foreign work or steal on the tool's core spoils it
RETRIES = int(os.environ.get("RETRIES", "1"))  # of a disturbed run; then it counts, with a mark
RUN_SECONDS_MAX = 900
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")



# --- Processes ---


def service_user():
    """Who the server and the tools run as: PostgreSQL refuses to be root."""
    if os.getuid() != 0:
        return None
    for name in ("postgres", "seawall-test"):
        try:
            return pwd.getpwnam(name)
        except KeyError:
            pass
    sys.exit("no user for the server: run tests/servers/install")


USER = service_user()
IDENTITY = {"user": USER.pw_uid, "group": USER.pw_gid, "extra_groups": []} if USER else {}


def environment(**more):
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "SEAWALL", "RUST_LOG"))}
    # A base backup by itself is no part of what is compared here.
    kept["SEAWALL__CLUSTERS__MAIN__BACKUP__AUTOMATIC"] = "false"
    return kept | {"LC_ALL": "C", "TZ": "UTC"} | more


def call(*command, env=None, **options):
    """Runs as the service user, to success; its standard output."""
    done = subprocess.run([str(word) for word in command], cwd="/", env=environment(**env or {}), stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **IDENTITY, **options)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {done.returncode}\n{done.stderr}")
    return done.stdout.strip()


def start(*command, log, env=None, settle=None):
    """Begins as the service user; its words go to a file."""
    with open(log, "ab") as log_file:
        return subprocess.Popen([str(word) for word in command], cwd="/", env=environment(**env or {}), preexec_fn=settle,
                                stdin=subprocess.DEVNULL, stdout=log_file, stderr=log_file, **IDENTITY)


def end(process, by=signal.SIGTERM, seconds=30):
    """Its exit code."""
    if process.poll() is None:
        process.send_signal(by)
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    return process.returncode


def wait_until(what, is_so, seconds=60, every=0.05):
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{what}: not within {seconds} s")
        time.sleep(every)


@contextlib.contextmanager
def scratch_directory(where, gib):
    """Gone at the end, also by SIGTERM."""
    free = shutil.disk_usage(where).free
    if free < gib * GIB:
        sys.exit(f"{where} has {free / GIB:.1f} GiB free, {gib:.1f} are needed")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="swcmp", dir=where) as scratch:
        scratch = Path(scratch)
        scratch.chmod(0o755)
        yield scratch


def directory(path):
    path.mkdir()
    if USER:
        os.chown(path, USER.pw_uid, USER.pw_gid)
    return path


# --- The server ---


class Server:
    """The distribution's PostgreSQL: its tools have lz4 and gzip, and every installation can repeat the run."""

    CATCH_UP = "fsync = off\nmax_wal_size = 1TB\nsynchronous_commit = off\n"

    def __init__(self, scratch, settings=CATCH_UP):
        found = [SERVERS / str(major) for major in range(18, 14, -1)]
        found = [one for one in found if os.access(one / "bin/pg_receivewal", os.X_OK) and self.has_lz4(one)]
        if not found:
            sys.exit("no PostgreSQL 15 or later whose pg_receivewal has lz4: run tests/servers/install")
        self.bin = found[0].resolve() / "bin"
        self.scratch, self.data = scratch, scratch / "data"
        self.conninfo = f"host={scratch} port=5432 user=postgres dbname=postgres"
        call(self.bin / "initdb", "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "-N", "-D", self.data)
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write(
                f"listen_addresses = ''\nunix_socket_directories = '{scratch}'\nautovacuum = off\nshared_buffers = 256MB\n"
                f"checkpoint_timeout = 1d\nwal_level = replica\nmax_replication_slots = 20\n{settings}"
            )
        with open(scratch / "server.log", "wb") as log:
            self.process = subprocess.Popen([self.bin / "postgres", "-D", self.data], cwd="/", env=environment(),
                                            stdin=subprocess.DEVNULL, stdout=log, stderr=log, **IDENTITY)
        deadline = time.monotonic() + 60
        while subprocess.run([self.bin / "pg_isready", "-q", "-d", self.conninfo], check=False).returncode != 0:
            if self.process.poll() is not None or time.monotonic() > deadline:
                sys.exit("the server did not start:\n" + (scratch / "server.log").read_text())
            time.sleep(0.1)

    @staticmethod
    def has_lz4(installation):
        return "liblz4" in subprocess.run(["ldd", installation / "bin/pg_receivewal"], capture_output=True, text=True,
                                          check=False).stdout

    def sql(self, statement):
        return call(self.bin / "psql", "-XAtq", "-v", "ON_ERROR_STOP=1", "-d", self.conninfo, "-c", statement)

    def written(self):
        return lsn_bytes(self.sql("select pg_current_wal_insert_lsn()"))

    def pin(self):
        """The postmaster's children inherit where it runs: walsenders of later runs stay off the tool's core."""
        if PINNED:
            for pid in [self.process.pid, *children(self.process.pid)]:
                os.sched_setaffinity(pid, SERVER_CORE)

    def stop(self):
        self.process.send_signal(signal.SIGQUIT)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def lsn_bytes(text):
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def lsn_text(position):
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"


def children(parent):
    """The process ids directly below a process."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found


# --- Measuring ---


@dataclass
class Run:
    wall: float
    cpu: float
    walsender: float
    rss: int
    output: int
    is_disturbed: bool


def core_times():
    """Seconds (busy, stolen) of the tool's core since boot."""
    for line in Path("/proc/stat").read_text().splitlines():
        if line.startswith("cpu1 "):
            user, nice, system, _, _, irq, softirq, steal = [int(field) / CLOCK_TICKS for field in line.split()[1:9]]
            return user + nice + system + irq + softirq, steal
    return 0.0, 0.0


def cpu_of(pid):
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS
    except OSError:
        return None


def peak_rss(pid):
    """VmHWM, not the rusage of wait4: that one would count this Python, which the tool was forked from."""
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0
    except OSError:
        return 0


def walsender_of(server):
    for pid in children(server.process.pid):
        try:
            if b"walsender" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        except OSError:
            pass
    return None


def stored_bytes(place):
    """Without what a store keeps for itself beside the objects."""
    return sum(path.stat().st_size for path in place.rglob("*") if path.is_file() and not path.name.startswith("."))


def on_tool_core():
    if PINNED:
        os.sched_setaffinity(0, TOOL_CORE)


def measure(server, command, output, env=None, is_done=None):
    """One run of a tool that ends by itself, or is told to (SIGINT) once `is_done`."""
    busy, stolen = core_times()
    log = server.scratch / "tool.log"
    log.unlink(missing_ok=True)
    started, told = time.monotonic(), None
    tool = start(*command, log=log, env=env, settle=on_tool_core)
    rss, walsender, walsender_cpu, looks = 0, None, 0.0, 0
    while True:
        # Looked at before waiting, because nothing is left to look at afterwards.
        rss = max(rss, peak_rss(tool.pid))
        if walsender is None and looks % 10 == 0:
            walsender = walsender_of(server)
        if walsender is not None:
            walsender_cpu = cpu_of(walsender) or walsender_cpu
        pid, status, usage = os.wait4(tool.pid, os.WNOHANG)
        if pid:
            break
        looks += 1
        if is_done and told is None and looks % 5 == 0 and is_done():
            told = time.monotonic()
            tool.send_signal(signal.SIGINT)
        if time.monotonic() - started > RUN_SECONDS_MAX:
            tool.kill()
            os.wait4(tool.pid, 0)
            tool.returncode = -signal.SIGKILL
            raise RuntimeError(f"{command[0]} did not end:\n{log.read_text()}")
        time.sleep(0.01)
    # Of a tool that had to be told, how long it took to listen is not its work.
    wall = (told or time.monotonic()) - started
    tool.returncode = os.waitstatus_to_exitcode(status)
    if tool.returncode not in ((0,) if told is None else (0, 130, -signal.SIGINT)):
        raise RuntimeError(f"{' '.join(map(str, command))}: exit {tool.returncode}\n{log.read_text()[-4000:]}")
    busy_after, stolen_after = core_times()
    cpu = usage.ru_utime + usage.ru_stime
    foreign = max(0.0, busy_after - busy - cpu) + stolen_after - stolen
    stored = stored_bytes(output)
    return Run(wall, cpu, walsender_cpu, rss, stored, PINNED and foreign / wall > DISTURBED)


# --- Slots and what is stored ---


def drop_slot(server, slot):
    for _ in range(100):
        try:
            server.sql(f"select pg_drop_replication_slot('{slot}')")
            return
        except RuntimeError:
            time.sleep(0.1)  # its walsender is about to notice that the tool is gone
    raise RuntimeError(f"the slot {slot} stays in use")


def files_equal(one, other):
    with open(one, "rb") as left, open(other, "rb") as right:
        while True:
            a, b = left.read(MIB), right.read(MIB)
            if a != b:
                return False
            if not a:
                return True


def verify_stored(corpus, tool):
    """Every segment of the corpus is there, as zstd, and decodes to the server's own bytes."""

    def look(output):
        named = re.compile("[0-9A-F]{24}")
        stored = {path.stem: path for path in output.rglob("*") if path.suffix in (".zst", ".zstd") and named.fullmatch(path.stem)}
        decoded = corpus.server.scratch / "decoded"
        for path in corpus.segments:
            if path.name not in stored:
                raise RuntimeError(f"{tool} did not store {path.name}")
            with open(decoded, "wb") as out:
                subprocess.run(["zstd", "-dcq", stored[path.name]], stdout=out, check=True)
            if not files_equal(path, decoded):
                raise RuntimeError(f"{tool}'s {path.name} differs from the server's")
            decoded.unlink()
        print(f"  verified: {len(corpus.segments)} segments stored by {tool} decode to the server's bytes", file=sys.stderr)

    return look


# --- Reporting ---


def memcpy_rate():
    """MiB/s on the tool's core: lets reports of different machines be compared."""
    before = os.sched_getaffinity(0)
    if PINNED:
        os.sched_setaffinity(0, TOOL_CORE)
    source, target = mmap.mmap(-1, 16 * MIB), mmap.mmap(-1, 16 * MIB)
    source[:], best = b"x" * len(source), 0.0
    for _ in range(20):
        started = time.perf_counter()
        memoryview(target)[:] = memoryview(source)
        best = max(best, 16 / (time.perf_counter() - started))
    os.sched_setaffinity(0, before)
    return best


def spread(values, unit=""):
    return f"{statistics.median(values):.2f}{unit} [{min(values):.2f} .. {max(values):.2f}]"


def usable_seawall(scratch):
    """A copy the service user can run, or None and why."""
    if not SEAWALL.exists():
        print(f"seawall rows skipped: {SEAWALL} is not built", file=sys.stderr)
        return None
    copy = scratch / "seawall"
    shutil.copy(SEAWALL, copy)
    copy.chmod(0o755)
    shown = subprocess.run([copy, "run", "--help"], capture_output=True, text=True, check=False, timeout=30)
    if "--until" not in shown.stdout:
        print("seawall rows skipped: it has no `run --until`", file=sys.stderr)
        return None
    return copy


def versions(seawall):
    for command in (["zstd", "--version"], *([[seawall, "--version"]] if seawall else [])):
        yield subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def print_verdicts(title, rows):
    """Rows of (what, how it is shown, value, bar: at most); the number missed."""
    print(f"\n{title}\n")
    print(f"| {'what':58} | {'found':30} | {'bar':>8} | verdict |")
    print(f"|{'-' * 60}|{'-' * 32}|{'-' * 9}:|---------|")
    missed = 0
    for what, found, value, bar in rows:
        verdict = "" if bar is None else "met" if value <= bar else "MISSED"
        missed += verdict == "MISSED"
        print(f"| {what:58} | {found:30} | {'' if bar is None else bar:>8} | {verdict:7} |")
    return missed
