"""What is left behind after every round, and in which order: metrics, then the checkpoint, then words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from conclave.server.metrics import line_of
from conclave.server.rounds.ask import full_exchange_bytes
from conclave.server.rounds.checkpoint import read_checkpoint, write_checkpoint
from conclave.server.rounds.coverage import Coverage
from conclave.server.rounds.model_state import ModelState
from conclave.server.rounds.outcome import RoundOutcome
from conclave.server.rounds.terms import Terms
from conclave.server.run_directory import RunDirectory

log = logging.getLogger("conclave.server")


class Record:
    """Writes down a run's rounds in its directory, from which a killed run goes on."""

    def __init__(
        self,
        run: RunDirectory,
        terms: Terms,
        model: ModelState,
        on_round: Callable[[Mapping[str, Any]], None],
        say: Callable[[str], None],
    ) -> None:
        """Write down the rounds of ``model``.

        Args:
            on_round: told each round's metrics.
            say: told in words what each round came to, and what was lost.
        """
        self._run, self._terms, self._model, self._on_round, self._say = run, terms, model, on_round, say
        federation, config = terms.federation, terms.plan.model
        self._coverage = Coverage(config.layers, config.experts.routed, federation.min_holders)
        self._full_bytes = full_exchange_bytes(terms, model.tensors)

    def resume(self) -> int:
        """Restore the checkpointed state, if there is one; return the last round that is done.

        Raises:
            BadInputError: the checkpoint is damaged or of another plan.
        """
        if not self._run.checkpoint.exists():
            return 0
        checkpoint = read_checkpoint(self._run.checkpoint)
        checkpoint.check_belongs(self._run.checkpoint, self._terms.plan.hash, self._terms.run_id)
        self._model.restore(checkpoint)
        return checkpoint.round

    def keep_only(self, done: int) -> None:
        """Forget the metrics of rounds that have no checkpoint, and count the others' holders.

        If a disk lost some of them, the run still goes on.
        """
        known = self._run.keep_metrics(done)
        if len(known) < done:
            said = f"the metrics of {done - len(known)} of {done} rounds are lost; counts over rounds leave these out"
            log.warning("%s: %s", self._run.path, said)
            self._say(said)
        self._coverage.restore(known)

    def add(self, outcome: RoundOutcome, seconds: float) -> None:
        """Write down a round."""
        self._coverage.add(outcome.replies.trained)
        line = line_of(outcome, self._coverage.metrics(), self._full_bytes, seconds)
        # Metrics first: a round that has a checkpoint has its metrics, and resuming drops those without one.
        self._run.append_metrics(line)
        write_checkpoint(self._run.checkpoint, self._model.checkpoint(outcome.number))
        said = outcome.sentence(self._terms.plan.rounds, seconds)
        log.info(said)
        self._on_round(line)
        self._say(said)
