"""From a compressed table to the folder that people load, past the gate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import InputError
from ...pruners.models.block_layouts import layout_of
from ...pruners.models.streamed_model import read_config
from ...storage import Manifest, Table, row_id
from .gate import REFUSED
from .model_sizes import PARTS
from .model_tables import model_folder
from .packed_codes import CodesFolder
from .packing import PackOptions, SizeReport, Stored, bits_by_name
from .verify_tables import COMPRESSED_MODEL


def pack_options(table: Table, dtype: Stored, dense: Path | None) -> tuple[Path, PackOptions]:
    """Folder of a compressed table's model, and how it is packed."""
    folder = model_folder(table)
    names = CodesFolder(folder).names()
    layout = layout_of(read_config(folder))
    bits = bits_by_name(table.to_table().to_pylist(), names, layout) if names else {}
    return folder, PackOptions(dtype=dtype, bits=bits, dense=dense)


def check_gate(
    model: Manifest, verify: Manifest, rows: Sequence[Mapping[str, Any]], dtype: str, anyway: bool
) -> None:
    """Refuse to export a model that its verdict refuses, or that the verdict is not about.

    Raises InputError with the figures.
    """
    if model.key not in verify.parents:
        raise InputError(
            f"export_model: expected a verdict about `{model.name}`, found one about another"
            f" model. Name the verify_compression step that has `{model.name}` as its `model`."
        )
    judged = verify.options.get("dtype", "source")
    if judged != dtype:
        raise InputError(
            f"export_model: expected the dtype that was judged ({judged}), found {dtype}. Give"
            " both steps the same `dtype`."
        )
    row = next(row for row in rows if row["role"] == COMPRESSED_MODEL)
    if row["verdict"] == REFUSED and not anyway:
        raise InputError(
            f"export_model: expected a model that passes its gate; `{model.name}` is refused:"
            f" {'; '.join(row['reasons'])}. Compress less, recover it, raise `tolerance`, or say"
            " `anyway: true`."
        )


def size_rows(report: SizeReport) -> list[dict[str, Any]]:
    """Rows of `verify_tables.EXPORTED`: each part, then the whole folder."""
    before, after = report.before, report.after
    made: list[dict[str, Any]] = [
        {
            "part": part,
            "bytes_before": before.parts[part].bytes,
            "bytes_after": after.parts[part].bytes,
            "parameters_before": before.parts[part].parameters,
            "parameters_after": after.parts[part].parameters,
            "zeros": after.parts[part].zeros,
        }
        for part in PARTS
    ]
    made.append(
        {
            "part": "files",
            "bytes_before": before.file_bytes,
            "bytes_after": after.file_bytes,
            "parameters_before": before.total.parameters,
            "parameters_after": after.total.parameters,
            "zeros": after.total.zeros,
        }
    )
    return [{"id": row_id("export_model", row["part"]), **row} for row in made]
