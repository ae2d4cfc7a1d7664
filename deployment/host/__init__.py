"""What any process that runs for months needs: certificates, logs, supervision, a lock."""
