"""Every way to name a model, and the commands that only look."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_models import tiny_llama, tiny_qwen2

import secateur
from secateur.checkpoint.reader import open_checkpoint
from secateur.checkpoint.source import resolve_model
from secateur.errors import ModelError, OutputError


def test_a_hub_id_is_found_in_the_cache_offline(llama_folder, tmp_path, monkeypatch):
    (llama_folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# hi\n")
    hub = tmp_path / "hub"
    snapshot = hub / "models--org--tiny" / "snapshots" / "abc123"
    shutil.copytree(llama_folder, snapshot)
    (hub / "models--org--tiny" / "refs").mkdir()
    (hub / "models--org--tiny" / "refs" / "main").write_text("abc123")
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    source = resolve_model("org/tiny")
    assert (source.folder, source.hub_id, source.card["license"]) == (snapshot, "org/tiny", "apache-2.0")
    with pytest.raises(ModelError, match="not in the local cache"):
        resolve_model("org/other")


def test_a_file_that_is_not_gguf(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"nothing")
    with pytest.raises(ModelError, match="not a GGUF file"):
        resolve_model(str(tmp_path / "x.gguf"))


def test_a_truncated_gguf_is_one_sentence_and_leaves_no_folder(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x01" * 64)
    with pytest.raises(ModelError, match="cannot be read as GGUF"):
        resolve_model(str(tmp_path / "x.gguf"))
    assert not list((tmp_path / "cache").glob("models/*"))


def test_the_hash_is_of_the_contents_not_of_the_files(save):
    one = open_checkpoint(str(save(tiny_llama(), "one")))
    shards = open_checkpoint(str(save(tiny_llama(), "shards", max_shard_size="90KB")))
    other = open_checkpoint(str(save(tiny_llama(rms_norm_eps=1e-3), "other")))
    assert one.content_hash == shards.content_hash
    assert one.content_hash != other.content_hash


def test_a_bare_model_without_head_is_opened_when_tied(save):
    model = tiny_llama(tie_word_embeddings=True)
    folder = save(model, "full")
    model.model.save_pretrained(folder.parent / "bare")
    (folder.parent / "bare" / "config.json").write_text((folder / "config.json").read_text())
    bare, full = open_checkpoint(str(folder.parent / "bare")), open_checkpoint(str(folder))
    assert bare.content_hash == full.content_hash


def test_remote_code_runs_only_when_asked(llama_folder):
    config = json.loads((llama_folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}}
    (llama_folder / "config.json").write_text(json.dumps(config))
    (llama_folder / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ModelError, match=r"trust.remote.code"):
        open_checkpoint(str(llama_folder))


def test_inspect_shows_blocks_units_and_parameters(command, save):
    folder = save(tiny_qwen2())
    code, out, _ = command("inspect", folder, "--json")
    assert code == 0
    found = json.loads(out)
    assert found["blocks"] == 2
    assert {(u["kind"], u["count"], u["blocks"]) for u in found["units"]} == {
        ("head", 2, "0:2"),
        ("query", 8, "0:2"),
        ("channel", 96, "0:2"),
        ("hidden", 64, "all"),
        ("block", 2, "all"),
    }
    assert sum(found["parameters"].values()) == sum(p.numel() for p in tiny_qwen2().parameters())
    code, out, _ = command("inspect", folder)
    assert code == 0
    assert "head × 2" in out


def test_push_uses_the_hub_client_and_keeps_the_folder_when_it_fails(llama_folder, tmp_path, monkeypatch, same_process):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repository, exist_ok):
            calls.append(("create", repository, exist_ok))

        def upload_folder(self, repo_id, folder_path):
            calls.append(("upload", repo_id, folder_path))

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    options = dict(unit="weight", criterion="magnitude")
    secateur.prune(str(llama_folder), tmp_path / "out", push_to_hub="me/pruned", **options)
    assert calls == [("create", "me/pruned", True), ("upload", "me/pruned", tmp_path / "out")]

    def fail(self, repository, exist_ok):
        raise ConnectionError("no route")

    monkeypatch.setattr(Api, "create_repo", fail)
    with pytest.raises(OutputError, match=r"finished, but could not be pushed to me/pruned: no route"):
        secateur.prune(str(llama_folder), tmp_path / "out", push_to_hub="me/pruned", **options)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_help_is_fast_and_says_everything(command):
    code, out, _ = command("prune", "--help")
    assert code == 0
    for flag in (
        "--criterion",
        "--unit",
        "--ratio",
        "--within",
        "--calibration",
        "--propagate",
        "--blocks",
        "--reduce",
    ):
        assert flag in out
