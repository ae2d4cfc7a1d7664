"""What a run leaves after a round, and in which order: nothing is told or taken as done that is not on disk."""

from __future__ import annotations

import json

import pytest
from server_samples import SmallFederation, ask, delta_for, train_reply

from conclave.base.errors import BadInputError
from conclave.server.record import Record
from conclave.server.run_directory import RunDirectory


class Run:
    """A small federation in a run directory."""

    def __init__(self, folder):
        self.federation = SmallFederation(assignment="random")
        self.directory = RunDirectory(folder)
        self.lines, self.words = [], []
        self.record = Record(
            self.directory, self.federation.terms, self.federation.model, self.lines.append, self.words.append
        )

    def go(self, number):
        requests = ask(self.federation, number)
        replies = [train_reply(request, delta_for(request, self.federation)) for request in requests]
        self.record.add(self.federation.answer(number, replies), 0.25)

    def written(self):
        return [json.loads(line) for line in (self.directory.path / "metrics.jsonl").read_text().splitlines()]


def test_a_round_is_written_down_then_told(tmp_path):
    run = Run(tmp_path)
    run.go(1)
    assert run.written() == run.lines
    assert (run.lines[0]["round"], run.lines[0]["accepted"], run.lines[0]["seconds"]) == (1, 4, 0.25)
    assert run.words == ["round 1 of 10: 4 of 4 replies, 0.2 s"]
    assert Run(tmp_path).record.resume() == 1


def test_metrics_come_before_the_checkpoint_and_are_forgotten_without_it(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.go(1)

    def dies(path, checkpoint):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("conclave.server.record.write_checkpoint", dies)
        with pytest.raises(KeyboardInterrupt):
            run.go(2)
    assert [line["round"] for line in run.written()] == [1, 2]
    assert [line["round"] for line in run.lines] == [1]  # nobody was told
    again = Run(tmp_path)
    done = again.record.resume()
    again.record.keep_only(done)
    assert done == 1
    assert [line["round"] for line in run.written()] == [1]
    again.go(2)
    assert again.lines[-1]["holders_mean"] == [
        [(one + two) / 2 for one, two in zip(*rows, strict=True)]
        for rows in zip(run.lines[0]["holders"], again.lines[-1]["holders"], strict=True)
    ]


def test_lost_metrics_are_told_and_the_run_goes_on(tmp_path):
    run = Run(tmp_path)
    run.go(1)
    (tmp_path / "metrics.jsonl").unlink()
    again = Run(tmp_path)
    again.record.keep_only(again.record.resume())
    assert again.words == ["the metrics of 1 of 1 rounds are lost; counts over rounds leave these out"]


def test_the_checkpoint_of_another_run_is_refused(tmp_path):
    run = Run(tmp_path)
    run.go(1)
    other = SmallFederation(plan=run.federation.plan.model_copy(update={"rounds": 9}))
    record = Record(run.directory, other.terms, other.model, run.lines.append, run.words.append)
    with pytest.raises(BadInputError, match="belongs to another plan"):
        record.resume()
