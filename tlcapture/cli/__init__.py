"""The command line: parses options, calls commands and prints. Imports torch only when a command needs it."""
