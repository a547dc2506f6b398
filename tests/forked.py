"""Processes as good as fresh ones, without the seconds that Python takes to import torch and transformers.

A server of its own imports what ``plain_load.py`` needs and nothing of Secateur; every call is carried out by a fork of it, so that
none sees what another did. Run as a script, this file is the server.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class ForkServer:
    """Runs scripts as ``subprocess.run`` would."""

    def __init__(self) -> None:
        command = [sys.executable, "-P", __file__]
        self._server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(
        self, command: Sequence[str], *, cwd: str, env: Mapping[str, str], **_: Any
    ) -> subprocess.CompletedProcess[str]:
        """Carry out ``python -P SCRIPT WORDS ...``; what it writes to stderr is returned."""
        errors = Path(cwd) / "stderr.txt"
        call = {"words": list(command[2:]), "cwd": cwd, "env": dict(env), "errors": str(errors)}
        stdin, stdout = self._server.stdin, self._server.stdout
        assert stdin is not None
        assert stdout is not None
        print(json.dumps(call), file=stdin, flush=True)
        status = int(stdout.readline())
        return subprocess.CompletedProcess(command, status, "", errors.read_text())

    def stop(self) -> None:
        self._server.communicate()


def main() -> None:
    import accelerate  # noqa: F401 - what the script imports when it has to
    import torch
    import transformers.dynamic_module_utils
    import transformers.modeling_utils
    import transformers.models.auto.modeling_auto

    assert not [name for name in sys.modules if name.startswith("secateur")]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # pytest's; it closes our input when it ends
    for line in sys.stdin:
        call = json.loads(line)
        child = os.fork()
        if child == 0:
            _carry_out(call, torch, transformers)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _carry_out(call: dict[str, Any], torch: Any, transformers: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    stderr = os.open(call["errors"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stderr, 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.chdir(call["cwd"])
    os.environ.clear()
    os.environ.update(call["env"])
    # Read when they were imported, as a fresh process would read them now.
    for module in (transformers.utils.hub, transformers.utils, transformers.dynamic_module_utils):
        module.HF_MODULES_CACHE = call["env"]["HF_MODULES_CACHE"]
    torch.set_num_threads(int(call["env"]["OMP_NUM_THREADS"]))
    sys.argv = call["words"]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        status = 1
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
