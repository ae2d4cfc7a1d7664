"""What ``import conclave`` offers: scenarios, runs and audits from Python."""
