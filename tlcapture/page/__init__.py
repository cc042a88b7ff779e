"""The page that shows an experiment, served to a browser on this machine or exported as one file."""
