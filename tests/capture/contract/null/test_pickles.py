import os
import pickle
import pickletools
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bhlog.capture.contract.errors import CorruptKde, KdeMismatch, RouterLogError, UnsafePickle
from bhlog.capture.contract.null import pickles
from bhlog.capture.contract.null.pickles import load_kde_models, read_arrays
from tests.synthetic import normal_kde

X = np.linspace(-2, 2, 41)
CDF = (X + 2) / 4
GOOD = {"x": X, "cdf": CDF}


def write(folder, name, content, protocol=4):
    path = folder / name
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize(
    "array",
    [
        X,
        X.astype(np.float32),
        X.astype(">f8"),
        np.arange(6).reshape(2, 3),
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        np.arange(10)[::3],
        np.array([True, False]),
    ],
    ids=["f8", "f4", "big-endian", "2d", "fortran", "strided", "bool"],
)
def test_arrays_of_every_protocol_are_read(protocol, array):
    data = pickle.dumps({"x": array, "cdf": X}, protocol=protocol)
    found = read_arrays(data, "a.pkl")
    assert np.array_equal(found["x"], array)
    assert np.array_equal(found["cdf"], X)


def test_both_spellings_of_numpys_core_are_read():
    data = pickle.dumps(GOOD, protocol=2)
    old = data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    assert old != data
    assert np.array_equal(read_arrays(old, "a.pkl")["x"], X)
    assert np.array_equal(read_arrays(data, "a.pkl")["x"], X)


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize(
    ("function", "named"),
    [(os.mkdir, "posix.mkdir"), (eval, "eval"), (np.frombuffer, "numpy"), (getattr, "getattr")],
)
def test_a_pickle_that_names_anything_else_is_refused_and_runs_nothing(
    tmp_path, protocol, function, named
):
    target = tmp_path / "made"
    bad = Calls(function, str(target))
    with pytest.raises(UnsafePickle, match=named):
        read_arrays(pickle.dumps({"x": X, "cdf": bad}, protocol=protocol), "bad.pkl")
    assert not target.exists()


@pytest.mark.parametrize(
    "name", ["numpy.load", "numpy.core.multiarray.scalar", "numpy.core._reconstruct", "os.system"]
)
def test_only_the_names_that_arrays_need_are_known(name):
    module, _, attribute = name.rpartition(".")
    data = f"c{module}\n{attribute}\n(tR.".encode()
    with pytest.raises(UnsafePickle, match=f"names {name}"):
        read_arrays(data, "bad.pkl")


def test_objects_in_arrays_and_instructions_that_arrays_do_not_need_are_refused():
    with pytest.raises(RouterLogError, match="O8"):
        read_arrays(pickle.dumps({"x": np.array([None, {}])}), "bad.pkl")
    with pytest.raises(UnsafePickle, match="instruction"):
        read_arrays(pickle.dumps({"x": [1, 2]}), "bad.pkl")
    with pytest.raises(UnsafePickle, match="instruction"):
        read_arrays(pickle.dumps({"x": {1, 2}}), "bad.pkl")
    with pytest.raises(CorruptKde, match="'x' is no numpy array"):
        read_arrays(pickle.dumps({"x": "text"}), "bad.pkl")
    with pytest.raises(CorruptKde, match="holds no dictionary"):
        read_arrays(pickle.dumps(X), "bad.pkl")


DTYPE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8\x85R"
FROM_8_BYTES = b"\x80\x04cnumpy._core.numeric\n_frombuffer\n(C\x08" + bytes(8) + DTYPE
NESTED = b")" + b"\x85" * 50_000  # a tuple in a tuple in a tuple: hash() of it ends the process


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04}" + NESTED + b"K\x01s.",
        b"\x80\x04}X\x01\x00\x00\x00x" + NESTED + b"s.",
        b"\x80\x04cnumpy\ndtype\n" + NESTED + b"R.",
        b"\x80\x04" + NESTED + b"X\x06\x00\x00\x00system\x93.",
        b"\x80\x04X\x05\x00\x00\x00a\nb\x1b[X\x06\x00\x00\x00system\x93.",
        b"\x80\x04X\x00\x00\x10\x00" + b"a" * 2**20 + b"X\x06\x00\x00\x00system\x93.",
        FROM_8_BYTES + b"(\x8a\x10" + b"\xff" * 15 + b"\x00tX\x01\x00\x00\x00CtR.",
        FROM_8_BYTES + b"G\x7f\xf0" + bytes(6) + b"\x85X\x01\x00\x00\x00CtR.",
        b"\x80\x05\x8e" + (2**62).to_bytes(8, "little") + b"abc.",
        b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b"abc.",
        b"\x80\x05\x8b\xff\xff\xff\x7fabc.",
        b"L" + b"9" * 100_000 + b"L\n.",
        b"\x85" * 10 + b"t.",
        b"\x80\x02}X\x01\x00\x00\x00xc_codecs\nencode\n\x8a\t\x00\x10\xa5\xd4\xe8\x00\x00\x00\x00"
        b"X\x06\x00\x00\x00latin1\x86Rs.",
        b"\x80\x04Nr\xff\xff\xff\x7f.",
        b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"N.",
        b"cnumpy\nndarray\n(\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
        b"cnumpy\ndtype\n}X\x04\x00\x00\x00fillNsb.",
        b"}" * 100_000 + b".",
        b"}" + b"(" + b"".join(2 * (b")" + b"\x85" * 2000 + b"N") for _ in range(1)) + b"u.",
    ],
    ids=[
        "nested key",
        "nested value",
        "nested number format",
        "nested name",
        "name with a line break",
        "long name",
        "shape of 2^127",
        "infinite shape",
        "bytes of 2^62",
        "bytearray of 2^62",
        "integer of 2 GiB",
        "integer of many digits",
        "no mark",
        "bytes of 10^12 from an integer",
        "memo of 2^31",
        "frame of 2^62",
        "array made by its class",
        "state of a class",
        "100,000 instructions",
        "keys that are alike and nested",
    ],
)
def test_a_hostile_pickle_is_one_short_error(content):
    tracemalloc.start()
    with pytest.raises(RouterLogError) as error:
        read_arrays(content, "bad.pkl")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(error.value).isprintable() and len(str(error.value)) < 300
    assert peak < 32 * 2**20


def test_a_pickle_without_end_is_not_read(tmp_path, monkeypatch):
    path = write(tmp_path, "distribution_model_layer_0.pkl", GOOD)
    monkeypatch.setattr(pickles, "MOST_BYTES", path.stat().st_size)
    assert load_kde_models(tmp_path)[0].pooled
    path.write_bytes(path.read_bytes() + b".")
    with pytest.raises(CorruptKde, match=r"layer_0\.pkl: .* larger than"):
        load_kde_models(tmp_path)


def test_bytes_that_are_asked_for_again_and_again_are_refused():
    text = b"X\x00\x00\x01\x00" + b"a" * 2**16 + b"X\x06\x00\x00\x00latin1\x86q\x01"
    again = b"h\x00h\x01R" * 1000
    with pytest.raises(CorruptKde, match="more than the file does"):
        read_arrays(b"\x80\x04c_codecs\nencode\nq\x00" + text + again + b".", "bad.pkl")


def test_a_float32_grid_is_even_up_to_its_rounding(tmp_path):
    x = np.linspace(-9.48, 12.7, 10_000).astype(np.float32)
    cdf = np.linspace(0, 1, len(x), dtype=np.float32)
    write(tmp_path, "distribution_model_layer_0.pkl", {"x": x, "cdf": cdf})
    assert load_kde_models(tmp_path)[0]["x"] == pytest.approx(x, abs=1e-5)


PICKLED = {protocol: pickle.dumps(GOOD, protocol=protocol) for protocol in (2, 4, 5)}


@settings(deadline=None)
@given(st.sampled_from([2, 4, 5]), st.data())
def test_a_damaged_pickle_gives_arrays_or_one_clear_error(protocol, data):
    content = bytearray(PICKLED[protocol])
    for _ in range(data.draw(st.integers(0, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(content)))
    for damaged in (bytes(content), bytes(content[:cut])):
        try:
            read_arrays(damaged, "damaged.pkl")
        except RouterLogError as error:
            assert "damaged.pkl" in str(error)


def test_the_pickles_here_need_no_instruction_that_calls_more():
    names = {op.name for op, _, _ in pickletools.genops(PICKLED[4])}
    assert "STACK_GLOBAL" in names and "INST" not in names


def test_a_folder_of_pickles_is_a_model(tmp_path):
    write(tmp_path, "distribution_model_layer_0.pkl", GOOD)
    write(tmp_path, "distribution_model_layer_11.pkl", GOOD)
    (tmp_path / "notes.txt").write_text("not a pickle")
    model = load_kde_models(tmp_path)
    assert sorted(model) == [0, 11]
    assert np.allclose(model[11]["x"], X)
    assert np.allclose(model[11]["cdf"], CDF, atol=1e-15)  # 1 - (1 - cdf)
    curve = model[0].curves[0]
    assert (curve.kernel, curve.n, curve.histogram) == ("imported", 0, None)
    assert curve.source == ("distribution_model_layer_0.pkl",)
    assert curve.p_value(np.array([1.0]))[0] == pytest.approx(0.25, abs=1e-12)


def test_variants_are_chosen_by_name_and_never_guessed(tmp_path):
    write(tmp_path, "distribution_model_layer_0_gaussian.pkl", GOOD)
    write(tmp_path, "distribution_model_layer_0_trimmed_4.pkl", {"x": X + 1, "cdf": CDF})
    assert load_kde_models(tmp_path, variant="trimmed_4")[0]["x"][0] == pytest.approx(-1)
    with pytest.raises(KdeMismatch, match="variants here: gaussian, trimmed_4"):
        load_kde_models(tmp_path)
    with pytest.raises(KdeMismatch, match="no variant 'tophat'"):
        load_kde_models(tmp_path, variant="tophat")


def test_our_own_file_loads_by_the_same_call(tmp_path):
    normal_kde([2]).save(tmp_path / "null.parquet")
    assert sorted(load_kde_models(tmp_path / "null.parquet")) == [2]
    with pytest.raises(CorruptKde, match="cannot read"):
        load_kde_models(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorruptKde, match="no distribution_model_layer"):
        load_kde_models(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": X}, "expected x and cdf"),
        ({"x": X, "cdf": CDF[:-1]}, "expected two alike"),
        ({"x": X**3, "cdf": CDF}, "not an even rising grid"),
        ({"x": X[::-1], "cdf": CDF}, "not an even rising grid"),
        ({"x": X, "cdf": CDF[::-1]}, "does not rise from 0 to 1"),
        ({"x": X, "cdf": CDF * 2}, "does not rise from 0 to 1"),
        ({"x": X, "cdf": np.where(X > 0, np.nan, CDF)}, "NaN or infinity"),
    ],
)
def test_a_pickle_that_is_no_null_model_is_named(tmp_path, content, message):
    write(tmp_path, "distribution_model_layer_3.pkl", content)
    with pytest.raises(CorruptKde, match=f"layer_3.pkl: .*{message}"):
        load_kde_models(tmp_path)


def test_a_pickle_that_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "distribution_model_layer_0.pkl")
    with pytest.raises(CorruptKde, match=r"cannot be read \(not a file|Invalid argument"):
        load_kde_models(tmp_path)
