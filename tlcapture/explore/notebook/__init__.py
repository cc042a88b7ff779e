"""The IPython extension: magics and completion."""
