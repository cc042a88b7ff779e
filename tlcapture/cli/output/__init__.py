"""What commands print: progress, tables, answers, logs."""
