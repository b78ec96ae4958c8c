import pytest
import torch
from tiny import as_flags

import common

# tiny tensors: a second thread costs more than it brings, and much more beside another process
torch.set_num_threads(1)


@pytest.fixture
def ended(monkeypatch, capfd):
    """A script as the shell sees it: ended(script, *flags, **named) -> (exit code, out, err)."""

    def run(script, *flags, **named):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *as_flags(flags, named)])
        capfd.readouterr()
        code = 0
        try:
            common.entry(script.main)
        except SystemExit as stop:
            code = stop.code
        return code, *capfd.readouterr()

    return run
