"""The Python API: experiments, captures, live capture, frames, figures, IPython."""
