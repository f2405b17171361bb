"""Serves an exported model over HTTP: ``python examples/serve.py model.onnx``, of a graph exported
with ``--batch any``.

``POST /classify?compute=0.6`` takes the bytes of a photograph. ``GET /health`` and ``GET /metrics``
(in Prometheus' format) say how it goes. Images of a batch are padded to its longest, so those that
ask for about the same compute run together. The number of requests at work is bounded: further ones
are refused at once with 503. Each that is taken is answered, with 504 if that takes too long, and
on SIGTERM before the server ends.
"""

import argparse
import asyncio
import contextlib
import io
import json
import time
from collections import Counter
from dataclasses import dataclass

import numpy as np
import onnxruntime
import uvicorn
from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from serve_onnx import prepare

MOST_PIXELS = 50_000_000  # of a photograph


@dataclass(eq=False)
class Waiting:
    """A request in the queue."""

    image: np.ndarray
    alpha: float | None
    answer: asyncio.Future


class Batcher:
    """Runs waiting requests together: the oldest, and those that are the most like it.

    Args:
        session: the model.
        most: images a batch.
        queue: requests that may be at work at once.
    """

    def __init__(self, session, most, queue):
        self.session, self.most, self.queue = session, most, queue
        self.at_work = 0
        self.takes_alpha = "calibration" in metadata(session)
        self.waiting: list[Waiting] = []
        self.arrived = asyncio.Event()
        self.counts: Counter[str] = Counter()

    @contextlib.contextmanager
    def place(self):
        """Takes a place among the requests at work, if there is one."""
        if self.at_work >= self.queue:
            raise HTTPException(503, "too many requests at once", {"Retry-After": "1"})
        self.at_work += 1
        try:
            yield
        finally:
            self.at_work -= 1

    async def classify(self, image, alpha):
        """Logits [classes], and which patches survived each stage, bool [T, N]."""
        request = Waiting(image, alpha, asyncio.get_running_loop().create_future())
        self.waiting.append(request)
        self.arrived.set()
        return await request.answer

    async def run(self):
        """Answers requests until it is cancelled."""
        while True:
            await self.arrived.wait()
            self.waiting = [each for each in self.waiting if not each.answer.done()]
            if not self.waiting:
                self.arrived.clear()
                continue
            first = self.waiting[0].alpha or 1.0
            alike = sorted(self.waiting, key=lambda r: abs(np.log((r.alpha or 1.0) / first)))
            batch = alike[: self.most]
            self.waiting = [each for each in self.waiting if each not in batch]
            try:
                answers = await asyncio.to_thread(self._infer, batch)
            except Exception as error:
                for each in batch:
                    if not each.answer.done():
                        each.answer.set_exception(HTTPException(500, f"the model failed: {error}"))
                continue
            for each, answer in zip(batch, answers, strict=True):
                if not each.answer.done():
                    each.answer.set_result(answer)

    def _infer(self, batch):
        began = time.monotonic()
        feeds = {"image": np.concatenate([each.image for each in batch])}
        if self.takes_alpha:
            feeds["alpha"] = np.float32([each.alpha for each in batch])
        logits, keep = self.session.run(None, feeds)
        self.counts["batches"] += 1
        self.counts["images"] += len(batch)
        self.counts["patches_kept"] += int(keep[:, -1].sum())
        self.counts["model_seconds"] += time.monotonic() - began
        return list(zip(logits, keep, strict=True))


def metadata(session):
    """What the exporter wrote into the file besides the graph."""
    stored = session.get_modelmeta().custom_metadata_map
    return {name: json.loads(value) for name, value in stored.items()}


def alpha_for(compute, told):
    """The alpha that costs ``compute``, a share of the dense model's; None where it is fixed."""
    known = told.get("calibration")
    if known is None:
        if compute is not None:
            raise HTTPException(422, "this model's compute is fixed")
        return None
    shares = known["compute"][::-1]
    if compute is None:
        compute = told.get("compute", shares[-1])
    if not shares[0] <= compute <= shares[-1]:
        raise HTTPException(422, f"compute={compute}: choose from {shares[0]} to {shares[-1]}")
    return float(np.exp(np.interp(compute, shares, np.log(known["alpha"][::-1]))))


def make_app(session, most=8, queue=64, timeout=5.0, most_bytes=10_000_000):
    """The web application.

    Args:
        session: of onnxruntime.
        most: images a batch.
        queue: requests at work at once.
        timeout: seconds until a request is given up.
        most_bytes: size of a request.
    """
    told = metadata(session)

    @contextlib.asynccontextmanager
    async def lifespan(app):
        worker = asyncio.create_task(batcher.run())
        yield
        worker.cancel()

    app, batcher = FastAPI(lifespan=lifespan), Batcher(session, most, queue)

    @app.middleware("http")
    async def count(request: Request, call_next):
        response = await call_next(request)
        if request.url.path == "/classify":
            batcher.counts[f'requests_total{{status="{response.status_code}"}}'] += 1
        return response

    async def read(request):
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > most_bytes:
                raise HTTPException(413, f"more than {most_bytes} bytes")
        return body

    def decode(body):
        try:
            photo = Image.open(io.BytesIO(body))
            fits = photo.width * photo.height <= MOST_PIXELS
            image = prepare(photo, told["preprocessing"]) if fits else None
        except Exception as error:  # Pillow's plugins raise errors of any kind
            raise HTTPException(400, f"not an image: {error}") from None
        if image is None:
            raise HTTPException(413, f"more than {MOST_PIXELS} pixels")
        return image

    @app.post("/classify")
    async def classify(request: Request, compute: float | None = None):
        alpha = alpha_for(compute, told)
        try:
            with batcher.place():
                async with asyncio.timeout(timeout):  # slow senders included
                    image = await asyncio.to_thread(decode, await read(request))
                    logits, keep = await batcher.classify(image, alpha)
        except TimeoutError:
            raise HTTPException(504, f"no answer within {timeout} s") from None
        best = int(logits.argmax())
        chance = np.exp(logits - logits.max())
        return {
            "class": told["class_names"][best] if "class_names" in told else best,
            "probability": float(chance[best] / chance.sum()),
            "patches": keep.sum(1).tolist(),  # that survived each stage
        }

    @app.get("/health")
    async def health():
        return {"status": "ok", "at_work": batcher.at_work}

    @app.get("/metrics")
    async def metrics():
        values = {"at_work": batcher.at_work} | batcher.counts
        lines = [f"prunevit_{name} {value}\n" for name, value in values.items()]
        return Response("".join(lines), media_type="text/plain; version=0.0.4")

    return app


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", help="the ONNX file")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=0, help="of onnxruntime; 0 for its choice")
    parser.add_argument("--most", type=int, default=8, help="images a batch")
    parser.add_argument("--queue", type=int, default=64, help="requests at work at once")
    parser.add_argument("--timeout", type=float, default=5.0, help="seconds")
    args = parser.parse_args()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    try:
        session = onnxruntime.InferenceSession(args.model, options)
    except Exception as error:  # those of a missing file and of an old onnxruntime have no class
        parser.error(f"onnxruntime {onnxruntime.__version__} can't load {args.model}: {error}")
    if session.get_inputs()[0].shape[0] == 1:
        parser.error(f"{args.model} takes one image: export it with --batch any")
    app = make_app(session, args.most, args.queue, args.timeout)
    uvicorn.run(app, port=args.port, log_level="warning")


if __name__ == "__main__":
    main()
