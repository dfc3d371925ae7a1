"""A table made from an earlier one's rows against a table that was made in full."""

import numpy as np


def same_rows(found, full, *, atol=1e-5):
    """Assert that two tables have equal rows in one order; floats within `atol`."""
    assert found.schema.equals(full.schema) and found.num_rows == full.num_rows
    for mine, theirs in zip(found.to_pylist(), full.to_pylist(), strict=True):
        for column, value in mine.items():
            if isinstance(value, float) or (
                isinstance(value, list) and value and isinstance(value[0], float)
            ):
                np.testing.assert_allclose(value, theirs[column], atol=atol, err_msg=column)
            else:
                assert value == theirs[column], column
