"""Farthest-first choice: each row chosen is the one furthest from those chosen before it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ...errors import InputError
from ..contract import BoolArray, FloatArray, IntArray

# The distance of the first row chosen: above any cosine distance, which ends at 2.
FIRST = np.float32(3.0)
# float32 unit vectors miss a cosine of 1 by a few ulps: what is nearer than this is a copy.
SAME = np.float32(1e-6)
CHOSEN = np.float32(-1.0)

# Coordinates are rounded to multiples of 2**-26. A product is then a multiple of 2**-52, and the
# sums of a product of unit rows stay below 2: float64 holds each of them without rounding, in
# whatever order they are added.
GRID = 2.0**26
ROWS = 512  # of a block that is compared with many centres at once
CENTRES = 2048  # in one product: 4 MiB of float32 similarities
POOL = (1024, 8, 64)  # the smallest pool; it doubles below 8 picks and halves above 64
ACTIVE = 8192  # rows of a pool that are compared with every pick
LONGEST = 1.01  # squared length that still counts as that of a unit row

Wide = npt.NDArray[np.float64]
Border = tuple[np.float32, int]


def farthest_first(
    vectors: FloatArray,
    count: int,
    *,
    start: int | None = None,
    device: str | None = None,
    distances: bool = True,
) -> tuple[IntArray, FloatArray, IntArray]:
    """Choose `count` rows, each the furthest from all those before it, ties to the first row.

    The greedy k-center of Gonzalez (1985) that core sets use (arXiv:1708.00489), exactly, on
    cosine distance max(0, 1 - <x, y>), 0 below 1e-6. Cosine and Euclidean distance rank unit
    rows alike.

    The distance of a pair is the float32 next to its value in exact arithmetic, coordinates
    rounded to multiples of 2**-26 first (which moves a distance by 1e-8, by 3e-7 at worst for
    384 coordinates). So neither the blocks below nor the BLAS, the threads or the order of
    rows decide between near-equal rows. float32 products only tell which pairs can matter: they
    carry a margin that covers their worst rounding error, and what is within it is computed
    again.

    What is known of a row is its distance to the centres it was compared with, a bound from
    above for the others. Only rows whose bound is at the top are brought up to date, by one
    product with the centres that they have not met; picks are made among them for as long as
    the best is ahead of every bound outside. At worst (spread rows) all N * count pairs are
    compared, in matrix products that read a row once for many centres, where a running minimum
    reads all rows for each.

    Memory beside `vectors`: about 50 bytes a row, 12 * d bytes a choice, and blocks of 10,000 rows.

    Parameters
    ----------
    vectors
        (N, d) float32 unit rows; a row of zeros is at distance 1 from every row, itself too.
    count
        Rows to choose, 0 to N.
    start
        Position of the first; None = the row nearest to the mean direction.
    device
        A torch device. "cuda" runs a plain loop of `kernels.k_center_step` there, in float32:
        rows whose distances differ by less than its rounding (1e-7) may change places.
    distances
        False leaves out the last pass: `distance` of rows not chosen is then a bound from above
        and `nearest` the row that gave it.

    Returns
    -------
    chosen
        (count,) int64, positions in the order of choice.
    distance
        (N,) float32 cosine distance to the rows chosen before it, for a chosen row, and to all
        chosen rows, for any other; 3 for the first one, and everywhere where `count` is 0.
    nearest
        (N,) int64, the chosen row that `distance` is to, the one chosen first among equals; the
        first chosen row has itself, and -1 stands everywhere where `count` is 0.

    Raises
    ------
    InputError
        Not a float32 matrix, a row longer than 1 or not finite, `count` or `start` out of range.
    """
    _check(vectors, count, start)
    n = len(vectors)
    if not count:
        return np.zeros(0, np.int64), np.full(n, FIRST), np.full(n, -1, np.int64)
    first = nearest_to_mean(vectors) if start is None else start
    if device is not None and not device.startswith("cpu"):
        return _plain_loop(vectors, count, first, device)
    cover = _Cover(vectors, count)
    cover.choose(first, FIRST)
    cover.refresh(np.arange(n))
    smallest, few, many = POOL
    pool = smallest
    while cover.made < count:
        before = cover.made
        rows, border = cover.top(pool)
        cover.refresh(rows)
        cover.pick(rows, border)
        picks = cover.made - before
        if picks < few:
            pool = min(2 * pool, n)
        elif picks > many:
            pool = max(smallest, pool // 2)
    if distances:
        cover.refresh(np.flatnonzero(cover.distance > 0.0))
    distance = cover.distance
    distance[cover.chosen] = cover.picked
    return cover.chosen, distance, cover.chosen[cover.number]


def nearest_to_mean(vectors: FloatArray) -> int:
    """Position of the row of the highest cosine to the mean of all, ties to the first.

    `vectors` (N, d) float32 unit rows, N > 0. The mean is summed without rounding, so the order
    of rows does not matter; its direction is rounded as the rows are.
    """
    total = np.zeros(vectors.shape[1])
    for start in range(0, len(vectors), ROWS):
        total += _grid(vectors[start : start + ROWS]).sum(axis=0)
    length = np.sqrt(np.square(total).sum())
    if length == 0.0:
        return 0
    direction = total / length
    rough = vectors @ direction.astype(np.float32)
    near = np.flatnonzero(rough >= rough.max() - 2 * _margin(vectors.shape[1]))
    best, place = -np.inf, 0
    for start in range(0, len(near), ROWS):
        rows = near[start : start + ROWS]
        exact = _grid(vectors[rows]) @ _grid(direction)
        if exact.max() > best:
            best, place = exact.max(), int(rows[exact.argmax()])
    return place


class _Cover:
    """Rows, the centres chosen so far, and what is known of each row's distance to them."""

    def __init__(self, points: FloatArray, count: int) -> None:
        n, size = points.shape
        self.points = points
        self.count = count
        self.made = 0
        self.chosen = np.zeros(count, np.int64)
        self.picked = np.zeros(count, np.float32)
        self.centres = np.zeros((count, size), np.float32)
        self.fine = np.zeros((count, size))  # the centres on the grid
        self.distance = np.full(n, FIRST)  # to the centres seen; -1 once chosen
        self.number = np.zeros(n, np.int32)  # of the centre that gave the distance
        self.seen = np.zeros(n, np.int32)  # how many centres the row was compared with
        self.margin = np.float32(_margin(size))

    def choose(self, row: int, distance: np.float32) -> None:
        """Make `row` the next centre."""
        self.chosen[self.made], self.picked[self.made] = row, distance
        self.centres[self.made] = self.points[row]
        self.fine[self.made] = _grid(self.points[row])
        self.distance[row] = CHOSEN
        self.made += 1

    def top(self, size: int) -> tuple[IntArray, Border]:
        """The `size` rows of the highest bounds, ascending, and the first row after them.

        Rows are ranked by (bound, smaller position); so is the border.
        """
        n = len(self.distance)
        left = n - self.made
        if size >= left:
            return np.flatnonzero(self.distance >= 0.0), (CHOSEN, n)
        value = np.partition(self.distance, n - size)[n - size]
        inside = np.flatnonzero(self.distance > value)
        tied = np.flatnonzero(self.distance == value)
        taken = size - len(inside)
        border = int(tied[taken]) if taken < len(tied) else n
        return np.sort(np.concatenate([inside, tied[:taken]])), (value, border)

    def pick(self, rows: IntArray, border: Border) -> None:
        """Choose among `rows`, which are up to date, while the best is ahead of the border."""
        active = rows[self._ahead(rows, border)]
        if len(active) > ACTIVE:
            order = np.lexsort((active, -self.distance[active]))
            cut = active[order[ACTIVE]]
            border = (self.distance[cut], int(cut))
            active = np.sort(active[order[:ACTIVE]])
        vectors = self.points[active]
        while self.made < self.count and len(active):
            left = self._ahead(active, border)
            if not left.any():
                return
            if 2 * left.sum() < len(active):
                active, vectors = active[left], vectors[left]
            known = self.distance[active]
            best = known.argmax()  # the first of equals
            if known[best] == 0.0:
                self._choose_copies()
                return
            self.choose(int(active[best]), known[best])
            self._compare(active, vectors, self.made - 1)

    def refresh(self, rows: IntArray) -> None:
        """Compare `rows`, none of them chosen, with the centres that they have not met."""
        rows = rows[(self.seen[rows] < self.made) & (self.distance[rows] > 0.0)]
        rows = rows[np.argsort(self.seen[rows], kind="stable")]
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            self._compare(part, self.points[part], int(self.seen[part[0]]))

    def _ahead(self, rows: IntArray, border: Border) -> BoolArray:
        """Which rows come before the border, (len(rows),)."""
        value, place = border
        known = self.distance[rows]
        ahead = (known > value) | ((known == value) & (rows < place))
        return np.asarray(ahead, np.bool_)

    def _choose_copies(self) -> None:
        """Every row left is at distance 0: choose the first ones."""
        for row in np.flatnonzero(self.distance >= 0.0)[: self.count - self.made]:
            self.choose(int(row), np.float32(0.0))

    def _compare(self, rows: IntArray, vectors: FloatArray, first: int) -> None:
        """Take in the centres from number `first` on; vectors = points[rows]."""
        for begin in range(first, self.made, CENTRES):
            end = min(begin + CENTRES, self.made)
            rough = vectors @ self.centres[begin:end].T
            known = self.distance[rows]
            best = rough.max(axis=1)
            # What is less similar than this can neither be the nearest nor nearer than before.
            least = np.maximum(1.0 - known, best - self.margin) - self.margin
            least[known == 0.0] = np.inf
            if (best >= least).any():
                self._settle(rows, vectors, rough, least, begin)
        self.seen[rows] = self.made

    def _settle(
        self, rows: IntArray, vectors: FloatArray, rough: FloatArray, least: FloatArray, begin: int
    ) -> None:
        """Exact distances of the pairs that may matter; the nearest centre of each row wins."""
        width = rough.shape[1]
        pair = np.flatnonzero(rough >= least[:, None])
        if len(pair) > 8 * ROWS:
            # Rows about as near to one another as float32 can tell: all pairs, exactly.
            row = np.flatnonzero(np.isfinite(least))
            away = _distance(_grid(vectors[row]) @ self.fine[begin : begin + width].T)
            column = away.argmin(axis=1)
            value = away[np.arange(len(row)), column]
        else:
            row, column = np.divmod(pair, width)
            fine = self.fine[begin + column]
            value = _distance(np.einsum("ij,ij->i", _grid(vectors[row]), fine))
            order = np.lexsort((column, value, row))
            order = order[np.flatnonzero(np.diff(row[order], prepend=-1))]
            row, column, value = row[order], column[order], value[order]
        where = rows[row]
        closer = value < self.distance[where]
        where = where[closer]
        self.distance[where] = value[closer]
        self.number[where] = begin + column[closer]


def _grid(values: npt.NDArray[np.floating]) -> Wide:
    """`values` in units of 2**-26, rounded to whole ones."""
    return np.rint(values.astype(np.float64) * GRID)


def _distance(products: Wide) -> FloatArray:
    """Cosine distance from products of rows on the grid."""
    away = (1.0 - products / GRID**2).astype(np.float32)
    away[away < SAME] = 0.0
    return away


def _margin(size: int) -> float:
    """Bound on how far a float32 product of unit rows is from where its distance points to.

    size * 2**-24 bounds the rounding of products and sums in any order; the rest holds the
    rows' length, the grid, the rounding of a distance, and SAME.
    """
    return (1.1 * size + 32) * 2.0**-24


def _check(vectors: FloatArray, count: int, start: int | None) -> None:
    if vectors.ndim != 2 or vectors.dtype != np.float32:
        raise InputError(
            "vectors are a float32 matrix (N, d);"
            f" found shape {vectors.shape} of {vectors.dtype}. Convert with astype(np.float32)."
        )
    n = len(vectors)
    if not 0 <= count <= n:
        raise InputError(f"count lies between 0 and the {n} rows; found {count}.")
    if start is not None and not 0 <= start < n:
        raise InputError(f"start is the position of one of the {n} rows; found {start}.")
    for begin in range(0, n, ROWS):
        part = vectors[begin : begin + ROWS]
        long = np.flatnonzero(~(np.einsum("ij,ij->i", part, part) <= LONGEST))
        if len(long):
            raise InputError(
                "vectors are unit rows (or zero); found one that is longer or not finite at"
                f" row {begin + long[0]}. Divide each row by its length."
            )


def _plain_loop(
    vectors: FloatArray, count: int, first: int, device: str
) -> tuple[IntArray, FloatArray, IntArray]:
    """A running minimum on `device`, which waits for nothing until the end."""
    import torch

    from ...kernels import k_center_step

    points = torch.tensor(vectors, device=device)
    distance = points.new_full((len(points),), float(FIRST))
    nearest = torch.zeros_like(distance, dtype=torch.int64)
    chosen = torch.zeros(count, dtype=torch.int64, device=device)
    picked = points.new_full((count,), float(FIRST))
    row = torch.tensor([first], device=device)
    for number in range(count):
        chosen[number : number + 1] = row
        distance[row] = float(CHOSEN)
        centre = points.index_select(0, row).squeeze(0)
        step = k_center_step(points, centre, distance, nearest=nearest, number=number)
        row = step.index.reshape(1)
        if number + 1 < count:
            picked[number + 1] = step.distance
    distance[chosen] = picked
    return chosen.cpu().numpy(), distance.cpu().numpy(), chosen[nearest].cpu().numpy()
