import json
import sys
import types
from pathlib import Path

import pytest

from ruvjax.data.sources import SPLITS, Document, HubSource, StdlibSource, TextSource, stdlib_group
from ruvjax.errors import ConfigError, InputError


@pytest.fixture(scope="module")
def stdlib():
    return StdlibSource().splits()


def names(splits: dict[str, list[Document]]) -> dict[str, set[str]]:
    return {split: {document.name for document in documents} for split, documents in splits.items()}


def assert_disjoint(splits):
    for key in (lambda document: document.name, lambda document: document.data):
        sets = [{key(document) for document in splits[split]} for split in SPLITS]
        assert sum(map(len, sets)) == len(set().union(*sets))


def test_stdlib_shares_and_disjointness(stdlib):
    sizes = {split: sum(len(document.data) for document in documents) for split, documents in stdlib.items()}
    for split in ("valid", "test"):
        assert 0.04 <= sizes[split] / sum(sizes.values()) <= 0.08, sizes
    assert_disjoint(stdlib)
    groups = [{stdlib_group(document.name) for document in stdlib[split]} for split in SPLITS]
    tops = [{document.name.split("/")[0].removesuffix(".py") for document in stdlib[split]} for split in SPLITS]
    for sets in (groups, tops):
        assert not sets[0] & sets[1] and not sets[0] & sets[2] and not sets[1] & sets[2]


def test_stdlib_leaves_out_tests_and_packages(stdlib):
    for name in set().union(*names(stdlib).values()):
        assert name.endswith(".py")
        assert not {"test", "tests", "site-packages", "dist-packages", "encodings"} & set(name.split("/")), name
    assert StdlibSource().documents("test") == stdlib["test"]


def test_stdlib_is_the_same_on_two_machines(tmp_path):
    """Neither the order of creation nor files that do not belong change anything."""
    files = {f"m{i}.py": f"x = {i}\n" for i in range(60)} | {
        f"p{i}/a{j}.py": f"y = {i, j}\n" for i in range(9) for j in (0, 1)
    }
    for root, order in (("one", 1), ("two", -1)):
        for name, text in list(files.items())[::order]:
            (tmp_path / root / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / root / name).write_text(text)
    other = tmp_path / "two"
    for name in ("site-packages/jax/a.py", "p1/tests/b.py", "test/c.py", "_sysconfigdata_x.py", "encodings/d.py"):
        (other / name).parent.mkdir(parents=True, exist_ok=True)
        (other / name).write_text(f"# {name}")
    (other / "p1/latin.py").write_bytes(b"# \xe9\n")
    (other / "p1/empty.py").write_bytes(b"")
    first, second = (StdlibSource(root=str(tmp_path / root)).splits() for root in ("one", "two"))
    assert first == second
    assert all(first.values())
    assert_disjoint(first)


def test_stdlib_without_packages_has_them_in_no_split(stdlib):
    source = StdlibSource(without=("json", "decimal"))
    left_out = source.packages()
    assert {document.name for document in left_out["json"]} >= {"json/decoder.py", "json/encoder.py"}
    assert "_pydecimal.py" in {document.name for document in left_out["decimal"]}
    gone = {document.name for documents in left_out.values() for document in documents}
    for split, documents in source.splits().items():
        assert {document.name for document in documents} == {document.name for document in stdlib[split]} - gone
    with pytest.raises(InputError, match="no package 'jsn'"):
        StdlibSource(without=("jsn",)).splits()


@pytest.mark.parametrize(
    ("name", "group"),
    [("email/mime/text.py", "email"), ("_pydecimal.py", "decimal"), ("_pyio.py", "io"), ("_py_abc.py", "abc"),
     ("__future__.py", "future__"), ("posixpath.py", "posixpath"), ("ntpath.py", "posixpath"), ("os.py", "os")],
)  # fmt: skip
def test_stdlib_group(name, group):
    assert stdlib_group(name) == group


def test_duplicates_are_kept_once(tmp_path):
    for i in range(80):
        (tmp_path / f"{i:02}.txt").write_text("the same\n" if i % 2 else f"text {i}\n")
    splits = TextSource(path=str(tmp_path), valid_share=0.2, test_share=0.2).splits()
    assert_disjoint(splits)
    assert sum(map(len, splits.values())) == 41


def test_stdlib_missing(tmp_path):
    with pytest.raises(InputError, match="no Python library source") as caught:
        StdlibSource(root=str(tmp_path)).splits()
    assert caught.value.hint


def test_text_folder_and_glob_agree(tmp_path):
    for i in range(60):
        (tmp_path / f"sub{i % 3}").mkdir(exist_ok=True)
        (tmp_path / f"sub{i % 3}" / f"{i}.txt").write_text(f"text {i}\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "blob").write_bytes(b"\0")
    folder = TextSource(path=str(tmp_path)).splits()
    assert folder == TextSource(path=str(tmp_path / "**" / "*.txt")).splits()
    assert_disjoint(folder)
    assert sum(map(len, folder.values())) == 60
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    assert TextSource(path=str(moved)).splits() == folder


def test_single_file_is_cut_at_line_ends(tmp_path):
    text = b"".join(b"line %d\n" % i for i in range(1000))
    (tmp_path / "book.txt").write_bytes(text)
    splits = TextSource(path=str(tmp_path / "book.txt"), valid_share=0.1, test_share=0.2).splits()
    parts = [splits[split][0].data for split in SPLITS]
    assert b"".join(parts) == text
    assert all(part.endswith(b"\n") and part.startswith(b"line ") for part in parts)
    assert [round(len(part) / len(text), 2) for part in parts] == [0.7, 0.1, 0.2]


def test_single_file_without_line_ends_is_cut_between_characters(tmp_path):
    text = "€" * 1000
    (tmp_path / "line").write_text(text, "utf-8")
    splits = TextSource(path=str(tmp_path / "line")).splits()
    assert "".join(splits[split][0].data.decode() for split in SPLITS) == text


def test_jsonl(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"body": f"answer {i}", "question": f"question {i}: "} for i in range(100)]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    splits = TextSource(path=str(path), field="body", valid_share=0.1, test_share=0.1).splits()
    assert sorted(d.data.decode() for documents in splits.values() for d in documents) == sorted(
        r["body"] for r in rows
    )
    assert_disjoint(splits)
    prompted = TextSource(path=str(path), field="body", prompt_field="question").documents("train")
    assert all(
        d.data[: d.prompt].startswith(b"question") and d.data[d.prompt :].startswith(b"answer") for d in prompted
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [('{"text": "a"', "line 2: not JSON"), ('["a"]', "line 2: list"), ('{"txt": "a"}', "line 2: no string in field"),
     ('{"text": 3}', "line 2: no string"), ('{"text": "\\ud800"}', "line 2: half of a surrogate")],
)  # fmt: skip
def test_malformed_jsonl_names_the_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(InputError, match=message) as caught:
        TextSource(path=str(path)).splits()
    assert caught.value.hint and str(path) in str(caught.value)


def test_unusable_text(tmp_path):
    def message(path) -> str:
        with pytest.raises(InputError) as caught:
            TextSource(path=str(path)).splits()
        assert caught.value.hint
        return str(caught.value)

    assert "does not exist" in message(tmp_path / "absent.txt")
    assert "does not exist" in message(tmp_path / "*.txt")
    assert "holds no file" in message(tmp_path)
    (tmp_path / "empty.txt").write_bytes(b"")
    assert "holds no text" in message(tmp_path / "empty.txt")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    assert "holds no text" in message(tmp_path / "empty.jsonl")
    (tmp_path / "image").write_bytes(b"\x89PNG\0\0")
    assert "binary" in message(tmp_path / "image")
    (tmp_path / "latin.txt").write_bytes("déjà".encode("latin-1"))
    assert "not UTF-8 (byte 0xe9 at offset 1)" in message(tmp_path / "latin.txt")
    (tmp_path / "tiny.txt").write_bytes(b"ab")
    assert "too small to split" in message(tmp_path / "tiny.txt")


def test_unreadable_file(tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("x")

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)  # the tests may run as root, whom no mode stops
    with pytest.raises(InputError, match="cannot be read: Permission denied"):
        TextSource(path=str(tmp_path / "secret.txt")).splits()


def test_one_empty_file_among_others_is_left_out(tmp_path):
    (tmp_path / "__init__.py").write_bytes(b"")
    (tmp_path / "code.py").write_text("x = 1\n" * 100)
    splits = TextSource(path=str(tmp_path)).splits()
    assert names(splits) == {split: {f"code.py#{split}"} for split in SPLITS}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TextSource(), "data.path is not set"),
        (lambda: TextSource(path=3), "path=3"),  # pyright: ignore[reportArgumentType]
        (lambda: TextSource(path="a", valid_share=0.5, test_share=0.5), "leave nothing to train on"),
        (lambda: StdlibSource(valid_share=0.0), "valid_share=0.0"),
        (lambda: StdlibSource(test_share="x"), "test_share='x'"),  # pyright: ignore[reportArgumentType]
        (lambda: HubSource(), "data.name is not set"),
        (lambda: HubSource(name="a/b", limit=-1), "limit=-1"),
        (lambda: StdlibSource().documents("training"), "split='training'"),
    ],
)
def test_bad_configuration(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert caught.value.hint


def test_hub_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        HubSource(name="a/b").splits()
    assert "ruvjax[hub]" in caught.value.hint


def fake_datasets(monkeypatch, load):
    module = types.ModuleType("datasets")
    module.load_dataset = load  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "datasets", module)


def test_hub_rows(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.delenv("HF_DATASETS_OFFLINE", raising=False)
    asked = []

    def load(name, subset, **options):
        asked.append((name, subset, options))
        return ({"text": f"row {i}"} for i in range(1000))

    fake_datasets(monkeypatch, load)
    source = HubSource(name="a/b", limit=200)
    splits = source.splits()
    assert asked == [("a/b", None, {"split": "train", "revision": None, "streaming": True})]
    assert sum(map(len, splits.values())) == 200
    assert_disjoint(splits)
    assert source.splits() == splits
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source.splits()
    assert asked[-1][2]["streaming"] is False
    with pytest.raises(InputError, match="no text in column 'body'"):
        HubSource(name="a/b", field="body").splits()


def test_hub_offline_and_absent(monkeypatch):
    def load(*arguments, **options):
        raise ConnectionError("offline mode is enabled")

    fake_datasets(monkeypatch, load)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="offline mode is enabled") as caught:
        HubSource(name="a/b").splits()
    assert "HF_HUB_OFFLINE" in caught.value.hint
