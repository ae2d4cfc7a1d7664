"""What is checked of a reply before it counts: form, receipt, norm, noise."""
