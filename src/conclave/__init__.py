"""Differentially private federated training of mixture-of-experts models.

From Python: ``conclave.simulate("digits")`` runs a federation, and what it returns is a :class:`Run`. All that this
module offers is loaded when it is first used.
"""

from importlib import import_module
from pathlib import Path

_HERE = Path(__file__).resolve().parent

if not (_HERE / "base").exists():
    # A checkout links its folders here, a wheel holds them. Flower's bundle leaves links out: there they lie above.
    __path__.append(str(_HERE.parent.parent))

from conclave.base.silence import silence  # noqa: E402

silence()  # before any library is imported

__all__ = ["Run", "Scenario", "audit_model", "load", "make_private", "simulate"]

TYPE_CHECKING = False  # as of typing, which takes longer to load than all the rest here
if TYPE_CHECKING:
    from conclave.api.audit import audit_model
    from conclave.api.run import Run, simulate
    from conclave.api.scenario import Scenario
    from conclave.model.store import load
    from conclave.privacy.training.make_private import make_private
else:
    _HOMES = {
        "Run": "conclave.api.run",
        "Scenario": "conclave.api.scenario",
        "audit_model": "conclave.api.audit",
        "load": "conclave.model.store",
        "make_private": "conclave.privacy.training.make_private",
        "simulate": "conclave.api.run",
    }

    def __getattr__(name):  # noqa: ANN202, ANN001
        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = found = getattr(import_module(_HOMES[name]), name)
        return found

    def __dir__():  # noqa: ANN202
        return sorted({*globals(), *__all__})
