"""The GGUF container: an independent writer here, the `gguf` package where it is, and headers that lie."""

import functools
import struct
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from kernels_pallas.quant_matmul import formats
from ruvjax.errors import InputError
from ruvjax.io.gguf import READ, TYPES, open_gguf
from ruvjax.io.gguf_write import WRITTEN, Out, encode, write_gguf

METADATA = {
    "general.architecture": "llama",
    "a.bool": True,
    "a.u32": 7,
    "a.i64": -7,
    "a.u64": 2**63,
    "a.f32": 0.5,
    "a.u8": np.uint8(200),
    "a.i8": np.int8(-3),
    "a.u16": np.uint16(60000),
    "a.i16": np.int16(-300),
    "a.i32": np.int32(-70000),
    "a.f64": np.array(0.1),
    "a.strings": ["", "é", "▁the", "x" * 300],
    "a.none": [],
    "a.numbers": np.arange(5, dtype=np.int32),
    "a.flags": np.array([True, False]),
    "a.scores": np.array([0.5, -1.0], np.float32),
}


def string(text):
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def independent(version=3, alignment=None):
    """A small file, written by hand from the specification: one entry of each kind of value, three tensors."""
    entries = [
        string("general.architecture") + struct.pack("<I", 8) + string("llama"),
        string("n") + struct.pack("<II", 4, 5),
        string("list") + struct.pack("<IIQ", 9, 8, 2) + string("a") + string("bc"),
        string("array") + struct.pack("<IIQ", 9, 5, 3) + struct.pack("<3i", 1, -2, 3),
        string("flag") + struct.pack("<IB", 7, 1),
    ]
    if alignment is not None:
        entries.append(string("general.alignment") + struct.pack("<II", 4, alignment))
    step = alignment or 32
    one = np.arange(6, dtype="<f4").tobytes()
    two = formats.encode("Q8_0", np.linspace(-1, 1, 64, dtype=np.float32).reshape(2, 32)).tobytes()
    three = np.array([1.5, -2.0], "<f2").tobytes()
    offsets, data = [], b""
    for raw in (one, two, three):
        offsets.append(len(data))
        data += raw + bytes(-len(raw) % step)
    infos = [
        string("one") + struct.pack("<IQQIQ", 2, 3, 2, 0, offsets[0]),
        string("two") + struct.pack("<IQQIQ", 2, 32, 2, 8, offsets[1]),
        string("three") + struct.pack("<IQIQ", 1, 2, 1, offsets[2]),
    ]
    header = b"GGUF" + struct.pack("<IQQ", version, len(infos), len(entries)) + b"".join(entries + infos)
    return header + bytes(-len(header) % step) + data


@functools.cache
def weights(shape=(3, 256), seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outs(kinds=WRITTEN):
    tensors = [Out(f"t.{kind}", kind, weights().shape, lambda kind=kind: encode(kind, weights())) for kind in kinds]
    return [*tensors, Out("vector", "F32", (5,), lambda: encode("F32", np.arange(5.0)))]


@pytest.mark.parametrize("version, alignment", [(2, None), (3, None), (3, 8), (3, 64), (3, 4096)])
def test_a_file_written_from_the_specification_is_read(version, alignment, tmp_path):
    (tmp_path / "m.gguf").write_bytes(independent(version, alignment))
    file = open_gguf(tmp_path / "m.gguf")
    assert file.version == version and file.metadata["general.architecture"] == "llama"
    assert file.metadata["n"] == 5 and file.metadata["list"] == ["a", "bc"] and file.metadata["flag"] is True
    np.testing.assert_array_equal(file.metadata["array"], [1, -2, 3])
    np.testing.assert_array_equal(file.read("one"), np.arange(6).reshape(2, 3))
    np.testing.assert_allclose(file.read("two"), np.linspace(-1, 1, 64).reshape(2, 32), atol=0.005)
    np.testing.assert_array_equal(file.read("three"), np.array([1.5, -2.0], np.float16))
    assert file.blocks("two").shape == (2, 34) and file.tensors["two"].kind == "Q8_0"


def test_what_is_written_is_read_back(tmp_path):
    write_gguf(tmp_path / "m.gguf", METADATA, outs())
    file = open_gguf(tmp_path / "m.gguf")
    assert list(file.metadata) == list(METADATA) and file.version == 3
    for key, value in METADATA.items():
        found = file.metadata[key]
        np.testing.assert_array_equal(found, value)
        if isinstance(value, np.ndarray) and value.ndim:
            assert found.dtype == value.dtype
        else:
            assert type(found) is type(value.item() if isinstance(value, (np.ndarray, np.generic)) else value), key
    assert list(file.tensors) == [f"t.{kind}" for kind in WRITTEN] + ["vector"]
    for kind in WRITTEN:
        np.testing.assert_array_equal(file.blocks(f"t.{kind}"), encode(kind, weights()))
        found = file.read(f"t.{kind}")
        assert found.shape == weights().shape and found.flags.writeable
        error = {"F32": 0, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 0.02, "Q4_0": 0.4, "Q4_K": 0.3}[kind]
        np.testing.assert_allclose(found.astype(np.float32), weights(), atol=error)
    assert file.read("t.BF16").dtype == ml_dtypes.bfloat16 and file.read("t.F16").dtype == np.float16
    np.testing.assert_array_equal(file.read("vector"), np.arange(5))
    with pytest.raises(ValueError, match="read-only"):
        file.blocks("t.Q8_0")[0, 0] = 1


def test_every_offset_is_aligned_and_the_file_ends_aligned(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", METADATA, outs())
    file = open_gguf(path)
    assert all(tensor.offset % 32 == 0 for tensor in file.tensors.values())
    assert path.stat().st_size % 32 == 0  # llama.cpp wants the last tensor padded too


def test_q6_k_is_decoded(tmp_path):
    raw = np.random.default_rng(1).integers(0, 256, (2, 210), dtype=np.uint8)
    raw[:, 208:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    write_gguf(tmp_path / "m.gguf", {}, [Out("six", "Q6_K", (2, 256), lambda: raw)])
    found = open_gguf(tmp_path / "m.gguf").read("six")
    low, high = raw[:, :128].astype(int), raw[:, 128:192].astype(int)
    scales = raw[:, 192:208].view(np.int8).astype(np.float32)
    for row in range(2):  # weight by weight, as ggml's documentation orders them
        for i in range(256):
            half, rest = divmod(i, 128)
            quarter, at = divmod(rest, 32)
            nibble = low[row, half * 64 + (quarter % 2) * 32 + at] >> (4 * (quarter // 2)) & 15
            bits = high[row, half * 32 + at] >> (2 * quarter) & 3
            wanted = np.float32(np.float16(0.01)) * scales[row, i // 16] * np.float32((nibble | bits << 4) - 32)
            assert found[row, i] == wanted


def test_a_type_that_cannot_be_decoded_is_named_and_the_rest_is_read(tmp_path):
    five = Out("five", "Q5_K", (1, 256), lambda: np.zeros((1, 176), np.uint8))
    write_gguf(tmp_path / "m.gguf", {}, [five, *outs(["F32"])])
    file = open_gguf(tmp_path / "m.gguf")
    np.testing.assert_array_equal(file.read("t.F32"), weights())
    with pytest.raises(InputError, match=r"five is stored as Q5_K, which cannot be decoded") as caught:
        file.read("five")
    assert "Q6_K" in caught.value.hint
    with pytest.raises(InputError, match="no tensor six"):
        file.read("six")


@pytest.mark.parametrize(
    "kind, array, message",
    [
        ("Q8_0", np.ones((2, 33)), "whole blocks"),
        ("F16", np.full((1, 32), 1e6), "F16 cannot hold numbers up to 1e\\+06"),
        ("F32", np.full((1, 32), np.nan), "F32 cannot hold"),
        ("BF16", np.full((1, 32), np.inf), "BF16 cannot hold"),
        ("Q4_K", np.full((1, 256), np.nan), "finite"),
    ],
)
def test_what_cannot_be_written_leaves_no_file(kind, array, message, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"before")
    with pytest.raises(InputError, match=message):
        write_gguf(path, {}, [Out("t", kind, (1, 256), lambda: encode(kind, array))])
    assert path.read_bytes() == b"before" and [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("value", [None, {"a": 1}, [1, 2], np.zeros(2, np.complex64), object()])
def test_metadata_of_other_types_is_refused(value, tmp_path):
    with pytest.raises(InputError, match="cannot be an entry"):
        write_gguf(tmp_path / "m.gguf", {"k": value}, [])


def change(at, form, value):
    raw = bytearray(independent())
    struct.pack_into(form, raw, at, value)
    return bytes(raw)


LIES = {
    "empty": (b"", "the file is empty"),
    "another format": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "web page": (b"<html>", "not a GGUF file"),
    "three bytes": (b"GGU", "not a GGUF file"),
    "magic alone": (b"GGUF", "cut short or lies: 0 bytes are left for the version"),
    "version 1": (change(4, "<I", 1), "version 1 of GGUF is not supported"),
    "version 4": (change(4, "<I", 4), "version 4 of GGUF"),
    "big-endian": (change(4, ">I", 3), "a big-endian file of GGUF"),
    "many tensors": (change(8, "<Q", 2**62), "bytes are left for 4611686018427387904 tensors"),
    "one tensor more": (change(8, "<Q", 4), "cut short or lies|tensor"),
    "many entries": (change(16, "<Q", 2**63), "bytes are left for 9223372036854775808 entries"),
    "no entries": (change(16, "<Q", 0), "test"),
    "long key": (change(24, "<Q", 2**64 - 1), "bytes are left for a key"),
    "empty key": (independent().replace(string("n"), string(""), 1), "a key of the header is empty"),
    "key twice": (independent().replace(string("flag"), string("list"), 1), "a key of the header is list again"),
    "key of bytes": (independent().replace(string("n"), string(b"\xff"), 1), "a key is not UTF-8"),
    "value type": (
        independent().replace(string("n") + struct.pack("<I", 4), string("n") + struct.pack("<I", 13)),
        "13",
    ),
    "array of arrays": (
        independent().replace(struct.pack("<IIQ", 9, 5, 3), struct.pack("<IIQ", 9, 9, 3)),
        "array is an array of the value type 9",
    ),
    "long array": (
        independent().replace(struct.pack("<IIQ", 9, 5, 3), struct.pack("<IIQ", 9, 5, 2**60)),
        "bytes are left for array",
    ),
    "many strings": (
        independent().replace(struct.pack("<IIQ", 9, 8, 2), struct.pack("<IIQ", 9, 8, 2**61)),
        "bytes are left for list",
    ),
    "alignment": (independent(alignment=24), "general.alignment=24 is not a power of two"),
    "alignment of everything": (independent(alignment=1 << 21), "is not a power of two up to 1048576"),
    "tensor twice": (independent().replace(string("two"), string("one"), 1), "names a tensor twice"),
    "nine dimensions": (independent().replace(struct.pack("<IQQ", 2, 3, 2), struct.pack("<IQQ", 9, 3, 2)), "9 dim"),
    "no numbers": (independent().replace(struct.pack("<IQQ", 2, 3, 2), struct.pack("<IQQ", 2, 0, 2)), r"\[2, 0\]"),
    "half a block": (independent().replace(struct.pack("<IQQ", 2, 32, 2), struct.pack("<IQQ", 2, 33, 2)), r"\[2, 33\]"),
    "tensor type": (independent().replace(struct.pack("<QIQ", 2, 1, 128), struct.pack("<QIQ", 2, 77, 128)), "type 77"),
    "huge tensor": (
        independent().replace(struct.pack("<IQQ", 2, 3, 2), struct.pack("<IQQ", 2, 2**63, 2**63)),
        "one takes .* bytes, the file has",
    ),
    "tensor after the end": (
        independent().replace(struct.pack("<QIQ", 2, 1, 128), struct.pack("<QIQ", 2, 1, 1 << 40)),
        "three ends .* bytes after the file's end",
    ),
    "askew": (independent().replace(struct.pack("<QIQ", 2, 1, 128), struct.pack("<QIQ", 2, 1, 130)), "begins at 130"),
    "inside another": (
        independent().replace(struct.pack("<QIQ", 2, 1, 128), struct.pack("<QIQ", 2, 1, 32)),
        "begins at 32, inside another",
    ),
    "cut": (independent()[:-30], "cut short: three ends 2 bytes after"),
    "cut in the header": (independent()[:100], "cut short or lies"),
}


@pytest.mark.parametrize("how", LIES)
def test_headers_that_lie_are_one_clear_line(how, tmp_path):
    raw, message = LIES[how]
    assert raw != independent()
    (tmp_path / "m.gguf").write_bytes(raw)
    if how == "no entries":
        message = "m.gguf"  # whatever the entries look like, read as tensors
    with pytest.raises(InputError, match=message) as caught:
        open_gguf(tmp_path / "m.gguf")
    line = caught.value.line()
    assert "m.gguf" in line and "\n" not in line and len(line) < 400


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "absent.gguf", tmp_path):
        with pytest.raises(InputError, match=str(path)):
            open_gguf(path)


def mutated(raw, rng):
    """`raw` with one to four accidents: bytes, numbers at the places where numbers stand, cuts, insertions, repeats."""
    raw = bytearray(raw)
    for _ in range(rng.integers(1, 5)):
        at = int(rng.integers(0, len(raw)))
        kind = rng.integers(0, 6)
        if kind == 0:
            raw[at] = rng.integers(0, 256)
        elif kind == 1:
            raw[at] ^= 1 << rng.integers(0, 8)
        elif kind == 2 and at + 8 <= len(raw):
            value = rng.choice(np.array([0, 1, 31, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1], np.uint64))
            struct.pack_into("<Q", raw, at, int(value))
        elif kind == 3:
            del raw[at : at + int(rng.integers(1, 64))]
        elif kind == 4:
            raw[at:at] = rng.integers(0, 256, rng.integers(1, 64), dtype=np.uint8).tobytes()
        elif kind == 5:
            raw[at:at] = raw[max(0, at - 64) : at]
        if not raw:
            break
    return bytes(raw)


def fuzz(count, folder, seed=0):
    """How many mutated files open and decode; anything but InputError, and memory beyond the file's size, fails."""
    plain = independent()
    full = write_gguf(folder / "full.gguf", METADATA, outs()).read_bytes()
    rng, survived = np.random.default_rng(seed), 0
    path = folder / "fuzz.gguf"
    tracemalloc.start()
    try:
        for i in range(count):
            raw = mutated(plain if i % 2 else full, rng)
            path.write_bytes(raw)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            try:
                file = open_gguf(path)
                for name in file.tensors:
                    try:
                        file.read(name)
                    except InputError:
                        pass
                survived += 1
            except InputError as error:
                assert "\n" not in error.line()
            file = None
            # A tensor decodes to at most 8 times its bytes, with as much again on the way.
            assert tracemalloc.get_traced_memory()[1] - before < 64 * len(raw) + 200_000
    finally:
        tracemalloc.stop()
    return survived


def test_some_hundred_mutated_files_do_no_harm(tmp_path):
    survived = fuzz(600, tmp_path)
    assert 10 < survived < 550  # both ways out are taken


@pytest.mark.slow
def test_ten_thousand_mutated_files_do_no_harm(tmp_path):
    assert fuzz(10_000, tmp_path, seed=1) > 100


def test_types_are_those_of_the_gguf_package():
    gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
    for entry in TYPES.values():
        theirs = gguf.GGMLQuantizationType(entry.number)
        sizes = gguf.GGML_QUANT_SIZES[theirs]
        # ggml stores a Q8_1 block in 36 bytes (two halves and 32 codes); the package counts 40.
        assert theirs.name == entry.name and (sizes == (entry.weights, entry.bytes) or entry.name == "Q8_1")
    assert set(READ) <= set(TYPES) and set(WRITTEN) <= set(READ)


def test_the_gguf_package_reads_what_we_write(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
    metadata = {key: value for key, value in METADATA.items() if key != "a.none"}  # it cannot read an empty array
    reader = gguf.GGUFReader(write_gguf(tmp_path / "m.gguf", metadata, outs()))
    for key, value in metadata.items():
        np.testing.assert_array_equal(reader.fields[key].contents(), value, err_msg=key)
    for tensor in reader.tensors:
        kind = tensor.tensor_type.name
        wanted = np.arange(5) if tensor.name == "vector" else open_gguf(tmp_path / "m.gguf").read(tensor.name)
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(found.reshape(wanted.shape), wanted.astype(np.float32), err_msg=kind)


def test_what_the_gguf_package_writes_is_read(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the extra `gguf`")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_uint32("a.u32", 5)
    writer.add_array("a.strings", ["x", "é"])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_tensor("plain", weights())
    for kind in (gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.BF16):
        writer.add_tensor(kind.name, gguf.quantize(weights(), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = open_gguf(tmp_path / "m.gguf")
    assert file.metadata["a.u32"] == 5 and file.metadata["a.strings"] == ["x", "é"]
    np.testing.assert_array_equal(file.metadata["a.floats"], [0.5, 1.5])
    np.testing.assert_array_equal(file.read("plain"), weights())
    for kind in ("Q8_0", "Q4_0"):
        np.testing.assert_array_equal(file.blocks(kind), encode(kind, weights()))
    np.testing.assert_array_equal(file.read("BF16"), weights().astype(ml_dtypes.bfloat16))
