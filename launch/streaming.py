"""Prints output to stdout: a stream of one sample as it comes, or several samples whole."""

import sys
from collections.abc import Iterator

from .outputs import RequestOutput, merge_outputs


def print_stream(deltas: Iterator[RequestOutput]) -> RequestOutput:
    """Writes each delta at once; returns the whole output, whose token ids it prints if there was no text."""
    output = merge_outputs(_printed(deltas))
    print("" if output.outputs[0].text else ",".join(map(str, output.outputs[0].token_ids)))
    return output


def _printed(deltas: Iterator[RequestOutput]) -> Iterator[RequestOutput]:
    for delta in deltas:
        for sample in delta.outputs:
            sys.stdout.write(sample.text)
            sys.stdout.flush()
        yield delta


def print_samples(output: RequestOutput) -> None:
    """A paragraph a sample, with its number and, if it has one, its score; token ids where there is no text."""
    for sample in output.outputs:
        score = "" if sample.beam_score is None else f" ({sample.beam_score:.4f})"
        print(f"[{sample.index}]{score} {sample.text or ','.join(map(str, sample.token_ids))}")
