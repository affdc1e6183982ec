"""Where documents come from, and which of them are for training, validation and test.

Every source has `.splits()` (all three at once) and `.documents(split)`. A split is a fixed function of names, never of
a random state, so two machines agree. Empty documents are left out, and an exact duplicate counts once, where its name
sorts first: no text is in two splits.
"""

import glob
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

from ruvjax.errors import ConfigError, InputError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Document:
    """One text: a name unique in its source, and UTF-8 bytes. The first `prompt` bytes are given, not learned."""

    name: str
    data: bytes
    prompt: int = 0


@runtime_checkable
class Source(Protocol):
    """What the sources below share."""

    def splits(self) -> dict[str, list[Document]]: ...

    def documents(self, split: str) -> list[Document]: ...


# Generated tables that repeat one another, help texts, copies of other modules, what an installation added.
_STDLIB_LEFT_OUT = {"encodings", "pydoc_data", "lib2to3", "sitecustomize", "usercustomize"}
_FOLDERS_LEFT_OUT = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
# Modules with long passages in common stay together; `_pydecimal` and the like follow the module they implement.
_STDLIB_FAMILY = {
    "aifc": "wave",
    "sunau": "wave",
    "chunk": "wave",
    "lzma": "bz2",
    "cProfile": "profile",
    "ntpath": "posixpath",
    "asynchat": "asyncore",
    "weakrefset": "weakref",
}
# Picked by the byte shares alone: 5 to 7% each for test and validation, 12 packages or more, on 3.11, 3.12 and 3.13.
_STDLIB_SALT = "864:"


@dataclass(frozen=True)
class StdlibSource:
    """The library source of the running interpreter, split by top-level package, so no package is in two splits.

    Every UTF-8 `.py` file of the standard library but tests, installed packages and a few generated or copied packages
    (`encodings`, `pydoc_data`, `lib2to3`, `_sysconfigdata*`, `config-*`). `valid_share` and `test_share` are shares of
    the package names; at the defaults each split also holds 5 to 7% of the bytes. `root` names another library folder,
    `without` packages that are in no split.

    Raises ConfigError for shares that do not fit, InputError where the interpreter has no library source on disk, or
    none of a package that is named.
    """

    valid_share: float = 0.06
    test_share: float = 0.06
    root: str = ""
    without: tuple[str, ...] = ()

    def __post_init__(self):
        _check_shares(self.valid_share, self.test_share)
        _check_type("root", self.root, str)

    def splits(self) -> dict[str, list[Document]]:
        root = Path(self.root or sysconfig.get_path("stdlib"))
        splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
        for document in self._documents(root):
            if stdlib_group(document.name) in self.without:
                continue
            share = _hash_share(_STDLIB_SALT + stdlib_group(document.name))
            splits[_split_of(share, self.valid_share, self.test_share)].append(document)
        if not any(splits.values()):
            raise InputError(
                f"no Python library source under {str(root)!r}",
                "this interpreter keeps its library elsewhere (a zip file?); use the text source with data.path=FOLDER",
            )
        return splits

    def documents(self, split: str) -> list[Document]:
        return _pick(self.splits(), split)

    def packages(self) -> dict[str, list[Document]]:
        """The documents of each package of `without`."""
        found: dict[str, list[Document]] = {name: [] for name in self.without}
        for document in self._documents(Path(self.root or sysconfig.get_path("stdlib"))):
            if (name := stdlib_group(document.name)) in found:
                found[name].append(document)
        return found

    def _documents(self, root: Path) -> list[Document]:
        documents = list(_unique(self._files(root)))
        groups = {stdlib_group(document.name) for document in documents}
        for name in self.without:
            if name not in groups:
                raise InputError(f"this interpreter's library has no package {name!r}", "leave it out of data.without")
        return documents

    def _files(self, root: Path) -> Iterator[Document]:
        paths: list[Path] = []
        for folder, folders, files in os.walk(root):
            folders[:] = [name for name in folders if name not in _FOLDERS_LEFT_OUT]
            paths += [Path(folder, name).relative_to(root) for name in files if name.endswith(".py")]
        for path in sorted(paths, key=Path.as_posix):
            top = path.parts[0].removesuffix(".py")
            if top in _STDLIB_LEFT_OUT or top.startswith(("_sysconfigdata", "config-")):
                continue
            try:
                data = (root / path).read_bytes()
                data.decode("utf-8")
            except (OSError, UnicodeDecodeError):
                continue  # a dangling link, or one of the few files in another encoding
            yield Document(path.as_posix(), data)


def stdlib_group(name: str) -> str:
    """The package that decides the split of library file `name`: email/utils.py -> email, _pyio.py -> io."""
    top = name.split("/")[0].removesuffix(".py")
    if top.startswith("_"):
        top = top.removeprefix("_py").lstrip("_") or top
    return _STDLIB_FAMILY.get(top, top)


@dataclass(frozen=True)
class TextSource:
    """Text files: `path` is a file, a folder (every file in it that is not hidden), a glob, or JSONL (a text per line).

    JSONL is known by its ending, .jsonl or .ndjson; `field` names the text, `prompt_field` (optional) a text put before
    it that is given and not learned. Names are relative to the folder, so a split does not depend on where it lies.

    A document goes to a split by the CRC-32 of its name. Where that would leave a split empty (a single file, a handful
    of them) each document is cut instead into three spans at line ends: the first part for training, then validation,
    then test, in the same shares; a document without line ends is cut between characters.

    Raises ConfigError for wrong fields; InputError for a path that is missing, unreadable, empty, binary (a NUL byte,
    or not UTF-8), or malformed JSONL (naming the line).
    """

    path: str = ""
    field: str = "text"
    prompt_field: str = ""
    valid_share: float = 0.05
    test_share: float = 0.05

    def __post_init__(self):
        for name in ("path", "field", "prompt_field"):
            _check_type(name, getattr(self, name), str)
        if not self.path:
            raise ConfigError("data.path is not set", "data.path=FILE, a folder, a glob in quotes, or a .jsonl file")
        _check_shares(self.valid_share, self.test_share)

    def splits(self) -> dict[str, list[Document]]:
        documents: list[Document] = []
        for name, path in _find(self.path):
            if path.suffix.lower() in (".jsonl", ".ndjson"):
                documents += _read_jsonl(name, path, self.field, self.prompt_field)
            else:
                documents.append(Document(name, _read_text(path)))
        return _split_documents(documents, self.valid_share, self.test_share, self.path)

    def documents(self, split: str) -> list[Document]:
        return _pick(self.splits(), split)


@dataclass(frozen=True)
class HubSource:
    """A dataset of the Hugging Face hub (extra `hub`): the strings of column `field` of one of its splits.

    Rows are split by the CRC-32 of their number. `limit` reads only the first so many rows (0 = all), as a stream.
    `HF_HUB_OFFLINE=1` and `HF_DATASETS_OFFLINE=1` are honoured: only what is in the local cache is then read.

    Raises ConfigError where the extra is missing or a field is wrong, InputError where the dataset cannot be had.
    """

    name: str = ""
    subset: str = ""
    split: str = "train"
    field: str = "text"
    revision: str = ""
    limit: int = 0
    valid_share: float = 0.05
    test_share: float = 0.05

    def __post_init__(self):
        for name in ("name", "subset", "split", "field", "revision"):
            _check_type(name, getattr(self, name), str)
        if not self.name:
            raise ConfigError("data.name is not set", "data.name=OWNER/DATASET")
        if not isinstance(self.limit, int) or isinstance(self.limit, bool) or self.limit < 0:
            raise ConfigError(f"limit={self.limit!r} is not a row count", "an integer of 0 (all rows) or more")
        _check_shares(self.valid_share, self.test_share)

    def splits(self) -> dict[str, list[Document]]:
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ConfigError(
                "the hub source needs the package `datasets`, which is not installed", "pip install 'ruvjax[hub]'"
            ) from error
        offline = any(os.environ.get(name, "0") not in ("", "0") for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"))
        try:
            rows = datasets.load_dataset(
                self.name,
                self.subset or None,
                split=self.split,
                revision=self.revision or None,
                # a stream is not cached, so offline the whole (cached) split is opened and its first rows taken
                streaming=self.limit > 0 and not offline,
            )
            documents: list[Document] = []
            for number, row in enumerate(rows):
                if self.limit and number >= self.limit:
                    break
                text = row.get(self.field)
                if not isinstance(text, str):
                    raise InputError(
                        f"dataset {self.name!r}, row {number}: no text in column {self.field!r}",
                        f"its columns are {', '.join(sorted(row))}; set data.field",
                    )
                documents.append(
                    Document(f"{self.name}:{number}", _encode(text, f"dataset {self.name!r}, row {number}"))
                )
        except InputError:
            raise
        except Exception as error:  # the library raises a dozen kinds, of its own and of its network stack
            where = (
                "HF_HUB_OFFLINE is set and it is not in the cache?" if offline else "check its name, subset and split"
            )
            raise InputError(f"dataset {self.name!r} could not be read: {error}", where) from error
        return _split_documents(documents, self.valid_share, self.test_share, self.name)

    def documents(self, split: str) -> list[Document]:
        return _pick(self.splits(), split)


def _pick(splits: dict[str, list[Document]], split: str) -> list[Document]:
    if split not in splits:
        raise ConfigError(f"split={split!r} is not known", f"one of {', '.join(SPLITS)}")
    return splits[split]


def _check_type(name: str, value: object, kind: type) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r} is not a {kind.__name__}", "quote it if the command line changed its type")


def _check_shares(valid: object, test: object) -> None:
    for name, value in (("valid_share", valid), ("test_share", test)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ConfigError(f"{name}={value!r} is not a share", "a number between 0 and 1, such as 0.05")
    if valid + test >= 1:  # pyright: ignore[reportOperatorIssue]
        raise ConfigError(
            f"valid_share={valid} and test_share={test} leave nothing to train on", "their sum is below 1"
        )


def _hash_share(name: str) -> float:
    return zlib.crc32(name.encode("utf-8", "surrogateescape")) / 2**32


def _split_of(share: float, valid_share: float, test_share: float) -> str:
    return "test" if share < test_share else "valid" if share < test_share + valid_share else "train"


def _unique(documents: Iterator[Document] | list[Document]) -> Iterator[Document]:
    """Drop empty documents and exact duplicates."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.data).digest()
        if document.data and digest not in seen:
            seen.add(digest)
            yield document


def _split_documents(
    documents: list[Document], valid_share: float, test_share: float, origin: str
) -> dict[str, list[Document]]:
    documents = list(_unique(documents))
    if not documents:
        raise InputError(f"{origin!r} holds no text", "every file or text in it is empty")
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        splits[_split_of(_hash_share(document.name), valid_share, test_share)].append(document)
    if all(splits.values()):
        return splits
    splits = split_within(documents, valid_share, test_share)
    if not all(splits.values()) or any(document.prompt for document in documents):  # half an answer is no example
        size = sum(len(document.data) for document in documents)
        raise InputError(
            f"{origin!r} is too small to split: {size} bytes in {len(documents)} document(s)",
            "training, validation and test each need some of it; add text or raise valid_share and test_share",
        )
    return splits


def split_within(documents: Iterable[Document], valid_share: float, test_share: float) -> dict[str, list[Document]]:
    """Every document cut into three spans at line ends: the first part for training, then validation, then test."""
    splits: dict[str, list[Document]] = {split: [] for split in SPLITS}
    for document in documents:
        for split, data in zip(SPLITS, _spans(document.data, valid_share, test_share)):
            if data:
                splits[split].append(Document(f"{document.name}#{split}", data))
    return splits


def _spans(data: bytes, valid_share: float, test_share: float) -> tuple[bytes, bytes, bytes]:
    """Cut `data` for train, valid and test at the first line end after each share (or between two characters)."""
    first = _cut(data, round(len(data) * (1 - valid_share - test_share)), round(len(data) * (1 - test_share)))
    second = _cut(data, max(first, round(len(data) * (1 - test_share))), len(data))
    return data[:first], data[first:second], data[second:]


def _cut(data: bytes, start: int, stop: int) -> int:
    newline = data.find(b"\n", start, stop - 1)
    if newline >= 0:
        return newline + 1
    while start < len(data) and data[start] & 0xC0 == 0x80:  # inside a UTF-8 character
        start += 1
    return start


def _find(path: str) -> list[tuple[str, Path]]:
    """(name, file) of everything `path` means, sorted by name."""
    root = Path(path).expanduser()
    try:
        if root.is_dir():
            os.scandir(root).close()  # rglob would pass over a folder it may not read
            files = [file for file in root.rglob("*") if file.is_file()]
            found = [(file.relative_to(root).as_posix(), file) for file in files]
            found = [(name, file) for name, file in found if not any(part.startswith(".") for part in name.split("/"))]
        elif root.exists():
            found = [(root.name, root)]
        else:
            matches = [Path(match) for match in glob.glob(str(root), recursive=True)]
            files = [file for file in matches if file.is_file()]
            if not files:
                raise InputError(
                    f"{path!r} does not exist and matches no file", "data.path is a file, a folder or a glob"
                )
            base = Path(os.path.commonpath([str(file.parent) for file in files]))
            found = [(file.relative_to(base).as_posix(), file) for file in files]
    except OSError as error:
        raise InputError(f"{path!r} cannot be read: {error.strerror or error}", "check its permissions") from error
    if not found:
        raise InputError(f"folder {path!r} holds no file", "hidden files and folders are left out")
    return sorted(found)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}", "check its permissions") from error


def _read_text(path: Path) -> bytes:
    data = _read(path)
    hint = "only UTF-8 text is read; pick the text files with a glob such as data.path='folder/**/*.txt'"
    if b"\0" in data:
        raise InputError(f"{str(path)!r} is a binary file (NUL byte at offset {data.index(0)})", hint)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is not UTF-8 (byte {data[error.start]:#04x} at offset {error.start})", hint
        ) from error
    return data


def _read_jsonl(name: str, path: Path, field: str, prompt_field: str) -> list[Document]:
    documents: list[Document] = []
    for number, line in enumerate(_read_text(path).split(b"\n"), start=1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error})", "one object per line") from error
        if not isinstance(row, dict):
            raise InputError(f"{where}: {type(row).__name__} where an object is expected", f'like {{"{field}": "..."}}')
        texts: list[bytes] = []
        for key in (prompt_field, field):
            if key and not isinstance(row.get(key), str):
                known = ", ".join(sorted(row)) or "none"
                raise InputError(f"{where}: no string in field {key!r}", f"its fields are {known}; set data.field")
            texts.append(_encode(row[key], where) if key else b"")
        if texts[1]:
            documents.append(Document(f"{name}:{number}", texts[0] + texts[1], len(texts[0])))
    if not documents:
        raise InputError(f"{str(path)!r} holds no text in field {field!r}", "every line of it is empty")
    return documents


def _encode(text: str, where: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            f"{where}: half of a surrogate pair at character {error.start}", "the text is not valid Unicode"
        ) from error
