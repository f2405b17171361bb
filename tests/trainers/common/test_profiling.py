import json
import re
import time

from torch.profiler import record_function

from prunevit.trainers.common.profiling import BEFORE, ITERATIONS, TRACE, WHOLE, profiled


def test_the_table_says_where_an_iteration_goes(tmp_path, capsys):
    with profiled(tmp_path) as after_iteration:
        for i in range(BEFORE + ITERATIONS + 1):
            with record_function(WHOLE):
                for _ in range(2):
                    with record_function("update"):
                        time.sleep(0.02 if i in (BEFORE, BEFORE + 1) else 0.2)
                time.sleep(0.01)
            after_iteration()
            assert (tmp_path / TRACE).exists() == (i + 1 >= BEFORE + ITERATIONS)
    said = capsys.readouterr().out
    rows = dict(re.findall(r"^([a-z ]+?) +([\d.]+) +[\d.]+%$", said, re.MULTILINE))
    assert list(rows) == ["update", "the rest", "iteration"]
    assert 40 <= float(rows["update"]) < 100
    assert 10 <= float(rows["the rest"]) < 70
    total = float(rows["update"]) + float(rows["the rest"])
    assert abs(float(rows["iteration"]) - total) < 0.2
    trace = json.loads((tmp_path / TRACE).read_text())
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("update") == 2 * ITERATIONS
