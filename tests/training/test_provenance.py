import json
import subprocess

import jax

import ruvjax
from ruvjax.training import provenance
from ruvjax.training.provenance import collect_provenance, git_state


def git(root, *arguments):
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


def test_the_record_is_json_and_says_what_ran(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
    record = json.loads(json.dumps(collect_provenance({"seed": 7}, {"allocator": "glibc"})))
    assert record["seeds"] == {"seed": 7} and record["allocator"] == {"allocator": "glibc"}
    assert record["ruvjax"] == ruvjax.__version__
    assert record["packages"]["key"]["jax"] == record["packages"]["all"]["jax"] == jax.__version__
    assert record["jax"]["devices"] and record["jax"]["backend"] == jax.default_backend()
    assert record["environment"]["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=false"
    assert record["cpu"]["cores"] >= record["cpu"]["usable_cores"] >= 1
    assert collect_provenance({})["allocator"] is None


def test_no_secret_of_the_environment_is_kept(monkeypatch):
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "JAX_MY_TOKEN", "DATABASE_URL"):
        monkeypatch.setenv(name, "hunter2hunter2")
    assert "hunter2hunter2" not in json.dumps({**collect_provenance({}), "git": None})


def test_git_state_of_a_checkout(tmp_path):
    git(tmp_path, "init", "-b", "trunk")
    git(tmp_path, "remote", "add", "origin", "https://user:hunter2@example.org/x.git")
    (tmp_path / "a.txt").write_text("one\n")
    before = git_state(tmp_path)
    assert before["revision"] is None and before["dirty"] and before["untracked"] == ["a.txt"]
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    clean = git_state(tmp_path)
    assert len(clean["revision"]) == 40 and clean["branch"] == "trunk" and not clean["dirty"] and clean["diff"] == ""
    (tmp_path / "a.txt").write_bytes(b"two\n\xff\xfe\n")
    dirty = git_state(tmp_path)
    assert dirty["dirty"] and "+two" in dirty["diff"] and not dirty["diff_cut"]
    assert "hunter2" not in json.dumps(dirty)


def test_a_long_diff_is_cut_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance, "MAX_DIFF", 50)
    git(tmp_path, "init")
    (tmp_path / "a.txt").write_text("one\n")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "x")
    (tmp_path / "a.txt").write_text("two\n" * 100)
    state = git_state(tmp_path)
    assert len(state["diff"]) == 50 and state["diff_cut"]


def test_no_checkout_or_no_git_is_none(tmp_path, monkeypatch):
    assert git_state(tmp_path / "missing") is None
    git(tmp_path, "init")
    (tmp_path / "site-packages").mkdir()
    assert git_state(tmp_path / "site-packages") is None  # inside somebody else's checkout
    monkeypatch.setenv("PATH", "")
    assert git_state(tmp_path) is None
    assert collect_provenance({})["git"] is None
