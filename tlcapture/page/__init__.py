"""The page: what an experiment's files hold, served to a browser on this machine or exported as one file."""
