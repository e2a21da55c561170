"""Metrics against scikit-learn, loops and brute force: ties, empty categories and unknown labels
included."""

import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from eval import (ap_per_category, average_precision, best_threshold, best_thresholds,
                  localisation, metrics)


def case(seed, n=60, C=7, ties=True, unknown=0.3):
    """Scores with many ties, truth with unknown cells; category 0 has no positive, category 1 only
    unknown labels."""
    rng = np.random.RandomState(seed)
    scores = rng.random_sample((n, C)).astype(np.float32)
    scores = np.round(scores, 1) if ties else scores
    truth = np.where(rng.random_sample((n, C)) < 0.3, 1, -1).astype(np.int8)
    truth[rng.random_sample((n, C)) < unknown] = 0
    truth[:, 0] = np.where(truth[:, 0] == 1, -1, truth[:, 0])
    truth[:, 1] = 0
    return scores, truth


def test_equal_scores_are_a_tie_where_they_are_infinite_too():
    """Absent and present at infinity, then present: P 1/2 at R 1/2, 2/3 at R 1."""
    scores, positive = np.array([np.inf, np.inf, 0.8, 0.1]), np.array([True, False, True, False])
    for rows in ([0, 1, 2, 3], [1, 0, 2, 3]):
        assert average_precision(scores[rows], positive[rows]) == pytest.approx(7 / 12)


@pytest.mark.parametrize("ties", (False, True))
def test_average_precision_is_scikit_learns_in_any_order_of_the_images(ties):
    for seed in range(50):
        scores, truth = case(seed, n=1 + seed, ties=ties)
        for c in range(truth.shape[1]):
            positive = truth[:, c] == 1
            if not positive.any():
                continue
            got = average_precision(scores[:, c], positive)
            assert got == pytest.approx(average_precision_score(positive, scores[:, c]), abs=1e-12)
            shuffled = np.random.RandomState(seed).permutation(len(scores))
            assert average_precision(scores[shuffled, c], positive[shuffled]) == pytest.approx(
                got, abs=1e-12
            )


def test_extremes_of_average_precision():
    assert average_precision(np.array([0.5]), np.array([True])) == 1
    # tied: the prevalence
    assert average_precision(np.zeros(4), np.array([True, False, False, False])) == 0.25
    assert average_precision(np.arange(4.0), np.ones(4, bool)) == 1
    for interpolated in (False, True):  # no positive, no image
        got = ap_per_category(np.zeros((2, 2)), np.array([[-1, 1], [0, -1]]),
                              interpolated)
        assert np.isnan(got[0]) and not np.isnan(got[1])
        assert np.isnan(ap_per_category(*np.zeros((2, 0, 2)), interpolated)).all()


def test_the_documented_example():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6]), np.array([False, True, True, False])
    assert average_precision(scores, positive) == pytest.approx((1 / 2 + 2 / 3) / 2)  # 0.5833
    assert average_precision(scores, positive, True) == pytest.approx(2 / 3)  # 0.6667
    for order in (slice(None), slice(None, None, -1)):  # of tied scores: the prevalence
        assert average_precision(np.ones(4), positive[order], True) == 0.5


def interpolated_by_loops(scores, positive):
    """For each positive the best precision of a threshold that lets it pass; then their mean."""
    precision = {t: sum(positive[scores >= t]) / sum(scores >= t) for t in scores}
    best = [max(p for t, p in precision.items() if t <= s) for s in scores[positive]]
    return sum(best) / len(best)


def test_interpolated_precision_by_loops_and_never_below_the_plain_one():
    for seed in range(30):
        scores, truth = case(seed, ties=seed % 2 == 0)
        for c in range(2, truth.shape[1]):
            positive = truth[:, c] == 1
            got = average_precision(scores[:, c], positive, interpolated=True)
            assert got == pytest.approx(interpolated_by_loops(scores[:, c], positive))
            assert got >= average_precision(scores[:, c], positive) - 1e-12


@pytest.mark.parametrize("per_category", (False, True))
def test_metrics_by_loops(per_category):
    for seed in range(10):
        scores, truth = case(seed)
        n, C = truth.shape
        threshold = np.random.RandomState(seed).random_sample(C) if per_category else 0.5
        limits = np.broadcast_to(threshold, (C,))
        P, R, hits, saids, exists, aps, interpolated = [], [], 0, 0, 0, [], []
        for c in range(C):
            hit = said = exist = 0
            for i in range(n):
                if truth[i, c] == 0:
                    continue
                exist += truth[i, c] == 1
                said += scores[i, c] >= limits[c]
                hit += scores[i, c] >= limits[c] and truth[i, c] == 1
            P.append(hit / said if said else 0)
            if exist:
                R.append(hit / exist)
                known = truth[:, c] != 0
                aps.append(average_precision_score(truth[known, c] == 1, scores[known, c]))
                interpolated.append(interpolated_by_loops(scores[known, c], truth[known, c] == 1))
            hits, saids, exists = hits + hit, saids + said, exists + exist
        CP, CR, OP, OR = sum(P) / C, sum(R) / len(R), hits / saids, hits / exists
        want = dict(
            mAP=sum(aps) / len(aps),
            mAP_voc=sum(interpolated) / len(interpolated),
            CP=CP,
            CR=CR,
            CF1=2 * CP * CR / (CP + CR),
            OP=OP,
            OR=OR,
            OF1=2 * OP * OR / (OP + OR),
        )
        got = metrics(scores, truth, threshold)
        for name, value in want.items():
            assert got[name] == pytest.approx(100 * value, abs=1e-3), name
        assert got["left_out"] == 2


def test_metrics_of_nothing_are_zeros_and_no_warning():
    with np.errstate(all="raise"):
        got = metrics(np.full((3, 2), 0.1), np.full((3, 2), -1, np.int8))
    assert got["left_out"] == 2 and not any(
        value for name, value in got.items() if name != "left_out"
    )


def test_scores_of_unknown_cells_change_nothing():
    scores, truth = case(3)
    other = np.where(truth == 0, 1 - scores, scores)
    assert metrics(scores, truth) == metrics(other, truth)
    thresholds = best_thresholds(scores, truth, 2)
    assert np.array_equal(thresholds, best_thresholds(other, truth, 2))
    turned = best_thresholds(scores[::-1].copy(), truth[::-1], 2)  # nor does the images' order
    assert np.allclose(thresholds, turned, rtol=0, atol=1e-6)


def test_best_threshold_by_brute_force():
    for seed in range(20):
        scores, truth = case(seed)
        for c in range(truth.shape[1]):
            s, positive = scores[truth[:, c] != 0, c], truth[truth[:, c] != 0, c] == 1
            if positive.any():
                got = best_threshold(s, positive)
                f1 = lambda t: 2 * (positive & (s >= t)).sum() / ((s >= t).sum() + positive.sum())
                passes = s[s >= got - 1e-6].min()
                assert f1(passes) == max(f1(t) for t in s)
                below = max((t for t in s if t < passes), default=passes)
                assert got == pytest.approx((passes + below) / 2, abs=1e-6)


def test_thresholds_are_means_over_resamples_drawn_towards_a_half():
    logit = lambda p: math.log(max(p, 1e-6) / max(1 - p, 1e-6))
    for seed in range(5):
        scores, truth = case(seed)
        scores = scores.astype(np.float64)
        got = best_thresholds(scores, truth, k=2)
        for c in range(truth.shape[1]):
            s = np.array([logit(p) for p, y in zip(scores[:, c], truth[:, c]) if y])
            positive = np.array([y == 1 for y in truth[:, c] if y])
            if not positive.any() or positive.all():
                assert got[c] == 0.5
                continue
            rng, found, order = np.random.RandomState(0), [], np.lexsort((positive, s))
            s, positive = s[order], positive[order]
            for _ in range(25):
                rows = [rng.randint(len(s)) for _ in range(len(s))]
                if positive[rows].any():
                    found.append(best_threshold(s[rows], positive[rows]))
            n = positive.sum()
            want = n * sum(found) / len(found) / (n + 2)
            assert logit(got[c]) == pytest.approx(want, abs=1e-4)


def test_a_resampled_threshold_moves_less_than_a_single_one():
    """Another draw of thirty labels: the mean over resamples varies less from draw to draw."""
    single, mean = [], []
    for seed in range(100):
        rng = np.random.RandomState(seed)
        truth = np.where(rng.random_sample((30, 1)) < 0.2, 1, -1)
        truth[:2, 0] = 1, -1
        t = truth + rng.randn(30, 1)
        single.append(best_threshold(t[:, 0], truth[:, 0] == 1))
        mean.append(logit_of(best_thresholds(1 / (1 + np.exp(-t)), truth, k=0))[0])
    assert np.std(mean) < 0.85 * np.std(single)


def logit_of(p):
    return np.log(p / (1 - p))


def test_localisation_by_loops():
    rng = np.random.RandomState(0)
    h, w, n, C = 5, 7, 12, 4
    maps = rng.random_sample((n, C, h * w)) - 0.2
    truth = np.full((n, C), -1, np.int8)
    boxes = []
    for i in range(n):
        count = rng.randint(0, 4)
        corner, side = (
            rng.random_sample((count, 2)) * 0.6,
            0.05 + rng.random_sample((count, 2)) * 0.5,
        )
        classes = rng.randint(0, C, count)
        truth[i, classes] = 1
        boxes.append(
            np.concatenate([classes[:, None], corner, np.minimum(corner + side, 1)], 1).astype(
                np.float32
            )
        )
    hits, shares = [], []
    for i in range(n):
        for c in sorted(set(boxes[i][:, 0].astype(int))):
            own = [b[1:] for b in boxes[i] if b[0] == c]
            inside = [
                any(
                    x0 <= (x + 0.5) / w <= x1 and y0 <= (y + 0.5) / h <= y1
                    for x0, y0, x1, y1 in own
                )
                for y in range(h)
                for x in range(w)
            ]
            m = maps[i, c]
            hits.append(inside[max(range(h * w), key=lambda k: m[k])])
            positive = [max(v, 0) for v in m]
            shares.append(sum(v for v, yes in zip(positive, inside) if yes) / sum(positive))
    got = localisation(maps, (h, w), boxes, truth)
    assert got["pointing"] == pytest.approx(100 * sum(hits) / len(hits), abs=0.01)
    assert got["mass"] == pytest.approx(100 * sum(shares) / len(shares), abs=0.01)
    peaks = maps.max(-1)
    assert got["present"] == pytest.approx(peaks[truth == 1].mean(), abs=1e-3)
    assert got["absent"] == pytest.approx(peaks[truth == -1].mean(), abs=1e-3)


def test_an_unknown_category_has_no_peak_that_counts():
    maps = np.array([[[0.1, 0.8], [0.3, 0.2], [0.9, 0.9]]])  # present, absent, unknown
    boxes = [np.array([[0, 0, 0, 1, 1]])]
    got = localisation(maps, (1, 2), boxes, np.array([[1, -1, 0]]))
    assert (got["present"], got["absent"]) == (0.8, 0.3)


@pytest.mark.parametrize("label", (1, -1))
def test_labels_that_are_all_alike_choose_no_threshold(label):
    """A sheet may tell only what is present: the lowest score would pass everything."""
    scores = np.array([[0.9], [0.2], [0.1]], np.float32)
    truth = np.array([[label], [label], [0]], np.int8)
    assert best_thresholds(scores, truth, k=0).tolist() == [0.5]
