import pytest


@pytest.fixture
def refusal(capsys):
    """``refusal(main, arguments)``: what a command says that ends at once."""

    def run(main, *arguments):
        with pytest.raises(SystemExit) as ended:
            main(*arguments)
        assert ended.value.code != 0
        said = f"{ended.value.code} {capsys.readouterr().err}"
        return " ".join(said.replace("│", " ").split())

    return run
