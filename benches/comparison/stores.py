"""An S3 store on this machine, a client with nothing in its way, and a proxy that counts what others ask."""

import hashlib
import hmac
import http.client
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.parse

from ground import PINNED, ROOT, SERVER_CORE, directory, end, start, wait_until

PEERS = ROOT / "target/peers"
ACCESS_KEY, SECRET_KEY, REGION, BUCKET = "access", "bench-secret", "us-east-1", "bench"
# Checks conditions on PUT and on completion; writes files as they are, without fsync.
S3S_FS = ("s3s-fs", "s3s-fs", "0.14.1", ["--features", "binary"])
WAL_RUS = ("walrus", "wal-rus", "0.4.1", [])


def peer(program, crate, version, options):
    """Someone else's program: $PEERS/bin, or target/peers, to which it is installed where it is missing."""
    for place in (os.environ.get("PEERS"), PEERS):
        if place and (found := shutil.which(program, path=f"{place}/bin")):
            return found
    print(f"installing {crate} {version} (minutes)", file=sys.stderr, flush=True)
    subprocess.run(["cargo", "install", "--locked", crate, "--version", version, "--root", PEERS, *options], check=True)
    return PEERS / "bin" / program


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Store:
    """s3s-fs over a directory: what is stored lies in it under its key, to be looked at."""

    def __init__(self, scratch):
        # The service user must be able to run it, wherever it was installed.
        program = scratch / "s3s-fs"
        shutil.copy(peer(*S3S_FS), program)
        self.root, self.port = directory(scratch / "store"), free_port()
        self.bucket = directory(self.root / BUCKET)
        self.process = start(program, "--access-key", ACCESS_KEY, "--secret-key", SECRET_KEY, "--host", "127.0.0.1",
                             "--port", self.port, self.root, log=scratch / "store.log",
                             settle=(lambda: os.sched_setaffinity(0, SERVER_CORE)) if PINNED else None)
        wait_until("the store listens", self.listens)
        self.environment = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY, "AWS_REGION": REGION}

    def listens(self):
        with socket.socket() as trial:
            return trial.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def configuration(self, path, conninfo, prefix, endpoint=None, slot="seawall", more=""):
        """A configuration of Seawall that archives here."""
        path.write_text(
            f'[clusters.main]\npostgres = "{conninfo}"\nslot = "{slot}"\n{more}\n'
            f'[repositories.store]\nurl = "s3://{BUCKET}/{prefix}"\nendpoint = "{endpoint or self.endpoint}"\n'
            f'region = "{REGION}"\n', encoding="utf-8")
        path.chmod(0o644)
        return path

    def stop(self):
        end(self.process)


class Client:
    """One kept connection, requests signed with SigV4, nothing else: what a PUT costs at least."""

    def __init__(self, port):
        self.host = f"127.0.0.1:{port}"
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        self.connection.connect()
        self.connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def put(self, key, body):
        path = urllib.parse.quote(f"/{BUCKET}/{key}")
        self.connection.request("PUT", path, body, self.signed("PUT", path, body))
        answer = self.connection.getresponse()
        text = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"PUT {path}: {answer.status} {text[:300]}")

    def signed(self, method, path, body):
        now = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
        digest, scope = hashlib.sha256(body).hexdigest(), f"{now[:8]}/{REGION}/s3/aws4_request"
        headers = {"host": self.host, "x-amz-content-sha256": digest, "x-amz-date": now}
        names = ";".join(headers)
        request = "\n".join([method, path, "", *(f"{name}:{value}" for name, value in headers.items()), "", names, digest])
        to_sign = "\n".join(["AWS4-HMAC-SHA256", now, scope, hashlib.sha256(request.encode()).hexdigest()])
        key = f"AWS4{SECRET_KEY}".encode()
        for part in [*scope.split("/"), to_sign]:
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        credential = f"AWS4-HMAC-SHA256 Credential={ACCESS_KEY}/{scope}, SignedHeaders={names}, Signature={key.hex()}"
        return headers | {"authorization": credential}


class CountingProxy:
    """Hands bytes through and counts the requests in them: a witness that is neither tool nor store."""

    REQUEST = re.compile(rb"(GET|PUT|POST|HEAD|DELETE) /[^ ]* HTTP/1\.1\r\n")

    def __init__(self, port, delay=0):
        """`delay`: seconds each answer is held back, as a store at a distance would be."""
        self.target, self.delay, self.requests = port, delay, []
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.port}"

    def accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for one in (client, server):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            is_asked = threading.Event()
            threading.Thread(target=self.pump, args=(client, server, self.count, is_asked), daemon=True).start()
            threading.Thread(target=self.pump, args=(server, client, self.hold_back, is_asked), daemon=True).start()

    def count(self, data, is_asked):
        found = [(time.monotonic(), one[1].decode()) for one in self.REQUEST.finditer(data)]
        if found:
            self.requests += found
            is_asked.set()

    def hold_back(self, _, is_asked):
        if self.delay and is_asked.is_set():
            is_asked.clear()
            time.sleep(self.delay)

    def pump(self, source, target, look, is_asked):
        try:
            while data := source.recv(1 << 16):
                look(data, is_asked)
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def stop(self):
        self.listener.close()
