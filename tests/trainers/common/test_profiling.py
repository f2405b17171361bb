import json
from types import SimpleNamespace

from torch.profiler import ProfilerActivity, record_function

from prunevit.trainers.common.profiling import BEFORE, ITERATIONS, TRACE, WHOLE, profiled, table


def test_the_table_says_where_an_iteration_goes():
    microseconds = {"update": 90_000.0, "advantages": 6_000.0, WHOLE: 120_000.0, "aten::mm": 50.0}
    events = [
        SimpleNamespace(key=name, cpu_time_total=total * ITERATIONS, device_time_total=0.0)
        for name, total in microseconds.items()
    ]
    cpu = SimpleNamespace(key_averages=lambda: events, activities=[ProfilerActivity.CPU])
    _, *rows = table(cpu).splitlines()
    assert [row.split() for row in rows] == [
        ["advantages", "6.0", "5.0%"],
        ["update", "90.0", "75.0%"],
        ["the", "rest", "24.0", "20.0%"],
        ["iteration", "120.0", "100.0%"],
    ]


def test_some_iterations_are_traced_and_their_table_is_printed(tmp_path, capsys):
    with profiled(tmp_path) as after_iteration:
        for i in range(BEFORE + ITERATIONS + 1):
            with record_function(WHOLE):
                for _ in range(2):
                    with record_function("update"):
                        pass
            after_iteration()
            assert (tmp_path / TRACE).exists() == (i + 1 >= BEFORE + ITERATIONS)
    trace = json.loads((tmp_path / TRACE).read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("update") == 2 * ITERATIONS
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == ["where", "update", "the", "iteration", "trace:"]
