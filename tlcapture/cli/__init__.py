"""The command line: it parses, calls and prints, and imports no torch before there is work to do."""
