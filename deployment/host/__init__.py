"""What any process needs that runs for months: certificates, logs, supervision, one at a time."""
