"""What tests of several trainers share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def run_once(tmp_path_factory):
    """``run_once(train, config)``: the folder of that run, which is made once in a module, and not
    to be changed.
    """
    folders = {}

    def finish(train, config):
        if repr(config) not in folders:
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(tmp_path_factory.mktemp("whole"))
                train(config)
                folders[repr(config)] = Path("runs", config.run_name).absolute()
        return folders[repr(config)]

    return finish
