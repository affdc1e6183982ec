"""Downloads from a hub that this process serves: what is asked for, what is cached, and what fails in one line."""

import functools
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import jax
import pytest
from huggingface_hub import constants

from ruvjax.core.params import init
from ruvjax.errors import InputError
from ruvjax.io import hub
from ruvjax.io.hub import download, model_path
from ruvjax.io.huggingface import load_model, save_pretrained
from ruvjax.models.transformer import Transformer

TINY = Transformer(vocab_size=16, layers=1, width=8, heads=2, mlp_width=12, max_length=32)
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    """The three requests that a download makes, for the one model `org/tiny`; the server holds its files."""

    def log_message(self, *arguments):
        pass

    def answer(self, status, body, **headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        server = self.server
        path = unquote(urlsplit(self.path).path)
        server.seen.append((self.command, path, self.headers.get("Authorization")))
        if server.refuse:
            status, code = server.refuse
            return self.answer(status, b"{}", X_Error_Code=code, X_Error_Message="no")
        if path.startswith("/api/models/org/tiny/revision/main"):
            return self.answer(200, json.dumps({"id": "org/tiny", "sha": COMMIT, "siblings": []}).encode())
        if path.startswith("/api/models/org/tiny/revision/"):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if path.startswith("/api/models/org/tiny/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in server.files.items()
            ]
            return self.answer(200, json.dumps(entries).encode())
        name = path.removeprefix(f"/org/tiny/resolve/{COMMIT}/")
        if name in server.files:
            data = server.files[name]
            return self.answer(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=COMMIT)
        return self.answer(404, b"{}", X_Error_Code="RepoNotFound")

    do_HEAD = do_GET


@pytest.fixture
def server(tmp_path, monkeypatch):
    save_pretrained(tmp_path / "origin", TINY, init(TINY, jax.random.key(0)), eos_token_id=3)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as served:
        served.files = {path.name: path.read_bytes() for path in (tmp_path / "origin").iterdir()}
        served.files |= {"README.md": b"#", "original/params.json": b"{}", "consolidated.safetensors": b"twice"}
        served.files |= {"tokenizer.json": b"{}", "small-Q4_K.gguf": b"GGUF", "pytorch_model.bin": b"no"}
        served.seen, served.refuse = [], None
        threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
        local = functools.partial(
            huggingface_hub.snapshot_download, endpoint=f"http://127.0.0.1:{served.server_port}", etag_timeout=2
        )
        monkeypatch.setattr(hub, "snapshot_download", local)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield served
        served.shutdown()


def test_a_model_is_downloaded_once_and_then_taken_from_the_cache(server, tmp_path, monkeypatch, capfd):
    folder = download("org/tiny", token="hf_secret", cache=tmp_path / "elsewhere", progress=False)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert folder.is_relative_to(tmp_path / "elsewhere") and capfd.readouterr().err == ""
    assert {header for _, _, header in server.seen} == {"Bearer hf_secret"}
    assert load_model(folder)[2].eos_token_id == 3

    server.seen.clear()
    assert download("org/tiny", cache=tmp_path / "elsewhere", progress=False) == folder
    assert not any("resolve" in path for _, path, _ in server.seen)

    server.seen.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download("org/tiny", cache=tmp_path / "elsewhere", progress=False) == folder
    assert server.seen == []


def test_one_file_can_be_asked_for(server):
    path = download("org/tiny", file="small-Q4_K.gguf", progress=False)
    assert path.read_bytes() == b"GGUF" and [other.name for other in path.parent.iterdir()] == [path.name]
    with pytest.raises(InputError, match="has no file other.gguf"):
        download("org/tiny", file="other.gguf", progress=False)


def test_progress_is_shown_on_stderr(server, capfd):
    download("org/tiny")
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err != ""


@pytest.mark.parametrize(
    "refuse, model, message",
    [
        ((403, "GatedRepo"), "org/tiny", "org/tiny: this model is gated"),
        ((401, "RepoNotFound"), "org/tiny", "no such model on the hub"),
        ((500, "Broken"), "org/tiny", "cannot be reached"),
        (None, "org/other", "no such model on the hub"),
        (None, "org/tiny@v9", "org/tiny@v9: the model has no such revision"),
        (None, "org/two/three", "cannot be downloaded"),
    ],
)
def test_what_cannot_be_had_is_one_clear_line(refuse, model, message, server):
    server.refuse = refuse
    name, _, revision = model.partition("@")
    with pytest.raises(InputError, match=message) as caught:
        download(name, revision=revision or None, progress=False)
    assert "\n" not in caught.value.line() and "://" not in caught.value.line()


def test_offline_without_a_cached_model_says_so(server, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="cannot be reached"):
        model_path("org/tiny")
    assert server.seen == []


def test_a_snapshot_that_is_not_whole_does_not_serve_offline(server, monkeypatch):
    folder = download("org/tiny", progress=False)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="does not hold the whole model"):
        model_path("org/tiny")


def test_a_folder_that_is_there_is_never_looked_up(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert str(model_path("org/tiny")) == "org/tiny"
    for name in ("runs/a/b", "/absent", "absent", "../x/y", tmp_path / "org" / "absent"):
        with pytest.raises(InputError, match="no such folder or file"):
            model_path(name)
    assert server.seen == []
