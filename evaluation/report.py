"""Results on the screen and in files, with everything that is needed to repeat them."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from dnnlib.errors import UserError
from dnnlib.files import make_folder, write_json
from dnnlib.jsonl import append_record
from evaluation.measure import Evaluator
from evaluation.records import describe_run
from metrics.gathering import Gathered
from metrics.results import format_result, format_summary, summarize_runs
from torch_utils import distributed


def check_outputs(json: Path | None, record: Path | None) -> None:
    """Make the folders of results, on rank 0, and find out before images are read that results cannot be written."""
    for path in (json, record):
        if path is not None and distributed.rank() == 0:
            make_folder(path.parent)
            appended = path == record and path.exists()  # other files are replaced, which is up to their folder
            if not os.access(path if appended else path.parent, os.W_OK):
                raise UserError(f'{path} cannot be written' + ('; choose another --record' if path == record else ''))


def report(
    evaluator: Evaluator, runs: Iterable[Gathered], source: dict[str, Any], json: Path | None, record: Path | None
) -> None:
    """Evaluate each run, print a line for each metric and warning, and write everything down, for each reference.

    Args:
        evaluator: Prepared; every rank calls this.
        runs: Sets of images as they are gathered; several are summed up.
        source: Where the images come from.
        json: File for all numbers: an object, or a list of them for several references.
        record: File of records to append to, a line for each reference.
    """
    results, about = [], None
    for gathered in runs:  # every rank takes part in gathering
        about = gathered.about
        results.append(evaluator.results(gathered))
        _print_results(results[-1])
    if distributed.rank() != 0:
        return
    records = [_merge(evaluator, about, list(of_one)) for of_one in zip(*results, strict=True)]
    for warning in dict.fromkeys(w for each in records for w in each['warnings']):
        click.echo(f'warning: {warning}', err=True)
    run = describe_run(evaluator.device, evaluator.config.batch)
    records = [{**each, 'images': {**each['images'], **source}, 'run': run} for each in records]
    if json is not None:
        write_json(json, records[0] if len(records) == 1 else records)
    for each in records if record is not None else ():
        append_record(record, each)


def _print_results(results: list[dict[str, Any]]) -> None:
    """A line for each metric, under the names of the references where there are several."""
    for result in results:
        if len(results) > 1:
            click.echo(f'{result["reference"]["name"]}:')
        for name, numbers in result['metrics'].items():
            click.echo(format_result(name, numbers))


def _merge(evaluator: Evaluator, about, results: list[dict[str, Any]]) -> dict[str, Any]:
    """What was found over all runs against one reference; of several runs, printed too."""
    warnings = list(dict.fromkeys(w for result in results for w in result['warnings']))
    merged = {**results[0], 'warnings': warnings}
    if len(results) > 1:
        del merged['metrics']
        merged['runs'] = [result['metrics'] for result in results]
        merged['summary'] = summarize_runs(evaluator.config.metrics, results)
        for name, summary in merged['summary'].items():
            click.echo(format_summary(name, summary, about.count, len(results)))
    return merged
