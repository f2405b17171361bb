"""Sends photographs to ``serve.py``: ``python examples/load_test.py PHOTOS model.onnx dense.onnx``.

Serves one model after the other on this machine, and prints what requests waited for and how many a
second were answered. Who is refused, or loses its server, asks again: with ``--kill 2`` the server
is killed after 2 seconds and begun anew, and still each request has its one answer.
"""

import argparse
import http.client
import json
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

PATIENCE = 60  # seconds until a request or a start is given up
PAUSE = 0.05  # seconds before one asks again


class Server:
    """``serve.py`` in a process of its own."""

    def __init__(self, model, options):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        file = Path(__file__).with_name("serve.py")
        self.command = [sys.executable, str(file), str(model), "--port", str(self.port), *options]
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command)
        if self.ask("GET", "/health")[0] != 200:
            raise RuntimeError("the server is not healthy")

    def ask(self, method, path, body=None):
        """Status and body of the answer, after how many tries; those refused or lost try again."""
        tries, until = 0, time.monotonic() + PATIENCE
        while True:
            tries += 1
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
                connection.request(method, path, body)
                response = connection.getresponse()
                answer = response.status, response.read(), tries
                connection.close()
                if answer[0] not in (503, 504):
                    return answer
            except (OSError, http.client.HTTPException):
                pass
            if time.monotonic() > until or self.process.poll() not in (None, -9):
                raise RuntimeError(f"no answer to {method} {path}")
            time.sleep(PAUSE)

    def restart(self):
        self.process.kill()
        self.process.wait()
        self.start()


def load(server, photos, requests, clients, path, kill=None):
    """Sends so many requests; returns how they went, times in seconds.

    Args:
        server: a ``Server``.
        photos: bytes of image files, sent in turn.
        requests: how many.
        clients: how many ask at the same time.
        path: what is asked.
        kill: seconds after which the server is killed and begun anew; None for never.
    """

    def ask(i):
        began = time.monotonic()
        status, _, tries = server.ask("POST", path, photos[i % len(photos)])
        return time.monotonic() - began, status, tries

    killer = threading.Timer(kill or 0, server.restart)
    if kill is not None:
        killer.start()
    began = time.monotonic()
    with ThreadPoolExecutor(clients) as pool:
        waited, statuses, tries = zip(*pool.map(ask, range(requests)), strict=True)
    took = time.monotonic() - began
    if kill is not None:
        killer.join()
    return {
        "requests": requests,
        "clients": clients,
        "answered": statuses.count(200),
        "tried_again": sum(tries) - requests,
        "images_per_second": requests / took,
        "p50": float(np.percentile(waited, 50)),
        "p95": float(np.percentile(waited, 95)),
    }


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photos", type=Path, help="a folder of photographs")
    parser.add_argument("models", type=Path, nargs="+", help="ONNX files")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--clients", type=int, default=16, help="that ask at the same time")
    parser.add_argument("--compute", type=float, help="share of the dense compute to ask for")
    parser.add_argument("--kill", type=float, help="seconds until the server is killed")
    parser.add_argument("--out", type=Path, help="also write what is printed to this JSON file")
    args, options = parser.parse_known_args()  # those of serve.py
    photos = [file.read_bytes() for file in sorted(args.photos.iterdir()) if file.is_file()]
    path = "/classify" if args.compute is None else f"/classify?compute={args.compute}"
    records = []
    for model in args.models:
        server = Server(model, options)
        try:
            load(server, photos, args.clients, args.clients, path)  # warms up
            found = load(server, photos, args.requests, args.clients, path, args.kill)
            line = (
                "{answered} of {requests} answered, {tried_again} tried again: "
                "{images_per_second:.1f} images/s, p50 {p50:.3f} s, p95 {p95:.3f} s"
            ).format(**found)
            print(f"{model}: {line}", flush=True)
            records.append({"model": model.stem, **found})
        finally:
            server.process.terminate()
            server.process.wait()
    if args.out is not None:
        args.out.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
