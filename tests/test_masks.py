"""Which labels are seen: SARB's masks and Cole's single positives, against published counts and
first numbers."""
import hashlib

import numpy as np
import pytest

import data
import fake_datasets as fake
from data import NEGATIVE, POSITIVE, UNKNOWN
from support import UserError

pytestmark = pytest.mark.paper


def test_partial_mask_is_sarbs():
    """SARB: np.random.seed(0); np.random.random(shape) < p. Counts of kept cells at 0.5 as
    published."""
    for shape, kept in (((5011, 20), 50163), ((82783, 80), 3310164), ((82904, 200), 8289679)):
        assert data.partial_mask(shape, 0.5).sum() == kept
    first = np.random.RandomState(0).random_sample((2, 3))
    assert np.allclose(first[0], [0.5488135, 0.71518937, 0.60276338])
    assert (data.partial_mask((1, 3), 0.6)[0] == [True, False, False]).all()
    draws = np.random.RandomState(0)  # image after image
    want = [[draws.random_sample() < 0.3 for _ in range(3)] for _ in range(50)]
    assert (data.partial_mask((50, 3), 0.3) == want).all()


def test_partial_masks_nest_and_leave_the_global_generator_alone():
    np.random.seed(5)
    before = np.random.get_state()[1].copy()
    masks = [data.partial_mask((300, 40), k / 10, seed=3) for k in range(1, 10)]
    assert (np.random.get_state()[1] == before).all()
    for smaller, larger in zip(masks, masks[1:]):
        assert not (smaller & ~larger).any() and smaller.sum() < larger.sum()
    assert (data.partial_mask((300, 40), 0.5, 3) != data.partial_mask((300, 40), 0.5, 4)).any()


def cole(labels, seed, shuffle_negatives=True):
    """The published recipe in plain steps, as the oracle."""
    rng, picks = np.random.RandomState(seed), []
    for row in labels:
        idx = np.nonzero(row == 1)[0]
        rng.shuffle(idx)
        picks.append(idx[0] if len(idx) else -1)
        if shuffle_negatives:
            rng.shuffle(np.nonzero(row == -1)[0])
    return np.array(picks)


def test_single_positives_are_coles_negatives_shuffled_too():
    labels = np.where(np.random.RandomState(1).rand(2000, 80) < 0.04, POSITIVE,
                      NEGATIVE).astype(np.int8)
    observed = data.single_positives(labels)
    filled = (labels == POSITIVE).any(1)
    assert (observed.sum(1) == filled).all() and set(np.unique(observed)) == {UNKNOWN, POSITIVE}
    assert (labels[observed == POSITIVE] == POSITIVE).all()
    assert (observed.argmax(1)[filled] == cole(labels, 1200)[filled]).all()
    # the negatives move the stream
    assert (observed.argmax(1) == cole(labels, 1200, False))[filled].mean() < 0.7


@pytest.mark.parametrize("count,train,held", [(82081, 65665, 16416), (5717, 4574, 1143),
                                              (5994, 4795, 1199), (150000, 120000, 30000)])
def test_hold_out_sizes_are_the_published_ones(count, train, held):
    rows, rest = data.hold_out(count, 0.2)
    assert (len(rows), len(rest)) == (train, held)
    assert (np.sort(np.concatenate([rows, rest])) == np.arange(count)).all()
    order = np.random.RandomState(1200).permutation(count)
    assert (rest == np.sort(order[-held:])).all()


@pytest.fixture
def table():
    rng = np.random.RandomState(0)
    return data.Split("x", [], list("abcde"),
                      np.where(rng.rand(30, 5) < 0.3, POSITIVE, NEGATIVE).astype(np.int8))


@pytest.mark.parametrize("form", ["bool.npy", "01.npy", "codes.npy", "codes.npz", "commas.txt",
                                  "blanks.txt"])
def test_mask_files(tmp_path, table, form):
    kept = data.partial_mask(table.labels.shape, 0.4)
    codes, path = table.labels * kept, tmp_path / form
    if form.endswith("npy"):
        np.save(path,
                {"bool": kept, "01": kept.astype(int), "codes": codes.astype(float)}[form[:-4]])
    elif form.endswith("npz"):
        np.savez(path, codes)
    else:
        np.savetxt(path, codes, "%d", "," if form == "commas.txt" else " ")
    assert (data.read_mask(path, table) == kept).all()


def test_mask_files_refused(tmp_path, table):
    def refused(array, match):
        np.save(tmp_path / "m.npy", array)
        with pytest.raises(UserError, match=match):
            data.read_mask(tmp_path / "m.npy", table)
    refused(table.labels[:-1], r"expected \(30, 5\) rows x classes, got \(29, 5\)")
    refused(table.labels * 2, "a cell is 1, 0 or -1, got")
    # DualCoOp's coding: -1 means unknown there
    refused(-table.labels, "disagree with the data set, first row 1")
    refused(np.array([{"a": 1}], object), "not an array file")  # would need pickle: never loaded
    (tmp_path / "m.txt").write_text("1,0,1\n1,0\n")
    with pytest.raises(UserError, match="not a mask file"):
        data.read_mask(tmp_path / "m.txt", table)


def test_hash_names_the_mask(tmp_path):
    fake.voc(tmp_path)
    train = fake.load("voc2007", tmp_path, ratio=0.3)[0]
    kept = data.partial_mask((10, 20), 0.3)
    assert train.info["mask_sha256"] == hashlib.sha256(kept.tobytes()).hexdigest()
    assert ((train.labels != UNKNOWN) == kept).all() and (train.labels[kept]
                                                          == train.truth[kept]).all()
    again = fake.load("voc2007", tmp_path, ratio=0.3, train_images=4)[0]
    assert again.info["mask_sha256"] == train.info["mask_sha256"] and (again.labels
                                                                       == train.labels[:4]).all()
    np.save(tmp_path / "own.npy", kept)
    assert (fake.load("voc2007", tmp_path, mask=tmp_path / "own.npy")[0].labels
            == train.labels).all()
