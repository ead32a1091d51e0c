"""Masks of masked-gene training."""

import numpy as np
import pytest
from token_files import make_cells, make_vocabulary

from cellformers.training import masking

VOCABULARY = make_vocabulary(special="v2")
GENES, SPECIAL = VOCABULARY.token_ids, VOCABULARY.special_tokens


def masked(tokens, **changes):
    options = {"genes": GENES, "special": SPECIAL, "probability": 0.15, "seed": 0, "number": (1,), **changes}
    return masking.mask(tokens, **options)


def test_special_tokens_are_never_guessed_and_never_put_in():
    tokens = np.concatenate(make_cells(VOCABULARY, [5] * 4000)).astype(np.int64)
    result = masked(tokens)
    special = np.isin(tokens, list(SPECIAL.values()))
    assert not special[result.positions].any()
    assert np.array_equal(result.tokens[special], tokens[special])
    put_in = result.tokens[result.positions]
    assert not np.isin(put_in, [v for k, v in SPECIAL.items() if k != "<mask>"]).any()


def test_15_percent_are_chosen_and_80_10_10_of_them_hidden_swapped_kept():
    tokens = np.concatenate(make_cells(VOCABULARY, [60] * 3000)).astype(np.int64)
    result = masked(tokens)
    n_genes = 60 * 3000
    assert len(result.positions) / n_genes == pytest.approx(0.15, abs=0.005)
    assert np.array_equal(result.targets, tokens[result.positions])
    now = result.tokens[result.positions]
    assert (now == SPECIAL["<mask>"]).mean() == pytest.approx(0.8, abs=0.01)
    # one swap in 60 happens to put the same gene in
    assert (now == result.targets).mean() == pytest.approx(0.1 + 0.1 / 60, abs=0.01)
    untouched = np.setdiff1d(np.arange(len(tokens)), result.positions)
    assert np.array_equal(result.tokens[untouched], tokens[untouched])


def test_masks_depend_on_seed_and_number_alone():
    tokens = np.concatenate(make_cells(VOCABULARY, [60] * 20)).astype(np.int64)
    again = masked(tokens)
    assert all(np.array_equal(a, b) for a, b in zip(masked(tokens), again, strict=True))
    for other in ({"seed": 1}, {"number": (2,)}, {"number": (1, 1)}, {"heldout": True}):
        assert not np.array_equal(masked(tokens, **other).positions, again.positions)


def test_a_batch_has_something_to_guess():
    tokens = np.array([2, 5, 6, 3])
    assert all(len(masked(tokens, number=(n,), probability=1e-9).positions) == 1 for n in range(20))


def test_cross_entropy_of_known_frequencies():
    genes = np.array([2, 3])
    log_p = masking.log_frequencies(np.array([1, 1, 2, 1]), genes, smoothing=0.0)
    np.testing.assert_allclose(np.exp(log_p), [2 / 3, 1 / 3])
    assert masking.cross_entropy(np.array([1, 0, 1, 1]), genes, log_p) == pytest.approx(-np.log(2 / 9) / 2)
    smoothed = np.exp(masking.log_frequencies(np.array([0, 0, 2, 0]), genes))
    np.testing.assert_allclose(smoothed, [0.75, 0.25])
