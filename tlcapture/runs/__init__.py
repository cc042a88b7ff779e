"""What the commands do: capture, project, extract, each over many prompts and with a report at its end."""
