import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import DamagedDataError, UserError
from mlpmem_ds.core.files import publish_json, read_json
from mlpmem_ds.formats import keys as keys_format
from mlpmem_ds.formats.keys import (
    CODEC_FILES,
    Codec,
    Point,
    bfloat16_bits,
    bfloat16_values,
    encode,
    open_keys,
)
from mlpmem_ds.models.capture_point import POINTS


def test_any_range_and_any_order_of_positions(keys_dir: Path) -> None:
    keys = open_keys(keys_dir)
    assert len(keys.blocks) > 2
    everything = np.concatenate([np.load(path) for path in sorted(keys_dir.glob("keys-*.npy"))])
    assert everything.shape == (keys.num_positions, keys.dim)
    np.testing.assert_array_equal(keys.read("keys"), everything)
    np.testing.assert_array_equal(keys.read("keys", 250, 700), everything[250:700])
    positions = np.random.default_rng(0).permutation(keys.num_positions)[:300]
    np.testing.assert_array_equal(keys.gather("keys", positions), everything[positions])
    assert keys.gather("values", positions[:0]).shape == (0,)
    assert keys.read("keys", 500, 500).shape == (0, keys.dim)
    assert keys.read("keys", keys.num_positions, keys.num_positions + 9).shape == (0, keys.dim)
    assert keys.read("keys", keys.num_positions - 1).shape == (1, keys.dim)
    size = keys.blocks[0].size
    np.testing.assert_array_equal(keys.read("keys", size, 2 * size), everything[size : 2 * size])


def test_few_files_are_mapped_at_a_time(keys_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys_format, "_max_mapped", lambda: 2)
    keys = open_keys(keys_dir)
    everything = keys.read("keys")
    assert len(keys._arrays) <= 2
    positions = np.random.default_rng(0).integers(0, keys.num_positions, 400)
    np.testing.assert_array_equal(keys.gather("keys", positions), everything[positions])
    assert len(keys._arrays) <= 2


def test_inputs_at_any_positions_are_those_of_the_range(keys_dir: Path) -> None:
    keys = open_keys(keys_dir)
    keys.read_inputs_ahead(3, keys.num_positions + 5)  # across units: only a hint
    everything = keys.read_inputs()
    positions = np.random.default_rng(0).integers(0, keys.num_positions, 300)
    np.testing.assert_array_equal(keys.gather_inputs(positions), everything[positions])


@pytest.mark.parametrize("name", CODEC_FILES)
def test_a_damaged_codec_is_not_used(keys_dir: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(keys_dir, tmp_path / "keys")
    keys = open_keys(tmp_path / "keys")
    keys.load_codec()
    content = bytearray((keys.root / name).read_bytes())
    content[-5] ^= 1
    (keys.root / name).write_bytes(content)
    with pytest.raises(DamagedDataError, match=f"{name} does not have the checksum"):
        keys.load_codec()


def test_a_check_finds_a_flipped_byte_of_its_unit(keys_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(keys_dir, tmp_path / "keys")
    keys = open_keys(tmp_path / "keys")
    keys.check("keys")
    path = sorted((tmp_path / "keys").glob("keys-*.npy"))[1]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    keys.check("keys", keys.blocks[0])
    keys.check("values")
    for block in (None, keys.blocks[1]):
        with pytest.raises(
            DamagedDataError, match=f"{path.name} does not have the checksum.*run the stage that made"
        ):
            keys.check("keys", block)


def test_encoding_is_rounding_in_the_rotated_frame() -> None:
    generator = np.random.default_rng(0)
    states_ND = generator.standard_normal((50, 6)).astype(np.float32)
    rotation_DE = np.linalg.qr(generator.standard_normal((6, 6)))[0][:, :4].astype(np.float32)
    mean_D = states_ND.mean(0)
    codes_NE, clipped = encode(states_ND, mean_D, rotation_DE, 0.01)
    exact_NE = (states_ND.astype(np.float64) - mean_D) @ rotation_DE / 0.01
    inside = np.abs(exact_NE) < 126
    assert np.abs(codes_NE - exact_NE)[inside].max() < 0.51
    assert clipped == (np.abs(np.rint(exact_NE)) > 127).sum() > 0
    assert np.abs(codes_NE.astype(int)).max() == 127


def test_bfloat16_bits_are_torchs() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32) * 1e3
    expected = torch.from_numpy(values).bfloat16().view(torch.uint16).numpy()
    np.testing.assert_array_equal(bfloat16_bits(values), expected)


def test_a_corpus_is_not_a_key_directory(corpus_dir: Path) -> None:
    with pytest.raises(UserError, match="not mlpmem-keys"):
        open_keys(corpus_dir)


def test_bfloat16_bits_come_back() -> None:
    values = np.array([0.0, -1.5, 3.0e38, 65504, 1e-40], np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(bfloat16_values(bfloat16_bits(values)), expected)


def test_raw_codecs_read_as_they_were_stored() -> None:
    states_nD = np.array([[1.001, -70000.0]], np.float32)
    narrow = Codec(mean_D=None, rotation_DE=None, scale=1.0)
    assert narrow.encode(states_nD).dtype == np.float16 and np.isinf(narrow.encode(states_nD)[0, 1])
    wide = Codec(mean_D=None, rotation_DE=None, scale=1.0, raw_dtype="bfloat16")
    assert wide.store(states_nD)[0].dtype == np.uint16
    expected = torch.from_numpy(states_nD).to(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(wide.encode(states_nD), expected)


def test_keys_that_this_version_does_not_have_are_refused(keys_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "keys"
    shutil.copytree(keys_dir, copy)
    manifest = read_json(copy / "manifest.json")
    publish_json(copy / "manifest.json", {**manifest, "layer": 3}, seal=True)
    with pytest.raises(DamagedDataError, match="manifest.json: unknown key layer.*version 1"):
        open_keys(copy)
    del manifest["codec"]["raw_dtype"]
    publish_json(copy / "manifest.json", manifest, seal=True)
    with pytest.raises(DamagedDataError, match="key raw_dtype is missing in codec"):
        open_keys(copy)


def test_points_are_those_of_the_models() -> None:
    assert get_args(Point) == POINTS
