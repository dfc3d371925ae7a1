"""Tables, lineage, explanations, stored context runs and reports of the store on show."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request, Response
from fastapi.responses import FileResponse

from ..errors import InputError, StoreError
from ..pipelines.explain import explain
from ..storage import Manifest, Store
from .errors import NotServed
from .service import Service
from .stored_context import StoredContexts, whole
from .table_cells import Page, page_of, plain
from .table_list import Damaged, graph, listing, manifest_of, report_of, summary

router = APIRouter(prefix="/v1", tags=["tables"])

REPORT_POLICY = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:;"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""A report is shown without scripts, without this origin's rights, and asks no one."""

Ref = Annotated[str, Path(description="A name, a key, or the first digits of one.")]
Offset = Annotated[int, Query(ge=0, le=10**12)]
Limit = Annotated[int, Query(ge=1, le=200)]


# Plain functions: reading files blocks, so these run in threads.


@router.get("/tables", summary="Tables, newest first")
def tables(
    request: Request,
    offset: Offset = 0,
    limit: Limit = 50,
    step: Annotated[str | None, Query(max_length=100)] = None,
    named: bool = False,
) -> dict[str, Any]:
    """One line a table: step, key, rows, and what was dropped for which reason."""
    found = listing(_store(request))
    chosen = found.newest(step, named)
    rows = [summary(one, found.names.get(one.key, ())) for one in chosen[offset : offset + limit]]
    more = offset + limit < len(chosen)
    return {
        "tables": rows,
        "total": len(chosen),
        "next_offset": offset + limit if more else None,
        "steps": sorted({one.step for one in found.manifests.values()}),
    }


@router.get("/tables/{ref}", summary="A table's manifest")
def table(request: Request, ref: Ref) -> dict[str, Any]:
    """How it was made, from what, by which versions and models; without its files' list."""
    store, manifest = _named(request, ref)
    names = [name for name, key in store.names().items() if key == manifest.key]
    told = manifest.to_dict()
    for field in ("arrow_schema", "parts", "rejects", "format"):
        del told[field]
    return {
        **plain(told),
        "parts": len(manifest.parts),
        "bytes": manifest.bytes,
        "names": sorted(names),
        "report": report_of(manifest),
    }


@router.get("/tables/{ref}/rows", summary="Some rows")
def rows(
    request: Request,
    ref: Ref,
    offset: Offset = 0,
    limit: Limit = 20,
    columns: Annotated[
        str | None, Query(max_length=2000, description="Names with commas between.")
    ] = None,
    cell: Annotated[int, Query(ge=1, le=4000, description="Most characters of a text.")] = 400,
) -> dict[str, Any]:
    """Rows in the table's order; `shortened` says which cells were cut, and their whole size.

    Integers of 64 bits are strings. A page of large rows ends early: go on at `next_offset`.
    """
    store, manifest = _named(request, ref)
    wanted = [name.strip() for name in columns.split(",")] if columns else None
    with _reading(manifest):
        opened = store.table(manifest.key)
        page = page_of(opened, offset, limit, wanted, cell)
    schema = [one for one in manifest.schema if wanted is None or one["name"] in wanted]
    return {"columns": schema, **_paged(page, offset, manifest.rows)}


@router.get("/tables/{ref}/rejects", summary="Rows that could not be used")
def rejects(request: Request, ref: Ref, offset: Offset = 0, limit: Limit = 20) -> dict[str, Any]:
    """Rejected rows with the reason of each; `row` is the row as JSON text."""
    store, manifest = _named(request, ref)
    page = Page()
    with _reading(manifest):
        found = store.table(manifest.key).rejects().slice(offset, limit)
    for row in found.to_pylist():
        page.add(row, frozenset(), 2000)
    return _paged(page, offset, manifest.rejected)


@router.get("/tables/{ref}/lineage", summary="What it was made from")
def lineage(request: Request, ref: Ref, descendants: bool = False) -> dict[str, Any]:
    """Nodes with their depth, and edges from input to table."""
    store, manifest = _named(request, ref)
    found = listing(store)
    found.manifests.setdefault(manifest.key, manifest)
    return plain(graph(found, manifest.key, descendants=descendants))  # type: ignore[no-any-return]


@router.get("/tables/{ref}/explain/{row_id}", summary="What became of a row")
def explained(
    request: Request, ref: Ref, row_id: Annotated[str, Path(max_length=40)]
) -> dict[str, Any]:
    """Every decision about a row or its parts: by which score, threshold and reason."""
    store, manifest = _named(request, ref)
    number = whole(row_id, "a row's id")
    with _reading(manifest):
        try:
            made = explain(store, manifest.key, number)
        except InputError as error:
            raise NotServed(str(error)) from error
    return {**_with_ids(made.as_json()), "lines": made.lines()}


@router.get("/tables/{ref}/questions", summary="Questions of a stored context run")
def questions(request: Request, ref: Ref, offset: Offset = 0, limit: Limit = 100) -> dict[str, Any]:
    """For a table of sentences' signals, or any table made from one."""
    store, manifest = _named(request, ref)
    with _reading(manifest):
        stored = StoredContexts(store, listing(store), manifest.key)
        found = stored.asked(offset, limit)
    total = stored.questions.num_rows
    more = offset + len(found) < total
    return {
        **stored.describe(),
        "questions": found,
        "total": total,
        "next_offset": offset + len(found) if more else None,
    }


@router.get("/tables/{ref}/contexts", summary="Scored sentences of a stored question")
def contexts(
    request: Request,
    ref: Ref,
    question: Annotated[str, Query(max_length=40, description="An id that …/questions gives.")],
) -> dict[str, Any]:
    """The passages of one question with all sentences' scores, and what the run decided."""
    store, manifest = _named(request, ref)
    number = whole(question, "a question's id")
    with _reading(manifest):
        return StoredContexts(store, listing(store), manifest.key).passages(number)


@router.get("/reports/{key}", summary="A report as a page", response_class=Response)
def report(request: Request, key: Annotated[str, Path()]) -> Response:
    """The page of a table that has one; it runs no script and loads nothing."""
    store, manifest = _named(request, key)
    name = report_of(manifest)
    if name is None:
        raise NotServed(f"table `{key}` has no report; its step is `{manifest.step}`.")
    with _reading(manifest):
        path = store.table(manifest.key).attachment(name)
    return FileResponse(
        path,
        media_type="text/html; charset=utf-8",
        headers={"Content-Security-Policy": REPORT_POLICY, "X-Content-Type-Options": "nosniff"},
    )


def _store(request: Request) -> Store:
    service: Service = request.app.state.service
    return service.tables()


def _named(request: Request, ref: str) -> tuple[Store, Manifest]:
    store = _store(request)
    return store, manifest_of(store, ref)


@contextmanager
def _reading(manifest: Manifest) -> Iterator[None]:
    """Tell a damaged file from a table that is not there."""
    try:
        yield
    except StoreError as error:
        raise Damaged(f"table `{manifest.name}` cannot be read: {error}") from error


def _paged(page: Page, offset: int, total: int) -> dict[str, Any]:
    after = offset + len(page.rows)
    return {
        "rows": page.rows,
        "shortened": page.shortened,
        "offset": offset,
        "total": total,
        "next_offset": after if page.rows and after < total else None,
    }


def _with_ids(told: dict[str, Any]) -> dict[str, Any]:
    """Row ids as strings wherever they stand in an explanation."""
    told["row"] = {
        name: str(value) if isinstance(value, int) and not isinstance(value, bool) else value
        for name, value in told["row"].items()
    }
    for verdict in [*told["verdicts"], *told["parts"]]:
        verdict["row"] = str(verdict["row"])
        if verdict["rival"] is not None:
            verdict["rival"] = str(verdict["rival"])
    return plain(told)  # type: ignore[no-any-return]
