"""What a run left behind: ``report``, ``predict``, and ``schema`` for the documents among it."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from conclave.cli.options import Json
from conclave.cli.output import print_json


def report(run: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Render a run's report again, from its directory alone."""
    from conclave.report.report import write_report
    from conclave.server.run_directory import RunDirectory

    path = write_report(RunDirectory.open(run))
    typer.echo(str(path))
    if as_json:
        print_json({"report": str(path)})


def predict(
    model: Annotated[Path, typer.Argument(help="A model folder or a run directory.")],
    source: Annotated[
        str, typer.Argument(metavar="INPUT", help="An image, a .npy array, digits:N or mnist:N; text: a prompt.")
    ],
    max_bytes: Annotated[int, typer.Option(help="Text: how many bytes to generate.")] = 128,
    temperature: Annotated[float, typer.Option(help="Text: below 1 is safer, above 1 wilder.")] = 0.7,
    seed: Annotated[int, typer.Option(help="Text: fixes the draw.")] = 0,
    as_json: Json = False,
) -> None:
    """Predict with a trained model: classify an image, or continue a text."""
    from conclave.report.predict import Continuation
    from conclave.report.predict import predict as run_prediction

    prediction = run_prediction(model, source, max_bytes=max_bytes, temperature=temperature, seed=seed)
    if isinstance(prediction, Continuation):
        typer.echo(source + prediction.text)
    else:
        truth = "" if prediction.truth is None else f" (truth {prediction.truth})"
        typer.echo(f"{prediction.label} with probability {prediction.probability:.3f}{truth}")
    if as_json:
        print_json(asdict(prediction))


def schema(
    name: Annotated[str | None, typer.Argument(help="Which document; without it, all names.")] = None,
    as_json: Json = False,
) -> None:
    """Print the JSON Schema of a document that Conclave writes."""
    from conclave.report.schemas import SCHEMAS, schema_of

    if name is not None:
        typer.echo(json.dumps(schema_of(name), indent=None if as_json else 2))
        return
    for known in SCHEMAS:
        typer.echo(known)
    if as_json:
        print_json({"schemas": list(SCHEMAS)})
