"""Differentially private federated training of mixture-of-experts models."""

from pathlib import Path

_HERE = Path(__file__).resolve().parent

if not (_HERE / "base").exists():
    # A checkout links its folders here, a wheel holds them. Flower's bundle leaves links out: there they lie above.
    __path__.append(str(_HERE.parent.parent))

from conclave.base.silence import silence  # noqa: E402

silence()  # before any library is imported
