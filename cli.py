"""The command line: a thin face over flows and pipelines.

Heavy modules are imported inside the commands, so that `prunery --help` answers at once.
Exit codes: 0 done; 1 the work failed; 2 the input, recipe or arguments are wrong; 130 stopped.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ._version import __version__
from .errors import InputError, PruneryError

if TYPE_CHECKING:
    from .pipelines.progress import Progress
    from .storage import Manifest, Store

FAILED, WRONG_INPUT, STOPPED = 1, 2, 130

app = typer.Typer(
    name="prunery",
    help="Prune what a model reads: retrieved contexts, samples, tokens, prompts, weights.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help answers sooner and reads the same in a pipe
)
train_app = typer.Typer(help="Train the networks that pruning uses.", no_args_is_help=True)
evaluate_app = typer.Typer(help="Measure pruning on labelled data.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(evaluate_app, name="evaluate")

StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URI",
        help="Folder or s3://bucket/prefix of the store. [default: PRUNERY_STORE or"
        " ./prunery-store]",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a recipe's key; repeatable."),
]
RecipeArgument = Annotated[str, typer.Argument(help="A bundled recipe's name, or a YAML file.")]
WorkersOption = Annotated[
    int, typer.Option(min=1, help="Processes or Ray actors that share a step's shards.")
]
EngineOption = Annotated[
    str, typer.Option(metavar="processes|ray", help="Who makes the shards of a step.")
]
RayAddressOption = Annotated[
    str | None,
    typer.Option(
        metavar="auto|ADDRESS", help="Ray cluster to use. [default: one started on this machine]"
    ),
]
GpusOption = Annotated[float, typer.Option(min=0.0, help="GPUs that each Ray actor asks for.")]
FreshOption = Annotated[
    bool, typer.Option("--fresh", help="Score all rows, also those an earlier table holds.")
]
TableArgument = Annotated[
    str, typer.Argument(metavar="TABLE", help="A table's name, key, or the start of its key.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prunery {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    recipe: RecipeArgument,
    settings: SetOption = None,
    store: StoreOption = None,
    plain: Annotated[bool, typer.Option("--plain", help="Run without Prefect.")] = False,
    workers: WorkersOption = 1,
    engine: EngineOption = "processes",
    ray_address: RayAddressOption = None,
    gpus: GpusOption = 0.0,
    fresh: FreshOption = False,
    as_json: JsonOption = False,
) -> None:
    """Run a recipe: every step whose table does not exist yet, in order.

    Under Prefect: on the server that PREFECT_API_URL names, else on an ephemeral one.
    """
    from .pipelines.recipe import apply_overrides, load_recipe
    from .pipelines.workers import Workers

    loaded = apply_overrides(load_recipe(recipe), settings or [])
    target = _store(store)
    made = Workers(engine, workers, ray_address=ray_address, gpus=gpus)  # type: ignore[arg-type]
    with _progress(quiet=as_json) as progress:
        if plain:
            from .pipelines.run import run_recipe

            result = run_recipe(loaded, target, progress=progress, workers=made, reuse=not fresh)
        else:
            from .flows.run import run_flow

            result = run_flow(loaded, target, progress=progress, workers=made, reuse=not fresh)
    if as_json:
        _print_json(result.as_json())
        return
    for line in result.lines():
        typer.echo(line)


@app.command()
def deploy(
    recipe: RecipeArgument,
    name: Annotated[str | None, typer.Option(help="[default: the recipe's name]")] = None,
    cron: Annotated[str | None, typer.Option(help='When to run, such as "0 4 * * *".')] = None,
    interval: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="From one start to the next.")
    ] = None,
    timezone: Annotated[str | None, typer.Option(help="Of --cron. [default: UTC]")] = None,
    settings: SetOption = None,
    store: StoreOption = None,
    workers: WorkersOption = 1,
    engine: EngineOption = "processes",
    ray_address: RayAddressOption = None,
    gpus: GpusOption = 0.0,
    fresh: FreshOption = False,
    limit: Annotated[int, typer.Option(min=1, help="Runs at one time.")] = 1,
    enqueue: Annotated[
        bool, typer.Option("--enqueue", help="Runs beyond --limit wait; else they are cancelled.")
    ] = False,
    pool: Annotated[
        str | None,
        typer.Option(metavar="WORKPOOL", help="Work pool whose workers run it."),
    ] = None,
    serve_here: Annotated[
        bool, typer.Option("--serve", help="Run it in this process, until stopped.")
    ] = False,
) -> None:
    """Put a recipe on a schedule, on the Prefect server that PREFECT_API_URL names.

    With --pool the workers of that pool run it and this command returns; else, or with --serve,
    this process waits and runs it.
    """
    from .flows.deployments import Schedule, deployment, register, serve_deployment
    from .pipelines.workers import Workers
    from .storage import Store

    if pool is not None and serve_here:
        raise InputError("a deployment runs in a work pool or here: give --pool or --serve.")
    made = deployment(
        recipe,
        store or Store.default_uri(),
        schedule=Schedule(
            cron=cron,
            interval=interval,
            timezone=timezone,
            limit=limit,
            overlap="enqueue" if enqueue else "cancel",
        ),
        name=name,
        overrides=settings or [],
        workers=Workers(engine, workers, ray_address=ray_address, gpus=gpus),  # type: ignore[arg-type]
        reuse=not fresh,
    )
    if pool is None:
        serve_deployment(made, limit=limit)
        return
    register(made, pool)
    typer.echo(f"{made.flow_name}/{made.name} is in the work pool {pool}; a worker of it runs it:")
    typer.echo(f"  prefect worker start --pool {pool}")
    typer.echo(f"  prefect deployment run '{made.flow_name}/{made.name}'")


@app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="A bundled recipe's name, or a YAML file.")],
    settings: SetOption = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a run would do: which steps are done, and what the others would ask a model.

    Exact numbers of prompts and queries for steps that search for a prompt; tokens and money at
    most. Nothing is asked; data, few-shot rows and words are read and stored to count them.
    """
    from .pipelines.prompts.plan import plan_recipe
    from .pipelines.recipe import apply_overrides, load_recipe

    loaded = apply_overrides(load_recipe(recipe), settings or [])
    with _progress(quiet=as_json) as progress:
        made = plan_recipe(loaded, _store(store), progress=progress)
    if as_json:
        _print_json(made.as_json())
        return
    for line in made.lines():
        typer.echo(line)


@app.command()
def prune(
    question: Annotated[str | None, typer.Argument(help="What the passages should answer.")] = None,
    passages: Annotated[
        list[str] | None, typer.Argument(help="Passages; without any, --passages or stdin.")
    ] = None,
    question_file: Annotated[
        Path | None, typer.Option("--question-file", help="Read the question from a file.")
    ] = None,
    passages_file: Annotated[
        str | None,
        typer.Option(
            "--passages",
            metavar="FILE",
            help="JSON lines (a string, or an object with `text` and maybe `title`), or plain"
            " text with passages divided by blank lines; - for standard input.",
        ),
    ] = None,
    model: Annotated[
        str, typer.Option(help="`default`, a folder, or a model id of the hub.")
    ] = "default",
    threshold: Annotated[
        float | None, typer.Option(help="Sentences scoring above it stay. [default: the model's]")
    ] = None,
    aggregation: Annotated[
        str | None, typer.Option(help="Token to sentence: mean or vote. [default: the model's]")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Return only the best passages.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Budget of kept tokens over all.")] = None,
    min_sentences: Annotated[int, typer.Option(help="Keep at least so many a passage.")] = 0,
    protect: Annotated[
        list[str] | None,
        typer.Option(metavar="REGEX", help="Sentences that match are kept; repeatable."),
    ] = None,
    on_empty: Annotated[
        str, typer.Option(help="A passage with nothing kept: empty, top1 or original.")
    ] = "empty",
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    as_json: JsonOption = False,
) -> None:
    """Rerank and prune passages for one question, without a store."""
    asked, texts, titles = _prune_input(question, passages, question_file, passages_file)
    from .pruners.context import ContextPruner

    pruner = ContextPruner.from_pretrained(model, device=device)
    results = pruner.prune(
        asked,
        texts,
        titles=titles,
        threshold=threshold,
        aggregation=aggregation,  # type: ignore[arg-type]  # refused by name inside
        top_k=top_k,
        max_tokens=max_tokens,
        min_sentences=min_sentences,
        protect=tuple(protect or ()),
        on_empty=on_empty,  # type: ignore[arg-type]
    )
    if as_json:
        _print_json([_plain(result) for result in results])
        return
    for result in results:
        typer.echo(
            f"[{result.index}] relevance {result.relevance:.3f}, {result.tokens_out} of"
            f" {result.tokens_in} tokens kept"
        )
        if result.text.strip():
            typer.echo("    " + result.text.strip().replace("\n", "\n    "))
    before = sum(result.tokens_in for result in results)
    after = sum(result.tokens_out for result in results)
    removed = 1 - after / before if before else 0.0
    typer.echo(f"{len(results)} passages, {before} -> {after} tokens ({removed:.0%} removed)")


@app.command()
def serve(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8080,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PATH_OR_ID",
            help="A folder or hub id under the name that requests use; the first is the default;"
            " repeatable. [default: default=default, the shipped model]",
        ),
    ] = None,
    store: Annotated[
        str | None, typer.Option(metavar="URI", help="Show this store's tables and reports.")
    ] = None,
    prefect_url: Annotated[
        str | None, typer.Option(metavar="URL", help="Start runs on this Prefect server's API.")
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="API keys, one a line; read again when it changes."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 …")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16.")] = None,
    backend: Annotated[str, typer.Option(help="torch, or onnx (CPU).")] = "torch",
    workers: Annotated[
        int | None, typer.Option(min=1, help="Batch threads a model. [default: fits the device]")
    ] = None,
    batch_wait: Annotated[
        float | None,
        typer.Option(
            min=0, metavar="SECONDS", help="How long a batch may wait. [default: fits the device]"
        ),
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Longest answer. [default: 30]")
    ] = None,
    max_queue: Annotated[
        int | None,
        typer.Option(min=1, metavar="TOKENS", help="Most that waits. [default: 1000000]"),
    ] = None,
    max_passages: Annotated[
        int | None, typer.Option(min=1, help="Most in a request. [default: 1000]")
    ] = None,
    max_characters: Annotated[
        int | None,
        typer.Option(min=100, help="Most in all passages of a request. [default: 1000000]"),
    ] = None,
    drain: Annotated[
        float, typer.Option(min=0, metavar="SECONDS", help="For requests to end on SIGTERM.")
    ] = 20.0,
) -> None:
    """Serve pruning and reranking over HTTP, with a page for people.

    PREFECT_API_KEY is sent to the Prefect server where it is set.
    """
    from .api.settings import Limits, Settings

    asked = {
        "seconds": timeout,
        "queued_tokens": max_queue,
        "passages": max_passages,
        "characters": max_characters,
    }
    settings = Settings(
        host=host,
        port=port,
        models=_models(model or ["default=default"]),
        device=device,
        dtype=dtype,
        backend=backend,
        workers=workers,
        batch_wait_seconds=batch_wait,
        store=store,
        prefect_url=prefect_url,
        prefect_key=os.environ.get("PREFECT_API_KEY"),
        keys_file=keys,
        drain_seconds=drain,
        limits=Limits(**{k: v for k, v in asked.items() if v is not None}),  # type: ignore[arg-type]
    )
    try:
        from .api.server import serve as run_server
    except ImportError as error:
        raise InputError(
            f"the service needs a package that is not installed ({error.name}):"
            " pip install 'prunery[serve]'."
        ) from error
    run_server(settings, ready=lambda url: typer.echo(f"prunery listens on {url}"))


def _models(given: Sequence[str]) -> dict[str, str]:
    made: dict[str, str] = {}
    for one in given:
        name, equals, source = one.partition("=")
        if not equals or not name or not source:
            raise InputError(f"--model must be NAME=PATH_OR_ID; found {one!r}.")
        if name in made:
            raise InputError(f"--model names {name!r} twice.")
        made[name] = source
    return made


@app.command()
def methods(
    as_json: JsonOption = False,
    as_markdown: Annotated[
        bool, typer.Option("--markdown", help="Print the README's table.")
    ] = False,
) -> None:
    """List every method: what it prunes, what it needs, how its budget is given."""
    from .pruners.catalogue import METHODS, describe, markdown_table

    if as_markdown:
        typer.echo(markdown_table())
        return
    rows = [describe(name) for name in METHODS]
    if as_json:
        _print_json(rows)
        return
    _table(
        ("method", "unit", "budget", "signals", "what it does"),
        [
            (
                row["name"],
                row["unit"],
                f"{row['budget']}={row['default']}",
                ", ".join(row["needs"]),
                row["about"],
            )
            for row in rows
        ],
    )


@app.command()
def ls(store: StoreOption = None, as_json: JsonOption = False) -> None:
    """List the store's tables: names first, then tables that no name points to."""
    opened = _store(store)
    named = opened.names()
    names_of: dict[str, list[str]] = {}
    for name, key in named.items():
        names_of.setdefault(key, []).append(name)
    manifests = sorted(opened.tables(), key=lambda m: (m.key not in names_of, m.created))
    if as_json:
        _print_json([{**_summary(m), "names": names_of.get(m.key, [])} for m in manifests])
        return
    _table(
        ("name", "step", "key", "rows", "kept", "dropped", "created"),
        [
            (
                ", ".join(names_of.get(m.key, ())) or "-",
                m.step,
                m.key[:12],
                m.rows,
                m.kept,
                sum(m.dropped.values()),
                str(m.created)[:19],
            )
            for m in manifests
        ],
    )


@app.command()
def show(
    table: TableArgument,
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 5,
    rejects: Annotated[
        bool, typer.Option("--rejects", help="Rejected rows, with their reasons.")
    ] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show a table's manifest and its first rows."""
    opened = _store(store)
    manifest = opened.manifest(table)
    if rejects:
        first = opened.table(manifest.key).rejects().slice(0, rows).to_pylist()
    else:
        first = _first_rows(opened, manifest, rows)
    if as_json:
        _print_json({"manifest": _plain(manifest), "rows": first})
        return
    for name, value in _summary(manifest).items():
        typer.echo(f"{name:>12}  {value}")
    typer.echo(f"{'schema':>12}  " + ", ".join(_columns(opened, manifest)))
    for row in first:
        typer.echo("")
        for name, value in row.items():
            typer.echo(f"{name:>20}  {_short(value)}")


@app.command()
def explain(
    table: TableArgument,
    row_id: Annotated[str, typer.Argument(help="The row's id, as `show` prints it.")],
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say what became of a row: which step dropped it, by which score, threshold and reason."""
    from .pipelines.explain import explain as explain_row

    explanation = explain_row(_store(store), table, _row_id(row_id))
    if as_json:
        _print_json(explanation.as_json())
        return
    for line in explanation.lines():
        typer.echo(line)


@app.command()
def lineage(table: TableArgument, store: StoreOption = None, as_json: JsonOption = False) -> None:
    """Show what a table was made from, first ancestors first."""
    manifests = _store(store).lineage(table)
    if as_json:
        _print_json([{**_summary(m), "parents": list(m.parents)} for m in manifests])
        return
    for manifest in manifests:
        parents = ", ".join(key[:12] for key in manifest.parents) or "source"
        typer.echo(
            f"{manifest.key[:12]}  {manifest.name} ({manifest.step}), {manifest.rows} rows"
            f"  <- {parents}"
        )


@app.command()
def verify(
    table: Annotated[str | None, typer.Argument(help="A table; without one, all.")] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Re-hash everything that manifests list; exit 1 where anything differs."""
    opened = _store(store)
    checked = [opened.manifest(table)] if table else list(opened.tables())
    problems = opened.verify(table)
    if as_json:
        _print_json({"tables": len(checked), "problems": [_plain(p) for p in problems]})
    else:
        for problem in problems:
            typer.echo(str(problem), err=True)
        typer.echo(f"{len(checked)} tables checked, {len(problems)} problems")
    if problems:
        raise typer.Exit(FAILED)


@app.command()
def gc(
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would go.")] = False,
    older_than: Annotated[
        float, typer.Option(min=0, metavar="HOURS", help="Spare anything younger.")
    ] = 24.0,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete unfinished work and tables that no name, nor its lineage, reaches."""
    report = _store(store).gc(dry_run=dry_run, older_than_seconds=older_than * 3600)
    if as_json:
        _print_json(_plain(report))
        return
    for item in report.what:
        typer.echo(str(item))
    verb = "would be freed" if dry_run else "freed"
    typer.echo(f"{len(report.what)} items, {report.bytes / 2**20:.1f} MiB {verb}")


@app.command()
def report(
    table: Annotated[str, typer.Argument(help="A report's name or key.")] = "report",
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Copy it there. [default: print its path]")
    ] = None,
    store: StoreOption = None,
) -> None:
    """Find the HTML report of a run."""
    path = _store(store).table(table).attachment("report.html")
    if out is None:
        typer.echo(str(path))
        return
    out.write_bytes(path.read_bytes())
    typer.echo(str(out))


@app.command()
def export(
    table: TableArgument,
    format: Annotated[
        str,
        typer.Option(
            help="Of export_sft: trl, trainer, axolotl, llama-factory, open-instruct, olmo-core or"
            " rows. Of prune_dataset: rows, ids or imagefolder."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write; must be empty.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="Folder or hub id of the tokenizer, checked and saved beside the rows."),
    ] = None,
    chats: Annotated[
        str | None, typer.Option(help="Table of read_chats, for rows. [default: its ancestor]")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="Table of read_dataset, for prune_dataset. [default: its ancestor]"),
    ] = None,
    teacher: Annotated[
        str | None,
        typer.Option(help="Table of teacher_outputs: its log probabilities stand beside the rows."),
    ] = None,
    jsonl: Annotated[bool, typer.Option("--jsonl", help="JSON lines instead of Parquet.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace what is in the folder.")] = False,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write a selection for a trainer: a table of export_sft, or a decision of prune_dataset."""
    from .pipelines import dataset_export

    opened = _store(store)
    of_dataset = opened.manifest(table).step in dataset_export.STEPS
    foreign: dict[str, object] = {"data": data, "teacher": teacher}
    if of_dataset:
        foreign = {"tokenizer": tokenizer, "chats": chats, "jsonl": jsonl}
    given = [f"--{name}" for name, value in foreign.items() if value]
    if given:
        kind = "rows of a data set" if of_dataset else "fine-tuning samples"
        raise InputError(f"{', '.join(given)}: `{table}` is about {kind}. Leave it out.")
    if of_dataset:
        result = dataset_export.write_dataset_export(
            opened,
            table,
            out,
            format=format,  # type: ignore[arg-type]  # refused by name inside
            data=data,
            teacher=teacher,
            force=force,
        )
        line = "{rows} of {decided_rows} training rows, {test_rows} held out"
    else:
        from .pipelines.sft_export import write_export
        from .pruners.models.tokenizers import load_tokenizer, tokenizer_folder

        result = write_export(
            opened,
            table,
            out,
            format=format,  # type: ignore[arg-type]  # refused by name inside
            chats=chats,
            tokenizer=load_tokenizer(tokenizer_folder(tokenizer)) if tokenizer else None,
            jsonl=jsonl,
            force=force,
        )
        line = "{rows} samples, {trained_tokens} of {tokens} tokens trained"
    if as_json:
        _print_json(result.manifest)
        return
    typer.echo(f"{out / result.manifest['data']}: {line.format(**result.manifest)}")


@app.command()
def doctor(
    models: Annotated[
        list[str] | None,
        typer.Option("--model", help="A context pruner that must load; repeatable."),
    ] = None,
    store: StoreOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check the machine, the store, models and Prefect, and say what to do; exit 1 on a failure."""
    from .pipelines.doctor import examine
    from .storage import Store

    made = []
    for one in examine(
        store or Store.default_uri(),
        models=models or ["default"],
        prefect_url=os.environ.get("PREFECT_API_URL"),
    ):
        made.append(one)
        if not as_json:
            typer.echo(f"{one.state:>4}  {one.name:<14}  {one.found}")
            if one.advice:
                typer.echo(f"{'':>22}{one.advice}")
    if as_json:
        _print_json([_plain(one) for one in made])
    if any(one.state == "fail" for one in made):
        raise typer.Exit(FAILED)


@train_app.command("provence")
def train_provence(
    rows: Annotated[Path, typer.Option(help="Training rows, JSON lines or Parquet.")],
    out: Annotated[Path, typer.Option(help="Folder of the trained model; resumed if begun.")],
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train a Provence: one encoder that reranks passages and prunes their sentences.

    Killed and started again with the same --out, it goes on from its last checkpoint.
    """
    import yaml

    from .pipelines.train_provence import TrainProvenceOptions
    from .pipelines.train_provence import train_provence as train

    _log_to_stderr()
    given = {key: yaml.safe_load(value) for key, value in _pairs(settings)}
    result = train(_validated(TrainProvenceOptions, {**given, "rows": rows, "output": out}))
    if as_json:
        _print_json(_plain(result))
        return
    for name, value in _plain(result).items():
        typer.echo(f"{name:>24}  {_short(value)}")


@evaluate_app.command("context")
def evaluate_context(
    rows: Annotated[
        list[str], typer.Option(help="Labelled rows, JSON lines or Parquet; repeatable.")
    ],
    model: Annotated[str, typer.Option(help="`default`, a folder, or a hub id.")] = "default",
    settings: SetOption = None,
    store: StoreOption = None,
    workers: Annotated[int, typer.Option(min=1, help="Processes over shards.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Evidence kept against text removed, for a model and every baseline, with intervals."""
    import yaml

    from .pipelines.evaluate_context import EvaluateContextOptions
    from .pipelines.evaluate_context import evaluate_context as evaluate

    given = {key: yaml.safe_load(value) for key, value in _pairs(settings)}
    made = _validated(EvaluateContextOptions, {**given, "rows": rows, "model": model})
    with _progress(quiet=as_json) as progress:
        result = evaluate(made, _store(store), workers=workers, progress=progress)
    if as_json:
        _print_json(result.to_json())
        return
    typer.echo(result.to_markdown())


def _log_to_stderr() -> None:
    import logging

    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(message)s")


def _pairs(settings: Sequence[str] | None) -> Iterator[tuple[str, str]]:
    for setting in settings or ():
        key, sign, value = setting.partition("=")
        if not sign:
            raise InputError(f"`--set {setting}` must look like key=value, for example epochs=2.")
        yield key.strip(), value


def _store(uri: str | None) -> Store:
    from .storage import Store

    return Store(uri or Store.default_uri())


def _row_id(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise InputError(
            f"a row id is an integer, as `prunery show TABLE` prints it; found `{text}`."
        ) from None


def _prune_input(
    question: str | None,
    passages: Sequence[str] | None,
    question_file: Path | None,
    passages_file: str | None,
) -> tuple[str, list[str], list[str | None] | None]:
    texts = list(passages or ())
    if question_file is not None:
        if question is not None:
            texts.insert(0, question)
        question = _read_text(question_file).strip()
    if question is None:
        raise InputError("no question: give it as the first argument, or with --question-file.")
    if texts and passages_file:
        raise InputError("passages came both as arguments and with --passages; give one of them.")
    if texts:
        return question, texts, None
    if passages_file is None and sys.stdin.isatty():
        raise InputError(
            "no passages: give them as arguments, with --passages FILE, or on standard input."
        )
    if passages_file in (None, "-"):
        source, content = "standard input", sys.stdin.read()
    else:
        source, content = str(passages_file), _read_text(Path(str(passages_file)))
    return question, *_passages_of(content, source)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the path.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text: {error}. Convert it first.") from error


def _passages_of(content: str, source: str) -> tuple[list[str], list[str | None] | None]:
    if not content.lstrip().startswith(("{", '"')):
        blocks = [block for block in content.replace("\r\n", "\n").split("\n\n") if block.strip()]
        if not blocks:
            raise InputError(f"{source} holds no passages.")
        return blocks, None
    texts: list[str] = []
    titles: list[str | None] = []
    for number, line in enumerate(content.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{source}, line {number}: not JSON: {error}.") from error
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            raise InputError(
                f"{source}, line {number}: expected a string or an object with `text`; found"
                f" {line[:80]}"
            )
        texts.append(row["text"])
        titles.append(row.get("title"))
    return texts, titles if any(titles) else None


def _validated(model: Any, values: Mapping[str, Any]) -> Any:
    from pydantic import ValidationError

    from .errors import RecipeError

    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        known = ", ".join(sorted(model.model_fields))
        raise RecipeError(f"option `{where}`: {first['msg']}. Known options: {known}.") from error


def _summary(manifest: Manifest) -> dict[str, Any]:
    names = (
        "name",
        "step",
        "key",
        "rows",
        "kept",
        "dropped",
        "rejected",
        "seconds",
        "peak_memory_bytes",
        "created",
        "logical_digest",
    )
    return {name: _plain(getattr(manifest, name)) for name in names}


def _first_rows(store: Store, manifest: Manifest, count: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    if manifest.parts and count:
        for batch in store.table(manifest.key).batches():
            rows.extend(batch.slice(0, count - len(rows)).to_pylist())
            if len(rows) >= count:
                break
    return rows


def _columns(store: Store, manifest: Manifest) -> list[str]:
    return [f"{field.name}: {field.type}" for field in store.table(manifest.key).schema]


def _plain(value: Any) -> Any:
    """Any result of ours as plain JSON values."""
    import dataclasses

    if hasattr(value, "as_json"):
        return value.as_json()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):  # a named tuple
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return str(value)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2, default=str))


def _short(value: Any, width: int = 160) -> str:
    text = str(value).replace("\n", "\\n")
    return text if len(text) <= width else text[: width - 1] + "…"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    cells = [list(head), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    for row in cells:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        typer.echo(line.rstrip())


class _progress:
    """Bars on a terminal for a step of over two seconds; one plain line a step elsewhere."""

    PATIENCE = 2.0

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet

    def __enter__(self) -> Progress:
        from .pipelines.progress import Silent

        if self._quiet:
            self._made: Any = Silent()
        elif sys.stderr.isatty():
            self._made = _Bars(self.PATIENCE)
        else:
            self._made = _Lines()
        return self._made  # type: ignore[no-any-return]

    def __exit__(self, *error: object) -> None:
        close = getattr(self._made, "close", None)
        if close is not None:
            close()


class _Lines:
    """One line when a step is done."""

    def start(self, name: str, total: int) -> None:
        import time

        self._name, self._total, self._began = name, total, time.monotonic()

    def advance(self, n: int = 1) -> None:
        pass

    def finish(self) -> None:
        import time

        took = time.monotonic() - self._began
        state = f"{self._total} shards in {took:.1f} s" if self._total else "already there"
        typer.echo(f"{self._name}: {state}", err=True)


class _Bars(_Lines):
    """A bar that appears once a step has taken `patience` seconds."""

    def __init__(self, patience: float) -> None:
        import threading

        self._patience = patience
        self._lock = threading.RLock()
        self._timer: Any = None
        self._bar: Any = None
        self._done = 0

    def start(self, name: str, total: int) -> None:
        import threading

        super().start(name, total)
        with self._lock:
            self._done = 0
            if total:
                self._timer = threading.Timer(self._patience, self._show)
                self._timer.daemon = True
                self._timer.start()

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
        from rich.progress import TimeElapsedColumn as Elapsed

        with self._lock:
            if self._timer is None:
                return
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                Elapsed(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task(self._name, total=self._total, completed=self._done)

    def advance(self, n: int = 1) -> None:
        with self._lock:
            self._done += n
            if self._bar is not None:
                self._bar.update(self._task, completed=self._done)

    def close(self) -> None:
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def finish(self) -> None:
        self.close()
        super().finish()


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; errors of ours become one line and an exit code."""
    try:
        app(args=arguments)
    except InputError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(WRONG_INPUT)
    except PruneryError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(FAILED)
    except KeyboardInterrupt:
        typer.echo("stopped; run the same command again to go on", err=True)
        sys.exit(STOPPED)
    except BrokenPipeError:
        # The reader went away (`prunery ls | head`): not an error of ours.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


if __name__ == "__main__":
    main()
