"""The examples that serve an exported model: timm's preparation, batches, bounds, nothing lost."""

import importlib.util
import io
import json
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from timm.data import create_transform

EXAMPLES = Path(__file__).parents[1] / "examples"
PREPROCESSING = {
    "input_size": [3, 32, 32],
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.4],
    "interpolation": "bicubic",
    "crop_pct": 0.9,
    "crop_mode": "center",
}
METADATA = {
    "preprocessing": json.dumps(PREPROCESSING),
    "class_names": json.dumps(["dark", "bright"]),
    "calibration": json.dumps({"alpha": [0.1, 1.0], "compute": [0.8, 0.4]}),
}
pytestmark = [
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="needs the checkout"),
    pytest.mark.integration("serve"),
]


@pytest.fixture(scope="module", autouse=True)
def examples_are_found():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield
    sys.modules.pop("serve_onnx", None)


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def serve():
    return load("serve")


def photo(level=200, size=(50, 40)):
    noise = np.random.RandomState(level).randint(level - 50, level + 50, (*size, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def png(**kwargs):
    file = io.BytesIO()
    photo(**kwargs).save(file, "png")
    return file.getvalue()


@pytest.mark.parametrize("size", [(50, 40), (33, 71)])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"crop_mode": "squash", "interpolation": "bilinear"},
        {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.3], "crop_pct": 1.0},
    ],
)
def test_the_example_prepares_photographs_as_timm_does(serve, size, change):
    how = PREPROCESSING | change
    grey = how["input_size"][0] == 1
    expected = create_transform(**how)(photo(size=size).convert("L" if grey else "RGB"))
    found = serve.prepare(photo(size=size), how)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-5)


class Session:
    """As of onnxruntime: the brightest channel's mean decides; it can be made to wait."""

    def __init__(self):
        self.batches, self.may_run = [], threading.Event()
        self.may_run.set()

    def get_modelmeta(self):
        return SimpleNamespace(custom_metadata_map=METADATA)

    def run(self, names, feeds):
        self.batches.append([round(float(alpha), 3) for alpha in feeds["alpha"]])
        assert self.may_run.wait(30)
        means = feeds["image"].mean((1, 2, 3))
        if (means > 100).any():
            raise RuntimeError("broken")
        return np.stack([-means, means], 1), np.ones((len(means), 2, 4), bool)


@pytest.fixture
def server(serve):
    """``server(**settings)``: an application on a port, and its session."""
    import uvicorn

    stops = []

    def start(**settings):
        session = Session()
        app = serve.make_app(session, **settings)
        running = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        thread = threading.Thread(target=running.run)
        thread.start()
        while not running.started:
            time.sleep(0.01)
        port = running.servers[0].sockets[0].getsockname()[1]
        stops.append((session, running, thread))

        def ask(path, body=None):
            connection = HTTPConnection("127.0.0.1", port, timeout=30)
            connection.request("GET" if body is None else "POST", path, body)
            response = connection.getresponse()
            answer = response.status, response.read().decode()
            connection.close()
            return answer

        return SimpleNamespace(ask=ask, session=session, running=running, thread=thread)

    yield start
    for session, running, thread in stops:
        session.may_run.set()
        running.should_exit = True
        thread.join(30)


def until(condition):
    for _ in range(1_000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came true")


def at_work(app):
    return json.loads(app.ask("/health")[1])["at_work"]


def test_photographs_are_classified_at_the_compute_asked_for(server):
    app = server()
    status, answer = app.ask("/classify?compute=0.4", png(level=200))
    assert status == 200
    answer = json.loads(answer)
    assert answer["class"] == "bright"
    assert 0.5 < answer["probability"] <= 1
    assert answer["patches"] == [4, 4]
    assert json.loads(app.ask("/classify", png(level=50))[1])["class"] == "dark"
    app.ask("/classify?compute=0.6", png())
    # by default what costs the most; between two alphas their logarithms are interpolated
    assert app.session.batches == [[1.0], [0.1], [0.316]]
    metrics = app.ask("/metrics")[1].splitlines()
    assert 'prunevit_requests_total{status="200"} 3' in metrics
    assert "prunevit_images 3" in metrics
    assert "prunevit_patches_kept 12" in metrics


def test_what_cannot_be_classified_is_refused(server, serve, monkeypatch):
    app = server(most_bytes=100_000)
    assert app.ask("/classify", b"no image")[0] == 400
    assert app.ask("/classify", bytes(100_001)) == (413, '{"detail":"more than 100000 bytes"}')
    assert app.ask("/classify?compute=0.9", png())[0] == 422
    monkeypatch.setattr(serve, "MOST_PIXELS", 10)
    assert app.ask("/classify", png()) == (413, '{"detail":"more than 10 pixels"}')
    assert app.session.batches == []
    assert at_work(app) == 0


def test_those_that_ask_for_like_compute_run_together(server):
    app = server(most=2)
    app.session.may_run.clear()
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(app.ask, "/classify", png())]
        until(lambda: app.session.batches)  # the model is at work
        for i, compute in enumerate((0.4, 0.8, 0.79, 0.41)):
            answers.append(pool.submit(app.ask, f"/classify?compute={compute}", png()))
            until(lambda i=i: at_work(app) == i + 2)
            time.sleep(0.1)  # it has been decoded
        app.session.may_run.set()
        assert [answer.result()[0] for answer in answers] == [200] * 5
    assert app.session.batches[1:] == [[1.0, 0.944], [0.1, 0.106]]


def test_a_full_server_refuses_at_once_and_answers_all_others(server):
    app = server(most=2, queue=4)
    app.session.may_run.clear()
    with ThreadPoolExecutor(4) as pool:
        taken = [pool.submit(app.ask, "/classify", png()) for _ in range(4)]
        until(lambda: at_work(app) == 4)
        began = time.monotonic()
        assert app.ask("/classify", png()) == (503, '{"detail":"too many requests at once"}')
        assert time.monotonic() - began < 5
        app.session.may_run.set()
        assert [answer.result()[0] for answer in taken] == [200] * 4
    assert at_work(app) == 0
    assert app.ask("/classify", png())[0] == 200


def test_who_waits_for_too_long_is_told_and_forgotten(server):
    app = server(most=1, timeout=0.5)
    app.session.may_run.clear()
    with ThreadPoolExecutor(2) as pool:
        taken = [pool.submit(app.ask, "/classify", png()) for _ in range(2)]
        expected = (504, '{"detail":"no answer within 0.5 s"}')
        assert [answer.result() for answer in taken] == [expected] * 2
    app.session.may_run.set()
    until(lambda: at_work(app) == 0)
    assert len(app.session.batches) == 1  # the other one was not run in vain
    assert app.ask("/classify", png())[0] == 200


def test_a_model_that_fails_ends_its_batch_alone(server, serve, monkeypatch):
    app = server()
    prepare = serve.prepare
    monkeypatch.setattr(serve, "prepare", lambda photo, how: prepare(photo, how) + 1_000)
    assert app.ask("/classify", png()) == (500, '{"detail":"the model failed: broken"}')
    monkeypatch.setattr(serve, "prepare", prepare)
    assert app.ask("/classify", png())[0] == 200


def test_a_server_that_ends_answers_what_it_took(server):
    app = server(most=1)
    app.session.may_run.clear()
    with ThreadPoolExecutor(3) as pool:
        taken = [pool.submit(app.ask, "/classify", png()) for _ in range(3)]
        until(lambda: at_work(app) == 3)
        app.running.should_exit = True  # as on SIGTERM
        time.sleep(0.2)
        app.session.may_run.set()
        assert [answer.result()[0] for answer in taken] == [200] * 3
    app.thread.join(30)
    assert not app.thread.is_alive()


@pytest.fixture(scope="module")
def onnx_file(tmp_path_factory):
    """A graph that keeps no patch of a dark photograph and all of a bright one."""
    onnx = pytest.importorskip("onnx")
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("ReduceMean", ["image", "axes"], ["mean"], keepdims=0),
        helper.make_node("Concat", ["low", "high"], ["logits"], axis=1),
        helper.make_node("Unsqueeze", ["mean", "last"], ["high"]),
        helper.make_node("Neg", ["high"], ["low"]),
        helper.make_node("Greater", ["wide", "zero"], ["keep"]),
        helper.make_node("Expand", ["column", "shape"], ["wide"]),
        helper.make_node("Unsqueeze", ["high", "last"], ["column"]),
    ]
    nodes = [nodes[i] for i in (0, 2, 3, 1, 6, 5, 4)]
    integers = {"axes": [1, 2, 3], "last": [-1], "shape": [1, 2, 4]}
    constants = [
        helper.make_tensor(name, TensorProto.INT64, [len(values)], values)
        for name, values in integers.items()
    ]
    constants.append(helper.make_tensor("zero", TensorProto.FLOAT, [1], [0.0]))
    graph = helper.make_graph(
        nodes,
        "brightness",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["images", 3, 32, 32])],
        [
            helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["images", 2]),
            helper.make_tensor_value_info("keep", TensorProto.BOOL, ["images", 2, 4]),
        ],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    helper.set_model_props(model, {key: METADATA[key] for key in ("preprocessing", "class_names")})
    file = tmp_path_factory.mktemp("served") / "model.onnx"
    onnx.save(model, file)
    return file


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for level in (60, 190):
        photo(level=level).save(folder / f"{level}.png")
    return folder


def test_the_short_example_runs(onnx_file, photos, monkeypatch, capsys):
    import runpy

    files = [str(photos / name) for name in ("190.png", "60.png")]
    monkeypatch.setattr(sys, "argv", ["serve_onnx.py", str(onnx_file), *files])
    monkeypatch.setitem(sys.modules, "torch", None)  # importing it would fail
    runpy.run_path(str(EXAMPLES / "serve_onnx.py"), run_name="__main__")
    assert capsys.readouterr().out == (
        f"{files[0]}: bright (4 of 4 patches kept)\n{files[1]}: dark (0 of 4 patches kept)\n"
    )


def test_what_onnxruntime_cannot_load_ends_in_one_line(serve, tmp_path, monkeypatch, capsys):
    (tmp_path / "model.onnx").write_bytes(b"no model")
    monkeypatch.setattr(sys, "argv", ["serve.py", str(tmp_path / "model.onnx")])
    with pytest.raises(SystemExit):
        serve.main()
    (line,) = [each for each in capsys.readouterr().err.splitlines() if "error: " in each]
    assert f"can't load {tmp_path / 'model.onnx'}: " in line


def test_nothing_is_lost_when_the_server_is_killed(onnx_file, photos, tmp_path, monkeypatch, capfd):
    test, out = load("load_test"), tmp_path / "serving.json"
    requests = ["--requests", "150", "--clients", "4", "--kill", "0.1", "--queue", "2"]
    command = ["load_test.py", str(photos), str(onnx_file), *requests, "--out", str(out)]
    monkeypatch.setattr(sys, "argv", command)
    test.main()
    said = capfd.readouterr().out
    assert said.startswith(f"{onnx_file}: 150 of 150 answered, ")
    tried_again = int(said.split(" answered, ")[1].split()[0])
    assert tried_again > 0
    (record,) = json.loads(out.read_text())
    assert record["answered"] == 150
    assert record["tried_again"] == tried_again
    assert 0 < record["p50"] <= record["p95"]
