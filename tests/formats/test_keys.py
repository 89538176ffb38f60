from pathlib import Path

import numpy as np
import pytest
import torch

from mlpmem_ds.core.errors import UserError
from mlpmem_ds.formats.keys import bfloat16_bits, encode, open_keys


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
