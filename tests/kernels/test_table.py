"""The layout that host and kernels agree on."""

import triton.language as tl

from dragon.kernels import table


def test_each_table_has_its_columns_once_and_rows_of_whole_loads() -> None:
    columns: list[int] = []
    for name, value in vars(table).items():
        if not isinstance(value, tl.constexpr) or name == "ABSENT":
            continue
        if name != "COUNTS" and not name.endswith("_COLUMNS"):
            columns.append(value.value)
            continue
        assert columns == list(range(len(columns))), name
        together = {"TENSOR_COLUMNS": 2, "SCALAR_COLUMNS": 4}.get(name, 1)
        assert value.value == -(-len(columns) // together) * together, name
        columns = []
