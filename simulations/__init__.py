"""A whole federation on one machine: engines, scenarios, the report.

Importing this package switches off every call-out of the libraries, before they are imported.
"""

from privacy.no_callbacks import silence

silence()
