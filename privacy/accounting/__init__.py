"""What a mechanism costs: filters, accountants, calibration."""
